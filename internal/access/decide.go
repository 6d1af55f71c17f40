package access

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/activity"
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
	nearest    *Policy
	mismatch   Attribute
	keptOut    bool // by the account's settings
}

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
	catalog := v.Catalog(account)
	if service && d.among(catalog, authorizationsFor(v, source, account, q)) {
		return d
	}
	if account != q.AccountID {
		return d
	}
	d.subjects = append(d.subjects, v.GroupsOf(q.AccountID, q.Subject, q.Time)...)
	for _, subject := range d.subjects {
		if d.among(catalog, v.PoliciesOf(q.AccountID, subject, q.Resource[ServiceName])) {
			return d
		}
	}
	return d
}

// among looks for a policy that allows, and remembers the one that came
// nearest.
func (d *Decision) among(c *Catalog, policies []*Policy) bool {
	for _, p := range policies {
		d.candidates++
		reached, mismatch := examine(c, p, d.request)
		if reached == stageDone {
			d.Allowed, d.Policy, d.stage = true, p, stageDone
			return true
		}
		if d.nearest == nil || reached > d.stage {
			d.stage, d.nearest, d.mismatch = reached, p, mismatch
		}
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
		reached, _ := examine(c, p, q)
		return reached < stageAction
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
	reached, _ := examine(c, p, q)
	return p.State == Active && reached == stageDone
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

// examine reports how far a policy that names the subject goes, and the
// attribute that stopped it.
func examine(c *Catalog, p *Policy, q Request) (stage, Attribute) {
	for _, a := range p.Resource {
		if !a.covers(c, q.Resource) {
			return stageResource, a
		}
	}
	for _, t := range p.Tags {
		if !slices.ContainsFunc(q.Tags, func(tag string) bool { return t.matchesTag(tag) }) {
			return stageResource, t
		}
	}
	if !p.Rule.Holds(q) {
		return stageRule, Attribute{}
	}
	for _, role := range p.Roles {
		if c.Grants(role, q.Resource[ServiceName], q.Action) {
			return stageDone, Attribute{}
		}
	}
	return stageAction, Attribute{}
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

// Explain renders the decision as checks: the comparison that decided, put into
// words.
func (d Decision) Explain() activity.Trace {
	var t activity.Trace
	q := d.request
	step := func(s stage, name, wanted, found, hint string) {
		switch {
		case d.stage > s:
			t.Pass(name, wanted, found)
		case d.stage == s:
			t.Fail(name, wanted, found, hint)
		default:
			t.Skip(name)
		}
	}
	wanted, hint := q.AccountID, "use a token of the account that owns the resource"
	if d.keptOut {
		wanted, hint = "a service whose account is let in", "add the service's account to the access management settings of account "+q.Resource[AccountID]
	}
	step(stageAccount, "account", wanted, q.Resource[AccountID], hint)

	found := fmt.Sprintf("policies about %s: %d", orAll(q.Resource[ServiceName]), d.candidates)
	step(stageSubject, "policy-subject", "a policy for "+strings.Join(d.subjects, " or ")+" on "+describe(q.Resource), found,
		"grant "+q.Subject+" a role on service "+orAll(q.Resource[ServiceName]))

	shown := d.nearest
	if d.Policy != nil {
		shown = d.Policy
	}
	if shown == nil {
		t.Skip("policy-resource")
		t.Skip("policy-rule")
		t.Skip("policy-action")
		return t
	}
	if d.stage == stageResource {
		got, present := q.Resource[d.mismatch.Key]
		if !present {
			got = "(absent)"
		}
		t.Fail("policy-resource", fmt.Sprintf("policy %s: %s %s %s", shown.ID, d.mismatch.Key, d.mismatch.Operator, d.mismatch.Value), got,
			"nearest policy is "+shown.ID+"; widen "+d.mismatch.Key+" or add a policy for this resource")
	} else {
		step(stageResource, "policy-resource", "policy "+shown.ID, describe(q.Resource), "")
	}
	conditions := "no conditions"
	if shown.Rule != nil {
		conditions = shown.Rule.String()
	}
	step(stageRule, "policy-rule", conditions, "at "+q.Time.UTC().Format(time.RFC3339), "nearest policy is "+shown.ID+"; its conditions do not hold now")
	step(stageAction, "policy-action", q.Action, "roles "+strings.Join(roleNames(shown.Roles), ", "),
		"nearest policy is "+shown.ID+"; add a role that contains "+q.Action)
	return t
}

func orAll(service string) string {
	if service == "" {
		return "all services"
	}
	return service
}

func roleNames(crns []string) []string {
	out := make([]string, len(crns))
	for i, c := range crns {
		out[i] = c[strings.LastIndexByte(c, ':')+1:]
	}
	return out
}

func describe(resource map[string]string) string {
	keys := make([]string, 0, len(resource))
	for k := range resource {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for i, k := range keys {
		keys[i] = k + "=" + resource[k]
	}
	return strings.Join(keys, " ")
}
