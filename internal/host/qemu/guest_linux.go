package qemu

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host/qemu/qmp"
)

// How long QEMU may take for what it does at once when it is well.
const (
	answerTime = 10 * time.Second // to accept a connection, to answer
	quitTime   = 5 * time.Second  // to end after it was told so
	killTime   = 30 * time.Second // to be gone after it was killed
	againTime  = 2 * time.Second  // between attempts to reach a monitor that was lost
	pressTime  = 5 * time.Second  // between two presses of the power button
	drainBusy  = 100 * time.Millisecond
	drainIdle  = time.Second
)

// guest is a QEMU that this process is in touch with.
type guest struct {
	dir  string
	proc *process
	log  *slog.Logger
	down chan struct{} // closed when the guest has powered off

	words *words // nil when another process started it

	off     func() // closes down, once
	leave   context.CancelFunc
	ctx     context.Context // ends with leave
	running sync.WaitGroup

	draining sync.Mutex // the console has one reader

	mu      sync.Mutex // guards monitor
	monitor *qmp.Client
}

// reach gets in touch with a QEMU by the monitor in a machine's directory. It
// owns the process from then on, unless it fails.
func reach(ctx context.Context, dir string, proc *process, log *slog.Logger) (*guest, error) {
	g := &guest{dir: dir, proc: proc, log: log, down: make(chan struct{})}
	g.off = sync.OnceFunc(func() { close(g.down) })
	g.ctx, g.leave = context.WithCancel(context.Background())
	if err := g.connect(ctx); err != nil {
		g.leave()
		return nil, err
	}
	g.running.Go(g.stay)
	g.running.Go(g.drain)
	return g, nil
}

func (g *guest) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	conn, err := dial(ctx, g.dir)
	if err != nil {
		return fmt.Errorf("connecting to QEMU's monitor: %w", err)
	}
	monitor, err := qmp.New(ctx, conn, g.hear)
	if err != nil {
		return err
	}
	g.mu.Lock()
	g.monitor = monitor
	g.mu.Unlock()
	// What happened while nobody listened is asked for.
	status, err := g.status(ctx)
	if err != nil {
		monitor.Close()
		return err
	}
	if status == statusShutdown {
		g.off()
	}
	return nil
}

// Statuses of QEMU (qapi/run-state.json).
const (
	statusPrelaunch = "prelaunch" // never ran
	statusShutdown  = "shutdown"  // the guest powered off
)

func (g *guest) hear(e qmp.Event) {
	if e.Name == "SHUTDOWN" {
		g.off()
	}
}

func (g *guest) client() *qmp.Client {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.monitor
}

func (g *guest) execute(ctx context.Context, command string, arguments, out any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	return g.client().Execute(ctx, command, arguments, out)
}

func (g *guest) status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := g.execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// begin lets the guest's processors run, unless they ever did.
func (g *guest) begin(ctx context.Context) error {
	status, err := g.status(ctx)
	if err != nil || status != statusPrelaunch {
		return err
	}
	return g.execute(ctx, "cont", nil, nil)
}

// stay connects anew when the monitor's connection is lost and QEMU is not.
func (g *guest) stay() {
	for {
		lost := g.client()
		select {
		case <-g.ctx.Done():
			return
		case <-g.proc.exited:
			return
		case <-lost.Done():
		}
		for again := false; !again; {
			select {
			case <-g.ctx.Done():
				return
			case <-g.proc.exited:
				return
			case <-time.After(againTime):
			}
			g.log.Warn("the connection to QEMU's monitor was lost; connecting again", "reason", lost.Err())
			if err := g.connect(g.ctx); err != nil {
				g.log.Warn("QEMU's monitor is not reached", "error", err)
				continue
			}
			again = true
		}
	}
}

// drain keeps writing down what the guest writes to its console.
func (g *guest) drain() {
	for wait := drainBusy; ; {
		select {
		case <-g.ctx.Done():
			return
		case <-g.proc.exited:
			return
		case <-time.After(wait):
		}
		if n := g.drainOnce(g.ctx); n > 0 {
			wait = drainBusy
		} else {
			wait = min(2*wait, drainIdle)
		}
	}
}

// drainOnce writes down what is in the console's ring now, and returns how many
// bytes that were.
func (g *guest) drainOnce(ctx context.Context) int {
	g.draining.Lock()
	defer g.draining.Unlock()
	path := filepath.Join(g.dir, consoleFile)
	total := 0
	for total < consoleRing { // a guest that never stops writing has others wait
		var text string
		err := g.execute(ctx, "ringbuf-read", map[string]any{"device": "console", "size": consoleRead, "format": "base64"}, &text)
		if err != nil {
			return total // the next turn sees more of it
		}
		p, err := base64.StdEncoding.DecodeString(text)
		if err != nil || len(p) > consoleRead {
			g.log.Warn("QEMU returns a console that makes no sense", "error", err)
			return total
		}
		if len(p) > 0 {
			if err := appendConsole(path, p); err != nil {
				g.log.Error("the console's output is lost", "error", err)
			}
		}
		total += len(p)
		if len(p) < consoleRead {
			break
		}
	}
	return total
}

// shutDown asks the system inside to power off and waits until it did. It
// returns false when it did not do so in time.
func (g *guest) shutDown(ctx context.Context, grace time.Duration) (bool, error) {
	if status, err := g.status(ctx); err == nil && status == statusPrelaunch {
		return false, nil // nothing runs that could hear it
	}
	enough := time.NewTimer(grace)
	defer enough.Stop()
	for {
		// A system that has just begun to boot misses the first press.
		if err := g.execute(ctx, "system_powerdown", nil, nil); err != nil {
			select {
			case <-g.down:
			case <-g.proc.exited:
			default:
				if ctx.Err() == nil {
					g.log.Warn("the power button could not be pressed", "error", err)
				}
			}
		}
		select {
		case <-g.down:
			return true, nil
		case <-g.proc.exited:
			return true, nil
		case <-enough.C:
			return false, nil
		case <-ctx.Done():
			return false, fmt.Errorf("waiting for the guest to shut down: %w", ctx.Err())
		case <-time.After(pressTime):
		}
	}
}

// end makes QEMU end and lets go of it. When it returns an error QEMU may run
// still, and end may be called again.
func (g *guest) end(ctx context.Context) error {
	g.drainOnce(ctx)
	if err := g.execute(ctx, "quit", nil, nil); err == nil {
		select {
		case <-g.proc.exited:
		case <-time.After(quitTime):
		case <-ctx.Done():
		}
	}
	if err := await(g.proc); err != nil {
		return err
	}
	g.release()
	return nil
}

// await kills the process, unless it has ended, and waits until it is gone.
func await(p *process) error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	if err := p.kill(); err != nil {
		return fmt.Errorf("killing QEMU, process %d: %w", p.pid, err)
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(killTime):
		return fmt.Errorf("QEMU, process %d, was killed and does not end: see what it waits for in /proc/%d/stack", p.pid, p.pid)
	}
}

// release lets go of QEMU, which runs on.
func (g *guest) release() {
	g.leave()
	if c := g.client(); c != nil {
		c.Close()
	}
	g.running.Wait()
	// stay may have connected anew in the meantime.
	if c := g.client(); c != nil {
		c.Close()
	}
	g.proc.release()
	if g.words != nil {
		g.words.close()
	}
}

// within calls f with a short name of a directory: the name of a socket is at
// most 107 bytes, and the directory's own may be longer.
func within(dir string, f func(short string) error) error {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
}

func dial(ctx context.Context, dir string) (conn net.Conn, err error) {
	err = within(dir, func(short string) error {
		var dialer net.Dialer
		conn, err = dialer.DialContext(ctx, "unix", filepath.Join(short, socketFile))
		return err
	})
	return conn, err
}

// listen makes the monitor's socket and returns it for QEMU to inherit.
func listen(dir string) (file *os.File, err error) {
	err = within(dir, func(short string) error {
		path := filepath.Join(short, socketFile)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		var lc net.ListenConfig
		l, err := lc.Listen(context.Background(), "unix", path)
		if err != nil {
			return err
		}
		socket := l.(*net.UnixListener)
		socket.SetUnlinkOnClose(false)
		defer func() { _ = socket.Close() }()
		file, err = socket.File()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("making the monitor's socket: %w", err)
	}
	return file, nil
}
