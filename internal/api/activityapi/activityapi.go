// Package activityapi is the API of the activity log: what happened in the
// caller's account, and for one transaction why it ended as it did. It is
// ours; the events have the form of reference/access-and-audit.md section 6.
// It only reads.
package activityapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
)

const (
	service    = "activity"
	actionRead = "activity.event.read"

	defaultPage = 100
	maxPage     = 1000
)

// Reader is the part of a store that the API needs.
type Reader interface {
	checkpoint.Source
	Events(ctx context.Context, q store.Query) ([]store.StoredEvent, error)
}

// Signer is who signs the log's checkpoints.
type Signer interface {
	Key() string
	Newest() (store.Checkpoint, bool)
}

type family struct {
	log    Reader
	signer Signer
}

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config, log Reader, signer Signer) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "Activity Log", Shape: api.PlainShape}
	h := family{log: log, signer: signer}
	api.Read(f, "GET /v1/events", actionRead, loadQuery, h.list)
	api.Read(f, "GET /v1/events/{correlation_id}/explanation", actionRead, loadTransaction, h.explain)
	h.registerProofs(f)
}

// target is the account's log as a whole: a policy cannot show part of it.
func target(c *api.Call) api.Target {
	return api.Target{
		Resource: c.InAccount(service), CRN: c.Names.Of(service, "", c.Account(), "", "", "").String(),
		Name: "*", TypeURI: "activity/event",
	}
}

// page is what a start value carries: with it, all other parameters are
// ignored. The account is not in it.
type page struct {
	query  store.Query // without the account
	limit  int
	filter url.Values // the filters of query, with times that do not move
}

func loadQuery(c *api.Call) (page, api.Target, error) {
	p, err := parsePage(c)
	return p, target(c), err
}

func parsePage(c *api.Call) (page, error) {
	q := c.R.URL.Query()
	if start := q.Get("start"); start != "" {
		cursor, err := api.ParseCursor("start", start)
		if err != nil {
			return page{}, err
		}
		p := page{limit: cursor.Limit, filter: cursor.Query}
		if p.limit < 1 || p.limit > maxPage {
			p.limit = defaultPage
		}
		if p.query, err = parseFilter(cursor.Query, c.Now()); err != nil {
			return page{}, err
		}
		if p.query.Before, err = store.ParsePosition(cursor.After); err != nil {
			return page{}, invalidParameter("start", start, "a value that this server gave out")
		}
		return p, nil
	}
	limit, err := c.IntParameter("limit", defaultPage, 1, maxPage)
	if err != nil {
		return page{}, err
	}
	p := page{limit: limit, filter: url.Values{}}
	if p.query, err = parseFilter(q, c.Now()); err != nil {
		return page{}, err
	}
	for name, value := range map[string]string{
		"action": p.query.Action, "outcome": p.query.Outcome, "correlation_id": p.query.CorrelationID,
		"since": fixed(p.query.Since), "until": fixed(p.query.Until),
	} {
		if value != "" {
			p.filter.Set(name, value)
		}
	}
	return p, nil
}

func fixed(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

func parseFilter(q url.Values, now time.Time) (store.Query, error) {
	f := store.Query{Action: q.Get("action"), Outcome: q.Get("outcome"), CorrelationID: q.Get("correlation_id")}
	if f.Outcome != "" && f.Outcome != activity.Success && f.Outcome != activity.Failure {
		return f, invalidParameter("outcome", f.Outcome, activity.Success+" or "+activity.Failure)
	}
	for name, into := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		s := q.Get(name)
		if s == "" {
			continue
		}
		t, ok := parseTime(s, now)
		if !ok {
			return f, invalidParameter(name, s, "a time such as 2026-07-01T09:00:00Z, or how long ago, such as 90s, 1h or 7d")
		}
		*into = t
	}
	return f, nil
}

// parseTime reads a time, or a duration before now. Times are bounded, because
// the log counts nanoseconds in 64 bits.
func parseTime(s string, now time.Time) (time.Time, bool) {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		ago, ok := parseAgo(s)
		if !ok {
			return time.Time{}, false
		}
		t = now.Add(-ago)
	}
	t = t.UTC()
	return t, t.Year() >= 1900 && t.Year() <= 2200
}

func parseAgo(s string) (time.Duration, bool) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 15)
		return time.Duration(n) * 24 * time.Hour, err == nil
	}
	d, err := time.ParseDuration(s)
	return d, err == nil && d >= 0
}

func invalidParameter(name, value, wanted string) error {
	return fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be %s.", name, wanted).OnParameter(name, value)
}

func (h family) list(c *api.Call, p page) (api.Reply, error) {
	q := p.query
	q.AccountID = c.Account()
	q.Limit = p.limit + 1 // one more tells whether there is a next page
	stored, err := h.log.Events(c.R.Context(), q)
	if err != nil {
		return api.Reply{}, fmt.Errorf("read the activity log: %w", err)
	}
	type next struct {
		Start string `json:"start"`
	}
	answer := struct {
		Limit     int               `json:"limit"`
		Events    []json.RawMessage `json:"events"`
		Positions []int64           `json:"positions"` // of the events in the log of all accounts
		Next      *next             `json:"next,omitempty"`
	}{Limit: p.limit, Events: []json.RawMessage{}, Positions: []int64{}}
	if len(stored) > p.limit {
		stored = stored[:p.limit]
		last := stored[p.limit-1].Position.String()
		answer.Next = &next{Start: api.Cursor{After: last, Limit: p.limit, Query: p.filter}.String()}
	}
	for _, e := range stored {
		answer.Events = append(answer.Events, e.Doc)
		answer.Positions = append(answer.Positions, e.Position.Seq-1)
	}
	return api.Reply{Body: answer}, nil
}

func loadTransaction(c *api.Call) (string, api.Target, error) {
	return c.R.PathValue("correlation_id"), target(c), nil
}

// step is one event of a transaction, cut down to what explains it.
type step struct {
	Action    string             `json:"action"`
	Outcome   string             `json:"outcome"`
	Time      activity.Time      `json:"time"`
	Initiator activity.Initiator `json:"initiator"`
	Target    activity.Target    `json:"target"`
	Reason    activity.Reason    `json:"reason"`
	Trace     activity.Trace     `json:"trace"`
}

// explain shows the events of a transaction, oldest first. A caller can use
// one transaction id for many requests; the newest ones are shown then.
func (h family) explain(c *api.Call, id string) (api.Reply, error) {
	var stored []store.StoredEvent
	if id != "" {
		var err error
		stored, err = h.log.Events(c.R.Context(), store.Query{AccountID: c.Account(), CorrelationID: id, Limit: maxPage})
		if err != nil {
			return api.Reply{}, fmt.Errorf("read the activity log: %w", err)
		}
	}
	if len(stored) == 0 {
		return api.Reply{}, api.NotFound("transaction", id)
	}
	steps := make([]step, 0, len(stored))
	for _, s := range slices.Backward(stored) {
		var e activity.Event
		if err := json.Unmarshal(s.Doc, &e); err != nil {
			return api.Reply{}, fmt.Errorf("read event %s: %w", s.Position, err)
		}
		if e.Trace == nil {
			e.Trace = activity.Trace{}
		}
		steps = append(steps, step{
			Action: e.Action, Outcome: e.Outcome, Time: e.Time, Initiator: e.Initiator, Target: e.Target, Reason: e.Reason, Trace: e.Trace,
		})
	}
	return api.Reply{Body: map[string]any{"transaction_id": id, "events": steps}}, nil
}
