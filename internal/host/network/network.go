// Package network joins machines to their VPCs on a Linux host: it is the part
// of running machines that every driver needs, whatever the machine is made of.
//
//	tabard-<state>-r-…  the router of one VPC
//	┌──────────────────────────────────────────────┐
//	│ t1a2b3c4d5e6f  10.0.0.1  169.254.169.254     ├── eth0 10.0.0.4/24 of machine A
//	│   ├ metadata listener of A, port 80 or 443   │   (the peer of a veth in a namespace,
//	│   └ resolver of A, port 53                   │    or the guest's end of a tap)
//	│ t5d6e7f8a9b0c  10.0.0.1  169.254.169.254     ├── eth0 10.0.0.5/24 of machine B
//	│   └ …                                        │
//	│ up0  100.127.0.1/31               vx0        │
//	└──┬─────────────────────────────────┊─────────┘
//	   │ only with an uplink             ┊ VXLAN, only with an overlay
//	┌──┴─────────────────────────────────┊─────────┐
//	│ tb<state>0000  100.127.0.0/31     eth0       │  the host's own namespace
//	└──────────────────────────────────────────────┘
//
// Each VPC has a router namespace, so equal addresses in two VPCs never meet.
// Each network card of a machine is a port: a link of its own to the router,
// never a bridge that it shares. The router answers ARP for all of the VPC and
// routes, and its firewall lets through what the security groups of both ends
// let through, and answers to that. When a rule goes, so do the connections that
// it let through.
//
// # Which machine is calling
//
// The metadata service has one listener a machine, bound to that machine's
// primary port with SO_BINDTODEVICE, so the socket that accepted a connection is
// the identity (reference/instance-metadata-and-vpc.md section 6.3). Behind that
// stand three more walls, each enough by itself against a forged source: a
// firewall at the port that passes only frames with the machine's own MAC and
// address (ARP included), strict reverse-path filtering, and a listener that
// closes connections from any other address. One port is open, that of the
// service's protocol; where the service is off, none. What is sent to any other
// link-local address or port is dropped, so the machine sees no answer at all.
// Answers carry the machine's hop limit as their IP TTL.
//
// # The resolver
//
// On the gateway's address of each port, UDP and TCP port 53, a resolver answers
// api.metadata.cloud.ibm.com. It hands other names to the resolvers of the host
// where there is an uplink, and refuses them where there is none. It listens on
// the port's device and takes queries from the machine's own address only.
//
// # The uplink
//
// Without an uplink nothing is put into the host's own namespace, and machines
// reach their VPC and the metadata service alone. With one, each router has a
// link to the host. What leaves a VPC is rewritten twice: in the router to the
// machine's floating address or else to the router's end of the link, so that
// machines with equal addresses differ outside; in the host to the address of
// the device it leaves by, unless it has a floating address. The host's table
// tabard_<state> keeps machines from the host's own addresses but for
// Uplink.Reachable, and from other VPCs but for their floating addresses.
//
// The first router turns on net.ipv4.ip_forward of the host's namespace, with
// which the host forwards between its other devices too, unless its own rules
// forbid it. It is never turned off, because others may rely on it by then.
// Rules of others in the host's namespace apply as well: a firewall that drops
// forwarded packets by default must let through those of the devices
// tb<state>*. Whoever empties the host's rules takes the table away, and with it
// the guard of the host's own services, until the next router is made.
//
// A floating address is a /32 route of the host to the machine's router. It is
// not announced: the network around must route it to this host, or, where it is
// of a network that the host is on, the host must answer ARP for it:
//
//	ip neigh add proxy ADDRESS dev eth0
//
// A peer keeps its own address on the way in, so a machine sees, and its
// security groups judge, who is really calling. Between machines of one VPC a
// floating address leads to the machine without rewriting the sender's private
// address. A machine does not reach itself by its floating address.
//
// # VPCs on several hosts
//
// With an overlay, the routers of one VPC on several hosts exchange packets in
// VXLAN (RFC 7348). Nothing is learned and nothing is flooded: where each
// machine is, Machine.Peers says, and a router has a route, a neighbour and a
// host for each of them and for nobody else. The MAC of a router's end follows
// from the address of its host. Where machines of a VPC are told differently for
// a moment, what was said last counts.
//
// A packet is taken from another host only if it is of a VPC's number, comes
// from the address of a host, and is inside from a machine that is on this very
// host; the table tabard_<state>_overlay of the host's namespace sees to it, and
// leaves other numbers alone, for they are others' VXLAN. Behind it stands a
// second wall, the filter of the router's own end, which knows each machine with
// the MAC of its host, and strict reverse-path filtering. What came in this way
// goes to a machine of the VPC that is here, judged by its security groups, and
// nowhere else: not to the router, the metadata service, the uplink or another
// host. The sender's security groups are judged where the sender is. Machines
// cannot send to the port of the overlay outside their VPC, nor can what else a
// host forwards and hides behind its own address send to hosts in our VPCs.
//
// So a host that was taken over speaks for the machines that are on it, and for
// no others, as long as it cannot send with another host's address. Packets
// between hosts are not encrypted, and their senders are believed by their
// addresses: the network that joins the hosts must not let anybody else send
// with those or listen, or else be secured underneath, by IPsec or WireGuard,
// with addresses of that network given as the hosts'. A host's firewall must let
// in UDP port 4789 from the other hosts. What reloads all rules of the host, as
// nft(8) does with "flush ruleset", takes the first wall away until the next
// change; the second one stands in the routers.
//
// VXLAN takes 50 bytes of a packet. Routers tell machines what fits (ICMP), and
// have TCP connections fit when they open. An address of the VPC that no machine
// has is not known here unless a machine of its subnet is here too; then it
// leads outside. A floating address of a machine on another host leads outside
// also where both are of one VPC: that machine sees the sender as the world does.
//
// # What outlives the process
//
// Ports, routers and the uplink live in the kernel and go on when the process
// ends, by whatever death: traffic flows, only the listeners are gone. Devices
// carry the ids of machine and VPC as their alias, so a later process finds them
// (Found), takes them up, or removes them (Discard, Sweep). A tap lives as long
// as the process that holds its file.
//
// # What this does not do
//
// There is no IPv6, no DHCP (an address is configured inside the machine) and no
// multicast. A secondary network card has no metadata service, and its answers
// must leave by itself, which is the system inside's to arrange. A machine can
// fill its router's table of connections, which is its VPC's, and the host's.
//
// New needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) and nftables in the kernel, and
// says so when they are missing.
package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"

	"tabard.dev/tabard/internal/cluster"
)

// Config says whose network it is and what it is joined to.
type Config struct {
	// State tells this installation's namespaces and devices from those of
	// others on this host: 8 hexadecimal digits. One network with one State may
	// exist at a time.
	State  string
	Uplink *Uplink      // nil: there is no way out of a VPC
	Log    *slog.Logger // nil discards

	// Overlay joins VPCs with their parts on other hosts. nil: a VPC ends at
	// this host.
	Overlay *Overlay

	// Host names the namespace, in ip-netns(8)'s directory, that the uplink
	// leads to. Empty is that of this process.
	Host string
}

// Uplink is the way out of the VPCs.
type Uplink struct {
	// Range is for the links between the host and the routers, two addresses
	// each. The zero value is 100.127.0.0/16. No subnet of a VPC may overlap it.
	Range netip.Prefix

	// Reachable are the TCP services of the host that machines may connect to;
	// an unspecified address stands for all of the host's.
	Reachable []netip.AddrPort

	// Resolvers are asked for names of the world, from the host's namespace.
	// nil: those of /etc/resolv.conf, read at each question.
	Resolvers []netip.AddrPort
}

// Overlay is the network that joins the hosts.
type Overlay struct {
	// Address is this host's on it, by which the others know it; of IPv4.
	Address netip.Addr

	// Port is the UDP port that hosts exchange packets by, the same on all of
	// them. 0 is that of VXLAN, 4789.
	Port uint16
}

// defaultPort is that of VXLAN (RFC 7348 section 5).
const defaultPort = 4789

func (o *Overlay) port() uint16 {
	if o.Port == 0 {
		return defaultPort
	}
	return o.Port
}

// ErrOverlay says that VPCs cannot span hosts from here; everything else may
// work.
var ErrOverlay = errors.New("VPCs cannot span hosts from here")

// defaultRange is the end of the range that RFC 6598 sets aside for links inside
// a provider's network.
var defaultRange = netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 127, 0, 0}), 16)

// metadataAddress is where every machine finds its metadata service
// (reference/instance-metadata-and-vpc.md section 1.1).
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// linkLocal are the addresses that a router neither routes nor takes, but for
// the metadata service.
var linkLocal = netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, 0, 0}), 16)

// Left is a port that an earlier process made.
type Left struct {
	Machine   string
	Interface string
	VPC       string
	Device    string // its name in the router
	Tap       bool   // else the end of a veth
}

func (c *Config) check() error {
	if !regexp.MustCompile(`^[0-9a-f]{8}$`).MatchString(c.State) {
		return fmt.Errorf("the network's state %q is not 8 hexadecimal digits", c.State)
	}
	if o := c.Overlay; o != nil {
		if err := cluster.ValidAddress(o.Address); err != nil {
			return fmt.Errorf("%w: %w", ErrOverlay, err)
		}
	}
	if c.Uplink == nil {
		return nil
	}
	r := c.Uplink.links()
	if !r.Addr().Is4() || r.Bits() > 30 || r != r.Masked() || r.Overlaps(linkLocal) || r.Addr().IsLoopback() {
		return fmt.Errorf("the uplink's range %s is not a range of IPv4 addresses with room for links", r)
	}
	for _, a := range c.Uplink.Reachable {
		if !a.IsValid() || a.Port() == 0 {
			return fmt.Errorf("the reachable service %s is not an address and a port", a)
		}
	}
	for _, a := range c.Uplink.Resolvers {
		if !a.IsValid() || a.Port() == 0 || a.Addr().IsUnspecified() {
			return fmt.Errorf("the resolver %s is not an address and a port", a)
		}
	}
	return nil
}

func (u *Uplink) links() netip.Prefix {
	if u.Range.IsValid() {
		return u.Range
	}
	return defaultRange
}

var errClosed = errors.New("the network is closed")
