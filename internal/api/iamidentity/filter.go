package iamidentity

import (
	"slices"
	"strings"
	"unicode/utf8"

	"tabard.dev/tabard/internal/fault"
)

// Bounds of our own on a filter. A list tests every object that it could show.
const (
	maxFilter      = 2000 // bytes
	maxFilterTerms = 50
	maxFilterDepth = 20 // parentheses inside each other
)

// predicate is a filter as it was understood. It is given the attributes of an
// object one by one.
type predicate func(attribute func(name string) string) bool

// comparisons are the operators of the filter language: the SCIM ones on parts
// of a text, and each once more without regard to case. There is no eq
// (reference/iam-identity.md section 4.1).
var comparisons = map[string]func(value, part string) bool{
	"sw": strings.HasPrefix, "ew": strings.HasSuffix, "co": strings.Contains,
}

// parseFilter reads a filter such as
//
//	name co "Foo" and (description sw "Bar" or description ew_ci "baz")
//
// over the given attributes. "and" binds more tightly than "or". A quotation
// mark or backslash inside a literal has a backslash before it. An empty text
// admits everything.
func parseFilter(text string, attributes ...string) (predicate, error) {
	if text == "" {
		return func(func(string) string) bool { return true }, nil
	}
	p := &filterParser{rest: text, attributes: attributes}
	if len(text) > maxFilter || !utf8.ValidString(text) {
		return nil, p.fail("it must be text of at most %d bytes", maxFilter)
	}
	is, err := p.or()
	if err != nil {
		return nil, err
	}
	if p.skip(); p.rest != "" {
		return nil, p.fail("%q follows where it could end", clip(p.rest))
	}
	return is, nil
}

type filterParser struct {
	rest         string
	attributes   []string
	terms, depth int
}

func (p *filterParser) fail(format string, args ...any) error {
	return fault.New(fault.Invalid, "invalid_parameter", "The parameter filter cannot be read: "+format+".", args...).
		OnParameter("filter", "")
}

// clip shortens what the caller wrote for a message about it.
func clip(s string) string {
	const most = 20
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most]) + "…"
}

func (p *filterParser) skip() { p.rest = strings.TrimLeft(p.rest, " \t") }

// word takes the next run of letters, digits, "_" and ".", or nothing.
func (p *filterParser) word() string {
	p.skip()
	end := strings.IndexFunc(p.rest, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '.'
	})
	if end < 0 {
		end = len(p.rest)
	}
	w := p.rest[:end]
	p.rest = p.rest[end:]
	return w
}

// keyword takes the next word when it is the one asked for.
func (p *filterParser) keyword(want string) bool {
	before := p.rest
	if strings.EqualFold(p.word(), want) {
		return true
	}
	p.rest = before
	return false
}

func (p *filterParser) or() (predicate, error) {
	return p.series("or", p.and, func(all []predicate) predicate {
		return func(of func(string) string) bool {
			return slices.ContainsFunc(all, func(is predicate) bool { return is(of) })
		}
	})
}

func (p *filterParser) and() (predicate, error) {
	return p.series("and", p.primary, func(all []predicate) predicate {
		return func(of func(string) string) bool {
			return !slices.ContainsFunc(all, func(is predicate) bool { return !is(of) })
		}
	})
}

func (p *filterParser) series(between string, part func() (predicate, error), join func([]predicate) predicate) (predicate, error) {
	var all []predicate
	for {
		is, err := part()
		if err != nil {
			return nil, err
		}
		all = append(all, is)
		if !p.keyword(between) {
			break
		}
	}
	if len(all) == 1 {
		return all[0], nil
	}
	return join(all), nil
}

func (p *filterParser) primary() (predicate, error) {
	p.skip()
	inner, ok := strings.CutPrefix(p.rest, "(")
	if !ok {
		return p.term()
	}
	if p.depth++; p.depth > maxFilterDepth {
		return nil, p.fail("at most %d parentheses can be open", maxFilterDepth)
	}
	p.rest = inner
	is, err := p.or()
	if err != nil {
		return nil, err
	}
	p.skip()
	if p.rest, ok = strings.CutPrefix(p.rest, ")"); !ok {
		return nil, p.fail("a parenthesis is not closed")
	}
	p.depth--
	return is, nil
}

func (p *filterParser) term() (predicate, error) {
	if p.terms++; p.terms > maxFilterTerms {
		return nil, p.fail("it can have at most %d comparisons", maxFilterTerms)
	}
	name := strings.ToLower(p.word())
	if !slices.Contains(p.attributes, name) {
		return nil, p.fail("a comparison must begin with one of %s", strings.Join(p.attributes, ", "))
	}
	operator, fold := strings.CutSuffix(strings.ToLower(p.word()), "_ci")
	compare, ok := comparisons[operator]
	if !ok {
		return nil, p.fail("after %s must come one of sw, sw_ci, ew, ew_ci, co, co_ci", name)
	}
	part, err := p.literal()
	if err != nil {
		return nil, err
	}
	if !fold {
		return func(of func(string) string) bool { return compare(of(name), part) }, nil
	}
	part = strings.ToLower(part)
	return func(of func(string) string) bool { return compare(strings.ToLower(of(name)), part) }, nil
}

func (p *filterParser) literal() (string, error) {
	p.skip()
	rest, ok := strings.CutPrefix(p.rest, `"`)
	if !ok {
		return "", p.fail("a text must stand in quotation marks")
	}
	var b strings.Builder
	for i := 0; i < len(rest); i++ {
		switch rest[i] {
		case '"':
			p.rest = rest[i+1:]
			return b.String(), nil
		case '\\':
			if i++; i == len(rest) || rest[i] != '"' && rest[i] != '\\' {
				return "", p.fail(`a backslash must have " or \ after it`)
			}
		}
		b.WriteByte(rest[i])
	}
	return "", p.fail("a text has no closing quotation mark")
}
