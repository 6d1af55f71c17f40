// Package activity is the activity event: what happened, to what, by whom, and
// the trace of checks behind it. The shape is CADF as IBM Cloud Activity
// Tracker writes it (reference/access-and-audit.md section 6), with the fields
// accountId and trace added. Keeping events is the journal's work, not this
// package's.
package activity

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

// Outcomes of an event.
const (
	Success = "success"
	Failure = "failure"
)

// Severities of an event.
const (
	Normal   = "normal"
	Warning  = "warning"
	Critical = "critical"
)

// Event is one activity event.
type Event struct {
	ID            string          `json:"id"`
	Time          Time            `json:"eventTime"`
	Action        string          `json:"action"`
	Outcome       string          `json:"outcome"`
	Message       string          `json:"message"`
	Severity      string          `json:"severity"`
	DataEvent     bool            `json:"dataEvent"`
	CorrelationID string          `json:"correlationId"`
	LogSourceCRN  string          `json:"logSourceCRN"`
	AccountID     string          `json:"accountId,omitempty"`
	Initiator     Initiator       `json:"initiator"`
	Target        Target          `json:"target"`
	Observer      Observer        `json:"observer"`
	Reason        Reason          `json:"reason"`
	RequestData   json.RawMessage `json:"requestData,omitempty"`
	ResponseData  json.RawMessage `json:"responseData,omitempty"`
	Trace         Trace           `json:"trace,omitempty"`
}

// Initiator is who acted. In a profile session ID and Name are the profile and
// AuthnID and AuthnName the identity that put it on.
type Initiator struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"`
	TypeURI    string     `json:"typeURI"`
	AuthnID    string     `json:"authnId,omitempty"`
	AuthnName  string     `json:"authnName,omitempty"`
	Credential Credential `json:"credential"`
	Host       Host       `json:"host"`
}

// Credential names the kind of proof, never the proof.
type Credential struct {
	Type string `json:"type"`
}

// Host is where a request came from.
type Host struct {
	Address     string `json:"address"`
	AddressType string `json:"addressType,omitempty"`
	Agent       string `json:"agent,omitempty"`
}

// Target is what was acted on.
type Target struct {
	ID              string `json:"id"`
	Name            string `json:"name"`
	TypeURI         string `json:"typeURI"`
	ResourceGroupID string `json:"resourceGroupId,omitempty"`
}

// Observer is who wrote the event; the name is fixed by the format.
type Observer struct {
	Name string `json:"name"`
}

// Reason is the HTTP status of the request.
type Reason struct {
	Code       int    `json:"reasonCode"`
	Type       string `json:"reasonType"`
	ForFailure string `json:"reasonForFailure,omitempty"`
}

// AddressType returns the kind of a network address, as events name it.
func AddressType(address string) string {
	if strings.Contains(address, ":") {
		return "IPv6"
	}
	return "IPv4"
}

// TypeURIs of initiators.
const (
	UserType      = "service/security/account/user"
	ServiceIDType = "service/security/account/serviceid"
	ProfileType   = "service/security/account/profile"
	ComputeType   = "service/security/account/computeresource"
	HostType      = "service/security/host" // ours: a hypervisor host's agent
	UnknownType   = "service/security/clientid"
)

const timeLayout = "2006-01-02T15:04:05.00-0700"

// Time is an event's time: UTC with two decimals and an offset without colon.
type Time struct{ time.Time }

// MarshalJSON writes the format of the reference.
func (t Time) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, len(timeLayout)+2)
	b = append(b, '"')
	b = t.UTC().AppendFormat(b, timeLayout)
	return append(b, '"'), nil
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (t *Time) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.Parse(timeLayout, s)
	if err != nil {
		return err
	}
	t.Time = v.UTC()
	return nil
}

// SetReason fills reason and outcome from an HTTP status and the text that the
// caller was given, and the severity: of a failure that of the status, of a
// success that of the action, unless the event has one already.
func (e *Event) SetReason(status int, failure string) {
	e.Reason = Reason{Code: status, Type: http.StatusText(status)}
	e.Outcome = Success
	if e.Severity == "" {
		e.Severity = severityOf(e.Action)
	}
	if entry, ok := EntryOf(e.Action); ok {
		e.DataEvent = entry.Data
	}
	if status >= 400 {
		e.Outcome = Failure
		e.Reason.ForFailure = failure
		e.Severity = severityOfStatus(status)
	}
}

func severityOfStatus(status int) string {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusServiceUnavailable, http.StatusInsufficientStorage:
		return Critical
	}
	return Warning
}

// maxData bounds requestData and responseData, in bytes.
const maxData = 8 << 10

// Bound cuts what a caller could have made long, so that no request can write
// much more into the log than it sent.
func (e *Event) Bound() {
	for _, s := range []*string{
		&e.Message, &e.Reason.ForFailure, &e.CorrelationID, &e.Initiator.ID, &e.Initiator.Name, &e.Initiator.AuthnID,
		&e.Initiator.AuthnName, &e.Initiator.Host.Agent, &e.Target.ID, &e.Target.Name,
	} {
		*s = Clip(*s)
	}
	for _, data := range []*json.RawMessage{&e.RequestData, &e.ResponseData} {
		if len(*data) > maxData {
			*data = json.RawMessage(`{"omitted":"too large"}`)
		}
	}
}
