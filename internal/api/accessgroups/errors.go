package accessgroups

import (
	"net/http"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// errorView is the error body of the API (reference/access-and-audit.md
// section 4.4).
type errorView struct {
	Trace      string       `json:"trace"`
	StatusCode int          `json:"status_code"`
	Errors     []errorEntry `json:"errors"`
}

type errorEntry struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

var codeOfKind = map[fault.Kind]string{
	fault.Internal:        "internal_error",
	fault.Invalid:         "invalid_body",
	fault.Unauthenticated: "invalid_token",
	fault.Denied:          "forbidden",
	fault.NotFound:        "not_found",
	fault.Conflict:        "conflict",
	fault.Stale:           "conflict",
	fault.TooLarge:        "invalid_body",
	fault.Unsupported:     "unsupported_content_type",
	fault.Limited:         "too_many_requests",
	fault.Unavailable:     "service_unavailable",
}

func shape(c *api.Call, f *fault.Error) (int, any) {
	v := describeFault(c, f)
	return v.StatusCode, v
}

func describeFault(c *api.Call, f *fault.Error) errorView {
	status := grant.StatusOf(f.Kind)
	if f.Kind == fault.Stale {
		status = http.StatusPreconditionFailed
	}
	return errorView{
		Trace: api.TransactionID(c.R.Context()), StatusCode: status,
		Errors: []errorEntry{{Code: codeOfKind[f.Kind], Message: f.Message}},
	}
}
