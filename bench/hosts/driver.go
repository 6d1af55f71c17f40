//go:build linux

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/serve"
)

// loopback is a driver whose machines are listeners on this machine's loopback,
// bounded and served as those of real drivers are.
type loopback struct {
	log *slog.Logger

	mu       sync.Mutex
	machines map[string]*listener
}

type listener struct {
	servers serve.Group
	address string
}

func newLoopback(log *slog.Logger) *loopback {
	return &loopback{log: log, machines: map[string]*listener{}}
}

// Name implements [host.Driver].
func (d *loopback) Name() string { return "loopback" }

// Found implements [host.Driver]: listeners end with their process.
func (d *loopback) Found(context.Context) ([]string, error) { return nil, nil }

// Start implements [host.Driver].
func (d *loopback) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("opening the listener of machine %s: %w", m.ID, err)
	}
	x := &listener{servers: serve.Group{Log: d.log}, address: l.Addr().String()}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.machines == nil || d.machines[m.ID] != nil {
		_ = l.Close()
		return fmt.Errorf("machine %s runs already, or the driver is closed", m.ID)
	}
	d.machines[m.ID] = x
	x.servers.Serve(l.(*net.TCPListener), netip.Addr{}, from(m.Interfaces[0].Address, h.Metadata), serve.Metadata())
	return nil
}

// from has requests come from the machine's address, as they do where a machine
// has a network: the server takes exchanges from no other.
func from(a netip.Addr, next http.Handler) http.Handler {
	peer := netip.AddrPortFrom(a, 1024).String()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in := *r
		in.RemoteAddr = peer
		next.ServeHTTP(w, &in)
	})
}

// Update implements [host.Driver]: there is nothing of a listener to change.
func (d *loopback) Update(context.Context, host.Machine) error { return nil }

// Stop implements [host.Driver].
func (d *loopback) Stop(ctx context.Context, id string, _ bool) error {
	d.mu.Lock()
	x := d.machines[id]
	delete(d.machines, id)
	d.mu.Unlock()
	if x != nil {
		x.servers.Stop(ctx)
	}
	return nil
}

// Delete implements [host.Driver].
func (d *loopback) Delete(ctx context.Context, id string) error { return d.Stop(ctx, id, true) }

// Ended implements [host.Driver].
func (d *loopback) Ended() <-chan string { return nil }

// Access implements [host.Driver].
func (d *loopback) Access(id string) (host.Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[id]
	if x == nil {
		return host.Access{}, false
	}
	return host.Access{Driver: d.Name(), Environment: map[string]string{addressVariable: x.address}}, true
}

// addressVariable is where Access says what address a machine's listener has.
const addressVariable = "METADATA_ADDRESS"

// Close implements [host.Driver].
func (d *loopback) Close() error {
	d.mu.Lock()
	machines := d.machines
	d.machines = nil
	d.mu.Unlock()
	var each sync.WaitGroup
	for _, x := range machines {
		each.Go(func() { x.servers.Stop(context.Background()) })
	}
	each.Wait()
	return nil
}

// watched takes the time of a driver's starts.
type watched struct {
	host.Driver

	mu      sync.Mutex
	running map[string]bool
	starts  []time.Duration
	failed  int
	reason  string // why one failed last
}

// Start implements [host.Driver].
func (w *watched) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	begin := time.Now()
	err := w.Driver.Start(ctx, m, h)
	took := time.Since(begin)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.failed++
		w.reason = err.Error()
		return err
	}
	w.running[m.ID] = true
	w.starts = append(w.starts, took)
	return nil
}

// Stop implements [host.Driver].
func (w *watched) Stop(ctx context.Context, id string, force bool) error {
	err := w.Driver.Stop(ctx, id, force)
	w.ended(id, err)
	return err
}

// Delete implements [host.Driver].
func (w *watched) Delete(ctx context.Context, id string) error {
	err := w.Driver.Delete(ctx, id)
	w.ended(id, err)
	return err
}

func (w *watched) ended(id string, err error) {
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.running, id)
}
