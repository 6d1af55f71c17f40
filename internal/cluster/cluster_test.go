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
