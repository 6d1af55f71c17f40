package storetest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

var midnight = time.Date(2026, 7, 2, 0, 0, 0, 0, time.UTC)

// logged commits batches of events whose documents are numbered in the order of
// the log. Each number says how far from midnight an event was.
func logged(t *testing.T, s store.Store, first int, batches ...[]time.Duration) {
	t.Helper()
	for _, batch := range batches {
		var b store.Batch
		for _, after := range batch {
			b.Events = append(b.Events, store.Event{
				Time: midnight.Add(after), AccountID: "a", Action: "x", Outcome: "success", Severity: "normal",
				Initiator: "i", Authn: "n", Target: "t", Changed: "c", Doc: fmt.Appendf(nil, `{"n":%d}`, first),
			})
			first++
		}
		if err := s.Commit(context.Background(), b); err != nil {
			t.Fatal(err)
		}
	}
}

func numbers(t *testing.T, s store.Store, from int64, limit int) []string {
	t.Helper()
	entries, err := s.Entries(context.Background(), from, limit)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, e := range entries {
		if e.Day != store.Day(e.Time) {
			t.Errorf("event %d of day %d has time %s", e.Index, e.Day, e.Time)
		}
		out = append(out, fmt.Sprintf("%d %s", e.Index, e.Doc))
	}
	return out
}

func wantNumbers(t *testing.T, got []string, indexes ...int) {
	t.Helper()
	want := []string{}
	for _, n := range indexes {
		want = append(want, fmt.Sprintf(`%d {"n":%d}`, n, n))
	}
	if !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
}

// holdsTree checks that the stored hashes are those of a tree over documents
// with the numbers from 0 on, and that proofs can be made from an index on.
func holdsTree(t *testing.T, s store.Store, first, size int64) {
	t.Helper()
	var edge merkle.Edge
	for n := range size {
		edge.Append(nil, fmt.Appendf(nil, `{"n":%d}`, n))
	}
	root, err := tlog.TreeHash(size, s)
	if err != nil || root != edge.Root() {
		t.Fatalf("the root of %d events is %v (%v), want %v", size, root, err, edge.Root())
	}
	for n := first; n < size; n++ {
		proof, err := tlog.ProveRecord(size, n, s)
		if err != nil {
			t.Fatalf("no proof of event %d: %v", n, err)
		}
		if err := tlog.CheckRecord(proof, size, root, n, tlog.RecordHash(fmt.Appendf(nil, `{"n":%d}`, n))); err != nil {
			t.Errorf("event %d: %v", n, err)
		}
	}
}

func logIsASequence(t *testing.T, open Open) {
	s := open(t)
	if e, err := s.Extent(context.Background()); err != nil || e.First != 0 || e.Size != 0 {
		t.Fatalf("extent %+v, %v", e, err)
	}
	// Around midnight the days come by turns.
	logged(t, s, 0, []time.Duration{-3, -2}, []time.Duration{1, -1}, []time.Duration{2}, []time.Duration{-1, 3, -1})
	wantNumbers(t, numbers(t, s, 0, 100), 0, 1, 2, 3, 4, 5, 6, 7)
	wantNumbers(t, numbers(t, s, 3, 3), 3, 4, 5)
	wantNumbers(t, numbers(t, s, 8, 3))
	holdsTree(t, s, 0, 8)
	entries, err := s.Entries(context.Background(), 2, 1)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	if e := entries[0]; !e.Time.Equal(midnight.Add(1)) || e.AccountID != "a" || e.Action != "x" || e.Severity != "normal" ||
		e.Initiator != "i" || e.Authn != "n" || e.Target != "t" || e.Changed != "c" {
		t.Errorf("entry %+v", e)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t)
	logged(t, s, 8, []time.Duration{time.Hour})
	wantNumbers(t, numbers(t, s, 6, 9), 6, 7, 8)
	holdsTree(t, s, 0, 9)
	if e, err := s.Extent(context.Background()); err != nil || e.First != 0 || e.Size != 9 || e.Bytes <= 0 {
		t.Errorf("extent %+v, %v", e, err)
	}
}

func logOfAFailedBatch(t *testing.T, open Open) {
	s := open(t)
	logged(t, s, 0, []time.Duration{1})
	err := s.Commit(context.Background(), store.Batch{
		Deletes: []store.Delete{{Kind: "k", ID: "absent", Expect: 1}},
		Events:  []store.Event{{Time: midnight, Doc: []byte(`{"never":true}`)}},
	})
	if err == nil {
		t.Fatal("the batch was committed")
	}
	logged(t, s, 1, []time.Duration{1, 1})
	wantNumbers(t, numbers(t, s, 0, 9), 0, 1, 2)
	holdsTree(t, s, 0, 3)
}

func logGrows(t *testing.T, open Open) {
	s := open(t)
	before := s.Grown()
	if err := s.Commit(context.Background(), store.Batch{Puts: []store.Put{{Record: store.Record{Kind: "k", ID: "a", Revision: 1, Doc: []byte("{}")}}}}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-before:
		t.Error("a commit without events is no growth")
	default:
	}
	logged(t, s, 0, []time.Duration{1})
	<-before
	after := s.Grown()
	select {
	case <-after:
		t.Error("nothing has come since")
	default:
	}
}

func logDropsADay(t *testing.T, open Open) {
	s := open(t)
	logged(t, s, 0, []time.Duration{-3, -2}, []time.Duration{1, -1}, []time.Duration{2}, []time.Duration{-1, 3, 4, 5, 6})
	record := store.Event{Time: midnight.Add(time.Minute), Action: "drop", Doc: []byte(`{"n":10}`)}
	if err := s.DropDay(context.Background(), 20260701, store.Batch{Events: []store.Event{record}}); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		wantNumbers(t, numbers(t, s, 0, 100), 2, 4, 6, 7, 8, 9, 10)
		holdsTree(t, s, 2, 11)
		dropped, err := s.Dropped(context.Background())
		if err != nil || len(dropped) != 1 {
			t.Fatal(dropped, err)
		}
		if d := dropped[0]; d.Day != 20260701 || d.First != 0 || d.Last != 5 || d.Events != 4 || d.Left != 2 || !slices.Equal(d.Holes, []int64{3, 5}) || d.At.IsZero() {
			t.Errorf("dropped %+v", d)
		}
		if e, err := s.Extent(context.Background()); err != nil || e.First != 2 || e.Size != 11 {
			t.Errorf("extent %+v, %v", e, err)
		}
	}
	check()
	if err := s.DropDay(context.Background(), 20260701, store.Batch{}); err == nil {
		t.Error("a day that is gone was dropped again")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t)
	check()
	// The last day goes too; the log goes on where it was.
	if err := s.DropDay(context.Background(), 20260702, store.Batch{}); err != nil {
		t.Fatal(err)
	}
	logged(t, s, 11, []time.Duration{24 * time.Hour, 25 * time.Hour})
	wantNumbers(t, numbers(t, s, 0, 100), 11, 12)
	holdsTree(t, s, 11, 13)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t)
	logged(t, s, 13, []time.Duration{26 * time.Hour})
	holdsTree(t, s, 11, 14)
	days, err := s.Days(context.Background())
	if err != nil || len(days) != 1 || days[0] != (store.DayInfo{Day: 20260703, First: 11, Last: 13, Events: 3}) {
		t.Errorf("days %+v, %v", days, err)
	}
}

func logKeepsCheckpoints(t *testing.T, open Open) {
	s := open(t)
	ctx := context.Background()
	for n := range int64(3) {
		c := store.Checkpoint{Size: n + 1, Time: midnight.Add(time.Duration(n)), Note: fmt.Appendf(nil, "note %d", n)}
		if err := s.KeepCheckpoint(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Checkpoints(ctx, 2, 100, 10)
	if err != nil || len(got) != 2 || got[0].Size != 3 || string(got[1].Note) != "note 1" || !got[1].Time.Equal(midnight.Add(1)) {
		t.Errorf("checkpoints %+v, %v", got, err)
	}
	if got, err = s.Checkpoints(ctx, 0, 100, 1); err != nil || len(got) != 1 || got[0].Size != 3 {
		t.Errorf("the newest is %+v, %v", got, err)
	}
	if got, err = s.Checkpoints(ctx, 0, 2, 10); err != nil || len(got) != 2 || got[0].Size != 2 {
		t.Errorf("those of at most 2 events are %+v, %v", got, err)
	}
}

func logThinsCheckpointsOut(t *testing.T, open Open) {
	s := open(t)
	ctx := context.Background()
	for n := range int64(6) { // at midnight, and each half hour after
		c := store.Checkpoint{Size: n + 1, Time: midnight.Add(time.Duration(n) * 30 * time.Minute), Note: []byte("note")}
		if err := s.KeepCheckpoint(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ThinCheckpoints(ctx, midnight.Add(2*time.Hour), time.Hour); err != nil {
		t.Fatal(err)
	}
	got, err := s.Checkpoints(ctx, 0, 100, 100)
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int64
	for _, c := range got {
		sizes = append(sizes, c.Size)
	}
	if !slices.Equal(sizes, []int64{6, 5, 4, 2}) {
		t.Errorf("kept %v", sizes)
	}
}
