package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/serve"
	"tabard.dev/tabard/internal/vpc"
)

// Ports of the metadata service, by its protocol
// (reference/instance-metadata-and-vpc.md section 1.1).
const (
	httpPort  = 80
	httpsPort = 443
)

// Port is a machine's connection to its VPC: a link for each of its network
// cards, and the listeners at them.
type Port struct {
	network  *Network
	router   *router
	handlers host.Handlers
	id, vpc  string

	mu       sync.Mutex // held while it changes
	machine  host.Machine
	links    []*link
	metadata *serve.Group // nil while the service is closed
	service  vpc.MetadataService
	gone     bool
}

// link is one network card's end in the router. What was made is noted step by
// step, so that half of it can be removed.
type link struct {
	device  string
	alias   string
	mac     net.HardwareAddr
	address netip.Addr
	subnet  netip.Prefix

	taken    bool          // it was there before
	there    bool          // it is there now
	firewall host.Firewall // as set
	floating netip.Addr    // guarded by Network.floatMu
	router   *router
	resolver *resolver
}

// gateway is the first address of a subnet after that of the network.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

// newPort checks the machine and plans its links.
func (n *Network) newPort(m host.Machine, h host.Handlers) (*Port, error) {
	p := &Port{network: n, handlers: h, id: m.ID, vpc: m.VPC, machine: m}
	if m.ID == "" || m.VPC == "" || strings.ContainsAny(m.ID, "/\x00") || len(m.ID) > 120 || len(m.VPC) > 250 {
		return nil, errors.New("it has no id or no VPC")
	}
	if len(m.Interfaces) == 0 {
		return nil, errors.New("it has no network interface")
	}
	if err := p.checkLive(m); err != nil {
		return nil, err
	}
	for i, nic := range m.Interfaces {
		mac, err := n.checkInterface(nic)
		if err != nil {
			return nil, err
		}
		name := m.ID
		if i > 0 {
			name = fmt.Sprintf("%s/%d", m.ID, i)
		}
		p.links = append(p.links, &link{
			device: "t" + tag(name, 12), alias: m.ID + "/" + nic.ID, mac: mac, address: nic.Address, subnet: nic.Subnet,
		})
	}
	return p, nil
}

func (n *Network) checkInterface(nic host.Interface) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(nic.MAC)
	switch {
	case err != nil:
		return nil, err
	case len(mac) != 6, mac[0]&1 != 0:
		return nil, fmt.Errorf("%s is not the MAC of one network card", nic.MAC)
	case strings.ContainsRune(nic.ID, 0), len(nic.ID) > 120:
		return nil, fmt.Errorf("%q is not the id of an interface", nic.ID)
	case !nic.Address.Is4(), !nic.Subnet.Contains(nic.Address), nic.Subnet.Bits() > 30:
		return nil, fmt.Errorf("%s is not an IPv4 address in a subnet %s that has room for a gateway", nic.Address, nic.Subnet)
	case nic.Subnet.Overlaps(linkLocal), nic.Address.IsLoopback():
		return nil, fmt.Errorf("the subnet %s is in the way of the metadata service or of loopback", nic.Subnet)
	case n.uplink != nil && nic.Subnet.Overlaps(n.uplink.Range):
		return nil, fmt.Errorf("the subnet %s is in the way of the uplink's range %s", nic.Subnet, n.uplink.Range)
	case nic.Address == gateway(nic.Subnet), nic.Address == nic.Subnet.Masked().Addr():
		return nil, fmt.Errorf("%s is reserved in the subnet %s", nic.Address, nic.Subnet)
	}
	return mac, nil
}

// checkLive checks what may change while a machine runs.
func (p *Port) checkLive(m host.Machine) error {
	if m.Network > vpc.MaxVNI {
		return fmt.Errorf("the VPC's number %d is larger than %d", m.Network, vpc.MaxVNI)
	}
	s := m.Metadata
	switch {
	case !s.Enabled:
	case s.ResponseHopLimit < 1 || s.ResponseHopLimit > 64:
		return fmt.Errorf("the hop limit %d is not in 1..64", s.ResponseHopLimit)
	case s.Protocol != "" && s.Protocol != "http" && s.Protocol != "https":
		return fmt.Errorf("the metadata service does not speak %q", s.Protocol)
	case p.handlers.Metadata == nil:
		return errors.New("its metadata service has no handler")
	case s.Protocol == "https" && p.handlers.MetadataTLS == nil:
		return errors.New("its metadata service has no certificate")
	}
	for _, nic := range m.Interfaces {
		if err := checkFirewall(nic.Firewall); err != nil {
			return fmt.Errorf("the security groups of %s: %w", nic.Address, err)
		}
		f := nic.Floating
		if !f.IsValid() {
			continue
		}
		if !f.Is4() || f.IsUnspecified() || f.IsLoopback() || f.IsMulticast() || linkLocal.Contains(f) ||
			p.network.uplink != nil && p.network.uplink.Range.Contains(f) {
			return fmt.Errorf("%s cannot be a floating address", f)
		}
	}
	return nil
}

// admit enters the port and takes hold of its VPC's router.
func (n *Network) admit(p *Port) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return errClosed
	}
	if n.ports[p.id] != nil {
		return errors.New("it has its network already")
	}
	own := map[netip.Addr]bool{}
	for _, l := range p.links {
		if own[l.address] {
			return fmt.Errorf("two of its interfaces have the address %s", l.address)
		}
		own[l.address] = true
	}
	for _, o := range n.ports {
		if o.vpc != p.vpc {
			continue
		}
		for _, l := range p.links {
			for _, other := range o.links {
				switch {
				case l.address == other.address:
					return fmt.Errorf("machine %s of the same VPC has its address %s", o.id, l.address)
				case l.device == other.device:
					return fmt.Errorf("its link %s belongs to machine %s", l.device, o.id)
				}
			}
		}
	}
	r := n.routers[p.vpc]
	if r == nil {
		r = &router{vpc: p.vpc, space: n.prefix() + tag(p.vpc, 8), ns: netns.None()}
		n.routers[p.vpc] = r
	}
	r.users++
	p.router = r
	for _, l := range p.links {
		l.router = r
	}
	n.ports[p.id] = p
	return nil
}

// joint is what a link's other end is.
type joint interface {
	// takes tells whether a device that is there leads to where it should. An
	// error means that it must not be replaced either.
	takes(existing netlink.Link, l *link) (bool, error)
	// add makes the device, down, in the namespace of the thread, and notes in l
	// that it is there.
	add(n *netlink.Handle, index int, l *link) error
	// inside configures the other ends, when all that guards them and all that
	// serves them is in place.
	inside(ctx context.Context, p *Port) error
}

// AttachNamespace joins a namespace to the machine's VPC: its cards are there as
// eth0, eth1, …, with their addresses and routes. Links that an earlier process
// made for this namespace are taken up as they are.
func (n *Network) AttachNamespace(ctx context.Context, m host.Machine, h host.Handlers, ns netns.NsHandle) (*Port, error) {
	return n.attach(ctx, m, h, &veths{ns: ns})
}

// AttachTap makes a tap for each of the machine's cards, and returns their
// files in that order for the caller to close; the machine's process gets them
// as they are. Taps of an earlier process are replaced.
func (n *Network) AttachTap(ctx context.Context, m host.Machine, h host.Handlers) (*Port, []*os.File, error) {
	t := &taps{}
	p, err := n.attach(ctx, m, h, t)
	if err != nil {
		t.close()
		return nil, nil, err
	}
	return p, t.files, nil
}

// TakeUpTap takes up the taps that AttachTap of an earlier process made and
// that the machine's process still holds. It fails, and changes none of them,
// where one is missing.
func (n *Network) TakeUpTap(ctx context.Context, m host.Machine, h host.Handlers) (*Port, error) {
	return n.attach(ctx, m, h, &taps{takeUp: true})
}

func (n *Network) attach(ctx context.Context, m host.Machine, h host.Handlers, j joint) (*Port, error) {
	n.sweeping.RLock()
	defer n.sweeping.RUnlock()
	p, err := n.newPort(m, h)
	if err != nil {
		return nil, fmt.Errorf("joining machine %s to its VPC: %w", m.ID, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := n.admit(p); err != nil {
		return nil, fmt.Errorf("joining machine %s to its VPC: %w", m.ID, err)
	}
	if err := p.build(ctx, j); err != nil {
		err = fmt.Errorf("joining machine %s to its VPC: %w", m.ID, err)
		// What runs behind a link that was there keeps it.
		if slices.ContainsFunc(p.links, func(l *link) bool { return l.taken }) {
			p.letGo(context.WithoutCancel(ctx))
			return nil, err
		}
		return nil, errors.Join(err, p.dismantle(context.WithoutCancel(ctx)))
	}
	return p, nil
}

// build makes the port from the router outwards: the machine's own end comes up
// last, when all that guards it and all that serves it is in place.
func (p *Port) build(ctx context.Context, j joint) error {
	if err := p.network.open(p.router); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Before the machine is there, so that nobody elsewhere has its address.
	if err := p.network.reach(p); err != nil {
		return err
	}
	err := namespace.Within(p.router.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			for _, l := range p.links {
				if err := l.look(n, j); err != nil {
					return err
				}
			}
			for i, l := range p.links {
				if err := p.connect(n, i, l, j); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for i, l := range p.links {
		if err := p.network.float(l, p.machine.Interfaces[i].Floating); err != nil {
			return err
		}
	}
	if err := p.listen(ctx); err != nil {
		return err
	}
	return j.inside(ctx, p)
}

// look finds out whether the link is there already, and removes one that is but
// leads elsewhere. It runs in the router's namespace, as connect does.
func (l *link) look(n *netlink.Handle, j joint) error {
	existing, err := namespace.Find(n, l.device)
	if err != nil {
		return err
	}
	if existing != nil && existing.Attrs().Alias != l.alias && existing.Attrs().Alias != "" {
		return fmt.Errorf("its link %s belongs to %s", l.device, existing.Attrs().Alias)
	}
	if l.taken, err = j.takes(existing, l); err != nil || l.taken || existing == nil {
		return err
	}
	return removeDevice(n, l.device)
}

func (p *Port) connect(n *netlink.Handle, index int, l *link, j joint) error {
	if !l.taken {
		if err := forgetConnections(l.address); err != nil {
			return err
		}
		if err := j.add(n, index, l); err != nil {
			return fmt.Errorf("adding the link %s: %w", l.device, err)
		}
	}
	l.there = true
	if err := setFilter(l.device, l.mac, l.address, p.gate(index, false)); err != nil {
		return fmt.Errorf("setting the filter of %s: %w", l.device, err)
	}
	firewall := p.machine.Interfaces[index].Firewall
	if err := setFirewall(l.device, firewall); err != nil {
		return fmt.Errorf("setting the security groups of %s: %w", l.device, err)
	}
	l.firewall = firewall
	if l.taken {
		if err := forgetRefused(l.address, firewall); err != nil {
			return err
		}
	}
	// By default the answer for a neighbour is delayed at random, by up to 0.8 s.
	if err := namespace.Sysctl("net/ipv4/neigh/"+l.device+"/proxy_delay", "0"); err != nil {
		return err
	}
	link, err := n.LinkByName(l.device)
	if err != nil {
		return fmt.Errorf("finding %s: %w", l.device, err)
	}
	addresses := []netip.Addr{gateway(l.subnet)}
	if index == 0 {
		addresses = append(addresses, metadataAddress)
	}
	for _, a := range addresses {
		if err := namespace.SetAddress(n, link, netip.PrefixFrom(a, 32), netlink.SCOPE_LINK); err != nil {
			return err
		}
	}
	if err := n.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing up %s: %w", l.device, err)
	}
	// What the subnet has no machine for is nowhere, not outside.
	nowhere := &netlink.Route{Dst: namespace.IPNet(l.subnet.Masked()), Type: unix.RTN_UNREACHABLE}
	if err := n.RouteReplace(nowhere); err != nil {
		return fmt.Errorf("adding the route to nowhere for %s: %w", l.subnet, err)
	}
	return namespace.SetRoute(n, link, netip.PrefixFrom(l.address, 32), netip.Addr{})
}

// gate is what a card's filter lets through to the metadata service.
func (p *Port) gate(index int, drain bool) gate {
	if index != 0 || !p.machine.Metadata.Enabled {
		return gate{}
	}
	return gate{port: servicePort(p.machine.Metadata), drain: drain}
}

func servicePort(s vpc.MetadataService) uint16 {
	if s.Protocol == "https" {
		return httpsPort
	}
	return httpPort
}

// listen starts the listeners that are not there.
func (p *Port) listen(ctx context.Context) error {
	return namespace.Within(p.router.ns, func() error {
		log := p.network.log.With("machine", p.id)
		var forward forwarder
		if p.network.uplink != nil {
			forward = p.network.ask
		}
		for _, l := range p.links {
			if l.resolver != nil {
				continue
			}
			r, err := startResolver(ctx, l.device, gateway(l.subnet), l.address, forward, log)
			if err != nil {
				return err
			}
			l.resolver = r
		}
		s := p.machine.Metadata
		if !s.Enabled || p.metadata != nil {
			return nil
		}
		at := netip.AddrPortFrom(metadataAddress, servicePort(s))
		listener, err := namespace.Listen(ctx, at, p.links[0].device, s.ResponseHopLimit)
		if err != nil {
			return fmt.Errorf("listening for the metadata service: %w", err)
		}
		bounds := serve.Metadata()
		if s.Protocol == "https" {
			bounds.TLS = p.handlers.MetadataTLS
		}
		p.metadata, p.service = &serve.Group{Log: log}, s
		p.metadata.Serve(listener, p.links[0].address, p.handlers.Metadata, bounds)
		return nil
	})
}

// Update makes the port follow what of the machine is live: its metadata
// service, floating addresses and security groups. After an error some of it is
// not done; the same call does the rest.
func (p *Port) Update(ctx context.Context, m host.Machine) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.update(ctx, m); err != nil {
		return fmt.Errorf("updating the network of machine %s: %w", p.id, err)
	}
	return nil
}

func (p *Port) update(ctx context.Context, m host.Machine) error {
	if p.gone {
		return errors.New("it has none")
	}
	if m.ID != p.id || m.VPC != p.vpc || len(m.Interfaces) != len(p.links) {
		return errors.New("another machine, VPC or number of interfaces needs a new start")
	}
	for i, nic := range m.Interfaces {
		l := p.links[i]
		if mac, err := net.ParseMAC(nic.MAC); err != nil || mac.String() != l.mac.String() || nic.Address != l.address || nic.Subnet != l.subnet {
			return fmt.Errorf("another MAC, address or subnet of interface %s needs a new start", nic.ID)
		}
	}
	if err := p.checkLive(m); err != nil {
		return err
	}
	p.machine = m
	if err := p.network.reach(p); err != nil {
		return err
	}
	for i, l := range p.links {
		if err := p.updateFirewall(l, m.Interfaces[i].Firewall); err != nil {
			return err
		}
		if err := p.network.float(l, m.Interfaces[i].Floating); err != nil {
			return err
		}
	}
	return p.updateMetadata(ctx)
}

func (p *Port) updateFirewall(l *link, want host.Firewall) error {
	if slices.Equal(l.firewall.Inbound, want.Inbound) && slices.Equal(l.firewall.Outbound, want.Outbound) {
		return nil
	}
	err := namespace.Within(p.router.ns, func() error {
		return errors.Join(setFirewall(l.device, want), forgetRefused(l.address, want))
	})
	if err != nil {
		return fmt.Errorf("setting the security groups of %s: %w", l.device, err)
	}
	l.firewall = host.Firewall{Inbound: slices.Clone(want.Inbound), Outbound: slices.Clone(want.Outbound)}
	return nil
}

// updateMetadata lets requests under way end while new ones find nobody, and
// opens what is to be open only when somebody listens: at no time does a machine
// get a reset.
func (p *Port) updateMetadata(ctx context.Context) error {
	want := p.machine.Metadata
	if p.metadata != nil && p.service == want {
		return nil
	}
	filter := func(g gate) error {
		l := p.links[0]
		err := namespace.Within(p.router.ns, func() error { return setFilter(l.device, l.mac, l.address, g) })
		if err != nil {
			return fmt.Errorf("setting the filter of %s: %w", l.device, err)
		}
		return nil
	}
	if p.metadata != nil {
		if err := filter(gate{port: servicePort(p.service), drain: true}); err != nil {
			return err
		}
		p.metadata.Stop(ctx)
		p.metadata = nil
	}
	if err := filter(gate{}); err != nil {
		return err
	}
	if !want.Enabled {
		return nil
	}
	if err := p.listen(ctx); err != nil {
		return err
	}
	return filter(p.gate(0, false))
}

// Detach ends the port's listeners and removes it, and with the last port of a
// VPC its router. After an error some of it is there; the same call does the
// rest.
func (p *Port) Detach(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.dismantle(ctx); err != nil {
		return fmt.Errorf("removing the network of machine %s: %w", p.id, err)
	}
	return nil
}

// dismantle removes the port in the order in which it can still be guarded.
func (p *Port) dismantle(ctx context.Context) error {
	if p.gone {
		return nil
	}
	p.deafen(ctx)
	if p.router.ns.IsOpen() {
		for _, l := range p.links {
			if err := p.network.float(l, netip.Addr{}); err != nil {
				return err
			}
			if !l.there {
				continue
			}
			if err := p.network.removePort(p.router.ns, l.device, []netip.Addr{l.address}, ""); err != nil {
				return err
			}
			l.there = false
		}
	}
	if err := p.network.unsay(p); err != nil {
		return err
	}
	if err := p.network.release(p.router); err != nil {
		return err
	}
	p.leave()
	return nil
}

// Release ends the port's listeners and leaves the rest to a later process.
func (p *Port) Release(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.letGo(ctx)
}

func (p *Port) letGo(ctx context.Context) {
	if p.gone {
		return
	}
	p.deafen(ctx)
	n := p.network
	n.floatMu.Lock()
	for _, l := range p.links {
		if n.floats[l.floating] == l {
			delete(n.floats, l.floating)
		}
	}
	n.floatMu.Unlock()
	n.hush(p)
	r := p.router
	r.mu.Lock()
	n.mu.Lock()
	last := r.users == 1
	n.mu.Unlock()
	if last && r.ns.IsOpen() {
		r.ns.Close()
		r.ns = netns.None()
	}
	n.forget(r)
	r.mu.Unlock()
	p.leave()
}

func (p *Port) leave() {
	p.network.mu.Lock()
	defer p.network.mu.Unlock()
	delete(p.network.ports, p.id)
	p.gone = true
}

// deafen ends all listeners.
func (p *Port) deafen(ctx context.Context) {
	if p.metadata != nil {
		p.metadata.Stop(ctx)
		p.metadata = nil
	}
	for _, l := range p.links {
		if l.resolver != nil {
			l.resolver.stop()
			l.resolver = nil
		}
	}
}

// removePort removes a device and all that a router has for it. Where its
// addresses are not known they are those that are routed to it; device is the
// host's end of the router's uplink, if floating addresses may be left.
func (n *Network) removePort(ns netns.NsHandle, port string, addresses []netip.Addr, device string) error {
	var gone []netip.Addr
	err := namespace.Within(ns, func() error {
		return namespace.Links(func(h *netlink.Handle) error {
			if addresses == nil {
				var err error
				if addresses, err = routedTo(h, port); err != nil {
					return err
				}
				for _, a := range addresses {
					changed, err := setFloating(a, netip.Addr{})
					if err != nil {
						return err
					}
					gone = append(gone, changed...)
				}
			}
			if err := removeDevice(h, port); err != nil {
				return err
			}
			return forgetConnections(addresses...)
		})
	})
	if err != nil || n.uplink == nil || device == "" {
		return err
	}
	for _, a := range gone {
		if err := n.uplink.unroute(a, device); err != nil {
			return err
		}
	}
	return nil
}

// removeDevice removes a port's device and its rules. It runs in the router's
// namespace.
func removeDevice(n *netlink.Handle, device string) error {
	if err := namespace.Delete(n, device); err != nil {
		return err
	}
	if err := removeFirewall(device); err != nil {
		return fmt.Errorf("removing the security groups of %s: %w", device, err)
	}
	if err := removeFilter(device); err != nil {
		return fmt.Errorf("removing the filter of %s: %w", device, err)
	}
	return nil
}

// routedTo returns the addresses of the machine at a port.
func routedTo(n *netlink.Handle, device string) ([]netip.Addr, error) {
	link, err := namespace.Find(n, device)
	if err != nil || link == nil {
		return nil, err
	}
	routes, err := namespace.Whole(func() ([]netlink.Route, error) { return n.RouteList(link, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("listing the routes to %s: %w", device, err)
	}
	var out []netip.Addr
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if a, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok {
			out = append(out, a)
		}
	}
	return out, nil
}

// float makes want, which is invalid for none, the link's floating address. One
// that another link has is taken from it.
func (n *Network) float(l *link, want netip.Addr) error {
	if n.uplink == nil {
		return nil
	}
	n.floatMu.Lock()
	defer n.floatMu.Unlock()
	if other := n.floats[want]; want.IsValid() && other != nil && other != l {
		if err := n.setFloating(other, netip.Addr{}); err != nil {
			return err
		}
	}
	return n.setFloating(l, want)
}

func (n *Network) setFloating(l *link, want netip.Addr) error {
	var changed []netip.Addr
	err := namespace.Within(l.router.ns, func() (err error) {
		if changed, err = setFloating(l.address, want); err != nil {
			return err
		}
		return forgetConnections(changed...)
	})
	if err != nil {
		return err
	}
	if l.floating != want && n.floats[l.floating] == l {
		delete(n.floats, l.floating)
	}
	l.floating = want
	for _, a := range changed {
		if a == want {
			continue
		}
		if err := n.uplink.unroute(a, l.router.device); err != nil {
			return err
		}
	}
	if !want.IsValid() {
		return nil
	}
	n.floats[want] = l
	return n.uplink.route(want, l.router.device, l.router.inner)
}
