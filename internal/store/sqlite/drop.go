package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

// A day that was dropped is gone for readers at once: its table gets another
// name in the transaction that records it. What is left is freed in slices, of
// which each is short enough for a token to wait behind it.
const (
	goneTable  = "gone_"
	sliceRows  = 1000 // events or rows of hashes
	slicePages = 500
)

// DropDay implements [store.Log].
func (s *Store) DropDay(ctx context.Context, day int, b store.Batch) error {
	if err := s.Reclaim(ctx); err != nil {
		return err
	}
	if err := s.recordDrop(ctx, day, b); err != nil {
		return fmt.Errorf("drop the events of %d: %w", day, err)
	}
	// The day is gone, and that is recorded: whoever was told that there is no room
	// would drop it again. What cannot be freed now is freed by the next Reclaim.
	if err := s.Reclaim(ctx); err != nil && ctx.Err() != nil {
		return err
	}
	return nil
}

// Frugal has the store write nothing that it can make anew, or lets it again.
func (s *Store) Frugal(on bool) { s.frugal.Store(on) }

func (s *Store) recordDrop(ctx context.Context, day int, b store.Batch) (err error) {
	// To count a day takes as long as it is large. Events that come to it while
	// or after this is done are counted under the lock.
	var count, last int64
	err = s.read.QueryRowContext(ctx, fmt.Sprintf("SELECT count(*), coalesce(max(seq), 0) FROM %s", s.tableOf(ctx, day))).Scan(&count, &last)
	if err != nil {
		return fmt.Errorf("count them: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if d := s.inserts[day]; d != nil {
		delete(s.inserts, day)
		if err := d.close(); err != nil {
			return err
		}
	}
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
	edge, err := s.append(ctx, tx, b.Events)
	if err != nil {
		return fmt.Errorf("append events: %w", err)
	}
	if err := moveAway(ctx, tx, day, edge.Size(), count, last); err != nil {
		return err
	}
	if err := s.commit(tx); err != nil {
		return err
	}
	s.keepEdge(edge, b.Events)
	return s.committed()
}

// tableOf returns the name of a day's table, or of an empty one.
func (s *Store) tableOf(ctx context.Context, day int) string {
	days, err := dayTables(ctx, s.read)
	if err == nil && !slices.Contains(days, day) {
		return "(SELECT 0 AS seq WHERE 0)"
	}
	return fmt.Sprintf("events_%d", day)
}

// moveAway gives a day's table another name, writes down what it had, and keeps
// the right edge of the tree as it was at the first event that is left: every
// later proof begins at it.
func moveAway(ctx context.Context, tx *sql.Tx, day int, size, count, counted int64) error {
	days, err := daysOf(ctx, tx)
	if err != nil {
		return err
	}
	n := slices.IndexFunc(days, func(d store.DayInfo) bool { return d.Day == day })
	if n < 0 {
		return errors.New("there are none")
	}
	gone, left := days[n], size
	for i, d := range days {
		if i != n {
			left = min(left, d.First)
		}
	}
	holes, err := sequence(ctx, tx, fmt.Sprintf("SELECT seq - 1 FROM events_%d WHERE seq > ? ORDER BY seq", day), left)
	if err != nil {
		return err
	}
	var more int64
	if err := tx.QueryRowContext(ctx, fmt.Sprintf("SELECT count(*) FROM events_%d WHERE seq > ?", day), counted).Scan(&more); err != nil {
		return err
	}
	text, err := json.Marshal(holes)
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO dropped_days (day, first, last, count, at, rest, holes) VALUES (?, ?, ?, ?, ?, ?, ?)"+
		" ON CONFLICT (day) DO UPDATE SET first = min(first, excluded.first), last = excluded.last, count = count + excluded.count, at = excluded.at, rest = excluded.rest, holes = excluded.holes",
		day, gone.First, gone.Last, count+more, time.Now().UnixNano(), left, string(text)); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("ALTER TABLE events_%[1]d RENAME TO %[2]s%[1]d; DROP TABLE IF EXISTS terms_%[1]d", day, goneTable)); err != nil {
		return err
	}
	return keepEdgeAt(ctx, tx, left)
}

func sequence(ctx context.Context, tx *sql.Tx, query string, args ...any) (out []int64, err error) {
	out = []int64{}
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var v int64
		if err := rows.Scan(&v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// keepEdgeAt keeps the edge of the tree of a size apart from the other hashes.
func keepEdgeAt(ctx context.Context, tx *sql.Tx, size int64) error {
	kept := map[int64][]byte{}
	for _, position := range merkle.Indexes(size) {
		var h []byte
		err := tx.QueryRowContext(ctx, "SELECT coalesce((SELECT hash FROM merkle_edge WHERE position = ?1), "+
			"(SELECT substr(hashes, (?1 - first) * 32 + 1, 32) FROM merkle WHERE first <= ?1 ORDER BY first DESC LIMIT 1))", position).Scan(&h)
		if err != nil {
			return fmt.Errorf("read hash %d: %w", position, err)
		}
		kept[position] = h
	}
	if _, err := tx.ExecContext(ctx, "DELETE FROM merkle_edge"); err != nil {
		return err
	}
	for position, h := range kept {
		if _, err := tx.ExecContext(ctx, "INSERT INTO merkle_edge (position, hash) VALUES (?, ?)", position, h); err != nil {
			return err
		}
	}
	return nil
}

// Reclaim implements [store.Log].
func (s *Store) Reclaim(ctx context.Context) error {
	for {
		done, err := s.slice(ctx, freeGone)
		if err != nil {
			return fmt.Errorf("free what dropped days took: %w", err)
		}
		if done {
			break
		}
	}
	for {
		done, err := s.slice(ctx, freeHashes)
		if err != nil {
			return fmt.Errorf("free the hashes of dropped days: %w", err)
		}
		if done {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	return s.settle(context.WithoutCancel(ctx))
}

// slice runs one short transaction.
func (s *Store) slice(ctx context.Context, f func(context.Context, *sql.Tx) (done bool, err error)) (done bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return false, err
	}
	ctx = context.WithoutCancel(ctx)
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			err = s.failed(tx, err)
		}
	}()
	if done, err = f(ctx, tx); err != nil {
		return false, err
	}
	if done {
		return true, tx.Rollback() // it has found nothing to do
	}
	if err := s.commit(tx); err != nil {
		return false, err
	}
	return false, s.committed()
}

// freeGone frees a bit of a table that DropDay has moved away: its indexes one
// by one, its rows, and at last itself.
func freeGone(ctx context.Context, tx *sql.Tx) (done bool, err error) {
	var table string
	err = tx.QueryRowContext(ctx, "SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB '"+goneTable+"[0-9]*' LIMIT 1").Scan(&table)
	if errors.Is(err, sql.ErrNoRows) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	var index string
	err = tx.QueryRowContext(ctx, "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL LIMIT 1", table).Scan(&index)
	if err == nil {
		_, err = tx.ExecContext(ctx, "DROP INDEX "+quoted(index))
		return false, err
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return false, err
	}
	res, err := tx.ExecContext(ctx, fmt.Sprintf("DELETE FROM %[1]s WHERE seq <= (SELECT max(seq) FROM (SELECT seq FROM %[1]s ORDER BY seq LIMIT %[2]d))", quoted(table), sliceRows))
	if err != nil {
		return false, err
	}
	if n, err := res.RowsAffected(); err != nil || n > 0 {
		return false, err
	}
	_, err = tx.ExecContext(ctx, "DROP TABLE "+quoted(table))
	return false, err
}

func quoted(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// freeHashes frees some of the hashes below the first event that is left. The
// last row stays, because it tells the size, and so does the one that the first
// kept hash is in.
func freeHashes(ctx context.Context, tx *sql.Tx) (done bool, err error) {
	var left sql.NullInt64
	if err := tx.QueryRowContext(ctx, "SELECT max(rest) FROM dropped_days").Scan(&left); err != nil {
		return false, err
	}
	if !left.Valid {
		return true, nil
	}
	res, err := tx.ExecContext(ctx, "DELETE FROM merkle WHERE first IN (SELECT first FROM merkle WHERE first < "+
		"(SELECT max(first) FROM merkle WHERE first <= ?) ORDER BY first LIMIT ?)", tlog.StoredHashCount(left.Int64), sliceRows)
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	return n == 0, err
}

// Shrink implements [store.Files]. Pages are moved from the file's end into the
// free ones, some at a time. A file of a version that did not provide for it
// stays as large as it is; its free pages are used again.
func (s *Store) Shrink(ctx context.Context, keep int64) error {
	for {
		done, err := s.shrink(ctx, keep)
		if err != nil {
			return fmt.Errorf("make the file of the store smaller: %w", err)
		}
		if done {
			return nil
		}
	}
}

func (s *Store) shrink(ctx context.Context, keep int64) (done bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return false, err
	}
	ctx = context.WithoutCancel(ctx)
	var mode, pages, free, size int64
	if err := s.write.QueryRowContext(ctx, "SELECT * FROM pragma_auto_vacuum, pragma_page_count, pragma_freelist_count, pragma_page_size").
		Scan(&mode, &pages, &free, &size); err != nil {
		return false, err
	}
	if most := keep / size; mode != 2 || free <= most {
		return true, s.settle(ctx)
	} else {
		free = min(free-most, slicePages)
	}
	// With the pages go some that only keep account of them.
	s.files.main.shrinking = true
	s.files.main.floor = min(s.files.main.floor, max(0, pages-free-free/100-2)*size)
	if _, err := s.write.ExecContext(ctx, fmt.Sprintf("PRAGMA incremental_vacuum(%d)", free)); err != nil {
		return false, err
	}
	return false, s.check()
}

// settle brings the write-ahead log into the main file, which only then becomes
// smaller. Readers may hinder it; then a later commit or settle does it.
func (s *Store) settle(ctx context.Context) error {
	if !s.files.main.shrinking {
		return nil
	}
	var busy, inLog, done int
	if err := s.write.QueryRowContext(ctx, "PRAGMA wal_checkpoint(PASSIVE)").Scan(&busy, &inLog, &done); err != nil {
		return err
	}
	s.files.main.shrinking = busy != 0 || inLog != done
	return s.check()
}
