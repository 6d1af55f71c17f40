package kube

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"
)

const secret = "the-token-of-the-client"

// client returns a client of a server that answers with a handler.
func client(t *testing.T, change func(*Config), answer http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewUnstartedServer(answer)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	cfg := Config{
		URL: srv.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), Token: StaticToken(secret),
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func wantKubeError(t *testing.T, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("%v, want %q", err, text)
	}
	if err != nil && strings.Contains(err.Error(), secret) {
		t.Errorf("the token stands in %q", err)
	}
}

func collect(events *[]Event) func(Event) error {
	return func(e Event) error { *events = append(*events, e); return nil }
}

func TestAWatchReportsEventsUntilTheServerEndsIt(t *testing.T) {
	c := client(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") != "true" || r.URL.Query().Get("resourceVersion") != "7" || r.Header.Get("Authorization") != "Bearer "+secret {
			w.WriteHeader(http.StatusBadRequest)
		}
		fmt.Fprint(w, `{"type":"ADDED","object":{"n":1}}`+"\n"+`{"type":"BOOKMARK","object":{"n":2}}`+"\n")
	})
	var events []Event
	if err := c.Watch(t.Context(), "/api/v1/pods?resourceVersion=7", collect(&events)); err != nil {
		t.Fatal(err)
	}
	if len(events) != 2 || events[0].Type != "ADDED" || string(events[1].Object) != `{"n":2}` {
		t.Errorf("events %+v", events)
	}
}

func TestAWatchThatIsTooOldSaysSo(t *testing.T) {
	gone := `{"kind":"Status","code":410,"reason":"Expired","message":"too old resource version"}`
	for name, answer := range map[string]http.HandlerFunc{
		"in an event":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"type":"ERROR","object":`+gone+`}`) },
		"as an answer": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusGone); fmt.Fprint(w, gone) },
	} {
		t.Run(name, func(t *testing.T) {
			var events []Event
			err := client(t, nil, answer).Watch(t.Context(), "/api/v1/pods", collect(&events))
			wantKubeError(t, err, "too old resource version")
			if Code(err) != http.StatusGone || len(events) != 0 {
				t.Errorf("code %d, %d events", Code(err), len(events))
			}
		})
	}
}

func TestAnErrorOfAWatchWithoutACodeIsStillAnError(t *testing.T) {
	c := client(t, nil, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"type":"ERROR","object":"x"}`) })
	if err := c.Watch(t.Context(), "/x", func(Event) error { return nil }); err == nil {
		t.Error("no error")
	}
}

// endless writes one byte after another until the client has enough.
func endless(w http.ResponseWriter, begin string) {
	if _, err := io.WriteString(w, begin); err != nil {
		return
	}
	chunk := []byte(strings.Repeat("x", 64<<10))
	for range 64 << 20 / len(chunk) { // eight times what is read at most
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func TestAnEventWithoutEndEndsTheWatch(t *testing.T) {
	c := client(t, nil, func(w http.ResponseWriter, _ *http.Request) { endless(w, `{"type":"ADDED","object":{"a":"`) })
	err := c.Watch(t.Context(), "/api/v1/pods", func(Event) error { t.Error("an event"); return nil })
	wantKubeError(t, err, "an event is longer than")
}

func TestAWatchLivesLongerThanOneEventsBound(t *testing.T) {
	object := `{"type":"ADDED","object":"` + strings.Repeat("x", 1<<20) + `"}` + "\n"
	c := client(t, nil, func(w http.ResponseWriter, _ *http.Request) {
		for range 10 {
			fmt.Fprint(w, object)
		}
	})
	n := 0
	if err := c.Watch(t.Context(), "/x", func(Event) error { n++; return nil }); err != nil || n != 10 {
		t.Errorf("%d events, %v", n, err)
	}
}

func TestAWatchEndsWithItsContextAndWithItsReader(t *testing.T) {
	c := client(t, nil, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, `{"type":"ADDED","object":{}}`)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	enough := errors.New("enough")
	if err := c.Watch(t.Context(), "/x", func(Event) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := c.Watch(ctx, "/x", func(Event) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAClientLeavesNoGoroutines(t *testing.T) {
	before := runtime.NumGoroutine()
	func() {
		srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"type":"ADDED","object":{}}`)
			w.(http.Flusher).Flush()
			if r.URL.Query().Has("watch") {
				<-r.Context().Done()
			}
		}))
		defer srv.Close()
		c, err := New(Config{URL: srv.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range 5 {
			ctx, cancel := context.WithCancel(t.Context())
			_ = c.Watch(ctx, "/x", func(Event) error { cancel(); return nil })
			cancel()
			if err := c.Do(t.Context(), http.MethodGet, "/x", nil, nil); err != nil {
				t.Fatal(err)
			}
		}
	}()
	// Connections end in their own time.
	for range 1000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	stacks := make([]byte, 64<<10)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}

func TestARedirectIsNotFollowed(t *testing.T) {
	visited := false
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visited = true }))
	defer thief.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		c := client(t, nil, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, thief.URL, status) })
		err := c.Do(t.Context(), http.MethodGet, "/x", nil, nil)
		if Code(err) != status {
			t.Errorf("%d: %v", status, err)
		}
		if err := c.Watch(t.Context(), "/x", func(Event) error { return nil }); Code(err) != status {
			t.Errorf("watch, %d: %v", status, err)
		}
	}
	if visited {
		t.Error("the client went where it was sent")
	}
}

func TestAnAnswerIsBounded(t *testing.T) {
	c := client(t, func(cfg *Config) { cfg.MaxAnswer = 1000 }, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/fits" {
			_, _ = io.WriteString(w, `"`+strings.Repeat("x", 998)+`"`)
			return
		}
		endless(w, `"`)
	})
	var s string
	if err := c.Do(t.Context(), http.MethodGet, "/fits", nil, &s); err != nil || len(s) != 998 {
		t.Errorf("%d bytes, %v", len(s), err)
	}
	wantKubeError(t, c.Do(t.Context(), http.MethodGet, "/long", nil, &s), "longer than 1000 bytes")
}

func TestARequestEndsAfterItsTime(t *testing.T) {
	c := client(t, func(cfg *Config) { cfg.Timeout = 50 * time.Millisecond }, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	if err := c.Do(t.Context(), http.MethodGet, "/x", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// What the server says is its own: a Status that has the token in it must be
// redacted by whoever shows it. The client itself writes it nowhere.
func TestTheClientWritesTheTokenInNoError(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"refused": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnauthorized) },
		"no JSON": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "{")
		},
		"hung up": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"no status": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, "oops")
		},
		"a redirect": func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "ftp://x", http.StatusFound) },
	} {
		t.Run(name, func(t *testing.T) {
			c := client(t, nil, answer)
			var out struct{}
			for _, err := range []error{
				c.Do(t.Context(), http.MethodPost, "/x", map[string]string{"a": "b"}, &out),
				c.Patch(t.Context(), "/x", MergePatch, map[string]string{}, &out),
				c.Watch(t.Context(), "/x", func(Event) error { return nil }),
			} {
				wantKubeError(t, err, "/x")
			}
		})
	}
	t.Run("a header that cannot be sent", func(t *testing.T) {
		c := client(t, func(cfg *Config) { cfg.Token = StaticToken(secret + "\n") }, func(http.ResponseWriter, *http.Request) {})
		wantKubeError(t, c.Do(t.Context(), http.MethodGet, "/x", nil, nil), "/x")
	})
	t.Run("another authority", func(t *testing.T) {
		c := client(t, func(cfg *Config) { cfg.CA = nil }, func(http.ResponseWriter, *http.Request) { t.Error("the request was sent") })
		wantKubeError(t, c.Do(t.Context(), http.MethodGet, "/x", nil, nil), "certificate")
	})
}

func TestOnlyHTTPSURLsAreAPIServers(t *testing.T) {
	for _, url := range []string{"", "x", "http://127.0.0.1", "https://", "https://u:" + secret + "@x", "https://x?a=b", "https://x#y"} {
		_, err := New(Config{URL: url})
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%q: %v", url, err)
		}
	}
}
