package cli

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// startInNamespace starts a command in a network namespace. A namespace belongs
// to a thread, and a child inherits that of the thread that starts it; the
// thread is not given back, so that nothing else ever runs in there.
func startInNamespace(path string, c *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		started <- func() error {
			ns, err := os.Open(path)
			if err != nil {
				return fmt.Errorf("open the instance's network, which is on the machine that runs it: %w", err)
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the instance's network, which needs root: %w", err)
			}
			return c.Start()
		}()
	}()
	return <-started
}
