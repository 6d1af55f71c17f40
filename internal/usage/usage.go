// Package usage counts how often, and remembers when last, an identity or an
// API key was used to log in and a policy allowed something: as a whole, and
// which action to whom on what. The counts are kept in memory and written every
// few seconds. Logins are counted from their events: what a crash took away is
// counted again from the activity log. Only of two logins of one identity that
// overlapped the last write, one may be missed. Permits leave no event of their
// own, so a crash loses those of the last few seconds. What follows from the
// counts for a policy is said by access.Recommend.
package usage

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
)

// Log is the activity log as it is read at the start.
type Log interface {
	Events(ctx context.Context, q store.Query) ([]store.StoredEvent, error)
}

// Config are the tracker's collaborators.
type Config struct {
	Directory *directory.Directory
	Log       *slog.Logger
	Every     time.Duration // between two writes; 0 means 5 s
	Now       func() time.Time
}

// Tracker holds the counts. Its methods may be called from any goroutine; a
// nil Tracker counts nothing.
type Tracker struct {
	cfg    Config
	mu     sync.Mutex
	counts map[string]*counter
	dirty  map[string]struct{} // ids whose counts are not written yet
	mark   time.Time           // the latest login counted
	uses   *uses
	began  time.Time // since when uses are counted
}

type counter struct {
	count int64
	last  time.Time
	found time.Time // last as Open found it: logins up to here are in the count
}

// overlap is how long a login may take to be counted after it began. The log
// is read again from so long before the mark.
const overlap = time.Minute

// markID is the id of the record whose time says up to where logins are in the
// records.
const markID = "log"

// Open reads the counts, and from the log the logins that are not in them.
func Open(ctx context.Context, cfg Config, log Log) (*Tracker, error) {
	if cfg.Every == 0 {
		cfg.Every = 5 * time.Second
	}
	t := &Tracker{cfg: cfg, counts: map[string]*counter{}, dirty: map[string]struct{}{}, uses: newUses()}
	t.begin()
	for _, u := range cfg.Directory.Usage.All() {
		t.counts[u.ID] = &counter{count: u.Count, last: u.Last, found: u.Last}
	}
	// Without a mark the installation is older than its records: the whole log
	// is counted, once.
	q := store.Query{AllAccounts: true, Outcome: activity.Success, Limit: 1000}
	if mark, ok := cfg.Directory.Usage.Get(markID); ok {
		t.mark = mark.Last
		q.Since = mark.Last.Add(-overlap)
	}
	for {
		page, err := log.Events(ctx, q)
		if err != nil {
			return nil, fmt.Errorf("count the logins since %s: %w", q.Since.Format(time.RFC3339), err)
		}
		for _, stored := range page {
			var e activity.Event
			if err := json.Unmarshal(stored.Doc, &e); err != nil {
				return nil, fmt.Errorf("count the login at %s: %w", stored.Position, err)
			}
			e.Time.Time = stored.Time
			t.login(&e, true)
		}
		if len(page) < q.Limit {
			return t, nil
		}
		q.Before = page[len(page)-1].Position
	}
}

// Login counts the event of a login that succeeded; other events are ignored.
func (t *Tracker) Login(e *activity.Event) {
	if t != nil {
		t.login(e, false)
	}
}

// login counts a login; one that is read again counts only for what does not
// have it yet, because a crash may have come between two batches of one write.
func (t *Tracker) login(e *activity.Event, again bool) {
	if e.Outcome != activity.Success || !strings.HasSuffix(e.Action, ".login") {
		return
	}
	t.add(directory.UserKey(e.AccountID, e.Initiator.ID), e.Time.Time, again)
	if key := e.Target.ID[strings.LastIndexByte(e.Target.ID, ':')+1:]; strings.HasPrefix(key, "ApiKey-") {
		t.add(key, e.Time.Time, again)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.Time.After(t.mark) {
		t.mark = e.Time.Time
	}
}

// Permit counts that a policy allowed something.
func (t *Tracker) Permit(policyID string, at time.Time) {
	if t != nil {
		t.add(policyID, at, false)
	}
}

func (t *Tracker) add(id string, at time.Time, again bool) {
	if id == "" || id == markID || id == sinceID {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c, ok := t.counts[id]
	if !ok {
		c = &counter{}
		t.counts[id] = c
	}
	if again && !at.After(c.found) {
		return
	}
	t.dirty[id] = struct{}{}
	c.count++
	if at.After(c.last) {
		c.last = at
	}
}

// Of returns how often something was used, and when last; the time is zero when
// it never was. Identities are counted by directory.UserKey, because the same
// person may be a user of several accounts; API keys and policies by their id.
func (t *Tracker) Of(id string) (count int64, last time.Time) {
	if t == nil {
		return 0, time.Time{}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c, ok := t.counts[id]
	if !ok || id == markID || id == sinceID {
		return 0, time.Time{}
	}
	return c.count, c.last
}

// batch bounds the records of one write, so that other writers need not wait
// long.
const batch = 500

// Flush writes the counts that have changed, and removes those of identities
// that are gone.
func (t *Tracker) Flush(ctx context.Context) error {
	t.uses.forget(t.cfg.Now(), t.known)
	for _, write := range []func(context.Context) (bool, error){t.flush, t.flushUses, t.flushRemovals} {
		for more := true; more; {
			var err error
			if more, err = write(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tracker) flush(ctx context.Context) (more bool, err error) {
	d := t.cfg.Directory
	taken := map[string]counter{}
	err = d.Update(ctx, "usage", func(tx *directory.Tx) error {
		t.mu.Lock()
		for id := range t.dirty {
			if more = len(taken) == batch; more {
				break
			}
			taken[id] = *t.counts[id]
			delete(t.dirty, id)
		}
		if len(taken) > 0 && !more && !t.mark.IsZero() {
			// Everything before the mark is written now.
			taken[markID] = counter{last: t.mark}
		}
		t.mu.Unlock()
		for id, c := range taken {
			next := identity.Usage{ID: id}
			if old, ok := d.Usage.Get(id); ok {
				next.Meta = old.Meta
			}
			next.Count, next.Last = c.count, c.last
			d.Usage.Put(tx, &next)
		}
		if _, ok := d.Usage.Get(sinceID); !ok {
			d.Usage.Put(tx, &identity.Usage{ID: sinceID, Last: t.began})
		}
		return nil
	})
	if err != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		for id := range taken {
			if id != markID {
				t.dirty[id] = struct{}{}
			}
		}
	}
	return more, err
}

// Run writes the counts every few seconds until the context ends. Whoever ends
// it calls Flush once more.
func (t *Tracker) Run(ctx context.Context) {
	tick := time.NewTicker(t.cfg.Every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := t.Flush(ctx); err != nil && ctx.Err() == nil {
				t.cfg.Log.Warn("the counts of use could not be written; they are tried again", "error", err)
			}
		case <-ctx.Done():
			return
		}
	}
}
