package otlp

import (
	"cmp"
	"encoding/json"
	"strings"
	"unicode/utf8"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

const (
	serviceName = "tabard"
	scopeName   = "tabard.dev/tabard/activity"
)

// encoder writes events as log records.
type encoder struct {
	resource *resourcepb.Resource
	version  string
}

func newEncoder(instance, version string) encoder {
	version = cmp.Or(version, "devel") // of a build without one
	var a attributes
	a.text("service.name", serviceName)
	a.text("service.version", version)
	a.text("service.instance.id", instance)
	return encoder{resource: &resourcepb.Resource{Attributes: a}, version: version}
}

// logs returns the message that goes into a request. It is written as LogsData,
// whose only field has the number and type of ExportLogsServiceRequest's, since
// the package of the latter brings gRPC.
func (c *encoder) logs(entries []store.Entry) *logspb.LogsData {
	records := make([]*logspb.LogRecord, len(entries))
	for i := range entries {
		records[i] = record(&entries[i])
	}
	return &logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{
		Resource: c.resource,
		ScopeLogs: []*logspb.ScopeLogs{{
			Scope:      &commonpb.InstrumentationScope{Name: scopeName, Version: c.version},
			LogRecords: records,
		}},
	}}}
}

// details are the values of an event that the store does not look up.
type details struct {
	ID        string `json:"id"`
	Initiator struct {
		Name    string `json:"name"`
		TypeURI string `json:"typeURI"`
		Host    struct {
			Address string `json:"address"`
			Agent   string `json:"agent"`
		} `json:"host"`
	} `json:"initiator"`
	Target struct {
		Name    string `json:"name"`
		TypeURI string `json:"typeURI"`
	} `json:"target"`
	Reason struct {
		Code int64 `json:"reasonCode"`
	} `json:"reason"`
}

// record writes an event: the document is the body, byte by byte, so that the
// receiver has what the log's tree was hashed over. Attributes are named by the
// semantic conventions where those have a name. The same event gives the same
// record each time it is sent.
func record(e *store.Entry) *logspb.LogRecord {
	// An event that cannot be read is sent as it is, with what the store knows.
	var d details
	if err := json.Unmarshal(e.Doc, &d); err != nil {
		d = details{}
	}
	at := uint64(max(e.Time.UnixNano(), 0))
	number, text := severity(e.Severity)
	r := &logspb.LogRecord{
		TimeUnixNano: at, ObservedTimeUnixNano: at,
		SeverityNumber: number, SeverityText: text,
		EventName: clip(e.Action),
		Body:      body(e.Doc),
	}
	var a attributes
	a.text("log.record.uid", d.ID)
	a.text("user.id", e.Initiator)
	a.text("user.name", d.Initiator.Name)
	a.text("client.address", d.Initiator.Host.Address)
	a.text("user_agent.original", d.Initiator.Host.Agent)
	if d.Reason.Code != 0 {
		a.number("http.response.status_code", d.Reason.Code)
	}
	a.number("tabard.index", e.Index)
	a.text("tabard.action", e.Action)
	a.text("tabard.outcome", e.Outcome)
	a.text("tabard.account.id", e.AccountID)
	a.text("tabard.correlation.id", e.CorrelationID)
	a.text("tabard.initiator.type", d.Initiator.TypeURI)
	a.text("tabard.initiator.authn.id", e.Authn)
	a.text("tabard.target.id", e.Target)
	a.text("tabard.target.name", d.Target.Name)
	a.text("tabard.target.type", d.Target.TypeURI)
	r.Attributes = a
	return r
}

// severity maps an event's severity. Critical events are ERROR: a refused
// request is one, and FATAL is for a program that ends.
func severity(s string) (logspb.SeverityNumber, string) {
	switch s {
	case activity.Normal:
		return logspb.SeverityNumber_SEVERITY_NUMBER_INFO, s
	case activity.Warning:
		return logspb.SeverityNumber_SEVERITY_NUMBER_WARN, s
	case activity.Critical:
		return logspb.SeverityNumber_SEVERITY_NUMBER_ERROR, s
	}
	return logspb.SeverityNumber_SEVERITY_NUMBER_UNSPECIFIED, clip(s)
}

// body is the document as text, or as bytes if it has been changed into
// something that no text of protobuf can hold.
func body(doc []byte) *commonpb.AnyValue {
	if !utf8.Valid(doc) {
		return &commonpb.AnyValue{Value: &commonpb.AnyValue_BytesValue{BytesValue: doc}}
	}
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: string(doc)}}
}

type attributes []*commonpb.KeyValue

// text adds a text, unless it is empty.
func (a *attributes) text(key, value string) {
	if value == "" {
		return
	}
	v := &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: clip(value)}}
	*a = append(*a, &commonpb.KeyValue{Key: key, Value: v})
}

func (a *attributes) number(key string, value int64) {
	v := &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: value}}
	*a = append(*a, &commonpb.KeyValue{Key: key, Value: v})
}

// clip bounds an attribute and makes it valid: protobuf refuses a whole message
// for one text that is no UTF-8.
func clip(s string) string { return strings.ToValidUTF8(activity.Clip(s), "\uFFFD") }
