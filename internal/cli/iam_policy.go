package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// subject is who a policy is for: one attribute, an iam_id or an
// access_group_id.
type subject struct{ key, value string }

// A subjectFinder finds the subject that a command's first argument names.
type subjectFinder func(s *session, ref string) (subject, error)

func profileSubject(s *session, ref string) (subject, error) {
	id, err := profiles.find(s, ref)
	return subject{"iam_id", "iam-" + id}, err
}

func serviceIDSubject(s *session, ref string) (subject, error) {
	id, err := serviceIDs.find(s, strings.TrimPrefix(ref, "iam-"))
	return subject{"iam_id", "iam-" + id}, err
}

func groupSubject(s *session, ref string) (subject, error) {
	id, err := accessGroups.find(s, ref)
	return subject{"access_group_id", id}, err
}

// userSubject takes an IAM ID, or the name or email of who is logged in: there
// is no API to look other users up.
func userSubject(s *session, ref string) (subject, error) {
	switch {
	case ref != "" && (ref == s.User || ref == s.Email):
		return subject{"iam_id", s.IAMID}, nil
	case strings.Contains(ref, "-") && !strings.ContainsAny(ref, "@ "):
		return subject{"iam_id", ref}, nil
	}
	return subject{}, fmt.Errorf("user %q cannot be looked up: give the IAM ID, such as IBMid-5500000001", ref)
}

// policyOptions are the flags of a policy.
type policyOptions struct {
	file, service, instance, region        string
	resourceType, resource, group, groupID string
	roles, tags, attributes                []string
	accountManagement                      bool
	version                                string
}

func (o *policyOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.file, "file", "", "policy as a JSON `FILE`, instead of the other flags")
	f.StringSliceVarP(&o.roles, "roles", "r", nil, "names of the roles, comma-separated")
	f.StringVar(&o.service, "service-name", "", "service; without one the policy is on all services")
	f.StringVar(&o.instance, "service-instance", "", "`GUID` of a service instance")
	f.StringVar(&o.region, "region", "", "region")
	f.StringVar(&o.resourceType, "resource-type", "", "resource type")
	f.StringVar(&o.resource, "resource", "", "resource")
	f.StringVar(&o.group, "resource-group-name", "", "resource group, by name")
	f.StringVar(&o.groupID, "resource-group-id", "", "resource group, by ID")
	f.StringSliceVar(&o.tags, "tags", nil, "access tags as name:value, comma-separated")
	f.BoolVar(&o.accountManagement, "account-management", false, "on all account management services")
	f.StringSliceVar(&o.attributes, "attributes", nil, "resource attributes as name=value, comma-separated")
	neverAsks(f)
	versionFlag(f, &o.version)
}

func versionFlag(f *pflag.FlagSet, p *string) {
	choice(f, p, "api-version", "v1", "form of the policy", "v1", "v2")
}

func policyCreateCommand(use, of, example string, find subjectFinder) *cobra.Command {
	var o policyOptions
	c := spec{
		use: use, short: "Create an access policy of " + of, example: example, args: cobra.ExactArgs(1), flags: o.add,
		more: "Roles are given by the names that tabard iam roles --service NAME lists. A policy without a service is on all\n" +
			"services; with --account-management, on all account management services. In values * stands for any text\n" +
			"and ? for any character.",
		run: func(s *session, args []string) error {
			if (o.file == "") == (len(o.roles) == 0) {
				return Usage("give --roles, or the whole policy with --file")
			}
			s.announce("Creating policy of %s %s", strings.TrimPrefix(strings.TrimPrefix(of, "a "), "an "), args[0])
			sub, err := find(s, args[0])
			if err != nil {
				return err
			}
			body, err := o.body(s, sub)
			if err != nil {
				return err
			}
			created, err := s.send(request{method: http.MethodPost, path: "/" + o.version + "/policies", body: body})
			if err != nil {
				return err
			}
			s.ok("The policy was created.")
			return s.show(created, "id", policyColumns)
		},
	}.command()
	for _, name := range []string{"roles", "service-name", "service-instance", "region", "resource-type", "resource",
		"resource-group-name", "resource-group-id", "tags", "account-management", "attributes"} {
		c.MarkFlagsMutuallyExclusive("file", name)
	}
	c.MarkFlagsMutuallyExclusive("resource-group-name", "resource-group-id")
	c.MarkFlagsMutuallyExclusive("account-management", "service-name")
	return c
}

// body builds the policy in the asked form.
func (o *policyOptions) body(s *session, sub subject) (map[string]any, error) {
	if o.file != "" {
		return o.fromFile(sub)
	}
	attributes, err := o.resourceAttributes(s)
	if err != nil {
		return nil, err
	}
	tags, err := pairs(o.tags, ":")
	if err != nil {
		return nil, err
	}
	roles, err := o.roleIDs(s, attributes)
	if err != nil {
		return nil, err
	}
	if len(attributes) == 0 {
		attributes = append(attributes, [2]string{"serviceType", "service"})
	}
	attributes = append(attributes, [2]string{"accountId", s.AccountID})

	ids := make([]map[string]string, len(roles))
	for i, r := range roles {
		ids[i] = map[string]string{"role_id": r}
	}
	policy := map[string]any{"type": "access"}
	resource := map[string]any{}
	if o.version == "v2" {
		resource["attributes"] = attributesV2(attributes)
		if len(tags) > 0 {
			resource["tags"] = attributesV2(tags)
		}
		policy["resource"], policy["control"] = resource, map[string]any{"grant": map[string]any{"roles": ids}}
	} else {
		resource["attributes"] = attributesV1(attributes)
		if len(tags) > 0 {
			resource["tags"] = attributesV1(tags)
		}
		policy["resources"], policy["roles"] = []any{resource}, ids
	}
	o.setSubject(policy, sub)
	return policy, nil
}

func (o *policyOptions) setSubject(policy map[string]any, sub subject) {
	if o.version == "v2" {
		policy["subject"] = map[string]any{"attributes": []any{map[string]string{"key": sub.key, "operator": "stringEquals", "value": sub.value}}}
		return
	}
	policy["subjects"] = []any{map[string]any{"attributes": []any{map[string]string{"name": sub.key, "value": sub.value}}}}
}

// fromFile takes the policy from a file. Whose it is, the command says.
func (o *policyOptions) fromFile(sub subject) (map[string]any, error) {
	text, err := readFile(strings.TrimPrefix(o.file, "@"))
	if err != nil {
		return nil, fmt.Errorf("read the policy: %w", err)
	}
	var policy map[string]any
	if err := json.Unmarshal([]byte(text), &policy); err != nil {
		return nil, fmt.Errorf("the policy in %s is not a JSON object: %w", o.file, err)
	}
	if policy["type"] == nil {
		policy["type"] = "access"
	}
	delete(policy, "subject")
	delete(policy, "subjects")
	o.setSubject(policy, sub)
	return policy, nil
}

// resourceAttributes are what the flags name, in the order of published
// clients; accountId comes last (reference/access-and-audit.md section 1.12).
func (o *policyOptions) resourceAttributes(s *session) ([][2]string, error) {
	var out [][2]string
	add := func(name, value string) {
		if value != "" {
			out = append(out, [2]string{name, value})
		}
	}
	add("serviceName", o.service)
	add("serviceInstance", o.instance)
	add("region", o.region)
	add("resourceType", o.resourceType)
	add("resource", o.resource)
	group := o.groupID
	if o.group != "" {
		id, err := groups.find(s, o.group)
		if err != nil {
			return nil, err
		}
		group = id
	}
	add("resourceGroupId", group)
	if o.accountManagement {
		add("serviceType", "platform_service")
	}
	more, err := pairs(o.attributes, "=")
	if err != nil {
		return nil, err
	}
	return append(out, more...), nil
}

func pairs(list []string, separator string) ([][2]string, error) {
	out := make([][2]string, len(list))
	for i, item := range list {
		name, value, ok := strings.Cut(item, separator)
		if !ok || name == "" || value == "" {
			return nil, Usage("%q is not of the form name%svalue", item, separator)
		}
		out[i] = [2]string{name, value}
	}
	return out, nil
}

func attributesV1(list [][2]string) []map[string]string {
	out := make([]map[string]string, len(list))
	for i, a := range list {
		out[i] = map[string]string{"name": a[0], "value": a[1]}
		if a[0] != "accountId" {
			out[i]["operator"] = operator(a[1])
		}
	}
	return out
}

func attributesV2(list [][2]string) []map[string]any {
	out := make([]map[string]any, len(list))
	for i, a := range list {
		out[i] = map[string]any{"key": a[0], "operator": operator(a[1]), "value": a[1]}
		if a[1] == "*" {
			out[i]["operator"], out[i]["value"] = "stringExists", true
		}
	}
	return out
}

// operator compares a value literally unless it has wildcards. A lone * is the
// old way to say that the attribute must be there
// (reference/access-and-audit.md section 1.4).
func operator(value string) string {
	if value != "*" && strings.ContainsAny(value, "*?") {
		return "stringMatch"
	}
	return "stringEquals"
}

// roleIDs looks the CRNs of roles up by their names, as published clients do
// (reference/access-and-audit.md section 1.9).
func (o *policyOptions) roleIDs(s *session, attributes [][2]string) ([]string, error) {
	q := url.Values{}
	switch value := attributeOf(attributes); {
	case value("serviceName") != "":
		q.Set("service_name", value("serviceName"))
	case value("service_group_id") != "":
		q.Set("service_group_id", value("service_group_id"))
	case value("resourceType") == "resource-group":
		q.Set("service_name", "resource-controller")
	case value("serviceType") == "" && value("resourceGroupId") == "":
		q.Set("service_name", "alliamserviceroles")
	}
	roles, err := s.roles(q)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, name := range o.roles {
		i := slices.IndexFunc(roles, func(r object) bool { return strings.EqualFold(r.text("display_name"), strings.TrimSpace(name)) })
		if i < 0 {
			var names []string
			for _, r := range roles {
				names = append(names, r.text("display_name"))
			}
			return nil, fmt.Errorf("there is no role %q here; the roles are: %s", name, strings.Join(names, ", "))
		}
		ids = append(ids, roles[i].text("crn"))
	}
	return ids, nil
}

func attributeOf(attributes [][2]string) func(name string) string {
	return func(name string) string {
		for _, a := range attributes {
			if a[0] == name {
				return a[1]
			}
		}
		return ""
	}
}

// policyColumns read both forms of a policy.
var policyColumns = append(
	columns("ID", "id", "State", "state", "Roles", "roles.display_name|control.grant.roles.display_name|roles.role_id|control.grant.roles.role_id", "Created", "created_at"),
	column{title: "Resources", of: policyResources},
)

// policyResources says in words what a policy is about. That it is about the
// account goes without saying.
func policyResources(o object) string {
	var policy struct {
		V1 []struct {
			Attributes []struct{ Name, Value string }
		} `json:"resources"`
		V2 struct {
			Attributes []struct {
				Key   string
				Value any
			}
		} `json:"resource"`
	}
	if json.Unmarshal(o.raw, &policy) != nil {
		return ""
	}
	var out []string
	add := func(key string, value any) {
		if key != "accountId" {
			out = append(out, key+"="+words(value))
		}
	}
	for _, r := range policy.V1 {
		for _, a := range r.Attributes {
			add(a.Name, a.Value)
		}
	}
	for _, a := range policy.V2.Attributes {
		add(a.Key, a.Value)
	}
	return strings.Join(out, ", ")
}

func policiesCommand(use, of, example string, find subjectFinder) *cobra.Command {
	var version string
	return spec{
		use: use, short: "List the access policies of " + of, example: example, args: cobra.ExactArgs(1),
		more: "The v1 form shows a policy that only the v2 form can express as a placeholder.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			neverAsks(f)
			idFlag(f)
		},
	}.listing("policies", "id", policyColumns, func(s *session, args []string) ([]object, error) {
		sub, err := find(s, args[0])
		if err != nil {
			return nil, err
		}
		q := query("account_id", s.AccountID, sub.key, sub.value)
		if version == "v2" && !s.json {
			q.Set("format", "display") // with the names of the roles
		}
		return s.client.list(s.ctx(), "/"+version+"/policies", q, "policies", 0)
	})
}

func policyCommand(use, of, example string, find subjectFinder) *cobra.Command {
	var version string
	return spec{
		use: use, short: "Show one access policy of " + of, example: example, args: cobra.ExactArgs(2),
		more: "A policy of somebody else is not shown.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			neverAsks(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Getting policy %s of %s", args[1], args[0])
			if err := s.checkSubject(args[0], args[1], find); err != nil {
				return err
			}
			o, _, err := s.get("/"+version+"/policies/"+url.PathEscape(args[1]), nil)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "id", policyColumns)
		},
	}.command()
}

func policyDeleteCommand(use, of, example string, find subjectFinder) *cobra.Command {
	var version string
	var force bool
	return spec{
		use: use, short: "Delete an access policy of " + of, example: example, args: cobra.ExactArgs(2),
		more: "A policy of somebody else is not deleted. Asks first; without a terminal to ask on it needs -f.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "delete policy %s of %s", args[1], args[0]); err != nil {
				return err
			}
			if err := s.checkSubject(args[0], args[1], find); err != nil {
				return err
			}
			return s.remove("policy", args[1:], args[1:], "delete", func(id string) request {
				return request{method: http.MethodDelete, path: "/" + version + "/policies/" + url.PathEscape(id)}
			})
		},
	}.command()
}

// checkSubject makes sure that a policy is that of the named subject. It reads
// the v2 form, which every policy has.
func (s *session) checkSubject(ref, policy string, find subjectFinder) error {
	sub, err := find(s, ref)
	if err != nil {
		return err
	}
	o, _, err := s.get("/v2/policies/"+url.PathEscape(policy), nil)
	if err != nil {
		return during(err, "get policy "+policy)
	}
	if o.text("subject.attributes.value") != sub.value {
		return fmt.Errorf("policy %s is not one of %s", policy, ref)
	}
	return nil
}
