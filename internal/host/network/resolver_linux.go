package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"tabard.dev/tabard/internal/host/namespace"
)

const (
	upstreamTimeout = 2 * time.Second // of one resolver
	answerTimeout   = 5 * time.Second // of all of them
	clientTimeout   = 5 * time.Second // between a machine's queries on one connection
	maxQueries      = 32              // of one port, under way at a time
	maxClients      = 8               // connections of one port
)

// resolver answers the queries that come in by one port.
type resolver struct {
	machine netip.Addr // others get no answer
	forward forwarder
	log     *slog.Logger

	ctx     context.Context
	cancel  context.CancelFunc
	packets *net.UDPConn
	streams *net.TCPListener
	queries chan struct{}
	clients chan struct{}
	running sync.WaitGroup
}

// startResolver listens on a device of the thread's namespace until stop.
func startResolver(ctx context.Context, device string, gateway, machine netip.Addr, forward forwarder, log *slog.Logger) (*resolver, error) {
	at := netip.AddrPortFrom(gateway, domainPort)
	packets, err := namespace.ListenPacket(ctx, at, device)
	if err != nil {
		return nil, fmt.Errorf("opening the resolver's UDP socket: %w", err)
	}
	streams, err := namespace.Listen(ctx, at, device, 0)
	if err != nil {
		packets.Close()
		return nil, fmt.Errorf("opening the resolver's TCP socket: %w", err)
	}
	r := &resolver{
		machine: machine, forward: forward, log: log, packets: packets, streams: streams,
		queries: make(chan struct{}, maxQueries), clients: make(chan struct{}, maxClients),
	}
	r.ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	r.running.Go(r.servePackets)
	r.running.Go(r.serveStreams)
	return r, nil
}

func (r *resolver) stop() {
	r.cancel()
	r.packets.Close()
	_ = r.streams.Close()
	r.running.Wait()
}

func (r *resolver) servePackets() {
	buf := make([]byte, maxQuery+1)
	for {
		n, peer, err := r.packets.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// An earlier answer was refused, or memory is short.
			if !r.pause() {
				return
			}
			continue
		}
		if n > maxQuery || peer.Addr().Unmap() != r.machine {
			continue
		}
		select {
		case r.queries <- struct{}{}:
		default:
			continue // it asks again
		}
		query := append([]byte(nil), buf[:n]...)
		r.running.Go(func() {
			defer func() { <-r.queries }()
			if answer := r.answer(query, false); answer != nil {
				if _, err := r.packets.WriteToUDPAddrPort(answer, peer); err != nil && !errors.Is(err, net.ErrClosed) {
					r.log.Debug("answering a query", "error", err)
				}
			}
		})
	}
}

// pause keeps a socket that fails from being a busy loop.
func (r *resolver) pause() bool {
	select {
	case <-r.ctx.Done():
		return false
	case <-time.After(10 * time.Millisecond):
		return true
	}
}

func (r *resolver) serveStreams() {
	for {
		select {
		case r.clients <- struct{}{}:
		case <-r.ctx.Done():
			return
		}
		c, err := r.streams.AcceptTCP()
		if err != nil {
			<-r.clients
			if errors.Is(err, net.ErrClosed) || !r.pause() {
				return
			}
			continue
		}
		r.running.Go(func() {
			defer func() { <-r.clients }()
			defer c.Close()
			defer context.AfterFunc(r.ctx, func() { c.Close() })()
			if peer := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); peer != r.machine {
				return
			}
			// A connection ends without a word, whatever the reason.
			for r.serveStream(c) == nil {
			}
		})
	}
}

// serveStream answers one query of a connection.
func (r *resolver) serveStream(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return err
	}
	query, err := readMessage(c, maxQuery)
	if err != nil {
		return err
	}
	answer := r.answer(query, true)
	if answer == nil {
		return errors.New("no query")
	}
	if err := c.SetDeadline(time.Now().Add(clientTimeout)); err != nil {
		return err
	}
	return writeMessage(c, answer)
}

func (r *resolver) answer(query []byte, overTCP bool) []byte {
	ctx, cancel := context.WithTimeout(r.ctx, answerTimeout)
	defer cancel()
	return resolve(ctx, query, overTCP, r.forward)
}

// readMessage and writeMessage speak DNS over TCP (RFC 1035 section 4.2.2).
func readMessage(r io.Reader, limit int) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(size[:]))
	if n > limit {
		return nil, fmt.Errorf("a message of %d bytes", n)
	}
	m := make([]byte, n)
	_, err := io.ReadFull(r, m)
	return m, err
}

func writeMessage(w io.Writer, m []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
	return err
}

// ask puts a query to the host's resolvers, one after another until one
// answers.
func (n *Network) ask(ctx context.Context, overTCP bool, query []byte) ([]byte, error) {
	resolvers := n.uplink.Resolvers
	if resolvers == nil {
		var err error
		if resolvers, err = hostResolvers("/etc/resolv.conf"); err != nil {
			return nil, fmt.Errorf("finding the host's resolvers: %w", err)
		}
	}
	err := errors.New("the host has no resolvers")
	for _, at := range resolvers {
		var answer []byte
		if answer, err = n.askOne(ctx, at, overTCP, query); err == nil {
			return answer, nil
		}
	}
	return nil, err
}

func (n *Network) askOne(ctx context.Context, at netip.AddrPort, overTCP bool, query []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	network := "udp"
	if overTCP {
		network = "tcp"
	}
	var c net.Conn
	err := n.onHost(func() (err error) {
		// A connected socket, with a port of its own: an answer from elsewhere
		// does not reach it.
		c, err = new(net.Dialer).DialContext(ctx, network, at.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if overTCP {
		if err := writeMessage(c, query); err != nil {
			return nil, err
		}
		return readMessage(c, maxResponse)
	}
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, maxPayload+1)
	for {
		size, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		// What is forged or late is not worth ending the wait for.
		if answers(buf[:size], query) {
			return buf[:size], nil
		}
	}
}
