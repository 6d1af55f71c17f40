package cli

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAServiceInstanceIsCreatedByTheNamesOfServiceAndPlan(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v2/resource_plans", []any{
		item("id", "plan-1", "name", "lite", "service_name", "kms"), item("id", "plan-2", "name", "lite", "service_name", "cloud-object-storage"),
	})
	s.answer("GET /v2/resource_groups", list("resources", item("id", account, "name", "Default", "default", true)))
	s.answer("POST /v2/resource_instances", reply{status: 201, body: item("guid", uuidA, "name", "my-bucket")})
	run(t, "resource", "service-instance-create", "my-bucket", "cloud-object-storage", "lite", "us-south", "-p", `{"a":1}`).want(0, uuidA)
	wantBody(t, s.sent("POST /v2/resource_instances"), item("name", "my-bucket", "target", "us-south", "resource_plan_id", "plan-2",
		"resource_group", account, "parameters", item("a", 1.0)))
	run(t, "resource", "service-instance-create", "b", "kms", "gold", "us-south").want(1, "no plan of kms")
	run(t, "resource", "plans", "--service", "kms").want(0, "plan-1")

	s.answer("DELETE /v2/resource_instances/"+uuidA, reply{status: 204})
	run(t, "resource", "service-instance-delete", "crn:v1:bluemix:public:kms:us-south:a/"+account+":"+uuidA+"::", "-f").want(0)

	s.answer("GET /v2/resource_instances", list("resources"))
	run(t, "resource", "service-instances", "-g", "Default").want(0, "No service instances found.")
	if got := s.sent("GET /v2/resource_instances").Query.Get("resource_group_id"); got != account {
		t.Errorf("the group's id is %q", got)
	}
	s.answer("POST /v2/resource_groups", reply{status: 201, body: item("id", account, "crn", "crn:g")})
	run(t, "resource", "group-create", "g2").want(0, account)
	wantBody(t, s.sent("POST /v2/resource_groups"), item("name", "g2", "account_id", account))
}

func TestANewObjectGoesToTheTargetedGroup(t *testing.T) {
	s := sceneA(t)
	s.login()
	s.answer("GET /v2/resource_groups/"+account, item("id", account, "name", "Default"))
	run(t, "target", "-g", account).want(0, "Default")
	run(t, "is", "vpc-create", "v").want(0)
	if diff := cmp.Diff(item("id", account), s.sent("POST /v1/vpcs").json(t)["resource_group"]); diff != "" {
		t.Error(diff)
	}
}

func TestZonesAreThoseOfTheRegion(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/regions/us-south/zones", list("zones", item("name", "us-south-1", "region", item("name", "us-south"))))
	run(t, "is", "zones").want(0, "us-south-1")
	run(t, "target", "--unset-region").want(0)
	run(t, "is", "zones").want(0, "us-south-1")
}

func TestAFloatingIPIsBoundByTheNamesOfInstanceAndInterface(t *testing.T) {
	s := sceneA(t)
	s.login()
	s.answer("PATCH /v1/floating_ips/"+fipID, item("id", fipID))
	run(t, "is", "floating-ip-update", "my-fip1", "--nic", "primary-nic", "--in", "my-instance").want(0)
	wantBody(t, s.sent("PATCH /v1/floating_ips/"+fipID), item("target", item("id", nicID)))
	run(t, "is", "floating-ip-update", "my-fip1", "--reset-target").want(0)
	wantBody(t, s.sent("PATCH /v1/floating_ips/"+fipID), item("target", nil))
	run(t, "is", "floating-ip-update", "my-fip1", "--nic", "primary-nic").want(2, "--in")
}
