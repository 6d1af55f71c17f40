package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tabard.dev/tabard/internal/fault"
)

// State is whether a store takes writes.
type State string

// The states, the better ones first. In all but the first two nothing is
// written, and what is in memory and in the file is read as before.
const (
	StateOK       State = "ok"
	StateAlarm    State = "alarm"     // there is little space left; everything goes on
	StateFull     State = "full"      // there is no space left but for what makes some
	StateReadOnly State = "read_only" // the file system takes no writes
	StateFailing  State = "failing"   // the disk answers with errors
	StateLost     State = "lost"      // a file of the store was removed or replaced; it is put back
	StateDamaged  State = "damaged"   // a file of the store was cut or overwritten; the operator must act
)

// States are all of them, in their order.
func States() []State {
	return []State{StateOK, StateAlarm, StateFull, StateReadOnly, StateFailing, StateLost, StateDamaged}
}

// Takes reports whether a store in the state takes writes.
func (s State) Takes() bool { return s == StateOK || s == StateAlarm }

// RefusedError means that a store takes no writes for now, and why.
type RefusedError struct {
	State State
	Cause error
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the store takes no writes (%s): %v", e.State, e.Cause)
}

func (e *RefusedError) Unwrap() error { return e.Cause }

// refusalRetry is how soon a refused request may be tried again: the state is
// looked at each second.
const refusalRetry = 5 * time.Second

// refusals are what a caller is told. What lies where on the disk is for the
// server's log.
var refusals = map[State]struct{ code, why string }{
	StateFull:     {"activity_log_full", "The disk of the activity log is full"},
	StateReadOnly: {"activity_log_read_only", "The disk of the activity log is read-only"},
	StateFailing:  {"activity_log_failing", "The disk of the activity log fails"},
	StateLost:     {"activity_log_lost", "A file of the activity log was removed and is being put back"},
	StateDamaged:  {"activity_log_damaged", "A file of the activity log is damaged"},
}

// Fault is what the caller of a request gets whose event cannot be recorded.
func (e *RefusedError) Fault() *fault.Error {
	r, ok := refusals[e.State]
	if !ok {
		r.code, r.why = "service_unavailable", "The activity log cannot be written"
	}
	became := "the request was not carried out"
	if lost := (*LostError)(nil); errors.As(e.Cause, &lost) && lost.Committed {
		became = "whether a change of this request stays is not certain: read it again"
	}
	f := fault.New(fault.Unavailable, r.code,
		"%s. Nothing can be recorded, so %s; reads go on. Try again later, or tell the operator of the server.", r.why, became).Because(e)
	f.RetryAfter = refusalRetry
	return f
}

// LostError means that the files under the store's names are not those that it
// has open.
type LostError struct {
	File    string
	What    string // what is wrong with it
	Damaged bool   // its content is gone, so that it cannot be put back

	// Committed says that the batch was committed before this was found: the
	// store has it, and whether it stays depends on what becomes of the file.
	Committed bool
}

func (e *LostError) Error() string { return fmt.Sprintf("%s %s", e.File, e.What) }

// Restored is what [Files.Restore] did.
type Restored struct {
	Found string   // what was wrong, as LostError says it
	Aside []string // files that lay in the place of the store's, under their new names
}

// Files is a store whose files can be looked after.
type Files interface {
	// CheckFiles returns a *LostError unless the files under the store's names
	// are those that it has open, and not shorter than they were.
	CheckFiles() error
	// Restore writes a removed or replaced file back from what is still open.
	Restore(ctx context.Context) (Restored, error)
	// Shrink gives free pages back to the file system until the store has at
	// most so many bytes of them.
	Shrink(ctx context.Context, keep int64) error
}
