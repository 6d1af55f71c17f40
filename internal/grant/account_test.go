package grant_test

import (
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/store"
)

// entrances are all ways into the owner's account, each good at first.
func (s *stack) entrances() map[string]func(grant.Origin) (grant.Answer, error) {
	s.T.Helper()
	ctx, p := s.T.Context(), s.people()
	session := origin
	session.ClientID = "bx"
	first, err := s.grants.APIKey(ctx, session, p.secret, "")
	if err != nil {
		s.T.Fatal(err)
	}
	p.profile.Identities = []identity.ProfileIdentity{{Type: "user", IAMID: ada, Identifier: ada}}
	vm, vmProfile, ring := s.instance("one")
	key := jwttest.Key(s.T, elliptic.P256())
	c := &cluster.Cluster{
		ID: "c0ffee", CRN: crn.DefaultNames.Of("containers-kubernetes", "us-south", s.Owner.AccountID, "c0ffee", "", "").String(),
		AccountID: s.Owner.AccountID, Name: "pods", Type: identity.IKSSA, Issuer: "https://pods.test", Audience: "iam",
		JWKS: jwttest.Set(s.T, jwttest.JWK(key.Public(), "k1", "ES256")),
	}
	link := &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.profile.ID, AccountID: p.profile.AccountID, CRType: c.Type, CRN: c.CRN, Namespace: "apps", ServiceAccount: "app",
	}
	profile := *p.profile
	s.update(func(tx *directory.Tx) {
		s.d.Profiles.Put(tx, &profile)
		s.d.Clusters.Put(tx, c)
		s.d.Links.Put(tx, link)
	})
	idp := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	s.trustUser(&profile, idp.Issuer)
	pod := func() string {
		now := time.Now().Unix()
		return jwttest.ES256(s.T, key, "k1", fmt.Sprintf(`{"iss":"https://pods.test","aud":"iam","sub":"system:serviceaccount:apps:app","iat":%d,"exp":%d,`+
			`"kubernetes.io":{"namespace":"apps","serviceaccount":{"name":"app"}}}`, now, now+600), "")
	}
	return map[string]func(grant.Origin) (grant.Answer, error){
		"apikey": func(o grant.Origin) (grant.Answer, error) { return s.grants.APIKey(ctx, o, p.secret, "") },
		"refresh": func(o grant.Origin) (grant.Answer, error) {
			o.ClientID = "bx"
			return s.grants.Refresh(ctx, o, first.RefreshToken)
		},
		"assume": func(o grant.Origin) (grant.Answer, error) {
			return s.grants.Assume(ctx, o, grant.AssumeRequest{AccessToken: p.userToken, Profile: grant.Selector{ID: profile.ID}})
		},
		"cr-token": func(o grant.Origin) (grant.Answer, error) {
			return s.grants.CRToken(ctx, o, grant.CRTokenRequest{Token: pod(), Profile: grant.Selector{ID: profile.ID}})
		},
		"instance": func(o grant.Origin) (grant.Answer, error) {
			return s.grants.Instance(ctx, o, grant.InstanceRequest{Token: identityToken(s.T, ring, vm), Instance: vm.ID, Profile: grant.Selector{ID: vmProfile.ID}})
		},
		"federated": func(o grant.Origin) (grant.Answer, error) {
			return s.grants.Federated(ctx, o, grant.FederatedRequest{Assertion: idp.token("g-1", "grace@example.com", nil)})
		},
		"federated profile": func(o grant.Origin) (grant.Answer, error) {
			return s.grants.Federated(ctx, o, grant.FederatedRequest{Assertion: idp.token("g-1", "grace@example.com", nil), Profile: grant.Selector{ID: profile.ID}})
		},
	}
}

// events are those of a transaction in an account, the newest first.
func (s *stack) events(account, transaction string) []activity.Event {
	s.T.Helper()
	stored, err := s.Store.Events(s.T.Context(), store.Query{AccountID: account, CorrelationID: transaction, Limit: 100})
	if err != nil {
		s.T.Fatal(err)
	}
	out := make([]activity.Event, len(stored))
	for i, e := range stored {
		if err := json.Unmarshal(e.Doc, &out[i]); err != nil {
			s.T.Fatal(err)
		}
	}
	return out
}

// from is the origin of one request, with a transaction of its own.
func from(address string) grant.Origin {
	o := origin
	o.Address, o.TransactionID = address, uuid.NewString()
	return o
}

// wantRefused demands that the request was refused at a check, and that its one
// event says so.
func (s *stack) wantRefused(err error, o grant.Origin, account, wantCode, check string) activity.Event {
	s.T.Helper()
	if got := code(err); got != wantCode {
		s.T.Fatalf("code %s, want %s: %v", got, wantCode, err)
	}
	events := s.events(account, o.TransactionID)
	if len(events) != 1 {
		s.T.Fatalf("%d events, want 1", len(events))
	}
	e := events[0]
	failed, _ := e.Trace.Failed()
	if e.Outcome != activity.Failure || failed.Name != check || failed.Hint == "" {
		s.T.Errorf("outcome %s, failed check %+v, want %s; trace %+v", e.Outcome, failed, check, e.Trace)
	}
	seen := map[string]bool{}
	for _, c := range e.Trace {
		if seen[c.Name] {
			s.T.Errorf("check %s stands twice in %+v", c.Name, e.Trace)
		}
		seen[c.Name] = true
	}
	if !seen[grant.CheckAccount] || !seen[grant.CheckAddress] {
		s.T.Errorf("trace %+v lacks account or address", e.Trace)
	}
	return e
}

func (s *stack) account(change func(*identity.Account)) {
	s.T.Helper()
	now, _ := s.d.Accounts.Get(s.Owner.AccountID)
	next := *now
	change(&next)
	s.update(func(tx *directory.Tx) { s.d.Accounts.Put(tx, &next) })
}

func (s *stack) settings(account string, change func(*identity.Settings)) {
	s.T.Helper()
	next := *s.d.SettingsOf(account)
	change(&next)
	s.update(func(tx *directory.Tx) { s.d.Settings.Put(tx, &next) })
}

func TestNobodyComesIntoAClosedAccount(t *testing.T) {
	s := start(t)
	ways := s.entrances()
	var tokens []string
	for _, name := range slices.Sorted(maps.Keys(ways)) {
		answer, err := ways[name](from("192.0.2.1"))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		tokens = append(tokens, answer.AccessToken)
	}
	for _, raw := range tokens {
		if _, err := s.grants.Caller(raw); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.grants.Holder(t.Context(), origin, s.Owner.APIKey); err != nil {
		t.Fatal(err)
	}
	memberships := s.d.Memberships.Len()
	s.account(func(a *identity.Account) { a.ClosedAt = time.Now() })
	for name, way := range ways {
		o := from("192.0.2.1")
		answer, err := way(o)
		if answer.AccessToken != "" || answer.RefreshToken != "" {
			t.Errorf("%s: a token", name)
		}
		if name == "assume" { // the token that it starts from has ended
			s.wantRefused(err, o, s.Owner.AccountID, grant.CodeInvalidToken, grant.CheckCredential)
			continue
		}
		s.wantRefused(err, o, s.Owner.AccountID, grant.CodeUserGone, grant.CheckAccount)
	}
	for _, raw := range tokens {
		if c, err := s.grants.Caller(raw); !errors.Is(err, grant.ErrAccountClosed) || c != nil {
			t.Errorf("a token that was out: %v, %v", c, err)
		}
	}
	if c, err := s.grants.Holder(t.Context(), origin, s.Owner.APIKey); !errors.Is(err, grant.ErrAccountClosed) || c != nil {
		t.Errorf("the holder of a key: %v, %v", c, err)
	}
	if err := s.grants.Live(s.Owner.AccountID, s.Owner.IAMID); !errors.Is(err, grant.ErrAccountClosed) {
		t.Error(err)
	}
	if n := s.d.Memberships.Len(); n != memberships {
		t.Errorf("%d memberships, there were %d", n, memberships)
	}
	s.account(func(a *identity.Account) { a.ClosedAt = time.Time{} })
	for name, way := range ways {
		if _, err := way(from("192.0.2.1")); err != nil {
			t.Errorf("%s, when the account is open again: %v", name, err)
		}
	}
}

func TestAnAccountLetsInTheAddressesThatItAllows(t *testing.T) {
	s := start(t)
	ways := s.entrances()
	s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AllowedAddresses = "192.0.2.0/24, 2001:db8::1-2001:db8::9" })
	for name, way := range ways {
		for _, address := range []string{"198.51.100.1", "192.0.3.0", "2001:db8::a", "", "@", "::ffff:198.51.100.1"} {
			o := from(address)
			answer, err := way(o)
			if answer.AccessToken != "" || answer.RefreshToken != "" {
				t.Errorf("%s from %q: a token", name, address)
			}
			check := grant.CheckAddress
			if name == "assume" {
				check = grant.CheckCredential
			}
			s.wantRefused(err, o, s.Owner.AccountID, grant.CodeAddress, check)
			if grant.StatusOf(kindOf(err)) != 401 {
				t.Errorf("%s: status %d", name, grant.StatusOf(kindOf(err)))
			}
		}
		if u, _ := s.d.Users.Get(directory.UserKey(s.Owner.AccountID, "IBMid-GRACE")); name == "federated" && (!u.Invited || u.Subject != "") {
			t.Errorf("who was not let in was bound: %+v", u)
		}
		for _, address := range []string{"192.0.2.255", "::ffff:192.0.2.1", "2001:db8::9"} {
			if _, err := way(from(address)); err != nil {
				t.Errorf("%s from %q: %v", name, address, err)
			}
		}
	}
	s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AllowedAddresses = "what nobody can read" })
	for name, way := range ways {
		if _, err := way(from("192.0.2.1")); code(err) != grant.CodeAddress {
			t.Errorf("%s by settings that cannot be read: %v", name, err)
		}
	}
}

// A token is bound to the addresses of its account also where it is exchanged
// for one of another account.
func TestATokenIsNotExchangedWhereItsAccountDoesNotAllowIt(t *testing.T) {
	s := start(t)
	p := s.people()
	q := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Other.AccountID, Name: "q", Identities: []identity.ProfileIdentity{{Type: "user", IAMID: ada, Identifier: ada}}}
	s.update(func(tx *directory.Tx) { s.d.Profiles.Put(tx, q) })
	assume := func(address string) (grant.Origin, error) {
		o := from(address)
		_, err := s.grants.Assume(t.Context(), o, grant.AssumeRequest{AccessToken: p.userToken, Profile: grant.Selector{ID: q.ID}})
		return o, err
	}
	if _, err := assume("192.0.2.1"); err != nil {
		t.Fatal(err)
	}
	s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AllowedAddresses = "192.0.2.0/24" })
	o, err := assume("198.51.100.1")
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeAddress, grant.CheckCredential)
	if events := s.events(s.Other.AccountID, o.TransactionID); len(events) != 0 {
		t.Errorf("the other account sees %+v", events)
	}
	if _, err := assume("192.0.2.1"); err != nil {
		t.Error(err)
	}
	s.settings(s.Other.AccountID, func(x *identity.Settings) { x.AllowedAddresses = "203.0.113.0/24" })
	o, err = assume("192.0.2.1")
	s.wantRefused(err, o, s.Other.AccountID, grant.CodeAddress, grant.CheckAddress)
}

func TestAccessTokensLiveAsLongAsTheAccountSays(t *testing.T) {
	s := start(t)
	ways := s.entrances()
	for _, tt := range []struct {
		setting string
		want    time.Duration
	}{
		{identity.NotSet, time.Hour}, {"900", 15 * time.Minute}, {"3600", time.Hour}, {"7200", time.Hour}, {"-1", time.Hour}, {"9223372036854775807", time.Hour},
	} {
		s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AccessTokenLife = tt.setting })
		for name, way := range ways {
			answer, err := way(from("192.0.2.1"))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got := time.Duration(answer.Claims.Expires-answer.Claims.IssuedAt) * time.Second
			if name == "assume" && tt.want == time.Hour {
				if got > time.Hour || got < 59*time.Minute {
					t.Errorf("assume: %s, want what the token it came from had left", got)
				}
			} else if got != tt.want {
				t.Errorf("%s with %s: %s, want %s", name, tt.setting, got, tt.want)
			}
		}
	}
	// A life that has been shortened counts for what is issued from now on.
	s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AccessTokenLife = "60" })
	answer, err := ways["apikey"](from("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	s.advance(59 * time.Second)
	if _, err := s.grants.Caller(answer.AccessToken); err != nil {
		t.Error(err)
	}
	s.advance(3 * time.Second)
	if _, err := s.grants.Caller(answer.AccessToken); err == nil {
		t.Error("the token outlives its time")
	}
}

func TestASessionEndsAsTheAccountSays(t *testing.T) {
	for _, tt := range []struct {
		name     string
		change   func(*identity.Settings)
		use      time.Duration // between two uses
		lasts    time.Duration // the last use that succeeds, at least
		ends     time.Duration // the first that fails
		wantCode string
	}{
		{"by default after three days", func(*identity.Settings) {}, 12 * time.Hour, 60 * time.Hour, 72 * time.Hour, grant.CodeRefreshExpired},
		{"after its own time", func(x *identity.Settings) { x.SessionExpiration = "7200" }, 30 * time.Minute, 90 * time.Minute, 2 * time.Hour, grant.CodeRefreshExpired},
		{"with its refresh tokens", func(x *identity.Settings) { x.RefreshTokenLife = "3600" }, 20 * time.Minute, 40 * time.Minute, time.Hour, grant.CodeRefreshExpired},
		{"with whichever is shorter", func(x *identity.Settings) { x.SessionExpiration, x.RefreshTokenLife = "7200", "1800" }, 10 * time.Minute, 20 * time.Minute, 30 * time.Minute, grant.CodeRefreshExpired},
		{"not later than by default", func(x *identity.Settings) { x.SessionExpiration, x.RefreshTokenLife = "9999999", "9999999" }, 24 * time.Hour, 48 * time.Hour, 72 * time.Hour, grant.CodeRefreshExpired},
		{"not while it is used", func(x *identity.Settings) { x.SessionInvalidation = "7200" }, time.Hour, 71 * time.Hour, 72 * time.Hour, grant.CodeRefreshExpired},
		{"when it was not used", func(x *identity.Settings) { x.SessionInvalidation = "3600" }, time.Hour + 2*time.Second, 0, time.Hour, grant.CodeRefreshExpired},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t)
			p := s.people()
			s.settings(s.Owner.AccountID, tt.change)
			o := from("192.0.2.1")
			o.ClientID = "bx"
			answer, err := s.grants.APIKey(t.Context(), o, p.secret, "")
			if err != nil {
				t.Fatal(err)
			}
			session := answer.Claims.SessionID
			for used := tt.use; ; used += tt.use {
				s.advance(tt.use)
				o.TransactionID = uuid.NewString()
				next, err := s.grants.Refresh(t.Context(), o, answer.RefreshToken)
				if used <= tt.lasts {
					if err != nil || next.Claims.SessionID != session {
						t.Fatalf("after %s: %v", used, err)
					}
					answer = next
					continue
				}
				if used >= tt.ends {
					if code(err) != tt.wantCode || next.AccessToken != "" {
						t.Errorf("after %s: %v, want %s", used, err, tt.wantCode)
					}
					return
				}
			}
		})
	}
}

func TestTheDefaultClientHasNoSession(t *testing.T) {
	s := start(t)
	p := s.people()
	answer, err := s.grants.APIKey(t.Context(), origin, p.secret, "")
	if err != nil || answer.RefreshToken != "" || answer.Claims.SessionID != "" {
		t.Errorf("%+v, %v", answer, err)
	}
}

func TestLoginsAreCounted(t *testing.T) {
	s := start(t)
	ways := s.entrances()
	before, _ := s.Usage.Of(directory.UserKey(s.Owner.AccountID, ada))
	answer, err := ways["apikey"](from("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = ways["apikey"](grant.Origin{}) // another one
	s.settings(s.Owner.AccountID, func(x *identity.Settings) { x.AllowedAddresses = "203.0.113.1" })
	_, _ = ways["apikey"](from("192.0.2.1")) // refused
	after, last := s.Usage.Of(directory.UserKey(s.Owner.AccountID, ada))
	if after != before+2 || time.Since(last) > time.Minute {
		t.Errorf("%d logins, want %d; last %s", after, before+2, last)
	}
	if n, _ := s.Usage.Of(answer.Claims.KeyID); n < 2 {
		t.Errorf("the key was used %d times", n)
	}
}

func TestADisabledUserIsNotLetIn(t *testing.T) {
	s := start(t)
	p := s.people()
	u := *p.user
	u.Disabled = true
	s.update(func(tx *directory.Tx) { s.d.Users.Put(tx, &u) })
	o := from("192.0.2.1")
	_, err := s.grants.APIKey(t.Context(), o, p.secret, "")
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeUserGone, grant.CheckSubject)
	for _, raw := range []string{p.userToken, p.keyToken} {
		if _, err := s.grants.Caller(raw); !errors.Is(err, grant.ErrUserDisabled) {
			t.Error(err)
		}
	}
	if _, err := s.grants.Holder(t.Context(), origin, p.secret); err == nil {
		t.Error("the holder of his key is told who he is")
	}
	if !strings.Contains(fmt.Sprint(s.grants.Live(s.Owner.AccountID, ada)), "disabled") {
		t.Error("he is live")
	}
}
