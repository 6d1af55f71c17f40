package iampolicy

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

const (
	account = "0123456789abcdef0123456789abcdef"
	writer  = "IBMid-WRITER"
)

// list is a view of one subject's policies.
type list struct {
	policies []*access.Policy
	catalog  *access.Catalog
}

func (l list) GroupsOf(string, string, time.Time) []string        { return nil }
func (l list) PoliciesOf(string, string, string) []*access.Policy { return l.policies }
func (l list) Interaction(string) *access.Settings                { return nil }
func (l list) AuthorizationsOn(string, string) []*access.Policy   { return nil }
func (l list) Catalog(string) *access.Catalog                     { return l.catalog }

// Moments inside and outside of the windows of rules.
var (
	monday   = time.Date(2030, 1, 7, 12, 0, 0, 0, time.UTC)
	saturday = time.Date(2030, 1, 12, 12, 0, 0, 0, time.UTC)
)

// allows reports whether the policies let their subject write policies about a
// resource.
func allows(v access.View, resource map[string]string, at time.Time) bool {
	return access.Decide(v, access.Request{Subject: writer, AccountID: account, Action: actionCreate, Resource: resource, Time: at}).Allowed
}

// covers asks what authorize asks.
func covers(v access.View, p *access.Policy) bool {
	for _, s := range scopes(p.Resource) {
		if !allows(v, s, monday) || !allows(throughout{View: v, of: p, why: give}, s, monday) {
			return false
		}
	}
	return true
}

func attribute(k string, o access.Operator, v access.Value) access.Attribute {
	return access.Attribute{Key: k, Operator: o, Value: v}
}

func administrator(block []access.Attribute) *access.Policy {
	return &access.Policy{AccountID: account, Resource: block, Roles: []string{access.PlatformRoleCRN("Administrator")}}
}

func condition(key, operator, value string) access.Rule {
	return access.Rule{Key: key, Operator: operator, Value: json.RawMessage(value)}
}

var (
	onWeekdays = condition(access.KeyDayOfWeek, "dayOfWeekAnyOf", `["1+00:00","2+00:00","3+00:00","4+00:00","5+00:00"]`)
	onMonday   = condition(access.KeyDayOfWeek, "dayOfWeekEquals", `"1+00:00"`)
	inUS       = condition("{{resource.attributes.region}}", "stringMatch", `"us-*"`)
	nowhere    = condition("{{resource.attributes.region}}", "stringExists", `false`)
	ungrouped  = condition("{{resource.attributes.resourceGroupId}}", "stringExists", `false`)
)

// randomRule returns a rule for one policy in two.
func randomRule(r *rand.Rand) *access.Rule {
	rules := []access.Rule{
		onWeekdays, onMonday, inUS, nowhere,
		{Operator: access.And, Conditions: []access.Rule{onWeekdays, onMonday}},
		{Operator: access.Or, Conditions: []access.Rule{inUS, nowhere}},
		{Operator: access.Or, Conditions: []access.Rule{onMonday, ungrouped}},
		{Operator: access.And, Conditions: []access.Rule{{Operator: access.Or, Conditions: []access.Rule{nowhere, inUS}}, ungrouped}},
	}
	if n := r.IntN(2 * len(rules)); n < len(rules) {
		return &rules[n]
	}
	return nil
}

var values = map[string][]string{
	access.ServiceName:     {"is", "is.instance", "kms", "iam-identity", "resource-controller", "unknown"},
	access.ServiceType:     {access.KindService, access.KindPlatform},
	access.ServiceGroupID:  {"IAM", "other"},
	access.ResourceGroupID: {"rg-1", "rg-2"},
	access.Region:          {"us-south", "eu-de"},
}

var keys = []string{access.ServiceName, access.ServiceType, access.ServiceGroupID, access.ResourceGroupID, access.Region}

// randomBlock returns a resource block with about two attributes besides the
// account. Each of those of like is taken over with even odds.
func randomBlock(r *rand.Rand, like []access.Attribute) []access.Attribute {
	block := []access.Attribute{attribute(access.AccountID, access.StringEquals, access.Text(account))}
	one := func(from []string) string { return from[r.IntN(len(from))] }
	for _, key := range keys {
		i := slices.IndexFunc(like, func(a access.Attribute) bool { return a.Key == key })
		if i >= 0 && r.IntN(2) == 0 {
			block = append(block, like[i])
			continue
		}
		switch r.IntN(14) {
		case 0, 1, 2:
			block = append(block, attribute(key, access.StringEquals, access.Text(one(values[key]))))
		case 3:
			pattern := one([]string{"*", "us-*", "i*", "??-1", "*service"})
			block = append(block, attribute(key, access.StringMatch, access.Text(pattern)))
		case 4:
			exists := r.IntN(2) == 0
			block = append(block, attribute(key, access.StringExists, access.Value{Exists: &exists}))
		case 5:
			list := []string{one(values[key]), one(values[key])}
			block = append(block, attribute(key, access.StringEqualsAnyOf, access.Value{List: list}))
		}
	}
	return block
}

// everyResource returns all resources that there can be with these values, as
// the services ask about them: always with the service, of which the kind and
// the group follow.
func everyResource() []map[string]string {
	all := []map[string]string{{access.AccountID: account}}
	for _, key := range []string{access.ServiceName, access.ResourceGroupID, access.Region} {
		var next []map[string]string
		for _, r := range all {
			if key != access.ServiceName {
				next = append(next, r)
			}
			for _, v := range values[key] {
				next = append(next, api.With(r, key, v))
			}
		}
		all = next
	}
	return all
}

func TestWhoMayWriteAPolicyAlreadyHasTheRightOnEveryResourceItCovers(t *testing.T) {
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	const rounds = 30_000
	r := rand.New(rand.NewPCG(1, 2))
	resources := everyResource()
	written := 0
	for range rounds {
		first := randomBlock(r, nil)
		held := list{catalog: catalog, policies: []*access.Policy{administrator(first)}}
		for range r.IntN(3) {
			held.policies = append(held.policies, administrator(randomBlock(r, first)))
		}
		for _, p := range held.policies {
			p.Rule = randomRule(r)
		}
		next := administrator(randomBlock(r, first))
		if next.Rule = randomRule(r); r.IntN(2) == 0 {
			next.Rule = held.policies[0].Rule
		}
		if !covers(held, next) {
			continue
		}
		granted := list{catalog: catalog, policies: []*access.Policy{next}}
		for _, at := range []time.Time{monday, saturday} {
			for _, resource := range resources {
				if !allows(granted, resource, at) {
					continue
				}
				written++
				if !allows(held, resource, at) {
					for _, p := range held.policies {
						t.Log("holding", p.Resource, p.Rule)
					}
					t.Fatalf("on %s the writer may not administer %v and may give it away by %v %v", at.Weekday(), resource, next.Resource, next.Rule)
				}
			}
		}
	}
	if written < rounds {
		t.Errorf("only %d resources were given away in %d rounds; the test proves little", written, rounds)
	}
}

func TestAdministratorMayWriteAPolicyLikeHisOwnWhenItFixesEveryAttribute(t *testing.T) {
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	equals := func(pairs ...string) []access.Attribute {
		block := []access.Attribute{attribute(access.AccountID, access.StringEquals, access.Text(account))}
		for i := 0; i < len(pairs); i += 2 {
			block = append(block, attribute(pairs[i], access.StringEquals, access.Text(pairs[i+1])))
		}
		return block
	}
	for _, block := range [][]access.Attribute{
		equals(access.ServiceName, "is"),
		equals(access.ServiceName, "is.instance"),
		equals(access.ServiceName, "is", "vpcId", "v-1"),
		equals(access.ServiceType, access.KindService),
		equals(access.ServiceType, access.KindPlatform),
		equals(access.ServiceGroupID, "IAM"),
		equals(access.ResourceGroupID, "rg-1"),
		equals(access.ResourceType, "resource-group", access.Resource, "rg-1"),
	} {
		p := administrator(block)
		if !covers(list{catalog: catalog, policies: []*access.Policy{p}}, p) {
			t.Errorf("refused on %v", block)
		}
	}
}

func TestTheServiceGroupHasTheServicesThatDecisionsPutIntoIt(t *testing.T) {
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	v := list{catalog: catalog, policies: []*access.Policy{administrator([]access.Attribute{
		attribute(access.AccountID, access.StringEquals, access.Text(account)),
		attribute(access.ServiceGroupID, access.StringEquals, access.Text(iamServiceGroup)),
	})}}
	for _, s := range catalog.Services() {
		in := allows(v, map[string]string{access.AccountID: account, access.ServiceName: s.Name}, monday)
		if want := slices.Contains(groupServices, s.Name); in != want {
			t.Errorf("%s is in the group: %t, want %t", s.Name, in, want)
		}
	}
}
