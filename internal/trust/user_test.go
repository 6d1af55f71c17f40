package trust_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

const realm = "https://idp.test"

// userByPredicates is MatchUser a second time: some rule is of type
// Profile-SAML, has the user's realm, and all its conditions hold, of which
// there are some; and the profile is in the account of the provider.
func userByPredicates(c trust.Candidate, u trust.User) bool {
	found := 0
	for _, r := range c.Rules {
		held := 0
		for _, cond := range r.Conditions {
			if claim, proved := u.Claims[cond.Claim]; proved && conditionHolds(cond, claim) {
				held++
			}
		}
		if r.Type+"|"+r.RealmName == "Profile-SAML|"+u.Realm && u.Realm != "" && held == len(r.Conditions) && held > 0 && c.Profile.AccountID == u.AccountID {
			found++
		}
	}
	return found > 0
}

var genRealm = rapid.SampledFrom([]string{realm, realm, realm, realm + "/", "https://other.test", ""})

func drawUser(t *rapid.T) (trust.User, trust.Candidate) {
	ev := genEvidence.Draw(t, "evidence")
	u := trust.User{Realm: genRealm.Draw(t, "realm"), AccountID: ev.AccountID, Name: "Ada", Claims: ev.Claims}
	c := drawCandidate(t, ev)
	for _, r := range c.Rules {
		r.Type = near(t, identity.RuleSAML, genRuleType, "rule's type")
		r.RealmName = near(t, u.Realm, genRealm, "rule's realm")
	}
	return u, c
}

func TestMatchUserAgreesWithASecondImplementationAndWithItsOwnTrace(t *testing.T) {
	manyChecks(t, "50000")
	var yes, no int
	rapid.Check(t, func(t *rapid.T) {
		u, c := drawUser(t)
		v := trust.MatchUser(c, u)
		if want := userByPredicates(c, u); v.Matched != want {
			t.Fatalf("MatchUser says %t, the reference %t", v.Matched, want)
		}
		if v.Link != nil || v.Matched != (v.Rule != nil) {
			t.Fatalf("matched %t by link %v and rule %v", v.Matched, v.Link, v.Rule)
		}
		for _, r := range c.Rules {
			if want := len(r.Conditions) > 0 && userByPredicates(trust.Candidate{
				Profile: &identity.Profile{AccountID: u.AccountID},
				Rules:   []*identity.ClaimRule{{Type: "Profile-SAML", RealmName: "x", Conditions: r.Conditions}},
			}, trust.User{Realm: "x", AccountID: u.AccountID, Claims: u.Claims}); trust.HoldAll(r.Conditions, u.Claims) != want {
				t.Fatalf("HoldAll says %t of %+v", !want, r.Conditions)
			}
		}
		trace := v.Explain()
		want := activity.Fail
		if v.Matched {
			yes++
			want = activity.Pass
		} else {
			no++
		}
		if len(trace) != 2 || trace[0].Name != "profile-link" || trace[0].Outcome != activity.Skip || trace[1].Name != "profile-rule" || trace[1].Outcome != want {
			t.Fatalf("matched %t with the trace %+v", v.Matched, trace)
		}
		if !v.Matched && (trace[1].Hint == "" || strings.Contains(trace[1].Wanted+trace[1].Hint, "cr_type")) {
			t.Fatalf("trace %+v", trace)
		}
	})
	t.Logf("%d matches, %d refusals", yes, no)
	if total := yes + no; total >= 10_000 && (yes < total/50 || no < total/20) {
		t.Errorf("%d matches and %d refusals: the cases prove little", yes, no)
	}
}

func TestOneMoreRuleNeverTakesTrustInAUserAway(t *testing.T) {
	manyChecks(t, "5000")
	rapid.Check(t, func(t *rapid.T) {
		u, c := drawUser(t)
		before := trust.MatchUser(c, u).Matched
		_, more := drawUser(t)
		c.Rules = append(more.Rules, c.Rules...)
		if before && !trust.MatchUser(c, u).Matched {
			t.Fatal("the match is gone")
		}
	})
}

func TestWhatCoversComputeResourcesCoversNoUser(t *testing.T) {
	u := trust.User{Realm: realm, AccountID: home, Name: "Ada", Claims: map[string]any{"groups": []string{"ops"}}}
	good := func() *identity.ClaimRule {
		return &identity.ClaimRule{
			ID: "ClaimRule-1", Type: identity.RuleSAML, RealmName: realm,
			Conditions: []identity.Condition{{Claim: "groups", Operator: identity.Contains, Value: `"ops"`}},
		}
	}
	for name, tt := range map[string]struct {
		change func(*trust.Candidate, *trust.User)
		want   bool
		says   string
	}{
		"as it should be":          {func(*trust.Candidate, *trust.User) {}, true, ""},
		"a rule about resources":   {func(c *trust.Candidate, _ *trust.User) { c.Rules[0].Type = identity.RuleCR }, false, "type"},
		"another realm":            {func(c *trust.Candidate, _ *trust.User) { c.Rules[0].RealmName = realm + "/" }, false, "realm_name"},
		"no realm on either side":  {func(c *trust.Candidate, u *trust.User) { c.Rules[0].RealmName, u.Realm = "", "" }, false, "realm_name"},
		"a profile elsewhere":      {func(c *trust.Candidate, _ *trust.User) { c.Profile.AccountID = away }, false, "account"},
		"no conditions":            {func(c *trust.Candidate, _ *trust.User) { c.Rules[0].Conditions = nil }, false, "conditions"},
		"a claim that is missing":  {func(_ *trust.Candidate, u *trust.User) { u.Claims = nil }, false, "groups"},
		"a claim of another value": {func(_ *trust.Candidate, u *trust.User) { u.Claims["groups"] = []string{"dev"} }, false, "groups"},
		"no rule but a link": {func(c *trust.Candidate, _ *trust.User) {
			c.Rules, c.Links = nil, []*identity.Link{{ID: "Link-1", CRType: identity.VSI}}
		}, false, "no claim rule"},
	} {
		c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}, Rules: []*identity.ClaimRule{good()}}
		person := u
		person.Claims = map[string]any{"groups": u.Claims["groups"]}
		tt.change(&c, &person)
		v := trust.MatchUser(c, person)
		if v.Matched != tt.want {
			t.Errorf("%s: %t", name, v.Matched)
		}
		failed, _ := v.Explain().Failed()
		if !strings.Contains(failed.Wanted+failed.Found+failed.Hint, tt.says) {
			t.Errorf("%s: failed check %+v does not name %s", name, failed, tt.says)
		}
	}
}
