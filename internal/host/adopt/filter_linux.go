package adopt

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// gate is how far a machine's metadata service is open.
type gate struct {
	port  uint16 // 0 is closed
	drain bool   // connections that are open go on, new ones find nobody
}

// setFilter guards the inner end of a machine's link, in place of the filter
// that it has. It runs in the machine's namespace. In nft's words, the counters
// left out:
//
//	table netdev tabard {
//	  chain ingress {
//	    type filter hook ingress device md0 priority filter; policy drop;
//	    ether saddr != MAC drop
//	    meta protocol arp arp saddr ether MAC arp saddr ip ADDRESS accept
//	    meta protocol != ip drop
//	    ip saddr != ADDRESS drop
//	    ip daddr 169.254.169.254 tcp dport PORT meta pkttype set host accept   # where it is open
//	  }
//	}
//
// A machine sends by its gateway, so its frames are for the gateway's MAC; without
// the change of their type, the kernel would take them for somebody else's.
func setFilter(mac net.HardwareAddr, address netip.Addr, g gate) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyNetdev, Name: "tabard"}
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	policy := nftables.ChainPolicyDrop
	in := c.AddChain(&nftables.Chain{
		Table: t, Name: "ingress", Type: nftables.ChainTypeFilter, Device: inner,
		Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
	rule := func(parts ...[]expr.Any) {
		r := &nftables.Rule{Table: t, Chain: in}
		for _, p := range parts {
			r.Exprs = append(r.Exprs, p...)
		}
		c.AddRule(r)
	}
	dropped := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	taken := []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{unix.PACKET_HOST}},
		&expr.Meta{Key: expr.MetaKeyPKTTYPE, SourceRegister: true, Register: 1},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	rule(field(expr.PayloadBaseLLHeader, 6, expr.CmpOpNeq, mac), dropped)
	// The kernel takes ARP for Ethernet and IPv4 only, so the two senders are
	// always at these places.
	rule(frame(expr.CmpOpEq, unix.ETH_P_ARP),
		field(expr.PayloadBaseNetworkHeader, 8, expr.CmpOpEq, mac),
		field(expr.PayloadBaseNetworkHeader, 14, expr.CmpOpEq, address.AsSlice()), taken)
	rule(frame(expr.CmpOpNeq, unix.ETH_P_IP), dropped)
	rule(field(expr.PayloadBaseNetworkHeader, 12, expr.CmpOpNeq, address.AsSlice()), dropped)
	if g.port != 0 {
		open := [][]expr.Any{
			field(expr.PayloadBaseNetworkHeader, 16, expr.CmpOpEq, metadataAddress.AsSlice()),
			{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}}},
			// The destination port, of a first fragment only.
			field(expr.PayloadBaseTransportHeader, 2, expr.CmpOpEq, binaryutil.BigEndian.PutUint16(g.port)),
		}
		if g.drain {
			// All segments but those whose flags are SYN without ACK.
			open = append(open, []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
				&expr.Cmp{Register: 1, Op: expr.CmpOpNeq, Data: []byte{0x02}},
			})
		}
		rule(append(open, taken)...)
	}
	rule(dropped)
	return c.Flush()
}

// field compares bytes of a header.
func field(base expr.PayloadBase, offset uint32, op expr.CmpOp, want []byte) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(want))},
		&expr.Cmp{Register: 1, Op: op, Data: want},
	}
}

// frame compares the EtherType.
func frame(op expr.CmpOp, want uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Register: 1, Op: op, Data: binaryutil.BigEndian.PutUint16(want)},
	}
}
