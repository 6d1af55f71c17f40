package placement

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// firstVNI leaves the small numbers to what else uses VXLAN on a host: people
// and other programs begin to count there.
const firstVNI = 1 << 16

// FreeVNI returns a VXLAN network identifier that no VPC has. It is taken at
// random, so that a VPC does not get one that a host may still have in use for
// another that was deleted just now.
func FreeVNI(d *directory.Directory) uint32 {
	for {
		n := firstVNI + rand.Uint32N(vpc.MaxVNI-firstVNI+1)
		if _, taken := d.VPCsByVNI.One(directory.VNIKey(n)); !taken {
			return n
		}
	}
}

// number gives VPCs that were made before VPCs spanned hosts what they need for
// it, and reports whether all have it.
func (s *Scheduler) number(ctx context.Context) bool {
	var failed error
	for _, seen := range s.Directory.VPCs.All() {
		if seen.VNI != 0 {
			continue
		}
		err := s.Directory.Update(ctx, "", func(tx *directory.Tx) error {
			v, ok := s.Directory.VPCs.Get(seen.ID)
			if !ok || v.VNI != 0 {
				return nil
			}
			next := *v
			next.VNI = FreeVNI(s.Directory)
			s.Directory.VPCs.Put(tx, &next)
			return nil
		})
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("VPC %s: %w", seen.ID, err))
		}
	}
	if failed != nil && ctx.Err() == nil {
		s.Log.Error("VPCs without a number do not span hosts; will try again with the next change", "error", failed)
	}
	return failed == nil
}

// SetAddress remembers where other hosts reach a host; an invalid address means
// that they do not.
func SetAddress(ctx context.Context, d *directory.Directory, hostID string, a netip.Addr) error {
	if h, ok := d.Hosts.Get(hostID); ok && h.Address == a {
		return nil
	}
	return d.Update(ctx, "", func(tx *directory.Tx) error {
		h, ok := d.Hosts.Get(hostID)
		if !ok {
			return fault.New(fault.NotFound, "not_found", "The host %s does not exist any more.", hostID)
		}
		if h.Address != a {
			next := *h
			next.Address = a
			d.Hosts.Put(tx, &next)
		}
		return nil
	})
}

// peers returns the instances of an instance's VPC that are on other hosts. A
// host that is away for a while keeps its instances running, so they stay; one
// that was revoked is nobody's peer.
func peers(d *directory.Directory, i *vpc.Instance) []vpc.Peer {
	own := address(d, i.HostID)
	if !own.IsValid() || i.External != nil {
		return nil
	}
	var out []vpc.Peer
	at := map[string]netip.Addr{}
	for _, o := range d.InstancesByVPC.Get(i.VPCID) {
		if o.HostID == i.HostID || o.External != nil || o.Status == vpc.Deleting {
			continue
		}
		host, known := at[o.HostID]
		if !known {
			host = address(d, o.HostID)
			at[o.HostID] = host
		}
		if !host.IsValid() || host == own {
			continue
		}
		for n := range o.Interfaces {
			out = append(out, vpc.Peer{Address: o.Interfaces[n].Address, Host: host})
		}
	}
	slices.SortFunc(out, func(a, b vpc.Peer) int { return a.Address.Compare(b.Address) })
	return out
}

func address(d *directory.Directory, hostID string) netip.Addr {
	h, ok := d.Hosts.Get(hostID)
	if !ok || h.Revoked {
		return netip.Addr{}
	}
	return h.Address
}
