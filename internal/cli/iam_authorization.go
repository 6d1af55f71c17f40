package cli

import (
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// anyPolicyCommands are about policies whosever they are: access policies of
// the account as one, authorizations of services, and the deleted ones of both.
func anyPolicyCommands() []*cobra.Command {
	return []*cobra.Command{
		accessPoliciesCommand(), accountPoliciesCommand(),
		anyPolicyCommand("access-policy", "access policy", policyDetailsOfAny),
		anyPolicyDeleteCommand("access-policy-delete", "access policy"),
		policyRestoreCommand(),
		authorizationsCommand(),
		anyPolicyCommand("authorization-policy", "authorization policy", authorizationDetails),
		authorizationCreateCommand(),
		anyPolicyDeleteCommand("authorization-policy-delete", "authorization policy"),
	}
}

// Tables of policies that are not all of one subject.
var (
	subjectColumn      = column{title: "Subject", path: "subjects.attributes.value|subject.attributes.value"}
	anyPolicyColumns   = slices.Insert(slices.Clone(policyColumns), 1, subjectColumn)
	policyDetailsOfAny = slices.Insert(slices.Clone(policyDetails), 1, column{title: "Type", path: "type"}, subjectColumn)

	authorizationColumns = []column{
		{title: "ID", path: "id"},
		{title: "Source", of: authorizationSource},
		{title: "Target", of: policyResources},
		{title: "Roles", path: "roles.display_name|control.grant.roles.display_name|roles.role_id|control.grant.roles.role_id"},
		{title: "Created", path: "created_at"},
	}
	authorizationDetails = append(slices.Clone(authorizationColumns), columns("State", "state", "Description", "description", "Modified", "last_modified_at")...)
)

// authorizationSource says in words what an authorization is for.
func authorizationSource(o object) string {
	subject := at(o.fields, []string{"subject", "attributes"})
	if first, ok := at(o.fields, []string{"subjects", "attributes"}).([]any); ok && len(first) > 0 {
		subject = first[0]
	}
	return attributesInWords(subject)
}

// sorts are what policies can be sorted by; a minus before one reverses it.
var sorts = []string{"id", "type", "href", "created_at", "created_by_id", "last_modified_at", "last_modified_by_id", "state"}

// subjectType tells what kind of identity a policy is for.
func subjectType(o object) string {
	switch id := o.text("subjects.attributes.value|subject.attributes.value"); {
	case strings.HasPrefix(id, "AccessGroupId-"):
		return "access_group"
	case strings.HasPrefix(id, "iam-ServiceId-"):
		return "service_id"
	case strings.HasPrefix(id, "iam-Profile-"):
		return "trusted_profile"
	}
	return "user"
}

func accessPoliciesCommand() *cobra.Command {
	var kind, sort, state, service, version string
	return spec{
		use: "access-policies", short: "List the account's access policies", example: "tabard iam access-policies --type trusted_profile --sort-by -last_modified_at",
		more: "Whosever they are. A deleted policy is kept for a while; --state deleted lists those.",
		flags: func(f *pflag.FlagSet) {
			choiceP(f, &kind, "type", "t", "", "only of this kind of identity", "user", "service_id", "access_group", "trusted_profile")
			f.StringVar(&sort, "sort-by", "", "attribute to sort by, with a minus to reverse: "+strings.Join(sorts, ", "))
			choice(f, &state, "state", "", "only in this state", "active", "deleted")
			f.StringVar(&service, "service-name", "", "only on this service")
			versionFlag(f, &version)
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			if sort != "" && !slices.Contains(sorts, strings.TrimPrefix(sort, "-")) {
				return Usage("--sort-by %q is not one of %s", sort, strings.Join(sorts, ", "))
			}
			s.announce("Listing access policies")
			// The v2 form tells of every policy whose it is.
			named := map[string]bool{}
			if kind != "" {
				all, err := s.policies("v2", "type", "access", "state", state, "service_name", service)
				if err != nil {
					return err
				}
				for _, p := range all {
					named[p.text("id")] = subjectType(p) == kind
				}
			}
			items, err := s.policies(version, "type", "access", "sort", sort, "state", state, "service_name", service)
			if err != nil {
				return err
			}
			items = slices.DeleteFunc(items, func(p object) bool { return kind != "" && !named[p.text("id")] })
			return s.showAll(items, "access policies", "id", anyPolicyColumns)
		},
	}.command()
}

func accountPoliciesCommand() *cobra.Command {
	var kind, version string
	return spec{
		use: "account-policies", short: "List the account's policies of both types", example: "tabard iam account-policies --type auth",
		more: "Access policies let identities do things; authorizations let a service use another.",
		flags: func(f *pflag.FlagSet) {
			choiceP(f, &kind, "type", "t", "", "only of this type", "access", "auth")
			versionFlag(f, &version)
			idFlag(f)
		},
	}.listing("policies", "id", slices.Insert(slices.Clone(anyPolicyColumns), 1, column{title: "Type", path: "type"}),
		func(s *session, _ []string) ([]object, error) {
			t := kind
			if t == "auth" {
				t = "authorization"
			}
			return s.policies(version, "type", t)
		})
}

func anyPolicyCommand(word, noun string, cols []column) *cobra.Command {
	var version string
	return spec{
		use: word + " POLICY_ID", short: "Show one " + noun, example: "tabard iam " + word + " " + samplePolicy, args: cobra.ExactArgs(1),
		more: "Also one that is deleted, for as long as it is kept.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Getting %s %s", noun, args[0])
			return s.showPolicy(version, args[0], cols)
		},
	}.command()
}

func anyPolicyDeleteCommand(use, noun string) *cobra.Command {
	var force bool
	return spec{
		use: use + " POLICY_ID...", short: "Delete " + strings.TrimSuffix(noun, "y") + "ies", args: cobra.MinimumNArgs(1),
		example: "tabard iam " + use + " " + samplePolicy + " -f",
		more:    "It can be restored for a while, with tabard iam policy-restore. Asks first; without a terminal to ask on it needs -f.",
		flags:   func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "delete %s %s", noun, strings.Join(args, ", ")); err != nil {
				return err
			}
			return s.removePolicies("v1", noun, args)
		},
	}.command()
}

func policyRestoreCommand() *cobra.Command {
	c := spec{
		use: "policy-restore POLICY_ID", short: "Restore a deleted policy", example: "tabard iam policy-restore " + samplePolicy, args: cobra.ExactArgs(1),
		more:  "Of either type. tabard iam access-policies --state deleted lists the access policies that can be restored.",
		flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Restoring policy %s", args[0])
			old, header, err := s.get(policyPath("v1", args[0]), nil)
			if err != nil {
				return err
			}
			o, err := s.send(request{
				method: http.MethodPatch, path: policyPath("v1", args[0]), body: map[string]string{"state": "active"},
				header: map[string]string{"If-Match": entityTag(old, header)},
			})
			if err != nil {
				return err
			}
			s.ok("The policy %s is active again.", args[0])
			return s.show(o, "id", policyDetailsOfAny)
		},
	}.command()
	c.Aliases = []string{"access-policy-restore"}
	return c
}

func authorizationsCommand() *cobra.Command {
	var version string
	return spec{
		use: "authorization-policies", short: "List the account's authorization policies", example: "tabard iam authorization-policies",
		more: "Each lets a service, or one instance of it, use another.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			idFlag(f)
		},
	}.listing("authorization policies", "id", authorizationColumns, func(s *session, _ []string) ([]object, error) {
		return s.policies(version, "type", "authorization")
	})
}

// side are the flags about one of the services of an authorization.
type side struct{ instance, instanceID, group, resourceType, resource, account string }

func (d *side) add(f *pflag.FlagSet, which string) {
	f.StringVar(&d.instance, which+"-service-instance-name", "", "only this instance of the "+which+" service, by name")
	f.StringVar(&d.instanceID, which+"-service-instance-id", "", "only this instance of the "+which+" service, by `GUID`")
	f.StringVar(&d.group, which+"-resource-group-id", "", "only what is in this resource group: name or ID")
	f.StringVar(&d.resourceType, which+"-resource-type", "", "resource type of the "+which+" service")
	f.StringVar(&d.resource, which+"-resource", "", "resource of the "+which+" service")
}

// attributes returns what the flags say of a service, the account last.
func (d *side) attributes(s *session, service string) ([][2]string, error) {
	instance, group := d.instanceID, d.group
	var err error
	if d.instance != "" {
		if instance, err = serviceInstances.find(s, d.instance, "resource_id", service); err != nil {
			return nil, err
		}
	}
	if group != "" && group != "*" {
		if group, err = groups.find(s, group); err != nil {
			return nil, err
		}
	}
	account := s.AccountID
	if d.account != "" {
		account = d.account
	}
	var out [][2]string
	for _, a := range [][2]string{
		{"serviceName", service}, {"serviceInstance", instance}, {"resourceGroupId", group},
		{"resourceType", d.resourceType}, {"resource", d.resource}, {"accountId", account},
	} {
		if a[1] != "" {
			out = append(out, a)
		}
	}
	return out, nil
}

func authorizationCreateCommand() *cobra.Command {
	var source, target side
	var file string
	c := spec{
		use:   "authorization-policy-create (SOURCE_SERVICE_NAME TARGET_SERVICE_NAME ROLE_NAME1,ROLE_NAME2... | --file FILE)",
		short: "Let a service use another",
		more: "The roles are those of the target service: tabard iam roles --service TARGET --source-service SOURCE lists them.\n" +
			"Without flags the policy is for all instances of the source service and on all of the target service.",
		example: "tabard iam authorization-policy-create cloud-object-storage kms Reader --source-service-instance-name my-bucket",
		args: func(c *cobra.Command, args []string) error {
			given := c.Flags().Changed("file")
			switch {
			case given && len(args) > 0:
				return Usage("--file has the whole policy: name no services and roles beside it")
			case !given && len(args) < 3:
				return Usage("missing %s, or --file", strings.Join([]string{"SOURCE_SERVICE_NAME", "TARGET_SERVICE_NAME", "ROLE_NAME"}[len(args):], ", "))
			case len(args) > 3:
				return Usage("unexpected argument %q", args[3])
			}
			return nil
		},
		flags: func(f *pflag.FlagSet) {
			source.add(f, "source")
			f.StringVar(&source.account, "source-service-account", "", "`ID` of the account that the source service is in, when that is another one")
			target.add(f, "target")
			f.StringVar(&file, "file", "", "whole policy as a JSON `FILE`")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			version := "v1"
			var policy map[string]any
			var err error
			if file != "" {
				s.announce("Creating authorization policy")
				if policy, err = bodyFile(s, "the policy", file); err != nil {
					return err
				}
				if has(policy, "control") || has(policy, "resource") {
					version = "v2"
				}
				if policy["type"] == nil {
					policy["type"] = "authorization"
				}
			} else {
				s.announce("Creating authorization policy for %s to use %s", args[0], args[1])
				if policy, err = authorization(s, args, &source, &target); err != nil {
					return err
				}
			}
			o, err := s.send(request{method: http.MethodPost, path: "/" + version + "/policies", body: policy})
			if err != nil {
				return err
			}
			s.ok("The authorization policy was created.")
			return s.show(o, "id", authorizationDetails)
		},
	}.command()
	for _, which := range []string{"source", "target"} {
		c.MarkFlagsMutuallyExclusive(which+"-service-instance-name", which+"-service-instance-id", which+"-resource-group-id")
	}
	c.MarkFlagsMutuallyExclusive("source-service-account", "source-service-instance-name")
	for _, name := range []string{"source-service-instance-name", "source-service-instance-id", "source-service-account", "target-service-instance-name", "target-service-instance-id"} {
		c.MarkFlagsMutuallyExclusive("file", name)
	}
	return c
}

// authorization returns the policy that two services and the names of roles
// make.
func authorization(s *session, args []string, source, target *side) (map[string]any, error) {
	from, err := source.attributes(s, args[0])
	if err != nil {
		return nil, err
	}
	to, err := target.attributes(s, args[1])
	if err != nil {
		return nil, err
	}
	known, err := s.roles(query("service_name", args[1], "source_service_name", args[0], "policy_type", "authorization"))
	if err != nil {
		return nil, err
	}
	roles, err := rolesNamed(known, splitList(args[2]))
	if err != nil {
		return nil, err
	}
	if len(roles) == 0 {
		return nil, Usage("name at least one role")
	}
	ids := make([]map[string]string, len(roles))
	for i, r := range roles {
		ids[i] = map[string]string{"role_id": r.text("crn")}
	}
	// The subject has no operators (reference/access-and-audit.md section 1.5).
	subject := make([]map[string]string, len(from))
	for i, a := range from {
		subject[i] = map[string]string{"name": a[0], "value": a[1]}
	}
	return map[string]any{
		"type": "authorization", "roles": ids,
		"subjects":  []any{map[string]any{"attributes": subject}},
		"resources": []any{map[string]any{"attributes": attributesV1(to)}},
	}, nil
}
