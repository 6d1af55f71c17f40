package host

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/netip"

	"tabard.dev/tabard/internal/vpc"
)

// Machine is what a driver needs to know of an instance. All of it but ID, VPC,
// MACs and addresses may change while the machine runs; what is marked live
// then takes effect at once, the rest at the next start.
type Machine struct {
	ID         string // instance id, e.g. 0737_<uuid>
	Name       string // host name
	VPC        string // VPC id: instances of different VPCs may have equal addresses
	Interfaces []Interface
	Metadata   vpc.MetadataService // live

	// Network is the VPC's number between hosts, and Peers are its machines on
	// other hosts. 0 means that the VPC ends at this host.
	Network uint32     // live
	Peers   []vpc.Peer // live

	VCPUs     int
	MemoryMiB int
	Image     vpc.Image
	Keys      []string // lines of authorized_keys
	UserData  string

	// Fresh says that the machine has never run: only then may a driver that
	// keeps disks make it one. It is about the start at hand and not compared
	// when machines are.
	Fresh bool

	// External, when not nil, says that somebody else made and runs the
	// machine: only its metadata service is ours.
	External *vpc.External
}

// Interface is a network card of a machine. The first one is the primary one:
// it has the default route and the metadata service.
type Interface struct {
	ID       string
	MAC      string
	Address  netip.Addr
	Subnet   netip.Prefix
	Floating netip.Addr // live; invalid means none
	Firewall Firewall   // live
}

// Firewall is what the security groups of an interface let through. What is not
// let through is dropped; answers to what was let through pass.
type Firewall struct {
	Inbound  []Pass
	Outbound []Pass
}

// Pass lets packets through.
type Pass struct {
	Protocol string       // all, tcp, udp or icmp
	Ports    [2]uint16    // first and last destination port of tcp and udp
	ICMPType int          // -1 means any
	ICMPCode int          // -1 means any
	Remote   netip.Prefix // the other end; invalid means any
}

// Handlers serve what comes out of a machine. The driver decides which machine
// a connection belongs to by the socket it was accepted on, never by anything
// that the machine sent.
type Handlers struct {
	Metadata    http.Handler     // for this machine alone
	MetadataTLS *tls.Config      // for machines whose metadata service speaks https
	Server      http.Handler     // the IAM server itself, so that http://<server address> works inside the machine too; nil when it runs elsewhere
	ServerAddrs []netip.AddrPort // addresses the server listens on outside
	ServerTLS   *tls.Config      // nil when it speaks plain HTTP there
}

// Access tells a local administrator how to get inside a running machine.
type Access struct {
	Driver      string            `json:"driver"`
	Namespace   string            `json:"namespace,omitempty"`
	Console     string            `json:"console,omitempty"` // file with the serial console's output
	Environment map[string]string `json:"environment"`
}

// Driver runs machines on this host. Its methods may be called from several
// goroutines; calls about one machine come one at a time.
type Driver interface {
	Name() string

	// Found returns the ids of the machines that an earlier process has left
	// here, running or half made. Each is to be started again, which takes it
	// up as it is, or stopped or deleted.
	Found(ctx context.Context) ([]string, error)

	// Start makes the machine run and its listeners serve. One that an earlier
	// process left running is taken up: what runs in it notices nothing.
	// Starting one that this process runs already is an error.
	Start(ctx context.Context, m Machine, h Handlers) error

	// Update makes a running machine follow what is live.
	Update(ctx context.Context, m Machine) error

	// Stop ends the machine and removes all that Start made but its disk. The
	// system inside is asked to shut down first, unless force is set or it does
	// not do so in time. Stopping one that does not run is fine.
	Stop(ctx context.Context, id string, force bool) error

	// Delete stops the machine by force and removes its disk. Deleting one that
	// does not exist is fine.
	Delete(ctx context.Context, id string) error

	// Ended delivers the ids of machines that ended by themselves. It is nil
	// for drivers whose machines do not.
	Ended() <-chan string

	Access(id string) (Access, bool)

	// Close lets go of all machines. Those of a driver that was told to keep
	// them go on running, without listeners until they are taken up again;
	// others are stopped.
	Close() error
}
