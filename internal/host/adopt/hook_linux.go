package adopt

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/namespace"
)

// A hook is a filter that moves frames which come in by one device to another.
// In tc(8)'s words the three are:
//
//	tc filter add dev DEVICE ingress pref 21569 protocol ip  u32 match ip dst 169.254.169.254 action mirred egress redirect dev TX
//	tc filter add dev DEVICE ingress pref 21570 protocol arp u32 match u32 0xa9fea9fe 0xffffffff at 24 action mirred egress redirect dev TX
//	tc filter add dev TX     ingress pref 1     protocol all u32 match u32 0 0 action mirred egress redirect dev DEVICE
//
// u32 and mirred are in every distribution's kernel, and have been for long. The
// filter's protocol is that of the tag where a frame has one.
type hook struct {
	priority uint16
	protocol uint16
	keys     []nl.TcU32Key
}

// target is 169.254.169.254.
const target = 0xa9fea9fe

// hooks are those at a machine's device. Their priority tells them from other
// people's filters; it is before those that tc and libvirt choose by themselves.
var hooks = []hook{
	{priority: 21569, protocol: unix.ETH_P_IP, keys: []nl.TcU32Key{{Mask: 0xffffffff, Val: target, Off: 16}}},  // destination
	{priority: 21570, protocol: unix.ETH_P_ARP, keys: []nl.TcU32Key{{Mask: 0xffffffff, Val: target, Off: 24}}}, // target address
}

// answers is the one at the host's end of the link to a machine's namespace.
var answers = hook{priority: 1, protocol: unix.ETH_P_ALL, keys: []nl.TcU32Key{{}}}

func (h hook) attrs(device int) netlink.FilterAttrs {
	// The parent of the frames that come in, under clsact and under ingress.
	return netlink.FilterAttrs{LinkIndex: device, Parent: netlink.HANDLE_MIN_INGRESS, Priority: h.priority, Protocol: h.protocol}
}

// add adds the filter, behind those that are there.
func (h hook) add(n *netlink.Handle, device, to int) error {
	err := n.FilterAdd(&netlink.U32{
		FilterAttrs: h.attrs(device),
		Sel:         &nl.TcU32Sel{Flags: nl.TC_U32_TERMINAL, Keys: h.keys},
		Actions:     []netlink.Action{netlink.NewMirredAction(to)},
	})
	if err != nil {
		return fmt.Errorf("adding a filter to device %d: %w", device, err)
	}
	return nil
}

// list returns the filters of this kind, wherever they lead to. A device that is
// gone has none.
func (h hook) list(n *netlink.Handle, device int) ([]*netlink.U32, error) {
	all, err := filters(n, device, netlink.HANDLE_MIN_INGRESS)
	return h.among(all), err
}

// filters lists all filters of a device, whosever they are.
func filters(n *netlink.Handle, device int, parent uint32) ([]netlink.Filter, error) {
	all, err := namespace.Whole(func() ([]netlink.Filter, error) {
		return n.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}}, parent)
	})
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the filters of device %d: %w", device, err)
	}
	return all, nil
}

// among picks the filters of this kind.
func (h hook) among(all []netlink.Filter) []*netlink.U32 {
	var out []*netlink.U32
	for _, f := range all {
		u, ok := f.(*netlink.U32)
		if !ok || u.Priority != h.priority || u.Protocol != h.protocol || len(u.Actions) != 1 {
			continue
		}
		m, ok := u.Actions[0].(*netlink.MirredAction)
		if !ok || m.MirredAction != netlink.TCA_EGRESS_REDIR {
			continue
		}
		u.RedirIndex = m.Ifindex // 0 where that device is gone
		out = append(out, u)
	}
	return out
}

// stand tells whether all is as ensureHook leaves it. Devices are looked at
// often, and seldom is there anything to do.
func stand(n *netlink.Handle, device, to int, all ...hook) (bool, error) {
	there, err := filters(n, device, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return false, err
	}
	for _, h := range all {
		if f := h.among(there); len(f) != 1 || f[0].RedirIndex != to || !h.matches(f[0]) {
			return false, nil
		}
	}
	return true, nil
}

// matches tells whether a filter takes exactly the frames that it is to take.
func (h hook) matches(f *netlink.U32) bool {
	if f.Sel == nil || f.Sel.Flags&nl.TC_U32_TERMINAL == 0 || len(f.Sel.Keys) != len(h.keys) {
		return false
	}
	for i, k := range f.Sel.Keys {
		if k.Mask != h.keys[i].Mask || k.Val != h.keys[i].Val || k.Off != h.keys[i].Off || k.OffMask != 0 {
			return false
		}
	}
	return true
}

// remove removes one filter, and with the last one what held them.
func (h hook) remove(n *netlink.Handle, f *netlink.U32) error {
	device := f.LinkIndex
	if err := n.FilterDel(&netlink.U32{FilterAttrs: f.FilterAttrs}); err != nil && !gone(err) {
		return fmt.Errorf("removing a filter of device %d: %w", device, err)
	}
	left, err := filters(n, device, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	for _, f := range left {
		if a := f.Attrs(); a.Priority == h.priority && a.Protocol == h.protocol {
			return nil
		}
	}
	if err := n.FilterDel(&netlink.U32{FilterAttrs: h.attrs(device)}); err != nil && !gone(err) {
		return fmt.Errorf("removing the filters' place at device %d: %w", device, err)
	}
	return nil
}

// gone tells whether what was to be removed does not exist.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

// ensureHook leaves one filter that leads to a device, new ones before old ones
// go, so that there is no moment without.
func ensureHook(n *netlink.Handle, h hook, device, to int) error {
	there, err := h.list(n, device)
	if err != nil {
		return err
	}
	var keep *netlink.U32
	for _, f := range there {
		if f.RedirIndex == to && h.matches(f) {
			keep = f
			break
		}
	}
	if keep == nil {
		if err := h.add(n, device, to); err != nil {
			return err
		}
	}
	for _, f := range there {
		if f == keep {
			continue
		}
		if err := h.remove(n, f); err != nil {
			return err
		}
	}
	return nil
}

// unhook removes the filters of a device that lead to a link, and the qdisc if
// it was made for them and holds nothing else.
func unhook(n *netlink.Handle, device, to int, made bool) error {
	for _, h := range hooks {
		there, err := h.list(n, device)
		if err != nil {
			return err
		}
		for _, f := range there {
			if f.RedirIndex != to {
				continue
			}
			if err := h.remove(n, f); err != nil {
				return err
			}
		}
	}
	if !made {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if left, err := filters(n, device, parent); err != nil || len(left) > 0 {
			return err
		}
	}
	if err := n.QdiscDel(clsact(device)); err != nil && !gone(err) {
		return fmt.Errorf("removing the qdisc of device %d: %w", device, err)
	}
	return nil
}

// unhookAll removes the filters of all devices that lead to a link.
func unhookAll(n *netlink.Handle, to int, x note) error {
	links, err := namespace.Whole(n.LinkList)
	if err != nil {
		return fmt.Errorf("listing the links: %w", err)
	}
	for _, l := range links {
		switch l.(type) {
		case *netlink.Veth, *netlink.Tuntap:
		default:
			continue
		}
		index := l.Attrs().Index
		if err := unhook(n, index, to, x.made && index == x.index); err != nil {
			return err
		}
	}
	return nil
}

func clsact(device int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// hasQdisc tells whether a device has a place for filters of incoming frames.
func hasQdisc(n *netlink.Handle, device netlink.Link) (bool, error) {
	all, err := namespace.Whole(func() ([]netlink.Qdisc, error) { return n.QdiscList(device) })
	if err != nil {
		return false, fmt.Errorf("listing the qdiscs of %s: %w", device.Attrs().Name, err)
	}
	for _, q := range all {
		if q.Attrs().Parent == netlink.HANDLE_CLSACT {
			return true, nil
		}
	}
	return false, nil
}

// ensureQdisc makes a place for filters unless there is one, and tells whether
// it did.
func ensureQdisc(n *netlink.Handle, device netlink.Link) (bool, error) {
	there, err := hasQdisc(n, device)
	if err != nil || there {
		return false, err
	}
	err = n.QdiscAdd(clsact(device.Attrs().Index))
	if errors.Is(err, unix.EEXIST) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("adding a clsact qdisc to %s: %w", device.Attrs().Name, err)
	}
	return true, nil
}

// findIndex returns the link of that index, or nil when there is none.
func findIndex(n *netlink.Handle, index int) (netlink.Link, error) {
	if index <= 0 {
		return nil, nil
	}
	link, err := n.LinkByIndex(index)
	if missing := (netlink.LinkNotFoundError{}); errors.As(err, &missing) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the device %d: %w", index, err)
	}
	return link, nil
}
