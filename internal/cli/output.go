package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
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
	return cell(s)
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

func printFailure(w io.Writer, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			printFailure(w, e)
		}
		return
	}
	fmt.Fprintf(w, "FAILED\n%s\n", plain(sentence(err.Error())))
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

func sentence(s string) string {
	s = capital(s)
	if s != "" && !strings.ContainsAny(s[len(s)-1:], ".!?") {
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
