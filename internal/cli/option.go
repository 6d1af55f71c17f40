package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
)

// option is a flag that becomes a field of a body. Without as, its text is the
// field's value.
type option struct {
	field
	values []string // that it can have, when they are fixed
	bare   string   // its value when it is given without one; then one needs an =
	as     func(s *session, text string) (any, error)
}

type options []option

// text returns options whose fields are what was given.
func text(fields ...field) options {
	out := make(options, len(fields))
	for i, f := range fields {
		out[i].field = f
	}
	return out
}

// choose returns an option with fixed values, which a flag takes in any case.
func choose(flag, name, usage string, values ...string) option {
	return option{field: field{flag: flag, name: name, usage: usage}, values: values}
}

// yesNo returns an option that is true or false.
func yesNo(flag, name, usage string) option {
	o := choose(flag, name, usage, "true", "false")
	o.as = func(_ *session, text string) (any, error) { return text == "true", nil }
	return o
}

// comma returns an option that is a list, comma-separated.
func comma(flag, short, name, usage string) option {
	return option{field: field{flag, short, name, usage + ", comma-separated"}, as: func(_ *session, text string) (any, error) {
		return splitList(text), nil
	}}
}

func splitList(text string) []string {
	out := []string{}
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}

// jsonText returns an option that is JSON, given as it is or as @FILE.
func jsonText(flag, short, name, usage string) option {
	return option{field: field{flag, short, name, usage + ", as `JSON` or @FILE"}, as: func(s *session, text string) (any, error) {
		text, err := fileOrText(s.cmd, text)
		if err != nil {
			return nil, during(err, "read --"+flag)
		}
		if !json.Valid([]byte(text)) {
			return nil, Usage("--%s is not JSON", flag)
		}
		return json.RawMessage(text), nil
	}}
}

// theID returns an option that names an object, whose id it becomes.
func theID(of *kind, flag, short, name, usage string) option {
	return option{field: field{flag, short, name, usage + ": name or ID"}, as: func(s *session, text string) (any, error) {
		return of.find(s, text)
	}}
}

// reader returns what a command's flags say: a body with the fields that were
// given, and no others.
type reader func(s *session) (map[string]any, error)

// add adds the flags of the options to those of a command.
func (o options) add(f *pflag.FlagSet) reader {
	given := make([]string, len(o))
	for i, opt := range o {
		if opt.values != nil {
			choice(f, &given[i], opt.flag, "", opt.usage, opt.values...)
			f.Lookup(opt.flag).NoOptDefVal = opt.bare
			continue
		}
		f.StringVarP(&given[i], opt.flag, opt.short, "", opt.usage)
	}
	return func(s *session) (map[string]any, error) {
		b := map[string]any{}
		for i, opt := range o {
			if !f.Changed(opt.flag) {
				continue
			}
			b[opt.name] = given[i]
			if opt.as == nil {
				continue
			}
			v, err := opt.as(s, given[i])
			if err != nil {
				return nil, err
			}
			b[opt.name] = v
		}
		return b, nil
	}
}

// flags names the flags of options, for the message that none was given.
func (o options) flags() string {
	names := make([]string, len(o))
	for i, opt := range o {
		names[i] = "--" + opt.flag
	}
	if n := len(names); n > 1 {
		return strings.Join(names[:n-1], ", ") + " or " + names[n-1]
	}
	return strings.Join(names, "")
}

// nothingToChange is what a change without a flag ends with.
func (o options) nothingToChange() error {
	return Usage("nothing to change: give %s", o.flags())
}

// expiry reads when something ends: a time, a date, or how long from now. An
// empty text means never.
func expiry(text string, now time.Time) (string, error) {
	if text == "" {
		return "", nil
	}
	for _, form := range []string{time.RFC3339, time.DateOnly, timeForm} {
		if t, err := time.Parse(form, text); err == nil {
			return t.UTC().Format(time.RFC3339), nil
		}
	}
	d, err := time.ParseDuration(text)
	if days, ok := strings.CutSuffix(text, "d"); ok {
		var n uint64
		if n, err = strconv.ParseUint(days, 10, 15); err == nil {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	if err != nil || d <= 0 {
		return "", errors.New("want a time such as 2027-01-02T18:30:00Z, a date such as 2027-01-02, or how long from now, such as 12h or 90d")
	}
	return now.Add(d).UTC().Format(time.RFC3339), nil
}

// bodyFile reads a JSON object from a file that a flag names, with or without @.
func bodyFile(s *session, what, path string) (map[string]any, error) {
	text, err := fileOrText(s.cmd, "@"+strings.TrimPrefix(path, "@"))
	if err != nil {
		return nil, during(err, "read "+what)
	}
	var b map[string]any
	if err := json.Unmarshal([]byte(text), &b); err != nil || b == nil {
		if err == nil {
			err = errors.New("it is null")
		}
		return nil, fmt.Errorf("%s in %s is not a JSON object: %w", what, path, err)
	}
	return b, nil
}

// keep puts fields of an old object into a body that lacks them, for changes
// that the API takes whole.
func keep(b map[string]any, old object, names ...string) {
	for _, name := range names {
		if v, ok := old.fields[name]; ok && !has(b, name) {
			b[name] = v
		}
	}
}

func has(b map[string]any, name string) bool {
	_, ok := b[name]
	return ok
}

// only leaves the named fields in a body.
func only(b map[string]any, names ...string) map[string]any {
	out := map[string]any{}
	for _, name := range names {
		if v, ok := b[name]; ok && v != nil {
			out[name] = v
		}
	}
	return out
}

// lacking refuses a command without one of these flags.
func lacking(f *pflag.FlagSet, names ...string) error {
	missing := slices.DeleteFunc(slices.Clone(names), f.Changed)
	if len(missing) == 0 {
		return nil
	}
	return Usage("missing --%s", strings.Join(missing, ", --"))
}
