package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/activity"
)

func activityCommands() *cobra.Command {
	return group("activity", "See who did what, and why something was refused",
		"Every token, every refusal and every change leaves an activity event.",
		"tabard activity events --outcome failure",
		eventsCommand(), explainCommand(), verifyCommand(), checkpointCommand(), exportLogCommand(),
		spaceCommand(), releaseReserveCommand(),
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

func eventsCommand() *cobra.Command {
	var action, outcome, since, transaction string
	var limit int
	return spec{
		use: "events", short: "List activity events, newest first", example: "tabard activity events --action iam-identity.computeresource-token.login --since 1h --limit 20",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&action, "action", "", "only this action")
			choice(f, &outcome, "outcome", "", "only this outcome", activity.Success, activity.Failure)
			f.StringVar(&since, "since", "", "only since this `TIME`, such as 2026-07-01 or 2026-07-01T09:00:00Z, or for so long, such as 90s, 1h or 7d")
			f.StringVar(&transaction, "transaction-id", "", "only of this transaction")
			f.IntVar(&limit, "limit", 50, "at most so many; 0 for all")
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			if limit < 0 {
				return Usage("--limit must not be negative")
			}
			since, err := sinceTime(since)
			if err != nil {
				return err
			}
			s.announce("Listing activity events")
			page := eventsPage
			if limit > 0 {
				page = min(page, limit)
			}
			events, err := s.client.list(s.ctx(), "/v1/events", query("action", action, "outcome", outcome, "since", since,
				"correlation_id", transaction, "limit", strconv.Itoa(page)), "events", limit)
			if err != nil {
				return err
			}
			return s.showAll(events, "events", "id", eventColumns)
		},
	}.command()
}

// sinceTime reads --since. Durations and times go to the server as they are; a
// date, and a time as the tables show it, become a time.
func sinceTime(s string) (string, error) {
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
	return "", Usage("--since %q is neither a date such as 2026-07-01, nor a time such as 2026-07-01T09:00:00Z, nor how long ago, such as 90s, 1h or 7d", s)
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
			"what would have let it pass. The transaction ID is in every error, and in the Transaction-Id header of every answer.",
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

// marks begin the lines of checks.
var marks = map[activity.Outcome]string{activity.Pass: "  ok   ", activity.Fail: "  FAIL ", activity.Skip: "  --   "}

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
	for _, c := range st.Trace {
		mark, ok := marks[c.Outcome]
		if !ok {
			mark = "  ?    "
		}
		fmt.Fprintf(w, "%s%s", mark, plain(c.Name))
		if c.Outcome == activity.Skip {
			fmt.Fprint(w, " (not reached)")
		}
		fmt.Fprintln(w)
		for _, v := range []struct{ label, value string }{{"wanted", c.Wanted}, {"found", c.Found}, {"hint", c.Hint}} {
			if v.value != "" {
				fmt.Fprintf(w, "           %-7s %s\n", v.label, plain(v.value))
			}
		}
	}
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
