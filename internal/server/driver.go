package server

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/local"
	"tabard.dev/tabard/internal/host/netns"
	"tabard.dev/tabard/internal/host/network"
)

// newDriver returns the driver that runs instances on this machine: network
// namespaces for root on Linux, else loopback listeners. nil means none.
func newDriver(name, tag string, log *slog.Logger) (host.Driver, error) {
	if name == DriverAuto {
		name = DriverLocal
		if runtime.GOOS == "linux" && os.Geteuid() == 0 {
			name = DriverNetns
		}
	}
	switch name {
	case DriverNetns:
		d, err := newNetns(tag, log)
		if err != nil {
			return nil, fmt.Errorf("network namespaces for instances: %w (or choose --driver local)", err)
		}
		return d, nil
	case DriverLocal:
		return local.New(local.Config{Log: log}), nil
	}
	return nil, nil
}

// newNetns returns the driver of network namespaces. They end with the server.
func newNetns(tag string, log *slog.Logger) (host.Driver, error) {
	n, err := network.New(network.Config{State: tag, Log: log})
	if err != nil {
		return nil, err
	}
	d, err := netns.New(netns.Config{Network: n, Log: log})
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return joined{d, n}, nil
}

// joined closes a driver's network after it.
type joined struct {
	host.Driver
	network *network.Network
}

func (o joined) Close() error { return errors.Join(o.Driver.Close(), o.network.Close()) }
