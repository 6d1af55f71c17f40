package netns

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/serve"
)

// metadataAddress is where every machine finds its metadata service
// (reference/instance-metadata-and-vpc.md section 1.1).
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

const metadataPort = 80

// driver is the netns driver. Locks are taken in the order machine.mu,
// router.mu, driver.mu.
type driver struct {
	state string
	log   *slog.Logger

	mu       sync.Mutex // guards what follows, and router.users
	closed   bool
	machines map[string]*machine
	routers  map[string]*router
}

// machine is one instance. What Start has made is noted here step by step, so
// that a Start which ends half-way removes that and nothing else.
type machine struct {
	host.Machine
	mac    net.HardwareAddr
	space  string // name of its namespace
	link   string // name of its veth's end in the router
	router *router

	mu        sync.Mutex // held while the machine starts or stops
	servers   *serve.Group
	hasSpace  bool
	hasLink   bool
	hasFilter bool
	gone      bool

	up bool // guarded by driver.mu
}

// router is the namespace of one VPC.
type router struct {
	vpc   string
	space string
	users int // machines that hold it

	mu sync.Mutex // held while the namespace is made, removed or entered
	ns netns.NsHandle
}

// New returns the driver, after removing what an earlier one of the same State
// has left behind. It fails where the rights or the kernel do not suffice.
func New(cfg Config) (host.Driver, error) {
	if !regexp.MustCompile(`^[0-9a-f]{8}$`).MatchString(cfg.State) {
		return nil, fmt.Errorf("the netns driver's state %q is not 8 hexadecimal digits", cfg.State)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the netns driver needs root: use the local driver")
	}
	d := &driver{
		state:    cfg.State,
		log:      cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		machines: map[string]*machine{},
		routers:  map[string]*router{},
	}
	if err := shareDirectory(); err != nil {
		return nil, fmt.Errorf("preparing %s: %w", directory, err)
	}
	if err := d.sweep(); err != nil {
		return nil, err
	}
	// The whole of a router and a filter are tried once here, where the caller
	// can still choose another driver.
	if err := d.probe(); err != nil {
		return nil, fmt.Errorf("trying out network namespaces and nftables: %w", err)
	}
	return d, nil
}

func (d *driver) prefix() string { return "tabard-" + d.state + "-" }

// tag shortens an id for names that the kernel bounds.
func tag(id string, digits int) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])[:digits]
}

// sweep removes the namespaces of an earlier driver. Machines start anew; the
// kernel drops their veths, filters and sockets with the namespaces.
func (d *driver) sweep() error {
	left, err := named(d.prefix())
	if err != nil {
		return fmt.Errorf("looking for namespaces left behind: %w", err)
	}
	for _, name := range left {
		d.log.Warn("removing a network namespace that was left behind", "namespace", name)
		// A process that still runs in it would keep the veth alive.
		if ns, err := netns.GetFromName(name); err == nil {
			if err := within(ns, removeLinks); err != nil {
				d.log.Warn("removing the links of a namespace left behind", "namespace", name, "error", err)
			}
			ns.Close()
		}
		if err := remove(name); err != nil {
			return fmt.Errorf("removing the namespace %s that was left behind: %w", name, err)
		}
	}
	return nil
}

func (d *driver) probe() error {
	name := d.prefix() + "p-" + tag("probe", 8)
	ns, err := create(name, func() error {
		if err := prepareRouter(); err != nil {
			return err
		}
		return addFilter("lo", make(net.HardwareAddr, 6), metadataAddress, false)
	})
	if err != nil {
		return err
	}
	ns.Close()
	return remove(name)
}

func (d *driver) Name() string { return "netns" }

func (d *driver) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	mac, err := check(m, h)
	if err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	x := &machine{
		Machine: m,
		mac:     mac,
		space:   d.prefix() + "i-" + tag(m.ID, 8),
		link:    "t" + tag(m.ID, 7),
		servers: &serve.Group{Log: d.log.With("machine", m.ID)},
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := d.admit(x); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	if err := d.build(ctx, x, h); err != nil {
		err = fmt.Errorf("starting machine %s: %w", m.ID, err)
		return errors.Join(err, d.dismantle(context.WithoutCancel(ctx), x))
	}
	d.mu.Lock()
	x.up = true
	d.mu.Unlock()
	return nil
}

// check returns the machine's MAC, or why it can't run.
func check(m host.Machine, h host.Handlers) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(m.MAC)
	switch {
	case m.ID == "", m.VPC == "":
		return nil, errors.New("it has no id or no VPC")
	case err != nil:
		return nil, err
	case len(mac) != 6, mac[0]&1 != 0:
		return nil, fmt.Errorf("%s is not the MAC of one network card", m.MAC)
	case !m.Address.Is4(), !m.Subnet.Contains(m.Address), m.Subnet.Bits() > 30:
		return nil, fmt.Errorf("%s is not an IPv4 address in a subnet %s that has room for a gateway", m.Address, m.Subnet)
	case m.Subnet.Contains(metadataAddress), m.Address.IsLoopback():
		return nil, fmt.Errorf("the subnet %s is in the way of the metadata service or of loopback", m.Subnet)
	case m.Address == gateway(m.Subnet), m.Address == m.Subnet.Masked().Addr():
		return nil, fmt.Errorf("%s is reserved in the subnet %s", m.Address, m.Subnet)
	case m.Metadata && (m.HopLimit < 1 || m.HopLimit > 64):
		return nil, fmt.Errorf("the hop limit %d is not in 1..64", m.HopLimit)
	case m.Metadata && h.Metadata == nil, len(h.ServerAddrs) > 0 && h.Server == nil:
		return nil, errors.New("a listener has no handler")
	}
	return mac, nil
}

// gateway is the first address of a subnet after that of the network.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

// admit enters the machine and takes hold of its VPC's router.
func (d *driver) admit(x *machine) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errors.New("the driver is closed")
	}
	if d.machines[x.ID] != nil {
		return errors.New("it runs already")
	}
	for _, o := range d.machines {
		switch {
		case o.space == x.space:
			return fmt.Errorf("its namespace %s belongs to machine %s", x.space, o.ID)
		case o.VPC != x.VPC:
		case o.Address == x.Address:
			return fmt.Errorf("machine %s of the same VPC has its address %s", o.ID, x.Address)
		case o.link == x.link:
			return fmt.Errorf("its link %s belongs to machine %s", x.link, o.ID)
		}
	}
	r := d.routers[x.VPC]
	if r == nil {
		r = &router{vpc: x.VPC, space: d.prefix() + "r-" + tag(x.VPC, 8), ns: netns.None()}
		d.routers[x.VPC] = r
	}
	r.users++
	x.router = r
	d.machines[x.ID] = x
	return nil
}

// build makes the machine from the router outwards: its own end comes up last,
// when all that guards it and all that serves it is in place.
func (d *driver) build(ctx context.Context, x *machine, h host.Handlers) error {
	if err := x.router.open(); err != nil {
		return err
	}
	ns, err := create(x.space, func() error { return withLinks(linkUp("lo")) })
	if err != nil {
		return fmt.Errorf("making the namespace %s: %w", x.space, err)
	}
	defer ns.Close()
	x.hasSpace = true
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := within(x.router.ns, func() error { return x.attach(ctx, ns, h.Metadata) }); err != nil {
		return fmt.Errorf("attaching it to its VPC: %w", err)
	}
	if err := within(ns, func() error { return x.inside(ctx, h) }); err != nil {
		return fmt.Errorf("preparing its namespace: %w", err)
	}
	return within(x.router.ns, func() error { return awaitCarrier(ctx, x.link) })
}

// attach makes the machine's veth and its metadata listener. It runs in the
// router's namespace.
func (x *machine) attach(ctx context.Context, ns netns.NsHandle, h http.Handler) error {
	err := withLinks(func(n *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = x.link
		veth := &netlink.Veth{
			LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: x.mac, PeerNamespace: netlink.NsFd(ns),
		}
		if err := n.LinkAdd(veth); err != nil {
			return fmt.Errorf("adding the link %s: %w", x.link, err)
		}
		x.hasLink = true
		if err := addFilter(x.link, x.mac, x.Address, x.Metadata); err != nil {
			return fmt.Errorf("adding the filter of %s: %w", x.link, err)
		}
		x.hasFilter = true
		// By default the answer for a neighbour is delayed at random, by up to 0.8 s.
		if err := sysctl("net/ipv4/neigh/"+x.link+"/proxy_delay", "0"); err != nil {
			return err
		}
		for _, a := range []netip.Addr{gateway(x.Subnet), metadataAddress} {
			if err := addAddress(n, veth, netip.PrefixFrom(a, 32), netlink.SCOPE_LINK); err != nil {
				return err
			}
		}
		if err := n.LinkSetUp(veth); err != nil {
			return fmt.Errorf("bringing up %s: %w", x.link, err)
		}
		return addRoute(n, veth, netip.PrefixFrom(x.Address, 32), netip.Addr{})
	})
	if err != nil || !x.Metadata {
		return err
	}
	l, err := listen(ctx, netip.AddrPortFrom(metadataAddress, metadataPort), x.link, x.HopLimit)
	if err != nil {
		return err
	}
	x.servers.Serve(l, x.Address, h, serve.Metadata())
	return nil
}

// inside configures the machine's own end. It runs in the machine's namespace.
func (x *machine) inside(ctx context.Context, h host.Handlers) error {
	return withLinks(func(n *netlink.Handle) error {
		if err := x.listenForServer(ctx, n, h); err != nil {
			return err
		}
		eth, err := n.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("finding eth0: %w", err)
		}
		own := netip.PrefixFrom(x.Address, x.Subnet.Bits())
		if err := addAddress(n, eth, own, netlink.SCOPE_UNIVERSE); err != nil {
			return err
		}
		if err := n.LinkSetUp(eth); err != nil {
			return fmt.Errorf("bringing up eth0: %w", err)
		}
		if err := addRoute(n, eth, netip.PrefixFrom(metadataAddress, 32), netip.Addr{}); err != nil {
			return err
		}
		return addRoute(n, eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway(x.Subnet))
	})
}

// listenForServer makes the server's addresses reachable as they are written
// outside.
func (x *machine) listenForServer(ctx context.Context, n *netlink.Handle, h host.Handlers) error {
	lo, err := n.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding lo: %w", err)
	}
	handler := fromMachine(x.Address, h.Server)
	bounds := serve.Server()
	bounds.TLS = h.ServerTLS
	done := map[netip.AddrPort]bool{}
	for _, outside := range h.ServerAddrs {
		a := outside.Addr().Unmap().WithZone("")
		places := []netip.Addr{a}
		switch {
		case !a.IsValid():
			return fmt.Errorf("the server's address %s is no address", outside)
		case a == metadataAddress:
			return fmt.Errorf("the server's address %s is the metadata service's", outside)
		case a.Is4() && a.IsUnspecified():
			places = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
		case a.IsUnspecified():
			places = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
		}
		for _, a := range places {
			at := netip.AddrPortFrom(a, outside.Port())
			if done[at] {
				continue
			}
			done[at] = true
			if !a.IsLoopback() {
				err := addAddress(n, lo, netip.PrefixFrom(a, a.BitLen()), netlink.SCOPE_HOST)
				if errors.Is(err, unix.EEXIST) {
					err = nil // the same address with another port
				}
				if a.Is6() && noIPv6(err) {
					continue
				}
				if err != nil {
					return err
				}
			}
			// Bound to lo, so that no neighbour can speak in the machine's name.
			l, err := listen(ctx, at, "lo", 0)
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

func (d *driver) Stop(ctx context.Context, id string) error {
	d.mu.Lock()
	x := d.machines[id]
	d.mu.Unlock()
	if x == nil {
		return nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := d.dismantle(ctx, x); err != nil {
		return fmt.Errorf("stopping machine %s: %w", id, err)
	}
	return nil
}

// dismantle removes what the machine has, in the order in which it can still
// be guarded: listeners, link, filter, namespace, router. What could not be
// removed stays noted, and the machine entered, for another attempt.
func (d *driver) dismantle(ctx context.Context, x *machine) error {
	if x.gone {
		return nil
	}
	d.mu.Lock()
	x.up = false
	d.mu.Unlock()
	x.servers.Stop(ctx)
	if x.hasLink || x.hasFilter {
		if err := within(x.router.ns, x.detach); err != nil {
			return err
		}
	}
	if x.hasSpace {
		if err := remove(x.space); err != nil {
			return fmt.Errorf("removing the namespace %s: %w", x.space, err)
		}
		x.hasSpace = false
	}
	return d.release(x)
}

// detach removes the machine's veth and its filter. It runs in the router's
// namespace.
func (x *machine) detach() error {
	err := withLinks(func(n *netlink.Handle) error {
		link, err := n.LinkByName(x.link)
		if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) {
			return nil
		}
		if err != nil {
			return err
		}
		return n.LinkDel(link)
	})
	if err != nil {
		return fmt.Errorf("removing the link %s: %w", x.link, err)
	}
	x.hasLink = false
	if x.hasFilter {
		if err := removeFilter(x.link); err != nil {
			return fmt.Errorf("removing the filter of %s: %w", x.link, err)
		}
		x.hasFilter = false
	}
	return nil
}

// open makes the router's namespace unless it exists.
func (r *router) open() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ns.IsOpen() {
		return nil
	}
	ns, err := create(r.space, prepareRouter)
	if err != nil {
		return fmt.Errorf("making the namespace %s of VPC %s: %w", r.space, r.vpc, err)
	}
	r.ns = ns
	return nil
}

// release lets go of the machine's router, and removes it with its last
// machine.
func (d *driver) release(x *machine) error {
	r := x.router
	r.mu.Lock()
	defer r.mu.Unlock()
	d.mu.Lock()
	last := r.users == 1
	d.mu.Unlock()
	// A machine that comes in now waits for r.mu and makes the namespace anew.
	if last && r.ns.IsOpen() {
		if err := remove(r.space); err != nil {
			return fmt.Errorf("removing the namespace %s of VPC %s: %w", r.space, r.vpc, err)
		}
		r.ns.Close()
		r.ns = netns.None()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	r.users--
	if r.users == 0 {
		delete(d.routers, r.vpc)
	}
	delete(d.machines, x.ID)
	x.gone = true
	return nil
}

func (d *driver) Access(id string) (host.Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[id]
	if x == nil || !x.up {
		return host.Access{}, false
	}
	return host.Access{Driver: d.Name(), Namespace: x.space, Environment: map[string]string{}}, true
}

func (d *driver) Close() error {
	d.mu.Lock()
	d.closed = true
	ids := make([]string, 0, len(d.machines))
	for id := range d.machines {
		ids = append(ids, id)
	}
	d.mu.Unlock()
	errs := make([]error, len(ids))
	var each sync.WaitGroup
	for n, id := range ids {
		each.Go(func() { errs[n] = d.Stop(context.Background(), id) })
	}
	each.Wait()
	return errors.Join(errs...)
}
