package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// Before its link carries packets a machine's first ones are lost, and each
// costs a second.
func TestAMachinesLinkCarriesPacketsWhenStartReturns(t *testing.T) {
	r := newRig(t)
	for n := range 5 {
		m := spec(fmt.Sprintf("0717_%d", n), "vpc-1", fmt.Sprintf("10.240.0.%d", 10+n), byte(n))
		r.start(m)
		r.inRouter("vpc-1", func() error {
			return namespace.Links(func(n *netlink.Handle) error {
				link, err := n.LinkByName(device(m.ID))
				if err == nil && link.Attrs().OperState != netlink.OperUp {
					t.Errorf("the link of %s is %s", m.ID, link.Attrs().OperState)
				}
				return err
			})
		})
	}
}

func TestAMachineLooksLikeOneOnASubnet(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		if got := eth.Attrs().HardwareAddr.String(); got != a.MAC {
			t.Errorf("eth0 has the MAC %s, want %s", got, a.MAC)
		}
		addrs, err := n.AddrList(eth, unix.AF_INET)
		if err != nil {
			return err
		}
		if len(addrs) != 1 || addrs[0].IPNet.String() != "10.240.0.4/24" {
			t.Errorf("eth0 has the addresses %v", addrs)
		}
		return nil
	})
	a.reaches("10.240.0.1") // its gateway
}

func TestAForgedSourceAddressGetsNoIdentity(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
	})
	a.silent("10.240.0.5", "169.254.169.254:80")
	a.reachesItsOwn()
	b.reachesItsOwn()
}

func TestAForgedMACGetsNoIdentity(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	setMAC := func(mac string) {
		a.must(func(n *netlink.Handle, eth netlink.Link) error {
			hw, err := net.ParseMAC(mac)
			if err != nil {
				return err
			}
			return n.LinkSetHardwareAddr(eth, hw)
		})
	}
	setMAC(b.MAC)
	if got, err := a.get("", metadataURL); err == nil {
		t.Errorf("with the MAC of b, a got %q", got)
	}
	b.reachesItsOwn()
	setMAC(a.MAC)
	a.reachesItsOwn()
}

// Taking over all of a neighbour at once is the strongest forgery a machine has.
func TestANeighboursMACAndAddressTogetherGetNoIdentity(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		hw, err := net.ParseMAC(b.MAC)
		if err != nil {
			return err
		}
		if err := n.LinkSetHardwareAddr(eth, hw); err != nil {
			return err
		}
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.240.0.5/24"), netlink.SCOPE_UNIVERSE)
	})
	if got, err := a.get("10.240.0.5", metadataURL); err == nil {
		t.Errorf("as b, a got %q", got)
	}
	b.reachesItsOwn()
}

// looseReversePath lets the router take any source on the machine's link.
func (i *inst) looseReversePath() {
	i.t.Helper()
	i.inRouter(i.VPC, func() error {
		return errors.Join(namespace.Sysctl("net/ipv4/conf/all/rp_filter", "0"),
			namespace.Sysctl("net/ipv4/conf/"+device(i.ID)+"/rp_filter", "0"))
	})
}

func TestTheFilterAloneStopsAForgedAddress(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.looseReversePath()
	a.reaches("10.240.0.5") // and now needs no ARP, where the forgery would be noticed too
	var box net.PacketConn
	err := b.inside(func() (err error) {
		box, err = net.ListenPacket("udp4", "10.240.0.5:9")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.240.0.6/32"), netlink.SCOPE_UNIVERSE)
	})
	for _, source := range []string{"10.240.0.6", "10.240.0.4"} {
		err := a.inside(func() error {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(source)}, &net.UDPAddr{IP: net.ParseIP("10.240.0.5"), Port: 9})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = io.WriteString(c, source)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	box.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 64)
	n, _, err := box.ReadFrom(buf)
	if got := string(buf[:n]); err != nil || got != "10.240.0.4" {
		t.Errorf("the first datagram came from %q, %v", got, err)
	}
}

func TestTheFilterAloneStopsAForgedMAC(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	forged, err := net.ParseMAC("02:07:00:00:00:05")
	if err != nil {
		t.Fatal(err)
	}
	a.looseReversePath()
	// Neither side needs ARP any more, where the forgery would be noticed too.
	var router net.HardwareAddr
	fixed := func(n *netlink.Handle, link netlink.Link, to netip.Addr, mac net.HardwareAddr) error {
		return n.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: to.AsSlice(), HardwareAddr: mac,
		})
	}
	r.inRouter("vpc-1", func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := n.LinkByName(device(a.ID))
			if err != nil {
				return err
			}
			router = link.Attrs().HardwareAddr
			return fixed(n, link, a.Address, forged)
		})
	})
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return errors.Join(n.LinkSetHardwareAddr(eth, forged), fixed(n, eth, metadataAddress, router))
	})
	a.silent("", "169.254.169.254:80")
}

// What the router believes of a neighbour decides where its answers go.
func TestTheFilterAloneStopsForgedARP(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.looseReversePath()
	own, _ := net.ParseMAC(a.MAC)
	other, _ := net.ParseMAC("02:07:00:00:00:99")
	a.sendARP(own, own, "10.240.0.5")   // the neighbour's address
	a.sendARP(own, other, "10.240.0.4") // another card's MAC
	time.Sleep(100 * time.Millisecond)  // the packets are handled in the background
	r.inRouter("vpc-1", func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := n.LinkByName(device(a.ID))
			if err != nil {
				return err
			}
			known, err := n.NeighList(link.Attrs().Index, unix.AF_INET)
			for _, k := range known {
				if !k.IP.Equal(a.Address.AsSlice()) || k.HardwareAddr.String() != a.MAC {
					t.Errorf("the router believes that %s is at %s", k.IP, k.HardwareAddr)
				}
			}
			return err
		})
	})
	a.reachesItsOwn()
}

// sendARP asks for the gateway, in a frame from one MAC, with another MAC and
// an address as the sender inside.
func (i *inst) sendARP(frame, sender net.HardwareAddr, address string) {
	i.t.Helper()
	i.must(func(_ *netlink.Handle, eth netlink.Link) error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		p := slices.Concat([]byte{255, 255, 255, 255, 255, 255}, frame, []byte{8, 6}, // Ethernet
			[]byte{0, 1, 8, 0, 6, 4, 0, 1}, sender, netip.MustParseAddr(address).AsSlice(),
			make([]byte, 6), gateway(i.Subnet).AsSlice())
		return unix.Sendto(fd, p, 0, &unix.SockaddrLinklayer{Ifindex: eth.Attrs().Index})
	})
}

func TestStrictReversePathAloneStopsAForgedAddress(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	r.inRouter("vpc-1", func() error { return removeFilter(device("0717_a")) })
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
	})
	a.silent("10.240.0.5", "169.254.169.254:80")
}

func TestTheListenerAloneStopsAForgedAddress(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.looseReversePath()
	r.inRouter("vpc-1", func() error { return removeFilter(device("0717_a")) })
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
	})
	if got, err := a.get("10.240.0.5", metadataURL); err == nil {
		t.Errorf("from the address of b, a got %q", got)
	}
	a.reachesItsOwn()
}

func TestNothingThatARequestSaysChoosesAnIdentity(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	for _, header := range [][]string{
		{"X-Forwarded-For", "10.240.0.5"}, {"Forwarded", "for=10.240.0.5"}, {"X-Real-Ip", "10.240.0.5"},
		{"Host", "10.240.0.5"}, {"X-Instance-Id", "0717_b"},
	} {
		if got, _ := a.get("", metadataURL, header...); got != "metadata of 0717_a" {
			t.Errorf("with %v machine a reaches %q", header, got)
		}
	}
}

func TestTheMetadataServiceIsNotReachedThroughOtherAddresses(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	// A neighbour's address leads to the neighbour, where nothing listens; its
	// listeners for the server are its own.
	for _, to := range []string{"10.240.0.5:80"} {
		if c, err := a.dial("", to, time.Second); err == nil {
			c.Close()
			t.Errorf("machine a connected to %s", to)
		}
	}
	a.silent("", "10.240.0.1:80")        // the router itself
	a.silent("", "169.254.169.254:8470") // another port
	a.silent("", "169.254.1.1:80")       // another link-local address

	// A route may send what is for the neighbour's service past the own one.
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		to := netlink.Route{LinkIndex: eth.Attrs().Index, Dst: namespace.IPNet(netip.MustParsePrefix("169.254.169.254/32")), Scope: netlink.SCOPE_LINK}
		if err := n.RouteDel(&to); err != nil {
			return err
		}
		to.Scope, to.Gw, to.Flags = netlink.SCOPE_UNIVERSE, netip.MustParseAddr("10.240.0.5").AsSlice(), int(netlink.FLAG_ONLINK)
		return n.RouteAdd(&to)
	})
	a.reachesItsOwn()
}

func TestAMetadataServiceThatIsOffIsSilentBesideOneThatIsOn(t *testing.T) {
	r := newRig(t)
	off := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	off.Metadata = vpc.MetadataService{}
	a := r.start(off)
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	b.reachesItsOwn()
	a.silent("", "169.254.169.254:80")
	if a.ping("169.254.169.254") {
		t.Error("the address answers a ping")
	}
}

func TestAnswersCarryTheHopLimit(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	m.Metadata.ResponseHopLimit = 3
	a := r.start(m)
	tap := -1
	err := a.inside(func() (err error) {
		tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_IP))))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tap)
	wait := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(tap, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	a.reachesItsOwn()
	seen := 0
	for buf := make([]byte, 1500); ; {
		n, _, err := unix.Recvfrom(tap, buf, 0)
		if err != nil {
			break
		}
		const flags, rst, fin = 33, 4, 1
		if n >= 40 && [4]byte(buf[12:16]) == metadataAddress.As4() && buf[flags]&(rst|fin) == 0 {
			seen++
			if buf[8] != 3 {
				t.Errorf("an answer with the TTL %d", buf[8])
			}
		}
	}
	if seen < 2 {
		t.Errorf("%d packets of the answer seen", seen)
	}
}

func TestMachinesOfOneVPCReachEachOther(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	other := spec("0717_c", "vpc-1", "10.240.64.4", 6)
	other.Interfaces[0].Subnet = netip.MustParsePrefix("10.240.64.0/24")
	c := r.start(other)
	for _, p := range []struct{ from, to *inst }{{a, b}, {b, a}, {a, c}, {c, b}} {
		p.from.reaches(p.to.Address.String())
	}
}

func TestEqualAddressesInTwoVPCsNeverMeet(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	twin := r.start(spec("0717_t", "vpc-2", "10.240.0.4", 4))
	far := r.start(spec("0717_f", "vpc-2", "10.240.0.9", 9))
	a.reachesItsOwn()
	twin.reachesItsOwn()
	twin.reaches("10.240.0.9")
	if a.ping("10.240.0.9") {
		t.Error("a machine of the first VPC reaches one of the second")
	}
	// Not even by way of the router.
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetRoute(n, eth, netip.PrefixFrom(far.Address, 32), gateway(a.Subnet))
	})
	if a.ping("10.240.0.9") {
		t.Error("a machine of the first VPC reaches one of the second through its gateway")
	}
}

func TestAMachineThatHoldsItsConnectionsOpenKeepsNobodyElseOut(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	for range 100 {
		c, err := a.dial("", "169.254.169.254:80", time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	b.reachesItsOwn()
}
