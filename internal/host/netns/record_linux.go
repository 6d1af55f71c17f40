package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// record is what is kept of a machine. It is written before anything of the
// machine is made, and removed after all of it is gone.
type record struct {
	ID string `json:"id"`
}

// recordBytes bounds a record that is read.
const recordBytes = 64 << 10

// records are the files of one directory, one a machine.
type records struct{ dir string }

func (r records) path(space string) string { return filepath.Join(r.dir, space+".json") }

// read returns the ids of the machines by the names of their namespaces. A file
// that is no record is reported, not fatal: one bad file must not keep all other
// machines from being found.
func (r records) read() (map[string]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the records of machines: %w", err)
	}
	ids := map[string]string{}
	var bad error
	for _, e := range entries {
		space, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		rec, err := r.readOne(space)
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		ids[space] = rec.ID
	}
	return ids, bad
}

func (r records) readOne(space string) (record, error) {
	var rec record
	f, err := os.Open(r.path(space))
	if err != nil {
		return rec, err
	}
	defer f.Close()
	err = json.NewDecoder(io.LimitReader(f, recordBytes)).Decode(&rec)
	if err == nil && rec.ID == "" {
		err = errors.New("it names no machine")
	}
	if err != nil {
		return rec, fmt.Errorf("reading the record %s: %w", f.Name(), err)
	}
	return rec, nil
}

// write makes a record durable.
func (r records) write(space string, rec record) error {
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(r.dir, space+".*"+halfSuffix) // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // it is gone when it has got its name
	err = json.NewEncoder(f).Encode(rec)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing the record %s: %w", r.path(space), err)
	}
	if err := os.Rename(f.Name(), r.path(space)); err != nil {
		return err
	}
	return r.sync()
}

// halfSuffix is of files that are not records yet.
const halfSuffix = ".tmp"

// clean removes what an earlier process was killed over. Nothing is written
// meanwhile.
func (r records) clean() error {
	halves, err := filepath.Glob(filepath.Join(r.dir, "*"+halfSuffix))
	for _, half := range halves {
		err = errors.Join(err, os.Remove(half))
	}
	return err
}

func (r records) remove(space string) error {
	err := os.Remove(r.path(space))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(err, r.sync())
}

func (r records) sync() error {
	d, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
