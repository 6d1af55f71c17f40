package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// identity tells one process from every other of this host, also from a later
// one with the same id.
type identity struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // since the boot, in the kernel's ticks
	Boot  string `json:"boot"`  // the kernel's id of the boot
	Exe   string `json:"exe"`
}

// identify returns the identity of a process that is there now.
func identify(pid int) (identity, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return identity{}, fmt.Errorf("reading the boot's id: %w", err)
	}
	stat, err := os.ReadFile(procPath(pid, "stat"))
	if err != nil {
		return identity{}, err
	}
	state, start, err := parseStat(stat)
	if err != nil {
		return identity{}, fmt.Errorf("reading the state of process %d: %w", pid, err)
	}
	if state == 'Z' || state == 'X' {
		return identity{}, fmt.Errorf("process %d has ended: %w", pid, os.ErrNotExist)
	}
	exe, err := os.Readlink(procPath(pid, "exe"))
	if err != nil {
		return identity{}, err
	}
	return identity{
		PID: pid, Start: start, Boot: strings.TrimSpace(string(boot)),
		// An upgrade of QEMU replaces the program under its feet.
		Exe: strings.TrimSuffix(exe, " (deleted)"),
	}, nil
}

func procPath(pid int, name string) string { return filepath.Join("/proc", strconv.Itoa(pid), name) }

// parseStat reads state and start time (proc(5), fields 3 and 22). The name in
// field 2 is the process's own and may have spaces and parentheses.
func parseStat(stat []byte) (state byte, start uint64, err error) {
	end := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if end < 0 || len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, errors.New("its stat file makes no sense")
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0][0], start, err
}

// process is a running process, held so that its id cannot come to mean
// another.
type process struct {
	pid    int
	fd     *os.File // a pidfd
	exited chan struct{}
	over   chan struct{} // closed when nobody waits any more
}

// hold takes hold of the process with this id and, when want is not nil, of
// this identity. It returns nil where there is none.
func hold(pid int, want *identity) (*process, error) {
	if pid <= 1 {
		return nil, nil
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("opening process %d: %w", pid, err)
	}
	p := &process{
		pid: pid, fd: os.NewFile(uintptr(fd), "pidfd"),
		exited: make(chan struct{}), over: make(chan struct{}),
	}
	// The handle came first, so what is read now is of the process it holds.
	if want != nil {
		got, err := identify(pid)
		if err != nil || got != *want {
			p.fd.Close()
			if err == nil || errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
				return nil, nil
			}
			return nil, fmt.Errorf("looking at process %d: %w", pid, err)
		}
	}
	conn, err := p.fd.SyscallConn()
	if err != nil {
		p.fd.Close()
		return nil, fmt.Errorf("waiting for process %d: %w", pid, err)
	}
	go func() {
		defer close(p.over)
		if err := conn.Read(ended); err != nil {
			return // released
		}
		// It is ours to reap only if this process is its parent.
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		close(p.exited)
	}()
	return p, nil
}

// ended tells whether the process of a pidfd has ended.
func ended(fd uintptr) bool {
	set := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(set, 0)
	return err == nil && n > 0
}

// kill ends the process by force. One that has ended is fine.
func (p *process) kill() error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) { failed = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if err = errors.Join(err, failed); errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// release lets go of the process, which runs on.
func (p *process) release() {
	p.fd.Close()
	<-p.over
}

// mark is the variable in QEMU's environment that says whose it is. It finds a
// QEMU that a driver started and did not live to write down.
const mark = "TABARD_MACHINE="

// strays returns the processes that carry the mark of a machine's directory.
func strays(dir string) ([]*process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var found []*process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !marked(pid, dir) {
			continue
		}
		p, err := hold(pid, nil)
		if err != nil {
			return found, err
		}
		switch {
		case p == nil:
		case marked(pid, dir):
			found = append(found, p)
		default:
			p.release()
		}
	}
	return found, nil
}

func marked(pid int, dir string) bool {
	environment, err := os.ReadFile(procPath(pid, "environ"))
	if err != nil {
		return false // gone, or not ours to see
	}
	for variable := range bytes.SplitSeq(environment, []byte{0}) {
		if string(variable) == mark+dir {
			return true
		}
	}
	return false
}
