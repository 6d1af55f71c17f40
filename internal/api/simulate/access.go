package simulate

import (
	"slices"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
)

// accessQuestion asks whether an identity of the account may do something.
type accessQuestion struct {
	selector
	IAMID    string   `json:"iam_id"` // or a profile
	Action   string   `json:"action"`
	Resource resource `json:"resource"`
	Time     string   `json:"time"`   // RFC 3339; "" is now
	Groups   []string `json:"groups"` // access groups that the identity is thought to be in besides its own
}

// resource names a resource by its CRN, its attributes, or both.
type resource struct {
	CRN        string            `json:"crn"`
	Attributes map[string]string `json:"attributes"`
	Tags       []string          `json:"tags"`
}

// accessAnswer is the decision.
type accessAnswer struct {
	Allowed       bool              `json:"allowed"`
	Subject       string            `json:"subject"`
	Action        string            `json:"action"`
	Resource      map[string]string `json:"resource"`
	At            string            `json:"at"`
	Policy        *policy           `json:"policy,omitempty"` // that allows it
	Trace         activity.Trace    `json:"trace"`
	TransactionID string            `json:"transaction_id"`
}

type policy struct {
	ID          string   `json:"id"`
	Description string   `json:"description,omitempty"`
	Subject     string   `json:"subject"` // the identity, or the group that it is in
	Roles       []string `json:"roles"`
}

// checkSubject asks whether there is such an identity at all.
const checkSubject = "subject"

func (h *handler) access(c *api.Call, q *accessQuestion) (api.Reply, error) {
	if err := c.Authorize(actionAccess, c.InAccount("iam-access-management")); err != nil {
		return api.Reply{}, err
	}
	request, err := h.request(c, q)
	if err != nil {
		return api.Reply{}, err
	}
	// The answer tells of policies on this resource.
	if err := c.Authorize("iam.policy.read", request.Resource); err != nil {
		return api.Reply{}, err
	}
	for _, id := range q.Groups {
		if g, ok := c.Directory.Groups.Get(id); !ok || g.AccountID != c.Account() {
			return api.Reply{}, api.NotFound("access group", id)
		}
	}
	out := accessAnswer{
		Subject: request.Subject, Action: request.Action, Resource: request.Resource, At: request.Time.UTC().Format(time.RFC3339),
		TransactionID: api.TransactionID(c.R.Context()),
	}
	d := access.Decide(withGroups{c.Directory, q.Groups}, request)
	if crn.KindOf(request.Subject) != crn.KindCRN {
		// Services are known elsewhere; nothing else acts that is not there.
		if err := h.grants.Live(c.Account(), request.Subject); err != nil {
			out.Trace.Fail(checkSubject, "an identity of the account, which is open", request.Subject+": "+err.Error(), "look for the identity and the account's state")
			for _, check := range d.Explain() {
				out.Trace.Skip(check.Name)
			}
			return api.Reply{Body: out}, nil
		}
		out.Trace.Pass(checkSubject, "an identity of the account, which is open", request.Subject)
	}
	out.Allowed, out.Trace = d.Allowed, append(out.Trace, d.Explain()...)
	if p := d.Policy; d.Allowed {
		out.Policy = &policy{ID: p.ID, Description: p.Description, Subject: p.SubjectID(), Roles: p.Roles}
	}
	return api.Reply{Body: out}, nil
}

// request turns a question into the evaluator's terms.
func (h *handler) request(c *api.Call, q *accessQuestion) (access.Request, error) {
	want, err := q.parse()
	if err != nil {
		return access.Request{}, err
	}
	r := access.Request{Subject: q.IAMID, AccountID: c.Account(), Action: q.Action, Time: c.Now(), Tags: q.Resource.Tags}
	named := q.ID != "" || q.Name != "" || q.CRN != ""
	switch {
	case named == (q.IAMID != ""):
		return r, api.Invalid("Name the identity: iam_id, or a trusted profile by profile_id, profile_name or profile_crn; one of the two.").On("iam_id")
	case len(q.IAMID) > maxText || len(q.Action) > maxText:
		return r, tooLong("iam_id and action", maxText)
	case q.Action == "":
		return r, api.Invalid("action is required, such as is.instance.instance.list.").On("action")
	case len(q.Groups) > maxGroups:
		return r, api.Invalid("groups has more than %d access groups.", maxGroups).On("groups")
	}
	if named {
		p, err := h.profile(c, want, actionRead)
		if err != nil {
			return r, err
		}
		r.Subject = crn.IAMID(p.ID)
	}
	if crn.KindOf(r.Subject) == crn.KindUnknown {
		return r, api.Invalid("iam_id %.100q is not an IAM ID, such as IBMid-…, iam-ServiceId-… or iam-Profile-….", r.Subject).On("iam_id")
	}
	if q.Time != "" {
		if r.Time, err = time.Parse(time.RFC3339, q.Time); err != nil || r.Time.Year() < 1900 || r.Time.Year() > 2200 {
			return r, api.Invalid("time must be a time such as 2026-07-01T09:00:00Z.").On("time")
		}
	}
	r.Resource, err = q.Resource.attributes(c)
	return r, err
}

// attributes returns the attributes that access is decided on. Both ways to
// name them must agree.
func (r resource) attributes(c *api.Call) (map[string]string, error) {
	out := map[string]string{}
	switch {
	case len(r.CRN) > maxText:
		return nil, tooLong("resource.crn", maxText)
	case len(r.Attributes) > maxAttributes:
		return nil, api.Invalid("resource.attributes has more than %d attributes.", maxAttributes).On("resource.attributes")
	case len(r.Tags) > maxTags:
		return nil, api.Invalid("resource.tags has more than %d tags.", maxTags).On("resource.tags")
	}
	if r.CRN != "" {
		name, err := crn.Parse(r.CRN)
		if err != nil {
			return nil, api.Invalid("resource.crn %.100q is not a CRN.", r.CRN).On("resource.crn").Because(err)
		}
		out = access.AttributesOf(name)
	}
	for name, value := range r.Attributes {
		old, known := out[name]
		switch {
		case len(name) > maxText || len(value) > maxText:
			return nil, tooLong("an attribute of the resource", maxText)
		case name == access.ServiceType || name == access.ServiceGroupID:
			return nil, api.Invalid("The resource attribute %s follows from the service and cannot be given.", name).On("resource.attributes")
		case known && old != value:
			return nil, api.Invalid("The resource's %s is %q in its CRN and %q in its attributes.", name, old, value).On("resource.attributes")
		}
		out[name] = value
	}
	for _, tag := range r.Tags {
		if len(tag) > maxText {
			return nil, tooLong("a tag of the resource", maxText)
		}
	}
	if out[access.AccountID] == "" {
		out[access.AccountID] = c.Account()
	}
	switch {
	case out[access.ServiceName] == "":
		return nil, api.Invalid("The resource needs a service: in its CRN, or as the attribute serviceName.").On("resource")
	case out[access.AccountID] != c.Account():
		return nil, denied("Access to resources of another account cannot be asked about.")
	}
	return out, nil
}

// withGroups puts an identity into more groups than it is in.
type withGroups struct {
	access.View
	more []string
}

// GroupsOf implements [access.View].
func (w withGroups) GroupsOf(accountID, iamID string, now time.Time) []string {
	out := w.View.GroupsOf(accountID, iamID, now)
	for _, id := range w.more {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}
