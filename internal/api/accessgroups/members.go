package accessgroups

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// Types of a member.
const (
	typeUser    = "user"
	typeService = "service"
	typeProfile = "profile"
)

type newMembers struct {
	Members []struct {
		IAMID string `json:"iam_id"`
		Type  string `json:"type"`
	} `json:"members"`
}

type oldMembers struct {
	Members []string `json:"members"`
}

// result is what became of one member of a bulk call.
type result struct {
	IAMID       string       `json:"iam_id"`
	Type        string       `json:"type,omitempty"`
	CreatedAt   string       `json:"created_at,omitempty"`
	CreatedByID string       `json:"created_by_id,omitempty"`
	StatusCode  int          `json:"status_code"`
	Trace       string       `json:"trace,omitempty"`
	Errors      []errorEntry `json:"errors,omitempty"`
}

type results struct {
	AccessGroupID string   `json:"access_group_id,omitempty"`
	Members       []result `json:"members"`
}

// failed describes one member's fault as a call of its own would have.
func failed(c *api.Call, r result, f *fault.Error) result {
	v := describeFault(c, f)
	r.StatusCode, r.Trace, r.Errors = v.StatusCode, v.Trace, v.Errors
	return r
}

// bulk checks the number of members in a call.
func bulk(n int) error {
	if n < 1 || n > access.MaxMembersPerCall {
		return api.Invalid("The call must name 1 to %d members.", access.MaxMembersPerCall).On("members")
	}
	return nil
}

// addMembers adds each member that can be added; one that cannot does not keep
// the others out. A member that is in the group already stays as it is.
func addMembers(c *api.Call, tx *directory.Tx, b *newMembers, old *access.Group) (api.Reply, api.Target, error) {
	t := target(c, old.ID, old.Name, "iam-groups/member")
	if err := bulk(len(b.Members)); err != nil {
		return api.Reply{}, t, err
	}
	g := *old
	g.Members = slices.Clone(old.Members)
	out := results{Members: make([]result, len(b.Members))}
	for i, m := range b.Members {
		r := result{IAMID: m.IAMID, Type: m.Type}
		member, ok := g.Member(m.IAMID)
		if !ok || member.Type != m.Type {
			if f := admissible(c, m.IAMID, m.Type); f != nil {
				out.Members[i] = failed(c, r, f)
				continue
			}
			member = access.Member{IAMID: m.IAMID, Type: m.Type, CreatedAt: timestamp(tx.Now), CreatedBy: c.Caller.IAMID}
			g.Members = append(g.Members, member)
		}
		r.StatusCode, r.CreatedAt, r.CreatedByID = http.StatusOK, member.CreatedAt, member.CreatedBy
		out.Members[i] = r
	}
	if len(g.Members) > len(old.Members) {
		c.Directory.Groups.Put(tx, &g)
	}
	return api.Reply{Status: http.StatusMultiStatus, Body: out, ResponseData: outcome(out)}, t, nil
}

// outcome is what an activity event tells about a bulk call.
func outcome(r results) map[string]any {
	members := make([]map[string]any, len(r.Members))
	for i, m := range r.Members {
		members[i] = map[string]any{"iam_id": m.IAMID, "status_code": m.StatusCode}
	}
	return map[string]any{"members": members}
}

// admissible reports why an identity cannot become a member, or nil. It must be
// of the type that the caller says and exist in the account.
func admissible(c *api.Call, iamID, typ string) *fault.Error {
	var exists bool
	var kind crn.Kind
	switch typ {
	case typeUser:
		kind = crn.KindUser
		_, exists = c.Directory.Users.Get(directory.UserKey(c.Account(), iamID))
	case typeService:
		kind = crn.KindServiceID
		s, ok := c.Directory.ServiceIDs.Get(crn.BareID(iamID))
		exists = ok && s.AccountID == c.Account()
	case typeProfile:
		kind = crn.KindProfile
		p, ok := c.Directory.Profiles.Get(crn.BareID(iamID))
		exists = ok && p.AccountID == c.Account()
	default:
		return api.Invalid("The type of a member must be %s, %s or %s.", typeUser, typeService, typeProfile).On("members.type")
	}
	if crn.KindOf(iamID) != kind {
		return api.Invalid("The iam_id %q is not that of a %s.", iamID, typ).On("members.iam_id")
	}
	if !exists {
		return api.NotFound(typ, iamID)
	}
	if len(c.Directory.StaticGroupsOf(c.Account(), iamID)) >= access.MaxGroupsPerIdentity {
		return fault.New(fault.Conflict, "conflict", "The %s %q is in %d access groups already, which is the most that one can be in.", typ, iamID, access.MaxGroupsPerIdentity)
	}
	return nil
}

// without returns the group without a member, or false when there is no such member.
func without(g access.Group, iamID string) (access.Group, bool) {
	i := slices.IndexFunc(g.Members, func(m access.Member) bool { return m.IAMID == iamID })
	if i < 0 {
		return g, false
	}
	g.Members = slices.Concat(g.Members[:i], g.Members[i+1:])
	return g, true
}

func notMember(iamID string) *fault.Error {
	return fault.New(fault.NotFound, "not_found", "The identity %q is not a member of the access group.", iamID)
}

func hasMember(c *api.Call, g *access.Group) (api.Reply, error) {
	iamID := c.R.PathValue("iam_id")
	if _, ok := g.Member(iamID); !ok {
		return api.Reply{}, notMember(iamID)
	}
	return api.Reply{Status: http.StatusNoContent}, nil
}

func removeMember(c *api.Call, tx *directory.Tx, _ *api.None, old *access.Group) (api.Reply, api.Target, error) {
	iamID := c.R.PathValue("iam_id")
	t := target(c, old.ID, old.Name, "iam-groups/member")
	g, ok := without(*old, iamID)
	if !ok {
		return api.Reply{}, t, notMember(iamID)
	}
	c.Directory.Groups.Put(tx, &g)
	return api.Reply{Status: http.StatusNoContent, ResponseData: map[string]any{
		"members": []map[string]any{{"iam_id": iamID, "status_code": http.StatusNoContent}},
	}}, t, nil
}

func removeMembers(c *api.Call, tx *directory.Tx, b *oldMembers, old *access.Group) (api.Reply, api.Target, error) {
	t := target(c, old.ID, old.Name, "iam-groups/member")
	if err := bulk(len(b.Members)); err != nil {
		return api.Reply{}, t, err
	}
	g := *old
	out := results{AccessGroupID: old.ID, Members: make([]result, len(b.Members))}
	for i, iamID := range b.Members {
		r := result{IAMID: iamID, StatusCode: http.StatusOK}
		next, ok := without(g, iamID)
		if !ok {
			r = failed(c, r, notMember(iamID))
		}
		g, out.Members[i] = next, r
	}
	if len(g.Members) == len(old.Members) {
		return api.Reply{}, t, fault.New(fault.NotFound, "not_found", "None of the identities is a member of the access group.")
	}
	c.Directory.Groups.Put(tx, &g)
	return api.Reply{Status: http.StatusMultiStatus, Body: out, ResponseData: outcome(out)}, t, nil
}

type memberList struct {
	paging
	Members []memberView `json:"members"`
}

type memberView struct {
	IAMID          string `json:"iam_id"`
	Type           string `json:"type"`
	MembershipType string `json:"membership_type"`
	Name           string `json:"name,omitempty"`
	Email          string `json:"email,omitempty"`
	Description    string `json:"description,omitempty"`
	Href           string `json:"href"`
	CreatedAt      string `json:"created_at"`
	CreatedByID    string `json:"created_by_id"`
}

var memberSort = map[string]func(access.Member) string{
	"iam_id":     func(m access.Member) string { return m.IAMID },
	"type":       func(m access.Member) string { return m.Type },
	"created_at": func(m access.Member) string { return m.CreatedAt },
}

func listMembers(c *api.Call, g *access.Group) (api.Reply, error) {
	q := c.R.URL.Query()
	membership := cmp.Or(q.Get("membership_type"), "all")
	if !slices.Contains([]string{"static", "dynamic", "all"}, membership) {
		return api.Reply{}, api.Invalid("The parameter membership_type must be static, dynamic or all.").OnParameter("membership_type", membership)
	}
	// There are only static memberships.
	all := slices.DeleteFunc(slices.Clone(g.Members), func(m access.Member) bool {
		return membership == "dynamic" || q.Get("type") != "" && q.Get("type") != m.Type
	})
	href := "/v2/groups/" + g.ID + "/members"
	page, p, err := paged(c, href, all, memberSort, "created_at", func(m access.Member) string { return m.IAMID })
	if err != nil {
		return api.Reply{}, err
	}
	out := memberList{paging: p, Members: make([]memberView, len(page))}
	for i, m := range page {
		v := memberView{
			IAMID: m.IAMID, Type: m.Type, MembershipType: "static",
			Href: c.URL + href + "/" + url.PathEscape(m.IAMID), CreatedAt: m.CreatedAt, CreatedByID: m.CreatedBy,
		}
		if q.Get("verbose") == "true" {
			v.Name, v.Email, v.Description = describe(c, m)
		}
		out.Members[i] = v
	}
	return api.Reply{Body: out}, nil
}

// describe returns what the directory knows about a member. An identity that
// was deleted has no name.
func describe(c *api.Call, m access.Member) (name, email, description string) {
	switch m.Type {
	case typeUser:
		if u, ok := c.Directory.Users.Get(directory.UserKey(c.Account(), m.IAMID)); ok {
			return u.Name, u.Email, ""
		}
	case typeService:
		if s, ok := c.Directory.ServiceIDs.Get(crn.BareID(m.IAMID)); ok && s.AccountID == c.Account() {
			return s.Name, "", s.Description
		}
	case typeProfile:
		if p, ok := c.Directory.Profiles.Get(crn.BareID(m.IAMID)); ok && p.AccountID == c.Account() {
			return p.Name, "", p.Description
		}
	}
	return "", "", ""
}
