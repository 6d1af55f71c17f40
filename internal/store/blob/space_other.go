//go:build !(linux || darwin || freebsd)

package blob

import "errors"

// Space returns how many bytes of the file system that the directory is on are
// free for this process, and how many it has. Where the system does not say, the
// error is errors.ErrUnsupported.
func (s *Store) Space() (free, total int64, err error) { return 0, 0, errors.ErrUnsupported }
