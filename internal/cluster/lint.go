package cluster

import (
	"fmt"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// Finding is why a rule about workloads of an issuer may not stand.
type Finding struct {
	Claim string // that the reason is about; "" when it is the rule as a whole

	// Never says that no workload could meet the rule: a mistake, but one that
	// admits nobody. Otherwise the rule could admit workloads of strangers.
	Never  bool
	Reason string
}

func (f *Finding) Error() string { return f.Reason }

// Lint reports why the conditions of a rule of type OIDC may not stand, as a
// *Finding, given the workload issuers of the rule's account. An issuer such as
// that of a CI service in the internet signs for whoever has an account there.
// So a rule must name one registered issuer, and compare claims that say whose
// the workload is with given values, as the issuer's mapping demands.
func Lint(conditions []identity.Condition, issuers []*Issuer) error {
	issuer, err := issuerNamed(conditions, issuers)
	if err != nil {
		return err
	}
	for _, c := range conditions {
		if !issuer.Mapping.has(c.Claim) {
			return &Finding{Claim: c.Claim, Never: true, Reason: fmt.Sprintf(
				"The mapping of workload issuer %q has no claim %q, so the rule would never match.%s It has %s.",
				issuer.Name, clip(c.Claim), suggest(c.Claim, issuer.Mapping.names()), strings.Join(issuer.Mapping.names(), ", "))}
		}
		if strings.Contains(strings.Join(trust.Values(c.Value), "\n"), "*") {
			return &Finding{Claim: c.Claim, Never: c.Operator == identity.Equals || c.Operator == identity.In, Reason: fmt.Sprintf(
				"The condition on %s has a wildcard. Conditions compare texts as they are, they know no wildcards; "+
					"leave the condition out, or use CONTAINS beside a pinned claim.", c.Claim)}
		}
	}
	if len(issuer.Mapping.Pin) == 0 {
		return nil
	}
	for _, set := range issuer.Mapping.Pin {
		if !slices.ContainsFunc(set, func(claim string) bool { return !pinned(issuer.Mapping, conditions, claim) }) {
			return nil
		}
	}
	return &Finding{Reason: fmt.Sprintf("The rule would admit workloads of strangers: it must say whose workloads of %s it admits. "+
		"Compare %s, by EQUALS or IN with complete values%s.", issuer.Issuer, pins(issuer.Mapping), nearMiss(issuer.Mapping, conditions))}
}

// Names reports whether a rule's conditions name an issuer.
func Names(conditions []identity.Condition, issuer string) bool {
	return slices.ContainsFunc(conditions, func(c identity.Condition) bool {
		return c.Claim == ClaimIssuer && slices.Contains(trust.Values(c.Value), issuer)
	})
}

// issuerNamed returns the one registered issuer that a rule is about.
func issuerNamed(conditions []identity.Condition, issuers []*Issuer) (*Issuer, error) {
	var named []identity.Condition
	for _, c := range conditions {
		if c.Claim == ClaimIssuer {
			named = append(named, c)
		}
	}
	if len(named) != 1 || named[0].Operator != identity.Equals {
		return nil, &Finding{Claim: ClaimIssuer, Reason: "A rule with cr_type OIDC must have exactly one condition on the claim issuer, " +
			"with the operator EQUALS and the issuer of a registered workload issuer." + listed(issuers)}
	}
	values := trust.Values(named[0].Value)
	if len(values) != 1 {
		return nil, &Finding{Claim: ClaimIssuer, Never: true, Reason: "The condition on the claim issuer must have one text as its value."}
	}
	for _, i := range issuers {
		if i.Issuer == values[0] {
			return i, nil
		}
	}
	known := make([]string, len(issuers))
	for n, i := range issuers {
		known[n] = i.Issuer
	}
	return nil, &Finding{Claim: ClaimIssuer, Never: true, Reason: fmt.Sprintf(
		"No workload issuer of the account has the issuer %q.%s Register it first with 'tabard iam workload-issuer-create'.%s",
		clip(values[0]), suggest(values[0], known), listed(issuers))}
}

func listed(issuers []*Issuer) string {
	if len(issuers) == 0 {
		return " The account has none."
	}
	names := make([]string, 0, len(issuers))
	for _, i := range issuers {
		names = append(names, i.Issuer)
	}
	slices.Sort(names)
	return " The account has " + strings.Join(names, ", ") + "."
}

// pinned reports whether some condition compares a claim with given values
// only: by EQUALS or IN, none of them empty, in parts or out of form. What was
// meant as a wildcard pins nothing.
func pinned(m Mapping, conditions []identity.Condition, claim string) bool {
	return slices.ContainsFunc(conditions, func(c identity.Condition) bool {
		if c.Claim != claim || c.Operator != identity.Equals && c.Operator != identity.In {
			return false
		}
		values := trust.Values(c.Value)
		return len(values) > 0 && !slices.ContainsFunc(values, func(v string) bool { return !pinValue(m, claim, v) })
	})
}

func pinValue(m Mapping, claim, value string) bool {
	return strings.TrimSpace(value) != "" && !strings.ContainsAny(value, "*?") && m.wellFormed(claim, value)
}

// pins lists the sets of which one is needed.
func pins(m Mapping) string {
	sets := make([]string, len(m.Pin))
	for i, set := range m.Pin {
		sets[i] = strings.Join(set, " and ")
	}
	if len(sets) == 1 {
		return sets[0]
	}
	return "one of: " + strings.Join(sets, ", ")
}

// nearMiss says what keeps a condition on a claim that could pin from doing it.
func nearMiss(m Mapping, conditions []identity.Condition) string {
	for _, c := range conditions {
		if !slices.ContainsFunc(m.Pin, func(set []string) bool { return slices.Contains(set, c.Claim) }) || pinned(m, conditions, c.Claim) {
			continue
		}
		if c.Operator != identity.Equals && c.Operator != identity.In {
			return fmt.Sprintf("; the condition on %s does not count, because it is by %s", c.Claim, c.Operator)
		}
		for _, v := range trust.Values(c.Value) {
			if !m.wellFormed(c.Claim, v) {
				return fmt.Sprintf("; the condition on %s does not count, because %q is not of the form %s", c.Claim, clip(v), m.Form[c.Claim])
			}
		}
		return fmt.Sprintf("; the condition on %s does not count, because of its value", c.Claim)
	}
	return ""
}

// suggest names the one of the known texts that may have been meant.
func suggest(meant string, known []string) string {
	best, least := "", 4
	for _, k := range known {
		if d := distance(meant, k); d < least && d < len(k) {
			best, least = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" Did you mean %q?", best)
}

// distance is how many characters must be put in, left out or changed to turn
// one text into another. It gives up on long ones.
func distance(a, b string) int {
	from, to := []rune(a), []rune(b)
	if len(from) > 256 || len(to) > 256 {
		return len(from) + len(to)
	}
	row := make([]int, len(to)+1)
	for j := range row {
		row[j] = j
	}
	for i, x := range from {
		before := row[0]
		row[0] = i + 1
		for j, y := range to {
			change := before
			if x != y {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(to)]
}
