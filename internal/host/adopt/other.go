//go:build !linux

package adopt

import (
	"fmt"
	"runtime"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/link"
)

// New returns an error: taps, veths and traffic control are features of Linux.
func New(Config) (host.Driver, error) {
	return nil, fmt.Errorf("the adopt driver runs on Linux only, not on %s", runtime.GOOS)
}

// Devices finds nothing.
func Devices(string) func() ([]link.Machine, error) {
	return func() ([]link.Machine, error) { return nil, nil }
}
