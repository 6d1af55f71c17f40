package iampolicy

import (
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// keepsOwner refuses to take the last policy away that lets the account's owner
// administer account management: with it would go the right to give it back.
// next is what the policy becomes, nil when it goes.
func keepsOwner(c *api.Call, old, next *access.Policy) error {
	account, ok := c.Directory.Accounts.Get(c.Account())
	if !ok || !administers(old, account.OwnerID) || next != nil && administers(next, account.OwnerID) {
		return nil
	}
	for _, p := range c.Directory.PoliciesOfSubject.Get(directory.Key(account.ID, account.OwnerID)) {
		if p.ID != old.ID && administers(p, account.OwnerID) {
			return nil
		}
	}
	return fault.New(fault.Conflict, "request_not_processed",
		"The policy %s is the last one that makes the account's owner, %s, Administrator of all account management services; without it nobody could be sure to manage access again. Give the owner another such policy first.",
		old.ID, account.OwnerID)
}

// administers reports whether a policy alone, always and everywhere makes
// somebody Administrator of all account management services.
func administers(p *access.Policy, iamID string) bool {
	id, ok := access.Get(p.Subject, access.IAMID)
	return ok && id == iamID && p.State == access.Active && p.Type == access.TypeAccess &&
		p.Rule == nil && len(p.Tags) == 0 &&
		slices.Contains(p.Roles, access.PlatformRoleCRN("Administrator")) &&
		!slices.ContainsFunc(p.Resource, func(a access.Attribute) bool {
			platform := a.Key == access.ServiceType && a.Operator == access.StringEquals && a.Value.Text == access.KindPlatform
			return a.Key != access.AccountID && !platform
		})
}
