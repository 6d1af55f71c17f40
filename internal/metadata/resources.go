package metadata

import (
	"net/http"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// metadataRoutes registers what the instance can read about itself (reference
// section 2). References carry id, name and crn and no href.
func (h *handler) metadataRoutes(mux *http.ServeMux) {
	get := func(path string, f func(*request) (any, error)) {
		mux.HandleFunc("GET /metadata/v1"+path, h.route(false, h.authenticated(f)))
	}
	get("/instance", func(r *request) (any, error) { return h.instance(r.instance), nil })
	get("/instance/initialization", func(r *request) (any, error) { return h.initialization(r.instance), nil })
	get("/instance/network_interfaces", func(r *request) (any, error) {
		return object{"network_interfaces": h.interfaces(r.instance)}, nil
	})
	get("/instance/network_interfaces/{id}", h.oneOf(func(r *request) []object { return h.interfaces(r.instance) }))
	get("/instance/volume_attachments", func(r *request) (any, error) {
		return object{"volume_attachments": h.volumes(r.instance)}, nil
	})
	get("/instance/volume_attachments/{id}", h.oneOf(func(r *request) []object { return h.volumes(r.instance) }))
	get("/keys", func(r *request) (any, error) { return object{"keys": h.keys(r.instance, true)}, nil })
	get("/keys/{id}", h.oneOf(func(r *request) []object { return h.keys(r.instance, true) }))
	for _, path := range []string{"instance/network_attachments", "instance/cluster_network_attachments", "instance/software_attachments"} {
		get("/"+path, func(*request) (any, error) { return object{path[len("instance/"):]: []object{}}, nil })
	}
	for _, name := range []string{"placement_groups", "virtual_network_interfaces"} {
		get("/"+name, func(*request) (any, error) {
			return object{
				"first": object{"href": "http://169.254.169.254/metadata/v1/" + name + "?limit=50"},
				"limit": 50, "total_count": 0, name: []object{},
			}, nil
		})
	}
}

type object map[string]any

// oneOf shows the item of a list whose id is in the path.
func (h *handler) oneOf(list func(*request) []object) func(*request) (any, error) {
	return func(r *request) (any, error) {
		id := r.PathValue("id")
		for _, item := range list(r) {
			if item["id"] == id {
				return item, nil
			}
		}
		return nil, fault.New(fault.NotFound, "not_found", "There is no such resource here.").OnParameter("id", id)
	}
}

func (h *handler) instance(i *vpc.Instance) object {
	profile, _ := vpc.ProfileNamed(i.Profile)
	nics := make([]object, len(i.Interfaces))
	for n := range i.Interfaces {
		nics[n] = h.interfaceRef(i, &i.Interfaces[n])
	}
	boot := object{
		"id": i.BootVolume.AttachmentID, "name": i.BootVolume.AttachmentName,
		"volume": object{"crn": h.crn(i, i.Zone, "volume", i.BootVolume.ID), "id": i.BootVolume.ID, "name": i.BootVolume.Name},
	}
	return object{
		"availability":                object{"class": "standard"},
		"availability_policy":         object{"host_failure": "restart", "preemption": "stop"},
		"bandwidth":                   profile.Bandwidth,
		"boot_volume_attachment":      boot,
		"cluster_network_attachments": []object{},
		"confidential_compute_mode":   "disabled",
		"created_at":                  stamp(i.CreatedAt),
		"crn":                         i.CRN,
		"disks":                       []object{},
		"enable_secure_boot":          false,
		"health_reasons":              []object{},
		"health_state":                "ok",
		"id":                          i.ID,
		"image":                       h.imageRef(i),
		"lifecycle_reasons":           []object{},
		"lifecycle_state":             "stable",
		"memory":                      profile.MemoryGiB,
		"metadata_service":            i.Metadata,
		"name":                        i.Name,
		"network_attachments":         []object{},
		"network_interfaces":          nics,
		"numa_count":                  1,
		"primary_network_interface":   nics[0],
		"profile":                     object{"name": i.Profile, "resource_type": "instance_profile"},
		"reservation_affinity":        object{"policy": "disabled", "pool": []object{}},
		"resource_group":              object{"id": i.ResourceGroupID, "name": h.cfg.Directory.ResourceGroupName(i.ResourceGroupID)},
		"resource_type":               "instance",
		"software_attachments":        []object{},
		"startable":                   false, // it runs
		"status":                      i.Status,
		"status_reasons":              []object{},
		"threads_per_core":            2,
		"total_network_bandwidth":     profile.Bandwidth * 3 / 4,
		"total_volume_bandwidth":      profile.Bandwidth / 4,
		"vcpu": object{
			"architecture": "amd64", "count": profile.VCPUs, "manufacturer": "", "percentage": 100,
			"burst": object{"limit": 100},
		},
		"volume_attachments":        []object{boot},
		"volume_bandwidth_qos_mode": "pooled",
		"vpc":                       withType(h.vpcObject(i), "vpc"),
		"zone":                      object{"name": i.Zone},
	}
}

func (h *handler) initialization(i *vpc.Instance) object {
	out := object{"keys": h.keys(i, false)}
	if p := i.DefaultProfile; p != nil {
		out["default_trusted_profile"] = object{
			"auto_link": p.AutoLink,
			"target":    object{"crn": p.CRN, "id": p.ID, "resource_type": "trusted_profile"},
		}
	}
	if i.UserData != "" {
		out["user_data"] = i.UserData
	}
	return out
}

func (h *handler) keys(i *vpc.Instance, full bool) []object {
	out := []object{}
	for _, id := range i.KeyIDs {
		k, ok := h.cfg.Directory.Keys.Get(id)
		if !ok {
			continue // deleted since; the guest keeps what it was given
		}
		o := object{
			"crn": h.crn(i, h.cfg.Region, "key", k.ID), "fingerprint": k.Fingerprint,
			"id": k.ID, "name": k.Name, "resource_type": "key",
		}
		if full {
			o["created_at"], o["length"], o["public_key"], o["type"] = stamp(k.CreatedAt), k.Length, k.PublicKey, k.Type
		}
		out = append(out, o)
	}
	return out
}

func (h *handler) interfaceRef(i *vpc.Instance, nic *vpc.Interface) object {
	s := h.subnetRef(i, nic.SubnetID)
	return object{
		"id": nic.ID, "name": nic.Name, "resource_type": "network_interface",
		"primary_ip":           object{"address": nic.Address, "id": nic.IPID, "name": nic.IPName, "resource_type": "subnet_reserved_ip"},
		"primary_ipv4_address": nic.Address,
		"subnet":               object{"crn": s.CRN, "id": s.ID, "name": s.Name, "resource_type": "subnet"},
	}
}

func (h *handler) interfaces(i *vpc.Instance) []object {
	out := []object{}
	floating := h.cfg.Directory.FloatingIPsByInstance.Get(i.ID)
	for n := range i.Interfaces {
		nic := &i.Interfaces[n]
		o := h.interfaceRef(i, nic)
		ips := []object{}
		for _, f := range floating {
			if f.InterfaceID == nic.ID {
				ips = append(ips, object{"address": f.Address, "crn": h.crn(i, f.Zone, "floating-ip", f.ID), "id": f.ID, "name": f.Name})
			}
		}
		groups := []object{}
		if v, ok := h.cfg.Directory.VPCs.Get(i.VPCID); ok {
			groups = append(groups, object{
				"crn": h.crn(i, h.cfg.Region, "security-group", v.SecurityGroup.ID),
				"id":  v.SecurityGroup.ID, "name": v.SecurityGroup.Name,
			})
		}
		o["allow_ip_spoofing"], o["created_at"], o["floating_ips"] = false, stamp(i.CreatedAt), ips
		o["port_speed"], o["security_groups"], o["status"] = 1000, groups, "available"
		o["type"] = "secondary"
		if n == 0 {
			o["type"] = "primary"
		}
		out = append(out, o)
	}
	return out
}

func (h *handler) volumes(i *vpc.Instance) []object {
	return []object{{
		"bandwidth": 1000, "created_at": stamp(i.CreatedAt), "delete_volume_on_instance_delete": true,
		"device": object{"id": i.BootVolume.AttachmentID + "-dev"}, "id": i.BootVolume.AttachmentID,
		"name": i.BootVolume.AttachmentName, "status": "attached", "type": "boot",
		"volume": object{"crn": h.crn(i, i.Zone, "volume", i.BootVolume.ID), "id": i.BootVolume.ID, "name": i.BootVolume.Name},
	}}
}

func (h *handler) imageRef(i *vpc.Instance) object {
	name := ""
	if r, ok := vpc.RegionNamed(h.cfg.Region); ok {
		for _, img := range vpc.StockImages(r) {
			if img.ID == i.ImageID {
				name = img.Name
			}
		}
	}
	return object{"crn": h.cfg.Names.Of("is", h.cfg.Region, "", "", "image", i.ImageID).String(), "id": i.ImageID, "name": name}
}

func withType(o object, resourceType string) object {
	o["resource_type"] = resourceType
	return o
}

func (h *handler) vpcObject(i *vpc.Instance) object {
	ref := h.vpcRef(i)
	return object{"crn": ref.CRN, "id": ref.ID, "name": ref.Name}
}

func (h *handler) crn(i *vpc.Instance, location, kind, id string) string {
	return h.cfg.Names.Of("is", location, i.AccountID, "", kind, id).String()
}

func (h *handler) vpcRef(i *vpc.Instance) attest.Named {
	ref := attest.Named{ID: i.VPCID, CRN: h.crn(i, h.cfg.Region, "vpc", i.VPCID)}
	if v, ok := h.cfg.Directory.VPCs.Get(i.VPCID); ok {
		ref.Name = v.Name
	}
	return ref
}

func (h *handler) subnetRef(i *vpc.Instance, id string) attest.Named {
	ref := attest.Named{ID: id, CRN: h.crn(i, i.Zone, "subnet", id)}
	if s, ok := h.cfg.Directory.Subnets.Get(id); ok {
		ref.Name = s.Name
	}
	return ref
}
