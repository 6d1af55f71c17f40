package iampolicy

import (
	"maps"
	"slices"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
)

// maxAllowed bounds a list of accounts. There is no published number.
const maxAllowed = 100

// States of an identity type in the settings
// (reference/access-and-audit.md section 1.10).
var externalStates = []string{stateEnabled, "limited", "monitor"}

const stateEnabled = "enabled"

// identityTypes are those that the settings tell apart.
var identityTypes = []string{"user", "service_id", "service"}

type settingsView struct {
	External externalView `json:"external_account_identity_interaction"`
}

type externalView struct {
	Types map[string]access.ExternalAccess `json:"identity_types"`
}

type settingsBody struct {
	External struct {
		Types map[string]*externalBody `json:"identity_types"`
	} `json:"external_account_identity_interaction"`
}

type externalBody struct {
	State   string   `json:"state"`
	Allowed []string `json:"external_allowed_accounts"`
}

func settingsRoutes(f *api.Family) {
	const route = "/v1/accounts/{account_id}/settings/access_management"

	api.Read(f, "GET "+route, "iam-access-management.settings.read", findSettings,
		func(c *api.Call, s *access.Settings) (api.Reply, error) { return replySettings(s), nil })

	api.Change(f, "PATCH "+route, "iam-access-management.settings.update", "iam-access-management.account-settings.update",
		func(c *api.Call, _ *settingsBody) (*access.Settings, api.Target, error) { return findSettings(c) },
		func(c *api.Call, tx *directory.Tx, b *settingsBody, old *access.Settings) (api.Reply, api.Target, error) {
			if err := c.IfMatch(&old.Meta, old.AccountID, true); err != nil {
				return api.Reply{}, api.Target{}, err
			}
			if len(b.External.Types) == 0 {
				return api.Reply{}, api.Target{}, api.Invalid("The body must have an identity type under external_account_identity_interaction.identity_types.").On("identity_types")
			}
			s := *old
			s.External = maps.Clone(old.External)
			for _, name := range slices.Sorted(maps.Keys(b.External.Types)) {
				e := b.External.Types[name]
				if e == nil {
					continue
				}
				if err := e.validate(name); err != nil {
					return api.Reply{}, api.Target{}, err
				}
				s.External[name] = access.ExternalAccess{State: e.State, Allowed: append([]string{}, e.Allowed...)}
			}
			c.Directory.AccessSettings.Put(tx, &s)
			r := replySettings(&s)
			r.ResponseData = map[string]any{"external": s.External, "previous": map[string]any{"external": old.External}}
			return r, settingsTarget(c), nil
		})
}

func (e *externalBody) validate(name string) error {
	if !slices.Contains(identityTypes, name) {
		return api.Invalid("The identity type must be user, service_id or service.").On("identity_types")
	}
	if !slices.Contains(externalStates, e.State) {
		return api.Invalid("The state of %s must be enabled, limited or monitor.", name).On("state")
	}
	if e.State == stateEnabled && len(e.Allowed) > 0 {
		return api.Invalid("The external_allowed_accounts of %s must be empty with the state enabled, which allows every account.", name).On("external_allowed_accounts")
	}
	if len(e.Allowed) > maxAllowed {
		return api.Invalid("The external_allowed_accounts of %s can have at most %d accounts.", name, maxAllowed).On("external_allowed_accounts")
	}
	for i, account := range e.Allowed {
		if account == "" || !api.Printable(account, 100) || slices.Contains(e.Allowed[:i], account) {
			return api.Invalid("The external_allowed_accounts of %s must be ids of accounts, each once.", name).On("external_allowed_accounts")
		}
	}
	return nil
}

func replySettings(s *access.Settings) api.Reply {
	return api.Reply{Body: settingsView{externalView{s.External}}, ETag: s.Tag(s.AccountID)}
}

const settingsTypeURI = ownService + "/account-settings"

func settingsTarget(c *api.Call) api.Target {
	return api.Target{
		Resource: c.InAccount(ownService, access.ResourceType, "settings"),
		CRN:      c.Names.Of(ownService, "", c.Account(), "", "settings", "").String(),
		Name:     "access management", TypeURI: settingsTypeURI,
	}
}

// findSettings returns the settings of the caller's account, the default ones
// when none are stored.
func findSettings(c *api.Call) (*access.Settings, api.Target, error) {
	id := c.R.PathValue("account_id")
	if id != c.Account() {
		return nil, api.Target{TypeURI: settingsTypeURI}, api.NotFound("account", id)
	}
	if s, ok := c.Directory.AccessSettings.Get(id); ok {
		return s, settingsTarget(c), nil
	}
	s := &access.Settings{AccountID: id, External: map[string]access.ExternalAccess{}}
	for _, name := range identityTypes {
		s.External[name] = access.ExternalAccess{State: stateEnabled, Allowed: []string{}}
	}
	return s, settingsTarget(c), nil
}
