package activityapi

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
)

const actionLog = "activity.log.read"

// maxLog bounds a page of the whole log, and logTimeout how long one takes.
const (
	maxLog     = 5000
	logTimeout = 60 * time.Second
)

// registerProofs adds the routes that show that the log is whole. An account's
// reader gets proofs of its own events; they tell of others' only how many
// there are. The log itself is for the operator.
func (h family) registerProofs(f *api.Family) {
	api.Read(f, "GET /v1/events/checkpoint", actionRead, loadNothing, h.checkpoint)
	api.Read(f, "GET /v1/events/checkpoint/key", actionRead, loadNothing, h.key)
	api.Read(f, "GET /v1/events/{position}/proof", actionRead, loadInclusion, h.inclusion)
	api.Read(f, "GET /v1/events/consistency", actionRead, loadConsistency, h.consistency)
	api.Read(f, "GET /v1/events/log", actionLog, loadLog, h.entries)
}

func loadNothing(c *api.Call) (struct{}, api.Target, error) { return struct{}{}, target(c), nil }

type signedNote struct {
	Size       int64     `json:"size"`
	Time       time.Time `json:"time"`
	Checkpoint string    `json:"checkpoint"`
	Key        string    `json:"key"`
}

func (h family) newest() (signedNote, error) {
	c, ok := h.signer.Newest()
	if !ok {
		e := fault.New(fault.Unavailable, "no_checkpoint", "No checkpoint of the activity log has been signed yet. Try again.")
		e.RetryAfter = time.Second
		return signedNote{}, e
	}
	return signedNote{c.Size, c.Time, string(c.Note), h.signer.Key()}, nil
}

func (h family) checkpoint(*api.Call, struct{}) (api.Reply, error) {
	n, err := h.newest()
	return api.Reply{Body: n}, err
}

func (h family) key(*api.Call, struct{}) (api.Reply, error) {
	return api.Reply{Body: map[string]string{"key": h.signer.Key()}}, nil
}

type inclusion struct{ index, size int64 }

func loadInclusion(c *api.Call) (inclusion, api.Target, error) {
	var i inclusion
	var err error
	if i.index, err = number("position", c.R.PathValue("position"), 0); err == nil {
		i.size, err = number("size", c.R.URL.Query().Get("size"), 0)
	}
	return i, target(c), err
}

// number reads a count or an index; "" is the default.
func number(name, s string, def int64) (int64, error) {
	if s == "" {
		return def, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>2 {
		return 0, invalidParameter(name, s, "a number of the activity log, from 0 on")
	}
	return n, nil
}

func (h family) inclusion(c *api.Call, i inclusion) (api.Reply, error) {
	found, err := h.log.Entries(c.R.Context(), i.index, 1)
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the activity log: %w", err)
	}
	// Another account's event and none at all are the same to the caller.
	if len(found) == 0 || found[0].Index != i.index || found[0].AccountID != c.Account() {
		return api.Reply{}, fault.New(fault.NotFound, "not_found", "No event of the account stands at that position.")
	}
	var signed *signedNote
	if i.size == 0 {
		newest, err := h.newest()
		if err != nil {
			return api.Reply{}, err
		}
		i.size, signed = newest.Size, &newest
	}
	if i.size <= i.index {
		return api.Reply{}, invalidParameter("size", strconv.FormatInt(i.size, 10), fmt.Sprintf("more than the position %d: the event is newer than that checkpoint", i.index))
	}
	if err := h.within(c, "size", i.size); err != nil {
		return api.Reply{}, err
	}
	proof, err := tlog.ProveRecord(i.size, i.index, h.log)
	if err != nil {
		return api.Reply{}, fmt.Errorf("prove event %d in a log of %d: %w", i.index, i.size, err)
	}
	hash := tlog.RecordHash(found[0].Doc)
	return api.Reply{Body: struct {
		Position int64       `json:"position"`
		Size     int64       `json:"size"`
		Hash     string      `json:"hash"` // of the document
		Proof    []tlog.Hash `json:"proof"`
		Event    []byte      `json:"document"` // byte for byte, as it was hashed
		Signed   *signedNote `json:"signed,omitempty"`
	}{i.index, i.size, base64.StdEncoding.EncodeToString(hash[:]), notNil(proof), found[0].Doc, signed}}, nil
}

func notNil(h []tlog.Hash) []tlog.Hash {
	if h == nil {
		return []tlog.Hash{}
	}
	return h
}

// within refuses a size that the log does not have yet.
func (h family) within(c *api.Call, name string, size int64) error {
	extent, err := h.log.Extent(c.R.Context())
	if err != nil {
		return fmt.Errorf("read the activity log: %w", err)
	}
	if size > extent.Size {
		return invalidParameter(name, strconv.FormatInt(size, 10), fmt.Sprintf("at most %d, which is how many events the log has", extent.Size))
	}
	return nil
}

type stretch struct{ from, to int64 }

func loadConsistency(c *api.Call) (stretch, api.Target, error) {
	q := c.R.URL.Query()
	var s stretch
	var err error
	if s.from, err = number("from", q.Get("from"), 1); err == nil {
		s.to, err = number("to", q.Get("to"), 0)
	}
	if err == nil && s.from < 1 {
		err = invalidParameter("from", q.Get("from"), "the size of a log that had events")
	}
	return s, target(c), err
}

func (h family) consistency(c *api.Call, s stretch) (api.Reply, error) {
	if s.to == 0 {
		newest, err := h.newest()
		if err != nil {
			return api.Reply{}, err
		}
		s.to = newest.Size
	}
	if s.to < s.from {
		return api.Reply{}, invalidParameter("to", strconv.FormatInt(s.to, 10), "at least as large as the parameter from")
	}
	if err := h.within(c, "to", s.to); err != nil {
		return api.Reply{}, err
	}
	header, err := checkpoint.ReadHeader(c.R.Context(), h.log, h.signer.Key())
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the activity log: %w", err)
	}
	if s.from < header.Start {
		return api.Reply{}, invalidParameter("from", strconv.FormatInt(s.from, 10), fmt.Sprintf("at least %d: the events before it have been dropped", header.Start))
	}
	proof, err := tlog.ProveTree(s.to, s.from, h.log)
	if err != nil {
		return api.Reply{}, fmt.Errorf("prove that a log of %d events begins with one of %d: %w", s.to, s.from, err)
	}
	return api.Reply{Body: map[string]any{"from": s.from, "to": s.to, "proof": notNil(proof)}}, nil
}

type logPage struct {
	checkpoint.Range
	head bool // begins the log
}

func loadLog(c *api.Call) (logPage, api.Target, error) {
	q := c.R.URL.Query()
	// What a changed log has before its beginning is to be seen, too.
	p := logPage{Range: checkpoint.Range{From: math.MinInt64}, head: q.Get("from") == ""}
	var err error
	if p.Limit, err = c.IntParameter("limit", defaultPage, 1, maxLog); err == nil {
		p.To, err = number("to", q.Get("to"), 0)
	}
	if err == nil && !p.head {
		p.From, err = number("from", q.Get("from"), 0)
	}
	if err == nil && c.Account() != c.OperatorAccount {
		err = fault.New(fault.Denied, "not_authorized", "The log of all accounts is the operator's: log in to the account %s.", c.OperatorAccount)
	}
	return p, target(c), err
}

// entries answers with lines of JSON, as an exported log has them. The parameter
// to keeps the pages of a log that grows to what it was at the first one.
func (h family) entries(c *api.Call, p logPage) (api.Reply, error) {
	var head []checkpoint.Item
	header, err := checkpoint.ReadHeader(c.R.Context(), h.log, h.signer.Key())
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the activity log: %w", err)
	}
	if p.head {
		head = append(head, checkpoint.Item{Header: header})
	}
	if p.To == 0 {
		p.To = header.Size
	}
	return api.Reply{Stream: func(w http.ResponseWriter, r *http.Request) {
		// Writers that cannot be given a time are a test's.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(logTimeout))
		w.Header().Set("Content-Type", "application/x-ndjson")
		out := bufio.NewWriterSize(w, 64<<10)
		if err := checkpoint.Write(out, head...); err != nil {
			return // the client is gone
		}
		for item, err := range checkpoint.Items(r.Context(), h.log, p.Range) {
			if err == nil {
				err = checkpoint.Write(out, item)
			}
			if err != nil {
				c.Log.Error("send the activity log", "error", err)
				panic(http.ErrAbortHandler) // half a page must not pass for a whole one
			}
		}
		_ = out.Flush()
	}}, nil
}

var _ checkpoint.Source = store.Log(nil)
