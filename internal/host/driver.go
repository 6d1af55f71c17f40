package host

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/netip"
)

// Machine is what a driver needs to know of an instance.
type Machine struct {
	ID       string // instance id, e.g. 0737_<uuid>
	VPC      string // VPC id: instances of different VPCs may have equal addresses
	MAC      string
	Address  netip.Addr // primary address
	Subnet   netip.Prefix
	Metadata bool // whether the metadata service is on
	HopLimit int  // IP TTL of the metadata service's answers, 1..64
}

// Handlers serve what comes out of a machine. The driver decides which machine
// a connection belongs to by the socket it was accepted on, never by anything
// that the machine sent.
type Handlers struct {
	Metadata    http.Handler     // for this machine alone
	Server      http.Handler     // the IAM server itself, so that http://<server address> works inside the machine too
	ServerAddrs []netip.AddrPort // addresses the server listens on outside
	ServerTLS   *tls.Config      // nil when it speaks plain HTTP there
}

// Access tells a local administrator how to get inside a running machine.
type Access struct {
	Driver      string            `json:"driver"`
	Namespace   string            `json:"namespace,omitempty"`
	Environment map[string]string `json:"environment"`
}

// Driver runs machines on this host.
type Driver interface {
	Name() string

	// Start makes the machine run and its listeners serve; starting one that
	// runs is an error.
	Start(ctx context.Context, m Machine, h Handlers) error

	// Stop ends it and removes all that Start made. Stopping one that does not
	// run is fine.
	Stop(ctx context.Context, id string) error

	Access(id string) (Access, bool)

	// Close stops all machines.
	Close() error
}
