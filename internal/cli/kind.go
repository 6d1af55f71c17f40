package cli

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/crn"
)

// kind is what the client needs to know of a kind of object in order to list,
// find, show and delete it. Users name objects by name or id.
type kind struct {
	noun, plural string
	path         string // of the collection
	array        string // that holds the items of a list
	id           string // path of the id in an object
	named        string // path of its name, when that is not name
	listed       string // by which command, without the program's name
	form         *regexp.Regexp
	vpc          bool                       // the VPC API wants its version on every call
	account      bool                       // lists want account_id
	byName       func(name string) []string // query pairs that narrow a list down to a name
	columns      []column                   // of a table
	details      []column                   // of one object
}

// The VPC API wants the date that its client was made for, and a generation, on
// every call (reference/instance-metadata-and-vpc.md section 3.1).
const (
	vpcVersion    = "2026-01-27"
	vpcGeneration = "2"
)

// query returns parameters from pairs of name and value, without empty values.
func query(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}

func vpcQuery(pairs ...string) url.Values {
	return query(append(pairs, "version", vpcVersion, "generation", vpcGeneration)...)
}

// nameFilter narrows a list down with the parameter name.
func nameFilter(name string) []string { return []string{"name", name} }

// one returns the parameters of a request about one object.
func (k *kind) one(pairs ...string) url.Values {
	if k.vpc {
		return vpcQuery(pairs...)
	}
	return query(pairs...)
}

func (k *kind) many(s *session, pairs ...string) url.Values {
	if k.account {
		pairs = append(pairs, "account_id", s.AccountID)
	}
	return k.one(pairs...)
}

func (k *kind) at(id string, more ...string) string {
	path := k.path + "/" + url.PathEscape(id)
	for _, m := range more {
		path += "/" + url.PathEscape(m)
	}
	return path
}

// list returns the objects that pairs of query parameters select.
func (k *kind) list(s *session, pairs ...string) ([]object, error) {
	items, err := s.client.list(s.ctx(), k.path, k.many(s, pairs...), k.array, 0)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", k.plural, err)
	}
	return items, nil
}

// name is the path of the name in an object.
func (k *kind) name() string { return cmp.Or(k.named, "name") }

// find returns the id of the object with this name, id or CRN. Text in the form
// of an id is believed to be one, which saves a request. The pairs narrow down
// where to look for a name.
func (k *kind) find(s *session, ref string, pairs ...string) (string, error) {
	if id, ok := k.asID(ref); ok {
		return id, nil
	}
	narrow := pairs
	if k.byName != nil {
		narrow = append(slices.Clone(pairs), k.byName(ref)...)
	}
	items, err := k.list(s, narrow...)
	if err != nil {
		return "", err
	}
	id, err := k.pick(s, items, ref)
	var unknown *noted
	if k.byName != nil && errors.As(err, &unknown) {
		// The answer had only this name in it; another has what is near.
		if items, err := k.list(s, pairs...); err == nil {
			return "", k.unknown(items, ref, unknown.transaction)
		}
	}
	return id, err
}

// pick returns the id of the one item with this name, or id.
func (k *kind) pick(s *session, items []object, ref string) (string, error) {
	var found []string
	for _, o := range items {
		if o.text(k.name()) == ref || o.text(k.id) == ref {
			found = append(found, o.text(k.id))
		}
	}
	switch len(found) {
	case 0:
		return "", k.unknown(items, ref, s.client.transaction)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%d %s have the name %q: use the ID, one of %s", len(found), k.plural, ref, strings.Join(found, ", "))
}

// unknown says that there is no object with this name, and which are near.
func (k *kind) unknown(items []object, ref, transaction string) error {
	var near []string
	for _, o := range items {
		if name := o.text(k.name()); nearby(name, ref) && !slices.Contains(near, name) && len(near) < maxNear {
			near = append(near, name)
		}
	}
	n := &noted{error: fmt.Errorf("no %s has the name or ID %q%s", k.noun, ref, didYouMean(near)), transaction: transaction}
	if k.listed != "" {
		n.note = "List the " + k.plural + " with: tabard " + k.listed
	}
	return n
}

// maxNear is how many names are suggested.
const maxNear = 3

// nearby reports whether a name may be what was meant by another.
func nearby(name, ref string) bool {
	name, ref = strings.ToLower(name), strings.ToLower(ref)
	if name == "" || ref == "" {
		return false
	}
	return len(ref) > 2 && strings.HasPrefix(name, ref) || len(name) > 2 && strings.HasPrefix(ref, name) ||
		distance(name, ref) <= min(2, (len(ref)+1)/2)
}

// distance is how many characters must be put in, left out or changed to turn
// one text into another.
func distance(a, b string) int {
	to := []rune(b)
	row := make([]int, len(to)+1)
	for j := range row {
		row[j] = j
	}
	for i, x := range []rune(a) {
		before := row[0]
		row[0] = i + 1
		for j, y := range to {
			change := before
			if x != y {
				change++
			}
			before = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(to)]
}

func (k *kind) asID(ref string) (string, bool) {
	if c, err := crn.Parse(ref); err == nil {
		ref = cmp.Or(c.Resource, c.Instance)
	}
	return ref, k.form != nil && k.form.MatchString(ref)
}

// load returns the object with this name or id. The pairs narrow down where to
// look for a name.
func (k *kind) load(s *session, ref string, pairs ...string) (object, http.Header, error) {
	id, err := k.find(s, ref, pairs...)
	if err != nil {
		return object{}, nil, err
	}
	return s.get(k.at(id), k.one())
}

// listing is a command that shows what fetch finds; what it lists is told first.
func (p spec) listing(plural, id string, cols []column, fetch func(s *session, args []string) ([]object, error)) *cobra.Command {
	if p.flags == nil {
		p.flags = idFlag
	}
	p.run = func(s *session, args []string) error {
		of := ""
		if len(args) > 0 {
			of = " of " + strings.Join(args, " ")
		}
		s.announce("Listing %s%s", plural, of)
		items, err := fetch(s, args)
		if err != nil {
			return err
		}
		return s.showAll(items, plural, id, cols)
	}
	return p.command()
}

// filter is a flag of a list command that becomes a query parameter. The
// parameter filter:NAME stands for an expression in the filter language.
type filter struct {
	flag, short, parameter, usage string
	of                            *kind // what the flag names, nil for plain text
}

// containing makes the value of the parameter filter that admits the objects
// whose attribute contains a text (reference/iam-identity.md section 4.1).
func containing(attribute, text string) string {
	if text == "" {
		return ""
	}
	return attribute + ` co "` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
}

// descriptionFilter is the filter of lists of the identity API that is written
// in its filter language.
var descriptionFilter = filter{"description", "d", "filter:description", "show only those whose description contains this `TEXT`", nil}

// listCommand lists a kind, filtered by what the flags say.
func listCommand(k *kind, use, example string, filters ...filter) *cobra.Command {
	values := make([]string, len(filters))
	return spec{
		use: use, short: "List the account's " + k.plural, example: example,
		more: "Shows all of them that you may see, on however many pages the server keeps them.",
		flags: func(f *pflag.FlagSet) {
			for i, flt := range filters {
				f.StringVarP(&values[i], flt.flag, flt.short, "", flt.usage)
			}
			idFlag(f)
		},
		run: func(s *session, _ []string) error {
			s.announce("Listing %s%s", k.plural, s.where(k))
			var pairs []string
			for i, flt := range filters {
				v, err := values[i], error(nil)
				if v != "" && flt.of != nil {
					v, err = flt.of.find(s, v)
				}
				if err != nil {
					return err
				}
				parameter, attribute, language := strings.Cut(flt.parameter, ":")
				if language {
					v = containing(attribute, v)
				}
				if v != "" {
					pairs = append(pairs, parameter, v)
				}
			}
			items, err := k.list(s, pairs...)
			if err != nil {
				return err
			}
			return s.showAll(items, k.plural, k.id, k.columns)
		},
	}.command()
}

// where says which part of the account a list is about.
func (s *session) where(k *kind) string {
	if !k.vpc || k.form == nil || s.Region == "" { // kinds without ids are in no group
		return ""
	}
	return " in all resource groups and region " + s.Region
}

func idFlag(f *pflag.FlagSet) {
	f.Bool("id", false, "print only the ID")
	alias(f, "id", "uuid")
}

// getCommand shows one object of a kind.
func getCommand(k *kind, use, example string) *cobra.Command {
	return spec{
		use: use, short: "Show one " + k.noun, example: example,
		more: "The " + k.noun + " is named by its name or ID.",
		args: cobra.ExactArgs(1), flags: idFlag,
		run: func(s *session, args []string) error {
			s.announce("Getting %s %s", k.noun, args[0])
			o, _, err := k.load(s, args[0])
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, k.id, k.details)
		},
	}.command()
}

// deleteCommand deletes one or more objects of a kind; verb is what the command
// calls it, and pairs are query parameters.
func deleteCommand(k *kind, use, verb, example string, flags func(*pflag.FlagSet), pairs func() []string) *cobra.Command {
	var force bool
	return spec{
		use: use, short: capital(verb) + " " + k.plural, example: example,
		more: "Each " + k.noun + " is named by its name or ID. Asks first; without a terminal to ask on it needs -f.",
		args: cobra.MinimumNArgs(1),
		flags: func(f *pflag.FlagSet) {
			forceFlag(f, &force)
			if flags != nil {
				flags(f)
			}
		},
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "%s %s %s", verb, k.noun, strings.Join(args, ", ")); err != nil {
				return err
			}
			ids := make([]string, len(args))
			for i, ref := range args {
				id, err := k.find(s, ref)
				if err != nil {
					return err
				}
				ids[i] = id
			}
			var more []string
			if pairs != nil {
				more = pairs()
			}
			return s.remove(k.noun, args, ids, verb, func(id string) request {
				return request{method: http.MethodDelete, path: k.at(id), query: k.one(more...)}
			})
		},
	}.command()
}

// neverAsks is the -f of commands that may ask elsewhere, when a name is that
// of several things; here that is always an error.
func neverAsks(f *pflag.FlagSet) { f.BoolP("force", "f", false, "do not ask") }

func forceFlag(f *pflag.FlagSet, force *bool) {
	f.BoolVarP(force, "force", "f", false, "do not ask")
}

// deleted is what a deletion prints as JSON.
type deleted struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Result bool   `json:"result"`
}

// remove sends a deletion for each id. One that fails does not hold up the
// others; each failure is told.
func (s *session) remove(noun string, names, ids []string, verb string, of func(id string) request) error {
	var results []deleted
	var failed []error
	for i, id := range ids {
		s.announce("%s %s %s", capital(participle(verb)), noun, names[i])
		_, err := s.send(of(id))
		results = append(results, deleted{id, names[i], err == nil})
		if err != nil {
			failed = append(failed, fmt.Errorf("%s %s %s: %w", verb, noun, names[i], err))
			continue
		}
		s.ok("%s %s was %s.", capital(noun), names[i], past(verb))
	}
	if s.json {
		if err := s.printJSON(results); err != nil {
			return err
		}
	}
	return oneOrAll(failed)
}

func oneOrAll(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

// participle and past inflect the verbs of commands: create, delete, release, add, …
func participle(verb string) string { return strings.TrimSuffix(verb, "e") + "ing" }
func past(verb string) string       { return strings.TrimSuffix(verb, "e") + "ed" }

// made is the end of a command that created or changed an object.
func (s *session) made(k *kind, o object, sentence string, args ...any) error {
	s.ok(sentence, args...)
	return s.show(o, k.id, k.details)
}

// Forms of ids.
const uuidForm = `[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}`

func prefixed(prefix string) *regexp.Regexp {
	return regexp.MustCompile(`^` + prefix + uuidForm + `$`)
}
