package export

import (
	"context"
	"fmt"
	"slices"
	"sort"

	"tabard.dev/tabard/internal/store"
)

// Log is the part of the activity log that exports follow.
type Log interface {
	Extent(ctx context.Context) (store.Extent, error)
	Entries(ctx context.Context, from int64, limit int) ([]store.Entry, error)
	Grown() <-chan struct{}
}

// Bounds on what a feed keeps.
const (
	feedEntries = 4096
	feedBytes   = 8 << 20
)

// feed reads the log once for all routes that are near its end: it keeps the
// newest entries that were read. A route that is further behind reads for
// itself, and disturbs nobody.
type feed struct {
	log Log

	turn  chan struct{} // holds one token: the right to look at what follows
	from  int64         // every entry of [from, next) that the log has is kept
	next  int64
	kept  []store.Entry
	bytes int
}

func newFeed(log Log) *feed {
	f := &feed{log: log, turn: make(chan struct{}, 1)}
	f.turn <- struct{}{}
	return f
}

// read returns entries from an index on, at most limit of them, but for those
// that share an index. What it returns is shared, and not to be changed.
func (f *feed) read(ctx context.Context, from int64, limit int) ([]store.Entry, error) {
	select {
	case <-f.turn:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if from < f.from {
		f.turn <- struct{}{}
		return f.entries(ctx, from, limit)
	}
	defer func() { f.turn <- struct{}{} }()
	if from < f.next {
		return f.cached(from, limit), nil
	}
	if from > f.next {
		f.from, f.next, f.kept, f.bytes = from, from, nil, 0
	}
	fresh, err := f.entries(ctx, from, limit)
	if err != nil || len(fresh) == 0 {
		return nil, err
	}
	f.keep(fresh)
	return fresh, nil
}

func (f *feed) entries(ctx context.Context, from int64, limit int) ([]store.Entry, error) {
	entries, err := f.log.Entries(ctx, from, limit)
	if err != nil {
		return nil, fmt.Errorf("read the activity log from %d on: %w", from, err)
	}
	return entries, nil
}

func (f *feed) cached(from int64, limit int) []store.Entry {
	first := sort.Search(len(f.kept), func(i int) bool { return f.kept[i].Index >= from })
	end := min(first+limit, len(f.kept))
	for end > first && end < len(f.kept) && f.kept[end].Index == f.kept[end-1].Index {
		end++
	}
	return f.kept[first:end:end]
}

// keep appends what was read at the end, and lets go of the oldest.
func (f *feed) keep(fresh []store.Entry) {
	f.kept = append(f.kept, fresh...)
	for i := range fresh {
		f.bytes += len(fresh[i].Doc)
	}
	f.next = fresh[len(fresh)-1].Index + 1
	if len(f.kept) <= feedEntries+feedEntries/4 && f.bytes <= feedBytes+feedBytes/4 {
		return // so that not every read copies all
	}
	gone := 0
	for gone < len(f.kept) && (len(f.kept)-gone > feedEntries || f.bytes > feedBytes) {
		f.bytes -= len(f.kept[gone].Doc)
		f.from = f.kept[gone].Index + 1
		gone++
	}
	// Entries that share an index go together.
	for gone > 0 && gone < len(f.kept) && f.kept[gone].Index < f.from {
		f.bytes -= len(f.kept[gone].Doc)
		gone++
	}
	if gone > 0 {
		f.kept = slices.Clone(f.kept[gone:]) // a copy lets the memory of the old ones go
	}
}
