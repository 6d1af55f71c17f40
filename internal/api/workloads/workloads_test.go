package workloads_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iamidentity"
	"tabard.dev/tabard/internal/api/workloads"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

const (
	path     = "/v1/workload_issuers"
	audience = "https://tabard.example.com/identity"
	github   = "https://token.actions.githubusercontent.com"
)

type object = map[string]any

type env struct {
	*apitest.Env
	key  *ecdsa.PrivateKey
	jwks json.RawMessage
}

func start(t *testing.T) *env {
	t.Helper()
	e := &env{Env: apitest.New(t)}
	keys := &attest.Keys{Now: time.Now}
	d := e.Config.Directory
	workloads.Register(e.Mux, e.Config, workloads.Options{
		Keys: keys, Prover: &attest.Workloads{Clusters: d, Issuers: d, Keys: keys, Now: time.Now}, Audience: audience,
	})
	iamidentity.Register(e.Mux, e.Config, e.Sealer)
	var err error
	if e.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	e.jwks = encode(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: e.key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	return e
}

func encode(t *testing.T, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (e *env) token(t *testing.T, claims object) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: e.key, KeyID: "k1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := object{"iss": github, "aud": audience, "sub": "repo:acme/shop:ref:refs/heads/main", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix(), "repository": "acme/shop"}
	for k, v := range claims {
		all[k] = v
	}
	jws, err := signer.Sign(encode(t, all))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func with(o object, pairs ...any) object {
	out := object{}
	for k, v := range o {
		out[k] = v
	}
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i].(string)] = pairs[i+1]
	}
	return out
}

// github is a registration of GitHub with uploaded keys.
func (e *env) github(pairs ...any) object {
	return with(object{"name": "github", "preset": "github-actions", "jwks": e.jwks}, pairs...)
}

func (e *env) post(body any) *apitest.Response {
	return e.Do(apitest.Request{Method: "POST", Path: path, Body: body})
}

func (e *env) patch(id string, body any) *apitest.Response {
	return e.Do(apitest.Request{Method: "PATCH", Path: path + "/" + id, Body: body, Header: map[string]string{"If-Match": "*"}})
}

func (e *env) delete(id string) {
	e.Do(apitest.Request{Method: "DELETE", Path: path + "/" + id}).Want(204)
}

func wantError(t *testing.T, r *apitest.Response, status int, code, says string) {
	t.Helper()
	if r.Status != status || !strings.Contains(string(r.Raw), `"code":"`+code+`"`) || !strings.Contains(string(r.Raw), says) {
		t.Errorf("status %d, want %d %s about %q: %s", r.Status, status, code, says, r.Raw)
	}
}

func (e *env) profile() string {
	return e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", Body: object{"name": "deploy", "account_id": e.Owner.AccountID}}).Want(201)["id"].(string)
}

func rule(pairs ...string) object {
	conditions := []object{}
	for i := 0; i+1 < len(pairs); i += 2 {
		conditions = append(conditions, object{"claim": pairs[i], "operator": "EQUALS", "value": `"` + pairs[i+1] + `"`})
	}
	return object{"type": "Profile-CR", "cr_type": "OIDC", "conditions": conditions}
}

func TestAnIssuerIsRegisteredFromAPresetAndDeleted(t *testing.T) {
	e := start(t)
	m := e.post(e.github()).Want(201)
	id := m["id"].(string)
	if !strings.HasPrefix(id, "WorkloadIssuer-") || m["crn"] != "crn:v1:bluemix:public:iam-identity::a/"+e.Owner.AccountID+"::workload-issuer:"+id {
		t.Errorf("id %s, crn %v", id, m["crn"])
	}
	for field, want := range (object{"issuer": github, "audience": audience, "preset": "github-actions", "keys_from": "uploaded", "keys": 1.0, "created_by": e.Owner.IAMID}) {
		if m[field] != want {
			t.Errorf("%s is %v, want %v", field, m[field], want)
		}
	}
	if claims := m["mapping"].(object)["claims"].(object); claims["repository_id"] != "repository_id" {
		t.Errorf("claims %v", claims)
	}
	for _, ref := range []string{id, "github"} {
		if r := e.Do(apitest.Request{Path: path + "/" + ref}); r.Want(200)["id"] != id || r.Header.Get("ETag") != m["entity_tag"] {
			t.Errorf("shown by %s: %s", ref, r.Raw)
		}
	}
	if all := e.Do(apitest.Request{Path: path}).Want(200)["workload_issuers"].([]any); len(all) != 1 {
		t.Errorf("listed %v", all)
	}
	e.delete("github")
	wantError(t, e.Do(apitest.Request{Path: path + "/" + id}), 404, "not_found", "")
	for n, action := range []string{"delete", "create"} {
		if ev := e.Events(2)[n]; ev.Action != "iam-identity.workload-issuer."+action || ev.Target.ID != m["crn"] || ev.Outcome != "success" {
			t.Errorf("event %s on %s: %s", ev.Action, ev.Target.ID, ev.Outcome)
		}
	}
}

func TestThePresetsAreShownToEverybodyWithAToken(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Path: "/v1/workload_presets", As: "IBMid-NOBODY"})
	if all := r.Want(200)["workload_presets"].([]any); len(all) != 3 || all[1].(object)["name"] != "github-actions" || all[1].(object)["mapping"].(object)["pin"] == nil {
		t.Errorf("presets %s", r.Raw)
	}
	e.Do(apitest.Request{Path: "/v1/workload_presets", Anonymous: true}).Want(401)
}

func TestATestTokenIsVerifiedBeforeAnythingIsRegistered(t *testing.T) {
	e := start(t)
	for name, tt := range map[string]struct {
		claims object
		says   string
	}{
		"another audience": {object{"aud": "https://github.com/acme"}, "token-audience"},
		"another issuer":   {object{"iss": github + "/acme"}, "token-issuer"},
		"expired":          {object{"iat": 1, "exp": 2}, "token-time"},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, e.post(e.github("test_token", e.token(t, tt.claims))), 400, "test_token_refused", tt.says)
		})
	}
	token := e.token(t, nil)
	if r := e.post(e.github("test_token", token[:len(token)-10]+"AAAAAAAAAA")); strings.Contains(string(r.Raw), token[:len(token)-10]) {
		t.Error("the answer has the token in it")
	} else {
		wantError(t, r, 400, "test_token_refused", "token-signature")
	}
	if all := e.Do(apitest.Request{Path: path}).Want(200)["workload_issuers"].([]any); len(all) != 0 {
		t.Errorf("registered nevertheless: %v", all)
	}
	m := e.post(e.github("test_token", token+"\n")).Want(201)
	proved := m["tested"].(object)
	if proved["subject"] != "repo:acme/shop:ref:refs/heads/main" || proved["claims"].(object)["repository"] != "acme/shop" || proved["claims"].(object)["issuer"] != github {
		t.Errorf("tested %v", proved)
	}
	if r := e.Do(apitest.Request{Path: path + "/github"}); strings.Contains(string(r.Raw), "tested") {
		t.Errorf("kept: %s", r.Raw)
	}
	wantError(t, e.patch("github", object{"audience": "other", "test_token": token}), 400, "test_token_refused", "token-audience")
	if got := e.Do(apitest.Request{Path: path + "/github"}).Want(200)["audience"]; got != audience {
		t.Errorf("the audience is %v", got)
	}
}

func TestBadRegistrationsOfIssuersAreRefused(t *testing.T) {
	e := start(t)
	for name, tt := range map[string]struct {
		body object
		says string
	}{
		"no name":               {e.github("name", ""), "name"},
		"a name with spaces":    {e.github("name", " x"), "name"},
		"a name with a colon":   {e.github("name", "a:b"), "name"},
		"no issuer":             {object{"name": "x", "jwks": e.jwks}, "issuer"},
		"an unknown preset":     {e.github("preset", "travis"), "github-actions"},
		"preset and mapping":    {e.github("mapping", object{"claims": object{"a": "a"}, "pin": []any{}}), "not both"},
		"a mapping without pin": {object{"name": "x", "issuer": "https://ci", "jwks": e.jwks, "mapping": object{"claims": object{"a": "a"}}}, "pin is missing"},
		"a mapping of issuer":   {object{"name": "x", "issuer": "https://ci", "jwks": e.jwks, "mapping": object{"claims": object{"issuer": "i"}, "pin": []any{}}}, "taken"},
		"an unknown key":        {object{"name": "x", "issuer": "https://ci", "jwks": e.jwks, "mapping": object{"claims": object{"a": "a"}, "pins": []any{}, "pin": []any{}}}, "pins"},
		"plain HTTP":            {object{"name": "x", "issuer": "http://ci.example.com"}, "https"},
		"the metadata service":  {object{"name": "x", "issuer": "http://169.254.169.254"}, "https"},
		"a private key":         {e.github("jwks", jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: e.key, KeyID: "k"}}}), "jwks"},
		"a CA that is none":     {e.github("ca", "x"), "ca"},
		"a long audience":       {e.github("audience", strings.Repeat("x", 257)), "audience"},
		"an audience with NUL":  {e.github("audience", "a\x00"), "audience"},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, e.post(tt.body), 400, "invalid_body", tt.says) })
	}
}

func TestOnlyWhoMayRegisterAnIssuerMakesTheServerFetch(t *testing.T) {
	e := start(t)
	var asked atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	t.Cleanup(s.Close)
	e.Grant("IBMid-OPERATOR", "iam-identity", "Operator")
	for _, who := range []string{"IBMid-NOBODY", "IBMid-OPERATOR"} {
		e.Do(apitest.Request{Method: "POST", Path: path, As: who, Body: object{"name": "x", "issuer": s.URL}}).Want(403)
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("the issuer was asked %d times", n)
	}
	wantError(t, e.post(object{"name": "x", "issuer": s.URL}), 400, "keys_unusable", "")
	if asked.Load() == 0 {
		t.Error("the issuer was not asked")
	}
}

func TestAnIssuerIsRegisteredOnceInAnAccount(t *testing.T) {
	e := start(t)
	e.post(e.github()).Want(201)
	wantError(t, e.post(e.github("name", "again")), 409, "issuer_taken", "github")
	wantError(t, e.post(e.github("issuer", github+"/acme")), 409, "conflict", "")
	e.Do(apitest.Request{Method: "POST", Path: path, Body: e.github(), As: e.Other.IAMID}).Want(201)

	d := e.Config.Directory
	err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Clusters.Put(tx, &cluster.Cluster{ID: "c0000000000000000000", AccountID: e.Owner.AccountID, Name: "k", Type: identity.IKSSA, Issuer: "https://k", Audience: "iam", JWKS: e.jwks})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, e.post(object{"name": "k", "issuer": "https://k", "jwks": e.jwks}), 409, "issuer_taken", "cluster")
}

func TestAnotherAccountsIssuerDoesNotExist(t *testing.T) {
	e := start(t)
	id := e.Do(apitest.Request{Method: "POST", Path: path, Body: e.github(), As: e.Other.IAMID}).Want(201)["id"].(string)
	for _, r := range []apitest.Request{{Path: path + "/" + id}, {Method: "DELETE", Path: path + "/" + id}} {
		wantError(t, e.Do(r), 404, "not_found", "")
	}
	wantError(t, e.patch(id, object{"audience": "x"}), 404, "not_found", "")
	// A rule cannot lean on it either.
	wantRuleRefused(t, e, e.profile(), rule("issuer", github, "repository", "acme/shop"), "workload-issuer-create")
}

func wantRuleRefused(t *testing.T, e *env, profile string, body object, says string) {
	t.Helper()
	r := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/" + profile + "/rules", Body: body})
	if r.Status != 400 || !strings.Contains(string(r.Raw), says) {
		t.Errorf("status %d, want 400 about %q: %s", r.Status, says, r.Raw)
	}
}

func TestARuleIsHeldToTheLinterWhenItIsMadeAndChanged(t *testing.T) {
	e := start(t)
	p := e.profile()
	rules := "/v1/profiles/" + p + "/rules"
	good := rule("issuer", github, "repository", "acme/shop")
	wantRuleRefused(t, e, p, good, "The account has none.")
	e.post(e.github()).Want(201)
	id := e.Do(apitest.Request{Method: "POST", Path: rules, Body: good}).Want(201)["id"].(string)
	put := func(body object) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: rules + "/" + id, Body: body, Header: map[string]string{"If-Match": "*"}})
	}
	for says, bad := range map[string]object{
		"strangers":             rule("issuer", github, "ref", "refs/heads/main"),
		"wildcard":              rule("issuer", github, "sub", "repo:acme/*"),
		"exactly one condition": rule("repository", "acme/shop"),
		"would never match":     rule("issuer", github, "project_id", "1"),
	} {
		wantRuleRefused(t, e, p, bad, says)
		if r := put(bad); r.Status != 400 || !strings.Contains(string(r.Raw), says) {
			t.Errorf("changed to %v: %d %s", bad, r.Status, r.Raw)
		}
	}
	// Another type's rule cannot become one by the back door.
	vsi := with(rule("zone", "a"), "cr_type", "VSI")
	put(vsi).Want(200)
	if r := put(with(vsi, "cr_type", "OIDC")); r.Status != 400 {
		t.Errorf("a server's rule became one of a workload: %s", r.Raw)
	}
	put(good).Want(200)
}

func TestThereIsNoLinkToAWorkloadIssuer(t *testing.T) {
	e := start(t)
	crn := e.post(e.github()).Want(201)["crn"].(string)
	r := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/" + e.profile() + "/links", Body: object{"cr_type": "OIDC", "link": object{"crn": crn}}})
	if r.Status != 400 || !strings.Contains(string(r.Raw), "claim rule") {
		t.Errorf("%d %s", r.Status, r.Raw)
	}
}

// A rule means what the issuer's mapping makes of it. Neither a change nor a
// new registration may make it mean "everybody".
func TestAMappingWithWhichRulesWouldAdmitStrangersIsRefused(t *testing.T) {
	e := start(t)
	e.post(e.github()).Want(201)
	p := e.profile()
	id := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/" + p + "/rules", Body: rule("issuer", github, "repository", "acme/shop")}).Want(201)["id"].(string)

	loose := object{"claims": object{"repository": "whatever", "owner": "repository_owner"}, "pin": [][]string{{"owner"}}}
	wantError(t, e.patch("github", object{"mapping": loose}), 409, "rules_unsafe", id)
	e.patch("github", object{"mapping": with(loose, "pin", [][]string{{"owner"}, {"repository"}})}).Want(200)
	e.patch("github", object{"preset": "github-actions"}).Want(200)

	e.delete("github")
	body := e.github("mapping", loose, "issuer", github)
	delete(body, "preset")
	wantError(t, e.post(body), 409, "rules_unsafe", p)
	// One with which the rule matches nothing takes nothing away from anybody.
	body["mapping"] = object{"claims": object{"owner": "repository_owner"}, "pin": [][]string{{"owner"}}}
	e.post(body).Want(201)
}

func TestAChangeNeedsTheEntityTagAndKeepsTheIssuer(t *testing.T) {
	e := start(t)
	tag := e.post(e.github()).Want(201)["entity_tag"].(string)
	wantError(t, e.Do(apitest.Request{Method: "PATCH", Path: path + "/github", Body: object{"name": "x"}}), 400, "invalid_body", "If-Match")
	wantError(t, e.patch("github", object{"issuer": "https://elsewhere"}), 400, "invalid_body", "issuer")
	m := e.Do(apitest.Request{Method: "PATCH", Path: path + "/github", Body: object{"name": "ci", "audience": "other"}, Header: map[string]string{"If-Match": tag}}).Want(200)
	if m["name"] != "ci" || m["audience"] != "other" || m["preset"] != "github-actions" || m["issuer"] != github {
		t.Errorf("changed to %v", m)
	}
	stale := e.Do(apitest.Request{Method: "PATCH", Path: path + "/ci", Body: object{"name": "x"}, Header: map[string]string{"If-Match": tag}})
	if stale.Status != 409 && stale.Status != 412 {
		t.Errorf("a stale tag: %d %s", stale.Status, stale.Raw)
	}
}

func TestWithoutPresetAndMappingRulesCompareSubjects(t *testing.T) {
	e := start(t)
	e.post(object{"name": "batch", "issuer": "https://batch.example.com/", "jwks": e.jwks}).Want(201)
	p := e.profile()
	wantRuleRefused(t, e, p, rule("issuer", "https://batch.example.com/"), "sub")
	wantRuleRefused(t, e, p, rule("issuer", "https://batch.example.com", "sub", "x"), "Did you mean")
	e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles/" + p + "/rules", Body: rule("issuer", "https://batch.example.com/", "sub", "x")}).Want(201)
}
