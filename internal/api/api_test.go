package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
)

const (
	nobody = "IBMid-NOBODY"
	viewer = "IBMid-VIEWER"

	actionGet    = "iam-identity.serviceid.get"
	actionCreate = "iam-identity.serviceid.create"
	actionUpdate = "iam-identity.serviceid.update"
	actionDelete = "iam-identity.serviceid.delete"

	eventCreate = "test.robot.create"
	eventUpdate = "test.robot.update"
	eventDelete = "test.robot.delete"
	eventAPIKey = "test.robot-apikey.create"
)

// family is a tiny one with a route of each kind. Its robots are service IDs.
type family struct {
	*apitest.Env
	d        *directory.Directory
	store    *breakable
	prepared atomic.Int64
}

// breakable is a store whose commits can be made to fail.
type breakable struct {
	store.Store
	broken atomic.Bool
}

func (b *breakable) Commit(ctx context.Context, batch store.Batch) error {
	if b.broken.Load() {
		return errors.New("write /secret/path: no space left on device")
	}
	return b.Store.Commit(ctx, batch)
}

type robotBody struct {
	Name  string   `json:"name"`
	Tags  []string `json:"tags"`
	Count int      `json:"count"`
	Inner struct {
		On bool `json:"on"`
	} `json:"inner"`
	Fail string `json:"fail"`
}

func start(t *testing.T) *family {
	t.Helper()
	e := apitest.New(t)
	f := &family{Env: e, store: &breakable{Store: e.Store}}
	catalog := e.Config.Directory.Builtin()
	var err error
	f.d, err = directory.Open(t.Context(), directory.Config{Store: f.store, Catalog: catalog, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	e.Config.Directory = f.d
	routes := &api.Family{Config: e.Config, Mux: e.Mux, Service: "Test Service", Shape: api.PlainShape}
	api.Read(routes, "GET /robots/{id}", actionGet, f.load, f.show)
	api.List(routes, "GET /robots", actionGet, f.list)
	api.Change(routes, "POST /robots", actionCreate, eventCreate, f.none, f.create)
	api.Change(routes, "PUT /robots/{id}", actionUpdate, eventUpdate, loading[robotBody](f.load), f.update(true))
	api.Change(routes, "PATCH /robots/{id}", actionUpdate, eventUpdate, loading[robotBody](f.load), f.update(false))
	api.Change(routes, "DELETE /robots/{id}", actionDelete, eventDelete, loading[api.None](f.load), f.remove)
	api.Change(routes, "POST /robots/{id}/apikey", actionUpdate, eventAPIKey, loading[api.None](f.load), f.touch)
	api.ChangeAfter(routes, "POST /prepared", actionCreate, eventCreate, f.prepare, f.none, f.create)
	api.Open(routes, "GET /open", "it says nothing", func(*api.Call) (api.Reply, error) { return api.Reply{Body: map[string]bool{"open": true}}, nil })
	api.Open(routes, "GET /unencodable", "it cannot", func(*api.Call) (api.Reply, error) { return api.Reply{Body: func() {}}, nil })
	api.Read(routes, "GET /panic", actionGet, f.load, func(*api.Call, *identity.ServiceID) (api.Reply, error) { panic("unreachable") })
	api.Open(routes, "GET /panics", "it panics", func(*api.Call) (api.Reply, error) { panic("boom /secret/path") })
	api.Open(routes, "GET /retry", "it is busy", func(*api.Call) (api.Reply, error) {
		e := fault.New(fault.Limited, "rate_limit_exceeded", "Slow down.")
		e.RetryAfter = 7 * time.Second
		return api.Reply{}, e
	})
	api.NotFoundRoute(e.Mux, e.Config)
	return f
}

func loading[B any](load func(*api.Call) (*identity.ServiceID, api.Target, error)) func(*api.Call, *B) (*identity.ServiceID, api.Target, error) {
	return func(c *api.Call, _ *B) (*identity.ServiceID, api.Target, error) { return load(c) }
}

func (f *family) target(c *api.Call, r *identity.ServiceID) api.Target {
	return api.Target{
		Resource: c.InAccount("iam-identity", access.ResourceType, "serviceid", access.Resource, r.ID),
		CRN:      c.Names.Of("test", "", r.AccountID, "", "robot", r.ID).String(), Name: r.Name, TypeURI: "test/robot",
	}
}

func (f *family) load(c *api.Call) (*identity.ServiceID, api.Target, error) {
	r, ok := f.d.ServiceIDs.Get(c.R.PathValue("id"))
	if !ok || r.AccountID != c.Account() {
		return nil, api.Target{}, api.NotFound("robot", c.R.PathValue("id"))
	}
	return r, f.target(c, r), nil
}

func (f *family) none(c *api.Call, _ *robotBody) (struct{}, api.Target, error) {
	return struct{}{}, api.Target{Resource: c.InAccount("iam-identity", access.ResourceType, "serviceid")}, nil
}

func (f *family) show(_ *api.Call, r *identity.ServiceID) (api.Reply, error) {
	return api.Reply{Body: map[string]string{"id": r.ID, "name": r.Name}, ETag: r.Tag(r.ID)}, nil
}

func (f *family) list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	limit, err := c.IntParameter("limit", 50, 1, 100)
	if err != nil {
		return api.Reply{}, err
	}
	var after api.Cursor
	if s := c.R.URL.Query().Get("start"); s != "" {
		if after, err = api.ParseCursor("start", s); err != nil {
			return api.Reply{}, err
		}
	}
	robots := f.d.ServiceIDsByAccount.Get(c.Account())
	robots = slices.DeleteFunc(robots, func(r *identity.ServiceID) bool {
		return !may(c.InAccount("iam-identity", access.ResourceType, "serviceid", access.Resource, r.ID))
	})
	page, next := api.Page(robots, after, limit, func(r *identity.ServiceID) string { return api.SortKey(r.CreatedAt, r.ID) })
	body := map[string]any{"robots": []string{}}
	names := []string{}
	for _, r := range page {
		names = append(names, r.Name)
	}
	body["robots"] = names
	if next != nil {
		body["next"] = next.String()
	}
	return api.Reply{Body: body}, nil
}

func (f *family) create(c *api.Call, tx *directory.Tx, b *robotBody, _ struct{}) (api.Reply, api.Target, error) {
	r := &identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: c.Account(), Name: b.Name}
	f.d.ServiceIDs.Put(tx, r)
	switch b.Fail {
	case "plain":
		return api.Reply{}, api.Target{}, errors.New("a cause at /secret/path")
	case "conflict":
		return api.Reply{}, api.Target{}, fault.New(fault.Conflict, "name_taken", "The name is taken.")
	case "panic":
		panic("boom /secret/path")
	case "authorize":
		if err := c.Authorize("iam-identity.account.update", c.InAccount("billing")); err != nil {
			return api.Reply{}, api.Target{}, err
		}
	}
	reply := api.Reply{
		Status: http.StatusCreated, Body: map[string]string{"id": r.ID, "name": r.Name},
		ResponseData: map[string]any{"name": r.Name, "tags": len(b.Tags)},
	}
	return reply, f.target(c, r), nil
}

func (f *family) update(required bool) func(*api.Call, *directory.Tx, *robotBody, *identity.ServiceID) (api.Reply, api.Target, error) {
	return func(c *api.Call, tx *directory.Tx, b *robotBody, r *identity.ServiceID) (api.Reply, api.Target, error) {
		if err := c.IfMatch(&r.Meta, r.ID, required); err != nil {
			return api.Reply{}, api.Target{}, err
		}
		next := *r
		next.Name += b.Name
		f.d.ServiceIDs.Put(tx, &next)
		return api.Reply{Body: map[string]string{"name": next.Name}, ETag: next.Tag(next.ID)}, f.target(c, &next), nil
	}
}

func (f *family) remove(c *api.Call, tx *directory.Tx, _ *api.None, r *identity.ServiceID) (api.Reply, api.Target, error) {
	f.d.ServiceIDs.Delete(tx, r)
	return api.Reply{Status: http.StatusNoContent}, f.target(c, r), nil
}

func (f *family) touch(c *api.Call, tx *directory.Tx, _ *api.None, r *identity.ServiceID) (api.Reply, api.Target, error) {
	next := *r
	f.d.ServiceIDs.Put(tx, &next)
	return api.Reply{}, f.target(c, r), nil
}

func (f *family) prepare(c *api.Call, b *robotBody) error {
	c.About(api.Target{CRN: "crn:of:" + b.Name, Name: b.Name, TypeURI: "test/robot"})
	if err := c.Authorize(actionCreate, c.InAccount("iam-identity")); err != nil {
		return err
	}
	f.prepared.Add(1)
	if b.Fail == "prepare" {
		return fault.New(fault.Invalid, "unreachable", "It could not be fetched.")
	}
	return nil
}

// as makes the helpers fail t, until the returned function is called.
func (f *family) as(t testing.TB) func() {
	before := f.T
	f.T = t
	return func() { f.T = before }
}

// robot adds one and returns its id.
func (f *family) robot(name string) string {
	f.T.Helper()
	return f.Do(apitest.Request{Method: http.MethodPost, Path: "/robots", Body: map[string]string{"name": name}}).Want(201)["id"].(string)
}

// event returns the newest event of the account.
func (f *family) event() activity.Event {
	f.T.Helper()
	return f.Events(1)[0]
}

// wantError fails the test unless the answer is one error with the code.
func wantError(t *testing.T, r *apitest.Response, status int, code string) string {
	t.Helper()
	m := r.Want(status)
	items, _ := m["errors"].([]any)
	if len(items) != 1 || m["status_code"] != float64(status) || m["trace"] == "" || m["trace"] != r.Header.Get(api.TransactionHeader) {
		t.Fatalf("error has the wrong shape: %s", r.Raw)
	}
	item := items[0].(map[string]any)
	if item["code"] != code || item["message"] == "" {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
	if strings.Contains(string(r.Raw), "secret") || strings.Contains(string(r.Raw), "goroutine") {
		t.Fatalf("the answer tells internals: %s", r.Raw)
	}
	return item["message"].(string)
}

var everyRoute = []struct{ method, path string }{
	{"GET", "/robots/x"}, {"GET", "/robots"}, {"POST", "/robots"}, {"PUT", "/robots/x"}, {"PATCH", "/robots/x"}, {"DELETE", "/robots/x"},
	{"POST", "/prepared"}, {"GET", "/open"}, {"GET", "/panics"},
}

func TestNoRouteAnswersWithoutAToken(t *testing.T) {
	f := start(t)
	for _, r := range everyRoute {
		before := len(f.Events(100))
		for _, header := range []string{"", "   ", "Basic abc", "Basic " + f.Owner.AccountID + "/" + f.Owner.IAMID, "Bearer  "} {
			got := f.Do(apitest.Request{Method: r.method, Path: r.path, Anonymous: true, Header: map[string]string{"Authorization": header}, Body: "{}"})
			if header == "Bearer  " {
				got.Want(401)
				continue
			}
			wantError(t, got, 401, "token_missing")
		}
		// Nobody is named by it, so it is not worth an event, unlike a bad token.
		if after := len(f.Events(100)); after > before+1 {
			t.Errorf("%s %s: %d events of requests without a token", r.method, r.path, after-before)
		}
	}
}

func TestABadTokenIsRefusedAndRecordedForTheOperator(t *testing.T) {
	f := start(t)
	for _, r := range everyRoute {
		got := f.Do(apitest.Request{Method: r.method, Path: r.path, Anonymous: true, Header: map[string]string{"Authorization": "Bearer forged"}, Body: "{}"})
		wantError(t, got, 401, "token_invalid")
		e := f.event()
		failed, ok := e.Trace.Failed()
		if e.CorrelationID != got.Header.Get(api.TransactionHeader) || e.Outcome != activity.Failure || e.Reason.Code != 401 || !ok || failed.Name != "access-token" {
			t.Errorf("%s %s: event %+v", r.method, r.path, e)
		}
		if strings.Contains(fmt.Sprintf("%+v", e), "forged") {
			t.Errorf("the token stands in the event: %+v", e)
		}
	}
}

func TestTheSchemeMayBeLeftOut(t *testing.T) {
	f := start(t)
	token := f.Owner.AccountID + "/" + f.Owner.IAMID
	for _, header := range []string{token, "Bearer " + token, "bearer " + token, "BEARER   " + token, "  Bearer " + token + " "} {
		f.Do(apitest.Request{Path: "/open", Anonymous: true, Header: map[string]string{"Authorization": header}}).Want(200)
	}
}

func TestACallerWithoutTheRightIsRefusedAndTheRefusalIsExplained(t *testing.T) {
	f := start(t)
	id := f.robot("r2")
	f.Grant(viewer, "iam-identity", "Viewer")
	for _, c := range []struct {
		as, method, path, action, event string
	}{
		{nobody, "GET", "/robots/" + id, actionGet, actionGet},
		{nobody, "POST", "/robots", actionCreate, eventCreate},
		{viewer, "POST", "/robots", actionCreate, eventCreate},
		{viewer, "POST", "/prepared", actionCreate, eventCreate},
		{viewer, "PUT", "/robots/" + id, actionUpdate, eventUpdate},
		{viewer, "DELETE", "/robots/" + id, actionDelete, eventDelete},
	} {
		r := f.Do(apitest.Request{Method: c.method, Path: c.path, As: c.as, Body: "{}"})
		if m := wantError(t, r, 403, "not_authorized"); !strings.Contains(m, c.action) || !strings.Contains(m, c.as) {
			t.Errorf("message %q does not name the caller and the action", m)
		}
		e := f.event()
		_, explained := e.Trace.Failed()
		if e.Action != c.event || e.Outcome != activity.Failure || e.Reason.Code != 403 || e.Severity != activity.Critical || !explained ||
			e.Initiator.ID != c.as || e.AccountID != f.Owner.AccountID || e.CorrelationID != r.Header.Get(api.TransactionHeader) ||
			!strings.HasSuffix(e.Message, "-failure") {
			t.Errorf("%s %s: event %+v", c.method, c.path, e)
		}
	}
	if f.prepared.Load() != 0 {
		t.Error("work was done for a caller without the right")
	}
	f.Do(apitest.Request{Path: "/robots/" + id, As: viewer}).Want(200)
	if got := f.d.ServiceIDs.Len(); got != 1 {
		t.Errorf("%d robots, want 1", got)
	}
}

func TestAnotherAccountsObjectsAreNotFound(t *testing.T) {
	f := start(t)
	id := f.robot("r2")
	for _, method := range []string{"GET", "PUT", "DELETE"} {
		r := f.Do(apitest.Request{Method: method, Path: "/robots/" + id, As: f.Other.IAMID, Body: "{}", Header: map[string]string{"If-Match": "*"}})
		wantError(t, r, 404, "not_found")
	}
	m := f.Do(apitest.Request{Path: "/robots", As: f.Other.IAMID}).Want(200)
	if n := len(m["robots"].([]any)); n != 0 {
		t.Errorf("%d robots of another account are listed", n)
	}
	// A right here is none there, even for a caller who is in both.
	f.Grant(viewer, "iam-identity", "Viewer")
	r := f.Do(apitest.Request{Path: "/robots/" + id, As: viewer, Account: f.Other.AccountID})
	wantError(t, r, 404, "not_found")
}

func TestAListShowsWhatTheCallerMaySeeAndRefusesNobody(t *testing.T) {
	f := start(t)
	f.robot("a")
	f.robot("b")
	if n := len(f.Do(apitest.Request{Path: "/robots", As: nobody}).Want(200)["robots"].([]any)); n != 0 {
		t.Errorf("%d robots for somebody without rights", n)
	}
	f.Grant(viewer, "iam-identity", "Viewer")
	if n := len(f.Do(apitest.Request{Path: "/robots", As: viewer}).Want(200)["robots"].([]any)); n != 2 {
		t.Errorf("%d robots, want 2", n)
	}
}

func TestAChangeIsRecordedOnceWithWhatChanged(t *testing.T) {
	f := start(t)
	r := f.Do(apitest.Request{
		Method: "POST", Path: "/robots", Body: `{"name":"r2","tags":["x"]}`,
		Header: map[string]string{"Transaction-Id": "my-tx", "User-Agent": "me/1"},
	})
	id := r.Want(201)["id"].(string)
	e := f.event()
	if e.Action != eventCreate || e.Outcome != activity.Success || e.Reason.Code != 201 || e.Severity != activity.Warning || e.CorrelationID != "my-tx" {
		t.Errorf("event %+v", e)
	}
	if e.Message != "Test Service: create robot r2" || e.Target.Name != "r2" || e.Target.TypeURI != "test/robot" || !strings.HasSuffix(e.Target.ID, ":robot:"+id) {
		t.Errorf("message %q, target %+v", e.Message, e.Target)
	}
	if e.Initiator.ID != f.Owner.IAMID || e.Initiator.TypeURI != activity.UserType || e.Initiator.Host.Agent != "me/1" || e.Initiator.Host.Address != "192.0.2.1" {
		t.Errorf("initiator %+v", e.Initiator)
	}
	var data map[string]any
	if err := json.Unmarshal(e.ResponseData, &data); err != nil || data["name"] != "r2" || data["tags"] != 1.0 {
		t.Errorf("response data %s", e.ResponseData)
	}
	if err := json.Unmarshal(e.RequestData, &data); err != nil || data["method"] != "POST" || data["path"] != "/robots" {
		t.Errorf("request data %s", e.RequestData)
	}
	if len(e.Trace) == 0 {
		t.Error("the decision is not in the event")
	}
	if !strings.HasPrefix(e.LogSourceCRN, "crn:v1:bluemix:public:test:us-south:a/"+f.Owner.AccountID) {
		t.Errorf("log source %s", e.LogSourceCRN)
	}
	stored, err := f.Store.Events(t.Context(), store.Query{AccountID: f.Owner.AccountID, CorrelationID: "my-tx", Limit: 10})
	if err != nil || len(stored) != 1 {
		t.Errorf("%d events, error %v", len(stored), err)
	}
	f.Do(apitest.Request{Method: "DELETE", Path: "/robots/" + id}).Want(204)
	if e := f.event(); e.Action != eventDelete || e.Severity != activity.Critical || e.Reason.Code != 204 || e.Target.Name != "r2" {
		t.Errorf("event %+v", e)
	}
	key := f.robot("r3")
	f.Do(apitest.Request{Method: "POST", Path: "/robots/" + key + "/apikey"}).Want(200)
	if e := f.event(); e.Severity != activity.Critical {
		t.Errorf("a change of credentials has severity %s", e.Severity)
	}
}

func TestAChangeThatFailsChangesNothingAndIsRecorded(t *testing.T) {
	f := start(t)
	for _, c := range []struct {
		fail   string
		status int
		code   string
	}{
		{"plain", 500, "internal_error"}, {"conflict", 409, "name_taken"}, {"authorize", 403, "not_authorized"},
	} {
		as := f.Owner.IAMID
		if c.fail == "authorize" {
			as = "IBMid-ROBOTIC"
			f.Grant(as, "iam-identity", "Administrator", "Service ID creator")
		}
		r := f.Do(apitest.Request{Method: "POST", Path: "/robots", As: as, Body: map[string]string{"name": "r2", "fail": c.fail}})
		wantError(t, r, c.status, c.code)
		e := f.event()
		if e.Action != eventCreate || e.Outcome != activity.Failure || e.Reason.Code != c.status || e.CorrelationID != r.Header.Get(api.TransactionHeader) {
			t.Errorf("%s: event %+v", c.fail, e)
		}
		if c.fail == "authorize" {
			if _, explained := e.Trace.Failed(); !explained || len(e.Trace) < 2 {
				t.Errorf("trace %+v", e.Trace)
			}
		}
	}
	r := f.Do(apitest.Request{Method: "POST", Path: "/prepared", Body: `{"name":"x","fail":"prepare"}`})
	wantError(t, r, 400, "unreachable")
	if e := f.event(); e.Action != eventCreate || e.Outcome != activity.Failure || e.Target != (activity.Target{ID: "crn:of:x", Name: "x", TypeURI: "test/robot"}) {
		t.Errorf("event %+v", e)
	}
	if n := f.d.ServiceIDs.Len(); n != 0 {
		t.Errorf("%d robots", n)
	}
}

func TestAChangeThatCannotBeStoredIsNotMade(t *testing.T) {
	f := start(t)
	id := f.robot("r2")
	f.store.broken.Store(true)
	for _, c := range []struct{ method, path string }{{"POST", "/robots"}, {"PATCH", "/robots/" + id}, {"DELETE", "/robots/" + id}} {
		r := f.Do(apitest.Request{Method: c.method, Path: c.path, Body: `{"name":"x"}`})
		wantError(t, r, 503, "service_unavailable")
		if r.Header.Get("Retry-After") != "1" {
			t.Errorf("Retry-After %q", r.Header.Get("Retry-After"))
		}
		if e := f.event(); e.Outcome != activity.Failure || e.Reason.Code != 503 {
			t.Errorf("event %+v", e)
		}
	}
	if r, ok := f.d.ServiceIDs.Get(id); !ok || r.Name != "r2" || f.d.ServiceIDs.Len() != 1 {
		t.Errorf("robot %+v", r)
	}
	// When not even the refusal can be recorded, the answer is the same.
	j := journal.New(journal.Config{Store: f.store})
	defer j.Close()
	f.Config.Journal = j
	wantError(t, f.Do(apitest.Request{Method: "POST", Path: "/robots", Body: `{}`}), 503, "service_unavailable")
	wantError(t, f.Do(apitest.Request{Path: "/robots/" + id, As: nobody}), 503, "service_unavailable")
	f.store.broken.Store(false)
	f.Do(apitest.Request{Method: "DELETE", Path: "/robots/" + id}).Want(204)
}

func TestAPanicIsA500WithTheTransactionAndNoInternals(t *testing.T) {
	f := start(t)
	r := f.Do(apitest.Request{Path: "/panics", Header: map[string]string{"Transaction-Id": "my-tx"}})
	wantError(t, r, 500, "internal_error")
	if r.Header.Get(api.TransactionHeader) != "my-tx" {
		t.Errorf("transaction %q", r.Header.Get(api.TransactionHeader))
	}
	wantError(t, f.Do(apitest.Request{Method: "POST", Path: "/robots", Body: `{"fail":"panic"}`}), 500, "internal_error")
	if n := f.d.ServiceIDs.Len(); n != 0 {
		t.Errorf("%d robots", n)
	}
	f.robot("after the panic") // the writer is free again
	if got := f.Do(apitest.Request{Path: "/unencodable"}); got.Status != 500 || len(got.Raw) != 0 {
		t.Errorf("status %d, body %s", got.Status, got.Raw)
	}
}

func TestAFaultTellsWhenToComeAgain(t *testing.T) {
	f := start(t)
	r := f.Do(apitest.Request{Path: "/retry"})
	wantError(t, r, 429, "rate_limit_exceeded")
	if r.Header.Get("Retry-After") != "7" {
		t.Errorf("Retry-After %q", r.Header.Get("Retry-After"))
	}
}

func TestABodyIsOneJSONObjectOfBoundedSize(t *testing.T) {
	f := start(t)
	const limit = api.MaxBody
	big := `{"name":"` + strings.Repeat("x", limit) + `"}`
	for name, c := range map[string]struct {
		body   string
		status int
		code   string
		about  string
	}{
		"empty":                   {"", 400, "invalid_body", "no body"},
		"spaces":                  {"  \n", 400, "invalid_body", "no body"},
		"not JSON":                {"name=x", 400, "invalid_body", "JSON"},
		"cut off":                 {`{"name":"x"`, 400, "invalid_body", "JSON"},
		"an array":                {`[{}]`, 400, "invalid_body", "JSON object"},
		"a text":                  {`"x"`, 400, "invalid_body", "JSON object"},
		"a number":                {`7`, 400, "invalid_body", "JSON object"},
		"two objects":             {`{}{}`, 400, "invalid_body", "one JSON object"},
		"trailing text":           {`{} x`, 400, "invalid_body", "one JSON object"},
		"a wrong type":            {`{"name":7}`, 400, "invalid_body", `"name" must be a JSON string`},
		"a wrong list":            {`{"tags":"x"}`, 400, "invalid_body", `"tags" must be a JSON array`},
		"a wrong number":          {`{"count":"7"}`, 400, "invalid_body", `"count" must be a JSON number`},
		"a fraction":              {`{"count":7.5}`, 400, "invalid_body", `"count" must be a JSON number`},
		"a number too large":      {`{"count":99999999999999999999}`, 400, "invalid_body", `"count" must be a JSON number`},
		"a wrong object":          {`{"inner":[]}`, 400, "invalid_body", `"inner" must be a JSON object`},
		"a wrong inner value":     {`{"inner":{"on":"yes"}}`, 400, "invalid_body", `"inner.on" must be a JSON boolean`},
		"too large":               {big, 413, "request_too_large", "1048576"},
		"spaces beyond the limit": {`{}` + strings.Repeat(" ", limit), 413, "request_too_large", "1048576"},
		"deep":                    {strings.Repeat(`{"inner":`, 20000), 400, "invalid_body", ""},
	} {
		t.Run(name, func(t *testing.T) {
			defer f.as(t)()
			r := f.Do(apitest.Request{Method: "POST", Path: "/robots", Body: c.body})
			if m := wantError(t, r, c.status, c.code); !strings.Contains(m, c.about) {
				t.Errorf("message %q, want something about %q", m, c.about)
			}
		})
	}
	if n := f.d.ServiceIDs.Len(); n != 0 {
		t.Errorf("%d robots", n)
	}
	for _, ct := range []string{"", "application/json", "application/x-www-form-urlencoded", "application/merge-patch+json"} {
		f.Do(apitest.Request{Method: "POST", Path: "/robots", Body: `{"unknown":1}` + "\n", Header: map[string]string{"Content-Type": ct}}).Want(201)
	}
}

func TestARouteWithoutABodyIgnoresOne(t *testing.T) {
	f := start(t)
	for _, body := range []string{"", "not json", `{"name":"x"}`} {
		f.Do(apitest.Request{Method: "DELETE", Path: "/robots/" + f.robot("r"), Body: body}).Want(204)
	}
}

func TestIfMatchProtectsAChange(t *testing.T) {
	f := start(t)
	id := f.robot("r")
	tag := f.Do(apitest.Request{Path: "/robots/" + id}).Header.Get("ETag")
	put := func(method, match string) *apitest.Response {
		h := map[string]string{}
		if match != "" {
			h["If-Match"] = match
		}
		return f.Do(apitest.Request{Method: method, Path: "/robots/" + id, Body: `{"name":"x"}`, Header: h})
	}
	wantError(t, put("PUT", ""), 400, "invalid_body")
	wantError(t, put("PUT", "garbage"), 409, "conflict")
	next := put("PUT", tag)
	next.Want(200)
	wantError(t, put("PUT", tag), 409, "conflict")
	wantError(t, put("PATCH", tag), 409, "conflict")
	if e := f.event(); e.Action != eventUpdate || e.Outcome != activity.Failure || e.Reason.Code != 409 {
		t.Errorf("event %+v", e)
	}
	tag = next.Header.Get("ETag")
	for _, match := range []string{`"%s"`, `W/"%s"`, `"other", "%s"`, ` %s `, "*"} {
		if strings.Contains(match, "%s") {
			match = fmt.Sprintf(match, tag)
		}
		r := put("PUT", match)
		r.Want(200)
		if tag == r.Header.Get("ETag") {
			t.Error("two revisions share a tag")
		}
		tag = r.Header.Get("ETag")
	}
	put("PATCH", "").Want(200)
	if r, _ := f.d.ServiceIDs.Get(id); r.Name != "rxxxxxxx" {
		t.Errorf("name %s", r.Name)
	}
}

func TestOfManyWritersWithOneTagOneWins(t *testing.T) {
	f := start(t)
	id := f.robot("r")
	tag := f.Do(apitest.Request{Path: "/robots/" + id}).Header.Get("ETag")
	const writers = 8
	statuses := make([]int, writers)
	var wg sync.WaitGroup
	for n := range writers {
		wg.Go(func() {
			statuses[n] = f.Do(apitest.Request{
				Method: "PUT", Path: "/robots/" + id, Body: `{"name":"x"}`, Header: map[string]string{"If-Match": tag},
			}).Status
		})
	}
	wg.Wait()
	slices.Sort(statuses)
	if statuses[0] != 200 || statuses[1] != 409 || statuses[writers-1] != 409 {
		t.Errorf("statuses %v, want one 200 and else 409", statuses)
	}
	for range writers {
		wg.Go(func() { f.Do(apitest.Request{Method: "PATCH", Path: "/robots/" + id, Body: `{"name":"y"}`}) })
	}
	wg.Wait()
	if r, _ := f.d.ServiceIDs.Get(id); r.Name != "rx"+strings.Repeat("y", writers) {
		t.Errorf("name %s: a change was lost", r.Name)
	}
}

func TestParametersAreBounded(t *testing.T) {
	f := start(t)
	for _, limit := range []string{"0", "101", "-1", "x", "1.5", "99999999999999999999"} {
		wantError(t, f.Do(apitest.Request{Path: "/robots?limit=" + limit}), 400, "invalid_parameter")
	}
	for _, limit := range []string{"", "1", "100"} {
		f.Do(apitest.Request{Path: "/robots?limit=" + limit}).Want(200)
	}
	for _, start := range []string{"x", "%25", "e30x", "W10", "eyJsIjotMX0", "eyJvIjotNX0", "eyJhIjo3fQ"} {
		wantError(t, f.Do(apitest.Request{Path: "/robots?start=" + start}), 400, "invalid_parameter")
	}
}

func TestARouteWithoutAnActionMustSayWhy(t *testing.T) {
	f := start(t)
	routes := &api.Family{Config: f.Config, Mux: http.NewServeMux(), Shape: api.PlainShape}
	defer func() {
		if recover() == nil {
			t.Error("a route without an action or a reason was registered")
		}
	}()
	api.Open(routes, "GET /x", "", nil)
}

func TestAPathThatNoFamilyHasIs404InJSON(t *testing.T) {
	f := start(t)
	for _, r := range []struct{ method, path string }{{"GET", "/nothing"}, {"POST", "/robots/x/y"}, {"DELETE", "/robots"}, {"OPTIONS", "/"}} {
		for _, anonymous := range []bool{false, true} {
			wantError(t, f.Do(apitest.Request{Method: r.method, Path: r.path, Anonymous: anonymous}), 404, "invalid_route")
		}
	}
}

func TestEveryAnswerCarriesATransactionID(t *testing.T) {
	f := start(t)
	for _, c := range []struct {
		sent string
		kept bool
	}{
		{"abc", true}, {"A-b_c.d:1", true}, {strings.Repeat("x", 128), true},
		{"", false}, {strings.Repeat("x", 129), false}, {"a b", false}, {"a\tb", false}, {"<b>", false}, {"ü", false}, {"a;b", false},
	} {
		for _, path := range []string{"/open", "/panics", "/nothing", "/robots/x"} {
			got := f.Do(apitest.Request{Path: path, Header: map[string]string{"Transaction-Id": c.sent}}).Header.Get(api.TransactionHeader)
			if c.kept && got != c.sent || !c.kept && len(got) != 32 {
				t.Errorf("%s: sent %.20q, got %q", path, c.sent, got)
			}
		}
	}
	h := f.Do(apitest.Request{Path: "/open"}).Header
	if h.Get("X-Content-Type-Options") != "nosniff" || !strings.Contains(h.Get("Cache-Control"), "no-store") {
		t.Errorf("headers %v", h)
	}
}

func TestThePeerIsWhoConnectedNotWhoHeadersName(t *testing.T) {
	for _, c := range []struct{ remote, address, typ string }{
		{"192.0.2.7:1234", "192.0.2.7", "IPv4"}, {"[2001:db8::1]:1234", "2001:db8::1", "IPv6"}, {"@", "@", "IPv4"}, {"", "", "IPv4"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = c.remote
		for _, name := range []string{"X-Forwarded-For", "X-Real-Ip", "Forwarded"} {
			r.Header.Set(name, "203.0.113.9")
		}
		r.Header.Set("User-Agent", strings.Repeat("a", 1000))
		if h := api.PeerHost(r); h.Address != c.address || h.AddressType != c.typ || len(h.Agent) != 256 {
			t.Errorf("remote %q: %+v", c.remote, h)
		}
	}
}

func TestAProfileSessionIsRecordedAsTheProfile(t *testing.T) {
	f := start(t)
	for as, typ := range map[string]string{
		"iam-Profile-1": activity.ProfileType, "iam-ServiceId-1": activity.ServiceIDType, "IBMid-1": activity.UserType,
	} {
		f.Do(apitest.Request{Method: "POST", Path: "/robots", As: as, Body: "{}"}).Want(403)
		if e := f.event(); e.Initiator.ID != as || e.Initiator.TypeURI != typ {
			t.Errorf("initiator %+v", e.Initiator)
		}
	}
}

func TestARequestThatEndedDoesNotWrite(t *testing.T) {
	f := start(t)
	hold := make(chan struct{})
	held := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_ = f.d.Update(context.Background(), "", func(*directory.Tx) error { close(held); <-hold; return nil })
	})
	<-held
	ctx, cancel := context.WithCancel(t.Context())
	req := httptest.NewRequestWithContext(ctx, "POST", "/robots", strings.NewReader(`{"name":"late"}`))
	req.Header.Set("Authorization", "Bearer "+f.Owner.AccountID+"/"+f.Owner.IAMID)
	rec := httptest.NewRecorder()
	wg.Go(func() { api.WithTransaction(f.Mux).ServeHTTP(rec, req) })
	cancel()
	time.AfterFunc(50*time.Millisecond, func() { close(hold) })
	wg.Wait()
	if rec.Code != 503 || f.d.ServiceIDs.Len() != 0 {
		t.Errorf("status %d, %d robots", rec.Code, f.d.ServiceIDs.Len())
	}
}

func TestAttributesOfAResourceAreCopiedNotShared(t *testing.T) {
	base := map[string]string{"a": "1"}
	more := api.With(base, "b", "2", "a", "3")
	if base["a"] != "1" || len(base) != 1 || more["a"] != "3" || more["b"] != "2" {
		t.Errorf("base %v, more %v", base, more)
	}
}

func TestPrintableRefusesControlCharactersAndCountsRunes(t *testing.T) {
	for s, want := range map[string]bool{
		"": true, "abc": true, "äöü": true, "äöüß": false, "a\x00b": false, "a\nb": false, "a\x7fb": false, "a\xff": false, "日本語": true,
	} {
		if got := api.Printable(s, 3); got != want {
			t.Errorf("Printable(%q) = %v", s, got)
		}
	}
}
