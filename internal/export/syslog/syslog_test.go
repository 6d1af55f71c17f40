package syslog

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func entry(n int64, action string) store.Entry {
	doc := fmt.Sprintf(`{"id":"event-%d","action":%q}`, n, action)
	return store.Entry{Index: n, Day: 20260702, Event: store.Event{
		Time: time.Date(2026, 7, 2, 12, 0, 0, 123456789, time.UTC), AccountID: "acme", CorrelationID: fmt.Sprint("t", n), Action: action,
		Outcome: "failure", Severity: "critical", Initiator: "IBMid-1", Target: "crn:x", Doc: []byte(doc),
	}}
}

func entries(from, to int64) (out []store.Entry) {
	for n := from; n < to; n++ {
		out = append(out, entry(n, "a.b.c"))
	}
	return out
}

func write(e store.Entry, most int) string {
	var b bytes.Buffer
	h := header{facility: 13, host: "tabard.example.com", app: "tabard", dataID: "tabard@32473", most: most}
	h.append(&b, &e)
	return b.String()
}

func TestAnEventIsAMessageOfRFC5424(t *testing.T) {
	const want = `<106>1 2026-07-02T12:00:00.123456Z tabard.example.com tabard - event [tabard@32473 id="event-7" position="7" action="a.b.c" ` +
		`outcome="failure" severity="critical" account="acme" correlation="t7" initiator="IBMid-1" target="crn:x"] {"id":"event-7","action":"a.b.c"}`
	if got := write(entry(7, "a.b.c"), 0); got != want {
		t.Errorf("wrote\n%s\nwant\n%s", got, want)
	}
	for severity, pri := range map[string]string{"normal": "<110>1 ", "warning": "<108>1 ", "critical": "<106>1 ", "odd": "<109>1 "} {
		e := entry(1, "a")
		if e.Severity = severity; !strings.HasPrefix(write(e, 0), pri) {
			t.Errorf("%s: %s", severity, write(e, 0))
		}
	}
}

// message is the grammar of what is written; the structured data must end where
// it does.
var message = regexp.MustCompile(`^<\d{1,3}>1 \S+ \S+ \S+ - event \[tabard@32473((?: [a-z]+="(?:[^"\\\]]|\\["\\\]])*")*)\](?: (.*))?$`)

func TestNoValueLeavesItsPlace(t *testing.T) {
	for _, hostile := range []string{
		"a\nb", "x\" injected=\"1", "] <0>1 - - - - - - forged", `\"`, `\`, `\\]`, "\x00\x1b[31m\u2028\u0085", "\xff\xfe", strings.Repeat("]", 5000), strings.Repeat("ü", 5000),
	} {
		e := entry(1, hostile)
		e.CorrelationID, e.Target, e.AccountID = hostile, hostile, hostile
		doc, err := json.Marshal(map[string]string{"id": "event-1", "text": hostile})
		if err != nil {
			t.Fatal(err)
		}
		e.Doc = append(doc, "\n\r\x7f"...)
		got := write(e, 0)
		parts := message.FindStringSubmatch(got)
		if parts == nil || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f }) || strings.ContainsRune(parts[1], '\u0085') {
			t.Fatalf("%q is written as %q", hostile, got)
		}
		if strings.Contains(parts[1], ` injected="`) && !strings.Contains(parts[1], `\" injected=\"`) {
			t.Errorf("a value became a parameter: %s", parts[1])
		}
		if !json.Valid([]byte(parts[2])) {
			t.Errorf("the message is no JSON: %q", parts[2])
		}
	}
}

func FuzzAppend(f *testing.F) {
	f.Add("a.b", "x] y", []byte(`{"id":"1"}`), 0)
	f.Add("\n", `\"`, []byte("{\"id\":\"\\\""), 2048)
	f.Fuzz(func(t *testing.T, action, target string, doc []byte, most int) {
		e := entry(1, action)
		e.Target, e.Doc = target, doc
		got := write(e, most)
		head, _, _ := strings.Cut(got, "] ")
		if strings.ContainsAny(got, "\n\r\x00") || !message.MatchString(strings.ToValidUTF8(got, "?")) || !strings.HasPrefix(head, "<106>1 ") {
			t.Errorf("%q", got)
		}
	})
}

func TestALongEventIsShortenedAndStaysJSON(t *testing.T) {
	e := entry(1, "a")
	e.Doc = []byte(`{"id":"event-1","requestData":{"x":"` + strings.Repeat("y", 9000) + `"},"trace":[],"action":"a"}`)
	got := write(e, 4096)
	parts := message.FindStringSubmatch(got)
	if len(got) > 4096 || parts == nil || parts[2] != `{"action":"a","id":"event-1","shortened":true}` {
		t.Errorf("%d bytes: %s", len(got), got)
	}
	e.Doc = []byte(`{"id":"event-1","message":"` + strings.Repeat("y", 9000) + `"}`)
	if got := write(e, 4096); len(got) > 4096 || !strings.HasSuffix(got, `]`) || !strings.Contains(got, `id="event-1"`) {
		t.Errorf("%d bytes: %s", len(got), got)
	}
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	bad, worse := -1, 24
	for name, c := range map[string]Config{
		"nothing": {}, "no port": {Address: "host"}, "port 0": {Address: "host:0"}, "no host": {Address: ":514"}, "odd transport": {Transport: "relp", Address: "h:1"},
		"a relative socket": {Transport: "unix", Address: "log"}, "facility": {Address: "h:1", Facility: &bad}, "facility 24": {Address: "h:1", Facility: &worse},
		"a host name with a space": {Address: "h:1", Hostname: "a b"}, "an id with a bracket": {Address: "h:1", DataID: "a]"},
		"small messages": {Address: "h:1", MaxBytes: 100}, "large datagrams": {Transport: "udp", Address: "h:1", MaxBytes: 70000},
		"TLS over TCP": {Transport: "tcp", Address: "h:1", TLS: secure.TLS{CAFile: "x"}},
	} {
		if err := c.Check(); err == nil {
			t.Errorf("%s passes", name)
		}
	}
	ok := 16
	for _, c := range []Config{{Address: "h:6514", Facility: &ok, DataID: "x@1"}, {Transport: "unix", Address: "/dev/log"}, {Transport: "udp", Address: "[::1]:514", MaxBytes: 2048}} {
		if err := c.Check(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

// open makes a sink that does not wait long for a new connection to last.
func open(t *testing.T, c Config) *Sink {
	t.Helper()
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	s.patience = 50 * time.Millisecond
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// follower delivers as a route does: again, until everything is taken, and
// from further back when something may be lost.
type follower struct {
	t    *testing.T
	sink *Sink
	next int64
}

func (f *follower) deliver(to int64) {
	f.t.Helper()
	for limit := time.Now().Add(30 * time.Second); f.next < to; {
		if err := f.attempt(entries(f.next, to)); err != nil {
			if time.Now().After(limit) {
				f.t.Fatalf("not delivered: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (f *follower) attempt(e []store.Entry) error {
	ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Second)
	defer cancel()
	taken, err := f.sink.Deliver(ctx, e)
	f.next += int64(taken)
	var l interface{ LostFrom() int64 }
	if errors.As(err, &l) {
		f.next = l.LostFrom()
	}
	return err
}

// listen opens a port for a daemon that a test plays.
func listen(t *testing.T) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// frame reads one message with its octet count.
func frame(r *bufio.Reader) (string, error) {
	n, err := r.ReadString(' ')
	if err != nil {
		return "", err
	}
	size, err := strconv.Atoi(strings.TrimSpace(n))
	if err != nil {
		return "", err
	}
	b := make([]byte, size)
	_, err = io.ReadFull(r, b)
	return string(b), err
}

func TestADaemonThatDoesNotReadTakesNothing(t *testing.T) {
	l := listen(t)
	s := open(t, Config{Transport: TransportTCP, Address: l.Addr().String()})
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	big := entries(0, 2000)
	for i := range big {
		big[i].Doc = []byte(`{"id":"` + strings.Repeat("x", 8000) + `"}`) // 16 MB, more than all buffers
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if n, err := s.Deliver(ctx, big); n != 0 || err == nil {
		t.Errorf("took %d, %v", n, err)
	}
	_ = (<-accepted).Close()
}

func TestAProxyWithoutItsDaemonTakesNothing(t *testing.T) {
	l := listen(t)
	s := open(t, Config{Transport: TransportTCP, Address: l.Addr().String()})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	for range 3 {
		if n, err := s.Deliver(t.Context(), entries(0, 1)); n != 0 || err == nil {
			t.Errorf("took %d, %v", n, err)
		}
	}
}

func TestADaemonThatTalksWithoutAnEndIsLeft(t *testing.T) {
	l := listen(t)
	s := open(t, Config{Transport: TransportTCP, Address: l.Addr().String()})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c, err := l.Accept()
		if err != nil {
			return
		}
		for err == nil {
			_, err = c.Write(make([]byte, 32<<10))
		}
		_ = c.Close()
	}()
	if _, err := s.Deliver(t.Context(), entries(0, 1)); err == nil || !strings.Contains(err.Error(), "talks") {
		t.Errorf("error %v", err)
	}
	<-ended
}

func TestWhatADaemonMayNotHaveReadIsSentAgain(t *testing.T) {
	l := listen(t)
	s := open(t, Config{Transport: TransportTCP, Address: l.Addr().String()})
	first := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			first <- c // and does not read
		}
	}()
	f := &follower{t: t, sink: s}
	f.deliver(3)
	f.deliver(5) // its kernel has them
	broken := s.Broken()
	_ = (<-first).Close()
	<-broken
	if err := f.attempt(nil); err == nil || f.next != 0 { // as when idle
		t.Errorf("the route is at %d, %v", f.next, err)
	}
	got := make(chan string, 10)
	go func() {
		defer close(got)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for r := bufio.NewReader(c); ; {
			m, err := frame(r)
			if err != nil {
				return
			}
			got <- m
		}
	}()
	f.deliver(6)
	for n := range 6 {
		if m := <-got; !strings.Contains(m, fmt.Sprintf(`position="%d"`, n)) {
			t.Errorf("message %d is %s", n, m)
		}
	}
}

func TestTheWindowIsBounded(t *testing.T) {
	var w window
	for n := range int64(100) {
		w.add(n, 1<<20)
	}
	if w.bytes > windowBytes+1<<20 || w.bytes < windowBytes || w.parts[0].first < 90 {
		t.Errorf("%d bytes from %d on", w.bytes, w.parts[0].first)
	}
	w.add(100, 2*windowBytes) // one alone counts as a whole
	if len(w.parts) != 1 {
		t.Errorf("%d parts", len(w.parts))
	}
}

func TestDatagramsGoToASocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := &follower{t: t, sink: open(t, Config{Transport: TransportUnix, Address: path})}
	f.deliver(2)
	b := make([]byte, 9000)
	for n := range 2 {
		m, err := l.Read(b)
		if err != nil || !strings.Contains(string(b[:m]), fmt.Sprintf(`position="%d"`, n)) {
			t.Errorf("read %s, %v", b[:m], err)
		}
	}
}

// rsyslog is a real daemon that writes what it gets into a file.
type rsyslog struct {
	t      *testing.T
	dir    string
	port   int
	conf   string
	cmd    *exec.Cmd
	output string
}

const rsyslogd = "/usr/sbin/rsyslogd"

func newRsyslog(t *testing.T, module, input string) *rsyslog {
	t.Helper()
	if _, err := os.Stat(rsyslogd); err != nil {
		const text = "there is no rsyslogd on this machine: apt-get install rsyslog rsyslog-gnutls"
		if os.Getenv("CI") != "" {
			t.Fatal(text)
		}
		t.Skip(text)
	}
	l := listen(t)
	r := &rsyslog{t: t, dir: t.TempDir(), port: l.Addr().(*net.TCPAddr).Port}
	_ = l.Close()
	r.output = filepath.Join(r.dir, "out")
	r.conf = fmt.Sprintf(`global(workDirectory=%q maxMessageSize="128k" %s)
module(load="imtcp" maxSessions="50" %s)
input(type="imtcp" port="%d" address="127.0.0.1")
template(name="raw" type="string" string="%%rawmsg%%\n")
action(type="omfile" file=%q template="raw" flushOnTXEnd="on" asyncWriting="off")
`, r.dir, module, input, r.port, r.output)
	if err := os.WriteFile(filepath.Join(r.dir, "conf"), []byte(r.conf), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.kill)
	r.start()
	return r
}

func (r *rsyslog) address() string { return fmt.Sprintf("127.0.0.1:%d", r.port) }

func (r *rsyslog) start() {
	r.t.Helper()
	pid := filepath.Join(r.dir, "pid")
	_ = os.Remove(pid)
	r.cmd = exec.CommandContext(context.Background(), rsyslogd, "-n", "-f", filepath.Join(r.dir, "conf"), "-i", pid)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var d net.Dialer
		c, err := d.DialContext(r.t.Context(), "tcp", r.address())
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(limit) {
			r.t.Fatalf("rsyslogd does not listen: %v", err)
		}
	}
}

func (r *rsyslog) kill() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(syscall.SIGKILL)
	_ = r.cmd.Wait()
	r.cmd = nil
}

// order returns the positions of what arrived, each when it came first.
func (r *rsyslog) order() []int64 {
	b, err := os.ReadFile(r.output)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		r.t.Fatal(err)
	}
	var out []int64
	seen := map[int64]bool{}
	for _, m := range regexp.MustCompile(`position="(\d+)"`).FindAllSubmatch(b, -1) {
		n, err := strconv.ParseInt(string(m[1]), 10, 64)
		if err != nil {
			r.t.Fatal(err)
		}
		if !seen[n] {
			out = append(out, n)
		}
		seen[n] = true
	}
	return out
}

func (r *rsyslog) wantAll(n int64) {
	r.t.Helper()
	var got []int64
	for limit := time.Now().Add(20 * time.Second); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
		if got = r.order(); int64(len(got)) == n {
			for i, p := range got {
				if p != int64(i) {
					r.t.Fatalf("in place %d came event %d", i, p)
				}
			}
			return
		}
	}
	r.t.Fatalf("%d of %d events arrived", len(got), n)
}

func TestARealDaemonGetsEverythingThoughItIsKilled(t *testing.T) {
	r := newRsyslog(t, "", "")
	f := &follower{t: t, sink: open(t, Config{Transport: TransportTCP, Address: r.address()})}
	const each = 300
	for round := range int64(4) {
		f.deliver((round + 1) * each)
		if round < 3 {
			r.kill() // with what it has not written yet
			r.start()
		}
	}
	r.wantAll(4 * each)
}

// authority makes a certificate authority, and a certificate for a name.
func authority(t *testing.T, dir, name string) (ca, cert, key string) {
	t.Helper()
	save := func(file, kind string, der []byte) string {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	newKey := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	root, leaf := newKey(), newKey()
	rootCert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, rootCert, rootCert, &root.PublicKey, root)
	if err != nil {
		t.Fatal(err)
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, rootCert, &leaf.PublicKey, root)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return save("ca.pem", "CERTIFICATE", rootDER), save("cert.pem", "CERTIFICATE", leafDER), save("key.pem", "PRIVATE KEY", keyDER)
}

func TestARealDaemonIsReachedOverTLSAndOnlyTheRightOne(t *testing.T) {
	const name = "syslog.example.com"
	ca, cert, key := authority(t, t.TempDir(), name)
	r := newRsyslog(t, fmt.Sprintf(`defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile=%q defaultNetstreamDriverCertFile=%q defaultNetstreamDriverKeyFile=%q`, ca, cert, key),
		`streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="x509/certvalid"`)
	other, _, _ := authority(t, t.TempDir(), name)
	for what, c := range map[string]secure.TLS{
		"another authority": {CAFile: other, ServerName: name}, "another name": {CAFile: ca, CertFile: cert, KeyFile: key}, "no certificate": {CAFile: ca, ServerName: name},
	} {
		s := open(t, Config{Address: r.address(), TLS: c})
		s.patience = time.Second
		if n, err := s.Deliver(t.Context(), entries(0, 1)); n != 0 || err == nil {
			t.Errorf("%s: took %d, %v", what, n, err)
		}
		_ = s.Close()
	}
	f := &follower{t: t, sink: open(t, Config{Address: r.address(), TLS: secure.TLS{CAFile: ca, CertFile: cert, KeyFile: key, ServerName: name}})}
	f.deliver(200)
	r.kill()
	r.start()
	f.deliver(400)
	r.wantAll(400)
}
