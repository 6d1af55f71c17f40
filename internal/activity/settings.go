package activity

import (
	"time"

	"tabard.dev/tabard/internal/object"
)

// Which access decisions stand in an account's log beside the refusals of
// requests, which always do.
const (
	DecisionsOff    = ""       // none that was allowed
	DecisionsDenied = "denied" // those that a service asked about and that were denied, as events of their own
	DecisionsAll    = "all"    // every one
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
