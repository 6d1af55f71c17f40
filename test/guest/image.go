// Package guest makes a small real Linux system for tests of virtual machines:
// a disk image that boots by BIOS from a virtio disk, with Debian's cloud
// kernel, an SSH server, curl and jq, that is set up by nothing but a NoCloud
// seed (see the command init below it). It also logs in to such machines.
//
// The image is made from Debian's packages as they are installed on this
// machine (scripts/deps.sh brings them) and kept in the repository's .cache. It
// is not an operating system for anybody's use.
package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// recipe is part of what the image is made of: its change makes another image.
//
//go:embed image.go
var recipe []byte

// tools are needed to make an image, with Debian's names of their packages.
var tools = []struct{ command, packages string }{
	{"apt-get", "apt"}, {"cpio", "cpio"}, {"mkfs.ext4", "e2fsprogs"}, {"mformat", "mtools"}, {"qemu-img", "qemu-utils"},
	{"syslinux", "syslinux syslinux-common"},
	{"busybox", "busybox-static"}, {"curl", "curl"}, {"jq", "jq"}, {"dropbear", "dropbear-bin"}, {"ssh", "openssh-client"},
}

// programs of this machine, besides busybox, are copied with their libraries.
var programs = []string{"curl", "jq", "dropbear", "dropbearkey", "dbclient"}

// drivers, without those they need, which are found. The cloud kernel has none
// for SATA, so a machine's disks are virtio or SCSI behind virtio.
var drivers = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "virtio_scsi", "sd_mod", "sr_mod", "isofs", "button", "evdev"}

const (
	sector     = 512
	bootStart  = 2048              // sector of the FAT partition with the kernel
	bootLength = 40 << 20 / sector // sectors
	rootStart  = bootStart + bootLength
	rootLength = 128 << 20 / sector // of the ext4 partition with the system
)

// cmdline makes the start faster under emulation and keeps the clock right
// there: the kernel measures the processor's counter against a timer, and on a
// busy machine finds something far from the truth.
const cmdline = "console=ttyS0 quiet edd=off mitigations=off random.trust_cpu=on no_timer_check audit=0 net.ifnames=0 panic=5 clocksource=hpet tsc=unstable"

// Image is the path of the disk image, in the format qcow2, to be copied or used
// as a read-only backing file. The first call in a repository makes it, which
// takes some ten seconds. It skips the test where no image can be made.
func Image(t testing.TB) string {
	t.Helper()
	needTools(t)
	path, err := build(t.Context(), filepath.Join(harness.Root(), ".cache", "guest"))
	if err != nil {
		t.Fatalf("making the guest: %v", err)
	}
	return path
}

// needTools skips a test where no image can be made.
func needTools(t testing.TB) {
	t.Helper()
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		t.Skip("the guest is made from a Debian of the architecture amd64")
	}
	if os.Geteuid() != 0 {
		t.Skip("making the guest's disk needs root, for the owners of its files")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool.command); err != nil {
			t.Skipf("making the guest needs %s: apt-get install %s, or scripts/deps.sh test", tool.command, tool.packages)
		}
	}
}

// build makes the image in a folder unless it is there already.
func build(ctx context.Context, cache string) (string, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// Tests run in several processes; the first one makes it for all.
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	// What a killed test has left; nobody else is at work now.
	leavings, err := filepath.Glob(filepath.Join(cache, "making-*"))
	if err != nil {
		return "", err
	}
	for _, dir := range leavings {
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	}
	path, err := attempt(ctx, cache)
	if errors.Is(err, errLists) {
		if out, err := exec.CommandContext(ctx, "apt-get", "update", "-q").CombinedOutput(); err != nil {
			return "", fmt.Errorf("apt-get update: %w\n%s", err, out)
		}
		path, err = attempt(ctx, cache)
	}
	return path, errors.Join(err, prune(cache))
}

// errLists says that apt knows no kernel, or one that is no longer there.
var errLists = errors.New("apt's lists of packages are missing or old")

// attempt is build with the lists of packages as they are.
func attempt(ctx context.Context, cache string) (string, error) {
	work, err := os.MkdirTemp(cache, "making-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(work) }()
	b := &builder{ctx: ctx, work: work}
	if err := b.gather(); err != nil {
		return "", err
	}
	key, err := b.key()
	if err != nil {
		return "", err
	}
	path := filepath.Join(cache, "guest-"+key+".qcow2")
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return path, errors.Join(err, os.Chtimes(path, time.Time{}, time.Now()))
	}
	return path, b.make(path)
}

// prune removes images that no test has asked for in two days.
func prune(cache string) error {
	old, err := filepath.Glob(filepath.Join(cache, "guest-*.qcow2"))
	if err != nil {
		return err
	}
	for _, path := range old {
		info, err := os.Stat(path)
		if err == nil && time.Since(info.ModTime()) > 48*time.Hour {
			err = os.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// builder makes one image in a working folder.
type builder struct {
	ctx  context.Context
	work string

	kernel string            // name=version of the package
	files  map[string]string // what is copied from this machine: path in the guest to path here
}

func (b *builder) path(name string) string { return filepath.Join(b.work, name) }

// run returns what a command writes to its standard output.
func (b *builder) run(dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(b.ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Dir, cmd.Stderr = dir, &stderr
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "MTOOLSRC=/dev/null", "LC_ALL=C", "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out), nil
}

// gather finds everything that goes into the image.
func (b *builder) gather() error {
	if _, err := b.run(filepath.Join(harness.Root(), "test"), "go", "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", b.path("init"), "tabard.dev/tabard/test/guest/init"); err != nil {
		return err
	}
	b.files = map[string]string{"/usr/bin/init": b.path("init")}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	b.files["/usr/bin/busybox"] = busybox
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			return err
		}
		b.files["/usr/bin/"+name] = path
		libraries, err := b.run(".", "ldd", path)
		if err != nil {
			return err
		}
		for word := range strings.FieldsSeq(libraries) {
			if strings.HasPrefix(word, "/") {
				b.files["/usr"+strings.TrimPrefix(word, "/usr")] = word
			}
		}
	}
	if b.kernel, err = b.kernelPackage(); err != nil {
		return fmt.Errorf("%w: %w", errLists, err)
	}
	return nil
}

// kernelPackage is the name and version of the package that Debian's name for
// the newest cloud kernel stands for.
func (b *builder) kernelPackage() (string, error) {
	depends, err := b.run(".", "apt-cache", "depends", "--important", "linux-image-cloud-amd64")
	if err != nil {
		return "", err
	}
	_, name, found := strings.Cut(depends, "Depends: ")
	name, _, _ = strings.Cut(name, "\n")
	if !found || !strings.HasPrefix(name, "linux-image-") {
		return "", fmt.Errorf("linux-image-cloud-amd64 depends on no kernel:\n%s", depends)
	}
	shown, err := b.run(".", "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(shown) {
		if version, found := strings.CutPrefix(line, "Version: "); found {
			return name + "=" + strings.TrimSpace(version), nil
		}
	}
	return "", fmt.Errorf("%s has no version:\n%s", name, shown)
}

// key is a digest of everything that goes into the image.
func (b *builder) key() (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%x\n", b.kernel, sha256.Sum256(recipe))
	var names []string
	for name := range b.files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintln(h, name)
		f, err := os.Open(b.files[name])
		if err != nil {
			return "", err
		}
		_, err = io.Copy(h, f)
		f.Close()
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

func (b *builder) make(path string) error {
	vmlinuz, modules, err := b.fetchKernel()
	if err != nil {
		return err
	}
	if err := b.initialRAM(modules); err != nil {
		return fmt.Errorf("making the initial RAM file system: %w", err)
	}
	if err := b.root(); err != nil {
		return fmt.Errorf("making the root folder: %w", err)
	}
	if err := b.disk(vmlinuz); err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	if _, err := b.run(b.work, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2"); err != nil {
		return err
	}
	return os.Rename(b.path("disk.qcow2"), path)
}

// fetchKernel unpacks Debian's kernel beside the image, without installing it.
func (b *builder) fetchKernel() (vmlinuz, modules string, err error) {
	// apt's own unprivileged user may not write here.
	if _, err := b.run(b.work, "apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", b.kernel); err != nil {
		return "", "", fmt.Errorf("%w: %w", errLists, err)
	}
	deb, err := only(b.path("linux-image-*.deb"))
	if err != nil {
		return "", "", err
	}
	if _, err := b.run(b.work, "dpkg-deb", "-x", deb, "kernel"); err != nil {
		return "", "", err
	}
	if vmlinuz, err = only(b.path("kernel/boot/vmlinuz-*")); err != nil {
		return "", "", err
	}
	modules, err = only(b.path("kernel/lib/modules/*"))
	return vmlinuz, modules, err
}

func only(pattern string) (string, error) {
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%s: found %q, not one", pattern, found)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// initialRAM holds init and the drivers, numbered in the order to load them in.
func (b *builder) initialRAM(modules string) error {
	for _, dir := range []string{"dev", "sys", "root", "modules"} {
		if err := os.MkdirAll(b.path("ram/"+dir), 0o755); err != nil {
			return err
		}
	}
	if err := copyFile(b.path("ram/init"), b.path("init"), 0o755); err != nil {
		return err
	}
	order, err := loadOrder(modules, drivers)
	if err != nil {
		return err
	}
	for i, module := range order {
		if err := copyFile(b.path(fmt.Sprintf("ram/modules/%02d-%s", i, filepath.Base(module))), module, 0o644); err != nil {
			return err
		}
	}
	_, err = b.run(b.path("ram"), "sh", "-c", "find . | sort | cpio -o -H newc -R 0:0 --quiet >../initrd")
	return err
}

// root is the folder that becomes the root file system.
func (b *builder) root() error {
	root := b.path("root")
	for _, dir := range []string{
		"dev", "proc", "sys", "run", "tmp", "mnt", "root", "home", "usr/bin", "usr/lib", "usr/lib64",
		"var/log", "var/lib", "etc/dropbear", "etc/ssl/certs",
	} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Chmod(filepath.Join(root, "root"), 0o700); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"bin": "usr/bin", "sbin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "usr/sbin": "bin", "var/run": "../run", "var/tmp": "../tmp",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			return err
		}
	}
	for name, source := range b.files {
		if err := copyFile(filepath.Join(root, name), source, 0o755); err != nil {
			return err
		}
	}
	applets, err := b.run(".", "busybox", "--list")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(applets) {
		if err := os.Symlink("busybox", filepath.Join(root, "usr/bin", name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for name, text := range map[string]string{
		// Nobody has a password that opens anything.
		"passwd":        "root:*:0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/:/bin/false\n",
		"group":         "root:*:0:\nnogroup:*:65534:\n",
		"shells":        "/bin/sh\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"os-release":    "ID=tabard-guest\nNAME=\"Tabard test guest\"\nPRETTY_NAME=\"Tabard test guest\"\n",
		"profile":       "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n",
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// disk puts both partitions and the boot loader on a raw disk.
func (b *builder) disk(vmlinuz string) error {
	disk := b.path("disk.raw")
	master, err := os.ReadFile("/usr/lib/syslinux/mbr/mbr.bin")
	if err != nil {
		return err
	}
	table := make([]byte, sector)
	copy(table[:440], master)
	partition(table[446:], 0x80, 0x0e, bootStart, bootLength) // active, FAT16 by logical block addresses
	partition(table[462:], 0, 0x83, rootStart, rootLength)    // Linux
	table[510], table[511] = 0x55, 0xaa
	if err := os.WriteFile(disk, table, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(disk, (rootStart+rootLength)*sector); err != nil {
		return err
	}
	config := "DEFAULT guest\nPROMPT 0\nNOESCAPE 1\nLABEL guest\n  KERNEL /vmlinuz\n  INITRD /initrd\n  APPEND " + cmdline + "\n"
	if err := os.WriteFile(b.path("syslinux.cfg"), []byte(config), 0o644); err != nil {
		return err
	}
	boot := fmt.Sprintf("%s@@%d", disk, bootStart*sector)
	for _, c := range [][]string{
		{"mformat", "-i", boot, "-v", "BOOT", "-T", fmt.Sprint(bootLength), "-h", "255", "-s", "63", "-H", fmt.Sprint(bootStart), "::"},
		{"mcopy", "-i", boot, vmlinuz, "::/vmlinuz"},
		{"mcopy", "-i", boot, "initrd", "syslinux.cfg", "::/"},
		{"syslinux", "--install", "--offset", fmt.Sprint(bootStart * sector), disk},
		{"mkfs.ext4", "-q", "-F", "-L", "guest-root", "-m", "0", "-d", "root", "-J", "size=4",
			"-E", fmt.Sprintf("offset=%d,lazy_itable_init=0,lazy_journal_init=0,nodiscard", rootStart*sector), disk, fmt.Sprintf("%dk", rootLength*sector/1024)},
	} {
		if _, err := b.run(b.work, c[0], c[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// partition writes an entry of a master boot record's table. The addresses by
// cylinder, head and sector say "beyond what can be said so".
func partition(entry []byte, active, kind byte, start, length uint32) {
	copy(entry, []byte{active, 0xfe, 0xff, 0xff, kind, 0xfe, 0xff, 0xff})
	binary.LittleEndian.PutUint32(entry[8:], start)
	binary.LittleEndian.PutUint32(entry[12:], length)
}

func copyFile(to, from string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}
