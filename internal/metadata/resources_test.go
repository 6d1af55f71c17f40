package metadata_test

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/vpc"
)

// get asks for a path of the metadata service with the instance's own token.
func (s *stack) get(path string) *answer {
	s.T.Helper()
	return s.ask(ask{path: "/metadata/v1" + path + "?" + version, bearer: s.identityToken()})
}

func TestTheInstanceShapeIsComplete(t *testing.T) {
	s := start(t)
	m := s.get("/instance").want(200)
	for _, name := range strings.Fields(`availability availability_policy bandwidth boot_volume_attachment cluster_network_attachments
		confidential_compute_mode created_at crn disks enable_secure_boot health_reasons health_state id image lifecycle_reasons
		lifecycle_state memory metadata_service name network_attachments network_interfaces numa_count primary_network_interface
		profile reservation_affinity resource_group resource_type software_attachments startable status status_reasons
		threads_per_core total_network_bandwidth total_volume_bandwidth vcpu volume_attachments volume_bandwidth_qos_mode vpc zone`) {
		if v, ok := m[name]; !ok || v == nil {
			t.Errorf("property %s is missing or null", name)
		}
	}
	i := s.instance
	for name, want := range map[string]any{
		"id": i.ID, "crn": i.CRN, "name": i.Name, "status": "running", "resource_type": "instance",
		"memory": 8.0, "bandwidth": 4000.0,
		"zone":             map[string]any{"name": "us-south-3"},
		"metadata_service": map[string]any{"enabled": true, "protocol": "http", "response_hop_limit": 1.0},
		"resource_group":   map[string]any{"id": i.ResourceGroupID, "name": "my-resources"},
		"vpc":              map[string]any{"crn": s.crn("is", "us-south", "vpc", s.vpc.ID), "id": s.vpc.ID, "name": "my-vpc", "resource_type": "vpc"},
		"image": map[string]any{
			"crn": "crn:v1:bluemix:public:is:us-south:::image:" + stockImage().ID, "id": stockImage().ID, "name": stockImage().Name,
		},
	} {
		if diff := cmp.Diff(want, m[name]); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
	if m["profile"].(map[string]any)["name"] != "bx2-2x8" {
		t.Errorf("profile %v", m["profile"])
	}
	if _, ok := m["default_trusted_profile"]; ok {
		t.Error("the default trusted profile stands in the instance; it belongs to its initialization")
	}
	nic := m["primary_network_interface"].(map[string]any)
	if diff := cmp.Diff(m["network_interfaces"], []any{any(nic)}); diff != "" {
		t.Errorf("network_interfaces:\n%s", diff)
	}
	if nic["primary_ipv4_address"] != "10.240.128.4" || nic["primary_ip"].(map[string]any)["address"] != "10.240.128.4" {
		t.Errorf("interface %v", nic)
	}
}

func TestNoReferenceCarriesAnHref(t *testing.T) {
	s := start(t)
	for _, path := range []string{"/instance", "/instance/initialization", "/instance/network_interfaces", "/instance/volume_attachments", "/keys"} {
		if a := s.get(path); strings.Contains(a.raw, `"href"`) {
			t.Errorf("%s: %s", path, a.raw)
		}
	}
}

func TestTheInitializationShowsWhatWasAskedForAtCreation(t *testing.T) {
	s := start(t)
	got := s.get("/instance/initialization").want(200)
	want := map[string]any{
		"keys": []any{map[string]any{
			"crn": s.crn("is", "us-south", "key", s.key.ID), "fingerprint": "SHA256:abc", "id": s.key.ID, "name": "my-key", "resource_type": "key",
		}},
		"default_trusted_profile": map[string]any{
			"auto_link": true,
			"target":    map[string]any{"crn": s.crn("iam-identity", "", "profile", s.profile.ID), "id": s.profile.ID, "resource_type": "trusted_profile"},
		},
		"user_data": "#!/bin/sh\necho hello\n",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	s.change(func(i *vpc.Instance) { i.DefaultProfile, i.UserData, i.KeyIDs = nil, "", nil })
	if diff := cmp.Diff(map[string]any{"keys": []any{}}, s.get("/instance/initialization").want(200)); diff != "" {
		t.Error(diff)
	}
}

func TestNetworkInterfacesShowTheirAddresses(t *testing.T) {
	s := start(t)
	second := s.instance.Interfaces[0]
	second.ID, second.Name, second.Address = "0737-"+uuid.NewString(), "second-nic", netip.MustParseAddr("10.240.128.9")
	s.change(func(i *vpc.Instance) { i.Interfaces = append(i.Interfaces, second) })
	fip := &vpc.FloatingIP{
		ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "my-fip", Zone: "us-south-3",
		Address: netip.MustParseAddr("198.51.100.9"), InstanceID: s.instance.ID, InterfaceID: s.instance.Interfaces[0].ID,
	}
	s.update(func(tx *directory.Tx) { s.d.FloatingIPs.Put(tx, fip) })
	list := s.get("/instance/network_interfaces").want(200)["network_interfaces"].([]any)
	if len(list) != 2 {
		t.Fatalf("%d interfaces", len(list))
	}
	first := list[0].(map[string]any)
	if list[1].(map[string]any)["type"] != "secondary" || first["type"] != "primary" {
		t.Errorf("types %v and %v", first["type"], list[1].(map[string]any)["type"])
	}
	delete(first, "created_at")
	nic := s.instance.Interfaces[0]
	want := map[string]any{
		"allow_ip_spoofing": false, "id": nic.ID, "name": "primary-nic", "port_speed": 1000.0, "resource_type": "network_interface",
		"status": "available", "type": "primary", "primary_ipv4_address": "10.240.128.4",
		"primary_ip":      map[string]any{"address": "10.240.128.4", "id": nic.IPID, "name": "my-ip", "resource_type": "subnet_reserved_ip"},
		"subnet":          map[string]any{"crn": s.crn("is", "us-south-3", "subnet", s.subnet.ID), "id": s.subnet.ID, "name": "my-subnet", "resource_type": "subnet"},
		"floating_ips":    []any{map[string]any{"address": "198.51.100.9", "crn": s.crn("is", "us-south-3", "floating-ip", fip.ID), "id": fip.ID, "name": "my-fip"}},
		"security_groups": []any{map[string]any{"crn": s.crn("is", "us-south", "security-group", s.vpc.SecurityGroup.ID), "id": s.vpc.SecurityGroup.ID, "name": "my-group"}},
	}
	if diff := cmp.Diff(want, first); diff != "" {
		t.Error(diff)
	}
	if m := s.get("/instance/network_interfaces/" + second.ID).want(200); m["id"] != second.ID || len(m["floating_ips"].([]any)) != 0 {
		t.Errorf("interface %v", m)
	}
	s.get("/instance/network_interfaces/0737-none").wantError(404, "not_found", "parameter id")
}

func TestVolumeAttachmentsAndKeysAreListedAndFound(t *testing.T) {
	s := start(t)
	v := s.get("/instance/volume_attachments").want(200)["volume_attachments"].([]any)[0].(map[string]any)
	for _, name := range []string{"bandwidth", "created_at", "delete_volume_on_instance_delete", "device", "id", "name", "status", "type", "volume"} {
		if v[name] == nil {
			t.Errorf("volume attachment has no %s", name)
		}
	}
	if m := s.get("/instance/volume_attachments/" + s.instance.BootVolume.AttachmentID).want(200); m["type"] != "boot" {
		t.Errorf("volume attachment %v", m)
	}
	if m := s.get("/instance/volume_attachment/" + s.instance.BootVolume.AttachmentID).want(200); m["type"] != "boot" {
		t.Errorf("under the singular path: %v", m)
	}
	s.get("/instance/volume_attachments/x").wantError(404, "not_found", "parameter id")

	k := s.get("/keys").want(200)["keys"].([]any)[0].(map[string]any)
	if k["public_key"] != "ssh-ed25519 AAAAC3" || k["length"] != 256.0 || k["type"] != "ed25519" || k["created_at"] == nil {
		t.Errorf("key %v", k)
	}
	if diff := cmp.Diff(k, s.get("/keys/"+s.key.ID).want(200)); diff != "" {
		t.Error(diff)
	}
	// A key of the account that the instance was not made with is not shown.
	other := *s.key
	other.Meta, other.ID, other.Name, other.Fingerprint = s.vpc.Meta, "r006-"+uuid.NewString(), "other", "SHA256:def"
	other.Revision = 0
	s.update(func(tx *directory.Tx) {
		s.d.Keys.Put(tx, &other)
		s.d.Keys.Delete(tx, s.key)
	})
	s.get("/keys/"+other.ID).wantError(404, "not_found", "parameter id")
	if keys := s.get("/keys").want(200)["keys"].([]any); len(keys) != 0 {
		t.Errorf("keys %v after the key was deleted", keys)
	}
}

func TestWhatDoesNotExistHereIsAnEmptyListNotNull(t *testing.T) {
	s := start(t)
	for _, name := range []string{"network_attachments", "cluster_network_attachments", "software_attachments"} {
		if diff := cmp.Diff(map[string]any{name: []any{}}, s.get("/instance/"+name).want(200)); diff != "" {
			t.Error(diff)
		}
	}
	for _, name := range []string{"/instance/network_attachments/x", "/instance/cluster_network_attachments/x", "/instance/software_attachments/x", "/placement_groups/x", "/virtual_network_interfaces/x"} {
		s.get(name).wantError(404, "not_found", "parameter id")
	}
	for _, name := range []string{"placement_groups", "virtual_network_interfaces"} {
		m := s.get("/" + name).want(200)
		if m["limit"] != 50.0 || m["total_count"] != 0.0 || len(m[name].([]any)) != 0 || m["first"].(map[string]any)["href"] == "" {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestEveryMetadataRouteNeedsTheInstancesOwnToken(t *testing.T) {
	s := start(t)
	for _, path := range []string{
		"/instance", "/instance/initialization", "/instance/network_interfaces", "/instance/network_interfaces/x",
		"/instance/volume_attachments", "/instance/volume_attachments/x", "/keys", "/keys/x",
		"/instance/network_attachments", "/instance/cluster_network_attachments", "/instance/software_attachments",
		"/placement_groups", "/placement_groups/x", "/virtual_network_interfaces", "/virtual_network_interfaces/x",
		"/instance/network_attachments/x", "/instance/cluster_network_attachments/x", "/instance/software_attachments/x", "/instance/volume_attachment/x",
	} {
		for _, bearer := range []string{"", "x.y.z"} {
			a := s.ask(ask{method: http.MethodGet, path: "/metadata/v1" + path + "?" + version, bearer: bearer})
			if a.status != 401 {
				t.Errorf("%s with bearer %q: status %d", path, bearer, a.status)
			}
		}
	}
}

// attach makes the instance one with network attachments, the first on its
// primary interface.
func (s *stack) attach(extra int) {
	s.T.Helper()
	s.change(func(i *vpc.Instance) {
		nic := &i.Interfaces[0]
		nic.AttachmentID, nic.VirtualID, nic.VirtualName = "0737-"+uuid.NewString(), "0737-"+uuid.NewString(), "my-vni"
		for n := range extra {
			more := *nic
			more.ID, more.AttachmentID, more.VirtualID = "0737-"+uuid.NewString(), "0737-"+uuid.NewString(), "0737-"+uuid.NewString()
			more.Name, more.VirtualName, more.Address = "more", "", netip.AddrFrom4([4]byte{10, 240, 128, byte(20 + n)})
			i.Interfaces = append(i.Interfaces, more)
		}
	})
}

func TestNetworkAttachmentsAreShownWithTheirVirtualInterfaces(t *testing.T) {
	s := start(t)
	s.attach(1)
	nic := s.instance.Interfaces[0]
	address := map[string]any{"address": "10.240.128.4", "id": nic.IPID, "name": "my-ip", "resource_type": "subnet_reserved_ip"}
	subnet := map[string]any{"crn": s.crn("is", "us-south-3", "subnet", s.subnet.ID), "id": s.subnet.ID, "name": "my-subnet", "resource_type": "subnet"}
	virtual := map[string]any{
		"crn": s.crn("is", "us-south-3", "virtual-network-interface", nic.VirtualID), "id": nic.VirtualID, "name": "my-vni",
		"resource_type": "virtual_network_interface",
	}
	ref := map[string]any{
		"id": nic.AttachmentID, "name": "primary-nic", "resource_type": "instance_network_attachment",
		"primary_ip": address, "subnet": subnet, "virtual_network_interface": virtual,
	}
	m := s.get("/instance").want(200)
	if diff := cmp.Diff(any(ref), m["primary_network_attachment"]); diff != "" {
		t.Errorf("primary_network_attachment:\n%s", diff)
	}
	if refs := m["network_attachments"].([]any); len(refs) != 2 || cmp.Diff(any(ref), refs[0]) != "" {
		t.Errorf("network_attachments: %v", refs)
	}
	list := s.get("/instance/network_attachments").want(200)["network_attachments"].([]any)
	if len(list) != 2 || list[0].(map[string]any)["type"] != "primary" || list[1].(map[string]any)["type"] != "secondary" {
		t.Fatalf("attachments %v", list)
	}
	one := s.get("/instance/network_attachments/" + nic.AttachmentID).want(200)
	if diff := cmp.Diff(list[0], any(one)); diff != "" {
		t.Error(diff)
	}
	for name, want := range ref {
		if diff := cmp.Diff(want, one[name]); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
	if one["lifecycle_state"] != "stable" || one["port_speed"] != 1000.0 || one["created_at"] == nil {
		t.Errorf("attachment %v", one)
	}
	vni := s.get("/virtual_network_interfaces/" + nic.VirtualID).want(200)
	for name, want := range map[string]any{
		"allow_ip_spoofing": false, "mac_address": nic.MAC, "primary_ip": address, "ips": []any{address}, "subnet": subnet, "name": "my-vni",
		"crn": virtual["crn"], "zone": map[string]any{"name": "us-south-3"},
		"target":          map[string]any{"id": nic.AttachmentID, "name": "primary-nic", "resource_type": "instance_network_attachment"},
		"security_groups": []any{map[string]any{"crn": s.crn("is", "us-south", "security-group", s.group.ID), "id": s.group.ID, "name": "my-group"}},
	} {
		if diff := cmp.Diff(want, vni[name]); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
}

func TestPagesFollowEachOther(t *testing.T) {
	s := start(t)
	s.attach(4)
	bearer := s.identityToken()
	page := func(query string) *answer {
		return s.ask(ask{path: "/metadata/v1/virtual_network_interfaces?" + version + query, bearer: bearer})
	}
	var ids []string
	for query := "&limit=2"; ; {
		m := page(query).want(200)
		if m["limit"] != 2.0 || m["total_count"] != 5.0 || m["first"].(map[string]any)["href"] != "http://169.254.169.254/metadata/v1/virtual_network_interfaces?limit=2" {
			t.Errorf("page %v", m)
		}
		for _, v := range m["virtual_network_interfaces"].([]any) {
			ids = append(ids, v.(map[string]any)["id"].(string))
		}
		next, ok := m["next"].(map[string]any)
		if !ok {
			break
		}
		_, query, _ = strings.Cut(next["href"].(string), "?")
		query = "&" + query
	}
	want := []string{}
	for _, nic := range s.instance.Interfaces {
		want = append(want, nic.VirtualID)
	}
	if diff := cmp.Diff(want, ids); diff != "" {
		t.Error(diff)
	}
	for _, limit := range []string{"0", "-1", "101", "x", "", "1e1", "9999999999999999999", "2&limit=3"} {
		page("&limit="+limit).wantError(400, "invalid_value", "parameter limit")
	}
	for _, begin := range []string{"", "x", "../keys", ids[0] + "&start=" + ids[1]} {
		page("&start="+begin).wantError(400, "invalid_value", "parameter start")
	}
	s.ask(ask{path: "/metadata/v1/placement_groups?limit=7&" + version, bearer: bearer}).want(200)
	s.ask(ask{path: "/metadata/v1/placement_groups?start=x&" + version, bearer: bearer}).wantError(400, "invalid_value", "parameter start")
}

func TestAnInterfaceShowsTheGroupsThatItIsIn(t *testing.T) {
	s := start(t)
	web := &vpc.SecurityGroup{ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, VPCID: s.vpc.ID, Name: "web"}
	s.update(func(tx *directory.Tx) { s.d.SecurityGroups.Put(tx, web) })
	s.change(func(i *vpc.Instance) { i.Interfaces[0].SecurityGroupIDs = []string{web.ID} })
	nic := s.get("/instance/network_interfaces/" + s.instance.Interfaces[0].ID).want(200)
	want := []any{map[string]any{"crn": s.crn("is", "us-south", "security-group", web.ID), "id": web.ID, "name": "web"}}
	if diff := cmp.Diff(any(want), nic["security_groups"]); diff != "" {
		t.Error(diff)
	}
}

func TestARegisteredImageIsShownAsTheAccountsOwn(t *testing.T) {
	s := start(t)
	image := &vpc.Image{ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "my-image", Architecture: "arm64"}
	s.update(func(tx *directory.Tx) { s.d.Images.Put(tx, image) })
	s.change(func(i *vpc.Instance) { i.ImageID = image.ID })
	m := s.get("/instance").want(200)
	if diff := cmp.Diff(any(map[string]any{"crn": s.crn("is", "us-south", "image", image.ID), "id": image.ID, "name": "my-image"}), m["image"]); diff != "" {
		t.Error(diff)
	}
	if m["vcpu"].(map[string]any)["architecture"] != "arm64" {
		t.Errorf("vcpu %v", m["vcpu"])
	}
}

// A machine that somebody else made has less to show, and nothing of it is null.
func TestAMachineMadeElsewhereReadsItsMetadataToo(t *testing.T) {
	s := start(t)
	s.change(func(i *vpc.Instance) {
		i.External = &vpc.External{Device: "vnet0"}
		i.ImageID, i.Profile, i.KeyIDs, i.BootVolume, i.UserData = "", "", nil, vpc.Volume{}, ""
	})
	m := s.get("/instance").want(200)
	for _, name := range []string{"image", "boot_volume_attachment"} {
		if v, ok := m[name]; ok {
			t.Errorf("%s is %v", name, v)
		}
	}
	for name, v := range m {
		if v == nil {
			t.Errorf("%s is null", name)
		}
	}
	for _, path := range []string{"/instance/volume_attachments", "/keys"} {
		if a := s.get(path); !strings.Contains(a.raw, "[]") {
			t.Errorf("%s: %s", path, a.raw)
		}
	}
	s.change(func(i *vpc.Instance) { i.Interfaces = nil })
	s.get("/instance").want(200)
	if c := claims(t, s.identityToken()); len(c["ip_addresses"].([]any)) != 0 || len(c["subnets"].([]any)) != 0 {
		t.Errorf("claims %v", c)
	}
}

func TestReadsHaveTheActionsOfTheReference(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	j := &notes{}
	s.wire(j)
	for path, action := range map[string]string{
		"/instance":                      "instance.read",
		"/instance/initialization":       "instance.initialization",
		"/keys":                          "instance-key.list",
		"/keys/" + s.key.ID:              "instance-key.get",
		"/instance/network_interfaces":   "instance-network-interface.list",
		"/instance/network_attachments":  "instance-network-attachment.list",
		"/placement_groups":              "instance-placement-group.list",
		"/instance/volume_attachments":   "instance-volume-attachment.list",
		"/instance/software_attachments": "instance-software-attachment.list",
		"/virtual_network_interfaces":    "instance-virtual-network-interface.list",
		"/instance/volume_attachments/" + s.instance.BootVolume.AttachmentID: "instance-volume-attachment.get",
		"/instance/network_interfaces/" + s.instance.Interfaces[0].ID:        "instance-network-interface.get",
	} {
		s.ask(ask{path: "/metadata/v1" + path + "?" + version, bearer: bearer}).want(200)
		s.ran(s.service)
		if got := j.of("is.metadata." + action); len(got) != 1 {
			t.Errorf("%s: %d events %s", path, len(got), action)
		}
	}
}

func TestAPathSaysWhichMethodsItAnswersTo(t *testing.T) {
	s := start(t)
	for path, method := range map[string]string{newBase + "/token": put, newBase + "/iam_tokens": http.MethodPost, "/metadata/v1/keys": http.MethodGet} {
		item := s.ask(ask{method: http.MethodDelete, path: path + "?" + version}).wantError(404, "not_found", "")
		if !strings.Contains(item["message"].(string), method+" only") {
			t.Errorf("%s: %v", path, item["message"])
		}
	}
}
