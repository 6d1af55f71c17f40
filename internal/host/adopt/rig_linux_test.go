package adopt

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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

const metadataURL = "http://169.254.169.254/metadata/v1/instance"

// childOf names the rig whose machine a process of this test's own program
// adopts, until it is killed.
const childOf = "TABARD_TEST_ADOPT_HOST"

func TestMain(m *testing.M) {
	if name := os.Getenv(childOf); name != "" {
		child(name)
	}
	os.Exit(m.Run())
}

func child(name string) {
	d, err := New(Config{State: strings.TrimPrefix(name, "adopt-host-"), Host: name, Keep: true})
	if err == nil {
		v := &vm{device: "vnet0", mac: net.HardwareAddr{0x52, 0x54, 0, 0, 0, 5}, address: netip.MustParseAddr("10.0.0.5")}
		err = d.Start(context.Background(), v.spec("0717_a"), answering("0717_a"))
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	select {}
}

// rig is a namespace that stands for a host, with bridges and machines that the
// driver did not make.
type rig struct {
	t     *testing.T
	state string
	name  string // of the host's namespace
	ns    netns.NsHandle
	d     *driver
}

func newRig(t *testing.T, with ...func(*Config)) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	goroutines := goleak.IgnoreCurrent()
	r := &rig{t: t, state: tag(fmt.Sprint(t.Name(), os.Getpid()), 8)}
	r.name = "adopt-host-" + r.state
	if err := namespace.Share(); err != nil {
		t.Fatal(err)
	}
	r.ns = r.space(r.name, func() error { return namespace.Up("lo") })
	t.Cleanup(func() { goleak.VerifyNone(t, goroutines) })
	r.open(with...)
	t.Cleanup(func() {
		r.close()
		if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) > 0 {
			t.Errorf("namespaces left: %v %v", left, err)
		}
		for _, l := range r.links() {
			if l.Attrs().Alias != "" {
				t.Errorf("the link %s (%s) is left", l.Attrs().Name, l.Attrs().Alias)
			}
		}
	})
	return r
}

// open makes a driver; keep is what the last one leaves to it.
func (r *rig) open(with ...func(*Config)) {
	r.t.Helper()
	cfg := Config{State: r.state, Host: r.name}
	for _, f := range with {
		f(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.d = d.(*driver)
}

func keep(c *Config) { c.Keep = true }

// close ends the driver as one that keeps nothing.
func (r *rig) close() {
	r.t.Helper()
	r.d.keep = false
	if err := r.d.Close(); err != nil {
		r.t.Errorf("closing: %v", err)
	}
}

// space makes a namespace for the test.
func (r *rig) space(name string, f func() error) netns.NsHandle {
	r.t.Helper()
	ns, err := namespace.Create(name, f)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		ns.Close()
		if err := namespace.Remove(name); err != nil {
			r.t.Error(err)
		}
	})
	return ns
}

// must runs a change in a namespace.
func (r *rig) must(ns netns.NsHandle, f func(*netlink.Handle) error) {
	r.t.Helper()
	if err := namespace.Within(ns, func() error { return namespace.Links(f) }); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) links() (all []netlink.Link) {
	r.t.Helper()
	r.must(r.ns, func(n *netlink.Handle) (err error) { all, err = n.LinkList(); return err })
	return all
}

// bridge makes a bridge whose own address is its machines' gateway.
func (r *rig) bridge(name, gateway string) string {
	r.t.Helper()
	r.must(r.ns, func(n *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := n.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		link, err := n.LinkByName(name)
		if err != nil {
			return err
		}
		if gateway != "" {
			// Two bridges may have one network: each for itself here.
			if err := namespace.SetAddress(n, link, netip.MustParsePrefix(gateway), netlink.SCOPE_UNIVERSE); err != nil {
				return err
			}
		}
		return n.LinkSetUp(link)
	})
	return name
}

// vm is a machine at a bridge.
type vm struct {
	*rig
	ns      netns.NsHandle
	device  string
	bridge  string
	mac     net.HardwareAddr
	address netip.Addr
}

// vm makes a machine: a namespace, joined to a bridge by a veth whose end on the
// host is the device.
func (r *rig) vm(device, bridge, mac, address string) *vm {
	r.t.Helper()
	hw, err := net.ParseMAC(mac)
	if err != nil {
		r.t.Fatal(err)
	}
	v := &vm{rig: r, device: device, bridge: bridge, mac: hw, address: netip.MustParseAddr(address)}
	v.ns = r.space("adopt-vm-"+r.state+"-"+device+"-"+mac[15:], func() error {
		return errors.Join(namespace.DisableIPv6("default"), namespace.Up("lo"))
	})
	v.plug(device)
	return v
}

// plug gives the machine a network card, as when it boots.
func (v *vm) plug(device string) {
	v.t.Helper()
	v.device = device
	v.must(v.rig.ns, func(n *netlink.Handle) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = device
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: v.mac, PeerNamespace: netlink.NsFd(v.ns)}
		if err := n.LinkAdd(veth); err != nil {
			return err
		}
		if v.bridge != "" {
			br, err := n.LinkByName(v.bridge)
			if err != nil {
				return err
			}
			if err := n.LinkSetMaster(veth, br); err != nil {
				return err
			}
		}
		return n.LinkSetUp(veth)
	})
	v.eth(func(n *netlink.Handle, eth netlink.Link) error {
		if err := namespace.SetAddress(n, eth, netip.PrefixFrom(v.address, 24), netlink.SCOPE_UNIVERSE); err != nil {
			return err
		}
		if err := n.LinkSetUp(eth); err != nil {
			return err
		}
		return namespace.SetRoute(n, eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), v.gateway())
	})
	if err := namespace.Within(v.ns, func() error { return namespace.AwaitCarrier(context.Background(), "eth0") }); err != nil {
		v.t.Fatal(err)
	}
}

func (v *vm) gateway() netip.Addr { return netip.PrefixFrom(v.address, 24).Masked().Addr().Next() }

// unplug takes the network card away, as when it shuts down.
func (v *vm) unplug() {
	v.t.Helper()
	v.must(v.rig.ns, func(n *netlink.Handle) error { return namespace.Delete(n, v.device) })
}

// eth changes the machine's network card from inside.
func (v *vm) eth(f func(n *netlink.Handle, eth netlink.Link) error) {
	v.t.Helper()
	v.must(v.ns, func(n *netlink.Handle) error {
		eth, err := n.LinkByName("eth0")
		if err != nil {
			return err
		}
		return f(n, eth)
	})
}

func (v *vm) spec(id string) host.Machine {
	return host.Machine{
		ID: id, VPC: "vpc-adopted",
		Interfaces: []host.Interface{{ID: "nic", MAC: v.mac.String(), Address: v.address, Subnet: netip.PrefixFrom(v.address, 24).Masked()}},
		Metadata:   vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
		External:   &vpc.External{Device: v.device},
	}
}

// answering answers with the machine's id.
func answering(id string) host.Handlers {
	return host.Handlers{Metadata: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "metadata of %s", id) })}
}

// adopt takes the machine in.
func (v *vm) adopt(id string, with ...func(*host.Machine)) host.Machine {
	v.t.Helper()
	m := v.spec(id)
	for _, f := range with {
		f(&m)
	}
	if err := v.d.Start(context.Background(), m, answering(id)); err != nil {
		v.t.Fatal(err)
	}
	return m
}

func (v *vm) dial(source, to string) (net.Conn, error) {
	var c net.Conn
	err := namespace.Within(v.ns, func() (err error) {
		d := net.Dialer{Timeout: time.Second}
		if source != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
		}
		c, err = d.Dial("tcp", to)
		return err
	})
	return c, err
}

func (v *vm) client() *http.Client {
	return &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(_ context.Context, _, to string) (net.Conn, error) { return v.dial("", to) },
	}}
}

func (v *vm) get(url string) (string, error) {
	res, err := v.client().Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// reaches waits until the machine reaches the metadata service of id. Any other
// answer is never waited away.
func (v *vm) reaches(id string) {
	v.t.Helper()
	eventually(v.t, v.device+" reaches the metadata service of "+id, func() bool {
		got, err := v.get(metadataURL)
		if err == nil && got != "metadata of "+id {
			v.t.Errorf("%s reaches %q", v.device, got)
		}
		return err == nil
	})
}

// silent fails unless a connection attempt gets no answer of any kind, but that
// a host which forwards packets has no route for it.
func (v *vm) silent(source, to string) {
	v.t.Helper()
	c, err := v.dial(source, to)
	if err == nil {
		c.Close()
		v.t.Errorf("%s connected from %q to %s", v.device, source, to)
		return
	}
	if e := net.Error(nil); !errors.Is(err, unix.ENETUNREACH) && (!errors.As(err, &e) || !e.Timeout()) {
		v.t.Errorf("%s got an answer from %s: %v", v.device, to, err)
	}
}

// pings tells whether an ICMP echo request from inside is answered.
func (v *vm) pings(to netip.Addr) bool {
	v.t.Helper()
	got := false
	err := namespace.Within(v.ns, func() error {
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
		if err := unix.Sendto(fd, echo, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		for range 20 {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err != nil {
				return nil // nothing came
			}
			if n >= 28 && [4]byte(buf[12:16]) == to.As4() && buf[20] == 0 && buf[24] == 0x7a {
				got = true
				return nil
			}
		}
		return nil
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return got
}

func (v *vm) pingsItsGateway() {
	v.t.Helper()
	eventually(v.t, v.device+" reaches its gateway", func() bool { return v.pings(v.gateway()) })
}

// send sends a frame as it is.
func (v *vm) send(frame []byte) {
	v.t.Helper()
	v.eth(func(_ *netlink.Handle, eth netlink.Link) error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: eth.Attrs().Index, Halen: 6})
	})
}

// listens serves from inside, as a neighbour that pretends.
func (v *vm) listens(at, answer string) {
	v.t.Helper()
	var l net.Listener
	err := namespace.Within(v.ns, func() (err error) { l, err = net.Listen("tcp4", at); return err })
	if err != nil {
		v.t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) })}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	v.t.Cleanup(func() { s.Close(); <-done })
}

// filters lists the filters of a device, by priority, and its qdiscs of incoming
// frames.
func (r *rig) filters(device string) (priorities []uint16, qdiscs []string) {
	r.t.Helper()
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName(device)
		if err != nil {
			return err
		}
		all, err := n.FilterList(link, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			return err
		}
		for _, f := range all {
			if f.(*netlink.U32).Sel != nil {
				priorities = append(priorities, f.Attrs().Priority)
			}
		}
		q, err := n.QdiscList(link)
		for _, q := range q {
			if q.Attrs().Parent == netlink.HANDLE_CLSACT {
				qdiscs = append(qdiscs, q.Type())
			}
		}
		return err
	})
	slices.Sort(priorities)
	return priorities, qdiscs
}

// foreign puts somebody else's qdisc and filter to a device: one that matches
// nothing that is sent here.
func (r *rig) foreign(device string, qdisc netlink.Qdisc) {
	r.t.Helper()
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName(device)
		if err != nil {
			return err
		}
		*qdisc.Attrs() = netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}
		if err := n.QdiscAdd(qdisc); err != nil {
			return err
		}
		return n.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 49152, Protocol: unix.ETH_P_IP},
			Sel:         &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL, Keys: []nl.TcU32Key{{Mask: 0xffffffff, Val: 0xc6336401, Off: 16}}},
			ClassId:     1,
		})
	})
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not so after 20 s: %s", what)
			return
		}
	}
}
