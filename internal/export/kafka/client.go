package kafka

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// client is a producer that sends what it is given when it is told to, and
// remembers why its connections broke.
type client struct {
	*kgo.Client
	*watch
}

// watch is told of connections by the producer's goroutines.
type watch struct {
	mu  sync.Mutex
	err error
}

// OnBrokerConnect implements kgo.HookBrokerConnect.
func (w *watch) OnBrokerConnect(_ kgo.BrokerMetadata, _ time.Duration, _ net.Conn, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err // nil after one that succeeded
}

// OnBrokerRead implements kgo.HookBrokerRead.
func (w *watch) OnBrokerRead(m kgo.BrokerMetadata, _ int16, _ int, _, _ time.Duration, err error) {
	if err == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = fmt.Errorf("read an answer of broker %s: %w", net.JoinHostPort(m.Host, fmt.Sprint(m.Port)), err)
}

// broken returns why the last connection broke, nil if none did.
func (w *watch) broken() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// options returns the producer's settings, from the files as they are now.
func options(cfg *Config, w *watch) ([]kgo.Opt, error) {
	opts := []kgo.Opt{
		kgo.SeedBrokers(cfg.Brokers...),
		kgo.ClientID("tabard"),
		kgo.SoftwareNameAndVersion("tabard", cmp.Or(cfg.Version, "devel")),
		kgo.WithHooks(w),
		kgo.DisableClientMetrics(),                                      // brokers could ask for them
		kgo.BrokerMaxReadBytes(maxAnswer), kgo.FetchMaxBytes(maxAnswer), // nothing is fetched
		kgo.DialTimeout(dialTimeout),

		// Idempotent, and acknowledged by all replicas in sync, are the
		// producer's defaults. Retries of its own keep their order.
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), // by the hash of the key, as Java's producer has it
		kgo.ProducerBatchCompression(compressions[cfg.Compression]...),
		kgo.ProducerBatchMaxBytes(int32(cfg.MaxBytes)),
		kgo.ManualFlushing(), // so that batches are cut here
		kgo.RecordRetries(tries),
		kgo.MetadataMinAge(metadataAge), // a retry waits for it
		kgo.UnknownTopicRetries(1),
		kgo.ProduceRequestTimeout(maxCall),
		// A record whose fate is unknown is sent again by a new client; its
		// copy is allowed.
		kgo.AllowIdempotentProduceCancellation(),
	}
	dial := (&net.Dialer{Timeout: dialTimeout}).DialContext
	switch {
	case cfg.TLS != nil:
		t, err := cfg.TLS.Config()
		if err != nil {
			return nil, fmt.Errorf("tls: %w", err)
		}
		opts = append(opts, kgo.DialTLSConfig(t))
	case !cfg.Insecure:
		// Brokers name each other, and may name another machine.
		opts = append(opts, kgo.Dialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			if !loopback(host) {
				return nil, fmt.Errorf("a broker has the address %.100q, and tls is not set", address)
			}
			return dial(ctx, network, address)
		}))
	}
	if cfg.SASL != nil {
		opts = append(opts, kgo.SASL(cfg.mechanism()))
	}
	if err := kgo.ValidateOpts(opts...); err != nil {
		return nil, fmt.Errorf("set up the producer: %w", err)
	}
	return opts, nil
}

// connect makes a client and calls a broker, so that what is wrong with the
// connection is known before anything waits for it.
func connect(ctx context.Context, cfg *Config) (*client, error) {
	w := &watch{}
	opts, err := options(cfg, w)
	if err != nil {
		return nil, err
	}
	cl, err := kgo.NewClient(opts...)
	if err != nil {
		return nil, fmt.Errorf("set up the producer: %w", err)
	}
	c := &client{Client: cl, watch: w}
	if err := cl.Ping(ctx); err != nil {
		cl.Close()
		return nil, explain(ctx, cfg, err, w.broken())
	}
	return c, nil
}

// errUnknown stands for the fate of a record that nothing was heard of.
var errUnknown = errors.New("not acknowledged in time")

// produce sends records and waits for what becomes of them. Taken is how many of
// the first ones were acknowledged, and the error that of the next one.
func (c *client) produce(ctx context.Context, records []*kgo.Record) (taken int, err error) {
	var (
		mu      sync.Mutex
		fates   = make([]error, len(records))
		pending = len(records)
		done    = make(chan struct{})
	)
	for i := range fates {
		fates[i] = errUnknown
	}
	for i, r := range records {
		c.Produce(ctx, r, func(_ *kgo.Record, err error) {
			mu.Lock()
			defer mu.Unlock()
			fates[i] = err
			if pending--; pending == 0 {
				close(done)
			}
		})
	}
	// Flush ends before the last fate is known, or with the context.
	if err := c.Flush(ctx); err == nil {
		select {
		case <-done:
		case <-ctx.Done():
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for i, err := range fates {
		if err != nil {
			return i, err
		}
	}
	return len(records), nil
}

// id returns the id of an event, "" if it has none that can be read.
func id(doc []byte) string {
	var e struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(doc, &e); err != nil {
		return ""
	}
	return e.ID
}
