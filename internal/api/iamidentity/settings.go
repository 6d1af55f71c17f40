package iamidentity

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
)

const (
	accountGet    = "iam-identity.account.get"
	accountUpdate = "iam-identity.account.update"
)

// Bounds on the lists in an account's settings. They are ours; the addresses
// are compared on every request.
const (
	maxAddresses = 200
	maxUserMFA   = 500
	maxRealms    = 50
	maxPatterns  = 100 // in the entry of one realm
	maxAllowed   = 200 // patterns of all realms; an invitation holds each address against each
)

func (r *routes) registerSettings() {
	const path = "/v1/accounts/{account_id}/settings/identity"
	api.Read(r.Family, "GET "+path, accountGet, r.loadSettings, r.showSettings)
	api.Change(r.Family, "PUT "+path, accountUpdate, "iam-identity.accountsettings.update", r.changedSettings, r.updateSettings)
	api.Read(r.Family, "GET /v1/accounts/{account_id}/effective_settings/identity", accountGet, r.loadSettings, r.showEffectiveSettings)
}

// inOwnAccount refuses a path of any account but the caller's, in the words for
// an account that does not exist.
func inOwnAccount(c *api.Call) error {
	if id := c.R.PathValue("account_id"); id != c.Account() {
		return api.NotFound("account", id)
	}
	return nil
}

// accountResource is the account itself, for actions that are not about one
// object in it.
func accountResource(c *api.Call) map[string]string {
	return c.InAccount(service, access.ResourceType, "account", access.Resource, c.Account())
}

// settingsBody is the body of an update (reference/iam-identity.md section
// 4.8). What is absent keeps its value. The list of users replaces the one
// before; the list of realms changes the realms that it names.
type settingsBody struct {
	RestrictCreateServiceID *string              `json:"restrict_create_service_id"`
	RestrictCreateAPIKey    *string              `json:"restrict_create_platform_apikey"`
	RestrictUserList        *string              `json:"restrict_user_list_visibility"`
	AllowedAddresses        *string              `json:"allowed_ip_addresses"`
	MFA                     *string              `json:"mfa"`
	SessionExpiration       *string              `json:"session_expiration_in_seconds"`
	SessionInvalidation     *string              `json:"session_invalidation_in_seconds"`
	MaxSessions             *string              `json:"max_sessions_per_identity"`
	AccessTokenLife         *string              `json:"system_access_token_expiration_in_seconds"`
	RefreshTokenLife        *string              `json:"system_refresh_token_expiration_in_seconds"`
	UserMFA                 *[]identity.UserMFA  `json:"user_mfa"`
	UserDomains             *[]domainRestriction `json:"restrict_user_domains"`
}

// domainRestriction is the entry of one realm. With the realm alone it removes
// the entry.
type domainRestriction struct {
	Realm    string    `json:"realm_id"`
	Patterns *[]string `json:"invitation_email_allow_patterns"`
	Restrict *bool     `json:"restrict_invitation"`
}

func (d *domainRestriction) removes() bool { return d.Patterns == nil && d.Restrict == nil }

// textSetting is a setting that is one text: the value that a client gave, the
// one that is kept, and the rule for it.
type textSetting struct {
	name  string
	given *string
	kept  *string
	rule  func(name, value string) error
}

// texts pairs the texts of the body with those of the settings.
func (b *settingsBody) texts(s *identity.Settings) []textSetting {
	restriction := among(identity.Restricted, identity.NotRestricted, identity.NotSet)
	return []textSetting{
		{"restrict_create_service_id", b.RestrictCreateServiceID, &s.RestrictCreateServiceID, restriction},
		{"restrict_create_platform_apikey", b.RestrictCreateAPIKey, &s.RestrictCreateAPIKey, restriction},
		{"restrict_user_list_visibility", b.RestrictUserList, &s.RestrictUserList, among(identity.Restricted, identity.NotRestricted)},
		{"allowed_ip_addresses", b.AllowedAddresses, &s.AllowedAddresses, checkAddresses},
		{"mfa", b.MFA, &s.MFA, among(mfaTraits...)},
		{"session_expiration_in_seconds", b.SessionExpiration, &s.SessionExpiration, number(900, 86400)},
		{"session_invalidation_in_seconds", b.SessionInvalidation, &s.SessionInvalidation, number(900, 7200)},
		{"max_sessions_per_identity", b.MaxSessions, &s.MaxSessions, number(1, 1<<31-1)},
		{"system_access_token_expiration_in_seconds", b.AccessTokenLife, &s.AccessTokenLife, number(900, 3600)},
		{"system_refresh_token_expiration_in_seconds", b.RefreshTokenLife, &s.RefreshTokenLife, number(900, 259200)},
	}
}

func among(values ...string) func(name, value string) error {
	return func(name, value string) error {
		if !slices.Contains(values, value) {
			return api.Invalid("%s must be one of %s.", name, strings.Join(values, ", ")).On(name)
		}
		return nil
	}
}

// number is the rule of a whole number written as text, or NOT_SET.
func number(lowest, highest int) func(name, value string) error {
	return func(name, value string) error {
		n, err := strconv.Atoi(value)
		if value == identity.NotSet || err == nil && strconv.Itoa(n) == value && lowest <= n && n <= highest {
			return nil
		}
		return api.Invalid("%s must be a whole number from %d to %d, written as text, or %s.", name, lowest, highest, identity.NotSet).On(name)
	}
}

// checkAddresses is the rule of a list of addresses; an empty one allows all.
func checkAddresses(name, value string) error {
	if value == "" {
		return nil
	}
	n := 0
	for item := range strings.SplitSeq(value, ",") {
		ranges, err := identity.ParseAddresses(item)
		// A zone means nothing on another machine, and no caller has an IPv4
		// address in IPv6 form.
		if err != nil || len(ranges) != 1 || strings.Contains(item, "%") || ranges[0].From.Is4In6() {
			return api.Invalid("%s must be a comma-separated list of addresses such as 192.0.2.1, prefixes such as 192.0.2.0/24 and ranges such as 192.0.2.1-192.0.2.9, and %q is none of them.",
				name, strings.TrimSpace(item)).On(name)
		}
		if n++; n > maxAddresses {
			return api.Invalid("%s must have at most %d entries.", name, maxAddresses).On(name)
		}
	}
	return nil
}

func (b *settingsBody) check() error {
	for _, t := range b.texts(new(identity.Settings)) {
		if t.given != nil {
			if err := t.rule(t.name, *t.given); err != nil {
				return err
			}
		}
	}
	if b.UserMFA != nil {
		if err := checkUserMFA(*b.UserMFA); err != nil {
			return err
		}
	}
	if b.UserDomains != nil {
		return checkUserDomains(*b.UserDomains)
	}
	return nil
}

func checkUserMFA(users []identity.UserMFA) error {
	if len(users) > maxUserMFA {
		return api.Invalid("user_mfa must have at most %d entries.", maxUserMFA).On("user_mfa")
	}
	seen := map[string]bool{}
	for _, u := range users {
		if u.IAMID == "" || seen[u.IAMID] {
			return api.Invalid("user_mfa must have the iam_id of another user in each entry.").On("user_mfa")
		}
		seen[u.IAMID] = true
		if err := among(mfaTraits...)("user_mfa.mfa", u.MFA); err != nil {
			return err
		}
	}
	return nil
}

func checkUserDomains(domains []domainRestriction) error {
	const name = "restrict_user_domains"
	seen := map[string]bool{}
	for _, d := range domains {
		if err := checkName(name+".realm_id", d.Realm); err != nil {
			return err
		}
		if seen[d.Realm] {
			return api.Invalid("%s has more than one entry for the realm %q.", name, d.Realm).On(name)
		}
		seen[d.Realm] = true
		if d.Patterns == nil {
			continue
		}
		if len(*d.Patterns) > maxPatterns {
			return api.Invalid("%s must have at most %d patterns in an entry.", name, maxPatterns).On(name)
		}
		for _, p := range *d.Patterns {
			if p == "" || !api.Printable(p, maxEmail) {
				return api.Invalid("%s must have patterns of 1 to %d characters, none of them a control character.", name, maxEmail).On(name)
			}
		}
	}
	return nil
}

// apply changes settings and returns the old and new values of what is
// different now (reference/access-and-audit.md section 6.2).
func (b *settingsBody) apply(s *identity.Settings) map[string]any {
	data := map[string]any{}
	changed := func(name string, before, after any) { data["old_"+name], data["new_"+name] = before, after }
	for _, t := range b.texts(s) {
		if t.given != nil && *t.given != *t.kept {
			changed(t.name, *t.kept, *t.given)
			*t.kept = *t.given
		}
	}
	if b.UserMFA != nil && !slices.Equal(s.UserMFA, *b.UserMFA) {
		changed("user_mfa", s.UserMFA, *b.UserMFA)
		s.UserMFA = *b.UserMFA
	}
	if b.UserDomains != nil {
		before := s.UserDomains
		s.UserDomains = mergeDomains(before, *b.UserDomains)
		same := func(a, b identity.UserDomain) bool {
			return a.Realm == b.Realm && a.Restrict == b.Restrict && slices.Equal(a.Patterns, b.Patterns)
		}
		if !slices.EqualFunc(before, s.UserDomains, same) {
			changed("restrict_user_domains", before, s.UserDomains)
		}
	}
	return data
}

// mergeDomains returns the entries of all realms after a change of some.
func mergeDomains(old []identity.UserDomain, changes []domainRestriction) []identity.UserDomain {
	out := slices.Clone(old)
	for _, change := range changes {
		at := slices.IndexFunc(out, func(d identity.UserDomain) bool { return d.Realm == change.Realm })
		if change.removes() {
			if at >= 0 {
				out = slices.Delete(out, at, at+1)
			}
			continue
		}
		entry := identity.UserDomain{Realm: change.Realm, Patterns: []string{}}
		set(&entry.Patterns, change.Patterns)
		set(&entry.Restrict, change.Restrict)
		if at >= 0 {
			out[at] = entry
		} else {
			out = append(out, entry)
		}
	}
	return out
}

// settingsValues are the settings that the account's own and its effective ones
// have in common. Clients want every list, empty ones too.
type settingsValues struct {
	RestrictCreateServiceID string        `json:"restrict_create_service_id"`
	RestrictCreateAPIKey    string        `json:"restrict_create_platform_apikey"`
	RestrictUserList        string        `json:"restrict_user_list_visibility"`
	AllowedAddresses        string        `json:"allowed_ip_addresses"`
	MFA                     string        `json:"mfa"`
	UserMFA                 []userMFAView `json:"user_mfa"`
	SessionExpiration       string        `json:"session_expiration_in_seconds"`
	SessionInvalidation     string        `json:"session_invalidation_in_seconds"`
	MaxSessions             string        `json:"max_sessions_per_identity"`
	AccessTokenLife         string        `json:"system_access_token_expiration_in_seconds"`
	RefreshTokenLife        string        `json:"system_refresh_token_expiration_in_seconds"`
}

type settingsView struct {
	AccountID string `json:"account_id"`
	EntityTag string `json:"entity_tag"`
	settingsValues
	UserDomains []identity.UserDomain `json:"restrict_user_domains"`
	History     []historyEntry        `json:"history,omitzero"`
}

// effectiveView shows what holds. No enterprise assigns templates here, so that
// the account's own settings decide.
type effectiveView struct {
	AccountID string         `json:"account_id"`
	Effective settingsValues `json:"effective"`
	Account   settingsView   `json:"account"`
	Templates []struct{}     `json:"assigned_templates"`
}

// userMFAView has what is known of the user when the client asks for it.
type userMFAView struct {
	IAMID    string `json:"iam_id"`
	MFA      string `json:"mfa"`
	Name     string `json:"name,omitempty"`
	UserName string `json:"userName,omitempty"`
	Email    string `json:"email,omitempty"`
}

func (r *routes) settingsView(s *identity.Settings, resolveUsers bool) settingsView {
	v := settingsView{
		AccountID: s.AccountID, EntityTag: s.Tag(s.AccountID),
		settingsValues: settingsValues{
			RestrictCreateServiceID: s.RestrictCreateServiceID, RestrictCreateAPIKey: s.RestrictCreateAPIKey,
			RestrictUserList: s.RestrictUserList, AllowedAddresses: s.AllowedAddresses,
			MFA: s.MFA, UserMFA: make([]userMFAView, len(s.UserMFA)),
			SessionExpiration: s.SessionExpiration, SessionInvalidation: s.SessionInvalidation, MaxSessions: s.MaxSessions,
			AccessTokenLife: s.AccessTokenLife, RefreshTokenLife: s.RefreshTokenLife,
		},
		UserDomains: append([]identity.UserDomain{}, s.UserDomains...),
	}
	for i, exempt := range s.UserMFA {
		v.UserMFA[i] = userMFAView{IAMID: exempt.IAMID, MFA: exempt.MFA}
		if u, ok := r.Directory.Users.Get(directory.UserKey(s.AccountID, exempt.IAMID)); ok && resolveUsers {
			v.UserMFA[i].Name, v.UserMFA[i].UserName, v.UserMFA[i].Email = u.Name, userName(u), u.Email
		}
	}
	return v
}

// userName is the name that a user logs in with.
func userName(u *identity.User) string {
	if u.Email != "" {
		return u.Email
	}
	return u.IAMID
}

func (r *routes) settingsTarget(c *api.Call) api.Target {
	return api.Target{
		Resource: accountResource(c), CRN: r.Names.Of(service, "", c.Account(), "", "accountsettings", c.Account()).String(),
		Name: c.Account(), TypeURI: "iam-identity/accountsettings",
	}
}

func (r *routes) loadSettings(c *api.Call) (*identity.Settings, api.Target, error) {
	if err := inOwnAccount(c); err != nil {
		return nil, api.Target{TypeURI: "iam-identity/accountsettings"}, err
	}
	return r.Directory.SettingsOf(c.Account()), r.settingsTarget(c), nil
}

// requestedView shows settings as the parameters of the request ask for them.
func (r *routes) requestedView(c *api.Call, s *identity.Settings) (settingsView, error) {
	resolve, err := flag(c, "resolve_user_mfa")
	if err != nil {
		return settingsView{}, err
	}
	history, err := flag(c, "include_history")
	if err != nil {
		return settingsView{}, err
	}
	v := r.settingsView(s, resolve)
	if history {
		v.History, err = r.settingsHistory(c)
	}
	return v, err
}

func (r *routes) showSettings(c *api.Call, s *identity.Settings) (api.Reply, error) {
	v, err := r.requestedView(c, s)
	return api.Reply{Body: v, ETag: v.EntityTag}, err
}

// showEffectiveSettings shows the numbers that the server uses in the place of
// those that are not set.
func (r *routes) showEffectiveSettings(c *api.Call, s *identity.Settings) (api.Reply, error) {
	v, err := r.requestedView(c, s)
	effective := v.settingsValues
	for _, life := range []struct {
		setting *string
		def     time.Duration
	}{
		{&effective.SessionExpiration, token.RefreshLife},
		{&effective.SessionInvalidation, token.RefreshLife},
		{&effective.AccessTokenLife, token.AccessLife},
		{&effective.RefreshTokenLife, token.RefreshLife},
	} {
		*life.setting = strconv.Itoa(int(identity.Seconds(*life.setting, life.def) / time.Second))
	}
	return api.Reply{Body: effectiveView{AccountID: s.AccountID, Effective: effective, Account: v, Templates: []struct{}{}}}, err
}

func (r *routes) changedSettings(c *api.Call, b *settingsBody) (*identity.Settings, api.Target, error) {
	s, target, err := r.loadSettings(c)
	if err == nil {
		err = b.check()
	}
	return s, target, err
}

// updateSettings changes an account's settings. The answer has the history
// before this change, because clients expect one.
func (r *routes) updateSettings(c *api.Call, tx *directory.Tx, b *settingsBody, old *identity.Settings) (api.Reply, api.Target, error) {
	target := r.settingsTarget(c)
	if err := c.IfMatch(&old.Meta, old.AccountID, true); err != nil {
		return api.Reply{}, target, err
	}
	if b.UserMFA != nil {
		for _, u := range *b.UserMFA {
			if _, ok := r.Directory.Users.Get(directory.UserKey(old.AccountID, u.IAMID)); !ok {
				return api.Reply{}, target, api.Invalid("user_mfa names %q, which is not a user of the account.", u.IAMID).On("user_mfa")
			}
		}
	}
	s := *old
	data := b.apply(&s)
	if len(s.UserDomains) > maxRealms {
		return api.Reply{}, target, api.Invalid("restrict_user_domains must have at most %d realms.", maxRealms).On("restrict_user_domains")
	}
	patterns := 0
	for _, d := range s.UserDomains {
		patterns += len(d.Patterns)
	}
	if b.UserDomains != nil && patterns > maxAllowed {
		return api.Reply{}, target, api.Invalid("restrict_user_domains must have at most %d patterns in all realms together.", maxAllowed).On("restrict_user_domains")
	}
	if peer := api.PeerHost(c.R).Address; b.AllowedAddresses != nil && !s.Admits(peer) {
		return api.Reply{}, target, api.Invalid(
			"allowed_ip_addresses does not include %s, the address of this request: after the change you could not get into the account any more. Add the address, or make the change from one that is in the list.", peer,
		).On("allowed_ip_addresses")
	}
	r.Directory.Settings.Put(tx, &s)
	v := r.settingsView(&s, false)
	var err error
	if v.History, err = r.settingsHistory(c); err != nil {
		return api.Reply{}, target, err
	}
	return api.Reply{Body: v, ETag: v.EntityTag, ResponseData: data, RequestBody: data}, target, nil
}

// settingsHistory returns the changes of the account's settings, the oldest
// first. There is no creation among them: an account has settings from its
// beginning.
func (r *routes) settingsHistory(c *api.Call) ([]historyEntry, error) {
	events, err := c.History(r.settingsTarget(c).CRN)
	if err != nil {
		return nil, err
	}
	out := make([]historyEntry, len(events))
	for i, e := range events {
		out[i] = historyEntry{
			Timestamp: stamp(e.Time.Time), IAMID: e.Initiator.ID, IAMIDAccount: e.AccountID, Action: e.Action,
			Params: params(e), Message: e.Message,
		}
	}
	return out, nil
}
