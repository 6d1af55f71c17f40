// Package libvirt finds the machines of a host that something other than Tabard
// runs: libvirt's domains, asked for over its socket, and whatever other taps and
// veths its caller knows of. It tells what it finds, and answers which device a
// domain's network card is now. It reads only: nothing of a domain is changed.
//
// The read-only socket suffices. A host without libvirt is a host with no
// domains, and one whose libvirt is away for a while keeps those that were found
// last.
//
// # Tags
//
// A domain's tags stand in the metadata of its XML, in an element of our own
// namespace:
//
//	<metadata>
//	  <tabard:instance xmlns:tabard="https://tabard.dev/xmlns/libvirt/1">
//	    <tabard:tag key="env" value="prod"/>
//	  </tabard:instance>
//	</metadata>
//
// The domain's title and description are tags of these names, unless it has such
// tags. All of it is what somebody with the right to define domains on the host
// has written, and is worth as much. What the machine itself says, such as the
// name that it gave the DHCP server, is not taken. A machine's address is the
// exception: it is that of its lease, or the one that the host's ARP table has
// for its MAC, and is a proposal to whoever adopts it.
package libvirt

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"

	"tabard.dev/tabard/internal/host/link"
)

const (
	lookEvery = 10 * time.Second // how often the host is looked at when nothing happens
	tellEvery = time.Minute      // how often what was told is told again: the server may have forgotten
	settle    = 200 * time.Millisecond
	callTime  = 10 * time.Second // that libvirt may take to answer once
)

// Config says where libvirt is and what else is there.
type Config struct {
	// Sockets are tried in order. None stands for the read-only sockets of
	// libvirtd and of virtqemud.
	Sockets []string

	// URI is the driver to ask. Empty is QEMU's of the system.
	URI string

	// Devices, when not nil, lists the taps and veths that machines may be at.
	// Those of domains are left out by the watcher.
	Devices func() ([]link.Machine, error)

	Log *slog.Logger // nil discards
}

var defaultSockets = []string{"/run/libvirt/libvirt-sock-ro", "/run/libvirt/virtqemud-sock-ro"}

// Watcher finds machines while it runs.
type Watcher struct {
	cfg     Config
	log     *slog.Logger
	changed chan struct{}
	woken   chan struct{} // by an event of libvirt

	mu      sync.Mutex
	known   bool                 // devices is what libvirt says
	devices map[[2]string]string // by domain's UUID and MAC
}

// New returns a watcher; Run makes it work.
func New(cfg Config) *Watcher {
	if len(cfg.Sockets) == 0 {
		cfg.Sockets = defaultSockets
	}
	return &Watcher{
		cfg: cfg, log: cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		changed: make(chan struct{}, 1), woken: make(chan struct{}, 1), devices: map[[2]string]string{},
	}
}

// Device returns the name of the device of a domain's network card, empty when
// the domain does not run or has no such card. It is not known while libvirt
// does not answer.
func (w *Watcher) Device(uuid, mac string) (name string, known bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.devices[[2]string{strings.ToLower(uuid), strings.ToLower(mac)}], w.known
}

// Changed is signalled when what Device answers may have become something else.
// It has one receiver.
func (w *Watcher) Changed() <-chan struct{} { return w.changed }

// Run looks for machines until the context ends, and tells all of them when they
// are others than before, and now and then. Where telling fails, it is tried
// again at the next look.
func (w *Watcher) Run(ctx context.Context, tell func(context.Context, []link.Machine) error) error {
	var domains []link.Machine
	var s *session
	defer func() { s.close() }()
	var told []link.Machine
	var toldAt time.Time
	finding, telling := complaint{w.log, "finding machines", ""}, complaint{w.log, "telling what machines there are", ""}
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		var err error
		if s == nil {
			s, err = w.open(ctx)
		}
		if s != nil {
			var found []link.Machine
			if found, err = s.list(); err == nil {
				domains = found
			} else {
				s.close()
				s = nil
			}
		}
		w.settle(s != nil, domains)
		machines, deviceErr := w.merge(domains)
		finding.note(errors.Join(err, deviceErr))
		if told == nil || !reflect.DeepEqual(machines, told) || time.Since(toldAt) >= tellEvery {
			err := tell(ctx, machines)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			telling.note(err)
			if err == nil {
				told, toldAt = machines, time.Now()
			}
		}
		var lost <-chan struct{}
		if s != nil {
			lost = s.rpc.Disconnected()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		case <-lost:
			s.close()
			s = nil
		case <-w.woken:
			// A domain that starts tells so several times.
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(settle):
			}
		}
	}
}

// complaint logs an error once, until it is over or another one.
type complaint struct {
	log  *slog.Logger
	what string
	last string
}

func (c *complaint) note(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && text != c.last {
		c.log.Warn(c.what, "error", err)
	}
	c.last = text
}

// settle makes what was found what Device answers.
func (w *Watcher) settle(known bool, domains []link.Machine) {
	devices := map[[2]string]string{}
	for _, m := range domains {
		devices[[2]string{strings.ToLower(m.Domain), strings.ToLower(m.MAC)}] = m.Device
	}
	w.mu.Lock()
	same := w.known == known && reflect.DeepEqual(w.devices, devices)
	w.known, w.devices = known, devices
	w.mu.Unlock()
	if same {
		return
	}
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// merge adds the devices that are no domain's. It returns a list that is not
// nil.
func (w *Watcher) merge(domains []link.Machine) ([]link.Machine, error) {
	machines := append([]link.Machine{}, domains...)
	var err error
	if w.cfg.Devices != nil {
		var others []link.Machine
		if others, err = w.cfg.Devices(); err != nil {
			err = fmt.Errorf("listing the host's devices: %w", err)
		}
		for _, m := range others {
			n := slices.IndexFunc(machines, func(d link.Machine) bool { return d.Device == m.Device })
			switch {
			case n < 0:
				machines = append(machines, m)
			case machines[n].Address == "" && strings.EqualFold(machines[n].MAC, m.MAC):
				machines[n].Address = m.Address
			}
		}
	}
	slices.SortStableFunc(machines, func(a, b link.Machine) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Device, b.Device))
	})
	return machines[:min(len(machines), link.MaxMachines)], err
}

// session is a connection to libvirt.
type session struct {
	conn net.Conn
	rpc  *libvirt.Libvirt
	done sync.WaitGroup
	log  *slog.Logger
}

type dialer struct{ conn net.Conn }

func (d dialer) Dial() (net.Conn, error) { return d.conn, nil }

// open connects to the first socket that is there. It returns nil and no error
// where none is.
func (w *Watcher) open(ctx context.Context) (*session, error) {
	var failed error
	for _, path := range w.cfg.Sockets {
		d := net.Dialer{Timeout: callTime}
		conn, err := d.DialContext(ctx, "unix", path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("connecting to libvirt: %w", err))
			continue
		}
		conn = &bounded{Conn: conn}
		s := &session{conn: conn, rpc: libvirt.NewWithDialer(dialer{conn}), log: w.log}
		uri := libvirt.ConnectURI(cmp.Or(w.cfg.URI, string(libvirt.QEMUSystem)))
		if err := s.call(func() error { return s.rpc.ConnectToURI(uri) }); err != nil {
			conn.Close()
			failed = errors.Join(failed, fmt.Errorf("opening %s at %s: %w", uri, path, err))
			continue
		}
		if err := s.hear(w.woken); err != nil {
			w.log.Info("libvirt does not tell of changes; they are looked for", "error", err)
		}
		return s, nil
	}
	return nil, failed
}

// call cuts the connection when libvirt does not answer in time: its client has
// no other way to give up.
func (s *session) call(f func() error) error {
	cut := time.AfterFunc(callTime, func() { s.conn.Close() })
	defer cut.Stop()
	return f()
}

// hear signals wake at every event that may change what there is, until the
// connection ends.
func (s *session) hear(wake chan<- struct{}) error {
	return s.call(func() error {
		var errs []error
		for _, id := range []libvirt.DomainEventID{
			libvirt.DomainEventIDLifecycle, libvirt.DomainEventIDDeviceAdded, libvirt.DomainEventIDDeviceRemoved, libvirt.DomainEventIDMetadataChange,
		} {
			events, err := s.rpc.SubscribeEvents(context.Background(), id, libvirt.OptDomain{})
			if err != nil {
				errs = append(errs, fmt.Errorf("subscribing to events of kind %d: %w", id, err))
				continue
			}
			s.done.Go(func() {
				for range events {
					select {
					case wake <- struct{}{}:
					default:
					}
				}
			})
		}
		return errors.Join(errs...)
	})
}

// close ends the connection, and waits for those who listened to it.
func (s *session) close() {
	if s == nil {
		return
	}
	s.conn.Close()
	select {
	case <-s.rpc.Disconnected():
	case <-time.After(callTime): // it was lost while it was being opened
	}
	s.done.Wait()
}

// list returns the network cards of all domains that run. A domain that ends
// meanwhile is left out.
func (s *session) list() ([]link.Machine, error) {
	var domains []libvirt.Domain
	err := s.call(func() (err error) {
		domains, _, err = s.rpc.ConnectListAllDomains(1, libvirt.ConnectListDomainsActive)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing domains: %w", err)
	}
	var all []link.Machine
	for _, d := range domains {
		if len(all) >= link.MaxMachines {
			break
		}
		var description string
		var state int32
		err := s.call(func() (err error) {
			if description, err = s.rpc.DomainGetXMLDesc(d, 0); err != nil {
				return err
			}
			state, _, err = s.rpc.DomainGetState(d, 0)
			return err
		})
		if refused(err) {
			if !libvirt.IsNotFound(err) {
				s.log.Warn("libvirt does not describe a domain", "domain", d.Name, "error", err)
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("describing the domain %s: %w", d.Name, err)
		}
		cards, err := parse(description)
		if err != nil {
			s.log.Warn("a domain's description is not read", "domain", d.Name, "error", err)
			continue
		}
		if len(cards) == 0 {
			continue
		}
		addresses, err := s.addresses(d)
		if err != nil {
			return nil, fmt.Errorf("looking for the addresses of the domain %s: %w", d.Name, err)
		}
		for _, m := range cards {
			m.State, m.Address = stateName(state), addresses[strings.ToLower(m.MAC)]
			all = append(all, m)
		}
	}
	return all, nil
}

// addresses returns the IPv4 addresses of a domain's network cards, by MAC.
func (s *session) addresses(d libvirt.Domain) (map[string]string, error) {
	out := map[string]string{}
	for _, source := range []libvirt.DomainInterfaceAddressesSource{libvirt.DomainInterfaceAddressesSrcLease, libvirt.DomainInterfaceAddressesSrcArp} {
		var cards []libvirt.DomainInterface
		err := s.call(func() (err error) {
			cards, err = s.rpc.DomainInterfaceAddresses(d, uint32(source), 0)
			return err
		})
		if refused(err) {
			continue // this source has nothing to say
		}
		if err != nil {
			return nil, err
		}
		for _, c := range cards {
			for _, mac := range c.Hwaddr {
				for _, a := range c.Addrs {
					at, err := netip.ParseAddr(a.Addr)
					if mac = strings.ToLower(mac); err == nil && at.Is4() && out[mac] == "" {
						out[mac] = at.String()
					}
				}
			}
		}
	}
	return out, nil
}

// refused tells whether libvirt itself said no, over a connection that works.
func refused(err error) bool {
	said := libvirt.Error{}
	return errors.As(err, &said) || errors.Is(err, libvirt.ErrUnsupported)
}

// stateName is a state in virsh's words.
func stateName(state int32) string {
	switch libvirt.DomainState(state) {
	case libvirt.DomainRunning, libvirt.DomainBlocked:
		return "running"
	case libvirt.DomainPaused, libvirt.DomainPmsuspended:
		return "paused"
	case libvirt.DomainShutdown:
		return "stopping"
	case libvirt.DomainShutoff:
		return "stopped"
	case libvirt.DomainCrashed:
		return "crashed"
	}
	return "unknown"
}

// maxPacket bounds a message of libvirt, which itself sends no more than this
// (VIR_NET_MESSAGE_MAX).
const maxPacket = 32 << 20

// minPacket is a message's length and header.
const minPacket = 28

// bounded ends a connection whose next message says that it is longer than
// messages are, or shorter than its own header: the client believes it.
type bounded struct {
	net.Conn
	head [4]byte
	have int // bytes of head that have passed
	left int // bytes of the message that have not
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	for rest := p[:n]; len(rest) > 0; {
		if b.left > 0 {
			took := min(b.left, len(rest))
			b.left -= took
			rest = rest[took:]
			continue
		}
		b.head[b.have] = rest[0]
		b.have++
		rest = rest[1:]
		if b.have < len(b.head) {
			continue
		}
		size := binary.BigEndian.Uint32(b.head[:])
		if size < minPacket || size > maxPacket {
			b.Close()
			return 0, fmt.Errorf("libvirt sent a message of %d bytes", size)
		}
		b.have, b.left = 0, int(size)-len(b.head)
	}
	return n, err
}
