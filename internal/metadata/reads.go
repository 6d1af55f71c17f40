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

// reads records metadata reads without a record of each: programs poll metadata,
// a guest can be refused as often as it asks, and a record of every time would
// bury the ones that matter and fill the disk that all accounts share.
//
// The first read of an instance with an action, and the first refusal of one for
// a reason, has an event; those that follow within a minute are counted, and
// their number has one more event when the minute is over. So no more than two
// events a minute come of an action of an instance, and two of each reason for
// which it is refused; and every read is in one of them. Successful reads do not
// wait for the disk, so a crash loses the events of their last minute at most.
// The first refusal waits for its record. Tokens and certificates do not come
// here.
type reads struct {
	journal Recorder
	now     func() time.Time
	log     *slog.Logger
	wake    chan struct{}

	mu      sync.Mutex
	open    map[readKey]*window
	pending []*activity.Event
}

// readKey is what reads that share a record have in common. refused is the check
// that did not hold, of which there are few whatever a guest sends; "" means that
// all did.
type readKey struct{ instance, action, refused string }

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

// note takes the event of a successful read. Only when too many wait already,
// because the journal does not take them, is the read made to wait for its own
// record.
func (a *reads) note(ctx context.Context, instance string, e *activity.Event) error {
	key := readKey{instance: instance, action: e.Action}
	a.mu.Lock()
	if a.count(key) {
		a.mu.Unlock()
		return nil
	}
	if len(a.pending) >= maxPending {
		a.mu.Unlock()
		return durable(ctx, a.journal, e)
	}
	a.begin(key, e)
	a.pending = append(a.pending, e)
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
	return nil
}

// refuse takes the event of a refused read, which is durable when it returns
// unless it is counted to another one. An error means that it is neither.
func (a *reads) refuse(ctx context.Context, instance string, e *activity.Event) error {
	key := readKey{instance, e.Action, "unnamed"}
	if check, ok := e.Trace.Failed(); ok {
		key.refused = check.Name
	}
	a.mu.Lock()
	if a.count(key) {
		a.mu.Unlock()
		return nil
	}
	w := a.begin(key, e)
	a.mu.Unlock()
	err := durable(ctx, a.journal, e)
	if err == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.open[key] == w { // the next one is to try again; what was counted meanwhile stays
		a.close(key, w)
	}
	return err
}

// count counts a read to an open window, if there is one. The caller holds the
// lock.
func (a *reads) count(key readKey) bool {
	w := a.open[key]
	if w == nil {
		return false
	}
	now := a.now()
	// A clock that was set back must not hold a window open.
	if now.Before(w.ends) && w.ends.Sub(now) <= readWindow {
		w.more++
		w.last = now
		return true
	}
	a.close(key, w)
	return false
}

// begin opens a window with its first read. The caller holds the lock.
func (a *reads) begin(key readKey, e *activity.Event) *window {
	w := &window{first: *e, ends: a.now().Add(readWindow)}
	a.open[key] = w
	return w
}

// close ends a window; the reads after its first have their event then. The
// caller holds the lock.
func (a *reads) close(key readKey, w *window) {
	delete(a.open, key)
	if w.more == 0 {
		return
	}
	e := w.first
	e.ID, e.CorrelationID, e.Time = uuid.NewString(), "", activity.Time{Time: w.last}
	e.Message += fmt.Sprintf(" (%d more times)", w.more)
	// Which request was the first leads to its event.
	data, err := json.Marshal(struct {
		Reads int       `json:"reads"`
		Since time.Time `json:"since"`
		Until time.Time `json:"until"`
		After string    `json:"after,omitempty"`
	}{w.more, w.first.Time.UTC(), w.last.UTC(), w.first.CorrelationID})
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
