package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"encoding/base64"
	"encoding/hex"
	"encoding/pem"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The example of the specification.
const (
	specSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	specID     = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	specTime   = 1614265330
	specBody   = `{"test": 2432232314}`
	specSigned = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
)

func TestTheSignatureIsThatOfTheSpecification(t *testing.T) {
	key, err := parseSecret(specSecret)
	if err != nil {
		t.Fatal(err)
	}
	if got := sign([][]byte{key}, specID, specTime, []byte(specBody)); got != specSigned {
		t.Errorf("signed %s, want %s", got, specSigned)
	}
}

var now = time.Date(2026, 7, 2, 12, 0, 0, 0, time.UTC)

// receiver is a web server of somebody's.
type receiver struct {
	t      *testing.T
	server *httptest.Server
	ca     string

	mu       sync.Mutex
	requests []received
	answer   func(w http.ResponseWriter, r *http.Request, body []byte)
}

type received struct {
	header http.Header
	body   []byte
}

func receive(t *testing.T) *receiver {
	r := &receiver{t: t}
	r.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		r.mu.Lock()
		r.requests = append(r.requests, received{req.Header, body})
		answer := r.answer
		r.mu.Unlock()
		if answer != nil {
			answer(w, req, body)
		}
	}))
	r.server.EnableHTTP2 = true
	r.server.StartTLS()
	t.Cleanup(r.server.Close)
	r.ca = filepath.Join(t.TempDir(), "ca.pem")
	save(t, r.ca, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.server.Certificate().Raw})))
	return r
}

func (r *receiver) last() received {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.requests) == 0 {
		r.t.Fatal("nothing was received")
	}
	return r.requests[len(r.requests)-1]
}

func (r *receiver) answers(f func(w http.ResponseWriter, req *http.Request, body []byte)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = f
}

func save(t *testing.T, file, text string) string {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

const path = "/services/T0/secret-path"

func open(t *testing.T, r *receiver, change ...func(*Config)) *Sink {
	t.Helper()
	c := Config{
		URL: r.server.URL + path, SecretFile: save(t, filepath.Join(t.TempDir(), "secret"), specSecret+"\n"), TLS: secure.TLS{CAFile: r.ca},
		Now: func() time.Time { return now },
	}
	for _, f := range change {
		f(&c)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func entries(docs ...string) (out []store.Entry) {
	for i, d := range docs {
		out = append(out, store.Entry{Index: int64(i), Event: store.Event{Doc: []byte(d)}})
	}
	return out
}

// verified has openssl compute the signature.
func verified(t *testing.T, secret string, r received) bool {
	t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("there is no openssl on this machine")
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), openssl, "dgst", "-sha256", "-mac", "HMAC", "-macopt", "hexkey:"+hex.EncodeToString(key), "-binary")
	cmd.Stdin = strings.NewReader(r.header.Get("webhook-id") + "." + r.header.Get("webhook-timestamp") + "." + string(r.body))
	mac, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range strings.Fields(r.header.Get("webhook-signature")) {
		if s == "v1,"+base64.StdEncoding.EncodeToString(mac) {
			return true
		}
	}
	return false
}

func TestEventsArriveSigned(t *testing.T) {
	r := receive(t)
	s := open(t, r)
	if n, err := s.Deliver(t.Context(), entries(`{"id":"1"}`, `{"id":"2"}`)); n != 2 || err != nil {
		t.Fatalf("took %d, %v", n, err)
	}
	got := r.last()
	var events []struct{ ID string }
	if err := json.Unmarshal(got.body, &events); err != nil || len(events) != 2 || events[1].ID != "2" {
		t.Errorf("body %s, %v", got.body, err)
	}
	if !verified(t, specSecret, got) || got.header.Get("webhook-timestamp") != strconv.FormatInt(now.Unix(), 10) || got.header.Get("Content-Type") != "application/json" {
		t.Errorf("header %v", got.header)
	}
	id := got.header.Get("webhook-id")
	if _, err := s.Deliver(t.Context(), entries(`{"id":"1"}`, `{"id":"2"}`)); err != nil || r.last().header.Get("webhook-id") != id {
		t.Errorf("the same again has another id: %v", err)
	}
	if _, err := s.Deliver(t.Context(), entries(`{"id":"3"}`)); err != nil || r.last().header.Get("webhook-id") == id {
		t.Errorf("another message has the same id: %v", err)
	}
}

func TestEventsCanComeInLines(t *testing.T) {
	r := receive(t)
	s := open(t, r, func(c *Config) { c.Format = FormatLines })
	if n, err := s.Deliver(t.Context(), entries(`{"id":"1"}`, "{\"id\":\n\"2\"}", "no JSON\n{")); n != 3 || err != nil {
		t.Fatalf("took %d, %v", n, err)
	}
	if got := r.last(); string(got.body) != "{\"id\":\"1\"}\n{\"id\": \"2\"}\n{\"invalid\":\"no JSON\\n{\"}\n" || got.header.Get("Content-Type") != "application/x-ndjson" {
		t.Errorf("body %q", got.body)
	}
}

func TestSecretsCanBeExchangedWhileTheServerRuns(t *testing.T) {
	r := receive(t)
	dir := t.TempDir()
	file, old := save(t, filepath.Join(dir, "new"), specSecret), filepath.Join(dir, "old")
	const second = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	save(t, old, second)
	s := open(t, r, func(c *Config) {
		c.SecretFile, c.OldSecretFile, c.AuthFile = file, old, save(t, filepath.Join(dir, "auth"), "Splunk token\n")
	})
	if _, err := s.Deliver(t.Context(), entries("{}")); err != nil {
		t.Fatal(err)
	}
	got := r.last()
	if !verified(t, specSecret, got) || !verified(t, second, got) || got.header.Get("Authorization") != "Splunk token" {
		t.Errorf("header %v", got.header)
	}
	save(t, file, second)
	save(t, old, second)
	if _, err := s.Deliver(t.Context(), entries("{}")); err != nil || verified(t, specSecret, r.last()) || !verified(t, second, r.last()) {
		t.Errorf("header %v, %v", r.last().header, err)
	}
	for _, text := range []string{"", "whsec_short", "whsec_" + strings.Repeat("A", 100), "not/base64!"} {
		save(t, file, text)
		if n, err := s.Deliver(t.Context(), entries("{}")); n != 0 || err == nil || text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("secret %q: took %d, %v", text, n, err)
		}
	}
}

func TestWhatAReceiverAnswersDecides(t *testing.T) {
	r := receive(t)
	s := open(t, r)
	for _, tt := range []struct {
		status int
		after  string
		taken  int
		wait   time.Duration
	}{
		{200, "", 1, 0},
		{202, "", 1, 0},
		{204, "", 1, 0},
		{302, "", 0, time.Minute},
		{400, "", 0, time.Minute},
		{401, "", 0, time.Minute},
		{410, "", 0, 5 * time.Minute},
		{429, "120", 0, 2 * time.Minute},
		{429, "", 0, 0},
		{500, "", 0, 0},
		{503, now.Add(time.Hour).Format(http.TimeFormat), 0, time.Hour}, // bounded by the route
		{503, "-5", 0, 0},
		{503, "soon", 0, 0},
	} {
		r.answers(func(w http.ResponseWriter, req *http.Request, _ []byte) {
			if req.URL.Path != path {
				t.Errorf("followed to %s", req.URL.Path)
			}
			w.Header().Set("Location", "/elsewhere")
			if tt.after != "" {
				w.Header().Set("Retry-After", tt.after)
			}
			w.WriteHeader(tt.status)
			_, _ = io.WriteString(w, "<b>hostile\ntext</b>")
		})
		n, err := s.Deliver(t.Context(), entries("{}"))
		if n != tt.taken || (err == nil) != (tt.taken == 1) {
			t.Errorf("%d: took %d, %v", tt.status, n, err)
		}
		var p interface{ RetryAfter() time.Duration }
		if err != nil && (!errors.As(err, &p) || p.RetryAfter() != tt.wait || strings.Contains(err.Error(), "hostile")) {
			t.Errorf("%d: %v", tt.status, err)
		}
	}
}

func TestAReceiverThatFindsABatchTooLargeGetsSmallerOnes(t *testing.T) {
	r := receive(t)
	s := open(t, r)
	var ids []string
	r.answers(func(w http.ResponseWriter, _ *http.Request, body []byte) {
		var events []struct{ ID string }
		if err := json.Unmarshal(body, &events); err != nil || len(events) > 2 {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		for _, e := range events {
			ids = append(ids, e.ID)
		}
	})
	var docs []string
	for n := range 9 {
		docs = append(docs, fmt.Sprintf(`{"id":"%d"}`, n))
	}
	if n, err := s.Deliver(t.Context(), entries(docs...)); n != 9 || err != nil || strings.Join(ids, "") != "012345678" {
		t.Errorf("took %d, %v: %v", n, err, ids)
	}
	r.answers(func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	})
	if n, err := s.Deliver(t.Context(), entries(docs...)); n != 0 || err == nil || !strings.Contains(err.Error(), "larger than it takes") {
		t.Errorf("took %d, %v", n, err)
	}
}

func TestAReceiverCannotHoldTheRouteUpWithItsAnswer(t *testing.T) {
	r := receive(t)
	s := open(t, r)
	gone := make(chan struct{})
	r.answers(func(w http.ResponseWriter, req *http.Request, _ []byte) {
		defer close(gone)
		for { // without an end
			if _, err := w.Write(make([]byte, 1<<10)); err != nil || req.Context().Err() != nil {
				return
			}
		}
	})
	if n, err := s.Deliver(t.Context(), entries("{}")); n != 1 || err != nil {
		t.Errorf("took %d, %v", n, err)
	}
	<-gone
	stuck := make(chan struct{})
	r.answers(func(_ http.ResponseWriter, req *http.Request, _ []byte) {
		<-req.Context().Done() // never answers
		close(stuck)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if n, err := s.Deliver(ctx, entries("{}")); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("took %d, %v", n, err)
	}
	<-stuck
}

func TestErrorsDoNotTellWhatTheURLHasInIt(t *testing.T) {
	r := receive(t)
	s := open(t, r, func(c *Config) { c.URL += "?token=hidden" })
	untrusted := open(t, r, func(c *Config) { c.TLS = secure.TLS{}; c.URL += "?token=hidden" })
	if _, err := untrusted.Deliver(t.Context(), entries("{}")); err == nil || !strings.Contains(err.Error(), "certificate") || strings.Contains(err.Error(), "hidden") {
		t.Errorf("error %v", err)
	}
	r.answers(func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		c, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_ = c.Close()
		} else {
			panic(http.ErrAbortHandler)
		}
	})
	if n, err := s.Deliver(t.Context(), entries("{}")); n != 0 || err == nil || strings.Contains(err.Error(), "hidden") || strings.Contains(err.Error(), "secret-path") {
		t.Errorf("took %d, %v", n, err)
	}
	r.server.CloseClientConnections()
	r.server.Close()
	if n, err := s.Deliver(t.Context(), entries("{}")); n != 0 || err == nil || strings.Contains(err.Error(), "hidden") {
		t.Errorf("took %d, %v", n, err)
	}
	for raw, want := range map[string]string{
		"https://hooks.example.com/services/T/B/x?y": "https://hooks.example.com/…", "https://example.com/": "https://example.com", "http://[::1]:8/": "http://[::1]:8",
	} {
		if got := (&Config{URL: raw}).Target(); got != want {
			t.Errorf("%s is shown as %s", raw, got)
		}
	}
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	for _, raw := range []string{"", "ftp://x/", "http://example.com/", "http://10.0.0.1/", "https://u:password@example.com/", "https://", "https://example.com/#f", "http://127.0.0.1.example.com/", "https://a\x00b"} {
		c := Config{URL: raw, SecretFile: "x"}
		if err := c.Check(); err == nil || strings.Contains(err.Error(), "password@") {
			t.Errorf("%q: %v", raw, err)
		}
	}
	for _, raw := range []string{"http://127.0.0.1:1/x", "http://localhost:1", "http://[::1]:1/", "https://example.com/x?y=z"} {
		c := Config{URL: raw, SecretFile: "x"}
		if err := c.Check(); err != nil {
			t.Errorf("%q: %v", raw, err)
		}
	}
	if err := (&Config{URL: "https://example.com/"}).Check(); err == nil || !strings.Contains(err.Error(), "openssl rand") {
		t.Errorf("without a secret: %v", err)
	}
	if err := (&Config{URL: "https://example.com/", SecretFile: "x", Format: "xml"}).Check(); err == nil {
		t.Error("an odd format passes")
	}
	if _, err := New(Config{URL: "https://example.com/", SecretFile: filepath.Join(t.TempDir(), "none")}); err == nil {
		t.Error("a secret that is not there passes")
	}
}

func TestAListenerThatIsNoWebServerIsAFailure(t *testing.T) {
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, strings.Repeat("x", 1<<20))
			_ = c.Close()
		}
	}()
	s, err := New(Config{URL: "http://" + l.Addr().String(), SecretFile: save(t, filepath.Join(t.TempDir(), "s"), specSecret), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n, err := s.Deliver(t.Context(), entries("{}")); n != 0 || err == nil || len(err.Error()) > 500 {
		t.Errorf("took %d, %v", n, err)
	}
}
