package sqlite_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/store/storetest"
)

// filled returns a store with a mix of events, and the events. What the index
// has of them is the test's affair.
func filled(t testing.TB, file string, blocks float64) (*sqlite.Store, []store.Event) {
	t.Helper()
	s, err := sqlite.Open(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	s.StopIndexer()
	events := storetest.Mix(int(blocks*sqlite.BlockSize), 7)
	for part := range slices.Chunk(events, 3000) {
		if err := s.Commit(context.Background(), store.Batch{Events: part}); err != nil {
			t.Fatal(err)
		}
	}
	return s, events
}

// Whatever part of the log is in the index, the answers are the same.
func TestTheIndexFindsWhatAScanFinds(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	whole, events := filled(t, file, 2.1)
	stages := []*sqlite.Store{whole}
	stage := func(low, high int, script string) {
		t.Helper()
		other := filepath.Join(t.TempDir(), "tabard.db")
		execute(t, file, "VACUUM INTO '"+other+"'")
		if script != "" {
			execute(t, other, script)
		}
		if got := extent(t, other); got != fmt.Sprint(low, " ", high) {
			t.Fatalf("the index has %s, want %d %d", got, low, high)
		}
		s, err := sqlite.OpenReadOnly(ctx, other)
		if err != nil {
			t.Fatal(err)
		}
		stages = append(stages, s)
	}
	if err := whole.IndexOne(ctx); err != nil {
		t.Fatal(err)
	}
	stage(0, 1, "")
	if err := whole.IndexAll(ctx); err != nil {
		t.Fatal(err)
	}
	stage(1, 2, "UPDATE indexed SET low = 1, high = 2")
	execute(t, file, "DELETE FROM indexed; INSERT INTO indexed VALUES (1, 1, 1)")
	if err := whole.IndexAll(ctx); err != nil { // from the middle
		t.Fatal(err)
	}
	if got := extent(t, file); got != "0 2" {
		t.Fatalf("the index has %s", got)
	}
	rapid.Check(t, func(t *rapid.T) {
		storetest.AgreeWithAScan(t, rapid.SampledFrom(stages).Draw(t, "what is in the index"), events)
	})
	for _, s := range stages {
		if err := s.CheckIndex(ctx); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func extent(t *testing.T, file string) string {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var low, high int
	if err := db.QueryRow("SELECT low, high FROM indexed").Scan(&low, &high); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(low, " ", high)
}

func TestAFileOfVersion3GetsAnIndexBesideItsWork(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	s, events := filled(t, file, 1.2)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	execute(t, file, "DROP TABLE indexed; UPDATE schema_version SET version = 3")
	failures := store.Query{AllAccounts: true, Outcome: "failure", Limit: len(events)}
	want := 0
	for _, e := range events {
		if failures.Matches(&e) {
			want++
		}
	}
	for _, open := range []func(context.Context, string) (*sqlite.Store, error){sqlite.OpenReadOnly, sqlite.Open, sqlite.Open, sqlite.OpenReadOnly} {
		s, err := open(ctx, file)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.Events(ctx, failures); err != nil || len(got) != want {
			t.Errorf("%d events, want %d, %v", len(got), want, err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, file)
	if err := s.IndexAll(ctx); err != nil { // what the store does by itself may be under way
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if got := extent(t, file); got != "0 1" {
		t.Errorf("the index has %s", got)
	}
}

// A search looks at a bounded number of events, and its pages have all of them
// in the end.
func TestASearchThatFindsNothingComesBack(t *testing.T) {
	ctx := context.Background()
	s, events := filled(t, filepath.Join(t.TempDir(), "tabard.db"), 2.5)
	defer func() { _ = s.Close() }()
	s.LookAt(5000)
	rare := events[10]
	for _, q := range []store.Query{
		{AccountID: rare.AccountID, Target: "nothing has this", Limit: 100},
		{AccountID: "nobody", CorrelationID: "shared", Limit: 100},
	} {
		pages := 0
		for {
			found, err := s.Search(ctx, q)
			if err != nil || len(found.Events) > 0 {
				t.Fatal(found, err)
			}
			if pages++; found.Next.IsZero() {
				break
			}
			q.Before = found.Next
		}
		if q.Target != "" && (pages < 2 || pages > 4) {
			t.Errorf("%d pages", pages)
		}
		if err := s.IndexAll(ctx); err != nil {
			t.Fatal(err)
		}
		q.Before = store.Position{}
		if found, err := s.Search(ctx, q); q.Target != "" && (err != nil || !found.Next.IsZero()) {
			t.Errorf("with an index: %+v, %v", found, err)
		}
	}
}

func TestADayThatIsDroppedTakesItsIndexAlong(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	s, events := filled(t, file, 1.1)
	defer func() { _ = s.Close() }()
	gone := store.Day(events[0].Time)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.IndexAll(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := s.DropDay(ctx, gone, store.Batch{}); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if err := s.IndexAll(ctx); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var tables int
	if err := db.QueryRow("SELECT count(*) FROM sqlite_master WHERE name LIKE ?", fmt.Sprintf("%%_%d", gone)).Scan(&tables); err != nil || tables != 0 {
		t.Errorf("%d tables of the day are left, %v", tables, err)
	}
	want := 0
	for _, e := range events {
		if store.Day(e.Time) != gone && e.Outcome == "failure" {
			want++
		}
	}
	got, err := s.Events(ctx, store.Query{AllAccounts: true, Outcome: "failure", Limit: len(events)})
	if err != nil || len(got) != want {
		t.Errorf("%d events, want %d, %v", len(got), want, err)
	}
}

// What a search reads it reads as it was at one moment.
func TestNothingIsMissedWhileTheIndexGrows(t *testing.T) {
	ctx := context.Background()
	s := open(t, filepath.Join(t.TempDir(), "tabard.db"))
	defer func() { _ = s.Close() }()
	const each = 700
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for n := range 8 {
			var b store.Batch
			for i := range each {
				e := store.Event{Time: time.Unix(1_800_000_000+int64(n), 0), AccountID: "a", Outcome: "success", Doc: []byte("{}")}
				if i == 0 {
					e.Outcome = "failure"
				}
				b.Events = append(b.Events, e)
			}
			if err := s.Commit(ctx, b); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		before, err := s.Extent(ctx)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Events(ctx, store.Query{AccountID: "a", Outcome: "failure", Limit: 1000})
		if err != nil {
			t.Fatal(err)
		}
		if int64(len(got)) < before.Size/each {
			t.Fatalf("%d events of %d", len(got), before.Size/each)
		}
		for i, e := range got {
			if want := int64(len(got)-1-i)*each + 1; e.Position.Seq != want {
				t.Fatalf("event %d has number %d, want %d", i, e.Position.Seq, want)
			}
		}
	}
	wg.Wait()
}

// An index that somebody changed may hide events, but breaks nothing.
func TestAnIndexThatWasChangedIsAnErrorAndNoMore(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	s, events := filled(t, file, 1.05)
	defer func() { _ = s.Close() }()
	if err := s.IndexAll(ctx); err != nil {
		t.Fatal(err)
	}
	day := store.Day(events[len(events)/2].Time)
	if err := s.CheckIndex(ctx); err != nil {
		t.Fatal(err)
	}
	for _, hide := range []string{
		"UPDATE terms_%[1]d SET events = x'00' WHERE term = (SELECT max(term) FROM terms_%[1]d)",
		"DELETE FROM terms_%d WHERE substr(term, 1, 1) = x'6f'", "INSERT INTO terms_%d VALUES ('x', 0, x'000001')", "DROP TABLE terms_%d",
	} {
		other := filepath.Join(t.TempDir(), "copy.db")
		execute(t, file, "VACUUM INTO '"+other+"'")
		execute(t, other, fmt.Sprintf(hide, day))
		changed, err := sqlite.OpenReadOnly(ctx, other)
		if err != nil {
			t.Fatal(err)
		}
		var wrong *sqlite.IndexError
		if err := changed.CheckIndex(ctx); !errors.As(err, &wrong) || wrong.Day != day {
			t.Errorf("%s: %v", hide, err)
		}
		if err := changed.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, b := range []string{"x''", "x'00'", "x'09'", "x'0000'", "x'00ffff'", "x'02ff'", "'text'", "zeroblob(513)", "zeroblob(529)"} {
		execute(t, file, fmt.Sprintf("UPDATE terms_%d SET events = %s", day, b))
		q := store.Query{AccountID: "account0", Outcome: "failure", ActionPrefix: "s", Limit: 10}
		found, err := s.Search(ctx, q)
		for _, e := range found.Events {
			if e.Position.Day == day && len(e.Doc) == 0 {
				t.Errorf("%s: found %+v, %v", b, e, err)
			}
		}
		if _, _, err := s.Follow(ctx, q, 0, 10); err != nil {
			continue
		}
	}
}

// What a commit of 512 events costs while the index follows, beside what it
// costs without.
func BenchmarkAppend(b *testing.B) {
	for _, indexing := range []bool{false, true} {
		b.Run(fmt.Sprintf("indexing=%v", indexing), func(b *testing.B) {
			ctx := context.Background()
			s, err := sqlite.Open(ctx, filepath.Join(b.TempDir(), "tabard.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			if !indexing {
				s.StopIndexer()
			}
			events := storetest.Mix(8*512, 3)
			doc := make([]byte, 1200)
			for i := range doc {
				doc[i] = 'x'
			}
			for i := range events {
				events[i].Doc = doc
				events[i].CorrelationID = fmt.Sprintf("%032x", i*7919)
				events[i].Target = events[i].Target[:min(len(events[i].Target), 8)]
			}
			n, before := 0, processorTime(b)
			for b.Loop() {
				at := n % 8 * 512
				if err := s.Commit(ctx, store.Batch{Events: events[at : at+512]}); err != nil {
					b.Fatal(err)
				}
				n++
			}
			if indexing {
				if err := s.IndexAll(ctx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(n*512), "CPU-µs/event")
		})
	}
}

// processorTime depends little on what else the machine does.
func processorTime(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
