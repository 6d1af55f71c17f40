package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var apiKeys = &kind{
	noun: "API key", plural: "API keys", listed: "iam api-keys", path: "/v1/apikeys", array: "apikeys", id: "id",
	form: prefixed("ApiKey-"), account: true,
	columns: columns("Name", "name", "ID", "id", "Description", "description", "Locked", "locked", "Disabled", "disabled",
		"Created", "created_at", "Expires", "expires_at"),
	details: columns("Name", "name", "ID", "id", "Description", "description", "IAM ID", "iam_id", "Created", "created_at",
		"Expires", "expires_at", "Locked", "locked", "Disabled", "disabled", "If leaked", "action_when_leaked", "API key", "apikey"),
}

// keysOfServiceIDs are API keys among those of one service ID: an id is looked
// up there, too, so that it is never another one's.
var keysOfServiceIDs = func() *kind {
	k := *apiKeys
	k.listed, k.form = "iam service-api-keys SERVICE_ID", nil
	return &k
}()

func ownKey() place {
	p := inAccount(apiKeys, "iam", "api-key", "ci")
	p.within = func(s *session, _ []string) (*kind, []string, error) {
		return apiKeys, []string{"iam_id", s.IAMID}, nil
	}
	return p
}

func serviceKey() place {
	return place{
		kind: apiKeys, family: "iam", word: "service-api-key", args: "(NAME|ID) (SERVICE_ID_NAME|SERVICE_ID)", sample: "key-1 my-service", outer: serviceIDs,
		within: func(s *session, args []string) (*kind, []string, error) {
			owner, err := serviceIDSubject(s, args[1])
			return keysOfServiceIDs, []string{"iam_id", owner.value}, err
		},
	}
}

// Options of API keys.
var (
	leakAction = func() option {
		o := choose("action-if-leaked", "action_when_leaked", "what happens when the key is found in public", "NONE", "DISABLE", "DELETE")
		o.as = func(_ *session, text string) (any, error) { return strings.ToLower(text), nil }
		return o
	}()
	keyExpiry = option{
		field: field{"expires-at", "", "expires_at", "when it ends: a `TIME`, a date, or how long from now, such as 90d"},
		as: func(_ *session, text string) (any, error) {
			at, err := expiry(text, time.Now())
			if err != nil {
				return nil, Usage("--expires-at %q: %w", text, err)
			}
			return at, nil
		},
	}
	newKeyOptions     = append(slices.Clone(description), leakAction, keyExpiry)
	changedKeyOptions = append(slices.Clone(renaming), leakAction, keyExpiry)
)

func apiKeyCommands() []*cobra.Command {
	own, of := ownKey(), serviceKey()
	return slices.Concat([]*cobra.Command{
		ownKeysCommand(), own.get(),
		createKeyCommand(own, "NAME", "ci --file ci-key.json"),
	}, own.keyCommands("ci-2"), []*cobra.Command{
		serviceKeysCommand(), of.get(),
		createKeyCommand(of, "NAME (SERVICE_ID_NAME|SERVICE_ID)", "key-1 my-service --file key-1.json"),
	}, of.keyCommands("key-2"))
}

// keyCommands are what both families of keys have in common.
func (p place) keyCommands(newName string) []*cobra.Command {
	return append([]*cobra.Command{
		p.update(change{options: changedKeyOptions, more: "An empty --expires-at makes it last.", example: "--name " + newName}),
		p.delete("Tokens and sessions got with it end."),
		p.turn("disable", http.MethodPost, "disable", "Nobody can log in with it until it is enabled."),
		p.turn("enable", http.MethodDelete, "disable", "One can log in with it again."),
	}, p.locks()...)
}

func keyFilters(f *pflag.FlagSet, name, description *string) {
	f.StringVarP(name, "name", "n", "", "show only those with this `NAME`")
	f.StringVarP(description, "description", "d", "", "show only those whose description contains this `TEXT`")
}

func ownKeysCommand() *cobra.Command {
	var name, description string
	return spec{
		use: "api-keys", short: "List your own API keys", example: "tabard iam api-keys",
		more: "The keys themselves are not shown: the server does not know them.",
		flags: func(f *pflag.FlagSet) {
			keyFilters(f, &name, &description)
			idFlag(f)
		},
	}.listing(apiKeys.plural, apiKeys.id, apiKeys.columns, func(s *session, _ []string) ([]object, error) {
		return apiKeys.list(s, "iam_id", s.IAMID, "name", name, "filter", containing("description", description))
	})
}

func serviceKeysCommand() *cobra.Command {
	var all bool
	var name, description string
	return spec{
		use: "service-api-keys [SERVICE_ID_NAME|SERVICE_ID]", short: "List the API keys of a service ID",
		more: "With --all the keys of every service ID of the account.", example: "tabard iam service-api-keys my-service",
		args: cobra.MaximumNArgs(1),
		flags: func(f *pflag.FlagSet) {
			f.BoolVarP(&all, "all", "a", false, "of all service IDs")
			keyFilters(f, &name, &description)
			idFlag(f)
			neverAsks(f)
		},
	}.listing(apiKeys.plural, apiKeys.id, apiKeys.columns, func(s *session, args []string) ([]object, error) {
		if all == (len(args) == 1) {
			return nil, Usage("name a service ID, or use --all")
		}
		which := []string{"type", "serviceid", "scope", "account"}
		if !all {
			owner, err := serviceIDSubject(s, args[0])
			if err != nil {
				return nil, err
			}
			which = []string{"iam_id", owner.value}
		}
		return apiKeys.list(s, append(which, "name", name, "filter", containing("description", description))...)
	})
}

func createKeyCommand(p place, args, example string) *cobra.Command {
	var given reader
	var file string
	var lock bool
	short := "Create an API key of your own"
	if p.outer != nil {
		short = "Create " + p.a()
	}
	return spec{
		use: p.word + "-create " + args, short: short, example: "tabard iam " + p.word + "-create " + example, args: p.exact(),
		more: "This is the only time that the key is shown. With --file it goes to a file that only you can read, and not to\n" +
			"the terminal; the file serves as tabard login --apikey @FILE.",
		flags: func(f *pflag.FlagSet) {
			given = newKeyOptions.add(f)
			f.StringVar(&file, "file", "", "write the key to this `FILE`")
			f.BoolVar(&lock, "lock", false, "lock it against changes")
			neverAsks(f)
		},
		run: func(s *session, args []string) error {
			body, err := given(s)
			if err != nil {
				return err
			}
			if err := fileCanBe(file); err != nil {
				return err
			}
			_, owner, err := p.within(s, args)
			if err != nil {
				return err
			}
			s.announce("Creating API key %s%s", args[0], p.of(args))
			body["name"], body["account_id"] = args[0], s.AccountID
			body[owner[0]] = owner[1]
			o, err := s.send(request{method: http.MethodPost, path: apiKeys.path, body: body, header: locked(lock)})
			if err != nil {
				return err
			}
			if file == "" {
				return s.made(apiKeys, o, "The API key %s was created. Keep it safe: it cannot be shown again.", args[0])
			}
			if err := saveSecret(file, map[string]string{
				"name": o.text("name"), "description": o.text("description"), "id": o.text("id"),
				"apikey": o.text("apikey"), "url": s.URL, "created_at": o.text("created_at"),
			}); err != nil {
				return fmt.Errorf("the API key %s was created but not saved, delete it: %w", o.text("id"), err)
			}
			return s.made(apiKeys, without(o, "apikey"), "The API key %s was created and written to %s.", args[0], file)
		},
	}.command()
}

// fileCanBe refuses a file in a folder that is not there, before a secret is
// made: one that nobody can read is of no use. It refuses a file that is there
// as well, because what is in it may be the only copy of another secret.
func fileCanBe(file string) error {
	if file == "" {
		return nil
	}
	if _, err := os.Lstat(file); err == nil {
		return fmt.Errorf("the file %s is there already and may hold another key; name a new one, or remove it first", file)
	}
	_, err := os.Stat(filepath.Dir(file))
	return err
}

// saveSecret writes JSON to a file that only its owner can read.
func saveSecret(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode it: %w", err)
	}
	return writeSecret(file, append(b, '\n'))
}

func without(o object, field string) object {
	delete(o.fields, field)
	return object{fields: o.fields}
}
