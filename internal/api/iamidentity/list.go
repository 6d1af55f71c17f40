package iamidentity

import (
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/object"
)

// Page sizes (reference/iam-identity.md section 4.1).
const (
	defaultPage = 20
	maxPage     = 100
)

// choices are the parameters that choose, order and furnish the items of a
// list. They travel in the page token, because clients may send it alone.
var choices = []string{
	"account_id", "name", "iam_id", "scope", "type", "group_id", "filter", "sort", "order", "include_history", "show_group_id",
}

// filterable are the attributes that a filter may name.
var filterable = []string{"name", "description", "id", "iam_id", "created_by"}

// view is one request for a part of a list.
type view struct {
	query   url.Values // the choices
	after   api.Cursor
	limit   int
	sort    string
	desc    bool
	filter  predicate
	history bool
}

// parseView reads the parameters of a list. Whatever a page token holds is
// checked like the parameters themselves: its text comes from the client.
func parseView(c *api.Call, accountRequired bool, sorts ...string) (view, error) {
	given := c.R.URL.Query()
	v := view{query: url.Values{}, limit: defaultPage}
	source := given
	if text := given.Get("pagetoken"); text != "" {
		cursor, err := api.ParseCursor("pagetoken", text)
		if err != nil {
			return view{}, err
		}
		v.after, source, accountRequired = cursor, cursor.Query, false
		if cursor.Limit > 0 {
			v.limit = min(cursor.Limit, maxPage)
		}
	}
	for _, name := range choices {
		if s := source.Get(name); s != "" {
			v.query.Set(name, s)
		}
	}
	for _, account := range []string{given.Get("account_id"), v.query.Get("account_id")} {
		if account == "" && !accountRequired {
			continue
		}
		if err := checkAccount(c, account); err != nil {
			return view{}, err
		}
	}
	limit, err := c.IntParameter("pagesize", v.limit, 1, maxPage)
	if err != nil {
		return view{}, err
	}
	v.limit = limit
	if v.sort, err = v.oneOf("sort", append([]string{""}, sorts...)...); err != nil {
		return view{}, err
	}
	order, err := v.oneOf("order", "", "asc", "desc")
	if err != nil {
		return view{}, err
	}
	v.desc = order == "desc"
	if v.history, err = readFlag("include_history", v.query.Get("include_history")); err != nil {
		return view{}, err
	}
	v.filter, err = parseFilter(v.query.Get("filter"), filterable...)
	return v, err
}

// oneOf returns a choice whose values are an enumeration; "" among them admits
// its absence.
func (v view) oneOf(name string, values ...string) (string, error) {
	s := v.query.Get(name)
	if !slices.Contains(values, s) {
		known := strings.Trim(strings.Join(values, ", "), ", ")
		return "", fault.New(fault.Invalid, "invalid_parameter", "The parameter %s must be one of %s.", name, known).OnParameter(name, s)
	}
	return s, nil
}

// admits reports whether the list's name and filter admit an object.
func (v view) admits(id, iamID, name, description string, m *object.Meta) bool {
	if want := v.query.Get("name"); want != "" && want != name {
		return false
	}
	return v.filter(func(attribute string) string {
		switch attribute {
		case "name":
			return name
		case "description":
			return description
		case "id":
			return id
		case "iam_id":
			return iamID
		}
		return m.CreatedBy
	})
}

// sortKey returns the text that an object is ordered by. The id makes it
// unique; no property contains the separator.
func (v view) sortKey(id, name, description string, m *object.Meta) string {
	value := timeKey(m.CreatedAt)
	switch v.sort {
	case "name":
		value = name
	case "description":
		value = description
	case "modified_at":
		value = timeKey(m.ModifiedAt)
	case "created_by":
		value = m.CreatedBy
	}
	return value + "\x00" + id
}

func timeKey(t time.Time) string { return t.UTC().Format("20060102150405.000000000") }

// list answers with the part of the items that the view asks for.
func list[T, W any](c *api.Call, v view, path, name string, items []T, key func(T) string, encode func(T) (W, error)) (api.Reply, error) {
	compare := func(a, b string) int {
		if v.desc {
			a, b = b, a
		}
		return strings.Compare(a, b)
	}
	slices.SortFunc(items, func(a, b T) int { return compare(key(a), key(b)) })
	start := 0
	if v.after.After != "" {
		start, _ = slices.BinarySearchFunc(items, v.after.After, func(item T, after string) int {
			if compare(key(item), after) <= 0 {
				return -1
			}
			return 1
		})
	}
	end := min(start+v.limit, len(items))

	link := func(cursor *api.Cursor) string {
		q := url.Values{"pagesize": {strconv.Itoa(v.limit)}}
		if cursor == nil {
			for k, values := range v.query {
				q[k] = values
			}
		} else {
			cursor.Limit, cursor.Query = v.limit, v.query
			q.Set("pagetoken", cursor.String())
			if account := v.query.Get("account_id"); account != "" {
				q.Set("account_id", account)
			}
		}
		return c.URL + path + "?" + q.Encode()
	}
	body := map[string]any{"offset": start, "limit": v.limit, "first": link(nil)}
	if start > 0 {
		before := &api.Cursor{Offset: max(start-v.limit, 0)}
		if before.Offset > 0 {
			before.After = key(items[before.Offset-1])
		}
		body["previous"] = link(before)
	}
	if end < len(items) && end > start {
		body["next"] = link(&api.Cursor{After: key(items[end-1]), Offset: end})
	}
	shown := make([]W, 0, end-start)
	for _, item := range items[start:end] {
		one, err := encode(item)
		if err != nil {
			return api.Reply{}, err
		}
		shown = append(shown, one)
	}
	body[name] = shown
	return api.Reply{Body: body}, nil
}
