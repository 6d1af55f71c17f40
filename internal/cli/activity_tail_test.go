package cli

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
)

func TestEventsAreWrittenAsACSVThatASpreadsheetDoesNotCompute(t *testing.T) {
	s := newServer(t)
	s.login()
	hostile := []string{`=HYPERLINK("http://x","y")`, "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a,b\"c\nd", "plain"}
	var events []any
	for _, name := range hostile {
		events = append(events, item("eventTime", "2026-07-01T09:00:00.12+0000", "action", "a.b.c", "target", item("name", name), "initiator", item("id", "IBMid-1", "host", item("address", "10.0.0.1"))))
	}
	s.answer("GET /v1/events", list("events", events...))
	rows, err := csv.NewReader(strings.NewReader(run(t, "activity", "events", "--format", "csv").want(0).stdout)).ReadAll()
	if err != nil || len(rows) != len(hostile)+1 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	at := slices.Index(rows[0], "targetName")
	for i, name := range hostile {
		got := rows[i+1][at]
		if strings.ContainsAny(got[:1], "=+-@\t\r") || !strings.HasSuffix(strings.TrimPrefix(got, "'"), plain(name)) {
			t.Errorf("%q is %q", name, got)
		}
	}
}

func TestEventsAreWrittenAsTheLinesThatCame(t *testing.T) {
	s := newServer(t)
	s.login()
	pages := []string{
		`{"events":[{"action":"a","n":1.50,"x":"<&>"},{"action":"b"}],"next":{"start":"2"}}`,
		`{"events":[],"next":{"start":"3"}}`, // the server looked for long and found nothing yet
		`{"events":[{"action":"c"}]}`,
	}
	s.answer("GET /v1/events", func(in seen) any {
		n := 0
		if start := in.Query.Get("start"); start != "" {
			n = int(start[0] - '1')
		}
		return pages[n]
	})
	want := "{\"action\":\"a\",\"n\":1.50,\"x\":\"<&>\"}\n{\"action\":\"b\"}\n{\"action\":\"c\"}\n"
	if got := run(t, "activity", "events", "--format", "jsonl", "--limit", "0").want(0).stdout; got != want {
		t.Errorf("wrote %q", got)
	}
	if got := run(t, "activity", "events", "--format", "jsonl", "--limit", "1").want(0).stdout; strings.Count(got, "\n") != 1 {
		t.Errorf("wrote %q", got)
	}
	run(t, "activity", "events", "--format", "jsonl", "-o", "json").want(2, "excludes")
	run(t, "activity", "events", "--limit", "0").want(0, "a", "c")
	s.answer("GET /v1/events", `{"events":[],"next":{"start":"x"}}`)
	run(t, "activity", "events", "--limit", "0").want(1, "circle")
}

func TestEveryFilterOfEventsIsSent(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events", list("events"))
	run(t, "activity", "events", "--action", "iam-identity.*", "--severity", "critical", "--initiator", "IBMid-1", "--authn", "crn:pod", "--target", "crn:t",
		"--since", "2026-07-01", "--until", "1h", "--transaction-id", "tx").want(0, "No events found.")
	q := s.sent("GET /v1/events").Query
	for k, want := range map[string]string{
		"action": "iam-identity.*", "severity": "critical", "initiator": "IBMid-1", "authn_id": "crn:pod", "target": "crn:t",
		"since": "2026-07-01T00:00:00Z", "until": "1h", "correlation_id": "tx",
	} {
		if q.Get(k) != want {
			t.Errorf("%s is %q, want %q", k, q.Get(k), want)
		}
	}
	run(t, "activity", "events", "--severity", "maybe").want(2, "normal, warning, critical")
	run(t, "activity", "events", "--until", "maybe").want(2, "--until")
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, fmt.Errorf("write: %w", syscall.EPIPE) }

func TestWhoReadsEventsMayHaveEnough(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events", list("events", item("action", "a")))
	s.answer("GET /v1/events/stream", "id: 1\ndata: {\"action\":\"a\"}\n\n")
	for _, args := range [][]string{{"events", "--format", "jsonl"}, {"events", "--format", "csv"}, {"tail", "--format", "jsonl"}} {
		var errs bytes.Buffer
		if code := Execute(t.Context(), append([]string{"activity"}, args...), strings.NewReader(""), brokenPipe{}, &errs); code != 0 || errs.Len() > 0 {
			t.Errorf("%q: %d %s", args, code, errs.String())
		}
	}
}

func TestATailGoesOnWhereItWas(t *testing.T) {
	s := newServer(t)
	s.login()
	calls := 0
	s.answer("GET /v1/events/stream", func(in seen) any {
		calls++
		switch calls {
		case 1:
			if in.Query.Get("since") != "10m" || in.Query.Get("outcome") != "failure" || in.Header.Get("Last-Event-ID") != "" {
				t.Errorf("first asked for %v %v", in.Query, in.Header)
			}
			return ": alive\nid: 4\n\nid: 5\ndata: {\"action\":\"one\"}\n\n: alive\nid: 8\n\nid: 9\ndata: {\"action\":\"half"
		case 2:
			if in.Header.Get("Last-Event-ID") != "8" || in.Query.Has("since") {
				t.Errorf("then asked for %v, after %q", in.Query, in.Header.Get("Last-Event-ID"))
			}
			return reply{status: 503, body: list("errors", item("code", "x", "message", "not now"))}
		case 3:
			return "event: end\ndata: {\"code\":\"token_invalid\",\"message\":\"ended.\"}\n\n"
		case 4:
			return "event: gap\ndata: {\"day\":20260701,\"first\":9,\"last\":10}\n\nid: 11\ndata: {\"action\":\"two\"}\n\n"
		}
		return reply{status: 403, body: list("errors", item("code", "not_authorized", "message", "not any more"))}
	})
	r := run(t, "activity", "tail", "--since", "10m", "--outcome", "failure", "-o", "json").want(1, "not any more", "connection is lost", "going on after position 8", "positions 9 to 10")
	if want := "{\"action\":\"one\"}\n{\"action\":\"two\"}\n"; r.stdout != want {
		t.Errorf("wrote %q, want %q", r.stdout, want)
	}
	if n := len(slices.DeleteFunc(s.requests(), func(r seen) bool { return r.Path != "/identity/token" })); n != 1 {
		t.Errorf("%d new tokens", n)
	}
}

func TestATailThatCannotBeginSaysSo(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events/stream", reply{status: 503, body: list("errors", item("code", "x", "message", "not now"))})
	run(t, "activity", "tail").want(1, "not now")
	s.answer("GET /v1/events/stream", "event: end\ndata: {\"code\":\"not_authorized\",\"message\":\"No policy\"}\n\n")
	run(t, "activity", "tail").want(1, "No policy")
	s.Close()
	run(t, "activity", "tail").want(1, "cannot reach the server")
}

func FuzzReadStream(f *testing.F) {
	for _, s := range []string{"id: 1\ndata: {}\n\n", ": x\n\n", "data\n\n", "data:a\ndata: b\r\n\r\n", "event: end\nid\n\n", "\n\n\n", "data: x"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var first []message
		if err := readStream(bytes.NewReader(b), func(m message) error {
			first = append(first, m)
			return nil
		}); err != nil {
			return
		}
		// What is read does not depend on how it comes, nor on how lines end.
		n := 0
		err := readStream(io.MultiReader(bytes.NewReader(b[:len(b)/2]), bytes.NewReader(b[len(b)/2:])), func(m message) error {
			if m.id != first[n].id || m.event != first[n].event || !bytes.Equal(m.data, first[n].data) {
				t.Errorf("message %d is %+v, and was %+v", n, m, first[n])
			}
			n++
			return nil
		})
		if err != nil || n != len(first) {
			t.Errorf("%d messages of %d, %v", n, len(first), err)
		}
		stop := errors.New("stop")
		if len(first) > 0 {
			if err := readStream(bytes.NewReader(b), func(message) error { return stop }); !errors.Is(err, stop) {
				t.Errorf("went on: %v", err)
			}
		}
	})
}
