package activity

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestACallerCannotMakeAnEventLong(t *testing.T) {
	long := strings.Repeat("ü<", 50_000)
	e := Event{
		Message: long, CorrelationID: long,
		Initiator:    Initiator{ID: long, Name: long, AuthnID: long, AuthnName: long, Host: Host{Agent: long}},
		Target:       Target{ID: long, Name: long},
		Reason:       Reason{ForFailure: long},
		RequestData:  json.RawMessage(`{"x":"` + long + `"}`),
		ResponseData: json.RawMessage(`{"x":"` + long + `"}`),
	}
	for range 10 {
		e.Trace.Fail("check", long, long, long)
	}
	e.Bound()
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 128<<10 {
		t.Errorf("the event has %d bytes", len(b))
	}
	if strings.ContainsRune(e.Message, '\uFFFD') || !strings.HasSuffix(e.Message, "…") {
		t.Errorf("a cut text ends with %q", e.Message[len(e.Message)-8:])
	}
	short := Event{Message: "short"}
	if short.Bound(); short.Message != "short" {
		t.Errorf("a short text became %q", short.Message)
	}
}
