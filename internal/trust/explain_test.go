package trust_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// applied is the candidate after a change that an explanation has named. It is
// written from the meaning of the edits alone.
func applied(t interface{ Fatalf(string, ...any) }, c trust.Candidate, change *activity.Change) trust.Candidate {
	c.Links, c.Rules = slices.Clone(c.Links), slices.Clone(c.Rules)
	switch change.Do + " " + change.Kind {
	case "add link":
		l := &identity.Link{ID: "Link-new"}
		for _, e := range change.Edits {
			switch e.Attribute {
			case "cr_type":
				l.CRType = identity.CRType(e.To)
			case "link.crn":
				l.CRN = e.To
			case "link.namespace":
				l.Namespace = e.To
			case "link.name":
				l.ServiceAccount = e.To
			case "is_cross_account":
				l.CrossAccount = e.To == "true"
			default:
				t.Fatalf("a link has no attribute %s", e.Attribute)
			}
		}
		c.Links = append(c.Links, l)
	case "alter rule":
		i := slices.IndexFunc(c.Rules, func(r *identity.ClaimRule) bool { return r.ID == change.ID })
		if i < 0 {
			t.Fatalf("there is no rule %s", change.ID)
		}
		r := *c.Rules[i]
		var out []int
		r.Conditions = slices.Clone(r.Conditions)
		for _, e := range change.Edits {
			var n int
			switch {
			case e.Attribute == "type":
				r.Type = e.To
			case e.Attribute == "cr_type":
				r.CRType = identity.CRType(e.To)
			case e.Attribute == "realm_name":
				r.RealmName = e.To
			case strings.HasSuffix(e.Attribute, "].value"):
				if _, err := fmt.Sscanf(e.Attribute, "conditions[%d].value", &n); err != nil {
					t.Fatalf("%s: %v", e.Attribute, err)
				}
				if r.Conditions[n].Value != e.From {
					t.Fatalf("condition %d has the value %s, the edit says %s", n, r.Conditions[n].Value, e.From)
				}
				r.Conditions[n].Value = e.To
			default:
				if _, err := fmt.Sscanf(e.Attribute, "conditions[%d]", &n); err != nil || e.To != "" {
					t.Fatalf("edit %+v: %v", e, err)
				}
				out = append(out, n)
			}
		}
		for _, n := range slices.Backward(out) {
			r.Conditions = slices.Delete(r.Conditions, n, n+1)
		}
		c.Rules[i] = &r
	default:
		t.Fatalf("change %+v", change)
	}
	return c
}

// This is the promise of an explanation: what it says would have sufficed does.
func TestTheNamedChangeMakesTheSameEvidenceMatch(t *testing.T) {
	manyChecks(t, "50000")
	byLink, byRule, none := 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		ev := genEvidence.Draw(t, "evidence")
		c := drawCandidate(t, ev)
		for i, r := range c.Rules {
			r.ID = fmt.Sprint("ClaimRule-", i)
		}
		v := trust.Match(c, ev)
		if v.Matched {
			for _, check := range v.Explain() {
				if check.Nearest != nil || check.Change != nil {
					t.Fatalf("matched, and yet %+v", check)
				}
			}
			return
		}
		offered := false
		for _, check := range v.Explain() {
			if check.Change == nil {
				continue
			}
			offered = true
			if check.Change.Kind == activity.KindLink {
				byLink++
			} else {
				byRule++
			}
			if !trust.Match(applied(t, c, check.Change), ev).Matched {
				t.Fatalf("%+v does not help", check.Change)
			}
		}
		if !offered {
			none++
		}
		linkable := ev.Type != identity.OIDC && (!ev.Type.Kubernetes() || ev.Namespace != "" && ev.ServiceAccount != "")
		if linkable && !offered {
			t.Fatalf("a link to %+v would do, and none is named", ev)
		}
	})
	if !underRace && (byLink < 1000 || byRule < 1000 || none < 100) {
		t.Errorf("%d links, %d rules, %d times nothing: the cases prove little", byLink, byRule, none)
	}
	t.Logf("%d links, %d rules, %d times nothing", byLink, byRule, none)
}

func TestTheNamedChangeLetsTheSamePersonIn(t *testing.T) {
	manyChecks(t, "10000")
	named := 0
	rapid.Check(t, func(t *rapid.T) {
		u := trust.User{Realm: "https://idp", AccountID: home, Name: "ada", Claims: genEvidence.Draw(t, "claims").Claims}
		c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: near(t, home, genAccount, "account")}}
		for i := range genSmall.Draw(t, "rules") {
			r := drawRule(t, trust.Evidence{})
			r.ID, r.Type, r.RealmName = fmt.Sprint("ClaimRule-", i), near(t, identity.RuleSAML, genRuleType, "type"), near(t, u.Realm, genWord, "realm")
			c.Rules = append(c.Rules, r)
		}
		for _, check := range trust.MatchUser(c, u).Explain() {
			if check.Change == nil {
				continue
			}
			named++
			if !trust.MatchUser(applied(t, c, check.Change), u).Matched {
				t.Fatalf("%+v does not help", check.Change)
			}
		}
	})
	if !underRace && named < 500 {
		t.Errorf("%d changes: the cases prove little", named)
	}
}

func TestTheNearestDoesNotDependOnTheOrderOfLinksAndRules(t *testing.T) {
	manyChecks(t, "5000")
	rapid.Check(t, func(t *rapid.T) {
		ev := genEvidence.Draw(t, "evidence")
		c := drawCandidate(t, ev)
		for i, l := range c.Links {
			l.ID = fmt.Sprint("Link-", i)
		}
		for i, r := range c.Rules {
			r.ID = fmt.Sprint("ClaimRule-", i)
		}
		shuffled := c
		shuffled.Links = rapid.Permutation(c.Links).Draw(t, "links")
		shuffled.Rules = rapid.Permutation(c.Rules).Draw(t, "rules")
		a, b := trust.Match(c, ev), trust.Match(shuffled, ev)
		if a.Matched {
			return
		}
		x, y := a.Explain(), b.Explain()
		for i := range x {
			if (x[i].Nearest == nil) != (y[i].Nearest == nil) || x[i].Nearest != nil && x[i].Nearest.ID != y[i].Nearest.ID {
				t.Fatalf("nearest %+v, in another order %+v", x[i].Nearest, y[i].Nearest)
			}
		}
	})
}

func podOf(t *testing.T, namespace, account string) trust.Evidence {
	t.Helper()
	name, err := crn.Parse(clusterCRN)
	if err != nil {
		t.Fatal(err)
	}
	return trust.Evidence{
		Type: identity.IKSSA, CRN: name, AccountID: home, Namespace: namespace, ServiceAccount: account,
		Name: "prod:" + namespace + ":" + account + ":pod-1", Claims: map[string]any{"namespace": namespace, "name": account},
	}
}

func TestTheNearestLinkIsTheOneThatDiffersInTheFewestPoints(t *testing.T) {
	link := func(id, namespace, account string) *identity.Link {
		return &identity.Link{ID: id, CRType: identity.IKSSA, CRN: clusterCRN, Namespace: namespace, ServiceAccount: account}
	}
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}, Links: []*identity.Link{
		{ID: "Link-a", CRType: identity.VSI, CRN: clusterCRN}, // differs in the type alone, and is about something else
		link("Link-b", "other", "other"), link("Link-d", "shop", "other"), link("Link-c", "shop", "others"),
	}}
	trace := trust.Match(c, podOf(t, "shop", "cart")).Explain()
	n := trace[0].Nearest
	if n == nil || n.Kind != activity.KindLink || n.ID != "Link-c" || n.Of != 4 {
		t.Fatalf("nearest %+v", n)
	}
	if len(n.Differs) != 1 || n.Differs[0] != (activity.Difference{Attribute: "link.name", Wanted: "others", Found: "cart"}) {
		t.Errorf("it differs in %+v", n.Differs)
	}
	want := "tabard iam trusted-profile-link-create Profile-1 --cr-type IKS_SA --link-crn " + clusterCRN + " --link-namespace shop --link-name cart"
	if got := trace[0].Change.Command; got != want {
		t.Errorf("command %s", got)
	}
}

func TestARuleThatOneConditionKeptFromMatchingIsToldWithIt(t *testing.T) {
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}, Rules: []*identity.ClaimRule{{
		ID: "ClaimRule-1", ProfileID: "Profile-1", Name: "shop's", Type: identity.RuleCR, CRType: identity.IKSSA, Conditions: []identity.Condition{
			{Claim: "name", Operator: identity.Equals, Value: `"cart"`}, {Claim: "namespace", Operator: identity.In, Value: `["dev","it's"]`},
		},
	}}}
	check := trust.Match(c, podOf(t, "shop", "cart")).Explain()[1]
	if !strings.Contains(check.Wanted, `namespace IN ["dev","it's"]`) || check.Found != `"shop"` {
		t.Errorf("wanted %s, found %s", check.Wanted, check.Found)
	}
	if n := check.Nearest; n.ID != "ClaimRule-1" || n.Name != "shop's" || len(n.Differs) != 1 || n.Differs[0].Attribute != "namespace" {
		t.Errorf("nearest %+v", n)
	}
	want := activity.Edit{Attribute: "conditions[1].value", From: `["dev","it's"]`, To: `["dev","it's","shop"]`}
	if ch := check.Change; ch.ID != "ClaimRule-1" || len(ch.Edits) != 1 || ch.Edits[0] != want {
		t.Errorf("change %+v", ch)
	}
	command := `tabard iam trusted-profile-rule-update Profile-1 ClaimRule-1 --type Profile-CR --cr-type IKS_SA` +
		` --conditions 'claim:name,operator:EQUALS,value:"cart"' --conditions 'claim:namespace,operator:IN,value:["dev","it'\''s","shop"]'`
	if check.Change.Command != command {
		t.Errorf("command %s", check.Change.Command)
	}
}

func TestARuleThatNeedsTwoChangesSaysSo(t *testing.T) {
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}, Rules: []*identity.ClaimRule{{
		ID: "ClaimRule-1", Type: identity.RuleCR, CRType: identity.IKSSA, Conditions: []identity.Condition{
			{Claim: "name", Operator: identity.Equals, Value: `"a"`}, {Claim: "namespace", Operator: identity.NotEquals, Value: `"shop"`},
		},
	}}}
	check := trust.Match(c, podOf(t, "shop", "cart")).Explain()[1]
	if check.Change == nil || len(check.Change.Edits) != 2 || !strings.Contains(check.Hint, "no single change") {
		t.Errorf("%+v, %s", check.Change, check.Hint)
	}
}

// What would let a stranger's job in is for the account to think about, and not
// for a command to paste.
func TestNoConditionOfARuleAboutAForeignIssuerIsSuggestedAway(t *testing.T) {
	name, err := crn.Parse("crn:v1:bluemix:public:iam-identity::a/" + home + "::workload-issuer:x")
	if err != nil {
		t.Fatal(err)
	}
	ev := trust.Evidence{Type: identity.OIDC, CRN: name, AccountID: home, Claims: map[string]any{"issuer": "https://ci", "repository": "stranger/*"}}
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}, Rules: []*identity.ClaimRule{{
		ID: "ClaimRule-1", Type: identity.RuleCR, CRType: identity.OIDC, Conditions: []identity.Condition{
			{Claim: "issuer", Operator: identity.Equals, Value: `"https://ci"`}, {Claim: "environment", Operator: identity.Equals, Value: `"prod"`},
		},
	}}}
	for range 2 {
		for _, check := range trust.Match(c, ev).Explain() {
			if check.Change != nil {
				t.Errorf("%s: %+v", check.Name, check.Change)
			}
		}
		c.Rules[0].Conditions[1] = identity.Condition{Claim: "repository", Operator: identity.Equals, Value: `"mine/*"`}
	}
}

// Names come from whoever asked for the token: what they hold must not become a
// command of its own in the shell of the administrator who pastes the line.
func TestACommandKeepsHostileNamesInTheirWords(t *testing.T) {
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}}
	got := trust.Match(c, podOf(t, "$(reboot)", "a';reboot;'")).Explain()[0].Change
	if !strings.HasSuffix(got.Command, `--link-namespace '$(reboot)' --link-name 'a'\'';reboot;'\'''`) {
		t.Errorf("command %s", got.Command)
	}
	for _, hidden := range []string{"a\nreboot", "a\x1b[2J", "a\u202eb", "a\u200bb"} {
		if got := trust.Match(c, podOf(t, hidden, "a")).Explain()[0].Change; got.Command != "" {
			t.Errorf("command %q", got.Command)
		}
	}
}

func TestAnExplanationStaysSmallHoweverMuchTheProfileHolds(t *testing.T) {
	long := strings.Repeat("x", 2000)
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}}
	for i := range 200 {
		r := &identity.ClaimRule{ID: fmt.Sprint("ClaimRule-", i), Name: long, Type: identity.RuleCR, CRType: identity.IKSSA}
		for j := range 40 {
			r.Conditions = append(r.Conditions, identity.Condition{Claim: fmt.Sprint(long, j), Operator: identity.Equals, Value: `"` + long + `"`})
		}
		c.Rules = append(c.Rules, r)
		c.Links = append(c.Links, &identity.Link{ID: fmt.Sprint("Link-", i), CRType: identity.IKSSA, CRN: long, Namespace: long, ServiceAccount: long})
	}
	size := 0
	for _, check := range trust.Match(c, podOf(t, long, long)).Explain() {
		size += len(check.Wanted) + len(check.Found) + len(check.Hint)
		if n := check.Nearest; n != nil {
			size += len(n.ID) + len(n.Name)
			for _, d := range n.Differs {
				size += len(d.Attribute) + len(d.Wanted) + len(d.Found)
			}
		}
		if check.Change != nil {
			t.Errorf("a change of values that are too long: %+v", check.Change.Edits[0].Attribute)
		}
	}
	if size > 12<<10 {
		t.Errorf("%d bytes", size)
	}
}

func TestAMatchIsFoundWithoutWordsForTheLinksThatAreNotIt(t *testing.T) {
	if underRace {
		t.Skip("allocations are counted without the race detector")
	}
	candidate := func(n int) trust.Candidate {
		c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: home}}
		for i := range n {
			c.Rules = append(c.Rules, &identity.ClaimRule{ID: fmt.Sprint("ClaimRule-", i), Type: identity.RuleCR, CRType: identity.VSI})
		}
		c.Rules = append(c.Rules, &identity.ClaimRule{ID: "ClaimRule-x", Type: identity.RuleCR, CRType: identity.IKSSA,
			Conditions: []identity.Condition{{Claim: "namespace", Operator: identity.Equals, Value: `shop`}}})
		return c
	}
	ev := podOf(t, "shop", "cart")
	few, many := candidate(0), candidate(1000)
	a := testing.AllocsPerRun(20, func() { trust.Match(few, ev) })
	b := testing.AllocsPerRun(20, func() { trust.Match(many, ev) })
	if b > a {
		t.Errorf("%.0f allocations beside a thousand other rules, %.0f without", b, a)
	}
}
