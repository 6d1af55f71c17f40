package vpcapi

import (
	"encoding/json"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// The only volumes are the boot volumes of instances. They come and go with
// their instances and are of one profile.

// volumeProfile is the profile of all volumes: three operations a second for
// each gigabyte, and never fewer than 3000.
const (
	volumeProfile = "general-purpose"
	minIOPS       = 3000
	iopsPerGB     = 3
	minVolumeGB   = 1
	maxVolumeGB   = 2048
	volumeMbps    = 393 // of a volume, at most
)

func (s *service) volumeRoutes() {
	read, update := nounVolume.action("read"), nounVolume.action("update")
	instanceRead := nounInstance.action("read")
	const reason = "the same for every account (section 3.4)"

	s.list(nounVolume, []string{
		"name", "attachment_state", "encryption", "operating_system.family", "operating_system.architecture", "tag", "zone.name",
	}, s.volumeRows)
	api.Read(s.Family, "GET /v1/volumes/{id}", read, s.loadVolume,
		func(_ *api.Call, i *vpc.Instance) (api.Reply, error) { return api.Reply{Body: s.volumeShape(i)}, nil })
	api.Change(s.Family, "PATCH /v1/volumes/{id}", update, update,
		func(c *api.Call, _ *volumePatch) (*vpc.Instance, api.Target, error) { return s.loadVolume(c) }, s.updateVolume)
	api.Open(s.Family, "GET /v1/volume/profiles", reason, s.listVolumeProfiles)
	api.Open(s.Family, "GET /v1/volume/profiles/{name}", reason, s.getVolumeProfile)

	api.Read(s.Family, "GET /v1/instances/{id}/volume_attachments", instanceRead, fromPath(s, &s.instances),
		func(_ *api.Call, i *vpc.Instance) (api.Reply, error) {
			shapes := []volumeAttachmentShape{}
			if hasVolume(i) {
				shapes = append(shapes, s.volumeAttachmentShape(i))
			}
			return api.Reply{Body: map[string]any{"volume_attachments": shapes}}, nil
		})
	api.Read(s.Family, "GET /v1/instances/{id}/volume_attachments/{attachment}", instanceRead, fromPath(s, &s.instances), s.getVolumeAttachment)
}

// hasVolume reports whether an instance has a boot volume: the disks of machines
// that somebody else made are theirs.
func hasVolume(i *vpc.Instance) bool { return i.BootVolume.ID != "" }

func (s *service) loadVolume(c *api.Call) (*vpc.Instance, api.Target, error) {
	id := c.R.PathValue("id")
	for _, i := range s.d.InstancesByAccount.Get(c.Account()) {
		if hasVolume(i) && i.BootVolume.ID == id {
			return i, s.volumeTarget(c, i), nil
		}
	}
	return nil, api.Target{TypeURI: nounVolume.typeURI()}, api.NotFound("volume", id).OnParameter("id", id)
}

func (s *service) volumeTarget(c *api.Call, i *vpc.Instance) api.Target {
	return api.Target{
		Resource: s.attributes(c, nounVolume, i.BootVolume.ID, i.ResourceGroupID), CRN: s.bootVolumeRef(i).CRN,
		Name: i.BootVolume.Name, TypeURI: nounVolume.typeURI(),
	}
}

func (s *service) volumeRows(c *api.Call) []row {
	var rows []row
	for _, i := range s.d.InstancesByAccount.Get(c.Account()) {
		if !hasVolume(i) {
			continue
		}
		m := map[string]string{"name": i.BootVolume.Name, "attachment_state": "attached", "encryption": "provider_managed", "zone.name": i.Zone}
		if image, ok := s.imageOf(i); ok {
			m["operating_system.family"], m["operating_system.architecture"] = image.OS, image.Architecture
		}
		rows = append(rows, row{
			resource: s.attributes(c, nounVolume, i.BootVolume.ID, i.ResourceGroupID), created: i.CreatedAt, id: i.BootVolume.ID,
			filters: m, body: func() any { return s.volumeShape(i) },
		})
	}
	return rows
}

type volumePatch struct {
	Name *string `json:"name"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *volumePatch) UnmarshalJSON(raw []byte) error {
	type plain volumePatch
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

func (s *service) updateVolume(c *api.Call, tx *directory.Tx, b *volumePatch, i *vpc.Instance) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if err := b.all.refuse(map[string]string{"allowed_use": "", "bandwidth": "", "capacity": "", "iops": "", "profile": "", "user_tags": ""}); err != nil {
		return fail(err)
	}
	if err := alive(i); err != nil {
		return fail(err)
	}
	changed := i.Clone()
	if b.Name != nil {
		if err := validName("name", *b.Name); err != nil {
			return fail(err)
		}
		for _, other := range s.d.InstancesByAccount.Get(c.Account()) {
			if other.ID != i.ID && other.BootVolume.Name == *b.Name {
				return fail(fault.New(fault.Conflict, "validation_unique_failed", "A volume with the name %q already exists.", *b.Name).On("name"))
			}
		}
		changed.BootVolume.Name = *b.Name
	}
	s.d.Instances.Put(tx, changed)
	return api.Reply{Body: s.volumeShape(changed)}, s.volumeTarget(c, changed), nil
}

// volumeGB is the size of an instance's boot volume: that of its image's disk,
// and not less than what the field's images have.
func (s *service) volumeGB(i *vpc.Instance) int {
	if image, ok := s.imageOf(i); ok {
		return provisionedGB(image)
	}
	return bootVolumeGB
}

// provisionedGB is the smallest boot volume that an image fits on.
func provisionedGB(i vpc.Image) int { return max(bootVolumeGB, vpc.GB(i.Disk)) }

func (s *service) volumeProfileRef() volumeProfileRef {
	return volumeProfileRef{s.href("volume", "profiles", volumeProfile), volumeProfile}
}

func (s *service) volumeShape(i *vpc.Instance) volumeShape {
	ref, gb := s.bootVolumeRef(i), s.volumeGB(i)
	attachment := s.bootAttachment(i)
	shape := volumeShape{
		Active: i.Status == vpc.Running, AdjustableCapacityStates: []string{}, AdjustableIOPSStates: []string{}, AttachmentState: "attached",
		Bandwidth: volumeMbps, Capacity: gb, CreatedAt: stamp(i.CreatedAt), CRN: ref.CRN, Encryption: "provider_managed",
		HealthReasons: []any{}, HealthState: "ok", Href: ref.Href, ID: ref.ID, IOPS: max(minIOPS, gb*iopsPerGB), Name: ref.Name,
		Profile: s.volumeProfileRef(), ResourceGroup: s.groupRef(i.ResourceGroupID), ResourceType: ref.ResourceType,
		Status: interfaceStatus(i), StatusReasons: []any{}, StorageGeneration: 1, UserTags: []string{}, Zone: s.zoneRef(i.Zone),
		VolumeAttachments: []volumeUseShape{{
			DeleteVolumeOnInstanceDelete: true, Device: attachment.Device, Href: attachment.Href, ID: attachment.ID, Name: attachment.Name, Type: "boot",
			Instance: reference{CRN: i.CRN, Href: s.href("instances", i.ID), ID: i.ID, Name: i.Name},
		}},
	}
	if shape.Status == vpc.Deleting {
		shape.Status = "pending_deletion"
	}
	if image, ok := s.imageOf(i); ok {
		system, source := s.systemShape(systemOf(image)), s.imageRef(image)
		shape.OperatingSystem, shape.SourceImage = &system, &source
	}
	return shape
}

func (s *service) listVolumeProfiles(c *api.Call) (api.Reply, error) {
	rows := []row{{created: time.Time{}, id: volumeProfile, body: func() any { return s.volumeProfileShape() }}}
	return s.pageAt(c, s.href("volume", "profiles"), "profiles", nil, rows, everything)
}

func (s *service) getVolumeProfile(c *api.Call) (api.Reply, error) {
	if name := c.R.PathValue("name"); name != volumeProfile {
		return api.Reply{}, api.NotFound("volume profile", name).OnParameter("name", name)
	}
	return api.Reply{Body: s.volumeProfileShape()}, nil
}

func (s *service) volumeProfileShape() volumeProfileShape {
	capacity := sizeRange{Default: bootVolumeGB, Max: maxVolumeGB, Min: minVolumeGB, Step: 1, Type: "range"}
	return volumeProfileShape{
		AdjustableCapacityStates: terms{Type: "enum", Values: []string{}}, AdjustableIOPSStates: terms{Type: "enum", Values: []string{}},
		Bandwidth: fixed(volumeMbps), BootCapacity: capacity, Capacity: capacity, Family: "tiered", Href: s.volumeProfileRef().Href,
		IOPS: typed{Type: "dependent_range"}, Name: volumeProfile, StorageGeneration: fixed(1),
	}
}

func (s *service) bootVolumeRef(i *vpc.Instance) reference {
	v := i.BootVolume
	return reference{s.crn(nounVolume, i.Zone, i.AccountID, v.ID), s.href("volumes", v.ID), v.ID, v.Name, "volume"}
}

func (s *service) bootAttachment(i *vpc.Instance) volumeAttachmentRef {
	v := i.BootVolume
	return volumeAttachmentRef{
		Device: deviceShape{v.AttachmentID}, Href: s.href("instances", i.ID, "volume_attachments", v.AttachmentID),
		ID: v.AttachmentID, Name: v.AttachmentName, Volume: s.bootVolumeRef(i),
	}
}

func (s *service) volumeAttachmentShape(i *vpc.Instance) volumeAttachmentShape {
	ref := s.bootAttachment(i)
	shape := volumeAttachmentShape{
		CreatedAt: stamp(i.CreatedAt), DeleteVolumeOnInstanceDelete: true, Device: ref.Device,
		Href: ref.Href, ID: ref.ID, Name: ref.Name, Status: "attached", Type: "boot", Volume: ref.Volume,
	}
	if p, ok := vpc.ProfileNamed(i.Profile); ok {
		shape.Bandwidth = volumeBandwidth(p)
	}
	return shape
}

func (s *service) getVolumeAttachment(c *api.Call, i *vpc.Instance) (api.Reply, error) {
	if id := c.R.PathValue("attachment"); !hasVolume(i) || id != i.BootVolume.AttachmentID {
		return api.Reply{}, api.NotFound("volume attachment", id).OnParameter("id", id)
	}
	return api.Reply{Body: s.volumeAttachmentShape(i)}, nil
}
