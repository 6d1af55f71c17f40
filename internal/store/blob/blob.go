// Package blob keeps large files under ids, such as the disks of images, in one
// directory. A file appears whole or not at all, and its SHA256 is known when it
// does. It knows nothing of what is in the files, and does not keep what is said
// about them: that is the directory's.
package blob

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Store is a directory of files. Its methods may be called from any goroutine.
// No two processes may have the same directory open.
type Store struct{ dir string }

// partial ends the names of files that are not whole yet. No id has a dot.
const partial = ".partial"

// Open makes the directory, or opens it and removes what writers that were cut
// short have left.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the directory of files: %w", err)
	}
	// One that was there before may be open to others; nothing in it is theirs.
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("closing the directory of files to others: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading the directory of files: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), partial) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("removing an unfinished file: %w", err)
			}
		}
	}
	return &Store{dir: dir}, nil
}

// validID reports whether s can be the name of a file and nothing more.
func validID(s string) bool {
	return s != "" && len(s) <= 128 && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	}) < 0
}

// Path returns where the file with an id is, whether it exists or not.
func (s *Store) Path(id string) (string, error) {
	if !validID(id) {
		return "", fmt.Errorf("%q is not the id of a file", id)
	}
	return filepath.Join(s.dir, id), nil
}

// Open opens a file to read. An absent one is fs.ErrNotExist.
func (s *Store) Open(id string) (*os.File, error) {
	path, err := s.Path(id)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the file %s: %w", id, err)
	}
	return f, nil
}

// Delete removes a file. Deleting one that does not exist is fine.
func (s *Store) Delete(id string) error {
	path, err := s.Path(id)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("deleting the file %s: %w", id, err)
	}
	return nil
}

// IDs returns the ids of all whole files.
func (s *Store) IDs() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("reading the directory of files: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if validID(e.Name()) && e.Type().IsRegular() {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// Writer takes the content of a file that is not there yet. It must be ended by
// Commit or Abort.
type Writer struct {
	store *Store
	id    string
	file  *os.File
	hash  hash.Hash
	size  int64
	ended bool
}

// Create begins a file. Several writers of one id do not disturb each other: the
// last one to commit wins.
func (s *Store) Create(id string) (*Writer, error) {
	if !validID(id) {
		return nil, fmt.Errorf("%q is not the id of a file", id)
	}
	f, err := os.CreateTemp(s.dir, id+".*"+partial) // mode 0600
	if err != nil {
		return nil, fmt.Errorf("beginning the file %s: %w", id, err)
	}
	return &Writer{store: s, id: id, file: f, hash: sha256.New()}, nil
}

// Write appends to the file. A full disk is syscall.ENOSPC.
func (w *Writer) Write(p []byte) (int, error) {
	n, err := w.file.Write(p)
	w.hash.Write(p[:n]) // never fails, see hash.Hash
	w.size += int64(n)
	if err != nil {
		return n, fmt.Errorf("writing the file %s: %w", w.id, err)
	}
	return n, nil
}

// Size returns how many bytes were written.
func (w *Writer) Size() int64 { return w.size }

// SHA256 returns the hexadecimal SHA256 of what was written.
func (w *Writer) SHA256() string { return hex.EncodeToString(w.hash.Sum(nil)) }

// Head returns the first n bytes that were written, or fewer when there are not
// as many.
func (w *Writer) Head(n int) ([]byte, error) {
	b := make([]byte, min(int64(n), w.size))
	if _, err := w.file.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("reading the beginning of the file %s: %w", w.id, err)
	}
	return b, nil
}

// Sync makes what was written durable, which may take long.
func (w *Writer) Sync() error {
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("making the file %s durable: %w", w.id, err)
	}
	return nil
}

// Commit gives the file its name, durably. After Sync it is quick.
func (w *Writer) Commit() error {
	if w.ended {
		return fmt.Errorf("committing the file %s: its writer has ended", w.id)
	}
	w.ended = true
	temporary := w.file.Name()
	err := errors.Join(w.file.Sync(), w.file.Close())
	if err == nil {
		err = os.Rename(temporary, filepath.Join(w.store.dir, w.id))
	}
	if err == nil {
		err = syncDir(w.store.dir)
	}
	if err != nil {
		return fmt.Errorf("committing the file %s: %w", w.id, errors.Join(err, absent(os.Remove(temporary))))
	}
	return nil
}

// Abort removes what was written. After Commit it does nothing.
func (w *Writer) Abort() error {
	if w.ended {
		return nil
	}
	w.ended = true
	if err := errors.Join(w.file.Close(), absent(os.Remove(w.file.Name()))); err != nil {
		return fmt.Errorf("dropping the file %s: %w", w.id, err)
	}
	return nil
}

func absent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
