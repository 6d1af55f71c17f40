package hosts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// Bounds on a stream.
const (
	sendTimeout = 20 * time.Second // for one message; a host that does not read is cut off
	maxDrivers  = 8
	gather      = 5 * time.Millisecond // changes that follow each other closely go out together
)

// Why a stream ends on the server's side.
var (
	errStopping = errors.New("the server stops")
	errEnded    = errors.New("the host was revoked, or has joined again")
)

// stream sends a host its placements and what changes of them, until either
// side goes, the host is revoked or joins again with another key, or the server
// stops.
func (h *handler) stream(c *api.Call, x *cluster.Host) (api.Reply, error) {
	var capacity link.Capacity
	if err := json.Unmarshal([]byte(c.R.URL.Query().Get("capacity")), &capacity); err != nil ||
		len(capacity.Drivers) > maxDrivers || capacity.VCPUs < 0 || capacity.MemoryMiB < 0 || capacity.DiskMiB < 0 || !api.Printable(capacity.Version, 100) {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "The parameter capacity is not what an agent sends.").OnParameter("capacity", "")
	}
	for _, d := range capacity.Drivers {
		if !api.Printable(d, 20) {
			return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "The parameter capacity is not what an agent sends.").OnParameter("capacity", "")
		}
	}
	if a := capacity.Address; a.IsValid() {
		if err := cluster.ValidAddress(a); err != nil {
			return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "The parameter capacity has an address of no use: %v.", err).OnParameter("capacity", "")
		}
	}
	if err := placement.SetAddress(c.R.Context(), h.Directory, x.ID, capacity.Address); err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Stream: func(w http.ResponseWriter, r *http.Request) {
		leave := h.opts.Scheduler.Arrive(x.ID, placement.Capacity{
			Drivers: capacity.Drivers, VCPUs: capacity.VCPUs, MemoryMiB: capacity.MemoryMiB, DiskMiB: capacity.DiskMiB, Version: capacity.Version,
			IdentityCA: capacity.IdentityCA,
		})
		defer leave()
		s := &sender{handler: h, host: x, w: w, limit: api.NewWriteLimit(w, h.opts.Stopping), sent: map[string]*vpc.Placement{}}
		defer s.limit.Release()
		// The read deadline of the server counts from the request's beginning;
		// this request has been read.
		_ = s.limit.SetReadDeadline(time.Time{})
		w.Header().Set("Content-Type", "application/x-ndjson")
		h.Log.Info("host is connected", "host", x.Name)
		err := s.run(r.Context())
		h.Log.Info("host is not connected any more", "host", x.Name, "reason", err)
	}}, nil
}

// sender is one stream.
type sender struct {
	*handler
	host  *cluster.Host
	w     http.ResponseWriter
	limit *api.WriteLimit
	sent  map[string]*vpc.Placement // by instance, as it was sent last
}

func (s *sender) run(ctx context.Context) error {
	watch := s.Directory.Watch(append([]string{directory.KindHost}, placement.Kinds...)...)
	defer watch.Stop()
	hello := s.hello(s.host)
	if err := s.send(link.Message{Hello: &hello}); err != nil {
		return err
	}
	if err := s.changes(); err != nil {
		return err
	}
	if err := s.send(link.Message{Synced: true}); err != nil {
		return err
	}
	ping := time.NewTicker(link.PingEvery)
	defer ping.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.opts.Stopping:
			return errStopping
		case <-ping.C:
			if err := s.send(link.Message{Ping: true}); err != nil {
				return err
			}
			continue
		case <-watch.C:
		}
		time.Sleep(gather)
		if err := s.changes(); err != nil {
			return err
		}
	}
}

// changes sends what differs from what was sent, unless the host is not the one
// any more that the stream began with.
func (s *sender) changes() error {
	if x, ok := s.Directory.Hosts.Get(s.host.ID); !ok || x.Revoked || !bytes.Equal(x.JWKS, s.host.JWKS) {
		return errEnded
	}
	placed := placement.OnHost(s.Directory, s.host.ID)
	for id, p := range placed {
		if before := s.sent[id]; before != nil && placement.Same(before, p) {
			continue
		}
		s.sent[id] = p
		b, err := json.Marshal(link.Message{Placement: p})
		if err != nil {
			return err
		}
		if len(b) > link.MaxMessage {
			s.Log.Error("placement is too large for its host", "instance", id, "bytes", len(b))
			continue
		}
		if err := s.write(b); err != nil {
			return err
		}
	}
	for id := range s.sent {
		if placed[id] == nil {
			if err := s.send(link.Message{Gone: id}); err != nil {
				return err
			}
			delete(s.sent, id)
		}
	}
	return nil
}

func (s *sender) send(m link.Message) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return s.write(b)
}

func (s *sender) write(b []byte) error {
	s.limit.Extend(sendTimeout)
	if _, err := s.w.Write(append(b, '\n')); err != nil {
		return err
	}
	return s.limit.Flush()
}
