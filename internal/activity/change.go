package activity

import (
	"strings"
	"unicode"
)

// Kinds of object that an explanation names.
const (
	KindLink     = "link"
	KindRule     = "rule"
	KindPolicy   = "policy"
	KindIdentity = "identity" // entry of a profile
	KindSetting  = "setting"
)

// What is to be done with an object so that a check passes.
const (
	Add   = "add"   // make one with these attributes
	Alter = "alter" // give one that is there these attributes
)

// Nearest is the object that came closest to letting something pass: the one
// that differs in the fewest points from what was asked.
type Nearest struct {
	Kind    string       `json:"kind"`
	ID      string       `json:"id"`
	Name    string       `json:"name,omitempty"`
	Of      int          `json:"of"` // how many were compared
	Differs []Difference `json:"differs"`
}

// Difference is one point in which an object and what was asked disagree.
type Difference struct {
	Attribute string `json:"attribute"`
	Wanted    string `json:"wanted,omitempty"` // by the object
	Found     string `json:"found,omitempty"`
}

// Change is what would have let a check pass: one object, to be made or to be
// altered. All edits together are needed, so that a change with one edit is the
// smallest there is. It says what would have sufficed, not that it is right to
// do: who should have been refused is refused with a change too.
type Change struct {
	Do      string `json:"do"`
	Kind    string `json:"kind"`
	ID      string `json:"id,omitempty"` // of what is to be altered
	Edits   []Edit `json:"edits"`
	Command string `json:"command,omitempty"` // that does it, for a shell; absent when there is none
}

// Edit is one attribute of an object with its value before and after. Without
// From it is added, without To it is taken away. The values are exact.
type Edit struct {
	Attribute string `json:"attribute"`
	From      string `json:"from,omitempty"`
	To        string `json:"to,omitempty"`
}

// Bounds on what an explanation adds to an event, in entries and bytes.
const (
	maxDiffers = 8
	maxDiffer  = 160 // of one value
	maxEdits   = 16
	maxEdit    = 512 // of one value
	maxCommand = 2048
)

// bounded returns the object with no more than an event may hold of it.
func (n *Nearest) bounded() *Nearest {
	if n == nil {
		return nil
	}
	out := *n
	out.ID, out.Name = clip(n.ID, maxDiffer), clip(n.Name, maxDiffer)
	out.Differs = make([]Difference, 0, min(len(n.Differs), maxDiffers))
	for _, d := range n.Differs[:min(len(n.Differs), maxDiffers)] {
		out.Differs = append(out.Differs, Difference{clip(d.Attribute, maxDiffer), clip(d.Wanted, maxDiffer), clip(d.Found, maxDiffer)})
	}
	return &out
}

// bounded returns the change, or nil when it does not fit into an event: one
// that was cut would be another change.
func (c *Change) bounded() *Change {
	if c == nil || len(c.Edits) == 0 || len(c.Edits) > maxEdits || len(c.ID) > maxEdit {
		return nil
	}
	for _, e := range c.Edits {
		if len(e.Attribute) > maxEdit || len(e.From) > maxEdit || len(e.To) > maxEdit {
			return nil
		}
	}
	return c
}

// Command writes a command line whose words a POSIX shell reads as they are
// given here, whoever has chosen them. It is "" when a word cannot be printed,
// or all of them are too long to be a help.
func Command(words ...string) string {
	var b strings.Builder
	for i, w := range words {
		if i > 0 {
			b.WriteByte(' ')
		}
		switch {
		case bare(w):
			b.WriteString(w)
		case strings.ContainsFunc(w, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }):
			return ""
		default:
			b.WriteString("'" + strings.ReplaceAll(w, "'", `'\''`) + "'")
		}
		if b.Len() > maxCommand {
			return ""
		}
	}
	return b.String()
}

// bare reports whether no shell reads a word as anything but itself.
func bare(w string) bool {
	for i := range len(w) {
		c := w[i]
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '/' || c == '-'
		if !letter && (i == 0 || strings.IndexByte("_@+=:,.", c) < 0) {
			return false
		}
	}
	return w != ""
}
