//go:build !linux

package netns

import (
	"fmt"
	"runtime"

	"tabard.dev/tabard/internal/host"
)

// New returns an error: network namespaces are a feature of Linux.
func New(Config) (host.Driver, error) {
	return nil, fmt.Errorf("the netns driver runs on Linux only, not on %s: use the local driver", runtime.GOOS)
}
