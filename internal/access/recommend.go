package access

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Defaults and bounds of a recommendation.
const (
	DefaultWindow = 90 * 24 * time.Hour

	// EnoughWindow is how long use must have been observed before something is
	// called unused, unless the window that was asked for is shorter.
	EnoughWindow = 30 * 24 * time.Hour

	// MaxNamed is up to how many values of an attribute a smaller policy names.
	MaxNamed = 5
)

// Verdicts on a policy.
const (
	Keep      = "keep"      // all that it allows was used, or nothing smaller can be written
	Narrow    = "narrow"    // a smaller one allows all that was used
	Remove    = "remove"    // nothing of it was used
	Undecided = "undecided" // its use has not been observed for long enough
)

// Patterns of use that came on few days.
const (
	Periodic = "periodic" // at regular distances: see [Days.Period]
	Rare     = "rare"     // once or twice
)

// Evidence is what a recommendation is made from.
type Evidence struct {
	AccountID string
	Subject   string
	Own       []*Policy // active access policies of the subject itself
	Groups    []*Policy // active access policies of the access groups that it is in
	Uses      []Use     // of the subject
	Since     time.Time // when use began to be counted
}

// Question is what kind of recommendation is wanted.
type Question struct {
	Window     time.Duration // how far back use counts; 0 means DefaultWindow
	CustomRole bool          // make roles of exactly what was used
}

// Recommendation is what [Recommend] found.
type Recommendation struct {
	From    time.Time // use before this does not count, unless it is periodic
	Missed  int64     // requests that found no room among the records of use
	Own     []Advice
	Groups  []Advice // what comes through groups, which others may share: no changes
	Changes []Change // that put the advice into effect, in an order that works
}

// Advice is about one policy.
type Advice struct {
	Policy   *Policy
	Verdict  string
	Since    time.Time        // since when its use has been observed
	Used     []ActionUse      // what a smaller policy must allow
	Earlier  []ActionUse      // what was used before the window only, and would be lost
	Unused   []ServiceActions // what it allows besides, in the services that it names or was used in
	Wider    bool             // it is about more services than those
	Smaller  []Smaller        // what would take its place, the first under its id
	Instead  []string         // ids of policies that allow the same as well
	Warnings []string         // in words
}

// ActionUse is the use of one action in one service.
type ActionUse struct {
	Service, Action string
	Count           int64
	First, Last     time.Time
	Days            int    // on how many
	Pattern         string // Periodic, Rare or ""
	Period          int    // days between two uses when periodic
}

// ServiceActions are actions in one service.
type ServiceActions struct {
	Service string
	Actions []string
}

// Smaller is a policy that allows less.
type Smaller struct {
	Policy *Policy
	Role   *CustomRole      // to be made first; nil when there is none
	Beyond []ServiceActions // what its roles allow and was not used
}

// Change is one step. Exactly one of Remove, Role, Update and Create is set.
type Change struct {
	Remove    string      // id of a policy
	Role      *CustomRole // to be made
	Update    *Policy     // with the id of the one that it replaces
	Create    *Policy
	Undecided bool // the advice that it is of is not ripe
}

// Recommend says for each policy of a subject which smaller one its observed use
// needs. What the policies that it recommends allow, the ones before them
// allowed as well; and they allow every use in the window that these would
// still allow.
//
// A use belongs to the policy that decided. When that policy is gone, or would
// not allow all of the use any more, it belongs to every other one that might:
// that one was hidden behind the first, so that its own count says nothing.
func Recommend(now time.Time, q Question, c *Catalog, e Evidence) Recommendation {
	r := recommender{now: now, q: q, catalog: c, Evidence: e, roles: map[string][]candidate{}}
	if r.q.Window <= 0 {
		r.q.Window = DefaultWindow
	}
	out := Recommendation{From: now.Add(-r.q.Window)}
	r.from = out.From
	byID := func(a, b *Policy) int { return strings.Compare(a.ID, b.ID) }
	r.Own, r.Groups = slices.SortedFunc(slices.Values(e.Own), byID), slices.SortedFunc(slices.Values(e.Groups), byID)
	for _, u := range e.Uses {
		if u.Action == "" && !u.Last.Before(r.from) {
			out.Missed += u.Count
		}
	}
	r.missed = out.Missed > 0
	for _, p := range r.Own {
		out.Own = append(out.Own, r.advise(p))
	}
	for _, p := range r.Groups {
		a := r.observe(p).Advice
		out.Groups = append(out.Groups, a)
	}
	dropDoubles(out.Own)
	out.Changes = changes(r.Own, out.Own)
	return out
}

type recommender struct {
	Evidence
	now     time.Time
	q       Question
	catalog *Catalog
	from    time.Time
	missed  bool
	roles   map[string][]candidate // by service, as far as they were asked for
}

// needs are what one policy must go on allowing.
type needs struct {
	Advice
	services map[string]*need
}

// need is what was used of one service.
type need struct {
	actions actionSet
	touched Touched
}

func (n *need) add(m *need) {
	maps.Copy(n.actions, m.actions)
	n.touched.Region = n.touched.Region.union(m.touched.Region)
	n.touched.ResourceGroupID = n.touched.ResourceGroupID.union(m.touched.ResourceGroupID)
	n.touched.ResourceType = n.touched.ResourceType.union(m.touched.ResourceType)
	n.touched.ServiceInstance = n.touched.ServiceInstance.union(m.touched.ServiceInstance)
}

// observe gathers the use that belongs to a policy.
func (r *recommender) observe(p *Policy) needs {
	out := needs{Advice: Advice{Policy: p, Verdict: Keep, Since: r.Since}, services: map[string]*need{}}
	// What a change has added to the policy could not be used before.
	if p.ModifiedAt.After(out.Since) {
		out.Since = p.ModifiedAt
	}
	type key struct{ service, action string }
	merged := map[key]*Use{}
	for _, u := range r.Uses {
		if !r.belongs(&u, p) {
			continue
		}
		k := key{u.Service, u.Action}
		m, ok := merged[k]
		if !ok {
			merged[k] = &u
			continue
		}
		m.merge(&u)
	}
	for _, k := range slices.SortedFunc(maps.Keys(merged), func(a, b key) int {
		return cmp.Or(strings.Compare(a.service, b.service), strings.Compare(a.action, b.action))
	}) {
		u := merged[k]
		shown := r.pattern(u, out.Since)
		if u.Last.Before(r.from) && !r.expected(u) {
			out.Earlier = append(out.Earlier, shown)
			continue
		}
		out.Used = append(out.Used, shown)
		n := &need{actions: actionSet{u.Action: {}}, touched: u.Touched}
		if old, ok := out.services[u.Service]; ok {
			old.add(n)
		} else {
			out.services[u.Service] = n
		}
	}
	r.unused(&out)
	return out
}

func (u *Use) merge(v *Use) {
	u.Count += v.Count
	if v.First.Before(u.First) {
		u.First = v.First
	}
	if v.Last.After(u.Last) {
		u.Last = v.Last
	}
	days := u.Days
	for _, day := range v.Days.All() {
		days.Add(day)
	}
	u.Days = days
	both := need{actions: actionSet{}, touched: u.Touched}
	both.add(&need{touched: v.Touched})
	u.Touched = both.touched
}

// expected reports whether a periodic use may come again.
func (r *recommender) expected(u *Use) bool {
	period := time.Duration(u.Days.Period()) * 24 * time.Hour
	return period > 0 && r.now.Sub(u.Last) <= period+period/2
}

// Use that came once or twice, each time on at most two days in a row, is called
// rare when it has been observed for this long.
const (
	rareAfter = 14 * 24 * time.Hour
	rareDays  = 2 * (minRuns - 1)
)

func (r *recommender) pattern(u *Use, since time.Time) ActionUse {
	out := ActionUse{
		Service: u.Service, Action: u.Action, Count: u.Count, First: u.First, Last: u.Last, Days: u.Days.Len(), Period: u.Days.Period(),
	}
	if u.First.Before(since) {
		since = u.First
	}
	switch {
	case out.Period > 0:
		out.Pattern = Periodic
	case r.now.Sub(since) >= rareAfter && len(u.Days.runs()) < minRuns && out.Days <= rareDays:
		out.Pattern = Rare
	}
	return out
}

// belongs reports whether a use counts for a policy.
func (r *recommender) belongs(u *Use, p *Policy) bool {
	if u.Action == "" || !r.fits(u, p, false) {
		return false
	}
	if u.PolicyID == p.ID {
		return true
	}
	for _, other := range slices.Concat(r.Own, r.Groups) {
		if other.ID == u.PolicyID {
			return !r.fits(u, other, true)
		}
	}
	return true
}

// fits reports whether a policy would allow some of a use, or all of it. What
// is not remembered of the resources counts as if it fitted, or as if it did
// not.
func (r *recommender) fits(u *Use, p *Policy, all bool) bool {
	if !slices.ContainsFunc(p.Roles, func(role string) bool { return r.catalog.Grants(role, u.Service, u.Action) }) {
		return false
	}
	if u.PolicyID == p.ID && !p.ModifiedAt.After(u.First) {
		return true // it is what decided
	}
	if all && (p.Rule != nil || len(p.Tags) > 0) {
		return false
	}
	resource := map[string]string{AccountID: u.AccountID}
	if u.Service != "" {
		resource[ServiceName] = u.Service
	}
	for _, a := range p.Resource {
		if v, ok := u.Touched.Of(a.Key); ok {
			if !a.fits(v, all) {
				return false
			}
			continue
		}
		switch a.Key {
		case AccountID:
		case ServiceName:
		case ServiceType, ServiceGroupID:
			if u.Service == "" { // the resource says itself of which type it is
				if all {
					return false
				}
				continue
			}
		default:
			if all {
				return false
			}
			continue
		}
		if !a.covers(r.catalog, resource) {
			return false
		}
	}
	return true
}

// fits reports whether some, or all, of the values meet the demand.
func (a Attribute) fits(v Values, all bool) bool {
	if len(v.List) == 0 && !v.Absent && !v.Many {
		return true // nothing was touched: a list was asked for, and was empty
	}
	some := v.Many
	if v.Many && all {
		return false
	}
	for _, s := range v.List {
		if m := a.matches(s, true); m != all {
			return m
		}
	}
	if v.Absent {
		if m := a.matches("", false); m != all {
			return m
		}
	}
	return all || some
}

// unused lists what a policy allows and was not used, in the services that it
// names or was used in.
func (r *recommender) unused(n *needs) {
	services := map[string]bool{}
	if name, ok := Get(n.Policy.Resource, ServiceName); ok {
		services[name] = true
	} else {
		n.Wider = true
	}
	used := map[string]actionSet{}
	note := func(list []ActionUse) {
		for _, u := range list {
			name := u.Service
			if fixed, ok := Get(n.Policy.Resource, ServiceName); ok {
				name = fixed // and not a child of it
			}
			if name == "" {
				continue
			}
			services[name] = true
			if used[name] == nil {
				used[name] = actionSet{}
			}
			used[name][u.Action] = struct{}{}
		}
	}
	note(n.Used)
	for _, name := range slices.Sorted(maps.Keys(services)) {
		var left []string
		for a := range r.granted(n.Policy.Roles, name) {
			if _, ok := used[name][a]; !ok {
				left = append(left, a)
			}
		}
		if len(left) > 0 {
			slices.Sort(left)
			n.Unused = append(n.Unused, ServiceActions{name, left})
		}
	}
}

func (r *recommender) granted(roles []string, service string) actionSet {
	out := actionSet{}
	for _, role := range roles {
		for _, a := range r.catalog.Actions(role, service) {
			out[a] = struct{}{}
		}
	}
	return out
}

// advise gathers the use of a policy and looks for a smaller one.
func (r *recommender) advise(p *Policy) Advice {
	n := r.observe(p)
	a := n.Advice
	if len(n.services) == 0 {
		a.Verdict = Remove
	} else if smaller, changed := r.smaller(p, n.services); changed {
		a.Verdict, a.Smaller = Narrow, smaller
	}
	observed := r.now.Sub(a.Since)
	if a.Verdict != Keep && (r.missed || observed < min(r.q.Window, EnoughWindow)) {
		a.Verdict = Undecided
	}
	a.Warnings = r.warnings(&a, observed)
	return a
}

const day = 24 * time.Hour

func (r *recommender) warnings(a *Advice, observed time.Duration) []string {
	if a.Verdict == Keep {
		return nil
	}
	var out []string
	if r.missed {
		out = append(out, "some of its use is not known: there were more kinds of it than are remembered")
	}
	seen := fmt.Sprintf("its use has been observed for %d days", int(min(observed, r.q.Window)/day))
	switch seen := min(observed, r.q.Window); {
	case seen < 32*day:
		out = append(out, "a job that runs once a month may not have been seen")
	case seen < 93*day:
		out = append(out, "a job that runs once a quarter may not have been seen")
	}
	if len(out) > 0 {
		out[len(out)-1] = seen + ": " + out[len(out)-1]
	}
	for _, u := range a.Earlier {
		if !slices.ContainsFunc(a.Smaller, func(s Smaller) bool { return r.still(s.Policy, u) }) {
			out = append(out, fmt.Sprintf("%s was used before the window, last on %s, and would be lost", u.Action, u.Last.UTC().Format(time.DateOnly)))
		}
	}
	return out
}

// still reports whether a policy allows an action, whatever else it demands of
// the resource than its service.
func (r *recommender) still(p *Policy, u ActionUse) bool {
	service := map[string]string{ServiceName: u.Service}
	return slices.ContainsFunc(p.Roles, func(role string) bool { return r.catalog.Grants(role, u.Service, u.Action) }) &&
		!slices.ContainsFunc(p.Resource, func(a Attribute) bool { return a.Key == ServiceName && !a.covers(r.catalog, service) })
}

// smaller returns what would take a policy's place, and whether it is smaller.
func (r *recommender) smaller(p *Policy, services map[string]*need) ([]Smaller, bool) {
	fixed, isFixed := Get(p.Resource, ServiceName)
	has := func(key string) bool {
		return slices.ContainsFunc(p.Resource, func(a Attribute) bool { return a.Key == key })
	}
	_, several := services[""]
	switch {
	case isFixed:
		all := &need{actions: actionSet{}}
		first := true
		for _, name := range slices.Sorted(maps.Keys(services)) {
			if first {
				all.touched, first = services[name].touched, false
			}
			all.add(services[name])
		}
		s, changed := r.one(p, fixed, all)
		return []Smaller{s}, changed
	case several || has(ServiceGroupID) || len(services) > MaxAnyOf:
		// About services as such: it stays so, with the roles that were used.
		s, changed := r.across(p, services)
		return []Smaller{s}, changed
	}
	var out []Smaller
	for _, name := range slices.Sorted(maps.Keys(services)) {
		of := *p
		of.Resource = replace(p.Resource, Attribute{ServiceName, StringEquals, Text(name)})
		s, _ := r.one(&of, name, services[name])
		if len(out) > 0 {
			s.Policy.ID = ""
		}
		out = append(out, s)
	}
	return out, true
}

// replace returns attributes with one of them set, the account's last as
// clients write it.
func replace(attrs []Attribute, a Attribute) []Attribute {
	out := slices.DeleteFunc(slices.Clone(attrs), func(old Attribute) bool { return old.Key == a.Key })
	at := slices.IndexFunc(out, func(old Attribute) bool { return old.Key == AccountID })
	if at < 0 {
		at = len(out)
	}
	return slices.Insert(out, at, a)
}

// copyOf returns what a policy allows to whom, in the form of version 2.
func copyOf(p *Policy) *Policy {
	return &Policy{
		ID: p.ID, AccountID: p.AccountID, API: 2, Type: p.Type, Description: p.Description, State: Active,
		Subject: p.Subject, Resource: p.Resource, Tags: p.Tags, Roles: p.Roles, Pattern: p.Pattern, Rule: p.Rule,
	}
}

// one makes a policy about one service smaller.
func (r *recommender) one(p *Policy, service string, n *need) (Smaller, bool) {
	out := Smaller{Policy: copyOf(p)}
	var narrower bool
	out.Policy.Resource, narrower = narrowed(p.Resource, n.touched)
	allowed := r.granted(p.Roles, service)
	chosen := cover(n.actions, allowed, r.candidates(service))
	if chosen == nil {
		chosen = p.Roles
	}
	beyond := less(r.granted(chosen, service), n.actions)
	if r.q.CustomRole && len(beyond) > 0 {
		if role := r.customRole(p, service, n.actions); role != nil {
			out.Role, chosen, beyond = role, []string{role.CRN()}, nil
		}
	}
	if len(beyond)+len(n.actions) < len(allowed) {
		narrower = true
	} else if !slices.ContainsFunc(p.Roles, func(role string) bool { return !r.catalog.HasRole(role, service) }) {
		chosen, out.Role = p.Roles, nil // which may read better, and allow the same
	}
	out.Policy.Roles = chosen
	if len(beyond) > 0 {
		out.Beyond = []ServiceActions{{service, beyond}}
	}
	return out, narrower
}

// candidates returns the roles that a policy about a service can grant.
func (r *recommender) candidates(service string) []candidate {
	if known, ok := r.roles[service]; ok {
		return known
	}
	system, own := r.catalog.RolesOf(service)
	roles := slices.Concat(system, own)
	if s, ok := r.catalog.Service(service); ok {
		roles = s.Roles // custom ones, too
	}
	out := make([]candidate, len(roles))
	for i, role := range roles {
		out[i] = candidate{role.CRN, r.catalog.Actions(role.CRN, service)}
	}
	r.roles[service] = out
	return out
}

func less(all, without actionSet) []string {
	var out []string
	for a := range all {
		if _, ok := without[a]; !ok {
			out = append(out, a)
		}
	}
	slices.Sort(out)
	return out
}

// across makes a policy about many services smaller.
func (r *recommender) across(p *Policy, services map[string]*need) (Smaller, bool) {
	out := Smaller{Policy: copyOf(p)}
	all := &need{actions: actionSet{}}
	first := true
	names := slices.Sorted(maps.Keys(services))
	for _, name := range names {
		n := services[name]
		if first {
			all.touched, first = n.touched, false
		}
		all.add(&need{touched: n.touched})
		for a := range n.actions {
			all.actions[name+"\x00"+a] = struct{}{}
		}
	}
	var narrower bool
	out.Policy.Resource, narrower = narrowed(p.Resource, all.touched)
	pairs := func(role string) []string {
		var out []string
		for _, name := range names {
			for _, a := range r.catalog.Actions(role, name) {
				out = append(out, name+"\x00"+a)
			}
		}
		return out
	}
	allowed := actionSet{}
	var candidates []candidate
	for _, role := range p.Roles {
		candidates = append(candidates, candidate{role, pairs(role)})
		for _, a := range candidates[len(candidates)-1].actions {
			allowed[a] = struct{}{}
		}
	}
	if chosen := cover(all.actions, allowed, candidates); chosen != nil && len(chosen) < len(p.Roles) {
		out.Policy.Roles, narrower = chosen, true
	}
	for _, name := range names {
		if name == "" {
			continue
		}
		if beyond := less(r.granted(out.Policy.Roles, name), services[name].actions); len(beyond) > 0 {
			out.Beyond = append(out.Beyond, ServiceActions{name, beyond})
		}
	}
	return out, narrower
}

// narrowed returns resource attributes that name what was touched, as far as
// that was little, and whether that says less.
func narrowed(attrs []Attribute, t Touched) ([]Attribute, bool) {
	out, changed := attrs, false
	for _, key := range []string{Region, ResourceGroupID, ResourceType, ServiceInstance} {
		v, _ := t.Of(key)
		i := slices.IndexFunc(attrs, func(a Attribute) bool { return a.Key == key })
		if i < 0 && v.Absent || v.Many {
			continue
		}
		values := slices.Sorted(slices.Values(v.List))
		if i >= 0 {
			values = slices.DeleteFunc(values, func(s string) bool { return !attrs[i].matches(s, true) })
			if v.Absent && attrs[i].matches("", false) || attrs[i].names(len(values)) {
				continue
			}
		}
		if len(values) == 0 || len(values) > MaxNamed {
			continue
		}
		a := Attribute{key, StringEquals, Text(values[0])}
		if len(values) > 1 {
			a = Attribute{key, StringEqualsAnyOf, Value{List: values}}
		}
		out, changed = replace(out, a), true
	}
	return out, changed
}

// names reports whether a demand admits no more than n values already.
func (a Attribute) names(n int) bool {
	literal := func(s string) bool { return !strings.ContainsAny(s, "*?") }
	switch a.Operator {
	case StringEquals:
		return true
	case StringMatch:
		return literal(a.Value.Text)
	case StringEqualsAnyOf:
		return len(a.Value.List) <= n
	case StringMatchAnyOf:
		return len(a.Value.List) <= n && !slices.ContainsFunc(a.Value.List, func(s string) bool { return !literal(s) })
	}
	return false
}

// customRole makes a role of exactly some actions, or returns nil where the
// rules for custom roles do not admit it.
func (r *recommender) customRole(p *Policy, service string, actions actionSet) *CustomRole {
	s, ok := r.catalog.Service(service)
	if !ok {
		return nil
	}
	role := &CustomRole{
		AccountID: r.AccountID, Service: s.Name, Actions: slices.Sorted(maps.Keys(actions)),
		Description: "What policy " + p.ID + " was used for.",
	}
	sum := sha256.Sum256([]byte(p.ID + "\x00" + service + "\x00" + strings.Join(role.Actions, "\x00")))
	mark := hex.EncodeToString(sum[:8])
	role.Name, role.DisplayName = "Used"+mark, fmt.Sprintf("Used in %.24s %s", s.Name, mark)
	if role.Validate(r.catalog) != nil {
		return nil
	}
	// The name can be foreseen. Whoever may make roles, and no policies, could
	// have made this one, with other actions.
	if _, taken := r.catalog.Role(role.CRN()); taken {
		return nil
	}
	return role
}

// dropDoubles takes out of the smaller policies the roles that another policy
// of the same subject on the same resources has: two such policies are refused.
func dropDoubles(own []Advice) {
	var final []*Policy
	for i := range own {
		if len(own[i].Smaller) == 0 && own[i].Verdict == Keep {
			final = append(final, own[i].Policy)
		}
	}
	for i := range own {
		a := &own[i]
		if len(a.Smaller) == 0 {
			continue
		}
		var left []Smaller
		for _, s := range a.Smaller {
			for _, other := range final {
				if !s.Policy.SameGrant(other) {
					continue
				}
				rest := slices.DeleteFunc(slices.Clone(s.Policy.Roles), func(role string) bool { return slices.Contains(other.Roles, role) })
				s.Policy.Roles = rest
				if other.ID != "" && !slices.Contains(a.Instead, other.ID) {
					a.Instead = append(a.Instead, other.ID)
				}
			}
			if len(s.Policy.Roles) > 0 {
				s.Policy.ID = ""
				if len(left) == 0 {
					s.Policy.ID = a.Policy.ID
				}
				left = append(left, s)
				final = append(final, s.Policy)
			}
		}
		if a.Smaller = left; len(left) == 0 && a.Verdict == Narrow {
			a.Verdict = Remove
		}
	}
}

// changes puts advice into steps. What goes, goes first: it was not used, or
// something else allows the same, and it may be in the way. Then each step is
// one that no policy which is there at that time conflicts with, if there is
// such a step.
func changes(before []*Policy, own []Advice) []Change {
	var out, rest []Change
	there := slices.Clone(before)
	without := func(id string) {
		there = slices.DeleteFunc(there, func(p *Policy) bool { return p.ID == id })
	}
	for _, a := range own {
		if a.Verdict != Keep && len(a.Smaller) == 0 {
			out = append(out, Change{Remove: a.Policy.ID, Undecided: a.Verdict == Undecided})
			without(a.Policy.ID)
		}
		for _, s := range a.Smaller {
			undecided := a.Verdict == Undecided
			if s.Role != nil {
				out = append(out, Change{Role: s.Role, Undecided: undecided})
			}
			if s.Policy.ID != "" {
				rest = append(rest, Change{Update: s.Policy, Undecided: undecided})
			} else {
				rest = append(rest, Change{Create: s.Policy, Undecided: undecided})
			}
		}
	}
	for len(rest) > 0 {
		next := max(0, slices.IndexFunc(rest, func(c Change) bool {
			p := cmp.Or(c.Update, c.Create)
			return !slices.ContainsFunc(there, func(q *Policy) bool { return q.ID != p.ID && p.SameGrant(q) })
		}))
		c := rest[next]
		rest = slices.Delete(rest, next, next+1)
		if c.Update != nil {
			without(c.Update.ID)
		}
		there = append(there, cmp.Or(c.Update, c.Create))
		out = append(out, c)
	}
	return out
}
