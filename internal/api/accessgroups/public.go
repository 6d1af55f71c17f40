package accessgroups

import (
	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

const publicName = "Public Access"

// publicAccess returns the group Public Access of the caller's account. It is
// stored nowhere: it is there while the account's settings allow public access,
// and everybody is in it (reference/access-and-audit.md section 4.3).
func publicAccess(c *api.Call) (*access.Group, bool) {
	if !c.Directory.GroupSettingsOf(c.Account()).PublicAccess {
		return nil, false
	}
	g := &access.Group{
		ID: access.PublicAccess, AccountID: c.Account(), Name: publicName,
		Description: "Everybody. What this group may do, every identity may do in this account.",
	}
	if a, ok := c.Directory.Accounts.Get(c.Account()); ok {
		g.CreatedAt, g.CreatedBy, g.ModifiedAt, g.ModifiedBy = a.CreatedAt, a.CreatedBy, a.CreatedAt, a.CreatedBy
	}
	return g, true
}

// ordinary keeps a change away from the group Public Access, which is as it is
// in every account. It stands behind the access decision, so that whoever may
// not change groups is told just that.
func ordinary[B any](do func(*api.Call, *directory.Tx, *B, *access.Group) (api.Reply, api.Target, error),
) func(*api.Call, *directory.Tx, *B, *access.Group) (api.Reply, api.Target, error) {
	return func(c *api.Call, tx *directory.Tx, b *B, g *access.Group) (api.Reply, api.Target, error) {
		if g.ID == access.PublicAccess {
			return api.Reply{}, api.Target{}, publicIsFixed()
		}
		return do(c, tx, b, g)
	}
}

func publicIsFixed() *fault.Error {
	return fault.New(fault.Conflict, "conflict",
		"The group %s can't be changed or deleted and everybody is in it; the account's settings turn it off.", publicName)
}
