package iampolicy

import (
	"cmp"
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
var sortKeys = map[string]func(*access.Policy) string{
	"id":                  func(p *access.Policy) string { return p.ID },
	"type":                func(p *access.Policy) string { return p.Type },
	"href":                func(p *access.Policy) string { return path(p.API) + p.ID },
	"created_at":          func(p *access.Policy) string { return api.SortKey(p.CreatedAt, "") },
	"created_by_id":       func(p *access.Policy) string { return p.CreatedBy },
	"last_modified_at":    func(p *access.Policy) string { return api.SortKey(p.ModifiedAt, "") },
	"last_modified_by_id": func(p *access.Policy) string { return p.ModifiedBy },
	"state":               func(p *access.Policy) string { return p.State },
}

func (v version) list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	q := c.R.URL.Query()
	account := q.Get("account_id")
	if account == "" {
		return api.Reply{}, fault.New(fault.Invalid, "missing_required_query_parameter", "The parameter account_id is required.").OnParameter("account_id", "")
	}
	display, err := format(c)
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
			return !keep(p) || !visible(p, may)
		})
	}
	page, limit, start, err := paged(c, all)
	if err != nil {
		return api.Reply{}, err
	}
	out := listView{Limit: limit, First: link{v.page(c, limit, "")}, Policies: make([]any, len(page))}
	if start != "" {
		out.Next = &after{Href: v.page(c, limit, start), Start: start}
	}
	for i, p := range page {
		out.Policies[i] = v.show(c, p, display)
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

// paged orders the policies as asked and returns the page of them that was
// asked for, and the start of the next one or "".
func paged(c *api.Call, all []*access.Policy) (page []*access.Policy, limit int, next string, err error) {
	q := c.R.URL.Query()
	field, descending := strings.CutPrefix(q.Get("sort"), "-")
	key, ok := sortKeys[cmp.Or(field, "created_at")]
	if !ok {
		return nil, 0, "", api.Invalid("The parameter sort does not take %q.", q.Get("sort")).OnParameter("sort", q.Get("sort"))
	}
	limit, err = c.IntParameter("limit", 0, 1, maxLimit)
	if err != nil {
		return nil, 0, "", err
	}
	var from api.Cursor
	if s := q.Get("start"); s != "" {
		if from, err = api.ParseCursor("start", s); err != nil {
			return nil, 0, "", err
		}
	}
	if limit == 0 && from.Limit > 0 {
		limit = min(from.Limit, maxLimit)
	}
	unique := func(p *access.Policy) string { return key(p) + "\x00" + p.ID }
	order := func(a, b string) int {
		if descending {
			a, b = b, a
		}
		return cmp.Compare(a, b)
	}
	slices.SortFunc(all, func(a, b *access.Policy) int { return order(unique(a), unique(b)) })
	if from.After != "" {
		all = slices.DeleteFunc(all, func(p *access.Policy) bool { return order(unique(p), from.After) <= 0 })
	}
	if limit == 0 || limit >= len(all) {
		return all, limit, "", nil
	}
	page = all[:limit]
	return page, limit, api.Cursor{After: unique(page[limit-1]), Limit: limit}.String(), nil
}

// format reads how policies are to be shown. The time of the last permit is
// not recorded, so asking for it changes nothing.
func format(c *api.Call) (display bool, err error) {
	switch s := c.R.URL.Query().Get("format"); s {
	case "", "include_last_permit":
		return false, nil
	case "display":
		return true, nil
	default:
		return false, api.Invalid("The parameter format does not take %q.", s).OnParameter("format", s)
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
