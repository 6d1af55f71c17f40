// Package clusters is the API in which Kubernetes clusters are registered, so
// that their service-account tokens count as evidence. It is ours: the wire
// protocol has no counterpart, because there a cluster is known from its
// creation. What a registration is believed for is package attest's matter.
package clusters

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/resource"
)

const service = "containers-kubernetes"

// Bounds on a registration beyond those of [cluster.Cluster.Validate].
const (
	maxName   = 100  // characters
	maxIssuer = 1024 // characters
)

// family adds the verifier's keys to the routes that need them.
type family struct{ keys *attest.Keys }

// Register adds the family's routes. keys is asked once for each new cluster,
// so that a wrong issuer is told at once and not at a workload's first token.
func Register(mux *http.ServeMux, cfg *api.Config, keys *attest.Keys) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Kubernetes Service", Shape: api.PlainShape}
	h := family{keys: keys}
	api.List(f, "GET /v1/clusters", "containers-kubernetes.cluster.read", list)
	api.ChangeAfter(f, "POST /v1/clusters", actionCreate, "containers-kubernetes.cluster.create", h.prepare, load, create)
	api.Read(f, "GET /v1/clusters/{id}", "containers-kubernetes.cluster.read", find, show)
	api.Change(f, "DELETE /v1/clusters/{id}", "containers-kubernetes.cluster.delete", "containers-kubernetes.cluster.delete",
		func(c *api.Call, _ *api.None) (*cluster.Cluster, api.Target, error) { return find(c) }, remove)
}

const actionCreate = "containers-kubernetes.cluster.create"

// body shows a cluster. Keys is absent where the number is not known without
// asking the cluster: a read makes no requests of its own.
type body struct {
	ID              string          `json:"id"`
	CRN             string          `json:"crn"`
	Name            string          `json:"name"`
	Type            identity.CRType `json:"type"`
	Issuer          string          `json:"issuer"`
	Audience        string          `json:"audience"`
	Location        string          `json:"location"`
	ResourceGroupID string          `json:"resource_group_id"`
	Keys            *int            `json:"keys,omitempty"`
	HasCA           bool            `json:"has_ca"`
	CreatedAt       time.Time       `json:"created_at"`
	CreatedBy       string          `json:"created_by"`
	EntityTag       string          `json:"entity_tag"`
}

func encode(k *cluster.Cluster) body {
	b := body{
		ID: k.ID, CRN: k.CRN, Name: k.Name, Type: k.Type, Issuer: k.Issuer, Audience: k.Audience, Location: k.Location,
		ResourceGroupID: k.ResourceGroupID, HasCA: k.CA != "", CreatedAt: k.CreatedAt.UTC(), CreatedBy: k.CreatedBy, EntityTag: k.Tag(k.ID),
	}
	if len(k.JWKS) > 0 {
		if keys, err := attest.ParseKeys(k.JWKS); err == nil {
			n := len(keys)
			b.Keys = &n
		}
	}
	return b
}

func resourceOf(c *api.Call, k *cluster.Cluster) map[string]string {
	return c.InAccount(service, access.ServiceInstance, k.ID, access.Region, k.Location, access.ResourceGroupID, k.ResourceGroupID)
}

func targetOf(c *api.Call, k *cluster.Cluster) api.Target {
	return api.Target{Resource: resourceOf(c, k), CRN: k.CRN, Name: k.Name, TypeURI: "containers-kubernetes/cluster"}
}

func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	rows := c.Directory.ClustersByAccount.Get(c.Account())
	slices.SortFunc(rows, func(a, b *cluster.Cluster) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := []body{}
	for _, k := range rows {
		if may(resourceOf(c, k)) {
			out = append(out, encode(k))
		}
	}
	return api.Reply{Body: map[string]any{"clusters": out}}, nil
}

// find takes an id or a name; where one cluster's name is another one's id, the
// id counts.
func find(c *api.Call) (*cluster.Cluster, api.Target, error) {
	ref := c.R.PathValue("id")
	if k, ok := c.Directory.Clusters.Get(ref); ok && k.AccountID == c.Account() {
		return k, targetOf(c, k), nil
	}
	for _, k := range c.Directory.ClustersByAccount.Get(c.Account()) {
		if k.Name == ref {
			return k, targetOf(c, k), nil
		}
	}
	return nil, api.Target{}, api.NotFound("cluster", ref)
}

func show(_ *api.Call, k *cluster.Cluster) (api.Reply, error) {
	return api.Reply{Body: encode(k), ETag: k.Tag(k.ID)}, nil
}

// registration is the body of a POST, and what prepare made of it.
type registration struct {
	Name          string          `json:"name"`
	Issuer        string          `json:"issuer"`
	JWKS          json.RawMessage `json:"jwks"`
	CA            string          `json:"ca"`
	Audience      string          `json:"audience"`
	Type          string          `json:"type"`
	Location      string          `json:"location"`
	ResourceGroup string          `json:"resource_group"`

	cluster *cluster.Cluster
	found   int // keys
}

// prepare builds the cluster and asks for its keys. The caller must have the
// right to register it before that: else anybody with a token could send the
// server to URLs of his choice.
func (h family) prepare(c *api.Call, b *registration) error {
	k, err := build(c, b)
	if err != nil {
		return err
	}
	if err := c.Authorize(actionCreate, resourceOf(c, k)); err != nil {
		return err
	}
	if err := issuerFree(c, k); err != nil {
		return err
	}
	n, err := h.keys.Check(c.R.Context(), k)
	if err != nil {
		return c.KeysUnusable(k.Issuer, err)
	}
	b.cluster, b.found = k, n
	return nil
}

func build(c *api.Call, b *registration) (*cluster.Cluster, error) {
	k := &cluster.Cluster{
		ID: newID(), AccountID: c.Account(), Name: b.Name, Issuer: b.Issuer,
		Type: identity.CRType(b.Type), Location: b.Location, Audience: b.Audience,
	}
	if k.Type == "" {
		k.Type = identity.IKSSA
	}
	if k.Location == "" {
		k.Location = c.Region
	}
	if k.Audience == "" {
		k.Audience = cluster.DefaultAudience
	}
	if len(b.JWKS) > 0 && string(b.JWKS) != "null" {
		keys, err := attest.ParseKeys(b.JWKS)
		if err != nil {
			return nil, api.Invalid("The field jwks cannot be used: %s.", activity.Clip(err.Error())).On("jwks")
		}
		// Written anew, so that nothing is kept but the public keys.
		if k.JWKS, err = json.Marshal(jose.JSONWebKeySet{Keys: keys}); err != nil {
			return nil, fmt.Errorf("encode the key set of cluster %s: %w", k.Name, err)
		}
	}
	if b.CA != "" {
		ca, err := attest.Certificates(b.CA)
		if err != nil {
			return nil, api.Invalid("The field ca cannot be used: %s.", activity.Clip(err.Error())).On("ca")
		}
		k.CA = ca
	}
	switch {
	case !api.Printable(k.Name, maxName) || strings.TrimSpace(k.Name) != k.Name:
		return nil, api.Invalid("The field name must have 1 to %d printable characters and no space at its ends.", maxName).On("name")
	case !api.Printable(k.Issuer, maxIssuer):
		return nil, api.Invalid("The field issuer must have 1 to %d printable characters.", maxIssuer).On("issuer")
	case !api.Printable(k.Audience, maxIssuer):
		return nil, api.Invalid("The field audience must have printable characters only.").On("audience")
	case !validLocation(k.Location):
		return nil, api.Invalid("The field location must have 1 to 64 lower-case letters, digits and hyphens.").On("location")
	}
	if err := k.Validate(); err != nil {
		return nil, api.Invalid("The cluster cannot be registered: %s.", activity.Clip(err.Error()))
	}
	k.CRN = c.Names.Of(service, k.Location, k.AccountID, k.ID, "", "").String()
	g, err := group(c, b.ResourceGroup)
	if err != nil {
		return nil, err
	}
	k.ResourceGroupID = g.ID
	return k, nil
}

// group returns the resource group with an id, or the account's default one.
func group(c *api.Call, id string) (*resource.Group, error) {
	for _, g := range c.Directory.ResourceGroupsByAccount.Get(c.Account()) {
		if g.ID == id || id == "" && g.Default {
			return g, nil
		}
	}
	return nil, api.NotFound("resource group", id)
}

// validLocation keeps what becomes a segment of a CRN to letters, digits and
// hyphens.
func validLocation(s string) bool {
	return len(s) >= 1 && len(s) <= 64 && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	}) < 0
}

// newID returns 20 random lower-case letters and digits, the first one a c: the
// form of cluster ids that clients have seen.
func newID() string {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	id := []byte{'c'}
	for len(id) < 20 {
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(alphabet))))
		if err != nil {
			panic("no randomness: " + err.Error()) // never, see crypto/rand
		}
		id = append(id, alphabet[n.Int64()])
	}
	return string(id)
}

// issuerFree refuses a cluster that would claim the same tokens as another of
// the account: one with the same issuer, unless the keys of both were uploaded
// and differ.
func issuerFree(c *api.Call, k *cluster.Cluster) error {
	for _, other := range c.Directory.ClustersByIssuer.Get(k.Issuer) {
		if other.AccountID != c.Account() {
			continue
		}
		shared := slices.ContainsFunc(k.Claims(), func(claim string) bool { return slices.Contains(other.Claims(), claim) })
		if shared || len(k.JWKS) == 0 || len(other.JWKS) == 0 {
			return fault.New(fault.Conflict, "issuer_taken",
				"The issuer %q is already registered, as cluster %q. Clusters with one issuer are told apart by uploaded keys.", k.Issuer, other.Name)
		}
	}
	return nil
}

// load repeats inside the transaction what may have changed since prepare
// looked.
func load(c *api.Call, b *registration) (*cluster.Cluster, api.Target, error) {
	k := b.cluster
	target := targetOf(c, k)
	if _, err := group(c, k.ResourceGroupID); err != nil {
		return nil, target, err
	}
	return k, target, issuerFree(c, k)
}

func create(c *api.Call, tx *directory.Tx, b *registration, k *cluster.Cluster) (api.Reply, api.Target, error) {
	c.Directory.Clusters.Put(tx, k)
	answer := encode(k)
	answer.Keys = &b.found
	return api.Reply{
		Status: http.StatusCreated, Body: answer, ETag: answer.EntityTag,
		ResponseData: map[string]any{
			"id": k.ID, "type": k.Type, "issuer": k.Issuer, "audience": k.Audience, "location": k.Location,
			"keys": b.found, "keys_uploaded": len(k.JWKS) > 0, "has_ca": k.CA != "",
		},
	}, targetOf(c, k), nil
}

func remove(c *api.Call, tx *directory.Tx, _ *api.None, k *cluster.Cluster) (api.Reply, api.Target, error) {
	target := targetOf(c, k)
	if err := c.IfMatch(&k.Meta, k.ID, false); err != nil {
		return api.Reply{}, target, err
	}
	c.Directory.Clusters.Delete(tx, k)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"id": k.ID, "issuer": k.Issuer}}, target, nil
}
