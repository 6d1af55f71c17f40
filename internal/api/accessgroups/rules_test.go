package accessgroups_test

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
)

func ruleBody() obj {
	return obj{
		"name": "Managers", "expiration": 12, "realm_name": "https://idp.example.org/saml",
		"conditions": []obj{{"claim": "role", "operator": "EQUALS", "value": `"Manager"`}},
	}
}

func with(body obj, key string, value any) obj {
	body[key] = value
	return body
}

func addRule(e *apitest.Env, group string) (id, etag string) {
	e.T.Helper()
	r := e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + group + "/rules", Body: ruleBody()})
	return r.Want(201)["id"].(string), r.Header.Get("ETag")
}

// login gives a federated user what a login by the rules would.
func login(e *apitest.Env, iamID string, hours int, rules ...string) {
	e.T.Helper()
	d := e.Config.Directory
	m := &access.Membership{AccountID: e.Owner.AccountID, IAMID: iamID}
	now := time.Now()
	for _, id := range rules {
		r, ok := d.GroupRules.Get(id)
		if !ok {
			e.T.Fatalf("no rule %s", id)
		}
		m.Groups = append(m.Groups, access.DynamicMember{
			GroupID: r.GroupID, RuleID: r.ID, Revision: r.Revision, Since: now, Until: now.Add(time.Duration(hours) * time.Hour),
		})
	}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Memberships.Put(tx, m) })
}

func TestRuleCanBeCreatedReadListedReplacedAndDeleted(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	path := "/v2/groups/" + group + "/rules"
	made := e.Do(apitest.Request{Method: "POST", Path: path, Body: ruleBody()})
	rule := made.Want(201)
	id := rule["id"].(string)
	if !strings.HasPrefix(id, "ClaimRule-") || rule["access_group_id"] != group || rule["account_id"] != e.Owner.AccountID ||
		rule["expiration"] != 12.0 || rule["realm_name"] != "https://idp.example.org/saml" || rule["created_by_id"] != e.Owner.IAMID {
		t.Errorf("created %v", rule)
	}
	cond := rule["conditions"].([]any)[0].(obj)
	if cond["claim"] != "role" || cond["operator"] != "EQUALS" || cond["value"] != `"Manager"` {
		t.Errorf("condition %v", cond)
	}
	got := e.Do(apitest.Request{Path: path + "/" + id})
	if got.Want(200)["name"] != "Managers" || got.Header.Get("ETag") != made.Header.Get("ETag") {
		t.Errorf("read %s with tag %s", got.Raw, got.Header.Get("ETag"))
	}
	if list := e.Do(apitest.Request{Path: path}).Want(200)["rules"].([]any); len(list) != 1 || list[0].(obj)["id"] != id {
		t.Errorf("listed %v", list)
	}
	put := func(tag string, body any) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: path + "/" + id, Body: body, Header: map[string]string{"If-Match": tag}})
	}
	next := ruleBody()
	delete(next, "name")
	changed := put(got.Header.Get("ETag"), with(next, "expiration", 24))
	if body := changed.Want(200); body["expiration"] != 24.0 || body["name"] != "Managers" {
		t.Errorf("replaced %v; a replacement without a name keeps the name", body)
	}
	if code(put(got.Header.Get("ETag"), ruleBody()).Want(412)) != "conflict" {
		t.Error("a stale tag was not a conflict")
	}
	e.Do(apitest.Request{Method: "PUT", Path: path + "/" + id, Body: ruleBody()}).Want(400)
	e.Do(apitest.Request{Method: "DELETE", Path: path + "/" + id, Header: map[string]string{"If-Match": got.Header.Get("ETag")}}).Want(412)
	e.Do(apitest.Request{Method: "DELETE", Path: path + "/" + id}).Want(204)
	e.Do(apitest.Request{Path: path + "/" + id}).Want(404)
	put("*", ruleBody()).Want(404)
	e.Do(apitest.Request{Method: "DELETE", Path: path + "/" + id}).Want(404)
}

func TestRuleEventsTellWhatTheRuleSaid(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	id, tag := addRule(e, group)
	path := "/v2/groups/" + group + "/rules/" + id
	e.Do(apitest.Request{Method: "PUT", Path: path, Body: with(ruleBody(), "expiration", 3), Header: map[string]string{"If-Match": tag}}).Want(200)
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(204)
	events := e.Events(3)
	for i, want := range []string{"delete", "update", "create"} {
		got := events[i]
		var data map[string]map[string]any
		if err := json.Unmarshal(got.ResponseData, &data); err != nil {
			t.Fatal(err)
		}
		if got.Action != "iam-groups.rule."+want || got.Target.TypeURI != "iam-groups/rule" || data["rule"]["id"] != id {
			t.Errorf("event %d is %s %s %s", i, got.Action, got.Target.TypeURI, got.ResponseData)
		}
		if want == "update" && (data["rule"]["expiration"] != 3.0 || data["previous"]["expiration"] != 12.0) {
			t.Errorf("update told %s", got.ResponseData)
		}
	}
}

func TestBadRulesAreRefusedWith400(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	id, _ := addRule(e, group)
	condition := func(key string, value any) obj {
		return with(ruleBody(), "conditions", []obj{with(obj{"claim": "role", "operator": "EQUALS", "value": `"x"`}, key, value)})
	}
	many := make([]obj, 51)
	for i := range many {
		many[i] = obj{"claim": "c", "operator": "EQUALS", "value": "1"}
	}
	for name, body := range map[string]any{
		"no expiration":       with(ruleBody(), "expiration", nil),
		"expiration 0":        with(ruleBody(), "expiration", 0),
		"expiration 25":       with(ruleBody(), "expiration", 25),
		"expiration -1":       with(ruleBody(), "expiration", -1),
		"half an hour":        with(ruleBody(), "expiration", 0.5),
		"expiration in text":  with(ruleBody(), "expiration", "12"),
		"no realm":            with(ruleBody(), "realm_name", ""),
		"blank realm":         with(ruleBody(), "realm_name", " "),
		"long realm":          with(ruleBody(), "realm_name", strings.Repeat("r", 1001)),
		"control in realm":    with(ruleBody(), "realm_name", "a\nb"),
		"long name":           with(ruleBody(), "name", strings.Repeat("n", 101)),
		"name of wrong type":  with(ruleBody(), "name", []string{}),
		"no conditions":       with(ruleBody(), "conditions", []obj{}),
		"null conditions":     with(ruleBody(), "conditions", nil),
		"null condition":      with(ruleBody(), "conditions", []any{nil}),
		"conditions as text":  with(ruleBody(), "conditions", "role = x"),
		"too many conditions": with(ruleBody(), "conditions", many),
		"no claim":            condition("claim", ""),
		"long claim":          condition("claim", strings.Repeat("c", 251)),
		"control in claim":    condition("claim", "a\x00"),
		"unknown operator":    condition("operator", "LIKE"),
		"small operator":      condition("operator", "equals"),
		"no value":            condition("value", ""),
		"long value":          condition("value", strings.Repeat("v", 4001)),
		"value an object":     condition("value", "{}"),
		"value null":          condition("value", "null"),
		"list for EQUALS":     condition("value", `["a"]`),
		"value of wrong type": condition("value", 1),
		"array":               "[]",
		"text":                `"rule"`,
		"null":                "null",
		"empty":               "",
		"doubled field":       `{"expiration":1,"Expiration":2,"realm_name":"r","conditions":[]}`,
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []apitest.Request{
				{Method: "POST", Path: "/v2/groups/" + group + "/rules"},
				{Method: "PUT", Path: "/v2/groups/" + group + "/rules/" + id, Header: map[string]string{"If-Match": "*"}},
			} {
				r.Body = body
				if got := code(e.Do(r).Want(400)); got != "invalid_body" {
					t.Errorf("code %v", got)
				}
			}
		})
	}
}

func TestRuleTakesEveryOperatorAndJSONValue(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	path := "/v2/groups/" + group + "/rules"
	for _, c := range []obj{
		{"operator": "EQUALS", "value": "1"},
		{"operator": "NOT_EQUALS", "value": "true"},
		{"operator": "EQUALS_IGNORE_CASE", "value": `"Manager"`},
		{"operator": "NOT_EQUALS_IGNORE_CASE", "value": "bare text"},
		{"operator": "CONTAINS", "value": `"auditors"`},
		{"operator": "IN", "value": `["a", 1, true]`},
		{"operator": "IN", "value": `"a"`},
		{"operator": "EQUALS", "value": `""quoted twice""`},
	} {
		c["claim"] = "test claim"
		rule := e.Do(apitest.Request{Method: "POST", Path: path, Body: with(ruleBody(), "conditions", []obj{c})}).Want(201)
		if got := rule["conditions"].([]any)[0].(obj); got["value"] != c["value"] {
			t.Errorf("value %v became %v", c["value"], got["value"])
		}
		e.Do(apitest.Request{Method: "DELETE", Path: path + "/" + rule["id"].(string)}).Want(204)
	}
}

func TestAGroupHasAtMost5Rules(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	var wg sync.WaitGroup
	got := make([]int, 8)
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + group + "/rules", Body: ruleBody()}).Status
		})
	}
	wg.Wait()
	if n := e.Config.Directory.GroupRulesByGroup.Len(group); n != access.MaxRulesPerGroup {
		t.Errorf("the group has %d rules; statuses %v", n, got)
	}
	other, _ := create(e, "Others")
	addRule(e, other)
}

func TestOnlyOneOfManyWritersReplacesARule(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	id, tag := addRule(e, group)
	var wg sync.WaitGroup
	got := make([]int, 8)
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{
				Method: "PUT", Path: "/v2/groups/" + group + "/rules/" + id, Body: with(ruleBody(), "expiration", i+1),
				Header: map[string]string{"If-Match": tag},
			}).Status
		})
	}
	wg.Wait()
	counts := map[int]int{}
	for _, status := range got {
		counts[status]++
	}
	if counts[200] != 1 || counts[412] != 7 {
		t.Errorf("statuses %v", got)
	}
}

func TestARuleIsFoundOnlyInItsOwnGroup(t *testing.T) {
	e := start(t)
	a, _ := create(e, "A")
	b, _ := create(e, "B")
	id, _ := addRule(e, a)
	e.Do(apitest.Request{Path: "/v2/groups/" + b + "/rules/" + id}).Want(404)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + b + "/rules/" + id}).Want(404)
	e.Do(apitest.Request{Path: "/v2/groups/" + a + "/rules/" + id}).Want(200)
}

func TestGroupWithRulesIsFederatedAndNeedsForceToGo(t *testing.T) {
	e := start(t)
	id, _ := create(e, "A")
	create(e, "B")
	rule, _ := addRule(e, id)
	list := e.Do(apitest.Request{Path: groups(e.Owner) + "&show_federated=true&sort=-is_federated"}).Want(200)["groups"].([]any)
	if first := list[0].(obj); first["id"] != id || first["is_federated"] != true {
		t.Errorf("first is %v", first)
	}
	for _, g := range list[1:] {
		if g.(obj)["is_federated"] != false {
			t.Errorf("federated without rules: %v", g)
		}
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id}).Want(409)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id + "?force=perhaps"}).Want(400)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id + "?force=true"}).Want(204)
	if _, ok := e.Config.Directory.GroupRules.Get(rule); ok {
		t.Error("the rule outlived its group")
	}
	if event := e.Events(1)[0]; !strings.Contains(string(event.ResponseData), rule) {
		t.Errorf("event told %s", event.ResponseData)
	}
	e.Do(apitest.Request{Path: "/v2/groups/" + id + "/rules"}).Want(404)
}

func TestMembersByRuleAreShownAndFoundUntilTheirTimeOrTheRuleEnds(t *testing.T) {
	e := start(t)
	group, _ := create(e, "Managers")
	create(e, "Others")
	rule, tag := addRule(e, group)
	user := "IBMid-FEDERATED"
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		u, _ := d.Users.Get(directory.UserKey(e.Owner.AccountID, e.Owner.IAMID))
		v := *u
		v.Revision, v.IAMID, v.Name, v.Email = 0, user, "Fed", "fed@example.org"
		d.Users.Put(tx, &v)
	})
	login(e, user, 2, rule)
	profile := addProfile(e, e.Owner.AccountID, "p")
	add(e, group, obj{"iam_id": profile, "type": "profile"})
	members := "/v2/groups/" + group + "/members"
	count := func(path string) float64 { return e.Do(apitest.Request{Path: path}).Want(200)["total_count"].(float64) }
	check := func(when string, dynamic, all float64, head int) {
		t.Helper()
		if got := count(members + "?membership_type=dynamic"); got != dynamic {
			t.Errorf("%s: %v dynamic members, want %v", when, got, dynamic)
		}
		if got := count(members + "?membership_type=all"); got != all {
			t.Errorf("%s: %v members, want %v", when, got, all)
		}
		if got := count(groups(e.Owner) + "&membership_type=dynamic&iam_id=" + user); got != dynamic {
			t.Errorf("%s: in %v groups by rule, want %v", when, got, dynamic)
		}
		e.Do(apitest.Request{Method: "HEAD", Path: members + "/" + user}).Want(head)
	}
	check("logged in", 1, 2, 204)
	if got := count(members + "?membership_type=static"); got != 1 {
		t.Errorf("%v static members", got)
	}
	m := e.Do(apitest.Request{Path: members + "?membership_type=dynamic&verbose=true&type=user"}).Want(200)["members"].([]any)[0].(obj)
	if m["iam_id"] != user || m["type"] != "user" || m["membership_type"] != "dynamic" || m["name"] != "Fed" ||
		m["email"] != "fed@example.org" || m["created_by_id"] != e.Owner.IAMID || m["created_at"] == "" {
		t.Errorf("member %v", m)
	}
	if got := count(groups(e.Owner) + "&iam_id=" + user); got != 2 { // and Public Access
		t.Errorf("in %v groups, want 2", got)
	}

	// The rule gave it, so only the rule can take it.
	e.Do(apitest.Request{Method: "DELETE", Path: members + "/" + user}).Want(409)
	body := e.Do(apitest.Request{Method: "POST", Path: members + "/delete", Body: obj{"members": []string{user, stranger}}}).Want(207)
	if got := statuses(body["members"].([]any)); got != "409 404" {
		t.Errorf("statuses %s, want 409 404", got)
	}
	e.Do(apitest.Request{Method: "DELETE", Path: everywhere(e.Owner, user)}).Want(404)

	// By hand as well, he is one member.
	add(e, group, obj{"iam_id": user, "type": "user"})
	check("added by hand", 1, 2, 204)
	e.Do(apitest.Request{Method: "DELETE", Path: members + "/" + user}).Want(204)
	check("taken out again", 1, 2, 204)

	now := e.Config.Now
	e.Config.Now = func() time.Time { return time.Now().Add(3 * time.Hour) }
	check("after the membership's time", 0, 1, 404)
	e.Config.Now = now
	check("back in time", 1, 2, 204)
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + group + "/rules/" + rule, Body: ruleBody(), Header: map[string]string{"If-Match": tag}}).Want(200)
	check("after the rule's change", 0, 1, 404)
}
