// Package kafka sends the activity log to a topic of Kafka, or of anything that
// speaks its protocol. What a topic's consumers make of the events is theirs.
//
// Events of one correlation id have one key, so that they are in one partition.
// There the first copy of each stands in the order of the log: what goes into a
// partition at once is one batch, which brokers take as a whole or not at all,
// and nothing is sent after a batch before that is acknowledged by all replicas
// in sync.
package kafka

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

// Bounds.
const (
	maxBrokers  = 64
	maxBytes    = 64 << 20
	minBytes    = 16 << 10
	maxAnswer   = 16 << 20 // bytes; brokers answer with what they have, and ours say little
	maxCall     = 30 * time.Second
	dialTimeout = 10 * time.Second
	tries       = 3 // after the first, of a batch that a broker may take later
	metadataAge = 250 * time.Millisecond

	defaultBytes = 1_000_012 // what brokers take unless told otherwise, less their own additions
	recordCost   = 100       // bytes that a record has beyond its values, at most, and
	batchCost    = 1 << 10   // a batch beyond its records
)

// Mechanisms of authentication.
const (
	mechanismPlain    = "plain"
	mechanismScram256 = "scram-sha-256"
	mechanismScram512 = "scram-sha-512"
)

// Config are the settings of a route's target.
type Config struct {
	Brokers     []string    `yaml:"brokers"` // host:port, of which one has to answer
	Topic       string      `yaml:"topic"`   // is not created
	Compression string      `yaml:"compression"`
	MaxBytes    int         `yaml:"max_message_bytes"` // of a batch; at most the topic's max.message.bytes
	TLS         *secure.TLS `yaml:"tls"`               // even an empty one turns TLS on
	SASL        *SASL       `yaml:"sasl"`
	Insecure    bool        `yaml:"insecure"` // permits connections without TLS to other machines

	Version string `yaml:"-"` // of Tabard
}

// SASL says who the brokers are told that Tabard is.
type SASL struct {
	Mechanism    string `yaml:"mechanism"`
	User         string `yaml:"user"`
	PasswordFile string `yaml:"password_file"` // read for each connection, so that it can be replaced
}

// compressions are the codecs by name, each with what is used with brokers that
// do not know it.
var compressions = map[string][]kgo.CompressionCodec{
	"":       {kgo.ZstdCompression(), kgo.SnappyCompression()},
	"zstd":   {kgo.ZstdCompression(), kgo.SnappyCompression()},
	"snappy": {kgo.SnappyCompression()},
	"lz4":    {kgo.Lz4Compression(), kgo.SnappyCompression()},
	"gzip":   {kgo.GzipCompression()},
	"none":   {kgo.NoCompression()},
}

// Target is where events go, for people to read.
func (c *Config) Target() string { return strings.Join(c.Brokers, ",") + "/" + c.Topic }

// Check reports what is wrong with the settings. It reads no file and asks
// nobody.
func (c *Config) Check() error {
	if len(c.Brokers) == 0 || len(c.Brokers) > maxBrokers {
		return fmt.Errorf("brokers has %d addresses, want 1 to %d of the form host:port", len(c.Brokers), maxBrokers)
	}
	for _, b := range c.Brokers {
		host, port, err := net.SplitHostPort(b)
		n, err2 := strconv.ParseUint(port, 10, 16)
		switch {
		case err != nil || err2 != nil || n == 0 || host == "" || strings.ContainsAny(host, "/@ \t\r\n"):
			return errors.New("brokers has an address that is not of the form host:port, such as kafka.example:9093")
		case c.TLS == nil && !c.Insecure && !loopback(host):
			return fmt.Errorf("broker %s is another machine and tls is not set: set it (tls: {} trusts the system's authorities),"+
				" or say insecure: true if the network is trusted with the log and the password", b)
		}
	}
	if !topicName(c.Topic) {
		return fmt.Errorf("topic %.60q is not the name of one: a to z, A to Z, 0 to 9, dots, dashes and underscores, 249 at most", c.Topic)
	}
	if _, ok := compressions[c.Compression]; !ok {
		return fmt.Errorf("compression is %.20q, want zstd, snappy, lz4, gzip or none", c.Compression)
	}
	if c.MaxBytes != 0 && (c.MaxBytes < minBytes || c.MaxBytes > maxBytes) {
		return fmt.Errorf("max_message_bytes is %d, want %d to %d", c.MaxBytes, minBytes, maxBytes)
	}
	if c.TLS != nil && (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		return errors.New("tls: cert_file and key_file go together")
	}
	if c.SASL != nil {
		switch c.SASL.Mechanism {
		case mechanismPlain, mechanismScram256, mechanismScram512:
		default:
			return fmt.Errorf("sasl: mechanism is %.20q, want %s, %s or %s", c.SASL.Mechanism, mechanismPlain, mechanismScram256, mechanismScram512)
		}
		if c.SASL.User == "" || c.SASL.PasswordFile == "" {
			return errors.New("sasl: user or password_file is missing")
		}
	}
	return nil
}

func loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// topicName reports whether Kafka would take a name (its Topic class).
func topicName(s string) bool {
	return s != "" && len(s) <= 249 && s != "." && s != ".." && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
	})
}

// Sink sends events to one topic.
type Sink struct {
	cfg    Config
	limit  int     // bytes of a batch; less than the configured ones after a broker has refused that many
	client *client // nil before the first delivery, and after one that failed
}

// New returns a sink, after a look at the files that the settings name. It
// connects at the first delivery.
func New(cfg Config) (*Sink, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if _, err := cfg.password(); err != nil {
		return nil, err
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = defaultBytes
	}
	if _, err := options(&cfg, &watch{}); err != nil {
		return nil, err
	}
	return &Sink{cfg: cfg, limit: cfg.MaxBytes}, nil
}

// password reads the password, "" if none is used.
func (c *Config) password() (string, error) {
	if c.SASL == nil {
		return "", nil
	}
	p, err := secure.Secret(c.SASL.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("read sasl.password_file: %w", err)
	}
	return p, nil
}

// Close gives up the connections.
func (s *Sink) Close() error {
	s.disconnect()
	return nil
}

func (s *Sink) disconnect() {
	if s.client != nil {
		s.client.Close()
		s.client = nil
	}
}

// Deliver sends entries in their order. It returns when each has been
// acknowledged, or the first one that was not is known.
func (s *Sink) Deliver(ctx context.Context, entries []store.Entry) (taken int, err error) {
	if len(entries) == 0 {
		return 0, nil
	}
	if _, limited := ctx.Deadline(); !limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, maxCall)
		defer cancel()
	}
	records := make([]*kgo.Record, len(entries))
	for i := range entries {
		records[i] = record(&s.cfg, &entries[i])
	}
	first := false
	if s.client == nil {
		if s.client, err = connect(ctx, &s.cfg); err != nil {
			return 0, err
		}
		// The client does not know the topic's partitions before it has a record
		// for it, and until then it would cut batches as it likes. So the first
		// one goes alone.
		first = true
	}
	for taken < len(records) {
		n := s.fit(records[taken:])
		if first {
			n, first = 1, false
		}
		got, err := s.send(ctx, records[taken:taken+n])
		taken += got
		var rejected *RejectedError
		if errors.As(err, &rejected) {
			rejected.Index = entries[taken].Index
		}
		if err != nil {
			return taken, err
		}
	}
	return taken, nil
}

// fit returns how many records are sent together, so many that all of them have
// room in one batch if they belong to one partition.
func (s *Sink) fit(records []*kgo.Record) int {
	n, size := 0, batchCost
	for _, r := range records {
		if size += cost(r); n > 0 && size > s.limit {
			break
		}
		n++
	}
	return n
}

func cost(r *kgo.Record) int {
	n := recordCost + len(r.Key) + len(r.Value)
	for _, h := range r.Headers {
		n += recordCost/4 + len(h.Key) + len(h.Value)
	}
	return n
}

// send sends what fit let together. When a broker's limit turns out to be lower
// than ours, or it takes a batch for invalid, it sends less, and returns how much.
func (s *Sink) send(ctx context.Context, records []*kgo.Record) (taken int, err error) {
	taken, err = s.client.produce(ctx, records)
	switch {
	case err == nil:
		return taken, nil
	case !errors.Is(err, kerr.MessageTooLarge) && !errors.Is(err, kerr.InvalidRecord):
		err = explain(ctx, &s.cfg, err, s.client.broken())
		// What it had in hand is unknown to a new client, and its files are read
		// again.
		s.disconnect()
		return taken, err
	case len(records) == 1:
		return 0, &RejectedError{bytes: len(records[0].Value), tooLarge: errors.Is(err, kerr.MessageTooLarge)}
	}
	if errors.Is(err, kerr.MessageTooLarge) {
		s.limit = max(s.limit/2, minBytes)
	}
	if taken > 0 {
		return taken, nil
	}
	return s.send(ctx, records[:len(records)/2])
}

// RejectedError means that the topic does not take an event as it is. The route
// stands still at it until the topic does.
type RejectedError struct {
	Index    int64 // of the event in the log
	bytes    int
	tooLarge bool
}

func (e *RejectedError) Error() string {
	if e.tooLarge {
		return fmt.Sprintf("the topic does not take the event with index %d, which has %d bytes: raise its max.message.bytes, and max_message_bytes of the route",
			e.Index, e.bytes)
	}
	return fmt.Sprintf("the topic does not take the event with index %d: the brokers hold it for invalid; look into their log, and correct how they validate records", e.Index)
}

// record writes an event. It has no time of its own and gets that of sending,
// since topics drop what is old by their record's time: an event that was kept
// until the brokers were back would be gone before anybody reads it. The event's
// time is in its document.
func record(cfg *Config, e *store.Entry) *kgo.Record {
	key := e.CorrelationID
	if key == "" {
		key = strconv.FormatInt(e.Index, 10)
	}
	return &kgo.Record{
		Topic: cfg.Topic, Key: []byte(key), Value: e.Doc,
		Headers: []kgo.RecordHeader{
			{Key: "id", Value: []byte(activity.Clip(id(e.Doc)))},
			{Key: "index", Value: strconv.AppendInt(nil, e.Index, 10)},
			{Key: "action", Value: []byte(activity.Clip(e.Action))},
			{Key: "account", Value: []byte(activity.Clip(e.AccountID))},
		},
	}
}

// explain says what a failure means to whoever runs the server. The texts of
// brokers are bounded, and hold no password even if they repeat it.
func explain(ctx context.Context, cfg *Config, err, connection error) error {
	// A client that waits for its time to be over does not know what for.
	if connection != nil && (ctx.Err() != nil || errors.Is(err, kgo.ErrRecordRetries) || errors.Is(err, kgo.ErrClientClosed)) {
		err = connection
	}
	hint := ""
	var cert *tls.CertificateVerificationError
	switch {
	case errors.Is(err, kerr.UnknownTopicOrPartition) || errors.Is(err, kerr.UnknownTopicID):
		hint = fmt.Sprintf(": the brokers have no topic %s, or do not show it to the user: create it, and allow Write and Describe on it", cfg.Topic)
	case errors.Is(err, kerr.TopicAuthorizationFailed):
		hint = fmt.Sprintf(": allow the user Write and Describe on topic %s", cfg.Topic)
	case errors.Is(err, kerr.ClusterAuthorizationFailed):
		hint = ": allow the user IdempotentWrite on the cluster"
	case errors.Is(err, kerr.SaslAuthenticationFailed) || errors.Is(err, kerr.UnsupportedSaslMechanism) || errors.Is(err, kerr.IllegalSaslState):
		hint = ": check sasl.mechanism, sasl.user and the password in sasl.password_file"
	case errors.As(err, &cert):
		hint = ": name the brokers' authority in tls.ca_file, or the name of their certificate in tls.server_name"
	case errors.Is(err, context.DeadlineExceeded):
		hint = ": the brokers do not answer in time"
	case errors.Is(err, io.EOF) && cfg.SASL != nil:
		hint = ": the broker hangs up; check sasl.mechanism, sasl.user and the password in sasl.password_file, and whether it wants TLS on this port"
	case errors.Is(err, io.EOF):
		hint = ": check whether the brokers want TLS or SASL on this port, and which"
	case errors.Is(err, kerr.NotEnoughReplicas) || errors.Is(err, kerr.NotEnoughReplicasAfterAppend):
		hint = ": the topic has fewer replicas in sync than min.insync.replicas"
	}
	return &sendError{target: cfg.Target(), text: hide(cfg, err.Error()) + hint, err: err}
}

// sendError has an error's text without what must not be in it.
type sendError struct {
	target, text string
	err          error
}

func (e *sendError) Error() string { return "send events to " + e.target + ": " + e.text }
func (e *sendError) Unwrap() error { return e.err }

// maxReason bounds what is repeated of an error's text, in bytes.
const maxReason = 300

func hide(cfg *Config, text string) string {
	if p, err := cfg.password(); err == nil && p != "" {
		text = strings.ReplaceAll(text, p, "[secret]")
	}
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}

// mechanism returns how connections are authenticated.
func (c *Config) mechanism() sasl.Mechanism {
	if c.SASL.Mechanism == mechanismPlain {
		return plain.Plain(func(context.Context) (plain.Auth, error) {
			p, err := c.password()
			return plain.Auth{User: c.SASL.User, Pass: p}, err
		})
	}
	auth := func(context.Context) (scram.Auth, error) {
		p, err := c.password()
		return scram.Auth{User: c.SASL.User, Pass: p}, err
	}
	if c.SASL.Mechanism == mechanismScram256 {
		return scram.Sha256(auth)
	}
	return scram.Sha512(auth)
}
