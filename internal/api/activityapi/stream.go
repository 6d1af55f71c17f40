package activityapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
)

// Follower is the part of a store that streams need.
type Follower interface {
	Extent(ctx context.Context) (store.Extent, error)
	Entries(ctx context.Context, from int64, limit int) ([]store.Entry, error)
	Follow(ctx context.Context, q store.Query, from int64, limit int) ([]store.StoredEvent, int64, error)
	Days(ctx context.Context) ([]store.DayInfo, error)
	Dropped(ctx context.Context) ([]store.DroppedDay, error)
	Grown() <-chan struct{}
}

// StreamOptions are the bounds on streams. Zero values mean the defaults.
type StreamOptions struct {
	Stopping   <-chan struct{} // closed when streams are to end
	Heartbeat  time.Duration   // between signs of life; 15 s
	Check      time.Duration   // between looks at whether the caller may still read; 1 s
	Send       time.Duration   // for one message, after which a reader is cut off; 20 s
	PerAccount int             // streams at once; 16
	All        int             // streams at once of all accounts; 256
}

func (o *StreamOptions) complete() {
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
	}{{&o.Heartbeat, 15 * time.Second}, {&o.Check, time.Second}, {&o.Send, 20 * time.Second}} {
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if o.PerAccount == 0 {
		o.PerAccount = 16
	}
	if o.All == 0 {
		o.All = 256
	}
}

// RegisterStream adds the route that follows an account's events as they come,
// as server-sent events (WHATWG HTML, section 9.2).
func RegisterStream(mux *http.ServeMux, cfg *api.Config, log Follower, opts StreamOptions) {
	opts.complete()
	f := &api.Family{Config: cfg, Mux: mux, Service: "Activity Log", Shape: api.PlainShape}
	h := &streams{log: log, opts: opts, feed: feed{log: log}, open: map[string]int{}}
	api.Read(f, "GET /v1/events/stream", actionRead, h.load, h.show)
}

type streams struct {
	log  Follower
	opts StreamOptions
	feed feed

	mu   sync.Mutex
	open map[string]int // streams by account
	all  int
}

// wanted is what a caller wants to follow.
type wanted struct {
	query store.Query // without the account
	from  int64       // index; -1 for from now on
	most  int         // events until the stream ends; 0 means no end
}

func (h *streams) load(c *api.Call) (wanted, api.Target, error) {
	q := c.R.URL.Query()
	v := wanted{from: -1}
	var err error
	if v.query, err = parseFilter(q, c.Now()); err != nil {
		return v, target(c), err
	}
	if !v.query.Until.IsZero() {
		return v, target(c), invalidParameter("until", q.Get("until"), "left out: a stream goes on")
	}
	if v.most, err = c.IntParameter("limit", 0, 1, 1_000_000); err != nil {
		return v, target(c), err
	}
	// What a client saw last counts more than the address that it was begun with.
	for _, after := range []struct{ name, value string }{{"after", q.Get("after")}, {lastID, c.R.Header.Get(lastID)}} {
		if after.value == "" {
			continue
		}
		n, err := number(after.name, after.value, 0)
		if err != nil {
			return v, target(c), err
		}
		v.from = n + 1
	}
	return v, target(c), nil
}

// lastID is the header in which a client says what it saw last.
const lastID = "Last-Event-ID"

// begin returns the index that a stream begins at.
func (h *streams) begin(ctx context.Context, v wanted) (int64, error) {
	extent, err := h.log.Extent(ctx)
	if err != nil {
		return 0, fmt.Errorf("read the activity log: %w", err)
	}
	switch {
	case v.from > extent.Size:
		return 0, fault.New(fault.Invalid, "invalid_parameter", "The log does not have an event at position %d, after which the stream is to go on: "+
			"it is not the log that the position is from, or an older copy of it.", v.from-1).OnParameter("after", strconv.FormatInt(v.from-1, 10))
	case v.from >= 0:
		return v.from, nil
	case v.query.Since.IsZero():
		return extent.Size, nil
	}
	days, err := h.log.Days(ctx)
	if err != nil {
		return 0, fmt.Errorf("read the activity log: %w", err)
	}
	from := extent.Size
	for _, d := range days {
		if d.Day >= store.Day(v.query.Since) {
			from = min(from, d.First)
		}
	}
	return from, nil
}

// enter counts a stream in, unless there are too many.
func (h *streams) enter(account string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.open[account] < h.opts.PerAccount && h.all < h.opts.All {
		h.open[account]++
		h.all++
		return nil
	}
	// How many others have is not the caller's affair.
	e := fault.New(fault.Limited, "too_many_streams", "The server has as many streams as it can have. Try again later, or ask for pages with GET /v1/events.")
	if n := h.open[account]; n >= h.opts.PerAccount {
		e = fault.New(fault.Limited, "too_many_streams", "The account follows its events in %d streams already. End one of them, or ask for pages with GET /v1/events.", n)
	}
	e.RetryAfter = 10 * time.Second
	return e
}

func (h *streams) leave(account string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all--
	if h.open[account]--; h.open[account] == 0 {
		delete(h.open, account)
	}
}

func (h *streams) show(c *api.Call, v wanted) (api.Reply, error) {
	from, err := h.begin(c.R.Context(), v)
	if err != nil {
		return api.Reply{}, err
	}
	if c.R.Method == http.MethodHead {
		return api.Reply{}, nil
	}
	if err := h.enter(c.Account()); err != nil {
		return api.Reply{}, err
	}
	leave := func() { h.leave(c.Account()) }
	return api.Reply{Abandoned: leave, Stream: func(w http.ResponseWriter, r *http.Request) {
		defer leave()
		s := &stream{streams: h, call: c, w: w, limit: api.NewWriteLimit(w, h.opts.Stopping), query: v.query, next: from, left: v.most, told: map[int]bool{}}
		defer s.limit.Release()
		s.query.AccountID = c.Account()
		// The read deadline of the server counts from the request's beginning;
		// this request has been read.
		_ = s.limit.SetReadDeadline(time.Time{})
		w.Header().Set("Content-Type", "text/event-stream")
		w.Header().Set("X-Accel-Buffering", "no") // proxies that gather answers must not gather this one
		s.end(s.run(r.Context()))
	}}, nil
}

// stream is one that is under way.
type stream struct {
	*streams
	call  *api.Call
	w     http.ResponseWriter
	limit *api.WriteLimit
	query store.Query
	next  int64 // index of what has not been looked at yet
	left  int   // events until the end, or 0
	told  map[int]bool

	checked, written time.Time
}

// Why a stream ends, beside its caller's going and the faults of Still.
var (
	errStopping = fault.New(fault.Unavailable, "stopping", "The server stops; go on with another one.")
	errEnough   = fault.New(fault.Gone, "limit", "As many events as were asked for have come.")
)

const (
	streamPage = 200                    // events that are sent together
	retryAfter = 2 * time.Second        // what a browser is told to wait before it comes again
	gather     = 100 * time.Millisecond // events that come closely go out together
)

func (s *stream) run(ctx context.Context) error {
	if err := s.feed.join(ctx); err != nil {
		return err
	}
	defer s.feed.leave()
	s.checked = time.Now()
	// Nothing has been written yet, so that the first sign of life comes at once:
	// whoever is cut off now goes on from here.
	if _, err := fmt.Fprintf(s.w, "retry: %d\n", retryAfter.Milliseconds()); err != nil {
		return fmt.Errorf("send events: %w", err)
	}
	tick := time.NewTicker(s.opts.Check)
	defer tick.Stop()
	for {
		if err := s.alive(ctx); err != nil {
			return err
		}
		changed, err := s.more(ctx)
		if err != nil {
			return err
		}
		if changed == nil {
			continue // there is more already
		}
		select {
		case <-ctx.Done():
		case <-s.opts.Stopping:
		case <-tick.C:
		case <-changed:
		}
	}
}

// alive looks at what ends a stream, and shows that it goes on.
func (s *stream) alive(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.opts.Stopping:
		return errStopping
	default:
	}
	if now := time.Now(); now.Sub(s.checked) >= s.opts.Check {
		s.checked = now
		if err := s.call.Still(actionRead, target(s.call)); err != nil {
			return err
		}
	}
	if time.Since(s.written) < s.opts.Heartbeat {
		return nil
	}
	// A message without data is none to the client, but it takes note of its id,
	// and does not ask again for what was looked at.
	b := []byte(": alive\n")
	if s.next > 0 {
		b = fmt.Appendf(b, "id: %d\n", s.next-1)
	}
	return s.write(append(b, '\n'))
}

// more sends what there is, and returns what tells that there is more, or nil
// if that is so already.
func (s *stream) more(ctx context.Context) (changed <-chan struct{}, err error) {
	entries, next, changed := s.feed.after(s.next)
	if changed == nil {
		return nil, s.catchUp(ctx)
	}
	var b []byte
	n := 0
	for i := range entries {
		e := &entries[i]
		if !s.query.Matches(&e.Event) {
			continue
		}
		b = appendEvent(b, e.Index, e.Doc)
		if s.left--; s.left == 0 {
			return nil, errors.Join(s.write(b), errEnough)
		}
		if n++; n == streamPage {
			next, changed = e.Index+1, nil
			break
		}
	}
	s.next = next
	return changed, s.write(b)
}

// catchUp sends a page of what the feed does not have any more.
func (s *stream) catchUp(ctx context.Context) error {
	b, err := s.gaps(ctx)
	if err != nil {
		return err
	}
	events, next, err := s.log.Follow(ctx, s.query, s.next, streamPage)
	if err != nil {
		return fmt.Errorf("read the activity log: %w", err)
	}
	for _, e := range events {
		b = appendEvent(b, e.Position.Seq-1, e.Doc)
		if s.left--; s.left == 0 {
			return errors.Join(s.write(b), errEnough)
		}
	}
	s.next = next
	return s.write(b)
}

// gaps tells of days from here on that were dropped to save space.
func (s *stream) gaps(ctx context.Context) (b []byte, err error) {
	dropped, err := s.log.Dropped(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the activity log: %w", err)
	}
	for _, d := range dropped {
		if d.Last < s.next || s.told[d.Day] || !s.query.Since.IsZero() && d.Day < store.Day(s.query.Since) {
			continue
		}
		s.told[d.Day] = true
		b = fmt.Appendf(b, "event: gap\ndata: {\"day\":%d,\"first\":%d,\"last\":%d}\n\n", d.Day, max(d.First, s.next), d.Last)
	}
	return b, nil
}

func appendEvent(b []byte, index int64, doc []byte) []byte {
	b = fmt.Appendf(b, "id: %d\ndata: ", index)
	// Lines end messages. JSON has none where they would mean anything.
	for _, c := range doc {
		if c == '\n' || c == '\r' {
			c = ' '
		}
		b = append(b, c)
	}
	return append(b, "\n\n"...)
}

func (s *stream) write(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s.limit.Extend(s.opts.Send)
	if _, err := s.w.Write(b); err != nil {
		return fmt.Errorf("send events: %w", err)
	}
	s.written = time.Now()
	return s.limit.Flush()
}

// end tells the client why nothing more comes, if it can be told.
func (s *stream) end(err error) {
	var f *fault.Error
	if !errors.As(err, &f) {
		if s.call.R.Context().Err() == nil {
			s.call.Log.Warn("a stream of activity events ended", "account", s.call.Account(), "error", err)
		}
		f = fault.New(fault.Internal, "interrupted", "The server cannot go on with the stream; come again.")
	}
	reason, err := json.Marshal(map[string]string{"code": f.Code, "message": f.Message})
	if err != nil {
		return
	}
	_ = s.write(fmt.Appendf(nil, "event: end\ndata: %s\n\n", reason)) // the client may be gone
}

// feed reads the log once for all streams, while there are any, and keeps the
// newest events.
type feed struct {
	log Follower

	life    sync.Mutex // guards whether it runs
	readers int
	cancel  context.CancelFunc
	done    chan struct{}

	mu          sync.Mutex    // guards what it has
	first, next int64         // it has the events from first on, before next
	entries     []store.Entry // in the order of the log
	bytes       int
	changed     chan struct{} // closed and replaced when there is more
}

// What the feed keeps for streams that are a little behind.
const (
	feedEvents = 4096
	feedBytes  = 8 << 20
	feedPage   = 1000
)

// join makes sure that the feed goes on until leave.
func (f *feed) join(ctx context.Context) error {
	f.life.Lock()
	defer f.life.Unlock()
	if f.readers == 0 {
		extent, err := f.log.Extent(ctx)
		if err != nil {
			return fmt.Errorf("read the activity log: %w", err)
		}
		f.mu.Lock()
		f.first, f.next, f.entries, f.bytes, f.changed = extent.Size, extent.Size, nil, 0, make(chan struct{})
		f.mu.Unlock()
		running, cancel := context.WithCancel(context.Background()) //nolint:gosec // leave calls it
		f.cancel, f.done = cancel, make(chan struct{})
		go f.run(running, extent.Size, f.done)
	}
	f.readers++
	return nil
}

// leave ends the feed when nobody reads it any more.
func (f *feed) leave() {
	f.life.Lock()
	defer f.life.Unlock()
	if f.readers--; f.readers == 0 {
		f.cancel()
		<-f.done
	}
}

func (f *feed) run(ctx context.Context, next int64, done chan struct{}) {
	defer close(done)
	for {
		grown := f.log.Grown()
		entries, err := f.log.Entries(ctx, next, feedPage)
		if err == nil && len(entries) > 0 {
			next = entries[len(entries)-1].Index + 1
			f.add(entries, next)
			grown = nil
		}
		var wait <-chan time.Time
		if grown == nil || err != nil {
			wait = time.After(gather)
		}
		if err != nil {
			grown = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-grown:
		case <-wait:
		}
	}
}

func (f *feed) add(entries []store.Entry, next int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.entries, f.next = append(f.entries, entries...), next
	for _, e := range entries {
		f.bytes += len(e.Doc)
	}
	gone := 0
	for len(f.entries)-gone > feedEvents || f.bytes > feedBytes && gone < len(f.entries) {
		f.bytes -= len(f.entries[gone].Doc)
		f.first = f.entries[gone].Index + 1
		gone++
	}
	// What is cut off is freed when the slice grows the next time.
	f.entries = f.entries[gone:]
	close(f.changed)
	f.changed = make(chan struct{})
}

// after returns the events from an index on, the index after them, and what is
// closed when there is more; or nothing if the feed does not go back so far.
func (f *feed) after(from int64) (entries []store.Entry, next int64, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if from < f.first {
		return nil, from, nil
	}
	at := len(f.entries)
	for at > 0 && f.entries[at-1].Index >= from {
		at--
	}
	return f.entries[at:len(f.entries):len(f.entries)], max(from, f.next), f.changed
}
