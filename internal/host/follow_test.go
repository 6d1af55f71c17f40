package host_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

// flaky is a world whose reports may fail.
type flaky struct {
	*host.Own

	mu      sync.Mutex
	away    bool
	reports []string
}

func (f *flaky) Report(ctx context.Context, r vpc.Report) error {
	f.mu.Lock()
	away := f.away
	f.reports = append(f.reports, r.Seen+" "+r.Status)
	f.mu.Unlock()
	if away {
		return errors.New("the server is away")
	}
	return f.Own.Report(ctx, r)
}

func (f *flaky) set(away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

func (f *flaky) reported() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.reports)
}

// flaky gives the stack's controller such a world.
func (s *stack) flaky() *flaky {
	f := &flaky{Own: &host.Own{Directory: s.d, HostID: "h1"}}
	s.controller = host.NewController(host.ControllerConfig{
		World: f, Driver: s.driver, Log: slog.New(slog.DiscardHandler),
		Handlers: func(string) host.Handlers { return host.Handlers{Metadata: http.NotFoundHandler()} },
	})
	return f
}

// nudge makes the controller look again.
func (s *stack) nudge() { s.T.Helper(); s.instance("h2", vpc.Stopped) }

func (s *stack) eventually(what string, f func() bool) {
	s.T.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if f() {
			return
		}
	}
	s.T.Fatalf("it does not come: %s; calls %v", what, s.driver.called())
}

func TestTheEndOfAStepIsNeverMissed(t *testing.T) {
	s := start(t)
	s.driver.onStart = func(_ context.Context, id string) error {
		s.set(id, vpc.Stopping)
		return nil
	}
	s.run()
	for range 100 {
		id := s.instance("h1", vpc.Pending)
		began := time.Now()
		s.become(id, vpc.Stopped)
		if took := time.Since(began); took > 5*time.Second {
			t.Fatalf("it took %s", took)
		}
	}
}

func TestWhatChangesDuringAFailureIsSeenAfterIt(t *testing.T) {
	s := start(t)
	entered, leave := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.driver.onStop = func(string) error {
		once.Do(func() { close(entered); <-leave })
		return errors.New("device is busy")
	}
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	s.set(id, vpc.Stopping)
	<-entered
	s.set(id, vpc.Deleting)
	time.Sleep(20 * time.Millisecond) // the controller has looked, and seen that it is worked on
	began := time.Now()
	close(leave)
	s.eventually("the deletion", func() bool { return slices.Contains(s.driver.called(), "delete "+id) })
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestAMachineIsNotRestartedAgainBecauseTheReportFailed(t *testing.T) {
	s := start(t)
	w := s.flaky()
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	w.set(true)
	s.set(id, vpc.Restarting)
	s.eventually("a report", func() bool { return w.reported() == 2 })
	for n := range 5 {
		s.nudge()
		s.eventually("another report", func() bool { return w.reported() >= 3+n })
	}
	w.set(false)
	s.nudge()
	s.become(id, vpc.Running)
	if want := []string{"start " + id, "stop " + id, "start " + id}; !slices.Equal(s.driver.called(), want) {
		t.Errorf("calls %v, want %v", s.driver.called(), want)
	}
	s.set(id, vpc.Restarting) // and the next one is one
	s.eventually("the next restart", func() bool { return len(s.driver.called()) == 5 })
	s.become(id, vpc.Running)
}

func TestReportsThatFailAreNotMadeInARow(t *testing.T) {
	s := start(t)
	w := s.flaky()
	w.set(true)
	s.instance("h1", vpc.Pending)
	s.run()
	s.eventually("a report", func() bool { return w.reported() > 0 })
	time.Sleep(300 * time.Millisecond)
	if n := w.reported(); n > 3 {
		t.Errorf("%d reports", n)
	}
}

func TestMachinesThatAnEarlierProcessLeftAreTakenUpOrStopped(t *testing.T) {
	s := start(t)
	ids := map[string]string{}
	for _, status := range []string{vpc.Running, vpc.Starting, vpc.Restarting, vpc.Stopping, vpc.Stopped, vpc.Failed, vpc.Deleting} {
		ids[status] = s.instance("h1", status)
	}
	moved := s.instance("h2", vpc.Running)
	s.driver.left = []string{"gone", moved}
	for _, id := range ids {
		s.driver.left = append(s.driver.left, id)
	}
	s.run()
	s.become(ids[vpc.Starting], vpc.Running)
	s.become(ids[vpc.Restarting], vpc.Running)
	s.become(ids[vpc.Stopping], vpc.Stopped)
	s.eventually("the end", func() bool { _, ok := s.d.Instances.Get(ids[vpc.Deleting]); return !ok })
	want := []string{
		"start " + ids[vpc.Running], "start " + ids[vpc.Starting], "stop " + ids[vpc.Restarting], "start " + ids[vpc.Restarting], "stop " + ids[vpc.Stopping],
		"stop " + ids[vpc.Stopped], "kill " + ids[vpc.Failed], "delete " + ids[vpc.Deleting], "kill gone", "kill " + moved,
	}
	slices.Sort(want)
	s.eventually("all calls", func() bool { return len(s.driver.called()) >= len(want) })
	got := s.driver.called()
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("calls %v\nwant  %v", got, want)
	}
	// What another host runs is not reported on.
	if i, _ := s.d.Instances.Get(moved); i.Status != vpc.Running || i.Revision != 1 {
		t.Errorf("instance %+v", i)
	}
}

func TestAMachineThatEndsByItselfIsStopped(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	s.driver.ended <- id
	s.become(id, vpc.Stopped)
	s.driver.ended <- "0717_nothing"
	s.set(id, vpc.Starting)
	s.become(id, vpc.Running)
	if _, ok := s.driver.machine(id); !ok {
		t.Error("it does not run again")
	}
}

func TestAMachineThatEndsWhileTheServerIsAwayIsReportedLater(t *testing.T) {
	s := start(t)
	w := s.flaky()
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	w.set(true)
	s.driver.ended <- id
	s.eventually("a report", func() bool { return w.reported() >= 2 })
	w.set(false)
	s.nudge()
	s.become(id, vpc.Stopped)
	if got := s.driver.called(); slices.Contains(got[1:], "start "+id) {
		t.Errorf("it was started again: %v", got)
	}
}

func TestARunningMachineIsUpdatedWhenItsInstanceChangesAndOnlyThen(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	for range 5 { // changes of other things
		s.nudge()
	}
	s.update(func(tx *directory.Tx) {
		i, _ := s.d.Instances.Get(id)
		next := i.Clone()
		next.Metadata.ResponseHopLimit = 7
		s.d.Instances.Put(tx, next)
	})
	s.eventually("the update", func() bool { m, _ := s.driver.machine(id); return m.Metadata.ResponseHopLimit == 7 })
	for range 5 {
		s.nudge()
	}
	time.Sleep(20 * time.Millisecond)
	if got, want := s.driver.called(), []string{"start " + id, "update " + id}; !slices.Equal(got, want) {
		t.Errorf("calls %v, want %v", got, want)
	}
}

func TestASlowMachineHoldsUpNoOther(t *testing.T) {
	s := start(t)
	leave := make(chan struct{})
	slow := ""
	s.driver.onStart = func(ctx context.Context, id string) error {
		s.mu.Lock()
		wait := slow == id
		s.mu.Unlock()
		if wait {
			select {
			case <-leave:
			case <-ctx.Done():
			}
		}
		return nil
	}
	s.mu.Lock()
	slow = s.instance("h1", vpc.Pending)
	s.mu.Unlock()
	s.run()
	for range 5 {
		s.become(s.instance("h1", vpc.Pending), vpc.Running)
	}
	if i, _ := s.d.Instances.Get(slow); i.Status != vpc.Pending {
		t.Errorf("the slow one is %s", i.Status)
	}
	close(leave)
	s.become(slow, vpc.Running)
}

// choice is one over recorders.
func choice() (c *host.Choice, external, images, stock *recorder) {
	make := func() *recorder { return &recorder{running: map[string]host.Machine{}, ended: make(chan string)} }
	external, images, stock = make(), make(), make()
	return &host.Choice{External: external, Images: images, Stock: stock}, external, images, stock
}

func TestEachMachineRunsOnTheDriverThatIsMeantForIt(t *testing.T) {
	c, external, images, stock := choice()
	images.left = []string{"left"}
	h := host.Handlers{Metadata: http.NotFoundHandler()}
	found, err := c.Found(t.Context())
	if err != nil || !slices.Equal(found, []string{"left"}) {
		t.Errorf("found %v, error %v", found, err)
	}
	disk := vpc.Image{SHA256: strings.Repeat("a", 64)}
	for d, m := range map[*recorder]host.Machine{external: {ID: "e", Image: disk, External: &vpc.External{}}, images: {ID: "i", Image: disk}, stock: {ID: "s"}} {
		if err := c.Start(t.Context(), m, h); err != nil {
			t.Fatal(err)
		}
		if _, ok := d.machine(m.ID); !ok {
			t.Errorf("%s runs elsewhere", m.ID)
		}
		if err := c.Update(t.Context(), m); err != nil {
			t.Error(err)
		}
		if _, ok := c.Access(m.ID); !ok {
			t.Errorf("no access to %s", m.ID)
		}
	}
	go func() { images.ended <- "i"; stock.ended <- "s" }()
	ended := []string{<-c.Ended(), <-c.Ended()}
	slices.Sort(ended)
	if !slices.Equal(ended, []string{"i", "s"}) {
		t.Errorf("ended %v", ended)
	}
	for _, step := range []func() error{
		func() error { return c.Stop(t.Context(), "left", true) }, func() error { return c.Stop(t.Context(), "s", false) },
		func() error { return c.Stop(t.Context(), "nothing", true) }, func() error { return c.Delete(t.Context(), "i") },
		func() error { return c.Delete(t.Context(), "nothing") }, c.Close,
	} {
		if err := step(); err != nil {
			t.Error(err)
		}
	}
	if !slices.Contains(images.called(), "kill left") || !slices.Contains(stock.called(), "stop s") || !slices.Contains(external.called(), "delete nothing") {
		t.Errorf("calls %v, %v, %v", external.called(), images.called(), stock.called())
	}
	if !external.closed || !images.closed || !stock.closed {
		t.Error("a driver was not closed")
	}
}

func TestAMachineWithoutItsDriverIsRefusedForAReasonThatMayBeShown(t *testing.T) {
	c := &host.Choice{}
	for _, m := range []host.Machine{{ID: "a"}, {ID: "b", Image: vpc.Image{SHA256: "x"}}, {ID: "c", External: &vpc.External{}}} {
		err := c.Start(t.Context(), m, host.Handlers{})
		var r *host.Refusal
		if !errors.As(err, &r) || host.ReasonOf(err) != r.Reason || r.Reason == "" {
			t.Errorf("machine %s: %v", m.ID, err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
