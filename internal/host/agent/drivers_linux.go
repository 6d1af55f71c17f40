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

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/host/netns"
	"tabard.dev/tabard/internal/host/network"
	"tabard.dev/tabard/internal/host/qemu"
)

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
	choice := &host.Choice{}
	if err := c.fill(choice, net, e); err != nil {
		return nil, capacity, errors.Join(err, choice.Close(), net.Close())
	}
	for name, d := range map[string]host.Driver{DriverQEMU: choice.Images, DriverNetns: choice.Stock} {
		if d != nil {
			capacity.Drivers = append(capacity.Drivers, name)
		}
	}
	slices.Sort(capacity.Drivers)
	return joined{choice, net}, capacity, nil
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
	for _, make := range []struct {
		name string
		slot *host.Driver
		open func() (host.Driver, error)
	}{
		{DriverNetns, &choice.Stock, func() (host.Driver, error) {
			return netns.New(netns.Config{Network: net, Keep: true, Dir: filepath.Join(e.Dir, "namespaces"), Log: e.Log})
		}},
		{DriverQEMU, &choice.Images, func() (host.Driver, error) {
			return qemu.New(qemu.Config{
				Dir: filepath.Join(e.Dir, "vm"), Network: taps{net}, Images: e.Images, Keep: true, Accel: c.Accel, User: c.User,
				CACert: []byte(e.CA), Log: e.Log,
			})
		}},
	} {
		if wanted != nil && !slices.Contains(wanted, make.name) {
			continue
		}
		d, err := make.open()
		switch {
		case err == nil:
			*make.slot = d
		case wanted != nil:
			return fmt.Errorf("the driver %s: %w", make.name, err)
		default:
			e.Log.Warn("driver does not work here and is left out", "driver", make.name, "error", err)
		}
	}
	return nil
}

// Found looks for machines that something else runs, until the context ends.
func (c *DriverConfig) Found(ctx context.Context, _ *slog.Logger, tell func(context.Context, []link.Machine) error) {
	<-ctx.Done()
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

// joined closes the drivers' network after them.
type joined struct {
	host.Driver
	network *network.Network
}

// Close implements [host.Driver].
func (j joined) Close() error { return errors.Join(j.Driver.Close(), j.network.Close()) }
