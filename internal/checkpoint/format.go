package checkpoint

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

// Source is a log as it is kept somewhere.
type Source interface {
	tlog.HashReader
	Extent(ctx context.Context) (store.Extent, error)
	Entries(ctx context.Context, from int64, limit int) ([]store.Entry, error)
	Dropped(ctx context.Context) ([]store.DroppedDay, error)
	Checkpoints(ctx context.Context, atLeast, atMost int64, limit int) ([]store.Checkpoint, error)
}

// Header is what must be known of a log before its events are read.
type Header struct {
	Key     string      `json:"key"`   // verifier key
	Size    int64       `json:"size"`  // of the tree
	Start   int64       `json:"start"` // the index of the first event that is not dropped
	Edge    []tlog.Hash `json:"edge"`  // of the tree of the dropped events
	Dropped []Dropped   `json:"dropped,omitempty"`
}

// Dropped is a day that was removed as a whole: see [store.DroppedDay].
type Dropped struct {
	Day   int    `json:"day"`
	First int64  `json:"first"`
	Last  int64  `json:"last"`
	Left  int64  `json:"left"`
	Holes []Hole `json:"holes,omitempty"`
}

// Hole is an event that was dropped though earlier ones are left, and the hash
// of its document.
type Hole struct {
	Index int64     `json:"index"`
	Hash  tlog.Hash `json:"hash"`
}

// Item is one line of a log: exactly one of its fields is set.
type Item struct {
	Header     *Header
	Entry      *Entry
	Checkpoint []byte // a signed note, after the last event that it speaks of
}

// Entry is an event with the hashes that the tree stores for it: that of its
// document, and those of the subtrees that it completes. They are missing when
// the tree does not have them.
type Entry struct {
	store.Entry
	Hashes []tlog.Hash
}

// line is an item as JSON. The document stands in it byte for byte; one that is
// not JSON, which only a changed log has, stands in Raw.
type line struct {
	Log        *Header         `json:"log,omitempty"`
	Index      *int64          `json:"index,omitempty"`
	Day        int             `json:"day,omitempty"`
	Time       time.Time       `json:"time,omitzero"`
	Account    string          `json:"account,omitempty"`
	Correlated string          `json:"correlation,omitempty"`
	Action     string          `json:"action,omitempty"`
	Outcome    string          `json:"outcome,omitempty"`
	Severity   string          `json:"severity,omitempty"`
	Initiator  string          `json:"initiator,omitempty"`
	Authn      string          `json:"authn,omitempty"`
	Target     string          `json:"target,omitempty"`
	Changed    string          `json:"changed,omitempty"`
	Hashes     []tlog.Hash     `json:"hashes,omitempty"`
	Event      json.RawMessage `json:"event,omitempty"`
	Raw        []byte          `json:"raw,omitempty"`
	Checkpoint string          `json:"checkpoint,omitempty"`
}

// batch is how many events are read at a time.
const batch = 500

// ReadHeader returns the header of a log whose checkpoints a key verifies.
func ReadHeader(ctx context.Context, s Source, key string) (*Header, error) {
	extent, err := s.Extent(ctx)
	if err != nil {
		return nil, err
	}
	h := &Header{Key: key, Size: extent.Size}
	days, err := s.Dropped(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range days {
		h.Start = max(h.Start, d.Left)
	}
	for _, d := range days {
		gone := Dropped{Day: d.Day, First: d.First, Last: d.Last, Left: d.Left}
		for _, n := range d.Holes {
			if n < h.Start {
				continue
			}
			hash, err := s.ReadHashes([]int64{tlog.StoredHashIndex(0, n)})
			if err != nil {
				return nil, fmt.Errorf("the tree of the dropped event %d: %w", n, err)
			}
			gone.Holes = append(gone.Holes, Hole{n, hash[0]})
		}
		h.Dropped = append(h.Dropped, gone)
	}
	if positions := merkle.Indexes(h.Start); len(positions) > 0 {
		if h.Edge, err = s.ReadHashes(positions); err != nil {
			return nil, fmt.Errorf("the tree of the %d events that were dropped: %w", h.Start, err)
		}
	}
	return h, nil
}

// Range is what to read of a log.
type Range struct {
	From, To int64 // indexes; To is exclusive, and bounds what checkpoints speak of
	Limit    int   // events at most
	Every    bool  // all checkpoints that are kept, instead of one for each batch
}

// All is the whole of a log, with what a changed one has outside its tree.
func All() Range {
	return Range{From: math.MinInt64, To: math.MaxInt64, Limit: math.MaxInt, Every: true}
}

// Items returns events and checkpoints, in order, without a header.
func Items(ctx context.Context, s Source, r Range) iter.Seq2[Item, error] {
	from, limit := r.From, r.Limit
	return func(yield func(Item, error) bool) {
		below := max(from, 0)
		for limit > 0 {
			entries, err := s.Entries(ctx, from, min(limit, batch))
			if err != nil {
				yield(Item{}, err)
				return
			}
			above, most := r.To, 1
			if r.Every {
				most = math.MaxInt32
			}
			read := len(entries)
			entries = slices.DeleteFunc(entries, func(e store.Entry) bool { return e.Index >= r.To })
			end := read < min(limit, batch) || len(entries) < read
			if !end {
				above = max(below, entries[len(entries)-1].Index+1)
				from = entries[len(entries)-1].Index + 1
			}
			notes, err := s.Checkpoints(ctx, below+1, above, most)
			if err != nil {
				yield(Item{}, err)
				return
			}
			next := func(upTo int64) bool { // the checkpoints of trees of up to a size
				for len(notes) > 0 && notes[len(notes)-1].Size <= upTo {
					if !yield(Item{Checkpoint: notes[len(notes)-1].Note}, nil) {
						return false
					}
					notes = notes[:len(notes)-1]
				}
				return true
			}
			for _, e := range entries {
				if !next(e.Index) || !yield(Item{Entry: &Entry{Entry: e, Hashes: hashesOf(s, e.Index)}}, nil) {
					return
				}
			}
			// At the end comes, too, what was signed for more than there is.
			if !next(above) || end {
				return
			}
			below = above
			limit -= len(entries)
		}
	}
}

// hashesOf returns the hashes that are stored for an event, nil when they are
// not all there.
func hashesOf(r tlog.HashReader, index int64) []tlog.Hash {
	if index < 0 {
		return nil
	}
	first, next := tlog.StoredHashCount(index), tlog.StoredHashCount(index+1)
	positions := make([]int64, 0, 4)
	for p := first; p < next; p++ {
		positions = append(positions, p)
	}
	hashes, err := r.ReadHashes(positions)
	if err != nil {
		return nil
	}
	return hashes
}

// Write writes items as lines of JSON.
func Write(w io.Writer, items ...Item) error {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false) // the document must stay as it is
	for _, i := range items {
		l := line{Log: i.Header, Checkpoint: string(i.Checkpoint)}
		if e := i.Entry; e != nil {
			l = line{
				Index: &e.Index, Day: e.Day, Time: e.Time, Account: e.AccountID, Correlated: e.CorrelationID, Action: e.Action, Outcome: e.Outcome,
				Severity: e.Severity, Initiator: e.Initiator, Authn: e.Authn, Target: e.Target, Changed: e.Changed, Hashes: e.Hashes,
			}
			if compact(e.Doc) {
				l.Event = e.Doc
			} else {
				l.Raw = e.Doc
			}
		}
		if err := enc.Encode(l); err != nil {
			return fmt.Errorf("write a line of the log: %w", err)
		}
	}
	_, err := w.Write(buf.Bytes())
	return err
}

// compact reports whether a document is JSON that an encoder leaves as it is.
func compact(doc []byte) bool {
	var buf bytes.Buffer
	return json.Compact(&buf, doc) == nil && bytes.Equal(buf.Bytes(), doc)
}

// maxLine bounds a line of a log that is read, in bytes.
const maxLine = 4 << 20

// Read returns the items of lines that Write wrote.
func Read(r io.Reader) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		lines := bufio.NewScanner(r)
		lines.Buffer(make([]byte, 64<<10), maxLine)
		for n := 1; lines.Scan(); n++ {
			item, err := parseLine(lines.Bytes())
			if err != nil {
				err = fmt.Errorf("line %d is not one of an exported activity log: %w", n, err)
			}
			if !yield(item, err) || err != nil {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(Item{}, fmt.Errorf("read the log: %w", err))
		}
	}
}

func parseLine(b []byte) (Item, error) {
	var l line
	if err := json.Unmarshal(b, &l); err != nil {
		return Item{}, err
	}
	switch {
	case l.Log != nil:
		return Item{Header: l.Log}, nil
	case l.Checkpoint != "":
		return Item{Checkpoint: []byte(l.Checkpoint)}, nil
	case l.Index == nil:
		return Item{}, errors.New("it has neither an event nor a checkpoint")
	}
	doc := []byte(l.Event)
	if l.Event == nil {
		doc = l.Raw
	}
	return Item{Entry: &Entry{Hashes: l.Hashes, Entry: store.Entry{Index: *l.Index, Day: l.Day, Event: store.Event{
		Time: l.Time, AccountID: l.Account, CorrelationID: l.Correlated, Action: l.Action, Outcome: l.Outcome, Severity: l.Severity,
		Initiator: l.Initiator, Authn: l.Authn, Target: l.Target, Changed: l.Changed, Doc: doc,
	}}}}, nil
}

// WithHeader returns the items of a log with its header before them.
func WithHeader(h *Header, items iter.Seq2[Item, error]) iter.Seq2[Item, error] {
	return func(yield func(Item, error) bool) {
		if yield(Item{Header: h}, nil) {
			items(yield)
		}
	}
}
