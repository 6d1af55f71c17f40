package host

import (
	"fmt"
	"net/netip"

	"tabard.dev/tabard/internal/vpc"
)

// MachineOf turns what the server says of an instance into what a driver needs
// to know.
func MachineOf(p *vpc.Placement) (Machine, error) {
	i := &p.Instance
	m := Machine{
		ID: i.ID, Name: i.Name, VPC: i.VPCID, Metadata: i.Metadata, Image: p.Image, UserData: i.UserData, External: i.External,
		Network: p.VPC.VNI, Peers: p.Peers,
		Fresh: !i.Ran && (i.Status == vpc.Pending || i.Status == vpc.Starting),
	}
	if hw, ok := vpc.ProfileNamed(i.Profile); ok {
		m.VCPUs, m.MemoryMiB = hw.VCPUs, hw.MemoryGiB<<10
	}
	for _, k := range p.Keys {
		m.Keys = append(m.Keys, k.PublicKey)
	}
	for n := range i.Interfaces {
		nic := &i.Interfaces[n]
		subnet, ok := p.Subnet(nic.SubnetID)
		if !ok {
			return Machine{}, fmt.Errorf("subnet %s does not exist", nic.SubnetID)
		}
		card := Interface{ID: nic.ID, MAC: nic.MAC, Address: nic.Address, Subnet: subnet.CIDR, Firewall: firewall(p, nic)}
		for _, f := range p.FloatingIPs {
			if f.InterfaceID == nic.ID {
				card.Floating = f.Address
			}
		}
		m.Interfaces = append(m.Interfaces, card)
	}
	if len(m.Interfaces) == 0 {
		return Machine{}, fmt.Errorf("instance %s has no network interface", i.ID)
	}
	return m, nil
}

// firewall is what the security groups of an interface let through. A rule
// whose remote is a group becomes one pass for each member.
func firewall(p *vpc.Placement, nic *vpc.Interface) Firewall {
	var f Firewall
	for _, g := range p.GroupsOf(nic) {
		for _, r := range g.Rules {
			side := &f.Inbound
			if r.Direction == vpc.Outbound {
				side = &f.Outbound
			}
			remotes := []netip.Prefix{r.Remote}
			if r.RemoteGroup != "" {
				remotes = remotes[:0]
				for _, a := range p.Members[r.RemoteGroup] {
					if a != nic.Address {
						remotes = append(remotes, netip.PrefixFrom(a, a.BitLen()))
					}
				}
			}
			for _, remote := range remotes {
				for _, protocol := range r.Protocols() {
					*side = append(*side, pass(r, protocol, remote))
				}
			}
		}
	}
	return f
}

func pass(r vpc.SecurityGroupRule, protocol string, remote netip.Prefix) Pass {
	p := Pass{Protocol: protocol, Remote: remote, ICMPType: -1, ICMPCode: -1}
	if protocol == vpc.ProtocolTCP || protocol == vpc.ProtocolUDP {
		p.Ports = [2]uint16{1, 65535}
		if r.PortMin > 0 {
			p.Ports = [2]uint16{uint16(r.PortMin), uint16(r.PortMax)}
		}
	}
	if r.ICMPType != nil {
		p.ICMPType = *r.ICMPType
	}
	if r.ICMPCode != nil {
		p.ICMPCode = *r.ICMPCode
	}
	return p
}
