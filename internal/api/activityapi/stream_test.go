package activityapi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
)

// message is one of a stream. Signs of life have an id at most.
type message struct{ id, event, data string }

// reader is a client of a stream.
type reader struct {
	t      *testing.T
	cancel context.CancelFunc
	res    *http.Response
	lines  *bufio.Scanner
}

// serving starts a server with streams.
func serving(t *testing.T, e *apitest.Env, o activityapi.StreamOptions) string {
	t.Helper()
	activityapi.RegisterStream(e.Mux, e.Config, e.Store, o)
	srv := httptest.NewServer(api.WithTransaction(e.Mux))
	t.Cleanup(srv.Close)
	return srv.URL
}

func request(t *testing.T, url, bearer string, header ...string) (*http.Response, context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return res, cancel
}

// follow begins a stream and waits until the server has.
func follow(t *testing.T, url, bearer string, header ...string) *reader {
	t.Helper()
	res, cancel := request(t, url, bearer, header...)
	r := &reader{t: t, cancel: cancel, res: res, lines: bufio.NewScanner(res.Body)}
	r.lines.Buffer(nil, 1<<20)
	t.Cleanup(r.close)
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("status %d", res.StatusCode)
	}
	if m := r.next(); m.data != "" {
		t.Fatalf("the stream begins with %+v", m)
	}
	return r
}

func (r *reader) close() {
	r.cancel()
	_ = r.res.Body.Close()
}

// next returns the next message. At the stream's end it is the zero one.
func (r *reader) next() (m message) {
	r.t.Helper()
	for r.lines.Scan() {
		line := r.lines.Text()
		if line == "" {
			return m
		}
		name, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimPrefix(value, " "); name {
		case "id":
			m.id = value
		case "event":
			m.event = value
		case "data":
			m.data += value
		}
	}
	return message{}
}

// event returns the next message that is not a sign of life.
func (r *reader) event() message {
	r.t.Helper()
	for {
		if m := r.next(); m.data != "" || m == (message{}) {
			return m
		}
	}
}

func action(t *testing.T, m message) string {
	t.Helper()
	var e struct{ Action string }
	if m.event != "" {
		t.Fatalf("came %+v", m)
	}
	if err := json.Unmarshal([]byte(m.data), &e); err != nil {
		t.Fatalf("%q: %v", m.data, err)
	}
	return e.Action
}

func (r *reader) want(actions ...string) (last string) {
	r.t.Helper()
	for _, want := range actions {
		m := r.event()
		if got := action(r.t, m); got != want {
			r.t.Fatalf("came %q, want %q", got, want)
		}
		last = m.id
	}
	return last
}

// code returns why a stream ends.
func (r *reader) code() string {
	r.t.Helper()
	m := r.event()
	var end struct{ Code string }
	if err := json.Unmarshal([]byte(m.data), &end); err != nil || m.event != "end" {
		r.t.Fatalf("came %+v, %v", m, err)
	}
	if m := r.next(); m != (message{}) {
		r.t.Errorf("after the end came %+v", m)
	}
	return end.Code
}

func owner(e *apitest.Env) string { return e.Owner.AccountID + "/" + e.Owner.IAMID }

func TestAStreamBringsTheAccountsEventsAsTheyCome(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{})
	happened(e, e.Owner.AccountID, "a.b.before", "t", time.Minute)
	all := follow(t, url+"/v1/events/stream", owner(e))
	some := follow(t, url+"/v1/events/stream?action=a.c.*&outcome=success", owner(e))
	theirs := follow(t, url+"/v1/events/stream", e.Other.AccountID+"/"+e.Other.IAMID)
	happened(e, e.Other.AccountID, "a.c.theirs", "t", time.Minute)
	happened(e, e.Owner.AccountID, "a.b.first", "t", time.Minute)
	happened(e, e.Owner.AccountID, "a.c.second", "t", time.Minute)
	all.want("a.b.first", "a.c.second")
	some.want("a.c.second")
	theirs.want("a.c.theirs")
	happened(e, e.Owner.AccountID, "a.c.third", "t", time.Minute)
	all.want("a.c.third")
	some.want("a.c.third")
}

// The lines of a stream are its messages' ends: an event that has some of its
// own would make others.
func TestAnEventCannotMakeAnotherOne(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{})
	r := follow(t, url+"/v1/events/stream", owner(e))
	forged := "{\"action\":\"a.b.c\",\r\n\n\"message\":\"x\\n\\nid: 1\\ndata: {}\\n\\n\"\n\nevent: end\ndata: {}\n\n}"
	if err := e.Store.Commit(t.Context(), store.Batch{Events: []store.Event{{Time: noon, AccountID: e.Owner.AccountID, Action: "a.b.c", Doc: []byte(forged)}}}); err != nil {
		t.Fatal(err)
	}
	happened(e, e.Owner.AccountID, "a.b.next", "t", time.Minute)
	if m := r.event(); !strings.HasPrefix(m.data, `{"action":"a.b.c"`) || m.event != "" {
		t.Errorf("came %+v", m)
	}
	r.want("a.b.next")
}

func TestAStreamGoesOnWhereItsClientWas(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{Heartbeat: time.Millisecond, Check: time.Millisecond})
	r := follow(t, url+"/v1/events/stream", owner(e))
	happened(e, e.Owner.AccountID, "a.b.0", "t", time.Minute)
	last := r.want("a.b.0")
	// What others do moves a quiet client on, too.
	happened(e, e.Other.AccountID, "a.b.theirs", "t", time.Minute)
	var quiet message
	for quiet.id == "" || quiet.id == last {
		quiet = r.next()
	}
	r.close()
	var want []string
	for n := range 260 { // more than go out together
		want = append(want, fmt.Sprint("a.b.", n+1))
		happened(e, e.Owner.AccountID, want[n], "t", time.Minute)
		if n%3 == 0 {
			happened(e, e.Other.AccountID, "a.b.theirs", "t", time.Minute)
		}
	}
	for _, id := range []string{last, quiet.id} {
		r = follow(t, url+"/v1/events/stream?after=0", owner(e), "Last-Event-ID", id)
		r.want(want...)
		r.close()
	}
	r = follow(t, url+"/v1/events/stream?after="+last+"&action=a.b.2*&limit=12", owner(e))
	r.want(slices.DeleteFunc(want, func(a string) bool { return !strings.HasPrefix(a, "a.b.2") })[:12]...)
	if code := r.code(); code != "limit" {
		t.Errorf("ended with %s", code)
	}
	r = follow(t, url+"/v1/events/stream?since=2m", owner(e))
	r.want("a.b.0", "a.b.1")
}

// While one stream follows another whatever the moment that it began at.
func TestStreamsThatBeginWhileEventsComeMissNone(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{})
	const events = 300
	first := follow(t, url+"/v1/events/stream", owner(e))
	var writing sync.WaitGroup
	writing.Go(func() {
		for n := range events {
			happened(e, e.Owner.AccountID, fmt.Sprint("a.b.", n), "t", time.Minute)
		}
	})
	var got []string
	r := first
	var last string
	for len(got) < events {
		m := r.event()
		got, last = append(got, action(t, m)), m.id
		if len(got)%37 == 0 {
			r.close()
			r = follow(t, url+"/v1/events/stream", owner(e), "Last-Event-ID", last)
		}
	}
	writing.Wait()
	for n, a := range got {
		if a != fmt.Sprint("a.b.", n) {
			t.Fatalf("event %d is %s", n, a)
		}
	}
}

// revocable lets a test take tokens away.
type revocable struct {
	api.Authenticator
	gone atomic.Bool
}

func (a *revocable) Caller(raw string) (*token.Claims, error) {
	if a.gone.Load() {
		return nil, fault.New(fault.Unauthenticated, "token_invalid", "revoked")
	}
	return a.Authenticator.Caller(raw)
}

func TestAStreamEndsWhenItsCallerMayNotReadAnyMore(t *testing.T) {
	e := start(t)
	auth := &revocable{Authenticator: e.Config.Auth}
	e.Config.Auth = auth
	url := serving(t, e, activityapi.StreamOptions{Check: time.Millisecond})
	e.Grant("IBMid-READER", "activity", "Viewer")
	mine, readers := follow(t, url+"/v1/events/stream", owner(e)), follow(t, url+"/v1/events/stream", e.Owner.AccountID+"/IBMid-READER")
	d := e.Config.Directory
	err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		for _, p := range d.Policies.All() {
			if slices.ContainsFunc(p.Subject, func(a access.Attribute) bool { return fmt.Sprint(a.Value) == fmt.Sprint(access.Text("IBMid-READER")) }) {
				d.Policies.Delete(tx, p)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if code := readers.code(); code != "not_authorized" {
		t.Errorf("without a policy: %s", code)
	}
	auth.gone.Store(true)
	if code := mine.code(); code != "token_invalid" {
		t.Errorf("without a token: %s", code)
	}
}

func TestStreamsEndWithTheServer(t *testing.T) {
	e := start(t)
	stopping := make(chan struct{})
	url := serving(t, e, activityapi.StreamOptions{Stopping: stopping})
	r := follow(t, url+"/v1/events/stream", owner(e))
	close(stopping)
	if code := r.code(); code != "stopping" {
		t.Errorf("ended with %s", code)
	}
}

func TestAnAccountHasSoManyStreams(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{PerAccount: 2, All: 3, Check: time.Millisecond, Heartbeat: time.Millisecond})
	stream := url + "/v1/events/stream"
	theirs := e.Other.AccountID + "/" + e.Other.IAMID
	refused := func(bearer string) {
		t.Helper()
		res, cancel := request(t, stream, bearer)
		defer cancel()
		defer res.Body.Close()
		if res.StatusCode != http.StatusTooManyRequests || res.Header.Get("Retry-After") == "" {
			t.Errorf("status %d", res.StatusCode)
		}
	}
	first := follow(t, stream, owner(e))
	follow(t, stream, owner(e))
	refused(owner(e))
	follow(t, stream, theirs)
	refused(theirs)
	first.close()
	for { // the server takes note at its next write
		res, cancel := request(t, stream, owner(e))
		cancel()
		_ = res.Body.Close()
		if res.StatusCode == http.StatusOK {
			return
		}
	}
}

func TestAStreamSaysWhatWasDropped(t *testing.T) {
	e := start(t)
	url := serving(t, e, activityapi.StreamOptions{})
	happened(e, e.Owner.AccountID, "a.b.gone", "t", 24*time.Hour)
	happened(e, e.Owner.AccountID, "a.b.left", "t", time.Minute)
	if err := e.Store.DropDay(t.Context(), store.Day(noon.AddDate(0, 0, -1)), store.Batch{}); err != nil {
		t.Fatal(err)
	}
	r := follow(t, url+"/v1/events/stream?after=0&action=a.*", owner(e))
	m := r.event()
	var gap struct{ Day, First, Last int }
	if err := json.Unmarshal([]byte(m.data), &gap); err != nil || m.event != "gap" || gap.Day != store.Day(noon.AddDate(0, 0, -1)) || gap.First != gap.Last {
		t.Errorf("came %+v, %v", m, err)
	}
	r.want("a.b.left")
	r.close()
	follow(t, url+"/v1/events/stream?after="+fmt.Sprint(gap.Last)+"&action=a.*", owner(e)).want("a.b.left")
}

func TestBadParametersOfAStreamAreRefused(t *testing.T) {
	e := start(t)
	activityapi.RegisterStream(e.Mux, e.Config, e.Store, activityapi.StreamOptions{})
	for _, q := range []string{"until=1h", "after=-1", "after=x", "after=99999999", "limit=0", "limit=x", "since=x", "outcome=x", "severity=x", "action=*.x"} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/events/stream?" + q}), 400, "invalid_parameter")
	}
	for _, id := range []string{"x", "-1", "9999999", "1e3"} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/events/stream", Header: map[string]string{"Last-Event-ID": id}}), 400, "invalid_parameter")
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/stream", As: nobody}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Path: "/v1/events/stream", Anonymous: true}), 401, "token_missing")
	e.Do(apitest.Request{Method: http.MethodHead, Path: "/v1/events/stream"}).Want(200)
}

var denied = activity.Check{Name: "c", Outcome: activity.Fail}

func TestEventsAreFoundByAllThatTheyHave(t *testing.T) {
	e := start(t)
	happened(e, e.Owner.AccountID, "a.b.one", "t1", 3*time.Minute)
	happened(e, e.Owner.AccountID, "a.c.two", "t2", 2*time.Minute, denied)
	happened(e, e.Other.AccountID, "a.b.theirs", "t1", time.Minute)
	for query, want := range map[string][]string{
		"action=a.b.one": {"a.b.one"}, "action=a.b.*": {"a.b.one"}, "action_prefix=a.": {"a.c.two", "a.b.one"}, "action=a.b": {},
		"severity=critical": {"a.c.two"}, "severity=normal&action=a.*": {}, "initiator=IBMid-" + e.Owner.AccountID[:4]: {"a.c.two", "a.b.one"},
		"initiator=IBMid-" + e.Other.AccountID[:4] + "x": {}, "authn_id=x": {}, "target=x": {}, "action=a.*&outcome=failure": {"a.c.two"},
		"action=a.*&since=150s": {"a.c.two"}, "action=a.*&until=150s": {"a.b.one"}, "correlation_id=t1": {"a.b.one"},
	} {
		if got, _ := list(e, "", query); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}
	for _, query := range []string{"severity=x", "action=a*b", "action=a*&action_prefix=b", "action_prefix=a*", "target=" + strings.Repeat("x", 5000)} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/events?" + query}), 400, "invalid_parameter")
	}
	// A page keeps its filters.
	_, next := list(e, "", "action_prefix=a.&severity=critical&limit=1")
	if next != "" {
		t.Errorf("next %q", next)
	}
	if _, next = list(e, "", "action_prefix=a.&limit=1"); next == "" {
		t.Fatal("no next page")
	}
	if got, next := list(e, "", "start="+next); !slices.Equal(got, []string{"a.b.one"}) || next != "" {
		t.Errorf("the next page has %q", got)
	}
}
