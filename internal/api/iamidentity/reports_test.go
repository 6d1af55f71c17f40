package iamidentity_test

import (
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
)

// later lets the server's clock run ahead.
func (e env) later(by time.Duration) {
	e.Config.Now = func() time.Time { return time.Now().Add(by) }
}

// login counts a login at a time from now.
func (e env) login(iamID, key string, at time.Duration) {
	event := &activity.Event{Action: "iam-identity.user-apikey.login", Outcome: activity.Success, Time: activity.Time{Time: time.Now().Add(at)}, AccountID: e.Owner.AccountID}
	event.Initiator.ID = iamID
	if key != "" {
		event.Target.ID = "crn:v1:bluemix:public:iam-identity::a/" + e.Owner.AccountID + "::apikey:" + key
	}
	e.Usage.Login(event)
}

const hour = time.Hour

// report asks for a report and returns its path.
func (e env) report(path string) string {
	e.T.Helper()
	path, query, _ := strings.Cut(e.inAccount(path), "?")
	got := e.Do(apitest.Request{Method: "POST", Path: path + "?" + query}).Want(http.StatusAccepted)
	if text(got, "reference") == "" {
		e.T.Fatalf("no reference in %v", got)
	}
	return path + "/" + text(got, "reference")
}

const inactivity = "/v1/activity/accounts/ACCOUNT/report"

// ids returns a field of all entries of a list.
func ids(o object, list, field string) []string {
	items, _ := o[list].([]any)
	out := make([]string, 0, len(items))
	for _, item := range items {
		entry, _ := item.(object)
		out = append(out, text(entry, field))
	}
	slices.Sort(out)
	return out
}

func TestAnInactivityReportListsWhatHasNotLoggedIn(t *testing.T) {
	e := start(t)
	e.user("IBMid-ACTIVE", "active@example.com")
	e.user("IBMid-IDLE", "idle@example.com")
	never, used := e.serviceID("never"), e.serviceID("used")
	idle := e.profile("idle")
	serviceKey := e.post("/v1/apikeys", object{"name": "of service", "iam_id": never["iam_id"]})
	userKey := e.post("/v1/apikeys", object{"name": "of user", "iam_id": e.Owner.IAMID})
	usedKey := e.post("/v1/apikeys", object{"name": "used", "iam_id": e.Owner.IAMID})
	e.later(1000 * hour)
	e.login("IBMid-ACTIVE", "", 950*hour)
	e.login("IBMid-IDLE", "", 2*hour)
	e.login(text(used, "iam_id"), text(usedKey, "id"), 999*hour)
	e.login(text(idle, "iam_id"), "", 100*hour)

	path := e.report(inactivity + "?type=inactive&duration=120")
	if got := e.Do(apitest.Request{Path: path}); got.Status != http.StatusNoContent || len(got.Raw) != 0 {
		t.Fatalf("at once: status %d: %s", got.Status, got.Raw)
	}
	e.later(1000*hour + 3*time.Second)
	got := e.get(path)
	if got["created_by"] != e.Owner.IAMID || !strings.HasSuffix(path, text(got, "reference")) || got["report_duration"] != "120" ||
		text(got, "report_start_time") == "" || text(got, "report_end_time") == "" {
		t.Error(got)
	}
	for list, want := range map[string][]string{
		"users":      {e.Owner.IAMID, "IBMid-IDLE"},
		"serviceids": {text(never, "id")},
		"profiles":   {text(idle, "id")},
	} {
		field := "id"
		if list == "users" {
			field = "iam_id"
		}
		slices.Sort(want)
		if got := ids(got, list, field); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", list, got, want)
		}
	}
	keys, _ := got["apikeys"].([]any)
	found := map[any]object{}
	for _, k := range keys {
		o, _ := k.(object)
		found[o["id"]] = o
	}
	if len(keys) != 3 || found[usedKey["id"]] != nil { // with the account's first key
		t.Errorf("keys %v", keys)
	}
	if want := (object{"id": serviceKey["id"], "name": "of service", "type": "serviceid", "serviceid": object{"id": never["id"], "name": "never"}}); !reflect.DeepEqual(found[serviceKey["id"]], want) {
		t.Errorf("key %v, want %v", found[serviceKey["id"]], want)
	}
	if user, _ := found[userKey["id"]]["user"].(object); user["iam_id"] != e.Owner.IAMID || user["username"] == nil || found[userKey["id"]]["type"] != "user" {
		t.Errorf("key %v", found[userKey["id"]])
	}
	users, _ := got["users"].([]any)
	for _, u := range users {
		o, _ := u.(object)
		if (o["last_authn"] == nil) != (o["iam_id"] == e.Owner.IAMID) || o["username"] == nil {
			t.Errorf("user %v", o)
		}
	}
}

func TestWhatIsYoungerThanTheReportsPeriodIsNotInactive(t *testing.T) {
	e := start(t)
	e.profile("new")
	path := e.report(inactivity + "?duration=1")
	e.later(3 * time.Second)
	got := e.get(path)
	for _, list := range []string{"users", "apikeys", "serviceids", "profiles"} {
		if !reflect.DeepEqual(got[list], []any{}) {
			t.Errorf("%s: %v, want an empty list", list, got[list])
		}
	}
}

func TestAReportStaysAsItWasFirstShown(t *testing.T) {
	e := start(t)
	p := e.profile("idle")
	e.later(1000 * hour)
	path := e.report(inactivity)
	e.later(1000*hour + 3*time.Second)
	before := len(e.Events(1000))
	bodies := make([]string, 8)
	var wg sync.WaitGroup
	for i := range bodies {
		wg.Go(func() { bodies[i] = string(e.Do(apitest.Request{Path: path}).Raw) })
	}
	wg.Wait()
	if bodies = slices.Compact(bodies); len(bodies) != 1 || !strings.Contains(bodies[0], text(p, "id")) {
		t.Fatalf("answers %q", bodies)
	}
	if after := len(e.Events(1000)); after != before {
		t.Errorf("reading left %d events", after-before)
	}
	e.login(text(p, "iam_id"), "", 1000*hour)
	e.remove(pathOf(p))
	if got := string(e.Do(apitest.Request{Path: path}).Raw); got != bodies[0] {
		t.Errorf("the report became %s", got)
	}
	if got := string(e.Do(apitest.Request{Path: e.inAccount(inactivity) + "/latest"}).Raw); got != bodies[0] {
		t.Errorf("the latest report is %s", got)
	}
}

func TestReportsMakeRoomForNewOnes(t *testing.T) {
	e := start(t)
	e.Do(apitest.Request{Path: e.inAccount(inactivity) + "/latest"}).Want(http.StatusNotFound)
	mfa := e.report("/v1/mfa/accounts/ACCOUNT/report")
	var paths []string
	for i := range 12 {
		e.later(time.Duration(i) * time.Minute)
		paths = append(paths, e.report(inactivity))
	}
	for i, path := range paths {
		want := http.StatusOK
		switch {
		case i < 2:
			want = http.StatusNotFound
		case i == 11:
			want = http.StatusNoContent
		}
		e.Do(apitest.Request{Path: path}).Want(want)
	}
	e.get(mfa)
	e.later(25 * hour)
	path := e.report(inactivity)
	for _, old := range append(paths, mfa) {
		e.Do(apitest.Request{Path: old}).Want(http.StatusNotFound)
	}
	if n := e.Config.Directory.Reports.Len(); n != 1 {
		t.Errorf("%d reports are kept", n)
	}
	e.later(25*hour + 3*time.Second)
	if got := e.get(e.inAccount(inactivity) + "/latest"); !strings.HasSuffix(path, text(got, "reference")) {
		t.Errorf("the latest report is %v", got["reference"])
	}
}

func TestAReportIsFoundByItsKindOnly(t *testing.T) {
	e := start(t)
	mfa := e.report("/v1/mfa/accounts/ACCOUNT/report")
	reference := mfa[strings.LastIndexByte(mfa, '/'):]
	for _, path := range []string{reference, "/1234567890", "/latest", "/%00", "/" + strings.Repeat("x", 5000)} {
		e.Do(apitest.Request{Path: e.inAccount(inactivity) + path}).Want(http.StatusNotFound)
	}
}

func TestTheParametersOfReportsAreChecked(t *testing.T) {
	e := start(t)
	for _, query := range []string{"type=mfa_status", "type=x", "duration=0", "duration=-1", "duration=x", "duration=1.5", "duration=99999999999999999999", "duration=87601"} {
		e.Do(apitest.Request{Method: "POST", Path: e.inAccount(inactivity) + "?" + query}).Want(http.StatusBadRequest)
	}
	e.Do(apitest.Request{Method: "POST", Path: e.inAccount("/v1/mfa/accounts/ACCOUNT/report?type=inactive")}).Want(http.StatusBadRequest)
	if n := e.Config.Directory.Reports.Len(); n != 0 {
		t.Errorf("%d reports were made", n)
	}
	path := e.report(inactivity)
	event := e.Events(1)[0]
	if event.Action != "iam-identity.report.create" || !strings.Contains(string(event.ResponseData), `"duration":720`) || !strings.HasSuffix(path, event.Target.Name) {
		t.Errorf("event %s on %v with %s", event.Action, event.Target, event.ResponseData)
	}
	e.later(3 * time.Second)
	if got := e.get(path); got["report_duration"] != "720" {
		t.Errorf("duration %v", got["report_duration"])
	}
}

func TestALargeReportIsAnsweredAndNotKept(t *testing.T) {
	e := start(t)
	for i := range 700 {
		e.user(fmt.Sprintf("IBMid-%d%s", i, strings.Repeat("x", 1000)), "")
	}
	e.later(1000 * hour)
	path := e.report(inactivity)
	e.later(1000*hour + 3*time.Second)
	for range 2 {
		if users, _ := e.get(path)["users"].([]any); len(users) != 701 {
			t.Errorf("%d users", len(users))
		}
	}
	for _, r := range e.Config.Directory.Reports.All() {
		if len(r.Doc) > 0 {
			t.Errorf("%d bytes are kept", len(r.Doc))
		}
	}
}
