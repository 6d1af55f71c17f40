package authority

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// File is a store in one file of mode 0600. Its directory must exist.
type File string

// Load reads the file.
func (f File) Load() ([]byte, error) {
	b, err := os.ReadFile(string(f))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// Save replaces the file: whoever reads it sees the old state or the new one.
func (f File) Save(state []byte) error {
	dir := filepath.Dir(string(f))
	tmp, err := os.CreateTemp(dir, ".authority-*") // of mode 0600
	if err != nil {
		return err
	}
	_, err = tmp.Write(state)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), string(f))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", string(f), err), os.Remove(tmp.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("make %s durable: %w", string(f), err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("make %s durable: %w", string(f), err)
	}
	return nil
}
