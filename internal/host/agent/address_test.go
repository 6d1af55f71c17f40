package agent

import (
	"net/netip"
	"testing"
)

func TestAHostIsReachedByTheAddressThatReachesTheServerUnlessTold(t *testing.T) {
	for _, c := range []struct{ told, toServer, want string }{
		{"", "192.0.2.1", "192.0.2.1"},
		{"", "127.0.0.1", "invalid IP"}, // a server on this machine says nothing about the others
		{"", "", "invalid IP"},
		{"192.0.2.7", "192.0.2.1", "192.0.2.7"},
		{"none", "192.0.2.1", "invalid IP"},
	} {
		toServer, _ := netip.ParseAddr(c.toServer)
		got, err := (&DriverConfig{Address: c.told}).address(toServer)
		if err != nil || got.String() != c.want {
			t.Errorf("told %q, with %q to the server: %s, %v; want %s", c.told, c.toServer, got, err, c.want)
		}
	}
	for _, bad := range []string{"x", "::1", "2001:db8::1", "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.0/24"} {
		if err := (&DriverConfig{Driver: DriverAuto, Accel: "auto", Address: bad}).Validate(); err == nil {
			t.Errorf("the address %q is taken", bad)
		}
	}
}

func TestTheOwnAddressIsTheOneThatLeadsToTheServer(t *testing.T) {
	for server, want := range map[string]string{
		"https://127.0.0.1:8470": "127.0.0.1", "https://127.0.0.1": "127.0.0.1", "https://[::1]:8470": "invalid IP", "https://name.invalid": "invalid IP",
	} {
		if got := (&client{server: server}).ownAddress(t.Context()); got.String() != want {
			t.Errorf("to %s by %s, want %s", server, got, want)
		}
	}
}
