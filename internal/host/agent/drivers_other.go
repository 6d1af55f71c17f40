//go:build !linux

package agent

import (
	"context"
	"errors"
	"log/slog"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/link"
)

type watcher struct{}

// Open reports that there are no drivers for this system.
func (c *DriverConfig) Open(context.Context, Environment) (host.Driver, link.Capacity, error) {
	return nil, link.Capacity{}, errors.New("a host agent needs Linux; on other systems, tabard server --driver local runs instances as loopback listeners")
}

// Found finds nothing.
func (c *DriverConfig) Found(ctx context.Context, _ *slog.Logger, _ func(context.Context, []link.Machine) error) {
	<-ctx.Done()
}
