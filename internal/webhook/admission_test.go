package webhook

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func FuzzReview(f *testing.F) {
	const whole = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","resource":{"group":"","version":"v1","resource":"pods"},` +
		`"operation":"CREATE","namespace":"shop","object":{"metadata":{"name":"p","annotations":{"iam.tabard.dev/inject":"false"}},"spec":{"serviceAccountName":"web",` +
		`"volumes":[{"name":"v","secret":{"secretName":"s"}}],"initContainers":[null],"containers":[{"name":"c","env":[{"name":"VPC_URL","value":"x"}],"volumeMounts":[{"name":"v","mountPath":"/"}]}]}}}}`
	f.Add([]byte(whole))
	f.Add([]byte(strings.Replace(whole, `"containers":[`, `"containers":null,"x":[`, 1)))
	f.Add([]byte(strings.Replace(whole, "tabard-identity-token", "v", 1)))
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":null}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		q, p, err := decode(body)
		if err != nil {
			if len(err.Error()) > 4000+len(body) {
				t.Error("the error is longer than what it is about")
			}
			return
		}
		v := verdict{profile: "p"}
		v.patch, v.warnings, err = testInjector.patch(p, &wish{profile: "p"})
		if err != nil {
			v = verdict{denied: err.Error()}
		}
		b, err := v.answer(q.UID)
		if err != nil {
			t.Fatal(err)
		}
		var back review
		if err := json.Unmarshal(b, &back); err != nil || back.Response == nil || back.Response.Allowed != (v.denied == "") {
			t.Fatalf("the answer is %s, %v", b, err)
		}
		for _, w := range back.Response.Warnings {
			if len(w) > maxWarning+10 {
				t.Errorf("a warning of %d bytes", len(w))
			}
		}
	})
}

// served are the webhook's handlers behind a server of their own. The pods that
// it is asked about need no look at the cluster.
func served(t *testing.T) (*Webhook, *httptest.Server) {
	t.Helper()
	w, err := New(t.Context(), Config{Listen: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.calls.Close() })
	s := httptest.NewServer(w.handle(false))
	t.Cleanup(s.Close)
	return w, s
}

const optedOut = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","resource":{"group":"","version":"v1","resource":"pods"},` +
	`"operation":"CREATE","namespace":"shop","object":{"metadata":{"annotations":{"iam.tabard.dev/inject":"false"}},"spec":{"containers":[{"name":"c"}]}}}}`

func admit(t *testing.T, s *httptest.Server, body string) int {
	t.Helper()
	resp, err := s.Client().Post(s.URL, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestCallersThatSendSlowlyDoNotHoldUpTheOthers(t *testing.T) {
	t.Parallel()
	w, s := served(t)
	var slow []net.Conn
	for range 2 * maxRunning {
		c, err := net.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "POST /inject HTTP/1.1\r\nHost: webhook\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{", maxBody)
		slow = append(slow, c)
	}
	for len(w.reading) < len(slow) {
		runtime.Gosched()
	}
	if code := admit(t, s, optedOut); code != http.StatusOK {
		t.Errorf("status %d", code)
	}
	if held := w.held.Load(); held > int64(len(slow)+1)*firstBuffer {
		t.Errorf("%d bytes are held for bodies that were only promised", held)
	}
	for _, c := range slow {
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusRequestTimeout {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
}

func TestBodiesTogetherAreBounded(t *testing.T) {
	w, s := served(t)
	large := optedOut + strings.Repeat(" ", maxBody-len(optedOut))
	if code := admit(t, s, large); code != http.StatusOK {
		t.Errorf("the largest body: status %d", code)
	}
	w.held.Add(maxBodies - maxBody/2)
	if code := admit(t, s, large); code != http.StatusServiceUnavailable {
		t.Errorf("one too many: status %d", code)
	}
	if code := admit(t, s, optedOut); code != http.StatusOK {
		t.Errorf("a small one: status %d", code)
	}
	s.Close() // waits until all handlers have ended
	if got := w.held.Load(); got != maxBodies-maxBody/2 {
		t.Errorf("%d bytes are not given back", got-(maxBodies-maxBody/2))
	}
}

func TestALongTextIsCutBetweenLetters(t *testing.T) {
	for n := range 12 {
		got := clip("aäö€b𝄞", n)
		if !utf8.ValidString(got) || len(got) > n+len("…") {
			t.Errorf("%d: %q", n, got)
		}
	}
	if clip("short", 5) != "short" {
		t.Error("a text that fits is cut")
	}
}

func TestOnlyWhatCanWorkIsTakenAsConfiguration(t *testing.T) {
	good := Config{IAMURL: "https://iam.example.com/", Namespace: "tabard-system"}
	c := good
	if err := c.Complete(); err != nil {
		t.Fatal(err)
	}
	if c.IAMURL != "https://iam.example.com" || c.Audience != "iam" || c.TokenLifetime != time.Hour || len(c.Services) != len(DefaultServices) ||
		len(c.CertificateNames) != 1 || c.CertificateNames[0] != "tabard-webhook.tabard-system.svc" {
		t.Errorf("completed %+v", c)
	}
	for about, change := range map[string]func(*Config){
		"iam-url":          func(c *Config) { c.IAMURL = "" },
		"iam-url: \"ftp":   func(c *Config) { c.IAMURL = "ftp://iam" },
		"iam-url: \"https": func(c *Config) { c.IAMURL = "https://user@iam" },
		"--insecure-http":  func(c *Config) { c.IAMURL = "http://iam.example.com" },
		"token-lifetime":   func(c *Config) { c.TokenLifetime = time.Minute },
		"certificate-life": func(c *Config) { c.CertificateLife = time.Second },
		"services":         func(c *Config) { c.Services = []string{"a b"} },
		"namespace":        func(c *Config) { c.Namespace = "" },
		"profile":          func(c *Config) { c.CheckProfiles = true },
	} {
		c := good
		change(&c)
		if err := c.Complete(); err == nil || !strings.Contains(err.Error(), about) {
			t.Errorf("error %v, want one about %s", err, about)
		}
	}
	for _, fine := range []func(*Config){
		func(c *Config) { c.IAMURL = "http://127.0.0.1:8470" },
		func(c *Config) { c.IAMURL, c.InsecureHTTP = "http://iam", true },
		func(c *Config) { c.Services = []string{} },
	} {
		c := good
		fine(&c)
		if err := c.Complete(); err != nil {
			t.Error(err)
		}
	}
}

// network stands in front of an unreachable Tabard: that the webhook's
// questions are right, the end-to-end tests show with a real one.
func network(t *testing.T, answer http.HandlerFunc) (*profiles, func(time.Duration)) {
	t.Helper()
	s := httptest.NewServer(answer)
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(file, []byte("token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var now atomic.Int64
	now.Store(newYear.UnixNano())
	p, err := newProfiles(&Config{
		IAMURL: s.URL, Profile: "own", TokenFile: file, Now: func() time.Time { return time.Unix(0, now.Load()) },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.iam.Close)
	return p, func(d time.Duration) { now.Add(int64(d)) }
}

func TestATabardThatFailsIsNotAskedForEachPod(t *testing.T) {
	var calls atomic.Int64
	p, pass := network(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		http.Error(w, "broken", http.StatusServiceUnavailable)
	})
	for range 10 {
		if _, err := p.exist(t.Context(), "a"); err == nil {
			t.Fatal("a broken Tabard knows that a profile does not exist")
		}
	}
	if calls.Load() != 1 {
		t.Errorf("%d calls", calls.Load())
	}
	pass(rememberDown)
	_, _ = p.exist(t.Context(), "a")
	if calls.Load() != 2 {
		t.Errorf("%d calls after a while", calls.Load())
	}
}

func TestAnswersAndTokensAreKeptForAWhile(t *testing.T) {
	var exchanges, lists atomic.Int64
	refuse := atomic.Bool{}
	p, pass := network(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/identity/token" {
			exchanges.Add(1)
			claims := base64.RawURLEncoding.EncodeToString([]byte(`{"account":{"bss":"acc"}}`))
			_ = json.NewEncoder(w).Encode(map[string]any{"access_token": "x." + claims + ".y", "expires_in": 1000})
			return
		}
		lists.Add(1)
		if refuse.Load() {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		list := []any{}
		if name := r.URL.Query().Get("name"); name != "gone" && r.URL.Query().Get("account_id") == "acc" {
			list = append(list, map[string]any{"name": name})
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"profiles": list})
	})
	ask := func(name string, want bool) {
		t.Helper()
		got, err := p.exist(t.Context(), name)
		if err != nil || got != want {
			t.Fatalf("%s: %v, %v", name, got, err)
		}
	}
	ask("a", true)
	ask("a", true)
	ask("gone", false)
	ask("gone", false)
	if exchanges.Load() != 1 || lists.Load() != 3 { // a missing one is asked for with one's own
		t.Errorf("%d exchanges, %d lists", exchanges.Load(), lists.Load())
	}
	pass(rememberNo)
	ask("gone", false)
	pass(801 * time.Second)
	ask("a", true)
	if exchanges.Load() != 2 {
		t.Errorf("%d exchanges: a token is renewed at four fifths of its life", exchanges.Load())
	}
	refuse.Store(true)
	if _, err := p.exist(t.Context(), "b"); err == nil {
		t.Error("a refused token gives an answer")
	}
	refuse.Store(false)
	pass(rememberDown)
	ask("b", true)
	if exchanges.Load() != 3 {
		t.Errorf("%d exchanges: a refused token is renewed", exchanges.Load())
	}
}

func TestAPodWhoseCreatorGivesUpDoesNotMakeTabardUnreachable(t *testing.T) {
	p, _ := network(t, func(w http.ResponseWriter, _ *http.Request) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.exist(ctx, "a"); err == nil {
		t.Fatal("no error")
	}
	if !p.down.until.IsZero() {
		t.Error("Tabard counts as unreachable")
	}
}
