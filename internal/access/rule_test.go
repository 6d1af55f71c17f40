package access_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
)

// condition builds a condition from Go values.
func condition(key, operator string, value any) access.Rule {
	b, err := json.Marshal(value)
	if err != nil {
		panic(err)
	}
	return access.Rule{Key: key, Operator: operator, Value: b}
}

func joined(operator string, conditions ...access.Rule) access.Rule {
	return access.Rule{Operator: operator, Conditions: conditions}
}

func at(text string) time.Time {
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		panic(err)
	}
	return t
}

func TestAConditionOnTheTimeComparesInTheOffsetThatItNames(t *testing.T) {
	for _, tt := range []struct {
		name     string
		key      string
		operator string
		value    any
		now      string
		want     bool
	}{
		{"before the hour", access.KeyTime, "timeLessThan", "09:00:00+00:00", "2026-06-15T08:59:59Z", true},
		{"before the hour, at the hour", access.KeyTime, "timeLessThan", "09:00:00+00:00", "2026-06-15T09:00:00Z", false},
		{"until the hour, at the hour", access.KeyTime, "timeLessThanOrEquals", "09:00:00+00:00", "2026-06-15T09:00:00Z", true},
		{"until the hour, within its first second", access.KeyTime, "timeLessThanOrEquals", "09:00:00+00:00", "2026-06-15T09:00:00.9Z", true},
		{"until the hour, a second later", access.KeyTime, "timeLessThanOrEquals", "09:00:00+00:00", "2026-06-15T09:00:01Z", false},
		{"after the hour, at the hour", access.KeyTime, "timeGreaterThan", "09:00:00+00:00", "2026-06-15T09:00:00Z", false},
		{"after the hour, a second later", access.KeyTime, "timeGreaterThan", "09:00:00+00:00", "2026-06-15T09:00:01Z", true},
		{"from the hour on, at the hour", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00+00:00", "2026-06-15T09:00:00Z", true},
		{"from the hour on, a second earlier", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00+00:00", "2026-06-15T08:59:59Z", false},
		{"nine in New York is two in the afternoon in UTC", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00-05:00", "2026-06-15T14:00:00Z", true},
		{"nine in New York is not nine in UTC", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00-05:00", "2026-06-15T13:59:59Z", false},
		{"the time of day of another offset may be of another day", access.KeyTime, "timeLessThan", "02:00:00+05:30", "2026-06-15T19:00:00Z", true},
		{"an offset of half an hour", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00+05:30", "2026-06-15T03:30:00Z", true},
		{"the zone of the clock does not count", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00Z", "2026-06-15T18:00:00+09:00", true},
		{"no daylight saving in summer", access.KeyTime, "timeGreaterThanOrEquals", "09:00:00-05:00", "2026-07-15T13:30:00Z", false},
		{"midnight begins the day", access.KeyTime, "timeGreaterThanOrEquals", "00:00:00Z", "2026-06-15T00:00:00Z", true},

		{"before an instant", access.KeyDateTime, "dateTimeLessThan", "2026-06-15T09:00:00-05:00", "2026-06-15T13:59:59Z", true},
		{"before an instant, at it", access.KeyDateTime, "dateTimeLessThan", "2026-06-15T09:00:00-05:00", "2026-06-15T14:00:00Z", false},
		{"until an instant", access.KeyDateTime, "dateTimeLessThanOrEquals", "2026-06-15T09:00:00-05:00", "2026-06-15T14:00:00Z", true},
		{"after an instant, at it", access.KeyDateTime, "dateTimeGreaterThan", "2026-06-15T09:00:00-05:00", "2026-06-15T14:00:00Z", false},
		{"from an instant on", access.KeyDateTime, "dateTimeGreaterThanOrEquals", "2026-06-15T09:00:00-05:00", "2026-06-15T14:00:00Z", true},
		{"years later", access.KeyDateTime, "dateTimeLessThan", "2026-06-15T09:00:00Z", "2029-01-01T00:00:00Z", false},

		{"before a date", access.KeyDate, "dateLessThan", "2026-06-15Z", "2026-06-14T23:59:59Z", true},
		{"before a date, on it", access.KeyDate, "dateLessThan", "2026-06-15Z", "2026-06-15T00:00:00Z", false},
		{"until a date, to its last second", access.KeyDate, "dateLessThanOrEquals", "2026-06-15Z", "2026-06-15T23:59:59Z", true},
		{"after a date, on it", access.KeyDate, "dateGreaterThan", "2026-06-15Z", "2026-06-15T23:59:59Z", false},
		{"from a date on", access.KeyDate, "dateGreaterThanOrEquals", "2026-06-15Z", "2026-06-15T00:00:00Z", true},
		{"a date where the sun rises first", access.KeyDate, "dateGreaterThanOrEquals", "2026-06-15+14:00", "2026-06-14T10:00:00Z", true},
		{"the last day of a year is before the first of the next", access.KeyDate, "dateLessThan", "2027-01-01Z", "2026-12-31T23:59:59Z", true},

		{"Monday", access.KeyDayOfWeek, "dayOfWeekEquals", "1+00:00", "2026-06-15T00:00:00Z", true},
		{"the last second of Sunday is not Monday", access.KeyDayOfWeek, "dayOfWeekEquals", "1+00:00", "2026-06-14T23:59:59Z", false},
		{"Sunday is the seventh day", access.KeyDayOfWeek, "dayOfWeekEquals", "7+00:00", "2026-06-14T23:59:59Z", true},
		{"the last second of Monday", access.KeyDayOfWeek, "dayOfWeekEquals", "1+00:00", "2026-06-15T23:59:59Z", true},
		{"Monday in the far east begins on Sunday", access.KeyDayOfWeek, "dayOfWeekEquals", "1+14:00", "2026-06-14T10:00:00Z", true},
		{"and ends on Monday", access.KeyDayOfWeek, "dayOfWeekEquals", "1+14:00", "2026-06-15T10:00:00Z", false},
		{"Monday in the far west ends on Tuesday", access.KeyDayOfWeek, "dayOfWeekEquals", "1-12:00", "2026-06-16T11:59:59Z", true},
		{"and begins at noon", access.KeyDayOfWeek, "dayOfWeekEquals", "1-12:00", "2026-06-15T11:59:59Z", false},
		{"a day as a number", access.KeyDayOfWeek, "dayOfWeekEquals", 1, "2026-06-15T12:00:00Z", true},
		{"a day as a number in text", access.KeyDayOfWeek, "dayOfWeekEquals", "1", "2026-06-15T12:00:00Z", true},
		{"one of several days", access.KeyDayOfWeek, "dayOfWeekAnyOf", []any{"5+00:00", 1}, "2026-06-15T12:00:00Z", true},
		{"none of several days", access.KeyDayOfWeek, "dayOfWeekAnyOf", []any{"5+00:00", "6+00:00", "7+00:00"}, "2026-06-15T12:00:00Z", false},
		{"a list of one that is not written as a list", access.KeyDayOfWeek, "dayOfWeekAnyOf", "1+00:00", "2026-06-15T12:00:00Z", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := condition(tt.key, tt.operator, tt.value)
			before := r.String()
			q := access.Request{Time: at(tt.now)}
			for range 2 {
				if got := r.Holds(q); got != tt.want || ruleByHand(&r, q) != tt.want {
					t.Errorf("holds = %t, the reference %t, want %t", got, ruleByHand(&r, q), tt.want)
				}
			}
			if r.String() != before {
				t.Errorf("the rule has changed from %s to %s", before, &r)
			}
			if r.Holds(access.Request{}) {
				t.Error("it holds when nobody knows the time")
			}
		})
	}
}

func TestConditionsAreJoinedByAndAndOr(t *testing.T) {
	yes, no := condition(access.KeyDayOfWeek, "dayOfWeekEquals", 1), condition(access.KeyDayOfWeek, "dayOfWeekEquals", 2)
	broken := condition(access.KeyDayOfWeek, "dayOfWeekEquals", "x")
	q := access.Request{Time: monday}
	for _, tt := range []struct {
		name string
		rule access.Rule
		want bool
	}{
		{"both", joined(access.And, yes, yes), true},
		{"one of two where both are asked", joined(access.And, yes, no), false},
		{"one of two", joined(access.Or, no, yes), true},
		{"none of two", joined(access.Or, no, no), false},
		{"a group in a group", joined(access.And, yes, joined(access.Or, no, yes)), true},
		{"a group that fails in a group", joined(access.And, yes, joined(access.And, no, yes)), false},
		{"what cannot be evaluated is false", joined(access.And, yes, broken), false},
		{"what cannot be evaluated beside what is true", joined(access.Or, broken, yes), true},
		{"nothing and nothing", joined(access.And), false},
		{"nothing or nothing", joined(access.Or), false},
		{"an operator that joins nothing known", joined("xor", yes, no), false},
		{"nothing at all", access.Rule{}, false},
	} {
		if got := tt.rule.Holds(q); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
	var none *access.Rule
	if !none.Holds(access.Request{}) {
		t.Error("a policy without a rule does not hold")
	}
}

func TestAConditionOnTheResourceComparesItsAttribute(t *testing.T) {
	key := "{{resource.attributes.path}}"
	for _, tt := range []struct {
		operator string
		value    any
		resource map[string]string
		want     bool
	}{
		{"stringEquals", "a/b", map[string]string{"path": "a/b"}, true},
		{"stringEquals", "a/*", map[string]string{"path": "a/b"}, false},
		{"stringMatch", "a/*", map[string]string{"path": "a/b"}, true},
		{"stringMatch", "*", nil, false},
		{"stringExists", true, map[string]string{"path": ""}, true},
		{"stringExists", true, nil, false},
		{"stringExists", false, nil, true},
		{"stringEqualsAnyOf", []string{"x", "a/b"}, map[string]string{"path": "a/b"}, true},
		{"stringEqualsAnyOf", "a/b", map[string]string{"path": "a/b"}, true},
		{"stringMatchAnyOf", []string{"x", "a/?"}, map[string]string{"path": "a/b"}, true},
		{"stringMatchAnyOf", "a/?", map[string]string{"path": "a/b"}, true},
		{"stringEquals", []string{"a/b"}, map[string]string{"path": "a/b"}, false},
		{"stringExists", "true", map[string]string{"path": "a/b"}, false},
		{"stringEqualsAnyOf", true, map[string]string{"path": "a/b"}, false},
		{"stringLike", "a/b", map[string]string{"path": "a/b"}, false},
	} {
		// The time plays no part, also when there is none.
		for _, now := range []time.Time{monday, {}} {
			r := condition(key, tt.operator, tt.value)
			q := access.Request{Resource: tt.resource, Time: now}
			if got := r.Holds(q); got != tt.want || ruleByHand(&r, q) != tt.want {
				t.Errorf("%s on %v: %t, the reference %t, want %t", r.String(), tt.resource, got, ruleByHand(&r, q), tt.want)
			}
		}
	}
}

func TestARuleMustHaveTheFormOfItsPattern(t *testing.T) {
	catalog := small(t)
	from := condition(access.KeyTime, "timeGreaterThanOrEquals", "09:00:00+00:00")
	to := condition(access.KeyTime, "timeLessThanOrEquals", "17:00:00+00:00")
	day := condition(access.KeyDayOfWeek, "dayOfWeekAnyOf", []string{"1+00:00", "2+00:00"})
	begin := condition(access.KeyDateTime, "dateTimeGreaterThanOrEquals", "2026-06-15T09:00:00Z")
	path := condition("{{resource.attributes.path}}", "stringMatch", "a/*")
	many := func(n int) []access.Rule {
		var out []access.Rule
		for range n {
			out = append(out, day)
		}
		return out
	}
	on := func(key, operator string, value any) access.Rule { return condition(key, operator, value) }
	raw := func(key, operator, value string) access.Rule {
		return access.Rule{Key: key, Operator: operator, Value: json.RawMessage(value)}
	}
	for _, tt := range []struct {
		name    string
		pattern string
		rule    *access.Rule
		want    string // part of the error; empty for none
	}{
		{"no pattern and no rule", "", nil, ""},
		{"a pattern without a rule", access.PatternOnce, nil, "pattern needs a rule"},
		{"a rule without a pattern", "", &day, "needs a pattern"},
		{"an unknown pattern", "time-based-conditions:monthly", &day, "not known"},
		{"a day", access.PatternAllDay, &day, ""},
		{"a day and hours", access.PatternHours, new(joined(access.And, day, from, to)), ""},
		{"the short name of weekly", access.PatternWeekly, new(joined(access.And, day, from, to)), ""},
		{"two levels", access.PatternHours, new(joined(access.Or, joined(access.And, day, from), joined(access.And, day, to))), ""},
		{"three levels", access.PatternHours, new(joined(access.Or, joined(access.And, day, joined(access.And, from, to)))), "two levels"},
		{"ten conditions", access.PatternAllDay, new(joined(access.Or, many(10)...)), ""},
		{"eleven conditions", access.PatternAllDay, new(joined(access.Or, many(11)...)), "at most 10"},
		{"eleven conditions on two levels", access.PatternAllDay, new(joined(access.Or, joined(access.Or, many(6)...), joined(access.Or, many(5)...))), "at most 10"},
		{"hours in an all-day rule", access.PatternAllDay, new(joined(access.And, day, from)), "does not go with the pattern"},
		{"a one-off window with a weekday", access.PatternOnce, new(joined(access.And, begin, day)), "does not go with the pattern"},
		{"a one-off window", access.PatternOnce, &begin, ""},
		{"a one-off window of dates", access.PatternOnce, new(on(access.KeyDate, "dateLessThan", "2026-06-15Z")), ""},
		{"an instant in a weekly rule", access.PatternHours, &begin, "does not go with the pattern"},
		{"a resource attribute", access.PatternResource, &path, ""},
		{"a resource attribute with one of several values that is one", access.PatternResource, new(on("{{resource.attributes.path}}", "stringMatchAnyOf", "a")), ""},
		{"a resource attribute in a rule on time", access.PatternHours, &path, "does not go with the pattern"},
		{"the time in a rule on attributes", access.PatternResource, &from, "{{resource.attributes.NAME}}"},
		{"an attribute without a name", access.PatternResource, new(on("{{resource.attributes.}}", "stringMatch", "a")), "{{resource.attributes.NAME}}"},
		{"an attribute without braces", access.PatternResource, new(on("resource.attributes.path", "stringMatch", "a")), "{{resource.attributes.NAME}}"},
		{"an attribute with an empty value", access.PatternResource, new(on("{{resource.attributes.path}}", "stringMatch", "")), "1 to 1000"},
		{"an attribute with a value that is too long", access.PatternResource, new(on("{{resource.attributes.path}}", "stringMatch", strings.Repeat("x", 1001))), "1 to 1000"},
		{"an attribute with too many values", access.PatternResource, new(on("{{resource.attributes.path}}", "stringEqualsAnyOf", strings.Split("abcdefghijk", ""))), "1 to 10"},
		{"an attribute with a number", access.PatternResource, new(on("{{resource.attributes.path}}", "stringEquals", 1)), "not a string"},
		{"an attribute with an operator on time", access.PatternResource, new(on("{{resource.attributes.path}}", "timeLessThan", "a")), "not known"},
		{"a group with a key", access.PatternAllDay, &access.Rule{Operator: access.And, Key: access.KeyDayOfWeek, Conditions: many(1)}, "neither key nor value"},
		{"a group with a value", access.PatternAllDay, &access.Rule{Operator: access.And, Value: []byte("1"), Conditions: many(1)}, "neither key nor value"},
		{"a group of nothing", access.PatternAllDay, new(joined(access.And)), "takes conditions"},
		{"a group in a group of nothing", access.PatternAllDay, new(joined(access.And, day, joined(access.Or))), "takes conditions"},
		{"a condition with conditions", access.PatternAllDay, &access.Rule{Operator: "dayOfWeekEquals", Key: access.KeyDayOfWeek, Value: []byte("1"), Conditions: many(1)}, "does not take conditions"},
		{"no key", access.PatternAllDay, new(on("", "dayOfWeekEquals", 1)), "does not go with the pattern"},
		{"no operator", access.PatternAllDay, new(on(access.KeyDayOfWeek, "", 1)), "is not one of"},
		{"no value", access.PatternAllDay, new(raw(access.KeyDayOfWeek, "dayOfWeekEquals", "")), "not of the form"},
		{"an unknown key", access.PatternAllDay, new(on("{{environment.attributes.address}}", "stringEquals", "x")), "does not go with the pattern"},
		{"the operator of another key", access.PatternHours, new(on(access.KeyTime, "dateTimeLessThan", "09:00:00Z")), "is not one of"},
		{"equality of times", access.PatternHours, new(on(access.KeyTime, "timeEquals", "09:00:00Z")), "is not one of"},
		{"a day by a time's operator", access.PatternHours, new(on(access.KeyDayOfWeek, "timeLessThan", 1)), "is not one of"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOn(is(access.ServiceName, "is"))
			p.Pattern, p.Rule = tt.pattern, tt.rule
			wantInvalid(t, p.Validate(catalog), tt.want)
		})
	}
}

func wantInvalid(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case want != "" && err == nil:
		t.Error("accepted")
	case want != "" && !strings.Contains(err.Error(), want):
		t.Errorf("the error %q does not say %q", err, want)
	}
}

// Values that cannot be read are refused when a policy is written, and are
// false should one come to be stored.
func TestAValueThatCannotBeReadIsRefusedAndFalse(t *testing.T) {
	catalog := small(t)
	for key, values := range map[string][]any{
		access.KeyTime: {
			"", "9", "09:00", "09:00:00", "24:00:00Z", "09:60:00Z", "09:00:60Z", "09:00:00+5", "09:00:00+25:00", "09:00:00 Z", " 09:00:00Z", "noon", nil, 9, true,
			[]string{"09:00:00Z"}, map[string]string{}, "09:00:00Z09:00:00Z", "2026-06-15T09:00:00Z", "09:00:00." + strings.Repeat("0", 2000) + "Z",
		},
		access.KeyDateTime: {
			"", "2026-06-15", "2026-06-15T09:00:00", "2026-06-15 09:00:00Z", "2026-02-30T00:00:00Z", "2026-13-01T00:00:00Z", "2026-06-15T24:00:00Z", 1781514000, nil,
			[]string{"2026-06-15T09:00:00Z"}, "now",
		},
		access.KeyDate: {"", "2026-06-15", "2026-02-30Z", "15.06.2026Z", "2026-06-15T09:00:00Z", 20260615, nil},
		access.KeyDayOfWeek: {
			"", "0", "8", 0, 8, -1, 1.5, "0+00:00", "8+00:00", "1+0:00", "1+00", "1 +00:00", "1Z", "11+00:00", "Monday", nil, true, map[string]int{}, []int{}, []int{1, 8}, []any{1, nil},
			[][]int{{1}}, []int{1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4}, "1+25:00",
		},
	} {
		operators := []string{"dayOfWeekEquals", "dayOfWeekAnyOf"}
		pattern := access.PatternHours
		if key != access.KeyDayOfWeek {
			kind := map[string]string{access.KeyTime: "time", access.KeyDateTime: "dateTime", access.KeyDate: "date"}[key]
			operators = []string{kind + "LessThan", kind + "GreaterThanOrEquals"}
			if kind != "time" {
				pattern = access.PatternOnce
			}
		}
		for _, value := range values {
			for _, operator := range operators {
				r := condition(key, operator, value)
				p := policyOn(is(access.ServiceName, "is"))
				p.Pattern, p.Rule = pattern, &r
				if err := p.Validate(catalog); err == nil {
					t.Errorf("%s is accepted", &r)
				}
				for day := range 7 {
					if r.Holds(access.Request{Time: monday.AddDate(0, 0, day)}) {
						t.Errorf("%s holds", &r)
					}
				}
			}
		}
	}
}

func TestARefusalByTheRuleSaysWhatTheConditionsAreAndWhatTimeItIs(t *testing.T) {
	p := policyOn(is(access.ServiceName, "is"))
	r := condition(access.KeyDayOfWeek, "dayOfWeekEquals", "1+00:00")
	p.Rule = &r
	q := access.Request{
		Subject: "iam-Profile-1", AccountID: accountA, Action: "c.read", Time: monday.AddDate(0, 0, 1),
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
	}
	v := sliceView{world{policies: []*access.Policy{p}}, small(t)}
	trace := access.Decide(v, q).Explain()
	c, _ := trace.Failed()
	if c.Name != "policy-rule" || !strings.Contains(c.Wanted, "dayOfWeekEquals") || !strings.Contains(c.Found, "2026-06-16T09:00:00Z") || !strings.Contains(c.Hint, "policy-1") {
		t.Errorf("failed check %+v", c)
	}
	q.Time = monday
	if !access.Decide(v, q).Allowed {
		t.Error("refused on a Monday")
	}
}

func TestPoliciesWithOtherConditionsAreNotTheSameGrant(t *testing.T) {
	a, b := policyOn(is(access.ServiceName, "is")), policyOn(is(access.ServiceName, "is"))
	monday, tuesday := condition(access.KeyDayOfWeek, "dayOfWeekEquals", 1), condition(access.KeyDayOfWeek, "dayOfWeekEquals", 2)
	a.Rule = &monday
	if a.SameGrant(b) || b.SameGrant(a) {
		t.Error("with and without conditions")
	}
	if b.Rule = &tuesday; a.SameGrant(b) {
		t.Error("with other conditions")
	}
	same := condition(access.KeyDayOfWeek, "dayOfWeekEquals", 1)
	if b.Rule = &same; !a.SameGrant(b) {
		t.Error("with equal conditions they differ")
	}
}

// FuzzRule reads a rule as the API does. Whatever it says, evaluating it does
// not panic and does not change it; one that Validate accepts means the same to
// both implementations.
func FuzzRule(f *testing.F) {
	for _, seed := range []struct{ pattern, rule string }{
		{access.PatternAllDay, `{"key":"{{environment.attributes.day_of_week}}","operator":"dayOfWeekAnyOf","value":["1+00:00",2]}`},
		{access.PatternAllDay, `{"key":"{{environment.attributes.day_of_week}}","operator":"dayOfWeekEquals","value":7}`},
		{access.PatternHours, `{"operator":"and","conditions":[{"key":"{{environment.attributes.current_time}}","operator":"timeLessThan","value":"09:00:00-05:00"},` +
			`{"operator":"or","conditions":[{"key":"{{environment.attributes.day_of_week}}","operator":"dayOfWeekEquals","value":"1"}]}]}`},
		{access.PatternOnce, `{"key":"{{environment.attributes.current_date_time}}","operator":"dateTimeGreaterThan","value":"2026-06-15T9:00:00,5+24:60"}`},
		{access.PatternOnce, `{"key":"{{environment.attributes.current_date}}","operator":"dateLessThanOrEquals","value":"0000-02-29-12:00"}`},
		{access.PatternResource, `{"key":"{{resource.attributes.path}}","operator":"stringMatchAnyOf","value":["a/*","{{?}}"]}`},
		{access.PatternResource, `{"operator":"or","conditions":[{"key":"{{resource.attributes.path}}","operator":"stringExists","value":false}]}`},
	} {
		f.Add(seed.pattern, []byte(seed.rule), monday.Unix(), "a/b")
	}
	catalog := small(f)
	f.Fuzz(func(t *testing.T, pattern string, doc []byte, now int64, path string) {
		if len(doc) > 1<<14 {
			return
		}
		var r access.Rule
		if json.Unmarshal(doc, &r) != nil {
			return
		}
		p := policyOn(is(access.ServiceName, "is"))
		p.Pattern, p.Rule = pattern, &r
		q := access.Request{
			Subject: "iam-Profile-1", AccountID: accountA, Action: "c.read", Time: time.Unix(now%(200*366*86400), 0),
			Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is", "path": path},
		}
		before := fmt.Sprintf("%+v", r)
		held := r.Holds(q)
		invalid := p.Validate(catalog)
		d := access.Decide(sliceView{world{policies: []*access.Policy{p}}, catalog}, q)
		if d.Allowed != held {
			t.Errorf("the rule holds: %t, Decide says %t", held, d.Allowed)
		}
		if invalid == nil && ruleByHand(&r, q) != held {
			t.Errorf("Holds says %t, the reference %t, on %s at %s", held, !held, doc, q.Time.UTC())
		}
		if after := fmt.Sprintf("%+v", r); after != before {
			t.Errorf("the rule has changed from %s to %s", before, after)
		}
		if again, err := json.Marshal(&r); invalid == nil && (err != nil || !json.Valid(again)) {
			t.Errorf("a valid rule cannot be stored: %v", err)
		}
	})
}
