package journal_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
)

// disk is a store whose commits take as long as the test wants: each one waits
// for a value from answers.
type disk struct {
	answers chan error

	mu      sync.Mutex
	commits [][]store.Event
}

func (d *disk) Commit(_ context.Context, b store.Batch) error {
	err := <-d.answers
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		d.commits = append(d.commits, b.Events)
	}
	return err
}

func (d *disk) sizes() []int {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []int
	for _, events := range d.commits {
		out = append(out, len(events))
	}
	return out
}

func event(n int) *activity.Event {
	return &activity.Event{
		ID: fmt.Sprint("event-", n), Time: activity.Time{Time: time.Now()}, AccountID: "a", Action: "x.y.create", Outcome: activity.Success,
	}
}

// record calls Record in the background; the answer comes on the channel.
func record(j *journal.Journal, events ...*activity.Event) <-chan error {
	done := make(chan error, 1)
	go func() { done <- j.Record(context.Background(), events...) }()
	return done
}

func wantUnavailable(t *testing.T, err error) {
	t.Helper()
	f := fault.Of(err)
	if err == nil || f.Kind != fault.Unavailable || f.RetryAfter <= 0 {
		t.Errorf("error %v, want a fault of kind Unavailable that says when to try again", err)
	}
}

func TestRecordReturnsOnlyAfterTheCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d})
		done := record(j, event(1))
		time.Sleep(time.Second)
		select {
		case err := <-done:
			t.Fatalf("Record returned %v before the event was durable", err)
		default:
		}
		d.answers <- nil
		if err := <-done; err != nil {
			t.Error(err)
		}
		j.Close()
	})
}

func TestRequestsThatWaitShareOneCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d})
		waiting := []<-chan error{record(j, event(0))}
		synctest.Wait() // the first commit is under way
		for n := 1; n <= 100; n++ {
			waiting = append(waiting, record(j, event(n)))
		}
		synctest.Wait()
		d.answers <- nil
		d.answers <- nil
		for _, done := range waiting {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if got := d.sizes(); !slices.Equal(got, []int{1, 100}) {
			t.Errorf("commits of %v events, want one of 1 and one of 100", got)
		}
		j.Close()
	})
}

func TestACommitTakesABoundedNumberOfEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d, Batch: 10})
		waiting := []<-chan error{record(j, event(0))}
		synctest.Wait()
		for n := 1; n <= 25; n++ {
			waiting = append(waiting, record(j, event(n)))
		}
		synctest.Wait()
		close(d.answers)
		for _, done := range waiting {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if got := d.sizes(); !slices.Equal(got, []int{1, 10, 10, 5}) {
			t.Errorf("commits of %v events", got)
		}
		j.Close()
	})
}

func TestEventsOfOneCallStayTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d, Batch: 2})
		done := record(j, event(1), event(2), event(3))
		d.answers <- nil
		if err := <-done; err != nil {
			t.Error(err)
		}
		if got := d.sizes(); !slices.Equal(got, []int{3}) {
			t.Errorf("commits of %v events, want one of 3", got)
		}
		j.Close()
	})
}

func TestAFullQueueRefusesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d, Queue: 3})
		waiting := []<-chan error{record(j, event(0))}
		synctest.Wait() // taken from the queue, and under way
		for n := 1; n <= 3; n++ {
			waiting = append(waiting, record(j, event(n)))
		}
		synctest.Wait()
		start := time.Now()
		wantUnavailable(t, j.Record(context.Background(), event(4)))
		if took := time.Since(start); took != 0 {
			t.Errorf("the refusal took %s", took)
		}
		close(d.answers)
		for _, done := range waiting {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if err := j.Record(context.Background(), event(5)); err != nil {
			t.Errorf("the queue is free again: %v", err)
		}
		j.Close()
	})
}

func TestAFailingStoreRefusesAllWhoShareTheCommitAndNobodyAfterIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("no space left on device")
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d})
		first := record(j, event(0))
		synctest.Wait()
		var waiting []<-chan error
		for n := 1; n <= 10; n++ {
			waiting = append(waiting, record(j, event(n)))
		}
		synctest.Wait()
		d.answers <- nil
		d.answers <- cause
		if err := <-first; err != nil {
			t.Error(err)
		}
		for _, done := range waiting {
			err := <-done
			wantUnavailable(t, err)
			if !errors.Is(err, cause) {
				t.Errorf("the error %v has lost its cause", err)
			}
		}
		after := record(j, event(11))
		d.answers <- nil
		if err := <-after; err != nil {
			t.Error(err)
		}
		j.Close()
	})
}

func TestAStoreThatHangsIsNotWaitedForWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d, Wait: 3 * time.Second})
		start := time.Now()
		wantUnavailable(t, j.Record(context.Background(), event(1)))
		if took := time.Since(start); took != 3*time.Second {
			t.Errorf("took %s", took)
		}
		close(d.answers)
		j.Close()
	})
}

func TestACancelledCallerIsLetGoAndTheOthersAreServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d})
		ctx, cancel := context.WithCancel(context.Background())
		gone := make(chan error, 1)
		go func() { gone <- j.Record(ctx, event(1)) }()
		other := record(j, event(2))
		synctest.Wait()
		cancel()
		err := <-gone
		wantUnavailable(t, err)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		close(d.answers)
		if err := <-other; err != nil {
			t.Error(err)
		}
		j.Close()
	})
}

func TestCloseWritesWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		j := journal.New(journal.Config{Store: d, Batch: 4})
		var waiting []<-chan error
		for n := range 20 {
			waiting = append(waiting, record(j, event(n)))
		}
		synctest.Wait()
		closed := make(chan struct{})
		go func() {
			j.Close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			t.Fatal("Close returned while events waited")
		default:
		}
		close(d.answers)
		<-closed
		total := 0
		for _, n := range d.sizes() {
			total += n
		}
		if total != 20 {
			t.Errorf("%d events are durable, want 20", total)
		}
		for _, done := range waiting {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestRecordAfterCloseIsRefused(t *testing.T) {
	d := &disk{answers: make(chan error)}
	close(d.answers)
	j := journal.New(journal.Config{Store: d})
	j.Close()
	j.Close() // a second one is harmless
	wantUnavailable(t, j.Record(context.Background(), event(1)))
	if n := len(d.sizes()); n != 0 {
		t.Errorf("%d commits", n)
	}
}

func TestAnEventThatCannotBeEncodedDoesNotReachTheStore(t *testing.T) {
	d := &disk{answers: make(chan error)}
	close(d.answers)
	j := journal.New(journal.Config{Store: d})
	bad := event(1)
	bad.RequestData = []byte("{")
	if err := j.Record(context.Background(), event(0), bad); err == nil {
		t.Error("no error")
	}
	j.Close()
	if n := len(d.sizes()); n != 0 {
		t.Errorf("%d commits", n)
	}
}

func TestEveryCommitIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{answers: make(chan error)}
		type report struct {
			events int
			took   time.Duration
			failed bool
		}
		var reports []report
		j := journal.New(journal.Config{Store: d, Committed: func(events int, took time.Duration, err error) {
			reports = append(reports, report{events, took, err != nil})
		}})
		for _, answer := range []error{nil, errors.New("no")} {
			done := record(j, event(0), event(1))
			time.Sleep(2 * time.Second)
			d.answers <- answer
			<-done
		}
		j.Close()
		if want := []report{{2, 2 * time.Second, false}, {2, 2 * time.Second, true}}; !slices.Equal(reports, want) {
			t.Errorf("reports %v, want %v", reports, want)
		}
	})
}

// On a real store: what Record accepted from many callers at once is there
// after reopening, once each, whoever closes in the middle of it.
func TestWhatWasAcceptedIsThereAfterReopening(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "tabard.db")
	s, err := sqlite.Open(ctx, file)
	if err != nil {
		t.Fatal(err)
	}
	commits := 0
	j := journal.New(journal.Config{Store: s, Committed: func(int, time.Duration, error) { commits++ }})
	const callers, each = 32, 20
	accepted := make([][]string, callers)
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for n := range each {
				e := event(c*each + n)
				switch err := j.Record(ctx, e); {
				case err == nil:
					accepted[c] = append(accepted[c], e.ID)
				case !fault.Is(err, fault.Unavailable):
					t.Errorf("error %v", err)
				}
				if c == 0 && n == each/2 {
					go j.Close()
				}
			}
		})
	}
	wg.Wait()
	j.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = sqlite.Open(ctx, file); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	stored, err := s.Events(ctx, store.Query{AccountID: "a", Limit: callers*each + 1})
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Concat(accepted...)
	if len(want) == 0 || len(stored) != len(want) {
		t.Errorf("%d events stored, %d accepted", len(stored), len(want))
	}
	if commits >= len(want) {
		t.Errorf("%d commits for %d events: they do not share", commits, len(want))
	}
	t.Logf("%d events in %d commits", len(want), commits)
}
