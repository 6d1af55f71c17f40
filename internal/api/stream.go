package api

import (
	"net/http"
	"sync"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/fault"
)

// WriteLimit bounds the writing of a long answer. When the server stops, little
// time is left to whoever does not read.
type WriteLimit struct {
	*http.ResponseController

	released chan struct{}
	watch    sync.WaitGroup

	mu       sync.Mutex
	stopping bool
}

const lastWrite = time.Second // what is left when the server stops

// NewWriteLimit begins to watch for the server's stop, until Release.
func NewWriteLimit(w http.ResponseWriter, stopping <-chan struct{}) *WriteLimit {
	l := &WriteLimit{ResponseController: http.NewResponseController(w), released: make(chan struct{})}
	l.watch.Go(func() {
		select {
		case <-l.released:
		case <-stopping:
			l.mu.Lock()
			defer l.mu.Unlock()
			l.stopping = true
			_ = l.SetWriteDeadline(time.Now().Add(lastWrite))
		}
	})
	return l
}

// Extend gives the writer so much time from now on, unless the server stops. An
// error means a connection without deadlines; then none is needed.
func (l *WriteLimit) Extend(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stopping {
		_ = l.SetWriteDeadline(time.Now().Add(d))
	}
}

// Release ends the watch for the server's stop.
func (l *WriteLimit) Release() {
	close(l.released)
	l.watch.Wait()
}

// Still is for answers that go on for long. Its error is a fault when the caller
// may not do any more what the call was let in for: the token has ended or was
// revoked, the address is not allowed any more, or no policy allows the action
// on the target. It leaves no event: nothing new was tried.
func (c *Call) Still(action string, t Target) error {
	claims, err := c.Auth.Caller(c.bearer())
	if err != nil {
		return fault.New(fault.Unauthenticated, "token_invalid", "The access token is expired or not valid any more; get a new one.").Because(err)
	}
	if peer := PeerHost(c.R).Address; !c.Directory.SettingsOf(claims.Account.BSS).Admits(peer) {
		return fault.New(fault.Denied, "not_authorized", "Account %s does not allow access from the address %s any more.", claims.Account.BSS, peer)
	}
	d := access.Decide(c.Directory, access.Request{
		Subject: claims.IAMID, AccountID: claims.Account.BSS, Action: action, Resource: t.Resource, Time: c.Now(),
	})
	if !d.Allowed {
		return fault.New(fault.Denied, "not_authorized", "No policy allows %s to %s any more.", claims.IAMID, action)
	}
	return nil
}
