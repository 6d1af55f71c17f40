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

	// Events returns the events that a query asks for, newest first.
	Events(ctx context.Context, q Query) ([]StoredEvent, error)

	// Close releases the store. Commits under way finish first.
	Close() error
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
		Action: e.Action, Outcome: e.Outcome, Doc: bytes.TrimSuffix(buf.Bytes(), []byte("\n")),
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
	Outcome       string
	Changed       string    // the object that the events changed
	Since, Until  time.Time // Since inclusive, Until exclusive
	Before        Position
	Limit         int // at least 1
}

// Position is an event's place in the log: its UTC day as yyyymmdd and its
// number within the day. Positions grow in the order of commits within a day.
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
