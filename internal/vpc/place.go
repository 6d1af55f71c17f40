package vpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
)

// Region is a region with its zones and the prefixes of the ids in it
// (reference/instance-metadata-and-vpc.md section 3.2).
type Region struct {
	Name   string
	Prefix string // of regional ids, such as r006
	Zones  []Zone
}

// Zone is one zone of a region. Block is the address prefix that a VPC with
// automatic prefixes has in it.
type Zone struct {
	Name   string
	Prefix string // of zonal ids, such as 0717
	Block  netip.Prefix
}

// Regions are the regions an installation can be.
var Regions = []Region{
	region("us-south", "r006", "0717", "0727", "0737"),
	region("us-east", "r014", "0757", "0767", "0777"),
	region("eu-de", "r010", "02b7", "02c7", "02d7"),
}

func region(name, prefix string, zones ...string) Region {
	r := Region{Name: name, Prefix: prefix}
	for n, z := range zones {
		r.Zones = append(r.Zones, Zone{
			Name:   fmt.Sprintf("%s-%d", name, n+1),
			Prefix: z,
			Block:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 240, byte(64 * n), 0}), 18),
		})
	}
	return r
}

// RegionNamed returns a region by name.
func RegionNamed(name string) (Region, bool) {
	for _, r := range Regions {
		if r.Name == name {
			return r, true
		}
	}
	return Region{}, false
}

// Zone returns a zone of the region by name.
func (r Region) Zone(name string) (Zone, bool) {
	for _, z := range r.Zones {
		if z.Name == name {
			return z, true
		}
	}
	return Zone{}, false
}

// StockImages are the images that every installation has.
func StockImages(r Region) []Image {
	return []Image{{
		ID:           r.Prefix + "-7e1a6f0c-52c4-4d0b-9d36-0c6f3b2a9e01",
		Name:         "tabard-local-1",
		OS:           LocalSystem.Family,
		OSName:       LocalSystem.Name,
		Version:      LocalSystem.Version,
		Architecture: LocalSystem.Architecture,
		Vendor:       LocalSystem.Vendor,
	}}
}

// InstanceProfile is a hardware profile.
type InstanceProfile struct {
	Name      string
	Family    string
	VCPUs     int
	MemoryGiB int
	Bandwidth int // Mbps
}

// InstanceProfiles are the hardware profiles, the default one first.
var InstanceProfiles = []InstanceProfile{
	{"bx2-2x8", "balanced", 2, 8, 4000},
	{"bx2-4x16", "balanced", 4, 16, 8000},
	{"bx2-8x32", "balanced", 8, 32, 16000},
	{"cx2-2x4", "compute", 2, 4, 4000},
	{"cx2-4x8", "compute", 4, 8, 8000},
	{"mx2-2x16", "memory", 2, 16, 4000},
	{"mx2-4x32", "memory", 4, 32, 8000},
	{"bxf-1x4", "balanced", 1, 4, 2000},
	{"bxf-2x8", "balanced", 2, 8, 4000},
	{"cxf-1x2", "compute", 1, 2, 2000},
	{"cxf-2x4", "compute", 2, 4, 4000},
	{"mxf-1x8", "memory", 1, 8, 2000},
	{"nxf-1x1", "nano", 1, 1, 1000},
	{"nxf-1x2", "nano", 1, 2, 1000},
	{"tabard-1x1", "lab", 1, 1, 1000}, // for tests and laptops
}

// ProfileNamed returns a hardware profile by name.
func ProfileNamed(name string) (InstanceProfile, bool) {
	for _, p := range InstanceProfiles {
		if p.Name == name {
			return p, true
		}
	}
	return InstanceProfile{}, false
}

// FloatingBlock is where floating addresses come from: a range reserved for
// documentation, so that it never collides with a real network.
var FloatingBlock = netip.MustParsePrefix("198.51.100.0/24")

// reservedAddresses at the start of a subnet: network, gateway and two that
// the provider keeps. The last one is broadcast.
const reservedAddresses = 4

// ErrNoSpace means that a block has no room left.
var ErrNoSpace = errors.New("no free addresses")

// AllocateSubnet returns the first free range of count addresses in a block
// that overlaps none of the taken ones. count must be a power of two, at least
// 8.
func AllocateSubnet(block netip.Prefix, count int, taken []netip.Prefix) (netip.Prefix, error) {
	if count < 8 || bits.OnesCount(uint(count)) != 1 || bits.Len(uint(count))-1 > 32-block.Bits() {
		return netip.Prefix{}, fmt.Errorf("address count %d is not a power of two from 8 to %d", count, 1<<(32-block.Bits()))
	}
	length := 32 - (bits.Len(uint(count)) - 1)
	for addr := block.Addr(); block.Contains(addr); addr = advance(addr, uint32(count)) {
		p := netip.PrefixFrom(addr, length)
		if !overlapsAny(p, taken) {
			return p, nil
		}
	}
	return netip.Prefix{}, ErrNoSpace
}

func overlapsAny(p netip.Prefix, taken []netip.Prefix) bool {
	for _, t := range taken {
		if p.Overlaps(t) {
			return true
		}
	}
	return false
}

// AllocateAddress returns the first address of a range that is neither
// reserved nor taken.
func AllocateAddress(p netip.Prefix, taken map[netip.Addr]bool) (netip.Addr, error) {
	last := advance(p.Addr(), 1<<(32-p.Bits())-1)
	for a := advance(p.Addr(), reservedAddresses); a.Less(last); a = a.Next() {
		if !taken[a] {
			return a, nil
		}
	}
	return netip.Addr{}, ErrNoSpace
}

// Usable returns how many addresses of a range can be given out.
func Usable(p netip.Prefix) int { return 1<<(32-p.Bits()) - reservedAddresses - 1 }

func advance(a netip.Addr, n uint32) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(b)
}
