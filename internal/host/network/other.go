//go:build !linux

package network

import (
	"context"
	"fmt"
	"os"
	"runtime"

	"tabard.dev/tabard/internal/host"
)

// Network is there so that drivers build; New never returns one.
type Network struct{}

// Port is a machine's connection to its VPC.
type Port struct{}

var errSystem = fmt.Errorf("networks of machines run on Linux only, not on %s", runtime.GOOS)

// New returns an error: network namespaces are a feature of Linux.
func New(Config) (*Network, error) { return nil, errSystem }

// State returns what the network was configured with.
func (n *Network) State() string { return "" }

// Found returns an error.
func (n *Network) Found() ([]Left, error) { return nil, errSystem }

// AttachTap returns an error.
func (n *Network) AttachTap(context.Context, host.Machine, host.Handlers) (*Port, []*os.File, error) {
	return nil, nil, errSystem
}

// TakeUpTap returns an error.
func (n *Network) TakeUpTap(context.Context, host.Machine, host.Handlers) (*Port, error) {
	return nil, errSystem
}

// Discard returns an error.
func (n *Network) Discard(context.Context, string) error { return errSystem }

// Sweep returns an error.
func (n *Network) Sweep(context.Context) error { return errSystem }

// Close does nothing.
func (n *Network) Close() error { return nil }

// Update returns an error.
func (p *Port) Update(context.Context, host.Machine) error { return errSystem }

// Detach does nothing.
func (p *Port) Detach(context.Context) error { return nil }

// Release does nothing.
func (p *Port) Release(context.Context) {}
