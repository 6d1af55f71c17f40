package sqlite_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/store"
)

// How long a commit waits while a day is dropped. DROP_EVENTS says how many
// events the day has: a million is what the documentation's figures are of.
func TestCommitsGoOnWhileADayIsDropped(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv("DROP_EVENTS"))
	if err != nil {
		n = 5000
	}
	ctx := context.Background()
	s := open(t, filepath.Join(t.TempDir(), "tabard.db"))
	defer s.Close()
	doc := []byte(`{"x":"` + strings.Repeat("x", 1200) + `"}`)
	events := make([]store.Event, 500)
	for at := 0; at < n; at += len(events) {
		for i := range events {
			events[i] = store.Event{Time: day(1), AccountID: "a", CorrelationID: fmt.Sprintf("%x", uint64(at+i)*0x9e3779b97f4a7c15), Action: "a.b.c", Outcome: "success", Initiator: "i", Target: "t", Doc: doc}
		}
		if err := s.Commit(ctx, store.Batch{Events: events}); err != nil {
			t.Fatal(err)
		}
	}
	mustAdd(t, s, 0, 1)
	dropped := make(chan error, 1)
	began := time.Now()
	go func() {
		err := s.DropDay(ctx, store.Day(day(1)), store.Batch{Events: []store.Event{{Time: day(2), Doc: []byte("{}")}}})
		if err == nil {
			t.Logf("dropped in %v", time.Since(began))
			err = s.Shrink(ctx, 0)
		}
		dropped <- err
	}()
	var longest, when time.Duration
	commits := 0
	for done := false; !done; commits++ {
		select {
		case err := <-dropped:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		default:
		}
		e := store.Event{Time: day(3), Doc: fmt.Appendf(nil, `{"n":%d}`, commits)}
		start := time.Now()
		if err := s.Commit(ctx, store.Batch{Events: []store.Event{e}}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > longest {
			longest, when = took, time.Since(began)
		}
	}
	t.Logf("a day of %d events: dropped and given back in %v; meanwhile %d commits, the longest took %v, after %v", n, time.Since(began), commits, longest, when)
	if commits < 5 {
		t.Errorf("%d commits went on meanwhile", commits)
	}
}
