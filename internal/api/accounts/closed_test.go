package accounts_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/accounts"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iamtoken"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/token"
)

// issuing starts an installation whose tokens are real ones.
func issuing(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	d := e.Config.Directory
	keys, err := token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: d, Sealer: e.Sealer, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	if err != nil {
		t.Fatal(err)
	}
	const issuer = "http://tabard.test/identity"
	clusterKeys := &attest.Keys{Now: time.Now}
	grants := grant.New(grant.Config{
		Directory: d,
		Workloads: &attest.Workloads{Clusters: d, Keys: clusterKeys, Now: time.Now},
		Instances: &attest.Instances{Hosts: d, Region: "us-south", Now: time.Now},
		Tokens:    &token.Issuer{Keys: keys, URL: issuer, Now: time.Now},
		Sealer:    e.Sealer, Journal: e.Config.Journal, Names: crn.DefaultNames, Now: time.Now, OperatorAccount: e.Owner.AccountID,
	})
	e.Config.Auth = grants
	iamtoken.Register(e.Mux, iamtoken.Config{Grants: grants, Keys: keys, Issuer: issuer, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
	accounts.Register(e.Mux, e.Config, e.Sealer, clusterKeys)
	return e
}

// login returns an access token and the status of the attempt.
func login(e *apitest.Env, key string) (string, int) {
	e.T.Helper()
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}}
	r := e.Do(apitest.Request{
		Method: "POST", Path: "/identity/token", Body: form.Encode(), Anonymous: true,
		Header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
	})
	if r.Status != http.StatusOK {
		return "", r.Status
	}
	return r.Want(200)["access_token"].(string), r.Status
}

// call makes a request with an access token and returns its status.
func call(e *apitest.Env, method, path, accessToken string) int {
	e.T.Helper()
	req := httptest.NewRequestWithContext(e.T.Context(), method, path, strings.NewReader(""))
	req.Header.Set("Authorization", "Bearer "+accessToken)
	rec := httptest.NewRecorder()
	api.WithTransaction(e.Mux).ServeHTTP(rec, req)
	return rec.Code
}

func TestAClosedAccountsKeysAndTokensAreRefusedUntilItIsReopened(t *testing.T) {
	e := issuing(t)
	operator, _ := login(e, e.Owner.APIKey)
	theirs, _ := login(e, e.Other.APIKey)
	own := "/v1/accounts/" + e.Other.AccountID
	if got := call(e, "GET", own, theirs); got != 200 {
		t.Fatalf("status %d before the account was closed", got)
	}
	if got := call(e, "DELETE", own, operator); got != 204 {
		t.Fatalf("closing: status %d", got)
	}
	if got := call(e, "GET", own, theirs); got != 401 {
		t.Errorf("a token of a closed account: status %d, want 401", got)
	}
	if _, got := login(e, e.Other.APIKey); got < 400 || got >= 500 {
		t.Errorf("an API key of a closed account: status %d, want a refusal", got)
	}
	if got := call(e, "POST", own+"/reopen", operator); got != 200 {
		t.Fatalf("reopening: status %d", got)
	}
	again, got := login(e, e.Other.APIKey)
	if got != 200 || call(e, "GET", own, again) != 200 {
		t.Errorf("the key of a reopened account: status %d", got)
	}
}

func TestAnOwnerThatTheOperatorMadeLogsInAndInvites(t *testing.T) {
	e := issuing(t)
	operator, _ := login(e, e.Owner.APIKey)
	post := func(path, accessToken, body string) *apitest.Response {
		return e.Do(apitest.Request{Method: "POST", Path: path, Body: body, Header: map[string]string{"Authorization": "Bearer " + accessToken}})
	}
	m := post("/v1/accounts", operator, `{"name":"New","owner":{"email":"ada@example.com","name":"Ada"}}`).Want(201)
	made := m["owner"].(map[string]any)
	owner, status := login(e, made["apikey"].(string))
	if status != 200 {
		t.Fatalf("the new owner's login: status %d", status)
	}
	list := "/v2/accounts/" + made["account_id"].(string) + "/users"
	id := post(list, owner, `{"users":[{"email":"bob@example.com"}]}`).Want(202)["resources"].([]any)[0].(map[string]any)["id"].(string)
	key := post(list+"/"+id+"/apikey", owner, "").Want(201)["apikey"].(string)
	user, status := login(e, key)
	if status != 200 || call(e, "GET", list, user) != 200 {
		t.Fatalf("the invited user's login: status %d", status)
	}
	if got := call(e, "DELETE", list+"/"+id, owner); got != 204 {
		t.Fatalf("removal: status %d", got)
	}
	if got := call(e, "GET", list, user); got != 401 {
		t.Errorf("the token of a removed user: status %d, want 401", got)
	}
	if _, got := login(e, key); got == 200 {
		t.Error("the key of a removed user is good")
	}
}
