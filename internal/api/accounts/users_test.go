package accounts_test

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

func users(e *apitest.Env) string { return "/v2/accounts/" + e.Owner.AccountID + "/users" }

func inviting(emails ...string) map[string]any {
	list := []any{}
	for _, m := range emails {
		list = append(list, map[string]string{"email": m, "account_role": "Member"})
	}
	return map[string]any{"users": list}
}

// invite adds a user and returns his IAM ID.
func invite(e *apitest.Env, email string) string {
	e.T.Helper()
	m := e.Do(post(users(e), inviting(email))).Want(202)
	return m["resources"].([]any)[0].(map[string]any)["id"].(string)
}

func member(e *apitest.Env, iamID string) *identity.User {
	e.T.Helper()
	u, ok := e.Config.Directory.Users.Get(directory.UserKey(e.Owner.AccountID, iamID))
	if !ok {
		e.T.Fatalf("user %s is not in the account", iamID)
	}
	return u
}

func emails(m map[string]any) []string {
	out := []string{}
	for _, u := range m["resources"].([]any) {
		out = append(out, u.(map[string]any)["email"].(string))
	}
	return out
}

func group(e *apitest.Env, name string) *access.Group {
	e.T.Helper()
	g := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: name}
	update(e, func(tx *directory.Tx) { e.Config.Directory.Groups.Put(tx, g) })
	return g
}

func settings(e *apitest.Env, change func(*identity.Settings)) {
	e.T.Helper()
	s := *e.Config.Directory.SettingsOf(e.Owner.AccountID)
	change(&s)
	update(e, func(tx *directory.Tx) { e.Config.Directory.Settings.Put(tx, &s) })
}

func TestAUserIsInvitedShownAndRemoved(t *testing.T) {
	e := start(t)
	r := e.Do(post(users(e), inviting("Ada@example.com"))).Want(202)["resources"].([]any)[0].(map[string]any)
	id := r["id"].(string)
	if !regexp.MustCompile(`^IBMid-[0-9A-F]{10}$`).MatchString(id) || r["email"] != "Ada@example.com" || r["state"] != "PENDING" {
		t.Errorf("invitation %v", r)
	}
	if u := member(e, id); !u.Invited || u.CreatedBy != e.Owner.IAMID {
		t.Errorf("user %+v", u)
	}
	m := e.Do(apitest.Request{Path: users(e) + "/" + id}).Want(200)
	for field, want := range map[string]any{
		"id": id, "iam_id": id, "realm": "IBMid", "user_id": "Ada@example.com", "email": "Ada@example.com", "state": "PENDING",
		"sub_state": "", "account_id": e.Owner.AccountID, "lastname": "", "phonenumber": "", "altphonenumber": "", "photo": "",
	} {
		if m[field] != want {
			t.Errorf("%s = %v, want %v", field, m[field], want)
		}
	}
	if last := e.Events(1)[0]; last.Action != "user-management.user.create" || last.Outcome != activity.Success || last.Target.Name != "Ada@example.com" {
		t.Errorf("event %+v", last)
	}
	e.Do(apitest.Request{Method: "DELETE", Path: users(e) + "/" + id}).Want(204)
	e.Do(apitest.Request{Path: users(e) + "/" + id}).Want(404)
	e.Do(apitest.Request{Method: "DELETE", Path: users(e) + "/" + id}).Want(404)
}

func TestARemovedUserLeavesNothingBehind(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	g := group(e, "staff")
	m := inviting("ada@example.com")
	m["access_groups"] = []string{g.ID, g.ID}
	id := e.Do(post(users(e), m)).Want(202)["resources"].([]any)[0].(map[string]any)["id"].(string)
	if got, _ := d.Groups.Get(g.ID); len(got.Members) != 1 || got.Members[0].IAMID != id || got.Members[0].Type != "user" {
		t.Fatalf("members %+v", got.Members)
	}
	e.Grant(id, "kms", "Reader")
	e.Do(post(users(e)+"/"+id+"/apikey", nil)).Want(201)
	e.Do(apitest.Request{Method: "DELETE", Path: "/v3/accounts/" + e.Owner.AccountID + "/users/" + id}).Want(204)
	got, _ := d.Groups.Get(g.ID)
	if n := len(got.Members) + d.PoliciesOfSubject.Len(directory.Key(e.Owner.AccountID, id)) + d.APIKeysByIdentity.Len(directory.Key(e.Owner.AccountID, id)); n != 0 {
		t.Errorf("%d things of the user are left", n)
	}
	if data := string(e.Events(1)[0].ResponseData); !strings.Contains(data, g.ID) || !strings.Contains(data, "ApiKey-") {
		t.Errorf("the event says %s", data)
	}
}

func TestTheOwnerCannotBeRemovedOrDisabled(t *testing.T) {
	e := start(t)
	path := users(e) + "/" + e.Owner.IAMID
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path}), 409, "account_owner")
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"state": "DISABLED"}}), 409, "account_owner")
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"state": "ACTIVE"}}).Want(204)
}

func TestAnAddressIsInAnAccountOnce(t *testing.T) {
	e := start(t)
	id := invite(e, "ada@example.com")
	wantError(t, e.Do(post(users(e), inviting("ADA@example.com"))), 409, "user_exists")
	wantError(t, e.Do(post(users(e), inviting("new@example.com", "ada@EXAMPLE.com"))), 409, "user_exists")
	wantError(t, e.Do(post(users(e), inviting("new@example.com", "New@example.com"))), 400, "invalid_body")
	if n := e.Config.Directory.UsersByAccount.Len(e.Owner.AccountID); n != 2 {
		t.Errorf("%d users; a refused invitation adds none of its addresses", n)
	}
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: users(e) + "/" + e.Owner.IAMID, Body: map[string]string{"email": "Ada@Example.com"}}), 409, "user_exists")
	// The same person in another account.
	e.Do(apitest.Request{Method: "POST", Path: "/v2/accounts/" + e.Other.AccountID + "/users", As: e.Other.IAMID, Body: inviting("ada@example.com")}).Want(202)
	e.Do(apitest.Request{Method: "DELETE", Path: users(e) + "/" + id}).Want(204)
	if again := invite(e, "ada@example.com"); again == id {
		t.Error("a user who is invited again is the one who was removed")
	}
}

func TestOfManyWhoInviteOneAddressAtOnceOneWins(t *testing.T) {
	e := start(t)
	status := make([]int, 8)
	var wg sync.WaitGroup
	for i := range status {
		wg.Go(func() { status[i] = e.Do(post(users(e), inviting("ada@example.com"))).Status })
	}
	wg.Wait()
	slices.Sort(status)
	if want := []int{202, 409, 409, 409, 409, 409, 409, 409}; !slices.Equal(status, want) {
		t.Errorf("answers %v, want %v", status, want)
	}
}

func TestAnInvitationIsRefusedForWhatItCannotDo(t *testing.T) {
	e := start(t)
	with := func(key string, value any) map[string]any {
		m := inviting("ada@example.com")
		m[key] = value
		return m
	}
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprintf("u%d@example.com", i)
	}
	for name, body := range map[string]any{
		"no users": inviting(), "too many": inviting(many...),
		"policies":             with("iam_policy", []any{map[string]any{"type": "access"}}),
		"infrastructure roles": with("infrastructure_roles", map[string]any{"permissions": []string{"x"}}),
		"organization roles":   with("organization_roles", []any{map[string]any{}}),
		"another role":         map[string]any{"users": []any{map[string]string{"email": "a@b.c", "account_role": "Owner"}}},
		"too many groups":      with("access_groups", make([]string, 51)),
	} {
		if msg := wantError(t, e.Do(post(users(e), body)), 400, "invalid_body"); msg == "" {
			t.Errorf("%s: no message", name)
		}
	}
	for _, bad := range []string{
		"", " ", "ada", "@example.com", "ada@", "ada @example.com", "Ada <ada@example.com>", "ada@example.com, bob@example.com", "a@b@c", `"a b"@c.d`,
		"ada@example.com\n", "ada@exam\x00ple.com", strings.Repeat("a", 251) + "@b.c", "a..b@c.d", "<a@b.c>",
	} {
		if r := e.Do(post(users(e), inviting(bad))); r.Status != 400 {
			t.Errorf("%q: status %d: %s", bad, r.Status, r.Raw)
		}
	}
	for _, good := range []string{"ada+x@example.com", "o'brien@example.co.uk", "a@b", "ADA_2@EXAMPLE.com"} {
		e.Do(post(users(e), inviting(good))).Want(202)
	}
}

func TestAnInvitationIntoAGroupNeedsTheRightOnTheGroup(t *testing.T) {
	e := start(t)
	g := group(e, "admins")
	theirs := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Other.AccountID, Name: "theirs"}
	update(e, func(tx *directory.Tx) { e.Config.Directory.Groups.Put(tx, theirs) })
	e.Grant(nobody, "user-management", "Editor")
	as := func(who, id string) *apitest.Response {
		m := inviting("ada@example.com")
		m["access_groups"] = []string{id}
		return e.Do(apitest.Request{Method: "POST", Path: users(e), Body: m, As: who})
	}
	absent := "AccessGroupId-" + uuid.NewString()
	for _, id := range []string{g.ID, theirs.ID, absent, ""} {
		wantError(t, as(nobody, id), 403, "not_authorized")
	}
	for _, id := range []string{theirs.ID, absent, ""} {
		wantError(t, as(e.Owner.IAMID, id), 404, "not_found")
	}
	if n := e.Config.Directory.UsersByAccount.Len(e.Owner.AccountID); n != 1 {
		t.Errorf("%d users after refused invitations", n)
	}
	e.Grant(nobody, "iam-groups", "Editor")
	as(nobody, g.ID).Want(202)
}

func TestTheAccountsDomainsRestrictWhomItInvites(t *testing.T) {
	e := start(t)
	settings(e, func(s *identity.Settings) {
		s.UserDomains = []identity.UserDomain{
			{Realm: "IBMid", Restrict: true, Patterns: []string{"*@example.com", "*.*@**.example.org"}},
			{Realm: "other", Patterns: []string{"**"}},
		}
	})
	for email, status := range map[string]int{
		"ada@example.com": 202, "BOB@EXAMPLE.COM": 202, "a.b@example.com": 403, "ada@xexample.com": 403, "ada@examplexcom": 403, "ada@example.com.evil.test": 403,
		"a.b@x.y.example.org": 202, "ab@x.example.org": 403,
	} {
		if r := e.Do(post(users(e), inviting(email))); r.Status != status {
			t.Errorf("%s: status %d, want %d: %s", email, r.Status, status, r.Raw)
		}
	}
	settings(e, func(s *identity.Settings) { s.UserDomains = []identity.UserDomain{{Realm: "IBMid", Restrict: true}} })
	wantError(t, e.Do(post(users(e), inviting("x@example.com"))), 403, "domain_restricted")
	settings(e, func(s *identity.Settings) { s.UserDomains[0].Restrict = false })
	e.Do(post(users(e), inviting("x@example.com"))).Want(202)
}

func TestUsersSeeEachOtherUnlessTheAccountRestrictsIt(t *testing.T) {
	e := start(t)
	id := invite(e, "ada@example.com")
	const software = "iam-ServiceId-0f3b1c2d-1111-4222-8333-444455556666"
	count := func(as string) int {
		return len(e.Do(apitest.Request{Path: users(e), As: as}).Want(200)["resources"].([]any))
	}
	see := func(as, whom string) int { return e.Do(apitest.Request{Path: users(e) + "/" + whom, As: as}).Status }
	if count(id) != 2 || see(id, e.Owner.IAMID) != 200 {
		t.Error("a user does not see the others")
	}
	if count(software) != 0 || see(software, e.Owner.IAMID) != 403 {
		t.Error("a service ID without the action sees users")
	}
	settings(e, func(s *identity.Settings) { s.RestrictUserList = identity.Restricted })
	if got := emails(e.Do(apitest.Request{Path: users(e), As: id}).Want(200)); !slices.Equal(got, []string{"ada@example.com"}) {
		t.Errorf("a user of a restricted account sees %v", got)
	}
	if see(id, id) != 200 || see(id, e.Owner.IAMID) != 403 || see(id, "IBMid-ABSENT0001") != 403 {
		t.Error("a user of a restricted account sees another, or that there is none")
	}
	if last := e.Events(1)[0]; last.Action != "user-management.user.retrieve" || last.Outcome != activity.Failure {
		t.Errorf("the refusal is recorded as %+v", last)
	}
	e.Grant(id, "user-management", "Viewer")
	if count(id) != 2 || see(id, e.Owner.IAMID) != 200 || see(id, "IBMid-ABSENT0001") != 404 {
		t.Error("the action does not let him see the others")
	}
}

func TestAUserIsChangedInPart(t *testing.T) {
	e := start(t)
	id := invite(e, "ada@example.com")
	path := users(e) + "/" + id
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"firstname": "Ada", "phonenumber": "+44 20"}}).Want(204)
	e.Do(apitest.Request{Method: "PUT", Path: path, Body: map[string]string{"lastname": "Lovelace"}}).Want(204)
	if u := member(e, id); u.Name != "Ada Lovelace" || u.Phone != "+44 20" || !u.Invited {
		t.Errorf("user %+v", u)
	}
	tag := e.Do(apitest.Request{Path: path}).Header.Get("ETag")
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"state": "DISABLED"}, Header: map[string]string{"If-Match": tag}}).Want(204)
	if m := e.Do(apitest.Request{Path: path}).Want(200); m["state"] != "DISABLED" || !member(e, id).Disabled {
		t.Errorf("user %v", m)
	}
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"state": "ACTIVE"}, Header: map[string]string{"If-Match": tag}}), 409, "conflict")
	e.Do(apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"state": "ACTIVE"}}).Want(204)
	if member(e, id).Disabled {
		t.Error("the user is still disabled")
	}
	for _, body := range []map[string]string{
		{"email": "x"}, {"email": ""}, {"state": "VPN_ONLY"}, {"state": ""}, {"firstname": "a\tb"}, {"lastname": strings.Repeat("x", 101)},
		{"phonenumber": strings.Repeat("1", 51)}, {"photo": "https://x.test/p.png"}, {"altphonenumber": "1"},
	} {
		wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path, Body: body}), 400, "invalid_body")
	}
}

func TestTheAddressOfAnInvitationStays(t *testing.T) {
	e := start(t)
	id := invite(e, "ada@example.com")
	path := users(e) + "/" + id
	change := apitest.Request{Method: "PATCH", Path: path, Body: map[string]string{"email": "mallory@example.com"}}
	wantError(t, e.Do(change), 409, "invitation_pending")
	u := *member(e, id)
	u.Invited = false
	update(e, func(tx *directory.Tx) { e.Config.Directory.Users.Put(tx, &u) })
	e.Do(change).Want(204)
}

func TestAnInvitedUserGetsAFirstKeyFromAnAdministratorOnce(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	id := invite(e, "ada@example.com")
	path := users(e) + "/" + id + "/apikey"
	e.Grant(nobody, "user-management", "Administrator")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: path, As: nobody}), 403, "not_authorized")
	e.Grant(nobody, "iam-identity", "Operator", "User Api Key Creator")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: path, As: nobody}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: users(e) + "/IBMid-ABSENT0001/apikey", As: nobody}), 403, "not_authorized")
	m := e.Do(apitest.Request{Method: "POST", Path: path}).Want(201)
	secret := m["apikey"].(string)
	if k, ok := d.APIKeysByHash.One(e.Sealer.Hash(secret)); !ok || k.IAMID != id || k.ID != m["id"] {
		t.Errorf("key %+v, answer %v", k, m)
	}
	event := e.Events(1)[0]
	if event.Action != "iam-identity.user-apikey.create" || event.Severity != activity.Critical || strings.Contains(string(event.ResponseData), secret) {
		t.Errorf("event %+v", event)
	}
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: path}), 409, "not_invited")
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: users(e) + "/" + e.Owner.IAMID + "/apikey"}), 409, "not_invited")
}

func TestEveryChangeOfUsersNeedsItsAction(t *testing.T) {
	e := start(t)
	id := invite(e, "ada@example.com")
	e.Grant("IBMid-VIEWER0001", "user-management", "Viewer")
	for _, as := range []string{nobody, id, "IBMid-VIEWER0001"} {
		for _, r := range []apitest.Request{
			{Method: "POST", Path: users(e), Body: inviting("bob@example.com")},
			{Method: "PATCH", Path: users(e) + "/" + id, Body: map[string]string{"firstname": "x"}},
			{Method: "PUT", Path: users(e) + "/" + id, Body: map[string]string{"firstname": "x"}},
			{Method: "DELETE", Path: users(e) + "/" + id},
			{Method: "DELETE", Path: users(e) + "/IBMid-ABSENT0001"},
			{Method: "DELETE", Path: "/v3/accounts/" + e.Owner.AccountID + "/users/" + id},
			{Method: "POST", Path: users(e) + "/" + id + "/apikey"},
		} {
			r.As = as
			wantError(t, e.Do(r), 403, "not_authorized")
			r.Anonymous = true
			e.Do(r).Want(401)
		}
	}
}

func TestTheUserListIsPagedAndSearched(t *testing.T) {
	e := start(t)
	var want []string
	for i := range 7 {
		email := fmt.Sprintf("u%d@example.com", i)
		invite(e, email)
		want = append(want, email)
	}
	get := func(q string) map[string]any { return e.Do(apitest.Request{Path: users(e) + q}).Want(200) }
	var got []string
	for path := users(e) + "?limit=3&search=" + url.QueryEscape("state:PENDING"); path != ""; {
		m := e.Do(apitest.Request{Path: path}).Want(200)
		got = append(got, emails(m)...)
		path, _ = m["next_url"].(string)
		if m["total_results"] != 7.0 || m["limit"] != 3.0 || m["first_url"] != users(e)+"?limit=3&search=state%3APENDING" {
			t.Errorf("page %v", m)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("users %v, want %v", got, want)
	}
	if m := get(""); len(emails(m)) != 8 || m["next_url"] != nil || m["first_url"] != users(e) {
		t.Errorf("list %v", m)
	}
	for q, n := range map[string]int{
		"?user_id=U3@example.com": 1, "?search=email:u1@example.com,email:u2@example.com": 2, "?search=state:ACTIVE": 1, "?search=state:active": 1,
		"?search=iam_id:" + e.Owner.IAMID: 1, "?search=realm:SL": 0, "?user_id=none": 0, "?include_settings=true": 8,
	} {
		if m := get(q); len(emails(m)) != n || m["resources"] == nil {
			t.Errorf("%s: %v, want %d", q, emails(m), n)
		}
	}
	for _, q := range []string{"?limit=0", "?limit=101", "?_start=x", "?search=state", "?search=password:x"} {
		e.Do(apitest.Request{Path: users(e) + q}).Want(400)
	}
}

func TestAFullAccountInvitesNobodyElse(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	update(e, func(tx *directory.Tx) {
		for range 7498 {
			d.Users.Put(tx, &identity.User{IAMID: bootstrap.NewUserID(), AccountID: e.Owner.AccountID})
		}
	})
	wantError(t, e.Do(post(users(e), inviting("a@b.c", "b@b.c"))), 409, "limit_exceeded")
	e.Do(post(users(e), inviting("a@b.c"))).Want(202)
	wantError(t, e.Do(post(users(e), inviting("b@b.c"))), 409, "limit_exceeded")
}
