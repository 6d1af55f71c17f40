package sqlite_test

import (
	"context"
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/store/storetest"
)

func open(t *testing.T, file string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(context.Background(), file)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSQLiteKeepsTheContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Open {
		file := filepath.Join(t.TempDir(), "tabard.db")
		return func(t *testing.T) store.Store { return open(t, file) }
	})
}

func TestAFileWithAnOddNameIsTheFileOfThatName(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"with space.db", "a?mode=memory", "a#b.db", "100%25.db", "é.db", "a&_pragma=synchronous(OFF)", ":memory:"} {
		file := filepath.Join(dir, name)
		s := open(t, file)
		if err := s.Commit(context.Background(), store.Batch{Puts: []store.Put{{Record: store.Record{Kind: "k", ID: "a", Revision: 1, Doc: []byte("{}")}}}}); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		if info, err := os.Stat(file); err != nil || info.Size() == 0 {
			t.Errorf("%q: no file of this name: %v", name, err)
		}
		s = open(t, file)
		n := 0
		if err := s.Load(context.Background(), func(store.Record) error { n++; return nil }); err != nil || n != 1 {
			t.Errorf("%q: %d objects, %v", name, n, err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestWhatIsNotAStoreIsRefused(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("this is not a database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, file := range map[string]string{
		"a file of something else":  garbage,
		"a directory":               dir,
		"a file in a missing place": filepath.Join(dir, "missing", "tabard.db"),
	} {
		if s, err := sqlite.Open(context.Background(), file); err == nil {
			t.Errorf("%s was opened", name)
			_ = s.Close()
		} else if !strings.Contains(err.Error(), file) {
			t.Errorf("%s: the error %q does not name the file", name, err)
		}
	}
}

func TestAFileOfANewerProgramIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tabard.db")
	if err := open(t, file).Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("UPDATE schema_version SET version = version + 1"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err := sqlite.Open(context.Background(), file); err == nil {
		t.Error("opened")
		_ = s.Close()
	} else if !strings.Contains(err.Error(), "version") {
		t.Errorf("the error %q does not speak of the version", err)
	}
}

// A commit that has returned survives the process: synchronous=FULL on a
// write-ahead log is what promises it.
func TestTheFileIsWrittenThroughToTheDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tabard.db")
	s := open(t, file)
	defer s.Close()
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2"} {
		if got, err := s.Pragma(context.Background(), pragma); err != nil || got != want {
			t.Errorf("%s = %q, %v; want %s", pragma, got, err, want)
		}
	}
}

func TestTheFilesAreForTheirOwnerOnly(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "tabard.db"))
	defer s.Close()
	if err := s.Commit(context.Background(), store.Batch{Puts: []store.Put{{Record: store.Record{Kind: "k", ID: "a", Revision: 1, Doc: []byte("{}")}}}}); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) < 2 {
		t.Fatalf("files %v, %v", files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, %v", f.Name(), info.Mode(), err)
		}
	}
}
