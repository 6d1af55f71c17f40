package vpcapi

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// wideProtocols is the version from which the word for ICMP, TCP and UDP is
// icmp_tcp_udp; before, it is all. The other words, any among them, are the same
// at every version (the VPC API's guide for the version 2025-12-09).
const (
	wideProtocols = "2025-12-09"
	wordAny       = "any"
	wordThree     = "icmp_tcp_udp"
	wordThreeOld  = "all"
)

func (s *service) securityGroupRoutes() {
	const (
		one     = "/v1/security_groups/{id}"
		rules   = one + "/rules"
		targets = one + "/targets"

		ruleCreated = "is.security-group.rule.create"
		ruleChanged = "is.security-group.rule.update"
		ruleDeleted = "is.security-group.rule.delete"
		attached    = "is.security-group.security-group.attach"
		detached    = "is.security-group.security-group.detach"
	)
	g := &s.groups
	read, update, operate := g.action("read"), g.action("update"), g.action("operate")

	s.list(nounSecurityGroup, []string{"resource_group.id", "vpc.id", "vpc.crn", "vpc.name"}, s.securityGroupRows)
	api.Read(s.Family, "GET "+one, read, s.loadSecurityGroup, s.showSecurityGroup)
	api.Change(s.Family, "POST /v1/security_groups", g.action("create"), g.action("create"),
		forCreate(s, nounSecurityGroup, func(b *groupBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createSecurityGroup)
	api.Change(s.Family, "PATCH "+one, update, update, changesGroup[namePatch](s), s.updateSecurityGroup)
	api.Change(s.Family, "DELETE "+one, g.action("delete"), g.action("delete"), changesGroup[api.None](s), s.deleteSecurityGroup)

	api.Read(s.Family, "GET "+rules, read, s.loadSecurityGroup, func(c *api.Call, g *vpc.SecurityGroup) (api.Reply, error) {
		return api.Reply{Body: map[string]any{"rules": s.ruleShapes(c, g)}}, nil
	})
	api.Read(s.Family, "GET "+rules+"/{rule}", read, s.loadSecurityGroup, s.getRule)
	api.Change(s.Family, "POST "+rules, update, ruleCreated, changesGroup[ruleBody](s), s.createRule)
	api.Change(s.Family, "PATCH "+rules+"/{rule}", update, ruleChanged, changesGroup[ruleBody](s), s.updateRule)
	api.Change(s.Family, "DELETE "+rules+"/{rule}", update, ruleDeleted, changesGroup[api.None](s), s.deleteRule)

	api.Read(s.Family, "GET "+targets, read, s.loadSecurityGroup, s.listTargets)
	api.Read(s.Family, "GET "+targets+"/{target}", read, s.loadSecurityGroup, s.getTarget)
	api.Change(s.Family, "PUT "+targets+"/{target}", operate, attached, changesGroup[api.None](s), s.addTarget)
	api.Change(s.Family, "DELETE "+targets+"/{target}", operate, detached, changesGroup[api.None](s), s.removeTarget)
}

// defaultGroup returns a VPC's default security group: the stored one, or the
// one that a VPC from before security groups has.
func (s *service) defaultGroup(v *vpc.VPC) *vpc.SecurityGroup {
	if g, ok := s.d.SecurityGroups.Get(v.SecurityGroup.ID); ok {
		return g
	}
	return vpc.DefaultGroup(v)
}

// groupsOf returns all security groups of a VPC, the default one first.
func (s *service) groupsOf(v *vpc.VPC) []*vpc.SecurityGroup {
	groups := []*vpc.SecurityGroup{s.defaultGroup(v)}
	for _, g := range s.d.SecurityGroupsByVPC.Get(v.ID) {
		if g.ID != v.SecurityGroup.ID {
			groups = append(groups, g)
		}
	}
	return groups
}

// findGroup returns a security group of the caller's account.
func (s *service) findGroup(c *api.Call, id, field string) (*vpc.SecurityGroup, error) {
	if _, stored := s.d.SecurityGroups.Get(id); !stored {
		for _, v := range s.d.VPCsByAccount.Get(c.Account()) {
			if v.SecurityGroup.ID == id {
				return vpc.DefaultGroup(v), nil
			}
		}
	}
	return s.groups.find(c, id, field)
}

func (s *service) loadSecurityGroup(c *api.Call) (*vpc.SecurityGroup, api.Target, error) {
	g, err := s.findGroup(c, c.R.PathValue("id"), "")
	if err != nil {
		return nil, api.Target{TypeURI: nounSecurityGroup.typeURI()}, err
	}
	return g, target(s, c, &s.groups, g), nil
}

func changesGroup[B any](s *service) func(*api.Call, *B) (*vpc.SecurityGroup, api.Target, error) {
	return func(c *api.Call, _ *B) (*vpc.SecurityGroup, api.Target, error) { return s.loadSecurityGroup(c) }
}

func (s *service) securityGroupRows(c *api.Call) []row {
	var rows []row
	for _, v := range s.d.VPCsByAccount.Get(c.Account()) {
		for _, g := range s.groupsOf(v) {
			rows = append(rows, row{
				resource: s.attributes(c, nounSecurityGroup, g.ID, g.ResourceGroupID), created: g.CreatedAt, id: g.ID,
				filters: s.vpcFilters(map[string]string{"resource_group.id": g.ResourceGroupID}, v),
				body:    func() any { return s.securityGroupShape(c, g) },
			})
		}
	}
	return rows
}

func (s *service) showSecurityGroup(c *api.Call, g *vpc.SecurityGroup) (api.Reply, error) {
	return api.Reply{Body: s.securityGroupShape(c, g)}, nil
}

type groupBody struct {
	Name          *string      `json:"name"`
	ResourceGroup *identityRef `json:"resource_group"`
	VPC           *identityRef `json:"vpc"`
	Rules         []ruleBody   `json:"rules"`
}

func (s *service) createSecurityGroup(c *api.Call, tx *directory.Tx, b *groupBody, groupID string) (api.Reply, api.Target, error) {
	g, err := s.newSecurityGroup(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.SecurityGroups.Put(tx, g)
	r := api.Reply{Status: http.StatusCreated, Body: s.securityGroupShape(c, g), ResponseData: map[string]any{"vpc": g.VPCID, "rules": len(g.Rules)}}
	return r, target(s, c, &s.groups, g), nil
}

func (s *service) newSecurityGroup(c *api.Call, b *groupBody, groupID string) (*vpc.SecurityGroup, error) {
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	id, err := s.idOf(b.VPC, nounVPC, "vpc")
	if err != nil {
		return nil, err
	}
	v, err := s.vpcs.find(c, id, "vpc")
	if err != nil {
		return nil, err
	}
	if err := c.Authorize(nounVPC.action("operate"), target(s, c, &s.vpcs, v).Resource); err != nil {
		return nil, err
	}
	if err := quota(len(s.groupsOf(v)), vpc.MaxSecurityGroups, "The VPC "+v.ID, "security groups"); err != nil {
		return nil, err
	}
	g := &vpc.SecurityGroup{ID: s.regionalID(), AccountID: c.Account(), VPCID: v.ID, ResourceGroupID: groupID, Name: randomName("group")}
	if b.Name != nil {
		g.Name = *b.Name
		if err := s.checkGroupName(v, g.Name, g.ID); err != nil {
			return nil, err
		}
	}
	for n := range b.Rules {
		r := vpc.SecurityGroupRule{ID: s.regionalID()}
		if err := s.addRule(g, &b.Rules[n], &r); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// checkGroupName checks that a security group may take a name, which is unique
// in its VPC; except is its own id.
func (s *service) checkGroupName(v *vpc.VPC, name, except string) error {
	if err := validName("name", name); err != nil {
		return err
	}
	for _, g := range s.groupsOf(v) {
		if g.Name == name && g.ID != except {
			return fault.New(fault.Conflict, s.groups.taken, "A security group with the name %q already exists in the VPC.", name).On("name")
		}
	}
	return nil
}

// updateSecurityGroup renames a group. The name of a default one stands with
// its VPC too.
func (s *service) updateSecurityGroup(c *api.Call, tx *directory.Tx, b *namePatch, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	changed := g.Clone()
	if b.Name != nil {
		v, err := s.vpcs.find(c, g.VPCID, "")
		if err != nil {
			return api.Reply{}, api.Target{}, err
		}
		if err := s.checkGroupName(v, *b.Name, g.ID); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		changed.Name = *b.Name
		if v.SecurityGroup.ID == g.ID {
			named := *v
			named.SecurityGroup.Name = changed.Name
			s.d.VPCs.Put(tx, &named)
		}
	}
	s.d.SecurityGroups.Put(tx, changed)
	return api.Reply{Body: s.securityGroupShape(c, changed)}, target(s, c, &s.groups, changed), nil
}

func (s *service) deleteSecurityGroup(c *api.Call, tx *directory.Tx, _ *api.None, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	t := target(s, c, &s.groups, g)
	inUse := func(format string, args ...any) (api.Reply, api.Target, error) {
		return api.Reply{}, t, fault.New(fault.Conflict, "security_group_in_use", format, args...)
	}
	v, err := s.vpcs.find(c, g.VPCID, "")
	if err != nil {
		return api.Reply{}, t, err
	}
	if v.SecurityGroup.ID == g.ID {
		return inUse("The security group %s is the default one of the VPC %s and is deleted with it.", g.ID, v.ID)
	}
	if n := len(s.members(g)); n > 0 {
		return inUse("The security group %s still has %d targets; remove them first.", g.ID, n)
	}
	for _, other := range s.groupsOf(v) {
		if other.ID != g.ID && slices.ContainsFunc(other.Rules, func(r vpc.SecurityGroupRule) bool { return r.RemoteGroup == g.ID }) {
			return inUse("A rule of the security group %s names the security group %s; delete the rule first.", other.ID, g.ID)
		}
	}
	s.d.SecurityGroups.Delete(tx, g)
	return api.Reply{Status: http.StatusNoContent}, t, nil
}

// ruleBody is a new rule or the merge patch of one. In a patch null takes a
// port, type or code away.
type ruleBody struct {
	Direction *string         `json:"direction"`
	Protocol  *string         `json:"protocol"`
	IPVersion *string         `json:"ip_version"`
	Name      *string         `json:"name"`
	PortMin   json.RawMessage `json:"port_min"`
	PortMax   json.RawMessage `json:"port_max"`
	Type      json.RawMessage `json:"type"`
	Code      json.RawMessage `json:"code"`
	Remote    *endpointBody   `json:"remote"`
	Local     *endpointBody   `json:"local"`
}

// endpointBody is an end of the packets of a rule.
type endpointBody struct {
	identityRef
	Address   string `json:"address"`
	CIDRBlock string `json:"cidr_block"`
}

// addRule adds a rule of which only the id is known yet to a group that is not
// stored yet or a copy.
func (s *service) addRule(g *vpc.SecurityGroup, b *ruleBody, r *vpc.SecurityGroupRule) error {
	if len(g.Rules) >= vpc.MaxRules {
		return fault.New(fault.Invalid, "over_quota", "A security group has at most %d rules; use ranges, or another group beside it.", vpc.MaxRules)
	}
	if b.Direction == nil {
		return missing("direction")
	}
	if b.Protocol == nil {
		return missing("protocol")
	}
	r.Name = randomName("rule")
	if err := s.applyRule(g, b, r); err != nil {
		return err
	}
	g.Rules = append(g.Rules, *r)
	return nil
}

// applyRule merges a body into a rule and checks what comes of it.
func (s *service) applyRule(g *vpc.SecurityGroup, b *ruleBody, r *vpc.SecurityGroupRule) error {
	if b.Name != nil {
		if err := validName("name", *b.Name); err != nil {
			return err
		}
		if slices.ContainsFunc(g.Rules, func(other vpc.SecurityGroupRule) bool { return other.Name == *b.Name && other.ID != r.ID }) {
			return fault.New(fault.Conflict, s.groups.taken, "A rule with the name %q already exists in the security group.", *b.Name).On("name")
		}
		r.Name = *b.Name
	}
	if b.Direction != nil {
		if *b.Direction != vpc.Inbound && *b.Direction != vpc.Outbound {
			return fault.New(fault.Invalid, "validation_enum", "The property direction must be inbound or outbound.").On("direction")
		}
		r.Direction = *b.Direction
	}
	if b.IPVersion != nil && *b.IPVersion != "ipv4" {
		return fault.New(fault.Invalid, "validation_enum", "The property ip_version must be ipv4.").On("ip_version")
	}
	if err := applyProtocol(b, r); err != nil {
		return err
	}
	if b.Local != nil {
		local, group, err := s.endpoint(g, b.Local, "local")
		if err != nil {
			return err
		}
		if local.IsValid() || group != "" {
			return badField("local", "A rule can only be about all local addresses; an interface has no more than one.")
		}
	}
	if b.Remote != nil {
		var err error
		if r.Remote, r.RemoteGroup, err = s.endpoint(g, b.Remote, "remote"); err != nil {
			return err
		}
	}
	return nil
}

// applyProtocol merges the protocol and what only some protocols have.
func applyProtocol(b *ruleBody, r *vpc.SecurityGroupRule) error {
	if b.Protocol != nil {
		protocol := *b.Protocol
		switch protocol {
		case wordAny:
			protocol = vpc.ProtocolAll
		case wordThree, wordThreeOld:
			protocol = vpc.ProtocolThree
		case vpc.ProtocolICMP, vpc.ProtocolTCP, vpc.ProtocolUDP:
		default:
			return fault.New(fault.Invalid, "validation_enum", "The property protocol must be any, icmp_tcp_udp, icmp, tcp or udp on this server.").On("protocol")
		}
		if r.Protocol != "" && r.Protocol != protocol {
			return badField("protocol", "The protocol of a rule cannot be changed; make another rule.")
		}
		r.Protocol = protocol
	}
	var portMin, portMax *int
	if r.PortMin != 0 {
		portMin, portMax = &r.PortMin, &r.PortMax
	}
	for _, number := range []struct {
		field     string
		raw       json.RawMessage
		into      **int
		low, high int
	}{
		{"port_min", b.PortMin, &portMin, 1, 65535}, {"port_max", b.PortMax, &portMax, 1, 65535},
		{"type", b.Type, &r.ICMPType, 0, 254}, {"code", b.Code, &r.ICMPCode, 0, 255},
	} {
		raw := bytes.TrimSpace(number.raw)
		if len(raw) == 0 {
			continue
		}
		var n *int
		if err := json.Unmarshal(raw, &n); err != nil || n != nil && (*n < number.low || *n > number.high) {
			return badField(number.field, "The property %s must be a number from %d to %d.", number.field, number.low, number.high)
		}
		*number.into = n
	}
	ports, icmp := r.Protocol == vpc.ProtocolTCP || r.Protocol == vpc.ProtocolUDP, r.Protocol == vpc.ProtocolICMP
	switch {
	case !ports && (portMin != nil || portMax != nil):
		return badField("port_min", "Only rules for tcp and udp have ports.")
	case !icmp && (r.ICMPType != nil || r.ICMPCode != nil):
		return badField("type", "Only rules for icmp have a type and a code.")
	case (portMin == nil) != (portMax == nil):
		return badField("port_min", "The properties port_min and port_max go together.")
	case portMin != nil && *portMin > *portMax:
		return badField("port_min", "The property port_min must not be larger than port_max.")
	case r.ICMPCode != nil && r.ICMPType == nil:
		return badField("code", "The property code needs the property type.")
	}
	if portMin == nil {
		r.PortMin, r.PortMax = 0, 0
		return nil
	}
	r.PortMin, r.PortMax = *portMin, *portMax
	return nil
}

// endpoint reads an end of a rule's packets: addresses, or the members of a
// security group of the same VPC. All addresses are neither.
func (s *service) endpoint(g *vpc.SecurityGroup, b *endpointBody, field string) (netip.Prefix, string, error) {
	given := 0
	for _, is := range []bool{b.Address != "", b.CIDRBlock != "", b.identityRef != identityRef{}} {
		if is {
			given++
		}
	}
	if given != 1 {
		return netip.Prefix{}, "", badField(field, "The property %s must have one of address, cidr_block and the id, crn, href or name of a security group.", field)
	}
	switch {
	case b.Address != "":
		a, err := netip.ParseAddr(b.Address)
		if err != nil || !a.Is4() {
			return netip.Prefix{}, "", badField(field+".address", "The property %s.address must be an IPv4 address.", field)
		}
		if a.IsUnspecified() {
			return netip.Prefix{}, "", nil
		}
		return netip.PrefixFrom(a, 32), "", nil
	case b.CIDRBlock != "":
		p, err := netip.ParsePrefix(b.CIDRBlock)
		if err != nil || !p.Addr().Is4() || p.Masked() != p {
			return netip.Prefix{}, "", badField(field+".cidr_block", "The property %s.cidr_block must be an IPv4 range in CIDR form, beginning at its first address.", field)
		}
		if p.Bits() == 0 {
			return netip.Prefix{}, "", nil
		}
		return p, "", nil
	}
	id := b.ID
	if b.Name == "" || b.ID != "" || b.CRN != "" || b.Href != "" {
		var err error
		if id, err = s.idOf(&b.identityRef, nounSecurityGroup, field); err != nil {
			return netip.Prefix{}, "", err
		}
	}
	if id == g.ID || id == "" && b.Name == g.Name { // perhaps not stored yet
		return netip.Prefix{}, g.ID, nil
	}
	if v, ok := s.d.VPCs.Get(g.VPCID); ok {
		for _, other := range s.groupsOf(v) {
			if other.ID == id || id == "" && other.Name == b.Name {
				return netip.Prefix{}, other.ID, nil
			}
		}
	}
	if id == "" {
		id = b.Name
	}
	return netip.Prefix{}, "", api.NotFound("security group of the VPC", id).On(field)
}

func (s *service) createRule(c *api.Call, tx *directory.Tx, b *ruleBody, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	changed, r := g.Clone(), vpc.SecurityGroupRule{ID: s.regionalID()}
	if err := s.addRule(changed, b, &r); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	return s.ruleChanged(c, tx, changed, &r, http.StatusCreated)
}

func (s *service) updateRule(c *api.Call, tx *directory.Tx, b *ruleBody, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	changed := g.Clone()
	r, err := ruleOf(c, changed)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	if err := s.applyRule(changed, b, r); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	return s.ruleChanged(c, tx, changed, r, http.StatusOK)
}

func (s *service) ruleChanged(c *api.Call, tx *directory.Tx, g *vpc.SecurityGroup, r *vpc.SecurityGroupRule, status int) (api.Reply, api.Target, error) {
	s.d.SecurityGroups.Put(tx, g)
	shape := s.ruleShape(c, g, r)
	return api.Reply{Status: status, Body: shape, ResponseData: map[string]any{"rule": shape}}, target(s, c, &s.groups, g), nil
}

func (s *service) deleteRule(c *api.Call, tx *directory.Tx, _ *api.None, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	r, err := ruleOf(c, g)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	changed := g.Clone()
	changed.Rules = slices.DeleteFunc(changed.Rules, func(other vpc.SecurityGroupRule) bool { return other.ID == r.ID })
	s.d.SecurityGroups.Put(tx, changed)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"rule": s.ruleShape(c, g, r)}}, target(s, c, &s.groups, g), nil
}

// ruleOf returns the rule of the path.
func ruleOf(c *api.Call, g *vpc.SecurityGroup) (*vpc.SecurityGroupRule, error) {
	id := c.R.PathValue("rule")
	if r, ok := g.Rule(id); ok {
		return r, nil
	}
	return nil, api.NotFound("rule of the security group", id).OnParameter("id", id)
}

func (s *service) getRule(c *api.Call, g *vpc.SecurityGroup) (api.Reply, error) {
	r, err := ruleOf(c, g)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: s.ruleShape(c, g, r)}, nil
}

// members returns the interfaces that are in a group.
func (s *service) members(g *vpc.SecurityGroup) []attached {
	var members []attached
	v, ok := s.d.VPCs.Get(g.VPCID)
	if !ok {
		return nil
	}
	for _, i := range s.d.InstancesByVPC.Get(g.VPCID) {
		for n := range i.Interfaces {
			if nic := &i.Interfaces[n]; slices.Contains(nic.GroupIDs(v), g.ID) {
				members = append(members, attached{i, nic})
			}
		}
	}
	return members
}

func (s *service) listTargets(c *api.Call, g *vpc.SecurityGroup) (api.Reply, error) {
	var rows []row
	for _, m := range s.members(g) {
		rows = append(rows, row{created: m.instance.CreatedAt, id: m.nic.ID, body: func() any { return s.memberShape(m) }})
	}
	return s.pageAt(c, s.href("security_groups", g.ID, "targets"), "targets", nil, rows, everything)
}

// everything is for lists that are part of what the caller may read.
func everything(map[string]string) bool { return true }

func (s *service) getTarget(c *api.Call, g *vpc.SecurityGroup) (api.Reply, error) {
	id := c.R.PathValue("target")
	for _, m := range s.members(g) {
		if m.known(id) {
			return api.Reply{Body: s.memberShape(m)}, nil
		}
	}
	return api.Reply{}, api.NotFound("target of the security group", id).OnParameter("id", id)
}

// known reports whether an id is that of the interface, or of the virtual
// network interface that it is.
func (a attached) known(id string) bool {
	return id != "" && (a.nic.ID == id || a.nic.VirtualID == id)
}

// targetOf finds the interface of the path, asks whether the caller may change
// its instance, and returns it in a copy of the instance.
func (s *service) targetOf(c *api.Call, g *vpc.SecurityGroup) (attached, *vpc.VPC, error) {
	on, err := s.interfaceWith(c, c.R.PathValue("target"))
	if err != nil {
		return attached{}, nil, err.OnParameter("id", c.R.PathValue("target"))
	}
	if err := c.Authorize(nounInstance.action("update"), target(s, c, &s.instances, on.instance).Resource); err != nil {
		return attached{}, nil, err
	}
	if err := alive(on.instance); err != nil {
		return attached{}, nil, err
	}
	if on.instance.VPCID != g.VPCID {
		return attached{}, nil, fault.New(fault.Invalid, "validation_failure", "The target %s is not in the VPC of the security group.", c.R.PathValue("target"))
	}
	v, vpcErr := s.vpcs.find(c, g.VPCID, "")
	return on.copied(), v, vpcErr
}

// copied returns the same interface in a copy of the instance.
func (a attached) copied() attached {
	i := a.instance.Clone()
	nic, _ := i.Interface(a.nic.ID)
	return attached{i, nic}
}

func (s *service) addTarget(c *api.Call, tx *directory.Tx, _ *api.None, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	on, v, err := s.targetOf(c, g)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	if ids := on.nic.GroupIDs(v); !slices.Contains(ids, g.ID) {
		if len(ids) >= vpc.MaxInterfaceGroups {
			return api.Reply{}, api.Target{}, fault.New(fault.Invalid, "over_quota", "A network interface is in at most %d security groups; remove it from one first.", vpc.MaxInterfaceGroups)
		}
		on.nic.SecurityGroupIDs = append(slices.Clone(ids), g.ID)
		s.d.Instances.Put(tx, on.instance)
	}
	return api.Reply{Body: s.memberShape(on), ResponseData: map[string]any{"target": on.nic.ID}}, target(s, c, &s.groups, g), nil
}

func (s *service) removeTarget(c *api.Call, tx *directory.Tx, _ *api.None, g *vpc.SecurityGroup) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	on, v, err := s.targetOf(c, g)
	if err != nil {
		return fail(err)
	}
	ids := on.nic.GroupIDs(v)
	switch {
	case !slices.Contains(ids, g.ID):
		id := c.R.PathValue("target")
		return fail(api.NotFound("target of the security group", id).OnParameter("id", id))
	case len(ids) == 1:
		return fail(invalidState("A network interface must be in a security group; add it to another one first."))
	}
	on.nic.SecurityGroupIDs = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == g.ID })
	s.d.Instances.Put(tx, on.instance)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"target": on.nic.ID}}, target(s, c, &s.groups, g), nil
}

// groupRefs are the security groups of an interface.
func (s *service) groupRefs(i *vpc.Instance, nic *vpc.Interface) []reference {
	refs := []reference{}
	v, ok := s.d.VPCs.Get(i.VPCID)
	if !ok {
		return refs
	}
	for _, id := range nic.GroupIDs(v) {
		if id == v.SecurityGroup.ID {
			refs = append(refs, s.securityGroupRef(s.defaultGroup(v)))
		} else if g, ok := s.d.SecurityGroups.Get(id); ok {
			refs = append(refs, s.securityGroupRef(g))
		}
	}
	return refs
}

func (s *service) securityGroupRef(g *vpc.SecurityGroup) reference {
	return reference{
		CRN:  s.crn(nounSecurityGroup, s.region.Name, g.AccountID, g.ID),
		Href: s.href("security_groups", g.ID), ID: g.ID, Name: g.Name,
	}
}

func (s *service) securityGroupShape(c *api.Call, g *vpc.SecurityGroup) securityGroupShape {
	ref := s.securityGroupRef(g)
	shape := securityGroupShape{
		CreatedAt: stamp(g.CreatedAt), CRN: ref.CRN, Href: ref.Href, ID: ref.ID, Name: ref.Name,
		ResourceGroup: s.groupRef(g.ResourceGroupID), Rules: s.ruleShapes(c, g), Targets: []memberShape{},
	}
	for _, m := range s.members(g) {
		shape.Targets = append(shape.Targets, s.memberShape(m))
	}
	if v, ok := s.d.VPCs.Get(g.VPCID); ok {
		shape.VPC = s.vpcRef(v)
	}
	return shape
}

// memberShape shows an interface as a member of a group: as the virtual network
// interface that it is, if it is one.
func (s *service) memberShape(m attached) memberShape {
	if m.nic.VirtualID == "" {
		return memberShape{Href: s.interfaceHref(m.instance, m.nic), ID: m.nic.ID, Name: m.nic.Name, ResourceType: nicType}
	}
	vni := s.virtualRef(m.instance, m.nic)
	ip, subnet := s.reservedIP(m.nic), s.interfaceRef(m.instance, m.nic).Subnet
	return memberShape{CRN: vni.CRN, Href: vni.Href, ID: vni.ID, Name: vni.Name, PrimaryIP: &ip, ResourceType: vni.ResourceType, Subnet: &subnet}
}

func (s *service) ruleShapes(c *api.Call, g *vpc.SecurityGroup) []ruleShape {
	shapes := make([]ruleShape, len(g.Rules))
	for n := range g.Rules {
		shapes[n] = s.ruleShape(c, g, &g.Rules[n])
	}
	return shapes
}

func (s *service) ruleShape(c *api.Call, g *vpc.SecurityGroup, r *vpc.SecurityGroupRule) ruleShape {
	anywhere := endShape{CIDRBlock: "0.0.0.0/0"}
	shape := ruleShape{
		Direction: r.Direction, Href: s.href("security_groups", g.ID, "rules", r.ID), ID: r.ID, IPVersion: "ipv4",
		Local: anywhere, Name: r.Name, Protocol: r.Protocol, Remote: anywhere, ResourceType: "security_group_rule",
		Code: r.ICMPCode, Type: r.ICMPType, PortMax: r.PortMax, PortMin: r.PortMin,
	}
	if shape.Name == "" { // of a rule from before rules had names
		shape.Name = "rule-" + r.ID[max(0, len(r.ID)-12):]
	}
	switch {
	case r.Protocol == vpc.ProtocolAll:
		shape.Protocol = wordAny
	case r.Protocol == vpc.ProtocolThree && c.R.URL.Query().Get("version") < wideProtocols:
		shape.Protocol = wordThreeOld
	case r.Protocol == vpc.ProtocolThree:
		shape.Protocol = wordThree
	}
	switch {
	case r.RemoteGroup != "":
		remote := g
		if r.RemoteGroup != g.ID {
			other, err := s.findGroup(c, r.RemoteGroup, "")
			if err != nil {
				// Nothing is let through for a group that is not there.
				shape.Remote = endShape{ID: r.RemoteGroup}
				break
			}
			remote = other
		}
		ref := s.securityGroupRef(remote)
		shape.Remote = endShape{CRN: ref.CRN, Href: ref.Href, ID: ref.ID, Name: ref.Name}
	case r.Remote.IsValid() && r.Remote.IsSingleIP():
		shape.Remote = endShape{Address: r.Remote.Addr().String()}
	case r.Remote.IsValid():
		shape.Remote = endShape{CIDRBlock: r.Remote.String()}
	}
	return shape
}
