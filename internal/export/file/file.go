// Package file is the target of exports that is a file: each event is a line,
// byte for byte the document that the activity log's tree has the hash of. A
// line is on stable storage before it counts as delivered.
//
// The file is this program's alone: it holds a lock on it, and it cuts off half
// a line that a crash has left. A file that somebody moves away is made anew.
package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/store"
)

// Config are the settings of a file.
type Config struct {
	Path    string `yaml:"path"`
	MaxSize Size   `yaml:"max_size"` // rotated before it grows larger; 0 means never
	Daily   bool   `yaml:"daily"`    // rotated before the first event of another UTC day
	Keep    int    `yaml:"keep"`     // how many rotated files stay; 0 means all
	Gzip    bool   `yaml:"gzip"`     // rotated files are compressed
}

// Check reports what cannot work, without looking at the file.
func (c *Config) Check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Path == "" || strings.HasSuffix(c.Path, "/") {
		refuse("path: give the name of a file")
	} else if !filepath.IsAbs(c.Path) {
		refuse("path: %q depends on where the server was started; begin it with a /", c.Path)
	}
	if strings.ContainsFunc(c.Path, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		refuse("path: %q has a control character", c.Path)
	}
	if c.MaxSize != 0 && c.MaxSize < minSize {
		refuse("max_size: want at least 64KiB, which is more than an event can have")
	}
	if c.Keep < 0 {
		refuse("keep: want 0 or more")
	}
	if c.MaxSize == 0 && !c.Daily && (c.Keep > 0 || c.Gzip) {
		refuse("keep and gzip are about rotated files, and nothing rotates this one; give max_size or daily")
	}
	return errors.Join(errs...)
}

// minSize bounds how small files can be made, in bytes.
const minSize = 64 << 10

// Target names the file.
func (c *Config) Target() string { return filepath.Clean(c.Path) }

// Size is a number of bytes. In YAML it is a number, or one with KiB, MiB or
// GiB.
type Size int64

// UnmarshalYAML reads a size.
func (s *Size) UnmarshalYAML(text []byte) error {
	given := strings.Trim(strings.TrimSpace(string(text)), `"'`)
	number, shift := given, 0
	for i, unit := range []string{"KiB", "MiB", "GiB"} {
		if n, ok := strings.CutSuffix(given, unit); ok {
			number, shift = strings.TrimSpace(n), 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(number, 10, 33)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is not a size; write a number of bytes, or one such as 64MiB", given)
	}
	*s = Size(n << shift)
	return nil
}

// Sink writes a file.
type Sink struct {
	cfg    Config
	f      *os.File // nil until the first event
	size   int64
	day    int // UTC, yyyymmdd, of the newest event in it; 0 without one
	tidier *tidier
	buf    bytes.Buffer
}

// New returns a sink. The file is opened when there is something to write.
func New(cfg Config) (*Sink, error) {
	cfg.Path = filepath.Clean(cfg.Path)
	return &Sink{cfg: cfg, tidier: newTidier(cfg)}, nil
}

// Close closes the file.
func (s *Sink) Close() error {
	s.tidier.close()
	return s.closeFile()
}

func (s *Sink) closeFile() error {
	if s.f == nil {
		return nil
	}
	err := s.f.Close()
	s.f = nil
	return err
}

// Deliver appends events and makes them durable.
func (s *Sink) Deliver(ctx context.Context, entries []store.Entry) (taken int, err error) {
	for taken < len(entries) {
		if err := ctx.Err(); err != nil {
			return taken, err
		}
		if err := s.ready(); err != nil {
			return taken, err
		}
		if s.due(&entries[taken]) {
			if err := s.rotate(); err != nil {
				return taken, fmt.Errorf("rotate %s: %w", s.cfg.Path, err)
			}
			continue
		}
		n, err := s.write(entries[taken:])
		taken += n
		if err != nil {
			return taken, fmt.Errorf("write %s: %w", s.cfg.Path, err)
		}
	}
	return taken, s.tidier.complaint()
}

// due reports whether the file must be rotated before an event.
func (s *Sink) due(e *store.Entry) bool {
	if s.size == 0 {
		return false
	}
	// Around midnight two days take turns; the file goes on with the later one.
	return s.cfg.Daily && s.day != 0 && e.Day > s.day || s.cfg.MaxSize > 0 && s.size+int64(len(e.Doc))+1 > int64(s.cfg.MaxSize)
}

// write appends events up to the next rotation, and makes them durable.
func (s *Sink) write(entries []store.Entry) (int, error) {
	s.buf.Reset()
	n, size, day := 0, s.size, s.day
	for i := range entries {
		if n > 0 && s.due(&entries[i]) {
			break
		}
		// JSON has line breaks between its parts only, and ours has none at all.
		s.buf.Write(bytes.ReplaceAll(entries[i].Doc, []byte("\n"), []byte(" ")))
		s.buf.WriteByte('\n')
		n++
		s.size, s.day = size+int64(s.buf.Len()), max(s.day, entries[i].Day)
	}
	_, err := s.f.Write(s.buf.Bytes())
	if err == nil {
		err = s.f.Sync()
	}
	if err == nil {
		if err = s.linked(); err == nil {
			return n, nil
		}
	}
	// Of a batch that was cut short nothing stays. Where even that fails, the
	// next opening cuts the half line off.
	s.size, s.day = size, day
	if cut := s.f.Truncate(size); cut != nil {
		err = errors.Join(err, cut)
	}
	return 0, errors.Join(err, s.closeFile())
}

// linked finds out that the file was removed while it was written.
func (s *Sink) linked() error {
	info, err := s.f.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		return errors.New("the file was removed while it was written; it is made anew")
	}
	return nil
}

// ready opens the file, anew if it is not the one that has the name.
func (s *Sink) ready() error {
	if s.f != nil {
		named, err := os.Lstat(s.cfg.Path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		open, statErr := s.f.Stat()
		if statErr != nil {
			return errors.Join(statErr, s.closeFile())
		}
		if err == nil && os.SameFile(named, open) {
			s.size = open.Size() // somebody may have emptied it
			return nil
		}
		if err := s.closeFile(); err != nil {
			return err
		}
	}
	return s.open()
}

func (s *Sink) open() (err error) {
	// A pipe would make opening wait; a link would lead elsewhere.
	f, err := os.OpenFile(s.cfg.Path, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%s is a symbolic link; give the file that it leads to", s.cfg.Path)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", s.cfg.Path)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil { //nolint:gosec // a file descriptor
		return fmt.Errorf("lock %s, which another program has open: %w", s.cfg.Path, err)
	}
	if err := foreign(f, info); err != nil {
		return err
	}
	if s.size, s.day, err = mend(f, info); err != nil {
		return fmt.Errorf("mend the end of %s: %w", s.cfg.Path, err)
	}
	if info.Size() == 0 {
		if err := syncDir(filepath.Dir(s.cfg.Path)); err != nil {
			return err
		}
	}
	s.f = f
	s.tidier.wake()
	return nil
}

// foreign refuses to append to what is no file of events, such as a database
// whose name got into the settings.
func foreign(f *os.File, info fs.FileInfo) error {
	var first [1]byte
	if info.Size() == 0 {
		return nil
	}
	if _, err := f.ReadAt(first[:], 0); err != nil {
		return err
	}
	if first[0] != '{' && first[0] != 0 {
		return fmt.Errorf("%s has something else in it than events; give the name of a file that is not there yet", f.Name())
	}
	return nil
}

// maxTail bounds how far back the beginning of the last line is looked for, in
// bytes: more than an event has.
const maxTail = 1 << 20

// mend cuts off half an event at a file's end, and returns the file's size and
// the day of its last event.
func mend(f *os.File, info fs.FileInfo) (size int64, day int, err error) {
	size = info.Size()
	if size == 0 {
		return 0, 0, nil
	}
	tail := make([]byte, min(size, maxTail))
	if _, err := f.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return 0, 0, err
	}
	whole := bytes.LastIndexByte(tail, '\n') + 1
	if half := tail[whole:]; len(half) > 0 {
		if half[0] != '{' && half[0] != 0 || whole == 0 && int64(len(tail)) < size {
			// Not an event's beginning: somebody else wrote it, and it stays.
			n, err := f.Write([]byte("\n"))
			if err != nil {
				return 0, 0, err
			}
			return size + int64(n), store.Day(info.ModTime()), nil
		}
		size -= int64(len(half))
		if err := f.Truncate(size); err != nil {
			return 0, 0, err
		}
		if err := f.Sync(); err != nil {
			return 0, 0, err
		}
		tail = tail[:whole]
	}
	if size == 0 {
		return 0, 0, nil
	}
	last := tail[:max(len(tail)-1, 0)]
	last = last[bytes.LastIndexByte(last, '\n')+1:]
	var event struct {
		Time string `json:"eventTime"`
	}
	if json.Unmarshal(last, &event) == nil && len(event.Time) > 10 {
		if t, err := time.Parse(time.DateOnly, event.Time[:10]); err == nil {
			return size, store.Day(t), nil
		}
	}
	return size, store.Day(info.ModTime()), nil
}

// rotate gives the file its other name.
func (s *Sink) rotate() error {
	day := s.day
	if day == 0 {
		info, err := s.f.Stat()
		if err != nil {
			return err
		}
		day = store.Day(info.ModTime())
	}
	old, err := rotated(s.cfg.Path)
	if err != nil {
		return err
	}
	n := 1
	for _, r := range old {
		if r.day == day {
			n = max(n, r.n+1)
		}
	}
	// Closed first: the lock goes with it, and nobody else wants this file.
	if err := s.closeFile(); err != nil {
		return err
	}
	if err := os.Rename(s.cfg.Path, fmt.Sprintf("%s.%d-%d", s.cfg.Path, day, n)); err != nil {
		return err
	}
	s.size, s.day = 0, 0
	return syncDir(filepath.Dir(s.cfg.Path))
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}
