package host

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/vpc"
)

// ControllerConfig are the controller's collaborators.
type ControllerConfig struct {
	Directory *directory.Directory
	Driver    Driver
	HostID    string
	Handlers  func(instanceID string) Handlers
	Log       *slog.Logger
}

// Controller makes the machines of one host follow their instances: it looks
// at each instance's status, does what the status asks for, and writes the
// status that follows. It acts on what it finds, not on what it was told, so a
// restart or a lost signal changes nothing.
type Controller struct {
	cfg ControllerConfig

	mu      sync.Mutex
	running map[string]bool // machines that the driver has started
}

// NewController returns a controller; Run makes it work.
func NewController(cfg ControllerConfig) *Controller {
	return &Controller{cfg: cfg, running: map[string]bool{}}
}

// sweep is how often the controller looks without having been told, so that a
// failed attempt is made again.
const sweep = 10 * time.Second

// Run works until the context ends, and then stops all machines.
func (c *Controller) Run(ctx context.Context) error {
	w := c.cfg.Directory.Watch(directory.KindInstance)
	defer w.Stop()
	ticker := time.NewTicker(sweep)
	defer ticker.Stop()
	for {
		c.reconcile(ctx)
		select {
		case <-ctx.Done():
			if err := c.cfg.Driver.Close(); err != nil {
				return fmt.Errorf("stop the machines: %w", err)
			}
			return nil
		case <-w.C:
		case <-ticker.C:
		}
	}
}

// Access tells how to get inside a running machine.
func (c *Controller) Access(id string) (Access, bool) { return c.cfg.Driver.Access(id) }

func (c *Controller) reconcile(ctx context.Context) {
	wanted := map[string]bool{}
	for _, inst := range c.cfg.Directory.InstancesByHost.Get(c.cfg.HostID) {
		if ctx.Err() != nil {
			return
		}
		wanted[inst.ID] = inst.Status != vpc.Stopped && inst.Status != vpc.Failed
		if err := c.follow(ctx, inst); err != nil && ctx.Err() == nil {
			c.cfg.Log.Error("instance does not follow its status; will try again",
				"instance", inst.ID, "status", inst.Status, "error", err)
		}
	}
	for _, id := range c.machines() {
		if wanted[id] {
			continue
		}
		if err := c.stop(ctx, id); err != nil && ctx.Err() == nil {
			c.cfg.Log.Error("machine without a running instance does not stop; will try again", "instance", id, "error", err)
		}
	}
}

// machines returns the ids of the machines that run.
func (c *Controller) machines() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Keys(c.running))
}

func (c *Controller) follow(ctx context.Context, inst *vpc.Instance) error {
	switch inst.Status {
	case vpc.Pending, vpc.Starting:
		return c.begin(ctx, inst)
	case vpc.Restarting:
		if err := c.stop(ctx, inst.ID); err != nil {
			return err
		}
		return c.begin(ctx, inst)
	case vpc.Running:
		if c.isRunning(inst.ID) {
			return nil
		}
		// The server was restarted; the machine starts again.
		return c.begin(ctx, inst)
	case vpc.Stopping:
		if err := c.stop(ctx, inst.ID); err != nil {
			return err
		}
		return c.become(ctx, inst, vpc.Stopped, "")
	case vpc.Deleting:
		if err := c.stop(ctx, inst.ID); err != nil {
			return err
		}
		return c.remove(ctx, inst)
	}
	return nil
}

func (c *Controller) begin(ctx context.Context, inst *vpc.Instance) error {
	if !c.isRunning(inst.ID) {
		if err := c.start(ctx, inst); err != nil {
			if ctx.Err() != nil {
				return err // the host is stopping; that says nothing about the instance
			}
			c.cfg.Log.Error("instance did not start", "instance", inst.ID, "error", err)
			return c.become(ctx, inst, vpc.Failed, "The host could not start the instance.")
		}
	}
	if inst.Status == vpc.Running {
		return nil
	}
	return c.become(ctx, inst, vpc.Running, "")
}

func (c *Controller) start(ctx context.Context, inst *vpc.Instance) error {
	nic := inst.Interfaces[0]
	subnet, ok := c.cfg.Directory.Subnets.Get(nic.SubnetID)
	if !ok {
		return fmt.Errorf("subnet %s does not exist", nic.SubnetID)
	}
	m := Machine{
		ID: inst.ID, VPC: inst.VPCID, MAC: nic.MAC, Address: nic.Address, Subnet: subnet.CIDR,
		Metadata: inst.Metadata.Enabled, HopLimit: inst.Metadata.ResponseHopLimit,
	}
	if err := c.cfg.Driver.Start(ctx, m, c.cfg.Handlers(inst.ID)); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running[inst.ID] = true
	return nil
}

func (c *Controller) stop(ctx context.Context, id string) error {
	if err := c.cfg.Driver.Stop(ctx, id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, id)
	return nil
}

func (c *Controller) isRunning(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.running[id]
}

// become writes an instance's next status, unless somebody has asked for
// something else in the meantime: then the next look sees that.
func (c *Controller) become(ctx context.Context, seen *vpc.Instance, status, reason string) error {
	return c.change(ctx, seen, func(tx *directory.Tx, inst *vpc.Instance) {
		next := inst.Clone()
		next.Status, next.StatusReason = status, reason
		c.cfg.Directory.Instances.Put(tx, next)
	})
}

func (c *Controller) remove(ctx context.Context, seen *vpc.Instance) error {
	return c.change(ctx, seen, func(tx *directory.Tx, inst *vpc.Instance) {
		c.cfg.Directory.Instances.Delete(tx, inst)
	})
}

func (c *Controller) change(ctx context.Context, seen *vpc.Instance, f func(*directory.Tx, *vpc.Instance)) error {
	err := c.cfg.Directory.Update(ctx, "", func(tx *directory.Tx) error {
		inst, ok := c.cfg.Directory.Instances.Get(seen.ID)
		if !ok || inst.Status != seen.Status {
			return fault.New(fault.Stale, "conflict", "The instance's status was changed in the meantime.")
		}
		f(tx, inst)
		return nil
	})
	if fault.Is(err, fault.Stale) {
		return nil
	}
	return err
}
