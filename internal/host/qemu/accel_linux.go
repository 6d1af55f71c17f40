package qemu

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// probeSector is a boot sector that ends QEMU with probePassed; its source is
// probe/probe.asm.
//
//go:embed probe/probe.bin
var probeSector []byte

const (
	// probePassed is the exit status that isa-debug-exit makes of 0x2a.
	probePassed = 0x2a<<1 | 1

	// probeTime is far more than a processor needs, and far less than an
	// interpreter: a KVM of the kind that has no hardware behind it opens, makes
	// a processor, and then runs a guest a thousand times too slowly.
	probeTime = 5 * time.Second

	// probeDisk is the size of the smallest disk that the firmware boots from.
	probeDisk = 1 << 20
)

// accelerator decides once for what machines run on.
type accelerator struct {
	mu     sync.Mutex
	chosen string
}

// accelerator returns kvm or tcg.
func (d *Driver) accelerator(ctx context.Context) (string, error) {
	if d.cfg.Accel != AccelAuto {
		return d.cfg.Accel, nil
	}
	d.accel.mu.Lock()
	defer d.accel.mu.Unlock()
	if d.accel.chosen != "" {
		return d.accel.chosen, nil
	}
	err := d.prove(ctx, AccelKVM)
	if ctx.Err() != nil {
		return "", ctx.Err() // that says nothing about KVM
	}
	d.accel.chosen = AccelKVM
	if err != nil {
		d.accel.chosen = AccelTCG
		d.log.Warn("KVM does not work here; machines run by software emulation, about ten times slower", "reason", err)
	}
	return d.accel.chosen, nil
}

// prove runs a guest with this kind of acceleration and returns why it did not
// run as it should.
func (d *Driver) prove(ctx context.Context, accel string) error {
	if accel == AccelKVM {
		if _, err := os.Stat("/dev/kvm"); err != nil {
			return fmt.Errorf("looking for KVM: %w", err)
		}
	}
	disk, err := os.CreateTemp(d.cfg.Dir, "probe")
	if err != nil {
		return fmt.Errorf("preparing the probe: %w", err)
	}
	defer disk.Close()
	_, err = disk.Write(probeSector)
	err = errors.Join(err, disk.Truncate(probeDisk), os.Remove(disk.Name()))
	if err != nil {
		return fmt.Errorf("preparing the probe: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(limited, d.cfg.QEMU, "-accel", accel, "-cpu", processor(accel),
		"-machine", "q35", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", sandbox,
		"-add-fd", "fd=3,set=1",
		"-blockdev", `{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"/dev/fdset/1"}}`,
		"-device", "virtio-blk-pci,drive=d,bootindex=0", "-device", "isa-debug-exit,iobase=0xf4,iosize=1")
	var says tail
	cmd.Stderr = &says
	cmd.ExtraFiles = []*os.File{disk}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = d.user.attributes()
	cmd.WaitDelay = time.Second
	err = cmd.Run()
	if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == probePassed {
		return nil
	}
	switch {
	case limited.Err() != nil:
		return fmt.Errorf("a small guest did not end in %s", probeTime)
	case err == nil:
		err = errors.New("a small guest ended before it was done")
	}
	return fmt.Errorf("running a small guest: %w: %s", err, says.String())
}

// processor is the model of the guest's processor: the most that there is.
func processor(accel string) string {
	if accel == AccelKVM {
		return "host"
	}
	return "max"
}

// tail keeps the last of what is written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailBytes = 2 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if over := len(t.b) - tailBytes; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.ToValidUTF8(string(bytes.TrimSpace(t.b)), "?")
}
