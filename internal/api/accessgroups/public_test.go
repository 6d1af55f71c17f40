package accessgroups_test

import (
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
)

const public = "/v2/groups/" + access.PublicAccess

func settings(e *apitest.Env) string { return "/v2/groups/settings?account_id=" + e.Owner.AccountID }

func everywhere(o bootstrap.Owner, iamID string) string {
	return "/v2/groups/_allgroups/members/" + url.PathEscape(iamID) + "?account_id=" + o.AccountID
}

func TestPublicAccessIsInTheListUnlessHiddenAndCanBeRead(t *testing.T) {
	e := start(t)
	list := e.Do(apitest.Request{Path: groups(e.Owner) + "&show_crn=true"}).Want(200)
	g := list["groups"].([]any)[0].(obj)
	if list["total_count"] != 1.0 || g["id"] != access.PublicAccess || g["name"] != "Public Access" ||
		g["account_id"] != e.Owner.AccountID || !strings.HasSuffix(g["crn"].(string), ":"+access.PublicAccess) {
		t.Errorf("listed %v", list)
	}
	if hidden := e.Do(apitest.Request{Path: groups(e.Owner) + "&hide_public_access=true"}).Want(200); hidden["total_count"] != 0.0 {
		t.Errorf("listed %v", hidden)
	}
	if got := e.Do(apitest.Request{Path: public}).Want(200); got["name"] != "Public Access" || got["created_by_id"] != e.Owner.IAMID {
		t.Errorf("read %v", got)
	}
	if other := e.Do(apitest.Request{Path: public, As: e.Other.IAMID}).Want(200); other["account_id"] != e.Other.AccountID {
		t.Errorf("the other account reads %v", other)
	}
	e.Do(apitest.Request{Path: public, As: stranger}).Want(403)
}

func TestPublicAccessCantBeChangedDeletedOrGivenMembersOrRules(t *testing.T) {
	e := start(t)
	group, etag := create(e, "Auditors")
	for _, r := range []apitest.Request{
		{Method: "PATCH", Path: public, Body: obj{"name": "Everybody"}, Header: map[string]string{"If-Match": "*"}},
		{Method: "DELETE", Path: public},
		{Method: "DELETE", Path: public + "?force=true"},
		{Method: "PUT", Path: public + "/members", Body: obj{"members": []obj{{"iam_id": e.Owner.IAMID, "type": "user"}}}},
		{Method: "DELETE", Path: public + "/members/" + e.Owner.IAMID},
		{Method: "POST", Path: public + "/members/delete", Body: obj{"members": []string{e.Owner.IAMID}}},
		{Method: "POST", Path: public + "/rules", Body: ruleBody()},
		{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "public ACCESS "}},
		{Method: "PATCH", Path: "/v2/groups/" + group, Body: obj{"name": "Public Access"}, Header: map[string]string{"If-Match": etag}},
	} {
		if body := e.Do(r).Want(409); code(body) != "conflict" {
			t.Errorf("%s %s: %v", r.Method, r.Path, body)
		}
	}
	all := e.Do(apitest.Request{
		Method: "PUT", Path: everywhere(e.Owner, e.Owner.IAMID), Body: obj{"type": "user", "groups": []string{access.PublicAccess, group}},
	}).Want(207)
	if got := statuses(all["groups"].([]any)); got != "409 200" {
		t.Errorf("statuses %s, want 409 200", got)
	}
	if rules := e.Do(apitest.Request{Path: public + "/rules"}).Want(200)["rules"].([]any); len(rules) != 0 {
		t.Errorf("rules %v", rules)
	}
	if members := e.Do(apitest.Request{Path: public + "/members"}).Want(200); members["total_count"] != 0.0 {
		t.Errorf("members %v", members)
	}
	e.Do(apitest.Request{Method: "HEAD", Path: public + "/members/" + addProfile(e, e.Owner.AccountID, "p")}).Want(204)
	e.Do(apitest.Request{Method: "HEAD", Path: public + "/members/nobody"}).Want(404)
}

func TestTurningPublicAccessOffTakesItsPoliciesAndItsPlace(t *testing.T) {
	e := start(t)
	p := policyFor(e, access.PublicAccess)
	theirs := policyFor(e, access.PublicAccess)
	theirs.AccountID = e.Other.AccountID
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.Policies.Put(tx, p)
		d.Policies.Put(tx, theirs)
	})
	before := e.Do(apitest.Request{Path: settings(e)})
	if got := before.Want(200); got["account_id"] != e.Owner.AccountID || got["public_access_enabled"] != true ||
		got["last_modified_by_id"] != e.Owner.IAMID || strings.HasPrefix(got["last_modified_at"].(string), "0001") {
		t.Errorf("settings %v", got)
	}
	e.Do(apitest.Request{Path: public, As: stranger}).Want(200)
	patch := func(body any, header map[string]string) *apitest.Response {
		return e.Do(apitest.Request{Method: "PATCH", Path: settings(e), Body: body, Header: header})
	}
	off := patch(obj{"public_access_enabled": false}, map[string]string{"If-Match": before.Header.Get("ETag")})
	if off.Want(200)["public_access_enabled"] != false || off.Header.Get("ETag") == before.Header.Get("ETag") {
		t.Errorf("answered %s with tag %s", off.Raw, off.Header.Get("ETag"))
	}
	event := e.Events(1)[0]
	if event.Action != "iam-groups.account-settings.update" || event.Target.TypeURI != "iam-groups/account-settings" ||
		!strings.Contains(string(event.ResponseData), p.ID) || !strings.Contains(string(event.ResponseData), `"previous":{"public_access_enabled":true}`) {
		t.Errorf("event %s %s %s", event.Action, event.Target.TypeURI, event.ResponseData)
	}
	if _, ok := e.Config.Directory.Policies.Get(p.ID); ok {
		t.Error("the policy is still there")
	}
	if _, ok := e.Config.Directory.Policies.Get(theirs.ID); !ok {
		t.Error("another account's policy went too")
	}
	e.Do(apitest.Request{Path: public, As: stranger}).Want(404)
	e.Do(apitest.Request{Path: public}).Want(404)
	if list := e.Do(apitest.Request{Path: groups(e.Owner) + "&iam_id=" + stranger}).Want(200); list["total_count"] != 0.0 {
		t.Errorf("listed %v", list)
	}
	e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": "Public Access"}}).Want(409)
	patch(obj{"public_access_enabled": true}, map[string]string{"If-Match": before.Header.Get("ETag")}).Want(412)
	patch(obj{"public_access_enabled": true}, nil).Want(200)
	e.Do(apitest.Request{Path: public, As: stranger}).Want(403)
}

func TestSettingsStayAsTheyAreWithoutAValueAndRefuseBadOnes(t *testing.T) {
	e := start(t)
	patch := func(body any) *apitest.Response {
		return e.Do(apitest.Request{Method: "PATCH", Path: settings(e), Body: body})
	}
	for _, body := range []any{obj{}, obj{"public_access_enabled": nil}, obj{"unknown": 1}} {
		if got := patch(body).Want(200); got["public_access_enabled"] != true {
			t.Errorf("%v gave %v", body, got)
		}
	}
	for _, body := range []any{obj{"public_access_enabled": "false"}, obj{"public_access_enabled": 0}, "[]", "", "{"} {
		patch(body).Want(400)
	}
	e.Do(apitest.Request{Path: "/v2/groups/settings"}).Want(400)
	e.Do(apitest.Request{Method: "PATCH", Path: "/v2/groups/settings", Body: obj{}}).Want(400)
	editor := "IBMid-EDITOR"
	e.Grant(editor, "iam-groups", "Editor")
	e.Do(apitest.Request{Path: settings(e), As: editor}).Want(200)
	e.Do(apitest.Request{Method: "PATCH", Path: settings(e), Body: obj{}, As: editor}).Want(403)
}

func TestOnlyOneOfManyWritersOfTheSettingsSucceeds(t *testing.T) {
	e := start(t)
	tag := e.Do(apitest.Request{Path: settings(e)}).Header.Get("ETag")
	var wg sync.WaitGroup
	got := make([]int, 6)
	for i := range got {
		wg.Go(func() {
			got[i] = e.Do(apitest.Request{
				Method: "PATCH", Path: settings(e), Body: obj{"public_access_enabled": i%2 == 0}, Header: map[string]string{"If-Match": tag},
			}).Status
		})
	}
	wg.Wait()
	counts := map[int]int{}
	for _, status := range got {
		counts[status]++
	}
	if counts[200] != 1 || counts[412] != 5 {
		t.Errorf("statuses %v", got)
	}
}

func TestOneIdentityJoinsAndLeavesManyGroupsInOneCall(t *testing.T) {
	e := start(t)
	a, _ := create(e, "A")
	b, _ := create(e, "B")
	missing := "AccessGroupId-" + uuid.NewString()
	profile := addProfile(e, e.Owner.AccountID, "p")
	join := func() obj {
		return e.Do(apitest.Request{
			Method: "PUT", Path: everywhere(e.Owner, profile), Body: obj{"type": "profile", "groups": []string{a, missing, b, a, ""}},
		}).Want(207)
	}
	for range 2 { // who is in already stays in
		body := join()
		if got := statuses(body["groups"].([]any)); got != "200 404 200 200 404" || body["iam_id"] != profile {
			t.Errorf("answered %v", body)
		}
	}
	second := join()["groups"].([]any)[1].(obj)
	if second["access_group_id"] != missing || code(second) != "not_found" || second["trace"] == nil {
		t.Errorf("refused %v", second)
	}
	if got := e.Config.Directory.StaticGroupsOf(e.Owner.AccountID, profile); len(got) != 2 {
		t.Errorf("in %v", got)
	}
	if members := e.Do(apitest.Request{Path: "/v2/groups/" + a + "/members"}).Want(200); members["total_count"] != 1.0 {
		t.Errorf("members %v", members)
	}
	if event := e.Events(1)[0]; event.Action != "iam-groups.member.add" || !strings.Contains(string(event.ResponseData), profile) ||
		!strings.Contains(string(event.ResponseData), a) {
		t.Errorf("event %s %s", event.Action, event.ResponseData)
	}
	left := e.Do(apitest.Request{Method: "DELETE", Path: everywhere(e.Owner, profile)}).Want(207)
	if got := statuses(left["groups"].([]any)); got != "200 200" || left["iam_id"] != profile {
		t.Errorf("answered %v", left)
	}
	if event := e.Events(1)[0]; event.Action != "iam-groups.member.delete" || !strings.Contains(string(event.ResponseData), b) {
		t.Errorf("event %s %s", event.Action, event.ResponseData)
	}
	if got := e.Config.Directory.StaticGroupsOf(e.Owner.AccountID, profile); len(got) != 0 {
		t.Errorf("still in %v", got)
	}
	if got := code(e.Do(apitest.Request{Method: "DELETE", Path: everywhere(e.Owner, profile)}).Want(404)); got != "not_found" {
		t.Errorf("code %v", got)
	}
}

func TestJoiningManyGroupsStopsAtTheLimitOfOneIdentity(t *testing.T) {
	e := start(t)
	profile := addProfile(e, e.Owner.AccountID, "p")
	var ids []string
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		for i := range access.MaxGroupsPerIdentity + 1 {
			g := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: fmt.Sprint("g", i)}
			if i < 3 {
				g.Members = []access.Member{{IAMID: profile, Type: "profile"}}
			} else {
				ids = append(ids, g.ID)
			}
			d.Groups.Put(tx, g)
		}
	})
	body := e.Do(apitest.Request{Method: "PUT", Path: everywhere(e.Owner, profile), Body: obj{"type": "profile", "groups": ids}}).Want(207)
	got := strings.Fields(statuses(body["groups"].([]any)))
	if len(got) != 48 || got[46] != "200" || got[47] != "409" {
		t.Errorf("statuses %v", got)
	}
	if n := len(e.Config.Directory.StaticGroupsOf(e.Owner.AccountID, profile)); n != access.MaxGroupsPerIdentity {
		t.Errorf("in %d groups", n)
	}
}

func TestBadCallsAboutAllGroupsAreRefused(t *testing.T) {
	e := start(t)
	id, _ := create(e, "A")
	many := make([]string, 51)
	for name, r := range map[string]struct {
		path   string
		body   any
		status int
	}{
		"no groups":       {everywhere(e.Owner, e.Owner.IAMID), obj{"type": "user"}, 400},
		"51 groups":       {everywhere(e.Owner, e.Owner.IAMID), obj{"type": "user", "groups": many}, 400},
		"no type":         {everywhere(e.Owner, e.Owner.IAMID), obj{"groups": []string{id}}, 400},
		"wrong type":      {everywhere(e.Owner, e.Owner.IAMID), obj{"type": "profile", "groups": []string{id}}, 400},
		"groups as text":  {everywhere(e.Owner, e.Owner.IAMID), obj{"type": "user", "groups": id}, 400},
		"no IAM ID":       {everywhere(e.Owner, "nobody"), obj{"type": "user", "groups": []string{id}}, 400},
		"control in id":   {everywhere(e.Owner, "IBMid-\x00x"), obj{"type": "user", "groups": []string{id}}, 400},
		"long id":         {everywhere(e.Owner, "IBMid-"+strings.Repeat("x", 300)), obj{"type": "user", "groups": []string{id}}, 400},
		"unknown service": {everywhere(e.Owner, "iam-ServiceId-x"), obj{"type": "service", "groups": []string{id}}, 404},
		"foreign profile": {everywhere(e.Owner, addProfile(e, e.Other.AccountID, "p")), obj{"type": "profile", "groups": []string{id}}, 404},
		"no account":      {"/v2/groups/_allgroups/members/" + e.Owner.IAMID, obj{"type": "user", "groups": []string{id}}, 400},
	} {
		t.Run(name, func(t *testing.T) {
			e.Do(apitest.Request{Method: "PUT", Path: r.path, Body: r.body}).Want(r.status)
		})
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v2/groups/_allgroups/members/x"}).Want(400)
}

func TestRightsOnOneGroupDoNotReachAllGroups(t *testing.T) {
	e := start(t)
	mine, _ := create(e, "Mine")
	theirs, _ := create(e, "Theirs")
	editor := "IBMid-EDITOR"
	p := policyFor(e, "")
	p.Subject = []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(editor)}}
	p.Resource = append(p.Resource, access.Attribute{Key: access.Resource, Operator: access.StringEquals, Value: access.Text(mine)})
	p.Roles = []string{access.PlatformRoleCRN("Editor")}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Policies.Put(tx, p) })
	join := func(id string) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + id + "/members", As: editor, Body: obj{"members": []obj{{"iam_id": editor, "type": "user"}}}})
	}
	join(mine).Want(207)
	join(theirs).Want(403)
	e.Do(apitest.Request{Method: "PUT", Path: everywhere(e.Owner, editor), As: editor, Body: obj{"type": "user", "groups": []string{theirs}}}).Want(403)
	if list := e.Do(apitest.Request{Path: groups(e.Owner), As: editor}).Want(200); list["total_count"] != 1.0 || list["groups"].([]any)[0].(obj)["id"] != mine {
		t.Errorf("sees %v", list)
	}
}

func TestTheRightToActOnAllGroupsIsAskedForAgainForEachOfThem(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Guarded")
	profile := addProfile(e, e.Owner.AccountID, "p")
	add(e, id, obj{"iam_id": profile, "type": "profile"})
	editor := "IBMid-EDITOR"
	none := false
	p := policyFor(e, "")
	p.Subject = []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(editor)}}
	p.Resource = append(p.Resource, access.Attribute{Key: access.Resource, Operator: access.StringExists, Value: access.Value{Exists: &none}})
	p.Roles = []string{access.PlatformRoleCRN("Editor")}
	stage(e, func(tx *directory.Tx, d *directory.Directory) { d.Policies.Put(tx, p) })
	for _, r := range []apitest.Request{
		{Method: "PUT", Path: everywhere(e.Owner, editor), Body: obj{"type": "user", "groups": []string{id}}},
		{Method: "DELETE", Path: everywhere(e.Owner, profile)},
	} {
		r.As = editor
		body := e.Do(r).Want(207)
		if got := statuses(body["groups"].([]any)); got != "403" || code(body["groups"].([]any)[0].(obj)) != "forbidden" {
			t.Errorf("%s answered %v", r.Method, body)
		}
	}
	if members := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members"}).Want(200); members["total_count"] != 1.0 {
		t.Errorf("members %v", members)
	}
}

func TestAUserWhoIsNotInTheAccountYetCanBeAMemberWithoutANameToShow(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	if got := statuses(add(e, id,
		obj{"iam_id": "IBMid-49210", "type": "user"},
		obj{"iam_id": "IBMid-\x01", "type": "user"},
		obj{"iam_id": "IBMid-" + strings.Repeat("x", 300), "type": "user"},
		obj{"iam_id": e.Other.IAMID, "type": "user"},
	)); got != "200 400 400 200" {
		t.Errorf("statuses %s, want 200 400 400 200", got)
	}
	for _, m := range e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members?verbose=true"}).Want(200)["members"].([]any) {
		if m := m.(obj); m["name"] != nil || m["email"] != nil {
			t.Errorf("the other account's user shows as %v", m)
		}
	}
}

func TestMembersAreSortedByWhatTheQueryNames(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	z, a := addProfile(e, e.Owner.AccountID, "zoe"), addProfile(e, e.Owner.AccountID, "Abe")
	add(e, id, obj{"iam_id": z, "type": "profile"}, obj{"iam_id": a, "type": "profile"}, obj{"iam_id": e.Owner.IAMID, "type": "user"})
	members := "/v2/groups/" + id + "/members?verbose=true&type=profile&sort="
	for sort, want := range map[string]string{"name": a, "-name": z, "id": min(a, z), "-id": max(a, z)} {
		list := e.Do(apitest.Request{Path: members + sort}).Want(200)["members"].([]any)
		if got := list[0].(obj)["iam_id"]; got != want || len(list) != 2 {
			t.Errorf("by %s, the first is %v, want %s", sort, got, want)
		}
	}
	for _, query := range []string{"sort=name", "sort=email", "type=robot", "verbose=x", "membership_type=inherited", "limit=101"} {
		e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members?" + query}).Want(400)
	}
}

func TestNamesMayHaveEveryPrintableCharacter(t *testing.T) {
	e := start(t)
	var ascii strings.Builder
	for r := ' '; r < 0x7f; r++ {
		ascii.WriteRune(r)
	}
	for _, name := range []string{ascii.String(), "Prüfer 審査 🔍 \u00a0 é", `"\u0041"`, "a:b/c?d#e%41"} {
		id := e.Do(apitest.Request{Method: "POST", Path: groups(e.Owner), Body: obj{"name": name, "description": name}}).Want(201)["id"].(string)
		if got := e.Do(apitest.Request{Path: "/v2/groups/" + id}).Want(200); got["name"] != name || got["description"] != name {
			t.Errorf("%q became %q, %q", name, got["name"], got["description"])
		}
		found := e.Do(apitest.Request{Path: groups(e.Owner) + "&search=" + url.QueryEscape("name:"+name)}).Want(200)
		if found["total_count"] != 1.0 {
			t.Errorf("searching %q found %v", name, found["total_count"])
		}
		rule := e.Do(apitest.Request{Method: "POST", Path: "/v2/groups/" + id + "/rules", Body: with(ruleBody(), "name", name)}).Want(201)
		if rule["name"] != name {
			t.Errorf("rule %q became %q", name, rule["name"])
		}
	}
}

func TestHugeAndOddBodiesNeverAnswer500(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	rule, _ := addRule(e, id)
	one := "/v2/groups/" + id
	huge := `{"name":"` + strings.Repeat("x", 10<<20) + `"}`
	long := strings.Repeat("x", 1<<19)
	bodies := []string{
		huge, "", "null", "[]", `"x"`, "7", "{", "{}{}", `{"name":{}}`, `{"members":[null]}`, `{"members":[[]]}`, `{"groups":[null],"type":"user"}`,
		`{"members":["` + long + `"]}`, `{"members":[{"iam_id":"` + long + `","type":"user"}]}`, `{"groups":["` + long + `"],"type":"user"}`,
		"{\"name\":\"\xff\xfe\"}", strings.Repeat("[", 20000), `{"name":"a","NAME":"b"}`,
	}
	for _, route := range []struct{ method, path string }{
		{"POST", groups(e.Owner)},
		{"PATCH", one},
		{"PUT", one + "/members"},
		{"POST", one + "/members/delete"},
		{"PUT", everywhere(e.Owner, e.Owner.IAMID)},
		{"POST", one + "/rules"},
		{"PUT", one + "/rules/" + rule},
		{"PATCH", settings(e)},
	} {
		for _, body := range bodies {
			r := e.Do(apitest.Request{Method: route.method, Path: route.path, Body: body, Header: map[string]string{"If-Match": "*"}})
			if r.Status >= 500 || body == huge && r.Status != 413 {
				t.Errorf("%s %s with %.20q: %d %.200s", route.method, route.path, body, r.Status, r.Raw)
			}
		}
	}
	for _, event := range e.Events(100) {
		if n := len(event.ResponseData) + len(event.Reason.ForFailure); n > 20000 {
			t.Errorf("an event of %s holds %d bytes from a caller", event.Action, n)
		}
	}
	for _, path := range []string{"%00", "..%2f..", "%ff", long[:8000], "AccessGroupId-", "%F0%9F%94%8D"} {
		for _, suffix := range []string{"", "/members", "/rules", "/rules/" + path} {
			e.Do(apitest.Request{Path: "/v2/groups/" + path + suffix}).Want(404)
		}
		e.Do(apitest.Request{Method: "DELETE", Path: one + "/members/" + path}).Want(404)
		e.Do(apitest.Request{Method: "HEAD", Path: one + "/members/" + path}).Want(404)
	}
}

func TestParallelChangesOfOneGroupLoseNoMember(t *testing.T) {
	e := start(t)
	a, _ := create(e, "A")
	b, _ := create(e, "B")
	var wg sync.WaitGroup
	for i := range 8 {
		iamID := addProfile(e, e.Owner.AccountID, fmt.Sprint("p", i))
		wg.Go(func() {
			if i%2 == 0 {
				e.Do(apitest.Request{Method: "PUT", Path: everywhere(e.Owner, iamID), Body: obj{"type": "profile", "groups": []string{a, b}}})
				return
			}
			e.Do(apitest.Request{Method: "PUT", Path: "/v2/groups/" + a + "/members", Body: obj{"members": []obj{{"iam_id": iamID, "type": "profile"}}}})
		})
	}
	wg.Wait()
	for id, want := range map[string]float64{a: 8, b: 4} {
		if list := e.Do(apitest.Request{Path: "/v2/groups/" + id + "/members"}).Want(200); list["total_count"] != want {
			t.Errorf("%v members, want %v", list["total_count"], want)
		}
	}
}

func TestADeletedGroupIsGoneForEveryRoute(t *testing.T) {
	e := start(t)
	id, _ := create(e, "Auditors")
	rule, _ := addRule(e, id)
	one := "/v2/groups/" + id
	e.Do(apitest.Request{Method: "DELETE", Path: one + "?force=true"}).Want(204)
	for _, r := range []apitest.Request{
		{Path: one},
		{Method: "PATCH", Path: one, Body: obj{"name": "x"}, Header: map[string]string{"If-Match": "*"}},
		{Method: "DELETE", Path: one + "?force=true"},
		{Path: one + "/members"},
		{Method: "PUT", Path: one + "/members", Body: obj{"members": []obj{{"iam_id": e.Owner.IAMID, "type": "user"}}}},
		{Path: one + "/rules"},
		{Method: "POST", Path: one + "/rules", Body: ruleBody()},
		{Path: one + "/rules/" + rule},
		{Method: "PUT", Path: one + "/rules/" + rule, Body: ruleBody(), Header: map[string]string{"If-Match": "*"}},
		{Method: "DELETE", Path: one + "/rules/" + rule},
	} {
		if body := e.Do(r).Want(404); code(body) != "not_found" {
			t.Errorf("%s %s: %v", r.Method, r.Path, body)
		}
	}
	// The name is free again.
	create(e, "Auditors")
}
