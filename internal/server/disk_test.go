package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestADirectoryThatWasOpenToOthersIsClosed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	// Somebody has put a file where the owner's key is about to be written.
	planted := filepath.Join(dir, "owner.json.new")
	if err := os.WriteFile(planted, []byte("{}"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(planted, 0o666); err != nil {
		t.Fatal(err)
	}
	open(t, config(dir))
	owner(t, dir)
	for name, want := range map[string]os.FileMode{".": 0o700, "owner.json": 0o600, "tabard.db": 0o600, "tabard.db-wal": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", name, got, want)
		}
	}
}

func TestAStoreThatCannotBeOpenedIsAnErrorAndNothingWorse(t *testing.T) {
	for name, spoil := range map[string]func(file string) error{
		"no database":    func(file string) error { return os.WriteFile(file, []byte(strings.Repeat("garbage ", 1000)), 0o600) },
		"a directory":    func(file string) error { return os.Mkdir(file, 0o700) },
		"another schema": func(file string) error { return os.WriteFile(file, []byte("SQLite format 3\x00"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := spoil(filepath.Join(dir, "tabard.db")); err != nil {
				t.Fatal(err)
			}
			if why := refused(t, config(dir)); !strings.Contains(why, "tabard.db") {
				t.Errorf("the error does not name the file: %s", why)
			}
			if _, err := os.Stat(filepath.Join(dir, "owner.json")); err == nil {
				t.Error("an owner was made for a store that does not open")
			}
		})
	}
}
