package vpcapi

import (
	"cmp"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/vpc"
)

// linkAction is needed to let an instance put on a trusted profile
// (section 1.9).
const linkAction = "iam-identity.profile.linkToResource"

func (s *service) instanceRoutes() {
	instances := &s.instances
	show := func(i *vpc.Instance) any { return s.instanceShape(i) }
	tag := func(i *vpc.Instance) string { return i.Tag(i.ID) }

	s.list(nounInstance, instanceFilters, rowsOf(s, instances, s.instanceFilterValues, show))
	api.Read(s.Family, "GET /v1/instances/{id}", instances.action("read"), fromPath(s, instances), shown(show, tag))
	api.Read(s.Family, "GET /v1/instances/{id}/initialization", instances.action("read"), fromPath(s, instances),
		shown(func(i *vpc.Instance) any { return s.initializationShape(i) }, nil))
	api.Change(s.Family, "POST /v1/instances", instances.action("create"), instances.action("create"),
		forCreate(s, nounInstance, func(b *instanceBody) (*identityRef, *string) { return b.ResourceGroup, b.Name }), s.createInstance)
	api.Change(s.Family, "PATCH /v1/instances/{id}", instances.action("update"), instances.action("update"), forChange[instancePatch](s, instances), s.updateInstance)
	api.Change(s.Family, "DELETE /v1/instances/{id}", instances.action("delete"), instances.action("delete"), forChange[api.None](s, instances), s.deleteInstance)
	api.Change(s.Family, "POST /v1/instances/{id}/actions", instances.action("operate"), "is.instance.action.create", forChange[actionBody](s, instances), s.act)
	// Ours, for the local drivers. It changes nothing, but a way into an
	// instance is not handed out without a durable record.
	api.Change(s.Family, "GET /v1/instances/{id}/local_access", instances.action("console"), "is.instance.console.read", forChange[api.None](s, instances), s.localAccess)
}

// instanceFilters are the list's parameters (section 3.3). Nothing here is in
// a placement group, on a dedicated host and so on, so those let no row pass.
var instanceFilters = []string{
	"resource_group.id", "name", "vpc.id", "vpc.crn", "vpc.name", "availability.class", "reservation_affinity.policy",
	"placement_group.id", "placement_group.crn", "placement_group.name",
	"dedicated_host.id", "dedicated_host.crn", "dedicated_host.name",
	"reservation.id", "reservation.crn", "reservation.name",
	"cluster_network.id", "cluster_network.crn", "cluster_network.name",
	"instance_group_membership.instance_group.id", "instance_group_membership.instance_group.crn",
}

func (s *service) instanceFilterValues(i *vpc.Instance) map[string]string {
	m := map[string]string{"availability.class": "standard", "reservation_affinity.policy": "disabled"}
	if v, ok := s.d.VPCs.Get(i.VPCID); ok {
		s.vpcFilters(m, v)
	}
	return m
}

type instanceBody struct {
	Name          *string         `json:"name"`
	ResourceGroup *identityRef    `json:"resource_group"`
	VPC           *identityRef    `json:"vpc"`
	Zone          *identityRef    `json:"zone"`
	Profile       *identityRef    `json:"profile"`
	Image         *identityRef    `json:"image"`
	Keys          []identityRef   `json:"keys"`
	Primary       *interfaceBody  `json:"primary_network_interface"`
	Secondary     []interfaceBody `json:"network_interfaces"`

	PrimaryAttachment *attachmentBody  `json:"primary_network_attachment"`
	Attachments       []attachmentBody `json:"network_attachments"`

	Metadata       *metadataBody       `json:"metadata_service"`
	DefaultProfile *defaultProfileBody `json:"default_trusted_profile"`
	UserData       string              `json:"user_data"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *instanceBody) UnmarshalJSON(raw []byte) error {
	type plain instanceBody
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

// unsupported are properties of section 3.6 that are refused, with the value
// that says what is the case anyway.
var unsupported = map[string]string{
	"availability": `{"class":"standard"}`, "availability_policy": `{"host_failure":"restart"}`, "boot_volume_attachment": "", "catalog_offering": "",
	"cluster_network_attachments": "", "confidential_compute_mode": `"disabled"`, "enable_secure_boot": "false",
	"placement_target": "", "source_template": "",
	"total_volume_bandwidth": "", "vcpu": "", "volume_attachments": "", "volume_bandwidth_qos_mode": `"pooled"`,
	"reservation_affinity": `{"policy":"disabled"}`,
}

type interfaceBody struct {
	Name           *string        `json:"name"`
	Subnet         *identityRef   `json:"subnet"`
	PrimaryIP      *primaryIPBody `json:"primary_ip"`
	Address        string         `json:"primary_ipv4_address"` // the older form
	SecurityGroups []identityRef  `json:"security_groups"`
	AllowSpoofing  bool           `json:"allow_ip_spoofing"`

	virtual     bool    // it is a network attachment
	virtualName *string // of its virtual network interface
}

type primaryIPBody struct {
	ID      string  `json:"id"`
	Address string  `json:"address"`
	Name    *string `json:"name"`
}

type metadataBody struct {
	Enabled  *bool   `json:"enabled"`
	Protocol *string `json:"protocol"`
	HopLimit *int    `json:"response_hop_limit"`
}

type defaultProfileBody struct {
	AutoLink *bool        `json:"auto_link"`
	Target   *identityRef `json:"target"`
}

// apply checks the settings of the metadata service and merges them
// (section 1.8).
func (b *metadataBody) apply(m *vpc.MetadataService) error {
	if b == nil {
		return nil
	}
	if b.Enabled != nil {
		m.Enabled = *b.Enabled
	}
	if b.Protocol != nil {
		const field = "metadata_service.protocol"
		switch *b.Protocol {
		case "http", "https":
			m.Protocol = *b.Protocol
		default:
			return fault.New(fault.Invalid, "validation_enum", "The property %s must be http or https.", field).On(field)
		}
	}
	if b.HopLimit != nil {
		if *b.HopLimit < 1 || *b.HopLimit > 64 {
			const field = "metadata_service.response_hop_limit"
			return badField(field, "The property %s must be a number from 1 to 64.", field)
		}
		m.ResponseHopLimit = *b.HopLimit
	}
	return nil
}

func (s *service) createInstance(c *api.Call, tx *directory.Tx, b *instanceBody, groupID string) (api.Reply, api.Target, error) {
	i, err := s.newInstance(c, b, groupID)
	if err != nil {
		return api.Reply{}, api.Target{}, err
	}
	recorded := map[string]any{"zone": i.Zone, "image": i.ImageID, "metadata_service_enabled": i.Metadata.Enabled}
	if p := i.DefaultProfile; p != nil {
		recorded["default_trusted_profile"] = p.ID
		if p.AutoLink {
			link, err := s.newLink(c, i)
			if err != nil {
				return api.Reply{}, api.Target{}, err
			}
			s.d.Links.Put(tx, link)
			recorded["link"] = link.ID
		}
	}
	s.d.Instances.Put(tx, i)
	r := api.Reply{Status: http.StatusCreated, Body: s.instanceShape(i), ETag: i.Tag(i.ID), ResponseData: recorded}
	return r, target(s, c, &s.instances, i), nil
}

// newInstance checks the body against the account's objects and the caller's
// rights on them, and places the instance.
func (s *service) newInstance(c *api.Call, b *instanceBody, groupID string) (*vpc.Instance, error) {
	if err := s.checkGroup(c, groupID); err != nil {
		return nil, err
	}
	if err := quota(s.d.InstancesByAccount.Len(c.Account()), vpc.MaxInstances, "The account", "instances"); err != nil {
		return nil, err
	}
	if err := b.all.refuse(unsupported); err != nil {
		return nil, err
	}
	zone, err := s.zone(b.Zone, "zone")
	if err != nil {
		return nil, err
	}
	i := &vpc.Instance{
		ID: instanceID(zone), AccountID: c.Account(), Zone: zone.Name, ResourceGroupID: groupID,
		Status: vpc.Pending, UserData: b.UserData,
		Metadata: vpc.MetadataService{Protocol: "http", ResponseHopLimit: 1},
		BootVolume: vpc.Volume{
			ID: s.regionalID(), Name: randomName("volume"),
			AttachmentID: zonalID(zone), AttachmentName: randomName("attachment"),
		},
	}
	i.CRN = s.crn(nounInstance, zone.Name, i.AccountID, i.ID)
	if i.Name, err = s.instances.newName(c, b.Name); err != nil {
		return nil, err
	}
	if len(b.UserData) > vpc.MaxUserData {
		return nil, badField("user_data", "The property user_data must have at most %d bytes.", vpc.MaxUserData)
	}
	if err := b.Metadata.apply(&i.Metadata); err != nil {
		return nil, err
	}
	profile, err := hardwareProfile(b.Profile)
	if err != nil {
		return nil, err
	}
	i.Profile = profile.Name
	image, err := s.chooseImage(c, b, i)
	if err != nil {
		return nil, err
	}
	if err := s.chooseKeys(c, b, i); err != nil {
		return nil, err
	}
	if err := s.connect(c, b, zone, i); err != nil {
		return nil, err
	}
	if err := c.Authorize(nounVolume.action("create"), s.attributes(c, nounVolume, "", groupID)); err != nil {
		return nil, err
	}
	if b.DefaultProfile != nil {
		if i.DefaultProfile, err = s.defaultProfile(c, b.DefaultProfile); err != nil {
			return nil, err
		}
	}
	if s.opts.Place != nil {
		i.HostID, i.StatusReason = s.opts.Place(i.Zone, profile, *image)
	}
	return i, nil
}

func hardwareProfile(ref *identityRef) (vpc.InstanceProfile, error) {
	if ref == nil {
		return vpc.InstanceProfiles[0], nil
	}
	name, err := nameOf(ref, "profiles", "profile")
	if err != nil {
		return vpc.InstanceProfile{}, err
	}
	p, ok := vpc.ProfileNamed(name)
	if !ok {
		return vpc.InstanceProfile{}, api.NotFound("instance profile", name).On("profile")
	}
	return p, nil
}

func (s *service) chooseImage(c *api.Call, b *instanceBody, i *vpc.Instance) (*vpc.Image, error) {
	id, err := s.idOf(b.Image, nounImage, "image")
	if err != nil {
		return nil, err
	}
	image, err := s.findImage(c, id, "image")
	if err != nil {
		return nil, err
	}
	if err := c.Authorize(nounImage.action("provision"), s.imageAttributes(c, image, i.ResourceGroupID)); err != nil {
		return nil, err
	}
	if !image.Usable() {
		return nil, invalidState("The image %s is %s; an instance needs one that is available.", image.ID, image.Status).On("image")
	}
	i.ImageID = image.ID
	return image, nil
}

func (s *service) chooseKeys(c *api.Call, b *instanceBody, i *vpc.Instance) error {
	if len(b.Keys) > vpc.MaxInstanceKeys {
		return fault.New(fault.Invalid, "over_quota", "An instance has at most %d keys; name fewer.", vpc.MaxInstanceKeys).On("keys")
	}
	chosen := map[string]bool{}
	for _, ref := range b.Keys {
		k, err := s.findKey(c, &ref)
		if err != nil {
			return err
		}
		if chosen[k.ID] {
			continue
		}
		chosen[k.ID] = true
		if err := c.Authorize(nounKey.action("operate"), target(s, c, &s.sshKeys, k).Resource); err != nil {
			return err
		}
		i.KeyIDs = append(i.KeyIDs, k.ID)
	}
	return nil
}

func (s *service) findKey(c *api.Call, ref *identityRef) (*vpc.Key, error) {
	if ref.ID == "" && ref.Fingerprint != "" {
		for _, k := range s.d.KeysByAccount.Get(c.Account()) {
			if k.Fingerprint == ref.Fingerprint {
				return k, nil
			}
		}
		return nil, api.NotFound("key", ref.Fingerprint).On("keys")
	}
	id, err := s.idOf(ref, nounKey, "keys")
	if err != nil {
		return nil, err
	}
	return s.sshKeys.find(c, id, "keys")
}

// defaultProfile finds the trusted profile that an instance is to take on when
// it names none. Naming it needs no right on the profile: the instance gets no
// token of it until a link or a rule covers the instance, and then it could
// name the profile itself (section 1.9).
func (s *service) defaultProfile(c *api.Call, b *defaultProfileBody) (*vpc.DefaultProfile, error) {
	const field = "default_trusted_profile.target"
	if b.Target == nil {
		return nil, missing(field)
	}
	id := crn.BareID(b.Target.ID)
	if id == "" {
		if b.Target.CRN == "" {
			return nil, missing(field + ".id")
		}
		name, err := crn.Parse(b.Target.CRN)
		if err != nil || name.Service != "iam-identity" || name.ResourceType != "profile" || name.AccountID() != c.Account() {
			return nil, badField(field+".crn", "The property %s.crn must be the CRN of a trusted profile of this account.", field)
		}
		id = name.Resource
	}
	p, ok := s.d.Profiles.Get(id)
	if !ok || p.AccountID != c.Account() {
		return nil, api.NotFound("trusted profile", id).On(field)
	}
	return &vpc.DefaultProfile{
		ID: p.ID, CRN: s.Names.Of("iam-identity", "", p.AccountID, "", "profile", p.ID).String(),
		AutoLink: b.AutoLink == nil || *b.AutoLink,
	}, nil
}

// newLink lets the instance put on its default profile. Whoever can make an
// instance do this can act as the profile, so the caller needs the right to
// link that profile.
func (s *service) newLink(c *api.Call, i *vpc.Instance) (*identity.Link, error) {
	p := i.DefaultProfile
	if err := c.Authorize(linkAction, c.InAccount("iam-identity", access.ResourceType, "profile", access.Resource, p.ID)); err != nil {
		return nil, err
	}
	if s.d.LinksByProfile.Len(p.ID) >= identity.MaxLinksPerProfile {
		return nil, fault.New(fault.Invalid, "over_quota", "The trusted profile %s has %d links already, the most it can have.", p.ID, identity.MaxLinksPerProfile).On("default_trusted_profile")
	}
	return &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: i.AccountID, Name: i.Name,
		CRType: identity.VSI, CRN: i.CRN,
	}, nil
}

// alive refuses to change an instance that is being deleted.
func alive(i *vpc.Instance) error {
	if i.Status == vpc.Deleting {
		return invalidState("The instance %s is being deleted.", i.ID)
	}
	return nil
}

type instancePatch struct {
	Name     *string       `json:"name"`
	Metadata *metadataBody `json:"metadata_service"`
	Profile  *identityRef  `json:"profile"`

	all properties
}

// UnmarshalJSON keeps the names of all properties beside the known ones.
func (b *instancePatch) UnmarshalJSON(raw []byte) error {
	type plain instancePatch
	if err := json.Unmarshal(raw, (*plain)(b)); err != nil {
		return err
	}
	return json.Unmarshal(raw, &b.all)
}

func (s *service) updateInstance(c *api.Call, tx *directory.Tx, b *instancePatch, i *vpc.Instance) (api.Reply, api.Target, error) {
	changed := i.Clone()
	if err := s.patch(c, b, i, changed); err != nil {
		return api.Reply{}, api.Target{}, err
	}
	s.d.Instances.Put(tx, changed)
	return api.Reply{Body: s.instanceShape(changed), ETag: changed.Tag(changed.ID)}, target(s, c, &s.instances, changed), nil
}

func (s *service) patch(c *api.Call, b *instancePatch, i, changed *vpc.Instance) error {
	if err := c.IfMatch(&i.Meta, i.ID, false); err != nil {
		return err
	}
	if err := alive(i); err != nil {
		return err
	}
	if err := b.all.refuse(unsupported); err != nil {
		return err
	}
	if b.Profile != nil {
		if err := s.resize(b.Profile, changed); err != nil {
			return err
		}
	}
	if b.Name != nil {
		if err := s.instances.checkName(c, *b.Name, i.ID); err != nil {
			return err
		}
		changed.Name = *b.Name
	}
	return b.Metadata.apply(&changed.Metadata)
}

// resize gives an instance another hardware profile, which it has when it starts
// next.
func (s *service) resize(ref *identityRef, changed *vpc.Instance) error {
	profile, err := hardwareProfile(ref)
	switch {
	case err != nil:
		return err
	case changed.External != nil:
		return invalidState("The machine of the instance %s is run by somebody else, who decides what it has.", changed.ID)
	case profile.Name != changed.Profile && changed.Status != vpc.Stopped && changed.Status != vpc.Stopping:
		return invalidState("The instance %s is %s; its profile can only be changed while it is stopped.", changed.ID, changed.Status)
	}
	if profile.Name == changed.Profile {
		return nil
	}
	if err := s.fits(changed, profile); err != nil {
		return err
	}
	changed.Profile = profile.Name
	return nil
}

// fits refuses what the host of an instance has no room for. An instance without
// a host gets one that has room.
func (s *service) fits(i *vpc.Instance, p vpc.InstanceProfile) error {
	if s.opts.Fits == nil || i.HostID == "" {
		return nil
	}
	if reason := s.opts.Fits(i.HostID, i, p); reason != "" {
		return invalidState("The host of the instance %s has no room for the profile %s now: %s. Stop or delete other instances on it, or take a smaller profile.", i.ID, p.Name, strings.TrimSuffix(reason, "."))
	}
	return nil
}

// deleteInstance takes away at once what the instance could do: its links and
// its floating IPs. The host ends it and removes the object. It may be asked
// in any state, so that an instance whose host does not answer can be deleted.
func (s *service) deleteInstance(c *api.Call, tx *directory.Tx, _ *api.None, i *vpc.Instance) (api.Reply, api.Target, error) {
	if i.Status == vpc.Deleting {
		return api.Reply{}, api.Target{}, fault.New(fault.Conflict, "instance_delete_conflict", "The instance %s is being deleted already.", i.ID)
	}
	links := s.d.DeleteLinksOf(tx, i.CRN)
	for _, f := range s.d.FloatingIPsByInstance.Get(i.ID) {
		s.unbind(tx, f)
	}
	changed := i.Clone()
	changed.Status, changed.StatusReason = vpc.Deleting, ""
	s.d.Instances.Put(tx, changed)
	r := api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{"deleted_links": links}}
	return r, target(s, c, &s.instances, i), nil
}

type actionBody struct {
	Type  string `json:"type"` // start, stop or reboot
	Force bool   `json:"force"`
}

// act starts, stops or reboots: it says so, and the host does it.
func (s *service) act(c *api.Call, tx *directory.Tx, b *actionBody, i *vpc.Instance) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	switch b.Type {
	case "start", "stop", "reboot":
	case "":
		return fail(missing("type"))
	default:
		return fail(fault.New(fault.Invalid, "validation_enum", "The property type must be start, stop or reboot.").On("type"))
	}
	force := b.Force && b.Type != "start" // section 3.6
	status, err := i.Act(b.Type, force)
	if err != nil {
		return fail(invalidState("The action is refused: %v.", err))
	}
	if p, ok := vpc.ProfileNamed(i.Profile); ok && b.Type == "start" {
		if err := s.fits(i, p); err != nil {
			return fail(err)
		}
	}
	changed := i.Clone()
	changed.Status, changed.StatusReason, changed.Force = status, "", force
	s.d.Instances.Put(tx, changed)

	prefix, _, _ := strings.Cut(i.ID, "_")
	id := prefix + "-" + uuid.NewString()
	return api.Reply{
		Status: http.StatusCreated,
		Body: actionShape{
			CreatedAt: stamp(tx.Now), Force: b.Force, Href: s.href("instances", i.ID, "actions", id),
			ID: id, Status: "pending", Type: b.Type,
		},
		ResponseData: map[string]any{"type": b.Type, "force": force},
	}, target(s, c, &s.instances, i), nil
}

func (s *service) localAccess(c *api.Call, _ *directory.Tx, _ *api.None, i *vpc.Instance) (api.Reply, api.Target, error) {
	if i.Status != vpc.Running {
		return api.Reply{}, api.Target{}, invalidState("The instance %s is %s; it must be running.", i.ID, i.Status)
	}
	if s.opts.LocalAccess != nil {
		if access, ok := s.opts.LocalAccess(i.ID); ok {
			return api.Reply{Body: access}, target(s, c, &s.instances, i), nil
		}
	}
	return api.Reply{}, api.Target{}, fault.New(fault.NotFound, "not_found", "The instance %s does not run on a driver of this server that can be entered.", i.ID)
}

func (s *service) instanceShape(i *vpc.Instance) instanceShape {
	shape := instanceShape{
		Availability: availabilityShape{"standard"}, AvailabilityPolicy: availabilityPolicy{"restart", "stop"},
		ClusterNetworkAttachments: []any{}, ConfidentialComputeMode: "disabled",
		CreatedAt: stamp(i.CreatedAt), CRN: i.CRN, Disks: []any{}, HealthReasons: []any{}, HealthState: health(i),
		Href: s.href("instances", i.ID), ID: i.ID, LifecycleReasons: []any{}, LifecycleState: lifecycle(i),
		MetadataService: metadataShape(i.Metadata), Name: i.Name,
		NetworkAttachments: []attachmentRef{}, NetworkInterfaces: []interfaceRef{}, Profile: s.profileRef(i.Profile),
		ReservationAffinity: reservationAffinity{"disabled", []any{}}, ResourceGroup: s.groupRef(i.ResourceGroupID),
		ResourceType: "instance", Status: i.Status, StatusReasons: []statusReason{},
		VolumeAttachments: []volumeAttachmentRef{}, VolumeBandwidthQoSMode: "pooled", Zone: s.zoneRef(i.Zone),
	}
	if p, ok := vpc.ProfileNamed(i.Profile); ok {
		shape.Bandwidth, shape.Memory = p.Bandwidth, p.MemoryGiB
		shape.TotalVolumeBandwidth = volumeBandwidth(p)
		shape.TotalNetworkBandwidth = p.Bandwidth - shape.TotalVolumeBandwidth
		shape.VCPU = vcpuShape{Architecture: "amd64", Burst: vcpuBurst{100}, Count: p.VCPUs, Manufacturer: vcpuManufacturer, Percentage: 100}
	}
	if hasVolume(i) {
		boot := s.bootAttachment(i)
		shape.BootVolumeAttachment, shape.VolumeAttachments = &boot, []volumeAttachmentRef{boot}
	}
	if image, ok := s.imageOf(i); ok {
		ref := s.imageRef(image)
		shape.Image = &ref
	}
	if v, ok := s.d.VPCs.Get(i.VPCID); ok {
		shape.VPC = s.vpcRef(v)
	}
	for n := range i.Interfaces {
		nic := &i.Interfaces[n]
		shape.NetworkInterfaces = append(shape.NetworkInterfaces, s.interfaceRef(i, nic))
		if nic.AttachmentID != "" {
			shape.NetworkAttachments = append(shape.NetworkAttachments, s.attachmentRef(i, nic))
		}
	}
	if len(shape.NetworkAttachments) > 0 {
		shape.PrimaryNetworkAttachment = &shape.NetworkAttachments[0]
	}
	if len(shape.NetworkInterfaces) > 0 {
		shape.PrimaryNetworkInterface = shape.NetworkInterfaces[0]
	}
	switch {
	case i.Status == vpc.Failed:
		shape.StatusReasons = append(shape.StatusReasons, statusReason{"cannot_start", cmp.Or(i.StatusReason, "The host could not start the instance.")})
	case (i.Status == vpc.Pending || i.Status == vpc.Starting) && i.StatusReason != "":
		shape.StatusReasons = append(shape.StatusReasons, statusReason{"cannot_start_capacity", i.StatusReason})
	}
	_, err := i.Next("start")
	shape.Startable = err == nil
	return shape
}

func health(i *vpc.Instance) string {
	switch i.Status {
	case vpc.Failed:
		return "faulted"
	case vpc.Running:
		return "ok"
	}
	return "inapplicable"
}

func lifecycle(i *vpc.Instance) string {
	switch i.Status {
	case vpc.Pending, vpc.Deleting, vpc.Failed:
		return i.Status
	}
	return "stable"
}

func (s *service) initializationShape(i *vpc.Instance) initializationShape {
	shape := initializationShape{Keys: []keyRef{}}
	for _, id := range i.KeyIDs {
		if k, ok := s.d.Keys.Get(id); ok {
			ks := s.keyShape(k)
			shape.Keys = append(shape.Keys, keyRef{ks.CRN, ks.Fingerprint, ks.Href, ks.ID, ks.Name})
		}
	}
	if p := i.DefaultProfile; p != nil {
		shape.DefaultTrustedProfile = &defaultProfileShape{p.AutoLink, trustedProfileRefs{p.CRN, p.ID, "trusted_profile"}}
	}
	return shape
}
