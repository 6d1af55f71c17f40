package hosts

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/link"
)

func newID() string { return uuid.NewString() }

// secretPrefix lets a scanner for leaked secrets know a join token.
const secretPrefix = "tabard-join-"

func newSecret() string {
	b := make([]byte, 32)
	rand.Read(b) // never fails, see crypto/rand
	return secretPrefix + base64.RawURLEncoding.EncodeToString(b)
}

// join lets a host in: it shows a join token, the public key that it has made,
// and that it holds the private half. The token is used up, and whoever finds
// it afterwards has nothing: only the same key gets the same answer again, while
// the token would still be good, because an answer can be lost.
func (h *handler) join(c *api.Call, tx *directory.Tx, b *link.JoinRequest) (api.Reply, api.Target, error) {
	t := api.Target{TypeURI: "host/host"}
	refuse := func(code, why string, cause error) (api.Reply, api.Target, error) {
		return api.Reply{}, t, fault.New(fault.Unauthenticated, code, "%s", why).Because(cause)
	}
	j, ok := h.Directory.JoinTokensByHash.One(h.opts.Sealer.Hash(b.Token))
	switch {
	case !ok:
		return refuse("join_token_unknown", "The join token is not one of this server's, or too old. Make a new one with tabard host create-join-token.", nil)
	case j.UsedBy == "" && !tx.Now.Before(j.Expires):
		return refuse("join_token_expired", "The join token has expired. Make a new one with tabard host create-join-token.", nil)
	}
	t.Name = j.Name
	key, err := h.opts.Proofs.Join(b.Key, b.Proof, link.Fingerprint(b.Token), h.opts.KeyPrefix)
	if j.UsedBy != "" {
		t.CRN = h.crn(j.UsedBy)
		x, ok := h.Directory.Hosts.Get(j.UsedBy)
		if err != nil || !ok || x.Revoked || !slices.Contains(x.KeyIDs(), key.KeyID) || !tx.Now.Before(j.Expires) {
			return refuse("join_token_used", "The join token was used before. If it was not you, revoke the host "+j.Name+"; then make a new token.", err)
		}
		// It has not heard the answer.
		return h.joined(x, key.KeyID, j), t, nil
	}
	if err != nil {
		return refuse("proof_invalid", "The host has not proved that it holds the key: "+activity.Clip(err.Error()), err)
	}
	if _, taken := h.Directory.HostsByKey.One(key.KeyID); taken {
		return refuse("key_in_use", "The key is that of a host already. A host that joins, or joins again, makes a new one.", nil)
	}
	if j.HostID == "" && h.named(j.Name) {
		return api.Reply{}, t, fault.New(fault.Conflict, "name_not_unique", "Another host has taken the name %s in the meantime. Make a token with another name.", j.Name)
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{*key}})
	if err != nil {
		return api.Reply{}, t, err
	}
	host := cluster.Host{ID: crn.HostPrefix + newID(), Name: j.Name, Zone: j.Zone}
	if j.HostID != "" {
		old, ok := h.Directory.Hosts.Get(j.HostID)
		if !ok {
			return refuse("join_token_unknown", "The host that was to join again does not exist any more.", nil)
		}
		host = *old
		host.Revoked = false
	}
	host.JWKS = set
	h.Directory.Hosts.Put(tx, &host)
	used := *j
	used.UsedBy = host.ID
	h.Directory.JoinTokens.Put(tx, &used)
	t.CRN = h.crn(host.ID)
	return h.joined(&host, key.KeyID, j), t, nil
}

func (h *handler) joined(x *cluster.Host, keyID string, j *cluster.JoinToken) api.Reply {
	return api.Reply{
		Status:       http.StatusCreated,
		Body:         link.JoinAnswer{ID: x.ID, Name: x.Name, KeyID: keyID, Hello: h.hello(x)},
		ResponseData: map[string]any{"kid": keyID, "zone": x.Zone, "again": j.HostID != "", "join_token": j.ID},
	}
}

func (h *handler) hello(x *cluster.Host) link.Hello {
	hello := link.Hello{Region: h.Region, CName: h.Names.CName, CType: h.Names.CType, Zone: x.Zone}
	if cursor, ok := h.Directory.HostCursors.Get(x.ID); ok {
		hello.Recorded = link.Recorded{Outbox: cursor.Outbox, Recorded: cursor.Recorded}
	}
	return hello
}
