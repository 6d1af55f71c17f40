package trust_test

import (
	"strings"
	"testing"

	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// FuzzHolds feeds conditions and claims as an administrator and a cluster could
// write them. The two implementations must agree, an absent operand must never
// hold, and the positive and negative operators must never both hold.
func FuzzHolds(f *testing.F) {
	f.Add("EQUALS", `"a"`, "a", "", false)
	f.Add("NOT_EQUALS", `"a"`, "b", "a", true)
	f.Add("IN", `["a","b",1,true]`, "true", "", false)
	f.Add("CONTAINS", `"a"]`, "xa", "", false)
	f.Fuzz(func(t *testing.T, operator, value, first, second string, list bool) {
		var claim any = first
		if list {
			claim = []string{first, second}
		}
		c := identity.Condition{Claim: "c", Operator: identity.Operator(operator), Value: value}
		got := trust.Holds(c, claim)
		// Unicode has letters that fold together without sharing a lower case;
		// the reference does not know them.
		if !strings.HasSuffix(operator, "_IGNORE_CASE") && got != conditionHolds(c, claim) {
			t.Errorf("%s %q on %q = %t, the reference says %t", operator, value, claim, got, !got)
		}
		if got && !c.Operator.Valid() {
			t.Errorf("the unknown operator %q holds", operator)
		}
		positive, negative := c, c
		positive.Operator, negative.Operator = identity.Equals, identity.NotEquals
		if trust.Holds(positive, claim) && trust.Holds(negative, claim) {
			t.Errorf("%q both equals and does not equal %q", claim, value)
		}
		if trust.Holds(c, nil) || trust.Holds(c, []string{}) {
			t.Errorf("%s %q holds on an absent claim", operator, value)
		}
	})
}
