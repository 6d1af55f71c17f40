// Package trust answers one question: may this evidence put on this profile?
// Match is a pure function over the profile, its links, its claim rules and
// what a verifier proved; the verdict carries everything needed to explain it.
// How evidence is proved is the business of package attest.
package trust

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
)

// Evidence is what a registered verifier proved about a compute resource.
// Nothing in it comes from the workload's own word.
type Evidence struct {
	Type           identity.CRType
	CRN            crn.CRN // of the cluster or the instance
	AccountID      string  // owner of the cluster or the instance
	Namespace      string  // Kubernetes only
	ServiceAccount string  // Kubernetes only

	// Name identifies the workload to a person: <cluster>:<namespace>:<service
	// account>:<pod>, or the instance's name.
	Name string

	// Claims are the attributes that rules compare, by the names of
	// reference/iam-identity.md section 6.3. A value is a string or a []string.
	Claims map[string]any
}

// AuthnID is the compute resource's IAM ID, which stands in the token and in
// the activity log as who put the profile on.
func (e Evidence) AuthnID() string { return crn.IAMIDOfCRN(e.CRN.String()) }

// Candidate is a profile with all that can make it trust something.
type Candidate struct {
	Profile *identity.Profile
	Links   []*identity.Link
	Rules   []*identity.ClaimRule
}

// Verdict is the answer of [Match]. When nothing matched, the nearest link and
// rule are those that agreed with the evidence in the most points.
type Verdict struct {
	Matched bool
	Link    *identity.Link      // what matched, or
	Rule    *identity.ClaimRule // what matched

	evidence    Evidence
	user        bool // the evidence is about a person, whom no link can name
	candidate   Candidate
	nearestLink *identity.Link
	linkDiff    difference
	nearestRule *identity.ClaimRule
	ruleDiff    difference
}

// difference is where a link or rule and the evidence disagree, and in how many
// points they agree.
type difference struct {
	agreed        int
	points        []string // of disagreement
	wanted, found string   // at the first of them
}

// Match decides whether the evidence may put on the profile. A link or a rule
// of the evidence's own compute resource type is needed, and one is enough
// (reference/iam-identity.md section 6.1). The profile must live in the
// resource's account, except through a link that says it is cross-account.
// Nothing matched means no.
func Match(c Candidate, ev Evidence) Verdict {
	v := Verdict{evidence: ev, candidate: c}
	for _, l := range c.Links {
		d := compareLink(c.Profile, l, ev)
		if len(d.points) == 0 {
			v.Matched, v.Link = true, l
			return v
		}
		if v.nearestLink == nil || d.agreed > v.linkDiff.agreed {
			v.nearestLink, v.linkDiff = l, d
		}
	}
	for _, r := range c.Rules {
		d := compareRule(c.Profile, r, ev)
		if len(d.points) == 0 {
			v.Matched, v.Rule = true, r
			return v
		}
		if v.nearestRule == nil || d.agreed > v.ruleDiff.agreed {
			v.nearestRule, v.ruleDiff = r, d
		}
	}
	return v
}

// User is what an account's identity provider proved about a person.
type User struct {
	Realm     string // the issuer
	AccountID string // that registered the issuer
	Name      string
	Claims    map[string]any // string or []string
}

// MatchUser decides whether a federated user may put on the profile: through a
// rule of type Profile-SAML whose realm is the user's issuer and whose
// conditions all hold. The profile must live in the account that registered
// the issuer.
func MatchUser(c Candidate, u User) Verdict {
	v := Verdict{evidence: Evidence{Name: u.Name}, user: true, candidate: c}
	for _, r := range c.Rules {
		d := compareUser(c.Profile, r, u)
		if len(d.points) == 0 {
			v.Matched, v.Rule = true, r
			return v
		}
		if v.nearestRule == nil || d.agreed > v.ruleDiff.agreed {
			v.nearestRule, v.ruleDiff = r, d
		}
	}
	return v
}

func compareUser(p *identity.Profile, r *identity.ClaimRule, u User) difference {
	var d difference
	d.compare("type", identity.RuleSAML, r.Type, r.Type == identity.RuleSAML)
	d.compare("realm_name", r.RealmName, u.Realm, r.RealmName != "" && r.RealmName == u.Realm)
	d.compare("account", p.AccountID, u.AccountID, p.AccountID == u.AccountID)
	d.compareAll(r.Conditions, u.Claims)
	return d
}

// HoldAll reports whether there are conditions and all are true of the claims.
func HoldAll(conditions []identity.Condition, claims map[string]any) bool {
	var d difference
	d.compareAll(conditions, claims)
	return len(d.points) == 0
}

func compareLink(p *identity.Profile, l *identity.Link, ev Evidence) difference {
	var d difference
	d.compare("cr_type", string(l.CRType), string(ev.Type), l.CRType == ev.Type)
	linked, err := crn.Parse(l.CRN)
	d.compare("link.crn", l.CRN, ev.CRN.String(), err == nil && linked.Same(ev.CRN))
	if l.CRType.Kubernetes() {
		d.compare("link.namespace", l.Namespace, ev.Namespace, l.Namespace != "" && l.Namespace == ev.Namespace)
		d.compare("link.name", l.ServiceAccount, ev.ServiceAccount, l.ServiceAccount != "" && l.ServiceAccount == ev.ServiceAccount)
	}
	if l.CRType == identity.OIDC {
		// An issuer's CRN covers everybody who gets tokens there.
		d.compare("cr_type", "a type that links can name", string(l.CRType), false)
	}
	if l.CRType == identity.CE {
		// No verifier proves components yet; a link to one covers nothing else.
		d.compare("link.component_name", l.ComponentName, "(not proved)", false)
	}
	d.compare("account", p.AccountID, ev.AccountID, l.CrossAccount || p.AccountID == ev.AccountID)
	return d
}

func compareRule(p *identity.Profile, r *identity.ClaimRule, ev Evidence) difference {
	var d difference
	d.compare("type", identity.RuleCR, r.Type, r.Type == identity.RuleCR)
	d.compare("cr_type", string(r.CRType), string(ev.Type), r.CRType == ev.Type)
	d.compare("account", p.AccountID, ev.AccountID, p.AccountID == ev.AccountID)
	d.compareAll(r.Conditions, ev.Claims)
	return d
}

func (d *difference) compareAll(conditions []identity.Condition, claims map[string]any) {
	d.compare("conditions", "at least one", strconv.Itoa(len(conditions)), len(conditions) > 0)
	for _, c := range conditions {
		claim, present := claims[c.Claim]
		d.compare(c.Claim, string(c.Operator)+" "+c.Value, show(claim, present), present && Holds(c, claim))
	}
}

func (d *difference) compare(point, wanted, found string, ok bool) {
	if ok {
		d.agreed++
		return
	}
	if len(d.points) == 0 {
		d.wanted, d.found = wanted, found
	}
	d.points = append(d.points, point)
}

// Holds reports whether a condition is true of a claim that is present
// (reference/iam-identity.md section 6.2). An absent claim meets no condition,
// a negative one neither: what was not proved counts for nothing.
//
// On a list, EQUALS, EQUALS_IGNORE_CASE, IN and CONTAINS ask for some element;
// the negative operators demand that no element is equal. On a text, CONTAINS
// asks for a substring.
func Holds(c identity.Condition, claim any) bool {
	values, list := elements(claim)
	if len(values) == 0 {
		return false
	}
	wanted := Values(c.Value)
	if len(wanted) == 0 {
		return false
	}
	equal := func(a, b string) bool { return a == b }
	negative := false
	switch c.Operator {
	case identity.Equals:
	case identity.In:
		return anyPair(values, wanted, equal)
	case identity.EqualsIgnoreCase:
		equal = strings.EqualFold
	case identity.NotEquals:
		negative = true
	case identity.NotEqualsIgnoreCase:
		equal, negative = strings.EqualFold, true
	case identity.Contains:
		if !list {
			equal = func(a, b string) bool { return b != "" && strings.Contains(a, b) }
		}
	default:
		return false
	}
	if len(wanted) != 1 {
		return false // a list of values belongs to IN alone
	}
	return anyPair(values, wanted, equal) != negative
}

func anyPair(values, wanted []string, equal func(a, b string) bool) bool {
	for _, v := range values {
		for _, w := range wanted {
			if equal(v, w) {
				return true
			}
		}
	}
	return false
}

// elements turns a claim into texts, and says whether it was a list.
func elements(claim any) ([]string, bool) {
	switch c := claim.(type) {
	case string:
		return []string{c}, false
	case []string:
		return c, true
	}
	return nil, false
}

// Values reads a condition's value: JSON in a string. Booleans and numbers
// become their text; text that is not JSON stands for itself, because public
// Terraform writes it so. Nothing is returned for a value that no claim meets.
func Values(value string) []string {
	var v any
	dec := json.NewDecoder(strings.NewReader(value))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return []string{value}
	}
	if _, err := dec.Token(); err != io.EOF {
		return []string{value} // something follows the JSON value
	}
	if list, ok := v.([]any); ok {
		out := make([]string, 0, len(list))
		for _, e := range list {
			s, ok := scalar(e)
			if !ok {
				return nil
			}
			out = append(out, s)
		}
		return out
	}
	s, ok := scalar(v)
	if !ok {
		return nil
	}
	return []string{s}
}

func scalar(v any) (string, bool) {
	switch v := v.(type) {
	case string:
		return v, true
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		return v.String(), true
	}
	return "", false
}

func show(claim any, present bool) string {
	if !present {
		return "(claim not proved)"
	}
	if s, ok := claim.(string); ok {
		return strconv.Quote(s)
	}
	return fmt.Sprintf("%q", claim)
}

// Explain renders the verdict as checks: the same comparison that decided,
// put into words.
func (v Verdict) Explain() activity.Trace {
	var t activity.Trace
	switch {
	case v.Link != nil:
		t.Pass("profile-link", describeLink(v.Link), v.evidence.Name)
		t.Skip("profile-rule")
	case v.user && v.Rule != nil:
		t.Skip("profile-link")
		t.Pass("profile-rule", describeRule(v.Rule), v.evidence.Name)
	case v.user:
		t.Skip("profile-link")
		v.failRule(&t)
	case v.Rule != nil:
		v.failLink(&t)
		t[len(t)-1].Outcome = activity.Skip // a rule was enough
		t.Pass("profile-rule", describeRule(v.Rule), v.evidence.Name)
	default:
		v.failLink(&t)
		v.failRule(&t)
	}
	return t
}

func (v Verdict) failLink(t *activity.Trace) {
	if v.nearestLink == nil {
		t.Fail("profile-link", "a link to "+v.describeEvidence(), "the profile has no link",
			"link the profile to this compute resource")
		return
	}
	l, d := v.nearestLink, v.linkDiff
	t.Fail("profile-link", fmt.Sprintf("%s: %s = %s", describeLink(l), d.points[0], d.wanted), d.found,
		fmt.Sprintf("the nearest link (of %d) is %s; it differs in %s", len(v.candidate.Links), l.ID, strings.Join(d.points, ", ")))
}

func (v Verdict) failRule(t *activity.Trace) {
	if v.nearestRule == nil {
		t.Fail("profile-rule", "a rule that covers "+v.describeEvidence(), "the profile has no claim rule",
			"give the profile a rule that covers "+v.describeEvidence())
		return
	}
	r, d := v.nearestRule, v.ruleDiff
	t.Fail("profile-rule", fmt.Sprintf("%s: %s %s", describeRule(r), d.points[0], d.wanted), d.found,
		fmt.Sprintf("the nearest rule (of %d) is %s; it differs in %s", len(v.candidate.Rules), r.ID, strings.Join(d.points, ", ")))
}

func (v Verdict) describeEvidence() string {
	if v.user {
		return "federated user " + v.evidence.Name
	}
	return fmt.Sprintf("%s %s (%s)", v.evidence.Type, v.evidence.CRN, v.evidence.Name)
}

func describeLink(l *identity.Link) string {
	s := fmt.Sprintf("link %s %s %s", l.ID, l.CRType, l.CRN)
	if l.CRType.Kubernetes() {
		s += fmt.Sprintf(" %s/%s", l.Namespace, l.ServiceAccount)
	}
	return s
}

func describeRule(r *identity.ClaimRule) string {
	if r.Name != "" {
		return fmt.Sprintf("rule %s (%s)", r.ID, r.Name)
	}
	return "rule " + r.ID
}
