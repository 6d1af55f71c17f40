// Package cli is the command line client: the words of the ibmcloud command for
// trusted profiles, access and virtual servers, and a few of our own
// (reference/instance-metadata-and-vpc.md section 4). It speaks to a server over
// HTTP only and knows nothing of how one works inside, but for the verification
// of an activity log that no server has open.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Exit codes of the program.
const (
	exitDone   = 0
	exitFailed = 1 // refused by the server, or failed
	exitUsage  = 2 // wrong arguments or flags, or an unknown command
)

// usageError is a mistake in how the program was called.
type usageError struct{ error }

// Usage returns an error that says how the program was called wrongly; it ends
// with exit code 2.
func Usage(format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...)}
}

// childExit carries the exit code of a program that was run on the user's
// behalf; it has said itself what went wrong.
type childExit int

func (c childExit) Error() string { return fmt.Sprintf("the command ended with code %d", int(c)) }

// New returns the root command with the client's commands and the extra ones.
func New(extra ...*cobra.Command) *cobra.Command {
	root := group("tabard", "Workload identity without keys: client and server in one program",
		"Tabard gives pods and virtual servers short-lived access tokens for what they are, not for a key they hold.\n"+
			"The client's words are those of the ibmcloud command: log in, then use account, iam, is, resource, ks, host and activity.\n\n"+
			"The session is kept in $TABARD_HOME (default ~/.tabard). Exit codes: 0 done, 1 refused or failed, 2 wrong usage.",
		"tabard login -a http://127.0.0.1:8470 --apikey @data/owner.json\ntabard iam trusted-profiles")
	root.Version = version()
	root.SetVersionTemplate("tabard {{.Version}}\n")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.AddCommand(sessionCommands()...)
	root.AddCommand(iamCommands(), isCommands(), resourceCommands(), ksCommands(), hostCommands(), activityCommands(), accountCommands(),
		accountCreateCommand("account-create NAME --owner-email EMAIL", "tabard account-create acme --owner-email ada@example.com --file acme.json"))
	for _, c := range extra {
		parent := root
		for _, g := range root.Commands() {
			if g.Name() == c.Annotations[groupAnnotation] {
				parent = g
			}
		}
		parent.AddCommand(c)
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{nearFlags(c, err)} })
	return root
}

const groupAnnotation = "tabard.dev/group"

// In has an extra command stand in one of the client's groups, such as ks, and
// not at the root.
func In(group string, c *cobra.Command) *cobra.Command {
	if c.Annotations == nil {
		c.Annotations = map[string]string{}
	}
	c.Annotations[groupAnnotation] = group
	return c
}

// nearFlags adds to the error of an unknown flag which ones it may have been
// meant for.
func nearFlags(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() != "" {
		return err
	}
	var near []string
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && len(near) < maxNear && nearby(f.Name, unknown.GetSpecifiedName()) {
			near = append(near, "--"+f.Name)
		}
	})
	return fmt.Errorf("%w%s", err, didYouMean(near))
}

// Execute runs the program with the arguments that follow its name and returns
// its exit code. What went wrong is on stderr.
func Execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, extra ...*cobra.Command) int {
	root := New(extra...)
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	// Whatever fails before a command's own code runs is a mistake in the call:
	// cobra has no kind of error for it.
	running := false
	each(root, func(c *cobra.Command) {
		switch run, plain := c.RunE, c.Run; {
		case run != nil:
			c.RunE = func(c *cobra.Command, args []string) error { running = true; return run(c, args) }
		case plain != nil:
			c.Run = func(c *cobra.Command, args []string) { running = true; plain(c, args) }
		}
	})
	called, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	var child childExit
	if errors.As(err, &child) {
		return int(child)
	}
	if errors.Is(err, errInterrupted) {
		fmt.Fprintln(stderr, errInterrupted)
		return exitFailed
	}
	var usage usageError
	if !running || errors.As(err, &usage) {
		fmt.Fprintf(stderr, "Incorrect usage: %s\n", plainLines(err.Error()))
		if !called.HasSubCommands() {
			fmt.Fprintf(stderr, "Usage: %s\n", called.UseLine())
		}
		fmt.Fprintf(stderr, "See: %s --help\n", called.CommandPath())
		return exitUsage
	}
	printFailure(stderr, err)
	return exitFailed
}

func each(c *cobra.Command, f func(*cobra.Command)) {
	f(c)
	for _, sub := range c.Commands() {
		each(sub, f)
	}
}

// group returns a command that only holds others. Unlike cobra's default it
// refuses a word that it does not know.
func group(use, short, long, example string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Example: indent(example),
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := ""
			// Everything begins with nothing.
			if args[0] != "" {
				hint = didYouMean(c.SuggestionsFor(args[0]))
			}
			return Usage("unknown command %q of %q%s", args[0], c.CommandPath(), hint)
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.SuggestionsMinimumDistance = 2
	c.AddCommand(subs...)
	return c
}

// spec describes a command.
type spec struct {
	use, short string
	more       string // what else there is to say after short
	example    string
	args       cobra.PositionalArgs // nil means none
	flags      func(*pflag.FlagSet)
	run        func(s *session, args []string) error
}

// command returns a command that needs a session.
func (p spec) command() *cobra.Command {
	return p.bare(func(c *cobra.Command, args []string) error {
		s, err := open(c)
		if err != nil {
			return err
		}
		return p.run(s, args)
	})
}

// bare returns a command with another way to run.
func (p spec) bare(run func(*cobra.Command, []string) error) *cobra.Command {
	if p.args == nil {
		p.args = cobra.NoArgs
	}
	long := p.short + "."
	if p.more != "" {
		long += "\n\n" + p.more
	}
	c := &cobra.Command{Use: p.use, Short: p.short, Long: long, Example: indent(p.example), Args: naming(p.args), RunE: run}
	if p.flags != nil {
		p.flags(c.Flags())
	}
	outputFlags(c.Flags())
	return c
}

// naming makes a check of arguments tell which are missing, by their names in
// the command's usage line.
func naming(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		err := check(c, args)
		var usage usageError
		if err == nil || errors.As(err, &usage) {
			return err
		}
		names := operands(c.Use)
		if len(args) < len(names) {
			return Usage("missing %s", strings.Join(names[len(args):], ", "))
		}
		if len(args) > len(names) {
			return Usage("unexpected argument %q", args[len(args)-1])
		}
		return err
	}
}

// operands returns the names of the arguments that a usage line demands: what
// follows the command's name and is neither optional nor about flags.
func operands(use string) []string {
	var names []string
	depth, word, value := 0, "", false
	end := func() {
		word = strings.TrimSuffix(word, "...")
		if strings.HasPrefix(word, "(") {
			word = strings.TrimSuffix(word[1:], ")")
		}
		flag := strings.HasPrefix(word, "-") && word != "--"
		if word != "" && !value && !flag && !strings.HasPrefix(word, "[") && !strings.Contains(word, "--") {
			names = append(names, word)
		}
		word, value = "", flag
	}
	for _, r := range use {
		switch r {
		case '(', '[':
			depth++
		case ')', ']':
			depth--
		}
		if r == ' ' && depth == 0 {
			end()
			continue
		}
		word += string(r)
	}
	end()
	return names[1:]
}

func didYouMean(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "; did you mean " + strings.Join(names, " or ") + "?"
}

func indent(s string) string { return "  " + strings.ReplaceAll(s, "\n", "\n  ") }

// outputFlags are what every command understands.
func outputFlags(f *pflag.FlagSet) {
	f.VarP(new(format), "output", "o", "print API objects as `JSON` instead of text")
	f.BoolP("quiet", "q", false, "leave out the lines that tell of progress")
}

// format is the value of --output.
type format string

func (f *format) String() string { return string(*f) }

// Type names the value in help texts.
func (f *format) Type() string { return "format" }

// Set accepts json in any case, which is the only format there is.
func (f *format) Set(s string) error {
	if !strings.EqualFold(s, "json") {
		return fmt.Errorf("unknown format %q, want json", s)
	}
	*f = "json"
	return nil
}

// oneOf is the value of a flag with a fixed set of values, of any case.
type oneOf struct {
	value   *string
	allowed []string
}

func choice(f *pflag.FlagSet, p *string, name, value, usage string, allowed ...string) {
	choiceP(f, p, name, "", value, usage, allowed...)
}

// choiceP is choice with a short name.
func choiceP(f *pflag.FlagSet, p *string, name, short, value, usage string, allowed ...string) {
	*p = value
	f.VarP(&oneOf{p, allowed}, name, short, usage+": "+strings.Join(allowed, ", "))
}

func (o *oneOf) String() string {
	if o.value == nil {
		return ""
	}
	return *o.value
}

// Type names the value in help texts.
func (o *oneOf) Type() string { return "string" }

// Set accepts the allowed values.
func (o *oneOf) Set(s string) error {
	i := slices.IndexFunc(o.allowed, func(a string) bool { return strings.EqualFold(a, s) })
	if i < 0 {
		return fmt.Errorf("want one of %s", strings.Join(o.allowed, ", "))
	}
	*o.value = o.allowed[i]
	return nil
}

// alias lets a flag be given by an older or shorter name too.
func alias(f *pflag.FlagSet, name string, others ...string) {
	for _, other := range others {
		flag := *f.Lookup(name)
		flag.Name, flag.Shorthand, flag.Hidden = other, "", true
		f.AddFlag(&flag)
	}
}

// Version of the program. A release sets it at link time, with
// -ldflags "-X tabard.dev/tabard/internal/cli.Version=v1.2.3"; without one the
// program's version is what the Go toolchain recorded.
var Version = ""

func version() string {
	if Version != "" {
		return Version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
