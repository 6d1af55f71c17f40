package network

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// forgetConnections makes the router forget the connections of addresses, so
// that nobody inherits them. It runs in the router's namespace.
func forgetConnections(addresses ...netip.Addr) error {
	if len(addresses) == 0 {
		return nil
	}
	return forget(func(c connection) bool {
		return slices.ContainsFunc([]netip.Addr{c.from, c.asked, c.to, c.answered}, func(a netip.Addr) bool {
			return slices.Contains(addresses, a)
		})
	})
}

// forgetRefused makes the router forget those connections of an address that its
// security groups do not let through any more. Nothing takes them up again: a
// router ignores TCP that does not begin with an opening (prepareRouter), and
// what else comes is judged anew. It runs in the router's namespace.
func forgetRefused(address netip.Addr, f host.Firewall) error {
	return forget(func(c connection) bool {
		return c.from == address && !c.letThrough(f.Outbound, c.to) || c.to == address && !c.letThrough(f.Inbound, c.from)
	})
}

// connection is one that a router keeps record of.
type connection struct {
	protocol uint8
	from     netip.Addr // who opened it
	asked    netip.Addr // whom it wanted: a floating address, perhaps
	to       netip.Addr // whom it reached
	answered netip.Addr // whom that one answers: a floating address, perhaps
	port     uint16     // of to
}

// letThrough tells whether one of the passes is for the connection, the other
// end of which is given. Whether it is for an ICMP message the record does not
// tell; the next one is judged anew.
func (c connection) letThrough(passes []host.Pass, other netip.Addr) bool {
	return slices.ContainsFunc(passes, func(p host.Pass) bool {
		if p.Remote.IsValid() && !p.Remote.Contains(other) {
			return false
		}
		inRange := anyPort(p.Ports) || p.Ports[0] <= c.port && c.port <= p.Ports[1]
		switch p.Protocol {
		case vpc.ProtocolAll:
			return true
		case vpc.ProtocolTCP:
			return c.protocol == unix.IPPROTO_TCP && inRange
		case vpc.ProtocolUDP:
			return c.protocol == unix.IPPROTO_UDP && inRange
		}
		return false
	})
}

// matching is a condition in the form that the netlink library takes.
type matching func(connection) bool

func (m matching) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	address := func(ip net.IP) netip.Addr {
		a, _ := netip.AddrFromSlice(ip)
		return a.Unmap()
	}
	return m(connection{
		protocol: f.Forward.Protocol,
		from:     address(f.Forward.SrcIP), asked: address(f.Forward.DstIP),
		to: address(f.Reverse.SrcIP), answered: address(f.Reverse.DstIP),
		port: f.Reverse.SrcPort,
	})
}

func forget(which matching) error {
	n, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer n.Close()
	_, err = namespace.Whole(func() (uint, error) {
		return n.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, which)
	})
	if err != nil {
		return fmt.Errorf("forgetting connections: %w", err)
	}
	return nil
}
