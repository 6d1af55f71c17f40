package iamidentity

import (
	"net/http"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// maxIdentities per profile and maxAccounts per identity are bounds of our own.
const (
	maxIdentities = 500
	maxAccounts   = 100
)

// Types of profile identities (reference/iam-identity.md section 4.5).
const (
	typeUser      = "user"
	typeServiceID = "serviceid"
	typeCRN       = "crn"
)

func (r *routes) registerIdentities() {
	const path = "/v1/profiles/{profile}/identities"
	api.Read(r.Family, "GET "+path, profileGet, r.loadProfile, r.listIdentities)
	api.Change(r.Family, "PUT "+path, profileUpdate, profileUpdated, r.changedIdentities, r.replaceIdentities)
	api.Change(r.Family, "POST "+path+"/{type}", profileUpdate, profileUpdated, r.newIdentity, r.addIdentity)
	// The identifier of type crn has a slash, which not every client escapes.
	api.Read(r.Family, "GET "+path+"/{type}/{identifier...}", profileGet, r.loadIdentity, r.showIdentity)
	api.Change(r.Family, "DELETE "+path+"/{type}/{identifier...}", profileUpdate, profileUpdated, loading[api.None](r.loadIdentity), r.deleteIdentity)
}

// identityBody is one identity as clients send it.
type identityBody struct {
	Identifier  string   `json:"identifier"`
	Type        string   `json:"type"`
	Accounts    []string `json:"accounts"`
	Description string   `json:"description"`
}

type identitiesBody struct {
	Identities *[]identityBody `json:"identities"`
}

type identityView struct {
	IAMID       string   `json:"iam_id"`
	Identifier  string   `json:"identifier"`
	Type        string   `json:"type"`
	Accounts    []string `json:"accounts,omitempty"`
	Description string   `json:"description,omitempty"`
}

type identitiesView struct {
	EntityTag  string         `json:"entity_tag"`
	Identities []identityView `json:"identities"`
}

func viewIdentity(i identity.ProfileIdentity) identityView {
	return identityView{IAMID: i.IAMID, Identifier: i.Identifier, Type: i.Type, Accounts: i.Accounts, Description: i.Description}
}

// parse checks an identity and derives its IAM ID. Whether it exists is not
// asked: it may live in another account.
func (b *identityBody) parse() (identity.ProfileIdentity, error) {
	i := identity.ProfileIdentity{Type: b.Type, Identifier: b.Identifier, Accounts: b.Accounts, Description: b.Description}
	if err := checkText("description", b.Description, maxDescription); err != nil {
		return i, err
	}
	wrong := func(want string) error {
		return api.Invalid("identifier must be %s for identities of type %s.", want, b.Type).On("identifier")
	}
	switch b.Type {
	case typeUser:
		if !userID(b.Identifier) {
			return i, wrong("the IAM ID of a user")
		}
		i.IAMID = b.Identifier
	case typeServiceID:
		i.Identifier = crn.BareID(b.Identifier)
		i.IAMID = crn.IAMID(i.Identifier)
		if crn.KindOf(i.IAMID) != crn.KindServiceID || !plain(i.Identifier) {
			return i, wrong("the id of a service ID")
		}
	case typeCRN:
		if _, err := crn.Parse(b.Identifier); err != nil {
			return i, wrong("a CRN")
		}
		i.IAMID = crn.IAMIDOfCRN(b.Identifier)
	default:
		return i, api.Invalid("type must be one of user, serviceid, crn.").On("type")
	}
	if len(b.Accounts) > 0 && b.Type != typeUser {
		return i, api.Invalid("accounts can be given for identities of type user only.").On("accounts")
	}
	if len(b.Accounts) > maxAccounts {
		return i, api.Invalid("accounts must have at most %d entries.", maxAccounts).On("accounts")
	}
	for _, account := range b.Accounts {
		if !crn.ValidAccountID(account) {
			return i, api.Invalid("accounts must be account ids of 32 lower-case hexadecimal digits.").On("accounts")
		}
	}
	return i, nil
}

// userID reports whether an IAM ID can be a user's. The realms of the other
// kinds of identity are not for users, whatever follows them.
func userID(id string) bool {
	realm := crn.Realm(id)
	return crn.KindOf(id) == crn.KindUser && realm != "iam" && realm != "crn" && plain(id)
}

// plain reports whether an id is free of blanks and control characters.
func plain(id string) bool { return api.Printable(id, maxName) && !strings.ContainsAny(id, " \t") }

// describe gives an identity of type serviceid the description of the service
// ID when it has none of its own. Only service IDs that the caller's account
// owns are looked at.
func (r *routes) describe(c *api.Call, i identity.ProfileIdentity) identity.ProfileIdentity {
	if i.Type == typeServiceID && i.Description == "" {
		if s, ok := r.Directory.ServiceIDs.Get(i.Identifier); ok && s.AccountID == c.Account() {
			i.Description = s.Description
		}
	}
	return i
}

func viewIdentities(p *identity.Profile) identitiesView {
	v := identitiesView{EntityTag: p.Tag(p.ID), Identities: make([]identityView, len(p.Identities))}
	for n, i := range p.Identities {
		v.Identities[n] = viewIdentity(i)
	}
	return v
}

func sameIdentity(a, b identity.ProfileIdentity) bool {
	return a.Type == b.Type && a.Identifier == b.Identifier
}

func (r *routes) listIdentities(_ *api.Call, p *identity.Profile) (api.Reply, error) {
	return api.Reply{Body: viewIdentities(p), ETag: p.Tag(p.ID)}, nil
}

func (r *routes) changedIdentities(c *api.Call, b *identitiesBody) (ofProfile[[]identity.ProfileIdentity], api.Target, error) {
	none := ofProfile[[]identity.ProfileIdentity]{}
	target := api.Target{TypeURI: "iam-identity/account-profile"}
	if b.Identities == nil || len(*b.Identities) > maxIdentities {
		return none, target, api.Invalid("identities is required and must have at most %d entries.", maxIdentities).On("identities")
	}
	parsed := make([]identity.ProfileIdentity, 0, len(*b.Identities))
	for _, one := range *b.Identities {
		i, err := one.parse()
		if err != nil {
			return none, target, err
		}
		if slices.ContainsFunc(parsed, func(j identity.ProfileIdentity) bool { return sameIdentity(i, j) }) {
			return none, target, api.Invalid("The identity %s stands twice.", i.Identifier).On("identities")
		}
		parsed = append(parsed, r.describe(c, i))
	}
	p, target, err := r.loadProfile(c)
	return ofProfile[[]identity.ProfileIdentity]{p, &parsed}, target, err
}

func (r *routes) replaceIdentities(c *api.Call, tx *directory.Tx, _ *identitiesBody, found ofProfile[[]identity.ProfileIdentity]) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, found.profile)
	if err := c.IfMatch(&found.profile.Meta, found.profile.ID, true); err != nil {
		return api.Reply{}, target, err
	}
	p := *found.profile
	p.Identities = *found.part
	r.Directory.Profiles.Put(tx, &p)
	v := viewIdentities(&p)
	return api.Reply{
		Body: v, ETag: v.EntityTag,
		ResponseData: map[string]any{"change": "identities replaced", "identities": v.Identities, "prev_identities": viewIdentities(found.profile).Identities},
	}, target, nil
}

func (r *routes) newIdentity(c *api.Call, b *identityBody) (ofProfile[identity.ProfileIdentity], api.Target, error) {
	none := ofProfile[identity.ProfileIdentity]{}
	target := api.Target{TypeURI: "iam-identity/account-profile"}
	i, err := b.parse()
	if err != nil {
		return none, target, err
	}
	if typ := c.R.PathValue("type"); typ != i.Type {
		return none, target, api.Invalid("type is %s in the body and %s in the path.", i.Type, typ).On("type")
	}
	i = r.describe(c, i)
	p, target, err := r.loadProfile(c)
	return ofProfile[identity.ProfileIdentity]{p, &i}, target, err
}

// addIdentity sets one identity: if it is there already, its accounts and
// description change.
func (r *routes) addIdentity(c *api.Call, tx *directory.Tx, _ *identityBody, found ofProfile[identity.ProfileIdentity]) (api.Reply, api.Target, error) {
	target := r.profileTarget(c, found.profile)
	p := *found.profile
	p.Identities = slices.Clone(p.Identities)
	at := slices.IndexFunc(p.Identities, func(i identity.ProfileIdentity) bool { return sameIdentity(i, *found.part) })
	switch {
	case at >= 0:
		p.Identities[at] = *found.part
	case len(p.Identities) >= maxIdentities:
		return api.Reply{}, target, atLimit("The trusted profile %s has %d identities, which is the limit.", p.ID, maxIdentities)
	default:
		p.Identities = append(p.Identities, *found.part)
	}
	r.Directory.Profiles.Put(tx, &p)
	v := viewIdentity(*found.part)
	return api.Reply{Body: v, ResponseData: map[string]any{"change": "identity added", "identity": v}}, target, nil
}

func (r *routes) loadIdentity(c *api.Call) (ofProfile[identity.ProfileIdentity], api.Target, error) {
	none := ofProfile[identity.ProfileIdentity]{}
	p, target, err := r.loadProfile(c)
	if err != nil {
		return none, target, err
	}
	want := identity.ProfileIdentity{Type: c.R.PathValue("type"), Identifier: c.R.PathValue("identifier")}
	if want.Type == typeServiceID {
		want.Identifier = crn.BareID(want.Identifier)
	}
	for _, i := range p.Identities {
		if sameIdentity(i, want) {
			return ofProfile[identity.ProfileIdentity]{p, &i}, target, nil
		}
	}
	return none, target, api.NotFound("identity", want.Identifier)
}

func (r *routes) showIdentity(_ *api.Call, found ofProfile[identity.ProfileIdentity]) (api.Reply, error) {
	return api.Reply{Body: viewIdentity(*found.part), ETag: found.profile.Tag(found.profile.ID)}, nil
}

func (r *routes) deleteIdentity(c *api.Call, tx *directory.Tx, _ *api.None, found ofProfile[identity.ProfileIdentity]) (api.Reply, api.Target, error) {
	p := *found.profile
	p.Identities = slices.DeleteFunc(slices.Clone(p.Identities), func(i identity.ProfileIdentity) bool { return sameIdentity(i, *found.part) })
	r.Directory.Profiles.Put(tx, &p)
	return api.Reply{
		Status: http.StatusNoContent, ResponseData: map[string]any{"change": "identity removed", "identity": viewIdentity(*found.part)},
	}, r.profileTarget(c, &p), nil
}
