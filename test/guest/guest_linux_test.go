package guest

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const mac = "02:00:00:00:00:0a"

// machine is a virtual machine on a tap of a network namespace, in which the
// test plays the host.
type machine struct {
	t    *testing.T
	dir  string
	ns   string
	done chan error
	cmd  *exec.Cmd
}

func newMachine(t *testing.T, seed map[string]string) *machine {
	t.Helper()
	image := Image(t)
	for _, tool := range []string{"ip", "qemu-system-x86_64", "genisoimage"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is missing: scripts/deps.sh test", tool)
		}
	}
	m := &machine{t: t, dir: t.TempDir(), ns: fmt.Sprintf("tabard-guest-%d-%s", os.Getpid(), rand.Text()[:6])}
	m.do("ip", "netns", "add", m.ns)
	t.Cleanup(func() { m.do("ip", "netns", "del", m.ns) })
	for _, line := range []string{
		"link set lo up", "tuntap add tap0 mode tap", "addr add 10.77.3.1/24 dev tap0",
		"addr add 169.254.169.254/32 dev tap0", "link set tap0 up",
	} {
		m.do("ip", append([]string{"-n", m.ns}, strings.Fields(line)...)...)
	}
	files := filepath.Join(m.dir, "seed")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range seed {
		if err := os.WriteFile(filepath.Join(files, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.do("genisoimage", "-quiet", "-V", "cidata", "-J", "-r", "-o", m.path("seed.iso"), files)
	m.do("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", m.path("disk.qcow2"))
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) do(name string, args ...string) {
	m.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		m.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func (m *machine) start() {
	m.t.Helper()
	m.cmd = exec.Command("ip", "netns", "exec", m.ns, "qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-cpu", "max", "-m", "512", "-smp", "1",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "file:"+m.path("console"),
		"-qmp", "unix:"+m.path("qmp")+",server=on,wait=off",
		"-drive", "if=virtio,format=qcow2,file="+m.path("disk.qcow2"),
		"-drive", "if=virtio,format=raw,readonly=on,file="+m.path("seed.iso"),
		"-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=n0,romfile=,mac="+mac)
	m.cmd.Stderr = m.t.Output()
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	done := make(chan error, 1)
	m.done = done
	go func(cmd *exec.Cmd) { done <- cmd.Wait(); close(done) }(m.cmd)
	m.t.Cleanup(func() {
		m.cmd.Process.Kill()
		<-done
		if m.t.Failed() {
			m.t.Logf("the console:\n%s", m.console())
		}
	})
}

func (m *machine) console() string {
	b, err := os.ReadFile(m.path("console"))
	if err != nil {
		m.t.Error(err)
	}
	return strings.ReplaceAll(string(b), "\r", "")
}

// pressPower presses the machine's power button and waits for its end.
func (m *machine) pressPower() {
	m.t.Helper()
	c, err := net.Dial("unix", m.path("qmp"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	lines := bufio.NewReader(c)
	for _, command := range []string{"", "qmp_capabilities", "system_powerdown"} {
		if command != "" {
			fmt.Fprintf(c, "{\"execute\": %q}\n", command)
		}
		if _, err := lines.ReadString('\n'); err != nil {
			m.t.Fatalf("%s: %v", command, err)
		}
	}
	m.waitEnd()
}

func (m *machine) waitEnd() {
	m.t.Helper()
	select {
	case err := <-m.done:
		if err != nil {
			m.t.Fatalf("QEMU: %v", err)
		}
	case <-time.After(time.Minute):
		m.t.Fatal("the guest goes on running")
	}
}

// listen listens inside the machine's namespace.
func (m *machine) listen(address string) net.Listener {
	m.t.Helper()
	type result struct {
		net.Listener
		error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		f, err := os.Open("/run/netns/" + m.ns)
		if err == nil {
			defer f.Close()
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		}
		if err != nil {
			c <- result{nil, err}
			return
		}
		l, err := net.Listen("tcp", address)
		c <- result{l, err}
	}()
	r := <-c
	if r.error != nil {
		m.t.Fatal(r.error)
	}
	return r.Listener
}

// certificate is a self-signed one for an address, and its PEM form.
func certificate(t *testing.T, ip string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "guest test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(ip)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestTestsThatAskAtOnceShareOneImage(t *testing.T) {
	if testing.Short() {
		t.Skip("makes an image")
	}
	needTools(t)
	cache := t.TempDir()
	paths, errs := make([]string, 2), make([]error, 2)
	var wg sync.WaitGroup
	for i := range paths {
		wg.Go(func() { paths[i], errs[i] = build(t.Context(), cache) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(cache)
	if err != nil {
		t.Fatal(err)
	}
	if paths[0] != paths[1] || len(left) != 2 { // the image and the lock
		t.Errorf("they got %v; the folder has %v", paths, left)
	}
}

// hostKeyOf is the SSH host key that the console shows.
func hostKeyOf(t *testing.T, console string) string {
	t.Helper()
	for line := range strings.Lines(console) {
		if strings.HasPrefix(line, "ssh-ed25519 ") {
			return strings.Fields(line)[1]
		}
	}
	t.Fatal("the console shows no host key")
	return ""
}

func TestAGuestIsWhatItsSeedSays(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a machine twice")
	}
	key, stranger := NewKey(t), NewKey(t)
	cert, ca := certificate(t, "169.254.169.254")
	vendor, err := json.Marshal(map[string]any{"ca_certs": map[string]any{"trusted": []string{ca}}})
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, map[string]string{
		"meta-data": "instance-id: 0737_a\nlocal-hostname: web-1\npublic-keys:\n- " + key.Public + "\n",
		"network-config": `version: 2
ethernets:
  eth0:
    match: {macaddress: "` + mac + `"}
    set-name: eth0
    addresses: [10.77.3.2/24]
    routes:
    - {to: 0.0.0.0/0, via: 10.77.3.1, on-link: true}
    - {to: 169.254.169.254/32, scope: link}
    nameservers: {addresses: [10.77.3.1]}
`,
		"vendor-data": "#cloud-config\n" + string(vendor) + "\n",
		"user-data":   "#!/bin/sh\necho ran >>/root/user-data\n",
	})
	metadata := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(io.LimitReader(r.Body, 100))
		json.NewEncoder(w).Encode(map[string]string{"said": r.Method + " " + string(b) + " " + r.Header.Get("Metadata-Flavor")})
	}))
	metadata.Listener.Close()
	metadata.Listener, metadata.TLS = m.listen("169.254.169.254:443"), &tls.Config{Certificates: []tls.Certificate{cert}}
	metadata.StartTLS()
	defer metadata.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	login := Client{Address: "10.77.3.2", Key: key, Namespace: m.ns}
	m.start()
	if err := login.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ line, want string }{
		{"hostname", "web-1"},
		{"ip -o -4 addr show dev eth0 | awk '{print $4}'", "10.77.3.2/24"},
		{"ip route show | grep ^default", "default via 10.77.3.1 dev eth0 onlink"},
		{"ip route get 169.254.169.254 | head -n 1 | awk '{print $2, $3}'", "dev eth0"},
		{"cat /etc/resolv.conf", "nameserver 10.77.3.1"},
		{"curl -sS -X PUT https://169.254.169.254/ -H 'Metadata-Flavor: ibm' -d '{}' | jq -r .said", "PUT {} ibm"},
		{"until [ -e /root/user-data ]; do sleep 0.1; done; cat /root/user-data", "ran"},
		{"awk -F: '$2 !~ /^[*]$/' /etc/passwd", ""},
		{"echo kept >/root/kept", ""},
	} {
		out, err := login.Run(ctx, step.line)
		if got := strings.TrimSpace(out); err != nil || got != step.want {
			t.Errorf("%s: %q, not %q (%v)", step.line, got, step.want, err)
		}
	}
	other := login
	other.Key = stranger
	var exit *exec.ExitError
	if _, err := other.Run(ctx, "true"); !errors.As(err, &exit) || exit.ExitCode() != 255 {
		t.Errorf("a login with another key: %v", err)
	}
	if !strings.Contains(m.console(), "GUEST READY\n") {
		t.Error("the console does not say that the guest is ready")
	}
	hostKey := hostKeyOf(t, m.console())

	m.pressPower()

	m.start()
	if err := login.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	out, err := login.Run(ctx, "cat /root/kept /root/user-data; dmesg | grep EXT4 | grep recovery; true")
	if want := "kept\nran\n"; out != want {
		t.Errorf("after a second start: %q, not %q (%v)", out, want, err)
	}
	if now := hostKeyOf(t, m.console()); now != hostKey {
		t.Errorf("the host key is now %s, before %s", now, hostKey)
	}
	if _, err := login.Run(ctx, "poweroff"); err != nil && !errors.As(err, &exit) {
		t.Error(err)
	}
	m.waitEnd()
}
