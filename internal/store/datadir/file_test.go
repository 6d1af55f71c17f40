package datadir_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"tabard.dev/tabard/internal/store/datadir"
)

func TestANewFileIsPrivateWholeAndReplacesNone(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "master.key")
	if err := datadir.WriteNew(name, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if err := datadir.WriteNew(name, []byte("second")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("error %v", err)
	}
	b, err := os.ReadFile(name)
	if err != nil || string(b) != "first" {
		t.Errorf("%q, %v", b, err)
	}
	info, err := os.Stat(name)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	if err := datadir.WriteNew(filepath.Join(name, "x"), nil); err == nil {
		t.Error("a file in a file")
	}
}
