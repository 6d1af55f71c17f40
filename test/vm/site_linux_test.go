// Package vm tests virtual servers for real: the server, and agents on hosts of
// their own, with QEMU virtual machines and namespaces as instances. A host is
// a network namespace, so that nothing is put into this machine's own; one more
// stands for the network around them, where the server and its users are.
//
//	          tabard server, the command line, ssh
//	┌─ core ───┴──────────────────────────────┐
//	│ br0 10.99.0.1                           │
//	└──┬────────────────────┬─────────────────┘
//	┌──┴─ host h1 ─────┐ ┌──┴─ host h2 ─────┐
//	│ eth0 10.99.0.11  │ │ eth0 10.99.0.12  │
//	│ tabard agent     │ │ tabard agent     │
//	└──────────────────┘ └──────────────────┘
package vm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

const serverURL = "https://10.99.0.1:8470"

// site is an installation on several machines.
type site struct {
	t    *testing.T
	bin  string
	dir  string
	core string // namespace
	log  *logs

	server *process
	hosts  []*node
}

// node is a hypervisor host.
type node struct {
	site    *site
	name    string
	space   string // namespace
	address string
	dir     string
	args    []string
	agent   *process
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) writer(who string) *prefixed { return &prefixed{l, who, nil} }

type prefixed struct {
	to   *logs
	who  string
	rest []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.to.mu.Lock()
	defer p.to.mu.Unlock()
	p.rest = append(p.rest, b...)
	for {
		line, rest, ok := bytes.Cut(p.rest, []byte{'\n'})
		if !ok {
			return len(b), nil
		}
		fmt.Fprintf(&p.to.b, "%-6s %s\n", p.who, line)
		p.rest = bytes.Clone(rest)
	}
}

// newSite starts a server and joins hosts to it; agent are further arguments of
// their agents.
func newSite(t *testing.T, hosts int, agent ...string) *site {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("hosts as network namespaces need root")
	}
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, bin: bin, dir: t.TempDir(), core: fmt.Sprintf("tvm%d-core", os.Getpid()), log: &logs{}}
	t.Cleanup(func() {
		s.tearDown()
		if left := s.traces(); len(left) > 0 {
			t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
		}
		if t.Failed() {
			t.Logf("logs:\n%s", s.log.b.String())
		}
	})
	s.must("ip", "netns", "add", s.core)
	for _, line := range []string{"link set lo up", "link add br0 type bridge", "addr add 10.99.0.1/24 dev br0", "link set br0 up"} {
		s.ip(s.core, line)
	}
	s.certificate()
	s.startServer()
	s.cli("login", "-a", serverURL, "--apikey", "@"+filepath.Join(s.dir, "server", "owner.json"))
	for n := range hosts {
		s.addHost(n+1, agent)
	}
	for _, h := range s.hosts {
		h.start()
	}
	s.await("the hosts are connected", func() bool {
		var list []struct{ Name, Status string }
		s.json(&list, "host", "list")
		up := 0
		for _, h := range list {
			if h.Status == "connected" {
				up++
			}
		}
		return up == hosts
	})
	return s
}

func (s *site) addHost(n int, agent []string) {
	s.t.Helper()
	h := &node{
		site: s, name: fmt.Sprintf("h%d", n), space: fmt.Sprintf("tvm%d-h%d", os.Getpid(), n),
		address: fmt.Sprintf("10.99.0.%d", 10+n), dir: filepath.Join(s.dir, fmt.Sprintf("h%d", n)), args: agent,
	}
	s.hosts = append(s.hosts, h)
	s.must("ip", "netns", "add", h.space)
	for _, line := range []string{
		"link set lo up", "link add eth0 type veth peer name " + h.name + " netns " + s.core,
		"addr add " + h.address + "/24 dev eth0", "link set eth0 up", "route add default via 10.99.0.1",
	} {
		s.ip(h.space, line)
	}
	s.ip(s.core, "link set "+h.name+" master br0 up")
	s.cli("host", "create-join-token", h.name, "--file", filepath.Join(s.dir, h.name+".token"))
}

func (h *node) start() {
	h.site.t.Helper()
	args := []string{
		"agent", "--server", serverURL, "--ca-file", filepath.Join(h.site.dir, "ca.pem"), "--data-dir", h.dir,
		"--join-token-file", filepath.Join(h.site.dir, h.name+".token"), "--master-key-file", filepath.Join(h.site.dir, h.name+".master"),
	}
	h.agent = h.site.launch(h.name, h.space, append(args, h.args...)...)
}

// kill ends the agent as a power cut would, but for what runs beside it.
func (h *node) kill() {
	h.site.t.Helper()
	_ = h.agent.cmd.Process.Kill()
	<-h.agent.done
}

func (s *site) startServer() {
	s.t.Helper()
	s.server = s.launch("server", s.core, "server", "--data-dir", filepath.Join(s.dir, "server"), "--listen", "10.99.0.1:8470",
		"--tls-cert", filepath.Join(s.dir, "tls.pem"), "--tls-key", filepath.Join(s.dir, "tls.key"), "--driver", "none")
	s.await("the server serves", func() bool {
		_, err := s.try(s.core, "curl", "-sf", "--cacert", filepath.Join(s.dir, "ca.pem"), serverURL+"/readyz")
		return err == nil
	})
}

// launch starts the program in a namespace. nsenter, unlike ip netns exec, gives
// it no mounts of its own, so that the namespaces which it names can be seen.
func (s *site) launch(who, space string, args ...string) *process {
	s.t.Helper()
	p := &process{cmd: exec.Command("nsenter", append([]string{"--net=/run/netns/" + space, s.bin}, args...)...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), "CREDENTIALS_DIRECTORY=")
	p.cmd.Stdout = s.log.writer(who)
	p.cmd.Stderr = p.cmd.Stdout
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// stop ends a process as an operator would.
func (s *site) stop(who string, p *process) {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		if p.err != nil && p.cmd.ProcessState.ExitCode() > 0 {
			s.t.Errorf("%s ended with %v", who, p.err)
		}
	case <-time.After(time.Minute):
		s.t.Errorf("%s does not stop", who)
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// tearDown deletes all instances, so that whatever is left afterwards is a leak.
func (s *site) tearDown() {
	var list []struct{ ID string }
	out, err := s.tryCLI("is", "instances", "--output", "json")
	if err == nil && json.Unmarshal([]byte(out), &list) == nil && len(list) > 0 {
		args := []string{"is", "instance-delete", "-f"}
		for _, i := range list {
			args = append(args, i.ID)
		}
		_, _ = s.tryCLI(args...)
		for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if out, err := s.tryCLI("is", "instances", "--output", "json"); err != nil || strings.TrimSpace(out) == "[]" {
				break
			}
		}
	}
	for _, h := range s.hosts {
		s.stop(h.name, h.agent)
	}
	s.stop("server", s.server)
	for _, h := range s.hosts {
		_, _ = s.try("", "ip", "netns", "del", h.space)
	}
	_, _ = s.try("", "ip", "netns", "del", s.core)
}

// traces are what this machine still has of the test's: namespaces, devices,
// tables of the firewall, processes. Other tests may run beside it, so each is
// told by a name that only ours have.
func (s *site) traces() []string {
	marks := []string{s.dir, fmt.Sprintf("tvm%d-", os.Getpid())}
	for _, h := range s.hosts {
		// What an agent makes is named after its directory.
		sum := sha256.Sum256([]byte(h.dir))
		marks = append(marks, hex.EncodeToString(sum[:4]))
	}
	var out []string
	for _, cmd := range [][]string{{"ip", "netns", "list"}, {"ip", "-o", "link"}, {"nft", "list", "tables"}, {"pgrep", "-a", "."}, {"ls", "/etc/netns"}} {
		b, _ := exec.Command(cmd[0], cmd[1:]...).Output() // ls fails when there is nothing
		for line := range strings.Lines(string(b)) {
			if slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(line, m) }) {
				out = append(out, cmd[0]+": "+strings.TrimSpace(line))
			}
		}
	}
	return out
}

// try runs a command in a namespace ("" is our own) and returns what it printed.
func (s *site) try(space string, args ...string) (string, error) {
	if space != "" {
		args = append([]string{"nsenter", "--net=/run/netns/" + space}, args...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "TABARD_HOME="+filepath.Join(s.dir, "home"), "SSL_CERT_FILE="+filepath.Join(s.dir, "ca.pem"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w\n%s%s", strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String(), nil
}

func (s *site) must(args ...string) string {
	s.t.Helper()
	out, err := s.try("", args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) ip(space, line string) {
	s.t.Helper()
	if _, err := s.try(space, append([]string{"ip"}, strings.Fields(line)...)...); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) tryCLI(args ...string) (string, error) {
	return s.try(s.core, append([]string{s.bin}, args...)...)
}

func (s *site) cli(args ...string) string {
	s.t.Helper()
	out, err := s.tryCLI(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) json(into any, args ...string) {
	s.t.Helper()
	out := s.cli(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		s.t.Fatalf("%v printed no JSON: %v\n%s", args, err, out)
	}
}

// await waits until it is so.
func (s *site) await(what string, so func() bool) {
	s.t.Helper()
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if so() {
			return
		}
		for _, h := range s.hosts {
			select {
			case <-h.agentDone():
				s.t.Fatalf("the agent of %s has ended while waiting: %s", h.name, what)
			default:
			}
		}
	}
	s.t.Fatalf("not within three minutes: %s", what)
}

func (h *node) agentDone() <-chan struct{} {
	if h.agent == nil {
		return nil
	}
	return h.agent.done
}

// instance is what the tests look at in an instance.
type instance struct {
	ID, CRN, Name, Status string
	StatusReasons         []struct{ Code, Message string } `json:"status_reasons"`
	PrimaryInterface      struct {
		ID        string
		PrimaryIP struct{ Address string } `json:"primary_ip"`
	} `json:"primary_network_interface"`
}

func (s *site) instance(name string) instance {
	s.t.Helper()
	var i instance
	s.json(&i, "is", "instance", name)
	return i
}

// become waits until an instance has the status.
func (s *site) become(name, status string) instance {
	s.t.Helper()
	var i instance
	s.await(name+" is "+status, func() bool {
		i = s.instance(name)
		if i.Status == "failed" && status != "failed" {
			s.t.Fatalf("the instance %s has failed: %+v", name, i.StatusReasons)
		}
		return i.Status == status
	})
	return i
}

// certificate makes an authority, and the server's certificate.
func (s *site) certificate() {
	s.t.Helper()
	now := time.Now()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			s.t.Fatal(err)
		}
		return k
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caKey, leafKey := key(), key()
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "tabard"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(10, 99, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, c := range []struct {
		file string
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}{{"ca.pem", ca, caKey}, {"tls.pem", leaf, leafKey}} {
		der, err := x509.CreateCertificate(rand.Reader, c.cert, ca, &c.key.PublicKey, caKey)
		if err != nil {
			s.t.Fatal(err)
		}
		s.write(c.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	der, err := x509.MarshalPKCS8PrivateKey(leafKey)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func (s *site) write(file string, b []byte) string {
	s.t.Helper()
	path := filepath.Join(s.dir, file)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// exitCode returns a command's exit status, or -1.
func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}
