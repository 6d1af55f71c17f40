package imagecache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// Formats of image files.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"
)

// maxVirtual is the largest disk in bytes that an image may describe.
const maxVirtual = 2 << 40

// Check returns the size in bytes of the disk that an image file of this many
// bytes describes, or why the file must not be used. It is for files of
// strangers: it reads a header and nothing else. What it keeps out above all is
// a qcow2 file that names another file of the host as its backing file or as
// its data, which QEMU would open and show to the guest.
func Check(r io.ReaderAt, size int64, format string) (int64, error) {
	switch format {
	case Raw:
		// Any bytes are a raw disk, rounded up to a whole sector.
		virtual := (size + 511) &^ 511
		if size <= 0 || virtual > maxVirtual {
			return 0, fmt.Errorf("a disk of %d bytes is not between 1 byte and 2 TiB", size)
		}
		return virtual, nil
	case QCOW2:
		return checkQCOW2(r, size)
	}
	return 0, fmt.Errorf("the image format %q is neither qcow2 nor raw", format)
}

// Offsets of the qcow2 header (QEMU, docs/interop/qcow2.txt).
const (
	magic = "QFI\xfb"

	offVersion       = 4
	offBackingFile   = 8
	offBackingLength = 16
	offClusterBits   = 20
	offSize          = 24
	offCrypt         = 32
	offIncompatible  = 72
	offHeaderLength  = 100

	headerV2 = 72
	headerV3 = 104
)

// Bits of the incompatible features. All but these are refused.
const (
	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureExtendedL2  = 1 << 4
)

// Header extensions that name other files.
const (
	extensionEnd           = 0
	extensionBackingFormat = 0xe2792aca
	extensionDataFile      = 0x44415441
)

func checkQCOW2(r io.ReaderAt, size int64) (int64, error) {
	h := make([]byte, headerV3)
	n, err := r.ReadAt(h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("reading its header: %w", err)
	}
	be := binary.BigEndian
	if n < headerV2 || string(h[:4]) != magic {
		return 0, errors.New("it is no qcow2 file")
	}
	version := be.Uint32(h[offVersion:])
	clusterBits := be.Uint32(h[offClusterBits:])
	virtual := be.Uint64(h[offSize:])
	switch {
	case version != 2 && (version != 3 || n < headerV3):
		return 0, fmt.Errorf("qcow2 version %d is neither 2 nor 3", version)
	case be.Uint64(h[offBackingFile:]) != 0 || be.Uint32(h[offBackingLength:]) != 0:
		return 0, errors.New("it names a backing file: flatten it with qemu-img convert")
	case clusterBits < 9 || clusterBits > 21:
		return 0, fmt.Errorf("clusters of 2^%d bytes are not between 512 bytes and 2 MiB", clusterBits)
	case virtual == 0 || virtual > maxVirtual:
		return 0, fmt.Errorf("a disk of %d bytes is not between 1 byte and 2 TiB", virtual)
	case be.Uint32(h[offCrypt:]) != 0:
		return 0, errors.New("it is encrypted")
	}
	start := int64(headerV2)
	if version == 3 {
		features := be.Uint64(h[offIncompatible:])
		switch {
		case features&featureDataFile != 0:
			return 0, errors.New("it names an external data file: flatten it with qemu-img convert")
		case features&featureCorrupt != 0:
			return 0, errors.New("it is marked as corrupt: see qemu-img check")
		case features&^uint64(featureDirty|featureCompression|featureExtendedL2) != 0:
			return 0, fmt.Errorf("it needs features that are not known (%#x)", features)
		}
		start = int64(be.Uint32(h[offHeaderLength:]))
		if start < headerV3 || start%8 != 0 {
			return 0, fmt.Errorf("its header of %d bytes makes no sense", start)
		}
	}
	end := min(size, 1<<clusterBits)
	return int64(virtual), checkExtensions(r, start, end)
}

// maxBackingName is the longest name of a backing file, in bytes.
const maxBackingName = 1023

// Backing returns the name of the backing file that a qcow2 file names; "" is
// none. It follows no name and believes nothing else of the file.
func Backing(r io.ReaderAt) (string, error) {
	h := make([]byte, headerV2)
	if n, err := r.ReadAt(h, 0); n < len(h) {
		return "", fmt.Errorf("reading its header: %w", err)
	}
	if string(h[:4]) != magic {
		return "", errors.New("it is no qcow2 file")
	}
	at, length := binary.BigEndian.Uint64(h[offBackingFile:]), binary.BigEndian.Uint32(h[offBackingLength:])
	if at == 0 || length == 0 {
		return "", nil
	}
	if at > math.MaxInt32 || length > maxBackingName {
		return "", errors.New("the name of its backing file makes no sense")
	}
	name := make([]byte, length)
	if n, err := r.ReadAt(name, int64(at)); n < len(name) {
		return "", fmt.Errorf("reading the name of its backing file: %w", err)
	}
	return string(name), nil
}

func checkExtensions(r io.ReaderAt, at, end int64) error {
	for at+8 <= end {
		var head [8]byte
		if _, err := r.ReadAt(head[:], at); err != nil {
			return fmt.Errorf("reading its header extensions: %w", err)
		}
		kind, length := binary.BigEndian.Uint32(head[:]), int64(binary.BigEndian.Uint32(head[4:]))
		switch kind {
		case extensionEnd:
			return nil
		case extensionBackingFormat, extensionDataFile:
			return errors.New("its header names another file: flatten it with qemu-img convert")
		}
		at += 8 + (length+7)&^7
	}
	if at > end {
		return errors.New("its header extensions reach beyond the first cluster")
	}
	return nil
}
