package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"
)

// column is one column of a table or one line of a description. It shows the
// text at a path, or what of makes of the object.
type column struct {
	title, path string
	of          func(object) string
}

func (c column) cell(o object) string {
	var s string
	if c.of != nil {
		s = c.of(o)
	} else {
		s = o.text(c.path)
	}
	if strings.HasSuffix(c.path, "_at") || c.path == "eventTime" || c.path == "added_on" || c.path == "target_time" {
		s = clock(s)
	}
	return cell(s)
}

// timeForm is how people are shown times. JSON has them as the API does.
const timeForm = "2006-01-02 15:04:05 MST"

// clock rewrites a time in any of the APIs' forms; other text stays as it is.
func clock(s string) string {
	for _, form := range []string{time.RFC3339, "2006-01-02T15:04:05Z0700", "2006-01-02T15:04Z0700"} {
		if t, err := time.Parse(form, s); err == nil {
			return t.UTC().Format(timeForm)
		}
	}
	return s
}

func columns(pairs ...string) []column {
	out := make([]column, 0, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		out = append(out, column{title: pairs[i], path: pairs[i+1]})
	}
	return out
}

// announce tells what is about to be done, in whose name.
func (s *session) announce(format string, args ...any) {
	if s.json || s.quiet || s.idOnly {
		return
	}
	fmt.Fprintf(s.out, "%s under account %s as user %s...\n", plain(fmt.Sprintf(format, args...)), plain(s.AccountID), plain(s.who()))
}

// ok tells that a thing was done, unless the answer itself is to be printed.
func (s *session) ok(format string, args ...any) {
	if s.json || s.idOnly {
		return
	}
	if !s.quiet {
		fmt.Fprintln(s.out, "OK")
	}
	if format != "" {
		fmt.Fprintln(s.out, plain(fmt.Sprintf(format, args...)))
	}
}

// show prints one object.
func (s *session) show(o object, id string, cols []column) error {
	switch {
	case s.json:
		return s.printJSON(o)
	case s.idOnly:
		fmt.Fprintln(s.out, plain(o.text(id)))
		return nil
	}
	fmt.Fprintln(s.out)
	w := table(s.out)
	for _, c := range cols {
		fmt.Fprintf(w, "%s\t%s\n", c.title, c.cell(o))
	}
	return w.Flush()
}

// showAll prints a list; plural names its items when there are none.
func (s *session) showAll(items []object, plural, id string, cols []column) error {
	switch {
	case s.json:
		return s.printJSON(items)
	case s.idOnly:
		for _, o := range items {
			fmt.Fprintln(s.out, plain(o.text(id)))
		}
		return nil
	case len(items) == 0:
		s.ok("No %s found.", plural)
		return nil
	}
	s.ok("")
	w := table(s.out)
	for i, c := range cols {
		fmt.Fprint(w, separator(i), c.title)
	}
	fmt.Fprintln(w)
	for _, o := range items {
		for i, c := range cols {
			fmt.Fprint(w, separator(i), c.cell(o))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func separator(i int) string {
	if i == 0 {
		return ""
	}
	return "\t"
}

func table(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 3, ' ', 0) }

func cell(s string) string {
	if s == "" {
		return "-"
	}
	return plain(s)
}

func (s *session) printJSON(v any) error {
	enc := json.NewEncoder(s.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// plain replaces control characters: names and messages come from other people
// and must not steer the terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// plainLines is plain for text that may have several lines. The further ones
// are indented, so that none passes for one of ours.
func plainLines(s string) string {
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(s, "\t", "    "), "\r\n"), "\n")
	for i, l := range lines {
		lines[i] = plain(strings.TrimSuffix(l, "\r"))
	}
	return strings.Join(lines, "\n  ")
}

// warn tells of what is done as it was asked, but will not do what it seems to
// be for.
func (s *session) warn(format string, args ...any) {
	fmt.Fprintf(s.cmd.ErrOrStderr(), "Warning: %s\n", plain(fmt.Sprintf(format, args...)))
}

// an returns a noun with its article.
func an(noun string) string {
	if noun != "" && strings.ContainsAny(noun[:1], "aeioAEIO") {
		return "an " + noun
	}
	return "a " + noun
}

// noted is an error with more to say than fits its text.
type noted struct {
	error
	transaction string // in which it came up, unless an apiError inside says so
	note        string // what to do about it
}

func (n *noted) Unwrap() error { return n.error }

// joined returns what errors.Join made an error of, and nil for an error that
// wraps several in a text of its own.
func joined(err error) []error {
	several, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return nil
	}
	parts := several.Unwrap()
	if err.Error() != errors.Join(parts...).Error() {
		return nil
	}
	return parts
}

func printFailure(w io.Writer, err error) {
	if failures := joined(err); failures != nil {
		for _, e := range failures {
			printFailure(w, e)
		}
		return
	}
	var away unreachable
	if errors.As(err, &away) {
		err = away
	}
	fmt.Fprintf(w, "FAILED\n%s\n", sentence(plainLines(err.Error())))
	var n *noted
	if errors.As(err, &n) {
		if n.transaction != "" {
			fmt.Fprintf(w, "\nTransaction ID: %s\n", plain(n.transaction))
		}
		if n.note != "" {
			defer fmt.Fprintf(w, "\n%s\n", plain(n.note))
		}
	}
	var e *apiError
	if !errors.As(err, &e) {
		return
	}
	fmt.Fprintln(w)
	for _, line := range []struct{ label, value string }{
		{"Details", e.Details},
		{"Status", fmt.Sprintf("%d %s", e.Status, http.StatusText(e.Status))},
		{"Error code", e.Code},
		{"Error target", e.Target},
		{"More information", e.MoreInfo},
		{"Transaction ID", e.Transaction},
	} {
		if line.value != "" {
			fmt.Fprintf(w, "%s: %s\n", line.label, plain(line.value))
		}
	}
	switch e.Status {
	case http.StatusUnauthorized:
		fmt.Fprintln(w, "\nThe session is not valid any more. Log in again with: tabard login")
	case http.StatusForbidden:
		fmt.Fprintf(w, "\nWho may read the account's activity can see why with: tabard activity explain %s\n", plain(e.Transaction))
	}
}

// sentence ends a text of one line. Its beginning stays: it may be the name of a
// flag or setting.
func sentence(s string) string {
	if s != "" && !strings.Contains(s, "\n") && !strings.ContainsAny(s[len(s)-1:], ".!?)") {
		s += "."
	}
	return s
}

// capital writes the first word with a capital letter, unless it is an id.
func capital(s string) string {
	word, _, _ := strings.Cut(s, " ")
	if strings.ContainsFunc(word, func(r rune) bool { return !unicode.IsLetter(r) }) {
		return s
	}
	r, size := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[size:]
}
