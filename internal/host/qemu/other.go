//go:build !linux

package qemu

import (
	"fmt"
	"runtime"

	"tabard.dev/tabard/internal/host"
)

// Driver does not exist outside Linux.
type Driver struct{ host.Driver }

// New returns an error: machines need taps and pidfds, which are features of
// Linux.
func New(Config) (*Driver, error) {
	return nil, fmt.Errorf("the qemu driver runs on Linux only, not on %s: use the local driver", runtime.GOOS)
}
