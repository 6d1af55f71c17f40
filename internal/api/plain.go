package api

import (
	"net/http"
	"strconv"
	"time"

	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// PlainError is the error body of routes that are our own.
type PlainError struct {
	Trace      string           `json:"trace"`
	Errors     []PlainErrorItem `json:"errors"`
	StatusCode int              `json:"status_code"`
}

// PlainErrorItem is one error in it.
type PlainErrorItem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// PlainShape is the error shape of our own families.
func PlainShape(c *Call, f *fault.Error) (int, any) {
	status := grant.StatusOf(f.Kind)
	message := f.Message
	if f.Detail != "" {
		message += " " + f.Detail
	}
	return status, PlainError{
		Trace: TransactionID(c.R.Context()), StatusCode: status,
		Errors: []PlainErrorItem{{Code: f.Code, Message: message}},
	}
}

// WritePlainFault answers a request that no route has seen with a fault, in the
// shape of our own families.
func WritePlainFault(w http.ResponseWriter, r *http.Request, f *fault.Error) {
	c := &Call{Family: &Family{Config: &Config{}, Shape: PlainShape}, R: r}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(f.RetryAfter/time.Second)))
	}
	status, body := PlainShape(c, f)
	c.write(w, status, body)
}

// NotFoundRoute answers every path that no family has, in JSON.
func NotFoundRoute(mux *http.ServeMux, cfg *Config) {
	f := &Family{Config: cfg, Mux: mux, Service: "Tabard", Shape: PlainShape}
	f.handle(Route{Pattern: "/", Kind: KindOpen, Reason: "no family has the path"}, func(c *Call) (Reply, error) {
		return Reply{}, fault.New(fault.NotFound, "invalid_route", "There is no %s %s here.", c.R.Method, c.R.URL.Path)
	})
}
