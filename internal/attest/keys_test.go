package attest_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

var ctx = context.Background()

const home = "4f1e0c00000000000000000000000001"

// clock is set by the test.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, time.June, 15, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// issuer is a cluster's discovery endpoint over TLS. The test sets what it
// answers between requests.
type issuer struct {
	*httptest.Server
	discoveries, keySets atomic.Int64

	mu        sync.Mutex
	keys      []byte
	discovery func(w http.ResponseWriter, r *http.Request) // nil for a good answer
	keySet    func(w http.ResponseWriter, r *http.Request) // nil for a good answer
}

func newIssuer(t *testing.T, keys ...jose.JSONWebKey) *issuer {
	t.Helper()
	i := &issuer{keys: jwttest.Set(t, keys...)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		i.discoveries.Add(1)
		if f := i.get(&i.discovery); f != nil {
			f(w, r)
			return
		}
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/keys")
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, r *http.Request) {
		i.keySets.Add(1)
		if f := i.get(&i.keySet); f != nil {
			f(w, r)
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		_, _ = w.Write(i.keys)
	})
	i.Server = httptest.NewUnstartedServer(mux)
	i.Config.ErrorLog = log.New(io.Discard, "", 0)
	i.StartTLS()
	t.Cleanup(i.Close)
	return i
}

func (i *issuer) get(f *func(http.ResponseWriter, *http.Request)) func(http.ResponseWriter, *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return *f
}

func (i *issuer) set(change func(*issuer)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	change(i)
}

func fails(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "no", http.StatusInternalServerError)
}

func (i *issuer) cluster() *cluster.Cluster {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw})
	c := uploaded("c0ffee", nil)
	c.Issuer, c.CA = i.URL, string(ca)
	return c
}

// uploaded is a cluster whose keys were registered.
func uploaded(id string, jwks []byte) *cluster.Cluster {
	return &cluster.Cluster{
		ID: id, CRN: "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + home + ":" + id + "::", AccountID: home,
		Name: "my-cluster", Type: identity.IKSSA, Location: "us-south", ResourceGroupID: "rg-1",
		Issuer: "https://kubernetes.default.svc", Audience: "iam", JWKS: jwks,
	}
}

func jwk(t *testing.T, kid string) jose.JSONWebKey {
	t.Helper()
	return jwttest.JWK(jwttest.Key(t, elliptic.P256()).Public(), kid, "ES256")
}

func wantKey(t *testing.T, k *attest.Keys, c *cluster.Cluster, kid string) {
	t.Helper()
	keys, err := k.Of(ctx, c, kid)
	if err != nil || len(keys) != 1 || keys[0].KeyID != kid {
		t.Fatalf("key %s: %d keys, %v", kid, len(keys), err)
	}
}

func wantNoKey(t *testing.T, k *attest.Keys, c *cluster.Cluster, kid string) {
	t.Helper()
	if keys, err := k.Of(ctx, c, kid); !errors.Is(err, attest.ErrNoSuchKey) {
		t.Fatalf("key %s: %d keys, %v; want ErrNoSuchKey", kid, len(keys), err)
	}
}

// wantUnavailable demands an error that does not say that the key does not
// exist: nobody knows that.
func wantUnavailable(t *testing.T, k *attest.Keys, c *cluster.Cluster, kid string) {
	t.Helper()
	if keys, err := k.Of(ctx, c, kid); err == nil || errors.Is(err, attest.ErrNoSuchKey) {
		t.Fatalf("key %s: %d keys, %v; want the error of the fetch", kid, len(keys), err)
	}
}

func (i *issuer) wantFetches(t *testing.T, n int64) {
	t.Helper()
	if got := i.discoveries.Load(); got != n {
		t.Fatalf("%d fetches, want %d", got, n)
	}
}

func TestKeysAreFetchedOnceAndKept(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1"), jwk(t, "k2")), newClock()
	k := &attest.Keys{Now: c.Now}
	for range 100 {
		wantKey(t, k, i.cluster(), "k1")
		wantKey(t, k, i.cluster(), "k2")
		c.advance(time.Second)
	}
	i.wantFetches(t, 1)
}

func TestUploadedKeysAreNotFetched(t *testing.T) {
	i := newIssuer(t, jwk(t, "k2"))
	c := i.cluster()
	c.JWKS = jwttest.Set(t, jwk(t, "k1"))
	k := &attest.Keys{Now: newClock().Now}
	wantKey(t, k, c, "k1")
	wantNoKey(t, k, c, "k2")
	i.wantFetches(t, 0)
	c.JWKS = []byte("{")
	c.Revision++
	wantUnavailable(t, k, c, "k1")
}

func TestAnUnknownKeyIDCausesAFetchAtABoundedRate(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	k := &attest.Keys{Now: c.Now}
	wantKey(t, k, i.cluster(), "k1")
	for n := range 50 {
		wantNoKey(t, k, i.cluster(), fmt.Sprint("made-up-", n))
	}
	i.wantFetches(t, 1)
	c.advance(10 * time.Second)
	for n := range 50 {
		wantNoKey(t, k, i.cluster(), fmt.Sprint("made-up-", n))
	}
	i.wantFetches(t, 2)
	// Ten minutes of a flood: one fetch in ten seconds.
	for range 600 {
		c.advance(time.Second)
		wantNoKey(t, k, i.cluster(), "made-up")
	}
	if n := i.discoveries.Load(); n > 2+60 {
		t.Errorf("%d fetches in ten minutes", n)
	}
}

func TestARotationIsNoticed(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	k := &attest.Keys{Now: c.Now}
	wantKey(t, k, i.cluster(), "k1")
	c.advance(time.Minute)
	i.set(func(i *issuer) { i.keys = jwttest.Set(t, jwk(t, "k1"), jwk(t, "k2")) })
	wantKey(t, k, i.cluster(), "k2")
	wantKey(t, k, i.cluster(), "k1")
	i.wantFetches(t, 2)
}

func TestAWithdrawnKeyStopsCounting(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	k := &attest.Keys{Now: c.Now}
	wantKey(t, k, i.cluster(), "k1")
	i.set(func(i *issuer) { i.keys = jwttest.Set(t, jwk(t, "k2")) })
	c.advance(5*time.Minute - time.Second)
	wantKey(t, k, i.cluster(), "k1")
	c.advance(time.Second)
	wantNoKey(t, k, i.cluster(), "k1")
	wantKey(t, k, i.cluster(), "k2")
}

func TestAKeyThatChangedUnderItsIDIsTheNewOne(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	k := &attest.Keys{Now: c.Now}
	before, err := k.Of(ctx, i.cluster(), "k1")
	if err != nil {
		t.Fatal(err)
	}
	i.set(func(i *issuer) { i.keys = jwttest.Set(t, jwk(t, "k1")) })
	c.advance(5 * time.Minute)
	after, err := k.Of(ctx, i.cluster(), "k1")
	if err != nil {
		t.Fatal(err)
	}
	a, _ := before[0].Thumbprint(5)
	b, _ := after[0].Thumbprint(5)
	if bytes.Equal(a, b) {
		t.Error("the old key still counts")
	}
}

func TestKeysServeForAnHourWhileFetchingFails(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	k := &attest.Keys{Now: c.Now}
	wantKey(t, k, i.cluster(), "k1")
	i.set(func(i *issuer) { i.discovery = fails })
	for range 59 {
		c.advance(time.Minute)
		wantKey(t, k, i.cluster(), "k1")
		wantUnavailable(t, k, i.cluster(), "k2") // nobody knows whether there is one now
	}
	c.advance(59 * time.Second)
	wantKey(t, k, i.cluster(), "k1")
	c.advance(time.Second)
	wantUnavailable(t, k, i.cluster(), "k1")
	c.advance(9 * time.Second)
	before := i.discoveries.Load()
	for range 50 {
		wantUnavailable(t, k, i.cluster(), "k1")
	}
	if n := i.discoveries.Load(); n > before+1 {
		t.Errorf("%d fetches in a moment while fetching fails", n-before)
	}
	i.set(func(i *issuer) { i.discovery = nil })
	c.advance(10 * time.Second)
	wantKey(t, k, i.cluster(), "k1")
}

func TestAFirstFetchThatFailsIsNotAMissingKey(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	i.set(func(i *issuer) { i.keySet = fails })
	k := &attest.Keys{Now: c.Now}
	for range 50 {
		wantUnavailable(t, k, i.cluster(), "k1")
	}
	i.wantFetches(t, 1)
	c.advance(10 * time.Second)
	wantUnavailable(t, k, i.cluster(), "k1")
	i.wantFetches(t, 2)
	i.set(func(i *issuer) { i.keySet = nil })
	wantUnavailable(t, k, i.cluster(), "k1")
	c.advance(10 * time.Second)
	wantKey(t, k, i.cluster(), "k1")
}

func TestAChangedRegistrationStartsAnew(t *testing.T) {
	first, second, c := newIssuer(t, jwk(t, "k1")), newIssuer(t, jwk(t, "k2")), newClock()
	k := &attest.Keys{Now: c.Now}
	wantKey(t, k, first.cluster(), "k1")
	changed := second.cluster()
	changed.Revision++
	wantKey(t, k, changed, "k2")
	wantNoKey(t, k, changed, "k1")
}

func TestKeysOfOneClusterAreNotThoseOfAnother(t *testing.T) {
	first, second, c := newIssuer(t, jwk(t, "k1")), newIssuer(t, jwk(t, "k1")), newClock()
	other := second.cluster()
	other.ID = "decaf"
	k := &attest.Keys{Now: c.Now}
	a, err := k.Of(ctx, first.cluster(), "k1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.Of(ctx, other, "k1")
	if err != nil {
		t.Fatal(err)
	}
	x, _ := a[0].Thumbprint(5)
	y, _ := b[0].Thumbprint(5)
	if bytes.Equal(x, y) {
		t.Error("two clusters share a key")
	}
}

func TestATokenWithoutAKeyIDNeedsAClusterWithOneKey(t *testing.T) {
	one, two := uploaded("c1", jwttest.Set(t, jwk(t, "k1"))), uploaded("c2", jwttest.Set(t, jwk(t, "k1"), jwk(t, "k2")))
	k := &attest.Keys{Now: newClock().Now}
	if keys, err := k.Of(ctx, one, ""); err != nil || len(keys) != 1 {
		t.Errorf("one key: %v, %v", keys, err)
	}
	if keys, err := k.Of(ctx, two, ""); !errors.Is(err, attest.ErrNoSuchKey) {
		t.Errorf("two keys: %v, %v", keys, err)
	}
}

// certificate makes a certificate that vouches for somebody else.
func certificate(t *testing.T) string {
	t.Helper()
	key := jwttest.Key(t, elliptic.P256())
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "other"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestOnlyThePinnedAuthorityIsBelieved(t *testing.T) {
	i := newIssuer(t, jwk(t, "k1"))
	for name, ca := range map[string]string{"the system's authorities": "", "another authority": certificate(t), "no certificate": "garbage"} {
		c := i.cluster()
		c.CA = ca
		wantUnavailable(t, &attest.Keys{Now: newClock().Now}, c, "k1")
		if n := i.keySets.Load(); n != 0 {
			t.Errorf("%s: %d key sets fetched", name, n)
		}
	}
	i.wantFetches(t, 0)
}

func TestWhatAnIssuerAnswersIsNotBelievedBlindly(t *testing.T) {
	elsewhere := newIssuer(t, jwk(t, "k1"))
	private, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: jwttest.Key(t, elliptic.P256()), KeyID: "k1", Algorithm: "ES256"}}})
	if err != nil {
		t.Fatal(err)
	}
	many := make([]jose.JSONWebKey, 101)
	for n := range many {
		many[n] = jwk(t, fmt.Sprint("k", n))
	}
	text := func(s string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(s)) }
	}
	document := func(issuer, uri string) func(http.ResponseWriter, *http.Request) {
		return text(fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, issuer, uri))
	}
	redirect := func(path string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+path, http.StatusFound)
		}
	}
	squeezed := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		for range 64 {
			_, _ = z.Write(make([]byte, 1<<20))
		}
		_ = z.Close()
	}
	for name, change := range map[string]func(*issuer){
		"another issuer":               func(i *issuer) { i.discovery = document("https://other.test", i.URL+"/keys") },
		"the issuer with a slash":      func(i *issuer) { i.discovery = document(i.URL+"/", i.URL+"/keys") },
		"no issuer":                    func(i *issuer) { i.discovery = document("", i.URL+"/keys") },
		"no place of the keys":         func(i *issuer) { i.discovery = document(i.URL, "") },
		"keys over plain HTTP":         func(i *issuer) { i.discovery = document(i.URL, "http://192.0.2.1/keys") },
		"keys over plain HTTP of ours": func(i *issuer) { i.discovery = document(i.URL, "http://127.0.0.1:1/keys") },
		"keys over plain HTTP by name": func(i *issuer) { i.discovery = document(i.URL, "http://localhost.attacker.test/keys") },
		"keys in a file":               func(i *issuer) { i.discovery = document(i.URL, "file:///etc/passwd") },
		"keys with a password":         func(i *issuer) { i.discovery = document(i.URL, "https://user:secret@192.0.2.1/keys") },
		"a document that is no JSON":   func(i *issuer) { i.discovery = text("<html>") },
		"a document that is a list":    func(i *issuer) { i.discovery = text("[]") },
		"a document and more": func(i *issuer) {
			i.discovery = text(fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}{}`, i.URL, i.URL+"/keys"))
		},
		"an empty document":           func(i *issuer) { i.discovery = text("") },
		"a document of two megabytes": func(i *issuer) { i.discovery = text(strings.Repeat(" ", 2<<20) + "{}") },
		"a squeezed document":         func(i *issuer) { i.discovery = squeezed },
		"a redirected document":       func(i *issuer) { i.discovery = redirect("/.well-known/openid-configuration") },
		"redirected keys":             func(i *issuer) { i.keySet = redirect("/keys") },
		"keys with the status 201": func(i *issuer) {
			i.keySet = func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(http.StatusCreated)
				_, _ = w.Write(i.keys)
			}
		},
		"forbidden keys": func(i *issuer) {
			i.keySet = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }
		},
		"keys that are no JSON":        func(i *issuer) { i.keySet = text("k1") },
		"no keys":                      func(i *issuer) { i.keySet = text(`{"keys":[]}`) },
		"keys of two megabytes":        func(i *issuer) { i.keySet = text(strings.Repeat(" ", 2<<20) + string(i.keys)) },
		"squeezed keys":                func(i *issuer) { i.keySet = squeezed },
		"more keys than anybody needs": func(i *issuer) { i.keys = jwttest.Set(t, many...) },
		"a private key":                func(i *issuer) { i.keys = private },
		"a symmetric key":              func(i *issuer) { i.keySet = text(`{"keys":[{"kty":"oct","kid":"k1","k":"AAAA"}]}`) },
		"a key whose point is not on its curve": func(i *issuer) {
			i.keySet = text(`{"keys":[{"kty":"EC","kid":"k1","crv":"P-256","x":"AAAA","y":"AAAA"}]}`)
		},
		"a connection that is cut": func(i *issuer) {
			i.keySet = func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", "100000")
				_, _ = w.Write(i.keys)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(t, jwk(t, "k1"))
			i.set(change)
			wantUnavailable(t, &attest.Keys{Now: newClock().Now}, i.cluster(), "k1")
			if _, err := (&attest.Keys{Now: newClock().Now}).Check(ctx, i.cluster()); err == nil {
				t.Error("a registration with it was accepted")
			}
		})
	}
	if n := elsewhere.discoveries.Load() + elsewhere.keySets.Load(); n != 0 {
		t.Errorf("%d requests followed a redirect", n)
	}
}

func TestARegistrationIsToldHowManyKeysThereAre(t *testing.T) {
	i := newIssuer(t, jwk(t, "k1"), jwk(t, "k2"))
	k := &attest.Keys{Now: newClock().Now}
	if n, err := k.Check(ctx, i.cluster()); err != nil || n != 2 {
		t.Errorf("fetched: %d keys, %v", n, err)
	}
	if n, err := k.Check(ctx, uploaded("c1", jwttest.Set(t, jwk(t, "k1")))); err != nil || n != 1 {
		t.Errorf("uploaded: %d keys, %v", n, err)
	}
	if _, err := k.Check(ctx, uploaded("c1", []byte(`{"keys":[]}`))); err == nil {
		t.Error("no keys were accepted")
	}
}

func TestAThousandRequestsWithMadeUpKeysCauseOneFetch(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	slow := func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(20 * time.Millisecond)
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/keys")
	}
	for name, discovery := range map[string]func(http.ResponseWriter, *http.Request){"a fast issuer": nil, "a slow issuer": slow, "a broken issuer": fails} {
		t.Run(name, func(t *testing.T) {
			i.set(func(i *issuer) { i.discovery = nil })
			k := &attest.Keys{Now: c.Now}
			wantKey(t, k, i.cluster(), "k1")
			i.set(func(i *issuer) { i.discovery = discovery })
			for round := range 3 {
				c.advance(10 * time.Second)
				before := i.discoveries.Load()
				var wg sync.WaitGroup
				start := make(chan struct{})
				for n := range 1000 {
					wg.Go(func() {
						<-start
						if _, err := k.Of(ctx, i.cluster(), fmt.Sprint("made-up-", n)); err == nil {
							t.Error("a made-up key was found")
						}
					})
				}
				close(start)
				wg.Wait()
				if n := i.discoveries.Load() - before; n != 1 {
					t.Errorf("round %d: %d fetches", round, n)
				}
			}
			wantKey(t, k, i.cluster(), "k1")
		})
	}
}

func TestAnIssuerThatHangsIsNotWaitedForWithoutEnd(t *testing.T) {
	t.Parallel()
	for name, hang := range map[string]func(w http.ResponseWriter, stop chan struct{}){
		"before it answers": func(_ http.ResponseWriter, stop chan struct{}) { <-stop },
		"byte by byte": func(w http.ResponseWriter, stop chan struct{}) {
			for {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
				}
				_, _ = w.Write([]byte(" "))
				w.(http.Flusher).Flush()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i, c := newIssuer(t, jwk(t, "k1")), newClock()
			stop := make(chan struct{})
			defer close(stop)
			i.set(func(i *issuer) { i.keySet = func(w http.ResponseWriter, _ *http.Request) { hang(w, stop) } })
			k := &attest.Keys{Now: c.Now}
			start := time.Now()
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					if _, err := k.Of(ctx, i.cluster(), "k1"); err == nil || errors.Is(err, attest.ErrNoSuchKey) {
						t.Errorf("error %v", err)
					}
				})
			}
			wg.Wait()
			if took := time.Since(start); took > 15*time.Second {
				t.Errorf("took %s", took)
			}
			if n := i.discoveries.Load(); n != 1 {
				t.Errorf("%d fetches", n)
			}
		})
	}
}

// The first caller's request ends; those who wait with him are served.
func TestACallerWhoGivesUpDoesNotTakeTheOthersWithHim(t *testing.T) {
	i, c := newIssuer(t, jwk(t, "k1")), newClock()
	arrived, answer := make(chan struct{}), make(chan struct{})
	i.set(func(i *issuer) {
		i.discovery = func(w http.ResponseWriter, _ *http.Request) {
			close(arrived)
			<-answer
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/keys")
		}
	})
	k := &attest.Keys{Now: c.Now}
	first, cancel := context.WithCancel(ctx)
	go func() { _, _ = k.Of(first, i.cluster(), "k1") }()
	<-arrived
	second := make(chan error)
	go func() {
		_, err := k.Of(ctx, i.cluster(), "k1")
		second <- err
	}()
	cancel()
	time.Sleep(10 * time.Millisecond)
	close(answer)
	if err := <-second; err != nil {
		t.Error(err)
	}
}

func TestAKeySetIsReadStrictly(t *testing.T) {
	good := jwttest.Set(t, jwk(t, "k1"), jwk(t, "k1"))
	if keys, err := attest.ParseKeys(good); err != nil || len(keys) != 2 {
		t.Errorf("two keys of one id: %d, %v", len(keys), err)
	}
	for name, doc := range map[string]string{
		"nothing": "", "a list": "[]", "no keys": "{}", "null": "null", "keys that are a text": `{"keys":"k1"}`,
		"a key without a type": `{"keys":[{"kid":"k1"}]}`, "a key of an unknown type": `{"keys":[{"kty":"XX","kid":"k1"}]}`,
		"an unknown curve":  `{"keys":[{"kty":"EC","crv":"P-224","x":"AA","y":"AA"}]}`,
		"one good, one bad": strings.TrimSuffix(string(good), "]}") + `,{"kty":"oct","k":"AAAA"}]}`,
	} {
		if keys, err := attest.ParseKeys([]byte(doc)); err == nil {
			t.Errorf("%s: %d keys", name, len(keys))
		}
	}
}

// FuzzParseKeys reads key sets as an issuer or an administrator could give them.
func FuzzParseKeys(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AAAA"}]}`))
	f.Fuzz(func(t *testing.T, doc []byte) {
		keys, err := attest.ParseKeys(doc)
		if err != nil {
			return
		}
		if len(keys) == 0 || slices.ContainsFunc(keys, func(k jose.JSONWebKey) bool { return !k.IsPublic() || !k.Valid() }) {
			t.Errorf("%s gave %v", doc, keys)
		}
	})
}
