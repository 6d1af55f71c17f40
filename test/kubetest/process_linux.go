package kubetest

import (
	"os/exec"
	"syscall"
)

// dieWithParent has the kernel end the command when the test's process ends,
// however it ends.
func dieWithParent(cmd *exec.Cmd) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
}
