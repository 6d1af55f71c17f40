package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	rootLabel = "guest-root" // of the ext4 file system with the system
	seedLabel = "cidata"
	ready     = "GUEST READY" // on the console once SSH answers
	hostKey   = "/etc/dropbear/dropbear_ed25519_host_key"
	instances = "/var/lib/cloud/instance-id"
)

// main plays three parts: in the initial RAM file system it finds the disk, as
// process 1 on the disk it reaps and shuts down, and as the child of that it
// does the rest. Process 1 reaps whatever ends, so it can't also wait for
// commands of its own.
func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "boot":
		err = boot()
	case os.Getpid() != 1:
		err = errors.New("this is the init of a test guest")
	case exists("/modules"):
		err = findRoot()
	default:
		err = supervise()
	}
	if err != nil {
		say("%v", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) {
	fmt.Printf("guest: "+format+"\r\n", args...)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// findRoot loads the drivers and goes on from the disk.
func findRoot() error {
	if err := mount("devtmpfs", "/dev", "devtmpfs", 0); err != nil {
		return err
	}
	if err := mount("sysfs", "/sys", "sysfs", 0); err != nil {
		return err
	}
	modules, err := filepath.Glob("/modules/*.ko") // named in their order
	if err != nil {
		return err
	}
	for _, m := range modules {
		if err := load(m); err != nil {
			say("loading %s: %v", filepath.Base(m), err)
		}
	}
	device, err := waitFor(ext4Label, rootLabel)
	if err != nil {
		return err
	}
	if err := mount(device, "/root", "ext4", unix.MS_NOATIME); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/sys"} {
		if err := mount(dir, "/root"+dir, "", unix.MS_MOVE); err != nil {
			return err
		}
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := mount(".", "/", "", unix.MS_MOVE); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, environment())
}

func environment() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "TERM=linux"}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

func mount(source, target, kind string, flags uintptr) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, ""); err != nil {
		return fmt.Errorf("mounting %s on %s: %w", source, target, err)
	}
	return nil
}

// waitFor finds the block device with a label; devices may appear late.
func waitFor(label func(io.ReaderAt) string, want string) (string, error) {
	for range 100 {
		devices, err := os.ReadDir("/sys/class/block")
		if err != nil {
			return "", err
		}
		for _, d := range devices {
			path := "/dev/" + d.Name()
			f, err := os.Open(path)
			if err != nil {
				continue // a drive without a disk
			}
			found := label(f)
			f.Close()
			if strings.EqualFold(found, want) {
				return path, nil
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return "", fmt.Errorf("no disk is labelled %s", want)
}

// ext4Label reads the superblock of an ext4 file system.
func ext4Label(r io.ReaderAt) string {
	super := make([]byte, 136)
	if _, err := r.ReadAt(super, 1024); err != nil || binary.LittleEndian.Uint16(super[56:]) != 0xef53 {
		return ""
	}
	return string(bytes.TrimRight(super[120:136], "\x00"))
}

// isoLabel reads the primary volume descriptor of ISO 9660.
func isoLabel(r io.ReaderAt) string {
	volume := make([]byte, 72)
	if _, err := r.ReadAt(volume, 16*2048); err != nil || string(volume[:6]) != "\x01CD001" {
		return ""
	}
	return strings.TrimSpace(string(volume[40:72]))
}

// supervise is process 1: it starts boot and reaps until somebody asks for an
// end with the signals that busybox's poweroff, halt and reboot send.
func supervise() error {
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, unix.SIGUSR1, unix.SIGUSR2, unix.SIGTERM)
	for _, m := range []struct{ kind, target string }{
		{"proc", "/proc"}, {"devpts", "/dev/pts"}, {"tmpfs", "/dev/shm"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
	} {
		if err := mount(m.kind, m.target, m.kind, unix.MS_NOSUID); err != nil {
			return err
		}
	}
	if err := os.Chmod("/tmp", fs.ModeSticky|0o777); err != nil {
		return err
	}
	p, err := os.StartProcess("/sbin/init", []string{"/sbin/init", "boot"},
		&os.ProcAttr{Env: environment(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return err
	}
	failed := make(chan int, 1)
	go func() {
		for {
			var status unix.WaitStatus
			pid, err := unix.Wait4(-1, &status, 0, nil)
			switch {
			case errors.Is(err, unix.ECHILD):
				time.Sleep(time.Second)
			case pid == p.Pid:
				failed <- status.ExitStatus()
			}
		}
	}()
	select {
	case why := <-ends:
		return shutdown(why)
	case status := <-failed:
		say("boot ended with status %d", status)
		return shutdown(unix.SIGUSR2)
	}
}

// shutdown ends all processes and the machine.
func shutdown(why os.Signal) error {
	command, word := unix.LINUX_REBOOT_CMD_POWER_OFF, "powering off"
	if why == unix.SIGTERM {
		command, word = unix.LINUX_REBOOT_CMD_RESTART, "restarting"
	}
	say("%s", word)
	_ = unix.Kill(-1, unix.SIGTERM)
	for range 40 {
		if unix.Kill(-1, 0) != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = unix.Kill(-1, unix.SIGKILL)
	unix.Sync()
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		say("making the disk clean: %v", err)
	}
	return unix.Reboot(command)
}

// boot follows the seed, starts the SSH server and stays for the power button.
func boot() error {
	go watchPower()
	s, err := mountSeed()
	if err != nil {
		return fmt.Errorf("reading the seed: %w", err)
	}
	for _, what := range append(s.Ignored, s.Network.ignored()...) {
		say("not understood and ignored: %s", what)
	}
	last, err := os.ReadFile(instances)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	first := string(last) != s.InstanceID // the first start of this instance
	say("instance %s, first start: %t", s.InstanceID, first)
	if err := s.apply(first); err != nil {
		return err
	}
	if err := startSSH(first); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(instances), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(instances, []byte(s.InstanceID), 0o644); err != nil {
		return err
	}
	fmt.Printf("%s\r\n", ready)
	if first {
		for i, script := range s.Scripts {
			if err := runScript(fmt.Sprintf("/var/lib/cloud/script-%d", i), script); err != nil {
				say("script %d: %v", i, err)
			}
			say("script %d ended", i)
		}
	}
	select {}
}

func mountSeed() (seed, error) {
	device, err := waitFor(isoLabel, seedLabel)
	if err != nil {
		return seed{}, err
	}
	if err := mount(device, "/run/seed", "iso9660", unix.MS_RDONLY); err != nil {
		return seed{}, err
	}
	s, err := readSeed(os.DirFS("/run/seed"))
	return s, errors.Join(err, unix.Unmount("/run/seed", 0))
}

// apply puts the seed into effect. As with cloud-init, the network follows it
// at every start and the rest at the first one of an instance.
func (s seed) apply(first bool) error {
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return err
		}
		if err := os.WriteFile("/etc/hostname", []byte(s.Hostname+"\n"), 0o644); err != nil {
			return err
		}
		hosts := "127.0.0.1 localhost\n127.0.1.1 " + s.Hostname + "\n::1 localhost\n"
		if err := os.WriteFile("/etc/hosts", []byte(hosts), 0o644); err != nil {
			return err
		}
	}
	cards, err := findCards()
	if err != nil {
		return err
	}
	commands, resolv, err := s.Network.plan(cards)
	if err != nil {
		return fmt.Errorf("network-config: %w", err)
	}
	for _, c := range commands {
		if _, err := run("ip", c...); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/etc/resolv.conf", []byte(resolv), 0o644); err != nil {
		return err
	}
	if !first {
		return nil
	}
	if err := os.MkdirAll("/root/.ssh", 0o700); err != nil {
		return err
	}
	if err := os.WriteFile("/root/.ssh/authorized_keys", []byte(strings.Join(s.Keys, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	var bundle bytes.Buffer
	for _, pem := range s.Trusted {
		fmt.Fprintln(&bundle, strings.TrimSpace(pem))
	}
	if err := os.WriteFile("/etc/ssl/certs/ca-certificates.crt", bundle.Bytes(), 0o644); err != nil {
		return err
	}
	for _, f := range s.Files {
		if err := f.write("/"); err != nil {
			return fmt.Errorf("write_files %s: %w", f.Path, err)
		}
	}
	return nil
}

func findCards() ([]card, error) {
	links, err := os.ReadDir("/sys/class/net")
	if err != nil {
		return nil, err
	}
	var cards []card
	for _, l := range links {
		mac, err := os.ReadFile("/sys/class/net/" + l.Name() + "/address")
		if err != nil {
			return nil, err
		}
		cards = append(cards, card{Name: l.Name(), MAC: strings.TrimSpace(string(mac))})
	}
	return cards, nil
}

// startSSH runs the SSH server, for keys only. An instance has a host key of
// its own, which it shows on the console as cloud-init does.
func startSSH(first bool) error {
	if first {
		if err := os.Remove(hostKey); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := run("dropbearkey", "-t", "ed25519", "-f", hostKey); err != nil {
			return err
		}
	}
	out, err := run("dropbearkey", "-y", "-f", hostKey)
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "ssh-ed25519 ") {
			fmt.Printf("-----BEGIN SSH HOST KEY KEYS-----\r\n%s\r\n-----END SSH HOST KEY KEYS-----\r\n", strings.TrimSpace(line))
		}
	}
	// Without -F it goes into the background once it listens.
	_, err = run("dropbear", "-s", "-g", "-r", hostKey)
	return err
}

// run returns what a command that ends soon writes.
func run(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func runScript(path string, script []byte) error {
	if err := os.WriteFile(path, script, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile("/var/log/cloud-init-output.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	// A file and no pipe: what the script leaves running may keep it open.
	cmd := exec.Command(path) //nolint:noctx // a script may run as long as it likes
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	return cmd.Run()
}

// watchPower asks process 1 to power off when the ACPI power button is pressed,
// which arrives as a key of an input device.
func watchPower() {
	devices, err := filepath.Glob("/dev/input/event*")
	if err != nil || len(devices) == 0 {
		say("there is no power button: %v", err)
		return
	}
	for _, d := range devices {
		go func() {
			f, err := os.Open(d)
			if err != nil {
				say("opening the power button: %v", err)
				return
			}
			defer f.Close()
			const keyEvent, keyPower = 1, 116 // linux/input-event-codes.h
			event := make([]byte, 24)         // struct input_event on a 64-bit machine
			for {
				if _, err := io.ReadFull(f, event); err != nil {
					say("reading the power button: %v", err)
					return
				}
				kind, code, value := binary.LittleEndian.Uint16(event[16:]), binary.LittleEndian.Uint16(event[18:]), binary.LittleEndian.Uint32(event[20:])
				if kind == keyEvent && code == keyPower && value == 1 {
					_ = unix.Kill(1, unix.SIGUSR2)
				}
			}
		}()
	}
}
