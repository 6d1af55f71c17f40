package iamidentity

import "tabard.dev/tabard/internal/api"

// registerTemplates answers the lists of templates, which clients read before
// they clean up. Templates are an enterprise's, and no account here has one
// above it: the lists are empty, and there are no other routes
// (reference/iam-identity.md section 4.10).
func (r *routes) registerTemplates() {
	for _, name := range []string{"profile_templates", "account_settings_templates"} {
		path := "/v1/" + name
		for _, p := range collection("GET", path) {
			api.List(r.Family, p, accountGet, func(c *api.Call, _ func(map[string]string) bool) (api.Reply, error) {
				if account := c.R.URL.Query().Get("account_id"); account != "" {
					if err := checkAccount(c, account); err != nil {
						return api.Reply{}, err
					}
				}
				return api.Reply{Body: map[string]any{"offset": 0, "limit": defaultPage, "first": c.URL + path, name: []any{}}}, nil
			})
		}
	}
}
