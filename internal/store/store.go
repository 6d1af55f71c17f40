// Package store says how objects and activity events are kept: what every
// implementation promises, and no more. The conformance suite in storetest
// holds each of them to it.
package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/activity"
)

// Store keeps objects as documents under (kind, id) and activity events in the
// order of their commits. Its methods may be called from several goroutines.
type Store interface {
	// Load calls f for every object. It stops at f's first error.
	Load(ctx context.Context, f func(Record) error) error

	// Commit makes all of a batch durable, or nothing of it. It returns after
	// the batch is on stable storage. Errors: ErrStale when an object does not
	// have the expected revision, a *TakenError when a unique key belongs to
	// another object.
	Commit(ctx context.Context, b Batch) error

	// Events returns the events that a query asks for, newest first, however
	// long that takes.
	Events(ctx context.Context, q Query) ([]StoredEvent, error)

	// Search is Events for whoever asks from outside: it looks at a bounded
	// number of events. Whatever the query, pages that follow each other by
	// Found.Next have each event once, also while events come and days go.
	Search(ctx context.Context, q Query) (Found, error)

	// Follow returns the events that a query asks for in the order of the log,
	// from an index on, limit at most, and the index to go on from. It looks at
	// a bounded number of events, and goes on from the log's end when there is
	// nothing else. The query's Before and Limit say nothing here.
	Follow(ctx context.Context, q Query, from int64, limit int) (events []StoredEvent, next int64, err error)

	Log

	// Close releases the store. Commits under way finish first.
	Close() error
}

// Log is the activity log as one sequence. Events have indexes from 0 in the
// order of their commits; the hashes of a Merkle tree over their documents are
// made durable together with them.
type Log interface {
	tlog.HashReader // of the tree's stored hashes; an error for those of dropped events

	// Extent returns what the log has.
	Extent(ctx context.Context) (Extent, error)

	// Entries returns events in the order of the log, from an index on, limit
	// at most. Indexes of dropped events are passed over. Events that share an
	// index, which only a changed log has, come together, beyond the limit if
	// need be.
	Entries(ctx context.Context, from int64, limit int) ([]Entry, error)

	// Grown returns a channel that is closed when a commit has brought events.
	// Who follows the log gets it before he reads, so that he misses none.
	Grown() <-chan struct{}

	// Days returns the days that there are events of, oldest first.
	Days(ctx context.Context) ([]DayInfo, error)

	// DropDay removes the events of a day, together with a batch that records
	// it. The hashes that later proofs need stay. Once the batch is durable the
	// day is gone for every reader; what it took is then freed little by little,
	// between other writers' turns. Ended before that, the next DropDay or
	// Reclaim goes on.
	DropDay(ctx context.Context, day int, b Batch) error

	// Reclaim frees what a DropDay that was interrupted left.
	Reclaim(ctx context.Context) error
	// Dropped returns the days that were dropped, oldest first.
	Dropped(ctx context.Context) ([]DroppedDay, error)

	// KeepCheckpoint makes a signed checkpoint durable; Checkpoints returns the
	// newest ones first, those of trees of at least and at most a size.
	KeepCheckpoint(ctx context.Context, c Checkpoint) error
	Checkpoints(ctx context.Context, atLeast, atMost int64, limit int) ([]Checkpoint, error)

	// ThinCheckpoints removes checkpoints made before a time, but for the last
	// one of each period.
	ThinCheckpoints(ctx context.Context, before time.Time, period time.Duration) error
}

// Extent is what a log has: Size events were ever committed, and those from
// index First on are there, but for some of days that were dropped.
type Extent struct {
	First, Size int64
	Bytes       int64 // that the whole store takes on disk,
	Free        int64 // and how many of them are free inside it, to be used again
}

// Entry is an event with its place in the log.
type Entry struct {
	Index int64
	Day   int
	Event
}

// DayInfo is what is there of a UTC day.
type DayInfo struct {
	Day         int // yyyymmdd
	First, Last int64
	Events      int64
}

// DroppedDay is a day that was removed as a whole. Left is the index of the
// first event that was left then, or the log's size if none was; Holes are the
// indexes of the day's events that lie after it.
type DroppedDay struct {
	DayInfo
	At    time.Time
	Left  int64
	Holes []int64
}

// Checkpoint is a signed statement of the tree's size and root hash.
type Checkpoint struct {
	Size int64
	Time time.Time
	Note []byte // golang.org/x/mod/sumdb/note
}

// Record is an object as it is kept.
type Record struct {
	Kind, ID string
	Revision int64
	Doc      []byte
}

// Batch is a set of changes and the events that belong to them.
type Batch struct {
	Puts    []Put
	Deletes []Delete
	Events  []Event
}

// Put writes an object. Expect is the revision it must have now; zero means
// that it must not exist. Unique are the keys that no other object may hold.
type Put struct {
	Record
	Expect int64
	Unique []string
}

// Delete removes an object that has the expected revision.
type Delete struct {
	Kind, ID string
	Expect   int64
}

// Event is an activity event ready to be written: the document, and the few
// values that queries look up.
type Event struct {
	Time          time.Time
	AccountID     string
	CorrelationID string
	Action        string
	Outcome       string
	Severity      string
	Initiator     string // ids of the initiator,
	Authn         string // of the identity that put the initiator's profile on,
	Target        string // and of the target

	// Changed is the CRN of the object that was changed together with the
	// event, or "" for an event that records no change.
	Changed string
	Doc     []byte
}

// NewEvent encodes an activity event.
func NewEvent(e *activity.Event) (Event, error) {
	e.Bound()
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false) // one byte of a caller's must not become six
	if err := enc.Encode(e); err != nil {
		return Event{}, fmt.Errorf("encode activity event %s: %w", e.Action, err)
	}
	return Event{
		Time: e.Time.Time, AccountID: e.AccountID, CorrelationID: e.CorrelationID,
		Action: e.Action, Outcome: e.Outcome, Severity: e.Severity,
		Initiator: e.Initiator.ID, Authn: e.Initiator.AuthnID, Target: e.Target.ID, Doc: bytes.TrimSuffix(buf.Bytes(), []byte("\n")),
	}, nil
}

// StoredEvent is an event with its place in the log. Time is the exact one,
// which the document rounds.
type StoredEvent struct {
	Position Position
	Time     time.Time
	Doc      json.RawMessage
}

// Query selects events of one account, newest first. Empty fields select all;
// an empty AccountID selects the events that belong to no account, unless
// AllAccounts is set. Before continues after the last event of the page before.
type Query struct {
	AccountID     string
	AllAccounts   bool
	CorrelationID string
	Action        string
	ActionPrefix  string // matches the actions that begin with it
	Outcome       string
	Severity      string
	Initiator     string // ids, as in Event
	Authn         string
	Target        string
	Changed       string    // the object that the events changed
	Since, Until  time.Time // Since inclusive, Until exclusive
	Before        Position
	Limit         int // at least 1
}

// Matches reports whether the query asks for an event; it leaves Before out.
func (q *Query) Matches(e *Event) bool {
	return (q.AllAccounts || q.AccountID == e.AccountID) &&
		(q.CorrelationID == "" || q.CorrelationID == e.CorrelationID) &&
		(q.Action == "" || q.Action == e.Action) && strings.HasPrefix(e.Action, q.ActionPrefix) &&
		(q.Outcome == "" || q.Outcome == e.Outcome) &&
		(q.Severity == "" || q.Severity == e.Severity) &&
		(q.Initiator == "" || q.Initiator == e.Initiator) &&
		(q.Authn == "" || q.Authn == e.Authn) &&
		(q.Target == "" || q.Target == e.Target) &&
		(q.Changed == "" || q.Changed == e.Changed) &&
		(q.Since.IsZero() || !e.Time.Before(q.Since)) && (q.Until.IsZero() || e.Time.Before(q.Until))
}

// Found is what a search has found. Next, unless it is zero, is the Before of
// the search that goes on after it: there may be more, also when Events are
// fewer than were asked for.
type Found struct {
	Events []StoredEvent
	Next   Position
}

// Position is an event's place in the log: its UTC day as yyyymmdd, and its
// index in the whole log plus one.
type Position struct {
	Day int
	Seq int64
}

// IsZero reports whether p names no place.
func (p Position) IsZero() bool { return p == Position{} }

func (p Position) String() string { return fmt.Sprintf("%d-%d", p.Day, p.Seq) }

// ParsePosition reads what String wrote.
func ParsePosition(s string) (Position, error) {
	day, seq, ok := strings.Cut(s, "-")
	d, err := strconv.Atoi(day)
	n, err2 := strconv.ParseInt(seq, 10, 64)
	if !ok || err != nil || err2 != nil || d < 1 || n < 1 {
		return Position{}, fmt.Errorf("%q is not a position in the activity log", s)
	}
	return Position{Day: d, Seq: n}, nil
}

// Day returns the UTC day of a time as yyyymmdd.
func Day(t time.Time) int {
	y, m, d := t.UTC().Date()
	return y*10000 + int(m)*100 + d
}

// ErrStale means that an object does not have the revision that a batch
// expected.
var ErrStale = errors.New("object has another revision")

// TakenError means that a unique key belongs to another object.
type TakenError struct{ Key string }

func (e *TakenError) Error() string { return "unique key is taken: " + e.Key }
