package accessgroups_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/accessgroups"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

const stranger = "IBMid-STRANGER"

type obj = map[string]any

func start(t *testing.T) *apitest.Env {
	t.Helper()
	e := apitest.New(t)
	accessgroups.Register(e.Mux, e.Config)
	return e
}

func stage(e *apitest.Env, f func(tx *directory.Tx, d *directory.Directory)) {
	e.T.Helper()
	d := e.Config.Directory
	if err := d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { f(tx, d); return nil }); err != nil {
		e.T.Fatal(err)
	}
}

func addProfile(e *apitest.Env, account, name string) (iamID string) {
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: name}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Profiles.Put(tx, p) })
	return "iam-" + p.ID
}

func addServiceID(e *apitest.Env, account string) (iamID string) {
	s := &identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: account, Name: "robot"}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.ServiceIDs.Put(tx, s) })
	return "iam-" + s.ID
}

func groups(o bootstrap.Owner) string { return "/v2/groups?account_id=" + o.AccountID }

func create(e *apitest.Env, name string) (id, etag string) {
	e.T.Helper()
	r := e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": name}})
	return r.Want(201)["id"].(string), r.Header.Get("ETag")
}

func add(e *apitest.Env, group string, members ...obj) []any {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + group + "/members", Body: obj{"members": members}}).
		Want(207)["members"].([]any)
}

func statuses(members []any) string {
	var out []string
	for _, m := range members {
		out = append(out, fmt.Sprint(m.(obj)["status_code"]))
	}
	return strings.Join(out, " ")
}

func code(body obj) any { return body["errors"].([]any)[0].(obj)["code"] }

func TestCreatedGroupCanBeReadBackAndListed(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "Auditors", "description": "They look."}})
	made := r.Want(201)
	id := made["id"].(string)
	if !strings.HasPrefix(id, "AccessGroupId-") || made["href"] != "http://tabard.test/v2/groups/"+id ||
		made["account_id"] != e.Owner.AccountID || made["created_by_id"] != e.Owner.IAMID {
		t.Errorf("created %v", made)
	}
	if _, shown := made["crn"]; shown {
		t.Error("crn is shown without show_crn")
	}
	got := e.Do(apitest.Request{Path: "/v2/groups/" + id + "?show_crn=true&show_federated=true"})
	body := got.Want(200)
	if body["name"] != "Auditors" || body["description"] != "They look." || got.Header.Get("ETag") != r.Header.Get("ETag") {
		t.Errorf("read %v with tag %s", body, got.Header.Get("ETag"))
	}
	if body["is_federated"] != false || !strings.HasSuffix(body["crn"].(string), ":"+id) {
		t.Errorf("read %v", body)
	}
	list := e.Do(apitest.Request{Path: groups(e.Owner) + "&hide_public_access=true"}).Want(200)
	if list["total_count"] != 1.0 || list["groups"].([]any)[0].(obj)["id"] != id {
		t.Errorf("listed %v", list)
	}
}

func TestGroupNamesAreUniqueWithoutRegardToCase(t *testing.T) {
	e := start(t)
	create(e, "Auditors")
	body := e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "aUDITORS"}}).Want(409)
	if code(body) != "conflict" || body["status_code"] != 409.0 || body["trace"] == "" {
		t.Errorf("answered %v", body)
	}
	id, etag := create(e, "Others")
	e.Do(apitest.Request{Method: "PATCH", Path: "/v2/groups/" + id, Body: obj{"name": "AUDITORS"}, Header: map[string]string{"If-Match": etag}}).Want(409)
	// The other account has names of its own.
	e.Do(apitest.Request{Method: "POST", Path: groups(e.Other), Body: obj{"name": "Auditors"}, As: e.Other.IAMID}).Want(201)
}

func TestBadGroupsAreRefusedWith400(t *testing.T) {
	e := start(t)
	for name, body := range map[string]any{
		"no name":            obj{"description": "x"},
		"blank name":         obj{"name": "  "},
		"long name":          obj{"name": strings.Repeat("n", 101)},
		"long description":   obj{"name": "n", "description": strings.Repeat("d", 251)},
		"control character":  obj{"name": "a\x00b"},
		"name of wrong type": obj{"name": 7},
		"array":              "[]",
		"no JSON":            "name=x",
		"empty":              "",
	} {
		t.Run(name, func(t *testing.T) {
			if got := code(e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: body}).Want(400)); got != "invalid_body" {
				t.Errorf("code %v", got)
			}
		})
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v2/groups", Body: obj{"name": "x"}}).Want(400)
	e.Do(apitest.Request{Path: "/v2/groups"}).Want(400)
	for _, query := range []string{"limit=101", "limit=-1", "limit=x", "offset=-1", "sort=size", "search=x", "membership_type=odd", "show_crn=x", "show_federated=2", "hide_public_access=maybe"} {
		e.Do(apitest.Request{Path: groups(e.Owner) + "&" + query}).Want(400)
	}
}

func TestUpdateNeedsTheCurrentEntityTag(t *testing.T) {
	e := start(t)
	id, etag := create(e, "Auditors")
	patch := func(tag string) *apitest.Response {
		return e.Do(apitest.Request{Method: "PATCH", Path: "/v2/groups/" + id, Body: obj{"description": "new"}, Header: map[string]string{"If-Match": tag}})
	}
	e.Do(apitest.Request{Method: "PATCH", Path: "/v2/groups/" + id, Body: obj{"description": "new"}}).Want(400)
	r := patch(etag)
	if body := r.Want(200); body["name"] != "Auditors" || body["description"] != "new" {
		t.Errorf("answered %v", body)
	}
	if r.Header.Get("ETag") == etag {
		t.Error("the entity tag did not change")
	}
	if got := code(patch(etag).Want(412)); got != "conflict" {
		t.Errorf("code %v", got)
	}
}

func TestOnlyOneOfManyWritersWithTheSameTagSucceeds(t *testing.T) {
	e := start(t)
	id, etag := create(e, "Auditors")
	var wg sync.WaitGroup
	got := make([]int, 8)
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{
				Method: "PATCH", Path: "/v2/groups/" + id, Body: obj{"name": fmt.Sprint("writer ", i)},
				Header: map[string]string{"If-Match": etag},
			}).Status
		})
	}
	wg.Wait()
	won := 0
	for _, status := range got {
		switch status {
		case 200:
			won++
		case 412:
		default:
			t.Errorf("status %d", status)
		}
	}
	if won != 1 {
		t.Errorf("%d writers won, want 1: %v", won, got)
	}
}

func TestConcurrentAdditionsAreAllKept(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	var wg sync.WaitGroup
	for i := range 8 {
		iamID := addProfile(e, e.Owner.AccountID, fmt.Sprint("p", i))
		wg.Go(func() {
			e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + id + "/members", Body: obj{"members": []obj{{"iam_id": iamID, "type": "profile"}}}})
		})
	}
	wg.Wait()
	if list := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members"}).Want(200); list["total_count"] != 8.0 {
		t.Errorf("%v members, want 8", list["total_count"])
	}
}

func TestMemberGetsTheGroupsAccessAndLosesItAgain(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Policies.Put(tx, policyFor(e, id)) })
	allowed := func() bool {
		return e.Do(apitest.Request{Path: "/v2/groups/" + id, As: profile}).Status == 200
	}
	if allowed() {
		t.Fatal("allowed before joining")
	}
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	if !allowed() {
		t.Error("not allowed as a member")
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id + "/members/" + profile}).Want(204)
	if allowed() {
		t.Error("still allowed after leaving")
	}
}

// policyFor lets a group's members see access groups.
func policyFor(e *apitest.Env, group string) *access.Policy {
	return &access.Policy{
		ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject: []access.Attribute{{Key: access.AccessGroupID, Operator: access.StringEquals, Value: access.Text(group)}},
		Resource: []access.Attribute{
			{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("iam-groups")},
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(e.Owner.AccountID)},
		},
		Roles: []string{access.PlatformRoleCRN("Viewer")},
	}
}

func TestEachMemberOfABulkCallHasAnAnswerOfItsOwn(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	robot := addServiceID(e, e.Owner.AccountID)
	foreignProfile := addProfile(e, e.Other.AccountID, "p")
	foreignRobot := addServiceID(e, e.Other.AccountID)
	members := add(e, id,
		obj{"iam_id": profile, "type": "profile"},
		obj{"iam_id": robot, "type": "service"},
		obj{"iam_id": e.Owner.IAMID, "type": "user"},
		obj{"iam_id": foreignProfile, "type": "profile"},
		obj{"iam_id": foreignRobot, "type": "service"},
		obj{"iam_id": e.Other.IAMID, "type": "user"},
		obj{"iam_id": "iam-Profile-" + uuid.NewString(), "type": "profile"},
		obj{"iam_id": profile, "type": "user"},
		obj{"iam_id": strings.TrimPrefix(profile, "iam-"), "type": "profile"},
		obj{"iam_id": profile, "type": "group"},
		obj{"iam_id": "", "type": "user"},
		obj{"iam_id": profile, "type": "profile"},
	)
	if got, want := statuses(members), "200 200 200 404 404 200 404 400 400 400 400 200"; got != want {
		t.Errorf("statuses %s, want %s", got, want)
	}
	first, fourth := members[0].(obj), members[3].(obj)
	if first["created_by_id"] != e.Owner.IAMID || first["created_at"] == nil || first["errors"] != nil {
		t.Errorf("added %v", first)
	}
	if code(fourth) != "not_found" || fourth["trace"] == nil || fourth["created_at"] != nil {
		t.Errorf("refused %v", fourth)
	}
	list := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members?verbose=true&sort=type"}).Want(200)
	if list["total_count"] != 4.0 {
		t.Fatalf("listed %v", list)
	}
	m := list["members"].([]any)[0].(obj)
	if m["iam_id"] != profile || m["membership_type"] != "static" || m["name"] != "p" ||
		m["href"] != "http://tabard.test/v2/groups/"+id+"/members/"+profile {
		t.Errorf("member %v", m)
	}
	only := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members?type=user"}).Want(200)
	if only["total_count"] != 2.0 {
		t.Errorf("users %v", only)
	}
	if dynamic := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members?membership_type=dynamic"}).Want(200); dynamic["total_count"] != 0.0 {
		t.Errorf("dynamic members %v", dynamic)
	}
}

func TestOneCallNamesAtMost50Members(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	many := make([]obj, 51)
	names := make([]string, 51)
	for i := range many {
		many[i], names[i] = obj{"iam_id": "IBMid-X", "type": "user"}, "IBMid-X"
	}
	for _, body := range []any{obj{"members": many}, obj{"members": []obj{}}, obj{}, obj{"members": "x"}} {
		e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + id + "/members", Body: body}).Want(400)
	}
	for _, body := range []any{obj{"members": names}, obj{"members": []string{}}, obj{"members": []obj{{"iam_id": "x"}}}} {
		e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + id + "/members/delete", Body: body}).Want(400)
	}
}

func TestAnIdentityIsInAtMost50Groups(t *testing.T) {
	e := start(t)
	profile := addProfile(e, e.Owner.AccountID, "p")
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		for i := range access.MaxGroupsPerIdentity {
			d.Groups.Put(tx, &access.Group{
				ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: fmt.Sprint("g", i),
				Members: []access.Member{{IAMID: profile, Type: "profile"}},
			})
		}
	})
	id, _ := create(e, "one more")
	members := add(e, id, obj{"iam_id": profile, "type": "profile"}, obj{"iam_id": e.Owner.IAMID, "type": "user"})
	if got := statuses(members); got != "409 200" {
		t.Errorf("statuses %s, want 409 200", got)
	}
}

func TestMembershipCanBeAskedForAndEndedOneByOne(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	path := "/v2/groups/" + id + "/members/" + profile
	e.Do(apitest.Request{Method: "HEAD", Path: path}).Want(404)
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(404)
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	e.Do(apitest.Request{Method: "HEAD", Path: path}).Want(204)
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(204)
	e.Do(apitest.Request{Method: "HEAD", Path: path}).Want(404)
}

func TestBulkRemovalTellsMembersFromOthers(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	a, b := addProfile(e, e.Owner.AccountID, "a"), addProfile(e, e.Owner.AccountID, "b")
	add(e, id, obj{"iam_id": a, "type": "profile"}, obj{"iam_id": b, "type": "profile"})
	body := e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + id + "/members/delete", Body: obj{"members": []string{a, stranger, a}}}).Want(207)
	if got := statuses(body["members"].([]any)); got != "200 404 404" || body["access_group_id"] != id {
		t.Errorf("answered %v", body)
	}
	e.Do(apitest.Request{Method: "HEAD", Path: "/v2/groups/" + id + "/members/" + b}).Want(204)
	e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + id + "/members/delete", Body: obj{"members": []string{a, stranger}}}).Want(404)
}

func TestDeletingAGroupWithMembersTakesForceAndItsPoliciesGoToo(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	p := policyFor(e, id)
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Policies.Put(tx, p) })

	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id}).Want(409)
	if _, ok := e.Config.Directory.Policies.Get(p.ID); !ok {
		t.Fatal("a refused deletion took the policy")
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id + "?force=true"}).Want(204)
	if _, ok := e.Config.Directory.Policies.Get(p.ID); ok {
		t.Error("the policy outlived its group")
	}
	if got := e.Config.Directory.StaticGroupsOf(e.Owner.AccountID, profile); len(got) != 0 {
		t.Errorf("the profile is still in %v", got)
	}
	e.Do(apitest.Request{Path: "/v2/groups/" + id}).Want(404)
	event := e.Events(1)[0]
	if event.Action != "iam-groups.group.delete" || event.Severity != "critical" || !strings.Contains(string(event.ResponseData), p.ID) {
		t.Errorf("event %s %s %s", event.Action, event.Severity, event.ResponseData)
	}
}

func TestOtherAccountsGroupsDoNotExistForTheCaller(t *testing.T) {
	e := start(t)
	id, etag := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	rule, ruleTag := addRule(e, id)
	own := e.Do(apitest.Request{Method: "POST", Path: groups(e.Other), Body: obj{"name": "Own"}, As: e.Other.IAMID}).Want(201)["id"].(string)
	one, members := "/v2/groups/"+id, "/v2/groups/"+id+"/members"
	for _, r := range []apitest.Request{
		{Path: one},
		{Method: "PATCH", Path: one, Body: obj{"name": "mine"}, Header: map[string]string{"If-Match": etag}},
		{Method: "DELETE", Path: one + "?force=true"},
		{Path: members},
		{Method: "PUT", Path: members, Body: obj{"members": []obj{{"iam_id": e.Other.IAMID, "type": "user"}}}},
		{Method: "HEAD", Path: members + "/" + profile},
		{Method: "DELETE", Path: members + "/" + profile},
		{Method: "POST", Path: members + "/delete", Body: obj{"members": []string{profile}}},
		{Path: one + "/rules"},
		{Method: "POST", Path: one + "/rules", Body: ruleBody()},
		{Path: one + "/rules/" + rule},
		{Method: "PUT", Path: one + "/rules/" + rule, Body: ruleBody(), Header: map[string]string{"If-Match": ruleTag}},
		{Method: "DELETE", Path: one + "/rules/" + rule},
		{Path: "/v2/groups/" + own + "/rules/" + rule},
		{Method: "PUT", Path: "/v2/groups/" + own + "/rules/" + rule, Body: ruleBody(), Header: map[string]string{"If-Match": "*"}},
		{Method: "DELETE", Path: "/v2/groups/" + own + "/rules/" + rule},
		{Method: "DELETE", Path: everywhere(e.Other, profile)},
		{Method: "PUT", Path: everywhere(e.Other, profile), Body: obj{"type": "profile", "groups": []string{own}}},
	} {
		r.As = e.Other.IAMID
		if body := e.Do(r).Want(404); code(body) != "not_found" {
			t.Errorf("%s %s: %v", r.Method, r.Path, body)
		}
	}
	mixed := e.Do(apitest.Request{
		Method: "PUT", Path: everywhere(e.Other, e.Other.IAMID), As: e.Other.IAMID,
		Body: obj{"type": "user", "groups": []string{id, own}},
	}).Want(207)
	if got := statuses(mixed["groups"].([]any)); got != "404 200" {
		t.Errorf("statuses %s, want 404 200", got)
	}
	for _, account := range []string{e.Owner.AccountID, "there is none"} {
		query := "?account_id=" + url.QueryEscape(account)
		for _, r := range []apitest.Request{
			{Path: "/v2/groups/settings" + query},
			{Method: "PATCH", Path: "/v2/groups/settings" + query, Body: obj{"public_access_enabled": false}},
			{Method: "PUT", Path: "/v2/groups/_allgroups/members/" + profile + query, Body: obj{"type": "profile", "groups": []string{id}}},
			{Method: "DELETE", Path: "/v2/groups/_allgroups/members/" + profile + query},
		} {
			r.As = e.Other.IAMID
			if body := e.Do(r).Want(403); code(body) != "forbidden" {
				t.Errorf("%s %s: %v", r.Method, r.Path, body)
			}
		}
	}
	if got := e.Config.Directory.GroupSettingsOf(e.Owner.AccountID); !got.PublicAccess {
		t.Error("another account turned public access off")
	}
	foreign := e.Do(apitest.Request{Path: groups(e.Owner), As: e.Other.IAMID}).Want(200)
	if foreign["total_count"] != 0.0 || len(foreign["groups"].([]any)) != 0 {
		t.Errorf("listed %v", foreign)
	}
	body := e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "planted"}, As: e.Other.IAMID}).Want(403)
	if code(body) != "forbidden" {
		t.Errorf("answered %v", body)
	}
}

func TestCallersWithoutRightsChangeNothingAndSeeNothing(t *testing.T) {
	e := start(t)
	id, etag := create(e, "Auditors")
	rule, ruleTag := addRule(e, id)
	viewer := "IBMid-VIEWER"
	e.Grant(viewer, "iam-groups", "Viewer")
	one, members := "/v2/groups/"+id, "/v2/groups/"+id+"/members"
	changes := []apitest.Request{
		{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "x"}},
		{Method: "PATCH", Path: one, Body: obj{"name": "x"}, Header: map[string]string{"If-Match": etag}},
		{Method: "DELETE", Path: one},
		{Method: "PUT", Path: members, Body: obj{"members": []obj{{"iam_id": viewer, "type": "user"}}}},
		{Method: "DELETE", Path: members + "/" + e.Owner.IAMID},
		{Method: "POST", Path: members + "/delete", Body: obj{"members": []string{e.Owner.IAMID}}},
		{Method: "PUT", Path: everywhere(e.Owner, viewer), Body: obj{"type": "user", "groups": []string{id}}},
		{Method: "DELETE", Path: everywhere(e.Owner, e.Owner.IAMID)},
		{Method: "POST", Path: one + "/rules", Body: ruleBody()},
		{Method: "PUT", Path: one + "/rules/" + rule, Body: ruleBody(), Header: map[string]string{"If-Match": ruleTag}},
		{Method: "DELETE", Path: one + "/rules/" + rule},
		{Method: "PATCH", Path: settings(e), Body: obj{"public_access_enabled": false}},
		{Method: "DELETE", Path: "/v2/groups/" + access.PublicAccess},
	}
	reads := []apitest.Request{
		{Path: one},
		{Path: members},
		{Method: "HEAD", Path: members + "/x"},
		{Path: one + "/rules"},
		{Path: one + "/rules/" + rule},
		{Path: settings(e)},
	}
	for _, who := range []string{viewer, stranger} {
		for _, r := range changes {
			r.As = who
			if got := code(e.Do(r).Want(403)); got != "forbidden" {
				t.Errorf("code %v", got)
			}
		}
	}
	for _, r := range reads {
		r.As = stranger
		e.Do(r).Want(403)
		r.Anonymous = true
		e.Do(r).Want(401)
	}
	e.Do(apitest.Request{Path: one, As: viewer}).Want(200)
	e.Do(apitest.Request{Path: members, As: viewer}).Want(200)
	e.Do(apitest.Request{Path: one + "/rules/" + rule, As: viewer}).Want(200)
	e.Do(apitest.Request{Path: settings(e), As: viewer}).Want(200)
	if list := e.Do(apitest.Request{Path: groups(e.Owner), As: stranger}).Want(200); list["total_count"] != 0.0 {
		t.Errorf("a stranger sees %v", list)
	}
	if list := e.Do(apitest.Request{Path: groups(e.Owner), As: viewer}).Want(200); list["total_count"] != 2.0 {
		t.Errorf("a viewer sees %v", list)
	}
}

func TestPagesCoverTheListOnceAndInOrder(t *testing.T) {
	e := start(t)
	for i := range 7 {
		create(e, fmt.Sprint("group ", 6-i))
	}
	var names []string
	path, pages := groups(e.Owner)+"&limit=3&hide_public_access=true", 0
	for path != "" {
		list := e.Do(apitest.Request{Path: path}).Want(200)
		for _, g := range list["groups"].([]any) {
			names = append(names, g.(obj)["name"].(string))
		}
		if list["total_count"] != 7.0 || list["limit"] != 3.0 {
			t.Errorf("page %v", list)
		}
		path = ""
		if next, ok := list["next"].(obj); ok {
			u, err := url.Parse(next["href"].(string))
			if err != nil || u.Query().Get("offset") == "" || u.Query().Get("account_id") == "" {
				t.Fatalf("next is %v", next)
			}
			path = u.RequestURI()
		}
		if pages++; pages > 10 {
			t.Fatal("the list does not end")
		}
	}
	if got, want := strings.Join(names, ","), "group 0,group 1,group 2,group 3,group 4,group 5,group 6"; got != want {
		t.Errorf("names %s, want %s", got, want)
	}
	list := e.Do(apitest.Request{Path: groups(e.Owner) + "&limit=3&offset=3&sort=-name&hide_public_access=true"}).Want(200)
	if got := list["groups"].([]any)[0].(obj)["name"]; got != "group 3" {
		t.Errorf("descending, the fourth is %v", got)
	}
	for name, offset := range map[string]string{"first": "0", "previous": "0", "next": "6", "last": "6"} {
		u, err := url.Parse(list[name].(obj)["href"].(string))
		if err != nil || u.Query().Get("offset") != offset {
			t.Errorf("%s is %v, want offset %s", name, list[name], offset)
		}
	}
	if empty := e.Do(apitest.Request{Path: groups(e.Owner) + "&limit=0"}).Want(200); empty["next"] != nil || len(empty["groups"].([]any)) != 0 {
		t.Errorf("limit 0 gave %v", empty)
	}
	if beyond := e.Do(apitest.Request{Path: groups(e.Owner) + "&offset=99"}).Want(200); beyond["next"] != nil || len(beyond["groups"].([]any)) != 0 {
		t.Errorf("offset 99 gave %v", beyond)
	}
}

func TestListIsFilteredByMemberAndSearch(t *testing.T) {
	e := start(t)
	a, _ := create(e, "Auditors")
	create(e, "Builders")
	add(e, a, obj{"iam_id": e.Owner.IAMID, "type": "user"})
	count := func(query string) any {
		return e.Do(apitest.Request{Path: groups(e.Owner) + "&" + query}).Want(200)["total_count"]
	}
	for query, want := range map[string]float64{
		"iam_id=" + e.Owner.IAMID:                                  2,
		"iam_id=" + e.Owner.IAMID + "&hide_public_access=true":     1,
		"iam_id=" + e.Owner.IAMID + "&membership_type=static":      1,
		"iam_id=" + e.Owner.IAMID + "&membership_type=dynamic":     0,
		"iam_id=" + e.Owner.IAMID + "&membership_type=inherited":   1,
		"iam_id=" + stranger:                                       1,
		"iam_id=" + stranger + "&membership_type=all&search=name:": 1,
		"iam_id=" + stranger + "&membership_type=static":           0,
		"search=name:build":                                        1,
		"search=id:" + a:                                           1,
		"search=description:nothing":                               0,
	} {
		if got := count(query); got != want {
			t.Errorf("%s found %v, want %v", query, got, want)
		}
	}
}

func TestChangesAreRecordedWithTheirValues(t *testing.T) {
	e := start(t)
	id, etag := create(e, "Auditors")
	profile := addProfile(e, e.Owner.AccountID, "p")
	e.Do(apitest.Request{Method: "PATCH", Path: "/v2/groups/" + id, Body: obj{"name": "Checkers"}, Header: map[string]string{"If-Match": etag}}).Want(200)
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/" + id + "/members/" + profile}).Want(204)
	e.Do(apitest.Request{Method: http.MethodDelete, Path: "/v2/groups/" + id, As: stranger}).Want(403)
	events := e.Events(5)
	for i, want := range []struct{ action, typeURI, outcome, data string }{
		{"iam-groups.group.delete", "iam-groups/group", "failure", ""},
		{"iam-groups.member.delete", "iam-groups/member", "success", profile},
		{"iam-groups.member.add", "iam-groups/member", "success", profile},
		{"iam-groups.group.update", "iam-groups/group", "success", `"previous":{"description":"","name":"Auditors"}`},
		{"iam-groups.group.create", "iam-groups/group", "success", `"name":"Auditors"`},
	} {
		got := events[i]
		if got.Action != want.action || got.Target.TypeURI != want.typeURI || got.Outcome != want.outcome ||
			!strings.Contains(string(got.ResponseData), want.data) || !strings.HasSuffix(got.Target.ID, "::access-group:"+id) {
			t.Errorf("event %d is %s %s %s %s %s, want %v", i, got.Action, got.Target.TypeURI, got.Target.ID, got.Outcome, got.ResponseData, want)
		}
	}
}
