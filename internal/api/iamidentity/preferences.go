package iamidentity

import (
	"net/http"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

const (
	preferencesRead    = "iam-identity.preferences.read"
	preferencesUpdate  = "iam-identity.preferences.update"
	preferencesTypeURI = "iam-identity/preferences"
)

// Bounds on preferences, all of them ours.
const (
	maxPreferences     = 100  // of one identity
	maxPreferenceName  = 64   // characters of a service and of an id
	maxPreferenceText  = 1000 // characters
	maxPreferenceItems = 100
)

func (r *routes) registerPreferences() {
	const (
		all = "/v1/preferences/accounts/{account_id}/identities/{iam_id}"
		one = all + "/{service}/{preference_id}"
	)
	api.Read(r.Family, "GET "+all, preferencesRead, r.loadPreferences, r.showPreferences)
	api.Read(r.Family, "GET "+one, preferencesRead, r.loadPreference, r.showPreference)
	api.Change(r.Family, "PUT "+one, preferencesUpdate, preferencesUpdate, r.changedPreference, r.updatePreference)
	api.Change(r.Family, "DELETE "+one, preferencesUpdate, "iam-identity.preferences.delete", loading[api.None](r.loadPreference), r.deletePreference)
}

// preferenceBody has one of the two values (reference/iam-identity.md section
// 4.9). Older clients cannot leave out the text, so an empty one beside a list
// counts as absent.
type preferenceBody struct {
	Text *string   `json:"value_string"`
	List *[]string `json:"value_list_of_strings"`
}

func (b *preferenceBody) check(service, id string) error {
	if b.List != nil && b.Text != nil && *b.Text == "" {
		b.Text = nil
	}
	switch {
	case (b.Text == nil) == (b.List == nil):
		return api.Invalid("The body must have either value_string or value_list_of_strings.").On("value_string")
	case b.List != nil && len(*b.List) > maxPreferenceItems:
		return api.Invalid("value_list_of_strings must have at most %d entries.", maxPreferenceItems).On("value_list_of_strings")
	case b.List != nil:
		for _, s := range *b.List {
			if err := checkText("value_list_of_strings", s, maxName); err != nil {
				return err
			}
		}
		return nil
	}
	if err := checkText("value_string", *b.Text, maxPreferenceText); err != nil {
		return err
	}
	if service == "console" && id == "landing_page" && !localPath(*b.Text) {
		return api.Invalid("value_string must be a path of the console, such as /iam.").On("value_string")
	}
	return nil
}

// localPath reports whether a browser that follows s stays on the server.
func localPath(s string) bool {
	return strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "//") && !strings.Contains(s, `\`)
}

type preferenceView struct {
	Service   string   `json:"service"`
	ID        string   `json:"id"`
	AccountID string   `json:"account_id"`
	Scope     string   `json:"scope"`
	Text      *string  `json:"value_string,omitempty"`
	List      []string `json:"value_list_of_strings,omitzero"`
}

func viewPreference(p *identity.Preference) preferenceView {
	v := preferenceView{Service: p.Service, ID: p.ID, AccountID: p.AccountID, Scope: "account", Text: p.Text}
	if p.Text == nil {
		v.List = append([]string{}, p.List...)
	}
	return v
}

type preferencesView struct {
	Preferences []preferenceView `json:"preferences"`
}

// hasIdentity reports whether an IAM ID is one of an account's own.
func (r *routes) hasIdentity(account, iamID string) bool {
	switch crn.KindOf(iamID) {
	case crn.KindUser:
		_, ok := r.Directory.Users.Get(directory.UserKey(account, iamID))
		return ok
	case crn.KindServiceID:
		s, ok := r.Directory.ServiceIDs.Get(crn.BareID(iamID))
		return ok && s.AccountID == account
	case crn.KindProfile:
		p, ok := r.Directory.Profiles.Get(crn.BareID(iamID))
		return ok && p.AccountID == account
	}
	return false
}

// loadPreferences finds the path's identity in the caller's account. Its
// preferences are its own: it needs no action for them.
func (r *routes) loadPreferences(c *api.Call) (string, api.Target, error) {
	target := api.Target{TypeURI: preferencesTypeURI}
	if err := inOwnAccount(c); err != nil {
		return "", target, err
	}
	iamID := c.R.PathValue("iam_id")
	if !r.hasIdentity(c.Account(), iamID) {
		return "", target, api.NotFound("identity", iamID)
	}
	target.Resource = c.InAccount(service, access.ResourceType, "preferences", access.Resource, iamID)
	target.CRN = r.Names.Of(service, "", c.Account(), "", "preferences", iamID).String()
	target.Name, target.Owner = iamID, iamID
	return iamID, target, nil
}

func (r *routes) showPreferences(c *api.Call, iamID string) (api.Reply, error) {
	v := preferencesView{Preferences: []preferenceView{}}
	found := r.Directory.PreferencesByIdentity.Get(directory.Key(c.Account(), iamID))
	for _, p := range sorted(found, func(p *identity.Preference) string { return directory.Key(p.Service, p.ID) }) {
		v.Preferences = append(v.Preferences, viewPreference(p))
	}
	return api.Reply{Body: v}, nil
}

func (r *routes) loadPreference(c *api.Call) (*identity.Preference, api.Target, error) {
	iamID, target, err := r.loadPreferences(c)
	if err != nil {
		return nil, target, err
	}
	svc, id := c.R.PathValue("service"), c.R.PathValue("preference_id")
	p, ok := r.Directory.Preferences.Get(directory.PreferenceKey(c.Account(), iamID, svc, id))
	if !ok {
		return nil, target, api.NotFound("preference", svc+"/"+id)
	}
	return p, target, nil
}

func (r *routes) showPreference(_ *api.Call, p *identity.Preference) (api.Reply, error) {
	return api.Reply{Body: viewPreference(p)}, nil
}

// changedPreference returns the preference of the path, or a new one.
func (r *routes) changedPreference(c *api.Call, b *preferenceBody) (*identity.Preference, api.Target, error) {
	iamID, target, err := r.loadPreferences(c)
	if err != nil {
		return nil, target, err
	}
	svc, id := c.R.PathValue("service"), c.R.PathValue("preference_id")
	for _, name := range []string{svc, id} {
		if !preferenceName(name) {
			return nil, target, api.Invalid("A preference's service and id must have 1 to %d characters, all of them letters, digits, or one of -_. and not only dots.", maxPreferenceName)
		}
	}
	if err := b.check(svc, id); err != nil {
		return nil, target, err
	}
	p, ok := r.Directory.Preferences.Get(directory.PreferenceKey(c.Account(), iamID, svc, id))
	if !ok {
		p = &identity.Preference{AccountID: c.Account(), IAMID: iamID, Service: svc, ID: id}
	}
	return p, target, nil
}

func preferenceName(s string) bool {
	if len(s) > maxPreferenceName || strings.Trim(s, ".") == "" {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		return !letter && !strings.ContainsRune("-_.", r)
	}) < 0
}

func (r *routes) updatePreference(c *api.Call, tx *directory.Tx, b *preferenceBody, old *identity.Preference) (api.Reply, api.Target, error) {
	_, target, err := r.loadPreferences(c)
	if err != nil {
		return api.Reply{}, target, err
	}
	if old.Revision == 0 && r.Directory.PreferencesByIdentity.Len(directory.Key(old.AccountID, old.IAMID)) >= maxPreferences {
		return api.Reply{}, target, fault.New(fault.Conflict, "limit_exceeded", "The identity %s has %d preferences, which is the limit.", old.IAMID, maxPreferences)
	}
	p := *old
	p.Text, p.List = b.Text, nil
	set(&p.List, b.List)
	r.Directory.Preferences.Put(tx, &p)
	return api.Reply{Body: viewPreference(&p), ResponseData: preferenceData(&p)}, target, nil
}

func (r *routes) deletePreference(c *api.Call, tx *directory.Tx, _ *api.None, p *identity.Preference) (api.Reply, api.Target, error) {
	_, target, err := r.loadPreferences(c)
	if err != nil {
		return api.Reply{}, target, err
	}
	r.Directory.Preferences.Delete(tx, p)
	return api.Reply{Status: http.StatusNoContent, ResponseData: preferenceData(p)}, target, nil
}

// preferenceData is what the event of a change tells. The value is not in it:
// it is a personal matter, and may be long.
func preferenceData(p *identity.Preference) map[string]any {
	return map[string]any{"iam_id": p.IAMID, "service": p.Service, "preference_id": p.ID}
}
