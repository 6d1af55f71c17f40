package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Choice runs each machine on the driver that is meant for it: one that
// something else runs on External, one whose image has a disk on Images, any
// other on Stock. A driver that is nil is not there, and what is meant for it
// does not start.
type Choice struct {
	External Driver
	Images   Driver
	Stock    Driver

	mu    sync.Mutex
	of    map[string]Driver // by machine
	ended chan string
	once  sync.Once
	done  chan struct{}
	works sync.WaitGroup
}

func (c *Choice) drivers() []Driver {
	return slices.DeleteFunc([]Driver{c.External, c.Images, c.Stock}, func(d Driver) bool { return d == nil })
}

// begin forwards what ended by itself, from all drivers into one channel.
func (c *Choice) begin() {
	c.once.Do(func() {
		c.of, c.ended, c.done = map[string]Driver{}, make(chan string), make(chan struct{})
		for _, d := range c.drivers() {
			from := d.Ended()
			if from == nil {
				continue
			}
			c.works.Go(func() {
				for {
					select {
					case <-c.done:
						return
					case id := <-from:
						select {
						case c.ended <- id:
						case <-c.done:
							return
						}
					}
				}
			})
		}
	})
}

// Name implements [Driver].
func (c *Choice) Name() string {
	var names []string
	for _, d := range c.drivers() {
		names = append(names, d.Name())
	}
	return strings.Join(names, "+")
}

// Found implements [Driver].
func (c *Choice) Found(ctx context.Context) ([]string, error) {
	c.begin()
	var all []string
	for _, d := range c.drivers() {
		ids, err := d.Found(ctx)
		if err != nil {
			return nil, fmt.Errorf("driver %s: %w", d.Name(), err)
		}
		for _, id := range ids {
			c.note(id, d)
		}
		all = append(all, ids...)
	}
	return all, nil
}

func (c *Choice) note(id string, d Driver) {
	c.begin()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of[id] = d
}

func (c *Choice) driverOf(id string) Driver {
	c.begin()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.of[id]
}

// Start implements [Driver].
func (c *Choice) Start(ctx context.Context, m Machine, h Handlers) error {
	d, missing := c.Stock, "The host runs no instances of images without a disk."
	switch {
	case m.External != nil:
		d, missing = c.External, "The host takes in no machines that something else runs."
	case m.Image.SHA256 != "":
		d, missing = c.Images, "The host cannot boot images: QEMU is not installed on it, or switched off."
	}
	if d == nil {
		return &Refusal{Reason: missing}
	}
	c.note(m.ID, d)
	return d.Start(ctx, m, h)
}

// Update implements [Driver].
func (c *Choice) Update(ctx context.Context, m Machine) error {
	d := c.driverOf(m.ID)
	if d == nil {
		return fmt.Errorf("machine %s does not run", m.ID)
	}
	return d.Update(ctx, m)
}

// Stop implements [Driver].
func (c *Choice) Stop(ctx context.Context, id string, force bool) error {
	if d := c.driverOf(id); d != nil {
		return d.Stop(ctx, id, force)
	}
	return nil
}

// Delete implements [Driver]. A machine that never ran here may have left
// something with any driver.
func (c *Choice) Delete(ctx context.Context, id string) error {
	var errs []error
	for _, d := range c.drivers() {
		errs = append(errs, d.Delete(ctx, id))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.of, id)
	return nil
}

// Ended implements [Driver].
func (c *Choice) Ended() <-chan string {
	c.begin()
	return c.ended
}

// Access implements [Driver].
func (c *Choice) Access(id string) (Access, bool) {
	if d := c.driverOf(id); d != nil {
		return d.Access(id)
	}
	return Access{}, false
}

// Close implements [Driver].
func (c *Choice) Close() error {
	c.begin()
	close(c.done)
	c.works.Wait()
	var errs []error
	for _, d := range c.drivers() {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}
