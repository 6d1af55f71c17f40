//go:build linux

package main

import (
	"strings"
	"testing"
)

var cards = []card{{Name: "lo", MAC: "00:00:00:00:00:00"}, {Name: "eth0", MAC: "02:00:00:00:00:0a"}, {Name: "eth1", MAC: "02:00:00:00:00:0b"}}

func planOf(t *testing.T, document string) (commands, resolv string, err error) {
	t.Helper()
	n, err := parseNetwork([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	list, resolv, err := n.plan(cards)
	var lines []string
	for _, c := range list {
		lines = append(lines, strings.Join(c, " "))
	}
	return strings.Join(lines, "\n"), resolv, err
}

func TestACardGetsItsAddressRoutesAndNameservers(t *testing.T) {
	commands, resolv, err := planOf(t, `
version: 2
ethernets:
  eth0:
    match: {macaddress: "02:00:00:00:00:0A"}
    set-name: eth0
    addresses: [10.1.2.3/24]
    routes:
    - {to: 0.0.0.0/0, via: 10.1.2.1, on-link: true}
    - {to: 169.254.169.254/32, scope: link}
    nameservers: {addresses: [10.1.2.1], search: [a.test]}
`)
	if err != nil {
		t.Fatal(err)
	}
	want := `link set dev lo up
link set dev eth0 up
addr add 10.1.2.3/24 dev eth0
route add 169.254.169.254/32 dev eth0 scope link
route add default via 10.1.2.1 dev eth0 onlink`
	if commands != want {
		t.Errorf("got\n%s\nwant\n%s", commands, want)
	}
	if want := "search a.test\nnameserver 10.1.2.1\n"; resolv != want {
		t.Errorf("got %q, want %q", resolv, want)
	}
}

func TestTwoCardsMayTradeTheirNames(t *testing.T) {
	commands, _, err := planOf(t, `
network:
  version: 2
  ethernets:
    a: {match: {macaddress: "02:00:00:00:00:0b"}, set-name: eth0, gateway4: 10.0.0.1, addresses: [10.0.0.2/24], mtu: 1400}
    b: {match: {macaddress: "02:00:00:00:00:0a"}, set-name: eth1}
`)
	if err != nil {
		t.Fatal(err)
	}
	want := `link set dev lo up
link set dev eth1 name was-eth1
link set dev eth0 name was-eth0
link set dev was-eth1 name eth0
link set dev was-eth0 name eth1
link set dev eth0 mtu 1400
link set dev eth0 up
addr add 10.0.0.2/24 dev eth0
route add default via 10.0.0.1 dev eth0
link set dev eth1 up`
	if commands != want {
		t.Errorf("got\n%s\nwant\n%s", commands, want)
	}
}

func TestACardThatIsNotThereIsAnError(t *testing.T) {
	_, _, err := planOf(t, `{version: 2, ethernets: {eth0: {match: {macaddress: "02:00:00:00:00:0c"}}}}`)
	if err == nil || !strings.Contains(err.Error(), "02:00:00:00:00:0c") {
		t.Errorf("the error is %v", err)
	}
}

func TestOtherVersionsOfNetworkConfigAreRefused(t *testing.T) {
	if _, err := parseNetwork([]byte("version: 1\nconfig: []\n")); err == nil {
		t.Error("version 1 is taken")
	}
}

func TestIgnoredNetworkSettingsAreNamed(t *testing.T) {
	n, err := parseNetwork([]byte("version: 2\nethernets:\n  eth0: {dhcp4: true, match: {driver: virtio}}\nbonds: {}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(n.ignored(), ", "), "network bonds, network dhcp4, network driver"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
