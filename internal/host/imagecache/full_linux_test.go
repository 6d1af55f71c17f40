package imagecache

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAFullDiskLeavesNothingBehind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a small file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := &source{content: make([]byte, 1<<20)}
	c, err := New(Config{Dir: dir, Source: s, Group: -1})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.Get(t.Context(), image(s.content)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if left := files(t, c); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
