// Package accessgroups is the API of access groups and their members
// (reference/access-and-audit.md section 4). A group's access is in policies
// whose subject it is; those belong to package iampolicy. Rules that make
// members from claims, the group Public Access and the calls about all groups
// of one identity are not here.
package accessgroups

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// Bounds of names (reference/access-and-audit.md section 4.4), in characters.
const (
	maxName        = 100
	maxDescription = 250
)

const (
	service      = "iam-groups"
	resourceType = "access-group"
)

// Register adds the routes of groups and members.
func Register(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Groups", Shape: shape}

	api.Change(f, "POST /v2/groups", "iam-groups.groups.create", "iam-groups.group.create", loadNew, create)
	api.List(f, "GET /v2/groups", "iam-groups.groups.list", list)
	api.Read(f, "GET /v2/groups/{id}", "iam-groups.groups.read", find("iam-groups/group"), read)
	api.Change(f, "PATCH /v2/groups/{id}", "iam-groups.groups.update", "iam-groups.group.update", findFor[changes], update)
	api.Change(f, "DELETE /v2/groups/{id}", "iam-groups.groups.delete", "iam-groups.group.delete", findFor[api.None], remove)

	api.Change(f, "PUT /v2/groups/{id}/members", "iam-groups.members.add", "iam-groups.member.add", findForMember[newMembers], addMembers)
	api.Read(f, "GET /v2/groups/{id}/members", "iam-groups.members.list", find("iam-groups/member"), listMembers)
	api.Read(f, "HEAD /v2/groups/{id}/members/{iam_id}", "iam-groups.members.read", find("iam-groups/member"), hasMember)
	api.Change(f, "DELETE /v2/groups/{id}/members/{iam_id}", "iam-groups.members.delete", "iam-groups.member.delete", findForMember[api.None], removeMember)
	api.Change(f, "POST /v2/groups/{id}/members/delete", "iam-groups.members.delete", "iam-groups.member.delete", findForMember[oldMembers], removeMembers)
}

type newGroup struct {
	Name        string `json:"name"`
	Description string `json:"description"`
}

type changes struct {
	Name        *string `json:"name"`
	Description *string `json:"description"`
}

type groupView struct {
	ID               string `json:"id"`
	Name             string `json:"name"`
	Description      string `json:"description,omitempty"`
	AccountID        string `json:"account_id"`
	CreatedAt        string `json:"created_at"`
	CreatedByID      string `json:"created_by_id"`
	LastModifiedAt   string `json:"last_modified_at"`
	LastModifiedByID string `json:"last_modified_by_id"`
	Href             string `json:"href"`
	IsFederated      *bool  `json:"is_federated,omitempty"`
	CRN              string `json:"crn,omitempty"`
}

func view(c *api.Call, g *access.Group) groupView {
	v := groupView{
		ID: g.ID, Name: g.Name, Description: g.Description, AccountID: g.AccountID,
		CreatedAt: timestamp(g.CreatedAt), CreatedByID: g.CreatedBy,
		LastModifiedAt: timestamp(g.ModifiedAt), LastModifiedByID: g.ModifiedBy,
		Href: c.URL + "/v2/groups/" + g.ID,
	}
	q := c.R.URL.Query()
	if q.Get("show_federated") == "true" {
		v.IsFederated = new(bool)
	}
	if q.Get("show_crn") == "true" {
		v.CRN = groupCRN(c, g.ID)
	}
	return v
}

func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func groupCRN(c *api.Call, id string) string {
	return c.Names.Of(service, "", c.Account(), "", resourceType, id).String()
}

func target(c *api.Call, id, name, typeURI string) api.Target {
	return api.Target{
		Resource: c.InAccount(service, access.ResourceType, resourceType, access.Resource, id),
		CRN:      groupCRN(c, id), Name: name, TypeURI: typeURI,
	}
}

// find returns a load function for the group that the path names.
func find(typeURI string) func(*api.Call) (*access.Group, api.Target, error) {
	return func(c *api.Call) (*access.Group, api.Target, error) {
		id := c.R.PathValue("id")
		g, ok := c.Directory.Groups.Get(id)
		if !ok || g.AccountID != c.Account() {
			return nil, api.Target{TypeURI: typeURI}, api.NotFound("access group", id)
		}
		return g, target(c, g.ID, g.Name, typeURI), nil
	}
}

func findFor[B any](c *api.Call, _ *B) (*access.Group, api.Target, error) {
	return find("iam-groups/group")(c)
}

func findForMember[B any](c *api.Call, _ *B) (*access.Group, api.Target, error) {
	return find("iam-groups/member")(c)
}

// named checks a group's name and description.
func named(name, description string) error {
	if strings.TrimSpace(name) == "" || !api.Printable(name, maxName) {
		return api.Invalid("The name must have 1 to %d characters, none of them a control character.", maxName).On("name")
	}
	if !api.Printable(description, maxDescription) {
		return api.Invalid("The description must have at most %d characters, none of them a control character.", maxDescription).On("description")
	}
	return nil
}

// accountParameter returns the account that a request is about. That it is the
// caller's is for the access decision to say.
func accountParameter(c *api.Call) (string, error) {
	id := c.R.URL.Query().Get("account_id")
	if id == "" {
		return "", api.Invalid("The parameter account_id is required.").OnParameter("account_id", "")
	}
	return id, nil
}

func loadNew(c *api.Call, b *newGroup) (string, api.Target, error) {
	t := api.Target{TypeURI: "iam-groups/group", Name: b.Name}
	account, err := accountParameter(c)
	if err != nil {
		return "", t, err
	}
	if err := named(b.Name, b.Description); err != nil {
		t.Name = ""
		return "", t, err
	}
	t.Resource = api.With(c.InAccount(service, access.ResourceType, resourceType), access.AccountID, account)
	return account, t, nil
}

func create(c *api.Call, tx *directory.Tx, b *newGroup, account string) (api.Reply, api.Target, error) {
	if c.Directory.GroupsByAccount.Len(account) >= access.MaxGroupsPerAccount {
		return api.Reply{}, api.Target{}, fault.New(fault.Conflict, "conflict", "The account has %d access groups already, which is the most that one can have.", access.MaxGroupsPerAccount)
	}
	g := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: account, Name: b.Name, Description: b.Description}
	c.Directory.Groups.Put(tx, g)
	return api.Reply{
		Status: http.StatusCreated, Body: view(c, g), ETag: g.Tag(g.ID),
		ResponseData: map[string]any{"name": g.Name, "description": g.Description},
	}, target(c, g.ID, g.Name, "iam-groups/group"), nil
}

func read(c *api.Call, g *access.Group) (api.Reply, error) {
	return api.Reply{Body: view(c, g), ETag: g.Tag(g.ID)}, nil
}

func update(c *api.Call, tx *directory.Tx, b *changes, old *access.Group) (api.Reply, api.Target, error) {
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	g := *old
	if b.Name != nil {
		g.Name = *b.Name
	}
	if b.Description != nil {
		g.Description = *b.Description
	}
	if err := named(g.Name, g.Description); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	c.Directory.Groups.Put(tx, &g)
	return api.Reply{
		Body: view(c, &g), ETag: g.Tag(g.ID),
		ResponseData: map[string]any{
			"name": g.Name, "description": g.Description,
			"previous": map[string]any{"name": old.Name, "description": old.Description},
		},
	}, target(c, g.ID, g.Name, "iam-groups/group"), nil
}

// remove deletes a group with the policies that grant to it: they can never
// apply again.
func remove(c *api.Call, tx *directory.Tx, _ *api.None, g *access.Group) (api.Reply, api.Target, error) {
	t := target(c, g.ID, g.Name, "iam-groups/group")
	if err := c.IfMatch(&g.Meta, g.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	if len(g.Members) > 0 && c.R.URL.Query().Get("force") != "true" {
		return api.Reply{}, t, fault.New(fault.Conflict, "conflict", "The access group has %d members; remove them first, or delete it with force=true.", len(g.Members))
	}
	policies := c.Directory.PoliciesOfSubject.Get(directory.Key(g.AccountID, g.ID))
	ids := make([]string, len(policies))
	for i, p := range policies {
		c.Directory.Policies.Delete(tx, p)
		ids[i] = p.ID
	}
	slices.Sort(ids)
	members := make([]string, len(g.Members))
	for i, m := range g.Members {
		members[i] = m.IAMID
	}
	c.Directory.Groups.Delete(tx, g)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{
		"name": g.Name, "deleted_policies": ids, "removed_members": members,
	}}, t, nil
}

type groupList struct {
	paging
	Groups []groupView `json:"groups"`
}

var groupSort = map[string]func(*access.Group) string{
	"id":           func(g *access.Group) string { return g.ID },
	"name":         func(g *access.Group) string { return strings.ToLower(g.Name) },
	"description":  func(g *access.Group) string { return g.Description },
	"is_federated": func(*access.Group) string { return "" },
}

func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	account, err := accountParameter(c)
	if err != nil {
		return api.Reply{}, err
	}
	keep, err := filter(c)
	if err != nil {
		return api.Reply{}, err
	}
	var all []*access.Group
	// Another account's groups are not for this caller, and neither is the
	// knowledge whether there is such an account.
	if account == c.Account() {
		all = slices.DeleteFunc(c.Directory.GroupsByAccount.Get(account), func(g *access.Group) bool {
			return !keep(g) || !may(target(c, g.ID, g.Name, "").Resource)
		})
	}
	page, p, err := paged(c, "/v2/groups", all, groupSort, "name", func(g *access.Group) string { return g.ID })
	if err != nil {
		return api.Reply{}, err
	}
	out := groupList{paging: p, Groups: make([]groupView, len(page))}
	for i, g := range page {
		out.Groups[i] = view(c, g)
	}
	return api.Reply{Body: out}, nil
}

// filter returns what a list's query keeps (reference/access-and-audit.md
// section 4.3).
func filter(c *api.Call) (func(*access.Group) bool, error) {
	q := c.R.URL.Query()
	membership := cmp.Or(q.Get("membership_type"), "all")
	if !slices.Contains([]string{"static", "dynamic", "all"}, membership) {
		return nil, api.Invalid("The parameter membership_type must be static, dynamic or all.").OnParameter("membership_type", membership)
	}
	field, text, prefixed := strings.Cut(q.Get("search"), ":")
	if q.Get("search") != "" && (!prefixed || !slices.Contains([]string{"id", "name", "description"}, field)) {
		return nil, api.Invalid("The parameter search must begin with id:, name: or description:.").OnParameter("search", q.Get("search"))
	}
	text = strings.ToLower(text)
	return func(g *access.Group) bool {
		if id := q.Get("iam_id"); id != "" {
			// There are only static memberships.
			if _, ok := g.Member(id); !ok || membership == "dynamic" {
				return false
			}
		}
		found := map[string]string{"id": g.ID, "name": g.Name, "description": g.Description}[field]
		return strings.Contains(strings.ToLower(found), text)
	}, nil
}
