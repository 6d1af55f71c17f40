package cli

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/mattn/go-isatty"
	"github.com/spf13/pflag"
)

// Formats of activity events.
const (
	formTable = "table"
	formCSV   = "csv"
	formLines = "jsonl"
)

func eventFormat(f *pflag.FlagSet, form *string) {
	choice(f, form, "format", formTable, "how events are written", formTable, formCSV, formLines)
}

// eventWriter writes events. What it is given is on its way when write returns,
// unless the format needs all of them first.
type eventWriter interface {
	write(events []object) error
	end() error
}

// eventWriter returns the writer of a format. --output json and --id go before
// the table, and not with another format.
func (s *session) eventWriter(form string) (eventWriter, error) {
	switch {
	case form != formTable && (s.json || s.idOnly):
		return nil, Usage("--format %s excludes --output json and --id", form)
	case s.idOnly:
		return &idWriter{s.out}, nil
	case s.json:
		return &arrayWriter{s: s, events: []object{}}, nil
	case form == formCSV:
		return &csvWriter{out: csv.NewWriter(s.out)}, nil
	case form == formLines:
		return &lineWriter{s.out}, nil
	}
	return &tableWriter{s: s}, nil
}

type idWriter struct{ out io.Writer }

func (w *idWriter) write(events []object) error {
	for _, e := range events {
		if _, err := fmt.Fprintln(w.out, plain(e.text("id"))); err != nil {
			return err
		}
	}
	return nil
}

func (w *idWriter) end() error { return nil }

// arrayWriter prints one JSON array.
type arrayWriter struct {
	s      *session
	events []object
}

func (w *arrayWriter) write(events []object) error {
	w.events = append(w.events, events...)
	return nil
}

func (w *arrayWriter) end() error { return w.s.printJSON(w.events) }

// lineWriter prints each event as it came, on a line.
type lineWriter struct{ out io.Writer }

func (w *lineWriter) write(events []object) error {
	var b bytes.Buffer
	for _, e := range events {
		if err := json.Compact(&b, e.raw); err != nil {
			return fmt.Errorf("read an event: %w", err)
		}
		b.WriteByte('\n')
	}
	_, err := w.out.Write(b.Bytes())
	return err
}

func (w *lineWriter) end() error { return nil }

// csvColumns have the names of the fields, so that they can be looked up.
var csvColumns = columns("eventTime", "eventTime", "action", "action", "outcome", "outcome", "severity", "severity", "reasonCode", "reason.reasonCode",
	"reasonForFailure", "reason.reasonForFailure", "initiatorId", "initiator.id", "initiatorName", "initiator.name", "authnId", "initiator.authnId",
	"authnName", "initiator.authnName", "targetId", "target.id", "targetName", "target.name", "correlationId", "correlationId",
	"address", "initiator.host.address", "agent", "initiator.host.agent", "message", "message", "id", "id")

type csvWriter struct {
	out   *csv.Writer
	begun bool
}

func (w *csvWriter) write(events []object) error {
	row := make([]string, len(csvColumns))
	if !w.begun {
		w.begun = true
		for i, c := range csvColumns {
			row[i] = c.title
		}
		if err := w.out.Write(row); err != nil {
			return err
		}
	}
	for _, e := range events {
		for i, c := range csvColumns {
			row[i] = harmless(e.text(c.path))
		}
		if err := w.out.Write(row); err != nil {
			return err
		}
	}
	w.out.Flush()
	return w.out.Error()
}

func (w *csvWriter) end() error { return nil }

// harmless puts a quotation mark before what a spreadsheet would compute: names
// and messages come from other people.
func harmless(cell string) string {
	if cell != "" && strings.ContainsRune("=+-@\t\r", rune(cell[0])) {
		cell = "'" + cell
	}
	// Where the comma is the decimal mark, spreadsheets divide at semicolons.
	return plain(strings.ReplaceAll(cell, ";", ","))
}

// tableWriter prints a table for people. A long one is aligned a page at a time.
type tableWriter struct {
	s     *session
	begun bool
}

func (w *tableWriter) write(events []object) error {
	if len(events) == 0 {
		return nil
	}
	t := table(w.s.out)
	if !w.begun {
		w.begun = true
		w.s.ok("")
		writeRow(t, eventColumns, func(c column) string { return c.title })
	}
	for _, e := range events {
		writeRow(t, eventColumns, func(c column) string { return c.cell(e) })
	}
	return t.Flush()
}

func writeRow(t *tabwriter.Writer, cols []column, text func(column) string) {
	for i, c := range cols {
		fmt.Fprint(t, separator(i), text(c))
	}
	fmt.Fprintln(t)
}

func (w *tableWriter) end() error {
	if !w.begun {
		w.s.ok("No events found.")
	}
	return nil
}

// rowWriter prints a table whose rows come one by one.
type rowWriter struct {
	out   io.Writer
	begun bool
}

// rowWidths are those of the first columns; what is longer moves its own row.
var rowWidths = []int{23, 44, 7, 6, 28, 28, 32}

func (w *rowWriter) write(events []object) error {
	var b strings.Builder
	row := func(text func(column) string) {
		for i, c := range eventColumns {
			if i < len(rowWidths) {
				fmt.Fprintf(&b, "%-*s   ", rowWidths[i], text(c))
			} else {
				b.WriteString(text(c))
			}
		}
		b.WriteByte('\n')
	}
	if !w.begun {
		w.begun = true
		row(func(c column) string { return c.title })
	}
	for _, e := range events {
		row(func(c column) string { return c.cell(e) })
	}
	_, err := io.WriteString(w.out, b.String())
	return err
}

func (w *rowWriter) end() error { return nil }

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isatty.IsTerminal(f.Fd())
}
