//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a part of the measured whole.
type process struct {
	name string
	url  string
	cmd  *exec.Cmd
	gone bool
}

// start runs this program in a role and waits until it has said where it is. The
// calling goroutine must stay on its thread: the process is killed with it, also
// while it is stopped by a signal.
func start(role string, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{name: role, cmd: exec.Command(self, append([]string{"-role=" + role}, args...)...)} //nolint:noctx // ended by stop
	p.cmd.Stderr = os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the %s did not start: %w", role, err), p.stop())
	}
	p.url = strings.TrimSpace(line)
	return p, nil
}

// stop asks the process to end, and kills it when it does not in time.
func (p *process) stop() error {
	if p == nil || p.gone {
		return nil
	}
	p.gone = true
	_ = p.cmd.Process.Signal(os.Interrupt) // it may have ended
	timer := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("the %s ended: %w", p.name, err)
	}
	return nil
}

// ask calls the listener of an agent.
func (p *process) ask(ctx context.Context, method, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return do(ctx, method, p.url+path, "", nil, into)
}

// do sends a JSON request and reads the answer into what is not nil.
func do(ctx context.Context, method, url, bearer string, body, into any) error {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, in)
	if err != nil {
		return err
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s: status %d: %s", method, url, resp.StatusCode, b)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}

// tick is the unit of /proc/<pid>/stat on Linux, whatever the kernel's own is.
const tick = 10 * time.Millisecond

// processor returns the processor time that the process has used.
func (p *process) processor() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := bytes.Cut(b, []byte(") ")) // the name before may hold spaces
	fields := strings.Fields(string(rest))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat is not as expected", p.cmd.Process.Pid)
	}
	user, err := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * tick, cmp.Or(err, err2)
}

// own returns the processor time that this process has used.
func own() (time.Duration, error) {
	var u syscall.Rusage
	err := syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

// residentOf returns the resident set of a process in bytes.
func residentOf(pid int) (uint64, error) {
	v, err := sizes(fmt.Sprintf("/proc/%d/status", pid), "VmRSS")
	return v["VmRSS"], err
}

// sizes reads lines such as "Slab: 12 kB" of a file below /proc, in bytes.
func sizes(file string, names ...string) (map[string]uint64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	out := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		for _, wanted := range names {
			if name != wanted {
				continue
			}
			n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w", name, file, err)
			}
			out[name] = n << 10
		}
	}
	if len(out) != len(names) {
		return nil, fmt.Errorf("%s lacks some of %v", file, names)
	}
	return out, nil
}
