package iampolicy

import (
	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
)

type roleList struct {
	Custom  []roleView `json:"custom_roles"`
	Service []roleView `json:"service_roles"`
	System  []roleView `json:"system_roles"`
}

type roleView struct {
	CRN         string   `json:"crn"`
	DisplayName string   `json:"display_name"`
	Description string   `json:"description"`
	Actions     []string `json:"actions"`
}

// listRoles shows the roles that a policy about a service may grant
// (reference/access-and-audit.md section 1.9). For a service that is not known,
// and for the pseudo service alliamserviceroles, those are the ones that every
// service has: clients plan policies with this answer.
func listRoles(c *api.Call) (api.Reply, error) {
	q := c.R.URL.Query()
	service := q.Get("service_name")
	if service != "" && q.Get("service_group_id") != "" {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_body", "The parameters service_name and service_group_id cannot be used together.").
			OnParameter("service_group_id", q.Get("service_group_id"))
	}
	catalog := c.Directory.Catalog(c.Account())
	system, own := catalog.RolesOf(service)
	return api.Reply{Body: roleList{
		Custom:  []roleView{},
		Service: showRoles(catalog, own, service),
		System:  showRoles(catalog, system, service),
	}}, nil
}

func showRoles(c *access.Catalog, roles []*access.Role, service string) []roleView {
	out := make([]roleView, len(roles))
	for i, r := range roles {
		out[i] = roleView{CRN: r.CRN, DisplayName: r.DisplayName, Description: r.Description, Actions: c.Actions(r.CRN, service)}
	}
	return out
}
