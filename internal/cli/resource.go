package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var serviceInstances = &kind{
	noun: "service instance", plural: "service instances", listed: "resource service-instances", path: "/v2/resource_instances", array: "resources", id: "guid",
	form: prefixed(""), byName: nameFilter,
	columns: columns("Name", "name", "GUID", "guid", "Service", "resource_id", "Location", "region_id", "State", "state"),
	details: columns("Name", "name", "ID", "id", "GUID", "guid", "Service", "resource_id", "Plan ID", "resource_plan_id", "Location", "region_id",
		"State", "state", "Resource group ID", "resource_group_id", "Created", "created_at", "Created by", "created_by"),
}

var groups = &kind{
	noun: "resource group", plural: "resource groups", listed: "resource groups", path: "/v2/resource_groups", array: "resources", id: "id",
	form: regexp.MustCompile(`^[0-9a-f]{32}$`), account: true, byName: nameFilter,
	columns: columns("Name", "name", "ID", "id", "Default Group", "default", "State", "state"),
	details: columns("ID", "id", "CRN", "crn"),
}

func resourceCommands() *cobra.Command {
	var recursive bool
	return group("resource", "Manage service instances and resource groups",
		"Service instances are what policies on services are about; resource groups are the compartments they are kept in.",
		"tabard resource service-instances",
		listCommand(serviceInstances, "service-instances", "tabard resource service-instances -g Default",
			filter{"group", "g", "resource_group_id", "only in this resource group: name or ID", groups},
			filter{"service-name", "", "resource_id", "only of this service", nil}),
		getCommand(serviceInstances, "service-instance (NAME|ID)", "tabard resource service-instance my-bucket"),
		serviceInstanceCreateCommand(),
		deleteCommand(serviceInstances, "service-instance-delete (NAME|ID)...", "delete", "tabard resource service-instance-delete my-bucket -f",
			func(f *pflag.FlagSet) { f.BoolVar(&recursive, "recursive", false, "with all that belongs to it") },
			func() []string {
				if recursive {
					return []string{"recursive", "true"}
				}
				return nil
			}),
		listCommand(groups, "groups", "tabard resource groups"),
		groupCreateCommand(),
		deleteCommand(groups, "group-delete (NAME|ID)...", "delete", "tabard resource group-delete my-group -f", nil, nil),
		plansCommand(),
	)
}

func serviceInstanceCreateCommand() *cobra.Command {
	var group, parameters string
	return spec{
		use: "service-instance-create NAME SERVICE PLAN LOCATION", short: "Create a service instance",
		more:    "SERVICE is the service's name, PLAN a name or ID that tabard resource plans lists. Without -g it goes to the\ntargeted resource group, else to the account's default one.",
		example: "tabard resource service-instance-create my-bucket cloud-object-storage lite us-south", args: cobra.ExactArgs(4),
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&group, "group", "g", "", "resource group: name or ID")
			f.StringVarP(&parameters, "parameters", "p", "", "parameters of the service, as `JSON` or @FILE")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			body := map[string]any{"name": args[0], "target": args[3]}
			if parameters != "" {
				text, err := fileOrText(s.cmd, parameters)
				if err != nil {
					return during(err, "read the parameters")
				}
				if !json.Valid([]byte(text)) {
					return Usage("--parameters is not JSON")
				}
				body["parameters"] = json.RawMessage(text)
			}
			s.announce("Creating service instance %s of service %s", args[0], args[1])
			var err error
			if body["resource_plan_id"], err = s.planID(args[1], args[2]); err != nil {
				return err
			}
			if body["resource_group"], err = s.groupID(group); err != nil {
				return err
			}
			return serviceInstances.create(s, args[0], body)
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
		use: "plans", short: "List the plans that service instances can be created with", example: "tabard resource plans --service cloud-object-storage",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&service, "service", "", "only of this service")
			idFlag(f)
		},
	}.listing("plans", "id", columns("Service", "service_name", "Plan", "name", "ID", "id"), func(s *session, _ []string) ([]object, error) {
		return s.plans(service)
	})
}

func groupCreateCommand() *cobra.Command {
	return spec{
		use: "group-create NAME", short: "Create a resource group", example: "tabard resource group-create my-group",
		more: "Policies can be about all that is in it.", args: cobra.ExactArgs(1), flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Creating resource group %s", args[0])
			return groups.create(s, args[0], map[string]any{"name": args[0], "account_id": s.AccountID})
		},
	}.command()
}
