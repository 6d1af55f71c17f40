package accessuse

import (
	"tabard.dev/tabard/internal/access"
)

// recommendation is what the API answers.
type recommendation struct {
	IAMID      string   `json:"iam_id"`
	WindowDays int      `json:"window_days"`
	From       string   `json:"from"`          // use before this does not count, unless it is periodic
	Since      string   `json:"counted_since"` // when the server began to count
	Missed     int64    `json:"missed"`        // requests in the window that found no room among the records
	Policies   []advice `json:"policies"`
	Groups     []advice `json:"group_policies"`
	Changes    []change `json:"changes"`
}

// advice is about one policy.
type advice struct {
	PolicyID string           `json:"policy_id"`
	GroupID  string           `json:"access_group_id,omitempty"`
	Verdict  string           `json:"verdict,omitempty"` // keep, narrow, remove or undecided; none about a group's
	Since    string           `json:"observed_since"`
	Policy   document         `json:"policy"`
	Used     []actionUse      `json:"used"`
	Earlier  []actionUse      `json:"used_earlier"` // before the window only
	Unused   []serviceActions `json:"unused"`       // in the services that it names or was used in
	Wider    bool             `json:"other_services"`
	Smaller  []smaller        `json:"smaller"`
	Instead  []string         `json:"covered_by"` // policies that allow the same
	Warnings []string         `json:"warnings"`
}

type actionUse struct {
	Service    string `json:"service_name,omitempty"`
	Action     string `json:"action"`
	Count      int64  `json:"count"`
	FirstAt    string `json:"first_at"`
	LastAt     string `json:"last_at"`
	Days       int    `json:"days"`
	Pattern    string `json:"pattern,omitempty"` // periodic or rare
	PeriodDays int    `json:"period_days,omitempty"`
}

type serviceActions struct {
	Service string   `json:"service_name"`
	Actions []string `json:"actions"`
}

// smaller is a policy that can take the place of another.
type smaller struct {
	Policy document         `json:"policy"`
	Role   *role            `json:"custom_role,omitempty"`
	Beyond []serviceActions `json:"beyond_use"` // what its roles allow and was not used
}

// change is one step; what it is about depends on its kind.
type change struct {
	Change    string    `json:"change"` // delete_policy, create_role, replace_policy or create_policy
	Undecided bool      `json:"undecided"`
	PolicyID  string    `json:"policy_id,omitempty"`
	Policy    *document `json:"policy,omitempty"`
	Role      *role     `json:"role,omitempty"`
}

// document is a policy as version 2 of its API takes it
// (reference/access-and-audit.md section 1.3).
type document struct {
	Type        string             `json:"type"`
	Description string             `json:"description,omitempty"`
	Subject     attributes         `json:"subject"`
	Resource    attributesWithTags `json:"resource"`
	Control     control            `json:"control"`
	Pattern     string             `json:"pattern,omitempty"`
	Rule        *access.Rule       `json:"rule,omitempty"`
}

type attributes struct {
	Attributes []access.Attribute `json:"attributes"`
}

type attributesWithTags struct {
	attributes
	Tags []access.Attribute `json:"tags,omitempty"`
}

type control struct {
	Grant grant `json:"grant"`
}

type grant struct {
	Roles []roleID `json:"roles"`
}

type roleID struct {
	RoleID string `json:"role_id"`
}

// role is a custom role as its API takes it.
type role struct {
	Name        string   `json:"name"`
	DisplayName string   `json:"display_name"`
	Description string   `json:"description"`
	AccountID   string   `json:"account_id"`
	ServiceName string   `json:"service_name"`
	Actions     []string `json:"actions"`
}

func documentOf(p *access.Policy) document {
	d := document{
		Type: p.Type, Description: p.Description, Subject: attributes{p.Subject},
		Resource: attributesWithTags{attributes{p.Resource}, p.Tags}, Control: control{grant{[]roleID{}}}, Pattern: p.Pattern, Rule: p.Rule,
	}
	for _, id := range p.Roles {
		d.Control.Grant.Roles = append(d.Control.Grant.Roles, roleID{id})
	}
	return d
}

func roleOf(r *access.CustomRole) *role {
	if r == nil {
		return nil
	}
	return &role{r.Name, r.DisplayName, r.Description, r.AccountID, r.Service, r.Actions}
}

func adviceOf(a access.Advice) advice {
	out := advice{
		PolicyID: a.Policy.ID, Verdict: a.Verdict, Since: timestamp(a.Since), Policy: documentOf(a.Policy), Wider: a.Wider,
		Used: usesOf(a.Used), Earlier: usesOf(a.Earlier), Unused: actionsOf(a.Unused),
		Smaller: []smaller{}, Instead: append([]string{}, a.Instead...), Warnings: append([]string{}, a.Warnings...),
	}
	for _, s := range a.Smaller {
		out.Smaller = append(out.Smaller, smaller{documentOf(s.Policy), roleOf(s.Role), actionsOf(s.Beyond)})
	}
	return out
}

func usesOf(list []access.ActionUse) []actionUse {
	out := make([]actionUse, len(list))
	for i, u := range list {
		out[i] = actionUse{u.Service, u.Action, u.Count, timestamp(u.First), timestamp(u.Last), u.Days, u.Pattern, u.Period}
	}
	return out
}

func actionsOf(list []access.ServiceActions) []serviceActions {
	out := make([]serviceActions, len(list))
	for i, s := range list {
		out[i] = serviceActions{s.Service, s.Actions}
	}
	return out
}

func changeOf(c access.Change) change {
	out := change{Undecided: c.Undecided}
	switch {
	case c.Remove != "":
		out.Change, out.PolicyID = "delete_policy", c.Remove
	case c.Role != nil:
		out.Change, out.Role = "create_role", roleOf(c.Role)
	case c.Update != nil:
		d := documentOf(c.Update)
		out.Change, out.PolicyID, out.Policy = "replace_policy", c.Update.ID, &d
	default:
		d := documentOf(c.Create)
		out.Change, out.Policy = "create_policy", &d
	}
	return out
}
