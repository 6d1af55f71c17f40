package diskwatch_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/diskwatch"
	"tabard.dev/tabard/internal/store/merkle"
	"tabard.dev/tabard/internal/store/sqlite"
)

var ctx = context.Background()

// desk is a watch over a store in a directory.
type desk struct {
	*diskwatch.Watch
	t     *testing.T
	dir   string
	store *sqlite.Store

	mu      sync.Mutex
	changes []diskwatch.Change
}

func watch(t *testing.T, dir string, with func(*diskwatch.Config)) *desk {
	t.Helper()
	s, err := sqlite.Open(ctx, filepath.Join(dir, "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{t: t, dir: dir, store: s}
	cfg := diskwatch.Config{
		Store: s, Dir: dir, Alarm: diskwatch.Auto, Stop: diskwatch.Auto, Reserve: diskwatch.Auto, Every: 20 * time.Millisecond, Now: time.Now, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Event: func(c diskwatch.Change) (store.Event, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.changes = append(d.changes, c)
			if c.At.IsZero() {
				t.Error("the change has no time")
			}
			return event(c.Action, 1), nil
		},
	}
	if with != nil {
		with(&cfg)
	}
	if d.Watch, err = diskwatch.New(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	running, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { d.Run(running) })
	t.Cleanup(func() {
		stop()
		watching.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func event(action string, size int) store.Event {
	return store.Event{
		Time: time.Now(), AccountID: "a", Action: action, Outcome: activity.Success,
		Doc: fmt.Appendf(nil, `{"action":%q,"at":%d,"x":%q}`, action, time.Now().UnixNano(), strings.Repeat("x", size)),
	}
}

func (d *desk) add(size int) error {
	return d.Commit(ctx, store.Batch{Events: []store.Event{event("x.y.create", size)}})
}

// until waits for a state.
func (d *desk) until(want ...store.State) {
	d.t.Helper()
	for range 1000 {
		for _, s := range want {
			if d.Status().State == s {
				return
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	d.t.Fatalf("the state stays %+v, want %v", d.Status(), want)
}

func (d *desk) wantRefused(state store.State, code string) {
	d.t.Helper()
	err := d.add(10)
	var refused *store.RefusedError
	if !errors.As(err, &refused) || refused.State != state {
		d.t.Fatalf("got %v, want a refusal in state %s", err, state)
	}
	f := refused.Fault()
	if f.Kind != fault.Unavailable || f.Code != code || f.RetryAfter == 0 || strings.Contains(f.Message, d.dir) {
		d.t.Errorf("the caller gets %s %q", f.Code, f.Message)
	}
}

// wantWhole checks that the tree is that of the events and that they are read.
func (d *desk) wantWhole() int {
	d.t.Helper()
	extent, err := d.Extent(ctx)
	if err != nil {
		d.t.Fatal(err)
	}
	entries, err := d.Entries(ctx, 0, int(extent.Size)) // a change of state may come meanwhile
	var edge merkle.Edge
	for _, e := range entries {
		edge.Append(nil, e.Doc)
	}
	if err != nil || extent.Size != edge.Size() {
		d.t.Fatalf("%d events in a tree of %d, %v", edge.Size(), extent.Size, err)
	}
	if is, err := merkle.Read(extent.Size, d); err != nil || is.Root() != edge.Root() {
		d.t.Fatalf("the tree is not that of the events: %v", err)
	}
	return len(entries)
}

func (d *desk) told(action string, is store.State) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.changes {
		if c.Action == action && c.Is == is {
			return true
		}
	}
	return false
}

// fill leaves a disk only so many bytes.
func fill(t *testing.T, dir string, leave int64) string {
	t.Helper()
	name := filepath.Join(dir, "somebody-elses")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for free(t, dir) > leave {
		if _, err := f.Write(make([]byte, min(1<<16, max(4096, (free(t, dir)-leave)/2)))); err != nil {
			break
		}
	}
	return name
}

func TestAFullDiskRefusesWhatItCannotKeepAndRecovers(t *testing.T) {
	dir := tmpfs(t, 64)
	d := watch(t, dir, nil)
	if err := d.add(10); err != nil {
		t.Fatal(err)
	}
	for range 500 { // the reserve is made by the first look
		if d.Status().Reserve == 8<<20 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	s := d.Status()
	if s.State != store.StateOK || s.Alarm != 16<<20 || s.Stop != 4<<20 || s.Reserve != s.ReserveFull || s.Reserve != 8<<20 {
		t.Fatalf("at first %+v", s)
	}
	other := fill(t, dir, 10<<20)
	d.until(store.StateAlarm)
	if err := d.add(10); err != nil {
		t.Errorf("in alarm: %v", err)
	}
	if !d.told(activity.StoreUpdate, store.StateAlarm) {
		t.Error("the alarm stands nowhere")
	}
	fill(t, dir, 2<<20)
	d.until(store.StateFull)
	before := d.wantWhole()
	d.wantRefused(store.StateFull, "activity_log_full")
	if d.wantWhole() != before {
		t.Error("something was written")
	}
	if d.Status().Refused != 1 {
		t.Errorf("%d refusals", d.Status().Refused)
	}
	// What tells of it and what makes room is written all the same; an attempt
	// of somebody without the right to is not.
	if err := d.Commit(ctx, store.Batch{Events: []store.Event{event(activity.ReserveRelease, 10)}}); err != nil {
		t.Errorf("the event of what makes room: %v", err)
	}
	attempt := event(activity.ReserveRelease, 10)
	attempt.Outcome = activity.Failure
	if err := d.Commit(ctx, store.Batch{Events: []store.Event{attempt}}); err == nil {
		t.Error("an attempt was written on a full disk")
	}
	// The reserve lets everything go on, in alarm, and is not made again yet.
	freed, err := d.Release(ctx)
	if err != nil || freed != 8<<20 || d.Status().State != store.StateAlarm {
		t.Fatalf("freed %d, %v; %+v", freed, err, d.Status())
	}
	if err := d.add(10); err != nil {
		t.Error(err)
	}
	if freed, err := d.Release(ctx); err != nil || freed != 0 {
		t.Errorf("freed %d bytes again, %v", freed, err)
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	d.until(store.StateOK)
	for range 500 {
		if d.Status().Reserve > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if d.Status().Reserve != 8<<20 {
		t.Error("the reserve was not made again")
	}
	if !d.told(activity.StoreUpdate, store.StateOK) || !d.told(activity.StoreUpdate, store.StateFull) {
		t.Errorf("told %+v", d.changes)
	}
	d.wantWhole()
}

// Without a threshold the disk fills up to the last byte: a commit fails, and
// nothing of it is left.
func TestADiskThatIsFullToTheLastByteIsRecoveredFrom(t *testing.T) {
	dir := tmpfs(t, 24)
	d := watch(t, dir, func(c *diskwatch.Config) { c.Alarm, c.Stop, c.Reserve = 0, 0, 0 })
	if err := d.add(10); err != nil {
		t.Fatal(err)
	}
	acknowledged := 0
	other := fill(t, dir, 4<<20)
	for range 10_000 {
		err := d.add(8000)
		if err == nil {
			acknowledged++
			continue
		}
		var refused *store.RefusedError
		if !errors.As(err, &refused) || refused.State != store.StateFull {
			t.Fatalf("got %v", err)
		}
		break
	}
	if d.Status().State != store.StateFull || acknowledged < 50 {
		t.Fatalf("%d events, state %+v", acknowledged, d.Status())
	}
	d.wantWhole()
	if got, err := d.Events(ctx, store.Query{AccountID: "a", Action: "x.y.create", Limit: 1 << 20}); err != nil || len(got) != acknowledged+1 {
		t.Errorf("%d events of %d, %v", len(got), acknowledged+1, err)
	}
	d.wantRefused(store.StateFull, "activity_log_full")
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	d.until(store.StateOK)
	for range 200 {
		if err := d.add(8000); err != nil {
			t.Fatal(err)
		}
	}
	if d.wantWhole() < acknowledged+200 {
		t.Error("events are missing")
	}
	if err := d.store.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := sqlite.Open(ctx, filepath.Join(dir, "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	d.store = again
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAReadOnlyMountRefusesAndRecovers(t *testing.T) {
	dir := tmpfs(t, 64)
	d := watch(t, dir, nil)
	if err := d.add(10); err != nil {
		t.Fatal(err)
	}
	writable := mountReadOnly(t, dir)
	d.until(store.StateReadOnly)
	d.wantRefused(store.StateReadOnly, "activity_log_read_only")
	before := d.wantWhole()
	writable()
	d.until(store.StateOK)
	if err := d.add(10); err != nil || d.wantWhole() <= before {
		t.Errorf("afterwards: %v", err)
	}
}

// A file system that finds an error in itself turns read-only under open files.
func TestAFileSystemThatTurnsReadOnlyIsNoticedByTheCommitThatFails(t *testing.T) {
	dir, breakIt := ext4(t)
	d := watch(t, dir, nil)
	for range 20 {
		if err := d.add(1000); err != nil {
			t.Fatal(err)
		}
	}
	breakIt()
	d.wantRefused(store.StateReadOnly, "activity_log_read_only")
	if n := d.wantWhole(); n < 20 {
		t.Errorf("%d events are read", n)
	}
}

func TestARemovedFileIsPutBackByItself(t *testing.T) {
	dir := t.TempDir()
	d := watch(t, dir, func(c *diskwatch.Config) { c.Alarm, c.Stop, c.Reserve = 0, 0, 0 })
	for range 20 {
		if err := d.add(1000); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tabard.db", "tabard.db-wal", "tabard.db-shm"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		for range 1000 {
			if d.store.CheckFiles() == nil && d.Status().State == store.StateOK {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if err := d.add(1000); err != nil {
			t.Fatal(err)
		}
	}
	d.until(store.StateOK)
	for range 1000 { // what could not be told at its time is told afterwards
		if d.wantWhole() == 20+3+3+6 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d events", d.wantWhole())
}

func TestACutFileStaysRefused(t *testing.T) {
	dir := t.TempDir()
	d := watch(t, dir, func(c *diskwatch.Config) { c.Alarm, c.Stop, c.Reserve = 0, 0, 0 })
	if err := d.add(1000); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "tabard.db-wal"), 0); err != nil {
		t.Fatal(err)
	}
	d.wantRefused(store.StateDamaged, "activity_log_damaged")
	d.until(store.StateDamaged)
	d.wantRefused(store.StateDamaged, "activity_log_damaged")
}

func TestWhatLiesInThePlaceOfTheReserveIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(t.TempDir(), "precious")
	if err := errors.Join(os.WriteFile(precious, []byte("x"), 0o600), os.Symlink(precious, filepath.Join(dir, diskwatch.ReserveName))); err != nil {
		t.Fatal(err)
	}
	s, err := sqlite.Open(ctx, filepath.Join(dir, "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, err = diskwatch.New(ctx, diskwatch.Config{Store: s, Dir: dir, Reserve: 1 << 20, Now: time.Now, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err == nil || !strings.Contains(err.Error(), "is not a file") {
		t.Errorf("got %v", err)
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "x" {
		t.Error("somebody else's file was touched")
	}
}
