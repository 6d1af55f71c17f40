package grant_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
)

// idpStack is an account with an identity provider whose key the test has.
type idpStack struct {
	*stack
	key      *ecdsa.PrivateKey
	provider *identity.Provider
	federate *grant.Service
}

const corpIssuer = "https://corp.test"

func startIDP(t *testing.T) *idpStack {
	t.Helper()
	f := &idpStack{stack: start(t)}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f.key = key
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256"}}})
	if err != nil {
		t.Fatal(err)
	}
	f.provider = &identity.Provider{
		ID: "Idp-" + uuid.NewString(), AccountID: f.Owner.AccountID, Name: "corp", Issuer: corpIssuer, Audience: "tabard", JWKS: keys,
	}
	f.update(func(tx *directory.Tx) { f.d.Providers.Put(tx, f.provider) })
	f.federate = grant.New(grant.Config{
		Directory: f.d, Users: &attest.Users{Providers: f.d, Keys: &attest.Keys{Now: time.Now}, Now: time.Now},
		Tokens: f.tokens, Sealer: f.Sealer, Journal: f.Config.Journal, Names: crn.DefaultNames, Now: time.Now,
		OperatorAccount: f.Owner.AccountID,
	})
	return f
}

// assertion signs an ID token with good claims, changed as the test likes.
func (f *idpStack) assertion(claims map[string]any) string {
	f.T.Helper()
	now := time.Now()
	all := map[string]any{
		"iss": corpIssuer, "aud": "tabard", "sub": "u-1", "iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(),
		"email": "ada@corp.test", "email_verified": true, "name": "Ada",
	}
	for name, value := range claims {
		if all[name] = value; value == nil {
			delete(all, name)
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: f.key, KeyID: "k1"}}, nil)
	if err != nil {
		f.T.Fatal(err)
	}
	raw, err := josejwt.Signed(signer).Claims(all).Serialize()
	if err != nil {
		f.T.Fatal(err)
	}
	return raw
}

func (f *idpStack) login(claims map[string]any) (grant.Answer, error) {
	return f.federate.Federated(f.T.Context(), origin, grant.FederatedRequest{Assertion: f.assertion(claims)})
}

func (f *idpStack) invite(email string) *identity.User {
	f.T.Helper()
	u := &identity.User{IAMID: "IBMid-" + rand.Text()[:10], AccountID: f.Owner.AccountID, Name: email, Email: email, Invited: true}
	f.update(func(tx *directory.Tx) { f.d.Users.Put(tx, u) })
	return f.user(u.IAMID)
}

func (f *idpStack) user(iamID string) *identity.User {
	f.T.Helper()
	u, ok := f.d.Users.Get(directory.UserKey(f.Owner.AccountID, iamID))
	if !ok {
		f.T.Fatalf("no user %s", iamID)
	}
	return u
}

func TestAnInvitedPersonLogsInOnceAndIsKnownFromThenOn(t *testing.T) {
	f := startIDP(t)
	u := f.invite("Ada@corp.test")
	a, err := f.login(nil)
	if err != nil || a.Claims.IAMID != u.IAMID {
		t.Fatalf("logged in as %q, error %v", a.Claims.IAMID, err)
	}
	if bound := f.user(u.IAMID); bound.Invited || bound.Issuer != corpIssuer || bound.Subject != "u-1" {
		t.Errorf("user %+v", bound)
	}
	// From now on the subject counts and no address does.
	if a, err := f.login(map[string]any{"email": "else@corp.test"}); err != nil || a.Claims.IAMID != u.IAMID {
		t.Errorf("the second login: %q, error %v", a.Claims.IAMID, err)
	}
	if _, err := f.login(map[string]any{"sub": "u-2"}); err == nil {
		t.Error("somebody else with the same address got in")
	}
}

func TestAnAddressThatOnlyLooksTheSameDoesNotTakeUpAnInvitation(t *testing.T) {
	f := startIDP(t)
	u := f.invite("joseskim@corp.test")
	for _, email := range []string{"joſeskim@corp.test", "joses\u212aim@corp.test", "joseskim@corp.teſt"} {
		if a, err := f.login(map[string]any{"email": email}); err == nil {
			t.Errorf("%q logs in as %s", email, a.Claims.IAMID)
		}
	}
	if !f.user(u.IAMID).Invited {
		t.Error("the invitation is taken up")
	}
}

func TestALoginThatIsRefusedChangesNothing(t *testing.T) {
	for name, refuse := range map[string]func(*idpStack, *directory.Tx){
		"from an address that the account does not allow": func(f *idpStack, tx *directory.Tx) {
			s := *f.d.SettingsOf(f.Owner.AccountID)
			s.AllowedAddresses = "198.51.100.0/24"
			f.d.Settings.Put(tx, &s)
		},
		"into a closed account": func(f *idpStack, tx *directory.Tx) {
			a, _ := f.d.Accounts.Get(f.Owner.AccountID)
			closed := *a
			closed.ClosedAt = tx.Now
			f.d.Accounts.Put(tx, &closed)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := startIDP(t)
			u := f.invite("ada@corp.test")
			f.rule(t)
			f.update(func(tx *directory.Tx) { refuse(f, tx) })
			if _, err := f.login(nil); err == nil {
				t.Fatal("logged in")
			}
			if now := f.user(u.IAMID); !now.Invited || now.Subject != "" {
				t.Errorf("the refused login has taken up the invitation: %+v", now)
			}
			if m, ok := f.d.Memberships.Get(directory.UserKey(f.Owner.AccountID, u.IAMID)); ok {
				t.Errorf("the refused login has made %+v", m)
			}
			events := f.Events(5)
			if len(events) == 0 || events[0].Outcome != "failure" {
				t.Errorf("events %+v", events)
			}
			for _, e := range events {
				if e.Action == "iam-groups.federated-member.add" && e.Outcome == "success" {
					t.Error("an event tells of a membership that a refused login made")
				}
			}
		})
	}
}

// rule makes everybody of the provider a member of a group.
func (f *idpStack) rule(t *testing.T) *access.GroupRule {
	t.Helper()
	g := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: f.Owner.AccountID, Name: "staff"}
	r := &access.GroupRule{
		ID: "ClaimRule-" + uuid.NewString(), AccountID: f.Owner.AccountID, GroupID: g.ID, Expiration: 1, RealmName: corpIssuer,
		Conditions: []identity.Condition{{Claim: "aud", Operator: identity.Equals, Value: `"tabard"`}},
	}
	f.update(func(tx *directory.Tx) {
		f.d.Groups.Put(tx, g)
		f.d.GroupRules.Put(tx, r)
	})
	return r
}

func TestTakingUpAnInvitationStandsInTheLogWithItsChange(t *testing.T) {
	f := startIDP(t)
	u := f.invite("ada@corp.test")
	if _, err := f.login(nil); err != nil {
		t.Fatal(err)
	}
	target := crn.DefaultNames.Of("user-management", "", f.Owner.AccountID, "", "user", u.IAMID).String()
	stored, err := f.Store.Events(t.Context(), store.Query{AccountID: f.Owner.AccountID, Changed: target, Limit: 10})
	if err != nil || len(stored) == 0 {
		t.Errorf("%d events of the change to the user, error %v", len(stored), err)
	}
}

func TestAssertionsThatAreNotForUsAreRefused(t *testing.T) {
	f := startIDP(t)
	f.invite("ada@corp.test")
	now := time.Now()
	for name, claims := range map[string]map[string]any{
		"for another audience":                    {"aud": "other"},
		"for several, made for another":           {"aud": []string{"tabard", "other"}, "azp": "other"},
		"for several, not saying for whom":        {"aud": []string{"tabard", "other"}},
		"without an audience":                     {"aud": nil},
		"with an address that is not verified":    {"email_verified": false},
		"with an address that is said to be 1":    {"email_verified": 1},
		"with an address nobody says is verified": {"email_verified": nil},
		"without a subject":                       {"sub": nil},
		"with a subject that is a number":         {"sub": 7},
		"without iat":                             {"iat": nil, "exp": now.Add(24 * time.Hour).Unix()},
		"without exp":                             {"exp": nil},
		"expired":                                 {"iat": now.Add(-2 * time.Hour).Unix(), "exp": now.Add(-time.Hour).Unix()},
		"old, and valid for a year":               {"iat": now.Add(-2 * time.Hour).Unix(), "exp": now.Add(8760 * time.Hour).Unix()},
		"from the future":                         {"iat": now.Add(time.Hour).Unix(), "exp": now.Add(2 * time.Hour).Unix()},
		"with a time that overflows":              {"iat": -9e18, "exp": 9e18},
		"of another issuer":                       {"iss": "https://evil.test"},
		"of an issuer that is almost the same":    {"iss": corpIssuer + "/"},
	} {
		t.Run(name, func(t *testing.T) {
			if a, err := f.login(claims); err == nil {
				t.Errorf("logged in as %s", a.Claims.IAMID)
			} else if fault.Of(err).Kind != fault.Invalid && fault.Of(err).Kind != fault.Unauthenticated {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestTwoLoginsAtOnceTakeUpOneInvitation(t *testing.T) {
	f := startIDP(t)
	u := f.invite("ada@corp.test")
	f.rule(t)
	done := make(chan error)
	subjects := []string{"u-1", "u-2", "u-3", "u-4"}
	for _, sub := range subjects {
		go func() {
			_, err := f.login(map[string]any{"sub": sub})
			done <- err
		}()
	}
	in := 0
	for range subjects {
		if err := <-done; err == nil {
			in++
		}
	}
	if in != 1 || !slices.Contains(subjects, f.user(u.IAMID).Subject) {
		t.Errorf("%d of them got in; the user is %+v", in, f.user(u.IAMID))
	}
}

func TestATokenOfAnAssumedProfileEndsWithTheUserBehindItsKey(t *testing.T) {
	s := start(t)
	p := s.people()
	s.update(func(tx *directory.Tx) {
		trusting := *p.profile
		trusting.Identities = []identity.ProfileIdentity{{IAMID: ada, Identifier: ada, Type: "user"}}
		s.d.Profiles.Put(tx, &trusting)
	})
	a, err := s.grants.Assume(t.Context(), origin, grant.AssumeRequest{AccessToken: p.keyToken, Profile: grant.Selector{ID: p.profile.ID}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.grants.Caller(a.AccessToken); err != nil {
		t.Fatal(err)
	}
	s.update(func(tx *directory.Tx) {
		gone := *s.userOf(ada)
		gone.Disabled = true
		s.d.Users.Put(tx, &gone)
	})
	if _, err := s.grants.Caller(a.AccessToken); !errors.Is(err, grant.ErrUserDisabled) {
		t.Errorf("the disabled user still acts as the profile: error %v", err)
	}
}

func (s *stack) userOf(iamID string) *identity.User {
	s.T.Helper()
	u, ok := s.d.Users.Get(directory.UserKey(s.Owner.AccountID, iamID))
	if !ok {
		s.T.Fatalf("no user %s", iamID)
	}
	return u
}

func TestAKeyIsNotIntrospectedFromAnAddressThatItsAccountDoesNotAllow(t *testing.T) {
	s := start(t)
	p := s.people()
	s.update(func(tx *directory.Tx) {
		settings := *s.d.SettingsOf(s.Owner.AccountID)
		settings.AllowedAddresses = "198.51.100.0/24"
		s.d.Settings.Put(tx, &settings)
	})
	if c, err := s.grants.Holder(t.Context(), origin, p.secret); err == nil {
		t.Errorf("the holder is shown: %+v", c)
	}
	e := s.Events(1)[0]
	if e.Action != "iam-identity.user-apikey.introspect" || e.Outcome != "failure" {
		t.Errorf("the newest event is %s %s", e.Action, e.Outcome)
	}
}
