package trust

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/identity"
)

// Explain renders the verdict as checks: the same comparison that decided,
// put into words, with what came nearest and one change that would have let
// the evidence put on the profile.
func (v Verdict) Explain() activity.Trace {
	var t activity.Trace
	switch {
	case v.Link != nil:
		t.Pass("profile-link", describeLink(v.Link), v.evidence.Name)
		t.Skip("profile-rule")
	case v.person != nil && v.Rule != nil:
		t.Skip("profile-link")
		t.Pass("profile-rule", describeRule(v.Rule), v.evidence.Name)
	case v.person != nil:
		t.Skip("profile-link")
		v.failRule(&t)
	case v.Rule != nil:
		v.failLink(&t)
		c := &t[0]
		c.Outcome, c.Nearest, c.Change = activity.Skip, nil, nil // a rule was enough
		t.Pass("profile-rule", describeRule(v.Rule), v.evidence.Name)
	default:
		v.failLink(&t)
		v.failRule(&t)
	}
	return t
}

func (v Verdict) failLink(t *activity.Trace) {
	change := v.newLink()
	if v.nearestLink == nil {
		hint := "link the profile to this compute resource"
		if change == nil {
			hint = "no link can name it; a rule can"
		}
		t.FailNear("profile-link", "a link to "+v.describeEvidence(), "the profile has no link", hint, nil, change)
		return
	}
	l := v.nearestLink
	d := comparison{told: true}
	compareLink(v.candidate.Profile, l, v.evidence, &d)
	first := d.points[0]
	hint := fmt.Sprintf("the nearest link (of %d) is %s; it differs in %s", len(v.candidate.Links), l.ID, attributes(d.points))
	if change != nil {
		hint += "; links are not altered: one more, with " + found(d.points) + ", would have let it pass"
	}
	t.FailNear("profile-link", fmt.Sprintf("%s: %s = %s", describeLink(l), first.attribute, first.wanted), first.found, hint,
		&activity.Nearest{Kind: activity.KindLink, ID: l.ID, Name: l.Name, Of: len(v.candidate.Links), Differs: differences(d.points)}, change)
}

func (v Verdict) failRule(t *activity.Trace) {
	if v.nearestRule == nil {
		t.Fail("profile-rule", "a rule that covers "+v.describeEvidence(), "the profile has no claim rule",
			"give the profile a rule that covers "+v.describeEvidence())
		return
	}
	r := v.nearestRule
	d := comparison{told: true}
	claims := v.evidence.Claims
	if v.person != nil {
		claims = v.person.Claims
		compareUser(v.candidate.Profile, r, *v.person, &d)
	} else {
		compareRule(v.candidate.Profile, r, v.evidence, &d)
	}
	first := d.points[0]
	change := alterRule(r, d.points, claims)
	hint := fmt.Sprintf("the nearest rule (of %d) is %s; it differs in %s", len(v.candidate.Rules), r.ID, attributes(d.points))
	switch {
	case change == nil:
		hint += "; no change of its own would have let it pass"
	case len(change.Edits) == 1:
		hint += "; one change would have let it pass: " + tell(change.Edits)
	default:
		hint += fmt.Sprintf("; no single change would have let it pass, these %d would: %s", len(change.Edits), tell(change.Edits))
	}
	t.FailNear("profile-rule", fmt.Sprintf("%s: %s %s", describeRule(r), first.attribute, first.wanted), first.found, hint,
		&activity.Nearest{Kind: activity.KindRule, ID: r.ID, Name: r.Name, Of: len(v.candidate.Rules), Differs: differences(d.points)}, change)
}

// newLink is the link that would have let the evidence put on the profile, or
// nil where no link can. Links name one resource each and are never altered.
func (v Verdict) newLink() *activity.Change {
	ev, p := v.evidence, v.candidate.Profile
	switch ev.Type {
	case identity.IKSSA, identity.ROKSSA, identity.VSI, identity.BMS, identity.PVS:
	default:
		return nil
	}
	if p == nil || ev.Type.Kubernetes() && (ev.Namespace == "" || ev.ServiceAccount == "") {
		return nil
	}
	name := ev.CRN.String()
	c := &activity.Change{Do: activity.Add, Kind: activity.KindLink, Edits: []activity.Edit{
		{Attribute: "cr_type", To: string(ev.Type)}, {Attribute: "link.crn", To: name},
	}}
	words := []string{"tabard", "iam", "trusted-profile-link-create", p.ID, "--cr-type", string(ev.Type), "--link-crn", name}
	if ev.Type.Kubernetes() {
		c.Edits = append(c.Edits, activity.Edit{Attribute: "link.namespace", To: ev.Namespace}, activity.Edit{Attribute: "link.name", To: ev.ServiceAccount})
		words = append(words, "--link-namespace", ev.Namespace, "--link-name", ev.ServiceAccount)
	}
	if p.AccountID != ev.AccountID {
		c.Edits = append(c.Edits, activity.Edit{Attribute: "is_cross_account", To: "true"})
		words = append(words, "--cross-account")
	}
	if !covers(p, c.Edits, ev) {
		return nil
	}
	c.Command = activity.Command(words...)
	return c
}

// covers reports whether a link with these attributes matches: what is
// suggested has been asked the same question as what is there.
func covers(p *identity.Profile, edits []activity.Edit, ev Evidence) bool {
	var l identity.Link
	for _, e := range edits {
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
		}
	}
	var d comparison
	compareLink(p, &l, ev, &d)
	return d.differs == 0
}

// alterRule is what would have to be altered in a rule for all points of
// disagreement to go away, or nil when something cannot be altered.
func alterRule(r *identity.ClaimRule, points []point, claims map[string]any) *activity.Change {
	c := &activity.Change{Do: activity.Alter, Kind: activity.KindRule, ID: r.ID}
	altered := *r
	for _, p := range points[:len(points)-unmet(r.Conditions, claims)] {
		switch p.attribute {
		case "type":
			altered.Type = p.found
		case "cr_type":
			altered.CRType = identity.CRType(p.found)
		case "realm_name":
			altered.RealmName = p.found
		default:
			return nil
		}
		if p.found == "" {
			return nil
		}
		c.Edits = append(c.Edits, activity.Edit{Attribute: p.attribute, From: p.wanted, To: p.found})
	}
	altered.Conditions = nil
	for i, condition := range r.Conditions {
		claim, present := claims[condition.Claim]
		if present && Holds(condition, claim) {
			altered.Conditions = append(altered.Conditions, condition)
			continue
		}
		e := activity.Edit{Attribute: fmt.Sprintf("conditions[%d].value", i), From: condition.Value}
		if value, ok := mended(condition, claim); ok {
			if altered.CRType == identity.OIDC && strings.ContainsAny(value, "*?") {
				return nil // such a rule may not have what looks like a wildcard
			}
			condition.Value, e.To = value, value
			altered.Conditions = append(altered.Conditions, condition)
		} else {
			e.Attribute, e.From = fmt.Sprintf("conditions[%d]", i), conditionText(condition)
			if altered.CRType == identity.OIDC {
				return nil // its conditions keep strangers out
			}
		}
		c.Edits = append(c.Edits, e)
	}
	if len(altered.Conditions) == 0 {
		return nil // a rule without conditions admits nobody
	}
	if len(c.Edits) > 1 && (altered.Type != r.Type || altered.CRType != r.CRType) {
		return nil // it is about something else altogether
	}
	c.Command = ruleCommand(&altered)
	return c
}

// unmet counts the conditions that do not hold.
func unmet(conditions []identity.Condition, claims map[string]any) int {
	n := 0
	for _, c := range conditions {
		if claim, present := claims[c.Claim]; !present || !Holds(c, claim) {
			n++
		}
	}
	return n
}

// mended returns the value with which a condition holds for a claim. There is
// none for a claim that was not proved, nor for a condition that asks for
// something else than what was: it can only be left out.
func mended(c identity.Condition, claim any) (string, bool) {
	values, _ := elements(claim)
	if len(values) == 0 {
		return "", false
	}
	var value any = values[0]
	switch c.Operator {
	case identity.Equals, identity.EqualsIgnoreCase, identity.Contains:
	case identity.In:
		value = append(slices.Clone(Values(c.Value)), values[0])
	default:
		return "", false
	}
	b, err := json.Marshal(value)
	if err != nil {
		return "", false
	}
	c.Value = string(b)
	return c.Value, Holds(c, claim)
}

// ruleCommand writes the command that gives a rule its next state, "" when the
// command line has no words for it.
func ruleCommand(r *identity.ClaimRule) string {
	if r.ProfileID == "" {
		return ""
	}
	words := []string{"tabard", "iam", "trusted-profile-rule-update", r.ProfileID, r.ID, "--type", r.Type}
	if r.Type == identity.RuleCR {
		words = append(words, "--cr-type", string(r.CRType))
	} else {
		words = append(words, "--realm-name", r.RealmName)
		if r.Expiration > 0 {
			words = append(words, "--expiration", strconv.Itoa(r.Expiration))
		}
	}
	for _, c := range r.Conditions {
		if c.Claim == "" || c.Value == "" || strings.Contains(c.Claim, ",") || strings.TrimSpace(c.Claim) != c.Claim {
			return ""
		}
		words = append(words, "--conditions", conditionText(c))
	}
	return activity.Command(words...)
}

// conditionText writes a condition as the command line does.
func conditionText(c identity.Condition) string {
	return "claim:" + c.Claim + ",operator:" + string(c.Operator) + ",value:" + c.Value
}

func attributes(points []point) string {
	names := make([]string, len(points))
	for i, p := range points {
		names[i] = p.attribute
	}
	return strings.Join(names, ", ")
}

// found writes what the evidence has at the points of disagreement.
func found(points []point) string {
	parts := make([]string, len(points))
	for i, p := range points {
		parts[i] = p.attribute + " " + p.found
	}
	return strings.Join(parts, ", ")
}

func tell(edits []activity.Edit) string {
	parts := make([]string, len(edits))
	for i, e := range edits {
		if e.To == "" {
			parts[i] = "without " + e.Attribute + " " + e.From
			continue
		}
		parts[i] = e.Attribute + " " + e.To
	}
	return strings.Join(parts, " and ")
}

func differences(points []point) []activity.Difference {
	out := make([]activity.Difference, len(points))
	for i, p := range points {
		out[i] = activity.Difference{Attribute: p.attribute, Wanted: p.wanted, Found: p.found}
	}
	return out
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

func (v Verdict) describeEvidence() string {
	if v.person != nil {
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
