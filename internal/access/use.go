package access

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"tabard.dev/tabard/internal/object"
)

// Use is what is remembered of the permits of one policy to one subject for one
// action on the resources of one service: how often, on which days, and what
// the resources had in common. A Use without an action stands for the permits
// of its subject, or without a subject of its account, for which there was no
// room: Count and Last tell of those, and nothing else is known of them.
type Use struct {
	object.Meta
	ID        string    `json:"id"` // made of what follows, as far as the action
	AccountID string    `json:"account_id"`
	Subject   string    `json:"subject"` // IAM ID; in a profile session the profile's
	PolicyID  string    `json:"policy_id"`
	Service   string    `json:"service"` // of the resource; "" when it was about more than one
	Action    string    `json:"action"`
	Count     int64     `json:"count"` // requests
	First     time.Time `json:"first"`
	Last      time.Time `json:"last"`
	Days      Days      `json:"days"`
	Touched   Touched   `json:"touched"`
}

// MaxDays is how many days back a Use remembers on which of them it was: more
// than a year, so that a yearly job is seen to have come twice.
const MaxDays = 64 * dayWords

const dayWords = 7

const secondsPerDay = 24 * 60 * 60

// Days is a set of UTC days, the latest [MaxDays] of them. The zero value is
// empty.
type Days struct {
	last int64 // days since 1970-01-01
	set  [dayWords]uint64
}

// Add puts the day of a time into the set. One that is too long ago is left
// out.
func (d *Days) Add(t time.Time) {
	day := dayOf(t)
	if !d.empty() && day > d.last {
		d.shift(day - d.last)
	}
	if d.empty() || day > d.last {
		d.last = day
	}
	if ago := d.last - day; ago < MaxDays {
		d.set[ago/64] |= 1 << (ago % 64)
	}
}

func dayOf(t time.Time) int64 {
	s := t.Unix()
	day := s / secondsPerDay
	if s%secondsPerDay < 0 {
		day--
	}
	return day
}

func (d *Days) empty() bool { return d.set == [dayWords]uint64{} }

// shift moves every day back by n: bit i stands for the day i before the last.
func (d *Days) shift(n int64) {
	if n >= MaxDays {
		d.set = [dayWords]uint64{}
		return
	}
	words, rest := int(n/64), uint(n%64)
	for i := dayWords - 1; i >= 0; i-- {
		var w uint64
		if from := i - words; from >= 0 {
			w = d.set[from] << rest
			if from > 0 && rest > 0 {
				w |= d.set[from-1] >> (64 - rest)
			}
		}
		d.set[i] = w
	}
}

// Len returns how many days there are.
func (d Days) Len() int {
	n := 0
	for _, w := range d.set {
		n += bits.OnesCount64(w)
	}
	return n
}

// All returns the days, each as its first moment, oldest first.
func (d Days) All() []time.Time {
	out := make([]time.Time, 0, d.Len())
	for ago := int64(MaxDays - 1); ago >= 0; ago-- {
		if d.set[ago/64]&(1<<(ago%64)) != 0 {
			out = append(out, time.Unix((d.last-ago)*secondsPerDay, 0).UTC())
		}
	}
	return out
}

// runs returns the first days of the uninterrupted runs of days: a job that
// goes on past midnight has run once.
func (d Days) runs() []int64 {
	var out []int64
	before := int64(-1)
	for ago := int64(MaxDays - 1); ago >= 0; ago-- {
		if d.set[ago/64]&(1<<(ago%64)) == 0 {
			continue
		}
		if day := d.last - ago; len(out) == 0 || day != before+1 {
			out = append(out, day)
		}
		before = d.last - ago
	}
	return out
}

// Bounds of what counts as periodic. A job that runs more often than every
// five days is seen to be in use without that.
const (
	minRuns   = 3
	minPeriod = 5 // days
)

// Period returns the days between two uses when they came at regular distances:
// at least three times, at least five days apart, and no distance further from
// their median than a fifth of it. Days in a row count as one time. It returns
// 0 for all other use.
func (d Days) Period() int {
	runs := d.runs()
	if len(runs) < minRuns {
		return 0
	}
	gaps := make([]int64, len(runs)-1)
	for i := range gaps {
		gaps[i] = runs[i+1] - runs[i]
	}
	sorted := slices.Sorted(slices.Values(gaps))
	median := sorted[len(sorted)/2]
	if median < minPeriod || (median-sorted[0])*5 > median || (sorted[len(sorted)-1]-median)*5 > median {
		return 0
	}
	return int(median)
}

// MarshalText writes the latest day's number and the days before it as bits.
func (d Days) MarshalText() ([]byte, error) {
	if d.empty() {
		return nil, nil
	}
	var raw []byte
	for _, w := range d.set {
		for i := range 8 {
			raw = append(raw, byte(w>>(8*i)))
		}
	}
	n := len(raw)
	for raw[n-1] == 0 {
		n--
	}
	return fmt.Appendf(nil, "%d:%s", d.last, base64.RawStdEncoding.EncodeToString(raw[:n])), nil
}

// UnmarshalText reads what MarshalText wrote.
func (d *Days) UnmarshalText(text []byte) error {
	*d = Days{}
	if len(text) == 0 {
		return nil
	}
	number, encoded, ok := strings.Cut(string(text), ":")
	last, err := strconv.ParseInt(number, 10, 32)
	raw, rawErr := base64.RawStdEncoding.DecodeString(encoded)
	if !ok || err != nil || rawErr != nil || len(raw) == 0 || len(raw) > 8*dayWords || raw[0]&1 == 0 {
		return errors.New("days are not of the form NUMBER:BITS")
	}
	d.last = last
	for i, b := range raw {
		d.set[i/8] |= uint64(b) << (8 * (i % 8))
	}
	return nil
}

// Bounds of what is remembered of the resources that were used. Their
// attributes are what callers say, so that they need bounds.
const (
	MaxTouched       = 16  // values of one attribute
	maxTouchedLength = 200 // bytes of one value
)

// Touched are the values that the resources of a Use had for the attributes by
// which a policy can be made smaller.
type Touched struct {
	Region          Values `json:"region,omitzero"`
	ResourceGroupID Values `json:"resourceGroupId,omitzero"`
	ResourceType    Values `json:"resourceType,omitzero"`
	ServiceInstance Values `json:"serviceInstance,omitzero"`
}

// Values are what one attribute was in several requests.
type Values struct {
	List   []string `json:"values,omitempty"` // each once, in the order of their coming
	Absent bool     `json:"absent,omitempty"` // some resource did not have it
	Many   bool     `json:"many,omitempty"`   // there were more than List holds
}

// Add notes the attributes of one resource, and reports whether that was
// anything new. What it adds to a list does not change the list of a copy.
func (t *Touched) Add(resource map[string]string) bool {
	added := t.Region.add(resource, Region)
	added = t.ResourceGroupID.add(resource, ResourceGroupID) || added
	added = t.ResourceType.add(resource, ResourceType) || added
	return t.ServiceInstance.add(resource, ServiceInstance) || added
}

// Of returns the values of an attribute by its name; ok is false for those that
// are not remembered.
func (t Touched) Of(key string) (v Values, ok bool) {
	switch key {
	case Region:
		return t.Region, true
	case ResourceGroupID:
		return t.ResourceGroupID, true
	case ResourceType:
		return t.ResourceType, true
	case ServiceInstance:
		return t.ServiceInstance, true
	}
	return Values{}, false
}

func (v *Values) add(resource map[string]string, key string) bool {
	value, present := resource[key]
	switch {
	case !present:
		old := v.Absent
		v.Absent = true
		return !old
	case slices.Contains(v.List, value) || v.Many:
		return false
	case len(v.List) == MaxTouched || !nameable(value):
		v.Many = true
	default:
		v.List = append(v.List, strings.Clone(value))
	}
	return true
}

// nameable reports whether a value could stand in a policy.
func nameable(s string) bool {
	return s != "" && len(s) <= maxTouchedLength && utf8.ValidString(s) &&
		!strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == utf8.RuneError })
}

func (v Values) union(w Values) Values {
	out := Values{List: slices.Clone(v.List), Absent: v.Absent || w.Absent, Many: v.Many || w.Many}
	for _, s := range w.List {
		if !slices.Contains(out.List, s) {
			out.List = append(out.List, s)
		}
	}
	return out
}
