package accounts_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/api/apitest"
)

// keySet returns a set with one public key.
func keySet(t testing.TB) json.RawMessage {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: rand.Text(), Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// issuer is an OpenID Connect issuer over TLS that counts its requests.
type issuer struct {
	*httptest.Server
	ca   string
	hits atomic.Int32
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i, keys := &issuer{}, keySet(t)
	i.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.hits.Add(1)
		if r.URL.Path == "/keys" {
			_, _ = w.Write(keys)
			return
		}
		_, _ = fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/keys")
	}))
	i.Config.ErrorLog = log.New(io.Discard, "", 0) // a refused certificate is expected
	i.StartTLS()
	i.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
	t.Cleanup(i.Close)
	return i
}

func provider(t testing.TB, name string) map[string]any {
	return map[string]any{"name": name, "issuer": "https://" + name + ".test", "audience": "tabard", "jwks": keySet(t)}
}

// addProvider adds one with uploaded keys and returns its id.
func addProvider(e *apitest.Env) string {
	e.T.Helper()
	return e.Do(post("/v1/idps", provider(e.T, "corp"))).Want(201)["id"].(string)
}

func TestAnIdentityProviderIsAddedShownChangedAndRemoved(t *testing.T) {
	e := start(t)
	body := provider(t, "corp")
	r := e.Do(post("/v1/idps/", body))
	m := r.Want(201)
	id := m["id"].(string)
	for field, want := range map[string]any{
		"name": "corp", "account_id": e.Owner.AccountID, "issuer": "https://corp.test", "audience": "tabard", "enabled": true,
		"crn": "crn:v1:bluemix:public:iam-identity::a/" + e.Owner.AccountID + "::idp:" + id, "created_by": e.Owner.IAMID,
	} {
		if m[field] != want {
			t.Errorf("%s = %v, want %v", field, m[field], want)
		}
	}
	path := "/v1/idps/" + id
	got := e.Do(apitest.Request{Path: path})
	if got.Want(200)["entity_tag"] != m["entity_tag"] || got.Header.Get("ETag") != r.Header.Get("ETag") {
		t.Errorf("shown as %s", got.Raw)
	}
	tag := map[string]string{"If-Match": got.Header.Get("ETag")}
	e.Do(apitest.Request{Method: "PUT", Path: path, Body: map[string]any{"enabled": false}}).Want(400)
	changed := e.Do(apitest.Request{Method: "PUT", Path: path, Body: map[string]any{"enabled": false, "audience": "other"}, Header: tag}).Want(200)
	if changed["enabled"] != false || changed["audience"] != "other" || changed["name"] != "corp" || changed["jwks"] == nil {
		t.Errorf("changed to %v", changed)
	}
	if p, _ := e.Config.Directory.Providers.Get(id); !p.Disabled {
		t.Error("the provider is not disabled")
	}
	wantError(t, e.Do(apitest.Request{Method: "PUT", Path: path, Body: map[string]any{"name": "x"}, Header: tag}), 409, "conflict")
	e.Do(apitest.Request{Method: "DELETE", Path: path, Header: tag}).Want(409)
	e.Do(apitest.Request{Method: "DELETE", Path: path}).Want(204)
	e.Do(apitest.Request{Path: path}).Want(404)
	var actions []string
	for _, event := range e.Events(5) {
		actions = append(actions, event.Action+" "+event.Outcome)
	}
	if !slices.Contains(actions, "iam-identity.idp.delete success") || !slices.Contains(actions, "iam-identity.idp.update success") {
		t.Errorf("events %v", actions)
	}
}

func TestAProvidersKeysAreAskedForWhenItIsAdded(t *testing.T) {
	e := start(t)
	i := newIssuer(t)
	body := map[string]any{"name": "corp", "issuer": i.URL, "audience": "tabard"}
	msg := wantError(t, e.Do(post("/v1/idps", body)), 400, "keys_unusable")
	if !strings.Contains(msg, "certificate") {
		t.Errorf("message %q", msg)
	}
	body["ca"] = i.ca
	m := e.Do(post("/v1/idps", body)).Want(201)
	if m["jwks"] != nil || i.hits.Load() != 2 {
		t.Errorf("answer %v after %d requests", m, i.hits.Load())
	}
	put := func(b map[string]any) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: "/v1/idps/" + m["id"].(string), Body: b, Header: map[string]string{"If-Match": "*"}})
	}
	put(map[string]any{"name": "renamed"}).Want(200)
	if i.hits.Load() != 2 {
		t.Error("another name asks for the keys again")
	}
	wantError(t, put(map[string]any{"ca": ""}), 400, "keys_unusable")
	put(map[string]any{"jwks": keySet(t)}).Want(200)
	if got := put(map[string]any{"jwks": nil}).Want(200); got["jwks"] != nil || i.hits.Load() != 4 {
		t.Errorf("%v after %d requests", got, i.hits.Load())
	}
	wantError(t, put(map[string]any{"issuer": "https://other.test"}), 400, "invalid_body")
}

func TestNobodyWithoutTheRightSendsTheServerAnywhere(t *testing.T) {
	e := start(t)
	i := newIssuer(t)
	e.Grant(nobody, "iam-identity", "Editor") // may list, read and update
	body := map[string]any{"name": "corp", "issuer": i.URL, "audience": "tabard", "ca": i.ca}
	wantError(t, e.Do(apitest.Request{Method: "POST", Path: "/v1/idps", Body: body, As: nobody}), 403, "not_authorized")
	if i.hits.Load() != 0 {
		t.Error("the issuer was asked")
	}
	id := addProvider(e)
	if got := e.Do(apitest.Request{Path: "/v1/idps", As: nobody}).Want(200)["idps"].([]any); len(got) != 1 {
		t.Errorf("list %v", got)
	}
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/idps/" + id, As: nobody}), 403, "not_authorized")
	const stranger = "IBMid-STRANGER01"
	if got := e.Do(apitest.Request{Path: "/v1/idps", As: stranger}).Want(200)["idps"].([]any); len(got) != 0 {
		t.Errorf("somebody without rights lists %v", got)
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/idps/" + id, As: stranger}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Method: "PUT", Path: "/v1/idps/" + id, As: stranger, Body: map[string]any{"name": "x"}}), 403, "not_authorized")
	if got := e.Do(apitest.Request{Path: "/v1/idps", As: e.Other.IAMID}).Want(200)["idps"].([]any); len(got) != 0 {
		t.Errorf("another account lists %v", got)
	}
}

func TestAnAccountHasFiveProvidersOfDifferentNamesAndIssuers(t *testing.T) {
	e := start(t)
	addProvider(e)
	same := provider(t, "other")
	same["issuer"] = "https://corp.test"
	e.Do(post("/v1/idps", same)).Want(409)
	same = provider(t, "other")
	same["name"] = "corp"
	e.Do(post("/v1/idps", same)).Want(409)
	// Another account may have the same ones.
	e.Do(apitest.Request{Method: "POST", Path: "/v1/idps", Body: provider(t, "corp"), As: e.Other.IAMID}).Want(201)
	var made atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if e.Do(post("/v1/idps", provider(t, fmt.Sprint("p", i)))).Status == 201 {
				made.Add(1)
			}
		})
	}
	wg.Wait()
	if made.Load() != 4 {
		t.Errorf("%d providers were added beside the first, want 4", made.Load())
	}
	wantError(t, e.Do(post("/v1/idps", provider(t, "more"))), 409, "limit_exceeded")
}

func TestAProviderThatCannotBeBelievedIsRefused(t *testing.T) {
	e := start(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key, KeyID: "k"}}})
	if err != nil {
		t.Fatal(err)
	}
	secretPEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}))
	for name, change := range map[string]func(map[string]any){
		"no name":             func(b map[string]any) { delete(b, "name") },
		"a long name":         func(b map[string]any) { b["name"] = strings.Repeat("x", 101) },
		"no issuer":           func(b map[string]any) { delete(b, "issuer") },
		"plain HTTP":          func(b map[string]any) { b["issuer"] = "http://corp.test" },
		"no URL":              func(b map[string]any) { b["issuer"] = "corp" },
		"a file":              func(b map[string]any) { b["issuer"] = "file:///etc/passwd" },
		"a password":          func(b map[string]any) { b["issuer"] = "https://a:b@corp.test" },
		"a control character": func(b map[string]any) { b["issuer"] = "https://corp.test/\x01" },
		"no audience":         func(b map[string]any) { b["audience"] = "" },
		"a private key":       func(b map[string]any) { b["jwks"] = json.RawMessage(private) },
		"no keys":             func(b map[string]any) { b["jwks"] = json.RawMessage(`{"keys":[]}`) },
		"a private CA key":    func(b map[string]any) { b["ca"] = secretPEM },
		"no certificate":      func(b map[string]any) { b["ca"] = "hello" },
		"a long CA":           func(b map[string]any) { b["ca"] = strings.Repeat("x", 65<<10) },
	} {
		body := provider(t, "corp")
		change(body)
		r := e.Do(post("/v1/idps", body))
		if r.Status != 400 {
			t.Errorf("%s: status %d: %s", name, r.Status, r.Raw)
		}
		if strings.Contains(string(r.Raw), "a:b@") {
			t.Errorf("%s: the answer repeats a password", name)
		}
	}
	local := provider(t, "local")
	local["issuer"] = "http://127.0.0.1:1234"
	e.Do(post("/v1/idps", local)).Want(201)
}
