package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/namespace"
)

// uplink is the host's side of the routers' links.
type uplink struct {
	Uplink
	host   netns.NsHandle
	table  string   // in the host's namespace
	prefix string   // of the devices there
	closed []uint16 // UDP ports that machines reach nowhere outside

	mu sync.Mutex // held while the host's devices or rules change
}

// lastLink bounds the number of a link, which is four hexadecimal digits of its
// name.
const lastLink = 0xffff

func newUplink(cfg Uplink, state string, host netns.NsHandle) *uplink {
	cfg.Range = cfg.links()
	return &uplink{Uplink: cfg, host: host, table: "tabard_" + state, prefix: "tb" + state}
}

// addresses returns the ends of a link: the host's and the router's.
func (u *uplink) addresses(number uint32) (host, router netip.Addr) {
	a := u.Range.Addr().As4()
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])+2*number)
	host = netip.AddrFrom4(a)
	return host, host.Next()
}

// numberAt returns the number of the link that an address is for.
func (u *uplink) numberAt(ip net.IP) (uint32, bool) {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || !u.Range.Contains(a) {
		return 0, false
	}
	first, at := u.Range.Addr().As4(), a.As4()
	return (binary.BigEndian.Uint32(at[:]) - binary.BigEndian.Uint32(first[:])) / 2, true
}

func (u *uplink) numberOf(device string) (uint32, bool) {
	n, err := strconv.ParseUint(strings.TrimPrefix(device, u.prefix), 16, 16)
	return uint32(n), err == nil && strings.HasPrefix(device, u.prefix)
}

// devices returns the host's ends of all links. It runs in the host's namespace.
func (u *uplink) devices(n *netlink.Handle) ([]netlink.Link, error) {
	links, err := namespace.Whole(n.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the host's links: %w", err)
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool {
		_, ours := u.numberOf(l.Attrs().Name)
		return !ours
	}), nil
}

// join makes the link between the host and a VPC's router, or takes up the one
// that is there, and returns the name of the host's end and the address of the
// router's.
func (u *uplink) join(vpc string, router netns.NsHandle) (string, netip.Addr, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	// Guarded before it is there, and again where others have emptied the host's
	// rules.
	if err := namespace.Within(u.host, u.prepareHost); err != nil {
		return "", netip.Addr{}, fmt.Errorf("preparing the host for the uplink: %w", err)
	}
	var inside netlink.Link
	err := namespace.Within(router, func() error {
		return namespace.Links(func(n *netlink.Handle) (err error) {
			inside, err = namespace.Find(n, uplinkDevice)
			return err
		})
	})
	if err != nil {
		return "", netip.Addr{}, err
	}
	var device string
	err = namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) (err error) {
			device, err = u.hostEnd(n, vpc, router, inside)
			return err
		})
	})
	if err != nil {
		return "", netip.Addr{}, err
	}
	number, _ := u.numberOf(device)
	outer, inner := u.addresses(number)
	err = namespace.Within(router, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := n.LinkByName(uplinkDevice)
			if err != nil {
				return fmt.Errorf("finding %s: %w", uplinkDevice, err)
			}
			if err := namespace.Sysctl("net/ipv4/conf/"+uplinkDevice+"/proxy_arp", "0"); err != nil {
				return err
			}
			// Of global scope, or nothing could be rewritten to it.
			if err := namespace.SetAddress(n, link, netip.PrefixFrom(inner, 31), netlink.SCOPE_UNIVERSE); err != nil {
				return err
			}
			if err := n.LinkSetUp(link); err != nil {
				return fmt.Errorf("bringing up %s: %w", uplinkDevice, err)
			}
			return namespace.SetRoute(n, link, netip.PrefixFrom(netip.IPv4Unspecified(), 0), outer)
		})
	})
	return device, inner, err
}

// hostEnd makes or takes up the host's end of a router's link, and configures
// it. It runs in the host's namespace.
func (u *uplink) hostEnd(n *netlink.Handle, vpc string, router netns.NsHandle, inside netlink.Link) (string, error) {
	all, err := u.devices(n)
	if err != nil {
		return "", err
	}
	used := map[uint32]bool{}
	var link netlink.Link
	for _, l := range all {
		number, _ := u.numberOf(l.Attrs().Name)
		if l.Attrs().Alias != vpc {
			used[number] = true
			continue
		}
		// One whose other end is not in this router is of one that is gone.
		if link == nil && inside != nil && l.Attrs().ParentIndex == inside.Attrs().Index && inside.Attrs().ParentIndex == l.Attrs().Index {
			link = l
			continue
		}
		if err := namespace.Delete(n, l.Attrs().Name); err != nil {
			return "", err
		}
	}
	if link == nil {
		if inside != nil {
			err := namespace.Within(router, func() error {
				return namespace.Links(func(n *netlink.Handle) error { return namespace.Delete(n, uplinkDevice) })
			})
			if err != nil {
				return "", err
			}
		}
		if link, err = u.addLink(n, vpc, router, used); err != nil {
			return "", err
		}
	}
	name := link.Attrs().Name
	number, _ := u.numberOf(name)
	outer, _ := u.addresses(number)
	for _, each := range []struct{ name, value string }{
		{"rp_filter", "1"}, // a machine's packets are of its link's or its floating address
		{"accept_redirects", "0"},
		{"send_redirects", "0"},
		{"proxy_arp", "0"},
	} {
		if err := namespace.Sysctl("net/ipv4/conf/"+name+"/"+each.name, each.value); err != nil {
			return "", err
		}
	}
	if err := namespace.DisableIPv6(name); err != nil {
		return "", err
	}
	// Of the link's scope, so that the host speaks to machines by an address that
	// it has elsewhere too.
	if err := namespace.SetAddress(n, link, netip.PrefixFrom(outer, 31), netlink.SCOPE_LINK); err != nil {
		return "", err
	}
	if err := n.LinkSetUp(link); err != nil {
		return "", fmt.Errorf("bringing up %s: %w", name, err)
	}
	return name, nil
}

func (u *uplink) addLink(n *netlink.Handle, vpc string, router netns.NsHandle, used map[uint32]bool) (netlink.Link, error) {
	// Another installation on this host may use the same range.
	taken, err := namespace.Whole(func() ([]netlink.Addr, error) { return n.AddrList(nil, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("listing the host's addresses: %w", err)
	}
	for _, a := range taken {
		if number, ours := u.numberAt(a.IP); ours {
			used[number] = true
		}
	}
	last := min(uint32(1)<<(31-u.Range.Bits())-1, lastLink)
	for number := uint32(0); number <= last; number++ {
		if used[number] {
			continue
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("%s%04x", u.prefix, number)
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: uplinkDevice, PeerNamespace: netlink.NsFd(router)}
		if err := n.LinkAdd(veth); err != nil {
			return nil, fmt.Errorf("adding the link %s: %w", attrs.Name, err)
		}
		if err := n.LinkSetAlias(veth, vpc); err != nil {
			return nil, errors.Join(fmt.Errorf("naming the owner of %s: %w", attrs.Name, err), namespace.Delete(n, attrs.Name))
		}
		return veth, nil
	}
	return nil, fmt.Errorf("the uplink's range %s is used up", u.Range)
}

// deviceOf returns the host's end of a VPC's link, or "" when there is none.
func (u *uplink) deviceOf(vpc string) (string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	device := ""
	err := namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			all, err := u.devices(n)
			for _, l := range all {
				if l.Attrs().Alias == vpc {
					device = l.Attrs().Name
				}
			}
			return err
		})
	})
	return device, err
}

// leave removes a link, unless its device is "", and with the last one the host's
// table.
func (u *uplink) leave(device string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			if device != "" {
				if err := namespace.Delete(n, device); err != nil {
					return err
				}
			}
			return u.clearHost(n)
		})
	})
}

// sweep removes links to the routers of other VPCs than those in use.
func (u *uplink) sweep(inUse map[string]bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			all, err := u.devices(n)
			if err != nil {
				return err
			}
			for _, l := range all {
				if !inUse[l.Attrs().Alias] {
					err = errors.Join(err, namespace.Delete(n, l.Attrs().Name))
				}
			}
			return errors.Join(err, u.clearHost(n))
		})
	})
}

func (u *uplink) clearHost(n *netlink.Handle) error {
	left, err := u.devices(n)
	if err != nil || len(left) > 0 {
		return err
	}
	err = commit(func(b *batch) { b.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: u.table}) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the host's table %s: %w", u.table, err)
	}
	return nil
}

// prepareHost makes the host forward, and keeps machines from the host itself
// and from each other's links. It runs in the host's namespace. PREFIX stands
// for the devices of this installation.
//
//	table ip tabard_<state> {
//	  chain input {
//	    type filter hook input priority filter; policy accept;
//	    iifname != PREFIX accept
//	    ct state established,related accept
//	    ip daddr ADDRESS tcp dport PORT accept         # each of Reachable
//	    drop
//	  }
//	  chain forward {
//	    type filter hook forward priority filter; policy accept;
//	    iifname PREFIX udp dport PORT drop             # where VPCs span hosts: a machine is none
//	    ct state established,related accept
//	    iifname PREFIX ct state invalid drop           # it would leave unwritten
//	    oifname PREFIX ip daddr RANGE drop             # only floating addresses are for others
//	    iifname PREFIX ip daddr { 169.254.0.0/16, 127.0.0.0/8 } drop
//	  }
//	  chain postrouting {
//	    type nat hook postrouting priority srcnat; policy accept;
//	    oifname PREFIX accept
//	    ip saddr RANGE masquerade
//	  }
//	}
func (u *uplink) prepareHost() error {
	forwarding, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: u.table}
	ours := func(key expr.MetaKey) []expr.Any { return named(key, expr.CmpOpEq, u.prefix) }
	err = commit(func(b *batch) {
		b.replaceTable(t)
		input := b.AddChain(base(t, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept))
		b.rule(input, named(expr.MetaKeyIIFNAME, expr.CmpOpNeq, u.prefix), accept())
		b.rule(input, state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
		for _, s := range u.Reachable {
			a := s.Addr().Unmap()
			var to []expr.Any
			switch {
			case a.IsUnspecified():
			case !a.Is4() || a.IsLoopback():
				continue // no machine could get there
			default:
				to = destination(a)
			}
			b.rule(input, to, protocol(unix.IPPROTO_TCP), port(s.Port()), accept())
		}
		b.rule(input, counter(), drop())

		forward := b.AddChain(base(t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept))
		for _, p := range u.closed {
			b.rule(forward, ours(expr.MetaKeyIIFNAME), protocol(unix.IPPROTO_UDP), port(p), counter(), drop())
		}
		b.rule(forward, state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
		b.rule(forward, ours(expr.MetaKeyIIFNAME), state(expr.CtStateBitINVALID), counter(), drop())
		b.rule(forward, ours(expr.MetaKeyOIFNAME), in(destinationOffset, u.Range), counter(), drop())
		b.rule(forward, ours(expr.MetaKeyIIFNAME), in(destinationOffset, linkLocal), counter(), drop())
		b.rule(forward, ours(expr.MetaKeyIIFNAME), field(expr.PayloadBaseNetworkHeader, destinationOffset, expr.CmpOpEq, []byte{127}), counter(), drop())

		postrouting := b.AddChain(base(t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept))
		b.rule(postrouting, ours(expr.MetaKeyOIFNAME), accept())
		b.rule(postrouting, in(sourceOffset, u.Range), masquerade())
	})
	if err != nil {
		return fmt.Errorf("making the table %s: %w", u.table, err)
	}
	if strings.TrimSpace(string(forwarding)) == "1" {
		return nil
	}
	return namespace.Sysctl("net/ipv4/ip_forward", "1")
}

// route leads a floating address to a router, by its link.
func (u *uplink) route(floating netip.Addr, device string, router netip.Addr) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := n.LinkByName(device)
			if err != nil {
				return fmt.Errorf("finding %s: %w", device, err)
			}
			return namespace.SetRoute(n, link, netip.PrefixFrom(floating, 32), router)
		})
	})
}

// unroute removes the route of a floating address if it leads to this link: it
// may lead to another router by now.
func (u *uplink) unroute(floating netip.Addr, device string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return namespace.Within(u.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := namespace.Find(n, device)
			if err != nil || link == nil {
				return err
			}
			err = n.RouteDel(&netlink.Route{
				LinkIndex: link.Attrs().Index, Dst: namespace.IPNet(netip.PrefixFrom(floating, 32)), Scope: netlink.SCOPE_UNIVERSE,
			})
			if err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("removing the route to %s: %w", floating, err)
			}
			return nil
		})
	})
}
