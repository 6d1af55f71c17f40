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

func accessGroupCommands() []*cobra.Command {
	var recursive bool
	cmds := []*cobra.Command{
		accessGroupsCommand(),
		getCommand(accessGroups, "access-group (NAME|ID)", "tabard iam access-group operators"),
		accessGroupCreateCommand(),
		updateIdentityCommand(accessGroups, "access-group-update (NAME|ID)", "tabard iam access-group-update operators --description \"On call\""),
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
		policyCreateCommand("access-group-policy-create (NAME|ID)", "an access group", "tabard iam access-group-policy-create operators --roles Operator --service-name is", groupSubject),
		policiesCommand("access-group-policies (NAME|ID)", "an access group", "tabard iam access-group-policies operators", groupSubject),
	}
	for _, m := range []members{
		{"trusted profile", "access-group-trusted-profile", "profile", "(NAME|ID)", profileSubject},
		{"service ID", "access-group-service-id", "service", "(NAME|ID)", serviceIDSubject},
		{"user", "access-group-user", "user", "(EMAIL|IAM_ID)", userSubject},
	} {
		cmds = append(cmds, m.list(), m.add(), m.remove())
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

// memberFailures reads the answer of a call that can succeed for some members
// and fail for others.
func memberFailures(results []object) error {
	var failed []error
	for _, r := range results {
		if code := r.text("status_code"); !strings.HasPrefix(code, "2") {
			failed = append(failed, fmt.Errorf("member %s was refused with status %s: %s", r.text("iam_id"), code, r.text("errors.message")))
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
