package network

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

// uplinkDevice is the router's end of its link to the host.
const uplinkDevice = "up0"

// dnatBit of a connection's status says that its destination was rewritten
// (IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h).
const dnatBit = 1 << 5

// rules are the parts of a router's table.
type rules struct {
	table                    *nftables.Table
	from, to                 *nftables.Set // device → its machine's chain
	floatingIn, floatingOut  *nftables.Set // floating → private address, and back
	input, forward, delivery *nftables.Chain
	prerouting, postrouting  *nftables.Chain
}

func routerRules() *rules {
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: "tabard"}
	filter := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return base(t, name, nftables.ChainTypeFilter, hook, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	}
	nat := func(name string, hook *nftables.ChainHook, at *nftables.ChainPriority) *nftables.Chain {
		return base(t, name, nftables.ChainTypeNAT, hook, at, nftables.ChainPolicyAccept)
	}
	verdicts := func(name string) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, IsMap: true, KeyType: nftables.TypeIFName, DataType: nftables.TypeVerdict}
	}
	addresses := func(name string) *nftables.Set {
		return &nftables.Set{Table: t, Name: name, IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr}
	}
	return &rules{
		table: t,
		from:  verdicts("from"), to: verdicts("to"),
		floatingIn: addresses("floating-in"), floatingOut: addresses("floating-out"),
		input:       filter("input", nftables.ChainHookInput),
		forward:     filter("forward", nftables.ChainHookForward),
		delivery:    &nftables.Chain{Table: t, Name: "delivery"},
		prerouting:  nat("prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest),
		postrouting: nat("postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource),
	}
}

// setRouterRules keeps machines from the router itself and from each other, and
// rewrites what goes by the uplink. What a machine may send to the metadata
// service is decided at its port. The rules of ports that are there stay.
//
//	table ip tabard {
//	  map from { type ifname : verdict; }             # DEVICE : jump out-DEVICE
//	  map to { type ifname : verdict; }               # DEVICE : goto in-DEVICE
//	  map floating-in { type ipv4_addr : ipv4_addr; } # floating : private
//	  map floating-out { type ipv4_addr : ipv4_addr; }
//	  chain input {
//	    type filter hook input priority filter; policy drop;
//	    iifname { up0, vx0 } drop
//	    ip daddr RANGE drop
//	    ip daddr 169.254.169.254 tcp dport { 80, 443 } accept
//	    udp dport 53 accept
//	    tcp dport 53 accept
//	    meta l4proto icmp accept
//	  }
//	  chain forward {
//	    type filter hook forward priority filter; policy drop;
//	    iifname vx0 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
//	    oifname vx0 tcp flags syn / syn,rst tcp option maxseg size set rt mtu
//	    ct state established,related accept
//	    ct state invalid drop                         # it would leave unwritten
//	    iifname vx0 oifname vmap @to                  # its sender's host has judged it
//	    iifname vx0 drop
//	    iifname up0 oifname { up0, vx0 } drop
//	    iifname up0 ct status dnat goto delivery
//	    iifname vmap @from
//	  }
//	  chain delivery {                                # what its sender may send
//	    oifname up0 ip daddr RANGE drop
//	    oifname up0 accept
//	    oifname vx0 accept                            # its receiver's host judges it
//	    oifname vmap @to
//	  }
//	  chain prerouting {
//	    type nat hook prerouting priority dstnat;
//	    dnat to ip daddr map @floating-in
//	  }
//	  chain postrouting {
//	    type nat hook postrouting priority srcnat;
//	    oifname up0 snat to ip saddr map @floating-out
//	    oifname up0 masquerade
//	  }
//	}
func setRouterRules(links netip.Prefix) error {
	r := routerRules()
	return commit(func(b *batch) {
		b.AddTable(r.table)
		for _, m := range []*nftables.Set{r.from, r.to, r.floatingIn, r.floatingOut} {
			b.addMap(m)
		}
		for _, c := range []*nftables.Chain{r.delivery, r.input, r.forward, r.prerouting, r.postrouting} {
			b.emptyChain(c)
		}
		b.rule(r.input, arriving(uplinkDevice), counter(), drop())
		b.rule(r.input, arriving(overlayDevice), counter(), drop())
		if links.IsValid() {
			b.rule(r.input, in(destinationOffset, links), counter(), drop())
		}
		for _, p := range []uint16{httpPort, httpsPort} {
			b.rule(r.input, destination(metadataAddress), protocol(unix.IPPROTO_TCP), port(p), accept())
		}
		b.rule(r.input, protocol(unix.IPPROTO_UDP), port(domainPort), accept())
		b.rule(r.input, protocol(unix.IPPROTO_TCP), port(domainPort), accept())
		b.rule(r.input, protocol(unix.IPPROTO_ICMP), accept())

		b.rule(r.forward, arriving(overlayDevice), clamp())
		b.rule(r.forward, leaving(overlayDevice), clamp())
		b.rule(r.forward, state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept())
		b.rule(r.forward, state(expr.CtStateBitINVALID), counter(), drop())
		b.rule(r.forward, arriving(overlayDevice), byDevice(expr.MetaKeyOIFNAME, r.to))
		b.rule(r.forward, arriving(overlayDevice), counter(), drop())
		b.rule(r.forward, arriving(uplinkDevice), leaving(uplinkDevice), counter(), drop())
		b.rule(r.forward, arriving(uplinkDevice), leaving(overlayDevice), counter(), drop())
		b.rule(r.forward, arriving(uplinkDevice), conntrack(expr.CtKeySTATUS, expr.CmpOpNeq, dnatBit), goTo(r.delivery.Name))
		b.rule(r.forward, byDevice(expr.MetaKeyIIFNAME, r.from))

		if links.IsValid() {
			b.rule(r.delivery, leaving(uplinkDevice), in(destinationOffset, links), counter(), drop())
			b.rule(r.delivery, leaving(uplinkDevice), accept())
		}
		b.rule(r.delivery, leaving(overlayDevice), accept())
		b.rule(r.delivery, byDevice(expr.MetaKeyOIFNAME, r.to))

		b.rule(r.prerouting, translate(expr.NATTypeDestNAT, destinationOffset, r.floatingIn))
		b.rule(r.postrouting, leaving(uplinkDevice), translate(expr.NATTypeSourceNAT, sourceOffset, r.floatingOut))
		b.rule(r.postrouting, leaving(uplinkDevice), masquerade())
	})
}

func outboundChain(device string) string { return "out-" + device }
func inboundChain(device string) string  { return "in-" + device }

// setFirewall makes the chains of a port's security groups, in place of those
// that it has:
//
//	chain out-DEVICE { MATCH goto delivery; …; drop }
//	chain in-DEVICE  { MATCH accept; …; drop }
func setFirewall(device string, f host.Firewall) error {
	r := routerRules()
	return commit(func(b *batch) {
		out := b.emptyChain(&nftables.Chain{Table: r.table, Name: outboundChain(device)})
		for _, p := range merge(f.Outbound) {
			b.pass(out, destinationOffset, p, goTo(r.delivery.Name))
		}
		b.rule(out, counter(), drop())
		into := b.emptyChain(&nftables.Chain{Table: r.table, Name: inboundChain(device)})
		for _, p := range merge(f.Inbound) {
			b.pass(into, sourceOffset, p, accept())
		}
		b.rule(into, counter(), drop())
		b.putVerdict(r.from, deviceName(device), &expr.Verdict{Kind: expr.VerdictJump, Chain: out.Name})
		b.putVerdict(r.to, deviceName(device), &expr.Verdict{Kind: expr.VerdictGoto, Chain: into.Name})
	})
}

// removeFirewall removes a port's chains, if there are any.
func removeFirewall(device string) error {
	r := routerRules()
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := c.ListChainsOfTableFamily(r.table.Family)
	if err != nil {
		return fmt.Errorf("listing chains: %w", err)
	}
	// The chains and their entries in the maps come and go in one batch.
	if !slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Table.Name == r.table.Name && c.Name == outboundChain(device)
	}) {
		return nil
	}
	return commit(func(b *batch) {
		b.takeVerdict(r.from, device, expr.VerdictJump, outboundChain(device))
		b.takeVerdict(r.to, device, expr.VerdictGoto, inboundChain(device))
		for _, name := range []string{outboundChain(device), inboundChain(device)} {
			c := &nftables.Chain{Table: r.table, Name: name}
			b.FlushChain(c)
			b.DelChain(c)
		}
	})
}

func (b *batch) takeVerdict(s *nftables.Set, device string, kind expr.VerdictKind, chain string) {
	b.fail(b.SetDeleteElements(s, []nftables.SetElement{{
		Key: deviceName(device), VerdictData: &expr.Verdict{Kind: kind, Chain: chain},
	}}))
}

// merged is what several passes that differ in their remote address alone let
// through.
type merged struct {
	host.Pass
	remotes []netip.Addr // when there are any, in place of Remote
}

// setSize bounds the addresses of one rule, which must fit one message.
const setSize = 1000

// merge joins passes for single addresses: a rule whose remote is a security
// group has one for each member.
func merge(passes []host.Pass) []merged {
	var out []merged
	open := map[host.Pass]int{} // index in out
	seen := map[host.Pass]bool{}
	for _, p := range passes {
		p.Remote = p.Remote.Masked()
		if seen[p] {
			continue
		}
		seen[p] = true
		if !p.Remote.IsValid() || !p.Remote.IsSingleIP() || !p.Remote.Addr().Is4() {
			out = append(out, merged{Pass: p})
			continue
		}
		remote := p.Remote.Addr()
		p.Remote = netip.Prefix{}
		n, ok := open[p]
		if !ok || len(out[n].remotes) == setSize {
			n = len(out)
			open[p] = n
			out = append(out, merged{Pass: p})
		}
		out[n].remotes = append(out[n].remotes, remote)
	}
	return out
}

// pass is one rule of a security group, of which offset says where the other
// end's address is.
func (b *batch) pass(c *nftables.Chain, offset uint32, p merged, then []expr.Any) {
	var parts [][]expr.Any
	switch {
	case len(p.remotes) > 0:
		parts = append(parts, b.oneOf(c.Table, offset, p.remotes))
	case p.Remote.IsValid() && !p.Remote.Addr().Is4():
		return // there is no IPv6 to let through
	case p.Remote.IsValid():
		parts = append(parts, in(offset, p.Remote))
	}
	switch p.Protocol {
	case vpc.ProtocolTCP, vpc.ProtocolUDP:
		number := byte(unix.IPPROTO_TCP)
		if p.Protocol == vpc.ProtocolUDP {
			number = unix.IPPROTO_UDP
		}
		parts = append(parts, protocol(number))
		if !anyPort(p.Ports) {
			parts = append(parts, ports(p.Ports[0], p.Ports[1]))
		}
	case vpc.ProtocolICMP:
		parts = append(parts, protocol(unix.IPPROTO_ICMP))
		for n, want := range []int{p.ICMPType, p.ICMPCode} {
			if want >= 0 {
				parts = append(parts, field(expr.PayloadBaseTransportHeader, uint32(n), expr.CmpOpEq, []byte{byte(want)}))
			}
		}
	}
	b.rule(c, append(parts, then)...)
}

// anyPort tells whether a range is all ports: written out, or not at all.
func anyPort(p [2]uint16) bool { return p[0] <= 1 && (p[1] == 65535 || p[1] == 0) }

// checkFirewall refuses what pass would take for something wider.
func checkFirewall(f host.Firewall) error {
	for _, p := range slices.Concat(f.Inbound, f.Outbound) {
		switch p.Protocol {
		case vpc.ProtocolAll:
		case vpc.ProtocolTCP, vpc.ProtocolUDP:
			if p.Ports[0] > p.Ports[1] {
				return fmt.Errorf("the ports %d to %d are no range", p.Ports[0], p.Ports[1])
			}
		case vpc.ProtocolICMP:
			if p.ICMPType < -1 || p.ICMPType > 255 || p.ICMPCode < -1 || p.ICMPCode > 255 {
				return fmt.Errorf("ICMP has no type %d and code %d", p.ICMPType, p.ICMPCode)
			}
		default:
			return fmt.Errorf("%q is not a protocol that a security group knows", p.Protocol)
		}
		if p.Remote != (netip.Prefix{}) && !p.Remote.IsValid() {
			return fmt.Errorf("%s is not a range of addresses", p.Remote)
		}
	}
	return nil
}

// floating are a router's maps of floating addresses.
type floating struct {
	in, out map[netip.Addr]netip.Addr // floating → private, private → floating
}

func readFloating() (*floating, error) {
	r := routerRules()
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	read := func(s *nftables.Set) (map[netip.Addr]netip.Addr, error) {
		elements, err := c.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("reading the map %s: %w", s.Name, err)
		}
		m := map[netip.Addr]netip.Addr{}
		for _, e := range elements {
			k, okKey := netip.AddrFromSlice(e.Key)
			v, okValue := netip.AddrFromSlice(e.Val)
			if !okKey || !okValue {
				return nil, fmt.Errorf("reading the map %s: %v is not an address for an address", s.Name, e)
			}
			m[k] = v
		}
		return m, nil
	}
	f := &floating{}
	if f.in, err = read(r.floatingIn); err != nil {
		return nil, err
	}
	f.out, err = read(r.floatingOut)
	return f, err
}

// setFloating makes want, which is invalid for none, the one floating address of
// a private one, and returns those whose meaning has changed.
func setFloating(private, want netip.Addr) ([]netip.Addr, error) {
	have, err := readFloating()
	if err != nil {
		return nil, err
	}
	if want.IsValid() && have.in[want] == private && have.out[private] == want {
		return nil, nil
	}
	changed := map[netip.Addr]bool{}
	if want.IsValid() {
		changed[want] = true
	}
	r := routerRules()
	err = commit(func(b *batch) {
		for f, p := range have.in {
			if p == private || f == want {
				b.takeAddress(r.floatingIn, f, p)
				changed[f] = true
			}
		}
		for p, f := range have.out {
			if p == private || f == want {
				b.takeAddress(r.floatingOut, p, f)
				changed[f] = true
			}
		}
		if want.IsValid() {
			b.put(r.floatingIn, want.AsSlice(), private.AsSlice())
			b.put(r.floatingOut, private.AsSlice(), want.AsSlice())
		}
	})
	if err != nil {
		return nil, fmt.Errorf("mapping the floating address of %s: %w", private, err)
	}
	out := make([]netip.Addr, 0, len(changed))
	for f := range changed {
		out = append(out, f)
	}
	return out, nil
}

func (b *batch) takeAddress(s *nftables.Set, key, value netip.Addr) {
	b.fail(b.SetDeleteElements(s, []nftables.SetElement{{Key: key.AsSlice(), Val: value.AsSlice()}}))
}
