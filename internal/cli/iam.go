package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var profiles = &kind{
	noun: "trusted profile", plural: "trusted profiles", listed: "iam trusted-profiles", path: "/v1/profiles", array: "profiles", id: "id",
	form: prefixed("Profile-"), account: true, byName: nameFilter,
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Modified", "modified_at|created_at"),
	details: columns("Name", "name", "ID", "id", "IAM ID", "iam_id", "CRN", "crn", "Description", "description",
		"Email", "email", "Account", "account_id", "Created", "created_at", "Modified", "modified_at"),
}

var serviceIDs = &kind{
	noun: "service ID", plural: "service IDs", listed: "iam service-ids", path: "/v1/serviceids", array: "serviceids", id: "id",
	form: prefixed("ServiceId-"), account: true, byName: nameFilter,
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Locked", "locked", "Created", "created_at"),
	details: columns("Name", "name", "ID", "id", "IAM ID", "iam_id", "CRN", "crn", "Description", "description",
		"Locked", "locked", "Created", "created_at", "Modified", "modified_at"),
}

var apiKeys = &kind{
	noun: "API key", plural: "API keys", listed: "iam api-keys", path: "/v1/apikeys", array: "apikeys", id: "id",
	form: prefixed("ApiKey-"), account: true,
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Locked", "locked", "Disabled", "disabled",
		"Created", "created_at", "Expires", "expires_at"),
	details: columns("Name", "name", "ID", "id", "Description", "description", "IAM ID", "iam_id", "Created", "created_at",
		"Expires", "expires_at", "Locked", "locked", "API key", "apikey"),
}

func iamCommands() *cobra.Command {
	c := group("iam", "Manage identities and what they may do",
		"Trusted profiles with their links, rules and policies; service IDs, API keys, access groups and roles.",
		"tabard iam trusted-profile-create my-trusted-profile")
	c.AddCommand(profileCommands()...)
	c.AddCommand(
		listCommand(serviceIDs, "service-ids", "tabard iam service-ids", filter{"name", "n", "name", "show only those with this `NAME`", nil}),
		getCommand(serviceIDs, "service-id (NAME|ID)", "tabard iam service-id my-service"),
		createIdentityCommand(serviceIDs, "service-id-create NAME", "tabard iam service-id-create my-service --description \"Nightly backup\""),
		updateIdentityCommand(serviceIDs, "service-id-update (NAME|ID)", "tabard iam service-id-update my-service --name backup"),
		deleteCommand(serviceIDs, "service-id-delete (NAME|ID)...", "delete", "tabard iam service-id-delete my-service -f", nil, nil),
		policyCreateCommand("service-policy-create (NAME|ID)", "a service ID", "tabard iam service-policy-create my-service --roles Reader --service-name cloud-object-storage", serviceIDSubject),
		policyCreateCommand("user-policy-create (EMAIL|IAM_ID)", "a user", "tabard iam user-policy-create IBMid-5500000001 --roles Viewer", userSubject),
	)
	c.AddCommand(apiKeyCommands()...)
	c.AddCommand(accessGroupCommands()...)
	c.AddCommand(serviceCommands()...)
	c.AddCommand(rolesCommand(), oauthTokensCommand(), bearerTokenCommand())
	return c
}

// createIdentityCommand creates what has a name and a description: a trusted
// profile or a service ID. The fields are further ones, as flags.
func createIdentityCommand(k *kind, use, example string, fields ...field) *cobra.Command {
	description := ""
	values := make([]string, len(fields))
	lock := false
	return spec{
		use: use, short: "Create " + an(k.noun), example: example, args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&description, "description", "d", "", "description")
			for i, fd := range fields {
				f.StringVarP(&values[i], fd.flag, fd.short, "", fd.usage)
			}
			if k == serviceIDs {
				f.BoolVar(&lock, "lock", false, "lock it against changes")
			}
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating %s %s", k.noun, args[0])
			body := map[string]any{"name": args[0], "account_id": s.AccountID}
			if description != "" {
				body["description"] = description
			}
			for i, fd := range fields {
				if values[i] != "" {
					body[fd.name] = values[i]
				}
			}
			r := request{method: http.MethodPost, path: k.path, body: body, header: locked(lock)}
			o, err := s.send(r)
			if err != nil {
				return err
			}
			return s.made(k, o, "The %s %s was created.", k.noun, args[0])
		},
	}.command()
}

func locked(lock bool) map[string]string {
	if !lock {
		return nil
	}
	return map[string]string{"Entity-Lock": "true"}
}

// field is a flag that becomes a field of a body.
type field struct{ flag, short, name, usage string }

// updateIdentityCommand changes the fields that were given. It sends the entity
// tag that it read, so that it never undoes somebody else's change.
func updateIdentityCommand(k *kind, use, example string, more ...field) *cobra.Command {
	fields := append([]field{
		{"name", "n", "name", "new name"}, {"description", "d", "description", "new description; an empty one clears it"},
	}, more...)
	values := make([]string, len(fields))
	var set *pflag.FlagSet
	var force bool
	method := http.MethodPut
	if k == accessGroups {
		method = http.MethodPatch
	}
	return spec{
		use: use, short: "Change " + an(k.noun), example: example, args: cobra.ExactArgs(1),
		more: "What no flag names keeps its value.",
		flags: func(f *pflag.FlagSet) {
			for i, fd := range fields {
				f.StringVarP(&values[i], fd.flag, fd.short, "", fd.usage)
			}
			forceFlag(f, &force)
			set = f
		},
		run: func(s *session, args []string) error {
			body := map[string]any{}
			for i, fd := range fields {
				if set.Changed(fd.flag) {
					body[fd.name] = values[i]
				}
			}
			if len(body) == 0 {
				return Usage("nothing to change: give a flag such as --name or --description")
			}
			s.announce("Updating %s %s", k.noun, args[0])
			o, header, err := k.load(s, args[0])
			if err != nil {
				return err
			}
			o, err = s.send(request{method: method, path: k.at(o.text("id")), body: body, header: map[string]string{"If-Match": entityTag(o, header)}})
			if err != nil {
				return err
			}
			return s.made(k, o, "The %s %s was updated.", k.noun, args[0])
		},
	}.command()
}

func entityTag(o object, h http.Header) string {
	if tag := h.Get("Etag"); tag != "" {
		return tag
	}
	return o.text("entity_tag")
}

func apiKeyCommands() []*cobra.Command {
	var all bool
	var force bool
	return []*cobra.Command{
		spec{
			use: "api-keys", short: "List your own API keys", example: "tabard iam api-keys",
			more: "The keys themselves are not shown: the server does not know them.",
		}.listing(apiKeys.plural, apiKeys.id, apiKeys.columns, func(s *session, _ []string) ([]object, error) {
			return apiKeys.list(s, "iam_id", s.IAMID)
		}),
		createKeyCommand("api-key-create NAME", "Create an API key of your own", "tabard iam api-key-create ci --file ci-key.json", 1),
		deleteKeyCommand("api-key-delete (NAME|ID)", "Delete an API key of your own", "tabard iam api-key-delete ci -f", 1, &force),
		spec{
			use: "service-api-keys [SERVICE_ID_NAME|SERVICE_ID]", short: "List the API keys of a service ID",
			more: "With --all the keys of every service ID of the account.", example: "tabard iam service-api-keys my-service",
			args: cobra.MaximumNArgs(1),
			flags: func(f *pflag.FlagSet) {
				f.BoolVarP(&all, "all", "a", false, "of all service IDs")
				idFlag(f)
			},
		}.listing(apiKeys.plural, apiKeys.id, apiKeys.columns, func(s *session, args []string) ([]object, error) {
			if all == (len(args) == 1) {
				return nil, Usage("name a service ID, or use --all")
			}
			if all {
				return apiKeys.list(s, "type", "serviceid", "scope", "account")
			}
			owner, err := serviceIDSubject(s, args[0])
			if err != nil {
				return nil, err
			}
			return apiKeys.list(s, "iam_id", owner.value)
		}),
		createKeyCommand("service-api-key-create NAME (SERVICE_ID_NAME|SERVICE_ID)", "Create an API key of a service ID", "tabard iam service-api-key-create key-1 my-service --file key-1.json", 2),
		deleteKeyCommand("service-api-key-delete (NAME|ID) (SERVICE_ID_NAME|SERVICE_ID)", "Delete an API key of a service ID", "tabard iam service-api-key-delete key-1 my-service -f", 2, &force),
	}
}

// keyOwner returns whose key a command is about: the service ID that the second
// argument names, or who is logged in.
func keyOwner(s *session, args []string) (string, error) {
	if len(args) < 2 {
		return s.IAMID, nil
	}
	owner, err := serviceIDSubject(s, args[1])
	return owner.value, err
}

func createKeyCommand(use, short, example string, args int) *cobra.Command {
	var description, file, leaked string
	var lock bool
	return spec{
		use: use, short: short, example: example, args: cobra.ExactArgs(args),
		more: "This is the only time that the key is shown. With --file it goes to a file that only you can read, and not to\n" +
			"the terminal; the file serves as tabard login --apikey @FILE.",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&description, "description", "d", "", "description")
			f.StringVar(&file, "file", "", "write the key to this `FILE`")
			choice(f, &leaked, "action-if-leaked", "", "what happens when the key is found in public", "NONE", "DISABLE", "DELETE")
			f.BoolVar(&lock, "lock", false, "lock it against changes")
		},
		run: func(s *session, args []string) error {
			owner, err := keyOwner(s, args)
			if err != nil {
				return err
			}
			if file != "" {
				// Before the key exists: one that nobody can read is of no use.
				if _, err := os.Stat(filepath.Dir(file)); err != nil {
					return err
				}
			}
			s.announce("Creating API key %s", args[0])
			body := map[string]any{"name": args[0], "iam_id": owner, "account_id": s.AccountID}
			if description != "" {
				body["description"] = description
			}
			if leaked != "" {
				body["action_when_leaked"] = strings.ToLower(leaked)
			}
			o, err := s.send(request{method: http.MethodPost, path: apiKeys.path, body: body, header: locked(lock)})
			if err != nil {
				return err
			}
			if file == "" {
				return s.made(apiKeys, o, "The API key %s was created. Keep it safe: it cannot be shown again.", args[0])
			}
			b, err := json.MarshalIndent(map[string]string{
				"name": o.text("name"), "description": o.text("description"), "id": o.text("id"),
				"apikey": o.text("apikey"), "url": s.URL, "created_at": o.text("created_at"),
			}, "", "  ")
			if err != nil {
				return fmt.Errorf("encode the key file: %w", err)
			}
			if err := writeSecret(file, append(b, '\n')); err != nil {
				return fmt.Errorf("the API key %s was created but not saved, delete it: %w", o.text("id"), err)
			}
			o = withoutKey(o)
			return s.made(apiKeys, o, "The API key %s was created and written to %s.", args[0], file)
		},
	}.command()
}

func withoutKey(o object) object {
	delete(o.fields, "apikey")
	return object{fields: o.fields}
}

func deleteKeyCommand(use, short, example string, args int, force *bool) *cobra.Command {
	return spec{
		use: use, short: short, example: example, args: cobra.ExactArgs(args),
		more:  "Tokens and sessions got with it end. Asks first; without a terminal to ask on it needs -f.",
		flags: func(f *pflag.FlagSet) { forceFlag(f, force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(*force, "delete API key %s", args[0]); err != nil {
				return err
			}
			owner, err := keyOwner(s, args)
			if err != nil {
				return err
			}
			id, err := apiKeys.find(s, args[0], "iam_id", owner)
			if err != nil {
				return err
			}
			return s.remove(apiKeys.noun, args[:1], []string{id}, "delete", func(id string) request {
				return request{method: http.MethodDelete, path: apiKeys.at(id)}
			})
		},
	}.command()
}

func rolesCommand() *cobra.Command {
	var service, resourceType string
	return spec{
		use: "roles", short: "List the roles that policies can grant",
		more: "With --service those of one service; else the roles that every service has.", example: "tabard iam roles --service is",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&service, "service", "", "service, such as is or iam-identity")
			f.StringVar(&resourceType, "resource-type", "", "resource type of the service")
		},
	}.listing("roles", "crn", columns("Role", "display_name", "Role CRN", "crn", "Description", "description"),
		func(s *session, _ []string) ([]object, error) {
			return s.roles(query("service_name", service, "resource_type", resourceType))
		})
}

// roles returns the roles of an answer of GET /v2/roles in one list, platform
// roles first.
func (s *session) roles(q url.Values) ([]object, error) {
	q.Set("account_id", s.AccountID)
	o, _, err := s.get("/v2/roles", q)
	if err != nil {
		return nil, during(err, "list roles")
	}
	out := []object{}
	for _, array := range []string{"system_roles", "service_roles", "custom_roles"} {
		out = append(out, o.objects(array)...)
	}
	return out, nil
}

func oauthTokensCommand() *cobra.Command {
	return spec{
		use: "oauth-tokens", short: "Print the session's access token with its scheme", example: "tabard iam oauth-tokens --output json",
		more: "The value goes into an Authorization header as it is. Treat it like a password.",
		run: func(s *session, _ []string) error {
			if s.json {
				return s.printJSON(map[string]string{"iam_token": "Bearer " + s.AccessToken})
			}
			fmt.Fprintln(s.out, "IAM token:  Bearer", s.AccessToken)
			return nil
		},
	}.command()
}

func bearerTokenCommand() *cobra.Command {
	return spec{
		use: "bearer-token", short: "Print the session's access token", example: `curl -H "Authorization: Bearer $(tabard iam bearer-token)" http://127.0.0.1:8470/v2/resource_instances`,
		more: "Treat it like a password.",
		run: func(s *session, _ []string) error {
			fmt.Fprintln(s.out, s.AccessToken)
			return nil
		},
	}.command()
}
