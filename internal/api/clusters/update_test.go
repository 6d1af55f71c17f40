package clusters_test

import (
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
)

// signer is a cluster's key.
type signer struct {
	id  string
	key *ecdsa.PrivateKey
}

func newSigner(t *testing.T, id string) signer { return signer{id, newKey(t)} }

func (s signer) public() jose.JSONWebKey {
	return jose.JSONWebKey{Key: s.key.Public(), KeyID: s.id, Algorithm: "ES256", Use: "sig"}
}

func keysOf(t *testing.T, signers ...signer) json.RawMessage {
	t.Helper()
	var set jose.JSONWebKeySet
	for _, s := range signers {
		set.Keys = append(set.Keys, s.public())
	}
	return marshal(t, set)
}

// podToken is a service-account token as an API server makes them.
func podToken(t *testing.T, s signer, issuer string, change map[string]any) string {
	t.Helper()
	now := time.Now()
	claims := map[string]any{
		"iss": issuer, "sub": "system:serviceaccount:shop:web", "aud": []string{"iam"},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(10 * time.Minute).Unix(), "jti": "7b1f7c1c-0000-4000-8000-000000000001",
		"kubernetes.io": map[string]any{
			"namespace": "shop", "serviceaccount": map[string]any{"name": "web", "uid": "u-1"}, "pod": map[string]any{"name": "web-0", "uid": "u-2"},
		},
	}
	for name, value := range change {
		claims[name] = value
	}
	signing, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: s.key, KeyID: s.id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := josejwt.Signed(signing).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func patch(ref string, body any) apitest.Request {
	return apitest.Request{Method: "PATCH", Path: "/v1/clusters/" + ref, Body: body}
}

const podIssuer = "https://kubernetes.default.svc"

// texts returns the string members of an array.
func texts(v any) []string {
	out := []string{}
	all, _ := v.([]any)
	for _, s := range all {
		out = append(out, s.(string))
	}
	return out
}

// nowhere fails the test when a secret stands in an answer, an event or what is
// stored.
func nowhere(t *testing.T, e *apitest.Env, secret string, answers ...*apitest.Response) {
	t.Helper()
	for _, r := range answers {
		if strings.Contains(string(r.Raw), secret) {
			t.Errorf("an answer shows it: %s", r.Raw)
		}
	}
	if events := marshal(t, e.Events(100)); strings.Contains(string(events), secret) {
		t.Errorf("an event shows it: %s", events)
	}
	for _, k := range e.Config.Directory.Clusters.All() {
		if stored := marshal(t, k); strings.Contains(string(stored), secret) {
			t.Errorf("it is stored: %s", stored)
		}
	}
}

func TestATestTokenIsVerifiedBeforeTheRegistrationCounts(t *testing.T) {
	e := start(t)
	own, other := newSigner(t, "own"), newSigner(t, "other")
	body := map[string]any{"name": "k", "issuer": podIssuer, "jwks": keysOf(t, own)}
	good := podToken(t, own, podIssuer, nil)
	for name, c := range map[string]struct {
		token string
		says  []string
	}{
		"another issuer":    {podToken(t, own, "https://other.example", nil), []string{"token-issuer", podIssuer, "https://other.example"}},
		"another key":       {podToken(t, other, podIssuer, nil), []string{"token-signature", "kid other"}},
		"a key's name only": {podToken(t, signer{"own", other.key}, podIssuer, nil), []string{"token-signature"}},
		"another audience":  {podToken(t, own, podIssuer, map[string]any{"aud": []string{"vault"}}), []string{"token-audience", "wanted iam", "found vault"}},
		"the past":          {podToken(t, own, podIssuer, map[string]any{"iat": 1000, "nbf": 1000, "exp": 1600}), []string{"token-time"}},
		"a long life":       {podToken(t, own, podIssuer, map[string]any{"exp": time.Now().Add(48 * time.Hour).Unix()}), []string{"token-time"}},
		"another subject":   {podToken(t, own, podIssuer, map[string]any{"sub": "system:serviceaccount:shop:admin"}), []string{"token-claims"}},
		"no token":          {"swordfish", []string{"token-form"}},
		"a changed one":     {good[:len(good)-8] + "AAAAAAAA", []string{"token-signature"}},
	} {
		t.Run(name, func(t *testing.T) {
			body["test_token"] = c.token
			r := e.Do(post(body))
			message := wantError(t, r, 400, "test_token_refused")
			for _, says := range c.says {
				if !strings.Contains(message, says) {
					t.Errorf("message %q does not say %q", message, says)
				}
			}
			nowhere(t, e, c.token, r)
			if ev := e.Events(1)[0]; ev.Outcome != "failure" || ev.Reason.Code != 400 || !strings.Contains(ev.Reason.ForFailure, c.says[0]) {
				t.Errorf("the refusal is recorded as %s %d %q", ev.Outcome, ev.Reason.Code, ev.Reason.ForFailure)
			}
		})
	}
	if got := listed(e, ""); len(got) != 0 {
		t.Fatalf("registered nevertheless: %v", got)
	}

	body["test_token"] = good
	r := e.Do(post(body))
	m := r.Want(201)
	want := map[string]any{"subject": "system:serviceaccount:shop:web", "pod": "web-0", "key_id": "own"}
	for field, value := range want {
		if got := m["tested"].(map[string]any)[field]; got != value {
			t.Errorf("tested %s is %v, want %v", field, got, value)
		}
	}
	if event := string(e.Events(1)[0].ResponseData); !strings.Contains(event, `"subject":"system:serviceaccount:shop:web"`) {
		t.Errorf("the event does not say what was tested: %s", event)
	}
	nowhere(t, e, good, r)
	if m := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200); m["tested"] != nil {
		t.Errorf("a test is shown later: %v", m["tested"])
	}
	body["name"], body["issuer"], body["test_token"] = "long", "https://long.example", strings.Repeat("a", 20<<10)
	wantError(t, e.Do(post(body)), 400, "invalid_body")
}

func TestReplacedKeysCountAtOnce(t *testing.T) {
	e := start(t)
	first, second, third := newSigner(t, "first"), newSigner(t, "second"), newSigner(t, "third")
	m := e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "jwks": keysOf(t, first, second)})).Want(201)
	if got := texts(m["key_ids"]); m["keys_from"] != "uploaded" || !slices.Equal(got, []string{"first", "second"}) {
		t.Errorf("keys from %v: %v", m["keys_from"], got)
	}
	// A token of a key that is not among the new ones stops the change.
	next := map[string]any{"jwks": keysOf(t, second, third), "test_token": podToken(t, first, podIssuer, nil)}
	wantError(t, e.Do(patch("k", next)), 400, "test_token_refused")
	if got := texts(e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200)["key_ids"]); !slices.Equal(got, []string{"first", "second"}) {
		t.Errorf("after a refused change the keys are %v", got)
	}
	next["test_token"] = podToken(t, third, podIssuer, nil)
	m = e.Do(patch("k", next)).Want(200)
	if got := texts(m["keys_added"]); !slices.Equal(got, []string{"third"}) {
		t.Errorf("added %v", got)
	}
	if got := texts(m["keys_removed"]); !slices.Equal(got, []string{"first"}) {
		t.Errorf("removed %v", got)
	}
	ev := e.Events(1)[0]
	var data struct {
		Changed map[string]any `json:"changed"`
		Added   []string       `json:"keys_added"`
		Removed []string       `json:"keys_removed"`
	}
	if err := json.Unmarshal(ev.ResponseData, &data); err != nil {
		t.Fatal(err)
	}
	if ev.Action != "containers-kubernetes.cluster.update" || ev.Target.ID != m["crn"] || data.Changed["jwks"] != true ||
		!slices.Equal(data.Added, []string{"third"}) || !slices.Equal(data.Removed, []string{"first"}) {
		t.Errorf("event %s on %s: %s", ev.Action, ev.Target.ID, ev.ResponseData)
	}
	wantError(t, e.Do(patch("k", map[string]any{"test_token": podToken(t, first, podIssuer, nil)})), 400, "test_token_refused")
	before := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200)["entity_tag"]
	if m := e.Do(patch("k", map[string]any{"test_token": podToken(t, third, podIssuer, nil)})).Want(200); m["entity_tag"] != before {
		t.Error("a test alone changes the cluster")
	}
}

func TestAnAudienceIsTriedOutBeforeItCounts(t *testing.T) {
	e := start(t)
	own := newSigner(t, "own")
	e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "jwks": keysOf(t, own)})).Want(201)
	token := podToken(t, own, podIssuer, map[string]any{"aud": []string{"vault"}})
	wantError(t, e.Do(patch("k", map[string]any{"test_token": token})), 400, "test_token_refused")
	if m := e.Do(patch("k", map[string]any{"audience": "vault", "test_token": token})).Want(200); m["audience"] != "vault" {
		t.Errorf("audience %v", m["audience"])
	}
	if data := string(e.Events(1)[0].ResponseData); !strings.Contains(data, `"audience":{"from":"iam","to":"vault"}`) {
		t.Errorf("event %s", data)
	}
}

func TestAFetchingClusterCanBeGivenKeysAndBack(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 3))
	e.Do(post(map[string]any{"name": "k", "issuer": iss.URL, "ca": iss.ca})).Want(201)
	if m := e.Do(patch("k", map[string]any{"jwks": keySet(t, 1)})).Want(200); m["keys_from"] != "uploaded" || m["keys"] != 1.0 {
		t.Errorf("changed into %v", m)
	}
	if m := e.Do(patch("k", map[string]any{"jwks": nil})).Want(200); m["keys_from"] != "issuer" || m["keys"] != 3.0 || len(texts(m["key_ids"])) != 3 {
		t.Errorf("changed back into %v", m)
	}
	// Without the CA the issuer is not believed.
	wantError(t, e.Do(patch("k", map[string]any{"ca": nil})), 400, "keys_unusable")
	if m := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200); m["has_ca"] != true {
		t.Error("a refused change counts")
	}
}

func TestKeysAreFetchedAgainWhenAsked(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 2))
	e.Do(post(map[string]any{"name": "k", "issuer": iss.URL, "ca": iss.ca})).Want(201)
	e.Grant("IBMid-OPERATOR", "containers-kubernetes", "Operator")
	e.Grant("IBMid-VIEWER", "containers-kubernetes", "Viewer")
	refresh := apitest.Request{Method: "POST", Path: "/v1/clusters/k/refresh_keys", As: "IBMid-OPERATOR"}
	hits := iss.hits.Load()
	if m := e.Do(refresh).Want(200); m["keys"] != 2.0 || len(texts(m["key_ids"])) != 2 || iss.hits.Load() == hits {
		t.Errorf("refreshed: %v", m)
	}
	if ev := e.Events(1)[0]; ev.Action != "containers-kubernetes.cluster-keys.refresh" || !strings.Contains(string(ev.ResponseData), "key_ids") {
		t.Errorf("event %s %s", ev.Action, ev.ResponseData)
	}
	hits = iss.hits.Load()
	refresh.As = "IBMid-VIEWER"
	wantError(t, e.Do(refresh), 403, "not_authorized")
	if iss.hits.Load() != hits {
		t.Error("the issuer is asked for whom it may not be")
	}
	iss.Close()
	refresh.As = ""
	wantError(t, e.Do(refresh), 400, "keys_unusable")

	e.Do(post(uploaded(t, "up"))).Want(201)
	refresh.Path = "/v1/clusters/up/refresh_keys"
	if m := wantError(t, e.Do(refresh), 409, "keys_uploaded"); !strings.Contains(m, "--rotate-keys") {
		t.Errorf("message %q does not say what to do", m)
	}
}

// Whoever replaces keys can be every pod of the cluster, so it takes an
// administrator.
func TestOnlyAdministratorsChangeWhatAClusterIsBelievedFor(t *testing.T) {
	e := start(t)
	e.Do(post(uploaded(t, "k"))).Want(201)
	iss := newIssuer(t, keySet(t, 1))
	for _, role := range []string{"Viewer", "Operator", "Editor"} {
		e.Grant("IBMid-"+role, "containers-kubernetes", role)
		for _, body := range []map[string]any{
			{"jwks": keySet(t, 1)},
			{"audience": "https://kubernetes.default.svc"},
			{"jwks": nil, "server": map[string]any{"url": iss.URL, "ca": iss.ca, "token": "t"}},
			{"review": false},
			{},
		} {
			r := patch("k", body)
			r.As = "IBMid-" + role
			wantError(t, e.Do(r), 403, "not_authorized")
		}
	}
	if iss.hits.Load() != 0 {
		t.Error("the server asks addresses for whom may not register any")
	}
	e.Grant("IBMid-ADMIN", "containers-kubernetes", "Administrator")
	r := patch("k", map[string]any{"jwks": keySet(t, 1)})
	r.As = "IBMid-ADMIN"
	e.Do(r).Want(200)

	other := patch("k", map[string]any{"jwks": keySet(t, 1)})
	other.As = e.Other.IAMID
	wantError(t, e.Do(other), 404, "not_found")
}

func TestWhatNamesAClusterIsNotChanged(t *testing.T) {
	e := start(t)
	e.Do(post(uploaded(t, "k"))).Want(201)
	before := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Raw
	for field, value := range map[string]any{
		"name": "other", "issuer": "https://other.example", "type": "ROKS_SA", "location": "wdc", "resource_group": "x", "groups": []string{"a"},
		"audience": "", "jwks": "x", "ca": 1, "server": "x", "review": true, "test_token": 1,
	} {
		if m := wantError(t, e.Do(patch("k", map[string]any{field: value})), 400, "invalid_body"); !strings.Contains(m, field) {
			t.Errorf("%s: message %q does not name the field", field, m)
		}
	}
	for _, body := range []string{`{"server":{"url":1}}`, `{"server":[]}`, `{"jwks":{"keys":[]}}`, `{"ca":"x"}`, ``, `[]`} {
		if r := e.Do(patch("k", body)); r.Status != 400 {
			t.Errorf("body %s: %d", body, r.Status)
		}
	}
	if after := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Raw; string(after) != string(before) {
		t.Errorf("changed from %s to %s", before, after)
	}
}

func TestNoChangeMakesTwoClustersClaimOneToken(t *testing.T) {
	e := start(t)
	a, b := newSigner(t, "a"), newSigner(t, "b")
	e.Do(post(map[string]any{"name": "one", "issuer": podIssuer, "jwks": keysOf(t, a)})).Want(201)
	e.Do(post(map[string]any{"name": "two", "issuer": podIssuer, "jwks": keysOf(t, b)})).Want(201)
	if m := wantError(t, e.Do(patch("two", map[string]any{"jwks": keysOf(t, b, a)})), 409, "issuer_taken"); !strings.Contains(m, `"one"`) {
		t.Errorf("message %q does not name the cluster", m)
	}
	// Another key under the same id would make it chance whose token it is.
	wantError(t, e.Do(patch("two", map[string]any{"jwks": keysOf(t, newSigner(t, "a"))})), 409, "issuer_taken")
	wantError(t, e.Do(patch("two", map[string]any{"jwks": nil})), 409, "issuer_taken")
	e.Do(patch("two", map[string]any{"jwks": keysOf(t, newSigner(t, "c"))})).Want(200)
	e.Do(patch("one", map[string]any{"jwks": keysOf(t, b)})).Want(200)
}

func TestOfEightRotationsWithOneTagOneWins(t *testing.T) {
	e := start(t)
	tag := e.Do(post(uploaded(t, "k"))).Want(201)["entity_tag"].(string)
	statuses := make([]int, 8)
	var wg sync.WaitGroup
	for n := range statuses {
		r := patch("k", map[string]any{"jwks": keysOf(t, newSigner(t, fmt.Sprint("k", n)))})
		r.Header = map[string]string{"If-Match": tag}
		wg.Go(func() { statuses[n] = e.Do(r).Status })
	}
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{200, 409, 409, 409, 409, 409, 409, 409}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
}

// A registration is tried out without holding up others, so it may have become
// another one when the answer is there.
func TestAChangeOfAClusterThatWasChangedMeanwhileIsRefused(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 1))
	e.Do(post(map[string]any{"name": "k", "issuer": iss.URL, "jwks": keySet(t, 1), "ca": iss.ca})).Want(201)
	iss.hold = make(chan struct{})
	done := make(chan int)
	go func() { done <- e.Do(patch("k", map[string]any{"jwks": nil})).Status }()
	for iss.hits.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	e.Do(patch("k", map[string]any{"audience": "other"})).Want(200)
	close(iss.hold)
	if status := <-done; status != 409 {
		t.Errorf("the change that came late ended with %d", status)
	}
	if m := e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200); m["keys_from"] != "uploaded" || m["audience"] != "other" {
		t.Errorf("it is now %v", m)
	}
}

func TestARightOverOneClusterChangesThatOneOnly(t *testing.T) {
	e := start(t)
	one := e.Do(post(uploaded(t, "one"))).Want(201)["id"].(string)
	e.Do(post(uploaded(t, "two"))).Want(201)
	grantOn(t, e, "IBMid-ONE", access.ServiceInstance, one)
	for ref, want := range map[string]int{"one": 200, "two": 403} {
		r := patch(ref, map[string]any{"jwks": keySet(t, 1)})
		r.As = "IBMid-ONE"
		e.Do(r).Want(want)
	}
}

// grantOn makes an identity administrator of what has an attribute.
func grantOn(t *testing.T, e *apitest.Env, who, key, value string) {
	t.Helper()
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	d := e.Config.Directory
	err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Policies.Put(tx, &access.Policy{
			ID: "policy-of-" + who + value, AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
			Subject:  []access.Attribute{equals(access.IAMID, who)},
			Resource: []access.Attribute{equals(access.AccountID, e.Owner.AccountID), equals(access.ServiceName, "containers-kubernetes"), equals(key, value)},
			Roles:    []string{access.PlatformRoleCRN("Administrator")},
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestARefusedChangeSaysWhichClusterItWasAbout(t *testing.T) {
	e := start(t)
	wantError(t, e.Do(post(map[string]any{"name": "broken", "issuer": "no URL"})), 400, "invalid_body")
	if ev := e.Events(1)[0]; ev.Target.Name != "broken" || ev.Target.TypeURI != "containers-kubernetes/cluster" || ev.Outcome != "failure" {
		t.Errorf("event on %+v", ev.Target)
	}
	wantError(t, e.Do(post(map[string]any{"name": "un\x1bprintable", "issuer": "no URL"})), 400, "invalid_body")
	if ev := e.Events(1)[0]; ev.Target.Name != "" {
		t.Errorf("event on %+v", ev.Target)
	}
	m := e.Do(post(uploaded(t, "k"))).Want(201)
	wantError(t, e.Do(patch("k", map[string]any{"jwks": "none"})), 400, "invalid_body")
	if ev := e.Events(1)[0]; ev.Action != "containers-kubernetes.cluster.update" || ev.Target.ID != m["crn"] || ev.Target.Name != "k" || ev.Outcome != "failure" {
		t.Errorf("event %s on %+v", ev.Action, ev.Target)
	}
	// Another account's cluster is not named, though there is one.
	r := patch("k", map[string]any{"jwks": "none"})
	r.As, r.Account = e.Other.IAMID, e.Other.AccountID
	e.Do(r).Want(404)
}
