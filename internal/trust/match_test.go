package trust_test

import (
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

const (
	home       = "4f1e0c0000000000000000000000aaaa"
	away       = "4f1e0c0000000000000000000000bbbb"
	clusterCRN = "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + home + ":c0ffee::"
	serverCRN  = "crn:v1:bluemix:public:is:us-south-1:a/" + home + "::instance:0717_1"
)

func TestHoldsFollowsTheOperatorTable(t *testing.T) {
	list := []string{"Alpha", "beta"}
	for _, tt := range []struct {
		name     string
		operator identity.Operator
		value    string
		claim    any
		want     bool
	}{
		{"EQUALS compares texts", identity.Equals, `"alpha"`, "alpha", true},
		{"EQUALS minds the case", identity.Equals, `"Alpha"`, "alpha", false},
		{"EQUALS is not a prefix comparison", identity.Equals, `"alph"`, "alpha", false},
		{"EQUALS keeps spaces", identity.Equals, `"alpha "`, "alpha", false},
		{"EQUALS on a list asks for some element", identity.Equals, `"beta"`, list, true},
		{"EQUALS on a list minds the case", identity.Equals, `"alpha"`, list, false},
		{"EQUALS on an empty list is false", identity.Equals, `"alpha"`, []string{}, false},
		{"EQUALS takes text that is not JSON as it stands", identity.Equals, `alpha`, "alpha", true},
		{"EQUALS takes a CRN that is not quoted", identity.Equals, clusterCRN, clusterCRN, true},
		{"EQUALS turns a number into its text", identity.Equals, `12`, "12", true},
		{"EQUALS keeps a number as it was written", identity.Equals, `1.50`, "1.50", true},
		{"EQUALS keeps all digits of a long number", identity.Equals, `12345678901234567890`, "12345678901234567890", true},
		{"EQUALS turns a boolean into its text", identity.Equals, `true`, "true", true},
		{"EQUALS tells true from false", identity.Equals, `true`, "false", false},
		{"EQUALS with a JSON null never holds", identity.Equals, `null`, "null", false},
		{"EQUALS with a JSON object never holds", identity.Equals, `{"a":1}`, `{"a":1}`, false},
		{"EQUALS does not take a list of values", identity.Equals, `["alpha","beta"]`, "alpha", false},
		{"EQUALS takes JSON with something after it as plain text", identity.Equals, `"alpha" x`, `"alpha" x`, true},
		{"EQUALS does not drop what follows a JSON text", identity.Equals, `"alpha"x`, "alpha", false},
		{"EQUALS does not drop a bracket after a JSON value", identity.Equals, `"alpha"]`, "alpha", false},
		{"EQUALS does not drop a brace after a JSON value", identity.Equals, `true}`, "true", false},
		{"EQUALS takes a bracketed name as plain text", identity.Equals, `12]`, "12]", true},
		{"EQUALS reads escapes in a JSON text", identity.Equals, `"a\u002db"`, "a-b", true},
		{"EQUALS with an empty text finds an empty claim", identity.Equals, `""`, "", true},
		{"EQUALS with no value finds an empty claim", identity.Equals, ``, "", true},
		{"EQUALS with an empty text finds nothing else", identity.Equals, `""`, "alpha", false},

		{"NOT_EQUALS holds for another text", identity.NotEquals, `"beta"`, "alpha", true},
		{"NOT_EQUALS fails for the same text", identity.NotEquals, `"alpha"`, "alpha", false},
		{"NOT_EQUALS minds the case", identity.NotEquals, `"Alpha"`, "alpha", true},
		{"NOT_EQUALS on a list demands that no element is equal", identity.NotEquals, `"beta"`, list, false},
		{"NOT_EQUALS on a list without the value holds", identity.NotEquals, `"gamma"`, list, true},
		{"NOT_EQUALS on an empty list is false", identity.NotEquals, `"gamma"`, []string{}, false},
		{"NOT_EQUALS with a list of values never holds", identity.NotEquals, `["x","y"]`, "alpha", false},
		{"NOT_EQUALS with a JSON null never holds", identity.NotEquals, `null`, "alpha", false},
		{"NOT_EQUALS with a list of objects never holds", identity.NotEquals, `[{}]`, "alpha", false},
		{"NOT_EQUALS compares a number by its text", identity.NotEquals, `12`, "12", false},

		{"EQUALS_IGNORE_CASE ignores the case", identity.EqualsIgnoreCase, `"ALPHA"`, "alpha", true},
		{"EQUALS_IGNORE_CASE still compares", identity.EqualsIgnoreCase, `"ALPHA"`, "beta", false},
		{"EQUALS_IGNORE_CASE on a list asks for some element", identity.EqualsIgnoreCase, `"BETA"`, list, true},
		{"EQUALS_IGNORE_CASE does not take a list of values", identity.EqualsIgnoreCase, `["alpha","beta"]`, "alpha", false},
		{"EQUALS_IGNORE_CASE ignores the case outside of ASCII", identity.EqualsIgnoreCase, `"ÉTÉ"`, "été", true},
		{"EQUALS_IGNORE_CASE takes a boolean", identity.EqualsIgnoreCase, `true`, "TRUE", true},
		{"NOT_EQUALS_IGNORE_CASE ignores the case", identity.NotEqualsIgnoreCase, `"ALPHA"`, "alpha", false},
		{"NOT_EQUALS_IGNORE_CASE holds for another text", identity.NotEqualsIgnoreCase, `"BETA"`, "alpha", true},
		{"NOT_EQUALS_IGNORE_CASE on a list demands that no element is equal", identity.NotEqualsIgnoreCase, `"BETA"`, list, false},
		{"NOT_EQUALS_IGNORE_CASE does not take a list of values", identity.NotEqualsIgnoreCase, `["x","y"]`, "alpha", false},

		{"CONTAINS on a text asks for a substring", identity.Contains, `"lph"`, "alpha", true},
		{"CONTAINS on a text takes the whole", identity.Contains, `"alpha"`, "alpha", true},
		{"CONTAINS on a text minds the case", identity.Contains, `"LPH"`, "alpha", false},
		{"CONTAINS on a text is not the other way round", identity.Contains, `"alphabet"`, "alpha", false},
		{"CONTAINS with an empty text finds no text", identity.Contains, `""`, "alpha", false},
		{"CONTAINS without a value finds no text", identity.Contains, ``, "alpha", false},
		{"CONTAINS on a list asks for an equal element", identity.Contains, `"beta"`, list, true},
		{"CONTAINS on a list does not look inside elements", identity.Contains, `"bet"`, list, false},
		{"CONTAINS on a list minds the case", identity.Contains, `"BETA"`, list, false},
		{"CONTAINS does not take a list of values", identity.Contains, `["alpha","beta"]`, "alpha", false},
		{"CONTAINS looks for a number's text", identity.Contains, `12`, "a12b", true},

		{"IN asks for equality with some value", identity.In, `["x","alpha"]`, "alpha", true},
		{"IN fails outside of the list", identity.In, `["x","y"]`, "alpha", false},
		{"IN minds the case", identity.In, `["ALPHA"]`, "alpha", false},
		{"IN is not a substring search", identity.In, `["alphabet"]`, "alpha", false},
		{"IN with an empty list is false", identity.In, `[]`, "alpha", false},
		{"IN takes a single value as a list of one", identity.In, `"alpha"`, "alpha", true},
		{"IN on a list asks for some pair", identity.In, `["x","beta"]`, list, true},
		{"IN on a list without a pair is false", identity.In, `["x","y"]`, list, false},
		{"IN turns numbers and booleans into texts", identity.In, `[1,true]`, "true", true},
		{"IN with a null among its values never holds", identity.In, `["alpha",null]`, "alpha", false},
		{"IN with a list in its list never holds", identity.In, `[["alpha"]]`, "alpha", false},
		{"IN with a broken list takes it as one text", identity.In, `["alpha"`, "alpha", false},
		{"IN does not drop what follows its list", identity.In, `["alpha"]]`, "alpha", false},

		{"an unknown operator never holds", "MATCHES", `"alpha"`, "alpha", false},
		{"an empty operator never holds", "", `"alpha"`, "alpha", false},
		{"an operator in lower case never holds", "equals", `"alpha"`, "alpha", false},

		{"a number is not a claim value", identity.Equals, `1`, 1, false},
		{"a boolean is not a claim value", identity.NotEquals, `"x"`, true, false},
		{"a list of any is not a claim value", identity.NotEquals, `"x"`, []any{"a"}, false},
		{"nil is not a claim value", identity.NotEquals, `"x"`, nil, false},
		{"a nil list is not a claim value", identity.NotEquals, `"x"`, []string(nil), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := trust.Holds(identity.Condition{Claim: "c", Operator: tt.operator, Value: tt.value}, tt.claim)
			if got != tt.want {
				t.Errorf("%s %s on %#v = %t, want %t", tt.operator, tt.value, tt.claim, got, tt.want)
			}
		})
	}
}

func pod(change ...func(*trust.Evidence)) trust.Evidence {
	ev := trust.Evidence{
		Type: identity.IKSSA, CRN: mustCRN(clusterCRN), AccountID: home,
		Namespace: "apps", ServiceAccount: "lister", Name: "my-cluster:apps:lister:pod-1",
		Claims: map[string]any{
			"crn": clusterCRN, "service_instance": "c0ffee", "location": "us-south",
			"namespace": "apps", "name": "lister", "pod": "pod-1",
		},
	}
	for _, c := range change {
		c(&ev)
	}
	return ev
}

func server(change ...func(*trust.Evidence)) trust.Evidence {
	ev := trust.Evidence{
		Type: identity.VSI, CRN: mustCRN(serverCRN), AccountID: home, Name: "my-instance",
		Claims: map[string]any{
			"crn": serverCRN, "resource": "0717_1", "zone": "us-south-1", "subnet_id": []string{"sub-1", "sub-2"},
		},
	}
	for _, c := range change {
		c(&ev)
	}
	return ev
}

func mustCRN(s string) crn.CRN {
	c, err := crn.Parse(s)
	if err != nil {
		panic(err)
	}
	return c
}

func podLink(change ...func(*identity.Link)) *identity.Link {
	l := &identity.Link{ID: "Link-1", ProfileID: "Profile-1", AccountID: home, CRType: identity.IKSSA, CRN: clusterCRN, Namespace: "apps", ServiceAccount: "lister"}
	for _, c := range change {
		c(l)
	}
	return l
}

func serverLink(change ...func(*identity.Link)) *identity.Link {
	l := &identity.Link{ID: "Link-1", ProfileID: "Profile-1", AccountID: home, CRType: identity.VSI, CRN: serverCRN}
	for _, c := range change {
		c(l)
	}
	return l
}

func rule(typ identity.CRType, conditions ...identity.Condition) *identity.ClaimRule {
	return &identity.ClaimRule{ID: "ClaimRule-1", ProfileID: "Profile-1", AccountID: home, Type: identity.RuleCR, CRType: typ, Conditions: conditions}
}

func equals(claim, value string) identity.Condition {
	return identity.Condition{Claim: claim, Operator: identity.Equals, Value: `"` + value + `"`}
}

func profile() *identity.Profile {
	return &identity.Profile{ID: "Profile-1", AccountID: home, Name: "my-profile"}
}

func TestALinkMatchesOnlyTheComputeResourceItNames(t *testing.T) {
	for _, tt := range []struct {
		name string
		link *identity.Link
		ev   trust.Evidence
		want bool
	}{
		{"pod of the linked service account", podLink(), pod(), true},
		{"another service account", podLink(func(l *identity.Link) { l.ServiceAccount = "other" }), pod(), false},
		{"service account in another case", podLink(func(l *identity.Link) { l.ServiceAccount = "Lister" }), pod(), false},
		{"another namespace", podLink(func(l *identity.Link) { l.Namespace = "other" }), pod(), false},
		{"another cluster", podLink(func(l *identity.Link) { l.CRN = strings.Replace(clusterCRN, "c0ffee", "decaf", 1) }), pod(), false},
		{"the cluster in another location", podLink(func(l *identity.Link) { l.CRN = strings.Replace(clusterCRN, "us-south", "eu-de", 1) }), pod(), false},
		{"a link without a namespace", podLink(func(l *identity.Link) { l.Namespace = "" }), pod(), false},
		{"a link without a service account", podLink(func(l *identity.Link) { l.ServiceAccount = "" }), pod(), false},
		{
			"a link and evidence that both lack the namespace",
			podLink(func(l *identity.Link) { l.Namespace = "" }), pod(func(e *trust.Evidence) { e.Namespace = "" }), false,
		},
		{
			"a link and evidence that both lack the service account",
			podLink(func(l *identity.Link) { l.ServiceAccount = "" }), pod(func(e *trust.Evidence) { e.ServiceAccount = "" }), false,
		},
		{"ROKS_SA link and IKS_SA evidence", podLink(func(l *identity.Link) { l.CRType = identity.ROKSSA }), pod(), false},
		{"IKS_SA link and ROKS_SA evidence", podLink(), pod(func(e *trust.Evidence) { e.Type = identity.ROKSSA }), false},
		{
			"ROKS_SA link and evidence",
			podLink(func(l *identity.Link) { l.CRType = identity.ROKSSA }), pod(func(e *trust.Evidence) { e.Type = identity.ROKSSA }), true,
		},
		{"VSI link on the cluster's CRN", podLink(func(l *identity.Link) { l.CRType = identity.VSI }), pod(), false},
		{"a link of no type", podLink(func(l *identity.Link) { l.CRType = "" }), pod(), false},
		{"the cname of another cloud", podLink(func(l *identity.Link) { l.CRN = strings.Replace(clusterCRN, "bluemix", "staging", 1) }), pod(), true},
		{"the ctype of another cloud", podLink(func(l *identity.Link) { l.CRN = strings.Replace(clusterCRN, "public", "dedicated", 1) }), pod(), true},
		{"a CRN that is cut short", podLink(func(l *identity.Link) { l.CRN = strings.TrimSuffix(clusterCRN, "::") }), pod(), false},
		{"an empty CRN", podLink(func(l *identity.Link) { l.CRN = "" }), pod(), false},
		{"a CRN with a space at its end", podLink(func(l *identity.Link) { l.CRN += " " }), pod(), false},
		{"a CRN in upper case", podLink(func(l *identity.Link) { l.CRN = strings.ToUpper(clusterCRN) }), pod(), false},

		{"the linked server", serverLink(), server(), true},
		{"another server", serverLink(func(l *identity.Link) { l.CRN += "2" }), server(), false},
		{"a server whose link has a namespace nobody asked for", serverLink(func(l *identity.Link) { l.Namespace = "apps" }), server(), true},
		{"BMS link and VSI evidence", serverLink(func(l *identity.Link) { l.CRType = identity.BMS }), server(), false},
		{"PVS link and VSI evidence", serverLink(func(l *identity.Link) { l.CRType = identity.PVS }), server(), false},
		{"CE link and VSI evidence", serverLink(func(l *identity.Link) { l.CRType = identity.CE }), server(), false},
		{"the stage's own name for the server", serverLink(func(l *identity.Link) { l.CRN = strings.Replace(serverCRN, "bluemix", "staging", 1) }), server(), true},

		{"a resource of another account", serverLink(), server(func(e *trust.Evidence) { e.AccountID = away }), false},
		{
			"a resource of another account through a cross-account link",
			serverLink(func(l *identity.Link) { l.CrossAccount = true }), server(func(e *trust.Evidence) { e.AccountID = away }), true,
		},
		{
			"a cross-account link is no wider in other points",
			podLink(func(l *identity.Link) { l.CrossAccount = true }),
			pod(func(e *trust.Evidence) { e.AccountID, e.Namespace = away, "other" }), false,
		},
		{"a cross-account link within the account", serverLink(func(l *identity.Link) { l.CrossAccount = true }), server(), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := trust.Match(trust.Candidate{Profile: profile(), Links: []*identity.Link{tt.link}}, tt.ev)
			if v.Matched != tt.want {
				t.Errorf("matched = %t, want %t; trace %+v", v.Matched, tt.want, v.Explain())
			}
			if tt.want && (v.Link != tt.link || v.Rule != nil) {
				t.Errorf("the verdict names link %v and rule %v", v.Link, v.Rule)
			}
		})
	}
}

func TestARuleMatchesOnlyWhenAllItsConditionsHold(t *testing.T) {
	for _, tt := range []struct {
		name string
		rule *identity.ClaimRule
		ev   trust.Evidence
		want bool
	}{
		{"one condition that holds", rule(identity.IKSSA, equals("namespace", "apps")), pod(), true},
		{"two conditions that hold", rule(identity.IKSSA, equals("namespace", "apps"), equals("name", "lister")), pod(), true},
		{"the second does not hold", rule(identity.IKSSA, equals("namespace", "apps"), equals("name", "other")), pod(), false},
		{"the first does not hold", rule(identity.IKSSA, equals("namespace", "other"), equals("name", "lister")), pod(), false},
		{"no condition", rule(identity.IKSSA), pod(), false},
		{"a claim that was not proved", rule(identity.IKSSA, equals("resource_group_name", "default")), pod(), false},
		{
			"a negative condition on a claim that was not proved",
			rule(identity.IKSSA, identity.Condition{Claim: "resource_group_name", Operator: identity.NotEquals, Value: `"default"`}), pod(), false,
		},
		{
			"an empty value for a claim that was not proved",
			rule(identity.IKSSA, equals("resource_group_name", "")), pod(), false,
		},
		{"a claim's name in another case", rule(identity.IKSSA, equals("Namespace", "apps")), pod(), false},
		{"a claim without a name", rule(identity.IKSSA, equals("", "apps")), pod(), false},
		{"the wrong compute resource type", rule(identity.ROKSSA, equals("namespace", "apps")), pod(), false},
		{"no compute resource type", rule("", equals("namespace", "apps")), pod(), false},
		{"a list claim", rule(identity.VSI, equals("subnet_id", "sub-2")), server(), true},
		{"a list claim without the element", rule(identity.VSI, equals("subnet_id", "sub-3")), server(), false},
		{"a resource of another account", rule(identity.VSI, equals("zone", "us-south-1")), server(func(e *trust.Evidence) { e.AccountID = away }), false},
		{"no claims at all", rule(identity.VSI, equals("zone", "us-south-1")), server(func(e *trust.Evidence) { e.Claims = nil }), false},
		{
			"a rule about federated users",
			func() *identity.ClaimRule {
				r := rule(identity.IKSSA, equals("namespace", "apps"))
				r.Type = identity.RuleSAML
				return r
			}(), pod(), false,
		},
		{
			"a rule of no type",
			func() *identity.ClaimRule {
				r := rule(identity.IKSSA, equals("namespace", "apps"))
				r.Type = ""
				return r
			}(), pod(), false,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := trust.Match(trust.Candidate{Profile: profile(), Rules: []*identity.ClaimRule{tt.rule}}, tt.ev)
			if v.Matched != tt.want {
				t.Errorf("matched = %t, want %t; trace %+v", v.Matched, tt.want, v.Explain())
			}
			if tt.want && (v.Rule != tt.rule || v.Link != nil) {
				t.Errorf("the verdict names link %v and rule %v", v.Link, v.Rule)
			}
		})
	}
}

func TestAProfileWithoutLinksAndRulesTrustsNothing(t *testing.T) {
	for _, ev := range []trust.Evidence{pod(), server(), {}} {
		if v := trust.Match(trust.Candidate{Profile: profile()}, ev); v.Matched {
			t.Errorf("%s put on a profile that trusts nothing", ev.Name)
		}
	}
}

func TestAnyLinkOrRuleIsEnough(t *testing.T) {
	wrongLink := podLink(func(l *identity.Link) { l.Namespace = "other" })
	wrongRule := rule(identity.IKSSA, equals("namespace", "other"))
	goodRule := rule(identity.IKSSA, equals("namespace", "apps"))
	goodRule.ID = "ClaimRule-2"
	v := trust.Match(trust.Candidate{
		Profile: profile(), Links: []*identity.Link{wrongLink}, Rules: []*identity.ClaimRule{wrongRule, goodRule},
	}, pod())
	if !v.Matched || v.Rule != goodRule {
		t.Fatalf("verdict %+v, want a match by %s", v, goodRule.ID)
	}
	want := []activity.Outcome{activity.Skip, activity.Pass}
	if got := outcomes(v.Explain()); !slices.Equal(got, want) {
		t.Errorf("outcomes %v, want %v", got, want)
	}
}

func TestTheTraceOfARefusalNamesTheNearestLinkAndWhatIsWrongWithIt(t *testing.T) {
	far := podLink(func(l *identity.Link) { l.ID, l.CRN, l.Namespace = "Link-far", "", "other" })
	near := podLink(func(l *identity.Link) { l.ID, l.Namespace = "Link-near", "other" })
	trace := trust.Match(trust.Candidate{Profile: profile(), Links: []*identity.Link{far, near}}, pod()).Explain()
	c := trace[0]
	if c.Outcome != activity.Fail || !strings.Contains(c.Hint, "Link-near") || !strings.Contains(c.Hint, "link.namespace") {
		t.Errorf("check %+v does not name the nearest link and its namespace", c)
	}
	if !strings.Contains(c.Wanted, "other") || c.Found != "apps" {
		t.Errorf("wanted %q, found %q; want the two namespaces", c.Wanted, c.Found)
	}
}

func TestTheTraceOfARefusalNamesTheNearestRuleAndItsCondition(t *testing.T) {
	far := rule(identity.ROKSSA, equals("namespace", "other"))
	far.ID = "ClaimRule-far"
	near := rule(identity.IKSSA, equals("namespace", "apps"), equals("pod", "pod-2"))
	near.ID = "ClaimRule-near"
	trace := trust.Match(trust.Candidate{Profile: profile(), Rules: []*identity.ClaimRule{far, near}}, pod()).Explain()
	c := trace[1]
	if c.Outcome != activity.Fail || !strings.Contains(c.Hint, "ClaimRule-near") || !strings.Contains(c.Hint, "pod") {
		t.Errorf("check %+v does not name the nearest rule and its condition", c)
	}
	if !strings.Contains(c.Wanted, "pod-2") || !strings.Contains(c.Found, "pod-1") {
		t.Errorf("wanted %q, found %q; want the two pods", c.Wanted, c.Found)
	}
}

func TestTheTraceSaysWhenAClaimWasNotProved(t *testing.T) {
	r := rule(identity.IKSSA, equals("resource_group_name", "default"))
	trace := trust.Match(trust.Candidate{Profile: profile(), Rules: []*identity.ClaimRule{r}}, pod()).Explain()
	if c := trace[1]; c.Found != "(claim not proved)" {
		t.Errorf("found %q", c.Found)
	}
}

func TestAHostileClaimDoesNotSwellTheTrace(t *testing.T) {
	huge := strings.Repeat("x", 1<<20)
	ev := pod(func(e *trust.Evidence) { e.Claims["pod"], e.Name = huge, huge })
	trace := trust.Match(trust.Candidate{Profile: profile(), Rules: []*identity.ClaimRule{rule(identity.IKSSA, equals("pod", "p"))}}, ev).Explain()
	for _, c := range trace {
		if len(c.Wanted)+len(c.Found)+len(c.Hint) > 4096 {
			t.Errorf("check %s has %d bytes", c.Name, len(c.Wanted)+len(c.Found)+len(c.Hint))
		}
	}
}

func outcomes(trace activity.Trace) []activity.Outcome {
	out := make([]activity.Outcome, len(trace))
	for i, c := range trace {
		out[i] = c.Outcome
	}
	return out
}
