package vpcapi_test

import (
	"context"
	"net/netip"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/vpc"
)

// attachedTo is the body of an instance with a network attachment.
func attachedTo(subnetID string, virtual object) object {
	v := object{"subnet": object{"id": subnetID}}
	for k, x := range virtual {
		v[k] = x
	}
	body := instanceIn(subnetID, object{"primary_network_attachment": object{"name": "primary-nac", "virtual_network_interface": v}})
	delete(body, "primary_network_interface")
	return body
}

func TestAnInstanceWithNetworkAttachmentsShowsThemAndReadOnlyInterfaces(t *testing.T) {
	w := newWorld(t)
	v, subnetID := w.network(16)
	web := text(w.post("/security_groups", object{"name": "web", "vpc": object{"id": v}}), "id")
	made := w.post("/instances", attachedTo(subnetID, object{
		"name": "my-vni", "primary_ip": object{"address": "10.240.128.9", "name": "my-ip"}, "security_groups": []any{object{"id": web}},
		"auto_delete": true, "allow_ip_spoofing": false, "protocol_state_filtering_mode": "auto",
	}))
	id, vni, nac := text(made, "id"), text(made, "primary_network_attachment", "virtual_network_interface", "id"), text(made, "primary_network_attachment", "id")
	wantNames(t, "attachment in the instance", made["primary_network_attachment"], "href id name primary_ip resource_type subnet virtual_network_interface")
	if len(items(made, "network_attachments")) != 1 || len(items(made, "network_interfaces")) != 1 ||
		text(made, "primary_network_interface", "primary_ip", "address") != "10.240.128.9" || text(made, "primary_network_interface", "name") != "primary-nac" {
		t.Errorf("instance: %v", made)
	}
	one := w.get("/instances/" + id + "/network_attachments/" + nac)
	wantNames(t, "attachment", one, "created_at href id lifecycle_state name port_speed primary_ip resource_type subnet type virtual_network_interface")
	if n := len(items(w.get("/instances/"+id+"/network_attachments"), "network_attachments")); n != 1 {
		t.Errorf("%d attachments are listed", n)
	}
	virtual := w.get("/virtual_network_interfaces/" + vni)
	wantNames(t, "virtual network interface", virtual, `allow_ip_spoofing auto_delete created_at crn enable_infrastructure_nat href id ips lifecycle_state
		mac_address name primary_ip protocol_state_filtering_mode resource_group resource_type security_groups subnet target vpc zone`)
	if virtual["name"] != "my-vni" || text(virtual, "target", "id") != nac || text(virtual, "security_groups", 0, "name") != "web" || text(virtual, "primary_ip", "name") != "my-ip" {
		t.Errorf("virtual network interface: %v", virtual)
	}
	if want := "crn:v1:bluemix:public:is:us-south-3:a/" + w.Owner.AccountID + "::virtual-network-interface:" + vni; virtual["crn"] != want {
		t.Errorf("CRN %v", virtual["crn"])
	}
	if list := w.get("/virtual_network_interfaces"); list["total_count"] != 1.0 || text(list, "virtual_network_interfaces", 0, "id") != vni {
		t.Errorf("list: %v", list)
	}
	if target := w.get("/security_groups/" + web + "/targets/" + vni); text(target, "resource_type") != "virtual_network_interface" || text(target, "crn") == "" {
		t.Errorf("target of the group: %v", target)
	}
	if ips := w.get("/virtual_network_interfaces/" + vni + "/ips"); text(ips, "ips", 0, "address") != "10.240.128.9" {
		t.Errorf("ips: %v", ips)
	}
	renamed := w.call("", "PATCH", "/virtual_network_interfaces/"+vni, object{"name": "renamed"}).Want(200)
	if renamed["name"] != "renamed" {
		t.Errorf("renamed: %v", renamed["name"])
	}
	wantError(t, w.call("", "PATCH", "/virtual_network_interfaces/"+vni, object{"allow_ip_spoofing": true}), 400, "bad_field")
	plain := w.post("/instances", instanceIn(subnetID, nil))
	if plain["primary_network_attachment"] != nil || len(items(plain, "network_attachments")) != 0 {
		t.Errorf("an instance with interfaces shows attachments: %v", plain["network_attachments"])
	}
	wantError(t, w.call("", "GET", "/instances/"+text(plain, "id")+"/network_attachments/"+text(plain, "primary_network_interface", "id"), nil), 404, "not_found")
}

func TestRulesOfNetworkAttachments(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	w.post("/instances", attachedTo(subnetID, object{"name": "taken"}))
	vni := text(w.get("/virtual_network_interfaces"), "virtual_network_interfaces", 0, "id")
	both := attachedTo(subnetID, nil)
	both["primary_network_interface"] = object{"subnet": object{"id": subnetID}}
	onlyMore := instanceIn(subnetID, object{"network_attachments": []any{object{"virtual_network_interface": object{"subnet": object{"id": subnetID}}}}})
	delete(onlyMore, "primary_network_interface")
	for _, test := range []struct {
		body   object
		status int
		code   string
	}{
		{both, 400, "bad_field"},
		{onlyMore, 400, "validation_required_field"},
		{attachedTo(subnetID, object{"id": vni}), 400, "bad_field"},
		{attachedTo(subnetID, object{"name": "taken"}), 409, "validation_unique_failed"},
		{attachedTo(subnetID, object{"name": "-"}), 400, "validation_invalid_name"},
		{attachedTo(subnetID, object{"auto_delete": false}), 400, "bad_field"},
		{attachedTo(subnetID, object{"allow_ip_spoofing": true}), 400, "bad_field"},
		{attachedTo(subnetID, object{"enable_infrastructure_nat": false}), 400, "bad_field"},
		{attachedTo(subnetID, object{"protocol_state_filtering_mode": "disabled"}), 400, "bad_field"},
		{attachedTo(subnetID, object{"ips": []any{object{"address": "10.240.128.7"}}}), 400, "bad_field"},
		{attachedTo(subnetID, object{"resource_group": object{"id": "other"}}), 400, "bad_field"},
		{attachedTo("none", nil), 404, "not_found"},
	} {
		wantError(t, w.call("", "POST", "/instances", test.body), test.status, test.code)
	}
	w.Grant(operator, "is.instance", "Editor")
	for _, service := range []string{"is.image", "is.subnet", "is.vpc", "is.security-group"} {
		w.Grant(operator, service, "Operator")
	}
	w.Grant(operator, "is.volume", "Editor")
	wantError(t, w.call(operator, "POST", "/instances", attachedTo(subnetID, nil)), 403, "not_authorized")
	w.Grant(operator, "is.virtual-network-interface", "Editor")
	w.call(operator, "POST", "/instances", attachedTo(subnetID, nil)).Want(201)
}

func TestAFloatingIPIsBoundToAVirtualNetworkInterfaceOnlyWhenBothAreFree(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	made := w.post("/instances", attachedTo(subnetID, nil))
	vni := text(made, "primary_network_attachment", "virtual_network_interface", "id")
	other := text(w.post("/instances", attachedTo(subnetID, nil)), "primary_network_attachment", "virtual_network_interface", "id")
	zone := object{"zone": object{"name": "us-south-3"}}
	first, second := text(w.post("/floating_ips", zone), "id"), text(w.post("/floating_ips", zone), "id")
	bind := func(vni, fip string) *apitest.Response {
		return w.call("", "PUT", "/virtual_network_interfaces/"+vni+"/floating_ips/"+fip, nil)
	}
	wantNames(t, "bound", bind(vni, first).Want(200), "address crn href id name")
	bind(vni, first).Want(200)
	wantError(t, bind(vni, second), 409, "target_in_use")
	wantError(t, bind(other, first), 409, "floating_ip_in_use")
	wantError(t, bind("none", second), 404, "not_found")
	f := w.get("/floating_ips/" + first)
	wantNames(t, "target", f["target"], "crn href id name primary_ip resource_type subnet")
	if text(f, "target", "id") != vni || text(f, "target", "resource_type") != "virtual_network_interface" {
		t.Errorf("target: %v", f["target"])
	}
	if n := len(items(w.get("/floating_ips?target.id="+vni), "floating_ips")); n != 1 {
		t.Errorf("%d floating IPs by target", n)
	}
	bound := "/virtual_network_interfaces/" + vni + "/floating_ips"
	if list := w.get(bound); text(list, "floating_ips", 0, "id") != first || list["total_count"] != 1.0 {
		t.Errorf("bound: %v", list)
	}
	w.get(bound + "/" + first)
	wantError(t, w.call("", "GET", bound+"/"+second, nil), 404, "not_found")
	w.call("", "DELETE", bound+"/"+first, nil).Want(204)
	for _, target := range []object{
		{"id": vni}, {"crn": w.get("/virtual_network_interfaces/" + vni)["crn"]}, {"href": "https://x/v1/virtual_network_interfaces/" + vni},
	} {
		moved := w.call("", "PATCH", "/floating_ips/"+second, object{"target": target}).Want(200)
		if text(moved, "target", "id") != vni {
			t.Errorf("bound by %v to %v", target, moved["target"])
		}
		w.call("", "PATCH", "/floating_ips/"+second, object{"target": target}).Want(200)
		w.call("", "PATCH", "/floating_ips/"+second, object{"target": nil}).Want(200)
	}
}

func TestVolumesAreTheBootVolumesOfInstances(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	made := w.post("/instances", instanceIn(subnetID, nil))
	w.post("/instances", instanceIn(subnetID, nil))
	id := text(made, "boot_volume_attachment", "volume", "id")
	v := w.get("/volumes/" + id)
	wantNames(t, "volume", v, `active adjustable_capacity_states adjustable_iops_states attachment_state bandwidth busy capacity created_at crn encryption
		health_reasons health_state href id iops name operating_system profile resource_group resource_type source_image status status_reasons
		storage_generation user_tags volume_attachments zone`)
	if text(v, "volume_attachments", 0, "instance", "id") != text(made, "id") || text(v, "source_image", "id") != stockImage {
		t.Errorf("volume: %v", v)
	}
	renamed := w.call("", "PATCH", "/volumes/"+id, object{"name": "my-volume"}).Want(200)
	if renamed["name"] != "my-volume" || text(w.get("/instances/"+text(made, "id")), "boot_volume_attachment", "volume", "name") != "my-volume" {
		t.Errorf("renamed: %v", renamed["name"])
	}
	wantError(t, w.call("", "PATCH", "/volumes/"+id, object{"capacity": 100}), 400, "bad_field")
	wantError(t, w.call("", "GET", "/volumes/none", nil), 404, "not_found")
	if list := w.get("/volumes?name=my-volume&zone.name=us-south-3&attachment_state=attached"); list["total_count"] != 1.0 {
		t.Errorf("volumes by name: %v", list["total_count"])
	}
	if list := w.get("/volumes?attachment_state=unattached"); list["total_count"] != 0.0 {
		t.Errorf("unattached volumes: %v", list["total_count"])
	}
	profile := w.get("/volume/profiles/general-purpose")
	wantNames(t, "volume profile", profile, "adjustable_capacity_states adjustable_iops_states bandwidth boot_capacity capacity family href iops name storage_generation")
	if list := w.get("/volume/profiles"); list["total_count"] != 1.0 {
		t.Errorf("volume profiles: %v", list)
	}
}

func TestHardwareProfilesArePagedFromTheirVersionOn(t *testing.T) {
	w := newWorld(t)
	if list := w.atVersion("2026-04-06", "GET", "/instance/profiles", nil).Want(200); list["first"] != nil || len(items(list, "profiles")) != len(vpc.InstanceProfiles) {
		t.Errorf("before: %v", list["first"])
	}
	list := w.atVersion("2026-04-07", "GET", "/instance/profiles", nil).Want(200)
	wantNames(t, "list", list, "first limit profiles total_count")
	if list["total_count"] != float64(len(vpc.InstanceProfiles)) {
		t.Errorf("total_count %v", list["total_count"])
	}
}

func TestAMachineThatSomebodyElseRunsIsNeitherStartedNorStoppedNorResized(t *testing.T) {
	w := newWorld(t)
	v, subnetID := w.network(16)
	adopted := &vpc.Instance{
		ID: "0737_11111111-2222-4333-8444-555555555555", CRN: "crn:v1:bluemix:public:is:us-south-3:a/" + w.Owner.AccountID + "::instance:0737_11111111-2222-4333-8444-555555555555",
		AccountID: w.Owner.AccountID, Name: "adopted", VPCID: v, Zone: "us-south-3", ResourceGroupID: text(w.get("/vpcs/"+v), "resource_group", "id"),
		Status: vpc.Running, Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1}, External: &vpc.External{Device: "vnet0"},
		Interfaces: []vpc.Interface{{ID: "0737-22222222-2222-4333-8444-555555555555", Name: "eth0", SubnetID: subnetID, Address: netip.MustParseAddr("10.240.128.7"), IPID: "ip", IPName: "ip"}},
	}
	if err := w.d.Update(context.Background(), "", func(tx *directory.Tx) error { w.d.Instances.Put(tx, adopted); return nil }); err != nil {
		t.Fatal(err)
	}
	p := "/instances/" + adopted.ID
	shown := w.get(p)
	if shown["image"] != nil || shown["boot_volume_attachment"] != nil || shown["startable"] != false || len(items(shown, "volume_attachments")) != 0 {
		t.Errorf("shown: %v", shown)
	}
	for _, p := range []string{p + "/initialization", p + "/network_interfaces", p + "/volume_attachments", "/volumes", "/instances", "/subnets/" + subnetID} {
		w.get(p)
	}
	for _, action := range []string{"start", "stop", "reboot"} {
		wantError(t, w.call("", "POST", p+"/actions", object{"type": action, "force": true}), 409, "invalid_state")
	}
	wantError(t, w.call("", "PATCH", p, object{"profile": object{"name": "bx2-2x8"}}), 409, "invalid_state")
	w.call("", "PATCH", p, object{"name": "renamed", "metadata_service": object{"enabled": false}}).Want(200)
	w.call("", "DELETE", p, nil).Want(204)
}

func TestAForcedActionIsRememberedAndActsOnWhatIsUnderWay(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	id := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	act := func(kind string, force bool) *apitest.Response {
		return w.call("", "POST", "/instances/"+id+"/actions", object{"type": kind, "force": force})
	}
	w.setStatus(id, vpc.Running)
	act("stop", false).Want(201)
	if i, _ := w.d.Instances.Get(id); i.Force || i.Status != vpc.Stopping {
		t.Errorf("stopping: %v %v", i.Status, i.Force)
	}
	wantError(t, act("stop", false), 409, "invalid_state")
	act("stop", true).Want(201)
	if i, _ := w.d.Instances.Get(id); !i.Force || i.Status != vpc.Stopping {
		t.Errorf("forced: %v %v", i.Status, i.Force)
	}
	w.setStatus(id, vpc.Stopped)
	act("start", true).Want(201)
	if i, _ := w.d.Instances.Get(id); i.Force || i.Status != vpc.Starting {
		t.Errorf("starting: %v %v", i.Status, i.Force)
	}
}

func TestReservedIPsAreThoseOfInterfaces(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	made := w.post("/instances", instanceIn(subnetID, nil))
	ip := text(made, "primary_network_interface", "primary_ip", "id")
	list := w.get("/subnets/" + subnetID + "/reserved_ips")
	if list["total_count"] != 1.0 || text(list, "reserved_ips", 0, "id") != ip {
		t.Errorf("reserved IPs: %v", list)
	}
	one := w.get("/subnets/" + subnetID + "/reserved_ips/" + ip)
	wantNames(t, "reserved IP", one, "address auto_delete created_at href id lifecycle_state name owner resource_type target")
	wantError(t, w.call("", "GET", "/subnets/"+subnetID+"/reserved_ips/none", nil), 404, "not_found")
	nic := "/instances/" + text(made, "id") + "/network_interfaces/" + text(made, "primary_network_interface", "id")
	if got := w.call("", "PATCH", nic, object{"name": "renamed"}).Want(200); got["name"] != "renamed" {
		t.Errorf("renamed: %v", got["name"])
	}
	wantError(t, w.call("", "PATCH", nic, object{"allow_ip_spoofing": true}), 400, "bad_field")
}
