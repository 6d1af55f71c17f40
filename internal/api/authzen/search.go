package authzen

import (
	"cmp"
	"encoding/base64"
	"maps"
	"slices"

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

// anyAction stands where a question must name an action and none is asked for.
const anyAction = "any"

// searchAction lists what a subject may do on a resource.
func (h *handler) searchAction(c *api.Call, s *search) (api.Reply, error) {
	if s.Subject == nil || s.Subject.Type == "" || s.Resource == nil {
		return api.Reply{}, api.Invalid("A search for actions needs subject, with its type, and resource.")
	}
	if err := s.Resource.complete(); err != nil {
		return api.Reply{}, err
	}
	s.Action = &action{Name: anyAction}
	request, err := h.request(c, s.question)
	if err != nil {
		return api.Reply{}, err
	}
	if err := mayAsk(c, request.Resource); err != nil {
		return api.Reply{}, err
	}
	var found []string
	if h.live(c, s.Subject, request) == nil {
		found = access.Permitted(c.Directory, request)
	}
	c.NoteSearch(request, len(found))
	return s.paged(found, func(name string) any { return action{Name: name} })
}

type foundSubject struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

// searchSubject lists who may do an action on a resource, of the type that the
// question names. It looks at the account's policies one by one, so it is for
// people who ask and not for the path of a request.
func (h *handler) searchSubject(c *api.Call, s *search) (api.Reply, error) {
	kind, ok := crn.KindUnknown, false
	if s.Subject != nil {
		kind, ok = subjectTypes[s.Subject.Type] // an id is ignored, as AuthZEN demands
	}
	if !ok || s.Action == nil || s.Action.Name == "" || s.Resource == nil {
		return api.Reply{}, api.Invalid("A search for subjects needs subject.type (user, service_id, profile or crn), action.name and resource.")
	}
	if err := s.Resource.complete(); err != nil {
		return api.Reply{}, err
	}
	resource, tags, err := attributes(c, *s.Resource)
	if err != nil {
		return api.Reply{}, err
	}
	if err := mayAsk(c, resource); err != nil {
		return api.Reply{}, err
	}
	q := access.Request{AccountID: c.Account(), Action: s.Action.Name, Resource: resource, Time: c.Now(), Tags: tags}
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
	c.NoteSearch(q, len(ids))
	return s.paged(slices.Sorted(maps.Keys(ids)), func(id string) any { return foundSubject{Type: s.Subject.Type, ID: id} })
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

// paged answers with one page of what was found, which is sorted. A page token
// is the last entry of the page before, so that nothing is left out or told
// twice when access changes between two pages.
func (s *search) paged(found []string, show func(string) any) (api.Reply, error) {
	limit := cmp.Or(s.Page.Limit, maxResults)
	if limit < 0 {
		return api.Reply{}, api.Invalid("page.limit must not be negative.").On("page")
	}
	last, err := base64.RawURLEncoding.DecodeString(s.Page.Token)
	if err != nil {
		return api.Reply{}, fault.New(fault.Invalid, "invalid_parameter", "page.token is not one that this server gave out.").On("page")
	}
	start, at := slices.BinarySearch(found, string(last))
	if at {
		start++
	}
	end := min(start+min(limit, maxResults), len(found))
	out := results{Results: []any{}, Page: page{Count: end - start, Total: len(found)}}
	for _, name := range found[start:end] {
		out.Results = append(out.Results, show(name))
	}
	if end < len(found) {
		out.Page.Next = base64.RawURLEncoding.EncodeToString([]byte(found[end-1]))
	}
	return api.Reply{Body: out}, nil
}
