package iamidentity_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iamidentity"
	"tabard.dev/tabard/internal/directory"
)

const (
	stranger = "IBMid-STRANGER" // has no rights at all
	viewer   = "IBMid-VIEWER"   // may read, not change
)

type env struct {
	*apitest.Env
}

func start(t testing.TB) env {
	t.Helper()
	e := apitest.New(t)
	iamidentity.Register(e.Mux, e.Config, e.Sealer)
	e.Grant(viewer, "iam-identity", "Viewer")
	return env{e}
}

// object is a JSON object.
type object = map[string]any

func (e env) get(path string) object { return e.Do(apitest.Request{Path: path}).Want(http.StatusOK) }

func (e env) post(path string, body any) object {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "POST", Path: path, Body: body}).Want(http.StatusCreated)
}

func (e env) put(path, ifMatch string, body any) *apitest.Response {
	e.T.Helper()
	r := apitest.Request{Method: "PUT", Path: path, Body: body}
	if ifMatch != "" {
		r.Header = map[string]string{"If-Match": ifMatch}
	}
	return e.Do(r)
}

func (e env) remove(path string) {
	e.T.Helper()
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(http.StatusNoContent)
}

func (e env) profile(name string) object {
	e.T.Helper()
	return e.post("/v1/profiles", object{"name": name, "account_id": e.Owner.AccountID})
}

func (e env) serviceID(name string) object {
	e.T.Helper()
	return e.post("/v1/serviceids", object{"name": name, "account_id": e.Owner.AccountID})
}

func pathOf(o object) string {
	id := text(o, "id")
	switch {
	case strings.HasPrefix(id, "Profile-"):
		return "/v1/profiles/" + id
	case strings.HasPrefix(id, "ServiceId-"):
		return "/v1/serviceids/" + id
	case strings.HasPrefix(id, "ServiceIdGroup-"):
		return "/v1/serviceid_groups/" + id
	}
	return "/v1/apikeys/" + id
}

func (e env) serviceIDGroup(name string) object {
	e.T.Helper()
	return e.post("/v1/serviceid_groups", object{"name": name, "account_id": e.Owner.AccountID})
}

func text(o object, key string) string {
	s, _ := o[key].(string)
	return s
}

func (e env) clusterCRN(account string) string {
	return "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":c123456789abcdefghij::"
}

func (e env) podLink() object {
	return object{"cr_type": "IKS_SA", "link": object{"crn": e.clusterCRN(e.Owner.AccountID), "namespace": "default", "name": "sa"}}
}

var podRule = object{"type": "Profile-CR", "cr_type": "IKS_SA", "conditions": []object{{"claim": "namespace", "operator": "EQUALS", "value": `"default"`}}}

// grantOn gives an identity a role on one resource.
func (e env) grantOn(iamID, resourceType, id, role string) {
	e.T.Helper()
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	d := e.Config.Directory
	err := d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Policies.Put(tx, &access.Policy{
			ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
			Subject: []access.Attribute{equals(access.IAMID, iamID)},
			Resource: []access.Attribute{
				equals(access.ServiceName, "iam-identity"), equals(access.AccountID, e.Owner.AccountID),
				equals(access.ResourceType, resourceType), equals(access.Resource, id),
			},
			Roles: []string{access.PlatformRoleCRN(role)},
		})
		return nil
	})
	if err != nil {
		e.T.Fatal(err)
	}
}

// route is one request of the family on existing objects.
type route struct {
	method, path string
	body         any
	writes       bool
}

// allRoutes returns a valid request for every route, on objects that exist in
// the owner's account. Deletions of parents come last.
func (e env) allRoutes() []route {
	e.T.Helper()
	p, s := e.profile("routes"), e.serviceID("routes")
	key := e.post("/v1/apikeys", object{"name": "routes", "iam_id": s["iam_id"]})
	rule := e.post(pathOf(p)+"/rules", podRule)
	link := e.post(pathOf(p)+"/links", e.podLink())
	user := "IBMid-TRUSTED"
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/identities/user", Body: object{"identifier": user, "type": "user"}}).Want(http.StatusOK)
	values := url.Values{"type": {"IKS_SA"}, "crn": {e.clusterCRN(e.Owner.AccountID)}, "namespace": {"default"}, "name": {"sa"}}
	group := e.serviceIDGroup("routes")
	rules, links, identities := pathOf(p)+"/rules/"+text(rule, "id"), pathOf(p)+"/links/"+text(link, "id"), pathOf(p)+"/identities"
	return []route{
		{"GET", pathOf(p), nil, false},
		{"PUT", pathOf(p), object{"description": "x"}, true},
		{"GET", pathOf(p) + "/rules", nil, false},
		{"POST", pathOf(p) + "/rules", podRule, true},
		{"GET", rules, nil, false},
		{"PUT", rules, podRule, true},
		{"DELETE", rules, nil, true},
		{"GET", pathOf(p) + "/links", nil, false},
		{"POST", pathOf(p) + "/links", object{"cr_type": "VSI", "link": object{"crn": "crn:v1:bluemix:public:is:us-south-1:a/" + e.Owner.AccountID + "::instance:0717_1"}}, true},
		{"GET", links, nil, false},
		{"DELETE", links, nil, true},
		{"DELETE", pathOf(p) + "/links?" + values.Encode(), nil, true},
		{"GET", identities, nil, false},
		{"PUT", identities, object{"identities": []object{{"identifier": "IBMid-EVIL", "type": "user"}, {"identifier": user, "type": "user"}}}, true},
		{"POST", identities + "/user", object{"identifier": "IBMid-EVIL", "type": "user"}, true},
		{"GET", identities + "/user/" + user, nil, false},
		{"DELETE", identities + "/user/" + user, nil, true},
		{"GET", pathOf(group), nil, false},
		{"PUT", pathOf(group), object{"name": "x"}, true},
		{"DELETE", pathOf(group), nil, true},
		{"GET", pathOf(s), nil, false},
		{"PUT", pathOf(s), object{"description": "x"}, true},
		{"POST", pathOf(s) + "/lock", nil, true},
		{"DELETE", pathOf(s) + "/lock", nil, true},
		{"POST", "/v1/apikeys", object{"name": "evil", "iam_id": s["iam_id"]}, true},
		{"GET", pathOf(key), nil, false},
		{"PUT", pathOf(key), object{"description": "x"}, true},
		{"POST", pathOf(key) + "/lock", nil, true},
		{"DELETE", pathOf(key) + "/lock", nil, true},
		{"POST", pathOf(key) + "/disable", nil, true},
		{"DELETE", pathOf(key) + "/disable", nil, true},
		{"POST", pathOf(key) + "/leaked", nil, true},
		{"DELETE", pathOf(key), nil, true},
		{"DELETE", pathOf(s), nil, true},
		{"DELETE", pathOf(p), nil, true},
	}
}

func TestObjectsOfAnotherAccountAreNotFoundByAnyRoute(t *testing.T) {
	e := start(t)
	for _, r := range e.allRoutes() {
		got := e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body, As: e.Other.IAMID, Header: map[string]string{"If-Match": "*"}})
		if got.Status != http.StatusNotFound {
			t.Errorf("%s %s: status %d, want 404: %s", r.method, r.path, got.Status, got.Raw)
		}
	}
	for _, path := range []string{"/v1/profiles", "/v1/serviceids", "/v1/apikeys"} {
		list := e.Do(apitest.Request{Path: path + "?scope=account&account_id=" + e.Other.AccountID, As: e.Other.IAMID}).Raw
		if strings.Contains(string(list), e.Owner.AccountID) {
			t.Errorf("the list %s shows another account: %s", path, list)
		}
	}
}

func TestWithoutAPolicyEveryRouteIsRefusedAndNothingChanges(t *testing.T) {
	e := start(t)
	routes := e.allRoutes()
	d := e.Config.Directory
	count := func() string {
		return fmt.Sprint(d.Profiles.Len(), d.Links.Len(), d.Rules.Len(), d.ServiceIDs.Len(), d.APIKeys.Len(), d.ServiceIDGroups.Len())
	}
	before := count()
	for _, r := range routes {
		got := e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body, As: stranger, Header: map[string]string{"If-Match": "*"}})
		if got.Status != http.StatusForbidden {
			t.Errorf("%s %s as a stranger: status %d, want 403", r.method, r.path, got.Status)
		}
		if !r.writes {
			continue
		}
		got = e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body, As: viewer, Header: map[string]string{"If-Match": "*"}})
		if got.Status != http.StatusForbidden {
			t.Errorf("%s %s as a viewer: status %d, want 403", r.method, r.path, got.Status)
		}
	}
	for _, path := range []string{"/v1/profiles", "/v1/serviceids", "/v1/serviceid_groups"} {
		body := object{"name": "x", "account_id": e.Owner.AccountID}
		e.Do(apitest.Request{Method: "POST", Path: path, Body: body, As: viewer}).Want(http.StatusForbidden)
	}
	if after := count(); after != before {
		t.Fatalf("objects before %s, after %s", before, after)
	}
	for _, p := range d.ProfilesByAccount.Get(e.Owner.AccountID) {
		for _, i := range p.Identities {
			if i.IAMID == "IBMid-EVIL" {
				t.Fatal("a refused caller was added to the identities")
			}
		}
	}
}

func TestTheOwnerMayUseEveryRoute(t *testing.T) {
	e := start(t)
	for _, r := range e.allRoutes() {
		got := e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body, Header: map[string]string{"If-Match": "*"}})
		// Objects that an earlier request of the list removed are gone.
		if got.Status >= 300 && got.Status != http.StatusNotFound || got.Status == http.StatusNotFound && r.method != "DELETE" {
			t.Errorf("%s %s: status %d: %s", r.method, r.path, got.Status, got.Raw)
		}
	}
}

func TestEveryChangeIsRecordedUnderAnEventOfTheReference(t *testing.T) {
	e := start(t)
	known := regexp.MustCompile(`^iam-identity\.(account-profile|account-serviceid|account-serviceid-group|user-apikey|serviceid-apikey)\.(create|update|delete|report-leak)$`)
	for _, r := range e.allRoutes() {
		if !r.writes {
			continue
		}
		got := e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body, Header: map[string]string{"If-Match": "*"}})
		newest := e.Events(1)[0]
		if !known.MatchString(newest.Action) || newest.CorrelationID != got.Header.Get("Transaction-Id") {
			t.Errorf("%s %s: newest event is %s of %s", r.method, r.path, newest.Action, newest.CorrelationID)
		}
		if got.Status < 300 && (newest.Outcome != "success" || newest.Target.ID == "" || len(newest.ResponseData) == 0) {
			t.Errorf("%s %s: event says too little: %+v", r.method, r.path, newest)
		}
	}
}

func TestMalformedBodiesAreRefusedWithTheErrorBodyOfTheAPI(t *testing.T) {
	e := start(t)
	routes := e.allRoutes()
	bodies := []string{
		"", "{", "[]", `"x"`, "null", "0", `{"name":1}`, `{"name":{}}`, `{"name":["x"]}`, `{"name":"\u0000"}`, "{\"name\":\"\xff\"}", `{"name":""} {}`,
		`{"type":"user","identifier":"x","accounts":[1]}`, `{"identities":{}}`, `{"identities":[null]}`, `{"link":"x"}`, `{"link":null,"cr_type":"VSI"}`,
		`{"conditions":[null],"type":"Profile-CR","cr_type":"VSI"}`, `{"conditions":{},"type":"Profile-SAML","realm_name":"r"}`,
		`{"expires_at":0}`, `{"expires_at":"yesterday"}`, `{"store_value":"yes","name":"x","iam_id":"x"}`, `{"profiles":"true"}`,
		`{"serviceids_per_group":"x"}`, `{"group_id":7,"name":"x"}`, `{"support_sessions":1}`, `{"action_when_leaked":"shout"}`, `{"unique_instance_crns":["x"]}`, `{"apikey":"short","name":"x","iam_id":"x"}`,
		`{"description":"` + strings.Repeat("x", 5000) + `"}`, strings.Repeat("[", 20000), `{"name":"` + strings.Repeat("x", 1<<20) + `"}`,
	}
	for _, path := range []string{"/v1/profiles", "/v1/serviceids/", "/v1/apikeys", "/v1/serviceid_groups", "/v1/accounts/" + e.Owner.AccountID + "/limits/identity"} {
		routes = append(routes, route{"POST", path, object{}, true})
	}
	for _, r := range routes {
		if r.body == nil {
			continue
		}
		for _, body := range bodies {
			got := e.Do(apitest.Request{Method: r.method, Path: r.path, Body: body, Header: map[string]string{"If-Match": "*"}})
			if got.Status >= 500 {
				t.Fatalf("%s %s with %.60q: status %d: %s", r.method, r.path, body, got.Status, got.Raw)
			}
			if got.Status < 400 {
				continue // a partial update may well be empty
			}
			var f struct {
				Trace      string `json:"trace"`
				StatusCode int    `json:"status_code"`
				Errors     []struct {
					Code        string `json:"code"`
					MessageCode string `json:"message_code"`
					Message     string `json:"message"`
				} `json:"errors"`
			}
			if err := json.Unmarshal(got.Raw, &f); err != nil {
				t.Fatalf("%s %s with %.60q: %v: %s", r.method, r.path, body, err, got.Raw)
			}
			if f.StatusCode != got.Status || f.Trace != got.Header.Get("Transaction-Id") || len(f.Errors) != 1 ||
				f.Errors[0].Code == "" || f.Errors[0].Message == "" || !regexp.MustCompile(`^BXNIM\d{4}E$`).MatchString(f.Errors[0].MessageCode) {
				t.Fatalf("%s %s with %.60q: error body %s", r.method, r.path, body, got.Raw)
			}
		}
	}
}

func TestRequestsWithoutATokenGetTheErrorBodyOfTheAPI(t *testing.T) {
	e := start(t)
	body := e.Do(apitest.Request{Path: "/v1/profiles", Anonymous: true}).Want(http.StatusUnauthorized)
	entry := body["errors"].([]any)[0].(object)
	if entry["code"] != "invalid_access_token" || entry["message_code"] != "BXNIM0308E" {
		t.Fatal(entry)
	}
}

func TestAnUpdateNeedsACurrentEntityTag(t *testing.T) {
	e := start(t)
	p, s, group := e.profile("p"), e.serviceID("s"), e.serviceIDGroup("g")
	key := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID})
	rule := e.post(pathOf(p)+"/rules", podRule)
	for path, body := range map[string]object{
		pathOf(p): {"description": "x"}, pathOf(s): {"description": "x"}, pathOf(key): {"description": "x"},
		pathOf(p) + "/rules/" + text(rule, "id"): podRule, pathOf(group): {"name": "renamed"},
	} {
		got := e.Do(apitest.Request{Path: path})
		tag := got.Header.Get("ETag")
		if tag == "" || tag != text(got.Want(http.StatusOK), "entity_tag") || !regexp.MustCompile(`^\d+-[0-9a-f]{32}$`).MatchString(tag) {
			t.Errorf("GET %s: ETag %q, body %s", path, tag, got.Raw)
		}
		e.put(path, "", body).Want(http.StatusBadRequest)
		if now := e.put(path, tag, body).Want(http.StatusOK); now["entity_tag"] == tag {
			t.Errorf("PUT %s left the tag as it was", path)
		}
		e.put(path, tag, body).Want(http.StatusConflict)
		e.put(path, `"`+text(e.get(path), "entity_tag")+`"`, body).Want(http.StatusOK)
		e.put(path, "*", body).Want(http.StatusOK)
	}
	for _, path := range []string{"/v1/profiles/InvalidID", "/v1/serviceids/InvalidID", "/v1/apikeys/InvalidID", "/v1/serviceid_groups/InvalidID", pathOf(p) + "/rules/InvalidID"} {
		body := podRule
		if !strings.Contains(path, "rules") {
			body = object{"name": "dummy", "description": "dummy"}
		}
		e.put(path, "dummy", body).Want(http.StatusNotFound)
	}
}

func TestOfWritersWithOneEntityTagOneWins(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	key := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID})
	rule := e.post(pathOf(p)+"/rules", podRule)
	p = e.get(pathOf(p))
	for path, tag := range map[string]string{
		pathOf(p): text(p, "entity_tag"), pathOf(key): text(key, "entity_tag"),
		pathOf(p) + "/rules/" + text(rule, "id"): text(rule, "entity_tag"),
	} {
		e.race(path, tag, func(i int) object { return with(podRule, "description", fmt.Sprint(i)) })
	}
	s, g := e.serviceID("s"), e.serviceIDGroup("g")
	e.race(pathOf(s), text(s, "entity_tag"), func(i int) object { return object{"name": fmt.Sprint(i)} })
	e.race(pathOf(g), text(g, "entity_tag"), func(i int) object { return object{"name": fmt.Sprint(i)} })
}

// race lets many writers change one object with one entity tag at a time.
func (e env) race(path, tag string, body func(int) object) {
	e.T.Helper()
	const writers = 16
	var wg sync.WaitGroup
	statuses := make([]int, writers)
	for i := range writers {
		wg.Go(func() { statuses[i] = e.put(path, tag, body(i)).Status })
	}
	wg.Wait()
	slices.Sort(statuses)
	want := append([]int{http.StatusOK}, slices.Repeat([]int{http.StatusConflict}, writers-1)...)
	if !slices.Equal(statuses, want) {
		e.T.Errorf("%s: %v", path, statuses)
	}
}

func TestOnlyTheCallersAccountCanBeNamed(t *testing.T) {
	e := start(t)
	nobody := strings.Repeat("0", 32)
	for _, path := range []string{"/v1/profiles", "/v1/serviceids"} {
		create := func(account string) *apitest.Response {
			return e.Do(apitest.Request{Method: "POST", Path: path, Body: object{"name": "x", "account_id": account}})
		}
		create("").Want(http.StatusBadRequest)
		create("InvalidID").Want(http.StatusBadRequest)
		foreign, missing := create(e.Other.AccountID), create(nobody)
		foreign.Want(http.StatusForbidden)
		missing.Want(http.StatusForbidden)
		said := func(r *apitest.Response, account string) string {
			s := strings.ReplaceAll(string(r.Raw), account, "ACCOUNT")
			return strings.ReplaceAll(s, r.Header.Get("Transaction-Id"), "TRACE")
		}
		if a, b := said(foreign, e.Other.AccountID), said(missing, nobody); a != b {
			t.Errorf("the answer tells which accounts exist: %s and %s", a, b)
		}
		e.Do(apitest.Request{Path: path}).Want(http.StatusBadRequest)
		e.Do(apitest.Request{Path: path + "?account_id=" + e.Other.AccountID}).Want(http.StatusForbidden)
	}
	e.Do(apitest.Request{Path: "/v1/apikeys?account_id=" + e.Other.AccountID}).Want(http.StatusForbidden)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys", Body: object{"name": "x", "iam_id": e.Owner.IAMID, "account_id": e.Other.AccountID}}).
		Want(http.StatusForbidden)
}

// names returns a list's names, in order.
func names(list object, array string) []string {
	var out []string
	for _, item := range list[array].([]any) {
		out = append(out, text(item.(object), "name"))
	}
	return out
}

// follow returns the path and query of a list's link.
func follow(t *testing.T, e env, list object, link string) string {
	t.Helper()
	path, ok := strings.CutPrefix(text(list, link), e.Config.URL)
	if !ok {
		t.Fatalf("the link %s does not begin with the server's URL: %v", link, list[link])
	}
	return path
}

func TestAListIsPagedForwardsAndBackwards(t *testing.T) {
	e := start(t)
	for _, array := range []string{"profiles", "serviceids"} {
		for _, name := range []string{"c", "a", "e", "b", "d"} {
			e.post("/v1/"+array, object{"name": name, "account_id": e.Owner.AccountID, "description": "of " + name})
		}
		base := "/v1/" + array + "?account_id=" + e.Owner.AccountID
		if got := names(e.get(base), array); strings.Join(got, "") != "caebd" {
			t.Errorf("without sort: %v, want the order of creation", got)
		}
		for query, want := range map[string]string{
			"&sort=name": "abcde", "&sort=name&order=desc": "edcba", "&sort=description": "abcde",
			"&sort=created_at&order=desc": "dbeac", "&sort=modified_at": "caebd", "&name=e": "e", "&name=E": "",
		} {
			if got := names(e.get(base+query), array); strings.Join(got, "") != want {
				t.Errorf("%s %s: %v, want %s", array, query, got, want)
			}
		}

		page := e.get(base + "&sort=name&order=desc&pagesize=2")
		var seen, offsets string
		for {
			seen += strings.Join(names(page, array), "")
			offsets += fmt.Sprint(page["offset"])
			if page["limit"] != 2.0 || page["first"] == nil {
				t.Fatalf("page %v", page)
			}
			if page["next"] == nil {
				break
			}
			page = e.get(follow(t, e, page, "next"))
		}
		if seen != "edcba" || offsets != "024" {
			t.Errorf("%s: pages showed %s at %s", array, seen, offsets)
		}
		page = e.get(follow(t, e, page, "previous"))
		if got := strings.Join(names(page, array), ""); got != "cb" {
			t.Errorf("%s: previous page shows %s", array, got)
		}
		page = e.get(follow(t, e, page, "previous"))
		if got := strings.Join(names(page, array), ""); got != "ed" || page["previous"] != nil {
			t.Errorf("%s: first page shows %s, previous %v", array, got, page["previous"])
		}

		// Clients send the token back alone, or with what they asked for at first.
		u, err := url.Parse(text(page, "next"))
		if err != nil {
			t.Fatal(err)
		}
		token := u.Query().Get("pagetoken")
		for _, query := range []string{"?pagetoken=" + token, "?account_id=" + e.Owner.AccountID + "&pagesize=2&pagetoken=" + token} {
			if got := strings.Join(names(e.get("/v1/"+array+"/"+query), array), ""); got != "cb" {
				t.Errorf("%s%s shows %s", array, query, got)
			}
		}
	}
}

func TestListParametersThatCannotBeHonouredAreRefused(t *testing.T) {
	e := start(t)
	base := "/v1/profiles?account_id=" + e.Owner.AccountID
	for _, query := range []string{
		"&pagesize=0", "&pagesize=101", "&pagesize=x", "&pagetoken=x", "&pagetoken=e30x", "&sort=iam_id", "&order=up",
		"&filter=" + url.QueryEscape(`name eq "x"`), "&filter=" + url.QueryEscape(`hash co "x"`), "&filter=(", "&include_history=perhaps",
	} {
		e.Do(apitest.Request{Path: base + query}).Want(http.StatusBadRequest)
	}
	e.Do(apitest.Request{Path: base + "&include_history=true"}).Want(http.StatusOK)
	for _, query := range []string{"?scope=all", "?type=profile"} {
		e.Do(apitest.Request{Path: "/v1/apikeys" + query}).Want(http.StatusBadRequest)
	}
}

func TestAForgedPageTokenShowsNothingMore(t *testing.T) {
	e := start(t)
	e.profile("mine")
	for forged, want := range map[string]int{
		`{"q":{"account_id":["` + e.Owner.AccountID + `"]}}`: http.StatusForbidden,
		`{"l":1000000}`:              http.StatusOK,
		`{"l":1,"a":"zzz","o":-1}`:   http.StatusBadRequest,
		`{"q":{"sort":["hash"]}}`:    http.StatusBadRequest,
		`{"q":{"order":["upward"]}}`: http.StatusBadRequest,
		`{"q":{"filter":["hash co \"x\""],"account_id":["` + e.Other.AccountID + `"]}}`: http.StatusBadRequest,
		`{"q":{"include_history":["x"],"account_id":["` + e.Other.AccountID + `"]}}`:    http.StatusBadRequest,
		`null`: http.StatusOK,
	} {
		got := e.Do(apitest.Request{Path: "/v1/profiles?pagetoken=" + encode(forged), As: e.Other.IAMID})
		if got.Status != want || strings.Contains(string(got.Raw), "mine") {
			t.Errorf("%s: status %d, want %d: %s", forged, got.Status, want, got.Raw)
		}
	}
}

func TestAListShowsWhatTheCallerMayRead(t *testing.T) {
	e := start(t)
	p, s := e.profile("p1"), e.serviceID("s1")
	e.profile("p2")
	e.serviceID("s2")
	e.grantOn("IBMid-ONE", "profile", text(p, "id"), "Viewer")
	e.grantOn("IBMid-ONE", "serviceid", text(s, "id"), "Viewer")
	for array, want := range map[string]string{"profiles": "p1", "serviceids": "s1"} {
		path := "/v1/" + array + "?account_id=" + e.Owner.AccountID
		if got := names(e.Do(apitest.Request{Path: path, As: "IBMid-ONE"}).Want(http.StatusOK), array); strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", array, got, want)
		}
		if got := names(e.Do(apitest.Request{Path: path, As: stranger}).Want(http.StatusOK), array); len(got) != 0 {
			t.Errorf("%s: a stranger sees %v", array, got)
		}
	}
}

func with(o object, key string, value any) object {
	o = maps.Clone(o)
	if value == nil {
		delete(o, key)
	} else {
		o[key] = value
	}
	return o
}
