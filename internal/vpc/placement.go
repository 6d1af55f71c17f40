package vpc

import (
	"net/netip"
	"slices"
)

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

	// Peers are the other instances of the VPC that are on other hosts, in order
	// of their addresses. There are none for a host that no other one reaches.
	Peers []Peer `json:"peers,omitempty"`
}

// Peer is an address of an instance on another host.
type Peer struct {
	Address netip.Addr `json:"address"` // private, of one of its interfaces
	Host    netip.Addr `json:"host"`    // of its host, on the network that joins the hosts
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

// Report is what a host has done: it saw an instance in one status and brought
// it to another.
type Report struct {
	InstanceID string `json:"instance_id"`
	Seen       string `json:"seen"`             // the status that it acted on
	Status     string `json:"status,omitempty"` // "" means that the instance, which was deleting, is gone
	Reason     string `json:"reason,omitempty"` // why it failed, for the instance's owner
}

// MaxReason bounds a report's reason, in bytes.
const MaxReason = 500

// follows lists what a host may bring an instance to from each status. A host
// cannot start what nobody asked it to start, nor remove what nobody deleted.
var follows = map[string][]string{
	Pending:    {Running, Failed},
	Starting:   {Running, Failed},
	Restarting: {Running, Failed},
	Running:    {Stopped, Failed}, // it ended by itself, or did not start again with its host
	Stopping:   {Stopped},
	Deleting:   {""},
}

// Valid reports whether a host may say this.
func (r Report) Valid() bool {
	return slices.Contains(follows[r.Seen], r.Status) && len(r.Reason) <= MaxReason
}
