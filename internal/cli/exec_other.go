//go:build !linux

package cli

import (
	"errors"
	"os/exec"
)

// startInNamespace refuses: network namespaces exist on Linux only.
func startInNamespace(string, *exec.Cmd) error {
	return errors.New("network namespaces exist on Linux only")
}
