package accessgroups

import (
	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
)

type settingsBody struct {
	PublicAccess *bool `json:"public_access_enabled"`
}

type settingsView struct {
	AccountID        string `json:"account_id"`
	LastModifiedAt   string `json:"last_modified_at"`
	LastModifiedByID string `json:"last_modified_by_id"`
	PublicAccess     bool   `json:"public_access_enabled"`
}

// viewSettings shows settings that nobody has changed as modified by the
// creation of their account.
func viewSettings(c *api.Call, s *access.GroupSettings) settingsView {
	at, by := s.ModifiedAt, s.ModifiedBy
	if s.Revision == 0 {
		if a, ok := c.Directory.Accounts.Get(s.AccountID); ok {
			at, by = a.CreatedAt, a.CreatedBy
		}
	}
	return settingsView{AccountID: s.AccountID, LastModifiedAt: timestamp(at), LastModifiedByID: by, PublicAccess: s.PublicAccess}
}

// findSettings always finds the settings of the caller's own account. Asked
// about another one, it leaves the refusal to the access decision, which is
// the same whether or not there is such an account.
func findSettings(c *api.Call) (*access.GroupSettings, api.Target, error) {
	account, err := accountParameter(c)
	if err != nil {
		return nil, api.Target{TypeURI: "iam-groups/account-settings"}, err
	}
	return c.Directory.GroupSettingsOf(c.Account()), settingsTarget(c, account), nil
}

func settingsTarget(c *api.Call, account string) api.Target {
	return api.Target{
		Resource: api.With(c.InAccount(service), access.AccountID, account),
		CRN:      c.Names.Of(service, "", c.Account(), "", "account-settings", "").String(),
		TypeURI:  "iam-groups/account-settings",
	}
}

func findSettingsFor(c *api.Call, _ *settingsBody) (*access.GroupSettings, api.Target, error) {
	return findSettings(c)
}

func readSettings(c *api.Call, s *access.GroupSettings) (api.Reply, error) {
	return api.Reply{Body: viewSettings(c, s), ETag: s.Tag(s.AccountID)}, nil
}

// updateSettings turns public access on or off. Off also deletes the policies
// of the group Public Access: turned on again, it grants nothing.
func updateSettings(c *api.Call, tx *directory.Tx, b *settingsBody, old *access.GroupSettings) (api.Reply, api.Target, error) {
	t := settingsTarget(c, c.Account())
	if err := c.IfMatch(&old.Meta, old.AccountID, false); err != nil {
		return api.Reply{}, t, err
	}
	s := *old
	policies := []string{}
	if b.PublicAccess != nil {
		s.PublicAccess = *b.PublicAccess
		c.Directory.GroupSettings.Put(tx, &s)
		if !s.PublicAccess {
			policies = removePoliciesOf(c, tx, access.PublicAccess)
		}
	}
	return api.Reply{
		Body: viewSettings(c, &s), ETag: s.Tag(s.AccountID),
		ResponseData: map[string]any{
			"public_access_enabled": s.PublicAccess, "deleted_policies": policies,
			"previous": map[string]any{"public_access_enabled": old.PublicAccess},
		},
	}, t, nil
}
