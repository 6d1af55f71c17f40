// Package syslog is the target of exports that is a syslog daemon: messages of
// RFC 5424, over TLS as RFC 5425 says, over TCP with the octet counting of
// RFC 6587, or as datagrams, which can be lost.
//
// Syslog has no acknowledgement. Over TLS and TCP, what was sent counts as
// delivered when the other machine's kernel has it (the send queue is empty).
// When a connection ends, the last megabytes of it are called lost, so that
// they are sent again: the daemon has perhaps not read them.
package syslog

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

// Config are the settings of a syslog target.
type Config struct {
	Transport string     `yaml:"transport"` // tls (the default), tcp, udp or unix
	Address   string     `yaml:"address"`   // HOST:PORT, or the path of a socket such as /dev/log
	Facility  *int       `yaml:"facility"`  // 0 to 23; default 13, log audit
	Hostname  string     `yaml:"hostname"`  // in messages; default: this machine's
	AppName   string     `yaml:"app_name"`  // default tabard
	DataID    string     `yaml:"data_id"`   // of the structured data; default tabard@32473
	MaxBytes  int        `yaml:"max_bytes"` // of a message: what is longer is shortened. 0 means as long as it is; for datagrams 8192
	TLS       secure.TLS `yaml:"tls"`
}

// Transports.
const (
	TransportTLS  = "tls"
	TransportTCP  = "tcp"
	TransportUDP  = "udp"
	TransportUnix = "unix"
)

const (
	audit       = 13    // the facility "log audit" of RFC 5424 section 6.2.1
	minMessage  = 2048  // that max_bytes allows: more than header and structured data have
	datagram    = 8192  // that receivers are to take, by RFC 5426 and RFC 5424 section 6.1 rather less
	maxDatagram = 65000 // that one can have
)

// Check reports what cannot work, without looking at files or the network.
func (c *Config) Check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	switch c.Transport {
	case "", TransportTLS, TransportTCP, TransportUDP:
		host, port, err := net.SplitHostPort(c.Address)
		n, bad := strconv.ParseUint(port, 10, 16)
		if err != nil || host == "" || bad != nil || n == 0 {
			refuse("address: %q is not HOST:PORT, such as syslog.example.com:6514", c.Address)
		}
	case TransportUnix:
		if !filepath.IsAbs(c.Address) {
			refuse("address: %q is not the path of a socket, such as /dev/log", c.Address)
		}
	default:
		refuse("transport: %q is not one of tls, tcp, udp, unix", c.Transport)
	}
	if c.Transport != "" && c.Transport != TransportTLS && c.TLS != (secure.TLS{}) {
		refuse("tls: the transport is %s; say tls, or leave these settings out", c.Transport)
	}
	if c.Facility != nil && (*c.Facility < 0 || *c.Facility > 23) {
		refuse("facility: want 0 to 23")
	}
	for _, f := range []struct {
		name, value string
		most        int
	}{{"hostname", c.Hostname, 255}, {"app_name", c.AppName, 48}, {"data_id", c.DataID, 32}} {
		if f.value != "" && (field(f.value, f.most) != f.value || f.name == "data_id" && strings.ContainsAny(f.value, `="]`)) {
			refuse("%s: %q has a character that the header of a message cannot have, or more than %d of them", f.name, f.value, f.most)
		}
	}
	if c.MaxBytes != 0 && (c.MaxBytes < minMessage || c.MaxBytes > maxDatagram && c.lossy()) {
		refuse("max_bytes: want %d or more, and for datagrams %d at most", minMessage, maxDatagram)
	}
	return errors.Join(errs...)
}

func (c *Config) lossy() bool { return c.Transport == TransportUDP || c.Transport == TransportUnix }

// Target names the daemon.
func (c *Config) Target() string {
	if c.Transport == "" {
		return TransportTLS + "://" + c.Address
	}
	return c.Transport + "://" + c.Address
}

// header is what is the same in all messages.
type header struct {
	facility          int
	host, app, dataID string
	most              int // bytes of a message; 0 means any
}

// Sink sends messages.
type Sink struct {
	cfg    Config
	header header
	tls    *tls.Config // nil without
	conn   *connection // nil until the first event, and after a failure

	window   window
	patience time.Duration
}

// patience is how long a new connection must last before what is sent on it
// counts: a proxy whose daemon is down takes connections, and ends them.
const patience = 2 * time.Second

// New returns a sink. It reads the files of TLS.
func New(cfg Config) (*Sink, error) {
	s := &Sink{cfg: cfg, patience: patience, header: header{facility: audit, app: "tabard", dataID: "tabard@32473", most: cfg.MaxBytes}}
	if cfg.Facility != nil {
		s.header.facility = *cfg.Facility
	}
	if cfg.AppName != "" {
		s.header.app = cfg.AppName
	}
	if cfg.DataID != "" {
		s.header.dataID = cfg.DataID
	}
	if cfg.lossy() && cfg.MaxBytes == 0 {
		s.header.most = datagram
	}
	name := cfg.Hostname
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("find out this machine's name; or give hostname: %w", err)
		}
	}
	s.header.host = field(name, 255)
	if cfg.Transport == "" || cfg.Transport == TransportTLS {
		conf, err := cfg.TLS.Config()
		if err != nil {
			return nil, err
		}
		if conf.ServerName == "" {
			if conf.ServerName, _, err = net.SplitHostPort(cfg.Address); err != nil {
				return nil, err
			}
		}
		s.tls = conf
	}
	return s, nil
}

// Close gives up the connection.
func (s *Sink) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.close()
	s.conn = nil
	return err
}

// Broken is closed when the daemon has ended a connection on which it may not
// have read everything.
func (s *Sink) Broken() <-chan struct{} {
	if s.conn == nil || s.conn.gone == nil {
		return nil
	}
	return s.conn.gone
}

// Deliver sends events. Over TLS and TCP it returns when the other side's
// kernel has all of them.
func (s *Sink) Deliver(ctx context.Context, entries []store.Entry) (int, error) {
	if s.cfg.lossy() {
		return s.datagrams(ctx, entries)
	}
	if s.conn != nil && s.conn.ended() {
		return 0, s.failed("send", s.conn.why)
	}
	if s.conn == nil {
		if err := s.connect(ctx); err != nil {
			return 0, err
		}
		if err := s.conn.settle(ctx, s.patience); err != nil {
			return 0, s.failed("begin to send", err)
		}
	}
	var frames, message bytes.Buffer
	for i := range entries {
		message.Reset()
		s.header.append(&message, &entries[i])
		frames.WriteString(strconv.Itoa(message.Len()))
		frames.WriteByte(' ')
		frames.Write(message.Bytes())
	}
	if frames.Len() == 0 {
		return 0, nil
	}
	if err := s.conn.send(ctx, frames.Bytes()); err != nil {
		return 0, s.failed("send", err)
	}
	s.window.add(entries[0].Index, frames.Len())
	return len(entries), nil
}

// failed gives up the connection.
func (s *Sink) failed(doing string, err error) error {
	if s.conn != nil {
		_ = s.conn.close() // it is of no use any more, whatever closing it says
		s.conn = nil
	}
	err = fmt.Errorf("%s: %w", doing, err)
	if len(s.window.parts) == 0 {
		return err
	}
	from := s.window.parts[0].first
	s.window = window{}
	return &loss{err, from}
}

// loss says from which event on the daemon may have lost what it took.
type loss struct {
	error
	from int64
}

func (l *loss) Unwrap() error { return l.error }

// LostFrom implements what a route looks for in an error.
func (l *loss) LostFrom() int64 { return l.from }

// How long connecting may take, and how soon a machine that does not answer is
// given up.
const (
	dialTimeout = 10 * time.Second
	keepAlive   = 15 * time.Second
)

func (s *Sink) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive / 3, Count: 3}}
	raw, err := d.DialContext(ctx, "tcp", s.cfg.Address)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	tcp, ok := raw.(*net.TCPConn)
	if !ok {
		return errors.Join(fmt.Errorf("connect: %T is not a TCP connection", raw), raw.Close())
	}
	c := &connection{tcp: tcp, conn: raw, gone: make(chan struct{})}
	if s.tls != nil {
		t := tls.Client(raw, s.tls)
		if err := t.HandshakeContext(ctx); err != nil {
			return errors.Join(fmt.Errorf("agree on TLS: %w", err), raw.Close())
		}
		c.conn = t
	}
	c.reading.Go(c.listen)
	s.conn = c
	return nil
}

// datagrams sends events to whom it concerns. That they arrive is not known.
func (s *Sink) datagrams(ctx context.Context, entries []store.Entry) (int, error) {
	if s.conn == nil {
		network := map[string]string{TransportUDP: "udp", TransportUnix: "unixgram"}[s.cfg.Transport]
		d := net.Dialer{Timeout: dialTimeout}
		conn, err := d.DialContext(ctx, network, s.cfg.Address)
		if err != nil {
			return 0, fmt.Errorf("connect: %w", err)
		}
		s.conn = &connection{conn: conn}
	}
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Now().Add(dialTimeout)
	}
	var message bytes.Buffer
	for i := range entries {
		message.Reset()
		s.header.append(&message, &entries[i])
		err := s.conn.conn.SetWriteDeadline(until)
		if err == nil {
			_, err = s.conn.conn.Write(message.Bytes())
		}
		if err != nil {
			return i, s.failed("send", err)
		}
	}
	return len(entries), nil
}

// connection is a connection to a daemon.
type connection struct {
	conn    net.Conn     // what is written to
	tcp     *net.TCPConn // under it; nil for datagrams
	gone    chan struct{}
	why     error // once gone is closed
	reading sync.WaitGroup
}

// maxTalk bounds what is read from a daemon, in bytes.
const maxTalk = 64 << 10

// listen notices that the daemon ends the connection. It has nothing to say.
func (c *connection) listen() {
	defer close(c.gone)
	switch _, err := io.CopyN(io.Discard, c.conn, maxTalk); {
	case err == nil:
		c.why = errors.New("the other side talks, which no syslog daemon does")
	case errors.Is(err, io.EOF):
		c.why = errors.New("the daemon ended the connection")
	default:
		c.why = fmt.Errorf("the daemon ended the connection: %w", err)
	}
}

// settle waits for a while whether a connection lasts.
func (c *connection) settle(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-c.gone:
		return c.why
	case <-t.C:
		return nil
	}
}

func (c *connection) ended() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

func (c *connection) close() error {
	var err error
	if c.tcp != nil {
		err = c.tcp.Close() // TLS would wait to say good-bye
	} else {
		err = c.conn.Close()
	}
	c.reading.Wait()
	return err
}

// pollLeast and pollMost are the pauses between two looks at the send queue.
const (
	pollLeast = 200 * time.Microsecond
	pollMost  = 50 * time.Millisecond
)

// send writes, and waits until the other side's kernel has acknowledged all of
// it.
func (c *connection) send(ctx context.Context, frames []byte) error {
	until, ok := ctx.Deadline()
	if !ok {
		until = time.Now().Add(dialTimeout)
	}
	if err := c.tcp.SetWriteDeadline(until); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		// Ends a write that waits; an error would mean that there is none.
		_ = c.tcp.SetWriteDeadline(time.Unix(1, 0))
	})
	defer stop()
	if _, err := c.conn.Write(frames); err != nil {
		return err
	}
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return err
	}
	for wait := pollLeast; ; wait = min(wait*2, pollMost) {
		var queued int
		var asked error
		if err := raw.Control(func(fd uintptr) { queued, asked = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil {
			return err
		}
		if asked != nil {
			return fmt.Errorf("ask how much is on the way: %w", asked)
		}
		if c.ended() {
			return c.why
		}
		if queued == 0 {
			return nil
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("the daemon does not take it (%d bytes are on the way): %w", queued, ctx.Err())
		case <-c.gone:
			t.Stop()
			return c.why
		case <-t.C:
		}
	}
}

// windowBytes is how much of what was sent a daemon that ends may not have read:
// more than the largest receive buffer of a Linux machine with its usual
// settings (6 MiB).
const windowBytes = 8 << 20

// window is what was sent last on a connection.
type window struct {
	parts []part
	bytes int
}

// part is what was sent at once: the index of its first event, and its size.
type part struct {
	first int64
	bytes int
}

func (w *window) add(first int64, bytes int) {
	w.parts, w.bytes = append(w.parts, part{first, bytes}), w.bytes+bytes
	for w.bytes-w.parts[0].bytes > windowBytes {
		w.bytes -= w.parts[0].bytes
		w.parts = w.parts[1:]
	}
}
