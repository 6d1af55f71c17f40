package network

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"tabard.dev/tabard/internal/host/namespace"
)

// An earlier process may have ended after it removed a device and before it
// removed what guarded it, and a tap goes with its machine's process, which may
// end while there is no agent. What is left then are rules without a device, and
// floating addresses of nobody. Neither lets anything through, but they would
// pile up.

// ofPort tells the names that this package gives to ports.
var ofPort = regexp.MustCompile(`^t[0-9a-f]{12}$`)

// orphans returns the ports in the thread's namespace of which there are rules,
// and no device.
func orphans(vpc string) ([]Left, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return nil, fmt.Errorf("listing filters: %w", err)
	}
	chains, err := c.ListChainsOfTableFamily(routerRules().table.Family)
	if err != nil {
		return nil, fmt.Errorf("listing chains: %w", err)
	}
	devices := map[string]bool{}
	for _, t := range tables {
		devices[t.Name] = true
	}
	for _, c := range chains {
		devices[strings.TrimPrefix(c.Name, outboundChain(""))] = true
	}
	var out []Left
	err = namespace.Links(func(n *netlink.Handle) error {
		for device := range devices {
			if !ofPort.MatchString(device) {
				continue
			}
			switch link, err := namespace.Find(n, device); {
			case err != nil:
				return err
			case link == nil:
				out = append(out, Left{VPC: vpc, Device: device})
			}
		}
		return nil
	})
	return out, err
}

// ours tells whether a device of a router is of a port of this process. It is
// called with n.mu held.
func (n *Network) ours(space, device string) bool {
	for _, p := range n.ports {
		if p.router.space != space {
			continue
		}
		for _, l := range p.links {
			if l.device == device {
				return true
			}
		}
	}
	return false
}

// sinkFloating removes the floating addresses of a router's machines that are
// not there any more; device is the host's end of its uplink.
func (n *Network) sinkFloating(ns netns.NsHandle, space, device string) error {
	if n.uplink == nil || device == "" {
		return nil
	}
	// Whoever sets a floating address has its machine's port entered.
	n.floatMu.Lock()
	defer n.floatMu.Unlock()
	owned := map[netip.Addr]bool{}
	n.mu.Lock()
	for _, p := range n.ports {
		if p.router.space == space {
			for _, l := range p.links {
				owned[l.address] = true
			}
		}
	}
	n.mu.Unlock()
	var gone []netip.Addr
	err := namespace.Within(ns, func() error {
		have, err := readFloating()
		if err != nil {
			return err
		}
		ports, err := portsOf("")
		if err != nil {
			return err
		}
		err = namespace.Links(func(h *netlink.Handle) error {
			for _, p := range ports {
				addresses, err := routedTo(h, p.Device)
				if err != nil {
					return err
				}
				for _, a := range addresses {
					owned[a] = true
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, private := range have.in {
			if owned[private] {
				continue
			}
			changed, err := setFloating(private, netip.Addr{})
			if err != nil {
				return err
			}
			gone = append(gone, changed...)
		}
		return forgetConnections(gone...)
	})
	for _, a := range gone {
		err = errors.Join(err, n.uplink.unroute(a, device))
	}
	return err
}
