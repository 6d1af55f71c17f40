package iamidentity

import (
	"net/http"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// Actions and events of trusted profiles. No public document names an event
// for a change of a link, rule or identity; it is an update of the profile
// (reference/access-and-audit.md section 6.2).
const (
	profileGet    = "iam-identity.profile.get"
	profileUpdate = "iam-identity.profile.update"
	profileLink   = "iam-identity.profile.linkToResource"

	profileUpdated = "iam-identity.account-profile.update"
)

func (r *routes) registerProfiles() {
	for _, p := range collection("POST", "/v1/profiles") {
		api.Change(r.Family, p, "iam-identity.profile.create", "iam-identity.account-profile.create", r.newProfile, r.createProfile)
	}
	for _, p := range collection("GET", "/v1/profiles") {
		api.List(r.Family, p, profileGet, r.listProfiles)
	}
	api.Read(r.Family, "GET /v1/profiles/{profile}", profileGet, r.loadProfile, r.showProfile)
	api.Change(r.Family, "PUT /v1/profiles/{profile}", profileUpdate, profileUpdated, r.changedProfile, r.updateProfile)
	api.Change(r.Family, "DELETE /v1/profiles/{profile}", "iam-identity.profile.delete", "iam-identity.account-profile.delete", loading[api.None](r.loadProfile), r.deleteProfile)
}

// loading makes a loader for a route with a body out of one that does not look
// at it.
func loading[B, T any](load func(*api.Call) (T, api.Target, error)) func(*api.Call, *B) (T, api.Target, error) {
	return func(c *api.Call, _ *B) (T, api.Target, error) { return load(c) }
}

// profileBody is the body of create and update (reference/iam-identity.md
// section 4.2).
type profileBody struct {
	Name        *string `json:"name"`
	AccountID   string  `json:"account_id"`
	Description *string `json:"description"`
	Email       *string `json:"email"`
}

func (b *profileBody) check() error {
	if err := checkOptional(b.Name, b.Description); err != nil {
		return err
	}
	if b.Email != nil {
		return checkText("email", *b.Email, maxEmail)
	}
	return nil
}

func (b *profileBody) apply(p *identity.Profile) {
	set(&p.Name, b.Name)
	set(&p.Description, b.Description)
	set(&p.Email, b.Email)
}

type profileView struct {
	ID          string `json:"id"`
	EntityTag   string `json:"entity_tag"`
	CRN         string `json:"crn"`
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Email       string `json:"email,omitempty"`
	CreatedAt   string `json:"created_at"`
	ModifiedAt  string `json:"modified_at"`
	IAMID       string `json:"iam_id"`
	AccountID   string `json:"account_id"`
	extras
}

func (r *routes) profileView(p *identity.Profile) profileView {
	return profileView{
		ID: p.ID, EntityTag: p.Tag(p.ID), CRN: r.profileCRN(p), Name: p.Name, Description: p.Description, Email: p.Email,
		CreatedAt: stamp(p.CreatedAt), ModifiedAt: stamp(p.ModifiedAt), IAMID: crn.IAMID(p.ID), AccountID: p.AccountID,
	}
}

func (r *routes) profileCRN(p *identity.Profile) string {
	return r.Names.Of(service, "", p.AccountID, "", "profile", p.ID).String()
}

func profileResource(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, "profile", access.Resource, id)
}

func (r *routes) profileTarget(c *api.Call, p *identity.Profile) api.Target {
	return api.Target{Resource: profileResource(c, p.ID), CRN: r.profileCRN(p), Name: p.Name, TypeURI: "iam-identity/account-profile"}
}

// profileReply shows a profile with its entity tag.
func (r *routes) profileReply(p *identity.Profile, status int) api.Reply {
	return api.Reply{Status: status, Body: r.profileView(p), ETag: p.Tag(p.ID)}
}

// loadProfile finds the path's profile in the caller's account.
func (r *routes) loadProfile(c *api.Call) (*identity.Profile, api.Target, error) {
	id := c.R.PathValue("profile")
	p, ok := r.Directory.Profiles.Get(id)
	if !ok || p.AccountID != c.Account() {
		return nil, api.Target{TypeURI: "iam-identity/account-profile"}, api.NotFound("trusted profile", id)
	}
	return p, r.profileTarget(c, p), nil
}

func (r *routes) showProfile(c *api.Call, p *identity.Profile) (api.Reply, error) {
	v := r.profileView(p)
	var err error
	v.extras, err = r.extras(c, v.CRN, directory.UserKey(c.Account(), v.IAMID), &p.Meta)
	return api.Reply{Body: v, ETag: v.EntityTag}, err
}

func (r *routes) newProfile(c *api.Call, b *profileBody) (*identity.Profile, api.Target, error) {
	target := api.Target{Resource: profileResource(c, ""), TypeURI: "iam-identity/account-profile"}
	if b.Name == nil {
		b.Name = new(string)
	}
	if err := b.check(); err != nil {
		return nil, target, err
	}
	target.Name = *b.Name
	if err := checkAccount(c, b.AccountID); err != nil {
		return nil, target, err
	}
	p := &identity.Profile{ID: crn.ProfilePrefix + uuid.NewString(), AccountID: b.AccountID}
	b.apply(p)
	return p, target, nil
}

func (r *routes) createProfile(c *api.Call, tx *directory.Tx, _ *profileBody, p *identity.Profile) (api.Reply, api.Target, error) {
	n := r.Directory.ProfilesByAccount.Len(p.AccountID)
	if n >= maxProfiles {
		return api.Reply{}, r.profileTarget(c, p), atLimit("The account has %d trusted profiles, which is the limit.", n)
	}
	r.Directory.Profiles.Put(tx, p)
	reply := r.profileReply(p, http.StatusCreated)
	reply.ResponseData = map[string]any{"profile_id": p.ID, "iam_id": crn.IAMID(p.ID)}
	nearLimit(reply.ResponseData, n+1, maxProfiles)
	return reply, r.profileTarget(c, p), nil
}

func (r *routes) listProfiles(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	v, err := parseView(c, true, "name", "description", "created_at", "modified_at")
	if err != nil {
		return api.Reply{}, err
	}
	var seen []*identity.Profile
	for _, p := range r.Directory.ProfilesByAccount.Get(c.Account()) {
		if v.admits(p.ID, crn.IAMID(p.ID), p.Name, p.Description, &p.Meta) && may(profileResource(c, p.ID)) {
			seen = append(seen, p)
		}
	}
	key := func(p *identity.Profile) string { return v.sortKey(p.ID, p.Name, p.Description, &p.Meta) }
	return list(c, v, "/v1/profiles", "profiles", seen, key, func(p *identity.Profile) (profileView, error) {
		one := r.profileView(p)
		if !v.history {
			return one, nil
		}
		var err error
		one.History, err = r.history(c, one.CRN, &p.Meta)
		return one, err
	})
}

func (r *routes) changedProfile(c *api.Call, b *profileBody) (*identity.Profile, api.Target, error) {
	if err := b.check(); err != nil {
		return nil, api.Target{TypeURI: "iam-identity/account-profile"}, err
	}
	return r.loadProfile(c)
}

func (r *routes) updateProfile(c *api.Call, tx *directory.Tx, b *profileBody, old *identity.Profile) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, target, err
	}
	p := *old
	b.apply(&p)
	r.Directory.Profiles.Put(tx, &p)
	reply := r.profileReply(&p, 0)
	reply.ResponseData = map[string]any{"name": p.Name, "prev_name": old.Name, "description": p.Description, "email": p.Email}
	return reply, r.profileTarget(c, &p), nil
}

// deleteProfile removes a profile with everything that led to it and all that
// it was given. Sessions end with it: a token is good only while its subject
// exists.
func (r *routes) deleteProfile(c *api.Call, tx *directory.Tx, _ *api.None, p *identity.Profile) (api.Reply, api.Target, error) {
	d := r.Directory
	d.Profiles.Delete(tx, p)
	var links, rules []string
	for _, l := range d.LinksByProfile.Get(p.ID) {
		d.Links.Delete(tx, l)
		links = append(links, l.ID)
	}
	for _, rule := range d.RulesByProfile.Get(p.ID) {
		d.Rules.Delete(tx, rule)
		rules = append(rules, rule.ID)
	}
	policies, groups := d.ForgetSubject(tx, p.AccountID, crn.IAMID(p.ID))
	data := map[string]any{"profile_id": p.ID}
	listed(data, "deleted_links", links)
	listed(data, "deleted_rules", rules)
	listed(data, "deleted_policies", policies)
	listed(data, "left_access_groups", groups)
	return api.Reply{Status: http.StatusNoContent, ResponseData: data}, r.profileTarget(c, p), nil
}
