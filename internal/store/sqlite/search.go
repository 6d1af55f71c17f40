package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/store"
)

const (
	// defaultLookAt is how many events one search looks at in vain, at most. Those
	// that the index rules out are not looked at.
	defaultLookAt = 50_000

	scanned = 8192 // numbers of events that are looked at in one statement
	fetched = 256  // events that the index names, and that are read in one statement

	// stretchBlocks is how many blocks of the index are read together on the
	// way forward, and stretches how often one call does so.
	stretchBlocks = 64
	stretches     = 64
)

// Events implements [store.Store].
func (s *Store) Events(ctx context.Context, q store.Query) ([]store.StoredEvent, error) {
	out := []store.StoredEvent{}
	for {
		found, err := s.Search(ctx, q)
		if err != nil {
			return nil, err
		}
		out = append(out, found.Events...)
		q.Limit -= len(found.Events)
		if q.Limit <= 0 || found.Next.IsZero() {
			return out, nil
		}
		q.Before = found.Next
	}
}

// Search implements [store.Store]. It walks the days from the newest one back.
func (s *Store) Search(ctx context.Context, q store.Query) (found store.Found, err error) {
	f, err := s.find(ctx, q)
	if err != nil {
		return found, err
	}
	defer func() { err = errors.Join(err, f.tx.Rollback()) }()
	found.Events = []store.StoredEvent{}
	for _, day := range f.days {
		if !q.Before.IsZero() && day > q.Before.Day {
			continue
		}
		more, next, err := f.newest(ctx, day, q.Limit-len(found.Events))
		if err != nil {
			return found, fmt.Errorf("search the activity log of %d: %w", day, err)
		}
		found.Events = append(found.Events, more...)
		switch n := len(found.Events); {
		case n >= q.Limit:
			found.Next = found.Events[n-1].Position
			return found, nil
		case f.left <= 0:
			// Before the number 1 there is nothing: what follows are older days.
			found.Next = store.Position{Day: day, Seq: max(next, 0) + 1}
			return found, nil
		}
	}
	return found, nil
}

// finder is one search under way.
type finder struct {
	tx        *sql.Tx // what the search sees; nothing in it changes meanwhile
	q         store.Query
	where     string // what rows must fulfil
	args      []any
	key       string // the column of q that has a B-tree of its own, or ""
	keyArg    string
	days      []int        // that can have what is looked for, newest first
	low, high int64        // blocks from low on and below high are in the index
	terms     map[int]bool // days that have an index
	left      int          // events that may yet be looked at in vain
}

// find begins a search. Its transaction is to be rolled back.
func (s *Store) find(ctx context.Context, q store.Query) (_ *finder, err error) {
	tx, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("search the activity log: %w", err)
	}
	f := &finder{tx: tx, q: q, left: s.lookAt}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("search the activity log: %w", err), tx.Rollback())
		}
	}()
	f.where, f.args = conditions(q)
	switch {
	case q.CorrelationID != "":
		f.key, f.keyArg = "correlation", q.CorrelationID
	case q.Changed != "":
		f.key, f.keyArg = "changed", q.Changed
	}
	if f.days, err = dayTables(ctx, tx); err != nil {
		return nil, err
	}
	f.days = slices.DeleteFunc(f.days, func(day int) bool {
		return !q.Since.IsZero() && day < store.Day(q.Since) || !q.Until.IsZero() && day > store.Day(q.Until)
	})
	if f.low, f.high, f.terms, err = indexExtent(ctx, tx); err != nil {
		return nil, err
	}
	return f, nil
}

// conditions returns what a query demands of a row.
func conditions(q store.Query) (where string, args []any) {
	parts := []string{"1"}
	add := func(cond string, arg any) { parts, args = append(parts, cond), append(args, arg) }
	if !q.AllAccounts {
		add("account = ?", q.AccountID)
	}
	for _, c := range []struct{ column, value string }{
		{"changed", q.Changed}, {"correlation", q.CorrelationID}, {"action", q.Action}, {"outcome", q.Outcome}, {"severity", q.Severity},
		{"initiator", q.Initiator}, {"authn", q.Authn}, {"target", q.Target},
	} {
		if c.value != "" {
			add(c.column+" = ?", c.value)
		}
	}
	if q.ActionPrefix != "" {
		add("action >= ?", q.ActionPrefix)
		if after, ok := successor(q.ActionPrefix); ok {
			add("action < ?", after)
		}
	}
	if !q.Since.IsZero() {
		add("time >= ?", q.Since.UnixNano())
	}
	if !q.Until.IsZero() {
		add("time < ?", q.Until.UnixNano())
	}
	return strings.Join(parts, " AND "), args
}

// successor returns the least text that is greater than all that begin with a
// prefix, byte by byte, if there is one.
func successor(prefix string) (string, bool) {
	b := []byte(prefix)
	for len(b) > 0 {
		if b[len(b)-1]++; b[len(b)-1] != 0 {
			return string(b), true
		}
		b = b[:len(b)-1]
	}
	return "", false
}

// newest finds the newest events of a day before the query's position.
func (f *finder) newest(ctx context.Context, day, limit int) (out []store.StoredEvent, next int64, err error) {
	d, ok, err := extentOf(ctx, f.tx, day)
	if err != nil || !ok {
		return nil, 0, err
	}
	first, last := d.First+1, d.Last+1
	if day == f.q.Before.Day {
		last = min(last, f.q.Before.Seq-1)
	}
	if f.key != "" {
		return f.backByKey(ctx, day, first, last, limit)
	}
	return f.back(ctx, day, first, last, limit)
}

// back finds the newest events of a day with the numbers from first to last.
// Unless it has found as many as wanted or all of them, next is the number from
// which to go on downwards.
func (f *finder) back(ctx context.Context, day int, first, last int64, limit int) (out []store.StoredEvent, next int64, err error) {
	low, high := f.low<<blockBits, f.high<<blockBits // the numbers from low+1 to high are in the index
	next = last
	for next >= first && len(out) < limit && f.left > 0 {
		var more []store.StoredEvent
		switch {
		case !f.terms[day] || next <= low:
			more, next, err = f.scanBack(ctx, day, first, next, limit-len(out))
		case next > high:
			more, next, err = f.scanBack(ctx, day, max(first, high+1), next, limit-len(out))
		default:
			more, next, err = f.lookBack(ctx, day, max(first, low+1), next, limit-len(out))
		}
		if err != nil {
			return nil, 0, err
		}
		out = append(out, more...)
	}
	return out, next, nil
}

// scanBack looks at one run of events, and returns the number below it.
func (f *finder) scanBack(ctx context.Context, day int, first, last int64, limit int) ([]store.StoredEvent, int64, error) {
	// Days that share a stretch of the log have wide gaps.
	var top sql.NullInt64
	if err := f.tx.QueryRowContext(ctx, fmt.Sprintf("SELECT max(seq) FROM events_%d WHERE seq BETWEEN ? AND ?", day), first, last).Scan(&top); err != nil {
		return nil, 0, err
	}
	if !top.Valid {
		return nil, first - 1, nil
	}
	bottom := max(first, top.Int64-scanned+1)
	out, err := f.rows(ctx, day, fmt.Sprintf("seq BETWEEN %d AND %d", bottom, top.Int64), "DESC", limit)
	if err != nil {
		return nil, 0, err
	}
	f.left -= int(top.Int64-bottom) + 1 - len(out)
	return out, bottom - 1, nil
}

// lookBack reads what the index names of the numbers from first to last.
func (f *finder) lookBack(ctx context.Context, day int, first, last int64, limit int) (out []store.StoredEvent, next int64, err error) {
	blocks, err := f.blocks(ctx, day, first, last)
	if err != nil {
		return nil, 0, err
	}
	numbers := make([]int64, 0, fetched)
	fetch := func() error {
		more, err := f.fetch(ctx, day, numbers, "DESC")
		if len(numbers) > 0 {
			next = numbers[len(numbers)-1] - 1
		}
		out, numbers = append(out, more...), numbers[:0]
		return err
	}
	for _, b := range slices.Backward(blocks) {
		for n := range b.backward() {
			if n < first || n > last {
				continue
			}
			if numbers = append(numbers, n); len(numbers) < min(fetched, max(limit-len(out), 1)) {
				continue
			}
			if err := fetch(); err != nil || len(out) >= limit || f.left <= 0 {
				return out, next, err
			}
		}
	}
	err = fetch()
	return out, first - 1, err
}

// backByKey reads what a B-tree names. Others can give many events one key.
func (f *finder) backByKey(ctx context.Context, day int, first, last int64, limit int) (out []store.StoredEvent, next int64, err error) {
	for next = last; len(out) < limit && f.left > 0; {
		numbers, err := sequence(ctx, f.tx, fmt.Sprintf("SELECT seq FROM events_%d WHERE %s = ? AND seq BETWEEN ? AND ? ORDER BY seq DESC LIMIT ?", day, f.key),
			f.keyArg, first, next, min(fetched, limit-len(out)))
		if err != nil {
			return nil, 0, err
		}
		if len(numbers) == 0 {
			return out, first - 1, nil
		}
		more, err := f.fetch(ctx, day, numbers, "DESC")
		if err != nil {
			return nil, 0, err
		}
		out, next = append(out, more...), numbers[len(numbers)-1]-1
	}
	return out, next, nil
}

// fetch reads the events with some numbers, of which a few may not be wanted.
func (f *finder) fetch(ctx context.Context, day int, numbers []int64, order string) ([]store.StoredEvent, error) {
	if len(numbers) == 0 {
		return nil, nil
	}
	in := []byte("seq IN (")
	for i, n := range numbers {
		if i > 0 {
			in = append(in, ',')
		}
		in = strconv.AppendInt(in, n, 10)
	}
	out, err := f.rows(ctx, day, string(append(in, ')')), order, len(numbers))
	f.left -= len(numbers) - len(out)
	return out, err
}

// rows reads the wanted events of those that fulfil one more condition.
func (f *finder) rows(ctx context.Context, day int, also, order string, limit int) (out []store.StoredEvent, err error) {
	rows, err := f.tx.QueryContext(ctx, fmt.Sprintf("SELECT seq, time, doc FROM events_%d WHERE %s AND %s ORDER BY seq %s LIMIT %d",
		day, f.where, also, order, limit), f.args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		e := store.StoredEvent{Position: store.Position{Day: day}}
		var nanos int64
		if err := rows.Scan(&e.Position.Seq, &nanos, (*[]byte)(&e.Doc)); err != nil {
			return nil, err
		}
		e.Time = time.Unix(0, nanos).UTC()
		out = append(out, e)
	}
	return out, rows.Err()
}

// Follow implements [store.Store]. Days that share a stretch of the log are
// read together.
func (s *Store) Follow(ctx context.Context, q store.Query, from int64, limit int) (out []store.StoredEvent, next int64, err error) {
	q.Before = store.Position{}
	f, err := s.find(ctx, q)
	if err != nil {
		return nil, from, err
	}
	defer func() { err = errors.Join(err, f.tx.Rollback()) }()
	size, err := treeSize(ctx, f.tx)
	if err != nil {
		return nil, from, fmt.Errorf("read the size of the activity log: %w", err)
	}
	days := make([]store.DayInfo, 0, len(f.days))
	for _, day := range f.days {
		d, ok, err := extentOf(ctx, f.tx, day)
		if err != nil {
			return nil, from, err
		}
		if ok && d.Last >= from {
			days = append(days, d)
		}
	}
	out = []store.StoredEvent{}
	next = max(from, 0)
	for turn := 0; next < size && len(out) < limit && f.left > 0 && turn < stretches; turn++ {
		more, on, err := f.forward(ctx, days, next, size, limit-len(out))
		if err != nil {
			return nil, from, fmt.Errorf("search the activity log from %d on: %w", next, err)
		}
		out, next = append(out, more...), on
	}
	return out, next, nil
}

// candidate is an event that may be one that is looked for.
type candidate struct {
	number int64
	day    int
}

// forward reads one stretch of the log from an index on, and returns the index
// after it.
func (f *finder) forward(ctx context.Context, days []store.DayInfo, from, size int64, limit int) ([]store.StoredEvent, int64, error) {
	begin := size // nothing of the days that are left lies before it
	for _, d := range days {
		if d.Last >= from {
			begin = min(begin, max(d.First, from))
		}
	}
	if from = begin; from >= size {
		return nil, size, nil
	}
	low, high := f.low<<blockBits, f.high<<blockBits
	end, look := size, f.scanForward
	switch {
	case f.key != "":
		look = f.keyForward
	case from < low:
		end = min(low, from+scanned)
	case from < high:
		end, look = min(high, (from>>blockBits+stretchBlocks)<<blockBits), f.lookForward
	default:
		end = min(size, from+scanned)
	}
	var all []candidate
	var whole []store.StoredEvent
	for _, d := range days {
		if d.Last < from || d.First >= end {
			continue
		}
		numbers, events, err := look(ctx, d.Day, from+1, end, limit)
		if err != nil {
			return nil, 0, err
		}
		for _, n := range numbers {
			all = append(all, candidate{n, d.Day})
		}
		whole = append(whole, events...)
	}
	byNumber := func(a, b store.StoredEvent) int { return cmp.Compare(a.Position.Seq, b.Position.Seq) }
	slices.SortFunc(whole, byNumber)
	if len(whole) >= limit {
		return whole[:limit], whole[limit-1].Position.Seq, nil
	}
	slices.SortFunc(all, func(a, b candidate) int { return cmp.Compare(a.number, b.number) })
	if n := min(fetched, limit); len(all) > n {
		all, end = all[:n], all[n-1].number
	}
	for len(all) > 0 {
		day := all[0].day
		var numbers []int64
		all = slices.DeleteFunc(all, func(c candidate) bool {
			if c.day == day {
				numbers = append(numbers, c.number)
			}
			return c.day == day
		})
		events, err := f.fetch(ctx, day, numbers, "ASC")
		if err != nil {
			return nil, 0, err
		}
		whole = append(whole, events...)
	}
	slices.SortFunc(whole, byNumber)
	return whole, end, nil
}

// The ways to look at a day's events with the numbers from first to last: they
// return numbers of candidates, or events.

func (f *finder) scanForward(ctx context.Context, day int, first, last int64, limit int) ([]int64, []store.StoredEvent, error) {
	events, err := f.rows(ctx, day, fmt.Sprintf("seq BETWEEN %d AND %d", first, last), "ASC", limit)
	f.left -= int(last-first) + 1 - len(events)
	return nil, events, err
}

func (f *finder) lookForward(ctx context.Context, day int, first, last int64, limit int) ([]int64, []store.StoredEvent, error) {
	enough := min(fetched, limit) + 1 // one more tells that there is more
	if !f.terms[day] {
		numbers, err := sequence(ctx, f.tx, fmt.Sprintf("SELECT seq FROM events_%d WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?", day), first, last, enough)
		return numbers, nil, err
	}
	blocks, err := f.blocks(ctx, day, first, last)
	if err != nil {
		return nil, nil, err
	}
	var numbers []int64
	for _, b := range blocks {
		for n := range b.forward() {
			if n >= first && n <= last {
				numbers = append(numbers, n)
			}
		}
		if len(numbers) >= enough {
			break
		}
	}
	return numbers, nil, nil
}

func (f *finder) keyForward(ctx context.Context, day int, first, last int64, limit int) ([]int64, []store.StoredEvent, error) {
	numbers, err := sequence(ctx, f.tx, fmt.Sprintf("SELECT seq FROM events_%d WHERE %s = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?", day, f.key),
		f.keyArg, first, last, min(fetched, limit)+1)
	return numbers, nil, err
}
