package accounts_test

import (
	"context"
	"encoding/json"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/accounts"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
)

const nobody = "IBMid-NOBODY"

func start(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	accounts.Register(e.Mux, e.Config, e.Sealer, &attest.Keys{Now: time.Now})
	return e
}

func update(e *apitest.Env, f func(tx *directory.Tx)) {
	e.T.Helper()
	if err := e.Config.Directory.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		e.T.Fatal(err)
	}
}

// wantError returns the message of a refusal.
func wantError(t *testing.T, r *apitest.Response, status int, code string) string {
	t.Helper()
	entries, _ := r.Want(status)["errors"].([]any)
	if len(entries) != 1 {
		t.Fatalf("error has the wrong shape: %s", r.Raw)
	}
	entry := entries[0].(map[string]any)
	if entry["code"] != code {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
	return entry["message"].(string)
}

func post(path string, body any) apitest.Request {
	return apitest.Request{Method: "POST", Path: path, Body: body}
}

// account makes an account through the API.
func account(e *apitest.Env, name string) bootstrap.Owner {
	e.T.Helper()
	r := e.Do(post("/v1/accounts", map[string]any{"name": name, "owner": map[string]string{"email": "ada@example.com", "name": "Ada Lovelace"}}))
	r.Want(201)
	var b struct{ Owner bootstrap.Owner }
	if err := json.Unmarshal(r.Raw, &b); err != nil {
		e.T.Fatal(err)
	}
	return b.Owner
}

func names(m map[string]any) []string {
	out := []string{}
	for _, a := range m["resources"].([]any) {
		out = append(out, a.(map[string]any)["entity"].(map[string]any)["name"].(string))
	}
	return out
}

func TestTheOperatorMakesAnAccountThatItsOwnerCanUseAtOnce(t *testing.T) {
	e := start(t)
	r := e.Do(post("/v1/accounts", map[string]any{"name": "Wölfe & Söhne", "owner": map[string]string{"email": "ada@example.com", "name": "Ada Lovelace"}}))
	m := r.Want(201)
	owner := m["owner"].(map[string]any)
	id, iamID, key := owner["account_id"].(string), owner["iam_id"].(string), owner["apikey"].(string)
	if owner["name"] != "Wölfe & Söhne" || owner["url"] != "http://tabard.test" || len(owner) != 5 {
		t.Errorf("owner %v is not the file that a first start writes", owner)
	}
	if m["metadata"].(map[string]any)["guid"] != id {
		t.Errorf("metadata %v", m["metadata"])
	}
	for field, want := range map[string]any{"name": "Wölfe & Söhne", "state": "ACTIVE", "owner": iamID, "owner_iam_id": iamID, "owner_userid": "ada@example.com"} {
		if got := m["entity"].(map[string]any)[field]; got != want {
			t.Errorf("entity.%s = %v, want %v", field, got, want)
		}
	}
	d := e.Config.Directory
	if k, ok := d.APIKeysByHash.One(e.Sealer.Hash(key)); !ok || k.AccountID != id || k.IAMID != iamID {
		t.Errorf("API key %+v", k)
	}
	if u, ok := d.Users.Get(directory.UserKey(id, iamID)); !ok || u.Name != "Ada Lovelace" || u.Email != "ada@example.com" {
		t.Errorf("owner %+v", u)
	}
	for _, action := range []string{"iam.policy.create", "iam-identity.profile.create"} {
		q := access.Request{Subject: iamID, AccountID: id, Action: action, Resource: map[string]string{access.AccountID: id, access.ServiceName: "iam-identity"}}
		if !access.Decide(d, q).Allowed {
			t.Errorf("the owner may not %s in his account", action)
		}
	}
	if a, _ := d.Accounts.Get(id); a.CreatedBy != e.Owner.IAMID {
		t.Errorf("created by %s, want the operator", a.CreatedBy)
	}
}

func TestACreationIsInTheLogsOfTheOperatorAndOfTheNewAccount(t *testing.T) {
	e := start(t)
	r := e.Do(post("/v1/accounts", map[string]any{"name": "New", "owner": map[string]string{"email": "ada@example.com"}}))
	owner := r.Want(201)["owner"].(map[string]any)
	mine := e.Events(1)[0]
	stored, err := e.Store.Events(context.Background(), store.Query{AccountID: owner["account_id"].(string), Limit: 5})
	if err != nil || len(stored) != 1 {
		t.Fatalf("%d events in the new account, error %v", len(stored), err)
	}
	var theirs activity.Event
	if err := json.Unmarshal(stored[0].Doc, &theirs); err != nil {
		t.Fatal(err)
	}
	if mine.Action != "installation.account.create" || mine.Outcome != activity.Success || mine.Target.Name != "New" {
		t.Errorf("the operator's event %+v", mine)
	}
	if theirs.Action != "iam-identity.account.create" || theirs.Initiator.ID != e.Owner.IAMID || theirs.CorrelationID != mine.CorrelationID {
		t.Errorf("the account's event %+v", theirs)
	}
	for _, doc := range []any{mine, theirs} {
		if b, _ := json.Marshal(doc); strings.Contains(string(b), owner["apikey"].(string)) {
			t.Errorf("the API key stands in the event %s", b)
		}
	}
}

func TestOnlyTheOperatorsAccountCanMakeListAndCloseAccounts(t *testing.T) {
	e := start(t)
	third := account(e, "Third")
	for _, id := range []string{"", e.Other.AccountID, e.Owner.AccountID, third.AccountID, bootstrap.NewAccountID(), "nonsense"} {
		for _, r := range []apitest.Request{
			post("/v1/accounts", map[string]any{"name": "x", "owner": map[string]string{"email": "a@b.c"}}),
			{Method: "DELETE", Path: "/v1/accounts/" + id},
			{Method: "POST", Path: "/v1/accounts/" + id + "/reopen"},
		} {
			if id == "" && r.Body == nil {
				continue
			}
			r.As = e.Other.IAMID // Administrator on everything in his account
			wantError(t, e.Do(r), 403, "not_authorized")
		}
	}
	for _, path := range []string{"/v1/accounts", "/coe/v2/accounts"} {
		if got := names(e.Do(apitest.Request{Path: path, As: e.Other.IAMID}).Want(200)); !slices.Equal(got, []string{"Other"}) {
			t.Errorf("another account's owner sees the accounts %v", got)
		}
		if got := names(e.Do(apitest.Request{Path: path}).Want(200)); !slices.Equal(got, []string{"Test", "Other", "Third"}) {
			t.Errorf("the operator sees the accounts %v", got)
		}
		if got := names(e.Do(apitest.Request{Path: path, As: nobody}).Want(200)); !slices.Equal(got, []string{"Test"}) {
			t.Errorf("somebody without rights in the operator's account sees the accounts %v", got)
		}
	}
	event := e.Do(apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + third.AccountID, As: nobody})
	wantError(t, event, 403, "not_authorized")
	if last := e.Events(1)[0]; last.Action != "installation.account.close" || last.Outcome != activity.Failure {
		t.Errorf("the refusal is recorded as %+v", last)
	}
}

func TestThePoliciesOfAnotherAccountGiveNothingOnTheInstallation(t *testing.T) {
	e := start(t)
	update(e, func(tx *directory.Tx) {
		for _, id := range []string{e.Other.AccountID, e.Owner.AccountID} {
			e.Config.Directory.Policies.Put(tx, &access.Policy{
				ID: uuid.NewString(), AccountID: e.Other.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
				Subject: []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(e.Other.IAMID)}},
				Resource: []access.Attribute{
					{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("installation")},
					{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(id)},
				},
				Roles: []string{access.PlatformRoleCRN("Administrator")},
			})
		}
	})
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + e.Owner.AccountID, As: e.Other.IAMID}), 403, "not_authorized")
	e.Do(apitest.Request{Path: "/v1/accounts/" + e.Owner.AccountID, As: e.Other.IAMID}).Want(404)
}

func TestAViewerOfTheInstallationSeesAllAccountsAndClosesNone(t *testing.T) {
	e := start(t)
	e.Grant(nobody, "installation", "Viewer")
	if got := names(e.Do(apitest.Request{Path: "/v1/accounts", As: nobody}).Want(200)); len(got) != 2 {
		t.Errorf("accounts %v", got)
	}
	e.Do(apitest.Request{Path: "/v1/accounts/" + e.Other.AccountID, As: nobody}).Want(200)
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + e.Other.AccountID, As: nobody}), 403, "not_authorized")
}

func TestEverybodyLooksUpHisOwnAccountAndNoOther(t *testing.T) {
	e := start(t)
	for _, path := range []string{"/v1/accounts/", "/coe/v2/accounts/", "/v4/accounts/"} {
		e.Do(apitest.Request{Path: path + e.Other.AccountID, As: e.Other.IAMID}).Want(200)
		e.Do(apitest.Request{Path: path + e.Owner.AccountID, As: nobody}).Want(200)
		for _, as := range []string{nobody, e.Other.IAMID} {
			for _, id := range []string{e.Owner.AccountID, e.Other.AccountID} {
				r := apitest.Request{Path: path + id, As: as}
				if as == e.Other.IAMID && id == e.Other.AccountID || as == nobody && id == e.Owner.AccountID {
					continue
				}
				wantError(t, e.Do(r), 404, "not_found")
			}
		}
		e.Do(apitest.Request{Path: path + e.Other.AccountID}).Want(200) // the operator
		e.Do(apitest.Request{Path: path + e.Other.AccountID, Anonymous: true}).Want(401)
	}
}

func TestTheAccountLookUpHasEveryFieldThatItsClientRequires(t *testing.T) {
	e := start(t)
	m := e.Do(apitest.Request{Path: "/v4/accounts/" + e.Owner.AccountID}).Want(200)
	for field, want := range map[string]any{
		"name": "Test", "id": e.Owner.AccountID, "owner": e.Owner.IAMID, "owner_iamid": e.Owner.IAMID, "type": "STANDARD", "status": "ACTIVE",
		"linked_softlayer_account": "", "team_directory_enabled": true,
	} {
		if m[field] != want {
			t.Errorf("%s = %v, want %v", field, m[field], want)
		}
	}
	if m["owner_userid"] == "" || len(m["traits"].(map[string]any)) != 3 {
		t.Errorf("account %v", m)
	}
}

func TestTheAccountListIsPagedWithRelativeURLs(t *testing.T) {
	e := start(t)
	for _, name := range []string{"C", "D", "E"} {
		account(e, name)
	}
	var got []string
	path := "/coe/v2/accounts?limit=2"
	for path != "" {
		m := e.Do(apitest.Request{Path: path}).Want(200)
		got = append(got, names(m)...)
		path, _ = m["next_url"].(string)
		if path != "" && !strings.HasPrefix(path, "/coe/v2/accounts?") {
			t.Fatalf("next_url %q", path)
		}
		if m["total_results"] != 5.0 || m["limit"] != 2.0 {
			t.Errorf("page %v", m)
		}
	}
	if !slices.Equal(got, []string{"Test", "Other", "C", "D", "E"}) {
		t.Errorf("accounts %v", got)
	}
}

func TestAnAccountIsClosedAndReopenedWithNothingLost(t *testing.T) {
	e := start(t)
	o := account(e, "Third")
	path := "/v1/accounts/" + o.AccountID
	keys := e.Config.Directory.APIKeysByAccount.Len(o.AccountID)
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(204)
	m := e.Do(apitest.Request{Path: path}).Want(200)["entity"].(map[string]any)
	if m["state"] != "CLOSED" || m["closed_at"] == nil {
		t.Errorf("closed account %v", m)
	}
	if a, _ := e.Config.Directory.Accounts.Get(o.AccountID); !a.Closed() {
		t.Error("the account is not closed")
	}
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: path}), 409, "conflict")
	if m := e.Do(apitest.Request{Method: "POST", Path: path + "/reopen"}).Want(200)["entity"].(map[string]any); m["state"] != "ACTIVE" || m["closed_at"] != nil {
		t.Errorf("reopened account %v", m)
	}
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: path + "/reopen"}), 409, "conflict")
	if got := e.Config.Directory.APIKeysByAccount.Len(o.AccountID); got != keys {
		t.Errorf("%d API keys, had %d", got, keys)
	}
	var got []string
	for _, event := range e.Events(4) {
		got = append(got, event.Action+" "+event.Outcome)
	}
	if want := []string{
		"installation.account.reopen failure", "installation.account.reopen success", "installation.account.close failure", "installation.account.close success",
	}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestTheOperatorsOwnAccountStaysOpen(t *testing.T) {
	e := start(t)
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + e.Owner.AccountID}), 409, "operator_account")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + bootstrap.NewAccountID()}), 404, "not_found")
	stale := apitest.Request{Method: "DELETE", Path: "/v1/accounts/" + e.Other.AccountID, Header: map[string]string{"If-Match": "1-old"}}
	wantError(t, e.Do(stale), 409, "conflict")
}

func TestAnAccountNeedsANameAndAnOwnersAddress(t *testing.T) {
	e := start(t)
	for _, body := range []any{
		"", "null", "[]", "{", `"x"`, `{"name":1}`, map[string]any{"name": "x"}, map[string]any{"name": "x", "owner": "me"},
		map[string]any{"name": "", "owner": map[string]string{"email": "a@b.c"}},
		map[string]any{"name": " x", "owner": map[string]string{"email": "a@b.c"}},
		map[string]any{"name": "a\nb", "owner": map[string]string{"email": "a@b.c"}},
		map[string]any{"name": strings.Repeat("x", 101), "owner": map[string]string{"email": "a@b.c"}},
		map[string]any{"name": "x", "owner": map[string]string{"email": "Ada <a@b.c>"}},
		map[string]any{"name": "x", "owner": map[string]string{"email": "a@b.c", "name": "\x00"}},
	} {
		e.Do(post("/v1/accounts", body)).Want(400)
	}
	e.Do(post("/v1/accounts", `{"name":"`+strings.Repeat("x", 10<<20)+`"}`)).Want(413)
	if n := e.Config.Directory.Accounts.Len(); n != 2 {
		t.Errorf("%d accounts", n)
	}
	e.Do(post("/v1/accounts", map[string]any{"name": printable(100), "owner": map[string]string{"email": "a@b.c"}})).Want(201)
}

// printable returns n printable characters, all kinds of them.
func printable(n int) string {
	var b strings.Builder
	for i := range n {
		b.WriteRune(rune('!' + i))
	}
	return strings.ReplaceAll(b.String(), "\x7f", "é")
}

// route is one that names an account, or an object of one.
type route struct {
	method, path string
	body         any
}

func TestAnotherAccountsIDsAnswerLikeUnknownOnes(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	third := account(e, "Third")
	theirs := &identity.User{IAMID: "IBMid-THEIRS0001", AccountID: e.Other.AccountID, Email: "x@y.z", Name: "x", Invited: true}
	provider := &identity.Provider{ID: "Idp-" + uuid.NewString(), AccountID: e.Other.AccountID, Name: "theirs", Issuer: "https://x.test", Audience: "a"}
	mine := &identity.User{IAMID: "IBMid-MINE000001", AccountID: e.Owner.AccountID, Email: "m@y.z", Name: "m"}
	update(e, func(tx *directory.Tx) {
		d.Users.Put(tx, theirs)
		d.Users.Put(tx, mine)
		d.Providers.Put(tx, provider)
	})
	invitation := map[string]any{"users": []any{map[string]string{"email": "new@y.z"}}}
	patch := map[string]any{"firstname": "x"}
	routes := func(acct, user, idp string) []route {
		users := "/v2/accounts/" + acct + "/users"
		return []route{
			{"GET", users, nil},
			{"POST", users, invitation},
			{"GET", users + "/" + user, nil},
			{"PATCH", users + "/" + user, patch},
			{"PUT", users + "/" + user, patch},
			{"DELETE", users + "/" + user, nil},
			{"DELETE", "/v3/accounts/" + acct + "/users/" + user, nil},
			{"POST", users + "/" + user + "/apikey", nil},
			{"GET", "/v1/idps/" + idp, nil},
			{"PUT", "/v1/idps/" + idp, map[string]any{"name": "x"}},
			{"DELETE", "/v1/idps/" + idp, nil},
			{"GET", "/v1/idps?account_id=" + acct, nil},
			{"POST", "/v1/idps", map[string]any{"account_id": acct, "name": "x", "issuer": "https://x.test", "audience": "a"}},
		}
	}
	unknown := bootstrap.NewAccountID()
	foreign := routes(e.Other.AccountID, theirs.IAMID, provider.ID)
	absent := routes(unknown, "IBMid-ABSENT0001", "Idp-"+uuid.NewString())
	for i := range foreign {
		a := e.Do(apitest.Request{Method: foreign[i].method, Path: foreign[i].path, Body: foreign[i].body})
		b := e.Do(apitest.Request{Method: absent[i].method, Path: absent[i].path, Body: absent[i].body})
		if a.Status != 404 || alike(a.Raw) != alike(b.Raw) || a.Status != b.Status {
			t.Errorf("%s %s: %d %s\nunknown: %d %s", foreign[i].method, foreign[i].path, a.Status, a.Raw, b.Status, b.Raw)
		}
	}
	// The ids of the objects alone, in one's own account.
	for _, r := range routes(e.Owner.AccountID, theirs.IAMID, provider.ID)[2:8] {
		e.Do(apitest.Request{Method: r.method, Path: r.path, Body: r.body}).Want(404)
	}
	// And the ids of the other accounts, for somebody who is no operator.
	for _, path := range []string{"/v1/accounts/", "/coe/v2/accounts/", "/v4/accounts/"} {
		a := e.Do(apitest.Request{Path: path + third.AccountID, As: e.Other.IAMID})
		b := e.Do(apitest.Request{Path: path + unknown, As: e.Other.IAMID})
		if a.Status != 404 || alike(a.Raw) != alike(b.Raw) {
			t.Errorf("%s: %d %s\nunknown: %s", path, a.Status, a.Raw, b.Raw)
		}
	}
	if got, _ := d.Users.Get(directory.UserKey(e.Other.AccountID, theirs.IAMID)); got.Revision != theirs.Revision {
		t.Error("another account's user was changed")
	}
	if e.Do(apitest.Request{Path: "/v2/accounts/" + e.Owner.AccountID + "/users/" + mine.IAMID}).Status != http.StatusOK {
		t.Error("one's own user is not found")
	}
}

// alike takes out of an answer what every request has of its own.
func alike(raw []byte) string {
	ids := regexp.MustCompile(`[0-9a-f]{32}|IBMid-[A-Z0-9]+|Idp-[0-9a-f-]+`)
	return ids.ReplaceAllString(string(raw), "ID")
}

func TestNothingHostileIsAnsweredWithAnInternalError(t *testing.T) {
	e := start(t)
	users := "/v2/accounts/" + e.Owner.AccountID + "/users"
	provider := addProvider(e)
	paths := []route{
		{"POST", "/v1/accounts", nil}, {"POST", users, nil}, {"PATCH", users + "/" + e.Owner.IAMID, nil},
		{"POST", "/v1/idps", nil}, {"PUT", "/v1/idps/" + provider, nil},
	}
	bodies := []string{
		"", "null", "0", "true", `"x"`, "[]", "[null]", "{", "{}}", `{"a":1,"A":2}`, `{"users":null}`, `{"users":[null]}`, `{"users":[[]]}`,
		`{"users":{}}`, `{"users":[{"email":null}]}`, `{"users":[{"email":"a@b.c","account_role":7}]}`, `{"access_groups":[null],"users":[{"email":"q@b.c"}]}`,
		`{"name":null,"issuer":null}`, `{"jwks":[]}`, `{"jwks":{"keys":[{}]}}`, `{"jwks":"x"}`, `{"ca":"x"}`, `{"ca":7}`, `{"enabled":"yes"}`,
		`{"state":"\u0000"}`, `{"firstname":"\ud800"}`, "\xff\xfe", strings.Repeat("[", 100000), `{"name":"` + strings.Repeat("\\u0000", 1000) + `"}`,
	}
	for _, p := range paths {
		for _, body := range bodies {
			r := e.Do(apitest.Request{Method: p.method, Path: p.path, Body: body, Header: map[string]string{"If-Match": "*"}})
			if r.Status >= 500 {
				t.Errorf("%s %s %.60q: %d %s", p.method, p.path, body, r.Status, r.Raw)
			}
		}
	}
	for _, q := range []string{"?limit=x", "?limit=0", "?limit=101", "?_start=x", "?_start=e30", "?search=x", "?search=:", "?search=state", "?user_id=%00", "?search=state:%FF"} {
		for _, p := range []string{users, "/v1/accounts", "/coe/v2/accounts", "/v1/idps"} {
			if r := e.Do(apitest.Request{Path: p + q}); r.Status >= 500 {
				t.Errorf("GET %s: %d %s", p+q, r.Status, r.Raw)
			}
		}
	}
}
