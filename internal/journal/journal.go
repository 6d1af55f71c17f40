// Package journal makes activity events durable before anybody sees what they
// record. Requests that arrive while one commit is under way share the next
// one. A full queue refuses; it never makes a caller wait without an end.
package journal

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
)

// Appender is the part of a store that the journal needs.
type Appender interface {
	Commit(ctx context.Context, b store.Batch) error
}

// Config are the journal's collaborators and limits.
type Config struct {
	Store Appender
	Queue int           // events that may wait; 0 means 4096
	Batch int           // events in one commit at most; 0 means 512
	Wait  time.Duration // bound on one Record; 0 means 10 s

	// Committed, when not nil, is called after each commit with the number of
	// events in it, how long it took, and its error.
	Committed func(events int, took time.Duration, err error)
}

// Journal appends events in groups.
type Journal struct {
	cfg   Config
	queue chan entry
	done  chan struct{}

	mu     sync.RWMutex // guards closed against senders
	closed bool
}

type entry struct {
	events []store.Event
	result chan<- error
}

// New starts a journal. Close ends it.
func New(cfg Config) *Journal {
	if cfg.Queue == 0 {
		cfg.Queue = 4096
	}
	if cfg.Batch == 0 {
		cfg.Batch = 512
	}
	if cfg.Wait == 0 {
		cfg.Wait = 10 * time.Second
	}
	j := &Journal{cfg: cfg, queue: make(chan entry, cfg.Queue), done: make(chan struct{})}
	go j.run()
	return j
}

// Record returns after the events are on stable storage. On any error the
// caller must give out nothing that the events were to record: the error is a
// fault of kind Unavailable, and the request may be tried again.
func (j *Journal) Record(ctx context.Context, events ...*activity.Event) error {
	encoded := make([]store.Event, len(events))
	for i, e := range events {
		var err error
		if encoded[i], err = store.NewEvent(e); err != nil {
			return fault.Of(err)
		}
	}
	result := make(chan error, 1)
	if err := j.enqueue(entry{encoded, result}); err != nil {
		return err
	}
	timeout := time.NewTimer(j.cfg.Wait)
	defer timeout.Stop()
	select {
	case err := <-result:
		if err != nil {
			return unavailable(fmt.Errorf("record the activity event: %w", err))
		}
		return nil
	case <-timeout.C:
		return unavailable(fmt.Errorf("the activity event was not durable within %s", j.cfg.Wait))
	case <-ctx.Done():
		return unavailable(fmt.Errorf("record the activity event: %w", ctx.Err()))
	}
}

func (j *Journal) enqueue(e entry) error {
	j.mu.RLock()
	defer j.mu.RUnlock()
	if j.closed {
		return unavailable(errors.New("the journal is closed"))
	}
	select {
	case j.queue <- e:
		return nil
	default:
		return unavailable(fmt.Errorf("the activity queue is full (%d requests wait)", j.cfg.Queue))
	}
}

func unavailable(cause error) error {
	var refused *store.RefusedError
	if errors.As(cause, &refused) {
		return refused.Fault()
	}
	e := fault.New(fault.Unavailable, "service_unavailable",
		"The activity log cannot take the event of this request, so the request was not carried out. Try again.").Because(cause)
	e.RetryAfter = time.Second
	return e
}

// Close refuses new events, writes those that wait, and returns when the last
// one is durable.
func (j *Journal) Close() {
	j.mu.Lock()
	if !j.closed {
		j.closed = true
		close(j.queue)
	}
	j.mu.Unlock()
	<-j.done
}

// linger is how long a commit waits for company. A commit costs several times
// what an event in it costs, so under load a shared one is worth the wait; a
// caller who is alone never waits.
const linger = time.Millisecond

func (j *Journal) run() {
	defer close(j.done)
	alone := true
	for first := range j.queue {
		group := j.gather(first, alone)
		alone = len(group) == 1 && len(j.queue) == 0
		n := 0
		for _, e := range group {
			n += len(e.events)
		}
		j.commit(group, n)
	}
}

// gather returns the entries of the next commit: the first one, those that
// wait already, and, unless the last caller was alone, those that come soon.
func (j *Journal) gather(first entry, alone bool) []entry {
	group := []entry{first}
	events := len(first.events)
	var soon <-chan time.Time
	if !alone {
		timer := time.NewTimer(linger)
		defer timer.Stop()
		soon = timer.C
	}
	for events < j.cfg.Batch {
		select {
		case e, ok := <-j.queue:
			if !ok {
				return group
			}
			group = append(group, e)
			events += len(e.events)
			continue
		default:
		}
		if soon == nil {
			return group
		}
		select {
		case e, ok := <-j.queue:
			if !ok {
				return group
			}
			group = append(group, e)
			events += len(e.events)
		case <-soon:
			return group
		}
	}
	return group
}

func (j *Journal) commit(group []entry, n int) {
	batch := store.Batch{Events: make([]store.Event, 0, n)}
	for _, e := range group {
		batch.Events = append(batch.Events, e.events...)
	}
	start := time.Now()
	err := j.cfg.Store.Commit(context.Background(), batch)
	if j.cfg.Committed != nil {
		j.cfg.Committed(n, time.Since(start), err)
	}
	for _, e := range group {
		e.result <- err
	}
}
