package kafka

import (
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
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

const topic = "audit"

// broker is franz-go's own, not Kafka.
func broker(t *testing.T, opts ...kfake.Opt) *kfake.Cluster {
	t.Helper()
	opts = append([]kfake.Opt{kfake.NumBrokers(2), kfake.SeedTopics(3, topic)}, opts...)
	c, err := kfake.NewCluster(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func sink(t *testing.T, cfg Config) *Sink {
	t.Helper()
	if cfg.Topic == "" {
		cfg.Topic = topic
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// events makes n events from an index on, of ten requests in turn.
func events(from, n int, padding ...int) []store.Entry {
	out := make([]store.Entry, n)
	pad := ""
	if len(padding) > 0 {
		pad = strings.Repeat("x", padding[0])
	}
	for i := range out {
		index := from + i
		key := fmt.Sprintf("request-%d", index%10)
		out[i] = store.Entry{Index: int64(index), Event: store.Event{
			Time: time.Unix(int64(index), 0), AccountID: "acc", CorrelationID: key, Action: "iam-identity.token.create",
			Doc: fmt.Appendf(nil, `{"id":"event-%d","correlationId":%q,"message":%q}`, index, key, pad),
		}}
	}
	return out
}

// deliver sends events as a route does: what was not taken again, until all is.
func deliver(t *testing.T, s *Sink, entries []store.Entry) (failures int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for len(entries) > 0 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		taken, err := s.Deliver(ctx, entries)
		cancel()
		entries = entries[taken:]
		if err != nil {
			if failures++; failures > 200 || time.Now().After(deadline) {
				t.Fatalf("after %d failures: %v", failures, err)
			}
		}
	}
	return failures
}

// check reads a topic and demands that it has all events up to n, and that of
// each request the first copies stand in order.
func check(t *testing.T, addresses []string, n int) (copies int) {
	t.Helper()
	cl, err := kgo.NewClient(kgo.SeedBrokers(addresses...), kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	seen, last := map[string]bool{}, map[string]int{}
	for len(seen) < n {
		f := cl.PollFetches(ctx)
		if ctx.Err() != nil {
			t.Fatalf("%d of %d events are in the topic", len(seen), n)
		}
		for r := range f.RecordsAll() {
			var e struct {
				ID            string `json:"id"`
				CorrelationID string `json:"correlationId"`
			}
			if err := json.Unmarshal(r.Value, &e); err != nil {
				t.Fatalf("%v in %.100s", err, r.Value)
			}
			copies++
			if seen[e.ID] {
				continue
			}
			seen[e.ID] = true
			var i int
			if _, err := fmt.Sscanf(e.ID, "event-%d", &i); err != nil {
				t.Fatal(err)
			}
			if before, ok := last[e.CorrelationID]; ok && before > i {
				t.Errorf("of %s, event %d came after %d", e.CorrelationID, i, before)
			}
			last[e.CorrelationID] = i
			if string(r.Key) != e.CorrelationID {
				t.Errorf("event %s has the key %q", e.ID, r.Key)
			}
			headers := map[string]string{}
			for _, h := range r.Headers {
				headers[h.Key] = string(h.Value)
			}
			if headers["id"] != e.ID || headers["index"] != fmt.Sprint(i) || headers["account"] != "acc" || headers["action"] != "iam-identity.token.create" {
				t.Errorf("event %s has the headers %v", e.ID, headers)
			}
		}
	}
	return copies
}

func TestEventsArriveInOrderUnderEachCodec(t *testing.T) {
	for name := range compressions {
		c := broker(t)
		s := sink(t, Config{Brokers: c.ListenAddrs(), Compression: name})
		if n := deliver(t, s, events(0, 500)) + deliver(t, s, events(500, 500)); n > 0 {
			t.Errorf("%q: %d failures", name, n)
		}
		if copies := check(t, c.ListenAddrs(), 1000); copies != 1000 {
			t.Errorf("%q: %d copies of 1000 events", name, copies)
		}
	}
}

func TestAnEventsTimeDoesNotLetItsRecordExpire(t *testing.T) {
	c := broker(t)
	s := sink(t, Config{Brokers: c.ListenAddrs()})
	old := events(1, 1)
	if r := record(&s.cfg, &old[0]); !r.Timestamp.IsZero() {
		t.Errorf("the record of an old event has the time %v", r.Timestamp)
	}
	deliver(t, s, old)
}

// cutting is a listener whose connections break after some bytes.
type cutting struct {
	net.Listener
	budget *atomic.Int64 // bytes that brokers may still read and write
}

func (l cutting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return cut{c, l.budget}, nil
}

type cut struct {
	net.Conn
	budget *atomic.Int64
}

func (c cut) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.budget.Add(-int64(n)) < 0 {
		c.Close()
		return 0, net.ErrClosed
	}
	return n, err
}

func (c cut) Write(b []byte) (int, error) {
	if c.budget.Add(-int64(len(b))) < 0 {
		c.Close() // what was asked has been done, and nobody hears of it
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

func TestCutConnectionsLoseNothingAndKeepTheOrder(t *testing.T) {
	var budget atomic.Int64
	budget.Store(1 << 40)
	c := broker(t, kfake.ListenFn(func(network, address string) (net.Listener, error) {
		l, err := new(net.ListenConfig).Listen(context.Background(), network, address)
		return cutting{l, &budget}, err
	}))
	s := sink(t, Config{Brokers: c.ListenAddrs(), Compression: "none"})
	next, cuts := 0, 0
	for _, left := range []int64{10, 400, 2_000, 7_000, 12_000, 19_000, 24_000, 26_000} {
		budget.Store(left)
		entries := events(next, 200)
		next += len(entries)
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			taken, err := s.Deliver(ctx, entries)
			cancel()
			if err != nil {
				cuts++
			}
			entries = entries[taken:]
		}
		budget.Store(1 << 40)
		deliver(t, s, entries)
	}
	if cuts == 0 {
		t.Error("no delivery failed")
	}
	t.Logf("%d deliveries failed, %d copies of %d events", cuts, check(t, c.ListenAddrs(), next), next)
}

func TestAnswersThatAreLostOrRefusedLoseNothingAndKeepTheOrder(t *testing.T) {
	c := broker(t)
	var faults atomic.Int64
	dice := mathrand.New(mathrand.NewPCG(1, 2)) // of the one goroutine that serves requests
	c.ControlKey(int16(kmsg.Produce), func(req kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		p := req.(*kmsg.ProduceRequest)
		var code int16
		throw := dice.IntN(6)
		if throw < 3 {
			faults.Add(1)
		}
		switch throw {
		case 0:
			return nil, net.ErrClosed, true // as if the broker had died before it answers
		case 1:
			code = kerr.NotEnoughReplicas.Code
		case 2:
			code = kerr.InvalidRecord.Code // never to be taken, one would think
		default:
			return nil, nil, false
		}
		resp := p.ResponseKind().(*kmsg.ProduceResponse)
		for _, rt := range p.Topics {
			st := kmsg.NewProduceResponseTopic()
			st.Topic, st.TopicID = rt.Topic, rt.TopicID
			for _, rp := range rt.Partitions {
				sp := kmsg.NewProduceResponseTopicPartition()
				sp.Partition, sp.ErrorCode = rp.Partition, code
				st.Partitions = append(st.Partitions, sp)
			}
			resp.Topics = append(resp.Topics, st)
		}
		return resp, nil, true
	})
	s := sink(t, Config{Brokers: c.ListenAddrs()})
	failures := 0
	for from := 0; from < 600; from += 50 {
		failures += deliver(t, s, events(from, 50))
	}
	if faults.Load() == 0 {
		t.Error("nothing went wrong")
	}
	t.Logf("%d requests went wrong, %d deliveries failed, %d copies of 600 events", faults.Load(), failures, check(t, c.ListenAddrs(), 600))
}

func TestARestartedBrokerLosesNothing(t *testing.T) {
	dir := t.TempDir()
	start := func(ports ...int) *kfake.Cluster {
		c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(3, topic), kfake.DataDir(dir), kfake.Ports(ports...), kfake.SyncWrites())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := start(0)
	address := c.ListenAddrs()
	_, port, err := net.SplitHostPort(address[0])
	if err != nil {
		t.Fatal(err)
	}
	var fixed int
	if _, err := fmt.Sscan(port, &fixed); err != nil {
		t.Fatal(err)
	}
	s := sink(t, Config{Brokers: address})
	deliver(t, s, events(0, 100))
	c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	taken, err := s.Deliver(ctx, events(100, 100))
	cancel()
	if err == nil || taken != 0 {
		t.Fatalf("with the broker gone, %d were taken, error %v", taken, err)
	}
	if _, err := s.Deliver(t.Context(), events(100, 100)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("with the broker gone: %v", err)
	}
	c = start(fixed)
	defer c.Close()
	deliver(t, s, events(100, 100))
	check(t, address, 200)
}

func TestABrokerThatSaysNothingHoldsNobodyLongerThanAsked(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	release := make(chan struct{})
	c := broker(t)
	// The goroutine that serves requests stands still here.
	c.ControlKey(int16(kmsg.Produce), func(kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		c.SleepControl(func() { <-release })
		return nil, nil, false
	})
	s := sink(t, Config{Brokers: c.ListenAddrs()})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	taken, err := s.Deliver(ctx, events(0, 10))
	if err == nil || taken != 0 || !strings.Contains(err.Error(), "in time") {
		t.Errorf("%d taken, error %v", taken, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	close(release)
	c.Close()
}

func TestLimitsOfBrokersAreFoundAndAnEventBeyondThemIsNamed(t *testing.T) {
	c := broker(t, kfake.BrokerConfigs(map[string]string{"message.max.bytes": "60000"}))
	s := sink(t, Config{Brokers: c.ListenAddrs(), Compression: "none"})
	entries := append(events(0, 60, 4000), events(60, 1, 100_000)...)
	entries = append(entries, events(61, 5)...)
	var taken int
	var err error
	for rest := entries; err == nil && len(rest) > 0; rest = entries[taken:] {
		var n int
		n, err = s.Deliver(t.Context(), rest)
		taken += n
	}
	var rejected *RejectedError
	if taken != 60 || !asRejected(err, &rejected) || rejected.Index != 60 || !strings.Contains(err.Error(), "max.message.bytes") {
		t.Fatalf("%d taken, error %v", taken, err)
	}
	check(t, c.ListenAddrs(), 60)
	// Within our own limit an event is named too.
	s = sink(t, Config{Brokers: c.ListenAddrs(), MaxBytes: minBytes})
	if _, err := s.Deliver(t.Context(), events(60, 1, 30_000)); !asRejected(err, &rejected) {
		t.Errorf("an event beyond max_message_bytes: %v", err)
	}
}

func TestAMissingTopicIsNamed(t *testing.T) {
	c := broker(t)
	s := sink(t, Config{Brokers: c.ListenAddrs(), Topic: "absent"})
	if taken, err := s.Deliver(t.Context(), events(0, 3)); taken != 0 || err == nil || !strings.Contains(err.Error(), "no topic absent") {
		t.Errorf("%d taken, error %v", taken, err)
	}
	if err := c.CreateTopic("absent", 1, nil); err != nil {
		t.Fatal(err)
	}
	deliver(t, s, events(0, 3))
}

func TestATopicThatIsNotAllowedIsNamed(t *testing.T) {
	c := broker(t, kfake.EnableSASL(), kfake.EnableACLs(), kfake.User("PLAIN", "tabard", "a long password"), kfake.Superuser("PLAIN", "root", "root"))
	s := sink(t, Config{Brokers: c.ListenAddrs(), SASL: credentials(t, mechanismPlain, "a long password")})
	if _, err := s.Deliver(t.Context(), events(0, 1)); err == nil || !strings.Contains(err.Error(), "Write and Describe on") || !strings.Contains(err.Error(), topic) {
		t.Error(err)
	}
}

func credentials(t *testing.T, mechanism, password string) *SASL {
	t.Helper()
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return &SASL{Mechanism: mechanism, User: "tabard", PasswordFile: file}
}

func TestEachMechanismAuthenticatesAndAWrongPasswordIsSaidWithoutIt(t *testing.T) {
	const right, wrong = "the right password", "some-wrong-password"
	for ours, theirs := range map[string]string{mechanismPlain: "PLAIN", mechanismScram256: "SCRAM-SHA-256", mechanismScram512: "SCRAM-SHA-512"} {
		c := broker(t, kfake.EnableSASL(), kfake.Superuser(theirs, "tabard", right))
		s := sink(t, Config{Brokers: c.ListenAddrs(), SASL: credentials(t, ours, wrong)})
		_, err := s.Deliver(t.Context(), events(0, 1))
		if err == nil || !strings.Contains(err.Error(), "sasl.password_file") || strings.Contains(err.Error(), wrong) {
			t.Errorf("%s: %v", ours, err)
		}
		// The file is read again.
		if err := os.WriteFile(s.cfg.SASL.PasswordFile, []byte(right), 0o600); err != nil {
			t.Fatal(err)
		}
		if taken, err := s.Deliver(t.Context(), events(0, 1)); err != nil {
			t.Errorf("%s with the right password: %d, %v", ours, taken, err)
		}
		without := sink(t, Config{Brokers: c.ListenAddrs()})
		if _, err := without.Deliver(t.Context(), events(0, 1)); err == nil || !strings.Contains(err.Error(), "SASL") {
			t.Errorf("%s without credentials: %v", ours, err)
		}
	}
}

func TestABrokerThatRepeatsThePasswordDoesNotGetItIntoAnError(t *testing.T) {
	const wrong = "some-wrong-password"
	c := broker(t, kfake.EnableSASL(), kfake.Superuser("PLAIN", "tabard", "another"))
	c.ControlKey(int16(kmsg.SASLAuthenticate), func(req kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		resp := req.ResponseKind().(*kmsg.SASLAuthenticateResponse)
		resp.ErrorCode = kerr.SaslAuthenticationFailed.Code
		resp.ErrorMessage = kmsg.StringPtr("no such credentials: " + string(req.(*kmsg.SASLAuthenticateRequest).SASLAuthBytes) + strings.Repeat("!", 10_000))
		return resp, nil, true
	})
	s := sink(t, Config{Brokers: c.ListenAddrs(), SASL: credentials(t, mechanismPlain, wrong)})
	_, err := s.Deliver(t.Context(), events(0, 1))
	if err == nil || !strings.Contains(err.Error(), "SASL_AUTHENTICATION_FAILED") || !strings.Contains(err.Error(), "sasl.password_file") ||
		strings.Contains(err.Error(), wrong) || len(err.Error()) > 1000 {
		t.Error(err)
	}
}

func TestABrokersAuthorityAndNameAreChecked(t *testing.T) {
	ca, pair := certificate(t, "127.0.0.1")
	other, _ := certificate(t, "127.0.0.1")
	c := broker(t, kfake.TLS(&tls.Config{Certificates: []tls.Certificate{pair}}))
	deliver(t, sink(t, Config{Brokers: c.ListenAddrs(), TLS: &secure.TLS{CAFile: ca}}), events(0, 10))
	for name, settings := range map[string]*secure.TLS{
		"another authority":  {CAFile: other},
		"another name":       {CAFile: ca, ServerName: "kafka.example"},
		"no authority of it": {},
	} {
		_, err := sink(t, Config{Brokers: c.ListenAddrs(), TLS: settings}).Deliver(t.Context(), events(0, 1))
		if err == nil || !strings.Contains(err.Error(), "tls.ca_file") {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := sink(t, Config{Brokers: c.ListenAddrs()}).Deliver(ctx, events(0, 1)); err == nil {
		t.Error("a broker with TLS took events without")
	}
}

func TestABrokerCannotSendPasswordsInTheClearToAnotherMachine(t *testing.T) {
	c := broker(t)
	c.ControlKey(int16(kmsg.Metadata), func(req kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		resp := req.ResponseKind().(*kmsg.MetadataResponse)
		resp.Brokers = []kmsg.MetadataResponseBroker{{NodeID: 0, Host: "192.0.2.1", Port: 9092}}
		resp.ControllerID = 0
		st := kmsg.NewMetadataResponseTopic()
		st.Topic = kmsg.StringPtr(topic)
		sp := kmsg.NewMetadataResponseTopicPartition()
		st.Partitions = append(st.Partitions, sp)
		resp.Topics = append(resp.Topics, st)
		return resp, nil, true
	})
	s := sink(t, Config{Brokers: c.ListenAddrs()})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := s.Deliver(ctx, events(0, 1)); err == nil || !strings.Contains(err.Error(), "tls is not set") {
		t.Error(err)
	}
}

func TestNothingRunsBeforeTheFirstDeliveryNorAfterTheEnd(t *testing.T) {
	c := broker(t)
	deliver(t, sink(t, Config{Brokers: c.ListenAddrs()}), events(0, 1)) // what the broker starts for its first caller
	before := goleak.IgnoreCurrent()
	s := sink(t, Config{Brokers: c.ListenAddrs()})
	goleak.VerifyNone(t, before)
	deliver(t, s, events(0, 10))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.Close()
	goleak.VerifyNone(t, before)
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	good := Config{Brokers: []string{"127.0.0.1:9092"}, Topic: topic}
	for want, change := range map[string]func(*Config){
		"brokers has 0":             func(c *Config) { c.Brokers = nil },
		"form host:port":            func(c *Config) { c.Brokers = []string{"kafka"} },
		"not of the form":           func(c *Config) { c.Brokers = []string{"user:secret@kafka:9092"} },
		"another machine":           func(c *Config) { c.Brokers = []string{"kafka.example:9092"} },
		"is another machine":        func(c *Config) { c.Brokers = []string{"127.0.0.1:1", "127.0.0.1.example:9092"} },
		"is not the name of one":    func(c *Config) { c.Topic = "a topic" },
		`topic ""`:                  func(c *Config) { c.Topic = "" },
		"compression":               func(c *Config) { c.Compression = "rar" },
		"max_message_bytes":         func(c *Config) { c.MaxBytes = 10 },
		"cert_file and key_file":    func(c *Config) { c.TLS = &secure.TLS{CertFile: "x"} },
		"mechanism":                 func(c *Config) { c.SASL = &SASL{Mechanism: "gssapi", User: "u", PasswordFile: "f"} },
		"user or password_file":     func(c *Config) { c.SASL = &SASL{Mechanism: mechanismPlain, User: "u"} },
		"read sasl.password_file: ": func(c *Config) { c.SASL = &SASL{Mechanism: mechanismPlain, User: "u", PasswordFile: "/nonexistent"} },
	} {
		c := good
		change(&c)
		_, err := New(c)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("want %q: %v", want, err)
		}
	}
	for _, c := range []Config{
		good,
		{Brokers: []string{"[::1]:9092", "localhost:9092"}, Topic: "t"},
		{Brokers: []string{"kafka.example:9092"}, Topic: "t", Insecure: true},
		{Brokers: []string{"kafka.example:9093"}, Topic: "t", TLS: &secure.TLS{}},
	} {
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	}
}

// certificate makes an authority and a server's certificate for an address.
func certificate(t *testing.T, ip string) (caFile string, pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		IPAddresses: []net.IP{net.ParseIP(ip)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return caFile, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func asRejected(err error, target **RejectedError) bool { return errors.As(err, target) }
