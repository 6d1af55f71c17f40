package cli

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAPolicyIsWrittenInTheFormOfPublishedClients(t *testing.T) {
	s := sceneA(t)
	s.login()
	s.answer("GET /v2/resource_groups", list("resources", item("id", account, "name", "Default")))
	attribute := func(name, op, value string) any { return item("name", name, "operator", op, "value", value) }
	acct := item("name", "accountId", "value", account)
	for name, c := range map[string]struct {
		flags []string
		asks  string // service_name of the roles
		want  []any
	}{
		"everything":         {nil, "alliamserviceroles", []any{attribute("serviceType", "stringEquals", "service"), acct}},
		"account management": {[]string{"--account-management"}, "", []any{attribute("serviceType", "stringEquals", "platform_service"), acct}},
		"one service": {[]string{"--service-name", "is", "--attributes", "vpcId=*", "--region", "us-*"}, "is", []any{
			attribute("serviceName", "stringEquals", "is"), attribute("region", "stringMatch", "us-*"), attribute("vpcId", "stringEquals", "*"), acct,
		}},
		"a group": {[]string{"--resource-group-name", "Default"}, "", []any{attribute("resourceGroupId", "stringEquals", account), acct}},
		"the group itself": {[]string{"--resource-type", "resource-group", "--resource", account}, "resource-controller", []any{
			attribute("resourceType", "stringEquals", "resource-group"), attribute("resource", "stringEquals", account), acct,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, append([]string{"iam", "trusted-profile-policy-create", profileID, "--roles", "viewer"}, c.flags...)...).want(0)
			var asked string
			var body map[string]any
			for _, r := range s.requests() {
				switch r.Path {
				case "/v2/roles":
					asked = r.Query.Get("service_name")
				case "/v1/policies":
					body = r.json(t)
				}
			}
			if asked != c.asks {
				t.Errorf("roles were asked for with service_name %q, want %q", asked, c.asks)
			}
			if diff := cmp.Diff([]any{item("attributes", c.want)}, body["resources"]); diff != "" {
				t.Error(diff)
			}
		})
	}

	run(t, "iam", "trusted-profile-policy-create", profileID, "--roles", "Operator,IP Spoofing Operator", "--service-name", "is",
		"--attributes", "vpcId=*", "--tags", "env:prod", "--api-version", "v2").want(0, "policy-2")
	wantBody(t, s.sent("POST /v2/policies"), item(
		"type", "access",
		"subject", item("attributes", []any{item("key", "iam_id", "operator", "stringEquals", "value", "iam-"+profileID)}),
		"control", item("grant", item("roles", []any{
			item("role_id", "crn:v1:bluemix:public:iam::::role:Operator"), item("role_id", "crn:v1:bluemix:public:is::::serviceRole:IPSpoofingOperator"),
		})),
		"resource", item("attributes", []any{
			item("key", "serviceName", "operator", "stringEquals", "value", "is"),
			item("key", "vpcId", "operator", "stringExists", "value", true),
			item("key", "accountId", "operator", "stringEquals", "value", account),
		}, "tags", []any{item("key", "env", "operator", "stringEquals", "value", "prod")}),
	))

	run(t, "iam", "trusted-profile-policy-create", profileID, "--roles", "Emperor", "--service-name", "is").
		want(1, `no role "Emperor"`, "Viewer, Operator, IP Spoofing Operator")
	run(t, "iam", "trusted-profile-policy-create", profileID).want(2, "--roles")
	run(t, "iam", "trusted-profile-policy-create", profileID, "--roles", "Viewer", "--attributes", "vpcId").want(2, "name=value")

	writeFile(t, "policy.json", `{"subjects":[{"attributes":[{"name":"iam_id","value":"somebody-else"}]}],"roles":[{"role_id":"r"}],"resources":[]}`)
	run(t, "iam", "service-policy-create", "ServiceId-"+uuidA, "--file", "@policy.json").want(0)
	wantBody(t, s.sent("POST /v1/policies"), item("type", "access", "roles", []any{item("role_id", "r")}, "resources", []any{},
		"subjects", []any{item("attributes", []any{item("name", "iam_id", "value", "iam-ServiceId-"+uuidA)})}))

	for ref, want := range map[string]string{"owner@example.com": "IBMid-OWNER", "IBMid-7": "IBMid-7"} {
		run(t, "iam", "user-policy-create", ref, "--roles", "Viewer").want(0)
		if r := s.sent("POST /v1/policies"); !strings.Contains(r.Body, `"value":"`+want+`"`) {
			t.Errorf("user %s became %s", ref, r.Body)
		}
	}
	run(t, "iam", "user-policy-create", "somebody", "--roles", "Viewer").want(1, "IAM ID")
	users := "GET /v2/accounts/" + account + "/users"
	s.answer(users, list("resources"))
	run(t, "iam", "user-policy-create", "other@example.com", "--roles", "Viewer").want(1, "other@example.com", "tabard account users")
	s.answer(users, list("resources", item("iam_id", "IBMid-8", "user_id", "other@example.com")))
	run(t, "iam", "user-policy-create", "other@example.com", "--roles", "Viewer").want(0)
	if r := s.sent("POST /v1/policies"); !strings.Contains(r.Body, `"value":"IBMid-8"`) {
		t.Errorf("the address became %s", r.Body)
	}
}

func TestAPolicyIsOnlyDeletedForItsOwnSubject(t *testing.T) {
	s := newServer(t)
	s.login()
	policy := func(iamID string) any {
		return item("id", "p1", "subject", item("attributes", []any{item("key", "iam_id", "value", iamID)}))
	}
	s.answer("DELETE /v1/policies/p1", reply{status: 204})
	s.answer("GET /v2/policies/p1", policy("iam-Profile-other"))
	run(t, "iam", "trusted-profile-policy-delete", profileID, "p1", "-f").want(1, "policy p1 is not one of "+profileID)
	for _, r := range s.requests() {
		if r.Method == http.MethodDelete {
			t.Fatal("another subject's policy was deleted")
		}
	}
	s.answer("GET /v2/policies/p1", policy("iam-"+profileID))
	run(t, "iam", "trusted-profile-policy-delete", profileID, "p1", "-f").want(0, "Policy p1 was deleted.")
	s.sent("DELETE /v1/policies/p1")
}

func TestAnUpdateSendsTheTagOfWhatItRead(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/profiles/"+profileID, reply{status: 200, body: item("id", profileID, "name", "p"), header: map[string]string{"ETag": "3-abc"}})
	s.answer("PUT /v1/profiles/"+profileID, item("id", profileID, "name", "q"))
	run(t, "iam", "trusted-profile-update", profileID, "--name", "q", "--description", "").want(0, "was updated")
	r := s.sent("PUT /v1/profiles/" + profileID)
	if r.Header.Get("If-Match") != "3-abc" {
		t.Errorf("If-Match is %q", r.Header.Get("If-Match"))
	}
	wantBody(t, r, item("name", "q", "description", ""))
	run(t, "iam", "trusted-profile-update", profileID).want(2, "nothing to change")

	group := "AccessGroupId-" + uuidA
	s.answer("GET /v2/groups/"+group, reply{status: 200, body: item("id", group, "name", "g"), header: map[string]string{"ETag": "1-g"}})
	s.answer("PATCH /v2/groups/"+group, item("id", group, "name", "h"))
	run(t, "iam", "access-group-update", group, "-n", "h").want(0)
	if r := s.sent("PATCH /v2/groups/" + group); r.Header.Get("If-Match") != "1-g" {
		t.Errorf("If-Match is %q", r.Header.Get("If-Match"))
	}
}

func TestAnAPIKeyIsShownOnceOrGoesToAPrivateFile(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/serviceids", list("serviceids", item("id", "ServiceId-"+uuidA, "name", "my-service")))
	s.answer("POST /v1/apikeys", reply{status: 201, body: item("id", "ApiKey-"+uuidA, "name", "k", "apikey", secretKey)})
	run(t, "iam", "service-api-key-create", "k", "my-service").want(0, secretKey)
	wantBody(t, s.sent("POST /v1/apikeys"), item("name", "k", "iam_id", "iam-ServiceId-"+uuidA, "account_id", account))

	for _, more := range [][]string{nil, {"--output", "json"}} {
		if err := os.Remove("key.json"); err != nil && more != nil {
			t.Fatal(err)
		}
		out := run(t, append([]string{"iam", "api-key-create", "k", "--file", "key.json", "--lock"}, more...)...).want(0)
		if strings.Contains(out.stdout+out.stderr, secretKey) {
			t.Errorf("the key is printed although it goes to a file: %s", out.stdout)
		}
		r := s.sent("POST /v1/apikeys")
		wantBody(t, r, item("name", "k", "iam_id", "IBMid-OWNER", "account_id", account))
		if r.Header.Get("Entity-Lock") != "true" {
			t.Error("the key is not locked")
		}
		info, err := os.Stat("key.json")
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the key file: %v %v", info, err)
		}
		// A file that is there may hold the only copy of another key.
		before := len(s.requests())
		again := run(t, append([]string{"iam", "api-key-create", "k2", "--file", "key.json"}, more...)...).want(1)
		if !strings.Contains(again.stderr, "there already") || len(s.requests()) != before {
			t.Errorf("a key was made for a file that is taken: %s", again.stderr)
		}
	}
	run(t, "login", "--apikey", "@key.json").want(0)
	if r := s.sent("POST /identity/token"); !strings.Contains(r.Body, secretKey) {
		t.Errorf("the key file did not log in: %s", r.Body)
	}
	run(t, "iam", "api-key-create", "k", "--file", "no/such/dir/key.json").want(1)
	if sent := s.requests(); len(sent) != 0 {
		t.Errorf("a key was created that cannot be kept: %v", sent)
	}
}

func TestMembersOfAnAccessGroupAreAddedByName(t *testing.T) {
	s := sceneA(t)
	s.login()
	group := "AccessGroupId-" + uuidA
	path := "/v2/groups/" + group + "/members"
	s.answer("GET /v2/groups", list("groups", item("id", group, "name", "ops")))
	s.answer("PUT "+path, reply{status: 207, body: list("members", item("iam_id", "iam-"+profileID, "status_code", 200))})
	run(t, "iam", "access-group-trusted-profile-add", "ops", "my-trusted-profile").want(0, "Added to access group ops.")
	wantBody(t, s.sent("PUT "+path), list("members", item("iam_id", "iam-"+profileID, "type", "profile")))
	run(t, "iam", "access-group-user-add", "ops", "--iam-ids", "IBMid-1,IBMid-2").want(0)
	wantBody(t, s.sent("PUT "+path), list("members", item("iam_id", "IBMid-1", "type", "user"), item("iam_id", "IBMid-2", "type", "user")))
	run(t, "iam", "access-group-user-add", "ops").want(2, "at least one user")

	s.answer("PUT "+path, reply{status: 207, body: list("members", item("iam_id", "IBMid-1", "status_code", 404, "errors", []any{item("code", "x", "message", "who is that")}))})
	run(t, "iam", "access-group-user-add", "ops", "IBMid-1").want(1, "member IBMid-1 was refused with status 404: who is that.")

	s.answer("DELETE "+path+"/IBMid-1", reply{status: 204})
	run(t, "iam", "access-group-user-remove", "ops", "IBMid-1").want(0, "User IBMid-1 was removed.")
	s.answer("DELETE "+path+"/iam-"+profileID, reply{status: 204})
	run(t, "iam", "access-group-trusted-profile-remove", "ops", "my-trusted-profile").want(1, "use -f")
	run(t, "iam", "access-group-trusted-profile-remove", "ops", "my-trusted-profile", "-f").want(0)
}

func TestIdentitiesOfAProfileAreNamedInAnyForm(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/serviceids", list("serviceids", item("id", "ServiceId-"+uuidA, "name", "my-service")))
	base := "/v1/profiles/" + profileID + "/identities/"
	s.answer("POST "+base+"serviceid", item("type", "serviceid", "identifier", "ServiceId-"+uuidA))
	run(t, "iam", "trusted-profile-identity-create", profileID, "--id", "my-service", "--id-type", "serviceid").want(0)
	wantBody(t, s.sent("POST "+base+"serviceid"), item("identifier", "ServiceId-"+uuidA, "type", "serviceid"))
	crn := "crn:v1:bluemix:public:is:us-south-1:a/" + account + "::instance:0717_1"
	s.answer("DELETE "+base+"crn/crn:v1:bluemix:public:is:us-south-1:a%2F"+account+"::instance:0717_1", reply{status: 204})
	run(t, "iam", "trusted-profile-identity-delete", profileID, crn, "--id-type", "CRN", "-f").want(0)
}

func TestRolesAreOneList(t *testing.T) {
	sceneA(t).login()
	var got []map[string]any
	if err := json.Unmarshal([]byte(run(t, "iam", "roles", "--service", "is", "-o", "json").want(0).stdout), &got); err != nil || len(got) != 3 {
		t.Errorf("roles are %v, %v", got, err)
	}
}

func TestAConditionMayHaveColonsAndCommasInItsValue(t *testing.T) {
	for in, want := range map[string]map[string]string{
		"claim:crn,operator:EQUALS,value:crn:v1:a,b":         {"claim": "crn", "operator": "EQUALS", "value": `"crn:v1:a,b"`},
		`operator:in, claim:name,value:["a","b"]`:            {"claim": "name", "operator": "IN", "value": `["a","b"]`},
		`claim:pod,operator:contains,value:"x"`:              {"claim": "pod", "operator": "CONTAINS", "value": `"x"`},
		`claim:pod,operator:EQUALS,value:[oops`:              {"claim": "pod", "operator": "EQUALS", "value": `"[oops"`},
		`claim:namespace,operator:EQUALS,value:true`:         {"claim": "namespace", "operator": "EQUALS", "value": `"true"`},
		"claim:a,operator:EQUALS":                            nil,
		"claim:a,value:b":                                    nil,
		"claim:a,operator:EQUALS,value:":                     nil,
		"claim:a,operator:EQUALS,colour:red,value:something": nil,
	} {
		got, err := parseCondition(in)
		if (err == nil) != (want != nil) || err == nil && !cmp.Equal(want, got) {
			t.Errorf("parseCondition(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
}
