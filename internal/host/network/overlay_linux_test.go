package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// site is several hosts on one network, and a machine on it that is no host.
//
//	┌─ wire ─┬───── br0 ──┬──────────────┐
//	│ host 0 │ 192.0.2.10 │ host 1  .11  │ … stranger .99
type site struct {
	t        *testing.T
	hosts    []*rig
	stranger string // namespace
}

const strangerAddress = "192.0.2.99"

func hostAt(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + n)}) }

func newSite(t *testing.T, hosts int, up *Uplink) *site {
	t.Helper()
	var all []Config
	for n := range hosts {
		all = append(all, Config{Uplink: up, Overlay: &Overlay{Address: hostAt(n)}})
	}
	s := &site{t: t}
	s.hosts = newRigs(t, func(rigs []*rig) {
		r := rigs[0]
		wire := "tabtest-" + r.state + "-wire"
		s.stranger = "tabtest-" + r.state + "-stranger"
		r.space(wire)
		r.space(s.stranger)
		r.in(wire, "ip", "link", "add", "br0", "type", "bridge")
		r.in(wire, "ip", "link", "set", "br0", "up")
		plug := func(n int, space, address string) {
			end := fmt.Sprintf("p%d", n)
			r.in(space, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", end, "netns", wire)
			r.in(wire, "ip", "link", "set", end, "master", "br0", "up")
			// Its addresses of IPv6 would come up at some time of their own.
			if err := within(t, space, func() error { return namespace.DisableIPv6("eth9") }); err != nil {
				t.Fatal(err)
			}
			r.in(space, "ip", "addr", "add", address+"/24", "dev", "eth9")
			r.in(space, "ip", "link", "set", "eth9", "up")
			r.carries(space, "eth9")
		}
		for n, r := range rigs {
			plug(n, r.host, hostAt(n).String())
		}
		plug(99, s.stranger, strangerAddress)
	}, all...)
	return s
}

// numbers of the VPCs of the tests.
var numbers = map[string]uint32{"vpc": 4711, "other": 0xabcdef}

// tell has every host know where every machine is.
func (s *site) tell() {
	s.t.Helper()
	for n, r := range s.hosts {
		for _, i := range r.insts {
			i.Network, i.Peers = numbers[i.VPC], s.peersOf(n, i.VPC)
			i.update()
		}
	}
}

func (s *site) peersOf(host int, vpcID string) []vpc.Peer {
	var out []vpc.Peer
	for n, r := range s.hosts {
		for _, i := range r.insts {
			if n != host && i.VPC == vpcID {
				out = append(out, vpc.Peer{Address: i.Address, Host: hostAt(n)})
			}
		}
	}
	return out
}

// remove stops a machine.
func (i *inst) remove() {
	i.t.Helper()
	if err := i.port.Detach(context.Background()); err != nil {
		i.t.Fatal(err)
	}
	i.insts = slices.DeleteFunc(i.insts, func(o *inst) bool { return o == i })
	for _, r := range []*rig{i.rig} {
		r.insts = i.insts
	}
	if err := namespace.Remove(i.space); err != nil {
		i.t.Fatal(err)
	}
}

func TestMachinesOfOneVPCReachEachOtherAcrossHosts(t *testing.T) {
	s := newSite(t, 3, nil)
	var all []*inst
	for n, r := range s.hosts {
		all = append(all, r.start(spec(fmt.Sprint("m", n), "vpc", fmt.Sprint("10.240.0.", 4+n), byte(n))))
	}
	s.tell()
	for _, i := range all {
		echo(t, i.space, ":7000")
	}
	for _, i := range all {
		for _, o := range all {
			if i != o {
				wantPeer(t, i.space, o.Address.String()+":7000", i.Address.String())
				i.reaches(o.Address.String())
			}
		}
		i.reachesItsOwn()
	}
}

// exchange sends a lot and gets it back.
func exchange(t *testing.T, c net.Conn, size int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	line := make([]byte, 1)
	for line[0] != '\n' {
		if _, err := c.Read(line); err != nil {
			t.Fatal(err)
		}
	}
	sent := make([]byte, size)
	for n := range sent {
		sent[n] = byte(n * 7)
	}
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		done <- err
	}()
	got := make([]byte, size)
	_, err := io.ReadFull(c, got)
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Error("what came back is not what was sent")
	}
}

func TestLargePacketsFitTheWayBetweenHosts(t *testing.T) {
	s := newSite(t, 2, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	echo(t, b.space, ":7000")
	a.reaches("10.240.0.5")
	c, err := a.dial("", "10.240.0.5:7000", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// The segments are made to fit when the connection opens.
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		if mss, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG); err != nil || mss > 1410 {
			t.Errorf("segments of %d bytes, %v", mss, err)
		}
	})
	exchange(t, c, 8<<20)
	// What must not be cut in pieces is refused with the size that fits.
	var tooLong error
	eventually(t, "a router says what fits", func() bool {
		tooLong = a.inside(func() error {
			u, err := net.Dial("udp4", "10.240.0.5:9")
			if err != nil {
				return err
			}
			defer u.Close()
			raw, err := u.(*net.UDPConn).SyscallConn()
			if err != nil {
				return err
			}
			raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
			})
			if err != nil {
				return err
			}
			_, err = u.Write(make([]byte, 1460))
			return err
		})
		return errors.Is(tooLong, unix.EMSGSIZE)
	})
}

func TestSecurityGroupsHoldAcrossHosts(t *testing.T) {
	s := newSite(t, 2, nil)
	a := s.hosts[0].start(guarded(spec("a", "vpc", "10.240.0.4", 1), nil, []host.Pass{pass("tcp", 7000, 7001, "")}))
	b := s.hosts[1].start(guarded(spec("b", "vpc", "10.240.0.5", 2), []host.Pass{pass("tcp", 7000, 7000, "10.240.0.4/32"), pass("tcp", 7002, 7002, "")}, nil))
	s.tell()
	for port := 7000; port <= 7002; port++ {
		echo(t, b.space, fmt.Sprint(":", port))
		echo(t, a.space, fmt.Sprint(":", port))
	}
	wantPeer(t, a.space, "10.240.0.5:7000", "10.240.0.4")
	a.silent("", "10.240.0.5:7001") // the receiver's groups
	a.silent("", "10.240.0.5:7002") // the sender's
	b.silent("", "10.240.0.4:7000")
	b.Interfaces[0].Firewall.Inbound = nil
	b.update()
	a.silent("", "10.240.0.5:7000")
}

func TestEqualAddressesInTwoVPCsNeverMeetAcrossHosts(t *testing.T) {
	s := newSite(t, 2, nil)
	var all []*inst
	for n, r := range s.hosts {
		for v := range numbers {
			all = append(all, r.start(spec(fmt.Sprint("m", n, v), v, fmt.Sprint("10.240.0.", 4+n), byte(n))))
		}
	}
	s.tell()
	for _, i := range all {
		var l net.Listener
		err := i.inside(func() (err error) {
			l, err = net.Listen("tcp4", ":7000")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(c, i.ID)
				c.Close()
			}
		}()
	}
	for _, i := range all {
		for _, o := range all {
			if i.Address == o.Address || i.VPC != o.VPC {
				continue
			}
			i.reaches(o.Address.String())
			c, err := i.dial("", o.Address.String()+":7000", time.Second)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			c.Close()
			if err != nil || string(got) != o.ID {
				t.Errorf("%s reaches %q, want %s: %v", i.ID, got, o.ID, err)
			}
		}
	}
}

// forged is a packet from one machine to another in VXLAN: a datagram to port 9
// that says what it is.
func forged(network uint32, fromMAC, toMAC net.HardwareAddr, from, to, what string) []byte {
	b := []byte{0x08, 0, 0, 0}
	b = binary.BigEndian.AppendUint32(b, network<<8)
	b = append(append(append(b, toMAC...), fromMAC...), 0x08, 0)
	ip := make([]byte, 20)
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(20+8+len(what)))
	copy(ip[12:], netip.MustParseAddr(from).AsSlice())
	copy(ip[16:], netip.MustParseAddr(to).AsSlice())
	var sum uint32
	for n := 0; n < 20; n += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[n:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum))
	b = append(b, ip...)
	b = append(b, 0x30, 0x39, 0, 9)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(what)))
	return append(append(b, 0, 0), what...)
}

// send sends a datagram from a namespace.
func (s *site) send(space, to string, b []byte) {
	s.t.Helper()
	err := within(s.t, space, func() error {
		c, err := net.Dial("udp4", to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(b)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// hears opens port 9 of a machine, and returns what it has heard when something
// ends it.
func (i *inst) hears() func(last func()) []string {
	i.t.Helper()
	var c net.PacketConn
	err := i.inside(func() (err error) {
		c, err = net.ListenPacket("udp4", ":9")
		return err
	})
	if err != nil {
		i.t.Fatal(err)
	}
	return func(last func()) []string {
		i.t.Helper()
		defer c.Close()
		var out []string
		buf := make([]byte, 2000)
		for range 50 {
			last()
			c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			for {
				n, _, err := c.ReadFrom(buf)
				if err != nil {
					break
				}
				if string(buf[:n]) == "last" {
					return out
				}
				out = append(out, string(buf[:n]))
			}
		}
		i.t.Errorf("%s did not hear the last word", i.ID)
		return out
	}
}

func TestForgedPacketsBetweenHostsReachNobody(t *testing.T) {
	s := newSite(t, 3, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	c := s.hosts[2].start(spec("c", "vpc", "10.240.0.6", 3))
	d := s.hosts[0].start(spec("d", "vpc", "10.240.0.7", 4))
	other := s.hosts[2].start(spec("other", "other", "10.240.0.5", 5))
	far := s.hosts[0].start(spec("far", "other", "10.240.0.4", 6))
	s.tell()
	b.reaches("10.240.0.4")
	heard, heardFar := a.hears(), far.hears()
	to := hostAt(0).String() + ":4789"
	mac := macOf(hostAt(0))
	vni := numbers["vpc"]
	host0, host1, host2 := s.hosts[0].host, s.hosts[1].host, s.hosts[2].host
	for _, f := range []struct {
		space string
		from  netip.Addr // whose router it says it is from
		inner string
		what  string
	}{
		{s.stranger, hostAt(1), "10.240.0.5", "a stranger"},
		{s.stranger, netip.MustParseAddr(strangerAddress), "10.240.0.5", "a stranger with its own MAC"},
		{host1, hostAt(2), "10.240.0.6", "a host for a machine on another, with that one's MAC"},
		{host1, hostAt(1), "10.240.0.6", "a host for a machine on another"},
		{host1, hostAt(1), "10.240.0.7", "a host for a machine that is here"},
		{host1, hostAt(1), "10.240.0.200", "a host for a machine that nobody has"},
		{host1, hostAt(2), "10.240.0.5", "a host with another's MAC"},
		{host0, hostAt(1), "10.240.0.5", "this host itself"},
	} {
		s.send(f.space, to, forged(vni, macOf(f.from), mac, f.inner, "10.240.0.4", f.what))
	}
	// A host that has the address in another VPC only.
	s.send(host2, to, forged(vni, macOf(hostAt(2)), mac, "10.240.0.5", "10.240.0.4", "a host for another VPC's machine"))
	s.send(host1, to, forged(numbers["other"], macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "a host that has no machine in the VPC"))
	s.send(host1, to, forged(vni, macOf(hostAt(1)), net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, "10.240.0.5", "10.240.0.4", "to everybody"))
	arp := forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "no IP")
	arp[8+12], arp[8+13] = 0x08, 0x06
	s.send(host1, to, arp)
	if got := heard(func() {
		s.send(host1, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "last"))
	}); len(got) > 0 {
		t.Errorf("a machine heard %q", got)
	}
	if got := heardFar(func() {
		s.send(host2, to, forged(numbers["other"], macOf(hostAt(2)), mac, "10.240.0.5", "10.240.0.4", "last"))
	}); len(got) > 0 {
		t.Errorf("a machine of the other VPC heard %q", got)
	}
	c.reaches("10.240.0.4")
	d.reaches("10.240.0.5")
	other.reaches("10.240.0.4")
}

func TestEachWallAloneStopsAForgedPacketBetweenHosts(t *testing.T) {
	s := newSite(t, 2, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	b.reaches("10.240.0.4")
	r := s.hosts[0]
	to, mac, vni := hostAt(0).String()+":4789", macOf(hostAt(0)), numbers["vpc"]
	last := func() {
		s.send(s.hosts[1].host, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "last"))
	}

	heard := a.hears()
	r.in(r.host, "nft", "delete", "table", "ip", r.n.overlay.table)
	s.send(s.stranger, to, forged(vni, macOf(netip.MustParseAddr(strangerAddress)), mac, "10.240.0.5", "10.240.0.4", "past the host"))
	s.send(s.hosts[1].host, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.9", "10.240.0.4", "past the host"))
	if got := heard(last); len(got) > 0 {
		t.Errorf("without the host's rules a machine heard %q", got)
	}

	// The next change puts the host's rules back.
	s.hosts[1].start(spec("c", "vpc", "10.240.0.6", 3))
	s.tell()
	heard = a.hears()
	r.inRouter("vpc", func() error { return removeFilter(overlayDevice) })
	s.send(s.stranger, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "past the router"))
	s.send(s.hosts[1].host, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.9", "10.240.0.4", "past the router"))
	if got := heard(last); len(got) > 0 {
		t.Errorf("without the router's filter a machine heard %q", got)
	}
}

func TestAPeerReachesNothingButMachines(t *testing.T) {
	s := newSite(t, 2, &Uplink{})
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	b.reaches("10.240.0.4")
	r := s.hosts[0]
	var world net.PacketConn
	err := within(t, s.stranger, func() (err error) {
		world, err = net.ListenPacket("udp4", ":9")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer world.Close()
	heard := a.hears()
	to, mac, vni := hostAt(0).String()+":4789", macOf(hostAt(0)), numbers["vpc"]
	for _, inner := range []string{strangerAddress, "10.240.0.1", "169.254.169.254", "127.0.0.1", "10.240.0.5", "10.240.0.77"} {
		s.send(s.hosts[1].host, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", inner, "elsewhere"))
	}
	heard(func() {
		s.send(s.hosts[1].host, to, forged(vni, macOf(hostAt(1)), mac, "10.240.0.5", "10.240.0.4", "last"))
	})
	world.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, from, err := world.ReadFrom(make([]byte, 100)); err == nil {
		t.Errorf("a packet went through the router to the world, from %s", from)
	}
	var answers string
	r.inRouter("vpc", func() error {
		answers = r.in(r.n.prefix()+tag("vpc", 8), "nft", "list", "chain", "ip", "tabard", "input")
		return nil
	})
	if !strings.Contains(answers, `iifname "vx0" counter packets 1 `) {
		t.Errorf("the router's own address was not guarded:\n%s", answers)
	}
}

func TestAMachineCannotSpeakToHostsAsAHost(t *testing.T) {
	s := newSite(t, 2, &Uplink{})
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	evil := s.hosts[0].start(spec("evil", "evil", "10.240.0.66", 6))
	s.tell()
	a.reaches("10.240.0.5")
	heard := b.hears()
	to := hostAt(1).String() + ":4789"
	for range 3 {
		s.send(evil.space, to, forged(numbers["vpc"], macOf(hostAt(0)), macOf(hostAt(1)), "10.240.0.4", "10.240.0.5", "a machine"))
	}
	if got := heard(func() {
		s.send(s.hosts[0].host, to, forged(numbers["vpc"], macOf(hostAt(0)), macOf(hostAt(1)), "10.240.0.4", "10.240.0.5", "last"))
	}); len(got) > 0 {
		t.Errorf("a machine heard %q", got)
	}
	// It reaches other services of that host as it did.
	echo(t, s.hosts[1].host, hostAt(1).String()+":7000")
	wantPeer(t, evil.space, hostAt(1).String()+":7000", hostAt(0).String())
}

// A host that runs other things may hide them behind its own address, which the
// other hosts believe.
func TestWhatAHostHidesBehindItsAddressCannotSpeakAsAHost(t *testing.T) {
	s := newSite(t, 2, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	a.reaches("10.240.0.5")
	r := s.hosts[0]
	guest := "tabtest-" + r.state + "-guest"
	r.space(guest)
	r.in(r.host, "ip", "link", "add", "virbr0", "type", "veth", "peer", "name", "eth0", "netns", guest)
	r.in(r.host, "ip", "addr", "add", "192.168.122.1/24", "dev", "virbr0")
	r.in(r.host, "ip", "link", "set", "virbr0", "up")
	r.in(guest, "ip", "addr", "add", "192.168.122.2/24", "dev", "eth0")
	r.in(guest, "ip", "link", "set", "eth0", "up")
	r.in(guest, "ip", "route", "add", "default", "via", "192.168.122.1")
	r.in(r.host, "nft", "add table ip hide; add chain ip hide post { type nat hook postrouting priority srcnat; }; add rule ip hide post ip saddr 192.168.122.0/24 masquerade")
	r.in(r.host, "sysctl", "-w", "net.ipv4.ip_forward=1")
	t.Cleanup(func() {
		r.in(r.host, "nft", "delete table ip hide")
		r.in(r.host, "ip", "link", "del", "virbr0")
	})
	heard := b.hears()
	to := hostAt(1).String() + ":4789"
	for range 3 {
		s.send(guest, to, forged(numbers["vpc"], macOf(hostAt(0)), macOf(hostAt(1)), "10.240.0.4", "10.240.0.5", "a hidden machine"))
	}
	if got := heard(func() {
		s.send(r.host, to, forged(numbers["vpc"], macOf(hostAt(0)), macOf(hostAt(1)), "10.240.0.4", "10.240.0.5", "last"))
	}); len(got) > 0 {
		t.Errorf("a machine heard %q", got)
	}
	echo(t, s.hosts[1].host, hostAt(1).String()+":7000")
	wantPeer(t, guest, hostAt(1).String()+":7000", hostAt(0).String())
}

func TestVXLANOfOthersOnAHostGoesOn(t *testing.T) {
	s := newSite(t, 2, nil)
	for n, space := range []string{s.hosts[0].host, s.stranger} {
		remote := []string{strangerAddress, hostAt(0).String()}[n]
		s.hosts[0].in(space, "ip", "link", "add", "vxown", "type", "vxlan", "id", "42", "remote", remote, "dstport", "4789", "dev", "eth9")
		s.hosts[0].in(space, "ip", "addr", "add", fmt.Sprintf("10.99.99.%d/24", n+1), "dev", "vxown")
		s.hosts[0].in(space, "ip", "link", "set", "vxown", "up")
	}
	t.Cleanup(func() { s.hosts[0].in(s.hosts[0].host, "ip", "link", "del", "vxown") })
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	a.reaches("10.240.0.5")
	echo(t, s.hosts[0].host, "10.99.99.1:7000")
	wantPeer(t, s.stranger, "10.99.99.1:7000", "10.99.99.2")
}

func TestAPeerThatIsRemovedIsUnreachableAtOnceAndOthersGoOn(t *testing.T) {
	s := newSite(t, 3, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	c := s.hosts[2].start(spec("c", "vpc", "10.240.0.6", 3))
	s.tell()
	echo(t, b.space, ":7000")
	echo(t, c.space, ":7000")
	a.reaches("10.240.0.5")
	a.reaches("10.240.0.6")
	var conns []net.Conn
	for _, i := range []*inst{b, c} {
		conn, err := a.dial("", i.Address.String()+":7000", time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		exchange(t, conn, 1)
		conns = append(conns, conn)
	}
	a.Peers = slices.DeleteFunc(slices.Clone(a.Peers), func(p vpc.Peer) bool { return p.Address == b.Address })
	a.update()
	if a.ping("10.240.0.5") || b.ping("10.240.0.4") {
		t.Error("a peer that was removed is reached")
	}
	goesOn := func(c net.Conn) bool {
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Write([]byte{1}); err != nil {
			return false
		}
		_, err := c.Read(make([]byte, 1))
		return err == nil
	}
	if goesOn(conns[0]) {
		t.Error("a connection to a peer that was removed goes on")
	}
	if !goesOn(conns[1]) {
		t.Error("a connection to a peer that stays has ended")
	}
	// It comes back, as another machine: nobody inherits the connection.
	s.tell()
	a.reaches("10.240.0.5")
	if goesOn(conns[0]) {
		t.Error("a connection outlived the removal of its peer")
	}
	if !goesOn(conns[1]) {
		t.Error("a connection to a peer that stays has ended")
	}
}

func TestAnAddressMovesToAnotherHost(t *testing.T) {
	s := newSite(t, 3, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	a.reaches("10.240.0.5")
	b.remove()
	s.hosts[2].start(spec("b2", "vpc", "10.240.0.5", 3))
	s.tell()
	a.reaches("10.240.0.5")
	// And here, while the old list is still in force: the machine that is here is
	// the one that has it.
	here := s.hosts[0].start(spec("b3", "vpc", "10.240.0.5", 4))
	heard := a.hears()
	s.send(s.hosts[2].host, hostAt(0).String()+":4789",
		forged(numbers["vpc"], macOf(hostAt(2)), macOf(hostAt(0)), "10.240.0.5", "10.240.0.4", "from where it was"))
	if got := heard(func() { s.send(here.space, "10.240.0.4:9", []byte("last")) }); len(got) > 0 {
		t.Errorf("a machine heard %q", got)
	}
	here.remove()
	a.reaches("10.240.0.5")
}

func TestConnectionsAcrossHostsOutliveTheProcess(t *testing.T) {
	s := newSite(t, 2, nil)
	a := s.hosts[0].start(spec("a", "vpc", "10.240.0.4", 1))
	b := s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	echo(t, b.space, ":7000")
	a.reaches("10.240.0.5")
	conn, err := a.dial("", "10.240.0.5:7000", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	exchange(t, conn, 1)
	more := func() {
		t.Helper()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range s.hosts {
		i := r.insts[0]
		r.lose()
		more()
		r.insts = nil
		r.open(nil)
		taken, err := r.attach(i.Machine, i.space, host.Handlers{Metadata: names(i.ID)})
		if err != nil {
			t.Fatal(err)
		}
		more()
		before := r.reachState("vpc")
		taken.update()
		if after := r.reachState("vpc"); after != before {
			t.Errorf("an update without a change changed\n%s\nto\n%s", before, after)
		}
		more()
	}
}

func TestWhatLeadsToOtherHostsGoesWithTheLastMachine(t *testing.T) {
	s := newSite(t, 2, nil)
	r := s.hosts[0]
	before := r.hostState()
	a := r.start(spec("a", "vpc", "10.240.0.4", 1))
	s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	a.reaches("10.240.0.5")
	a.Peers = nil
	a.update()
	if after := r.hostState(); after != before {
		t.Errorf("without peers the host has\n%s\nbefore:\n%s", after, before)
	}
	if got := r.in(r.n.prefix()+tag("vpc", 8), "ip", "-o", "link"); strings.Contains(got, overlayDevice) {
		t.Errorf("without peers the router has %s", got)
	}
	s.tell()
	a.reaches("10.240.0.5")
	a.remove()
	if after := r.hostState(); after != before {
		t.Errorf("without machines the host has\n%s\nbefore:\n%s", after, before)
	}
	// At once again: nothing of the router before is in the way.
	a = r.start(spec("a", "vpc", "10.240.0.4", 1))
	s.tell()
	a.reaches("10.240.0.5")
	// And what a process left behind goes when it is swept.
	r.lose()
	r.insts = nil
	r.open(nil)
	if err := r.n.Sweep(context.Background()); err != nil {
		t.Fatal(err)
	}
	if after := r.hostState(); after != before {
		t.Errorf("after a sweep the host has\n%s\nbefore:\n%s", after, before)
	}
}

func TestAHostWithoutAnAddressForOthersTakesUpAndRemovesWhatLedToThem(t *testing.T) {
	s := newSite(t, 2, nil)
	r := s.hosts[0]
	before := r.hostState()
	a := r.start(spec("a", "vpc", "10.240.0.4", 1))
	s.hosts[1].start(spec("b", "vpc", "10.240.0.5", 2))
	s.tell()
	a.reaches("10.240.0.5")
	r.lose()
	r.insts = nil
	r.cfg.Overlay = nil
	r.open(nil)
	if _, err := r.attach(a.Machine, a.space, host.Handlers{Metadata: names("a")}); err != nil {
		t.Fatal(err)
	}
	if after := r.hostState(); after != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", after, before)
	}
}

// reachState is all that a host has for the VPC's machines elsewhere.
func (r *rig) reachState(vpcID string) string {
	r.t.Helper()
	space := r.n.prefix() + tag(vpcID, 8)
	var out []string
	for _, c := range []string{"ip route show dev vx0", "ip neigh show dev vx0", "bridge fdb show dev vx0", "nft list set netdev vx0 peers"} {
		out = append(out, r.in(space, strings.Fields(c)...))
	}
	return strings.Join(append(out, r.in(r.host, "nft", "list", "table", "ip", r.n.overlay.table)), "\n")
}

// TestWhatIsReachedIsWhatWasSaidLast changes who is where at random and compares
// what the kernel has with what it should.
func TestWhatIsReachedIsWhatWasSaidLast(t *testing.T) {
	s := newSite(t, 1, nil)
	r := s.hosts[0]
	rnd := rand.New(rand.NewPCG(1, 2))
	insts := map[string][]*inst{}
	for v := range numbers {
		for n := range 3 {
			insts[v] = append(insts[v], r.start(spec(fmt.Sprint(v, n), v, fmt.Sprint("10.240.0.", 4+n), byte(n))))
		}
	}
	said := map[string][]vpc.Peer{}
	for step := range 60 {
		v := []string{"vpc", "other"}[rnd.IntN(2)]
		var peers []vpc.Peer
		for a := range rnd.IntN(12) {
			if rnd.IntN(3) > 0 {
				peers = append(peers, vpc.Peer{Address: netip.AddrFrom4([4]byte{10, 240, 0, byte(5 + a)}), Host: hostAt(1 + rnd.IntN(4))})
			}
		}
		said[v] = peers
		for _, n := range rnd.Perm(3) {
			i := insts[v][n]
			i.Network, i.Peers = numbers[v], peers
			i.update()
		}
		if rnd.IntN(8) == 0 {
			r.lose()
			r.insts = nil
			r.open(nil)
			for v, list := range insts {
				for n, i := range list {
					taken, err := r.attach(i.Machine, i.space, host.Handlers{Metadata: names(i.ID)})
					if err != nil {
						t.Fatal(err)
					}
					insts[v][n] = taken
				}
			}
		}
		wantGuard := map[string]bool{}
		for v, peers := range said {
			wantRoutes, wantNeighbours, wantHosts, wantSet := map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
			for _, p := range peers {
				if p.Address.As4()[3] < 7 {
					continue // here
				}
				mac := macOf(p.Host)
				wantRoutes[p.Address.String()] = true
				wantNeighbours[p.Address.String()+" "+mac.String()] = true
				wantHosts[mac.String()+" "+p.Host.String()] = true
				wantSet[string(slices.Concat(mac, []byte{0, 0}, p.Address.AsSlice()))] = true
				wantGuard[networkKey(numbers[v])+string(p.Host.AsSlice())+string(p.Address.AsSlice())] = true
			}
			routes, neighbours, hosts, set := r.reached(v)
			for _, c := range []struct {
				what      string
				got, want map[string]bool
			}{{"routes", routes, wantRoutes}, {"neighbours", neighbours, wantNeighbours}, {"hosts", hosts, wantHosts}, {"filter", set, wantSet}} {
				if !sameKeys(c.got, c.want) {
					t.Fatalf("step %d: VPC %s has %s %v, want %v", step, v, c.what, c.got, c.want)
				}
			}
		}
		got := map[string]bool{}
		err := within(t, r.host, func() error {
			var err error
			got, err = readSet(r.n.overlay.guard().peers)
			return err
		})
		if err != nil || !sameKeys(got, wantGuard) {
			t.Fatalf("step %d: the host takes %v, want %v: %v", step, got, wantGuard, err)
		}
	}
}

func sameKeys(a, b map[string]bool) bool {
	if len(a) != len(b) {
		return false
	}
	for k := range a {
		if !b[k] {
			return false
		}
	}
	return true
}

// reached reads what the kernel has of a VPC's machines elsewhere.
func (r *rig) reached(vpcID string) (routes, peers, hosts, set map[string]bool) {
	r.t.Helper()
	routes, peers, hosts, set = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	r.inRouter(vpcID, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := namespace.Find(n, overlayDevice)
			if err != nil || link == nil {
				return err
			}
			to, err := routedTo(n, overlayDevice)
			if err != nil {
				return err
			}
			for _, a := range to {
				routes[a.String()] = true
			}
			near, err := neighbours(n, link)
			if err != nil {
				return err
			}
			for a, mac := range near {
				peers[a.String()+" "+mac] = true
			}
			far, err := forwarding(n, link)
			if err != nil {
				return err
			}
			for mac, a := range far {
				hosts[mac+" "+a.String()] = true
			}
			set, err = readSet(&nftables.Set{Table: filterTable(overlayDevice), Name: "peers"})
			return err
		})
	})
	return routes, peers, hosts, set
}

func TestManyMachinesOfVPCsOnSeveralHostsComeAndGoAtOnce(t *testing.T) {
	s := newSite(t, 2, nil)
	r := s.hosts[0]
	before := r.hostState()
	var far []vpc.Peer
	for n := range 4 {
		far = append(far, vpc.Peer{Address: netip.AddrFrom4([4]byte{10, 240, 0, byte(200 + n)}), Host: hostAt(1)})
	}
	there := s.hosts[1].start(spec("there", "vpc-0", "10.240.0.200", 99))
	for n := range 12 {
		there.Peers = append(there.Peers, vpc.Peer{Address: netip.AddrFrom4([4]byte{10, 240, 0, byte(10 + n)}), Host: hostAt(0)})
	}
	there.Network = 100
	there.update()
	var each sync.WaitGroup
	for n := range 12 {
		each.Go(func() {
			for turn := range 3 {
				m := spec(fmt.Sprintf("0717_%d", n), fmt.Sprintf("vpc-%d", n%3), fmt.Sprintf("10.240.0.%d", 10+n), byte(n))
				m.Network, m.Peers = uint32(100+n%3), far
				space := fmt.Sprintf("tabtest-%s-many-%d", r.state, n)
				ns, err := namespace.Create(space, func() error { return namespace.Up("lo") })
				if err != nil {
					t.Error(err)
					return
				}
				p, err := r.n.AttachNamespace(context.Background(), m, host.Handlers{Metadata: names(m.ID)}, ns)
				ns.Close()
				if err == nil {
					m.Peers = far[:1+(n+turn)%4]
					err = p.Update(context.Background(), m)
				}
				if err == nil {
					if n%3 == 0 {
						(&inst{rig: r, Machine: m, space: space}).reaches("10.240.0.200")
					}
					err = p.Detach(context.Background())
				}
				if err := errors.Join(err, namespace.Remove(space)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		if err := r.n.Sweep(context.Background()); err != nil {
			t.Error(err)
		}
	}
	each.Wait()
	if after := r.hostState(); after != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", after, before)
	}
}
