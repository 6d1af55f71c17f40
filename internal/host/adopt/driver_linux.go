package adopt

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/vpc"
)

// metadataAddress is where every machine finds its metadata service
// (reference/instance-metadata-and-vpc.md section 1.1).
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

const (
	// lookEvery is how often the devices are looked at when nothing is heard.
	lookEvery = 10 * time.Second

	// settle is how long changes of devices are gathered: a machine that starts
	// makes a dozen within milliseconds.
	settle = 50 * time.Millisecond
)

// driver is the adopt driver. Locks are taken in the order machine.mu,
// hooking, mu.
type driver struct {
	state   string
	keep    bool
	domains Domains
	log     *slog.Logger
	host    netns.NsHandle // that the devices are in

	end  context.CancelFunc
	work sync.WaitGroup

	hooking sync.Mutex // held while devices are hooked up, so that two machines don't share one

	mu       sync.Mutex // guards what follows
	closed   bool
	machines map[string]*machine
}

// New returns the driver, which begins to watch the host's devices. It removes
// what an earlier one of the same State has left half made, and without Keep all
// that it has left.
func New(cfg Config) (host.Driver, error) {
	if !regexp.MustCompile(`^[0-9a-f]{8}$`).MatchString(cfg.State) {
		return nil, fmt.Errorf("the adopt driver's state %q is not 8 hexadecimal digits", cfg.State)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the adopt driver needs root")
	}
	if err := namespace.Share(); err != nil {
		return nil, fmt.Errorf("preparing %s: %w", namespace.Directory, err)
	}
	d := &driver{
		state:    cfg.State,
		keep:     cfg.Keep,
		domains:  cfg.Domains,
		log:      cmp.Or(cfg.Log, slog.New(slog.DiscardHandler)),
		machines: map[string]*machine{},
	}
	var err error
	if cfg.Host == "" {
		d.host, err = namespace.Own()
	} else {
		d.host, err = namespace.Open(cfg.Host)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the host's namespace: %w", err)
	}
	if err := errors.Join(d.sweep(), d.probe()); err != nil {
		d.host.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	d.end = cancel
	d.work.Go(func() { d.watch(ctx) })
	return d, nil
}

func (d *driver) prefix() string { return "tabard-" + d.state + "-x-" }

// space is the name of a machine's namespace.
func (d *driver) space(id string) string { return d.prefix() + tag(id, 12) }

// link is the name of the host's end of the link to a machine's namespace.
func (d *driver) link(id string) string { return "tx" + tag(d.state+"/"+id, 12) }

// tag shortens an id for names that the kernel bounds.
func tag(id string, digits int) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:])[:digits]
}

// onHost runs f with the table of links of the host's namespace.
func (d *driver) onHost(f func(*netlink.Handle) error) error {
	return namespace.Within(d.host, func() error { return namespace.Links(f) })
}

// left returns the ids of the machines whose links stand in the host's
// namespace.
func (d *driver) left() ([]string, error) {
	var ids []string
	err := d.onHost(func(n *netlink.Handle) error {
		links, err := namespace.Whole(n.LinkList)
		if err != nil {
			return fmt.Errorf("listing the links: %w", err)
		}
		for _, l := range links {
			if x, ok := d.noted(l); ok {
				ids = append(ids, x.id)
			}
		}
		return nil
	})
	return ids, err
}

// sweep removes what is not to be taken up: namespaces whose link did not get as
// far as the host's namespace or is gone, and without Keep all.
func (d *driver) sweep() error {
	ids, err := d.left()
	if err != nil {
		return fmt.Errorf("looking for machines of an earlier process: %w", err)
	}
	whole := map[string]bool{}
	for _, id := range ids {
		if d.keep {
			whole[d.space(id)] = true
			continue
		}
		if err := d.erase(id); err != nil {
			return fmt.Errorf("removing what is left of machine %s: %w", id, err)
		}
	}
	spaces, err := namespace.Named(d.prefix())
	if err != nil {
		return fmt.Errorf("looking for namespaces left behind: %w", err)
	}
	for _, space := range spaces {
		if whole[space] {
			continue
		}
		if err := namespace.Remove(space); err != nil {
			return fmt.Errorf("removing the namespace %s that was left behind: %w", space, err)
		}
	}
	return nil
}

// probe tries the whole of a machine's filters on a pair of links of its own, so
// that a kernel without them is noticed where the caller can still do without
// the driver.
func (d *driver) probe() error {
	space := d.prefix() + tag("probe", 12)
	ns, err := namespace.Create(space, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = inner
			if err := n.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer0"}); err != nil {
				return fmt.Errorf("adding a link: %w", err)
			}
			link, err := n.LinkByName(inner)
			if err != nil {
				return fmt.Errorf("finding a link: %w", err)
			}
			if _, err := ensureQdisc(n, link); err != nil {
				return err
			}
			for _, h := range hooks {
				if err := h.add(n, link.Attrs().Index, link.Attrs().Index); err != nil {
					return err
				}
			}
			return setFilter(make(net.HardwareAddr, 6), metadataAddress, gate{port: 80})
		})
	})
	if err != nil {
		return fmt.Errorf("trying out traffic control and nftables: %w", err)
	}
	ns.Close()
	return namespace.Remove(space)
}

// Name implements [host.Driver].
func (d *driver) Name() string { return "adopt" }

// Found implements [host.Driver].
func (d *driver) Found(context.Context) ([]string, error) {
	ids, err := d.left()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.DeleteFunc(ids, func(id string) bool { return d.machines[id] != nil }), nil
}

// Start implements [host.Driver]. A machine whose device is not there yet starts
// too: its service begins when the device comes.
func (d *driver) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	x := &machine{d: d, handlers: h, ns: netns.None(), log: d.log.With("machine", m.ID)}
	if err := x.check(m); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := d.admit(x); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	if err := x.build(ctx); err != nil {
		err = fmt.Errorf("starting machine %s: %w", m.ID, err)
		return errors.Join(err, x.remove(context.WithoutCancel(ctx)))
	}
	return nil
}

func (d *driver) admit(x *machine) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errClosed
	}
	if d.machines[x.id] != nil {
		return errors.New("it runs already")
	}
	d.machines[x.id] = x
	return nil
}

var errClosed = errors.New("the adopt driver is closed")

// running returns the machine that this process has started.
func (d *driver) running(id string) *machine {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.machines[id]
}

// Update implements [host.Driver].
func (d *driver) Update(ctx context.Context, m host.Machine) error {
	x := d.running(m.ID)
	if x == nil {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.gone {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	next := &machine{handlers: x.handlers}
	if err := next.check(m); err != nil {
		return fmt.Errorf("updating machine %s: %w", m.ID, err)
	}
	if next.address != x.address || next.mac.String() != x.mac.String() {
		return fmt.Errorf("updating machine %s: its address does not change while it runs", m.ID)
	}
	x.service, x.device, x.domain = next.service, next.device, next.domain
	if err := x.follow(ctx); err != nil {
		return fmt.Errorf("updating machine %s: %w", m.ID, err)
	}
	return nil
}

// Stop implements [host.Driver]. The machine itself goes on: it only loses its
// metadata service.
func (d *driver) Stop(ctx context.Context, id string, _ bool) error {
	var err error
	if x := d.running(id); x != nil {
		x.mu.Lock()
		defer x.mu.Unlock()
		err = x.remove(ctx)
	} else {
		err = d.erase(id)
	}
	if err != nil {
		return fmt.Errorf("stopping machine %s: %w", id, err)
	}
	return nil
}

// Delete implements [host.Driver].
func (d *driver) Delete(ctx context.Context, id string) error { return d.Stop(ctx, id, true) }

// Ended implements [host.Driver]. A machine that shuts down may come back
// without anybody telling the server, so it is waited for.
func (d *driver) Ended() <-chan string { return nil }

// Access implements [host.Driver]. There is no way inside but the machine's own.
func (d *driver) Access(string) (host.Access, bool) { return host.Access{}, false }

// Close implements [host.Driver].
func (d *driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	var all []*machine
	for _, x := range d.machines {
		all = append(all, x)
	}
	d.mu.Unlock()
	d.end()
	d.work.Wait()
	var each sync.WaitGroup
	errs := make([]error, len(all))
	for n, x := range all {
		each.Go(func() {
			x.mu.Lock()
			defer x.mu.Unlock()
			if d.keep {
				x.letGo(context.Background())
			} else if err := x.remove(context.Background()); err != nil {
				errs[n] = fmt.Errorf("stopping machine %s: %w", x.id, err)
			}
		})
	}
	each.Wait()
	d.host.Close()
	return errors.Join(errs...)
}

// watch has every machine follow its device, whenever devices change.
func (d *driver) watch(ctx context.Context) {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	var domains <-chan struct{}
	if d.domains != nil {
		domains = d.domains.Changed()
	}
	var changes chan netlink.LinkUpdate
	var stop chan struct{}
	hear := func() {
		changes, stop = make(chan netlink.LinkUpdate, 16), make(chan struct{})
		err := netlink.LinkSubscribeWithOptions(changes, stop, netlink.LinkSubscribeOptions{Namespace: &d.host})
		if err != nil {
			d.log.Warn("changes of devices are noticed late", "error", err)
			close(stop)
			changes, stop = nil, nil
		}
	}
	hear()
	defer func() {
		if stop == nil {
			return
		}
		close(stop)
		for range changes { // so that whoever sends sees the end
		}
	}()
	var due <-chan time.Time // for changes that are being gathered
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-changes:
			if !ok { // too many at once; the ticker begins anew
				close(stop)
				changes, stop = nil, nil
			}
			if due == nil {
				due = time.After(settle)
			}
			continue
		case <-domains:
		case <-due:
			due = nil
		case <-ticker.C:
			if changes == nil {
				hear()
			}
		}
		d.look(ctx)
	}
}

func (d *driver) look(ctx context.Context) {
	d.mu.Lock()
	var all []*machine
	for _, x := range d.machines {
		all = append(all, x)
	}
	d.mu.Unlock()
	for _, x := range all {
		x.mu.Lock()
		if !x.gone && ctx.Err() == nil {
			x.complain(x.restore(ctx))
		}
		x.mu.Unlock()
	}
}

// note is what a link's alias says of it, for whoever finds it later.
type note struct {
	id    string
	index int  // of the device that is hooked, 0 for none
	made  bool // its qdisc was made for the filters
}

func (d *driver) alias(x note) string {
	qdisc := "found"
	if x.made {
		qdisc = "made"
	}
	return fmt.Sprintf("tabard/%s/%s/%d/%s", d.state, x.id, x.index, qdisc)
}

// noted reads the alias of a link of this installation.
func (d *driver) noted(l netlink.Link) (note, bool) {
	rest, ok := strings.CutPrefix(l.Attrs().Alias, "tabard/"+d.state+"/")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 3 || l.Attrs().Name != d.link(parts[0]) {
		return note{}, false
	}
	x := note{id: parts[0], made: parts[2] == "made"}
	if _, err := fmt.Sscanf(parts[1], "%d", &x.index); err != nil {
		return note{}, false
	}
	return x, true
}

// erase removes a machine's filters, link and namespace, whatever of them is
// there.
func (d *driver) erase(id string) error {
	err := d.onHost(func(n *netlink.Handle) error {
		tx, err := namespace.Find(n, d.link(id))
		if err != nil || tx == nil {
			return err
		}
		x, ok := d.noted(tx)
		if !ok {
			return fmt.Errorf("the link %s is somebody else's", tx.Attrs().Name)
		}
		if err := unhookAll(n, tx.Attrs().Index, x); err != nil {
			return err
		}
		return namespace.Delete(n, tx.Attrs().Name)
	})
	if err != nil {
		return err
	}
	if err := namespace.Remove(d.space(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the namespace %s: %w", d.space(id), err)
	}
	return nil
}

// checkService checks what may change while a machine runs.
func checkService(s vpc.MetadataService, h host.Handlers) error {
	switch {
	case !s.Enabled:
	case s.ResponseHopLimit < 1 || s.ResponseHopLimit > 64:
		return fmt.Errorf("the hop limit %d is not in 1..64", s.ResponseHopLimit)
	case s.Protocol != "" && s.Protocol != "http" && s.Protocol != "https":
		return fmt.Errorf("the metadata service does not speak %q", s.Protocol)
	case h.Metadata == nil:
		return errors.New("its metadata service has no handler")
	case s.Protocol == "https" && h.MetadataTLS == nil:
		return errors.New("its metadata service has no certificate")
	}
	return nil
}
