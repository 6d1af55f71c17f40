// Package accessgroups is the API of access groups, their members, the rules
// that make members from claims, and an account's settings for them
// (reference/access-and-audit.md section 4). A group's access is in policies
// whose subject it is; those belong to package iampolicy. That rules make
// members is package grant's to do, at login.
package accessgroups

import (
	"net/http"
	"slices"
	"strconv"
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

// Register adds the routes of groups, members, rules and settings.
func Register(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Groups", Shape: shape}

	api.Change(f, "POST /v2/groups", "iam-groups.groups.create", "iam-groups.group.create", loadNew, create)
	api.List(f, "GET /v2/groups", "iam-groups.groups.list", list)
	api.Read(f, "GET /v2/groups/{id}", "iam-groups.groups.read", find("iam-groups/group"), read)
	api.Change(f, "PATCH /v2/groups/{id}", "iam-groups.groups.update", "iam-groups.group.update", findFor[changes]("iam-groups/group"), ordinary(update))
	api.Change(f, "DELETE /v2/groups/{id}", "iam-groups.groups.delete", "iam-groups.group.delete", findFor[api.None]("iam-groups/group"), ordinary(remove))

	const members = "/v2/groups/{id}/members"
	api.Change(f, "PUT "+members, "iam-groups.members.add", "iam-groups.member.add", findFor[newMembers]("iam-groups/member"), ordinary(addMembers))
	api.Read(f, "GET "+members, "iam-groups.members.list", find("iam-groups/member"), listMembers)
	api.Read(f, "HEAD "+members+"/{iam_id}", "iam-groups.members.read", find("iam-groups/member"), hasMember)
	api.Change(f, "DELETE "+members+"/{iam_id}", "iam-groups.members.delete", "iam-groups.member.delete", findFor[api.None]("iam-groups/member"), ordinary(removeMember))
	api.Change(f, "POST "+members+"/delete", "iam-groups.members.delete", "iam-groups.member.delete", findFor[oldMembers]("iam-groups/member"), ordinary(removeMembers))

	const allGroups = "/v2/groups/_allgroups/members/{iam_id}"
	api.Change(f, "PUT "+allGroups, addAction, "iam-groups.member.add", loadMember[newMemberships], join)
	api.Change(f, "DELETE "+allGroups, deleteAction, "iam-groups.member.delete", loadMember[api.None], leave)

	const rules = "/v2/groups/{id}/rules"
	api.Change(f, "POST "+rules, "iam-groups.rules.create", "iam-groups.rule.create", findFor[ruleBody]("iam-groups/rule"), ordinary(createRule))
	api.Read(f, "GET "+rules, "iam-groups.rules.list", find("iam-groups/rule"), listRules)
	api.Read(f, "GET "+rules+"/{rule}", "iam-groups.rules.read", findRule, readRule)
	api.Change(f, "PUT "+rules+"/{rule}", "iam-groups.rules.update", "iam-groups.rule.update", findRuleFor[ruleBody], replaceRule)
	api.Change(f, "DELETE "+rules+"/{rule}", "iam-groups.rules.delete", "iam-groups.rule.delete", findRuleFor[api.None], removeRule)

	api.Read(f, "GET /v2/groups/settings", "iam-groups.account-settings.read", findSettings, readSettings)
	api.Change(f, "PATCH /v2/groups/settings", "iam-groups.account-settings.update", "iam-groups.account-settings.update", findSettingsFor, updateSettings)
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
	Description      string `json:"description"`
	AccountID        string `json:"account_id"`
	CreatedAt        string `json:"created_at"`
	CreatedByID      string `json:"created_by_id"`
	LastModifiedAt   string `json:"last_modified_at"`
	LastModifiedByID string `json:"last_modified_by_id"`
	Href             string `json:"href"`
	IsFederated      *bool  `json:"is_federated,omitempty"`
	CRN              string `json:"crn,omitempty"`
}

// extras are the fields of a group that are shown to whoever asks for them.
type extras struct{ federated, crn bool }

func extrasOf(c *api.Call) (x extras, err error) {
	if x.federated, err = flag(c, "show_federated"); err != nil {
		return x, err
	}
	x.crn, err = flag(c, "show_crn")
	return x, err
}

func view(c *api.Call, g *access.Group, x extras) groupView {
	v := groupView{
		ID: g.ID, Name: g.Name, Description: g.Description, AccountID: g.AccountID,
		CreatedAt: timestamp(g.CreatedAt), CreatedByID: g.CreatedBy,
		LastModifiedAt: timestamp(g.ModifiedAt), LastModifiedByID: g.ModifiedBy,
		Href: c.URL + "/v2/groups/" + g.ID,
	}
	if x.federated {
		v.IsFederated = new(bool)
		*v.IsFederated = federated(c, g)
	}
	if x.crn {
		v.CRN = groupCRN(c, g.ID)
	}
	return v
}

// federated reports whether a group has rules.
func federated(c *api.Call, g *access.Group) bool {
	return c.Directory.GroupRulesByGroup.Len(g.ID) > 0
}

// flag reads a boolean from the query; absent means no.
func flag(c *api.Call, name string) (bool, error) {
	s := c.R.URL.Query().Get(name)
	if s == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, api.Invalid("The parameter %s must be true or false.", name).OnParameter(name, s)
	}
	return b, nil
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

// groupOf returns a group of the caller's account.
func groupOf(c *api.Call, id string) (*access.Group, bool) {
	if id == access.PublicAccess {
		return publicAccess(c)
	}
	g, ok := c.Directory.Groups.Get(id)
	return g, ok && g.AccountID == c.Account()
}

// find returns a load function for the group that the path names.
func find(typeURI string) func(*api.Call) (*access.Group, api.Target, error) {
	return func(c *api.Call) (*access.Group, api.Target, error) {
		id := c.R.PathValue("id")
		g, ok := groupOf(c, id)
		if !ok {
			return nil, api.Target{TypeURI: typeURI}, api.NotFound("access group", id)
		}
		return g, target(c, g.ID, g.Name, typeURI), nil
	}
}

func findFor[B any](typeURI string) func(*api.Call, *B) (*access.Group, api.Target, error) {
	load := find(typeURI)
	return func(c *api.Call, _ *B) (*access.Group, api.Target, error) { return load(c) }
}

// named checks a group's name and description. The name of the group Public
// Access is taken in every account, also while it is not there.
func named(name, description string) error {
	if strings.TrimSpace(name) == "" || !api.Printable(name, maxName) {
		return api.Invalid("The name must have 1 to %d characters, none of them a control character.", maxName).On("name")
	}
	if !api.Printable(description, maxDescription) {
		return api.Invalid("The description must have at most %d characters, none of them a control character.", maxDescription).On("description")
	}
	if strings.EqualFold(strings.TrimSpace(name), publicName) {
		return fault.New(fault.Conflict, "conflict", "The name %s belongs to a group that every account has.", publicName).On("name")
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
		t.Name = "" // what is not fit to be a name does not belong in the log
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
		Status: http.StatusCreated, Body: view(c, g, extras{}), ETag: g.Tag(g.ID),
		ResponseData: map[string]any{"name": g.Name, "description": g.Description},
	}, target(c, g.ID, g.Name, "iam-groups/group"), nil
}

func read(c *api.Call, g *access.Group) (api.Reply, error) {
	x, err := extrasOf(c)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: view(c, g, x), ETag: g.Tag(g.ID)}, nil
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
		Body: view(c, &g, extras{}), ETag: g.Tag(g.ID),
		ResponseData: map[string]any{
			"name": g.Name, "description": g.Description,
			"previous": map[string]any{"name": old.Name, "description": old.Description},
		},
	}, target(c, g.ID, g.Name, "iam-groups/group"), nil
}

// remove deletes a group with its rules and the policies that grant to it: they
// can never apply again.
func remove(c *api.Call, tx *directory.Tx, _ *api.None, g *access.Group) (api.Reply, api.Target, error) {
	t := target(c, g.ID, g.Name, "iam-groups/group")
	if err := c.IfMatch(&g.Meta, g.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	force, err := flag(c, "force")
	if err != nil {
		return api.Reply{}, t, err
	}
	rules := c.Directory.GroupRulesByGroup.Get(g.ID)
	if len(g.Members)+len(rules) > 0 && !force {
		return api.Reply{}, t, fault.New(fault.Conflict, "conflict",
			"The access group has %d members and %d rules; remove them first, or delete it with force=true.", len(g.Members), len(rules))
	}
	members := make([]string, len(g.Members))
	for i, m := range g.Members {
		members[i] = m.IAMID
	}
	deleted := make([]string, len(rules))
	for i, r := range rules {
		c.Directory.GroupRules.Delete(tx, r)
		deleted[i] = r.ID
	}
	slices.Sort(deleted)
	policies := removePoliciesOf(c, tx, g.ID)
	c.Directory.Groups.Delete(tx, g)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{
		"name": g.Name, "deleted_policies": policies, "deleted_rules": deleted, "removed_members": members,
	}}, t, nil
}

// removePoliciesOf stages the removal of every policy whose subject a group is,
// and returns their ids.
func removePoliciesOf(c *api.Call, tx *directory.Tx, group string) []string {
	policies := c.Directory.PoliciesOfSubject.Get(directory.Key(c.Account(), group))
	ids := make([]string, len(policies))
	for i, p := range policies {
		c.Directory.Policies.Delete(tx, p)
		ids[i] = p.ID
	}
	slices.Sort(ids)
	return ids
}

type groupList struct {
	paging
	Groups []groupView `json:"groups"`
}

func groupSort(c *api.Call) map[string]func(*access.Group) string {
	return map[string]func(*access.Group) string{
		"id":           func(g *access.Group) string { return g.ID },
		"name":         func(g *access.Group) string { return strings.ToLower(g.Name) },
		"description":  func(g *access.Group) string { return g.Description },
		"is_federated": func(g *access.Group) string { return strconv.FormatBool(federated(c, g)) },
	}
}

func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	account, err := accountParameter(c)
	if err != nil {
		return api.Reply{}, err
	}
	x, err := extrasOf(c)
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
		all = c.Directory.GroupsByAccount.Get(account)
		if g, ok := publicAccess(c); ok {
			all = append(all, g)
		}
		all = slices.DeleteFunc(all, func(g *access.Group) bool {
			return !keep(g) || !may(target(c, g.ID, g.Name, "").Resource)
		})
	}
	page, p, err := paged(c, "/v2/groups", all, groupSort(c), "name", func(g *access.Group) string { return g.ID })
	if err != nil {
		return api.Reply{}, err
	}
	out := groupList{paging: p, Groups: make([]groupView, len(page))}
	for i, g := range page {
		out.Groups[i] = view(c, g, x)
	}
	return api.Reply{Body: out}, nil
}

// filter returns what a list's query keeps (reference/access-and-audit.md
// section 4.3).
func filter(c *api.Call) (func(*access.Group) bool, error) {
	q := c.R.URL.Query()
	kind, err := membership(c, static, dynamic, inherited)
	if err != nil {
		return nil, err
	}
	hidePublic, err := flag(c, "hide_public_access")
	if err != nil {
		return nil, err
	}
	field, text, prefixed := strings.Cut(q.Get("search"), ":")
	if q.Get("search") != "" && (!prefixed || !slices.Contains([]string{"id", "name", "description"}, field)) {
		return nil, api.Invalid("The parameter search must begin with id:, name: or description:.").OnParameter("search", q.Get("search"))
	}
	text = strings.ToLower(text)
	var mine map[string]bool
	iamID := q.Get("iam_id")
	if iamID != "" {
		mine = groupsOf(c, iamID, kind)
	}
	return func(g *access.Group) bool {
		if hidePublic && g.ID == access.PublicAccess || iamID != "" && !mine[g.ID] {
			return false
		}
		found := map[string]string{"id": g.ID, "name": g.Name, "description": g.Description}[field]
		return strings.Contains(strings.ToLower(found), text)
	}, nil
}
