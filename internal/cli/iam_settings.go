package cli

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// settings are those of the account for one service: an object that is there
// from the beginning.
type settings struct {
	word, what string
	path       func(account string) string
	query      func(account string) url.Values
	method     string // of a change
	options    options
	more       string
	example    string // flags of a change
	columns    []column

	// finish makes the body fit for the API, when it is not so as it is.
	finish func(old object, body map[string]any) (map[string]any, error)
}

var restrictions = []string{"RESTRICTED", "NOT_RESTRICTED", "NOT_SET"}

var accountSettings = settings{
	word: "account-settings", what: "account's settings for identities and logins", method: http.MethodPut,
	path: func(account string) string { return "/v1/accounts/" + url.PathEscape(account) + "/settings/identity" },
	options: slices.Concat(options{
		choose("restrict-create-service-id", "restrict_create_service_id", "who may create service IDs", restrictions...),
		choose("restrict-create-platform-apikey", "restrict_create_platform_apikey", "who may create API keys", restrictions...),
		choose("restrict-user-list-visibility", "restrict_user_list_visibility", "who sees the account's users", restrictions[:2]...),
		choose("mfa", "mfa", "demand on logins", "NONE", "NONE_NO_ROPC", "TOTP", "TOTP4ALL", "LEVEL1", "LEVEL2", "LEVEL3"),
	}, text(
		field{"allowed-ip-addresses", "", "allowed_ip_addresses", "`ADDRESSES` that tokens are given to: addresses, prefixes and ranges, comma-separated; empty allows all"},
		field{"session-expiration-in-seconds", "", "session_expiration_in_seconds", "`SECONDS` after which a session ends, or NOT_SET"},
		field{"session-invalidation-in-seconds", "", "session_invalidation_in_seconds", "`SECONDS` of inactivity after which a session ends, or NOT_SET"},
		field{"max-sessions-per-identity", "", "max_sessions_per_identity", "`NUMBER` of sessions that one identity can have, or NOT_SET"},
		field{"system-access-token-expiration-in-seconds", "", "system_access_token_expiration_in_seconds", "`SECONDS` that access tokens are good for, or NOT_SET"},
		field{"system-refresh-token-expiration-in-seconds", "", "system_refresh_token_expiration_in_seconds", "`SECONDS` that refresh tokens are good for, or NOT_SET"},
	), options{
		jsonText("user-mfa", "", "user_mfa", "demands on single users"),
		jsonText("restrict-user-domains", "", "restrict_user_domains", "whose addresses can be invited"),
	}),
	more: "They take effect at once. A list of allowed addresses without your own is refused.", example: "--system-access-token-expiration-in-seconds 1800",
	columns: columns("Account", "account_id", "Restrict create service ID", "restrict_create_service_id", "Restrict create API key", "restrict_create_platform_apikey",
		"Restrict user list", "restrict_user_list_visibility", "Allowed IP addresses", "allowed_ip_addresses", "MFA", "mfa", "MFA of single users", "user_mfa.iam_id",
		"Session expiration (s)", "session_expiration_in_seconds", "Session invalidation (s)", "session_invalidation_in_seconds",
		"Sessions per identity", "max_sessions_per_identity", "Access token expiration (s)", "system_access_token_expiration_in_seconds",
		"Refresh token expiration (s)", "system_refresh_token_expiration_in_seconds", "Restricted domains", "restrict_user_domains.invitation_email_allow_patterns"),
}

var accessSettings = settings{
	word: "access-management-settings", what: "account's settings for identities of other accounts", method: http.MethodPatch,
	path: func(account string) string {
		return "/v1/accounts/" + url.PathEscape(account) + "/settings/access_management"
	},
	options: options{
		choose("identity-type", "type", "identities that it is about", "user", "service_id", "service"),
		choose("state", "state", "what those of other accounts can be given access to", "enabled", "limited", "monitor"),
		comma("external-allowed-accounts", "", "accounts", "accounts whose identities are let in all the same"),
	},
	more:    "With limited only the allowed accounts are let in; with monitor all are, and those that limited would keep out are on\nrecord.",
	example: "--identity-type user --state limited --external-allowed-accounts 4f1e2b3c4d5e6f708192a3b4c5d6e7f8",
	columns: externalColumns(),
	finish: func(old object, b map[string]any) (map[string]any, error) {
		of, _ := b["type"].(string)
		if of == "" {
			return nil, Usage("missing --identity-type")
		}
		external := "external_account_identity_interaction"
		before, _ := at(old.fields, []string{external, "identity_types", of}).(map[string]any)
		after := maps.Clone(before)
		if after == nil {
			after = map[string]any{}
		}
		if state, ok := b["state"]; ok {
			after["state"] = state
			if state == "enabled" { // which allows every account
				after["external_allowed_accounts"] = []string{}
			}
		}
		if accounts, ok := b["accounts"]; ok {
			after["external_allowed_accounts"] = accounts
		}
		return map[string]any{external: map[string]any{"identity_types": map[string]any{of: after}}}, nil
	},
}

func externalColumns() []column {
	var out []column
	for _, t := range []struct{ title, name string }{{"Users", "user"}, {"Service IDs", "service_id"}, {"Services", "service"}} {
		path := "external_account_identity_interaction.identity_types." + t.name
		out = append(out, columns(t.title, path+".state", t.title+": allowed accounts", path+".external_allowed_accounts")...)
	}
	return out
}

var groupSettings = settings{
	word: "access-group-settings", what: "account's settings for access groups", method: http.MethodPatch,
	path:    func(string) string { return "/v2/groups/settings" },
	query:   func(account string) url.Values { return query("account_id", account) },
	options: options{yesNo("public-access-enabled", "public_access_enabled", "whether there is a group Public Access, which everybody is in")},
	more:    "Turned off, the group's policies are deleted.", example: "--public-access-enabled false",
	columns: columns("Account", "account_id", "Public access", "public_access_enabled", "Modified", "last_modified_at", "Modified by", "last_modified_by_id"),
}

func settingsCommands() []*cobra.Command {
	var cmds []*cobra.Command
	for _, set := range []settings{accountSettings, accessSettings, groupSettings} {
		cmds = append(cmds, set.get(), set.update())
	}
	return append(cmds, inactivityReportCommand())
}

func (g settings) load(s *session) (request, object, http.Header, error) {
	r := request{method: http.MethodGet, path: g.path(s.AccountID)}
	if g.query != nil {
		r.query = g.query(s.AccountID)
	}
	o, h, err := s.get(r.path, r.query)
	return r, o, h, err
}

func (g settings) get() *cobra.Command {
	return spec{
		use: g.word, short: "Show the " + g.what, example: "tabard iam " + g.word,
		run: func(s *session, _ []string) error {
			s.announce("Getting the %s", g.what)
			_, o, _, err := g.load(s)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "account_id", g.columns)
		},
	}.command()
}

func (g settings) update() *cobra.Command {
	var given reader
	return spec{
		use: g.word + "-update", short: "Change the " + g.what, example: "tabard iam " + g.word + "-update " + g.example,
		more:  "What no flag names keeps its value. " + g.more,
		flags: func(f *pflag.FlagSet) { given = g.options.add(f); neverAsks(f) },
		run: func(s *session, _ []string) error {
			b, err := given(s)
			if err != nil {
				return err
			}
			if len(b) == 0 {
				return g.options.nothingToChange()
			}
			s.announce("Updating the %s", g.what)
			r, old, header, err := g.load(s)
			if err != nil {
				return err
			}
			if g.finish != nil {
				if b, err = g.finish(old, b); err != nil {
					return err
				}
			}
			r.method, r.body, r.header = g.method, b, map[string]string{"If-Match": entityTag(old, header)}
			o, err := s.send(r)
			if err != nil {
				return err
			}
			s.ok("The %s were updated.", g.what)
			return s.show(o, "account_id", g.columns)
		},
	}.command()
}

const (
	reportTimeout = time.Minute
	reportPoll    = 500 * time.Millisecond
)

// inactivityReportCommand asks for a report and waits for it, or shows one that
// was asked for before.
func inactivityReportCommand() *cobra.Command {
	var hours int
	c := spec{
		use: "inactivity-report [REFERENCE]", short: "List what has not logged in for a while", args: cobra.MaximumNArgs(1),
		more: "Users, API keys, service IDs and trusted profiles that have not been used for --hours, or ever. A report takes\n" +
			"some seconds; it is kept for a day, and shown again by its reference, or latest.",
		example: "tabard iam inactivity-report --hours 2160",
		flags: func(f *pflag.FlagSet) {
			f.IntVar(&hours, "hours", 0, "how long, in `HOURS` (default 720)")
		},
		run: func(s *session, args []string) error {
			base := "/v1/activity/accounts/" + url.PathEscape(s.AccountID) + "/report"
			var reference string
			if len(args) == 1 {
				if hours != 0 {
					return Usage("--hours is for a new report; %s has its own", args[0])
				}
				reference = args[0]
			} else {
				q := url.Values{"type": {"inactive"}}
				if hours != 0 {
					q.Set("duration", fmt.Sprint(hours))
				}
				o, err := s.send(request{method: http.MethodPost, path: base, query: q})
				if err != nil {
					return err
				}
				reference = o.text("reference")
			}
			s.announce("Getting the inactivity report %s", reference)
			report, err := s.report(base + "/" + url.PathEscape(reference))
			if err != nil {
				return err
			}
			if s.json {
				return s.printJSON(report)
			}
			cols := columns("Kind", "kind", "ID", "id", "Name", "name", "Of", "of", "Last login", "last_at")
			if err := s.showAll(inactive(report), "inactive identities", "id", cols); err != nil {
				return err
			}
			if !s.quiet {
				fmt.Fprintf(s.out, "\nReport %s, from %s to %s.\n", plain(report.text("reference")),
					plain(clock(report.text("report_start_time"))), plain(clock(report.text("report_end_time"))))
			}
			return nil
		},
	}.command()
	return c
}

// report waits for a report: the answer is empty until it is there.
func (s *session) report(path string) (object, error) {
	end := time.NewTimer(reportTimeout)
	defer end.Stop()
	for {
		o, _, err := s.get(path, nil)
		if err != nil || o.raw != nil {
			return o, err
		}
		select {
		case <-time.After(reportPoll):
		case <-end.C:
			return o, &noted{error: errors.New("the report is not there yet"), note: "Show it later with: tabard iam inactivity-report latest"}
		case <-s.ctx().Done():
			return o, errInterrupted
		}
	}
}

// inactive puts the entries of a report into one list.
func inactive(report object) []object {
	out := []object{}
	for _, part := range []struct{ array, kind string }{
		{"users", "user"}, {"serviceids", "service ID"}, {"profiles", "trusted profile"}, {"apikeys", "API key"},
	} {
		for _, o := range report.objects(part.array) {
			fields := map[string]any{
				"kind": part.kind, "id": o.text("id|iam_id"), "name": o.text("name|username"),
				"of": strings.TrimSpace(o.text("serviceid.name|serviceid.id|user.email|user.username|user.iam_id")), "last_at": "never",
			}
			if last := o.text("last_authn"); last != "" {
				fields["last_at"] = last
			}
			out = append(out, object{fields: fields})
		}
	}
	return out
}
