package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
)

const server = "127.0.0.1:8470"

// rig is a driver whose leavings are checked when the test ends.
type rig struct {
	t *testing.T
	d *driver
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	// Tests run beside others of this machine, so each has its own state.
	state := tag(fmt.Sprint(t.Name(), os.Getpid()), 8)
	goroutines := goleak.IgnoreCurrent()
	links := ownLinks(t)
	d, err := New(Config{State: state})
	if err != nil {
		t.Fatal(err)
	}
	files := openFiles(t)
	r := &rig{t, d.(*driver)}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if left, err := named(r.d.prefix()); err != nil || len(left) > 0 {
			t.Errorf("namespaces left: %v %v", left, err)
		}
		if left := ownLinks(t); !slices.Equal(left, links) {
			t.Errorf("links of the host's own namespace: %v, before: %v", left, links)
		}
		goleak.VerifyNone(t, goroutines)
		eventually(t, "files of the process are closed", func() bool { return openFiles(t) <= files })
	})
	return r
}

// ownLinks are the links in the host's own namespace.
func ownLinks(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	slices.Sort(names)
	return names
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not so after 10 s: %s", what)
			return
		}
	}
}

// inst is a machine as the tests see it.
type inst struct {
	*rig
	host.Machine
}

func spec(id, vpc, address string, n byte) host.Machine {
	return host.Machine{
		ID: id, VPC: vpc, MAC: net.HardwareAddr{2, 0, 7, 0, 0, n}.String(),
		Address: netip.MustParseAddr(address), Subnet: netip.MustParsePrefix("10.240.0.0/24"),
		Metadata: true, HopLimit: 1,
	}
}

// names answers with the machine's id.
func names(id string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "metadata of %s", id)
	})
}

func handlers(m host.Machine, servers ...string) host.Handlers {
	h := host.Handlers{Metadata: names(m.ID)}
	for _, s := range servers {
		h.ServerAddrs = append(h.ServerAddrs, netip.MustParseAddrPort(s))
	}
	h.Server = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "server for %s", peer)
	})
	return h
}

func (r *rig) start(m host.Machine, servers ...string) *inst {
	r.t.Helper()
	if err := r.d.Start(context.Background(), m, handlers(m, servers...)); err != nil {
		r.t.Fatal(err)
	}
	return &inst{r, m}
}

// inside runs f in the machine's namespace.
func (i *inst) inside(f func() error) error {
	i.t.Helper()
	a, ok := i.d.Access(i.ID)
	if !ok {
		i.t.Fatalf("%s does not run", i.ID)
	}
	ns, err := netns.GetFromName(a.Namespace)
	if err != nil {
		i.t.Fatal(err)
	}
	defer ns.Close()
	return within(ns, f)
}

// must runs a change in the machine's namespace.
func (i *inst) must(f func(n *netlink.Handle, eth netlink.Link) error) {
	i.t.Helper()
	err := i.inside(func() error {
		return withLinks(func(n *netlink.Handle) error {
			eth, err := n.LinkByName("eth0")
			if err != nil {
				return err
			}
			return f(n, eth)
		})
	})
	if err != nil {
		i.t.Fatal(err)
	}
}

// dial connects from inside, with a source address unless it is empty.
func (i *inst) dial(source, to string, wait time.Duration) (net.Conn, error) {
	i.t.Helper()
	var c net.Conn
	err := i.inside(func() error {
		d := net.Dialer{Timeout: wait}
		if source != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
		}
		var err error
		c, err = d.Dial("tcp", to)
		return err
	})
	return c, err
}

// get asks from inside and returns the body.
func (i *inst) get(source, url string, header ...string) (string, error) {
	i.t.Helper()
	tr := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			return i.dial(source, addr, time.Second)
		},
	}
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		i.t.Fatal(err)
	}
	for n := 0; n+1 < len(header); n += 2 {
		req.Header.Set(header[n], header[n+1])
		if header[n] == "Host" {
			req.Host = header[n+1]
		}
	}
	res, err := (&http.Client{Transport: tr, Timeout: 3 * time.Second}).Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

const metadataURL = "http://169.254.169.254/metadata/v1/instance"

// reachesItsOwn waits for it, because a machine that has just forged something
// may have to wait for its own kernel to forget it. A foreign answer is never
// waited away.
func (i *inst) reachesItsOwn() {
	i.t.Helper()
	eventually(i.t, i.ID+" reaches its own metadata service", func() bool {
		got, err := i.get("", metadataURL)
		if err == nil && got != "metadata of "+i.ID {
			i.t.Errorf("%s reaches %q", i.ID, got)
		}
		return err == nil
	})
}

// silent fails unless a connection attempt got no answer of any kind.
func (i *inst) silent(source, to string) {
	i.t.Helper()
	c, err := i.dial(source, to, time.Second)
	if err == nil {
		c.Close()
		i.t.Errorf("%s connected from %q to %s", i.ID, source, to)
		return
	}
	if e := net.Error(nil); !errors.As(err, &e) || !e.Timeout() {
		i.t.Errorf("%s got an answer from %s: %v", i.ID, to, err)
	}
}

// ping sends one ICMP echo request from inside and waits for its reply.
func (i *inst) ping(to string) bool {
	i.t.Helper()
	var got bool
	err := i.inside(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		wait := unix.NsecToTimeval(int64(time.Second))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
			return err
		}
		echo := []byte{8, 0, 0, 0, 0x7a, 0xba, 0, 1}
		binary.BigEndian.PutUint16(echo[2:], ^uint16(0x0800+0x7aba+1))
		peer := netip.MustParseAddr(to).As4()
		if err := unix.Sendto(fd, echo, 0, &unix.SockaddrInet4{Addr: peer}); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		for end := time.Now().Add(time.Second); time.Now().Before(end); {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return nil // nothing came
			}
			// An IPv4 header of 20 bytes, then type 0 and the identifier sent.
			if n >= 28 && [4]byte(buf[12:16]) == peer && buf[20] == 0 && buf[24] == 0x7a && buf[25] == 0xba {
				got = true
				return nil
			}
		}
		return nil
	})
	if err != nil {
		i.t.Fatal(err)
	}
	return got
}

func (i *inst) reaches(to string) {
	i.t.Helper()
	eventually(i.t, i.ID+" reaches "+to, func() bool { return i.ping(to) })
}

func TestEachMachineReachesItsOwnMetadataServiceAndTheServer(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server, "0.0.0.0:8471", "192.0.2.7:8472", "[::1]:8473")
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5), server)
	a.reachesItsOwn()
	b.reachesItsOwn()
	for _, at := range []string{server, "127.0.0.1:8471", "192.0.2.7:8472", "[::1]:8473"} {
		if got, err := a.get("", "http://"+at); got != "server for 10.240.0.4" {
			t.Errorf("at %s machine a reaches %q, %v", at, got, err)
		}
	}
	if got, err := b.get("", "http://"+server); got != "server for 10.240.0.5" {
		t.Errorf("machine b reaches %q, %v", got, err)
	}
}

// Before its link carries packets a machine's first ones are lost, and each
// costs a second.
func TestAMachinesLinkCarriesPacketsWhenStartReturns(t *testing.T) {
	r := newRig(t)
	for n := range 5 {
		m := spec(fmt.Sprintf("0717_%d", n), "vpc-1", fmt.Sprintf("10.240.0.%d", 10+n), byte(n))
		r.start(m)
		r.inRouter("vpc-1", func() error {
			return withLinks(func(n *netlink.Handle) error {
				link, err := n.LinkByName("t" + tag(m.ID, 7))
				if err == nil && link.Attrs().OperState != netlink.OperUp {
					t.Errorf("the link of %s is %s", m.ID, link.Attrs().OperState)
				}
				return err
			})
		})
	}
}

func TestCurlInsideAMachineWorksVerbatim(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server)
	for url, want := range map[string]string{metadataURL: "metadata of 0717_a", "http://" + server: "server for 10.240.0.4"} {
		var out []byte
		err := a.inside(func() (err error) {
			out, err = exec.Command("curl", "-sS", "--noproxy", "*", "--max-time", "5", url).CombinedOutput()
			return err
		})
		if string(out) != want {
			t.Errorf("curl %s: %s, %v", url, out, err)
		}
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
		return addAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
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
		return addAddress(n, eth, netip.MustParsePrefix("10.240.0.5/24"), netlink.SCOPE_UNIVERSE)
	})
	if got, err := a.get("10.240.0.5", metadataURL); err == nil {
		t.Errorf("as b, a got %q", got)
	}
	b.reachesItsOwn()
}

// The tests that follow take all walls down but one, which must hold alone, or a
// host on which the others fail is open.

// looseReversePath lets the router take any source on the machine's link.
func (i *inst) looseReversePath() {
	i.t.Helper()
	i.inRouter(i.VPC, func() error {
		return errors.Join(sysctl("net/ipv4/conf/all/rp_filter", "0"),
			sysctl("net/ipv4/conf/t"+tag(i.ID, 7)+"/rp_filter", "0"))
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
		return addAddress(n, eth, netip.MustParsePrefix("10.240.0.6/32"), netlink.SCOPE_UNIVERSE)
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
		return withLinks(func(n *netlink.Handle) error {
			link, err := n.LinkByName("t" + tag(a.ID, 7))
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
		return withLinks(func(n *netlink.Handle) error {
			link, err := n.LinkByName("t" + tag(a.ID, 7))
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
	r.inRouter("vpc-1", func() error { return removeFilter("t" + tag("0717_a", 7)) })
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return addAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
	})
	a.silent("10.240.0.5", "169.254.169.254:80")
}

func TestTheListenerAloneStopsAForgedAddress(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	a.looseReversePath()
	r.inRouter("vpc-1", func() error { return removeFilter("t" + tag("0717_a", 7)) })
	a.must(func(n *netlink.Handle, eth netlink.Link) error {
		return addAddress(n, eth, netip.MustParsePrefix("10.240.0.5/32"), netlink.SCOPE_UNIVERSE)
	})
	if got, err := a.get("10.240.0.5", metadataURL); err == nil {
		t.Errorf("from the address of b, a got %q", got)
	}
	a.reachesItsOwn()
}

func (r *rig) inRouter(vpc string, f func() error) {
	r.t.Helper()
	ns, err := netns.GetFromName(r.d.prefix() + "r-" + tag(vpc, 8))
	if err != nil {
		r.t.Fatal(err)
	}
	defer ns.Close()
	if err := within(ns, f); err != nil {
		r.t.Fatal(err)
	}
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
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server)
	r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5), server)
	// A neighbour's address leads to the neighbour, where nothing listens; its
	// listeners for the server are its own.
	for _, to := range []string{"10.240.0.5:80", "10.240.0.5:8470"} {
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
		to := netlink.Route{LinkIndex: eth.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("169.254.169.254/32")), Scope: netlink.SCOPE_LINK}
		if err := n.RouteDel(&to); err != nil {
			return err
		}
		to.Scope, to.Gw, to.Flags = netlink.SCOPE_UNIVERSE, netip.MustParseAddr("10.240.0.5").AsSlice(), int(netlink.FLAG_ONLINK)
		return n.RouteAdd(&to)
	})
	a.reachesItsOwn()
}

func TestAServerOnAMachinesOwnAddressIsNotOfferedToItsNeighbours(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5), "10.240.0.5:8470")
	if got, err := b.get("", "http://10.240.0.5:8470"); got != "server for 10.240.0.5" {
		t.Errorf("machine b reaches %q, %v", got, err)
	}
	if got, err := a.get("", "http://10.240.0.5:8470"); err == nil {
		t.Errorf("machine a speaks as b: %q", got)
	}
}

func TestAMetadataServiceThatIsOffIsSilentBesideOneThatIsOn(t *testing.T) {
	r := newRig(t)
	off := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	off.Metadata, off.HopLimit = false, 0
	a := r.start(off, server)
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	b.reachesItsOwn()
	a.silent("", "169.254.169.254:80")
	if a.ping("169.254.169.254") {
		t.Error("the address answers a ping")
	}
	if got, err := a.get("", "http://"+server); got != "server for 10.240.0.4" {
		t.Errorf("machine a reaches %q, %v", got, err)
	}
}

func TestAnswersCarryTheHopLimit(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	m.HopLimit = 3
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
	other.Subnet = netip.MustParsePrefix("10.240.64.0/24")
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
		return addRoute(n, eth, netip.PrefixFrom(far.Address, 32), gateway(a.Subnet))
	})
	if a.ping("10.240.0.9") {
		t.Error("a machine of the first VPC reaches one of the second through its gateway")
	}
}

func TestNothingIsPutIntoTheHostsOwnNamespace(t *testing.T) {
	r := newRig(t)
	before := ownLinks(t)
	// Outside the address is taken, as it is by the server itself.
	outside, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), outside.Addr().String())
	if got := ownLinks(t); !slices.Equal(got, before) {
		t.Errorf("links: %v, before: %v", got, before)
	}
	if got, err := a.get("", "http://"+outside.Addr().String()); got != "server for 10.240.0.4" {
		t.Errorf("machine a reaches %q, %v", got, err)
	}
}

func TestStopRemovesAMachineAndTheLastOneItsRouter(t *testing.T) {
	r := newRig(t)
	ctx := context.Background()
	r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server)
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	spaces := func() int {
		left, err := named(r.d.prefix())
		if err != nil {
			t.Fatal(err)
		}
		return len(left)
	}
	for _, step := range []struct {
		id   string
		want int
	}{{"0717_a", 2}, {"0717_a", 2}, {"unknown", 2}, {"0717_b", 0}} {
		if step.id == "0717_b" {
			b.reachesItsOwn()
		}
		if err := r.d.Stop(ctx, step.id); err != nil {
			t.Fatal(err)
		}
		if got := spaces(); got != step.want {
			t.Errorf("after stopping %s: %d namespaces, want %d", step.id, got, step.want)
		}
	}
	if _, ok := r.d.Access("0717_a"); ok {
		t.Error("a stopped machine can be accessed")
	}
	again := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	again.reachesItsOwn()
}

// A shell in the machine keeps the namespace alive after its name is gone.
func TestStopDisconnectsAProcessThatStaysInside(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server)
	access, _ := r.d.Access(a.ID)
	ns, err := netns.GetFromName(access.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := r.d.Stop(context.Background(), a.ID); err != nil {
		t.Fatal(err)
	}
	err = within(ns, func() error {
		return withLinks(func(n *netlink.Handle) error {
			links, err := n.LinkList()
			for _, l := range links {
				if l.Type() == "veth" {
					t.Errorf("the link %s is left", l.Attrs().Name)
				}
			}
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	err = within(ns, func() error {
		c, err := net.DialTimeout("tcp", server, time.Second)
		if err == nil {
			c.Close()
			t.Error("the server is still reached from inside")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestNewRemovesWhatACrashLeftBehind(t *testing.T) {
	r := newRig(t)
	prefix := r.d.prefix()
	// As after a crash: the namespaces are there and joined, nobody knows them.
	router, err := create(prefix+"r-00000001", prepareRouter)
	if err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	instance, err := create(prefix+"i-00000001", func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer instance.Close()
	err = within(router, func() error {
		return withLinks(func(n *netlink.Handle) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "t0000001"
			return n.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(instance)})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	// And one that died between making the file and mounting the namespace on it.
	if err := os.WriteFile(directory+"/"+prefix+"i-00000002", nil, 0o444); err != nil {
		t.Fatal(err)
	}
	foreign := "tabard-ffffffff-i-" + tag(prefix, 8)
	other, err := create(foreign, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	defer remove(foreign)

	d, err := New(Config{State: r.d.state})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if left, err := named(prefix); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if left, err := named(foreign); err != nil || len(left) != 1 {
		t.Errorf("another installation's namespace: %v, %v", left, err)
	}
	err = within(instance, func() error {
		return withLinks(func(n *netlink.Handle) error {
			if _, err := n.LinkByName("eth0"); err == nil {
				t.Error("the link of the machine left behind is still there")
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestManyMachinesStartAndStopAtOnce(t *testing.T) {
	r := newRig(t)
	ctx := context.Background()
	for range 3 {
		var each sync.WaitGroup
		for n := range 12 {
			each.Go(func() {
				m := spec(fmt.Sprintf("0717_%d", n), fmt.Sprintf("vpc-%d", n%3), fmt.Sprintf("10.240.0.%d", 10+n), byte(n))
				if err := r.d.Start(ctx, m, handlers(m, server)); err != nil {
					t.Error(err)
					return
				}
				(&inst{r, m}).reachesItsOwn()
				if err := r.d.Stop(ctx, m.ID); err != nil {
					t.Error(err)
				}
			})
		}
		each.Wait()
	}
	if left, err := named(r.d.prefix()); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestOneMachineStartedManyTimesAtOnceRunsOnce(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	errs := make(chan error, 8)
	for range cap(errs) {
		go func() { errs <- r.d.Start(context.Background(), m, handlers(m)) }()
	}
	started := 0
	for range cap(errs) {
		if <-errs == nil {
			started++
		}
	}
	if started != 1 {
		t.Errorf("started %d times", started)
	}
	(&inst{r, m}).reachesItsOwn()
}

func TestAMachineThatCannotStartLeavesNothing(t *testing.T) {
	r := newRig(t)
	ctx := context.Background()
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	m := spec("0717_b", "vpc-1", "10.240.0.5", 5)

	twin := m
	twin.Address = a.Address
	group, low, high, taken := m, m, m, m
	group.MAC = "01:00:5e:00:00:01"
	low.HopLimit, high.HopLimit = 0, 65
	taken.Address = gateway(m.Subnet)
	outside := m
	outside.Address = netip.MustParseAddr("10.241.0.5")
	for what, bad := range map[string]host.Machine{
		"an address in use": twin, "a group MAC": group, "a hop limit of 0": low, "a hop limit of 65": high,
		"the gateway's address": taken, "an address outside its subnet": outside, "nothing at all": {},
	} {
		if err := r.d.Start(ctx, bad, handlers(bad)); err == nil {
			t.Errorf("a machine with %s was started", what)
		}
	}
	// These fail half-way, with the router entered or the link made.
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.d.Start(ended, m, handlers(m)); !errors.Is(err, context.Canceled) {
		t.Errorf("a start whose caller has gone: %v", err)
	}
	if err := r.d.Start(ctx, m, handlers(m, "240.0.0.1:8470", "169.254.169.254:80")); err == nil {
		t.Error("a machine whose server is in the way of the metadata service was started")
	}
	left, err := named(r.d.prefix())
	if err != nil || len(left) != 2 {
		t.Errorf("namespaces: %v, %v", left, err)
	}
	r.inRouter("vpc-1", func() error {
		return withLinks(func(n *netlink.Handle) error {
			links, err := n.LinkList()
			veths := 0
			for _, l := range links {
				if l.Type() == "veth" {
					veths++
				}
			}
			if veths != 1 {
				t.Errorf("%d veths in the router, want that of a alone", veths)
			}
			return err
		})
	})
	a.reachesItsOwn()
	r.start(m).reachesItsOwn()
}

func TestAMachineNeverTakesOverANamespaceThatItDidNotMake(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	name := r.d.prefix() + "i-" + tag(m.ID, 8)
	ns, err := create(name, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := r.d.Start(context.Background(), m, handlers(m)); err == nil {
		t.Error("the machine was started in another's namespace")
	}
	if left, err := named(name); err != nil || len(left) != 1 {
		t.Errorf("the other's namespace: %v, %v", left, err)
	}
	if err := remove(name); err != nil {
		t.Fatal(err)
	}
}

func TestARunningMachineIsNotStartedAgainAndAClosedDriverStartsNone(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	r.start(m)
	if err := r.d.Start(context.Background(), m, handlers(m)); err == nil {
		t.Error("it was started twice")
	}
	if err := r.d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.d.Start(context.Background(), m, handlers(m)); err == nil {
		t.Error("it was started by a closed driver")
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

func TestTheStateIsCheckedBeforeItNamesFiles(t *testing.T) {
	for _, state := range []string{"", "../../..", "0123456", "012345678", "0123456G", "0123456\n"} {
		if _, err := New(Config{State: state}); err == nil || !strings.Contains(err.Error(), "hexadecimal") {
			t.Errorf("the state %q: %v", state, err)
		}
	}
}
