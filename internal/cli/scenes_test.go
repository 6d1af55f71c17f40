package cli

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	profileID = "Profile-" + uuidA
	vpcID     = "r006-" + uuidA
	subnetID  = "0737-" + uuidA
	keyID     = "r006-" + uuidB
	imageID   = "r006-7e1a6f0c-52c4-4d0b-9d36-0c6f3b2a9e01"
	vmID      = "0737_" + uuidA
	nicID     = "0737-" + uuidB
	fipID     = "r006-" + uuidB
)

// sceneA prepares the answers to the command lines of a virtual server.
func sceneA(t *testing.T) *server {
	s := newServer(t)
	profile := item("id", profileID, "name", "my-trusted-profile", "iam_id", "iam-"+profileID)
	vpc := item("id", vpcID, "name", "my-vpc", "default_security_group", item("id", "r006-sg", "name", "sg-default"))
	subnet := item("id", subnetID, "name", "my-subnet", "vpc", item("id", vpcID))
	key := item("id", keyID, "name", "my-key")
	vm := item("id", vmID, "name", "my-instance", "status", "running")
	fip := item("id", fipID, "name", "my-fip1", "address", "198.51.100.1")
	s.answer("POST /v1/profiles", reply{status: 201, body: profile})
	s.answer("GET /v1/profiles", list("profiles", profile))
	s.answer("GET /v2/roles", item(
		"system_roles", []any{
			item("display_name", "Viewer", "crn", "crn:v1:bluemix:public:iam::::role:Viewer"),
			item("display_name", "Operator", "crn", "crn:v1:bluemix:public:iam::::role:Operator"),
		},
		"service_roles", []any{item("display_name", "IP Spoofing Operator", "crn", "crn:v1:bluemix:public:is::::serviceRole:IPSpoofingOperator")},
	))
	s.answer("POST /v1/policies", reply{status: 201, body: item("id", "policy-1", "state", "active")})
	s.answer("POST /v2/policies", reply{status: 201, body: item("id", "policy-2", "state", "active")})
	s.answer("POST /v1/vpcs", reply{status: 201, body: vpc})
	s.answer("GET /v1/vpcs", list("vpcs", vpc))
	s.answer("GET /v1/vpcs/"+vpcID, vpc)
	s.answer("POST /v1/subnets", reply{status: 201, body: subnet})
	s.answer("GET /v1/subnets", list("subnets", subnet, item("id", "0737-"+uuidB, "name", "my-subnet", "vpc", item("id", "r006-"+uuidB))))
	s.answer("POST /v1/keys", reply{status: 201, body: key})
	s.answer("GET /v1/keys", list("keys", key))
	s.answer("GET /v1/images", list("images", item("id", imageID, "name", "tabard-local-1")))
	s.answer("POST /v1/instances", reply{status: 201, body: vm})
	s.answer("GET /v1/instances", list("instances", vm))
	s.answer("GET /v1/instances/"+vmID, vm)
	s.answer("POST /v1/floating_ips", reply{status: 201, body: fip})
	s.answer("GET /v1/floating_ips", list("floating_ips", fip))
	s.answer("GET /v1/instances/"+vmID+"/network_interfaces", list("network_interfaces", item("id", nicID, "name", "primary-nic")))
	s.answer("PUT /v1/instances/"+vmID+"/network_interfaces/"+nicID+"/floating_ips/"+fipID, reply{status: 201, body: fip})
	return s
}

// wantBody compares a request's body.
func wantBody(t *testing.T, r seen, want map[string]any) {
	t.Helper()
	if diff := cmp.Diff(want, r.json(t)); diff != "" {
		t.Errorf("%s %s has another body (-want +got):\n%s", r.Method, r.Path, diff)
	}
}

func TestTheCommandLinesOfAVirtualServerWorkAsWritten(t *testing.T) {
	s := sceneA(t)
	writeFile(t, "DIR/owner.json", `{"name":"owner","account_id":"`+account+`","iam_id":"IBMid-OWNER","apikey":"`+secretKey+`","url":"http://elsewhere.invalid"}`)
	writeFile(t, "id_ed25519.pub", "ssh-ed25519 AAAAC3Nza me@here\n")

	run(t, "login", "-a", s.URL, "--apikey", "@DIR/owner.json").want(0, "owner", account, "us-south")
	login := s.sent("POST /identity/token")
	if got := login.Header.Get("Authorization"); got != "Basic Yng6Yng=" {
		t.Errorf("login sends Authorization %q", got)
	}
	if want := "apikey=" + secretKey + "&grant_type=urn%3Aibm%3Aparams%3Aoauth%3Agrant-type%3Aapikey&response_type=cloud_iam"; login.Body != want {
		t.Errorf("login sends %q, want %q", login.Body, want)
	}

	run(t, "iam", "trusted-profile-create", "my-trusted-profile", "--description", "My trusted profile").
		want(0, "Creating trusted profile my-trusted-profile under account "+account+" as user owner...\nOK\n", profileID)
	wantBody(t, s.sent("POST /v1/profiles"), item("name", "my-trusted-profile", "account_id", account, "description", "My trusted profile"))

	run(t, "iam", "trusted-profile-policy-create", "my-trusted-profile", "--roles", "Operator", "--service-name", "is").want(0, "policy-1")
	wantBody(t, s.sent("POST /v1/policies"), item(
		"type", "access",
		"subjects", []any{item("attributes", []any{item("name", "iam_id", "value", "iam-"+profileID)})},
		"roles", []any{item("role_id", "crn:v1:bluemix:public:iam::::role:Operator")},
		"resources", []any{item("attributes", []any{
			item("name", "serviceName", "value", "is", "operator", "stringEquals"), item("name", "accountId", "value", account),
		})},
	))

	run(t, "is", "vpc-create", "my-vpc").want(0, vpcID)
	create := s.sent("POST /v1/vpcs")
	wantBody(t, create, item("name", "my-vpc", "address_prefix_management", "auto"))
	if create.Query.Get("version") != vpcVersion || create.Query.Get("generation") != "2" {
		t.Errorf("a VPC call has the query %v", create.Query)
	}

	run(t, "is", "subnet-create", "my-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "256").want(0, subnetID)
	wantBody(t, s.sent("POST /v1/subnets"), item(
		"name", "my-subnet", "vpc", item("id", vpcID), "zone", item("name", "us-south-3"), "total_ipv4_address_count", 256.0, "ip_version", "ipv4"))

	run(t, "is", "key-create", "my-key", "@id_ed25519.pub").want(0, keyID)
	wantBody(t, s.sent("POST /v1/keys"), item("name", "my-key", "public_key", "ssh-ed25519 AAAAC3Nza me@here", "type", "ed25519"))

	run(t, "is", "instance-create", "my-instance", "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", "tabard-local-1",
		"--primary-network-interface", `{"name":"primary-nic","subnet":{"name":"my-subnet"}}`, "--keys", "my-key",
		"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile").want(0, vmID)
	wantBody(t, s.sent("POST /v1/instances"), item(
		"name", "my-instance", "vpc", item("id", vpcID), "zone", item("name", "us-south-3"), "profile", item("name", "bx2-2x8"),
		"image", item("id", imageID), "keys", []any{item("id", keyID)},
		"primary_network_interface", item("name", "primary-nic", "subnet", item("id", subnetID)),
		"metadata_service", item("enabled", true),
		"default_trusted_profile", item("auto_link", true, "target", item("id", profileID)),
	))

	run(t, "is", "floating-ip-reserve", "my-fip1", "--zone", "us-south-3").want(0, "198.51.100.1")
	wantBody(t, s.sent("POST /v1/floating_ips"), item("name", "my-fip1", "zone", item("name", "us-south-3")))

	run(t, "is", "instance-network-interface-floating-ip-add", "my-instance", "primary-nic", "my-fip1").want(0, "bound to primary-nic")
	s.sent("PUT /v1/instances/" + vmID + "/network_interfaces/" + nicID + "/floating_ips/" + fipID)
}

func TestTheCommandLinesOfAPodWorkAsWritten(t *testing.T) {
	s := sceneA(t)
	s.login()
	clusterCRN := "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":abcdefghij0123456789::"
	s.answer("POST /v1/clusters", reply{status: 201, body: item("id", "abcdefghij0123456789", "name", "my-cluster", "crn", clusterCRN)})
	s.answer("POST /v1/profiles/"+profileID+"/links", reply{status: 201, body: item("id", "Link-"+uuidA, "name", "my-link")})
	s.answer("POST /v1/profiles/"+profileID+"/rules", reply{status: 201, body: item("id", "ClaimRule-"+uuidA, "name", "my-rule")})
	ca := authority(t)
	writeFile(t, "ca.crt", ca)
	writeFile(t, "jwks.json", `{"keys":[{"kty":"EC"}]}`)

	run(t, "ks", "cluster-register", "my-cluster", "--issuer", "https://k8s.example:6443", "--ca-file", "ca.crt").want(0, clusterCRN)
	wantBody(t, s.sent("POST /v1/clusters"), item("name", "my-cluster", "issuer", "https://k8s.example:6443", "ca", ca))

	run(t, "ks", "cluster-register", "my-cluster", "--jwks", "jwks.json", "--issuer", "https://kubernetes.default.svc", "--audience", "mine", "--type", "ROKS_SA").want(0)
	wantBody(t, s.sent("POST /v1/clusters"), item("name", "my-cluster", "issuer", "https://kubernetes.default.svc",
		"jwks", item("keys", []any{item("kty", "EC")}), "audience", "mine", "type", "ROKS_SA"))

	run(t, "ks", "cluster-register", "my-cluster", "--jwks", "jwks.json").want(0)
	wantBody(t, s.sent("POST /v1/clusters"), item("name", "my-cluster", "issuer", "https://kubernetes.default.svc.cluster.local",
		"jwks", item("keys", []any{item("kty", "EC")})))
	run(t, "ks", "cluster-register", "my-cluster").want(2, "give --issuer")
	if sent := s.requests(); len(sent) != 0 {
		t.Errorf("wrong usage sent requests: %v", sent)
	}

	run(t, "iam", "trusted-profile-link-create", "my-trusted-profile", "--name", "my-link", "--cr-type", "IKS_SA",
		"--link-crn", clusterCRN, "--link-namespace", "default", "--link-name", "my-app").want(0, "Link-"+uuidA)
	wantBody(t, s.sent("POST /v1/profiles/"+profileID+"/links"), item("name", "my-link", "cr_type", "IKS_SA",
		"link", item("crn", clusterCRN, "namespace", "default", "name", "my-app")))

	run(t, "iam", "trusted-profile-rule-create", "my-trusted-profile", "--name", "my-rule", "--type", "Profile-CR", "--cr-type", "IKS_SA",
		"--conditions", "claim:namespace,operator:EQUALS,value:default", "--conditions", "claim:crn,operator:EQUALS,value:"+clusterCRN,
		"--conditions", `claim:name,operator:in,value:["a","b"]`).want(0, "ClaimRule-"+uuidA)
	wantBody(t, s.sent("POST /v1/profiles/"+profileID+"/rules"), item("name", "my-rule", "type", "Profile-CR", "cr_type", "IKS_SA", "conditions", []any{
		item("claim", "namespace", "operator", "EQUALS", "value", `"default"`),
		item("claim", "crn", "operator", "EQUALS", "value", `"`+clusterCRN+`"`),
		item("claim", "name", "operator", "IN", "value", `["a","b"]`),
	}))
}

func TestTheSubnetInTheJSONGoesBeforeTheArgument(t *testing.T) {
	s := sceneA(t)
	s.answer("GET /v1/security_groups", list("security_groups", item("id", "r006-sg", "name", "sg-default")))
	s.login()
	run(t, "is", "instance-create", "vm", vpcID, "us-south-3", "bx2-2x8", "no-such-subnet",
		"--primary-network-interface", `{"name":"primary-nic","subnet":{"name":"my-subnet"}}`).want(0)
	body := s.sent("POST /v1/instances").json(t)
	if diff := cmp.Diff(item("name", "primary-nic", "subnet", item("id", subnetID)), body["primary_network_interface"]); diff != "" {
		t.Error(diff)
	}

	run(t, "is", "instance-create", "vm", vpcID, "us-south-3", "bx2-2x8", "my-subnet", "--primary-network-interface",
		`{"name":"eth0","security_groups":[{"name":"sg-default"}]}`, "--ms", "false", "--msrhl", "2").want(0)
	body = s.sent("POST /v1/instances").json(t)
	if diff := cmp.Diff(item("name", "eth0", "subnet", item("id", subnetID), "security_groups", []any{item("id", "r006-sg")}), body["primary_network_interface"]); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(item("enabled", false, "response_hop_limit", 2.0), body["metadata_service"]); diff != "" {
		t.Error(diff)
	}

	run(t, "is", "instance-create", "vm", vpcID, "us-south-3", "bx2-2x8", "no-such-subnet").want(1, `no subnet has the name or ID "no-such-subnet"`)
	run(t, "is", "instance-create", "vm", vpcID, "us-south-3", "bx2-2x8", "my-subnet", "--primary-network-interface", `[]`).want(2)
}
