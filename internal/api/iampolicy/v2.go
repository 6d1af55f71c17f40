package iampolicy

import (
	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

// v2Document is what a client writes (reference/access-and-audit.md
// section 1.3).
type v2Document struct {
	Type        string     `json:"type"`
	Description string     `json:"description,omitempty"`
	Subject     v2Subject  `json:"subject"`
	Resource    v2Resource `json:"resource"`
	Control     v2Control  `json:"control"`
}

type v2Subject struct {
	Attributes []access.Attribute `json:"attributes"`
}

type v2Resource struct {
	Attributes []access.Attribute `json:"attributes"`
	Tags       []access.Attribute `json:"tags,omitempty"`
}

type v2Control struct {
	Grant v2Grant `json:"grant"`
}

type v2Grant struct {
	Roles []v2Role `json:"roles"`
}

type v2Role struct {
	RoleID      string     `json:"role_id"`
	DisplayName string     `json:"display_name,omitempty"`
	Description string     `json:"description,omitempty"`
	Actions     []v2Action `json:"actions,omitempty"`
}

type v2Action struct {
	ID          string `json:"id"`
	DisplayName string `json:"display_name"`
	Description string `json:"description"`
}

type v2Body struct {
	v2Document
	conditions
}

type v2View struct {
	v2Document
	served
}

func (b v2Body) policy() (*access.Policy, error) {
	if err := b.refuse(); err != nil {
		return nil, err
	}
	p := &access.Policy{
		Type: b.Type, Description: b.Description,
		Subject: b.Subject.Attributes, Resource: b.Resource.Attributes, Tags: b.Resource.Tags,
	}
	for _, r := range b.Control.Grant.Roles {
		p.Roles = append(p.Roles, r.RoleID)
	}
	return p, nil
}

// showV2 shows a policy; display adds what its roles are called and allow.
func showV2(c *api.Call, p *access.Policy, display bool) any {
	view := v2View{served: serve(c, p), v2Document: v2Document{
		Type: p.Type, Description: p.Description,
		Subject: v2Subject{p.Subject}, Resource: v2Resource{p.Resource, p.Tags},
	}}
	catalog := c.Directory.Catalog(c.Account())
	for _, id := range p.Roles {
		role := v2Role{RoleID: id}
		if display {
			role.DisplayName, role.Description = roleText(catalog, id)
			for _, a := range catalog.Actions(id, p.Service()) {
				role.Actions = append(role.Actions, v2Action{ID: a, DisplayName: a})
			}
		}
		view.Control.Grant.Roles = append(view.Control.Grant.Roles, role)
	}
	return view
}
