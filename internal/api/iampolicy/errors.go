package iampolicy

import (
	"errors"
	"net/http"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// errorView is the error body of the API (reference/access-and-audit.md
// section 1.11).
type errorView struct {
	Trace      string       `json:"trace"`
	StatusCode int          `json:"status_code"`
	Errors     []errorEntry `json:"errors"`
}

type errorEntry struct {
	Code    string        `json:"code"`
	Message string        `json:"message"`
	Details *errorDetails `json:"details,omitempty"`
}

type errorDetails struct {
	ConflictsWith conflicting `json:"conflicts_with"`
}

type conflicting struct {
	ETag   string `json:"etag"`
	Role   string `json:"role"`
	Policy any    `json:"policy,omitempty"`
}

// conflictError carries the policy that stands in the way from where it was
// found to shape. It holds nothing that the caller may not see.
type conflictError struct {
	with conflicting
}

func (e *conflictError) Error() string { return "policy " + e.with.ETag }

// conflict is the fault for two policies that grant the same role on the same
// resource to the same subject.
func (v version) conflict(c *api.Call, p, with *access.Policy) error {
	found := conflicting{ETag: with.Tag(with.ID)}
	if i := slices.IndexFunc(with.Roles, func(r string) bool { return slices.Contains(p.Roles, r) }); i >= 0 {
		found.Role = with.Roles[i]
	}
	if visible(c, with) {
		found.Policy = v.show(c, with, bare)
	}
	return fault.New(fault.Conflict, "policy_conflict_error",
		"The policy %s grants the role %s on the same resource to the same subject already.", with.ID, found.Role).
		Because(&conflictError{with: found})
}

// codes are the ones that clients know; a fault with another code gets the one
// of its kind.
var codes = []string{
	"invalid_body", "missing_required_query_parameter", "policy_conflict_error", "policy_not_found",
	"request_not_processed", "role_conflict_error", "role_not_found",
}

var codeOfKind = map[fault.Kind]string{
	fault.Invalid:         "invalid_body",
	fault.Unauthenticated: "invalid_token",
	fault.Denied:          "insufficent_permissions", // spelled so
	fault.NotFound:        "not_found",
	fault.TooLarge:        "invalid_body",
	fault.Unsupported:     "unsupported_content_type",
	fault.Limited:         "too_many_requests",
}

// shape returns the shape of the routes whose conflicts have this code.
func shape(conflictCode string) func(*api.Call, *fault.Error) (int, any) {
	return func(c *api.Call, f *fault.Error) (int, any) {
		status := grant.StatusOf(f.Kind)
		if f.Kind == fault.Stale {
			status = http.StatusPreconditionFailed
		}
		entry := errorEntry{Code: f.Code, Message: f.Message}
		if !slices.Contains(codes, entry.Code) {
			entry.Code = codeOfKind[f.Kind]
		}
		if entry.Code == "" && (f.Kind == fault.Conflict || f.Kind == fault.Stale) {
			entry.Code = conflictCode
		}
		if entry.Code == "" {
			entry.Code = "unable_to_process"
		}
		var conflict *conflictError
		if errors.As(f.Cause, &conflict) {
			entry.Details = &errorDetails{ConflictsWith: conflict.with}
		}
		return status, errorView{Trace: api.TransactionID(c.R.Context()), StatusCode: status, Errors: []errorEntry{entry}}
	}
}
