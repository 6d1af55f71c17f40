package iampolicy

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
)

// v1Document is what a client writes (reference/access-and-audit.md
// section 1.2).
type v1Document struct {
	Type        string       `json:"type"`
	Description string       `json:"description,omitempty"`
	Subjects    []v1Subject  `json:"subjects"`
	Roles       []v1Role     `json:"roles"`
	Resources   []v1Resource `json:"resources"`
}

type v1Subject struct {
	Attributes []v1Attribute `json:"attributes"`
}

type v1Resource struct {
	Attributes []v1Attribute `json:"attributes"`
	Tags       []v1Attribute `json:"tags,omitempty"`
}

type v1Attribute struct {
	Name     string          `json:"name"`
	Value    string          `json:"value"`
	Operator access.Operator `json:"operator,omitempty"`
}

type v1Role struct {
	RoleID      string `json:"role_id"`
	DisplayName string `json:"display_name,omitempty"`
	Description string `json:"description,omitempty"`
}

type v1Body struct {
	v1Document

	// Version 1 has no conditions. To leave them out of a policy would grant
	// more than was asked for, so they are refused.
	Rule    json.RawMessage `json:"rule"`
	Pattern json.RawMessage `json:"pattern"`
}

type v1View struct {
	v1Document
	served
}

// served is what the server adds to a policy in both versions.
type served struct {
	ID               string `json:"id"`
	Href             string `json:"href"`
	State            string `json:"state"`
	CreatedAt        string `json:"created_at"`
	CreatedByID      string `json:"created_by_id"`
	LastModifiedAt   string `json:"last_modified_at"`
	LastModifiedByID string `json:"last_modified_by_id"`
	*permits
}

// permits tells how a policy is used.
type permits struct {
	LastAt    *string `json:"last_permit_at"`
	Frequency int64   `json:"last_permit_frequency"`
}

func serve(c *api.Call, p *access.Policy, f format) served {
	s := served{
		ID: p.ID, Href: href(c, p), State: p.State,
		CreatedAt: timestamp(p.CreatedAt), CreatedByID: p.CreatedBy,
		LastModifiedAt: timestamp(p.ModifiedAt), LastModifiedByID: p.ModifiedBy,
	}
	if f == withPermits {
		count, last := c.Usage.Of(p.ID)
		s.permits = &permits{Frequency: count}
		if !last.IsZero() {
			at := timestamp(last)
			s.LastAt = &at
		}
	}
	return s
}

// href is the policy's address in the version that it was written through,
// whichever one it is shown in: clients choose by it how to write
// (reference/access-and-audit.md section 1.8).
func href(c *api.Call, p *access.Policy) string {
	return c.URL + path(p.API) + "/" + p.ID
}

func path(api int) string {
	if api == 1 {
		return "/v1/policies"
	}
	return "/v2/policies"
}

func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// present is the value by which version 1 demands that an attribute is there
// (reference/access-and-audit.md section 1.4).
const present = "*"

func (b v1Body) policy() (*access.Policy, error) {
	for name, raw := range map[string]json.RawMessage{"rule": b.Rule, "pattern": b.Pattern} {
		if !absent(raw) {
			return nil, api.Invalid("Version 1 of the API has no %s; write the policy through version 2.", name).On(name)
		}
	}
	if len(b.Subjects) != 1 || len(b.Resources) != 1 {
		return nil, api.Invalid("A policy needs exactly one element in subjects and one in resources.")
	}
	p := &access.Policy{Type: b.Type, Description: b.Description}
	for _, r := range b.Roles {
		p.Roles = append(p.Roles, r.RoleID)
	}
	var err error
	if p.Subject, err = fromV1(b.Subjects[0].Attributes); err != nil {
		return nil, err
	}
	if p.Type == access.TypeAuthorization {
		asteriskIsPresence(p.Subject)
	}
	if p.Resource, err = fromV1(b.Resources[0].Attributes); err != nil {
		return nil, err
	}
	asteriskIsPresence(p.Resource)
	p.Tags, err = fromV1(b.Resources[0].Tags)
	return p, err
}

// absent reports whether a part of a body was left out.
func absent(raw json.RawMessage) bool {
	return len(raw) == 0 || bytes.Equal(raw, []byte("null"))
}

func asteriskIsPresence(attrs []access.Attribute) {
	for i, a := range attrs {
		if a.Operator == access.StringEquals && a.Value.Text == present {
			yes := true
			attrs[i] = access.Attribute{Key: a.Key, Operator: access.StringExists, Value: access.Value{Exists: &yes}}
		}
	}
}

func fromV1(attrs []v1Attribute) ([]access.Attribute, error) {
	var out []access.Attribute
	for _, a := range attrs {
		op := a.Operator
		switch op {
		case "":
			op = access.StringEquals
		case access.StringEquals, access.StringMatch:
		default:
			return nil, api.Invalid("The operator %q of attribute %s is not one of version 1 of the API: stringEquals, stringMatch.", op, a.Name)
		}
		out = append(out, access.Attribute{Key: a.Name, Operator: op, Value: access.Text(a.Value)})
	}
	return out, nil
}

// toV1 converts attributes back; ok is false when version 1 has no words for
// one of them.
func toV1(attrs []access.Attribute) (out []v1Attribute, ok bool) {
	for _, a := range attrs {
		v := v1Attribute{Name: a.Key, Value: a.Value.Text, Operator: a.Operator}
		switch {
		case a.Operator == access.StringMatch:
		case a.Operator == access.StringEquals && a.Value.Text != present:
		case a.Operator == access.StringExists && !demandsAbsence(a):
			v.Value, v.Operator = present, access.StringEquals
		default:
			return nil, false
		}
		out = append(out, v)
	}
	return out, true
}

// showV1 shows a policy, or a placeholder for one that version 1 has no words
// for. Roles have their names in every format.
func showV1(c *api.Call, p *access.Policy, f format) any {
	view := v1View{served: serve(c, p, f), v1Document: v1Document{Type: p.Type, Description: p.Description}}
	resource, expressible := toV1(p.Resource)
	subject, sayable := toV1(p.Subject)
	if !expressible || !sayable || p.Rule != nil {
		view.Subjects = []v1Subject{{Attributes: []v1Attribute{{Name: access.IAMID, Value: "unsupported version"}}}}
		view.Roles = []v1Role{{RoleID: access.PlatformRoleCRN("UnsupportedVersion"), DisplayName: "Unsupported Version"}}
		view.Resources = []v1Resource{{Attributes: []v1Attribute{
			{Name: access.AccountID, Value: p.AccountID, Operator: access.StringEquals},
		}}}
		return view
	}
	tags := []v1Attribute{}
	for _, t := range p.Tags {
		tags = append(tags, v1Attribute{Name: t.Key, Value: t.Value.Text, Operator: t.Operator})
	}
	view.Resources = []v1Resource{{Attributes: resource, Tags: tags}}
	for i := range subject {
		subject[i].Operator = ""
	}
	view.Subjects = []v1Subject{{Attributes: subject}}
	view.Roles = []v1Role{}
	for _, id := range p.Roles {
		name, description := roleText(c.Directory.Catalog(c.Account()), id)
		view.Roles = append(view.Roles, v1Role{RoleID: id, DisplayName: name, Description: description})
	}
	return view
}

// roleText returns a role's display name and description. A role that the
// catalog no longer has goes by the end of its CRN.
func roleText(c *access.Catalog, id string) (name, description string) {
	if r, ok := c.Role(id); ok {
		return r.DisplayName, r.Description
	}
	return id[strings.LastIndexByte(id, ':')+1:], ""
}
