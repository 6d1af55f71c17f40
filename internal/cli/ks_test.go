package cli

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const (
	clusterID  = "abcdefghij0123456789"
	groupOfKs  = "ClusterGroup-" + uuidA
	kubeconfig = "apiVersion: v1\nkind: Config\ncurrent-context: it\ncontexts: [{name: it, context: {cluster: it, user: it}}]\n" +
		"clusters: [{name: it, cluster: {server: 'https://127.0.0.1:1'INSECURE}}]\nusers: [{name: it, user: {token: a-secret-token}}]\n"
)

func registeredCluster(more ...any) map[string]any {
	return with(item("id", clusterID, "name", "my-cluster", "crn", "crn:it", "issuer", "https://kubernetes.default.svc", "type", "IKS_SA",
		"audience", "iam", "keys_from", "uploaded", "entity_tag", "1-a"), more...)
}

func TestClusterGroupsAreMadeAndFilled(t *testing.T) {
	s := newServer(t)
	s.login()
	group := item("id", groupOfKs, "name", "production", "cluster_count", 2)
	s.answer("POST /v1/cluster_groups", reply{status: 201, body: group})
	s.answer("GET /v1/cluster_groups", list("cluster_groups", group))
	s.answer("GET /v1/cluster_groups/"+groupOfKs, reply{status: 200, body: group, header: map[string]string{"ETag": "1-g"}})
	s.answer("PATCH /v1/cluster_groups/"+groupOfKs, group)
	s.answer("DELETE /v1/cluster_groups/"+groupOfKs, reply{status: 204})
	s.answer("GET /v1/clusters", list("clusters", registeredCluster(), registeredCluster("id", "zzzzzzzzzz0123456789", "name", "other")))
	for _, id := range []string{clusterID, "zzzzzzzzzz0123456789"} {
		s.answer("PUT /v1/cluster_groups/"+groupOfKs+"/clusters/"+id, registeredCluster())
		s.answer("DELETE /v1/cluster_groups/"+groupOfKs+"/clusters/"+id, reply{status: 204})
	}

	run(t, "ks", "cluster-group-create", "production", "-d", "Where customers are").want(0, groupOfKs)
	wantBody(t, s.sent("POST /v1/cluster_groups"), item("name", "production", "description", "Where customers are", "account_id", account))
	run(t, "ks", "cluster-groups").want(0, "production", "2")
	run(t, "ks", "cluster-group-get", "production").want(0, groupOfKs)
	run(t, "ks", "cluster-group-update", "production", "--description", "x").want(0)
	if r := s.sent("PATCH /v1/cluster_groups/" + groupOfKs); r.Header.Get("If-Match") != "1-g" {
		t.Errorf("If-Match is %q", r.Header.Get("If-Match"))
	}
	run(t, "ks", "cluster-group-add", "production", "my-cluster", "other").want(0, "Cluster my-cluster was added to cluster group production.", "Cluster other was")
	run(t, "ks", "cluster-group-remove", "production", clusterID).want(0, "was removed from cluster group production.")
	run(t, "ks", "cluster-group-add", "production").want(2, "missing CLUSTER")
	run(t, "ks", "cluster-group-delete", "production", "-f").want(0)
}

func TestHowAClustersTokensAreProvedIsChanged(t *testing.T) {
	s := newServer(t)
	s.login()
	at := "/v1/clusters/" + clusterID
	s.answer("GET "+at, registeredCluster())
	s.answer("PATCH "+at, registeredCluster("key_ids", []string{"k2"}))
	s.answer("POST "+at+"/refresh_keys", registeredCluster("keys_from", "server", "key_ids", []string{"k3"}))
	writeFile(t, "jwks.json", `{"keys":[]}`)
	writeFile(t, "token", "a-token\n")
	writeFile(t, "two-tokens", "a b\n")
	patched := func() map[string]any {
		r := s.sent("PATCH " + at)
		if r.Header.Get("If-Match") != "1-a" {
			t.Errorf("If-Match is %q", r.Header.Get("If-Match"))
		}
		return r.json(t)
	}
	same := func(want map[string]any) {
		t.Helper()
		got := patched()
		if len(got) != len(want) {
			t.Errorf("sent %v, want %v", got, want)
		}
	}

	run(t, "ks", "cluster-update", clusterID, "--jwks", "jwks.json").want(0, "k2", "no token was tried out")
	same(item("jwks", nil))
	run(t, "ks", "cluster-update", clusterID, "--no-token-review").want(0)
	same(item("review", false))
	run(t, "ks", "cluster-update", clusterID, "--audience", "other").want(0)
	same(item("audience", "other"))
	run(t, "ks", "cluster-update", clusterID, "--reviewer-token", "token", "--api-server", "https://10.0.0.1:6443").want(1, "confirmation", "many clusters", "cannot be compared")
	run(t, "ks", "cluster-update", clusterID, "--reviewer-token", "token", "--api-server", "https://10.0.0.1:6443", "-f").want(0)
	if got := patched(); got["review"] != true || got["server"].(map[string]any)["token"] != "a-token" {
		t.Errorf("sent %v", got)
	}
	run(t, "ks", "cluster-update", clusterID, "--keys", "issuer").want(0)
	if got := patched(); got["jwks"] != nil || got["server"] != nil || got["review"] != false {
		t.Errorf("sent %v", got)
	}
	s.answer("GET "+at, registeredCluster("keys_from", "server"))
	run(t, "ks", "cluster-update", clusterID, "--rotate-keys").want(0, "k3", "The server fetched the keys")

	s.answer("GET "+at, registeredCluster())
	for _, c := range []struct {
		args string
		want string
	}{
		{"", "nothing to change"},
		{"--rotate-keys", "--kubeconfig"},
		{"--keys server", "--token-review"},
		{"--keys issuer --reviewer-token token", "leave out --keys"},
		{"--token-review", "give --kubeconfig"},
		{"--reviewer-token token", "--api-server"},
		{"--rotate-keys --kubeconfig none --test-service-account web", "NAMESPACE/NAME"},
		{"--keys elsewhere", "issuer, server, upload"},
		{"--token-review --no-token-review", "none of the others can be"},
	} {
		run(t, append([]string{"ks", "cluster-update", clusterID}, strings.Fields(c.args)...)...).want(2, c.want)
	}
	run(t, "ks", "cluster-update", clusterID, "--reviewer-token", "two-tokens", "--api-server", "https://x", "-f").want(1, "one token")
	if got := s.requests(); len(got) > 0 {
		for _, r := range got {
			if r.Method == http.MethodPatch {
				t.Errorf("sent %s", r.Body)
			}
		}
	}
}

func TestAClusterThatCannotBeReadIsNotRegistered(t *testing.T) {
	s := newServer(t)
	s.login()
	writeFile(t, "down", strings.Replace(kubeconfig, "INSECURE", "", 1))
	writeFile(t, "insecure", strings.Replace(kubeconfig, "INSECURE", ", insecure-skip-tls-verify: true", 1))
	for _, c := range []struct {
		args, want string
		code       int
	}{
		{"--kubeconfig none", "none", 1},
		{"--kubeconfig down", "cannot talk to the API server at https://127.0.0.1:1", 1},
		{"--kubeconfig down --context other", `no context "other", but it`, 1},
		{"--kubeconfig insecure", "insecure-skip-tls-verify", 1},
		{"--issuer https://x --keys upload", "give --kubeconfig", 2},
		{"--issuer https://x --keys server", "--reviewer-token", 2},
		{"--kubeconfig down --jwks f", "none of the others can be", 2},
	} {
		r := run(t, append([]string{"ks", "cluster-register", "it"}, strings.Fields(c.args)...)...).want(c.code, c.want)
		if strings.Contains(r.stdout+r.stderr, "a-secret-token") {
			t.Errorf("%s shows the token", c.args)
		}
	}
	t.Setenv("KUBECONFIG", "nowhere:down")
	run(t, "ks", "cluster-register", "it").want(1, "cannot talk to the API server", "Check --kubeconfig")
	for _, r := range s.requests() {
		if r.Method == http.MethodPost && r.Path == "/v1/clusters" {
			t.Errorf("sent %s", r.Body)
		}
	}
}

func TestAnIssuerThatOnlyPodsFindIsNotAskedFor(t *testing.T) {
	for issuer, want := range map[string]bool{
		"https://kubernetes.default.svc.cluster.local": true,
		"https://kubernetes.default.svc":               true,
		"https://kubernetes.default":                   true,
		"https://api.internal.cluster.local:6443":      true,
		"kubernetes/serviceaccount":                    true,
		"https://oidc.eks.us-east-1.amazonaws.com/id/": false,
		"https://10.0.0.1:6443":                        false,
	} {
		if insideOnly(issuer) != want {
			t.Errorf("%s: %v", issuer, !want)
		}
	}
	if !sameHost("https://A.example", "https://a.example:443/path") || sameHost("https://a.example:6443", "https://a.example") {
		t.Error("hosts are not told apart by name and port")
	}
}

// authority returns a certificate in PEM.
func authority(t *testing.T) string {
	t.Helper()
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

func TestAFileWithoutACertificateIsNoAuthority(t *testing.T) {
	newServer(t).login()
	writeFile(t, "empty.crt", "")
	run(t, "ks", "cluster-register", "my-cluster", "--issuer", "https://k8s.example:6443", "--ca-file", "empty.crt").want(2, "empty.crt holds no certificate")
	run(t, "iam", "workload-issuer-create", "ci", "--issuer", "https://ci.example", "--ca-file", "empty.crt").want(2, "empty.crt holds no certificate")
}

func TestACertificateThatIsNotTrustedLeadsToTheCAFile(t *testing.T) {
	s := newServer(t)
	s.login()
	refusal := reply{status: 400, body: item("errors", []any{item("code", "keys_unusable", "message", "fetch it: x509: certificate signed by unknown authority")})}
	s.answer("POST /v1/clusters", refusal)
	s.answer("POST /v1/workload_issuers", refusal)
	run(t, "ks", "cluster-register", "my-cluster", "--issuer", "https://k8s.example:6443").want(1, "--ca-file FILE")
	run(t, "iam", "workload-issuer-create", "ci", "--issuer", "https://ci.example").want(1, "--ca-file FILE", "--jwks FILE")
}

func TestAClusterGroupThatIsNotThereIsToldBeforeAnythingIsDone(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/cluster_groups", list("cluster_groups"))
	run(t, "ks", "cluster-register", "my-cluster", "--issuer", "https://k8s.example:6443", "--cluster-group", "nogroup").
		want(1, "tabard ks cluster-group-create nogroup")
}
