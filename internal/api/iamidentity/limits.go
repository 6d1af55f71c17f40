package iamidentity

import (
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
)

// Limits of an account. The published ones for profiles and service IDs, 2000
// of each, are quotas of a shared service that it raises on demand
// (reference/iam-identity.md section 4.11); these are as high as this server is
// built for.
const (
	maxProfiles        = 1_000_000
	maxServiceIDs      = 1_000_000
	maxServiceIDGroups = 10_000

	maxProviders = 5 // reference/iam-identity.md section 4.11
)

// maxAsked bounds the ids in one question about their consumption.
const maxAsked = 100

// nearLimitPercent is how full something is when its events begin to say so.
const nearLimitPercent = 90

// atLimit is the fault of making more than there may be.
func atLimit(format string, args ...any) error {
	return fault.New(fault.Conflict, "limit_exceeded", format, args...)
}

// nearLimit lets the event of a creation tell that a limit is near: the
// percentage, the count and the limit (reference/iam-identity.md section 4.11).
func nearLimit(data map[string]any, count, limit int) {
	if percent := count * 100 / limit; percent >= nearLimitPercent {
		data["limit_percent"], data["limit_count"], data["limit"] = percent, count, limit
	}
}

func (r *routes) registerLimits() {
	const path = "/v1/accounts/{account_id}/limits/identity"
	api.Read(r.Family, "GET "+path, accountGet, r.loadQuestion, r.showLimits)
	api.Ask(r.Family, "POST "+path, accountGet, func(c *api.Call, q *question) (api.Reply, error) {
		target, err := r.checkQuestion(c, q)
		if err != nil {
			return api.Reply{}, err
		}
		if err := c.Authorize(accountGet, target.Resource); err != nil {
			return api.Reply{}, err
		}
		return r.showLimits(c, q)
	})
}

// question says which limits to show: of the account, and of the things with
// these ids (reference/iam-identity.md section 4.9).
type question struct {
	ServiceIDGroups bool `json:"serviceid_groups"`
	Profiles        bool `json:"profiles"`
	Templates       bool `json:"templates"`
	IDPs            bool `json:"idps"`
	CRLinks         bool `json:"cr_links"`
	CRRules         bool `json:"cr_rules"`

	ServiceIDsPerGroup   []string `json:"serviceids_per_group"`
	KeysPerIdentity      []string `json:"apikeys_per_identity"`
	VersionsPerTemplate  []string `json:"template_versions_per_template"`
	ClaimRulesPerGroup   []string `json:"claim_rules_per_group"`
	ClaimRulesPerProfile []string `json:"claim_rules_per_profile"`
	CRLinksPerProfile    []string `json:"cr_links_per_profile"`
	CRRulesPerProfile    []string `json:"cr_rules_per_profile"`
}

// flags and lists are the question's parts by their names on the wire.
func (q *question) flags() map[string]*bool {
	return map[string]*bool{
		"serviceid_groups": &q.ServiceIDGroups, "profiles": &q.Profiles, "templates": &q.Templates,
		"idps": &q.IDPs, "cr_links": &q.CRLinks, "cr_rules": &q.CRRules,
	}
}

func (q *question) lists() map[string]*[]string {
	return map[string]*[]string{
		"serviceids_per_group": &q.ServiceIDsPerGroup, "apikeys_per_identity": &q.KeysPerIdentity,
		"template_versions_per_template": &q.VersionsPerTemplate, "claim_rules_per_group": &q.ClaimRulesPerGroup,
		"claim_rules_per_profile": &q.ClaimRulesPerProfile, "cr_links_per_profile": &q.CRLinksPerProfile,
		"cr_rules_per_profile": &q.CRRulesPerProfile,
	}
}

// loadQuestion reads the question in a query.
func (r *routes) loadQuestion(c *api.Call) (*question, api.Target, error) {
	q, query := &question{}, c.R.URL.Query()
	for name, into := range q.flags() {
		on, err := readFlag(name, query.Get(name))
		if err != nil {
			return nil, api.Target{}, err
		}
		*into = on
	}
	for name, into := range q.lists() {
		if s := query.Get(name); s != "" {
			*into = strings.Split(s, ",")
		}
	}
	target, err := r.checkQuestion(c, q)
	return q, target, err
}

// checkQuestion checks a question, and that the path's account is the caller's.
func (r *routes) checkQuestion(c *api.Call, q *question) (api.Target, error) {
	for name, ids := range q.lists() {
		if len(*ids) > maxAsked {
			return api.Target{}, api.Invalid("%s can have at most %d entries.", name, maxAsked).On(name)
		}
	}
	return api.Target{Resource: accountResource(c), TypeURI: "iam-identity/account"}, inOwnAccount(c)
}

// limitCount is one limit of the account and how much of it is taken.
type limitCount struct {
	Limit int `json:"limit"`
	Count int `json:"count"`
}

// showLimits answers a question; one about nothing is about everything that the
// account has one limit of. An id that the account does not have counts 0.
func (r *routes) showLimits(c *api.Call, q *question) (api.Reply, error) {
	d, account := r.Directory, c.Account()
	all := true
	for _, on := range q.flags() {
		all = all && !*on
	}
	for _, ids := range q.lists() {
		all = all && len(*ids) == 0
	}
	body := map[string]any{}
	if all || q.ServiceIDGroups {
		body["serviceid_groups"] = limitCount{maxServiceIDGroups, d.ServiceIDGroupsByAccount.Len(account)}
	}
	if all || q.Profiles {
		body["profiles"] = limitCount{maxProfiles, d.ProfilesByAccount.Len(account)}
	}
	if all || q.Templates {
		// There are none: they are an enterprise's.
		body["profile_templates"], body["account_settings_templates"] = limitCount{}, limitCount{}
	}
	if all || q.IDPs {
		body["idps"] = limitCount{maxProviders, d.ProvidersByAccount.Len(account)}
	}
	if all || q.CRLinks || q.CRRules {
		links, rules := 0, 0
		for _, p := range d.ProfilesByAccount.Get(account) {
			links += d.LinksByProfile.Len(p.ID)
			rules += r.rulesOf(account, p.ID, identity.RuleCR)
		}
		if all || q.CRLinks {
			body["cr_links"] = limitCount{maxProfiles * identity.MaxLinksPerProfile, links}
		}
		if all || q.CRRules {
			body["cr_rules"] = limitCount{maxProfiles * identity.MaxRulesPerProfile, rules}
		}
	}
	per := func(name, list, idName string, limit int, ids []string, count func(id string) int) {
		if len(ids) == 0 {
			return
		}
		counts := make([]map[string]any, len(ids))
		for i, id := range ids {
			counts[i] = map[string]any{idName: id, "count": count(id)}
		}
		body[name] = map[string]any{"limit": limit, list: counts}
	}
	per("serviceids_per_group", "serviceid_groups", "group_id", maxServiceIDs, q.ServiceIDsPerGroup, func(id string) int {
		if g, ok := d.ServiceIDGroups.Get(id); !ok || g.AccountID != account {
			return 0
		}
		return d.ServiceIDsByGroup.Len(id)
	})
	per("apikeys_per_identity", "identities", "iam_id", identity.MaxKeysPerIdentity, q.KeysPerIdentity, func(id string) int {
		return d.APIKeysByIdentity.Len(directory.Key(account, id))
	})
	per("template_versions_per_template", "templates", "template_id", 0, q.VersionsPerTemplate, func(string) int { return 0 })
	per("claim_rules_per_group", "access_groups", "group_id", access.MaxRulesPerGroup, q.ClaimRulesPerGroup, func(id string) int {
		if g, ok := d.Groups.Get(id); !ok || g.AccountID != account {
			return 0
		}
		return d.GroupRulesByGroup.Len(id)
	})
	per("claim_rules_per_profile", "profiles", "profile_id", identity.MaxRulesPerProfile, q.ClaimRulesPerProfile, func(id string) int {
		return r.rulesOf(account, id, "")
	})
	per("cr_links_per_profile", "profiles", "profile_id", identity.MaxLinksPerProfile, q.CRLinksPerProfile, func(id string) int {
		if p, ok := d.Profiles.Get(id); !ok || p.AccountID != account {
			return 0
		}
		return d.LinksByProfile.Len(id)
	})
	per("cr_rules_per_profile", "profiles", "profile_id", identity.MaxRulesPerProfile, q.CRRulesPerProfile, func(id string) int {
		return r.rulesOf(account, id, identity.RuleCR)
	})
	return api.Reply{Body: body}, nil
}

// rulesOf counts the rules of a type, or of all types, of the account's profile
// with an id.
func (r *routes) rulesOf(account, profile, typ string) int {
	n := 0
	for _, rule := range r.Directory.RulesByProfile.Get(profile) {
		if rule.AccountID == account && (typ == "" || rule.Type == typ) {
			n++
		}
	}
	return n
}
