package netns

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/vishvananda/netns"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/network"
	"tabard.dev/tabard/internal/host/serve"
)

// configuration is where "ip netns exec" looks for files that stand in for those
// of /etc.
const configuration = "/etc/netns"

// driver is the netns driver. Locks are taken in the order machine.mu,
// driver.mu.
type driver struct {
	network *network.Network
	keep    bool
	records records
	log     *slog.Logger

	mu       sync.Mutex // guards what follows
	closed   bool
	machines map[string]*machine
}

// machine is one instance. What Start has made is noted here step by step, so
// that a Start which ends half-way removes that and nothing else.
type machine struct {
	host.Machine
	space string // name of its namespace

	mu       sync.Mutex // held while the machine starts, changes or stops
	servers  *serve.Group
	port     *network.Port
	hasSpace bool
	taken    bool // an earlier process made it
	gone     bool

	up bool // guarded by driver.mu
}

// New returns the driver. Without Keep it first removes all that an earlier
// process has left of the same network.
func New(cfg Config) (host.Driver, error) {
	d := &driver{
		network:  cfg.Network,
		keep:     cfg.Keep,
		records:  records{cfg.Dir},
		log:      cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		machines: map[string]*machine{},
	}
	if cfg.Network == nil {
		return nil, errors.New("the netns driver has no network")
	}
	if cfg.Keep && cfg.Dir == "" {
		return nil, errors.New("the netns driver has no directory for the machines that it is to keep")
	}
	if cfg.Dir != "" {
		if err := d.records.clean(); err != nil {
			return nil, fmt.Errorf("cleaning up the records of machines: %w", err)
		}
	}
	ctx := context.Background()
	if err := d.sweep(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *driver) prefix() string { return "tabard-" + d.network.State() + "-i-" }

func (d *driver) space(id string) string {
	sum := sha256.Sum256([]byte(id))
	return d.prefix() + hex.EncodeToString(sum[:])[:8]
}

// sweep removes the namespaces of an earlier driver that are not to be kept: all
// of them, or those that nothing is recorded of.
func (d *driver) sweep(ctx context.Context) error {
	recorded := map[string]string{}
	if d.keep {
		var err error
		if recorded, err = d.records.read(); err != nil {
			d.log.Error("not all machines of an earlier process can be taken up", "error", err)
		}
	} else if err := d.network.Sweep(ctx); err != nil {
		return err
	}
	left, err := namespace.Named(d.prefix())
	if err != nil {
		return fmt.Errorf("looking for namespaces left behind: %w", err)
	}
	for _, space := range left {
		if recorded[space] != "" {
			continue
		}
		if _, err := os.Stat(d.records.path(space)); d.keep && err == nil {
			continue // a record that can't be read may be of a machine that runs
		}
		d.log.Warn("removing a network namespace that was left behind", "namespace", space)
		if err := d.removeSpace(space); err != nil {
			return err
		}
	}
	return nil
}

// removeSpace removes a namespace's name and what stands beside it.
func (d *driver) removeSpace(space string) error {
	if err := namespace.Remove(space); err != nil {
		return fmt.Errorf("removing the namespace %s: %w", space, err)
	}
	dir := filepath.Join(configuration, space)
	if err := os.Remove(filepath.Join(dir, "resolv.conf")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the resolver's address: %w", err)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.log.Warn("a directory beside a namespace stays, because others put files into it", "directory", dir, "error", err)
	}
	if !d.keep {
		return nil
	}
	if err := d.records.remove(space); err != nil {
		return fmt.Errorf("removing the record of %s: %w", space, err)
	}
	return nil
}

func (d *driver) Name() string { return "netns" }

func (d *driver) Ended() <-chan string { return nil }

func (d *driver) Found(context.Context) ([]string, error) {
	found := map[string]bool{}
	if d.keep {
		recorded, err := d.records.read()
		if err != nil {
			d.log.Error("not all machines of an earlier process can be taken up", "error", err)
		}
		for _, id := range recorded {
			found[id] = true
		}
	}
	ports, err := d.network.Found()
	if err != nil {
		return nil, err
	}
	for _, p := range ports {
		if !p.Tap {
			found[p.Machine] = true
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(found, func(id string, _ bool) bool { return d.machines[id] != nil })
	return slices.Sorted(maps.Keys(found)), nil
}

func (d *driver) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	switch {
	case m.ID == "":
		return errors.New("starting a machine without an id")
	case m.External != nil:
		return fmt.Errorf("starting machine %s: it is somebody else's to run", m.ID)
	case len(h.ServerAddrs) > 0 && h.Server == nil:
		return fmt.Errorf("starting machine %s: the server's addresses have no handler", m.ID)
	}
	x := &machine{Machine: m, space: d.space(m.ID), servers: &serve.Group{Log: d.log.With("machine", m.ID)}}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := d.admit(x); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	if err := d.build(ctx, x, h); err != nil {
		err = fmt.Errorf("starting machine %s: %w", m.ID, err)
		if x.taken {
			// What runs in it goes on, for another attempt.
			d.letGo(context.WithoutCancel(ctx), x)
			return err
		}
		return errors.Join(err, d.dismantle(context.WithoutCancel(ctx), x))
	}
	d.mu.Lock()
	x.up = true
	d.mu.Unlock()
	return nil
}

// admit enters the machine.
func (d *driver) admit(x *machine) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errors.New("the driver is closed")
	}
	if d.machines[x.ID] != nil {
		return errors.New("it runs already")
	}
	for _, o := range d.machines {
		if o.space == x.space {
			return fmt.Errorf("its namespace %s belongs to machine %s", x.space, o.ID)
		}
	}
	d.machines[x.ID] = x
	return nil
}

func (d *driver) build(ctx context.Context, x *machine, h host.Handlers) error {
	ns, err := d.open(x)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ctx.Err(); err != nil {
		return err
	}
	err = namespace.Within(ns, func() error { return x.listenForServer(ctx, h) })
	if err != nil {
		return fmt.Errorf("listening for the server in its namespace: %w", err)
	}
	if len(x.Interfaces) > 0 && x.Interfaces[0].Subnet.IsValid() {
		if err := setResolver(x.space, x.Interfaces[0].Subnet.Masked().Addr().Next()); err != nil {
			return fmt.Errorf("naming the resolver: %w", err)
		}
	}
	x.port, err = d.network.AttachNamespace(ctx, x.Machine, h, ns)
	return err
}

// open makes the machine's namespace, or opens the one that an earlier process
// made for it.
func (d *driver) open(x *machine) (netns.NsHandle, error) {
	if d.keep {
		switch rec, err := d.records.readOne(x.space); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return netns.None(), err
		case rec.ID != x.ID:
			return netns.None(), fmt.Errorf("its namespace %s belongs to machine %s", x.space, rec.ID)
		default:
			ns, err := namespace.Open(x.space)
			if err == nil {
				x.hasSpace, x.taken = true, true
				return ns, nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return netns.None(), err
			}
			if err := namespace.Remove(x.space); err != nil {
				return netns.None(), err
			}
		}
		if _, err := os.Lstat(filepath.Join(namespace.Directory, x.space)); err == nil {
			return netns.None(), fmt.Errorf("making the namespace %s: %w", x.space, fs.ErrExist)
		}
		if err := d.records.write(x.space, record{ID: x.ID}); err != nil {
			return netns.None(), err
		}
		// From here on there is something to remove.
		x.hasSpace = true
	}
	ns, err := namespace.Create(x.space, func() error { return namespace.Up("lo") })
	if err != nil {
		return netns.None(), fmt.Errorf("making the namespace %s: %w", x.space, err)
	}
	x.hasSpace = true
	return ns, nil
}

// setResolver makes programs that "ip netns exec" starts use the resolver at an
// address.
func setResolver(space string, at netip.Addr) error {
	dir := filepath.Join(configuration, space)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "resolv.conf"), fmt.Appendf(nil, "nameserver %s\n", at), 0o644)
}

func (d *driver) Update(ctx context.Context, m host.Machine) error {
	x := d.machine(m.ID)
	if x == nil {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.port == nil {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	return x.port.Update(ctx, m)
}

func (d *driver) machine(id string) *machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.machines[id]
}

// Stop takes the machine's network away. There is no system inside that could be
// asked first, so force makes no difference.
func (d *driver) Stop(ctx context.Context, id string, _ bool) error {
	x := d.machine(id)
	if x == nil {
		return d.discard(ctx, id)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := d.dismantle(ctx, x); err != nil {
		return fmt.Errorf("stopping machine %s: %w", id, err)
	}
	return nil
}

// Delete is Stop: a machine has no disk.
func (d *driver) Delete(ctx context.Context, id string) error { return d.Stop(ctx, id, true) }

// discard removes what an earlier process left of a machine.
func (d *driver) discard(ctx context.Context, id string) error {
	if !d.keep {
		return nil // New has removed it
	}
	err := d.network.Discard(ctx, id)
	if err == nil {
		space := d.space(id)
		switch rec, readErr := d.records.readOne(space); {
		case errors.Is(readErr, fs.ErrNotExist):
		case readErr != nil:
			err = readErr
		case rec.ID == id:
			err = d.removeSpace(space)
		}
	}
	if err != nil {
		return fmt.Errorf("removing what was left of machine %s: %w", id, err)
	}
	return nil
}

// dismantle removes what the machine has, in the order in which it can still be
// guarded: listeners, network, namespace. What could not be removed stays noted,
// and the machine entered, for another attempt.
func (d *driver) dismantle(ctx context.Context, x *machine) error {
	if x.gone {
		return nil
	}
	d.mu.Lock()
	x.up = false
	d.mu.Unlock()
	x.servers.Stop(ctx)
	if x.port != nil {
		if err := x.port.Detach(ctx); err != nil {
			return err
		}
		x.port = nil
	}
	if x.hasSpace {
		if err := d.removeSpace(x.space); err != nil {
			return err
		}
		x.hasSpace = false
	}
	d.leave(x)
	return nil
}

// letGo ends the machine's listeners and leaves the rest of it to a later
// process or attempt.
func (d *driver) letGo(ctx context.Context, x *machine) {
	if x.gone {
		return
	}
	x.servers.Stop(ctx)
	if x.port != nil {
		x.port.Release(ctx)
		x.port = nil
	}
	d.leave(x)
}

func (d *driver) leave(x *machine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x.up = false
	delete(d.machines, x.ID)
	x.gone = true
}

func (d *driver) Access(id string) (host.Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[id]
	if x == nil || !x.up {
		return host.Access{}, false
	}
	return host.Access{Driver: d.Name(), Namespace: x.space, Environment: map[string]string{}}, true
}

func (d *driver) Close() error {
	d.mu.Lock()
	d.closed = true
	machines := slices.Collect(maps.Values(d.machines))
	d.mu.Unlock()
	errs := make([]error, len(machines))
	var each sync.WaitGroup
	for n, x := range machines {
		each.Go(func() {
			if !d.keep {
				errs[n] = d.Stop(context.Background(), x.ID, true)
				return
			}
			x.mu.Lock()
			defer x.mu.Unlock()
			d.letGo(context.Background(), x)
		})
	}
	each.Wait()
	return errors.Join(errs...)
}
