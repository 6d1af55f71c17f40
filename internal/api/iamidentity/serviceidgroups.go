package iamidentity

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Actions and events of service ID groups. No public document names their
// events; these are formed like those of service IDs.
const (
	serviceIDGroupGet  = "iam-identity.serviceid-group.get"
	serviceIDGroupList = "iam-identity.serviceid-group.list"

	serviceIDGroupEvent = "iam-identity.account-serviceid-group"
	serviceIDGroupType  = "iam-identity/account-serviceid-group"
)

func (r *routes) registerServiceIDGroups() {
	for _, p := range collection("POST", "/v1/serviceid_groups") {
		api.Change(r.Family, p, "iam-identity.serviceid-group.create", serviceIDGroupEvent+".create", r.newServiceIDGroup, r.createServiceIDGroup)
	}
	for _, p := range collection("GET", "/v1/serviceid_groups") {
		api.List(r.Family, p, serviceIDGroupList, r.listServiceIDGroups)
	}
	const path = "/v1/serviceid_groups/{group}"
	api.Read(r.Family, "GET "+path, serviceIDGroupGet, r.loadServiceIDGroup, r.showServiceIDGroup)
	api.Change(r.Family, "PUT "+path, "iam-identity.serviceid-group.update", serviceIDGroupEvent+".update", r.changedServiceIDGroup, r.updateServiceIDGroup)
	api.Change(r.Family, "DELETE "+path, "iam-identity.serviceid-group.delete", serviceIDGroupEvent+".delete",
		loading[api.None](r.loadServiceIDGroup), r.deleteServiceIDGroup)
}

// serviceIDGroupBody is the body of create and update
// (reference/iam-identity.md section 4.6).
type serviceIDGroupBody struct {
	AccountID   string  `json:"account_id"`
	Name        string  `json:"name"`
	Description *string `json:"description"`
}

func (b *serviceIDGroupBody) check() error { return checkOptional(&b.Name, b.Description) }

type serviceIDGroupView struct {
	ID          string `json:"id"`
	EntityTag   string `json:"entity_tag"`
	AccountID   string `json:"account_id"`
	CRN         string `json:"crn"`
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	CreatedAt   string `json:"created_at"`
	CreatedBy   string `json:"created_by"`
	ModifiedAt  string `json:"modified_at"`
}

func (r *routes) serviceIDGroupView(g *identity.ServiceIDGroup) serviceIDGroupView {
	return serviceIDGroupView{
		ID: g.ID, EntityTag: g.Tag(g.ID), AccountID: g.AccountID, CRN: r.serviceIDGroupCRN(g), Name: g.Name, Description: g.Description,
		CreatedAt: stamp(g.CreatedAt), CreatedBy: g.CreatedBy, ModifiedAt: stamp(g.ModifiedAt),
	}
}

func (r *routes) serviceIDGroupCRN(g *identity.ServiceIDGroup) string {
	return r.Names.Of(service, "", g.AccountID, "", "serviceid-group", g.ID).String()
}

func serviceIDGroupResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, "serviceid-group", access.Resource, id)
}

func (r *routes) serviceIDGroupTarget(c *api.Call, g *identity.ServiceIDGroup) api.Target {
	return api.Target{Resource: serviceIDGroupResource(c, g.ID), CRN: r.serviceIDGroupCRN(g), Name: g.Name, TypeURI: serviceIDGroupType}
}

func (r *routes) serviceIDGroupReply(g *identity.ServiceIDGroup, status int) api.Reply {
	return api.Reply{
		Status: status, Body: r.serviceIDGroupView(g), ETag: g.Tag(g.ID),
		ResponseData: map[string]any{"group_id": g.ID, "name": g.Name, "description": g.Description},
	}
}

func (r *routes) loadServiceIDGroup(c *api.Call) (*identity.ServiceIDGroup, api.Target, error) {
	id := c.R.PathValue("group")
	g, ok := r.Directory.ServiceIDGroups.Get(id)
	if !ok || g.AccountID != c.Account() {
		return nil, api.Target{TypeURI: serviceIDGroupType}, api.NotFound("service ID group", id)
	}
	return g, r.serviceIDGroupTarget(c, g), nil
}

func (r *routes) showServiceIDGroup(_ *api.Call, g *identity.ServiceIDGroup) (api.Reply, error) {
	return r.serviceIDGroupReply(g, 0), nil
}

func (r *routes) newServiceIDGroup(c *api.Call, b *serviceIDGroupBody) (*identity.ServiceIDGroup, api.Target, error) {
	target := api.Target{Resource: serviceIDGroupResource(c, ""), TypeURI: serviceIDGroupType}
	if err := b.check(); err != nil {
		return nil, target, err
	}
	target.Name = b.Name
	if err := checkAccount(c, b.AccountID); err != nil {
		return nil, target, err
	}
	g := &identity.ServiceIDGroup{ID: "ServiceIdGroup-" + uuid.NewString(), AccountID: b.AccountID, Name: b.Name}
	set(&g.Description, b.Description)
	return g, target, nil
}

func (r *routes) createServiceIDGroup(c *api.Call, tx *directory.Tx, _ *serviceIDGroupBody, g *identity.ServiceIDGroup) (api.Reply, api.Target, error) {
	target := r.serviceIDGroupTarget(c, g)
	n := r.Directory.ServiceIDGroupsByAccount.Len(g.AccountID)
	if n >= maxServiceIDGroups {
		return api.Reply{}, target, atLimit("The account has %d service ID groups, which is the limit.", n)
	}
	r.Directory.ServiceIDGroups.Put(tx, g)
	reply := r.serviceIDGroupReply(g, http.StatusCreated)
	nearLimit(reply.ResponseData, n+1, maxServiceIDGroups)
	return reply, target, nil
}

// listServiceIDGroups shows all groups: this list has no pages
// (reference/iam-identity.md section 4.1).
func (r *routes) listServiceIDGroups(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	if err := checkAccount(c, c.R.URL.Query().Get("account_id")); err != nil {
		return api.Reply{}, err
	}
	groups := slices.DeleteFunc(r.Directory.ServiceIDGroupsByAccount.Get(c.Account()), func(g *identity.ServiceIDGroup) bool {
		return !may(serviceIDGroupResource(c, g.ID))
	})
	slices.SortFunc(groups, func(a, b *identity.ServiceIDGroup) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	views := make([]serviceIDGroupView, len(groups))
	for i, g := range groups {
		views[i] = r.serviceIDGroupView(g)
	}
	return api.Reply{Body: map[string]any{"serviceid_groups": views}}, nil
}

func (r *routes) changedServiceIDGroup(c *api.Call, b *serviceIDGroupBody) (*identity.ServiceIDGroup, api.Target, error) {
	if err := b.check(); err != nil {
		return nil, api.Target{TypeURI: serviceIDGroupType}, err
	}
	return r.loadServiceIDGroup(c)
}

func (r *routes) updateServiceIDGroup(c *api.Call, tx *directory.Tx, b *serviceIDGroupBody, old *identity.ServiceIDGroup) (api.Reply, api.Target, error) {
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, r.serviceIDGroupTarget(c, old), err
	}
	g := *old
	g.Name = b.Name
	set(&g.Description, b.Description)
	r.Directory.ServiceIDGroups.Put(tx, &g)
	reply := r.serviceIDGroupReply(&g, 0)
	reply.ResponseData["prev_name"] = old.Name
	return reply, r.serviceIDGroupTarget(c, &g), nil
}

// deleteServiceIDGroup refuses while service IDs are in the group. To take them
// out along the way would change any number of objects that the caller has no
// rights on, none of them with an event of its own.
func (r *routes) deleteServiceIDGroup(c *api.Call, tx *directory.Tx, _ *api.None, g *identity.ServiceIDGroup) (api.Reply, api.Target, error) {
	target := r.serviceIDGroupTarget(c, g)
	if n := r.Directory.ServiceIDsByGroup.Len(g.ID); n > 0 {
		return api.Reply{}, target, fault.New(fault.Conflict, "conflict", "The service ID group %s has %d service IDs; delete them first.", g.ID, n)
	}
	r.Directory.ServiceIDGroups.Delete(tx, g)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"group_id": g.ID}}, target, nil
}
