package cli

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var accessGroups = &kind{
	noun: "access group", plural: "access groups", listed: "iam access-groups", path: "/v2/groups", array: "groups", id: "id",
	form: prefixed("AccessGroupId-"), account: true,
	columns: columns("Name", "name", "ID", "id", "Description", "description"),
	details: columns("Name", "name", "ID", "id", "Description", "description", "Created", "created_at", "Created by", "created_by_id"),
}

// members is one kind of member of an access group.
type members struct {
	noun, word string // in sentences, and in the command names
	wire       string // member type
	args       string
	find       subjectFinder
}

// maxMembers is how many members one call adds
// (reference/access-and-audit.md section 4.2).
const maxMembers = 50

// allGroups is what stands in a path for all of an account's groups.
const allGroups = "_allgroups"

var groupRules = &part{
	kind: kind{
		noun: "rule", plural: "rules", listed: "iam access-group-rules GROUP", path: "rules", array: "rules", id: "id", form: prefixed("ClaimRule-"),
		columns: columns("Name", "name", "ID", "id", "Realm", "realm_name", "Hours", "expiration",
			"Claims", "conditions.claim", "Operators", "conditions.operator", "Values", "conditions.value"),
		details: columns("Name", "name", "ID", "id", "Realm", "realm_name", "Hours", "expiration",
			"Claims", "conditions.claim", "Operators", "conditions.operator", "Values", "conditions.value", "Created", "created_at", "Modified", "last_modified_at"),
	},
	outer: accessGroups, word: "access-group-rule", sample: "operators", name: "on-call",
	example: "--realm-name https://login.example.com/realms/corp --expiration 12 --conditions claim:groups,operator:CONTAINS,value:on-call",
	help: "A rule makes a member of every user of an identity provider whose claims meet all its conditions, at login and for\n" +
		"the given hours. " + conditionsHelp,
}

func groupRuleFlags(f *pflag.FlagSet) body {
	var name, realm string
	var conditions []string
	var hours int
	f.StringVar(&name, "name", "", "name of the rule")
	f.StringVar(&realm, "realm-name", "", "identity provider: the `URL` of its issuer")
	f.IntVar(&hours, "expiration", 0, "`HOURS` that a membership lasts after a login, 1 to 24")
	f.StringArrayVar(&conditions, "conditions", nil, "`claim:CLAIM,operator:OPERATOR,value:VALUE`, once for each condition")
	return func() (map[string]any, error) {
		if err := lacking(f, "realm-name", "expiration", "conditions"); err != nil {
			return nil, err
		}
		parsed, err := parseConditions(conditions)
		if err != nil {
			return nil, err
		}
		b := map[string]any{"realm_name": realm, "expiration": hours, "conditions": parsed}
		if name != "" {
			b["name"] = name
		}
		return b, nil
	}
}

func accessGroupCommands() []*cobra.Command {
	var recursive bool
	group, rule := inAccount(accessGroups, "iam", "access-group", "operators"), groupRules.place()
	cmds := []*cobra.Command{
		accessGroupsCommand(),
		group.get(),
		accessGroupCreateCommand(),
		group.update(change{method: http.MethodPatch, options: renaming, example: `--description "On call"`}),
		deleteCommand(accessGroups, "access-group-delete (NAME|ID)...", "delete", "tabard iam access-group-delete operators -f -r",
			func(f *pflag.FlagSet) {
				f.BoolVarP(&recursive, "recursive", "r", false, "even if it has members or rules")
			},
			func() []string {
				if recursive {
					return []string{"force", "true"}
				}
				return nil
			}),
		groupRules.create(groupRuleFlags), groupRules.list(), rule.get(), groupRules.update(groupRuleFlags),
		rule.delete("Those whom it made members are none any more."),
	}
	for _, m := range []members{
		{"trusted profile", "access-group-trusted-profile", "profile", "(NAME|ID)", profileSubject},
		{"service ID", "access-group-service-id", "service", "(NAME|ID)", serviceIDSubject},
		{"user", "access-group-user", "user", "(EMAIL|IAM_ID)", userSubject},
	} {
		cmds = append(cmds, m.list(), m.add(), m.remove(), m.purge())
	}
	return cmds
}

func accessGroupsCommand() *cobra.Command {
	var user, service, profile string
	c := spec{
		use: "access-groups", short: "List the account's access groups", example: "tabard iam access-groups -p my-trusted-profile",
		more: "With a flag only those that the identity is a member of.",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&user, "user", "u", "", "user: IAM ID")
			f.StringVarP(&service, "service-id", "s", "", "service ID: name or ID")
			f.StringVarP(&profile, "profile", "p", "", "trusted profile: name or ID")
			idFlag(f)
		},
	}.listing(accessGroups.plural, accessGroups.id, accessGroups.columns, func(s *session, _ []string) ([]object, error) {
		var who subject
		var err error
		switch {
		case user != "":
			who, err = userSubject(s, user)
		case service != "":
			who, err = serviceIDSubject(s, service)
		case profile != "":
			who, err = profileSubject(s, profile)
		}
		if err != nil {
			return nil, err
		}
		return accessGroups.list(s, "iam_id", who.value, "limit", "100")
	})
	c.MarkFlagsMutuallyExclusive("user", "service-id", "profile")
	return c
}

func accessGroupCreateCommand() *cobra.Command {
	var description string
	return spec{
		use: "access-group-create NAME", short: "Create an access group", example: "tabard iam access-group-create operators",
		more: "Policies of the group hold for all its members.", args: cobra.ExactArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&description, "description", "d", "", "description")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating access group %s", args[0])
			o, err := s.send(request{
				method: http.MethodPost, path: accessGroups.path, query: query("account_id", s.AccountID),
				body: filled("name", args[0], "description", description),
			})
			if err != nil {
				return err
			}
			return s.made(accessGroups, o, "The access group %s was created.", args[0])
		},
	}.command()
}

func (m members) list() *cobra.Command {
	return spec{
		use: m.word + "s (GROUP_NAME|GROUP_ID)", short: "List the " + m.noun + "s in an access group",
		example: "tabard iam " + m.word + "s operators", args: cobra.ExactArgs(1),
	}.listing(m.noun+"s", "iam_id", columns("Name", "name", "IAM ID", "iam_id", "Membership", "membership_type", "Added", "created_at"),
		func(s *session, args []string) ([]object, error) {
			id, err := accessGroups.find(s, args[0])
			if err != nil {
				return nil, err
			}
			return s.client.list(s.ctx(), accessGroups.at(id, "members"), query("type", m.wire, "verbose", "true", "limit", "100"), "members", 0)
		})
}

func (m members) add() *cobra.Command {
	var iamIDs []string
	return spec{
		use: m.word + "-add (GROUP_NAME|GROUP_ID) " + m.args + "...", short: "Add " + m.noun + "s to an access group",
		more: "From then on the group's policies hold for them too.", example: "tabard iam " + m.word + "-add operators " + m.sample(),
		args: cobra.MinimumNArgs(1),
		flags: func(f *pflag.FlagSet) {
			if m.wire == "user" {
				f.StringSliceVar(&iamIDs, "iam-ids", nil, "IAM IDs, comma-separated")
			}
		},
		run: func(s *session, args []string) error {
			refs := append(slices.Clone(args[1:]), iamIDs...)
			if len(refs) == 0 {
				return Usage("name at least one %s", m.noun)
			}
			s.announce("Adding %s to access group %s", strings.Join(refs, ", "), args[0])
			group, err := accessGroups.find(s, args[0])
			if err != nil {
				return err
			}
			add := make([]map[string]string, len(refs))
			for i, ref := range refs {
				who, err := m.find(s, ref)
				if err != nil {
					return err
				}
				add[i] = map[string]string{"iam_id": who.value, "type": m.wire}
			}
			results := []object{}
			for chunk := range slices.Chunk(add, maxMembers) {
				o, err := s.send(request{method: http.MethodPut, path: accessGroups.at(group, "members"), body: map[string]any{"members": chunk}})
				if err != nil {
					return err
				}
				results = append(results, o.objects("members")...)
			}
			if err := memberFailures(results); err != nil {
				return err
			}
			if s.json {
				return s.printJSON(results)
			}
			s.ok("Added to access group %s.", args[0])
			return nil
		},
	}.command()
}

func (m members) sample() string {
	if m.wire == "user" {
		return "IBMid-5500000001"
	}
	return "my-" + strings.ReplaceAll(strings.ToLower(m.noun), " ", "-")
}

// member names what an entry of such an answer is about.
func (o object) member() string {
	if id := o.text("iam_id"); id != "" {
		return "member " + id
	}
	return "access group " + o.text("access_group_id")
}

// memberFailures reads the answer of a call that can succeed for some members
// and fail for others.
func memberFailures(results []object) error {
	var failed []error
	for _, r := range results {
		if code := r.text("status_code"); !strings.HasPrefix(code, "2") {
			failed = append(failed, fmt.Errorf("%s was refused with status %s: %s", r.member(), code, r.text("errors.message")))
		}
	}
	return errors.Join(failed...)
}

func (m members) remove() *cobra.Command {
	// The command for trusted profiles asks, the others never did.
	var force bool
	asks, more := m.wire == "profile", "The group's policies do not hold for it any more."
	if asks {
		more += " Asks first; without a terminal to ask on it needs -f."
	}
	return spec{
		use: m.word + "-remove (GROUP_NAME|GROUP_ID) " + m.args, short: "Remove a " + m.noun + " from an access group",
		more: more, example: "tabard iam " + m.word + "-remove operators " + m.sample() + " -f",
		args: cobra.ExactArgs(2), flags: func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force || !asks, "remove %s %s from access group %s", m.noun, args[1], args[0]); err != nil {
				return err
			}
			group, err := accessGroups.find(s, args[0])
			if err != nil {
				return err
			}
			who, err := m.find(s, args[1])
			if err != nil {
				return err
			}
			return s.remove(m.noun, args[1:], []string{who.value}, "remove", func(id string) request {
				return request{method: http.MethodDelete, path: accessGroups.at(group, "members") + "/" + url.PathEscape(id)}
			})
		},
	}.command()
}

// purge removes one identity from every group that somebody has put it into.
func (m members) purge() *cobra.Command {
	var force bool
	return spec{
		use: m.word + "-purge " + m.args, short: "Remove " + an(m.noun) + " from all access groups", args: cobra.ExactArgs(1),
		example: "tabard iam " + m.word + "-purge " + m.sample() + " -f",
		more:    "What rules of the groups have made it a member of stays. Asks first; without a terminal to ask on it needs -f.",
		flags:   func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "remove %s %s from all access groups", m.noun, args[0]); err != nil {
				return err
			}
			who, err := m.find(s, args[0])
			if err != nil {
				return err
			}
			s.announce("Removing %s %s from all access groups", m.noun, args[0])
			o, err := s.send(request{
				method: http.MethodDelete, path: accessGroups.at(allGroups, "members", who.value), query: query("account_id", s.AccountID),
			})
			if err != nil {
				return err
			}
			results := o.objects("groups")
			if err := memberFailures(results); err != nil {
				return err
			}
			if s.json {
				return s.printJSON(results)
			}
			s.ok("The %s %s was removed from %d access groups.", m.noun, args[0], len(results))
			return nil
		},
	}.command()
}
