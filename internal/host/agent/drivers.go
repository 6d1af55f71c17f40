package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"tabard.dev/tabard/internal/cluster"
)

// Drivers that an agent can be told to run instances with.
const (
	DriverAuto  = "auto"
	DriverQEMU  = "qemu"
	DriverNetns = "netns"
	DriverAdopt = "adopt" // machines that something else runs
)

// DriverConfig says what runs machines on this host.
type DriverConfig struct {
	State       string // tells this agent's namespaces and devices from others': 8 hexadecimal digits
	Driver      string // auto, or some of qemu, netns and adopt, comma-separated
	Accel       string // auto, kvm or tcg
	MemoryMiB   int    // for virtual machines; 0 means three quarters of the host's
	MaxDiskGiB  int    // of one virtual machine; 0 means 250
	NoUplink    bool
	UplinkRange string
	Address     string // of this host among hosts; "" is that by which it reaches the server, "none" is none
	User        string // that virtual machines run as; "" is tabard-vm, else nobody
	UIDs        string // FIRST-LAST, of which each virtual machine gets one; "" is none
	Libvirt     string // socket

	watch watcher // of machines that something else runs
}

// Validate reports what cannot work.
func (c *DriverConfig) Validate() error {
	if _, err := c.wanted(); err != nil {
		return err
	}
	if !slices.Contains([]string{"auto", "kvm", "tcg"}, c.Accel) {
		return fmt.Errorf("accel %q is not one of auto, kvm, tcg", c.Accel)
	}
	if c.MemoryMiB < 0 {
		return fmt.Errorf("memory %d is less than nothing", c.MemoryMiB)
	}
	if c.MaxDiskGiB < 0 {
		return fmt.Errorf("max-disk %d is less than nothing", c.MaxDiskGiB)
	}
	if _, _, err := c.uids(); err != nil {
		return err
	}
	if c.UplinkRange != "" {
		if p, err := netip.ParsePrefix(c.UplinkRange); err != nil || !p.Addr().Is4() {
			return fmt.Errorf("uplink-range %q is not a range of IPv4 addresses such as 100.127.0.0/16", c.UplinkRange)
		}
	}
	if _, err := c.address(netip.Addr{}); err != nil {
		return err
	}
	return nil
}

// AddressNone says that VPCs end at this host.
const AddressNone = "none"

// address returns where other hosts reach this one: where it was told, or by
// the address that it reaches the server by. Invalid means that they do not.
func (c *DriverConfig) address(toServer netip.Addr) (netip.Addr, error) {
	switch c.Address {
	case AddressNone:
		return netip.Addr{}, nil
	case "":
		if cluster.ValidAddress(toServer) != nil {
			return netip.Addr{}, nil
		}
		return toServer, nil
	}
	a, err := netip.ParseAddr(c.Address)
	if err == nil {
		err = cluster.ValidAddress(a)
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("address %q is not an IPv4 address at which other hosts reach this one", c.Address)
	}
	return a, nil
}

// uids returns the first and the last user id for virtual machines; 0 is none.
func (c *DriverConfig) uids() (first, last uint32, err error) {
	if c.UIDs == "" {
		return 0, 0, nil
	}
	from, to, _ := strings.Cut(c.UIDs, "-")
	a, err := strconv.ParseUint(from, 10, 32)
	b, err2 := strconv.ParseUint(to, 10, 32)
	if errors.Join(err, err2) != nil || a == 0 || a > b {
		return 0, 0, fmt.Errorf("qemu-uids %q is not a range of user ids such as 200000-265535", c.UIDs)
	}
	return uint32(a), uint32(b), nil
}

// wanted returns the drivers to run, by name; nil means all that work.
func (c *DriverConfig) wanted() ([]string, error) {
	if c.Driver == DriverAuto || c.Driver == "" {
		return nil, nil
	}
	var out []string
	for name := range strings.SplitSeq(c.Driver, ",") {
		name = strings.TrimSpace(name)
		if !slices.Contains([]string{DriverQEMU, DriverNetns, DriverAdopt}, name) {
			return nil, fmt.Errorf("driver %q is not one of auto, qemu, netns, adopt", name)
		}
		out = append(out, name)
	}
	return out, nil
}
