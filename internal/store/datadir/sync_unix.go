//go:build unix

package datadir

import (
	"errors"
	"fmt"
	"os"
)

// Sync makes the names in a directory durable: those of files that were made,
// moved or removed. Syncing the file does not do it.
func Sync(dir string) error {
	d, err := os.Open(dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("make the names in %s durable: %w", dir, err)
	}
	return nil
}
