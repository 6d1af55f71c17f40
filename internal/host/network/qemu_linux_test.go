package network

import (
	"bufio"
	"context"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"tabard.dev/tabard/internal/host"
)

func TestQEMUWithoutRightsUsesATapAndKeepsItAlive(t *testing.T) {
	r := newRig(t)
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("QEMU is not installed")
	}
	ctx := context.Background()
	m := spec("0717_a", "vpc-1", "10.240.0.4", 4)
	h := host.Handlers{Metadata: names(m.ID)}
	p, files, err := r.n.AttachTap(ctx, m, h)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "-accel", "tcg", "-S", "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-m", "64",
		"-netdev", "tap,id=n0,fd=3,vhost=off", "-device", "virtio-net-pci,netdev=n0,romfile=,mac="+m.Interfaces[0].MAC, "-qmp", "stdio")
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL}
	var complaints strings.Builder
	cmd.Stderr = &complaints
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	files[0].Close()
	greeting, _ := bufio.NewReader(said).ReadString('\n')
	p.Release(ctx)
	again, err := r.n.TakeUpTap(ctx, m, h)
	if err != nil {
		t.Error(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if !strings.Contains(greeting, "QMP") || complaints.Len() > 0 {
		t.Errorf("QEMU says %q and %q", greeting, complaints.String())
	}
	if again == nil {
		t.FailNow()
	}
	// Detaching one whose tap has gone with its machine is fine.
	eventually(t, "the tap is gone", func() bool {
		gone := false
		r.inRouter(m.VPC, func() error {
			ports, err := portsOf(m.VPC)
			gone = len(ports) == 0
			return err
		})
		return gone
	})
	if err := again.Detach(ctx); err != nil {
		t.Error(err)
	}
}
