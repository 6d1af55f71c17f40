package vpc

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// System is an operating system that an image can be said to have.
type System struct {
	Name         string // in its catalogue form, such as debian-12-amd64
	Display      string
	Family       string
	Version      string
	Architecture string
	Vendor       string
}

// LocalSystem is that of the stock image, which is none: the drivers that take
// it run programs of the host itself.
var LocalSystem = System{"local-linux", "local-linux 1", "linux", "1", "amd64", "Tabard"}

// AnySystem is for images whose system is none of the others.
var AnySystem = System{"linux-amd64", "Linux (amd64)", "Linux", "any", "amd64", "other"}

// Systems are the operating systems of registered images.
var Systems = []System{
	AnySystem,
	{"alpine-3-amd64", "Alpine Linux 3 (amd64)", "Alpine Linux", "3", "amd64", "Alpine Linux"},
	{"centos-stream-9-amd64", "CentOS Stream 9 (amd64)", "CentOS", "9", "amd64", "CentOS"},
	{"debian-11-amd64", "Debian GNU/Linux 11 (amd64)", "Debian GNU/Linux", "11 bullseye", "amd64", "Debian"},
	{"debian-12-amd64", "Debian GNU/Linux 12 (amd64)", "Debian GNU/Linux", "12 bookworm", "amd64", "Debian"},
	{"debian-13-amd64", "Debian GNU/Linux 13 (amd64)", "Debian GNU/Linux", "13 trixie", "amd64", "Debian"},
	{"fedora-coreos-stable-amd64", "Fedora CoreOS stable (amd64)", "Fedora CoreOS", "stable", "amd64", "Fedora"},
	{"red-9-amd64", "Red Hat Enterprise Linux 9 (amd64)", "Red Hat Enterprise Linux", "9", "amd64", "Red Hat"},
	{"rocky-linux-9-amd64", "Rocky Linux 9 (amd64)", "Rocky Linux", "9", "amd64", "Rocky Linux"},
	{"sles-15-amd64", "SUSE Linux Enterprise Server 15 (amd64)", "SUSE Linux Enterprise Server", "15", "amd64", "SUSE"},
	{"ubuntu-22-04-amd64", "Ubuntu Linux 22.04 LTS (amd64)", "Ubuntu Linux", "22.04 LTS", "amd64", "Canonical"},
	{"ubuntu-24-04-amd64", "Ubuntu Linux 24.04 LTS (amd64)", "Ubuntu Linux", "24.04 LTS", "amd64", "Canonical"},
}

// SystemNamed returns an operating system of registered images by name.
func SystemNamed(name string) (System, bool) {
	for _, s := range Systems {
		if s.Name == name {
			return s, true
		}
	}
	return System{}, false
}

// Formats of a disk's file.
const (
	FormatQCOW2 = "qcow2"
	FormatRaw   = "raw"
)

// DiskHeader is how many bytes of the beginning of a file [InspectDisk] wants.
const DiskHeader = 512

// maxDisk bounds the size of a disk, in bytes. Section 3.5 of the reference has
// no number; the largest boot volume of the field is 250 GB.
const maxDisk = 2 << 40

// InspectDisk tells the format of a disk's file by its beginning, and the size
// of the disk in bytes. bytes is the size of the whole file. It refuses a file
// that would make a machine read other files of its host.
func InspectDisk(header []byte, bytes int64) (format string, disk int64, err error) {
	if len(header) < 8 || string(header[:4]) != "QFI\xfb" {
		switch {
		case bytes == 0:
			return "", 0, errors.New("the file is empty")
		case foreignDisk(header) != "":
			return "", 0, fmt.Errorf("the file is a %s image; convert it to qcow2 or raw", foreignDisk(header))
		case bytes%512 != 0:
			return "", 0, errors.New("the file is neither qcow2 nor a raw disk, which has whole sectors of 512 bytes")
		case bytes > maxDisk:
			return "", 0, fmt.Errorf("the disk is larger than %d bytes", int64(maxDisk))
		}
		return FormatRaw, bytes, nil
	}
	// The layout of the header is that of the qcow2 specification, versions 2
	// and 3: big endian, backing file offset at 8, size at 24, in version 3 the
	// incompatible features at 72.
	if len(header) < 104 {
		return "", 0, errors.New("the qcow2 header is cut short")
	}
	be := binary.BigEndian
	switch version := be.Uint32(header[4:]); {
	case version != 2 && version != 3:
		return "", 0, fmt.Errorf("qcow2 version %d is not supported; want 2 or 3", version)
	case be.Uint64(header[8:]) != 0 || be.Uint32(header[16:]) != 0:
		return "", 0, errors.New("the qcow2 image has a backing file; flatten it with: qemu-img convert -O qcow2")
	case be.Uint32(header[32:]) != 0:
		return "", 0, errors.New("the qcow2 image is encrypted")
	case version == 3 && be.Uint64(header[72:])&externalData != 0:
		return "", 0, errors.New("the qcow2 image keeps its data in another file; flatten it with: qemu-img convert -O qcow2")
	case version == 3 && be.Uint64(header[72:])&^knownFeatures != 0:
		return "", 0, fmt.Errorf("the qcow2 image has unknown incompatible features %#x", be.Uint64(header[72:])&^knownFeatures)
	}
	size := be.Uint64(header[24:])
	if size == 0 || size > maxDisk {
		return "", 0, fmt.Errorf("the qcow2 image says that its disk has %d bytes; want 1 to %d", size, int64(maxDisk))
	}
	return FormatQCOW2, int64(size), nil
}

// Incompatible features of a qcow2 image. Dirty and corrupt ones are no danger
// to the host; compression and extended entries are how data is kept.
const (
	externalData  = 1 << 2
	knownFeatures = 1<<0 | 1<<1 | externalData | 1<<3 | 1<<4
)

// foreignDisk names the format of a file that is a disk of another hypervisor
// or no disk at all, but a common mistake.
func foreignDisk(header []byte) string {
	for _, f := range []struct{ magic, name string }{
		{"KDMV", "VMDK"}, {"COWD", "VMDK"}, {"# Disk Descriptor", "VMDK"}, {"conectix", "VHD"}, {"vhdxfile", "VHDX"},
		{"\x1f\x8b", "gzip-compressed"}, {"\xfd7zXZ\x00", "xz-compressed"}, {"\x28\xb5\x2f\xfd", "zstd-compressed"},
		{"BZh", "bzip2-compressed"}, {"PK\x03\x04", "zip-compressed"}, {"\x7fELF", "ELF"}, {"<!DOCTYPE", "HTML"}, {"<html", "HTML"},
		{"<<< Oracle VM", "VDI"}, {"QED\x00", "QED"},
	} {
		if len(header) >= len(f.magic) && string(header[:len(f.magic)]) == f.magic {
			return f.name
		}
	}
	return ""
}

// GB returns a size in whole gigabytes of 2^30 bytes, rounded up.
func GB(bytes int64) int { return int((bytes + 1<<30 - 1) >> 30) }
