package grant_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/store"
)

// fleet is a cluster whose tokens are reviewed, and what its API server says.
type fleet struct {
	*stack
	key     *ecdsa.PrivateKey
	cluster *cluster.Cluster
	api     *httptest.Server
	reviews atomic.Int64
	status  atomic.Int64 // HTTP status; 201 stands by the token, 200 does not
}

const (
	fleetIssuer   = "https://kubernetes.default.svc"
	reviewerToken = "what-the-reviewer-shows"
)

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{stack: start(t), key: jwttest.Key(t, elliptic.P256())}
	f.status.Store(http.StatusCreated)
	f.api = f.reviewer(&f.reviews)
	f.cluster = f.register(f.Owner.AccountID, "my-cluster", f.api)
	return f
}

func (f *fleet) reviewer(count *atomic.Int64) *httptest.Server {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		count.Add(1)
		status := int(f.status.Load())
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "status": map[string]any{
			"authenticated": status == http.StatusCreated, "error": "the pod is gone", "audiences": []string{"iam"},
			"user": map[string]any{"username": "system:serviceaccount:apps:lister", "uid": "u1"},
		}})
	}))
	f.T.Cleanup(s.Close)
	return s
}

func (f *fleet) register(account, name string, api *httptest.Server) *cluster.Cluster {
	f.T.Helper()
	id := "c" + strings.ReplaceAll(uuid.NewString(), "-", "")[:19]
	c := &cluster.Cluster{
		ID: id, CRN: "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":" + id + "::", AccountID: account,
		Name: name, Type: identity.IKSSA, Location: "us-south", Issuer: fleetIssuer, Audience: "iam",
		JWKS: jwttest.Set(f.T, jwttest.JWK(f.key.Public(), "k1", "ES256")), Review: true,
		Server: &cluster.APIServer{URL: api.URL, CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}))},
	}
	c.Server.Sealed = f.Sealer.Seal([]byte(reviewerToken), c.SealLabel())
	f.update(func(tx *directory.Tx) { f.d.Clusters.Put(tx, c) })
	return c
}

// profile makes one that the cluster's pods may put on.
func (f *fleet) profile(c *cluster.Cluster, name, serviceAccount string) *identity.Profile {
	f.T.Helper()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: c.AccountID, Name: name}
	f.update(func(tx *directory.Tx) {
		f.d.Profiles.Put(tx, p)
		f.d.Links.Put(tx, &identity.Link{
			ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: c.AccountID, CRType: identity.IKSSA, CRN: c.CRN, Namespace: "apps", ServiceAccount: serviceAccount,
		})
	})
	return p
}

func (f *fleet) token() string {
	now := f.now().Unix()
	return jwttest.ES256(f.T, f.key, "k1", fmt.Sprintf(`{"iss":%q,"aud":["iam"],"sub":"system:serviceaccount:apps:lister","iat":%d,"exp":%d,"jti":%q,
		"kubernetes.io":{"namespace":"apps","serviceaccount":{"name":"lister","uid":"u1"},"pod":{"name":"p","uid":"u2"}}}`,
		fleetIssuer, now, now+600, uuid.NewString()), "")
}

// ask exchanges a token, and returns the event of it in an account's log.
func (f *fleet) ask(account, raw string, want grant.Selector) (*activity.Event, error) {
	f.T.Helper()
	o := origin
	o.TransactionID = uuid.NewString()
	_, err := f.grants.CRToken(f.T.Context(), o, grant.CRTokenRequest{Token: raw, Profile: want})
	stored, storeErr := f.Store.Events(f.T.Context(), store.Query{AccountID: account, CorrelationID: o.TransactionID, Limit: 10})
	if storeErr != nil {
		f.T.Fatal(storeErr)
	}
	if len(stored) != 1 {
		f.T.Fatalf("%d events in account %s", len(stored), account)
	}
	var e activity.Event
	if err := json.Unmarshal(stored[0].Doc, &e); err != nil {
		f.T.Fatal(err)
	}
	if strings.Contains(string(stored[0].Doc), raw) || strings.Contains(string(stored[0].Doc), reviewerToken) {
		f.T.Error("a secret stands in the event")
	}
	return &e, err
}

func review(e *activity.Event) activity.Check {
	for _, c := range e.Trace {
		if c.Name == attest.CheckReview {
			return c
		}
	}
	return activity.Check{}
}

func TestAReviewIsTheLastCheckAndStandsInTheLog(t *testing.T) {
	f := newFleet(t)
	p := f.profile(f.cluster, "reader", "lister")
	f.profile(f.cluster, "stranger", "another")
	home := f.Owner.AccountID

	e, err := f.ask(home, f.token(), grant.Selector{Name: "reader"})
	if err != nil || review(e).Outcome != activity.Pass || f.reviews.Load() != 1 {
		t.Fatalf("%v, review %+v, %d reviews", err, review(e), f.reviews.Load())
	}
	t.Run("a token that gets nothing anyway is shown to nobody", func(t *testing.T) {
		e, err := f.ask(home, f.token(), grant.Selector{Name: "stranger"})
		if code(err) != grant.CodeNotEligible || review(e).Outcome != activity.Skip {
			t.Errorf("%v, review %+v", err, review(e))
		}
		if _, err := f.ask(home, f.token(), grant.Selector{Name: "nobody"}); code(err) != grant.CodeNotFound {
			t.Error(err)
		}
		if f.reviews.Load() != 1 {
			t.Error("the API server was asked")
		}
	})
	t.Run("a token that the cluster does not stand by is bad", func(t *testing.T) {
		f.status.Store(http.StatusOK)
		e, err := f.ask(home, f.token(), grant.Selector{ID: p.ID})
		if code(err) != grant.CodeInvalidToken || fault.Of(err).Kind != fault.Invalid || review(e).Outcome != activity.Fail {
			t.Errorf("%v, review %+v", err, review(e))
		}
		if c := review(e); !strings.Contains(c.Found, "the pod is gone") || c.Hint == "" || !strings.Contains(e.Target.ID, p.ID) {
			t.Errorf("%+v of %s", c, e.Target.ID)
		}
		if failed, _ := e.Trace.Failed(); failed.Name != attest.CheckReview {
			t.Errorf("failed at %s", failed.Name)
		}
	})
	t.Run("an API server that cannot be asked is not the token's fault", func(t *testing.T) {
		f.status.Store(http.StatusInternalServerError)
		e, err := f.ask(home, f.token(), grant.Selector{Name: "reader"})
		if code(err) != grant.CodeNoReview || fault.Of(err).Kind != fault.Unavailable || fault.Of(err).RetryAfter < time.Second || review(e).Outcome != activity.Fail {
			t.Errorf("%v, review %+v", err, review(e))
		}
		f.status.Store(http.StatusCreated)
		f.advance(time.Second)
		if _, err := f.ask(home, f.token(), grant.Selector{Name: "reader"}); err != nil {
			t.Error(err)
		}
	})
}

func TestAnotherAccountsRegistrationIsNotShownTheTokens(t *testing.T) {
	f := newFleet(t)
	f.profile(f.cluster, "own", "lister")
	f.profile(f.cluster, "both", "lister")
	attacker := f.Other.AccountID
	var seen atomic.Int64
	claimed := f.register(attacker, "claimed", f.reviewer(&seen))
	f.profile(claimed, "both", "lister")
	f.profile(claimed, "bait", "lister")

	if _, err := f.ask(f.Owner.AccountID, f.token(), grant.Selector{Name: "own"}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"both", "nobody"} {
		if _, err := f.ask(attacker, f.token(), grant.Selector{Name: name}); err == nil {
			t.Errorf("%s was put on", name)
		}
	}
	e, err := f.ask(attacker, f.token(), grant.Selector{Name: "bait"})
	if code(err) != grant.CodeNotEligible || review(e).Outcome != activity.Fail {
		t.Errorf("%v, review %+v", err, review(e))
	}
	if n := seen.Load(); n != 0 {
		t.Errorf("the attacker has seen %d tokens", n)
	}
}

// One issuer is a cluster and a workload issuer of an account: what one of them
// may not put on, the other may.
func TestTheProofThatMatchesCounts(t *testing.T) {
	f := newFleet(t)
	p := f.profile(f.cluster, "reader", "another")
	i := &cluster.Issuer{
		ID: "WorkloadIssuer-" + uuid.NewString(), AccountID: f.Owner.AccountID, Name: "ci", Issuer: fleetIssuer, Audience: "iam", JWKS: f.cluster.JWKS,
	}
	i.CRN = "crn:v1:bluemix:public:iam-identity::a/" + i.AccountID + "::workload-issuer:" + i.ID
	f.update(func(tx *directory.Tx) {
		f.d.WorkloadIssuers.Put(tx, i)
		f.d.Rules.Put(tx, &identity.ClaimRule{
			ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Type: identity.RuleCR, CRType: identity.OIDC,
			Conditions: []identity.Condition{
				{Claim: "issuer", Operator: identity.Equals, Value: `"` + fleetIssuer + `"`},
				{Claim: "sub", Operator: identity.Equals, Value: `"system:serviceaccount:apps:lister"`},
			},
		})
	})
	if _, err := f.ask(f.Owner.AccountID, f.token(), grant.Selector{Name: "reader"}); err != nil {
		t.Error(err)
	}
	// A link to an issuer would be one to everybody there.
	q := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: i.AccountID, Name: "open"}
	f.update(func(tx *directory.Tx) {
		f.d.Profiles.Put(tx, q)
		f.d.Links.Put(tx, &identity.Link{ID: "Link-" + uuid.NewString(), ProfileID: q.ID, AccountID: i.AccountID, CRType: identity.OIDC, CRN: i.CRN})
	})
	if _, err := f.ask(f.Owner.AccountID, f.token(), grant.Selector{Name: "open"}); code(err) != grant.CodeNotEligible {
		t.Error(err)
	}
}

// The token is that of one account's cluster. Another account has registered the
// issuer with keys of its own, and learns why the token is nothing to it.
func TestAnAccountSeesWhyATokenThatAnotherOneProvesIsRefusedToIt(t *testing.T) {
	f := newFleet(t)
	mine, theirs := f.Owner.AccountID, f.Other.AccountID
	outdated := f.register(theirs, "outdated", f.api)
	outdated.JWKS = jwttest.Set(t, jwttest.JWK(jwttest.Key(t, elliptic.P256()).Public(), "k1", "ES256"))
	f.update(func(tx *directory.Tx) { f.d.Clusters.Put(tx, outdated) })
	f.profile(outdated, "theirs", "lister")
	f.profile(outdated, "closed", "lister")
	f.profile(f.cluster, "reader", "lister")
	closed := f.profile(f.cluster, "closed", "another")
	f.profile(f.cluster, "mine-closed", "another")

	for name, tt := range map[string]struct {
		want grant.Selector
		code string
		seen bool // by the other account
	}{
		"its own profile":             {grant.Selector{Name: "theirs"}, grant.CodeNotFound, true},
		"no profile at all":           {grant.Selector{Name: "none"}, grant.CodeNotFound, true},
		"without a profile":           {grant.Selector{}, grant.CodeMissing, true},
		"a name that both have":       {grant.Selector{Name: "closed"}, grant.CodeNotEligible, true},
		"a profile that only one has": {grant.Selector{Name: "mine-closed"}, grant.CodeNotEligible, false},
		"the other's profile, by id":  {grant.Selector{ID: closed.ID}, grant.CodeNotEligible, false},
		"a profile that is put on":    {grant.Selector{Name: "reader"}, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			o := origin
			o.TransactionID = uuid.NewString()
			_, err := f.grants.CRToken(t.Context(), o, grant.CRTokenRequest{Token: f.token(), Profile: tt.want})
			if tt.code == "" && err != nil || tt.code != "" && fault.Of(err).Code != tt.code {
				t.Fatal(err)
			}
			if err != nil && strings.Contains(err.Error()+fault.Of(err).Detail, "outdated") {
				t.Errorf("the caller is told of the other account's cluster: %v", err)
			}
			if n := len(f.events(mine, o.TransactionID)); n != 1 {
				t.Errorf("%d events in the account that proved the token", n)
			}
			events := f.events(theirs, o.TransactionID)
			if !tt.seen {
				if len(events) != 0 {
					t.Errorf("the other account sees %+v", events)
				}
				return
			}
			if len(events) != 1 {
				t.Fatalf("%d events in the other account", len(events))
			}
			e := events[0]
			if failed, _ := e.Trace.Failed(); failed.Name != attest.CheckSignature || !strings.Contains(failed.Wanted, "outdated") || e.Outcome != activity.Failure {
				t.Errorf("%+v", e)
			}
			if !strings.Contains(e.Reason.ForFailure, "bad signature") {
				t.Errorf("reason %+v", e.Reason)
			}
			doc, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			for _, foreign := range []string{mine, closed.ID, f.cluster.Name, f.cluster.ID} {
				if strings.Contains(string(doc), foreign) {
					t.Errorf("the other account's event has %s: %s", foreign, doc)
				}
			}
		})
	}
}
