package cluster_test

import (
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
)

func TestKeysAreFetchedOverTLSOrFromTheMachineItself(t *testing.T) {
	for url, want := range map[string]bool{
		"https://kubernetes.default.svc":        true,
		"https://10.0.0.1:6443/path":            true,
		"https://[2001:db8::1]:6443":            true,
		"http://localhost:8080":                 true,
		"http://127.0.0.1":                      true,
		"http://127.1.2.3:1/keys":               true,
		"http://[::1]:8080":                     true,
		"http://kubernetes.default.svc":         false,
		"http://10.0.0.1":                       false,
		"http://192.168.1.1:6443":               false,
		"http://169.254.169.254/latest":         false,
		"http://[fe80::1]":                      false,
		"http://0.0.0.0":                        false,
		"http://localhost.attacker.test":        false,
		"http://127.0.0.1.attacker.test":        false,
		"http://attacker.test#@127.0.0.1":       false,
		"http://127.0.0.1@attacker.test":        false,
		"http://2130706433":                     false,
		"http://0x7f.1":                         false,
		"https://user:secret@kubernetes.test":   false,
		"https://kubernetes.test/#fragment":     false,
		"https://":                              false,
		"https:///path":                         false,
		"ftp://127.0.0.1":                       false,
		"file:///etc/passwd":                    false,
		"unix:///run/x.sock":                    false,
		"//127.0.0.1":                           false,
		"kubernetes/serviceaccount":             false,
		"kubernetes.default.svc":                false,
		"":                                      false,
		"https://kubernetes.test\n":             false,
		"https://kubernetes.test:port":          false,
		"javascript:alert(1)":                   false,
		"HTTP://127.0.0.1":                      true,
		"http://LOCALHOST":                      false,
		"http://[::ffff:127.0.0.1]":             true,
		"http://[::ffff:10.0.0.1]":              false,
		"http://localhost%2eattacker.test":      false,
		"http://127.0.0.1:80@attacker.test:443": false,
	} {
		if err := cluster.ValidFetchURL(url); (err == nil) != want {
			t.Errorf("%q: error %v, want good = %t", url, err, want)
		}
	}
}

func TestARegistrationIsChecked(t *testing.T) {
	good := func() *cluster.Cluster {
		return &cluster.Cluster{Name: "my-cluster", Type: identity.IKSSA, Issuer: "https://kubernetes.test", Audience: "iam"}
	}
	for _, tt := range []struct {
		name   string
		change func(*cluster.Cluster)
		want   string // part of the error; empty for none
	}{
		{"as it should be", func(*cluster.Cluster) {}, ""},
		{"of OpenShift", func(c *cluster.Cluster) { c.Type = identity.ROKSSA }, ""},
		{"an issuer that is no URL, with keys", func(c *cluster.Cluster) { c.Issuer, c.JWKS = "kubernetes/serviceaccount", []byte("{}") }, ""},
		{"an issuer that is no URL", func(c *cluster.Cluster) { c.Issuer = "kubernetes/serviceaccount" }, "jwks"},
		{"an issuer over plain HTTP", func(c *cluster.Cluster) { c.Issuer = "http://kubernetes.test" }, "https"},
		{"no issuer", func(c *cluster.Cluster) { c.Issuer = "" }, "issuer"},
		{"no issuer, with keys", func(c *cluster.Cluster) { c.Issuer, c.JWKS = "", []byte("{}") }, "issuer"},
		{"no name", func(c *cluster.Cluster) { c.Name = "" }, "name"},
		{"a long name", func(c *cluster.Cluster) { c.Name = strings.Repeat("x", 101) }, "name"},
		{"a name that could be four parts", func(c *cluster.Cluster) { c.Name = "my-cluster:apps:lister:pod" }, "colons"},
		{"a name of two lines", func(c *cluster.Cluster) { c.Name = "my\ncluster" }, "control"},
		{"a name with a NUL", func(c *cluster.Cluster) { c.Name = "my\x00cluster" }, "control"},
		{"a name that colours the terminal", func(c *cluster.Cluster) { c.Name = "\x1b[31mmy-cluster" }, "control"},
		{"no audience", func(c *cluster.Cluster) { c.Audience = "" }, "audience"},
		{"a long audience", func(c *cluster.Cluster) { c.Audience = strings.Repeat("x", 257) }, "audience"},
		{"of virtual servers", func(c *cluster.Cluster) { c.Type = identity.VSI }, "type"},
		{"of no type", func(c *cluster.Cluster) { c.Type = "" }, "type"},
		{"an issuer that is no URL, with an API server", func(c *cluster.Cluster) {
			c.Issuer, c.Server = "kubernetes/serviceaccount", &cluster.APIServer{URL: "https://10.0.0.1:6443"}
		}, ""},
		{"a review with an API server", func(c *cluster.Cluster) {
			c.Review, c.Server = true, &cluster.APIServer{URL: "https://10.0.0.1:6443"}
		}, ""},
		{"a review without an API server", func(c *cluster.Cluster) { c.Review = true }, "server"},
		{"an API server that is none, with keys", func(c *cluster.Cluster) {
			c.JWKS, c.Server = []byte("{}"), &cluster.APIServer{URL: "http://10.0.0.1:6443"}
		}, "server"},
	} {
		c := good()
		tt.change(c)
		switch err := c.Validate(); {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: error %v, want one about %q", tt.name, err, tt.want)
		}
	}
}

func TestACredentialIsSentOverTLSOnly(t *testing.T) {
	for url, want := range map[string]bool{
		"https://10.0.0.1:6443": true, "https://[2001:db8::1]:6443": true, "https://api.my-cluster.example.com": true, "HTTPS://127.0.0.1": true,
		"": false, "10.0.0.1:6443": false, "http://127.0.0.1:8080": false, "https://": false, "https://:6443": false, "https://a/": true,
		"https://a/k8s/clusters/c-1": true, "https://a/k8s/": true, "https://a/../k8s": false, "https://a/k8s/..": false, "https://a/./b": false, "https://a//b": false, "https://a/k8s//": false,
		"https://a/%2e%2e/b": false, "https://a/%6b8s": false, "https://a/a%2fb": false, "https://a/a b": false, "https://a/a;b": false, "https://a/a@b": false, `https://a/a\\b`: false, "https://a/ü": false, "https://a/x\n": false,
		"https://user:secret@a": false, "https://a?": false, "https://a?b=c": false, "https://a#b": false,
		"https://a:port": false, "ftp://a": false, "https://a\n": false,
	} {
		if err := cluster.ValidServerURL(url); (err == nil) != want {
			t.Errorf("%q: error %v, want good = %t", url, err, want)
		}
	}
}

func TestNoTwoClustersOfAnAccountClaimTheSameTokens(t *testing.T) {
	const issuer = "https://kubernetes.default.svc"
	at := func(url string) *cluster.Cluster {
		return &cluster.Cluster{Issuer: issuer, Server: &cluster.APIServer{URL: url}}
	}
	keys := func(jwks string) *cluster.Cluster { return &cluster.Cluster{Issuer: issuer, JWKS: []byte(jwks)} }
	for _, tt := range []struct {
		name   string
		a, b   *cluster.Cluster
		shared bool
	}{
		{"two API servers", at("https://a:6443"), at("https://b:6443"), false},
		{"one API server", at("https://a:6443"), at("https://a:6443"), true},
		{"one API server in two spellings", at("https://a"), at("HTTPS://A:443"), true},
		{"two paths of one gateway", at("https://a/k8s/clusters/c-1"), at("https://a/k8s/clusters/c-2"), false},
		{"one path in two spellings", at("https://a/k8s/c-1"), at("https://A:443/k8s/c-1/"), true},
		{"paths that differ in letters only", at("https://a/k8s/C-1"), at("https://a/k8s/c-1"), false},
		{"two ports", at("https://a"), at("https://a:6443"), false},
		{"two keys", keys(`{"keys":[{"kid":"a"}]}`), keys(`{"keys":[{"kid":"b"}]}`), false},
		{"a key of both", keys(`{"keys":[{"kid":"a"},{"kid":"b"}]}`), keys(`{"keys":[{"kid":"b"}]}`), true},
		{"a key and an API server", keys(`{"keys":[{"kid":"server a:6443"}]}`), at("https://a:6443"), false},
		{"one discovery document", &cluster.Cluster{Issuer: issuer}, &cluster.Cluster{Issuer: issuer}, true},
		{"two issuers", &cluster.Cluster{Issuer: issuer}, &cluster.Cluster{Issuer: issuer + "/"}, false},
		{"uploaded keys count before the API server", &cluster.Cluster{Issuer: issuer, JWKS: []byte(`{"keys":[{"kid":"a"}]}`), Server: &cluster.APIServer{URL: "https://a"}}, at("https://a"), false},
	} {
		shared := slices.ContainsFunc(tt.a.Claims(), func(c string) bool { return slices.Contains(tt.b.Claims(), c) })
		if shared != tt.shared || len(tt.a.Claims()) == 0 {
			t.Errorf("%s: %q and %q", tt.name, tt.a.Claims(), tt.b.Claims())
		}
	}
}

func TestAHostIsFoundByTheIDsOfItsKeys(t *testing.T) {
	for jwks, want := range map[string][]string{
		`{"keys":[{"kid":"a"},{"kid":"b"}]}`: {"a", "b"},
		`{"keys":[]}`:                        {},
		`{"keys":[{"kid":1}]}`:               nil,
		`{`:                                  nil,
		``:                                   nil,
	} {
		if got := (&cluster.Host{JWKS: []byte(jwks)}).KeyIDs(); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", jwks, got, want)
		}
	}
}
