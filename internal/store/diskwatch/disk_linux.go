package diskwatch

import (
	"os"

	"golang.org/x/sys/unix"
)

// space returns what the file system of a directory has free for the server,
// and its size.
func space(dir string) (free, total int64, err error) {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0, 0, err
	}
	return int64(s.Bavail) * s.Bsize, int64(s.Blocks) * s.Bsize, nil
}

// readOnly reports whether a directory is mounted so that nothing can be
// written to it.
func readOnly(dir string) bool {
	var s unix.Statfs_t
	return unix.Statfs(dir, &s) == nil && s.Flags&unix.ST_RDONLY != 0
}

// setApart gives a file space on the disk without writing to it.
func setApart(f *os.File, size int64) error {
	return unix.Fallocate(int(f.Fd()), 0, 0, size)
}
