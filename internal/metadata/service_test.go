package metadata_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/metadata"
	"tabard.dev/tabard/internal/vpc"
)

// away is an IAM server that cannot be asked.
type away struct{ err error }

func (a away) Instance(context.Context, grant.Origin, grant.InstanceRequest) (grant.Answer, error) {
	return grant.Answer{}, a.err
}

func TestWhileTheServerIsAwayOnlyIAMTokensAreRefused(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	unreachable := fault.New(fault.Unavailable, metadata.CodeServerAway, "dial tcp 10.0.0.1:8470: connection refused")
	unreachable.RetryAfter = 2500 * time.Millisecond
	for name, c := range map[string]struct {
		err   error
		retry string
	}{
		"it says when to ask again": {unreachable, "3"},
		"it does not answer":        {fmt.Errorf("ask the server: %w", context.DeadlineExceeded), "5"},
	} {
		s.service = s.newService(s.Config.Journal, away{c.err})
		a := s.iam(bearer, "")
		item := a.wantError(503, metadata.CodeServerAway, "")
		for _, part := range []string{"IAM server", "Identity tokens and metadata still work"} {
			if !strings.Contains(item["message"].(string), part) {
				t.Errorf("%s: message %v", name, item["message"])
			}
		}
		if a.header.Get("Retry-After") != c.retry || strings.Contains(a.raw, "10.0.0.1") {
			t.Errorf("%s: Retry-After %q: %s", name, a.header.Get("Retry-After"), a.raw)
		}
		e := s.event("is.metadata.computeresource-token.request")
		check(t, e, "iam-server")
		if e.CorrelationID != a.header.Get("Transaction-Id") || e.Reason.Code != 503 {
			t.Errorf("event %+v", e)
		}
		again := s.identityToken()
		s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: again}).want(200)
		s.certificate(again, s.csr()).want(200)
		// What is wrong with the request itself is said without the server.
		s.iam(again, `{"trusted_profile":{}}`).wantError(400, "missing_field", "field trusted_profile.id")
	}
}

func TestAChangeOfALiveInstanceCountsAtOnce(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	read := func() *answer { return s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer}) }
	read().want(200)
	s.change(func(i *vpc.Instance) { i.Metadata.Enabled = false })
	read().wantError(403, "unauthorized", "")
	check(t, s.event("is.metadata.instance.read"), "metadata-service")
	s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor}).wantError(403, "unauthorized", "")
	check(t, s.event("is.metadata.jwt-token.create"), "metadata-service")
	s.change(func(i *vpc.Instance) { i.Metadata.Enabled, i.Metadata.ResponseHopLimit, i.Name = true, 7, "renamed" })
	m := read().want(200)
	if m["name"] != "renamed" || m["metadata_service"].(map[string]any)["response_hop_limit"] != 7.0 {
		t.Errorf("after the change: %v, %v", m["name"], m["metadata_service"])
	}
	if c := claims(t, s.identityToken()); c["iaas"].(map[string]any)["instanceID"] != s.instance.ID {
		t.Errorf("claims %v", c)
	}
}

func TestEveryRefusalOfACredentialIsExplained(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	token, iam, certificate := newBase+"/token", newBase+"/iam_tokens", newBase+"/certificates"
	actions := map[string]string{
		token: "is.metadata.jwt-token.create", iam: "is.metadata.computeresource-token.request", certificate: "is.metadata.certificate.create",
	}
	for path, method := range map[string]string{token: put, iam: http.MethodPost, certificate: http.MethodPost} {
		for _, c := range []struct{ query, header, value, host, check string }{
			{version, "X-Forwarded-For", "10.0.0.1", "", "direct-request"},
			{version, "X-Accel-Internal", "x", "evil.test", "direct-request"},
			{"", "X-A", "b", "", "api-version"},
			{"version=tomorrow", "X-A", "b", "", "api-version"},
		} {
			a := s.ask(ask{method: method, path: path + "?" + c.query, bearer: bearer, host: c.host, header: http.Header{
				"Metadata-Flavor": {"ibm"}, c.header: {c.value},
			}})
			if a.status < 400 {
				t.Fatalf("%s: status %d", path, a.status)
			}
			e := s.event(actions[path])
			check(t, e, c.check)
			if e.CorrelationID != a.header.Get("Transaction-Id") {
				t.Errorf("%s: the event is of another request", path)
			}
			last := e.Trace[len(e.Trace)-1]
			if last.Outcome != activity.Skip {
				t.Errorf("%s: the trace ends with %+v: the checks that were not reached are missing", path, last)
			}
		}
	}
}

func TestAnInstanceThatAsksTooOftenIsHeldBack(t *testing.T) {
	s := start(t)
	neighbour := s.newInstance("neighbour", "local", 5)
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, neighbour) })
	bearer := s.identityToken()
	s.limits = metadata.Limits{
		IdentityTokens: metadata.Limit{PerSecond: 0.1, Burst: 3},
		IAMTokens:      metadata.Limit{PerSecond: 0.5, Burst: 2},
		Reads:          metadata.Limit{PerSecond: 0.25, Burst: 4},
	}
	s.wire(s.Config.Journal)
	get := func(of string) *answer {
		return s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, of: of})
	}
	read := func() *answer { return s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer}) }
	for range 3 {
		get("").want(200)
	}
	const created = "is.metadata.jwt-token.create"
	before := len(s.events(created))
	for range 5 {
		a := get("")
		a.wantError(429, "rate_limit_exceeded", "")
		if a.header.Get("Retry-After") != "10" && a.header.Get("Retry-After") != "9" {
			t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
		}
	}
	if after := len(s.events(created)); after != before {
		t.Errorf("%d refused requests were written down", after-before)
	}
	// The other budgets, and other instances, are not touched.
	s.iam(bearer, "").want(200)
	s.certificate(bearer, s.csr()).want(200)
	s.iam(bearer, "").wantError(429, "rate_limit_exceeded", "")
	for range 3 {
		read().want(200)
	}
	s.ask(ask{path: "/no/such/path?" + version}).want(404)
	read().wantError(429, "rate_limit_exceeded", "")
	s.ask(ask{path: "/no/such/path?" + version}).want(429)
	get(neighbour.ID).want(200)
	s.clock.advance(11 * time.Second)
	get("").want(200)
	get("").want(429)
	s.clock.advance(time.Hour)
	for range 3 {
		get("").want(200)
	}
	get("").want(429)
	s.clock.advance(-time.Hour) // a clock that is set back must not lock anybody out for long
	get("").want(429)
	s.clock.advance(11 * time.Second)
	get("").want(200)

	s.mu.Lock()
	defer s.mu.Unlock()
	count := func(what string) (n int) {
		for _, seen := range s.seen {
			if seen == what {
				n++
			}
		}
		return n
	}
	for what, want := range map[string]int{
		"identity-token rate_limit_exceeded": 8, "iam-token rate_limit_exceeded": 1, "read rate_limit_exceeded": 1,
		"unknown rate_limit_exceeded": 1, "unknown not_found": 1, "certificate ok": 1, "iam-token ok": 1, "read ok": 3,
	} {
		if got := count(what); got != want {
			t.Errorf("%s was seen %d times, want %d", what, got, want)
		}
	}
}

func TestTheUsualLimitsAreAboveWhatProgramsDo(t *testing.T) {
	s := start(t)
	s.limits = metadata.Limits{}
	s.wire(s.Config.Journal)
	for range 30 { // somebody who tries until it works
		s.ask(ask{method: put, path: newBase + "/token?" + version}).want(400)
	}
	for n := range 100 {
		if a := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor}); a.status != 200 {
			t.Fatalf("request %d: status %d", n, a.status)
		}
	}
}

// notes is a journal that keeps what it is given, or refuses it.
type notes struct {
	mu     sync.Mutex
	refuse bool
	events []*activity.Event
}

func (j *notes) Record(_ context.Context, events ...*activity.Event) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.refuse {
		return fmt.Errorf("disk full")
	}
	j.events = append(j.events, events...)
	return nil
}

func (j *notes) of(action string) []*activity.Event {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(j.events), func(e *activity.Event) bool { return e.Action != action })
}

// ran runs the service's recording of reads to its end.
func (s *stack) ran(service *metadata.Service) {
	ctx, cancel := context.WithCancel(s.T.Context())
	cancel()
	service.Run(ctx)
}

func TestReadsAreCountedAndTheFirstHasAnEvent(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	j := &notes{}
	s.wire(j)
	const reads, list = "is.metadata.instance.read", "is.metadata.instance-key.list"
	read := func(path string) { s.ask(ask{path: "/metadata/v1" + path + "?" + version, bearer: bearer}).want(200) }
	j.refuse = true // no answer waits for the record of a read
	for range 5 {
		read("/instance")
	}
	read("/keys")
	j.refuse = false
	s.clock.advance(2 * time.Minute)
	read("/instance")
	s.ran(s.service)

	total, events := 0, 0
	for _, e := range j.of(reads) {
		events++
		total++
		if e.ResponseData != nil {
			var data struct {
				Reads        int
				Since, Until time.Time
			}
			if err := json.Unmarshal(e.ResponseData, &data); err != nil {
				t.Fatal(err)
			}
			total += data.Reads - 1
			if data.Reads != 4 || data.Until.Before(data.Since) || !strings.Contains(e.Message, "4 more times") {
				t.Errorf("event %s with %s", e.Message, e.ResponseData)
			}
		}
		if e.Target.ID != s.instance.CRN || e.Initiator.Credential.Type != "instance-identity-token" || len(e.Trace) == 0 {
			t.Errorf("event %+v", e)
		}
	}
	if events != 3 || total != 6 {
		t.Errorf("%d events stand for %d reads, want 3 for 6", events, total)
	}
	if got := j.of(list); len(got) != 1 || got[0].ResponseData != nil {
		t.Errorf("events of keys: %+v", got)
	}
}

func TestRefusedReadsAreCountedByWhatFailed(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	j := &notes{}
	s.wire(j)
	const reads = "is.metadata.instance.read"
	refused := func(a ask) *answer {
		a.path = "/metadata/v1/instance?" + version
		return s.ask(a)
	}
	var first string
	for n := range 300 {
		a := refused(ask{bearer: "x"})
		a.want(401)
		if n == 0 {
			first = a.header.Get("Transaction-Id")
		}
		// What else a guest puts into the request makes no new record.
		refused(ask{bearer: bearer, header: http.Header{"X-Forwarded-For": {fmt.Sprint(n)}}}).want(403)
	}
	got := j.of(reads)
	if len(got) != 2 {
		t.Fatalf("%d events of 600 refused reads, want 2 before any other is written", len(got))
	}
	check(t, *got[0], attest.CheckForm)
	check(t, *got[1], "direct-request")
	if got[0].CorrelationID != first || got[0].Reason.Code != 401 || got[1].Reason.Code != 403 {
		t.Errorf("events %+v, %+v", got[0], got[1])
	}
	refused(ask{}).want(401)
	s.ask(ask{path: "/metadata/v1/keys?" + version}).want(401)
	s.clock.advance(2 * time.Minute)
	refused(ask{bearer: "x"}).want(401)
	s.ran(s.service)
	counted := map[string]bool{}
	for _, e := range j.of(reads) {
		if e.ResponseData == nil {
			continue
		}
		var data struct {
			Reads int
			After string
		}
		if err := json.Unmarshal(e.ResponseData, &data); err != nil {
			t.Fatal(err)
		}
		if data.Reads != 299 || e.Outcome != activity.Failure || !strings.Contains(e.Message, "-failure (299 more times)") || len(e.Trace) == 0 {
			t.Errorf("event %s with %s", e.Message, e.ResponseData)
		}
		counted[data.After] = true
	}
	if all := j.of(reads); len(all) != 6 || len(counted) != 2 || !counted[first] {
		t.Errorf("%d events, want the first ones of 3 refusals, of one in another minute, and 2 of many: %v", len(all), counted)
	}
}

func TestARefusedReadIsAnsweredOnceItsRecordIsDurable(t *testing.T) {
	s := start(t)
	j := &notes{refuse: true}
	s.wire(j)
	read := func() *answer { return s.ask(ask{path: "/metadata/v1/instance?" + version}) }
	for range 2 {
		read().want(503)
	}
	j.refuse = false
	read().want(401)
	if got := j.of("is.metadata.instance.read"); len(got) != 1 {
		t.Errorf("%d events", len(got))
	}
}

func TestRefusedRequestsForCredentialsHaveALimitOfTheirOwn(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	unlimited := metadata.Limit{PerSecond: math.Inf(1)}
	s.limits = metadata.Limits{
		IdentityTokens: unlimited, IAMTokens: unlimited, Reads: unlimited, Refused: metadata.Limit{PerSecond: 0.1, Burst: 3},
	}
	s.wire(s.Config.Journal)
	token := func(flavor http.Header) *answer {
		return s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor})
	}
	const created, exchanged = "is.metadata.jwt-token.create", "is.metadata.computeresource-token.request"
	tokens, exchanges := len(s.events(created)), len(s.events(exchanged))
	token(nil).want(400)
	s.iam("x", "").want(401) // the server's refusals count
	s.certificate("x", s.csr()).want(401)
	for range 5 {
		a := token(nil)
		a.wantError(429, "rate_limit_exceeded", "")
		if after := a.header.Get("Retry-After"); after != "10" && after != "9" {
			t.Errorf("Retry-After %q", after)
		}
		s.certificate("x", s.csr()).wantError(429, "rate_limit_exceeded", "")
		s.iam("x", "").wantError(429, "rate_limit_exceeded", "")
		s.iam(bearer, "").wantError(429, "rate_limit_exceeded", "") // nobody can tell it from another one
	}
	if n := len(s.events(created)) - tokens; n != 1 {
		t.Errorf("%d refused requests for identity tokens were written down, want 1", n)
	}
	if n := len(s.events(exchanged)) - exchanges; n != 1 {
		t.Errorf("%d refused requests for IAM tokens were written down, want 1", n)
	}
	// What succeeds is not held back, and uses up nothing.
	for range 5 {
		token(flavor).want(200)
		s.certificate(bearer, s.csr()).want(200)
	}
	s.clock.advance(11 * time.Second)
	for range 5 {
		s.iam(bearer, "").want(200)
	}
	token(nil).want(400)
	token(nil).want(429)
}

func TestReadsThatTheJournalDoesNotTakeAreKept(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	j := &notes{refuse: true}
	s.wire(j)
	s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: bearer}).want(200)
	s.ran(s.service)
	if len(j.of("is.metadata.instance.read")) != 0 {
		t.Fatal("the journal took it")
	}
	j.refuse = false
	s.ran(s.service)
	if len(j.of("is.metadata.instance.read")) != 1 {
		t.Error("the event is lost")
	}
}

func TestReadsAreWrittenDownWhileTheServiceRuns(t *testing.T) {
	s := start(t)
	bearer := s.identityToken()
	ctx, cancel := context.WithCancel(t.Context())
	before := goleak.IgnoreCurrent()
	var wg sync.WaitGroup
	j := &notes{}
	s.wire(j)
	wg.Go(func() { s.service.Run(ctx) })
	s.ask(ask{path: "/metadata/v1/keys?" + version, bearer: bearer}).want(200)
	for len(j.of("is.metadata.instance-key.list")) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	goleak.VerifyNone(t, before)
}

func TestConcurrentRequestsOfManyInstancesStayApart(t *testing.T) {
	s := start(t)
	var ids []string
	s.update(func(tx *directory.Tx) {
		for n := range byte(8) {
			i := s.newInstance(fmt.Sprintf("m%d", n), "local", 10+n)
			s.d.Instances.Put(tx, i)
			ids = append(ids, i.ID)
		}
	})
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Go(func() {
			for range 20 {
				m := s.ask(ask{method: put, path: newBase + "/token?" + version, header: flavor, of: id}).want(200)
				raw := m["access_token"].(string)
				if got := claims(t, raw)["iaas"].(map[string]any)["instanceID"]; got != id {
					t.Errorf("instance %s got a token of %v", id, got)
				}
				if got := s.ask(ask{path: "/metadata/v1/instance?" + version, bearer: raw, of: id}).want(200)["id"]; got != id {
					t.Errorf("instance %s reads of %v", id, got)
				}
			}
		})
	}
	wg.Wait()
}

// What an identity token costs beside its signature.
func BenchmarkIdentityToken(b *testing.B) {
	s := startAs(b, "RS256")
	s.wire(&discard{})
	h := s.service.Handler(s.instance.ID)
	b.Run("signature alone", func(b *testing.B) {
		c := s.identityClaims()
		for b.Loop() {
			if _, err := s.host.Sign(c, ""); err != nil {
				b.Fatal(err)
			}
		}
	})
	for name, call := range map[string]func() *http.Request{
		"token": func() *http.Request {
			r := httptest.NewRequest(put, newBase+"/token?"+version, nil)
			r.Header = flavor.Clone()
			return r
		},
		"read": func() *http.Request {
			r := httptest.NewRequest(http.MethodGet, "/metadata/v1/instance?"+version, nil)
			return r
		},
	} {
		bearer := s.identityToken()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r := call()
				r.Host = "169.254.169.254"
				r.Header.Set("Authorization", "Bearer "+bearer)
				rec := httptest.NewRecorder()
				h.ServeHTTP(rec, r)
				if rec.Code != 200 {
					b.Fatal(rec.Body)
				}
			}
		})
	}
}

// discard is a journal that keeps nothing.
type discard struct{}

func (discard) Record(context.Context, ...*activity.Event) error { return nil }
