package cli

import (
	"fmt"
	"net/http"
	"slices"

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

var serviceIDGroups = &kind{
	noun: "service ID group", plural: "service ID groups", listed: "iam service-id-groups", path: "/v1/serviceid_groups", array: "serviceid_groups", id: "id",
	form: prefixed("ServiceIdGroup-"), account: true,
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Created", "created_at"),
	details: columns("Name", "name", "ID", "id", "CRN", "crn", "Description", "description", "Created", "created_at", "Modified", "modified_at"),
}

// Filters of the lists of identities.
var identityFilters = []filter{
	{"name", "n", "name", "show only those with this `NAME`", nil},
	descriptionFilter,
}

// Options of what has a name and a description.
var (
	description = text(field{"description", "d", "description", "description"})
	renaming    = text(field{"name", "n", "name", "new name"}, field{"description", "d", "description", "new description; an empty one clears it"})
)

func iamCommands() *cobra.Command {
	c := group("iam", "Manage identities and what they may do",
		"Trusted profiles with their links, rules and policies; service IDs, API keys, access groups and roles.",
		"tabard iam trusted-profile-create my-trusted-profile")
	for _, cmds := range [][]*cobra.Command{
		profileCommands(), assumeCommands(), serviceIDCommands(), apiKeyCommands(), accessGroupCommands(), policyCommands(), roleCommands(),
		settingsCommands(), serviceCommands(), workloadCommands(), useCommands(), {simulateCommands(), oauthTokensCommand(), bearerTokenCommand()},
	} {
		c.AddCommand(cmds...)
	}
	return c
}

func serviceIDCommands() []*cobra.Command {
	id, group := inAccount(serviceIDs, "iam", "service-id", "my-service"), inAccount(serviceIDGroups, "iam", "service-id-group", "my-services")
	inGroup := theID(serviceIDGroups, "group", "g", "group_id", "service ID group to put it into")
	return slices.Concat([]*cobra.Command{
		listCommand(serviceIDs, "service-ids", "tabard iam service-ids",
			append(slices.Clone(identityFilters), filter{"group", "g", "group_id", "show only those in this service ID group: name or ID", serviceIDGroups})...),
		id.get(),
		createCommand(serviceIDs, "service-id-create NAME", `tabard iam service-id-create my-service --description "Nightly backup"`, "",
			append(slices.Clone(description), inGroup), true),
		id.update(change{options: renaming, example: "--name backup"}),
		deleteCommand(serviceIDs, "service-id-delete (NAME|ID)...", "delete", "tabard iam service-id-delete my-service -f", nil, nil),
	}, id.locks(), []*cobra.Command{
		listCommand(serviceIDGroups, "service-id-groups", "tabard iam service-id-groups"),
		group.get(),
		createCommand(serviceIDGroups, "service-id-group-create NAME", "tabard iam service-id-group-create my-services",
			"A service ID is put into a group when it is created, and stays in it.", description, false),
		group.update(change{options: renaming, keeps: []string{"name", "description"}, example: `--description "Of the web team"`}),
		deleteCommand(serviceIDGroups, "service-id-group-delete (NAME|ID)...", "delete", "tabard iam service-id-group-delete my-services -f", nil, nil),
	})
}

// createCommand creates an object of its name, the account and what the flags
// say.
func createCommand(k *kind, use, example, more string, opts options, lockable bool) *cobra.Command {
	var given reader
	var lock bool
	return spec{
		use: use, short: "Create " + an(k.noun), example: example, more: more, args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			given = opts.add(f)
			if lockable {
				f.BoolVar(&lock, "lock", false, "lock it against changes")
			}
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating %s %s", k.noun, args[0])
			body, err := given(s)
			if err != nil {
				return err
			}
			body["name"], body["account_id"] = args[0], s.AccountID
			o, err := s.send(request{method: http.MethodPost, path: k.path, body: body, header: locked(lock)})
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

func entityTag(o object, h http.Header) string {
	if tag := h.Get("Etag"); tag != "" {
		return tag
	}
	return o.text("entity_tag")
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
