package vpcapi_test

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/api/vpcapi"
)

// TestAFileStopsComingBeforeTheDiskIsFull fills a small file system of its own.
func TestAFileStopsComingBeforeTheDiskIsFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a file system")
	}
	const size, reserve, step = 192 << 20, 96 << 20, 64 << 20
	dir := t.TempDir()
	if err := unix.Mount("tabard-test", dir, "tmpfs", 0, "size=192m"); err != nil {
		t.Skipf("mounting a file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	l := newLibraryIn(t, filepath.Join(dir, "images"), vpcapi.ImagesConfig{Reserve: reserve})
	id := l.image()
	var most int64
	body := io.LimitReader(readerFunc(func(p []byte) (int, error) {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return 0, err
		}
		most = max(most, size-int64(st.Bavail)*st.Bsize)
		clear(p)
		return len(p), nil
	}), size-step/4)
	l.pour(id, body).want(507, "insufficient_storage")
	if most > size-reserve+step {
		t.Errorf("%d bytes of %d were in use", most, size)
	}
	if l.files() != "" {
		t.Errorf("left %s", l.files())
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
