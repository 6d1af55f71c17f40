package iampolicy

import (
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
func (l list) AuthorizationsOn(string, string) []*access.Policy   { return nil }
func (l list) Catalog(string) *access.Catalog                     { return l.catalog }

// allows reports whether the policies let their subject write policies about a
// resource.
func allows(v access.View, resource map[string]string) bool {
	return access.Decide(v, access.Request{Subject: writer, AccountID: account, Action: actionCreate, Resource: resource}).Allowed
}

// covers asks what authorize asks.
func covers(v access.View, block []access.Attribute) bool {
	for _, s := range scopes(block) {
		if !allows(v, s) || !allows(throughout{View: v, block: block}, s) {
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
	const rounds = 100_000
	r := rand.New(rand.NewPCG(1, 2))
	resources := everyResource()
	written := 0
	for range rounds {
		first := randomBlock(r, nil)
		held := list{catalog: catalog, policies: []*access.Policy{administrator(first)}}
		for range r.IntN(3) {
			held.policies = append(held.policies, administrator(randomBlock(r, first)))
		}
		block := randomBlock(r, first)
		if !covers(held, block) {
			continue
		}
		granted := list{catalog: catalog, policies: []*access.Policy{administrator(block)}}
		for _, resource := range resources {
			if !allows(granted, resource) {
				continue
			}
			written++
			if !allows(held, resource) {
				for _, p := range held.policies {
					t.Log("holding", p.Resource)
				}
				t.Fatalf("the writer may not administer %v and may give it away by %v", resource, block)
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
		if !covers(list{catalog: catalog, policies: []*access.Policy{administrator(block)}}, block) {
			t.Errorf("refused on %v", block)
		}
	}
}
