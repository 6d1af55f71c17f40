package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var serviceInstances = &kind{
	noun: "service instance", plural: "service instances", listed: "resource service-instances", path: "/v2/resource_instances", array: "resources", id: "guid",
	form: prefixed(""), byName: nameFilter,
	columns: columns("Name", "name", "GUID", "guid", "Service", "resource_id", "Location", "region_id", "State", "state"),
	details: append(columns("Name", "name", "ID", "id", "GUID", "guid", "Service", "resource_id", "Plan ID", "resource_plan_id", "Location", "region_id",
		"State", "state", "Locked", "locked", "Tags", "tags", "Resource group ID", "resource_group_id", "Last operation", "last_operation.type",
		"Created", "created_at", "Created by", "created_by", "Reclaimed", "scheduled_reclaim_at"), column{title: "Parameters", of: jsonAt("parameters")}),
}

// jsonAt shows a field that has more to it than text, as JSON.
func jsonAt(name string) func(object) string {
	return func(o object) string {
		if b, err := json.Marshal(o.fields[name]); err == nil && len(b) > len("{}") && string(b) != "null" {
			return string(b)
		}
		return ""
	}
}

var groups = &kind{
	noun: "resource group", plural: "resource groups", listed: "resource groups", path: "/v2/resource_groups", array: "resources", id: "id",
	form: regexp.MustCompile(`^[0-9a-f]{32}$`), account: true, byName: nameFilter,
	columns: columns("Name", "name", "ID", "id", "Default Group", "default", "State", "state"),
	details: columns("Name", "name", "ID", "id", "CRN", "crn", "Default Group", "default", "State", "state", "Created", "created_at"),
}

var serviceKeys = &kind{
	noun: "service key", plural: "service keys", listed: "resource service-keys", path: "/v2/resource_keys", array: "resources", id: "guid",
	form: prefixed(""), byName: nameFilter,
	columns: columns("Name", "name", "GUID", "guid", "Service", "resource_id", "Role", "role", "State", "state", "Created", "created_at"),
	details: columns("Name", "name", "ID", "id", "GUID", "guid", "Service", "resource_id", "Source", "source_crn", "Role", "role", "State", "state",
		"Service ID", "credentials.iam_serviceid_crn", "API key ID", "credentials.iam_apikey_id", "API key", "credentials.apikey|credentials.REDACTED",
		"Created", "created_at", "Created by", "created_by"),
}

// reclamations are named by themselves or by the instances that they are about.
var reclamations = &kind{
	noun: "reclamation", plural: "reclamations", listed: "resource reclamations", path: "/v1/reclamations", array: "resources", id: "id",
	named: "resource_instance_id", account: true,
	columns: columns("ID", "id", "Instance GUID", "resource_instance_id", "Instance CRN", "entity_crn", "State", "state", "Reclaimed at", "target_time"),
	details: columns("ID", "id", "Instance GUID", "resource_instance_id", "Instance CRN", "entity_crn", "State", "state", "Reclaimed at", "target_time",
		"Resource group ID", "resource_group_id", "Created", "created_at", "Created by", "created_by"),
}

var quotas = &kind{
	noun: "quota", plural: "quotas", listed: "resource quotas", path: "/v2/quota_definitions", array: "resources", id: "id",
	columns: columns("Name", "name", "ID", "id", "Type", "type", "Service instances", "number_of_service_instances", "Virtual servers", "vsi_limit"),
	details: columns("Name", "name", "ID", "id", "Type", "type", "Service instances", "number_of_service_instances",
		"Instances of a lite plan", "default_number_of_instances_per_lite_plan", "Applications", "number_of_apps", "Virtual servers", "vsi_limit", "Created", "created_at"),
}

func resourceCommands() *cobra.Command {
	var recursive bool
	rg := inAccount(groups, "resource", "group", "my-group")
	instance := inAccount(serviceInstances, "resource", "service-instance", "my-bucket")
	key := inAccount(serviceKeys, "resource", "service-key", "my-key")
	quota := inAccount(quotas, "resource", "quota", "Unlimited")
	c := group("resource", "Manage service instances and resource groups",
		"Service instances are what policies on services are about; resource groups are the compartments they are kept in.",
		"tabard resource service-instances",
		serviceInstancesCommand(), instance.get(), serviceInstanceCreateCommand(),
		instance.update(change{method: http.MethodPatch, options: instanceChanges, example: "--name my-other-bucket",
			more: "A new plan must be one of the same service; a locked instance is changed by nobody."}),
		deleteCommand(serviceInstances, "service-instance-delete (NAME|ID)...", "delete", "tabard resource service-instance-delete my-bucket -f",
			func(f *pflag.FlagSet) { f.BoolVar(&recursive, "recursive", false, "with its service keys") },
			func() []string {
				if recursive {
					return []string{"recursive", "true"}
				}
				return nil
			}),
		serviceKeysOfCommand(), key.get(), serviceKeyCreateCommand(),
		key.update(change{method: http.MethodPatch, options: text(field{"name", "n", "name", "new name"}), example: "--name my-other-key"}),
		key.delete("Its API key goes with it, and the service ID that was made for it."),
		reclamationsCommand(), reclamationCommand(),
		reclamationActionCommand("restore", "restore", "Restore a deleted service instance", "The instance is active again; its service keys are gone.", false),
		reclamationActionCommand("delete", "reclaim", "Delete a service instance for good", "It cannot be restored after that.", true),
		groupsCommand(), rg.get(), groupCreateCommand(),
		rg.update(change{method: http.MethodPatch, example: "--name web", options: options{
			{field: field{"name", "n", "name", "new name"}},
			choose("state", "state", "whether something can be created in it", "ACTIVE", "SUSPENDED"),
		}}),
		deleteCommand(groups, "group-delete (NAME|ID)...", "delete", "tabard resource group-delete my-group -f", nil, nil),
		listCommand(quotas, "quotas", "tabard resource quotas"), quota.get(),
		plansCommand(),
	)
	c.AddCommand(instance.locks()...)
	return c
}

func groupsCommand() *cobra.Command {
	var def bool
	return spec{
		use: "groups", short: "List the account's resource groups", example: "tabard resource groups --default",
		flags: func(f *pflag.FlagSet) {
			f.BoolVar(&def, "default", false, "only the account's default group")
			idFlag(f)
		},
	}.listing(groups.plural, groups.id, groups.columns, func(s *session, _ []string) ([]object, error) {
		if def {
			return groups.list(s, "default", "true")
		}
		return groups.list(s)
	})
}

func serviceInstancesCommand() *cobra.Command {
	var group, service, location, state string
	var all, long bool
	c := spec{
		use: "service-instances", short: "List the account's service instances", example: "tabard resource service-instances -g Default --service-name cloud-object-storage",
		more: "Those in use that you may see, in all resource groups; --state shows others.",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&group, "group", "g", "", "only in this resource group: name or ID")
			f.BoolVar(&all, "all-resource-groups", false, "in all resource groups, as without --group")
			f.StringVar(&service, "service-name", "", "only of this service")
			f.StringVar(&location, "location", "", "only in this location")
			choice(f, &state, "state", "", "only in this state", "active", "removed", "pending_reclamation")
			f.BoolVar(&long, "long", false, "show more columns")
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			s.announce("Listing service instances")
			in := ""
			if group != "" {
				var err error
				if in, err = groups.find(s, group); err != nil {
					return err
				}
			}
			items, err := serviceInstances.list(s, "resource_group_id", in, "resource_id", service, "state", state)
			if err != nil {
				return err
			}
			items = slices.DeleteFunc(items, func(o object) bool { return location != "" && o.text("region_id") != location })
			cols := serviceInstances.columns
			if long {
				cols = append(slices.Clone(cols), columns("Locked", "locked", "Plan ID", "resource_plan_id", "Resource group ID", "resource_group_id",
					"Created", "created_at", "CRN", "crn")...)
			}
			return s.showAll(items, serviceInstances.plural, serviceInstances.id, cols)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("group", "all-resource-groups")
	return c
}

// Options of service instances.
var (
	parameters = jsonText("parameters", "p", "parameters", "parameters of the service")
	cleanup    = func() option {
		o := yesNo("allow-cleanup", "allow_cleanup", "whether it goes when its region does")
		o.bare = "true"
		return o
	}()
	newInstanceFlags = options{parameters, cleanup, comma("tags", "", "tags", "tags")}
	instanceChanges  = options{
		{field: field{"name", "n", "name", "new name"}}, parameters, cleanup,
		{field: field{"service-plan-id", "", "resource_plan_id", "`ID` of a plan of the same service"}},
	}
)

func serviceInstanceCreateCommand() *cobra.Command {
	var group string
	var given reader
	var lock bool
	return spec{
		use: "service-instance-create NAME SERVICE PLAN LOCATION", short: "Create a service instance",
		more:    "SERVICE is the service's name, PLAN a name or ID that tabard resource plans lists. Without -g it goes to the\ntargeted resource group, else to the account's default one.",
		example: "tabard resource service-instance-create my-bucket cloud-object-storage lite us-south", args: cobra.ExactArgs(4),
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&group, "group", "g", "", "resource group: name or ID")
			given = newInstanceFlags.add(f)
			f.BoolVar(&lock, "lock", false, "lock it against changes")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			body, err := given(s)
			if err != nil {
				return err
			}
			body["name"], body["target"] = args[0], args[3]
			s.announce("Creating service instance %s of service %s", args[0], args[1])
			if body["resource_plan_id"], err = s.planID(args[1], args[2]); err != nil {
				return err
			}
			if body["resource_group"], err = s.groupID(group); err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: serviceInstances.path, body: body, header: locked(lock)})
			if err != nil {
				return err
			}
			return s.made(serviceInstances, o, "The service instance %s was created.", args[0])
		},
	}.command()
}

// ofInstance are the flags that name a service instance.
type ofInstance struct{ id, name string }

func (i *ofInstance) add(f *pflag.FlagSet) {
	f.StringVar(&i.id, "instance-id", "", "service instance: `GUID` or CRN")
	f.StringVar(&i.name, "instance-name", "", "service instance, by name")
}

// find returns the GUID of the named instance, or "" when none is named.
func (i *ofInstance) find(s *session) (string, error) {
	ref := i.id
	if ref == "" {
		ref = i.name
	}
	if ref == "" {
		return "", nil
	}
	return serviceInstances.find(s, ref)
}

func serviceKeysOfCommand() *cobra.Command {
	var of ofInstance
	c := spec{
		use: "service-keys", short: "List service keys", example: "tabard resource service-keys --instance-name my-bucket",
		more: "Those of one service instance, or without a flag all that you may see. A key that you may not use is shown without\nits API key.",
		flags: func(f *pflag.FlagSet) {
			of.add(f)
			idFlag(f)
		},
	}.listing(serviceKeys.plural, serviceKeys.id, serviceKeys.columns, func(s *session, _ []string) ([]object, error) {
		id, err := of.find(s)
		if err != nil {
			return nil, err
		}
		if id == "" {
			return serviceKeys.list(s)
		}
		k := *serviceKeys
		k.path = serviceInstances.at(id, "resource_keys")
		return k.list(s)
	})
	c.MarkFlagsMutuallyExclusive("instance-id", "instance-name")
	return c
}

func serviceKeyCreateCommand() *cobra.Command {
	var of ofInstance
	var serviceID, file string
	var given reader
	c := spec{
		use: "service-key-create NAME [ROLE]", short: "Create a service key", args: cobra.RangeArgs(1, 2),
		example: "tabard resource service-key-create my-key Writer --instance-name my-bucket --file my-key.json",
		more: "The key has an API key of a service ID that is made for it and has ROLE on the instance; with --service-id that of\n" +
			"one that there is. With --file the credentials go to a file that only you can read, and not to the terminal.",
		flags: func(f *pflag.FlagSet) {
			of.add(f)
			f.StringVar(&serviceID, "service-id", "", "service ID to make an API key of: name or ID")
			given = options{parameters}.add(f)
			f.StringVar(&file, "file", "", "write the credentials to this `FILE`")
			idFlag(f)
			neverAsks(f)
		},
		run: func(s *session, args []string) error {
			role := ""
			if len(args) == 2 && !strings.EqualFold(args[1], "None") {
				role = args[1]
			}
			if serviceID != "" && role != "" {
				return Usage("--service-id has what it has: name no role beside it")
			}
			if err := fileCanBe(file); err != nil {
				return err
			}
			body, err := given(s)
			if err != nil {
				return err
			}
			s.announce("Creating service key %s", args[0])
			body["name"] = args[0]
			if body["source"], err = of.find(s); err != nil {
				return err
			}
			if role != "" {
				body["role"] = role
			}
			if serviceID != "" {
				if err := withServiceID(s, body, serviceID); err != nil {
					return err
				}
			}
			o, err := s.send(request{method: http.MethodPost, path: serviceKeys.path, body: body})
			if err != nil {
				return err
			}
			if file == "" {
				return s.made(serviceKeys, o, "The service key %s was created.", args[0])
			}
			if err := saveSecret(file, o.fields["credentials"]); err != nil {
				return fmt.Errorf("the service key %s was created but its credentials were not saved: %w", o.text("guid"), err)
			}
			delete(o.fields, "credentials")
			return s.made(serviceKeys, object{fields: o.fields}, "The service key %s was created; its credentials are in %s.", args[0], file)
		},
	}.command()
	c.MarkFlagsMutuallyExclusive("instance-id", "instance-name")
	c.MarkFlagsOneRequired("instance-id", "instance-name")
	return c
}

// withServiceID names a service ID in the parameters of a new service key.
func withServiceID(s *session, body map[string]any, ref string) error {
	owner, _, err := serviceIDs.load(s, ref)
	if err != nil {
		return err
	}
	given := map[string]any{}
	if raw, ok := body["parameters"].(json.RawMessage); ok {
		if err := json.Unmarshal(raw, &given); err != nil {
			return Usage("--parameters is not a JSON object")
		}
	}
	given["serviceid_crn"] = owner.text("crn")
	body["parameters"] = given
	return nil
}

func reclamationsCommand() *cobra.Command {
	var instance string
	return spec{
		use: "reclamations", short: "List the deleted service instances that can be restored", example: "tabard resource reclamations",
		more: "Plans say whether the deletion of an instance waits: tabard resource plans shows it.",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&instance, "resource-instance-id", "", "only that of this service instance: `GUID` or CRN")
			idFlag(f)
		},
	}.listing(reclamations.plural, reclamations.id, reclamations.columns, func(s *session, _ []string) ([]object, error) {
		return reclamations.list(s, "resource_instance_id", instance)
	})
}

func reclamationCommand() *cobra.Command {
	return spec{
		use: "reclamation (ID|INSTANCE_GUID)", short: "Show one reclamation", args: cobra.ExactArgs(1), flags: idFlag,
		example: "tabard resource reclamation " + samplePolicy,
		run: func(s *session, args []string) error {
			s.announce("Getting reclamation %s", args[0])
			o, err := s.reclamation(args[0])
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, reclamations.id, reclamations.details)
		},
	}.command()
}

// reclamation returns the reclamation with an id, or that of the instance with a
// GUID. The API has them in a list only.
func (s *session) reclamation(ref string) (object, error) {
	items, err := reclamations.list(s)
	if err != nil {
		return object{}, err
	}
	id, err := reclamations.pick(s, items, ref)
	if err != nil {
		return object{}, err
	}
	return items[slices.IndexFunc(items, func(o object) bool { return o.text("id") == id })], nil
}

func reclamationActionCommand(verb, action, short, more string, asks bool) *cobra.Command {
	var comment string
	var force bool
	if asks {
		more += " Asks first; without a terminal to ask on it needs -f."
	}
	example := "tabard resource reclamation-" + verb + " " + samplePolicy
	if asks {
		example += " -f"
	}
	return spec{
		use: "reclamation-" + verb + " (ID|INSTANCE_GUID)", short: short, more: more, example: example, args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&comment, "comment", "", "comment for the record")
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			if err := s.confirm(force || !asks, "%s the service instance of reclamation %s", verb, args[0]); err != nil {
				return err
			}
			s.announce("%s reclamation %s", capital(participle(verb)), args[0])
			old, err := s.reclamation(args[0])
			if err != nil {
				return err
			}
			o, err := s.send(request{
				method: http.MethodPost, path: reclamations.at(old.text("id"), "actions", action), body: filled("comment", comment),
			})
			if err != nil {
				return err
			}
			return s.made(reclamations, o, "The service instance %s was %s.", old.text("resource_instance_id"), past(verb))
		},
	}.command()
}

// groupID returns the id of the named resource group, else of the targeted one,
// else of the account's default one.
func (s *session) groupID(ref string) (string, error) {
	switch {
	case ref != "":
		return groups.find(s, ref)
	case s.ResourceGroupID != "":
		return s.ResourceGroupID, nil
	}
	found, err := groups.list(s, "default", "true")
	if err != nil {
		return "", err
	}
	if len(found) == 0 {
		return "", fmt.Errorf("there is no default resource group that you may see: name one with -g")
	}
	return found[0].text("id"), nil
}

// plans returns the plans of a service, or of all.
func (s *session) plans(service string) ([]object, error) {
	plans := []object{}
	_, err := s.client.do(s.ctx(), request{method: http.MethodGet, path: "/v2/resource_plans"}, &plans)
	return slices.DeleteFunc(plans, func(p object) bool { return service != "" && p.text("service_name") != service }), during(err, "list plans")
}

// planID returns the id of a service's plan by the plan's name or id.
func (s *session) planID(service, ref string) (string, error) {
	plans, err := s.plans(service)
	if err != nil {
		return "", err
	}
	k := &kind{noun: "plan of " + service, plural: "plans of " + service, listed: "resource plans --service " + service, id: "id"}
	return k.pick(s, plans, ref)
}

func plansCommand() *cobra.Command {
	var service string
	return spec{
		use: "plans", short: "List the plans that service instances can be created with", more: "With a reclamation, a deleted instance can be restored for a while.", example: "tabard resource plans --service cloud-object-storage",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&service, "service", "", "only of this service")
			idFlag(f)
		},
	}.listing("plans", "id", columns("Service", "service_name", "Plan", "name", "ID", "id", "Reclamation", "reclamation"), func(s *session, _ []string) ([]object, error) {
		return s.plans(service)
	})
}

func groupCreateCommand() *cobra.Command {
	return spec{
		use: "group-create NAME", short: "Create a resource group", example: "tabard resource group-create my-group",
		more: "Policies can be about all that is in it.", args: cobra.ExactArgs(1), flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Creating resource group %s", args[0])
			o, err := s.send(request{method: http.MethodPost, path: groups.path, body: map[string]any{"name": args[0], "account_id": s.AccountID}})
			if err != nil {
				return err
			}
			// The answer has these two only.
			s.ok("The resource group %s was created.", args[0])
			return s.show(o, groups.id, columns("ID", "id", "CRN", "crn"))
		},
	}.command()
}
