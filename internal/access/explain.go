package access

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
)

// Explain renders the decision as checks: the comparison that decided, put into
// words, with the policy that came nearest and one change that would have
// allowed the action.
func (d Decision) Explain() activity.Trace {
	var t activity.Trace
	q := d.request
	shown, met := d.Policy, []obstacle(nil)
	if !d.Allowed {
		shown, met = d.closest()
	}
	reached := d.stage
	if len(met) > 0 {
		reached = met[0].stage
	}
	var nearest *activity.Nearest
	var change *activity.Change
	step := func(s stage, name, wanted, found string, hint func() string) {
		switch {
		case reached > s:
			t.Pass(name, wanted, found)
		case reached == s:
			t.FailNear(name, wanted, found, hint(), nearest, change)
		default:
			t.Skip(name)
		}
	}
	wanted, hint := q.AccountID, "use a token of the account that owns the resource"
	if d.keptOut {
		wanted, hint = "a service whose account is let in", "add the service's account to the access management settings of account "+q.Resource[AccountID]
	}
	step(stageAccount, "account", wanted, q.Resource[AccountID], func() string { return hint })

	if !d.Allowed && reached > stageAccount {
		nearest, change = d.nearest(shown, met), d.change(shown, met)
	}
	found := fmt.Sprintf("policies about %s: %d", orAll(q.Resource[ServiceName]), d.candidates)
	step(stageSubject, "policy-subject", "a policy for "+strings.Join(d.subjects, " or ")+" on "+describe(q.Resource), found, func() string {
		return "grant " + q.Subject + " a role on service " + orAll(q.Resource[ServiceName]) + d.told(change)
	})
	if shown == nil {
		t.Skip("policy-resource")
		t.Skip("policy-rule")
		t.Skip("policy-action")
		return t
	}
	which := "nearest policy (of " + fmt.Sprint(d.candidates) + ") is " + shown.ID
	if reached == stageResource {
		a := met[0].attribute
		got, present := q.Resource[a.Key]
		if met[0].tag {
			got, present = strings.Join(q.Tags, ", "), len(q.Tags) > 0
		}
		if !present {
			got = "(absent)"
		}
		step(stageResource, "policy-resource", fmt.Sprintf("policy %s: %s %s %s", shown.ID, a.Key, a.Operator, a.Value), got, func() string {
			return which + "; it is about another " + a.Key + d.told(change)
		})
	} else {
		step(stageResource, "policy-resource", "policy "+shown.ID, describe(q.Resource), nil)
	}
	conditions := "no conditions"
	if shown.Rule != nil {
		conditions = shown.Rule.String()
	}
	step(stageRule, "policy-rule", conditions, "at "+q.Time.UTC().Format(time.RFC3339), func() string {
		return which + "; its conditions do not hold now" + d.told(change)
	})
	step(stageAction, "policy-action", q.Action, "roles "+strings.Join(roleNames(shown.Roles), ", "), func() string {
		return which + "; none of its roles contains " + q.Action + d.told(change)
	})
	return t
}

// closest returns the policy that differs from the request in the fewest
// points, and those; nil when no policy names the subject. Of two that differ
// in as many, the one that came further in the checks is nearer.
func (d Decision) closest() (*Policy, []obstacle) {
	var best *Policy
	var least int
	var furthest stage
	for _, p := range d.refused {
		n, first := 0, stageDone
		obstacles(d.catalog, p, d.request, func(o obstacle) bool {
			n, first = n+1, min(first, o.stage)
			return best == nil || n <= least
		})
		if best == nil || cmp.Or(cmp.Compare(n, least), cmp.Compare(furthest, first), cmp.Compare(p.ID, best.ID)) < 0 {
			best, least, furthest = p, n, first
		}
	}
	if best == nil {
		return nil, nil
	}
	met := make([]obstacle, 0, least)
	obstacles(d.catalog, best, d.request, func(o obstacle) bool {
		met = append(met, o)
		return true
	})
	return best, met
}

func (d Decision) nearest(p *Policy, met []obstacle) *activity.Nearest {
	if p == nil {
		return nil
	}
	n := &activity.Nearest{Kind: activity.KindPolicy, ID: p.ID, Name: p.Description, Of: d.candidates}
	for _, o := range met {
		x := activity.Difference{Attribute: "roles", Wanted: strings.Join(roleNames(p.Roles), ", "), Found: d.request.Action}
		switch {
		case o.stage == stageRule:
			x = activity.Difference{Attribute: "rule", Wanted: p.Rule.String(), Found: "at " + d.request.Time.UTC().Format(time.RFC3339)}
		case o.tag:
			x = activity.Difference{Attribute: "tags." + o.attribute.Key, Wanted: demand(*o.attribute), Found: strings.Join(d.request.Tags, ", ")}
		case o.stage == stageResource:
			x = activity.Difference{Attribute: "resource." + o.attribute.Key, Wanted: demand(*o.attribute), Found: d.request.Resource[o.attribute.Key]}
		}
		n.Differs = append(n.Differs, x)
	}
	return n
}

func demand(a Attribute) string { return string(a.Operator) + " " + a.Value.String() }

// told writes a change as the end of a hint.
func (d Decision) told(c *activity.Change) string {
	switch {
	case c == nil && d.smallest("") == nil:
		return "; no role of service " + orAll(d.request.Resource[ServiceName]) + " contains " + d.request.Action
	case c == nil:
		return ""
	case c.Do == activity.Add:
		return "; one more policy would have allowed it: role " + roleNames([]string{c.Edits[len(c.Edits)-1].To})[0] + " on this resource"
	case c.Edits[0].Attribute == "rule":
		return "; without them it would have allowed it"
	}
	return "; with the role " + roleNames([]string{c.Edits[0].To})[0] + " as well it would have allowed it"
}

// change is what would have allowed the action. Where the nearest policy is the
// caller's own and differs in its roles or its conditions alone, it is that
// policy; else it is one more: to turn a policy to another resource would take
// away what it is about now, and to widen that of a group would reach everybody
// in it.
func (d Decision) change(p *Policy, met []obstacle) *activity.Change {
	if p != nil && len(met) == 1 && p.Type == TypeAccess && p.SubjectID() == d.request.Subject {
		switch met[0].stage {
		case stageRule:
			return &activity.Change{
				Do: activity.Alter, Kind: activity.KindPolicy, ID: p.ID, Edits: []activity.Edit{{Attribute: "rule", From: p.Rule.String()}},
			}
		case stageAction:
			if role := d.smallest(p.Service()); role != nil {
				return &activity.Change{
					Do: activity.Alter, Kind: activity.KindPolicy, ID: p.ID, Edits: []activity.Edit{{Attribute: "roles", To: role.CRN}},
					Command: d.rolesCommand(p, role),
				}
			}
		}
	}
	return d.newPolicy()
}

// smallest returns the role with the fewest actions that contains the one of
// the request, of those that a policy about a service may grant; nil when none
// does. "" is the request's own service.
func (d Decision) smallest(service string) *Role {
	if d.catalog == nil {
		return nil
	}
	own := d.request.Resource[ServiceName]
	system, others := d.catalog.RolesOf(own)
	roles := slices.Concat(system, others)
	if s, ok := d.catalog.Service(own); ok {
		roles = s.Roles // with the account's own
	}
	var best *Role
	least := 0
	for _, r := range roles {
		if !d.catalog.Grants(r.CRN, own, d.request.Action) || !d.catalog.HasRole(r.CRN, cmp.Or(service, own)) {
			continue
		}
		if n := d.catalog.size(r.CRN, own); best == nil || n < least || n == least && r.CRN < best.CRN {
			best, least = r, n
		}
	}
	return best
}

// size is how many actions a role has on a service's resources.
func (c *Catalog) size(roleCRN, service string) int {
	if s, ok := c.Service(service); ok {
		return len(s.grants[roleCRN])
	}
	return len(c.common[roleCRN])
}

// known are the attributes that a policy on one resource names, in the order in
// which they are shown.
var known = []string{AccountID, ServiceName, ServiceInstance, Region, ResourceType, Resource, ResourceGroupID}

// newPolicy is the policy on exactly the resource of the request that would
// have allowed the action, or nil when there can be none.
func (d Decision) newPolicy() *activity.Change {
	q := d.request
	role := d.smallest("")
	if role == nil {
		return nil
	}
	account := q.Resource[AccountID]
	p := &Policy{ID: "new", AccountID: account, API: 2, Type: TypeAccess, State: Active, Roles: []string{role.CRN}}
	p.Subject = []Attribute{equals(IAMID, q.Subject)}
	if source, service := sourceOf(q.Subject); service {
		p.Type, p.Subject = TypeAuthorization, nil
		for _, key := range sourceKeys {
			if source[key] != "" {
				p.Subject = append(p.Subject, equals(key, source[key]))
			}
		}
	}
	for _, key := range known {
		if q.Resource[key] != "" {
			p.Resource = append(p.Resource, equals(key, q.Resource[key]))
		}
	}
	if p.Validate(d.catalog) != nil || examine(d.catalog, p, q) != stageDone {
		return nil
	}
	c := &activity.Change{Do: activity.Add, Kind: activity.KindPolicy, Edits: []activity.Edit{{Attribute: "type", To: p.Type}}}
	for _, a := range p.Subject {
		c.Edits = append(c.Edits, activity.Edit{Attribute: "subject." + a.Key, To: a.Value.Text})
	}
	for _, a := range p.Resource {
		c.Edits = append(c.Edits, activity.Edit{Attribute: "resource." + a.Key, To: a.Value.Text})
	}
	c.Edits = append(c.Edits, activity.Edit{Attribute: "roles", To: role.CRN})
	if p.Type == TypeAccess {
		c.Command = policyCommand(p, role)
	}
	return c
}

func equals(key, value string) Attribute {
	return Attribute{Key: key, Operator: StringEquals, Value: Text(value)}
}

// policyFlags are the attributes of a resource that the command line has a flag
// for; the account is the session's.
var policyFlags = map[string]string{
	ServiceName: "--service-name", ServiceInstance: "--service-instance", Region: "--region",
	ResourceType: "--resource-type", Resource: "--resource", ResourceGroupID: "--resource-group-id",
}

// policyCommand writes the command that makes a policy, "" when the command
// line would read it otherwise.
func policyCommand(p *Policy, role *Role) string {
	word, owner := ownerOf(p.SubjectID())
	if word == "" {
		return ""
	}
	words := []string{"tabard", "iam", word + "-policy-create", owner, "--roles", roleWord(role)}
	for _, a := range p.Resource {
		if a.Key == AccountID {
			continue
		}
		if strings.ContainsAny(a.Value.Text, "*?") {
			return "" // on the command line they stand for any text
		}
		words = append(words, policyFlags[a.Key], a.Value.Text)
	}
	return activity.Command(words...)
}

// rolesCommand writes the command that gives a policy one more role.
func (d Decision) rolesCommand(p *Policy, more *Role) string {
	word, owner := ownerOf(p.SubjectID())
	if word == "" {
		return ""
	}
	names := make([]string, 0, len(p.Roles)+1)
	for _, id := range p.Roles {
		r, ok := d.catalog.Role(id)
		if !ok {
			return ""
		}
		names = append(names, roleWord(r))
	}
	names = append(names, roleWord(more))
	return activity.Command("tabard", "iam", word+"-policy-update", owner, p.ID, "--roles", strings.Join(names, ","))
}

// ownerOf returns how the command line calls an identity, and its kind.
func ownerOf(iamID string) (word, owner string) {
	switch crn.KindOf(iamID) {
	case crn.KindProfile:
		return "trusted-profile", crn.Identifier(iamID)
	case crn.KindServiceID:
		return "service", crn.Identifier(iamID)
	case crn.KindUser:
		return "user", iamID
	}
	return "", ""
}

// roleWord is a role as a list separated by commas can have it.
func roleWord(r *Role) string {
	if strings.ContainsAny(r.DisplayName, `,"`) || strings.TrimSpace(r.DisplayName) != r.DisplayName {
		return r.CRN
	}
	return r.DisplayName
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
	keys := slices.Sorted(maps.Keys(resource))
	for i, k := range keys {
		keys[i] = k + "=" + resource[k]
	}
	return strings.Join(keys, " ")
}
