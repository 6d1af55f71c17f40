package test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"tabard.dev/tabard/test/harness"
)

// authority makes certificates for peers on this machine.
type authority struct {
	file string // its own certificate
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{file: filepath.Join(t.TempDir(), "ca.pem")}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "peers"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der := a.make(t, a.cert, a)
	var err error
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	write(t, a.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return a
}

// make signs a certificate and leaves its key in by.
func (a *authority) make(t *testing.T, template *x509.Certificate, by *authority) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := a.key
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	by.key = key
	return der
}

// issue writes a certificate for a server and client on this machine.
func (a *authority) issue(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	var leaf authority
	der := a.make(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "peer"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, &leaf)
	b, err := x509.MarshalPKCS8PrivateKey(leaf.key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write(t, certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	write(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}))
	return certFile, keyFile
}

// collector is a real OpenTelemetry collector that wants a client's certificate.
type collector struct {
	t                *testing.T
	bin, config, out string
	address          string
	log              harness.Output
	cmd              *exec.Cmd
}

func newCollector(t *testing.T, ca *authority) *collector {
	t.Helper()
	dir := t.TempDir()
	c := &collector{
		t: t, bin: os.Getenv("COLLECTOR_BIN"), config: filepath.Join(dir, "config.yaml"), out: filepath.Join(dir, "logs.jsonl"), address: freeAddress(t),
	}
	if c.bin == "" {
		t.Skip("COLLECTOR_BIN is not set: run make collector, and set it to .cache/collector")
	}
	cert, key := ca.issue(t)
	write(t, c.config, fmt.Appendf(nil, `
receivers:
  otlp:
    protocols:
      http:
        endpoint: %s
        tls: {cert_file: %s, key_file: %s, client_ca_file: %s}
exporters:
  lines: {path: %s}
service:
  pipelines:
    logs: {receivers: [otlp], exporters: [lines]}
`, c.address, cert, key, ca.file, c.out))
	c.start()
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			t.Logf("collector:\n%s", c.log.String())
		}
	})
	return c
}

func (c *collector) start() {
	c.t.Helper()
	c.cmd = exec.Command(c.bin, "--config", "file:"+c.config)
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	if err := c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
}

func (c *collector) kill() {
	if c.cmd != nil {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		c.cmd = nil
	}
}

// sent is an event as a peer got it.
type sent struct {
	index    int64
	key      string // its correlation id
	document string
}

// got returns what is in the collector's file. A line that a kill cut off was
// not acknowledged.
func (c *collector) got() (all []sent) {
	c.t.Helper()
	type attribute struct {
		Key   string
		Value struct{ StringValue, IntValue string }
	}
	b, err := os.ReadFile(c.out)
	if err != nil {
		return nil
	}
	for line := range bytes.Lines(b) {
		var batch struct {
			ResourceLogs []struct {
				Resource  struct{ Attributes []attribute }
				ScopeLogs []struct {
					LogRecords []struct {
						EventName  string
						Body       struct{ StringValue string }
						Attributes []attribute
					}
				}
			}
		}
		if json.Unmarshal(line, &batch) != nil {
			continue
		}
		for _, rl := range batch.ResourceLogs {
			resource := map[string]string{}
			for _, a := range rl.Resource.Attributes {
				resource[a.Key] = a.Value.StringValue
			}
			if resource["service.name"] != "tabard" || !strings.HasSuffix(resource["service.instance.id"], "/identity") || resource["service.version"] == "" {
				c.t.Fatalf("the collector has the resource %v", resource)
			}
			for _, sl := range rl.ScopeLogs {
				for _, r := range sl.LogRecords {
					e := sent{index: -1, document: r.Body.StringValue}
					for _, a := range r.Attributes {
						switch a.Key {
						case "tabard.index":
							if e.index, err = strconv.ParseInt(a.Value.IntValue, 10, 64); err != nil {
								c.t.Fatal(err)
							}
						case "tabard.correlation.id":
							e.key = a.Value.StringValue
						}
					}
					if r.EventName == "" {
						c.t.Fatalf("an event has no name: %+v", r)
					}
					all = append(all, e)
				}
			}
		}
	}
	return all
}

// cutConnections is how many connections a cutter breaks. With every one broken,
// the pauses of the route would decide how long the test takes.
const cutConnections = 12

// cutter is what stands before a peer: it breaks the first connections after a
// while.
func cutter(t *testing.T, to string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			there, back := 20_000+mathrand.Int64N(100_000), 1_500+mathrand.Int64N(2_000)
			if n >= cutConnections {
				there, back = math.MaxInt64, math.MaxInt64
			}
			conns.Go(func() {
				defer c.Close()
				p, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer p.Close()
				var ways sync.WaitGroup
				ways.Go(func() {
					// Some break on the way there, some on the way back.
					_, _ = io.CopyN(p, c, there)
					c.Close()
					p.Close()
				})
				_, _ = io.CopyN(c, p, back)
				c.Close()
				p.Close()
				ways.Wait()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Wait()
	})
	return l.Addr().String()
}

// kafka is franz-go's own broker, not Kafka: no broker can be had as a module or
// a package of Debian.
type kafka struct {
	t        *testing.T
	opts     []kfake.Opt // what stays in a restart,
	guard    []kfake.Opt // and who is let in
	port     int
	password string
	ca       *authority
	cluster  *kfake.Cluster
}

const auditTopic = "audit"

func newKafka(t *testing.T, ca *authority) *kafka {
	t.Helper()
	cert, key := ca.issue(t)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	k := &kafka{t: t, password: "the password of the brokers", ca: ca}
	k.opts = []kfake.Opt{kfake.NumBrokers(1), kfake.SeedTopics(3, auditTopic), kfake.DataDir(t.TempDir()), kfake.SyncWrites()}
	k.guard = []kfake.Opt{
		kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}}), kfake.EnableSASL(), kfake.Superuser("SCRAM-SHA-512", "tabard", k.password),
	}
	k.start(k.guard)
	_, port, err := net.SplitHostPort(k.address())
	if err != nil {
		t.Fatal(err)
	}
	if k.port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.cluster.Close() })
	return k
}

func (k *kafka) start(more []kfake.Opt) {
	k.t.Helper()
	var err error
	if k.cluster, err = kfake.NewCluster(append(slices.Concat(k.opts, more), kfake.Ports(k.port))...); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kafka) address() string { return k.cluster.ListenAddrs()[0] }

// reader reads the topic from its beginning.
func (k *kafka) reader() *kgo.Client {
	k.t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(k.ca.cert)
	cl, err := kgo.NewClient(kgo.SeedBrokers(k.address()), kgo.ConsumeTopics(auditTopic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DialTLSConfig(&tls.Config{RootCAs: roots}), kgo.SASL(scram.Auth{User: "tabard", Pass: k.password}.AsSha512Mechanism()))
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(cl.Close)
	return cl
}

func recordsOf(f kgo.Fetches) (all []sent) {
	for r := range f.RecordsAll() {
		e := sent{index: -1, key: string(r.Key), document: string(r.Value)}
		for _, h := range r.Headers {
			if h.Key == "index" {
				if n, err := strconv.ParseInt(string(h.Value), 10, 64); err == nil {
					e.index = n
				}
			}
		}
		all = append(all, e)
	}
	return all
}

// missing compares what a peer got with the log: nothing lacks, each document is
// as it was written, and of one correlation id the first copies are in order.
func missing(t *testing.T, name string, log map[int64]string, got []sent) (n int) {
	t.Helper()
	seen, last := map[int64]bool{}, map[string]int64{}
	for _, e := range got {
		if seen[e.index] {
			continue
		}
		seen[e.index] = true
		if want, ok := log[e.index]; ok && want != e.document {
			t.Fatalf("%s: event %d is\n%s\nwant\n%s", name, e.index, e.document, want)
		}
		if before, ok := last[e.key]; ok && before > e.index {
			t.Fatalf("%s: of %s, event %d came after %d", name, e.key, e.index, before)
		}
		last[e.key] = e.index
	}
	for i := range log {
		if !seen[i] {
			n++
		}
	}
	return n
}

// wholeLog returns the events of the whole log by their index.
func wholeLog(s *harness.Server) map[int64]string {
	s.T.Helper()
	file := filepath.Join(s.T.TempDir(), "log.jsonl")
	s.CLI("activity", "export-log", "--file", file)
	b, err := os.ReadFile(file)
	if err != nil {
		s.T.Fatal(err)
	}
	all := map[int64]string{}
	for line := range bytes.Lines(b) {
		var item struct {
			Index *int64
			Event json.RawMessage
		}
		if err := json.Unmarshal(line, &item); err != nil {
			s.T.Fatal(err)
		}
		if item.Index != nil {
			all[*item.Index] = string(item.Event)
		}
	}
	return all
}

// Under load a collector and a broker are killed and come back, connections
// break, and the server itself is killed: no event is lost on the way to either,
// and those of one request stay in order.
func TestNoEventIsLostOnTheWayToACollectorOrABroker(t *testing.T) {
	ca := newAuthority(t)
	c := newCollector(t, ca)
	k := newKafka(t, ca)
	dir := t.TempDir()
	routes, password := filepath.Join(dir, "routes.yaml"), filepath.Join(dir, "password")
	const wrong = "a wrong password"
	write(t, password, []byte(wrong))
	cert, key := ca.issue(t)
	write(t, routes, fmt.Appendf(nil, `
routes:
  - name: collector
    timeout: 5s
    otlp:
      endpoint: https://%s
      tls: {ca_file: %s, cert_file: %s, key_file: %s}
  - name: bus
    timeout: 5s
    kafka:
      brokers: [%s]
      topic: %s
      tls: {ca_file: %s}
      sasl: {mechanism: scram-sha-512, user: tabard, password_file: %s}
`, cutter(t, c.address), ca.file, cert, key, k.address(), auditTopic, ca.file, password))
	s := harness.Start(t, "--driver", "none", "--activity-routes", routes)
	s.Login()

	status := func(name, want string) string {
		t.Helper()
		for end := time.Now().Add(60 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			out := s.CLI("activity", "routes", "--output", "json")
			var all []struct {
				Name, State string
				LastError   string `json:"last_error"`
			}
			if err := json.Unmarshal([]byte(out), &all); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			for _, r := range all {
				if r.Name == name && r.State == want {
					return r.LastError
				}
			}
			if time.Now().After(end) {
				t.Fatalf("%s is not %s: %s", name, want, out)
			}
		}
	}
	if text := status("bus", "failing"); strings.Contains(text, wrong) || !strings.Contains(text, "sasl.password_file") {
		t.Errorf("with the wrong password: %s", text)
	}
	write(t, password, []byte(k.password))
	status("bus", "ok")
	status("collector", "ok")

	// load exchanges keys for tokens, four at a time for one correlation id.
	load := func(name string, during func()) {
		stop := make(chan struct{})
		var workers sync.WaitGroup
		form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {s.Owner.APIKey}}.Encode()
		for w := range 4 {
			workers.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
					}
					req, err := http.NewRequest(http.MethodPost, s.URL+"/identity/token", strings.NewReader(form))
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
					req.Header.Set("Transaction-Id", fmt.Sprintf("load-%s-%d-%d", name, w, i/4))
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						time.Sleep(time.Millisecond)
						continue
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		}
		during()
		close(stop)
		workers.Wait()
	}
	load("first", func() {
		time.Sleep(500 * time.Millisecond)
		c.kill()
		k.cluster.Close()
		if text := status("collector", "failing"); text == "" {
			t.Error("nothing is said of the collector that is gone")
		}
		status("bus", "failing")
		if s.OwnerToken() == "" {
			t.Error("tokens wait for dead targets")
		}
		k.start(k.guard)
		s.Kill()
		c.start()
		s.Launch()
		time.Sleep(500 * time.Millisecond)
	})
	s.Login()
	load("second", func() { time.Sleep(500 * time.Millisecond) })

	log := wholeLog(s)
	var fromKafka []sent
	reader := k.reader()
	lacking := map[string]int{}
	for end := time.Now().Add(90 * time.Second); ; {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		fromKafka = append(fromKafka, recordsOf(reader.PollFetches(ctx))...)
		cancel()
		fromCollector := c.got()
		lacking["collector"], lacking["broker"] = missing(t, "the collector", log, fromCollector), missing(t, "the broker", log, fromKafka)
		if lacking["collector"]+lacking["broker"] == 0 {
			t.Logf("%d events; the collector got %d, the broker %d", len(log), len(fromCollector), len(fromKafka))
			break
		}
		if time.Now().After(end) {
			t.Fatalf("of %d events these many lack: %v", len(log), lacking)
		}
	}
	k.readWithLibrdkafka(len(fromKafka))
}

// readWithLibrdkafka has the topic read by an implementation that shares
// nothing with ours. It finds this broker's SASL too new, so that the broker
// starts once more without.
func (k *kafka) readWithLibrdkafka(n int) {
	k.t.Helper()
	bin, err := exec.LookPath("kcat")
	if err != nil {
		k.t.Log("kcat is not installed: librdkafka has not read the topic")
		return
	}
	k.cluster.Close()
	k.start(nil)
	ctx, cancel := context.WithTimeout(k.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "-C", "-b", k.address(), "-t", auditTopic, "-o", "beginning", "-e", "-q", "-f", `%k\n`)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if got := bytes.Count(out, []byte("\n")); err != nil || got < n {
		k.t.Errorf("librdkafka read %d of %d records: %v %s", got, n, err, stderr.String())
	}
}
