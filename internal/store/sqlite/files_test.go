package sqlite_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
	"tabard.dev/tabard/internal/store/sqlite"
)

func add(s *sqlite.Store, n int) error {
	e := store.Event{Time: day(1), AccountID: "a", CorrelationID: fmt.Sprint("c", n), Action: "x.y.create", Outcome: "success", Doc: fmt.Appendf(nil, `{"n":%d}`, n)}
	return s.Commit(context.Background(), store.Batch{
		Puts:   []store.Put{{Record: store.Record{Kind: "k", ID: fmt.Sprint(n), Revision: 1, Doc: []byte("{}")}}},
		Events: []store.Event{e},
	})
}

func mustAdd(t *testing.T, s *sqlite.Store, from, to int) {
	t.Helper()
	for n := from; n < to; n++ {
		if err := add(s, n); err != nil {
			t.Fatalf("event %d: %v", n, err)
		}
	}
}

// wantWhole checks that exactly so many events are there, and the tree over them.
func wantWhole(t *testing.T, s *sqlite.Store, n int64) {
	t.Helper()
	ctx := context.Background()
	entries, err := s.Entries(ctx, 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	extent, err := s.Extent(ctx)
	if err != nil || int64(len(entries)) != n || extent.Size != n {
		t.Fatalf("%d events in a tree of %d, want %d; %v", len(entries), extent.Size, n, err)
	}
	var edge merkle.Edge
	for _, e := range entries {
		edge.Append(nil, e.Doc)
	}
	if is, err := merkle.Read(n, s); err != nil || is.Root() != edge.Root() {
		t.Fatalf("the tree is not that of the events: %v", err)
	}
}

func wantLost(t *testing.T, err error, damaged bool) {
	t.Helper()
	var lost *store.LostError
	if !errors.As(err, &lost) || lost.Damaged != damaged {
		t.Fatalf("got %v, want a file to be lost (damaged: %v)", err, damaged)
	}
}

var mishaps = map[string]func(file string) error{
	"the main file is removed":          os.Remove,
	"the write-ahead log is removed":    func(f string) error { return os.Remove(f + "-wal") },
	"the shared memory is removed":      func(f string) error { return os.Remove(f + "-shm") },
	"all files are removed":             func(f string) error { return errors.Join(os.Remove(f), os.Remove(f+"-wal"), os.Remove(f+"-shm")) },
	"the main file is renamed":          func(f string) error { return os.Rename(f, f+".away") },
	"the main file is replaced":         func(f string) error { return replace(f, "something else") },
	"the write-ahead log is replaced":   func(f string) error { return replace(f+"-wal", "something else") },
	"an older copy is put in its place": func(f string) error { return replaceByCopy(f) },
	"an older log is put in its place":  func(f string) error { return replaceByCopy(f + "-wal") },
}

func replace(file, by string) error {
	return errors.Join(os.WriteFile(file+".new", []byte(by), 0o600), os.Rename(file+".new", file))
}

func replaceByCopy(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return replace(file, string(b[:len(b)/4096*4096]))
}

// What is removed under a running server is noticed by the next commit, which
// fails, and can be put back while readers go on.
func TestAFileThatIsRemovedIsNoticedAndPutBack(t *testing.T) {
	for what, mishap := range mishaps {
		t.Run(what, func(t *testing.T) {
			ctx := context.Background()
			file := filepath.Join(t.TempDir(), "tabard.db")
			s := open(t, file)
			mustAdd(t, s, 0, 50)
			if err := s.CheckFiles(); err != nil {
				t.Fatal(err)
			}
			if err := mishap(file); err != nil {
				t.Fatal(err)
			}
			wantLost(t, s.CheckFiles(), false)
			if !strings.Contains(what, "shared memory") { // it has no events
				for range 3 {
					wantLost(t, add(s, 50), false)
				}
			}
			if _, err := s.Events(ctx, store.Query{AccountID: "a", Limit: 10}); err != nil {
				t.Errorf("events are not read any more: %v", err)
			}
			done, err := s.Restore(ctx)
			if err != nil || done.Found == "" {
				t.Fatalf("restored %+v, %v", done, err)
			}
			if strings.Contains(what, "place") && len(done.Aside) != 1 {
				t.Errorf("set aside %q", done.Aside)
			}
			for _, f := range done.Aside {
				if info, err := os.Stat(f); err != nil || info.Size() == 0 {
					t.Errorf("what was set aside is not there: %v", err)
				}
			}
			if err := s.CheckFiles(); err != nil {
				t.Fatal(err)
			}
			wantWhole(t, s, 50)
			mustAdd(t, s, 50, 60)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the file has mode %v, %v", info.Mode(), err)
			}
			s = open(t, file)
			defer s.Close()
			wantWhole(t, s, 60)
			n := 0
			if err := s.Load(ctx, func(store.Record) error { n++; return nil }); err != nil || n != 60 {
				t.Errorf("%d objects, %v", n, err)
			}
		})
	}
}

func TestAFileIsPutBackWhileItIsReadAndWritten(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	file := filepath.Join(t.TempDir(), "tabard.db")
	s := open(t, file)
	mustAdd(t, s, 0, 200)
	var others sync.WaitGroup
	for range 6 {
		others.Go(func() {
			for ctx.Err() == nil {
				entries, err := s.Entries(ctx, 0, 1000)
				if ctx.Err() == nil && (err != nil || len(entries) < 200) {
					t.Errorf("%d events, %v", len(entries), err)
					return
				}
			}
		})
	}
	acknowledged := map[string]bool{}
	n := 200
	for round := range 6 {
		removed := make(chan error, 1)
		go func() { removed <- os.Remove(file) }() // at some moment of the commits
		for {
			err := add(s, n)
			if err == nil {
				acknowledged[fmt.Sprintf(`{"n":%d}`, n)] = true
				n++
				continue
			}
			wantLost(t, err, false)
			n++ // whether it was committed is not known
			break
		}
		if err := <-removed; err != nil {
			t.Fatal(err)
		}
		if _, err := s.Restore(ctx); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	cancel()
	others.Wait()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, file)
	defer s.Close()
	entries, err := s.Entries(context.Background(), 0, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		delete(acknowledged, string(e.Doc))
	}
	if len(acknowledged) > 0 {
		t.Errorf("%d events were acknowledged and are not there", len(acknowledged))
	}
	wantWhole(t, s, int64(len(entries)))
}

func TestAFileThatIsCutOrOverwrittenIsNoticedAndNotWrittenOver(t *testing.T) {
	for what, mishap := range map[string]func(file string) error{
		"the main file is emptied":           func(f string) error { return os.Truncate(f, 0) },
		"the main file is cut":               func(f string) error { return os.Truncate(f, 8192) },
		"the write-ahead log is emptied":     func(f string) error { return os.Truncate(f+"-wal", 0) },
		"the write-ahead log is cut":         func(f string) error { return os.Truncate(f+"-wal", 4096) },
		"the main file is overwritten":       func(f string) error { return overwrite(f) },
		"the write-ahead log is overwritten": func(f string) error { return overwrite(f + "-wal") },
	} {
		t.Run(what, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "tabard.db")
			s := open(t, file)
			mustAdd(t, s, 0, 20)
			if err := s.Close(); err != nil { // what there is comes into the main file
				t.Fatal(err)
			}
			s = open(t, file)
			defer s.Close()
			mustAdd(t, s, 20, 50)
			if err := mishap(file); err != nil {
				t.Fatal(err)
			}
			size := func() (n int64) {
				for _, f := range []string{file, file + "-wal"} {
					info, err := os.Stat(f)
					if err != nil {
						t.Fatal(err)
					}
					n += info.Size()
				}
				return n
			}
			before := size()
			for range 3 {
				wantLost(t, add(s, 50), true)
			}
			_, err := s.Restore(context.Background())
			wantLost(t, err, true)
			if after := size(); after != before {
				t.Errorf("the files had %d bytes and have %d", before, after)
			}
		})
	}
}

func overwrite(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.Repeat("x", 100_000))
	return errors.Join(err, f.Close())
}

// Killed while it puts a file back, a server finds the copy when it is whole,
// and says so when it is not, instead of beginning anew.
func TestARestoreThatWasInterruptedIsFinishedOrTold(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "tabard.db")
	s := open(t, file)
	mustAdd(t, s, 0, 20)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file, file+".restored"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+"-wal", []byte("of the file that was removed"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, file)
	wantWhole(t, s, 20)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+".restored", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.Open(context.Background(), file); err == nil || !strings.Contains(err.Error(), "the one that does not count") {
		t.Errorf("two files: %v", err)
	}
	if err := errors.Join(os.Remove(file+".restored"), os.Rename(file, file+".restoring")); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.Open(context.Background(), file); err == nil || !strings.Contains(err.Error(), "put a backup there") {
		t.Errorf("half a copy: %v", err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a new file was made")
	}
}

// A day is dropped in slices: it is gone at once, and whenever the program ends
// between two of them the rest is freed later.
func TestADropThatWasInterruptedGoesOn(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	s := open(t, file)
	events := make([]store.Event, 500)
	for range 20 {
		for i := range events {
			events[i] = store.Event{Time: day(1), CorrelationID: fmt.Sprint(time.Now().UnixNano(), i), Doc: []byte(strings.Repeat("x", 500))}
		}
		if err := s.Commit(ctx, store.Batch{Events: events}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Commit(ctx, store.Batch{Events: []store.Event{{Time: day(2), Doc: []byte("{}")}}}); err != nil {
		t.Fatal(err)
	}
	before, err := s.Extent(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = s.DropDay(&ended{Context: ctx, after: 4}, store.Day(day(1)), store.Batch{Events: []store.Event{{Time: day(2), Doc: []byte(`{}`)}}})
	for rounds := 0; err != nil; rounds++ {
		if !errors.Is(err, context.Canceled) || rounds > 20 {
			t.Fatal(rounds, err)
		}
		if days, err := s.Days(ctx); err != nil || len(days) != 1 {
			t.Fatalf("days %v, %v", days, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if rounds == 0 && tables(t, file, "gone_*") != 1 {
			t.Error("the drop was not interrupted")
		}
		s = open(t, file)
		err = s.Reclaim(&ended{Context: ctx, after: 3})
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if n := tables(t, file, "gone_*"); n != 0 {
		t.Errorf("%d tables are left", n)
	}
	after, err := s.Extent(ctx)
	if err != nil || after.Bytes-after.Free > (before.Bytes-before.Free)/10 {
		t.Errorf("used %d bytes and uses %d, %v", before.Bytes-before.Free, after.Bytes-after.Free, err)
	}
	if err := s.Shrink(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := s.CheckFiles(); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(file); err != nil || info.Size() > before.Bytes/10 {
		t.Errorf("the file had %d bytes and has %d, %v", before.Bytes, info.Size(), err)
	}
	mustAdd(t, s, 0, 10)
}

func tables(t *testing.T, file, pattern string) (n int) {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow("SELECT count(*) FROM sqlite_master WHERE name GLOB ?", pattern).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// ended is a context that ends after it was looked at some times.
type ended struct {
	context.Context
	after int
}

func (e *ended) Err() error {
	if e.after--; e.after < 0 {
		return context.Canceled
	}
	return nil
}
