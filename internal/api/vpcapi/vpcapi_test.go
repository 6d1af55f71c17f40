package vpcapi_test

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/vpc"
)

const (
	stockImage = "r006-7e1a6f0c-52c4-4d0b-9d36-0c6f3b2a9e01"
	ed25519Key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
	operator   = "iam-Profile-11111111-2222-4333-8444-555555555555"
	nobody     = "iam-ServiceId-11111111-2222-4333-8444-666666666666"
)

type object = map[string]any

// world is an installation with the VPC API.
type world struct {
	*apitest.Env
	t *testing.T
	d *directory.Directory
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Env: apitest.New(t), t: t}
	w.d = w.Config.Directory
	vpcapi.Register(w.Mux, w.Config, vpcapi.Options{
		Place:       func(string, vpc.InstanceProfile, vpc.Image) (string, string) { return "host-1", "" },
		LocalAccess: func(id string) (any, bool) { return object{"driver": "local", "namespace": id}, true },
	})
	return w
}

// path adds the parameters that every call has.
func path(p string) string {
	separator := "?"
	if strings.Contains(p, "?") {
		separator = "&"
	}
	return "/v1" + p + separator + "version=2022-03-31&generation=2"
}

// call makes a call as somebody of the owner's account; as is empty for the
// owner.
func (w *world) call(as, method, p string, body any) *apitest.Response {
	w.t.Helper()
	return w.Do(apitest.Request{Method: method, Path: path(p), Body: body, As: as})
}

func (w *world) get(p string) object {
	w.t.Helper()
	return w.call("", http.MethodGet, p, nil).Want(200)
}

func (w *world) post(p string, body any) object {
	w.t.Helper()
	return w.call("", http.MethodPost, p, body).Want(201)
}

// network makes a VPC with a subnet of count addresses.
func (w *world) network(count int) (vpcID, subnetID string) {
	w.t.Helper()
	vpcID = text(w.post("/vpcs", object{}), "id")
	subnet := w.post("/subnets", object{"vpc": object{"id": vpcID}, "zone": object{"name": "us-south-3"}, "total_ipv4_address_count": count})
	return vpcID, text(subnet, "id")
}

func instanceIn(subnetID string, more object) object {
	body := object{
		"zone": object{"name": "us-south-3"}, "image": object{"id": stockImage}, "profile": object{"name": "bx2-2x8"},
		"primary_network_interface": object{"name": "primary-nic", "subnet": object{"id": subnetID}},
	}
	maps.Copy(body, more)
	return body
}

// setStatus does what the host does.
func (w *world) setStatus(id, status string) {
	w.t.Helper()
	err := w.d.Update(context.Background(), "host", func(tx *directory.Tx) error {
		i, ok := w.d.Instances.Get(id)
		if !ok {
			w.t.Fatalf("no instance %s", id)
		}
		changed := i.Clone()
		changed.Status = status
		w.d.Instances.Put(tx, changed)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// profile makes a trusted profile in an account.
func (w *world) profile(accountID, name string) *identity.Profile {
	w.t.Helper()
	p := &identity.Profile{ID: crn.ProfilePrefix + uuid.NewString(), AccountID: accountID, Name: name}
	err := w.d.Update(context.Background(), w.Owner.IAMID, func(tx *directory.Tx) error {
		w.d.Profiles.Put(tx, p)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// grantOn gives somebody a platform role on what has the attributes.
func (w *world) grantOn(iamID, role string, attributes map[string]string) {
	w.t.Helper()
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: w.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(iamID)}},
		Resource: []access.Attribute{{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(w.Owner.AccountID)}},
		Roles:    []string{access.PlatformRoleCRN(role)},
	}
	for k, v := range attributes {
		p.Resource = append(p.Resource, access.Attribute{Key: k, Operator: access.StringEquals, Value: access.Text(v)})
	}
	err := w.d.Update(context.Background(), w.Owner.IAMID, func(tx *directory.Tx) error {
		w.d.Policies.Put(tx, p)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// at follows names and list positions into an answer.
func at(m any, keys ...any) any {
	for _, k := range keys {
		switch k := k.(type) {
		case string:
			o, _ := m.(object)
			m = o[k]
		case int:
			a, _ := m.([]any)
			if k >= len(a) {
				return nil
			}
			m = a[k]
		}
	}
	return m
}

func text(m any, keys ...any) string {
	s, _ := at(m, keys...).(string)
	return s
}

func items(m object, name string) []any {
	a, _ := m[name].([]any)
	return a
}

// wantNames checks that an object has exactly these properties.
func wantNames(t *testing.T, what string, v any, names string) {
	t.Helper()
	o, ok := v.(object)
	if !ok {
		t.Errorf("%s is not an object: %v", what, v)
		return
	}
	want := strings.Fields(names)
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(o)); !slices.Equal(got, want) {
		t.Errorf("%s has the properties\n%v, want\n%v", what, got, want)
	}
}

// wantError checks the shape of an error and its code.
func wantError(t *testing.T, r *apitest.Response, status int, code string) {
	t.Helper()
	body := r.Want(status)
	wantNames(t, "error", body, "errors trace")
	if got := text(body, "errors", 0, "code"); got != code {
		t.Errorf("error code %q, want %q: %s", got, code, r.Raw)
	}
	for _, name := range []string{"message", "more_info"} {
		if text(body, "errors", 0, name) == "" {
			t.Errorf("error has no %s: %s", name, r.Raw)
		}
	}
	if target := at(body, "errors", 0, "target"); target != nil && (text(target, "name") == "" || text(target, "type") == "") {
		t.Errorf("target lacks name or type: %s", r.Raw)
	}
	if text(body, "trace") != r.Header.Get("Transaction-Id") {
		t.Errorf("trace %q is not the transaction id %q", text(body, "trace"), r.Header.Get("Transaction-Id"))
	}
}

func TestChecksComeInTheOrderRouteVersionGenerationToken(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		path   string
		status int
		code   string
	}{
		{"/v1/instances/x/nothing", 404, "invalid_route"},
		{"/v1/instances/", 404, "invalid_route"},
		{"/v1/instances", 400, "missing_version"},
		{"/v1/instances?version=2022", 400, "invalid_version"},
		{"/v1/instances?version=2022-02-30", 400, "invalid_version"},
		{"/v1/instances?version=2999-01-01&generation=2", 400, "invalid_version_range"},
		{"/v1/instances?version=2018-12-31&generation=2", 400, "invalid_version_range"},
		{"/v1/instances?version=2019-01-01&generation=2", 400, "version_not_supported"},
		{"/v1/instances?version=2022-03-31", 400, "missing_generation_parameter"},
		{"/v1/instances?version=2022-03-31&generation=1", 400, "invalid_generation_parameter"},
		{"/v1/instances?version=2022-03-31&generation=2", 401, "token_missing"},
	} {
		wantError(t, w.Do(apitest.Request{Path: test.path, Anonymous: true}), test.status, test.code)
	}
	bad := map[string]string{"Authorization": "Bearer rubbish"}
	wantError(t, w.Do(apitest.Request{Path: path("/instances"), Anonymous: true, Header: bad}), 401, "token_invalid")
	wantError(t, w.Do(apitest.Request{Method: "PUT", Path: path("/instances")}), 404, "invalid_route")
}

func TestAVirtualServerIsMadeListedAndReached(t *testing.T) {
	w := newWorld(t)
	p := w.profile(w.Owner.AccountID, "my-trusted-profile")
	w.Grant(operator, "is", "Operator")

	v := w.post("/vpcs", object{"name": "my-vpc"})
	subnet := w.post("/subnets", object{
		"name": "my-subnet", "vpc": object{"id": v["id"]}, "zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 256,
	})
	key := w.post("/keys", object{"name": "my-key", "public_key": ed25519Key + " me@example.com\n"})
	made := w.post("/instances", object{
		"name": "my-instance", "vpc": object{"id": v["id"]}, "zone": object{"name": "us-south-3"},
		"profile": object{"name": "bx2-2x8"}, "image": object{"id": stockImage}, "keys": []any{object{"id": key["id"]}},
		"primary_network_interface": object{"name": "primary-nic", "subnet": object{"id": subnet["id"]}},
		"metadata_service":          object{"enabled": true},
		"default_trusted_profile":   object{"target": object{"id": p.ID}},
	})
	id := text(made, "id")
	if !strings.HasPrefix(id, "0737_") || !strings.HasPrefix(text(subnet, "id"), "0737-") || !strings.HasPrefix(text(v, "id"), "r006-") {
		t.Errorf("ids: instance %s, subnet %s, VPC %s", id, subnet["id"], v["id"])
	}
	if got, want := text(made, "crn"), "crn:v1:bluemix:public:is:us-south-3:a/"+w.Owner.AccountID+"::instance:"+id; got != want {
		t.Errorf("CRN %s, want %s", got, want)
	}
	if made["status"] != "pending" || text(made, "primary_network_interface", "primary_ip", "address") != "10.240.128.4" {
		t.Errorf("status %v, address %s", made["status"], text(made, "primary_network_interface", "primary_ip", "address"))
	}
	stored, _ := w.d.Instances.Get(id)
	if stored.HostID != "host-1" || !strings.HasPrefix(stored.Interfaces[0].MAC, "02:00:") {
		t.Errorf("placed on %q with MAC %s", stored.HostID, stored.Interfaces[0].MAC)
	}

	links := w.d.LinksByResource.Get(directory.ResourceKey(stored.CRN))
	if len(links) != 1 || links[0].ProfileID != p.ID || links[0].CRType != identity.VSI || links[0].Name != "my-instance" {
		t.Fatalf("links of the instance: %+v", links)
	}
	start := w.get("/instances/" + id + "/initialization")
	if text(start, "default_trusted_profile", "target", "id") != p.ID || at(start, "default_trusted_profile", "auto_link") != true ||
		text(start, "keys", 0, "id") != key["id"] {
		t.Errorf("initialization: %v", start)
	}

	w.setStatus(id, vpc.Running)
	fip := w.post("/floating_ips", object{"name": "my-fip1", "zone": object{"name": "us-south-3"}})
	nic := text(made, "primary_network_interface", "id")
	bound := w.call("", "PUT", "/instances/"+id+"/network_interfaces/"+nic+"/floating_ips/"+text(fip, "id"), "this is ignored").Want(201)
	if text(bound, "target", "id") != nic {
		t.Errorf("bound to %v", bound["target"])
	}
	if e := w.Events(1)[0]; e.Action != "is.instance.network-interface.attach" || e.Target.ID != stored.CRN {
		t.Errorf("event %s on %s", e.Action, e.Target.ID)
	}

	// With the profile's token: Operator lists and operates, and no more.
	listed := w.call(operator, "GET", "/instances", nil).Want(200)
	if len(items(listed, "instances")) != 1 || text(listed, "instances", 0, "id") != id || listed["total_count"] != 1.0 {
		t.Errorf("the operator sees %v", listed)
	}
	w.call(operator, "GET", "/instances/"+id, nil).Want(200)
	for _, refused := range []struct {
		method, path string
		body         any
	}{
		{"POST", "/instances", instanceIn(text(subnet, "id"), nil)},
		{"POST", "/instances", object{}},
		{"POST", "/instances", nil},
		{"PATCH", "/instances/" + id, object{"name": "other"}},
		{"DELETE", "/instances/" + id, nil},
		{"POST", "/vpcs", object{}},
		{"DELETE", "/vpcs/" + text(v, "id"), nil},
		{"POST", "/subnets", object{}},
		{"POST", "/keys", object{}},
		{"POST", "/floating_ips", object{}},
		{"GET", "/instances/" + id + "/local_access", nil},
	} {
		r := w.call(operator, refused.method, refused.path, refused.body)
		wantError(t, r, 403, "not_authorized")
	}
	r := w.call(operator, "POST", "/instances", object{})
	if m := text(r.Want(403), "errors", 0, "message"); !strings.Contains(m, "is.instance.instance.create") || !strings.Contains(m, "is.instance") {
		t.Errorf("the refusal does not name action and object: %s", m)
	}
	if e := w.Events(1)[0]; e.Action != "is.instance.instance.create" || e.Outcome != "failure" || e.Initiator.ID != operator {
		t.Errorf("event of the refusal: %s %s %s", e.Action, e.Outcome, e.Initiator.ID)
	}
	act := w.call(operator, "POST", "/instances/"+id+"/actions", object{"type": "stop"}).Want(201)
	wantNames(t, "action", act, "created_at force href id status type")
	w.setStatus(id, vpc.Stopped)
	w.call(operator, "POST", "/instances/"+id+"/actions", object{"type": "start"}).Want(201)
	if got := text(w.get("/instances/"+id), "status"); got != "starting" {
		t.Errorf("status %s after start", got)
	}
	w.setStatus(id, vpc.Running)

	w.call("", "DELETE", "/instances/"+id, nil).Want(204)
	if got := text(w.get("/instances/"+id), "status"); got != "deleting" {
		t.Errorf("status %s after delete", got)
	}
	if n := w.d.LinksByResource.Len(directory.ResourceKey(stored.CRN)); n != 0 {
		t.Errorf("%d links are left", n)
	}
	if f := w.get("/floating_ips/" + text(fip, "id")); f["target"] != nil {
		t.Errorf("the floating IP is still bound: %v", f["target"])
	}
	wantError(t, w.call("", "DELETE", "/instances/"+id, nil), 409, "instance_delete_conflict")
}

func TestShapesHaveEveryPropertyAndNoNull(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	key := w.post("/keys", object{"public_key": ed25519Key})
	made := w.post("/instances", instanceIn(subnetID, object{"keys": []any{object{"id": key["id"]}}}))
	id, nic := text(made, "id"), text(made, "primary_network_interface", "id")
	fip := w.post("/floating_ips", object{"target": object{"id": nic}})

	const ref, group, zone = "crn href id name resource_type", "href id name", "href name"
	const reservedIP = "address href id name resource_type"
	for _, test := range []struct {
		path, plural, names string
		parts               map[string]string
	}{
		{"/regions/us-south", "/regions", "endpoint href name status", nil},
		{"/regions/us-south/zones/us-south-1", "/regions/us-south/zones", "href name region status", map[string]string{"region": zone}},
		{
			"/vpcs/" + vpcID, "/vpcs",
			`classic_access created_at crn cse_source_ips default_network_acl default_routing_table default_security_group dns
			health_reasons health_state href id name public_address_ranges resource_group resource_type status`,
			map[string]string{
				"default_network_acl": "crn href id name", "default_routing_table": ref, "default_security_group": "crn href id name",
				"dns": "enable_hub resolution_binding_count resolver", "resource_group": group,
			},
		},
		{
			"/subnets/" + subnetID, "/subnets",
			`available_ipv4_address_count created_at crn href id ip_version ipv4_cidr_block name network_acl resource_group
			resource_type routing_table status total_ipv4_address_count vpc zone`,
			map[string]string{"network_acl": "crn href id name", "routing_table": ref, "vpc": ref, "zone": zone, "resource_group": group},
		},
		{
			"/keys/" + text(key, "id"), "/keys",
			"created_at crn fingerprint href id length name public_key resource_group type", map[string]string{"resource_group": group},
		},
		{
			"/images/" + stockImage, "/images",
			`allowed_use catalog_offering created_at crn encryption file href id minimum_provisioned_size name operating_system
			resource_group resource_type status status_reasons user_data_format visibility`,
			map[string]string{
				"operating_system": "allow_user_image_creation architecture dedicated_host_only display_name family href name user_data_format vendor version",
				"allowed_use":      "api_version bare_metal_server instance", "resource_group": group,
			},
		},
		{
			"/operating_systems/local-linux", "/operating_systems",
			"allow_user_image_creation architecture dedicated_host_only display_name family href name user_data_format vendor version", nil,
		},
		{
			"/floating_ips/" + text(fip, "id"), "/floating_ips",
			"address created_at crn href id name resource_group status target zone",
			map[string]string{"target": "href id name primary_ip resource_type", "zone": zone},
		},
		{
			"/instances/" + id, "/instances",
			`availability availability_policy bandwidth boot_volume_attachment cluster_network_attachments confidential_compute_mode
			created_at crn disks enable_secure_boot health_reasons health_state href id image lifecycle_reasons lifecycle_state memory
			metadata_service name network_attachments network_interfaces primary_network_interface profile reservation_affinity
			resource_group resource_type startable status status_reasons total_network_bandwidth total_volume_bandwidth vcpu
			volume_attachments volume_bandwidth_qos_mode vpc zone`,
			map[string]string{
				"availability_policy": "host_failure preemption", "boot_volume_attachment": "device href id name volume", "image": ref,
				"metadata_service": "enabled protocol response_hop_limit", "profile": "href name resource_type",
				"primary_network_interface": "href id name primary_ip resource_type subnet", "reservation_affinity": "policy pool",
				"vcpu": "architecture burst count manufacturer percentage", "vpc": ref, "zone": zone, "resource_group": group,
			},
		},
		{
			"/instances/" + id + "/network_interfaces/" + nic, "/instances/" + id + "/network_interfaces",
			`allow_ip_spoofing created_at floating_ips href id name port_speed primary_ip resource_type security_groups status subnet type`,
			map[string]string{"primary_ip": reservedIP, "subnet": ref},
		},
		{
			"/instances/" + id + "/volume_attachments/" + text(made, "boot_volume_attachment", "id"), "/instances/" + id + "/volume_attachments",
			"bandwidth created_at delete_volume_on_instance_delete device href id name status type volume", map[string]string{"volume": ref},
		},
		{"/instances/" + id + "/network_interfaces/" + nic + "/floating_ips/" + text(fip, "id"), "/instances/" + id + "/network_interfaces/" + nic + "/floating_ips", "address created_at crn href id name resource_group status target zone", nil},
		{
			"/security_groups/" + text(w.get("/vpcs/"+vpcID), "default_security_group", "id"), "/security_groups",
			"created_at crn href id name resource_group rules targets vpc", map[string]string{"vpc": ref},
		},
		{
			"/instance/profiles/bx2-2x8", "/instance/profiles",
			`availability_class bandwidth cluster_network_attachment_count confidential_compute_modes disks family href memory name
			network_attachment_count network_bandwidth_mode network_interface_count os_architecture port_speed reservation_terms
			resource_type secure_boot_modes status supported_cluster_network_profiles total_volume_bandwidth vcpu_architecture
			vcpu_burst_limit vcpu_count vcpu_manufacturer vcpu_percentage volume_bandwidth_qos_modes`, nil,
		},
	} {
		one := w.call("", "GET", test.path, nil)
		body := one.Want(200)
		wantNames(t, test.path, body, test.names)
		for part, names := range test.parts {
			wantNames(t, test.path+" "+part, body[part], names)
		}
		all := w.call("", "GET", test.plural, nil)
		plural := test.plural[strings.LastIndexByte(test.plural, '/')+1:]
		list := all.Want(200)
		if len(items(list, plural)) == 0 {
			t.Errorf("%s is empty", test.plural)
			continue
		}
		wantNames(t, test.plural, at(list, plural, 0), test.names)
		if list["total_count"] != nil {
			wantNames(t, test.plural, list, "first limit total_count "+plural)
		}
		for _, r := range []*apitest.Response{one, all} {
			if strings.Contains(string(r.Raw), "null") {
				t.Errorf("%s has a null: %s", test.path, r.Raw)
			}
		}
	}
	wantNames(t, "initialization", w.get("/instances/"+id+"/initialization"), "keys")
	wantNames(t, "key of it", at(w.get("/instances/"+id+"/initialization"), "keys", 0), "crn fingerprint href id name")
	if raw := w.call("", "GET", "/instances/"+id+"/network_attachments", nil); strings.TrimSpace(string(raw.Raw)) != `{"network_attachments":[]}` {
		t.Errorf("network attachments: %s", raw.Raw)
	}
	prefixes := w.get("/vpcs/" + vpcID + "/address_prefixes")
	wantNames(t, "address prefix", at(prefixes, "address_prefixes", 0), "cidr created_at has_subnets href id is_default name zone")
	empty := w.call(nobody, "GET", "/instances", nil)
	if !strings.Contains(string(empty.Raw), `"instances":[]`) {
		t.Errorf("an empty list is not []: %s", empty.Raw)
	}
}

func TestCRNsAreZonalOrRegional(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(8)
	prefix := "crn:v1:bluemix:public:is:"
	account := ":a/" + w.Owner.AccountID + "::"
	fip := w.post("/floating_ips", object{"zone": object{"name": "us-south-2"}})
	key := w.post("/keys", object{"public_key": ed25519Key})
	v := w.get("/vpcs/" + vpcID)
	for _, test := range []struct{ got, want string }{
		{text(v, "crn"), prefix + "us-south" + account + "vpc:" + vpcID},
		{text(w.get("/subnets/"+subnetID), "crn"), prefix + "us-south-3" + account + "subnet:" + subnetID},
		{text(fip, "crn"), prefix + "us-south-2" + account + "floating-ip:" + text(fip, "id")},
		{text(key, "crn"), prefix + "us-south" + account + "key:" + text(key, "id")},
		{text(w.get("/images/"+stockImage), "crn"), prefix + "us-south:::image:" + stockImage},
		{text(v, "default_routing_table", "crn"), prefix + "us-south" + account + "vpc-routing-table:" + vpcID + "/" + text(v, "default_routing_table", "id")},
	} {
		if test.got != test.want {
			t.Errorf("CRN %s, want %s", test.got, test.want)
		}
	}
}

func TestPagesFollowEachOtherAndKeepTheFilters(t *testing.T) {
	w := newWorld(t)
	v1, s1 := w.network(64)
	_, s2 := w.network(64)
	for range 5 {
		w.post("/instances", instanceIn(s1, nil))
		w.post("/instances", instanceIn(s2, nil))
	}
	seen := map[string]bool{}
	p, pages := "/instances?limit=2&vpc.id="+v1, 0
	for p != "" {
		page := w.get(p)
		pages++
		if page["total_count"] != 5.0 || page["limit"] != 2.0 {
			t.Fatalf("total_count %v, limit %v", page["total_count"], page["limit"])
		}
		for _, i := range items(page, "instances") {
			if text(i, "vpc", "id") != v1 || seen[text(i, "id")] {
				t.Errorf("instance %s of VPC %s is out of place", text(i, "id"), text(i, "vpc", "id"))
			}
			seen[text(i, "id")] = true
		}
		p = ""
		if next := text(page, "next", "href"); next != "" {
			u, err := url.Parse(next)
			if err != nil || !strings.HasPrefix(next, "http://tabard.test/v1/instances?") {
				t.Fatalf("next is %s", next)
			}
			p = "/instances?start=" + u.Query().Get("start")
		}
	}
	if len(seen) != 5 || pages != 3 {
		t.Errorf("%d instances on %d pages", len(seen), pages)
	}
	wantError(t, w.call("", "GET", "/instances?limit=0", nil), 400, "validation_failure")
	wantError(t, w.call("", "GET", "/instances?limit=101", nil), 400, "validation_failure")
	wantError(t, w.call("", "GET", "/instances?start=%21", nil), 400, "validation_failure")
	for _, filter := range []string{"placement_group.id=x", "vpc.name=none", "name=none", "resource_group.id=none", "vpc.id="} {
		if n := len(items(w.get("/instances?"+filter), "instances")); (n == 0) != !strings.HasSuffix(filter, "=") {
			t.Errorf("filter %s shows %d", filter, n)
		}
	}
	if n := len(items(w.get("/images?status=available,deprecated&visibility=public"), "images")); n != 1 {
		t.Errorf("%d images are available or deprecated", n)
	}
}

func TestListsShowWhatTheCallerMaySee(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	mine := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	other := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	w.grantOn(operator, "Viewer", map[string]string{access.ServiceName: "is", "instanceId": mine})

	listed := w.call(operator, "GET", "/instances", nil).Want(200)
	if len(items(listed, "instances")) != 1 || text(listed, "instances", 0, "id") != mine || listed["total_count"] != 1.0 {
		t.Errorf("a viewer of one instance sees %v", listed)
	}
	w.call(operator, "GET", "/instances/"+mine, nil).Want(200)
	wantError(t, w.call(operator, "GET", "/instances/"+other, nil), 403, "not_authorized")
	for _, plural := range []string{"vpcs", "subnets", "keys", "images", "operating_systems", "floating_ips", "security_groups"} {
		if list := w.call(operator, "GET", "/"+plural, nil).Want(200); len(items(list, plural)) != 0 {
			t.Errorf("a viewer of one instance sees %s", plural)
		}
	}
	for _, p := range []string{"/regions", "/regions/us-south/zones", "/instance/profiles"} {
		w.call(nobody, "GET", p, nil).Want(200)
	}
}

func TestAPolicyMayNameAChildServiceOrAResourceGroup(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	made := w.post("/instances", instanceIn(subnetID, nil))
	w.Grant(operator, "is.instance", "Viewer")
	if n := len(items(w.call(operator, "GET", "/instances", nil).Want(200), "instances")); n != 1 {
		t.Errorf("a viewer of is.instance sees %d instances", n)
	}
	if n := len(items(w.call(operator, "GET", "/vpcs", nil).Want(200), "vpcs")); n != 0 {
		t.Errorf("a viewer of is.instance sees %d VPCs", n)
	}
	w.grantOn(nobody, "Editor", map[string]string{access.ServiceName: "is", access.ResourceGroupID: text(made, "resource_group", "id")})
	w.call(nobody, "POST", "/instances", instanceIn(subnetID, nil)).Want(201)
	wantError(t, w.call(nobody, "POST", "/instances", instanceIn(subnetID, object{"resource_group": object{"id": "elsewhere"}})), 403, "not_authorized")
	wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, object{"resource_group": object{"id": "elsewhere"}})), 404, "not_found")
}

func TestAnotherAccountSeesAndTouchesNothing(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	key := text(w.post("/keys", object{"public_key": ed25519Key}), "id")
	made := w.post("/instances", instanceIn(subnetID, nil))
	id, nic := text(made, "id"), text(made, "primary_network_interface", "id")
	fip := text(w.post("/floating_ips", object{"zone": object{"name": "us-south-3"}}), "id")
	group := text(w.get("/vpcs/"+vpcID), "default_security_group", "id")
	foreign := func(method, p string, body any) *apitest.Response {
		t.Helper()
		return w.Do(apitest.Request{Method: method, Path: path(p), Body: body, As: w.Other.IAMID})
	}
	for _, p := range []string{
		"/vpcs/" + vpcID, "/vpcs/" + vpcID + "/default_security_group", "/subnets/" + subnetID, "/keys/" + key, "/instances/" + id,
		"/instances/" + id + "/initialization", "/instances/" + id + "/network_interfaces", "/instances/" + id + "/network_interfaces/" + nic,
		"/instances/" + id + "/network_interfaces/" + nic + "/floating_ips", "/instances/" + id + "/volume_attachments",
		"/instances/" + id + "/local_access", "/floating_ips/" + fip, "/security_groups/" + group,
	} {
		wantError(t, foreign("GET", p, nil), 404, "not_found")
	}
	for _, plural := range []string{"vpcs", "subnets", "keys", "instances", "floating_ips", "security_groups"} {
		list := foreign("GET", "/"+plural, nil).Want(200)
		if len(items(list, plural)) != 0 || list["total_count"] != 0.0 {
			t.Errorf("the other account sees %s: %v", plural, list)
		}
	}
	for _, p := range []string{"/vpcs/" + vpcID, "/subnets/" + subnetID, "/keys/" + key, "/instances/" + id, "/floating_ips/" + fip} {
		wantError(t, foreign("PATCH", p, object{"name": "taken-over"}), 404, "not_found")
		wantError(t, foreign("DELETE", p, nil), 404, "not_found")
	}
	wantError(t, foreign("POST", "/instances/"+id+"/actions", object{"type": "stop"}), 404, "not_found")

	// References in bodies and paths: the other account's own things cannot be
	// tied to what is not its own.
	v := text(foreign("POST", "/vpcs", object{}).Want(201), "id")
	n := text(foreign("POST", "/subnets", object{"vpc": object{"id": v}, "zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 16}).Want(201), "id")
	own := foreign("POST", "/instances", instanceIn(n, nil)).Want(201)
	ownNIC := "/instances/" + text(own, "id") + "/network_interfaces/" + text(own, "primary_network_interface", "id")
	ownIP := text(foreign("POST", "/floating_ips", object{"zone": object{"name": "us-south-3"}}).Want(201), "id")
	mine := w.profile(w.Owner.AccountID, "mine")
	for _, test := range []struct {
		method, path string
		body         any
	}{
		{"POST", "/subnets", object{"vpc": object{"id": vpcID}, "zone": object{"name": "us-south-1"}, "total_ipv4_address_count": 8}},
		{"POST", "/instances", instanceIn(subnetID, nil)},
		{"POST", "/instances", instanceIn(n, object{"vpc": object{"id": vpcID}})},
		{"POST", "/instances", instanceIn(n, object{"keys": []any{object{"id": key}}})},
		{"POST", "/instances", instanceIn(n, object{"keys": []any{object{"crn": "crn:v1:bluemix:public:is:us-south:a/" + w.Owner.AccountID + "::key:" + key}}})},
		{"POST", "/instances", instanceIn(n, object{"resource_group": object{"id": text(made, "resource_group", "id")}})},
		{"POST", "/instances", instanceIn(n, object{"default_trusted_profile": object{"target": object{"id": mine.ID}}})},
		{"POST", "/floating_ips", object{"target": object{"id": nic}}},
		{"PATCH", "/floating_ips/" + ownIP, object{"target": object{"id": nic}}},
		{"PUT", ownNIC + "/floating_ips/" + fip, nil},
		{"DELETE", ownNIC + "/floating_ips/" + fip, nil},
		{"PUT", "/instances/" + id + "/network_interfaces/" + nic + "/floating_ips/" + ownIP, nil},
	} {
		wantError(t, foreign(test.method, test.path, test.body), 404, "not_found")
	}
	r := foreign("POST", "/instances", instanceIn(n, object{"default_trusted_profile": object{"target": object{
		"crn": "crn:v1:bluemix:public:iam-identity::a/" + w.Owner.AccountID + "::profile:" + mine.ID,
	}}}))
	wantError(t, r, 400, "bad_field")
}

func TestBodiesOfTheWrongTypeAreRefusedAndNeverAFault(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	key := text(w.post("/keys", object{"public_key": ed25519Key}), "id")
	id := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	fip := text(w.post("/floating_ips", object{"zone": object{"name": "us-south-3"}}), "id")
	routes := map[string][]string{
		"POST":  {"/vpcs", "/subnets", "/keys", "/instances", "/floating_ips", "/instances/" + id + "/actions"},
		"PATCH": {"/vpcs/" + vpcID, "/subnets/" + subnetID, "/keys/" + key, "/instances/" + id, "/floating_ips/" + fip},
	}
	values := []string{`null`, `1`, `-1.5e300`, `"x"`, `""`, `true`, `[]`, `[null]`, `[[]]`, `{}`, `{"id":1}`, `{"id":""}`, `{"id":"../../x"}`, `{"name":[]}`,
		`{"subnet":null}`, `{"subnet":{"id":"` + subnetID + `"},"primary_ip":{"address":"::1"}}`, `{"target":{"crn":"crn:"}}`, `{"href":"/"}`, `{"crn":"crn:v1:a:b:is::::vpc:"}`}
	fields := []string{
		"name", "vpc", "zone", "resource_group", "total_ipv4_address_count", "ipv4_cidr_block", "public_key", "type", "image", "keys", "profile",
		"primary_network_interface", "network_interfaces", "metadata_service", "default_trusted_profile", "user_data", "target", "force",
		"address_prefix_management", "classic_access", "dns", "network_acl", "public_gateway", "primary_network_attachment",
	}
	check := func(method, p, body string) {
		t.Helper()
		r := w.call("", method, p, body)
		if r.Status >= 500 || r.Status == 200 && strings.HasPrefix(body, "[") {
			t.Errorf("%s %s with %s: %d %s", method, p, body, r.Status, r.Raw)
		}
		if r.Status >= 400 && !json.Valid(r.Raw) {
			t.Errorf("%s %s with %s: answer is not JSON", method, p, body)
		}
	}
	for method, paths := range routes {
		for _, p := range paths {
			for _, body := range []string{`[]`, `1`, `"x"`, `true`, `{`, `{}{}`, `nonsense`, "\x00", `{"name":"\ud800"}`} {
				r := w.call("", method, p, body)
				if r.Status != 400 {
					t.Errorf("%s %s with %q: %d, want 400", method, p, body, r.Status)
				}
			}
			check(method, p, `null`)
			for _, f := range fields {
				for _, v := range values {
					check(method, p, `{"`+f+`":`+v+`}`)
					if p == "/instances" {
						whole, err := json.Marshal(instanceIn(subnetID, object{f: json.RawMessage(v)}))
						if err != nil {
							t.Fatal(err)
						}
						check(method, p, string(whole))
					}
				}
			}
		}
	}
	wantError(t, w.call("", "POST", "/keys", `{"public_key":"`+strings.Repeat("x", 2<<20)+`"}`), 413, "http_request_size_exceeded")
}

func TestOperatingSystemsAndRegionsThatDoNotExistAreNotFound(t *testing.T) {
	w := newWorld(t)
	for _, p := range []string{
		"/regions/eu-de", "/regions/eu-de/zones", "/regions/us-south/zones/us-south-9", "/images/r006-x", "/operating_systems/none",
		"/instance/profiles/none", "/vpcs/none", "/instances/none", "/security_groups/none",
	} {
		wantError(t, w.call("", "GET", p, nil), 404, "not_found")
	}
}
