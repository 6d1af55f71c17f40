package accessgroups

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// maxIAMID bounds an IAM ID, in characters; ours.
const maxIAMID = 250

// Kinds of membership: put in by hand, made by a rule, and everybody's in the
// group Public Access.
const (
	static    = "static"
	dynamic   = "dynamic"
	inherited = "inherited"
	anyKind   = "all"
)

// membership reads the kind of membership that a query asks for.
func membership(c *api.Call, kinds ...string) (string, error) {
	kind := cmp.Or(c.R.URL.Query().Get("membership_type"), anyKind)
	if kind != anyKind && !slices.Contains(kinds, kind) {
		return "", api.Invalid("The parameter membership_type must be %s or %s.", strings.Join(kinds, ", "), anyKind).OnParameter("membership_type", kind)
	}
	return kind, nil
}

// groupsOf returns the ids of the groups that an identity is in by a kind of
// membership.
func groupsOf(c *api.Call, iamID, kind string) map[string]bool {
	out := map[string]bool{}
	if kind == static || kind == anyKind {
		for _, id := range c.Directory.StaticGroupsOf(c.Account(), iamID) {
			out[id] = true
		}
	}
	if kind == dynamic || kind == anyKind {
		for _, id := range logins(c, iamID) {
			out[id] = isDynamic(c, id, iamID) || out[id]
		}
	}
	if kind == inherited || kind == anyKind {
		out[access.PublicAccess] = true
	}
	return out
}

// logins returns the ids of the groups that rules put an identity into at its
// last login. It may have left them since.
func logins(c *api.Call, iamID string) []string {
	m, ok := c.Directory.Memberships.Get(directory.UserKey(c.Account(), iamID))
	if !ok {
		return nil
	}
	ids := make([]string, len(m.Groups))
	for i, g := range m.Groups {
		ids[i] = g.GroupID
	}
	return ids
}

// isDynamic reports whether an identity is in a group by a rule now.
func isDynamic(c *api.Call, group, iamID string) bool {
	if !slices.Contains(logins(c, iamID), group) {
		return false // without a look at all of the group's members
	}
	_, ok := c.Directory.DynamicMembersOf(group, c.Now())[iamID]
	return ok
}

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
			f := admissible(c, m.IAMID, m.Type)
			if f == nil {
				f = hasRoom(m.Type, m.IAMID, len(c.Directory.StaticGroupsOf(c.Account(), m.IAMID)))
			}
			if f != nil {
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
		members[i] = map[string]any{"iam_id": activity.Clip(m.IAMID), "status_code": m.StatusCode}
	}
	return map[string]any{"members": members}
}

// admissible reports why an identity cannot become a member, or nil. It must be
// of the type that the caller says; a service ID or profile must exist in the
// account. A user need not be there yet: the group waits for him, and until he
// is a user of the account nobody gets a token for it in his name.
func admissible(c *api.Call, iamID, typ string) *fault.Error {
	exists := true
	var kind crn.Kind
	switch typ {
	case typeUser:
		kind = crn.KindUser
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
	if crn.KindOf(iamID) != kind || !api.Printable(iamID, maxIAMID) {
		return api.Invalid("The iam_id %q is not that of a %s.", activity.Clip(iamID), typ).On("members.iam_id")
	}
	if !exists {
		return api.NotFound(typ, iamID)
	}
	return nil
}

// hasRoom reports why an identity that is in n groups cannot be in one more, or
// nil.
func hasRoom(typ, iamID string, n int) *fault.Error {
	if n < access.MaxGroupsPerIdentity {
		return nil
	}
	return fault.New(fault.Conflict, "conflict", "The %s %q is in %d access groups already, which is the most that one can be in.", typ, iamID, n)
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
	return fault.New(fault.NotFound, "not_found", "The identity %q is not a member of the access group.", activity.Clip(iamID))
}

// hasMember answers for every kind of membership.
func hasMember(c *api.Call, g *access.Group) (api.Reply, error) {
	iamID := c.R.PathValue("iam_id")
	_, ok := g.Member(iamID)
	if g.ID == access.PublicAccess {
		ok = crn.KindOf(iamID) != crn.KindUnknown
	}
	if !ok && !isDynamic(c, g.ID, iamID) {
		return api.Reply{}, notMember(iamID)
	}
	return api.Reply{Status: http.StatusNoContent}, nil
}

// notRemovable says why somebody who was not put into a group cannot be taken
// out of it.
func notRemovable(c *api.Call, group, iamID string) *fault.Error {
	if isDynamic(c, group, iamID) {
		return fault.New(fault.Conflict, "conflict", "A rule made the identity %q a member of the access group; change the rule.", iamID)
	}
	return notMember(iamID)
}

func removeMember(c *api.Call, tx *directory.Tx, _ *api.None, old *access.Group) (api.Reply, api.Target, error) {
	iamID := c.R.PathValue("iam_id")
	t := target(c, old.ID, old.Name, "iam-groups/member")
	g, ok := without(*old, iamID)
	if !ok {
		return api.Reply{}, t, notRemovable(c, old.ID, iamID)
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
	known := false
	for i, iamID := range b.Members {
		r := result{IAMID: iamID, StatusCode: http.StatusOK}
		next, ok := without(g, iamID)
		if !ok {
			r = failed(c, r, notRemovable(c, old.ID, iamID))
		}
		known = known || r.StatusCode != http.StatusNotFound
		g, out.Members[i] = next, r
	}
	if !known {
		return api.Reply{}, t, fault.New(fault.NotFound, "not_found", "None of the identities is a member of the access group.")
	}
	if len(g.Members) < len(old.Members) {
		c.Directory.Groups.Put(tx, &g)
	}
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

func memberSort(verbose bool) map[string]func(memberView) string {
	iamID := func(m memberView) string { return m.IAMID }
	keys := map[string]func(memberView) string{
		"id": iamID, "iam_id": iamID,
		"type":       func(m memberView) string { return m.Type },
		"created_at": func(m memberView) string { return m.CreatedAt },
	}
	if verbose {
		keys["name"] = func(m memberView) string { return strings.ToLower(m.Name) }
		keys["email"] = func(m memberView) string { return strings.ToLower(m.Email) }
	}
	return keys
}

// listMembers shows the members by hand and by rule. Who is both is one member:
// by hand, unless the query asks for the dynamic ones.
func listMembers(c *api.Call, g *access.Group) (api.Reply, error) {
	kind, err := membership(c, static, dynamic)
	if err != nil {
		return api.Reply{}, err
	}
	verbose, err := flag(c, "verbose")
	if err != nil {
		return api.Reply{}, err
	}
	typ := c.R.URL.Query().Get("type")
	if typ != "" && !slices.Contains([]string{typeUser, typeService, typeProfile}, typ) {
		return api.Reply{}, api.Invalid("The parameter type must be %s, %s or %s.", typeUser, typeService, typeProfile).OnParameter("type", typ)
	}
	href := "/v2/groups/" + g.ID + "/members"
	all := []memberView{}
	add := func(v memberView) {
		if typ != "" && typ != v.Type {
			return
		}
		v.Href = c.URL + href + "/" + url.PathEscape(v.IAMID)
		if verbose {
			v.Name, v.Email, v.Description = describe(c, v.IAMID, v.Type)
		}
		all = append(all, v)
	}
	if kind != dynamic {
		for _, m := range g.Members {
			add(memberView{IAMID: m.IAMID, Type: m.Type, MembershipType: static, CreatedAt: m.CreatedAt, CreatedByID: m.CreatedBy})
		}
	}
	if kind != static {
		byHand := map[string]bool{}
		if kind == anyKind {
			for _, m := range g.Members {
				byHand[m.IAMID] = true
			}
		}
		for iamID, m := range c.Directory.DynamicMembersOf(g.ID, c.Now()) {
			if byHand[iamID] {
				continue
			}
			v := memberView{IAMID: iamID, Type: typeUser, MembershipType: dynamic, CreatedAt: timestamp(m.Since)}
			if r, ok := c.Directory.GroupRules.Get(m.RuleID); ok {
				v.CreatedByID = r.CreatedBy
			}
			add(v)
		}
	}
	page, p, err := paged(c, href, all, memberSort(verbose), "created_at", func(m memberView) string { return m.IAMID })
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: memberList{paging: p, Members: page}}, nil
}

// describe returns what the directory knows about a member. An identity that
// was deleted has no name.
func describe(c *api.Call, iamID, typ string) (name, email, description string) {
	switch typ {
	case typeUser:
		if u, ok := c.Directory.Users.Get(directory.UserKey(c.Account(), iamID)); ok {
			return u.Name, u.Email, ""
		}
	case typeService:
		if s, ok := c.Directory.ServiceIDs.Get(crn.BareID(iamID)); ok && s.AccountID == c.Account() {
			return s.Name, "", s.Description
		}
	case typeProfile:
		if p, ok := c.Directory.Profiles.Get(crn.BareID(iamID)); ok && p.AccountID == c.Account() {
			return p.Name, "", p.Description
		}
	}
	return "", "", ""
}
