package iamtoken_test

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
)

// provider registers the issuer as an identity provider of an account.
func (i *issuer) provider(account string) *identity.Provider {
	i.s.T.Helper()
	p := &identity.Provider{ID: "Idp-" + uuid.NewString(), AccountID: account, Name: "staff", Issuer: i.url, Audience: "tabard", JWKS: i.jwks()}
	i.s.update(func(tx *directory.Tx) { i.s.d.Providers.Put(tx, p) })
	return p
}

// person makes the claims of a good ID token.
func (i *issuer) person() map[string]any {
	now := i.s.clock.now().Unix()
	return map[string]any{
		"iss": i.url, "aud": "tabard", "sub": "g-1", "iat": now, "exp": now + 300, "email": "grace@example.com", "email_verified": true, "name": "Grace Hopper",
		"groups": []string{"ops"},
	}
}

func bearerForm(assertion string, more ...string) url.Values {
	v := form(more...)
	v.Set("grant_type", grant.TypeJWTBearer)
	v.Set("assertion", assertion)
	return v
}

func (s *stack) invited(account, iamID, email string) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		s.d.Users.Put(tx, &identity.User{IAMID: iamID, AccountID: account, Email: email, Name: "Grace Hopper", Invited: true})
	})
}

func TestAnAssertionIsExchangedForATokenOfTheUser(t *testing.T) {
	s := start(t)
	i := s.issuer("https://idp.test")
	i.provider(s.Owner.AccountID)
	s.invited(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	raw := i.sign(i.person())
	for _, f := range []url.Values{
		bearerForm(raw), bearerForm(raw + "\n"), bearerForm(raw, "account", s.Owner.AccountID), bearerForm(raw, "scope", "openid"),
	} {
		a := s.post(f)
		m := a.want(200)
		c := claims(t, m["access_token"])
		if c["iam_id"] != "IBMid-GRACE" || c["grant_type"] != grant.TypeJWTBearer || m["refresh_token"] != "not_supported" || m["expires_in"] != 3600.0 {
			t.Errorf("answer %v, claims %v", m, c)
		}
		for _, secret := range []string{"groups", "g-1"} {
			if strings.Contains(a.raw, secret) {
				t.Errorf("the answer holds %q", secret)
			}
		}
	}
	if strings.Contains(s.allDocuments(), raw) || strings.Contains(s.allDocuments(), strings.Split(raw, ".")[2]) {
		t.Error("the assertion stands in the log")
	}
}

// allDocuments are all events of the owner's account as they are stored.
func (s *stack) allDocuments() string {
	var b strings.Builder
	for _, e := range s.Events(1000) {
		b.Write(e.RequestData)
		b.Write(e.ResponseData)
		for _, c := range e.Trace {
			b.WriteString(c.Wanted + c.Found + c.Hint)
		}
		b.WriteString(e.Message + e.Reason.ForFailure)
	}
	return b.String()
}

func TestAnAssertionThatProvesNothingIsAnsweredInTheWireForm(t *testing.T) {
	s := start(t)
	i := s.issuer("https://idp.test")
	i.provider(s.Owner.AccountID)
	s.invited(s.Owner.AccountID, "IBMid-GRACE", "grace@example.com")
	with := func(change map[string]any) string {
		m := i.person()
		for k, v := range change {
			m[k] = v
		}
		return i.sign(m)
	}
	owner := s.Owner.AccountID
	s.refused(s.post(bearerForm("")), grant.CodeMissing, owner, grant.CheckCredential)
	s.refused(s.post(form("grant_type", grant.TypeJWTBearer)), grant.CodeMissing, owner, grant.CheckCredential)
	s.refused(s.post(form("grant_type", grant.TypeJWTBearer, "access_token", i.sign(i.person()))), grant.CodeMissing, owner, grant.CheckCredential)
	s.refused(s.post(bearerForm("x")), grant.CodeMalformed, owner, attest.CheckForm)
	s.refused(s.post(bearerForm(with(map[string]any{"iss": "https://other.test"}))), grant.CodeUnsupported, owner, attest.CheckIssuer)
	s.refused(s.post(bearerForm(with(map[string]any{"aud": "other"}))), grant.CodeUnsupported, owner, attest.CheckAudience)
	s.refused(s.post(bearerForm(with(map[string]any{"exp": s.clock.now().Add(-time.Second).Unix()}))), grant.CodeInvalidToken, owner, attest.CheckTime)
	s.refused(s.post(bearerForm(with(map[string]any{"sub": ""}))), grant.CodeUnsupported, owner, attest.CheckClaims)
	s.refused(s.post(bearerForm(with(nil), "account", s.Other.AccountID)), grant.CodeUnsupported, s.Other.AccountID, attest.CheckIssuer)
	s.refused(s.post(bearerForm(with(map[string]any{"email_verified": false}))), grant.CodeUserGone, owner, grant.CheckUser)
	s.refused(s.post(bearerForm(with(nil), "profile_id", "Profile-none")), grant.CodeNotFound, owner, grant.CheckProfile)
	// A field twice is a form that two readers could read differently.
	twice := bearerForm(with(nil))
	twice.Add("assertion", with(nil))
	s.post(twice).wantError(400, "BXNIM0107E")
	// A token of a cluster's pod is no ID token, nor the other way round.
	s.refused(s.post(bearerForm(i.token())), grant.CodeUnsupported, owner, attest.CheckAudience)
	s.refused(s.post(crForm(with(nil), "profile_id", "Profile-none")), grant.CodeUnsupported, owner, attest.CheckIssuer)
	if u, _ := s.d.Users.Get(directory.UserKey(owner, "IBMid-GRACE")); !u.Invited || u.Subject != "" {
		t.Errorf("the user was bound: %+v", u)
	}
}

func TestAFederatedUserPutsOnAProfileByEachSelector(t *testing.T) {
	s := start(t)
	i := s.issuer("https://idp.test")
	i.provider(s.Owner.AccountID)
	p := s.profile(s.Owner.AccountID, "deploy")
	s.update(func(tx *directory.Tx) {
		s.d.Rules.Put(tx, &identity.ClaimRule{
			ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Type: identity.RuleSAML, RealmName: i.url, Expiration: 900,
			Conditions: []identity.Condition{{Claim: "groups", Operator: identity.Contains, Value: `"ops"`}},
		})
	})
	for _, selector := range [][]string{{"profile_id", p.ID}, {"profile_name", "deploy"}, {"profile_crn", profileCRN(p)}} {
		a := s.post(bearerForm(i.sign(i.person()), selector...))
		m := a.want(200)
		c := claims(t, m["access_token"])
		if c["iam_id"] != "iam-"+p.ID || c["sub_type"] != "Profile" || m["expires_in"] != 900.0 {
			t.Errorf("answer %v, claims %v", m, c)
		}
		if e := s.event(a); e.Action != "iam-identity.user-authcode.login" || e.Initiator.AuthnName != "Grace Hopper" {
			t.Errorf("event %+v", e)
		}
	}
}

func TestAnAddressThatIsNotAllowedIsAnsweredWith401(t *testing.T) {
	s := start(t)
	settings := identity.DefaultSettings(s.Owner.AccountID)
	settings.AllowedAddresses = "203.0.113.0/24"
	s.update(func(tx *directory.Tx) { s.d.Settings.Put(tx, settings) })
	_, secret := s.apiKey(s.Owner.AccountID, s.Owner.IAMID)
	a := s.post(apiKeyForm(secret)) // from 192.0.2.1
	if a.status != 401 {
		t.Errorf("status %d", a.status)
	}
	s.refused(a, grant.CodeAddress, s.Owner.AccountID, grant.CheckAddress)
}
