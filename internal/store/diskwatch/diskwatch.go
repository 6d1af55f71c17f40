// Package diskwatch stands between a store and those who write to it. It knows
// how much space the disk has left and whether the store's files are still what
// they were, refuses writes while they could not be kept, and lets them in again
// by itself. It keeps a reserve of space that can be freed. What is dropped to
// make room, and when, is not decided here.
package diskwatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

// Watched is a store in files.
type Watched interface {
	store.Store
	store.Files

	// Frugal has the store write nothing that it can make anew, such as an
	// index, or lets it again.
	Frugal(on bool)
}

// Auto stands for the default of a size in [Config].
const Auto = -1

// Config are a watch's collaborators and sizes, in bytes.
type Config struct {
	Store   Watched
	Dir     string // of the store's files; the reserve lies there
	Alarm   int64  // free space below which there is an alarm; Auto is 1 GiB or 5 % of the disk
	Stop    int64  // free space below which nothing is written; Auto is 32 MiB
	Reserve int64  // size of the reserve; Auto is 64 MiB, 0 is none

	// Event makes the event of a change, for the operator's log; nil makes none.
	Event func(Change) (store.Event, error)

	Every time.Duration // between two looks; 0 is a second
	Now   func() time.Time
	Log   *slog.Logger
}

// Change is what an event tells.
type Change struct {
	Action   string // activity.StoreUpdate or activity.StoreRestore
	Was, Is  store.State
	Why      string
	At       time.Time
	Free     int64 // bytes of the disk
	Restored *store.Restored
}

// Status is what a watch knows.
type Status struct {
	State       store.State
	Why         string // "" when all is well
	Since       time.Time
	Free, Total int64 // bytes of the disk; Free is what the server may use
	Alarm, Stop int64 // the thresholds
	Reserve     int64 // bytes that are held back
	ReserveFull int64 // and that are to be
	Refused     int64 // events that were refused, and changes without one, since the server started
}

// Watch is a store that takes writes only while it can keep them.
type Watch struct {
	Watched
	cfg   Config
	poked chan struct{}

	refused atomic.Int64

	looking sync.Mutex  // held while the disk and the files are looked at; guards what follows
	told    store.State // that was written to the logs last
	warned  time.Time   // when the reserve could not be made
	untold  []Change    // what is still to be recorded

	mu     sync.Mutex // guards what follows
	status Status
	failed error // of a commit since the last look, that the disk was to blame for
}

// New returns a watch, which has looked at the disk once. Run goes on looking.
func New(ctx context.Context, cfg Config) (*Watch, error) {
	w := &Watch{Watched: cfg.Store, cfg: cfg, poked: make(chan struct{}, 1)}
	w.status.State, w.status.Since, w.told = store.StateOK, cfg.Now(), store.StateOK
	if err := w.measure(); err != nil {
		return nil, err
	}
	w.look(ctx, false)
	return w, nil
}

// interval is how often the disk and the files are looked at without a cause,
// unless a test has no time for it.
const interval = time.Second

// Run looks at the disk and the files each second, and at once when a write has
// failed, until the context ends.
func (w *Watch) Run(ctx context.Context) {
	tick := time.NewTicker(cmp.Or(w.cfg.Every, interval))
	defer tick.Stop()
	for {
		w.look(ctx, true)
		select {
		case <-tick.C:
		case <-w.poked:
		case <-ctx.Done():
			return
		}
	}
}

// Status returns what the watch knows.
func (w *Watch) Status() Status {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.status
	s.Refused = w.refused.Load()
	return s
}

// Pressed reports whether space is short.
func (w *Watch) Pressed() bool {
	s := w.Status().State
	return s == store.StateAlarm || s == store.StateFull
}

// Commit implements [store.Store].
func (w *Watch) Commit(ctx context.Context, b store.Batch) error {
	if err := w.admit(b); err != nil {
		return err
	}
	return w.judge(b, w.Watched.Commit(ctx, b))
}

// DropDay implements [store.Log]. When not even that finds room, the reserve is
// given up for it.
func (w *Watch) DropDay(ctx context.Context, day int, b store.Batch) error {
	if err := w.admit(b); err != nil {
		return err
	}
	err := w.judge(b, w.Watched.DropDay(ctx, day, b))
	var refused *store.RefusedError
	if errors.As(err, &refused) && refused.State == store.StateFull {
		freed, freeErr := w.Release(ctx)
		if freeErr != nil || freed == 0 {
			return errors.Join(err, freeErr)
		}
		err = w.judge(b, w.Watched.DropDay(ctx, day, b))
	}
	return err
}

// admit refuses a batch for the state that the store is in.
func (w *Watch) admit(b store.Batch) error {
	w.mu.Lock()
	state, why := w.status.State, w.status.Why
	w.mu.Unlock()
	if state.Takes() || state == store.StateFull && makesRoom(b) {
		return nil
	}
	return w.refuse(b, state, errors.New(why))
}

// makesRoom reports whether all that a batch has is events of what makes room
// or tells of the lack of it. Only what succeeded: a caller without a right must
// not fill the last bit of the disk with his attempts.
func makesRoom(b store.Batch) bool {
	if len(b.Puts) > 0 || len(b.Deletes) > 0 {
		return false
	}
	room := false
	for _, e := range b.Events {
		switch e.Action {
		case activity.StoreUpdate, activity.StoreRestore, activity.ReserveRelease, activity.DayDelete:
			room = true
		case activity.ActionEvaluated: // of an account that logs its decisions
		default:
			return false
		}
		if e.Outcome != activity.Success {
			return false
		}
	}
	return room
}

func (w *Watch) refuse(b store.Batch, state store.State, why error) error {
	w.refused.Add(int64(max(1, len(b.Events))))
	return &store.RefusedError{State: state, Cause: why}
}

// judge looks at what became of a write.
func (w *Watch) judge(b store.Batch, err error) error {
	var taken *store.TakenError
	if err == nil || errors.Is(err, store.ErrStale) || errors.As(err, &taken) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	state := w.stateOf(err)
	w.mu.Lock()
	if state != store.StateLost && state != store.StateDamaged {
		w.failed = err
	}
	w.set(state, err.Error())
	w.mu.Unlock()
	select {
	case w.poked <- struct{}{}:
	default:
	}
	return w.refuse(b, state, err)
}

// stateOf names what a failed write means. What SQLite says of it is less exact
// than what the file system says when it is asked for the same.
func (w *Watch) stateOf(err error) store.State {
	var lost *store.LostError
	if errors.As(err, &lost) {
		if lost.Damaged {
			return store.StateDamaged
		}
		return store.StateLost
	}
	if s := stateOfDisk(probe(w.cfg.Dir)); !s.Takes() {
		return s
	}
	if full(err) {
		return store.StateFull
	}
	return store.StateFailing
}

// set changes the state; mu is held.
func (w *Watch) set(state store.State, why string) {
	if w.status.State != state {
		w.status.Since = w.cfg.Now()
	}
	w.status.State, w.status.Why = state, why
	w.Frugal(state != store.StateOK && state != store.StateAlarm)
}

// look finds out the state, does what can be done about it, and tells.
func (w *Watch) look(ctx context.Context, act bool) {
	w.looking.Lock()
	defer w.looking.Unlock()
	state, why := w.files()
	var restored *store.Restored
	if state == store.StateLost && act {
		w.tell(ctx, state, why)
		w.mu.Lock()
		w.set(state, why) // whoever comes now is refused, and does not wait
		w.mu.Unlock()
		done, err := w.Restore(ctx)
		if err != nil {
			why = fmt.Sprintf("%s; it cannot be put back yet: %v", why, err)
			var lost *store.LostError
			if errors.As(err, &lost) && lost.Damaged {
				state = store.StateDamaged
			}
		} else {
			restored = &done
			state, why = w.files()
		}
	}
	if state == store.StateOK {
		state, why = w.disk()
	}
	if act && state == store.StateOK {
		w.keepReserve()
	}
	w.mu.Lock()
	w.set(state, why)
	w.mu.Unlock()
	if restored != nil {
		w.cfg.Log.Error("a file of the store was removed under the server and has been put back; find out by whom: "+
			"tabard activity verify shows that the log is whole", "found", restored.Found, "set aside", restored.Aside)
		w.record(ctx, Change{Action: activity.StoreRestore, Was: store.StateLost, Is: state, Why: restored.Found, Restored: restored})
	}
	if act {
		w.tell(ctx, state, why)
		w.record(ctx)
	}
}

// files looks whether the store's files are what they were.
func (w *Watch) files() (store.State, string) {
	err := w.CheckFiles()
	var lost *store.LostError
	switch {
	case err == nil:
		return store.StateOK, ""
	case !errors.As(err, &lost):
		return store.StateFailing, err.Error()
	case lost.Damaged:
		return store.StateDamaged, lost.Error()
	}
	return store.StateLost, lost.Error()
}

// disk looks at the file system, and whether the last write went well.
func (w *Watch) disk() (store.State, string) {
	if err := w.measure(); err != nil {
		return store.StateFailing, err.Error()
	}
	w.mu.Lock()
	s, failed := w.status, w.failed
	w.failed = nil
	w.mu.Unlock()
	// While writes fail, and after the last one did, the disk is asked. Once it
	// takes a write again the next commit may try.
	if err := probeIf(failed != nil || !s.State.Takes(), w.cfg.Dir); err != nil {
		return stateOfDisk(err), err.Error()
	}
	if readOnly(w.cfg.Dir) {
		return store.StateReadOnly, "the file system is mounted read-only"
	}
	if failed != nil {
		// The disk takes writes, and yet that one failed: not before the next look.
		return w.stateOf(failed), failed.Error()
	}
	stop, alarm := s.Stop, s.Alarm
	if s.State == store.StateFull {
		stop += stop / 4 // so that it does not flutter
	}
	if s.State != store.StateOK {
		alarm += alarm / 10
	}
	switch {
	case s.Free < stop:
		return store.StateFull, fmt.Sprintf("%d bytes are free on the disk of %s; nothing is written below %d", s.Free, w.cfg.Dir, s.Stop)
	case s.Free < alarm:
		return store.StateAlarm, fmt.Sprintf("%d bytes are free on the disk of %s; the alarm is at %d", s.Free, w.cfg.Dir, s.Alarm)
	}
	return store.StateOK, ""
}

func probeIf(wanted bool, dir string) error {
	if !wanted {
		return nil
	}
	return probe(dir)
}

// measure reads the free space and what follows from the size of the disk.
func (w *Watch) measure() error {
	free, total, err := space(w.cfg.Dir)
	if err != nil {
		return fmt.Errorf("look at the disk of %s: %w", w.cfg.Dir, err)
	}
	held, err := sizeOf(w.reserve())
	if err != nil {
		return fmt.Errorf("look at the reserve: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &w.status
	s.Free, s.Total, s.Reserve = free, total, held
	// A disk that is small altogether has its part kept, and no more.
	s.Alarm = w.cfg.size(w.cfg.Alarm, min(max(1<<30, total/20), total/4))
	s.Stop = min(w.cfg.size(w.cfg.Stop, min(32<<20, total/16)), s.Alarm)
	s.ReserveFull = w.cfg.size(w.cfg.Reserve, min(64<<20, total/8))
	return nil
}

func (*Config) size(set, auto int64) int64 {
	if set == Auto {
		return auto
	}
	return set
}

// ReserveName is the name of the reserve in the directory. Whoever has no token
// to have it freed with may remove it.
const ReserveName = "reserve"

func (w *Watch) reserve() string { return filepath.Join(w.cfg.Dir, ReserveName) }

// keepReserve makes the reserve when there is room for it.
func (w *Watch) keepReserve() {
	s := w.Status()
	if s.Reserve == s.ReserveFull || s.ReserveFull > s.Reserve && s.Free-s.ReserveFull < s.Alarm+s.Alarm/10 {
		return
	}
	if err := allocate(w.reserve(), s.ReserveFull); err != nil && w.cfg.Now().Sub(w.warned) > time.Hour {
		w.warned = w.cfg.Now()
		w.cfg.Log.Warn("the reserve on the disk of the activity log was not made", "bytes", s.ReserveFull, "error", err)
	}
}

// Release frees the reserve and looks at the disk anew. It returns how many
// bytes that were.
func (w *Watch) Release(ctx context.Context) (int64, error) {
	freed, err := remove(w.reserve())
	if err != nil {
		return 0, fmt.Errorf("free the reserve: %w", err)
	}
	if freed > 0 {
		w.cfg.Log.Warn("the reserve on the disk of the activity log was freed", "bytes", freed)
	}
	w.looking.Lock()
	defer w.looking.Unlock()
	if is := w.Status().State; is == store.StateFull || is.Takes() {
		state, why := w.disk()
		w.mu.Lock()
		w.set(state, why)
		w.mu.Unlock()
		w.tell(ctx, state, why)
	}
	return freed, nil
}

// FreeReserve removes the reserve of a directory whose store cannot even be
// opened for lack of space, and returns how many bytes that were.
func FreeReserve(dir string, why error) (int64, error) {
	if !full(why) {
		return 0, nil
	}
	return remove(filepath.Join(dir, ReserveName))
}

// tell writes a change of the state to the server's log and to the activity
// log; looking is held.
func (w *Watch) tell(ctx context.Context, is store.State, why string) {
	was := w.told
	if was == is {
		return
	}
	w.told = is
	advice := map[store.State]string{
		store.StateOK:       "the store takes writes as ever",
		store.StateAlarm:    "space on the disk of the activity log is short: make room, or set --activity-max-days or --activity-max-size",
		store.StateFull:     "the disk of the activity log is full: tokens and changes are refused until there is room; tabard activity release-reserve, or removing the file reserve, frees some",
		store.StateReadOnly: "the disk of the activity log is read-only: tokens and changes are refused until it is writable",
		store.StateFailing:  "the disk of the activity log fails: tokens and changes are refused while it does",
		store.StateLost:     "a file of the store was removed or replaced: tokens and changes are refused until it is put back, which is tried each second; do not stop the server, it has the only copy",
		store.StateDamaged:  "a file of the store was cut or overwritten: tokens and changes are refused; nothing is written over it. Stop the server, put a backup back, and run: tabard activity verify",
	}[is]
	if is == store.StateOK {
		w.cfg.Log.Info(advice, "was", was)
	} else {
		w.cfg.Log.Error(advice, "state", is, "was", was, "why", why)
	}
	w.record(ctx, Change{Action: activity.StoreUpdate, Was: was, Is: is, Why: why})
}

// untoldMost bounds what waits to be recorded.
const untoldMost = 100

// record writes events of changes. Those that cannot be written wait until they
// can, so that what could not be told at its time is told afterwards.
func (w *Watch) record(ctx context.Context, more ...Change) {
	if w.cfg.Event == nil {
		return
	}
	for _, c := range more {
		c.At, c.Free = w.cfg.Now(), w.Status().Free
		if len(w.untold) < untoldMost {
			w.untold = append(w.untold, c)
		}
	}
	if s := w.Status().State; len(w.untold) == 0 || !s.Takes() && s != store.StateFull {
		return
	}
	b := store.Batch{}
	for _, c := range w.untold {
		e, err := w.cfg.Event(c)
		if err != nil {
			w.cfg.Log.Error("make the event of a change of the store", "error", err)
			continue
		}
		b.Events = append(b.Events, e)
	}
	// Not by judge: what is told must not change what is to be told.
	err := w.Watched.Commit(ctx, b)
	var lost *store.LostError
	if err != nil && (!errors.As(err, &lost) || !lost.Committed) { // what was committed is put back with the rest
		w.cfg.Log.Warn("a change of the store could not be recorded yet", "error", err)
		return
	}
	w.untold = nil
}
