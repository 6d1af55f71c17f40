// Package export sends the activity log to other systems: each route follows
// the log from a cursor of its own, in the log's order, at least once, and
// nobody waits for it. A route whose target does not answer stands still and
// goes on where it was.
package export

import (
	"context"

	"tabard.dev/tabard/internal/store"
)

// Sink delivers events to one target. One goroutine at a time calls it.
type Sink interface {
	// Deliver sends entries in their order. It returns after the target has
	// taken them, as far as its protocol can tell. Taken is how many of the first ones are
	// known to be taken; those after it are delivered again when there is an error, so that the
	// target may get some of them twice: an event's id tells.
	Deliver(ctx context.Context, entries []store.Entry) (taken int, err error)

	// Close gives up the connection. It does not wait for the target.
	Close() error
}
