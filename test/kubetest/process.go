package kubetest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
)

// process is a command that lives no longer than the test.
type process struct {
	name, log string
	cmd       *exec.Cmd
	done      chan struct{} // closed when it has ended
	err       error         // valid after done
	once      sync.Once
}

// launch starts a command of KUBE_BIN with its output in a log file.
func (c *Cluster) launch(name string, args ...string) (*process, error) {
	c.T.Helper()
	return c.launchBin(Bin(c.T, name), name, args...)
}

func (c *Cluster) launchBin(bin, name string, args ...string) (*process, error) {
	p := &process{name: name, log: c.file(name + ".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	p.cmd = exec.Command(bin, args...)
	p.cmd.Dir = c.Dir
	p.cmd.Stdout, p.cmd.Stderr = out, out
	dieWithParent(p.cmd)
	started := make(chan error, 1)
	go func() {
		// The kernel ends the child with the thread that started it, so the
		// thread is kept for as long as the child lives.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		defer out.Close()
		err := p.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if p.err = p.cmd.Wait(); p.err == nil {
			p.err = fmt.Errorf("status 0")
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

// ended is nil while the process runs, and how it ended after.
func (p *process) ended() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// kill ends the process without asking, and waits for its end: the store is
// thrown away and the orderly end takes 5 s.
func (p *process) kill() {
	if p == nil {
		return
	}
	p.once.Do(func() { _ = p.cmd.Process.Kill() }) // fails only for a process that has ended
	<-p.done
}

func (p *process) tail(lines int) string { return tailOf(p.log, lines) }

func tailOf(file string, lines int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
