package accounts

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Limits on users. None is published.
const (
	maxUsers       = 7500 // in an account
	maxInvitations = 100  // in one call
)

// invitation is the body of an invitation. The parts that would give access are
// decoded only to be refused: an answer that left them out silently would tell
// the caller that they were done.
type invitation struct {
	Users []struct {
		Email string `json:"email"`
		Role  string `json:"account_role"`
	} `json:"users"`
	Groups              []string          `json:"access_groups"`
	Policies            []json.RawMessage `json:"iam_policy"`
	InfrastructureRoles json.RawMessage   `json:"infrastructure_roles"`
	OrganizationRoles   []json.RawMessage `json:"organization_roles"`

	settings int64 // revision of the settings that the addresses were held against
}

func (b *invitation) check() error {
	if n := len(b.Users); n < 1 || n > maxInvitations {
		return api.Invalid("users must have 1 to %d entries.", maxInvitations).On("users")
	}
	seen := map[string]bool{}
	for _, u := range b.Users {
		email := strings.ToLower(u.Email)
		switch {
		case !validEmail(u.Email):
			return api.Invalid("users.email must be an e-mail address of at most %d characters, and %.100q is not.", maxEmail, u.Email).On("users.email")
		case u.Role != "" && !strings.EqualFold(u.Role, "member"):
			return api.Invalid("users.account_role must be Member; access comes from policies and access groups.").On("users.account_role")
		case seen[email]:
			return api.Invalid("users has the address %s more than once.", u.Email).On("users.email")
		}
		seen[email] = true
	}
	switch {
	case len(b.Policies) > 0:
		return api.Invalid("iam_policy cannot be part of an invitation here: invite the users into access groups with access_groups, or create the policies with POST /v2/policies afterwards.").On("iam_policy")
	case len(b.InfrastructureRoles) > 0 && string(b.InfrastructureRoles) != "null":
		return api.Invalid("infrastructure_roles is not supported; leave it out.").On("infrastructure_roles")
	case len(b.OrganizationRoles) > 0:
		return api.Invalid("organization_roles is not supported; leave it out.").On("organization_roles")
	case len(b.Groups) > access.MaxGroupsPerIdentity:
		return api.Invalid("access_groups must have at most %d entries.", access.MaxGroupsPerIdentity).On("access_groups")
	}
	return nil
}

// prepareInvitation holds the addresses against the account's patterns before
// the transaction: many of both take their time, and other writers wait.
func (r *routes) prepareInvitation(c *api.Call, b *invitation) error {
	_, t, err := r.loadInvitation(c, b)
	c.About(t)
	if err != nil {
		return err
	}
	if err := c.Authorize(userCreate, userResource(c, "")); err != nil {
		return err
	}
	settings := r.Directory.SettingsOf(c.Account())
	b.settings = settings.Revision
	for _, u := range b.Users {
		if !invitable(settings.UserDomains, u.Email) {
			return fault.New(fault.Denied, "domain_restricted", "The account's settings do not allow the address %s to be invited.", u.Email).On("users.email")
		}
	}
	return nil
}

func (r *routes) loadInvitation(c *api.Call, b *invitation) (struct{}, api.Target, error) {
	t := r.userTarget(c, "", "")
	if err := ownAccount(c); err != nil {
		return struct{}{}, api.Target{TypeURI: t.TypeURI}, err
	}
	return struct{}{}, t, b.check()
}

// groups returns the access groups that the users are to be in. The right to
// add members comes before the look: who lacks it does not learn which groups
// there are.
func (b *invitation) groups(c *api.Call) ([]*access.Group, error) {
	var groups []*access.Group
	for i, id := range b.Groups {
		if slices.Contains(b.Groups[:i], id) {
			continue
		}
		resource := c.InAccount("iam-groups", access.ResourceType, "access-group", access.Resource, id)
		if err := c.Authorize("iam-groups.members.add", resource); err != nil {
			return nil, err
		}
		g, ok := c.Directory.Groups.Get(id)
		if !ok || g.AccountID != c.Account() {
			return nil, api.NotFound("access group", id)
		}
		groups = append(groups, g)
	}
	return groups, nil
}

type invited struct {
	Email string `json:"email"`
	ID    string `json:"id"`
	State string `json:"state"`
}

// invite adds all of the users or none of them.
func (r *routes) invite(c *api.Call, tx *directory.Tx, b *invitation, _ struct{}) (api.Reply, api.Target, error) {
	t := r.userTarget(c, "", "")
	groups, err := b.groups(c)
	if err != nil {
		return api.Reply{}, t, err
	}
	if n := r.Directory.UsersByAccount.Len(c.Account()); n+len(b.Users) > maxUsers {
		return api.Reply{}, t, fault.New(fault.Conflict, "limit_exceeded", "The account has %d users; with %d more it would have more than %d, which is the limit.", n, len(b.Users), maxUsers)
	}
	if r.Directory.SettingsOf(c.Account()).Revision != b.settings {
		return api.Reply{}, t, fault.New(fault.Stale, "conflict", "The account's settings were changed in the meantime; try again.")
	}
	out := make([]invited, len(b.Users))
	members := make([]access.Member, len(b.Users))
	for i, n := range b.Users {
		if r.userWithEmail(c.Account(), n.Email) != nil {
			return api.Reply{}, t, emailTaken(n.Email)
		}
		u := &identity.User{IAMID: bootstrap.NewUserID(), AccountID: c.Account(), Email: n.Email, Name: n.Email, Invited: true}
		r.Directory.Users.Put(tx, u)
		out[i] = invited{u.Email, u.IAMID, userPending}
		members[i] = access.Member{IAMID: u.IAMID, Type: "user", CreatedAt: stamp(tx.Now), CreatedBy: c.Caller.IAMID}
	}
	ids := []string{}
	for _, old := range groups {
		g := *old
		g.Members = slices.Concat(old.Members, members)
		r.Directory.Groups.Put(tx, &g)
		ids = append(ids, g.ID)
	}
	if len(out) == 1 {
		t = r.userTarget(c, out[0].ID, out[0].Email)
	}
	return api.Reply{
		Status: http.StatusAccepted, Body: map[string]any{"resources": out},
		ResponseData: map[string]any{"users": out, "access_groups": ids},
	}, t, nil
}

// invitable reports whether the account's settings let an address be invited.
// An invitation has no realm yet, so the patterns of every restricted realm
// count.
func invitable(domains []identity.UserDomain, email string) bool {
	restricted := false
	for _, d := range domains {
		if !d.Restrict {
			continue
		}
		restricted = true
		if slices.ContainsFunc(d.Patterns, func(p string) bool { return matchesAddress(p, email) }) {
			return true
		}
	}
	return !restricted
}

// matchesAddress reports whether an address fits a pattern of the account
// settings, in whatever case: * stands for any run of characters up to the next
// dot or @, ** for any run at all. It takes len(pattern) × len(email) steps at
// worst.
func matchesAddress(pattern, email string) bool {
	pattern, email = strings.ToLower(pattern), strings.ToLower(email)
	reached := make([]bool, len(email)+1) // whether the pattern so far fits the first bytes
	reached[0] = true
	for pattern != "" {
		if rest, ok := strings.CutPrefix(pattern, "**"); ok {
			for i := 1; i < len(reached); i++ {
				reached[i] = reached[i] || reached[i-1]
			}
			pattern = rest
			continue
		}
		if pattern[0] == '*' {
			for i := 1; i < len(reached); i++ {
				reached[i] = reached[i] || reached[i-1] && email[i-1] != '.' && email[i-1] != '@'
			}
			pattern = pattern[1:]
			continue
		}
		fits := false
		for i := len(email); i > 0; i-- {
			reached[i] = reached[i-1] && email[i-1] == pattern[0]
			fits = fits || reached[i]
		}
		if reached[0] = false; !fits {
			return false
		}
		pattern = pattern[1:]
	}
	return reached[len(email)]
}
