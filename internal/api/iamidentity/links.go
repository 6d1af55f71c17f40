package iamidentity

import (
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

func (r *routes) registerLinks() {
	const path = "/v1/profiles/{profile}/links"
	api.Change(r.Family, "POST "+path, profileLink, profileUpdated, r.newLink, r.createLink)
	api.Read(r.Family, "GET "+path, profileGet, r.loadProfile, r.listLinks)
	api.Change(r.Family, "DELETE "+path, profileLink, profileUpdated, loading[api.None](r.loadLinkByValues), r.deleteLink)
	api.Read(r.Family, "GET "+path+"/{link}", profileGet, r.loadLink, r.showLink)
	api.Change(r.Family, "DELETE "+path+"/{link}", profileLink, profileUpdated, loading[api.None](r.loadLink), r.deleteLink)
}

// linkBody is the body of create (reference/iam-identity.md section 4.4).
type linkBody struct {
	CRType       identity.CRType `json:"cr_type"`
	Link         linked          `json:"link"`
	Name         string          `json:"name"`
	CrossAccount bool            `json:"is_cross_account"`
}

// linked is what a link points at.
type linked struct {
	CRN           string `json:"crn"`
	Namespace     string `json:"namespace,omitempty"`
	Name          string `json:"name,omitempty"`
	ComponentType string `json:"component_type,omitempty"`
	ComponentName string `json:"component_name,omitempty"`
}

// check tells whether the values name one compute resource of the type. The
// service in the CRN is not looked at: published clients link resources of
// services that have none.
func (l linked) check(t identity.CRType) error {
	if !t.Valid() {
		return api.Invalid("cr_type must be one of VSI, PVS, BMS, IKS_SA, ROKS_SA, CE.").On("cr_type")
	}
	if t == identity.OIDC {
		// Its CRN is the issuer's, whose workloads are not all one's own.
		return api.Invalid("There are no links of cr_type %s: create a claim rule, which says whose workloads of the issuer it admits.", t).On("cr_type")
	}
	if _, err := crn.Parse(l.CRN); err != nil {
		return api.Invalid("link.crn is %v.", err).On("link.crn")
	}
	for _, f := range []struct {
		field, value    string
		required, taken bool
	}{
		{"link.namespace", l.Namespace, t.Kubernetes(), t.Kubernetes() || t == identity.CE},
		{"link.name", l.Name, t.Kubernetes(), t.Kubernetes() || t == identity.CE},
		{"link.component_type", l.ComponentType, t == identity.CE, t == identity.CE},
		{"link.component_name", l.ComponentName, t == identity.CE, t == identity.CE},
	} {
		if f.required && strings.TrimSpace(f.value) == "" {
			return api.Invalid("%s is required for links of cr_type %s.", f.field, t).On(f.field)
		}
		// A value that is never compared would make the link look narrower
		// than it is.
		if f.value != "" && !f.taken {
			return api.Invalid("%s must not be given for links of cr_type %s.", f.field, t).On(f.field)
		}
		if err := checkText(f.field, f.value, maxName); err != nil {
			return err
		}
	}
	return nil
}

// same reports whether a link points at these values.
func (l linked) same(t identity.CRType, k *identity.Link) bool {
	return k.CRType == t && directory.ResourceKey(k.CRN) == directory.ResourceKey(l.CRN) &&
		k.Namespace == l.Namespace && k.ServiceAccount == l.Name &&
		k.ComponentType == l.ComponentType && k.ComponentName == l.ComponentName
}

type linkView struct {
	ID           string          `json:"id"`
	EntityTag    string          `json:"entity_tag"`
	CreatedAt    string          `json:"created_at"`
	ModifiedAt   string          `json:"modified_at"`
	Name         string          `json:"name,omitempty"`
	CRType       identity.CRType `json:"cr_type"`
	CrossAccount bool            `json:"is_cross_account"`
	Link         linked          `json:"link"`
}

func viewLink(l *identity.Link) linkView {
	return linkView{
		ID: l.ID, EntityTag: l.Tag(l.ID), CreatedAt: stamp(l.CreatedAt), ModifiedAt: stamp(l.ModifiedAt),
		Name: l.Name, CRType: l.CRType, CrossAccount: l.CrossAccount, Link: linkedOf(l),
	}
}

func linkedOf(l *identity.Link) linked {
	return linked{CRN: l.CRN, Namespace: l.Namespace, Name: l.ServiceAccount, ComponentType: l.ComponentType, ComponentName: l.ComponentName}
}

// linkChange is a link's place in an activity event.
func linkChange(what string, l *identity.Link) map[string]any {
	return map[string]any{"change": what, "link": map[string]any{
		"id": l.ID, "name": l.Name, "cr_type": l.CRType, "is_cross_account": l.CrossAccount, "link": linkedOf(l),
	}}
}

func (r *routes) newLink(c *api.Call, b *linkBody) (*identity.Profile, api.Target, error) {
	target := api.Target{TypeURI: "iam-identity/account-profile"}
	if err := b.Link.check(b.CRType); err != nil {
		return nil, target, err
	}
	if err := checkText("name", b.Name, maxName); err != nil {
		return nil, target, err
	}
	return r.loadProfile(c)
}

func (r *routes) createLink(c *api.Call, tx *directory.Tx, b *linkBody, p *identity.Profile) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, p)
	resource, err := crn.Parse(b.Link.CRN)
	if err != nil {
		return api.Reply{}, target, err
	}
	if !b.CrossAccount && resource.AccountID() != p.AccountID {
		return api.Reply{}, target, api.Invalid("link.crn must be in the account of the trusted profile unless is_cross_account is true.").On("link.crn")
	}
	existing := r.Directory.LinksByProfile.Get(p.ID)
	if slices.ContainsFunc(existing, func(l *identity.Link) bool { return b.Link.same(b.CRType, l) }) {
		return api.Reply{}, target, fault.New(fault.Conflict, "conflict", "The trusted profile %s is already linked to this compute resource.", p.ID)
	}
	if len(existing) >= identity.MaxLinksPerProfile {
		return api.Reply{}, target, atLimit("The trusted profile %s has %d links, which is the limit.", p.ID, identity.MaxLinksPerProfile)
	}
	l := &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, Name: b.Name, CRType: b.CRType,
		CRN: b.Link.CRN, Namespace: b.Link.Namespace, ServiceAccount: b.Link.Name,
		ComponentType: b.Link.ComponentType, ComponentName: b.Link.ComponentName, CrossAccount: b.CrossAccount,
	}
	r.Directory.Links.Put(tx, l)
	data := linkChange("link created", l)
	nearLimit(data, len(existing)+1, identity.MaxLinksPerProfile)
	return api.Reply{Status: http.StatusCreated, Body: viewLink(l), ETag: l.Tag(l.ID), ResponseData: data}, target, nil
}

func (r *routes) listLinks(_ *api.Call, p *identity.Profile) (api.Reply, error) {
	links := r.Directory.LinksByProfile.Get(p.ID)
	slices.SortFunc(links, func(a, b *identity.Link) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	views := make([]linkView, len(links))
	for i, l := range links {
		views[i] = viewLink(l)
	}
	return api.Reply{Body: map[string]any{"links": views}}, nil
}

func (r *routes) loadLink(c *api.Call) (ofProfile[identity.Link], api.Target, error) {
	p, target, err := r.loadProfile(c)
	if err != nil {
		return ofProfile[identity.Link]{}, target, err
	}
	id := c.R.PathValue("link")
	l, ok := r.Directory.Links.Get(id)
	if !ok || l.ProfileID != p.ID {
		return ofProfile[identity.Link]{}, target, api.NotFound("link", id)
	}
	return ofProfile[identity.Link]{p, l}, target, nil
}

// loadLinkByValues finds the link that the query describes completely: a value
// left out is one that the link must not have.
func (r *routes) loadLinkByValues(c *api.Call) (ofProfile[identity.Link], api.Target, error) {
	q := c.R.URL.Query()
	t := identity.CRType(q.Get("type"))
	want := linked{
		CRN: q.Get("crn"), Namespace: q.Get("namespace"), Name: q.Get("name"),
		ComponentType: q.Get("component_type"), ComponentName: q.Get("component_name"),
	}
	if err := want.check(t); err != nil {
		return ofProfile[identity.Link]{}, api.Target{TypeURI: "iam-identity/account-profile"}, err
	}
	p, target, err := r.loadProfile(c)
	if err != nil {
		return ofProfile[identity.Link]{}, target, err
	}
	for _, l := range r.Directory.LinksByProfile.Get(p.ID) {
		if want.same(t, l) {
			return ofProfile[identity.Link]{p, l}, target, nil
		}
	}
	return ofProfile[identity.Link]{}, target, api.NotFound("link to", want.CRN)
}

func (r *routes) showLink(_ *api.Call, found ofProfile[identity.Link]) (api.Reply, error) {
	return api.Reply{Body: viewLink(found.part), ETag: found.part.Tag(found.part.ID)}, nil
}

func (r *routes) deleteLink(c *api.Call, tx *directory.Tx, _ *api.None, found ofProfile[identity.Link]) (api.Reply, api.Target, error) {
	r.Directory.Links.Delete(tx, found.part)
	return api.Reply{Status: http.StatusNoContent, ResponseData: linkChange("link deleted", found.part)}, r.profileTarget(c, found.profile), nil
}
