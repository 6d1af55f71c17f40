//go:build !unix

package server

import (
	"fmt"
	"os"
	"path/filepath"
)

// lockDir marks the data directory. Where the system has no advisory locks,
// the operator must not start two servers on it.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	return f, nil
}
