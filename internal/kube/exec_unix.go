//go:build unix

package kube

import (
	"os/exec"
	"syscall"
)

// ownGroup puts a plugin that asks nobody into a process group of its own, all
// of which ends with it: what it started would else go on. One that asks a
// person stays in the terminal's, since others may not read from it.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}
