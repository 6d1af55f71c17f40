package otlp

import (
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/proto/otlp/logs/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

// receiver is a receiver that can be told what to answer. The real one is in the
// tests of the whole program.
type receiver struct {
	*httptest.Server
	mu      sync.Mutex
	records []*v1.LogRecord // of requests that were answered with success
	calls   int
	answer  func(w http.ResponseWriter, r *http.Request, records []*v1.LogRecord) (taken bool)
}

func newReceiver(t *testing.T, start func(*httptest.Server)) *receiver {
	t.Helper()
	r := &receiver{}
	r.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		records, err := decode(req)
		if err != nil || req.URL.Path != "/v1/logs" || req.Header.Get("Content-Type") != protobufType {
			t.Errorf("%s with %q: %v", req.URL.Path, req.Header.Get("Content-Type"), err)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.calls++
		if r.answer != nil && !r.answer(w, req, records) {
			return
		}
		r.records = append(r.records, records...)
		if r.answer == nil {
			w.Header().Set("Content-Type", protobufType)
		}
	}))
	start(r.Server)
	t.Cleanup(r.Close)
	return r
}

func decode(r *http.Request) ([]*v1.LogRecord, error) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, err
		}
		body = z
	}
	b, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	var data v1.LogsData
	if err := proto.Unmarshal(b, &data); err != nil {
		return nil, err
	}
	var all []*v1.LogRecord
	for _, rl := range data.ResourceLogs {
		for _, sl := range rl.ScopeLogs {
			all = append(all, sl.LogRecords...)
		}
	}
	return all, nil
}

// indexes are those of the records that were taken.
func (r *receiver) indexes() []int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []int64
	for _, rec := range r.records {
		all = append(all, index(rec))
	}
	return all
}

func index(r *v1.LogRecord) int64 {
	for _, a := range r.Attributes {
		if a.Key == "tabard.index" {
			return a.Value.GetIntValue()
		}
	}
	return -1
}

func sink(t *testing.T, cfg Config) *Sink {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func events(from, n int) []store.Entry {
	out := make([]store.Entry, n)
	for i := range out {
		out[i] = store.Entry{Index: int64(from + i), Event: store.Event{
			Time: time.Unix(int64(from+i), 5), Action: "iam-identity.token.create", Outcome: "success", Severity: activity.Normal,
			CorrelationID: "c", AccountID: "acc", Doc: fmt.Appendf(nil, `{"id":"event-%d"}`, from+i),
		}}
	}
	return out
}

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestEventsArriveInOrderWithTheirCredentials(t *testing.T) {
	for _, compression := range []string{"", plain} {
		r := newReceiver(t, (*httptest.Server).Start)
		r.answer = func(w http.ResponseWriter, req *http.Request, _ []*v1.LogRecord) bool {
			if req.Header.Get("Authorization") != "Bearer a-token" || req.Header.Get("X-Tenant") != "we" || req.Header.Get("User-Agent") != "tabard/1.2.3" {
				t.Errorf("headers %v", req.Header)
			}
			return true // and no body at all, as some receivers have it
		}
		s := sink(t, Config{
			Endpoint: r.URL, Compression: compression, Version: "1.2.3",
			BearerTokenFile: file(t, "a-token\n"), HeadersFile: file(t, "# who we are\nx-tenant:  we \n\n"),
		})
		for i := range 3 {
			if n, err := s.Deliver(t.Context(), events(i*100, 100)); n != 100 || err != nil {
				t.Fatal(n, err)
			}
		}
		if got := r.indexes(); len(got) != 300 || !slices.IsSorted(got) {
			t.Errorf("got %v", got)
		}
	}
}

func TestAnEventIsARecordWithItsDocumentUntouched(t *testing.T) {
	e := store.Entry{Index: 7, Event: store.Event{
		Time: time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC), AccountID: "acc", CorrelationID: "corr", Action: "iam-identity.token.create",
		Outcome: "failure", Severity: activity.Critical, Initiator: "iam-Profile-1", Authn: "crn:x", Target: "crn:t",
		Doc: []byte(`{"id":"i-1","message":"ü <b>","initiator":{"name":"n","typeURI":"service/security/account/profile","host":{"address":"192.0.2.7","agent":"curl/8"}},` +
			`"target":{"name":"tn","typeURI":"iam-identity/token"},"reason":{"reasonCode":403}}`),
	}}
	c := newEncoder("https://iam.example", "1.2.3")
	data := c.logs([]store.Entry{e})
	r := data.ResourceLogs[0].ScopeLogs[0].LogRecords[0]
	if r.Body.GetStringValue() != string(e.Doc) || r.TimeUnixNano != uint64(e.Time.UnixNano()) || r.EventName != e.Action ||
		r.SeverityNumber != v1.SeverityNumber_SEVERITY_NUMBER_ERROR || r.SeverityText != "critical" {
		t.Error(r)
	}
	got := map[string]string{}
	for _, a := range r.Attributes {
		if got[a.Key] = a.Value.GetStringValue(); got[a.Key] == "" {
			got[a.Key] = fmt.Sprint(a.Value.GetIntValue())
		}
	}
	for _, a := range data.ResourceLogs[0].Resource.Attributes {
		got[a.Key] = a.Value.GetStringValue()
	}
	for k, want := range map[string]string{
		"service.name": "tabard", "service.version": "1.2.3", "service.instance.id": "https://iam.example",
		"log.record.uid": "i-1", "user.id": "iam-Profile-1", "user.name": "n", "client.address": "192.0.2.7", "user_agent.original": "curl/8",
		"http.response.status_code": "403", "tabard.index": "7", "tabard.action": e.Action, "tabard.outcome": "failure", "tabard.account.id": "acc",
		"tabard.correlation.id": "corr", "tabard.initiator.type": activity.ProfileType, "tabard.initiator.authn.id": "crn:x",
		"tabard.target.id": "crn:t", "tabard.target.name": "tn", "tabard.target.type": "iam-identity/token",
	} {
		if got[k] != want {
			t.Errorf("%s is %q, want %q", k, got[k], want)
		}
		delete(got, k)
	}
	if len(got) > 0 {
		t.Errorf("more than that: %v", got)
	}
}

func TestAnEventThatIsNoTextStillGoesOutWhole(t *testing.T) {
	r := newReceiver(t, (*httptest.Server).Start)
	bad := events(0, 3)
	bad[1].Doc = []byte("{\"id\":\xff")
	bad[1].Initiator, bad[1].Action, bad[1].Severity = "\xc3\x28", strings.Repeat("ü", 5000), "\xff"
	bad[1].Time = time.Time{}
	if n, err := sink(t, Config{Endpoint: r.URL}).Deliver(t.Context(), bad); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	if string(r.records[1].Body.GetBytesValue()) != string(bad[1].Doc) || len(r.records[1].EventName) > 600 {
		t.Error(r.records[1])
	}
}

func TestMuchIsSentInSeveralRequests(t *testing.T) {
	r := newReceiver(t, (*httptest.Server).Start)
	many := events(0, 30)
	for i := range many {
		many[i].Doc = fmt.Appendf(nil, `{"id":"event-%d","message":%q}`, i, strings.Repeat("x", 100_000))
	}
	many[12].Doc = fmt.Appendf(nil, `{"message":%q}`, strings.Repeat("x", 2*maxRequest))
	if n, err := sink(t, Config{Endpoint: r.URL}).Deliver(t.Context(), many); n != 30 || err != nil {
		t.Fatal(n, err)
	}
	if got := r.indexes(); len(got) != 30 || !slices.IsSorted(got) || r.calls < 4 || r.calls > 6 {
		t.Errorf("%d calls, %v", r.calls, got)
	}
}

// partial is the answer of a receiver that rejected some records.
func partial(rejected int, text string) []byte {
	var inner []byte
	inner = protowire.AppendTag(inner, 1, protowire.VarintType)
	inner = protowire.AppendVarint(inner, uint64(rejected))
	inner = protowire.AppendTag(inner, 2, protowire.BytesType)
	inner = protowire.AppendString(inner, text)
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), inner)
}

func TestARejectedRecordIsFoundAndNothingAfterItCounts(t *testing.T) {
	for name, refuse := range map[string]func(http.ResponseWriter, int){
		"in part": func(w http.ResponseWriter, n int) {
			w.Header().Set("Content-Type", protobufType)
			w.Write(partial(n, "no such field"))
		},
		"in part, as JSON": func(w http.ResponseWriter, n int) {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			fmt.Fprintf(w, `{"partialSuccess":{"rejectedLogRecords":"%d","errorMessage":"no such field"}}`, n)
		},
		"as a bad request": func(w http.ResponseWriter, _ int) {
			http.Error(w, "no such field", http.StatusBadRequest)
		},
		"as too large": func(w http.ResponseWriter, _ int) {
			http.Error(w, "no such field", http.StatusRequestEntityTooLarge)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReceiver(t, (*httptest.Server).Start)
			r.answer = func(w http.ResponseWriter, _ *http.Request, records []*v1.LogRecord) bool {
				n := 0
				for _, rec := range records {
					if index(rec) == 77 {
						n++
					}
				}
				if n > 0 {
					refuse(w, n)
				}
				return n == 0
			}
			s := sink(t, Config{Endpoint: r.URL})
			n, err := s.Deliver(t.Context(), events(0, 100))
			var rejected *RejectedError
			if n != 77 || !errors.As(err, &rejected) || rejected.Index != 77 || !strings.Contains(err.Error(), "no such field") {
				t.Errorf("%d taken, %v", n, err)
			}
			if got := r.indexes(); !slices.IsSorted(got) || got[len(got)-1] != 76 {
				t.Errorf("the receiver has %v", got)
			}
			if r.calls > 20 {
				t.Errorf("%d calls", r.calls)
			}
		})
	}
}

func TestAWarningOfTheReceiverIsNoRejection(t *testing.T) {
	r := newReceiver(t, (*httptest.Server).Start)
	r.answer = func(w http.ResponseWriter, _ *http.Request, _ []*v1.LogRecord) bool {
		w.Header().Set("Content-Type", protobufType)
		w.Write(partial(0, "you are using an old version"))
		return true
	}
	if n, err := sink(t, Config{Endpoint: r.URL}).Deliver(t.Context(), events(0, 10)); n != 10 || err != nil {
		t.Error(n, err)
	}
}

func TestABusyReceiverIsLeftAloneForAsLongAsItAsks(t *testing.T) {
	for _, code := range []int{429, 502, 503, 504} {
		now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
		for header, want := range map[string]time.Duration{
			"": 0, "30": 30 * time.Second, "Sun, 01 Mar 2026 12:01:00 GMT": time.Minute, "999999999": maxWait, "-5": 0, "soon": 0, "Sat, 01 Mar 2025 12:00:00 GMT": 0,
		} {
			r := newReceiver(t, (*httptest.Server).Start)
			r.answer = func(w http.ResponseWriter, _ *http.Request, _ []*v1.LogRecord) bool {
				w.Header().Set("Retry-After", header)
				w.WriteHeader(code)
				return false
			}
			clock := now
			s := sink(t, Config{Endpoint: r.URL, Now: func() time.Time { return clock }})
			n, err := s.Deliver(t.Context(), events(0, 10))
			var busy *BusyError
			if n != 0 || !errors.As(err, &busy) || busy.RetryAfter() != want {
				t.Fatalf("%d with %q: %d taken, %v", code, header, n, err)
			}
			if want == 0 {
				continue
			}
			clock = now.Add(want - time.Second)
			if _, err := s.Deliver(t.Context(), events(0, 10)); !errors.As(err, &busy) || busy.RetryAfter() != time.Second || r.calls != 1 {
				t.Errorf("a second before its time: %v, %d calls", err, r.calls)
			}
			clock, r.answer = now.Add(want), nil
			if n, err := s.Deliver(t.Context(), events(0, 10)); n != 10 || err != nil {
				t.Error(n, err)
			}
		}
	}
}

func TestAnswersThatAreNoReceiversCountForNothing(t *testing.T) {
	for want, answer := range map[string]http.HandlerFunc{
		"is the path of the endpoint right": func(w http.ResponseWriter, _ *http.Request) { // a portal that wants a login
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>Welcome")
		},
		"read protobuf": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", protobufType)
			fmt.Fprint(w, "\x0a\xff")
		},
		"more than 65536 bytes": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat("x", maxAnswer+1)) },
		"has another path":      http.NotFound,
		"not followed": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/steal", http.StatusTemporaryRedirect)
		},
		"check bearer_token_file": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) },
		"500 Internal Server Error, saying": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, strings.Repeat("long ", 5000), http.StatusInternalServerError)
		},
		"EOF": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "cut")
		},
	} {
		srv := httptest.NewServer(answer)
		n, err := sink(t, Config{Endpoint: srv.URL}).Deliver(t.Context(), events(0, 10))
		srv.Close()
		if n != 0 || err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 1000 {
			t.Errorf("want %q: %d taken, %v", want, n, err)
		}
	}
}

func TestAPeerThatRepeatsCredentialsDoesNotGetThemIntoAnError(t *testing.T) {
	const token, tenant = "a-secret-token", "a-secret-tenant"
	for _, code := range []int{200, 302, 400, 401, 418, 500, 503} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", r.Header.Get("Authorization")+"/"+r.Header.Get("X-Tenant"))
			w.Header().Set("Location", "/login?"+r.Header.Get("Authorization"))
			w.WriteHeader(code)
			fmt.Fprint(w, r.Header, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		}))
		s := sink(t, Config{Endpoint: srv.URL, BearerTokenFile: file(t, token), HeadersFile: file(t, "X-Tenant: Basic "+tenant)})
		_, err := s.Deliver(t.Context(), events(0, 1))
		srv.Close()
		if err == nil || strings.Contains(err.Error(), token) || strings.Contains(err.Error(), tenant) {
			t.Errorf("%d: %v", code, err)
		}
	}
}

func TestAPeerThatSaysNothingHoldsNobodyLongerThanAsked(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := sink(t, Config{Endpoint: "http://" + l.Addr().String()})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if n, err := s.Deliver(ctx, events(0, 1)); n != 0 || err == nil || !strings.Contains(err.Error(), "in time") {
		t.Error(n, err)
	}
	l.Close()
	if _, err := s.Deliver(t.Context(), events(0, 1)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Error(err)
	}
}

func TestAReceiversCertificateIsCheckedAndOursIsShown(t *testing.T) {
	r := newReceiver(t, func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		s.Config.ErrorLog = nil
		s.StartTLS()
	})
	ca := file(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate().Raw})))
	if n, err := sink(t, Config{Endpoint: r.URL, TLS: &secure.TLS{CAFile: ca}}).Deliver(t.Context(), events(0, 10)); n != 10 || err != nil {
		t.Error(n, err)
	}
	for name, settings := range map[string]*secure.TLS{
		"no authority of it": nil,
		"another name":       {CAFile: ca, ServerName: "collector.invalid"},
	} {
		if n, err := sink(t, Config{Endpoint: r.URL, TLS: settings}).Deliver(t.Context(), events(0, 1)); n != 0 || err == nil || !strings.Contains(err.Error(), "tls.ca_file") {
			t.Errorf("%s: %d taken, %v", name, n, err)
		}
	}
	if r.calls != 1 {
		t.Errorf("%d calls came through", r.calls)
	}
}

func TestAReplacedTokenIsUsedAtOnce(t *testing.T) {
	var seen []string
	r := newReceiver(t, (*httptest.Server).Start)
	r.answer = func(_ http.ResponseWriter, req *http.Request, _ []*v1.LogRecord) bool {
		seen = append(seen, req.Header.Get("Authorization"))
		return true
	}
	name := file(t, "one")
	s := sink(t, Config{Endpoint: r.URL, BearerTokenFile: name})
	for _, token := range []string{"one", "two"} {
		if err := os.WriteFile(name, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Deliver(t.Context(), events(0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(seen, []string{"Bearer one", "Bearer two"}) {
		t.Error(seen)
	}
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Deliver(t.Context(), events(0, 1)); n != 0 || err == nil || !strings.Contains(err.Error(), "bearer_token_file") {
		t.Error(n, err)
	}
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	const local = "http://127.0.0.1:4318"
	for want, c := range map[string]Config{
		"endpoint is missing":     {},
		"is not a URL":            {Endpoint: "http://secret:pass word@x"},
		"a user, a query":         {Endpoint: "https://user:secret@collector.example"},
		"a query":                 {Endpoint: "https://collector.example/?key=secret"},
		"gRPC is not spoken":      {Endpoint: "grpc://collector.example:4317"},
		"names no host":           {Endpoint: "https:///v1/logs"},
		"http on another machine": {Endpoint: "http://collector.example:4318"},
		"on another machine":      {Endpoint: "http://127.0.0.1.example:4318"},
		"use https":               {Endpoint: local, TLS: &secure.TLS{}},
		"compression":             {Endpoint: local, Compression: "zstd"},
		"cert_file and key_file":  {Endpoint: "https://x", TLS: &secure.TLS{KeyFile: "k"}},
		"read bearer_token_file":  {Endpoint: local, BearerTokenFile: "/nonexistent"},
		"more than one line":      {Endpoint: local, BearerTokenFile: file(t, "secret\r\nX-Injected: 1")},
		"line 1 of headers_file":  {Endpoint: local, HeadersFile: file(t, "a secret without a name")},
		"line 2 of headers_file":  {Endpoint: local, HeadersFile: file(t, "A: b\nBad Name: secret")},
		"is not of the form":      {Endpoint: local, HeadersFile: file(t, "A: secret\x00")},
		"the request's own":       {Endpoint: local, HeadersFile: file(t, "transfer-encoding: secret")},
		"exclude each other":      {Endpoint: local, HeadersFile: file(t, "authorization: secret"), BearerTokenFile: file(t, "secret")},
		"more than 32 headers":    {Endpoint: local, HeadersFile: file(t, manyHeaders(33))},
		"read ca_file":            {Endpoint: "https://x", TLS: &secure.TLS{CAFile: "/nonexistent"}},
	} {
		_, err := New(c)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("want %q: %v", want, err)
		}
	}
	for endpoint, want := range map[string]string{
		local:                          local + "/v1/logs",
		local + "/":                    local + "/v1/logs",
		local + "/otlp/v1/logs":        local + "/otlp/v1/logs",
		"https://collector.example":    "https://collector.example/v1/logs",
		"http://[::1]:4318":            "http://[::1]:4318/v1/logs",
		"http://localhost:4318/custom": "http://localhost:4318/custom",
	} {
		c := Config{Endpoint: endpoint}
		if err := c.Check(); err != nil || c.Target() != want {
			t.Errorf("%s: %q, %v", endpoint, c.Target(), err)
		}
	}
	if err := (&Config{Endpoint: "http://collector.example", Insecure: true}).Check(); err != nil {
		t.Error(err)
	}
}

func manyHeaders(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "H%d: v\n", i)
	}
	return b.String()
}

func FuzzAnswer(f *testing.F) {
	f.Add(200, protobufType, partial(3, "why"))
	f.Add(200, jsonType, []byte(`{"partialSuccess":{"rejectedLogRecords":"3"}}`))
	f.Add(503, protobufType, []byte("\x12\x03abc"))
	f.Add(302, "", []byte(""))
	f.Fuzz(func(t *testing.T, code int, kind string, answer []byte) {
		resp := &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {kind}, "Location": {string(answer)}, "Retry-After": {string(answer)}}}
		err := judge("https://x/v1/logs", resp, answer, time.Unix(0, 0), []string{"secret"})
		if err == nil {
			if code < 200 || code > 299 {
				t.Errorf("%d is taken for success", code)
			}
			return
		}
		if text := err.Error(); strings.Contains(text, "secret") || len(text) > 4*maxReason+500 {
			t.Errorf("%d bytes: %q", len(text), text)
		}
	})
}

func FuzzEncode(f *testing.F) {
	f.Add([]byte(`{"id":"x"}`), "a", "normal")
	f.Fuzz(func(t *testing.T, doc []byte, text, severity string) {
		c := newEncoder("i", "v")
		e := store.Entry{Event: store.Event{Doc: doc, Action: text, Initiator: text, Severity: severity}}
		b, err := proto.Marshal(c.logs([]store.Entry{e}))
		if err != nil {
			t.Fatal(err)
		}
		var back v1.LogsData
		if err := proto.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		body := back.ResourceLogs[0].ScopeLogs[0].LogRecords[0].Body
		if body.GetStringValue() != string(doc) && string(body.GetBytesValue()) != string(doc) {
			t.Errorf("%q became %v", doc, body)
		}
		if json.Valid(doc) && body.GetBytesValue() != nil {
			t.Log("valid JSON that is no UTF-8")
		}
	})
}
