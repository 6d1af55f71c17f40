package journal

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
)

// Bounds on what a stranger's attempts put into an account's log.
const (
	attemptWindow  = time.Minute
	maxAttempts    = 20   // of one account on another in a window that have an event each
	maxWindows     = 4096 // pairs of accounts at a time
	maxUnwritten   = 4096 // events
	attemptTimeout = 5 * time.Second
)

// AttemptsConfig are the collaborators.
type AttemptsConfig struct {
	Record func(ctx context.Context, events ...*activity.Event) error
	Now    func() time.Time
	Log    *slog.Logger
}

// Attempts writes failed requests into the log of the account that they aimed
// at, when that is not the caller's. Nobody waits for it: whether there is
// something at what a stranger named must not show in how long he waits for his
// refusal, which has its own record in his own account. So a crash loses the
// last of them.
//
// What a stranger causes in another's log is bounded: of the attempts of one
// account on another, the first in a minute have an event each, and the others
// one event together, with their number.
type Attempts struct {
	cfg  AttemptsConfig
	wake chan struct{}

	mu      sync.Mutex
	open    map[attemptKey]*attempts
	pending []*activity.Event
	lost    int
}

// attemptKey is whose attempts on whom; by is an account, "" for callers that
// nobody knows, or an identity whose token does not count any more.
type attemptKey struct{ account, by string }

type attempts struct {
	ends time.Time
	n    int
	more int // without an event
	last *activity.Event
}

// NewAttempts returns a writer that Run makes write.
func NewAttempts(cfg AttemptsConfig) *Attempts {
	return &Attempts{cfg: cfg, wake: make(chan struct{}, 1), open: map[attemptKey]*attempts{}}
}

// Note takes the event of an attempt, which is of the caller's account, for the
// account that it aimed at. It does not wait.
func (a *Attempts) Note(account string, e *activity.Event) {
	by := e.AccountID
	if e.Initiator.ID == "" {
		by = ""
	}
	if account == "" || account == e.AccountID {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.window(attemptKey{account, by})
	if w == nil {
		return
	}
	seen := seenBy(account, by, e)
	if w.n++; w.n > maxAttempts || len(a.pending) >= maxUnwritten {
		w.more, w.last = w.more+1, seen
		return
	}
	a.pending = append(a.pending, seen)
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Admit reports whether a failed request with a token that does not count any
// more has an event of its own in the log of the token's account. Whoever finds
// an old token must not fill the log with it: the first requests of an identity
// in a window have an event each, and the others one together.
func (a *Attempts) Admit(e *activity.Event) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.window(attemptKey{e.AccountID, lapsed + e.Initiator.ID})
	if w == nil {
		return false
	}
	if w.n++; w.n > maxAttempts {
		w.more, w.last = w.more+1, e
		return false
	}
	return true
}

// lapsed marks the windows of identities by their old tokens.
const lapsed = "lapsed "

// window returns the open window of a key, or nil when there are too many. The
// caller holds the lock.
func (a *Attempts) window(key attemptKey) *attempts {
	now := a.cfg.Now()
	w := a.open[key]
	if w != nil && (!now.Before(w.ends) || w.ends.Sub(now) > attemptWindow) {
		a.close(key, w)
		w = nil
	}
	if w == nil {
		if len(a.open) >= maxWindows {
			a.lost++
			return nil
		}
		w = &attempts{ends: now.Add(attemptWindow)}
		a.open[key] = w
	}
	return w
}

// seenBy is an attempt as the account that it aimed at sees it: what was tried on
// what, and by whom. Of the caller there are only ids that this server gave out
// and his address: no text of his own making gets into another's log, and
// nothing of what his account knows of him. It has another correlation id, so
// that he cannot put it among the events of a transaction of theirs.
func seenBy(account, by string, e *activity.Event) *activity.Event {
	out := &activity.Event{
		ID: uuid.NewString(), Time: e.Time, Action: e.Action, Outcome: e.Outcome, DataEvent: e.DataEvent,
		Severity: activity.Critical, CorrelationID: uuid.NewString(), AccountID: account, LogSourceCRN: e.LogSourceCRN,
		Message: "Attempt of an identity of another account: " + e.Action + " -failure",
		Initiator: activity.Initiator{
			ID: e.Initiator.ID, TypeURI: e.Initiator.TypeURI, AuthnID: e.Initiator.ID, Credential: e.Initiator.Credential,
			Host: activity.Host{Address: e.Initiator.Host.Address, AddressType: e.Initiator.Host.AddressType},
		},
		Target: e.Target, Observer: e.Observer,
		Reason: activity.Reason{Code: e.Reason.Code, Type: e.Reason.Type, ForFailure: "The caller is not of this account, and was answered as if there were no such thing."},
	}
	if by == "" {
		out.Initiator = activity.Initiator{TypeURI: activity.UnknownType, Credential: e.Initiator.Credential, Host: out.Initiator.Host}
		out.Message = "Attempt of an unknown caller: " + e.Action + " -failure"
		out.Reason.ForFailure = "The caller has not proved to be of this account."
		return out
	}
	out.RequestData = object(map[string]any{"caller_account": by})
	return out
}

// object encodes event data made of strings and numbers, which always encodes.
func object(m map[string]any) json.RawMessage {
	b, err := json.Marshal(m)
	if err != nil {
		return nil
	}
	return b
}

// close ends a window; the attempts without an event have one together then. The
// caller holds the lock.
func (a *Attempts) close(key attemptKey, w *attempts) {
	delete(a.open, key)
	if w.more == 0 {
		return
	}
	e := w.last
	e.Message += " (the last of further ones)"
	e.ResponseData = object(map[string]any{"attempts": w.more})
	a.pending = append(a.pending, e)
}

// Run writes what is noted until the context ends, and then the rest.
func (a *Attempts) Run(ctx context.Context) {
	tick := time.NewTicker(attemptWindow / 4)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), attemptTimeout)
			defer cancel()
			a.Flush(last, true)
			return
		case <-a.wake:
			a.Flush(ctx, false)
		case <-tick.C:
			a.Flush(ctx, false)
		}
	}
}

// Flush writes what waits, and the windows that are over, or all of them. What
// the journal does not take stays for the next time.
func (a *Attempts) Flush(ctx context.Context, all bool) {
	now := a.cfg.Now()
	a.mu.Lock()
	for key, w := range a.open {
		if all || !now.Before(w.ends) {
			a.close(key, w)
		}
	}
	batch, lost := a.pending, a.lost
	a.pending, a.lost = nil, 0
	a.mu.Unlock()
	if lost > 0 {
		a.cfg.Log.Warn("attempts on other accounts are not recorded: too many pairs of accounts at a time", "attempts", lost)
	}
	for len(batch) > 0 {
		part := batch[:min(len(batch), 256)]
		if err := a.cfg.Record(ctx, part...); err != nil {
			a.cfg.Log.Warn("recording attempts on other accounts; will try again", "error", err)
			a.mu.Lock()
			a.pending = append(batch, a.pending...)
			a.mu.Unlock()
			return
		}
		batch = batch[len(part):]
	}
}
