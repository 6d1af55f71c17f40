package sqlite

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/store"
)

// The index of the activity log says for each block of events, and for each
// value that one of them has in a column, which ones have it. It is made beside
// the commits, when a block is complete: no commit waits for it or pays for it.
// A search takes the intersection of what it names, so that any combination of
// filters costs about the same, also one that nothing fulfils. Events that are
// not in the index yet are looked at one by one, and so are again those that it
// names: it only ever saves work, and can be made anew.

const (
	blockBits = 12
	blockSize = 1 << blockBits // events; a block is those whose index in the log begins with the same bits

	// The rows of a block go into the file a few at a time, so that commits
	// need not wait long.
	termRows = 32 // in one statement
	termRuns = 16 // statements in one transaction

	// A log that has no index yet gets it without taking a whole processor.
	// After an error, such as a full disk, the indexer waits before the next try.
	indexRetry = 5 * time.Second
)

// set is which events of a block have something in common.
type set [blockSize / 64]uint64

func (s *set) add(n int)  { s[n/64] |= 1 << (n % 64) }
func (s *set) and(o *set) { s.each(o, func(a, b uint64) uint64 { return a & b }) }
func (s *set) or(o *set)  { s.each(o, func(a, b uint64) uint64 { return a | b }) }

func (s *set) each(o *set, f func(a, b uint64) uint64) {
	for i := range s {
		s[i] = f(s[i], o[i])
	}
}

func (s *set) len() (n int) {
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

// The forms of a set in the file, told by its first byte.
const (
	formList  = 0 // of its members, 2 bytes each
	formHoles = 1 // the same of what it lacks
	formBits  = 2

	short = blockSize / 16 // members that take no more room than all bits
)

func (s *set) encode(b []byte) []byte {
	n := s.len()
	w := *s
	switch {
	case n < short:
		b = append(b, formList)
	case blockSize-n < short:
		b = append(b, formHoles)
		for i := range w {
			w[i] = ^w[i]
		}
	default:
		b = append(b, formBits)
		for _, v := range w {
			b = binary.BigEndian.AppendUint64(b, v)
		}
		return b
	}
	for i, v := range w {
		for ; v != 0; v &= v - 1 {
			b = binary.BigEndian.AppendUint16(b, uint16(i*64+bits.TrailingZeros64(v))) //nolint:gosec // below blockSize
		}
	}
	return b
}

// encodeSet encodes what add makes of different numbers.
func encodeSet(numbers []uint16) []byte {
	if len(numbers) < short {
		b := make([]byte, 1, 1+2*len(numbers))
		b[0] = formList
		for _, n := range numbers {
			b = binary.BigEndian.AppendUint16(b, n)
		}
		return b
	}
	var s set
	for _, n := range numbers {
		s.add(int(n))
	}
	return s.encode(nil)
}

var errNoSet = errors.New("the index of the activity log has what it was not given")

func (s *set) decode(b []byte) error {
	*s = set{}
	if len(b) == 0 {
		return errNoSet
	}
	form, b := b[0], b[1:]
	switch {
	case form == formBits && len(b) == 8*len(s):
		for i := range s {
			s[i] = binary.BigEndian.Uint64(b[8*i:])
		}
		return nil
	case form > formHoles || len(b)%2 != 0:
		return errNoSet
	}
	for ; len(b) > 0; b = b[2:] {
		n := int(binary.BigEndian.Uint16(b))
		if n >= blockSize {
			return errNoSet
		}
		s.add(n)
	}
	if form == formHoles {
		for i := range s {
			s[i] = ^s[i]
		}
	}
	return nil
}

// block is a set of events of one block, which have the numbers from
// at<<blockBits + 1 on.
type block struct {
	at int64
	set
}

func (b *block) forward() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for i, v := range b.set {
			for ; v != 0; v &= v - 1 {
				if !yield(b.at<<blockBits + int64(i*64+bits.TrailingZeros64(v)) + 1) {
					return
				}
			}
		}
	}
}

func (b *block) backward() iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for i, v := range slices.Backward(b.set[:]) {
			for v != 0 {
				top := 63 - bits.LeadingZeros64(v)
				v &^= 1 << top
				if !yield(b.at<<blockBits + int64(i*64+top) + 1) {
					return
				}
			}
		}
	}
}

// Terms are what the index has rows of: a letter for the column and the value,
// or a hash of it. The hashes of two values can be the same; that costs a look.
const (
	termAll       = "*" // all events of the day in the block, after the times of the first and last
	termAccount   = "c"
	termAction    = "a" // with the action itself, so that prefixes are ranges
	termOutcome   = "o"
	termSeverity  = "s"
	termInitiator = "i"
	termAuthn     = "n"
	termTarget    = "t"
)

func term(column, value string) string {
	if column == termAction {
		return column + value
	}
	h := sha256.Sum256([]byte(value))
	return column + string(h[:8])
}

func termsTable(day int) string {
	return fmt.Sprintf("CREATE TABLE IF NOT EXISTS terms_%d (term BLOB NOT NULL, block INTEGER NOT NULL, events BLOB NOT NULL, PRIMARY KEY (term, block)) WITHOUT ROWID", day)
}

// beginIndex says of a file that has no index yet where it begins: at the end
// of what there is. From there it grows with the log, and backwards.
func (s *Store) beginIndex(ctx context.Context) error {
	size, err := treeSize(ctx, s.write)
	if err != nil {
		return err
	}
	_, err = s.write.ExecContext(ctx, "INSERT INTO indexed (only, low, high) VALUES (1, ?1, ?1) ON CONFLICT DO NOTHING", size>>blockBits)
	return err
}

// indexExtent returns which blocks are in the index, and which days have rows
// in it.
func indexExtent(ctx context.Context, q fullQuerier) (low, high int64, days map[int]bool, err error) {
	days = map[int]bool{}
	names, err := tablesOf(ctx, q, "terms_")
	if err != nil {
		return 0, 0, nil, err
	}
	for _, day := range names {
		days[day] = true
	}
	if len(days) == 0 { // a file of version 3 that is only read has nothing of it
		return 0, 0, days, nil
	}
	err = q.QueryRowContext(ctx, "SELECT low, high FROM indexed").Scan(&low, &high)
	return low, high, days, err
}

// blocks returns which events of a day, with the numbers from first to last,
// the index has for a query, oldest first.
func (f *finder) blocks(ctx context.Context, day int, first, last int64) ([]block, error) {
	low, high := (first-1)>>blockBits, (last-1)>>blockBits
	out, err := f.all(ctx, day, low, high)
	if err != nil {
		return nil, err
	}
	q := &f.q
	for _, c := range []struct{ column, value string }{
		{termAccount, q.AccountID}, {termTarget, q.Target}, {termAuthn, q.Authn}, {termInitiator, q.Initiator}, {termAction, q.Action}, {"prefix", q.ActionPrefix},
		{termSeverity, q.Severity}, {termOutcome, q.Outcome},
	} {
		if len(out) == 0 {
			return nil, nil
		}
		if c.value == "" && (c.column != termAccount || q.AllAccounts) {
			continue
		}
		low, high = out[0].at, out[len(out)-1].at
		where, args := "term = ?", []any{[]byte(term(c.column, c.value))}
		if c.column == "prefix" {
			prefix := termAction + c.value
			after, _ := successor(prefix) // there is one: the letter is not the last
			where, args = "term >= ? AND term < ?", []any{[]byte(prefix), []byte(after)}
		}
		if out, err = f.narrow(ctx, day, out, where+" AND block BETWEEN ? AND ?", append(args, low, high)...); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// all returns the blocks with all of a day's events that can be in the time
// that is asked for.
func (f *finder) all(ctx context.Context, day int, low, high int64) (out []block, err error) {
	since, until := int64(math.MinInt64), int64(math.MaxInt64)
	if !f.q.Since.IsZero() {
		since = f.q.Since.UnixNano()
	}
	if !f.q.Until.IsZero() {
		until = f.q.Until.UnixNano()
	}
	err = f.each(ctx, day, func(at int64, b []byte) error {
		if len(b) < 16 {
			return errNoSet
		}
		earliest, latest := int64(binary.BigEndian.Uint64(b)), int64(binary.BigEndian.Uint64(b[8:])) //nolint:gosec // as they were written
		if latest < since || earliest >= until {
			return nil
		}
		out = append(out, block{at: at})
		return out[len(out)-1].decode(b[16:])
	}, "term = ? AND block BETWEEN ? AND ? ORDER BY block", []byte(termAll), low, high)
	return out, err
}

// narrow leaves in blocks the events that some rows of the index have.
func (f *finder) narrow(ctx context.Context, day int, blocks []block, where string, args ...any) ([]block, error) {
	have := make([]set, len(blocks))
	err := f.each(ctx, day, func(at int64, b []byte) error {
		i, ok := slices.BinarySearchFunc(blocks, at, func(b block, at int64) int { return int(b.at - at) })
		if !ok {
			return nil
		}
		var s set
		if err := s.decode(b); err != nil {
			return err
		}
		have[i].or(&s)
		return nil
	}, where, args...)
	if err != nil {
		return nil, err
	}
	out := blocks[:0]
	for i := range blocks {
		b := blocks[i]
		if b.and(&have[i]); b.set != (set{}) {
			out = append(out, b)
		}
	}
	return out, nil
}

// each calls g for rows of a day's index.
func (f *finder) each(ctx context.Context, day int, g func(at int64, b []byte) error, where string, args ...any) (err error) {
	rows, err := f.tx.QueryContext(ctx, fmt.Sprintf("SELECT block, events FROM terms_%d WHERE %s", day, where), args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var at int64
		var b sql.RawBytes
		if err := rows.Scan(&at, &b); err != nil {
			return err
		}
		if err := g(at, b); err != nil {
			return err
		}
	}
	return rows.Err()
}

// indexer keeps the index up with the log.
type indexer struct {
	stop chan struct{} // nil if there is none
	once sync.Once
	done sync.WaitGroup
}

func (s *Store) startIndexer() {
	s.indexer.stop = make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	s.indexer.done.Go(func() {
		<-s.indexer.stop
		cancel()
	})
	s.indexer.done.Go(func() {
		for {
			more := s.Grown()
			pause, err := s.indexNext(ctx)
			if err != nil {
				more, pause = nil, indexRetry
			}
			var wait <-chan time.Time
			if pause > 0 {
				more, wait = nil, time.After(pause)
			}
			select {
			case <-ctx.Done():
				return
			case <-more:
			case <-wait:
			}
		}
	})
}

func (s *Store) stopIndexer() {
	if s.indexer.stop == nil {
		return
	}
	s.indexer.once.Do(func() { close(s.indexer.stop) })
	s.indexer.done.Wait()
}

// indexNext puts a block into the index, if there is one to put: the next
// complete one, or else the one before the first. It returns how long to wait
// until the next try, and 0 for until the log has grown.
func (s *Store) indexNext(ctx context.Context) (pause time.Duration, err error) {
	if s.frugal.Load() {
		return indexRetry, nil
	}
	s.mu.Lock()
	size := s.edge.Size()
	s.mu.Unlock()
	var low, high int64
	if err := s.read.QueryRowContext(ctx, "SELECT low, high FROM indexed").Scan(&low, &high); err != nil {
		return 0, err
	}
	start := time.Now()
	switch {
	case high < size>>blockBits:
		return time.Nanosecond, s.indexBlock(ctx, high, "UPDATE indexed SET high = ?", high+1)
	case low > 0:
		err := s.indexBlock(ctx, low-1, "UPDATE indexed SET low = ?", low-1)
		return max(time.Since(start), time.Nanosecond), err
	}
	return 0, nil
}

// recent are the last events that were committed, without their documents: the
// indexer need not read again what has just been written.
type recent struct {
	first  int64 // index of the first one
	events []store.Event
}

// recentMost bounds them. An indexer that is further behind reads the file.
const recentMost = 4 * blockSize

// remember keeps committed events for the indexer; size is the log's with them.
// The store's mutex is held.
func (s *Store) remember(size int64, events []store.Event) {
	r := &s.recent
	if s.indexer.stop == nil || len(events) == 0 {
		return
	}
	if len(r.events)+len(events) > recentMost {
		r.events = nil
	}
	if len(r.events) == 0 {
		r.first = size - int64(len(events))
	}
	for _, e := range events {
		e.Doc = nil
		r.events = append(r.events, e)
	}
}

// remembered returns the events of a block, if all of them are there, and
// forgets them.
func (s *Store) remembered(at int64) []store.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &s.recent
	from := at<<blockBits - r.first
	to := from + blockSize
	if from < 0 || to > int64(len(r.events)) {
		return nil
	}
	block := r.events[from:to]
	r.first, r.events = r.first+to, slices.Clone(r.events[to:])
	return block
}

// indexBlock puts a complete block into the index, and then moves the mark.
// Half of one that a crash leaves is not believed, and written again.
func (s *Store) indexBlock(ctx context.Context, at int64, mark string, to int64) error {
	days := blockTerms{}
	if events := s.remembered(at); events != nil {
		for i := range events {
			days.add(i, &events[i])
		}
	} else if err := s.readBlock(ctx, at, days); err != nil {
		return fmt.Errorf("read the events from %d on: %w", at<<blockBits, err)
	}
	for day, terms := range days {
		for rows := range slices.Chunk(terms.rows(), termRows*termRuns) {
			if err := s.writeTerms(ctx, day, at, rows); err != nil {
				return fmt.Errorf("index the events of %d: %w", day, err)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	_, err := s.write.ExecContext(ctx, mark, to)
	return err
}

// blockTerms are the terms of a block's events, by their days.
type blockTerms map[int]*dayTerms

type dayTerms struct {
	all              set
	earliest, latest int64
	columns          [len(termColumns)]map[string][]uint16
}

var termColumns = [...]string{termAccount, termAction, termOutcome, termSeverity, termInitiator, termAuthn, termTarget}

// add takes in the event with a number in its block.
func (b blockTerms) add(n int, e *store.Event) {
	day := store.Day(e.Time)
	d := b[day]
	if d == nil {
		d = &dayTerms{earliest: math.MaxInt64, latest: math.MinInt64}
		for i := range d.columns {
			d.columns[i] = map[string][]uint16{}
		}
		b[day] = d
	}
	d.all.add(n)
	nanos := e.Time.UnixNano()
	d.earliest, d.latest = min(d.earliest, nanos), max(d.latest, nanos)
	for i, v := range [len(termColumns)]string{e.AccountID, e.Action, e.Outcome, e.Severity, e.Initiator, e.Authn, e.Target} {
		if v != "" || i == 0 { // events of no account can be asked for, too
			d.columns[i][v] = append(d.columns[i][v], uint16(n)) //nolint:gosec // below blockSize
		}
	}
}

type termRow struct {
	term   string
	events []byte
}

// rows returns the rows of the index in the order of the table, in which they
// touch the fewest pages.
func (d *dayTerms) rows() []termRow {
	times := binary.BigEndian.AppendUint64(nil, uint64(d.earliest)) //nolint:gosec // read the same way
	times = binary.BigEndian.AppendUint64(times, uint64(d.latest))  //nolint:gosec // read the same way
	out := []termRow{{term: termAll, events: d.all.encode(times)}}
	for i, column := range termColumns {
		for value, numbers := range d.columns[i] {
			out = append(out, termRow{term: term(column, value), events: encodeSet(numbers)})
		}
	}
	slices.SortFunc(out, func(a, b termRow) int { return strings.Compare(a.term, b.term) })
	return out
}

// readBlock takes in a block's events from the file.
func (s *Store) readBlock(ctx context.Context, at int64, into blockTerms) (err error) {
	tx, err := s.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	days, err := daysOf(ctx, tx)
	if err != nil {
		return err
	}
	for _, d := range days {
		if d.Last>>blockBits < at || d.First>>blockBits > at {
			continue
		}
		if err := readBlockOf(ctx, tx, d.Day, at, into); err != nil {
			return err
		}
	}
	return nil
}

func readBlockOf(ctx context.Context, tx querier, day int, at int64, into blockTerms) (err error) {
	rows, err := tx.QueryContext(ctx, fmt.Sprintf("SELECT seq, time, account, action, outcome, severity, initiator, authn, target FROM events_%d "+
		"WHERE seq > ? AND seq <= ?", day), at<<blockBits, (at+1)<<blockBits)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var e store.Event
		var seq, nanos int64
		if err := rows.Scan(&seq, &nanos, &e.AccountID, &e.Action, &e.Outcome, &e.Severity, &e.Initiator, &e.Authn, &e.Target); err != nil {
			return err
		}
		e.Time = time.Unix(0, nanos)
		into.add(int(seq-1)&(blockSize-1), &e)
	}
	return rows.Err()
}

func (s *Store) writeTerms(ctx context.Context, day int, at int64, part []termRow) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.check(); err != nil {
		return err
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	// The day may have been dropped since its events were read.
	var there int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM sqlite_master WHERE name = ?", fmt.Sprintf("events_%d", day)).Scan(&there); err != nil {
		return err
	}
	if there == 0 {
		return tx.Rollback()
	}
	if _, err := tx.ExecContext(ctx, termsTable(day)); err != nil {
		return err
	}
	for rows := range slices.Chunk(part, termRows) {
		args := make([]any, 0, 3*len(rows))
		for _, r := range rows {
			args = append(args, []byte(r.term), at, r.events)
		}
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("INSERT OR REPLACE INTO terms_%d (term, block, events) VALUES ", day)+
			"(?, ?, ?)"+strings.Repeat(", (?, ?, ?)", len(rows)-1), args...); err != nil {
			return err
		}
	}
	return tx.Commit()
}

var _ store.Store = (*Store)(nil)
