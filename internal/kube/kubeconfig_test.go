package kube

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// apiServer answers each request with who it is told is asking.
func apiServer(t *testing.T) (*httptest.Server, string) {
	t.Helper()
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := r.Header.Get("Authorization")
		if len(r.TLS.PeerCertificates) > 0 {
			who = "certificate of " + r.TLS.PeerCertificates[0].Subject.CommonName
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"who": who, "path": r.URL.Path})
	}))
	srv.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return srv, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
}

func keyPair(t *testing.T, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b}))
}

func write(t *testing.T, file, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return file
}

func kubeconfig(cluster, user string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: here
preferences: {}
contexts:
- name: here
  context: {cluster: c, user: u, namespace: shop}
- name: gone
  context: {cluster: nowhere, user: u}
clusters:
- name: c
  cluster: {%s}
users:
- name: u
  user: {%s}
`, cluster, user)
}

func who(t *testing.T, cfg Config) string {
	t.Helper()
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var a struct{ Who string }
	if err := c.Do(t.Context(), http.MethodGet, "/version", nil, &a); err != nil {
		t.Fatal(err)
	}
	return a.Who
}

func TestEachWayToProveOneselfInAKubeconfigWorks(t *testing.T) {
	srv, ca := apiServer(t)
	b64 := base64.StdEncoding.EncodeToString
	cert, key := keyPair(t, "alice")
	for _, c := range []struct{ name, user, want string }{
		{"a token", `token: abc`, "Bearer abc"},
		{"a token in a file beside it", `tokenFile: sub/token`, "Bearer from-file"},
		{"a token file goes before a token", `tokenFile: sub/token, token: abc`, "Bearer from-file"},
		{"a token where its file is gone", `tokenFile: sub/none, token: abc`, "Bearer abc"},
		{"a certificate", `client-certificate-data: ` + b64([]byte(cert)) + `, client-key-data: ` + b64([]byte(key)), "certificate of alice"},
		{"a certificate in files", `client-certificate: sub/cert, client-key: sub/key`, "certificate of alice"},
		{"name and password", `username: u, password: p`, "Basic " + b64([]byte("u:p"))},
		{"nothing", ``, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(dir, "sub/token"), "from-file\n")
			write(t, filepath.Join(dir, "sub/cert"), cert)
			write(t, filepath.Join(dir, "sub/key"), key)
			write(t, filepath.Join(dir, "ca.crt"), ca)
			file := write(t, filepath.Join(dir, "config"), kubeconfig("server: "+srv.URL+", certificate-authority: ca.crt, tls-server-name: example.com", c.user))
			cfg, err := FromKubeconfig(file, "")
			if err != nil {
				t.Fatal(err)
			}
			if got := who(t, cfg); got != c.want {
				t.Errorf("came as %q, want %q", got, c.want)
			}
		})
	}
}

func TestAKubeconfigsServerMayStandUnderAPath(t *testing.T) {
	srv, ca := apiServer(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.crt"), ca)
	file := write(t, filepath.Join(dir, "config"), kubeconfig("server: "+srv.URL+"/k8s/clusters/c-1/, certificate-authority: ca.crt", "token: abc"))
	cfg, err := FromKubeconfig(file, "")
	if err != nil || cfg.URL != srv.URL+"/k8s/clusters/c-1" {
		t.Fatal(cfg.URL, err)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var a struct{ Path string }
	if err := c.Do(t.Context(), http.MethodGet, "/version", nil, &a); err != nil || a.Path != "/k8s/clusters/c-1/version" {
		t.Error(a.Path, err)
	}
}

func TestAKubeconfigThatCannotBeFollowedIsRefused(t *testing.T) {
	for _, c := range []struct{ name, text, context, want string }{
		{"no such context", kubeconfig("server: https://x", ""), "there", `no context "there", but gone, here`},
		{"no such cluster", kubeconfig("server: https://x", ""), "gone", "nowhere"},
		{"impersonation", kubeconfig("server: https://x", "token: t, as: root"), "", "impersonates"},
		{"groups impersonated", kubeconfig("server: https://x", "token: t, as-groups: ['system:masters']"), "", "impersonates"},
		{"an old provider", kubeconfig("server: https://x", "auth-provider: {name: gcp}"), "", "auth-provider gcp"},
		{"insecure with a CA", kubeconfig("server: https://x, insecure-skip-tls-verify: true, certificate-authority-data: aGk=", ""), "", "remove one"},
		{"a CA that is not base64", kubeconfig("server: https://x, certificate-authority-data: '%'", ""), "", "certificate-authority"},
		{"a CA that is not there", kubeconfig("server: https://x, certificate-authority: none", ""), "", "certificate-authority"},
		{"a proxy of another kind", kubeconfig("server: https://x, proxy-url: 'ftp://p'", ""), "", "proxy-url"},
		{"half a certificate", kubeconfig("server: https://x", "client-certificate-data: aGk="), "", "certificate and key"},
		{"a program, and nobody to tell", kubeconfig("server: https://x", "exec: {command: x}"), "", "not run here"},
		{"not a kubeconfig", "kind: Pod", "", `kind "Pod"`},
		{"not YAML", "a: [", "", "YAML"},
		{"not JSON", `{"a":`, "", "JSON"},
		{"aliases", "a: &a [1]\nb: [*a, *a]", "", "anchors"},
		{"deep", strings.Repeat("[", 100), "", "nested"},
		{"deep lists", strings.Repeat("- ", 1000), "", "nested"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := FromKubeconfig(write(t, filepath.Join(t.TempDir(), "config"), c.text), c.context)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	t.Run("none there", func(t *testing.T) {
		if _, err := FromKubeconfig(filepath.Join(t.TempDir(), "none"), ""); err == nil {
			t.Error("no error")
		}
	})
	t.Run("too long", func(t *testing.T) {
		if _, err := FromKubeconfig(write(t, filepath.Join(t.TempDir(), "config"), strings.Repeat("#", maxFile+1)), ""); err == nil || !strings.Contains(err.Error(), "longer") {
			t.Error(err)
		}
	})
}

func TestOfSeveralKubeconfigsTheFirstCounts(t *testing.T) {
	dir := t.TempDir()
	a := write(t, filepath.Join(dir, "a"), kubeconfig("server: https://a", "token: a"))
	b := write(t, filepath.Join(dir, "b"), strings.ReplaceAll(kubeconfig("server: https://b", "token: b"), "name: gone", "name: other"))
	k, err := ReadKubeconfig(filepath.Join(dir, "none"), a, b)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(k.Contexts(), " "); got != "gone here other" {
		t.Error(got)
	}
	cfg, err := k.Config("here", ExecOptions{})
	if err != nil || cfg.URL != "https://a" {
		t.Error(cfg.URL, err)
	}
	if _, err := ReadKubeconfig(filepath.Join(dir, "none"), filepath.Join(dir, "nil")); err == nil {
		t.Error("no error where none exists")
	}
}

func TestAKubeconfigMayBeJSON(t *testing.T) {
	text := "{\n\t\"current-context\": \"x\", \"contexts\": [{\"name\":\"x\",\"context\":{\"cluster\":\"c\"}}], \"clusters\":[{\"name\":\"c\",\"cluster\":{\"server\":\"https://j/\"}}]}"
	cfg, err := FromKubeconfig(write(t, filepath.Join(t.TempDir(), "config"), text), "")
	if err != nil || cfg.URL != "https://j" {
		t.Error(cfg.URL, err)
	}
}

func TestAnErrorInAKubeconfigShowsNoSecret(t *testing.T) {
	_, err := FromKubeconfig(write(t, filepath.Join(t.TempDir(), "config"), "users:\n- name: u\n  user:\n    token: hush-hush\n    exec: [1\n"), "")
	if err == nil || strings.Contains(err.Error(), "hush") {
		t.Error(err)
	}
}

// plugin writes a program and a kubeconfig that names it, and returns its Config
// and what is told before each run.
func plugin(t *testing.T, server, ca, script, more string, o ExecOptions) (Config, *[]string, error) {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "get-token"), "#!/bin/sh\n"+script)
	text := kubeconfig("server: "+server+", certificate-authority-data: "+base64.StdEncoding.EncodeToString([]byte(ca)),
		"exec: {apiVersion: client.authentication.k8s.io/v1, command: ./get-token, args: [--for, me], interactiveMode: Never, env: [{name: GREETING, value: hi}]"+more+"}")
	k, err := ReadKubeconfig(write(t, filepath.Join(dir, "config"), text))
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	o.Tell = func(c string) { told = append(told, c) }
	cfg, err := k.Config("", o)
	return cfg, &told, err
}

const grant = `{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"%s","expirationTimestamp":"2030-01-01T00:00:00Z"}}`

func TestAPluginsTokenIsKeptUntilItEnds(t *testing.T) {
	srv, ca := apiServer(t)
	now := time.Date(2029, 12, 31, 0, 0, 0, 0, time.UTC)
	cfg, told, err := plugin(t, srv.URL, ca, `echo x >> "$(dirname "$0")/runs"; printf '`+fmt.Sprintf(grant, `%s-%s-%s-%s`)+`' "$GREETING" "$1" "$2" "$(wc -l < "$(dirname "$0")/runs" | tr -d ' ')"`, "",
		ExecOptions{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := who(t, cfg); got != "Bearer hi---for-me-1" {
			t.Error(got)
		}
	}
	if len(*told) != 1 || !strings.HasSuffix((*told)[0], "get-token --for me") {
		t.Errorf("told %q", *told)
	}
	now = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	if got := who(t, cfg); got != "Bearer hi---for-me-2" {
		t.Error(got)
	}
}

func TestAPluginIsToldAboutTheClusterWhenItAsks(t *testing.T) {
	srv, ca := apiServer(t)
	cfg, _, err := plugin(t, srv.URL, ca, `case "$KUBERNETES_EXEC_INFO" in *'"server":"'*'"interactive":false'*) printf '`+fmt.Sprintf(grant, "told")+`';; *) echo "$KUBERNETES_EXEC_INFO" >&2; exit 1;; esac`,
		", provideClusterInfo: true", ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := who(t, cfg); got != "Bearer told" {
		t.Error(got)
	}
}

func TestAPluginMayGrantACertificate(t *testing.T) {
	srv, ca := apiServer(t)
	cert, key := keyPair(t, "bob")
	b, err := json.Marshal(map[string]any{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
		"status": map[string]string{"clientCertificateData": cert, "clientKeyData": key}})
	if err != nil {
		t.Fatal(err)
	}
	cfg, _, err := plugin(t, srv.URL, ca, "cat <<'X'\n"+string(b)+"\nX\n", "", ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := who(t, cfg); got != "certificate of bob" {
		t.Error(got)
	}
}

func TestAPluginThatMisbehavesIsAnError(t *testing.T) {
	for _, c := range []struct{ name, script, more, want string }{
		{"it fails", "echo please log in >&2; exit 3", "", "please log in"},
		{"it prints no JSON", "echo secret-thing", "", "did not print an ExecCredential"},
		{"it speaks another version", `echo '{"apiVersion":"client.authentication.k8s.io/v1alpha1","kind":"ExecCredential"}'`, "", "v1alpha1"},
		{"it grants nothing", `echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{}}'`, "", "neither"},
		{"it prints without end", `while :; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; done`, "", "more than"},
		{"it never ends", "exec sleep 600", "", "not done within"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := ExecOptions{}
			if c.name == "it never ends" {
				o.Timeout = 50 * time.Millisecond
			}
			cfg, _, err := plugin(t, "https://127.0.0.1:1", "", c.script, c.more, o)
			if err != nil {
				t.Fatal(err)
			}
			_, err = cfg.Token(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "secret-thing") {
				t.Error("what it printed is in the error")
			}
		})
	}
	t.Run("it is not installed", func(t *testing.T) {
		cfg, _, err := plugin(t, "https://127.0.0.1:1", "", "", ", installHint: get it at example.com", ExecOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_ = cfg
	})
	t.Run("it must ask and there is no terminal", func(t *testing.T) {
		dir := t.TempDir()
		k, err := ReadKubeconfig(write(t, filepath.Join(dir, "c"), kubeconfig("server: https://x", "exec: {apiVersion: client.authentication.k8s.io/v1, command: x, interactiveMode: Always}")))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Config("", ExecOptions{Tell: func(string) {}}); err == nil || !strings.Contains(err.Error(), "terminal") {
			t.Error(err)
		}
	})
}

func TestAPodFindsItsAPIServer(t *testing.T) {
	srv, ca := apiServer(t)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.crt"), ca)
	write(t, filepath.Join(dir, "token"), "one\n")
	write(t, filepath.Join(dir, "namespace"), "shop\n")
	host, port, _ := strings.Cut(strings.TrimPrefix(srv.URL, "https://"), ":")
	env := map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
	pod := Pod{Dir: dir, Getenv: func(n string) string { return env[n] }}
	cfg, err := pod.Config()
	if err != nil {
		t.Fatal(err)
	}
	if got := who(t, cfg); got != "Bearer one" {
		t.Error(got)
	}
	write(t, filepath.Join(dir, "token"), "two")
	if got := who(t, cfg); got != "Bearer two" {
		t.Errorf("after the kubelet replaced the token: %q", got)
	}
	if ns, err := pod.Namespace(); err != nil || ns != "shop" {
		t.Error(ns, err)
	}
	env["KUBERNETES_SERVICE_HOST"] = "fd00::1"
	if cfg, err := pod.Config(); err != nil || !strings.HasPrefix(cfg.URL, "https://[fd00::1]:") {
		t.Error(cfg.URL, err)
	}
	if err := os.Remove(filepath.Join(dir, "token")); err != nil {
		t.Fatal(err)
	}
	if _, err := pod.Config(); err == nil || !strings.Contains(err.Error(), "automountServiceAccountToken") {
		t.Error(err)
	}
	delete(env, "KUBERNETES_SERVICE_HOST")
	if _, err := pod.Config(); err == nil || !strings.Contains(err.Error(), "kubeconfig") {
		t.Error(err)
	}
}

func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte(kubeconfig("server: https://x", "token: t")))
	f.Add([]byte(kubeconfig("server: https://x, extensions: [{name: a, extension: {b: [1]}}]", "exec: {apiVersion: client.authentication.k8s.io/v1, command: x, args: [a], env: [{name: a, value: b}]}")))
	f.Add([]byte(`{"clusters":[{"name":"c","cluster":{"server":"https://x"}}]}`))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte(strings.Repeat("? ", 50)))
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.ContainsRune(b, '/') && bytes.Contains(b, []byte("dev")) {
			t.Skip("files of the machine are not under test")
		}
		k := &Kubeconfig{contexts: map[string]kubeContext{}, clusters: map[string]kubeCluster{}, users: map[string]kubeUser{}}
		if k.add(b, t.TempDir()) != nil {
			return
		}
		for _, name := range k.Contexts() {
			cfg, err := k.Config(name, ExecOptions{Tell: func(string) {}})
			if err != nil {
				continue
			}
			if c, err := New(cfg); err == nil {
				c.Close()
			}
		}
	})
}
