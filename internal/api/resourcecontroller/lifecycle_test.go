package resourcecontroller_test

import (
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/resourcecontroller"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/retention"
)

const postgres = "databases-for-postgresql"

// planOf returns a plan of a service whose deletions wait, or do not.
func planOf(e *apitest.Env, service string, reclaimed bool) string {
	e.T.Helper()
	s, _ := e.Config.Directory.Builtin().Service(service)
	for _, p := range s.Plans {
		if p.Reclamation == reclaimed {
			return p.ID
		}
	}
	e.T.Fatalf("%s has no plan with reclamation %v", service, reclaimed)
	return ""
}

// newDatabase makes an instance that can be deleted at once, or not.
func newDatabase(e *apitest.Env, name string, reclaimed bool) map[string]any {
	e.T.Helper()
	body := instanceOf(e, postgres, name, defaultGroup(e, e.Owner.AccountID))
	body["resource_plan_id"] = planOf(e, postgres, reclaimed)
	return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}).Want(201)
}

func post(path, body string) apitest.Request {
	return apitest.Request{Method: "POST", Path: path, Body: body}
}

func del(path string) apitest.Request { return apitest.Request{Method: "DELETE", Path: path} }

func operation(m map[string]any) string {
	o := m["last_operation"].(map[string]any)
	return o["type"].(string) + " " + o["state"].(string)
}

func TestARemovedInstanceIsShownAndNothingElse(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", false)["url"].(string)
	e.Do(del(path)).Want(204)
	gone := e.Do(get(path)).Want(200)
	if gone["state"] != "removed" || operation(gone) != "delete succeeded" || gone["deleted_by"] != e.Owner.IAMID || gone["deleted_at"] == nil {
		t.Errorf("removed instance %v", gone)
	}
	wantNames(t, e.Do(get("/v2/resource_instances")).Want(200))
	wantNames(t, e.Do(get("/v2/resource_instances?state=removed")).Want(200), "db")
	wantError(t, e.Do(del(path)), 410, "gone")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 410, "gone")
	wantError(t, e.Do(post(path+"/lock", "")), 410, "gone")
	wantError(t, e.Do(post("/v2/resource_keys", `{"name":"k","source":"`+gone["guid"].(string)+`"}`)), 410, "gone")
	if m := wantError(t, e.Do(del(path+"/last_operation")), 422, "not_cancelable"); m != "The instance is not cancelable." {
		t.Errorf("message %q", m)
	}
}

func TestALockedInstanceIsNeitherChangedNorDeleted(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", false)["url"].(string)
	locked := e.Do(post(path+"/lock", "")).Want(200)
	if locked["locked"] != true || operation(locked) != "lock succeeded" {
		t.Errorf("locked: %v", locked)
	}
	e.Do(post(path+"/lock", "")).Want(200)
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 422, "locked")
	wantError(t, e.Do(del(path+"?recursive=true")), 422, "locked")
	unlocked := e.Do(del(path + "/lock")).Want(200)
	if unlocked["locked"] != false || operation(unlocked) != "unlock succeeded" {
		t.Errorf("unlocked: %v", unlocked)
	}
	e.Do(del(path)).Want(204)
}

func TestAnInstanceIsCreatedLocked(t *testing.T) {
	e := start(t)
	body := instanceOf(e, "kms", "k", defaultGroup(e, e.Owner.AccountID))
	body["allow_cleanup"] = true
	m := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body, Header: map[string]string{"Entity-Lock": "true"}}).Want(201)
	if m["locked"] != true || m["allow_cleanup"] != true {
		t.Errorf("created %v", m)
	}
	wantError(t, e.Do(del(m["url"].(string))), 422, "locked")
}

func TestLockingNeedsTheRightToChange(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", false)["url"].(string)
	e.Grant("IBMid-VIEWER", postgres, "Viewer")
	for _, r := range []apitest.Request{post(path+"/lock", ""), del(path + "/lock"), del(path + "/last_operation"), del(path)} {
		r.As = "IBMid-VIEWER"
		wantError(t, e.Do(r), 403, "not_authorized")
	}
}

func TestAPlanIsChangedWithinTheServiceAndRemembered(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", false)["url"].(string)
	body := `{"resource_plan_id":"` + planOf(e, postgres, true) + `"}`
	e.Grant("IBMid-OPERATOR", postgres, "Operator")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: body, As: "IBMid-OPERATOR"}), 403, "not_authorized")
	m := e.Do(apitest.Request{Method: "PATCH", Path: path, Body: body}).Want(200)
	history := m["plan_history"].([]any)
	if m["resource_plan_id"] != planOf(e, postgres, true) || len(history) != 2 {
		t.Fatalf("changed to %v", m)
	}
	for n, reclaimed := range []bool{false, true} {
		if p := history[n].(map[string]any); p["resource_plan_id"] != planOf(e, postgres, reclaimed) || p["start_date"] == "" {
			t.Errorf("plan history %v", history)
		}
	}
	// What counts is the plan at the time of the deletion.
	e.Do(del(path)).Want(204)
	if got := e.Do(get(path)).Want(200)["state"]; got != "pending_reclamation" {
		t.Errorf("state %v", got)
	}
}

// reclamation returns the only reclamation of the account.
func reclamation(e *apitest.Env) map[string]any {
	e.T.Helper()
	rows := e.Do(get("/v1/reclamations")).Want(200)["resources"].([]any)
	if len(rows) != 1 {
		e.T.Fatalf("%d reclamations, want 1", len(rows))
	}
	return rows[0].(map[string]any)
}

func TestADeletionThatWaitsIsTakenBackOrDone(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", true)
	path, guid := db["url"].(string), db["guid"].(string)
	e.Do(del(path)).Want(204)
	wantNames(t, e.Do(get("/v2/resource_instances")).Want(200))
	wantNames(t, e.Do(get("/v2/resource_instances?state=pending_reclamation")).Want(200), "db")
	wantError(t, e.Do(del(path)), 422, "pending_reclamation")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 422, "pending_reclamation")

	pending := e.Do(get(path)).Want(200)
	if operation(pending) != "reclamation succeeded" || pending["scheduled_reclaim_by"] != e.Owner.IAMID {
		t.Errorf("pending instance %v", pending)
	}
	rec := reclamation(e)
	if rec["resource_instance_id"] != guid || rec["entity_crn"] != db["crn"] || rec["state"] != "SCHEDULED" || rec["account_id"] != e.Owner.AccountID ||
		rec["resource_group_id"] != db["resource_group_id"] || rec["target_time"] != pending["scheduled_reclaim_at"] {
		t.Errorf("reclamation %v", rec)
	}
	due, err := time.Parse(time.RFC3339, rec["target_time"].(string))
	if wait := time.Until(due); err != nil || wait < 6*24*time.Hour || wait > 7*24*time.Hour {
		t.Errorf("due in %v (%v), want a week", wait, err)
	}

	act := "/v1/reclamations/" + rec["id"].(string) + "/actions/"
	wantError(t, e.Do(post(act+"destroy", "{}")), 400, "invalid_parameter")
	if m := e.Do(post(act+"restore", `{"comment":"a mistake"}`)).Want(200); m["state"] != "RESTORING" || m["id"] != rec["id"] {
		t.Errorf("restoring: %v", m)
	}
	back := e.Do(get(path)).Want(200)
	if back["state"] != "active" || back["restored_by"] != e.Owner.IAMID || back["scheduled_reclaim_at"] != nil || operation(back) != "reclamation succeeded" {
		t.Errorf("restored instance %v", back)
	}
	wantError(t, e.Do(post(act+"restore", "{}")), 404, "not_found")
	wantNames(t, e.Do(get("/v2/resource_instances")).Want(200), "db")

	e.Do(del(path)).Want(204)
	again := reclamation(e)
	if again["id"] == rec["id"] {
		t.Error("the second reclamation has the id of the first")
	}
	// The body may be left out.
	if m := e.Do(post("/v1/reclamations/"+again["id"].(string)+"/actions/reclaim", "")).Want(200); m["state"] != "RECLAIMING" {
		t.Errorf("reclaiming: %v", m)
	}
	if gone := e.Do(get(path)).Want(200); gone["state"] != "removed" || gone["deleted_by"] != e.Owner.IAMID {
		t.Errorf("reclaimed instance %v", gone)
	}
	var actions []string
	for _, ev := range e.Events(20) {
		if action, ok := strings.CutPrefix(ev.Action, postgres+".instance."); ok && ev.Outcome == "success" {
			actions = append(actions, action)
		}
	}
	if want := []string{"delete", "schedule_reclaim", "restore", "schedule_reclaim", "create"}; !slices.Equal(actions, want) {
		t.Errorf("events %v, want %v", actions, want)
	}
}

func TestReclamationsAreFilteredAndNeedTheRightToDelete(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", true)
	e.Do(del(db["url"].(string))).Want(204)
	count := func(as, query string) int {
		r := e.Do(apitest.Request{Path: "/v1/reclamations" + query, As: as})
		return len(r.Want(200)["resources"].([]any))
	}
	for query, want := range map[string]int{
		"?account_id=" + e.Owner.AccountID: 1, "?account_id=" + e.Other.AccountID: 0,
		"?resource_instance_id=" + db["guid"].(string): 1, "?resource_instance_id=" + url.QueryEscape(db["crn"].(string)): 1, "?resource_instance_id=x": 0,
		"?resource_group_id=" + db["resource_group_id"].(string): 1, "?resource_group_id=x": 0,
	} {
		if got := count(e.Owner.IAMID, query); got != want {
			t.Errorf("%s lists %d, want %d", query, got, want)
		}
	}
	if n := count(nobody, ""); n != 0 {
		t.Errorf("nobody sees %d reclamations", n)
	}
	if n := count(e.Other.IAMID, ""); n != 0 {
		t.Errorf("the other account sees %d reclamations", n)
	}
	e.Grant("IBMid-OPERATOR", postgres, "Operator")
	if n := count("IBMid-OPERATOR", ""); n != 1 {
		t.Errorf("an Operator sees %d reclamations", n)
	}
	id := reclamation(e)["id"].(string)
	for _, action := range []string{"reclaim", "restore"} {
		r := post("/v1/reclamations/"+id+"/actions/"+action, "{}")
		r.As = "IBMid-OPERATOR"
		wantError(t, e.Do(r), 403, "not_authorized")
		r.As = e.Other.IAMID
		wantError(t, e.Do(r), 404, "not_found")
		wantError(t, e.Do(post("/v1/reclamations/"+id+"/actions/"+action, `{"comment":1}`)), 400, "invalid_body")
		wantError(t, e.Do(post("/v1/reclamations/"+id+"/actions/"+action, `{"comment":"`+strings.Repeat("x", 1001)+`"}`)), 400, "invalid_body")
	}
	if n := count(e.Owner.IAMID, ""); n != 1 {
		t.Errorf("%d reclamations left", n)
	}
}

func TestADueReclamationRemovesTheInstance(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", true)["url"].(string)
	e.Do(del(path)).Want(204)
	sweeper := &retention.Sweeper{
		Directory: e.Config.Directory, Names: e.Config.Names, Log: e.Config.Log,
		Now: func() time.Time { return time.Now().Add(retention.Reclamation - time.Hour) },
	}
	sweep := func(want string) {
		t.Helper()
		if err := sweeper.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := e.Do(get(path)).Want(200); got["state"] != want {
			t.Errorf("state %v, want %s", got["state"], want)
		}
	}
	sweep("pending_reclamation")
	sweeper.Now = func() time.Time { return time.Now().Add(retention.Reclamation) }
	sweep("removed")
	if got := operation(e.Do(get(path)).Want(200)); got != "reclamation succeeded" {
		t.Errorf("last operation %s", got)
	}
}

func TestOfManyWhoDeleteAnInstanceOneDoes(t *testing.T) {
	for _, reclaimed := range []bool{false, true} {
		e := start(t)
		path := newDatabase(e, "db", reclaimed)["url"].(string)
		var wg sync.WaitGroup
		statuses := make([]int, 6)
		for n := range statuses {
			wg.Go(func() { statuses[n] = e.Do(del(path)).Status })
		}
		wg.Wait()
		slices.Sort(statuses)
		want := []int{204, 410, 410, 410, 410, 410}
		if reclaimed {
			want = []int{204, 422, 422, 422, 422, 422}
			reclamation(e)
		}
		if !slices.Equal(statuses, want) {
			t.Errorf("reclamation %v: statuses %v, want %v", reclaimed, statuses, want)
		}
	}
}

func TestOfManyWhoSettleAReclamationOneDoes(t *testing.T) {
	e := start(t)
	path := newDatabase(e, "db", true)["url"].(string)
	e.Do(del(path)).Want(204)
	act := "/v1/reclamations/" + reclamation(e)["id"].(string) + "/actions/"
	var wg sync.WaitGroup
	statuses := make([]int, 6)
	for n := range statuses {
		wg.Go(func() { statuses[n] = e.Do(post(act+[]string{"reclaim", "restore"}[n%2], "{}")).Status })
	}
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{200, 404, 404, 404, 404, 404}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
}

func TestInstancesAreCreatedInParallel(t *testing.T) {
	e := start(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { newDatabase(e, "db", false) })
	}
	wg.Wait()
	if n := len(names(e.Do(get("/v2/resource_instances?name=db")).Want(200))); n != 8 {
		t.Errorf("%d instances, want 8", n)
	}
}

func TestAGroupIsHeldByADeletionThatWaitsAndNotByOneThatIsDone(t *testing.T) {
	e := start(t)
	group := newGroup(e, "blue")
	body := instanceOf(e, postgres, "db", group)
	body["resource_plan_id"] = planOf(e, postgres, true)
	path := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}).Want(201)["url"].(string)
	e.Do(del(path)).Want(204)
	wantError(t, e.Do(del("/v2/resource_groups/"+group)), 409, "group_not_empty")
	e.Do(post("/v1/reclamations/"+reclamation(e)["id"].(string)+"/actions/reclaim", "{}")).Want(200)
	e.Do(del("/v2/resource_groups/" + group)).Want(204)
	e.Do(get(path)).Want(200)
}

func TestNothingIsCreatedInASuspendedGroup(t *testing.T) {
	e := start(t)
	group := newGroup(e, "blue")
	state := func(s string) {
		t.Helper()
		m := e.Do(apitest.Request{Method: "PATCH", Path: "/v2/resource_groups/" + group, Body: `{"state":"` + s + `"}`}).Want(200)
		if m["state"] != s || m["name"] != "blue" {
			t.Errorf("changed to %v", m)
		}
	}
	create := apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, "kms", "k", group)}
	state("SUSPENDED")
	wantError(t, e.Do(create), 409, "group_suspended")
	state("ACTIVE")
	e.Do(create).Want(201)
}

func TestAChangeOfAGroupMayBeEmpty(t *testing.T) {
	e := start(t)
	path := "/v2/resource_groups/" + newGroup(e, "blue")
	if m := e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{}`}).Want(200); m["name"] != "blue" || m["state"] != "ACTIVE" {
		t.Errorf("changed to %v", m)
	}
}

func TestTheParametersAboutDeletedGroupsAreChecked(t *testing.T) {
	e := start(t)
	wantNames(t, e.Do(get("/v2/resource_groups?include_deleted=true&date=2026-01")).Want(200), "Default")
	for _, query := range []string{"include_deleted=yes", "date=2026-13", "date=yesterday"} {
		wantError(t, e.Do(get("/v2/resource_groups?"+query)), 400, "invalid_parameter")
	}
}

func TestARegisteredServicesPlansAreTheAccountsOwn(t *testing.T) {
	e := start(t)
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		d.Services.Put(tx, &access.RegisteredService{AccountID: e.Owner.AccountID, Definition: access.Definition{
			Name: "printers", Kind: access.KindService, Actions: []access.ActionDefinition{{ID: "printers.page.print"}},
			Platform:     map[string]access.RoleDefinition{"Operator": {Actions: []string{"printers.page.print"}}},
			ServiceRoles: map[string]access.RoleDefinition{"Writer": {Actions: []string{"printers.page.print"}}},
			PlanList:     []access.Plan{{ID: "ink", Name: "ink"}, {ID: "laser", Name: "laser", Reclamation: true}},
		}})
	})
	body := map[string]any{"name": "p", "target": "global", "resource_group": defaultGroup(e, e.Owner.AccountID), "resource_plan_id": "ink"}
	p := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}).Want(201)
	if p["resource_id"] != "printers" || !strings.HasPrefix(p["crn"].(string), "crn:v1:bluemix:public:printers:global:") {
		t.Errorf("created %v", p)
	}
	if ev := e.Events(1)[0]; ev.Action != "printers.instance.create" {
		t.Errorf("event %s", ev.Action)
	}
	if r := e.Do(get("/v2/resource_plans")); !strings.Contains(string(r.Raw), `"service_name":"printers"`) {
		t.Errorf("plans %s", r.Raw)
	}

	body["resource_group"] = defaultGroup(e, e.Other.AccountID)
	foreign := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body, As: e.Other.IAMID})
	if m := wantError(t, foreign, 400, "invalid_body"); strings.Contains(m, "printers") {
		t.Errorf("message %q names another account's service", m)
	}
	wantError(t, e.Do(apitest.Request{Path: p["url"].(string), As: e.Other.IAMID}), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: p["url"].(string), As: e.Other.IAMID}), 404, "not_found")
	if r := e.Do(apitest.Request{Path: "/v2/resource_plans", As: e.Other.IAMID}); strings.Contains(string(r.Raw), "printers") {
		t.Error("another account sees the plans")
	}
	e.Do(del(p["url"].(string))).Want(204)
}

func TestTheNameOfAnotherAccountsServiceIsNotInEvents(t *testing.T) {
	e := start(t)
	theirs := newForeignInstance(e, "theirs")
	wantError(t, e.Do(del(theirs["url"].(string))), 404, "not_found")
	if ev := e.Events(1)[0]; ev.Action != "resource-controller.instance.delete" || ev.Outcome != "failure" {
		t.Errorf("event %s (%s)", ev.Action, ev.Outcome)
	}
}

func TestThereAreNoAliasesAndBindings(t *testing.T) {
	e := start(t)
	db := newDatabase(e, "db", false)
	for _, link := range []string{"resource_aliases_url", "resource_bindings_url"} {
		r := e.Do(get(db[link].(string)))
		if m := r.Want(200); m["rows_count"] != 0.0 || !strings.Contains(string(r.Raw), `"resources":[]`) || !strings.Contains(string(r.Raw), `"next_url":null`) {
			t.Errorf("%s: %s", link, r.Raw)
		}
		wantError(t, e.Do(apitest.Request{Path: db[link].(string), As: e.Other.IAMID}), 404, "not_found")
		wantError(t, e.Do(apitest.Request{Path: db[link].(string), As: nobody}), 403, "not_authorized")
	}
	for _, r := range []apitest.Request{
		get("/v2/resource_aliases"), post("/v2/resource_aliases", `{"name":"a"}`), get("/v2/resource_aliases/x"), del("/v2/resource_aliases/x"),
		get("/v2/resource_aliases/x/resource_bindings"), get("/v2/resource_bindings"), post("/v2/resource_bindings", "{}"), del("/v2/resource_bindings/x"),
		{Method: "PATCH", Path: "/v2/resource_bindings/x", Body: "{}"}, {Method: "PATCH", Path: "/v2/resource_aliases/x", Body: "{}"},
	} {
		wantError(t, e.Do(r), 404, "not_found")
	}
}

func TestInstancesOfBeforeAreShownInFull(t *testing.T) {
	e := start(t)
	stage(e, func(d *directory.Directory, tx *directory.Tx) {
		d.Resources.Put(tx, &resource.Instance{
			GUID: "old", AccountID: e.Owner.AccountID, Name: "old", GroupID: defaultGroup(e, e.Owner.AccountID), Service: "kms",
			PlanID: plan(e, "kms"), Target: "us-south", CRN: "crn:v1:bluemix:public:kms:us-south:a/" + e.Owner.AccountID + ":old::",
		})
	})
	m := e.Do(get("/v2/resource_instances/old")).Want(200)
	if m["state"] != "active" || operation(m) != "create succeeded" || len(m["plan_history"].([]any)) != 1 {
		t.Errorf("shown as %v", m)
	}
	wantNames(t, e.Do(get("/v2/resource_instances")).Want(200), "old")
}

func TestTheRouteTableHasEveryRouteOnce(t *testing.T) {
	e := apitest.New(t)
	e.Config.Routes = &api.Routes{}
	resourcecontroller.Register(e.Mux, e.Config, e.Sealer)
	before := len(e.Config.Routes.All)
	e.Do(del(newDatabase(e, "db", false)["url"].(string))).Want(204)
	seen := map[string]bool{}
	for _, r := range e.Config.Routes.All {
		if seen[r.Pattern] || r.Kind == api.KindChange && (r.Action == "" || r.Event == "") {
			t.Errorf("route %+v", r)
		}
		seen[r.Pattern] = true
	}
	if after := len(e.Config.Routes.All); after != before {
		t.Errorf("%d routes became %d by serving requests", before, after)
	}
}
