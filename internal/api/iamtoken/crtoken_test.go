package iamtoken_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
)

const login = "iam-identity.computeresource-token.login"

func TestAServiceAccountTokenGivesTheProfilesToken(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Owner.AccountID, "my-cluster")
	p := s.profile(s.Owner.AccountID, "my-trusted-profile")
	s.link(p, c)
	a := s.post(crForm(k.token(), "profile_id", p.ID))
	m := a.want(200)
	if m["refresh_token"] != "not_supported" || m["expires_in"] != 3600.0 || m["token_type"] != "Bearer" || m["scope"] != "ibm openid" {
		t.Errorf("answer %v", m)
	}
	name := "my-cluster:default:app:app-7f9"
	want := map[string]any{
		"iam_id": "iam-" + p.ID, "id": "iam-" + p.ID, "realmid": "iam", "identifier": p.ID, "sub": p.ID, "sub_type": "Profile",
		"name":    "my-trusted-profile",
		"authn":   map[string]any{"sub": c.CRN, "iam_id": "crn-" + c.CRN, "sub_type": "ComputeResource", "name": name},
		"account": map[string]any{"valid": true, "bss": s.Owner.AccountID, "frozen": false},
		"iss":     issuerURL, "grant_type": grant.TypeCRToken, "scope": "ibm openid", "client_id": "default", "acr": 0.0,
	}
	if diff := cmp.Diff(want, steady(t, m["access_token"], 3600)); diff != "" {
		t.Errorf("claims:\n%s", diff)
	}
	e := s.event(a)
	if e.Action != login || e.Outcome != activity.Success || e.AccountID != s.Owner.AccountID ||
		e.Initiator.ID != "iam-"+p.ID || e.Initiator.Name != p.Name || e.Initiator.TypeURI != activity.ProfileType || e.Initiator.Credential.Type != "profile" ||
		e.Initiator.AuthnID != "crn-"+c.CRN || e.Initiator.AuthnName != name || e.Target.ID != profileCRN(p) {
		t.Errorf("event %+v", e)
	}
	wantChecks := []string{
		attest.CheckForm, attest.CheckIssuer, attest.CheckSignature, attest.CheckAudience, attest.CheckTime, attest.CheckClaims,
		grant.CheckSelector, grant.CheckProfile, grant.CheckLink, grant.CheckRule,
		grant.CheckAccount, grant.CheckAddress,
	}
	if diff := cmp.Diff(wantChecks, checks(e)); diff != "" {
		t.Errorf("checks:\n%s", diff)
	}
}

func checks(e activity.Event) []string {
	names := make([]string, len(e.Trace))
	for i, c := range e.Trace {
		names[i] = c.Name
	}
	return names
}

func TestEachWayToNameAProfileFindsIt(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	p := s.profile(s.Owner.AccountID, "my profile + more")
	s.link(p, k.cluster(s.Owner.AccountID, "my-cluster"))
	for _, selector := range [][]string{
		{"profile_id", p.ID},
		{"profile_id", "iam-" + p.ID},
		{"profile_name", p.Name},
		{"profile_crn", profileCRN(p)},
		{"profile_id", p.ID, "profile_name", p.Name},
		{"profile_id", p.ID, "profile_crn", profileCRN(p), "profile_name", p.Name},
		{"profile_id", p.ID, "profile_name", ""},
		{"profile_id", p.ID, "account", s.Other.AccountID}, // not a field of this grant
	} {
		if c := claims(t, s.post(crForm(k.token(), selector...)).want(200)["access_token"]); c["identifier"] != p.ID {
			t.Errorf("%v: token of %v", selector, c["identifier"])
		}
	}
}

func TestSelectorsThatDoNotDenoteOneProfileFindNone(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Owner.AccountID, "my-cluster")
	p, q := s.profile(s.Owner.AccountID, "p"), s.profile(s.Owner.AccountID, "q")
	s.link(p, c)
	s.link(q, c)
	s.refused(s.post(crForm(k.token())), grant.CodeMissing, s.Owner.AccountID, grant.CheckSelector)
	s.refused(s.post(crForm(k.token(), "profile_id", "", "profile_name", "")), grant.CodeMissing, s.Owner.AccountID, grant.CheckSelector)
	for _, selector := range [][]string{
		{"profile_id", p.ID, "profile_name", "q"},
		{"profile_id", p.ID, "profile_crn", profileCRN(q)},
		{"profile_name", "p", "profile_crn", profileCRN(q)},
		{"profile_name", "P"},
		{"profile_name", p.ID},
		{"profile_id", "p"},
		{"profile_id", strings.ToLower(p.ID)},
		{"profile_crn", p.ID},
		{"profile_crn", strings.Replace(profileCRN(p), "iam-identity", "is", 1)},
		{"profile_crn", strings.Replace(profileCRN(p), s.Owner.AccountID, s.Other.AccountID, 1)},
		{"profile_crn", strings.Replace(profileCRN(p), ":profile:", ":serviceid:", 1)},
		{"profile_id", "Profile-" + uuid.NewString()},
	} {
		s.refused(s.post(crForm(k.token(), selector...)), grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)
	}
}

func TestATokenThatIsNoEvidenceIsRefusedAndToldApart(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Other.AccountID, "my-cluster")
	p := s.profile(s.Other.AccountID, "p")
	s.link(p, c)
	spoilt := func(f func(map[string]any)) string {
		m := k.claims()
		f(m)
		return k.sign(m)
	}
	now := s.clock.now().Unix()
	thief := s.issuer(k.url) // has the issuer's name and not its key
	twin := s.issuer(k.url)
	twin.kid = k.kid
	said := map[string]string{}
	for name, c := range map[string]struct{ raw, code, account, check string }{
		"absent":         {"", grant.CodeMissing, s.Owner.AccountID, attest.CheckForm},
		"malformed":      {"garbage", grant.CodeMalformed, s.Owner.AccountID, attest.CheckForm},
		"unknown issuer": {s.issuer("https://unknown.test").token(), grant.CodeUnsupported, s.Owner.AccountID, attest.CheckIssuer},
		"bad signature":  {twin.token(), grant.CodeUnsupported, s.Other.AccountID, attest.CheckSignature},
		"wrong audience": {spoilt(func(m map[string]any) { m["aud"] = "vault" }), grant.CodeUnsupported, s.Other.AccountID, attest.CheckAudience},
		"expired":        {spoilt(func(m map[string]any) { m["iat"], m["exp"] = now-600, now-1 }), grant.CodeInvalidToken, s.Other.AccountID, attest.CheckTime},
		"not yet valid":  {spoilt(func(m map[string]any) { m["nbf"] = now + 600 }), grant.CodeInvalidToken, s.Other.AccountID, attest.CheckTime},
		"no bound token": {spoilt(func(m map[string]any) { m["sub"] = "system:serviceaccount:default:other" }), grant.CodeUnsupported, s.Other.AccountID, attest.CheckClaims},
		"unknown profile": {
			k.token(), grant.CodeNotFound, s.Other.AccountID, grant.CheckProfile,
		},
	} {
		t.Run(name, func(t *testing.T) {
			defer s.as(t)()
			id := p.ID
			if name == "unknown profile" {
				id = "Profile-none"
			}
			a := s.post(crForm(c.raw, "profile_id", id))
			if a.status != 400 {
				t.Errorf("status %d, want 400: clients take it as final", a.status)
			}
			e := s.refused(a, c.code, c.account, c.check)
			if e.Action != login {
				t.Errorf("action %s", e.Action)
			}
			m := a.want(400)
			text := fmt.Sprint(m["errorCode"], " ", m["errorMessage"])
			if before, dup := said[text]; dup {
				t.Errorf("%q is said of %s, too", text, before)
			}
			said[text] = name
		})
	}
	s.refused(s.post(crForm(thief.token(), "profile_id", p.ID)), grant.CodeUnsupported, s.Other.AccountID, attest.CheckSignature)
	s.refused(s.post(crForm(spoilt(func(m map[string]any) { m["iat"], m["exp"] = now, now+3601 }), "profile_id", p.ID)), grant.CodeInvalidToken, s.Other.AccountID, attest.CheckTime)
	s.refused(s.post(crForm(spoilt(func(m map[string]any) { delete(m, "kubernetes.io") }), "profile_id", p.ID)), grant.CodeUnsupported, s.Other.AccountID, attest.CheckClaims)
	s.post(crForm(k.token(), "profile_id", p.ID)).want(200)
}

func TestAClusterWhoseKeysCannotBeHadIsOurTrouble(t *testing.T) {
	for name, c := range map[string]struct {
		url, cause string
		jwks       []byte
	}{
		"broken upload": {"https://cluster.test", "the key set has 0 keys", []byte(`{"keys":[]}`)},
		"nobody there":  {"http://127.0.0.1:1", "127.0.0.1:1", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t)
			k := s.issuer(c.url)
			registered := k.cluster(s.Owner.AccountID, "my-cluster")
			p := s.profile(s.Owner.AccountID, "p")
			s.link(p, registered)
			next := *registered
			next.JWKS = c.jwks
			s.update(func(tx *directory.Tx) { s.d.Clusters.Put(tx, &next) })
			for range 2 { // the second time the failure is remembered
				a := s.post(crForm(k.token(), "profile_id", p.ID))
				a.wantError(503, grant.CodeUnavailable)
				if a.header.Get("Retry-After") != "10" {
					t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
				}
				if strings.Contains(a.raw, c.cause) || strings.Contains(a.raw, "connect") {
					t.Errorf("the answer tells the cause: %s", a.raw)
				}
				if failed, ok := s.event(a).Trace.Failed(); !ok || failed.Name != attest.CheckSignature || !strings.Contains(failed.Found, c.cause) {
					t.Errorf("the administrator does not learn the cause: %+v", failed)
				}
			}
		})
	}
}

func TestAProfileThatNothingTiesToThePodIsNotEligible(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Owner.AccountID, "my-cluster")
	p := s.profile(s.Owner.AccountID, "p")
	link := &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: c.Type, CRN: c.CRN,
		Namespace: "default", ServiceAccount: "another",
	}
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, link) })
	a := s.post(crForm(k.token(), "profile_name", "p"))
	m := a.wantError(400, grant.CodeNotEligible)
	want := "The given token with identifier 'my-cluster:default:app:app-7f9' is not permitted to assume the indicated trusted profile; profile ID 'iam-" + p.ID + "'"
	if m["errorMessage"] != "Selected trusted profile not eligible." || m["errorDetails"] != want {
		t.Errorf("error %v", m)
	}
	e := s.refused(a, grant.CodeNotEligible, s.Owner.AccountID, grant.CheckLink)
	failed, _ := e.Trace.Failed()
	if !strings.Contains(failed.Hint, link.ID) || !strings.Contains(failed.Hint, "link.name") {
		t.Errorf("the nearest link is not told: %+v", failed)
	}
	if e.Initiator.ID != "crn-"+c.CRN || e.Initiator.TypeURI != activity.ComputeType || e.Target.ID != profileCRN(p) {
		t.Errorf("initiator %+v", e.Initiator)
	}
}

func TestAClaimRuleTiesAProfileToPods(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	k.cluster(s.Owner.AccountID, "my-cluster")
	p := s.profile(s.Owner.AccountID, "p")
	rule := &identity.ClaimRule{
		ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Type: identity.RuleCR, CRType: identity.IKSSA,
		Conditions: []identity.Condition{{Claim: "namespace", Operator: identity.Equals, Value: `"default"`}, {Claim: "pod", Operator: identity.Contains, Value: `"app"`}},
	}
	s.update(func(tx *directory.Tx) { s.d.Rules.Put(tx, rule) })
	a := s.post(crForm(k.token(), "profile_name", "p"))
	a.want(200)
	if e := s.event(a); e.Trace[len(e.Trace)-1].Outcome != activity.Pass {
		t.Errorf("trace %+v", e.Trace)
	}
	s.update(func(tx *directory.Tx) { s.d.Rules.Delete(tx, rule) })
	s.refused(s.post(crForm(k.token(), "profile_name", "p")), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckLink)
}

func TestWhatIsDeletedStopsNewTokensAtOnce(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Owner.AccountID, "my-cluster")
	p := s.profile(s.Owner.AccountID, "p")
	link := s.link(p, c)
	post := func() *answer { return s.post(crForm(k.token(), "profile_id", p.ID)) }
	post().want(200)
	s.update(func(tx *directory.Tx) { s.d.Links.Delete(tx, link) })
	s.refused(post(), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckLink)
	s.link(p, c)
	post().want(200)
	s.update(func(tx *directory.Tx) { s.d.Profiles.Delete(tx, p) })
	s.refused(post(), grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)
	s.update(func(tx *directory.Tx) { s.d.Clusters.Delete(tx, c) })
	s.refused(post(), grant.CodeUnsupported, s.Owner.AccountID, attest.CheckIssuer)
}

func TestAProfileOfAnotherAccountIsNotRevealed(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	k.cluster(s.Owner.AccountID, "my-cluster")
	foreign := s.profile(s.Other.AccountID, "foreign")
	none := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Other.AccountID, Name: "nothing"}
	for name, c := range map[string][2]string{
		"profile_id":   {foreign.ID, none.ID},
		"profile_name": {foreign.Name, none.Name},
		"profile_crn":  {profileCRN(foreign), profileCRN(none)},
	} {
		var said []string
		for n, value := range c {
			a := s.post(crForm(k.token(), name, value), with("Transaction-Id", fmt.Sprintf("%s-%d", name, n)))
			s.refused(a, grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)
			m := a.want(400)
			delete(m, "context")
			said = append(said, strings.ReplaceAll(fmt.Sprint(m), value, "X"))
		}
		if said[0] != said[1] {
			t.Errorf("%s: a foreign profile can be told from none:\n%s\n%s", name, said[0], said[1])
		}
	}
}

func TestACrossAccountLinkWorksByIDAndCRNAndNotByName(t *testing.T) {
	s := start(t)
	k := s.issuer("https://cluster.test")
	c := k.cluster(s.Owner.AccountID, "my-cluster")
	p := s.profile(s.Other.AccountID, "theirs")
	link := s.link(p, c)
	for _, selector := range [][]string{{"profile_id", p.ID}, {"profile_crn", profileCRN(p)}} {
		a := s.post(crForm(k.token(), selector...))
		if got := claims(t, a.want(200)["access_token"])["account"].(map[string]any)["bss"]; got != s.Other.AccountID {
			t.Errorf("token in account %v, want the profile's", got)
		}
		if e := s.event(a); e.AccountID != s.Other.AccountID {
			t.Errorf("event in account %s, want the profile's", e.AccountID)
		}
	}
	s.refused(s.post(crForm(k.token(), "profile_name", "theirs")), grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)

	// A link that does not say so does not cross accounts.
	inner := *link
	inner.CrossAccount = false
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, &inner) })
	s.refused(s.post(crForm(k.token(), "profile_id", p.ID)), grant.CodeNotFound, s.Owner.AccountID, grant.CheckProfile)
}

func TestTwoAccountsThatRegisteredOneIssuerEachGetTheirOwnProfile(t *testing.T) {
	s := start(t)
	k := s.issuer("https://shared.test")
	mine, theirs := k.cluster(s.Owner.AccountID, "shared"), k.cluster(s.Other.AccountID, "shared")
	p, q := s.profile(s.Owner.AccountID, "same-name"), s.profile(s.Other.AccountID, "same-name")
	s.profile(s.Other.AccountID, "only-theirs")
	link := s.link(q, theirs)
	for _, selector := range [][]string{{"profile_id", q.ID}, {"profile_crn", profileCRN(q)}, {"profile_id", q.ID, "profile_name", "same-name"}} {
		a := s.post(crForm(k.token(), selector...))
		c := claims(t, a.want(200)["access_token"])
		if c["identifier"] != q.ID || c["authn"].(map[string]any)["sub"] != theirs.CRN || s.event(a).AccountID != s.Other.AccountID {
			t.Errorf("%v: claims %v", selector, c)
		}
	}
	// The name alone does not decide in whose account the pod acts, whether or
	// not the profiles have links; both accounts see that it was tried.
	a := s.post(crForm(k.token(), "profile_name", "same-name"))
	if m := a.wantError(400, grant.CodeNotEligible); !strings.Contains(fmt.Sprint(m["errorDetails"]), "profile_id") {
		t.Errorf("details %v", m["errorDetails"])
	}
	s.refusedInBoth(a, grant.CheckProfile)
	s.refusedInBoth(s.post(crForm(k.token(), "profile_name", "no-such")), grant.CheckProfile)
	e := s.refused(s.post(crForm(k.token(), "profile_name", "only-theirs")), grant.CodeNotEligible, s.Other.AccountID, grant.CheckLink)
	if e.Initiator.AuthnID != "crn-"+theirs.CRN || e.Initiator.ID != "crn-"+theirs.CRN {
		t.Errorf("one account's log names the other's cluster: %+v", e.Initiator)
	}
	s.refused(s.post(crForm(k.token(), "profile_id", p.ID)), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckLink)
	// A link to the other account's registration of the same cluster is none.
	s.update(func(tx *directory.Tx) { s.d.Links.Delete(tx, link) })
	wrong := s.link(p, theirs)
	wrong2 := *wrong
	wrong2.CrossAccount = false
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, &wrong2) })
	s.refused(s.post(crForm(k.token(), "profile_id", p.ID)), grant.CodeNotEligible, s.Owner.AccountID, grant.CheckLink)
	s.link(p, mine)
	s.post(crForm(k.token(), "profile_id", p.ID)).want(200)
}

// refusedInBoth fails the test unless the refusal stands in both accounts'
// logs, explained by the failed check, and neither log names the other account.
func (s *stack) refusedInBoth(a *answer, check string) {
	s.T.Helper()
	events := s.events(a.header.Get("Transaction-Id"))
	if len(events) != 2 || events[0].AccountID != s.Owner.AccountID || events[1].AccountID != s.Other.AccountID {
		s.T.Fatalf("events %+v, want one in each account", events)
	}
	for n, other := range []string{s.Other.AccountID, s.Owner.AccountID} {
		e := events[n]
		if failed, ok := e.Trace.Failed(); !ok || failed.Name != check || e.Outcome != activity.Failure {
			s.T.Errorf("event %+v", e)
		}
		if doc := fmt.Sprintf("%+v", e); strings.Contains(doc, other) {
			s.T.Errorf("the event names the other account %s: %s", other, doc)
		}
	}
}

func TestARefusalStandsInTheLogOfEachAccountItWasAimedAt(t *testing.T) {
	s := start(t)
	k := s.issuer("https://shared.test")
	k.cluster(s.Owner.AccountID, "mine")
	k.cluster(s.Other.AccountID, "theirs")
	m := k.claims()
	m["aud"] = "vault"
	a := s.post(crForm(k.sign(m), "profile_name", "p"))
	a.wantError(400, grant.CodeUnsupported)
	s.refusedInBoth(a, attest.CheckAudience)
}

func TestWhoRegistersAnotherOnesIssuerWithKeysOfHisOwnGainsNothing(t *testing.T) {
	s := start(t)
	honest, thief := s.issuer("https://shared.test"), s.issuer("https://shared.test")
	p, q := s.profile(s.Owner.AccountID, "honest"), s.profile(s.Other.AccountID, "thief")
	s.link(p, honest.cluster(s.Owner.AccountID, "c"))
	s.link(q, thief.cluster(s.Other.AccountID, "c"))
	s.post(crForm(honest.token(), "profile_id", p.ID)).want(200)
	s.post(crForm(thief.token(), "profile_id", q.ID)).want(200)
	// Each account sees what failed there: no profile where the token is good, and
	// the signature where it is not.
	for profile, tt := range map[string]struct {
		token string
		fails [2]string // in the owner's account, and in the other one
	}{
		p.ID: {thief.token(), [2]string{attest.CheckSignature, grant.CheckProfile}},
		q.ID: {honest.token(), [2]string{grant.CheckProfile, attest.CheckSignature}},
	} {
		a := s.post(crForm(tt.token, "profile_id", profile))
		a.wantError(400, grant.CodeNotFound)
		events := s.events(a.header.Get("Transaction-Id"))
		if len(events) != 2 {
			t.Fatalf("%d events, want one in each account", len(events))
		}
		for n, other := range []string{s.Other.AccountID, s.Owner.AccountID} {
			if failed, _ := events[n].Trace.Failed(); failed.Name != tt.fails[n] {
				t.Errorf("the check %s failed, want %s", failed.Name, tt.fails[n])
			}
			if doc := fmt.Sprintf("%+v", events[n]); strings.Contains(doc, other) {
				t.Errorf("the event names the other account %s: %s", other, doc)
			}
		}
	}
}
