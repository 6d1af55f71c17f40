package export

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/store"
)

// How long a route waits after a failure, in which the target may have a say.
const (
	firstPause  = 500 * time.Millisecond
	longPause   = 30 * time.Second
	longestSaid = 10 * time.Minute // that a target can ask for
)

// When a failure is told to the operator's log. What fails now and then is not,
// and no failure is told so often that its own events would keep it busy.
const (
	tellAfter = 10 * time.Second
	tellAgain = 10 * time.Minute
)

// runner is one route under way.
type runner struct {
	Route
	m    *Manager
	feed *feed
	sink Sink

	attempts int // that failed in a row

	mu     sync.Mutex
	next   int64 // everything before it has been delivered, or was not meant for the route
	saved  int64 // the same, on stable storage
	placed bool
	counts counts
	fault  failure
}

// counts are since the server's start.
type counts struct {
	delivered, skipped, lost, failures int64
	last                               time.Time // when something was taken
}

// failure is what is wrong with a route. Zero times mean that nothing is.
type failure struct {
	since, at, retry time.Time
	text             string
	told             bool // this one stands in the operator's log
	toldAt           time.Time
}

// run delivers until the context ends.
func (r *runner) run(ctx context.Context) {
	defer func() {
		if r.sink == nil {
			return
		}
		if err := r.sink.Close(); err != nil {
			r.m.cfg.Log.Debug("close the target of a route", "route", r.Name, "error", clean(err))
		}
	}()
	for _, begin := range []func(context.Context) error{r.place, r.open} {
		if !r.insist(ctx, begin) {
			return
		}
	}
	for {
		grown := r.m.cfg.Store.Grown()
		var entries []store.Entry
		if !r.insist(ctx, func(ctx context.Context) (err error) {
			entries, err = r.feed.read(ctx, r.next, r.Batch.Events)
			return err
		}) {
			return
		}
		if len(entries) == 0 && !r.idle(ctx, grown) || len(entries) > 0 && !r.deliver(ctx, entries) {
			return
		}
	}
}

// place finds where the route goes on.
func (r *runner) place(ctx context.Context) error {
	next, err := r.m.place(ctx, r.Route)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next, r.saved, r.placed = next, next, true
	return nil
}

func (r *runner) open(context.Context) (err error) {
	r.sink, err = r.Open()
	return err
}

// idle waits for the log to grow, and a little longer, so that what happens at
// the same time goes together. It reports whether the route goes on.
func (r *runner) idle(ctx context.Context, grown <-chan struct{}) bool {
	var broken <-chan struct{}
	if w, ok := r.sink.(Watcher); ok {
		broken = w.Broken()
	}
	select {
	case <-ctx.Done():
		return false
	case <-broken:
		return r.insist(ctx, func(ctx context.Context) error {
			_, err := r.attempt(ctx, nil)
			if r.back(ctx, err) {
				return nil
			}
			return err
		})
	case <-grown:
		return pause(ctx, r.Batch.Wait)
	}
}

// pause reports whether the context lasted longer.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// deliver sends those of the entries that the route is for, and moves on. It
// reports whether the route goes on.
func (r *runner) deliver(ctx context.Context, entries []store.Entry) bool {
	var batch []store.Entry
	bytes := 0
	r.miss(ctx, entries)
	for i := range entries {
		e := &entries[i]
		if !r.Match.Takes(&e.Event) {
			r.mu.Lock()
			r.counts.skipped++
			r.mu.Unlock()
			continue
		}
		if len(batch) > 0 && bytes+len(e.Doc) > r.Batch.Bytes {
			if ok, on := r.send(ctx, batch); !ok {
				return on
			}
			batch, bytes = nil, 0
		}
		batch, bytes = append(batch, *e), bytes+len(e.Doc)
	}
	if len(batch) > 0 {
		if ok, on := r.send(ctx, batch); !ok {
			return on
		}
	}
	r.move(entries[len(entries)-1].Index + 1)
	return true
}

// miss records that events were removed before the route came to them. Around
// midnight two days take turns in the log, so that there can be many gaps.
func (r *runner) miss(ctx context.Context, entries []store.Entry) {
	expected := r.next
	var g gap
	for i := range entries {
		if n := entries[i].Index - expected; n > 0 {
			if g.events == 0 {
				g.first = expected
			}
			g.last, g.events = entries[i].Index-1, g.events+n
		}
		expected = max(expected, entries[i].Index+1)
	}
	if g.events == 0 {
		return
	}
	r.mu.Lock()
	r.counts.lost += g.events
	r.mu.Unlock()
	r.m.tellLoss(ctx, r, g)
}

// gap is how many events are missing between two positions, both included.
type gap struct{ first, last, events int64 }

func (r *runner) move(next int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next = next
}

// send delivers a batch for as long as it takes. When not all of it was taken,
// on tells whether the route goes on, somewhere else; it does not when the
// context has ended.
func (r *runner) send(ctx context.Context, batch []store.Entry) (ok, on bool) {
	gone := false
	r.move(batch[0].Index)
	defer func() {
		if gone && ctx.Err() == nil { // a target that loses what it takes is not well
			on = pause(ctx, r.failed(ctx, errLost))
		}
	}()
	for len(batch) > 0 {
		if !r.insist(ctx, func(ctx context.Context) error {
			taken, err := r.attempt(ctx, batch)
			taken = min(max(taken, 0), len(batch))
			if taken > 0 {
				r.took(taken, batch[taken-1].Index+1)
				batch = batch[taken:]
			}
			switch {
			case r.back(ctx, err):
				gone = true
				r.attempts++
				return errLost
			case len(batch) == 0 && err != nil:
				r.m.cfg.Log.Warn("a route delivered, and its target has a complaint", "route", r.Name, "error", clean(err))
				return nil
			case len(batch) > 0 && taken == 0 && err == nil:
				return errors.New("the target took nothing and did not say why")
			}
			return err
		}) {
			return false, false
		}
		if gone {
			return false, true
		}
	}
	return true, true
}

// errLost is what a route says of a target that may have lost what it took.
var errLost = errors.New("the connection ended, and the target may have lost what it took; it is sent again")

// back goes back to what the target may have lost, if that is the error. It is
// written down at once: a server that is killed before everything is sent again
// must not go on behind it.
func (r *runner) back(ctx context.Context, err error) bool {
	var l Loss
	if ctx.Err() != nil || !errors.As(err, &l) || l.LostFrom() >= r.next {
		return false // a connection that this side ends has lost nothing
	}
	r.m.cfg.Log.Warn("a route's target may have lost what it took; it is sent again", "route", r.Name, "target", r.Target,
		"from", l.LostFrom(), "to", r.next-1, "error", clean(err))
	r.move(l.LostFrom())
	if err := r.m.save(ctx, []*runner{r}); err != nil && ctx.Err() == nil {
		r.m.cfg.Log.Warn("where a route went back to was not stored; it is tried again", "route", r.Name, "error", err)
	}
	return true
}

func (r *runner) took(n int, next int64) {
	r.attempts = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next = next
	r.counts.delivered += int64(n)
	r.counts.last = r.m.cfg.Now()
}

// attempt calls the sink once. A sink that panics must not take the server with
// it.
func (r *runner) attempt(ctx context.Context, batch []store.Entry) (taken int, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			r.m.cfg.Log.Error("a route's target panicked", "route", r.Name, "panic", p, "stack", string(debug.Stack()))
			taken, err = 0, errors.New("an internal error; see the server's log")
		}
	}()
	taken, err = r.sink.Deliver(ctx, batch)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("no answer within %s: %w", r.Timeout, err)
	}
	return taken, err
}

// insist repeats f until it succeeds, with pauses that grow. It reports false
// when the context ended first.
func (r *runner) insist(ctx context.Context, f func(context.Context) error) bool {
	for {
		err := f(ctx)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			r.recovered(ctx)
			return true
		}
		if errors.Is(err, errLost) {
			return true
		}
		r.attempts++
		if !pause(ctx, r.failed(ctx, err)) {
			return false
		}
	}
}

// failed notes a failed attempt and returns how long to wait for the next one.
func (r *runner) failed(ctx context.Context, err error) time.Duration {
	wait := min(firstPause<<min(r.attempts-1, 10), longPause)
	wait = wait/2 + rand.N(wait/2)
	var p Patient
	if errors.As(err, &p) {
		wait = max(wait, min(p.RetryAfter(), longestSaid))
	}
	now, text := r.m.cfg.Now(), clean(err)
	r.mu.Lock()
	r.counts.failures++
	first := r.fault.since.IsZero()
	if first {
		r.fault.since = now
	}
	changed := first || r.fault.text != text
	r.fault.at, r.fault.retry, r.fault.text = now, now.Add(wait), text
	tell := !r.fault.told && now.Sub(r.fault.since) >= tellAfter && (r.fault.toldAt.IsZero() || now.Sub(r.fault.toldAt) >= tellAgain)
	if tell {
		r.fault.told, r.fault.toldAt = true, now
	}
	since := r.fault.since
	r.mu.Unlock()
	if changed {
		r.m.cfg.Log.Warn("a route of the activity log does not deliver; it is tried again", "route", r.Name, "target", r.Target, "error", text)
	}
	if tell {
		r.m.tellFailure(ctx, r, since, text)
	}
	return wait
}

func (r *runner) recovered(ctx context.Context) {
	r.attempts = 0
	r.mu.Lock()
	was := r.fault
	r.fault = failure{toldAt: was.toldAt}
	r.mu.Unlock()
	if was.since.IsZero() {
		return
	}
	r.m.cfg.Log.Info("a route of the activity log delivers again", "route", r.Name, "target", r.Target)
	if was.told {
		r.m.tellRecovery(ctx, r, was.since)
	}
}

// maxError bounds what is kept of an error, in bytes: part of it comes from the
// target.
const maxError = 512

// clean returns an error's text as one line that is fit to be shown.
func clean(err error) string {
	s := strings.ToValidUTF8(err.Error(), "?")
	if len(s) > maxError {
		s = strings.ToValidUTF8(s[:maxError], "") + "…"
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f || c >= 0x80 && c < 0xa0 || c == '\u2028' || c == '\u2029' {
			return ' '
		}
		return c
	}, s)
}
