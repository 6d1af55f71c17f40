package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/cloudinit"
)

// sandbox is QEMU's system-call filter with all that can be denied: a machine
// needs no other program, no other user and no scheduling of its own.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// metadataAddress is where every machine finds its metadata service
// (reference/instance-metadata-and-vpc.md section 1.1).
var metadataAddress = netip.AddrFrom4([4]byte{169, 254, 169, 254})

// gateway is the first address of a subnet after that of the network.
func gateway(subnet netip.Prefix) netip.Addr { return subnet.Masked().Addr().Next() }

// makeSeed writes what the machine reads when it boots.
func (d *Driver) makeSeed(dir string, m host.Machine) error {
	s := cloudinit.Seed{
		InstanceID: m.ID, Hostname: m.Name, Keys: m.Keys, UserData: m.UserData,
		Services: []netip.Addr{metadataAddress},
	}
	if m.Metadata.Protocol == "https" {
		s.CACert = d.cfg.CACert
	}
	for n, nic := range m.Interfaces {
		i := cloudinit.Interface{MAC: nic.MAC, Address: netip.PrefixFrom(nic.Address, nic.Subnet.Bits())}
		if n == 0 {
			i.Gateway = gateway(nic.Subnet)
			i.Nameservers = []netip.Addr{i.Gateway}
		}
		s.Interfaces = append(s.Interfaces, i)
	}
	err := replace(filepath.Join(dir, seedFile), func(f *os.File) error {
		_, err := s.WriteTo(f)
		return err
	})
	if err != nil {
		return fmt.Errorf("writing the cloud-init seed: %w", err)
	}
	return nil
}

// inheritance is the files that QEMU inherits.
type inheritance struct {
	files []*os.File
}

// firstInherited is the number of the first file that a child inherits.
const firstInherited = 3

func (i *inheritance) add(f *os.File) (number int) {
	i.files = append(i.files, f)
	return firstInherited + len(i.files) - 1
}

func (i *inheritance) open(path string, flags int) (number int, err error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, err
	}
	return i.add(f), nil
}

func (i *inheritance) close() {
	for _, f := range i.files {
		f.Close()
	}
}

// command returns QEMU's arguments for a machine. It adds the files that they
// name by number.
func command(m host.Machine, dir, image, format, accel string, own *inheritance, taps []*os.File) ([]string, error) {
	socket, err := listen(dir)
	if err != nil {
		return nil, err
	}
	monitor := own.add(socket)
	args := []string{
		"-name", "guest=" + m.ID,
		"-machine", "q35,usb=off,vmport=off,dump-guest-core=off",
		"-accel", accel,
		"-cpu", processor(accel),
		"-m", strconv.Itoa(m.MemoryMiB),
		"-smp", strconv.Itoa(m.VCPUs),
		"-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", sandbox,
		"-rtc", "base=utc",
		"-boot", "strict=on",
		// The driver says when the processors begin, and looks at a guest that
		// has powered off before QEMU ends.
		"-S", "-no-shutdown",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d,server=on,wait=off", monitor),
		"-mon", "chardev=monitor,mode=control",
		"-chardev", fmt.Sprintf("ringbuf,id=console,size=%d", consoleRing),
		"-device", "isa-serial,chardev=console",
		"-object", "rng-builtin,id=random",
		"-device", "virtio-rng-pci,rng=random",
	}
	set := 0
	for _, disk := range []struct {
		name, path, driver, backing string
		flags                       int
	}{
		{"image", image, format, "", os.O_RDONLY},
		{"disk", filepath.Join(dir, diskFile), "qcow2", "image", os.O_RDWR},
		{"seed", filepath.Join(dir, seedFile), "raw", "", os.O_RDONLY},
	} {
		number, err := own.open(disk.path, disk.flags)
		if err != nil {
			return nil, fmt.Errorf("opening the machine's %s: %w", disk.name, err)
		}
		set++
		readOnly := disk.flags == os.O_RDONLY
		file, err := json.Marshal(map[string]any{
			"driver": "file", "node-name": disk.name + "-file", "filename": fmt.Sprintf("/dev/fdset/%d", set),
			"read-only": readOnly, "discard": "unmap",
		})
		if err != nil {
			return nil, err
		}
		options := map[string]any{
			"driver": disk.driver, "node-name": disk.name, "file": disk.name + "-file",
			"read-only": readOnly, "discard": "unmap",
		}
		if disk.driver == "qcow2" {
			options["backing"] = nil
			if disk.backing != "" {
				options["backing"] = disk.backing
			}
		}
		node, err := json.Marshal(options)
		if err != nil {
			return nil, err
		}
		args = append(args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", number, set, disk.name),
			"-blockdev", string(file), "-blockdev", string(node))
	}
	args = append(args,
		"-device", "virtio-blk-pci,drive=disk,serial=boot,bootindex=0",
		"-device", "virtio-blk-pci,drive=seed,serial=seed")
	for n, tap := range taps {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=n%d,fd=%d,vhost=off", n, own.add(tap)),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=n%d,mac=%s,romfile=", n, m.Interfaces[n].MAC))
	}
	return args, nil
}

// launch starts QEMU, with its processors waiting, and returns it when its
// monitor answers. It closes the taps.
func (d *Driver) launch(ctx context.Context, x *machine, r *record, m host.Machine, image string, taps []*os.File) (*guest, error) {
	var own inheritance
	defer own.close()
	accel, err := d.accelerator(ctx)
	if err != nil {
		closeAll(taps)
		return nil, fmt.Errorf("choosing an acceleration: %w", err)
	}
	args, err := command(m, x.dir, image, r.Base.Format, accel, &own, taps)
	if err != nil {
		closeAll(taps)
		return nil, err
	}
	account, err := d.enlist(x, r)
	if err != nil {
		return nil, err
	}
	says, speaks, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	own.files = append(own.files, speaks)    // to be closed; it is not inherited by number
	cmd := exec.Command(d.cfg.QEMU, args...) //nolint:noctx // it outlives the call
	cmd.ExtraFiles = own.files[:len(own.files)-1]
	cmd.Stderr = speaks
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), mark + x.dir}
	cmd.Dir = "/"
	cmd.SysProcAttr = account.attributes()
	if err := cmd.Start(); err != nil {
		says.Close()
		return nil, fmt.Errorf("starting QEMU: %w", err)
	}
	proc, err := d.enter(x, r, cmd)
	if err != nil {
		says.Close()
		return nil, err
	}
	log := d.log.With("machine", x.id)
	words := listenTo(says, log)
	own.close() // so that QEMU alone has the monitor's socket and the pipe's end
	own.files = nil
	g, err := d.greet(ctx, x, proc, log)
	if err != nil {
		err = errors.Join(err, await(proc))
		proc.release()
		words.close()
		if text := words.last.String(); text != "" {
			err = fmt.Errorf("%w: QEMU says: %s", err, text)
		}
		if accel == AccelKVM {
			err = fmt.Errorf("%w: if KVM is the reason, let the agent choose the acceleration (auto) or emulate (tcg)", err)
		}
		return nil, err
	}
	g.words = words
	return g, nil
}

// enter writes down which process it is.
func (d *Driver) enter(x *machine, r *record, cmd *exec.Cmd) (proc *process, err error) {
	// Until the parent has taken note of its end, its id is its own.
	who, err := identify(cmd.Process.Pid)
	early := errors.Is(err, os.ErrNotExist) // greet finds out why
	if err == nil || early {
		proc, err = hold(cmd.Process.Pid, nil)
	}
	if err == nil && proc == nil {
		err = errors.New("it is gone")
	}
	if err != nil {
		err = fmt.Errorf("taking hold of QEMU, process %d: %w", cmd.Process.Pid, err)
		return nil, errors.Join(err, cmd.Process.Kill(), ignoreExit(cmd.Wait()))
	}
	err = cmd.Process.Release()
	if err == nil && !early {
		r.Launching, r.Process = false, &who
		err = r.save(x.dir)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("writing down QEMU's process: %w", err), await(proc))
		proc.release()
		return nil, err
	}
	return proc, nil
}

func ignoreExit(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// greet reaches a QEMU that has just been started, or notices that it ended.
func (d *Driver) greet(ctx context.Context, x *machine, proc *process, log *slog.Logger) (*guest, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-proc.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	g, err := reach(ctx, x.dir, proc, log)
	cancel()
	<-watched
	if err != nil {
		select {
		case <-proc.exited:
			return nil, errors.New("QEMU ended at once")
		default:
			return nil, err
		}
	}
	return g, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
