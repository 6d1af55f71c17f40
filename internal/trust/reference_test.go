package trust_test

import (
	"encoding/json"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// This file is Match a second time, written from reference/iam-identity.md
// section 6 and in another form: every link and rule becomes a list of
// predicates, and the answer is whether all predicates of some list are true.
// It shares no code with the first one.

type predicate func(trust.Evidence) bool

func matchByPredicates(c trust.Candidate, ev trust.Evidence) bool {
	var ways [][]predicate
	for _, l := range c.Links {
		ways = append(ways, predicatesOfLink(c.Profile, l))
	}
	for _, r := range c.Rules {
		ways = append(ways, predicatesOfRule(c.Profile, r))
	}
	for _, way := range ways {
		all := true
		for _, holds := range way {
			all = holds(ev) && all
		}
		if all {
			return true
		}
	}
	return false
}

// Section 6.1: a link names one compute resource: its CRN and, on Kubernetes,
// namespace and service account; it counts for tokens of its own type, and in
// its own account unless it is cross-account.
func predicatesOfLink(p *identity.Profile, l *identity.Link) []predicate {
	out := []predicate{
		func(ev trust.Evidence) bool { return string(ev.Type) == string(l.CRType) },
		func(ev trust.Evidence) bool { return sameResource(l.CRN, ev.CRN.String()) },
	}
	if l.CRType == "IKS_SA" || l.CRType == "ROKS_SA" {
		out = append(out,
			func(trust.Evidence) bool { return l.Namespace != "" && l.ServiceAccount != "" },
			func(ev trust.Evidence) bool {
				return l.Namespace+"\n"+l.ServiceAccount == ev.Namespace+"\n"+ev.ServiceAccount
			})
	}
	if l.CRType == "OIDC" {
		out = append(out, func(trust.Evidence) bool { return false }) // such links are refused, and would name everybody
	}
	if !l.CrossAccount {
		out = append(out, func(ev trust.Evidence) bool { return ev.AccountID == p.AccountID })
	}
	return out
}

// sameResource compares CRNs without the segments that name the cloud.
func sameResource(a, b string) bool {
	x, y := strings.Split(a, ":"), strings.Split(b, ":")
	if len(x) < 10 || x[0] != "crn" || x[1] != "v1" || x[2] == "" || x[3] == "" {
		return false
	}
	return slices.Equal(slices.Delete(x, 2, 4), slices.Delete(y, 2, 4))
}

// Section 6.1: a rule covers a resource of its type, in its account, of which
// all its conditions hold. A rule without conditions covers nothing.
func predicatesOfRule(p *identity.Profile, r *identity.ClaimRule) []predicate {
	out := []predicate{func(ev trust.Evidence) bool {
		return r.Type == "Profile-CR" && ev.Type == r.CRType && ev.AccountID == p.AccountID && len(r.Conditions) != 0
	}}
	for _, c := range r.Conditions {
		out = append(out, func(ev trust.Evidence) bool {
			claim, proved := ev.Claims[c.Claim]
			return proved && conditionHolds(c, claim)
		})
	}
	return out
}

// conditionHolds is the table of section 6.2. What the table leaves open is
// decided towards "no": an empty attribute meets nothing, a negative operator
// neither.
func conditionHolds(c identity.Condition, claim any) bool {
	var attribute []string
	text, isText := claim.(string)
	if isText {
		attribute = []string{text}
	} else if list, ok := claim.([]string); ok {
		attribute = list
	}
	values, ok := valuesOf(c.Value)
	if !ok || len(attribute) == 0 || len(values) == 0 {
		return false
	}
	if c.Operator == "IN" {
		return slices.ContainsFunc(attribute, func(s string) bool { return slices.Contains(values, s) })
	}
	if len(values) > 1 {
		return false
	}
	value := values[0]
	count := 0 // elements of the attribute that equal the value
	for _, s := range attribute {
		if strings.HasSuffix(string(c.Operator), "_IGNORE_CASE") {
			if strings.ToLower(s) == strings.ToLower(value) { //nolint:staticcheck // on purpose another comparison than the code's
				count++
			}
		} else if s == value {
			count++
		}
	}
	switch c.Operator {
	case "EQUALS", "EQUALS_IGNORE_CASE":
		return count > 0
	case "NOT_EQUALS", "NOT_EQUALS_IGNORE_CASE":
		return count == 0
	case "CONTAINS":
		if isText {
			return value != "" && strings.Index(text, value) >= 0 //nolint:staticcheck // as above
		}
		return count > 0
	}
	return false
}

// valuesOf reads a condition's value: JSON in a string, or else plain text.
// Booleans and numbers are the text they were written as.
func valuesOf(value string) ([]string, bool) {
	if !json.Valid([]byte(value)) {
		return []string{value}, true
	}
	var list []json.RawMessage
	if json.Unmarshal([]byte(value), &list) != nil || list == nil {
		list = []json.RawMessage{json.RawMessage(strings.TrimSpace(value))}
	}
	out := []string{}
	for _, raw := range list {
		switch raw[0] {
		case '{', '[', 'n':
			return nil, false
		case '"':
			var s string
			if json.Unmarshal(raw, &s) != nil {
				return nil, false
			}
			out = append(out, s)
		default:
			out = append(out, string(raw))
		}
	}
	return out, true
}
