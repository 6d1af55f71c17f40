package vpcapi

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

func (s *service) interfaceRoutes() {
	const (
		interfaces = "/v1/instances/{id}/network_interfaces"
		bound      = interfaces + "/{nic}/floating_ips"
	)
	read, update := nounInstance.action("read"), nounInstance.action("update")

	api.Read(s.Family, "GET "+interfaces, read, fromPath(s, &s.instances), s.listInterfaces)
	api.Read(s.Family, "GET "+interfaces+"/{nic}", read, s.loadInterface,
		func(_ *api.Call, on attached) (api.Reply, error) {
			return api.Reply{Body: s.interfaceShape(on.instance, on.nic)}, nil
		})
	api.Change(s.Family, "PATCH "+interfaces+"/{nic}", update, "is.instance.network-interface.update",
		func(c *api.Call, _ *interfacePatch) (attached, api.Target, error) { return s.loadInterface(c) }, s.updateInterface)
	api.Read(s.Family, "GET "+interfaces+"/{nic}/ips", read, s.loadInterface, func(c *api.Call, on attached) (api.Reply, error) {
		rows := []row{{created: on.instance.CreatedAt, id: on.nic.IPID, body: func() any { return s.reservedShape(on) }}}
		return s.pageAt(c, s.interfaceHref(on.instance, on.nic)+"/ips", "ips", nil, rows, everything)
	})
	api.Read(s.Family, "GET "+interfaces+"/{nic}/ips/{ip}", read, s.loadInterface, func(c *api.Call, on attached) (api.Reply, error) {
		if id := c.R.PathValue("ip"); id != on.nic.IPID {
			return api.Reply{}, api.NotFound("reserved IP of this interface", id).OnParameter("id", id)
		}
		return api.Reply{Body: s.reservedShape(on)}, nil
	})
	api.Read(s.Family, "GET "+bound, read, s.loadInterface, s.listBound)
	api.Read(s.Family, "GET "+bound+"/{ip}", read, s.loadInterface, s.getBound)
	api.Change(s.Family, "PUT "+bound+"/{ip}", update, "is.instance.network-interface.attach", s.loadBinding, s.bind)
	api.Change(s.Family, "DELETE "+bound+"/{ip}", update, "is.instance.network-interface.detach", s.loadBinding, s.release)
}

// attached is an interface with its instance.
type attached struct {
	instance *vpc.Instance
	nic      *vpc.Interface
}

// loadInterface finds the interface of the path; what is asked about is its
// instance.
func (s *service) loadInterface(c *api.Call) (attached, api.Target, error) {
	i, t, err := fromPath(s, &s.instances)(c)
	if err != nil {
		return attached{}, t, err
	}
	id := c.R.PathValue("nic")
	nic, ok := i.Interface(id)
	if !ok || nic.ID != id {
		return attached{}, t, api.NotFound("network interface", id).OnParameter("network_interface_id", id)
	}
	t.Name, t.TypeURI = nic.Name, "is.instance/network-interface"
	return attached{i, nic}, t, nil
}

func (s *service) listInterfaces(_ *api.Call, i *vpc.Instance) (api.Reply, error) {
	shapes := make([]interfaceShape, len(i.Interfaces))
	for n := range i.Interfaces {
		shapes[n] = s.interfaceShape(i, &i.Interfaces[n])
	}
	return api.Reply{Body: map[string]any{"network_interfaces": shapes}}, nil
}

func (s *service) listBound(_ *api.Call, on attached) (api.Reply, error) {
	shapes := []floatingIPShape{}
	for _, f := range s.boundTo(on.instance.ID, on.nic.ID) {
		shapes = append(shapes, s.floatingIPShape(f))
	}
	return api.Reply{Body: map[string]any{"floating_ips": shapes}}, nil
}

func (s *service) getBound(c *api.Call, on attached) (api.Reply, error) {
	f, err := s.boundIP(c, on)
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: s.floatingIPShape(f)}, nil
}

// boundIP finds the floating IP of the path, which must be bound to the
// interface of the path.
func (s *service) boundIP(c *api.Call, on attached) (*vpc.FloatingIP, error) {
	f, err := s.floatingIPs.find(c, c.R.PathValue("ip"), "")
	if err != nil {
		return nil, err
	}
	if f.InterfaceID != on.nic.ID {
		return nil, api.NotFound("floating IP of this interface", f.ID).OnParameter("id", f.ID)
	}
	return f, nil
}

func (s *service) loadBinding(c *api.Call, _ *api.None) (attached, api.Target, error) {
	return s.loadInterface(c)
}

// bind binds a floating IP to an interface instead of the one that the
// interface has. One that is bound elsewhere is not taken away from there
// (section 3.6).
func (s *service) bind(c *api.Call, tx *directory.Tx, _ *api.None, on attached) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	f, err := s.floatingIPs.find(c, c.R.PathValue("ip"), "")
	if err != nil {
		return fail(err)
	}
	concerned := append(s.boundTo(on.instance.ID, on.nic.ID), f)
	for _, each := range concerned {
		if err := c.Authorize(nounFloatingIP.action("operate"), target(s, c, &s.floatingIPs, each).Resource); err != nil {
			return fail(err)
		}
	}
	if err := alive(on.instance); err != nil {
		return fail(err)
	}
	if err := sameZone(f, on.instance); err != nil {
		return fail(err)
	}
	if f.InterfaceID != "" && f.InterfaceID != on.nic.ID {
		return fail(fault.New(fault.Conflict, "floating_ip_in_use", "The floating IP %s is bound to another network interface; unbind it there first.", f.ID))
	}
	for _, other := range concerned {
		if other.ID != f.ID {
			s.unbind(tx, other)
		}
	}
	changed := *f
	changed.InstanceID, changed.InterfaceID = on.instance.ID, on.nic.ID
	s.d.FloatingIPs.Put(tx, &changed)
	r := api.Reply{Status: http.StatusCreated, Body: s.floatingIPShape(&changed), ResponseData: map[string]any{"floating_ip": f.ID}}
	return r, s.bindingTarget(c, on), nil
}

func (s *service) release(c *api.Call, tx *directory.Tx, _ *api.None, on attached) (api.Reply, api.Target, error) {
	f, err := s.boundIP(c, on)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	if err := c.Authorize(nounFloatingIP.action("operate"), target(s, c, &s.floatingIPs, f).Resource); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.unbind(tx, f)
	r := api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"floating_ip": f.ID}}
	return r, s.bindingTarget(c, on), nil
}

func (s *service) bindingTarget(c *api.Call, on attached) api.Target {
	t := target(s, c, &s.instances, on.instance)
	t.Name, t.TypeURI = on.nic.Name, "is.instance/network-interface"
	return t
}

func (s *service) unbind(tx *directory.Tx, f *vpc.FloatingIP) {
	free := *f
	free.InstanceID, free.InterfaceID = "", ""
	s.d.FloatingIPs.Put(tx, &free)
}

// connect gives a new instance its interfaces: one address each, free in the
// subnet. It runs inside the transaction that takes them, so no two instances
// get the same.
func (s *service) connect(c *api.Call, b *instanceBody, zone vpc.Zone, i *vpc.Instance) error {
	bodies, fields, err := b.interfaces(i.ResourceGroupID)
	if err != nil {
		return err
	}
	taken := map[string]map[netip.Addr]bool{}
	for n := range bodies {
		field := fields[n]
		subnet, err := s.subnetFor(c, b, &bodies[n], zone, i, field)
		if err != nil {
			return err
		}
		if taken[subnet.ID] == nil {
			taken[subnet.ID] = s.takenAddresses(subnet.ID)
		}
		nic, err := newInterface(&bodies[n], subnet, taken[subnet.ID], zone, n, field)
		if err != nil {
			return err
		}
		if _, exists := i.Interface(nic.Name); exists {
			return badField(field+".name", "Two network interfaces have the name %q.", nic.Name)
		}
		if nic.SecurityGroupIDs, err = s.groupsFor(c, &bodies[n], i, field); err != nil {
			return err
		}
		if bodies[n].virtual {
			if err := s.makeVirtual(c, &bodies[n], i, &nic, zone, field); err != nil {
				return err
			}
		}
		taken[subnet.ID][nic.Address] = true
		i.Interfaces = append(i.Interfaces, nic)
	}
	return nil
}

// interfaces returns the bodies of all network interfaces, the primary one first,
// and where each stands. They are given as network interfaces or as network
// attachments, not both.
func (b *instanceBody) interfaces(groupID string) (bodies []interfaceBody, fields []string, err error) {
	const primary, attachment = "primary_network_interface", "primary_network_attachment"
	switch {
	case b.PrimaryAttachment == nil && len(b.Attachments) > 0:
		return nil, nil, missing(attachment)
	case b.PrimaryAttachment != nil && (b.Primary != nil || len(b.Secondary) > 0):
		return nil, nil, badField(attachment, "Give either network interfaces or network attachments, not both.")
	case b.PrimaryAttachment != nil:
		for n, a := range append([]attachmentBody{*b.PrimaryAttachment}, b.Attachments...) {
			field := attachment
			if n > 0 {
				field = fmt.Sprintf("network_attachments[%d]", n-1)
			}
			nic, err := a.asInterface(groupID, field)
			if err != nil {
				return nil, nil, err
			}
			bodies, fields = append(bodies, nic), append(fields, field+".virtual_network_interface")
		}
	case b.Primary == nil:
		return nil, nil, missing(primary)
	default:
		bodies, fields = append([]interfaceBody{*b.Primary}, b.Secondary...), []string{primary}
		for n := range b.Secondary {
			fields = append(fields, fmt.Sprintf("network_interfaces[%d]", n))
		}
	}
	if len(bodies) > vpc.MaxInterfaces {
		return nil, nil, fault.New(fault.Invalid, "over_quota", "An instance has at most %d network interfaces; ask for fewer.", vpc.MaxInterfaces).On("network_interfaces")
	}
	return bodies, fields, nil
}

// groupsFor finds the security groups that an interface is to be in. Without
// any it is in the VPC's default one, which the caller must be allowed to use,
// too.
func (s *service) groupsFor(c *api.Call, ib *interfaceBody, i *vpc.Instance, field string) ([]string, error) {
	field += ".security_groups"
	v, err := s.vpcs.find(c, i.VPCID, "vpc")
	if err != nil {
		return nil, err
	}
	if len(ib.SecurityGroups) == 0 {
		return nil, c.Authorize(nounSecurityGroup.action("operate"), target(s, c, &s.groups, s.defaultGroup(v)).Resource)
	}
	if len(ib.SecurityGroups) > vpc.MaxInterfaceGroups {
		return nil, fault.New(fault.Invalid, "over_quota", "A network interface is in at most %d security groups; name fewer.", vpc.MaxInterfaceGroups).On(field)
	}
	var ids []string
	for n := range ib.SecurityGroups {
		id, err := s.idOf(&ib.SecurityGroups[n], nounSecurityGroup, field)
		if err != nil {
			return nil, err
		}
		g, err := s.findGroup(c, id, field)
		if err != nil {
			return nil, err
		}
		if g.VPCID != i.VPCID {
			return nil, badField(field, "The security group %s is not in the VPC %s.", id, i.VPCID)
		}
		if err := c.Authorize(nounSecurityGroup.action("operate"), target(s, c, &s.groups, g).Resource); err != nil {
			return nil, err
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// makeVirtual makes an interface one with an attachment and a virtual network
// interface.
func (s *service) makeVirtual(c *api.Call, ib *interfaceBody, i *vpc.Instance, nic *vpc.Interface, zone vpc.Zone, field string) error {
	if err := c.Authorize(nounVirtual.action("create"), s.attributes(c, nounVirtual, "", i.ResourceGroupID)); err != nil {
		return err
	}
	nic.AttachmentID, nic.VirtualID, nic.VirtualName = nic.ID, zonalID(zone), randomName("vni")
	if ib.virtualName == nil {
		return nil
	}
	nic.VirtualName = *ib.virtualName
	for _, other := range i.Interfaces {
		if other.VirtualName == nic.VirtualName {
			return badField(field+".name", "Two virtual network interfaces have the name %q.", nic.VirtualName)
		}
	}
	return s.checkVirtualName(c, nic.VirtualName, "", field+".name")
}

// subnetFor finds the subnet of an interface and checks that it agrees with
// the zone and the VPC of the instance, which the first subnet fixes, and that
// the caller may use all of them.
func (s *service) subnetFor(c *api.Call, b *instanceBody, ib *interfaceBody, zone vpc.Zone, i *vpc.Instance, field string) (*vpc.Subnet, error) {
	id, err := s.idOf(ib.Subnet, nounSubnet, field+".subnet")
	if err != nil {
		return nil, err
	}
	subnet, err := s.subnets.find(c, id, field+".subnet")
	if err != nil {
		return nil, err
	}
	if err := c.Authorize(nounSubnet.action("operate"), target(s, c, &s.subnets, subnet).Resource); err != nil {
		return nil, err
	}
	if subnet.Zone != zone.Name {
		return nil, badField(field+".subnet", "The subnet %s is in zone %s and the instance in %s.", subnet.ID, subnet.Zone, zone.Name)
	}
	if i.VPCID == "" {
		if err := s.chooseVPC(c, b, subnet, i); err != nil {
			return nil, err
		}
	}
	if subnet.VPCID != i.VPCID {
		return nil, badField(field+".subnet", "The subnet %s is not in the VPC %s.", subnet.ID, i.VPCID)
	}
	if ib.AllowSpoofing {
		return nil, badField(field+".allow_ip_spoofing", "IP spoofing cannot be allowed on this server.")
	}
	return subnet, nil
}

// chooseVPC takes the VPC of the subnet; the one in the body must agree.
func (s *service) chooseVPC(c *api.Call, b *instanceBody, subnet *vpc.Subnet, i *vpc.Instance) error {
	v, err := s.vpcs.find(c, subnet.VPCID, "vpc")
	if err != nil {
		return err
	}
	if b.VPC != nil {
		id, err := s.idOf(b.VPC, nounVPC, "vpc")
		if err != nil {
			return err
		}
		if v, err = s.vpcs.find(c, id, "vpc"); err != nil {
			return err
		}
	}
	i.VPCID = v.ID
	return c.Authorize(nounVPC.action("operate"), target(s, c, &s.vpcs, v).Resource)
}

func newInterface(b *interfaceBody, subnet *vpc.Subnet, taken map[netip.Addr]bool, zone vpc.Zone, n int, field string) (vpc.Interface, error) {
	nic := vpc.Interface{ID: zonalID(zone), Name: fmt.Sprintf("eth%d", n), SubnetID: subnet.ID, IPID: zonalID(zone), IPName: randomName("ip"), MAC: randomMAC()}
	wanted := b.Address
	if b.Name != nil {
		if err := validName(field+".name", *b.Name); err != nil {
			return nic, err
		}
		nic.Name = *b.Name
	}
	if ip := b.PrimaryIP; ip != nil {
		if ip.ID != "" {
			return nic, badField(field+".primary_ip.id", "Reserved IPs are not resources of their own on this server; give an address.")
		}
		if ip.Name != nil {
			if err := validName(field+".primary_ip.name", *ip.Name); err != nil {
				return nic, err
			}
			nic.IPName = *ip.Name
		}
		if ip.Address != "" {
			wanted = ip.Address
		}
	}
	if wanted != "" {
		var err error
		nic.Address, err = wantedAddress(wanted, subnet, taken, field+".primary_ip.address")
		return nic, err
	}
	var err error
	nic.Address, err = vpc.AllocateAddress(subnet.CIDR, taken)
	if errors.Is(err, vpc.ErrNoSpace) {
		return nic, fault.New(fault.Invalid, "subnet_out_of_ip_addresses", "The subnet %s has no free address.", subnet.ID).On(field + ".subnet")
	}
	return nic, err
}

// wantedAddress checks an address that the caller chose.
func wantedAddress(s string, subnet *vpc.Subnet, taken map[netip.Addr]bool, field string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !assignable(subnet.CIDR, a) {
		return netip.Addr{}, badField(field, "The address %q cannot be given out in the subnet %s.", s, subnet.CIDR)
	}
	if taken[a] {
		return netip.Addr{}, fault.New(fault.Conflict, "validation_unique_failed", "The address %s is in use.", a).On(field)
	}
	return a, nil
}

// assignable reports whether an address is in a range and not one of those
// that are kept back at its ends.
func assignable(p netip.Prefix, a netip.Addr) bool {
	if !p.Contains(a) {
		return false
	}
	first, this := p.Addr().As4(), a.As4()
	offset := int(binary.BigEndian.Uint32(this[:]) - binary.BigEndian.Uint32(first[:]))
	last := 1<<(32-p.Bits()) - 1
	return offset >= last-vpc.Usable(p) && offset < last
}

// randomMAC returns a locally administered unicast address.
func randomMAC() string {
	mac := net.HardwareAddr{0x02, 0x00, 0, 0, 0, 0}
	rand.Read(mac[2:]) // never fails, see crypto/rand
	return mac.String()
}

func (s *service) interfaceHref(i *vpc.Instance, nic *vpc.Interface) string {
	return s.href("instances", i.ID, "network_interfaces", nic.ID)
}

func (s *service) reservedIP(nic *vpc.Interface) reservedIP {
	return reservedIP{
		Address: nic.Address.String(), Href: s.href("subnets", nic.SubnetID, "reserved_ips", nic.IPID),
		ID: nic.IPID, Name: nic.IPName, ResourceType: "subnet_reserved_ip",
	}
}

func (s *service) interfaceRef(i *vpc.Instance, nic *vpc.Interface) interfaceRef {
	ref := interfaceRef{
		Href: s.interfaceHref(i, nic), ID: nic.ID, Name: nic.Name, PrimaryIP: s.reservedIP(nic), ResourceType: nicType,
	}
	if n, ok := s.d.Subnets.Get(nic.SubnetID); ok {
		ref.Subnet = s.subnetRef(n)
	}
	return ref
}

func (s *service) interfaceShape(i *vpc.Instance, nic *vpc.Interface) interfaceShape {
	ref := s.interfaceRef(i, nic)
	shape := interfaceShape{
		CreatedAt: stamp(i.CreatedAt), FloatingIPs: []floatingIPRef{}, Href: ref.Href, ID: nic.ID, Name: nic.Name,
		PortSpeed: portSpeed, PrimaryIP: ref.PrimaryIP, ResourceType: nicType, SecurityGroups: s.groupRefs(i, nic),
		Status: interfaceStatus(i), Subnet: ref.Subnet, Type: nicKind(i, nic),
	}
	for _, f := range s.boundTo(i.ID, nic.ID) {
		shape.FloatingIPs = append(shape.FloatingIPs, s.floatingIPRef(f))
	}
	return shape
}

func nicKind(i *vpc.Instance, nic *vpc.Interface) string {
	if i.Interfaces[0].ID == nic.ID {
		return "primary"
	}
	return "secondary"
}

func interfaceStatus(i *vpc.Instance) string {
	switch i.Status {
	case vpc.Pending, vpc.Deleting:
		return i.Status
	}
	return available
}
