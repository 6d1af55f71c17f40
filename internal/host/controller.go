package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// ControllerConfig are the controller's collaborators.
type ControllerConfig struct {
	World    World
	Driver   Driver
	Handlers func(instanceID string) Handlers
	Log      *slog.Logger
}

// Controller makes the machines of one host follow their instances: it looks
// at each instance's status, has the driver do what the status asks for, and
// reports the status that follows. It acts on what it finds, not on what it was
// told, so a restart or a lost signal changes nothing.
//
// Instances do not wait for each other: a machine that takes a minute to shut
// down, or an image that takes ten to fetch, holds up no other.
type Controller struct {
	cfg  ControllerConfig
	done chan struct{} // signalled when work on a machine has ended

	settled chan struct{} // closed when the work that the first look began has ended

	mu       sync.Mutex
	machines map[string]*machine
	first    map[string]bool // machines that this work is about; nil once it has ended
}

// machine is what the controller knows of one.
type machine struct {
	busy     bool           // somebody works on it
	working  int64          // revision of the instance that they act on
	missed   bool           // it has changed since
	again    int64          // revision of the instance that it was stopped for, to be started again
	running  bool           // this process has started it, or taken it up
	found    bool           // an earlier process left it, and it was not looked at yet
	applied  Machine        // as it was started or updated last
	placed   *vpc.Placement // what that was made from
	ended    bool           // it ended by itself, and that was not reported yet
	reported int64          // revision of the instance that was reported on last: what follows is the server's to say
}

// NewController returns a controller; Run makes it work.
func NewController(cfg ControllerConfig) *Controller {
	return &Controller{cfg: cfg, done: make(chan struct{}, 1), settled: make(chan struct{}), machines: map[string]*machine{}, first: map[string]bool{}}
}

// parallel bounds the machines that are worked on at a time.
const parallel = 16

// Run works until the context ends, waits for the work under way, and then
// lets the driver close.
func (c *Controller) Run(ctx context.Context) error {
	found, err := c.cfg.Driver.Found(ctx)
	if err != nil {
		return fmt.Errorf("look for machines that are here already: %w", err)
	}
	for _, id := range found {
		c.machines[id] = &machine{found: true}
	}
	var work sync.WaitGroup
	slots := make(chan struct{}, parallel)
	ticker := time.NewTicker(sweep)
	defer ticker.Stop()
	for {
		if c.look(ctx, &work, slots) {
			c.settle("")
		}
		select {
		case <-ctx.Done():
			work.Wait()
			if err := c.cfg.Driver.Close(); err != nil {
				return fmt.Errorf("let go of the machines: %w", err)
			}
			return nil
		case <-c.cfg.World.Changed():
		case <-c.done:
		case id := <-c.cfg.Driver.Ended():
			c.ended(id)
		case <-ticker.C:
		}
	}
}

// Access tells how to get inside a running machine.
func (c *Controller) Access(id string) (Access, bool) { return c.cfg.Driver.Access(id) }

func (c *Controller) ended(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.machines[id]; m != nil {
		m.running, m.ended = false, true
	}
}

// Settled is closed once each instance that was there at the beginning has been
// seen to: it runs again, or it was tried.
func (c *Controller) Settled() <-chan struct{} { return c.settled }

// settle notes that the first work on a machine has ended; "" is none.
func (c *Controller) settle(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first == nil {
		return
	}
	if delete(c.first, id); len(c.first) == 0 {
		c.first = nil
		close(c.settled)
	}
}

// look starts work on every machine that is not where its instance says. It
// reports whether it is known where they say.
func (c *Controller) look(ctx context.Context, work *sync.WaitGroup, slots chan struct{}) bool {
	placed, known := c.cfg.World.Placements()
	if !known || ctx.Err() != nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range placed {
		if c.machines[id] == nil {
			c.machines[id] = &machine{}
		}
	}
	for id, m := range c.machines {
		p := placed[id]
		if m.busy {
			// Whoever works on it has us look again.
			m.missed = m.missed || revisionOf(p) != m.working
			continue
		}
		if p == nil && !m.running && !m.found {
			delete(c.machines, id)
			continue
		}
		do := c.step(m, p)
		if do == nil {
			continue
		}
		m.busy, m.working, m.missed = true, revisionOf(p), false
		if c.first != nil {
			c.first[id] = true
		}
		work.Go(func() {
			defer c.settle(id)
			slots <- struct{}{}
			defer func() { <-slots }()
			ok := ctx.Err() == nil && c.try(ctx, id, p, do)
			c.mu.Lock()
			m.busy = false
			// After a failure there is nothing new to look at before the next
			// sweep, unless something else is wanted now.
			ok = ok || m.missed
			c.mu.Unlock()
			if ok {
				select {
				case c.done <- struct{}{}:
				default:
				}
			}
		})
	}
	return true
}

func revisionOf(p *vpc.Placement) int64 {
	if p == nil {
		return 0
	}
	return p.Instance.Revision
}

// try does one step and reports whether it succeeded.
func (c *Controller) try(ctx context.Context, id string, p *vpc.Placement, do func(context.Context, string, *vpc.Placement) error) bool {
	err := do(ctx, id, p)
	if err != nil && ctx.Err() == nil {
		status := "not placed here"
		if p != nil {
			status = p.Instance.Status
		}
		c.cfg.Log.Error("machine does not follow its instance; will try again", "instance", id, "status", status, "error", err)
	}
	return err == nil
}

// step says what is to be done about a machine, if anything. It is called with
// the lock held, and its result without.
func (c *Controller) step(m *machine, p *vpc.Placement) func(context.Context, string, *vpc.Placement) error {
	if p == nil {
		// Its instance is gone or elsewhere. What it had on its disk is nobody's
		// to remove without being asked.
		return c.stop
	}
	if p.Instance.Revision == m.reported && p.Instance.Status != vpc.Running {
		return nil
	}
	switch p.Instance.Status {
	case vpc.Pending, vpc.Starting:
		return c.begin
	case vpc.Restarting:
		if (m.running || m.found) && m.again != p.Instance.Revision {
			return c.again
		}
		return c.begin // it is stopped, or was started and that is not reported yet
	case vpc.Running:
		switch {
		case m.ended && p.Instance.Revision == m.reported:
			return nil
		case m.ended:
			return c.reportEnd
		case !m.running:
			return c.begin // the host was restarted; the machine starts again, or is taken up
		}
		// Only what has changed is worth the work of turning it into a machine.
		if p != m.placed && !placement.Same(p, m.placed) {
			return c.update
		}
	case vpc.Stopping:
		return c.halt
	case vpc.Deleting:
		return c.remove
	case vpc.Stopped, vpc.Failed:
		if m.running || m.found {
			return c.stop
		}
		m.ended = false
	}
	return nil
}

// same tells whether a machine that runs as one already is as the other.
func same(a, b Machine) bool {
	a.Fresh, b.Fresh = false, false
	return reflect.DeepEqual(a, b)
}

// begin starts a machine unless it runs, and reports that it does.
func (c *Controller) begin(ctx context.Context, id string, p *vpc.Placement) error {
	if !c.isRunning(id) {
		if err := c.start(ctx, id, p); err != nil {
			if ctx.Err() != nil {
				return err // the host is stopping; that says nothing about the instance
			}
			// A machine that an earlier process left may be running all the while: an
			// instance that is called failed would have it stopped. Unless the driver
			// says that it cannot run, it is taken up at the next try.
			var refusal *Refusal
			if p.Instance.Status == vpc.Running && c.isFound(id) && !errors.As(err, &refusal) {
				return fmt.Errorf("take up: %w", err)
			}
			c.cfg.Log.Error("instance did not start", "instance", id, "error", err)
			return c.report(ctx, p, vpc.Failed, ReasonOf(err))
		}
	}
	if p.Instance.Status == vpc.Running {
		return nil
	}
	return c.report(ctx, p, vpc.Running, "")
}

// Refusal is an error of a driver whose text may be shown to the owner of the
// instance: it says nothing about the host.
type Refusal struct {
	Reason string
	Cause  error
}

func (r *Refusal) Error() string {
	if r.Cause == nil {
		return r.Reason
	}
	return r.Reason + ": " + r.Cause.Error()
}

func (r *Refusal) Unwrap() error { return r.Cause }

// ReasonOf returns why a machine did not start, as its owner may know it.
func ReasonOf(err error) string {
	var r *Refusal
	if errors.As(err, &r) {
		return r.Reason
	}
	return "The host could not start the instance."
}

// again stops a machine and starts it.
func (c *Controller) again(ctx context.Context, id string, p *vpc.Placement) error {
	if err := c.stop(ctx, id, p); err != nil {
		return err
	}
	c.note(id, func(x *machine) { x.again = p.Instance.Revision })
	return c.begin(ctx, id, p)
}

func (c *Controller) start(ctx context.Context, id string, p *vpc.Placement) error {
	m, err := MachineOf(p)
	if err != nil {
		return err
	}
	c.note(id, func(x *machine) { x.ended = false })
	if err := c.cfg.Driver.Start(ctx, m, c.cfg.Handlers(id)); err != nil {
		return err
	}
	c.note(id, func(x *machine) { x.running, x.found, x.applied, x.placed = !x.ended, false, m, p })
	return nil
}

func (c *Controller) update(ctx context.Context, id string, p *vpc.Placement) error {
	m, err := MachineOf(p)
	if err != nil {
		return err
	}
	if !c.isApplied(id, m) {
		if err := c.cfg.Driver.Update(ctx, m); err != nil {
			return err
		}
	}
	c.note(id, func(x *machine) { x.applied, x.placed = m, p })
	return nil
}

// halt stops a machine whose instance is to be stopped.
func (c *Controller) halt(ctx context.Context, id string, p *vpc.Placement) error {
	if err := c.stop(ctx, id, p); err != nil {
		return err
	}
	return c.report(ctx, p, vpc.Stopped, "")
}

func (c *Controller) stop(ctx context.Context, id string, p *vpc.Placement) error {
	force := p == nil || p.Instance.Force || p.Instance.Status == vpc.Failed
	if err := c.cfg.Driver.Stop(ctx, id, force); err != nil {
		return err
	}
	c.note(id, func(x *machine) { x.running, x.found, x.ended = false, false, false })
	return nil
}

func (c *Controller) remove(ctx context.Context, id string, p *vpc.Placement) error {
	if err := c.cfg.Driver.Delete(ctx, id); err != nil {
		return err
	}
	c.note(id, func(x *machine) { x.running, x.found, x.ended = false, false, false })
	return c.report(ctx, p, "", "")
}

// reportEnd follows a machine that ended by itself.
func (c *Controller) reportEnd(ctx context.Context, id string, p *vpc.Placement) error {
	if err := c.cfg.Driver.Stop(ctx, id, true); err != nil {
		return err
	}
	return c.report(ctx, p, vpc.Stopped, "")
}

func (c *Controller) report(ctx context.Context, p *vpc.Placement, status, reason string) error {
	r := vpc.Report{InstanceID: p.Instance.ID, Seen: p.Instance.Status, Status: status, Reason: reason}
	if err := c.cfg.World.Report(ctx, r); err != nil {
		return err
	}
	c.note(p.Instance.ID, func(x *machine) { x.reported = p.Instance.Revision })
	return nil
}

func (c *Controller) note(id string, f func(*machine)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c.machines[id])
}

func (c *Controller) isFound(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.machines[id].found
}

func (c *Controller) isApplied(id string, m Machine) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return same(c.machines[id].applied, m)
}

func (c *Controller) isRunning(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.machines[id].running
}
