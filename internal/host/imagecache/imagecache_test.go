package imagecache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/vpc"
)

// source hands out one file.
type source struct {
	content []byte
	err     error // after the content
	fetches atomic.Int32
	started chan struct{}   // closed by the first fetch, when not nil
	gate    <-chan struct{} // waited for, when not nil
	once    sync.Once
}

func (s *source) Fetch(ctx context.Context, _ vpc.Image, w io.Writer) error {
	s.fetches.Add(1)
	if s.started != nil {
		s.once.Do(func() { close(s.started) })
	}
	if s.gate != nil {
		select {
		case <-s.gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for chunk := s.content; len(chunk) > 0; {
		n, err := w.Write(chunk[:min(len(chunk), 64<<10)])
		if err != nil {
			return err
		}
		chunk = chunk[n:]
	}
	return s.err
}

func image(content []byte) vpc.Image {
	sum := sha256.Sum256(content)
	return vpc.Image{
		ID: "r006-1", Name: "disk", Format: Raw, Bytes: int64(len(content)), SHA256: hex.EncodeToString(sum[:]),
	}
}

func newCache(t *testing.T, s Source) *Cache {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	c, err := New(Config{Dir: filepath.Join(t.TempDir(), "images"), Source: s, Group: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func files(t *testing.T, c *Cache) []string {
	t.Helper()
	entries, err := os.ReadDir(c.cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestAnImageIsFetchedOnceAndKept(t *testing.T) {
	s := &source{content: []byte("a disk of some kind")}
	c := newCache(t, s)
	for range 2 {
		f, release, err := c.Get(t.Context(), image(s.content))
		if err != nil {
			t.Fatal(err)
		}
		release()
		got, err := os.ReadFile(f.Path)
		if err != nil || !bytes.Equal(got, s.content) || f.Virtual != 512 || f.Format != Raw {
			t.Errorf("got %+v, %q, %v", f, got, err)
		}
	}
	if n := s.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
}

func TestManyWhoAskAtOnceShareOneFetch(t *testing.T) {
	gate := make(chan struct{})
	s := &source{content: []byte("x"), gate: gate, started: make(chan struct{})}
	c := newCache(t, s)
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for n := range errs {
		wg.Go(func() {
			_, release, err := c.Get(t.Context(), image(s.content))
			if errs[n] = err; err == nil {
				release()
			}
		})
	}
	<-s.started
	close(gate)
	wg.Wait()
	if err := errors.Join(errs...); err != nil || s.fetches.Load() != 1 {
		t.Errorf("%d fetches, %v", s.fetches.Load(), err)
	}
}

func TestAFetchThatNobodyWaitsForEnds(t *testing.T) {
	s := &source{content: []byte("x"), gate: make(chan struct{}), started: make(chan struct{})}
	c := newCache(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-s.started; cancel() }()
	if _, _, err := c.Get(ctx, image(s.content)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if left := files(t, c); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestOneWhoGivesUpDoesNotSpoilItForOthers(t *testing.T) {
	gate := make(chan struct{})
	s := &source{content: []byte("x"), gate: gate, started: make(chan struct{})}
	c := newCache(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	var first, second error
	var wg sync.WaitGroup
	wg.Go(func() { _, _, first = c.Get(ctx, image(s.content)) })
	<-s.started
	wg.Go(func() { _, _, second = c.Get(t.Context(), image(s.content)) })
	for waiting := 0; waiting < 2; {
		c.mu.Lock()
		waiting = c.flights[image(s.content).SHA256].waiters
		c.mu.Unlock()
	}
	cancel()
	for waiting := 2; waiting > 1; {
		c.mu.Lock()
		waiting = c.flights[image(s.content).SHA256].waiters
		c.mu.Unlock()
	}
	close(gate)
	wg.Wait()
	if !errors.Is(first, context.Canceled) || second != nil {
		t.Errorf("got %v and %v", first, second)
	}
}

func TestAFileThatIsNotTheRegisteredOneIsRefused(t *testing.T) {
	content := []byte("the real image")
	for name, c := range map[string]struct {
		source *source
		want   string
	}{
		"other bytes": {&source{content: []byte("the evil image")}, "SHA-256"},
		"too short":   {&source{content: content[:5]}, "early"},
		"too long":    {&source{content: append(bytes.Clone(content), 'x')}, "longer"},
		"cut off":     {&source{content: content, err: io.ErrUnexpectedEOF}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			cache := newCache(t, c.source)
			_, _, err := cache.Get(t.Context(), image(content))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
			if left := files(t, cache); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestAnImageWithoutADiskIsRefused(t *testing.T) {
	c := newCache(t, &source{})
	for name, spoil := range map[string]func(*vpc.Image){
		"stock":       func(i *vpc.Image) { *i = vpc.Image{ID: "r006-stock", Name: "stock"} },
		"pending":     func(i *vpc.Image) { i.Status = "pending" },
		"no checksum": func(i *vpc.Image) { i.SHA256 = "../../../etc/shadow" },
		"no size":     func(i *vpc.Image) { i.Bytes = 0 },
	} {
		i := image([]byte("x"))
		spoil(&i)
		if _, _, err := c.Get(t.Context(), i); err == nil {
			t.Errorf("%s: handed out", name)
		}
	}
}

func TestAnImageOfAnUnknownFormatIsRefused(t *testing.T) {
	s := &source{content: []byte("x")}
	i := image(s.content)
	i.Format = "vmdk"
	if _, _, err := newCache(t, s).Get(t.Context(), i); err == nil {
		t.Error("handed out")
	}
}

func TestRawBytesAreNoQCOW2ForASecondImage(t *testing.T) {
	s := &source{content: []byte("x")}
	c := newCache(t, s)
	raw := image(s.content)
	if _, release, err := c.Get(t.Context(), raw); err != nil {
		t.Fatal(err)
	} else {
		release()
	}
	raw.Format = QCOW2
	if _, _, err := c.Get(t.Context(), raw); err == nil {
		t.Error("handed out as qcow2")
	}
}

func TestAnImageThatInspectionRefusesIsNotKept(t *testing.T) {
	s := &source{content: []byte("x")}
	c := newCache(t, s)
	c.cfg.Inspect = func(_ context.Context, path, format string) error { return errors.New("smells") }
	if _, _, err := c.Get(t.Context(), image(s.content)); err == nil || !strings.Contains(err.Error(), "smells") {
		t.Errorf("got %v", err)
	}
	if left := files(t, c); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestNothingIsFetchedWithoutRoomForAllThatIsOnItsWay(t *testing.T) {
	gate := make(chan struct{})
	first := &source{content: make([]byte, 600), gate: gate, started: make(chan struct{})}
	c := newCache(t, first)
	full := errors.New("no room")
	c.cfg.Room = func(bytes int64) error {
		if bytes > 1000 {
			return full
		}
		return nil
	}
	var fetching sync.WaitGroup
	fetching.Go(func() {
		if _, release, err := c.Get(t.Context(), image(first.content)); err != nil {
			t.Error(err)
		} else {
			release()
		}
	})
	<-first.started
	second := image(make([]byte, 500))
	if _, _, err := c.Get(t.Context(), second); !errors.Is(err, full) || first.fetches.Load() != 1 {
		t.Errorf("got %v after %d fetches", err, first.fetches.Load())
	}
	close(gate)
	fetching.Wait()
	first.content = make([]byte, 500)
	if _, release, err := c.Get(t.Context(), second); err != nil {
		t.Errorf("when the first is here: %v", err)
	} else {
		release()
	}
}

func TestOnlyUnusedImagesArePruned(t *testing.T) {
	s := &source{content: []byte("x")}
	c := newCache(t, s)
	i := image(s.content)
	_, release, err := c.Get(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	none := func(string) bool { return false }
	if gone, err := c.Prune(none); err != nil || len(gone) > 0 {
		t.Errorf("one that is held: %v, %v", gone, err)
	}
	release()
	if gone, err := c.Prune(func(sum string) bool { return sum == i.SHA256 }); err != nil || len(gone) > 0 {
		t.Errorf("one that is wanted: %v, %v", gone, err)
	}
	if gone, err := c.Prune(none); err != nil || len(gone) != 1 || len(files(t, c)) > 0 {
		t.Errorf("one that nobody wants: %v, %v", gone, err)
	}
}

func TestUnfinishedFilesGoAtTheStart(t *testing.T) {
	c := newCache(t, &source{})
	if err := os.WriteFile(c.Path(strings.Repeat("0", 64))+".1"+partial, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if left := files(t, c); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
