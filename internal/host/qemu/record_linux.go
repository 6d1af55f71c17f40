package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"tabard.dev/tabard/internal/vpc"
)

// Names of the files of a machine.
const (
	recordFile  = "machine.json"
	diskFile    = "disk.qcow2"
	seedFile    = "seed.iso"
	socketFile  = "qmp.sock"
	consoleFile = "console.log"

	unfinished = ".new"  // ends the name of a file that is being made
	aside      = ".kept" // ends the name of a disk that was here before the machine
	deleted    = ".gone" // ends the name of a machine's directory that is being removed
)

// record is what is known of a machine while no driver runs. It is written
// before what it speaks of is made, so what is on the disk is never more than
// it says.
type record struct {
	Version int  `json:"version"`
	Base    base `json:"base"`

	// UID is the machine's own among the user ids that QEMU runs as; 0 is none.
	UID uint32 `json:"uid,omitempty"`

	// Launching says that a QEMU may run that Process does not know.
	Launching bool      `json:"launching,omitempty"`
	Process   *identity `json:"process,omitempty"`
}

// base is the image under a machine's disk.
type base struct {
	ImageID string `json:"image_id"`
	Name    string `json:"name"`
	SHA256  string `json:"sha256"`
	Format  string `json:"format"`
	Bytes   int64  `json:"bytes"`
}

func baseOf(i vpc.Image) base {
	return base{ImageID: i.ID, Name: i.Name, SHA256: i.SHA256, Format: i.Format, Bytes: i.Bytes}
}

// image is the image as it was when the disk was made; what became of it since
// does not matter to the disk.
func (b base) image() vpc.Image {
	return vpc.Image{ID: b.ImageID, Name: b.Name, SHA256: b.SHA256, Format: b.Format, Bytes: b.Bytes}
}

const recordVersion = 1

// machineID is what may name a directory.
var machineID = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z_-]{0,99}$`)

// load reads a machine's record. It returns nil where there is none.
func load(dir string) (*record, error) {
	path := filepath.Join(dir, recordFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the machine's record: %w", err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, fmt.Errorf("reading %s: %w: delete the instance, or restore the file", path, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("%s is of version %d, and this program knows version %d", path, r.Version, recordVersion)
	}
	return &r, nil
}

func (r *record) save(dir string) error {
	r.Version = recordVersion
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the machine's record: %w", err)
	}
	err = replace(filepath.Join(dir, recordFile), func(f *os.File) error {
		_, err := f.Write(append(text, '\n'))
		return err
	})
	if err != nil {
		return fmt.Errorf("writing the machine's record: %w", err)
	}
	return nil
}

// replace makes a file's new content appear whole and lasting, or not at all.
func replace(path string, write func(*os.File) error) (err error) {
	f, err := os.OpenFile(path+unfinished, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(path + unfinished)
		}
	}()
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+unfinished, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// directories returns the ids of the machines that have a directory.
func (d *Driver) directories() ([]string, error) {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && machineID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// sweep removes the machines whose deletion was interrupted.
func (d *Driver) sweep() error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return fmt.Errorf("looking for deleted machines: %w", err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), deleted) {
			continue
		}
		if err := os.RemoveAll(filepath.Join(d.dir, e.Name())); err != nil {
			return fmt.Errorf("removing the rest of a deleted machine: %w", err)
		}
	}
	return nil
}
