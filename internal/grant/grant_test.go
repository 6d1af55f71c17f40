package grant_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

const (
	issuerURL = "http://tabard.test/identity"
	region    = "us-south"
	ada       = "IBMid-ADA"
)

// stack is an installation with its grants.
type stack struct {
	*apitest.Env
	d      *directory.Directory
	tokens *token.Issuer
	grants *grant.Service

	ahead atomic.Int64 // how far the clock of the grants is ahead, in ns

	mu   sync.Mutex
	told []string // by Observe
}

func (s *stack) now() time.Time          { return time.Now().Add(time.Duration(s.ahead.Load())) }
func (s *stack) advance(d time.Duration) { s.ahead.Add(int64(d)) }

func start(t *testing.T) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t)}
	s.d = s.Config.Directory
	s.tokens = &token.Issuer{Keys: s.ring("access-token", "", nil), URL: issuerURL, Now: s.now}
	s.grants = grant.New(grant.Config{
		Directory: s.d,
		Workloads: &attest.Workloads{Clusters: s.d, Keys: &attest.Keys{Now: s.now}, Now: s.now},
		Instances: &attest.Instances{Hosts: s.d, Region: region, Now: s.now},
		Users:     &attest.Users{Providers: s.d, Keys: &attest.Keys{Now: s.now}, Now: s.now},
		Tokens:    s.tokens, Sealer: s.Sealer, Journal: s.Config.Journal, Names: crn.DefaultNames, Now: s.now,
		OperatorAccount: s.Owner.AccountID, Usage: s.Usage,
		Observe: func(grant, outcome string, took time.Duration) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if took < 0 {
				t.Errorf("took %s", took)
			}
			s.told = append(s.told, grant+" "+outcome)
		},
	})
	return s
}

func (s *stack) ring(use, prefix string, changed func(*directory.Tx, jose.JSONWebKeySet)) *token.KeyRing {
	s.T.Helper()
	ring, err := token.NewKeyRing(s.T.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Use: use, Prefix: prefix, Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife, Changed: changed,
	})
	if err != nil {
		s.T.Fatal(err)
	}
	return ring
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(s.T.Context(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

// issue signs a token with claims of our own making.
func (s *stack) issue(c token.Claims) string {
	s.T.Helper()
	raw, _, err := s.tokens.Issue(c, time.Hour)
	if err != nil {
		s.T.Fatal(err)
	}
	return raw
}

var origin = grant.Origin{TransactionID: "t-1", Address: "192.0.2.1", Agent: "test", ClientID: grant.DefaultClient}

// people are one identity of each kind, with a token of each.
type people struct {
	user    *identity.User
	id      *identity.ServiceID
	profile *identity.Profile
	key     *identity.APIKey // of the user
	secret  string

	userToken, idToken, profileToken, keyToken string
}

func (s *stack) people() *people {
	s.T.Helper()
	account := s.Owner.AccountID
	p := &people{
		user:    &identity.User{IAMID: ada, AccountID: account, Name: "Ada", Email: "ada@example.com"},
		id:      &identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: account, Name: "robot"},
		profile: &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: "p"},
		secret:  "a-secret-" + uuid.NewString(),
	}
	p.key = &identity.APIKey{ID: "ApiKey-" + uuid.NewString(), AccountID: account, IAMID: ada, Name: "k", Hash: s.Sealer.Hash(p.secret)}
	s.update(func(tx *directory.Tx) {
		s.d.Users.Put(tx, p.user)
		s.d.ServiceIDs.Put(tx, p.id)
		s.d.Profiles.Put(tx, p.profile)
		s.d.APIKeys.Put(tx, p.key)
	})
	in := token.Account{BSS: account}
	p.userToken = s.issue(token.Claims{IAMID: ada, Account: in})
	p.idToken = s.issue(token.Claims{IAMID: "iam-" + p.id.ID, Account: in})
	p.profileToken = s.issue(token.Claims{IAMID: "iam-" + p.profile.ID, Account: in})
	answer, err := s.grants.APIKey(s.T.Context(), origin, p.secret, "")
	if err != nil {
		s.T.Fatal(err)
	}
	p.keyToken = answer.AccessToken
	return p
}

func TestATokenEndsWithTheIdentityItStandsOn(t *testing.T) {
	for name, c := range map[string]struct {
		token func(*people) string
		end   func(*stack, *people, *directory.Tx)
	}{
		"a deleted user": {
			func(p *people) string { return p.userToken },
			func(s *stack, p *people, tx *directory.Tx) { s.d.Users.Delete(tx, p.user) },
		},
		"a deleted user behind a key": {
			func(p *people) string { return p.keyToken },
			func(s *stack, p *people, tx *directory.Tx) { s.d.Users.Delete(tx, p.user) },
		},
		"a deleted service ID": {
			func(p *people) string { return p.idToken },
			func(s *stack, p *people, tx *directory.Tx) { s.d.ServiceIDs.Delete(tx, p.id) },
		},
		"a deleted profile": {
			func(p *people) string { return p.profileToken },
			func(s *stack, p *people, tx *directory.Tx) { s.d.Profiles.Delete(tx, p.profile) },
		},
		"a deleted API key": {
			func(p *people) string { return p.keyToken },
			func(s *stack, p *people, tx *directory.Tx) { s.d.APIKeys.Delete(tx, p.key) },
		},
		"an expired API key": {
			func(p *people) string { return p.keyToken },
			func(s *stack, p *people, tx *directory.Tx) {
				k := *p.key
				k.ExpiresAt = time.Now().Add(-time.Second)
				s.d.APIKeys.Put(tx, &k)
			},
		},
		"a disabled API key": {
			func(p *people) string { return p.keyToken },
			func(s *stack, p *people, tx *directory.Tx) {
				k := *p.key
				k.Disabled = true
				s.d.APIKeys.Put(tx, &k)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			p := s.people()
			all := []string{p.userToken, p.idToken, p.profileToken, p.keyToken}
			for _, raw := range all {
				if _, err := s.grants.Caller(raw); err != nil {
					t.Fatal(err)
				}
			}
			s.update(func(tx *directory.Tx) { c.end(s, p, tx) })
			if claims, err := s.grants.Caller(c.token(p)); !errors.Is(err, grant.ErrSubjectGone) || claims != nil {
				t.Errorf("claims %v, error %v, want ErrSubjectGone", claims, err)
			}
			// The others live on.
			alive := 0
			for _, raw := range all {
				if _, err := s.grants.Caller(raw); err == nil {
					alive++
				}
			}
			want := 3
			if c.token(p) == p.userToken || name == "a deleted user behind a key" {
				want = 2 // the user's and his key's
			}
			if alive != want {
				t.Errorf("%d tokens are alive, want %d", alive, want)
			}
		})
	}
}

func TestATokenActsOnlyInTheAccountOfItsIdentity(t *testing.T) {
	s := start(t)
	p := s.people()
	elsewhere := token.Account{BSS: s.Other.AccountID}
	for name, c := range map[string]token.Claims{
		"a user of another account":       {IAMID: ada, Account: elsewhere},
		"a service ID of another account": {IAMID: "iam-" + p.id.ID, Account: elsewhere},
		"a profile of another account":    {IAMID: "iam-" + p.profile.ID, Account: elsewhere},
		"a compute resource":              {IAMID: "crn-crn:v1:bluemix:public:is:us-south-1:a/x::instance:y", Account: elsewhere},
		"nobody":                          {IAMID: "nobody", Account: elsewhere},
		"an unknown key":                  {IAMID: ada, Account: token.Account{BSS: s.Owner.AccountID}, KeyID: "ApiKey-none"},
	} {
		if claims, err := s.grants.Caller(s.issue(c)); !errors.Is(err, grant.ErrSubjectGone) || claims != nil {
			t.Errorf("%s: claims %v, error %v", name, claims, err)
		}
	}
	for _, raw := range []string{"", "x", "a.b.c", p.userToken + "x"} {
		if claims, err := s.grants.Caller(raw); err == nil || claims != nil {
			t.Errorf("token %.20q: claims %v, error %v", raw, claims, err)
		}
	}
}

func TestTheHolderOfAnAPIKeyIsWhoseKeyItIs(t *testing.T) {
	s := start(t)
	p := s.people()
	c, err := s.grants.Holder(t.Context(), origin, p.secret)
	if err != nil || c.IAMID != ada || c.Account.BSS != s.Owner.AccountID || c.Identifier != "ADA" || c.RealmID != "IBMid" {
		t.Errorf("claims %+v, error %v", c, err)
	}
	for _, secret := range []string{"", "x", p.key.Hash, p.key.ID} {
		if _, err := s.grants.Holder(t.Context(), origin, secret); !errors.Is(err, grant.ErrSubjectGone) {
			t.Errorf("secret %q: error %v", secret, err)
		}
	}
	expired := *p.key
	expired.ExpiresAt = time.Now().Add(-time.Minute)
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, &expired) })
	if _, err := s.grants.Holder(t.Context(), origin, p.secret); !errors.Is(err, grant.ErrSubjectGone) {
		t.Errorf("an expired key: error %v", err)
	}
	valid := expired
	valid.ExpiresAt = time.Time{}
	s.update(func(tx *directory.Tx) {
		s.d.APIKeys.Put(tx, &valid)
		s.d.Users.Delete(tx, p.user)
	})
	if _, err := s.grants.Holder(t.Context(), origin, p.secret); !errors.Is(err, grant.ErrSubjectGone) {
		t.Errorf("a key of nobody: error %v", err)
	}
}

// code is the code of a fault.
func code(err error) string {
	if err == nil {
		return "ok"
	}
	return fault.Of(err).Code
}

// instance adds a running instance on a host, with a profile linked to it, and
// returns what signs for the host.
func (s *stack) instance(host string) (*vpc.Instance, *identity.Profile, *token.KeyRing) {
	s.T.Helper()
	ring := s.ring("host/"+host, "VSI-CR_"+region+"_"+host+"_", func(tx *directory.Tx, set jose.JSONWebKeySet) {
		b, err := json.Marshal(set)
		if err != nil {
			s.T.Error(err)
		}
		s.d.Hosts.Put(tx, &cluster.Host{ID: host, Name: host, JWKS: b})
	})
	id := "0717_" + uuid.NewString()
	i := &vpc.Instance{
		ID: id, CRN: crn.DefaultNames.Of("is", "us-south-1", s.Owner.AccountID, "", "instance", id).String(),
		AccountID: s.Owner.AccountID, Name: "vm-" + host, HostID: host, Status: vpc.Running, Zone: "us-south-1",
	}
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "profile of " + host}
	l := &identity.Link{ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: identity.VSI, CRN: i.CRN}
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, i)
		s.d.Profiles.Put(tx, p)
		s.d.Links.Put(tx, l)
	})
	return i, p, ring
}

// identityToken is a good one about an instance.
func identityToken(t testing.TB, ring *token.KeyRing, i *vpc.Instance) string {
	t.Helper()
	now := time.Now().Unix()
	raw, err := ring.Sign(attest.IdentityClaims{
		Issuer: "VSI-CR_" + region, Audience: []string{"VSI-CR_" + region}, IssuedAt: now, Expires: now + 300, JTI: uuid.NewString(),
		IaaS: attest.IaaS{CRN: i.CRN, AccountID: i.AccountID, InstanceID: i.ID, Region: region},
	}, "")
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestAHostVouchesOnlyForInstancesThatRunOnIt(t *testing.T) {
	s := start(t)
	mine, p, ring := s.instance("one")
	other, q, _ := s.instance("two")
	ask := func(token string, listener *vpc.Instance, p *identity.Profile) error {
		_, err := s.grants.Instance(t.Context(), origin, grant.InstanceRequest{Token: token, Instance: listener.ID, Profile: grant.Selector{ID: p.ID}})
		return err
	}
	if err := ask(identityToken(t, ring, mine), mine, p); err != nil {
		t.Fatal(err)
	}
	if got := code(ask(identityToken(t, ring, other), other, q)); got != grant.CodeUnsupported {
		t.Errorf("about an instance on another host: %s", got)
	}
	if got := code(ask(identityToken(t, ring, mine), other, p)); got != grant.CodeUnsupported {
		t.Errorf("on another instance's listener: %s", got)
	}
	if got := code(ask("garbage", mine, p)); got != grant.CodeMalformed {
		t.Errorf("garbage: %s", got)
	}
	if got := code(ask(identityToken(t, ring, mine), mine, q)); got != grant.CodeNotEligible {
		t.Errorf("another instance's profile: %s", got)
	}
	stopped := mine.Clone()
	stopped.Status = vpc.Stopped
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, stopped) })
	if got := code(ask(identityToken(t, ring, mine), mine, p)); got != grant.CodeUnsupported {
		t.Errorf("about a stopped instance: %s", got)
	}
	s.update(func(tx *directory.Tx) { s.d.Instances.Delete(tx, stopped) })
	if got := code(ask(identityToken(t, ring, mine), mine, p)); got != grant.CodeUnsupported {
		t.Errorf("about a deleted instance: %s", got)
	}
}

func TestADeletedHostVouchesForNothing(t *testing.T) {
	s := start(t)
	i, p, ring := s.instance("one")
	raw := identityToken(t, ring, i)
	h, _ := s.d.Hosts.Get("one")
	s.update(func(tx *directory.Tx) { s.d.Hosts.Delete(tx, h) })
	_, err := s.grants.Instance(t.Context(), origin, grant.InstanceRequest{Token: raw, Instance: i.ID, Profile: grant.Selector{ID: p.ID}})
	if code(err) != grant.CodeUnsupported {
		t.Error(err)
	}
}

func TestAnEventGivenAlongIsRecordedWithTheLoginInBothOutcomes(t *testing.T) {
	s := start(t)
	i, p, ring := s.instance("one")
	for n, raw := range []string{identityToken(t, ring, i), "garbage"} {
		with := &activity.Event{
			ID: uuid.NewString(), Time: activity.Time{Time: time.Now()}, Action: "is.metadata.computeresource-token.request",
			Message: "request", CorrelationID: fmt.Sprint("tx-", n), Severity: activity.Normal,
		}
		o := origin
		o.TransactionID = with.CorrelationID
		_, _ = s.grants.Instance(t.Context(), o, grant.InstanceRequest{Token: raw, Instance: i.ID, Profile: grant.Selector{ID: p.ID}, With: with})
		stored, err := s.Store.Events(t.Context(), store.Query{AccountID: s.Owner.AccountID, CorrelationID: with.CorrelationID, Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		if len(stored) != 2 {
			t.Fatalf("%d events, want 2", len(stored))
		}
		var a, b activity.Event
		if err := errors.Join(json.Unmarshal(stored[0].Doc, &a), json.Unmarshal(stored[1].Doc, &b)); err != nil {
			t.Fatal(err)
		}
		if a.Outcome != b.Outcome || a.Reason != b.Reason || a.AccountID != b.AccountID || len(a.Trace) != len(b.Trace) || len(a.Trace) == 0 {
			t.Errorf("the events differ: %+v\n%+v", a, b)
		}
	}
}

func TestEveryAttemptIsObserved(t *testing.T) {
	s := start(t)
	p := s.people()
	ctx := t.Context()
	s.told = nil
	_, _ = s.grants.APIKey(ctx, origin, p.secret, "")
	_, _ = s.grants.APIKey(ctx, origin, "x", "")
	_, _ = s.grants.Refresh(ctx, origin, "x")
	_, _ = s.grants.CRToken(ctx, origin, grant.CRTokenRequest{Token: "x"})
	_, _ = s.grants.Assume(ctx, origin, grant.AssumeRequest{})
	_ = s.grants.RefuseForm(ctx, origin, grant.MissingProperty("grant_type"))
	want := []string{
		grant.TypeAPIKey + " ok", grant.TypeAPIKey + " " + grant.CodeKeyNotFound, grant.TypeRefresh + " " + grant.CodeInvalidToken,
		grant.TypeCRToken + " " + grant.CodeMalformed, grant.TypeAssume + " " + grant.CodeMissing, " " + grant.CodeMissing,
	}
	if !slices.Equal(s.told, want) {
		t.Errorf("told %q, want %q", s.told, want)
	}
}

func TestEveryKindOfFaultHasItsStatus(t *testing.T) {
	for kind, want := range map[fault.Kind]int{
		fault.Internal: http.StatusInternalServerError, fault.Invalid: http.StatusBadRequest, fault.Unauthenticated: http.StatusUnauthorized,
		fault.Denied: http.StatusForbidden, fault.NotFound: http.StatusNotFound, fault.Conflict: http.StatusConflict, fault.Stale: http.StatusConflict,
		fault.TooLarge: http.StatusRequestEntityTooLarge, fault.Unsupported: http.StatusUnsupportedMediaType,
		fault.Limited: http.StatusTooManyRequests, fault.Unavailable: http.StatusServiceUnavailable,
	} {
		if got := grant.StatusOf(kind); got != want {
			t.Errorf("%s: %d, want %d", kind, got, want)
		}
	}
}
