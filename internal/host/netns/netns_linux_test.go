package netns

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/network"
	"tabard.dev/tabard/internal/vpc"
)

const server = "127.0.0.1:8470"

// rig is a driver whose leavings are checked when the test ends.
type rig struct {
	t     *testing.T
	n     *network.Network
	d     *driver
	state string
	dir   string
}

func newRig(t *testing.T) *rig { return newKeepingRig(t, false) }

func newKeepingRig(t *testing.T, keep bool) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	// Tests run beside others of this machine, so each has its own state.
	sum := sha256.Sum256(fmt.Append(nil, t.Name(), os.Getpid()))
	r := &rig{t: t, state: hex.EncodeToString(sum[:4]), dir: filepath.Join(t.TempDir(), "machines")}
	goroutines := goleak.IgnoreCurrent()
	links := ownLinks(t)
	files := openFiles(t)
	r.open(keep)
	t.Cleanup(func() {
		if keep {
			r.lose()
			r.open(false)
		}
		if err := r.d.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if err := r.n.Close(); err != nil {
			t.Errorf("closing the network: %v", err)
		}
		if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) > 0 {
			t.Errorf("namespaces left: %v %v", left, err)
		}
		if left, err := filepath.Glob(configuration + "/tabard-" + r.state + "*"); err != nil || len(left) > 0 {
			t.Errorf("left beside the namespaces: %v %v", left, err)
		}
		if left := ownLinks(t); !slices.Equal(left, links) {
			t.Errorf("links of the host's own namespace: %v, before: %v", left, links)
		}
		goleak.VerifyNone(t, goroutines)
		eventually(t, "files of the process are closed", func() bool { return openFiles(t) <= files })
	})
	return r
}

// open makes the network and the driver; again, after those before were lost.
func (r *rig) open(keep bool) {
	r.t.Helper()
	if err := r.make(keep); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) make(keep bool) error {
	var err error
	if r.n, err = network.New(network.Config{State: r.state}); err != nil {
		return err
	}
	d, err := New(Config{Network: r.n, Keep: keep, Dir: r.dir})
	if err != nil {
		return err
	}
	r.d = d.(*driver)
	return nil
}

// lose closes all sockets, as the death of the process would, and removes
// nothing.
func (r *rig) lose() {
	r.t.Helper()
	if err := errors.Join(r.d.Close(), r.n.Close()); err != nil {
		r.t.Fatal(err)
	}
}

// ownLinks are the links in the host's own namespace.
func ownLinks(t *testing.T) []string {
	t.Helper()
	links, err := namespace.Whole(netlink.LinkList)
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

var everything = []host.Pass{{Protocol: "all"}}

func spec(id, vpcID, address string, n byte) host.Machine {
	return host.Machine{
		ID: id, VPC: vpcID,
		Interfaces: []host.Interface{{
			ID: "nic-" + id, MAC: net.HardwareAddr{2, 0, 7, 0, 0, n}.String(),
			Address: netip.MustParseAddr(address), Subnet: netip.MustParsePrefix("10.240.0.0/24"),
			Firewall: host.Firewall{Inbound: everything, Outbound: everything},
		}},
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
	}
}

const metadataURL = "http://169.254.169.254/metadata/v1/instance"

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
	ns, err := namespace.Open(a.Namespace)
	if err != nil {
		i.t.Fatal(err)
	}
	defer ns.Close()
	return namespace.Within(ns, f)
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
		left, err := namespace.Named("tabard-" + r.state)
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
		if err := r.d.Stop(ctx, step.id, false); err != nil {
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
	ns, err := namespace.Open(access.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := r.d.Stop(context.Background(), a.ID, false); err != nil {
		t.Fatal(err)
	}
	err = namespace.Within(ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
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
	err = namespace.Within(ns, func() error {
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
	prefix := "tabard-" + r.state + "-"
	// As after a crash: the namespaces are there and joined, nobody knows them.
	router, err := namespace.Create(prefix+"r-00000001", func() error { return namespace.Up("lo") })
	if err != nil {
		t.Fatal(err)
	}
	defer router.Close()
	instance, err := namespace.Create(prefix+"i-00000001", func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer instance.Close()
	err = namespace.Within(router, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "t0000001"
			return n.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(instance)})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	// And one that died between making the file and mounting the namespace on it.
	if err := os.WriteFile(namespace.Directory+"/"+prefix+"i-00000002", nil, 0o444); err != nil {
		t.Fatal(err)
	}
	foreign := "tabard-ffffffff-i-" + r.state
	other, err := namespace.Create(foreign, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	defer namespace.Remove(foreign)

	d, err := New(Config{Network: r.n})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if left, err := namespace.Named(prefix); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if left, err := namespace.Named(foreign); err != nil || len(left) != 1 {
		t.Errorf("another installation's namespace: %v, %v", left, err)
	}
	err = namespace.Within(instance, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
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
				if err := r.d.Stop(ctx, m.ID, true); err != nil {
					t.Error(err)
				}
			})
		}
		each.Wait()
	}
	if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) > 0 {
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

	twin := spec("0717_t", "vpc-1", "10.240.0.4", 6)
	external := m
	external.External = &vpc.External{Device: "tap0"}
	for what, bad := range map[string]host.Machine{
		"an address in use": twin, "another maker": external, "nothing at all": {},
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
	left, err := namespace.Named("tabard-" + r.state)
	if err != nil || len(left) != 2 {
		t.Errorf("namespaces: %v, %v", left, err)
	}
	a.reachesItsOwn()
	r.start(m).reachesItsOwn()
}

func TestAMachineNeverTakesOverANamespaceThatItDidNotMake(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	name := r.d.space(m.ID)
	ns, err := namespace.Create(name, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	if err := r.d.Start(context.Background(), m, handlers(m)); err == nil {
		t.Error("the machine was started in another's namespace")
	}
	if left, err := namespace.Named(name); err != nil || len(left) != 1 {
		t.Errorf("the other's namespace: %v, %v", left, err)
	}
	if err := namespace.Remove(name); err != nil {
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
