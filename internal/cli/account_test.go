package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"

	"tabard.dev/tabard/internal/access"
)

const otherAccount = "00112233445566778899aabbccddeeff"

func accountBody(id, name, state string) map[string]any {
	return item("metadata", item("guid", id, "url", "u"), "entity", item("name", name, "state", state, "owner_userid", "ada@example.com"))
}

func TestAnAccountIsMadeAndItsOwnersKeyIsShownOnceOrWrittenToAFile(t *testing.T) {
	s := newServer(t)
	s.login()
	made := accountBody(otherAccount, "acme", "ACTIVE")
	made["owner"] = item("name", "acme", "account_id", otherAccount, "iam_id", "IBMid-1", "apikey", "the-new-owners-secret", "url", "u")
	s.answer("POST /v1/accounts", reply{status: 201, body: made})
	for _, words := range [][]string{{"account-create"}, {"account", "create"}} {
		run(t, append(words, "acme", "--owner-email", "ada@example.com", "--owner-name", "Ada")...).want(0, otherAccount, "the-new-owners-secret", "cannot be shown again")
		wantBody(t, s.sent("POST /v1/accounts"), item("name", "acme", "owner", item("email", "ada@example.com", "name", "Ada")))
		run(t, append(words, "acme")...).want(2, "owner-email")
	}
	r := run(t, "account-create", "acme", "--owner-email", "ada@example.com", "--file", "acme.json", "--output", "json").want(0, otherAccount)
	if strings.Contains(r.stdout, "the-new-owners-secret") {
		t.Errorf("the key is shown: %s", r.stdout)
	}
	info, err := os.Stat("acme.json")
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("file %v, error %v", info, err)
	}
	b, err := os.ReadFile("acme.json")
	if err != nil {
		t.Fatal(err)
	}
	var owner map[string]any
	if err := json.Unmarshal(b, &owner); err != nil || owner["apikey"] != "the-new-owners-secret" {
		t.Errorf("the file has %s", b)
	}
	run(t, "login", "-a", s.URL, "--apikey", "@acme.json").want(0)
	if got := s.sent("POST /identity/token").Body; !strings.Contains(got, "the-new-owners-secret") {
		t.Errorf("logged in with %s", got)
	}
}

func TestAccountsAreListedShownClosedAndReopenedByNameOrID(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/accounts", list("resources", accountBody(account, "mine", "ACTIVE"), accountBody(otherAccount, "acme", "CLOSED")))
	s.answer("GET /v1/accounts/"+account, accountBody(account, "mine", "ACTIVE"))
	s.answer("DELETE /v1/accounts/"+otherAccount, reply{status: 204})
	s.answer("POST /v1/accounts/"+otherAccount+"/reopen", accountBody(otherAccount, "acme", "ACTIVE"))
	run(t, "account", "list").want(0, "mine", otherAccount, "CLOSED")
	run(t, "account", "show").want(0, "mine")
	run(t, "account", "show", "mine").want(0, account)
	run(t, "account", "close", "acme").want(1, "needs a confirmation")
	run(t, "account", "close", "acme", "-f").want(0, "Account acme was closed")
	run(t, "account", "reopen", otherAccount).want(0, "reopened")
	run(t, "account", "close", "absent", "-f").want(1, `no account has the name or ID "absent"`, "tabard account list")
}

func TestUsersAreInvitedChangedAndRemovedByTheirAddresses(t *testing.T) {
	s := newServer(t)
	s.login()
	users := "/v2/accounts/" + account + "/users"
	ada := item("id", "IBMid-1", "iam_id", "IBMid-1", "user_id", "ada@example.com", "email", "ada@example.com", "state", "PENDING")
	s.answer("GET "+users, func(r seen) any {
		if id := r.Query.Get("user_id"); id != "" && id != "ada@example.com" {
			return list("resources")
		}
		return list("resources", ada)
	})
	s.answer("GET "+users+"/IBMid-1", ada)
	s.answer("GET /v2/groups", list("groups", item("id", "AccessGroupId-"+uuidA, "name", "developers")))
	s.answer("POST "+users, reply{status: 202, body: list("resources", item("email", "ada@example.com", "id", "IBMid-1", "state", "PENDING"))})
	s.answer("PATCH "+users+"/IBMid-1", reply{status: 204})
	s.answer("DELETE "+users+"/IBMid-1", reply{status: 204})
	s.answer("POST "+users+"/IBMid-1/apikey", reply{status: 201, body: item("id", "ApiKey-"+uuidA, "name", "invitation", "iam_id", "IBMid-1", "apikey", "first-secret")})

	run(t, "account", "users").want(0, "ada@example.com", "PENDING")
	run(t, "account", "user", "ada@example.com").want(0, "IBMid-1")
	run(t, "account", "user", "bob@example.com").want(1, "no user of the account", "tabard account users")
	run(t, "account", "user-invite", "ada@example.com", "--access-groups", "developers").want(0, "IBMid-1")
	wantBody(t, s.sent("POST "+users), item("users", []any{item("email", "ada@example.com", "account_role", "Member")}, "access_groups", []any{"AccessGroupId-" + uuidA}))
	run(t, "account", "user-update", "ada@example.com", "--state", "Disabled", "--first-name", "").want(0, "updated")
	wantBody(t, s.sent("PATCH "+users+"/IBMid-1"), item("state", "DISABLED", "firstname", ""))
	run(t, "account", "user-update", "ada@example.com").want(2, "nothing to change")
	run(t, "account", "user-api-key-create", "IBMid-1").want(0, "first-secret")
	if out := run(t, "account", "user-api-key-create", "ada@example.com", "--file", "ada.json").want(0).stdout; strings.Contains(out, "first-secret") {
		t.Errorf("the key is shown: %s", out)
	}
	run(t, "login", "-a", s.URL, "--apikey", "@ada.json").want(0)
	run(t, "account", "user-remove", "ada@example.com").want(1, "needs a confirmation")
	run(t, "account", "user-remove", "ada@example.com", "-f").want(0, "was removed")
}

func TestAnIdentityProviderIsGivenItsKeysFromAFile(t *testing.T) {
	s := newServer(t)
	s.login()
	corp := item("id", "Idp-"+uuidA, "name", "corp", "issuer", "https://corp.test", "audience", "tabard", "enabled", true, "entity_tag", "1-a")
	s.answer("POST /v1/idps", reply{status: 201, body: corp})
	s.answer("GET /v1/idps", list("idps", corp))
	s.answer("GET /v1/idps/Idp-"+uuidA, reply{body: corp, status: 200, header: map[string]string{"ETag": "1-a"}})
	s.answer("PUT /v1/idps/Idp-"+uuidA, corp)
	s.answer("DELETE /v1/idps/Idp-"+uuidA, reply{status: 204})
	if err := os.WriteFile("jwks.json", []byte(`{"keys":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "account", "idp-create", "corp", "--issuer", "https://corp.test", "--audience", "tabard", "--jwks", "jwks.json").want(0, "Idp-"+uuidA)
	wantBody(t, s.sent("POST /v1/idps"), item("name", "corp", "issuer", "https://corp.test", "audience", "tabard", "jwks", item("keys", []any{})))
	run(t, "account", "idp-create", "corp", "--issuer", "https://corp.test").want(2, "audience")
	run(t, "account", "idps").want(0, "corp")
	run(t, "account", "idp-update", "corp", "--enabled", "false").want(0)
	put := s.sent("PUT /v1/idps/Idp-" + uuidA)
	wantBody(t, put, item("enabled", false))
	if got := put.Header.Get("If-Match"); got != "1-a" {
		t.Errorf("If-Match %q", got)
	}
	run(t, "account", "idp-update", "corp").want(2, "nothing to change")
	run(t, "account", "idp-delete", "corp", "-f").want(0)
}

func TestAServiceIsRegisteredFromYAMLOrJSONWithKnownKeysOnly(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("POST /v1/services", reply{status: 201, body: item("name", "library", "custom", true, "service_roles", item("Reader", item()))})
	s.answer("GET /v1/services/library", reply{status: 200, body: item("name", "library"), header: map[string]string{"ETag": "1-a"}})
	s.answer("PUT /v1/services/library", item("name", "library"))
	s.answer("DELETE /v1/services/library", reply{status: 204})
	var d access.Definition
	if err := yaml.Unmarshal([]byte(serviceFile), &d); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("library.yaml", []byte(serviceFile), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "iam", "service-register", "-f", "library.yaml").want(0, "library", "Reader")
	var got access.Definition
	if err := json.Unmarshal([]byte(s.sent("POST /v1/services").Body), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(d, got); diff != "" {
		t.Error(diff)
	}
	run(t, "iam", "service-register", "-f", "library.yaml", "--replace").want(0)
	if got := s.sent("PUT /v1/services/library").Header.Get("If-Match"); got != "1-a" {
		t.Errorf("If-Match %q", got)
	}
	runWith(t, strings.NewReader(`{"name":"library","kind":"service","actions":[{"id":"library.a.b"}]}`), "iam", "service-register", "-f", "-").want(0, "library")
	for text, says := range map[string]string{
		"name: library\nrolls: {}\n": "rolls", "": "empty", "[1]": "", "name: a\n---\nname: b\n": "more than one", "kind: service\n": "no name", "\x00": "",
	} {
		file := filepath.Join(t.TempDir(), "bad.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "iam", "service-register", "-f", file).want(1, says, "is not the definition of a service")
	}
	run(t, "iam", "service-register", "-f", "absent.yaml").want(1, "absent.yaml")
	run(t, "iam", "service-register").want(2, "file")
	run(t, "iam", "service-get", "library").want(0, "library")
	run(t, "iam", "service-unregister", "library", "-f").want(0, "was unregistered")
}

func TestTheDefinitionThatTheHelpShowsIsAValidOne(t *testing.T) {
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseService(serviceFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := (&access.RegisteredService{Definition: d}).Validate(catalog); err != nil {
		t.Error(err)
	}
	run(t, "iam", "service-register", "--help").want(0, "library.book.read")
}
