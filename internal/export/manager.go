package export

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
)

// Recorder makes events durable.
type Recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// Config are a manager's collaborators.
type Config struct {
	Store     Log
	Directory *directory.Directory // where cursors are kept
	Journal   Recorder
	Names     crn.Names
	Now       func() time.Time
	Log       *slog.Logger

	// OperatorAccount's log tells what becomes of the routes.
	OperatorAccount string
}

// Manager runs the routes.
type Manager struct {
	cfg Config

	saving sync.Mutex // held while cursors are stored

	mu      sync.Mutex
	runners []*runner
	changed chan struct{} // closed when there are others
}

// New returns a manager without routes. Run follows them.
func New(cfg Config) *Manager {
	return &Manager{cfg: cfg, changed: make(chan struct{})}
}

// Set replaces the routes. A route that has the name of one that there was
// goes on where that one was, whatever else is new about it.
func (m *Manager) Set(routes []Route) {
	m.mu.Lock()
	defer m.mu.Unlock()
	shared := newFeed(m.cfg.Store)
	before := m.runners
	m.runners = nil
	for _, route := range routes {
		r := &runner{Route: route.complete(), m: m, feed: shared}
		if c, ok := m.cfg.Directory.ExportCursors.Get(route.Name); ok {
			r.next, r.saved = c.Next, c.Next
		}
		for _, old := range before {
			if old.Name == route.Name {
				old.mu.Lock()
				r.counts, r.fault.toldAt = old.counts, old.fault.toldAt
				old.mu.Unlock()
			}
		}
		m.runners = append(m.runners, r)
	}
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Manager) current() ([]*runner, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.runners, m.changed
}

// How often cursors are made durable, how long the last time may take, and for
// how long that of a route is kept that is no more.
const (
	saveEvery   = time.Second
	saveTimeout = 5 * time.Second
	retireEvery = time.Hour
	keepGone    = 30 * 24 * time.Hour
)

// Run delivers until the context ends.
func (m *Manager) Run(ctx context.Context) {
	for ctx.Err() == nil {
		runners, changed := m.current()
		running, stop := context.WithCancel(ctx)
		var group sync.WaitGroup
		for _, r := range runners {
			group.Go(func() { r.run(running) })
		}
		group.Go(func() { m.keep(running, runners) })
		select {
		case <-ctx.Done():
		case <-changed:
		}
		stop()
		group.Wait()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), saveTimeout)
		if err := m.save(last, runners); err != nil {
			m.cfg.Log.Warn("where the routes of the activity log are was not stored; some events are delivered again", "error", err)
		}
		cancel()
	}
}

// keep makes cursors durable until the context ends.
func (m *Manager) keep(ctx context.Context, runners []*runner) {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	var retired time.Time
	told := ""
	for {
		err := m.save(ctx, runners)
		if err == nil && time.Since(retired) >= retireEvery {
			if err = m.retire(ctx, runners); err == nil {
				retired = time.Now()
			}
		}
		switch {
		case err == nil:
			told = ""
		case ctx.Err() == nil && err.Error() != told:
			told = err.Error()
			m.cfg.Log.Warn("where the routes of the activity log are is not stored; it is tried again", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// save makes the cursors durable that have moved, all in one commit.
func (m *Manager) save(ctx context.Context, runners []*runner) error {
	m.saving.Lock()
	defer m.saving.Unlock()
	type step struct {
		r    *runner
		next int64
	}
	var moved []step
	for _, r := range runners {
		r.mu.Lock()
		if r.placed && r.next != r.saved {
			moved = append(moved, step{r, r.next})
		}
		r.mu.Unlock()
	}
	if len(moved) == 0 {
		return nil
	}
	cursors := m.cfg.Directory.ExportCursors
	err := m.cfg.Directory.Update(ctx, by, func(tx *directory.Tx) error {
		for _, s := range moved {
			c := activity.ExportCursor{Route: s.r.Name}
			if old, ok := cursors.Get(s.r.Name); ok {
				c = *old
			}
			c.Next = s.next
			cursors.Put(tx, &c)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store where the routes are: %w", err)
	}
	for _, s := range moved {
		s.r.mu.Lock()
		s.r.saved = s.next
		s.r.mu.Unlock()
	}
	return nil
}

// place returns where a route goes on. One that is new is written down first:
// killed right after, it must not begin somewhere else.
func (m *Manager) place(ctx context.Context, route Route) (int64, error) {
	extent, err := m.cfg.Store.Extent(ctx)
	if err != nil {
		return 0, fmt.Errorf("read how long the activity log is: %w", err)
	}
	cursors := m.cfg.Directory.ExportCursors
	c := activity.ExportCursor{Route: route.Name, Next: extent.First}
	if route.FromNow {
		c.Next = extent.Size
	}
	old, known := cursors.Get(route.Name)
	if known {
		c = *old
	}
	if c.Next > extent.Size {
		m.cfg.Log.Error("a route of the activity log was further than the log is now; it goes on at the log's end. Was an older copy of the data put back?",
			"route", route.Name, "next", c.Next, "events", extent.Size)
		c.Next = extent.Size
	}
	if known && c == *old && old.Gone.IsZero() {
		return c.Next, nil
	}
	c.Gone = time.Time{}
	err = m.cfg.Directory.Update(ctx, by, func(tx *directory.Tx) error {
		cursors.Put(tx, &c)
		if !known || !old.Gone.IsZero() {
			tx.Record(m.event(route.Name, actionCreate, activity.Critical, tx.Now, map[string]any{"target": route.Kind + " " + route.Target, "from": c.Next}, ""))
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("store where the route begins: %w", err)
	}
	return c.Next, nil
}

// retire marks the cursors of routes that are no more, and removes them when
// they have had their time.
func (m *Manager) retire(ctx context.Context, runners []*runner) error {
	cursors := m.cfg.Directory.ExportCursors
	known := func(c *activity.ExportCursor) bool {
		return slices.ContainsFunc(runners, func(r *runner) bool { return r.Name == c.Route })
	}
	if !slices.ContainsFunc(cursors.All(), func(c *activity.ExportCursor) bool { return !known(c) }) {
		return nil
	}
	err := m.cfg.Directory.Update(ctx, by, func(tx *directory.Tx) error {
		for _, c := range cursors.All() {
			switch {
			case known(c):
			case c.Gone.IsZero():
				gone := *c
				gone.Gone = tx.Now
				cursors.Put(tx, &gone)
				tx.Record(m.event(c.Route, actionDelete, activity.Critical, tx.Now, map[string]any{"next": c.Next}, ""))
			case tx.Now.Sub(c.Gone) >= keepGone:
				cursors.Delete(tx, c)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("put away where routes were that are no more: %w", err)
	}
	return nil
}

// NeededFrom returns the index from which on the log has events that a route
// has not delivered, as far as that is on stable storage. It is
// [math.MaxInt64] without routes.
func (m *Manager) NeededFrom() int64 {
	runners, _ := m.current()
	needed := int64(math.MaxInt64)
	for _, r := range runners {
		r.mu.Lock()
		if r.placed || !r.FromNow || r.saved > 0 {
			needed = min(needed, r.saved)
		}
		r.mu.Unlock()
	}
	return needed
}

// by is who changes, in cursors and events.
const by = "tabard"

// Actions of the events about routes.
const (
	actionCreate  = "activity.route.create"
	actionDelete  = "activity.route.delete"
	actionFail    = "activity.route.fail"
	actionRecover = "activity.route.recover"
	actionLose    = "activity.route.lose"
)

func (m *Manager) tellFailure(ctx context.Context, r *runner, since time.Time, text string) {
	m.record(ctx, m.event(r.Name, actionFail, activity.Critical, m.cfg.Now(), map[string]any{"target": r.Kind + " " + r.Target, "since": since.UTC()}, text))
}

func (m *Manager) tellRecovery(ctx context.Context, r *runner, since time.Time) {
	m.record(ctx, m.event(r.Name, actionRecover, activity.Normal, m.cfg.Now(), map[string]any{"target": r.Kind + " " + r.Target, "failing_since": since.UTC()}, ""))
}

func (m *Manager) tellLoss(ctx context.Context, r *runner, g gap) {
	text := fmt.Sprintf("%d events between %d and %d were removed from the log before the route came to them", g.events, g.first, g.last)
	m.cfg.Log.Error("a route of the activity log has a gap", "route", r.Name, "target", r.Target, "error", text)
	m.record(ctx, m.event(r.Name, actionLose, activity.Critical, m.cfg.Now(), map[string]any{"first": g.first, "last": g.last, "events": g.events}, text))
}

// record writes an event that is not part of a change. The server's log has
// said the same before.
func (m *Manager) record(ctx context.Context, e *activity.Event) {
	if err := m.cfg.Journal.Record(ctx, e); err != nil && ctx.Err() == nil {
		m.cfg.Log.Warn("an event about a route of the activity log was not recorded", "action", e.Action, "error", err)
	}
}

// event returns an event about a route; failure is "" for what went well.
func (m *Manager) event(route, action, severity string, at time.Time, data map[string]any, failure string) *activity.Event {
	account := m.cfg.OperatorAccount
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: at}, Action: action, AccountID: account, Outcome: activity.Success, Severity: severity,
		Message:       "Activity Log: " + action[strings.LastIndexByte(action, '.')+1:] + " route " + route,
		CorrelationID: strings.ReplaceAll(uuid.NewString(), "-", ""),
		LogSourceCRN:  m.cfg.Names.Of("activity", "", account, "", "", "").String(),
		Initiator:     activity.Initiator{ID: by, Name: by, TypeURI: activity.UnknownType},
		Target:        activity.Target{ID: m.cfg.Names.Of("activity", "", account, "", "route", route).String(), Name: route, TypeURI: "activity/route"},
		Observer:      activity.Observer{Name: "ActivityTracker"},
	}
	e.SetReason(200, "")
	if failure != "" {
		e.SetReason(503, failure)
		e.Message += " -failure"
	}
	e.Severity = severity
	if b, err := json.Marshal(data); err == nil {
		e.ResponseData = b
	}
	return e
}

// States of a route.
const (
	OK      = "ok"
	Behind  = "behind"  // delivers, and is more than half a minute behind
	Failing = "failing" // the last attempt failed
)

const behindAfter = 30 * time.Second

// Status is how a route does. Counts are since the server's start.
type Status struct {
	Name          string    `json:"name"`
	Kind          string    `json:"kind"`
	Target        string    `json:"target"`
	State         string    `json:"state"`
	Since         time.Time `json:"failing_since,omitzero"`
	LastError     string    `json:"last_error,omitempty"`
	LastErrorAt   time.Time `json:"last_error_at,omitzero"`
	NextAttempt   time.Time `json:"next_attempt,omitzero"`
	Delivered     int64     `json:"delivered"`
	LastDelivered time.Time `json:"last_delivered,omitzero"`
	Skipped       int64     `json:"not_matched"`
	Lost          int64     `json:"lost"` // removed from the log before the route came to them
	Failures      int64     `json:"failed_attempts"`
	Cursor        int64     `json:"cursor"` // position of the next event
	BehindEvents  int64     `json:"behind_events"`
	BehindSeconds float64   `json:"behind_seconds"` // the age of the next event
}

// Status returns how the routes do, by name. When the log cannot be read they
// come with the error, and without how far they are behind.
func (m *Manager) Status(ctx context.Context) ([]Status, error) {
	runners, _ := m.current()
	out := make([]Status, 0, len(runners))
	if len(runners) == 0 {
		return out, nil
	}
	extent, err := m.cfg.Store.Extent(ctx)
	if err != nil {
		err = fmt.Errorf("read how long the activity log is: %w", err)
	}
	for _, r := range runners {
		s := r.status()
		if err == nil {
			err = r.measure(ctx, &s, extent.Size)
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.Name, b.Name) })
	return out, err
}

func (r *runner) status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Status{
		Name: r.Name, Kind: r.Kind, Target: r.Target, State: OK,
		Since: utc(r.fault.since), LastError: r.fault.text, LastErrorAt: utc(r.fault.at), NextAttempt: utc(r.fault.retry),
		Delivered: r.counts.delivered, LastDelivered: utc(r.counts.last), Skipped: r.counts.skipped, Lost: r.counts.lost, Failures: r.counts.failures,
		Cursor: r.next,
	}
	if !s.Since.IsZero() {
		s.State = Failing
	}
	return s
}

// measure adds how far a route is behind in a log of a size.
func (r *runner) measure(ctx context.Context, s *Status, size int64) error {
	if s.BehindEvents = max(0, size-s.Cursor); s.BehindEvents == 0 {
		return nil
	}
	ahead, err := r.feed.read(ctx, s.Cursor, 1)
	if err != nil {
		return err
	}
	if len(ahead) > 0 {
		s.BehindSeconds = max(0, r.m.cfg.Now().Sub(ahead[0].Time).Seconds())
	}
	if s.State == OK && s.BehindSeconds > behindAfter.Seconds() {
		s.State = Behind
	}
	return nil
}

func utc(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.UTC()
}
