package server

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/api"
)

// early returns a gate that nothing stands behind yet, served.
func early(t *testing.T) (*gate, string) {
	t.Helper()
	s := &Server{cfg: config(t.TempDir())}
	if err := s.cfg.Complete(); err != nil {
		t.Fatal(err)
	}
	g := newGate(s.refuseEarly)
	srv := httptest.NewServer(api.WithTransaction(g))
	t.Cleanup(srv.Close)
	t.Cleanup(func() { g.open(nil) })
	return g, srv.URL
}

func TestRequestsThatComeWhileTheServerStartsAreServedOnceItHas(t *testing.T) {
	g, url := early(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if status, body, _ := get(t, http.DefaultClient, url+"/v1/profiles"); status != 200 || body != "served" {
				t.Errorf("%d %s", status, body)
			}
		})
	}
	for len(g.places) < 20 {
		time.Sleep(time.Millisecond)
	}
	// Those who ask whether the server is there do not wait.
	if status, _, _ := get(t, http.DefaultClient, url+"/healthz"); status != 200 {
		t.Errorf("healthz: %d", status)
	}
	if status, body, _ := get(t, http.DefaultClient, url+"/readyz"); status != 503 {
		t.Errorf("readyz: %d %s", status, body)
	}
	g.open(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }))
	wg.Wait()
}

func TestAWaitForTheServerEnds(t *testing.T) {
	g, url := early(t)
	g.patience = time.Millisecond
	for path, want := range map[string]string{
		"/identity/token": `"errorCode":"BXNIM0503E"`, "/v1/profiles": `"code":"starting"`,
	} {
		status, body, header := get(t, http.DefaultClient, url+path)
		if status != 503 || !strings.Contains(body, want) || header.Get("Retry-After") != "2" || header.Get("Transaction-Id") == "" {
			t.Errorf("%s: %d %s %v", path, status, body, header)
		}
	}
}

func TestNotEverybodyMayWaitForTheServer(t *testing.T) {
	g, url := early(t)
	g.places = make(chan struct{}) // no place at all
	if status, body, _ := get(t, http.DefaultClient, url+"/identity/token"); status != 503 || !strings.Contains(body, "Too many") {
		t.Errorf("%d %s", status, body)
	}
}

func TestAServerThatDoesNotStartRefusesWhoWaited(t *testing.T) {
	s, err := Open(t.Context(), config(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan int, 1)
	go func() {
		resp, err := http.Get(s.URL() + "/identity/token")
		if err != nil {
			answered <- 0
			return
		}
		resp.Body.Close()
		answered <- resp.StatusCode
	}()
	for len(s.gate.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	closed(t, s)
	if status := <-answered; status != 503 {
		t.Errorf("status %d", status)
	}
}

func TestAClientThatGivesUpLeavesItsPlace(t *testing.T) {
	g, url := early(t)
	ctx, cancel := context.WithCancel(t.Context())
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/v1/profiles", nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if resp, err := http.DefaultClient.Do(r); err == nil {
			resp.Body.Close()
			t.Error("it was answered")
		}
	}()
	for len(g.places) == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	for len(g.places) > 0 {
		time.Sleep(time.Millisecond)
	}
}

func TestTheAddressIsFreeAfterAServerThatNeverRan(t *testing.T) {
	s, err := Open(t.Context(), config(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	address := s.listeners[0].Addr().String()
	closed(t, s)
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
