// Package iampolicy is the API of access policies, in its versions 1 and 2, of
// the roles that policies grant, and of the account's settings for access
// management (reference/access-and-audit.md section 1). Both versions show the
// same policies. It does not decide access: that is access.Decide, which the
// server's every route asks.
//
// A deleted policy grants nothing from then on. It is kept for a while, can be
// read and listed, and can be restored as long as it would still be accepted.
// Enterprise templates do not exist here.
package iampolicy

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/retention"
)

// Actions on the resource that a policy describes.
const (
	actionCreate = "iam.policy.create"
	actionRead   = "iam.policy.read"
	actionUpdate = "iam.policy.update"
	actionDelete = "iam.policy.delete"
)

// Bounds without a published number. They keep one policy from making every
// later decision about its subject slow.
const (
	maxAttributes  = 100
	maxRoles       = 100
	maxDescription = 1000
)

// Limits of an account (reference/access-and-audit.md section 1.13). Deleted
// policies do not count.
const (
	maxPolicies = 4020
	maxTagged   = 500 // policies with tags
)

// Register adds the routes of both versions, of the roles and of the settings.
func Register(mux *http.ServeMux, cfg *api.Config) {
	family := func(conflict string) *api.Family {
		return &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Management", Shape: shape(conflict)}
	}
	f := family("policy_conflict_error")
	first := version{number: 1, show: showV1}
	routes[v1Body](f, first)
	routes[v2Body](f, version{number: 2, show: showV2})
	first.restoring(f)
	roleRoutes(family("role_conflict_error"))
	settingsRoutes(family("request_not_processed"))
}

// version is what the two versions of the API differ in, besides their bodies.
type version struct {
	number int
	show   func(c *api.Call, p *access.Policy, f format) any
}

// body is a policy as one version writes it.
type body interface {
	// policy returns what the body says, not yet validated. Its errors are
	// faults.
	policy() (*access.Policy, error)
}

func routes[B body](f *api.Family, v version) {
	base := fmt.Sprintf("/v%d/policies", v.number)
	one := base + "/{id}"

	api.List(f, "GET "+base, actionRead, v.list)

	api.Read(f, "GET "+one, actionRead, find(actionRead), func(c *api.Call, p *access.Policy) (api.Reply, error) {
		f, err := formatOf(c)
		if err != nil {
			return api.Reply{}, err
		}
		if err := authorize(c, actionRead, p, handle); err != nil {
			return api.Reply{}, err
		}
		return v.reply(c, http.StatusOK, p, f), nil
	})

	api.Change(f, "POST "+base, actionCreate, "iam-am.policy.create",
		func(c *api.Call, b *B) (*access.Policy, api.Target, error) {
			p, err := proposed(c, *b)
			if err != nil {
				return nil, api.Target{TypeURI: typeURI}, err
			}
			return p, target(c, actionCreate, p), nil
		},
		func(c *api.Call, tx *directory.Tx, _ *B, p *access.Policy) (api.Reply, api.Target, error) {
			if err := grantable(c, actionCreate, p); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if err := v.admissible(c, p, nil); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			p.ID, p.API = uuid.NewString(), v.number
			c.Directory.Policies.Put(tx, p)
			r := v.reply(c, http.StatusCreated, p, bare)
			r.ResponseData = grantOf(p)
			return r, target(c, actionCreate, p), nil
		})

	api.Change(f, "PUT "+one, actionUpdate, "iam-am.policy.update",
		func(c *api.Call, _ *B) (*access.Policy, api.Target, error) { return find(actionUpdate)(c) },
		func(c *api.Call, tx *directory.Tx, b *B, old *access.Policy) (api.Reply, api.Target, error) {
			p, err := v.replacement(c, *b, old)
			if err != nil {
				return api.Reply{}, api.Target{}, err
			}
			c.Directory.Policies.Put(tx, p)
			r := v.reply(c, http.StatusOK, p, bare)
			r.ResponseData = grantOf(p)
			r.ResponseData["previous"] = grantOf(old)
			return r, target(c, actionUpdate, p), nil
		})

	api.Change(f, "DELETE "+one, actionDelete, "iam-am.policy.delete",
		func(c *api.Call, _ *api.None) (*access.Policy, api.Target, error) { return find(actionDelete)(c) },
		func(c *api.Call, tx *directory.Tx, _ *api.None, p *access.Policy) (api.Reply, api.Target, error) {
			if err := authorize(c, actionDelete, p, handle); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if p.State == access.Deleted {
				return api.Reply{}, api.Target{}, notFound(p.ID)
			}
			if err := c.IfMatch(&p.Meta, p.ID, false); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if err := unlocked(c, p); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if err := keepsOwner(c, p, nil); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			gone := *p
			gone.State, gone.DeletedAt = access.Deleted, tx.Now
			c.Directory.Policies.Put(tx, &gone)
			return api.Reply{Status: http.StatusNoContent, ResponseData: grantOf(p)}, target(c, actionDelete, p), nil
		})
}

type stateBody struct {
	State string `json:"state"`
}

// restoring adds the route that makes a deleted policy active again. It is held
// to all that a new one is held to.
func (v version) restoring(f *api.Family) {
	api.Change(f, "PATCH "+path(v.number)+"/{id}", actionUpdate, "iam-am.policy.update",
		func(c *api.Call, _ *stateBody) (*access.Policy, api.Target, error) { return find(actionUpdate)(c) },
		func(c *api.Call, tx *directory.Tx, b *stateBody, old *access.Policy) (api.Reply, api.Target, error) {
			if err := authorize(c, actionUpdate, old, handle); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if b.State != access.Active {
				return api.Reply{}, api.Target{}, api.Invalid("The state can only be set to %s; delete a policy with DELETE.", access.Active).On("state")
			}
			p := *old
			if old.State == access.Deleted {
				p.State, p.DeletedAt = access.Active, time.Time{}
				if err := p.Validate(c.Directory.Catalog(c.Account())); err != nil {
					return api.Reply{}, api.Target{}, api.Invalid("The policy can not be restored: %v.", err)
				}
				if err := grantable(c, actionUpdate, &p); err != nil {
					return api.Reply{}, api.Target{}, err
				}
				if err := v.admissible(c, &p, old); err != nil {
					return api.Reply{}, api.Target{}, err
				}
				c.Directory.Policies.Put(tx, &p)
			}
			r := v.reply(c, http.StatusOK, &p, bare)
			r.ResponseData = grantOf(&p)
			r.ResponseData["previous"] = map[string]any{"state": old.State}
			return r, target(c, actionUpdate, &p), nil
		})
}

func (v version) reply(c *api.Call, status int, p *access.Policy, f format) api.Reply {
	return api.Reply{Status: status, Body: v.show(c, p, f), ETag: p.Tag(p.ID)}
}

// grantOf is what an activity event tells about a policy.
func grantOf(p *access.Policy) map[string]any {
	m := map[string]any{"type": p.Type, "subject": p.Subject, "roles": p.Roles, "resource": p.Resource}
	if p.Rule != nil {
		m["pattern"], m["rule"] = p.Pattern, p.Rule
	}
	if len(p.Tags) > 0 {
		m["tags"] = p.Tags
	}
	return m
}

const typeURI = "iam-am/policy"

func target(c *api.Call, action string, p *access.Policy) api.Target {
	return api.Target{
		Resource: decisive(c, action, p), TypeURI: typeURI, Name: p.ID,
		CRN: c.Names.Of("iam-access-management", "", c.Account(), "", "policy", p.ID).String(),
	}
}

// find returns a load function for the policy that the path names.
func find(action string) func(*api.Call) (*access.Policy, api.Target, error) {
	return func(c *api.Call) (*access.Policy, api.Target, error) {
		id := c.R.PathValue("id")
		p, ok := c.Directory.Policies.Get(id)
		if !ok || p.AccountID != c.Account() || over(c, p) {
			return nil, api.Target{TypeURI: typeURI}, notFound(id)
		}
		return p, target(c, action, p), nil
	}
}

func notFound(id string) error {
	return fault.New(fault.NotFound, "policy_not_found", "The policy %q was not found.", id)
}

// over reports whether a deleted policy has been kept for its time. It is
// removed soon after.
func over(c *api.Call, p *access.Policy) bool {
	return retention.PolicyDue(p, c.Now())
}

// grantable refuses the caller unless he may let a policy take effect.
func grantable(c *api.Call, action string, p *access.Policy) error {
	if err := authorize(c, action, p, give); err != nil {
		return err
	}
	if p.Type != access.TypeAuthorization {
		return nil
	}
	return holds(c, p, allowedBy(c, p))
}

// proposed returns the policy that a body describes, checked as far as that is
// possible without looking at the account.
func proposed(c *api.Call, b body) (*access.Policy, error) {
	p, err := b.policy()
	if err != nil {
		return nil, err
	}
	p.State = access.Active
	// Each once, in the order that they were given: clients compare it.
	var roles []string
	seen := map[string]bool{}
	for _, role := range p.Roles {
		if role = access.CanonicalRole(role); !seen[role] {
			seen[role] = true
			roles = append(roles, role)
		}
	}
	p.Roles = roles
	// The block is held against the account that it names itself. That this is
	// the caller's account is the first thing that the access decision asks.
	p.AccountID, _ = access.Get(p.Resource, access.AccountID)
	if err := bounded(p); err != nil {
		return nil, err
	}
	if err := p.Validate(c.Directory.Catalog(c.Account())); err != nil {
		return nil, api.Invalid("The policy is not valid: %v.", err)
	}
	return p, consistent(p)
}

// bounded refuses what Validate does not look at: control characters, of which
// one is the separator of the directory's keys, and sheer size.
func bounded(p *access.Policy) error {
	if !api.Printable(p.Description, maxDescription) {
		return api.Invalid("The description must have at most %d characters, none of them a control character.", maxDescription).On("description")
	}
	if len(p.Resource) > maxAttributes || len(p.Tags) > maxAttributes || len(p.Roles) > maxRoles {
		return api.Invalid("A policy has at most %d resource attributes, %d tags and %d roles.", maxAttributes, maxAttributes, maxRoles)
	}
	for _, a := range slices.Concat(p.Subject, p.Resource, p.Tags) {
		for _, s := range append([]string{a.Key, a.Value.Text}, a.Value.List...) {
			if !api.Printable(s, access.MaxValueLength) {
				return api.Invalid("The names and values of attributes must have at most %d characters, none of them a control character.", access.MaxValueLength)
			}
		}
	}
	return nil
}

// consistent refuses attributes that contradict each other or can never match
// (reference/access-and-audit.md sections 1.3 and 1.4).
func consistent(p *access.Policy) error {
	has := func(key string) bool {
		return slices.ContainsFunc(p.Resource, func(a access.Attribute) bool { return a.Key == key })
	}
	if has(access.ServiceName) && has(access.ServiceGroupID) {
		return api.Invalid("The resource must not have both serviceName and service_group_id.").On("resource")
	}
	if kind, ok := access.Get(p.Resource, access.ServiceType); ok && kind != access.KindService && kind != access.KindPlatform {
		return api.Invalid("The resource attribute serviceType must be %s or %s.", access.KindService, access.KindPlatform).On("resource")
	}
	if p.Type == access.TypeAuthorization {
		for _, a := range p.Subject {
			if a.Operator != access.StringEquals && (a.Operator != access.StringExists || a.Key == access.AccountID) {
				return api.Invalid("The subject attribute %s of an authorization must have the operator stringEquals, or stringExists unless it is accountId.", a.Key).On("subject")
			}
		}
	}
	for _, t := range p.Tags {
		if t.Operator != access.StringEquals && t.Operator != access.StringMatch {
			return api.Invalid("The tag %s must have the operator stringEquals or stringMatch.", t.Key).On("resource.tags")
		}
	}
	return nil
}

// replacement returns the next state of a policy. The caller needs the right
// on what it was about and on what it is to be about.
func (v version) replacement(c *api.Call, b body, old *access.Policy) (*access.Policy, error) {
	if err := authorize(c, actionUpdate, old, handle); err != nil {
		return nil, err
	}
	if old.State == access.Deleted {
		return nil, notFound(old.ID)
	}
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return nil, err
	}
	if old.API > v.number {
		return nil, api.Invalid("The policy was written through version %d of the API and can only be replaced there.", old.API)
	}
	p, err := proposed(c, b)
	if err != nil {
		return nil, err
	}
	if p.Type != old.Type {
		return nil, api.Invalid("The type of a policy cannot change; it is %s.", old.Type).On("type")
	}
	if err := grantable(c, actionUpdate, p); err != nil {
		return nil, err
	}
	if err := keepsOwner(c, old, p); err != nil {
		return nil, err
	}
	if err := unlocked(c, old); err != nil {
		return nil, err
	}
	p.Meta, p.ID, p.API = old.Meta, old.ID, v.number
	return p, v.admissible(c, p, old)
}

// admissible holds a policy against the rest of its account: the subject
// exists, is not locked and has room, and no other policy grants the same.
func (v version) admissible(c *api.Call, p, old *access.Policy) error {
	if err := subjectExists(c, p); err != nil {
		return err
	}
	if err := unlocked(c, p); err != nil {
		return err
	}
	same := func(q *access.Policy) bool { return q.State != access.Active || old != nil && q.ID == old.ID }
	others := slices.DeleteFunc(c.Directory.PoliciesOfSubject.Get(directory.Key(p.AccountID, p.SubjectID())), same)
	// Authorizations have no subject in this sense.
	if p.Type == access.TypeAccess && len(others) >= access.MaxPoliciesPerSubject {
		return fault.New(fault.Conflict, "request_not_processed", "The subject %s has %d policies already, which is the most that one can have.", p.SubjectID(), len(others))
	}
	total, tagged := 0, 0
	for _, q := range slices.DeleteFunc(c.Directory.PoliciesByAccount.Get(p.AccountID), same) {
		total++
		if len(q.Tags) > 0 {
			tagged++
		}
	}
	if total >= maxPolicies || tagged >= maxTagged && len(p.Tags) > 0 {
		return fault.New(fault.Conflict, "request_not_processed",
			"The account has %d policies already, %d of them with tags; it can have %d, and %d with tags.", total, tagged, maxPolicies, maxTagged)
	}
	for _, q := range others {
		if p.SameGrant(q) {
			return v.conflict(c, p, q)
		}
	}
	return nil
}

// subjectExists refuses policies for identities that this server would have to
// know and does not. Users and compute resources may be known elsewhere first.
func subjectExists(c *api.Call, p *access.Policy) error {
	if p.Type == access.TypeAuthorization {
		return nil // a service of any account
	}
	id := p.SubjectID()
	if group, ok := access.Get(p.Subject, access.AccessGroupID); ok {
		// A policy of the group that everybody is in must not come to life
		// later, when the account turns the group on.
		if group == access.PublicAccess && c.Directory.GroupSettingsOf(p.AccountID).PublicAccess {
			return nil
		}
		if g, ok := c.Directory.Groups.Get(group); !ok || g.AccountID != p.AccountID {
			return api.Invalid("The subject's access group %q does not exist in the account.", group).On("subject")
		}
		return nil
	}
	exists := true
	switch crn.KindOf(id) {
	case crn.KindProfile:
		profile, ok := c.Directory.Profiles.Get(crn.BareID(id))
		exists = ok && profile.AccountID == p.AccountID
	case crn.KindServiceID:
		service, ok := c.Directory.ServiceIDs.Get(crn.BareID(id))
		exists = ok && service.AccountID == p.AccountID
	case crn.KindUnknown:
		return api.Invalid("The subject's iam_id %q is not an IAM ID, such as IBMid-…, iam-ServiceId-… or iam-Profile-….", id).On("subject")
	}
	if !exists {
		return api.Invalid("The subject's iam_id %q does not exist in the account.", id).On("subject")
	}
	return nil
}

// unlocked refuses to touch the policies of a locked service ID
// (reference/access-and-audit.md section 1.4).
func unlocked(c *api.Call, p *access.Policy) error {
	id := p.SubjectID()
	if s, ok := c.Directory.ServiceIDs.Get(crn.BareID(id)); ok && s.Locked {
		return fault.New(fault.Conflict, "request_not_processed", "The service ID %s is locked; unlock it before changing its policies.", id)
	}
	return nil
}
