package usage_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/usage"
)

const account = "aaaa0000000000000000000000000000"

// place is an installation that can be killed and started again.
type place struct {
	t     *testing.T
	file  string
	store *faulty
	dir   *directory.Directory
	*usage.Tracker
	journal *journal.Journal
}

// faulty is a store whose commits of objects fail from the n-th on.
type faulty struct {
	store.Store
	mu    sync.Mutex
	after int // commits of objects that succeed; negative for all
}

func (f *faulty) Commit(ctx context.Context, b store.Batch) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(b.Puts) > 0 && f.after >= 0 {
		if f.after == 0 {
			return errors.New("no space")
		}
		f.after--
	}
	return f.Store.Commit(ctx, b)
}

func (f *faulty) failAfter(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.after = n
}

func start(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, file: filepath.Join(t.TempDir(), "tabard.db")}
	p.open()
	t.Cleanup(func() { p.kill() })
	return p
}

func (p *place) open() {
	p.t.Helper()
	s, err := sqlite.Open(context.Background(), p.file)
	if err != nil {
		p.t.Fatal(err)
	}
	p.store = &faulty{Store: s, after: -1}
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		p.t.Fatal(err)
	}
	if p.dir, err = directory.Open(context.Background(), directory.Config{Store: p.store, Catalog: catalog, Now: time.Now}); err != nil {
		p.t.Fatal(err)
	}
	p.journal = journal.New(journal.Config{Store: p.store})
	if p.Tracker, err = usage.Open(context.Background(), usage.Config{Directory: p.dir, Log: slog.New(slog.DiscardHandler), Now: time.Now}, p.store); err != nil {
		p.t.Fatal(err)
	}
}

// kill ends the installation without a last write.
func (p *place) kill() {
	p.journal.Close()
	if err := p.store.Close(); err != nil {
		p.t.Error(err)
	}
}

func (p *place) restart() {
	p.t.Helper()
	p.kill()
	p.open()
}

// login is the event of a login; key may be "".
func login(id, key string, at time.Time) *activity.Event {
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: at}, Action: "iam-identity.serviceid-apikey.login", AccountID: account,
		Initiator: activity.Initiator{ID: id}, Target: activity.Target{ID: "crn:v1:bluemix:public:iam-identity::a/" + account + "::profile:Profile-1"},
	}
	if key != "" {
		e.Target.ID = "crn:v1:bluemix:public:iam-identity::a/" + account + "::apikey:" + key
	}
	e.SetReason(200, "")
	return e
}

// happen records events as a grant does: durable first, then counted.
func (p *place) happen(events ...*activity.Event) {
	p.t.Helper()
	if err := p.journal.Record(context.Background(), events...); err != nil {
		p.t.Error(err)
		return
	}
	for _, e := range events {
		p.Login(e)
	}
}

func of(id string) string { return directory.UserKey(account, id) }

func (p *place) want(id string, count int64, last time.Time) {
	p.t.Helper()
	if n, at := p.Of(id); n != count || !at.Equal(last) {
		p.t.Errorf("%s was used %d times and last %s, want %d and %s", id, n, at, count, last)
	}
}

func (p *place) flush() {
	p.t.Helper()
	if err := p.Flush(context.Background()); err != nil {
		p.t.Fatal(err)
	}
}

func TestALoginCountsForTheIdentityAndItsKey(t *testing.T) {
	p := start(t)
	now := time.Now()
	p.want(of("iam-ServiceId-1"), 0, time.Time{})
	p.happen(login("iam-ServiceId-1", "ApiKey-1", now), login("iam-ServiceId-1", "ApiKey-2", now.Add(time.Second)), login("iam-Profile-1", "", now))
	p.want(of("iam-ServiceId-1"), 2, now.Add(time.Second))
	p.want("ApiKey-1", 1, now)
	p.want("ApiKey-2", 1, now.Add(time.Second))
	p.want(of("iam-Profile-1"), 1, now)
	p.want("Profile-1", 0, time.Time{})
	p.want("iam-Profile-1", 0, time.Time{})
	// The last time is the latest one, not the one that was counted last.
	p.happen(login("iam-ServiceId-1", "ApiKey-1", now.Add(-time.Hour)))
	p.want(of("iam-ServiceId-1"), 3, now.Add(time.Second))
}

func TestAPersonIsCountedInEachAccountOfHis(t *testing.T) {
	p := start(t)
	now := time.Now()
	there := login("IBMid-1", "", now)
	there.AccountID = "bbbb"
	p.happen(login("IBMid-1", "", now), there, login("IBMid-1", "", now))
	p.restart()
	p.want(of("IBMid-1"), 2, now)
	p.want(directory.UserKey("bbbb", "IBMid-1"), 1, now)
}

func TestOnlyLoginsThatSucceededCount(t *testing.T) {
	p := start(t)
	now := time.Now()
	failed, change, introspect := login("IBMid-1", "ApiKey-1", now), login("IBMid-1", "ApiKey-1", now), login("IBMid-1", "ApiKey-1", now)
	failed.SetReason(400, "no")
	change.Action = "iam-identity.user-apikey.update"
	introspect.Action = "iam-identity.user-apikey.introspect"
	p.happen(failed, change, introspect)
	p.want(of("IBMid-1"), 0, time.Time{})
	p.restart()
	p.want(of("IBMid-1"), 0, time.Time{})
	p.want("ApiKey-1", 0, time.Time{})
	p.want("log", 0, time.Time{})
}

func TestANilTrackerCountsNothing(t *testing.T) {
	var none *usage.Tracker
	none.Login(login("IBMid-1", "", time.Now()))
	none.Permit("p", time.Now())
	if n, last := none.Of("p"); n != 0 || !last.IsZero() {
		t.Errorf("%d, %s", n, last)
	}
}

func TestCountsEqualTheEventsAfterAKill(t *testing.T) {
	p := start(t)
	base := time.Now().Add(-time.Hour)
	at := func(n int) time.Time { return base.Add(time.Duration(n) * 3 * time.Millisecond) } // several in one hundredth of a second
	// Before the first write ever.
	for n := range 10 {
		p.happen(login("IBMid-1", "ApiKey-1", at(n)))
	}
	p.restart()
	p.want(of("IBMid-1"), 10, at(9))
	// After a restart without a write, and another one.
	p.restart()
	p.want(of("IBMid-1"), 10, at(9))
	p.flush()
	p.restart()
	p.want(of("IBMid-1"), 10, at(9))
	// After a write, more of the same and others.
	for n := 10; n < 20; n++ {
		p.happen(login("IBMid-1", "ApiKey-1", at(n)), login("IBMid-2", "ApiKey-2", at(n)))
	}
	for range 3 {
		p.restart()
		p.want(of("IBMid-1"), 20, at(19))
		p.want("ApiKey-1", 20, at(19))
		p.want(of("IBMid-2"), 10, at(19))
		p.flush()
	}
	p.flush()
	p.restart()
	p.want(of("IBMid-1"), 20, at(19))
}

func TestAFirstStartCountsTheWholeLog(t *testing.T) {
	p := start(t)
	base := time.Now().AddDate(0, 0, -3)
	var last time.Time
	var batch store.Batch
	for n := range 2500 { // more than a page, on several days
		last = base.Add(time.Duration(n) * time.Minute)
		e, err := store.NewEvent(login("IBMid-1", "", last))
		if err != nil {
			t.Fatal(err)
		}
		batch.Events = append(batch.Events, e)
	}
	if err := p.store.Commit(context.Background(), batch); err != nil {
		t.Fatal(err)
	}
	p.restart()
	p.want(of("IBMid-1"), 2500, last)
}

// A login that began earlier may be recorded later than one that was counted
// and written in between.
func TestALoginThatTookLongerThanTheNextOneIsCountedAfterAKill(t *testing.T) {
	p := start(t)
	now := time.Now()
	p.happen(login("IBMid-fast", "ApiKey-fast", now))
	p.flush()
	p.happen(login("IBMid-slow", "ApiKey-slow", now.Add(-20*time.Second)))
	p.restart()
	p.want(of("IBMid-fast"), 1, now)
	p.want(of("IBMid-slow"), 1, now.Add(-20*time.Second))
	p.want("ApiKey-slow", 1, now.Add(-20*time.Second))
}

func TestPermitsAreWrittenAndThoseOfTheLastMomentsMayBeLost(t *testing.T) {
	p := start(t)
	now := time.Now()
	p.Permit("policy-1", now)
	p.Permit("policy-1", now.Add(time.Second))
	p.flush()
	p.Permit("policy-1", now.Add(2*time.Second))
	p.want("policy-1", 3, now.Add(2*time.Second))
	p.restart()
	p.want("policy-1", 2, now.Add(time.Second))
}

// Between two batches of one write there is a moment in which some counts are
// written and the mark is not.
func TestAKillBetweenTwoBatchesCountsNothingTwiceAndLosesNothing(t *testing.T) {
	const ids = 1234 // two full batches and one more
	p := start(t)
	now := time.Now()
	var all []*activity.Event
	for n := range ids {
		all = append(all, login(fmt.Sprintf("IBMid-%d", n), "", now.Add(time.Duration(n))))
	}
	p.happen(all...)
	check := func() {
		t.Helper()
		for n := range ids {
			p.want(of(fmt.Sprintf("IBMid-%d", n)), 1, now.Add(time.Duration(n)))
		}
	}
	for succeed := range 4 {
		p.store.failAfter(succeed)
		// What a write that failed has left to the next one is less each time.
		if err := p.Flush(context.Background()); succeed < 2 && err == nil {
			t.Fatalf("the write went on after %d batches", succeed)
		}
		check()
		p.restart()
		check()
	}
	if n := p.dir.Usage.Len(); n != ids+2 {
		t.Errorf("%d records, want %d, the mark, and since when permits are counted", n, ids)
	}
}

func TestAWriteThatFailedIsMadeUpFor(t *testing.T) {
	p := start(t)
	now := time.Now()
	p.happen(login("IBMid-1", "", now))
	p.Permit("policy-1", now)
	p.store.failAfter(0)
	if err := p.Flush(context.Background()); err == nil {
		t.Fatal("no error")
	}
	p.store.failAfter(-1)
	p.flush()
	p.flush() // nothing is left
	p.restart()
	p.want(of("IBMid-1"), 1, now)
	p.want("policy-1", 1, now)
}

func TestRunWritesUntilItIsEnded(t *testing.T) {
	p := start(t)
	tracker, err := usage.Open(t.Context(), usage.Config{Directory: p.dir, Log: slog.New(slog.DiscardHandler), Now: time.Now, Every: time.Millisecond}, p.store)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { tracker.Run(ctx); close(done) }()
	tracker.Permit("policy-1", time.Now())
	for deadline := time.Now().Add(10 * time.Second); p.dir.Usage.Len() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing was written")
		}
	}
	cancel()
	<-done
}

func TestAnUnreadableLogIsAnError(t *testing.T) {
	p := start(t)
	if err := p.store.Commit(context.Background(), store.Batch{Events: []store.Event{{Time: time.Now(), Outcome: activity.Success, Doc: []byte("{")}}}); err != nil {
		t.Fatal(err)
	}
	for name, log := range map[string]usage.Log{"a broken event": p.store, "a broken store": broken{}} {
		if _, err := usage.Open(t.Context(), usage.Config{Directory: p.dir, Log: slog.New(slog.DiscardHandler), Now: time.Now}, log); err == nil || !strings.Contains(err.Error(), "login") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type broken struct{}

func (broken) Events(context.Context, store.Query) ([]store.StoredEvent, error) {
	return nil, errors.New("broken")
}

// Logins from many sides while counts are written; then a kill at some moment.
// Every identity logs in from one side only, as the promise demands.
func TestNoLoginIsLostOrCountedTwiceUnderConcurrency(t *testing.T) {
	p := start(t)
	const sides, rounds = 8, 40
	var mu sync.Mutex
	wanted := map[string]int64{}
	for range 3 {
		stop := make(chan struct{})
		var writer, users sync.WaitGroup
		writer.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					_ = p.Flush(context.Background())
					time.Sleep(time.Millisecond)
				}
			}
		})
		for side := range sides {
			users.Go(func() {
				r := rand.New(rand.NewPCG(uint64(side), 1))
				for range rounds {
					id := fmt.Sprintf("IBMid-%d-%d", side, r.IntN(3))
					p.happen(login(id, "ApiKey-"+id, time.Now()))
					p.Permit("policy", time.Now())
					p.Of(of(id))
					mu.Lock()
					wanted[of(id)]++
					wanted["ApiKey-"+id]++
					mu.Unlock()
				}
			})
		}
		users.Wait()
		close(stop)
		writer.Wait()
		for _, again := range []bool{false, true} {
			if again {
				p.restart()
			}
			for _, id := range slices.Sorted(maps.Keys(wanted)) {
				if n, _ := p.Of(id); n != wanted[id] {
					t.Errorf("%s was used %d times, want %d (after a kill: %t)", id, n, wanted[id], again)
				}
			}
		}
	}
}
