// Package export sends the activity log to other systems: each route follows
// the log from a cursor of its own, in the log's order, at least once, and
// nobody waits for it. A route whose target does not answer stands still and
// goes on where it was. How events are written for a target is its sink's
// affair; which routes there are is told from outside.
package export

import (
	"context"
	"time"

	"tabard.dev/tabard/internal/store"
)

// Sink delivers events to one target. One goroutine at a time calls it.
type Sink interface {
	// Deliver sends entries in their order. It returns after the target has
	// taken them, as far as its protocol can tell. Taken is how many of the first ones are
	// known to be taken; those after it are delivered again when there is an error, so that the
	// target may get some of them twice: an event's id tells. An error together with all taken is
	// shown to the operator, and nothing is delivered again.
	Deliver(ctx context.Context, entries []store.Entry) (taken int, err error)

	// Close gives up the connection. It does not wait for the target.
	Close() error
}

// Loss is an error of a sink whose target may have lost what it took: the route
// goes back to an index.
type Loss interface {
	LostFrom() int64
}

// Watcher is a sink that finds out by itself that its target may have lost
// something. The channel that Broken returns is then closed, and Deliver is
// called, without entries if there are none.
type Watcher interface {
	Broken() <-chan struct{}
}

// Patient is an error that says for how long another attempt has no chance.
type Patient interface {
	RetryAfter() time.Duration
}

// Route is where events go, and which.
type Route struct {
	Name    string
	Kind    string // of target: file, webhook, …
	Target  string // for people to read; never with a secret in it
	Match   Match
	FromNow bool // a route that is new begins with what happens next, and not at the log's beginning
	Batch   Batch
	Timeout time.Duration // of one attempt; 0 means DefaultTimeout

	// Open makes the sink. It is tried again until there is one.
	Open func() (Sink, error)
}

// Batch bounds what is delivered at once.
type Batch struct {
	Events int           // 0 means DefaultEvents
	Bytes  int           // of documents; a larger one goes alone. 0 means DefaultBytes
	Wait   time.Duration // for more to come with the first one; 0 means DefaultWait
}

// Defaults and bounds of a route's settings.
const (
	DefaultEvents  = 500
	MaxEvents      = 5000
	DefaultBytes   = 1 << 20
	MaxBytes       = 16 << 20
	DefaultWait    = 100 * time.Millisecond
	MaxWait        = time.Minute
	DefaultTimeout = 30 * time.Second
	MaxTimeout     = 10 * time.Minute
)

func (r Route) complete() Route {
	if r.Batch.Events == 0 {
		r.Batch.Events = DefaultEvents
	}
	if r.Batch.Bytes == 0 {
		r.Batch.Bytes = DefaultBytes
	}
	if r.Batch.Wait == 0 {
		r.Batch.Wait = DefaultWait
	}
	if r.Timeout == 0 {
		r.Timeout = DefaultTimeout
	}
	return r
}
