// Package fault is the closed set of ways in which a request can fail. Rooms
// below the edges return these; each API family turns them into its own wire
// shape in one place. A fault's cause goes to the log and the activity event,
// never to the caller.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind is what went wrong, as far as a caller has to react differently.
type Kind int

// The kinds, with the HTTP status that every API family gives them unless its
// reference says otherwise.
const (
	Internal        Kind = iota // 500
	Invalid                     // 400: the request is malformed or breaks a rule
	Unauthenticated             // 401: no credential, or one that proves nothing
	Denied                      // 403: a known caller without the right
	NotFound                    // 404: absent, or hidden from this caller
	Conflict                    // 409: another object or state stands in the way
	Stale                       // 412 or 409: the caller's entity tag is old
	Gone                        // 410: it was there and is not any more
	Locked                      // 422: its state does not admit the operation
	TooLarge                    // 413
	Unsupported                 // 415: a content type that is not understood
	Limited                     // 429
	Unavailable                 // 503: try again after RetryAfter
)

var kindNames = map[Kind]string{
	Internal: "internal", Invalid: "invalid", Unauthenticated: "unauthenticated", Denied: "denied",
	NotFound: "not_found", Conflict: "conflict", Stale: "stale", Gone: "gone", Locked: "locked", TooLarge: "too_large",
	Unsupported: "unsupported_media_type", Limited: "rate_limited", Unavailable: "unavailable",
}

func (k Kind) String() string { return kindNames[k] }

// Error is a fault. Code is stable within its API family; Message and Detail
// are written for the caller; Target names the field, parameter or header at
// fault, where there is one.
type Error struct {
	Kind       Kind
	Code       string
	Message    string
	Detail     string
	Target     Target
	RetryAfter time.Duration
	Cause      error
}

// Target is the part of a request that a fault is about.
type Target struct {
	Type  string // "field", "parameter" or "header"
	Name  string
	Value string
}

func (e *Error) Error() string {
	s := e.Message
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *Error) Unwrap() error { return e.Cause }

// New returns a fault with a formatted message.
func New(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Message: fmt.Sprintf(format, args...)}
}

// WithDetail returns e with a formatted detail.
func (e *Error) WithDetail(format string, args ...any) *Error {
	c := *e
	c.Detail = fmt.Sprintf(format, args...)
	return &c
}

// On returns e pointing at a field of the body.
func (e *Error) On(field string) *Error { return e.At("field", field, "") }

// OnParameter returns e pointing at a path or query parameter.
func (e *Error) OnParameter(name, value string) *Error { return e.At("parameter", name, value) }

// OnHeader returns e pointing at a request header.
func (e *Error) OnHeader(name string) *Error { return e.At("header", name, "") }

// At returns e pointing at a part of the request, with the value found there.
func (e *Error) At(typ, name, value string) *Error {
	c := *e
	c.Target = Target{Type: typ, Name: name, Value: value}
	return &c
}

// Because returns e with a cause that only the log and the activity event see.
func (e *Error) Because(cause error) *Error {
	c := *e
	c.Cause = cause
	return &c
}

// Of returns the fault in err's chain, or an Internal one that wraps err.
func Of(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Kind: Internal, Code: "internal_error", Message: "The server could not complete the request.", Cause: err}
}

// Is reports whether err is a fault of the given kind.
func Is(err error, kind Kind) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == kind
}
