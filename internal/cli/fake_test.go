package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	account   = "4f1e2b3c4d5e6f708192a3b4c5d6e7f8"
	secretKey = "the-owners-api-key-that-nobody-may-see-1"
	uuidA     = "0f3b1c2d-1111-4222-8333-444455556666"
	uuidB     = "0f3b1c2d-9999-4222-8333-444455556666"
)

// seen is a request as the server got it.
type seen struct {
	Method, Path string
	Query        url.Values
	Header       http.Header
	Body         string
}

// reply is a prepared answer with another status than 200, or with headers.
type reply struct {
	status int
	body   any
	header map[string]string
}

// server records requests and gives prepared answers: what the client sends and
// shows is under test here; that the real API takes it, the end-to-end tests
// show.
type server struct {
	*httptest.Server
	t *testing.T

	mu      sync.Mutex
	answers map[string]any // by "METHOD /path": a body, a reply, or a func(seen) any
	log     []seen
	life    time.Duration // of the access tokens it gives out
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{t: t, answers: map[string]any{}, life: time.Hour}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	home := t.TempDir()
	t.Setenv("TABARD_HOME", filepath.Join(home, "state"))
	for _, name := range []string{"TABARD_API_KEY", "IBMCLOUD_API_KEY", "IBMCLOUD_CR_TOKEN", "IBMCLOUD_CR_PROFILE", "IBMCLOUD_CR_VPC_URL", "TABARD_METADATA_URL", "TABARD_SERVER", "KUBECONFIG"} {
		t.Setenv(name, "")
	}
	t.Chdir(home)
	s.answer("POST /identity/token", func(seen) any { return s.tokens() })
	s.answer("GET /v1/regions", map[string]any{"regions": []any{map[string]any{"name": "us-south", "status": "available"}}})
	return s
}

func (s *server) answer(route string, body any) { s.answers[route] = body }

func (s *server) tokens() any {
	return map[string]any{
		"access_token": accessToken(s.life), "refresh_token": "a-refresh-token", "token_type": "Bearer",
		"expires_in": int(s.life.Seconds()), "expiration": time.Now().Add(s.life).Unix(),
	}
}

func accessToken(life time.Duration) string {
	claims, _ := json.Marshal(map[string]any{
		"iam_id": "IBMid-OWNER", "name": "owner", "email": "owner@example.com", "sub": "owner@example.com",
		"iss": "http://issuer.example/identity", "exp": time.Now().Add(life).Unix(), "account": map[string]any{"bss": account},
	})
	enc := base64.RawURLEncoding
	return enc.EncodeToString([]byte(`{"alg":"ES256"}`)) + "." + enc.EncodeToString(claims) + ".c2lnbmF0dXJl"
}

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Errorf("read a request: %v", err)
	}
	in := seen{r.Method, r.URL.EscapedPath(), r.URL.Query(), r.Header, string(body)}
	s.mu.Lock()
	s.log = append(s.log, in)
	answer, ok := s.answers[in.Method+" "+in.Path]
	s.mu.Unlock()
	w.Header().Set("Transaction-Id", r.Header.Get("Transaction-Id"))
	if !ok {
		answer = reply{status: 404, body: map[string]any{"errors": []any{map[string]any{"code": "not_found", "message": "There is no " + in.Method + " " + in.Path}}}}
	}
	if f, ok := answer.(func(seen) any); ok {
		answer = f(in)
	}
	full, ok := answer.(reply)
	if !ok {
		full = reply{status: 200, body: answer}
	}
	for k, v := range full.header {
		w.Header().Set(k, v)
	}
	w.WriteHeader(full.status)
	switch b := full.body.(type) {
	case nil:
	case string:
		_, _ = io.WriteString(w, b)
	default:
		_ = json.NewEncoder(w).Encode(b)
	}
}

// requests returns what came since the last call, without logins.
func (s *server) requests() []seen {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	s.log = nil
	return log
}

// sent returns the last request to a route.
func (s *server) sent(route string) seen {
	s.t.Helper()
	all := s.requests()
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].Method+" "+all[i].Path == route {
			return all[i]
		}
	}
	var got []string
	for _, r := range all {
		got = append(got, r.Method+" "+r.Path)
	}
	s.t.Fatalf("no request %s was sent, but %q", route, got)
	return seen{}
}

func (r seen) json(t *testing.T) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(r.Body), &m); err != nil {
		t.Fatalf("%s %s has the body %q: %v", r.Method, r.Path, r.Body, err)
	}
	return m
}

// result of one run of the program.
type result struct {
	t              *testing.T
	args           []string
	code           int
	stdout, stderr string
}

func run(t *testing.T, args ...string) result {
	t.Helper()
	return runWith(t, strings.NewReader(""), args...)
}

func runWith(t *testing.T, stdin io.Reader, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	code := Execute(t.Context(), args, stdin, &out, &errs)
	return result{t, args, code, out.String(), errs.String()}
}

func (r result) want(code int, fragments ...string) result {
	r.t.Helper()
	if r.code != code {
		r.t.Fatalf("tabard %q ended with %d, want %d\nstdout: %s\nstderr: %s", r.args, r.code, code, r.stdout, r.stderr)
	}
	where := r.stdout
	if code != 0 {
		where = r.stderr
	}
	for _, f := range fragments {
		if !strings.Contains(where, f) {
			r.t.Errorf("tabard %q does not say %q but:\n%s", r.args, f, where)
		}
	}
	return r
}

func (s *server) login() {
	s.t.Helper()
	run(s.t, "login", "-a", s.URL, "--apikey", secretKey).want(0)
	s.requests()
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func item(pairs ...any) map[string]any {
	m := map[string]any{}
	for i := 0; i+1 < len(pairs); i += 2 {
		m[pairs[i].(string)] = pairs[i+1]
	}
	return m
}

func list(array string, items ...any) map[string]any { return item(array, items) }

func with(m map[string]any, pairs ...any) map[string]any {
	c := maps.Clone(m)
	maps.Copy(c, item(pairs...))
	return c
}
