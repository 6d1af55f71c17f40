package agent

import (
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"regexp"
	"sync"
	"time"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/vpc"
)

// instanceID is the form of what a message may be about. Drivers name files and
// devices by it.
var instanceID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// world is what this host knows of its instances: what the server has said, or
// what it had said when it was there last.
type world struct {
	host    string // id
	log     *slog.Logger
	changed chan struct{} // for the controller
	save    chan struct{} // for the keeper
	send    func(ctx context.Context, r vpc.Report) error

	mu     sync.Mutex
	placed map[string]*vpc.Placement
	known  bool
	heard  map[string]bool // since the stream began; nil once it is synced
}

func newWorld(host string, log *slog.Logger) *world {
	return &world{
		host: host, log: log, placed: map[string]*vpc.Placement{},
		changed: make(chan struct{}, 1), save: make(chan struct{}, 1),
	}
}

// Placements implements [host.World].
func (w *world) Placements() (map[string]*vpc.Placement, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.placed), w.known
}

// Placement implements the metadata service's view.
func (w *world) Placement(id string) (*vpc.Placement, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.placed[id]
	return p, ok
}

// Changed implements [host.World].
func (w *world) Changed() <-chan struct{} { return w.changed }

// Report implements [host.World].
func (w *world) Report(ctx context.Context, r vpc.Report) error { return w.send(ctx, r) }

// begin notes that a new stream has begun.
func (w *world) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heard = map[string]bool{}
}

// believable reports whether a placement is one of this host.
func (w *world) believable(p *vpc.Placement) bool {
	return p != nil && p.Instance.HostID == w.host && instanceID.MatchString(p.Instance.ID)
}

// hear takes in one message of the stream. What is not about this host is not
// believed, whoever sent it.
func (w *world) hear(m link.Message) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case m.Placement != nil:
		id := m.Placement.Instance.ID
		if !w.believable(m.Placement) {
			w.log.Error("the server sent an instance that is not on this host", "instance", id, "host", m.Placement.Instance.HostID)
			return
		}
		w.placed[id] = m.Placement
		if w.heard != nil {
			w.heard[id] = true
			return // the controller acts on the whole
		}
	case m.Gone != "":
		delete(w.placed, m.Gone)
	case m.Synced:
		maps.DeleteFunc(w.placed, func(id string, _ *vpc.Placement) bool { return !w.heard[id] })
		w.heard, w.known = nil, true
	default:
		return
	}
	for _, c := range []chan struct{}{w.changed, w.save} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// load takes up what was known when the agent ran last.
func (w *world) load(s *state) error {
	b, err := s.open(placementsFile, placementsFile)
	if err != nil {
		return err
	}
	placed := map[string]*vpc.Placement{}
	if err := json.Unmarshal(b, &placed); err != nil {
		return err
	}
	maps.DeleteFunc(placed, func(id string, p *vpc.Placement) bool { return !w.believable(p) || p.Instance.ID != id })
	w.mu.Lock()
	defer w.mu.Unlock()
	w.placed, w.known = placed, true
	return nil
}

// saveAgain bounds how long what is known stays unwritten after a failure.
const saveAgain = 10 * time.Second

// keep writes down what is known whenever it has changed, until the context
// ends.
func (w *world) keep(ctx context.Context, s *state) {
	again := time.NewTimer(saveAgain)
	again.Stop()
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			select {
			case <-w.save: // the last word
				w.keepNow(s)
			default:
			}
			return
		case <-w.save:
		case <-again.C:
		}
		if !w.keepNow(s) {
			again.Reset(saveAgain)
		}
	}
}

func (w *world) keepNow(s *state) bool {
	placed, _ := w.Placements()
	b, err := json.Marshal(placed)
	if err == nil {
		err = s.seal(placementsFile, placementsFile, b)
	}
	if err != nil {
		w.log.Error("what is placed on this host is not kept for a restart without the server", "error", err)
	}
	return err == nil
}
