package vm

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// silent checks that nobody answers inside at any of the addresses: neither by
// taking a connection nor by refusing it.
func (b *box) silent(t *testing.T, addresses ...string) {
	t.Helper()
	each(b.space, addresses, func(to string, err error) {
		if timeout := net.Error(nil); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s is answered by %s: %v", b.Name, to, err)
		}
	})
}

// nobody checks that no connection from a namespace is taken, while one may be
// refused.
func nobody(t *testing.T, space string, addresses ...string) {
	t.Helper()
	each(space, addresses, func(to string, err error) {
		if err == nil {
			t.Errorf("%s is reached from %s", to, space)
		}
	})
}

// each tries to connect to all the addresses at once.
func each(space string, addresses []string, check func(string, error)) {
	errs := make([]error, len(addresses))
	var wg sync.WaitGroup
	for n, to := range addresses {
		wg.Go(func() {
			c, err := dialFrom(space, to, net.Dialer{})
			if err == nil {
				c.Close()
			}
			errs[n] = err
		})
	}
	wg.Wait()
	for n, to := range addresses {
		check(to, errs[n])
	}
}

// listen gathers the frames that fit and come in at each of the cards, until
// the time of silence is over.
func listen(fits func([]byte) bool, at ...*packets) [][][]byte {
	heard := make([][][]byte, len(at))
	var wg sync.WaitGroup
	for n, p := range at {
		wg.Go(func() { heard[n] = p.gather(fits) })
	}
	wg.Wait()
	return heard
}

// What an instance puts on its wire must not make it anybody else, nor get it
// anything but its own service.
func TestNothingThatAnInstanceSendsMakesItAnother(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	s.cli("is", "subnet-create", "other-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "16")
	boxes := s.boxes("thief", "victim", "witness")
	thief, victim, witness := boxes[0], boxes[1], boxes[2]
	thief.works(t)
	victim.works(t)

	mine, theirs := netip.MustParseAddr(thief.address()), netip.MustParseAddr(victim.address())
	tp, vp := thief.packets(t), victim.packets(t)
	router := func(b *box) net.HardwareAddr {
		t.Helper()
		mac, err := net.ParseMAC(s.neighbours(t, b.space)["169.254.169.254"])
		if err != nil {
			t.Fatal(err)
		}
		return mac
	}
	myGate, theirGate := router(thief), router(victim)
	port := uint16(2000)
	syn := func(from netip.Addr, by ...netip.Addr) []byte {
		port++
		return opening(from, metadata, port, by...)
	}

	s.sub("its own frames are answered", func(t *testing.T) {
		tp.send(ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(mine)))
		if heard := listen(isAnswer, tp); len(heard[0]) == 0 {
			t.Error("not even the thief's honest frame is answered, so this test shows nothing")
		}
	})
	s.sub("a neighbour's address as the source is not answered", func(t *testing.T) {
		thief.mustSh("ip addr add " + victim.address() + "/32 dev eth0")
		if a := thief.curl(quick(wantToken(service, "--interface", victim.address())...)...); !a.timedOut() {
			t.Errorf("the thief got %s", a)
		}
		thief.mustSh("ip addr del " + victim.address() + "/32 dev eth0")
		thief.works(t)
	})
	s.sub("a neighbour's MAC is not answered", func(t *testing.T) {
		own := tp.mac.String()
		thief.mustSh("ip link set eth0 address " + vp.mac.String())
		if a := thief.curl(quick(wantToken(service)...)...); !a.timedOut() {
			t.Errorf("the thief got %s", a)
		}
		thief.mustSh("ip link set eth0 address " + own)
		thief.works(t)
	})
	s.sub("a neighbour's MAC and address together are not answered", func(t *testing.T) {
		thief.mustSh("ip link set eth0 address " + vp.mac.String() + " && ip addr add " + victim.address() + "/24 dev eth0")
		if a := thief.curl(quick(wantToken(service, "--interface", victim.address())...)...); !a.timedOut() {
			t.Errorf("the thief got %s", a)
		}
		victim.works(t)
		thief.mustSh("ip addr del " + victim.address() + "/24 dev eth0 && ip link set eth0 address " + tp.mac.String())
		thief.works(t)
	})
	gateway := netip.MustParsePrefix(thief.address() + "/24").Masked().Addr().Next()
	frames := []struct {
		name string
		port uint16
		raw  []byte
	}{}
	forge := func(name string, frame []byte) {
		frames = append(frames, struct {
			name string
			port uint16
			raw  []byte
		}{name, port, frame})
	}
	forge("with a neighbour's address", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(theirs)))
	forge("with a neighbour's MAC", ethernet(myGate, vp.mac, unix.ETH_P_IP, syn(mine)))
	forge("with a neighbour's MAC and address", ethernet(myGate, vp.mac, unix.ETH_P_IP, syn(theirs)))
	forge("to a neighbour's router port", ethernet(theirGate, vp.mac, unix.ETH_P_IP, syn(theirs)))
	forge("to everybody with a neighbour's address", ethernet(everybody, tp.mac, unix.ETH_P_IP, syn(theirs)))
	forge("with the gateway's address", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(gateway)))
	forge("with the metadata service's address", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(metadata)))
	forge("with a link-local address", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(netip.MustParseAddr("169.254.1.1"))))
	forge("with a loopback address", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(netip.MustParseAddr("127.0.0.1"))))
	forge("in a VLAN", ethernet(myGate, tp.mac, 0x8100, []byte{0, 1, 8, 0}, syn(theirs)))
	forge("in two VLANs", ethernet(myGate, tp.mac, 0x88a8, []byte{0, 1, 0x81, 0, 0, 1, 8, 0}, syn(theirs)))
	forge("in another packet to its gateway", ethernet(myGate, tp.mac, unix.ETH_P_IP, ipv4(mine, gateway, unix.IPPROTO_IPIP, nil, syn(theirs))))
	forge("by way of a neighbour", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(mine, theirs)))
	forge("by way of its gateway", ethernet(myGate, tp.mac, unix.ETH_P_IP, syn(mine, gateway)))
	for _, f := range frames {
		tp.send(f.raw)
	}
	answered := map[uint16]bool{}
	for _, heard := range listen(isAnswer, tp, vp) {
		for _, f := range heard {
			answered[binary.BigEndian.Uint16(f[36:])] = true
		}
	}
	for _, f := range frames {
		s.sub("a frame "+f.name+" is not answered", func(t *testing.T) {
			if answered[f.port] {
				t.Errorf("the frame %x was answered", f.raw)
			}
		})
	}

	s.sub("ARP for the gateway moves nobody's traffic", func(t *testing.T) {
		before := s.neighbours(t, victim.space)
		for _, claimed := range []netip.Addr{gateway, metadata} {
			tp.send(ethernet(everybody, tp.mac, unix.ETH_P_ARP, arp(1, tp.mac, claimed, make(net.HardwareAddr, 6), claimed)))
			tp.send(ethernet(vp.mac, tp.mac, unix.ETH_P_ARP, arp(2, tp.mac, claimed, vp.mac, theirs)))
		}
		for _, heard := range listen(func(f []byte) bool { return bytes.Equal(f[6:12], tp.mac) }, vp) {
			for _, f := range heard {
				t.Errorf("the victim got %x", f)
			}
		}
		victim.works(t)
		after := s.neighbours(t, victim.space)
		for _, claimed := range []netip.Addr{gateway, metadata} {
			if at := before[claimed.String()]; at != "" && after[claimed.String()] != at {
				t.Errorf("the victim believes that %s is at %s, not %s", claimed, after[claimed.String()], at)
			}
		}
		thief.works(t)
	})
	s.sub("ARP for a neighbour's address moves none of its traffic", func(t *testing.T) {
		var l net.Listener
		err := within(victim.space, func() (err error) {
			l, err = net.Listen("tcp4", ":7000")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for range 3 {
			tp.send(ethernet(everybody, tp.mac, unix.ETH_P_ARP, arp(1, tp.mac, theirs, make(net.HardwareAddr, 6), theirs)))
			tp.send(ethernet(myGate, tp.mac, unix.ETH_P_ARP, arp(2, tp.mac, theirs, myGate, netip.MustParseAddr(witness.address()))))
		}
		c, err := dialFrom(witness.space, victim.address()+":7000", net.Dialer{})
		if err != nil {
			t.Fatalf("the witness does not reach the victim any more: %v", err)
		}
		c.Close()
		for space := range s.spaces(thief.host.mark() + "-r-") {
			for address, mac := range s.neighbours(t, space) {
				if mac == tp.mac.String() && address != thief.address() {
					t.Errorf("the router believes that %s is at the thief", address)
				}
			}
		}
		victim.works(t)
	})
	s.sub("a search for a DHCP server finds none", func(t *testing.T) {
		offers := func(f []byte) bool {
			return len(f) > 42 && f[23] == unix.IPPROTO_UDP && f[36] == 0 && f[37] == 68
		}
		tp.send(ethernet(everybody, tp.mac, unix.ETH_P_IP, discover(tp.mac)))
		for _, heard := range listen(offers, tp, vp) {
			for _, f := range heard {
				t.Errorf("an offer: %x", f)
			}
		}
	})
	s.sub("the rest of the link-local range is silent", func(t *testing.T) {
		thief.mustSh("ip route replace 169.254.0.0/16 dev eth0")
		thief.silent(t, "169.254.169.253:80", "169.254.169.254:443", "169.254.169.254:22", "169.254.169.254:53", "169.254.169.254:8080",
			"169.254.169.254:8470", "169.254.0.1:80", "169.254.255.254:80", "169.254.170.2:80")
		thief.mustSh("ip route del 169.254.0.0/16 dev eth0")
	})
	s.sub("a gateway's address serves no metadata", func(t *testing.T) {
		var subnets []struct {
			CIDR string `json:"ipv4_cidr_block"`
		}
		s.json(&subnets, "is", "subnets")
		var all []string
		for _, n := range subnets {
			gateway := netip.MustParsePrefix(n.CIDR).Masked().Addr().Next().String()
			all = append(all, gateway+":80", gateway+":443")
		}
		if len(all) != 4 {
			t.Fatalf("subnets %+v", subnets)
		}
		nobody(t, thief.space, all...)
	})
	s.sub("a route through a neighbour leads to one's own service", func(t *testing.T) {
		for _, by := range []string{victim.address(), gateway.String()} {
			thief.mustSh("ip route replace 169.254.169.254/32 via " + by + " dev eth0 onlink")
			thief.works(t)
		}
		thief.mustSh("ip route replace 169.254.169.254/32 dev eth0 scope link")
		thief.works(t)
		nobody(t, thief.space, victim.address()+":80", victim.address()+":443")
	})
}

// spaces are the namespaces whose names begin so.
func (s *site) spaces(prefix string) map[string]bool {
	s.t.Helper()
	entries, err := os.ReadDir("/run/netns")
	if err != nil {
		s.t.Fatal(err)
	}
	out := map[string]bool{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			out[e.Name()] = true
		}
	}
	return out
}

// An instance reaches its VPC and the world outside, and neither the machine
// that it is on nor anybody else's network.
func TestAnInstanceReachesNeitherItsHostNorOtherNetworks(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	a := s.box("instance-a")
	s.cli("is", "vpc-create", "other-vpc")
	s.cli("is", "subnet-create", "other-subnet", "other-vpc", "--zone", "us-south-3", "--ipv4-cidr-block", netip.MustParsePrefix(a.address()+"/24").Masked().String())
	s.cli("is", "instance-create", "stranger", "other-vpc", "us-south-3", "bx2-2x8", "other-subnet", "--image", "tabard-local-1", "--metadata-service", "true")
	s.cli("is", "instance-create", "far-stranger", "other-vpc", "us-south-3", "bx2-2x8", "other-subnet", "--image", "tabard-local-1", "--metadata-service", "true")
	twin, stranger := s.boxNamed("stranger"), s.boxNamed("far-stranger")
	if twin.address() != a.address() || stranger.address() == a.address() {
		t.Fatalf("the strangers have %s and %s; the first should have the address of %s, the other none of its network", twin.address(), stranger.address(), a.address())
	}

	host := s.hosts[0]
	var accepted counter
	for _, where := range []struct{ space, at string }{{host.space, "0.0.0.0:22"}, {host.space, "0.0.0.0:9000"}, {stranger.space, "0.0.0.0:7000"}} {
		var l net.Listener
		err := within(where.space, func() (err error) {
			l, err = net.Listen("tcp4", where.at)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		stop := accepted.take(l)
		defer stop()
	}
	var udp net.PacketConn
	if err := within(host.space, func() (err error) {
		udp, err = net.ListenPacket("udp4", "0.0.0.0:9000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer udp.Close()

	s.sub("it reaches the world outside", func(t *testing.T) {
		if got := a.curl("-k", serverURL+"/readyz"); got.status != 200 {
			t.Errorf("the server answers %s", got)
		}
		c, err := dialFrom(s.core, host.address+":22", net.Dialer{})
		if err != nil {
			t.Fatalf("nothing listens on the host, so this test shows nothing: %v", err)
		}
		c.Close()
		s.await("the host's listener has taken it", func() bool { return accepted.clear() == 1 })
	})
	s.sub("it does not reach the host's own services", func(t *testing.T) {
		at := s.addresses(t, host.space)
		gateway := netip.MustParsePrefix(a.address() + "/24").Masked().Addr().Next().String()
		var all []string
		for _, address := range append(at, gateway, "169.254.169.254") {
			all = append(all, address+":22", address+":9000")
		}
		if len(at) < 3 {
			t.Fatalf("the host has the addresses %v, and should have those of its uplinks too", at)
		}
		nobody(t, a.space, all...)
		var sent []string
		for _, address := range at {
			err := within(a.space, func() error {
				c, err := net.Dial("udp4", address+":9000")
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = io.WriteString(c, "to "+address)
				return err
			})
			if err == nil {
				sent = append(sent, address)
			}
		}
		if err := udp.SetReadDeadline(time.Now().Add(silence)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		if n, from, err := udp.ReadFrom(buf); err == nil {
			t.Errorf("the host got %q from %s; sent to %v", buf[:n], from, sent)
		}
		if n := accepted.clear(); n != 0 {
			t.Errorf("the host has taken %d connections", n)
		}
	})
	s.sub("it does not reach an instance of another VPC", func(t *testing.T) {
		all := []string{stranger.address() + ":7000"}
		for _, address := range append(s.uplinks(t, host), s.addresses(t, host.space)...) {
			all = append(all, address+":7000")
		}
		nobody(t, a.space, all...)
		if n := accepted.clear(); n != 0 {
			t.Errorf("the stranger has taken %d connections", n)
		}
		if got := subject(a.identity(60)); got != a.ID {
			t.Errorf("beside a stranger with its address, it gets the identity of %s", got)
		}
		if got := subject(twin.identity(60)); got != twin.ID {
			t.Errorf("the stranger with its address gets the identity of %s", got)
		}
	})
	s.sub("nobody outside reaches it without a floating address", func(t *testing.T) {
		var l net.Listener
		if err := within(a.space, func() (err error) {
			l, err = net.Listen("tcp4", "0.0.0.0:7000")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer accepted.take(l)()
		s.ip(s.core, "route replace "+a.address()+"/32 via "+host.address)
		var all []string
		for _, address := range append(s.uplinks(t, host), a.address()) {
			s.ip(s.core, "route replace "+address+"/32 via "+host.address)
			all = append(all, address+":7000", address+":80")
		}
		nobody(t, s.core, all...)
		s.ip(s.core, "route replace 169.254.169.254/32 via "+host.address)
		if got := s.curl(s.core, quick(wantToken(service)...)...); got.status != 0 {
			t.Errorf("from outside the metadata service answers %s", got)
		}
		s.ip(s.core, "route del 169.254.169.254/32")
	})
	s.sub("its host's other programs get nobody's identity", func(t *testing.T) {
		for space := range s.spaces(host.mark() + "-r-") {
			if got := s.curl(space, quick(wantToken(service)...)...); got.status != 0 {
				t.Errorf("in the router %s the metadata service answers %s", space, got)
			}
		}
	})
}

// addresses are the IPv4 addresses of a namespace.
func (s *site) addresses(t *testing.T, space string) []string {
	t.Helper()
	out, err := s.try(space, "ip", "-4", "-o", "addr")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if n := slices.Index(f, "inet"); n >= 0 {
			all = append(all, strings.Split(f[n+1], "/")[0])
		}
	}
	return all
}

// uplinks are the addresses of routers at their links to the host.
func (s *site) uplinks(t *testing.T, h *node) []string {
	t.Helper()
	var all []string
	for space := range s.spaces(h.mark() + "-r-") {
		for _, a := range s.addresses(t, space) {
			if strings.HasPrefix(a, "100.127.") {
				all = append(all, a)
			}
		}
	}
	if len(all) == 0 {
		t.Fatal("no router has a link to the host")
	}
	return all
}

// counter counts connections.
type counter struct {
	mu sync.Mutex
	n  int
}

// take counts the connections of a listener until the function that it returns
// is called.
func (c *counter) take(l net.Listener) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			x, err := l.Accept()
			if err != nil {
				return
			}
			x.Close()
			c.mu.Lock()
			c.n++
			c.mu.Unlock()
		}
	})
	return func() {
		l.Close()
		wg.Wait()
	}
}

func (c *counter) clear() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.n
	c.n = 0
	return n
}

// A service that is off, or speaks another protocol, is not there; and answers
// go no further than they may.
func TestTheMetadataServiceIsThereForWhomItIsOnAlone(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	s.ask("dark", "--metadata-service", "false")
	lit, dark := s.box("lit"), s.boxNamed("dark")
	update := func(b *box, args ...string) {
		s.t.Helper()
		s.cli(append([]string{"is", "instance-update", b.Name}, args...)...)
	}
	token := func(b *box, base string, args ...string) answer {
		return b.curl(quick(wantToken(base, args...)...)...)
	}

	s.sub("a service that is off answers nothing", func(t *testing.T) {
		if a := token(dark, service); !a.timedOut() {
			t.Errorf("got %s", a)
		}
		dark.silent(t, "169.254.169.254:80", "169.254.169.254:443", "169.254.169.254:8080")
		lit.works(t)
	})
	s.sub("one that is turned on serves, and off again is silent", func(t *testing.T) {
		update(dark, "--metadata-service", "true")
		s.await("the service answers", func() bool { return token(dark, service).status == 200 })
		held := dark.identity(600)
		update(dark, "--metadata-service", "false")
		s.await("the service is silent", func() bool { return token(dark, service).timedOut() })
		if a := dark.curl(quick(service+ownPath, "-H", "Authorization: Bearer "+held)...); !a.timedOut() {
			t.Errorf("with a token of before, %s", a)
		}
		if a := lit.read(held); a.status != 401 {
			t.Errorf("beside it, its token gets %s", a)
		}
		lit.works(t)
	})
	s.sub("a connection that was open is of no use when it is turned off", func(t *testing.T) {
		update(dark, "--metadata-service", "true")
		s.await("the service answers", func() bool { return token(dark, service).status == 200 })
		c, err := dialFrom(dark.space, "169.254.169.254:80", net.Dialer{})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		request := "PUT " + tokenPath + " HTTP/1.1\r\nHost: 169.254.169.254\r\n" + flavor + "\r\nContent-Length: 0\r\n\r\n"
		ask := func() string {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := io.WriteString(c, request); err != nil {
				return err.Error()
			}
			buf := make([]byte, 8192)
			n, err := c.Read(buf)
			if err != nil {
				return err.Error()
			}
			return string(buf[:n])
		}
		if got := ask(); !strings.HasPrefix(got, "HTTP/1.1 200") {
			t.Fatalf("the open connection gets %s", got)
		}
		update(dark, "--metadata-service", "false")
		s.await("the service is silent", func() bool { return token(dark, service).timedOut() })
		if got := ask(); strings.Contains(got, "access_token") {
			t.Errorf("the open connection gets %s", got)
		}
	})
	s.sub("a service that speaks https speaks it alone, under its own name", func(t *testing.T) {
		const name = "https://api.metadata.cloud.ibm.com"
		resolve := []string{"--resolve", "api.metadata.cloud.ibm.com:443:169.254.169.254"}
		update(lit, "--metadata-service-protocol", "https")
		s.await("https is served", func() bool { return token(lit, name, append(resolve, "-k")...).status == 200 })
		s.await("http is silent", func() bool { return token(lit, service).timedOut() })
		if a := token(lit, name, resolve...); exitCode(a.err) != 60 {
			t.Errorf("without the host's authority curl trusts the service: %s", a)
		}
		for _, asked := range []string{"api.metadata.cloud.ibm.com", "", "iam.cloud.ibm.com", "10.99.0.1", "169.254.169.254", "api.metadata.cloud.ibm.com.evil.example"} {
			raw, err := dialFrom(lit.space, "169.254.169.254:443", net.Dialer{})
			if err != nil {
				t.Fatal(err)
			}
			_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
			c := tls.Client(raw, &tls.Config{ServerName: asked, InsecureSkipVerify: true})
			if err := c.Handshake(); err == nil {
				leaf := c.ConnectionState().PeerCertificates[0]
				if leaf.VerifyHostname("api.metadata.cloud.ibm.com") != nil {
					t.Errorf("asked for %q, the certificate is not valid for the service: %v", asked, leaf.DNSNames)
				}
				for _, other := range []string{"iam.cloud.ibm.com", "10.99.0.1", "169.254.169.254", "cloud.ibm.com", "x.api.metadata.cloud.ibm.com"} {
					if leaf.VerifyHostname(other) == nil {
						t.Errorf("asked for %q, the certificate is valid for %s", asked, other)
					}
				}
				if leaf.IsCA {
					t.Error("the certificate is an authority's")
				}
			}
			raw.Close()
		}
		update(lit, "--metadata-service-protocol", "http")
		s.await("http is served", func() bool { return token(lit, service).status == 200 })
		s.await("https is silent", func() bool { return token(lit, name, append(resolve, "-k")...).timedOut() })
		lit.works(t)
	})

	// A container behind the instance's own address translation.
	pod := fmt.Sprintf("tvm%d-pod", os.Getpid())
	s.must("ip", "netns", "add", pod)
	t.Cleanup(func() { _, _ = s.try("", "ip", "netns", "del", pod) })
	lit.mustSh("ip link add pod0 type veth peer name eth0 netns " + pod + " && ip addr add 172.31.0.1/24 dev pod0 && ip link set pod0 up" +
		" && sysctl -qw net.ipv4.ip_forward=1 && nft add table ip pods && nft 'add chain ip pods out { type nat hook postrouting priority 100; }'" +
		" && nft add rule ip pods out ip saddr 172.31.0.0/24 masquerade")
	for _, line := range []string{"addr add 172.31.0.2/24 dev eth0", "link set eth0 up", "route add default via 172.31.0.1"} {
		s.ip(pod, line)
	}
	fromPod := func() answer { return s.curl(pod, quick(wantToken(service)...)...) }
	s.sub("with hop limit 1 an answer does not reach a container", func(t *testing.T) {
		if a := s.curl(pod, "-k", serverURL+"/readyz"); a.status != 200 {
			t.Fatalf("the container has no network, so this shows nothing: %s", a)
		}
		if a := fromPod(); !a.timedOut() {
			t.Errorf("the container got %s", a)
		}
		lit.works(t)
	})
	s.sub("with hop limit 2 it does, and with 1 not any more", func(t *testing.T) {
		update(lit, "--metadata-service-response-hop-limit", "2")
		s.await("the container is served", func() bool { return fromPod().status == 200 })
		update(lit, "--metadata-service-response-hop-limit", "1")
		s.await("the container is not served", func() bool { return fromPod().timedOut() })
		lit.works(t)
	})
}
