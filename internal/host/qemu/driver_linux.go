package qemu

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/imagecache"
	"tabard.dev/tabard/internal/vpc"
)

// Driver runs machines with QEMU. It is a host.Driver. Locks are taken in the
// order machine.mu, Driver.enlisting, Driver.mu.
type Driver struct {
	cfg Config
	log *slog.Logger
	dir string // of the machines

	prlimit string // program

	images *imagecache.Cache
	user   *account // that reads images, and runs machines that have none of their own
	accel  accelerator
	lock   *os.File
	ended  chan string

	ctx      context.Context // ends when the driver is closed
	cancel   context.CancelFunc
	watching sync.WaitGroup

	enlisting sync.Mutex // held while a machine's user id is chosen and written down

	mu       sync.Mutex // guards what follows, and machine.up
	closed   bool
	machines map[string]*machine
}

var _ host.Driver = (*Driver)(nil)

// machine is one that this process runs, or is busy with.
type machine struct {
	id, dir string

	mu    sync.Mutex // held while it starts, is updated or stops
	guest *guest     // nil when it does not run
	port  Port

	unreadable bool // its record is

	up bool // guarded by Driver.mu
}

const (
	defaultGrace   = 30 * time.Second // for a guest to shut down
	defaultMaxDisk = 250 << 30        // bytes
)

// New returns the driver. It fails where QEMU is not installed, and where
// another driver of the same directory lives.
func New(cfg Config) (*Driver, error) {
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	cfg.Accel = cmp.Or(cfg.Accel, AccelAuto)
	cfg.Grace = cmp.Or(cfg.Grace, defaultGrace)
	cfg.MaxDiskBytes = cmp.Or(cfg.MaxDiskBytes, defaultMaxDisk)
	if cfg.Network == nil || cfg.Images == nil {
		return nil, errors.New("the qemu driver needs a network and a source of images")
	}
	switch cfg.Accel {
	case AccelAuto, AccelKVM, AccelTCG:
	default:
		return nil, fmt.Errorf("the acceleration %q is not one of auto, kvm, tcg", cfg.Accel)
	}
	var prlimit string
	for _, p := range []struct {
		path          *string
		name, install string
	}{
		{&cfg.QEMU, "qemu-system-x86_64", "qemu-system-x86"},
		{&cfg.QEMUImg, "qemu-img", "qemu-utils"},
		{&prlimit, "prlimit", "util-linux"},
	} {
		found, err := exec.LookPath(cmp.Or(*p.path, p.name))
		if err != nil {
			return nil, fmt.Errorf("looking for QEMU: %w: install it (apt-get install --no-install-recommends %s)", err, p.install)
		}
		if *p.path, err = filepath.Abs(found); err != nil {
			return nil, fmt.Errorf("looking for QEMU: %w", err)
		}
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("finding the qemu driver's directory: %w", err)
	}
	cfg.Dir = dir
	d := &Driver{
		cfg: cfg, log: cfg.Log, dir: filepath.Join(dir, "machines"), prlimit: prlimit,
		// A controller that looks later must not hold up what watches.
		ended:    make(chan string, 16),
		machines: map[string]*machine{},
	}
	if err := d.open(); err != nil {
		return nil, err
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	return d, nil
}

func (d *Driver) open() (err error) {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return fmt.Errorf("making the qemu driver's directory: %w", err)
	}
	if d.lock, err = lock(filepath.Join(d.cfg.Dir, "lock")); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			d.lock.Close()
		}
	}()
	if d.user, err = d.account(); err != nil {
		return err
	}
	if err = d.checkUIDs(); err != nil {
		return err
	}
	d.images, err = imagecache.New(imagecache.Config{
		Dir: filepath.Join(d.cfg.Dir, "images"), Source: d.cfg.Images,
		Group: d.user.group(), Room: d.room, Inspect: d.inspect, Log: d.log,
	})
	if err != nil {
		return err
	}
	if err := d.sweep(); err != nil {
		return err
	}
	d.prune()
	return nil
}

// lock keeps a second driver out of the directory. It ends with the process,
// however that ends; no child inherits it.
func lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the qemu driver's directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w: another agent uses the directory", path, err)
	}
	return f, nil
}

// Name returns qemu.
func (d *Driver) Name() string { return "qemu" }

// Found returns the machines that have a directory here, those included that
// are stopped: their disks are there for the next start, or to be deleted.
func (d *Driver) Found(context.Context) ([]string, error) { return d.directories() }

// Start makes a machine run. See host.Driver.
func (d *Driver) Start(ctx context.Context, m host.Machine, h host.Handlers) error {
	if err := check(m); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	if err := d.clear(ctx, m.ID); err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	x, err := d.admit(m.ID)
	if err != nil {
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	defer x.mu.Unlock()
	if err := d.start(ctx, x, m, h); err != nil {
		d.forget(x)
		return fmt.Errorf("starting machine %s: %w", m.ID, err)
	}
	d.mu.Lock()
	x.up = true
	d.mu.Unlock()
	g := x.guest
	d.watching.Go(func() { d.watch(x, g) })
	return nil
}

// check returns why a machine can't run.
func check(m host.Machine) error {
	switch {
	case !machineID.MatchString(m.ID):
		return fmt.Errorf("its id %q cannot name a directory", m.ID)
	case m.External != nil:
		return errors.New("somebody else runs it")
	case m.VPC == "", m.Name == "", len(m.Interfaces) == 0:
		return errors.New("it has no VPC, no name or no interface")
	case m.VCPUs < 1, m.VCPUs > 255, m.MemoryMiB < 1, m.MemoryMiB > 16<<20:
		return fmt.Errorf("%d processors and %d MiB of memory are no machine", m.VCPUs, m.MemoryMiB)
	}
	for n, nic := range m.Interfaces {
		mac, err := net.ParseMAC(nic.MAC)
		if err != nil {
			return fmt.Errorf("interface %d: %w", n, err)
		}
		if len(mac) != 6 || mac[0]&1 != 0 {
			return fmt.Errorf("interface %d: %s is not the MAC of one network card", n, nic.MAC)
		}
		if !nic.Address.Is4() || !nic.Subnet.Contains(nic.Address) {
			return fmt.Errorf("interface %d: %s is not an IPv4 address in the subnet %s", n, nic.Address, nic.Subnet)
		}
	}
	return nil
}

// clear removes what is left of a machine that has ended by itself and could not
// be cleared away then.
func (d *Driver) clear(ctx context.Context, id string) error {
	d.mu.Lock()
	x := d.machines[id]
	left := x != nil && !x.up
	d.mu.Unlock()
	if !left {
		return nil
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.guest != nil {
		return nil // it is starting, or its QEMU does not end
	}
	return d.dismantle(ctx, x)
}

// admit enters a machine, and returns it locked.
func (d *Driver) admit(id string) (*machine, error) {
	x := &machine{id: id, dir: filepath.Join(d.dir, id)}
	x.mu.Lock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errors.New("the driver is closed")
	}
	if d.machines[id] != nil {
		return nil, errors.New("it runs already")
	}
	d.machines[id] = x
	return x, nil
}

func (d *Driver) forget(x *machine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x.up = false
	if d.machines[x.id] == x {
		delete(d.machines, x.id)
	}
}

func (d *Driver) start(ctx context.Context, x *machine, m host.Machine, h host.Handlers) error {
	r, proc, err := d.examine(x.dir)
	if err != nil {
		return err
	}
	if proc != nil {
		if err := d.takeUp(ctx, x, proc, m, h); !errors.Is(err, errDied) {
			return err
		}
	}
	if r, err = d.findDisk(x.dir, r, m); err != nil {
		return err
	}
	if r != nil {
		// Its disk is made already, or will be as it was meant to be, whatever
		// became of the image.
		return d.boot(ctx, x, r, r.Base.image(), m, h)
	}
	err = os.Mkdir(x.dir, 0o700)
	made := err == nil
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("making its directory: %w", err)
	}
	err = d.boot(ctx, x, &record{Base: baseOf(m.Image)}, m.Image, m, h)
	if err != nil && made {
		// A machine that never ran leaves nothing.
		_, proc, left := d.examine(x.dir)
		switch {
		case left != nil:
		case proc != nil:
			proc.release()
		default:
			left = d.undo(x.dir)
		}
		err = errors.Join(err, left)
	}
	return err
}

// undo removes the directory of a machine that never ran.
func (d *Driver) undo(dir string) error {
	gone := dir + deleted
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := os.Rename(dir, gone); err != nil {
		return err
	}
	return os.RemoveAll(gone)
}

// examine reads what is known of a machine and takes hold of its process, if
// that lives. A QEMU that was started and never written down, or whose record
// is lost, is ended.
func (d *Driver) examine(dir string) (*record, *process, error) {
	r, err := load(dir)
	if err != nil {
		return nil, nil, err
	}
	if r != nil && r.Process != nil {
		proc, err := hold(r.Process.PID, r.Process)
		if err != nil || proc != nil {
			return r, proc, err
		}
	}
	unknown := r != nil && r.Launching
	if r == nil {
		_, err := os.Lstat(dir)
		unknown = err == nil
	}
	if unknown {
		if err := d.endStrays(dir); err != nil {
			return nil, nil, err
		}
	}
	return r, nil, nil
}

func (d *Driver) endStrays(dir string) error {
	found, err := strays(dir)
	for _, p := range found {
		d.log.Warn("ending a QEMU that is in no record", "pid", p.pid)
		err = errors.Join(err, await(p))
		p.release()
	}
	return err
}

// errDied is a QEMU that ended while it was taken up.
var errDied = errors.New("QEMU has ended")

// dieTime is how long a QEMU that does not answer has to be gone, in case it is
// dying: its sockets close before it can be waited for.
const dieTime = time.Second

// takeUp makes a running machine this process's. Where that fails, what runs
// in it notices nothing.
func (d *Driver) takeUp(ctx context.Context, x *machine, proc *process, m host.Machine, h host.Handlers) error {
	g, err := reach(ctx, x.dir, proc, d.log.With("machine", x.id))
	if err != nil {
		defer proc.release()
		select {
		case <-proc.exited:
			return errDied
		case <-time.After(dieTime):
		}
		return fmt.Errorf("taking up QEMU, process %d: %w: stop the instance by force if this goes on", proc.pid, err)
	}
	port, err := d.cfg.Network.TakeUpTap(ctx, m, h)
	if err != nil {
		g.release()
		return fmt.Errorf("taking up its network: %w", err)
	}
	if err := g.begin(ctx); err != nil {
		port.Release(context.WithoutCancel(ctx))
		g.release()
		return fmt.Errorf("taking it up: %w", err)
	}
	x.guest, x.port = g, port
	return nil
}

// boot starts a machine that does not run.
func (d *Driver) boot(ctx context.Context, x *machine, r *record, image vpc.Image, m host.Machine, h host.Handlers) (err error) {
	path := filepath.Join(x.dir, diskFile)
	_, err = os.Lstat(path)
	missing := errors.Is(err, os.ErrNotExist)
	if missing {
		// Before it is fetched, as far as that is known then.
		if err := d.allow(image.Disk); err != nil {
			return err
		}
	}
	file, release, err := d.images.Get(ctx, image)
	if err != nil {
		return err
	}
	defer release()
	size := max(file.Virtual, d.cfg.DiskBytes)
	if missing {
		if err := errors.Join(d.allow(size), d.room(0)); err != nil {
			return err
		}
	}
	// From here on the image is in use, and stays so when this process dies.
	if err := r.save(x.dir); err != nil {
		return err
	}
	if err := d.makeDisk(ctx, x.dir, file.Path, file.Format, size); err != nil {
		return err
	}
	if err := d.makeSeed(x.dir, m); err != nil {
		return err
	}
	if err := d.cfg.Network.Discard(ctx, x.id); err != nil {
		return fmt.Errorf("removing what is left of its network: %w", err)
	}
	port, taps, err := d.cfg.Network.AttachTap(ctx, m, h)
	if err != nil {
		return fmt.Errorf("attaching it to its network: %w", err)
	}
	lasting := context.WithoutCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, port.Detach(lasting))
		}
	}()
	if len(taps) != len(m.Interfaces) {
		closeAll(taps)
		return fmt.Errorf("its network made %d taps for %d interfaces", len(taps), len(m.Interfaces))
	}
	g, err := d.launch(ctx, x, r, m, file.Path, taps)
	if err != nil {
		return err
	}
	if err := g.begin(ctx); err != nil {
		return errors.Join(fmt.Errorf("letting it run: %w", err), g.end(lasting))
	}
	x.guest, x.port = g, port
	return nil
}

// watch waits for a guest to end by itself.
func (d *Driver) watch(x *machine, g *guest) {
	select {
	case <-d.ctx.Done():
		return
	case <-g.ctx.Done():
		return
	case <-g.down:
		d.log.Info("a guest has powered off", "machine", x.id)
	case <-g.proc.exited:
		d.log.Warn("a machine's QEMU has ended by itself", "machine", x.id, "console", filepath.Join(x.dir, consoleFile))
	}
	if !d.finish(x, g) {
		return
	}
	select {
	case d.ended <- x.id:
	case <-d.ctx.Done():
	}
}

// finish clears away a machine whose guest has ended by itself. It returns
// false where somebody was faster.
func (d *Driver) finish(x *machine, g *guest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.guest != g || d.ctx.Err() != nil {
		return false
	}
	if err := d.dismantle(context.Background(), x); err != nil {
		d.log.Error("a machine that has ended leaves something behind; stopping it tries again", "machine", x.id, "error", err)
	}
	return true
}

// dismantle ends a machine's QEMU and removes its network. Its disk stays.
func (d *Driver) dismantle(ctx context.Context, x *machine) error {
	d.mu.Lock()
	x.up = false
	d.mu.Unlock()
	if x.guest != nil {
		if err := x.guest.end(ctx); err != nil {
			return err
		}
		x.guest = nil
	}
	if !x.unreadable {
		if err := settle(x.dir); err != nil {
			return err
		}
	}
	if x.port != nil {
		if err := x.port.Detach(ctx); err != nil {
			return fmt.Errorf("removing its network: %w", err)
		}
		x.port = nil
	}
	d.forget(x)
	return nil
}

// settle writes down that no process runs, and removes what only a running
// machine needs.
func settle(dir string) error {
	r, err := load(dir)
	if err != nil {
		return err
	}
	if r != nil && (r.Process != nil || r.Launching) {
		r.Process, r.Launching = nil, false
		if err := r.save(dir); err != nil {
			return err
		}
	}
	for _, name := range []string{socketFile, seedFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("removing what it needs no more: %w", err)
		}
	}
	return nil
}

// Update makes a running machine's network follow what is live. See
// host.Driver.
func (d *Driver) Update(ctx context.Context, m host.Machine) error {
	if err := check(m); err != nil {
		return fmt.Errorf("updating machine %s: %w", m.ID, err)
	}
	d.mu.Lock()
	x := d.machines[m.ID]
	d.mu.Unlock()
	if x == nil {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.guest == nil || x.port == nil {
		return fmt.Errorf("updating machine %s: it does not run", m.ID)
	}
	if err := x.port.Update(ctx, m); err != nil {
		return fmt.Errorf("updating machine %s: %w", m.ID, err)
	}
	return nil
}

// Stop ends a machine. See host.Driver.
func (d *Driver) Stop(ctx context.Context, id string, force bool) error {
	if !machineID.MatchString(id) {
		return nil // never was one
	}
	x, err := d.find(ctx, id)
	if err != nil {
		return fmt.Errorf("stopping machine %s: %w", id, err)
	}
	defer x.mu.Unlock()
	if err := d.stop(ctx, x, force); err != nil {
		return fmt.Errorf("stopping machine %s: %w", id, err)
	}
	return nil
}

// find returns a machine, locked: one that this process runs, or what an
// earlier one has left of it.
func (d *Driver) find(ctx context.Context, id string) (*machine, error) {
	d.mu.Lock()
	x := d.machines[id]
	d.mu.Unlock()
	if x != nil {
		x.mu.Lock()
		return x, nil
	}
	x = &machine{id: id, dir: filepath.Join(d.dir, id)}
	x.mu.Lock()
	_, proc, err := d.examine(x.dir)
	if err != nil {
		// What cannot be read can still be ended, and deleted.
		d.log.Warn("a machine's record is unreadable; ending what runs by its mark", "machine", id, "error", err)
		x.unreadable = true
		return x, d.endStrays(x.dir)
	}
	if proc != nil {
		g, err := reach(ctx, x.dir, proc, d.log.With("machine", id))
		if err != nil {
			d.log.Warn("a machine's monitor is not reached; ending it by force", "machine", id, "error", err)
			err := await(proc)
			proc.release()
			return x, err
		}
		x.guest = g
	}
	return x, nil
}

func (d *Driver) stop(ctx context.Context, x *machine, force bool) error {
	if x.guest != nil && !force {
		clean, err := x.guest.shutDown(ctx, d.cfg.Grace)
		if err != nil {
			return err
		}
		if !clean {
			d.log.Warn("a guest did not shut down in time; it is ended by force", "machine", x.id, "grace", d.cfg.Grace)
		}
	}
	lasting := context.WithoutCancel(ctx)
	known := x.port != nil
	if err := d.dismantle(lasting, x); err != nil {
		return err
	}
	if known {
		return nil
	}
	if err := d.cfg.Network.Discard(lasting, x.id); err != nil {
		return fmt.Errorf("removing what is left of its network: %w", err)
	}
	return nil
}

// Delete ends a machine and removes its disk. See host.Driver.
func (d *Driver) Delete(ctx context.Context, id string) error {
	if !machineID.MatchString(id) {
		return nil
	}
	if err := d.Stop(ctx, id, true); err != nil {
		return fmt.Errorf("deleting machine %s: %w", id, err)
	}
	dir := filepath.Join(d.dir, id)
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := d.undo(dir); err != nil {
		return fmt.Errorf("deleting machine %s: %w", id, err)
	}
	d.prune()
	return nil
}

// Ended delivers machines whose guest powered off, or whose QEMU ended, without
// having been told. The channel is never closed.
func (d *Driver) Ended() <-chan string { return d.ended }

// Access names the file of a running machine's console.
func (d *Driver) Access(id string) (host.Access, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.machines[id]
	if x == nil || !x.up {
		return host.Access{}, false
	}
	return host.Access{
		Driver: d.Name(), Console: filepath.Join(x.dir, consoleFile), Environment: map[string]string{},
	}, true
}

// prune removes the image files that no machine here has its disk on. Not
// doing so harms nobody but the host's disk.
func (d *Driver) prune() {
	var unsure error
	_, err := d.images.Prune(func(sum string) bool {
		used, err := d.uses(sum)
		unsure = cmp.Or(unsure, err)
		return used || err != nil
	})
	if err := cmp.Or(err, unsure); err != nil {
		d.log.Warn("images that nobody may need are kept", "error", err)
	}
}

// uses tells whether a machine here has its disk on an image.
func (d *Driver) uses(sum string) (bool, error) {
	ids, err := d.directories()
	if err != nil {
		return false, err
	}
	for _, id := range ids {
		dir := filepath.Join(d.dir, id)
		r, err := load(dir)
		if err != nil {
			return false, fmt.Errorf("looking for images in use: machine %s: %w", id, err)
		}
		if r != nil && r.Base.SHA256 == sum {
			return true, nil
		}
		if r != nil {
			continue
		}
		if _, err := os.Lstat(filepath.Join(dir, diskFile)); !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("looking for images in use: machine %s has a disk and no record", id)
		}
	}
	return false, nil
}

// Close lets go of all machines. See host.Driver.
func (d *Driver) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	all := make([]*machine, 0, len(d.machines))
	for _, x := range d.machines {
		all = append(all, x)
	}
	d.mu.Unlock()
	d.cancel()
	ctx := context.Background()
	errs := make([]error, len(all))
	var each sync.WaitGroup
	for n, x := range all {
		each.Go(func() {
			x.mu.Lock()
			defer x.mu.Unlock()
			if !d.cfg.Keep {
				if err := d.stop(ctx, x, false); err != nil {
					errs[n] = fmt.Errorf("stopping machine %s: %w", x.id, err)
				}
				return
			}
			d.forget(x)
			if x.port != nil {
				x.port.Release(ctx)
			}
			if x.guest != nil {
				x.guest.release()
				x.guest = nil
			}
		})
	}
	each.Wait()
	d.watching.Wait()
	return errors.Join(append(errs, d.lock.Close())...)
}
