// Package workloads is the API in which OpenID Connect issuers of workload
// tokens are registered, such as CI services, so that a job of theirs can put
// on a trusted profile without a secret. It is ours: the wire protocol has no
// counterpart. What a registration is believed for is package attest's matter,
// and which rules may be about it that of package cluster.
package workloads

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

const (
	service      = "iam-identity"
	resourceType = "workload-issuer"
	typeURI      = "iam-identity/workload-issuer"
)

// Actions on workload issuers. Whoever may register one, or change one, decides
// whose word counts for the profiles that have rules about it.
const (
	actionList   = "iam-identity.workload-issuer.list"
	actionGet    = "iam-identity.workload-issuer.get"
	actionCreate = "iam-identity.workload-issuer.create"
	actionUpdate = "iam-identity.workload-issuer.update"
	actionDelete = "iam-identity.workload-issuer.delete"
)

// Bounds on a registration beyond those of [cluster.Issuer.Validate].
const (
	maxIssuers = 50   // in an account
	maxIssuer  = 1024 // characters
	maxName    = 100  // characters
	maxNamed   = 10   // rules that a refusal names
)

// Prover verifies a token against one registration, which need not stand yet.
// The error is an *attest.Refusal.
type Prover interface {
	TryIssuer(ctx context.Context, i *cluster.Issuer, raw string) (attest.Proof, error)
}

// Options are what the family needs beside the configuration of all families.
type Options struct {
	Keys     *attest.Keys // asked once for each registration, so that a wrong issuer is told at once
	Prover   Prover
	Audience string // of registrations that name none: this installation's own
}

type family struct{ Options }

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config, o Options) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Identity Service", Shape: api.PlainShape}
	h := family{o}
	api.Open(f, "GET /v1/workload_presets", "the presets ship with the server and say nothing about an account", listPresets)
	api.List(f, "GET /v1/workload_issuers", actionList, list)
	api.ChangeAfter(f, "POST /v1/workload_issuers", actionCreate, actionCreate, h.prepareNew, loadNew, create)
	api.Read(f, "GET /v1/workload_issuers/{id}", actionGet, find, show)
	api.ChangeAfter(f, "PATCH /v1/workload_issuers/{id}", actionUpdate, actionUpdate, h.prepareChange, loadChanged, update)
	api.Change(f, "DELETE /v1/workload_issuers/{id}", actionDelete, actionDelete,
		func(c *api.Call, _ *api.None) (*cluster.Issuer, api.Target, error) { return find(c) }, remove)
}

func listPresets(*api.Call) (api.Reply, error) {
	presets, err := cluster.Presets()
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: map[string]any{"workload_presets": presets}}, nil
}

// view shows a workload issuer. Keys is absent where the number is not known
// without asking the issuer: a read makes no requests of its own.
type view struct {
	ID         string          `json:"id"`
	CRN        string          `json:"crn"`
	EntityTag  string          `json:"entity_tag"`
	Name       string          `json:"name"`
	AccountID  string          `json:"account_id"`
	Issuer     string          `json:"issuer"`
	Audience   string          `json:"audience"`
	Preset     string          `json:"preset,omitempty"`
	Mapping    cluster.Mapping `json:"mapping"`
	KeysFrom   string          `json:"keys_from"` // uploaded or issuer
	Keys       *int            `json:"keys,omitempty"`
	HasCA      bool            `json:"has_ca"`
	Tested     *tested         `json:"tested,omitempty"`
	CreatedAt  string          `json:"created_at"`
	CreatedBy  string          `json:"created_by"`
	ModifiedAt string          `json:"modified_at"`
	ModifiedBy string          `json:"modified_by"`
}

// tested is what a test token proved.
type tested struct {
	Subject string         `json:"subject"`
	Claims  map[string]any `json:"claims"` // as rules compare them
}

func encode(i *cluster.Issuer) view {
	v := view{
		ID: i.ID, CRN: i.CRN, EntityTag: i.Tag(i.ID), Name: i.Name, AccountID: i.AccountID, Issuer: i.Issuer, Audience: i.Audience,
		Preset: i.Preset, Mapping: i.Mapping, KeysFrom: "issuer", HasCA: i.CA != "",
		CreatedAt: stamp(i.CreatedAt), CreatedBy: i.CreatedBy, ModifiedAt: stamp(i.ModifiedAt), ModifiedBy: i.ModifiedBy,
	}
	if len(i.JWKS) > 0 {
		v.KeysFrom = "uploaded"
		if keys, err := attest.ParseKeys(i.JWKS); err == nil {
			v.Keys = new(len(keys))
		}
	}
	return v
}

func resourceOf(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, resourceType, access.Resource, id)
}

func targetOf(c *api.Call, i *cluster.Issuer) api.Target {
	return api.Target{Resource: resourceOf(c, i.ID), CRN: i.CRN, Name: i.Name, TypeURI: typeURI}
}

func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	rows := c.Directory.WorkloadIssuersByAccount.Get(c.Account())
	slices.SortFunc(rows, func(a, b *cluster.Issuer) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := []view{}
	for _, i := range rows {
		if may(resourceOf(c, i.ID)) {
			out = append(out, encode(i))
		}
	}
	return api.Reply{Body: map[string]any{"workload_issuers": out}}, nil
}

// find takes an id or a name; where the name of one is the id of another, the
// id counts.
func find(c *api.Call) (*cluster.Issuer, api.Target, error) {
	ref := c.R.PathValue("id")
	if i, ok := c.Directory.WorkloadIssuers.Get(ref); ok && i.AccountID == c.Account() {
		return i, targetOf(c, i), nil
	}
	for _, i := range c.Directory.WorkloadIssuersByAccount.Get(c.Account()) {
		if i.Name == ref {
			return i, targetOf(c, i), nil
		}
	}
	return nil, api.Target{TypeURI: typeURI}, api.NotFound("workload issuer", ref)
}

func show(_ *api.Call, i *cluster.Issuer) (api.Reply, error) {
	return api.Reply{Body: encode(i), ETag: i.Tag(i.ID)}, nil
}

// body is the body of a creation and of an update, and what the preparation
// made of it. In an update an absent field keeps its value; jwks null and an
// empty ca take theirs away.
type body struct {
	Name      *string         `json:"name"`
	Issuer    *string         `json:"issuer"`
	Audience  *string         `json:"audience"`
	Preset    *string         `json:"preset"`
	Mapping   json.RawMessage `json:"mapping"`
	JWKS      json.RawMessage `json:"jwks"`
	CA        *string         `json:"ca"`
	TestToken string          `json:"test_token"`

	issuer *cluster.Issuer
	found  *int // keys
	tested *tested
}

// apply puts what the caller gave into a registration and checks the whole.
func (b *body) apply(i *cluster.Issuer) error {
	set(&i.Name, b.Name)
	set(&i.Issuer, b.Issuer)
	set(&i.Audience, b.Audience)
	if err := b.applyMapping(i); err != nil {
		return err
	}
	if b.CA != nil {
		i.CA = ""
		if *b.CA != "" {
			ca, err := attest.Certificates(*b.CA)
			if err != nil {
				return api.Invalid("The field ca cannot be used: %s.", activity.Clip(err.Error())).On("ca")
			}
			i.CA = ca
		}
	}
	if len(b.JWKS) > 0 {
		i.JWKS = nil
		if string(b.JWKS) != "null" {
			keys, err := attest.ParseKeys(b.JWKS)
			if err != nil {
				return api.Invalid("The field jwks cannot be used: %s.", activity.Clip(err.Error())).On("jwks")
			}
			// Written anew, so that nothing is kept but the public keys.
			if i.JWKS, err = json.Marshal(jose.JSONWebKeySet{Keys: keys}); err != nil {
				return fmt.Errorf("encode the key set of workload issuer %s: %w", i.Name, err)
			}
		}
	}
	switch {
	case !api.Printable(i.Name, maxName) || strings.TrimSpace(i.Name) != i.Name:
		return api.Invalid("The field name must have 1 to %d printable characters and no space at its ends.", maxName).On("name")
	case i.Issuer == "" || !api.Printable(i.Issuer, maxIssuer):
		return api.Invalid("The field issuer is required, with at most %d printable characters: the iss claim of its tokens.", maxIssuer).On("issuer")
	case !api.Printable(i.Audience, maxIssuer):
		return api.Invalid("The field audience must have printable characters only.").On("audience")
	}
	if err := i.Validate(); err != nil {
		return api.Invalid("The workload issuer cannot be registered: %s.", activity.Clip(err.Error()))
	}
	return nil
}

// applyMapping takes a preset's mapping or one that is written out. A new
// registration without either compares subjects.
func (b *body) applyMapping(i *cluster.Issuer) error {
	written := len(b.Mapping) > 0 && string(b.Mapping) != "null"
	named := b.Preset != nil && *b.Preset != ""
	switch {
	case written && named:
		return api.Invalid("Give preset or mapping, not both.").On("mapping")
	case written:
		m, err := cluster.ParseMapping(b.Mapping)
		if err != nil {
			return api.Invalid("The field mapping cannot be used: %s.", activity.Clip(err.Error())).On("mapping")
		}
		i.Preset, i.Mapping = "", m
	case named:
		p, err := preset(*b.Preset)
		if err != nil {
			return err
		}
		i.Preset, i.Mapping = p.Name, p.Mapping
		if i.Issuer == "" {
			i.Issuer = p.Issuer
		}
	case len(i.Mapping.Claims) == 0:
		i.Mapping = cluster.SubjectOnly()
	}
	return nil
}

func preset(name string) (*cluster.Preset, error) {
	presets, err := cluster.Presets()
	if err != nil {
		return nil, err
	}
	names := make([]string, len(presets))
	for n, p := range presets {
		if p.Name == name {
			return p, nil
		}
		names[n] = p.Name
	}
	return nil, api.Invalid("There is no preset %q; there are %s.", activity.Clip(name), strings.Join(names, ", ")).On("preset")
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func set(field, value *string) {
	if value != nil {
		*field = *value
	}
}

// probe asks for the issuer's keys now, and verifies the test token if there is
// one, so that what is wrong is told at once and not at a job's first token.
func (h family) probe(c *api.Call, b *body, i *cluster.Issuer) error {
	n, err := h.Keys.Check(c.R.Context(), attest.IssuerKeys(i))
	if err != nil {
		return c.KeysUnusable(i.Issuer, err)
	}
	b.found = &n
	return nil
}

func (h family) test(c *api.Call, b *body, i *cluster.Issuer) error {
	token := strings.TrimSpace(b.TestToken)
	if token == "" {
		return nil
	}
	proof, err := h.Prover.TryIssuer(c.R.Context(), i, token)
	var refusal *attest.Refusal
	switch {
	case err == nil:
		subject, _ := proof.Evidence.Claims[cluster.ClaimSubject].(string)
		b.tested = &tested{Subject: subject, Claims: proof.Evidence.Claims}
		return nil
	case errors.As(err, &refusal) && refusal.Reason == attest.KeysUnavailable:
		return c.KeysUnusable(i.Issuer, refusal.Cause)
	case errors.As(err, &refusal):
		why := refusal.Detail
		if failed, ok := refusal.Trace.Failed(); ok {
			why += fmt.Sprintf(" (%s: wanted %s, found %s.)", failed.Name, activity.Clip(failed.Wanted), activity.Clip(failed.Found))
		}
		return fault.New(fault.Invalid, "test_token_refused", "Nothing was changed, because the test token would be refused: %s", why).
			On("test_token").Because(err)
	}
	return err
}

// prepareNew asks for the right first: else anybody with a token could send the
// server to URLs of his choice.
func (h family) prepareNew(c *api.Call, b *body) error {
	id := "WorkloadIssuer-" + uuid.NewString()
	about := api.Target{TypeURI: typeURI}
	if b.Name != nil && api.Printable(*b.Name, maxName) {
		about.Name = *b.Name
	}
	c.About(about)
	if err := c.Authorize(actionCreate, resourceOf(c, id)); err != nil {
		return err
	}
	i := &cluster.Issuer{
		ID: id, AccountID: c.Account(), Audience: h.Audience,
		CRN: c.Names.Of(service, "", c.Account(), "", resourceType, id).String(),
	}
	if b.Audience != nil && *b.Audience == "" {
		b.Audience = nil
	}
	if err := b.apply(i); err != nil {
		return err
	}
	c.About(targetOf(c, i))
	if err := free(c, i); err != nil {
		return err
	}
	if err := h.probe(c, b, i); err != nil {
		return err
	}
	b.issuer = i
	return h.test(c, b, i)
}

// free refuses a registration whose tokens another one of the account would
// speak for, too, and one too many.
func free(c *api.Call, i *cluster.Issuer) error {
	if c.Directory.WorkloadIssuersByAccount.Len(c.Account()) >= maxIssuers {
		return fault.New(fault.Conflict, "limit_exceeded", "The account has %d workload issuers, which is the limit.", maxIssuers)
	}
	for _, other := range c.Directory.WorkloadIssuersByAccount.Get(c.Account()) {
		if other.Name == i.Name {
			return fault.New(fault.Conflict, "conflict", "A workload issuer named %q already exists: see 'tabard iam workload-issuer %s'. Take another name, or change that one.", i.Name, i.Name)
		}
	}
	for _, other := range c.Directory.WorkloadIssuersOf(i.Issuer) {
		if other.AccountID == c.Account() {
			return fault.New(fault.Conflict, "issuer_taken", "The issuer %q is already registered, as workload issuer %q; change that one instead.", i.Issuer, other.Name)
		}
	}
	for _, k := range c.Directory.ClustersOf(i.Issuer) {
		if k.AccountID == c.Account() {
			return fault.New(fault.Conflict, "issuer_taken", "The issuer %q is registered as cluster %q; its pods have the claims of pods.", i.Issuer, k.Name)
		}
	}
	return nil
}

// safe refuses a registration with which rules that stand already would admit
// strangers: those of an earlier registration of the issuer, or of another
// mapping.
func safe(c *api.Call, i *cluster.Issuer) error {
	var unsafe []string
	more := 0
	for _, p := range c.Directory.ProfilesByAccount.Get(i.AccountID) {
		for _, rule := range c.Directory.RulesByProfile.Get(p.ID) {
			if rule.Type != identity.RuleCR || rule.CRType != identity.OIDC || !cluster.Names(rule.Conditions, i.Issuer) {
				continue
			}
			var f *cluster.Finding
			if err := cluster.Lint(rule.Conditions, []*cluster.Issuer{i}); !errors.As(err, &f) || f.Never {
				continue
			}
			if len(unsafe) == maxNamed {
				more++
				continue
			}
			unsafe = append(unsafe, fmt.Sprintf("%s of profile %s", rule.ID, p.ID))
		}
	}
	if len(unsafe) == 0 {
		return nil
	}
	slices.Sort(unsafe)
	if more > 0 {
		unsafe = append(unsafe, fmt.Sprintf("%d more", more))
	}
	return fault.New(fault.Conflict, "rules_unsafe",
		"With this mapping, rules about issuer %q that stand already would admit workloads of strangers: %s. Change or delete them first.",
		i.Issuer, strings.Join(unsafe, ", "))
}

// loadNew repeats inside the transaction what may have changed since the
// preparation.
func loadNew(c *api.Call, b *body) (*cluster.Issuer, api.Target, error) {
	t := targetOf(c, b.issuer)
	if err := free(c, b.issuer); err != nil {
		return nil, t, err
	}
	return b.issuer, t, safe(c, b.issuer)
}

func create(c *api.Call, tx *directory.Tx, b *body, i *cluster.Issuer) (api.Reply, api.Target, error) {
	c.Directory.WorkloadIssuers.Put(tx, i)
	v := b.answer(i)
	return api.Reply{Status: http.StatusCreated, Body: v, ETag: v.EntityTag, ResponseData: data(i)}, targetOf(c, i), nil
}

// answer shows a registration with what its test said.
func (b *body) answer(i *cluster.Issuer) view {
	v := encode(i)
	v.Tested = b.tested
	if b.found != nil {
		v.Keys = b.found
	}
	return v
}

// data is a registration's place in an activity event.
func data(i *cluster.Issuer) map[string]any {
	return map[string]any{
		"id": i.ID, "name": i.Name, "issuer": i.Issuer, "audience": i.Audience, "preset": i.Preset, "mapping": i.Mapping,
		"keys_uploaded": len(i.JWKS) > 0, "has_ca": i.CA != "",
	}
}

// prepareChange asks for the keys again when where they come from changes.
func (h family) prepareChange(c *api.Call, b *body) error {
	old, t, err := find(c)
	c.About(t)
	if err != nil {
		return err
	}
	if err := c.Authorize(actionUpdate, t.Resource); err != nil {
		return err
	}
	if b.Issuer != nil && *b.Issuer != old.Issuer {
		return api.Invalid("The issuer of a workload issuer cannot be changed: rules name it. Register the other one beside it.").On("issuer")
	}
	i := *old
	if err := b.apply(&i); err != nil {
		return err
	}
	if i.CA != old.CA || string(i.JWKS) != string(old.JWKS) {
		if err := h.probe(c, b, &i); err != nil {
			return err
		}
	}
	b.issuer = &i
	return h.test(c, b, &i)
}

// loadChanged finds the registration as it is now. One that was changed since
// the preparation is left to the entity tag, and to the revision that the change
// was prepared on.
func loadChanged(c *api.Call, _ *body) (*cluster.Issuer, api.Target, error) { return find(c) }

func update(c *api.Call, tx *directory.Tx, b *body, old *cluster.Issuer) (api.Reply, api.Target, error) {
	t := targetOf(c, old)
	if err := c.IfMatch(&old.Meta, old.ID, true); err != nil {
		return api.Reply{}, t, err
	}
	i := *b.issuer
	if i.ID != old.ID || i.Revision != old.Revision {
		return api.Reply{}, t, fault.New(fault.Stale, "conflict", "The workload issuer was changed in the meantime; its entity tag is now %s.", old.Tag(old.ID))
	}
	if err := safe(c, &i); err != nil {
		return api.Reply{}, t, err
	}
	c.Directory.WorkloadIssuers.Put(tx, &i)
	v := b.answer(&i)
	changed := data(&i)
	changed["previous"] = data(old)
	return api.Reply{Body: v, ETag: v.EntityTag, ResponseData: changed}, targetOf(c, &i), nil
}

// remove takes a registration away. Rules about it stay, and match nothing.
func remove(c *api.Call, tx *directory.Tx, _ *api.None, i *cluster.Issuer) (api.Reply, api.Target, error) {
	t := targetOf(c, i)
	if err := c.IfMatch(&i.Meta, i.ID, false); err != nil {
		return api.Reply{}, t, err
	}
	c.Directory.WorkloadIssuers.Delete(tx, i)
	return api.Reply{Status: http.StatusNoContent, ResponseData: data(i)}, t, nil
}
