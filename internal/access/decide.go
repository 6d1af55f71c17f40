package access

import (
	"maps"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/crn"
)

// Request is one question to [Decide].
type Request struct {
	Subject   string            // IAM ID of the caller; in a profile session the profile's
	AccountID string            // account that the caller's token is for
	Action    string            // for example is.instance.instance.list
	Resource  map[string]string // attributes by the names of this package's constants
	Tags      []string          // access tags on the resource, key:value
	Time      time.Time         // when; without it no condition on the time holds
}

// View is what Decide reads. Every method is a look-up by a key that the
// request carries.
type View interface {
	// GroupsOf returns the ids of the access groups that the identity is in.
	GroupsOf(accountID, iamID string, now time.Time) []string
	// PoliciesOf returns the active access policies of a subject (IAM ID or
	// group id) that name the service, and those that name no single service.
	PoliciesOf(accountID, subjectID, service string) []*Policy
	// AuthorizationsOn returns the active authorizations in an account whose
	// target is the service, or no single service.
	AuthorizationsOn(accountID, service string) []*Policy
	// Interaction returns how an account treats identities of other accounts,
	// or nil when it has not said.
	Interaction(accountID string) *Settings
	// Catalog returns the services and roles that an account knows.
	Catalog(accountID string) *Catalog
}

// Decision is the answer of [Decide]. Policy is what decided when Allowed.
type Decision struct {
	Allowed bool
	Policy  *Policy

	request    Request
	stage      stage
	subjects   []string
	candidates int
	refused    []*Policy // that did not allow, no more than maxRefused
	catalog    *Catalog  // that the candidates were read with
	keptOut    bool      // by the account's settings
}

// maxRefused bounds the policies among which the nearest is looked for.
const maxRefused = 1000

// stage is how far the best policy came; each stage is one named check.
type stage int

const (
	stageAccount stage = iota
	stageSubject
	stageResource
	stageRule
	stageAction
	stageDone
)

// Decide walks a fixed list of checks: the resource is in the account that the
// caller acts in; an active policy names the caller or one of his access
// groups; its resource attributes cover the resource; its rule holds now; one
// of its roles contains the action (reference/access-and-audit.md section
// 2.1). The first policy that passes all of them allows. There are no deny
// policies, and nothing else allows.
//
// A service acts through its CRN. It may be let in from another account: then
// an authorization in the resource's account must describe it
// (reference/access-and-audit.md section 2.5).
func Decide(v View, q Request) Decision {
	d := Decision{request: q, subjects: []string{q.Subject}}
	account := q.Resource[AccountID]
	source, service := sourceOf(q.Subject)
	if q.AccountID == "" || account == "" || account != q.AccountID && !service {
		return d
	}
	if service && !letsIn(v, account, source[AccountID]) {
		d.keptOut = true
		return d
	}
	d.stage = stageSubject
	d.catalog = v.Catalog(account)
	if service && d.among(authorizationsFor(v, source, account, q)) {
		return d
	}
	if account != q.AccountID {
		return d
	}
	d.subjects = append(d.subjects, v.GroupsOf(q.AccountID, q.Subject, q.Time)...)
	for _, subject := range d.subjects {
		if d.among(v.PoliciesOf(q.AccountID, subject, q.Resource[ServiceName])) {
			return d
		}
	}
	return d
}

// among looks for a policy that allows, and keeps those that do not, for an
// explanation. The policies are the view's answer, which nobody else has.
func (d *Decision) among(policies []*Policy) bool {
	for _, p := range policies {
		d.candidates++
		reached := examine(d.catalog, p, d.request)
		if reached == stageDone {
			d.Allowed, d.Policy, d.stage = true, p, stageDone
			d.refused = nil
			return true
		}
		d.stage = max(d.stage, reached)
	}
	policies = policies[:min(len(policies), maxRefused-len(d.refused))]
	if len(d.refused) == 0 {
		d.refused = policies
	} else {
		d.refused = append(d.refused, policies...)
	}
	return false
}

// Permitted returns the sorted actions that the subject may do on the resource
// now: what [Decide] would allow, whatever the request's own action is.
func Permitted(v View, q Request) []string {
	all := actionSet{}
	c := v.Catalog(q.Resource[AccountID])
	for _, p := range holding(v, q) {
		for _, role := range p.Roles {
			for _, action := range c.Actions(role, q.Resource[ServiceName]) {
				all[action] = struct{}{}
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// RolesOn returns the CRNs of the roles that the subject has on the resource
// now, sorted.
func RolesOn(v View, q Request) []string {
	var roles []string
	for _, p := range holding(v, q) {
		roles = append(roles, p.Roles...)
	}
	slices.Sort(roles)
	return slices.Compact(roles)
}

// holding returns the policies that [Decide] would let decide by their roles
// alone: they name the subject, cover the resource, and their rules hold now.
func holding(v View, q Request) []*Policy {
	account := q.Resource[AccountID]
	source, service := sourceOf(q.Subject)
	if q.AccountID == "" || account == "" || account != q.AccountID && !service {
		return nil
	}
	var out []*Policy
	if service {
		if !letsIn(v, account, source[AccountID]) {
			return nil
		}
		out = authorizationsFor(v, source, account, q)
	}
	if account == q.AccountID {
		for _, subject := range append([]string{q.Subject}, v.GroupsOf(q.AccountID, q.Subject, q.Time)...) {
			out = append(out, v.PoliciesOf(q.AccountID, subject, q.Resource[ServiceName])...)
		}
	}
	c := v.Catalog(account)
	return slices.DeleteFunc(out, func(p *Policy) bool {
		return examine(c, p, q) < stageAction
	})
}

// Possible returns the policies of the subject that would allow the action on
// some resource of the service that the request names, if there were such a
// one: they name the subject, and one of their roles contains the action. A
// service that acts through its CRN has none.
func Possible(v View, q Request) []*Policy {
	account := q.Resource[AccountID]
	if q.AccountID == "" || account != q.AccountID {
		return nil
	}
	c, service := v.Catalog(account), q.Resource[ServiceName]
	var out []*Policy
	for _, subject := range append([]string{q.Subject}, v.GroupsOf(account, q.Subject, q.Time)...) {
		for _, p := range v.PoliciesOf(account, subject, service) {
			about := !slices.ContainsFunc(p.Resource, func(a Attribute) bool {
				return slices.Contains([]string{AccountID, ServiceName, ServiceType, ServiceGroupID}, a.Key) && !a.covers(c, q.Resource)
			})
			if about && slices.ContainsFunc(p.Roles, func(role string) bool { return c.Grants(role, service, q.Action) }) {
				out = append(out, p)
			}
		}
	}
	return out
}

// Grants reports whether an active policy, whoever its subject is, allows the
// action of the request on its resource now.
func (p *Policy) Grants(c *Catalog, q Request) bool {
	return p.State == Active && examine(c, p, q) == stageDone
}

// AttributesOf returns the resource attributes that a CRN names
// (reference/access-and-audit.md section 2.2).
func AttributesOf(c crn.CRN) map[string]string {
	m := map[string]string{}
	for key, value := range map[string]string{
		AccountID: c.AccountID(), ServiceName: c.Service, ServiceInstance: c.Instance, Region: c.Location,
		ResourceType: c.ResourceType, Resource: c.Resource,
	} {
		if value != "" {
			m[key] = value
		}
	}
	return m
}

// sourceOf returns the attributes of a service that acts through its CRN.
func sourceOf(subject string) (map[string]string, bool) {
	if crn.KindOf(subject) != crn.KindCRN {
		return nil, false
	}
	c, err := crn.Parse(crn.Identifier(subject))
	if err != nil {
		return nil, false
	}
	return AttributesOf(c), true
}

// letsIn reports whether an account's settings let in services of another one.
func letsIn(v View, account, other string) bool {
	if other == account {
		return true
	}
	admitted, _ := v.Interaction(account).Admits(ExternalService, other)
	return admitted
}

// authorizationsFor returns the authorizations whose subject describes the
// source.
func authorizationsFor(v View, source map[string]string, account string, q Request) []*Policy {
	return slices.DeleteFunc(v.AuthorizationsOn(account, q.Resource[ServiceName]), func(p *Policy) bool {
		return slices.ContainsFunc(p.Subject, func(a Attribute) bool {
			value, present := source[a.Key]
			return !a.matches(value, present)
		})
	})
}

// examine reports how far a policy that names the subject goes.
func examine(c *Catalog, p *Policy, q Request) stage {
	reached := stageDone
	obstacles(c, p, q, func(o obstacle) bool {
		reached = o.stage
		return false
	})
	return reached
}

// obstacle is one point in which a policy does not fit a request: at
// stageResource an attribute that is demanded of the resource, or of its tags.
type obstacle struct {
	stage     stage
	attribute *Attribute
	tag       bool
}

// obstacles tells what stands between a policy that names the subject and a
// request, in the order of the checks, for as long as it is asked to go on. A
// policy without any allows.
func obstacles(c *Catalog, p *Policy, q Request, next func(obstacle) bool) {
	for i := range p.Resource {
		if !p.Resource[i].covers(c, q.Resource) && !next(obstacle{stageResource, &p.Resource[i], false}) {
			return
		}
	}
	for i := range p.Tags {
		if !slices.ContainsFunc(q.Tags, func(tag string) bool { return p.Tags[i].matchesTag(tag) }) && !next(obstacle{stageResource, &p.Tags[i], true}) {
			return
		}
	}
	if !p.Rule.Holds(q) && !next(obstacle{stage: stageRule}) {
		return
	}
	for _, role := range p.Roles {
		if c.Grants(role, q.Resource[ServiceName], q.Action) {
			return
		}
	}
	next(obstacle{stage: stageAction})
}

// covers reports whether the resource meets the demand. An attribute that the
// policy demands and the resource lacks is a mismatch.
func (a Attribute) covers(c *Catalog, resource map[string]string) bool {
	value, present := resource[a.Key]
	switch a.Key {
	case ServiceName:
		return a.matches(value, present) || a.matchesParent(value)
	case ServiceType:
		if !present && resource[ServiceName] != "" {
			value, present = c.KindOf(resource[ServiceName]), true
		}
	case ServiceGroupID:
		if !present {
			value, present = serviceGroupOf(resource[ServiceName])
		}
	}
	return a.matches(value, present)
}

// matchesParent lets a policy about a service cover its child services.
func (a Attribute) matchesParent(service string) bool {
	parent, _, child := strings.Cut(service, ".")
	return child && a.matches(parent, true)
}

func serviceGroupOf(service string) (string, bool) {
	switch service {
	case "iam-identity", "iam-access-management", "iam-groups", "user-management":
		return "IAM", true
	}
	return "", false
}

func (a Attribute) matches(value string, present bool) bool {
	switch a.Operator {
	case StringExists:
		return a.Value.Exists != nil && *a.Value.Exists == present
	case StringEquals:
		return present && value == a.Value.Text
	case StringMatch:
		return present && Wildcard(a.Value.Text, value)
	case StringEqualsAnyOf:
		return present && slices.Contains(a.Value.List, value)
	case StringMatchAnyOf:
		return present && slices.ContainsFunc(a.Value.List, func(p string) bool { return Wildcard(p, value) })
	}
	return false
}

// matchesTag compares a policy's tag demand with one tag of the resource.
func (a Attribute) matchesTag(tag string) bool {
	key, value, ok := strings.Cut(tag, ":")
	return ok && key == a.Key && a.matches(value, true)
}
