package clusters

import (
	"bytes"
	"encoding/json"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// change is the body of a PATCH, and what came out of trying it. What is absent
// stays as it is; null removes the uploaded keys, the CA or the API server.
type change struct {
	JWKS      json.RawMessage `json:"jwks"`
	CA        json.RawMessage `json:"ca"`
	Server    json.RawMessage `json:"server"`
	Review    *bool           `json:"review"`
	Audience  *string         `json:"audience"`
	TestToken string          `json:"test_token"`

	// What names a cluster and its tokens is what links and rules are about.
	Name          json.RawMessage `json:"name"`
	Issuer        json.RawMessage `json:"issuer"`
	Type          json.RawMessage `json:"type"`
	Location      json.RawMessage `json:"location"`
	ResourceGroup json.RawMessage `json:"resource_group"`
	Groups        json.RawMessage `json:"groups"`

	old, next *cluster.Cluster
	trial     trial
}

// fixed returns a field of the body that cannot be changed, or "".
func (b *change) fixed() string {
	for _, f := range []struct {
		name string
		raw  json.RawMessage
	}{
		{"name", b.Name},
		{"issuer", b.Issuer},
		{"type", b.Type},
		{"location", b.Location},
		{"resource_group", b.ResourceGroup},
	} {
		if f.raw != nil {
			return f.name
		}
	}
	return ""
}

func isNull(raw json.RawMessage) bool { return string(raw) == "null" }

// prepareUpdate works out what the cluster is to become, and tries it out. The
// caller must have the right to change it before that.
func (h family) prepareUpdate(c *api.Call, b *change) error {
	old, target, err := find(c)
	c.About(target)
	if err != nil {
		return err
	}
	if err := c.Authorize(actionUpdate, target.Resource); err != nil {
		return err
	}
	if err := c.IfMatch(&old.Meta, old.ID, false); err != nil {
		return err
	}
	next := *old
	if err := h.apply(&next, b); err != nil {
		return err
	}
	if err := issuerFree(c, &next); err != nil {
		return err
	}
	b.old, b.next = old, &next
	b.trial, err = h.try(c, &next, proves(old, &next), b.TestToken)
	return err
}

// apply makes the body's changes to a copy of the cluster.
func (h family) apply(k *cluster.Cluster, b *change) error {
	if field := b.fixed(); field != "" {
		return api.Invalid("The field %s of a registered cluster cannot be changed: links and rules are about it. Register the cluster anew.", field).On(field)
	}
	if b.Groups != nil {
		return api.Invalid("The groups of a cluster are not changed here: PUT or DELETE /v1/cluster_groups/GROUP/clusters/CLUSTER.").On("groups")
	}
	var err error
	switch {
	case b.JWKS == nil:
	case isNull(b.JWKS):
		k.JWKS = nil
	default:
		if k.JWKS, err = publicKeys(b.JWKS); err != nil {
			return err
		}
	}
	if b.CA != nil {
		var text string
		if err := json.Unmarshal(b.CA, &text); err != nil {
			return api.Invalid("The field ca must be a string with certificates in PEM, or null.").On("ca")
		}
		if k.CA, err = certificates("ca", text); err != nil {
			return err
		}
	}
	switch {
	case b.Server == nil:
	case isNull(b.Server):
		k.Server = nil
	default:
		var in serverInput
		if err := json.Unmarshal(b.Server, &in); err != nil {
			return api.Invalid("The field server must be an object with url, ca and token, each a string, or null.").On("server")
		}
		if err := h.setServer(k, &in); err != nil {
			return err
		}
	}
	if b.Review != nil {
		k.Review = *b.Review
	}
	if b.Audience != nil {
		k.Audience = *b.Audience
	}
	if err := checkTestToken(b.TestToken); err != nil {
		return err
	}
	return check(k)
}

// proves reports whether a change is about how tokens are proved, so that the
// cluster has to be asked.
func proves(old, next *cluster.Cluster) bool {
	return !bytes.Equal(old.JWKS, next.JWKS) || old.CA != next.CA || old.Review != next.Review || !sameServer(old.Server, next.Server)
}

func sameServer(a, b *cluster.APIServer) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.URL == b.URL && a.CA == b.CA && bytes.Equal(a.Sealed, b.Sealed)
}

// loadUpdate finds the cluster again, inside the transaction. What was tried out
// was a change of the cluster as it stood then.
func loadUpdate(c *api.Call, b *change) (*cluster.Cluster, api.Target, error) {
	now, target, err := find(c)
	if err != nil {
		return nil, target, err
	}
	if now.ID != b.old.ID || now.Revision != b.old.Revision {
		return nil, target, fault.New(fault.Stale, "conflict", "The cluster was changed in the meantime; its entity tag is now %s.", now.Tag(now.ID))
	}
	return now, target, issuerFree(c, b.next)
}

func update(c *api.Call, tx *directory.Tx, b *change, old *cluster.Cluster) (api.Reply, api.Target, error) {
	k := b.next
	changed := differences(old, k)
	if len(changed) > 0 {
		c.Directory.Clusters.Put(tx, k)
	}
	answer := encode(c, k)
	b.trial.show(&answer)
	data := map[string]any{"id": k.ID, "changed": changed}
	if proves(old, k) {
		before := idsOf(old)
		answer.KeysAdded, answer.KeysRemoved = without(answer.KeyIDs, before), without(before, answer.KeyIDs)
		data["key_ids"], data["keys_added"], data["keys_removed"] = clipAll(answer.KeyIDs), clipAll(answer.KeysAdded), clipAll(answer.KeysRemoved)
	}
	if b.trial.tested != nil {
		data["tested"] = b.trial.tested
	}
	return api.Reply{Body: answer, ETag: answer.EntityTag, ResponseData: data}, targetOf(c, k), nil
}

// differences says for an event what changed, with the values from and to where
// they are no secrets and not long.
func differences(old, k *cluster.Cluster) map[string]any {
	out := map[string]any{}
	note := func(field string, from, to any) {
		if from != to {
			out[field] = map[string]any{"from": from, "to": to}
		}
	}
	var was, is cluster.APIServer
	if old.Server != nil {
		was = *old.Server
	}
	if k.Server != nil {
		is = *k.Server
	}
	note("audience", old.Audience, k.Audience)
	note("review", old.Review, k.Review)
	note("keys_from", attest.KeysFrom(old), attest.KeysFrom(k))
	note("server_url", was.URL, is.URL)
	for field, same := range map[string]bool{
		"jwks": bytes.Equal(old.JWKS, k.JWKS), "ca": old.CA == k.CA,
		"server_ca": was.CA == is.CA, "server_token": bytes.Equal(was.Sealed, is.Sealed),
	} {
		if !same {
			out[field] = true
		}
	}
	return out
}

// refreshment is the optional body of a refresh, and what came out of it.
type refreshment struct {
	old  *cluster.Cluster
	keys []string
}

// OptionalBody says that a refresh needs no body.
func (*refreshment) OptionalBody() {}

// refresh fetches a cluster's keys again, before the time is up at which that
// happens by itself. When it fails the remembered keys go on counting, for as
// long as they do without it.
func (h family) refresh(c *api.Call, b *refreshment) error {
	k, target, err := find(c)
	c.About(target)
	if err != nil {
		return err
	}
	if err := c.Authorize(actionOperate, target.Resource); err != nil {
		return err
	}
	if attest.KeysFrom(k) == attest.FromUpload {
		return fault.New(fault.Conflict, "keys_uploaded",
			"The keys of cluster %q were uploaded, so there is nothing to fetch them from. Upload the present ones: 'tabard ks cluster-update %s --rotate-keys', or PATCH with jwks.", k.Name, k.Name)
	}
	b.old = k
	if b.keys, err = h.Keys.Refresh(c.R.Context(), k); err != nil {
		return keysUnusable(c, k, err)
	}
	return nil
}

func loadRefreshed(c *api.Call, b *refreshment) (*cluster.Cluster, api.Target, error) {
	k, target, err := find(c)
	if err == nil && k.ID != b.old.ID {
		err = fault.New(fault.Stale, "conflict", "The cluster was changed in the meantime; its entity tag is now %s.", k.Tag(k.ID))
	}
	return k, target, err
}

func refreshed(c *api.Call, _ *directory.Tx, b *refreshment, k *cluster.Cluster) (api.Reply, api.Target, error) {
	answer := encode(c, k)
	found := trial{keyIDs: b.keys}
	found.show(&answer)
	return api.Reply{
		Body: answer, ETag: answer.EntityTag,
		ResponseData: map[string]any{"id": k.ID, "issuer": k.Issuer, "keys_from": answer.KeysFrom, "key_ids": clipAll(b.keys)},
	}, targetOf(c, k), nil
}
