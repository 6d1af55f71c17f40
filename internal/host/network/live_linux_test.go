package network

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// authority is a certificate for tests, and who trusts it.
func authority(t *testing.T) (*tls.Config, *x509.CertPool) {
	t.Helper()
	s := httptest.NewTLSServer(nil) // only its certificate is wanted
	defer s.Close()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	return &tls.Config{Certificates: s.TLS.Certificates, MinVersion: tls.VersionTLS12}, roots
}

// startTLS is start with handlers that can do both protocols.
func (r *rig) startTLS(m host.Machine) (*inst, *x509.CertPool) {
	r.t.Helper()
	config, roots := authority(r.t)
	space := "tabtest-" + r.state + "-" + tag(m.ID, 8)
	r.space(space)
	i, err := r.attach(m, space, host.Handlers{Metadata: names(m.ID), MetadataTLS: config})
	if err != nil {
		r.t.Fatal(err)
	}
	return i, roots
}

func (i *inst) getTLS(roots *x509.CertPool) (string, error) {
	tr := &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12},
		DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
			return i.dial("", addr, time.Second)
		},
	}
	res, err := (&http.Client{Transport: tr, Timeout: 3 * time.Second}).Get("https://169.254.169.254/metadata/v1/instance")
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

func TestTheMetadataServiceSpeaksOneProtocolAndTheOtherPortIsSilent(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	m.Metadata.Protocol = "https"
	a, roots := r.startTLS(m)
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	if got, err := a.getTLS(roots); got != "metadata of 0717_a" {
		t.Errorf("%q, %v", got, err)
	}
	b.reachesItsOwn()
	a.silent("", "169.254.169.254:80")
	b.silent("", "169.254.169.254:443")
}

func TestTheMetadataServiceFollowsItsSettingsWhileTheMachineRuns(t *testing.T) {
	r := newRig(t)
	a, roots := r.startTLS(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	a.reachesItsOwn()
	a.Metadata.Enabled = false
	a.update()
	a.silent("", "169.254.169.254:80")
	a.Metadata = vpc.MetadataService{Enabled: true, Protocol: "https", ResponseHopLimit: 2}
	a.update()
	if got, err := a.getTLS(roots); got != "metadata of 0717_a" {
		t.Errorf("%q, %v", got, err)
	}
	a.silent("", "169.254.169.254:80")
	a.Metadata.Protocol = "http"
	a.update()
	a.silent("", "169.254.169.254:443")
	a.reachesItsOwn()
	a.answersHaveTTL(2)
	a.Metadata.ResponseHopLimit = 7
	a.update()
	a.answersHaveTTL(7)
	// What says nothing new changes nothing: an open connection goes on.
	c, err := a.dial("", "169.254.169.254:80", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a.update()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.0\r\n\r\n")
	if got, err := io.ReadAll(c); !strings.Contains(string(got), "metadata of 0717_a") {
		t.Errorf("%q, %v", got, err)
	}
}

func (i *inst) answersHaveTTL(want byte) {
	i.t.Helper()
	tap := i.packets()
	defer unix.Close(tap)
	i.reachesItsOwn()
	seen := 0
	for buf := make([]byte, 1500); ; {
		n, _, err := unix.Recvfrom(tap, buf, 0)
		if err != nil {
			break
		}
		if n >= 40 && [4]byte(buf[12:16]) == metadataAddress.As4() && buf[33]&5 == 0 { // neither FIN nor RST
			seen++
			if buf[8] != want {
				i.t.Errorf("an answer with the TTL %d, want %d", buf[8], want)
			}
		}
	}
	if seen < 2 {
		i.t.Errorf("%d packets of the answer seen", seen)
	}
}

// packets is a socket that sees all IPv4 packets of the machine.
func (i *inst) packets() int {
	i.t.Helper()
	tap := -1
	err := i.inside(func() (err error) {
		tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(syscall.ETH_P_IP>>8|syscall.ETH_P_IP<<8&0xff00))
		return err
	})
	if err != nil {
		i.t.Fatal(err)
	}
	wait := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(tap, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		i.t.Fatal(err)
	}
	return tap
}

// A reset would tell a machine, and whoever asks through it, that something is
// there.
func TestAMachineGetsNoResetWhileItsMetadataServiceChanges(t *testing.T) {
	r := newRig(t)
	a, _ := r.startTLS(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	a.reachesItsOwn()
	done := make(chan struct{})
	var each sync.WaitGroup
	for range 4 {
		each.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				c, err := a.dial("", "169.254.169.254:80", 50*time.Millisecond)
				if err == nil {
					c.Close()
				}
				if errors.Is(err, syscall.ECONNREFUSED) {
					t.Error("a connection was refused")
					return
				}
			}
		})
	}
	for n := range 20 {
		a.Metadata.Enabled = n%2 == 1
		a.Metadata.ResponseHopLimit = n + 1
		a.update()
	}
	close(done)
	each.Wait()
	a.reachesItsOwn()
}

func TestARequestUnderWayEndsWhenTheServiceIsTurnedOff(t *testing.T) {
	r := newRig(t)
	space := "tabtest-" + r.state + "-slow"
	r.space(space)
	started, end := make(chan struct{}), make(chan struct{})
	a, err := r.attach(spec("0717_a", "vpc-1", "10.240.0.4", 4), space, host.Handlers{
		Metadata: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			close(started)
			<-end
			io.WriteString(w, "the end")
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	answer := make(chan string)
	go func() {
		got, err := a.get("", metadataURL)
		answer <- fmt.Sprint(got, err)
	}()
	<-started
	changed := make(chan error)
	off := a.Machine
	off.Metadata.Enabled = false
	go func() { changed <- a.port.Update(context.Background(), off) }()
	eventually(t, "new connections find nobody", func() bool {
		c, err := a.dial("", "169.254.169.254:80", 200*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(end)
	if got := <-answer; got != "the end<nil>" {
		t.Errorf("the request under way: %s", got)
	}
	if err := <-changed; err != nil {
		t.Fatal(err)
	}
}

func TestAnUpdateThatIsWrongChangesNothing(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	change := func(f func(*host.Machine)) host.Machine {
		m := a.Machine
		m.Interfaces = slices.Clone(m.Interfaces)
		f(&m)
		return m
	}
	for what, m := range map[string]host.Machine{
		"another id":        change(func(m *host.Machine) { m.ID = "0717_b" }),
		"another VPC":       change(func(m *host.Machine) { m.VPC = "vpc-2" }),
		"another address":   change(func(m *host.Machine) { m.Interfaces[0].Address = netip.MustParseAddr("10.240.0.5") }),
		"another MAC":       change(func(m *host.Machine) { m.Interfaces[0].MAC = "02:07:00:00:00:05" }),
		"no interface":      change(func(m *host.Machine) { m.Interfaces = nil }),
		"a hop limit of 0":  change(func(m *host.Machine) { m.Metadata.ResponseHopLimit = 0 }),
		"https without TLS": change(func(m *host.Machine) { m.Metadata.Protocol = "https" }),
		"another protocol":  change(func(m *host.Machine) { m.Metadata.Protocol = "gopher" }),
		"a group that is wrong": change(func(m *host.Machine) {
			m.Interfaces[0].Firewall.Inbound = []host.Pass{{Protocol: "sctp"}}
		}),
		"a floating address of the link": change(func(m *host.Machine) {
			m.Interfaces[0].Floating = netip.MustParseAddr("169.254.169.254")
		}),
	} {
		if err := a.port.Update(context.Background(), m); err == nil {
			t.Errorf("an update with %s was made", what)
		}
	}
	a.reachesItsOwn()
}

// pass is one rule of a security group.
func pass(proto string, first, last uint16, remote string) host.Pass {
	p := host.Pass{Protocol: proto, Ports: [2]uint16{first, last}, ICMPType: -1, ICMPCode: -1}
	if remote != "" {
		p.Remote = netip.MustParsePrefix(remote)
	}
	return p
}

func guarded(m host.Machine, inbound, outbound []host.Pass) host.Machine {
	m.Interfaces = slices.Clone(m.Interfaces)
	m.Interfaces[0].Firewall = host.Firewall{Inbound: inbound, Outbound: outbound}
	return m
}

func TestSecurityGroupsLetThroughWhatTheyNameAndNothingElse(t *testing.T) {
	r := newRig(t)
	everything := []host.Pass{pass("all", 0, 0, "")}
	a := r.start(guarded(spec("0717_a", "vpc-1", "10.240.0.4", 4), nil, everything))
	b := r.start(guarded(spec("0717_b", "vpc-1", "10.240.0.5", 5), nil, everything))
	c := r.start(guarded(spec("0717_c", "vpc-1", "10.240.0.6", 6), everything, nil))
	for _, port := range []string{":7", ":8", ":9", ":10"} {
		echo(t, b.space, b.Address.String()+port)
	}
	reach := func(from *inst, want ...string) {
		t.Helper()
		var each sync.WaitGroup
		for _, port := range []string{"7", "8", "9", "10"} {
			each.Go(func() {
				if slices.Contains(want, port) {
					wantPeer(t, from.space, "10.240.0.5:"+port, from.Address.String())
				} else {
					wantNobody(t, from.space, "10.240.0.5:"+port)
				}
			})
		}
		each.Go(func() {
			if got := from.ping("10.240.0.5"); got != slices.Contains(want, "ping") {
				t.Errorf("%s pings: %v", from.ID, got)
			}
		})
		each.Wait()
	}
	inbound := func(p ...host.Pass) {
		t.Helper()
		b.Machine = guarded(b.Machine, p, everything)
		b.update()
	}
	reach(a)
	inbound(everything...)
	reach(a, "7", "8", "9", "10", "ping")
	reach(c) // may send nothing, but be reached
	c.Machine = guarded(c.Machine, everything, []host.Pass{pass("tcp", 8, 8, "10.240.0.5/32")})
	c.update()
	reach(c, "8")
	inbound(pass("tcp", 8, 9, ""))
	reach(a, "8", "9")
	inbound(pass("tcp", 0, 0, "10.240.0.4/32"), pass("udp", 1, 65535, ""))
	reach(a, "7", "8", "9", "10")
	reach(c)
	inbound(pass("tcp", 7, 7, "10.240.0.0/30"), pass("tcp", 8, 8, "10.240.0.4/30"), pass("tcp", 9, 9, "2001:db8::/32"))
	reach(a, "8")
	inbound(host.Pass{Protocol: "icmp", ICMPType: 0, ICMPCode: -1})
	reach(a)
	inbound(host.Pass{Protocol: "icmp", ICMPType: 8, ICMPCode: 0})
	reach(a, "ping")
	inbound()
	reach(a)
	// Whatever the groups say, the metadata service and the resolver are there.
	c.Machine = guarded(c.Machine, nil, nil)
	c.update()
	c.reachesItsOwn()
	if got := addressIn(t, c.exchange("udp4", "10.240.0.1:53", queryFor(t, 4, metadataName, false)), 4); got != "169.254.169.254" {
		t.Errorf("the resolver says %q", got)
	}
}

func TestAnswersPassWhereNothingElseDoes(t *testing.T) {
	r := newRig(t)
	everything := []host.Pass{pass("all", 0, 0, "")}
	a := r.start(guarded(spec("0717_a", "vpc-1", "10.240.0.4", 4), nil, everything))
	b := r.start(guarded(spec("0717_b", "vpc-1", "10.240.0.5", 5), everything, nil))
	echo(t, a.space, "10.240.0.4:7")
	echo(t, b.space, "10.240.0.5:7")
	wantPeer(t, a.space, "10.240.0.5:7", "10.240.0.4")
	wantNobody(t, b.space, "10.240.0.4:7")
}

func TestAConnectionEndsWithTheRuleThatLetItThrough(t *testing.T) {
	r := newRig(t)
	everything := []host.Pass{pass("all", 0, 0, "")}
	a := r.start(guarded(spec("0717_a", "vpc-1", "10.240.0.4", 4), nil, everything))
	// Its group lets all out, so it could take the connection for its own.
	b := r.start(guarded(spec("0717_b", "vpc-1", "10.240.0.5", 5), []host.Pass{pass("tcp", 7, 8, "")}, everything))
	var open []net.Conn
	for _, port := range []string{":7", ":8"} {
		echo(t, b.space, "10.240.0.5"+port)
		c, err := dialFrom(t, a.space, "10.240.0.5"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Read(make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	b.Machine = guarded(b.Machine, []host.Pass{pass("tcp", 8, 9, "10.240.0.4/32")}, everything)
	b.update()
	for n, c := range open {
		io.WriteString(c, "still there?")
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := c.Read(make([]byte, 64)); (err == nil) != (n == 1) {
			t.Errorf("the connection to port %d: %v", 7+n, err)
		}
	}
}

func TestSecurityGroupsJudgeWhoComesByAFloatingAddress(t *testing.T) {
	r, world := newWorldRig(t)
	everything := []host.Pass{pass("all", 0, 0, "")}
	a := r.start(guarded(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA), []host.Pass{pass("tcp", 7, 7, worldAddress+"/32")}, everything))
	echo(t, a.space, "10.240.0.4:7")
	echo(t, a.space, "10.240.0.4:8")
	wantPeer(t, world, floatingA+":7", worldAddress)
	wantNobody(t, world, floatingA+":8")
	wantNobody(t, r.host, floatingA+":7")
	// Outbound rules hold for the way out, too.
	echo(t, world, worldAddress+":7")
	wantPeer(t, a.space, worldAddress+":7", floatingA)
	a.Machine = guarded(a.Machine, nil, []host.Pass{pass("tcp", 7, 7, "10.0.0.0/8")})
	a.update()
	wantNobody(t, a.space, worldAddress+":7")
}

func TestThousandsOfRulesTakeEffect(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	var many []host.Pass
	for n := range 2500 {
		many = append(many, pass("tcp", 7, 7, fmt.Sprintf("10.%d.%d.9/32", n>>8, n&255)), pass("tcp", uint16(1000+n), uint16(1000+n), "192.0.2.0/24"))
	}
	many = append(many, pass("tcp", 8, 8, "10.240.0.4/32"), pass("tcp", 8, 8, "10.240.0.4/32"))
	b := r.start(guarded(spec("0717_b", "vpc-1", "10.240.0.5", 5), many, nil))
	echo(t, b.space, "10.240.0.5:7")
	echo(t, b.space, "10.240.0.5:8")
	wantPeer(t, a.space, "10.240.0.5:8", "10.240.0.4")
	wantNobody(t, a.space, "10.240.0.5:7")
}

func TestEachInterfaceIsGuardedAndTheMetadataServiceIsAtTheFirst(t *testing.T) {
	r := newRig(t)
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	second := m.Interfaces[0]
	second.ID, second.MAC = "nic-2", "02:07:00:00:01:04"
	second.Address, second.Subnet = netip.MustParseAddr("10.240.64.4"), netip.MustParsePrefix("10.240.64.0/24")
	m.Interfaces = append(m.Interfaces, second)
	a := r.start(m)
	other := spec("0717_b", "vpc-1", "10.240.64.5", 5)
	other.Interfaces[0].Subnet = second.Subnet
	b := r.start(other)
	a.reachesItsOwn()
	r.start(spec("0717_c", "vpc-1", "10.240.0.5", 6)).reaches("10.240.0.4")
	b.reaches("10.240.64.4")
	r.in(a.space, "ip", "route", "replace", "169.254.169.254/32", "dev", "eth1")
	a.silent("10.240.64.4", "169.254.169.254:80")
	// The first card's address does not leave by the second.
	r.in(a.space, "ip", "route", "add", "10.240.64.5/32", "dev", "eth1")
	echo(t, b.space, "10.240.64.5:7")
	a.silent("10.240.0.4", "10.240.64.5:7")
}

func TestAMachineThatCannotBeJoinedLeavesNothing(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	space := "tabtest-" + r.state + "-bad"
	r.space(space)
	change := func(f func(*host.Machine)) host.Machine {
		m := spec("0717_b", "vpc-1", "10.240.0.5", 5)
		f(&m)
		return m
	}
	for what, m := range map[string]host.Machine{
		"an address in use":             change(func(m *host.Machine) { m.Interfaces[0].Address = a.Address }),
		"a group MAC":                   change(func(m *host.Machine) { m.Interfaces[0].MAC = "01:00:5e:00:00:01" }),
		"a hop limit of 0":              change(func(m *host.Machine) { m.Metadata.ResponseHopLimit = 0 }),
		"a hop limit of 65":             change(func(m *host.Machine) { m.Metadata.ResponseHopLimit = 65 }),
		"the gateway's address":         change(func(m *host.Machine) { m.Interfaces[0].Address = gateway(m.Interfaces[0].Subnet) }),
		"an address outside its subnet": change(func(m *host.Machine) { m.Interfaces[0].Address = netip.MustParseAddr("10.241.0.5") }),
		"two equal interfaces":          change(func(m *host.Machine) { m.Interfaces = append(m.Interfaces, m.Interfaces[0]) }),
		"no interface":                  change(func(m *host.Machine) { m.Interfaces = nil }),
		"an id that is two":             change(func(m *host.Machine) { m.ID = "0717/b" }),
		"ports in reverse": change(func(m *host.Machine) {
			m.Interfaces[0].Firewall.Inbound = []host.Pass{pass("tcp", 9, 8, "")}
		}),
		"nothing at all": {},
	} {
		if _, err := r.attach(m, space, host.Handlers{Metadata: names("")}); err == nil {
			t.Errorf("a machine with %s was joined", what)
		}
	}
	// Half-way there is a device of that name already, which the machine has made.
	r.in(space, "ip", "link", "add", "eth0", "type", "bridge")
	if _, err := r.attach(spec("0717_b", "vpc-9", "10.240.0.5", 5), space, host.Handlers{Metadata: names("")}); err == nil {
		t.Error("a card was put over another")
	}
	left, err := namespace.Named(r.n.prefix())
	if err != nil || len(left) != 1 {
		t.Errorf("routers: %v, %v", left, err)
	}
	r.inRouter("vpc-1", func() error {
		ports, err := portsOf("vpc-1")
		if len(ports) != 1 {
			t.Errorf("ports: %v", ports)
		}
		return err
	})
	a.reachesItsOwn()
}

// lose forgets the network as the death of its process would: all sockets are
// closed, nothing is removed.
func (r *rig) lose() {
	r.t.Helper()
	for _, i := range r.insts {
		i.port.Release(context.Background())
	}
	if err := r.n.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.insts = nil
}

func TestPortsAreTakenUpAfterTheProcessDied(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	c := r.start(spec("0717_c", "vpc-2", "10.240.0.4", 4))
	echo(t, a.space, "10.240.0.4:7")
	wantPeer(t, world, floatingA+":7", worldAddress)
	wantPeer(t, b.space, "10.240.0.4:7", "10.240.0.5")
	open, err := dialFrom(t, world, floatingA+":7")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	before := r.hostState()
	links := r.in(a.space, "ip", "-o", "link", "show", "eth0")
	r.lose()

	// Nobody serves, but traffic flows and the guards stand.
	wantPeer(t, world, floatingA+":7", worldAddress)
	wantPeer(t, b.space, "10.240.0.4:7", "10.240.0.5")
	if got := r.hostState(); got != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", got, before)
	}

	r.open(uplinkConfig())
	left, err := r.n.Found()
	var ids []string
	for _, l := range left {
		ids = append(ids, l.VPC+" "+l.Machine+" "+l.Interface)
	}
	slices.Sort(ids)
	if err != nil || strings.Join(ids, ", ") != "vpc-1 0717_a nic-0717_a, vpc-1 0717_b nic-0717_b, vpc-2 0717_c nic-0717_c" {
		t.Errorf("found %v, %v", ids, err)
	}
	for _, i := range []*inst{a, b, c} {
		again, err := r.attach(i.Machine, i.space, host.Handlers{Metadata: names(i.ID)})
		if err != nil {
			t.Fatal(err)
		}
		again.reachesItsOwn()
	}
	if left, err := r.n.Found(); err != nil || len(left) != 0 {
		t.Errorf("found after all were taken up: %v, %v", left, err)
	}
	if err := r.n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.in(a.space, "ip", "-o", "link", "show", "eth0"); got != links {
		t.Errorf("the card is %s, before: %s", got, links)
	}
	if got := r.hostState(); got != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", got, before)
	}
	wantPeer(t, world, floatingA+":7", worldAddress)
	open.SetDeadline(time.Now().Add(3 * time.Second))
	line := make([]byte, 64)
	if _, err := open.Read(line); err != nil {
		t.Errorf("a connection of before: %v", err)
	}
	if _, err := io.WriteString(open, "still there"); err != nil {
		t.Error(err)
	}
	if n, err := open.Read(line); err != nil || string(line[:n]) != "still there" {
		t.Errorf("a connection of before: %q, %v", line[:n], err)
	}
}

func TestWhatNobodyTakesUpIsDiscardedAlone(t *testing.T) {
	r, world := newWorldRig(t)
	empty := r.hostState()
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(floats(spec("0717_b", "vpc-1", "10.240.0.5", 5), floatingB))
	r.start(spec("0717_c", "vpc-2", "10.240.0.4", 4))
	r.lose()
	r.open(uplinkConfig())
	again, err := r.attach(b.Machine, b.space, host.Handlers{Metadata: names(b.ID)})
	if err != nil {
		t.Fatal(err)
	}
	echo(t, b.space, "10.240.0.5:7")
	if err := r.n.Discard(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	if err := r.n.Discard(t.Context(), b.ID); err != nil { // has been taken up
		t.Fatal(err)
	}
	again.reachesItsOwn()
	wantPeer(t, world, floatingB+":7", worldAddress)
	state := r.hostState()
	if strings.Contains(state, floatingA) || !strings.Contains(state, floatingB) {
		t.Errorf("the host has %s", state)
	}
	r.inRouter("vpc-1", func() error {
		rules, err := readFloating()
		if err == nil && (len(rules.in) != 1 || len(rules.out) != 1) {
			t.Errorf("floating addresses: %v", rules)
		}
		return err
	})
	if rules := r.in(r.n.prefix()+tag("vpc-1", 8), "nft", "list", "ruleset"); strings.Contains(rules, device(a.ID)) {
		t.Errorf("rules of the discarded port are left: %s", rules)
	}
	left, err := r.n.Found()
	if err != nil || len(left) != 1 || left[0].Machine != "0717_c" {
		t.Errorf("found %v, %v", left, err)
	}
	if err := again.port.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.hostState(); got != empty {
		t.Errorf("the host has\n%s\nbefore:\n%s", got, empty)
	}
}

func TestManyMachinesComeAndGoAtOnce(t *testing.T) {
	r, world := newWorldRig(t)
	before := r.hostState()
	echo(t, world, worldAddress+":7")
	var each sync.WaitGroup
	for n := range 12 {
		each.Go(func() {
			for range 3 {
				m := floats(spec(fmt.Sprintf("0717_%d", n), fmt.Sprintf("vpc-%d", n%4), fmt.Sprintf("10.240.0.%d", 10+n), byte(n)), fmt.Sprintf("198.51.100.%d", 10+n))
				space := fmt.Sprintf("tabtest-%s-many-%d", r.state, n)
				ns, err := namespace.Create(space, func() error { return namespace.Up("lo") })
				if err != nil {
					t.Error(err)
					return
				}
				p, err := r.n.AttachNamespace(context.Background(), m, host.Handlers{Metadata: names(m.ID)}, ns)
				ns.Close()
				if err == nil {
					(&inst{rig: r, Machine: m, space: space}).reachesItsOwn()
					wantPeer(t, space, worldAddress+":7", m.Interfaces[0].Floating.String())
					err = p.Detach(context.Background())
				}
				if err := errors.Join(err, namespace.Remove(space)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// Sweeping takes nothing from those that come.
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

func TestTheStateIsCheckedBeforeItNamesFiles(t *testing.T) {
	for _, state := range []string{"", "../../..", "0123456", "012345678", "0123456G", "0123456\n"} {
		if _, err := New(Config{State: state}); err == nil || !strings.Contains(err.Error(), "hexadecimal") {
			t.Errorf("the state %q: %v", state, err)
		}
	}
	for _, up := range []Uplink{
		{Range: netip.MustParsePrefix("2001:db8::/64")}, {Range: netip.MustParsePrefix("100.127.0.0/31")}, {Range: netip.MustParsePrefix("100.127.0.1/16")},
		{Range: netip.MustParsePrefix("169.254.0.0/24")}, {Reachable: make([]netip.AddrPort, 1)}, {Resolvers: make([]netip.AddrPort, 1)},
	} {
		if _, err := New(Config{State: "01234567", Uplink: &up}); err == nil || !strings.Contains(err.Error(), "is not") {
			t.Errorf("the uplink %v: %v", up, err)
		}
	}
}

func TestAnUplinkThatIsNotWantedAnyMoreIsCut(t *testing.T) {
	r, world := newWorldRig(t)
	before := r.hostState()
	echo(t, world, worldAddress+":7")
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	r.start(spec("0717_b", "vpc-2", "10.240.0.5", 5))
	wantPeer(t, a.space, worldAddress+":7", floatingA)
	r.lose()
	r.open(nil)
	a, err := r.attach(a.Machine, a.space, host.Handlers{Metadata: names(a.ID)})
	if err != nil {
		t.Fatal(err)
	}
	a.reachesItsOwn()
	wantNobody(t, a.space, worldAddress+":7")
	if err := r.n.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := r.hostState(); after != before {
		t.Errorf("the host has\n%s\nbefore:\n%s", after, before)
	}
	if left, err := namespace.Named(r.n.prefix()); err != nil || len(left) != 1 {
		t.Errorf("routers: %v, %v", left, err)
	}
}

func TestTwoInstallationsOnOneHostUseDifferentLinks(t *testing.T) {
	r, world := newWorldRig(t)
	echo(t, world, worldAddress+":7")
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	other := &rig{t: t, state: tag(r.state, 8), host: r.host}
	other.open(uplinkConfig())
	b := other.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingB))
	echo(t, b.space, "10.240.0.4:7")
	wantPeer(t, a.space, worldAddress+":7", hostAddress)
	wantPeer(t, b.space, worldAddress+":7", floatingB)
	wantPeer(t, world, floatingB+":7", worldAddress)
	if err := errors.Join(b.port.Detach(t.Context()), other.n.Close()); err != nil {
		t.Fatal(err)
	}
	wantPeer(t, a.space, worldAddress+":7", hostAddress)
}

func TestAPortOfAnotherNamespaceIsMadeAnew(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	r.lose()
	r.open(nil)
	space := "tabtest-" + r.state + "-new"
	r.space(space)
	again, err := r.attach(a.Machine, space, host.Handlers{Metadata: names(a.ID)})
	if err != nil {
		t.Fatal(err)
	}
	again.reachesItsOwn()
	err = within(t, a.space, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			if link, err := namespace.Find(n, "eth0"); link != nil || err != nil {
				t.Errorf("the old card is there: %v", err)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestATapIsTakenUpWhileItsMachineHoldsIt(t *testing.T) {
	r := newRig(t)
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	ctx := context.Background()
	h := host.Handlers{Metadata: names(m.ID)}
	p, files, err := r.n.AttachTap(ctx, m, h)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 {
		t.Fatalf("%d files", len(files))
	}
	guest := newGuest(t, files[0], m)
	b.reaches("10.240.0.4")
	p.Release(ctx)
	r.lose()
	r.open(nil)
	left, err := r.n.Found()
	if err != nil || len(left) != 2 || !slices.ContainsFunc(left, func(l Left) bool { return l.Machine == m.ID && l.Tap }) {
		t.Errorf("found %v, %v", left, err)
	}
	if p, err = r.n.TakeUpTap(ctx, m, h); err != nil {
		t.Fatal(err)
	}
	if b, err = r.attach(b.Machine, b.space, host.Handlers{Metadata: names(b.ID)}); err != nil {
		t.Fatal(err)
	}
	b.reaches("10.240.0.4")
	guest.stop()
	// With the file goes the device; then there is nothing to take up.
	p.Release(ctx)
	eventually(t, "the tap is gone", func() bool {
		p, err := r.n.TakeUpTap(ctx, m, h)
		if err == nil {
			p.Release(ctx)
		}
		return err != nil
	})
	b.reachesItsOwn()
	p, files, err = r.n.AttachTap(ctx, m, h)
	if err != nil {
		t.Fatal(err)
	}
	guest = newGuest(t, files[0], m)
	b.reaches("10.240.0.4")
	guest.stop()
	if err := p.Detach(ctx); err != nil {
		t.Fatal(err)
	}
	r.inRouter("vpc-1", func() error {
		ports, err := portsOf("vpc-1")
		if len(ports) != 1 {
			t.Errorf("ports: %v", ports)
		}
		return err
	})
}

// guest is the least of a virtual machine: what is sent to its tap it sends back
// as the answer to ARP and ping.
type guest struct {
	f    *os.File
	done chan struct{}
	wake [2]int
}

func newGuest(t *testing.T, f *os.File, m host.Machine) *guest {
	t.Helper()
	mac, err := net.ParseMAC(m.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{f: f, done: make(chan struct{})}
	if err := unix.Pipe2(g.wake[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	fd := int(f.Fd())
	own := m.Interfaces[0].Address.As4()
	go func() {
		defer close(g.done)
		const header = 10 // of virtio-net, before each frame
		for buf := make([]byte, 4096); ; {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(g.wake[0]), Events: unix.POLLIN}}
			if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) || ready[1].Revents != 0 {
				return
			}
			if ready[0].Revents == 0 {
				continue
			}
			n, err := unix.Read(fd, buf)
			if err != nil {
				return
			}
			if answer := respond(buf[header:n], mac, own); answer != nil {
				unix.Write(fd, append(make([]byte, header), answer...))
			}
		}
	}()
	return g
}

func (g *guest) stop() {
	unix.Close(g.wake[1])
	<-g.done
	unix.Close(g.wake[0])
	g.f.Close()
}

func respond(f []byte, mac net.HardwareAddr, own [4]byte) []byte {
	if len(f) < 42 {
		return nil
	}
	out := slices.Clone(f)
	copy(out, f[6:12])
	copy(out[6:], mac)
	switch {
	case f[12] == 8 && f[13] == 6 && f[21] == 1 && [4]byte(f[38:42]) == own: // asked for its MAC
		out[21] = 2
		copy(out[32:], f[22:32])
		copy(out[22:], mac)
		copy(out[28:], own[:])
	case f[12] == 8 && f[13] == 0 && f[23] == 1 && f[34] == 8 && [4]byte(f[30:34]) == own: // a ping
		copy(out[26:], f[30:34])
		copy(out[30:], f[26:30])
		out[34] = 0
		// The sum of what is 8 less in its first byte is 8 more.
		sum := uint32(out[36])<<8 + uint32(out[37]) + 0x0800
		sum = sum&0xffff + sum>>16
		out[36], out[37] = byte(sum>>8), byte(sum)
	default:
		return nil
	}
	return out
}
