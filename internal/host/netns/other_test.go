//go:build !linux

package netns

import "testing"

func TestThereAreNoNetworkNamespacesOutsideLinux(t *testing.T) {
	if _, err := New(Config{State: "01234567"}); err == nil {
		t.Error("the driver was made")
	}
}
