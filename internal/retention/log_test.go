package retention_test

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
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/retention"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/token"
)

const operatorAccount = "0123456789abcdef0123456789abcdef"

// logged is an activity log with a signer, and what keeps it small.
type logged struct {
	*retention.Log
	t      *testing.T
	store  *sqlite.Store
	signer *checkpoint.Signer
	now    time.Time
	needed int64
	short  bool
}

// today is the day of the tests.
var today = time.Date(2026, 7, 15, 12, 0, 0, 0, time.UTC)

func startLog(t *testing.T) *logged {
	t.Helper()
	ctx := context.Background()
	s, err := sqlite.Open(ctx, filepath.Join(t.TempDir(), "tabard.db"))
	ok(t, err)
	t.Cleanup(func() { ok(t, s.Close()) })
	catalog, err := access.ParseCatalog(access.Builtin())
	ok(t, err)
	l := &logged{t: t, store: s, now: today, needed: math.MaxInt64}
	now := func() time.Time { return l.now }
	d, err := directory.Open(ctx, directory.Config{Store: s, Catalog: catalog, Now: now})
	ok(t, err)
	sealer, err := token.NewSealer(make([]byte, 32))
	ok(t, err)
	l.signer, err = checkpoint.Open(ctx, checkpoint.Config{Store: s, Directory: d, Sealer: sealer, Issuer: "http://tabard.test", Now: now, Log: slog.New(slog.DiscardHandler)})
	ok(t, err)
	l.Log = &retention.Log{
		Store: s, OperatorAccount: operatorAccount, Names: crn.DefaultNames, Now: now, Log: slog.New(slog.DiscardHandler),
		NeededFrom: func() int64 { return l.needed }, Pressed: func() bool { return l.short },
		Sign: func(ctx context.Context) (store.Checkpoint, error) {
			err := l.signer.Sign(ctx)
			c, _ := l.signer.Newest()
			return c, err
		},
	}
	return l
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// happened logs n events of a day so many days ago, in a commit.
func (l *logged) happened(ago, n, size int) {
	l.t.Helper()
	var b store.Batch
	for i := range n {
		e := &activity.Event{
			ID: fmt.Sprint(ago, "/", i), Time: activity.Time{Time: today.AddDate(0, 0, -ago)}, Action: "a.b.create", AccountID: "a", CorrelationID: fmt.Sprint(i),
			Message: strings.Repeat("x", size),
		}
		e.SetReason(200, "")
		s, err := store.NewEvent(e)
		ok(l.t, err)
		b.Events = append(b.Events, s)
	}
	ok(l.t, l.store.Commit(context.Background(), b))
}

func (l *logged) sweep() {
	l.t.Helper()
	ok(l.t, l.Sweep(context.Background()))
}

// days are how many days ago the days were that are left.
func (l *logged) days() (out []int) {
	l.t.Helper()
	days, err := l.store.Days(context.Background())
	ok(l.t, err)
	for ago := range 100 {
		if slices.ContainsFunc(days, func(d store.DayInfo) bool { return d.Day == store.Day(today.AddDate(0, 0, -ago)) }) {
			out = append(out, ago)
		}
	}
	return out
}

// drops are the events of dropped days, the oldest first.
func (l *logged) drops() (out []retention.Drop) {
	l.t.Helper()
	events, err := l.store.Events(context.Background(), store.Query{AccountID: operatorAccount, Action: activity.DayDelete, Limit: 100})
	ok(l.t, err)
	for _, s := range slices.Backward(events) {
		var e activity.Event
		var d retention.Drop
		ok(l.t, errors.Join(json.Unmarshal(s.Doc, &e), json.Unmarshal(e.ResponseData, &d)))
		if e.Severity != activity.Critical || e.Outcome != activity.Success {
			l.t.Errorf("event %s", s.Doc)
		}
		out = append(out, d)
	}
	return out
}

// verify holds the log against a checkpoint, or its own.
func (l *logged) verify(trusted []byte) *checkpoint.Report {
	l.t.Helper()
	ctx := context.Background()
	header, err := checkpoint.ReadHeader(ctx, l.store, l.signer.Key())
	ok(l.t, err)
	report, err := checkpoint.Verify(checkpoint.WithHeader(header, checkpoint.Items(ctx, l.store, checkpoint.All())), checkpoint.Options{Key: l.signer.Key(), Trusted: trusted})
	ok(l.t, err)
	return report
}

func TestNothingIsDroppedUnlessItIsAskedFor(t *testing.T) {
	l := startLog(t)
	l.happened(99, 3, 10)
	l.short = true
	l.sweep()
	if got := l.days(); !slices.Contains(got, 99) {
		t.Errorf("days %v", got)
	}
}

func TestOldDaysAreDroppedAndTheLogStaysWhole(t *testing.T) {
	l := startLog(t)
	l.MaxDays = 7
	for _, ago := range []int{20, 9, 8, 7, 2, 1, 0} {
		l.happened(ago, 3, 10)
	}
	l.sweep()
	if got := l.days(); !slices.Equal(got, []int{0, 1, 2, 7}) {
		t.Errorf("days %v", got)
	}
	drops := l.drops()
	if len(drops) != 3 || drops[0].Day != 20260625 || drops[0].Last-drops[0].First != 2 || drops[2].Day != 20260707 || drops[0].Reason != "days" || drops[0].Undelivered != 0 {
		t.Fatalf("drops %+v", drops)
	}
	// The checkpoint in the event covers what was dropped, and is verifiable.
	c, err := checkpoint.Parse([]byte(drops[2].Checkpoint), l.signer.Key())
	ok(t, err)
	if c.Size <= drops[2].Last {
		t.Errorf("the checkpoint speaks of %d events, the last one dropped is %d", c.Size, drops[2].Last)
	}
	ok(t, l.signer.Sign(context.Background()))
	for _, trusted := range [][]byte{nil, []byte(drops[2].Checkpoint)} {
		if r := l.verify(trusted); r.Problem != nil || r.Start == 0 {
			t.Errorf("verified %+v: %+v", r, r.Problem)
		}
	}
	// From it a consistency proof leads to what there is now.
	newest, _ := l.signer.Newest()
	now, err := checkpoint.Parse(newest.Note, l.signer.Key())
	ok(t, err)
	proof, err := tlog.ProveTree(now.Size, c.Size, l.store)
	ok(t, err)
	ok(t, tlog.CheckTree(proof, now.Size, now.Root, c.Size, c.Root))
	l.sweep()
	if len(l.drops()) != 3 {
		t.Error("dropped again")
	}
}

func TestTodayAndYesterdayStayWhateverIsAskedFor(t *testing.T) {
	l := startLog(t)
	l.MaxDays, l.MaxBytes, l.short = 1, 1, true
	for _, ago := range []int{2, 1, 0} {
		l.happened(ago, 3, 10)
	}
	l.sweep()
	if got := l.days(); !slices.Equal(got, []int{0, 1}) {
		t.Errorf("days %v", got)
	}
	if drops := l.drops(); len(drops) != 1 || drops[0].Reason == "" {
		t.Errorf("drops %+v", drops)
	}
}

func TestALogThatIsTooLargeLosesItsOldestDays(t *testing.T) {
	l := startLog(t)
	for ago := 9; ago >= 0; ago-- {
		l.happened(ago, 500, 1000)
	}
	before, err := l.store.Extent(context.Background())
	ok(t, err)
	l.MaxBytes = before.Bytes / 2
	l.sweep()
	after, err := l.store.Extent(context.Background())
	ok(t, err)
	if used := after.Bytes - after.Free; used > l.MaxBytes || used < l.MaxBytes*6/10 {
		t.Errorf("%d bytes are used, at most %d are to be", used, l.MaxBytes)
	}
	if days := l.days(); len(days) < 3 || len(days) > 6 || days[0] != 0 {
		t.Errorf("days %v", days)
	}
	if drops := l.drops(); len(drops) == 0 || drops[0].Reason != "bytes" {
		t.Errorf("drops %+v", drops)
	}
	// What was freed is used again before the file grows; under pressure it is
	// given back.
	l.happened(0, 500, 1000)
	again, err := l.store.Extent(context.Background())
	ok(t, err)
	if again.Bytes > after.Bytes || again.Free >= after.Free {
		t.Errorf("the file had %d bytes and has %d", after.Bytes, again.Bytes)
	}
	l.short = true
	l.sweep()
	if given, err := l.store.Extent(context.Background()); err != nil || given.Free != 0 || given.Bytes >= again.Bytes*8/10 {
		t.Errorf("%+v is not given back, %v", given, err)
	}
	if r := l.verify(nil); r.Problem != nil {
		t.Errorf("verified %+v", r.Problem)
	}
}

func TestADayThatAnExportStillNeedsWaitsUntilSpaceIsShort(t *testing.T) {
	l := startLog(t)
	l.MaxDays = 7
	for _, ago := range []int{10, 9, 8, 0} {
		l.happened(ago, 4, 10)
	}
	days, err := l.store.Days(context.Background())
	ok(t, err)
	l.needed = days[1].First + 1 // of the second day three are left to deliver
	l.sweep()
	if got := l.days(); !slices.Equal(got, []int{0, 8, 9}) {
		t.Errorf("days %v", got)
	}
	l.short = true
	l.sweep()
	if got := l.days(); !slices.Equal(got, []int{0}) {
		t.Errorf("days %v", got)
	}
	if drops := l.drops(); len(drops) != 3 || drops[0].Undelivered != 0 || drops[1].Undelivered != 3 || drops[2].Undelivered != 4 {
		t.Errorf("drops %+v", drops)
	}
}

// Whoever changed the log while the server was stopped gets nothing dropped over
// it: what was there must stay to be looked at.
func TestNothingIsDroppedFromALogThatIsNotTheOneThatWasSigned(t *testing.T) {
	l := startLog(t)
	l.MaxDays = 7
	l.happened(10, 3, 10)
	l.happened(0, 3, 10)
	l.Sign = func(context.Context) (store.Checkpoint, error) {
		return store.Checkpoint{}, errors.New("the log is another one")
	}
	if err := l.Sweep(context.Background()); err == nil || !strings.Contains(err.Error(), "another one") {
		t.Errorf("got %v", err)
	}
	if got := l.days(); !slices.Contains(got, 10) {
		t.Errorf("days %v", got)
	}
}
