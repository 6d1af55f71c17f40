package sqlite

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"

	"tabard.dev/tabard/internal/store"
)

// IndexError says that the index of the activity log does not have what its
// events have, so that searches miss some of them, or look in vain.
type IndexError struct {
	First int64 // index of the first event that may be missed
	Day   int
}

func (e *IndexError) Error() string {
	return fmt.Sprintf("the search index of day %d is not that of its events", e.Day)
}

// CheckIndex makes the index of the activity log anew, in memory, and compares
// it with the one that there is. It returns an *IndexError for the first day on
// which they differ. No event that the index does not claim to have is looked
// at: those are found without it.
func (s *Store) CheckIndex(ctx context.Context) error {
	low, high, _, err := indexExtent(ctx, s.read)
	if err != nil {
		return fmt.Errorf("read the extent of the search index: %w", err)
	}
	days, err := s.Days(ctx)
	if err != nil {
		return err
	}
	for _, d := range days {
		if err := s.checkIndexOf(ctx, d, max(low, d.First>>blockBits), min(high, d.Last>>blockBits+1)); err != nil {
			return fmt.Errorf("check the search index of %d: %w", d.Day, err)
		}
	}
	return nil
}

type termBlock struct {
	term string
	at   int64
}

// checkIndexOf compares the rows of a day's blocks from low on and below high.
func (s *Store) checkIndexOf(ctx context.Context, d store.DayInfo, low, high int64) error {
	seed := maphash.MakeSeed()
	want := map[termBlock]uint64{} // hashes of rows
	for at := low; at < high; at++ {
		block := blockTerms{}
		if err := readBlockOf(ctx, s.read, d.Day, at, block); err != nil {
			return err
		}
		terms := block[d.Day]
		if terms == nil {
			continue
		}
		for _, r := range terms.rows() {
			want[termBlock{r.term, at}] = maphash.Bytes(seed, r.events)
		}
	}
	if len(want) == 0 {
		return nil
	}
	bad := int64(-1)
	found := func(at int64) {
		if bad < 0 || at < bad {
			bad = at
		}
	}
	if err := s.eachTerm(ctx, d.Day, low, high, func(t termBlock, events []byte) {
		if h, ok := want[t]; !ok || h != maphash.Bytes(seed, events) {
			found(t.at)
		}
		delete(want, t)
	}); err != nil {
		return err
	}
	for t := range want {
		found(t.at)
	}
	if bad >= 0 {
		return &IndexError{First: max(bad<<blockBits, d.First), Day: d.Day}
	}
	return nil
}

// eachTerm calls f for the rows of a day's blocks, if the day has an index.
func (s *Store) eachTerm(ctx context.Context, day int, low, high int64, f func(t termBlock, events []byte)) (err error) {
	tables, err := tablesOf(ctx, s.read, "terms_")
	if err != nil || !slices.Contains(tables, day) {
		return err
	}
	rows, err := s.read.QueryContext(ctx, fmt.Sprintf("SELECT term, block, events FROM terms_%d WHERE block >= ? AND block < ?", day), low, high)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var term, events []byte
		var at int64
		if err := rows.Scan(&term, &at, &events); err != nil {
			return err
		}
		f(termBlock{string(term), at}, events)
	}
	return rows.Err()
}
