package trust_test

import (
	"flag"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// cases is how many random cases the two implementations are compared on.
const cases = 100_000

// manyChecks makes rapid run as many checks as a property of the core deserves,
// unless the caller of the tests chose a number himself.
func manyChecks(t *testing.T, n string) {
	f := flag.Lookup("rapid.checks")
	chosen := f.Value.String()
	if chosen != f.DefValue {
		return
	}
	if underRace {
		n = strings.TrimSuffix(n, "0")
	}
	if err := flag.Set("rapid.checks", n); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set("rapid.checks", chosen) })
}

var (
	genType     = rapid.SampledFrom([]identity.CRType{identity.IKSSA, identity.IKSSA, identity.ROKSSA, identity.VSI, identity.OIDC})
	genAnyType  = rapid.SampledFrom([]identity.CRType{identity.IKSSA, identity.IKSSA, identity.IKSSA, identity.ROKSSA, identity.VSI, identity.VSI, identity.CE, identity.BMS, identity.OIDC, ""})
	genAccount  = rapid.SampledFrom([]string{home, home, home, away})
	genWord     = rapid.SampledFrom([]string{"a", "A", "b", "ab", "é", "É", "1", "true", ""})
	genName     = rapid.SampledFrom([]string{"a", "a", "a", "A", "b", ""})
	genOperator = rapid.SampledFrom([]identity.Operator{
		identity.Equals, identity.NotEquals, identity.EqualsIgnoreCase, identity.NotEqualsIgnoreCase,
		identity.Contains, identity.In, "OTHER",
	})
	genClaimName = rapid.SampledFrom([]string{"x", "x", "y", "y", "z", ""})
	genValue     = rapid.SampledFrom([]string{
		`"a"`, `"a"`, `"A"`, `"b"`, `"ab"`, `"É"`, `"1"`, `""`, `a`, `A`, ``, `1`, `1.0`, `true`, `null`, `{}`,
		`["a"]`, `["a","b"]`, `["A",1]`, `[true,null]`, `[]`, `[["a"]]`, `"a"]`, `1]`, `true}`, `"a" "b"`, ` "a" `, `"\u0061"`,
	})
	// The same resource under three cloud names, another one, and none.
	genLinkCRN = rapid.SampledFrom([]string{
		"crn:v1:bluemix:public:s:l:a/1:i:t:r", "crn:v1:bluemix:public:s:l:a/1:i:t:r", "crn:v1:staging:public:s:l:a/1:i:t:r",
		"crn:v1:bluemix:dedicated:s:l:a/1:i:t:r", "crn:v1:bluemix:public:s:l:a/1:j:t:r", "crn:v1:::s:l:a/1:i:t:r",
		"crn:v2:bluemix:public:s:l:a/1:i:t:r", "crn:v1:bluemix:public:s:l:a/1:i:t:r:r", "not a crn", "",
	})
	genEvidenceCRN = rapid.SampledFrom([]string{
		"crn:v1:bluemix:public:s:l:a/1:i:t:r", "crn:v1:bluemix:public:s:l:a/1:i:t:r", "crn:v1:staging:public:s:l:a/1:i:t:r",
		"crn:v1:bluemix:public:s:l:a/1:j:t:r", "crn:v1:bluemix:public:s:l:a/1:i:t:r:r",
	})
	genRuleType = rapid.SampledFrom([]string{identity.RuleCR, identity.RuleCR, identity.RuleCR, identity.RuleCR, identity.RuleSAML, ""})
	genSmall    = rapid.IntRange(0, 2)
	genClaimIs  = rapid.SampledFrom([]string{"absent", "text", "text", "list", "other"})
	genBool     = rapid.Bool()

	genEvidence = rapid.Custom(func(t *rapid.T) trust.Evidence {
		name, err := crn.Parse(genEvidenceCRN.Draw(t, "crn"))
		if err != nil {
			t.Fatal(err)
		}
		ev := trust.Evidence{
			Type: genType.Draw(t, "type"), CRN: name, AccountID: genAccount.Draw(t, "account"),
			Namespace: genName.Draw(t, "namespace"), ServiceAccount: genName.Draw(t, "service account"),
			Claims: map[string]any{},
		}
		for _, claim := range []string{"x", "y", "z"} {
			switch genClaimIs.Draw(t, claim) {
			case "text":
				ev.Claims[claim] = genWord.Draw(t, "text")
			case "list":
				ev.Claims[claim] = rapid.SliceOfN(genWord, 0, 3).Draw(t, "list")
			case "other":
				ev.Claims[claim] = 1
			}
		}
		return ev
	})
	genMostly = rapid.SampledFrom([]bool{true, true, true, true, true, false})
)

// near returns what the evidence says most of the time, so that matches are
// frequent, and else something that may differ.
func near[T any](t *rapid.T, same T, other *rapid.Generator[T], label string) T {
	if genMostly.Draw(t, label+" as proved") {
		return same
	}
	return other.Draw(t, label)
}

func drawLink(t *rapid.T, ev trust.Evidence) *identity.Link {
	return &identity.Link{
		ID: "Link-1", CRType: near(t, ev.Type, genAnyType, "type"), CRN: near(t, ev.CRN.String(), genLinkCRN, "crn"),
		Namespace: near(t, ev.Namespace, genName, "namespace"), ServiceAccount: near(t, ev.ServiceAccount, genName, "service account"),
		CrossAccount: genBool.Draw(t, "cross-account"),
	}
}

func drawRule(t *rapid.T, ev trust.Evidence) *identity.ClaimRule {
	r := &identity.ClaimRule{
		ID: "ClaimRule-1", Type: near(t, identity.RuleCR, genRuleType, "rule type"), CRType: near(t, ev.Type, genAnyType, "type"),
	}
	for range genSmall.Draw(t, "conditions") {
		r.Conditions = append(r.Conditions, identity.Condition{
			Claim: genClaimName.Draw(t, "claim"), Operator: genOperator.Draw(t, "operator"), Value: genValue.Draw(t, "value"),
		})
	}
	return r
}

func drawCandidate(t *rapid.T, ev trust.Evidence) trust.Candidate {
	c := trust.Candidate{Profile: &identity.Profile{ID: "Profile-1", AccountID: near(t, ev.AccountID, genAccount, "profile's account")}}
	for range genSmall.Draw(t, "links") {
		c.Links = append(c.Links, drawLink(t, ev))
	}
	for range genSmall.Draw(t, "rules") {
		c.Rules = append(c.Rules, drawRule(t, ev))
	}
	return c
}

func TestMatchAgreesWithASecondImplementationAndWithItsOwnTrace(t *testing.T) {
	manyChecks(t, "100000")
	var yes, byRule, no int
	rapid.Check(t, func(t *rapid.T) {
		ev := genEvidence.Draw(t, "evidence")
		c := drawCandidate(t, ev)
		v := trust.Match(c, ev)
		if want := matchByPredicates(c, ev); v.Matched != want {
			t.Fatalf("Match says %t, the reference %t", v.Matched, want)
		}
		switch {
		case !v.Matched:
			no++
		case v.Rule != nil:
			byRule++
			yes++
		default:
			yes++
		}
		checkTrace(t, v)
	})
	if total := yes + no; total >= cases/5 && (yes < total/20 || byRule < total/200 || no < total/20) {
		t.Errorf("%d matches (%d by a rule) and %d refusals: the cases prove little", yes, byRule, no)
	}
	t.Logf("%d matches (%d by a rule), %d refusals", yes, byRule, no)
}

// checkTrace demands that the explanation is the verdict in words: always the
// same two checks, none failed when something matched, both when nothing did.
func checkTrace(t *rapid.T, v trust.Verdict) {
	trace := v.Explain()
	if len(trace) != 2 || trace[0].Name != "profile-link" || trace[1].Name != "profile-rule" {
		t.Fatalf("trace %+v, want the checks profile-link and profile-rule", trace)
	}
	want := [2]activity.Outcome{activity.Fail, activity.Fail}
	switch {
	case v.Matched && v.Link != nil && v.Rule == nil:
		want = [2]activity.Outcome{activity.Pass, activity.Skip}
	case v.Matched && v.Rule != nil && v.Link == nil:
		want = [2]activity.Outcome{activity.Skip, activity.Pass}
	case v.Matched || v.Link != nil || v.Rule != nil:
		t.Fatalf("matched %t by link %v and rule %v", v.Matched, v.Link, v.Rule)
	}
	if got := [2]activity.Outcome{trace[0].Outcome, trace[1].Outcome}; got != want {
		t.Fatalf("outcomes %v, want %v", got, want)
	}
}

// The order in which links and rules are stored must not decide.
func TestMatchDoesNotDependOnTheOrderOfLinksAndRules(t *testing.T) {
	manyChecks(t, "5000")
	rapid.Check(t, func(t *rapid.T) {
		ev := genEvidence.Draw(t, "evidence")
		c := drawCandidate(t, ev)
		shuffled := trust.Candidate{
			Profile: c.Profile,
			Links:   rapid.Permutation(c.Links).Draw(t, "links"),
			Rules:   rapid.Permutation(c.Rules).Draw(t, "rules"),
		}
		if a, b := trust.Match(c, ev).Matched, trust.Match(shuffled, ev).Matched; a != b {
			t.Fatalf("matched %t, in another order %t", a, b)
		}
	})
}

// Trust grows with what is added to a profile and never shrinks.
func TestOneMoreLinkOrRuleNeverTakesTrustAway(t *testing.T) {
	manyChecks(t, "5000")
	rapid.Check(t, func(t *rapid.T) {
		ev := genEvidence.Draw(t, "evidence")
		c := drawCandidate(t, ev)
		before := trust.Match(c, ev).Matched
		c.Links = append(c.Links, drawLink(t, ev))
		c.Rules = append(c.Rules, drawRule(t, ev))
		if before && !trust.Match(c, ev).Matched {
			t.Fatal("the match is gone")
		}
	})
}
