package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/adopt"
	"tabard.dev/tabard/internal/host/libvirt"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/host/netns"
	"tabard.dev/tabard/internal/host/network"
	"tabard.dev/tabard/internal/host/qemu"
)

type watcher = *libvirt.Watcher

// Open makes the drivers. Their machines outlive the agent.
func (c *DriverConfig) Open(_ context.Context, e Environment) (host.Driver, link.Capacity, error) {
	capacity := link.Capacity{VCPUs: runtime.NumCPU(), MemoryMiB: c.MemoryMiB, Drivers: []string{}}
	if capacity.MemoryMiB == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, capacity, fmt.Errorf("ask for the size of this machine's memory: %w", err)
		}
		capacity.MemoryMiB = int(info.Totalram * uint64(info.Unit) >> 20 * 3 / 4)
	}
	var files unix.Statfs_t
	if err := unix.Statfs(e.Dir, &files); err != nil {
		return nil, capacity, fmt.Errorf("ask for the size of the file system of %s: %w", e.Dir, err)
	}
	// The rest is for images and for what else is there.
	capacity.DiskMiB = max(1, int(files.Blocks*uint64(files.Bsize)>>20/10*9))
	var uplink *network.Uplink
	if !c.NoUplink {
		uplink = &network.Uplink{}
		if c.UplinkRange != "" {
			p, err := netip.ParsePrefix(c.UplinkRange)
			if err != nil {
				return nil, capacity, err
			}
			uplink.Range = p
		}
	}
	net, err := c.network(uplink, e, &capacity)
	if err != nil {
		return nil, capacity, fmt.Errorf("the network of instances: %w", err)
	}
	c.watch = libvirt.New(libvirt.Config{Sockets: c.sockets(), Devices: adopt.Devices(""), Log: e.Log})
	choice := &host.Choice{}
	if err := c.fill(choice, net, e); err != nil {
		return nil, capacity, errors.Join(err, choice.Close(), net.Close())
	}
	for name, d := range map[string]host.Driver{DriverQEMU: choice.Images, DriverNetns: choice.Stock, DriverAdopt: choice.External} {
		if d != nil {
			capacity.Drivers = append(capacity.Drivers, name)
		}
	}
	slices.Sort(capacity.Drivers)
	return &joined{Driver: choice, network: net, log: e.Log}, capacity, nil
}

// network makes the network of instances. Where VPCs cannot span hosts, and
// nobody has asked for it, they end here.
func (c *DriverConfig) network(uplink *network.Uplink, e Environment, capacity *link.Capacity) (*network.Network, error) {
	address, err := c.address(e.Address)
	if err != nil {
		return nil, err
	}
	cfg := network.Config{State: c.State, Uplink: uplink, Log: e.Log}
	if !address.IsValid() {
		e.Log.Info("instances do not reach those of their VPC on other hosts; give --address if they should")
		return network.New(cfg)
	}
	cfg.Overlay = &network.Overlay{Address: address}
	n, err := network.New(cfg)
	if errors.Is(err, network.ErrOverlay) && c.Address == "" {
		e.Log.Warn("instances do not reach those of their VPC on other hosts", "error", err)
		cfg.Overlay = nil
		return network.New(cfg)
	}
	if err != nil {
		return nil, err
	}
	capacity.Address = address
	e.Log.Info("VPCs span hosts", "address", address)
	return n, nil
}

// fill makes each driver that is wanted. Of those that nobody has named, one
// that does not work here is left out with a word in the log.
func (c *DriverConfig) fill(choice *host.Choice, net *network.Network, e Environment) error {
	wanted, err := c.wanted()
	if err != nil {
		return err
	}
	for _, each := range []struct {
		name    string
		records string // directory, in that of the agent, with an entry for each machine
		slot    *host.Driver
		open    func() (host.Driver, error)
	}{
		{DriverNetns, namespacesDir, &choice.Stock, func() (host.Driver, error) {
			return netns.New(netns.Config{Network: net, Keep: true, Dir: filepath.Join(e.Dir, namespacesDir), Log: e.Log})
		}},
		{DriverAdopt, "", &choice.External, func() (host.Driver, error) {
			return adopt.New(adopt.Config{State: c.State, Domains: c.watch, Keep: true, Log: e.Log})
		}},
		{DriverQEMU, filepath.Join(machinesDir, "machines"), &choice.Images, func() (host.Driver, error) {
			first, last, err := c.uids()
			if err != nil {
				return nil, err
			}
			return qemu.New(qemu.Config{
				Dir: filepath.Join(e.Dir, machinesDir), Network: taps{net}, Images: e.Images, Keep: true, Accel: c.Accel, User: c.User,
				UIDs:         qemu.UIDs{First: first, Last: last},
				MaxDiskBytes: int64(c.MaxDiskGiB) << 30, CACert: []byte(e.CA), Log: e.Log,
			})
		}},
	} {
		// Going on without a driver that has machines here would take their network
		// away.
		needed := each.records != "" && len(inUse(filepath.Join(e.Dir, each.records))) > 0
		if wanted != nil && !slices.Contains(wanted, each.name) {
			if needed {
				return fmt.Errorf("the driver %s has machines here: name it in --driver, or delete their instances first", each.name)
			}
			continue
		}
		d, err := each.open()
		switch {
		case err == nil:
			*each.slot = d
		case wanted != nil, needed:
			return fmt.Errorf("the driver %s: %w", each.name, err)
		default:
			e.Log.Warn("driver does not work here and is left out", "driver", each.name, "error", err)
		}
	}
	return nil
}

// Directories of the drivers, in that of the agent.
const (
	namespacesDir = "namespaces"
	machinesDir   = "vm"
)

// inUse returns what is in a directory of records; a driver without one has
// nothing to lose.
func inUse(dir string) []os.DirEntry {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	return entries
}

// Found looks for machines that something else runs, until the context ends.
func (c *DriverConfig) Found(ctx context.Context, _ *slog.Logger, tell func(context.Context, []link.Machine) error) {
	_ = c.watch.Run(ctx, tell) // it ends with the context, and says no more than that
}

// sockets are where libvirt may be; nil means the usual places.
func (c *DriverConfig) sockets() []string {
	if c.Libvirt == "" {
		return nil
	}
	return []string{c.Libvirt}
}

// taps is the network as the qemu driver uses it.
type taps struct{ *network.Network }

// AttachTap implements [qemu.Network].
func (t taps) AttachTap(ctx context.Context, m host.Machine, h host.Handlers) (qemu.Port, []*os.File, error) {
	p, files, err := t.Network.AttachTap(ctx, m, h)
	if err != nil {
		return nil, nil, err
	}
	return p, files, nil
}

// TakeUpTap implements [qemu.Network].
func (t taps) TakeUpTap(ctx context.Context, m host.Machine, h host.Handlers) (qemu.Port, error) {
	p, err := t.Network.TakeUpTap(ctx, m, h)
	if err != nil {
		return nil, err
	}
	return p, nil
}

// joined is the drivers with their network: it closes that after them, and
// removes what an earlier process left in it once every machine that was found
// is taken up or stopped.
type joined struct {
	host.Driver
	network *network.Network
	log     *slog.Logger

	mu   sync.Mutex
	left map[string]bool // machines that were found and not dealt with yet
}

// Found implements [host.Driver].
func (j *joined) Found(ctx context.Context) ([]string, error) {
	ids, err := j.Driver.Found(ctx)
	if err != nil {
		return nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.left = map[string]bool{}
	for _, id := range ids {
		j.left[id] = true
	}
	if len(ids) == 0 {
		j.sweep(ctx)
	}
	return ids, nil
}

// dealt notes that a machine was dealt with.
func (j *joined) dealt(ctx context.Context, id string, err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err == nil && j.left[id] {
		if delete(j.left, id); len(j.left) == 0 {
			j.sweep(ctx)
		}
	}
	return err
}

func (j *joined) sweep(ctx context.Context) {
	if err := j.network.Sweep(ctx); err != nil {
		j.log.Error("what an earlier agent left in the network is not removed", "error", err)
	}
}

// Start implements [host.Driver].
func (j *joined) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	return j.dealt(ctx, m.ID, j.Driver.Start(ctx, m, h))
}

// Stop implements [host.Driver].
func (j *joined) Stop(ctx context.Context, id string, force bool) error {
	return j.dealt(ctx, id, j.Driver.Stop(ctx, id, force))
}

// Delete implements [host.Driver].
func (j *joined) Delete(ctx context.Context, id string) error {
	return j.dealt(ctx, id, j.Driver.Delete(ctx, id))
}

// Close implements [host.Driver].
func (j *joined) Close() error { return errors.Join(j.Driver.Close(), j.network.Close()) }
