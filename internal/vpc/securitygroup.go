package vpc

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/google/uuid"

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

// Directions and protocols of rules. ProtocolAll is whatever goes over IP, and
// ProtocolThree is ICMP, TCP and UDP.
const (
	Inbound  = "inbound"
	Outbound = "outbound"

	ProtocolAll   = "all"
	ProtocolThree = "icmp_tcp_udp"
	ProtocolTCP   = "tcp"
	ProtocolUDP   = "udp"
	ProtocolICMP  = "icmp"
)

// SecurityGroupRule lets packets of one direction through. RemoteGroup, or
// Remote, says to or from whom; neither means anybody.
type SecurityGroupRule struct {
	ID          string       `json:"id"`
	Name        string       `json:"name,omitempty"`
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
		{ID: newID(), Name: "allow-outbound", Direction: Outbound, Protocol: ProtocolAll},
		{ID: newID(), Name: "allow-members-inbound", Direction: Inbound, Protocol: ProtocolAll, RemoteGroup: groupID},
	}
}

// DefaultGroup is the default security group of a VPC for which none is stored,
// because the VPC is older than security groups. It is always the same one, so
// its rules can be named before the group is stored.
func DefaultGroup(v *VPC) *SecurityGroup {
	n := byte(0)
	prefix, _, _ := strings.Cut(v.SecurityGroup.ID, "-")
	return &SecurityGroup{
		Meta: object.Meta{CreatedAt: v.CreatedAt, CreatedBy: v.CreatedBy, ModifiedAt: v.CreatedAt, ModifiedBy: v.CreatedBy},
		ID:   v.SecurityGroup.ID, AccountID: v.AccountID, VPCID: v.ID, Name: v.SecurityGroup.Name, ResourceGroupID: v.ResourceGroupID,
		Rules: DefaultRules(v.SecurityGroup.ID, func() string {
			n++
			return prefix + "-" + uuid.NewSHA1(uuid.NameSpaceOID, append([]byte(v.SecurityGroup.ID), n)).String()
		}),
	}
}

// Rule returns the rule with an id.
func (g *SecurityGroup) Rule(id string) (*SecurityGroupRule, bool) {
	for n := range g.Rules {
		if g.Rules[n].ID == id {
			return &g.Rules[n], true
		}
	}
	return nil, false
}

// Clone returns a copy whose rules can be changed.
func (g *SecurityGroup) Clone() *SecurityGroup {
	c := *g
	c.Rules = slices.Clone(g.Rules)
	return &c
}

// Protocols returns the protocols of a packet filter that the rule's one stands
// for.
func (r *SecurityGroupRule) Protocols() []string {
	if r.Protocol == ProtocolThree {
		return []string{ProtocolICMP, ProtocolTCP, ProtocolUDP}
	}
	return []string{r.Protocol}
}

// GroupIDs returns the ids of the security groups that an interface is in: its
// own, or the VPC's default one.
func (nic *Interface) GroupIDs(v *VPC) []string {
	if len(nic.SecurityGroupIDs) > 0 {
		return nic.SecurityGroupIDs
	}
	return []string{v.SecurityGroup.ID}
}
