package iamtoken_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iamtoken"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
)

// clock is the real one, moved.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// stack is an installation with its token endpoint.
type stack struct {
	*apitest.Env
	d      *directory.Directory
	clock  *clock
	keys   *token.KeyRing
	grants *grant.Service
	mux    *http.ServeMux
}

const issuerURL = "http://tabard.test/identity"

func start(t *testing.T) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t), clock: &clock{}}
	s.d = s.Config.Directory
	var err error
	s.keys, err = token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: s.clock.now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.wire(s.Config.Journal)
	return s
}

// recorder is what makes events durable.
type recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// wire puts the endpoint together on a journal.
func (s *stack) wire(journal recorder) {
	s.grants = grant.New(grant.Config{
		Directory: s.d,
		Workloads: &attest.Workloads{Clusters: s.d, Keys: &attest.Keys{Now: s.clock.now}, Now: s.clock.now},
		Instances: &attest.Instances{Hosts: s.d, Region: "us-south", Now: s.clock.now},
		Users:     &attest.Users{Providers: s.d, Keys: &attest.Keys{Now: s.clock.now}, Now: s.clock.now},
		Tokens:    &token.Issuer{Keys: s.keys, URL: issuerURL, Now: s.clock.now},
		Sealer:    s.Sealer, Journal: journal, Names: crn.DefaultNames, Now: s.clock.now, OperatorAccount: s.Owner.AccountID,
	})
	s.mux = http.NewServeMux()
	iamtoken.Register(s.mux, iamtoken.Config{
		Grants: s.grants, Keys: s.keys, Issuer: issuerURL, Now: s.clock.now, Log: slog.New(slog.DiscardHandler),
	})
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(s.T.Context(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

// as makes the helpers fail t, until the returned function is called.
func (s *stack) as(t testing.TB) func() {
	before := s.T
	s.T = t
	return func() { s.T = before }
}

// user adds a user of an account.
func (s *stack) user(account, iamID string) *identity.User {
	s.T.Helper()
	u := &identity.User{IAMID: iamID, AccountID: account, Name: "Ada Lovelace King", Email: "ada@example.com"}
	s.update(func(tx *directory.Tx) { s.d.Users.Put(tx, u) })
	return u
}

func (s *stack) serviceID(account, name string) *identity.ServiceID {
	s.T.Helper()
	id := &identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: account, Name: name}
	s.update(func(tx *directory.Tx) { s.d.ServiceIDs.Put(tx, id) })
	return id
}

// apiKey adds an API key of an identity and returns it with its secret.
func (s *stack) apiKey(account, iamID string) (*identity.APIKey, string) {
	s.T.Helper()
	secret := bootstrap.NewAPIKey()
	k := &identity.APIKey{ID: "ApiKey-" + uuid.NewString(), AccountID: account, IAMID: iamID, Name: "a key", Hash: s.Sealer.Hash(secret)}
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, k) })
	return k, secret
}

// profile adds a profile that trusts identities.
func (s *stack) profile(account, name string, trusts ...identity.ProfileIdentity) *identity.Profile {
	s.T.Helper()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: name, Identities: trusts}
	s.update(func(tx *directory.Tx) { s.d.Profiles.Put(tx, p) })
	return p
}

func profileCRN(p *identity.Profile) string {
	return crn.DefaultNames.Of("iam-identity", "", p.AccountID, "", "profile", p.ID).String()
}

// issuer signs service-account tokens in the form of a Kubernetes API server.
type issuer struct {
	s   *stack
	url string
	key *ecdsa.PrivateKey
	kid string
}

func (s *stack) issuer(url string) *issuer {
	s.T.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.T.Fatal(err)
	}
	return &issuer{s: s, url: url, key: key, kid: "kid-" + uuid.NewString()[:8]}
}

func (i *issuer) jwks() json.RawMessage {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: i.key.Public(), KeyID: i.kid, Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		i.s.T.Fatal(err)
	}
	return b
}

// cluster registers the issuer in an account, by its keys.
func (i *issuer) cluster(account, name string) *cluster.Cluster {
	i.s.T.Helper()
	id := strings.ReplaceAll(uuid.NewString(), "-", "")[:20]
	c := &cluster.Cluster{
		ID: id, CRN: crn.DefaultNames.Of("containers-kubernetes", "us-south", account, id, "", "").String(),
		AccountID: account, Name: name, Type: identity.IKSSA, Location: "us-south", ResourceGroupID: "rg",
		Issuer: i.url, Audience: cluster.DefaultAudience, JWKS: i.jwks(),
	}
	i.s.update(func(tx *directory.Tx) { i.s.d.Clusters.Put(tx, c) })
	return c
}

// claims are those of a good token of the pod default/app.
func (i *issuer) claims() map[string]any {
	now := i.s.clock.now().Unix()
	return map[string]any{
		"iss": i.url, "aud": []string{"iam"}, "iat": now, "nbf": now, "exp": now + 3600, "jti": uuid.NewString(),
		"sub": "system:serviceaccount:default:app",
		"kubernetes.io": map[string]any{
			"namespace":      "default",
			"serviceaccount": map[string]any{"name": "app", "uid": uuid.NewString()},
			"pod":            map[string]any{"name": "app-7f9", "uid": uuid.NewString()},
		},
	}
}

func (i *issuer) sign(claims map[string]any) string {
	i.s.T.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: i.kid}}, nil)
	if err != nil {
		i.s.T.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		i.s.T.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		i.s.T.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		i.s.T.Fatal(err)
	}
	return raw
}

func (i *issuer) token() string { return i.sign(i.claims()) }

// link ties a profile to the service account default/app of a cluster.
func (s *stack) link(p *identity.Profile, c *cluster.Cluster) *identity.Link {
	s.T.Helper()
	l := &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: c.Type, CRN: c.CRN,
		Namespace: "default", ServiceAccount: "app", CrossAccount: p.AccountID != c.AccountID,
	}
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, l) })
	return l
}

// form makes form values of pairs.
func form(pairs ...string) url.Values {
	v := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		v.Add(pairs[i], pairs[i+1])
	}
	return v
}

func apiKeyForm(secret string) url.Values {
	return form("grant_type", grant.TypeAPIKey, "apikey", secret, "response_type", "cloud_iam")
}

func crForm(raw string, selector ...string) url.Values {
	v := form(selector...)
	v.Set("grant_type", grant.TypeCRToken)
	v.Set("cr_token", raw)
	return v
}

func assumeForm(raw string, selector ...string) url.Values {
	v := form(selector...)
	v.Set("grant_type", grant.TypeAssume)
	v.Set("access_token", raw)
	return v
}

func refreshForm(raw string) url.Values {
	return form("grant_type", grant.TypeRefresh, "refresh_token", raw, "response_type", "cloud_iam")
}

type option func(*http.Request)

func basic(id, secret string) option { return func(r *http.Request) { r.SetBasicAuth(id, secret) } }

func with(name, value string) option { return func(r *http.Request) { r.Header.Set(name, value) } }

var bx = basic("bx", "bx")

type answer struct {
	t      testing.TB
	status int
	header http.Header
	raw    string
}

// send posts a body as a form.
func (s *stack) send(path, body string, options ...option) *answer {
	s.T.Helper()
	r := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("User-Agent", "test-agent/1.0")
	return s.do(r, options...)
}

func (s *stack) do(r *http.Request, options ...option) *answer {
	for _, o := range options {
		o(r)
	}
	rec := httptest.NewRecorder()
	api.WithTransaction(s.mux).ServeHTTP(rec, r)
	return &answer{t: s.T, status: rec.Code, header: rec.Header(), raw: rec.Body.String()}
}

func (s *stack) post(f url.Values, options ...option) *answer {
	s.T.Helper()
	return s.send("/identity/token", f.Encode(), options...)
}

func (a *answer) want(status int) map[string]any {
	a.t.Helper()
	if a.status != status {
		a.t.Fatalf("status %d, want %d; body: %s", a.status, status, a.raw)
	}
	var m map[string]any
	if err := json.Unmarshal([]byte(a.raw), &m); err != nil {
		a.t.Fatalf("body is not a JSON object: %v: %s", err, a.raw)
	}
	return m
}

// wantError fails the test unless the answer is an error with the code and no
// token.
func (a *answer) wantError(status int, code string) map[string]any {
	a.t.Helper()
	m := a.want(status)
	if m["errorCode"] != code {
		a.t.Fatalf("error %v, want %s; body: %s", m["errorCode"], code, a.raw)
	}
	if m["errorMessage"] == "" || m["context"].(map[string]any)["requestId"] != a.header.Get("Transaction-Id") {
		a.t.Fatalf("error has the wrong shape: %s", a.raw)
	}
	if strings.Contains(a.raw, "access_token\":") || strings.Contains(a.raw, "eyJ") {
		a.t.Fatalf("a refusal carries a token: %s", a.raw)
	}
	return m
}

// events returns the events of a transaction in all accounts.
func (s *stack) events(transaction string) []activity.Event {
	s.T.Helper()
	var out []activity.Event
	for _, account := range []string{s.Owner.AccountID, s.Other.AccountID} {
		stored, err := s.Store.Events(s.T.Context(), store.Query{AccountID: account, CorrelationID: transaction, Limit: 10})
		if err != nil {
			s.T.Fatal(err)
		}
		for _, row := range stored {
			var e activity.Event
			if err := json.Unmarshal(row.Doc, &e); err != nil {
				s.T.Fatal(err)
			}
			out = append(out, e)
		}
	}
	return out
}

// event returns the one event of the answer's transaction.
func (s *stack) event(a *answer) activity.Event {
	s.T.Helper()
	events := s.events(a.header.Get("Transaction-Id"))
	if len(events) != 1 {
		s.T.Fatalf("%d events of transaction %s, want 1", len(events), a.header.Get("Transaction-Id"))
	}
	return events[0]
}

// refused fails the test unless the answer is the error and its refusal is
// recorded in the account, explained by the failed check.
func (s *stack) refused(a *answer, code, account, check string) activity.Event {
	s.T.Helper()
	a.wantError(a.status, code)
	if a.status != 400 && a.status != 401 {
		s.T.Fatalf("status %d of a refusal; body: %s", a.status, a.raw)
	}
	e := s.event(a)
	failed, ok := e.Trace.Failed()
	if e.Outcome != activity.Failure || e.AccountID != account || !ok || failed.Name != check {
		s.T.Errorf("event of account %s, outcome %s, first failed check %q, want account %s and check %q; trace %+v",
			e.AccountID, e.Outcome, failed.Name, account, check, e.Trace)
	}
	if e.Reason.Code != a.status || e.Reason.ForFailure == "" || !strings.HasSuffix(e.Message, "-failure") {
		s.T.Errorf("reason %+v, message %q, answered %d", e.Reason, e.Message, a.status)
	}
	return e
}

// claims decodes a token's claims without looking at its signature.
func claims(t testing.TB, raw any) map[string]any {
	t.Helper()
	parts := strings.Split(fmt.Sprint(raw), ".")
	if len(parts) != 3 {
		t.Fatalf("not a JWT: %v", raw)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// steady returns claims without those that differ from token to token.
func steady(t testing.TB, raw any, lifetime float64) map[string]any {
	t.Helper()
	c := claims(t, raw)
	if c["exp"].(float64)-c["iat"].(float64) != lifetime {
		t.Errorf("the token lives %v s, want %v", c["exp"].(float64)-c["iat"].(float64), lifetime)
	}
	if _, err := uuid.Parse(c["jti"].(string)); err != nil {
		t.Errorf("jti: %v", err)
	}
	for _, name := range []string{"exp", "iat", "jti"} {
		delete(c, name)
	}
	return c
}
