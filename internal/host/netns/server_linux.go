package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/serve"
)

// metadataAddress is not the server's to take
// (reference/instance-metadata-and-vpc.md section 1.1).
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// listenForServer makes the server's addresses reachable as they are written
// outside. It runs in the machine's namespace.
func (x *machine) listenForServer(ctx context.Context, h host.Handlers) error {
	var from netip.Addr
	if len(x.Interfaces) > 0 {
		from = x.Interfaces[0].Address
	}
	handler := fromMachine(from, h.Server)
	bounds := serve.Server()
	bounds.TLS = h.ServerTLS
	done := map[netip.AddrPort]bool{}
	for _, outside := range h.ServerAddrs {
		places, err := insidePlaces(outside.Addr().Unmap().WithZone(""))
		if err != nil {
			return err
		}
		for _, a := range places {
			at := netip.AddrPortFrom(a, outside.Port())
			if done[at] {
				continue
			}
			done[at] = true
			l, err := listenOnLoopback(ctx, at)
			if a.Is6() && noIPv6(err) {
				continue
			}
			if err != nil {
				return err
			}
			x.servers.Serve(l, netip.Addr{}, handler, bounds)
		}
	}
	return nil
}

// insidePlaces are the addresses inside that stand for one outside.
func insidePlaces(a netip.Addr) ([]netip.Addr, error) {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	switch {
	case !a.IsValid():
		return nil, errors.New("the server's address is no address")
	case a == metadataAddress:
		return nil, fmt.Errorf("the server's address %s is the metadata service's", a)
	case a.Is4() && a.IsUnspecified():
		return []netip.Addr{loopback}, nil
	case a.IsUnspecified():
		return []netip.Addr{loopback, netip.IPv6Loopback()}, nil
	}
	return []netip.Addr{a}, nil
}

// listenOnLoopback gives the loopback device the address, unless it is its own
// already. The listener is bound to the device, so that no neighbour can speak
// in the machine's name.
func listenOnLoopback(ctx context.Context, at netip.AddrPort) (*net.TCPListener, error) {
	if a := at.Addr(); !a.IsLoopback() {
		err := namespace.Links(func(n *netlink.Handle) error {
			lo, err := n.LinkByName("lo")
			if err != nil {
				return fmt.Errorf("finding lo: %w", err)
			}
			return namespace.SetAddress(n, lo, netip.PrefixFrom(a, a.BitLen()), netlink.SCOPE_HOST)
		})
		if err != nil {
			return nil, err
		}
	}
	return namespace.Listen(ctx, at, "lo", 0)
}

// noIPv6 tells whether a step failed because the kernel has IPv6 turned off.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)
}

// fromMachine names the machine as the peer of its requests: on its loopback
// they all seem to come from 127.0.0.1, as the host's own do.
func fromMachine(address netip.Addr, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, port, err := net.SplitHostPort(r.RemoteAddr)
		if err != nil {
			port = "0"
		}
		in := r.WithContext(r.Context())
		in.RemoteAddr = net.JoinHostPort(address.String(), port)
		next.ServeHTTP(w, in)
	})
}
