package iamidentity_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func TestAProfileHasTheFormThatClientsKnow(t *testing.T) {
	e := start(t)
	got := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/", Body: object{
		"name": "my-trusted-profile", "account_id": e.Owner.AccountID, "description": "My trusted profile", "email": "team@example.org",
	}})
	p := got.Want(http.StatusCreated)
	id := text(p, "id")
	if !regexp.MustCompile(`^Profile-[0-9a-f-]{36}$`).MatchString(id) {
		t.Errorf("id %q", id)
	}
	for key, want := range map[string]any{
		"iam_id": "iam-" + id, "crn": "crn:v1:bluemix:public:iam-identity::a/" + e.Owner.AccountID + "::profile:" + id,
		"name": "my-trusted-profile", "description": "My trusted profile", "email": "team@example.org",
		"account_id": e.Owner.AccountID, "entity_tag": got.Header.Get("ETag"),
	} {
		if p[key] != want {
			t.Errorf("%s is %v, want %v", key, p[key], want)
		}
	}
	minute := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d\+0000$`)
	if !minute.MatchString(text(p, "created_at")) || !minute.MatchString(text(p, "modified_at")) {
		t.Errorf("times %v and %v", p["created_at"], p["modified_at"])
	}
	if again := e.get("/v1/profiles/" + id); fmt.Sprint(again) != fmt.Sprint(p) {
		t.Errorf("read %v, created %v", again, p)
	}
	e.Do(apitest.Request{Path: "/v1/profiles/?account_id=" + e.Owner.AccountID}).Want(http.StatusOK)
	e.Do(apitest.Request{Path: "/v1/profiles/" + id + "?include_activity=true"}).Want(http.StatusOK)

	event := e.Events(1)[0]
	if event.Action != "iam-identity.account-profile.create" || event.Target.ID != p["crn"] || event.Target.Name != "my-trusted-profile" ||
		event.Message != "IAM Identity Service: create account-profile my-trusted-profile" || event.Initiator.ID != e.Owner.IAMID {
		t.Errorf("event %+v", event)
	}
}

func TestAProfilesNameIsUniqueInItsAccountOnly(t *testing.T) {
	e := start(t)
	e.profile("one")
	two := e.profile("two")
	e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", Body: object{"name": "one", "account_id": e.Owner.AccountID}}).Want(http.StatusConflict)
	e.put(pathOf(two), "*", object{"name": "one"}).Want(http.StatusConflict)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", As: e.Other.IAMID, Body: object{"name": "one", "account_id": e.Other.AccountID}}).
		Want(http.StatusCreated)
	e.put(pathOf(two), "*", object{"name": "two"}).Want(http.StatusOK)
}

func TestAnUpdateKeepsWhatItDoesNotName(t *testing.T) {
	e := start(t)
	p := e.post("/v1/profiles", object{"name": "n", "account_id": e.Owner.AccountID, "description": "d", "email": "e@example.org"})
	q := e.put(pathOf(p), "*", object{"description": "new", "account_id": e.Other.AccountID, "id": "Profile-x", "iam_id": "x"}).Want(http.StatusOK)
	if q["name"] != "n" || q["description"] != "new" || q["email"] != "e@example.org" || q["id"] != p["id"] || q["account_id"] != e.Owner.AccountID {
		t.Errorf("after a change of the description: %v", q)
	}
	q = e.put(pathOf(p), "*", object{"description": "", "email": ""}).Want(http.StatusOK)
	if q["description"] != nil || q["email"] != nil || q["name"] != "n" {
		t.Errorf("after clearing: %v", q)
	}
	for _, name := range []string{"", "  ", "a\x00b", "a\nb", strings.Repeat("n", 251)} {
		e.put(pathOf(p), "*", object{"name": name}).Want(http.StatusBadRequest)
	}
	for _, body := range []object{{"account_id": e.Owner.AccountID}, {"account_id": e.Owner.AccountID, "name": nil}} {
		e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", Body: body}).Want(http.StatusBadRequest)
	}
}

func TestAProfileTakesAllThatHangsOnItAlong(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	p, other := e.profile("gone"), e.profile("stays")
	for _, o := range []object{p, other} {
		e.post(pathOf(o)+"/links", e.podLink())
		e.post(pathOf(o)+"/rules", podRule)
		e.Grant(text(o, "iam_id"), "is", "Operator")
	}
	group := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: "g", Members: []access.Member{
		{IAMID: text(p, "iam_id"), Type: "profile"}, {IAMID: text(other, "iam_id"), Type: "profile"},
	}}
	must(t, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { d.Groups.Put(tx, group); return nil }))

	e.remove(pathOf(p))
	event := e.Events(1)[0]
	e.Do(apitest.Request{Path: pathOf(p)}).Want(http.StatusNotFound)
	e.Do(apitest.Request{Method: "DELETE", Path: pathOf(p)}).Want(http.StatusNotFound)
	for o, want := range map[string]int{text(p, "id"): 0, text(other, "id"): 1} {
		links, rules := d.LinksByProfile.Len(o), d.RulesByProfile.Len(o)
		policies := d.PoliciesOfSubject.Len(directory.Key(e.Owner.AccountID, "iam-"+o))
		groups := len(d.StaticGroupsOf(e.Owner.AccountID, "iam-"+o))
		if links != want || rules != want || policies != want || groups != want {
			t.Errorf("%s has %d links, %d rules, %d policies, %d groups; want %d of each", o, links, rules, policies, groups, want)
		}
	}
	for _, part := range []string{"deleted_links", "deleted_rules", "deleted_policies", "left_access_groups", group.ID} {
		if !strings.Contains(string(event.ResponseData), part) {
			t.Errorf("the event does not tell %s: %s", part, event.ResponseData)
		}
	}
	if event.Severity != "critical" {
		t.Errorf("severity %s", event.Severity)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestARuleHasTheFormThatClientsKnow(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	body := with(with(podRule, "name", "pods"), "expiration", 43200)
	body = with(body, "realm_name", "https://realm.example")
	got := e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/rules", Body: body})
	rule := got.Want(http.StatusCreated)
	if !strings.HasPrefix(text(rule, "id"), "ClaimRule-") || rule["expiration"] != 0.0 || rule["realm_name"] != nil || rule["cr_type"] != "IKS_SA" ||
		rule["entity_tag"] != got.Header.Get("ETag") || rule["created_at"] == nil {
		t.Errorf("rule %v", rule)
	}
	cond := rule["conditions"].([]any)[0].(object)
	if cond["claim"] != "namespace" || cond["operator"] != "EQUALS" || cond["value"] != `"default"` {
		t.Errorf("condition %v", cond)
	}
	saml := e.post(pathOf(p)+"/rules", object{"type": "Profile-SAML", "realm_name": "https://sdk.test.realm/1234", "expiration": 43200, "conditions": podRule["conditions"]})
	if saml["expiration"] != 43200.0 || saml["realm_name"] != "https://sdk.test.realm/1234" || saml["cr_type"] != nil {
		t.Errorf("SAML rule %v", saml)
	}
	list := e.get(pathOf(p) + "/rules")["rules"].([]any)
	if len(list) != 2 || text(list[0].(object), "id") != rule["id"] {
		t.Errorf("list %v", list)
	}
	event := e.Events(1)[0]
	if event.Action != "iam-identity.account-profile.update" || event.Target.ID != p["crn"] || !strings.Contains(string(event.ResponseData), text(saml, "id")) {
		t.Errorf("event %+v with %s", event, event.ResponseData)
	}
	changed := with(podRule, "cr_type", "ROKS_SA")
	now := e.put(pathOf(p)+"/rules/"+text(rule, "id"), text(rule, "entity_tag"), changed).Want(http.StatusOK)
	if now["cr_type"] != "ROKS_SA" || now["name"] != nil || now["id"] != rule["id"] {
		t.Errorf("a full body replaces the rule: %v", now)
	}
	e.remove(pathOf(p) + "/rules/" + text(rule, "id"))
	e.Do(apitest.Request{Path: pathOf(p) + "/rules/" + text(rule, "id")}).Want(http.StatusNotFound)
}

func TestARuleThatIsNotWellFormedIsRefusedBeforeTheProfileIsLookedUp(t *testing.T) {
	e := start(t)
	condition := func(claim, operator, value any) object {
		return with(podRule, "conditions", []object{{"claim": claim, "operator": operator, "value": value}})
	}
	for name, body := range map[string]object{
		"no type":               with(podRule, "type", nil),
		"empty type":            with(with(podRule, "type", ""), "realm_name", ""),
		"unknown type":          with(podRule, "type", "Profile-OIDC"),
		"CR without cr_type":    with(podRule, "cr_type", nil),
		"unknown cr_type":       with(podRule, "cr_type", "POD"),
		"SAML without realm":    with(podRule, "type", "Profile-SAML"),
		"no conditions":         with(podRule, "conditions", nil),
		"empty conditions":      with(podRule, "conditions", []object{}),
		"too many conditions":   with(podRule, "conditions", make([]object, 51)),
		"no claim":              condition("", "EQUALS", `"x"`),
		"unknown operator":      condition("namespace", "MATCHES", `"x"`),
		"lower-case operator":   condition("namespace", "equals", `"x"`),
		"no value":              condition("namespace", "EQUALS", ""),
		"object value":          condition("namespace", "EQUALS", `{"a":1}`),
		"null value":            condition("namespace", "EQUALS", `null`),
		"list without IN":       condition("namespace", "EQUALS", `["a","b"]`),
		"empty list":            condition("namespace", "IN", `[]`),
		"list of lists":         condition("namespace", "IN", `[["a"]]`),
		"value that is no text": condition("namespace", "EQUALS", 5),
	} {
		for _, r := range []apitest.Request{
			{Method: "POST", Path: "/v1/profiles/InvalidID/rules", Body: body},
			{Method: "PUT", Path: "/v1/profiles/InvalidID/rules/InvalidID", Body: body, Header: map[string]string{"If-Match": "dummy"}},
		} {
			if got := e.Do(r); got.Status != http.StatusBadRequest {
				t.Errorf("%s, %s: status %d: %s", name, r.Method, got.Status, got.Raw)
			}
		}
	}
	p := e.profile("p")
	for name, body := range map[string]object{
		"bare text":     condition("vpc_id", "EQUALS", "r006-1234"),
		"IN with list":  condition("namespace", "IN", `["a","b"]`),
		"number":        condition("namespace", "NOT_EQUALS", "5"),
		"unknown claim": condition("blueGroups", "CONTAINS", `"x"`),
	} {
		if got := e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/rules", Body: body}); got.Status != http.StatusCreated {
			t.Errorf("%s: status %d: %s", name, got.Status, got.Raw)
		}
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/InvalidID/rules", Body: podRule}).Want(http.StatusNotFound)
	for _, method := range []string{"GET", "DELETE"} {
		e.Do(apitest.Request{Method: method, Path: "/v1/profiles/InvalidID/rules/InvalidID"}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: method, Path: "/v1/profiles/invalidId/links/invalidId"}).Want(http.StatusNotFound)
	}
}

func TestAProfileHasAtMostTwentyRules(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	for range identity.MaxRulesPerProfile {
		e.post(pathOf(p)+"/rules", podRule)
	}
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/rules", Body: podRule}).Want(http.StatusConflict)
	if n := e.Config.Directory.RulesByProfile.Len(text(p, "id")); n != identity.MaxRulesPerProfile {
		t.Errorf("%d rules", n)
	}
}

func TestARuleOrLinkIsFoundUnderItsOwnProfileOnly(t *testing.T) {
	e := start(t)
	p, other := e.profile("p"), e.profile("other")
	rule, link := e.post(pathOf(p)+"/rules", podRule), e.post(pathOf(p)+"/links", e.podLink())
	for _, part := range []string{"/rules/" + text(rule, "id"), "/links/" + text(link, "id")} {
		e.Do(apitest.Request{Path: pathOf(other) + part}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: "DELETE", Path: pathOf(other) + part}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Path: pathOf(p) + part}).Want(http.StatusOK)
	}
}

func TestALinkHasTheFormThatClientsKnow(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	crn := "crn:v1:staging:public:iam-identity::a/" + e.Owner.AccountID + "::computeresource:Fake-Compute-Resource"
	got := e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: object{
		"name": "niceLink", "cr_type": "ROKS_SA", "link": object{"crn": crn, "namespace": "default", "name": "nice name"},
	}})
	link := got.Want(http.StatusCreated)
	inner := link["link"].(object)
	if link["name"] != "niceLink" || link["cr_type"] != "ROKS_SA" || inner["crn"] != crn || inner["namespace"] != "default" || inner["name"] != "nice name" ||
		link["entity_tag"] != got.Header.Get("ETag") || link["created_at"] == nil || link["modified_at"] == nil || text(link, "id") == "" {
		t.Errorf("link %v", link)
	}
	if again := e.get(pathOf(p) + "/links/" + text(link, "id")); fmt.Sprint(again) != fmt.Sprint(link) {
		t.Errorf("read %v", again)
	}
	if list := e.get(pathOf(p) + "/links")["links"].([]any); len(list) != 1 {
		t.Errorf("list %v", list)
	}
	event := e.Events(1)[0]
	if event.Action != "iam-identity.account-profile.update" || !strings.Contains(string(event.ResponseData), text(link, "id")) ||
		!strings.Contains(string(event.ResponseData), "nice name") {
		t.Errorf("event %s with %s", event.Action, event.ResponseData)
	}
	e.remove(pathOf(p) + "/links/" + text(link, "id"))
	if n := e.Config.Directory.LinksByProfile.Len(text(p, "id")); n != 0 {
		t.Errorf("%d links are left", n)
	}
}

func TestALinkThatNamesNoSingleResourceIsRefusedBeforeTheProfileIsLookedUp(t *testing.T) {
	e := start(t)
	cluster := e.clusterCRN(e.Owner.AccountID)
	instance := "crn:v1:bluemix:public:is:us-south-1:a/" + e.Owner.AccountID + "::instance:0717_1"
	for name, body := range map[string]object{
		"unknown cr_type":         {"cr_type": "dummy", "link": object{"crn": cluster, "namespace": "default", "name": "sa"}},
		"no cr_type":              {"link": object{"crn": cluster, "namespace": "default", "name": "sa"}},
		"no link":                 {"cr_type": "VSI"},
		"no crn":                  {"cr_type": "IKS_SA", "link": object{"namespace": "default", "name": "sa"}},
		"crn that is none":        {"cr_type": "VSI", "link": object{"crn": "crn:v1:x"}},
		"no namespace":            {"cr_type": "IKS_SA", "link": object{"crn": cluster, "name": "sa"}},
		"no service account":      {"cr_type": "ROKS_SA", "link": object{"crn": cluster, "namespace": "default"}},
		"blank namespace":         {"cr_type": "ROKS_SA", "link": object{"crn": cluster, "namespace": " ", "name": "sa"}},
		"CE without component":    {"cr_type": "CE", "link": object{"crn": cluster}},
		"CE without its name":     {"cr_type": "CE", "link": object{"crn": cluster, "component_type": "job"}},
		"VSI with a namespace":    {"cr_type": "VSI", "link": object{"crn": instance, "namespace": "default"}},
		"pod with a component":    {"cr_type": "IKS_SA", "link": object{"crn": cluster, "namespace": "default", "name": "sa", "component_type": "job"}},
		"separator in the values": {"cr_type": "IKS_SA", "link": object{"crn": cluster, "namespace": "a\x00b", "name": "sa"}},
	} {
		if got := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/invalidId/links", Body: body}); got.Status != http.StatusBadRequest {
			t.Errorf("%s: status %d: %s", name, got.Status, got.Raw)
		}
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/invalidId/links", Body: e.podLink()}).Want(http.StatusNotFound)
}

func TestALinkIntoAnotherAccountMustSaySo(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	body := object{"cr_type": "IKS_SA", "link": object{"crn": e.clusterCRN(e.Other.AccountID), "namespace": "default", "name": "sa"}}
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: body}).Want(http.StatusBadRequest)
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: object{
		"cr_type": "VSI", "link": object{"crn": "crn:v1:bluemix:public:is:us-south-1:::instance:1"},
	}}).Want(http.StatusBadRequest)
	link := e.post(pathOf(p)+"/links", with(body, "is_cross_account", true))
	if link["is_cross_account"] != true {
		t.Error(link)
	}
}

func TestASecondLinkToTheSameResourceIsAConflict(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	e.post(pathOf(p)+"/links", e.podLink())
	body := e.podLink()
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: with(body, "name", "again")}).Want(http.StatusConflict)
	inner := body["link"].(object)
	staging := strings.Replace(text(inner, "crn"), "bluemix", "staging", 1)
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: with(body, "link", with(inner, "crn", staging))}).Want(http.StatusConflict)
	e.post(pathOf(p)+"/links", with(body, "link", with(inner, "name", "another")))
	e.post(pathOf(p)+"/links", with(body, "cr_type", "ROKS_SA"))
	e.post(pathOf(e.profile("q"))+"/links", body)
}

func TestALinkCanBeDeletedByWhatItSays(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	crn := "crn:v1:bluemix:public:codeengine:us-south:a/" + e.Owner.AccountID + ":4321::"
	e.post(pathOf(p)+"/links", object{"cr_type": "CE", "link": object{"crn": crn, "component_type": "job", "component_name": "nightly"}})
	e.post(pathOf(p)+"/links", e.podLink())
	remove := func(pairs ...string) *apitest.Response {
		q := url.Values{}
		for i := 0; i < len(pairs); i += 2 {
			q.Set(pairs[i], pairs[i+1])
		}
		return e.Do(apitest.Request{Method: "DELETE", Path: pathOf(p) + "/links?" + q.Encode()})
	}
	remove().Want(http.StatusBadRequest)
	remove("type", "CE").Want(http.StatusBadRequest)
	remove("type", "dummy", "crn", crn).Want(http.StatusBadRequest)
	remove("type", "CE", "crn", crn, "component_type", "job", "component_name", "hourly").Want(http.StatusNotFound)
	remove("type", "IKS_SA", "crn", e.clusterCRN(e.Owner.AccountID), "namespace", "default", "name", "other").Want(http.StatusNotFound)
	remove("type", "CE", "crn", crn, "component_type", "job", "component_name", "nightly").Want(http.StatusNoContent)
	remove("type", "IKS_SA", "crn", e.clusterCRN(e.Owner.AccountID), "namespace", "default", "name", "sa").Want(http.StatusNoContent)
	if n := e.Config.Directory.LinksByProfile.Len(text(p, "id")); n != 0 {
		t.Errorf("%d links are left", n)
	}
}

func TestAProfileHasABoundedNumberOfLinks(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	d := e.Config.Directory
	must(t, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		for i := range identity.MaxLinksPerProfile {
			d.Links.Put(tx, &identity.Link{
				ID: fmt.Sprintf("Link-%d", i), ProfileID: text(p, "id"), AccountID: e.Owner.AccountID, CRType: identity.IKSSA,
				CRN: e.clusterCRN(e.Owner.AccountID), Namespace: "default", ServiceAccount: fmt.Sprintf("sa-%d", i),
			})
		}
		return nil
	}))
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: e.podLink()}).Want(http.StatusConflict)
}

func TestEditorMayLinkWhatTheViewerMayNot(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	e.Grant("IBMid-EDITOR", "iam-identity", "Editor")
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: e.podLink(), As: viewer}).Want(http.StatusForbidden)
	e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/links", Body: e.podLink(), As: "IBMid-EDITOR"}).Want(http.StatusCreated)
	e.Do(apitest.Request{Method: "DELETE", Path: pathOf(p), As: "IBMid-EDITOR"}).Want(http.StatusForbidden)
}

func TestLinksOfADeletedResourceGoWithItInEveryAccount(t *testing.T) {
	e := start(t)
	instance := "crn:v1:bluemix:public:is:us-south-1:a/" + e.Owner.AccountID + "::instance:0717_1"
	mine := e.profile("mine")
	e.post(pathOf(mine)+"/links", object{"cr_type": "VSI", "link": object{"crn": strings.Replace(instance, "bluemix", "staging", 1)}})
	e.post(pathOf(mine)+"/links", object{"cr_type": "VSI", "link": object{"crn": instance + "2"}})
	theirs := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", As: e.Other.IAMID, Body: object{"name": "p", "account_id": e.Other.AccountID}}).Want(http.StatusCreated)
	e.Do(apitest.Request{
		Method: "POST", Path: pathOf(theirs) + "/links", As: e.Other.IAMID,
		Body: object{"cr_type": "VSI", "is_cross_account": true, "link": object{"crn": instance}},
	}).Want(http.StatusCreated)

	d := e.Config.Directory
	var ids []string
	must(t, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		ids = d.DeleteLinksOf(tx, instance)
		return nil
	}))
	if len(ids) != 1 || d.LinksByProfile.Len(text(mine, "id")) != 1 || d.LinksByProfile.Len(text(theirs, "id")) != 0 {
		t.Errorf("deleted %v; %d and %d links are left", ids, d.LinksByProfile.Len(text(mine, "id")), d.LinksByProfile.Len(text(theirs, "id")))
	}
}

func TestIdentitiesAreReplacedAddedAndRemoved(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	s := e.post("/v1/serviceids", object{"name": "s", "account_id": e.Owner.AccountID, "description": "of the service ID"})
	path := pathOf(p) + "/identities"
	vm := "crn:v1:bluemix:public:is:us-south-1:a/" + e.Owner.AccountID + "::instance:0717_1"

	if list := e.get(path); list["entity_tag"] == nil || len(list["identities"].([]any)) != 0 {
		t.Errorf("before: %v", list)
	}
	e.put(path, "", object{"identities": []object{}}).Want(http.StatusBadRequest)
	e.put(path, "*", object{}).Want(http.StatusBadRequest)
	set := e.put(path, "*", object{"identities": []object{
		{"identifier": e.Owner.IAMID, "type": "user", "accounts": []string{e.Owner.AccountID}, "description": "Identity description"},
		{"identifier": s["id"], "type": "serviceid"},
		{"identifier": vm, "type": "crn"},
	}}).Want(http.StatusOK)
	want := `[map[accounts:[` + e.Owner.AccountID + `] description:Identity description iam_id:` + e.Owner.IAMID + ` identifier:` + e.Owner.IAMID + ` type:user]` +
		` map[description:of the service ID iam_id:iam-` + text(s, "id") + ` identifier:` + text(s, "id") + ` type:serviceid]` +
		` map[iam_id:crn-` + vm + ` identifier:` + vm + ` type:crn]]`
	if got := fmt.Sprint(set["identities"]); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if fmt.Sprint(e.get(path)) != fmt.Sprint(set) {
		t.Errorf("read %v", e.get(path))
	}
	if !strings.Contains(string(e.Events(1)[0].ResponseData), vm) {
		t.Errorf("the event does not tell the identities: %s", e.Events(1)[0].ResponseData)
	}
	e.put(path, text(p, "entity_tag"), object{"identities": []object{}}).Want(http.StatusConflict)

	one := e.Do(apitest.Request{Method: "POST", Path: path + "/user", Body: object{"identifier": "IBMid-MEMBER", "type": "user", "accounts": []string{e.Owner.AccountID}}}).Want(http.StatusOK)
	if one["iam_id"] != "IBMid-MEMBER" {
		t.Error(one)
	}
	e.Do(apitest.Request{Method: "POST", Path: path + "/user", Body: object{"identifier": "IBMid-MEMBER", "type": "user", "description": "again"}}).Want(http.StatusOK)
	if got := e.get(path + "/user/IBMid-MEMBER"); got["description"] != "again" || got["accounts"] != nil {
		t.Errorf("adding twice sets: %v", got)
	}
	if n := len(e.get(path)["identities"].([]any)); n != 4 {
		t.Errorf("%d identities", n)
	}

	// Published clients escape the slash of a CRN; others do not.
	for _, form := range []string{strings.ReplaceAll(vm, "/", "%2F"), url.PathEscape(vm), vm} {
		if got := e.get(path + "/crn/" + form); got["identifier"] != vm {
			t.Errorf("GET %s: %v", form, got)
		}
	}
	e.get(path + "/serviceid/" + text(s, "iam_id"))
	e.remove(path + "/crn/" + strings.ReplaceAll(vm, "/", "%2F"))
	e.remove(path + "/user/IBMid-MEMBER")
	e.remove(path + "/serviceid/" + text(s, "id"))
	for _, gone := range []string{"/user/IBMid-MEMBER", "/crn/" + url.PathEscape(vm), "/serviceid/" + text(s, "id"), "/group/x", "/user/"} {
		e.Do(apitest.Request{Path: path + gone}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: "DELETE", Path: path + gone}).Want(http.StatusNotFound)
	}
	if n := len(e.get(path)["identities"].([]any)); n != 1 {
		t.Errorf("%d identities are left", n)
	}
}

func TestAnIdentityOfAnotherTypeThanItSaysIsRefused(t *testing.T) {
	e := start(t)
	p := e.profile("p")
	path := pathOf(p) + "/identities"
	service := "ServiceId-" + uuid.NewString()
	for name, body := range map[string]object{
		"no type":                {"identifier": "IBMid-X"},
		"unknown type":           {"identifier": "IBMid-X", "type": "group"},
		"no identifier":          {"type": "user"},
		"service ID as user":     {"identifier": "iam-" + service, "type": "user"},
		"profile as user":        {"identifier": p["iam_id"], "type": "user"},
		"CRN as user":            {"identifier": "crn-crn:v1:bluemix:public:is::a/x::instance:1", "type": "user"},
		"realm iam as user":      {"identifier": "iam-x", "type": "user"},
		"blank in user":          {"identifier": "IBMid-X Y", "type": "user"},
		"user as service ID":     {"identifier": "IBMid-X", "type": "serviceid"},
		"profile as service ID":  {"identifier": p["id"], "type": "serviceid"},
		"text as CRN":            {"identifier": "instance", "type": "crn"},
		"account that is none":   {"identifier": "IBMid-X", "type": "user", "accounts": []string{"x"}},
		"accounts of service ID": {"identifier": service, "type": "serviceid", "accounts": []string{e.Owner.AccountID}},
	} {
		typ := text(body, "type")
		if typ == "" {
			typ = "user"
		}
		if got := e.Do(apitest.Request{Method: "POST", Path: path + "/" + typ, Body: body}); got.Status != http.StatusBadRequest {
			t.Errorf("%s, POST: status %d: %s", name, got.Status, got.Raw)
		}
		if got := e.put(path, "*", object{"identities": []object{body}}); got.Status != http.StatusBadRequest {
			t.Errorf("%s, PUT: status %d: %s", name, got.Status, got.Raw)
		}
	}
	e.Do(apitest.Request{Method: "POST", Path: path + "/crn", Body: object{"identifier": "IBMid-X", "type": "user"}}).Want(http.StatusBadRequest)
	twice := object{"identifier": "IBMid-X", "type": "user"}
	e.put(path, "*", object{"identities": []object{twice, twice}}).Want(http.StatusBadRequest)
	many := make([]object, 501)
	for i := range many {
		many[i] = object{"identifier": fmt.Sprintf("IBMid-%d", i), "type": "user"}
	}
	e.put(path, "*", object{"identities": many}).Want(http.StatusBadRequest)
	e.put(path, "*", object{"identities": many[:500]}).Want(http.StatusOK)
	e.Do(apitest.Request{Method: "POST", Path: path + "/user", Body: many[500]}).Want(http.StatusConflict)
}

func TestTheDescriptionOfAForeignServiceIDIsNotShown(t *testing.T) {
	e := start(t)
	foreign := e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", As: e.Other.IAMID, Body: object{
		"name": "s", "account_id": e.Other.AccountID, "description": "their secret plans",
	}}).Want(http.StatusCreated)
	p := e.profile("p")
	got := e.Do(apitest.Request{Method: "POST", Path: pathOf(p) + "/identities/serviceid", Body: object{"identifier": foreign["id"], "type": "serviceid"}}).Want(http.StatusOK)
	if raw, _ := json.Marshal(got); strings.Contains(string(raw), "secret") {
		t.Error(got)
	}
}
