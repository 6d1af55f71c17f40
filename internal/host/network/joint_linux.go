package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/namespace"
)

// veths join a namespace.
type veths struct{ ns netns.NsHandle }

func (v *veths) takes(existing netlink.Link, l *link) (bool, error) {
	if existing == nil || existing.Type() != "veth" || existing.Attrs().Alias != l.alias {
		return false, nil
	}
	found := false
	err := namespace.Within(v.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			peer, err := v.peer(n, existing)
			found = peer != nil
			return err
		})
	})
	return found, err
}

// peer returns the other end of a veth, or nil when it is not in this
// namespace. It runs in the namespace.
func (v *veths) peer(n *netlink.Handle, outside netlink.Link) (netlink.Link, error) {
	link, err := n.LinkByIndex(outside.Attrs().ParentIndex)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the other end of %s: %w", outside.Attrs().Name, err)
	}
	if link.Type() != "veth" || link.Attrs().ParentIndex != outside.Attrs().Index {
		return nil, nil
	}
	return link, nil
}

func (v *veths) add(n *netlink.Handle, index int, l *link) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.device
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: fmt.Sprintf("eth%d", index), PeerHardwareAddr: l.mac, PeerNamespace: netlink.NsFd(v.ns),
	}
	if err := n.LinkAdd(veth); err != nil {
		return err
	}
	l.there = true
	return n.LinkSetAlias(veth, l.alias)
}

func (v *veths) inside(ctx context.Context, p *Port) error {
	outside := make([]netlink.Link, len(p.links))
	err := namespace.Within(p.router.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) (err error) {
			for i, l := range p.links {
				if outside[i], err = n.LinkByName(l.device); err != nil {
					return fmt.Errorf("finding %s: %w", l.device, err)
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	err = namespace.Within(v.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			for i, l := range p.links {
				if err := v.configure(n, i, l, outside[i]); err != nil {
					return fmt.Errorf("configuring interface %d inside: %w", i, err)
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	return namespace.Within(p.router.ns, func() error {
		for _, l := range p.links {
			if err := namespace.AwaitCarrier(ctx, l.device); err != nil {
				return err
			}
		}
		return nil
	})
}

func (v *veths) configure(n *netlink.Handle, index int, l *link, outside netlink.Link) error {
	eth, err := v.peer(n, outside)
	if err != nil {
		return err
	}
	if eth == nil {
		return fmt.Errorf("the other end of %s is not there", l.device)
	}
	if err := namespace.SetAddress(n, eth, netip.PrefixFrom(l.address, l.subnet.Bits()), netlink.SCOPE_UNIVERSE); err != nil {
		return err
	}
	if err := n.LinkSetUp(eth); err != nil {
		return fmt.Errorf("bringing up %s: %w", eth.Attrs().Name, err)
	}
	if index > 0 {
		return nil
	}
	if err := namespace.SetRoute(n, eth, netip.PrefixFrom(metadataAddress, 32), netip.Addr{}); err != nil {
		return err
	}
	return namespace.SetRoute(n, eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway(l.subnet))
}

// taps are for a process that emulates a network card.
type taps struct {
	takeUp bool
	files  []*os.File
}

func (t *taps) takes(existing netlink.Link, l *link) (bool, error) {
	if !t.takeUp {
		return false, nil
	}
	if existing == nil || existing.Type() != "tuntap" || existing.Attrs().Alias != l.alias {
		return false, fmt.Errorf("there is no tap %s to take up", l.device)
	}
	return true, nil
}

func (t *taps) add(n *netlink.Handle, _ int, l *link) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	f := os.NewFile(uintptr(fd), "/dev/net/tun")
	t.files = append(t.files, f)
	req, err := unix.NewIfreq(l.device)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}
	l.there = true
	link, err := n.LinkByName(l.device)
	if err != nil {
		return err
	}
	return n.LinkSetAlias(link, l.alias)
}

func (t *taps) inside(context.Context, *Port) error { return nil }

func (t *taps) close() {
	for _, f := range t.files {
		f.Close()
	}
	t.files = nil
}
