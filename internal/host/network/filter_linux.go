package network

import (
	"errors"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// gate is how far a port's metadata service is open.
type gate struct {
	port  uint16 // 0 is closed
	drain bool   // connections that are open go on, new ones find nobody
}

// setFilter guards a port, before anything else of the router sees what its
// machine sends (reference/instance-metadata-and-vpc.md section 6.3), in place
// of the filter that it has. The device must exist. In nft's words, the counters
// left out:
//
//	table netdev DEVICE {
//	  chain ingress {
//	    type filter hook ingress device DEVICE priority filter; policy drop;
//	    ether saddr != MAC drop
//	    meta protocol arp arp saddr ether MAC arp saddr ip ADDRESS accept
//	    meta protocol != ip drop
//	    ip saddr != ADDRESS drop
//	    ip daddr 169.254.169.254 tcp dport PORT accept     # where it is open
//	    ip daddr 169.254.0.0/16 drop
//	    ip daddr 127.0.0.0/8 drop
//	    accept
//	  }
//	}
func setFilter(device string, mac net.HardwareAddr, address netip.Addr, metadata gate) error {
	return commit(func(b *batch) {
		t := filterTable(device)
		b.replaceTable(t)
		c := base(t, "ingress", nftables.ChainTypeFilter, nftables.ChainHookIngress, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
		c.Device = device
		b.AddChain(c)
		b.rule(c, field(expr.PayloadBaseLLHeader, 6, expr.CmpOpNeq, mac), counter(), drop())
		// The kernel takes ARP for Ethernet and IPv4 only, so the two senders are
		// always at these places.
		b.rule(c, frame(expr.CmpOpEq, unix.ETH_P_ARP),
			field(expr.PayloadBaseNetworkHeader, 8, expr.CmpOpEq, mac),
			field(expr.PayloadBaseNetworkHeader, 14, expr.CmpOpEq, address.AsSlice()), accept())
		b.rule(c, frame(expr.CmpOpNeq, unix.ETH_P_IP), counter(), drop())
		b.rule(c, source(expr.CmpOpNeq, address), counter(), drop())
		if metadata.port != 0 {
			open := [][]expr.Any{destination(metadataAddress), protocol(unix.IPPROTO_TCP), port(metadata.port)}
			if metadata.drain {
				open = append(open, notOpening())
			}
			b.rule(c, append(open, accept())...)
		}
		b.rule(c, in(destinationOffset, linkLocal), counter(), drop())
		b.rule(c, field(expr.PayloadBaseNetworkHeader, destinationOffset, expr.CmpOpEq, []byte{127}), counter(), drop())
		b.rule(c, accept())
	})
}

// removeFilter removes a port's filter, if there is one.
func removeFilter(device string) error {
	err := commit(func(b *batch) { b.DelTable(filterTable(device)) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func filterTable(device string) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyNetdev, Name: device}
}
