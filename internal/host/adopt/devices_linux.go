package adopt

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/host/namespace"
)

// own are the names of the links that drivers put into the host's namespace.
var own = regexp.MustCompile(`^t[bx][0-9a-f]{12}$`)

// Devices returns a function that lists the taps and veths of the namespace of
// that name, or with an empty name of this process's, that a machine may be at:
// all but Tabard's own and those that the host's default routes lead by. Which
// machine is behind one is a guess from what the host has heard of it lately:
// its MAC where there is but one, its address where there is but one of that
// MAC. Whoever adopts it says what is right.
func Devices(space string) func() ([]link.Machine, error) {
	return func() ([]link.Machine, error) {
		var ns netns.NsHandle
		var err error
		if space == "" {
			ns, err = namespace.Own()
		} else {
			ns, err = namespace.Open(space)
		}
		if err != nil {
			return nil, fmt.Errorf("opening the host's namespace: %w", err)
		}
		defer ns.Close()
		var all []link.Machine
		err = namespace.Within(ns, func() error {
			return namespace.Links(func(n *netlink.Handle) (err error) {
				all, err = devices(n)
				return err
			})
		})
		return all, err
	}
}

func devices(n *netlink.Handle) ([]link.Machine, error) {
	links, err := namespace.Whole(n.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the links: %w", err)
	}
	routes, err := namespace.Whole(func() ([]netlink.Route, error) { return n.RouteList(nil, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("listing the routes: %w", err)
	}
	out := map[int]bool{} // devices that a default route leads by
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			out[r.LinkIndex] = true
			for _, hop := range r.MultiPath {
				out[hop.LinkIndex] = true
			}
		}
	}
	heard, err := namespace.Whole(func() ([]netlink.Neigh, error) { return n.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return nil, fmt.Errorf("listing what bridges have learnt: %w", err)
	}
	neighbours, err := namespace.Whole(func() ([]netlink.Neigh, error) { return n.NeighList(0, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("listing the neighbours: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var all []link.Machine
	for _, l := range links {
		a := l.Attrs()
		if !shows(l) || own.MatchString(a.Name) || strings.HasPrefix(a.Alias, "tabard/") || out[a.Index] {
			continue
		}
		m := link.Machine{Name: a.Name, Device: a.Name, Bridge: names[a.MasterIndex], State: "down"}
		if a.Flags&net.FlagUp != 0 {
			m.State = "up"
		}
		at := a.Index // where its neighbour entries are
		if a.MasterIndex != 0 {
			at = a.MasterIndex
			m.MAC = only(heard, func(h netlink.Neigh) (string, bool) {
				return h.HardwareAddr.String(), h.LinkIndex == a.Index && h.State&netlink.NUD_PERMANENT == 0
			})
		} else {
			m.MAC = only(neighbours, func(h netlink.Neigh) (string, bool) {
				return h.HardwareAddr.String(), h.LinkIndex == at && len(h.HardwareAddr) == 6
			})
		}
		if m.MAC != "" {
			m.Address = only(neighbours, func(h netlink.Neigh) (string, bool) {
				ip, ok := netip.AddrFromSlice(h.IP)
				return ip.Unmap().String(), ok && h.LinkIndex == at && h.HardwareAddr.String() == m.MAC
			})
		}
		all = append(all, m)
	}
	return all, nil
}

// shows tells whether the kernel shows a machine's frames at a device.
func shows(l netlink.Link) bool {
	switch l := l.(type) {
	case *netlink.Veth:
		return true
	case *netlink.Tuntap:
		return l.Mode == netlink.TUNTAP_MODE_TAP
	}
	return false
}

// only returns the one value that there is, or nothing.
func only(all []netlink.Neigh, of func(netlink.Neigh) (string, bool)) string {
	got := ""
	for _, n := range all {
		v, ok := of(n)
		switch {
		case !ok || v == "" || v == got:
		case got != "":
			return ""
		default:
			got = v
		}
	}
	return got
}
