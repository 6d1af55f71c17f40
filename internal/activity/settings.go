package activity

import (
	"time"

	"tabard.dev/tabard/internal/object"
)

// Which access decisions have events of their own in an account's log. The
// refusals of requests have theirs in any case, with the trace of the decision,
// and so have decisions against a subject that a service asked about.
const (
	DecisionsOff    = ""       // no others
	DecisionsDenied = "denied" // every denial, also of single objects in a list
	DecisionsAll    = "all"    // every decision
)

// Settings are what an account asks of its log.
type Settings struct {
	object.Meta
	AccountID string `json:"account_id"`
	Decisions string `json:"decisions,omitempty"`
}

// ExportCursor is how far a route of exports has come: everything before Next,
// an index in the whole log, has been delivered or was not meant for it.
type ExportCursor struct {
	object.Meta
	Route string `json:"route"`
	Next  int64  `json:"next"`

	Gone time.Time `json:"gone,omitzero"` // since when there is no such route
}
