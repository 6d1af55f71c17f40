package hosts

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// adoptBody takes in a machine that something else made and runs: it becomes an
// instance with a CRN and a metadata service, and nothing else of it changes.
// Machine names one that the host has found; the other fields correct or
// complete what was found, or say all of it.
type adoptBody struct {
	Machine  string `json:"machine"` // UUID of its domain, its device, or its name
	Name     string `json:"name"`    // of the instance
	Device   string `json:"device"`  // the tap or veth on the host
	MAC      string `json:"mac"`
	Address  string `json:"address"`
	CIDR     string `json:"cidr"` // the network that the address is in; by default its /24
	Metadata *struct {
		Enabled  *bool  `json:"enabled"` // default true
		Protocol string `json:"protocol"`
		HopLimit int    `json:"response_hop_limit"`
	} `json:"metadata_service"`
	DefaultProfile *struct {
		ID       string `json:"id"`
		AutoLink *bool  `json:"auto_link"` // default true
	} `json:"default_trusted_profile"`
}

// deviceName is what the kernel takes for the name of a device, less what would
// need quoting anywhere.
var deviceName = regexp.MustCompile(`^[A-Za-z0-9_.\-]{1,15}$`)

const linkAction = "iam-identity.profile.linkToResource"

// adoptedVPC is the network that adopted machines are said to be in. Tabard
// does not run it.
const adoptedVPC = "adopted"

func (h *handler) adopt(c *api.Call, tx *directory.Tx, b *adoptBody, x *cluster.Host) (api.Reply, api.Target, error) {
	t := h.targetOf(c, x)
	i, err := h.adopted(b, x)
	if err != nil {
		return api.Reply{}, t, err
	}
	i.AccountID = c.Account()
	if n := h.Directory.InstancesByAccount.Len(i.AccountID); n >= vpc.MaxInstances {
		return api.Reply{}, t, fault.New(fault.Invalid, "over_quota", "The account has %d instances already, the most it can have; delete one first.", n)
	}
	prefix, err := network(b.CIDR, i.Interfaces[0].Address)
	if err != nil {
		return api.Reply{}, t, err
	}
	for _, other := range h.Directory.InstancesByAccount.Get(i.AccountID) {
		if other.Name == i.Name {
			return api.Reply{}, t, fault.New(fault.Conflict, "name_not_unique", "There is an instance %s already; give another name.", i.Name).On("name")
		}
	}
	for _, other := range h.Directory.InstancesByHost.Get(x.ID) {
		if e := other.External; e != nil && e.Device == i.External.Device {
			return api.Reply{}, t, fault.New(fault.Conflict, "device_in_use", "The device %s is that of the instance %s.", e.Device, other.Name).On("device")
		}
	}
	group := h.defaultGroup(i.AccountID)
	i.ResourceGroupID = group
	v := h.adoptedVPC(tx, i.AccountID, group)
	subnet := h.adoptedSubnet(tx, v, i.Zone, prefix)
	i.VPCID, i.Interfaces[0].SubnetID = v.ID, subnet.ID
	i.CRN = h.Names.Of("is", i.Zone, i.AccountID, "", "instance", i.ID).String()
	recorded := map[string]any{"instance": i.CRN, "device": i.External.Device, "domain": i.External.Domain, "address": i.Interfaces[0].Address.String()}
	if p := b.DefaultProfile; p != nil {
		l, err := h.defaultProfile(c, i, p.ID, p.AutoLink == nil || *p.AutoLink)
		if err != nil {
			return api.Reply{}, t, err
		}
		if l != nil {
			h.Directory.Links.Put(tx, l)
			recorded["link"] = l.ID
		}
		recorded["default_trusted_profile"] = i.DefaultProfile.ID
	}
	h.Directory.Instances.Put(tx, i)
	return api.Reply{
		Status: http.StatusCreated,
		Body: map[string]any{
			"id": i.ID, "crn": i.CRN, "name": i.Name, "host": x.Name, "device": i.External.Device, "mac": i.Interfaces[0].MAC,
			"address": i.Interfaces[0].Address.String(), "vpc": v.ID, "subnet": subnet.ID, "tags": i.External.Tags, "status": i.Status,
		},
		ResponseData: recorded,
	}, t, nil
}

// adopted makes the instance from what was found and what was given.
func (h *handler) adopted(b *adoptBody, x *cluster.Host) (*vpc.Instance, error) {
	if x.Revoked {
		return nil, fault.New(fault.Conflict, "host_revoked", "The host %s is revoked.", x.Name)
	}
	var m link.Machine
	if b.Machine != "" {
		matches := 0
		for _, f := range h.found.of(x.ID) {
			if f.Domain == b.Machine || f.Device == b.Machine || f.Name == b.Machine {
				m = f
				matches++
			}
		}
		if matches != 1 {
			return nil, fault.New(fault.NotFound, "not_found", "The host %s has found %d machines that are called %q; see tabard host machines %s.", x.Name, matches, b.Machine, x.Name).On("machine")
		}
	}
	device, rawMAC, rawAddress := cmp.Or(b.Device, m.Device), cmp.Or(b.MAC, m.MAC), cmp.Or(b.Address, m.Address)
	name := cmp.Or(b.Name, instanceName(m.Name))
	mac, macErr := net.ParseMAC(rawMAC)
	address, addressErr := netip.ParseAddr(rawAddress)
	switch {
	case !vpc.ValidName(name):
		return nil, api.Invalid("The field name must have 1 to 63 lower-case letters, digits and hyphens, start with a letter and not end with a hyphen.").On("name")
	case !deviceName.MatchString(device):
		return nil, api.Invalid("The field device must be the name of the machine's tap or veth on the host, such as vnet0; ip link shows them.").On("device")
	case macErr != nil || len(mac) != 6 || mac[0]&1 != 0:
		return nil, api.Invalid("The field mac must be the address of the machine's network card, such as 52:54:00:12:34:56.").On("mac")
	case addressErr != nil || !address.Is4() || address.IsLoopback() || address.IsLinkLocalUnicast() || address.IsUnspecified() || address.IsMulticast():
		return nil, api.Invalid("The field address must be the machine's own IPv4 address. Only packets with it and the mac are taken for the machine's.").On("address")
	}
	settings := vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1}
	if s := b.Metadata; s != nil {
		if s.Enabled != nil {
			settings.Enabled = *s.Enabled
		}
		settings.Protocol, settings.ResponseHopLimit = cmp.Or(s.Protocol, "http"), cmp.Or(s.HopLimit, 1)
		if settings.Protocol != "http" && settings.Protocol != "https" || settings.ResponseHopLimit < 1 || settings.ResponseHopLimit > 64 {
			return nil, api.Invalid("The field metadata_service must have a protocol of http or https and a response_hop_limit from 1 to 64.").On("metadata_service")
		}
	}
	region, _ := vpc.RegionNamed(h.Region)
	zone, ok := region.Zone(x.Zone)
	if !ok {
		zone = region.Zones[0]
	}
	return &vpc.Instance{
		ID: zone.Prefix + "_" + newID(), Name: name, Zone: zone.Name, Profile: vpc.InstanceProfiles[0].Name, HostID: x.ID,
		Status: vpc.Pending, Metadata: settings,
		Interfaces: []vpc.Interface{{
			ID: zone.Prefix + "-" + newID(), Name: "eth0", Address: address, IPID: zone.Prefix + "-" + newID(), IPName: randomName("ip"), MAC: mac.String(),
		}},
		BootVolume: vpc.Volume{
			ID: region.Prefix + "-" + newID(), Name: randomName("volume"), AttachmentID: zone.Prefix + "-" + newID(), AttachmentName: randomName("attachment"),
		},
		External: &vpc.External{Device: device, Domain: m.Domain, Tags: m.Tags},
	}, nil
}

// instanceName turns the name of a domain into one that an instance may have.
func instanceName(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '-'
	}, s)
	s = strings.Trim(s, "-")
	if s != "" && s[0] >= '0' && s[0] <= '9' {
		s = "vm-" + s
	}
	return s[:min(len(s), 63)]
}

// network is the range that the address is in.
func network(cidr string, address netip.Addr) (netip.Prefix, error) {
	if cidr == "" {
		p, err := address.Prefix(24)
		return p, err
	}
	p, err := netip.ParsePrefix(cidr)
	if err != nil || !p.Contains(address) || p.Bits() < 8 || p.Bits() > 30 {
		return netip.Prefix{}, api.Invalid("The field cidr must be a range from /8 to /30 with the address %s in it.", address).On("cidr")
	}
	return p.Masked(), nil
}

func (h *handler) defaultGroup(accountID string) string {
	for _, g := range h.Directory.ResourceGroupsByAccount.Get(accountID) {
		if g.Default {
			return g.ID
		}
	}
	return ""
}

func (h *handler) adoptedVPC(tx *directory.Tx, accountID, group string) *vpc.VPC {
	for _, v := range h.Directory.VPCsByAccount.Get(accountID) {
		if v.Name == adoptedVPC {
			return v
		}
	}
	region, _ := vpc.RegionNamed(h.Region)
	part := func(word string) vpc.Ref { return vpc.Ref{ID: region.Prefix + "-" + newID(), Name: randomName(word)} }
	v := &vpc.VPC{
		ID: region.Prefix + "-" + newID(), AccountID: accountID, Name: adoptedVPC, ResourceGroupID: group, ManualPrefixes: true,
		SecurityGroup: part("group"), NetworkACL: part("acl"), RoutingTable: part("table"),
		VNI: placement.FreeVNI(h.Directory),
	}
	h.Directory.VPCs.Put(tx, v)
	h.Directory.SecurityGroups.Put(tx, vpc.DefaultGroup(v))
	return v
}

// adoptedSubnet finds or makes the subnet of a range. Networks that are not
// ours may overlap, on several hosts; machines of one range share a subnet.
func (h *handler) adoptedSubnet(tx *directory.Tx, v *vpc.VPC, zone string, p netip.Prefix) *vpc.Subnet {
	for _, s := range h.Directory.SubnetsByVPC.Get(v.ID) {
		if s.CIDR == p && s.Zone == zone {
			return s
		}
	}
	region, _ := vpc.RegionNamed(h.Region)
	z, _ := region.Zone(zone)
	s := &vpc.Subnet{
		ID: z.Prefix + "-" + newID(), AccountID: v.AccountID, VPCID: v.ID, Zone: zone, CIDR: p, ResourceGroupID: v.ResourceGroupID,
		Name: adoptedVPC + "-" + strings.NewReplacer(".", "-", "/", "-").Replace(p.String()) + "-" + zone,
	}
	h.Directory.Subnets.Put(tx, s)
	return s
}

// defaultProfile sets the trusted profile that the instance takes on when it
// names none, and returns the link to it unless there is to be none. Linking
// needs the right to, as it does for an instance that is created.
func (h *handler) defaultProfile(c *api.Call, i *vpc.Instance, id string, autoLink bool) (*identity.Link, error) {
	const field = "default_trusted_profile.id"
	p, ok := h.Directory.Profiles.Get(crn.BareID(id))
	if !ok || p.AccountID != i.AccountID {
		return nil, api.NotFound("trusted profile", id).On(field)
	}
	i.DefaultProfile = &vpc.DefaultProfile{
		ID: p.ID, CRN: h.Names.Of("iam-identity", "", p.AccountID, "", "profile", p.ID).String(), AutoLink: autoLink,
	}
	if !autoLink {
		return nil, nil
	}
	if err := c.Authorize(linkAction, c.InAccount("iam-identity", access.ResourceType, "profile", access.Resource, p.ID)); err != nil {
		return nil, err
	}
	if h.Directory.LinksByProfile.Len(p.ID) >= identity.MaxLinksPerProfile {
		return nil, fault.New(fault.Invalid, "over_quota", "The trusted profile %s has %d links already, the most it can have.", p.ID, identity.MaxLinksPerProfile).On(field)
	}
	return &identity.Link{ID: "Link-" + newID(), ProfileID: p.ID, AccountID: i.AccountID, Name: i.Name, CRType: identity.VSI, CRN: i.CRN}, nil
}

func randomName(prefix string) string {
	b := make([]byte, 6)
	rand.Read(b) // never fails, see crypto/rand
	return prefix + "-" + hex.EncodeToString(b)
}
