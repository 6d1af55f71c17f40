package kubetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Process is a command that lives no longer than the test, with its output in a
// file.
type Process struct {
	name, log string
	cmd       *exec.Cmd
	done      chan struct{} // closed when it has ended
	err       error         // valid after done
}

// launch starts a command of KUBE_BIN with its output in a log file.
func (c *Cluster) launch(name string, args ...string) (*Process, error) {
	c.T.Helper()
	return StartProcess(exec.Command(Bin(c.T, name), args...), c.file(name+".log"))
}

// StartProcess starts a command in the folder of its log, NAME.log, which is
// continued if there is one.
func StartProcess(cmd *exec.Cmd, log string) (*Process, error) {
	p := &Process{name: strings.TrimSuffix(filepath.Base(log), ".log"), log: log, cmd: cmd, done: make(chan struct{})}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd.Dir = filepath.Dir(log)
	cmd.Stdout, cmd.Stderr = out, out
	dieWithParent(cmd)
	started := make(chan error, 1)
	go func() {
		// The kernel ends the child with the thread that started it, so the
		// thread is kept for as long as the child lives.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		defer out.Close()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if p.err = cmd.Wait(); p.err == nil {
			p.err = errors.New("status 0")
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	return p, nil
}

// Name is that of the log, without its ending.
func (p *Process) Name() string { return p.name }

// PID is the process's number, also when it has ended.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Ended is nil while the process runs, and how it ended after.
func (p *Process) Ended() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Kill ends the process without asking, and waits for its end: what it keeps is
// thrown away, and an orderly end takes seconds. It may be nil.
func (p *Process) Kill() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Kill() // fails only for a process that has ended
	<-p.done
}

// Tail is the end of its log.
func (p *Process) Tail() string { return Tail(p.log) }

// tailLines are enough to tell why a program ended, and not too many to read.
const tailLines = 40

// Tail returns the end of a log.
func Tail(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-tailLines):], "\n")
}
