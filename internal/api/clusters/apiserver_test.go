package clusters_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

// apiServer is a cluster's API server as far as registrations ask it, with the
// moods that a real one does not have on demand. It remembers which credentials
// it was sent.
type apiServer struct {
	*httptest.Server
	ca     string
	before func() // each request; nil does nothing

	mu         sync.Mutex
	credential string   // that it takes
	sent       []string // credentials
	keys       json.RawMessage
	gone       string // why it does not stand by any token
	forbidden  bool   // to ask for reviews
}

func newAPIServer(t *testing.T, credential string, keys json.RawMessage) *apiServer {
	t.Helper()
	s := &apiServer{credential: credential, keys: keys}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // a refused certificate is expected
	s.StartTLS()
	s.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	if s.before != nil {
		s.before()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	given := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.sent = append(s.sent, given)
	status := func(code int, reason string) {
		w.WriteHeader(code)
		_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"%s, %s","reason":%q,"code":%d}`, reason, given, reason, code)
	}
	switch {
	case given != s.credential:
		status(401, "Unauthorized")
	case r.URL.Path == "/openid/v1/jwks":
		_, _ = w.Write(s.keys)
	case r.URL.Path != "/apis/authentication.k8s.io/v1/tokenreviews":
		status(404, "NotFound")
	case s.forbidden:
		status(403, "Forbidden")
	default:
		s.review(w, r)
	}
}

func (s *apiServer) review(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Spec struct {
			Token     string   `json:"token"`
			Audiences []string `json:"audiences"`
		} `json:"spec"`
	}
	status := map[string]any{"authenticated": false, "error": "[invalid bearer token]"}
	if json.NewDecoder(r.Body).Decode(&in) == nil && strings.Count(in.Spec.Token, ".") == 2 {
		status = map[string]any{
			"authenticated": true, "audiences": in.Spec.Audiences,
			"user": map[string]any{
				"username": "system:serviceaccount:shop:web", "uid": "u-1", "groups": []string{"system:serviceaccounts"},
				"extra": map[string]any{"authentication.kubernetes.io/pod-name": []string{"web-0"}, "authentication.kubernetes.io/pod-uid": []string{"u-2"}},
			},
		}
	}
	if s.gone != "" {
		status = map[string]any{"authenticated": false, "error": s.gone}
	}
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status})
}

func (s *apiServer) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// was returns the credentials that the server was sent, and forgets them.
func (s *apiServer) was() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent := s.sent
	s.sent = nil
	return sent
}

func (s *apiServer) input() map[string]any {
	return map[string]any{"url": s.URL, "ca": s.ca, "token": s.credential}
}

const credential = "swordfish-of-the-reviewer"

func TestKeysComeFromTheAPIServer(t *testing.T) {
	e := start(t)
	own := newSigner(t, "own")
	s := newAPIServer(t, credential, keysOf(t, own))
	token := podToken(t, own, podIssuer, nil)
	r := e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "server": s.input(), "test_token": token}))
	m := r.Want(201)
	shown := m["server"].(map[string]any)
	if m["keys_from"] != "server" || m["keys"] != 1.0 || shown["url"] != s.URL || shown["has_ca"] != true || shown["has_token"] != true || len(shown) != 3 {
		t.Errorf("registered as %s", r.Raw)
	}
	if m["tested"].(map[string]any)["pod"] != "web-0" {
		t.Errorf("tested %v", m["tested"])
	}
	sent := s.was()
	if len(sent) == 0 || slices.ContainsFunc(sent, func(given string) bool { return given != credential }) {
		t.Errorf("the API server was sent %q", sent)
	}
	read := e.Do(apitest.Request{Path: "/v1/clusters/k"})
	if read.Want(200); len(s.was()) > 0 {
		t.Error("reading a cluster asks its API server")
	}
	refreshed := e.Do(apitest.Request{Method: "POST", Path: "/v1/clusters/k/refresh_keys"})
	if got := texts(refreshed.Want(200)["key_ids"]); !slices.Equal(got, []string{"own"}) {
		t.Errorf("refreshed: %v", got)
	}
	nowhere(t, e, credential, r, read, refreshed)
	nowhere(t, e, token, r)
}

// What a server answers can hold the credential that it was sent.
func TestACredentialIsNeverToldAgain(t *testing.T) {
	e := start(t)
	s := newAPIServer(t, "another", keysOf(t, newSigner(t, "own")))
	in := s.input()
	in["token"] = credential
	for _, body := range []map[string]any{
		{"name": "k", "issuer": podIssuer, "server": in},
		{"name": "k", "issuer": podIssuer, "server": in, "review": true, "jwks": keySet(t, 1)},
	} {
		r := e.Do(post(body))
		if r.Status != 400 || !strings.Contains(string(r.Raw), "401") {
			t.Errorf("%d %s", r.Status, r.Raw)
		}
		nowhere(t, e, credential, r)
	}
	for _, bad := range []string{"sword fish", "sword\nfish", "sword\r\nX-Evil: 1", "schwärt", strings.Repeat("x", 20<<10)} {
		in["token"] = bad
		r := e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "server": in}))
		wantError(t, r, 400, "invalid_body")
		nowhere(t, e, bad, r)
	}
	if sent := s.was(); len(sent) != 2 {
		t.Errorf("the API server was sent %q", sent)
	}
}

// What the network around the server answers is for the operator's account.
func TestOthersAreNotToldWhatTheServersNetworkAnswers(t *testing.T) {
	e := start(t)
	s := newAPIServer(t, "another", nil)
	in := s.input()
	in["token"] = credential
	for _, body := range []map[string]any{
		{"name": "k", "issuer": podIssuer, "server": in},
		{"name": "k", "issuer": podIssuer, "server": in, "review": true, "jwks": keySet(t, 1)},
		{"name": "k", "issuer": podIssuer, "server": map[string]any{"url": "https://127.0.0.1:1", "token": "t"}},
	} {
		r := post(body)
		r.As = e.Other.IAMID
		got := e.Do(r)
		for _, told := range []string{"401", "Unauthorized", "refused", "certificate"} {
			if strings.Contains(string(got.Raw), told) {
				t.Errorf("%q is told: %s", told, got.Raw)
			}
		}
		if got.Status != 400 {
			t.Errorf("status %d", got.Status)
		}
	}
}

// Whoever may change a registration must not get its credential sent to himself.
func TestACredentialGoesNowhereElse(t *testing.T) {
	e := start(t)
	own := newSigner(t, "own")
	s := newAPIServer(t, credential, keysOf(t, own))
	thief := newAPIServer(t, credential, keysOf(t, own))
	e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "server": s.input()})).Want(201)
	s.was()
	for name, server := range map[string]map[string]any{
		"another address":      {"url": thief.URL, "ca": thief.ca},
		"another address only": {"url": thief.URL},
		"another CA":           {"ca": thief.ca + s.ca},
		"the system's CAs":     {"url": s.URL, "ca": ""},
	} {
		if m := wantError(t, e.Do(patch("k", map[string]any{"server": server})), 400, "invalid_body"); !strings.Contains(m, "server.token") {
			t.Errorf("%s: message %q does not say what to give", name, m)
		}
	}
	// Nor by taking the server away and giving another one.
	wantError(t, e.Do(patch("k", map[string]any{"server": map[string]any{"url": thief.URL, "ca": thief.ca, "token": ""}})), 400, "invalid_body")
	e.Do(patch("k", map[string]any{"server": nil, "jwks": keysOf(t, own)})).Want(200)
	e.Do(patch("k", map[string]any{"server": map[string]any{"url": thief.URL, "ca": thief.ca}})).Want(200)
	wantError(t, e.Do(patch("k", map[string]any{"jwks": nil})), 400, "invalid_body")
	wantError(t, e.Do(patch("k", map[string]any{"review": true})), 400, "invalid_body")
	if sent := thief.was(); len(sent) > 0 {
		t.Errorf("the thief was sent %q", sent)
	}
	// Given again, a credential goes where it is meant to.
	m := e.Do(patch("k", map[string]any{"server": map[string]any{"url": thief.URL, "ca": thief.ca, "token": credential}, "jwks": nil})).Want(200)
	if m["keys_from"] != "server" || len(thief.was()) == 0 {
		t.Errorf("changed into %v", m)
	}
}

func TestAnEventTellsThatACredentialChangedAndNotWhich(t *testing.T) {
	e := start(t)
	own := newSigner(t, "own")
	s := newAPIServer(t, credential, keysOf(t, own))
	e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "server": s.input()})).Want(201)
	s.set(func() { s.credential = "the-next-credential" })
	r := e.Do(patch("k", map[string]any{"server": map[string]any{"token": "the-next-credential"}}))
	r.Want(200)
	var data struct {
		Changed map[string]any `json:"changed"`
	}
	if err := json.Unmarshal(e.Events(1)[0].ResponseData, &data); err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(data.Changed)); !slices.Equal(got, []string{"server_token"}) || data.Changed["server_token"] != true {
		t.Errorf("the event tells %v", data.Changed)
	}
	nowhere(t, e, "the-next-credential", r)
	wantError(t, e.Do(patch("k", map[string]any{"server": map[string]any{"token": "a-wrong-one"}})), 400, "keys_unusable")

	second := newAPIServer(t, credential, keysOf(t, newSigner(t, "second")))
	e.Do(patch("k", map[string]any{"server": second.input()})).Want(200)
	if got := string(e.Events(1)[0].ResponseData); !strings.Contains(got, fmt.Sprintf(`"server_url":{"from":%q,"to":%q}`, s.URL, second.URL)) || strings.Contains(got, "CERTIFICATE") {
		t.Errorf("the event tells %s", got)
	}
}

func TestAReviewerIsTriedOutBeforeItCounts(t *testing.T) {
	e := start(t)
	own := newSigner(t, "own")
	s := newAPIServer(t, credential, keysOf(t, own))
	body := map[string]any{"name": "k", "issuer": podIssuer, "server": s.input(), "review": true}
	s.set(func() { s.forbidden = true })
	if m := wantError(t, e.Do(post(body)), 400, "review_unusable"); !strings.Contains(m, "create on tokenreviews") {
		t.Errorf("message %q does not say what to do", m)
	}
	s.set(func() { s.forbidden = false })
	if m := e.Do(post(body)).Want(201); m["review"] != true {
		t.Errorf("review is %v", m["review"])
	}
	token := podToken(t, own, podIssuer, nil)
	if m := e.Do(patch("k", map[string]any{"test_token": token})).Want(200); m["tested"].(map[string]any)["subject"] != "system:serviceaccount:shop:web" {
		t.Errorf("tested %v", m["tested"])
	}
	s.set(func() { s.gone = "[invalid bearer token, service account token has been invalidated]" })
	r := e.Do(patch("k", map[string]any{"test_token": token}))
	if m := wantError(t, r, 400, "test_token_refused"); !strings.Contains(m, "token-review") || !strings.Contains(m, "invalidated") {
		t.Errorf("message %q does not say that the API server does not stand by it", m)
	}
	nowhere(t, e, token, r)
	s.set(func() { s.forbidden = true })
	wantError(t, e.Do(patch("k", map[string]any{"test_token": token})), 400, "review_unusable")
	// Without a review the token is as good as its signature.
	if m := e.Do(patch("k", map[string]any{"review": false, "test_token": token})).Want(200); m["review"] != false {
		t.Errorf("review is %v", m["review"])
	}
	if got := string(e.Events(1)[0].ResponseData); !strings.Contains(got, `"review":{"from":true,"to":false}`) {
		t.Errorf("the event tells %s", got)
	}
}

func TestReviewNeedsAnAPIServerAndACredential(t *testing.T) {
	e := start(t)
	for _, server := range []any{nil, map[string]any{"url": "https://127.0.0.1:1"}, map[string]any{"url": "https://127.0.0.1:1", "token": ""}} {
		body := uploaded(t, "k")
		body["review"], body["server"] = true, server
		wantError(t, e.Do(post(body)), 400, "invalid_body")
	}
	s := newAPIServer(t, credential, nil)
	body := uploaded(t, "k")
	body["server"], body["review"] = s.input(), true
	e.Do(post(body)).Want(201)
	wantError(t, e.Do(patch("k", map[string]any{"server": nil})), 400, "invalid_body")
	wantError(t, e.Do(patch("k", map[string]any{"server": map[string]any{"token": ""}})), 400, "invalid_body")
}

func TestAnAPIServersAddressIsAHostPerhapsWithAPath(t *testing.T) {
	e := start(t)
	for _, url := range []string{
		"", "https://", "http://127.0.0.1:1", "https://user:pw@127.0.0.1:1", "https://127.0.0.1:1/../api", "https://127.0.0.1:1/a%2fb", "https://127.0.0.1:1?x", "https://127.0.0.1:1/?", "https://127.0.0.1:1#x",
		"ftp://127.0.0.1", "127.0.0.1:6443", "https:127.0.0.1", "https://127.0.0.1:1\n", "https://" + strings.Repeat("a", 2000), "https://:6443",
	} {
		body := uploaded(t, "k")
		body["server"] = map[string]any{"url": url, "token": "t"}
		wantError(t, e.Do(post(body)), 400, "invalid_body")
	}
	for n, c := range [][2]string{
		{"https://API.Example:443/", "https://api.example"},
		{"https://Api.Example:6443", "https://api.example:6443"},
		{"https://[::1]:6443/", "https://[::1]:6443"},
		{"https://[::1]", "https://[::1]"},
		{"https://Rancher.example:443/k8s/clusters/c-m-Abc/", "https://rancher.example/k8s/clusters/c-m-Abc"},
	} {
		body := uploaded(t, fmt.Sprint("k", n))
		body["server"] = map[string]any{"url": c[0], "token": "t"}
		if got := e.Do(post(body)).Want(201)["server"].(map[string]any)["url"]; got != c[1] {
			t.Errorf("%s is kept as %s, want %s", c[0], got, c[1])
		}
	}
}

// Clusters set up alike have one issuer. Their API servers tell them apart, and
// one API server is one cluster.
func TestClustersWithOneIssuerAreToldApartByTheirAPIServers(t *testing.T) {
	e := start(t)
	a, b := newSigner(t, "a"), newSigner(t, "b")
	one, two := newAPIServer(t, credential, keysOf(t, a)), newAPIServer(t, credential, keysOf(t, b))
	e.Do(post(map[string]any{"name": "one", "issuer": podIssuer, "server": one.input()})).Want(201)
	e.Do(post(map[string]any{"name": "two", "issuer": podIssuer, "server": two.input()})).Want(201)
	e.Do(post(map[string]any{"name": "up", "issuer": podIssuer, "jwks": keysOf(t, newSigner(t, "c"))})).Want(201)
	for name, body := range map[string]map[string]any{
		"the same server":           {"server": one.input()},
		"its keys, uploaded":        {"jwks": keysOf(t, a)},
		"its keys, another address": {"server": newAPIServer(t, credential, keysOf(t, a)).input()},
	} {
		body["name"], body["issuer"] = "again", podIssuer
		if m := wantError(t, e.Do(post(body)), 409, "issuer_taken"); !strings.Contains(m, `"one"`) {
			t.Errorf("%s: message %q does not name the cluster", name, m)
		}
	}
	wantError(t, e.Do(patch("two", map[string]any{"server": one.input()})), 409, "issuer_taken")
	// An API server that does not answer holds up nobody's registration.
	one.Close()
	e.Do(post(map[string]any{"name": "three", "issuer": podIssuer, "jwks": keysOf(t, newSigner(t, "d"))})).Want(201)

	theirs := post(map[string]any{"name": "theirs", "issuer": podIssuer, "server": two.input()})
	theirs.As = e.Other.IAMID
	e.Do(theirs).Want(201)
}

// What is tried out and refused must not count for the registration as it is.
func TestAChangeThatIsRefusedLeavesNoKeysBehind(t *testing.T) {
	e := start(t)
	own, wrong := newSigner(t, "own"), newSigner(t, "wrong")
	s := newAPIServer(t, credential, keysOf(t, own))
	e.Do(post(map[string]any{"name": "k", "issuer": podIssuer, "server": s.input()})).Want(201)
	other := newAPIServer(t, credential, keysOf(t, wrong))
	token := podToken(t, wrong, podIssuer, map[string]any{"aud": []string{"vault"}})
	wantError(t, e.Do(patch("k", map[string]any{"server": other.input(), "test_token": token})), 400, "test_token_refused")
	wantError(t, e.Do(patch("k", map[string]any{"test_token": podToken(t, wrong, podIssuer, nil)})), 400, "test_token_refused")
	e.Do(patch("k", map[string]any{"test_token": podToken(t, own, podIssuer, nil)})).Want(200)
}
