package access

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MaxConditions bounds the conditions of one rule, on both levels together
// (reference/access-and-audit.md section 1.5).
const MaxConditions = 10

// Patterns say what a rule is for (reference/access-and-audit.md section 1.5).
const (
	PatternOnce     = "time-based-conditions:once"
	PatternWeekly   = "time-based-conditions:weekly"
	PatternAllDay   = "time-based-conditions:weekly:all-day"
	PatternHours    = "time-based-conditions:weekly:custom-hours"
	PatternResource = "attribute-based-condition:resource:literal-and-wildcard"
)

// Keys of conditions on the time of a request.
const (
	KeyTime      = "{{environment.attributes.current_time}}"
	KeyDateTime  = "{{environment.attributes.current_date_time}}"
	KeyDate      = "{{environment.attributes.current_date}}"
	KeyDayOfWeek = "{{environment.attributes.day_of_week}}"
)

// Operators that join conditions.
const (
	And = "and"
	Or  = "or"
)

// Rule narrows a policy further: one condition, or conditions joined by and or
// or, of which each may be such a group once more. It must be true at the time
// of the request.
type Rule struct {
	Operator   string          `json:"operator"`
	Key        string          `json:"key,omitempty"`
	Value      json.RawMessage `json:"value,omitempty"`
	Conditions []Rule          `json:"conditions,omitempty"`
}

// group reports whether the rule joins others.
func (r *Rule) group() bool { return r.Operator == And || r.Operator == Or }

// validateRule checks a policy's rule and pattern against each other and
// against the forms of the reference.
func (p *Policy) validateRule() error {
	if p.Rule == nil {
		if p.Pattern != "" {
			return errors.New("pattern needs a rule")
		}
		return nil
	}
	if p.Type != TypeAccess {
		return errors.New("only a policy of type access can have a rule")
	}
	var keys []string
	switch p.Pattern {
	case PatternOnce:
		keys = []string{KeyDateTime, KeyDate}
	case PatternAllDay:
		keys = []string{KeyDayOfWeek}
	case PatternHours, PatternWeekly:
		keys = []string{KeyDayOfWeek, KeyTime}
	case PatternResource:
	case "":
		return errors.New("a rule needs a pattern, such as " + PatternHours)
	default:
		return fmt.Errorf("pattern %q is not known", p.Pattern)
	}
	n := 0
	return p.Rule.validate(keys, 1, &n)
}

// validate checks one level; keys are those that the pattern admits, nil means
// attributes of the resource. n counts the conditions.
func (r *Rule) validate(keys []string, level int, n *int) error {
	if r.group() {
		if level > 2 {
			return errors.New("the rule's conditions are nested more than two levels deep")
		}
		if r.Key != "" || r.Value != nil || len(r.Conditions) == 0 {
			return fmt.Errorf("operator %s takes conditions, and neither key nor value", r.Operator)
		}
		for i := range r.Conditions {
			if err := r.Conditions[i].validate(keys, level+1, n); err != nil {
				return err
			}
		}
		return nil
	}
	if *n++; *n > MaxConditions {
		return fmt.Errorf("a rule has at most %d conditions", MaxConditions)
	}
	if r.Conditions != nil {
		return fmt.Errorf("operator %q does not take conditions; use and or or", r.Operator)
	}
	if keys == nil {
		a, ok := r.attribute()
		if !ok {
			return fmt.Errorf("condition key %q is not of the form {{resource.attributes.NAME}}, or its value is not a string, boolean or array", r.Key)
		}
		if err := a.validate(); err != nil {
			return fmt.Errorf("condition %s: %w", r.Key, err)
		}
		return nil
	}
	if !slices.Contains(keys, r.Key) {
		return fmt.Errorf("condition key %q does not go with the pattern; it takes %s", r.Key, strings.Join(keys, ", "))
	}
	if _, err := r.holdsAt(time.Unix(0, 0)); err != nil {
		return fmt.Errorf("condition %s: %w", r.Key, err)
	}
	return nil
}

const (
	resourceKeyPrefix = "{{resource.attributes."
	keySuffix         = "}}"
)

// attribute reads a condition on the resource as a demand.
func (r *Rule) attribute() (Attribute, bool) {
	name, ok := strings.CutPrefix(r.Key, resourceKeyPrefix)
	name, end := strings.CutSuffix(name, keySuffix)
	if !ok || !end || name == "" {
		return Attribute{}, false
	}
	a := Attribute{Key: name, Operator: Operator(r.Operator)}
	if err := a.Value.UnmarshalJSON(r.Value); err != nil {
		return Attribute{}, false
	}
	if (a.Operator == StringEqualsAnyOf || a.Operator == StringMatchAnyOf) && a.Value.Exists == nil && a.Value.List == nil {
		a.Value = Value{List: []string{a.Value.Text}} // as clients write a list of one
	}
	return a, true
}

// Holds reports whether the rule is true for a request. A condition that cannot
// be evaluated is false, whatever it says.
func (r *Rule) Holds(q Request) bool {
	if r == nil {
		return true
	}
	switch r.Operator {
	case And:
		for i := range r.Conditions {
			if !r.Conditions[i].Holds(q) {
				return false
			}
		}
		return len(r.Conditions) > 0
	case Or:
		return slices.ContainsFunc(r.Conditions, func(c Rule) bool { return c.Holds(q) })
	}
	if a, ok := r.attribute(); ok {
		value, present := q.Resource[a.Key]
		return a.matches(value, present)
	}
	if q.Time.IsZero() {
		return false
	}
	holds, err := r.holdsAt(q.Time)
	return err == nil && holds
}

// holdsAt evaluates a condition on the time. The instant is shifted to the
// offset that the value names and then compared; daylight saving is not
// applied (reference/access-and-audit.md section 2.4).
func (r *Rule) holdsAt(now time.Time) (bool, error) {
	if len(r.Value) > MaxValueLength {
		return false, fmt.Errorf("value must have at most %d characters", MaxValueLength)
	}
	switch r.Key {
	case KeyDayOfWeek:
		return r.onDay(now)
	case KeyTime:
		return r.compareTime("time", now, "15:04:05Z07:00", func(t time.Time) int64 {
			return int64(t.Hour())*3600 + int64(t.Minute())*60 + int64(t.Second())
		})
	case KeyDateTime:
		return r.compareTime("dateTime", now, time.RFC3339, time.Time.Unix)
	case KeyDate:
		return r.compareTime("date", now, "2006-01-02Z07:00", func(t time.Time) int64 {
			return int64(t.Year())*10000 + int64(t.Month())*100 + int64(t.Day())
		})
	}
	return false, fmt.Errorf("key %q is not known", r.Key)
}

// compareTime compares now, in the value's offset, with the value on the scale
// that number gives.
func (r *Rule) compareTime(kind string, now time.Time, layout string, number func(time.Time) int64) (bool, error) {
	var text string
	if err := json.Unmarshal(r.Value, &text); err != nil {
		return false, errors.New("value must be a string")
	}
	bound, err := time.Parse(layout, text)
	if err != nil {
		return false, fmt.Errorf("value %q does not have the form %s", text, layout)
	}
	_, offset := bound.Zone()
	x, y := number(now.In(time.FixedZone("", offset))), number(bound)
	switch r.Operator {
	case kind + "LessThan":
		return x < y, nil
	case kind + "LessThanOrEquals":
		return x <= y, nil
	case kind + "GreaterThan":
		return x > y, nil
	case kind + "GreaterThanOrEquals":
		return x >= y, nil
	}
	return false, fmt.Errorf("operator %q is not one of %[2]sLessThan, %[2]sLessThanOrEquals, %[2]sGreaterThan, %[2]sGreaterThanOrEquals", r.Operator, kind)
}

// onDay compares the day of the week: 1 is Monday, 7 Sunday.
func (r *Rule) onDay(now time.Time) (bool, error) {
	var days []json.RawMessage
	switch r.Operator {
	case "dayOfWeekEquals":
		days = []json.RawMessage{r.Value}
	case "dayOfWeekAnyOf":
		days = []json.RawMessage{r.Value} // as clients write a list of one
		if len(r.Value) > 0 && r.Value[0] == '[' {
			days = nil // or Unmarshal would write into the rule's own value
			if err := json.Unmarshal(r.Value, &days); err != nil || len(days) == 0 || len(days) > MaxAnyOf {
				return false, fmt.Errorf("operator dayOfWeekAnyOf takes an array of 1 to %d days", MaxAnyOf)
			}
		}
	default:
		return false, fmt.Errorf("operator %q is not one of dayOfWeekEquals, dayOfWeekAnyOf", r.Operator)
	}
	today := false
	for _, d := range days {
		day, zone, err := parseDay(d)
		if err != nil {
			return false, err
		}
		weekday := int(now.In(zone).Weekday())
		if weekday == 0 {
			weekday = 7
		}
		today = today || weekday == day
	}
	return today, nil
}

// parseDay reads "1+00:00", or a bare number, which counts in UTC.
func parseDay(raw json.RawMessage) (day int, zone *time.Location, err error) {
	text := string(raw)
	if len(raw) > 0 && raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			return 0, nil, errors.New("a day must be a string")
		}
	}
	number, offset := text, "+00:00"
	if len(text) > 1 {
		number, offset = text[:1], text[1:]
	}
	day, err = strconv.Atoi(number)
	t, zoneErr := time.Parse("-07:00", offset)
	if err != nil || zoneErr != nil || day < 1 || day > 7 {
		return 0, nil, fmt.Errorf("day %q is not of the form 1+00:00 (Monday) to 7+00:00 (Sunday)", text)
	}
	_, seconds := t.Zone()
	return day, time.FixedZone("", seconds), nil
}

func (r *Rule) String() string {
	b, err := json.Marshal(r)
	if err != nil {
		return ""
	}
	return string(b)
}

func (r *Rule) equal(s *Rule) bool {
	if r == nil || s == nil {
		return r == s
	}
	return r.String() == s.String()
}
