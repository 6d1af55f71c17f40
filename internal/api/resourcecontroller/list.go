package resourcecontroller

import (
	"net/url"
	"time"

	"tabard.dev/tabard/internal/api"
)

// maxPage bounds a page, and is its default
// (reference/access-and-audit.md section 5.2).
const maxPage = 100

// pageBody is the answer of every list of the Resource Controller that pages.
type pageBody[B any] struct {
	RowsCount int     `json:"rows_count"`
	NextURL   *string `json:"next_url"` // null on the last page: "" makes the sample application loop
	Resources []B     `json:"resources"`
}

// page shows one page of what a caller may see.
func page[T, B any](path string, cursor api.Cursor, seen []T, key func(T) string, encode func(T) B) api.Reply {
	rows, next := api.Page(seen, cursor, cursor.Limit, key)
	answer := pageBody[B]{RowsCount: len(rows), Resources: make([]B, len(rows))}
	for n, row := range rows {
		answer.Resources[n] = encode(row)
	}
	if next != nil {
		link := path + "?" + url.Values{"start": {next.String()}}.Encode()
		answer.NextURL = &link
	}
	return api.Reply{Body: answer}
}

// cursor returns where the page begins, with the filters. A start value
// carries the limit and the filters of the first request, because the next one
// does not repeat them, and nothing that decides what may be seen. With start,
// all other parameters are ignored.
func cursor(c *api.Call, filters ...string) (api.Cursor, error) {
	q := c.R.URL.Query()
	if start := q.Get("start"); start != "" {
		cursor, err := api.ParseCursor("start", start)
		if cursor.Limit < 1 || cursor.Limit > maxPage {
			cursor.Limit = maxPage
		}
		return cursor, err
	}
	limit, err := c.IntParameter("limit", maxPage, 1, maxPage)
	if err != nil {
		return api.Cursor{}, err
	}
	kept := url.Values{}
	for _, name := range filters {
		if q.Has(name) {
			kept.Set(name, q.Get(name))
		}
	}
	return api.Cursor{Limit: limit, Query: kept}, nil
}

// filter holds the filters of one list.
type filter struct {
	q        url.Values
	from, to time.Time
}

// newFilter reads the times that every list can be filtered by.
func newFilter(q url.Values) (filter, error) {
	f := filter{q: q}
	for name, into := range map[string]*time.Time{"updated_from": &f.from, "updated_to": &f.to} {
		s := q.Get(name)
		if s == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			return filter{}, invalidParameter(name, s, "a time such as 2026-01-08T00:00:00.000Z")
		}
		*into = t
	}
	return f, nil
}

// is reports whether a filter is absent or has the value.
func (f filter) is(name, value string) bool { return f.q.Get(name) == "" || f.q.Get(name) == value }

func (f filter) updated(t time.Time) bool {
	return !t.Before(f.from) && (f.to.IsZero() || !t.After(f.to))
}
