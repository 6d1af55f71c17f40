package metadata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
)

// log is a journal that can be full.
type log struct {
	full   bool
	events int
}

func (l *log) Record(_ context.Context, events ...*activity.Event) error {
	if l.full {
		return errors.New("full")
	}
	l.events += len(events)
	return nil
}

func TestReadsWaitForTheirRecordOnlyWhenTooManyWait(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	j := &log{full: true}
	a := newReads(Config{Journal: j, Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler)})
	read := func(n int) error {
		return a.note(t.Context(), fmt.Sprintf("i%d", n), &activity.Event{Action: "is.metadata.instance.read", Time: activity.Time{Time: now}})
	}
	for n := range maxPending {
		if err := read(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := read(maxPending); err == nil {
		t.Error("a read that nobody can record is answered")
	}
	j.full = false
	if err := read(maxPending); err != nil || j.events != 1 {
		t.Errorf("%d events, %v", j.events, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.run(ctx)
	if j.events != maxPending+1 || len(a.open)+len(a.pending) != 0 {
		t.Errorf("%d events are written; %d windows and %d events are left", j.events, len(a.open), len(a.pending))
	}
}

func TestAWindowThatIsOverLeavesNothingBehind(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	j := &log{}
	a := newReads(Config{Journal: j, Now: func() time.Time { return now }, Log: slog.New(slog.DiscardHandler)})
	read := func() {
		if err := a.note(t.Context(), "i", &activity.Event{Action: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	read()
	a.sweep(false)
	if len(a.open) != 1 {
		t.Error("a window was closed before its end")
	}
	now = now.Add(readWindow)
	a.sweep(false)
	if len(a.open) != 0 || len(a.pending) != 1 {
		t.Errorf("%d windows, %d events", len(a.open), len(a.pending))
	}
	// A clock that is set back does not make the next minute a long one.
	read()
	now = now.Add(-time.Hour)
	read()
	if len(a.pending) != 3 {
		t.Errorf("%d events", len(a.pending))
	}
}
