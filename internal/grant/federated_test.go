package grant_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

func kindOf(err error) fault.Kind { return fault.Of(err).Kind }

// idp is an identity provider that an account has registered, with its key.
type idp struct {
	*identity.Provider
	s   *stack
	key *ecdsa.PrivateKey
}

func (s *stack) provider(account, issuer string) *idp {
	s.T.Helper()
	i := &idp{s: s, key: jwttest.Key(s.T, elliptic.P256())}
	i.Provider = &identity.Provider{
		ID: "Idp-" + uuid.NewString(), AccountID: account, Name: "idp " + issuer, Issuer: issuer, Audience: "tabard",
		JWKS: jwttest.Set(s.T, jwttest.JWK(i.key.Public(), "k1", "ES256")),
	}
	s.update(func(tx *directory.Tx) { s.d.Providers.Put(tx, i.Provider) })
	return i
}

// token is an ID token about a subject with a verified address, and with more
// claims; nil takes one away.
func (i *idp) token(subject, email string, more map[string]any) string {
	now := i.s.now()
	m := map[string]any{
		"iss": i.Issuer, "aud": i.Audience, "sub": subject, "email": email, "email_verified": true, "name": "Somebody",
		"iat": now.Unix(), "exp": now.Add(5 * time.Minute).Unix(), "groups": []string{"ops"},
	}
	for k, v := range more {
		if m[k] = v; v == nil {
			delete(m, k)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		i.s.T.Fatal(err)
	}
	return jwttest.ES256(i.s.T, i.key, "k1", string(b), "")
}

// invite makes a user who has never logged in.
func (s *stack) invite(account, iamID, email string) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		s.d.Users.Put(tx, &identity.User{IAMID: iamID, AccountID: account, Email: email, Name: "invited " + email, Invited: true})
	})
}

func (s *stack) user(account, iamID string) *identity.User {
	u, _ := s.d.Users.Get(directory.UserKey(account, iamID))
	return u
}

func ops() []identity.Condition {
	return []identity.Condition{{Claim: "groups", Operator: identity.Contains, Value: `"ops"`}}
}

// trustUser lets the members of ops put on a profile.
func (s *stack) trustUser(p *identity.Profile, issuer string) *identity.ClaimRule {
	s.T.Helper()
	r := &identity.ClaimRule{ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Type: identity.RuleSAML, RealmName: issuer, Conditions: ops()}
	s.update(func(tx *directory.Tx) { s.d.Rules.Put(tx, r) })
	return r
}

// login logs in with an ID token.
func (s *stack) login(raw, account string) (grant.Answer, grant.Origin, error) {
	o := from("192.0.2.1")
	a, err := s.grants.Federated(s.T.Context(), o, grant.FederatedRequest{Assertion: raw, Account: account})
	return a, o, err
}

func (s *stack) wantUser(raw, iamID string) activity.Event {
	s.T.Helper()
	a, o, err := s.login(raw, "")
	if err != nil || a.Claims.IAMID != iamID || a.Claims.Account.BSS != s.Owner.AccountID || a.RefreshToken != "" {
		s.T.Fatalf("claims %+v, %v; want %s", a.Claims, err, iamID)
	}
	if c, err := s.grants.Caller(a.AccessToken); err != nil || c.IAMID != iamID {
		s.T.Errorf("the token is of %+v, %v", c, err)
	}
	events := slices.DeleteFunc(s.events(s.Owner.AccountID, o.TransactionID), func(e activity.Event) bool { return !strings.HasSuffix(e.Action, ".login") })
	if len(events) != 1 {
		s.T.Fatalf("%d login events", len(events))
	}
	return events[0]
}

func (s *stack) wantNobody(raw string) activity.Event {
	s.T.Helper()
	a, o, err := s.login(raw, "")
	if a.AccessToken != "" {
		s.T.Fatalf("a token of %+v", a.Claims)
	}
	return s.wantRefused(err, o, s.Owner.AccountID, grant.CodeUserGone, grant.CheckUser)
}

func TestAnInvitationIsBoundToThePersonWhoProvesItsAddress(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "Grace@Example.com")
	account := s.Owner.AccountID

	for name, more := range map[string]map[string]any{
		"an unverified address":           {"email_verified": false},
		"an address that nobody verified": {"email_verified": nil},
		"no address":                      {"email": nil},
		"another address":                 {"email": "eve@example.com"},
		"an address that begins alike":    {"email": "grace@example.com.evil.test"},
		"an empty address":                {"email": ""},
	} {
		e := s.wantNobody(i.token("g-1", "grace@example.com", more))
		if u := s.user(account, "IBMid-GRACE"); !u.Invited || u.Subject != "" {
			t.Fatalf("%s: user %+v", name, u)
		}
		if e.Action != "iam-identity.user-federated.login" || e.Initiator.ID != "" {
			t.Errorf("event %+v", e)
		}
	}
	e := s.wantUser(i.token("g-1", "grace@example.com", nil), "IBMid-GRACE")
	u := s.user(account, "IBMid-GRACE")
	if u.Invited || u.Subject != "g-1" || u.Issuer != i.Issuer || u.ModifiedBy != "IBMid-GRACE" {
		t.Errorf("user %+v", u)
	}
	names := []string{
		attest.CheckForm, attest.CheckIssuer, attest.CheckSignature, attest.CheckAudience, attest.CheckTime, attest.CheckClaims,
		grant.CheckAccount, grant.CheckAddress, grant.CheckUser,
	}
	if !slices.EqualFunc(e.Trace, names, func(c activity.Check, n string) bool { return c.Name == n && c.Outcome == activity.Pass }) {
		t.Errorf("trace %+v", e.Trace)
	}
	if e.Initiator.ID != "IBMid-GRACE" || !strings.HasSuffix(e.Target.ID, ":user:IBMid-GRACE") || e.Outcome != activity.Success {
		t.Errorf("event %+v", e)
	}

	// From now on the subject counts, whatever the address.
	revision := u.Revision
	s.wantUser(i.token("g-1", "new-name@example.com", map[string]any{"email_verified": false}), "IBMid-GRACE")
	s.wantUser(i.token("g-1", "", map[string]any{"email": nil}), "IBMid-GRACE")
	if u := s.user(account, "IBMid-GRACE"); u.Revision != revision || u.Email != "Grace@Example.com" {
		t.Errorf("user %+v", u)
	}
	s.wantNobody(i.token("g-2", "grace@example.com", nil))
	s.wantNobody(i.token("G-1", "grace@example.com", nil))
}

func TestABoundUserCannotBeTakenOver(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	evil := s.provider(s.Owner.AccountID, "https://evil.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	s.wantUser(i.token("g-1", "grace@example.com", nil), "IBMid-GRACE")

	s.wantNobody(evil.token("g-1", "grace@example.com", nil))
	s.wantNobody(evil.token("g-1", "", nil))
	s.wantNobody(evil.token("e-1", "grace@example.com", nil))
	if u := s.user(s.Owner.AccountID, "IBMid-GRACE"); u.Issuer != i.Issuer || u.Subject != "g-1" {
		t.Fatalf("user %+v", u)
	}
	// The other provider speaks in the name of the first one.
	if _, _, err := s.login(evil.token("g-1", "grace@example.com", map[string]any{"iss": i.Issuer}), ""); code(err) != grant.CodeUnsupported {
		t.Error(err)
	}
	// Users who were not invited are bound by no address: nor is the owner.
	s.update(func(tx *directory.Tx) {
		s.d.Users.Put(tx, &identity.User{IAMID: "IBMid-MADE", AccountID: s.Owner.AccountID, Email: "made@example.com", Name: "made"})
	})
	s.wantNobody(i.token("m-1", "made@example.com", nil))
	s.wantNobody(i.token("", "", map[string]any{"sub": "o-1", "email": s.user(s.Owner.AccountID, s.Owner.IAMID).Email}))
	// An invitation in the name of nobody is not one to everybody.
	s.invite(s.Owner.AccountID, "IBMid-BLANK", "")
	s.wantNobody(i.token("b-1", "", nil))
}

func TestAProviderLetsNobodyIntoAnotherAccount(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Other.AccountID, "IBMid-GRACE", "grace@example.com")
	s.wantNobody(i.token("g-1", "grace@example.com", nil))
	_, _, err := s.login(i.token("g-1", "grace@example.com", nil), s.Other.AccountID)
	if code(err) != grant.CodeUnsupported {
		t.Errorf("by the name of the other account: %v", err)
	}
	if u := s.user(s.Other.AccountID, "IBMid-GRACE"); u.Subject != "" || !u.Invited {
		t.Errorf("user %+v", u)
	}
}

func TestAnIssuerOfTwoAccountsNeedsTheAccountsName(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	there := &identity.Provider{ID: "Idp-there", AccountID: s.Other.AccountID, Name: "same", Issuer: i.Issuer, Audience: i.Audience, JWKS: i.JWKS}
	s.update(func(tx *directory.Tx) { s.d.Providers.Put(tx, there) })
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	s.invite(s.Other.AccountID, "IBMid-GRACE", "grace@example.com")
	raw := i.token("g-1", "grace@example.com", nil)
	_, o, err := s.login(raw, "")
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeMissing, attest.CheckIssuer)
	if _, _, err := s.login(raw, "cccc0000000000000000000000000000"); code(err) != grant.CodeUnsupported {
		t.Error(err)
	}
	for _, account := range []string{s.Other.AccountID, s.Owner.AccountID} {
		a, _, err := s.login(raw, account)
		if err != nil || a.Claims.Account.BSS != account {
			t.Errorf("%+v, %v", a.Claims, err)
		}
	}
	// Each account has its own binding.
	if a, b := s.user(s.Owner.AccountID, "IBMid-GRACE"), s.user(s.Other.AccountID, "IBMid-GRACE"); a.Subject != "g-1" || b.Subject != "g-1" {
		t.Errorf("users %+v and %+v", a, b)
	}
}

func TestADisabledUserIsNotLetInByHisProvider(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	set := func(disabled bool) {
		u := *s.user(s.Owner.AccountID, "IBMid-GRACE")
		u.Disabled = disabled
		s.update(func(tx *directory.Tx) { s.d.Users.Put(tx, &u) })
	}
	set(true)
	e := s.wantNobody(i.token("g-1", "grace@example.com", nil))
	if failed, _ := e.Trace.Failed(); !strings.Contains(failed.Hint, "disabled") {
		t.Errorf("hint %q", failed.Hint)
	}
	if u := s.user(s.Owner.AccountID, "IBMid-GRACE"); u.Subject != "" {
		t.Error("he was bound")
	}
	set(false)
	s.wantUser(i.token("g-1", "grace@example.com", nil), "IBMid-GRACE")
	set(true)
	s.wantNobody(i.token("g-1", "grace@example.com", nil))
}

func TestARefusedPersonIsExplainedByWhatWouldLetHimIn(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	hint := func(raw string) (found, hint string) {
		t.Helper()
		failed, _ := s.wantNobody(raw).Trace.Failed()
		return failed.Found, failed.Hint
	}
	if found, h := hint(i.token("x", "ada@example.com", map[string]any{"name": "Ada"})); !strings.Contains(h, "invite the person") || !strings.Contains(found, "ada@example.com") {
		t.Errorf("a stranger: %s, %s", found, h)
	}
	if _, h := hint(i.token("g-1", "grace@example.com", map[string]any{"email_verified": false})); !strings.Contains(h, "email_verified") {
		t.Errorf("an address that is not verified: %s", h)
	}
	s.wantUser(i.token("g-1", "grace@example.com", nil), "IBMid-GRACE")
	if _, h := hint(i.token("g-2", "grace@example.com", nil)); !strings.Contains(h, "another subject") {
		t.Errorf("another subject: %s", h)
	}
}

func TestADisabledOrDeletedProviderLetsNobodyIn(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	a, _, err := s.login(i.token("g-1", "grace@example.com", nil), "")
	if err != nil {
		t.Fatal(err)
	}
	s.group("ops", i.Issuer, 8, ops())
	if _, _, err := s.login(i.token("g-1", "grace@example.com", map[string]any{"groups": []string{"ops"}}), ""); err != nil || !s.may("IBMid-GRACE", "ops", 0) {
		t.Fatalf("she is not in the group: %v", err)
	}
	off := *i.Provider
	off.Disabled = true
	s.update(func(tx *directory.Tx) {
		s.d.Providers.Put(tx, &off)
		s.d.EndMembershipsOf(tx, off.AccountID, off.Issuer)
	})
	if s.may("IBMid-GRACE", "ops", 0) {
		t.Error("the membership outlives the provider")
	}
	for range 2 {
		if _, err := s.grants.Caller(a.AccessToken); !errors.Is(err, grant.ErrProviderGone) {
			t.Errorf("the token outlives the provider: %v", err)
		}
		if _, _, err := s.login(i.token("g-1", "grace@example.com", nil), ""); code(err) != grant.CodeUnsupported {
			t.Error(err)
		}
		if p, ok := s.d.Providers.Get(off.ID); ok {
			s.update(func(tx *directory.Tx) { s.d.Providers.Delete(tx, p) })
		}
	}
}

// Many logins at once with one invitation bind it once.
func TestOneInvitationBindsOnePerson(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	var wg sync.WaitGroup
	codes := make([]string, 12)
	subjects := []string{"a", "b", "c"}
	for n := range codes {
		wg.Go(func() {
			_, _, err := s.login(i.token(subjects[n%3], "grace@example.com", nil), "")
			codes[n] = code(err)
		})
	}
	wg.Wait()
	winner := s.user(s.Owner.AccountID, "IBMid-GRACE").Subject
	for n, got := range codes {
		if want := map[bool]string{true: "ok", false: grant.CodeUserGone}[subjects[n%3] == winner]; got != want {
			t.Errorf("subject %s: %s, want %s (bound is %s)", subjects[n%3], got, want, winner)
		}
	}
}

// group adds an access group that may read Key Protect, with a rule.
func (s *stack) group(name, issuer string, hours int, conditions []identity.Condition) (*access.Group, *access.GroupRule) {
	s.T.Helper()
	account := s.Owner.AccountID
	g := &access.Group{ID: "AccessGroupId-" + name, AccountID: account, Name: name}
	r := &access.GroupRule{ID: "ClaimRule-" + name, AccountID: account, GroupID: g.ID, Name: name, Expiration: hours, RealmName: issuer, Conditions: conditions}
	is := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	p := &access.Policy{
		ID: "policy-" + name, AccountID: account, API: 1, Type: access.TypeAccess, State: access.Active, Subject: []access.Attribute{is(access.AccessGroupID, g.ID)},
		Resource: []access.Attribute{is(access.ServiceName, "kms"), is(access.AccountID, account), is(access.ServiceInstance, name)}, Roles: []string{access.ServiceRoleCRN("kms", "Reader")},
	}
	s.update(func(tx *directory.Tx) {
		s.d.Groups.Put(tx, g)
		s.d.GroupRules.Put(tx, r)
		s.d.Policies.Put(tx, p)
	})
	return g, r
}

// may asks whether the user may use what a group's policy is about.
func (s *stack) may(iamID, group string, in time.Duration) bool {
	return access.Decide(s.d, access.Request{
		Subject: iamID, AccountID: s.Owner.AccountID, Action: "kms.secrets.list", Time: time.Now().Add(in),
		Resource: map[string]string{access.AccountID: s.Owner.AccountID, access.ServiceName: "kms", access.ServiceInstance: group},
	}).Allowed
}

// joined are the groups that a login has added, by its events.
func (s *stack) joined(raw string) []string {
	s.T.Helper()
	_, o, err := s.login(raw, "")
	if err != nil {
		s.T.Fatal(err)
	}
	names := []string{}
	for _, e := range s.events(s.Owner.AccountID, o.TransactionID) {
		if e.Action == "iam-groups.federated-member.add" {
			names = append(names, e.Target.Name)
			if e.Initiator.ID != "IBMid-GRACE" || e.Outcome != activity.Success || !strings.Contains(string(e.ResponseData), "IBMid-GRACE") {
				s.T.Errorf("event %+v", e)
			}
		}
	}
	slices.Sort(names)
	return names
}

func TestALoginSettlesTheGroupsThatTheRulesGive(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	const grace = "IBMid-GRACE"
	s.group("ops", i.Issuer, 2, ops())
	s.group("dev", i.Issuer, 1, []identity.Condition{{Claim: "groups", Operator: identity.Contains, Value: `"dev"`}})
	s.group("other-realm", "https://other.test", 2, ops())
	s.group("no-conditions", i.Issuer, 2, nil)
	with := func(groups ...string) string {
		return i.token("g-1", "grace@example.com", map[string]any{"groups": groups})
	}
	wantIn := func(want ...string) {
		t.Helper()
		var got []string
		for _, g := range []string{"dev", "no-conditions", "ops", "other-realm"} {
			if s.may(grace, g, 0) {
				got = append(got, g)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("she is in %q, want %q", got, want)
		}
	}
	wantJoined := func(raw string, want ...string) {
		t.Helper()
		if got := s.joined(raw); !slices.Equal(got, want) {
			t.Errorf("events of joining %q, want %q", got, want)
		}
	}
	wantIn()
	wantJoined(with("ops"), "ops")
	wantIn("ops")
	wantJoined(with("ops", "dev"), "dev") // she is in the other already
	wantIn("dev", "ops")
	if s.may(grace, "dev", time.Hour+time.Minute) || !s.may(grace, "ops", 119*time.Minute) || s.may(grace, "ops", 121*time.Minute) {
		t.Error("the memberships do not end with their time")
	}
	wantJoined(with("dev"))
	wantIn("dev")
	wantJoined(with())
	wantIn()
	if _, ok := s.d.Memberships.Get(directory.UserKey(s.Owner.AccountID, grace)); ok {
		t.Error("a membership in nothing is kept")
	}
	wantJoined(with("ops", "dev"), "dev", "ops")
	// Nobody else is.
	if s.may("IBMid-OTHER", "ops", 0) {
		t.Error("somebody else is in the group")
	}
}

func TestAMembershipEndsAtOnceWithItsRule(t *testing.T) {
	const grace = "IBMid-GRACE"
	for name, end := range map[string]func(*stack, *directory.Tx, *access.Group, *access.GroupRule){
		"changed": func(s *stack, tx *directory.Tx, _ *access.Group, r *access.GroupRule) {
			next := *r
			next.Conditions = []identity.Condition{{Claim: "groups", Operator: identity.Contains, Value: `"nobody"`}}
			s.d.GroupRules.Put(tx, &next)
		},
		"changed in name alone": func(s *stack, tx *directory.Tx, _ *access.Group, r *access.GroupRule) {
			next := *r
			next.Name = "other"
			s.d.GroupRules.Put(tx, &next)
		},
		"deleted":                func(s *stack, tx *directory.Tx, _ *access.Group, r *access.GroupRule) { s.d.GroupRules.Delete(tx, r) },
		"deleted with its group": func(s *stack, tx *directory.Tx, g *access.Group, _ *access.GroupRule) { s.d.Groups.Delete(tx, g) },
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			i := s.provider(s.Owner.AccountID, "https://idp.test")
			s.invite(s.Owner.AccountID, grace, "grace@example.com")
			g, r := s.group("ops", i.Issuer, 24, ops())
			s.wantUser(i.token("g-1", "grace@example.com", nil), grace)
			if !s.may(grace, "ops", 0) {
				t.Fatal("she is not in the group")
			}
			s.update(func(tx *directory.Tx) { end(s, tx, g, r) })
			if s.may(grace, "ops", 0) || len(s.d.DynamicMembersOf(g.ID, time.Now())) != 0 {
				t.Error("she is still in the group")
			}
			if name == "changed in name alone" {
				if got := s.joined(i.token("g-1", "", nil)); !slices.Equal(got, []string{"ops"}) || !s.may(grace, "ops", 0) {
					t.Errorf("a new login: events of joining %q", got)
				}
			}
		})
	}
}

func TestTwoRulesOfAGroupMakeOneMemberAndOneEvent(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	g, _ := s.group("ops", i.Issuer, 1, ops())
	second := &access.GroupRule{ID: "ClaimRule-second", AccountID: s.Owner.AccountID, GroupID: g.ID, Name: "second", Expiration: 5, RealmName: i.Issuer, Conditions: ops()}
	s.update(func(tx *directory.Tx) { s.d.GroupRules.Put(tx, second) })
	if got := s.joined(i.token("g-1", "grace@example.com", nil)); !slices.Equal(got, []string{"ops"}) {
		t.Errorf("events of joining %q", got)
	}
	if !s.may("IBMid-GRACE", "ops", 4*time.Hour) || s.may("IBMid-GRACE", "ops", 6*time.Hour) {
		t.Error("the longer of the two does not count")
	}
}

func TestARuleOfAnotherAccountGivesNothing(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	s.invite(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	s.update(func(tx *directory.Tx) {
		s.d.Groups.Put(tx, &access.Group{ID: "AccessGroupId-there", AccountID: s.Other.AccountID, Name: "there"})
		s.d.GroupRules.Put(tx, &access.GroupRule{ID: "ClaimRule-there", AccountID: s.Other.AccountID, GroupID: "AccessGroupId-there", Expiration: 1, RealmName: i.Issuer, Conditions: ops()})
	})
	if got := s.joined(i.token("g-1", "grace@example.com", nil)); len(got) != 0 {
		t.Errorf("joined %q", got)
	}
}

func TestAFederatedUserPutsOnTheProfileThatTrustsHim(t *testing.T) {
	s := start(t)
	i := s.provider(s.Owner.AccountID, "https://idp.test")
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "deploy"}
	q := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Other.AccountID, Name: "deploy"}
	s.update(func(tx *directory.Tx) {
		s.d.Profiles.Put(tx, p)
		s.d.Profiles.Put(tx, q)
	})
	rule := s.trustUser(p, i.Issuer)
	s.trustUser(q, i.Issuer)
	put := func(raw string, want grant.Selector) (grant.Answer, grant.Origin, error) {
		o := from("192.0.2.1")
		a, err := s.grants.Federated(t.Context(), o, grant.FederatedRequest{Assertion: raw, Profile: want})
		return a, o, err
	}
	raw := i.token("g-1", "grace@example.com", nil)
	for _, sel := range []grant.Selector{{ID: p.ID}, {Name: "deploy"}, {ID: "iam-" + p.ID}, {CRN: "crn:v1:bluemix:public:iam-identity::a/" + p.AccountID + "::profile:" + p.ID}} {
		a, o, err := put(raw, sel)
		if err != nil || a.Claims.IAMID != "iam-"+p.ID || a.Claims.Account.BSS != p.AccountID || a.Claims.Authn == nil || a.Claims.Authn.Subject != "g-1" {
			t.Fatalf("%v: %+v, %v", sel, a.Claims, err)
		}
		events := s.events(s.Owner.AccountID, o.TransactionID)
		if len(events) != 1 || events[0].Action != "iam-identity.user-authcode.login" || events[0].Initiator.ID != "iam-"+p.ID ||
			events[0].Initiator.AuthnName != "Somebody" || !strings.HasSuffix(events[0].Initiator.AuthnID, "-g-1") {
			t.Errorf("events %+v", events)
		}
		if _, failed := events[0].Trace.Failed(); failed {
			t.Errorf("trace %+v", events[0].Trace)
		}
	}
	if s.d.Memberships.Len() != 0 {
		t.Error("putting on a profile made him a member of a group")
	}
	_, o, err := put(raw, grant.Selector{ID: q.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeNotFound, grant.CheckProfile)
	_, o, err = put(raw, grant.Selector{Name: "nothing"})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeNotFound, grant.CheckProfile)
	_, o, err = put(i.token("g-1", "grace@example.com", map[string]any{"groups": []string{"dev"}}), grant.Selector{ID: p.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeNotEligible, grant.CheckRule)
	// Another provider of the account cannot stand in for the one of the rule.
	second := s.provider(s.Owner.AccountID, "https://second.test")
	_, o, err = put(second.token("g-1", "grace@example.com", nil), grant.Selector{ID: p.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeNotEligible, grant.CheckRule)
	_, o, err = put("garbage", grant.Selector{ID: p.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeMalformed, attest.CheckForm)
	_, o, err = put("", grant.Selector{ID: p.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeMissing, grant.CheckCredential)

	// The rule bounds the session; without it there is none.
	shorter := *rule
	shorter.Expiration = 600
	s.update(func(tx *directory.Tx) { s.d.Rules.Put(tx, &shorter) })
	if a, _, err := put(raw, grant.Selector{ID: p.ID}); err != nil || a.Claims.Expires-a.Claims.IssuedAt != 600 {
		t.Errorf("%+v, %v", a.Claims, err)
	}
	s.update(func(tx *directory.Tx) { s.d.Rules.Delete(tx, &shorter) })
	_, o, err = put(raw, grant.Selector{ID: p.ID})
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeNotEligible, grant.CheckRule)
}

func TestARefusedIDTokenStandsInTheLogOfItsAccount(t *testing.T) {
	s := start(t)
	i := s.provider(s.Other.AccountID, "https://idp.test")
	_, o, err := s.login(i.token("g-1", "grace@example.com", map[string]any{"aud": "somebody-else"}), "")
	e := s.wantRefused(err, o, s.Other.AccountID, grant.CodeUnsupported, attest.CheckAudience)
	if e.Trace[len(e.Trace)-1].Outcome != activity.Skip {
		t.Errorf("trace %+v", e.Trace)
	}
	if len(s.events(s.Owner.AccountID, o.TransactionID)) != 0 {
		t.Error("it stands in another account's log as well")
	}
	// Of an issuer that nobody knows, in the operator's.
	stranger := &idp{s: s, key: i.key, Provider: &identity.Provider{Issuer: "https://stranger.test", Audience: "tabard"}}
	_, o, err = s.login(stranger.token("g-1", "grace@example.com", nil), "")
	s.wantRefused(err, o, s.Owner.AccountID, grant.CodeUnsupported, attest.CheckIssuer)
}
