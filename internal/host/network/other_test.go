//go:build !linux

package network

import "testing"

func TestThereAreNoNetworksOfMachinesOutsideLinux(t *testing.T) {
	if _, err := New(Config{State: "01234567"}); err == nil {
		t.Error("the network was made")
	}
}
