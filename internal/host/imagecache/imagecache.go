// Package imagecache keeps the image files that machines of a host boot from.
// It fetches a file once, however many machines ask for it, and hands out
// nothing whose checksum, size and content it has not verified. Where files
// come from is its Source's business; who may use an image, the server's.
package imagecache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"tabard.dev/tabard/internal/vpc"
)

// Source is where image files come from.
type Source interface {
	// Fetch writes the image's file to w. It must return when ctx ends.
	Fetch(ctx context.Context, image vpc.Image, w io.Writer) error
}

// Config are the cache's place and collaborators.
type Config struct {
	Dir    string // made when missing; nobody else writes there
	Source Source

	// Group may read the files besides their owner; negative is nobody.
	Group int

	// Room, when set, is asked before a file is fetched whether there is room
	// for this many bytes. They are those of all files that are being fetched.
	Room func(bytes int64) error

	// Inspect, when set, is asked about a file that is otherwise good, before
	// it is handed out.
	Inspect func(ctx context.Context, path, format string) error

	Log *slog.Logger // nil discards
}

// File is an image that is here and verified.
type File struct {
	Path    string
	Format  string // qcow2 or raw
	Virtual int64  // size of the disk, in bytes
}

// Cache is the images of one host. Its methods may be called from several
// goroutines.
type Cache struct {
	cfg Config

	mu       sync.Mutex
	flights  map[string]*flight
	held     map[string]int // users of a file between Get and release
	incoming int64          // bytes of the files that are being fetched
}

// flight is a file being fetched.
type flight struct {
	done    chan struct{}
	err     error
	cancel  context.CancelFunc
	waiters int
}

var digest = regexp.MustCompile(`^[0-9a-f]{64}$`)

// New returns the cache, after removing what an earlier one left unfinished.
func New(cfg Config) (*Cache, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the image cache: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(cfg.Dir, "*"+partial))
	if err != nil {
		return nil, fmt.Errorf("looking for unfinished images: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing an unfinished image: %w", err)
		}
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	return &Cache{cfg: cfg, flights: map[string]*flight{}, held: map[string]int{}}, nil
}

// partial ends the name of a file that is being written.
const partial = ".part"

// Get returns the image's file, which it fetches unless it is here. The file
// stays until release is called, whatever Prune is told.
func (c *Cache) Get(ctx context.Context, image vpc.Image) (file File, release func(), err error) {
	if err := usable(image); err != nil {
		return File{}, nil, err
	}
	drop := c.hold(image.SHA256)
	defer func() {
		if err != nil {
			drop()
		}
	}()
	file = File{Path: c.Path(image.SHA256), Format: image.Format}
	present, err := c.present(image)
	if err != nil {
		return File{}, nil, err
	}
	if !present {
		if err := c.join(ctx, image); err != nil {
			return File{}, nil, fmt.Errorf("fetching the image %s (%s): %w", image.Name, image.ID, err)
		}
	}
	// The format is the image's, not the file's: two images may have the same
	// bytes and call them differently.
	if file.Virtual, err = check(file.Path, image.Format); err != nil {
		return File{}, nil, fmt.Errorf("the image %s (%s) is refused: %w", image.Name, image.ID, err)
	}
	return file, drop, nil
}

// Path is where the file with this checksum is, or would be.
func (c *Cache) Path(sha256 string) string { return filepath.Join(c.cfg.Dir, sha256) }

func usable(image vpc.Image) error {
	switch {
	case image.Format == "" && image.SHA256 == "":
		return fmt.Errorf("the image %s (%s) is a stock image without a disk: use one that was registered with a file (tabard is image-create)", image.Name, image.ID)
	case image.Status != "" && image.Status != "available":
		return fmt.Errorf("the image %s (%s) is %s", image.Name, image.ID, image.Status)
	case !digest.MatchString(image.SHA256), image.Bytes <= 0:
		return fmt.Errorf("the image %s (%s) has no SHA-256 checksum or no size", image.Name, image.ID)
	}
	return nil
}

func (c *Cache) hold(sum string) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held[sum]++
	return sync.OnceFunc(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.held[sum]--; c.held[sum] == 0 {
			delete(c.held, sum)
		}
	})
}

// present tells whether the whole file is here. Only whole and verified files
// ever get this name; the size is looked at because it costs nothing.
func (c *Cache) present(image vpc.Image) (bool, error) {
	path := c.Path(image.SHA256)
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("looking for the image %s: %w", image.ID, err)
	case !info.Mode().IsRegular() || info.Size() != image.Bytes:
		return false, fmt.Errorf("the image file %s has %d bytes instead of %d: remove it, and it will be fetched again", path, info.Size(), image.Bytes)
	}
	return true, nil
}

// join waits for the file, which the first to come fetches for all. The fetch
// ends with the last who waits.
func (c *Cache) join(ctx context.Context, image vpc.Image) error {
	c.mu.Lock()
	f := c.flights[image.SHA256]
	if f == nil {
		own, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight{done: make(chan struct{}), cancel: cancel}
		c.flights[image.SHA256] = f
		go func() {
			defer close(f.done)
			f.err = c.fetch(own, image)
			cancel()
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.flights[image.SHA256] == f {
				delete(c.flights, image.SHA256)
			}
		}()
	}
	f.waiters++
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
	}
	c.mu.Lock()
	f.waiters--
	last := f.waiters == 0
	if last && c.flights[image.SHA256] == f {
		// Who comes now must not join what was given up.
		delete(c.flights, image.SHA256)
	}
	c.mu.Unlock()
	if last {
		f.cancel()
		<-f.done
	}
	return ctx.Err()
}

func (c *Cache) fetch(ctx context.Context, image vpc.Image) (err error) {
	enough, all := c.expect(image.Bytes)
	defer enough()
	if c.cfg.Room != nil {
		if err := c.cfg.Room(all); err != nil {
			return err
		}
	}
	// Not by the checksum alone: a fetch that was given up may still write.
	f, err := os.CreateTemp(c.cfg.Dir, image.SHA256+".*"+partial)
	if err != nil {
		return explain(err)
	}
	defer func() {
		f.Close()
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	w := &verifier{f: f, left: image.Bytes, sum: sha256.New()}
	if err := c.cfg.Source.Fetch(ctx, image, w); err != nil {
		return explain(err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if w.left > 0 {
		return fmt.Errorf("the file ended %d bytes early", w.left)
	}
	if got := hex.EncodeToString(w.sum.Sum(nil)); got != image.SHA256 {
		return fmt.Errorf("the file's SHA-256 is %s, not %s as registered: register the image anew", got, image.SHA256)
	}
	if _, err := Check(f, image.Bytes, image.Format); err != nil {
		return fmt.Errorf("the file is refused: %w", err)
	}
	if err := c.protect(f); err != nil {
		return err
	}
	if c.cfg.Inspect != nil {
		if err := c.cfg.Inspect(ctx, f.Name(), image.Format); err != nil {
			return fmt.Errorf("the file is refused: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return explain(err)
	}
	if err := os.Rename(f.Name(), c.Path(image.SHA256)); err != nil {
		return err
	}
	return syncDir(c.cfg.Dir)
}

// expect notes that a file of this size comes, until the returned function is
// called, and returns the size of all that do.
func (c *Cache) expect(bytes int64) (enough func(), all int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.incoming += bytes
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.incoming -= bytes
	}, c.incoming
}

// protect makes the file read-only.
func (c *Cache) protect(f *os.File) error {
	mode := os.FileMode(0o400)
	if c.cfg.Group >= 0 {
		if err := f.Chown(-1, c.cfg.Group); err != nil {
			return err
		}
		mode = 0o440
	}
	return f.Chmod(mode)
}

func check(path, format string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return Check(f, info.Size(), format)
}

func explain(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("%w: make room on the disk of the image cache, then start the instance again", err)
	}
	return err
}

// verifier writes no more than was promised, and sums it up.
type verifier struct {
	f    *os.File
	left int64
	sum  hash.Hash
}

func (v *verifier) Write(p []byte) (int, error) {
	if int64(len(p)) > v.left {
		return 0, errors.New("the file is longer than registered")
	}
	n, err := v.f.Write(p)
	v.left -= int64(n)
	_, _ = v.sum.Write(p[:n]) // a hash takes all
	return n, err
}

// Prune removes the files that nobody holds and whose checksums keep does not
// want, and returns their checksums. Nobody gets hold of a file while keep is
// asked about it; keep must not call the cache.
func (c *Cache) Prune(keep func(sha256 string) bool) ([]string, error) {
	entries, err := os.ReadDir(c.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing the image cache: %w", err)
	}
	var gone []string
	for _, e := range entries {
		sum := e.Name()
		if strings.HasSuffix(sum, partial) || !digest.MatchString(sum) {
			continue
		}
		removed, err := c.drop(sum, keep)
		if err != nil {
			return gone, fmt.Errorf("removing the unused image %s: %w", sum, err)
		}
		if removed {
			c.cfg.Log.Info("removed an image that no machine uses", "sha256", sum)
			gone = append(gone, sum)
		}
	}
	return gone, nil
}

func (c *Cache) drop(sum string, keep func(string) bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// In this order: who has let go of it has written down before that he
	// needs it.
	if c.held[sum] > 0 || keep(sum) {
		return false, nil
	}
	err := os.Remove(c.Path(sum))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
