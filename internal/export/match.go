package export

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

// Match says which events a route is for. An empty list takes all.
type Match struct {
	Actions       []string `yaml:"actions"`        // exact, or with a trailing * for all that begin so
	ExceptActions []string `yaml:"except_actions"` // the same; they win
	Severities    []string `yaml:"severities"`
	Outcomes      []string `yaml:"outcomes"`
	Accounts      []string `yaml:"accounts"` // ids
}

// Check reports what can match nothing, or not what it looks like.
func (m *Match) Check() error {
	var errs []error
	for _, list := range []struct {
		name    string
		actions []string
	}{{"actions", m.Actions}, {"except_actions", m.ExceptActions}} {
		for _, a := range list.actions {
			if prefix := strings.TrimSuffix(a, "*"); a == "" || strings.ContainsAny(prefix, "* \t\n") {
				errs = append(errs, fmt.Errorf("%s: %q is neither an action nor the beginning of one with a * at its end", list.name, a))
			}
		}
	}
	among := func(name string, values []string, known ...string) {
		for _, v := range values {
			if !slices.Contains(known, v) {
				errs = append(errs, fmt.Errorf("%s: %q is not one of %s", name, v, strings.Join(known, ", ")))
			}
		}
	}
	among("severities", m.Severities, activity.Normal, activity.Warning, activity.Critical)
	among("outcomes", m.Outcomes, activity.Success, activity.Failure)
	if slices.Contains(m.Accounts, "") {
		errs = append(errs, errors.New("accounts: an id is empty"))
	}
	return errors.Join(errs...)
}

// Takes reports whether the route is for an event.
func (m *Match) Takes(e *store.Event) bool {
	return in(m.Severities, e.Severity) && in(m.Outcomes, e.Outcome) && in(m.Accounts, e.AccountID) &&
		(len(m.Actions) == 0 || begins(m.Actions, e.Action)) && !begins(m.ExceptActions, e.Action)
}

func in(list []string, value string) bool { return len(list) == 0 || slices.Contains(list, value) }

func begins(patterns []string, action string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, open := strings.CutSuffix(p, "*")
		return p == action || open && strings.HasPrefix(action, prefix)
	})
}
