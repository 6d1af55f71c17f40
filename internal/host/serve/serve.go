// Package serve runs the HTTP servers of one machine within bounds, so that a
// machine that opens connections and leaves them, or sends a byte a second,
// spends only what is its own. It is for the host drivers; who is on the other
// end of a connection is decided by whoever made the listener.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// Bounds limit one listener.
type Bounds struct {
	Header time.Duration // to read a request's header
	Read   time.Duration // to read a whole request
	Write  time.Duration // to answer it
	Idle   time.Duration // between requests
	Bytes  int           // of a request's header
	Conns  int           // open at a time; more wait to be accepted
	TLS    *tls.Config   // nil for plain HTTP
}

// Metadata are the bounds of a machine's metadata service.
func Metadata() Bounds {
	return Bounds{
		Header: 5 * time.Second, Read: 10 * time.Second, Write: 30 * time.Second, Idle: time.Minute,
		Bytes: 16 << 10, Conns: 64,
	}
}

// Server are the bounds of the IAM server as a machine reaches it. Its bodies
// and lists are larger than the metadata service's.
func Server() Bounds {
	return Bounds{
		Header: 5 * time.Second, Read: 30 * time.Second, Write: 2 * time.Minute, Idle: time.Minute,
		Bytes: 64 << 10, Conns: 256,
	}
}

// grace is how long requests under way may take when a machine stops.
const grace = 2 * time.Second

// Group is the servers of one machine. The zero value is ready.
type Group struct {
	Log *slog.Logger

	mu      sync.Mutex
	servers []*http.Server
	running sync.WaitGroup
}

// Serve accepts connections of l until Stop. A connection whose remote address
// is not from is closed without an answer; the zero address admits all.
func (g *Group) Serve(l *net.TCPListener, from netip.Addr, h http.Handler, b Bounds) {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: b.Header,
		ReadTimeout:       b.Read,
		WriteTimeout:      b.Write,
		IdleTimeout:       b.Idle,
		MaxHeaderBytes:    b.Bytes,
		ErrorLog:          slog.NewLogLogger(g.Log.Handler(), slog.LevelDebug),
	}
	g.mu.Lock()
	g.servers = append(g.servers, s)
	g.mu.Unlock()
	in := &listener{
		TCPListener: l, from: from, log: g.Log,
		slots: make(chan struct{}, b.Conns), closed: make(chan struct{}),
	}
	g.running.Go(func() {
		var l net.Listener = in
		if b.TLS != nil {
			l = tls.NewListener(in, b.TLS)
		}
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			g.Log.Error("serving a machine ended", "listener", l.Addr(), "error", err)
		}
	})
}

// Stop closes the listeners at once, gives requests under way until ctx ends
// but no more than 2 s, and then cuts them off.
func (g *Group) Stop(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	g.mu.Lock()
	servers := g.servers
	g.servers = nil
	g.mu.Unlock()
	var each sync.WaitGroup
	for _, s := range servers {
		each.Go(func() {
			if s.Shutdown(ctx) != nil {
				s.Close()
			}
		})
	}
	each.Wait()
	g.running.Wait()
}

// listener admits a bounded number of connections of one peer.
type listener struct {
	*net.TCPListener
	from  netip.Addr
	log   *slog.Logger
	slots chan struct{}

	once   sync.Once
	closed chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.closed:
			return nil, net.ErrClosed
		}
		c, err := l.AcceptTCP()
		if err != nil {
			<-l.slots
			return nil, err
		}
		peer := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		if l.from.IsValid() && peer != l.from {
			l.log.Warn("a machine connected from an address that is not its own", "address", peer, "want", l.from)
			c.Close()
			<-l.slots
			continue
		}
		return &conn{TCPConn: c, slots: l.slots}, nil
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

// conn gives its slot back when it is closed.
type conn struct {
	*net.TCPConn
	once  sync.Once
	slots chan struct{}
}

func (c *conn) Close() error {
	err := c.TCPConn.Close()
	c.once.Do(func() { <-c.slots })
	return err
}
