package attest_test

import (
	"crypto/elliptic"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/token"
)

// apiServer stands for an API server where the network or the API server is
// broken or hostile; what the genuine one says is tested with the genuine one.
type apiServer struct {
	*httptest.Server
	credential string

	mu       sync.Mutex
	keys     []byte
	answer   func(w http.ResponseWriter, r *http.Request) // to everything; nil for a good answer
	status   func(token string, audiences []string) object
	reviewed []string // tokens
	fetches  int
}

func newAPIServer(t *testing.T, keys []byte) *apiServer {
	t.Helper()
	s := &apiServer{keys: keys, credential: "the-credential-of-the-reviewer"}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var review struct {
		APIVersion, Kind string
		Spec             struct {
			Token     string
			Audiences []string
		}
	}
	_ = json.Unmarshal(body, &review)
	s.mu.Lock()
	if review.Kind == "TokenReview" {
		s.reviewed = append(s.reviewed, review.Spec.Token)
	} else {
		s.fetches++
	}
	answer, status, keys, credential := s.answer, s.status, s.keys, s.credential
	s.mu.Unlock()
	switch {
	case answer != nil:
		answer(w, r)
	case r.Header.Get("Authorization") != "Bearer "+credential:
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"kind":"Status","message":"Unauthorized: %s"}`, r.Header.Get("Authorization"))
	case r.Method == http.MethodGet && r.URL.Path == "/openid/v1/jwks":
		if !strings.Contains(r.Header.Get("Accept"), "application/jwk-set+json") {
			w.WriteHeader(http.StatusNotAcceptable) // as the genuine one does
			return
		}
		_, _ = w.Write(keys)
	case r.Method == http.MethodPost && r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" && review.APIVersion == "authentication.k8s.io/v1":
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(object{"kind": "TokenReview", "status": status(review.Spec.Token, review.Spec.Audiences)})
	default:
		http.NotFound(w, r)
	}
}

func (s *apiServer) set(change func(*apiServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *apiServer) asked() (reviews, fetches int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reviewed), s.fetches
}

func (s *apiServer) ca() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// behind registers the API server for a cluster.
func (s *apiServer) behind(c *cluster.Cluster, sealer *token.Sealer) *cluster.Cluster {
	c.Server = &cluster.APIServer{URL: s.URL, CA: s.ca()}
	c.Server.Sealed = sealer.Seal([]byte(s.credential), c.SealLabel())
	return c
}

func newSealer(t *testing.T) *token.Sealer {
	t.Helper()
	s, err := token.NewSealer([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestKeysComeFromTheAPIServerWithItsCredential(t *testing.T) {
	s, c, sealer := newAPIServer(t, jwttest.Set(t, jwk(t, "k1"))), newClock(), newSealer(t)
	var told []string
	k := &attest.Keys{Now: c.Now, Opener: sealer, Observe: func(source string, failed bool) { told = append(told, fmt.Sprint(source, " ", failed)) }}
	registered := s.behind(uploaded("c0ffee", nil), sealer)
	wantKey(t, k, registered, "k1")
	wantNoKey(t, k, registered, "k2")
	if _, n := s.asked(); n != 1 {
		t.Fatalf("%d fetches", n)
	}
	s.set(func(s *apiServer) { s.keys = jwttest.Set(t, jwk(t, "k2")) })
	c.advance(10 * time.Second)
	wantKey(t, k, registered, "k2")
	wantNoKey(t, k, registered, "k1")
	if fmt.Sprint(told) != "[server false server false]" {
		t.Errorf("told %v", told)
	}
	ids, err := k.CheckIDs(ctx, registered)
	if err != nil || fmt.Sprint(ids) != "[k2]" {
		t.Errorf("ids %v, %v", ids, err)
	}
}

func TestAWithdrawnKeyCountsNoLongerThanSaid(t *testing.T) {
	s, c, sealer := newAPIServer(t, jwttest.Set(t, jwk(t, "k1"))), newClock(), newSealer(t)
	k := &attest.Keys{Now: c.Now, Opener: sealer, MaxAge: 2 * time.Second}
	registered := s.behind(uploaded("c0ffee", nil), sealer)
	wantKey(t, k, registered, "k1")
	s.set(func(s *apiServer) { s.keys = jwttest.Set(t, jwk(t, "k2")) })
	c.advance(2*time.Second - 1)
	wantKey(t, k, registered, "k1")
	wantNoKey(t, k, registered, "k2") // one fetch in the time that is said
	c.advance(1)
	wantNoKey(t, k, registered, "k1")
	wantKey(t, k, registered, "k2")
}

func TestRefreshedKeysCountAtOnceAndFailureChangesNothing(t *testing.T) {
	s, c, sealer := newAPIServer(t, jwttest.Set(t, jwk(t, "k1"))), newClock(), newSealer(t)
	k := &attest.Keys{Now: c.Now, Opener: sealer}
	registered := s.behind(uploaded("c0ffee", nil), sealer)
	wantKey(t, k, registered, "k1")
	s.set(func(s *apiServer) { s.keys = jwttest.Set(t, jwk(t, "k2")) })
	if ids, err := k.Refresh(ctx, registered); err != nil || fmt.Sprint(ids) != "[k2]" {
		t.Fatalf("%v, %v", ids, err)
	}
	wantNoKey(t, k, registered, "k1")
	s.set(func(s *apiServer) { s.answer = fails })
	if _, err := k.Refresh(ctx, registered); err == nil {
		t.Error("no error")
	}
	wantKey(t, k, registered, "k2")
}

// The credential is the account's, but not everybody who reads its log may have
// it; and the API server may send it back.
func TestTheCredentialStandsInNoError(t *testing.T) {
	sealer := newSealer(t)
	echo := func(status int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Location", "https://attacker.test/"+r.Header.Get("Authorization"))
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(object{"kind": "Status", "message": r.Header.Get("Authorization") + string(body)})
		}
	}
	for _, status := range []int{200, 201, 204, 301, 302, 307, 400, 401, 403, 404, 429, 500, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			s := newAPIServer(t, nil)
			p := newPod(t)
			p.cluster.Review = true
			s.behind(p.cluster, sealer)
			p.Reviewer = &attest.Reviewer{Opener: sealer, Now: p.clock.Now}
			s.set(func(s *apiServer) { s.answer = echo(status) })
			raw := p.token(t, nil)
			proofs, _, err := p.Verify(ctx, raw)
			if err != nil {
				t.Fatal(err)
			}
			trace, r := proofs[0].Review(ctx, true)
			if r == nil || r.Reason != attest.ReviewUnavailable {
				t.Fatalf("refusal %v", r)
			}
			fetched := s.behind(uploaded("decaf", nil), sealer)
			_, keyErr := (&attest.Keys{Now: p.clock.Now, Opener: sealer}).Check(ctx, fetched)
			if keyErr == nil {
				t.Fatal("keys were found")
			}
			checkErr := p.Reviewer.Check(ctx, p.cluster)
			if checkErr == nil {
				t.Fatal("the reviewer works")
			}
			for _, text := range []string{fmt.Sprintf("%+v", trace), r.Error(), keyErr.Error(), checkErr.Error()} {
				if strings.Contains(text, s.credential) || strings.Contains(text, raw) {
					t.Errorf("a secret stands in %s", text)
				}
			}
		})
	}
}

func TestACredentialOpensForItsClusterAndAddressOnly(t *testing.T) {
	sealer := newSealer(t)
	s := newAPIServer(t, jwttest.Set(t, jwk(t, "k1")))
	good := s.behind(uploaded("c0ffee", nil), sealer)
	other, moved := s.behind(uploaded("decaf", nil), sealer), s.behind(uploaded("c0ffee", nil), sealer)
	other.Server.Sealed = good.Server.Sealed
	moved.Server.URL = strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
	none := s.behind(uploaded("c0ffee", nil), sealer)
	none.Server.Sealed = nil
	for name, c := range map[string]*cluster.Cluster{"another cluster's": other, "another address's": moved, "none": none} {
		if _, err := (&attest.Keys{Now: time.Now, Opener: sealer}).Check(ctx, c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, n := s.asked(); n != 0 {
		t.Errorf("%d requests were made", n)
	}
	if _, err := (&attest.Keys{Now: time.Now, Opener: sealer}).Check(ctx, good); err != nil {
		t.Error(err)
	}
}

func TestTheEndOfACredentialIsWhatItSaysItself(t *testing.T) {
	sealer := newSealer(t)
	c := uploaded("c0ffee", nil)
	c.Server = &cluster.APIServer{URL: "https://10.0.0.1:6443"}
	key := jwttest.Key(t, elliptic.P256())
	for credential, want := range map[string]int64{
		jwttest.ES256(t, key, "k", `{"exp":1700000000}`, ""): 1700000000,
		jwttest.ES256(t, key, "k", `{"exp":1.7e9}`, ""):      1700000000,
		jwttest.ES256(t, key, "k", `{}`, ""):                 0,
		jwttest.ES256(t, key, "k", `{"exp":-1}`, ""):         0,
		jwttest.ES256(t, key, "k", `{"exp":1e300}`, ""):      0,
		jwttest.ES256(t, key, "k", `{"exp":"tomorrow"}`, ""): 0,
		jwttest.ES256(t, key, "k", `[]`, ""):                 0,
		"a.b.c":                                              0,
		"a-static-token":                                     0,
	} {
		c.Server.Sealed = sealer.Seal([]byte(credential), c.SealLabel())
		end, ok := attest.CredentialEnd(c, sealer)
		if ok != (want != 0) || ok && end.Unix() != want {
			t.Errorf("%s: %v %t", credential, end, ok)
		}
	}
	if _, ok := attest.CredentialEnd(uploaded("c0ffee", nil), sealer); ok {
		t.Error("a cluster without an API server has one")
	}
}

// A gateway serves the API servers of several clusters, each under a path.
func TestAnAPIServerMayStandUnderAPath(t *testing.T) {
	s, sealer := newAPIServer(t, jwttest.Set(t, jwk(t, "k1"))), newSealer(t)
	s.status = stands(nil)
	gateway := httptest.NewTLSServer(http.StripPrefix("/k8s/clusters/c-1", http.HandlerFunc(s.serve)))
	t.Cleanup(gateway.Close)
	at := func(c *cluster.Cluster, path string) *cluster.Cluster {
		c.Server = &cluster.APIServer{URL: gateway.URL + path, CA: s.ca()} // all test servers have one certificate
		c.Server.Sealed = sealer.Seal([]byte(s.credential), c.SealLabel())
		return c
	}
	p := newPod(t)
	k := &attest.Keys{Now: p.clock.Now, Opener: sealer}
	if ids, err := k.CheckIDs(ctx, at(uploaded("c0ffee", nil), "/k8s/clusters/c-1")); err != nil || fmt.Sprint(ids) != "[k1]" {
		t.Errorf("%v, %v", ids, err)
	}
	if ids, err := k.CheckIDs(ctx, at(uploaded("decaf", nil), "/k8s/clusters/c-2")); err == nil {
		t.Errorf("another cluster's path has keys %v", ids)
	}
	p.cluster.Review = true
	at(p.cluster, "/k8s/clusters/c-1")
	p.Reviewer = &attest.Reviewer{Opener: sealer, Now: p.clock.Now}
	t.Cleanup(p.Reviewer.Close)
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, r := proofs[0].Review(ctx, true); r != nil {
		t.Error(r)
	}
	if n, _ := s.asked(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	// The credential is bound to the path, too: it opens nowhere else.
	p.cluster.Server.URL = gateway.URL + "/k8s/clusters/c-3"
	p.cluster.Revision++
	if err := p.Reviewer.Check(ctx, p.cluster); err == nil || strings.Contains(err.Error(), "404") {
		t.Errorf("the credential was sent to another path: %v", err)
	}
}
