package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteNew makes a private file that must not be there yet. Whatever happens
// meanwhile, a power cut included, there is the whole file or none; when it
// returns, the file is on stable storage. The error of one that is there is
// [fs.ErrExist].
func WriteNew(name string, content []byte) error {
	dir := filepath.Dir(name)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(name)+"-*") // of mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Link(tmp.Name(), name)
		if err != nil && !errors.Is(err, fs.ErrExist) { // the file system has no links
			return errors.Join(rename(tmp.Name(), name), Sync(dir))
		}
	}
	if err := errors.Join(err, os.Remove(tmp.Name())); err != nil {
		return err
	}
	return Sync(dir)
}

func rename(from, to string) error {
	if _, err := os.Lstat(to); err == nil {
		return errors.Join(fmt.Errorf("%s: %w", to, fs.ErrExist), os.Remove(from))
	}
	return os.Rename(from, to)
}
