package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/imagecache"
)

// Bounds of qemu-img where it reads a stranger's file.
const (
	inspectTime   = 30 * time.Second
	inspectMemory = 1 << 30 // bytes of address space
	inspectOutput = 1 << 20 // bytes
)

// formatTime bounds how long qemu-img takes to write an empty disk.
const formatTime = time.Minute

// inspect is the second opinion on an image: what QEMU itself makes of it. It
// reads the file as the machines' user and within bounds.
func (d *Driver) inspect(ctx context.Context, path, format string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	// prlimit bounds itself and then becomes qemu-img; from outside, it takes
	// more privileges to bound another user's process.
	cmd := exec.CommandContext(ctx, d.prlimit,
		fmt.Sprintf("--as=%d", inspectMemory), fmt.Sprintf("--cpu=%d", inspectTime/time.Second),
		d.cfg.QEMUImg, "info", "--output=json", "--image-opts",
		"driver="+format+",file.driver=file,file.filename=/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = d.user.attributes()
	cmd.WaitDelay = time.Second
	var says tail
	out := limited{left: inspectOutput}
	cmd.Stdout, cmd.Stderr = &out, &says
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("qemu-img cannot read it: %w: %s", err, says.String())
	}
	var info struct {
		Format  string `json:"format"`
		Backing string `json:"backing-filename"`
		Special struct {
			Data struct {
				DataFile string `json:"data-file"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out.b.Bytes(), &info); err != nil {
		return fmt.Errorf("reading what qemu-img says of it: %w", err)
	}
	switch {
	case info.Format != format:
		return fmt.Errorf("qemu-img takes it for %q", info.Format)
	case info.Backing != "", info.Special.Data.DataFile != "":
		return errors.New("qemu-img finds the name of another file in it")
	}
	return nil
}

// limited keeps what is written to it up to a bound.
type limited struct {
	b    bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, errors.New("the output is too long")
	}
	l.left -= len(p)
	return l.b.Write(p)
}

// minReserve is the least that is kept free on the file system of disks and
// images, in bytes; on a large one it is a twentieth.
const minReserve = 1 << 30

// room refuses what would leave less than the reserve free.
func (d *Driver) room(need int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(d.cfg.Dir, &s); err != nil {
		return fmt.Errorf("looking for room on the disk: %w", err)
	}
	total, free := int64(s.Blocks)*s.Bsize, int64(s.Bavail)*s.Bsize
	if reserve := max(minReserve, total/20); free-need < reserve {
		return &host.Refusal{
			Reason: "The host has no room for the instance's disk.",
			Cause:  fmt.Errorf("of the %d MiB that are free at %s, %d are needed and %d kept in reserve: make room", free>>20, d.cfg.Dir, need>>20, reserve>>20),
		}
	}
	return nil
}

// allow refuses disks that are too large.
func (d *Driver) allow(size int64) error {
	if size > d.cfg.MaxDiskBytes {
		return &host.Refusal{Reason: fmt.Sprintf("The image's disk of %d MiB is larger than the %d MiB that the host allows.", size>>20, d.cfg.MaxDiskBytes>>20)}
	}
	return nil
}

// findDisk decides what a machine that does not run boots from. It returns the
// record of the disk that is here, or nil where one is to be made, which only a
// machine that never ran gets: an empty disk in the place of a lost one would
// have its owner believe that all is well. No disk is ever removed here.
func (d *Driver) findDisk(dir string, r *record, m host.Machine) (*record, error) {
	path := filepath.Join(dir, diskFile)
	_, err := os.Lstat(path)
	lost := errors.Is(err, os.ErrNotExist)
	switch {
	case err != nil && !lost:
		return nil, fmt.Errorf("looking for the disk: %w", err)
	case lost && m.Fresh:
		return r, nil
	case lost:
		return nil, &host.Refusal{
			Reason: "The instance's disk is not on this host.",
			Cause:  fmt.Errorf("%s is missing: bring it back, or delete the instance", path),
		}
	case r != nil:
		return r, nil
	}
	return d.mend(dir, path, m)
}

// mend makes the record of a disk that has lost it, if the disk is over the
// machine's image. Another's disk is set aside for a machine that never ran,
// and not touched otherwise.
func (d *Driver) mend(dir, path string, m host.Machine) (*record, error) {
	under, err := backing(path)
	match := err == nil && m.Image.SHA256 != "" && filepath.Base(under) == m.Image.SHA256
	if !match && !m.Fresh {
		return nil, &host.Refusal{
			Reason: "The instance's disk on this host cannot be used.",
			Cause:  errors.Join(fmt.Errorf("%s has no record and is not over the image %s: bring %s back, or delete the instance", path, m.Image.ID, recordFile), err),
		}
	}
	if match {
		d.log.Warn("a machine's record was lost and is made anew from its disk", "machine", m.ID, "disk", path)
		return &record{Base: baseOf(m.Image)}, nil
	}
	for n := 1; ; n++ {
		kept := fmt.Sprintf("%s.%d%s", path, n, aside)
		if _, err := os.Lstat(kept); err == nil {
			continue
		}
		if err := os.Rename(path, kept); err != nil {
			return nil, fmt.Errorf("setting aside a disk that nobody knows: %w", err)
		}
		d.log.Warn("a disk that nobody knows was set aside", "machine", m.ID, "disk", kept)
		return nil, syncDir(dir)
	}
}

// backing returns what a disk says that it is over.
func backing(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return imagecache.Backing(f)
}

// makeDisk makes a machine's disk over an image, unless it has one. The image
// is named and not read: QEMU is told of it anew at each start.
func (d *Driver) makeDisk(ctx context.Context, dir, image, format string, size int64) error {
	path := filepath.Join(dir, diskFile)
	if _, err := os.Lstat(path); err == nil {
		return nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("looking for the disk: %w", err)
	}
	f, err := os.OpenFile(path+unfinished, os.O_CREATE|os.O_TRUNC|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	err = errors.Join(d.format(ctx, f, image, format, size), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+unfinished, path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("making the disk: %w", err)
	}
	return nil
}

// format makes a file a disk. qemu-img opens it again and so has to own it
// meanwhile.
func (d *Driver) format(ctx context.Context, f *os.File, image, format string, size int64) error {
	if d.user != nil {
		if err := f.Chown(int(d.user.uid), -1); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, formatTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.cfg.QEMUImg, "create", "-q", "-f", "qcow2", "-u", "-F", format, "-b", image,
		"/proc/self/fd/3", strconv.FormatInt(size, 10))
	var says tail
	cmd.Stderr = &says
	cmd.ExtraFiles = []*os.File{f}
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = d.user.attributes()
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, says.String())
	}
	if d.user != nil {
		return f.Chown(os.Geteuid(), -1)
	}
	return nil
}
