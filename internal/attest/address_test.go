package attest

import "testing"

func TestKeysAreNotFetchedFromWhereNoIssuerIs(t *testing.T) {
	for _, tt := range []struct {
		issuer, address string
		admitted        bool
	}{
		{"https://login.example.com", "192.0.2.7:443", true},
		{"https://cluster.corp.example", "10.1.2.3:6443", true},
		{"https://login.example.com", "169.254.169.254:443", false},
		{"https://login.example.com", "[fe80::1]:443", false},
		{"https://login.example.com", "[::ffff:169.254.169.254]:443", false},
		{"https://login.example.com", "0.0.0.0:443", false},
		{"https://login.example.com", "127.0.0.1:443", false},
		{"https://login.example.com", "[::1]:443", false},
		{"https://127.0.0.1.example.com", "127.0.0.1:443", false},
		{"http://127.0.0.1:6443", "127.0.0.1:6443", true},
		{"http://localhost:6443", "[::1]:6443", true},
		{"https://169.254.169.254", "169.254.169.254:443", false},
		{"://", "127.0.0.1:443", false},
		{"https://login.example.com", "nonsense", false},
	} {
		if err := admissible(tt.issuer, tt.address); (err == nil) != tt.admitted {
			t.Errorf("%s at %s: %v", tt.issuer, tt.address, err)
		}
	}
}
