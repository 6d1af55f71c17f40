package clusters

import (
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// Actions on cluster groups.
const (
	groupList   = "containers-kubernetes.cluster-group.list"
	groupRead   = "containers-kubernetes.cluster-group.read"
	groupCreate = "containers-kubernetes.cluster-group.create"
	groupUpdate = "containers-kubernetes.cluster-group.update"
	groupDelete = "containers-kubernetes.cluster-group.delete"

	groupType = "cluster-group"
)

// Bounds on cluster groups. Each name of a cluster's groups is part of the
// evidence that any of its pods gives.
const (
	maxGroups           = 500 // of an account
	maxGroupsPerCluster = 50
	maxDescription      = 300  // characters
	maxInEvent          = 1000 // clusters that an event lists
)

func registerGroups(f *api.Family) {
	api.List(f, "GET /v1/cluster_groups", groupList, listGroups)
	api.Change(f, "POST /v1/cluster_groups", groupCreate, groupCreate, newGroup, createGroup)
	api.Read(f, "GET /v1/cluster_groups/{id}", groupRead, findGroup, showGroup)
	api.Change(f, "PATCH /v1/cluster_groups/{id}", groupUpdate, groupUpdate,
		func(c *api.Call, _ *groupInput) (*cluster.Group, api.Target, error) { return findGroup(c) }, updateGroup)
	api.Change(f, "DELETE /v1/cluster_groups/{id}", groupDelete, groupDelete,
		func(c *api.Call, _ *api.None) (*cluster.Group, api.Target, error) { return findGroup(c) }, deleteGroup)
	const member = "/v1/cluster_groups/{id}/clusters/{cluster}"
	api.Change(f, "PUT "+member, groupUpdate, "containers-kubernetes.cluster-group.add-cluster", findMembership, addMember)
	api.Change(f, "DELETE "+member, groupUpdate, "containers-kubernetes.cluster-group.remove-cluster", findMembership, removeMember)
}

// groupBody shows a cluster group. Clusters are those of its clusters that the
// reader may see; in a list they are left out.
type groupBody struct {
	ID          string      `json:"id"`
	CRN         string      `json:"crn"`
	AccountID   string      `json:"account_id"`
	Name        string      `json:"name"`
	Description string      `json:"description"`
	Size        int         `json:"cluster_count"`
	Clusters    []reference `json:"clusters,omitempty"`
	CreatedAt   time.Time   `json:"created_at"`
	CreatedBy   string      `json:"created_by"`
	ModifiedAt  time.Time   `json:"modified_at"`
	ModifiedBy  string      `json:"modified_by"`
	EntityTag   string      `json:"entity_tag"`
}

func encodeGroup(c *api.Call, g *cluster.Group) groupBody {
	return groupBody{
		ID: g.ID, CRN: g.CRN, AccountID: g.AccountID, Name: g.Name, Description: g.Description, Size: c.Directory.ClustersByGroup.Len(g.ID),
		CreatedAt: seconds(g.CreatedAt), CreatedBy: g.CreatedBy, ModifiedAt: seconds(g.ModifiedAt), ModifiedBy: g.ModifiedBy, EntityTag: g.Tag(g.ID),
	}
}

// groupsOf returns the groups that a cluster is in, by name.
func groupsOf(c *api.Call, k *cluster.Cluster) []reference {
	out := []reference{}
	for _, id := range k.GroupIDs {
		if g, ok := c.Directory.ClusterGroups.Get(id); ok && g.AccountID == k.AccountID {
			out = append(out, reference{ID: g.ID, Name: g.Name})
		}
	}
	slices.SortFunc(out, func(a, b reference) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func groupResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, groupType, access.Resource, id)
}

func groupTarget(c *api.Call, g *cluster.Group) api.Target {
	return api.Target{Resource: groupResource(c, g.ID), CRN: g.CRN, Name: g.Name, TypeURI: "containers-kubernetes/" + groupType}
}

func listGroups(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	rows := c.Directory.ClusterGroupsByAccount.Get(c.Account())
	slices.SortFunc(rows, func(a, b *cluster.Group) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := []groupBody{}
	for _, g := range rows {
		if may(groupResource(c, g.ID)) {
			out = append(out, encodeGroup(c, g))
		}
	}
	return api.Reply{Body: map[string]any{"cluster_groups": out}}, nil
}

func findGroup(c *api.Call) (*cluster.Group, api.Target, error) {
	g, err := groupBy(c, c.R.PathValue("id"))
	if err != nil {
		return nil, api.Target{}, err
	}
	return g, groupTarget(c, g), nil
}

// groupBy takes an id or a name; where one group's name is another one's id, the
// id counts.
func groupBy(c *api.Call, ref string) (*cluster.Group, error) {
	if g, ok := c.Directory.ClusterGroups.Get(ref); ok && g.AccountID == c.Account() {
		return g, nil
	}
	for _, g := range c.Directory.ClusterGroupsByAccount.Get(c.Account()) {
		if g.Name == ref {
			return g, nil
		}
	}
	return nil, api.NotFound("cluster group", ref)
}

func showGroup(c *api.Call, g *cluster.Group) (api.Reply, error) {
	answer := encodeGroup(c, g)
	for _, k := range members(c, g) {
		if c.May(actionRead, resourceOf(c, k)) {
			answer.Clusters = append(answer.Clusters, reference{ID: k.ID, Name: k.Name})
		}
	}
	return api.Reply{Body: answer, ETag: answer.EntityTag}, nil
}

// members returns a group's clusters, by name.
func members(c *api.Call, g *cluster.Group) []*cluster.Cluster {
	rows := c.Directory.ClustersByGroup.Get(g.ID)
	slices.SortFunc(rows, func(a, b *cluster.Cluster) int { return strings.Compare(a.Name, b.Name) })
	return rows
}

// groupInput is the body of a creation or a change.
type groupInput struct {
	Name        *string `json:"name"`
	Description *string `json:"description"`
}

func newGroup(c *api.Call, b *groupInput) (*cluster.Group, api.Target, error) {
	g := &cluster.Group{ID: "ClusterGroup-" + uuid.NewString(), AccountID: c.Account()}
	g.CRN = c.Names.Of(service, "", g.AccountID, "", groupType, g.ID).String()
	if b.Name != nil {
		g.Name = *b.Name
	}
	if b.Description != nil {
		g.Description = *b.Description
	}
	if !groupName(g.Name) {
		return nil, api.Target{}, api.Invalid("The field name must have 1 to %d letters, digits, spaces and characters of -_. and no space at its ends.", maxName).On("name")
	}
	return g, groupTarget(c, g), checkDescription(g)
}

// groupName keeps names to what means nothing else where they stand: in the
// conditions of rules, which have commas and colons in the command line and
// wildcards in the API, and in lists.
func groupName(s string) bool {
	return s != "" && api.Printable(s, maxName) && strings.TrimSpace(s) == s && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune(" -_.", r)
	})
}

func checkDescription(g *cluster.Group) error {
	if !api.Printable(g.Description, maxDescription) {
		return api.Invalid("The field description must have at most %d printable characters.", maxDescription).On("description")
	}
	return nil
}

func createGroup(c *api.Call, tx *directory.Tx, _ *groupInput, g *cluster.Group) (api.Reply, api.Target, error) {
	target := groupTarget(c, g)
	if n := c.Directory.ClusterGroupsByAccount.Len(g.AccountID); n >= maxGroups {
		return api.Reply{}, target, fault.New(fault.Conflict, "limit_exceeded", "The account has %d cluster groups, which is the limit.", n)
	}
	for _, other := range c.Directory.ClusterGroupsByAccount.Get(g.AccountID) {
		if other.Name == g.Name {
			return api.Reply{}, target, fault.New(fault.Conflict, "conflict", "A cluster group named %q already exists: see 'tabard ks cluster-group-get %s'.", g.Name, g.Name)
		}
	}
	c.Directory.ClusterGroups.Put(tx, g)
	answer := encodeGroup(c, g)
	return api.Reply{
		Status: http.StatusCreated, Body: answer, ETag: answer.EntityTag,
		ResponseData: map[string]any{"id": g.ID, "name": g.Name, "description": g.Description},
	}, target, nil
}

// updateGroup changes the description. The name stays: rules name groups by it,
// and a new one would change, without a change to any rule, whom they admit.
func updateGroup(c *api.Call, tx *directory.Tx, b *groupInput, old *cluster.Group) (api.Reply, api.Target, error) {
	target := groupTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, false); err != nil {
		return api.Reply{}, target, err
	}
	if b.Name != nil && *b.Name != old.Name {
		return api.Reply{}, target, api.Invalid("The name of a cluster group cannot be changed: rules name groups by it. Make another group, put the clusters into it, and change the rules.").On("name")
	}
	g := *old
	if b.Description != nil {
		g.Description = *b.Description
	}
	if err := checkDescription(&g); err != nil {
		return api.Reply{}, target, err
	}
	if g != *old {
		c.Directory.ClusterGroups.Put(tx, &g)
	}
	answer := encodeGroup(c, &g)
	return api.Reply{
		Body: answer, ETag: answer.EntityTag,
		ResponseData: map[string]any{"id": g.ID, "description": g.Description, "prev_description": old.Description},
	}, target, nil
}

// deleteGroup takes the group's clusters out of it. Rules that name it match
// nothing from then on, until somebody who may make groups makes one with this
// name.
func deleteGroup(c *api.Call, tx *directory.Tx, _ *api.None, g *cluster.Group) (api.Reply, api.Target, error) {
	target := groupTarget(c, g)
	if err := c.IfMatch(&g.Meta, g.ID, false); err != nil {
		return api.Reply{}, target, err
	}
	left := []reference{}
	rows := members(c, g)
	for _, k := range rows {
		next := *k
		next.GroupIDs = without(k.GroupIDs, []string{g.ID})
		c.Directory.Clusters.Put(tx, &next)
		if len(left) < maxInEvent {
			left = append(left, reference{ID: k.ID, Name: k.Name})
		}
	}
	c.Directory.ClusterGroups.Delete(tx, g)
	return api.Reply{
		Status:       http.StatusNoContent,
		ResponseData: map[string]any{"id": g.ID, "name": g.Name, "cluster_count": len(rows), "clusters": left},
	}, target, nil
}

// membership is a group and a cluster that is to be in it, or not.
type membership struct {
	group   *cluster.Group
	cluster *cluster.Cluster
}

func findMembership(c *api.Call, _ *api.None) (membership, api.Target, error) {
	g, target, err := findGroup(c)
	if err != nil {
		return membership{}, target, err
	}
	k, _, err := findBy(c, c.R.PathValue("cluster"))
	return membership{g, k}, target, err
}

// authorize asks for the right over the cluster, beside the route's own over the
// group: rules that name the group let the cluster's pods through, so both are
// changed by it.
func (m membership) authorize(c *api.Call) error {
	return c.Authorize(actionUpdate, resourceOf(c, m.cluster))
}

func addMember(c *api.Call, tx *directory.Tx, _ *api.None, m membership) (api.Reply, api.Target, error) {
	target := groupTarget(c, m.group)
	if err := m.authorize(c); err != nil {
		return api.Reply{}, target, err
	}
	next := *m.cluster
	added, err := join(&next, m.group)
	if err != nil {
		return api.Reply{}, target, err
	}
	if added {
		c.Directory.Clusters.Put(tx, &next)
	}
	return api.Reply{Body: encode(c, &next), ETag: next.Tag(next.ID), ResponseData: m.event("added", added)}, target, nil
}

func removeMember(c *api.Call, tx *directory.Tx, _ *api.None, m membership) (api.Reply, api.Target, error) {
	target := groupTarget(c, m.group)
	if err := m.authorize(c); err != nil {
		return api.Reply{}, target, err
	}
	next := *m.cluster
	next.GroupIDs = without(m.cluster.GroupIDs, []string{m.group.ID})
	removed := len(next.GroupIDs) < len(m.cluster.GroupIDs)
	if removed {
		c.Directory.Clusters.Put(tx, &next)
	}
	return api.Reply{Status: http.StatusNoContent, ResponseData: m.event("removed", removed)}, target, nil
}

func (m membership) event(what string, happened bool) map[string]any {
	return map[string]any{
		"id": m.group.ID, "name": m.group.Name, "cluster_id": m.cluster.ID, "cluster_name": m.cluster.Name, "cluster_crn": m.cluster.CRN, what: happened,
	}
}

// join puts a cluster into a group, and reports whether it was not in it.
func join(k *cluster.Cluster, g *cluster.Group) (bool, error) {
	at, in := slices.BinarySearch(k.GroupIDs, g.ID)
	if in {
		return false, nil
	}
	if len(k.GroupIDs) >= maxGroupsPerCluster {
		return false, fault.New(fault.Conflict, "limit_exceeded", "The cluster %q is in %d cluster groups, which is the limit.", k.Name, len(k.GroupIDs))
	}
	k.GroupIDs = slices.Insert(slices.Clone(k.GroupIDs), at, g.ID)
	return true, nil
}

// joinGroups puts a new cluster into the groups that its registration names, and
// into no others. Each of them needs the right to change it.
func joinGroups(c *api.Call, k *cluster.Cluster, refs []string) error {
	k.GroupIDs = nil
	if len(refs) > maxGroupsPerCluster {
		return api.Invalid("The field groups must have at most %d cluster groups.", maxGroupsPerCluster).On("groups")
	}
	for _, ref := range refs {
		g, err := groupBy(c, ref)
		if err != nil {
			return err
		}
		if err := c.Authorize(groupUpdate, groupResource(c, g.ID)); err != nil {
			return err
		}
		if _, err := join(k, g); err != nil {
			return err
		}
	}
	return nil
}
