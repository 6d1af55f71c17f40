package server

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/local"
	"tabard.dev/tabard/internal/host/netns"
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
		d, err := netns.New(netns.Config{State: tag, Log: log})
		if err != nil {
			return nil, fmt.Errorf("network namespaces for instances: %w (or choose --driver local)", err)
		}
		return d, nil
	case DriverLocal:
		return local.New(local.Config{Log: log}), nil
	}
	return nil, nil
}
