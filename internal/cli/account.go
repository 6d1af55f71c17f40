package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Accounts are in an envelope of metadata and entity, as their published
// clients read them.
var (
	accountColumns = columns("Account ID", "metadata.guid", "Name", "entity.name", "State", "entity.state", "Owner", "entity.owner_userid")
	accountDetails = columns("Name", "entity.name", "Account ID", "metadata.guid", "State", "entity.state",
		"Owner", "entity.owner_userid", "Owner IAM ID", "entity.owner_iam_id", "Created", "metadata.created_at", "Closed", "entity.closed_at")
	ownerDetails = columns("Name", "entity.name", "Account ID", "metadata.guid", "Owner", "entity.owner_userid",
		"Owner IAM ID", "entity.owner_iam_id", "API key", "owner.apikey")
	userColumns = columns("User ID", "user_id", "IAM ID", "iam_id", "First name", "firstname", "Last name", "lastname", "State", "state")
	userDetails = columns("User ID", "user_id", "IAM ID", "iam_id", "Email", "email", "First name", "firstname", "Last name", "lastname",
		"Phone", "phonenumber", "State", "state", "Account", "account_id", "Added", "added_on")
)

const (
	accountsPath = "/v1/accounts"
	accountID    = "metadata.guid"
)

var idps = &kind{
	noun: "identity provider", plural: "identity providers", listed: "account idps", path: "/v1/idps", array: "idps", id: "id", form: prefixed("Idp-"),
	columns: columns("Name", "name", "ID", "id", "Issuer", "issuer", "Audience", "audience", "Enabled", "enabled"),
	details: columns("Name", "name", "ID", "id", "Issuer", "issuer", "Audience", "audience", "Enabled", "enabled",
		"Created", "created_at", "Created by", "created_by"),
}

func accountCommands() *cobra.Command {
	return group("account", "Manage accounts, the users in them and where those log in",
		"An account owns everything else. The operator of the installation makes and closes accounts; in each of them its\n"+
			"owner invites users, or lets in those of an identity provider.",
		"tabard account users",
		accountListCommand(), accountShowCommand(),
		accountCreateCommand("create NAME --owner-email EMAIL", "tabard account create acme --owner-email ada@example.com --file acme.json"),
		accountCloseCommand(), accountReopenCommand(),
		usersCommand(), userCommand(), userInviteCommand(), userUpdateCommand(), userKeyCommand(), userRemoveCommand(),
		listCommand(idps, "idps", "tabard account idps"),
		getCommand(idps, "idp (NAME|ID)", "tabard account idp corp"),
		idpCreateCommand(), idpUpdateCommand(),
		deleteCommand(idps, "idp-delete (NAME|ID)...", "delete", "tabard account idp-delete corp -f", nil, nil),
	)
}

func accountListCommand() *cobra.Command {
	return spec{
		use: "list", short: "List the accounts that you may see", example: "tabard account list",
		more: "That is the one you are in; the operator of the installation sees all of them.",
	}.listing("accounts", accountID, accountColumns, func(s *session, _ []string) ([]object, error) { return s.accounts() })
}

func (s *session) accounts() ([]object, error) {
	items, err := s.client.list(s.ctx(), accountsPath, nil, "resources", 0)
	return items, during(err, "list accounts")
}

var accountForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

// account returns the id of the account with this name or id.
func (s *session) account(ref string) (string, error) {
	if accountForm.MatchString(ref) {
		return ref, nil
	}
	items, err := s.accounts()
	if err != nil {
		return "", err
	}
	var found []string
	for _, a := range items {
		if a.text("entity.name") == ref {
			found = append(found, a.text(accountID))
		}
	}
	switch len(found) {
	case 0:
		return "", &noted{
			error: fmt.Errorf("no account has the name or ID %q", ref), transaction: s.client.transaction,
			note: "List the accounts with: tabard account list",
		}
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%d accounts have the name %q: use the ID, one of %s", len(found), ref, strings.Join(found, ", "))
}

func accountShowCommand() *cobra.Command {
	return spec{
		use: "show [NAME|ID]", short: "Show an account", example: "tabard account show", args: cobra.MaximumNArgs(1), flags: idFlag,
		more: "Without an argument the one you are in.",
		run: func(s *session, args []string) error {
			id := s.AccountID
			if len(args) == 1 {
				var err error
				if id, err = s.account(args[0]); err != nil {
					return err
				}
			}
			s.announce("Getting account %s", id)
			o, _, err := s.get(accountsPath+"/"+url.PathEscape(id), nil)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, accountID, accountDetails)
		},
	}.command()
}

// accountCreateCommand is known under two names: as account create and, as
// the program's own word, account-create.
func accountCreateCommand(use, example string) *cobra.Command {
	var email, name, file string
	c := spec{
		use: use, short: "Create an account", example: example, args: cobra.ExactArgs(1),
		more: "For the operator of the installation. The owner gets everything in the new account, and a first API key: it is\n" +
			"shown once, or written to --file in the form of the server's owner.json, which tabard login --apikey @FILE reads.",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&email, "owner-email", "", "e-mail address of the account's owner")
			f.StringVar(&name, "owner-name", "", "name of the account's owner (default: the account's)")
			f.StringVar(&file, "file", "", "write the owner's API key to this `FILE` instead of showing it")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			if err := fileCanBe(file); err != nil {
				return err
			}
			s.announce("Creating account %s", args[0])
			owner := filled("email", email, "name", name)
			o, err := s.send(request{method: http.MethodPost, path: accountsPath, body: map[string]any{"name": args[0], "owner": owner}})
			if err != nil {
				return err
			}
			if file == "" {
				s.ok("The account %s was created. Keep the owner's API key safe: it cannot be shown again.", args[0])
				return s.show(o, accountID, ownerDetails)
			}
			var made struct {
				Owner json.RawMessage `json:"owner"`
			}
			if err := json.Unmarshal(o.raw, &made); err != nil {
				return fmt.Errorf("read the owner's file: %w", err)
			}
			if err := writeSecret(file, append(made.Owner, '\n')); err != nil {
				return fmt.Errorf("the account %s was created, but its owner's key was not saved and cannot be shown again: %w", o.text(accountID), err)
			}
			delete(o.fields, "owner")
			s.ok("The account %s was created; its owner's API key is in %s.", args[0], file)
			return s.show(object{fields: o.fields}, accountID, accountDetails)
		},
	}.command()
	must(c.MarkFlagRequired("owner-email"))
	return c
}

// must is for errors that only a mistake in this package can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func accountCloseCommand() *cobra.Command {
	var force bool
	return spec{
		use: "close (NAME|ID)", short: "Close an account", example: "tabard account close acme -f", args: cobra.ExactArgs(1),
		more: "For the operator of the installation. Nobody gets a token in it any more and those that are out end; nothing\n" +
			"in it is deleted, and account reopen undoes it. Asks first; without a terminal to ask on it needs -f.",
		flags: func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "close account %s", args[0]); err != nil {
				return err
			}
			id, err := s.account(args[0])
			if err != nil {
				return err
			}
			return s.remove("account", args, []string{id}, "close", func(id string) request {
				return request{method: http.MethodDelete, path: accountsPath + "/" + id}
			})
		},
	}.command()
}

func accountReopenCommand() *cobra.Command {
	return spec{
		use: "reopen (NAME|ID)", short: "Reopen a closed account", example: "tabard account reopen acme", args: cobra.ExactArgs(1), flags: idFlag,
		more: "For the operator of the installation. Everything is as it was.",
		run: func(s *session, args []string) error {
			id, err := s.account(args[0])
			if err != nil {
				return err
			}
			s.announce("Reopening account %s", args[0])
			o, err := s.send(request{method: http.MethodPost, path: accountsPath + "/" + id + "/reopen"})
			if err != nil {
				return err
			}
			s.ok("The account %s was reopened.", args[0])
			return s.show(o, accountID, accountDetails)
		},
	}.command()
}

func (s *session) usersPath(more ...string) string {
	path := "/v2/accounts/" + url.PathEscape(s.AccountID) + "/users"
	for _, m := range more {
		path += "/" + url.PathEscape(m)
	}
	return path
}

// user returns the IAM ID of the user with this e-mail address or IAM ID.
func (s *session) user(ref string) (string, error) {
	if !strings.Contains(ref, "@") {
		return ref, nil
	}
	items, err := s.client.list(s.ctx(), s.usersPath(), query("user_id", ref), "resources", 0)
	if err != nil {
		return "", during(err, "look the user up")
	}
	if len(items) != 1 {
		return "", &noted{
			error: fmt.Errorf("no user of the account has the address %q", ref), transaction: s.client.transaction,
			note: "List the users with: tabard account users",
		}
	}
	return items[0].text("iam_id"), nil
}

func usersCommand() *cobra.Command {
	return spec{
		use: "users", short: "List the account's users", example: "tabard account users",
		more: "An invited user is PENDING until he has logged in.",
	}.listing("users", "iam_id", userColumns, func(s *session, _ []string) ([]object, error) {
		items, err := s.client.list(s.ctx(), s.usersPath(), nil, "resources", 0)
		return items, during(err, "list users")
	})
}

func userCommand() *cobra.Command {
	return spec{
		use: "user (EMAIL|IAM_ID)", short: "Show one user", example: "tabard account user ada@example.com", args: cobra.ExactArgs(1), flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Getting user %s", args[0])
			id, err := s.user(args[0])
			if err != nil {
				return err
			}
			o, _, err := s.get(s.usersPath(id), nil)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, "iam_id", userDetails)
		},
	}.command()
}

func userInviteCommand() *cobra.Command {
	var into []string
	return spec{
		use: "user-invite EMAIL...", short: "Invite users into the account", args: cobra.MinimumNArgs(1),
		example: "tabard account user-invite ada@example.com --access-groups developers",
		more: "A user has no access but that of the access groups and of policies made for him. He gets in through an\n" +
			"identity provider of the account that vouches for his address, or with a key made by user-api-key-create.",
		flags: func(f *pflag.FlagSet) {
			f.StringSliceVar(&into, "access-groups", nil, "names or IDs of access groups to put them into, comma-separated")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Inviting %s", strings.Join(args, ", "))
			users := make([]map[string]string, len(args))
			for i, email := range args {
				users[i] = map[string]string{"email": email, "account_role": "Member"}
			}
			body := map[string]any{"users": users}
			if len(into) > 0 {
				ids := make([]string, len(into))
				for i, ref := range into {
					id, err := accessGroups.find(s, ref)
					if err != nil {
						return err
					}
					ids[i] = id
				}
				body["access_groups"] = ids
			}
			o, err := s.send(request{method: http.MethodPost, path: s.usersPath(), body: body})
			if err != nil {
				return err
			}
			return s.showAll(o.objects("resources"), "users", "id", columns("Email", "email", "IAM ID", "id", "State", "state"))
		},
	}.command()
}

func userUpdateCommand() *cobra.Command {
	fields := []field{
		{"first-name", "", "firstname", "first name"}, {"last-name", "", "lastname", "last name"},
		{"email", "", "email", "e-mail address; that of a pending invitation stays"}, {"phone", "", "phonenumber", "phone number"},
	}
	values := make([]string, len(fields))
	var userState string
	var set *pflag.FlagSet
	return spec{
		use: "user-update (EMAIL|IAM_ID)", short: "Change a user, or shut one out", args: cobra.ExactArgs(1),
		example: "tabard account user-update ada@example.com --state disabled",
		more:    "What no flag names keeps its value. A disabled user keeps his access for the day he is active again.",
		flags: func(f *pflag.FlagSet) {
			for i, fd := range fields {
				f.StringVarP(&values[i], fd.flag, fd.short, "", fd.usage)
			}
			choice(f, &userState, "state", "", "state", "active", "disabled")
			set = f
		},
		run: func(s *session, args []string) error {
			body := map[string]any{}
			for i, fd := range fields {
				if set.Changed(fd.flag) {
					body[fd.name] = values[i]
				}
			}
			if userState != "" {
				body["state"] = strings.ToUpper(userState)
			}
			if len(body) == 0 {
				return Usage("nothing to change: give a flag such as --first-name or --state")
			}
			s.announce("Updating user %s", args[0])
			id, err := s.user(args[0])
			if err != nil {
				return err
			}
			if _, err := s.send(request{method: http.MethodPatch, path: s.usersPath(id), body: body}); err != nil {
				return err
			}
			o, _, err := s.get(s.usersPath(id), nil)
			if err != nil {
				return err
			}
			s.ok("The user %s was updated.", args[0])
			return s.show(o, "iam_id", userDetails)
		},
	}.command()
}

func userKeyCommand() *cobra.Command {
	var file string
	return spec{
		use: "user-api-key-create (EMAIL|IAM_ID)", short: "Create the first API key of an invited user", args: cobra.ExactArgs(1),
		example: "tabard account user-api-key-create ada@example.com --file ada.json",
		more:    "For an administrator to pass on, where no identity provider lets the user in. There is one such key; the user\nmakes his own with it and deletes it.",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&file, "file", "", "write the key to this `FILE` instead of showing it")
			idFlag(f)
		},
		run: func(s *session, args []string) error {
			if err := fileCanBe(file); err != nil {
				return err
			}
			s.announce("Creating the first API key of %s", args[0])
			id, err := s.user(args[0])
			if err != nil {
				return err
			}
			o, err := s.send(request{method: http.MethodPost, path: s.usersPath(id, "apikey")})
			if err != nil {
				return err
			}
			if file == "" {
				return s.made(apiKeys, o, "The API key was created. Keep it safe: it cannot be shown again.")
			}
			b, err := json.MarshalIndent(map[string]string{
				"name": o.text("name"), "id": o.text("id"), "iam_id": o.text("iam_id"), "apikey": o.text("apikey"), "url": s.URL,
			}, "", "  ")
			if err != nil {
				return fmt.Errorf("encode the key file: %w", err)
			}
			if err := writeSecret(file, append(b, '\n')); err != nil {
				return fmt.Errorf("the API key %s was created but not saved, delete it: %w", o.text("id"), err)
			}
			return s.made(apiKeys, without(o, "apikey"), "The API key was created and written to %s.", file)
		},
	}.command()
}

func userRemoveCommand() *cobra.Command {
	var force bool
	return spec{
		use: "user-remove (EMAIL|IAM_ID)...", short: "Remove users from the account", example: "tabard account user-remove ada@example.com -f",
		args:  cobra.MinimumNArgs(1),
		more:  "With their API keys, policies and places in access groups. Asks first; without a terminal to ask on it needs -f.",
		flags: func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "remove user %s", strings.Join(args, ", ")); err != nil {
				return err
			}
			ids := make([]string, len(args))
			for i, ref := range args {
				id, err := s.user(ref)
				if err != nil {
					return err
				}
				ids[i] = id
			}
			return s.remove("user", args, ids, "remove", func(id string) request {
				return request{method: http.MethodDelete, path: s.usersPath(id)}
			})
		},
	}.command()
}

// idpFlags are what an identity provider is made of.
type idpFlags struct {
	name, audience, caFile, jwksFile, enabled string
	set                                       *pflag.FlagSet
}

func (i *idpFlags) add(f *pflag.FlagSet) {
	f.StringVar(&i.audience, "audience", "", "audience that its tokens must be made for, such as the client ID there")
	f.StringVar(&i.caFile, "ca-file", "", "PEM `FILE` of the CA of the issuer's server certificate")
	f.StringVar(&i.jwksFile, "jwks", "", "JSON `FILE` with the issuer's public keys, where the server cannot reach it")
	choice(f, &i.enabled, "enabled", "", "whether its users are let in", "true", "false")
	idFlag(f)
	i.set = f
}

// fill puts what was given into a body.
func (i *idpFlags) fill(body map[string]any) error {
	for k, v := range filled("name", i.name, "audience", i.audience) {
		body[k] = v
	}
	if i.caFile != "" {
		ca, err := readFile(i.caFile)
		if err != nil {
			return during(err, "read the CA")
		}
		body["ca"] = ca
	}
	if i.jwksFile != "" {
		text, err := readFile(i.jwksFile)
		if err != nil {
			return during(err, "read the keys")
		}
		if !json.Valid([]byte(text)) {
			return Usage("%s is not JSON", i.jwksFile)
		}
		body["jwks"] = json.RawMessage(text)
	}
	if i.enabled != "" {
		body["enabled"] = i.enabled == "true"
	}
	return nil
}

func idpCreateCommand() *cobra.Command {
	var flags idpFlags
	var issuer string
	c := spec{
		use: "idp-create NAME --issuer URL --audience AUDIENCE", short: "Let in the users of an identity provider", args: cobra.ExactArgs(1),
		example: "tabard account idp-create corp --issuer https://login.example.com/realms/corp --audience tabard",
		more: "The identity provider speaks OpenID Connect. The server gets its keys from the issuer's discovery document, now\n" +
			"and from time to time; where it cannot reach the issuer, give it the keys with --jwks.",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&issuer, "issuer", "", "`URL` of the issuer, exactly as in the iss claim of its tokens")
			flags.add(f)
		},
		run: func(s *session, args []string) error {
			s.announce("Creating identity provider %s", args[0])
			body := map[string]any{"name": args[0], "issuer": issuer}
			if err := flags.fill(body); err != nil {
				return err
			}
			return idps.create(s, args[0], body)
		},
	}.command()
	must(c.MarkFlagRequired("issuer"))
	must(c.MarkFlagRequired("audience"))
	return c
}

func idpUpdateCommand() *cobra.Command {
	var flags idpFlags
	return spec{
		use: "idp-update (NAME|ID)", short: "Change an identity provider, or shut its users out", args: cobra.ExactArgs(1),
		example: "tabard account idp-update corp --enabled false",
		more:    "What no flag names keeps its value. The issuer stays: its users are known by it.",
		flags: func(f *pflag.FlagSet) {
			f.StringVarP(&flags.name, "name", "n", "", "new name")
			flags.add(f)
		},
		run: func(s *session, args []string) error {
			given := []string{"name", "audience", "ca-file", "jwks", "enabled"}
			if !slices.ContainsFunc(given, flags.set.Changed) {
				return Usage("nothing to change: give a flag such as --audience or --enabled")
			}
			body := map[string]any{}
			if err := flags.fill(body); err != nil {
				return err
			}
			s.announce("Updating identity provider %s", args[0])
			o, header, err := idps.load(s, args[0])
			if err != nil {
				return err
			}
			o, err = s.send(request{
				method: http.MethodPut, path: idps.at(o.text("id")), body: body, header: map[string]string{"If-Match": entityTag(o, header)},
			})
			if err != nil {
				return err
			}
			return s.made(idps, o, "The identity provider %s was updated.", args[0])
		},
	}.command()
}
