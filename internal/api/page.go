package api

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"slices"
	"strconv"
	"time"

	"tabard.dev/tabard/internal/fault"
)

// Cursor is the place between two pages of a list, with everything that the
// next request needs and does not repeat. Its text is opaque to clients.
type Cursor struct {
	After  string     `json:"a,omitempty"` // sort key of the last item shown
	Offset int        `json:"o,omitempty"` // how many items were shown
	Limit  int        `json:"l,omitempty"`
	Query  url.Values `json:"q,omitempty"` // the filters
}

// String encodes the cursor.
func (c Cursor) String() string {
	b, err := json.Marshal(c)
	if err != nil {
		return ""
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// ParseCursor reads what String wrote.
func ParseCursor(parameter, s string) (Cursor, error) {
	var c Cursor
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil || c.Offset < 0 || c.Limit < 0 {
		return Cursor{}, fault.New(fault.Invalid, "invalid_parameter", "The value of %s is not one that this server gave out.", parameter).OnParameter(parameter, s)
	}
	return c, nil
}

// Page returns the items after the cursor in the order of their keys, at most
// limit of them, and the cursor of the next page or nil on the last one. Keys
// must be unique; SortKey makes them.
func Page[T any](items []T, after Cursor, limit int, key func(T) string) ([]T, *Cursor) {
	slices.SortFunc(items, func(a, b T) int { return cmp.Compare(key(a), key(b)) })
	start := 0
	if after.After != "" {
		start, _ = slices.BinarySearchFunc(items, after.After, func(item T, k string) int {
			if key(item) <= k {
				return -1
			}
			return 1
		})
	}
	end := min(start+limit, len(items))
	page := items[start:end]
	if end == len(items) || len(page) == 0 {
		return page, nil
	}
	return page, &Cursor{After: key(page[len(page)-1]), Offset: after.Offset + len(page), Limit: limit, Query: after.Query}
}

// SortKey orders objects by the time of their creation; the id breaks ties.
func SortKey(created time.Time, id string) string {
	return created.UTC().Format("20060102150405.000000000") + id
}

// IntParameter reads a number from the query, within bounds.
func (c *Call) IntParameter(name string, def, lowest, highest int) (int, error) {
	s := c.R.URL.Query().Get(name)
	if s == "" {
		return def, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < lowest || n > highest {
		return 0, fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be a number from %d to %d.", name, lowest, highest).OnParameter(name, s)
	}
	return n, nil
}
