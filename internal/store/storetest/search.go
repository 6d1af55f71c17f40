package storetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

func eventColumns(t *testing.T, open Open) {
	s := begin(t, open)
	base := at(noon(), "a")
	base.Severity, base.Initiator, base.Authn, base.Target = activity.Normal, "i", "n", "t"
	vary := func(change func(*store.Event)) store.Event {
		e := at(noon(), "a")
		e.Severity, e.Initiator, e.Authn, e.Target = base.Severity, base.Initiator, base.Authn, base.Target
		change(&e)
		return e
	}
	severity := vary(func(e *store.Event) { e.Severity = activity.Critical })
	initiator := vary(func(e *store.Event) { e.Initiator = "i%" })
	authn := vary(func(e *store.Event) { e.Authn = "N" })
	target := vary(func(e *store.Event) { e.Target = "t\x00' OR 1 --" })
	theirs := vary(func(e *store.Event) { e.AccountID, e.Target = "b", target.Target })
	commit(t, s, store.Batch{Events: []store.Event{base, severity, initiator, authn, target, theirs}})
	wantEvents(t, s, store.Query{AccountID: "a", Severity: activity.Critical, Limit: 10}, severity)
	wantEvents(t, s, store.Query{AccountID: "a", Initiator: "i%", Limit: 10}, initiator)
	wantEvents(t, s, store.Query{AccountID: "a", Authn: "N", Limit: 10}, authn)
	wantEvents(t, s, store.Query{AccountID: "a", Target: target.Target, Limit: 10}, target)
	wantEvents(t, s, store.Query{AllAccounts: true, Target: target.Target, Limit: 10}, theirs, target)
	wantEvents(t, s, store.Query{AccountID: "a", Severity: activity.Normal, Initiator: "i", Authn: "n", Target: "t", Limit: 10}, base)
	wantEvents(t, s, store.Query{AccountID: "a", Severity: activity.Critical, Initiator: "i%", Limit: 10})
}

func eventPrefixes(t *testing.T, open Open) {
	s := begin(t, open)
	var made []store.Event
	for _, action := range []string{"a.b", "a.b.create", "a.bc", "a.b\xff", "a.b\xff\xff", "a.c", "a", "a.B.create", "a.b%", "é.x", "\xff", "\xff\xff"} {
		e := at(noon(), "a")
		e.Action = action
		made = append(made, e)
	}
	commit(t, s, store.Batch{Events: made})
	for _, prefix := range []string{"a.b", "a.b.", "a.b\xff", "a.b\xff\xff", "a", "b", "é", "\xc3", "\xff", "\xff\xff", "a.b%", "%", "a_b"} {
		q := store.Query{AccountID: "a", ActionPrefix: prefix, Limit: 100}
		var want []store.Event
		for _, e := range slices.Backward(made) {
			if q.Matches(&e) {
				want = append(want, e)
			}
		}
		wantEvents(t, s, q, want...)
		q.Action = "a.b"
		want = slices.DeleteFunc(want, func(e store.Event) bool { return e.Action != "a.b" })
		wantEvents(t, s, q, want...)
	}
}

// Mix returns events with values that are frequent, rare and in between, over
// three days whose midnights are crossed by turns, and some that come late for
// a day long past.
func Mix(n int, seed uint64) []store.Event {
	r := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // the same each time
	pick := func(name string, values int) string {
		// Low numbers are frequent.
		return fmt.Sprint(name, int(float64(values)*r.Float64()*r.Float64()*r.Float64()))
	}
	out := make([]store.Event, n)
	span := 60 * time.Hour
	for i := range out {
		when := noon().Add(time.Duration(i) * span / time.Duration(n)).Add(time.Duration(r.IntN(4000)-2000) * time.Millisecond)
		if r.IntN(500) == 0 {
			when = noon().AddDate(0, 0, -9)
		}
		e := store.Event{
			Time: when, AccountID: pick("account", 3), CorrelationID: pick("tx", n), Action: pick("s", 3) + "." + pick("noun", 5) + "." + pick("verb", 4),
			Outcome: activity.Success, Severity: activity.Normal, Initiator: pick("initiator", 40), Target: pick("target", n/2),
			Doc: fmt.Appendf(nil, `{"n":%d}`, i),
		}
		if r.IntN(30) == 0 {
			e.Outcome, e.Severity = activity.Failure, activity.Warning
		}
		if r.IntN(2000) == 0 {
			e.Severity, e.AccountID = activity.Critical, ""
		}
		if r.IntN(3) == 0 {
			e.Authn = pick("authn", 1000)
		}
		if r.IntN(50) == 0 {
			e.Changed = pick("object", 100)
		}
		if r.IntN(20) == 0 {
			e.CorrelationID = "shared"
		}
		out[i] = e
	}
	return out
}

// Queries draws a query about events that Mix made.
func Queries(events []store.Event) *rapid.Generator[store.Query] {
	return rapid.Custom(func(t *rapid.T) store.Query {
		// Values of one event, so that something is found more often than not.
		e := events[rapid.IntRange(0, len(events)-1).Draw(t, "event")]
		q := store.Query{AccountID: e.AccountID, Limit: rapid.SampledFrom([]int{1, 3, 100, 5000}).Draw(t, "limit")}
		some := func(name string, one int) bool { return rapid.IntRange(0, one).Draw(t, name) == 0 }
		if some("all accounts", 3) {
			q.AccountID, q.AllAccounts = "", true
		}
		set := func(name string, into *string, value string) {
			if some(name, 4) {
				*into = value
				if some("other "+name, 9) {
					*into = "nothing has this"
				}
			}
		}
		set("action", &q.Action, e.Action)
		set("prefix", &q.ActionPrefix, e.Action[:rapid.IntRange(1, len(e.Action)).Draw(t, "length")])
		set("outcome", &q.Outcome, e.Outcome)
		set("severity", &q.Severity, e.Severity)
		set("initiator", &q.Initiator, e.Initiator)
		set("authn", &q.Authn, e.Authn)
		set("target", &q.Target, e.Target)
		if some("key", 5) {
			set("correlation", &q.CorrelationID, e.CorrelationID)
			set("changed", &q.Changed, e.Changed)
		}
		if some("since", 3) {
			q.Since = e.Time.Add(-time.Duration(rapid.IntRange(0, 36).Draw(t, "since hours")) * time.Hour)
		}
		if some("until", 3) {
			q.Until = e.Time.Add(time.Duration(rapid.IntRange(0, 36).Draw(t, "until hours")) * time.Hour)
		}
		return q
	})
}

// AgreeWithAScan compares what queries find with what a look at each of the
// events finds, which are all that the store has. Page by page, newest first
// and in the order of the log, from a place on.
func AgreeWithAScan(t *rapid.T, s store.Store, events []store.Event) {
	ctx := context.Background()
	q := Queries(events).Draw(t, "query")
	from := rapid.Int64Range(0, int64(len(events))).Draw(t, "from")
	type numbered struct {
		index int64
		day   int
	}
	var forward, backward []numbered
	for i := range events {
		if q.Matches(&events[i]) {
			backward = append(backward, numbered{int64(i), store.Day(events[i].Time)})
		}
	}
	for _, n := range backward {
		if n.index >= from {
			forward = append(forward, n)
		}
	}
	slices.SortFunc(backward, func(a, b numbered) int {
		if a.day != b.day {
			return b.day - a.day
		}
		return int(b.index - a.index)
	})
	check := func(what string, got []store.StoredEvent, want []numbered) {
		t.Helper()
		if len(got) > len(want) {
			t.Fatalf("%s: %d too many", what, len(got)-len(want))
		}
		for i, e := range got {
			if w := want[i]; e.Position.Seq-1 != w.index || e.Position.Day != w.day || string(e.Doc) != string(events[w.index].Doc) {
				t.Fatalf("%s: the event %d of the answer is %s, want %+v", what, i, e.Position, w)
			}
		}
	}
	const pages = 3 // a page of one event costs as much as any other
	got, more := []store.StoredEvent{}, q
	for page := 0; page < pages; page++ {
		found, err := s.Search(ctx, more)
		if err != nil {
			t.Fatal(err)
		}
		if len(found.Events) > q.Limit {
			t.Fatalf("%d events on a page of %d", len(found.Events), q.Limit)
		}
		got, more.Before = append(got, found.Events...), found.Next
		if found.Next.IsZero() {
			if len(got) != len(backward) {
				t.Fatalf("the search ended after %d events of %d", len(got), len(backward))
			}
			break
		}
	}
	check("backward", got, backward)
	got, next := nil, from
	for page := 0; page < pages && next < int64(len(events)); page++ {
		found, on, err := s.Follow(ctx, q, next, q.Limit)
		if err != nil {
			t.Fatal(err)
		}
		if len(found) > q.Limit || on <= next && len(found) == 0 {
			t.Fatalf("%d events on a page of %d, from %d to %d", len(found), q.Limit, next, on)
		}
		got, next = append(got, found...), on
	}
	check("forward", got, forward)
	if next == int64(len(events)) && len(got) != len(forward) {
		t.Fatalf("the log ended after %d events of %d", len(got), len(forward))
	}
}

func queriesAgree(t *testing.T, open Open) {
	s := begin(t, open)
	events := Mix(1500, 1)
	for part := range slices.Chunk(events, 500) {
		commit(t, s, store.Batch{Events: part})
	}
	rapid.Check(t, func(t *rapid.T) { AgreeWithAScan(t, s, events) })
}

// A page that follows another has what comes after it, whatever was added and
// dropped in between.
func pagesWhileDaysGo(t *testing.T, open Open) {
	s := begin(t, open)
	var want []string
	for n := range 3 {
		var b store.Batch
		for i := range 50 {
			e := at(noon().AddDate(0, 0, n-3), "a")
			if i%3 == 0 {
				e.AccountID = "b"
			} else if n > 0 {
				want = append(want, string(e.Doc))
			}
			b.Events = append(b.Events, e)
		}
		commit(t, s, b)
	}
	slices.Reverse(want)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				commit(t, s, store.Batch{Events: []store.Event{at(noon(), "a"), at(noon(), "b")}})
			}
		}
	})
	var got []string
	q := store.Query{AccountID: "a", Until: noon().AddDate(0, 0, -1).Add(time.Hour), Limit: 7}
	for page := 0; ; page++ {
		found, err := s.Search(context.Background(), q)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, docs(found.Events)...)
		if page == 2 {
			if err := s.DropDay(context.Background(), store.Day(noon().AddDate(0, 0, -3)), store.Batch{}); err != nil {
				t.Fatal(err)
			}
		}
		if q.Before = found.Next; q.Before.IsZero() {
			break
		}
	}
	close(stop)
	wg.Wait()
	if !slices.Equal(got, want) {
		t.Errorf("%d events %q, want %d", len(got), got, len(want))
	}
}

func followToTheEnd(t *testing.T, open Open) {
	s := begin(t, open)
	ctx := context.Background()
	q := store.Query{AccountID: "a"}
	if events, next, err := s.Follow(ctx, q, 0, 10); err != nil || len(events) != 0 || next != 0 {
		t.Fatalf("an empty log: %v, %d, %v", events, next, err)
	}
	a, b := at(noon(), "a"), at(noon(), "b")
	commit(t, s, store.Batch{Events: []store.Event{a, b}})
	events, next, err := s.Follow(ctx, q, 0, 10)
	if err != nil || len(events) != 1 || next != 2 || events[0].Position.Seq != 1 {
		t.Fatalf("%v, %d, %v", events, next, err)
	}
	if events, next, err = s.Follow(ctx, q, 99, 10); err != nil || len(events) != 0 || next != 99 {
		t.Fatalf("beyond the end: %v, %d, %v", events, next, err)
	}
	if err := s.DropDay(ctx, store.Day(noon()), store.Batch{}); err != nil {
		t.Fatal(err)
	}
	if events, next, err = s.Follow(ctx, q, 0, 10); err != nil || len(events) != 0 || next != 2 {
		t.Fatalf("over a day that is gone: %v, %d, %v", events, next, err)
	}
}
