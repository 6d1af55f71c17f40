package iamtoken_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
)

// access gets an access token for an API key.
func (s *stack) access(secret string, options ...option) string {
	s.T.Helper()
	return s.post(apiKeyForm(secret), options...).want(200)["access_token"].(string)
}

func trustUser(iamID string, accounts ...string) identity.ProfileIdentity {
	return identity.ProfileIdentity{Type: "user", IAMID: iamID, Identifier: iamID, Accounts: accounts}
}

func TestATrustedUserPutsTheProfileOn(t *testing.T) {
	s := start(t)
	u := s.user(s.Owner.AccountID, "IBMid-ADA")
	key, secret := s.apiKey(s.Owner.AccountID, u.IAMID)
	p := s.profile(s.Owner.AccountID, "my profile", trustUser(u.IAMID))
	raw := s.access(secret)
	for _, selector := range [][]string{
		{"profile_id", p.ID}, {"profile_id", "iam-" + p.ID}, {"profile_crn", profileCRN(p)},
		{"profile_name", p.Name, "account", p.AccountID}, {"profile_id", p.ID, "profile_name", p.Name, "account", p.AccountID},
	} {
		a := s.post(assumeForm(raw+"\n", selector...))
		m := a.want(200)
		if m["refresh_token"] != "not_supported" {
			t.Errorf("refresh token %v", m["refresh_token"])
		}
		want := map[string]any{
			"iam_id": "iam-" + p.ID, "id": "iam-" + p.ID, "realmid": "iam", "identifier": p.ID, "sub": p.ID, "sub_type": "Profile", "name": "my profile",
			"authn":   map[string]any{"sub": "ada@example.com", "iam_id": "IBMid-ADA", "name": "Ada Lovelace King", "email": "ada@example.com"},
			"account": map[string]any{"valid": true, "bss": s.Owner.AccountID, "frozen": false},
			"iss":     issuerURL, "grant_type": grant.TypeAssume, "scope": "ibm openid", "client_id": "default",
			"acr": 1.0, "amr": []any{"pwd"}, "apikey_id": key.ID,
		}
		c := claims(t, m["access_token"])
		if c["exp"].(float64) > claims(t, raw)["exp"].(float64) {
			t.Error("the profile's token outlives the one it was made from")
		}
		for _, name := range []string{"exp", "iat", "jti"} {
			delete(c, name)
		}
		if diff := cmp.Diff(want, c); diff != "" {
			t.Errorf("%v: claims:\n%s", selector, diff)
		}
		e := s.event(a)
		if e.Initiator.ID != "iam-"+p.ID || e.Initiator.TypeURI != activity.ProfileType || e.Initiator.AuthnID != u.IAMID ||
			e.Initiator.AuthnName != u.Name || e.Target.ID != profileCRN(p) || e.Outcome != activity.Success {
			t.Errorf("event %+v", e)
		}
	}
}

func TestATrustedServiceIDPutsAProfileOfAnotherAccountOn(t *testing.T) {
	s := start(t)
	id := s.serviceID(s.Owner.AccountID, "robot")
	_, secret := s.apiKey(s.Owner.AccountID, "iam-"+id.ID)
	p := s.profile(s.Other.AccountID, "theirs", identity.ProfileIdentity{Type: "serviceid", IAMID: "iam-" + id.ID, Identifier: id.ID})
	a := s.post(assumeForm(s.access(secret), "profile_id", p.ID))
	c := claims(t, a.want(200)["access_token"])
	if c["account"].(map[string]any)["bss"] != s.Other.AccountID || c["authn"].(map[string]any)["sub_type"] != "ServiceId" {
		t.Errorf("claims %v", c)
	}
	if e := s.event(a); e.AccountID != s.Other.AccountID {
		t.Errorf("event in account %s, want the profile's", e.AccountID)
	}
}

func TestAProfileThatDoesNotTrustTheCallerIsNotAssumed(t *testing.T) {
	s := start(t)
	raw := s.access(s.Owner.APIKey)
	mine := s.profile(s.Owner.AccountID, "mine", trustUser("IBMid-ELSE"))
	bare := s.profile(s.Owner.AccountID, "bare")
	for _, p := range []*identity.Profile{mine, bare} {
		a := s.post(assumeForm(raw, "profile_id", p.ID))
		s.refused(a, grant.CodeNotEligible, s.Owner.AccountID, grant.CheckTrust)
		if d := fmt.Sprint(a.want(400)["errorDetails"]); !strings.Contains(d, s.Owner.IAMID) || !strings.Contains(d, "iam-"+p.ID) {
			t.Errorf("details %q", d)
		}
	}

	// Elsewhere it cannot be told from one that does not exist.
	theirs := s.profile(s.Other.AccountID, "theirs", trustUser(s.Other.IAMID))
	none := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Other.AccountID, Name: "none"}
	var said []string
	for _, p := range []*identity.Profile{theirs, none} {
		for _, selector := range [][]string{{"profile_id", p.ID}, {"profile_crn", profileCRN(p)}, {"profile_name", p.Name, "account", p.AccountID}} {
			a := s.post(assumeForm(raw, selector...))
			s.refused(a, grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)
			m := a.want(400)
			delete(m, "context")
			said = append(said, strings.ReplaceAll(fmt.Sprint(m), selector[1], "X"))
		}
	}
	if diff := cmp.Diff(said[:3], said[3:]); diff != "" {
		t.Errorf("a foreign profile can be told from none:\n%s", diff)
	}
}

func TestAUsersTrustCanBeLimitedToAccounts(t *testing.T) {
	s := start(t)
	s.user(s.Owner.AccountID, "IBMid-ADA")
	s.user(s.Other.AccountID, "IBMid-ADA")
	_, mine := s.apiKey(s.Owner.AccountID, "IBMid-ADA")
	_, theirs := s.apiKey(s.Other.AccountID, "IBMid-ADA")
	p := s.profile(s.Owner.AccountID, "p", trustUser("IBMid-ADA", s.Other.AccountID))
	s.post(assumeForm(s.access(theirs), "profile_id", p.ID)).want(200)
	s.refused(s.post(assumeForm(s.access(mine), "profile_id", p.ID)), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckTrust)
}

func TestTheAccountsSettingsSayWhichOtherAccountsIdentitiesAreLetIn(t *testing.T) {
	s := start(t)
	s.user(s.Other.AccountID, "IBMid-ADA")
	_, theirs := s.apiKey(s.Other.AccountID, "IBMid-ADA")
	p := s.profile(s.Owner.AccountID, "p", trustUser("IBMid-ADA"))
	settings := func(state string, allowed ...string) {
		next := access.Settings{AccountID: s.Owner.AccountID}
		if old := s.Config.Directory.Interaction(s.Owner.AccountID); old != nil {
			next.Meta = old.Meta
		}
		next.External = map[string]access.ExternalAccess{access.ExternalUser: {State: state, Allowed: allowed}}
		s.update(func(tx *directory.Tx) { s.Config.Directory.AccessSettings.Put(tx, &next) })
	}
	evaluated := func(a *answer, decision string) {
		t.Helper()
		for _, e := range s.events(a.header.Get("Transaction-Id")) {
			if e.Action == "iam-access-management.account-settings.eval" {
				if e.AccountID != s.Owner.AccountID || !strings.Contains(string(e.ResponseData), `"decision":"`+decision+`"`) {
					t.Errorf("event %+v", e)
				}
				return
			}
		}
		t.Errorf("no event says %s", decision)
	}
	ask := func() *answer { return s.post(assumeForm(s.access(theirs), "profile_id", p.ID)) }

	settings(access.ExternalLimited, "ffffffffffffffffffffffffffffffff")
	a := ask()
	a.wantError(400, grant.CodeNotEligible)
	evaluated(a, "Deny")
	settings(access.ExternalMonitor)
	a = ask()
	a.want(200)
	evaluated(a, "Permit")
	settings(access.ExternalLimited, s.Other.AccountID)
	ask().want(200)
	settings(access.ExternalEnabled)
	ask().want(200)
}

func TestAProfileSessionCannotPutOnAnotherProfile(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	first := s.profile(s.Owner.AccountID, "first", trustUser(s.Owner.IAMID))
	s.link(first, k.cluster(s.Owner.AccountID, "c"))
	second := s.profile(s.Owner.AccountID, "second", trustUser("iam-"+first.ID), trustUser(s.Owner.IAMID))
	for name, f := range map[string]func() *answer{
		"by cr-token": func() *answer { return s.post(crForm(k.token(), "profile_id", first.ID)) },
		"by assume":   func() *answer { return s.post(assumeForm(s.access(s.Owner.APIKey), "profile_id", first.ID)) },
	} {
		raw := f().want(200)["access_token"].(string)
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			s.refused(s.post(assumeForm(raw, "profile_id", second.ID)), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckTrust)
			s.refused(s.post(assumeForm(raw, "profile_id", first.ID)), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckTrust)
		})
	}
}

func TestAnAssumedProfileEndsWithTheTokenItWasMadeFrom(t *testing.T) {
	s := start(t)
	p := s.profile(s.Owner.AccountID, "p", trustUser(s.Owner.IAMID))
	raw := s.access(s.Owner.APIKey)
	s.clock.advance(50 * time.Minute)
	m := s.post(assumeForm(raw, "profile_id", p.ID)).want(200)
	if in := m["expires_in"].(float64); in > 600 || in < 590 {
		t.Errorf("expires_in %v, want the 600 s that the source has left", in)
	}
	s.clock.advance(10 * time.Minute)
	s.refused(s.post(assumeForm(raw, "profile_id", p.ID)), grant.CodeInvalidToken, s.Owner.AccountID, grant.CheckCredential)
}

func TestAnAssumedProfileEndsWithTheKeyBehindIt(t *testing.T) {
	s := start(t)
	u := s.user(s.Owner.AccountID, "IBMid-ADA")
	key, secret := s.apiKey(s.Owner.AccountID, u.IAMID)
	p := s.profile(s.Owner.AccountID, "p", trustUser(u.IAMID))
	source := s.access(secret)
	raw := s.post(assumeForm(source, "profile_id", p.ID)).want(200)["access_token"].(string)
	if _, err := s.grants.Caller(raw); err != nil {
		t.Fatal(err)
	}
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Delete(tx, key) })
	if _, err := s.grants.Caller(raw); err == nil {
		t.Error("the profile's token outlives the API key that it was made with")
	}
	s.refused(s.post(assumeForm(source, "profile_id", p.ID)), grant.CodeInvalidToken, s.Owner.AccountID, grant.CheckCredential)
}

func TestAssumeNeedsATokenAndASelector(t *testing.T) {
	s := start(t)
	raw := s.access(s.Owner.APIKey)
	p := s.profile(s.Owner.AccountID, "p", trustUser(s.Owner.IAMID))
	k := s.issuer("https://cluster.test")
	k.cluster(s.Owner.AccountID, "c")
	owner := s.Owner.AccountID
	s.refused(s.post(assumeForm("", "profile_id", p.ID)), grant.CodeMissing, owner, grant.CheckCredential)
	s.refused(s.post(assumeForm(raw)), grant.CodeMissing, owner, grant.CheckSelector)
	a := s.post(assumeForm(raw, "profile_name", "p"))
	s.refused(a, grant.CodeMissing, owner, grant.CheckSelector)
	if d := fmt.Sprint(a.want(400)["errorDetails"]); !strings.Contains(d, "'account'") {
		t.Errorf("details %q", d)
	}
	s.refused(s.post(assumeForm(raw, "profile_name", "p", "account", s.Other.AccountID)), grant.CodeNotFound, owner, grant.CheckProfile)
	s.refused(s.post(assumeForm(raw, "profile_name", "p", "account", "nonsense")), grant.CodeNotFound, owner, grant.CheckProfile)
	for _, bad := range []string{"x", "Bearer " + raw, raw + "x", s.Owner.APIKey, k.token()} {
		s.refused(s.post(assumeForm(bad, "profile_id", p.ID)), grant.CodeInvalidToken, owner, grant.CheckCredential)
	}
}
