package authz_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/authz"
)

func TestACallerPassesWithTheRightAndOnlyWithIt(t *testing.T) {
	i := start(t)
	h := service(i.guard())
	id, key := i.identity("ada")
	ada := i.login(key)
	w := get(h, ada)
	want(t, "without a policy", w, 403)
	if !strings.Contains(w.Body.String(), "transaction") || !strings.HasPrefix(w.Header().Get("WWW-Authenticate"), `Bearer realm="documents", error="insufficient_scope"`) {
		t.Errorf("%v %s", w.Header(), w.Body)
	}
	i.grant(id, "Reader")
	i.advance(time.Second)
	w = get(h, ada)
	want(t, "with Reader", w, 200)
	if w.Body.String() != id {
		t.Errorf("the handler is told that %s calls, not %s", w.Body, id)
	}
	want(t, "to write with Reader", send(h, "PUT", "/documents/plan", ada), 403)
	want(t, "without a token", get(h, ""), 401)
}

func TestAGuardRefusesSettingsThatCannotWork(t *testing.T) {
	for _, cfg := range []authz.Config{
		{}, {URL: "iam.example.com", Service: "s", Token: authz.APIKey("k")}, {URL: "ftp://x", Service: "s", Token: authz.APIKey("k")},
		{URL: "https://x", Token: authz.APIKey("k")}, {URL: "https://x", Service: "s"},
	} {
		if _, err := authz.New(cfg); err == nil {
			t.Errorf("%+v is taken", cfg)
		}
	}
}

// forger signs tokens with a key of its own.
type forger struct {
	t   *testing.T
	key *ecdsa.PrivateKey
	kid string
}

func newForger(t *testing.T, kid string) *forger {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &forger{t, key, kid}
}

func (f *forger) sign(claims map[string]any) string {
	f.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: f.key, KeyID: f.kid}}, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		f.t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		f.t.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		f.t.Fatal(err)
	}
	return raw
}

// parts decodes a token's header and claims.
func parts(t *testing.T, raw string) (header, claims map[string]any) {
	t.Helper()
	for n, into := range []*map[string]any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(strings.Split(raw, ".")[n])
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(b, into); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

// encoded joins a header and claims without a signature.
func encoded(t *testing.T, header, claims map[string]any) string {
	t.Helper()
	var out []string
	for _, part := range []map[string]any{header, claims} {
		b, err := json.Marshal(part)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, base64.RawURLEncoding.EncodeToString(b))
	}
	return strings.Join(out, ".")
}

func (i *install) keys() jose.JSONWebKeySet {
	i.t.Helper()
	resp, err := http.Get(i.url + keysPath)
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	var set jose.JSONWebKeySet
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		i.t.Fatal(err)
	}
	return set
}

func TestATokenThatProvesNothingIsRefusedWithoutAQuestion(t *testing.T) {
	i := start(t)
	h := service(i.guard())
	good, _ := i.reader()
	want(t, "the good token", get(h, good), 200)
	i.counted(evaluationPath)

	header, claims := parts(t, good)
	kid, _ := header["kid"].(string)
	published := i.keys()
	public := published.Key(kid)[0]
	der, err := x509.MarshalPKIXPublicKey(public.Key)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(public)
	if err != nil {
		t.Fatal(err)
	}
	hs256 := func(secret []byte) string {
		raw := encoded(t, map[string]any{"alg": "HS256", "kid": kid}, claims)
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(raw))
		return raw + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
	forged := newForger(t, kid)
	longer := maps.Clone(claims)
	longer["exp"] = 1e12
	signature := good[strings.LastIndex(good, ".")+1:]
	for what, raw := range map[string]string{
		"forged with the right key id":            forged.sign(claims),
		"of a key that nobody has":                newForger(t, "nobodys").sign(claims),
		"of no key id":                            newForger(t, "").sign(claims),
		"alg none":                                encoded(t, map[string]any{"alg": "none", "kid": kid}, claims) + ".",
		"alg none with the signature":             encoded(t, map[string]any{"alg": "none", "kid": kid}, claims) + "." + signature,
		"HS256 with the public key (DER)":         hs256(der),
		"HS256 with the public key (PEM)":         hs256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		"HS256 with the public key (JWK)":         hs256(jwk),
		"changed claims under the old signature":  encoded(t, header, longer) + "." + signature,
		"another algorithm than its key is for":   encoded(t, map[string]any{"alg": "RS256", "kid": kid}, claims) + "." + signature,
		"of another type":                         encoded(t, map[string]any{"alg": "ES256", "kid": kid, "typ": "rt+jwt"}, claims) + "." + signature,
		"two parts":                               good[:strings.LastIndex(good, ".")],
		"a word":                                  "token",
		"too long":                                good + strings.Repeat("x", 64<<10),
		"the good one with a space in the middle": good[:10] + " " + good[10:],
	} {
		w := get(h, raw)
		want(t, what, w, 401)
		if got := w.Header().Get("WWW-Authenticate"); got != `Bearer realm="documents", error="invalid_token"` {
			t.Errorf("%s: challenge %s", what, got)
		}
	}
	w := get(h, "")
	if got := w.Header().Get("WWW-Authenticate"); got != `Bearer realm="documents"` || w.Code != 401 {
		t.Errorf("without a token: %d, challenge %s", w.Code, got)
	}
	r := httptest.NewRequest(http.MethodGet, "/documents/plan", nil)
	r.Header.Set("Authorization", "Basic "+good)
	w = httptest.NewRecorder()
	h.ServeHTTP(w, r)
	want(t, "with another scheme", w, 401)
	if n := i.counted(evaluationPath); n != 0 {
		t.Errorf("%d questions were asked", n)
	}

	i.advance(2 * time.Hour)
	want(t, "expired", get(h, good), 401)
	i.advance(-24 * time.Hour)
	want(t, "from the future", get(h, good), 401)
	i.advance(22 * time.Hour)
	want(t, "of another issuer", get(service(i.guard(func(c *authz.Config) { c.Issuer = "https://iam.example.com/identity" })), good), 401)
}

func TestTheServerHasTheLastWordOnAToken(t *testing.T) {
	i := start(t)
	mine := newForger(t, "mine")
	set := i.keys()
	set.Keys = append(set.Keys, jose.JSONWebKey{Key: mine.key.Public(), KeyID: "mine", Algorithm: "ES256", Use: "sig"})
	i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == keysPath {
			_ = json.NewEncoder(w).Encode(set)
		}
		return r.URL.Path == keysPath
	})
	h := service(i.guard())
	good, _ := i.reader()
	_, claims := parts(t, good)
	spoilt := func(key string, value any) string {
		c := maps.Clone(claims)
		if c[key] = value; value == nil {
			delete(c, key)
		}
		return mine.sign(c)
	}
	for what, raw := range map[string]string{
		"no issuer": spoilt("iss", nil), "another issuer": spoilt("iss", "https://x"), "no end": spoilt("exp", nil), "an end in the past": spoilt("exp", 1),
		"a beginning in the future": spoilt("iat", time.Now().Add(time.Hour).Unix()), "nobody": spoilt("iam_id", nil), "no account": spoilt("account", nil),
		"claims of other types": spoilt("exp", "tomorrow"),
	} {
		want(t, what, get(h, raw), 401)
	}
	i.counted(evaluationPath)
	want(t, "a token that only the guard believes", get(h, mine.sign(claims)), 403)
	if n := i.counted(evaluationPath); n != 1 {
		t.Errorf("%d questions were asked", n)
	}
}

func TestATokenOfAnotherAccountIsDenied(t *testing.T) {
	i := start(t)
	made := i.call("POST", "/v1/accounts", map[string]any{"name": "Other", "owner": map[string]string{"email": "bob@example.com"}})
	owner, _ := made["owner"].(map[string]any)
	want(t, "the other account's owner", get(service(i.guard()), i.login(text(owner, "apikey"))), 403)
}

func TestADecisionIsKeptForASecondAtMost(t *testing.T) {
	i := start(t)
	h := service(i.guard())
	ada, policy := i.reader()
	for range 5 {
		want(t, "a reader", get(h, ada), 200)
	}
	want(t, "to write", send(h, "PUT", "/documents/plan", ada), 403)
	want(t, "another document", send(h, "GET", "/documents/other", ada), 200)
	if n := i.counted(evaluationPath); n != 3 {
		t.Errorf("%d questions for three different ones", n)
	}
	i.revoke(policy)
	i.advance(time.Second)
	want(t, "a second after the policy was revoked", get(h, ada), 403)
	if n := i.counted(evaluationPath); n != 1 {
		t.Errorf("%d questions", n)
	}
}

func TestTheServerCanForbidKeeping(t *testing.T) {
	i := start(t)
	for _, age := range []string{`"max_cache_age_seconds":0`, `"max_cache_age_seconds":-5`, `"x":1`} {
		i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == evaluationPath {
				_, _ = io.WriteString(w, `{"decision":true,"context":{`+age+`}}`)
			}
			return r.URL.Path == evaluationPath
		})
		h := service(i.guard())
		ada, _ := i.reader()
		i.counted(evaluationPath)
		want(t, age, get(h, ada), 200)
		want(t, age, get(h, ada), 200)
		if n := i.counted(evaluationPath); n != 2 {
			t.Errorf("%s: %d questions, want 2", age, n)
		}
	}
}

func TestEqualQuestionsAtOneTimeShareACall(t *testing.T) {
	i := start(t)
	release := make(chan struct{})
	i.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == evaluationPath {
			<-release
		}
		return false
	})
	g := i.guard()
	ada, _ := i.reader()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := g.Allow(t.Context(), ada, readDoc, authz.Resource{ID: "plan"}); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(200 * time.Millisecond) // for them to be under way
	close(release)
	wg.Wait()
	if n := i.counted(evaluationPath); n != 1 {
		t.Errorf("%d calls", n)
	}
	if n := i.counted(tokenPath); n != 1 {
		t.Errorf("%d tokens of its own", n)
	}
}

func TestALateQuestionDoesNotGetAnOldAnswer(t *testing.T) {
	i := start(t)
	asked, release := make(chan struct{}, 10), make(chan struct{})
	var first sync.Once
	i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		slow := false
		if r.URL.Path == evaluationPath {
			first.Do(func() { slow = true })
		}
		if slow { // decided now, told later
			asked <- struct{}{}
			<-release
			_, _ = io.WriteString(w, `{"decision":true,"context":{"max_cache_age_seconds":1}}`)
		}
		return slow
	})
	g := i.guard()
	ada, policy := i.reader()
	allow := func(done chan<- error) {
		_, err := g.Allow(context.Background(), ada, readDoc, authz.Resource{ID: "plan"})
		done <- err
	}
	early, late := make(chan error, 1), make(chan error, 1)
	go allow(early)
	<-asked
	i.revoke(policy)
	i.advance(1100 * time.Millisecond)
	go allow(late)
	time.Sleep(100 * time.Millisecond) // for it to join the first
	close(release)
	if err := <-early; err != nil {
		t.Errorf("the first question: %v", err)
	}
	if err := <-late; !errors.Is(err, authz.ErrDenied) {
		t.Errorf("a question long after the revocation: %v", err)
	}
}

func TestAServerThatCannotBeAskedIsNeverAPass(t *testing.T) {
	i := start(t)
	ada, _ := i.reader()
	known := i.guard()
	want(t, "at first", get(service(known), ada), 200)
	huge := strings.Repeat(" ", 3<<20) + `{"decision":true,"context":{"max_cache_age_seconds":1}}`
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		t.Error("a redirect was followed")
		_, _ = io.WriteString(w, `{"decision":true,"access_token":"x"}`)
	}))
	t.Cleanup(elsewhere.Close)
	for what, answer := range map[string]func(w http.ResponseWriter){
		"403": func(w http.ResponseWriter) { w.WriteHeader(http.StatusForbidden) },
		"400": func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadRequest) },
		"500": func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = io.WriteString(w, `{"decision":true}`)
		},
		"always 401":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusUnauthorized) },
		"nothing":     func(http.ResponseWriter) {},
		"no decision": func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"context":{}}`) },
		"a text":      func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"decision":"true"}`) },
		"null":        func(w http.ResponseWriter) { _, _ = io.WriteString(w, `{"decision":null}`) },
		"HTML":        func(w http.ResponseWriter) { _, _ = io.WriteString(w, "<html>") },
		"too much":    func(w http.ResponseWriter) { _, _ = io.WriteString(w, huge) },
		"a redirect": func(w http.ResponseWriter) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(http.StatusTemporaryRedirect)
		},
		"another one": func(w http.ResponseWriter) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(http.StatusFound)
		},
		"a cut answer": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, `{"decision":true}`)
		},
	} {
		for _, path := range []string{evaluationPath, tokenPath, keysPath} {
			i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == path {
					answer(w)
				}
				return r.URL.Path == path
			})
			w := get(service(i.guard(func(c *authz.Config) { c.Client = &http.Client{} })), ada)
			if w.Code != 503 && (w.Code != 401 || path != keysPath) { // a key set without the key is one
				t.Errorf("%s from %s: %d %s", what, path, w.Code, w.Body)
			}
			if w.Code == 503 && (w.Header().Get("Retry-After") == "" || strings.Contains(w.Body.String(), "http")) {
				t.Errorf("%s from %s: %v %s", what, path, w.Header(), w.Body)
			}
		}
	}
	i.intercept(nil)
	i.stop()
	i.advance(time.Second)
	want(t, "with the server stopped, by one who has the keys", get(service(known), ada), 503)
	want(t, "with the server stopped, by one who has not", get(service(i.guard()), ada), 503)
	i.proxy.Close()
	want(t, "with nobody listening", get(service(i.guard()), ada), 503)
	want(t, "and without a token", get(service(i.guard()), ""), 401)
}

func TestAServiceThatMayNotAskAnswers503(t *testing.T) {
	i := start(t)
	ada, _ := i.reader()
	_, key := i.identity("not a decision point")
	want(t, "without Decision Point", get(service(i.guard(func(c *authz.Config) { c.Token = authz.APIKey(key) })), ada), 503)
	want(t, "with a wrong key", get(service(i.guard(func(c *authz.Config) { c.Token = authz.APIKey("wrong") })), ada), 503)
	missing := filepath.Join(t.TempDir(), "token")
	want(t, "without its token file", get(service(i.guard(func(c *authz.Config) { c.Token = authz.ComputeResource(missing, "p") })), ada), 503)
}

func TestARotationOfTheKeysIsNoticed(t *testing.T) {
	i := start(t)
	var rotated atomic.Bool
	i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != keysPath || rotated.Load() {
			return false
		}
		_, _ = io.WriteString(w, `{"keys":[]}`)
		return true
	})
	h := service(i.guard())
	ada, _ := i.reader()
	want(t, "before the key is published", get(h, ada), 401)
	rotated.Store(true)
	want(t, "at once after that", get(h, ada), 401)
	i.advance(10 * time.Second)
	want(t, "10 s later", get(h, ada), 200)
}

func TestMadeUpKeyIDsAreNotPassedOn(t *testing.T) {
	i := start(t)
	h := service(i.guard())
	ada, _ := i.reader()
	want(t, "a reader", get(h, ada), 200)
	_, claims := parts(t, ada)
	i.counted(keysPath)
	flood := func() {
		var wg sync.WaitGroup
		for n := range 40 {
			raw := newForger(t, fmt.Sprint("made-up-", n)).sign(claims)
			wg.Go(func() { want(t, "a made-up key", get(h, raw), 401) })
		}
		wg.Wait()
	}
	flood()
	if n := i.counted(keysPath); n != 0 { // the first fetch is less than 10 s ago
		t.Errorf("%d fetches", n)
	}
	i.advance(10 * time.Second)
	flood()
	if n := i.counted(keysPath); n != 1 {
		t.Errorf("%d fetches after 10 s, want 1", n)
	}
}

func TestASlowKeyEndpointHoldsUpNobodyWithAKnownKey(t *testing.T) {
	i := start(t)
	h := service(i.guard())
	ada, _ := i.reader()
	want(t, "a reader", get(h, ada), 200)
	_, claims := parts(t, ada)
	release := make(chan struct{})
	i.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == keysPath {
			<-release
		}
		return false
	})
	i.advance(11 * time.Second)
	unknown := make(chan int, 1)
	raw := newForger(t, "made-up").sign(claims)
	go func() { unknown <- get(h, raw).Code }()
	for i.counted(keysPath) == 0 {
		time.Sleep(time.Millisecond)
	}
	want(t, "while keys are fetched", get(h, ada), 200)
	i.advance(6 * time.Minute) // now the known key is old
	want(t, "while keys are fetched, with an old key", get(h, ada), 200)
	select {
	case code := <-unknown:
		t.Errorf("the made-up key is answered %d before the fetch is done", code)
	default:
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.guard().Allow(ctx, ada, readDoc, authz.Resource{}); !errors.Is(err, authz.ErrUnavailable) {
		t.Errorf("a request that has ended waits: %v", err)
	}
	close(release)
	if code := <-unknown; code != 401 {
		t.Errorf("the made-up key: %d", code)
	}
}

func TestKnownKeysOutliveAShortOutageOfTheKeyEndpoint(t *testing.T) {
	i := start(t)
	g := i.guard()
	ada, _ := i.reader()
	want(t, "a reader", get(service(g), ada), 200)
	i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == keysPath {
			w.WriteHeader(http.StatusInternalServerError)
		}
		return r.URL.Path == keysPath
	})
	i.advance(20 * time.Minute)
	want(t, "20 minutes later", get(service(g), ada), 200)
	i.advance(39 * time.Minute) // the token still lives
	want(t, "59 minutes later", get(service(g), ada), 200)
}

func TestTheServicesOwnTokenIsReplacedOnce(t *testing.T) {
	i := start(t)
	g := i.guard()
	ada, _ := i.reader()
	bob, _ := i.reader()
	want(t, "a reader", get(service(g), ada), 200)
	i.counted(tokenPath)
	var mu sync.Mutex
	refused := map[string]bool{}
	first := ""
	i.intercept(func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		own := r.Header.Get("Authorization")
		if r.URL.Path != evaluationPath {
			return false
		}
		if first == "" {
			first = own
		}
		if own == first {
			refused[own] = true
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}
		return false
	})
	i.advance(time.Second)
	var wg sync.WaitGroup
	for n := range 20 {
		raw := []string{ada, bob}[n%2]
		wg.Go(func() { want(t, "after the refusal", send(service(g), "GET", fmt.Sprint("/documents/", n), raw), 200) })
	}
	wg.Wait()
	if n := i.counted(tokenPath); n != 1 {
		t.Errorf("%d new tokens for one that was refused", n)
	}
	// A token near its end is replaced before anybody refuses it.
	i.intercept(nil)
	i.advance(59*time.Minute + 30*time.Second)
	_, _ = g.Allow(t.Context(), ada, readDoc, authz.Resource{})
	if n := i.counted(tokenPath); n != 1 {
		t.Errorf("%d new tokens near the old one's end", n)
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	i := start(t)
	frozen := time.Now()
	g := i.guard(func(c *authz.Config) { c.Now = func() time.Time { return frozen } })
	ada, _ := i.reader()
	authz.Fill(g, 3*authz.MaxKept, frozen.Add(time.Second))
	if n := authz.Kept(g); n != authz.MaxKept {
		t.Errorf("%d decisions are kept", n)
	}
	want(t, "a reader when the cache is full", get(service(g), ada), 200)
	for range 2 {
		frozen = frozen.Add(time.Second)
		want(t, "a reader", get(service(g), ada), 200)
	}
	if n := authz.Kept(g); n > 2 {
		t.Errorf("%d decisions are kept when the others are old", n)
	}
}

func TestTheResourceIsAskedForOnlyWhenTheCallerIsKnown(t *testing.T) {
	i := start(t)
	g := i.guard()
	ada, _ := i.reader()
	asked := 0
	h := g.Require(readDoc, func(*http.Request) authz.Resource { asked++; return authz.Resource{} })(http.NotFoundHandler())
	want(t, "without a token", get(h, ""), 401)
	if asked != 0 {
		t.Error("the resource was looked up for a stranger")
	}
	want(t, "a reader", get(h, ada), 404)
	if asked != 1 {
		t.Errorf("the resource was asked for %d times", asked)
	}
}

func TestAQuestionCarriesWhatPoliciesCanName(t *testing.T) {
	i := start(t)
	var seen []map[string]any
	i.intercept(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == evaluationPath {
			b, _ := io.ReadAll(r.Body)
			var m map[string]any
			_ = json.Unmarshal(b, &m)
			seen = append(seen, m)
			r.Body = io.NopCloser(strings.NewReader(string(b)))
		}
		return false
	})
	g := i.guard()
	ada, _ := i.reader()
	r := authz.Resource{Instance: "archive", Type: "document", ID: "plan", Group: "rg", Region: "us-south", Attributes: map[string]string{"shelf": "7"}}
	if _, err := g.Allow(t.Context(), ada, readDoc, r); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "crn:v1:bluemix:public:documents::a/x:archive:document:plan"} {
		if _, err := g.Allow(t.Context(), ada, readDoc, authz.Resource{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, m := range seen {
		b, err := json.Marshal(m["resource"])
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(b))
	}
	if !slices.Equal(got, []string{
		`{"id":"plan","properties":{"region":"us-south","resourceGroupId":"rg","serviceInstance":"archive","shelf":"7"},"type":"documents/document"}`,
		`{"id":"","properties":{},"type":"documents"}`,
		`{"id":"","properties":{"resource":"crn:v1:bluemix:public:documents::a/x:archive:document:plan"},"type":"documents"}`,
	}) {
		t.Errorf("resources %s", got)
	}
	if s, _ := seen[0]["subject"].(map[string]any); s["type"] != "service_id" {
		t.Errorf("subject %v", s)
	}
}
