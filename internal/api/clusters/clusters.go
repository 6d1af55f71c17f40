// Package clusters is the API in which Kubernetes clusters are registered, so
// that their service-account tokens count as evidence, and in which they are put
// into groups that rules can name. It is ours: the wire protocol has no
// counterpart, because there a cluster is known from its creation. What a
// registration is believed for is package attest's matter.
//
// Who says with which keys a cluster's tokens verify can be every pod of it, and
// who puts a cluster into a group lets its pods through the rules that name the
// group. Both are for administrators.
package clusters

import (
	"context"
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
	"tabard.dev/tabard/internal/token"
)

const (
	service = "containers-kubernetes"
	typeURI = "containers-kubernetes/cluster"
)

// Bounds on a registration beyond those of [cluster.Cluster.Validate].
const (
	maxClusters = 10_000   // of an account
	maxName     = 100      // characters
	maxIssuer   = 1024     // characters
	maxToken    = 16 << 10 // bytes of an API server's bearer token, or of a test token
)

// Actions. A registration's keys and its place in groups are changed with
// update, which only administrators have.
const (
	actionRead    = "containers-kubernetes.cluster.read"
	actionCreate  = "containers-kubernetes.cluster.create"
	actionUpdate  = "containers-kubernetes.cluster.update"
	actionOperate = "containers-kubernetes.cluster.operate"
	actionDelete  = "containers-kubernetes.cluster.delete"
)

// Keys finds the keys of clusters.
type Keys interface {
	// CheckIDs fetches or parses the cluster's keys now and returns their ids.
	// The cluster need not be registered; nothing is remembered of it.
	CheckIDs(ctx context.Context, k *cluster.Cluster) ([]string, error)
	// Refresh does that for a registered cluster, and what was found counts from
	// then on. When it fails, what was known goes on counting.
	Refresh(ctx context.Context, k *cluster.Cluster) ([]string, error)
}

// Tokens verifies tokens against registrations that need not be committed.
type Tokens interface {
	// Try verifies a token exactly as an exchange does, as if the cluster were
	// the only one that is registered, and remembers nothing of it. A token that
	// is not evidence gives a [*attest.Refusal].
	Try(ctx context.Context, k *cluster.Cluster, raw string) (attest.Proof, error)
}

// Reviewer asks clusters' API servers about tokens.
type Reviewer interface {
	// Check asks about a token that is none, to see that the API server answers
	// and takes the credential.
	Check(ctx context.Context, k *cluster.Cluster) error
}

// Options are what the family needs beyond what all of them do.
type Options struct {
	Keys     Keys
	Tokens   Tokens
	Reviewer Reviewer
	Sealer   *token.Sealer // of the bearer tokens for API servers
}

type family struct{ Options }

// Register adds the family's routes. A registration is tried out before it is
// committed, so that what is wrong with it is told at once and not at a
// workload's first token.
func Register(mux *http.ServeMux, cfg *api.Config, o Options) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Kubernetes Service", Shape: api.PlainShape}
	h := family{o}
	api.List(f, "GET /v1/clusters", actionRead, list)
	api.ChangeAfter(f, "POST /v1/clusters", actionCreate, actionCreate, h.prepareCreate, load, create)
	api.Read(f, "GET /v1/clusters/{id}", actionRead, find, show)
	api.ChangeAfter(f, "PATCH /v1/clusters/{id}", actionUpdate, actionUpdate, h.prepareUpdate, loadUpdate, update)
	api.ChangeAfter(f, "POST /v1/clusters/{id}/refresh_keys", actionOperate, "containers-kubernetes.cluster-keys.refresh",
		h.refresh, loadRefreshed, refreshed)
	api.Change(f, "DELETE /v1/clusters/{id}", actionDelete, actionDelete,
		func(c *api.Call, _ *api.None) (*cluster.Cluster, api.Target, error) { return find(c) }, remove)
	registerGroups(f)
}

// body shows a cluster. Keys and KeyIDs are absent where they are not known
// without asking the cluster: a read makes no requests of its own.
type body struct {
	ID              string          `json:"id"`
	CRN             string          `json:"crn"`
	AccountID       string          `json:"account_id"`
	Name            string          `json:"name"`
	Type            identity.CRType `json:"type"`
	Issuer          string          `json:"issuer"`
	Audience        string          `json:"audience"`
	Location        string          `json:"location"`
	ResourceGroupID string          `json:"resource_group_id"`
	KeysFrom        string          `json:"keys_from"`
	Keys            *int            `json:"keys,omitempty"`
	KeyIDs          []string        `json:"key_ids,omitempty"`
	HasCA           bool            `json:"has_ca"`
	Server          *serverBody     `json:"server,omitempty"`
	Review          bool            `json:"review"`
	Groups          []reference     `json:"groups"`
	CreatedAt       time.Time       `json:"created_at"`
	CreatedBy       string          `json:"created_by"`
	ModifiedAt      time.Time       `json:"modified_at"`
	ModifiedBy      string          `json:"modified_by"`
	EntityTag       string          `json:"entity_tag"`

	// Of the answer to a change.
	KeysAdded   []string `json:"keys_added,omitempty"`
	KeysRemoved []string `json:"keys_removed,omitempty"`
	Tested      *tested  `json:"tested,omitempty"`
}

// serverBody shows an API server, without the credential for it.
type serverBody struct {
	URL      string `json:"url"`
	HasCA    bool   `json:"has_ca"`
	HasToken bool   `json:"has_token"`
}

type reference struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

func encode(c *api.Call, k *cluster.Cluster) body {
	b := body{
		ID: k.ID, CRN: k.CRN, AccountID: k.AccountID, Name: k.Name, Type: k.Type, Issuer: k.Issuer, Audience: k.Audience, Location: k.Location,
		ResourceGroupID: k.ResourceGroupID, KeysFrom: attest.KeysFrom(k), HasCA: k.CA != "", Review: k.Review, Groups: groupsOf(c, k),
		CreatedAt: seconds(k.CreatedAt), CreatedBy: k.CreatedBy, ModifiedAt: seconds(k.ModifiedAt), ModifiedBy: k.ModifiedBy, EntityTag: k.Tag(k.ID),
	}
	if k.Server != nil {
		b.Server = &serverBody{URL: k.Server.URL, HasCA: k.Server.CA != "", HasToken: len(k.Server.Sealed) > 0}
	}
	if len(k.JWKS) > 0 {
		if keys, err := attest.ParseKeys(k.JWKS); err == nil {
			n := len(keys)
			b.Keys, b.KeyIDs = &n, keyIDs(keys)
		}
	}
	return b
}

// seconds is the form in which times are shown.
func seconds(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }

func keyIDs(keys []jose.JSONWebKey) []string {
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.KeyID
	}
	return ids
}

func resourceOf(c *api.Call, k *cluster.Cluster) map[string]string {
	return c.InAccount(service, access.ServiceInstance, k.ID, access.Region, k.Location, access.ResourceGroupID, k.ResourceGroupID)
}

func targetOf(c *api.Call, k *cluster.Cluster) api.Target {
	return api.Target{Resource: resourceOf(c, k), CRN: k.CRN, Name: k.Name, TypeURI: typeURI}
}

func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	rows := c.Directory.ClustersByAccount.Get(c.Account())
	slices.SortFunc(rows, func(a, b *cluster.Cluster) int {
		return strings.Compare(api.SortKey(a.CreatedAt, a.ID), api.SortKey(b.CreatedAt, b.ID))
	})
	out := []body{}
	for _, k := range rows {
		if may(resourceOf(c, k)) {
			out = append(out, encode(c, k))
		}
	}
	return api.Reply{Body: map[string]any{"clusters": out}}, nil
}

// find takes an id or a name; where one cluster's name is another one's id, the
// id counts.
func find(c *api.Call) (*cluster.Cluster, api.Target, error) { return findBy(c, c.R.PathValue("id")) }

func findBy(c *api.Call, ref string) (*cluster.Cluster, api.Target, error) {
	if k, ok := c.Directory.Clusters.Get(ref); ok && k.AccountID == c.Account() {
		return k, targetOf(c, k), nil
	}
	for _, k := range c.Directory.ClustersByAccount.Get(c.Account()) {
		if k.Name == ref {
			return k, targetOf(c, k), nil
		}
	}
	return nil, api.Target{TypeURI: typeURI}, api.NotFound("cluster", ref)
}

func show(c *api.Call, k *cluster.Cluster) (api.Reply, error) {
	return api.Reply{Body: encode(c, k), ETag: k.Tag(k.ID)}, nil
}

// registration is the body of a POST, and what came out of trying it.
type registration struct {
	Name          string          `json:"name"`
	Issuer        string          `json:"issuer"`
	JWKS          json.RawMessage `json:"jwks"`
	CA            string          `json:"ca"`
	Server        *serverInput    `json:"server"`
	Review        bool            `json:"review"`
	Audience      string          `json:"audience"`
	Type          string          `json:"type"`
	Location      string          `json:"location"`
	ResourceGroup string          `json:"resource_group"`
	Groups        []string        `json:"groups"` // cluster groups, by name or id
	TestToken     string          `json:"test_token"`

	cluster *cluster.Cluster
	trial   trial
}

// prepareCreate builds the cluster and tries it out. The caller must have the
// right to register it before that: else anybody with a token could send the
// server to URLs of his choice.
func (h family) prepareCreate(c *api.Call, b *registration) error {
	about := api.Target{TypeURI: typeURI}
	if api.Printable(b.Name, maxName) {
		about.Name = b.Name
	}
	c.About(about)
	k, err := h.build(c, b)
	if err != nil {
		return err
	}
	c.About(targetOf(c, k))
	if err := c.Authorize(actionCreate, resourceOf(c, k)); err != nil {
		return err
	}
	if err := joinGroups(c, k, b.Groups); err != nil {
		return err
	}
	if err := room(c, k); err != nil {
		return err
	}
	b.cluster = k
	b.trial, err = h.try(c, k, true, b.TestToken)
	return err
}

func (h family) build(c *api.Call, b *registration) (*cluster.Cluster, error) {
	k := &cluster.Cluster{
		ID: newID(), AccountID: c.Account(), Name: b.Name, Issuer: b.Issuer,
		Type: identity.CRType(b.Type), Location: b.Location, Audience: b.Audience, Review: b.Review,
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
	var err error
	if len(b.JWKS) > 0 && string(b.JWKS) != "null" {
		if k.JWKS, err = publicKeys(b.JWKS); err != nil {
			return nil, err
		}
	}
	if k.CA, err = certificates("ca", b.CA); err != nil {
		return nil, err
	}
	if b.Server != nil {
		if err := h.setServer(k, b.Server); err != nil {
			return nil, err
		}
	}
	if err := checkTestToken(b.TestToken); err != nil {
		return nil, err
	}
	if err := check(k); err != nil {
		return nil, err
	}
	k.CRN = c.Names.Of(service, k.Location, k.AccountID, k.ID, "", "").String()
	g, err := group(c, b.ResourceGroup)
	if err != nil {
		return nil, err
	}
	k.ResourceGroupID = g.ID
	return k, nil
}

// check holds a registration against the rules.
func check(k *cluster.Cluster) error {
	switch {
	case !api.Printable(k.Name, maxName) || strings.TrimSpace(k.Name) != k.Name:
		return api.Invalid("The field name must have 1 to %d printable characters and no space at its ends.", maxName).On("name")
	case !api.Printable(k.Issuer, maxIssuer):
		return api.Invalid("The field issuer must have 1 to %d printable characters.", maxIssuer).On("issuer")
	case !api.Printable(k.Audience, maxIssuer):
		return api.Invalid("The field audience must have printable characters only.").On("audience")
	case !validLocation(k.Location):
		return api.Invalid("The field location must have 1 to 64 lower-case letters, digits and hyphens.").On("location")
	case attest.KeysFrom(k) == attest.FromServer && len(k.Server.Sealed) == 0:
		return api.Invalid("The cluster's keys are to come from its API server, which gives them to nobody without a credential: give server.token, or upload the keys with jwks.").On("server.token")
	case k.Review && (k.Server == nil || len(k.Server.Sealed) == 0):
		return api.Invalid("With review, the cluster's API server is asked about each token; give server with url, ca and token.").On("review")
	}
	if err := k.Validate(); err != nil {
		return api.Invalid("The cluster cannot be registered: %s.", activity.Clip(err.Error()))
	}
	return nil
}

// publicKeys writes a key set anew, so that nothing is kept but the public keys.
func publicKeys(raw json.RawMessage) (json.RawMessage, error) {
	keys, err := attest.ParseKeys(raw)
	if err != nil {
		return nil, api.Invalid("The field jwks cannot be used: %s.", activity.Clip(err.Error())).On("jwks")
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		return nil, fmt.Errorf("encode a key set: %w", err)
	}
	return set, nil
}

// certificates returns the certificates in a field that may be empty.
func certificates(field, text string) (string, error) {
	if text == "" {
		return "", nil
	}
	ca, err := attest.Certificates(text)
	if err != nil {
		return "", api.Invalid("The field %s cannot be used: %s.", field, activity.Clip(err.Error())).On(field)
	}
	return ca, nil
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

// room refuses one cluster too many, and one whose tokens would be evidence of
// something else in the account, too.
func room(c *api.Call, k *cluster.Cluster) error {
	if c.Directory.ClustersByAccount.Len(c.Account()) >= maxClusters {
		return fault.New(fault.Conflict, "limit_exceeded", "The account has %d clusters, which is the limit.", maxClusters)
	}
	for _, other := range c.Directory.ClustersByAccount.Get(c.Account()) {
		if other.Name == k.Name {
			return fault.New(fault.Conflict, "conflict", "A cluster named %q already exists: see 'tabard ks cluster-get %s'. Take another name, or change that one.", k.Name, k.Name)
		}
	}
	for _, i := range c.Directory.WorkloadIssuersOf(k.Issuer) {
		if i.AccountID == c.Account() {
			return fault.New(fault.Conflict, "issuer_taken",
				"The issuer %q is already registered, as workload issuer %q, so that the claims of its tokens are those of that mapping. Delete it before you register the cluster.", k.Issuer, i.Name)
		}
	}
	return issuerFree(c, k)
}

// issuerFree refuses a cluster that would claim the same tokens as another of
// the account. Clusters with one issuer are told apart by their keys, when these
// were uploaded or come from their API servers.
func issuerFree(c *api.Call, k *cluster.Cluster) error {
	for _, other := range c.Directory.ClustersByIssuer.Get(k.Issuer) {
		if other.AccountID != c.Account() || other.ID == k.ID {
			continue
		}
		shared := slices.ContainsFunc(k.Claims(), func(claim string) bool { return slices.Contains(other.Claims(), claim) })
		if shared || attest.KeysFrom(k) == attest.FromIssuer || attest.KeysFrom(other) == attest.FromIssuer {
			return issuerTaken(k, other, shared)
		}
	}
	return nil
}

// issuerTaken is the fault of a cluster that cannot stand beside another one.
// Same says that both have the keys, or the API server, of one cluster.
func issuerTaken(k, other *cluster.Cluster, same bool) error {
	switch {
	case same && attest.KeysFrom(k) == attest.FromUpload:
		return fault.New(fault.Conflict, "issuer_taken",
			"The issuer %q is already registered with these keys, as cluster %q. Is it the same cluster, change that one: 'tabard ks cluster-update %s'.", k.Issuer, other.Name, other.Name)
	case same && attest.KeysFrom(k) == attest.FromServer:
		return fault.New(fault.Conflict, "issuer_taken",
			"The issuer %q is already registered with the keys of this API server, as cluster %q. Is it the same cluster, change that one: 'tabard ks cluster-update %s'.", k.Issuer, other.Name, other.Name)
	}
	remedy := "upload the keys of both"
	if attest.KeysFrom(other) != attest.FromIssuer {
		remedy = "upload the keys of this one, too"
	} else if attest.KeysFrom(k) != attest.FromIssuer {
		remedy = fmt.Sprintf("the keys of %q come from the issuer; upload them", other.Name)
	}
	return fault.New(fault.Conflict, "issuer_taken",
		"The issuer %q is already registered, as cluster %q. Is it the same cluster, change that one: 'tabard ks cluster-update %s'. Clusters with one issuer are told apart by their keys: %s ('--keys upload'), or give their API servers.",
		k.Issuer, other.Name, other.Name, remedy)
}

// load repeats inside the transaction what may have changed since prepareCreate
// looked.
func load(c *api.Call, b *registration) (*cluster.Cluster, api.Target, error) {
	k := b.cluster
	target := targetOf(c, k)
	if _, err := group(c, k.ResourceGroupID); err != nil {
		return nil, target, err
	}
	if err := joinGroups(c, k, b.Groups); err != nil {
		return nil, target, err
	}
	return k, target, room(c, k)
}

func create(c *api.Call, tx *directory.Tx, b *registration, k *cluster.Cluster) (api.Reply, api.Target, error) {
	c.Directory.Clusters.Put(tx, k)
	answer := encode(c, k)
	b.trial.show(&answer)
	data := map[string]any{
		"id": k.ID, "type": k.Type, "issuer": k.Issuer, "audience": k.Audience, "location": k.Location,
		"keys": len(b.trial.keyIDs), "key_ids": clipAll(b.trial.keyIDs), "keys_from": answer.KeysFrom, "keys_uploaded": len(k.JWKS) > 0,
		"has_ca": k.CA != "", "review": k.Review,
	}
	if k.Server != nil {
		data["server"] = answer.Server
	}
	if len(answer.Groups) > 0 {
		data["groups"] = answer.Groups
	}
	if b.trial.tested != nil {
		data["tested"] = b.trial.tested
	}
	return api.Reply{Status: http.StatusCreated, Body: answer, ETag: answer.EntityTag, ResponseData: data}, targetOf(c, k), nil
}

func remove(c *api.Call, tx *directory.Tx, _ *api.None, k *cluster.Cluster) (api.Reply, api.Target, error) {
	target := targetOf(c, k)
	if err := c.IfMatch(&k.Meta, k.ID, false); err != nil {
		return api.Reply{}, target, err
	}
	c.Directory.Clusters.Delete(tx, k)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"id": k.ID, "issuer": k.Issuer}}, target, nil
}
