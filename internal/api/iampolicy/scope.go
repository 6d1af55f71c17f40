package iampolicy

import (
	"slices"
	"strings"

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

// groupServices are the services of that group.
var groupServices = []string{"iam-identity", "iam-access-management", "iam-groups", "user-management"}

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

// purpose is what a caller wants with a policy.
type purpose int

const (
	handle purpose = iota // read it or take it away
	give                  // make it take effect
)

// visible reports whether the caller may read a policy.
func visible(c *api.Call, p *access.Policy) bool {
	for _, s := range scopes(p.Resource) {
		if !c.May(actionRead, s) || !wholly(c, actionRead, s, p, handle) {
			return false
		}
	}
	return true
}

// authorize refuses the caller unless the action is allowed on everything that
// the policy covers.
func authorize(c *api.Call, action string, p *access.Policy, why purpose) error {
	for _, s := range scopes(p.Resource) {
		if err := c.Authorize(action, s); err != nil {
			return err
		}
		if !wholly(c, action, s, p, why) {
			return fault.New(fault.Denied, "not_authorized",
				"%s is not authorized to %s on all that the policy covers: that access has conditions (a rule, or stringExists false on an attribute) which the policy does not have.",
				c.Caller.IAMID, action)
		}
	}
	return nil
}

// wholly asks for a decision on a scope without the caller's policies that
// cover only a part of it.
func wholly(c *api.Call, action string, scope map[string]string, p *access.Policy, why purpose) bool {
	return c.MayThrough(throughout{View: c.Directory, of: p, why: why}, action, scope)
}

// throughout is a view without the policies that hold on the scopes of a policy
// only because these leave something open.
type throughout struct {
	access.View
	of  *access.Policy
	why purpose
}

// PoliciesOf implements [access.View].
func (v throughout) PoliciesOf(accountID, subjectID, service string) []*access.Policy {
	return v.whole(v.View.PoliciesOf(accountID, subjectID, service))
}

// AuthorizationsOn implements [access.View].
func (v throughout) AuthorizationsOn(accountID, service string) []*access.Policy {
	return v.whole(v.View.AuthorizationsOn(accountID, service))
}

func (v throughout) whole(all []*access.Policy) []*access.Policy {
	return slices.DeleteFunc(slices.Clone(all), func(held *access.Policy) bool { return v.partial(held) })
}

// partial reports whether a policy that the caller holds covers less than it
// seems to.
//
// One that demands the absence of an attribute does: in a scope an attribute is
// absent when the block leaves it open, not when no resource has it, unless the
// block demands its absence as well. A rule on attributes can say the same in
// many ways, so none counts. A rule on the time bounds when its holder may act,
// which Decide sees to; it also bounds what he may give away, or he would
// outlast his window by a policy of his own.
func (v throughout) partial(held *access.Policy) bool {
	for _, a := range held.Resource {
		if demandsAbsence(a) && !slices.ContainsFunc(v.of.Resource, func(b access.Attribute) bool {
			return b.Key == a.Key && demandsAbsence(b)
		}) {
			return true
		}
	}
	if held.Rule == nil {
		return false
	}
	if !timed(held.Rule) {
		return true
	}
	return v.why == give && (v.of.Rule == nil || v.of.Rule.String() != held.Rule.String())
}

// timed reports whether a rule is about the time and nothing else.
func timed(r *access.Rule) bool {
	if r.Operator != access.And && r.Operator != access.Or {
		return strings.HasPrefix(r.Key, "{{environment.attributes.")
	}
	return !slices.ContainsFunc(r.Conditions, func(c access.Rule) bool { return !timed(&c) })
}

func demandsAbsence(a access.Attribute) bool {
	return a.Operator == access.StringExists && a.Value.Exists != nil && !*a.Value.Exists
}

// holds refuses the caller unless he may himself do everything that an
// authorization lets a service do, on all of its target
// (reference/access-and-audit.md section 2.5). actions returns what it allows
// on the resources of one service.
func holds(c *api.Call, p *access.Policy, actions func(service string) []string) error {
	catalog := c.Directory.Catalog(c.Account())
	for _, scope := range scopes(p.Resource) {
		for _, service := range servicesIn(catalog, scope) {
			resource := scope
			if service != "" {
				resource = api.With(scope, access.ServiceName, service)
			}
			held := access.RolesOn(throughout{View: c.Directory, of: p, why: give}, access.Request{
				Subject: c.Caller.IAMID, AccountID: c.Account(), Resource: resource, Time: c.Now(),
			})
			for _, action := range actions(service) {
				if !slices.ContainsFunc(held, func(role string) bool { return catalog.Grants(role, service, action) }) {
					return fault.New(fault.Denied, "not_authorized",
						"%s is not authorized to let a service do %s on all of the target: whoever writes an authorization needs the roles himself that it grants.",
						c.Caller.IAMID, action)
				}
			}
		}
	}
	return nil
}

// allowedBy returns what a policy's roles allow on the resources of a service.
func allowedBy(c *api.Call, p *access.Policy) func(service string) []string {
	catalog := c.Directory.Catalog(c.Account())
	return func(service string) []string {
		var out []string
		for _, role := range p.Roles {
			out = append(out, catalog.Actions(role, service)...)
		}
		return out
	}
}

// servicesIn returns the services that a scope is about; the empty name stands
// for those that the catalog does not know.
func servicesIn(catalog *access.Catalog, scope map[string]string) []string {
	if name, ok := scope[access.ServiceName]; ok {
		return []string{name}
	}
	names := []string{""}
	for _, s := range catalog.Services() {
		group := scope[access.ServiceGroupID]
		if s.Kind == scope[access.ServiceType] && (group != iamServiceGroup || slices.Contains(groupServices, s.Name)) {
			names = append(names, s.Name)
		}
	}
	return names
}
