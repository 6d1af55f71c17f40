package cli

import (
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var customRoles = &kind{
	noun: "custom role", plural: "custom roles", listed: "iam roles", path: "/v2/roles", array: "custom_roles", id: "id",
	form: regexp.MustCompile(`^[0-9a-f]{32}$`), account: true,
	columns: columns("Name", "name", "ID", "id", "Display name", "display_name", "Service", "service_name", "Actions", "actions"),
	details: columns("Name", "name", "ID", "id", "Display name", "display_name", "CRN", "crn", "Service", "service_name",
		"Description", "description", "Actions", "actions", "Created", "created_at", "Modified", "last_modified_at"),
}

func roleCommands() []*cobra.Command {
	role := inAccount(customRoles, "iam", "role", "BucketLister")
	displayName := field{"display-name", "", "display_name", "name that policies and lists show"}
	actions := comma("actions", "a", "actions", "what the role allows")
	create := createCommand(customRoles, "role-create NAME --display-name NAME --service-name SERVICE --actions ACTION1,ACTION2...",
		`tabard iam role-create BucketLister --display-name "Bucket lister" --service-name cloud-object-storage --actions cloud-object-storage.account.get_account_buckets`,
		"The name has letters and digits only, a capital first; it and the service never change. tabard iam roles --service\nSERVICE --output json shows the actions of the roles that there are.",
		slices.Concat(text(displayName, field{"service-name", "", "service_name", "service that the role is for"}), options{actions}, description), false)
	required(create, "display-name", "service-name", "actions")
	get := role.get()
	get.Long += " The built-in roles are shown by tabard iam roles."
	return []*cobra.Command{
		rolesCommand(), get, create,
		role.update(change{
			options: slices.Concat(text(displayName, field{"description", "d", "description", "new description; an empty one clears it"}), options{actions}),
			keeps:   []string{"display_name", "description", "actions"},
			more:    "The actions that are given take the place of those before.", example: `--display-name "Lister of buckets"`,
		}),
		role.delete("Policies lose the role; those that grant nothing else end with it."),
	}
}

func rolesCommand() *cobra.Command {
	var service, resourceType, source string
	var names []string
	return spec{
		use: "roles", short: "List the roles that policies can grant",
		more: "With --service those of one service; else the roles that every service has. Custom roles are in the list, too.",
		example: "tabard iam roles --service is\n" +
			"tabard iam roles --service cloud-object-storage --roles Writer --output json",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&service, "service", "", "service, such as is or iam-identity")
			f.StringVar(&resourceType, "resource-type", "", "resource type of the service")
			f.StringVar(&source, "source-service", "", "service that an authorization policy is for")
			f.StringSliceVar(&names, "roles", nil, "only these roles, with what they allow, comma-separated")
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			if service == "" && (resourceType != "" || source != "") {
				return Usage("--resource-type and --source-service need --service")
			}
			s.announce("Listing roles")
			q := query("service_name", service, "resource_type", resourceType, "source_service_name", source)
			if source != "" {
				q.Set("policy_type", "authorization")
			}
			roles, err := s.roles(q)
			if err != nil {
				return err
			}
			cols := columns("Role", "display_name", "Role CRN", "crn", "Description", "description")
			if len(names) > 0 {
				if roles, err = rolesNamed(roles, names); err != nil {
					return err
				}
				cols = append(cols, column{title: "Actions", path: "actions"})
			}
			return s.showAll(roles, "roles", "crn", cols)
		},
	}.command()
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

// rolesNamed picks roles by their display names, or the names of custom ones.
func rolesNamed(roles []object, names []string) ([]object, error) {
	var out []object
	for _, name := range names {
		name = strings.TrimSpace(name)
		i := slices.IndexFunc(roles, func(r object) bool {
			return strings.EqualFold(r.text("display_name"), name) || r.text("name") == name && name != "" || r.text("crn") == name
		})
		if i < 0 {
			return nil, noRole(roles, name)
		}
		out = append(out, roles[i])
	}
	return out, nil
}
