package vpcapi_test

import (
	"context"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/vpc"
)

// at makes a call with a version of the API.
func (w *world) atVersion(version, method, p string, body any) *apitest.Response {
	w.t.Helper()
	return w.Do(apitest.Request{Method: method, Path: "/v1" + p + "?generation=2&version=" + version, Body: body})
}

func TestANewVPCHasADefaultGroupThatLetsMembersInAndEverythingOut(t *testing.T) {
	w := newWorld(t)
	v := w.post("/vpcs", object{"name": "my-vpc"})
	id := text(v, "default_security_group", "id")
	if g, ok := w.d.SecurityGroups.Get(id); !ok || g.VPCID != text(v, "id") || len(g.Rules) != 2 {
		t.Fatalf("stored: %+v", g)
	}
	g := w.get("/vpcs/" + text(v, "id") + "/default_security_group")
	for n, want := range []object{
		{"direction": "outbound", "cidr": "0.0.0.0/0", "group": ""}, {"direction": "inbound", "cidr": "", "group": id},
	} {
		r := at(g, "rules", n)
		wantNames(t, "rule", r, "direction href id ip_version local name protocol remote resource_type")
		if text(r, "direction") != want["direction"] || text(r, "remote", "cidr_block") != want["cidr"] || text(r, "remote", "id") != want["group"] || text(r, "protocol") != "any" {
			t.Errorf("rule %d: %v", n, r)
		}
	}
	wantError(t, w.call("", "DELETE", "/security_groups/"+id, nil), 409, "security_group_in_use")
	renamed := w.call("", "PATCH", "/security_groups/"+id, object{"name": "renamed"}).Want(200)
	if renamed["name"] != "renamed" || text(w.get("/vpcs/"+text(v, "id")), "default_security_group", "name") != "renamed" {
		t.Errorf("renamed: %v", renamed["name"])
	}
	w.call("", "DELETE", "/vpcs/"+text(v, "id"), nil).Want(204)
	if w.d.SecurityGroups.Len() != 0 {
		t.Error("the VPC's group outlived it")
	}
}

func TestAVPCFromBeforeSecurityGroupsHasADefaultGroup(t *testing.T) {
	w := newWorld(t)
	old := &vpc.VPC{
		ID: "r006-old", AccountID: w.Owner.AccountID, Name: "old", ResourceGroupID: text(w.post("/vpcs", object{}), "resource_group", "id"),
		SecurityGroup: vpc.Ref{ID: "r006-11111111-2222-4333-8444-555555555555", Name: "old-group"},
	}
	if err := w.d.Update(context.Background(), "", func(tx *directory.Tx) error { w.d.VPCs.Put(tx, old); return nil }); err != nil {
		t.Fatal(err)
	}
	p := "/security_groups/" + old.SecurityGroup.ID
	first := w.get(p)
	rule := text(first, "rules", 1, "id")
	if len(items(first, "rules")) != 2 || text(w.get(p), "rules", 1, "id") != rule || text(first, "vpc", "id") != old.ID {
		t.Fatalf("the group is %v", first)
	}
	if n := len(items(w.get("/security_groups?vpc.id=r006-old"), "security_groups")); n != 1 {
		t.Errorf("%d groups of the VPC are listed", n)
	}
	w.get(p + "/rules/" + rule)
	made := w.post(p+"/rules", object{"direction": "inbound", "protocol": "tcp", "port_min": 22, "port_max": 22})
	w.call("", "DELETE", p+"/rules/"+rule, nil).Want(204)
	if g, ok := w.d.SecurityGroups.Get(old.SecurityGroup.ID); !ok || len(g.Rules) != 2 || g.Rules[1].ID != text(made, "id") {
		t.Errorf("stored: %+v", g)
	}
	w.call("", "DELETE", "/vpcs/r006-old", nil).Want(204)
	wantError(t, w.call("", "GET", p, nil), 404, "not_found")
}

func TestRulesOfRules(t *testing.T) {
	w := newWorld(t)
	v := text(w.post("/vpcs", object{}), "id")
	foreign := text(w.post("/vpcs", object{}), "default_security_group", "id")
	g := w.post("/security_groups", object{"name": "web", "vpc": object{"id": v}, "rules": []any{
		object{"direction": "inbound", "protocol": "tcp", "port_min": 80, "port_max": 443, "name": "web"},
		object{"direction": "inbound", "protocol": "icmp", "type": 8, "code": 0, "remote": object{"address": "192.0.2.1"}},
		object{"direction": "outbound", "protocol": "udp", "remote": object{"cidr_block": "10.0.0.0/8"}},
		object{"direction": "inbound", "protocol": "any", "remote": object{"name": "web"}},
	}})
	p := "/security_groups/" + text(g, "id")
	if text(g, "rules", 1, "remote", "address") != "192.0.2.1" || at(g, "rules", 1, "code") != 0.0 || at(g, "rules", 1, "type") != 8.0 ||
		text(g, "rules", 2, "remote", "cidr_block") != "10.0.0.0/8" || text(g, "rules", 3, "remote", "name") != "web" || at(g, "rules", 0, "port_max") != 443.0 {
		t.Errorf("rules: %v", g["rules"])
	}
	rule := func(more object) object {
		m := object{"direction": "inbound", "protocol": "tcp"}
		for k, x := range more {
			m[k] = x
		}
		return m
	}
	for _, test := range []struct {
		body   object
		status int
		code   string
	}{
		{object{"protocol": "tcp"}, 400, "validation_required_field"},
		{object{"direction": "inbound"}, 400, "validation_required_field"},
		{rule(object{"direction": "sideways"}), 400, "validation_enum"},
		{rule(object{"protocol": "gre"}), 400, "validation_enum"},
		{rule(object{"ip_version": "ipv6"}), 400, "validation_enum"},
		{rule(object{"port_min": 80}), 400, "bad_field"},
		{rule(object{"port_min": 80, "port_max": 79}), 400, "bad_field"},
		{rule(object{"port_min": 0, "port_max": 79}), 400, "bad_field"},
		{rule(object{"port_min": 1, "port_max": 65536}), 400, "bad_field"},
		{rule(object{"port_min": "80", "port_max": "80"}), 400, "bad_field"},
		{rule(object{"type": 8}), 400, "bad_field"},
		{rule(object{"protocol": "icmp", "code": 0}), 400, "bad_field"},
		{rule(object{"protocol": "icmp", "type": 255}), 400, "bad_field"},
		{rule(object{"protocol": "any", "port_min": 80, "port_max": 80}), 400, "bad_field"},
		{rule(object{"remote": object{}}), 400, "bad_field"},
		{rule(object{"remote": object{"address": "10.0.0.1", "cidr_block": "10.0.0.0/8"}}), 400, "bad_field"},
		{rule(object{"remote": object{"address": "fd00::1"}}), 400, "bad_field"},
		{rule(object{"remote": object{"cidr_block": "10.0.0.1/8"}}), 400, "bad_field"},
		{rule(object{"remote": object{"id": foreign}}), 404, "not_found"},
		{rule(object{"remote": object{"name": "none"}}), 404, "not_found"},
		{rule(object{"local": object{"address": "10.0.0.1"}}), 400, "bad_field"},
		{rule(object{"name": "web"}), 409, "validation_unique_failed"},
		{rule(object{"name": "Not-Valid"}), 400, "validation_invalid_name"},
	} {
		wantError(t, w.call("", "POST", p+"/rules", test.body), test.status, test.code)
	}
	if n := len(items(w.get(p+"/rules"), "rules")); n != 4 {
		t.Errorf("%d rules", n)
	}
	one := p + "/rules/" + text(g, "rules", 0, "id")
	patched := w.call("", "PATCH", one, object{"port_min": nil, "port_max": nil, "remote": object{"address": "192.0.2.2"}}).Want(200)
	if patched["port_min"] != nil || text(patched, "remote", "address") != "192.0.2.2" || patched["name"] != "web" {
		t.Errorf("patched: %v", patched)
	}
	wantError(t, w.call("", "PATCH", one, object{"port_max": 90}), 400, "bad_field")
	wantError(t, w.call("", "PATCH", one, object{"protocol": "udp"}), 400, "bad_field")
	back := w.call("", "PATCH", one, object{"remote": object{"cidr_block": "0.0.0.0/0"}, "local": object{"cidr_block": "0.0.0.0/0"}}).Want(200)
	if text(back, "remote", "cidr_block") != "0.0.0.0/0" {
		t.Errorf("patched: %v", back)
	}
	w.call("", "DELETE", one, nil).Want(204)
	wantError(t, w.call("", "GET", one, nil), 404, "not_found")
	if e := w.Events(1)[0]; e.Action != "is.security-group.rule.delete" || !strings.Contains(string(e.ResponseData), `"rule"`) {
		t.Errorf("event %s %s", e.Action, e.ResponseData)
	}
}

func TestTheWordForThreeProtocolsFollowsTheVersion(t *testing.T) {
	w := newWorld(t)
	v := w.post("/vpcs", object{})
	p := "/security_groups/" + text(v, "default_security_group", "id") + "/rules"
	for _, word := range []string{"all", "icmp_tcp_udp"} {
		one := p + "/" + text(w.post(p, object{"direction": "inbound", "protocol": word}), "id")
		for version, want := range map[string]string{"2025-12-08": "all", "2025-12-09": "icmp_tcp_udp", "2026-01-27": "icmp_tcp_udp"} {
			if got := text(w.atVersion(version, "GET", one, nil).Want(200), "protocol"); got != want {
				t.Errorf("made as %s, at version %s: %s", word, version, got)
			}
		}
	}
	stored, _ := w.d.SecurityGroups.Get(text(v, "default_security_group", "id"))
	if r := stored.Rules[2]; len(r.Protocols()) != 3 {
		t.Errorf("stored: %+v", r)
	}
}

func TestInterfacesComeIntoGroupsAndLeaveThem(t *testing.T) {
	w := newWorld(t)
	v, subnetID := w.network(16)
	byDefault := text(w.get("/vpcs/"+v), "default_security_group", "id")
	web := text(w.post("/security_groups", object{"name": "web", "vpc": object{"id": v}}), "id")
	db := text(w.post("/security_groups", object{"name": "db", "vpc": object{"id": v}}), "id")
	elsewhere := text(w.post("/vpcs", object{}), "default_security_group", "id")

	plain := w.post("/instances", instanceIn(subnetID, nil))
	nic := text(plain, "primary_network_interface", "id")
	chosen := w.post("/instances", instanceIn(subnetID, object{"primary_network_interface": object{
		"subnet": object{"id": subnetID}, "security_groups": []any{object{"id": web}, object{"id": db}, object{"id": web}},
	}}))
	inWeb := w.get("/security_groups/" + web)
	if len(items(inWeb, "targets")) != 1 || text(inWeb, "targets", 0, "id") != text(chosen, "primary_network_interface", "id") {
		t.Errorf("targets of web: %v", inWeb["targets"])
	}
	wantNames(t, "target", at(inWeb, "targets", 0), "href id name resource_type")
	if all := w.get("/security_groups/" + byDefault + "/targets"); all["total_count"] != 1.0 || text(all, "targets", 0, "id") != nic {
		t.Errorf("targets of the default group: %v", all)
	}

	w.call("", "PUT", "/security_groups/"+web+"/targets/"+nic, nil).Want(200)
	w.call("", "PUT", "/security_groups/"+web+"/targets/"+nic, nil).Want(200)
	shown := w.get("/instances/" + text(plain, "id") + "/network_interfaces/" + nic)
	if len(items(shown, "security_groups")) != 2 || text(shown, "security_groups", 0, "id") != byDefault || text(shown, "security_groups", 1, "name") != "web" {
		t.Errorf("groups of the interface: %v", shown["security_groups"])
	}
	wantError(t, w.call("", "DELETE", "/security_groups/"+web, nil), 409, "security_group_in_use")
	w.call("", "DELETE", "/security_groups/"+byDefault+"/targets/"+nic, nil).Want(204)
	wantError(t, w.call("", "DELETE", "/security_groups/"+byDefault+"/targets/"+nic, nil), 404, "not_found")
	wantError(t, w.call("", "DELETE", "/security_groups/"+web+"/targets/"+nic, nil), 409, "invalid_state")
	wantError(t, w.call("", "PUT", "/security_groups/"+web+"/targets/none", nil), 404, "not_found")
	wantError(t, w.call("", "PUT", "/security_groups/"+elsewhere+"/targets/"+nic, nil), 400, "validation_failure")
	wantError(t, w.call("", "POST", "/instances", instanceIn(subnetID, object{"primary_network_interface": object{
		"subnet": object{"id": subnetID}, "security_groups": []any{object{"id": elsewhere}},
	}})), 400, "bad_field")

	// One that a rule of another group names stays, too.
	w.post("/security_groups/"+db+"/rules", object{"direction": "inbound", "protocol": "tcp", "remote": object{"id": web}})
	unused := text(w.post("/security_groups", object{"vpc": object{"id": v}}), "id")
	w.post("/security_groups/"+db+"/rules", object{"direction": "inbound", "protocol": "tcp", "remote": object{"id": unused}})
	wantError(t, w.call("", "DELETE", "/security_groups/"+unused, nil), 409, "security_group_in_use")
	wantError(t, w.call("", "POST", "/security_groups", object{"name": "web", "vpc": object{"id": v}}), 409, "validation_unique_failed")
}

func TestRightsOnSecurityGroups(t *testing.T) {
	w := newWorld(t)
	v, subnetID := w.network(16)
	web := text(w.post("/security_groups", object{"name": "web", "vpc": object{"id": v}}), "id")
	other := text(w.post("/security_groups", object{"name": "other", "vpc": object{"id": v}}), "id")
	nic := text(w.post("/instances", instanceIn(subnetID, nil)), "primary_network_interface", "id")
	w.grantOn(operator, "Operator", map[string]string{access.ServiceName: "is", "securityGroupId": web})
	listed := w.call(operator, "GET", "/security_groups", nil).Want(200)
	if len(items(listed, "security_groups")) != 1 || text(listed, "security_groups", 0, "id") != web {
		t.Errorf("an operator of one group sees %v", listed)
	}
	for _, test := range []struct {
		method, path string
		body         any
	}{
		{"GET", "/security_groups/" + other, nil},
		{"GET", "/security_groups/" + other + "/rules", nil},
		{"GET", "/security_groups/" + other + "/targets", nil},
		{"POST", "/security_groups/" + web + "/rules", object{"direction": "inbound", "protocol": "tcp"}},
		{"DELETE", "/security_groups/" + web, nil},
		{"PUT", "/security_groups/" + web + "/targets/" + nic, nil}, // not the instance's editor
		{"POST", "/security_groups", object{"vpc": object{"id": v}}},
	} {
		wantError(t, w.call(operator, test.method, test.path, test.body), 403, "not_authorized")
	}
	w.Grant(operator, "is.instance", "Editor")
	w.call(operator, "PUT", "/security_groups/"+web+"/targets/"+nic, nil).Want(200)
	foreign := func(method, p string, body any) *apitest.Response {
		return w.Do(apitest.Request{Method: method, Path: path(p), Body: body, As: w.Other.IAMID})
	}
	for _, p := range []string{"", "/rules", "/targets", "/targets/" + nic} {
		wantError(t, foreign("GET", "/security_groups/"+web+p, nil), 404, "not_found")
	}
	wantError(t, foreign("DELETE", "/security_groups/"+web, nil), 404, "not_found")
	wantError(t, foreign("POST", "/security_groups", object{"vpc": object{"id": v}}), 404, "not_found")
	theirs := text(foreign("POST", "/vpcs", object{}).Want(201), "default_security_group", "id")
	wantError(t, foreign("PUT", "/security_groups/"+theirs+"/targets/"+nic, nil), 404, "not_found")
	wantError(t, foreign("POST", "/security_groups/"+theirs+"/rules", object{"direction": "inbound", "protocol": "tcp", "remote": object{"id": web}}), 404, "not_found")
}
