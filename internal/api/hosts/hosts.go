// Package hosts is the API of hypervisor hosts. One half is for administrators
// of the operator's account: join tokens, the list of hosts, revoking one, and
// taking in machines that something else runs. The other half is for the agents
// on the hosts: the stream of placements, reports, exchanges and events. It is
// ours; the wire protocol has no counterpart. What a host is believed is
// decided here and in package attest: only what is about instances that are
// placed on it.
package hosts

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

const service = "host"

// Options are what the family needs beyond the configuration of all families.
type Options struct {
	Scheduler *placement.Scheduler
	Proofs    *attest.HostProofs
	Grants    *grant.Service
	Sealer    *token.Sealer
	Images    Images // nil without registered images
	KeyPrefix string // of hosts' key ids

	// Stopping is closed when the server stops: then the streams end.
	Stopping <-chan struct{}
}

type handler struct {
	*api.Config
	opts  Options
	found foundMachines
}

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config, opts Options) {
	h := &handler{Config: cfg, opts: opts}
	f := &api.Family{Config: cfg, Mux: mux, Service: "Hypervisor Hosts", Shape: api.PlainShape}
	api.List(f, "GET /v1/hosts", "host.host.list", h.list)
	api.Read(f, "GET /v1/hosts/{id}", "host.host.read", h.find, h.show)
	api.Change(f, "POST /v1/hosts/join_tokens", "host.host.create", "host.join-token.create", h.loadJoinToken, h.createJoinToken)
	api.Change(f, "POST /v1/hosts/{id}/revoke", "host.host.revoke", "host.host.revoke", found[api.None](h), h.revoke)
	api.Change(f, "DELETE /v1/hosts/{id}", "host.host.delete", "host.host.delete", found[api.None](h), h.remove)
	api.Read(f, "GET /v1/hosts/{id}/machines", "host.machine.list", h.find, h.machines)
	api.Change(f, "POST /v1/hosts/{id}/machines", "host.machine.adopt", "host.machine.adopt", found[adoptBody](h), h.adopt)
	h.agentRoutes(mux)
}

// body shows a host.
type body struct {
	ID        string   `json:"id"`
	CRN       string   `json:"crn"`
	Name      string   `json:"name"`
	Zone      string   `json:"zone,omitempty"`
	Status    string   `json:"status"` // connected, away, revoked
	Since     *string  `json:"since,omitempty"`
	Drivers   []string `json:"drivers"`
	VCPUs     int      `json:"vcpus"`
	MemoryMiB int      `json:"memory_mib"`
	DiskMiB   int      `json:"disk_mib,omitempty"`
	Version   string   `json:"version,omitempty"`
	Address   string   `json:"address,omitempty"` // where other hosts reach it
	Instances int      `json:"instances"`
	Keys      []string `json:"keys"`

	// IdentityCA checks the identity certificates of the host's instances. It is
	// the host's word while it is connected, and covers nobody else's instances.
	IdentityCA string `json:"identity_ca,omitempty"`

	// Placed are its instances, of whatever account; only one host shows them.
	Placed []placedInstance `json:"placed,omitempty"`

	CreatedAt time.Time `json:"created_at"`
	EntityTag string    `json:"entity_tag"`
}

type placedInstance struct {
	CRN    string `json:"crn"`
	Name   string `json:"name"`
	Status string `json:"status"`
}

func (h *handler) encode(x *cluster.Host) body {
	c, since, here := h.opts.Scheduler.Here(x.ID)
	b := body{
		ID: x.ID, CRN: h.crn(x.ID), Name: x.Name, Zone: x.Zone, Status: "away", Drivers: c.Drivers, VCPUs: c.VCPUs,
		MemoryMiB: c.MemoryMiB, DiskMiB: c.DiskMiB, Version: c.Version, IdentityCA: c.IdentityCA, Instances: h.Directory.InstancesByHost.Len(x.ID), Keys: x.KeyIDs(),
		CreatedAt: x.CreatedAt.UTC(), EntityTag: x.Tag(x.ID),
	}
	if x.Address.IsValid() {
		b.Address = x.Address.String()
	}
	if b.Drivers == nil {
		b.Drivers = []string{}
	}
	if !since.IsZero() {
		s := since.UTC().Format(time.RFC3339)
		b.Since = &s
	}
	switch {
	case x.Revoked:
		b.Status = "revoked"
	case here:
		b.Status = "connected"
	}
	return b
}

func (h *handler) crn(id string) string {
	return h.Names.Of(service, "", h.OperatorAccount, "", "host", id).String()
}

func resourceOf(c *api.Call, id string) map[string]string {
	return c.InAccount(service, access.ResourceType, "host", access.Resource, id)
}

func (h *handler) targetOf(c *api.Call, x *cluster.Host) api.Target {
	return api.Target{Resource: resourceOf(c, x.ID), CRN: h.crn(x.ID), Name: x.Name, TypeURI: "host/host"}
}

func (h *handler) list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	out := []body{}
	if c.Account() == h.OperatorAccount {
		rows := h.Directory.Hosts.All()
		slices.SortFunc(rows, func(a, b *cluster.Host) int { return cmp.Compare(a.Name, b.Name) })
		for _, x := range rows {
			_, _, here := h.opts.Scheduler.Here(x.ID)
			idle := x.ID == cluster.LocalHost && !here && h.Directory.InstancesByHost.Len(x.ID) == 0
			if !idle && may(resourceOf(c, x.ID)) {
				out = append(out, h.encode(x))
			}
		}
	}
	return api.Reply{Body: map[string]any{"hosts": out}}, nil
}

// find takes an id or a name. The hosts are the operator's; others are told
// that there is none.
func (h *handler) find(c *api.Call) (*cluster.Host, api.Target, error) {
	ref := c.R.PathValue("id")
	if c.Account() == h.OperatorAccount {
		if x, ok := h.Directory.Hosts.Get(ref); ok {
			return x, h.targetOf(c, x), nil
		}
		for _, x := range h.Directory.Hosts.All() {
			if x.Name == ref {
				return x, h.targetOf(c, x), nil
			}
		}
	}
	return nil, api.Target{TypeURI: "host/host"}, api.NotFound("host", ref).OnParameter("id", ref)
}

// named reports whether there is a host of this name.
func (h *handler) named(name string) bool {
	return slices.ContainsFunc(h.Directory.Hosts.All(), func(x *cluster.Host) bool { return x.Name == name })
}

// found is find for a route with a body.
func found[B any](h *handler) func(*api.Call, *B) (*cluster.Host, api.Target, error) {
	return func(c *api.Call, _ *B) (*cluster.Host, api.Target, error) { return h.find(c) }
}

func (h *handler) show(_ *api.Call, x *cluster.Host) (api.Reply, error) {
	b := h.encode(x)
	for _, i := range h.Directory.InstancesByHost.Get(x.ID) {
		b.Placed = append(b.Placed, placedInstance{i.CRN, i.Name, i.Status})
	}
	slices.SortFunc(b.Placed, func(a, b placedInstance) int { return cmp.Compare(a.CRN, b.CRN) })
	return api.Reply{Body: b, ETag: x.Tag(x.ID)}, nil
}

// revoke ends all that a host can do: it gets no token, its stream ends, and
// what it signs proves nothing. Its instances have failed.
func (h *handler) revoke(c *api.Call, tx *directory.Tx, _ *api.None, x *cluster.Host) (api.Reply, api.Target, error) {
	t := h.targetOf(c, x)
	if x.ID == cluster.LocalHost {
		return api.Reply{}, t, fault.New(fault.Conflict, "local_host", "The host %s is the server itself. Start the server with --driver none to run no instances on it.", x.Name)
	}
	next := *x
	next.Revoked = true
	h.Directory.Hosts.Put(tx, &next)
	for _, j := range h.Directory.JoinTokens.All() {
		if j.HostID == x.ID {
			h.Directory.JoinTokens.Delete(tx, j)
		}
	}
	return api.Reply{Body: h.encode(&next), ResponseData: map[string]any{"instances": h.Directory.InstancesByHost.Len(x.ID)}}, t, nil
}

// remove forgets a host that is revoked and empty.
func (h *handler) remove(c *api.Call, tx *directory.Tx, _ *api.None, x *cluster.Host) (api.Reply, api.Target, error) {
	t := h.targetOf(c, x)
	switch n := h.Directory.InstancesByHost.Len(x.ID); {
	case !x.Revoked:
		return api.Reply{}, t, fault.New(fault.Conflict, "host_not_revoked", "Revoke the host %s before it is deleted.", x.Name)
	case n > 0:
		return api.Reply{}, t, fault.New(fault.Conflict, "host_not_empty", "The host %s still has instances (%d); delete them first.", x.Name, n)
	}
	h.Directory.Hosts.Delete(tx, x)
	if cursor, ok := h.Directory.HostCursors.Get(x.ID); ok {
		h.Directory.HostCursors.Delete(tx, cursor)
	}
	h.found.set(x.ID, nil)
	return api.Reply{Status: http.StatusNoContent}, t, nil
}

// joinTokenBody asks for a join token. Host, when given, is a host that is to
// join again with a new key, because it has lost its old one.
type joinTokenBody struct {
	Name      string `json:"name"`
	Zone      string `json:"zone"`
	Host      string `json:"host"`
	ExpiresIn int    `json:"expires_in"` // seconds
}

const (
	defaultJoinLife = 15 * time.Minute
	maxHostName     = 63
)

func (h *handler) loadJoinToken(c *api.Call, b *joinTokenBody) (*cluster.Host, api.Target, error) {
	t := api.Target{Resource: resourceOf(c, ""), Name: cmp.Or(b.Host, b.Name), TypeURI: "host/join-token"}
	if c.Account() != h.OperatorAccount {
		return nil, t, fault.New(fault.Denied, "not_authorized", "Hosts join the operator's account %s; log in to it.", h.OperatorAccount)
	}
	if b.Host == "" {
		return nil, t, nil
	}
	for _, x := range h.Directory.Hosts.All() {
		if x.ID == b.Host || x.Name == b.Host {
			t.Resource = resourceOf(c, x.ID)
			return x, t, nil
		}
	}
	return nil, t, api.NotFound("host", b.Host).On("host")
}

func (h *handler) createJoinToken(c *api.Call, tx *directory.Tx, b *joinTokenBody, again *cluster.Host) (api.Reply, api.Target, error) {
	t := api.Target{Name: b.Name, TypeURI: "host/join-token"}
	refuse := func(f *fault.Error) (api.Reply, api.Target, error) { return api.Reply{}, t, f }
	life := cmp.Or(b.ExpiresIn, int(defaultJoinLife/time.Second)) // seconds
	region, _ := vpc.RegionNamed(h.Region)
	_, known := region.Zone(b.Zone)
	switch {
	case life < 0, life > int(cluster.MaxJoinTokenLife/time.Second):
		return refuse(api.Invalid("The field expires_in must be from 1 to %d seconds.", int(cluster.MaxJoinTokenLife/time.Second)).On("expires_in"))
	case again != nil && (b.Name != "" || b.Zone != ""):
		return refuse(api.Invalid("A host that joins again keeps its name and zone; give only host.").On("name"))
	case again != nil && again.ID == cluster.LocalHost:
		return refuse(api.Invalid("The host %s is the server itself.", again.Name).On("host"))
	case again == nil && (!vpc.ValidName(b.Name) || len(b.Name) > maxHostName):
		return refuse(api.Invalid("The field name must have 1 to %d lower-case letters, digits and hyphens, start with a letter and not end with a hyphen.", maxHostName).On("name"))
	case b.Zone != "" && !known:
		return refuse(api.Invalid("The zone %q is not one of region %s.", b.Zone, region.Name).On("zone"))
	}
	j := &cluster.JoinToken{ID: "JoinToken-" + newID(), Name: b.Name, Zone: b.Zone, Expires: tx.Now.Add(time.Duration(life) * time.Second)}
	if again != nil {
		j.HostID, j.Name, j.Zone = again.ID, again.Name, again.Zone
	} else if h.named(b.Name) {
		return refuse(fault.New(fault.Conflict, "name_not_unique", "There is a host %s already. To have it join again with a new key, give it as host.", b.Name).On("name"))
	}
	secret := newSecret()
	j.Hash = h.opts.Sealer.Hash(secret)
	h.Directory.JoinTokens.Put(tx, j)
	for _, old := range h.Directory.JoinTokens.All() {
		if !tx.Now.Before(old.Expires) {
			h.Directory.JoinTokens.Delete(tx, old)
		}
	}
	t = api.Target{Resource: resourceOf(c, j.HostID), CRN: h.Names.Of(service, "", h.OperatorAccount, "", "join-token", j.ID).String(), Name: j.Name, TypeURI: "host/join-token"}
	return api.Reply{
		Status: http.StatusCreated,
		Body: map[string]any{
			"id": j.ID, "name": j.Name, "zone": j.Zone, "host": j.HostID, "join_token": secret,
			"expires_at": j.Expires.UTC().Format(time.RFC3339), "url": h.URL,
		},
		ResponseData: map[string]any{"name": j.Name, "zone": j.Zone, "host": j.HostID, "expires_at": j.Expires.UTC().Format(time.RFC3339)},
	}, t, nil
}

// machines lists what a host has found that something else runs.
func (h *handler) machines(_ *api.Call, x *cluster.Host) (api.Reply, error) {
	type row struct {
		link.Machine
		Instance string `json:"instance,omitempty"` // id, once it is taken in
	}
	out := []row{}
	for _, m := range h.found.of(x.ID) {
		r := row{Machine: m}
		for _, i := range h.Directory.InstancesByHost.Get(x.ID) {
			if e := i.External; e != nil && (e.Domain != "" && e.Domain == m.Domain || e.Device == m.Device && strings.EqualFold(i.Interfaces[0].MAC, m.MAC)) {
				r.Instance = i.ID
			}
		}
		out = append(out, r)
	}
	return api.Reply{Body: map[string]any{"machines": out}}, nil
}
