package catalogapi

import (
	"fmt"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/resource"
)

// using is what names a service.
type using struct {
	name      string
	policies  []*access.Policy
	roles     []*access.CustomRole
	instances []*resource.Instance
}

// uses finds what names a service of the caller's account: active policies and
// authorizations, custom roles, and instances that are there or can be restored.
func uses(c *api.Call, name string) using {
	d := c.Directory
	return using{
		name: name,
		policies: slices.DeleteFunc(d.PoliciesByAccount.Get(c.Account()), func(p *access.Policy) bool {
			return p.State != access.Active || !names(p, name)
		}),
		roles: slices.DeleteFunc(d.CustomRolesByAccount.Get(c.Account()), func(r *access.CustomRole) bool {
			return r.Service != name
		}),
		instances: slices.DeleteFunc(d.ResourcesByAccount.Get(c.Account()), func(i *resource.Instance) bool {
			return i.Service != name || i.State == resource.StateRemoved
		}),
	}
}

// names reports whether a policy is about the service, is given to it, or
// grants one of its roles.
func names(p *access.Policy, name string) bool {
	is := func(a access.Attribute) bool {
		return a.Key == access.ServiceName && (a.Value.Text == name || slices.Contains(a.Value.List, name))
	}
	return slices.ContainsFunc(p.Resource, is) || slices.ContainsFunc(p.Subject, is) ||
		slices.ContainsFunc(p.Roles, func(role string) bool { return ownRole(role, name) })
}

func policy(p *access.Policy) string     { return "policy " + p.ID }
func custom(r *access.CustomRole) string { return "custom role " + r.Name }

// all lists every use.
func (u using) all() []string {
	var out []string
	for _, p := range u.policies {
		out = append(out, policy(p))
	}
	for _, r := range u.roles {
		out = append(out, custom(r))
	}
	for _, i := range u.instances {
		out = append(out, "service instance "+i.GUID)
	}
	return out
}

// missing lists what is used of the old definition and gone from the new one:
// actions of custom roles, roles and attributes of policies, plans of instances.
func (u using) missing(old, next *access.RegisteredService) []string {
	var out []string
	for _, r := range u.roles {
		for _, a := range r.Actions {
			if hasAction(old, a) && !hasAction(next, a) {
				out = append(out, fmt.Sprintf("action %s (%s)", a, custom(r)))
			}
		}
	}
	for _, p := range u.policies {
		for name := range old.ServiceRoles {
			role := access.ServiceRoleCRN(u.name, name)
			if _, kept := next.ServiceRoles[name]; kept || !slices.ContainsFunc(p.Roles, func(r string) bool { return access.CanonicalRole(r) == role }) {
				continue
			}
			out = append(out, fmt.Sprintf("role %s (%s)", name, policy(p)))
		}
		for _, a := range old.Attributes {
			if !hasAttribute(next, a.Name) && slices.ContainsFunc(p.Resource, func(x access.Attribute) bool { return x.Key == a.Name }) {
				out = append(out, fmt.Sprintf("attribute %s (%s)", a.Name, policy(p)))
			}
		}
	}
	for _, i := range u.instances {
		if !slices.ContainsFunc(next.PlanList, func(p access.Plan) bool { return p.ID == i.PlanID }) &&
			slices.ContainsFunc(old.PlanList, func(p access.Plan) bool { return p.ID == i.PlanID }) {
			out = append(out, fmt.Sprintf("plan %s (service instance %s)", i.PlanID, i.GUID))
		}
	}
	return out
}

func hasAction(s *access.RegisteredService, id string) bool {
	return slices.ContainsFunc(s.Actions, func(a access.ActionDefinition) bool { return a.ID == id })
}

func hasAttribute(s *access.RegisteredService, name string) bool {
	return slices.ContainsFunc(s.Attributes, func(a access.AttributeDefinition) bool { return a.Name == name })
}
