// Package trust answers one question: may this evidence put on this profile?
// Match is a pure function over the profile, its links, its claim rules and
// what a verifier proved; the verdict carries everything needed to explain it.
// How evidence is proved is the business of package attest.
package trust

import (
	"encoding/json"
	"io"
	"strconv"
	"strings"

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
// rule are those that differ from the evidence in the fewest points.
type Verdict struct {
	Matched bool
	Link    *identity.Link      // what matched, or
	Rule    *identity.ClaimRule // what matched

	evidence    Evidence
	person      *User // the evidence is about a person, whom no link can name
	candidate   Candidate
	nearestLink *identity.Link
	nearestRule *identity.ClaimRule
}

// Match decides whether the evidence may put on the profile. A link or a rule
// of the evidence's own compute resource type is needed, and one is enough
// (reference/iam-identity.md section 6.1). The profile must live in the
// resource's account, except through a link that says it is cross-account.
// Nothing matched means no.
func Match(c Candidate, ev Evidence) Verdict {
	v := Verdict{evidence: ev, candidate: c}
	var closest comparison
	for _, l := range c.Links {
		var d comparison
		compareLink(c.Profile, l, ev, &d)
		if d.differs == 0 {
			v.Matched, v.Link = true, l
			return v
		}
		if v.nearestLink == nil || d.nearer(closest, l.ID, v.nearestLink.ID) {
			v.nearestLink, closest = l, d
		}
	}
	closest = comparison{}
	for _, r := range c.Rules {
		var d comparison
		compareRule(c.Profile, r, ev, &d)
		if d.differs == 0 {
			v.Matched, v.Rule = true, r
			return v
		}
		if v.nearestRule == nil || d.nearer(closest, r.ID, v.nearestRule.ID) {
			v.nearestRule, closest = r, d
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
	v := Verdict{evidence: Evidence{Name: u.Name}, person: &u, candidate: c}
	var closest comparison
	for _, r := range c.Rules {
		var d comparison
		compareUser(c.Profile, r, u, &d)
		if d.differs == 0 {
			v.Matched, v.Rule = true, r
			return v
		}
		if v.nearestRule == nil || d.nearer(closest, r.ID, v.nearestRule.ID) {
			v.nearestRule, closest = r, d
		}
	}
	return v
}

// HoldAll reports whether there are conditions and all are true of the claims.
func HoldAll(conditions []identity.Condition, claims map[string]any) bool {
	var d comparison
	d.compareAll(conditions, claims)
	return d.differs == 0
}

// comparison counts where a link or rule and the evidence agree and disagree.
// Words for a disagreement are found only when they are asked for: a request
// that is let through pays for none.
type comparison struct {
	agreed, differs int
	otherKind       bool    // a link or rule about another kind of evidence altogether
	told            bool    // points are wanted
	points          []point // of disagreement
}

// point is one disagreement.
type point struct {
	attribute     string
	wanted, found string // by the link or rule, and in the evidence
}

// nearer reports whether a comparison came closer than another one, so that
// the order in which links and rules are kept does not decide.
func (d comparison) nearer(than comparison, id, thanID string) bool {
	switch {
	case d.otherKind != than.otherKind:
		return than.otherKind
	case d.differs != than.differs:
		return d.differs < than.differs
	case d.agreed != than.agreed:
		return d.agreed > than.agreed
	}
	return id < thanID
}

func (d *comparison) compare(ok bool, tell func() point) {
	if ok {
		d.agreed++
		return
	}
	d.differs++
	if d.told {
		d.points = append(d.points, tell())
	}
}

// kind compares what decides whether the rest can be compared at all.
func (d *comparison) kind(ok bool, tell func() point) {
	d.otherKind = d.otherKind || !ok
	d.compare(ok, tell)
}

func compareUser(p *identity.Profile, r *identity.ClaimRule, u User, d *comparison) {
	d.kind(r.Type == identity.RuleSAML, func() point { return point{"type", r.Type, identity.RuleSAML} })
	d.compare(r.RealmName != "" && r.RealmName == u.Realm, func() point { return point{"realm_name", r.RealmName, u.Realm} })
	d.compare(p.AccountID == u.AccountID, func() point { return point{attributeAccount, p.AccountID, u.AccountID} })
	d.compareAll(r.Conditions, u.Claims)
}

func compareLink(p *identity.Profile, l *identity.Link, ev Evidence, d *comparison) {
	d.kind(l.CRType == ev.Type, func() point { return point{"cr_type", string(l.CRType), string(ev.Type)} })
	linked, err := crn.Parse(l.CRN)
	d.compare(err == nil && linked.Same(ev.CRN), func() point { return point{"link.crn", l.CRN, ev.CRN.String()} })
	if l.CRType.Kubernetes() {
		d.compare(l.Namespace != "" && l.Namespace == ev.Namespace, func() point { return point{"link.namespace", l.Namespace, ev.Namespace} })
		d.compare(l.ServiceAccount != "" && l.ServiceAccount == ev.ServiceAccount, func() point {
			return point{"link.name", l.ServiceAccount, ev.ServiceAccount}
		})
	}
	if l.CRType == identity.OIDC {
		// An issuer's CRN covers everybody who gets tokens there.
		d.compare(false, func() point { return point{"cr_type", "a type that links can name", string(l.CRType)} })
	}
	if l.CRType == identity.CE {
		// No verifier proves components yet; a link to one covers nothing else.
		d.compare(false, func() point { return point{"link.component_name", l.ComponentName, "(not proved)"} })
	}
	d.compare(l.CrossAccount || p.AccountID == ev.AccountID, func() point { return point{attributeAccount, p.AccountID, ev.AccountID} })
}

func compareRule(p *identity.Profile, r *identity.ClaimRule, ev Evidence, d *comparison) {
	d.kind(r.Type == identity.RuleCR, func() point { return point{"type", r.Type, identity.RuleCR} })
	d.kind(r.CRType == ev.Type, func() point { return point{"cr_type", string(r.CRType), string(ev.Type)} })
	d.compare(p.AccountID == ev.AccountID, func() point { return point{attributeAccount, p.AccountID, ev.AccountID} })
	d.compareAll(r.Conditions, ev.Claims)
}

// attributeAccount is where the profile lives: no link or rule can alter it.
const attributeAccount = "account"

func (d *comparison) compareAll(conditions []identity.Condition, claims map[string]any) {
	d.compare(len(conditions) > 0, func() point { return point{"conditions", "at least one", "0"} })
	for _, c := range conditions {
		claim, present := claims[c.Claim]
		d.compare(present && Holds(c, claim), func() point { return point{c.Claim, string(c.Operator) + " " + c.Value, show(claim, present)} })
	}
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
