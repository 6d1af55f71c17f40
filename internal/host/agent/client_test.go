package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/vpc"
)

// sentBody returns what is sent for a batch.
func sentBody(t *testing.T, b link.Events) []byte {
	t.Helper()
	var body []byte
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { body, _ = io.ReadAll(r.Body) }))
	defer srv.Close()
	if err := post(t.Context(), srv.Client(), srv.URL, "", "", b, nil); err != nil {
		t.Fatal(err)
	}
	return body
}

func TestWhichServersCanBeUsed(t *testing.T) {
	for raw, tt := range map[string]struct{ want, insecure bool }{
		"https://iam.example.com": {true, true}, "https://iam.example.com:8470/": {true, true}, "https://10.0.0.1/iam": {true, true},
		"http://127.0.0.1:8470": {true, true}, "http://localhost:8470": {true, true}, "http://[::1]:1": {true, true},
		"http://iam.example.com": {false, true}, "http://10.0.0.1:8470": {false, true}, "http://127.0.0.1.evil.test": {false, true},
		"http://localhost.evil.test": {false, true}, "HTTP://10.0.0.1": {false, true}, "http://0.0.0.0:1": {false, true},
		"http://127.0.0.1@evil.test": {false, false}, "https://user:secret@iam.example.com": {false, false}, "ftp://iam.example.com": {false, false},
		"iam.example.com": {false, false}, "https://": {false, false}, "": {false, false}, "https://iam.example.com?x=1": {false, false},
		"https://iam.example.com#x": {false, false}, "unix:///run/x": {false, false},
	} {
		if _, err := checkURL(raw, false); (err == nil) != tt.want {
			t.Errorf("%q: error %v", raw, err)
		}
		if _, err := checkURL(raw, true); (err == nil) != tt.insecure {
			t.Errorf("%q, insecure: error %v", raw, err)
		}
	}
}

func TestTheServersCertificateMustBeFromAnAuthorityThatIsTrusted(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"token_endpoint":"x"}`)
	}))
	defer srv.Close()
	srv.Config.ErrorLog = nil
	file := filepath.Join(t.TempDir(), "ca.pem")
	try := func(ca string) error {
		tr, err := transport(ca)
		if err != nil {
			return err
		}
		defer tr.CloseIdleConnections()
		_, err = discover(t.Context(), &http.Client{Transport: tr}, srv.URL)
		return err
	}
	if err := try(""); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("without the authority: %v", err)
	}
	if err := try(file); err == nil {
		t.Error("a file that does not exist is taken")
	}
	for _, content := range []string{"", "garbage"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := try(file); err == nil {
			t.Errorf("%q is taken for an authority", content)
		}
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := try(file); err != nil {
		t.Errorf("with the authority: %v", err)
	}
}

func TestATokenGoesNowhereButToTheServer(t *testing.T) {
	var leaked atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { leaked.Add(1) }))
	defer elsewhere.Close()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/identity/.well-known") {
			fmt.Fprintf(w, `{"token_endpoint":"%s/identity/token"}`, elsewhere.URL)
			return
		}
		http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	defer srv.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, []byte("tabard-join-secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	in := &installation{t: t, dir: dir, address: strings.TrimPrefix(srv.URL, "http://")}
	if _, err := Open(t.Context(), in.config(file, nil)); err == nil {
		t.Error("the host has joined somewhere")
	}
	c := testClient(t, srv)
	if _, err := c.access(t.Context(), ""); err == nil {
		t.Error("there is an access token")
	}
	if leaked.Load() > 0 {
		t.Error("something was sent elsewhere")
	}
}

// someKey is one that is good enough for servers that do not look.
var someKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

func testClient(t *testing.T, srv *httptest.Server) *client {
	t.Helper()
	tr, err := transport("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.CloseIdleConnections)
	hc := &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return newClient(srv.URL, srv.URL+"/identity/token", "Host-x", &Signer{Key: someKey(), KeyID: "k"}, time.Now, hc)
}

// logins is a server that gives out numbered access tokens.
type logins struct {
	count atomic.Int32
	life  int
	call  http.HandlerFunc
}

func (l *logins) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/identity/token" {
		fmt.Fprintf(w, `{"access_token":"t%d","expires_in":%d}`, l.count.Add(1), l.life)
		return
	}
	l.call(w, r)
}

func TestOneLoginServesAllWhoWait(t *testing.T) {
	l := &logins{life: 600, call: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }}
	srv := httptest.NewServer(l)
	defer srv.Close()
	c := testClient(t, srv)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := c.call(t.Context(), link.PathReports, "", vpc.Report{}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := l.count.Load(); n != 1 {
		t.Errorf("%d logins", n)
	}
}

func TestATokenThatTheServerTakesNoMoreIsReplacedOnceForAll(t *testing.T) {
	l := &logins{life: 600, call: func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer t1" {
			w.WriteHeader(http.StatusUnauthorized)
			_ = json.NewEncoder(w).Encode(link.FaultBody{Fault: link.FaultOf(fault.New(fault.Unauthenticated, "token_invalid", "x"))})
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}}
	srv := httptest.NewServer(l)
	defer srv.Close()
	c := testClient(t, srv)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := c.call(t.Context(), link.PathReports, "", vpc.Report{}, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := l.count.Load(); n != 2 {
		t.Errorf("%d logins", n)
	}
}

func TestNobodyWaitsForTheLoginsOfOthers(t *testing.T) {
	hold := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hold:
		case <-r.Context().Done():
		}
	}))
	defer srv.Close()
	defer close(hold)
	c := testClient(t, srv)
	began := time.Now()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err := c.call(ctx, link.PathReports, "", vpc.Report{}, nil)
			if f := fault.Of(err); f.Kind != fault.Unavailable || f.RetryAfter != retryAfter {
				t.Errorf("error %v", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("twenty waited %s for each other", took)
	}
}

func TestWhatIsNoAnswerMeansThatTheServerIsAway(t *testing.T) {
	for name, answer := range map[string]http.HandlerFunc{
		"garbage":        func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"half an object": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"access_token":"`) },
		"too much": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"access_token":"`+strings.Repeat("x", 2<<20)+`"}`)
		},
		"a broken proxy": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "bad gateway", http.StatusBadGateway) },
		"an empty fault": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"fault":{}}`)
		},
		"a hang-up": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		l := &logins{life: 600, call: answer}
		for _, at := range []string{"at the token endpoint", "at the exchange"} {
			h := http.Handler(l)
			if at == "at the token endpoint" {
				h = answer
			}
			srv := httptest.NewServer(h)
			c := testClient(t, srv)
			var out link.ExchangeAnswer
			err := c.call(t.Context(), link.PathExchange, "", link.Exchange{}, &out)
			if f := fault.Of(err); err == nil || f.Kind != fault.Unavailable || f.RetryAfter == 0 {
				t.Errorf("%s %s: %v", name, at, err)
			}
			srv.Close()
		}
	}
}

func TestAFaultOfTheServerComesThroughWhole(t *testing.T) {
	want := fault.New(fault.Denied, "not_authorized", "no <b>").WithDetail("because").On("profile")
	want.RetryAfter = 3 * time.Second
	srv := httptest.NewServer(&logins{life: 600, call: func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(link.FaultBody{Fault: link.FaultOf(want)})
	}})
	defer srv.Close()
	got := fault.Of(testClient(t, srv).call(t.Context(), link.PathExchange, "", link.Exchange{}, nil))
	if got.Kind != want.Kind || got.Code != want.Code || got.Message != want.Message || got.Detail != want.Detail || got.Target != want.Target || got.RetryAfter != want.RetryAfter {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestAStreamThatMakesNoSenseEnds(t *testing.T) {
	for name, body := range map[string]string{
		"garbage": "<html>\n", "a line without ends": strings.Repeat("x", link.MaxMessage+10), "a wrong type": `{"synced":"yes"}` + "\n",
	} {
		srv := httptest.NewServer(&logins{life: 600, call: func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) }})
		if err := testClient(t, srv).stream(t.Context(), link.Capacity{}, func(link.Message) error { return nil }); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v", name, err)
		}
		srv.Close()
	}
}

func FuzzMessagesNeverBreakWhatAHostKnows(f *testing.F) {
	p := &vpc.Placement{Instance: vpc.Instance{ID: "0717_a", HostID: "h"}}
	for _, m := range []link.Message{{Hello: &link.Hello{}}, {Placement: p}, {Gone: "0717_a"}, {Synced: true}, {Ping: true}, {Placement: &vpc.Placement{}}} {
		b, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"placement":{"instance":{"id":"../../etc/passwd","host_id":"h"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := newWorld("h", quiet)
		w.begin()
		for line := range bytes.SplitSeq(b, []byte("\n")) {
			var m link.Message
			if json.Unmarshal(line, &m) == nil {
				w.hear(m)
			}
		}
		placed, _ := w.Placements()
		for id, p := range placed {
			if p == nil || p.Instance.ID != id || p.Instance.HostID != "h" || strings.ContainsAny(id, "/.\x00 ") {
				t.Errorf("it holds %q: %+v", id, p)
			}
		}
	})
}

func TestWhatWasNotHeardOfInANewStreamIsGoneOnceItIsWhole(t *testing.T) {
	w := newWorld("h", quiet)
	put := func(id, hostID string) {
		w.hear(link.Message{Placement: &vpc.Placement{Instance: vpc.Instance{ID: id, HostID: hostID}}})
	}
	if _, known := w.Placements(); known {
		t.Error("something is known before anything was heard")
	}
	w.begin()
	put("a", "h")
	put("b", "h")
	put("c", "other")
	put("../d", "h")
	if _, known := w.Placements(); known {
		t.Error("half of it is taken for the whole")
	}
	w.hear(link.Message{Synced: true})
	placed, known := w.Placements()
	if !known || len(placed) != 2 {
		t.Errorf("known %v: %v", known, placed)
	}
	w.begin()
	put("b", "h")
	if placed, _ = w.Placements(); len(placed) != 2 {
		t.Error("what was not heard of yet is gone already")
	}
	w.begin() // it was cut off
	put("a", "h")
	w.hear(link.Message{Synced: true})
	if placed, _ = w.Placements(); len(placed) != 1 || placed["a"] == nil {
		t.Errorf("it holds %v", placed)
	}
	w.hear(link.Message{Gone: "a"})
	if placed, _ = w.Placements(); len(placed) != 0 {
		t.Errorf("it holds %v", placed)
	}
}
