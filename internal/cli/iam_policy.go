package cli

import (
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

// userSubject takes an IAM ID, an address, or the name of who is logged in. A
// user with an IAM ID need not be in the account yet.
func userSubject(s *session, ref string) (subject, error) {
	switch {
	case ref != "" && (ref == s.User || ref == s.Email):
		return subject{"iam_id", s.IAMID}, nil
	case strings.Contains(ref, "@"):
		id, err := s.user(ref)
		return subject{"iam_id", id}, err
	case strings.Contains(ref, "-") && !strings.Contains(ref, " "):
		return subject{"iam_id", ref}, nil
	}
	return subject{}, fmt.Errorf("user %q is neither an address nor an IAM ID, such as IBMid-5500000001", ref)
}

// owner is a kind of identity that access policies are for.
type owner struct {
	word         string // that the names of the commands begin with
	noun         string
	args, sample string
	find         subjectFinder
}

var owners = []owner{
	{"trusted-profile", "trusted profile", "(NAME|ID)", "my-trusted-profile", profileSubject},
	{"service", "service ID", "(NAME|ID)", "my-service", serviceIDSubject},
	{"user", "user", "(EMAIL|IAM_ID)", "ada@example.com", userSubject},
	{"access-group", "access group", "(NAME|ID)", "operators", groupSubject},
}

// policyCommands are those about the policies of each kind of identity, and
// those about policies whosever they are.
func policyCommands() []*cobra.Command {
	var cmds []*cobra.Command
	for _, o := range owners {
		cmds = append(cmds, o.policies(), o.policy(), o.policyCreate(), o.policyUpdate(), o.policyDelete())
	}
	return append(cmds, anyPolicyCommands()...)
}

// policy is what an owner's policy with an id is called in examples.
const samplePolicy = "51b9717e-76b0-4f6a-bda7-b8132431f926"

// policyOptions are the flags of a policy.
type policyOptions struct {
	file, service, instance, region        string
	resourceType, resource, group, groupID string
	roles, tags, attributes                []string
	accountManagement                      bool
	version                                string
	set                                    *pflag.FlagSet
}

// policyFlags are those that describe a policy, and exclude --file.
var policyFlags = []string{
	"roles", "service-name", "service-instance", "region", "resource-type", "resource", "resource-group-name", "resource-group-id",
	"tags", "account-management", "attributes",
}

func (o *policyOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.file, "file", "", "whole policy as a JSON `FILE`, instead of the other flags")
	f.StringSliceVarP(&o.roles, "roles", "r", nil, "names of the roles, comma-separated")
	f.StringVar(&o.service, "service-name", "", "service; without one the policy is on all services")
	f.StringVar(&o.instance, "service-instance", "", "`GUID` of a service instance")
	f.StringVar(&o.region, "region", "", "region")
	f.StringVar(&o.resourceType, "resource-type", "", "resource type")
	f.StringVar(&o.resource, "resource", "", "resource")
	f.StringVar(&o.group, "resource-group-name", "", "resource group, by name; * means all")
	f.StringVar(&o.groupID, "resource-group-id", "", "resource group, by ID; * means all")
	f.StringSliceVar(&o.tags, "tags", nil, "access tags as name:value, comma-separated")
	f.BoolVar(&o.accountManagement, "account-management", false, "on all account management services")
	f.StringSliceVar(&o.attributes, "attributes", nil, "resource attributes as name=value, comma-separated")
	neverAsks(f)
	idFlag(f)
	versionFlag(f, &o.version)
	o.set = f
}

// exclusive says which of the flags contradict each other.
func (o *policyOptions) exclusive(c *cobra.Command) *cobra.Command {
	for _, name := range policyFlags {
		c.MarkFlagsMutuallyExclusive("file", name)
	}
	c.MarkFlagsMutuallyExclusive("resource-group-name", "resource-group-id")
	c.MarkFlagsMutuallyExclusive("account-management", "service-name")
	return c
}

func versionFlag(f *pflag.FlagSet, p *string) {
	choice(f, p, "api-version", "v1", "form of the policy", "v1", "v2")
}

// policyHelp is what the help of the commands that write policies has in common.
const policyHelp = "Roles are given by the names that tabard iam roles --service NAME lists. In values * stands for any text and ?\n" +
	"for any character. A whole policy, with time-based conditions for one, is given with --file in either form of the API."

func (w owner) policyCreate() *cobra.Command {
	var o policyOptions
	return o.exclusive(spec{
		use: w.word + "-policy-create " + w.args, short: "Create an access policy of " + an(w.noun), args: cobra.ExactArgs(1), flags: o.add,
		example: "tabard iam " + w.word + "-policy-create " + w.sample + " --roles Operator --service-name is",
		more: "A policy without a service is on all services; with --account-management, on all account management services.\n" +
			policyHelp,
		run: func(s *session, args []string) error {
			if (o.file == "") == (len(o.roles) == 0) {
				return Usage("give --roles, or the whole policy with --file")
			}
			s.announce("Creating policy of %s %s", w.noun, args[0])
			sub, err := w.find(s, args[0])
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
			return s.show(created, "id", policyDetails)
		},
	}.command())
}

func (w owner) policyUpdate() *cobra.Command {
	var o policyOptions
	return o.exclusive(spec{
		use: w.word + "-policy-update " + w.args + " POLICY_ID", short: "Change an access policy of " + an(w.noun), args: cobra.ExactArgs(2), flags: o.add,
		example: "tabard iam " + w.word + "-policy-update " + w.sample + " " + samplePolicy + " --roles Viewer,Operator",
		more: "The roles that are given take the place of all those before, and so do the tags; flags about resources describe\n" +
			"all of what it is about. Without --api-version it stays in the form that it was written in.\n" + policyHelp,
		run: func(s *session, args []string) error {
			if !slices.ContainsFunc(append([]string{"file"}, policyFlags...), o.set.Changed) {
				return Usage("nothing to change: give --roles, --service-name or another flag about the policy, or a whole one with --file")
			}
			s.announce("Updating policy %s of %s %s", args[1], w.noun, args[0])
			sub, seen, err := s.policyOf(w, args)
			if err != nil {
				return err
			}
			updated, err := o.replace(s, sub, seen)
			if err != nil {
				return err
			}
			s.ok("The policy %s was updated.", args[1])
			return s.show(updated, "id", policyDetails)
		},
	}.command())
}

// replace writes the next state of a policy, which it reads in the form that it
// will be written in.
func (o *policyOptions) replace(s *session, sub subject, seen object) (object, error) {
	var body map[string]any
	var err error
	if o.file != "" {
		if body, err = o.fromFile(s, sub); err != nil {
			return object{}, err
		}
	}
	if o.file == "" && !o.set.Changed("api-version") {
		o.version = versionOf(seen)
	}
	path := policyPath(o.version, seen.text("id"))
	old, header, err := s.get(path, nil)
	if err != nil {
		return object{}, err
	}
	if body == nil {
		if body, err = o.changed(s, old); err != nil {
			return object{}, err
		}
	}
	return s.send(request{method: http.MethodPut, path: path, body: body, header: map[string]string{"If-Match": entityTag(old, header)}})
}

// versionOf returns the form that a policy was written in: it is in its address
// (reference/access-and-audit.md section 1.8).
func versionOf(policy object) string {
	if strings.Contains(policy.text("href"), "/v2/policies/") {
		return "v2"
	}
	return "v1"
}

// changed returns a policy with what the flags say in place of what was there.
func (o *policyOptions) changed(s *session, old object) (map[string]any, error) {
	policy := only(old.fields, "type", "description", "subject", "subjects", "roles", "control", "resource", "resources", "rule", "pattern")
	resource := map[string]any{}
	if first, ok := at(old.fields, []string{"resources"}).([]any); ok && len(first) == 1 {
		resource, _ = first[0].(map[string]any)
	} else if one, ok := at(old.fields, []string{"resource"}).(map[string]any); ok {
		resource = one
	}
	resource = only(resource, "attributes", "tags")

	attributes := attributesIn(resource["attributes"])
	if o.aboutResources() {
		var err error
		if attributes, err = o.wholeResource(s); err != nil {
			return nil, err
		}
		resource["attributes"] = o.write(attributes)
	}
	if o.set.Changed("tags") {
		tags, err := pairs(o.tags, ":")
		if err != nil {
			return nil, err
		}
		resource["tags"] = o.write(tags)
	}
	roles := roleIDsIn(old)
	if len(o.roles) > 0 {
		var err error
		if roles, err = o.roleIDs(s, attributes); err != nil {
			return nil, err
		}
	}
	o.assemble(policy, resource, roles)
	return policy, nil
}

func roleIDsIn(policy object) []string {
	return splitList(policy.text("roles.role_id|control.grant.roles.role_id"))
}

// aboutResources reports whether flags say what a policy is about.
func (o *policyOptions) aboutResources() bool {
	return slices.ContainsFunc(policyFlags, func(name string) bool { return name != "roles" && name != "tags" && o.set.Changed(name) })
}

// body builds the policy in the asked form.
func (o *policyOptions) body(s *session, sub subject) (map[string]any, error) {
	if o.file != "" {
		return o.fromFile(s, sub)
	}
	attributes, err := o.wholeResource(s)
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
	resource := map[string]any{"attributes": o.write(attributes)}
	if len(tags) > 0 {
		resource["tags"] = o.write(tags)
	}
	policy := map[string]any{"type": "access"}
	o.assemble(policy, resource, roles)
	o.setSubject(policy, sub)
	return policy, nil
}

// write writes attributes in the asked form.
func (o *policyOptions) write(attributes [][2]string) any {
	if o.version == "v2" {
		return attributesV2(attributes)
	}
	return attributesV1(attributes)
}

// assemble puts a resource and roles into a policy.
func (o *policyOptions) assemble(policy, resource map[string]any, roles []string) {
	ids := make([]map[string]string, len(roles))
	for i, r := range roles {
		ids[i] = map[string]string{"role_id": r}
	}
	if o.version == "v2" {
		policy["resource"], policy["control"] = resource, map[string]any{"grant": map[string]any{"roles": ids}}
		return
	}
	policy["resources"], policy["roles"] = []any{resource}, ids
}

func (o *policyOptions) setSubject(policy map[string]any, sub subject) {
	if o.version == "v2" {
		policy["subject"] = map[string]any{"attributes": []any{map[string]string{"key": sub.key, "operator": "stringEquals", "value": sub.value}}}
		return
	}
	policy["subjects"] = []any{map[string]any{"attributes": []any{map[string]string{"name": sub.key, "value": sub.value}}}}
}

// fromFile takes the policy from a file. Whose it is, the command says; which
// form it has, the file shows, unless --api-version says.
func (o *policyOptions) fromFile(s *session, sub subject) (map[string]any, error) {
	policy, err := bodyFile(s, "the policy", o.file)
	if err != nil {
		return nil, err
	}
	if !o.set.Changed("api-version") && (has(policy, "control") || has(policy, "resource") || has(policy, "rule")) {
		o.version = "v2"
	}
	if policy["type"] == nil {
		policy["type"] = "access"
	}
	delete(policy, "subject")
	delete(policy, "subjects")
	o.setSubject(policy, sub)
	return policy, nil
}

// wholeResource are the attributes of what a policy is about; those that say
// nothing are about all services (reference/access-and-audit.md section 1.12).
func (o *policyOptions) wholeResource(s *session) ([][2]string, error) {
	attributes, err := o.resourceAttributes(s)
	if err != nil {
		return nil, err
	}
	if len(attributes) == 0 {
		attributes = append(attributes, [2]string{"serviceType", "service"})
	}
	return append(attributes, [2]string{"accountId", s.AccountID}), nil
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
	if o.group == "*" {
		group = "*"
	} else if o.group != "" {
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
	case value("serviceType") == "service", value("serviceType") == "" && value("resourceGroupId") == "":
		q.Set("service_name", "alliamserviceroles")
	}
	roles, err := s.roles(q)
	if err != nil {
		return nil, err
	}
	named, err := rolesNamed(roles, o.roles)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(named))
	for i, r := range named {
		ids[i] = r.text("crn")
	}
	return ids, nil
}

// noRole says that there is no role with a name, and which there are.
func noRole(roles []object, name string) error {
	var names []string
	for _, r := range roles {
		names = append(names, r.text("display_name"))
	}
	return fmt.Errorf("there is no role %q here; the roles are: %s", name, strings.Join(names, ", "))
}

// attributesIn reads attributes in either form.
func attributesIn(v any) [][2]string {
	list, _ := v.([]any)
	var out [][2]string
	for _, e := range list {
		a, _ := e.(map[string]any)
		key := words(a["name"])
		if key == "" {
			key = words(a["key"])
		}
		out = append(out, [2]string{key, words(a["value"])})
	}
	return out
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

var policyDetails = append(slices.Clone(policyColumns),
	columns("Tags", "resources.tags.value|resource.tags.value", "Conditions", "pattern", "Description", "description", "Modified", "last_modified_at")...)

// policyResources says in words what a policy is about. That it is about the
// account goes without saying.
func policyResources(o object) string {
	resource := at(o.fields, []string{"resource", "attributes"})
	if first, ok := at(o.fields, []string{"resources", "attributes"}).([]any); ok && len(first) > 0 {
		resource = first[0]
	}
	return attributesInWords(resource, "accountId")
}

// attributesInWords returns attributes without the named ones.
func attributesInWords(v any, without ...string) string {
	var out []string
	for _, a := range attributesIn(v) {
		if !slices.Contains(without, a[0]) {
			out = append(out, a[0]+"="+a[1])
		}
	}
	return strings.Join(out, ", ")
}

func (w owner) policies() *cobra.Command {
	var version string
	return spec{
		use: w.word + "-policies " + w.args, short: "List the access policies of " + an(w.noun), args: cobra.ExactArgs(1),
		example: "tabard iam " + w.word + "-policies " + w.sample,
		more:    "The v1 form shows a policy that only the v2 form can express as a placeholder.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			neverAsks(f)
			idFlag(f)
		},
	}.listing("policies", "id", policyColumns, func(s *session, args []string) ([]object, error) {
		sub, err := w.find(s, args[0])
		if err != nil {
			return nil, err
		}
		return s.policies(version, sub.key, sub.value)
	})
}

// policies returns the account's policies that query pairs select, in the asked
// form.
func (s *session) policies(version string, pairs ...string) ([]object, error) {
	q := query(append(pairs, "account_id", s.AccountID)...)
	if version == "v2" && !s.json {
		q.Set("format", "display") // with the names of the roles
	}
	items, err := s.client.list(s.ctx(), "/"+version+"/policies", q, "policies", 0)
	return items, during(err, "list policies")
}

func (w owner) policy() *cobra.Command {
	var version string
	return spec{
		use: w.word + "-policy " + w.args + " POLICY_ID", short: "Show one access policy of " + an(w.noun), args: cobra.ExactArgs(2),
		example: "tabard iam " + w.word + "-policy " + w.sample + " " + samplePolicy,
		more:    "A policy of somebody else is not shown.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			neverAsks(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Getting policy %s of %s", args[1], args[0])
			if _, _, err := s.policyOf(w, args); err != nil {
				return err
			}
			return s.showPolicy(version, args[1], policyDetails)
		},
	}.command()
}

// showPolicy gets and shows a policy, whosever it is.
func (s *session) showPolicy(version, id string, cols []column) error {
	q := url.Values{}
	if version == "v2" && !s.json {
		q.Set("format", "display")
	}
	o, _, err := s.get(policyPath(version, id), q)
	if err != nil {
		return err
	}
	s.ok("")
	return s.show(o, "id", cols)
}

func policyPath(version, id string) string { return "/" + version + "/policies/" + url.PathEscape(id) }

func (w owner) policyDelete() *cobra.Command {
	var version string
	var force bool
	return spec{
		use: w.word + "-policy-delete " + w.args + " POLICY_ID", short: "Delete an access policy of " + an(w.noun), args: cobra.ExactArgs(2),
		example: "tabard iam " + w.word + "-policy-delete " + w.sample + " " + samplePolicy + " -f",
		more: "A policy of somebody else is not deleted. A deleted one can be restored for a while, with tabard iam\n" +
			"policy-restore. Asks first; without a terminal to ask on it needs -f.",
		flags: func(f *pflag.FlagSet) {
			versionFlag(f, &version)
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "delete policy %s of %s", args[1], args[0]); err != nil {
				return err
			}
			if _, _, err := s.policyOf(w, args); err != nil {
				return err
			}
			return s.removePolicies(version, "policy", args[1:])
		},
	}.command()
}

func (s *session) removePolicies(version, noun string, ids []string) error {
	return s.remove(noun, ids, ids, "delete", func(id string) request {
		return request{method: http.MethodDelete, path: policyPath(version, id)}
	})
}

// policyOf returns the subject and the policy that the two arguments of a
// command name, and makes sure that the one has the other. It reads the v2 form,
// which every policy has.
func (s *session) policyOf(w owner, args []string) (subject, object, error) {
	sub, err := w.find(s, args[0])
	if err != nil {
		return sub, object{}, err
	}
	o, _, err := s.get(policyPath("v2", args[1]), nil)
	if err != nil {
		return sub, o, during(err, "get policy "+args[1])
	}
	if o.text("subject.attributes.value") != sub.value {
		return sub, o, fmt.Errorf("policy %s is not one of %s", args[1], args[0])
	}
	return sub, o, nil
}
