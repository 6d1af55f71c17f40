package vpcapi

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

func (s *service) networkRoutes() {
	vpcs, subnets := &s.vpcs, &s.subnets

	s.list(nounVPC, []string{"resource_group.id", "classic_access"}, rowsOf(s, vpcs,
		func(*vpc.VPC) map[string]string { return map[string]string{"classic_access": "false"} },
		func(v *vpc.VPC) any { return s.vpcShape(v) }))
	api.Read(s.Family, "GET /v1/vpcs/{id}", vpcs.action("read"), fromPath(s, vpcs),
		shown(func(v *vpc.VPC) any { return s.vpcShape(v) }, nil))
	api.Read(s.Family, "GET /v1/vpcs/{id}/default_security_group", vpcs.action("read"), fromPath(s, vpcs),
		func(c *api.Call, v *vpc.VPC) (api.Reply, error) { return s.showSecurityGroup(c, s.defaultGroup(v)) })
	api.Read(s.Family, "GET /v1/vpcs/{id}/address_prefixes", vpcs.action("read"), fromPath(s, vpcs), s.listPrefixes)
	api.Change(s.Family, "POST /v1/vpcs", vpcs.action("create"), vpcs.action("create"),
		forCreate(s, nounVPC, func(b *vpcBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createVPC)
	api.Change(s.Family, "PATCH /v1/vpcs/{id}", vpcs.action("update"), vpcs.action("update"), forChange[namePatch](s, vpcs), s.updateVPC)
	api.Change(s.Family, "DELETE /v1/vpcs/{id}", vpcs.action("delete"), vpcs.action("delete"), forChange[api.None](s, vpcs), s.deleteVPC)

	s.list(nounSubnet, []string{"resource_group.id", "zone.name", "vpc.id", "vpc.crn", "vpc.name", "routing_table.id", "routing_table.name"},
		rowsOf(s, subnets, s.subnetFilters, func(n *vpc.Subnet) any { return s.subnetShape(n) }))
	api.Read(s.Family, "GET /v1/subnets/{id}", subnets.action("read"), fromPath(s, subnets),
		shown(func(n *vpc.Subnet) any { return s.subnetShape(n) }, nil))
	api.Read(s.Family, "GET /v1/subnets/{id}/reserved_ips", subnets.action("read"), fromPath(s, subnets), s.listReserved)
	api.Read(s.Family, "GET /v1/subnets/{id}/reserved_ips/{ip}", subnets.action("read"), fromPath(s, subnets), s.getReserved)
	api.Change(s.Family, "POST /v1/subnets", subnets.action("create"), subnets.action("create"),
		forCreate(s, nounSubnet, func(b *subnetBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createSubnet)
	api.Change(s.Family, "PATCH /v1/subnets/{id}", subnets.action("update"), subnets.action("update"), forChange[namePatch](s, subnets), s.updateSubnet)
	api.Change(s.Family, "DELETE /v1/subnets/{id}", subnets.action("delete"), subnets.action("delete"), forChange[api.None](s, subnets), s.deleteSubnet)
}

// namePatch is the merge patch of what has only a name to change.
type namePatch struct {
	Name *string `json:"name"`
}

type vpcBody struct {
	Name          *string      `json:"name"`
	ResourceGroup *identityRef `json:"resource_group"`
	Prefixes      string       `json:"address_prefix_management"` // auto or manual
	ClassicAccess bool         `json:"classic_access"`

	DNS json.RawMessage `json:"dns"` // refused
}

func (s *service) createVPC(c *api.Call, tx *directory.Tx, b *vpcBody, groupID string) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if err := s.checkGroup(c, groupID); err != nil {
		return fail(err)
	}
	if err := quota(s.d.VPCsByAccount.Len(c.Account()), vpc.MaxVPCs, "The account", "VPCs"); err != nil {
		return fail(err)
	}
	name, err := s.vpcs.newName(c, b.Name)
	if err != nil {
		return fail(err)
	}
	switch b.Prefixes {
	case "", "auto", "manual":
	default:
		return fail(fault.New(fault.Invalid, "validation_enum", "The property address_prefix_management must be auto or manual.").On("address_prefix_management"))
	}
	if b.ClassicAccess {
		return fail(badField("classic_access", "Classic access is not supported by this server."))
	}
	if err := (properties{"dns": b.DNS}).refuse(map[string]string{"dns": ""}); err != nil {
		return fail(err)
	}
	part := func(word string) vpc.Ref { return vpc.Ref{ID: s.regionalID(), Name: randomName(word)} }
	v := &vpc.VPC{
		ID: s.regionalID(), AccountID: c.Account(), Name: name, ResourceGroupID: groupID,
		SecurityGroup: part("group"), NetworkACL: part("acl"), RoutingTable: part("table"),
		ManualPrefixes: b.Prefixes == "manual", VNI: placement.FreeVNI(s.d),
	}
	s.d.VPCs.Put(tx, v)
	s.d.SecurityGroups.Put(tx, &vpc.SecurityGroup{
		ID: v.SecurityGroup.ID, AccountID: v.AccountID, VPCID: v.ID, Name: v.SecurityGroup.Name, ResourceGroupID: groupID,
		Rules: vpc.DefaultRules(v.SecurityGroup.ID, s.regionalID),
	})
	return api.Reply{Status: http.StatusCreated, Body: s.vpcShape(v)}, target(s, c, &s.vpcs, v), nil
}

func (s *service) updateVPC(c *api.Call, tx *directory.Tx, b *namePatch, v *vpc.VPC) (api.Reply, api.Target, error) {
	changed := *v
	if b.Name != nil {
		if err := s.vpcs.checkName(c, *b.Name, v.ID); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		changed.Name = *b.Name
	}
	s.d.VPCs.Put(tx, &changed)
	return api.Reply{Body: s.vpcShape(&changed)}, target(s, c, &s.vpcs, &changed), nil
}

// deleteVPC deletes its security groups with it.
func (s *service) deleteVPC(c *api.Call, tx *directory.Tx, _ *api.None, v *vpc.VPC) (api.Reply, api.Target, error) {
	t := target(s, c, &s.vpcs, v)
	if instances, subnets := s.d.InstancesByVPC.Len(v.ID), s.d.SubnetsByVPC.Len(v.ID); instances+subnets > 0 {
		return api.Reply{}, t, fault.New(fault.Conflict, "vpc_not_empty", "The VPC %s still has %d instances and %d subnets; delete them first.", v.ID, instances, subnets)
	}
	for _, g := range s.d.SecurityGroupsByVPC.Get(v.ID) {
		s.d.SecurityGroups.Delete(tx, g)
	}
	s.d.VPCs.Delete(tx, v)
	return api.Reply{Status: http.StatusNoContent}, t, nil
}

func (s *service) vpcRef(v *vpc.VPC) reference {
	return reference{s.crn(nounVPC, s.region.Name, v.AccountID, v.ID), s.href("vpcs", v.ID), v.ID, v.Name, "vpc"}
}

func (s *service) aclRef(v *vpc.VPC) reference {
	id := v.NetworkACL.ID
	return reference{
		CRN:  s.Names.Of("is", s.region.Name, v.AccountID, "", "network-acl", id).String(),
		Href: s.href("network_acls", id), ID: id, Name: v.NetworkACL.Name,
	}
}

func (s *service) routingTableRef(v *vpc.VPC) reference {
	id := v.RoutingTable.ID
	return reference{
		CRN:  s.Names.Of("is", s.region.Name, v.AccountID, "", "vpc-routing-table", v.ID+"/"+id).String(),
		Href: s.href("vpcs", v.ID, "routing_tables", id), ID: id, Name: v.RoutingTable.Name, ResourceType: "routing_table",
	}
}

func (s *service) vpcShape(v *vpc.VPC) vpcShape {
	ref := s.vpcRef(v)
	return vpcShape{
		CreatedAt: stamp(v.CreatedAt), CRN: ref.CRN, CSESourceIPs: []any{},
		DefaultNetworkACL: s.aclRef(v), DefaultRoutingTable: s.routingTableRef(v), DefaultSecurityGroup: s.securityGroupRef(s.defaultGroup(v)),
		DNS:           dnsShape{Resolver: dnsResolver{Configuration: "default", Servers: []any{}, Type: "system"}},
		HealthReasons: []any{}, HealthState: "ok", Href: ref.Href, ID: v.ID, Name: v.Name,
		PublicAddressRanges: []any{}, ResourceGroup: s.groupRef(v.ResourceGroupID),
		ResourceType: ref.ResourceType, Status: available,
	}
}

// listPrefixes shows the block that each zone of the VPC has. The blocks are
// not objects, so their ids are made from the VPC's.
func (s *service) listPrefixes(c *api.Call, v *vpc.VPC) (api.Reply, error) {
	var rows []row
	subnets := s.d.SubnetsByVPC.Get(v.ID)
	for _, z := range s.region.Zones {
		if v.ManualPrefixes {
			break
		}
		shape := prefixShape{
			CIDR: z.Block.String(), CreatedAt: stamp(v.CreatedAt), IsDefault: true,
			ID:   s.region.Prefix + "-" + uuid.NewSHA1(uuid.NameSpaceOID, []byte(v.ID+z.Name)).String(),
			Name: "prefix-" + z.Name, Zone: s.zoneRef(z.Name),
		}
		shape.Href = s.href("vpcs", v.ID, "address_prefixes", shape.ID)
		for _, n := range subnets {
			shape.HasSubnets = shape.HasSubnets || n.Zone == z.Name
		}
		rows = append(rows, row{created: v.CreatedAt, id: z.Name, body: func() any { return shape }})
	}
	return s.pageAt(c, s.href("vpcs", v.ID, "address_prefixes"), "address_prefixes", nil, rows, everything)
}

type subnetBody struct {
	Name          *string      `json:"name"`
	ResourceGroup *identityRef `json:"resource_group"`
	VPC           *identityRef `json:"vpc"`
	Zone          *identityRef `json:"zone"`
	Count         *int         `json:"total_ipv4_address_count"`
	CIDR          *string      `json:"ipv4_cidr_block"`
	IPVersion     string       `json:"ip_version"`
	NetworkACL    *identityRef `json:"network_acl"`
	RoutingTable  *identityRef `json:"routing_table"`

	PublicGateway json.RawMessage `json:"public_gateway"` // refused
}

func (s *service) createSubnet(c *api.Call, tx *directory.Tx, b *subnetBody, groupID string) (api.Reply, api.Target, error) {
	n, err := s.newSubnet(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.Subnets.Put(tx, n)
	return api.Reply{Status: http.StatusCreated, Body: s.subnetShape(n)}, target(s, c, &s.subnets, n), nil
}

func (s *service) newSubnet(c *api.Call, b *subnetBody, groupID string) (*vpc.Subnet, error) {
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	name, err := s.subnets.newName(c, b.Name)
	if err != nil {
		return nil, err
	}
	vpcID, err := s.idOf(b.VPC, nounVPC, "vpc")
	if err != nil {
		return nil, err
	}
	v, err := s.vpcs.find(c, vpcID, "vpc")
	if err != nil {
		return nil, err
	}
	if err := c.Authorize(nounVPC.action("operate"), target(s, c, &s.vpcs, v).Resource); err != nil {
		return nil, err
	}
	if b.IPVersion != "" && b.IPVersion != "ipv4" {
		return nil, fault.New(fault.Invalid, "validation_enum", "The property ip_version must be ipv4.").On("ip_version")
	}
	if err := (properties{"public_gateway": b.PublicGateway}).refuse(map[string]string{"public_gateway": ""}); err != nil {
		return nil, err
	}
	if r := b.NetworkACL; r != nil && r.ID != v.NetworkACL.ID && r.CRN != s.aclRef(v).CRN && r.Href != s.aclRef(v).Href {
		return nil, api.NotFound("network ACL", r.ID).On("network_acl")
	}
	if r := b.RoutingTable; r != nil && r.ID != v.RoutingTable.ID && r.CRN != s.routingTableRef(v).CRN && r.Href != s.routingTableRef(v).Href {
		return nil, api.NotFound("routing table", r.ID).On("routing_table")
	}
	if err := quota(s.d.SubnetsByVPC.Len(v.ID), vpc.MaxSubnets, "The VPC "+v.ID, "subnets"); err != nil {
		return nil, err
	}
	zone, cidr, err := s.rangeFor(b, v)
	if err != nil {
		return nil, err
	}
	return &vpc.Subnet{
		ID: zonalID(zone), AccountID: c.Account(), VPCID: v.ID, Zone: zone.Name, CIDR: cidr,
		Name: name, ResourceGroupID: groupID,
	}, nil
}

// rangeFor finds the range of a new subnet: inside the block that its zone has in
// the VPC, overlapping no other subnet of the VPC (section 3.6).
func (s *service) rangeFor(b *subnetBody, v *vpc.VPC) (vpc.Zone, netip.Prefix, error) {
	fail := func(err error) (vpc.Zone, netip.Prefix, error) { return vpc.Zone{}, netip.Prefix{}, err }
	var taken []netip.Prefix
	for _, other := range s.d.SubnetsByVPC.Get(v.ID) {
		taken = append(taken, other.CIDR)
	}
	switch {
	case b.CIDR != nil && b.Count != nil:
		return fail(badField("ipv4_cidr_block", "Give either ipv4_cidr_block or total_ipv4_address_count, not both."))
	case b.CIDR == nil && b.Count == nil:
		return fail(missing("total_ipv4_address_count"))
	}

	if b.Count != nil {
		zone, err := s.zone(b.Zone, "zone")
		if err != nil {
			return fail(err)
		}
		if v.ManualPrefixes {
			return fail(fault.New(fault.Invalid, "no_default_address_prefix", "The VPC %s has no address prefix in zone %s.", v.ID, zone.Name).On("zone"))
		}
		cidr, err := vpc.AllocateSubnet(zone.Block, *b.Count, taken)
		if errors.Is(err, vpc.ErrNoSpace) {
			return fail(fault.New(fault.Conflict, "subnet_conflict", "The address prefix %s of zone %s has no room for %d more addresses.", zone.Block, zone.Name, *b.Count).On("total_ipv4_address_count"))
		}
		if err != nil {
			return fail(badField("total_ipv4_address_count", "The property total_ipv4_address_count must be a power of two, at least 8, and fit into the address prefix %s.", zone.Block))
		}
		return zone, cidr, nil
	}

	const field = "ipv4_cidr_block"
	cidr, err := netip.ParsePrefix(*b.CIDR)
	if err != nil || !cidr.Addr().Is4() || cidr.Masked() != cidr || cidr.Bits() < 9 || cidr.Bits() > 29 {
		return fail(badField(field, "The property %s must be a range in CIDR form from /9 to /29, beginning at its first address.", field))
	}
	zone, ok := s.zoneOf(cidr)
	if !ok || v.ManualPrefixes {
		return fail(fault.New(fault.Invalid, "not_in_address_prefix", "The range %s is not inside an address prefix of the VPC %s.", cidr, v.ID).On(field))
	}
	if b.Zone != nil {
		if given, err := s.zone(b.Zone, "zone"); err != nil {
			return fail(err)
		} else if given.Name != zone.Name {
			return fail(badField("zone", "The range %s is in zone %s, not in %s.", cidr, zone.Name, given.Name))
		}
	}
	for _, other := range taken {
		if cidr.Overlaps(other) {
			return fail(fault.New(fault.Conflict, "subnet_conflict", "The range %s overlaps the range %s of another subnet of the VPC.", cidr, other).On(field))
		}
	}
	return zone, cidr, nil
}

// zoneOf returns the zone whose block contains a range.
func (s *service) zoneOf(p netip.Prefix) (vpc.Zone, bool) {
	for _, z := range s.region.Zones {
		if z.Block.Contains(p.Addr()) && p.Bits() >= z.Block.Bits() {
			return z, true
		}
	}
	return vpc.Zone{}, false
}

func (s *service) updateSubnet(c *api.Call, tx *directory.Tx, b *namePatch, n *vpc.Subnet) (api.Reply, api.Target, error) {
	changed := *n
	if b.Name != nil {
		if err := s.subnets.checkName(c, *b.Name, n.ID); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		changed.Name = *b.Name
	}
	s.d.Subnets.Put(tx, &changed)
	return api.Reply{Body: s.subnetShape(&changed)}, target(s, c, &s.subnets, &changed), nil
}

func (s *service) deleteSubnet(c *api.Call, tx *directory.Tx, _ *api.None, n *vpc.Subnet) (api.Reply, api.Target, error) {
	t := target(s, c, &s.subnets, n)
	if used := len(s.takenAddresses(n.ID)); used > 0 {
		return api.Reply{}, t, fault.New(fault.Conflict, "subnet_not_empty", "The subnet %s still has %d network interfaces; delete their instances first.", n.ID, used)
	}
	s.d.Subnets.Delete(tx, n)
	return api.Reply{Status: http.StatusNoContent}, t, nil
}

// takenAddresses returns the addresses of all interfaces in a subnet.
func (s *service) takenAddresses(subnetID string) map[netip.Addr]bool {
	taken := map[netip.Addr]bool{}
	for _, on := range s.inSubnet(subnetID) {
		taken[on.nic.Address] = true
	}
	return taken
}

func (s *service) subnetFilters(n *vpc.Subnet) map[string]string {
	m := map[string]string{"zone.name": n.Zone}
	if v, ok := s.d.VPCs.Get(n.VPCID); ok {
		s.vpcFilters(m, v)
		m["routing_table.id"], m["routing_table.name"] = v.RoutingTable.ID, v.RoutingTable.Name
	}
	return m
}

func (s *service) subnetRef(n *vpc.Subnet) reference {
	return reference{s.crn(nounSubnet, n.Zone, n.AccountID, n.ID), s.href("subnets", n.ID), n.ID, n.Name, "subnet"}
}

func (s *service) subnetShape(n *vpc.Subnet) subnetShape {
	ref := s.subnetRef(n)
	v, ok := s.d.VPCs.Get(n.VPCID)
	if !ok {
		v = &vpc.VPC{ID: n.VPCID, AccountID: n.AccountID}
	}
	return subnetShape{
		AvailableAddresses: vpc.Usable(n.CIDR) - len(s.takenAddresses(n.ID)),
		CreatedAt:          stamp(n.CreatedAt), CRN: ref.CRN, Href: ref.Href, ID: n.ID, IPVersion: "ipv4",
		CIDR: n.CIDR.String(), Name: n.Name, NetworkACL: s.aclRef(v), ResourceGroup: s.groupRef(n.ResourceGroupID),
		ResourceType: ref.ResourceType, RoutingTable: s.routingTableRef(v), Status: available,
		TotalAddresses: 1 << (32 - n.CIDR.Bits()), VPC: s.vpcRef(v), Zone: s.zoneRef(n.Zone),
	}
}
