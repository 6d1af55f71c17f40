package adopt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
	"tabard.dev/tabard/internal/host/serve"
	"tabard.dev/tabard/internal/vpc"
)

// inner is the name of a link's end in a machine's namespace.
const inner = "md0"

// Ports of the metadata service, by its protocol
// (reference/instance-metadata-and-vpc.md section 1.1).
const (
	httpPort  = 80
	httpsPort = 443
)

// machine is one instance of this process.
type machine struct {
	d        *driver
	log      *slog.Logger
	handlers host.Handlers
	id       string
	mac      net.HardwareAddr
	address  netip.Addr

	mu      sync.Mutex // held while it starts, changes or stops
	service vpc.MetadataService
	device  string // its name, where no domain is known
	domain  string
	ns      netns.NsHandle
	index   int // of the device that is hooked, 0 while there is none
	gone    bool
	trouble string // that was last complained of

	servers *serve.Group // nil while nothing is served
	served  vpc.MetadataService
}

// check takes over what the driver needs of a machine, or says why it can't run.
func (x *machine) check(m host.Machine) error {
	switch {
	case m.External == nil:
		return errors.New("it is not a machine that something else runs")
	case m.ID == "", strings.ContainsAny(m.ID, "/\x00\n"), len(m.ID) > 120:
		return errors.New("it has no id")
	case m.External.Device == "" && m.External.Domain == "":
		return errors.New("it has neither a device nor a domain")
	case len(m.Interfaces) == 0:
		return errors.New("it has no network interface")
	}
	nic := m.Interfaces[0]
	mac, err := net.ParseMAC(nic.MAC)
	switch {
	case err != nil:
		return err
	case len(mac) != 6, mac[0]&1 != 0:
		return fmt.Errorf("%s is not the MAC of one network card", nic.MAC)
	case !nic.Address.Is4(), nic.Address.IsUnspecified(), nic.Address.IsMulticast(), nic.Address.IsLoopback(), nic.Address.IsLinkLocalUnicast():
		return fmt.Errorf("%s is not the IPv4 address of a machine", nic.Address)
	}
	if err := checkService(m.Metadata, x.handlers); err != nil {
		return err
	}
	x.id, x.mac, x.address = m.ID, mac, nic.Address
	x.service, x.device, x.domain = m.Metadata, m.External.Device, m.External.Domain
	return nil
}

// build makes the machine's namespace and the link to it, or takes up those that
// are there, and hooks up the device if it is there.
func (x *machine) build(ctx context.Context) error {
	d := x.d
	space := d.space(x.id)
	if x.ns.IsOpen() {
		x.ns.Close()
		x.ns = netns.None()
	}
	ns, err := namespace.Create(space, prepare)
	if errors.Is(err, fs.ErrExist) {
		ns, err = namespace.Open(space)
		if errors.Is(err, fs.ErrNotExist) { // a name without a namespace
			if err = namespace.Remove(space); err == nil {
				ns, err = namespace.Create(space, prepare)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("making the namespace %s: %w", space, err)
	}
	x.ns = ns
	if err := x.join(); err != nil {
		return fmt.Errorf("joining the namespace %s: %w", space, err)
	}
	if err := namespace.Within(ns, x.furnish); err != nil {
		return fmt.Errorf("preparing the namespace %s: %w", space, err)
	}
	if err := namespace.Within(d.host, func() error {
		// Before it is up, or it gets an address of its own.
		if err := namespace.DisableIPv6(d.link(x.id)); err != nil {
			return err
		}
		return namespace.Up(d.link(x.id))
	}); err != nil {
		return err
	}
	return x.follow(ctx)
}

// errLost says that somebody removed the link to the machine's namespace.
var errLost = errors.New("the link to the machine's namespace is gone")

// restore is follow, and makes anew what somebody removed.
func (x *machine) restore(ctx context.Context) error {
	err := x.follow(ctx)
	if !errors.Is(err, errLost) {
		return err
	}
	x.log.Warn("making the machine's link anew", "error", err)
	x.silence(over(ctx))
	x.index = 0
	return x.build(ctx)
}

// over is a context that has ended.
func over(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

// prepare makes the thread's fresh namespace an end: it routes nothing.
func prepare() error {
	for _, each := range []struct{ name, value string }{
		{"all/rp_filter", "1"},
		{"default/rp_filter", "1"},
		{"all/arp_ignore", "1"},
		{"default/arp_ignore", "1"},
		{"all/accept_redirects", "0"},
		{"default/accept_redirects", "0"},
		{"all/accept_source_route", "0"},
		{"default/accept_source_route", "0"},
		{"all/forwarding", "0"},
		{"default/forwarding", "0"},
	} {
		if err := namespace.Sysctl("net/ipv4/conf/"+each.name, each.value); err != nil {
			return err
		}
	}
	return errors.Join(namespace.DisableIPv6("all"), namespace.DisableIPv6("default"))
}

// join makes the link between the host and the machine's namespace, unless it is
// there whole. It is made inside and moved out with its alias on, so that what
// stands in the host's namespace always says whose it is.
func (x *machine) join() error {
	d, name := x.d, x.d.link(x.id)
	whole := false
	err := namespace.Within(x.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			link, err := namespace.Find(n, inner)
			whole = link != nil
			return err
		})
	})
	if err != nil {
		return err
	}
	err = d.onHost(func(n *netlink.Handle) error {
		tx, err := namespace.Find(n, name)
		if err != nil {
			return err
		}
		if tx == nil {
			whole = false
			return nil
		}
		left, ok := d.noted(tx)
		switch {
		case !ok || left.id != x.id:
			return fmt.Errorf("the link %s is somebody else's", name)
		case whole:
			x.index = left.index
			return nil
		}
		if err := unhookAll(n, tx.Attrs().Index, left); err != nil {
			return err
		}
		return namespace.Delete(n, name)
	})
	if err != nil || whole {
		return err
	}
	return namespace.Within(x.ns, func() error {
		return namespace.Links(func(n *netlink.Handle) error {
			for _, left := range []string{inner, name} {
				if err := namespace.Delete(n, left); err != nil {
					return err
				}
			}
			attrs := netlink.NewLinkAttrs()
			attrs.Name = name
			tx := &netlink.Veth{LinkAttrs: attrs, PeerName: inner}
			if err := n.LinkAdd(tx); err != nil {
				return fmt.Errorf("adding the link %s: %w", name, err)
			}
			if err := n.LinkSetAlias(tx, d.alias(note{id: x.id})); err != nil {
				return fmt.Errorf("marking the link %s: %w", name, err)
			}
			if err := n.LinkSetNsFd(tx, int(d.host)); err != nil {
				return fmt.Errorf("moving the link %s to the host: %w", name, err)
			}
			return nil
		})
	})
}

// furnish configures the inner end, with its filter closed. It runs in the
// machine's namespace.
func (x *machine) furnish() error {
	if err := setFilter(x.mac, x.address, gate{}); err != nil {
		return fmt.Errorf("setting the filter of %s: %w", inner, err)
	}
	return namespace.Links(func(n *netlink.Handle) error {
		link, err := n.LinkByName(inner)
		if err != nil {
			return fmt.Errorf("finding %s: %w", inner, err)
		}
		if err := namespace.SetAddress(n, link, netip.PrefixFrom(metadataAddress, 32), netlink.SCOPE_LINK); err != nil {
			return err
		}
		if err := n.LinkSetUp(link); err != nil {
			return fmt.Errorf("bringing up %s: %w", inner, err)
		}
		if err := namespace.SetRoute(n, link, netip.PrefixFrom(x.address, 32), netip.Addr{}); err != nil {
			return err
		}
		err = n.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			IP: x.address.AsSlice(), HardwareAddr: x.mac,
		})
		if err != nil {
			return fmt.Errorf("setting the neighbour %s: %w", x.address, err)
		}
		return nil
	})
}

// follow hooks up the device that the machine has now, and serves while there is
// one.
func (x *machine) follow(ctx context.Context) error {
	name, known := x.device, true
	if x.d.domains != nil && x.domain != "" {
		name, known = x.d.domains.Device(x.domain, x.mac.String())
	}
	before := x.index
	x.d.hooking.Lock()
	err := x.d.onHost(func(n *netlink.Handle) error {
		tx, err := namespace.Find(n, x.d.link(x.id))
		if err != nil {
			return err
		}
		if tx == nil {
			return errLost
		}
		left, ok := x.d.noted(tx)
		if !ok {
			return fmt.Errorf("the link %s is somebody else's", tx.Attrs().Name)
		}
		var device netlink.Link
		switch {
		case known && name != "":
			device, err = namespace.Find(n, name)
		case !known && left.index != 0:
			device, err = findIndex(n, left.index)
		}
		if err != nil {
			return err
		}
		x.index = 0
		if left.index != 0 && (device == nil || device.Attrs().Index != left.index) {
			if err := unhook(n, left.index, tx.Attrs().Index, left.made); err != nil {
				return err
			}
			left.index, left.made = 0, false
			if err := n.LinkSetAlias(tx, x.d.alias(left)); err != nil {
				return fmt.Errorf("marking the link %s: %w", tx.Attrs().Name, err)
			}
		}
		if device == nil {
			return nil
		}
		if err := x.hook(n, tx, device, left); err != nil {
			return err
		}
		x.index = device.Attrs().Index
		return nil
	})
	x.d.hooking.Unlock()
	if x.index == 0 || x.index != before && before != 0 {
		// A connection does not outlive the device that it came by.
		err = errors.Join(err, x.serve(over(ctx), vpc.MetadataService{}))
	}
	switch {
	case err != nil:
		return err
	case x.index == 0:
		if before != 0 || x.trouble == "" {
			x.trouble = "absent"
			x.log.Info("the machine's device is not here; its metadata service waits for it", "device", x.device, "domain", x.domain)
		}
		return nil
	case x.index != before:
		x.log.Info("the machine has a metadata service", "device", name)
	}
	x.trouble = ""
	return x.serve(ctx, x.service)
}

// complain logs what keeps the machine from following, once.
func (x *machine) complain(err error) {
	if err == nil {
		return
	}
	if text := err.Error(); text != x.trouble {
		x.trouble = text
		x.log.Error("the machine's metadata service does not follow its device; will try again", "error", err)
	}
}

// hook joins the device and the link, and notes that first.
func (x *machine) hook(n *netlink.Handle, tx, device netlink.Link, left note) error {
	if left.index == device.Attrs().Index {
		there, err := stand(n, tx.Attrs().Index, left.index, answers)
		if err == nil && there {
			there, err = stand(n, left.index, tx.Attrs().Index, hooks...)
		}
		if err != nil || there {
			return err
		}
	}
	if err := x.d.suits(device); err != nil {
		return err
	}
	if err := x.d.evict(n, tx.Attrs().Index, device); err != nil {
		return err
	}
	// The answers' way first: then nothing is taken that can't be answered.
	if _, err := ensureQdisc(n, tx); err != nil {
		return err
	}
	if err := ensureHook(n, answers, tx.Attrs().Index, device.Attrs().Index); err != nil {
		return err
	}
	there, err := hasQdisc(n, device)
	if err != nil {
		return err
	}
	next := note{id: x.id, index: device.Attrs().Index, made: left.made && left.index == device.Attrs().Index || !there}
	if next != left {
		if err := n.LinkSetAlias(tx, x.d.alias(next)); err != nil {
			return fmt.Errorf("marking the link %s: %w", tx.Attrs().Name, err)
		}
	}
	if _, err := ensureQdisc(n, device); err != nil {
		return err
	}
	for _, h := range hooks {
		if err := ensureHook(n, h, device.Attrs().Index, tx.Attrs().Index); err != nil {
			return err
		}
	}
	return nil
}

// suits tells whether a device may be a machine's.
func (d *driver) suits(device netlink.Link) error {
	a := device.Attrs()
	if strings.HasPrefix(a.Alias, "tabard/") {
		return &host.Refusal{Reason: fmt.Sprintf("The device %s is not a machine's.", a.Name)}
	}
	if shows(device) {
		return nil
	}
	return &host.Refusal{Reason: fmt.Sprintf("The device %s is neither a tap nor a veth.", a.Name)}
}

// evict makes room at a device: filters that lead nowhere, or to a machine of
// this installation that does not run any more, are removed. Others are left,
// and the machine is refused.
func (d *driver) evict(n *netlink.Handle, own int, device netlink.Link) error {
	for _, h := range hooks {
		there, err := h.list(n, device.Attrs().Index)
		if err != nil {
			return err
		}
		for _, f := range there {
			if f.RedirIndex == own {
				continue
			}
			to, err := findIndex(n, f.RedirIndex)
			if err != nil {
				return err
			}
			if to != nil {
				other, ours := d.noted(to)
				if !ours || d.running(other.id) != nil {
					return &host.Refusal{Reason: fmt.Sprintf("The device %s has a metadata service already.", device.Attrs().Name)}
				}
			}
			if err := h.remove(n, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// serve makes want, or with the zero value nothing, what is served.
func (x *machine) serve(ctx context.Context, want vpc.MetadataService) error {
	if !want.Enabled {
		want = vpc.MetadataService{}
	}
	if want == x.served {
		return nil
	}
	set := func(g gate) error {
		err := namespace.Within(x.ns, func() error { return setFilter(x.mac, x.address, g) })
		if err != nil {
			return fmt.Errorf("setting the filter of %s: %w", inner, err)
		}
		return nil
	}
	if x.servers != nil {
		if err := set(gate{port: portOf(x.served), drain: true}); err != nil {
			return err
		}
		x.silence(ctx)
		if err := set(gate{}); err != nil {
			return err
		}
	}
	if !want.Enabled {
		return nil
	}
	var l *net.TCPListener
	at := netip.AddrPortFrom(metadataAddress, portOf(want))
	err := namespace.Within(x.ns, func() (err error) {
		l, err = namespace.Listen(ctx, at, inner, want.ResponseHopLimit)
		return err
	})
	if err != nil {
		return fmt.Errorf("listening on %s: %w", at, err)
	}
	bounds := serve.Metadata()
	if want.Protocol == "https" {
		bounds.TLS = x.handlers.MetadataTLS
	}
	x.servers, x.served = &serve.Group{Log: x.log}, want
	x.servers.Serve(l, x.address, x.handlers.Metadata, bounds)
	if err := set(gate{port: at.Port()}); err != nil {
		x.silence(ctx)
		return err
	}
	return nil
}

func portOf(s vpc.MetadataService) uint16 {
	if s.Protocol == "https" {
		return httpsPort
	}
	return httpPort
}

// silence ends what is served.
func (x *machine) silence(ctx context.Context) {
	if x.servers != nil {
		x.servers.Stop(ctx)
	}
	x.servers, x.served = nil, vpc.MetadataService{}
}

// close ends what is served, so that nobody answers.
func (x *machine) close(ctx context.Context) {
	if err := x.serve(ctx, vpc.MetadataService{}); err != nil {
		x.log.Warn("closing the machine's metadata service", "error", err)
		x.silence(ctx)
	}
}

// letGo ends what is served and leaves the rest to a later process.
func (x *machine) letGo(ctx context.Context) {
	if x.gone {
		return
	}
	x.close(ctx)
	if x.ns.IsOpen() {
		x.ns.Close()
	}
	x.gone = true
	x.d.mu.Lock()
	defer x.d.mu.Unlock()
	delete(x.d.machines, x.id)
}

// remove removes all that the machine has, once requests under way have ended.
// After an error it may be called again.
func (x *machine) remove(ctx context.Context) error {
	if x.gone {
		return nil
	}
	x.close(ctx)
	if err := x.d.erase(x.id); err != nil {
		return err
	}
	x.letGo(ctx)
	return nil
}
