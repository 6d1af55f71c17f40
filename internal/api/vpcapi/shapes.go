package vpcapi

import (
	"strconv"
	"time"

	"tabard.dev/tabard/internal/api"
)

// The shapes of section 3.5. Everything that the published clients treat as
// required has no omitempty; lists are made non-nil by whoever fills them.

// Values that stand in many shapes.
const (
	available        = "available"
	cloudInit        = "cloud_init"
	nicType          = "network_interface"
	vcpuManufacturer = "intel"
	portSpeed        = 1000 // Mbps
	bootVolumeGB     = 10
)

// stamp is a time as the API writes it: UTC, with milliseconds.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

func itoa(n int) string { return strconv.Itoa(n) }

type pageLink struct {
	Href string `json:"href"`
}

// reference is how one resource mentions another. A few kinds have no
// resource_type in it.
type reference struct {
	CRN          string `json:"crn"`
	Href         string `json:"href"`
	ID           string `json:"id"`
	Name         string `json:"name"`
	ResourceType string `json:"resource_type,omitempty"`
}

type groupRef struct {
	Href string `json:"href"`
	ID   string `json:"id"`
	Name string `json:"name"`
}

func (s *service) groupRef(id string) groupRef {
	return groupRef{s.URL + "/v2/resource_groups/" + id, id, s.d.ResourceGroupName(id)}
}

type regionRef struct {
	Href string `json:"href"`
	Name string `json:"name"`
}

type zoneRef struct {
	Href string `json:"href"`
	Name string `json:"name"`
}

type profileRef struct {
	Href         string `json:"href"`
	Name         string `json:"name"`
	ResourceType string `json:"resource_type"`
}

type regionShape struct {
	Endpoint string `json:"endpoint"`
	Href     string `json:"href"`
	Name     string `json:"name"`
	Status   string `json:"status"`
}

type zoneShape struct {
	Href   string    `json:"href"`
	Name   string    `json:"name"`
	Region regionRef `json:"region"`
	Status string    `json:"status"`
}

type vpcShape struct {
	ClassicAccess        bool      `json:"classic_access"`
	CreatedAt            string    `json:"created_at"`
	CRN                  string    `json:"crn"`
	CSESourceIPs         []any     `json:"cse_source_ips"`
	DefaultNetworkACL    reference `json:"default_network_acl"`
	DefaultRoutingTable  reference `json:"default_routing_table"`
	DefaultSecurityGroup reference `json:"default_security_group"`
	DNS                  dnsShape  `json:"dns"`
	HealthReasons        []any     `json:"health_reasons"`
	HealthState          string    `json:"health_state"`
	Href                 string    `json:"href"`
	ID                   string    `json:"id"`
	Name                 string    `json:"name"`
	PublicAddressRanges  []any     `json:"public_address_ranges"`
	ResourceGroup        groupRef  `json:"resource_group"`
	ResourceType         string    `json:"resource_type"`
	Status               string    `json:"status"`
}

type dnsShape struct {
	EnableHub              bool        `json:"enable_hub"`
	ResolutionBindingCount int         `json:"resolution_binding_count"`
	Resolver               dnsResolver `json:"resolver"`
}

type dnsResolver struct {
	Configuration string `json:"configuration"`
	Servers       []any  `json:"servers"`
	Type          string `json:"type"`
}

type prefixShape struct {
	CIDR       string  `json:"cidr"`
	CreatedAt  string  `json:"created_at"`
	HasSubnets bool    `json:"has_subnets"`
	Href       string  `json:"href"`
	ID         string  `json:"id"`
	IsDefault  bool    `json:"is_default"`
	Name       string  `json:"name"`
	Zone       zoneRef `json:"zone"`
}

type securityGroupShape struct {
	CreatedAt     string        `json:"created_at"`
	CRN           string        `json:"crn"`
	Href          string        `json:"href"`
	ID            string        `json:"id"`
	Name          string        `json:"name"`
	ResourceGroup groupRef      `json:"resource_group"`
	Rules         []ruleShape   `json:"rules"`
	Targets       []memberShape `json:"targets"`
	VPC           reference     `json:"vpc"`
}

// memberShape is a member of a security group: a network interface, or a
// virtual one, which says more.
type memberShape struct {
	CRN          string      `json:"crn,omitempty"`
	Href         string      `json:"href"`
	ID           string      `json:"id"`
	Name         string      `json:"name"`
	PrimaryIP    *reservedIP `json:"primary_ip,omitempty"`
	ResourceType string      `json:"resource_type"`
	Subnet       *reference  `json:"subnet,omitempty"`
}

type ruleShape struct {
	Code         *int     `json:"code,omitempty"`
	Direction    string   `json:"direction"`
	Href         string   `json:"href"`
	ID           string   `json:"id"`
	IPVersion    string   `json:"ip_version"`
	Local        endShape `json:"local"`
	Name         string   `json:"name"`
	PortMax      int      `json:"port_max,omitempty"`
	PortMin      int      `json:"port_min,omitempty"`
	Protocol     string   `json:"protocol"`
	Remote       endShape `json:"remote"`
	ResourceType string   `json:"resource_type"`
	Type         *int     `json:"type,omitempty"`
}

// endShape is one end of a rule's packets: an address, a range, or a security
// group.
type endShape struct {
	Address   string `json:"address,omitempty"`
	CIDRBlock string `json:"cidr_block,omitempty"`
	CRN       string `json:"crn,omitempty"`
	Href      string `json:"href,omitempty"`
	ID        string `json:"id,omitempty"`
	Name      string `json:"name,omitempty"`
}

type subnetShape struct {
	AvailableAddresses int       `json:"available_ipv4_address_count"`
	CreatedAt          string    `json:"created_at"`
	CRN                string    `json:"crn"`
	Href               string    `json:"href"`
	ID                 string    `json:"id"`
	IPVersion          string    `json:"ip_version"`
	CIDR               string    `json:"ipv4_cidr_block"`
	Name               string    `json:"name"`
	NetworkACL         reference `json:"network_acl"`
	ResourceGroup      groupRef  `json:"resource_group"`
	ResourceType       string    `json:"resource_type"`
	RoutingTable       reference `json:"routing_table"`
	Status             string    `json:"status"`
	TotalAddresses     int       `json:"total_ipv4_address_count"`
	VPC                reference `json:"vpc"`
	Zone               zoneRef   `json:"zone"`
}

type keyShape struct {
	CreatedAt     string   `json:"created_at"`
	CRN           string   `json:"crn"`
	Fingerprint   string   `json:"fingerprint"`
	Href          string   `json:"href"`
	ID            string   `json:"id"`
	Length        int      `json:"length"`
	Name          string   `json:"name"`
	PublicKey     string   `json:"public_key"`
	ResourceGroup groupRef `json:"resource_group"`
	Type          string   `json:"type"`
}

// keyRef is how an instance's initialization mentions a key.
type keyRef struct {
	CRN         string `json:"crn"`
	Fingerprint string `json:"fingerprint"`
	Href        string `json:"href"`
	ID          string `json:"id"`
	Name        string `json:"name"`
}

type imageShape struct {
	AllowedUse             allowedUse     `json:"allowed_use"`
	CatalogOffering        offering       `json:"catalog_offering"`
	CreatedAt              string         `json:"created_at"`
	CRN                    string         `json:"crn"`
	Encryption             string         `json:"encryption"`
	File                   fileShape      `json:"file"`
	Href                   string         `json:"href"`
	ID                     string         `json:"id"`
	MinimumProvisionedSize int            `json:"minimum_provisioned_size"` // GB
	Name                   string         `json:"name"`
	OperatingSystem        systemShape    `json:"operating_system"`
	ResourceGroup          groupRef       `json:"resource_group"`
	ResourceType           string         `json:"resource_type"`
	Status                 string         `json:"status"`
	StatusReasons          []statusReason `json:"status_reasons"`
	UserDataFormat         string         `json:"user_data_format"`
	Visibility             string         `json:"visibility"`
}

// fileShape is the file of an image; the stock image has none.
type fileShape struct {
	Checksums *checksums `json:"checksums,omitempty"`
	Size      int        `json:"size,omitempty"` // GB, rounded up
}

type checksums struct {
	SHA256 string `json:"sha256"`
}

// allowedUse holds expressions of IBM's own language; true and false are some.
type allowedUse struct {
	APIVersion      string `json:"api_version"`
	BareMetalServer string `json:"bare_metal_server"`
	Instance        string `json:"instance"`
}

type offering struct {
	Managed bool `json:"managed"`
}

type systemShape struct {
	AllowUserImageCreation bool   `json:"allow_user_image_creation"`
	Architecture           string `json:"architecture"`
	DedicatedHostOnly      bool   `json:"dedicated_host_only"`
	DisplayName            string `json:"display_name"`
	Family                 string `json:"family"`
	Href                   string `json:"href"`
	Name                   string `json:"name"`
	UserDataFormat         string `json:"user_data_format"`
	Vendor                 string `json:"vendor"`
	Version                string `json:"version"`
}

// typed, fixedValue, enumValue and countRange are how a hardware profile
// describes what its instances have.
type typed struct {
	Type string `json:"type"`
}

type fixedValue struct {
	Type  string `json:"type"`
	Value any    `json:"value"`
}

type enumValue struct {
	Default any    `json:"default"`
	Type    string `json:"type"`
	Values  []any  `json:"values"`
}

type countRange struct {
	Max  int    `json:"max"`
	Min  int    `json:"min"`
	Type string `json:"type"`
}

type terms struct {
	Type   string   `json:"type"`
	Values []string `json:"values"`
}

func fixed(v any) fixedValue { return fixedValue{"fixed", v} }

func enum(only any) enumValue { return enumValue{only, "enum", []any{only}} }

type profileShape struct {
	AvailabilityClass             fixedValue `json:"availability_class"`
	Bandwidth                     fixedValue `json:"bandwidth"`
	ClusterNetworkAttachmentCount typed      `json:"cluster_network_attachment_count"`
	ConfidentialComputeModes      enumValue  `json:"confidential_compute_modes"`
	Disks                         []any      `json:"disks"`
	Family                        string     `json:"family"`
	Href                          string     `json:"href"`
	Memory                        fixedValue `json:"memory"`
	Name                          string     `json:"name"`
	NetworkAttachmentCount        countRange `json:"network_attachment_count"`
	NetworkBandwidthMode          fixedValue `json:"network_bandwidth_mode"`
	NetworkInterfaceCount         countRange `json:"network_interface_count"`
	OSArchitecture                enumValue  `json:"os_architecture"`
	PortSpeed                     fixedValue `json:"port_speed"`
	ReservationTerms              terms      `json:"reservation_terms"`
	ResourceType                  string     `json:"resource_type"`
	SecureBootModes               enumValue  `json:"secure_boot_modes"`
	Status                        string     `json:"status"`
	SupportedClusterNetworks      []any      `json:"supported_cluster_network_profiles"`
	TotalVolumeBandwidth          fixedValue `json:"total_volume_bandwidth"`
	VCPUArchitecture              fixedValue `json:"vcpu_architecture"`
	VCPUBurstLimit                fixedValue `json:"vcpu_burst_limit"`
	VCPUCount                     fixedValue `json:"vcpu_count"`
	VCPUManufacturer              fixedValue `json:"vcpu_manufacturer"`
	VCPUPercentage                enumValue  `json:"vcpu_percentage"`
	VolumeBandwidthQoSModes       enumValue  `json:"volume_bandwidth_qos_modes"`
}

type floatingIPShape struct {
	Address       string       `json:"address"`
	CreatedAt     string       `json:"created_at"`
	CRN           string       `json:"crn"`
	Href          string       `json:"href"`
	ID            string       `json:"id"`
	Name          string       `json:"name"`
	ResourceGroup groupRef     `json:"resource_group"`
	Status        string       `json:"status"`
	Target        *boundTarget `json:"target,omitempty"`
	Zone          zoneRef      `json:"zone"`
}

// boundTarget is the interface that a floating IP is bound to; a virtual one has
// a CRN and says its subnet.
type boundTarget struct {
	CRN          string     `json:"crn,omitempty"`
	Href         string     `json:"href"`
	ID           string     `json:"id"`
	Name         string     `json:"name"`
	PrimaryIP    reservedIP `json:"primary_ip"`
	ResourceType string     `json:"resource_type"`
	Subnet       *reference `json:"subnet,omitempty"`
}

type reservedIP struct {
	Address      string `json:"address"`
	Href         string `json:"href"`
	ID           string `json:"id"`
	Name         string `json:"name"`
	ResourceType string `json:"resource_type"`
}

// floatingIPRef is how an interface mentions a floating IP.
type floatingIPRef struct {
	Address string `json:"address"`
	CRN     string `json:"crn"`
	Href    string `json:"href"`
	ID      string `json:"id"`
	Name    string `json:"name"`
}

type interfaceShape struct {
	AllowIPSpoofing bool            `json:"allow_ip_spoofing"`
	CreatedAt       string          `json:"created_at"`
	FloatingIPs     []floatingIPRef `json:"floating_ips"`
	Href            string          `json:"href"`
	ID              string          `json:"id"`
	Name            string          `json:"name"`
	PortSpeed       int             `json:"port_speed"`
	PrimaryIP       reservedIP      `json:"primary_ip"`
	ResourceType    string          `json:"resource_type"`
	SecurityGroups  []reference     `json:"security_groups"`
	Status          string          `json:"status"`
	Subnet          reference       `json:"subnet"`
	Type            string          `json:"type"`
}

// interfaceRef is how an instance mentions its interfaces.
type interfaceRef struct {
	Href         string     `json:"href"`
	ID           string     `json:"id"`
	Name         string     `json:"name"`
	PrimaryIP    reservedIP `json:"primary_ip"`
	ResourceType string     `json:"resource_type"`
	Subnet       reference  `json:"subnet"`
}

// attachmentRef is how an instance mentions its network attachments.
type attachmentRef struct {
	Href                    string     `json:"href"`
	ID                      string     `json:"id"`
	Name                    string     `json:"name"`
	PrimaryIP               reservedIP `json:"primary_ip"`
	ResourceType            string     `json:"resource_type"`
	Subnet                  reference  `json:"subnet"`
	VirtualNetworkInterface reference  `json:"virtual_network_interface"`
}

type attachmentShape struct {
	attachmentRef
	CreatedAt      string `json:"created_at"`
	LifecycleState string `json:"lifecycle_state"`
	PortSpeed      int    `json:"port_speed"`
	Type           string `json:"type"`
}

type virtualShape struct {
	AllowIPSpoofing            bool         `json:"allow_ip_spoofing"`
	AutoDelete                 bool         `json:"auto_delete"`
	CreatedAt                  string       `json:"created_at"`
	CRN                        string       `json:"crn"`
	EnableInfrastructureNAT    bool         `json:"enable_infrastructure_nat"`
	Href                       string       `json:"href"`
	ID                         string       `json:"id"`
	IPs                        []reservedIP `json:"ips"`
	LifecycleState             string       `json:"lifecycle_state"`
	MACAddress                 string       `json:"mac_address"`
	Name                       string       `json:"name"`
	PrimaryIP                  reservedIP   `json:"primary_ip"`
	ProtocolStateFilteringMode string       `json:"protocol_state_filtering_mode"`
	ResourceGroup              groupRef     `json:"resource_group"`
	ResourceType               string       `json:"resource_type"`
	SecurityGroups             []reference  `json:"security_groups"`
	Subnet                     reference    `json:"subnet"`
	Target                     memberShape  `json:"target"`
	VPC                        reference    `json:"vpc"`
	Zone                       zoneRef      `json:"zone"`
}

// reservedShape is a reserved IP in its subnet.
type reservedShape struct {
	reservedIP
	AutoDelete     bool        `json:"auto_delete"`
	CreatedAt      string      `json:"created_at"`
	LifecycleState string      `json:"lifecycle_state"`
	Owner          string      `json:"owner"`
	Target         memberShape `json:"target"`
}

type volumeProfileRef struct {
	Href string `json:"href"`
	Name string `json:"name"`
}

type volumeShape struct {
	Active                   bool             `json:"active"`
	AdjustableCapacityStates []string         `json:"adjustable_capacity_states"`
	AdjustableIOPSStates     []string         `json:"adjustable_iops_states"`
	AttachmentState          string           `json:"attachment_state"`
	Bandwidth                int              `json:"bandwidth"` // Mbps
	Busy                     bool             `json:"busy"`
	Capacity                 int              `json:"capacity"` // GB
	CreatedAt                string           `json:"created_at"`
	CRN                      string           `json:"crn"`
	Encryption               string           `json:"encryption"`
	HealthReasons            []any            `json:"health_reasons"`
	HealthState              string           `json:"health_state"`
	Href                     string           `json:"href"`
	ID                       string           `json:"id"`
	IOPS                     int              `json:"iops"`
	Name                     string           `json:"name"`
	OperatingSystem          *systemShape     `json:"operating_system,omitempty"`
	Profile                  volumeProfileRef `json:"profile"`
	ResourceGroup            groupRef         `json:"resource_group"`
	ResourceType             string           `json:"resource_type"`
	SourceImage              *reference       `json:"source_image,omitempty"`
	Status                   string           `json:"status"`
	StatusReasons            []any            `json:"status_reasons"`
	StorageGeneration        int              `json:"storage_generation"`
	UserTags                 []string         `json:"user_tags"`
	VolumeAttachments        []volumeUseShape `json:"volume_attachments"`
	Zone                     zoneRef          `json:"zone"`
}

// volumeUseShape is how a volume mentions its attachment to an instance.
type volumeUseShape struct {
	DeleteVolumeOnInstanceDelete bool        `json:"delete_volume_on_instance_delete"`
	Device                       deviceShape `json:"device"`
	Href                         string      `json:"href"`
	ID                           string      `json:"id"`
	Instance                     reference   `json:"instance"`
	Name                         string      `json:"name"`
	Type                         string      `json:"type"`
}

type sizeRange struct {
	Default int    `json:"default"`
	Max     int    `json:"max"`
	Min     int    `json:"min"`
	Step    int    `json:"step"`
	Type    string `json:"type"`
}

type volumeProfileShape struct {
	AdjustableCapacityStates terms      `json:"adjustable_capacity_states"`
	AdjustableIOPSStates     terms      `json:"adjustable_iops_states"`
	Bandwidth                fixedValue `json:"bandwidth"`
	BootCapacity             sizeRange  `json:"boot_capacity"`
	Capacity                 sizeRange  `json:"capacity"`
	Family                   string     `json:"family"`
	Href                     string     `json:"href"`
	IOPS                     typed      `json:"iops"`
	Name                     string     `json:"name"`
	StorageGeneration        fixedValue `json:"storage_generation"`
}

type volumeAttachmentRef struct {
	Device deviceShape `json:"device"`
	Href   string      `json:"href"`
	ID     string      `json:"id"`
	Name   string      `json:"name"`
	Volume reference   `json:"volume"`
}

type deviceShape struct {
	ID string `json:"id"`
}

type volumeAttachmentShape struct {
	Bandwidth                    int         `json:"bandwidth"`
	CreatedAt                    string      `json:"created_at"`
	DeleteVolumeOnInstanceDelete bool        `json:"delete_volume_on_instance_delete"`
	Device                       deviceShape `json:"device"`
	Href                         string      `json:"href"`
	ID                           string      `json:"id"`
	Name                         string      `json:"name"`
	Status                       string      `json:"status"`
	Type                         string      `json:"type"`
	Volume                       reference   `json:"volume"`
}

type instanceShape struct {
	Availability              availabilityShape     `json:"availability"`
	AvailabilityPolicy        availabilityPolicy    `json:"availability_policy"`
	Bandwidth                 int                   `json:"bandwidth"`
	BootVolumeAttachment      *volumeAttachmentRef  `json:"boot_volume_attachment,omitempty"` // only missing where somebody else made the machine
	ClusterNetworkAttachments []any                 `json:"cluster_network_attachments"`
	ConfidentialComputeMode   string                `json:"confidential_compute_mode"`
	CreatedAt                 string                `json:"created_at"`
	CRN                       string                `json:"crn"`
	Disks                     []any                 `json:"disks"`
	EnableSecureBoot          bool                  `json:"enable_secure_boot"`
	HealthReasons             []any                 `json:"health_reasons"`
	HealthState               string                `json:"health_state"`
	Href                      string                `json:"href"`
	ID                        string                `json:"id"`
	Image                     *reference            `json:"image,omitempty"`
	LifecycleReasons          []any                 `json:"lifecycle_reasons"`
	LifecycleState            string                `json:"lifecycle_state"`
	Memory                    int                   `json:"memory"` // GiB
	MetadataService           metadataShape         `json:"metadata_service"`
	Name                      string                `json:"name"`
	NetworkAttachments        []attachmentRef       `json:"network_attachments"`
	NetworkInterfaces         []interfaceRef        `json:"network_interfaces"`
	PrimaryNetworkAttachment  *attachmentRef        `json:"primary_network_attachment,omitempty"`
	PrimaryNetworkInterface   interfaceRef          `json:"primary_network_interface"`
	Profile                   profileRef            `json:"profile"`
	ReservationAffinity       reservationAffinity   `json:"reservation_affinity"`
	ResourceGroup             groupRef              `json:"resource_group"`
	ResourceType              string                `json:"resource_type"`
	Startable                 bool                  `json:"startable"`
	Status                    string                `json:"status"`
	StatusReasons             []statusReason        `json:"status_reasons"`
	TotalNetworkBandwidth     int                   `json:"total_network_bandwidth"`
	TotalVolumeBandwidth      int                   `json:"total_volume_bandwidth"`
	VCPU                      vcpuShape             `json:"vcpu"`
	VolumeAttachments         []volumeAttachmentRef `json:"volume_attachments"`
	VolumeBandwidthQoSMode    string                `json:"volume_bandwidth_qos_mode"`
	VPC                       reference             `json:"vpc"`
	Zone                      zoneRef               `json:"zone"`
}

type availabilityShape struct {
	Class string `json:"class"`
}

type availabilityPolicy struct {
	HostFailure string `json:"host_failure"`
	Preemption  string `json:"preemption"`
}

type metadataShape struct {
	Enabled          bool   `json:"enabled"`
	Protocol         string `json:"protocol"`
	ResponseHopLimit int    `json:"response_hop_limit"`
}

type reservationAffinity struct {
	Policy string `json:"policy"`
	Pool   []any  `json:"pool"`
}

type statusReason struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

type vcpuShape struct {
	Architecture string    `json:"architecture"`
	Burst        vcpuBurst `json:"burst"`
	Count        int       `json:"count"`
	Manufacturer string    `json:"manufacturer"`
	Percentage   int       `json:"percentage"`
}

type vcpuBurst struct {
	Limit int `json:"limit"`
}

type initializationShape struct {
	DefaultTrustedProfile *defaultProfileShape `json:"default_trusted_profile,omitempty"`
	Keys                  []keyRef             `json:"keys"`
}

type defaultProfileShape struct {
	AutoLink bool               `json:"auto_link"`
	Target   trustedProfileRefs `json:"target"`
}

type trustedProfileRefs struct {
	CRN          string `json:"crn"`
	ID           string `json:"id"`
	ResourceType string `json:"resource_type"`
}

type actionShape struct {
	CreatedAt string `json:"created_at"`
	Force     bool   `json:"force"`
	Href      string `json:"href"`
	ID        string `json:"id"`
	Status    string `json:"status"`
	Type      string `json:"type"`
}

// shown makes the route's last step out of a shape.
func shown[T any](show func(*T) any, tag func(*T) string) func(*api.Call, *T) (api.Reply, error) {
	return func(_ *api.Call, obj *T) (api.Reply, error) {
		r := api.Reply{Body: show(obj)}
		if tag != nil {
			r.ETag = tag(obj)
		}
		return r, nil
	}
}
