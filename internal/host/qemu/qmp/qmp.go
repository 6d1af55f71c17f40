// Package qmp speaks the QEMU Machine Protocol: it sends commands to a running
// QEMU and hears its events (QEMU, docs/interop/qmp-spec). It knows the
// protocol's frame only; what a command means is its callers' business.
//
// The peer is a process that a guest may have broken out into, so nothing it
// sends is trusted: lines are bounded, what does not parse ends the connection,
// and an answer that nobody waits for is dropped.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// MaxLine is the longest line in bytes that a peer may send.
const MaxLine = 1 << 20

// writeTimeout bounds sending one command.
const writeTimeout = 5 * time.Second

// Event is something that happened in the machine.
type Event struct {
	Name string          // SHUTDOWN, RESET, …
	Data json.RawMessage // as the event has it; may be nil
}

// Error is a command that QEMU refused.
type Error struct {
	Command     string
	Class       string
	Description string
}

func (e *Error) Error() string {
	return fmt.Sprintf("QEMU refuses %s: %s (%s)", e.Command, e.Description, e.Class)
}

// ErrClosed is the reason of a connection that Close ended.
var ErrClosed = errors.New("the connection to QEMU is closed")

// Client is one connection. Its methods may be called from several goroutines.
type Client struct {
	conn    net.Conn
	onEvent func(Event)
	done    chan struct{}

	sending sync.Mutex // one command goes out at a time

	mu      sync.Mutex // guards what follows
	err     error
	last    uint64
	waiting map[uint64]chan message
}

// New takes over a connection to QEMU's monitor and waits, until ctx ends, for
// its greeting. Events are handed to onEvent, one at a time, in their order;
// it must not wait for a command. The connection is closed when New fails.
func New(ctx context.Context, conn net.Conn, onEvent func(Event)) (*Client, error) {
	c := &Client{
		conn: conn, onEvent: onEvent,
		done: make(chan struct{}), waiting: map[uint64]chan message{},
	}
	greeted := make(chan struct{})
	go c.read(greeted)
	select {
	case <-greeted:
	case <-c.done:
		return nil, fmt.Errorf("waiting for QEMU's greeting: %w", c.Err())
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("waiting for QEMU's greeting: %w", ctx.Err())
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, fmt.Errorf("opening the session with QEMU: %w", err)
	}
	return c, nil
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is why the connection ended: io.EOF where QEMU closed it. It is nil
// before.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection and waits until no more events are handed out. It
// must not be called by what receives events.
func (c *Client) Close() {
	c.end(ErrClosed)
	<-c.done
}

func (c *Client) end(err error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.conn.Close()
}

// Execute runs a command and decodes what it returns into out; nil arguments
// and a nil out are left out. The error is an *Error where QEMU refused.
func (c *Client) Execute(ctx context.Context, command string, arguments, out any) error {
	answer := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return fmt.Errorf("executing %s: %w", command, c.err)
	}
	c.last++
	id := c.last
	c.waiting[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.waiting, id)
	}()
	if err := c.send(id, command, arguments); err != nil {
		return fmt.Errorf("executing %s: %w", command, err)
	}
	select {
	case m := <-answer:
		return m.result(command, out)
	case <-ctx.Done():
		return fmt.Errorf("executing %s: %w", command, ctx.Err())
	case <-c.done:
	}
	// An answer may have come with the end.
	select {
	case m := <-answer:
		return m.result(command, out)
	default:
		return fmt.Errorf("executing %s: %w", command, c.Err())
	}
}

func (c *Client) send(id uint64, command string, arguments any) error {
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	err = c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		_, err = c.conn.Write(append(line, '\n'))
	}
	if err != nil {
		// Half a command may have gone out.
		c.end(err)
	}
	return err
}

// read hands out what comes in until the connection ends.
func (c *Client) read(greeted chan struct{}) {
	defer close(c.done)
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 0, 4096), MaxLine)
	for lines.Scan() {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		m, err := decode(line)
		switch {
		case err != nil:
			c.end(err)
			return
		case m.greeting():
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case greeted != nil:
			c.end(errors.New("the peer does not greet as QEMU does"))
			return
		case m.Event != "":
			if c.onEvent != nil {
				c.onEvent(Event{m.Event, m.Data})
			}
		default:
			c.deliver(m)
		}
	}
	err := lines.Err()
	if err == nil {
		err = io.EOF
	}
	c.end(err)
}

func (c *Client) deliver(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if answer := c.waiting[m.ID]; answer != nil {
		delete(c.waiting, m.ID)
		answer <- m // has room for one
	}
}

// message is any line that QEMU sends.
type message struct {
	QMP    *json.RawMessage `json:"QMP"`
	Event  string           `json:"event"`
	Data   json.RawMessage  `json:"data"`
	ID     uint64           `json:"id"`
	Return *json.RawMessage `json:"return"`
	Error  *struct {
		Class       string `json:"class"`
		Description string `json:"desc"`
	} `json:"error"`
}

func (m *message) greeting() bool { return m.QMP != nil }

// decode reads one line. A line is of exactly one kind.
func decode(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("reading what QEMU sent: %w", err)
	}
	kinds := 0
	for _, is := range []bool{m.QMP != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, errors.New("reading what QEMU sent: a line is neither greeting, event nor answer")
	}
	return m, nil
}

func (m *message) result(command string, out any) error {
	if m.Error != nil {
		return &Error{Command: command, Class: m.Error.Class, Description: m.Error.Description}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(*m.Return, out); err != nil {
		return fmt.Errorf("reading the answer to %s: %w", command, err)
	}
	return nil
}
