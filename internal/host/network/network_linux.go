package network

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"tabard.dev/tabard/internal/host/namespace"
)

// Network is the routers and ports of one installation on this host.
//
// Locks are taken in the order sweeping, Port.mu, floatMu, far.mu, router.mu,
// mu; uplink.mu and overlay.mu are taken last and alone.
type Network struct {
	state  string
	log    *slog.Logger
	host   netns.NsHandle
	uplink *uplink // nil without one

	overlay *overlay

	// sweeping is held for writing while what nobody has taken up is removed,
	// and for reading while a port is made or taken up.
	sweeping sync.RWMutex

	floatMu sync.Mutex // held while floating addresses change hands
	floats  map[netip.Addr]*link

	mu      sync.Mutex // guards what follows, and router.users
	closed  bool
	ports   map[string]*Port // by machine
	routers map[string]*router
}

// router is the namespace of one VPC.
type router struct {
	vpc   string
	space string
	users int // ports that hold it
	far   far

	mu     sync.Mutex // held while the namespace is made or removed
	ns     netns.NsHandle
	device string     // the host's end of its uplink
	inner  netip.Addr // its own end's address
}

// New returns the network, or tells why the rights or the kernel do not suffice.
// What an earlier process of the same State left stays as it is.
func New(cfg Config) (*Network, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("networks of machines need root")
	}
	n := &Network{
		state:   cfg.State,
		log:     cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		floats:  map[netip.Addr]*link{},
		ports:   map[string]*Port{},
		routers: map[string]*router{},
	}
	if err := namespace.Share(); err != nil {
		return nil, fmt.Errorf("preparing %s: %w", namespace.Directory, err)
	}
	// The whole of a router and a filter are tried once here, where the caller
	// can still choose another driver.
	if err := n.probe(func() error { return setFilter("lo", make(net.HardwareAddr, 6), metadataAddress, gate{}) }); err != nil {
		return nil, fmt.Errorf("trying out network namespaces and nftables: %w", err)
	}
	if cfg.Overlay != nil {
		if err := n.probe(func() error { return probeOverlay(cfg.Overlay.port()) }); err != nil {
			return nil, fmt.Errorf("%w: trying out VXLAN: %w", ErrOverlay, err)
		}
	}
	var err error
	if cfg.Host != "" {
		n.host, err = namespace.Open(cfg.Host)
	} else {
		n.host, err = namespace.Own()
	}
	if err != nil {
		return nil, fmt.Errorf("finding the host's namespace: %w", err)
	}
	if n.overlay, err = newOverlay(cfg.Overlay, cfg.State, n.host); err != nil {
		n.host.Close()
		return nil, fmt.Errorf("%w: %w", ErrOverlay, err)
	}
	if cfg.Uplink != nil {
		n.uplink = newUplink(*cfg.Uplink, cfg.State, n.host)
		if cfg.Overlay != nil {
			n.uplink.closed = append(n.uplink.closed, n.overlay.Port)
		}
	}
	return n, nil
}

// State returns what the network was configured with.
func (n *Network) State() string { return n.state }

func (n *Network) prefix() string { return "tabard-" + n.state + "-r-" }

// tag shortens an id for names that the kernel bounds.
func tag(id string, digits int) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])[:digits]
}

// probe tries out f in a router.
func (n *Network) probe(f func() error) error {
	name := "tabard-" + n.state + "-p-" + tag("probe", 8)
	if err := namespace.Remove(name); err != nil {
		return err
	}
	ns, err := namespace.Create(name, func() error {
		if err := prepareRouter(defaultRange); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		return err
	}
	ns.Close()
	return namespace.Remove(name)
}

// links returns the range of the uplink, which is invalid without one.
func (n *Network) links() netip.Prefix {
	if n.uplink == nil {
		return netip.Prefix{}
	}
	return n.uplink.Range
}

// onHost runs f in the host's namespace.
func (n *Network) onHost(f func() error) error { return namespace.Within(n.host, f) }

// prepareRouter makes the thread's namespace the router of a VPC, or sees to it
// that one is as it should be. The values are written out because a namespace
// inherits some from the host, where others may have changed them.
func prepareRouter(links netip.Prefix) error {
	if err := setRouterRules(links); err != nil {
		return fmt.Errorf("making the router's rules: %w", err)
	}
	for _, each := range []struct{ name, value, of string }{
		{"rp_filter", "1", "all default"},    // a source must be reachable by the link it came in on
		{"arp_ignore", "1", "all default"},   // answer ARP only for addresses of the link
		{"arp_announce", "2", "all default"}, // and only with those
		{"proxy_arp", "1", "default"},        // and for all that is routed to other links
		{"proxy_arp", "0", "all"},            // but not to the host
		{"accept_redirects", "0", "all default"},
		{"send_redirects", "0", "all default"},
		{"accept_source_route", "0", "all default"},
		{"route_localnet", "0", "all default"},
	} {
		for of := range strings.FieldsSeq(each.of) {
			if err := namespace.Sysctl("net/ipv4/conf/"+of+"/"+each.name, each.value); err != nil {
				return err
			}
		}
	}
	for _, of := range []string{"all", "default"} {
		if err := namespace.DisableIPv6(of); err != nil {
			return err
		}
	}
	if err := namespace.Up("lo"); err != nil {
		return err
	}
	// A connection that was forgotten must not be taken for a new one, opened by
	// whichever end speaks next.
	if err := namespace.Sysctl("net/netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
		return err
	}
	return namespace.Sysctl("net/ipv4/ip_forward", "1")
}

// open makes the router of a VPC, or takes up the one that an earlier process
// left, unless this process has it open.
func (n *Network) open(r *router) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ns.IsOpen() {
		return nil
	}
	ns, made, err := n.openNamespace(r)
	if err != nil {
		return fmt.Errorf("making the namespace %s of VPC %s: %w", r.space, r.vpc, err)
	}
	if n.uplink != nil {
		if r.device, r.inner, err = n.uplink.join(r.vpc, ns); err != nil {
			ns.Close()
			err = fmt.Errorf("joining VPC %s to the host: %w", r.vpc, err)
			if made {
				device, failed := n.uplink.deviceOf(r.vpc)
				err = errors.Join(err, failed, n.removeRouter(r.space, device))
			}
			return err
		}
	}
	r.ns = ns
	return nil
}

// cutUplink removes a link to the host that an earlier process, which had an
// uplink, left in the thread's namespace.
func cutUplink() error {
	return namespace.Links(func(n *netlink.Handle) error { return namespace.Delete(n, uplinkDevice) })
}

// openNamespace also tells whether it made the namespace.
func (n *Network) openNamespace(r *router) (netns.NsHandle, bool, error) {
	ns, err := namespace.Open(r.space)
	if err == nil {
		err := namespace.Within(ns, func() error {
			switch vpc, err := routerOf(); {
			case err != nil:
				return err
			case vpc != r.vpc:
				return fmt.Errorf("it belongs to VPC %q", vpc)
			}
			if n.uplink == nil {
				if err := cutUplink(); err != nil {
					return err
				}
			}
			return prepareRouter(n.links())
		})
		if err == nil {
			return ns, false, nil
		}
		ns.Close()
		if !errors.Is(err, errHalfMade) {
			return netns.None(), false, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return netns.None(), false, err
	}
	if err := namespace.Remove(r.space); err != nil {
		return netns.None(), false, err
	}
	ns, err = namespace.Create(r.space, func() error {
		if err := prepareRouter(n.links()); err != nil {
			return err
		}
		return setAlias("lo", r.vpc)
	})
	return ns, true, err
}

var errHalfMade = errors.New("it is half made")

// routerOf returns the VPC whose router the thread's namespace is.
func routerOf() (string, error) {
	var vpc string
	err := namespace.Links(func(n *netlink.Handle) error {
		lo, err := n.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		if vpc = lo.Attrs().Alias; vpc == "" {
			return errHalfMade
		}
		return nil
	})
	return vpc, err
}

func setAlias(device, alias string) error {
	return namespace.Links(func(n *netlink.Handle) error {
		link, err := n.LinkByName(device)
		if err == nil {
			err = n.LinkSetAlias(link, alias)
		}
		if err != nil {
			return fmt.Errorf("naming the owner of %s: %w", device, err)
		}
		return nil
	})
}

// release lets go of a router, and removes it with its last port. One that has
// ports which nobody has taken up stays.
func (n *Network) release(r *router) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	n.mu.Lock()
	last := r.users == 1
	n.mu.Unlock()
	// A port that comes in now waits for r.mu and makes the namespace anew.
	if last && r.ns.IsOpen() {
		var left []Left
		err := namespace.Within(r.ns, func() (err error) {
			left, err = portsOf(r.vpc)
			return err
		})
		if err == nil && len(left) == 0 {
			if err = n.cut(r.ns); err == nil {
				err = n.removeRouter(r.space, r.device)
			}
		}
		if err != nil {
			return fmt.Errorf("removing the namespace %s of VPC %s: %w", r.space, r.vpc, err)
		}
		r.ns.Close()
		r.ns = netns.None()
	}
	n.forget(r)
	return nil
}

// forget takes a hold of a router back.
func (n *Network) forget(r *router) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r.users--
	if r.users == 0 {
		delete(n.routers, r.vpc)
	}
}

// removeRouter removes a router whose ports are gone.
func (n *Network) removeRouter(space, device string) error {
	if n.uplink != nil {
		if err := n.uplink.leave(device); err != nil {
			return err
		}
	}
	return namespace.Remove(space)
}

// portsOf returns the ports in the thread's namespace, half-made ones among
// them: those have no machine.
func portsOf(vpc string) ([]Left, error) {
	var ports []Left
	err := namespace.Links(func(n *netlink.Handle) error {
		links, err := namespace.Whole(n.LinkList)
		if err != nil {
			return fmt.Errorf("listing links: %w", err)
		}
		for _, l := range links {
			a := l.Attrs()
			if a.Name == "lo" || a.Name == uplinkDevice || a.Name == overlayDevice {
				continue
			}
			machine, nic, _ := strings.Cut(a.Alias, "/")
			ports = append(ports, Left{Machine: machine, Interface: nic, VPC: vpc, Device: a.Name, Tap: l.Type() == "tuntap"})
		}
		return nil
	})
	return ports, err
}

// Found returns the ports that an earlier process made and that this one has not
// taken up. Half-made ones are left out: they go when their machine starts, or
// with Sweep.
func (n *Network) Found() ([]Left, error) {
	n.sweeping.RLock()
	defer n.sweeping.RUnlock()
	spaces, err := namespace.Named(n.prefix())
	if err != nil {
		return nil, fmt.Errorf("looking for routers left behind: %w", err)
	}
	var all []Left
	for _, space := range spaces {
		ports, err := n.leftIn(space)
		if err != nil {
			return nil, fmt.Errorf("looking for ports left behind in %s: %w", space, err)
		}
		all = append(all, slices.DeleteFunc(ports, func(l Left) bool { return l.Machine == "" })...)
	}
	return all, nil
}

// leftIn returns the ports in a router that no port of this process is, also
// those of which only rules are left.
func (n *Network) leftIn(space string) ([]Left, error) {
	ns, err := namespace.Open(space)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	var ports []Left
	err = namespace.Within(ns, func() error {
		vpc, err := routerOf()
		if err != nil && !errors.Is(err, errHalfMade) {
			return err
		}
		if ports, err = portsOf(vpc); err != nil {
			return err
		}
		bare, err := orphans(vpc)
		ports = append(ports, bare...)
		return err
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.DeleteFunc(ports, func(l Left) bool {
		p := n.ports[l.Machine]
		return p != nil && p.router.space == space || n.ours(space, l.Device)
	}), err
}

// Discard removes the ports of a machine that an earlier process left, with
// half-made and half-removed ones, whoever's they were, and routers that stand
// empty then. Where the machine has a port of this process that one stays.
func (n *Network) Discard(ctx context.Context, machine string) error {
	if machine == "" {
		return nil
	}
	return n.clear(ctx, func(l Left) bool { return l.Machine == machine || l.Machine == "" })
}

// Sweep removes all ports, routers and links to the host that an earlier process
// left and that nobody has taken up.
func (n *Network) Sweep(ctx context.Context) error {
	if err := n.clear(ctx, func(Left) bool { return true }); err != nil {
		return err
	}
	n.sweeping.Lock()
	defer n.sweeping.Unlock()
	if err := n.overlay.sweep(); err != nil {
		return err
	}
	inUse := map[string]bool{}
	u := n.uplink
	if u == nil {
		u = newUplink(Uplink{}, n.state, n.host) // that earlier process may have had one
	} else {
		n.mu.Lock()
		for vpc := range n.routers {
			inUse[vpc] = true
		}
		n.mu.Unlock()
	}
	if err := u.sweep(inUse); err != nil {
		return fmt.Errorf("removing links to the host that were left behind: %w", err)
	}
	return nil
}

func (n *Network) clear(ctx context.Context, which func(Left) bool) error {
	n.sweeping.Lock()
	defer n.sweeping.Unlock()
	spaces, err := namespace.Named(n.prefix())
	if err != nil {
		return fmt.Errorf("looking for routers left behind: %w", err)
	}
	for _, space := range spaces {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := n.clearRouter(space, which); err != nil {
			return fmt.Errorf("clearing the router %s that was left behind: %w", space, err)
		}
	}
	return nil
}

func (n *Network) clearRouter(space string, which func(Left) bool) error {
	left, err := n.leftIn(space)
	if err != nil {
		return err
	}
	goes := slices.DeleteFunc(slices.Clone(left), func(l Left) bool { return !which(l) })
	n.mu.Lock()
	inUse := false
	for _, r := range n.routers {
		inUse = inUse || r.space == space
	}
	n.mu.Unlock()
	if len(goes) == 0 && (inUse || len(left) > 0) {
		return nil
	}
	ns, err := namespace.Open(space)
	if errors.Is(err, fs.ErrNotExist) {
		return namespace.Remove(space)
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	vpc, device := "", ""
	err = namespace.Within(ns, func() error {
		vpc, err = routerOf()
		if errors.Is(err, errHalfMade) {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	if n.uplink != nil && vpc != "" {
		if device, err = n.uplink.deviceOf(vpc); err != nil {
			return err
		}
	}
	for _, l := range goes {
		n.log.Warn("removing a port that was left behind", "router", space, "device", l.Device, "machine", l.Machine)
		if err := n.removePort(ns, l.Device, nil, device); err != nil {
			return err
		}
	}
	if inUse || len(goes) < len(left) {
		return n.sinkFloating(ns, space, device)
	}
	n.log.Warn("removing a router that was left behind", "namespace", space, "vpc", vpc)
	if err := n.cut(ns); err != nil {
		return err
	}
	return n.removeRouter(space, device)
}

// Close ends all listeners. Ports that were not detached stay in the kernel.
func (n *Network) Close() error {
	n.mu.Lock()
	n.closed = true
	ports := make([]*Port, 0, len(n.ports))
	for _, p := range n.ports {
		ports = append(ports, p)
	}
	n.mu.Unlock()
	var each sync.WaitGroup
	for _, p := range ports {
		each.Go(func() { p.Release(context.Background()) })
	}
	each.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.host.IsOpen() {
		return n.host.Close()
	}
	return nil
}
