package vpcapi

import (
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/vpc"
)

// catalogRoutes are what an installation has from the start and nobody
// changes: its region and zones and the hardware profiles.
func (s *service) catalogRoutes() {
	const reason = "the same for every account (section 3.4)"
	api.Open(s.Family, "GET /v1/regions", reason, s.listRegions)
	api.Open(s.Family, "GET /v1/regions/{region}", reason, s.getRegion)
	api.Open(s.Family, "GET /v1/regions/{region}/zones", reason, s.listZones)
	api.Open(s.Family, "GET /v1/regions/{region}/zones/{zone}", reason, s.getZone)
	api.Open(s.Family, "GET /v1/instance/profiles", reason, s.listProfiles)
	api.Open(s.Family, "GET /v1/instance/profiles/{name}", reason, s.getProfile)
}

func (s *service) regionRef() regionRef {
	return regionRef{s.href("regions", s.region.Name), s.region.Name}
}

func (s *service) zoneRef(name string) zoneRef {
	return zoneRef{s.href("regions", s.region.Name, "zones", name), name}
}

func (s *service) regionShape() regionShape {
	return regionShape{Endpoint: s.URL, Href: s.regionRef().Href, Name: s.region.Name, Status: available}
}

func (s *service) zoneShape(z vpc.Zone) zoneShape {
	return zoneShape{Href: s.zoneRef(z.Name).Href, Name: z.Name, Region: s.regionRef(), Status: available}
}

func (s *service) listRegions(*api.Call) (api.Reply, error) {
	return api.Reply{Body: map[string]any{"regions": []regionShape{s.regionShape()}}}, nil
}

func (s *service) checkRegion(c *api.Call) error {
	if name := c.R.PathValue("region"); name != s.region.Name {
		return api.NotFound("region", name).OnParameter("region_name", name)
	}
	return nil
}

func (s *service) getRegion(c *api.Call) (api.Reply, error) {
	return api.Reply{Body: s.regionShape()}, s.checkRegion(c)
}

func (s *service) listZones(c *api.Call) (api.Reply, error) {
	zones := make([]zoneShape, len(s.region.Zones))
	for i, z := range s.region.Zones {
		zones[i] = s.zoneShape(z)
	}
	return api.Reply{Body: map[string]any{"zones": zones}}, s.checkRegion(c)
}

func (s *service) getZone(c *api.Call) (api.Reply, error) {
	if err := s.checkRegion(c); err != nil {
		return api.Reply{}, err
	}
	name := c.R.PathValue("zone")
	z, ok := s.region.Zone(name)
	if !ok {
		return api.Reply{}, api.NotFound("zone", name).OnParameter("name", name)
	}
	return api.Reply{Body: s.zoneShape(z)}, nil
}

// zone finds the zone that a body names.
func (s *service) zone(ref *identityRef, field string) (vpc.Zone, error) {
	name, err := nameOf(ref, "zones", field)
	if err != nil {
		return vpc.Zone{}, err
	}
	z, ok := s.region.Zone(name)
	if !ok {
		return vpc.Zone{}, api.NotFound("zone", name).On(field)
	}
	return z, nil
}

// pagedProfiles is the version from which the hardware profiles come in pages
// (section 3.3).
const pagedProfiles = "2026-04-07"

func (s *service) listProfiles(c *api.Call) (api.Reply, error) {
	if c.R.URL.Query().Get("version") >= pagedProfiles {
		rows := make([]row, len(vpc.InstanceProfiles))
		for i, p := range vpc.InstanceProfiles {
			rows[i] = row{created: stockSince, id: p.Name, body: func() any { return s.profileShape(p) }}
		}
		return s.pageAt(c, s.href("instance", "profiles"), "profiles", nil, rows, everything)
	}
	profiles := make([]profileShape, len(vpc.InstanceProfiles))
	for i, p := range vpc.InstanceProfiles {
		profiles[i] = s.profileShape(p)
	}
	return api.Reply{Body: map[string]any{"profiles": profiles}}, nil
}

func (s *service) getProfile(c *api.Call) (api.Reply, error) {
	name := c.R.PathValue("name")
	p, ok := vpc.ProfileNamed(name)
	if !ok {
		return api.Reply{}, api.NotFound("instance profile", name).OnParameter("name", name)
	}
	return api.Reply{Body: s.profileShape(p)}, nil
}

// stockSince is the creation time that stock images show.
var stockSince = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (s *service) profileRef(name string) profileRef {
	return profileRef{s.href("instance", "profiles", name), name, "instance_profile"}
}

func (s *service) profileShape(p vpc.InstanceProfile) profileShape {
	ref := s.profileRef(p.Name)
	volume := volumeBandwidth(p)
	return profileShape{
		AvailabilityClass:             fixed("standard"),
		Bandwidth:                     fixed(p.Bandwidth),
		ClusterNetworkAttachmentCount: typed{Type: "dependent"},
		ConfidentialComputeModes:      enum("disabled"),
		Disks:                         []any{},
		Family:                        p.Family,
		Href:                          ref.Href,
		Memory:                        fixed(p.MemoryGiB),
		Name:                          p.Name,
		NetworkAttachmentCount:        countRange{Type: "range", Min: 1, Max: vpc.MaxInterfaces},
		NetworkBandwidthMode:          fixed("pooled"),
		NetworkInterfaceCount:         countRange{Type: "range", Min: 1, Max: vpc.MaxInterfaces},
		OSArchitecture:                enum("amd64"),
		PortSpeed:                     fixed(portSpeed),
		ReservationTerms:              terms{Type: "enum", Values: []string{}},
		ResourceType:                  ref.ResourceType,
		SecureBootModes:               enum(false),
		Status:                        "current",
		SupportedClusterNetworks:      []any{},
		TotalVolumeBandwidth:          fixed(volume),
		VCPUArchitecture:              fixed("amd64"),
		VCPUBurstLimit:                fixed(100),
		VCPUCount:                     fixed(p.VCPUs),
		VCPUManufacturer:              fixed(vcpuManufacturer),
		VCPUPercentage:                enum(100),
		VolumeBandwidthQoSModes:       enum("pooled"),
	}
}

// volumeBandwidth is the part of a profile's bandwidth that its volumes have,
// in Mbps. The rest is the network's.
func volumeBandwidth(p vpc.InstanceProfile) int { return p.Bandwidth / 4 }
