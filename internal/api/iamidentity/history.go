package iamidentity

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/object"
)

// historyEntry is one change of an object. All its fields are required by
// published clients (reference/iam-identity.md section 4.1).
type historyEntry struct {
	Timestamp    string   `json:"timestamp"`
	IAMID        string   `json:"iam_id"`
	IAMIDAccount string   `json:"iam_id_account"`
	Action       string   `json:"action"`
	Params       []string `json:"params"`
	Message      string   `json:"message"`
}

// usageView tells how often an identity or key was used to log in.
type usageView struct {
	LastAuthn  string `json:"last_authn,omitempty"`
	AuthnCount int64  `json:"authn_count"`
}

// extras is what an answer has when the query asks for it: every view of an
// object that can be asked so embeds it.
type extras struct {
	History  []historyEntry `json:"history,omitempty"`
	Activity *usageView     `json:"activity,omitempty"`
}

// extras reads the query of a request about one object and looks up what it
// asks for. usedAs is the key under which the object's logins are counted.
func (r *routes) extras(c *api.Call, target, usedAs string, m *object.Meta) (extras, error) {
	var x extras
	history, err := flag(c, "include_history")
	if err != nil {
		return x, err
	}
	use, err := flag(c, "include_activity")
	if err != nil {
		return x, err
	}
	if use {
		n, last := c.Usage.Of(usedAs)
		x.Activity = &usageView{AuthnCount: n}
		if !last.IsZero() {
			x.Activity.LastAuthn = stamp(last)
		}
	}
	if history {
		x.History, err = r.history(c, target, m)
	}
	return x, err
}

// history returns the changes of the object with a CRN, the oldest first. An
// object knows by itself who made it and when, so its creation is told even
// when the activity log does not have it (any more).
func (r *routes) history(c *api.Call, target string, m *object.Meta) ([]historyEntry, error) {
	events, err := c.History(target)
	if err != nil {
		return nil, err
	}
	out := make([]historyEntry, 0, len(events)+1)
	if len(events) == 0 || !strings.HasSuffix(events[0].Action, ".create") {
		out = append(out, historyEntry{
			Timestamp: stamp(m.CreatedAt), IAMID: m.CreatedBy, IAMIDAccount: c.Account(), Action: "create",
			Params: []string{}, Message: "IAM Identity Service: create",
		})
	}
	for _, e := range events {
		out = append(out, historyEntry{
			Timestamp: stamp(e.Time.Time), IAMID: e.Initiator.ID, IAMIDAccount: e.AccountID, Action: e.Action,
			Params: params(e), Message: e.Message,
		})
	}
	return out, nil
}

// params are the plain values among an event's data, as name=value.
func params(e *activity.Event) []string {
	out := []string{}
	var data map[string]any
	if json.Unmarshal(e.ResponseData, &data) != nil {
		return out // the event was made without any
	}
	for _, name := range slices.Sorted(maps.Keys(data)) {
		switch v := data[name].(type) {
		case string, bool, float64:
			out = append(out, fmt.Sprintf("%s=%v", name, v))
		}
	}
	return out
}

// flag reads a parameter that is true or false.
func flag(c *api.Call, name string) (bool, error) { return readFlag(name, c.R.URL.Query().Get(name)) }

func readFlag(name, value string) (bool, error) {
	switch strings.ToLower(value) {
	case "true":
		return true, nil
	case "", "false":
		return false, nil
	}
	return false, fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be true or false.", name).OnParameter(name, value)
}
