package vpc_test

import (
	"encoding/binary"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/vpc"
)

// qcow2 returns a header of an image with a disk of one gigabyte.
func qcow2(version uint32, change func(h []byte)) []byte {
	h := make([]byte, vpc.DiskHeader)
	copy(h, "QFI\xfb")
	binary.BigEndian.PutUint32(h[4:], version)
	binary.BigEndian.PutUint32(h[20:], 16)
	binary.BigEndian.PutUint64(h[24:], 1<<30)
	if change != nil {
		change(h)
	}
	return h
}

func TestADiskIsKnownByItsBeginning(t *testing.T) {
	for name, test := range map[string]struct {
		header []byte
		bytes  int64
		format string
		disk   int64
		refuse string
	}{
		"qcow2 version 2":     {qcow2(2, nil), 200 << 10, "qcow2", 1 << 30, ""},
		"qcow2 version 3":     {qcow2(3, nil), 200 << 10, "qcow2", 1 << 30, ""},
		"a dirty one":         {qcow2(3, func(h []byte) { h[79] = 1 }), 200 << 10, "qcow2", 1 << 30, ""},
		"raw":                 {make([]byte, vpc.DiskHeader), 1 << 20, "raw", 1 << 20, ""},
		"a backing file":      {qcow2(2, func(h []byte) { h[15] = 200 }), 1 << 20, "", 0, "backing file"},
		"a backing name only": {qcow2(2, func(h []byte) { h[19] = 9 }), 1 << 20, "", 0, "backing file"},
		"external data":       {qcow2(3, func(h []byte) { h[79] = 4 }), 1 << 20, "", 0, "another file"},
		"an unknown feature":  {qcow2(3, func(h []byte) { h[72] = 1 }), 1 << 20, "", 0, "unknown"},
		"encrypted":           {qcow2(2, func(h []byte) { h[35] = 2 }), 1 << 20, "", 0, "encrypted"},
		"version 1":           {qcow2(1, nil), 1 << 20, "", 0, "version 1"},
		"an empty disk":       {qcow2(3, func(h []byte) { h[28] = 0 }), 1 << 20, "", 0, "0 bytes"},
		"a huge disk":         {qcow2(3, func(h []byte) { h[24] = 0x7f }), 1 << 20, "", 0, "bytes; want"},
		"a negative disk":     {qcow2(3, func(h []byte) { h[24] = 0xff }), 1 << 20, "", 0, "bytes; want"},
		"a short header":      {qcow2(3, nil)[:60], 60, "", 0, "cut short"},
		"empty":               {nil, 0, "", 0, "empty"},
		"no whole sectors":    {[]byte("hello, world"), 12, "", 0, "neither"},
		"a web page":          {[]byte("<!DOCTYPE html>" + strings.Repeat(" ", 497)), 512, "", 0, "HTML"},
		"vmdk":                {append([]byte("KDMV"), make([]byte, 508)...), 512, "", 0, "VMDK"},
		"xz":                  {append([]byte("\xfd7zXZ\x00"), make([]byte, 506)...), 512, "", 0, "xz"},
	} {
		format, disk, err := vpc.InspectDisk(test.header, test.bytes)
		switch {
		case test.refuse == "" && (err != nil || format != test.format || disk != test.disk):
			t.Errorf("%s: %s of %d bytes, %v", name, format, disk, err)
		case test.refuse != "" && (err == nil || !strings.Contains(err.Error(), test.refuse)):
			t.Errorf("%s: refused with %v, want it to say %q", name, err, test.refuse)
		}
	}
}

func FuzzInspectDiskNeverPanicsAndNeverTakesABackingFile(f *testing.F) {
	f.Add(qcow2(3, nil), int64(1<<20))
	f.Add([]byte("QFI\xfb"), int64(4))
	f.Fuzz(func(t *testing.T, header []byte, bytes int64) {
		if bytes < 0 {
			return
		}
		format, disk, err := vpc.InspectDisk(header, bytes)
		if err != nil {
			return
		}
		if disk <= 0 {
			t.Errorf("a disk of %d bytes", disk)
		}
		if format == vpc.FormatQCOW2 && binary.BigEndian.Uint64(header[8:]) != 0 {
			t.Error("a backing file was taken")
		}
	})
}
