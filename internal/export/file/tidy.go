package file

import (
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// old is a file that was rotated.
type old struct {
	path   string
	day, n int
	packed bool
}

const (
	packedEnd = ".gz"
	draftEnd  = ".gz.part" // being compressed
)

// rotated returns the files that were rotated from a path, oldest first. What
// looks different is somebody else's.
func rotated(path string) ([]old, error) {
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	var out []old
	for _, f := range files {
		end, ok := strings.CutPrefix(f.Name(), filepath.Base(path)+".")
		if !ok || !f.Type().IsRegular() {
			continue
		}
		name, packed := strings.CutSuffix(end, packedEnd)
		day, n, ok := strings.Cut(name, "-")
		d, err1 := strconv.Atoi(day)
		i, err2 := strconv.Atoi(n)
		if !ok || err1 != nil || err2 != nil || len(day) != 8 || i < 1 || strconv.Itoa(i) != n {
			continue
		}
		out = append(out, old{path: filepath.Join(filepath.Dir(path), f.Name()), day: d, n: i, packed: packed})
	}
	slices.SortFunc(out, func(a, b old) int {
		return cmp.Or(cmp.Compare(a.day, b.day), cmp.Compare(a.n, b.n), cmp.Compare(a.path, b.path))
	})
	return out, nil
}

// tidier compresses rotated files and removes the oldest, beside the writing.
type tidier struct {
	cfg    Config
	due    chan struct{}
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu  sync.Mutex
	err error // of the last time, until it is told
}

func newTidier(cfg Config) *tidier {
	t := &tidier{cfg: cfg, due: make(chan struct{}, 1)}
	if cfg.Keep == 0 && !cfg.Gzip {
		return t
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel = cancel
	t.done.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-t.due:
			}
			err := t.tidy(ctx)
			t.mu.Lock()
			t.err = err
			t.mu.Unlock()
		}
	})
	return t
}

// wake has rotated files looked at.
func (t *tidier) wake() {
	select {
	case t.due <- struct{}{}:
	default:
	}
}

// complaint returns once what went wrong.
func (t *tidier) complaint() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.err
	t.err = nil
	return err
}

// close gives up what is under way; the next tidier begins it again.
func (t *tidier) close() {
	if t.cancel != nil {
		t.cancel()
	}
	t.done.Wait()
}

func (t *tidier) tidy(ctx context.Context) error {
	files, err := rotated(t.cfg.Path)
	if err != nil {
		return fmt.Errorf("list the rotated files: %w", err)
	}
	var errs []error
	// Of a file that is there compressed, too, a crash has left the other one.
	files = slices.DeleteFunc(files, func(f old) bool {
		if f.packed || !slices.ContainsFunc(files, func(g old) bool { return g.path == f.path+packedEnd }) {
			return false
		}
		errs = append(errs, os.Remove(f.path))
		return true
	})
	if t.cfg.Keep > 0 && len(files) > t.cfg.Keep {
		for _, f := range files[:len(files)-t.cfg.Keep] {
			if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove a rotated file: %w", err))
			}
		}
		files = files[len(files)-t.cfg.Keep:]
	}
	for _, f := range files {
		if !t.cfg.Gzip || f.packed || ctx.Err() != nil {
			continue
		}
		if err := pack(ctx, f.path); err != nil && ctx.Err() == nil {
			errs = append(errs, fmt.Errorf("compress %s: %w", f.path, err))
		}
	}
	return errors.Join(errs...)
}

// pack compresses a file. The compressed one gets its name when it is whole and
// durable; then the other one goes.
func pack(ctx context.Context, path string) (err error) {
	in, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	draft := path + draftEnd
	if err := os.Remove(draft); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	z := gzip.NewWriter(out)
	_, err = io.Copy(z, stopper{ctx, in})
	if err := errors.Join(err, z.Close(), out.Sync(), out.Close()); err != nil {
		return errors.Join(err, os.Remove(draft))
	}
	if err := os.Rename(draft, path+packedEnd); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// stopper is a reader that ends with its context.
type stopper struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	r   io.Reader
}

func (s stopper) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	return s.r.Read(p)
}
