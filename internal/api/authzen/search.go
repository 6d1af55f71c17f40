package authzen

import (
	"cmp"
	"maps"
	"slices"
	"strconv"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// maxResults bounds one page of a search.
const maxResults = 1000

type search struct {
	question
	Page struct {
		Token string `json:"token"`
		Limit int    `json:"limit"`
	} `json:"page"`
}

type results struct {
	Results []any `json:"results"`
	Page    page  `json:"page"`
}

type page struct {
	Next  string `json:"next_token"` // "" on the last page
	Count int    `json:"count"`
	Total int    `json:"total"`
}

// searchAction lists what a subject may do on a resource.
func (h *handler) searchAction(c *api.Call, s *search) (api.Reply, error) {
	s.Action = &action{Name: "any"} // the thing searched for has no name
	request, err := h.request(c, s.question)
	if err != nil {
		return api.Reply{}, err
	}
	if err := mayAsk(c, request.Resource); err != nil {
		return api.Reply{}, err
	}
	var found []any
	if h.live(c, s.Subject, request) == nil {
		for _, name := range access.Permitted(c.Directory, request) {
			found = append(found, action{Name: name})
		}
	}
	return s.paged(found)
}

type foundSubject struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// searchSubject lists who may do an action on a resource, of the type that the
// question names. It walks the policies of the service, not those of every
// identity.
func (h *handler) searchSubject(c *api.Call, s *search) (api.Reply, error) {
	kind, ok := crn.KindUnknown, false
	if s.Subject != nil {
		kind, ok = subjectTypes[s.Subject.Type]
	}
	if !ok || s.Subject.ID != "" || s.Action == nil || s.Resource == nil {
		return api.Reply{}, api.Invalid("A search for subjects needs subject.type (user, service_id, profile or crn) without an id, action and resource.")
	}
	resource, err := attributes(c, *s.Resource)
	if err != nil {
		return api.Reply{}, err
	}
	if err := mayAsk(c, resource); err != nil {
		return api.Reply{}, err
	}
	q := access.Request{AccountID: c.Account(), Action: s.Action.Name, Resource: resource, Time: c.Now(), Tags: list(s.Resource.Properties["tags"])}
	ids := map[string]bool{}
	catalog := c.Directory.Catalog(c.Account())
	for _, p := range c.Directory.PoliciesByAccount.Get(c.Account()) {
		if p.Type != access.TypeAccess || !p.Grants(catalog, q) {
			continue
		}
		for _, id := range members(c, p) {
			if crn.KindOf(id) == kind && (kind == crn.KindCRN || h.subjects.Live(c.Account(), id) == nil) {
				ids[id] = true
			}
		}
	}
	var found []any
	for _, id := range slices.Sorted(maps.Keys(ids)) {
		found = append(found, foundSubject{Type: s.Subject.Type, ID: id})
	}
	return s.paged(found)
}

// members returns the IAM IDs that a policy's subject stands for.
func members(c *api.Call, p *access.Policy) []string {
	group, ok := access.Get(p.Subject, access.AccessGroupID)
	if !ok {
		return []string{p.SubjectID()}
	}
	d := c.Directory
	if group == access.PublicAccess {
		if !d.GroupSettingsOf(c.Account()).PublicAccess {
			return nil
		}
		return everybody(d, c.Account())
	}
	g, ok := d.Groups.Get(group)
	if !ok || g.AccountID != c.Account() {
		return nil
	}
	var ids []string
	for _, m := range g.Members {
		ids = append(ids, m.IAMID)
	}
	return slices.AppendSeq(ids, maps.Keys(d.DynamicMembersOf(group, c.Now())))
}

func everybody(d *directory.Directory, account string) []string {
	var ids []string
	for _, u := range d.UsersByAccount.Get(account) {
		ids = append(ids, u.IAMID)
	}
	for _, s := range d.ServiceIDsByAccount.Get(account) {
		ids = append(ids, crn.IAMID(s.ID))
	}
	for _, p := range d.ProfilesByAccount.Get(account) {
		ids = append(ids, crn.IAMID(p.ID))
	}
	return ids
}

func (s *search) paged(found []any) (api.Reply, error) {
	limit := cmp.Or(s.Page.Limit, maxResults)
	start := 0
	if s.Page.Token != "" {
		var err error
		if start, err = strconv.Atoi(s.Page.Token); err != nil || start < 0 {
			return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "page.token is not one that this server gave out.").On("page")
		}
	}
	if limit < 1 || limit > maxResults {
		return api.Reply{}, api.Invalid("page.limit must be a number from 1 to %d.", maxResults).On("page")
	}
	start = min(start, len(found))
	end := min(start+limit, len(found))
	out := results{Results: slices.Concat([]any{}, found[start:end]), Page: page{Count: end - start, Total: len(found)}}
	if end < len(found) {
		out.Page.Next = strconv.Itoa(end)
	}
	return api.Reply{Body: out}, nil
}
