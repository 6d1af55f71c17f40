package retention

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/store"
)

// LogStore is the part of a store that the log's retention works on.
type LogStore interface {
	Days(ctx context.Context) ([]store.DayInfo, error)
	Extent(ctx context.Context) (store.Extent, error)
	DropDay(ctx context.Context, day int, b store.Batch) error
	Reclaim(ctx context.Context) error
	Shrink(ctx context.Context, keep int64) error
}

// Log drops the oldest days of the activity log, each as a whole, when they are
// older or the log is larger than what is kept. Today and yesterday are never
// dropped: around midnight both still get events.
type Log struct {
	Store    LogStore
	MaxDays  int   // 0 keeps all
	MaxBytes int64 // that the store uses, without what is free in its file; 0 keeps all

	// Sign has a checkpoint signed of all that there is, and returns the newest
	// one: it covers the day that is dropped next.
	Sign func(ctx context.Context) (store.Checkpoint, error)
	// NeededFrom returns the lowest index that an export has still to deliver;
	// nil when there are no exports. A day that has it, or a later one, is dropped
	// only when space is short.
	NeededFrom func() int64
	// Pressed reports whether space is short.
	Pressed func() bool

	OperatorAccount string
	Names           crn.Names
	Now             func() time.Time
	Log             *slog.Logger
	Every           time.Duration // between two sweeps; 0 means a minute

	waited int // the day that an export kept from being dropped, told once
}

// Why a day was dropped.
const (
	overDays  = "days"
	overBytes = "bytes"
)

// Drop is the response data of the event of a dropped day.
type Drop struct {
	checkpoint.DropRecord
	Events int64  `json:"events"` // at most, before it was dropped
	Reason string `json:"reason"` // days or bytes: which bound it was over
	// Undelivered events went with it that an export still needed, at most.
	Undelivered int64 `json:"undelivered,omitempty"`
	// Checkpoint is one that was signed before, of the day and what came before.
	Checkpoint string `json:"checkpoint,omitempty"`
}

// Run sweeps until the context ends.
func (l *Log) Run(ctx context.Context) {
	every := l.Every
	if every == 0 {
		every = time.Minute
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if err := l.Sweep(ctx); err != nil && ctx.Err() == nil {
			l.Log.Warn("old days of the activity log could not be dropped; it is tried again", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Sweep drops what is due, and gives space back to the disk that is not going to
// be used again soon.
func (l *Log) Sweep(ctx context.Context) error {
	// What a drop left that did not come to its end.
	if err := l.Store.Reclaim(ctx); err != nil {
		return err
	}
	for {
		dropped, err := l.dropOldest(ctx)
		if err != nil {
			return err
		}
		if !dropped {
			break
		}
	}
	return l.shrink(ctx)
}

func (l *Log) dropOldest(ctx context.Context) (dropped bool, err error) {
	if l.MaxDays <= 0 && l.MaxBytes <= 0 {
		return false, nil
	}
	days, err := l.Store.Days(ctx)
	if err != nil || len(days) == 0 {
		return false, err
	}
	oldest, now := days[0], l.Now()
	reason, err := l.due(ctx, oldest, now)
	if err != nil || reason == "" {
		return false, err
	}
	var undelivered int64
	if l.NeededFrom != nil {
		undelivered = oldest.Last - max(l.NeededFrom(), oldest.First) + 1
	}
	if undelivered > 0 && !l.Pressed() {
		if l.waited != oldest.Day {
			l.waited = oldest.Day
			l.Log.Warn("a day of the activity log is kept longer, because an export has not delivered it; see: tabard activity routes",
				"day", oldest.Day, "undelivered", undelivered)
		}
		return false, nil
	}
	drop := Drop{DropRecord: checkpoint.DropRecord{Day: oldest.Day, First: oldest.First, Last: oldest.Last}, Events: oldest.Events, Reason: reason, Undelivered: max(undelivered, 0)}
	if l.Sign != nil {
		c, err := l.Sign(ctx)
		if err != nil && !l.Pressed() {
			return false, fmt.Errorf("sign a checkpoint before day %d is dropped: %w", oldest.Day, err)
		}
		// Where no room is left for a checkpoint, the newest one there is has to do.
		drop.Checkpoint = string(c.Note)
	}
	e, err := l.event(drop, now)
	if err != nil {
		return false, err
	}
	if err := l.Store.DropDay(ctx, oldest.Day, store.Batch{Events: []store.Event{e}}); err != nil {
		return false, fmt.Errorf("drop day %d: %w", oldest.Day, err)
	}
	l.Log.Info("dropped a day of the activity log", "day", oldest.Day, "first", oldest.First, "last", oldest.Last, "reason", reason, "undelivered", drop.Undelivered)
	return true, nil
}

// due tells why a day is to be dropped, "" when it is not.
func (l *Log) due(ctx context.Context, d store.DayInfo, now time.Time) (string, error) {
	if d.Day >= store.Day(now.AddDate(0, 0, -1)) {
		return "", nil
	}
	if l.MaxDays > 0 && d.Day < store.Day(now.AddDate(0, 0, -l.MaxDays)) {
		return overDays, nil
	}
	if l.MaxBytes > 0 {
		extent, err := l.Store.Extent(ctx)
		if err != nil {
			return "", err
		}
		if extent.Bytes-extent.Free > l.MaxBytes {
			return overBytes, nil
		}
	}
	return "", nil
}

// shrink gives all free pages back while space is short, and otherwise only what
// is far more than the next day needs: moving pages costs.
func (l *Log) shrink(ctx context.Context) error {
	extent, err := l.Store.Extent(ctx)
	if err != nil || extent.Free == 0 {
		return err
	}
	switch {
	case l.Pressed():
		return l.Store.Shrink(ctx, 0)
	case extent.Free > extent.Bytes/2:
		return l.Store.Shrink(ctx, extent.Bytes/10)
	}
	return nil
}

func (l *Log) event(d Drop, now time.Time) (store.Event, error) {
	response, err := json.Marshal(d)
	if err != nil {
		return store.Event{}, fmt.Errorf("encode the event of day %d: %w", d.Day, err)
	}
	source := l.Names.Of("activity", "global", l.OperatorAccount, "", "", "").String()
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: now.UTC()}, Action: activity.DayDelete, AccountID: l.OperatorAccount,
		Message:       fmt.Sprintf("Activity Log: delete day %d", d.Day),
		Severity:      activity.Critical,
		CorrelationID: strings.ReplaceAll(uuid.NewString(), "-", ""),
		LogSourceCRN:  source,
		Initiator:     activity.Initiator{ID: by, Name: by, TypeURI: activity.UnknownType},
		Target:        activity.Target{ID: source, Name: fmt.Sprint(d.Day), TypeURI: "activity/day"},
		Observer:      activity.Observer{Name: "ActivityTracker"},
		ResponseData:  response,
	}
	e.SetReason(204, "")
	e.Severity = activity.Critical
	return store.NewEvent(e)
}
