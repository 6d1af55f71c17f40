package metadata

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
)

// event begins an event whose initiator and target are the instance.
func (s *Service) event(r *request, rt *route) *activity.Event {
	i := r.instance
	return &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: s.cfg.Now()}, Action: rt.action, Severity: activity.Normal,
		Message:       "Virtual Server for VPC: " + rt.what + " " + i.Name,
		CorrelationID: api.TransactionID(r.Context()), AccountID: i.AccountID, LogSourceCRN: i.CRN,
		Initiator: activity.Initiator{
			ID: crn.IAMIDOfCRN(i.CRN), Name: i.Name, TypeURI: activity.ComputeType,
			AuthnID: crn.IAMIDOfCRN(i.CRN), AuthnName: i.Name,
			Credential: activity.Credential{Type: rt.credential}, Host: api.PeerHost(r.Request),
		},
		Target:   activity.Target{ID: i.CRN, Name: i.Name, TypeURI: "is.instance/instance"},
		Observer: activity.Observer{Name: "ActivityTracker"},
	}
}

func (s *Service) record(ctx context.Context, e *activity.Event) error {
	return durable(ctx, s.cfg.Journal, e)
}

// recordTimeout bounds one record; the journal's own bound is below it.
const recordTimeout = 15 * time.Second

// durable records events; whatever the journal's error, it means: try again. A
// caller that hangs up does not undo the record of its refusal.
func durable(ctx context.Context, journal Recorder, events ...*activity.Event) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	err := journal.Record(ctx, events...)
	if err == nil || fault.Is(err, fault.Unavailable) {
		return err
	}
	f := fault.New(fault.Unavailable, "service_unavailable",
		"The event of this request cannot be recorded, so the request was not carried out. Try again.").Because(err)
	f.RetryAfter = time.Second
	return f
}

// stamp writes a time as the reference's samples do.
func stamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// fields are the properties of a JSON object. They are taken out one by one;
// what is left then is unknown.
type fields struct {
	of     string // the property that the object is the value of, with a dot; "" for the body
	values map[string]json.RawMessage
}

// body reads an optional JSON object, whatever its content type: curl labels
// JSON as a form.
func body(r *request) (*fields, error) {
	b, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, fault.New(fault.Invalid, "invalid_request", "The body is larger than %d bytes.", tooLarge.Limit)
	case err != nil:
		return nil, fault.New(fault.Invalid, "invalid_request", "The body could not be read.").Because(err)
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return &fields{}, nil
	}
	return parse("", b)
}

// parse reads one object and nothing after it. A property that stands twice is
// an error: another reader might take the other one.
func parse(of string, b []byte) (*fields, error) {
	malformed := func() error {
		if of != "" {
			return fault.New(fault.Invalid, "invalid_value", "The property %s must be an object.", of).On(of)
		}
		return fault.New(fault.Invalid, "invalid_request", "The body is not one JSON object.")
	}
	if !json.Valid(b) {
		return nil, malformed()
	}
	f := &fields{of: of, values: map[string]json.RawMessage{}}
	if of != "" {
		f.of += "."
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	switch t, err := dec.Token(); {
	case err == nil && t == nil:
		return f, nil // null is as good as nothing
	case err != nil || t != json.Delim('{'):
		return nil, malformed()
	}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return nil, malformed()
		}
		if _, twice := f.values[name]; twice {
			name = activity.Clip(f.of + name)
			return nil, fault.New(fault.Invalid, "invalid_value", "The property %s stands there more than once.", name).On(name)
		}
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return nil, malformed()
		}
		f.values[name] = v
	}
	return f, nil
}

// take decodes a property, if it is there and not null. Names are compared with
// their case.
func (f *fields) take(name string, into any) error {
	v, ok := f.values[name]
	delete(f.values, name)
	if !ok {
		return nil
	}
	if err := json.Unmarshal(v, into); err != nil {
		return fault.New(fault.Invalid, "invalid_value", "The property %s has the wrong type.", f.of+name).On(f.of + name)
	}
	return nil
}

// object decodes a property that is an object; nil when there is none.
func (f *fields) object(name string) (*fields, error) {
	v, ok := f.values[name]
	delete(f.values, name)
	if !ok || string(v) == "null" {
		return nil, nil
	}
	return parse(f.of+name, v)
}

// end refuses what has not been taken.
func (f *fields) end() error {
	if len(f.values) == 0 {
		return nil
	}
	name := activity.Clip(f.of + slices.Min(slices.Collect(maps.Keys(f.values))))
	return fault.New(fault.Invalid, "unknown_field", "The property %s is not known.", name).On(name)
}

// between checks a number of seconds.
func between(name string, v, least, most int64) error {
	if v < least || v > most {
		return fault.New(fault.Invalid, "invalid_value", "The property %s must be between %d and %d.", name, least, most).
			At("field", name, strconv.FormatInt(v, 10))
	}
	return nil
}

// wireError is the service's error body (reference section 1.10).
type wireError struct {
	Errors     []wireErrorItem `json:"errors"`
	StatusCode int             `json:"status_code"`
	Trace      string          `json:"trace"`
}

type wireErrorItem struct {
	Code    string      `json:"code"`
	Message string      `json:"message"`
	Target  *wireTarget `json:"target,omitempty"`
}

type wireTarget struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Value string `json:"value,omitempty"`
}

func writeFault(w http.ResponseWriter, r *http.Request, f *fault.Error) {
	status := grant.StatusOf(f.Kind)
	if f.RetryAfter > 0 {
		seconds := (f.RetryAfter + time.Second - 1) / time.Second
		w.Header().Set("Retry-After", fmt.Sprint(int64(seconds)))
	}
	item := wireErrorItem{Code: f.Code, Message: f.Message}
	if f.Kind == fault.Internal {
		item.Code = "service_error"
	}
	if f.Target.Name != "" {
		item.Target = &wireTarget{Name: f.Target.Name, Type: f.Target.Type, Value: f.Target.Value}
	}
	writeJSON(w, status, wireError{Errors: []wireErrorItem{item}, StatusCode: status, Trace: api.TransactionID(r.Context())})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; there is nobody left to tell.
	_, _ = w.Write(append(b, '\n'))
}
