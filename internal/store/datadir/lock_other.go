//go:build !unix

package datadir

import (
	"fmt"
	"os"
	"path/filepath"
)

// Lock marks the data directory. Where the system has no advisory locks,
// the operator must not start two processes on it.
func Lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	return f, nil
}
