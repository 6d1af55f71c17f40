package iampolicy

import (
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
)

// To write a policy is to give away access, so the writer needs the action on
// everything that the policy covers, not on some of it
// (reference/access-and-audit.md section 2.6). Decide answers about one
// resource. It is therefore asked about a resource that has only the
// attributes that the policy fixes to one value: a demand of the writer's own
// policies on any other attribute then fails, as it must, because the new
// policy also covers resources that do not meet it.

// iamServiceGroup is the one service group there is; all its services are
// account management services (reference/access-and-audit.md section 2.2).
const iamServiceGroup = "IAM"

// scopes returns the resources on which an action must be allowed for it to be
// allowed on all that a resource block covers. A block that says nothing about
// services covers those of both kinds, so there are two.
func scopes(block []access.Attribute) []map[string]string {
	fixed := map[string]string{}
	for _, a := range block {
		if a.Operator == access.StringEquals {
			fixed[a.Key] = a.Value.Text
		}
	}
	if _, ok := fixed[access.ServiceName]; ok {
		// Both follow from the service. A block that says otherwise must not
		// borrow the rights of another kind.
		delete(fixed, access.ServiceType)
		delete(fixed, access.ServiceGroupID)
		return []map[string]string{fixed}
	}
	if _, ok := fixed[access.ServiceType]; ok {
		return []map[string]string{fixed}
	}
	platform := api.With(fixed, access.ServiceType, access.KindPlatform)
	if fixed[access.ServiceGroupID] == iamServiceGroup {
		return []map[string]string{platform}
	}
	return []map[string]string{api.With(fixed, access.ServiceType, access.KindService), platform}
}

// decisive returns the scope that the caller is refused on, or any when there
// is none, so that the refusal and its trace are about what is missing.
func decisive(c *api.Call, action string, p *access.Policy) map[string]string {
	all := scopes(p.Resource)
	for _, s := range all {
		if !c.May(action, s) {
			return s
		}
	}
	return all[0]
}

// visible reports whether the caller may read a policy.
func visible(p *access.Policy, may func(map[string]string) bool) bool {
	for _, s := range scopes(p.Resource) {
		if !may(s) {
			return false
		}
	}
	return true
}

// authorize refuses the caller unless the action is allowed on everything that
// the policy covers.
func authorize(c *api.Call, action string, p *access.Policy) error {
	for _, s := range scopes(p.Resource) {
		if err := c.Authorize(action, s); err != nil {
			return err
		}
		d := access.Decide(throughout{View: c.Directory, block: p.Resource}, access.Request{
			Subject: c.Caller.IAMID, AccountID: c.Account(), Action: action, Resource: s, Time: c.Now(),
		})
		if !d.Allowed {
			return fault.New(fault.Denied, "not_authorized",
				"%s is not authorized to %s on all that the policy covers: that access ends where an attribute is present (stringExists false) which the policy leaves open.",
				c.Caller.IAMID, action)
		}
	}
	return nil
}

// throughout is a view without the policies that demand an attribute's absence.
// In the scopes of a block an attribute is absent when it is open, not when no
// resource has it, unless the block demands its absence as well.
type throughout struct {
	access.View
	block []access.Attribute
}

// PoliciesOf implements [access.View].
func (v throughout) PoliciesOf(accountID, subjectID, service string) []*access.Policy {
	all := v.View.PoliciesOf(accountID, subjectID, service)
	return slices.DeleteFunc(slices.Clone(all), func(p *access.Policy) bool {
		return slices.ContainsFunc(p.Resource, func(a access.Attribute) bool {
			return demandsAbsence(a) && !slices.ContainsFunc(v.block, func(b access.Attribute) bool {
				return b.Key == a.Key && demandsAbsence(b)
			})
		})
	})
}

func demandsAbsence(a access.Attribute) bool {
	return a.Operator == access.StringExists && a.Value.Exists != nil && !*a.Value.Exists
}
