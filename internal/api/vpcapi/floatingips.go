package vpcapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

func (s *service) floatingIPRoutes() {
	ips := &s.floatingIPs
	show := func(f *vpc.FloatingIP) any { return s.floatingIPShape(f) }
	s.list(nounFloatingIP, []string{"resource_group.id", "target.id", "target.crn", "target.name", "target.resource_type"},
		rowsOf(s, ips, s.floatingIPFilters, show))
	api.Read(s.Family, "GET /v1/floating_ips/{id}", ips.action("read"), fromPath(s, ips), shown(show, nil))
	api.Change(s.Family, "POST /v1/floating_ips", ips.action("create"), ips.action("create"),
		forCreate(s, nounFloatingIP, func(b *floatingIPBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.reserveFloatingIP)
	api.Change(s.Family, "PATCH /v1/floating_ips/{id}", ips.action("update"), ips.action("update"), forChange[floatingIPPatch](s, ips), s.updateFloatingIP)
	api.Change(s.Family, "DELETE /v1/floating_ips/{id}", ips.action("delete"), ips.action("delete"), forChange[api.None](s, ips), s.releaseFloatingIP)
}

type floatingIPBody struct {
	Name          *string      `json:"name"`
	ResourceGroup *identityRef `json:"resource_group"`
	Zone          *identityRef `json:"zone"`
	Target        *identityRef `json:"target"` // a network interface
}

// floatingIPPatch tells a target of null, which unbinds, from none.
type floatingIPPatch struct {
	Name   *string         `json:"name"`
	Target json.RawMessage `json:"target"`
}

func (s *service) reserveFloatingIP(c *api.Call, tx *directory.Tx, b *floatingIPBody, groupID string) (api.Reply, api.Target, error) {
	f, err := s.newFloatingIP(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.FloatingIPs.Put(tx, f)
	r := api.Reply{Status: http.StatusCreated, Body: s.floatingIPShape(f), ResponseData: map[string]any{"address": f.Address.String()}}
	return r, target(s, c, &s.floatingIPs, f), nil
}

func (s *service) newFloatingIP(c *api.Call, b *floatingIPBody, groupID string) (*vpc.FloatingIP, error) {
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	if err := quota(s.d.FloatingIPsByAccount.Len(c.Account()), vpc.MaxFloatingIPs, "The account", "floating IPs"); err != nil {
		return nil, err
	}
	name, err := s.floatingIPs.newName(c, b.Name)
	if err != nil {
		return nil, err
	}
	f := &vpc.FloatingIP{ID: s.regionalID(), AccountID: c.Account(), Name: name, ResourceGroupID: groupID}
	switch {
	case b.Zone != nil && b.Target != nil:
		return nil, badField("zone", "Give either zone or target, not both.")
	case b.Target != nil:
		i, nic, err := s.bindable(c, b.Target, "target", "")
		if err != nil {
			return nil, err
		}
		f.Zone, f.InstanceID, f.InterfaceID = i.Zone, i.ID, nic.ID
	default:
		zone, err := s.zone(b.Zone, "zone")
		if err != nil {
			return nil, err
		}
		f.Zone = zone.Name
	}
	// Floating addresses are of the whole installation, not of the account.
	taken := map[netip.Addr]bool{}
	for _, other := range s.d.FloatingIPs.All() {
		taken[other.Address] = true
	}
	f.Address, err = vpc.AllocateAddress(vpc.FloatingBlock, taken)
	if errors.Is(err, vpc.ErrNoSpace) {
		return nil, fault.New(fault.Invalid, "over_quota", "All floating addresses of the installation are in use; release one first.")
	}
	return f, err
}

// bindable finds the interface that a floating IP is to be bound to, asks
// whether the caller may operate its instance, and refuses one that has a
// floating IP already, other than the one with the id except.
func (s *service) bindable(c *api.Call, ref *identityRef, field, except string) (*vpc.Instance, *vpc.Interface, error) {
	id := ref.ID
	if id == "" && ref.CRN != "" {
		var err error
		if id, err = s.idOf(ref, nounVirtual, field); err != nil {
			return nil, nil, err
		}
	}
	if id == "" && ref.Href != "" {
		var ok bool
		if id, ok = lastSegment(ref.Href, "network_interfaces"); !ok {
			if id, ok = lastSegment(ref.Href, nounVirtual.plural); !ok {
				return nil, nil, badField(field+".href", "The property %s.href must end in /network_interfaces/ID or /virtual_network_interfaces/ID.", field)
			}
		}
	}
	if id == "" {
		return nil, nil, missing(field + ".id")
	}
	on, f := s.interfaceWith(c, id)
	if f != nil {
		return nil, nil, f.On(field)
	}
	i, nic := on.instance, on.nic
	if err := c.Authorize(nounInstance.action("operate"), target(s, c, &s.instances, i).Resource); err != nil {
		return nil, nil, err
	}
	if err := alive(i); err != nil {
		return nil, nil, err
	}
	if bound := s.boundTo(i.ID, nic.ID); len(bound) > 0 && bound[0].ID != except {
		return nil, nil, fault.New(fault.Conflict, "target_in_use", "The network interface %s already has the floating IP %s.", id, bound[0].Address).On(field)
	}
	return i, nic, nil
}

// boundTo returns the floating IPs of an interface.
func (s *service) boundTo(instanceID, interfaceID string) []*vpc.FloatingIP {
	var bound []*vpc.FloatingIP
	for _, f := range s.d.FloatingIPsByInstance.Get(instanceID) {
		if f.InterfaceID == interfaceID {
			bound = append(bound, f)
		}
	}
	return bound
}

func (s *service) updateFloatingIP(c *api.Call, tx *directory.Tx, b *floatingIPPatch, f *vpc.FloatingIP) (api.Reply, api.Target, error) {
	changed := *f
	if b.Name != nil {
		if err := s.floatingIPs.checkName(c, *b.Name, f.ID); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		changed.Name = *b.Name
	}
	if err := s.retarget(c, b.Target, f, &changed); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.FloatingIPs.Put(tx, &changed)
	return api.Reply{Body: s.floatingIPShape(&changed)}, target(s, c, &s.floatingIPs, &changed), nil
}

// retarget applies the target of a patch. Both instances are concerned: the
// one that loses the address and the one that gets it.
func (s *service) retarget(c *api.Call, raw json.RawMessage, f, changed *vpc.FloatingIP) error {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil
	}
	if old, ok := s.d.Instances.Get(f.InstanceID); ok {
		if err := c.Authorize(nounInstance.action("operate"), target(s, c, &s.instances, old).Resource); err != nil {
			return err
		}
	}
	changed.InstanceID, changed.InterfaceID = "", ""
	if bytes.Equal(raw, []byte("null")) {
		return nil
	}
	var ref identityRef
	if err := json.Unmarshal(raw, &ref); err != nil {
		return badField("target", "The property target must be null or an object with the id of a network interface.")
	}
	i, nic, err := s.bindable(c, &ref, "target", f.ID)
	if err != nil {
		return err
	}
	if err := sameZone(f, i); err != nil {
		return err.On("target")
	}
	changed.InstanceID, changed.InterfaceID = i.ID, nic.ID
	return nil
}

func sameZone(f *vpc.FloatingIP, i *vpc.Instance) *fault.Error {
	if f.Zone != i.Zone {
		return fault.New(fault.Invalid, "validation_failure", "The floating IP is in zone %s and the instance in %s; they must be in the same.", f.Zone, i.Zone)
	}
	return nil
}

// releaseFloatingIP gives the address back, bound or not.
func (s *service) releaseFloatingIP(c *api.Call, tx *directory.Tx, _ *api.None, f *vpc.FloatingIP) (api.Reply, api.Target, error) {
	s.d.FloatingIPs.Delete(tx, f)
	return api.Reply{Status: http.StatusNoContent}, target(s, c, &s.floatingIPs, f), nil
}

// bound returns the interface that a floating IP is bound to.
func (s *service) bound(f *vpc.FloatingIP) (attached, bool) {
	i, ok := s.d.Instances.Get(f.InstanceID)
	if !ok {
		return attached{}, false
	}
	nic, ok := i.Interface(f.InterfaceID)
	return attached{i, nic}, ok
}

func (s *service) floatingIPFilters(f *vpc.FloatingIP) map[string]string {
	on, ok := s.bound(f)
	if !ok {
		return nil
	}
	t := s.boundTarget(on)
	m := map[string]string{"target.id": t.ID, "target.name": t.Name, "target.resource_type": t.ResourceType}
	if t.CRN != "" {
		m["target.crn"] = t.CRN
	}
	return m
}

func (s *service) boundTarget(on attached) boundTarget {
	m := s.memberShape(on)
	return boundTarget{m.CRN, m.Href, m.ID, m.Name, s.reservedIP(on.nic), m.ResourceType, m.Subnet}
}

func (s *service) floatingIPRef(f *vpc.FloatingIP) floatingIPRef {
	return floatingIPRef{
		Address: f.Address.String(), CRN: s.crn(nounFloatingIP, f.Zone, f.AccountID, f.ID),
		Href: s.href("floating_ips", f.ID), ID: f.ID, Name: f.Name,
	}
}

func (s *service) floatingIPShape(f *vpc.FloatingIP) floatingIPShape {
	ref := s.floatingIPRef(f)
	shape := floatingIPShape{
		Address: ref.Address, CreatedAt: stamp(f.CreatedAt), CRN: ref.CRN, Href: ref.Href, ID: f.ID, Name: f.Name,
		ResourceGroup: s.groupRef(f.ResourceGroupID), Status: available, Zone: s.zoneRef(f.Zone),
	}
	if on, ok := s.bound(f); ok {
		t := s.boundTarget(on)
		shape.Target = &t
	}
	return shape
}
