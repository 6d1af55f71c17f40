// Package storetest is the contract of [store.Store] as a test suite: one test
// for each sentence of its documentation, run against every implementation.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

// Open opens the store that a test works on. Called again after Close in the
// same test, it opens the same data again.
type Open func(t *testing.T) store.Store

// Run holds an implementation to the contract. fresh is called once for each
// test and returns the test's own data, empty at first.
func Run(t *testing.T, fresh func(t *testing.T) Open) {
	for _, tt := range []struct {
		name string
		run  func(t *testing.T, open Open)
	}{
		{"a new store is empty", newIsEmpty},
		{"what was committed is loaded", loadsWhatWasCommitted},
		{"documents are kept byte for byte", keepsDocuments},
		{"the same id in two kinds is two objects", kindsAreApart},
		{"loading stops at the first error", loadStops},
		{"loading stops when its context ends", loadCancelled},
		{"an object that exists is not created again", createTwice},
		{"an object that does not exist is not changed", changeAbsent},
		{"a change needs the revision of now", changeStale},
		{"a deletion needs the revision of now", deleteStale},
		{"a deleted object can be created again", createAfterDelete},
		{"an object can change twice in one batch", changeTwiceInABatch},
		{"a failed batch leaves nothing behind", failedBatchLeavesNothing},
		{"a unique key belongs to one object", uniqueKey},
		{"an object keeps its unique key when it changes", uniqueKeyKept},
		{"a change frees the unique keys it gives up", uniqueKeyFreedByChange},
		{"a deletion frees the unique keys", uniqueKeyFreedByDelete},
		{"a unique key passes from one object to another in one batch", uniqueKeyHandedOver},
		{"a failed batch takes no unique key and frees none", failedBatchKeepsKeys},
		{"two objects in one batch cannot hold one unique key", uniqueKeyTwiceInABatch},
		{"a unique key is any text", uniqueKeyAnyText},
		{"an empty batch is no error", emptyBatch},
		{"everything is there after reopening", reopen},
		{"unique keys hold after reopening", reopenUnique},
		{"events go on after reopening", reopenEvents},
		{"a cancelled caller leaves all or nothing", cancelledCommit},
		{"a closed store refuses", closed},

		{"events come newest first", eventsNewestFirst},
		{"an event's document is kept byte for byte", eventDocuments},
		{"events of one account only", eventsOfAnAccount},
		{"events by action, outcome and correlation", eventFilters},
		{"since is inclusive and until exclusive", eventTimes},
		{"events of several days", eventsAcrossDays},
		{"pages cover every event once", eventPages},
		{"pages cover every event once while new ones arrive", eventPagesUnderWrites},
		{"one batch may hold events of many days in any order", eventsOfManyDaysInABatch},
		{"the last days of months follow each other", eventsAcrossMonths},
		{"positions grow in the order of commits", eventPositions},
		{"an event is stored with its change", eventWithChange},
		{"filters are compared as text", eventHostileFilters},
		{"events of the changes to one object", eventsOfAnObject},
		{"events of all accounts", eventsOfAllAccounts},
		{"an event has its exact time", eventTimeExact},

		{"events by severity, initiator, identity and target", eventColumns},
		{"events by the beginning of their action", eventPrefixes},
		{"queries find what a look at each event finds", queriesAgree},
		{"pages are stable while events come and days go", pagesWhileDaysGo},
		{"the log is followed to its end", followToTheEnd},

		{"the log is one sequence with a tree over it", logIsASequence},
		{"a failed batch leaves nothing in the log", logOfAFailedBatch},
		{"whoever follows the log is told that it has grown", logGrows},
		{"a day is dropped as a whole, and what is left can be proved", logDropsADay},
		{"checkpoints are kept", logKeepsCheckpoints},
		{"the log thins its checkpoints out", logThinsCheckpointsOut},

		{"one of many concurrent creations wins", concurrentCreate},
		{"one of many concurrent claims of a unique key wins", concurrentUnique},
		{"no concurrent increment is lost", concurrentIncrements},
		{"no concurrent event is lost", concurrentEvents},
		{"a reader never sees half a batch", concurrentReaders},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.run(t, fresh(t)) })
	}
}

func begin(t *testing.T, open Open) store.Store {
	t.Helper()
	s := open(t)
	t.Cleanup(func() { closeIt(t, s) })
	return s
}

func closeIt(t *testing.T, s store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func put(kind, id string, expect int64, unique ...string) store.Put {
	return store.Put{
		Record: store.Record{Kind: kind, ID: id, Revision: expect + 1, Doc: fmt.Appendf(nil, `{"%s":%d}`, id, expect+1)},
		Expect: expect, Unique: unique,
	}
}

func del(kind, id string, expect int64) store.Delete {
	return store.Delete{Kind: kind, ID: id, Expect: expect}
}

func puts(p ...store.Put) store.Batch { return store.Batch{Puts: p} }

func commit(t *testing.T, s store.Store, b store.Batch) {
	t.Helper()
	if err := s.Commit(context.Background(), b); err != nil {
		t.Fatalf("commit: %v", err)
	}
}

func stale(t *testing.T, s store.Store, b store.Batch) {
	t.Helper()
	if err := s.Commit(context.Background(), b); !errors.Is(err, store.ErrStale) {
		t.Fatalf("error %v, want ErrStale", err)
	}
}

func taken(t *testing.T, s store.Store, key string, b store.Batch) {
	t.Helper()
	err := s.Commit(context.Background(), b)
	var e *store.TakenError
	if !errors.As(err, &e) || e.Key != key {
		t.Fatalf("error %v, want a TakenError for %q", err, key)
	}
}

// objects returns everything that is loaded, as "kind/id@revision document".
func objects(t *testing.T, s store.Store) []string {
	t.Helper()
	out := []string{}
	err := s.Load(context.Background(), func(r store.Record) error {
		out = append(out, fmt.Sprintf("%s/%s@%d %s", r.Kind, r.ID, r.Revision, r.Doc))
		return nil
	})
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	slices.Sort(out)
	return out
}

func wantObjects(t *testing.T, s store.Store, want ...string) {
	t.Helper()
	if got := objects(t, s); !slices.Equal(got, want) {
		t.Fatalf("objects %q, want %q", got, want)
	}
}

func newIsEmpty(t *testing.T, open Open) {
	s := begin(t, open)
	wantObjects(t, s)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10})
	wantEvents(t, s, store.Query{Limit: 10})
}

func loadsWhatWasCommitted(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0), put("k", "b", 0)))
	commit(t, s, puts(put("k", "a", 1)))
	wantObjects(t, s, `k/a@2 {"a":2}`, `k/b@1 {"b":1}`)
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "b", 1)}})
	wantObjects(t, s, `k/a@2 {"a":2}`)
}

func keepsDocuments(t *testing.T, open Open) {
	s := begin(t, open)
	docs := [][]byte{
		[]byte(`{}`), []byte("\x00\x01\xff\xfe"), []byte(`{"é":"\u0000"}`), []byte("'; DROP TABLE objects; --"),
		bytes.Repeat([]byte("x"), 1<<20),
	}
	var b store.Batch
	for i, doc := range docs {
		b.Puts = append(b.Puts, store.Put{Record: store.Record{Kind: "k", ID: fmt.Sprint(i), Revision: 1, Doc: doc}})
	}
	commit(t, s, b)
	seen := 0
	if err := s.Load(context.Background(), func(r store.Record) error {
		for i, doc := range docs {
			if r.ID == fmt.Sprint(i) && bytes.Equal(r.Doc, doc) {
				seen++
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if seen != len(docs) {
		t.Errorf("%d of %d documents are as they were", seen, len(docs))
	}
}

func kindsAreApart(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k1", "a", 0), put("k2", "a", 0)))
	commit(t, s, puts(put("k1", "a", 1)))
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k2", "a", 1)}})
	wantObjects(t, s, `k1/a@2 {"a":2}`)
}

func loadStops(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0), put("k", "b", 0), put("k", "c", 0)))
	calls, stop := 0, errors.New("stop")
	err := s.Load(context.Background(), func(store.Record) error {
		calls++
		return stop
	})
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("error %v after %d calls", err, calls)
	}
	// The store goes on after that.
	commit(t, s, puts(put("k", "d", 0)))
	if got := objects(t, s); len(got) != 4 {
		t.Errorf("objects %q", got)
	}
}

func loadCancelled(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0)))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := s.Load(ctx, func(store.Record) error { return nil }); err == nil {
		t.Error("no error")
	}
}

func createTwice(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0)))
	stale(t, s, puts(put("k", "a", 0)))
	wantObjects(t, s, `k/a@1 {"a":1}`)
}

func changeAbsent(t *testing.T, open Open) {
	s := begin(t, open)
	stale(t, s, puts(put("k", "a", 1)))
	stale(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}})
	stale(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 0)}})
	wantObjects(t, s)
}

func changeStale(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0)))
	commit(t, s, puts(put("k", "a", 1)))
	stale(t, s, puts(put("k", "a", 1)))
	stale(t, s, puts(put("k", "a", 3)))
	wantObjects(t, s, `k/a@2 {"a":2}`)
}

func deleteStale(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0)))
	commit(t, s, puts(put("k", "a", 1)))
	stale(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}})
	wantObjects(t, s, `k/a@2 {"a":2}`)
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 2)}})
	stale(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 2)}})
}

func createAfterDelete(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "name")))
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}})
	commit(t, s, puts(put("k", "a", 0, "name")))
	wantObjects(t, s, `k/a@1 {"a":1}`)
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}, Puts: []store.Put{put("k", "a", 0, "name")}})
	wantObjects(t, s, `k/a@1 {"a":1}`)
}

func changeTwiceInABatch(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0), put("k", "a", 1)))
	wantObjects(t, s, `k/a@2 {"a":2}`)
	stale(t, s, puts(put("k", "a", 2), put("k", "a", 2)))
	wantObjects(t, s, `k/a@2 {"a":2}`)
}

func failedBatchLeavesNothing(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0), put("k", "b", 0)))
	event := at(time.Now(), "a")
	b := store.Batch{
		Deletes: []store.Delete{del("k", "b", 1)},
		Puts:    []store.Put{put("k", "c", 0, "c"), put("k", "a", 1), put("k", "absent", 7)},
		Events:  []store.Event{event},
	}
	stale(t, s, b)
	wantObjects(t, s, `k/a@1 {"a":1}`, `k/b@1 {"b":1}`)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10})
	b.Puts = b.Puts[:2]
	commit(t, s, b)
	wantObjects(t, s, `k/a@2 {"a":2}`, `k/c@1 {"c":1}`)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, event)
}

func uniqueKey(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x", "y")))
	taken(t, s, "x", puts(put("k", "b", 0, "x")))
	taken(t, s, "y", puts(put("k", "b", 0, "z", "y")))
	taken(t, s, "y", puts(put("other", "b", 0, "y")))
	commit(t, s, puts(put("k", "b", 0, "z")))
	taken(t, s, "x", puts(put("k", "b", 1, "x")))
	wantObjects(t, s, `k/a@1 {"a":1}`, `k/b@1 {"b":1}`)
}

func uniqueKeyKept(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x")))
	commit(t, s, puts(put("k", "a", 1, "x")))
	taken(t, s, "x", puts(put("k", "b", 0, "x")))
}

func uniqueKeyFreedByChange(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x", "y")))
	commit(t, s, puts(put("k", "a", 1, "y", "z")))
	commit(t, s, puts(put("k", "b", 0, "x")))
	taken(t, s, "z", puts(put("k", "c", 0, "z")))
	commit(t, s, puts(put("k", "a", 2)))
	commit(t, s, puts(put("k", "c", 0, "y", "z")))
}

func uniqueKeyFreedByDelete(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x", "y")))
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}})
	commit(t, s, puts(put("k", "b", 0, "x"), put("k", "c", 0, "y")))
}

func uniqueKeyHandedOver(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x")))
	commit(t, s, puts(put("k", "a", 1, "y"), put("k", "b", 0, "x")))
	taken(t, s, "x", puts(put("k", "c", 0, "x")))
	commit(t, s, store.Batch{Deletes: []store.Delete{del("k", "b", 1)}, Puts: []store.Put{put("k", "c", 0, "x")}})
	taken(t, s, "x", puts(put("k", "d", 0, "x")))
}

func failedBatchKeepsKeys(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0, "x")))
	stale(t, s, puts(put("k", "a", 1, "y"), put("k", "b", 5)))
	taken(t, s, "x", puts(put("k", "c", 0, "x")))
	commit(t, s, puts(put("k", "c", 0, "y")))
	stale(t, s, store.Batch{Deletes: []store.Delete{del("k", "a", 1)}, Puts: []store.Put{put("k", "b", 5)}})
	taken(t, s, "x", puts(put("k", "d", 0, "x")))
}

func uniqueKeyTwiceInABatch(t *testing.T, open Open) {
	s := begin(t, open)
	taken(t, s, "x", puts(put("k", "a", 0, "x"), put("k", "b", 0, "x")))
	wantObjects(t, s)
	commit(t, s, puts(put("k", "c", 0, "x")))
}

func uniqueKeyAnyText(t *testing.T, open Open) {
	s := begin(t, open)
	keys := []string{"a\x00b", "a\x00c", "a", "A", "é", "e\u0301", "", " a", "a ", "%", "_", "'", strings.Repeat("x", 4096), "1", "01"}
	for i, key := range keys {
		commit(t, s, puts(put("k", fmt.Sprint(i), 0, key)))
	}
	for _, key := range keys {
		taken(t, s, key, puts(put("k", "more", 0, key)))
	}
}

func emptyBatch(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, store.Batch{})
	wantObjects(t, s)
}

func reopen(t *testing.T, open Open) {
	s := open(t)
	event := at(time.Now(), "a")
	commit(t, s, store.Batch{Puts: []store.Put{put("k", "a", 0), put("k", "b", 0)}, Events: []store.Event{event}})
	commit(t, s, puts(put("k", "a", 1)))
	closeIt(t, s)
	for range 2 {
		s = open(t)
		wantObjects(t, s, `k/a@2 {"a":2}`, `k/b@1 {"b":1}`)
		wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, event)
		closeIt(t, s)
	}
}

func reopenUnique(t *testing.T, open Open) {
	s := open(t)
	commit(t, s, puts(put("k", "a", 0, "x")))
	closeIt(t, s)
	s = begin(t, open)
	taken(t, s, "x", puts(put("k", "b", 0, "x")))
	stale(t, s, puts(put("k", "a", 0)))
	commit(t, s, puts(put("k", "a", 1)))
	commit(t, s, puts(put("k", "b", 0, "x")))
}

func reopenEvents(t *testing.T, open Open) {
	now := time.Now()
	s := open(t)
	first := at(now, "a")
	commit(t, s, store.Batch{Events: []store.Event{first}})
	before := events(t, s, store.Query{AccountID: "a", Limit: 1})[0].Position
	closeIt(t, s)
	s = begin(t, open)
	second := at(now, "a")
	commit(t, s, store.Batch{Events: []store.Event{second}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, second, first)
	if after := events(t, s, store.Query{AccountID: "a", Limit: 1})[0].Position; after.Day == before.Day && after.Seq <= before.Seq {
		t.Errorf("position %s after %s", after, before)
	}
}

// Whatever the caller's context does, the batch is there as a whole or not at
// all, and the error tells: an error means that the caller may not count on it.
func cancelledCommit(t *testing.T, open Open) {
	s := begin(t, open)
	for i := range 200 {
		ctx, cancel := context.WithCancel(context.Background())
		go func() {
			time.Sleep(time.Duration(i) * 5 * time.Microsecond)
			cancel()
		}()
		a, b := fmt.Sprintf("a%03d", i), fmt.Sprintf("b%03d", i)
		err := s.Commit(ctx, store.Batch{
			Puts: []store.Put{put("k", a, 0), put("k", b, 0)}, Events: []store.Event{at(time.Now(), a)},
		})
		cancel()
		found := 0
		for _, o := range objects(t, s) {
			if strings.HasPrefix(o, "k/"+a+"@") || strings.HasPrefix(o, "k/"+b+"@") {
				found++
			}
		}
		found += len(events(t, s, store.Query{AccountID: a, Limit: 10}))
		if err == nil && found != 3 || found != 0 && found != 3 {
			t.Fatalf("error %v, and %d of 3 parts are there", err, found)
		}
	}
	commit(t, s, puts(put("k", "last", 0)))
}

func closed(t *testing.T, open Open) {
	s := open(t)
	closeIt(t, s)
	ctx := context.Background()
	if err := s.Commit(ctx, puts(put("k", "a", 0))); err == nil {
		t.Error("Commit after Close succeeded")
	}
	if err := s.Load(ctx, func(store.Record) error { return nil }); err == nil {
		t.Error("Load after Close succeeded")
	}
	if _, err := s.Events(ctx, store.Query{Limit: 1}); err == nil {
		t.Error("Events after Close succeeded")
	}
	s = begin(t, open)
	wantObjects(t, s)
}

var number atomic.Int64

// at returns an event of an account that no other test has.
func at(when time.Time, account string) store.Event {
	n := number.Add(1)
	return store.Event{
		Time: when, AccountID: account, CorrelationID: fmt.Sprint("c", n), Action: "x.y.create", Outcome: activity.Success,
		Doc: fmt.Appendf(nil, `{"n":%d}`, n),
	}
}

func events(t *testing.T, s store.Store, q store.Query) []store.StoredEvent {
	t.Helper()
	got, err := s.Events(context.Background(), q)
	if err != nil {
		t.Fatalf("events: %v", err)
	}
	return got
}

func docs(list []store.StoredEvent) []string {
	out := make([]string, len(list))
	for i, e := range list {
		out[i] = string(e.Doc)
	}
	return out
}

// wantEvents demands exactly these events in this order.
func wantEvents(t *testing.T, s store.Store, q store.Query, want ...store.Event) {
	t.Helper()
	wanted := make([]string, len(want))
	for i, e := range want {
		wanted[i] = string(e.Doc)
	}
	if got := docs(events(t, s, q)); !slices.Equal(got, wanted) {
		t.Fatalf("query %+v: events %q, want %q", q, got, wanted)
	}
}

func eventsNewestFirst(t *testing.T, open Open) {
	s := begin(t, open)
	now := noon()
	a, b, c := at(now, "a"), at(now, "a"), at(now, "a")
	commit(t, s, store.Batch{Events: []store.Event{a}})
	commit(t, s, store.Batch{Events: []store.Event{b, c}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, c, b, a)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 2}, c, b)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 1}, c)
}

func eventDocuments(t *testing.T, open Open) {
	s := begin(t, open)
	e := at(noon(), "a")
	e.Doc = []byte("{\"text\":\"\x00\xff é '; DROP TABLE events; --\"}")
	commit(t, s, store.Batch{Events: []store.Event{e}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 1}, e)
}

func eventsOfAnAccount(t *testing.T, open Open) {
	s := begin(t, open)
	a, b, none := at(noon(), "a"), at(noon(), "b"), at(noon(), "")
	commit(t, s, store.Batch{Events: []store.Event{a, b, none}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, a)
	wantEvents(t, s, store.Query{AccountID: "b", Limit: 10}, b)
	wantEvents(t, s, store.Query{AccountID: "", Limit: 10}, none)
	wantEvents(t, s, store.Query{AccountID: "c", Limit: 10})
	wantEvents(t, s, store.Query{AccountID: "A", Limit: 10})
	wantEvents(t, s, store.Query{AccountID: "b", CorrelationID: a.CorrelationID, Limit: 10})
}

func eventFilters(t *testing.T, open Open) {
	s := begin(t, open)
	a, b, c := at(noon(), "a"), at(noon(), "a"), at(noon(), "a")
	b.Action, c.Outcome = "x.y.delete", activity.Failure
	c.CorrelationID = a.CorrelationID
	commit(t, s, store.Batch{Events: []store.Event{a, b, c}})
	q := func(change func(*store.Query)) store.Query {
		q := store.Query{AccountID: "a", Limit: 10}
		change(&q)
		return q
	}
	wantEvents(t, s, q(func(q *store.Query) { q.Action = "x.y.create" }), c, a)
	wantEvents(t, s, q(func(q *store.Query) { q.Action = "x.y.delete" }), b)
	wantEvents(t, s, q(func(q *store.Query) { q.Action = "x.y" }))
	wantEvents(t, s, q(func(q *store.Query) { q.Outcome = activity.Failure }), c)
	wantEvents(t, s, q(func(q *store.Query) { q.CorrelationID = a.CorrelationID }), c, a)
	wantEvents(t, s, q(func(q *store.Query) { q.CorrelationID, q.Outcome = a.CorrelationID, activity.Success }), a)
	wantEvents(t, s, q(func(q *store.Query) { q.Action, q.Outcome = "x.y.delete", activity.Failure }))
}

// changed is an event of an account about the change of an object.
func changed(when time.Time, account, object string) store.Event {
	e := at(when, account)
	e.Changed = object
	return e
}

func eventsOfAnObject(t *testing.T, open Open) {
	s := open(t)
	day := noon().AddDate(0, 0, -1)
	odd := []string{"crn:v1:x:y:s::a/1::t:r", "crn:v1:x:y:s::a/1::t:R", "crn:v1:x:y:s::a/1::t:r ", "crn:v1:x:y:s::a/1::t:r%", "'; DROP TABLE objects; --", "é\x00"}
	var made []store.Event
	for _, object := range odd {
		made = append(made, changed(day, "a", object))
	}
	plain := at(day, "a")
	elsewhere := changed(day, "b", odd[0])
	late, failed := changed(noon(), "a", odd[0]), changed(noon(), "a", odd[0])
	late.Action, failed.Outcome = "x.y.delete", activity.Failure
	commit(t, s, store.Batch{Events: append(slices.Clone(made), plain, elsewhere)})
	commit(t, s, store.Batch{Events: []store.Event{late}})
	commit(t, s, store.Batch{Events: []store.Event{failed}})
	for range 2 {
		for i, object := range odd[1:] {
			wantEvents(t, s, store.Query{AccountID: "a", Changed: object, Limit: 10}, made[i+1])
		}
		q := store.Query{AccountID: "a", Changed: odd[0], Limit: 10}
		wantEvents(t, s, q, failed, late, made[0])
		wantEvents(t, s, store.Query{AccountID: "b", Changed: odd[0], Limit: 10}, elsewhere)
		wantEvents(t, s, store.Query{AllAccounts: true, Changed: odd[0], Limit: 10}, failed, late, elsewhere, made[0])
		wantEvents(t, s, store.Query{AccountID: "a", Changed: "crn:v1:x:y:s::a/1::t:other", Limit: 10})
		wantEvents(t, s, store.Query{AccountID: "a", Changed: odd[0], Outcome: activity.Success, Limit: 10}, late, made[0])
		wantEvents(t, s, store.Query{AccountID: "a", Changed: odd[0], Action: "x.y.delete", Limit: 10}, late)
		wantEvents(t, s, store.Query{AccountID: "a", Changed: odd[0], Until: noon(), Limit: 10}, made[0])
		wantEvents(t, s, store.Query{AccountID: "a", Changed: odd[0], Limit: 1}, failed)
		q.Limit = 1
		if got := walk(t, s, q); len(got) != 3 {
			t.Errorf("pages of one: %q", got)
		}
		// Without the filter, all of them are there.
		if got := events(t, s, store.Query{AccountID: "a", Limit: 100}); len(got) != len(odd)+3 {
			t.Errorf("%d events of the account", len(got))
		}
		closeIt(t, s)
		s = open(t)
	}
	// A large batch keeps apart what belongs to which object.
	var many []store.Event
	for i := range 100 {
		object := fmt.Sprintf("crn:%d", i%7)
		if i%7 == 6 {
			object = ""
		}
		many = append(many, changed(noon().AddDate(0, 0, 1), "c", object))
	}
	commit(t, s, store.Batch{Events: many})
	for i := range 6 {
		var want []store.Event
		for n := len(many) - 1; n >= 0; n-- {
			if n%7 == i {
				want = append(want, many[n])
			}
		}
		wantEvents(t, s, store.Query{AccountID: "c", Changed: fmt.Sprintf("crn:%d", i), Limit: 100}, want...)
	}
	closeIt(t, s)
}

func eventsOfAllAccounts(t *testing.T, open Open) {
	s := begin(t, open)
	a, b, none := at(noon(), "a"), at(noon(), "b"), at(noon(), "")
	next := at(noon().AddDate(0, 0, 1), "b")
	b.Outcome = activity.Failure
	commit(t, s, store.Batch{Events: []store.Event{a, b, none, next}})
	all := store.Query{AllAccounts: true, Limit: 10}
	wantEvents(t, s, all, next, none, b, a)
	all.AccountID = "a" // does not narrow it
	wantEvents(t, s, all, next, none, b, a)
	wantEvents(t, s, store.Query{AllAccounts: true, Outcome: activity.Success, Limit: 10}, next, none, a)
	wantEvents(t, s, store.Query{AllAccounts: true, Since: next.Time, Limit: 10}, next)
	wantEvents(t, s, store.Query{AllAccounts: true, CorrelationID: b.CorrelationID, Limit: 10}, b)
	if got := walk(t, s, store.Query{AllAccounts: true, Limit: 1}); len(got) != 4 {
		t.Errorf("pages of one: %q", got)
	}
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, a)
}

func eventTimeExact(t *testing.T, open Open) {
	s := begin(t, open)
	when := time.Date(2026, time.June, 15, 12, 0, 0, 123456789, time.FixedZone("", 7200))
	commit(t, s, store.Batch{Events: []store.Event{at(when, "a")}})
	if got := events(t, s, store.Query{AccountID: "a", Limit: 1})[0].Time; !got.Equal(when) || got.Location() != time.UTC {
		t.Errorf("time %s, want %s in UTC", got, when)
	}
}

func eventTimes(t *testing.T, open Open) {
	s := begin(t, open)
	now := noon()
	var list []store.Event
	for i := range 4 {
		list = append(list, at(now.Add(time.Duration(i)*time.Millisecond), "a"))
	}
	commit(t, s, store.Batch{Events: list})
	when := func(i int) time.Time { return list[i].Time }
	wantEvents(t, s, store.Query{AccountID: "a", Since: when(2), Limit: 10}, list[3], list[2])
	wantEvents(t, s, store.Query{AccountID: "a", Until: when(2), Limit: 10}, list[1], list[0])
	wantEvents(t, s, store.Query{AccountID: "a", Since: when(1), Until: when(3), Limit: 10}, list[2], list[1])
	wantEvents(t, s, store.Query{AccountID: "a", Since: when(2), Until: when(2), Limit: 10})
	wantEvents(t, s, store.Query{AccountID: "a", Since: when(1).Add(1), Until: when(2).Add(1), Limit: 10}, list[2])
	// The same instants told in another zone.
	zone := time.FixedZone("", -11*3600)
	wantEvents(t, s, store.Query{AccountID: "a", Since: when(1).In(zone), Until: when(3).In(zone), Limit: 10}, list[2], list[1])
}

// noon is far from both ends of a day.
func noon() time.Time { return time.Date(2026, time.June, 15, 12, 0, 0, 0, time.UTC) }

func eventsAcrossDays(t *testing.T, open Open) {
	s := begin(t, open)
	midnight := time.Date(2026, time.June, 15, 0, 0, 0, 0, time.UTC)
	monday, tuesday := at(midnight.Add(-time.Nanosecond), "a"), at(midnight, "a")
	commit(t, s, store.Batch{Events: []store.Event{monday}})
	commit(t, s, store.Batch{Events: []store.Event{tuesday}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, tuesday, monday)
	wantEvents(t, s, store.Query{AccountID: "a", Since: midnight, Limit: 10}, tuesday)
	wantEvents(t, s, store.Query{AccountID: "a", Until: midnight, Limit: 10}, monday)
	got := events(t, s, store.Query{AccountID: "a", Limit: 10})
	if got[0].Position.Day != 20260615 || got[1].Position.Day != 20260614 {
		t.Errorf("positions %s and %s", got[0].Position, got[1].Position)
	}
	// A zone ahead of UTC has another date, not another day.
	ahead := at(midnight.Add(-time.Hour).In(time.FixedZone("", 14*3600)), "a")
	commit(t, s, store.Batch{Events: []store.Event{ahead}})
	if got := events(t, s, store.Query{AccountID: "a", CorrelationID: ahead.CorrelationID, Limit: 1})[0]; got.Position.Day != 20260614 {
		t.Errorf("position %s", got.Position)
	}
	// An event that comes late stands in its own day.
	late := at(midnight.AddDate(0, 0, -9), "a")
	commit(t, s, store.Batch{Events: []store.Event{late}})
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, tuesday, ahead, monday, late)
}

// walk follows the pages and returns the documents in order.
func walk(t *testing.T, s store.Store, q store.Query) []string {
	t.Helper()
	var out []string
	for range 1000 {
		page := events(t, s, q)
		if len(page) > q.Limit {
			t.Fatalf("a page of %d events, want at most %d", len(page), q.Limit)
		}
		out = append(out, docs(page)...)
		if len(page) < q.Limit {
			return out
		}
		q.Before = page[len(page)-1].Position
	}
	t.Fatal("the pages do not end")
	return nil
}

func eventPages(t *testing.T, open Open) {
	s := begin(t, open)
	var want []string
	for i := range 60 {
		e := at(noon().AddDate(0, 0, i/7), "a")
		if i%3 == 0 {
			e.Action = "x.y.delete"
		}
		commit(t, s, store.Batch{Events: []store.Event{e, at(e.Time, "b")}})
		want = append(want, string(e.Doc))
	}
	slices.Reverse(want)
	var deletes []string
	for i, doc := range want {
		if (59-i)%3 == 0 {
			deletes = append(deletes, doc)
		}
	}
	for _, limit := range []int{1, 2, 7, 59, 60, 61} {
		if got := walk(t, s, store.Query{AccountID: "a", Limit: limit}); !slices.Equal(got, want) {
			t.Fatalf("pages of %d give %d events, want %d in their order", limit, len(got), len(want))
		}
		if got := walk(t, s, store.Query{AccountID: "a", Action: "x.y.delete", Limit: limit}); !slices.Equal(got, deletes) {
			t.Fatalf("filtered pages of %d give %d events, want %d in their order", limit, len(got), len(deletes))
		}
	}
}

func eventPagesUnderWrites(t *testing.T, open Open) {
	s := begin(t, open)
	var want []string
	for i := range 20 {
		e := at(noon().AddDate(0, 0, i/5), "a")
		commit(t, s, store.Batch{Events: []store.Event{e}})
		want = append(want, string(e.Doc))
	}
	slices.Reverse(want)
	q := store.Query{AccountID: "a", Limit: 3}
	var got []string
	for {
		page := events(t, s, q)
		got = append(got, docs(page)...)
		if len(page) < q.Limit {
			break
		}
		q.Before = page[len(page)-1].Position
		commit(t, s, store.Batch{Events: []store.Event{at(noon().AddDate(0, 0, 3), "a"), at(noon().AddDate(0, 0, 4), "a")}})
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d events %q, want %d %q", len(got), got, len(want), want)
	}
}

func eventsOfManyDaysInABatch(t *testing.T, open Open) {
	s := begin(t, open)
	var list, sorted []store.Event
	for _, days := range []int{-40, 0, -1, -3, 1, -40, 30, -2} {
		list = append(list, at(noon().AddDate(0, 0, days), "a"))
	}
	for range 2 { // with the days new, and then known
		commit(t, s, store.Batch{Events: list})
		sorted = append(sorted, list...)
	}
	slices.SortStableFunc(sorted, func(a, b store.Event) int { return a.Time.Compare(b.Time) })
	slices.Reverse(sorted)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 100}, sorted...)
}

// A group of events is often committed just after midnight with the last ones
// of the day before in it, at the end of a month and of a year too.
func eventsAcrossMonths(t *testing.T, open Open) {
	s := begin(t, open)
	var want []store.Event
	for _, midnight := range []time.Time{
		time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2026, time.February, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2026, time.March, 1, 0, 0, 0, 0, time.UTC),
		time.Date(2028, time.February, 29, 0, 0, 0, 0, time.UTC),
	} {
		before, after := at(midnight.Add(-time.Millisecond), "a"), at(midnight, "a")
		commit(t, s, store.Batch{Events: []store.Event{before, after}})
		late := at(midnight.Add(-time.Microsecond), "a")
		commit(t, s, store.Batch{Events: []store.Event{late}})
		want = append(want, before, late, after)
	}
	slices.Reverse(want)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 100}, want...)
}

func eventPositions(t *testing.T, open Open) {
	s := begin(t, open)
	var last store.Position
	for range 20 {
		commit(t, s, store.Batch{Events: []store.Event{at(noon(), "a"), at(noon(), "b")}})
		p := events(t, s, store.Query{AccountID: "a", Limit: 1})[0].Position
		if p.IsZero() || p.Day != 20260615 || p.Seq <= last.Seq {
			t.Fatalf("position %s after %s", p, last)
		}
		if again, err := store.ParsePosition(p.String()); err != nil || again != p {
			t.Fatalf("%s parses as %s, %v", p, again, err)
		}
		last = p
	}
	wantEvents(t, s, store.Query{AccountID: "a", Before: store.Position{Day: 20260615, Seq: 1}, Limit: 10})
	if got := events(t, s, store.Query{AccountID: "a", Before: store.Position{Day: 20260616, Seq: 1}, Limit: 100}); len(got) != 20 {
		t.Errorf("%d events before the next day, want 20", len(got))
	}
	wantEvents(t, s, store.Query{AccountID: "a", Before: store.Position{Day: 20260614, Seq: 1 << 60}, Limit: 10})
}

func eventWithChange(t *testing.T, open Open) {
	s := begin(t, open)
	e := at(noon(), "a")
	commit(t, s, store.Batch{Puts: []store.Put{put("k", "a", 0, "x")}, Events: []store.Event{e}})
	lost := store.Batch{Puts: []store.Put{put("k", "b", 0, "x")}, Events: []store.Event{at(noon(), "a")}}
	taken(t, s, "x", lost)
	wantEvents(t, s, store.Query{AccountID: "a", Limit: 10}, e)
}

func eventHostileFilters(t *testing.T, open Open) {
	s := begin(t, open)
	odd := at(noon(), "a' OR '1'='1")
	odd.Action, odd.CorrelationID = "x%", "c_\x00"
	commit(t, s, store.Batch{Events: []store.Event{at(noon(), "a"), odd}})
	wantEvents(t, s, store.Query{AccountID: odd.AccountID, Limit: 10}, odd)
	wantEvents(t, s, store.Query{AccountID: odd.AccountID, Action: odd.Action, CorrelationID: odd.CorrelationID, Limit: 10}, odd)
	for _, q := range []store.Query{
		{AccountID: "%"}, {AccountID: "a", Action: "%"}, {AccountID: "a", CorrelationID: "c%"}, {AccountID: "a", Outcome: "' OR 1=1 --"},
		{AccountID: "a'; DROP TABLE objects; --"},
	} {
		q.Limit = 10
		wantEvents(t, s, q)
	}
}

// together runs f in n goroutines at once and returns how many succeeded;
// every error must satisfy allowed.
func together(t *testing.T, n int, f func(i int) error, allowed func(error) bool) int {
	t.Helper()
	var wg sync.WaitGroup
	var won atomic.Int64
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			if err := f(i); err == nil {
				won.Add(1)
			} else if !allowed(err) {
				t.Errorf("unexpected error: %v", err)
			}
		})
	}
	close(start)
	wg.Wait()
	return int(won.Load())
}

func isStale(err error) bool { return errors.Is(err, store.ErrStale) }

func isTaken(err error) bool {
	var e *store.TakenError
	return errors.As(err, &e)
}

func never(error) bool { return false }

func concurrentCreate(t *testing.T, open Open) {
	s := begin(t, open)
	won := together(t, 16, func(int) error { return s.Commit(context.Background(), puts(put("k", "a", 0))) }, isStale)
	if won != 1 {
		t.Errorf("%d creations succeeded", won)
	}
	wantObjects(t, s, `k/a@1 {"a":1}`)
}

func concurrentUnique(t *testing.T, open Open) {
	s := begin(t, open)
	won := together(t, 16, func(i int) error {
		return s.Commit(context.Background(), puts(put("k", fmt.Sprint(i), 0, "x")))
	}, isTaken)
	if won != 1 || len(objects(t, s)) != 1 {
		t.Errorf("%d claims succeeded, objects %q", won, objects(t, s))
	}
}

func concurrentIncrements(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0)))
	const each = 20
	var revision atomic.Int64
	revision.Store(1)
	together(t, 4, func(int) error {
		for done := 0; done < each; {
			now := revision.Load()
			err := s.Commit(context.Background(), puts(put("k", "a", now)))
			if isStale(err) {
				continue
			}
			if err != nil {
				return err
			}
			revision.Store(now + 1)
			done++
		}
		return nil
	}, never)
	wantObjects(t, s, fmt.Sprintf(`k/a@%d {"a":%d}`, 1+4*each, 1+4*each))
}

func concurrentEvents(t *testing.T, open Open) {
	s := begin(t, open)
	const writers, each = 4, 25
	together(t, writers, func(i int) error {
		for n := range each {
			e := at(noon().AddDate(0, 0, n%3), "a")
			if err := s.Commit(context.Background(), store.Batch{Events: []store.Event{e}}); err != nil {
				return err
			}
			if _, err := s.Events(context.Background(), store.Query{AccountID: "a", Limit: 5}); err != nil {
				return err
			}
		}
		return nil
	}, never)
	got := walk(t, s, store.Query{AccountID: "a", Limit: 9})
	slices.Sort(got)
	if n := len(slices.Compact(got)); n != writers*each {
		t.Errorf("%d different events, want %d", n, writers*each)
	}
}

func concurrentReaders(t *testing.T, open Open) {
	s := begin(t, open)
	commit(t, s, puts(put("k", "a", 0), put("k", "b", 0)))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			revisions := map[int64]int{}
			if err := s.Load(context.Background(), func(r store.Record) error {
				revisions[r.Revision]++
				return nil
			}); err != nil {
				t.Errorf("load: %v", err)
				return
			}
			if len(revisions) != 1 {
				t.Errorf("revisions %v of two objects that change together", revisions)
				return
			}
		}
	})
	for n := int64(1); n <= 100; n++ {
		commit(t, s, puts(put("k", "a", n), put("k", "b", n)))
	}
	close(stop)
	wg.Wait()
}
