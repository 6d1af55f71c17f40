package resourcecontroller_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/resourcecontroller"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/vpc"
)

const nobody = "IBMid-NOBODY"

func start(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	resourcecontroller.Register(e.Mux, e.Config, e.Sealer)
	return e
}

// plan returns the id of a plan of a service.
func plan(e *apitest.Env, service string) string {
	e.T.Helper()
	s, ok := e.Config.Directory.Builtin().Service(service)
	if !ok || len(s.Plans) == 0 {
		e.T.Fatalf("the catalog has no plan of %s", service)
	}
	return s.Plans[0].ID
}

// defaultGroup returns the id of an account's default group.
func defaultGroup(e *apitest.Env, accountID string) string {
	for _, g := range e.Config.Directory.ResourceGroupsByAccount.Get(accountID) {
		if g.Default {
			return g.ID
		}
	}
	e.T.Fatal("the account has no default group")
	return ""
}

func newGroup(e *apitest.Env, name string) string {
	e.T.Helper()
	m := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: map[string]string{"name": name}}).Want(201)
	return m["id"].(string)
}

func instanceOf(e *apitest.Env, service, name, group string) map[string]any {
	return map[string]any{"name": name, "target": "us-south", "resource_group": group, "resource_plan_id": plan(e, service)}
}

func newInstance(e *apitest.Env, service, name string) map[string]any {
	e.T.Helper()
	body := instanceOf(e, service, name, defaultGroup(e, e.Owner.AccountID))
	return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}).Want(201)
}

func newForeignInstance(e *apitest.Env, name string) map[string]any {
	e.T.Helper()
	body := instanceOf(e, "kms", name, defaultGroup(e, e.Other.AccountID))
	return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body, As: e.Other.IAMID}).Want(201)
}

// names returns the names in a list answer.
func names(m map[string]any) []string {
	out := []string{}
	for _, r := range m["resources"].([]any) {
		out = append(out, r.(map[string]any)["name"].(string))
	}
	return out
}

func wantNames(t *testing.T, m map[string]any, want ...string) {
	t.Helper()
	got := names(m)
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("listed %q, want %q", got, want)
	}
}

// wantError checks the error shape and returns the message.
func wantError(t *testing.T, r *apitest.Response, status int, code string) string {
	t.Helper()
	m := r.Want(status)
	entries, _ := m["errors"].([]any)
	if len(entries) != 1 || int(m["status_code"].(float64)) != status || m["transaction_id"] != r.Header.Get(api.TransactionHeader) {
		t.Fatalf("error has the wrong shape: %s", r.Raw)
	}
	entry := entries[0].(map[string]any)
	if entry["code"] != code || entry["message"] != m["message"] || m["message"] == "" {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
	return m["message"].(string)
}

func get(path string) apitest.Request { return apitest.Request{Path: path} }

func TestAGroupIsCreatedShownRenamedAndDeleted(t *testing.T) {
	e := start(t)
	created := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: map[string]string{"name": "blue", "account_id": e.Owner.AccountID}}).Want(201)
	id := created["id"].(string)
	if want := "crn:v1:bluemix:public:resource-controller::a/" + e.Owner.AccountID + "::resource-group:" + id; created["crn"] != want {
		t.Errorf("crn %v, want %s", created["crn"], want)
	}
	if len(created) != 2 {
		t.Errorf("creation answers %v, want id and crn only", created)
	}
	shown := e.Do(get("/v2/resource_groups/" + id)).Want(200)
	for _, field := range []string{
		"id", "crn", "account_id", "name", "state", "default", "quota_id", "quota_url", "payment_methods_url",
		"resource_linkages", "teams_url", "created_at", "updated_at",
	} {
		if _, ok := shown[field]; !ok {
			t.Errorf("field %s is missing", field)
		}
	}
	if shown["state"] != "ACTIVE" || shown["default"] != false || shown["name"] != "blue" {
		t.Errorf("shown as %v", shown)
	}
	renamed := e.Do(apitest.Request{Method: "PATCH", Path: "/v2/resource_groups/" + id, Body: `{"name":"green","state":"ACTIVE"}`}).Want(200)
	if renamed["name"] != "green" {
		t.Errorf("renamed to %v", renamed["name"])
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/resource_groups/" + id}).Want(204)
	wantError(t, e.Do(get("/v2/resource_groups/"+id)), 404, "not_found")

	var actions []string
	for _, ev := range e.Events(3) {
		actions = append(actions, ev.Action)
	}
	if want := []string{"resource-controller.group.delete", "resource-controller.group.update", "resource-controller.group.create"}; !slices.Equal(actions, want) {
		t.Errorf("events %v, want %v", actions, want)
	}
}

func TestGroupsAreListedByNameAndDefault(t *testing.T) {
	e := start(t)
	newGroup(e, "blue")
	wantNames(t, e.Do(get("/v2/resource_groups")).Want(200), "Default", "blue")
	wantNames(t, e.Do(get("/v2/resource_groups?name=blue")).Want(200), "blue")
	wantNames(t, e.Do(get("/v2/resource_groups?default=true")).Want(200), "Default")
	wantNames(t, e.Do(get("/v2/resource_groups?default=false&account_id="+e.Owner.AccountID)).Want(200), "blue")
	wantNames(t, e.Do(get("/v2/resource_groups?account_id="+e.Other.AccountID)).Want(200))
	wantError(t, e.Do(get("/v2/resource_groups?default=maybe")), 400, "invalid_parameter")
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_groups", As: nobody}).Want(200))
}

func TestThePolicyOfOneGroupShowsThatGroupOnly(t *testing.T) {
	e := start(t)
	id := newGroup(e, "blue")
	grantGroup(e, nobody, id)
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_groups", As: nobody}).Want(200), "blue")
}

// grantGroup gives Viewer on one group object.
func grantGroup(e *apitest.Env, iamID, groupID string) {
	e.T.Helper()
	grant(e, iamID, "Viewer",
		access.ServiceName, "resource-controller", access.ResourceType, "resource-group", access.Resource, groupID)
}

// grant gives a platform role on what the attributes describe.
func grant(e *apitest.Env, iamID, role string, pairs ...string) {
	e.T.Helper()
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{equals(access.IAMID, iamID)},
		Resource: []access.Attribute{equals(access.AccountID, e.Owner.AccountID)},
		Roles:    []string{access.PlatformRoleCRN(role)},
	}
	for n := 0; n < len(pairs); n += 2 {
		p.Resource = append(p.Resource, equals(pairs[n], pairs[n+1]))
	}
	stage(e, func(d *directory.Directory, tx *directory.Tx) { d.Policies.Put(tx, p) })
}

func stage(e *apitest.Env, f func(*directory.Directory, *directory.Tx)) {
	e.T.Helper()
	d := e.Config.Directory
	err := d.Update(e.T.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		f(d, tx)
		return nil
	})
	if err != nil {
		e.T.Fatal(err)
	}
}

func TestTheDefaultGroupIsNotDeleted(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Method: "DELETE", Path: "/v2/resource_groups/" + defaultGroup(e, e.Owner.AccountID)})
	if m := wantError(t, r, 400, "default_group"); !strings.Contains(m, "default") {
		t.Errorf("message %q does not say why", m)
	}
}

func TestAGroupThatHoldsSomethingIsNotDeleted(t *testing.T) {
	holders := map[string]func(d *directory.Directory, tx *directory.Tx, account, group string){
		"1 cluster": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.Clusters.Put(tx, &cluster.Cluster{ID: "c1", AccountID: account, Name: "k", Type: identity.IKSSA, ResourceGroupID: group})
		},
		"1 VPC": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.VPCs.Put(tx, &vpc.VPC{ID: "v1", AccountID: account, Name: "v", ResourceGroupID: group})
		},
		"1 subnet": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.Subnets.Put(tx, &vpc.Subnet{ID: "s1", AccountID: account, Name: "s", ResourceGroupID: group})
		},
		"1 SSH key": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.Keys.Put(tx, &vpc.Key{ID: "k1", AccountID: account, Name: "k", ResourceGroupID: group})
		},
		"1 virtual server instance": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.Instances.Put(tx, &vpc.Instance{ID: "i1", AccountID: account, Name: "i", ResourceGroupID: group})
		},
		"1 floating IP": func(d *directory.Directory, tx *directory.Tx, account, group string) {
			d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: "f1", AccountID: account, Name: "f", ResourceGroupID: group})
		},
	}
	for held, put := range holders {
		t.Run(held, func(t *testing.T) {
			e := start(t)
			id := newGroup(e, "blue")
			stage(e, func(d *directory.Directory, tx *directory.Tx) { put(d, tx, e.Owner.AccountID, id) })
			r := e.Do(apitest.Request{Method: "DELETE", Path: "/v2/resource_groups/" + id})
			if m := wantError(t, r, 409, "group_not_empty"); !strings.Contains(m, held) {
				t.Errorf("message %q does not name %q", m, held)
			}
		})
	}
	t.Run("2 resource instances", func(t *testing.T) {
		e := start(t)
		id := newGroup(e, "blue")
		for range 2 {
			e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, "kms", "k", id)}).Want(201)
		}
		r := e.Do(apitest.Request{Method: "DELETE", Path: "/v2/resource_groups/" + id})
		if m := wantError(t, r, 409, "group_not_empty"); !strings.Contains(m, "2 resource instances") {
			t.Errorf("message %q does not count the instances", m)
		}
	})
}

func TestAGroupNameIsTakenOncePerAccount(t *testing.T) {
	e := start(t)
	var wg sync.WaitGroup
	statuses := make([]int, 8)
	for n := range statuses {
		wg.Go(func() {
			statuses[n] = e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: `{"name":"blue"}`}).Status
		})
	}
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{201, 409, 409, 409, 409, 409, 409, 409}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: `{"name":"blue"}`, As: e.Other.IAMID}).Want(201)
}

func TestBadGroupBodiesAreRefused(t *testing.T) {
	e := start(t)
	id := newGroup(e, "blue")
	for _, body := range []string{
		``, `{`, `[]`, `"x"`, `{"name":1}`, `{}`, `{"name":""}`, `{"name":" "}`, `{"name":"a\u0000b"}`,
		`{"name":"` + strings.Repeat("x", 101) + `"}`, `{"name":"a"} {}`,
	} {
		if r := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: body}); r.Status != 400 {
			t.Errorf("POST %.60s: status %d, want 400", body, r.Status)
		}
	}
	for _, body := range []string{`{"name":""}`, `{"state":"DELETED"}`, `{"state":""}`, `{"name":[]}`} {
		if r := e.Do(apitest.Request{Method: "PATCH", Path: "/v2/resource_groups/" + id, Body: body}); r.Status != 400 {
			t.Errorf("PATCH %s: status %d, want 400", body, r.Status)
		}
	}
}

func TestAStaleEntityTagStopsAGroupChange(t *testing.T) {
	e := start(t)
	path := "/v2/resource_groups/" + newGroup(e, "blue")
	old := e.Do(get(path)).Header.Get("ETag")
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"green"}`, Header: map[string]string{"If-Match": old}}).Want(200)
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"red"}`, Header: map[string]string{"If-Match": old}}), 409, "conflict")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path, Header: map[string]string{"If-Match": old}}), 409, "conflict")
}

func TestAnotherAccountsGroupDoesNotExist(t *testing.T) {
	e := start(t)
	foreign := defaultGroup(e, e.Other.AccountID)
	path := "/v2/resource_groups/" + foreign
	wantError(t, e.Do(get(path)), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"mine"}`}), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path}), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, "kms", "k", foreign)}), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: map[string]string{"name": "x", "account_id": e.Other.AccountID}}), 403, "not_authorized")
}

func TestGroupsNeedTheirActions(t *testing.T) {
	e := start(t)
	path := "/v2/resource_groups/" + newGroup(e, "blue")
	e.Grant("IBMid-VIEWER", "resource-controller", "Viewer")
	e.Do(apitest.Request{Path: path, As: "IBMid-VIEWER"}).Want(200)
	for _, as := range []string{nobody, "IBMid-VIEWER"} {
		wantError(t, e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_groups", Body: `{"name":"x"}`, As: as}), 403, "not_authorized")
		wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`, As: as}), 403, "not_authorized")
		wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path, As: as}), 403, "not_authorized")
	}
	wantError(t, e.Do(apitest.Request{Path: path, As: nobody}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Path: path, Anonymous: true}), 401, "token_missing")
}

func TestTheQuotaOfAGroupCanBeFollowed(t *testing.T) {
	e := start(t)
	group := e.Do(get("/v2/resource_groups/" + defaultGroup(e, e.Owner.AccountID))).Want(200)
	link, ok := strings.CutPrefix(group["quota_url"].(string), e.Config.URL)
	if !ok {
		t.Fatalf("quota_url %v is not on this server", group["quota_url"])
	}
	one := e.Do(get(link)).Want(200)
	all := e.Do(get("/v2/quota_definitions")).Want(200)
	if one["id"] != group["quota_id"] || len(all["resources"].([]any)) != 1 {
		t.Errorf("quota %v, list %v", one, all)
	}
	wantError(t, e.Do(get("/v2/quota_definitions/other")), 404, "not_found")
	wantError(t, e.Do(apitest.Request{Path: "/v2/quota_definitions", Anonymous: true}), 401, "token_missing")
}

func TestPlansAreABareArray(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Path: "/v2/resource_plans", As: nobody})
	var plans []struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		ServiceName string `json:"service_name"`
		Reclamation *bool  `json:"reclamation"`
	}
	if err := json.Unmarshal(r.Raw, &plans); err != nil || r.Status != 200 || len(plans) == 0 {
		t.Fatalf("status %d, %v: %s", r.Status, err, r.Raw)
	}
	for _, p := range plans {
		if p.ID == "" || p.Name == "" || p.ServiceName == "" || p.Reclamation == nil {
			t.Errorf("plan %+v lacks a field", p)
		}
	}
}

func TestAnInstanceIsCreatedShownChangedAndDeleted(t *testing.T) {
	e := start(t)
	group := defaultGroup(e, e.Owner.AccountID)
	body := instanceOf(e, "cloud-object-storage", "store", group)
	body["target"], body["tags"], body["parameters"] = "global", []string{"env:test"}, map[string]any{"size": 1}
	created := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}).Want(201)
	guid := created["guid"].(string)
	if want := "crn:v1:bluemix:public:cloud-object-storage:global:a/" + e.Owner.AccountID + ":" + guid + "::"; created["crn"] != want || created["id"] != want {
		t.Errorf("id %v, crn %v, want %s", created["id"], created["crn"], want)
	}
	if created["resource_id"] != "cloud-object-storage" || created["state"] != "active" || created["type"] != "service_instance" || created["created_by"] != e.Owner.IAMID {
		t.Errorf("created %v", created)
	}
	for _, field := range []string{
		"id", "guid", "url", "crn", "name", "account_id", "resource_group_id", "resource_group_crn", "resource_id",
		"resource_plan_id", "region_id", "target_crn", "state", "type", "sub_type", "parameters", "extensions", "allow_cleanup",
		"onetime_credentials", "locked", "dashboard_url", "last_operation", "plan_history", "resource_aliases_url",
		"resource_bindings_url", "resource_keys_url", "created_at", "created_by", "updated_at", "updated_by", "deleted_at",
		"deleted_by", "scheduled_reclaim_at", "scheduled_reclaim_by", "restored_at", "restored_by", "reseller_channel_id",
		"controlled_by", "migrated",
	} {
		if _, ok := created[field]; !ok {
			t.Errorf("field %s is missing", field)
		}
	}
	path := created["url"].(string)
	e.Do(get(path)).Want(200)
	byCRN := "/v2/resource_instances/" + url.PathEscape(created["crn"].(string))
	if got := e.Do(get(byCRN)).Want(200); got["guid"] != guid {
		t.Errorf("by CRN: %v", got)
	}
	changed := e.Do(apitest.Request{Method: "PATCH", Path: byCRN, Body: `{"name":"vault","parameters":{"secret":"hush"}}`}).Want(200)
	if changed["name"] != "vault" || changed["parameters"].(map[string]any)["secret"] != "hush" {
		t.Errorf("changed to %v", changed)
	}
	e.Do(apitest.Request{Method: "DELETE", Path: path + "?recursive=true"}).Want(204)
	if gone := e.Do(get(path)).Want(200); gone["state"] != "pending_reclamation" {
		t.Errorf("after the deletion: %v", gone)
	}

	events := e.Events(3)
	for n, action := range []string{"schedule_reclaim", "update", "create"} {
		if want := "cloud-object-storage.instance." + action; events[n].Action != want {
			t.Errorf("event %s, want %s", events[n].Action, want)
		}
	}
	for _, ev := range events {
		if !strings.Contains(string(ev.ResponseData), `"service":"cloud-object-storage"`) || ev.Target.TypeURI != "cloud-object-storage/instance" {
			t.Errorf("event %s does not name the service: %s %s", ev.Action, ev.ResponseData, ev.Target.TypeURI)
		}
		if raw, _ := json.Marshal(ev); strings.Contains(string(raw), "hush") {
			t.Errorf("event %s holds a parameter value", ev.Action)
		}
	}
}

func TestTheListPagesWithLimitAndFiltersInStart(t *testing.T) {
	e := start(t)
	want := map[string]bool{}
	for n := range 7 {
		want[newInstance(e, "kms", fmt.Sprintf("k%d", n))["guid"].(string)] = true
		newInstance(e, "cloud-object-storage", "other")
	}
	path := "/v2/resource_instances?limit=3&resource_id=kms"
	pages := 0
	for path != "" {
		m := e.Do(get(path)).Want(200)
		rows := m["resources"].([]any)
		pages++
		if len(rows) > 3 || int(m["rows_count"].(float64)) != len(rows) {
			t.Fatalf("page of %d rows, rows_count %v", len(rows), m["rows_count"])
		}
		for _, row := range rows {
			guid := row.(map[string]any)["guid"].(string)
			if !want[guid] {
				t.Fatalf("%s is listed twice or not asked for", guid)
			}
			delete(want, guid)
		}
		next, present := m["next_url"]
		if !present {
			t.Fatal("next_url is missing")
		}
		path = ""
		if next != nil {
			if path = next.(string); path == "" {
				t.Fatal("next_url is an empty string")
			}
		}
	}
	if pages != 3 || len(want) != 0 {
		t.Errorf("%d pages, %d instances not listed", pages, len(want))
	}
}

func TestTheLastPageHasANullLink(t *testing.T) {
	e := start(t)
	empty := e.Do(get("/v2/resource_instances"))
	if empty.Want(200); !strings.Contains(string(empty.Raw), `"next_url":null`) || !strings.Contains(string(empty.Raw), `"resources":[]`) {
		t.Errorf("empty list: %s", empty.Raw)
	}
	newInstance(e, "kms", "k")
	full := e.Do(get("/v2/resource_instances?limit=1"))
	if full.Want(200); !strings.Contains(string(full.Raw), `"next_url":null`) {
		t.Errorf("full last page: %s", full.Raw)
	}
}

func TestTheListIsFiltered(t *testing.T) {
	e := start(t)
	blue := newGroup(e, "blue")
	k := newInstance(e, "kms", "k")
	c := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, "cloud-object-storage", "c", blue)}).Want(201)
	for query, want := range map[string][]string{
		"":                                       {"c", "k"},
		"guid=" + k["guid"].(string):             {"k"},
		"name=c":                                 {"c"},
		"name=nothing":                           {},
		"resource_group_id=" + blue:              {"c"},
		"resource_id=kms":                        {"k"},
		"resource_plan_id=" + plan(e, "kms"):     {"k"},
		"type=service_instance":                  {"c", "k"},
		"type=cf":                                {},
		"sub_type=x":                             {},
		"state=active":                           {"c", "k"},
		"state=removed":                          {},
		"updated_from=2100-01-01T00:00:00Z":      {},
		"updated_to=2000-01-01T00:00:00.000Z":    {},
		"guid=" + c["guid"].(string) + "&name=k": {},
	} {
		t.Run(query, func(t *testing.T) {
			wantNames(t, e.Do(get("/v2/resource_instances?"+query)).Want(200), want...)
		})
	}
	for _, query := range []string{"limit=0", "limit=101", "limit=x", "state=odd", "updated_from=yesterday", "start=%21", "start=AAAA"} {
		wantError(t, e.Do(get("/v2/resource_instances?"+query)), 400, "invalid_parameter")
	}
}

func TestTheListShowsOnlyWhatPoliciesCover(t *testing.T) {
	e := start(t)
	blue := newGroup(e, "blue")
	k := newInstance(e, "kms", "k")
	newInstance(e, "kms", "k2")
	e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, "cloud-object-storage", "c", blue)}).Want(201)

	list := func(as string) map[string]any {
		return e.Do(apitest.Request{Path: "/v2/resource_instances", As: as}).Want(200)
	}
	wantNames(t, list(nobody))
	e.Grant("iam-Profile-service", "kms", "Viewer")
	wantNames(t, list("iam-Profile-service"), "k", "k2")
	grant(e, "iam-Profile-one", "Operator", access.ServiceName, "kms", access.ServiceInstance, k["guid"].(string))
	wantNames(t, list("iam-Profile-one"), "k")
	grant(e, "iam-Profile-group", "Viewer", access.ResourceGroupID, blue)
	wantNames(t, list("iam-Profile-group"), "c")
	grant(e, "iam-Profile-region", "Viewer", access.ServiceName, "kms", access.Region, "eu-de")
	wantNames(t, list("iam-Profile-region"))
	e.Grant("iam-Profile-reader", "kms", "Reader")
	wantNames(t, list("iam-Profile-reader"))
}

func TestAForgedStartShowsNothingForeign(t *testing.T) {
	e := start(t)
	mine := newInstance(e, "kms", "mine")
	theirs := newForeignInstance(e, "theirs")
	newForeignInstance(e, "theirs2")
	page := e.Do(apitest.Request{Path: "/v2/resource_instances?limit=1", As: e.Other.IAMID}).Want(200)
	link, err := url.Parse(page["next_url"].(string))
	if err != nil {
		t.Fatal(err)
	}
	forged := []string{
		link.Query().Get("start"),
		api.Cursor{Limit: 1 << 30}.String(),
		api.Cursor{After: "0", Query: url.Values{"account_id": {e.Other.AccountID}}}.String(),
		api.Cursor{Query: url.Values{"guid": {theirs["guid"].(string)}}}.String(),
		api.Cursor{Query: url.Values{"resource_group_id": {defaultGroup(e, e.Other.AccountID)}}}.String(),
		api.Cursor{After: "\xff"}.String(),
	}
	for _, start := range forged {
		m := e.Do(get("/v2/resource_instances?start=" + url.QueryEscape(start))).Want(200)
		for _, row := range m["resources"].([]any) {
			if got := row.(map[string]any); got["guid"] != mine["guid"] {
				t.Errorf("start %s shows %v", start, got["crn"])
			}
		}
	}
	// A cursor of somebody who may see more does not lend his rights.
	cursor := api.Cursor{Limit: 100}.String()
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_instances?start=" + cursor, As: nobody}).Want(200))
	wantError(t, e.Do(get("/v2/resource_instances?start="+api.Cursor{Query: url.Values{"state": {"odd"}}}.String())), 400, "invalid_parameter")
}

func TestAnotherAccountsInstanceDoesNotExist(t *testing.T) {
	e := start(t)
	mine := newInstance(e, "kms", "mine")
	theirs := newForeignInstance(e, "theirs")
	// The CRNs mix what is known of both accounts.
	swap := func(crn any, from, to string) string { return strings.Replace(crn.(string), from, to, 1) }
	for _, id := range []string{
		theirs["guid"].(string),
		theirs["crn"].(string),
		swap(theirs["crn"], e.Other.AccountID, e.Owner.AccountID),
		swap(mine["crn"], e.Owner.AccountID, e.Other.AccountID),
		swap(mine["crn"], ":kms:", ":cloud-object-storage:"),
		mine["crn"].(string) + "x",
		"crn:v1:bluemix:public:kms:us-south:a/" + e.Owner.AccountID + ":::",
		"no-such-id", "crn:", "..%2f",
	} {
		path := "/v2/resource_instances/" + url.PathEscape(id)
		wantError(t, e.Do(get(path)), 404, "not_found")
		wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: `{"name":"x"}`}), 404, "not_found")
		wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path}), 404, "not_found")
	}
	wantNames(t, e.Do(get("/v2/resource_instances?guid="+theirs["guid"].(string))).Want(200))
	wantNames(t, e.Do(apitest.Request{Path: "/v2/resource_instances", As: e.Other.IAMID}).Want(200), "theirs")
}

func TestAnInstanceIsFoundUnderAnotherCloudName(t *testing.T) {
	e := start(t)
	mine := newInstance(e, "kms", "mine")
	staging := strings.Replace(mine["crn"].(string), "bluemix", "staging", 1)
	e.Do(get("/v2/resource_instances/" + url.PathEscape(staging))).Want(200)
}

func TestCreatingAnInstanceNeedsTheServiceAndTheGroup(t *testing.T) {
	e := start(t)
	blue := newGroup(e, "blue")
	create := func(as, service string) *apitest.Response {
		return e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: instanceOf(e, service, "x", blue), As: as})
	}
	wantError(t, create(nobody, "kms"), 403, "not_authorized")

	e.Grant("IBMid-SERVICE", "kms", "Editor")
	if m := wantError(t, create("IBMid-SERVICE", "kms"), 403, "not_authorized"); !strings.Contains(m, "resource-group "+blue) {
		t.Errorf("message %q does not name the group", m)
	}
	grantGroup(e, "IBMid-GROUP", blue)
	if m := wantError(t, create("IBMid-GROUP", "kms"), 403, "not_authorized"); !strings.Contains(m, "resource-controller.instance.create") {
		t.Errorf("message %q does not name the action", m)
	}
	grantGroup(e, "IBMid-SERVICE", blue)
	create("IBMid-SERVICE", "kms").Want(201)
	wantError(t, create("IBMid-SERVICE", "cloud-object-storage"), 403, "not_authorized")

	e.Grant("IBMid-OPERATOR", "kms", "Operator")
	grantGroup(e, "IBMid-OPERATOR", blue)
	wantError(t, create("IBMid-OPERATOR", "kms"), 403, "not_authorized")
}

func TestChangingAnInstanceNeedsItsActions(t *testing.T) {
	e := start(t)
	path := newInstance(e, "kms", "k")["url"].(string)
	e.Grant("IBMid-VIEWER", "kms", "Viewer")
	e.Grant("IBMid-OPERATOR", "kms", "Operator")
	as := func(id, method, body string) int {
		r := apitest.Request{Method: method, Path: path, As: id}
		if body != "" {
			r.Body = body
		}
		return e.Do(r).Status
	}
	for _, c := range []struct {
		who, method, body string
		want              int
	}{
		{nobody, "GET", "", 403},
		{nobody, "PATCH", `{"name":"x"}`, 403},
		{nobody, "DELETE", "", 403},
		{"IBMid-VIEWER", "GET", "", 200},
		{"IBMid-VIEWER", "PATCH", `{"name":"x"}`, 403},
		{"IBMid-OPERATOR", "PATCH", `{"name":"x"}`, 200},
		{"IBMid-OPERATOR", "DELETE", "", 403},
		{e.Owner.IAMID, "DELETE", "", 204},
	} {
		if got := as(c.who, c.method, c.body); got != c.want {
			t.Errorf("%s by %s: status %d, want %d", c.method, c.who, got, c.want)
		}
	}
}

func TestBadInstanceBodiesAreRefused(t *testing.T) {
	e := start(t)
	good := instanceOf(e, "kms", "k", defaultGroup(e, e.Owner.AccountID))
	for _, c := range []struct {
		field string
		value any
	}{
		{"name", ""},
		{"name", strings.Repeat("x", 181)},
		{"name", "a\nb"},
		{"name", 1},
		{"target", ""},
		{"target", "us-south:a/0"},
		{"target", "US South"},
		{"target", strings.Repeat("x", 65)},
		{"resource_group", ""},
		{"resource_plan_id", ""},
		{"resource_plan_id", "no-such-plan"},
		{"parameters", "text"},
		{"parameters", []int{1}},
		{"parameters", map[string]string{"x": strings.Repeat("x", 17<<10)}},
		{"tags", []string{""}},
		{"tags", []string{"a\u0000"}},
		{"tags", make([]string, 101)},
		{"tags", "x"},
	} {
		body := map[string]any{}
		for k, v := range good {
			body[k] = v
		}
		body[c.field] = c.value
		if r := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}); r.Status != 400 {
			t.Errorf("%s=%.40v: status %d, want 400: %s", c.field, c.value, r.Status, r.Raw)
		}
	}
	for _, body := range []string{``, `null`, `[]`, `{"parameters":}`, `{"name":{}}`} {
		if r := e.Do(apitest.Request{Method: "POST", Path: "/v2/resource_instances", Body: body}); r.Status != 400 {
			t.Errorf("body %q: status %d, want 400", body, r.Status)
		}
	}
	path := newInstance(e, "kms", "k")["url"].(string)
	for _, body := range []string{`{"name":""}`, `{"parameters":[]}`, `{"resource_plan_id":"x"}`, `{"resource_plan_id":"` + plan(e, "cloud-object-storage") + `"}`, `{"allow_cleanup":"yes"}`} {
		if r := e.Do(apitest.Request{Method: "PATCH", Path: path, Body: body}); r.Status != 400 {
			t.Errorf("PATCH %s: status %d, want 400", body, r.Status)
		}
	}
}

func TestANameOfTheFullLengthIsTaken(t *testing.T) {
	e := start(t)
	newInstance(e, "kms", strings.Repeat("ü", 180))
}

func TestOfManyWritersWithOneEntityTagOneWins(t *testing.T) {
	e := start(t)
	path := newInstance(e, "kms", "k")["url"].(string)
	tag := e.Do(get(path)).Header.Get("ETag")
	var wg sync.WaitGroup
	statuses := make([]int, 6)
	for n := range statuses {
		wg.Go(func() {
			statuses[n] = e.Do(apitest.Request{
				Method: http.MethodPatch, Path: path, Body: fmt.Sprintf(`{"name":"k%d"}`, n), Header: map[string]string{"If-Match": tag},
			}).Status
		})
	}
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{200, 409, 409, 409, 409, 409}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path, Header: map[string]string{"If-Match": tag}}), 409, "conflict")
}
