package clusters_test

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
)

func postGroup(name string) apitest.Request {
	return apitest.Request{Method: "POST", Path: "/v1/cluster_groups", Body: map[string]any{"name": name, "description": "of " + name}}
}

func member(method, group, cluster string) apitest.Request {
	return apitest.Request{Method: method, Path: "/v1/cluster_groups/" + group + "/clusters/" + cluster}
}

// namesOf returns the names in a list of references.
func namesOf(v any) []string {
	out := []string{}
	all, _ := v.([]any)
	for _, r := range all {
		out = append(out, r.(map[string]any)["name"].(string))
	}
	return out
}

// groupNames returns the claim cluster_group of a cluster's pods.
func groupNames(t *testing.T, e *apitest.Env, name string) []string {
	t.Helper()
	d := e.Config.Directory
	for _, k := range d.ClustersByAccount.Get(e.Owner.AccountID) {
		if k.Name == name {
			return d.ClusterGroupNames(k)
		}
	}
	t.Fatalf("there is no cluster %s", name)
	return nil
}

func TestAClusterGroupIsMadeFilledAndDeleted(t *testing.T) {
	e := start(t)
	m := e.Do(postGroup("fleet")).Want(201)
	id := m["id"].(string)
	if !regexp.MustCompile(`^ClusterGroup-[0-9a-f-]{36}$`).MatchString(id) {
		t.Errorf("id %q", id)
	}
	if want := "crn:v1:bluemix:public:containers-kubernetes::a/" + e.Owner.AccountID + "::cluster-group:" + id; m["crn"] != want {
		t.Errorf("crn %v, want %s", m["crn"], want)
	}
	e.Do(post(uploaded(t, "one"))).Want(201)
	e.Do(post(uploaded(t, "two"))).Want(201)
	for range 2 { // putting it in again changes nothing
		if got := namesOf(e.Do(member("PUT", "fleet", "one")).Want(200)["groups"]); !slices.Equal(got, []string{"fleet"}) {
			t.Errorf("the cluster is in %v", got)
		}
	}
	if data := string(e.Events(1)[0].ResponseData); !strings.Contains(data, `"added":false`) {
		t.Errorf("event of the second time: %s", data)
	}
	e.Do(member("PUT", id, "two")).Want(200)
	r := e.Do(apitest.Request{Path: "/v1/cluster_groups/fleet"})
	m = r.Want(200)
	if got := namesOf(m["clusters"]); !slices.Equal(got, []string{"one", "two"}) || m["cluster_count"] != 2.0 || r.Header.Get("ETag") != m["entity_tag"] {
		t.Errorf("shown as %s", r.Raw)
	}
	if got := groupNames(t, e, "one"); !slices.Equal(got, []string{"fleet"}) {
		t.Errorf("pods have the groups %v", got)
	}

	e.Do(member("DELETE", "fleet", "one")).Want(204)
	e.Do(member("DELETE", "fleet", "one")).Want(204)
	if got := groupNames(t, e, "one"); len(got) != 0 {
		t.Errorf("taken out, pods still have the groups %v", got)
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/cluster_groups/" + id}).Want(204)
	ev := e.Events(1)[0]
	if ev.Action != "containers-kubernetes.cluster-group.delete" || ev.Target.ID != m["crn"] || ev.Severity != "critical" || !strings.Contains(string(ev.ResponseData), `"name":"two"`) {
		t.Errorf("event %s on %s (%s): %s", ev.Action, ev.Target.ID, ev.Severity, ev.ResponseData)
	}
	if got := groupNames(t, e, "two"); len(got) != 0 {
		t.Errorf("after the deletion pods still have the groups %v", got)
	}
	// A new group of that name begins empty.
	if m := e.Do(postGroup("fleet")).Want(201); m["cluster_count"] != 0.0 {
		t.Errorf("the new group has %v clusters", m["cluster_count"])
	}
	if got := groupNames(t, e, "two"); len(got) != 0 {
		t.Errorf("a new group has old clusters: %v", got)
	}
}

func TestAClusterIsRegisteredIntoGroups(t *testing.T) {
	e := start(t)
	b := e.Do(postGroup("b")).Want(201)["id"].(string)
	e.Do(postGroup("a")).Want(201)
	body := uploaded(t, "k")
	body["groups"] = []string{b, "a", "b"}
	if got := namesOf(e.Do(post(body)).Want(201)["groups"]); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("registered into %v", got)
	}
	if data := string(e.Events(1)[0].ResponseData); !strings.Contains(data, `"name":"b"`) {
		t.Errorf("the event does not say so: %s", data)
	}
	for _, groups := range [][]string{{"none"}, {""}, {"a", "none"}} {
		body := uploaded(t, "other")
		body["groups"] = groups
		wantError(t, e.Do(post(body)), 404, "not_found")
	}
	if got := listed(e, ""); !slices.Equal(got, []string{"k"}) {
		t.Errorf("registered %v", got)
	}
}

// Rules name groups, so that a renamed group would let others in without a
// change to any rule.
func TestAGroupKeepsItsName(t *testing.T) {
	e := start(t)
	tag := e.Do(postGroup("fleet")).Want(201)["entity_tag"].(string)
	change := func(body any, match string) *apitest.Response {
		r := apitest.Request{Method: "PATCH", Path: "/v1/cluster_groups/fleet", Body: body}
		if match != "" {
			r.Header = map[string]string{"If-Match": match}
		}
		return e.Do(r)
	}
	if m := wantError(t, change(map[string]any{"name": "other"}, ""), 400, "invalid_body"); !strings.Contains(m, "rules") {
		t.Errorf("message %q does not say why", m)
	}
	m := change(map[string]any{"name": "fleet", "description": "new"}, tag).Want(200)
	if m["description"] != "new" || m["entity_tag"] == tag {
		t.Errorf("changed into %v", m)
	}
	wantError(t, change(map[string]any{"description": "newer"}, tag), 409, "conflict")
	wantError(t, change(map[string]any{"description": strings.Repeat("x", 301)}, ""), 400, "invalid_body")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/cluster_groups/fleet", Header: map[string]string{"If-Match": tag}}), 409, "conflict")
	wantError(t, e.Do(postGroup("fleet")), 409, "conflict")
	theirs := postGroup("fleet")
	theirs.As = e.Other.IAMID
	e.Do(theirs).Want(201)
}

func TestNamesOfGroupsFitIntoLists(t *testing.T) {
	e := start(t)
	for _, name := range []string{"", " ", " a", "a ", "a,b", "a:b", "eu/a", "a*", "a'b", "a\nb", "a\u0000", strings.Repeat("x", 101)} {
		wantError(t, e.Do(postGroup(name)), 400, "invalid_body")
	}
	for _, body := range []string{`{}`, `{"name":null}`, `{"name":1}`, `[]`, ``} {
		wantError(t, e.Do(apitest.Request{Method: "POST", Path: "/v1/cluster_groups", Body: body}), 400, "invalid_body")
	}
	for _, name := range []string{"a", "eu-production 1.b_c", "Flotte für München", strings.Repeat("x", 100)} {
		e.Do(postGroup(name)).Want(201)
	}
}

// A rule that names a group lets the group's clusters in. Who may change only
// one of the two must not bring them together.
func TestPuttingAClusterIntoAGroupNeedsRightsOverBoth(t *testing.T) {
	e := start(t)
	group := e.Do(postGroup("fleet")).Want(201)["id"].(string)
	id := e.Do(post(uploaded(t, "k"))).Want(201)["id"].(string)
	for _, role := range []string{"Viewer", "Operator", "Editor"} {
		e.Grant("IBMid-"+role, "containers-kubernetes", role)
	}
	grantOn(t, e, "IBMid-CLUSTER", access.ServiceInstance, id)
	grantOn(t, e, "IBMid-GROUP", access.Resource, group)
	for _, who := range []string{nobody, "IBMid-Viewer", "IBMid-Operator", "IBMid-Editor", "IBMid-CLUSTER", "IBMid-GROUP"} {
		for _, method := range []string{"PUT", "DELETE"} {
			r := member(method, "fleet", "k")
			r.As = who
			wantError(t, e.Do(r), 403, "not_authorized")
		}
	}
	if ev := e.Events(1)[0]; ev.Action != "containers-kubernetes.cluster-group.remove-cluster" || ev.Outcome != "failure" || !strings.HasSuffix(ev.Target.ID, group) {
		t.Errorf("the refusal is recorded as %s %s on %s", ev.Action, ev.Outcome, ev.Target.ID)
	}
	if got := groupNames(t, e, "k"); len(got) != 0 {
		t.Errorf("in %v nevertheless", got)
	}
	// Nor does a registration bring a cluster into a group that is not one's own.
	grantActions(t, e, "IBMid-REGISTRAR", "containers-kubernetes.cluster.create")
	body := uploaded(t, "mine")
	r := post(body)
	r.As = "IBMid-REGISTRAR"
	body["groups"] = []string{"fleet"}
	wantError(t, e.Do(r), 403, "not_authorized")
	delete(body, "groups")
	e.Do(r).Want(201)

	r = member("PUT", "fleet", "k")
	e.Grant("IBMid-ADMIN", "containers-kubernetes", "Administrator")
	r.As = "IBMid-ADMIN"
	e.Do(r).Want(200)
}

func TestAnotherAccountsGroupDoesNotExist(t *testing.T) {
	e := start(t)
	r := postGroup("theirs")
	r.As = e.Other.IAMID
	group := e.Do(r).Want(201)["id"].(string)
	r = post(uploaded(t, "theirs"))
	r.As = e.Other.IAMID
	id := e.Do(r).Want(201)["id"].(string)
	e.Do(postGroup("mine")).Want(201)
	e.Do(post(uploaded(t, "mine"))).Want(201)
	for _, r := range []apitest.Request{
		{Path: "/v1/cluster_groups/" + group},
		{Path: "/v1/cluster_groups/theirs"},
		{Method: "DELETE", Path: "/v1/cluster_groups/" + group},
		{Method: "PATCH", Path: "/v1/cluster_groups/" + group, Body: map[string]any{"description": "x"}},
		member("PUT", group, "mine"),
		member("PUT", "mine", id),
		member("DELETE", group, id),
	} {
		wantError(t, e.Do(r), 404, "not_found")
	}
	body := uploaded(t, "k")
	body["groups"] = []string{group}
	wantError(t, e.Do(post(body)), 404, "not_found")
	if got := namesOf(e.Do(apitest.Request{Path: "/v1/cluster_groups"}).Want(200)["cluster_groups"]); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("listed %v", got)
	}
}

func TestAGroupShowsTheClustersThatItsReaderMaySee(t *testing.T) {
	e := start(t)
	group := e.Do(postGroup("fleet")).Want(201)["id"].(string)
	one := uploaded(t, "one")
	one["groups"] = []string{"fleet"}
	id := e.Do(post(one)).Want(201)["id"].(string)
	two := uploaded(t, "two")
	two["groups"] = []string{"fleet"}
	e.Do(post(two)).Want(201)
	grantOn(t, e, "IBMid-PART", access.Resource, group)
	read := apitest.Request{Path: "/v1/cluster_groups/fleet", As: "IBMid-PART"}
	if got := namesOf(e.Do(read).Want(200)["clusters"]); len(got) != 0 {
		t.Errorf("shows %v", got)
	}
	grantOn(t, e, "IBMid-PART", access.ServiceInstance, id)
	if got := namesOf(e.Do(read).Want(200)["clusters"]); !slices.Equal(got, []string{"one"}) {
		t.Errorf("shows %v", got)
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/cluster_groups/fleet", As: nobody}), 403, "not_authorized")
	if got := namesOf(e.Do(apitest.Request{Path: "/v1/cluster_groups", As: nobody}).Want(200)["cluster_groups"]); len(got) != 0 {
		t.Errorf("lists %v", got)
	}
}

func TestGroupsHaveLimits(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	e.Do(post(uploaded(t, "k"))).Want(201)
	add := func(from, to int) {
		t.Helper()
		err := d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
			for n := from; n < to; n++ {
				d.ClusterGroups.Put(tx, &cluster.Group{ID: fmt.Sprintf("ClusterGroup-%03d", n), AccountID: e.Owner.AccountID, Name: fmt.Sprint("g", n)})
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	add(0, 499)
	for n := range 50 {
		e.Do(member("PUT", fmt.Sprint("g", 49-n), "k")).Want(200)
	}
	wantError(t, e.Do(member("PUT", "g50", "k")), 409, "limit_exceeded")
	e.Do(member("PUT", "g7", "k")).Want(200)
	e.Do(member("DELETE", "g7", "k")).Want(204)
	e.Do(member("PUT", "g50", "k")).Want(200)
	body := uploaded(t, "many")
	many := make([]string, 51)
	for n := range many {
		many[n] = fmt.Sprint("g", n)
	}
	body["groups"] = many
	wantError(t, e.Do(post(body)), 400, "invalid_body")

	e.Do(postGroup("the last")).Want(201)
	wantError(t, e.Do(postGroup("one too many")), 409, "limit_exceeded")
}

// Putting clusters into a group while it is deleted must leave none in a group
// that is not there.
func TestAGroupThatIsDeletedMeanwhileHasNoClusters(t *testing.T) {
	e := start(t)
	e.Do(postGroup("fleet")).Want(201)
	for n := range 6 {
		e.Do(post(uploaded(t, fmt.Sprint("k", n)))).Want(201)
	}
	var wg sync.WaitGroup
	for n := range 6 {
		wg.Go(func() {
			if r := e.Do(member("PUT", "fleet", fmt.Sprint("k", n))); r.Status != 200 && r.Status != 404 {
				t.Errorf("status %d: %s", r.Status, r.Raw)
			}
		})
	}
	wg.Go(func() { e.Do(apitest.Request{Method: "DELETE", Path: "/v1/cluster_groups/fleet"}).Want(204) })
	wg.Wait()
	for _, k := range e.Config.Directory.Clusters.All() {
		if len(k.GroupIDs) > 0 {
			t.Errorf("%s is in %v", k.Name, k.GroupIDs)
		}
	}
}

func TestMembershipSurvivesAChangeOfTheCluster(t *testing.T) {
	e := start(t)
	e.Do(postGroup("fleet")).Want(201)
	body := uploaded(t, "k")
	body["groups"] = []string{"fleet"}
	e.Do(post(body)).Want(201)
	var m struct {
		Groups []struct{ Name string } `json:"groups"`
	}
	r := e.Do(patch("k", map[string]any{"jwks": keySet(t, 1)}))
	if err := json.Unmarshal(r.Raw, &m); err != nil || r.Status != 200 || len(m.Groups) != 1 || m.Groups[0].Name != "fleet" {
		t.Errorf("%d %s", r.Status, r.Raw)
	}
}

// grantActions gives an identity some actions on clusters, by a custom role.
func grantActions(t *testing.T, e *apitest.Env, who string, actions ...string) {
	t.Helper()
	role := &access.CustomRole{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, Name: "Custom", DisplayName: "Custom", Service: "containers-kubernetes", Actions: actions,
	}
	d := e.Config.Directory
	err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.CustomRoles.Put(tx, role)
		d.Policies.Put(tx, &access.Policy{
			ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
			Subject: []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(who)}},
			Resource: []access.Attribute{
				{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)},
				{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("containers-kubernetes")},
			},
			Roles: []string{role.CRN()},
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
