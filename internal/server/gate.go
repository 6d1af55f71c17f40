package server

import (
	"net/http"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/iamtoken"
	"tabard.dev/tabard/internal/fault"
)

// Bounds on requests that arrive while the server opens its data.
const (
	startPatience = 20 * time.Second // within the time in which published clients give up, 30 s
	maxWaiting    = 4096             // requests
	startRetry    = 2 * time.Second
)

// gate stands before the routes while they are put together. A pod that starts
// together with the server asks for its token once and fails when it is
// refused, so requests wait here, a bounded time and a bounded number of them.
// Whether the process is alive and whether it serves is answered at once.
type gate struct {
	refuse   func(http.ResponseWriter, *http.Request, *fault.Error)
	patience time.Duration
	places   chan struct{}

	once   sync.Once
	opened chan struct{} // closed when next is set, or for good
	next   http.Handler  // nil after opened: the server did not start
}

func newGate(refuse func(http.ResponseWriter, *http.Request, *fault.Error)) *gate {
	return &gate{
		refuse: refuse, patience: startPatience,
		places: make(chan struct{}, maxWaiting), opened: make(chan struct{}),
	}
}

// open lets all requests through to the handler. A nil one refuses those that
// wait: the server has not started.
func (g *gate) open(next http.Handler) {
	g.once.Do(func() {
		g.next = next
		close(g.opened)
	})
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case <-g.opened:
	default:
		if !g.wait(w, r) {
			return
		}
	}
	if g.next == nil {
		g.refuse(w, r, starting("The server is stopping before it has started."))
		return
	}
	g.next.ServeHTTP(w, r)
}

// wait reports whether the gate has opened; when not, it has answered.
func (g *gate) wait(w http.ResponseWriter, r *http.Request) bool {
	switch r.URL.Path {
	case "/healthz":
		answer(w, http.StatusOK, "alive\n")
		return false
	case "/readyz":
		answer(w, http.StatusServiceUnavailable, "opening the data\n")
		return false
	}
	select {
	case g.places <- struct{}{}:
		defer func() { <-g.places }()
	default:
		g.refuse(w, r, starting("Too many requests wait for the server to start."))
		return false
	}
	timer := time.NewTimer(g.patience)
	defer timer.Stop()
	select {
	case <-g.opened:
		return true
	case <-timer.C:
		g.refuse(w, r, starting("The server is still opening its data."))
	case <-r.Context().Done():
	}
	return false
}

func starting(why string) *fault.Error {
	f := fault.New(fault.Unavailable, "starting", "The server is not serving yet.").WithDetail("%s Try again in %d s.", why, int(startRetry/time.Second))
	f.RetryAfter = startRetry
	return f
}

// refuseEarly answers in the shape of the family that the path belongs to, when
// no family is there yet.
func (s *Server) refuseEarly(w http.ResponseWriter, r *http.Request, f *fault.Error) {
	if strings.HasPrefix(r.URL.Path, "/identity/") {
		iamtoken.Refuse(w, r, iamtoken.Config{Issuer: s.cfg.Issuer, Now: s.cfg.Now, Log: s.cfg.Log}, f)
		return
	}
	api.WritePlainFault(w, r, f)
}
