package vpcapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/vpcapi"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/vpc"
)

func TestLinkingAProfileNeedsTheRightToLinkIt(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(32)
	p := w.profile(w.Owner.AccountID, "powerful")
	w.Grant(operator, "is", "Editor")
	with := func(autoLink any) object {
		return instanceIn(subnetID, object{"default_trusted_profile": object{"auto_link": autoLink, "target": object{"id": p.ID}}})
	}

	for _, autoLink := range []any{true, nil} {
		before := len(w.d.InstancesByAccount.Get(w.Owner.AccountID))
		wantError(t, w.call(operator, "POST", "/instances", with(autoLink)), 403, "not_authorized")
		if w.d.LinksByProfile.Len(p.ID) != 0 || len(w.d.InstancesByAccount.Get(w.Owner.AccountID)) != before {
			t.Fatalf("auto_link %v: something was made although the link was refused", autoLink)
		}
	}

	remembered := w.call(operator, "POST", "/instances", with(false)).Want(201)
	if w.d.LinksByProfile.Len(p.ID) != 0 {
		t.Error("auto_link false made a link")
	}
	start := w.get("/instances/" + text(remembered, "id") + "/initialization")
	if at(start, "default_trusted_profile", "auto_link") != false || text(start, "default_trusted_profile", "target", "id") != p.ID {
		t.Errorf("initialization: %v", start)
	}

	w.grantOn(operator, "Editor", map[string]string{access.ServiceName: "iam-identity", access.Resource: p.ID, access.ResourceType: "profile"})
	linked := w.call(operator, "POST", "/instances", with(true)).Want(201)
	if links := w.d.LinksByResource.Get(directory.ResourceKey(text(linked, "crn"))); len(links) != 1 || links[0].CreatedBy != operator {
		t.Errorf("links: %+v", links)
	}
	if e := w.Events(1)[0]; e.Action != "is.instance.instance.create" || !strings.Contains(string(e.ResponseData), p.ID) || !strings.Contains(string(e.ResponseData), "Link-") {
		t.Errorf("the event does not tell of the link: %s %s", e.Action, e.ResponseData)
	}
	crn := "crn:v1:staging:public:iam-identity::a/" + w.Owner.AccountID + "::profile:" + p.ID
	w.call("", "POST", "/instances", instanceIn(subnetID, object{"default_trusted_profile": object{"target": object{"crn": crn}}})).Want(201)
	wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, object{"default_trusted_profile": object{}})), 400, "validation_required_field")
	wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, object{"default_trusted_profile": object{"target": object{"id": "Profile-none"}}})), 404, "not_found")
}

func TestDeletingAnInstanceDeletesEveryLinkOfIt(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	made, kept := w.post("/instances", instanceIn(subnetID, nil)), w.post("/instances", instanceIn(subnetID, nil))
	byHand, byOther := w.profile(w.Owner.AccountID, "one"), w.profile(w.Owner.AccountID, "two")
	err := w.d.Update(context.Background(), w.Owner.IAMID, func(tx *directory.Tx) error {
		for _, p := range []*identity.Profile{byHand, byOther} {
			for _, i := range []object{made, kept} {
				w.d.Links.Put(tx, &identity.Link{
					ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: identity.VSI, CRN: text(i, "crn"),
				})
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	w.call("", "DELETE", "/instances/"+text(made, "id"), nil).Want(204)
	if n := w.d.LinksByResource.Len(directory.ResourceKey(text(made, "crn"))); n != 0 {
		t.Errorf("%d links of the deleted instance are left", n)
	}
	if n := w.d.LinksByResource.Len(directory.ResourceKey(text(kept, "crn"))); n != 2 {
		t.Errorf("%d links of the other instance are left, want 2", n)
	}
}

func TestCreatingAnInstanceNeedsTheRightsOnWhatItUses(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	key := text(w.post("/keys", object{"public_key": ed25519Key}), "id")
	body := instanceIn(subnetID, object{"keys": []any{object{"id": key}}})
	for _, step := range []struct{ service, role, stillNeeds string }{
		{"is.instance", "Editor", "is.image.image.provision"},
		{"is.image", "Operator", "is.key.key.operate"},
		{"is.key", "Operator", "is.subnet.subnet.operate"},
		{"is.subnet", "Operator", "is.vpc.vpc.operate"},
		{"is.vpc", "Operator", "is.security-group.security-group.operate"},
		{"is.security-group", "Operator", "is.volume.volume.create"},
	} {
		w.Grant(operator, step.service, step.role)
		r := w.call(operator, "POST", "/instances", body)
		wantError(t, r, 403, "not_authorized")
		if m := text(r.Want(403), "errors", 0, "message"); !strings.Contains(m, step.stillNeeds) {
			t.Errorf("with %s %s the refusal is %q, want it to name %s", step.role, step.service, m, step.stillNeeds)
		}
	}
	w.Grant(operator, "is.volume", "Editor")
	w.call(operator, "POST", "/instances", body).Want(201)
}

func TestRulesOfANewInstance(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	otherVPC, otherSubnet := w.network(16)
	w.post("/instances", instanceIn(subnetID, object{"name": "taken"}))
	nic := func(more object) object {
		m := object{"subnet": object{"id": subnetID}}
		for k, v := range more {
			m[k] = v
		}
		return object{"primary_network_interface": m}
	}
	for _, test := range []struct {
		more   object
		status int
		code   string
	}{
		{object{"name": "taken"}, 409, "instance_name_exists"},
		{object{"name": "Not-Valid"}, 400, "validation_invalid_name"},
		{object{"zone": nil}, 400, "validation_required_field"},
		{object{"zone": object{"name": "us-south-1"}}, 400, "bad_field"},
		{object{"zone": object{"name": "eu-de-1"}}, 404, "not_found"},
		{object{"image": nil}, 400, "validation_required_field"},
		{object{"image": object{"id": "r006-none"}}, 404, "not_found"},
		{object{"profile": object{"name": "none"}}, 404, "not_found"},
		{object{"vpc": object{"id": otherVPC}}, 400, "bad_field"},
		{object{"primary_network_interface": nil}, 400, "validation_required_field"},
		{object{"network_interfaces": []any{object{"subnet": object{"id": otherSubnet}}}}, 400, "bad_field"},
		{nic(object{"name": "-"}), 400, "validation_invalid_name"},
		{nic(object{"allow_ip_spoofing": true}), 400, "bad_field"},
		{nic(object{"primary_ip": object{"address": "10.240.128.3"}}), 400, "bad_field"},
		{nic(object{"primary_ip": object{"address": "10.240.128.15"}}), 400, "bad_field"},
		{nic(object{"primary_ip": object{"address": "192.168.0.1"}}), 400, "bad_field"},
		{nic(object{"primary_ip": object{"address": "10.240.128.4"}}), 409, "validation_unique_failed"},
		{nic(object{"security_groups": []any{object{"id": "r006-none"}}}), 404, "not_found"},
		{object{"metadata_service": object{"protocol": "gopher"}}, 400, "validation_enum"},
		{object{"metadata_service": object{"response_hop_limit": 0}}, 400, "bad_field"},
		{object{"metadata_service": object{"response_hop_limit": 65}}, 400, "bad_field"},
		{object{"user_data": strings.Repeat("x", 64<<10+1)}, 400, "bad_field"},
		{object{"primary_network_attachment": object{"virtual_network_interface": object{"subnet": object{"id": subnetID}}}}, 400, "bad_field"},
		{object{"enable_secure_boot": true}, 400, "bad_field"},
		{object{"confidential_compute_mode": "tdx"}, 400, "bad_field"},
	} {
		before := len(w.d.InstancesBySubnet.Get(subnetID))
		wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, test.more)), test.status, test.code)
		if len(w.d.InstancesBySubnet.Get(subnetID)) != before {
			t.Errorf("%v made an instance", test.more)
		}
	}

	plain := w.post("/instances", instanceIn(subnetID, object{"profile": nil, "enable_secure_boot": false, "volume_attachments": []any{}}))
	if text(plain, "profile", "name") != "bx2-2x8" || !strings.HasPrefix(text(plain, "name"), "instance-") {
		t.Errorf("profile %v, name %v", plain["profile"], plain["name"])
	}
	if m, _ := plain["metadata_service"].(object); m["enabled"] != false || m["protocol"] != "http" || m["response_hop_limit"] != 1.0 {
		t.Errorf("metadata service by default: %v", m)
	}
	chosen := w.post("/instances", instanceIn(subnetID, object{
		"vpc":                       object{"href": "https://us-south.iaas.cloud.ibm.com/v1/vpcs/" + vpcID},
		"primary_network_interface": object{"subnet": object{"id": subnetID}, "primary_ip": object{"address": "10.240.128.14"}},
		"network_interfaces":        []any{object{"subnet": object{"id": subnetID}}, object{"subnet": object{"id": subnetID}, "name": "third"}},
	}))
	var got []string
	for _, n := range items(chosen, "network_interfaces") {
		got = append(got, text(n, "name")+" "+text(n, "primary_ip", "address"))
	}
	if want := "[eth0 10.240.128.14 eth1 10.240.128.6 third 10.240.128.7]"; fmt.Sprint(got) != want {
		t.Errorf("interfaces %v, want %s", got, want)
	}
}

func TestConcurrentCreatesNeverShareAnAddressAndASubnetRunsOut(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(8)
	var wg sync.WaitGroup
	responses := make([]*apitest.Response, 8)
	for n := range responses {
		wg.Go(func() { responses[n] = w.call("", "POST", "/instances", instanceIn(subnetID, nil)) })
	}
	wg.Wait()
	addresses := map[string]bool{}
	for _, r := range responses {
		if r.Status != 201 {
			wantError(t, r, 400, "subnet_out_of_ip_addresses")
			continue
		}
		addresses[text(r.Want(201), "primary_network_interface", "primary_ip", "address")] = true
	}
	if len(addresses) != 3 {
		t.Errorf("a subnet of 8 gave out %v; 3 of its addresses can be used", addresses)
	}
	if n := at(w.get("/subnets/"+subnetID), "available_ipv4_address_count"); n != 0.0 {
		t.Errorf("%v addresses are left", n)
	}
}

func TestConcurrentCreatesOfOneNameLeaveOne(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(32)
	var wg sync.WaitGroup
	responses := make([]*apitest.Response, 6)
	for n := range responses {
		wg.Go(func() {
			responses[n] = w.call("", "POST", "/instances", instanceIn(subnetID, object{"name": "only-one"}))
		})
	}
	wg.Wait()
	made := 0
	for _, r := range responses {
		if r.Status == 201 {
			made++
			continue
		}
		wantError(t, r, 409, "instance_name_exists")
	}
	if made != 1 {
		t.Errorf("%d instances have the name", made)
	}
}

func TestRulesOfSubnets(t *testing.T) {
	w := newWorld(t)
	v := text(w.post("/vpcs", object{}), "id")
	manual := text(w.post("/vpcs", object{"address_prefix_management": "manual"}), "id")
	in := func(vpcID string, more object) object {
		m := object{"vpc": object{"id": vpcID}}
		for k, x := range more {
			m[k] = x
		}
		return m
	}
	first := w.post("/subnets", in(v, object{"name": "first", "ipv4_cidr_block": "10.240.64.0/24"}))
	if text(first, "zone", "name") != "us-south-2" || first["total_ipv4_address_count"] != 256.0 || first["available_ipv4_address_count"] != 251.0 {
		t.Errorf("subnet by range: %v", first)
	}
	second := w.post("/subnets", in(v, object{"zone": object{"name": "us-south-2"}, "total_ipv4_address_count": 16}))
	if text(second, "ipv4_cidr_block") != "10.240.65.0/28" {
		t.Errorf("the range beside the first is %s", text(second, "ipv4_cidr_block"))
	}
	w.post("/subnets", in(v, object{"zone": object{"name": "us-south-1"}, "total_ipv4_address_count": 16384}))
	zone := object{"name": "us-south-1"}
	for _, test := range []struct {
		body   object
		status int
		code   string
	}{
		{in(v, object{"ipv4_cidr_block": "10.240.64.128/25"}), 409, "subnet_conflict"},
		{in(v, object{"ipv4_cidr_block": "192.168.0.0/24"}), 400, "not_in_address_prefix"},
		{in(v, object{"ipv4_cidr_block": "10.240.0.0/16"}), 400, "not_in_address_prefix"},
		{in(v, object{"ipv4_cidr_block": "10.240.128.1/24"}), 400, "bad_field"},
		{in(v, object{"ipv4_cidr_block": "10.240.128.0/30"}), 400, "bad_field"},
		{in(v, object{"ipv4_cidr_block": "fd00::/24"}), 400, "bad_field"},
		{in(v, object{"ipv4_cidr_block": "10.240.128.0/24", "zone": zone}), 400, "bad_field"},
		{in(v, object{"ipv4_cidr_block": "10.240.128.0/24", "total_ipv4_address_count": 8}), 400, "bad_field"},
		{in(v, object{"zone": zone}), 400, "validation_required_field"},
		{in(v, object{"zone": zone, "total_ipv4_address_count": 8}), 409, "subnet_conflict"},
		{in(v, object{"zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 100}), 400, "bad_field"},
		{in(v, object{"zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 4}), 400, "bad_field"},
		{in(v, object{"zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 1 << 40}), 400, "bad_field"},
		{in(v, object{"total_ipv4_address_count": 8}), 400, "validation_required_field"},
		{in(v, object{"zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 8, "name": "first"}), 409, "validation_unique_failed"},
		{in(v, object{"zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 8, "network_acl": object{"id": "r006-none"}}), 404, "not_found"},
		{in(manual, object{"zone": zone, "total_ipv4_address_count": 8}), 400, "no_default_address_prefix"},
		{in(manual, object{"ipv4_cidr_block": "10.240.0.0/24"}), 400, "not_in_address_prefix"},
		{object{"zone": zone, "total_ipv4_address_count": 8}, 400, "validation_required_field"},
	} {
		r := w.call("", "POST", "/subnets", test.body)
		if r.Status != test.status {
			t.Errorf("%v: %d %s, want %d", test.body, r.Status, r.Raw, test.status)
			continue
		}
		wantError(t, r, test.status, test.code)
	}
	renamed := w.call("", "PATCH", "/subnets/"+text(first, "id"), object{"name": "renamed"}).Want(200)
	if renamed["name"] != "renamed" {
		t.Errorf("renamed to %v", renamed["name"])
	}
	wantError(t, w.call("", "DELETE", "/vpcs/"+v, nil), 409, "vpc_not_empty")
	w.call("", "DELETE", "/vpcs/"+manual, nil).Want(204)
}

func TestWhatIsInUseIsNotDeleted(t *testing.T) {
	w := newWorld(t)
	vpcID, subnetID := w.network(16)
	id := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	wantError(t, w.call("", "DELETE", "/subnets/"+subnetID, nil), 409, "subnet_not_empty")
	w.call("", "DELETE", "/instances/"+id, nil).Want(204)
	wantError(t, w.call("", "DELETE", "/subnets/"+subnetID, nil), 409, "subnet_not_empty")
	err := w.d.Update(context.Background(), "host", func(tx *directory.Tx) error {
		i, _ := w.d.Instances.Get(id)
		w.d.Instances.Delete(tx, i)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, w.call("", "GET", "/instances/"+id, nil), 404, "not_found")
	w.call("", "DELETE", "/subnets/"+subnetID, nil).Want(204)
	w.call("", "DELETE", "/vpcs/"+vpcID, nil).Want(204)
}

func TestKeysAreParsedAndUnique(t *testing.T) {
	w := newWorld(t)
	line := func(public any) string {
		k, err := ssh.NewPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		return string(ssh.MarshalAuthorizedKey(k))
	}
	rsaLine := func(bits int) string {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return line(&k.PublicKey)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}

	ed := w.post("/keys", object{"name": "ed", "public_key": ed25519Key + " somebody@somewhere"})
	parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(ed25519Key))
	if err != nil {
		t.Fatal(err)
	}
	if ed["type"] != "ed25519" || ed["length"] != 256.0 || ed["public_key"] != ed25519Key || ed["fingerprint"] != ssh.FingerprintSHA256(parsed) {
		t.Errorf("key: %v", ed)
	}
	two := w.post("/keys", object{"public_key": rsaLine(2048), "type": "rsa"})
	if two["type"] != "rsa" || two["length"] != 2048.0 || !strings.HasPrefix(text(two, "fingerprint"), "SHA256:") {
		t.Errorf("key: %v", two)
	}
	for _, test := range []struct {
		body   object
		status int
		code   string
	}{
		{object{}, 400, "validation_required_field"},
		{object{"public_key": "ssh-ed25519 AAAA"}, 400, "key_parse_failure"},
		{object{"public_key": "no-pty " + rsaLine(2048)}, 400, "key_parse_failure"},
		{object{"public_key": rsaLine(2048) + rsaLine(2048)}, 400, "key_parse_failure"},
		{object{"public_key": rsaLine(1024)}, 400, "key_parse_failure"},
		{object{"public_key": rsaLine(3072)}, 400, "key_parse_failure"},
		{object{"public_key": line(&curve.PublicKey)}, 400, "key_parse_failure"},
		{object{"public_key": rsaLine(2048), "type": "ed25519"}, 400, "bad_field"},
		{object{"public_key": rsaLine(2048), "name": "ed"}, 409, "key_name_exists"},
		{object{"public_key": ed25519Key, "name": "again"}, 409, "key_content_exists"},
	} {
		wantError(t, w.call("", "POST", "/keys", test.body), test.status, test.code)
	}
	renamed := w.call("", "PATCH", "/keys/"+text(ed, "id"), object{"name": "renamed"}).Want(200)
	if renamed["name"] != "renamed" || renamed["created_at"] != ed["created_at"] {
		t.Errorf("renamed: %v", renamed)
	}
	wantError(t, w.call("", "PATCH", "/keys/"+text(ed, "id"), object{"name": text(two, "name")}), 409, "key_name_exists")
	w.call("", "DELETE", "/keys/"+text(ed, "id"), nil).Want(204)
	wantError(t, w.call("", "GET", "/keys/"+text(ed, "id"), nil), 404, "not_found")
	w.post("/keys", object{"public_key": ed25519Key})
}

func TestFloatingIPsAreBoundMovedAndGivenBack(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	ip := func(zone string) string {
		return text(w.post("/floating_ips", object{"zone": object{"name": zone}}), "id")
	}
	nicOf := func() (string, string) {
		i := w.post("/instances", instanceIn(subnetID, nil))
		nic := text(i, "primary_network_interface", "id")
		return nic, "/instances/" + text(i, "id") + "/network_interfaces/" + nic + "/floating_ips/"
	}
	target := func(id string) string { return text(w.get("/floating_ips/"+id), "target", "id") }
	nicA, pathA := nicOf()
	nicB, pathB := nicOf()
	one, two, far := ip("us-south-3"), ip("us-south-3"), ip("us-south-1")

	w.call("", "PUT", pathA+one, nil).Want(201)
	w.call("", "PUT", pathA+one, nil).Want(201)
	w.call("", "PUT", pathA+two, nil).Want(201)
	if target(one) != "" || target(two) != nicA {
		t.Errorf("after replacing, one is at %q and two at %q", target(one), target(two))
	}
	wantError(t, w.call("", "PUT", pathB+two, nil), 409, "floating_ip_in_use")
	wantError(t, w.call("", "PUT", pathB+far, nil), 400, "validation_failure")
	wantError(t, w.call("", "PUT", pathB+"r006-none", nil), 404, "not_found")
	wantError(t, w.call("", "DELETE", pathB+two, nil), 404, "not_found")
	w.call("", "DELETE", pathA+two, nil).Want(204)
	if e := w.Events(1)[0]; e.Action != "is.instance.network-interface.detach" {
		t.Errorf("event %s", e.Action)
	}

	bound := w.post("/floating_ips", object{"target": object{"id": nicB}})
	if text(bound, "zone", "name") != "us-south-3" || text(bound, "target", "id") != nicB {
		t.Errorf("reserved for an interface: %v", bound)
	}
	if n := len(items(w.get("/floating_ips?target.id="+nicB), "floating_ips")); n != 1 {
		t.Errorf("%d floating IPs have the target", n)
	}
	wantError(t, w.call("", "POST", "/floating_ips", object{"target": object{"id": nicB}}), 409, "target_in_use")
	wantError(t, w.call("", "PATCH", "/floating_ips/"+one, object{"target": object{"id": nicB}}), 409, "target_in_use")
	wantError(t, w.call("", "PATCH", "/floating_ips/"+far, object{"target": object{"id": nicA}}), 400, "validation_failure")
	wantError(t, w.call("", "POST", "/floating_ips", object{"target": object{"id": nicA}, "zone": object{"name": "us-south-3"}}), 400, "bad_field")
	wantError(t, w.call("", "POST", "/floating_ips", object{}), 400, "validation_required_field")

	id := text(bound, "id")
	w.call("", "PATCH", "/floating_ips/"+id, `{"name":"still-bound"}`).Want(200)
	w.call("", "PATCH", "/floating_ips/"+id, object{"target": object{"id": nicB}}).Want(200)
	if target(id) != nicB {
		t.Error("a patch without a change of target unbound it")
	}
	w.call("", "PATCH", "/floating_ips/"+id, object{"target": object{"id": nicA}}).Want(200)
	if target(id) != nicA {
		t.Error("the patch did not move it")
	}
	w.Grant(nobody, "is.floating-ip", "Editor")
	wantError(t, w.call(nobody, "PATCH", "/floating_ips/"+id, `{"target":null}`), 403, "not_authorized")
	wantError(t, w.call(nobody, "PUT", pathA+one, nil), 403, "not_authorized")
	unbound := w.call("", "PATCH", "/floating_ips/"+id, `{"target": null}`).Want(200)
	if _, has := unbound["target"]; has {
		t.Errorf("null did not unbind: %v", unbound)
	}
	address := text(unbound, "address")
	w.call("", "DELETE", "/floating_ips/"+id, nil).Want(204)
	if again := w.post("/floating_ips", object{"zone": object{"name": "us-south-1"}}); text(again, "address") != address {
		t.Errorf("the released address %s is not given out again, but %s", address, text(again, "address"))
	}
}

func TestActionsFollowTheStatus(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	id := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	p := "/instances/" + id + "/actions"
	for _, test := range []struct {
		status, action, next string
	}{
		{vpc.Running, "start", ""},
		{vpc.Running, "stop", vpc.Stopping},
		{vpc.Running, "reboot", vpc.Restarting},
		{vpc.Stopped, "start", vpc.Starting},
		{vpc.Stopped, "stop", ""},
		{vpc.Stopped, "reboot", ""},
		{vpc.Failed, "start", vpc.Starting},
		{vpc.Deleting, "start", ""},
	} {
		w.setStatus(id, test.status)
		r := w.call("", "POST", p, object{"type": test.action, "force": true})
		if test.next == "" {
			wantError(t, r, 409, "invalid_state")
			continue
		}
		if body := r.Want(201); body["type"] != test.action || body["status"] != "pending" || !strings.HasPrefix(text(body, "id"), "0737-") {
			t.Errorf("action: %v", body)
		}
		if got := text(w.get("/instances/"+id), "status"); got != test.next {
			t.Errorf("%s from %s leads to %s, want %s", test.action, test.status, got, test.next)
		}
	}
	wantError(t, w.call("", "POST", p, object{"type": "suspend"}), 400, "validation_enum")
	wantError(t, w.call("", "POST", p, object{}), 400, "validation_required_field")

	w.setStatus(id, vpc.Deleting)
	wantError(t, w.call("", "PATCH", "/instances/"+id, object{"name": "late"}), 409, "invalid_state")
	if got := w.get("/instances/" + id); got["lifecycle_state"] != "deleting" || got["startable"] != false {
		t.Errorf("deleting: %v %v", got["lifecycle_state"], got["startable"])
	}
}

func TestAPatchChangesWhatItNamesAndHonorsIfMatch(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	w.post("/instances", instanceIn(subnetID, object{"name": "other"}))
	id := text(w.post("/instances", instanceIn(subnetID, object{"name": "before"})), "id")
	patch := func(body any, match string) *apitest.Response {
		r := apitest.Request{Method: http.MethodPatch, Path: path("/instances/" + id), Body: body, Header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}}
		if match != "" {
			r.Header["If-Match"] = match
		}
		return w.Do(r)
	}
	tag := w.call("", "GET", "/instances/"+id, nil).Header.Get("ETag")
	first := patch(object{"metadata_service": object{"enabled": true}}, tag)
	changed := first.Want(200)
	if at(changed, "metadata_service", "enabled") != true || at(changed, "metadata_service", "response_hop_limit") != 1.0 || changed["name"] != "before" {
		t.Errorf("patched: %v", changed["metadata_service"])
	}
	wantError(t, patch(object{"name": "after"}, tag), 412, "precondition_failed")
	patch(object{"name": "after"}, first.Header.Get("ETag")).Want(200)
	patch(object{"name": "after"}, "").Want(200)
	patch(object{"metadata_service": object{"response_hop_limit": 64}}, "*").Want(200)
	if i, _ := w.d.Instances.Get(id); i.Metadata != (vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 64}) {
		t.Errorf("stored: %+v", i.Metadata)
	}
	wantError(t, patch(object{"name": "other"}, ""), 409, "instance_name_exists")
	patch(object{"metadata_service": object{"protocol": "https"}}, "").Want(200)
	wantError(t, patch(object{"metadata_service": object{"protocol": "ftp"}}, ""), 400, "validation_enum")
	wantError(t, patch(object{"profile": object{"name": "bx2-4x16"}}, ""), 409, "invalid_state")
	wantError(t, patch(object{"profile": object{"name": "none"}}, ""), 404, "not_found")
	w.setStatus(id, vpc.Stopped)
	if got := patch(object{"profile": object{"name": "bx2-4x16"}}, "").Want(200); text(got, "profile", "name") != "bx2-4x16" || at(got, "vcpu", "count") != 4.0 {
		t.Errorf("resized: %v %v", got["profile"], got["vcpu"])
	}
	wantError(t, patch(object{"enable_secure_boot": true}, ""), 400, "bad_field")
}

func TestTheWayIntoAnInstanceIsForConsoleAdministratorsAndIsRecorded(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	id := text(w.post("/instances", instanceIn(subnetID, nil)), "id")
	p := "/instances/" + id + "/local_access"
	wantError(t, w.call("", "GET", p, nil), 409, "invalid_state")
	w.setStatus(id, vpc.Running)
	w.Grant(operator, "is", "Administrator")
	wantError(t, w.call(operator, "GET", p, nil), 403, "not_authorized")
	w.Grant(operator, "is", "Console Administrator")
	if got := w.call(operator, "GET", p, nil).Want(200); got["driver"] != "local" || got["namespace"] != id {
		t.Errorf("local access: %v", got)
	}
	if e := w.Events(1)[0]; e.Action != "is.instance.console.read" || e.Outcome != "success" || e.Initiator.ID != operator {
		t.Errorf("event %s %s of %s", e.Action, e.Outcome, e.Initiator.ID)
	}

	bare := apitest.New(t)
	vpcapi.Register(bare.Mux, bare.Config, vpcapi.Options{})
	alone := &world{Env: bare, t: t, d: bare.Config.Directory}
	_, subnetID = alone.network(8)
	id = text(alone.post("/instances", instanceIn(subnetID, nil)), "id")
	alone.setStatus(id, vpc.Running)
	wantError(t, alone.call("", "GET", "/instances/"+id+"/local_access", nil), 404, "not_found")
}

func TestEveryChangeIsAnEventWithItsTarget(t *testing.T) {
	w := newWorld(t)
	last := func(action, typeURI, crn string) {
		t.Helper()
		e := w.Events(1)[0]
		if e.Action != action || e.Target.TypeURI != typeURI || e.Target.ID != crn || e.Outcome != "success" {
			t.Errorf("event %s of %s %s (%s), want %s of %s %s", e.Action, e.Target.TypeURI, e.Target.ID, e.Outcome, action, typeURI, crn)
		}
	}
	v := w.post("/vpcs", object{})
	last("is.vpc.vpc.create", "is.vpc/vpc", text(v, "crn"))
	n := w.post("/subnets", object{"vpc": object{"crn": v["crn"]}, "zone": object{"name": "us-south-3"}, "total_ipv4_address_count": 8})
	last("is.subnet.subnet.create", "is.subnet/subnet", text(n, "crn"))
	k := w.post("/keys", object{"public_key": ed25519Key})
	last("is.key.key.create", "is.key/key", text(k, "crn"))
	f := w.post("/floating_ips", object{"zone": object{"name": "us-south-3"}})
	last("is.floating-ip.floating-ip.create", "is.floating-ip/floating-ip", text(f, "crn"))
	i := w.post("/instances", instanceIn(text(n, "id"), nil))
	last("is.instance.instance.create", "is.instance/instance", text(i, "crn"))
	one := "/instances/" + text(i, "id")
	w.call("", "PATCH", one, object{"name": "renamed"}).Want(200)
	last("is.instance.instance.update", "is.instance/instance", text(i, "crn"))
	w.post(one+"/actions", object{"type": "stop"})
	last("is.instance.action.create", "is.instance/instance", text(i, "crn"))
	w.call("", "DELETE", one, nil).Want(204)
	last("is.instance.instance.delete", "is.instance/instance", text(i, "crn"))
	w.call("", "DELETE", "/keys/"+text(k, "id"), nil).Want(204)
	last("is.key.key.delete", "is.key/key", text(k, "crn"))
	w.call("", "DELETE", "/floating_ips/"+text(f, "id"), nil).Want(204)
	last("is.floating-ip.floating-ip.delete", "is.floating-ip/floating-ip", text(f, "crn"))
}

func TestAConcurrentDeleteAndPatchLeaveNoInstanceThatIsBothAliveAndUnlinked(t *testing.T) {
	w := newWorld(t)
	_, subnetID := w.network(16)
	p := w.profile(w.Owner.AccountID, "p")
	for range 5 {
		i := w.post("/instances", instanceIn(subnetID, object{"default_trusted_profile": object{"target": object{"id": p.ID}}}))
		id := text(i, "id")
		w.setStatus(id, vpc.Running)
		var wg sync.WaitGroup
		for _, change := range []func(){
			func() { w.call("", "DELETE", "/instances/"+id, nil).Want(204) },
			func() { w.call("", "PATCH", "/instances/"+id, object{"metadata_service": object{"enabled": true}}) },
			func() { w.call("", "POST", "/instances/"+id+"/actions", object{"type": "stop"}) },
		} {
			wg.Go(change)
		}
		wg.Wait()
		if got, _ := w.d.Instances.Get(id); got.Status != vpc.Deleting || w.d.LinksByResource.Len(directory.ResourceKey(got.CRN)) != 0 {
			t.Fatalf("status %s with %d links", got.Status, w.d.LinksByResource.Len(directory.ResourceKey(got.CRN)))
		}
		err := w.d.Update(context.Background(), "host", func(tx *directory.Tx) error {
			gone, _ := w.d.Instances.Get(id)
			w.d.Instances.Delete(tx, gone)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
