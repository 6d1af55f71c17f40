package vpcapi

import (
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/vpc"
)

// catalogRoutes are what an installation has from the start and nobody
// changes: its region and zones, hardware profiles, stock images.
func (s *service) catalogRoutes() {
	const reason = "the same for every account (section 3.4)"
	api.Open(s.Family, "GET /v1/regions", reason, s.listRegions)
	api.Open(s.Family, "GET /v1/regions/{region}", reason, s.getRegion)
	api.Open(s.Family, "GET /v1/regions/{region}/zones", reason, s.listZones)
	api.Open(s.Family, "GET /v1/regions/{region}/zones/{zone}", reason, s.getZone)
	api.Open(s.Family, "GET /v1/instance/profiles", reason, s.listProfiles)
	api.Open(s.Family, "GET /v1/instance/profiles/{name}", reason, s.getProfile)

	s.list(nounImage, []string{"resource_group.id", "name", "status", "visibility", "user_data_format", "remote.account.id"}, s.imageRows)
	api.Read(s.Family, "GET /v1/images/{id}", nounImage.action("read"), s.loadImage,
		func(c *api.Call, i vpc.Image) (api.Reply, error) { return api.Reply{Body: s.imageShape(c, i)}, nil })
	api.List(s.Family, "GET /v1/operating_systems", nounImage.action("list"), s.listSystems)
	api.Read(s.Family, "GET /v1/operating_systems/{name}", nounImage.action("read"), s.loadSystem,
		func(_ *api.Call, i vpc.Image) (api.Reply, error) { return api.Reply{Body: s.systemShape(i)}, nil })
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

func (s *service) listProfiles(*api.Call) (api.Reply, error) {
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

// imageAttributes are what access to a stock image is decided on. It is in no
// resource group of its own, so it counts as one of the group that it is used
// in; else nobody with access to one group could use an image at all.
func (s *service) imageAttributes(c *api.Call, id, groupID string) map[string]string {
	return s.attributes(c, nounImage, id, groupID)
}

func (s *service) image(id string) (vpc.Image, bool) {
	for _, i := range vpc.StockImages(s.region) {
		if i.ID == id {
			return i, true
		}
	}
	return vpc.Image{}, false
}

func (s *service) imageTarget(c *api.Call, i vpc.Image) api.Target {
	return api.Target{
		Resource: s.imageAttributes(c, i.ID, s.groupID(c, nil)),
		CRN:      s.imageRef(i).CRN, Name: i.Name, TypeURI: nounImage.typeURI(),
	}
}

func (s *service) loadImage(c *api.Call) (vpc.Image, api.Target, error) {
	id := c.R.PathValue("id")
	i, ok := s.image(id)
	if !ok {
		return vpc.Image{}, api.Target{}, api.NotFound("image", id).OnParameter("id", id)
	}
	return i, s.imageTarget(c, i), nil
}

func (s *service) imageRows(c *api.Call) []row {
	groupID := s.groupID(c, nil)
	var rows []row
	for _, i := range vpc.StockImages(s.region) {
		rows = append(rows, row{
			resource: s.imageAttributes(c, i.ID, groupID), created: stockSince, id: i.ID,
			filters: map[string]string{
				"resource_group.id": groupID, "name": i.Name,
				"status": available, "visibility": "public", "user_data_format": cloudInit,
			},
			body: func() any { return s.imageShape(c, i) },
		})
	}
	return rows
}

func (s *service) imageRef(i vpc.Image) reference {
	return reference{
		CRN: s.crn(nounImage, s.region.Name, "", i.ID), Href: s.href("images", i.ID),
		ID: i.ID, Name: i.Name, ResourceType: "image",
	}
}

func (s *service) imageShape(c *api.Call, i vpc.Image) imageShape {
	ref := s.imageRef(i)
	return imageShape{
		AllowedUse: allowedUse{APIVersion: "2024-06-23", BareMetalServer: "false", Instance: "true"},
		CreatedAt:  stamp(stockSince), CRN: ref.CRN, Encryption: "none", Href: ref.Href, ID: i.ID,
		MinimumProvisionedSize: bootVolumeGB, Name: i.Name, OperatingSystem: s.systemShape(i),
		ResourceGroup: s.groupRef(s.groupID(c, nil)), ResourceType: ref.ResourceType, Status: available,
		StatusReasons: []any{}, UserDataFormat: cloudInit, Visibility: "public",
	}
}

func (s *service) systemShape(i vpc.Image) systemShape {
	return systemShape{
		Architecture: i.Architecture, DisplayName: i.OSName + " " + i.Version, Family: i.OS,
		Href: s.href("operating_systems", i.OSName), Name: i.OSName,
		UserDataFormat: cloudInit, Vendor: i.Vendor, Version: i.Version,
	}
}

// loadSystem finds an operating system by name; it is decided on as the image
// that has it.
func (s *service) loadSystem(c *api.Call) (vpc.Image, api.Target, error) {
	name := c.R.PathValue("name")
	for _, i := range vpc.StockImages(s.region) {
		if i.OSName == name {
			return i, s.imageTarget(c, i), nil
		}
	}
	return vpc.Image{}, api.Target{}, api.NotFound("operating system", name).OnParameter("name", name)
}

func (s *service) listSystems(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	seen := map[string]bool{}
	var rows []row
	for _, r := range vpc.StockImages(s.region) {
		if seen[r.OSName] {
			continue
		}
		seen[r.OSName] = true
		rows = append(rows, row{
			resource: s.imageTarget(c, r).Resource, created: stockSince, id: r.OSName,
			body: func() any { return s.systemShape(r) },
		})
	}
	return s.page(c, "operating_systems", nil, rows, may)
}

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
		NetworkAttachmentCount:        countRange{Type: "range"},
		NetworkBandwidthMode:          fixed("pooled"),
		NetworkInterfaceCount:         countRange{Type: "range", Min: 1, Max: maxInterfaces},
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
