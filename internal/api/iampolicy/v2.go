package iampolicy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

// v2Document is what a client writes (reference/access-and-audit.md
// section 1.3), without the conditions.
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
	Pattern string          `json:"pattern"`
	Rule    json.RawMessage `json:"rule"`
}

type v2View struct {
	v2Document
	Pattern string       `json:"pattern,omitempty"`
	Rule    *access.Rule `json:"rule,omitempty"`
	served
}

func (b v2Body) policy() (*access.Policy, error) {
	p := &access.Policy{
		Type: b.Type, Description: b.Description, Pattern: b.Pattern,
		Subject: b.Subject.Attributes, Resource: b.Resource.Attributes, Tags: b.Resource.Tags,
	}
	for _, r := range b.Control.Grant.Roles {
		p.Roles = append(p.Roles, r.RoleID)
	}
	if absent(b.Rule) {
		return p, nil
	}
	// A field that is not known may be one that narrows, so none is passed over
	// in a rule.
	dec := json.NewDecoder(bytes.NewReader(b.Rule))
	dec.DisallowUnknownFields()
	p.Rule = new(access.Rule)
	err := dec.Decode(p.Rule)
	if err == nil {
		err = plain(p.Rule)
	}
	if err != nil {
		return nil, api.Invalid("The rule is not valid: %v.", err).On("rule")
	}
	return p, nil
}

// plain writes the values of a rule in one form, so that equal rules compare
// equal, and refuses those that no condition takes.
func plain(r *access.Rule) error {
	if !api.Printable(r.Key, access.MaxValueLength) || !api.Printable(r.Operator, access.MaxValueLength) {
		return fmt.Errorf("keys and operators must have at most %d characters, none of them a control character", access.MaxValueLength)
	}
	if absent(r.Value) {
		r.Value = nil
	} else if err := plainValue(r); err != nil {
		return err
	}
	for i := range r.Conditions {
		if err := plain(&r.Conditions[i]); err != nil {
			return err
		}
	}
	return nil
}

func plainValue(r *access.Rule) error {
	var value any
	dec := json.NewDecoder(bytes.NewReader(r.Value))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return err
	}
	list, ok := value.([]any)
	if !ok {
		list = []any{value}
	}
	if len(list) > access.MaxAnyOf {
		return fmt.Errorf("the value of condition %s has more than %d elements", r.Key, access.MaxAnyOf)
	}
	for _, element := range list {
		switch v := element.(type) {
		case bool, json.Number:
		case string:
			if !api.Printable(v, access.MaxValueLength) {
				return fmt.Errorf("the value of condition %s must have at most %d characters, none of them a control character", r.Key, access.MaxValueLength)
			}
		default:
			return fmt.Errorf("the value of condition %s must be a string, a number, a boolean or an array of these", r.Key)
		}
	}
	var err error
	r.Value, err = json.Marshal(value)
	return err
}

// showV2 shows a policy; the display format adds what its roles are called and
// allow.
func showV2(c *api.Call, p *access.Policy, f format) any {
	view := v2View{served: serve(c, p, f), Pattern: p.Pattern, Rule: p.Rule, v2Document: v2Document{
		Type: p.Type, Description: p.Description,
		Subject: v2Subject{p.Subject}, Resource: v2Resource{p.Resource, p.Tags},
		Control: v2Control{v2Grant{[]v2Role{}}},
	}}
	catalog := c.Directory.Catalog(c.Account())
	for _, id := range p.Roles {
		role := v2Role{RoleID: id}
		if f == display {
			role.DisplayName, role.Description = roleText(catalog, id)
			role.Actions = actionsOf(catalog, id, p.Service())
		}
		view.Control.Grant.Roles = append(view.Control.Grant.Roles, role)
	}
	return view
}

// actionsOf tells what a role allows on a service; in a policy about many, what
// it allows on the one that it belongs to, or else on each.
func actionsOf(catalog *access.Catalog, role, service string) []v2Action {
	if r, ok := catalog.Role(role); ok {
		service = cmp.Or(service, r.Service)
	}
	var known []access.ActionDefinition
	if s, ok := catalog.Service(service); ok {
		known = s.Actions
	}
	out := []v2Action{}
	for _, id := range catalog.Actions(role, service) {
		a := v2Action{ID: id, DisplayName: id}
		if i := slices.IndexFunc(known, func(d access.ActionDefinition) bool { return d.ID == id }); i >= 0 {
			a.DisplayName, a.Description = cmp.Or(known[i].DisplayName, id), known[i].Description
		}
		out = append(out, a)
	}
	return out
}
