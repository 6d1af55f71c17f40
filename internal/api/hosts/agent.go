package hosts

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// agentRoutes are for agents only: the family admits no other caller, and a
// host's access token is good for no other family.
func (h *handler) agentRoutes(mux *http.ServeMux) {
	f := &api.Family{Config: h.Config, Mux: mux, Service: "Hypervisor Hosts", Shape: agentShape, Hosts: true}
	const own = "a host sees and reports on what is placed on it, and on nothing else"
	api.Anonymous(f, "POST "+link.PathJoin, "host.host.join", "the join token and a proof of the key are the credential", h.join)
	api.Open(f, "GET "+link.PathStream, own, h.agent(h.stream))
	api.Open(f, "POST "+link.PathReports, own, h.agent(h.report))
	api.Open(f, "POST "+link.PathEvents, own, h.agent(h.events))
	api.Open(f, "POST "+link.PathExchange, own, h.agent(h.exchange))
	api.Open(f, "POST "+link.PathFound, own, h.agent(h.machinesFound))
	api.Open(f, "GET "+link.PathImages+"{id}", own, h.agent(h.image))
}

// agentShape sends a fault whole.
func agentShape(c *api.Call, f *fault.Error) (int, any) {
	return grant.StatusOf(f.Kind), link.FaultBody{
		Fault: link.FaultOf(f), Errors: []link.Brief{{Code: f.Code, Message: f.Message}}, Transaction: api.TransactionID(c.R.Context()),
	}
}

// agent finds the host that calls. Its token was checked; but the host may have
// joined again with another key since then.
func (h *handler) agent(f func(*api.Call, *cluster.Host) (api.Reply, error)) func(*api.Call) (api.Reply, error) {
	return func(c *api.Call) (api.Reply, error) {
		x, ok := h.Directory.Hosts.Get(crn.Identifier(c.Caller.IAMID))
		if !ok || x.Revoked || !slices.Contains(x.KeyIDs(), c.Caller.KeyID) {
			return api.Reply{}, fault.New(fault.Unauthenticated, "token_invalid", "The host was revoked, or has joined again.")
		}
		return f(c, x)
	}
}

// decode reads one JSON object of an agent.
func decode(c *api.Call, into any) error {
	b, err := io.ReadAll(c.R.Body)
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return fault.New(fault.TooLarge, "request_too_large", "The body is larger than %d bytes.", tooLarge.Limit)
	case err != nil:
		return fault.New(fault.Invalid, "invalid_body", "The body is not what an agent sends: %v.", err)
	}
	return nil
}

func (h *handler) report(c *api.Call, x *cluster.Host) (api.Reply, error) {
	var r vpc.Report
	if err := decode(c, &r); err != nil {
		return api.Reply{}, err
	}
	if !api.Printable(r.Reason, vpc.MaxReason) {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_report", "The reason has characters that cannot be shown.")
	}
	if err := placement.Report(c.R.Context(), h.Directory, x.ID, r); err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Status: http.StatusNoContent}, nil
}

// mine returns an instance that is placed on the host.
func (h *handler) mine(x *cluster.Host, instanceID string) (*vpc.Instance, error) {
	i, ok := h.Directory.Instances.Get(instanceID)
	if !ok || i.HostID != x.ID {
		return nil, fault.New(fault.NotFound, "not_found", "The instance %q is not placed on this host.", instanceID)
	}
	return i, nil
}

// exchange gets an access token for an instance. The host says which instance
// asks, and is believed only about its own; what it has signed is checked as
// if it came from anywhere.
func (h *handler) exchange(c *api.Call, x *cluster.Host) (api.Reply, error) {
	var r link.Exchange
	if err := decode(c, &r); err != nil {
		return api.Reply{}, err
	}
	i, err := h.mine(x, r.Instance)
	if err != nil {
		return api.Reply{}, err
	}
	if !owns(i, h.Directory, r.Address) {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_address", "The address %q is not one of the instance.", r.Address)
	}
	request := grant.InstanceRequest{
		Token: r.Token, Instance: i.ID, Profile: grant.Selector{ID: r.ProfileID, Name: r.ProfileName, CRN: r.ProfileCRN},
	}
	origin := grant.Origin{
		TransactionID: api.TransactionID(c.R.Context()), Address: r.Address, Agent: activity.Clip(r.Agent), ClientID: grant.DefaultClient,
	}
	if r.Event != nil {
		if request.With, err = h.accept(x, r.Event); err != nil {
			return api.Reply{}, fault.New(fault.Invalid, "invalid_event", "The event of the exchange is refused: %v.", err)
		}
		request.With.CorrelationID = origin.TransactionID
	}
	a, err := h.opts.Grants.Instance(c.R.Context(), origin, request)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: link.ExchangeAnswer{AccessToken: a.AccessToken, IssuedAt: a.Claims.IssuedAt, Expires: a.Claims.Expires}}, nil
}

// owns reports whether an address is one that the instance can call from.
func owns(i *vpc.Instance, d *directory.Directory, address string) bool {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return false
	}
	if slices.ContainsFunc(i.Interfaces, func(nic vpc.Interface) bool { return nic.Address == a }) {
		return true
	}
	return slices.ContainsFunc(d.FloatingIPsByInstance.Get(i.ID), func(f *vpc.FloatingIP) bool { return f.Address == a })
}

// events takes in what the host's metadata service has recorded while it was
// answering. A batch is recorded whole or not at all, together with the number
// of its last event, so that one which is sent again is not recorded twice. An
// outbox that is not the one before, such as after the host's disk was replaced,
// begins to count anew.
func (h *handler) events(c *api.Call, x *cluster.Host) (api.Reply, error) {
	var batch link.Events
	if err := decode(c, &batch); err != nil {
		return api.Reply{}, err
	}
	if n := len(batch.Events); n < 1 || n > link.MaxEvents || batch.First < 1 || batch.First > link.MaxNumber || batch.Outbox == "" || len(batch.Outbox) > link.MaxOutbox {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_body",
			"A batch has the id of its outbox, from 1 to %d events, and the number of the first, from 1 on.", link.MaxEvents)
	}
	recorded := link.Recorded{Outbox: batch.Outbox}
	err := h.Directory.Update(c.R.Context(), c.Caller.IAMID, func(tx *directory.Tx) error {
		cursor := cluster.HostCursor{HostID: x.ID}
		if old, ok := h.Directory.HostCursors.Get(x.ID); ok {
			cursor = *old
		}
		if cursor.Outbox != batch.Outbox {
			cursor.Outbox, cursor.Recorded = batch.Outbox, batch.First-1
		}
		before := cursor.Recorded
		if missing := batch.First - 1 - cursor.Recorded; missing > 0 {
			// They cannot come any more: the host has thrown them away, because
			// this server had them before it was restored from an older state.
			tx.Record(h.refused(c, x, fmt.Errorf("%d events up to number %d are missing", missing, batch.First-1)))
			cursor.Recorded = batch.First - 1
		}
		for n, doc := range batch.Events {
			number := batch.First + int64(n)
			if number <= cursor.Recorded {
				continue
			}
			cursor.Recorded = number
			e, err := h.reported(x, doc)
			if err != nil {
				// One that a broken host made up must not hold up the rest. That it
				// was refused is worth knowing.
				e = h.refused(c, x, fmt.Errorf("event number %d: %w", number, err))
			}
			tx.Record(e)
		}
		if recorded.Recorded = cursor.Recorded; cursor.Recorded > before {
			h.Directory.HostCursors.Put(tx, &cursor)
		}
		return nil
	})
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: recorded}, nil
}

// reported reads one event of a batch, with the outcome that the host tells.
func (h *handler) reported(x *cluster.Host, doc json.RawMessage) (*activity.Event, error) {
	var e *activity.Event
	if err := json.Unmarshal(doc, &e); err != nil {
		return nil, fmt.Errorf("it is not an event: %w", err)
	}
	accepted, err := h.accept(x, e)
	if err != nil {
		return nil, err
	}
	if e.Reason.Code < 200 || e.Reason.Code > 599 {
		return nil, errors.New("the event's outcome is not a status of HTTP")
	}
	accepted.SetReason(e.Reason.Code, e.Reason.ForFailure)
	return accepted, nil
}

// actionPrefix begins the events that a host's metadata service may record
// (reference/instance-metadata-and-vpc.md section 5.1).
const actionPrefix = "is.metadata."

// Credentials of an instance as events name them
// (reference/instance-metadata-and-vpc.md section 5.2).
const (
	instanceCredential = "compute-resource"
	tokenCredential    = "instance-identity-token"
)

// Bounds on what a host says in an event.
const (
	maxChecks   = 32
	maxEventAge = 31 * 24 * time.Hour
	maxAhead    = 5 * time.Minute
)

// accept writes an event anew from what a host may say: who acted and on what
// follows from the instance, which must be placed on it, and not from the
// host's words. The outcome is left open.
func (h *handler) accept(x *cluster.Host, e *activity.Event) (*activity.Event, error) {
	if e == nil {
		return nil, errors.New("the event is absent")
	}
	name, err := crn.Parse(e.Target.ID)
	if err != nil {
		return nil, errors.New("the event is about no instance")
	}
	i, err := h.mine(x, name.Resource)
	if err != nil {
		return nil, err
	}
	if _, err := uuid.Parse(e.ID); err != nil {
		return nil, errors.New("the event's id is not a UUID")
	}
	if !strings.HasPrefix(e.Action, actionPrefix) || len(e.Action) > 100 || strings.ContainsFunc(e.Action, func(r rune) bool {
		return (r < 'a' || r > 'z') && r != '.' && r != '-'
	}) {
		return nil, errors.New("the event is not one of a metadata service")
	}
	now := h.Now()
	when := e.Time.Time
	if when.After(now.Add(maxAhead)) || when.Before(now.Add(-maxEventAge)) {
		return nil, errors.New("the event's time is not that of a host whose clock is right")
	}
	id := crn.IAMIDOfCRN(i.CRN)
	out := &activity.Event{
		ID: e.ID, Time: activity.Time{Time: when}, Action: e.Action, Severity: activity.Normal,
		Message: e.Message, CorrelationID: e.CorrelationID, AccountID: i.AccountID, LogSourceCRN: i.CRN,
		Initiator: activity.Initiator{
			ID: id, Name: i.Name, TypeURI: activity.ComputeType, AuthnID: id, AuthnName: i.Name,
			Credential: activity.Credential{Type: instanceCredential},
			Host:       activity.Host{Agent: activity.Clip(e.Initiator.Host.Agent)},
		},
		Target:   activity.Target{ID: i.CRN, Name: i.Name, TypeURI: "is.instance/instance"},
		Observer: activity.Observer{Name: "ActivityTracker"},
	}
	if e.Initiator.Credential.Type == tokenCredential {
		out.Initiator.Credential.Type = tokenCredential
	}
	if owns(i, h.Directory, e.Initiator.Host.Address) {
		out.Initiator.Host.Address = e.Initiator.Host.Address
		out.Initiator.Host.AddressType = activity.AddressType(e.Initiator.Host.Address)
	}
	for _, data := range []struct {
		from json.RawMessage
		to   *json.RawMessage
	}{{e.RequestData, &out.RequestData}, {e.ResponseData, &out.ResponseData}} {
		if len(data.from) > 0 && json.Valid(data.from) {
			*data.to = data.from
		}
	}
	for _, check := range e.Trace[:min(len(e.Trace), maxChecks)] {
		if !slices.Contains([]activity.Outcome{activity.Pass, activity.Fail, activity.Skip}, check.Outcome) {
			return nil, errors.New("the event's trace has a check without an outcome")
		}
		out.Trace = append(out.Trace, activity.Check{
			Name: activity.Clip(check.Name), Outcome: check.Outcome,
			Wanted: activity.Clip(check.Wanted), Found: activity.Clip(check.Found), Hint: activity.Clip(check.Hint),
		})
	}
	out.Bound()
	return out, nil
}

// refused is the event, in the operator's log, of one that a host should not
// have sent.
func (h *handler) refused(c *api.Call, x *cluster.Host, why error) *activity.Event {
	id := crn.IAMID(x.ID)
	e := &activity.Event{
		ID: newID(), Time: activity.Time{Time: h.Now()}, Action: "host.event.record", Severity: activity.Warning,
		Message: "Hypervisor Hosts: record event of host " + x.Name + " -failure", CorrelationID: api.TransactionID(c.R.Context()),
		AccountID: h.OperatorAccount, LogSourceCRN: h.crn(x.ID),
		Initiator: activity.Initiator{
			ID: id, Name: x.Name, TypeURI: activity.HostType, AuthnID: id, AuthnName: x.Name,
			Credential: activity.Credential{Type: "token"}, Host: api.PeerHost(c.R),
		},
		Target: activity.Target{ID: h.crn(x.ID), Name: x.Name, TypeURI: "host/host"}, Observer: activity.Observer{Name: "ActivityTracker"},
	}
	e.SetReason(http.StatusBadRequest, activity.Clip(why.Error()))
	return e
}

// foundMachines is what hosts have found that something else runs. It is told
// anew with each connection, so that nothing is stored.
type foundMachines struct {
	mu     sync.Mutex
	byHost map[string][]link.Machine
}

func (f *foundMachines) set(hostID string, m []link.Machine) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byHost == nil {
		f.byHost = map[string][]link.Machine{}
	}
	f.byHost[hostID] = m
}

func (f *foundMachines) of(hostID string) []link.Machine {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.byHost[hostID]
}

func (h *handler) machinesFound(c *api.Call, x *cluster.Host) (api.Reply, error) {
	var b link.Found
	if err := decode(c, &b); err != nil {
		return api.Reply{}, err
	}
	if len(b.Machines) > link.MaxMachines {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_body", "A host can have found at most %d machines.", link.MaxMachines)
	}
	// What cannot be shown was not written by anybody who runs machines.
	h.found.set(x.ID, slices.DeleteFunc(b.Machines, func(m link.Machine) bool { return !showable(m) }))
	return api.Reply{Status: http.StatusNoContent}, nil
}

// Bounds on what a host says of a machine that it has found, in characters.
const (
	maxFoundText = 255
	maxFoundTags = 64
)

// showable reports whether what a host says of a machine can be shown, and kept
// if somebody adopts it.
func showable(m link.Machine) bool {
	for _, text := range []string{m.Name, m.Device, m.Domain, m.MAC, m.Address, m.Bridge, m.State} {
		if !api.Printable(text, maxFoundText) {
			return false
		}
	}
	for key, value := range m.Tags {
		if !api.Printable(key, maxFoundText) || !api.Printable(value, maxFoundText) {
			return false
		}
	}
	return len(m.Tags) <= maxFoundTags
}

// Images are the disks of registered images.
type Images interface {
	// Open returns the disk of an image from its beginning.
	Open(id string) (*os.File, error)
}

// imageTimeout bounds the download of one image.
const imageTimeout = time.Hour

// image sends the disk of an image that an instance on the host boots from.
func (h *handler) image(c *api.Call, x *cluster.Host) (api.Reply, error) {
	id := c.R.PathValue("id")
	i, ok := h.Directory.Images.Get(id)
	needed := ok && slices.ContainsFunc(h.Directory.InstancesByHost.Get(x.ID), func(v *vpc.Instance) bool { return v.ImageID == id })
	if !needed || h.opts.Images == nil {
		return api.Reply{}, api.NotFound("image", id).OnParameter("id", id)
	}
	disk, err := h.opts.Images.Open(id)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Stream: func(w http.ResponseWriter, _ *http.Request) {
		defer disk.Close()
		limit := api.NewWriteLimit(w, h.opts.Stopping)
		defer limit.Release()
		limit.Extend(imageTimeout)
		w.Header().Set("Content-Type", "application/octet-stream")
		if _, err := io.Copy(w, io.LimitReader(disk, i.Bytes)); err != nil {
			h.Log.Warn("sending an image to a host ended early", "image", id, "host", x.Name, "error", err)
		}
	}}, nil
}
