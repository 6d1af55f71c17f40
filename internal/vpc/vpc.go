// Package vpc holds the objects of the virtual private cloud: VPCs, subnets,
// keys, images, instances and floating IPs, with the rules that need no I/O,
// such as names, address allocation and which status may follow which. Running
// an instance is the host's work.
package vpc

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"tabard.dev/tabard/internal/object"
)

// VPC is an isolated network. With it come a default security group, whose name
// and id stand here too, and a network ACL and routing table, of which nothing
// else exists.
type VPC struct {
	object.Meta
	ID              string `json:"id"` // r006-<uuid>
	AccountID       string `json:"account_id"`
	Name            string `json:"name"`
	ResourceGroupID string `json:"resource_group_id"`
	SecurityGroup   Ref    `json:"default_security_group"`
	NetworkACL      Ref    `json:"default_network_acl"`
	RoutingTable    Ref    `json:"default_routing_table"`
	ManualPrefixes  bool   `json:"manual_prefixes,omitempty"`

	// VNI is the VXLAN network identifier, which tells the VPC's packets from
	// those of others between hosts. No two VPCs of an installation have the same.
	// 0 means that the VPC does not span hosts.
	VNI uint32 `json:"vni,omitempty"`
}

// MaxVNI is the largest VXLAN network identifier (RFC 7348 section 5).
const MaxVNI = 1<<24 - 1

// Ref is the id and name of a part that is not an object of its own.
type Ref struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// Subnet is a range of addresses of a VPC in one zone.
type Subnet struct {
	object.Meta
	ID              string       `json:"id"` // 0737-<uuid>
	AccountID       string       `json:"account_id"`
	VPCID           string       `json:"vpc_id"`
	Zone            string       `json:"zone"`
	CIDR            netip.Prefix `json:"cidr"`
	Name            string       `json:"name"`
	ResourceGroupID string       `json:"resource_group_id"`
}

// Key is a public SSH key.
type Key struct {
	object.Meta
	ID              string `json:"id"`
	AccountID       string `json:"account_id"`
	Name            string `json:"name"`
	Type            string `json:"type"`   // rsa or ed25519
	Length          int    `json:"length"` // bits
	PublicKey       string `json:"public_key"`
	Fingerprint     string `json:"fingerprint"` // SHA256:…
	ResourceGroupID string `json:"resource_group_id"`
}

// Image is what an instance boots. Stock images belong to no account.
type Image struct {
	object.Meta
	ID              string `json:"id"`
	AccountID       string `json:"account_id,omitempty"`
	Name            string `json:"name"`
	OS              string `json:"os"`
	OSName          string `json:"os_name"` // of the operating system, in its catalogue form
	Version         string `json:"version"`
	Architecture    string `json:"architecture"`
	Vendor          string `json:"vendor"`
	ResourceGroupID string `json:"resource_group_id,omitempty"`

	// A registered image has a disk; a stock image has none and is for drivers
	// that need none.
	Status string `json:"status,omitempty"` // available, pending or failed; "" is available
	Reason string `json:"reason,omitempty"` // why it is failed
	Format string `json:"format,omitempty"` // qcow2 or raw
	Bytes  int64  `json:"bytes,omitempty"`  // size of the file
	Disk   int64  `json:"disk,omitempty"`   // size of the disk that a machine sees, in bytes
	SHA256 string `json:"sha256,omitempty"` // of the file, hexadecimal
	Source string `json:"source,omitempty"` // URL that it was or is to be fetched from

	// Expect is the SHA256 that the file must have; "" takes any.
	Expect string `json:"expect,omitempty"`
}

// Available is the status of an image beside Pending and Failed.
const Available = "available"

// Usable reports whether instances can be made of the image.
func (i *Image) Usable() bool { return i.Status == "" || i.Status == Available }

// Instance statuses (reference/instance-metadata-and-vpc.md section 3.5).
const (
	Pending    = "pending"
	Starting   = "starting"
	Running    = "running"
	Stopping   = "stopping"
	Stopped    = "stopped"
	Restarting = "restarting"
	Deleting   = "deleting"
	Failed     = "failed"
)

// Instance is a virtual server.
type Instance struct {
	object.Meta
	ID              string          `json:"id"` // 0737_<uuid>
	CRN             string          `json:"crn"`
	AccountID       string          `json:"account_id"`
	Name            string          `json:"name"`
	VPCID           string          `json:"vpc_id"`
	Zone            string          `json:"zone"`
	Profile         string          `json:"profile"` // hardware profile
	ImageID         string          `json:"image_id"`
	KeyIDs          []string        `json:"key_ids,omitempty"`
	ResourceGroupID string          `json:"resource_group_id"`
	HostID          string          `json:"host_id"`
	Status          string          `json:"status"`
	StatusReason    string          `json:"status_reason,omitempty"`
	Metadata        MetadataService `json:"metadata_service"`
	DefaultProfile  *DefaultProfile `json:"default_trusted_profile,omitempty"`
	UserData        string          `json:"user_data,omitempty"`
	Interfaces      []Interface     `json:"interfaces"` // the first is the primary one
	BootVolume      Volume          `json:"boot_volume"`
	External        *External       `json:"external,omitempty"` // nil for one that a driver runs

	// Ran says that a host has once reported it as running: from then on there
	// is something on its disk to lose.
	Ran bool `json:"ran,omitempty"`

	// Force says that a stop or reboot under way does not wait for the system
	// inside.
	Force bool `json:"force,omitempty"`
}

// MetadataService are an instance's settings of the metadata service.
type MetadataService struct {
	Enabled          bool   `json:"enabled"`
	Protocol         string `json:"protocol"`           // http or https
	ResponseHopLimit int    `json:"response_hop_limit"` // IP time-to-live of answers, 1 to 64
}

// DefaultProfile is the trusted profile that an instance takes on when it names
// none. It is fixed at creation.
type DefaultProfile struct {
	ID       string `json:"id"`
	CRN      string `json:"crn"`
	AutoLink bool   `json:"auto_link"`
}

// Interface is a network interface of an instance.
type Interface struct {
	ID       string     `json:"id"`
	Name     string     `json:"name"`
	SubnetID string     `json:"subnet_id"`
	Address  netip.Addr `json:"address"`
	IPID     string     `json:"ip_id"`
	IPName   string     `json:"ip_name"`
	MAC      string     `json:"mac"`

	// SecurityGroupIDs are the groups that were asked for; none means the VPC's
	// default one. See GroupIDs.
	SecurityGroupIDs []string `json:"security_group_ids,omitempty"`

	// AttachmentID and VirtualID are set when the instance was made with network
	// attachments, the newer form of the same thing: VirtualID is the id of the
	// virtual network interface.
	AttachmentID string `json:"attachment_id,omitempty"`
	VirtualID    string `json:"virtual_id,omitempty"`
	VirtualName  string `json:"virtual_name,omitempty"`
}

// External says how a machine that somebody else made and runs is reached on
// its host.
type External struct {
	Device string            `json:"device"`           // name of its tap or veth on the host
	Domain string            `json:"domain,omitempty"` // UUID of its libvirt domain
	Tags   map[string]string `json:"tags,omitempty"`   // from the domain's metadata
}

// Volume is the boot volume. The host keeps it with the machine; here it has its
// names only.
type Volume struct {
	ID             string `json:"id"`
	Name           string `json:"name"`
	AttachmentID   string `json:"attachment_id"`
	AttachmentName string `json:"attachment_name"`
}

// FloatingIP is a public address, bound to at most one interface.
type FloatingIP struct {
	object.Meta
	ID              string     `json:"id"`
	AccountID       string     `json:"account_id"`
	Name            string     `json:"name"`
	Address         netip.Addr `json:"address"`
	Zone            string     `json:"zone"`
	ResourceGroupID string     `json:"resource_group_id"`
	InstanceID      string     `json:"instance_id,omitempty"`
	InterfaceID     string     `json:"interface_id,omitempty"`
}

// Interface returns the interface with this id or name.
func (i *Instance) Interface(ref string) (*Interface, bool) {
	for n := range i.Interfaces {
		if nic := &i.Interfaces[n]; nic.ID == ref || nic.Name == ref {
			return nic, true
		}
	}
	return nil, false
}

// Clone returns a copy whose slices can be changed.
func (i *Instance) Clone() *Instance {
	c := *i
	c.Interfaces = slices.Clone(i.Interfaces)
	for n := range c.Interfaces {
		c.Interfaces[n].SecurityGroupIDs = slices.Clone(c.Interfaces[n].SecurityGroupIDs)
	}
	c.KeyIDs = slices.Clone(i.KeyIDs)
	return &c
}

// Next returns the status that an action leads to, or an error that says why
// the action is refused in the present one.
func (i *Instance) Next(action string) (string, error) { return i.Act(action, false) }

// Act is Next for an action that may be forced: one that does not wait for what
// is under way. Starting cannot be forced
// (reference/instance-metadata-and-vpc.md section 3.6).
func (i *Instance) Act(action string, force bool) (string, error) {
	var next string
	var from []string
	switch action {
	case "start":
		next, from = Starting, []string{Stopped, Failed}
	case "stop":
		next, from = Stopping, []string{Running, Starting, Pending}
		if force {
			from = append(from, Stopping, Restarting)
		}
	case "reboot":
		next, from = Restarting, []string{Running}
		if force {
			from = append(from, Restarting)
		}
	default:
		return "", fmt.Errorf("action %q is not one of start, stop, reboot", action)
	}
	if i.External != nil {
		return "", errors.New("the machine is run by somebody else; whoever made it starts and stops it")
	}
	if !slices.Contains(from, i.Status) {
		return "", fmt.Errorf("cannot %s an instance that is %s", action, i.Status)
	}
	return next, nil
}

// ValidName reports whether s may name a VPC resource: 1 to 63 lower-case
// letters, digits and hyphens, starting with a letter and not ending with a
// hyphen.
func ValidName(s string) bool {
	if len(s) == 0 || len(s) > 63 || s[len(s)-1] == '-' {
		return false
	}
	for n := range len(s) {
		c := s[n]
		letter := c >= 'a' && c <= 'z'
		if !letter && (n == 0 || (c < '0' || c > '9') && c != '-') {
			return false
		}
	}
	return true
}
