package export_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/export"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink is a target in memory that does what it is told.
type sink struct {
	mu      sync.Mutex
	got     []store.Entry
	most    int   // takes at most so many at once; 0 means all
	err     error // refuses
	took    chan struct{}
	closed  bool
	panics  bool
	broken  chan struct{}
	lost    int64 // from here on, and 0 is nothing
	perCall []int
}

func (s *sink) Deliver(ctx context.Context, entries []store.Entry) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.panics {
		s.panics = false
		panic("out of order")
	}
	if s.lost > 0 {
		from := s.lost
		s.lost, s.broken = 0, nil
		s.signal()
		return 0, &loss{from}
	}
	if s.err != nil {
		s.signal()
		return 0, s.err
	}
	n := len(entries)
	if s.most > 0 && n > s.most {
		n = s.most
	}
	s.got = append(s.got, entries[:n]...)
	s.perCall = append(s.perCall, n)
	s.signal()
	if n < len(entries) {
		return n, errors.New("enough for now")
	}
	return n, ctx.Err()
}

type loss struct{ from int64 }

func (*loss) Error() string     { return "the connection ended" }
func (l *loss) LostFrom() int64 { return l.from }

func (s *sink) signal() {
	select {
	case s.took <- struct{}{}:
	default:
	}
}

func (s *sink) Broken() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

func (s *sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

// until waits for something to be true of what the sink got.
func (s *sink) until(t *testing.T, what string, ok func(got []store.Entry) bool) []store.Entry {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		s.mu.Lock()
		got := slices.Clone(s.got)
		s.mu.Unlock()
		if ok(got) {
			return got
		}
		select {
		case <-s.took:
		case <-limit:
			t.Fatalf("%s: the target has %v", what, actions(got))
		}
	}
}

func actions(entries []store.Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.Action)
	}
	return out
}

// bench is an installation with a manager of routes.
type bench struct {
	t       testing.TB
	file    string
	store   *sqlite.Store
	dir     *directory.Directory
	journal *journal.Journal
	manager *export.Manager
	stop    func()
	n       int
	mu      sync.Mutex
	now     time.Time
	logged  strings.Builder
}

var noon = time.Date(2026, 7, 2, 12, 0, 0, 0, time.UTC)

func start(t *testing.T) *bench {
	b := &bench{t: t, file: filepath.Join(t.TempDir(), "tabard.db"), now: noon}
	b.open()
	t.Cleanup(func() {
		if b.stop != nil {
			b.halt()
		}
	})
	return b
}

func (b *bench) clock() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

func (b *bench) pass(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now = b.now.Add(d)
}

func (b *bench) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.logged.Write(p)
}

func (b *bench) log() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.logged.String()
}

func (b *bench) open() {
	b.t.Helper()
	var err error
	if b.store, err = sqlite.Open(context.Background(), b.file); err != nil {
		b.t.Fatal(err)
	}
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		b.t.Fatal(err)
	}
	if b.dir, err = directory.Open(context.Background(), directory.Config{Store: b.store, Catalog: catalog, Now: b.clock}); err != nil {
		b.t.Fatal(err)
	}
	b.journal = journal.New(journal.Config{Store: b.store})
	b.manager = export.New(export.Config{
		Store: b.store, Directory: b.dir, Journal: b.journal, Names: crn.Names{CName: "bluemix", CType: "public"}, Now: b.clock,
		Log: slog.New(slog.NewTextHandler(b, nil)), OperatorAccount: "operator",
	})
}

// run follows routes until halt.
func (b *bench) run(routes ...export.Route) {
	b.t.Helper()
	if b.manager == nil {
		b.open()
	}
	b.manager.Set(routes)
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() { b.manager.Run(ctx) })
	b.stop = func() {
		cancel()
		group.Wait()
	}
}

// halt ends the manager, and closes the store.
func (b *bench) halt() {
	b.t.Helper()
	b.stop()
	b.journal.Close()
	if err := b.store.Close(); err != nil {
		b.t.Error(err)
	}
	b.stop, b.manager = nil, nil
}

func (b *bench) event(action string) *activity.Event {
	b.n++
	e := &activity.Event{
		ID: fmt.Sprint("event-", b.n), Time: activity.Time{Time: b.clock()}, Action: action, CorrelationID: fmt.Sprint("t", b.n), AccountID: "acme",
		Severity: activity.Normal,
	}
	e.SetReason(200, "")
	return e
}

func (b *bench) happen(actions ...string) {
	b.t.Helper()
	var events []*activity.Event
	for _, a := range actions {
		events = append(events, b.event(a))
	}
	if err := b.journal.Record(context.Background(), events...); err != nil {
		b.t.Fatal(err)
	}
}

func route(name string, s *sink, change ...func(*export.Route)) export.Route {
	if s.took == nil {
		s.took = make(chan struct{}, 1)
	}
	r := export.Route{
		Name: name, Kind: "memory", Target: "here", Match: export.Match{Actions: []string{"a.*"}}, Batch: export.Batch{Wait: time.Millisecond},
		Open: func() (export.Sink, error) { return s, nil },
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

// has says that the target has got these actions, in this order, and perhaps
// some of them twice.
func has(want ...string) func([]store.Entry) bool {
	return func(got []store.Entry) bool {
		seen := map[int64]bool{}
		var once []string
		for _, e := range got {
			if !seen[e.Index] {
				once = append(once, e.Action)
			}
			seen[e.Index] = true
		}
		return slices.Equal(once, want)
	}
}

func (b *bench) status(name string) export.Status {
	b.t.Helper()
	all, err := b.manager.Status(context.Background())
	if err != nil {
		b.t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	b.t.Fatalf("there is no route %s among %v", name, all)
	return export.Status{}
}

// told returns the events about routes that stand in the operator's log.
func (b *bench) told(action string) []activity.Event {
	b.t.Helper()
	stored, err := b.store.Events(context.Background(), store.Query{AccountID: "operator", Action: action, Limit: 100})
	if err != nil {
		b.t.Fatal(err)
	}
	var out []activity.Event
	for _, s := range slices.Backward(stored) {
		var e activity.Event
		if err := json.Unmarshal(s.Doc, &e); err != nil {
			b.t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("it never came to be that %s", what)
		}
	}
}

func TestARouteDeliversWhatItIsForInTheLogsOrder(t *testing.T) {
	b := start(t)
	b.happen("a.1", "b.1", "a.2")
	s := &sink{}
	b.run(route("r", s))
	s.until(t, "at the start", has("a.1", "a.2"))
	b.happen("b.2", "a.3")
	got := s.until(t, "later", has("a.1", "a.2", "a.3"))
	if string(got[0].Doc) == "" || got[0].AccountID != "acme" {
		t.Errorf("delivered %+v", got[0])
	}
	eventually(t, "everything is passed", func() bool { return b.status("r").BehindEvents == 0 })
	if st := b.status("r"); st.State != export.OK || st.Delivered != 3 || st.Lost != 0 || st.LastError != "" || st.Cursor == 0 {
		t.Errorf("status %+v", st)
	}
	if e := b.told("activity.route.create"); len(e) != 1 || e[0].Target.Name != "r" || e[0].Outcome != activity.Success {
		t.Errorf("told %+v", e)
	}
}

func TestARouteGoesOnWhereItWas(t *testing.T) {
	b := start(t)
	first, second := &sink{}, &sink{}
	b.run(route("r", first))
	b.happen("a.1", "a.2")
	first.until(t, "before", has("a.1", "a.2"))
	b.halt()
	if !first.closed {
		t.Error("the target is still open")
	}
	b.open()
	b.happen("a.3")
	b.run(route("r", second))
	second.until(t, "after", has("a.3"))
	if e := b.told("activity.route.create"); len(e) != 1 {
		t.Errorf("it was made %d times", len(e))
	}
}

func TestANewRouteBeginsWhereItIsTold(t *testing.T) {
	b := start(t)
	b.happen("a.1")
	all, fresh := &sink{}, &sink{}
	b.run(route("all", all), route("fresh", fresh, func(r *export.Route) { r.FromNow = true }))
	all.until(t, "from the beginning", has("a.1"))
	eventually(t, "the new one is placed", func() bool { return b.status("fresh").Cursor > 0 })
	b.happen("a.2")
	fresh.until(t, "from now on", has("a.2"))
	b.halt()
	b.open()
	b.happen("a.3") // while no server ran: it is new, and not missed
	again := &sink{}
	b.run(route("fresh", again, func(r *export.Route) { r.FromNow = true }))
	again.until(t, "after a restart", has("a.3"))
}

func TestADeadTargetHoldsUpNobodyAndGetsAllWhenItComesBack(t *testing.T) {
	b := start(t)
	dead, live := &sink{err: errors.New("dial: \x1b[31mrefused\n\u2028password")}, &sink{}
	b.run(route("dead", dead), route("live", live))
	b.happen("a.1", "a.2")
	live.until(t, "beside a dead one", has("a.1", "a.2"))
	eventually(t, "the failure shows", func() bool { return b.status("dead").State == export.Failing })
	st := b.status("dead")
	if st.LastError != "dial:  [31mrefused  password" || st.Failures == 0 || st.BehindEvents == 0 || st.NextAttempt.IsZero() || st.Since.IsZero() {
		t.Errorf("status %+v", st)
	}
	eventually(t, "the log is needed from there on", func() bool { return b.manager.NeededFrom() == st.Cursor })
	b.pass(time.Minute)
	eventually(t, "the operator is told", func() bool { return len(b.told("activity.route.fail")) == 1 })
	failures := b.status("dead").Failures
	eventually(t, "it is tried again", func() bool { return b.status("dead").Failures > failures })
	dead.mu.Lock()
	dead.err = nil
	dead.mu.Unlock()
	b.happen("a.3")
	dead.until(t, "when it is back", has("a.1", "a.2", "a.3"))
	eventually(t, "recovery is told", func() bool { return len(b.told("activity.route.recover")) == 1 })
	if e := b.told("activity.route.fail"); len(e) != 1 || e[0].Outcome != activity.Failure || strings.ContainsAny(e[0].Reason.ForFailure, "\n\x1b") {
		t.Errorf("told %+v", e)
	}
	if strings.Count(b.log(), "does not deliver") != 1 {
		t.Errorf("the same failure was logged again and again:\n%s", b.log())
	}
}

func TestWhatATargetTookIsNotSentAgainAndTheRestIs(t *testing.T) {
	b := start(t)
	b.happen("a.1", "a.2", "a.3", "a.4", "a.5")
	s := &sink{most: 2}
	b.run(route("r", s))
	got := s.until(t, "in parts", has("a.1", "a.2", "a.3", "a.4", "a.5"))
	if len(got) != 5 {
		t.Errorf("sent %v", actions(got))
	}
}

func TestBatchesAreBoundedInNumberAndBytes(t *testing.T) {
	b := start(t)
	for range 10 {
		b.happen("a.1", "b.1")
	}
	few, small := &sink{}, &sink{}
	b.run(route("few", few, func(r *export.Route) { r.Batch.Events = 3 }), route("small", small, func(r *export.Route) { r.Batch.Bytes = 1 }))
	for _, s := range []*sink{few, small} {
		s.until(t, "all", func(got []store.Entry) bool { return len(got) == 10 })
	}
	if n := slices.Max(few.perCall); n > 3 {
		t.Errorf("%d at once", n)
	}
	if n := slices.Max(small.perCall); n != 1 {
		t.Errorf("%d events of more than a byte at once", n)
	}
}

func TestATargetThatPanicsStopsNothingElse(t *testing.T) {
	b := start(t)
	b.happen("a.1")
	s := &sink{panics: true}
	b.run(route("r", s))
	s.until(t, "after the panic", has("a.1"))
	if !strings.Contains(b.log(), "out of order") {
		t.Error("nothing was logged")
	}
}

func TestWhatATargetMayHaveLostIsSentAgainEvenAfterAKill(t *testing.T) {
	b := start(t)
	s := &sink{broken: make(chan struct{})}
	b.run(route("r", s))
	b.happen("a.1", "a.2", "a.3")
	got := s.until(t, "first", has("a.1", "a.2", "a.3"))
	eventually(t, "it is stored", func() bool { return b.manager.NeededFrom() > got[2].Index })
	s.mu.Lock()
	s.lost, s.err = got[1].Index, errors.New("the connection is refused")
	close(s.broken) // while the route is idle
	s.mu.Unlock()
	eventually(t, "it went back", func() bool { return b.manager.NeededFrom() == got[1].Index })
	b.halt()
	b.open()
	again := &sink{}
	b.run(route("r", again))
	again.until(t, "again", has("a.2", "a.3"))

	again.mu.Lock()
	again.lost = got[2].Index // noticed while it delivers
	again.mu.Unlock()
	b.happen("a.4")
	again.until(t, "and again", func(e []store.Entry) bool { return slices.Equal(actions(e), []string{"a.2", "a.3", "a.3", "a.4"}) })
}

func TestWhatWasDroppedBeforeARouteCameToItIsCountedAndTold(t *testing.T) {
	b := start(t)
	s := &sink{err: errors.New("down")}
	b.run(route("r", s, func(r *export.Route) { r.Batch.Events = 1 }))
	eventually(t, "it has begun", func() bool { return len(b.told("activity.route.create")) == 1 })
	b.happen("a.1")
	eventually(t, "it fails", func() bool { return b.status("r").Failures > 0 })
	b.happen("a.2", "a.3")
	b.pass(24 * time.Hour)
	b.happen("a.4")
	ev := b.event(checkpoint.DropAction)
	e, err := store.NewEvent(ev)
	if err == nil {
		err = b.store.DropDay(t.Context(), store.Day(noon), store.Batch{Events: []store.Event{e}})
	}
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.err = nil
	s.mu.Unlock()
	s.until(t, "what is left", has("a.1", "a.4")) // the first one was in its hands already
	eventually(t, "the operator is told", func() bool { return len(b.told("activity.route.lose")) == 1 })
	if lost := b.told("activity.route.lose")[0]; b.status("r").Lost != 2 || !strings.Contains(string(lost.ResponseData), `"first"`) || lost.Severity != activity.Critical {
		t.Errorf("status %+v, told %+v", b.status("r"), lost)
	}
}

func TestARouteThatIsGoneIsToldOnceAndItsCursorIsKeptForAMonth(t *testing.T) {
	b := start(t)
	b.happen("a.1")
	s := &sink{}
	b.run(route("r", s))
	s.until(t, "first", has("a.1"))
	b.manager.Set(nil)
	eventually(t, "it is gone", func() bool { return len(b.told("activity.route.delete")) == 1 })
	if n := b.manager.NeededFrom(); n != math.MaxInt64 {
		t.Errorf("a route that is gone holds the log at %d", n)
	}
	b.happen("a.2")
	back := &sink{}
	b.manager.Set([]export.Route{route("r", back)})
	back.until(t, "back again", has("a.2"))
	b.halt()
	b.open()
	b.run()
	eventually(t, "it is gone again", func() bool { return len(b.told("activity.route.delete")) == 2 })
	b.halt()
	b.pass(31 * 24 * time.Hour)
	b.open()
	b.run()
	eventually(t, "the cursor is gone", func() bool { return b.dir.ExportCursors.Len() == 0 })
	if n := len(b.told("activity.route.delete")); n != 2 {
		t.Errorf("told %d times", n)
	}
}

func TestMatching(t *testing.T) {
	e := &store.Event{Action: "iam-identity.account-apikey.login", Outcome: "failure", Severity: "critical", AccountID: "acme"}
	for _, tt := range []struct {
		m    export.Match
		want bool
	}{
		{export.Match{}, true},
		{export.Match{Actions: []string{"iam-identity.*"}}, true},
		{export.Match{Actions: []string{"iam-identity."}}, false},
		{export.Match{Actions: []string{"*"}}, true},
		{export.Match{Actions: []string{"x", "iam-identity.account-apikey.login"}}, true},
		{export.Match{Actions: []string{"iam-identity.*"}, ExceptActions: []string{"iam-identity.account-apikey*"}}, false},
		{export.Match{Severities: []string{"warning"}}, false},
		{export.Match{Severities: []string{"warning", "critical"}, Outcomes: []string{"failure"}, Accounts: []string{"acme"}}, true},
		{export.Match{Outcomes: []string{"success"}}, false},
		{export.Match{Accounts: []string{"other"}}, false},
	} {
		if err := tt.m.Check(); err != nil || tt.m.Takes(e) != tt.want {
			t.Errorf("%+v: %v, %v", tt.m, !tt.want, err)
		}
	}
	for _, m := range []export.Match{
		{Actions: []string{""}}, {Actions: []string{"a*b"}}, {ExceptActions: []string{"**"}}, {Severities: []string{"high"}}, {Outcomes: []string{"ok"}}, {Accounts: []string{""}},
	} {
		if err := m.Check(); err == nil {
			t.Errorf("%+v passes", m)
		}
	}
}

// What following costs: CPU time for each event with some routes, beside none.
func BenchmarkFollowing(b *testing.B) {
	for _, routes := range []int{0, 1, 5} {
		b.Run(fmt.Sprint(routes, " routes"), func(b *testing.B) {
			bench := &bench{file: filepath.Join(b.TempDir(), "tabard.db"), now: noon, t: b}
			bench.open()
			var all []export.Route
			var sinks []*sink
			for n := range routes {
				s := &sink{}
				sinks = append(sinks, s)
				all = append(all, route(fmt.Sprint("r", n), s, func(r *export.Route) { r.Match, r.Batch.Wait = export.Match{}, 0 }))
			}
			bench.run(all...)
			before := used(b)
			for b.Loop() {
				var events []*activity.Event
				for range 32 {
					e := bench.event("a.b.c")
					e.Trace = activity.Trace{{Name: "filler", Outcome: activity.Pass, Wanted: strings.Repeat("w", 500), Found: strings.Repeat("f", 500)}}
					events = append(events, e)
				}
				if err := bench.journal.Record(context.Background(), events...); err != nil {
					b.Fatal(err)
				}
			}
			for _, s := range sinks {
				for got := 0; got < bench.n; {
					<-s.took
					s.mu.Lock()
					got = len(s.got)
					s.mu.Unlock()
				}
			}
			b.ReportMetric(float64((used(b)-before).Microseconds())/float64(bench.n), "cpu-µs/event")
			bench.halt()
		})
	}
}

// used returns the CPU time of this process.
func used(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
