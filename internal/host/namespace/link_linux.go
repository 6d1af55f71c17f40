package namespace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Links runs f with a connection to the kernel's table of links.
func Links(f func(*netlink.Handle) error) error {
	n, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer n.Close()
	return f(n)
}

// Whole repeats a listing of the kernel's that changes under way made
// incomplete.
func Whole[T any](list func() (T, error)) (T, error) {
	for n := 0; ; n++ {
		out, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || n == 9 {
			return out, err
		}
	}
}

// Find returns the link of that name, or nil when there is none.
func Find(n *netlink.Handle, name string) (netlink.Link, error) {
	link, err := n.LinkByName(name)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the link %s: %w", name, err)
	}
	return link, nil
}

// Delete removes the link of that name, if there is one.
func Delete(n *netlink.Handle, name string) error {
	link, err := Find(n, name)
	if err != nil || link == nil {
		return err
	}
	if err := n.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("removing the link %s: %w", name, err)
	}
	return nil
}

// Up brings a link up.
func Up(name string) error {
	return Links(func(n *netlink.Handle) error {
		link, err := n.LinkByName(name)
		if err == nil {
			err = n.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("bringing up %s: %w", name, err)
		}
		return nil
	})
}

// AwaitCarrier returns when the link carries packets. The kernel learns of a
// carrier in the background, and until then drops what is sent: a machine whose
// first ARP request falls into that gap waits a second for nothing.
func AwaitCarrier(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return Links(func(n *netlink.Handle) error {
		for {
			link, err := n.LinkByName(name)
			if err != nil {
				return fmt.Errorf("looking at %s: %w", name, err)
			}
			if link.Attrs().OperState == netlink.OperUp {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("waiting for the carrier of %s: %w", name, ctx.Err())
			case <-time.After(2 * time.Millisecond):
			}
		}
	})
}

// SetAddress gives a link an address, if it does not have it.
func SetAddress(n *netlink.Handle, link netlink.Link, p netip.Prefix, scope netlink.Scope) error {
	if err := n.AddrReplace(link, &netlink.Addr{IPNet: IPNet(p), Scope: int(scope)}); err != nil {
		return fmt.Errorf("adding the address %s to %s: %w", p, link.Attrs().Name, err)
	}
	return nil
}

// SetRoute makes a route through a gateway on the link, or to the link itself
// when there is no gateway, the one route to its destination.
func SetRoute(n *netlink.Handle, link netlink.Link, to netip.Prefix, gateway netip.Addr) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: IPNet(to), Scope: netlink.SCOPE_LINK}
	if gateway.IsValid() {
		r.Scope, r.Gw, r.Flags = netlink.SCOPE_UNIVERSE, gateway.AsSlice(), int(netlink.FLAG_ONLINK)
	}
	if err := n.RouteReplace(r); err != nil {
		return fmt.Errorf("adding the route to %s by %s: %w", to, link.Attrs().Name, err)
	}
	return nil
}

// IPNet is a prefix in the form of the standard library's older half.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Sysctl sets a parameter, whose name has slashes for dots.
func Sysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("setting %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

// DisableIPv6 turns IPv6 off for a device, or for all or default. A kernel
// without IPv6 has nothing to turn off.
func DisableIPv6(device string) error {
	if err := Sysctl("net/ipv6/conf/"+device+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Listen opens a TCP listener that takes connections from one device only,
// with a hop limit for its answers where that is not 0.
func Listen(ctx context.Context, at netip.AddrPort, device string, hopLimit int) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: bound(device, hopLimit)}
	lc.SetMultipathTCP(false) // a subflow could come by another device
	l, err := lc.Listen(ctx, "tcp"+version(at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// ListenPacket opens a UDP socket that takes datagrams from one device only.
func ListenPacket(ctx context.Context, at netip.AddrPort, device string) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: bound(device, 0)}
	c, err := lc.ListenPacket(ctx, "udp"+version(at.Addr()), at.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

func version(a netip.Addr) string {
	if a.Is6() {
		return "6"
	}
	return "4"
}

func bound(device string, hopLimit int) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		if failed := c.Control(func(fd uintptr) {
			// Before bind: from the first packet on, the socket is the device's.
			if err = unix.BindToDevice(int(fd), device); err != nil {
				err = os.NewSyscallError("SO_BINDTODEVICE "+device, err)
				return
			}
			if hopLimit != 0 {
				err = os.NewSyscallError("IP_TTL", unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TTL, hopLimit))
			}
		}); failed != nil {
			return failed
		}
		return err
	}
}
