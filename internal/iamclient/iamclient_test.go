package iamclient

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The servers here misbehave in some way; what a real one does is played in the
// end-to-end tests of the programs that use the client.

func proof(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(file, []byte("proof\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func clientOf(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.TokenFile == "" {
		cfg.TokenFile = proof(t)
	}
	if cfg.Profile == "" {
		cfg.Profile = "own"
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func at(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return clientOf(t, Config{URL: s.URL})
}

func answerToken(w http.ResponseWriter, serial int64) {
	claims, _ := json.Marshal(map[string]any{"iam_id": "iam-Profile-1", "account": map[string]string{"bss": "a"}, "n": serial})
	fmt.Fprintf(w, `{"access_token": "h.%s.s", "expires_in": 1000}`, base64.RawURLEncoding.EncodeToString(claims))
}

func TestATokenThatIsTakenNoMoreIsReplacedOnce(t *testing.T) {
	var logins, refused atomic.Int64
	var never atomic.Bool
	c := at(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/identity/token":
			answerToken(w, logins.Add(1))
		case never.Load() || logins.Load() < 2:
			refused.Add(1)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			fmt.Fprint(w, `{}`)
		}
	})
	if err := c.Do(t.Context(), "GET", "/v1/x", nil, nil); err != nil || logins.Load() != 2 {
		t.Errorf("%v after %d logins", err, logins.Load())
	}
	never.Store(true)
	refused.Store(0)
	if err := c.Do(t.Context(), "GET", "/v1/x", nil, nil); Status(err) != http.StatusUnauthorized || refused.Load() != 2 {
		t.Errorf("%v after %d refusals", err, refused.Load())
	}
}

func TestOneTokenServesAllUntilItIsRenewedInTime(t *testing.T) {
	var logins, now atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/identity/token" {
			if r.PostFormValue("cr_token") != "proof" || r.PostFormValue("profile_name") != "own" || r.PostFormValue("profile_id") != "" {
				t.Errorf("the exchange says %v", r.PostForm)
			}
			answerToken(w, logins.Add(1))
		}
	}))
	defer s.Close()
	c := clientOf(t, Config{URL: s.URL, Now: func() time.Time { return time.Unix(now.Load(), 0) }})
	ask := func(want int64) {
		t.Helper()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				who, err := c.Session(t.Context())
				if err != nil || who.Account != "a" || who.ProfileID != "Profile-1" {
					t.Errorf("%+v, %v", who, err)
				}
			})
		}
		wg.Wait()
		if logins.Load() != want {
			t.Errorf("%d logins, want %d", logins.Load(), want)
		}
	}
	ask(1)
	now.Add(799) // of 1000
	ask(1)
	now.Add(1)
	ask(2)
}

func TestOddAnswersAreErrorsAndNoTokenGoesElsewhere(t *testing.T) {
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	defer other.Close()
	var login, answer http.HandlerFunc
	c := at(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/identity/token":
			answer(w, r)
		case login != nil:
			login(w, r)
		default:
			answerToken(w, 1)
		}
	})
	redirect := func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}
	do := func() error {
		var out struct{}
		return c.Do(t.Context(), "POST", "/v1/x", map[string]string{"a": "b"}, &out)
	}
	for name, h := range map[string]http.HandlerFunc{
		"a redirect":     redirect,
		"no JSON":        func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"a long answer":  func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, MaxAnswer+1)) },
		"a broken pipe":  func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"an empty error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) },
	} {
		if answer = h; do() == nil {
			t.Errorf("%s is a success", name)
		}
	}
	answer = func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, `{"errors": [{"message": "Too many.", "details": "Wait."}]}`)
	}
	var e *Error
	if err := do(); !errors.As(err, &e) || e.RetryAfter != 7*time.Second || e.Login || Status(err) != e.Status || !strings.Contains(err.Error(), "Too many. Wait. (status 429)") {
		t.Errorf("%v", do())
	}

	answer = func(http.ResponseWriter, *http.Request) { t.Error("asked without a token") }
	for name, h := range map[string]http.HandlerFunc{
		"a redirect":  redirect,
		"no token":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"expires_in": 3600}`) },
		"no JWT":      func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"access_token": "a.~.c"}`) },
		"no account":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"access_token": "a.e30.c"}`) },
		"not allowed": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) },
	} {
		fresh := clientOf(t, Config{URL: c.URL()})
		login = h
		err := fresh.Do(t.Context(), "GET", "/v1/x", nil, nil)
		if err == nil || Status(err) != 0 {
			t.Errorf("a login with %s: %v", name, err)
		}
		if name == "not allowed" && (!errors.As(err, &e) || !e.Login || e.Status != http.StatusNotFound) {
			t.Errorf("a login with %s: %v", name, err)
		}
	}
	if elsewhere.Load() != 0 {
		t.Error("a token went to another server")
	}
}

func TestAPodWithoutATokenHasNothingToOffer(t *testing.T) {
	long := filepath.Join(t.TempDir(), "long")
	if err := os.WriteFile(long, make([]byte, maxTokenFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{filepath.Join(t.TempDir(), "none"), t.TempDir(), long} {
		c := clientOf(t, Config{URL: "http://127.0.0.1:1", TokenFile: file})
		_, err := c.Session(t.Context())
		var e *Error
		if !errors.As(err, &e) || !e.Login || !strings.Contains(err.Error(), file) {
			t.Errorf("%v", err)
		}
	}
}

func TestAPrivateAuthorityIsKnownByItsFileAlone(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answerToken(w, 1) }))
	defer s.Close()
	file := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := clientOf(t, Config{URL: s.URL}).Session(t.Context()); err == nil {
		t.Error("a certificate of nobody is trusted")
	}
	if _, err := clientOf(t, Config{URL: s.URL, CAFile: file}).Session(t.Context()); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{proof(t), filepath.Join(t.TempDir(), "none")} {
		if _, err := New(Config{URL: s.URL, CAFile: bad}); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%v", err)
		}
	}
}

func TestAServerOnAnotherMachineIsReachedByHTTPSUnlessTold(t *testing.T) {
	for raw, ok := range map[string]bool{
		"https://iam.example.com": true, "http://127.0.0.1:8470": true, "http://localhost:8470/": true, "http://[::1]:8470": true,
		"http://iam.example.com": false, "": false, "iam.example.com": false, "https://u:p@iam.example.com": false, "ftp://iam.example.com": false,
		"https://iam.example.com?x": false, "http://localhost.example.com": false,
	} {
		if got, err := CheckURL(raw, false); (err == nil) != ok || strings.HasSuffix(got, "/") {
			t.Errorf("%q: %q, %v", raw, got, err)
		}
	}
	if _, err := CheckURL("http://iam.example.com", true); err != nil {
		t.Error(err)
	}
}

func TestAProfilesIDIsToldFromAName(t *testing.T) {
	const id = "Profile-5b3c2d1e-0f9a-4c8b-a7d6-e5f4c3b2a190"
	for text, want := range map[string]string{id: id, "iam-" + id: id, "Profile-web": "", "web": "", id + "x": "", "": ""} {
		if got, ok := ProfileID(text); got != want || ok != (want != "") {
			t.Errorf("%q: %q, %v", text, got, ok)
		}
	}
}
