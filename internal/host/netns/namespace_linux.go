package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// directory keeps named namespaces, as ip-netns(8) has it.
const directory = "/run/netns"

// shareDirectory makes the directory a shared mount point, as "ip netns add"
// does. Were it left to that command, its mount would hide ours from removal.
func shareDirectory() error {
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return err
	}
	d, err := os.Open(directory)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	err = unix.Mount("", directory, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(directory, directory, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", directory, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// named returns the names of the namespaces that begin with prefix.
func named(prefix string) ([]string, error) {
	entries, err := os.ReadDir(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// within runs f in a namespace. Sockets that f opens stay in it; goroutines
// that f starts do not run in it.
func within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("entering the namespace: %w", err)
		}
		return f()
	})
}

// create makes a namespace of that name and runs f in it. Where anything goes
// wrong, no namespace is left. The caller closes the handle.
func create(name string, f func() error) (netns.NsHandle, error) {
	ns := netns.None()
	err := onThread(func() error {
		made, err := netns.NewNamed(name)
		if errors.Is(err, fs.ErrExist) {
			return err // another's
		}
		if err == nil {
			err = f()
		}
		if err != nil {
			if made.IsOpen() {
				made.Close()
			}
			return errors.Join(err, remove(name))
		}
		ns = made
		return nil
	})
	return ns, err
}

// remove takes a namespace's name away. The kernel ends the namespace, and all
// devices in it, when no process and no socket is left in it.
func remove(name string) error {
	path := filepath.Join(directory, name)
	// A process that ended between making the file and mounting on it leaves a
	// plain file, for which unmounting is invalid.
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// onThread runs f on a thread of its own, which f may move to other namespaces.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("finding the own namespace: %w", err)
			return
		}
		err = f()
		// A thread that can't go home is never unlocked, so it ends here and
		// no other goroutine wakes up in a foreign namespace.
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		home.Close()
		done <- err
	}()
	return <-done
}

// The functions below act on the namespace of the calling thread.

// withLinks runs f with a connection to the kernel's table of links.
func withLinks(f func(*netlink.Handle) error) error {
	n, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	defer n.Close()
	return f(n)
}

func linkUp(name string) func(*netlink.Handle) error {
	return func(n *netlink.Handle) error {
		link, err := n.LinkByName(name)
		if err == nil {
			err = n.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("bringing up %s: %w", name, err)
		}
		return nil
	}
}

// awaitCarrier returns when the link carries packets. The kernel learns of a
// carrier in the background, and until then drops what is sent: a machine whose
// first ARP request falls into that gap waits a second for nothing.
func awaitCarrier(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return withLinks(func(n *netlink.Handle) error {
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

func removeLinks() error {
	return withLinks(func(n *netlink.Handle) error {
		links, err := n.LinkList()
		for _, link := range links {
			if link.Type() == "veth" {
				err = errors.Join(err, n.LinkDel(link))
			}
		}
		return err
	})
}

func addAddress(n *netlink.Handle, link netlink.Link, p netip.Prefix, scope netlink.Scope) error {
	if err := n.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Scope: int(scope)}); err != nil {
		return fmt.Errorf("adding the address %s to %s: %w", p, link.Attrs().Name, err)
	}
	return nil
}

// addRoute adds a route through a gateway on the link, or to the link itself
// when there is no gateway.
func addRoute(n *netlink.Handle, link netlink.Link, to netip.Prefix, gateway netip.Addr) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(to), Scope: netlink.SCOPE_LINK}
	if gateway.IsValid() {
		r.Scope, r.Gw, r.Flags = netlink.SCOPE_UNIVERSE, gateway.AsSlice(), int(netlink.FLAG_ONLINK)
	}
	if err := n.RouteAdd(r); err != nil {
		return fmt.Errorf("adding the route to %s by %s: %w", to, link.Attrs().Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func sysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
		return fmt.Errorf("setting %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

// prepareRouter makes the thread's fresh namespace the router of a VPC. The
// values are written out because a namespace inherits some from the host, where
// others may have changed them.
func prepareRouter() error {
	if err := sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	for _, each := range []struct{ name, value string }{
		{"rp_filter", "1"},    // a source must be reachable by the link it came in on
		{"arp_ignore", "1"},   // answer ARP only for addresses of the link
		{"arp_announce", "2"}, // and only with those
		{"proxy_arp", "1"},    // and for all that is routed to other links
		{"accept_redirects", "0"},
		{"send_redirects", "0"},
		{"accept_source_route", "0"},
		{"route_localnet", "0"},
	} {
		for _, of := range []string{"all", "default"} {
			if err := sysctl("net/ipv4/conf/"+of+"/"+each.name, each.value); err != nil {
				return err
			}
		}
	}
	for _, of := range []string{"all", "default"} {
		err := sysctl("net/ipv6/conf/"+of+"/disable_ipv6", "1")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := withLinks(linkUp("lo")); err != nil {
		return err
	}
	return closeRouter()
}

// listen opens a TCP listener that takes connections from one device only,
// with a hop limit for its answers where that is not 0.
func listen(ctx context.Context, at netip.AddrPort, device string, hopLimit int) (*net.TCPListener, error) {
	network := "tcp4"
	if at.Addr().Is6() {
		network = "tcp6"
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
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
	}}
	lc.SetMultipathTCP(false) // a subflow could come by another device
	l, err := lc.Listen(ctx, network, at.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}
