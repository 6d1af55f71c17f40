package cli

import (
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// The types of compute resource that links and rules can be about. A workload
// issuer's workloads are not all one's own, so that only rules can name them.
var (
	crTypes   = append(slices.Clone(linkTypes), "OIDC")
	linkTypes = []string{"VSI", "IKS_SA", "ROKS_SA", "PVS", "BMS", "CE"}
)

func profileCommands() []*cobra.Command {
	profile := inAccount(profiles, "iam", "trusted-profile", "my-trusted-profile")
	email := text(field{"email", "e", "email", "email address"})
	link, rule := links.place(), rules.place()
	return []*cobra.Command{
		listCommand(profiles, "trusted-profiles", "tabard iam trusted-profiles --output json", identityFilters...),
		profile.get(),
		createCommand(profiles, "trusted-profile-create NAME", `tabard iam trusted-profile-create my-trusted-profile --description "My trusted profile"`, "",
			slices.Concat(description, email), false),
		profile.update(change{options: slices.Concat(renaming, email), example: `--description ""`}),
		deleteCommand(profiles, "trusted-profile-delete (NAME|ID)...", "delete", "tabard iam trusted-profile-delete my-trusted-profile -f", nil, nil),
		links.create(linkFlags), links.list(), link.get(), link.delete(endsTokens),
		rules.create(ruleFlags), rules.list(), rule.get(), rules.update(ruleFlags), rule.delete(endsTokens),
		identityCreateCommand(), identitiesCommand(), identityCommand(), identityDeleteCommand(),
	}
}

const endsTokens = "New tokens on the strength of it stop at once."

// part is a kind of object inside another one: the links and claim rules of a
// trusted profile, the rules of an access group.
type part struct {
	kind
	outer        *kind
	word         string // of the command names
	sample, name string // of the outer one and of its own, in examples
	example      string // flags of one that is created
	help         string
}

var links = &part{
	kind: kind{
		noun: "link", plural: "links", listed: "iam trusted-profile-links PROFILE", path: "links", array: "links", id: "id", form: prefixed("Link-"),
		columns: columns("Name", "name", "ID", "id", "Type", "cr_type", "CRN", "link.crn", "Namespace", "link.namespace", "Service account", "link.name"),
		details: columns("Name", "name", "ID", "id", "Type", "cr_type", "CRN", "link.crn", "Namespace", "link.namespace", "Service account", "link.name", "Created", "created_at"),
	},
	outer: profiles, word: "trusted-profile-link", sample: "my-trusted-profile", name: "my-link",
	example: "--cr-type IKS_SA --link-crn CLUSTER_CRN --link-namespace default --link-name my-app",
	help: "A link lets one named compute resource put on the profile: a virtual server by its CRN, a pod by its cluster's\n" +
		"CRN, its namespace and its service account.",
}

const conditionsHelp = "--conditions is claim:CLAIM,operator:OPERATOR,value:VALUE, once for each condition. Operators: EQUALS,\n" +
	"NOT_EQUALS, EQUALS_IGNORE_CASE, NOT_EQUALS_IGNORE_CASE, CONTAINS, IN; for IN the value is a JSON array."

var rules = &part{
	kind: kind{
		noun: "claim rule", plural: "claim rules", listed: "iam trusted-profile-rules PROFILE", path: "rules", array: "rules", id: "id", form: prefixed("ClaimRule-"),
		columns: columns("Name", "name", "ID", "id", "Type", "type", "Compute type", "cr_type", "Claims", "conditions.claim", "Operators", "conditions.operator", "Values", "conditions.value"),
		details: columns("Name", "name", "ID", "id", "Type", "type", "Compute type", "cr_type", "Realm", "realm_name",
			"Claims", "conditions.claim", "Operators", "conditions.operator", "Values", "conditions.value", "Created", "created_at"),
	},
	outer: profiles, word: "trusted-profile-rule", sample: "my-trusted-profile", name: "my-rule",
	example: "--type Profile-CR --cr-type IKS_SA --conditions claim:namespace,operator:EQUALS,value:default",
	help: "A claim rule lets every compute resource put on the profile whose proved claims meet all its conditions.\n" + conditionsHelp +
		"\nA rule of type OIDC is about the workloads of a registered issuer, such as the jobs of a CI service; it must compare\n" +
		"issuer, and claims that say whose the workload is: see tabard iam workload-presets.",
}

// args names the arguments of a command about one.
func (p *part) args() string {
	return "(NAME|ID) (" + strings.ToUpper(strings.TrimSuffix(p.array, "s")) + "_NAME|ID)"
}

func (p *part) place() place {
	return place{
		kind: &p.kind, family: "iam", word: p.word, args: p.args(), sample: p.sample + " " + p.name, nth: 1, outer: p.outer,
		within: func(s *session, args []string) (*kind, []string, error) {
			k, err := p.of(s, args[0])
			return k, nil, err
		},
	}
}

// of returns the part's kind inside one object.
func (p *part) of(s *session, outer string) (*kind, error) {
	id, err := p.outer.find(s, outer)
	if err != nil {
		return nil, err
	}
	k := p.kind
	k.path = p.outer.at(id, p.path)
	return &k, nil
}

// body is what a command's flags say of an object.
type body func() (map[string]any, error)

func (p *part) create(flags func(*pflag.FlagSet) body) *cobra.Command {
	var fields body
	return spec{
		use: p.word + "-create (NAME|ID)", short: "Create " + p.place().a(), args: cobra.ExactArgs(1), more: p.help,
		example: "tabard iam " + p.word + "-create " + p.sample + " --name " + p.name + " " + p.example,
		flags: func(f *pflag.FlagSet) {
			fields = flags(f)
			neverAsks(f)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			b, err := fields()
			if err != nil {
				return err
			}
			s.announce("Creating %s of %s %s", p.noun, p.outer.noun, args[0])
			k, err := p.of(s, args[0])
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: k.path, body: b})
			if err != nil {
				return err
			}
			s.warnUseless(b)
			return s.made(k, o, "The %s %s was created.", p.noun, o.text("name|id"))
		},
	}.command()
}

func (p *part) update(flags func(*pflag.FlagSet) body) *cobra.Command {
	var fields body
	at := p.place()
	return spec{
		use: p.word + "-update " + p.args(), short: "Replace " + at.a(), args: cobra.ExactArgs(2),
		more:    "The flags describe the whole " + p.noun + ", as they do when it is created.",
		example: at.example("-update", p.example),
		flags: func(f *pflag.FlagSet) {
			fields = flags(f)
			neverAsks(f)
		},
		run: func(s *session, args []string) error {
			b, err := fields()
			if err != nil {
				return err
			}
			s.announce("Updating %s %s of %s %s", p.noun, args[1], p.outer.noun, args[0])
			k, old, header, err := at.load(s, args)
			if err != nil {
				return err
			}
			if b["name"] == nil {
				b["name"] = old.text("name")
			}
			o, err := s.send(request{method: http.MethodPut, path: k.at(old.text("id")), body: b, header: map[string]string{"If-Match": entityTag(old, header)}})
			if err != nil {
				return err
			}
			s.warnUseless(b)
			return s.made(k, o, "The %s %s was updated.", p.noun, args[1])
		},
	}.command()
}

func (p *part) list() *cobra.Command {
	return spec{
		use: p.word + "s (NAME|ID)", short: "List the " + p.plural + " of " + an(p.outer.noun), example: "tabard iam " + p.word + "s " + p.sample,
		args: cobra.ExactArgs(1), flags: func(f *pflag.FlagSet) {
			idFlag(f)
			neverAsks(f)
		},
	}.listing(p.plural, p.id, p.columns, func(s *session, args []string) ([]object, error) {
		k, err := p.of(s, args[0])
		if err != nil {
			return nil, err
		}
		return k.list(s)
	})
}

func linkFlags(f *pflag.FlagSet) body {
	var name, crType, crn, namespace, account, componentType, componentName string
	var crossAccount bool
	f.StringVar(&name, "name", "", "name of the link")
	choice(f, &crType, "cr-type", "", "type of the compute resource", linkTypes...)
	f.StringVar(&crn, "link-crn", "", "`CRN` of the instance or cluster")
	f.StringVar(&namespace, "link-namespace", "", "namespace, for IKS_SA and ROKS_SA")
	f.StringVar(&account, "link-name", "", "service account, for IKS_SA and ROKS_SA")
	f.StringVar(&componentType, "link-component-type", "", "component type, for CE")
	f.StringVar(&componentName, "link-component-name", "", "component name, for CE")
	f.BoolVar(&crossAccount, "cross-account", false, "the compute resource is in another account")
	return func() (map[string]any, error) {
		switch {
		case crType == "" || crn == "":
			return nil, Usage("--cr-type and --link-crn are required")
		case strings.HasSuffix(crType, "_SA") && (namespace == "" || account == ""):
			return nil, Usage("--cr-type %s needs --link-namespace and --link-name, the service account", crType)
		}
		b := map[string]any{"cr_type": crType, "link": filled(
			"crn", crn, "namespace", namespace, "name", account, "component_type", componentType, "component_name", componentName)}
		if name != "" {
			b["name"] = name
		}
		if crossAccount {
			b["is_cross_account"] = true
		}
		return b, nil
	}
}

// warnUseless warns of a rule or link that the server accepted but that nothing
// can ever meet.
func (s *session) warnUseless(b map[string]any) {
	crType, _ := b["cr_type"].(string)
	if conditions, ok := b["conditions"].([]map[string]string); ok {
		s.warnOfConditions(crType, conditions)
	}
	link, ok := b["link"].(map[string]string)
	if !ok || !strings.HasSuffix(crType, "_SA") {
		return
	}
	known, err := clusters.list(s)
	if err != nil {
		return // who may not see the clusters may still link to one
	}
	i := slices.IndexFunc(known, func(o object) bool { return o.text("crn") == link["crn"] })
	switch {
	case i < 0:
		s.warn("no registered cluster has the CRN %q; until one does, the link will never match (tabard ks clusters lists them)", link["crn"])
	case known[i].text("type") != "" && known[i].text("type") != crType:
		s.warn("cluster %s is of type %s, not %s; the link will never match", known[i].text("name"), known[i].text("type"), crType)
	}
}

func (s *session) warnOfConditions(crType string, conditions []map[string]string) {
	known := trust.ClaimsOf(identity.CRType(crType))
	for _, c := range conditions {
		switch {
		case known == nil: // of OIDC, the issuer's mapping decides, and the server has checked it
		case !slices.Contains(known, c["claim"]):
			s.warn("claim %q is not one of %s; it will never match", c["claim"], strings.Join(known, ", "))
		case c["claim"] == "cluster_group":
			s.warnOfGroups(c)
		}
	}
}

// warnOfGroups warns of a condition that asks for a cluster group that is not
// there.
func (s *session) warnOfGroups(condition map[string]string) {
	equal := func(a, b string) bool { return a == b }
	switch identity.Operator(condition["operator"]) {
	case identity.Equals, identity.In, identity.Contains: // of a list, an element
	case identity.EqualsIgnoreCase:
		equal = strings.EqualFold
	default:
		return
	}
	groups, err := clusterGroups.list(s)
	if err != nil {
		return // who may not see the groups may still name one
	}
	for _, name := range trust.Values(condition["value"]) {
		if !slices.ContainsFunc(groups, func(o object) bool { return equal(o.text("name"), name) }) {
			s.warn("there is no cluster group %q; until there is one, nothing matches it (tabard ks cluster-groups lists them)", name)
		}
	}
}

// filled returns a map of the pairs whose value is not empty.
func filled(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			m[pairs[i]] = pairs[i+1]
		}
	}
	return m
}

func ruleFlags(f *pflag.FlagSet) body {
	var name, ruleType, realm, crType string
	var conditions []string
	var expiration int
	f.StringVar(&name, "name", "", "name of the rule")
	choice(f, &ruleType, "type", "", "type of the rule", "Profile-CR", "Profile-SAML")
	choice(f, &crType, "cr-type", "", "type of the compute resource, for Profile-CR", crTypes...)
	f.StringVar(&realm, "realm-name", "", "realm of the identity provider, for Profile-SAML")
	f.StringArrayVar(&conditions, "conditions", nil, "`claim:CLAIM,operator:OPERATOR,value:VALUE`, once for each condition")
	f.IntVar(&expiration, "expiration", 0, "length of a session in `SECONDS`, for Profile-SAML")
	return func() (map[string]any, error) {
		switch {
		case ruleType == "" || len(conditions) == 0:
			return nil, Usage("--type and --conditions are required")
		case ruleType == "Profile-CR" && crType == "":
			return nil, Usage("--type Profile-CR needs --cr-type")
		case ruleType == "Profile-CR" && (realm != "" || expiration != 0):
			return nil, Usage("--realm-name and --expiration are for Profile-SAML only")
		}
		parsed, err := parseConditions(conditions)
		if err != nil {
			return nil, err
		}
		b := map[string]any{"type": ruleType, "conditions": parsed}
		for k, v := range filled("name", name, "cr_type", crType, "realm_name", realm) {
			b[k] = v
		}
		if expiration != 0 {
			b["expiration"] = expiration
		}
		return b, nil
	}
}

func parseConditions(conditions []string) ([]map[string]string, error) {
	parsed := make([]map[string]string, len(conditions))
	for i, c := range conditions {
		p, err := parseCondition(c)
		if err != nil {
			return nil, err
		}
		parsed[i] = p
	}
	return parsed, nil
}

// parseCondition reads claim:…,operator:…,value:…. The value is the rest of the
// text and may have colons and commas of its own. On the wire it is JSON in a
// string, so text that is not JSON already becomes a JSON string
// (reference/iam-identity.md section 4.3).
func parseCondition(s string) (map[string]string, error) {
	const want = "want claim:CLAIM,operator:OPERATOR,value:VALUE"
	head, value, ok := strings.Cut(s, ",value:")
	if !ok {
		return nil, Usage("condition %q has no value, %s", s, want)
	}
	c := map[string]string{}
	for part := range strings.SplitSeq(head, ",") {
		key, v, ok := strings.Cut(part, ":")
		key = strings.TrimSpace(key)
		if !ok || key != "claim" && key != "operator" {
			return nil, Usage("condition %q is malformed, %s", s, want)
		}
		c[key] = strings.TrimSpace(v)
	}
	if c["claim"] == "" || c["operator"] == "" || value == "" {
		return nil, Usage("condition %q lacks a part, %s", s, want)
	}
	c["operator"] = strings.ToUpper(c["operator"])
	c["value"] = value
	if first := value[0]; first != '"' && first != '[' || !json.Valid([]byte(value)) {
		c["value"] = quoteJSON(value)
	}
	return c, nil
}

func quoteJSON(s string) string {
	// strconv's quoting is not JSON's; a string always encodes.
	b, err := json.Marshal(s)
	if err != nil {
		return strconv.Quote(s)
	}
	return string(b)
}

var identityColumns = columns("Type", "type", "Identifier", "identifier", "IAM ID", "iam_id", "Description", "description")

func identityType(f *pflag.FlagSet, p *string) {
	choice(f, p, "id-type", "", "type of the identity", "USER", "SERVICEID", "CRN")
}

// identityPath returns where one identity of a profile is, and its identifier.
// Service IDs may be given by name.
func identityPath(s *session, profile, idType, ref string) (path, identifier string, err error) {
	id, err := profiles.find(s, profile)
	if err != nil {
		return "", "", err
	}
	switch idType {
	case "SERVICEID":
		if ref, err = serviceIDs.find(s, ref); err != nil {
			return "", "", err
		}
	case "USER":
		sub, err := userSubject(s, ref)
		if err != nil {
			return "", "", err
		}
		ref = sub.value
	}
	return profiles.at(id, "identities", strings.ToLower(idType)), ref, nil
}

func identityCreateCommand() *cobra.Command {
	var id, idType, description string
	c := spec{
		use: "trusted-profile-identity-create (NAME|ID)", short: "Let an identity assume a trusted profile", args: cobra.ExactArgs(1),
		more:    "The identity is a user (IAM ID), a service ID (name or ID) or a service's CRN.",
		example: "tabard iam trusted-profile-identity-create my-trusted-profile --id my-service --id-type SERVICEID",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&id, "id", "", "`IDENTIFIER` of the identity")
			identityType(f, &idType)
			f.StringVarP(&description, "description", "d", "", "description")
		},
		run: func(s *session, args []string) error {
			s.announce("Creating identity %s of trusted profile %s", id, args[0])
			path, identifier, err := identityPath(s, args[0], idType, id)
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: path, body: filled(
				"identifier", identifier, "type", strings.ToLower(idType), "description", description)})
			if err != nil {
				return err
			}
			s.ok("The identity %s can assume trusted profile %s now.", id, args[0])
			return s.show(o, "identifier", identityColumns)
		},
	}.command()
	required(c, "id", "id-type")
	return c
}

// required marks flags without which a command is wrong usage.
func required(c *cobra.Command, flags ...string) {
	for _, f := range flags {
		if err := c.MarkFlagRequired(f); err != nil {
			panic(err) // the flag does not exist: every test would fail
		}
	}
}

func identitiesCommand() *cobra.Command {
	var idType string
	return spec{
		use: "trusted-profile-identities (NAME|ID)", short: "List the identities that can assume a trusted profile",
		example: "tabard iam trusted-profile-identities my-trusted-profile", args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			identityType(f, &idType)
			neverAsks(f)
			idFlag(f)
		},
	}.listing("identities", "identifier", identityColumns, func(s *session, args []string) ([]object, error) {
		id, err := profiles.find(s, args[0])
		if err != nil {
			return nil, err
		}
		items, err := s.client.list(s.ctx(), profiles.at(id, "identities"), nil, "identities", 0)
		return slices.DeleteFunc(items, func(o object) bool {
			return idType != "" && !strings.EqualFold(o.text("type"), idType)
		}), err
	})
}

func identityCommand() *cobra.Command {
	var idType string
	c := spec{
		use: "trusted-profile-identity (NAME|ID) IDENTIFIER", short: "Show one identity that can assume a trusted profile", args: cobra.ExactArgs(2),
		more:    "The identity is named as when it was created: a user, a service ID or a service's CRN.",
		example: "tabard iam trusted-profile-identity my-trusted-profile my-service --id-type SERVICEID",
		flags: func(f *pflag.FlagSet) {
			identityType(f, &idType)
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Getting identity %s of trusted profile %s", args[1], args[0])
			path, identifier, err := identityPath(s, args[0], idType, args[1])
			if err != nil {
				return err
			}
			o, _, err := s.get(path+"/"+url.PathEscape(identifier), nil)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "identifier", identityColumns)
		},
	}.command()
	required(c, "id-type")
	return c
}

func identityDeleteCommand() *cobra.Command {
	var idType string
	var force bool
	c := spec{
		use: "trusted-profile-identity-delete (NAME|ID) IDENTIFIER", short: "Stop an identity from assuming a trusted profile",
		more:    "Asks first; without a terminal to ask on it needs -f.",
		example: "tabard iam trusted-profile-identity-delete my-trusted-profile my-service --id-type SERVICEID -f", args: cobra.ExactArgs(2),
		flags: func(f *pflag.FlagSet) {
			identityType(f, &idType)
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "delete identity %s of trusted profile %s", args[1], args[0]); err != nil {
				return err
			}
			path, identifier, err := identityPath(s, args[0], idType, args[1])
			if err != nil {
				return err
			}
			return s.remove("identity", args[1:], []string{identifier}, "delete", func(id string) request {
				return request{method: http.MethodDelete, path: path + "/" + url.PathEscape(id)}
			})
		},
	}.command()
	required(c, "id-type")
	return c
}
