package server

import (
	"net"
	"strings"
	"testing"
	"time"
)

func TestDefaultsAreFilledIn(t *testing.T) {
	var c Config
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	if c.DataDir != "tabard-data" || c.Store != "sqlite" || c.Region != "us-south" || c.CName != "bluemix" || c.CType != "public" ||
		c.Alg != "ES256" || c.Driver != DriverAuto || len(c.Listen) != 1 || c.Listen[0] != "127.0.0.1:8470" ||
		c.KeyRotation != 720*time.Hour || c.ClusterKeysMaxAge != 5*time.Minute || c.Now == nil || c.Log == nil {
		t.Errorf("config %+v", c)
	}
}

func TestAllThatCannotWorkIsToldAtOnce(t *testing.T) {
	c := Config{
		Store: "mysql", Region: "mars-1", Driver: "docker", TLSCert: "cert.pem", CName: "a:b", CType: "a b",
		URL: "example.com", Issuer: "ftp://example.com", Listen: []string{"127.0.0.1", "127.0.0.1:0"},
		Alg: "HS256", KeyRotation: time.Hour, ClusterKeysMaxAge: 2 * time.Hour,
	}
	err := c.Complete()
	if err == nil {
		t.Fatal("no error")
	}
	for _, about := range []string{"mysql", "mars-1", "docker", "tls-cert", "cname", "ctype", "example.com", "ftp://", `"127.0.0.1"`, "HS256", "1h", "cluster-keys-max-age"} {
		if !strings.Contains(err.Error(), about) {
			t.Errorf("the error says nothing about %q: %v", about, err)
		}
	}
	if strings.Contains(err.Error(), "127.0.0.1:0") {
		t.Errorf("the error complains of what is right: %v", err)
	}
}

func TestWithdrawnKeysCountForAnHourAtMost(t *testing.T) {
	for age, ok := range map[time.Duration]bool{
		time.Second: true, time.Hour: true, time.Second - 1: false, time.Hour + 1: false, -time.Minute: false,
	} {
		c := Config{ClusterKeysMaxAge: age}
		if err := c.Complete(); (err == nil) != ok {
			t.Errorf("%s: error %v", age, err)
		}
	}
}

func TestPlainHTTPStaysOnTheMachineUnlessToldOtherwise(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:1": true, "127.8.9.1:1": true, "localhost:1": true, "[::1]:1": true,
		":1": false, "0.0.0.0:1": false, "[::]:1": false, "192.0.2.1:1": false, "example.com:1": false, "localhost.example.com:1": false,
	} {
		for _, c := range []struct {
			cfg  Config
			want bool
		}{
			{Config{Listen: []string{addr}}, ok},
			{Config{Listen: []string{"127.0.0.1:2", addr}}, ok},
			{Config{Listen: []string{addr}, Insecure: true}, true},
			{Config{Listen: []string{addr}, TLSCert: "c", TLSKey: "k"}, true},
		} {
			if err := c.cfg.Complete(); (err == nil) != c.want {
				t.Errorf("listen %v, insecure %v, TLS %v: error %v", c.cfg.Listen, c.cfg.Insecure, c.cfg.TLSCert != "", err)
			}
		}
	}
}

func TestURLsMustBeWhole(t *testing.T) {
	for u, ok := range map[string]bool{
		"http://iam.example.com": true, "https://iam.example.com:8470": true, "https://iam.example.com/base/": true,
		"iam.example.com": false, "//iam.example.com": false, "http://": false, "javascript:alert(1)": false,
		"https://iam.example.com?x=1": false, "https://iam.example.com#x": false, "http://%zz": false,
	} {
		for _, c := range []Config{{URL: u}, {Issuer: u}} {
			if err := c.Complete(); (err == nil) != ok {
				t.Errorf("%q: error %v", u, err)
			}
		}
	}
}

func TestAWildcardAddressIsReachedOverLoopback(t *testing.T) {
	for addr, want := range map[string]string{
		"0.0.0.0:8470": "127.0.0.1:8470", "[::]:8470": "127.0.0.1:8470", "127.0.0.1:8470": "127.0.0.1:8470", "192.0.2.1:80": "192.0.2.1:80",
	} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := reachable(a); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}
