package cli

import (
	"net/http"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// place is where the objects of a family of commands are: in the account, in an
// object that another argument names, or among those of an identity.
type place struct {
	kind   *kind
	family string // of the commands, such as iam
	word   string // the name of the command that shows one; the others begin with it
	args   string // of usage lines, that name one object
	sample string // of the same in examples
	nth    int    // which of the arguments names the object
	outer  *kind  // that of the other argument, nil when there is none

	// within returns the kind as it is in what the other argument names, and
	// query pairs that narrow down where to look for a name. Nil means the kind
	// as it is.
	within func(s *session, args []string) (*kind, []string, error)
}

// inAccount is the place of a kind that is named by one argument.
func inAccount(k *kind, family, word, sample string) place {
	return place{kind: k, family: family, word: word, args: "(NAME|ID)", sample: sample}
}

// example returns a line of the command with a suffix, and more after its
// arguments.
func (p place) example(suffix, more string) string {
	return strings.TrimSpace("tabard " + p.family + " " + p.word + suffix + " " + p.sample + " " + more)
}

func (p place) exact() cobra.PositionalArgs {
	if p.outer == nil {
		return cobra.ExactArgs(1)
	}
	return cobra.ExactArgs(2)
}

// of says in what an object is.
func (p place) of(args []string) string {
	if p.outer == nil {
		return ""
	}
	return " of " + p.outer.noun + " " + args[1-p.nth]
}

// a says what the commands are about, for their short descriptions.
func (p place) a() string { return an(p.kind.noun) + p.ofA() }

func (p place) ofA() string {
	if p.outer == nil {
		return ""
	}
	return " of " + an(p.outer.noun)
}

// named explains the arguments.
func (p place) named() string {
	if p.outer == nil {
		return "The " + p.kind.noun + " is named by its name or ID."
	}
	return "The " + p.kind.noun + " and the " + p.outer.noun + " are named by their names or IDs."
}

func (p place) open(s *session, args []string) (*kind, []string, error) {
	if p.within == nil {
		return p.kind, nil, nil
	}
	return p.within(s, args)
}

// find returns the kind as it is in its place, and the object's id.
func (p place) find(s *session, args []string) (*kind, string, error) {
	k, narrow, err := p.open(s, args)
	if err != nil {
		return nil, "", err
	}
	id, err := k.find(s, args[p.nth], narrow...)
	return k, id, err
}

func (p place) load(s *session, args []string) (*kind, object, http.Header, error) {
	k, id, err := p.find(s, args)
	if err != nil {
		return nil, object{}, nil, err
	}
	o, h, err := s.get(k.at(id), k.one())
	return k, o, h, err
}

// get shows one object.
func (p place) get() *cobra.Command {
	return spec{
		use: p.word + " " + p.args, short: "Show one " + p.kind.noun + p.ofA(), more: p.named(), args: p.exact(),
		example: p.example("", ""),
		flags:   func(f *pflag.FlagSet) { idFlag(f); neverAsks(f) },
		run: func(s *session, args []string) error {
			s.announce("Getting %s %s%s", p.kind.noun, args[p.nth], p.of(args))
			k, o, _, err := p.load(s, args)
			if err != nil {
				return err
			}
			s.ok("")
			return s.show(o, k.id, k.details)
		},
	}.command()
}

// change is how the objects of a place are changed.
type change struct {
	method  string // PUT when empty
	options options
	keeps   []string // fields that the API wants with every change
	more    string
	example string // flags

	// finish makes the body fit for the API, when it is not so as it is.
	finish func(s *session, old object, body map[string]any) error
}

// update changes what flags name. It sends the entity tag that it read, so that
// it never undoes somebody else's change.
func (p place) update(c change) *cobra.Command {
	var given reader
	var force bool
	more := "What no flag names keeps its value."
	if c.more != "" {
		more += " " + c.more
	}
	return spec{
		use: p.word + "-update " + p.args, short: "Change " + p.a(), more: more, args: p.exact(),
		example: p.example("-update", c.example),
		flags: func(f *pflag.FlagSet) {
			given = c.options.add(f)
			forceFlag(f, &force)
		},
		run: func(s *session, args []string) error {
			b, err := given(s)
			if err != nil {
				return err
			}
			if len(b) == 0 {
				return c.options.nothingToChange()
			}
			s.announce("Updating %s %s%s", p.kind.noun, args[p.nth], p.of(args))
			k, old, header, err := p.load(s, args)
			if err != nil {
				return err
			}
			keep(b, old, c.keeps...)
			if c.finish != nil {
				if err := c.finish(s, old, b); err != nil {
					return err
				}
			}
			method := c.method
			if method == "" {
				method = http.MethodPut
			}
			o, err := s.send(request{
				method: method, path: k.at(old.text(k.id)), query: k.one(), body: b,
				header: map[string]string{"If-Match": entityTag(old, header)},
			})
			if err != nil {
				return err
			}
			return s.made(k, o, "The %s %s was updated.", p.kind.noun, args[p.nth])
		},
	}.command()
}

// delete deletes one object. More says what else ends with it.
func (p place) delete(more string) *cobra.Command {
	var force bool
	return spec{
		use: p.word + "-delete " + p.args, short: "Delete " + p.a(), args: p.exact(),
		more:    more + " Asks first; without a terminal to ask on it needs -f.",
		example: p.example("-delete", "-f"),
		flags:   func(f *pflag.FlagSet) { forceFlag(f, &force) },
		run: func(s *session, args []string) error {
			if err := s.confirm(force, "delete %s %s%s", p.kind.noun, args[p.nth], p.of(args)); err != nil {
				return err
			}
			k, id, err := p.find(s, args)
			if err != nil {
				return err
			}
			return s.remove(k.noun, args[p.nth:p.nth+1], []string{id}, "delete", func(id string) request {
				return request{method: http.MethodDelete, path: k.at(id), query: k.one()}
			})
		},
	}.command()
}

// turn is a command that turns something of an object on or off. The path ends
// in what is turned, and more says what that means.
func (p place) turn(verb, method, what, more string) *cobra.Command {
	return spec{
		use: p.word + "-" + verb + " " + p.args, short: capital(verb) + " " + p.a(), more: more, args: p.exact(),
		example: p.example("-"+verb, ""),
		flags:   neverAsks,
		run: func(s *session, args []string) error {
			s.announce("%s %s %s%s", capital(participle(verb)), p.kind.noun, args[p.nth], p.of(args))
			k, id, err := p.find(s, args)
			if err != nil {
				return err
			}
			if _, err := s.send(request{method: method, path: k.at(id, what), query: k.one()}); err != nil {
				return err
			}
			s.ok("The %s %s was %s.", p.kind.noun, args[p.nth], past(verb))
			if !s.json {
				return nil
			}
			o, _, err := s.get(k.at(id), k.one())
			if err != nil {
				return err
			}
			return s.printJSON(o)
		},
	}.command()
}

// locks are the commands that lock objects against changes and unlock them.
func (p place) locks() []*cobra.Command {
	return []*cobra.Command{
		p.turn("lock", http.MethodPost, "lock", "Nobody can change or delete it until it is unlocked."),
		p.turn("unlock", http.MethodDelete, "lock", "It can be changed and deleted again."),
	}
}
