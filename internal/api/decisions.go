package api

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
)

// decided are the events of the access decisions that a request took and that
// its account asks for. They are durable before the answer leaves: with the
// change, with the event of the failure, or by themselves.
type decided struct {
	events   []*activity.Event
	tallies  map[string]*tally // by action
	mode     string            // activity.DecisionsDenied …
	asked    bool              // mode is known
	together bool              // count the decisions of each action in one event, as in a list
	order    int               // events so far
	closed   bool              // the answer has left
}

// tally is the event that counts the decisions of one action.
type tally struct {
	event           *activity.Event
	permits, denies int
}

// maxDecisions bounds the decisions of one request that have an event each, and
// the actions whose further ones are counted.
const maxDecisions = 250

// pending returns the events that are not durable yet.
func (d *decided) pending() []*activity.Event {
	for _, t := range d.tallies {
		said := map[string]any{"decision": "Permit", "isEnforced": true, "permitted": t.permits, "denied": t.denies}
		if t.permits == 0 {
			said["decision"] = "Deny"
		}
		t.event.ResponseData = encoded(said)
	}
	return slices.Clone(d.events)
}

// written says that the events so far are durable.
func (d *decided) written() { d.events, d.tallies = nil, nil }

// close returns the events that are not durable yet. Decisions after it, of an
// answer that goes on, have none.
func (d *decided) close() []*activity.Event {
	d.closed = true
	return d.pending()
}

func (c *Call) decisions() string {
	if !c.decided.asked {
		c.decided.asked = true
		if s, ok := c.Directory.LogSettings.Get(c.Account()); ok {
			c.decided.mode = s.Decisions
		}
	}
	return c.decided.mode
}

// noteOwn takes a decision on what the caller himself wants to do.
func (c *Call) noteOwn(q access.Request, d access.Decision) {
	mode := c.decisions()
	if mode == activity.DecisionsOff || mode == activity.DecisionsDenied && d.Allowed || c.decided.closed {
		return
	}
	c.note(q, d.Allowed, policyOf(d), nil, map[string]string{"ipAddress": PeerHost(c.R).Address})
}

// NoteDecision takes a decision about a subject that a service asked about.
// Those against it always have their event, with the trace, so that they can be
// explained later; others when the account asks for them.
func (c *Call) NoteDecision(q access.Request, d access.Decision) {
	if d.Allowed {
		if c.decisions() == activity.DecisionsAll {
			c.note(q, true, policyOf(d), nil, nil)
		}
		return
	}
	c.NoteDenial(q, d.Explain())
}

// NoteDenial is NoteDecision for a denial that no policy was asked about.
func (c *Call) NoteDenial(q access.Request, trace activity.Trace) {
	c.note(q, false, "", trace, nil)
}

// NoteSearch takes the answer to a question of what a subject may do, or who may
// do something: as one decision, which has found so many.
func (c *Call) NoteSearch(q access.Request, found int) {
	if c.decisions() != activity.DecisionsAll {
		return
	}
	e := c.decision(q, nil)
	e.SetReason(http.StatusOK, "")
	e.ResponseData = encoded(map[string]any{"decision": "Search", "isEnforced": false, "found": found})
	c.decided.events = append(c.decided.events, e)
}

func policyOf(d access.Decision) string {
	if d.Policy == nil {
		return ""
	}
	return d.Policy.ID
}

func (c *Call) note(q access.Request, allowed bool, policy string, trace activity.Trace, environment map[string]string) {
	d := &c.decided
	if d.together && trace == nil || len(d.events) >= maxDecisions {
		c.count(q, allowed, environment)
		return
	}
	e := c.decision(q, environment)
	e.Trace = trace
	said := map[string]any{"decision": "Permit", "isEnforced": true}
	if policy != "" {
		said["policy_id"] = policy
	}
	if allowed {
		e.SetReason(http.StatusOK, "")
	} else {
		said["decision"] = "Deny"
		e.SetReason(http.StatusForbidden, "No policy allows "+q.Subject+" to "+q.Action+".")
		e.Severity = activity.Warning // it is everyday business: the refusal of a request has an event of its own
	}
	e.ResponseData = encoded(said)
	d.events = append(d.events, e)
}

// count adds a decision to the one event of its action.
func (c *Call) count(q access.Request, allowed bool, environment map[string]string) {
	d := &c.decided
	t, ok := d.tallies[q.Action]
	if !ok {
		if len(d.tallies) >= maxDecisions {
			return // an asking service has named as many actions
		}
		q.Resource = map[string]string{access.AccountID: q.Resource[access.AccountID], access.ServiceName: q.Resource[access.ServiceName]}
		t = &tally{event: c.decision(q, environment)}
		t.event.SetReason(http.StatusOK, "")
		if d.tallies == nil {
			d.tallies = map[string]*tally{}
		}
		d.tallies[q.Action] = t
		d.events = append(d.events, t.event)
	}
	if allowed {
		t.permits++
	} else {
		t.denies++
	}
}

// decision begins the event of a decision
// (reference/access-and-audit.md section 6.6 shows its like).
func (c *Call) decision(q access.Request, environment map[string]string) *activity.Event {
	e := c.event(activity.ActionEvaluated, Target{TypeURI: "iam-access-management/policy", Name: q.Action})
	e.Trace = nil
	if id := q.Resource[access.Resource]; id != "" {
		e.Target.ID = id
	}
	request := map[string]any{
		"action": activity.Clip(q.Action), "reqOrder": c.decided.order,
		"subject.attributes":  map[string]string{"id": activity.Clip(q.Subject), "accountId": activity.Clip(q.AccountID)},
		"resource.attributes": clipped(q.Resource),
	}
	c.decided.order++
	if len(environment) > 0 {
		request["environment.attributes"] = environment
	}
	e.RequestData = encoded(request)
	return e
}

// Bounds on the attributes in the event of a decision, in bytes.
const (
	maxAttribute  = 256
	maxAttributes = 4 << 10
)

// clipped bounds attributes: an asking service has made them.
func clipped(attributes map[string]string) map[string]string {
	out, room := map[string]string{}, maxAttributes
	for _, name := range slices.Sorted(maps.Keys(attributes)) {
		value := attributes[name]
		if len(value) > maxAttribute {
			value = activity.Clip(value[:maxAttribute]) + "…"
		}
		// One byte can become six in JSON.
		if room -= 6 * (len(name) + len(value)); room < 0 {
			out["…"] = "more attributes"
			return out
		}
		out[name] = value
	}
	return out
}

// encoded encodes event data made of strings, numbers and truth values, which
// always encodes.
func encoded(v map[string]any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	return b
}
