// Package sqlite keeps everything in one SQLite file: objects and events
// together, so that a change and its event are one transaction. Events stand
// in a table for each UTC day, so that dropping a whole day is cheap.
package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

// Store is a [store.Store] in an SQLite file. One connection writes; readers
// of the log have connections of their own and never wait for it.
type Store struct {
	name    string
	mu      sync.Mutex // held by the one writer
	write   *sql.DB
	read    *sql.DB
	all     *connections // of both
	files   *files       // guarded by mu; nil while the store has none to write to,
	unheld  error        // which this says why
	inserts map[int]*dayInserts
	grow    *sql.Stmt   // appends to the tree
	edge    merkle.Edge // of the tree over the committed events; guarded by mu

	frugal atomic.Bool // writes only what cannot be made anew

	treeless bool  // appends events and no tree; only on a store that has no events yet
	appended int64 // by a treeless store

	indexer indexer
	recent  recent // guarded by mu
	lookAt  int    // events that one search looks at in vain

	growth sync.Mutex
	grown  chan struct{} // closed and replaced when a commit has brought events
}

// dayInserts are the prepared statements that append events to one day.
type dayInserts struct {
	one  *sql.Stmt
	many *sql.Stmt // manyRows at a time: a group commit costs less for each
}

const (
	rowWidth   = 12
	manyRows   = 16
	rowPattern = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
	rowColumns = "seq, time, account, correlation, action, outcome, severity, initiator, authn, target, doc, changed"
)

func (d *dayInserts) close() error { return errors.Join(d.one.Close(), d.many.Close()) }

const schema = `
CREATE TABLE IF NOT EXISTS objects (
	kind     TEXT NOT NULL,
	id       TEXT NOT NULL,
	revision INTEGER NOT NULL,
	doc      BLOB NOT NULL,
	PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unique_keys (
	key  TEXT PRIMARY KEY,
	kind TEXT NOT NULL,
	id   TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unique_keys_object ON unique_keys (kind, id);
CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS merkle (
	first  INTEGER PRIMARY KEY,
	size   INTEGER NOT NULL,
	hashes BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS merkle_edge (
	position INTEGER PRIMARY KEY,
	hash     BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS dropped_days (
	day   INTEGER PRIMARY KEY,
	first INTEGER NOT NULL,
	last  INTEGER NOT NULL,
	count INTEGER NOT NULL,
	at    INTEGER NOT NULL,
	rest  INTEGER NOT NULL,
	holes TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS checkpoints (
	size INTEGER PRIMARY KEY,
	time INTEGER NOT NULL,
	note BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS indexed (
	only INTEGER PRIMARY KEY CHECK (only = 1),
	low  INTEGER NOT NULL,
	high INTEGER NOT NULL
);
INSERT INTO schema_version SELECT 4 WHERE NOT EXISTS (SELECT 1 FROM schema_version);
`

const version = 4

// readers is how many connections read the log at a time.
const readers = 4

// Open opens the store in a file, which it makes if there is none.
func Open(ctx context.Context, file string) (*Store, error) {
	if err := adopt(file); err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	// SQLite gives its other files the mode of this one.
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	all := newConnections()
	write, err := all.pool(dsn(file, "synchronous(FULL)", "temp_store(MEMORY)", "wal_autocheckpoint(4000)", fmt.Sprintf("journal_size_limit(%d)", walLimit)), 1)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	s := &Store{name: file, write: write, all: all, inserts: map[int]*dayInserts{}, grown: make(chan struct{}), lookAt: defaultLookAt}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), write.Close())
	}
	if s.grow, err = write.PrepareContext(ctx, growRow); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), write.Close())
	}
	if s.read, err = all.pool(dsn(file, "query_only(1)"), readers); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), write.Close())
	}
	if err := s.openReaders(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), s.Close())
	}
	if s.files, err = hold(file); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.openTree(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), s.Close())
	}
	s.startIndexer()
	return s, nil
}

// OpenTreeless opens a new store whose activity log has no tree, which measures
// what the tree costs. It cannot be opened again.
func OpenTreeless(ctx context.Context, file string) (*Store, error) {
	s, err := Open(ctx, file)
	if err != nil {
		return nil, err
	}
	if s.edge.Size() != 0 {
		return nil, errors.Join(fmt.Errorf("open %s without a tree: it has one", file), s.Close())
	}
	s.treeless = true
	return s, nil
}

// OpenReadOnly opens the store in a file that no other process has open, to
// read it as it is: nothing in it is changed, brought up to date or held
// against its tree. Whatever would write fails.
func OpenReadOnly(ctx context.Context, file string) (*Store, error) {
	v := url.Values{"_pragma": {"busy_timeout(5000)", "query_only(1)"}, "mode": {"ro"}}
	// Without a write-ahead log to read there is nothing to share, and SQLite
	// need not make the file that it would share it by.
	if info, err := os.Stat(file + "-wal"); errors.Is(err, os.ErrNotExist) || err == nil && info.Size() == 0 {
		v.Set("immutable", "1")
	}
	if _, err := os.Stat(file); err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	db, err := sql.Open("sqlite", fileURL(file, v))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", file, err)
	}
	var found int
	err = db.QueryRowContext(ctx, "SELECT version FROM schema_version").Scan(&found)
	if err == nil && found != version && found != 3 { // 3 has the same events, and no index of them
		err = fmt.Errorf("it has schema version %d, this program reads version %d: a server that starts on it brings it up to date", found, version)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", file, err), db.Close())
	}
	return &Store{name: file, write: db, read: db, all: newConnections(), grown: make(chan struct{}), lookAt: defaultLookAt}, nil
}

func dsn(file string, pragmas ...string) string {
	// Only in a file that is empty yet is there a choice of how free pages are
	// given back; and a file that was removed must not be made again, empty.
	first := []string{"busy_timeout(5000)", "auto_vacuum(INCREMENTAL)", "journal_mode(WAL)"}
	return fileURL(file, url.Values{"_pragma": append(first, pragmas...), "_txlock": {"immediate"}, "mode": {"rw"}})
}

func fileURL(file string, v url.Values) string {
	return (&url.URL{Scheme: "file", Opaque: url.PathEscape(file), RawQuery: v.Encode()}).String()
}

func (s *Store) prepare(ctx context.Context) error {
	if _, err := s.write.ExecContext(ctx, schema); err != nil {
		return err
	}
	var v int
	if err := s.write.QueryRowContext(ctx, "SELECT version FROM schema_version").Scan(&v); err != nil {
		return err
	}
	if v == 1 {
		if err := s.addChanged(ctx); err != nil {
			return fmt.Errorf("bring the file from schema version 1 to 2: %w", err)
		}
		v = 2
	}
	if v == 2 {
		if err := s.growTree(ctx); err != nil {
			return fmt.Errorf("bring the file from schema version 2 to 3: %w", err)
		}
		v = 3
	}
	if v == 3 { // nothing in it moves: the index of its events is made meanwhile
		if _, err := s.write.ExecContext(ctx, "UPDATE schema_version SET version = 4"); err != nil {
			return fmt.Errorf("bring the file from schema version 3 to 4: %w", err)
		}
		v = 4
	}
	if v != version {
		return fmt.Errorf("the file has schema version %d, this program knows version %d", v, version)
	}
	return s.beginIndex(ctx)
}

// addChanged gives the days of a file of version 1 the column that version 2
// has. The events in them changed nothing that can be looked up.
func (s *Store) addChanged(ctx context.Context) (err error) {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	days, err := dayTables(ctx, tx)
	if err != nil {
		return err
	}
	for _, day := range days {
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("ALTER TABLE events_%d ADD COLUMN changed TEXT; ", day)+changedIndex(day)); err != nil {
			return err
		}
	}
	if _, err := tx.ExecContext(ctx, "UPDATE schema_version SET version = 2"); err != nil {
		return err
	}
	return tx.Commit()
}

func changedIndex(day int) string {
	return fmt.Sprintf("CREATE INDEX IF NOT EXISTS events_%[1]d_changed ON events_%[1]d (changed) WHERE changed IS NOT NULL;", day)
}

// Close implements [store.Store].
func (s *Store) Close() error {
	s.stopIndexer()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all.admit()
	err := errors.Join(s.read.Close(), s.write.Close())
	if s.files != nil {
		err = errors.Join(err, s.files.release())
	}
	return err
}

// Load implements [store.Store].
func (s *Store) Load(ctx context.Context, f func(store.Record) error) (err error) {
	rows, err := s.read.QueryContext(ctx, "SELECT kind, id, revision, doc FROM objects")
	if err != nil {
		return fmt.Errorf("load objects: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var r store.Record
		if err := rows.Scan(&r.Kind, &r.ID, &r.Revision, &r.Doc); err != nil {
			return fmt.Errorf("load objects: %w", err)
		}
		if err := f(r); err != nil {
			return err
		}
	}
	return rows.Err()
}

// Commit implements [store.Store].
func (s *Store) Commit(ctx context.Context, b store.Batch) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A commit that has begun is finished or rolled back as a whole; the
	// caller's cancellation must not leave its outcome unknown.
	ctx = context.WithoutCancel(ctx)
	if err := s.openDays(ctx, b.Events); err != nil {
		return fmt.Errorf("open the day's events: %w", err)
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer func() {
		if err != nil {
			err = s.failed(tx, err)
		}
	}()
	for _, d := range b.Deletes {
		if err := remove(ctx, tx, d); err != nil {
			return err
		}
	}
	for _, p := range b.Puts {
		if err := put(ctx, tx, p); err != nil {
			return err
		}
	}
	edge, err := s.append(ctx, tx, b.Events)
	if err != nil {
		return fmt.Errorf("append events: %w", err)
	}
	if err := s.commit(tx); err != nil {
		return err
	}
	s.keepEdge(edge, b.Events)
	return s.committed()
}

// commit ends a transaction, unless what it would go to is not the store's file
// any more.
func (s *Store) commit(tx *sql.Tx) error {
	if err := s.check(); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// committed makes sure that what was just committed is in the store's file.
func (s *Store) committed() error {
	err := s.check()
	var lost *store.LostError
	if errors.As(err, &lost) {
		late := *lost
		late.Committed = true
		return &late
	}
	return err
}

// failed undoes what is left of a transaction, and tells when its files are the
// reason for its failure.
func (s *Store) failed(tx *sql.Tx, err error) error {
	// One that could not be committed has been rolled back by the driver, and one
	// that met an error of the disk by SQLite.
	var e *sqlite.Error
	undone := tx.Rollback()
	if undone != nil && !errors.Is(undone, sql.ErrTxDone) && (!errors.As(undone, &e) || e.Code() != sqlite3.SQLITE_ERROR) {
		err = errors.Join(err, undone)
	}
	var lost *store.LostError
	if is := s.check(); errors.As(is, &lost) && !errors.As(err, &lost) {
		return errors.Join(is, err)
	}
	return err
}

// append writes events and the hashes of the tree over them. The edge that it
// returns counts once the transaction has been committed.
func (s *Store) append(ctx context.Context, tx *sql.Tx, events []store.Event) (merkle.Edge, error) {
	if len(events) == 0 {
		return s.edge, nil
	}
	if s.treeless {
		err := s.insert(ctx, tx, s.appended, events)
		s.appended += int64(len(events)) // numbers of a batch that fails are left out
		return s.edge, err
	}
	if err := s.insert(ctx, tx, s.edge.Size(), events); err != nil {
		return s.edge, err
	}
	edge, row := growEdge(s.edge, events)
	_, err := tx.StmtContext(ctx, s.grow).ExecContext(ctx, row...)
	return edge, err
}

func put(ctx context.Context, tx *sql.Tx, p store.Put) error {
	var res sql.Result
	var err error
	if p.Expect == 0 {
		res, err = tx.ExecContext(ctx, "INSERT INTO objects (kind, id, revision, doc) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
			p.Kind, p.ID, p.Revision, p.Doc)
	} else {
		res, err = tx.ExecContext(ctx, "UPDATE objects SET revision = ?, doc = ? WHERE kind = ? AND id = ? AND revision = ?",
			p.Revision, p.Doc, p.Kind, p.ID, p.Expect)
	}
	if err := expectOne(res, err); err != nil {
		return fmt.Errorf("write %s %s: %w", p.Kind, p.ID, err)
	}
	if p.Expect != 0 {
		if _, err := tx.ExecContext(ctx, "DELETE FROM unique_keys WHERE kind = ? AND id = ?", p.Kind, p.ID); err != nil {
			return fmt.Errorf("write %s %s: %w", p.Kind, p.ID, err)
		}
	}
	for _, key := range p.Unique {
		_, err := tx.ExecContext(ctx, "INSERT INTO unique_keys (key, kind, id) VALUES (?, ?, ?)", key, p.Kind, p.ID)
		if isConstraint(err) {
			return &store.TakenError{Key: key}
		}
		if err != nil {
			return fmt.Errorf("write %s %s: %w", p.Kind, p.ID, err)
		}
	}
	return nil
}

func remove(ctx context.Context, tx *sql.Tx, d store.Delete) error {
	res, err := tx.ExecContext(ctx, "DELETE FROM objects WHERE kind = ? AND id = ? AND revision = ?", d.Kind, d.ID, d.Expect)
	if err := expectOne(res, err); err != nil {
		return fmt.Errorf("delete %s %s: %w", d.Kind, d.ID, err)
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM unique_keys WHERE kind = ? AND id = ?", d.Kind, d.ID); err != nil {
		return fmt.Errorf("delete %s %s: %w", d.Kind, d.ID, err)
	}
	return nil
}

func expectOne(res sql.Result, err error) error {
	if err != nil {
		return err
	}
	if n, err := res.RowsAffected(); err != nil {
		return err
	} else if n != 1 {
		return store.ErrStale
	}
	return nil
}

func isConstraint(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e) && e.Code()&0xff == sqlite3.SQLITE_CONSTRAINT
}

// dayTable makes the table of a day's events, if there is none. The sequence
// number is the event's index in the whole log plus one.
func dayTable(day int) string {
	return fmt.Sprintf(`
		CREATE TABLE IF NOT EXISTS events_%[1]d (
			seq         INTEGER PRIMARY KEY,
			time        INTEGER NOT NULL,
			account     TEXT NOT NULL,
			correlation TEXT NOT NULL,
			action      TEXT NOT NULL,
			outcome     TEXT NOT NULL,
			severity    TEXT NOT NULL,
			initiator   TEXT NOT NULL,
			authn       TEXT NOT NULL,
			target      TEXT NOT NULL,
			doc         BLOB NOT NULL,
			changed     TEXT
		);
		CREATE INDEX IF NOT EXISTS events_%[1]d_correlation ON events_%[1]d (correlation);`, day) + changedIndex(day)
}

// openDays makes sure that the tables of the events' days exist.
func (s *Store) openDays(ctx context.Context, events []store.Event) error {
	for _, e := range events {
		day := store.Day(e.Time)
		if s.inserts[day] != nil {
			continue
		}
		if err := s.check(); err != nil {
			return err
		}
		if _, err := s.write.ExecContext(ctx, dayTable(day)); err != nil {
			return err
		}
		d, err := s.prepareDay(ctx, day)
		if err != nil {
			return err
		}
		s.inserts[day] = d
	}
	return s.closeDays(events)
}

func (s *Store) prepareDay(ctx context.Context, day int) (*dayInserts, error) {
	into := fmt.Sprintf("INSERT INTO events_%d ("+rowColumns+") VALUES ", day)
	one, err := s.write.PrepareContext(ctx, into+rowPattern)
	if err != nil {
		return nil, err
	}
	many, err := s.write.PrepareContext(ctx, into+rowPattern+strings.Repeat(", "+rowPattern, manyRows-1))
	if err != nil {
		return nil, errors.Join(err, one.Close())
	}
	return &dayInserts{one: one, many: many}, nil
}

// openDaysKept bounds the statements that stay prepared.
const openDaysKept = 3

// closeDays closes the statements of days that the batch does not write to,
// once there are more than a few.
func (s *Store) closeDays(events []store.Event) error {
	if len(s.inserts) <= openDaysKept {
		return nil
	}
	needed := map[int]bool{}
	for _, e := range events {
		needed[store.Day(e.Time)] = true
	}
	for day, d := range s.inserts {
		if needed[day] {
			continue
		}
		delete(s.inserts, day)
		if err := d.close(); err != nil {
			return err
		}
	}
	return nil
}

// insert writes events in their order, the first one at an index, as many of
// one day at a time as there are.
func (s *Store) insert(ctx context.Context, tx *sql.Tx, index int64, events []store.Event) error {
	for len(events) > 0 {
		day := store.Day(events[0].Time)
		same := 1
		for same < len(events) && same < manyRows && store.Day(events[same].Time) == day {
			same++
		}
		stmt, n := s.inserts[day].one, 1
		if same == manyRows {
			stmt, n = s.inserts[day].many, manyRows
		}
		args := make([]any, 0, n*rowWidth)
		for _, e := range events[:n] {
			index++
			args = append(args, row(index, e)...)
		}
		if _, err := tx.StmtContext(ctx, stmt).ExecContext(ctx, args...); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

// row returns the values of an event's row.
func row(seq int64, e store.Event) []any {
	return []any{
		seq, e.Time.UnixNano(), e.AccountID, e.CorrelationID, e.Action, e.Outcome, e.Severity, e.Initiator, e.Authn, e.Target, e.Doc,
		sql.NullString{String: e.Changed, Valid: e.Changed != ""},
	}
}

type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// dayTables returns the days that there are events of, the newest first.
func dayTables(ctx context.Context, q querier) (days []int, err error) {
	return tablesOf(ctx, q, "events_")
}

// tablesOf returns the days that have a table with a name that begins so, the
// newest first.
func tablesOf(ctx context.Context, q querier, prefix string) (days []int, err error) {
	rows, err := q.QueryContext(ctx,
		"SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB ? || '[0-9]*' ORDER BY name DESC", prefix)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			return nil, err
		}
		day, err := strconv.Atoi(strings.TrimPrefix(name, prefix))
		if err != nil {
			return nil, fmt.Errorf("table %s is of no day: %w", name, err)
		}
		days = append(days, day)
	}
	return days, rows.Err()
}
