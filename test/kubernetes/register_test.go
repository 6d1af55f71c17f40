package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

// known is what the command line prints of a registered cluster.
type known struct {
	ID       string   `json:"id"`
	Type     string   `json:"type"`
	Issuer   string   `json:"issuer"`
	KeysFrom string   `json:"keys_from"`
	KeyIDs   []string `json:"key_ids"`
	Review   bool     `json:"review"`
	Server   struct {
		URL      string `json:"url"`
		HasToken bool   `json:"has_token"`
	} `json:"server"`
	Groups []struct{ Name string } `json:"groups"`
	Tested struct {
		Subject string `json:"subject"`
		KeyID   string `json:"key_id"`
	} `json:"tested"`
}

// desk is a server with its owner logged in at the command line.
func desk(t *testing.T) *harness.Server {
	t.Helper()
	s := harness.Start(t, "--driver", "none")
	s.Login()
	return s
}

// told fails the test unless a command failed with these words.
func told(t *testing.T, r harness.Result, words ...string) {
	t.Helper()
	if r.Code == 0 {
		t.Fatalf("the command went through:\n%s", r.Out)
	}
	for _, w := range words {
		if !strings.Contains(r.Err, w) {
			t.Errorf("it does not say %q but:\n%s", w, r.Err)
		}
	}
}

// pemFile writes one block and returns its text.
func pemFile(t *testing.T, file, kind string, der []byte) string {
	t.Helper()
	b := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// clientAuthority is a CA of clients' certificates.
type clientAuthority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newClientAuthority(t *testing.T) *clientAuthority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "clients"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a := &clientAuthority{t: t, cert: cert, key: key, file: filepath.Join(t.TempDir(), "clients.crt")}
	pemFile(t, a.file, "CERTIFICATE", der)
	return a
}

// admin makes the certificate of an administrator, as base64 of PEM.
func (a *clientAuthority) admin() (cert, key string) {
	a.t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "ann", Organization: []string{"system:masters"}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}, a.cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	dir := a.t.TempDir()
	encode := func(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }
	return encode(pemFile(a.t, filepath.Join(dir, "crt"), "CERTIFICATE", der)), encode(pemFile(a.t, filepath.Join(dir, "key"), "PRIVATE KEY", private))
}

// kubeconfigOf writes a kubeconfig whose user is described in YAML.
func kubeconfigOf(k *kubetest.Cluster, dir, user string) string {
	k.T.Helper()
	file := filepath.Join(dir, "kubeconfig.yaml")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: it\ncontexts:\n- name: it\n  context: {cluster: it, user: it}\n"+
		"clusters:\n- name: it\n  cluster:\n    server: %s\n    certificate-authority: %s\nusers:\n- name: it\n  user:\n%s\n", k.URL, k.CAFile, user)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		k.T.Fatal(err)
	}
	return file
}

func TestAClusterIsRegisteredWithItsKubeconfig(t *testing.T) {
	clients := newClientAuthority(t)
	k := kubetest.Start(t, kubetest.Options{ExtraArgs: []string{"--client-ca-file=" + clients.file}})
	s := desk(t)

	t.Run("a service account that is not there is told", func(t *testing.T) {
		told(t, s.Run("ks", "cluster-register", "it", "--kubeconfig", k.Kubeconfig), "--test-service-account", `"default" not found`)
	})
	k.ServiceAccount("default", "default", nil)
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)

	t.Run("and says what it found", func(t *testing.T) {
		out := s.CLI("ks", "cluster-register", "it", "--kubeconfig", k.Kubeconfig, "--context", "kubetest", "--test-service-account", "shop/web")
		for _, w := range []string{k.URL, "v1.", "system:serviceaccount:shop:web", k.KeyID(), "--rotate-keys", "IKS_SA"} {
			if !strings.Contains(out, strings.TrimPrefix(w, "v")) {
				t.Errorf("it does not say %q:\n%s", w, out)
			}
		}
		told(t, s.Run("ks", "cluster-register", "again", "--kubeconfig", k.Kubeconfig), `"it"`, "cluster-update")
		s.CLI("ks", "cluster-delete", "it", "-f")
	})

	cert, key := clients.admin()
	plugins := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho '{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":\"%s\"}}'\n", k.RESTConfig().BearerToken)
	if err := os.WriteFile(filepath.Join(plugins, "log-in"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, file, says string }{
		{"a client certificate", kubeconfigOf(k, t.TempDir(), "    client-certificate-data: "+cert+"\n    client-key-data: "+key), ""},
		{"a program", kubeconfigOf(k, plugins, "    exec:\n      apiVersion: client.authentication.k8s.io/v1\n      command: ./log-in\n      interactiveMode: Never"), "log-in"},
	} {
		t.Run("as who is proved by "+c.name, func(t *testing.T) {
			r := s.Run("ks", "cluster-register", "it", "--kubeconfig", c.file, "--output", "json")
			var got known
			if err := json.Unmarshal([]byte(r.Out), &got); err != nil || r.Code != 0 {
				t.Fatalf("%v\n%s%s", err, r.Out, r.Err)
			}
			if got.KeysFrom != "uploaded" || got.Tested.Subject != "system:serviceaccount:default:default" || got.Tested.KeyID != k.KeyID() {
				t.Errorf("%+v", got)
			}
			if !strings.Contains(r.Err, c.says) {
				t.Errorf("the program that ran is not told:\n%s", r.Err)
			}
			s.CLI("ks", "cluster-delete", "it", "-f")
		})
	}

	t.Run("but not without rights", func(t *testing.T) {
		told(t, s.Run("ks", "cluster-register", "it", "--kubeconfig", k.KubeconfigFor("shop", "web")), "serviceaccounts/token", "--no-test")
	})
	t.Run("but not with a credential that the cluster does not know", func(t *testing.T) {
		told(t, s.Run("ks", "cluster-register", "it", "--kubeconfig", kubeconfigOf(k, t.TempDir(), "    token: nonsense")), "log in to the cluster again")
	})

	t.Run("and rotated keys are brought in", func(t *testing.T) {
		s.CLI("ks", "cluster-register", "it", "--kubeconfig", k.Kubeconfig)
		before := k.KeyID()
		k.RotateSigningKey(false)
		told(t, s.Run("ks", "cluster-update", "it", "--rotate-keys"), "--kubeconfig", "--jwks")
		var got known
		s.JSON(&got, "ks", "cluster-update", "it", "--rotate-keys", "--kubeconfig", k.Kubeconfig)
		if len(got.KeyIDs) != 1 || got.KeyIDs[0] == before || got.Tested.KeyID != k.KeyID() {
			t.Errorf("%+v", got)
		}
	})

	t.Run("and its tokens are reviewed where the cluster makes no lasting token", func(t *testing.T) {
		r := s.Run("ks", "cluster-update", "it", "--token-review", "--keys", "server", "--kubeconfig", k.Kubeconfig, "-f", "--output", "json")
		var got known
		if err := json.Unmarshal([]byte(r.Out), &got); err != nil || r.Code != 0 {
			t.Fatalf("%v\n%s%s", err, r.Out, r.Err)
		}
		if got.KeysFrom != "server" || !got.Review || !got.Server.HasToken || got.Server.URL != k.URL {
			t.Errorf("%+v", got)
		}
		if !strings.Contains(r.Err, "ends on") {
			t.Errorf("it is not told that the reviewer's token ends:\n%s", r.Err)
		}
		if strings.Contains(r.Out, "eyJ") {
			t.Error("the answer has a token in it")
		}
		s.JSON(&got, "ks", "cluster-update", "it", "--rotate-keys")
		if len(got.KeyIDs) != 1 || got.KeyIDs[0] != k.KeyID() {
			t.Errorf("the keys that the server fetched: %+v", got)
		}
		s.JSON(&got, "ks", "cluster-update", "it", "--no-token-review")
		if got.Review || got.KeysFrom != "server" {
			t.Errorf("%+v", got)
		}
		s.CLI("ks", "cluster-delete", "it", "-f")
	})

	k.OpenDiscovery()
	t.Run("and the keys come from the issuer where that tells them to anybody", func(t *testing.T) {
		var got known
		s.JSON(&got, "ks", "cluster-register", "it", "--kubeconfig", k.Kubeconfig)
		if got.KeysFrom != "issuer" || got.Tested.KeyID != k.KeyID() {
			t.Errorf("%+v", got)
		}
		s.JSON(&got, "ks", "cluster-update", "it", "--keys", "upload", "--kubeconfig", k.Kubeconfig)
		if got.KeysFrom != "uploaded" {
			t.Errorf("%+v", got)
		}
		s.JSON(&got, "ks", "cluster-update", "it", "--keys", "issuer", "--kubeconfig", k.Kubeconfig)
		if got.KeysFrom != "issuer" {
			t.Errorf("%+v", got)
		}
	})

	t.Run("into groups", func(t *testing.T) {
		s.CLI("ks", "cluster-group-create", "production", "--description", "Where customers are")
		s.CLI("ks", "cluster-group-add", "production", "it")
		var got known
		s.JSON(&got, "ks", "cluster-get", "it")
		if len(got.Groups) != 1 || got.Groups[0].Name != "production" {
			t.Errorf("%+v", got)
		}
		if out := s.CLI("ks", "cluster-group-get", "production"); !strings.Contains(out, "it") {
			t.Error(out)
		}
		s.CLI("ks", "cluster-group-update", "production", "--description", "Elsewhere")
		s.CLI("ks", "cluster-group-remove", "production", "it")
		s.JSON(&got, "ks", "cluster-get", "it")
		if len(got.Groups) != 0 {
			t.Errorf("%+v", got)
		}
		s.CLI("ks", "cluster-delete", "it", "-f")
		s.JSON(&got, "ks", "cluster-register", "it", "--kubeconfig", k.Kubeconfig, "--cluster-group", "production")
		if len(got.Groups) != 1 {
			t.Errorf("%+v", got)
		}
		s.CLI("ks", "cluster-group-delete", "production", "-f")
	})

	t.Run("and one that cannot be reached is told", func(t *testing.T) {
		k.Stop()
		told(t, s.Run("ks", "cluster-register", "gone", "--kubeconfig", k.Kubeconfig), "cannot talk to the API server at "+k.URL, "--context")
	})
}

// Managed clusters have issuers that are not their API servers, and so have
// clusters of OpenShift where an administrator set one.
func TestAClusterWhoseIssuerIsElsewhereIsRegistered(t *testing.T) {
	const issuer = "https://issuer.invalid/clusters/one"
	k := kubetest.Start(t, kubetest.Options{Issuer: issuer, Alg: "ES256", Controllers: true})
	s := desk(t)

	r := s.Run("ks", "cluster-register", "managed", "--kubeconfig", k.Kubeconfig)
	if r.Code != 0 || !strings.Contains(r.Out, "the issuer is not the API server's address") || !strings.Contains(r.Err, "they are uploaded") {
		t.Fatalf("status %d\n%s%s", r.Code, r.Out, r.Err)
	}
	var got known
	s.JSON(&got, "ks", "cluster-get", "managed")
	if got.Issuer != issuer || got.KeysFrom != "uploaded" || got.Type != "IKS_SA" {
		t.Errorf("%+v", got)
	}
	told(t, s.Run("ks", "cluster-register", "other", "--kubeconfig", k.Kubeconfig, "--issuer", k.URL), issuer)
	told(t, s.Run("ks", "cluster-register", "other", "--kubeconfig", k.Kubeconfig, "--keys", "issuer"), `"managed"`)

	t.Run("and the keys of another cluster are not taken for its own", func(t *testing.T) {
		other := kubetest.Start(t, kubetest.Options{Issuer: "https://kubernetes.default.svc"})
		other.ServiceAccount("default", "default", nil)
		told(t, s.Run("ks", "cluster-update", "managed", "--rotate-keys", "--kubeconfig", other.Kubeconfig), "another cluster", issuer)

		// Where many clusters have the issuer, only a person can tell that a
		// rotated one is the same.
		r := s.Run("ks", "cluster-register", "other", "--kubeconfig", other.Kubeconfig, "--audience", "elsewhere")
		if r.Code != 0 || strings.Contains(r.Err, "cannot get the keys") {
			t.Fatalf("the server looked up an address that only pods know: status %d\n%s%s", r.Code, r.Out, r.Err)
		}
		s.CLI("ks", "cluster-update", "other", "--rotate-keys", "--kubeconfig", other.Kubeconfig) // they are the same
		other.RotateSigningKey(false)
		told(t, s.Run("ks", "cluster-update", "other", "--rotate-keys", "--kubeconfig", other.Kubeconfig), "confirmation", "many clusters", other.URL)
		reviewer := filepath.Join(t.TempDir(), "reviewer")
		if err := os.WriteFile(reviewer, []byte("token"), 0o600); err != nil {
			t.Fatal(err)
		}
		told(t, s.Run("ks", "cluster-update", "other", "--keys", "server", "--token-review", "--kubeconfig", other.Kubeconfig), "confirmation", "many clusters", "none is the same")
		told(t, s.Run("ks", "cluster-update", "other", "--reviewer-token", reviewer, "--api-server", other.URL), "confirmation", "many clusters", "cannot be compared")
		s.JSON(&got, "ks", "cluster-update", "other", "--rotate-keys", "--kubeconfig", other.Kubeconfig, "-f")
		if got.Tested.KeyID != other.KeyID() {
			t.Errorf("%+v", got)
		}
	})
	s.CLI("ks", "cluster-delete", "managed", "-f")

	t.Run("with reviews, once its administrator agrees", func(t *testing.T) {
		told(t, s.Run("ks", "cluster-register", "managed", "--kubeconfig", k.Kubeconfig, "--token-review"), "confirmation", "-f")
		if out := k.Kubectl("get", "namespaces", "-o", "name"); strings.Contains(out, "tabard") {
			t.Errorf("something was made without a confirmation: %s", out)
		}
		r := s.Run("ks", "cluster-register", "managed", "--kubeconfig", k.Kubeconfig, "--token-review", "-f", "--output", "json")
		if err := json.Unmarshal([]byte(r.Out), &got); err != nil || r.Code != 0 {
			t.Fatalf("%v\n%s%s", err, r.Out, r.Err)
		}
		if got.KeysFrom != "server" || !got.Review || !got.Server.HasToken || got.Tested.Subject == "" {
			t.Errorf("%+v", got)
		}
		if strings.Contains(r.Err, "ends on") {
			t.Errorf("the reviewer's token does not last:\n%s", r.Err)
		}
		as := "--as=system:serviceaccount:tabard-system:tabard-reviewer"
		if out := k.Kubectl("auth", "can-i", "create", "tokenreviews.authentication.k8s.io", as); !strings.Contains(out, "yes") {
			t.Error(out)
		}
		if out, _ := k.TryKubectl("", "auth", "can-i", "get", "secrets", as, "-A"); !strings.Contains(out, "no") {
			t.Errorf("the reviewer may read secrets: %s", out)
		}
		for _, kind := range []string{"subjectaccessreviews", "localsubjectaccessreviews"} {
			if out, _ := k.TryKubectl("", "auth", "can-i", "create", kind+".authorization.k8s.io", as); !strings.Contains(out, "no") {
				t.Errorf("the reviewer may ask what others may do: %s", out)
			}
		}
		// It may be run again, such as after the reviewer's token was deleted.
		k.Kubectl("delete", "secret", "-n", "tabard-system", "tabard-reviewer-token")
		s.JSON(&got, "ks", "cluster-update", "managed", "--token-review", "--kubeconfig", k.Kubeconfig, "-f")
		if !got.Review {
			t.Errorf("%+v", got)
		}
		s.CLI("ks", "cluster-delete", "managed", "-f")
	})

	t.Run("and OpenShift is recognized", func(t *testing.T) {
		k.Apply(`apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: authentications.config.openshift.io}
spec:
  group: config.openshift.io
  scope: Cluster
  names: {plural: authentications, singular: authentication, kind: Authentication}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
`)
		k.Kubectl("wait", "--for=condition=Established", "crd/authentications.config.openshift.io")
		k.Apply("apiVersion: config.openshift.io/v1\nkind: Authentication\nmetadata: {name: cluster}\nspec: {serviceAccountIssuer: \"https://new.invalid\"}\n")
		r := s.Run("ks", "cluster-register", "shift", "--kubeconfig", k.Kubeconfig, "--keys", "upload", "--output", "json")
		if err := json.Unmarshal([]byte(r.Out), &got); err != nil || r.Code != 0 {
			t.Fatalf("%v\n%s%s", err, r.Out, r.Err)
		}
		if got.Type != "ROKS_SA" || got.Issuer != issuer {
			t.Errorf("%+v", got)
		}
		if !strings.Contains(r.Err, "https://new.invalid") {
			t.Errorf("it is not told that the issuer is about to change:\n%s", r.Err)
		}
	})
}
