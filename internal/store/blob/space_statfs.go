//go:build linux || darwin || freebsd

package blob

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Space returns how many bytes of the file system that the directory is on are
// free for this process, and how many it has. Where the system does not say, the
// error is errors.ErrUnsupported.
func (s *Store) Space() (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, 0, fmt.Errorf("asking how much room is left for files: %w", err)
	}
	block := int64(st.Bsize) //nolint:unconvert // the type differs from system to system
	return int64(st.Bavail) * block, int64(st.Blocks) * block, nil
}
