package network

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
)

// Addresses of the host and of the world outside, as the tests have them.
const (
	hostAddress  = "192.0.2.1"
	worldAddress = "192.0.2.2"
	floatingA    = "198.51.100.4"
	floatingB    = "198.51.100.5"
)

// newWorldRig is a rig whose host has a way out, to one other machine. That one
// routes floating addresses to the host, and knows nothing of private ones.
func newWorldRig(t *testing.T) (*rig, string) {
	t.Helper()
	r := newUplinkRig(t, uplinkConfig())
	world := "tabtest-" + r.state + "-world"
	r.space(world)
	r.in(r.host, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", "eth9", "netns", world)
	for space, address := range map[string]string{r.host: hostAddress, world: worldAddress} {
		// Its addresses of IPv6 would come up at some time of their own.
		if err := within(t, space, func() error { return namespace.DisableIPv6("eth9") }); err != nil {
			t.Fatal(err)
		}
		r.in(space, "ip", "addr", "add", address+"/24", "dev", "eth9")
		r.in(space, "ip", "link", "set", "eth9", "up")
	}
	r.carries(r.host, "eth9")
	r.in(world, "ip", "route", "add", "198.51.100.0/24", "via", hostAddress)
	t.Cleanup(func() { r.in(r.host, "ip", "link", "del", "eth9") })
	return r, world
}

func uplinkConfig() *Uplink {
	return &Uplink{
		Reachable: []netip.AddrPort{netip.MustParseAddrPort(hostAddress + ":8470")},
		Resolvers: []netip.AddrPort{netip.MustParseAddrPort(worldAddress + ":53")},
	}
}

// echo answers each connection to a port of a namespace with the peer's address,
// and then whatever it is sent.
func echo(t *testing.T, space, at string) {
	t.Helper()
	var l net.Listener
	err := within(t, space, func() (err error) {
		l, err = net.Listen("tcp4", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				peer, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				fmt.Fprintln(c, peer)
				// Wrapped, because pipes that splice would use stay open for a while.
				io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		running.Wait()
	})
}

func dialFrom(t *testing.T, space, to string) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	err := within(t, space, func() (err error) {
		c, err = net.DialTimeout("tcp4", to, time.Second)
		return err
	})
	return c, err
}

// peerSeen connects and returns the address that the other end saw, or "".
func peerSeen(t *testing.T, space, to string) string {
	t.Helper()
	c, err := dialFrom(t, space, to)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	line := make([]byte, 64)
	n, err := c.Read(line)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(line[:n]))
}

// wantPeer waits, because the first packet on a new path waits for ARP.
func wantPeer(t *testing.T, space, to, want string) {
	t.Helper()
	var got string
	for range 5 {
		if got = peerSeen(t, space, to); got != "" {
			break
		}
	}
	if got != want {
		t.Errorf("%s was seen by %s as %q, want %q", space, to, got, want)
	}
}

func wantNobody(t *testing.T, space, to string) {
	t.Helper()
	if got := peerSeen(t, space, to); got != "" {
		t.Errorf("%s reached %s as %s", space, to, got)
	}
}

func floats(m host.Machine, address string) host.Machine {
	m.Interfaces = slices.Clone(m.Interfaces)
	m.Interfaces[0].Floating = netip.Addr{}
	if address != "" {
		m.Interfaces[0].Floating = netip.MustParseAddr(address)
	}
	return m
}

func TestAMachineGoesOutAsItsHostAndWithAFloatingAddressAsItself(t *testing.T) {
	r, world := newWorldRig(t)
	echo(t, world, worldAddress+":7")
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(floats(spec("0717_b", "vpc-1", "10.240.0.5", 5), floatingB))
	twin := r.start(spec("0717_t", "vpc-2", "10.240.0.4", 4))
	wantPeer(t, a.space, worldAddress+":7", hostAddress)
	wantPeer(t, twin.space, worldAddress+":7", hostAddress)
	wantPeer(t, b.space, worldAddress+":7", floatingB)
	a.reachesItsOwn()
	twin.reachesItsOwn()
}

func TestAFloatingAddressIsReachedFromEverywhereAndShowsWhoIsCalling(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	same := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	other := r.start(spec("0717_c", "vpc-2", "10.240.0.4", 4))
	named := r.start(floats(spec("0717_d", "vpc-2", "10.240.0.6", 6), floatingB))
	echo(t, a.space, "10.240.0.4:7")
	wantPeer(t, world, floatingA+":7", worldAddress)
	wantPeer(t, r.host, floatingA+":7", hostAddress)
	wantPeer(t, same.space, floatingA+":7", "10.240.0.5")
	wantPeer(t, other.space, floatingA+":7", "100.127.0.3")
	wantPeer(t, named.space, floatingA+":7", floatingB)
}

func TestAFloatingAddressMovesWhileItsMachinesRun(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	c := r.start(spec("0717_c", "vpc-2", "10.240.0.4", 4))
	greet := func(i *inst, port string) { echo(t, i.space, i.Address.String()+":"+port) }
	greet(a, "7")
	greet(b, "8")
	greet(c, "9")
	wantPeer(t, world, floatingA+":7", worldAddress)

	// Taken by b before a has let go, then by c in another VPC, then by nobody.
	b.Machine = floats(b.Machine, floatingA)
	b.update()
	wantPeer(t, world, floatingA+":8", worldAddress)
	wantNobody(t, world, floatingA+":7")
	a.Machine = floats(a.Machine, "")
	a.update()
	wantPeer(t, world, floatingA+":8", worldAddress)

	c.Machine = floats(c.Machine, floatingA)
	c.update()
	wantPeer(t, world, floatingA+":9", worldAddress)
	wantNobody(t, world, floatingA+":8")
	b.Machine = floats(b.Machine, "")
	b.update()
	wantPeer(t, world, floatingA+":9", worldAddress)

	c.Machine = floats(c.Machine, "")
	c.update()
	wantNobody(t, world, floatingA+":9")
	if routes := r.in(r.host, "ip", "route"); strings.Contains(routes, "198.51.100") {
		t.Errorf("the host still routes the address: %s", routes)
	}
}

// An open connection must not go on to whom the address leads now.
func TestAConnectionToAFloatingAddressEndsWhenItIsTakenAway(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	echo(t, a.space, "10.240.0.4:7")
	wantPeer(t, world, floatingA+":7", worldAddress)
	c, err := dialFrom(t, world, floatingA+":7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	line := make([]byte, 64)
	if _, err := c.Read(line); err != nil {
		t.Fatal(err)
	}
	a.Machine = floats(a.Machine, "")
	a.update()
	io.WriteString(c, "still there?")
	c.SetDeadline(time.Now().Add(time.Second))
	if n, err := c.Read(line); err == nil {
		t.Errorf("an answer: %q", line[:n])
	}
}

func TestMachinesOfDifferentVPCsMeetByFloatingAddressesOnly(t *testing.T) {
	r, world := newWorldRig(t)
	echo(t, world, worldAddress+":7")
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	twin := r.start(spec("0717_t", "vpc-2", "10.240.0.4", 4))
	far := r.start(spec("0717_f", "vpc-2", "10.240.0.9", 9))
	apart := spec("0717_s", "vpc-2", "10.241.0.9", 10)
	apart.Interfaces[0].Subnet = netip.MustParsePrefix("10.241.0.0/24")
	other := r.start(apart)
	for _, i := range []*inst{twin, far, other} {
		echo(t, i.space, i.Address.String()+":7")
		wantPeer(t, i.space, worldAddress+":7", hostAddress)
	}
	wantPeer(t, a.space, worldAddress+":7", hostAddress)
	var each sync.WaitGroup
	// 100.127.0.2 and 3 are the link of the other VPC.
	for _, to := range []string{"10.240.0.9", "10.241.0.9", "100.127.0.0", "100.127.0.1", "100.127.0.2", "100.127.0.3"} {
		each.Go(func() {
			wantNobody(t, a.space, to+":7")
			if a.ping(to) {
				t.Errorf("machine a gets an answer from %s", to)
			}
		})
	}
	each.Wait()
	// Not even when the host routes the address into the router by mistake.
	r.in(r.host, "ip", "route", "add", "10.241.0.9/32", "via", "100.127.0.3")
	for _, space := range []string{a.space, world, r.host} {
		each.Go(func() { wantNobody(t, space, "10.241.0.9:7") })
	}
	each.Wait()
}

func TestMachinesReachNothingOfTheHostButWhatIsNamed(t *testing.T) {
	r, _ := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	for _, port := range []string{":22", ":8470", ":53", ":80", ":443"} {
		echo(t, r.host, "0.0.0.0"+port)
	}
	wantPeer(t, a.space, hostAddress+":8470", floatingA)
	wantPeer(t, b.space, hostAddress+":8470", "100.127.0.1")
	var each sync.WaitGroup
	for _, i := range []*inst{a, b} {
		for _, to := range []string{
			hostAddress + ":22", hostAddress + ":53", "100.127.0.0:22", "100.127.0.0:8470", "100.127.0.1:53", "100.127.0.1:80",
			"10.240.0.1:22", "169.254.169.254:22", "169.254.169.254:443",
		} {
			each.Go(func() { i.silent("", to) })
		}
		each.Go(func() {
			if i.ping(hostAddress) {
				t.Errorf("%s gets an answer from the host", i.ID)
			}
		})
	}
	each.Wait()
	// The other way the host may speak to its machines.
	echo(t, a.space, "10.240.0.4:7")
	wantPeer(t, r.host, floatingA+":7", hostAddress)
}

func TestLoopbackAndLinkLocalAddressesAreNotRouted(t *testing.T) {
	r, world := newWorldRig(t)
	r.in(world, "ip", "addr", "add", "169.254.7.7/32", "dev", "eth9")
	r.in(r.host, "ip", "route", "add", "169.254.7.7/32", "via", worldAddress)
	echo(t, world, "169.254.7.7:7")
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	wantPeer(t, r.host, "169.254.7.7:7", hostAddress)
	a.silent("", "169.254.7.7:7")
	r.in(a.space, "sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1", "net.ipv4.conf.eth0.route_localnet=1")
	r.in(a.space, "ip", "route", "add", "127.7.7.7/32", "via", "10.240.0.1", "table", "local", "onlink", "dev", "eth0")
	echo(t, r.host, "127.7.7.7:7")
	wantNobody(t, a.space, "127.7.7.7:7")
}

func TestTheHostIsAsBeforeWhenTheLastMachineIsGone(t *testing.T) {
	r, _ := newWorldRig(t)
	before := r.hostState()
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(spec("0717_b", "vpc-2", "10.240.0.5", 5))
	for _, i := range []*inst{a, b} {
		if r.hostState() == before {
			t.Error("the host has no uplink")
		}
		if err := i.port.Detach(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if after := r.hostState(); after != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", after, before)
	}
	again := r.start(spec("0717_c", "vpc-3", "10.240.0.4", 4))
	again.reachesItsOwn()
}

func TestAnUplinkThatIsUsedUpIsAnErrorAndLeavesNothing(t *testing.T) {
	r := newUplinkRig(t, &Uplink{Range: netip.MustParsePrefix("100.127.9.0/30")})
	r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-2", "10.240.0.4", 4))
	space := "tabtest-" + r.state + "-full"
	r.space(space)
	if _, err := r.attach(spec("0717_c", "vpc-3", "10.240.0.4", 4), space, host.Handlers{Metadata: names("0717_c")}); err == nil {
		t.Error("a third VPC was joined by two links")
	}
	if left, err := namespace.Named(r.n.prefix()); err != nil || len(left) != 2 {
		t.Errorf("routers: %v, %v", left, err)
	}
}

// dnsServer answers by UDP and TCP in a namespace with what f makes of a query.
func dnsServer(t *testing.T, space, at string, f func(query []byte, overTCP bool) []byte) {
	t.Helper()
	var p net.PacketConn
	var l net.Listener
	err := within(t, space, func() (err error) {
		if p, err = net.ListenPacket("udp4", at); err != nil {
			return err
		}
		l, err = net.Listen("tcp4", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Close()
		l.Close()
	})
	go func() {
		buf := make([]byte, 2048)
		for {
			n, peer, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer := f(slices.Clone(buf[:n]), false); answer != nil {
				p.WriteTo(answer, peer)
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if query, err := readMessage(c, 2048); err == nil {
				writeMessage(c, f(query, true))
			}
			c.Close()
		}
	}()
}

// exchange sends a query from a machine and returns the answer, or nil.
func (i *inst) exchange(network, to string, query []byte) []byte {
	i.t.Helper()
	var c net.Conn
	err := i.inside(func() (err error) {
		c, err = net.DialTimeout(network, to, time.Second)
		return err
	})
	if err != nil {
		return nil
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if network == "tcp4" {
		if writeMessage(c, query) != nil {
			return nil
		}
		answer, err := readMessage(c, maxResponse)
		if err != nil {
			return nil
		}
		return answer
	}
	if _, err := c.Write(query); err != nil {
		return nil
	}
	buf := make([]byte, maxResponse)
	n, err := c.Read(buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}

func TestTheResolverKnowsTheMetadataServiceAndAsksTheHostsResolversForTheRest(t *testing.T) {
	r, world := newWorldRig(t)
	dnsServer(t, world, worldAddress+":53", func(q []byte, overTCP bool) []byte {
		answer := slices.Concat(q[:2], []byte{0x81, 0x80}, q[4:12], q[12:])
		binary.BigEndian.PutUint16(answer[6:], 1)
		// A record for the name at offset 12.
		return append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 7)
	})
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	for _, network := range []string{"udp4", "tcp4"} {
		for name, want := range map[string]string{metadataName: "169.254.169.254", "Api.Metadata.Cloud.IBM.com.": "169.254.169.254", "example.com.": "203.0.113.7"} {
			got := addressIn(t, a.exchange(network, "10.240.0.1:53", queryFor(t, 77, name, false)), 77)
			if got != want {
				t.Errorf("%s of %s: %q, want %q", network, name, got, want)
			}
		}
	}
}

func TestWithoutAnUplinkTheResolverKnowsTheMetadataServiceAlone(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	if got := addressIn(t, a.exchange("udp4", "10.240.0.1:53", queryFor(t, 1, metadataName, true)), 1); got != "169.254.169.254" {
		t.Errorf("the metadata service is at %q", got)
	}
	if got := a.exchange("udp4", "10.240.0.1:53", queryFor(t, 1, "example.com.", false)); len(got) < 12 || got[3]&15 != 5 {
		t.Errorf("another name: %v, want REFUSED", got)
	}
}

func TestTheResolverServesNobodyButItsMachine(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	other := spec("0717_c", "vpc-1", "10.240.64.4", 6)
	other.Interfaces[0].Subnet = netip.MustParsePrefix("10.240.64.0/24")
	c := r.start(other)
	q := queryFor(t, 9, metadataName, false)
	var each sync.WaitGroup
	for what, from := range map[string]*inst{"world": {rig: r, space: world}, "host": {rig: r, space: r.host}, "another subnet": c} {
		for _, network := range []string{"udp4", "tcp4"} {
			for _, to := range []string{"10.240.0.1:53", "100.127.0.1:53", floatingA + ":53"} {
				each.Go(func() {
					if got := from.exchange(network, to, q); got != nil {
						t.Errorf("%s gets an answer at %s by %s", what, to, network)
					}
				})
			}
		}
	}
	each.Wait()
	for _, i := range []*inst{a, b} {
		if got := addressIn(t, i.exchange("udp4", "10.240.0.1:53", q), 9); got != "169.254.169.254" {
			t.Errorf("%s: %q", i.ID, got)
		}
	}
}

func TestAFloodOfQueriesLeavesTheResolverOfOthersAlone(t *testing.T) {
	r, _ := newWorldRig(t) // nobody answers at the host's resolver
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	var c net.Conn
	err := a.inside(func() (err error) {
		c, err = net.Dial("udp4", "10.240.0.1:53")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for n := range 2000 {
		c.Write(queryFor(t, uint16(n), "flood.example.", false))
	}
	c.Write(make([]byte, 60000))
	if got := addressIn(t, b.exchange("udp4", "10.240.0.1:53", queryFor(t, 5, metadataName, false)), 5); got != "169.254.169.254" {
		t.Errorf("machine b gets %q", got)
	}
	eventually(t, "the resolver of a answers again", func() bool {
		return addressIn(t, a.exchange("udp4", "10.240.0.1:53", queryFor(t, 6, metadataName, false)), 6) == "169.254.169.254"
	})
}
