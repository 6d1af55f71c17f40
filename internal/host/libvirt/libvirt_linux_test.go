package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/adopt"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

const (
	uuid    = "5a3f7f0e-6a36-4d7e-9f54-3c1d0a6f0001"
	mac     = "52:54:00:00:00:05"
	address = "10.0.0.5"
)

// description is a machine without a disk, which boots from the network.
const description = `<domain type='qemu'>
  <name>Web-01</name><uuid>` + uuid + `</uuid><title>The shop</title>
  <metadata><tabard:instance xmlns:tabard="https://tabard.dev/xmlns/libvirt/1"><tabard:tag key="env" value="prod"/></tabard:instance></metadata>
  <memory unit='MiB'>32</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='network'/></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type='bridge'><mac address='` + mac + `'/><source bridge='br0'/><model type='virtio'/></interface>
    <memballoon model='none'/>
  </devices>
</domain>`

// isolated starts libvirtd with directories of its own, in a mount and a process
// namespace: all that it starts ends with it. The shell stays, because somebody
// has to be the parent of what libvirtd detaches.
const isolated = `set -e
for d in /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do mkdir -p $d; mount -t tmpfs none $d; done
mount -t sysfs none /sys
cat > /etc/libvirt/qemu.conf <<END
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
cgroup_controllers = [ ]
namespaces = [ ]
remember_owner = 0
END
cat > /etc/libvirt/libvirtd.conf <<END
unix_sock_dir = "$1"
auth_unix_rw = "none"
auth_unix_ro = "none"
END
libvirtd -f /etc/libvirt/libvirtd.conf -p "$1/pid" &
wait $!
`

// rig is a host with a bridge and libvirt.
type rig struct {
	t    *testing.T
	name string
	ns   netns.NsHandle
	dir  string
	stop func()
	rpc  *libvirt.Libvirt
}

func newRig(t *testing.T) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("libvirt with its own directories needs root")
	}
	for _, program := range []string{"libvirtd", "qemu-system-x86_64", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	r := &rig{t: t, name: fmt.Sprintf("libvirt-host-%d", os.Getpid())}
	if err := namespace.Share(); err != nil {
		t.Fatal(err)
	}
	var err error
	r.ns, err = namespace.Create(r.name, func() error {
		return errors.Join(namespace.DisableIPv6("default"), namespace.Up("lo"), namespace.Links(func(n *netlink.Handle) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "br0"
			br := &netlink.Bridge{LinkAttrs: attrs}
			if err := n.LinkAdd(br); err != nil {
				return err
			}
			if err := namespace.SetAddress(n, br, netip.MustParsePrefix("10.0.0.1/24"), netlink.SCOPE_UNIVERSE); err != nil {
				return err
			}
			return n.LinkSetUp(br)
		}))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.ns.Close()
		if err := namespace.Remove(r.name); err != nil {
			t.Error(err)
		}
	})
	// A socket's path is bounded, and that of a test's directory may not be.
	if r.dir, err = os.MkdirTemp("", "lv"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(r.dir) })
	r.start()
	return r
}

// start starts libvirtd.
func (r *rig) start() {
	r.t.Helper()
	out, err := os.Create(filepath.Join(r.dir, "log"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", isolated, "sh", r.dir)
	cmd.Stdout, cmd.Stderr = out, out
	if err := namespace.Within(r.ns, cmd.Start); err != nil {
		r.t.Fatal(err)
	}
	r.stop = sync.OnceFunc(func() {
		if r.rpc != nil {
			r.rpc.Disconnect()
		}
		cmd.Process.Kill()
		cmd.Wait()
		for _, s := range []string{"libvirt-sock", "libvirt-sock-ro"} {
			os.Remove(filepath.Join(r.dir, s))
		}
	})
	r.t.Cleanup(func() { r.stop() })
	var conn net.Conn
	eventually(r.t, "libvirtd answers", func() bool {
		conn, err = net.Dial("unix", filepath.Join(r.dir, "libvirt-sock"))
		return err == nil
	})
	if conn == nil {
		log, _ := os.ReadFile(out.Name())
		r.t.Fatalf("libvirtd does not run: %s", log)
	}
	r.rpc = libvirt.NewWithDialer(dialer{conn})
	if err := r.rpc.ConnectToURI(libvirt.QEMUSystem); err != nil {
		r.t.Fatal(err)
	}
}

// define makes the domain.
func (r *rig) define() libvirt.Domain {
	r.t.Helper()
	d, err := r.rpc.DomainDefineXML(description)
	if err != nil {
		r.t.Fatal(err)
	}
	return d
}

func (r *rig) boot(d libvirt.Domain) {
	r.t.Helper()
	if err := r.rpc.DomainCreate(d); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) kill(d libvirt.Domain) {
	r.t.Helper()
	if err := r.rpc.DomainDestroy(d); err != nil {
		r.t.Fatal(err)
	}
}

// found is what a watcher has told last.
type found struct {
	mu   sync.Mutex
	all  []link.Machine
	told int
}

func (f *found) tell(_ context.Context, all []link.Machine) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = all
	f.told++
	return nil
}

func (f *found) is(want ...link.Machine) func() bool {
	return func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.told > 0 && slices.EqualFunc(f.all, want, func(a, b link.Machine) bool {
			return fmt.Sprintf("%+v", a) == fmt.Sprintf("%+v", b)
		})
	}
}

// watch runs a watcher until the test ends.
func (r *rig) watch() (*Watcher, *found) {
	w := New(Config{Sockets: []string{filepath.Join(r.dir, "libvirt-sock-ro")}, Devices: adopt.Devices(r.name)})
	f := &found{}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.Run(ctx, f.tell) })
	r.t.Cleanup(func() { cancel(); wg.Wait() })
	return w, f
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not so after 90 s: %s", what)
			return
		}
	}
}

func TestDomainsAreFoundWhileTheyRun(t *testing.T) {
	r := newRig(t)
	d := r.define()
	w, f := r.watch()
	eventually(t, "a domain that does not run is not found", f.is())
	eventually(t, "the domain is known to be nowhere", func() bool { name, known := w.Device(uuid, mac); return known && name == "" })
	machine := link.Machine{
		Name: "Web-01", Device: "vnet0", Domain: uuid, MAC: mac, Bridge: "br0", State: "running",
		Tags: map[string]string{"env": "prod", "title": "The shop"},
	}
	r.boot(d)
	eventually(t, "the domain is found", f.is(machine))
	if name, known := w.Device(strings.ToUpper(uuid), strings.ToUpper(mac)); name != "vnet0" || !known {
		t.Errorf("its device is %q, %t", name, known)
	}
	if name, known := w.Device(uuid, "52:54:00:00:00:06"); name != "" || !known {
		t.Errorf("another card's device is %q, %t", name, known)
	}
	if err := r.rpc.DomainSuspend(d); err != nil {
		t.Fatal(err)
	}
	machine.State = "paused"
	eventually(t, "it is paused", f.is(machine))
	r.kill(d)
	eventually(t, "it is gone", f.is())
	r.stop()
	eventually(t, "nothing is known without libvirt", func() bool { _, known := w.Device(uuid, mac); return !known })
	r.start()
	eventually(t, "libvirt is asked again", func() bool { _, known := w.Device(uuid, mac); return known })
}

// lease is a DHCP server with one address to give, which has the machine boot
// from a URL.
func (r *rig) lease(url string) {
	r.t.Helper()
	var c net.PacketConn
	err := namespace.Within(r.ns, func() (err error) {
		c, err = namespace.ListenPacket(context.Background(), netip.MustParseAddrPort("0.0.0.0:67"), "br0")
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 2000)
		for {
			n, _, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || n < 244 {
				continue
			}
			kind := byte(0)
			for o := b[240:n]; len(o) > 2 && o[0] != 255; o = o[2+o[1]:] {
				if o[0] == 53 {
					kind = o[2]
				}
				if len(o) < 2+int(o[1]) {
					break
				}
			}
			if kind != 1 && kind != 3 {
				continue
			}
			a := make([]byte, 240, 600)
			a[0], a[1], a[2] = 2, 1, 6
			copy(a[4:8], b[4:8])
			binary.BigEndian.PutUint16(a[10:], 0x8000)
			copy(a[16:], netip.MustParseAddr(address).AsSlice())
			copy(a[20:], []byte{10, 0, 0, 1})
			copy(a[28:44], b[28:44])
			copy(a[236:], []byte{99, 130, 83, 99})
			answer := byte(2) // offer
			if kind == 3 {
				answer = 5 // acknowledgement
			}
			a = append(a, 53, 1, answer, 54, 4, 10, 0, 0, 1, 51, 4, 0, 0, 14, 16, 1, 4, 255, 255, 255, 0, 3, 4, 10, 0, 0, 1)
			a = append(a, 67, byte(len(url)))
			a = append(a, url...)
			a = append(a, 255)
			c.WriteTo(a, &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
		}
	})
	r.t.Cleanup(func() { c.Close(); wg.Wait() })
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		r.t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1) })
}

// The guest is the network card's own boot program: it takes an address, asks
// the metadata service for a script by its gateway, and does what that says,
// which is to ask again.
func TestADomainIsAdoptedAndFollowedThroughARestart(t *testing.T) {
	if _, err := os.Stat("/usr/lib/ipxe/qemu/pxe-virtio.rom"); err != nil {
		t.Skip("ipxe-qemu is not installed")
	}
	r := newRig(t)
	r.lease("http://169.254.169.254/first")
	w, f := r.watch()
	driver, err := adopt.New(adopt.Config{State: fmt.Sprintf("%08x", os.Getpid()), Host: r.name, Domains: w})
	if err != nil {
		t.Fatal(err)
	}
	defer driver.Close()
	asked := make(chan string, 16)
	h := http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/first" {
			fmt.Fprint(rw, "#!ipxe\nchain http://169.254.169.254/second?mac=${net0/mac}\n")
			return
		}
		peer, _, _ := net.SplitHostPort(req.RemoteAddr)
		asked <- peer + " " + req.URL.Query().Get("mac")
		http.NotFound(rw, req)
	})
	m := host.Machine{
		ID: "0717_web", VPC: "vpc-adopted", Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
		Interfaces: []host.Interface{{MAC: mac, Address: netip.MustParseAddr(address), Subnet: netip.MustParsePrefix("10.0.0.0/24")}},
		External:   &vpc.External{Device: "vnet0", Domain: uuid},
	}
	if err := driver.Start(context.Background(), m, host.Handlers{Metadata: h}); err != nil {
		t.Fatal(err)
	}
	d := r.define()
	for range 2 {
		r.boot(d)
		select {
		case got := <-asked:
			if got != address+" "+mac {
				t.Errorf("%s asked", got)
			}
		case <-time.After(2 * time.Minute):
			t.Fatalf("nobody asked; found %+v", f.all)
		}
		r.kill(d)
		for len(asked) > 0 {
			<-asked
		}
	}
}
