package grant_test

import (
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
)

// The attacker registered the issuer first and has since taken the owner's
// public keys. While the owner's own keys cannot be had, only the attacker's
// registration proves the owner's tokens.
func TestWhoTakesAnothersKeysDoesNotGetTheTokensWhileThoseCannotBeHad(t *testing.T) {
	f := newFleet(t)
	f.profile(f.cluster, "deploy", "lister")
	mine, attacker := f.Owner.AccountID, f.Other.AccountID
	taken := f.register(attacker, "taken", f.api)
	p := f.profile(taken, "deploy", "lister")
	f.profile(taken, "bait", "lister")
	change := func(c *cluster.Cluster, f2 func(c *cluster.Cluster)) {
		next := *c
		f2(&next)
		f.update(func(tx *directory.Tx) { f.d.Clusters.Put(tx, &next) })
		*c = next
	}
	change(f.cluster, func(c *cluster.Cluster) { c.JWKS, c.Review = nil, false }) // the API server has no keys to give
	change(taken, func(c *cluster.Cluster) { c.Review, c.Proved = false, f.now().Add(time.Second) })

	if _, err := f.ask(attacker, f.token(), grant.Selector{Name: "deploy"}); code(err) != grant.CodeUnavailable || fault.Of(err).RetryAfter < time.Second {
		t.Errorf("by a name that the owner has too: %v", err)
	}
	if _, err := f.ask(attacker, f.token(), grant.Selector{ID: p.ID}); err != nil {
		t.Errorf("by id: %v", err)
	}
	if _, err := f.ask(attacker, f.token(), grant.Selector{Name: "bait"}); err != nil {
		t.Errorf("by a name that only this account has: %v", err)
	}
	// The other way round nobody is hindered: the changed registration is the younger one.
	change(f.cluster, func(c *cluster.Cluster) { c.JWKS = taken.JWKS })
	change(taken, func(c *cluster.Cluster) { c.JWKS = nil })
	if _, err := f.ask(mine, f.token(), grant.Selector{Name: "deploy"}); err != nil {
		t.Errorf("the owner's: %v", err)
	}
}

// Everybody may register the issuer of a CI service, and everybody's jobs prove
// themselves in all of these accounts.
func TestAJobOfASharedIssuerNamesItsProfileById(t *testing.T) {
	f := newFleet(t)
	f.update(func(tx *directory.Tx) { f.d.Clusters.Delete(tx, f.cluster) })
	register := func(account string) *identity.Profile {
		i := &cluster.Issuer{
			ID: "WorkloadIssuer-" + uuid.NewString(), AccountID: account, Name: "ci", Issuer: fleetIssuer, Audience: "iam", JWKS: f.cluster.JWKS,
		}
		i.CRN = "crn:v1:bluemix:public:iam-identity::a/" + account + "::workload-issuer:" + i.ID
		p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: "deploy-" + account}
		f.update(func(tx *directory.Tx) {
			f.d.WorkloadIssuers.Put(tx, i)
			f.d.Profiles.Put(tx, p)
			f.d.Rules.Put(tx, &identity.ClaimRule{
				ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: account, Type: identity.RuleCR, CRType: identity.OIDC,
				Conditions: []identity.Condition{
					{Claim: "issuer", Operator: identity.Equals, Value: `"` + fleetIssuer + `"`},
					{Claim: "sub", Operator: identity.Equals, Value: `"system:serviceaccount:apps:lister"`},
				},
			})
		})
		return p
	}
	mine := register(f.Owner.AccountID)
	if _, err := f.ask(f.Owner.AccountID, f.token(), grant.Selector{Name: mine.Name}); err != nil {
		t.Fatalf("by name, where one account has the issuer: %v", err)
	}
	theirs := register(f.Other.AccountID)
	for _, p := range []*identity.Profile{mine, theirs} {
		if _, err := f.ask(p.AccountID, f.token(), grant.Selector{Name: p.Name}); code(err) != grant.CodeNotEligible {
			t.Errorf("by name: %v", err)
		}
		if _, err := f.ask(p.AccountID, f.token(), grant.Selector{ID: p.ID}); err != nil {
			t.Errorf("by id: %v", err)
		}
	}
}
