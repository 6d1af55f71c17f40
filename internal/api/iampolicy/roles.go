package iampolicy

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// Actions on custom roles.
const (
	actionRoleCreate = "iam-access-management.customRole.create"
	actionRoleRead   = "iam-access-management.customRole.read"
	actionRoleUpdate = "iam-access-management.customRole.update"
	actionRoleDelete = "iam-access-management.customRole.delete"
)

// ownService is the one whose resources custom roles and the settings are.
const ownService = "iam-access-management"

type roleList struct {
	Custom  []customRoleView `json:"custom_roles"`
	Service []roleView       `json:"service_roles"`
	System  []roleView       `json:"system_roles"`
}

type roleView struct {
	CRN         string   `json:"crn"`
	DisplayName string   `json:"display_name"`
	Description string   `json:"description"`
	Actions     []string `json:"actions"`
}

type customRoleView struct {
	ID string `json:"id"`
	roleView
	Name             string `json:"name"`
	AccountID        string `json:"account_id"`
	ServiceName      string `json:"service_name"`
	CreatedAt        string `json:"created_at"`
	CreatedByID      string `json:"created_by_id"`
	LastModifiedAt   string `json:"last_modified_at"`
	LastModifiedByID string `json:"last_modified_by_id"`
	Href             string `json:"href"`
}

func showRole(c *api.Call, r *access.CustomRole) customRoleView {
	return customRoleView{
		ID:       r.ID,
		roleView: roleView{CRN: r.CRN(), DisplayName: r.DisplayName, Description: r.Description, Actions: r.Actions},
		Name:     r.Name, AccountID: r.AccountID, ServiceName: r.Service,
		CreatedAt: timestamp(r.CreatedAt), CreatedByID: r.CreatedBy,
		LastModifiedAt: timestamp(r.ModifiedAt), LastModifiedByID: r.ModifiedBy,
		Href: c.URL + "/v2/roles/" + r.ID,
	}
}

// roleBody is what a client writes. The last three are fixed when the role is
// made.
type roleBody struct {
	DisplayName string   `json:"display_name"`
	Description string   `json:"description"`
	Actions     []string `json:"actions"`
	Name        string   `json:"name"`
	AccountID   string   `json:"account_id"`
	ServiceName string   `json:"service_name"`
}

func roleRoutes(f *api.Family) {
	api.Open(f, "GET /v2/roles", "the built-in roles tell nothing about an account; custom ones are shown to who may read them", listRoles)

	api.Read(f, "GET /v2/roles/{id}", actionRoleRead, findRole, func(c *api.Call, r *access.CustomRole) (api.Reply, error) {
		return replyRole(c, http.StatusOK, r), nil
	})

	api.Change(f, "POST /v2/roles", actionRoleCreate, "iam-access-management.customRole.create",
		func(c *api.Call, b *roleBody) (*access.CustomRole, api.Target, error) {
			r := &access.CustomRole{
				ID: strings.ReplaceAll(uuid.NewString(), "-", ""), AccountID: b.AccountID, Name: b.Name, DisplayName: b.DisplayName,
				Description: b.Description, Service: b.ServiceName, Actions: b.Actions,
			}
			if r.AccountID == "" || !api.Printable(r.AccountID, 100) {
				return nil, api.Target{TypeURI: roleTypeURI}, api.Invalid("The body must name the account_id that the role is for.").On("account_id")
			}
			t := roleTarget(c, r)
			// Whether another account exists is not to be learned here: it is
			// refused as one that the caller has no access to.
			t.Resource[access.AccountID] = r.AccountID
			delete(t.Resource, access.Resource)
			return r, t, nil
		},
		func(c *api.Call, tx *directory.Tx, _ *roleBody, r *access.CustomRole) (api.Reply, api.Target, error) {
			if err := acceptable(c, r); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			mine := c.Directory.CustomRolesByAccount.Get(r.AccountID)
			if len(mine) >= access.MaxCustomRolesPerAccount {
				return api.Reply{}, api.Target{}, fault.New(fault.Conflict, "request_not_processed",
					"The account has %d custom roles already, which is the most that it can have.", len(mine))
			}
			if slices.ContainsFunc(mine, func(o *access.CustomRole) bool { return o.Name == r.Name }) {
				return api.Reply{}, api.Target{}, fault.New(fault.Conflict, "role_conflict_error", "The account has a custom role named %s already.", r.Name)
			}
			c.Directory.CustomRoles.Put(tx, r)
			reply := replyRole(c, http.StatusCreated, r)
			reply.ResponseData = map[string]any{"service_name": r.Service, "actions": r.Actions}
			return reply, roleTarget(c, r), nil
		})

	api.Change(f, "PUT /v2/roles/{id}", actionRoleUpdate, "iam-access-management.customRole.update",
		func(c *api.Call, _ *roleBody) (*access.CustomRole, api.Target, error) { return findRole(c) },
		func(c *api.Call, tx *directory.Tx, b *roleBody, old *access.CustomRole) (api.Reply, api.Target, error) {
			if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if cmp.Or(b.Name, old.Name) != old.Name || cmp.Or(b.AccountID, old.AccountID) != old.AccountID || cmp.Or(b.ServiceName, old.Service) != old.Service {
				return api.Reply{}, api.Target{}, api.Invalid("The name, account_id and service_name of a role cannot change.")
			}
			r := *old
			r.DisplayName, r.Description, r.Actions = b.DisplayName, b.Description, b.Actions
			if err := acceptable(c, &r); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if err := mayWiden(c, old, &r); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			c.Directory.CustomRoles.Put(tx, &r)
			reply := replyRole(c, http.StatusOK, &r)
			reply.ResponseData = map[string]any{"actions": r.Actions, "previous": map[string]any{"actions": old.Actions}}
			return reply, roleTarget(c, &r), nil
		})

	api.Change(f, "DELETE /v2/roles/{id}", actionRoleDelete, "iam-access-management.customRole.delete",
		func(c *api.Call, _ *api.None) (*access.CustomRole, api.Target, error) { return findRole(c) },
		func(c *api.Call, tx *directory.Tx, _ *api.None, r *access.CustomRole) (api.Reply, api.Target, error) {
			if err := c.IfMatch(&r.Meta, r.ID, false); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			changed := []string{}
			for _, p := range c.Directory.PoliciesByAccount.Get(r.AccountID) {
				if !slices.Contains(p.Roles, r.CRN()) {
					continue
				}
				// Also from the deleted ones, or a restored policy would grant a
				// later role of the same name.
				rest := *p
				rest.Roles = slices.DeleteFunc(slices.Clone(p.Roles), func(id string) bool { return id == r.CRN() })
				if len(rest.Roles) == 0 && p.State == access.Active {
					rest.State, rest.DeletedAt = access.Deleted, tx.Now
				}
				c.Directory.Policies.Put(tx, &rest)
				changed = append(changed, p.ID)
			}
			c.Directory.CustomRoles.Delete(tx, r)
			slices.Sort(changed)
			return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{
				"service_name": r.Service, "actions": r.Actions, "policies": changed,
			}}, roleTarget(c, r), nil
		})
}

func replyRole(c *api.Call, status int, r *access.CustomRole) api.Reply {
	return api.Reply{Status: status, Body: showRole(c, r), ETag: r.Tag(r.ID)}
}

const roleTypeURI = ownService + "/customRole"

func roleTarget(c *api.Call, r *access.CustomRole) api.Target {
	return api.Target{
		Resource: c.InAccount(ownService, access.ResourceType, "customRole", access.Resource, r.ID),
		CRN:      c.Names.Of(ownService, "", c.Account(), "", "customRole", r.ID).String(),
		Name:     r.Name, TypeURI: roleTypeURI,
	}
}

func findRole(c *api.Call) (*access.CustomRole, api.Target, error) {
	id := c.R.PathValue("id")
	r, ok := c.Directory.CustomRoles.Get(id)
	if !ok || r.AccountID != c.Account() {
		return nil, api.Target{TypeURI: roleTypeURI}, fault.New(fault.NotFound, "role_not_found", "The role %q was not found.", id)
	}
	return r, roleTarget(c, r), nil
}

// acceptable holds a role against the rules and against the roles that its
// service has besides: one that allows the same, and one that goes by the name
// of a built-in one, would only confuse.
func acceptable(c *api.Call, r *access.CustomRole) error {
	catalog := c.Directory.Catalog(c.Account())
	if err := r.Validate(catalog); err != nil {
		return api.Invalid("The role is not valid: %v.", err)
	}
	s, ok := catalog.Service(r.Service)
	if !ok {
		return api.Invalid("The service %q is not known.", r.Service).On("service_name")
	}
	actions := slices.Sorted(slices.Values(r.Actions))
	for _, other := range s.Roles {
		if other.CRN == r.CRN() {
			continue
		}
		if !other.Custom && strings.EqualFold(other.DisplayName, r.DisplayName) {
			return fault.New(fault.Conflict, "role_conflict_error", "The service %s has the built-in role %s; give the custom role another display_name.", s.Name, other.DisplayName)
		}
		if slices.Equal(actions, catalog.Actions(other.CRN, s.Name)) {
			return fault.New(fault.Conflict, "role_conflict_error", "The role %s (%s) of service %s has the same actions.", other.DisplayName, other.CRN, s.Name)
		}
	}
	return nil
}

// mayWiden refuses to add actions to a role unless the caller may write every
// policy that grants it: what the role gains, their subjects gain.
func mayWiden(c *api.Call, old, next *access.CustomRole) error {
	added := slices.DeleteFunc(slices.Clone(next.Actions), func(a string) bool { return slices.Contains(old.Actions, a) })
	if len(added) == 0 {
		return nil
	}
	for _, p := range c.Directory.PoliciesByAccount.Get(old.AccountID) {
		if p.State != access.Active || !slices.Contains(p.Roles, old.CRN()) {
			continue
		}
		if err := authorize(c, actionUpdate, p, give); err != nil {
			return err
		}
		if p.Type != access.TypeAuthorization {
			continue
		}
		if err := holds(c, p, func(service string) []string {
			if s, ok := c.Directory.Catalog(c.Account()).Service(service); ok && s.Name == old.Service {
				return added
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// listRoles shows the roles that a policy about a service may grant
// (reference/access-and-audit.md section 1.9). For a service that is not known,
// and for the pseudo service alliamserviceroles, those are the ones that every
// service has: clients plan policies with this answer. A service that asks for
// its own use (source_service_name) can be let in with any of them.
func listRoles(c *api.Call) (api.Reply, error) {
	q := c.R.URL.Query()
	name, group := q.Get("service_name"), q.Get("service_group_id")
	if name != "" && group != "" {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_body", "The parameters service_name and service_group_id cannot be used together.").
			OnParameter("service_group_id", group)
	}
	if t := q.Get("policy_type"); t != "" && t != access.TypeAccess && t != access.TypeAuthorization {
		return api.Reply{}, api.Invalid("The parameter policy_type must be %s or %s.", access.TypeAccess, access.TypeAuthorization).OnParameter("policy_type", t)
	}
	own := q.Get("account_id") == "" || q.Get("account_id") == c.Account()
	catalog := c.Directory.Builtin()
	if own {
		catalog = c.Directory.Catalog(c.Account())
	}
	services := []string{name}
	if group == iamServiceGroup {
		services = groupServices
	}
	out := roleList{Custom: []customRoleView{}, Service: []roleView{}, System: []roleView{}}
	for _, s := range services {
		system, special := catalog.RolesOf(s)
		out.System = addRoles(out.System, catalog, system, s)
		out.Service = addRoles(out.Service, catalog, special, s)
	}
	if own {
		out.Custom = customRoles(c, func(r *access.CustomRole) bool {
			return name == "" && group == "" || slices.Contains(services, r.Service)
		})
	}
	return api.Reply{Body: out}, nil
}

// addRoles adds the roles of a service to those of others. A role that is there
// already gains the actions.
func addRoles(to []roleView, catalog *access.Catalog, roles []*access.Role, service string) []roleView {
	for _, r := range roles {
		actions := catalog.Actions(r.CRN, service)
		if actions == nil {
			actions = []string{}
		}
		if i := slices.IndexFunc(to, func(v roleView) bool { return v.CRN == r.CRN }); i >= 0 {
			to[i].Actions = append(to[i].Actions, actions...)
			slices.Sort(to[i].Actions)
			to[i].Actions = slices.Compact(to[i].Actions)
			continue
		}
		to = append(to, roleView{CRN: r.CRN, DisplayName: r.DisplayName, Description: r.Description, Actions: actions})
	}
	return to
}

func customRoles(c *api.Call, keep func(*access.CustomRole) bool) []customRoleView {
	roles := slices.DeleteFunc(c.Directory.CustomRolesByAccount.Get(c.Account()), func(r *access.CustomRole) bool {
		return !keep(r) || !c.May(actionRoleRead, roleTarget(c, r).Resource)
	})
	slices.SortFunc(roles, func(a, b *access.CustomRole) int {
		return cmp.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := make([]customRoleView, len(roles))
	for i, r := range roles {
		out[i] = showRole(c, r)
	}
	return out
}
