package vpc

import (
	"fmt"
	"net/netip"

	"tabard.dev/tabard/internal/object"
)

// SecurityGroup lets packets through to and from the interfaces that are in it.
// What no rule of any of an interface's groups lets through is dropped.
type SecurityGroup struct {
	object.Meta
	ID              string              `json:"id"` // r006-<uuid>
	AccountID       string              `json:"account_id"`
	VPCID           string              `json:"vpc_id"`
	Name            string              `json:"name"`
	ResourceGroupID string              `json:"resource_group_id"`
	Rules           []SecurityGroupRule `json:"rules,omitempty"`
}

// Directions and protocols of rules.
const (
	Inbound  = "inbound"
	Outbound = "outbound"

	ProtocolAll  = "all"
	ProtocolTCP  = "tcp"
	ProtocolUDP  = "udp"
	ProtocolICMP = "icmp"
)

// SecurityGroupRule lets packets of one direction through. RemoteGroup, or
// Remote, says to or from whom; neither means anybody.
type SecurityGroupRule struct {
	ID          string       `json:"id"`
	Direction   string       `json:"direction"`
	Protocol    string       `json:"protocol"`
	PortMin     int          `json:"port_min,omitempty"` // of tcp and udp
	PortMax     int          `json:"port_max,omitempty"`
	ICMPType    *int         `json:"icmp_type,omitempty"` // of icmp; nil means any
	ICMPCode    *int         `json:"icmp_code,omitempty"`
	Remote      netip.Prefix `json:"remote,omitzero"`
	RemoteGroup string       `json:"remote_group,omitempty"`
}

// DefaultRules are those of a VPC's default security group: everything out, and
// in what members of the group send (reference/instance-metadata-and-vpc.md
// section 3.6). newID makes the ids.
func DefaultRules(groupID string, newID func() string) []SecurityGroupRule {
	return []SecurityGroupRule{
		{ID: newID(), Direction: Outbound, Protocol: ProtocolAll},
		{ID: newID(), Direction: Inbound, Protocol: ProtocolAll, RemoteGroup: groupID},
	}
}

// GroupIDs returns the ids of the security groups that an interface is in: its
// own, or the VPC's default one.
func (nic *Interface) GroupIDs(v *VPC) []string {
	if len(nic.SecurityGroupIDs) > 0 {
		return nic.SecurityGroupIDs
	}
	return []string{v.SecurityGroup.ID}
}

// DefaultGroup is the default security group of a VPC that has never been
// changed. Its rules' ids follow from its own.
func DefaultGroup(v *VPC) *SecurityGroup {
	n := 0
	return &SecurityGroup{
		Meta: v.Meta, ID: v.SecurityGroup.ID, AccountID: v.AccountID, VPCID: v.ID, Name: v.SecurityGroup.Name,
		ResourceGroupID: v.ResourceGroupID,
		Rules: DefaultRules(v.SecurityGroup.ID, func() string {
			n++
			return fmt.Sprintf("%s-rule-%d", v.SecurityGroup.ID, n)
		}),
	}
}
