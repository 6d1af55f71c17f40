package vpcapi

import (
	"encoding/json"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// An instance's interfaces are made either as network interfaces or as network
// attachments, each with a virtual network interface. The second form is the
// newer way to say the same thing: an attachment has the id of the network
// interface that older clients see, and a virtual network interface lives as
// long as its instance (reference/instance-metadata-and-vpc.md section 3.6).

func (s *service) virtualRoutes() {
	const (
		attachments = "/v1/instances/{id}/network_attachments"
		one         = "/v1/virtual_network_interfaces/{id}"
		bound       = one + "/floating_ips"
	)
	instanceRead := nounInstance.action("read")
	read, update := nounVirtual.action("read"), nounVirtual.action("update")

	api.Read(s.Family, "GET "+attachments, instanceRead, fromPath(s, &s.instances), func(_ *api.Call, i *vpc.Instance) (api.Reply, error) {
		shapes := []attachmentShape{}
		for n := range i.Interfaces {
			if nic := &i.Interfaces[n]; nic.AttachmentID != "" {
				shapes = append(shapes, s.attachmentShape(i, nic))
			}
		}
		return api.Reply{Body: map[string]any{"network_attachments": shapes}}, nil
	})
	api.Read(s.Family, "GET "+attachments+"/{attachment}", instanceRead, s.loadAttachment, func(_ *api.Call, on attached) (api.Reply, error) {
		return api.Reply{Body: s.attachmentShape(on.instance, on.nic)}, nil
	})

	s.list(nounVirtual, []string{"resource_group.id"}, s.virtualRows)
	api.Read(s.Family, "GET "+one, read, s.loadVirtual, func(_ *api.Call, on attached) (api.Reply, error) {
		return api.Reply{Body: s.virtualShape(on.instance, on.nic)}, nil
	})
	api.Change(s.Family, "PATCH "+one, update, update, changesVirtual[virtualPatch](s), s.updateVirtual)
	api.Read(s.Family, "GET "+one+"/ips", read, s.loadVirtual, func(c *api.Call, on attached) (api.Reply, error) {
		rows := []row{{created: on.instance.CreatedAt, id: on.nic.IPID, body: func() any { return s.reservedIP(on.nic) }}}
		return s.pageAt(c, s.href("virtual_network_interfaces", on.nic.VirtualID, "ips"), "ips", nil, rows, everything)
	})
	api.Read(s.Family, "GET "+one+"/ips/{ip}", read, s.loadVirtual, func(c *api.Call, on attached) (api.Reply, error) {
		if id := c.R.PathValue("ip"); id != on.nic.IPID {
			return api.Reply{}, api.NotFound("reserved IP of this interface", id).OnParameter("id", id)
		}
		return api.Reply{Body: s.reservedIP(on.nic)}, nil
	})
	api.Read(s.Family, "GET "+bound, read, s.loadVirtual, s.listVirtualBound)
	api.Read(s.Family, "GET "+bound+"/{ip}", read, s.loadVirtual, func(c *api.Call, on attached) (api.Reply, error) {
		f, err := s.boundIP(c, on)
		if err != nil {
			return api.Reply{}, err
		}
		return api.Reply{Body: s.floatingIPRef(f)}, nil
	})
	api.Change(s.Family, "PUT "+bound+"/{ip}", update, "is.virtual-network-interface.floating-ip.attach", changesVirtual[api.None](s), s.bindVirtual)
	api.Change(s.Family, "DELETE "+bound+"/{ip}", update, "is.virtual-network-interface.floating-ip.detach", changesVirtual[api.None](s), s.releaseVirtual)
}

func (s *service) loadAttachment(c *api.Call) (attached, api.Target, error) {
	i, t, err := fromPath(s, &s.instances)(c)
	if err != nil {
		return attached{}, t, err
	}
	id := c.R.PathValue("attachment")
	nic, ok := i.Interface(id)
	if !ok || nic.AttachmentID != id {
		return attached{}, t, api.NotFound("network attachment", id).OnParameter("id", id)
	}
	t.Name, t.TypeURI = nic.Name, "is.instance/network-attachment"
	return attached{i, nic}, t, nil
}

// interfaceWith finds an interface of the caller's account by its own id or
// that of its virtual network interface.
func (s *service) interfaceWith(c *api.Call, id string) (attached, *fault.Error) {
	for _, i := range s.d.InstancesByAccount.Get(c.Account()) {
		for n := range i.Interfaces {
			if on := (attached{i, &i.Interfaces[n]}); on.known(id) {
				return on, nil
			}
		}
	}
	return attached{}, api.NotFound("network interface", id)
}

func (s *service) virtualTarget(c *api.Call, on attached) api.Target {
	return api.Target{
		Resource: s.attributes(c, nounVirtual, on.nic.VirtualID, on.instance.ResourceGroupID),
		CRN:      s.virtualRef(on.instance, on.nic).CRN, Name: on.nic.VirtualName, TypeURI: nounVirtual.typeURI(),
	}
}

func (s *service) loadVirtual(c *api.Call) (attached, api.Target, error) {
	id := c.R.PathValue("id")
	on, err := s.interfaceWith(c, id)
	if err != nil || on.nic.VirtualID != id {
		return attached{}, api.Target{TypeURI: nounVirtual.typeURI()}, api.NotFound("virtual network interface", id).OnParameter("id", id)
	}
	return on, s.virtualTarget(c, on), nil
}

func changesVirtual[B any](s *service) func(*api.Call, *B) (attached, api.Target, error) {
	return func(c *api.Call, _ *B) (attached, api.Target, error) { return s.loadVirtual(c) }
}

func (s *service) virtualRows(c *api.Call) []row {
	var rows []row
	for _, i := range s.d.InstancesByAccount.Get(c.Account()) {
		for n := range i.Interfaces {
			nic := &i.Interfaces[n]
			if nic.VirtualID == "" {
				continue
			}
			rows = append(rows, row{
				resource: s.attributes(c, nounVirtual, nic.VirtualID, i.ResourceGroupID), created: i.CreatedAt, id: nic.VirtualID,
				filters: map[string]string{"resource_group.id": i.ResourceGroupID},
				body:    func() any { return s.virtualShape(i, nic) },
			})
		}
	}
	return rows
}

// virtualPatch changes the name. The rest can only be said to be as it is.
type virtualPatch struct {
	Name *string `json:"name"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *virtualPatch) UnmarshalJSON(raw []byte) error {
	type plain virtualPatch
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

// fixedVirtual are the properties of virtual network interfaces that are always
// the same here, with what they are.
var fixedVirtual = map[string]string{
	"allow_ip_spoofing": "false", "auto_delete": "true", "enable_infrastructure_nat": "true", "protocol_state_filtering_mode": `"auto"`,
}

func (s *service) updateVirtual(c *api.Call, tx *directory.Tx, b *virtualPatch, on attached) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if err := b.all.refuse(fixedVirtual); err != nil {
		return fail(err)
	}
	if err := alive(on.instance); err != nil {
		return fail(err)
	}
	on = on.copied()
	if b.Name != nil {
		if err := s.checkVirtualName(c, *b.Name, on.nic.VirtualID, "name"); err != nil {
			return fail(err)
		}
		on.nic.VirtualName = *b.Name
	}
	s.d.Instances.Put(tx, on.instance)
	return api.Reply{Body: s.virtualShape(on.instance, on.nic)}, s.virtualTarget(c, on), nil
}

// checkVirtualName checks that a virtual network interface may take a name,
// which is unique in the account; except is its own id.
func (s *service) checkVirtualName(c *api.Call, name, except, field string) error {
	if err := validName(field, name); err != nil {
		return err
	}
	for _, i := range s.d.InstancesByAccount.Get(c.Account()) {
		for _, nic := range i.Interfaces {
			if nic.VirtualID != "" && nic.VirtualID != except && nic.VirtualName == name {
				return fault.New(fault.Conflict, "validation_unique_failed", "A virtual network interface with the name %q already exists.", name).On(field)
			}
		}
	}
	return nil
}

func (s *service) listVirtualBound(c *api.Call, on attached) (api.Reply, error) {
	var rows []row
	for _, f := range s.boundTo(on.instance.ID, on.nic.ID) {
		rows = append(rows, row{created: f.CreatedAt, id: f.ID, body: func() any { return s.floatingIPRef(f) }})
	}
	return s.pageAt(c, s.href("virtual_network_interfaces", on.nic.VirtualID, "floating_ips"), "floating_ips", nil, rows, everything)
}

// bindVirtual binds a floating IP. Unlike a network interface, a virtual one
// takes only an address that is not bound, and keeps the one that it has
// (section 3.6).
func (s *service) bindVirtual(c *api.Call, tx *directory.Tx, _ *api.None, on attached) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	f, err := s.floatingIPs.find(c, c.R.PathValue("ip"), "")
	if err != nil {
		return fail(err)
	}
	if err := c.Authorize(nounFloatingIP.action("operate"), target(s, c, &s.floatingIPs, f).Resource); err != nil {
		return fail(err)
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
	for _, other := range s.boundTo(on.instance.ID, on.nic.ID) {
		if other.ID != f.ID {
			return fail(fault.New(fault.Conflict, "target_in_use", "The virtual network interface %s already has the floating IP %s.", on.nic.VirtualID, other.Address))
		}
	}
	changed := *f
	changed.InstanceID, changed.InterfaceID = on.instance.ID, on.nic.ID
	s.d.FloatingIPs.Put(tx, &changed)
	return api.Reply{Body: s.floatingIPRef(&changed), ResponseData: map[string]any{"floating_ip": f.ID}}, s.virtualTarget(c, on), nil
}

func (s *service) releaseVirtual(c *api.Call, tx *directory.Tx, _ *api.None, on attached) (api.Reply, api.Target, error) {
	r, _, err := s.release(c, tx, nil, on)
	return r, s.virtualTarget(c, on), err
}

// attachmentBody is a new network attachment.
type attachmentBody struct {
	Name    *string      `json:"name"`
	Virtual *virtualBody `json:"virtual_network_interface"`
}

// virtualBody is the virtual network interface of a new attachment, or should
// not be: a reference to an existing one is refused.
type virtualBody struct {
	interfaceBody
	CRN           string       `json:"crn"`
	Href          string       `json:"href"`
	ID            string       `json:"id"`
	ResourceGroup *identityRef `json:"resource_group"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *virtualBody) UnmarshalJSON(raw []byte) error {
	type plain virtualBody
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

// asInterface returns the body of the network interface that an attachment is.
func (b *attachmentBody) asInterface(groupID, field string) (interfaceBody, error) {
	v := b.Virtual
	field += ".virtual_network_interface"
	switch {
	case v == nil:
		return interfaceBody{}, missing(field)
	case v.ID != "" || v.CRN != "" || v.Href != "":
		return interfaceBody{}, badField(field, "Virtual network interfaces live with their instances on this server; describe a new one instead of naming one.")
	case v.ResourceGroup != nil && v.ResourceGroup.ID != groupID:
		return interfaceBody{}, badField(field+".resource_group", "A virtual network interface is in the resource group of its instance.")
	}
	if err := v.all.refuse(fixedVirtual); err != nil {
		return interfaceBody{}, err
	}
	if err := v.all.refuse(map[string]string{"ips": ""}); err != nil {
		return interfaceBody{}, err
	}
	nic := v.interfaceBody
	nic.virtual, nic.virtualName, nic.Name = true, v.Name, b.Name
	return nic, nil
}

func (s *service) virtualRef(i *vpc.Instance, nic *vpc.Interface) reference {
	return reference{
		s.crn(nounVirtual, i.Zone, i.AccountID, nic.VirtualID), s.href("virtual_network_interfaces", nic.VirtualID),
		nic.VirtualID, nic.VirtualName, "virtual_network_interface",
	}
}

func (s *service) attachmentRef(i *vpc.Instance, nic *vpc.Interface) attachmentRef {
	return attachmentRef{
		Href: s.href("instances", i.ID, "network_attachments", nic.AttachmentID), ID: nic.AttachmentID, Name: nic.Name,
		PrimaryIP: s.reservedIP(nic), ResourceType: "instance_network_attachment",
		Subnet: s.interfaceRef(i, nic).Subnet, VirtualNetworkInterface: s.virtualRef(i, nic),
	}
}

func (s *service) attachmentShape(i *vpc.Instance, nic *vpc.Interface) attachmentShape {
	return attachmentShape{
		attachmentRef: s.attachmentRef(i, nic), CreatedAt: stamp(i.CreatedAt), LifecycleState: lifecycle(i), PortSpeed: portSpeed, Type: nicKind(i, nic),
	}
}

func (s *service) virtualShape(i *vpc.Instance, nic *vpc.Interface) virtualShape {
	ref, attachment := s.virtualRef(i, nic), s.attachmentRef(i, nic)
	shape := virtualShape{
		AutoDelete: true, CreatedAt: stamp(i.CreatedAt), CRN: ref.CRN, EnableInfrastructureNAT: true, Href: ref.Href, ID: ref.ID,
		IPs: []reservedIP{attachment.PrimaryIP}, LifecycleState: lifecycle(i), MACAddress: nic.MAC, Name: ref.Name,
		PrimaryIP: attachment.PrimaryIP, ProtocolStateFilteringMode: "auto", ResourceGroup: s.groupRef(i.ResourceGroupID),
		ResourceType: ref.ResourceType, SecurityGroups: s.groupRefs(i, nic), Subnet: attachment.Subnet,
		Target: memberShape{Href: attachment.Href, ID: attachment.ID, Name: attachment.Name, ResourceType: attachment.ResourceType},
		Zone:   s.zoneRef(i.Zone),
	}
	if v, ok := s.d.VPCs.Get(i.VPCID); ok {
		shape.VPC = s.vpcRef(v)
	}
	return shape
}

// interfacePatch changes the name of a network interface.
type interfacePatch struct {
	Name          *string `json:"name"`
	AllowSpoofing bool    `json:"allow_ip_spoofing"`
}

func (s *service) updateInterface(c *api.Call, tx *directory.Tx, b *interfacePatch, on attached) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if err := alive(on.instance); err != nil {
		return fail(err)
	}
	if b.AllowSpoofing {
		return fail(badField("allow_ip_spoofing", "IP spoofing cannot be allowed on this server."))
	}
	on = on.copied()
	if b.Name != nil {
		if err := validName("name", *b.Name); err != nil {
			return fail(err)
		}
		if other, exists := on.instance.Interface(*b.Name); exists && other.ID != on.nic.ID {
			return fail(fault.New(fault.Conflict, "validation_unique_failed", "Another network interface of the instance has the name %q.", *b.Name).On("name"))
		}
		on.nic.Name = *b.Name
	}
	s.d.Instances.Put(tx, on.instance)
	return api.Reply{Body: s.interfaceShape(on.instance, on.nic)}, s.bindingTarget(c, on), nil
}

func (s *service) listReserved(c *api.Call, n *vpc.Subnet) (api.Reply, error) {
	var rows []row
	for _, on := range s.inSubnet(n.ID) {
		rows = append(rows, row{created: on.instance.CreatedAt, id: on.nic.IPID, body: func() any { return s.reservedShape(on) }})
	}
	return s.pageAt(c, s.href("subnets", n.ID, "reserved_ips"), "reserved_ips", nil, rows, everything)
}

func (s *service) getReserved(c *api.Call, n *vpc.Subnet) (api.Reply, error) {
	id := c.R.PathValue("ip")
	for _, on := range s.inSubnet(n.ID) {
		if on.nic.IPID == id {
			return api.Reply{Body: s.reservedShape(on)}, nil
		}
	}
	return api.Reply{}, api.NotFound("reserved IP of the subnet", id).OnParameter("id", id)
}

// inSubnet returns the interfaces in a subnet.
func (s *service) inSubnet(id string) []attached {
	var found []attached
	for _, i := range s.d.InstancesBySubnet.Get(id) {
		for n := range i.Interfaces {
			if i.Interfaces[n].SubnetID == id {
				found = append(found, attached{i, &i.Interfaces[n]})
			}
		}
	}
	return found
}

func (s *service) reservedShape(on attached) reservedShape {
	return reservedShape{
		reservedIP: s.reservedIP(on.nic), AutoDelete: true, CreatedAt: stamp(on.instance.CreatedAt), LifecycleState: "stable",
		Owner: "user", Target: s.memberShape(on),
	}
}
