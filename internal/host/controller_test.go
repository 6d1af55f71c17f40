package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a driver that starts nothing and keeps account of what it was
// asked for.
type recorder struct {
	mu      sync.Mutex
	calls   []string
	running map[string]host.Machine
	closed  bool
	left    []string // by an earlier process
	ended   chan string

	onStart func(ctx context.Context, id string) error
	onStop  func(id string) error
	onClose error
}

func (r *recorder) Name() string { return "recorder" }

func (r *recorder) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	r.mu.Lock()
	r.calls = append(r.calls, "start "+m.ID)
	_, runs := r.running[m.ID]
	hook := r.onStart
	r.mu.Unlock()
	if runs {
		return errors.New("it runs already")
	}
	if hook != nil {
		if err := hook(ctx, m.ID); err != nil {
			return err
		}
	}
	if h.Metadata == nil {
		return errors.New("no metadata handler")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[m.ID] = m
	return nil
}

func (r *recorder) Found(context.Context) ([]string, error) { return r.left, nil }

func (r *recorder) Update(_ context.Context, m host.Machine) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, "update "+m.ID)
	r.running[m.ID] = m
	return nil
}

func (r *recorder) Ended() <-chan string { return r.ended }

func (r *recorder) Delete(ctx context.Context, id string) error {
	return r.end(ctx, "delete", id)
}

func (r *recorder) Stop(ctx context.Context, id string, force bool) error {
	if force {
		return r.end(ctx, "kill", id)
	}
	return r.end(ctx, "stop", id)
}

func (r *recorder) end(_ context.Context, how, id string) error {
	r.mu.Lock()
	r.calls = append(r.calls, how+" "+id)
	hook := r.onStop
	r.mu.Unlock()
	if hook != nil {
		if err := hook(id); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, id)
	return nil
}

func (r *recorder) Access(id string) (host.Access, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.running[id]
	return host.Access{Driver: "recorder"}, ok
}

func (r *recorder) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	clear(r.running)
	return r.onClose
}

func (r *recorder) machine(id string) (host.Machine, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, ok := r.running[id]
	return m, ok
}

func (r *recorder) called() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// stack is a directory with a controller for host "h1".
type stack struct {
	*apitest.Env
	d          *directory.Directory
	driver     *recorder
	controller *host.Controller
	subnet     *vpc.Subnet
	log        *bytes.Buffer

	mu   sync.Mutex
	made []string // instances whose handlers were asked for
}

func start(t *testing.T) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t), log: &bytes.Buffer{}}
	s.d = s.Config.Directory
	s.subnet = &vpc.Subnet{
		ID: "0717-" + uuid.NewString(), AccountID: s.Owner.AccountID, VPCID: "r006-v", Zone: "us-south-1",
		CIDR: netip.MustParsePrefix("10.240.0.0/24"), Name: "s",
	}
	s.update(func(tx *directory.Tx) { s.d.Subnets.Put(tx, s.subnet) })
	s.restart()
	return s
}

// restart makes a new driver and controller, as a server that was started
// again has.
func (s *stack) restart() {
	s.driver = &recorder{running: map[string]host.Machine{}, ended: make(chan string)}
	s.controller = host.NewController(host.ControllerConfig{
		World: &host.Own{Directory: s.d, HostID: "h1"}, Driver: s.driver, Log: slog.New(slog.NewTextHandler(s.log, nil)),
		Handlers: func(id string) host.Handlers {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.made = append(s.made, id)
			return host.Handlers{Metadata: http.NotFoundHandler()}
		},
	})
}

// run lets the controller work until the returned function, which returns what
// Run did.
func (s *stack) run() (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.controller.Run(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	s.T.Cleanup(func() { _ = stop() })
	return stop
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(context.Background(), "", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

func (s *stack) instance(hostID, status string) string {
	s.T.Helper()
	id := "0717_" + uuid.NewString()
	i := &vpc.Instance{
		ID: id, AccountID: s.Owner.AccountID, Name: "vm-" + id[5:13], VPCID: "r006-v", HostID: hostID, Status: status,
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 3},
		Interfaces: []vpc.Interface{
			{ID: "0717-a", SubnetID: s.subnet.ID, Address: netip.MustParseAddr("10.240.0.4"), MAC: "02:00:00:00:00:04"},
		},
	}
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, i) })
	return id
}

// set changes an instance's status as an API call does.
func (s *stack) set(id, status string) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		i, ok := s.d.Instances.Get(id)
		if !ok {
			s.T.Error("instance is gone")
			return
		}
		next := i.Clone()
		next.Status = status
		s.d.Instances.Put(tx, next)
	})
}

const patience = 10 * time.Second

// become waits until an instance has the status.
func (s *stack) become(id, status string) *vpc.Instance {
	s.T.Helper()
	last := "(gone)"
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if i, ok := s.d.Instances.Get(id); ok {
			if last = i.Status; last == status {
				return i
			}
		}
	}
	s.T.Fatalf("the instance is %s, not %s; calls %v", last, status, s.driver.called())
	return nil
}

func TestAPendingInstanceIsStarted(t *testing.T) {
	for _, status := range []string{vpc.Pending, vpc.Starting} {
		s := start(t)
		id := s.instance("h1", status)
		s.run()
		s.become(id, vpc.Running)
		m, ok := s.driver.machine(id)
		want := host.Machine{
			ID: id, Name: "vm-" + id[5:13], VPC: "r006-v",
			Interfaces: []host.Interface{{ID: "0717-a", MAC: "02:00:00:00:00:04", Address: netip.MustParseAddr("10.240.0.4"), Subnet: s.subnet.CIDR}},
			Metadata:   vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 3},
			Fresh:      true,
		}
		if diff := cmp.Diff(want, m, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); !ok || diff != "" {
			t.Errorf("machine (-want +got):\n%s", diff)
		}
		if !slices.Equal(s.made, []string{id}) {
			t.Errorf("handlers of %v, want those of the instance", s.made)
		}
		if a, ok := s.controller.Access(id); !ok || a.Driver != "recorder" {
			t.Errorf("access %+v, %v", a, ok)
		}
	}
}

func TestAMachineIsFreshUntilItHasRun(t *testing.T) {
	s := start(t)
	refuse := errors.New("no image")
	s.driver.onStart = func(context.Context, string) error { return refuse }
	id := s.instance("h1", vpc.Pending)
	s.run()
	fresh := func() bool {
		t.Helper()
		s.become(id, vpc.Running)
		m, _ := s.driver.machine(id)
		return m.Fresh
	}
	s.become(id, vpc.Failed)
	s.driver.mu.Lock()
	s.driver.onStart = nil
	s.driver.mu.Unlock()
	s.set(id, vpc.Starting)
	if !fresh() {
		t.Error("one that failed to start is taken for one that ran")
	}
	s.set(id, vpc.Restarting)
	if fresh() {
		t.Error("one that is restarted is taken for one that never ran")
	}
	s.set(id, vpc.Stopping)
	s.become(id, vpc.Stopped)
	s.set(id, vpc.Starting)
	if fresh() {
		t.Error("one that was stopped is taken for one that never ran")
	}
}

func TestAMachineIsNotUpdatedForHavingRun(t *testing.T) {
	s := start(t)
	first := s.instance("h1", vpc.Pending)
	stop := s.run()
	s.become(first, vpc.Running)
	second := s.instance("h1", vpc.Pending)
	s.become(second, vpc.Running)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if got, want := s.driver.called(), []string{"start " + first, "start " + second}; !slices.Equal(got, want) {
		t.Errorf("calls %v, want %v", got, want)
	}
}

func TestAnInstanceThatIsMadeLaterIsStartedAtOnce(t *testing.T) {
	s := start(t)
	s.run()
	began := time.Now()
	s.become(s.instance("h1", vpc.Pending), vpc.Running)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestAStoppingInstanceIsStopped(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	s.set(id, vpc.Stopping)
	s.become(id, vpc.Stopped)
	if _, ok := s.driver.machine(id); ok {
		t.Error("the machine runs on")
	}
	s.set(id, vpc.Starting)
	s.become(id, vpc.Running)
	if _, ok := s.driver.machine(id); !ok {
		t.Error("the machine does not run again")
	}
}

func TestARestartingInstanceIsStoppedAndStarted(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	s.set(id, vpc.Restarting)
	s.become(id, vpc.Running)
	if want := []string{"start " + id, "stop " + id, "start " + id}; !slices.Equal(s.driver.called(), want) {
		t.Errorf("calls %v, want %v", s.driver.called(), want)
	}
}

func TestADeletedInstanceIsStoppedAndThenGone(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
	s.set(id, vpc.Deleting)
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, ok := s.d.Instances.Get(id); !ok {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the instance is still there")
		}
	}
	if _, ok := s.driver.machine(id); ok {
		t.Error("the machine runs on")
	}
	if _, ok := s.controller.Access(id); ok {
		t.Error("there is access to a machine that is gone")
	}
}

func TestAnInstanceThatDoesNotStartHasFailed(t *testing.T) {
	s := start(t)
	s.driver.onStart = func(context.Context, string) error { return errors.New("no such device /dev/secret") }
	id := s.instance("h1", vpc.Pending)
	s.run()
	i := s.become(id, vpc.Failed)
	if i.StatusReason == "" || strings.Contains(i.StatusReason, "/dev/secret") {
		t.Errorf("reason %q", i.StatusReason)
	}
	s.driver.mu.Lock()
	s.driver.onStart = nil
	s.driver.mu.Unlock()
	s.set(id, vpc.Starting)
	if i = s.become(id, vpc.Running); i.StatusReason != "" {
		t.Errorf("a running instance has the reason %q", i.StatusReason)
	}
}

func TestAnInstanceWithoutItsSubnetHasFailed(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.update(func(tx *directory.Tx) { s.d.Subnets.Delete(tx, s.subnet) })
	s.run()
	s.become(id, vpc.Failed)
	if calls := s.driver.called(); len(calls) != 0 {
		t.Errorf("calls %v", calls)
	}
}

func TestOtherHostsInstancesAndThoseAtRestAreLeftAlone(t *testing.T) {
	s := start(t)
	foreign := s.instance("h2", vpc.Pending)
	stopped, failed := s.instance("h1", vpc.Stopped), s.instance("h1", vpc.Failed)
	s.run()
	mine := s.instance("h1", vpc.Pending)
	s.become(mine, vpc.Running)
	for id, status := range map[string]string{foreign: vpc.Pending, stopped: vpc.Stopped, failed: vpc.Failed} {
		if i, ok := s.d.Instances.Get(id); !ok || i.Status != status || i.Revision != 1 {
			t.Errorf("instance %+v", i)
		}
	}
	if want := []string{"start " + mine}; !slices.Equal(s.driver.called(), want) {
		t.Errorf("calls %v, want %v", s.driver.called(), want)
	}
}

func TestRunningInstancesStartAgainWithTheServer(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	stop := s.run()
	before := s.become(id, vpc.Running).Revision
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	s.restart()
	s.run()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, ok := s.driver.machine(id); ok {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the machine does not run again")
		}
	}
	if i, _ := s.d.Instances.Get(id); i.Status != vpc.Running || i.Revision != before {
		t.Errorf("status %s, revision %d, was %d", i.Status, i.Revision, before)
	}
}

func TestWhatWasAskedForInTheMeantimeIsNotOverwritten(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	s.driver.onStart = func(context.Context, string) error {
		s.set(id, vpc.Stopping) // somebody stops it while it starts
		return nil
	}
	s.run()
	s.become(id, vpc.Stopped)
	if want := []string{"start " + id, "stop " + id}; !slices.Equal(s.driver.called(), want) {
		t.Errorf("calls %v, want %v", s.driver.called(), want)
	}
	if _, ok := s.driver.machine(id); ok {
		t.Error("the machine runs on")
	}
}

func TestAFailureToStopIsTriedAgain(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	tries := 0
	s.driver.onStop = func(string) error {
		if tries++; tries < 3 {
			return errors.New("device is busy")
		}
		return nil
	}
	s.run()
	s.become(id, vpc.Running)
	s.set(id, vpc.Deleting)
	// Each change of any instance makes the controller look again.
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		i, ok := s.d.Instances.Get(id)
		if !ok {
			break
		}
		if i.Status != vpc.Deleting || time.Now().After(end) {
			t.Fatalf("the instance is %s", i.Status)
		}
		s.instance("h2", vpc.Stopped)
	}
	if tries != 3 {
		t.Errorf("%d tries", tries)
	}
}

func TestTheEndOfTheContextStopsAllMachines(t *testing.T) {
	s := start(t)
	id := s.instance("h1", vpc.Pending)
	stop := s.run()
	s.become(id, vpc.Running)
	if err := stop(); err != nil {
		t.Error(err)
	}
	if !s.driver.closed {
		t.Error("the driver was not closed")
	}
	if i, _ := s.d.Instances.Get(id); i.Status != vpc.Running {
		t.Errorf("the instance is %s; it would not start again", i.Status)
	}

	s.restart()
	s.driver.onClose = errors.New("device is busy")
	if err := s.run()(); !errors.Is(err, s.driver.onClose) {
		t.Errorf("error %v", err)
	}
}

func TestAnInstanceThatWasStartingWhenTheServerStoppedStartsLater(t *testing.T) {
	s := start(t)
	for range 20 { // the writer's turn and the context's end race
		id := s.instance("h1", vpc.Pending)
		entered := make(chan struct{})
		s.driver.onStart = func(ctx context.Context, _ string) error {
			close(entered)
			<-ctx.Done()
			return fmt.Errorf("start: %w", ctx.Err())
		}
		stop := s.run()
		<-entered
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if i, _ := s.d.Instances.Get(id); i.Status != vpc.Pending {
			t.Fatalf("the instance is %s, want %s", i.Status, vpc.Pending)
		}
		s.set(id, vpc.Stopped)
		s.restart()
	}
	id := s.instance("h1", vpc.Pending)
	s.run()
	s.become(id, vpc.Running)
}

func TestAfterAnyActionsTheMachinesAreWhereTheirInstancesSay(t *testing.T) {
	s := start(t)
	var mu sync.Mutex
	twice := ""
	s.driver.onStart = func(_ context.Context, id string) error {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
		if _, runs := s.driver.machine(id); runs {
			mu.Lock()
			twice = id
			mu.Unlock()
		}
		return nil
	}
	s.run()
	ids := make([]string, 4)
	for n := range ids {
		ids[n] = s.instance("h1", vpc.Pending)
	}
	for range 120 {
		id := ids[rand.IntN(len(ids))]
		action := []string{"start", "stop", "reboot"}[rand.IntN(3)]
		s.update(func(tx *directory.Tx) {
			i, _ := s.d.Instances.Get(id)
			if next, err := i.Next(action); err == nil {
				c := i.Clone()
				c.Status = next
				s.d.Instances.Put(tx, c)
			}
		})
	}
	for _, id := range ids {
		for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
			i, _ := s.d.Instances.Get(id)
			_, runs := s.driver.machine(id)
			if runs && i.Status == vpc.Running || !runs && i.Status == vpc.Stopped {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("the instance is %s, its machine runs: %v", i.Status, runs)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if twice != "" {
		t.Errorf("the machine of %s was started twice", twice)
	}
}
