package imagecache

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// made returns a qcow2 file as qemu-img makes it.
func made(t *testing.T, args ...string) []byte {
	t.Helper()
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("qemu-img is not installed (qemu-utils)")
	}
	dir := t.TempDir()
	args = append([]string{"create", "-q", "-f", "qcow2"}, args...)
	cmd := exec.Command(tool, append(args, "disk.qcow2", "10M")...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	content, err := os.ReadFile(filepath.Join(dir, "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func checkBytes(content []byte, format string) (int64, error) {
	return Check(bytes.NewReader(content), int64(len(content)), format)
}

func TestOrdinaryImagesAreAccepted(t *testing.T) {
	for name, args := range map[string][]string{
		"version 3":      nil,
		"version 2":      {"-o", "compat=0.10"},
		"small clusters": {"-o", "cluster_size=512"},
		"zstd":           {"-o", "compression_type=zstd"},
		"extended L2":    {"-o", "extended_l2=on"},
	} {
		if virtual, err := checkBytes(made(t, args...), QCOW2); err != nil || virtual != 10<<20 {
			t.Errorf("%s: %d, %v", name, virtual, err)
		}
	}
	if virtual, err := checkBytes(make([]byte, 1000), Raw); err != nil || virtual != 1024 {
		t.Errorf("raw: %d, %v", virtual, err)
	}
}

func TestImagesThatNameFilesOfTheHostAreRefused(t *testing.T) {
	for name, args := range map[string][]string{
		"a backing file":              {"-u", "-b", "/etc/shadow", "-F", "raw"},
		"a backing file of version 2": {"-o", "compat=0.10", "-u", "-b", "/etc/shadow", "-F", "raw"},
		"a backing file by protocol":  {"-u", "-b", `json:{"driver":"nbd","host":"127.0.0.1"}`, "-F", "raw"},
		"an external data file":       {"-o", "data_file=data.raw"},
		"a raw external data file":    {"-o", "data_file=data.raw,data_file_raw=on"},
	} {
		if _, err := checkBytes(made(t, args...), QCOW2); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAnExternalDataFileIsFoundByItsNameAlone(t *testing.T) {
	content := made(t, "-o", "data_file=data.raw")
	binary.BigEndian.PutUint64(content[offIncompatible:], 0)
	if _, err := checkBytes(content, QCOW2); err == nil {
		t.Error("accepted")
	}
}

func TestSpoiledHeadersAreRefused(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"cut":              func(b []byte) []byte { return b[:60] },
		"not qcow2":        func(b []byte) []byte { b[0] = 'q'; return b },
		"version":          func(b []byte) []byte { b[7] = 4; return b },
		"clusters":         func(b []byte) []byte { b[23] = 60; return b },
		"no disk":          func(b []byte) []byte { clear(b[24:32]); return b },
		"a vast disk":      func(b []byte) []byte { b[24] = 0xff; return b },
		"encrypted":        func(b []byte) []byte { b[35] = 1; return b },
		"corrupt":          func(b []byte) []byte { b[79] = featureCorrupt; return b },
		"unknown features": func(b []byte) []byte { b[72] = 1; return b },
		"header length":    func(b []byte) []byte { b[103] = 3; return b },
		"extension length": func(b []byte) []byte { copy(b[b[103]:], "abcd\xff\xff\xff\xff"); return b },
	} {
		if _, err := checkBytes(spoil(made(t)), QCOW2); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestTheBackingFileOfADiskIsRead(t *testing.T) {
	for name, args := range map[string][]string{
		"": nil, "/images/0123": {"-u", "-b", "/images/0123", "-F", "raw"},
	} {
		if got, err := Backing(bytes.NewReader(made(t, args...))); err != nil || got != name {
			t.Errorf("got %q, %v; want %q", got, err, name)
		}
	}
	for what, spoil := range map[string]func([]byte){
		"not qcow2":      func(b []byte) { b[0] = 'q' },
		"a vast name":    func(b []byte) { b[offBackingLength] = 0xff },
		"beyond the end": func(b []byte) { b[offBackingFile+4] = 0x7f },
	} {
		content := made(t, "-u", "-b", "/images/0123", "-F", "raw")
		spoil(content)
		if got, err := Backing(bytes.NewReader(content)); err == nil {
			t.Errorf("%s: got %q", what, got)
		}
	}
}

func FuzzCheck(f *testing.F) {
	h := make([]byte, 512)
	copy(h, "QFI\xfb")
	h[7], h[23], h[31], h[103] = 3, 9, 1, headerV3
	f.Add(h)
	h = bytes.Clone(h)
	h[7] = 2
	f.Add(h)
	f.Fuzz(func(t *testing.T, content []byte) {
		virtual, err := checkBytes(content, QCOW2)
		if err != nil {
			return
		}
		if virtual <= 0 || virtual > maxVirtual {
			t.Errorf("a disk of %d bytes", virtual)
		}
		if binary.BigEndian.Uint64(content[offBackingFile:]) != 0 {
			t.Error("a backing file is named")
		}
	})
}
