package resourcecontroller

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/vpc"
)

// groupType is the resource type of group objects in policies and CRNs.
const groupType = "resource-group"

// maxGroupName is our bound in characters; the reference has none.
const maxGroupName = 100

// States of a group. Nothing new is created in a suspended one.
const (
	stateActive    = "ACTIVE"
	stateSuspended = "SUSPENDED"
)

func (r *routes) registerGroups() {
	api.List(r.Family, "GET /v2/resource_groups", groupRetrieve, listGroups)
	api.Change(r.Family, "POST /v2/resource_groups", "resource-controller.group.create", "resource-controller.group.create", loadNewGroup, createGroup)
	api.Read(r.Family, "GET /v2/resource_groups/{id}", groupRetrieve, loadGroup, showGroup)
	api.Change(r.Family, "PATCH /v2/resource_groups/{id}", "resource-controller.group.update", "resource-controller.group.update", loading[groupPatch](loadGroup), updateGroup)
	api.Change(r.Family, "DELETE /v2/resource_groups/{id}", "resource-controller.group.delete", "resource-controller.group.delete", loading[api.None](loadGroup), deleteGroup)
	const constant = "quotas are the same constants for everybody"
	api.Open(r.Family, "GET /v2/quota_definitions", constant, listQuotas)
	api.Open(r.Family, "GET /v2/quota_definitions/{id}", constant, showQuota)
}

const groupRetrieve = "resource-controller.group.retrieve"

type groupBody struct {
	ID                string   `json:"id"`
	CRN               string   `json:"crn"`
	AccountID         string   `json:"account_id"`
	Name              string   `json:"name"`
	State             string   `json:"state"`
	Default           bool     `json:"default"`
	QuotaID           string   `json:"quota_id"`
	QuotaURL          string   `json:"quota_url"`
	PaymentMethodsURL string   `json:"payment_methods_url"`
	ResourceLinkages  []string `json:"resource_linkages"`
	TeamsURL          string   `json:"teams_url"`
	CreatedAt         string   `json:"created_at"`
	UpdatedAt         string   `json:"updated_at"`
}

func encodeGroup(c *api.Call, g *resource.Group) groupBody {
	self := c.URL + "/v2/resource_groups/" + url.PathEscape(g.ID)
	return groupBody{
		ID: g.ID, CRN: groupCRN(c, g.ID), AccountID: g.AccountID, Name: g.Name, State: groupState(g), Default: g.Default,
		QuotaID: defaultQuota, QuotaURL: c.URL + "/v2/quota_definitions/" + defaultQuota,
		PaymentMethodsURL: self + "/payment_methods", ResourceLinkages: []string{}, TeamsURL: self + "/teams",
		CreatedAt: stamp(g.CreatedAt), UpdatedAt: stamp(g.ModifiedAt),
	}
}

func groupState(g *resource.Group) string {
	if g.State == "" {
		return stateActive
	}
	return g.State
}

func groupCRN(c *api.Call, id string) string {
	return c.Names.Of(service, "", c.Account(), "", groupType, id).String()
}

// groupResource are the attributes of the group object itself, which a policy
// names by resource type and id. What the group holds is named by the
// attribute resourceGroupId instead (reference/access-and-audit.md section
// 2.2).
func groupResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, groupType, access.Resource, id)
}

func groupTarget(c *api.Call, g *resource.Group) api.Target {
	return api.Target{Resource: groupResource(c, g.ID), CRN: groupCRN(c, g.ID), Name: g.Name, TypeURI: "resource-controller/group"}
}

func findGroup(c *api.Call, id string) (*resource.Group, error) {
	g, ok := c.Directory.ResourceGroups.Get(id)
	if !ok || g.AccountID != c.Account() {
		return nil, api.NotFound("resource group", id)
	}
	return g, nil
}

// listGroups has no paging (reference/access-and-audit.md section 5.3). The
// parameters date and include_deleted are about deleted groups; these are not
// kept, so both are checked and change nothing.
func listGroups(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	q := c.R.URL.Query()
	def, err := boolParameter(c, "default")
	if err == nil {
		_, err = boolParameter(c, "include_deleted")
	}
	if err != nil {
		return api.Reply{}, err
	}
	if date := q.Get("date"); date != "" {
		if _, err := time.Parse("2006-01", date); err != nil {
			return api.Reply{}, invalidParameter("date", date, "a month such as 2026-01")
		}
	}
	out := []groupBody{}
	for _, g := range c.Directory.ResourceGroupsByAccount.Get(c.Account()) {
		switch {
		case q.Has("account_id") && q.Get("account_id") != g.AccountID,
			q.Has("name") && q.Get("name") != g.Name,
			def != "" && (def == "true") != g.Default,
			!may(groupResource(c, g.ID)):
		default:
			out = append(out, encodeGroup(c, g))
		}
	}
	slices.SortFunc(out, func(a, b groupBody) int { return strings.Compare(a.Name, b.Name) })
	return api.Reply{Body: map[string]any{"resources": out}}, nil
}

// boolParameter returns "true", "false" or, when the parameter is not there, "".
func boolParameter(c *api.Call, name string) (string, error) {
	s := c.R.URL.Query().Get(name)
	if s != "" && s != "true" && s != "false" {
		return "", invalidParameter(name, s, "true or false")
	}
	return s, nil
}

func invalidParameter(name, value, wanted string) error {
	return fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be %s.", name, wanted).OnParameter(name, value)
}

type newGroup struct {
	Name      string `json:"name"`
	AccountID string `json:"account_id"`
}

func loadNewGroup(c *api.Call, b *newGroup) (*resource.Group, api.Target, error) {
	g := &resource.Group{ID: bootstrap.NewAccountID(), AccountID: c.Account(), Name: b.Name}
	target := groupTarget(c, g)
	// A policy can be about one group; about one that does not exist yet only a
	// wider policy speaks.
	delete(target.Resource, access.Resource)
	if b.AccountID != "" {
		target.Resource[access.AccountID] = b.AccountID
	}
	return g, target, validGroupName(b.Name)
}

func validGroupName(name string) error {
	if strings.TrimSpace(name) == "" || !api.Printable(name, maxGroupName) {
		return api.Invalid("The field name must have 1 to %d printable characters.", maxGroupName).On("name")
	}
	return nil
}

func createGroup(c *api.Call, tx *directory.Tx, _ *newGroup, g *resource.Group) (api.Reply, api.Target, error) {
	c.Directory.ResourceGroups.Put(tx, g)
	return api.Reply{
		Status:       201,
		Body:         map[string]string{"id": g.ID, "crn": groupCRN(c, g.ID)},
		ResponseData: map[string]any{"id": g.ID, "name": g.Name},
	}, groupTarget(c, g), nil
}

func loadGroup(c *api.Call) (*resource.Group, api.Target, error) {
	g, err := findGroup(c, c.R.PathValue("id"))
	if err != nil {
		return nil, api.Target{}, err
	}
	return g, groupTarget(c, g), nil
}

func showGroup(c *api.Call, g *resource.Group) (api.Reply, error) {
	return api.Reply{Body: encodeGroup(c, g), ETag: g.Tag(g.ID)}, nil
}

type groupPatch struct {
	Name  *string `json:"name"`
	State *string `json:"state"`
}

func updateGroup(c *api.Call, tx *directory.Tx, b *groupPatch, old *resource.Group) (api.Reply, api.Target, error) {
	if err := c.IfMatch(&old.Meta, old.ID, false); err != nil {
		return api.Reply{}, groupTarget(c, old), err
	}
	g := *old
	changed := map[string]any{}
	if b.State != nil {
		if *b.State != stateActive && *b.State != stateSuspended {
			return api.Reply{}, groupTarget(c, old), api.Invalid("The field state must be %s or %s.", stateActive, stateSuspended).On("state")
		}
		g.State = *b.State
		changed["old_state"], changed["new_state"] = groupState(old), g.State
	}
	if b.Name != nil {
		if err := validGroupName(*b.Name); err != nil {
			return api.Reply{}, groupTarget(c, old), err
		}
		g.Name = *b.Name
		changed["old_name"], changed["new_name"] = old.Name, g.Name
	}
	c.Directory.ResourceGroups.Put(tx, &g)
	return api.Reply{Body: encodeGroup(c, &g), ETag: g.Tag(g.ID), ResponseData: changed}, groupTarget(c, &g), nil
}

func deleteGroup(c *api.Call, tx *directory.Tx, _ *api.None, g *resource.Group) (api.Reply, api.Target, error) {
	target := groupTarget(c, g)
	if err := c.IfMatch(&g.Meta, g.ID, false); err != nil {
		return api.Reply{}, target, err
	}
	if g.Default {
		return api.Reply{}, target, fault.New(fault.Invalid, "default_group",
			"The resource group %q is the account's default one; it cannot be deleted.", g.Name)
	}
	if held := contents(c.Directory, g); len(held) > 0 {
		return api.Reply{}, target, fault.New(fault.Conflict, "group_not_empty",
			"The resource group %q still holds %s; delete them first.", g.Name, strings.Join(held, ", "))
	}
	c.Directory.ResourceGroups.Delete(tx, g)
	return api.Reply{Status: 204}, target, nil
}

// contents says how many objects of which kind a group holds. It walks the
// account's objects: deleting a group is rare and not worth an index.
func contents(d *directory.Directory, g *resource.Group) []string {
	var held []string
	add := func(n int, noun string) {
		if n == 1 {
			held = append(held, "1 "+noun)
		} else if n > 1 {
			held = append(held, fmt.Sprintf("%d %ss", n, noun))
		}
	}
	a := g.AccountID
	add(count(d.ResourcesByAccount, a, func(i *resource.Instance) bool { return i.GroupID == g.ID && i.State != resource.StateRemoved }), "resource instance")
	add(count(d.ClustersByAccount, a, func(x *cluster.Cluster) bool { return x.ResourceGroupID == g.ID }), "cluster")
	add(count(d.VPCsByAccount, a, func(x *vpc.VPC) bool { return x.ResourceGroupID == g.ID }), "VPC")
	add(count(d.SubnetsByAccount, a, func(x *vpc.Subnet) bool { return x.ResourceGroupID == g.ID }), "subnet")
	add(count(d.KeysByAccount, a, func(x *vpc.Key) bool { return x.ResourceGroupID == g.ID }), "SSH key")
	add(count(d.InstancesByAccount, a, func(x *vpc.Instance) bool { return x.ResourceGroupID == g.ID }), "virtual server instance")
	add(count(d.FloatingIPsByAccount, a, func(x *vpc.FloatingIP) bool { return x.ResourceGroupID == g.ID }), "floating IP")
	return held
}

func count[T any](x *directory.Index[T], accountID string, in func(*T) bool) int {
	n := 0
	for _, row := range x.Get(accountID) {
		if in(row) {
			n++
		}
	}
	return n
}
