package activityapi_test

import (
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/store"
)

const nobody = "IBMid-NOBODY"

// noon is the time of the tests, later than that of the accounts' creation,
// which the real clock tells.
var noon = time.Date(2150, 7, 15, 12, 0, 0, 0, time.UTC)

func start(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	e.Config.Now = func() time.Time { return noon }
	activityapi.Register(e.Mux, e.Config, e.Store, e.Signer)
	return e
}

// happened records an event of an account, some time before noon.
func happened(e *apitest.Env, account, action, correlation string, ago time.Duration, trace ...activity.Check) {
	e.T.Helper()
	ev := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: noon.Add(-ago)}, Action: action, CorrelationID: correlation, AccountID: account,
		Initiator: activity.Initiator{ID: "IBMid-" + account[:4]}, Target: activity.Target{Name: "target of " + action}, Trace: trace,
	}
	status := 200
	if len(trace) > 0 {
		status = 403
	}
	ev.SetReason(status, "the reason")
	if err := e.Config.Journal.Record(e.T.Context(), ev); err != nil {
		e.T.Fatal(err)
	}
}

// list returns the actions on a page of test events and the start value of the
// next page.
func list(e *apitest.Env, as, query string) (actions []string, next string) {
	e.T.Helper()
	m := e.Do(apitest.Request{Path: "/v1/events?" + query, As: as}).Want(200)
	actions = []string{}
	for _, ev := range m["events"].([]any) {
		action := ev.(map[string]any)["action"].(string)
		if !strings.HasPrefix(action, "iam-identity.account.") { // of the accounts' creation
			actions = append(actions, action)
		}
	}
	if n, ok := m["next"]; ok {
		next = n.(map[string]any)["start"].(string)
	}
	return actions, next
}

func wantError(t *testing.T, r *apitest.Response, status int, code string) {
	t.Helper()
	m := r.Want(status)
	entries, _ := m["errors"].([]any)
	if len(entries) != 1 || int(m["status_code"].(float64)) != status || m["trace"] != r.Header.Get(api.TransactionHeader) {
		t.Fatalf("error has the wrong shape: %s", r.Raw)
	}
	if entry := entries[0].(map[string]any); entry["code"] != code || entry["message"] == "" {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
}

func TestEventsAreListedNewestFirstAndAsTheyWereWritten(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.first", "t1", time.Hour)
	happened(e, e.Owner.AccountID, "a.b.second", "t2", time.Minute)
	if got, next := list(e, "", "action="); !slices.Equal(got, []string{"a.b.second", "a.b.first"}) || next != "" {
		t.Errorf("listed %v, next %q", got, next)
	}
	r := e.Do(apitest.Request{Path: "/v1/events?limit=1&action=a.b.second"})
	var answer struct {
		Limit  int
		Events []json.RawMessage
	}
	if err := json.Unmarshal(r.Raw, &answer); err != nil {
		t.Fatal(err)
	}
	stored, err := e.Store.Events(t.Context(), store.Query{AccountID: e.Owner.AccountID, Action: "a.b.second", Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	if answer.Limit != 1 || len(answer.Events) != 1 || string(answer.Events[0]) != string(stored[0].Doc) {
		t.Errorf("answered %s, stored %s", r.Raw, stored[0].Doc)
	}
}

func TestEventsAreFiltered(t *testing.T) {
	e := start(t)
	account := e.Owner.AccountID
	happened(e, account, "a.b.old", "t1", 50*time.Hour)
	happened(e, account, "a.b.denied", "t2", 2*time.Hour, activity.Check{Name: "c", Outcome: activity.Fail})
	happened(e, account, "a.b.new", "t2", time.Minute)
	for query, want := range map[string][]string{
		"action=a.b.old":          {"a.b.old"},
		"action=a.b.o":            {},
		"action=a.b.%25":          {},
		"outcome=failure":         {"a.b.denied"},
		"correlation_id=t2":       {"a.b.new", "a.b.denied"},
		"since=1h&action=a.b.new": {"a.b.new"},
		"since=3h&until=30m":      {"a.b.denied"},
		"since=3d&until=1d":       {"a.b.old"},
		"since=2150-07-15T09:00:00Z&until=2150-07-15T11:00:00Z":               {"a.b.denied"},
		"since=2150-07-15T11:00:00%2B02:00&until=2150-07-15T13:00:00%2B02:00": {"a.b.denied"},
		"since=2150-07-15T10:00:00Z&until=2150-07-15T10:00:00.000000001Z":     {"a.b.denied"},
		"until=2150-07-15T10:00:00Z&since=3d":                                 {"a.b.old"},
		"outcome=failure&correlation_id=t1":                                   {},
	} {
		t.Run(query, func(t *testing.T) {
			if got, _ := list(e, "", query); !slices.Equal(got, want) {
				t.Errorf("listed %v, want %v", got, want)
			}
		})
	}
	for _, query := range []string{
		"limit=0", "limit=1001", "limit=x", "outcome=odd", "since=yesterday", "since=-1h", "until=1", "since=99999d",
		"since=0001-01-01T00:00:00Z", "until=9999-01-01T00:00:00Z", "start=%21", "start=AAAA", "start=" + api.Cursor{}.String(),
		"start=" + api.Cursor{After: "1"}.String(), "start=" + api.Cursor{After: "-1--1"}.String(),
		"start=" + api.Cursor{After: "21500715-1", Query: url.Values{"since": {"odd"}}}.String(),
	} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/events?" + query}), 400, "invalid_parameter")
	}
}

func TestPagesCarryLimitAndFiltersAndMeetWithoutGaps(t *testing.T) {
	e := start(t)
	var want []string
	for n := range 7 {
		action := fmt.Sprint("a.b.", n)
		happened(e, e.Owner.AccountID, action, "mine", time.Duration(7-n)*10*time.Hour) // over four days
		happened(e, e.Owner.AccountID, "a.b.noise", "noise", time.Duration(7-n)*10*time.Hour)
		happened(e, e.Other.AccountID, "a.b.foreign", "mine", time.Duration(7-n)*10*time.Hour)
		want = append([]string{action}, want...)
	}
	got, next := list(e, "", "limit=3&correlation_id=mine&since=7d")
	pages := 1
	for next != "" {
		var more []string
		// What the request says besides start counts for nothing.
		more, next = list(e, "", "correlation_id=noise&limit=1000&start="+next)
		if len(more) == 0 || len(more) > 3 {
			t.Fatalf("a page of %d events", len(more))
		}
		got = append(got, more...)
		pages++
	}
	if !slices.Equal(got, want) || pages != 3 {
		t.Errorf("%d pages listed %v, want %v", pages, got, want)
	}
	if _, next := list(e, "", "limit=7&correlation_id=mine"); next != "" {
		t.Error("a full last page names a next one")
	}
}

func TestARelativeTimeDoesNotMoveBetweenPages(t *testing.T) {
	e := start(t)
	now := noon
	e.Config.Now = func() time.Time { return now }
	for n := range 3 {
		happened(e, e.Owner.AccountID, fmt.Sprint("a.b.", n), "t", time.Duration(3-n)*time.Minute)
	}
	_, next := list(e, "", "limit=1&since=5m")
	now = noon.Add(time.Hour)
	if got, _ := list(e, "", "start="+next); !slices.Equal(got, []string{"a.b.1"}) {
		t.Errorf("the second page has %v", got)
	}
}

func TestTheLogOfAnotherAccountIsOutOfReach(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.mine", "shared", 3*time.Minute)
	happened(e, e.Other.AccountID, "a.b.theirs", "shared", 2*time.Minute)
	happened(e, e.Other.AccountID, "a.b.theirs", "secret", time.Minute)
	_, theirStart := list(e, e.Other.IAMID, "limit=1")
	if theirStart == "" {
		t.Fatal("the other account has one page only")
	}
	day := store.Day(noon)
	for _, start := range []string{
		theirStart,
		api.Cursor{After: store.Position{Day: day, Seq: 1 << 40}.String(), Limit: 1 << 30}.String(),
		api.Cursor{After: store.Position{Day: 99999999, Seq: 1}.String(), Query: url.Values{
			"account_id": {e.Other.AccountID}, "account": {e.Other.AccountID}, "AccountID": {e.Other.AccountID},
		}}.String(),
		api.Cursor{After: store.Position{Day: day, Seq: 1 << 40}.String(), Query: url.Values{"correlation_id": {"secret"}}}.String(),
		api.Cursor{After: store.Position{Day: day, Seq: 1 << 40}.String(), Query: url.Values{"action": {"' OR 1=1 --"}}}.String(),
	} {
		r := e.Do(apitest.Request{Path: "/v1/events?start=" + start})
		if r.Want(200); strings.Contains(string(r.Raw), "theirs") || strings.Contains(string(r.Raw), e.Other.AccountID) {
			t.Errorf("start %s shows %s", start, r.Raw)
		}
	}
	for _, query := range []string{"", "correlation_id=shared", "correlation_id=secret", "account_id=" + e.Other.AccountID} {
		if got, _ := list(e, "", query); slices.Contains(got, "a.b.theirs") {
			t.Errorf("query %q shows %v", query, got)
		}
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/secret/explanation"}), 404, "not_found")
	m := e.Do(apitest.Request{Path: "/v1/events/shared/explanation"}).Want(200)
	if events := m["events"].([]any); len(events) != 1 || events[0].(map[string]any)["action"] != "a.b.mine" {
		t.Errorf("explained %v", events)
	}
}

func TestTheLogNeedsItsAction(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.c", "t1", time.Minute)
	e.Grant("IBMid-VIEWER", "activity", "Viewer")
	e.Grant("IBMid-OTHER", "iam-identity", "Administrator")
	for _, path := range []string{"/v1/events", "/v1/events/t1/explanation"} {
		e.Do(apitest.Request{Path: path, As: "IBMid-VIEWER"}).Want(200)
		for _, as := range []string{nobody, "IBMid-OTHER"} {
			wantError(t, e.Do(apitest.Request{Path: path, As: as}), 403, "not_authorized")
		}
		wantError(t, e.Do(apitest.Request{Path: path, Anonymous: true}), 401, "token_missing")
		// A right in one account is none in another.
		wantError(t, e.Do(apitest.Request{Path: path, As: "IBMid-VIEWER", Account: e.Other.AccountID}), 403, "not_authorized")
	}
	// Whether a transaction exists is not told to whom may not read.
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/no-such/explanation", As: nobody}), 403, "not_authorized")
}

func TestARefusalIsExplainedByItsTransactionID(t *testing.T) {
	e := start(t)
	refused := e.Do(apitest.Request{Path: "/v1/events", As: nobody})
	refused.Want(403)
	id := refused.Header.Get(api.TransactionHeader)
	m := e.Do(apitest.Request{Path: "/v1/events/" + id + "/explanation"}).Want(200)
	events := m["events"].([]any)
	if m["transaction_id"] != id || len(events) != 1 {
		t.Fatalf("explained as %v", m)
	}
	step := events[0].(map[string]any)
	if step["action"] != "activity.event.read" || step["outcome"] != "failure" || step["initiator"].(map[string]any)["id"] != nobody {
		t.Errorf("step %v", step)
	}
	if trace := step["trace"].([]any); len(trace) == 0 {
		t.Error("the trace is empty")
	}
	for _, field := range []string{"action", "outcome", "time", "initiator", "target", "reason", "trace"} {
		if _, ok := step[field]; !ok {
			t.Errorf("field %s is missing", field)
		}
	}
}

func TestATransactionIsExplainedOldestFirst(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.yesterday", "t1", 24*time.Hour)
	happened(e, e.Owner.AccountID, "a.b.first", "t1", 2*time.Minute)
	happened(e, e.Owner.AccountID, "a.b.last", "t1", time.Minute)
	m := e.Do(apitest.Request{Path: "/v1/events/t1/explanation"}).Want(200)
	var got []string
	for _, s := range m["events"].([]any) {
		got = append(got, s.(map[string]any)["action"].(string))
	}
	if want := []string{"a.b.yesterday", "a.b.first", "a.b.last"}; !slices.Equal(got, want) {
		t.Errorf("explained %v, want %v", got, want)
	}
	for _, id := range []string{"no-such", "t", "t1%25", "%27", strings.Repeat("x", 4000)} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/events/" + id + "/explanation"}), 404, "not_found")
	}
}
