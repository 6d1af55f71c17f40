package sqlite_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// version1 is what the first version of the program made of an empty file, and
// of a day that has events.
const (
	version1 = `
CREATE TABLE objects (
	kind     TEXT NOT NULL,
	id       TEXT NOT NULL,
	revision INTEGER NOT NULL,
	doc      BLOB NOT NULL,
	PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE unique_keys (
	key  TEXT PRIMARY KEY,
	kind TEXT NOT NULL,
	id   TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX unique_keys_object ON unique_keys (kind, id);
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (1);
INSERT INTO objects VALUES ('k', 'a', 3, '{"a":3}');
INSERT INTO unique_keys VALUES ('x', 'k', 'a');
`
	version1Day = `
CREATE TABLE events_%[1]d (
	seq         INTEGER PRIMARY KEY,
	time        INTEGER NOT NULL,
	account     TEXT NOT NULL,
	correlation TEXT NOT NULL,
	action      TEXT NOT NULL,
	outcome     TEXT NOT NULL,
	doc         BLOB NOT NULL
);
CREATE INDEX events_%[1]d_correlation ON events_%[1]d (correlation);
INSERT INTO events_%[1]d (time, account, correlation, action, outcome, doc) VALUES (%[2]d, 'a', 'c', 'x.y.create', 'success', '{"n":%[1]d}'), (%[2]d, 'b', 'c', 'x.y.create', 'failure', '{}');
`
)

func day(n int) time.Time { return time.Date(2026, time.June, n, 12, 0, 0, 0, time.UTC) }

// older makes a file of version 1 with events of some days of June.
func older(t *testing.T, days ...int) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "tabard.db")
	script := version1
	for _, n := range days {
		script += fmt.Sprintf(version1Day, store.Day(day(n)), day(n).UnixNano())
	}
	execute(t, file, script)
	return file
}

func execute(t *testing.T, file, script string) {
	t.Helper()
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(script); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestAFileOfTheFirstVersionIsReadAndWrittenOn(t *testing.T) {
	ctx := context.Background()
	file := older(t, 1, 2, 15)
	count := func(s *sqlite.Store, q store.Query) int {
		t.Helper()
		q.Limit = 100
		got, err := s.Events(ctx, q)
		if err != nil {
			t.Fatal(err)
		}
		return len(got)
	}
	for opened := range 3 { // brought up to date once, and then opened as it is
		s := open(t, file)
		var found []string
		if err := s.Load(ctx, func(r store.Record) error {
			found = append(found, fmt.Sprintf("%s/%s@%d", r.Kind, r.ID, r.Revision))
			return nil
		}); err != nil || len(found) != 1+opened || found[0] != "k/a@3" {
			t.Fatalf("objects %q, %v", found, err)
		}
		got, err := s.Events(ctx, store.Query{AccountID: "a", CorrelationID: "c", Limit: 10})
		if err != nil || len(got) != 3 || string(got[2].Doc) != `{"n":20260601}` || !got[2].Time.Equal(day(1)) || got[2].Position.Seq != 1 {
			t.Fatalf("events %+v, %v", got, err)
		}
		if n := count(s, store.Query{AccountID: "a", Changed: "crn"}); n != 2*opened {
			t.Errorf("%d events of the object, want %d", n, 2*opened)
		}
		if n := count(s, store.Query{AccountID: "a", Changed: "success"}); n != 0 {
			t.Errorf("%d events of no object", n)
		}
		// A day that there was, and a new one.
		event := func(at time.Time) store.Event {
			return store.Event{Time: at, AccountID: "a", CorrelationID: "d", Action: "x.y.update", Outcome: "success", Changed: "crn", Doc: []byte("{}")}
		}
		id := fmt.Sprint("b", opened)
		if err := s.Commit(ctx, store.Batch{
			Puts:   []store.Put{{Record: store.Record{Kind: "k", ID: id, Revision: 1, Doc: []byte("{}")}}},
			Events: []store.Event{event(day(15)), event(day(16))},
		}); err != nil {
			t.Fatal(err)
		}
		if n := count(s, store.Query{AllAccounts: true}); n != 6+2*(opened+1) {
			t.Errorf("%d events", n)
		}
		if n := count(s, store.Query{AccountID: "a", Changed: "crn", Since: day(16)}); n != opened+1 {
			t.Errorf("%d events of the object on the new day", n)
		}
		var taken *store.TakenError
		err = s.Commit(ctx, store.Batch{Puts: []store.Put{{Record: store.Record{Kind: "k", ID: "z", Revision: 1, Doc: []byte("{}")}, Unique: []string{"x"}}}})
		if !errors.As(err, &taken) {
			t.Errorf("a unique key of the older file: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFileOfTheFirstVersionWithoutEventsIsReadAndWrittenOn(t *testing.T) {
	s := open(t, older(t))
	defer s.Close()
	e := store.Event{Time: day(1), AccountID: "a", Changed: "crn", Doc: []byte("{}")}
	if err := s.Commit(context.Background(), store.Batch{Events: []store.Event{e}}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Events(context.Background(), store.Query{AccountID: "a", Changed: "crn", Limit: 10}); err != nil || len(got) != 1 {
		t.Errorf("%d events, %v", len(got), err)
	}
}

// A file that cannot be brought up to date as a whole stays as it is.
func TestAFileThatCannotBeBroughtUpToDateStaysAsItIs(t *testing.T) {
	file := older(t, 1, 2)
	execute(t, file, "ALTER TABLE events_20260601 ADD COLUMN changed TEXT;") // days are taken from the newest one back
	if s, err := sqlite.Open(context.Background(), file); err == nil {
		t.Error("opened")
		_ = s.Close()
	} else if !strings.Contains(err.Error(), "schema version 1") {
		t.Errorf("the error %q does not say what was tried", err)
	}
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var version, columns int
	if err := errors.Join(db.QueryRow("SELECT version FROM schema_version").Scan(&version),
		db.QueryRow("SELECT count(*) FROM pragma_table_info('events_20260602') WHERE name = 'changed'").Scan(&columns)); err != nil {
		t.Fatal(err)
	}
	if version != 1 || columns != 0 {
		t.Errorf("version %d, %d columns are new", version, columns)
	}
}

func TestTheHistoryOfAnObjectIsLookedUpByItsIndex(t *testing.T) {
	file := older(t, 1)
	s := open(t, file)
	e := store.Event{Time: day(2), AccountID: "a", Changed: "crn", Doc: []byte("{}")}
	if err := s.Commit(context.Background(), store.Batch{Events: []store.Event{e}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", file)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, n := range []int{1, 2} {
		var id, parent, unused int
		var detail string
		query := fmt.Sprintf("EXPLAIN QUERY PLAN SELECT seq, doc FROM events_%d WHERE 1 AND account = ? AND changed = ? ORDER BY seq DESC LIMIT ?", store.Day(day(n)))
		if err := db.QueryRow(query, "a", "crn", 100).Scan(&id, &parent, &unused, &detail); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(detail, "_changed") {
			t.Errorf("day %d: %s", n, detail)
		}
	}
}
