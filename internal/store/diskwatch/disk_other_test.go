//go:build !linux

package diskwatch_test

import "testing"

func tmpfs(t *testing.T, _ int) string {
	t.Skip("small disks are made on Linux only")
	return ""
}

func free(*testing.T, string) int64 { return 0 }

func mountReadOnly(*testing.T, string) (undo func()) { return func() {} }

func ext4(t *testing.T) (dir string, fail func()) {
	t.Skip("small disks are made on Linux only")
	return "", nil
}
