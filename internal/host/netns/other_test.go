//go:build !linux

package netns

import "testing"

func TestThereAreNoNetworkNamespacesOutsideLinux(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("the driver was made")
	}
}
