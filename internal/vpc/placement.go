package vpc

import "net/netip"

// Placement is all that a host needs to know of an instance that is placed on
// it: enough to run it and to answer its metadata service without asking
// anybody.
type Placement struct {
	Instance       Instance        `json:"instance"`
	VPC            VPC             `json:"vpc"`
	Subnets        []Subnet        `json:"subnets,omitempty"`         // of the instance's interfaces
	Keys           []Key           `json:"keys,omitempty"`            // that still exist
	FloatingIPs    []FloatingIP    `json:"floating_ips,omitempty"`    // bound to the instance
	SecurityGroups []SecurityGroup `json:"security_groups,omitempty"` // of the instance's interfaces
	Image          Image           `json:"image"`
	ResourceGroup  Ref             `json:"resource_group"`

	// Members are the addresses of the members of those security groups that a
	// rule of SecurityGroups names as its remote, by the group's id.
	Members map[string][]netip.Addr `json:"members,omitempty"`
}

// Subnet returns one of the instance's subnets.
func (p *Placement) Subnet(id string) (*Subnet, bool) {
	for n := range p.Subnets {
		if p.Subnets[n].ID == id {
			return &p.Subnets[n], true
		}
	}
	return nil, false
}

// GroupsOf returns the security groups of an interface of the instance.
func (p *Placement) GroupsOf(nic *Interface) []*SecurityGroup {
	var out []*SecurityGroup
	for _, id := range nic.GroupIDs(&p.VPC) {
		for n := range p.SecurityGroups {
			if p.SecurityGroups[n].ID == id {
				out = append(out, &p.SecurityGroups[n])
			}
		}
	}
	return out
}
