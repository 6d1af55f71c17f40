package netns

import (
	"errors"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The functions below act on the namespace of the calling thread.

// closeRouter keeps machines from the router itself. What a machine may send to
// the metadata service is decided at its link.
//
//	table ip tabard {
//	  chain input {
//	    type filter hook input priority filter; policy drop;
//	    ip daddr 169.254.169.254 tcp dport 80 accept
//	    meta l4proto icmp accept
//	  }
//	}
func closeRouter() error {
	drop := nftables.ChainPolicyDrop
	return batch(func(c *nftables.Conn) {
		t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "tabard"})
		in := c.AddChain(&nftables.Chain{
			Table: t, Name: "input", Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		c.AddRule(rule(in, destination(metadataAddress), protocol(unix.IPPROTO_TCP), port(metadataPort), verdict(expr.VerdictAccept)))
		c.AddRule(rule(in, protocol(unix.IPPROTO_ICMP), verdict(expr.VerdictAccept)))
	})
}

// addFilter guards a link, before anything else of the router sees what a
// machine sends (reference/instance-metadata-and-vpc.md section 6.3). The link
// must exist. In nft's words, the counters left out:
//
//	table netdev LINK {
//	  chain ingress {
//	    type filter hook ingress device LINK priority filter; policy drop;
//	    ether saddr != MAC drop
//	    meta protocol arp arp saddr ether MAC arp saddr ip ADDRESS accept
//	    meta protocol != ip drop
//	    ip saddr != ADDRESS drop
//	    ip daddr 169.254.169.254 tcp dport 80 accept     # where it is on
//	    ip daddr 169.254.0.0/16 drop
//	    ip daddr 127.0.0.0/8 drop
//	    accept
//	  }
//	}
func addFilter(link string, mac net.HardwareAddr, address netip.Addr, metadata bool) error {
	drop := nftables.ChainPolicyDrop
	accept, reject := verdict(expr.VerdictAccept), verdict(expr.VerdictDrop)
	return batch(func(c *nftables.Conn) {
		t := c.AddTable(filterTable(link))
		in := c.AddChain(&nftables.Chain{
			Table: t, Name: "ingress", Type: nftables.ChainTypeFilter, Device: link,
			Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		c.AddRule(rule(in, field(expr.PayloadBaseLLHeader, 6, expr.CmpOpNeq, mac), counter(), reject))
		// The kernel takes ARP for Ethernet and IPv4 only, so the two senders are
		// always at these places.
		c.AddRule(rule(in, frame(expr.CmpOpEq, unix.ETH_P_ARP),
			field(expr.PayloadBaseNetworkHeader, 8, expr.CmpOpEq, mac),
			field(expr.PayloadBaseNetworkHeader, 14, expr.CmpOpEq, address.AsSlice()), accept))
		c.AddRule(rule(in, frame(expr.CmpOpNeq, unix.ETH_P_IP), counter(), reject))
		c.AddRule(rule(in, field(expr.PayloadBaseNetworkHeader, 12, expr.CmpOpNeq, address.AsSlice()), counter(), reject))
		if metadata {
			c.AddRule(rule(in, destination(metadataAddress), protocol(unix.IPPROTO_TCP), port(metadataPort), accept))
		}
		c.AddRule(rule(in, field(expr.PayloadBaseNetworkHeader, 16, expr.CmpOpEq, []byte{169, 254}), counter(), reject))
		c.AddRule(rule(in, field(expr.PayloadBaseNetworkHeader, 16, expr.CmpOpEq, []byte{127}), counter(), reject))
		c.AddRule(rule(in, accept))
	})
}

// removeFilter removes a link's filter, if there is one.
func removeFilter(link string) error {
	err := batch(func(c *nftables.Conn) { c.DelTable(filterTable(link)) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func filterTable(link string) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyNetdev, Name: link}
}

// batch commits all that f stages, or nothing of it.
func batch(f func(*nftables.Conn)) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	f(c)
	return c.Flush()
}

func rule(c *nftables.Chain, parts ...[]expr.Any) *nftables.Rule {
	r := &nftables.Rule{Table: c.Table, Chain: c}
	for _, p := range parts {
		r.Exprs = append(r.Exprs, p...)
	}
	return r
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

// destination matches the IPv4 destination.
func destination(a netip.Addr) []expr.Any {
	return field(expr.PayloadBaseNetworkHeader, 16, expr.CmpOpEq, a.AsSlice())
}

func protocol(p byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Op: expr.CmpOpEq, Data: []byte{p}},
	}
}

// port matches the destination port, of a first fragment only.
func port(p uint16) []expr.Any {
	return field(expr.PayloadBaseTransportHeader, 2, expr.CmpOpEq, binaryutil.BigEndian.PutUint16(p))
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func counter() []expr.Any { return []expr.Any{&expr.Counter{}} }
