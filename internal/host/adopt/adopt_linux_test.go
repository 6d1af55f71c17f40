package adopt

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
)

func TestAMachineAtABridgeReachesItsMetadataServiceByItsGatewayAndOnItsLink(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	a.adopt("0717_a")
	b.adopt("0717_b")
	a.reaches("0717_a")
	b.reaches("0717_b")
	a.eth(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetRoute(n, eth, netip.PrefixFrom(metadataAddress, 32), netip.Addr{})
	})
	a.reaches("0717_a")
}

func TestWhatAMachineSendsToOthersIsNotDisturbed(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	a.pingsItsGateway()
	eventually(t, "the machines reach each other", func() bool { return a.pings(b.address) })
	for range 3 {
		m := a.adopt("0717_a")
		if !a.pings(a.gateway()) || !a.pings(b.address) || !b.pings(a.address) {
			t.Error("an adopted machine lost its network")
		}
		if err := r.d.Stop(context.Background(), m.ID, false); err != nil {
			t.Fatal(err)
		}
		if !a.pings(a.gateway()) || !a.pings(b.address) {
			t.Error("a machine that is not adopted any more lost its network")
		}
	}
}

func TestAMachineThatIsNotABridgesPortIsServedToo(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", "", "52:54:00:00:00:05", "10.0.0.5")
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName("vnet0")
		if err != nil {
			return err
		}
		return namespace.SetAddress(n, link, netip.MustParsePrefix("10.0.0.1/24"), netlink.SCOPE_UNIVERSE)
	})
	a.adopt("0717_a")
	a.reaches("0717_a")
	a.pingsItsGateway()
}

func TestMachinesWithEqualAddressesOnTwoBridgesReachTheirOwn(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", r.bridge("virbr1", ""), "52:54:00:00:00:05", "10.0.0.5")
	// Nobody on the second bridge is the gateway, so its address is found nowhere.
	b.eth(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetRoute(n, eth, netip.PrefixFrom(metadataAddress, 32), netip.Addr{})
	})
	a.adopt("0717_a")
	b.adopt("0717_b")
	for range 3 {
		a.reaches("0717_a")
		b.reaches("0717_b")
	}
}

func TestANeighbourThatForgesAddressAndMACReachesNothing(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	c := r.vm("vnet2", "virbr0", "52:54:00:00:00:07", "10.0.0.7")
	a.adopt("0717_a")
	b.adopt("0717_b")
	a.reaches("0717_a")
	b.reaches("0717_b")
	for _, forger := range []*vm{b, c} {
		forger.eth(func(n *netlink.Handle, eth netlink.Link) error {
			return namespace.SetAddress(n, eth, netip.PrefixFrom(a.address, 24), netlink.SCOPE_UNIVERSE)
		})
		forger.silent(a.address.String(), "169.254.169.254:80")
		forger.eth(func(n *netlink.Handle, eth netlink.Link) error { return n.LinkSetHardwareAddr(eth, a.mac) })
		forger.silent(a.address.String(), "169.254.169.254:80")
		forger.silent(forger.address.String(), "169.254.169.254:80")
	}
	a.reaches("0717_a")
}

func TestAMachineThatIsNotAdoptedReachesNothing(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	a.adopt("0717_a")
	a.reaches("0717_a")
	b.silent("", "169.254.169.254:80")
}

func TestANeighbourThatAnswersForTheMetadataServiceIsNotAsked(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	a.adopt("0717_a")
	b.eth(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.PrefixFrom(metadataAddress, 32), netlink.SCOPE_UNIVERSE)
	})
	b.listens("169.254.169.254:80", "I am the neighbour")
	a.eth(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetRoute(n, eth, netip.PrefixFrom(metadataAddress, 32), netip.Addr{})
	})
	a.reaches("0717_a") // by ARP
	a.eth(func(n *netlink.Handle, eth netlink.Link) error {
		// As after a gratuitous ARP that A believed.
		return n.NeighSet(&netlink.Neigh{
			LinkIndex: eth.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			IP: metadataAddress.AsSlice(), HardwareAddr: b.mac,
		})
	})
	a.reaches("0717_a")
}

func TestOnlyTheOnePortIsOpenAndTheRestIsSilent(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	a.silent("", "169.254.169.254:443")
	a.silent("", "169.254.169.254:22")
	if a.pings(metadataAddress) {
		t.Error("the metadata service's address answers a ping")
	}
	a.eth(func(n *netlink.Handle, eth netlink.Link) error {
		return namespace.SetAddress(n, eth, netip.MustParsePrefix("10.0.0.9/24"), netlink.SCOPE_UNIVERSE)
	})
	a.silent("10.0.0.9", "169.254.169.254:80")
}

func TestSettingsOfTheMetadataServiceAreFollowedAtOnce(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	m := a.adopt("0717_a", func(m *host.Machine) { m.Metadata.Enabled = false })
	a.silent("", "169.254.169.254:80")
	m.Metadata.Enabled = true
	if err := r.d.Update(context.Background(), m); err != nil {
		t.Fatal(err)
	}
	a.reaches("0717_a")
	if got := a.hops(); got != 1 {
		t.Errorf("answers have %d hops to go", got)
	}
	m.Metadata.ResponseHopLimit = 3
	if err := r.d.Update(context.Background(), m); err != nil {
		t.Fatal(err)
	}
	if got := a.hops(); got != 3 {
		t.Errorf("answers have %d hops to go", got)
	}
	m.Metadata.Enabled = false
	if err := r.d.Update(context.Background(), m); err != nil {
		t.Fatal(err)
	}
	a.silent("", "169.254.169.254:80")
	m.Metadata.Enabled, m.Metadata.Protocol = true, "https"
	if err := r.d.Update(context.Background(), m); err == nil {
		t.Error("it serves TLS without a certificate")
	}
}

// hops is the time-to-live of the answer to a connection.
func (v *vm) hops() (ttl byte) {
	v.t.Helper()
	err := namespace.Within(v.ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		wait := unix.NsecToTimeval(int64(5 * time.Second))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
			return err
		}
		c, err := net.DialTimeout("tcp", "169.254.169.254:80", 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 1500)
		for {
			if _, _, err := unix.Recvfrom(fd, buf, 0); err != nil {
				return err
			}
			if [4]byte(buf[12:16]) == metadataAddress.As4() {
				ttl = buf[8]
				return nil
			}
		}
	})
	if err != nil {
		v.t.Fatal(err)
	}
	return ttl
}

func TestFramesWithAVLANTagAreLeftToTheBridge(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	fd := -1
	r.must(r.ns, func(n *netlink.Handle) error {
		br, err := n.LinkByName("virbr0")
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(100 * time.Millisecond))
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: br.Attrs().Index}) // all, in network order
	})
	defer unix.Close(fd)
	head := slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, a.mac)
	plain := slices.Concat(head, []byte{0x08, 0x00}, syn(a.address, 7))
	tagged := slices.Concat(head, []byte{0x81, 0x00, 0x00, 0x07, 0x08, 0x00}, syn(a.address, 9))
	a.send(plain)
	eventually(t, "the tagged frame comes to the bridge", func() bool {
		a.send(tagged)
		buf := make([]byte, 2000)
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil || n < 34 {
			return false
		}
		b := buf[12:n]
		if [2]byte(b[:2]) == [2]byte{0x81, 0x00} {
			return true
		}
		// The kernel may show the tag beside the frame; the ports tell them apart.
		if [2]byte(b[:2]) != [2]byte{0x08, 0x00} || [4]byte(b[18:22]) != metadataAddress.As4() {
			return false
		}
		if b[23] == 7 {
			t.Error("the frame without a tag came to the bridge")
		}
		return b[23] == 9
	})
}

// syn is an IPv4 packet that asks the metadata service for a connection, as far
// as anybody here looks.
func syn(from netip.Addr, port byte) []byte {
	p := make([]byte, 40)
	p[0], p[3], p[8], p[9] = 0x45, 40, 64, unix.IPPROTO_TCP
	copy(p[12:], from.AsSlice())
	copy(p[16:], metadataAddress.AsSlice())
	p[21], p[23], p[32], p[33] = port, 80, 0x50, 0x02
	return p
}

func TestStoppingLeavesTheDeviceAsItWas(t *testing.T) {
	r := newRig(t)
	r.bridge("virbr0", "10.0.0.1/24")
	plain := r.vm("vnet0", "virbr0", "52:54:00:00:00:05", "10.0.0.5")
	shaped := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	classed := r.vm("vnet2", "virbr0", "52:54:00:00:00:07", "10.0.0.7")
	r.foreign("vnet1", &netlink.Ingress{})
	r.foreign("vnet2", &netlink.Clsact{})
	for _, v := range []*vm{plain, shaped, classed} {
		v.adopt(v.device)
		v.reaches(v.device)
		got, _ := r.filters(v.device)
		want := []uint16{21569, 21570}
		if v != plain {
			want = append(want, 49152)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has filters %v", v.device, got)
		}
	}
	for _, each := range []struct {
		v       *vm
		filters []uint16
		qdiscs  []string
	}{
		{plain, nil, nil}, {shaped, []uint16{49152}, []string{"ingress"}}, {classed, []uint16{49152}, []string{"clsact"}},
	} {
		if err := r.d.Stop(context.Background(), each.v.device, false); err != nil {
			t.Fatal(err)
		}
		filters, qdiscs := r.filters(each.v.device)
		if !slices.Equal(filters, each.filters) || !slices.Equal(qdiscs, each.qdiscs) {
			t.Errorf("%s has filters %v in qdiscs %v", each.v.device, filters, qdiscs)
		}
		each.v.silent("", "169.254.169.254:80")
	}
}

func TestAQdiscThatWasMadeStaysWhileOthersUseIt(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName("vnet0")
		if err != nil {
			return err
		}
		return n.FilterAdd(&netlink.U32{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Priority: 7, Protocol: unix.ETH_P_ALL},
			ClassId:     1,
		})
	})
	if err := r.d.Stop(context.Background(), "0717_a", false); err != nil {
		t.Fatal(err)
	}
	if _, qdiscs := r.filters("vnet0"); len(qdiscs) != 1 {
		t.Errorf("qdiscs are %v", qdiscs)
	}
}

func TestFiltersThatSomebodyFlushedArePutBack(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName("vnet0")
		if err != nil {
			return err
		}
		if err := n.QdiscDel(clsact(link.Attrs().Index)); err != nil {
			return err
		}
		return n.LinkSetTxQLen(link, 500) // so that a change is heard
	})
	a.reaches("0717_a")
}

func TestALinkThatSomebodyRemovedIsMadeAnew(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	r.must(r.ns, func(n *netlink.Handle) error { return namespace.Delete(n, r.d.link("0717_a")) })
	a.reaches("0717_a")
}

func TestAMachineThatRestartsIsServedAgain(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	for range 2 {
		a.unplug()
		eventually(t, "the listener is closed", func() bool {
			x := r.d.running("0717_a")
			x.mu.Lock()
			defer x.mu.Unlock()
			return x.servers == nil
		})
		a.plug("vnet0")
		a.reaches("0717_a")
	}
}

func TestAMachineMayBeAdoptedBeforeItRuns(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.unplug()
	a.adopt("0717_a")
	a.plug("vnet0")
	a.reaches("0717_a")
}

func TestAnotherMachineThatGetsTheDevicesNameReachesNothing(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	a.reaches("0717_a")
	a.unplug()
	b := r.vm("vnet0", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	eventually(t, "the device is hooked up", func() bool { f, _ := r.filters("vnet0"); return len(f) == 2 })
	b.silent("", "169.254.169.254:80")
	b.pingsItsGateway()
}

// domains is libvirt as far as the driver sees it.
type domains struct {
	mu      sync.Mutex
	device  map[string]string
	unknown bool
	changed chan struct{}
}

func (d *domains) Device(uuid, mac string) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.device[uuid+" "+mac], !d.unknown
}

func (d *domains) Changed() <-chan struct{} { return d.changed }

func (d *domains) set(uuid, mac, device string, known bool) {
	d.mu.Lock()
	d.device[uuid+" "+mac], d.unknown = device, !known
	d.mu.Unlock()
	d.changed <- struct{}{}
}

func TestADomainIsFollowedToAnotherDeviceAndItsOldNameIsForgotten(t *testing.T) {
	lv := &domains{device: map[string]string{}, changed: make(chan struct{})}
	r := newRig(t, func(c *Config) { c.Domains = lv })
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a", func(m *host.Machine) { m.External.Domain = "uuid" })
	a.silent("", "169.254.169.254:80") // nobody knows yet whose vnet0 is
	lv.set("uuid", "52:54:00:00:00:05", "vnet0", true)
	a.reaches("0717_a")
	lv.set("uuid", "52:54:00:00:00:05", "", false) // libvirt is restarted
	a.reaches("0717_a")
	a.unplug()
	lv.set("uuid", "52:54:00:00:00:05", "", true)
	a.plug("vnet7")
	b := r.vm("vnet0", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	lv.set("uuid", "52:54:00:00:00:05", "vnet7", true)
	a.reaches("0717_a")
	if f, q := r.filters("vnet0"); len(f) != 0 || len(q) != 0 {
		t.Errorf("the other machine's device has filters %v in %v", f, q)
	}
	b.silent("", "169.254.169.254:80")
}

func TestMachinesOfAnEarlierProcessAreTakenUp(t *testing.T) {
	r := newRig(t, keep)
	r.bridge("virbr0", "10.0.0.1/24")
	a := r.vm("vnet0", "virbr0", "52:54:00:00:00:05", "10.0.0.5")
	b := r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6")
	a.adopt("0717_a")
	b.adopt("0717_b")
	a.reaches("0717_a")
	b.reaches("0717_b")
	if err := r.d.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := a.get(metadataURL); err == nil {
		t.Errorf("without a process it reaches %q", got)
	}
	r.open(keep)
	found, err := r.d.Found(context.Background())
	slices.Sort(found)
	if err != nil || !slices.Equal(found, []string{"0717_a", "0717_b"}) {
		t.Fatalf("found %v, %v", found, err)
	}
	a.adopt("0717_a")
	a.reaches("0717_a")
	if err := r.d.Stop(context.Background(), "0717_b", false); err != nil {
		t.Fatal(err)
	}
	if f, q := r.filters("vnet1"); len(f) != 0 || len(q) != 0 {
		t.Errorf("a stopped machine's device has filters %v in %v", f, q)
	}
	if found, err := r.d.Found(context.Background()); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
	if err := r.d.Stop(context.Background(), "0717_a", false); err != nil {
		t.Fatal(err)
	}
	if f, q := r.filters("vnet0"); len(f) != 0 || len(q) != 0 {
		t.Errorf("the qdisc that an earlier process made is left: %v in %v", f, q)
	}
}

func TestWhatAKilledProcessLeavesIsTakenUpOrRemoved(t *testing.T) {
	r := newRig(t, keep)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	for _, next := range []func(){
		func() { a.adopt("0717_a"); a.reaches("0717_a") },
		func() {},
	} {
		if err := r.d.Close(); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childOf+"="+r.name)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Errorf("the other process says %q, %v", line, err)
		}
		a.reaches("0717_a")
		cmd.Process.Kill()
		cmd.Wait()
		if got, err := a.get(metadataURL); err == nil {
			t.Errorf("without a process it reaches %q", got)
		}
		r.open(keep)
		if found, err := r.d.Found(context.Background()); err != nil || !slices.Equal(found, []string{"0717_a"}) {
			t.Errorf("found %v, %v", found, err)
		}
		next()
		if err := r.d.Stop(context.Background(), "0717_a", true); err != nil {
			t.Fatal(err)
		}
		if f, q := r.filters("vnet0"); len(f) != 0 || len(q) != 0 {
			t.Errorf("filters %v in %v are left", f, q)
		}
	}
}

func TestOfMachinesThatStartAtOnceOneGetsTheDevice(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	ids := []string{"0717_a", "0717_b", "0717_c", "0717_d"}
	errs := make([]error, len(ids))
	var all sync.WaitGroup
	for n, id := range ids {
		all.Go(func() { errs[n] = r.d.Start(context.Background(), a.spec(id), answering(id)) })
	}
	all.Wait()
	got := ""
	for n, id := range ids {
		if errs[n] != nil {
			continue
		}
		if got != "" {
			t.Errorf("%s and %s have it", got, id)
		}
		got = id
	}
	a.reaches(got)
}

func TestWithoutKeepNothingOfAnEarlierProcessIsLeft(t *testing.T) {
	r := newRig(t, keep)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	if err := r.d.Close(); err != nil {
		t.Fatal(err)
	}
	r.open()
	if f, q := r.filters("vnet0"); len(f) != 0 || len(q) != 0 {
		t.Errorf("filters %v in %v are left", f, q)
	}
	if found, err := r.d.Found(context.Background()); err != nil || len(found) != 0 {
		t.Errorf("found %v, %v", found, err)
	}
}

func TestADeviceOfAMachineThatIsNoLongerThereIsTakenOver(t *testing.T) {
	r := newRig(t, keep)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	if err := r.d.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(keep)
	a.adopt("0717_b")
	a.reaches("0717_b")
	if err := r.d.Stop(context.Background(), "0717_a", false); err != nil {
		t.Fatal(err)
	}
	a.reaches("0717_b")
}

func TestADeviceIsServedOnce(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	refused := &host.Refusal{}
	if err := r.d.Start(context.Background(), a.spec("0717_b"), answering("0717_b")); !errors.As(err, &refused) {
		t.Errorf("a second machine of this installation: %v", err)
	}
	other, err := New(Config{State: tag(r.state, 8), Host: r.name})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Start(context.Background(), a.spec("0717_c"), answering("0717_c")); !errors.As(err, &refused) {
		t.Errorf("a machine of another installation: %v", err)
	}
	a.reaches("0717_a")
	if found, err := r.d.Found(context.Background()); err != nil || len(found) != 0 {
		t.Errorf("a machine that was refused left %v, %v", found, err)
	}
}

func TestADeviceThatIsNoMachinesIsRefused(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	a.adopt("0717_a")
	for _, device := range []string{"virbr0", "lo", r.d.link("0717_a")} {
		m := a.spec("0717_b")
		m.External.Device = device
		refused := &host.Refusal{}
		if err := r.d.Start(context.Background(), m, answering(m.ID)); !errors.As(err, &refused) {
			t.Errorf("%s: %v", device, err)
		}
	}
}

func TestATapIsHookedUp(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	tap := -1
	err := namespace.Within(r.ns, func() (err error) {
		if tap, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
			return err
		}
		req, err := unix.NewIfreq("tap0")
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		return unix.IoctlIfreq(tap, unix.TUNSETIFF, req)
	})
	if tap >= 0 {
		defer unix.Close(tap)
	}
	if err != nil {
		t.Skipf("there are no taps here: %v", err)
	}
	r.must(r.ns, func(n *netlink.Handle) error {
		link, err := n.LinkByName("tap0")
		if err != nil {
			return err
		}
		return n.LinkSetUp(link)
	})
	m := a.spec("0717_t")
	m.External.Device = "tap0"
	if err := r.d.Start(context.Background(), m, answering(m.ID)); err != nil {
		t.Fatal(err)
	}
	// The machine's SYN, and the answer that comes back out of the tap.
	frame := slices.Concat([]byte{0x02, 0, 0, 0, 0, 1}, a.mac, []byte{0x08, 0x00}, summed(syn(a.address, 9)))
	if _, err := unix.Write(tap, frame); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	for {
		n, err := unix.Read(tap, buf)
		if err != nil {
			t.Fatal(err)
		}
		if n >= 54 && [2]byte(buf[12:14]) == [2]byte{0x08, 0x00} && [4]byte(buf[26:30]) == metadataAddress.As4() {
			if net.HardwareAddr(buf[:6]).String() != a.mac.String() || buf[47] != 0x12 || buf[22] != 1 {
				t.Errorf("the answer is % x", buf[:n])
			}
			return
		}
	}
}

// summed fills in the checksums of an IPv4 packet with TCP in it.
func summed(p []byte) []byte {
	sum := func(parts ...[]byte) []byte {
		var s uint32
		for _, b := range parts {
			for i := 0; i+1 < len(b); i += 2 {
				s += uint32(b[i])<<8 | uint32(b[i+1])
			}
		}
		for s>>16 != 0 {
			s = s&0xffff + s>>16
		}
		return []byte{byte(^s >> 8), byte(^s)}
	}
	copy(p[10:], sum(p[:20]))
	copy(p[36:], sum(p[12:20], []byte{0, unix.IPPROTO_TCP, 0, byte(len(p) - 20)}, p[20:]))
	return p
}

func TestAMachineThatSpeaksTLSHasThatPortOpenOnly(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	m := a.spec("0717_a")
	m.Metadata.Protocol = "https"
	h := answering(m.ID)
	h.MetadataTLS = &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return nil, errors.New("there is none in this test")
	}}
	if err := r.d.Start(context.Background(), m, h); err != nil {
		t.Fatal(err)
	}
	eventually(t, "port 443 answers", func() bool {
		c, err := a.dial("", "169.254.169.254:443")
		if err != nil {
			return false
		}
		defer c.Close()
		return tls.Client(c, &tls.Config{InsecureSkipVerify: true}).Handshake() != nil
	})
	a.silent("", "169.254.169.254:80")
}

func TestWhatIsNotAMachineIsNotStarted(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	for name, spoil := range map[string]func(*host.Machine){
		"not external": func(m *host.Machine) { m.External = nil },
		"no id":        func(m *host.Machine) { m.ID = "" },
		"a slash":      func(m *host.Machine) { m.ID = "a/b" },
		"no device":    func(m *host.Machine) { m.External.Device = "" },
		"no interface": func(m *host.Machine) { m.Interfaces = nil },
		"a group MAC":  func(m *host.Machine) { m.Interfaces[0].MAC = "01:00:5e:00:00:01" },
		"IPv6":         func(m *host.Machine) { m.Interfaces[0].Address = netip.IPv6Loopback() },
		"link-local":   func(m *host.Machine) { m.Interfaces[0].Address = metadataAddress },
		"hop limit":    func(m *host.Machine) { m.Metadata.ResponseHopLimit = 65 },
		"protocol":     func(m *host.Machine) { m.Metadata.Protocol = "gopher" },
	} {
		m := a.spec("0717_a")
		spoil(&m)
		if err := r.d.Start(context.Background(), m, answering("a")); err == nil {
			t.Errorf("it was started with %s", name)
			r.d.Stop(context.Background(), m.ID, true)
		}
	}
}
