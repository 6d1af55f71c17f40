package network

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
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// rig is a network whose leavings are checked when the test ends. The test has a
// host of its own, a namespace that stands for the machine that all runs on.
type rig struct {
	t     *testing.T
	cfg   Config
	n     *Network
	state string
	host  string
	insts []*inst
}

func newRig(t *testing.T) *rig { return newUplinkRig(t, nil) }

func newUplinkRig(t *testing.T, up *Uplink) *rig {
	t.Helper()
	return newRigs(t, func([]*rig) {}, Config{Uplink: up})[0]
}

// newRigs makes several hosts; prepare furnishes them before their networks are
// made.
func newRigs(t *testing.T, prepare func([]*rig), hosts ...Config) []*rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	goroutines := goleak.IgnoreCurrent()
	files := openFiles(t)
	links := ownLinks(t)
	rigs := make([]*rig, len(hosts))
	for n, cfg := range hosts {
		// Tests run beside others of this machine, so each has its own state.
		state := tag(fmt.Sprint(t.Name(), n, os.Getpid()), 8)
		rigs[n] = &rig{t: t, cfg: cfg, state: state, host: "tabtest-" + state + "-host"}
		rigs[n].space(rigs[n].host)
	}
	prepare(rigs)
	before := make([]string, len(rigs))
	for n, r := range rigs {
		before[n] = r.hostState()
		r.open(r.cfg.Uplink)
	}
	t.Cleanup(func() {
		for n, r := range rigs {
			r.close(before[n])
		}
		if left := ownLinks(t); !slices.Equal(left, links) {
			t.Errorf("links of the test's own namespace: %v, before: %v", left, links)
		}
		goleak.VerifyNone(t, goroutines)
		eventually(t, "files of the process are closed", func() bool { return openFiles(t) <= files })
	})
	return rigs
}

// close removes everything, and checks that the host is as before.
func (r *rig) close(before string) {
	r.t.Helper()
	for _, i := range r.insts {
		if err := i.port.Detach(context.Background()); err != nil {
			r.t.Errorf("detaching %s: %v", i.ID, err)
		}
		if err := namespace.Remove(i.space); err != nil {
			r.t.Error(err)
		}
	}
	if err := r.n.Sweep(context.Background()); err != nil {
		r.t.Errorf("sweeping: %v", err)
	}
	if err := r.n.Close(); err != nil {
		r.t.Errorf("closing: %v", err)
	}
	if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) > 0 {
		r.t.Errorf("namespaces left: %v %v", left, err)
	}
	if after := r.hostState(); after != before {
		r.t.Errorf("the host has\n%s\nbefore:\n%s", after, before)
	}
	if err := namespace.Remove(r.host); err != nil {
		r.t.Error(err)
	}
}

// open makes the network; again, after the one before was lost.
func (r *rig) open(up *Uplink) {
	r.t.Helper()
	cfg := r.cfg
	cfg.State, cfg.Uplink, cfg.Host = r.state, up, r.host
	n, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.n = n
}

// space makes a namespace that goes with the test.
func (r *rig) space(name string) {
	r.t.Helper()
	ns, err := namespace.Create(name, func() error { return namespace.Up("lo") })
	if err != nil {
		r.t.Fatal(err)
	}
	ns.Close()
	r.t.Cleanup(func() {
		if err := namespace.Remove(name); err != nil {
			r.t.Error(err)
		}
	})
}

// carries waits until a namespace's link does, so that it looks the same from
// then on.
func (r *rig) carries(space, link string) {
	r.t.Helper()
	if err := within(r.t, space, func() error { return namespace.AwaitCarrier(r.t.Context(), link) }); err != nil {
		r.t.Fatal(err)
	}
}

// hostState is all that could be left in the host.
func (r *rig) hostState() string {
	r.t.Helper()
	var all []string
	for _, c := range []string{"ip -o link show", "ip -4 -o addr show", "ip -4 route show table all", "ip neigh show proxy", "nft list ruleset"} {
		all = append(all, r.in(r.host, strings.Fields(c)...))
	}
	return carrier.ReplaceAllString(strings.Join(all, "\n"), "")
}

// carrier is what the kernel notes of a link in the background.
var carrier = regexp.MustCompile(`<\S*>| state \S+| linkdown`)

// in runs a command in a namespace and returns what it says.
func (r *rig) in(space string, command ...string) string {
	r.t.Helper()
	var out []byte
	err := within(r.t, space, func() (err error) {
		out, err = exec.Command(command[0], command[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		r.t.Fatalf("%s in %s: %v: %s", strings.Join(command, " "), space, err, out)
	}
	return string(out)
}

func within(t *testing.T, space string, f func() error) error {
	t.Helper()
	ns, err := namespace.Open(space)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	return namespace.Within(ns, f)
}

// inst is a machine as the tests see it.
type inst struct {
	*rig
	host.Machine
	MAC     string
	Address netip.Addr
	Subnet  netip.Prefix

	space string
	port  *Port
}

// open to all, so that tests of other things need not think of it.
var open = host.Firewall{
	Inbound:  []host.Pass{{Protocol: "all"}},
	Outbound: []host.Pass{{Protocol: "all"}},
}

func spec(id, vpcID, address string, n byte) host.Machine {
	return host.Machine{
		ID: id, VPC: vpcID,
		Interfaces: []host.Interface{{
			ID: "nic-" + id, MAC: net.HardwareAddr{2, 0, 7, 0, 0, n}.String(),
			Address: netip.MustParseAddr(address), Subnet: netip.MustParsePrefix("10.240.0.0/24"), Firewall: open,
		}},
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
	}
}

// names answers with the machine's id.
func names(id string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "metadata of %s", id)
	})
}

func device(id string) string { return "t" + tag(id, 12) }

func (r *rig) start(m host.Machine) *inst {
	r.t.Helper()
	space := "tabtest-" + r.state + "-" + tag(m.ID, 8)
	r.space(space)
	i, err := r.attach(m, space, host.Handlers{Metadata: names(m.ID)})
	if err != nil {
		r.t.Fatal(err)
	}
	return i
}

func (r *rig) attach(m host.Machine, space string, h host.Handlers) (*inst, error) {
	r.t.Helper()
	ns, err := namespace.Open(space)
	if err != nil {
		r.t.Fatal(err)
	}
	defer ns.Close()
	p, err := r.n.AttachNamespace(context.Background(), m, h, ns)
	if err != nil {
		return nil, err
	}
	nic := m.Interfaces[0]
	i := &inst{rig: r, Machine: m, MAC: nic.MAC, Address: nic.Address, Subnet: nic.Subnet, space: space, port: p}
	r.insts = append(r.insts, i)
	return i, nil
}

func (i *inst) update() {
	i.t.Helper()
	if err := i.port.Update(context.Background(), i.Machine); err != nil {
		i.t.Fatal(err)
	}
}

// inside runs f in the machine's namespace.
func (i *inst) inside(f func() error) error {
	i.t.Helper()
	return within(i.t, i.space, f)
}

func (r *rig) inRouter(vpcID string, f func() error) {
	r.t.Helper()
	if err := within(r.t, r.n.prefix()+tag(vpcID, 8), f); err != nil {
		r.t.Fatal(err)
	}
}

const metadataURL = "http://169.254.169.254/metadata/v1/instance"

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

// must runs a change in the machine's namespace.
func (i *inst) must(f func(n *netlink.Handle, eth netlink.Link) error) {
	i.t.Helper()
	err := i.inside(func() error {
		return namespace.Links(func(n *netlink.Handle) error {
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
