package metadata

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
)

// readWindow is how long the reads of one instance with one action share a
// record.
const readWindow = time.Minute

// Bounds on what waits to be recorded.
const (
	maxPending = 4096
	maxBatch   = 256
	lastWrite  = 5 * time.Second // for what is left when the service ends
)

// reads records successful metadata reads without making them wait for the
// disk: programs poll metadata, and a record of each poll would bury the ones
// that matter. The first read of an instance with an action has an event; those
// that follow within a minute are counted, and their number has one more event
// when the minute is over. So no more than two events a minute come of an action
// of an instance, and every read is in one of them. A crash loses the events of
// the last minute at most. Refusals, tokens and certificates do not come here.
type reads struct {
	journal Recorder
	now     func() time.Time
	log     *slog.Logger
	wake    chan struct{}

	mu      sync.Mutex
	open    map[readKey]*window
	pending []*activity.Event
}

type readKey struct{ instance, action string }

// window is a minute in which reads are counted.
type window struct {
	first activity.Event // the event of its first read
	ends  time.Time
	more  int // reads after the first
	last  time.Time
}

func newReads(cfg Config) *reads {
	return &reads{
		journal: cfg.Journal, now: cfg.Now, log: cfg.Log,
		wake: make(chan struct{}, 1), open: map[readKey]*window{},
	}
}

// note takes the event of a read. Only when too many wait already, because the
// journal does not take them, is the read made to wait for its own record.
func (a *reads) note(ctx context.Context, instance string, e *activity.Event) error {
	if a.count(readKey{instance, e.Action}, e) {
		return nil
	}
	return durable(ctx, a.journal, e)
}

func (a *reads) count(key readKey, e *activity.Event) bool {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if w := a.open[key]; w != nil {
		// A clock that was set back must not hold a window open.
		if now.Before(w.ends) && w.ends.Sub(now) <= readWindow {
			w.more++
			w.last = now
			return true
		}
		a.close(key, w)
	}
	if len(a.pending) >= maxPending {
		return false
	}
	a.open[key] = &window{first: *e, ends: now.Add(readWindow)}
	a.pending = append(a.pending, e)
	select {
	case a.wake <- struct{}{}:
	default:
	}
	return true
}

// close ends a window; the reads after its first have their event then.
func (a *reads) close(key readKey, w *window) {
	delete(a.open, key)
	if w.more == 0 {
		return
	}
	e := w.first
	e.ID, e.CorrelationID, e.Time = uuid.NewString(), "", activity.Time{Time: w.last}
	e.Message += fmt.Sprintf(" (%d more times)", w.more)
	data, err := json.Marshal(struct {
		Reads int       `json:"reads"`
		Since time.Time `json:"since"`
		Until time.Time `json:"until"`
	}{w.more, w.first.Time.UTC(), w.last.UTC()})
	if err == nil {
		e.ResponseData = data
	}
	a.pending = append(a.pending, &e)
}

// run writes what is pending until the context ends, and then the rest.
func (a *reads) run(ctx context.Context) {
	tick := time.NewTicker(readWindow / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			a.sweep(true)
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWrite)
			defer cancel()
			a.write(last)
			return
		case <-a.wake:
		case <-tick.C:
			a.sweep(false)
		}
		a.write(ctx)
	}
}

// sweep closes the windows that are over, or all.
func (a *reads) sweep(all bool) {
	now := a.now()
	a.mu.Lock()
	defer a.mu.Unlock()
	for key, w := range a.open {
		if all || !now.Before(w.ends) {
			a.close(key, w)
		}
	}
}

// write records what is pending. What the journal does not take stays for the
// next time.
func (a *reads) write(ctx context.Context) {
	for {
		a.mu.Lock()
		batch := a.pending[:min(len(a.pending), maxBatch)]
		a.mu.Unlock()
		if len(batch) == 0 {
			return
		}
		if err := a.journal.Record(ctx, batch...); err != nil {
			if ctx.Err() == nil {
				a.log.Warn("recording metadata reads; will try again", "error", err)
			}
			return
		}
		a.mu.Lock()
		a.pending = append([]*activity.Event(nil), a.pending[len(batch):]...)
		a.mu.Unlock()
	}
}
