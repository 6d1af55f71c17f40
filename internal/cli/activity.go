package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/activity"
)

func activityCommands() *cobra.Command {
	return group("activity", "See who did what, and why something was refused",
		"Every token, every refusal and every change leaves an activity event.",
		"tabard activity events --outcome failure",
		eventsCommand(), tailCommand(), explainCommand(), verifyCommand(), checkpointCommand(), exportLogCommand(), logSettingsCommand(),
		routesCommand(), routesCheckCommand(), spaceCommand(), releaseReserveCommand(),
	)
}

var eventColumns = append(
	columns("Time", "eventTime", "Action", "action", "Outcome", "outcome", "Status", "reason.reasonCode",
		"Initiator", "initiator.name|initiator.id", "Target", "target.name", "Transaction ID", "correlationId"),
	column{title: "Through", of: func(o object) string {
		if id := o.text("initiator.id"); id != "" && id == o.text("initiator.authnId") {
			return ""
		}
		return o.text("initiator.authnName|initiator.authnId")
	}},
)

// eventsPage is how many events one request asks for.
const eventsPage = 1000

// eventFilter are the flags that choose events.
type eventFilter struct {
	action, outcome, severity, initiator, authn, target, transaction, since string
}

func (e *eventFilter) flags(f *pflag.FlagSet) {
	f.StringVar(&e.action, "action", "", "only this action, or with a * at the end those that begin so, such as 'iam-identity.*'")
	choice(f, &e.outcome, "outcome", "", "only this outcome", activity.Success, activity.Failure)
	choice(f, &e.severity, "severity", "", "only this severity", activity.Normal, activity.Warning, activity.Critical)
	f.StringVar(&e.initiator, "initiator", "", "only what the identity with this IAM `ID` did")
	f.StringVar(&e.authn, "authn", "", "only what the identity with this `ID` did as a trusted profile, such as the CRN of a pod")
	f.StringVar(&e.target, "target", "", "only what was done to the object with this `CRN`")
	f.StringVar(&e.transaction, "transaction-id", "", "only of this transaction")
	f.StringVar(&e.since, "since", "", "only since this `TIME`, such as 2026-07-01 or 2026-07-01T09:00:00Z, or for so long, such as 90s, 1h or 7d")
}

func (e *eventFilter) query() (url.Values, error) {
	since, err := timeFlag("since", e.since)
	return query("action", e.action, "outcome", e.outcome, "severity", e.severity, "initiator", e.initiator, "authn_id", e.authn,
		"target", e.target, "correlation_id", e.transaction, "since", since), err
}

func eventsCommand() *cobra.Command {
	var filter eventFilter
	var until, form string
	var limit int
	return spec{
		use: "events", short: "List activity events, newest first",
		more: "All filters must hold. What was refused is found with --outcome failure; why, with tabard activity explain. To see events\n" +
			"as they come, use tabard activity tail.\n\n" +
			"With --format jsonl each line is an event as the server keeps it; with csv, a table for spreadsheets, where a cell that\n" +
			"a spreadsheet would compute begins with a quotation mark. Both are written as they come, of whatever length.",
		example: "tabard activity events --outcome failure --since 1h --limit 20\n" +
			"tabard activity events --action 'iam-identity.*' --severity critical --since 7d\n" +
			"tabard activity events --authn crn:v1:bluemix:public:containers-kubernetes:us-south:a/4f1e…:c1::pod:web-1\n" +
			"tabard activity events --since 2026-07-01 --until 2026-07-02 --limit 0 --format csv",
		flags: func(f *pflag.FlagSet) {
			filter.flags(f)
			f.StringVar(&until, "until", "", "only before this `TIME`, in the forms of --since")
			f.IntVar(&limit, "limit", 50, "at most so many; 0 for all")
			eventFormat(f, &form)
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			if limit < 0 {
				return Usage("--limit must not be negative")
			}
			q, err := filter.query()
			if err != nil {
				return err
			}
			if until, err = timeFlag("until", until); err != nil {
				return err
			}
			page := eventsPage
			if limit > 0 {
				page = min(page, limit)
			}
			maps.Copy(q, query("until", until, "limit", strconv.Itoa(page)))
			out, err := s.eventWriter(form)
			if err != nil {
				return err
			}
			if form == formTable {
				s.announce("Listing activity events")
			}
			err = s.eachEventPage(q, limit, out.write)
			if errors.Is(err, syscall.EPIPE) {
				return nil // who reads has enough
			}
			if err != nil {
				return err
			}
			return out.end()
		},
	}.command()
}

// slow is when a listing tells how far it is.
const slow = 2 * time.Second

// eachEventPage calls f with the pages of a listing, up to so many events unless
// that is 0. Pages may be empty before the last one.
func (s *session) eachEventPage(q url.Values, most int, f func([]object) error) error {
	begun, told, n := time.Now(), false, 0
	progress := !s.quiet && isTerminal(s.cmd.ErrOrStderr())
	defer func() {
		if told {
			fmt.Fprintln(s.cmd.ErrOrStderr())
		}
	}()
	for {
		if err := s.freshen(); err != nil {
			return err
		}
		page, _, err := s.get("/v1/events", q)
		if err != nil {
			return err
		}
		events := page.objects("events")
		if most > 0 {
			events = events[:min(len(events), most-n)]
		}
		n += len(events)
		if err := f(events); err != nil {
			return err
		}
		next := nextPage(page)
		if len(next) == 0 || most > 0 && n >= most {
			return nil
		}
		if next.Get("start") == q.Get("start") {
			return errors.New("the pages of the activity log go round in a circle")
		}
		q = next
		if progress && time.Since(begun) > slow {
			told = true
			fmt.Fprintf(s.cmd.ErrOrStderr(), "\r%d events", n)
		}
	}
}

// freshen renews a session that a long command outlives.
func (s *session) freshen() error {
	if time.Until(s.Expires) >= freshFor {
		return nil
	}
	if err := s.refresh(); err != nil {
		return err
	}
	s.client.token = s.AccessToken
	return nil
}

// timeFlag reads a flag such as --since. Durations and times go to the server as
// they are; a date, and a time as the tables show it, become a time.
func timeFlag(name, s string) (string, error) {
	if s == "" {
		return "", nil
	}
	for _, form := range []string{time.DateOnly, timeForm} {
		if t, err := time.Parse(form, s); err == nil {
			return t.UTC().Format(time.RFC3339), nil
		}
	}
	if _, err := time.Parse(time.RFC3339, s); err == nil {
		return s, nil
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if _, err := strconv.ParseUint(days, 10, 15); err == nil {
			return s, nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return s, nil
	}
	return "", Usage("--%s %q is neither a date such as 2026-07-01, nor a time such as 2026-07-01T09:00:00Z, nor how long ago, such as 90s, 1h or 7d", name, s)
}

// explanation is why the requests of one transaction ended as they did.
type explanation struct {
	TransactionID string `json:"transaction_id"`
	Events        []step `json:"events"`
}

type step struct {
	Action    string             `json:"action"`
	Outcome   string             `json:"outcome"`
	Time      activity.Time      `json:"time"`
	Initiator activity.Initiator `json:"initiator"`
	Target    activity.Target    `json:"target"`
	Reason    activity.Reason    `json:"reason"`
	Trace     activity.Trace     `json:"trace"`
}

func explainCommand() *cobra.Command {
	return spec{
		use: "explain TRANSACTION-ID", short: "Explain why a request was granted or refused", args: cobra.ExactArgs(1),
		more: "Shows each check that the request went through: what was wanted, what was found, and for the one that failed\n" +
			"what came nearest and what would have let it pass, with the command that does it where there is one. That is what would\n" +
			"have sufficed, not that it is right to do. The transaction ID is in every error, and in the Transaction-Id header of\n" +
			"every answer; in tabard activity events it is a column. To ask beforehand: tabard iam simulate.",
		example: "tabard activity explain 6f1ed002ab5595859014ebf0951522d9",
		run: func(s *session, args []string) error {
			s.announce("Explaining transaction %s", args[0])
			var raw object
			_, err := s.client.do(s.ctx(), request{method: http.MethodGet, path: "/v1/events/" + url.PathEscape(args[0]) + "/explanation"}, &raw)
			var refused *apiError
			if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
				return &noted{error: err, note: "Only tokens, refusals and changes are recorded; reads that were allowed are not."}
			}
			if err != nil {
				return err
			}
			if s.json {
				return s.printJSON(raw)
			}
			var e explanation
			if err := json.Unmarshal(raw.raw, &e); err != nil {
				return fmt.Errorf("read the explanation: %w", err)
			}
			s.ok("")
			for _, st := range e.Events {
				st.print(s.out)
			}
			return nil
		},
	}.command()
}

func (st *step) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s: %s", plain(st.Action), plain(st.Outcome))
	if st.Reason.Code != 0 {
		fmt.Fprintf(w, " (%d %s)", st.Reason.Code, plain(st.Reason.Type))
	}
	fmt.Fprintln(w)
	line := func(label, value string) {
		if value != "" {
			fmt.Fprintf(w, "  %-8s %s\n", label, plain(value))
		}
	}
	if !st.Time.IsZero() {
		line("when", st.Time.UTC().Format(timeForm))
	}
	line("who", named(st.Initiator.Name, st.Initiator.ID))
	if st.Initiator.AuthnID != st.Initiator.ID {
		line("through", named(st.Initiator.AuthnName, st.Initiator.AuthnID))
	}
	line("what", named(st.Target.Name, st.Target.ID))
	line("because", st.Reason.ForFailure)
	if len(st.Trace) == 0 {
		return
	}
	fmt.Fprintln(w, "  checks:")
	printChecks(w, st.Trace)
}

// named writes a name with its id.
func named(name, id string) string {
	switch {
	case name == "":
		return id
	case id == "" || id == name:
		return name
	}
	return name + " (" + id + ")"
}
