package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

// Suffixes of names beside the store's.
const (
	walSuffix   = "-wal"
	shmSuffix   = "-shm"
	halfSuffix  = ".restoring" // a copy that is being made of a file that was removed
	wholeSuffix = ".restored"  // one that is complete, and has to get the store's name
	asideSuffix = ".found-"    // what lay in the place of a file of the store, with a time
)

// walLimit is how large SQLite lets the write-ahead log stay, in bytes.
const walLimit = 64 << 20

// held is a file as the store has it open.
type held struct {
	*os.File
	name  string
	magic []byte // that it begins with
	floor int64  // bytes that it must have
	limit int64  // above which it may be cut by SQLite itself; 0 is never

	// shrinking says that SQLite is going to cut the file, when the readers let
	// it; until then floor is what it may become.
	shrinking bool
}

// files are the main file and the write-ahead log. They are held open beside
// SQLite's own handles for as long as those: to close the main one earlier would
// give up SQLite's locks on it.
type files struct {
	name string
	main held
	wal  held
	shm  os.FileInfo
}

var (
	mainMagic = []byte("SQLite format 3\x00")
	walMagic  = []byte{0x37, 0x7f, 0x06} // and 0x82 or 0x83, by the machine
)

// hold opens the files that SQLite has just opened.
func hold(name string) (*files, error) {
	f := &files{name: name, main: held{name: name, magic: mainMagic}, wal: held{name: name + walSuffix, magic: walMagic, limit: walLimit}}
	for _, h := range []*held{&f.main, &f.wal} {
		var err error
		if h.File, err = os.Open(h.name); err != nil {
			return nil, errors.Join(fmt.Errorf("open %s: %w", name, err), f.release())
		}
	}
	var err error
	if f.shm, err = os.Stat(name + shmSuffix); err == nil {
		err = f.checkAll()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", name, err), f.release())
	}
	return f, nil
}

func (f *files) release() error {
	var errs []error
	for _, h := range []*held{&f.main, &f.wal} {
		if h.File != nil {
			errs = append(errs, h.Close())
			h.File = nil
		}
	}
	return errors.Join(errs...)
}

// check returns a *store.LostError unless the files that have the data are what
// they were and where they were. It costs a few system calls, about 10 µs, so
// that each commit can afford it.
func (f *files) check() error {
	if err := f.main.check(); err != nil {
		return err
	}
	return f.wal.check()
}

// checkAll checks, too, the file without which another process would think that
// nobody has the store open.
func (f *files) checkAll() error {
	if err := f.check(); err != nil {
		return err
	}
	there, err := os.Stat(f.name + shmSuffix)
	return place(f.name+shmSuffix, f.shm, there, err)
}

func (h *held) check() error {
	is, err := h.Stat()
	if err != nil {
		return fmt.Errorf("look at %s: %w", h.name, err)
	}
	damaged := func(what string, args ...any) error {
		return &store.LostError{File: h.name, What: fmt.Sprintf(what, args...), Damaged: true}
	}
	size := is.Size()
	if size < h.floor {
		return damaged("was cut from %d to %d bytes by something else than this program", h.floor, size)
	}
	// A file that was cut during a write has grown back over zeros.
	begins := make([]byte, len(h.magic))
	if n, err := h.ReadAt(begins, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %s: %w", h.name, err)
	} else if n > 0 && string(begins[:n]) != string(h.magic) || n == 0 && h.floor > 0 {
		return damaged("was overwritten by something else than this program")
	}
	if !h.shrinking {
		h.floor = size
		if h.limit > 0 {
			h.floor = min(size, h.limit)
		}
	}
	there, err := os.Stat(h.name)
	return place(h.name, is, there, err)
}

func place(name string, is, there os.FileInfo, err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return &store.LostError{File: name, What: "was removed"}
	case err != nil:
		return fmt.Errorf("look for %s: %w", name, err)
	case !os.SameFile(is, there):
		return &store.LostError{File: name, What: "was replaced by another file"}
	}
	return nil
}

// CheckFiles implements [store.Files].
func (s *Store) CheckFiles() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkAll()
}

func (s *Store) checkAll() error {
	if s.files == nil {
		return s.unheld
	}
	return s.files.checkAll()
}

// check is called before and after whatever is written. Guarded by mu.
func (s *Store) check() error {
	if s.files == nil {
		return s.unheld
	}
	return s.files.check()
}

// Restore implements [store.Files]. A main file that has no name any more is
// copied while readers go on; they wait while its place is taken. Of a removed
// write-ahead log the main file takes up what was in it.
func (s *Store) Restore(ctx context.Context) (done store.Restored, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("put the file of the store back: %w", err)
		}
	}()
	if s.files == nil { // an attempt has come to its last step and no further
		return store.Restored{Found: s.unheld.Error()}, s.reopen(ctx)
	}
	lost := &store.LostError{}
	if err := s.checkAll(); err == nil {
		return done, nil
	} else if !errors.As(err, &lost) || lost.Damaged {
		return done, err
	}
	done.Found = lost.Error()
	name := s.files.name
	copied := s.files.main.check() != nil
	if copied {
		if err := s.copyAside(ctx, name); err != nil {
			return done, err
		}
	}
	writer, err := s.write.Conn(ctx)
	if err != nil {
		return done, err
	}
	s.all.bar(s.read, s.write)
	if err = s.all.wait(ctx, 1); err == nil && !copied {
		s.files.wal.floor = 0
		err = takeUp(ctx, writer)
	}
	if err == nil {
		done.Aside, err = s.setAside(copied)
	}
	if err != nil { // nothing has changed, but for files of somebody else's
		if copied {
			err = errors.Join(err, os.RemoveAll(name+wholeSuffix))
		}
		err = errors.Join(err, writer.Close())
		s.all.admit()
		return done, err
	}
	// As the last connection this one removes the log that is left by its name,
	// so that only now another file may have the names.
	err = errors.Join(writer.Close(), s.files.release())
	s.files, s.unheld = nil, lost
	if err != nil {
		return done, err
	}
	return done, s.reopen(ctx)
}

// copyAside writes all that is committed to a new file.
func (s *Store) copyAside(ctx context.Context, name string) (err error) {
	half := name + halfSuffix
	if err := os.RemoveAll(half); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(half))
		}
	}()
	f, err := os.OpenFile(half, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = s.write.ExecContext(ctx, "VACUUM INTO ?", fileURL(half, nil))
	if err == nil {
		// The copy has no write-ahead log; to turn it on later needs the file alone.
		_, err = f.WriteAt([]byte{2, 2}, 18) // file format versions: SQLite's file format, section 1.3.3
	}
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("copy what is still open: %w", err)
	}
	if err := os.Rename(half, name+wholeSuffix); err != nil {
		return err
	}
	return syncDir(name)
}

// takeUp brings what is in the write-ahead log into the main file.
func takeUp(ctx context.Context, writer *sql.Conn) error {
	var busy, inLog, done int
	if err := writer.QueryRowContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)").Scan(&busy, &inLog, &done); err != nil {
		return fmt.Errorf("bring the write-ahead log into the main file: %w", err)
	}
	if busy != 0 {
		return errors.New("bring the write-ahead log into the main file: another process has it open")
	}
	return nil
}

// setAside moves away what has the names of the store's files and is not theirs.
// What is theirs is left to SQLite.
func (s *Store) setAside(main bool) (moved []string, err error) {
	suffix := fmt.Sprint(asideSuffix, time.Now().UnixNano())
	aside := func(name string, is os.FileInfo) error {
		there, err := os.Lstat(name)
		if errors.Is(err, os.ErrNotExist) || err == nil && os.SameFile(is, there) {
			return nil
		}
		if err == nil {
			err = os.Rename(name, name+suffix)
			moved = append(moved, name+suffix)
		}
		return err
	}
	wal, err := s.files.wal.Stat()
	if err != nil {
		return nil, err
	}
	if err := aside(s.files.name+walSuffix, wal); err != nil {
		return moved, err
	}
	if err := aside(s.files.name+shmSuffix, s.files.shm); err != nil {
		return moved, err
	}
	if main {
		is, err := s.files.main.Stat()
		if err != nil {
			return moved, err
		}
		if err := aside(s.files.name, is); err != nil {
			return moved, err
		}
	}
	return moved, nil
}

// reopen gives a complete copy the store's name, if there is one, and opens the
// file. It can be called again when it failed.
func (s *Store) reopen(ctx context.Context) error {
	if err := adopt(s.name); err != nil {
		return err
	}
	s.all.admit()
	var journal string
	if err := s.write.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&journal); err != nil {
		return fmt.Errorf("open it again: %w", err)
	}
	size, err := treeSize(ctx, s.write)
	if err == nil {
		err = s.openReaders(ctx)
	}
	if err != nil {
		return fmt.Errorf("open it again: %w", err)
	}
	files, err := hold(s.name)
	if err != nil {
		return err
	}
	edge, err := merkle.Read(size, s)
	if err == nil && edge.Root() != s.edge.Root() {
		err = &store.LostError{File: s.name, What: "has another activity log than before", Damaged: true}
	}
	if err != nil {
		return errors.Join(err, files.release())
	}
	s.files, s.unheld = files, nil
	return nil
}

// openReaders opens all connections that read. One that is opened only when it
// is wanted finds no file when that was removed.
func (s *Store) openReaders(ctx context.Context) (err error) {
	conns := make([]*sql.Conn, 0, readers)
	defer func() {
		for _, c := range conns {
			err = errors.Join(err, c.Close())
		}
	}()
	for range readers {
		c, err := s.read.Conn(ctx)
		if err != nil {
			return err
		}
		conns = append(conns, c)
		if err := c.PingContext(ctx); err != nil {
			return err
		}
	}
	return nil
}

// adopt gives the copy that a restore has made its name. It is called before
// SQLite opens the file.
func adopt(name string) error {
	whole, half := name+wholeSuffix, name+halfSuffix
	_, err := os.Lstat(name)
	there := err == nil
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if _, err := os.Lstat(whole); err == nil && there {
		return fmt.Errorf("%s was replaced while a server ran, and what the server had stands in %s: move away the one that does not count", name, whole)
	} else if err == nil {
		// A log that is left beside it belongs to the file that was there before.
		for _, suffix := range []string{walSuffix, shmSuffix} {
			if err := os.Remove(name + suffix); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		if err := os.Rename(whole, name); err != nil {
			return err
		}
		return syncDir(name)
	}
	if _, err := os.Lstat(half); err == nil && !there {
		return fmt.Errorf("%s was removed while a server ran, and the server ended before it had written it back: put a backup there; %s is not complete, remove it", name, half)
	}
	return nil
}

func syncDir(name string) error {
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
