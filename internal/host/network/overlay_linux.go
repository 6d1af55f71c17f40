package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// overlayDevice is the router's link to the routers of its VPC on other hosts.
const overlayDevice = "vx0"

// Sizes of packets, in bytes (RFC 7348 section 5): what VXLAN adds to a packet
// over IPv4, and the most that a port carries.
const (
	overlayHeaders = 14 + 8 + 8 + 20
	portMTU        = 1500
)

// overlay is the host's side of the VPCs that span hosts.
type overlay struct {
	Overlay // the zero value spans none
	host    netns.NsHandle
	table   string // in the host's namespace

	mu       sync.Mutex // held while the host's rules change
	admitted map[uint32][]vpc.Peer
}

func newOverlay(cfg *Overlay, state string, host netns.NsHandle) (*overlay, error) {
	o := &overlay{host: host, table: "tabard_" + state + "_overlay", admitted: map[uint32][]vpc.Peer{}}
	if cfg == nil {
		o.Port = defaultPort
		return o, nil
	}
	o.Overlay = *cfg
	o.Port = cfg.port()
	_, err := o.mtu()
	return o, err
}

// probeOverlay tries out what an overlay needs, in a namespace of its own.
func probeOverlay(port uint16) error {
	address := netip.AddrFrom4([4]byte{192, 0, 2, 1})
	peers := []vpc.Peer{{Address: address.Next(), Host: address.Next()}}
	o := &overlay{Overlay: Overlay{Address: address, Port: port}, table: "tabard_overlay"}
	if err := o.setGuard(map[uint32][]vpc.Peer{1: peers}, nil); err != nil {
		return err
	}
	return namespace.Links(func(n *netlink.Handle) error {
		if err := n.LinkAdd(o.device(1, portMTU-overlayHeaders)); err != nil {
			return fmt.Errorf("adding a VXLAN device: %w", err)
		}
		link, err := n.LinkByName(overlayDevice)
		if err != nil {
			return err
		}
		return setReach(n, link, &o.Overlay, peers, true)
	})
}

// macOf is the address of the router's end of an overlay, from that of its host,
// so that each host knows those of all others.
func macOf(host netip.Addr) net.HardwareAddr {
	a := host.As4()
	return net.HardwareAddr{0x02, 0x54, a[0], a[1], a[2], a[3]}
}

func (o *overlay) device(network uint32, mtu int) *netlink.Vxlan {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = overlayDevice, mtu, macOf(o.Address)
	return &netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: int(network), SrcAddr: o.Address.AsSlice(), Port: int(o.Port), UDPCSum: true, NoAge: true,
	}
}

// is tells whether a device is one that device makes.
func (o *overlay) is(link netlink.Link, network uint32) bool {
	v, ok := link.(*netlink.Vxlan)
	if !ok {
		return false
	}
	return v.VxlanId == int(network) && v.SrcAddr.Equal(o.Address.AsSlice()) && v.Port == int(o.Port) && !v.Learning && v.Group == nil &&
		!v.FlowBased && bytes.Equal(v.HardwareAddr, macOf(o.Address))
}

// mtu returns the size of the packets that fit the network that joins the hosts.
func (o *overlay) mtu() (int, error) {
	mtu := 0
	err := namespace.Within(o.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			all, err := namespace.Whole(func() ([]netlink.Addr, error) { return n.AddrList(nil, unix.AF_INET) })
			if err != nil {
				return fmt.Errorf("listing the host's addresses: %w", err)
			}
			for _, a := range all {
				if !a.IP.Equal(o.Address.AsSlice()) {
					continue
				}
				link, err := n.LinkByIndex(a.LinkIndex)
				if err != nil {
					return fmt.Errorf("finding the device of %s: %w", o.Address, err)
				}
				mtu = min(portMTU, link.Attrs().MTU-overlayHeaders)
				return nil
			}
			return fmt.Errorf("%s is not an address of this host", o.Address)
		})
	})
	return mtu, err
}

// far is what a router knows of the machines of its VPC on other hosts.
type far struct {
	mu    sync.Mutex // held while that is made so
	said  map[*Port]saying
	turns int   // of saying anew
	is    *span // as it was made; nil when that is not known
	ready bool  // this process has made the device's filter
}

// saying is what the machine at a port was told. All machines of a VPC are told
// the same, but not at the same time.
type saying struct {
	span
	turn int
}

// span is what a router is to reach.
type span struct {
	network uint32
	peers   []vpc.Peer // in order of address, each address once
}

func (s *span) equal(o *span) bool { return s.network == o.network && slices.Equal(s.peers, o.peers) }

// now returns what was said last. A machine that joins others has nothing new to
// say: what it was told may have waited for its image.
func (f *far) now() span {
	var last *saying
	local := map[netip.Addr]bool{}
	for p, s := range f.said {
		if last == nil || s.turn > last.turn {
			last = &s
		}
		for _, l := range p.links {
			local[l.address] = true
		}
	}
	if last == nil {
		return span{}
	}
	s := span{network: last.network}
	for _, p := range last.peers {
		if !local[p.Address] {
			s.peers = append(s.peers, p)
		}
	}
	return s
}

// reach has the port's router reach what the port's machine is told of.
func (n *Network) reach(p *Port) error {
	f := &p.router.far
	f.mu.Lock()
	defer f.mu.Unlock()
	want := saying{span: span{network: p.machine.Network, peers: n.reachable(p.machine.Peers)}}
	if before, ok := f.said[p]; ok && before.equal(&want.span) {
		want.turn = before.turn
	} else if ok || len(f.said) == 0 {
		f.turns++
		want.turn = f.turns
	}
	if f.said == nil {
		f.said = map[*Port]saying{}
	}
	f.said[p] = want
	return n.settle(p.router)
}

// unsay forgets what the port's machine was told. What follows from it goes with
// the router, or when the last machine that is left is told so.
func (n *Network) unsay(p *Port) error {
	f := &p.router.far
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.said, p)
	if len(f.said) == 0 {
		f.is, f.ready = nil, false
		return nil
	}
	return n.settle(p.router)
}

// hush is unsay for a port that goes on without this process.
func (n *Network) hush(p *Port) {
	f := &p.router.far
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.said, p)
	if len(f.said) == 0 {
		f.is, f.ready = nil, false
	}
}

// reachable returns the peers that can be reached from this host, in order. Of
// others the log has a word.
func (n *Network) reachable(all []vpc.Peer) []vpc.Peer {
	if !n.overlay.Address.IsValid() {
		return nil
	}
	var out []vpc.Peer
	for _, p := range all {
		switch {
		case !p.Address.Is4(), !p.Host.Is4(), p.Address.IsUnspecified(), p.Address.IsLoopback(), p.Address.IsMulticast(),
			linkLocal.Contains(p.Address), n.uplink != nil && n.uplink.Range.Contains(p.Address):
			n.log.Warn("a machine on another host cannot be reached from this one", "address", p.Address, "host", p.Host)
		case p.Host == n.overlay.Address: // a second installation on this machine
		default:
			out = append(out, p)
		}
	}
	slices.SortStableFunc(out, func(a, b vpc.Peer) int { return a.Address.Compare(b.Address) })
	return slices.CompactFunc(out, func(a, b vpc.Peer) bool { return a.Address == b.Address })
}

// settle makes a router reach what it is to reach. It is called with far.mu held.
func (n *Network) settle(r *router) error {
	want := r.far.now()
	if want.network == 0 || len(want.peers) == 0 {
		want = span{}
	}
	if r.far.is != nil && r.far.is.equal(&want) {
		return nil
	}
	r.far.is = nil
	var err error
	if want.network == 0 {
		err = n.cut(r.ns)
		r.far.ready = false
	} else {
		err = n.span(r, want)
	}
	if err != nil {
		return fmt.Errorf("joining VPC %s to other hosts: %w", r.vpc, err)
	}
	r.far.is = &want
	return nil
}

// span makes the router's device, or takes up the one that is there, and has it
// lead to exactly these peers.
func (n *Network) span(r *router, want span) error {
	o := n.overlay
	// Guarded before it is there.
	if err := o.admit(want.network, want.peers); err != nil {
		return err
	}
	before := map[netip.Addr]string{}
	var left uint32 // network of a device that is not as it should be
	found := false
	err := namespace.Within(r.ns, func() error {
		return namespace.Links(func(h *netlink.Handle) error {
			link, err := namespace.Find(h, overlayDevice)
			if err != nil || link == nil {
				return err
			}
			if before, err = neighbours(h, link); err != nil {
				return err
			}
			if found = o.is(link, want.network); found {
				return nil
			}
			if left, err = removeReach(h); left == want.network {
				left = 0
			}
			return err
		})
	})
	if err != nil {
		return err
	}
	if !found {
		r.far.ready = false
		if err := o.add(r.ns, want.network); err != nil {
			return err
		}
	}
	err = namespace.Within(r.ns, func() error {
		return namespace.Links(func(h *netlink.Handle) error {
			link, err := h.LinkByName(overlayDevice)
			if err != nil {
				return fmt.Errorf("finding %s: %w", overlayDevice, err)
			}
			if err := setReach(h, link, &o.Overlay, want.peers, !r.far.ready); err != nil {
				return err
			}
			r.far.ready = true
			// Nobody inherits a connection: neither from who had the address before,
			// nor one that went elsewhere when it was not known.
			return forgetConnections(changed(before, want.peers)...)
		})
	})
	if err != nil || left == 0 {
		return err
	}
	return o.admit(left, nil)
}

func changed(before map[netip.Addr]string, peers []vpc.Peer) []netip.Addr {
	gone := maps.Clone(before)
	var out []netip.Addr
	for _, p := range peers {
		if before[p.Address] != macOf(p.Host).String() {
			out = append(out, p.Address)
		}
		delete(gone, p.Address)
	}
	return append(out, slices.Collect(maps.Keys(gone))...)
}

// cut removes the device that leads to other hosts, if the router has one.
func (n *Network) cut(ns netns.NsHandle) error {
	var network uint32
	err := namespace.Within(ns, func() error {
		return namespace.Links(func(h *netlink.Handle) error {
			link, err := namespace.Find(h, overlayDevice)
			if err != nil || link == nil {
				return err
			}
			before, err := neighbours(h, link)
			if err != nil {
				return err
			}
			if network, err = removeReach(h); err != nil {
				return err
			}
			return forgetConnections(slices.Collect(maps.Keys(before))...)
		})
	})
	if err != nil || network == 0 {
		return err
	}
	return n.overlay.admit(network, nil)
}

// add makes a router's device. Its socket is in the host's namespace, for that
// is where it is made from.
func (o *overlay) add(router netns.NsHandle, network uint32) error {
	mtu, err := o.mtu()
	if err != nil {
		return err
	}
	return namespace.Within(o.host, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			d := o.device(network, mtu)
			d.Namespace = netlink.NsFd(router)
			err := n.LinkAdd(d)
			if errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("something else on this host uses VXLAN with the number %d", network)
			}
			if err != nil {
				return fmt.Errorf("adding the VXLAN device of network %d: %w", network, err)
			}
			return nil
		})
	})
}

// setReach has a router's device lead to exactly these peers, and take packets
// from them alone. It runs in the router's namespace. A peer that stays does not
// notice: what is there and right is left alone.
func setReach(n *netlink.Handle, link netlink.Link, o *Overlay, peers []vpc.Peer, anew bool) error {
	if err := setReachFilter(macOf(o.Address), peers, anew); err != nil {
		return fmt.Errorf("setting the filter of %s: %w", overlayDevice, err)
	}
	if err := namespace.Sysctl("net/ipv4/conf/"+overlayDevice+"/proxy_arp", "0"); err != nil {
		return err
	}
	if err := n.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing up %s: %w", overlayDevice, err)
	}
	index := link.Attrs().Index
	wantHosts, wantPeers := map[string]netip.Addr{}, map[netip.Addr]string{}
	for _, p := range peers {
		mac := macOf(p.Host).String()
		wantHosts[mac], wantPeers[p.Address] = p.Host, mac
	}
	haveRoutes, err := routedTo(n, overlayDevice)
	if err != nil {
		return err
	}
	// Nothing is sent to who is not a peer any more.
	for _, a := range haveRoutes {
		if _, ok := wantPeers[a]; ok {
			continue
		}
		err := n.RouteDel(&netlink.Route{LinkIndex: index, Dst: namespace.IPNet(netip.PrefixFrom(a, 32)), Scope: netlink.SCOPE_LINK})
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("removing the route to %s: %w", a, err)
		}
	}
	haveHosts, err := forwarding(n, link)
	if err != nil {
		return err
	}
	for mac, host := range wantHosts {
		if haveHosts[mac] != host {
			if err := n.NeighSet(hostEntry(index, mac, host)); err != nil {
				return fmt.Errorf("adding the host %s: %w", host, err)
			}
		}
	}
	havePeers, err := neighbours(n, link)
	if err != nil {
		return err
	}
	for a, mac := range wantPeers {
		if havePeers[a] != mac {
			if err := n.NeighSet(peerEntry(index, a, mac)); err != nil {
				return fmt.Errorf("adding the peer %s: %w", a, err)
			}
		}
		if !slices.Contains(haveRoutes, a) {
			if err := namespace.SetRoute(n, link, netip.PrefixFrom(a, 32), netip.Addr{}); err != nil {
				return err
			}
		}
	}
	for a, mac := range havePeers {
		if _, ok := wantPeers[a]; !ok {
			if err := n.NeighDel(peerEntry(index, a, mac)); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("removing the peer %s: %w", a, err)
			}
		}
	}
	for mac, host := range haveHosts {
		if _, ok := wantHosts[mac]; !ok {
			if err := n.NeighDel(hostEntry(index, mac, host)); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("removing the host %s: %w", host, err)
			}
		}
	}
	return nil
}

// hostEntry says at which host the router with a MAC is.
func hostEntry(index int, mac string, host netip.Addr) *netlink.Neigh {
	hw, _ := net.ParseMAC(mac) // one of ours, or the kernel's
	return &netlink.Neigh{
		LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP, Flags: netlink.NTF_SELF,
		IP: host.AsSlice(), HardwareAddr: hw,
	}
}

// peerEntry says behind which router a machine is.
func peerEntry(index int, peer netip.Addr, mac string) *netlink.Neigh {
	hw, _ := net.ParseMAC(mac)
	return &netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: peer.AsSlice(), HardwareAddr: hw}
}

// forwarding returns the hosts by the MACs of their routers.
func forwarding(n *netlink.Handle, link netlink.Link) (map[string]netip.Addr, error) {
	entries, err := namespace.Whole(func() ([]netlink.Neigh, error) { return n.NeighList(link.Attrs().Index, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("listing the hosts that %s leads to: %w", link.Attrs().Name, err)
	}
	out := map[string]netip.Addr{}
	for _, e := range entries {
		a, _ := netip.AddrFromSlice(e.IP)
		out[e.HardwareAddr.String()] = a.Unmap()
	}
	return out, nil
}

// neighbours returns the MACs of the routers by the machines behind them.
func neighbours(n *netlink.Handle, link netlink.Link) (map[netip.Addr]string, error) {
	entries, err := namespace.Whole(func() ([]netlink.Neigh, error) { return n.NeighList(link.Attrs().Index, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("listing the peers that %s leads to: %w", link.Attrs().Name, err)
	}
	out := map[netip.Addr]string{}
	for _, e := range entries {
		if e.State&netlink.NUD_PERMANENT == 0 {
			continue
		}
		if a, ok := netip.AddrFromSlice(e.IP); ok {
			out[a.Unmap()] = e.HardwareAddr.String()
		}
	}
	return out, nil
}

// removeReach removes the device and returns its network. It runs in the
// router's namespace.
func removeReach(n *netlink.Handle) (uint32, error) {
	link, err := namespace.Find(n, overlayDevice)
	if err != nil || link == nil {
		return 0, err
	}
	var network uint32
	if v, ok := link.(*netlink.Vxlan); ok {
		network = uint32(v.VxlanId)
	}
	if err := namespace.Delete(n, overlayDevice); err != nil {
		return 0, err
	}
	if err := removeFilter(overlayDevice); err != nil {
		return 0, fmt.Errorf("removing the filter of %s: %w", overlayDevice, err)
	}
	return network, nil
}

// setReachFilter guards the way from other hosts into a router: it takes only
// what is from a machine on the host that it is on.
//
//	table netdev vx0 {
//	  set peers { type ether_addr . ipv4_addr; }      # of the host's router, of the machine
//	  chain ingress {
//	    type filter hook ingress device vx0 priority filter; policy drop;
//	    meta protocol != ip drop
//	    ether daddr != MAC drop
//	    ip daddr { 169.254.0.0/16, 127.0.0.0/8 } drop
//	    ether saddr . ip saddr @peers accept
//	    drop
//	  }
//	}
func setReachFilter(own net.HardwareAddr, peers []vpc.Peer, anew bool) error {
	t := filterTable(overlayDevice)
	s := &nftables.Set{
		Table: t, Name: "peers", Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeEtherAddr, nftables.TypeIPAddr),
	}
	var have map[string]bool
	if !anew {
		var err error
		if have, err = readSet(s); err != nil {
			return err
		}
	}
	want := map[string]bool{}
	for _, p := range peers {
		key := make([]byte, 0, 12)
		key = append(append(key, macOf(p.Host)...), 0, 0)
		want[string(append(key, p.Address.AsSlice()...))] = true
	}
	return commit(func(b *batch) {
		if anew {
			b.replaceTable(t)
			b.addMap(s)
			c := base(t, "ingress", nftables.ChainTypeFilter, nftables.ChainHookIngress, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
			c.Device = overlayDevice
			b.AddChain(c)
			b.rule(c, frame(expr.CmpOpNeq, unix.ETH_P_IP), counter(), drop())
			b.rule(c, field(expr.PayloadBaseLLHeader, 0, expr.CmpOpNeq, own), counter(), drop())
			b.rule(c, in(destinationOffset, linkLocal), counter(), drop())
			b.rule(c, field(expr.PayloadBaseNetworkHeader, destinationOffset, expr.CmpOpEq, []byte{127}), counter(), drop())
			b.rule(c, []expr.Any{
				&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
				&expr.Payload{DestRegister: unix.NFT_REG32_02, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: 4},
				&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: s.Name, SetID: s.ID},
			}, accept())
			b.rule(c, counter(), drop())
		}
		b.change(s, have, want)
	})
}

// admit has the host take packets of a network from exactly these peers, or from
// nobody.
func (o *overlay) admit(network uint32, peers []vpc.Peer) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	next := maps.Clone(o.admitted)
	if len(peers) > 0 {
		next[network] = peers
	} else {
		delete(next, network)
	}
	// What an earlier process has admitted is for routers that this one may take
	// up yet.
	err := namespace.Within(o.host, func() error {
		return o.setGuard(next, func(other uint32) bool { return other != network })
	})
	if err != nil {
		return fmt.Errorf("setting the rules for packets from other hosts: %w", err)
	}
	o.admitted = next
	return nil
}

// sweep has the host take no packets but of the networks of this process.
func (o *overlay) sweep() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	err := namespace.Within(o.host, func() error { return o.setGuard(o.admitted, nil) })
	if err != nil {
		return fmt.Errorf("removing rules for packets from other hosts: %w", err)
	}
	return nil
}

// Where parts of a VXLAN packet are, from its UDP header on (RFC 7348 section
// 5): the network, and of the packet inside the EtherType and the source.
const (
	networkOffset     = 8 + 4
	innerTypeOffset   = 8 + 8 + 12
	innerSourceOffset = 8 + 8 + 14 + sourceOffset
)

// guard are the parts of the host's table of the overlay.
type guard struct {
	table                  *nftables.Table
	networks, peers, hosts *nftables.Set
}

func (o *overlay) guard() *guard {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: o.table}
	word := nftables.TypeIPAddr
	return &guard{
		table:    t,
		networks: &nftables.Set{Table: t, Name: "networks", KeyType: word},
		peers:    &nftables.Set{Table: t, Name: "peers", Concatenation: true, KeyType: nftables.MustConcatSetType(word, word, word)},
		hosts:    &nftables.Set{Table: t, Name: "hosts", KeyType: word},
	}
}

// setGuard keeps out of our networks whoever is not a peer of them: a packet
// must come from the host of a machine and have that machine's address inside.
// VXLAN of others on this host is left alone. Nor does the host forward our
// networks for anybody but a host: a machine that it hides behind its own
// address could speak for it. Entries of an earlier process stay where keep says
// so. It runs in the host's namespace. A number of a network stands as an
// address: 4711 is 0.18.103.0.
//
//	table ip tabard_<state>_overlay {
//	  set networks { type ipv4_addr; }                           # NETWORK
//	  set peers { type ipv4_addr . ipv4_addr . ipv4_addr; }      # NETWORK . HOST . MACHINE
//	  set hosts { type ipv4_addr; }                              # HOST
//	  chain input {
//	    type filter hook input priority filter; policy accept;
//	    udp dport PORT @th,224,16 0x0800 @th,96,24 . ip saddr . @th,336,32 @peers accept
//	    udp dport PORT @th,96,24 @networks drop
//	  }
//	  chain forward {
//	    type filter hook forward priority filter; policy accept;
//	    udp dport PORT @th,96,24 @networks ip daddr @hosts ip saddr != @hosts drop
//	  }
//	}
func (o *overlay) setGuard(admitted map[uint32][]vpc.Peer, keep func(uint32) bool) error {
	g := o.guard()
	haveNetworks, networksErr := readSet(g.networks)
	havePeers, peersErr := readSet(g.peers)
	haveHosts, hostsErr := readSet(g.hosts)
	if err := errors.Join(networksErr, peersErr, hostsErr); err != nil {
		return err
	}
	networks, peers, hosts := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for network, list := range admitted {
		number := networkKey(network)
		networks[number] = true
		for _, p := range list {
			host := string(p.Host.AsSlice())
			peers[number+host+string(p.Address.AsSlice())] = true
			hosts[host] = true
		}
	}
	for key := range haveNetworks {
		network := binary.BigEndian.Uint32([]byte(key)) >> 8
		if _, ours := admitted[network]; !ours && keep != nil && keep(network) {
			networks[key] = true
		}
	}
	for key := range havePeers {
		network := binary.BigEndian.Uint32([]byte(key)) >> 8
		if _, ours := admitted[network]; !ours && keep != nil && keep(network) {
			peers[key] = true
			hosts[key[4:8]] = true
		}
	}
	if len(networks) == 0 {
		err := commit(func(b *batch) { b.DelTable(g.table) })
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return err
	}
	return commit(func(b *batch) {
		b.AddTable(g.table)
		for _, s := range []*nftables.Set{g.networks, g.peers, g.hosts} {
			b.addMap(s)
		}
		b.change(g.networks, haveNetworks, networks)
		b.change(g.peers, havePeers, peers)
		b.change(g.hosts, haveHosts, hosts)
		ours := [][]expr.Any{protocol(unix.IPPROTO_UDP), port(o.Port)}
		inNetworks := []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: networkOffset, Len: 3},
			&expr.Lookup{SourceRegister: 1, SetName: g.networks.Name, SetID: g.networks.ID},
		}
		isHost := func(offset uint32, invert bool) []expr.Any {
			return []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
				&expr.Lookup{SourceRegister: 1, SetName: g.hosts.Name, SetID: g.hosts.ID, Invert: invert},
			}
		}
		ipv4 := field(expr.PayloadBaseTransportHeader, innerTypeOffset, expr.CmpOpEq, []byte{0x08, 0x00})
		isPeer := []expr.Any{
			&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseTransportHeader, Offset: networkOffset, Len: 3},
			&expr.Payload{DestRegister: unix.NFT_REG32_01, Base: expr.PayloadBaseNetworkHeader, Offset: sourceOffset, Len: 4},
			&expr.Payload{DestRegister: unix.NFT_REG32_02, Base: expr.PayloadBaseTransportHeader, Offset: innerSourceOffset, Len: 4},
			&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: g.peers.Name, SetID: g.peers.ID},
		}
		input := b.emptyChain(base(g.table, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept))
		b.rule(input, append(ours, ipv4, isPeer, accept())...)
		b.rule(input, append(ours, inNetworks, counter(), drop())...)
		forward := b.emptyChain(base(g.table, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept))
		b.rule(forward, append(ours, inNetworks, isHost(destinationOffset, false), isHost(sourceOffset, true), counter(), drop())...)
	})
}

// networkKey is a network's number as it stands in a packet, filled up to a word.
func networkKey(network uint32) string {
	return string(binary.BigEndian.AppendUint32(nil, network<<8))
}
