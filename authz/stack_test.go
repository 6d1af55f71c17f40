package authz_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tabard.dev/tabard/authz"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/server"
)

func TestMain(m *testing.M) {
	// Idle connections of the default transport end by themselves.
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		os.Exit(code)
	}))
}

const (
	readDoc  = "documents.document.read"
	writeDoc = "documents.document.write"
)

// install is a running server whose account has registered the service
// documents. Calls that a guard makes go through a proxy that counts them.
type install struct {
	t     *testing.T
	url   string
	owner bootstrap.Owner
	token string // the owner's
	stop  func()

	askerKey string // API key of the service's own identity

	proxy *httptest.Server
	mu    sync.Mutex
	calls map[string]int // by path
	hook  func(w http.ResponseWriter, r *http.Request) (answered bool)

	offset atomic.Int64 // of the guard's clock
}

func start(t *testing.T) *install {
	t.Helper()
	dir := t.TempDir()
	srv, err := server.Open(t.Context(), server.Config{
		DataDir: dir, Listen: []string{"127.0.0.1:0"}, Driver: server.DriverNone, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	i := &install{t: t, url: srv.URL(), calls: map[string]int{}}
	i.stop = sync.OnceFunc(func() {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(i.stop)
	b, err := os.ReadFile(filepath.Join(dir, "owner.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &i.owner); err != nil {
		t.Fatal(err)
	}
	i.token = i.login(i.owner.APIKey)
	i.call("POST", "/v1/services", map[string]any{
		"name": "documents", "kind": "service",
		"actions": []any{map[string]string{"id": readDoc}, map[string]string{"id": writeDoc}},
		"service_roles": map[string]any{
			"Reader": map[string]any{"actions": []string{readDoc}},
			"Writer": map[string]any{"extends": []string{"Reader"}, "actions": []string{writeDoc}},
		},
	})
	asker, key := i.identity("documents")
	i.askerKey = key
	i.grant(asker, "DecisionPoint")

	target, err := url.Parse(i.url)
	if err != nil {
		t.Fatal(err)
	}
	forward := &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	i.proxy = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.calls[r.URL.Path]++
		hook := i.hook
		i.mu.Unlock()
		if hook == nil || !hook(w, r) {
			forward.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(i.proxy.Close)
	return i
}

func (i *install) now() time.Time          { return time.Now().Add(time.Duration(i.offset.Load())) }
func (i *install) advance(d time.Duration) { i.offset.Add(int64(d)) }

// intercept puts a hook before the server.
func (i *install) intercept(hook func(w http.ResponseWriter, r *http.Request) bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.hook = hook
}

const (
	evaluationPath = "/access/v1/evaluation"
	keysPath       = "/identity/keys"
	tokenPath      = "/identity/token"
)

// counted returns how often a path was called since it was last asked.
func (i *install) counted(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := i.calls[path]
	i.calls[path] = 0
	return n
}

func (i *install) login(key string) string {
	i.t.Helper()
	resp, err := http.PostForm(i.url+tokenPath, url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}})
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Token string `json:"access_token"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Token == "" {
		i.t.Fatalf("login: status %s, %v", resp.Status, err)
	}
	return answer.Token
}

// call makes a call as the owner and returns the answer.
func (i *install) call(method, path string, body any) map[string]any {
	i.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		i.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(i.t.Context(), method, i.url+path, bytes.NewReader(b))
	if err != nil {
		i.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+i.token)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode >= 300 {
		i.t.Fatalf("%s %s: %s %s %v", method, path, resp.Status, answer, err)
	}
	var m map[string]any
	if len(answer) > 0 {
		if err := json.Unmarshal(answer, &m); err != nil {
			i.t.Fatal(err)
		}
	}
	return m
}

func text(m map[string]any, key string) string { s, _ := m[key].(string); return s }

// identity makes a service ID with an API key.
func (i *install) identity(name string) (iamID, key string) {
	i.t.Helper()
	id := i.call("POST", "/v1/serviceids", map[string]string{"account_id": i.owner.AccountID, "name": name})
	k := i.call("POST", "/v1/apikeys", map[string]string{"account_id": i.owner.AccountID, "name": name, "iam_id": text(id, "iam_id")})
	return text(id, "iam_id"), text(k, "apikey")
}

// grant gives an identity a common service role on documents, and returns the
// policy's id.
func (i *install) grant(iamID, role string) string {
	i.t.Helper()
	attribute := func(name, value string) map[string]string { return map[string]string{"name": name, "value": value} }
	p := i.call("POST", "/v1/policies", map[string]any{
		"type":      "access",
		"subjects":  []any{map[string]any{"attributes": []any{attribute("iam_id", iamID)}}},
		"roles":     []any{map[string]string{"role_id": "crn:v1:bluemix:public:iam::::serviceRole:" + role}},
		"resources": []any{map[string]any{"attributes": []any{attribute("accountId", i.owner.AccountID), attribute("serviceName", "documents")}}},
	})
	return text(p, "id")
}

func (i *install) revoke(policy string) {
	i.t.Helper()
	i.call("DELETE", "/v1/policies/"+policy, nil)
}

// reader makes an identity that may read, and returns its access token and the
// policy.
func (i *install) reader() (token, policy string) {
	i.t.Helper()
	id, key := i.identity("reader")
	return i.login(key), i.grant(id, "Reader")
}

func (i *install) config() authz.Config {
	return authz.Config{
		URL: i.proxy.URL, Issuer: i.url + "/identity", Service: "documents", Token: authz.APIKey(i.askerKey),
		Now: i.now, Log: slog.New(slog.DiscardHandler),
	}
}

func (i *install) guard(change ...func(*authz.Config)) *authz.Guard {
	i.t.Helper()
	cfg := i.config()
	for _, c := range change {
		c(&cfg)
	}
	g, err := authz.New(cfg)
	if err != nil {
		i.t.Fatal(err)
	}
	return g
}

// service is a handler behind a guard; it answers with who called.
func service(g *authz.Guard) http.Handler {
	document := func(r *http.Request) authz.Resource {
		return authz.Resource{Type: "document", ID: r.PathValue("id")}
	}
	show := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, ok := authz.CallerOf(r.Context())
		if !ok {
			w.WriteHeader(http.StatusTeapot)
			return
		}
		_, _ = io.WriteString(w, caller.IAMID)
	})
	mux := http.NewServeMux()
	mux.Handle("GET /documents/{id}", g.Require(readDoc, document)(show))
	mux.Handle("PUT /documents/{id}", g.Require(writeDoc, document)(show))
	return mux
}

func get(h http.Handler, bearer string) *httptest.ResponseRecorder {
	return send(h, "GET", "/documents/plan", bearer)
}

func send(h http.Handler, method, path, bearer string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	if bearer != "" {
		r.Header.Set("Authorization", "Bearer "+bearer)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func want(t *testing.T, what string, w *httptest.ResponseRecorder, status int) {
	t.Helper()
	if w.Code != status {
		t.Errorf("%s: %d, want %d; %s", what, w.Code, status, w.Body)
	}
}
