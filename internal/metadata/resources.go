package metadata

import (
	"net/http"
	"slices"
	"strconv"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/vpc"
)

// metadataRoutes are what the instance can read about itself (reference section
// 2). References carry id, name and crn and no href.
func (s *Service) metadataRoutes() []route {
	var out []route
	get := func(path, action, what string, f func(*view) (any, error)) {
		out = append(out, route{
			method: http.MethodGet, path: "/metadata/v1" + path, operation: OperationRead,
			action: "is.metadata." + action, what: "read " + what + " of", credential: identityToken,
			body: maxBody, budget: readBudget, checks: []string{checkBearer, checkCaller},
			answer: func(r *request) (any, error) {
				if err := s.own(r); err != nil {
					return nil, err
				}
				return f(s.view(r))
			},
		})
	}
	one := func(path, action, what string, list func(*view) []object) {
		get(path+"/{id}", action, what, func(v *view) (any, error) {
			id := v.r.PathValue("id")
			items := list(v)
			if n := slices.IndexFunc(items, func(o object) bool { return o["id"] == id }); n >= 0 {
				return items[n], nil
			}
			return nil, fault.New(fault.NotFound, "not_found", "There is no such resource here.").OnParameter("id", activity.Clip(id))
		})
	}
	get("/instance", "instance.read", "instance", func(v *view) (any, error) { return v.instance(), nil })
	get("/instance/initialization", "instance.initialization", "initialization", func(v *view) (any, error) { return v.initialization(), nil })

	// Actions are those of section 5.1; where it has none, they are made alike.
	for _, c := range []struct {
		path, name, action, item, what string
		paged                          bool
		list                           func(*view) []object
	}{
		{"/instance", "network_interfaces", "instance-network-interface", "get", "network interfaces", false, (*view).interfaces},
		{"/instance", "network_attachments", "instance-network-attachment", "get", "network attachments", false, (*view).attachments},
		{"/instance", "cluster_network_attachments", "instance-cluster-network-attachment", "get", "cluster network attachments", false, none},
		{"/instance", "volume_attachments", "instance-volume-attachment", "get", "volume attachments", false, (*view).volumes},
		{"/instance", "software_attachments", "instance-software-attachment", "read", "software attachments", false, none},
		{"", "keys", "instance-key", "get", "keys", false, func(v *view) []object { return v.keys(true) }},
		{"", "placement_groups", "instance-placement-group", "get", "placement groups", true, none},
		{"", "virtual_network_interfaces", "instance-virtual-network-interface", "get", "virtual network interfaces", true, (*view).virtuals},
	} {
		get(c.path+"/"+c.name, c.action+".list", c.what, func(v *view) (any, error) {
			if c.paged {
				return v.page(c.name, c.list(v))
			}
			return object{c.name: c.list(v)}, nil
		})
		one(c.path+"/"+c.name, c.action+"."+c.item, c.what, c.list)
	}
	// One table of the documentation prints the path in the singular.
	one("/instance/volume_attachment", "instance-volume-attachment.get", "volume attachments", (*view).volumes)
	return out
}

type object map[string]any

func none(*view) []object { return []object{} }

// view shows an instance to itself.
type view struct {
	r      *request
	names  crn.Names
	region string
	p      *vpc.Placement
	i      *vpc.Instance // of the placement
}

func (s *Service) view(r *request) *view {
	return &view{r: r, names: s.cfg.Names, region: s.cfg.Region, p: r.placement, i: r.instance}
}

// Bounds on a page (reference section 3.3).
const (
	maxPage     = 100
	defaultPage = 50
)

// page shows a part of a list: limit items from the one whose id is start.
func (v *view) page(name string, items []object) (any, error) {
	query := v.r.URL.Query()
	limit := defaultPage
	if given, ok := query["limit"]; ok {
		n, err := strconv.Atoi(given[0])
		if err != nil || n < 1 || n > maxPage || len(given) > 1 {
			return nil, fault.New(fault.Invalid, "invalid_value", "The query parameter limit must be from 1 to %d.", maxPage).
				OnParameter("limit", activity.Clip(given[0]))
		}
		limit = n
	}
	from := 0
	if given, ok := query["start"]; ok {
		from = slices.IndexFunc(items, func(o object) bool { return o["id"] == given[0] })
		if from < 0 || len(given) > 1 {
			return nil, fault.New(fault.Invalid, "invalid_value", "The query parameter start is not one that a page has named.").
				OnParameter("start", activity.Clip(given[0]))
		}
	}
	base := "http://169.254.169.254"
	if v.i.Metadata.Protocol == "https" {
		base = "https://" + authority.ServerName
	}
	base += "/metadata/v1/" + name + "?limit=" + strconv.Itoa(limit)
	until := min(from+limit, len(items))
	out := object{
		"first": object{"href": base}, "limit": limit, "total_count": len(items), name: items[from:until],
	}
	if until < len(items) {
		out["next"] = object{"href": base + "&start=" + items[until]["id"].(string)}
	}
	return out, nil
}

func (v *view) instance() object {
	i := v.i
	profile, _ := vpc.ProfileNamed(i.Profile)
	architecture := v.p.Image.Architecture
	if architecture == "" {
		architecture = "amd64"
	}
	out := object{
		"availability":                object{"class": "standard"},
		"availability_policy":         object{"host_failure": "restart", "preemption": "stop"},
		"bandwidth":                   profile.Bandwidth,
		"cluster_network_attachments": []object{},
		"confidential_compute_mode":   "disabled",
		"created_at":                  stamp(i.CreatedAt),
		"crn":                         i.CRN,
		"disks":                       []object{},
		"enable_secure_boot":          false,
		"health_reasons":              []object{},
		"health_state":                "ok",
		"id":                          i.ID,
		"lifecycle_reasons":           []object{},
		"lifecycle_state":             "stable",
		"memory":                      profile.MemoryGiB,
		"metadata_service":            i.Metadata,
		"name":                        i.Name,
		"network_attachments":         v.refs(v.attachmentRef),
		"network_interfaces":          v.refs(v.interfaceRef),
		"numa_count":                  1,
		"profile":                     object{"name": i.Profile, "resource_type": "instance_profile"},
		"reservation_affinity":        object{"policy": "disabled", "pool": []object{}},
		"resource_group":              v.group(),
		"resource_type":               "instance",
		"software_attachments":        []object{},
		"startable":                   false, // it runs
		"status":                      i.Status,
		"status_reasons":              []object{},
		"threads_per_core":            2,
		"total_network_bandwidth":     profile.Bandwidth * 3 / 4,
		"total_volume_bandwidth":      profile.Bandwidth / 4,
		"vcpu": object{
			"architecture": architecture, "count": profile.VCPUs, "manufacturer": "", "percentage": 100,
			"burst": object{"limit": 100},
		},
		"volume_attachments":        []object{},
		"volume_bandwidth_qos_mode": "pooled",
		"vpc":                       typed(v.vpcRef(), "vpc"),
		"zone":                      object{"name": i.Zone},
	}
	// A machine that somebody else made has neither an image nor a volume here.
	if id := v.p.Image.ID; id != "" {
		image := v.names.Of("is", v.region, v.p.Image.AccountID, "", "image", id).String()
		out["image"] = object{"crn": image, "id": id, "name": v.p.Image.Name}
	}
	if b := i.BootVolume; b.ID != "" {
		boot := object{"id": b.AttachmentID, "name": b.AttachmentName, "volume": v.volumeRef()}
		out["boot_volume_attachment"], out["volume_attachments"] = boot, []object{boot}
	}
	if len(i.Interfaces) > 0 {
		nic := &i.Interfaces[0]
		out["primary_network_interface"] = v.interfaceRef(nic)
		if ref := v.attachmentRef(nic); ref != nil {
			out["primary_network_attachment"] = ref
		}
	}
	return out
}

// refs shows what there is of each network interface.
func (v *view) refs(ref func(*vpc.Interface) object) []object {
	out := []object{}
	for n := range v.i.Interfaces {
		if o := ref(&v.i.Interfaces[n]); o != nil {
			out = append(out, o)
		}
	}
	return out
}

func (v *view) initialization() object {
	out := object{"keys": v.keys(false)}
	if p := v.i.DefaultProfile; p != nil {
		out["default_trusted_profile"] = object{
			"auto_link": p.AutoLink,
			"target":    object{"crn": p.CRN, "id": p.ID, "resource_type": "trusted_profile"},
		}
	}
	if v.i.UserData != "" {
		out["user_data"] = v.i.UserData
	}
	return out
}

// keys shows those that the instance was made with. One that was deleted since
// is not shown; the guest keeps what it was given.
func (v *view) keys(full bool) []object {
	out := []object{}
	for _, id := range v.i.KeyIDs {
		n := slices.IndexFunc(v.p.Keys, func(k vpc.Key) bool { return k.ID == id })
		if n < 0 {
			continue
		}
		k := &v.p.Keys[n]
		o := object{
			"crn": v.crn(v.region, "key", k.ID), "fingerprint": k.Fingerprint,
			"id": k.ID, "name": k.Name, "resource_type": "key",
		}
		if full {
			o["created_at"], o["length"], o["public_key"], o["type"] = stamp(k.CreatedAt), k.Length, k.PublicKey, k.Type
		}
		out = append(out, o)
	}
	return out
}

func (v *view) address(nic *vpc.Interface) object {
	return object{"address": nic.Address, "id": nic.IPID, "name": nic.IPName, "resource_type": "subnet_reserved_ip"}
}

func (v *view) interfaceRef(nic *vpc.Interface) object {
	return object{
		"id": nic.ID, "name": nic.Name, "resource_type": "network_interface",
		// Scripts read either (reference section 2).
		"primary_ip": v.address(nic), "primary_ipv4_address": nic.Address,
		"subnet": typed(v.subnetRef(nic.SubnetID), "subnet"),
	}
}

func (v *view) interfaces() []object {
	return v.refs(func(nic *vpc.Interface) object {
		o := v.interfaceRef(nic)
		ips := []object{}
		for _, f := range v.p.FloatingIPs {
			if f.InterfaceID == nic.ID {
				ips = append(ips, object{"address": f.Address, "crn": v.crn(f.Zone, "floating-ip", f.ID), "id": f.ID, "name": f.Name})
			}
		}
		o["allow_ip_spoofing"], o["created_at"], o["floating_ips"] = false, stamp(v.i.CreatedAt), ips
		o["port_speed"], o["security_groups"], o["status"] = portSpeed, v.groups(nic), "available"
		o["type"] = v.rank(nic)
		return o
	})
}

// portSpeed of every interface, in Mbit/s.
const portSpeed = 1000

func (v *view) rank(nic *vpc.Interface) string {
	if nic.ID == v.i.Interfaces[0].ID {
		return "primary"
	}
	return "secondary"
}

func (v *view) groups(nic *vpc.Interface) []object {
	out := []object{}
	for _, g := range v.p.GroupsOf(nic) {
		out = append(out, object{"crn": v.crn(v.region, "security-group", g.ID), "id": g.ID, "name": g.Name})
	}
	return out
}

// attachmentRef shows an interface as the newer form of itself, or nil when the
// instance was not made with it.
func (v *view) attachmentRef(nic *vpc.Interface) object {
	if nic.AttachmentID == "" {
		return nil
	}
	return object{
		"id": nic.AttachmentID, "name": nic.Name, "resource_type": "instance_network_attachment",
		"primary_ip": v.address(nic), "subnet": typed(v.subnetRef(nic.SubnetID), "subnet"),
		"virtual_network_interface": v.virtualRef(nic),
	}
}

func (v *view) attachments() []object {
	return v.refs(func(nic *vpc.Interface) object {
		o := v.attachmentRef(nic)
		if o != nil {
			o["created_at"], o["lifecycle_state"], o["port_speed"], o["type"] = stamp(v.i.CreatedAt), "stable", portSpeed, v.rank(nic)
		}
		return o
	})
}

func (v *view) virtualRef(nic *vpc.Interface) object {
	name := nic.VirtualName
	if name == "" {
		name = nic.Name
	}
	return object{
		"crn": v.crn(v.i.Zone, "virtual-network-interface", nic.VirtualID), "id": nic.VirtualID, "name": name,
		"resource_type": "virtual_network_interface",
	}
}

func (v *view) virtuals() []object {
	return v.refs(func(nic *vpc.Interface) object {
		if nic.VirtualID == "" {
			return nil
		}
		o := v.virtualRef(nic)
		o["allow_ip_spoofing"], o["auto_delete"], o["enable_infrastructure_nat"] = false, true, true
		o["created_at"], o["lifecycle_state"], o["mac_address"] = stamp(v.i.CreatedAt), "stable", nic.MAC
		o["ips"], o["primary_ip"] = []object{v.address(nic)}, v.address(nic)
		o["protocol_state_filtering_mode"] = "auto"
		o["resource_group"], o["security_groups"] = v.group(), v.groups(nic)
		o["subnet"], o["vpc"], o["zone"] = typed(v.subnetRef(nic.SubnetID), "subnet"), typed(v.vpcRef(), "vpc"), object{"name": v.i.Zone}
		if nic.AttachmentID != "" {
			o["target"] = object{"id": nic.AttachmentID, "name": nic.Name, "resource_type": "instance_network_attachment"}
		}
		return o
	})
}

func (v *view) volumeRef() object {
	b := v.i.BootVolume
	return object{"crn": v.crn(v.i.Zone, "volume", b.ID), "id": b.ID, "name": b.Name}
}

func (v *view) volumes() []object {
	b := v.i.BootVolume
	if b.ID == "" {
		return []object{}
	}
	return []object{{
		"bandwidth": 1000, "created_at": stamp(v.i.CreatedAt), "delete_volume_on_instance_delete": true,
		"device": object{"id": b.AttachmentID + "-dev"}, "id": b.AttachmentID,
		"name": b.AttachmentName, "status": "attached", "type": "boot", "volume": v.volumeRef(),
	}}
}

func typed(ref attest.Named, resourceType string) object {
	return object{"crn": ref.CRN, "id": ref.ID, "name": ref.Name, "resource_type": resourceType}
}

func (v *view) group() object {
	return object{"id": v.i.ResourceGroupID, "name": v.p.ResourceGroup.Name}
}

func (v *view) crn(location, kind, id string) string {
	return v.names.Of("is", location, v.i.AccountID, "", kind, id).String()
}

func (v *view) vpcRef() attest.Named {
	return attest.Named{ID: v.i.VPCID, CRN: v.crn(v.region, "vpc", v.i.VPCID), Name: v.p.VPC.Name}
}

func (v *view) subnetRef(id string) attest.Named {
	ref := attest.Named{ID: id, CRN: v.crn(v.i.Zone, "subnet", id)}
	if s, ok := v.p.Subnet(id); ok {
		ref.Name = s.Name
	}
	return ref
}
