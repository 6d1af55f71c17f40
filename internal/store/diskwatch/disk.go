package diskwatch

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"tabard.dev/tabard/internal/store"
)

// probeName is a file that is written to find out whether the disk takes it.
const probeName = ".probe"

// probe writes and removes a small file.
func probe(dir string) (err error) {
	name := filepath.Join(dir, probeName)
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 64<<10))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close(), os.Remove(name))
}

// stateOfDisk names what an error of the file system means.
func stateOfDisk(err error) store.State {
	switch {
	case err == nil:
		return store.StateOK
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return store.StateFull
	case errors.Is(err, syscall.EROFS):
		return store.StateReadOnly
	}
	return store.StateFailing
}

func full(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_FULL
}

// sizeOf returns what a file takes of the disk, 0 for none.
func sizeOf(name string) (int64, error) {
	info, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("%s is not a file", name)
	}
	return info.Size(), nil
}

// remove removes a file and returns its size.
func remove(name string) (int64, error) {
	size, err := sizeOf(name)
	if err != nil {
		return 0, err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	return size, nil
}

// allocate makes a file that really has so many bytes of the disk, or none for 0.
func allocate(name string, size int64) (err error) {
	if _, err := remove(name); err != nil || size <= 0 {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(name))
		}
	}()
	err = setApart(f, size)
	if errors.Is(err, errors.ErrUnsupported) {
		// A file system that cannot set space apart is given something to write
		// that it cannot leave out.
		_, err = io.CopyN(f, rand.Reader, size)
	}
	if err != nil {
		return err
	}
	return f.Sync()
}
