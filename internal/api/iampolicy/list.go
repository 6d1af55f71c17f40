package iampolicy

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
)

// maxLimit is the largest page that can be asked for. Without a limit a list
// is served whole, because some clients read one page only
// (reference/access-and-audit.md section 1.7).
const maxLimit = 1000

type listView struct {
	Limit    int    `json:"limit,omitempty"`
	First    link   `json:"first"`
	Next     *after `json:"next,omitempty"`
	Previous *after `json:"previous,omitempty"`
	Policies []any  `json:"policies"`
}

type link struct {
	Href string `json:"href"`
}

type after struct {
	Href  string `json:"href"`
	Start string `json:"start"`
}

// sortKeys are the fields that a list can be ordered by.
var sortKeys = map[string]func(*api.Call, *access.Policy) string{
	"id":                  func(_ *api.Call, p *access.Policy) string { return p.ID },
	"type":                func(_ *api.Call, p *access.Policy) string { return p.Type },
	"href":                func(_ *api.Call, p *access.Policy) string { return path(p.API) + p.ID },
	"created_at":          func(_ *api.Call, p *access.Policy) string { return api.SortKey(p.CreatedAt, "") },
	"created_by_id":       func(_ *api.Call, p *access.Policy) string { return p.CreatedBy },
	"last_modified_at":    func(_ *api.Call, p *access.Policy) string { return api.SortKey(p.ModifiedAt, "") },
	"last_modified_by_id": func(_ *api.Call, p *access.Policy) string { return p.ModifiedBy },
	"state":               func(_ *api.Call, p *access.Policy) string { return p.State },
}

// permitKeys are further ones of version 2, in answers that show them.
var permitKeys = map[string]func(*api.Call, *access.Policy) string{
	"last_permit_at": func(c *api.Call, p *access.Policy) string {
		_, last := c.Usage.Of(p.ID)
		return api.SortKey(last, "")
	},
	"last_permit_frequency": func(c *api.Call, p *access.Policy) string {
		count, _ := c.Usage.Of(p.ID)
		return fmt.Sprintf("%020d", count)
	},
}

func (v version) list(c *api.Call, _ func(map[string]string) bool) (api.Reply, error) {
	q := c.R.URL.Query()
	account := q.Get("account_id")
	if account == "" {
		return api.Reply{}, fault.New(fault.Invalid, "missing_required_query_parameter", "The parameter account_id is required.").OnParameter("account_id", "")
	}
	f, err := formatOf(c)
	if err != nil {
		return api.Reply{}, err
	}
	keep, err := filter(c.Directory.Catalog(c.Account()), q)
	if err != nil {
		return api.Reply{}, err
	}
	var all []*access.Policy
	// Another account's policies are not for this caller, and neither is the
	// knowledge whether there is such an account.
	if account == c.Account() {
		all = slices.DeleteFunc(c.Directory.PoliciesByAccount.Get(account), func(p *access.Policy) bool {
			return !keep(p) || over(c, p) || !visible(c, p)
		})
	}
	page, err := v.paged(c, all, f)
	if err != nil {
		return api.Reply{}, err
	}
	out := listView{Limit: page.limit, First: link{v.page(c, page.limit, "")}, Policies: make([]any, len(page.policies))}
	if page.next != "" {
		out.Next = &after{Href: v.page(c, page.limit, page.next), Start: page.next}
	}
	if page.previous != "" {
		out.Previous = &after{Href: v.page(c, page.limit, page.previous), Start: page.previous}
	}
	for i, p := range page.policies {
		out.Policies[i] = v.show(c, p, f)
	}
	return api.Reply{Body: out}, nil
}

// page is the address of a page of the list that is being shown.
func (v version) page(c *api.Call, limit int, start string) string {
	q := c.R.URL.Query()
	q.Del("start")
	if start != "" {
		q.Set("start", start)
		q.Set("limit", strconv.Itoa(limit))
	}
	return c.URL + path(v.number) + "?" + q.Encode()
}

// part is one page, with the starts of its neighbours or "".
type part struct {
	policies       []*access.Policy
	limit          int
	next, previous string
}

// paged orders the policies as asked and returns the page of them that was
// asked for.
func (v version) paged(c *api.Call, all []*access.Policy, f format) (part, error) {
	q := c.R.URL.Query()
	field, descending := strings.CutPrefix(q.Get("sort"), "-")
	key, ok := sortKeys[cmp.Or(field, "created_at")]
	if !ok && v.number == 2 && f == withPermits {
		key, ok = permitKeys[field]
	}
	if !ok {
		return part{}, api.Invalid("The parameter sort does not take %q; last_permit_at and last_permit_frequency need version 2 and format=include_last_permit.", q.Get("sort")).OnParameter("sort", q.Get("sort"))
	}
	limit, err := c.IntParameter("limit", 0, 1, maxLimit)
	if err != nil {
		return part{}, err
	}
	var from api.Cursor
	if s := q.Get("start"); s != "" {
		if from, err = api.ParseCursor("start", s); err != nil {
			return part{}, err
		}
	}
	if limit == 0 && from.Limit > 0 {
		limit = min(from.Limit, maxLimit)
	}
	// The keys are computed once: those about use change all the time.
	keys := make(map[string]string, len(all))
	for _, p := range all {
		keys[p.ID] = key(c, p) + "\x00" + p.ID
	}
	order := func(a, b string) int {
		if descending {
			a, b = b, a
		}
		return cmp.Compare(a, b)
	}
	slices.SortFunc(all, func(a, b *access.Policy) int { return order(keys[a.ID], keys[b.ID]) })
	begin := 0
	for from.After != "" && begin < len(all) && order(keys[all[begin].ID], from.After) <= 0 {
		begin++
	}
	if limit == 0 {
		return part{policies: all[begin:]}, nil
	}
	end := min(begin+limit, len(all))
	out := part{policies: all[begin:end], limit: limit}
	if end < len(all) {
		out.next = api.Cursor{After: keys[all[end-1].ID], Limit: limit}.String()
	}
	if begin > 0 {
		back := api.Cursor{Limit: limit}
		if begin > limit {
			back.After = keys[all[begin-limit-1].ID]
		}
		out.previous = back.String()
	}
	return out, nil
}

// format is how policies are to be shown.
type format int

const (
	bare format = iota
	display
	withPermits
)

func formatOf(c *api.Call) (format, error) {
	switch s := c.R.URL.Query().Get("format"); s {
	case "":
		return bare, nil
	case "display":
		return display, nil
	case "include_last_permit":
		return withPermits, nil
	default:
		return 0, api.Invalid("The parameter format does not take %q.", s).OnParameter("format", s)
	}
}

// filter returns what a list's query keeps (reference/access-and-audit.md
// section 1.7).
func filter(catalog *access.Catalog, q url.Values) (func(*access.Policy) bool, error) {
	for name, values := range map[string][]string{
		"type":         {access.TypeAccess, access.TypeAuthorization},
		"state":        {access.Active, access.Deleted},
		"service_type": {access.KindService, access.KindPlatform},
	} {
		if s := q.Get(name); s != "" && !slices.Contains(values, s) {
			return nil, api.Invalid("The parameter %s must be %s.", name, strings.Join(values, " or ")).OnParameter(name, s)
		}
	}
	state := cmp.Or(q.Get("state"), access.Active)
	// is reports whether a parameter is absent or equals what a policy has.
	is := func(parameter, got string) bool { return q.Get(parameter) == "" || q.Get(parameter) == got }
	demand := func(attrs []access.Attribute, key string) string {
		s, _ := access.Get(attrs, key)
		return s
	}
	return func(p *access.Policy) bool {
		kind := demand(p.Resource, access.ServiceType)
		if kind == "" && p.Service() != "" {
			kind = catalog.KindOf(p.Service())
		}
		return p.State == state &&
			is("iam_id", demand(p.Subject, access.IAMID)) &&
			is("access_group_id", demand(p.Subject, access.AccessGroupID)) &&
			is("type", p.Type) &&
			is("service_type", kind) &&
			is("service_name", p.Service()) &&
			is("service_group_id", demand(p.Resource, access.ServiceGroupID)) &&
			(q.Get("tag_name") == "" && q.Get("tag_value") == "" || slices.ContainsFunc(p.Tags, func(t access.Attribute) bool {
				return is("tag_name", t.Key) && is("tag_value", t.Value.Text)
			}))
	}, nil
}
