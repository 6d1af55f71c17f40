package binding

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// Bounds on the waits between attempts at one binding.
const (
	firstRetry = 500 * time.Millisecond
	longRetry  = time.Minute
)

// queue holds the bindings that are to be looked at. A key is handed to one
// worker at a time; what is added meanwhile is handed out once more afterwards.
type queue struct {
	mu      sync.Mutex
	ready   []key
	entries map[key]*entry
	more    chan struct{} // has a token while ready is not empty
	closed  bool
}

type entry struct {
	queued, running, again bool
	failures               int
	timer                  *time.Timer // of the next turn
}

func newQueue() *queue {
	return &queue{entries: map[key]*entry{}, more: make(chan struct{}, 1)}
}

func (q *queue) entry(k key) *entry {
	e := q.entries[k]
	if e == nil {
		e = &entry{}
		q.entries[k] = e
	}
	return e
}

// Add gives a key a turn as soon as a worker is free.
func (q *queue) Add(k key) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.add(k)
}

func (q *queue) add(k key) {
	if q.closed {
		return
	}
	e := q.entry(k)
	switch {
	case e.running:
		e.again = true
	case !e.queued:
		e.queued = true
		q.ready = append(q.ready, k)
		q.signal()
	}
}

func (q *queue) signal() {
	select {
	case q.more <- struct{}{}:
	default:
	}
}

// Get waits for a key. It returns false once the context has ended. Whoever got
// one calls Done, Retry or Forget.
func (q *queue) Get(ctx context.Context) (key, bool) {
	for {
		select {
		case <-ctx.Done():
			return key{}, false
		case <-q.more:
		}
		if ctx.Err() != nil {
			q.signal() // somebody else may wait with another context
			return key{}, false
		}
		q.mu.Lock()
		if len(q.ready) == 0 {
			q.mu.Unlock()
			continue
		}
		k := q.ready[0]
		q.ready = q.ready[1:]
		if len(q.ready) > 0 {
			q.signal()
		}
		e := q.entries[k]
		e.queued, e.running = false, true
		q.mu.Unlock()
		return k, true
	}
}

// Done ends a turn that went well; the key has its next one after about the
// given time, or at once if it was added meanwhile.
func (q *queue) Done(k key, next time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.entry(k)
	e.failures = 0
	q.end(k, e, jitter(next))
}

// Retry ends a turn that failed; the next one is after a wait that grows with
// each failure, and not before atLeast.
func (q *queue) Retry(k key, atLeast time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.entry(k)
	wait := longRetry
	if e.failures < 7 {
		wait = min(firstRetry<<e.failures, longRetry)
		e.failures++
	}
	q.end(k, e, jitter(max(wait, min(atLeast, longRetry))))
}

// Failures returns how many turns of a key have failed since the last one that
// went well.
func (q *queue) Failures(k key) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e := q.entries[k]; e != nil {
		return e.failures
	}
	return 0
}

// Forget ends the turn of a key that is no more.
func (q *queue) Forget(k key) {
	q.mu.Lock()
	defer q.mu.Unlock()
	e := q.entry(k)
	e.running = false
	if e.timer != nil {
		e.timer.Stop()
	}
	again := e.again
	delete(q.entries, k)
	if again {
		q.add(k)
	}
}

func (q *queue) end(k key, e *entry, next time.Duration) {
	e.running = false
	if q.closed {
		return
	}
	if e.again {
		e.again = false
		q.add(k)
	}
	if e.timer != nil {
		e.timer.Stop()
	}
	e.timer = time.AfterFunc(next, func() { q.Add(k) })
}

// Close stops the later turns. Nothing is handed out that was not before.
func (q *queue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, e := range q.entries {
		if e.timer != nil {
			e.timer.Stop()
		}
	}
}

// jitter returns a wait of 80 to 120 per cent, so that what began together does
// not go on together.
func jitter(d time.Duration) time.Duration {
	return d*4/5 + time.Duration(rand.Int64N(int64(d)*2/5+1))
}
