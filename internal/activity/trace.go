package activity

import "strings"

// Outcome of one check.
type Outcome string

// What a check can say.
const (
	Pass Outcome = "pass"
	Fail Outcome = "fail"
	Skip Outcome = "skip" // not reached, because an earlier check failed
)

// Check is one named step of a decision with the values it compared. It never
// holds a secret: tokens appear as their claims, keys as their ids.
type Check struct {
	Name    string  `json:"check"`
	Outcome Outcome `json:"outcome"`
	Wanted  string  `json:"wanted,omitempty"`
	Found   string  `json:"found,omitempty"`
	Hint    string  `json:"hint,omitempty"` // in words, what would have let it pass

	// Of a check that failed: what came closest, and one change that would have
	// let it pass. Without Change there is no single one.
	Nearest *Nearest `json:"nearest,omitempty"`
	Change  *Change  `json:"change,omitempty"`
}

// Trace is the ordered list of checks that a token request or an access
// decision walked through (promise 3).
type Trace []Check

// Pass appends a check that held.
func (t *Trace) Pass(name, wanted, found string) {
	*t = append(*t, Check{Name: name, Outcome: Pass, Wanted: Clip(wanted), Found: Clip(found)})
}

// Fail appends a check that did not hold, with a hint for the administrator.
func (t *Trace) Fail(name, wanted, found, hint string) {
	*t = append(*t, Check{Name: name, Outcome: Fail, Wanted: Clip(wanted), Found: Clip(found), Hint: Clip(hint)})
}

// FailNear is Fail with what came closest, and what would have let it pass;
// both may be nil.
func (t *Trace) FailNear(name, wanted, found, hint string, nearest *Nearest, change *Change) {
	t.Fail(name, wanted, found, hint)
	c := &(*t)[len(*t)-1]
	c.Nearest, c.Change = nearest.bounded(), change.bounded()
}

// Skip appends a check that was not reached.
func (t *Trace) Skip(name string) { *t = append(*t, Check{Name: name, Outcome: Skip}) }

// Failed returns the first check that failed.
func (t Trace) Failed() (Check, bool) {
	for _, c := range t {
		if c.Outcome == Fail {
			return c, true
		}
	}
	return Check{}, false
}

// Clip bounds a value in an event, in bytes: part of it comes from the caller,
// and the event that holds it is kept for a long time.
func Clip(s string) string { return clip(s, 512) }

func clip(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit], "") + "…"
}
