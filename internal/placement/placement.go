// Package placement is between instances and hosts: it chooses the host for an
// instance, gathers what that host needs to know of it, and writes down what
// the host reports. Running instances is the host's work.
package placement

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// Kinds are the kinds of object that a placement shows: whoever keeps
// placements watches them.
var Kinds = []string{
	directory.KindInstance, directory.KindHost, "vpc", "subnet", "ssh-key", "floating-ip", "security-group", "image", "resource-group",
}

// Of gathers what a host needs to know of an instance.
func Of(d *directory.Directory, i *vpc.Instance) *vpc.Placement {
	return of(d, i, map[string][]netip.Addr{})
}

// of is Of with the members of security groups that are known already, to which
// it adds: the instances of one network share them.
func of(d *directory.Directory, i *vpc.Instance, known map[string][]netip.Addr) *vpc.Placement {
	p := &vpc.Placement{Instance: *i.Clone(), ResourceGroup: vpc.Ref{ID: i.ResourceGroupID, Name: d.ResourceGroupName(i.ResourceGroupID)}}
	if v, ok := d.VPCs.Get(i.VPCID); ok {
		p.VPC = *v
	}
	for n := range i.Interfaces {
		nic := &i.Interfaces[n]
		if s, ok := d.Subnets.Get(nic.SubnetID); ok && !slices.ContainsFunc(p.Subnets, func(o vpc.Subnet) bool { return o.ID == s.ID }) {
			p.Subnets = append(p.Subnets, *s)
		}
		for _, id := range nic.GroupIDs(&p.VPC) {
			addGroup(d, p, id)
		}
	}
	for _, id := range i.KeyIDs {
		if k, ok := d.Keys.Get(id); ok {
			p.Keys = append(p.Keys, *k)
		}
	}
	for _, f := range d.FloatingIPsByInstance.Get(i.ID) {
		p.FloatingIPs = append(p.FloatingIPs, *f)
	}
	slices.SortFunc(p.FloatingIPs, func(a, b vpc.FloatingIP) int { return strings.Compare(a.ID, b.ID) })
	p.Image = image(d, i.ImageID)
	if p.VPC.VNI != 0 {
		p.Peers = peers(d, i)
	}
	for _, g := range p.SecurityGroups {
		for _, r := range g.Rules {
			if r.RemoteGroup == "" {
				continue
			}
			key := directory.Key(g.VPCID, r.RemoteGroup)
			if known[key] == nil {
				known[key] = members(d, g.VPCID, r.RemoteGroup)
			}
			if p.Members == nil {
				p.Members = map[string][]netip.Addr{}
			}
			p.Members[r.RemoteGroup] = known[key]
		}
	}
	return p
}

func addGroup(d *directory.Directory, p *vpc.Placement, id string) {
	if slices.ContainsFunc(p.SecurityGroups, func(g vpc.SecurityGroup) bool { return g.ID == id }) {
		return
	}
	if g, ok := d.SecurityGroups.Get(id); ok {
		p.SecurityGroups = append(p.SecurityGroups, *g)
		return
	}
	// The default group of a VPC that was made before groups were kept. An
	// instance without its VPC has none, so that nothing passes.
	if id != "" && id == p.VPC.SecurityGroup.ID {
		p.SecurityGroups = append(p.SecurityGroups, *vpc.DefaultGroup(&p.VPC))
	}
}

// members returns the addresses of the interfaces in a security group, in
// order.
func members(d *directory.Directory, vpcID, groupID string) []netip.Addr {
	out := []netip.Addr{}
	v, ok := d.VPCs.Get(vpcID)
	if !ok {
		return out
	}
	for _, i := range d.InstancesByVPC.Get(vpcID) {
		for n := range i.Interfaces {
			if nic := &i.Interfaces[n]; slices.Contains(nic.GroupIDs(v), groupID) {
				out = append(out, nic.Address)
			}
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func image(d *directory.Directory, id string) vpc.Image {
	if i, ok := d.Images.Get(id); ok {
		return *i
	}
	for _, r := range vpc.Regions {
		for _, i := range vpc.StockImages(r) {
			if i.ID == id {
				return i
			}
		}
	}
	return vpc.Image{ID: id}
}

// OnHost returns the placements of a host, by instance id.
func OnHost(d *directory.Directory, hostID string) map[string]*vpc.Placement {
	out, known := map[string]*vpc.Placement{}, map[string][]netip.Addr{}
	for _, i := range d.InstancesByHost.Get(hostID) {
		out[i.ID] = of(d, i, known)
	}
	return out
}

// Same reports whether two placements of one instance say the same. It goes by
// the revisions of the objects in them, and is cheap.
func Same(a, b *vpc.Placement) bool {
	return a.Instance.Revision == b.Instance.Revision && a.ResourceGroup == b.ResourceGroup &&
		a.VPC.ID == b.VPC.ID && a.VPC.Revision == b.VPC.Revision && a.Image.ID == b.Image.ID && a.Image.Revision == b.Image.Revision &&
		slices.EqualFunc(a.Subnets, b.Subnets, func(a, b vpc.Subnet) bool { return a.ID == b.ID && a.Revision == b.Revision }) &&
		slices.EqualFunc(a.Keys, b.Keys, func(a, b vpc.Key) bool { return a.ID == b.ID && a.Revision == b.Revision }) &&
		slices.EqualFunc(a.FloatingIPs, b.FloatingIPs, func(a, b vpc.FloatingIP) bool { return a.ID == b.ID && a.Revision == b.Revision }) &&
		slices.EqualFunc(a.SecurityGroups, b.SecurityGroups, func(a, b vpc.SecurityGroup) bool { return a.ID == b.ID && a.Revision == b.Revision }) &&
		maps.EqualFunc(a.Members, b.Members, slices.Equal) && slices.Equal(a.Peers, b.Peers)
}

// Report writes down what a host has done, unless somebody has asked for
// something else in the meantime: then the host sees that next. A host can
// report only about instances that are placed on it.
func Report(ctx context.Context, d *directory.Directory, hostID string, r vpc.Report) error {
	if !r.Valid() {
		return fault.New(fault.Invalid, "invalid_report", "A host cannot bring an instance from %q to %q.", r.Seen, r.Status)
	}
	return d.Update(ctx, "", func(tx *directory.Tx) error {
		i, ok := d.Instances.Get(r.InstanceID)
		switch {
		case !ok && r.Status == "":
			return nil
		case !ok, i.HostID != hostID:
			return fault.New(fault.NotFound, "not_found", "The instance %q is not placed on this host.", r.InstanceID)
		case i.Status != r.Seen:
			return nil
		}
		if r.Status == "" {
			d.Instances.Delete(tx, i)
			return nil
		}
		next := i.Clone()
		next.Status, next.StatusReason, next.Force = r.Status, r.Reason, false
		next.Ran = i.Ran || r.Status == vpc.Running
		d.Instances.Put(tx, next)
		return nil
	})
}
