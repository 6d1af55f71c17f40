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
	Search(ctx context.Context, q store.Query) (store.Found, error)
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
	p := page{limit: limit}
	if p.query, err = parseFilter(q, c.Now()); err != nil {
		return page{}, err
	}
	p.filter = filterOf(p.query)
	return p, nil
}

// filterOf writes the filters of a query as parameters.
func filterOf(q store.Query) url.Values {
	v := url.Values{}
	for name, value := range map[string]string{
		"action": q.Action, "action_prefix": q.ActionPrefix, "outcome": q.Outcome, "severity": q.Severity, "initiator": q.Initiator,
		"authn_id": q.Authn, "target": q.Target, "correlation_id": q.CorrelationID, "since": fixed(q.Since), "until": fixed(q.Until),
	} {
		if value != "" {
			v.Set(name, value)
		}
	}
	return v
}

func fixed(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339Nano)
}

// maxValue bounds what an event is compared with, in bytes; no event has
// anything longer that can be asked for.
const maxValue = 4096

// parseFilter reads the filters of an event. An action that ends with * stands
// for all that begin with what is before it.
func parseFilter(q url.Values, now time.Time) (store.Query, error) {
	var f store.Query
	for name, into := range map[string]*string{
		"action": &f.Action, "action_prefix": &f.ActionPrefix, "outcome": &f.Outcome, "severity": &f.Severity, "initiator": &f.Initiator,
		"authn_id": &f.Authn, "target": &f.Target, "correlation_id": &f.CorrelationID,
	} {
		if *into = q.Get(name); len(*into) > maxValue {
			return f, invalidParameter(name, "", fmt.Sprintf("at most %d bytes long", maxValue))
		}
	}
	if prefix, ok := strings.CutSuffix(f.Action, "*"); ok {
		if f.ActionPrefix != "" {
			return f, invalidParameter("action", f.Action, "a whole action where action_prefix is given, too")
		}
		f.Action, f.ActionPrefix = "", prefix
	}
	for name, value := range map[string]string{"action": f.Action, "action_prefix": f.ActionPrefix} {
		if strings.Contains(value, "*") {
			return f, invalidParameter(name, value, "an action such as iam-identity.account-profile.create, or the beginning of one with a * at its end, such as iam-identity.*")
		}
	}
	if f.Outcome != "" && f.Outcome != activity.Success && f.Outcome != activity.Failure {
		return f, invalidParameter("outcome", f.Outcome, activity.Success+" or "+activity.Failure)
	}
	if f.Severity != "" && f.Severity != activity.Normal && f.Severity != activity.Warning && f.Severity != activity.Critical {
		return f, invalidParameter("severity", f.Severity, activity.Normal+", "+activity.Warning+" or "+activity.Critical)
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

// list shows a page of events. One that the server would have to look for too
// long comes back with fewer than were asked for, or none, and still has a next.
func (h family) list(c *api.Call, p page) (api.Reply, error) {
	q := p.query
	q.AccountID = c.Account()
	q.Limit = p.limit + 1 // one more tells whether there is a next page
	found, err := h.log.Search(c.R.Context(), q)
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
	stored := found.Events
	if len(stored) > p.limit {
		stored = stored[:p.limit]
		found.Next = stored[p.limit-1].Position
	}
	if !found.Next.IsZero() {
		answer.Next = &next{Start: api.Cursor{After: found.Next.String(), Limit: p.limit, Query: p.filter}.String()}
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
