package accounts

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

const iamIdentity = "iam-identity"

// Actions on identity providers.
const (
	idpList   = "iam-identity.idp.list"
	idpGet    = "iam-identity.idp.get"
	idpCreate = "iam-identity.idp.create"
	idpUpdate = "iam-identity.idp.update"
	idpDelete = "iam-identity.idp.delete"
)

// Bounds on an identity provider. Five in an account is published
// (reference/iam-identity.md section 4.11).
const (
	maxProviders = 5
	maxIssuer    = 1024 // characters
	maxAudience  = 256  // characters
)

// registerProviders adds the routes of identity providers. The paths are the
// published ones; the shape is ours, an OpenID Connect issuer and no more.
func (r *routes) registerProviders() {
	for _, p := range []string{"/v1/idps", "/v1/idps/{$}"} {
		api.List(r.Family, "GET "+p, idpList, r.listProviders)
		api.ChangeAfter(r.Family, "POST "+p, idpCreate, idpCreate, r.prepareProvider, r.loadNewProvider, r.createProvider)
	}
	api.Read(r.Family, "GET /v1/idps/{id}", idpGet, r.findProvider, r.showProvider)
	api.ChangeAfter(r.Family, "PUT /v1/idps/{id}", idpUpdate, idpUpdate, r.prepareUpdate, r.loadProvider, r.updateProvider)
	api.Change(r.Family, "DELETE /v1/idps/{id}", idpDelete, idpDelete,
		func(c *api.Call, _ *api.None) (*identity.Provider, api.Target, error) { return r.findProvider(c) }, r.deleteProvider)
}

// providerView shows an identity provider. Keys is absent where they come from
// the issuer: a read makes no requests of its own.
type providerView struct {
	ID         string          `json:"id"`
	CRN        string          `json:"crn"`
	EntityTag  string          `json:"entity_tag"`
	Name       string          `json:"name"`
	AccountID  string          `json:"account_id"`
	Issuer     string          `json:"issuer"`
	Audience   string          `json:"audience"`
	CA         string          `json:"ca,omitempty"`
	JWKS       json.RawMessage `json:"jwks,omitempty"`
	Enabled    bool            `json:"enabled"`
	CreatedAt  string          `json:"created_at"`
	CreatedBy  string          `json:"created_by"`
	ModifiedAt string          `json:"modified_at"`
	ModifiedBy string          `json:"modified_by"`
}

func (r *routes) providerView(p *identity.Provider) providerView {
	return providerView{
		ID: p.ID, CRN: r.providerCRN(p), EntityTag: p.Tag(p.ID), Name: p.Name, AccountID: p.AccountID, Issuer: p.Issuer,
		Audience: p.Audience, CA: p.CA, JWKS: json.RawMessage(p.JWKS), Enabled: !p.Disabled,
		CreatedAt: stamp(p.CreatedAt), CreatedBy: p.CreatedBy, ModifiedAt: stamp(p.ModifiedAt), ModifiedBy: p.ModifiedBy,
	}
}

func (r *routes) providerCRN(p *identity.Provider) string {
	return r.Names.Of(iamIdentity, "", p.AccountID, "", "idp", p.ID).String()
}

func providerResource(c *api.Call, id string) map[string]string {
	return c.InAccount(iamIdentity, access.ResourceType, "idp", access.Resource, id)
}

func (r *routes) providerTarget(c *api.Call, p *identity.Provider) api.Target {
	return api.Target{Resource: providerResource(c, p.ID), CRN: r.providerCRN(p), Name: p.Name, TypeURI: "iam-identity/idp"}
}

// listProviders takes the parameter account_id that published clients send.
func (r *routes) listProviders(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	if err := accountNamed(c, c.R.URL.Query().Get("account_id")); err != nil {
		return api.Reply{}, err
	}
	rows := slices.DeleteFunc(r.Directory.ProvidersByAccount.Get(c.Account()), func(p *identity.Provider) bool {
		return !may(providerResource(c, p.ID))
	})
	slices.SortFunc(rows, func(a, b *identity.Provider) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := make([]providerView, len(rows))
	for i, p := range rows {
		out[i] = r.providerView(p)
	}
	return api.Reply{Body: map[string]any{"idps": out}}, nil
}

// accountNamed demands that an account is the caller's, where one is named.
func accountNamed(c *api.Call, id string) error {
	switch {
	case id == "" || id == c.Account():
		return nil
	case !crn.ValidAccountID(id):
		return api.Invalid("account_id must be 32 lower-case hexadecimal digits.").On("account_id")
	}
	return api.NotFound("account", id)
}

func (r *routes) findProvider(c *api.Call) (*identity.Provider, api.Target, error) {
	id := c.R.PathValue("id")
	p, ok := r.Directory.Providers.Get(id)
	if !ok || p.AccountID != c.Account() {
		return nil, api.Target{TypeURI: "iam-identity/idp"}, api.NotFound("identity provider", id)
	}
	return p, r.providerTarget(c, p), nil
}

func (r *routes) showProvider(_ *api.Call, p *identity.Provider) (api.Reply, error) {
	return api.Reply{Body: r.providerView(p), ETag: p.Tag(p.ID)}, nil
}

// providerBody is the body of a creation and of an update. In an update an
// absent field keeps its value; jwks null and an empty ca take theirs away.
type providerBody struct {
	AccountID string          `json:"account_id"`
	Name      *string         `json:"name"`
	Issuer    *string         `json:"issuer"`
	Audience  *string         `json:"audience"`
	CA        *string         `json:"ca"`
	JWKS      json.RawMessage `json:"jwks"`
	Enabled   *bool           `json:"enabled"`

	provider *identity.Provider
}

// apply puts what the caller gave into a provider and checks the whole.
func (b *providerBody) apply(p *identity.Provider) error {
	set(&p.Name, b.Name)
	set(&p.Issuer, b.Issuer)
	set(&p.Audience, b.Audience)
	if b.Enabled != nil {
		p.Disabled = !*b.Enabled
	}
	if b.CA != nil {
		p.CA = ""
		if *b.CA != "" {
			ca, err := attest.Certificates(*b.CA)
			if err != nil {
				return api.Invalid("The field ca cannot be used: %s.", activity.Clip(err.Error())).On("ca")
			}
			p.CA = ca
		}
	}
	if len(b.JWKS) > 0 {
		p.JWKS = nil
		if string(b.JWKS) != "null" {
			keys, err := attest.ParseKeys(b.JWKS)
			if err != nil {
				return api.Invalid("The field jwks cannot be used: %s.", activity.Clip(err.Error())).On("jwks")
			}
			// Written anew, so that nothing is kept but the public keys.
			if p.JWKS, err = json.Marshal(jose.JSONWebKeySet{Keys: keys}); err != nil {
				return fmt.Errorf("encode the key set of identity provider %s: %w", p.Name, err)
			}
		}
	}
	if err := checkName("name", p.Name); err != nil {
		return err
	}
	switch {
	case p.Issuer == "" || !api.Printable(p.Issuer, maxIssuer):
		return api.Invalid("issuer is required, with at most %d printable characters: the iss claim of its tokens.", maxIssuer).On("issuer")
	case p.Audience == "" || !api.Printable(p.Audience, maxAudience):
		return api.Invalid("audience is required, with at most %d printable characters: the aud claim that its tokens must have.", maxAudience).On("audience")
	}
	if err := cluster.ValidFetchURL(p.Issuer); err != nil {
		return api.Invalid("The field issuer cannot be used: it must be an https URL (http only on loopback), without credentials and fragment.").On("issuer")
	}
	return nil
}

// probe asks for a provider's keys now, so that a wrong issuer is told at once
// and not at somebody's first login.
func (r *routes) probe(c *api.Call, p *identity.Provider) error {
	source := &cluster.Cluster{ID: p.ID, Issuer: p.Issuer, CA: p.CA, JWKS: json.RawMessage(p.JWKS)}
	if _, err := r.keys.Check(c.R.Context(), source); err != nil {
		return c.KeysUnusable(p.Issuer, err)
	}
	return nil
}

// prepareProvider asks for the right first: else anybody with a token could
// send the server to URLs of his choice.
func (r *routes) prepareProvider(c *api.Call, b *providerBody) error {
	p := &identity.Provider{ID: "Idp-" + uuid.NewString(), AccountID: c.Account()}
	about := api.Target{TypeURI: "iam-identity/idp"}
	if b.Name != nil && api.Printable(*b.Name, maxName) {
		about.Name = *b.Name
	}
	c.About(about)
	if err := c.Authorize(idpCreate, providerResource(c, p.ID)); err != nil {
		return err
	}
	if err := mayVouch(c); err != nil {
		return err
	}
	if err := accountNamed(c, b.AccountID); err != nil {
		return err
	}
	if err := b.apply(p); err != nil {
		return err
	}
	c.About(r.providerTarget(c, p))
	if err := r.roomFor(c); err != nil {
		return err
	}
	b.provider = p
	return r.probe(c, p)
}

// mayVouch refuses callers who may not manage the API keys of others. Whoever
// chooses the keys that vouch for users, or the client whose tokens count, can
// log in as each of them: that is as good as an API key of every user.
func mayVouch(c *api.Call) error {
	return c.Authorize(keyManage, c.InAccount(iamIdentity, access.ResourceType, "apikey"))
}

func (r *routes) roomFor(c *api.Call) error {
	if r.Directory.ProvidersByAccount.Len(c.Account()) >= maxProviders {
		return fault.New(fault.Conflict, "limit_exceeded", "The account has %d identity providers, which is the limit.", maxProviders)
	}
	return nil
}

// loadNewProvider repeats inside the transaction what may have changed since
// the preparation.
func (r *routes) loadNewProvider(c *api.Call, b *providerBody) (*identity.Provider, api.Target, error) {
	return b.provider, r.providerTarget(c, b.provider), r.roomFor(c)
}

func (r *routes) createProvider(c *api.Call, tx *directory.Tx, _ *providerBody, p *identity.Provider) (api.Reply, api.Target, error) {
	r.Directory.Providers.Put(tx, p)
	v := r.providerView(p)
	return api.Reply{Status: http.StatusCreated, Body: v, ETag: v.EntityTag, ResponseData: providerData(p)}, r.providerTarget(c, p), nil
}

// providerData is a provider's place in an activity event.
func providerData(p *identity.Provider) map[string]any {
	return map[string]any{
		"id": p.ID, "name": p.Name, "issuer": p.Issuer, "audience": p.Audience, "enabled": !p.Disabled,
		"keys_uploaded": len(p.JWKS) > 0, "has_ca": p.CA != "",
	}
}

// prepareUpdate asks for the keys again when where they come from changes.
func (r *routes) prepareUpdate(c *api.Call, b *providerBody) error {
	old, t, err := r.findProvider(c)
	c.About(t)
	if err != nil {
		return err
	}
	if err := c.Authorize(idpUpdate, t.Resource); err != nil {
		return err
	}
	if b.Issuer != nil && *b.Issuer != old.Issuer {
		return api.Invalid("The issuer of an identity provider cannot be changed: its users are known by it. Register the other one beside it.").On("issuer")
	}
	if err := accountNamed(c, b.AccountID); err != nil {
		return err
	}
	p := *old
	if err := b.apply(&p); err != nil {
		return err
	}
	b.provider = &p
	moved := p.CA != old.CA || string(p.JWKS) != string(old.JWKS)
	if moved || p.Audience != old.Audience {
		if err := mayVouch(c); err != nil {
			return err
		}
	}
	if moved {
		return r.probe(c, &p)
	}
	return nil
}

// loadProvider finds the provider as it is now. One that was changed since the
// preparation is left to the entity tag, and to the revision that the change
// was prepared on.
func (r *routes) loadProvider(c *api.Call, _ *providerBody) (*identity.Provider, api.Target, error) {
	return r.findProvider(c)
}

func (r *routes) updateProvider(c *api.Call, tx *directory.Tx, b *providerBody, old *identity.Provider) (api.Reply, api.Target, error) {
	t := r.providerTarget(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, t, err
	}
	p := *b.provider
	if p.Revision != old.Revision {
		return api.Reply{}, t, fault.New(fault.Stale, "conflict", "The identity provider was changed in the meantime; its entity tag is now %s.", old.Tag(old.ID))
	}
	r.Directory.Providers.Put(tx, &p)
	if p.Disabled {
		r.Directory.EndMembershipsOf(tx, p.AccountID, p.Issuer)
	}
	v := r.providerView(&p)
	data := providerData(&p)
	data["previous"] = providerData(old)
	return api.Reply{Body: v, ETag: v.EntityTag, ResponseData: data}, r.providerTarget(c, &p), nil
}

func (r *routes) deleteProvider(c *api.Call, tx *directory.Tx, _ *api.None, p *identity.Provider) (api.Reply, api.Target, error) {
	t := r.providerTarget(c, p)
	if err := c.IfMatch(&p.Meta, p.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	r.Directory.Providers.Delete(tx, p)
	r.Directory.EndMembershipsOf(tx, p.AccountID, p.Issuer)
	return api.Reply{Status: http.StatusNoContent, ResponseData: providerData(p)}, t, nil
}
