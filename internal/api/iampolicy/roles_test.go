package iampolicy_test

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
)

func role(e *apitest.Env, name string, actions ...string) obj {
	return obj{"name": name, "display_name": "Display of " + name, "description": "d", "account_id": e.Owner.AccountID, "service_name": "kms", "actions": actions}
}

func makeRole(e *apitest.Env, body obj) (id, crn, etag string) {
	e.T.Helper()
	r := e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: body})
	got := r.Want(201)
	return got["id"].(string), got["crn"].(string), r.Header.Get("ETag")
}

func putRole(e *apitest.Env, id, tag string, body any) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "PUT", Path: "/v2/roles/" + id, Body: body, Header: map[string]string{"If-Match": tag}})
}

func TestCustomRoleGrantsItsActionsFromNowOnUntilItIsDeleted(t *testing.T) {
	e := start(t)
	allowed := func(action string) bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject: grantee, AccountID: e.Owner.AccountID, Action: action,
			Resource: map[string]string{"accountId": e.Owner.AccountID, "serviceName": "kms"},
		}).Allowed
	}
	id, crn, etag := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	if crn != "crn:v1:bluemix:public:iam-access-management::a/"+e.Owner.AccountID+"::customRole:Lister" {
		t.Errorf("crn %s", crn)
	}
	r := e.Do(apitest.Request{Path: "/v2/roles/" + id})
	got := r.Want(200)
	if r.Header.Get("ETag") != etag || got["name"] != "Lister" || got["display_name"] != "Display of Lister" || got["service_name"] != "kms" ||
		got["account_id"] != e.Owner.AccountID || got["created_by_id"] != e.Owner.IAMID || got["href"] != "http://tabard.test/v2/roles/"+id {
		t.Errorf("role %v", got)
	}
	alone, _ := create(e, 2, v2(e, crn, eq("serviceName", "kms")))
	both := v1(e, crn, "serviceName", "kms", "region", "eu-de")
	both["roles"] = []obj{{"role_id": crn}, {"role_id": viewer}}
	shared, _ := create(e, 1, both)
	gone, _ := create(e, 2, v2(e, crn, eq("serviceName", "kms"), eq("region", "us-south")))
	remove(e, gone).Want(204)
	if !allowed("kms.secrets.list") || allowed("kms.secrets.wrap") {
		t.Error("the role does not grant what it lists")
	}
	shown := e.Do(apitest.Request{Path: "/v2/policies/" + alone + "?format=display"}).Want(200)
	if dig(shown, "control", "grant", "roles", 0, "display_name") != "Display of Lister" || dig(shown, "control", "grant", "roles", 0, "actions", 0, "id") != "kms.secrets.list" {
		t.Errorf("shown %v", shown)
	}
	changed := putRole(e, id, etag, obj{"display_name": "Other", "actions": []string{"kms.secrets.wrap", "iam.policy.read"}})
	if got := changed.Want(200); got["description"] != "" || got["name"] != "Lister" || changed.Header.Get("ETag") == etag {
		t.Errorf("replaced %v", got)
	}
	if allowed("kms.secrets.list") || !allowed("kms.secrets.wrap") {
		t.Error("the change of the role does not take effect")
	}
	putRole(e, id, etag, obj{"display_name": "Other", "actions": []string{"kms.secrets.wrap"}}).Want(412)
	putRole(e, id, "", obj{"display_name": "Other", "actions": []string{"kms.secrets.wrap"}}).Want(400)

	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/roles/" + id}).Want(204)
	if allowed("kms.secrets.wrap") {
		t.Error("the deleted role still grants")
	}
	if got := code(e.Do(apitest.Request{Path: "/v2/roles/" + id}).Want(404)); got != "role_not_found" {
		t.Errorf("code %v", got)
	}
	for policy, want := range map[string]struct {
		state string
		roles int
	}{alone: {"deleted", 0}, shared: {"active", 1}, gone: {"deleted", 0}} {
		for _, version := range []string{"/v1", "/v2"} {
			got := e.Do(apitest.Request{Path: version + "/policies/" + policy}).Want(200)
			roles, ok := got["roles"].([]any)
			if version == "/v2" {
				roles, ok = dig(got, "control", "grant", "roles").([]any)
			}
			if got["state"] != want.state || !ok || len(roles) != want.roles {
				t.Errorf("policy %v, want %v", got, want)
			}
		}
	}
	// A new role of the same name is not what the policies granted.
	makeRole(e, role(e, "Lister", "kms.secrets.delete"))
	restore(e, alone, "*").Want(400)
	if allowed("kms.secrets.delete") {
		t.Error("the new role is granted by the old policies")
	}
}

func TestBadRolesAreRefused(t *testing.T) {
	e := start(t)
	with := func(change obj) obj {
		body := role(e, "Lister", "kms.secrets.list")
		for k, v := range change {
			body[k] = v
		}
		return body
	}
	for name, body := range map[string]any{
		"empty":                     "",
		"array":                     "[]",
		"null":                      "null",
		"no account":                with(obj{"account_id": ""}),
		"control in the account":    with(obj{"account_id": "a\x00"}),
		"no name":                   with(obj{"name": ""}),
		"small name":                with(obj{"name": "lister"}),
		"name with a space":         with(obj{"name": "Key Lister"}),
		"name with a colon":         with(obj{"name": "Key:Lister"}),
		"long name":                 with(obj{"name": "L" + strings.Repeat("x", 30)}),
		"name as a number":          with(obj{"name": 1}),
		"no display name":           with(obj{"display_name": ""}),
		"long description":          with(obj{"description": strings.Repeat("x", 251)}),
		"control in the name":       with(obj{"display_name": "a\nb"}),
		"no service":                with(obj{"service_name": ""}),
		"unknown service":           with(obj{"service_name": "nobody-knows-it"}),
		"child service":             with(obj{"service_name": "is.instance"}),
		"no actions":                with(obj{"actions": []string{}}),
		"null actions":              with(obj{"actions": nil}),
		"actions as a text":         with(obj{"actions": "kms.secrets.list"}),
		"unknown action":            with(obj{"actions": []string{"kms.secrets.steal"}}),
		"action of another service": with(obj{"actions": []string{"kms.secrets.list", "iam-groups.groups.read"}}),
		"action twice":              with(obj{"actions": []string{"kms.secrets.list", "kms.secrets.list"}}),
		"common actions only":       with(obj{"actions": []string{"iam.policy.create"}}),
	} {
		t.Run(name, func(t *testing.T) {
			if got := code(e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: body}).Want(400)); got != "invalid_body" {
				t.Errorf("code %v", got)
			}
		})
	}
	id, _, _ := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	for name, body := range map[string]obj{
		"same name":        with(obj{"actions": []string{"kms.secrets.wrap"}}),
		"same actions":     with(obj{"name": "Other"}),
		"built-in display": with(obj{"name": "Other", "display_name": "administrator", "actions": []string{"kms.secrets.wrap"}}),
	} {
		if got := code(e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: body}).Want(409)); got != "role_conflict_error" {
			t.Errorf("%s: code %v", name, got)
		}
	}
	second, _, _ := makeRole(e, role(e, "Wrapper", "kms.secrets.wrap", "kms.secrets.list"))
	if got := code(putRole(e, second, "*", obj{"display_name": "w", "actions": []string{"kms.secrets.list"}}).Want(409)); got != "role_conflict_error" {
		t.Errorf("code %v", got)
	}
	putRole(e, second, "*", obj{"display_name": "w", "actions": []string{}}).Want(400)
	putRole(e, second, "*", obj{"display_name": "w", "actions": []string{"kms.secrets.wrap"}, "name": "Lister"}).Want(400)
	putRole(e, second, "*", obj{"display_name": "w", "actions": []string{"kms.secrets.wrap"}, "name": "Wrapper", "unknown": true}).Want(200)
	// A role does not conflict with itself.
	putRole(e, id, "*", obj{"display_name": "again", "actions": []string{"kms.secrets.list"}}).Want(200)
	if got := code(putRole(e, id, "1-0", obj{"display_name": "again", "actions": []string{"kms.secrets.list"}}).Want(412)); got != "role_conflict_error" {
		t.Errorf("code %v", got)
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/roles/" + id, Header: map[string]string{"If-Match": "1-0"}}).Want(412)
}

func TestAnAccountHasAtMost40CustomRolesAndOneOfManyOfTheSameNameIsMade(t *testing.T) {
	e := start(t)
	var actions []string
	for _, s := range e.Config.Directory.Builtin().Services() {
		if s.Name == "kms" {
			actions = slices.DeleteFunc(s.AllActions(), func(a string) bool { return !strings.HasPrefix(a, "kms.") })
		}
	}
	got := make([]int, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: role(e, "Same", actions[0], actions[i+2])}).Status
		})
	}
	wg.Wait()
	slices.Sort(got)
	if want := []int{201, 409, 409, 409, 409, 409, 409, 409}; !slices.Equal(got, want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
	for i := range 39 {
		makeRole(e, role(e, fmt.Sprint("R", i), actions[:i+1]...))
	}
	if got := code(e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: role(e, "R40", actions[5])}).Want(409)); got != "request_not_processed" {
		t.Errorf("code %v", got)
	}
}

func TestRolesAreOnlyForThoseWithTheAction(t *testing.T) {
	e := start(t)
	id, _, _ := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	for who, roles := range map[string][]string{"Viewer": {"Viewer"}, "Operator": {"Operator"}, "Editor": {"Editor"}, "Administrator": {"Administrator"}} {
		e.Grant("IBMid-"+who, "iam-access-management", roles...)
	}
	for i, row := range []struct {
		who                       string
		read, update, make, erase int
	}{
		{"IBMid-STRANGER", 403, 403, 403, 403},
		{"IBMid-Operator", 200, 403, 403, 403},
		{"IBMid-Viewer", 200, 403, 403, 403},
		{"IBMid-Editor", 200, 200, 403, 403},
		{"IBMid-Administrator", 200, 200, 201, 204},
	} {
		do := func(want int, r apitest.Request) {
			t.Helper()
			r.As, r.Header = row.who, map[string]string{"If-Match": "*"}
			if got := e.Do(r); got.Status != want {
				t.Errorf("%s %s %s: %d, want %d", row.who, r.Method, r.Path, got.Status, want)
			}
		}
		do(row.read, apitest.Request{Path: "/v2/roles/" + id})
		do(row.update, apitest.Request{Method: "PUT", Path: "/v2/roles/" + id, Body: obj{"display_name": "x", "actions": []string{"kms.secrets.list"}}})
		do(row.make, apitest.Request{Method: "POST", Path: "/v2/roles", Body: role(e, fmt.Sprint("R", i), "kms.secrets.wrap")})
		list := e.Do(apitest.Request{Path: "/v2/roles", As: row.who}).Want(200)["custom_roles"].([]any)
		if (len(list) > 0) != (row.read == 200) {
			t.Errorf("%s sees %v", row.who, list)
		}
		do(row.erase, apitest.Request{Method: "DELETE", Path: "/v2/roles/" + id})
	}
}

func TestRolesOfAnotherAccountAreOutOfReach(t *testing.T) {
	e := start(t)
	id, crn, etag := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	for _, r := range []apitest.Request{
		{Path: "/v2/roles/" + id},
		{Method: "PUT", Path: "/v2/roles/" + id, Body: obj{"display_name": "x", "actions": []string{"kms.secrets.wrap"}}},
		{Method: "DELETE", Path: "/v2/roles/" + id},
	} {
		r.As, r.Header = e.Other.IAMID, map[string]string{"If-Match": etag}
		if got := code(e.Do(r).Want(404)); got != "role_not_found" {
			t.Errorf("code %v", got)
		}
	}
	for _, account := range []string{e.Owner.AccountID, strings.Repeat("0", 32)} {
		body := role(e, "Mine", "kms.secrets.list")
		body["account_id"] = account
		if got := code(e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: body, As: e.Other.IAMID}).Want(403)); got != "insufficent_permissions" {
			t.Errorf("code %v", got)
		}
		list := e.Do(apitest.Request{Path: "/v2/roles?account_id=" + account, As: e.Other.IAMID}).Want(200)
		if len(list["custom_roles"].([]any)) != 0 || len(list["system_roles"].([]any)) != 4 {
			t.Errorf("listed %v", list)
		}
	}
	body := v2(e, crn, eq("serviceName", "kms"))
	body["resource"] = obj{"attributes": []obj{eq("serviceName", "kms"), eq("accountId", e.Other.AccountID)}}
	e.Do(apitest.Request{Method: "POST", Path: "/v2/policies", Body: body, As: e.Other.IAMID}).Want(400)
	// The same name and actions are free there.
	mine := role(e, "Lister", "kms.secrets.list")
	mine["account_id"] = e.Other.AccountID
	e.Do(apitest.Request{Method: "POST", Path: "/v2/roles", Body: mine, As: e.Other.IAMID}).Want(201)
}

func TestRolesListIsFiltered(t *testing.T) {
	e := start(t)
	makeRole(e, role(e, "Lister", "kms.secrets.list"))
	groups := role(e, "GroupReader", "iam-groups.groups.read")
	groups["service_name"] = "iam-groups"
	makeRole(e, groups)
	for query, want := range map[string]string{
		"":                                         "Lister,GroupReader",
		"account_id=" + e.Owner.AccountID:          "Lister,GroupReader",
		"account_id=" + e.Other.AccountID:          "",
		"service_name=kms":                         "Lister",
		"service_name=iam-groups":                  "GroupReader",
		"service_group_id=IAM":                     "GroupReader",
		"service_name=alliamserviceroles":          "",
		"service_name=" + url.QueryEscape("a\x00"): "",
		"service_name=kms&source_service_name=cloud-object-storage&policy_type=authorization": "Lister",
	} {
		var names []string
		for _, r := range e.Do(apitest.Request{Path: "/v2/roles?" + query}).Want(200)["custom_roles"].([]any) {
			names = append(names, dig(r, "name").(string))
		}
		if got := strings.Join(names, ","); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	iam := e.Do(apitest.Request{Path: "/v2/roles?service_group_id=IAM&account_id=" + e.Owner.AccountID}).Want(200)
	seen := map[any]int{}
	for _, r := range append(iam["system_roles"].([]any), iam["service_roles"].([]any)...) {
		seen[dig(r, "crn")]++
		if dig(r, "crn") == viewer {
			for _, action := range []string{"iam-groups.groups.read", "iam-identity.profile.get", "iam.policy.read"} {
				if !slices.Contains(dig(r, "actions").([]any), any(action)) {
					t.Errorf("Viewer of the group does not have %s", action)
				}
			}
		}
	}
	if seen["crn:v1:bluemix:public:iam-identity::::serviceRole:ServiceIdCreator"] != 1 || seen[viewer] != 1 || len(iam["system_roles"].([]any)) != 4 {
		t.Errorf("roles of the group: %v", seen)
	}
	e.Do(apitest.Request{Path: "/v2/roles?policy_type=x"}).Want(400)
}

func TestARoleGainsActionsOnlyFromWhoMayWriteThePoliciesThatGrantIt(t *testing.T) {
	e := start(t)
	id, crn, _ := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	e.Grant("IBMid-EDITOR", "iam-access-management", "Editor")
	put := func(actions ...string) *apitest.Response {
		return e.Do(apitest.Request{
			Method: "PUT", Path: "/v2/roles/" + id, As: "IBMid-EDITOR", Header: map[string]string{"If-Match": "*"},
			Body: obj{"display_name": "x", "actions": actions},
		})
	}
	put("kms.secrets.list", "kms.secrets.wrap").Want(200)
	// He holds it himself now.
	body := v2(e, crn, eq("serviceName", "kms"))
	body["subject"] = obj{"attributes": []obj{eq("iam_id", "IBMid-EDITOR")}}
	policy, _ := create(e, 2, body)
	put("kms.secrets.list", "kms.secrets.wrap", "iam.policy.create").Want(403)
	put("kms.secrets.list", "kms.secrets.delete").Want(403)
	put("kms.secrets.list").Want(200)
	e.Grant("IBMid-EDITOR", "kms", "Administrator")
	put("kms.secrets.list", "kms.secrets.delete").Want(200)
	remove(e, policy).Want(204)

	// In an authorization, he must hold what the role gains.
	post(e, 2, authorization(e, crn, eq("serviceName", "kms"))).Want(201)
	put("kms.secrets.list", "kms.secrets.delete", "kms.secrets.wrap").Want(403)
	e.Grant("IBMid-EDITOR", "kms", "Manager")
	put("kms.secrets.list", "kms.secrets.delete", "kms.secrets.wrap").Want(200)
}

func TestNamesMayHaveEveryPrintableCharacter(t *testing.T) {
	e := start(t)
	var ascii strings.Builder
	for r := ' '; r < 0x7f; r++ {
		ascii.WriteRune(r)
	}
	for _, text := range []string{ascii.String(), "äöü ß € 漢字 🜁 \u202e e\u0301", `\"'<script>&amp;%00%s{{.}}`} {
		body := v2(e, viewer, eq("serviceName", "kms"), eq("resource", text))
		body["description"] = text
		body["resource"].(obj)["tags"] = []obj{eq("env", text)}
		id, _ := create(e, 2, body)
		got := e.Do(apitest.Request{Path: "/v2/policies/" + id}).Want(200)
		if got["description"] != text || dig(got, "resource", "attributes", 1, "value") != text || dig(got, "resource", "tags", 0, "value") != text {
			t.Errorf("shown %v", got)
		}
		one := e.Do(apitest.Request{Path: "/v1/policies?account_id=" + e.Owner.AccountID + "&tag_name=env&tag_value=" + url.QueryEscape(text)}).Want(200)
		if len(one["policies"].([]any)) != 1 {
			t.Errorf("%q is not found by its tag", text)
		}
		remove(e, id).Want(204)
		r := role(e, "Lister", "kms.secrets.list")
		r["display_name"], r["description"] = string([]rune(text)[:min(50, len([]rune(text)))]), text
		rid, _, _ := makeRole(e, r)
		if got := e.Do(apitest.Request{Path: "/v2/roles/" + rid}).Want(200); got["display_name"] != r["display_name"] || got["description"] != text {
			t.Errorf("shown %v", got)
		}
		e.Do(apitest.Request{Method: "DELETE", Path: "/v2/roles/" + rid}).Want(204)
	}
}

func TestBodiesOfTenMegabytesAreRefused(t *testing.T) {
	e := start(t)
	id, _, _ := makeRole(e, role(e, "Lister", "kms.secrets.list"))
	policy, _ := create(e, 2, v2(e, viewer, eq("serviceName", "kms")))
	settings := "/v1/accounts/" + e.Owner.AccountID + "/settings/access_management"
	body := `{"description":"` + strings.Repeat("x", 10<<20) + `"}`
	for _, r := range []apitest.Request{
		{Method: "POST", Path: "/v1/policies"}, {Method: "PUT", Path: "/v1/policies/" + policy}, {Method: "PATCH", Path: "/v1/policies/" + policy},
		{Method: "POST", Path: "/v2/policies"}, {Method: "PUT", Path: "/v2/policies/" + policy},
		{Method: "POST", Path: "/v2/roles"}, {Method: "PUT", Path: "/v2/roles/" + id}, {Method: "PATCH", Path: settings},
	} {
		r.Body, r.Header = body, map[string]string{"If-Match": "*"}
		if got := code(e.Do(r).Want(413)); got != "invalid_body" {
			t.Errorf("code %v", got)
		}
	}
}
