package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

const growRow = "INSERT INTO merkle (first, size, hashes) VALUES (?, ?, ?)"

// growEdge adds events to a tree and returns the values of the row that keeps
// the hashes that are to be stored for them.
func growEdge(edge merkle.Edge, events []store.Event) (merkle.Edge, []any) {
	first := tlog.StoredHashCount(edge.Size())
	hashes := make([]tlog.Hash, 0, 2*len(events)+64)
	for _, e := range events {
		hashes = edge.Append(hashes, e.Doc)
	}
	blob := make([]byte, 0, len(hashes)*tlog.HashSize)
	for _, h := range hashes {
		blob = append(blob, h[:]...)
	}
	return edge, []any{first, edge.Size(), blob}
}

// keepEdge makes a committed tree the store's, and wakes who follows the log.
func (s *Store) keepEdge(edge merkle.Edge, events []store.Event) {
	if edge.Size() == s.edge.Size() {
		return
	}
	s.edge = edge
	s.remember(edge.Size(), events)
	s.growth.Lock()
	close(s.grown)
	s.grown = make(chan struct{})
	s.growth.Unlock()
}

// Grown implements [store.Log].
func (s *Store) Grown() <-chan struct{} {
	s.growth.Lock()
	defer s.growth.Unlock()
	return s.grown
}

// verifyFirst says what to do about a log that does not fit its tree.
const verifyFirst = "find out what with: tabard activity verify --data-dir DIR"

// openTree reads the right edge of the tree. Events beyond the tree's size
// would be overwritten by none: their numbers are taken, so that the store says
// so instead of failing at each commit.
func (s *Store) openTree(ctx context.Context) error {
	size, err := treeSize(ctx, s.read)
	if err != nil {
		return fmt.Errorf("read the size of the activity log: %w", err)
	}
	if s.edge, err = merkle.Read(size, s); err != nil {
		return fmt.Errorf("%w: something else than this program changed the file; %s", err, verifyFirst)
	}
	days, err := s.Days(ctx)
	if err != nil {
		return err
	}
	for _, d := range days {
		if d.Last >= size {
			return fmt.Errorf("the activity log has event %d, but its tree ends before %d: something else than this program changed the file; %s", d.Last, size, verifyFirst)
		}
	}
	return nil
}

func treeSize(ctx context.Context, q rowQuerier) (size int64, err error) {
	err = q.QueryRowContext(ctx, "SELECT size FROM merkle ORDER BY first DESC LIMIT 1").Scan(&size)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return size, err
}

type rowQuerier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// growTree gives the events of a file of version 2 their numbers in the whole
// log, the columns that version 3 has, and a tree.
func (s *Store) growTree(ctx context.Context) (err error) {
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
	slices.Sort(days)
	var edge merkle.Edge
	for _, day := range days {
		if _, err := tx.ExecContext(ctx, fmt.Sprintf(
			"ALTER TABLE events_%[1]d RENAME TO old_events_%[1]d; DROP INDEX IF EXISTS events_%[1]d_correlation; DROP INDEX IF EXISTS events_%[1]d_changed; ", day)+dayTable(day)); err != nil {
			return err
		}
		if edge, err = moveDay(ctx, tx, day, edge); err != nil {
			return fmt.Errorf("the events of %d: %w", day, err)
		}
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("DROP TABLE old_events_%d", day)); err != nil {
			return err
		}
	}
	if _, err := tx.ExecContext(ctx, "UPDATE schema_version SET version = 3"); err != nil {
		return err
	}
	return tx.Commit()
}

// moveRows is how many events are moved at a time.
const moveRows = 500

func moveDay(ctx context.Context, tx *sql.Tx, day int, edge merkle.Edge) (_ merkle.Edge, err error) {
	insert, err := tx.PrepareContext(ctx, fmt.Sprintf("INSERT INTO events_%d ("+rowColumns+") VALUES "+rowPattern, day))
	if err != nil {
		return edge, err
	}
	defer func() { err = errors.Join(err, insert.Close()) }()
	after := int64(0)
	for {
		events, last, err := oldEvents(ctx, tx, day, after)
		if err != nil || len(events) == 0 {
			return edge, err
		}
		for i, e := range events {
			if _, err := insert.ExecContext(ctx, row(edge.Size()+int64(i)+1, e)...); err != nil {
				return edge, err
			}
		}
		grown, row := growEdge(edge, events)
		if _, err := tx.ExecContext(ctx, growRow, row...); err != nil {
			return edge, err
		}
		edge, after = grown, last
	}
}

func oldEvents(ctx context.Context, tx *sql.Tx, day int, after int64) (events []store.Event, last int64, err error) {
	rows, err := tx.QueryContext(ctx, fmt.Sprintf(
		"SELECT seq, time, account, correlation, action, outcome, doc, changed FROM old_events_%d WHERE seq > ? ORDER BY seq LIMIT ?", day), after, moveRows)
	if err != nil {
		return nil, 0, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var e store.Event
		var nanos int64
		var changed sql.NullString
		if err := rows.Scan(&last, &nanos, &e.AccountID, &e.CorrelationID, &e.Action, &e.Outcome, &e.Doc, &changed); err != nil {
			return nil, 0, err
		}
		e.Time, e.Changed = time.Unix(0, nanos).UTC(), changed.String
		var doc activity.Event
		if json.Unmarshal(e.Doc, &doc) == nil { // one that cannot be read is kept as it is
			e.Severity, e.Initiator, e.Authn, e.Target = doc.Severity, doc.Initiator.ID, doc.Initiator.AuthnID, doc.Target.ID
		}
		events = append(events, e)
	}
	return events, last, rows.Err()
}

// ReadHashes implements [tlog.HashReader].
func (s *Store) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	// The interface has no context; what is read is bounded by the indexes.
	ctx := context.Background()
	out := make([]tlog.Hash, len(indexes))
	for i, index := range indexes {
		h, err := s.readHash(ctx, index)
		if err != nil {
			return nil, fmt.Errorf("read hash %d of the activity log: %w", index, err)
		}
		out[i] = h
	}
	return out, nil
}

// errNoHash means that a hash is not stored: nothing was ever committed there,
// or the events below it have been dropped.
var errNoHash = errors.New("it is not stored")

func (s *Store) readHash(ctx context.Context, index int64) (h tlog.Hash, err error) {
	var first int64
	var blob []byte
	err = s.read.QueryRowContext(ctx, "SELECT first, substr(hashes, (? - first) * 32 + 1, 32) FROM merkle WHERE first <= ? ORDER BY first DESC LIMIT 1",
		index, index).Scan(&first, &blob)
	if errors.Is(err, sql.ErrNoRows) || err == nil && len(blob) != tlog.HashSize {
		err = s.read.QueryRowContext(ctx, "SELECT hash FROM merkle_edge WHERE position = ?", index).Scan(&blob)
		if errors.Is(err, sql.ErrNoRows) {
			return h, errNoHash
		}
	}
	if err != nil {
		return h, err
	}
	if copy(h[:], blob) != tlog.HashSize {
		return h, errNoHash
	}
	return h, nil
}

// Extent implements [store.Log].
func (s *Store) Extent(ctx context.Context) (store.Extent, error) {
	size, err := treeSize(ctx, s.read)
	if err != nil {
		return store.Extent{}, fmt.Errorf("read the size of the activity log: %w", err)
	}
	days, err := s.Days(ctx)
	if err != nil {
		return store.Extent{}, err
	}
	e := store.Extent{First: size, Size: size}
	for _, d := range days {
		e.First = min(e.First, d.First)
	}
	err = s.read.QueryRowContext(ctx, "SELECT page_count * page_size, freelist_count * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size").
		Scan(&e.Bytes, &e.Free)
	return e, err
}

// Days implements [store.Log].
func (s *Store) Days(ctx context.Context) ([]store.DayInfo, error) {
	return daysOf(ctx, s.read)
}

type fullQuerier interface {
	querier
	rowQuerier
}

// daysOf returns the days with events, oldest first.
func daysOf(ctx context.Context, q fullQuerier) ([]store.DayInfo, error) {
	days, err := dayTables(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("list the days of the activity log: %w", err)
	}
	var out []store.DayInfo
	for _, day := range days {
		d, ok, err := extentOf(ctx, q, day)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, d)
		}
	}
	slices.SortFunc(out, func(a, b store.DayInfo) int { return cmp.Compare(a.Day, b.Day) })
	return out, nil
}

// extentOf returns a day's extent, and whether it has events.
func extentOf(ctx context.Context, q rowQuerier, day int) (d store.DayInfo, ok bool, err error) {
	var first, last sql.NullInt64
	err = q.QueryRowContext(ctx, fmt.Sprintf("SELECT (SELECT min(seq) FROM events_%[1]d), (SELECT max(seq) FROM events_%[1]d)", day)).Scan(&first, &last)
	if err != nil || !first.Valid {
		if err != nil {
			err = fmt.Errorf("read the extent of day %d: %w", day, err)
		}
		return d, false, err
	}
	// The number of events is what it is at most; around midnight two days can
	// share a stretch.
	return store.DayInfo{Day: day, First: first.Int64 - 1, Last: last.Int64 - 1, Events: last.Int64 - first.Int64 + 1}, true, nil
}

// Entries implements [store.Log]. All days are read in one transaction: around
// midnight two of them grow by turns, and one seen later than the other would
// hide what came between.
func (s *Store) Entries(ctx context.Context, from int64, limit int) (out []store.Entry, err error) {
	tx, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("read the activity log: %w", err)
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	days, err := daysOf(ctx, tx)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(days, func(a, b store.DayInfo) int { return cmp.Compare(a.First, b.First) })
	byIndex := func(a, b store.Entry) int { return cmp.Compare(a.Index, b.Index) }
	for _, d := range days {
		if d.Last < from {
			continue
		}
		if len(out) >= limit && limit > 0 && d.First > out[limit-1].Index {
			break
		}
		more, err := entriesOf(ctx, tx, d.Day, from, limit)
		if err != nil {
			return nil, fmt.Errorf("read the activity log of %d: %w", d.Day, err)
		}
		out = append(out, more...)
		slices.SortFunc(out, byIndex)
	}
	n := min(len(out), limit)
	for n > 0 && n < len(out) && out[n].Index == out[n-1].Index {
		n++
	}
	return out[:n], nil
}

func entriesOf(ctx context.Context, tx *sql.Tx, day int, from int64, limit int) (out []store.Entry, err error) {
	rows, err := tx.QueryContext(ctx, fmt.Sprintf("SELECT "+rowColumns+" FROM events_%d WHERE seq > ? ORDER BY seq LIMIT ?", day), from, limit)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		e := store.Entry{Day: day}
		var seq, nanos int64
		var changed sql.NullString
		if err := rows.Scan(&seq, &nanos, &e.AccountID, &e.CorrelationID, &e.Action, &e.Outcome, &e.Severity, &e.Initiator, &e.Authn,
			&e.Target, &e.Doc, &changed); err != nil {
			return nil, err
		}
		e.Index, e.Time, e.Changed = seq-1, time.Unix(0, nanos).UTC(), changed.String
		out = append(out, e)
	}
	return out, rows.Err()
}

// Dropped implements [store.Log].
func (s *Store) Dropped(ctx context.Context) (out []store.DroppedDay, err error) {
	rows, err := s.read.QueryContext(ctx, "SELECT day, first, last, count, at, rest, holes FROM dropped_days ORDER BY day")
	if err != nil {
		return nil, fmt.Errorf("list the dropped days: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var d store.DroppedDay
		var at int64
		var holes string
		if err := rows.Scan(&d.Day, &d.First, &d.Last, &d.Events, &at, &d.Left, &holes); err != nil {
			return nil, err
		}
		d.At = time.Unix(0, at).UTC()
		if err := json.Unmarshal([]byte(holes), &d.Holes); err != nil {
			return nil, fmt.Errorf("read dropped day %d: %w", d.Day, err)
		}
		out = append(out, d)
	}
	return out, rows.Err()
}

// KeepCheckpoint implements [store.Log].
func (s *Store) KeepCheckpoint(ctx context.Context, c store.Checkpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	_, err := s.write.ExecContext(ctx, "INSERT INTO checkpoints (size, time, note) VALUES (?, ?, ?) ON CONFLICT (size) DO UPDATE SET time = excluded.time, note = excluded.note",
		c.Size, c.Time.UnixNano(), c.Note)
	if err != nil {
		return fmt.Errorf("keep the checkpoint of %d events: %w", c.Size, err)
	}
	return nil
}

// Checkpoints implements [store.Log].
func (s *Store) Checkpoints(ctx context.Context, atLeast, atMost int64, limit int) (out []store.Checkpoint, err error) {
	rows, err := s.read.QueryContext(ctx, "SELECT size, time, note FROM checkpoints WHERE size BETWEEN ? AND ? ORDER BY size DESC LIMIT ?", atLeast, atMost, limit)
	if err != nil {
		return nil, fmt.Errorf("read the checkpoints: %w", err)
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var c store.Checkpoint
		var at int64
		if err := rows.Scan(&c.Size, &at, &c.Note); err != nil {
			return nil, err
		}
		c.Time = time.Unix(0, at).UTC()
		out = append(out, c)
	}
	return out, rows.Err()
}

// ThinCheckpoints implements [store.Log].
func (s *Store) ThinCheckpoints(ctx context.Context, before time.Time, period time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	_, err := s.write.ExecContext(ctx, "DELETE FROM checkpoints WHERE time < ?1 AND size NOT IN (SELECT max(size) FROM checkpoints WHERE time < ?1 GROUP BY time / ?2)",
		before.UnixNano(), int64(period))
	if err != nil {
		return fmt.Errorf("thin out the checkpoints: %w", err)
	}
	return nil
}
