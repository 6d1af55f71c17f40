package api

import (
	"encoding/json"
	"fmt"
	"slices"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store"
)

// maxHistory bounds the events of one object's history.
const maxHistory = 100

// History returns the events of the changes to the object with a CRN, the
// oldest first. When there are very many, they are the latest ones.
func (c *Call) History(target string) ([]*activity.Event, error) {
	if c.Events == nil || target == "" {
		return nil, nil
	}
	stored, err := c.Events.Events(c.R.Context(), store.Query{AccountID: c.Account(), Changed: target, Limit: maxHistory})
	if err != nil {
		return nil, fault.Of(fmt.Errorf("read the history of %s: %w", target, err))
	}
	out := make([]*activity.Event, len(stored))
	for i, s := range stored {
		out[i] = new(activity.Event)
		if err := json.Unmarshal(s.Doc, out[i]); err != nil {
			return nil, fault.Of(fmt.Errorf("read the history of %s: %w", target, err))
		}
	}
	slices.Reverse(out)
	return out, nil
}
