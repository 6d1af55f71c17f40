package accessgroups

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"strings"

	"tabard.dev/tabard/internal/api"
)

// Page sizes (reference/access-and-audit.md section 4.3); the default is ours.
const (
	maxLimit     = 100
	defaultLimit = 50
)

// paging is the frame of a list. Clients read the next offset out of
// next.href, and some count up to total_count.
type paging struct {
	Limit      int   `json:"limit"`
	Offset     int   `json:"offset"`
	TotalCount int   `json:"total_count"`
	First      *link `json:"first"`
	Previous   *link `json:"previous,omitempty"`
	Next       *link `json:"next,omitempty"`
	Last       *link `json:"last"`
}

type link struct {
	Href string `json:"href"`
}

// paged returns the page of all that the query's limit, offset and sort ask
// for. The id, which is unique, orders what the sort key leaves equal.
func paged[T any](c *api.Call, path string, all []T, keys map[string]func(T) string, def string, id func(T) string) ([]T, paging, error) {
	q := c.R.URL.Query()
	limit, err := c.IntParameter("limit", defaultLimit, 0, maxLimit)
	if err != nil {
		return nil, paging{}, err
	}
	offset, err := c.IntParameter("offset", 0, 0, math.MaxInt32)
	if err != nil {
		return nil, paging{}, err
	}
	field, descending := strings.CutPrefix(q.Get("sort"), "-")
	key, ok := keys[cmp.Or(field, def)]
	if !ok {
		return nil, paging{}, api.Invalid("The parameter sort does not take %q.", q.Get("sort")).OnParameter("sort", q.Get("sort"))
	}
	slices.SortFunc(all, func(a, b T) int {
		n := cmp.Or(cmp.Compare(key(a), key(b)), cmp.Compare(id(a), id(b)))
		if descending {
			return -n
		}
		return n
	})
	at := func(offset int) *link {
		q := c.R.URL.Query()
		q.Set("limit", strconv.Itoa(limit))
		q.Set("offset", strconv.Itoa(offset))
		return &link{Href: c.URL + path + "?" + q.Encode()}
	}
	total := len(all)
	start := min(offset, total)
	end := min(start+limit, total)
	p := paging{Limit: limit, Offset: offset, TotalCount: total, First: at(0), Last: at(max(total-1, 0) / max(limit, 1) * limit)}
	if offset > 0 {
		p.Previous = at(max(offset-limit, 0))
	}
	if limit > 0 && end < total {
		p.Next = at(end)
	}
	return all[start:end], p, nil
}
