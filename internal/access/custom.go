package access

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/object"
)

// Limits on what an account adds to the catalog. Those of custom roles are
// published (reference/access-and-audit.md section 1.13); those of services
// are ours.
const (
	MaxCustomRolesPerAccount = 40
	MaxActionsPerRole        = 1000
	MaxServicesPerAccount    = 100
	MaxActionsPerService     = 1000
	MaxRolesPerService       = 50
	MaxPlansPerService       = 50
	MaxGrantsPerService      = 10_000 // actions of all roles together, those of the roles that they extend included
)

// CustomRole is a role that an account has made for one service
// (reference/access-and-audit.md section 1.9).
type CustomRole struct {
	object.Meta
	ID          string   `json:"id"`
	AccountID   string   `json:"account_id"`
	Name        string   `json:"name"` // letters and digits, a capital first; unique in the account
	DisplayName string   `json:"display_name"`
	Description string   `json:"description,omitempty"`
	Service     string   `json:"service_name"`
	Actions     []string `json:"actions"`
}

// CRN names the role in policies.
func (r *CustomRole) CRN() string {
	return "crn:v1:bluemix:public:iam-access-management::a/" + r.AccountID + "::customRole:" + r.Name
}

// RegisteredService is a service that an account has added to the catalog. It
// is known in that account alone.
type RegisteredService struct {
	object.Meta
	AccountID string `json:"account_id"`
	Definition
}

// reserved are names that a registered service must not have: they stand for
// something else in role CRNs or in requests.
var reserved = []string{"iam", "alliamserviceroles", "bluemix", "tabard"}

// conflicts reports whether the service's name or one of its plans is taken in
// a catalog.
func (s *RegisteredService) conflicts(c *Catalog) error {
	if _, taken := c.byName[s.Name]; taken || slices.Contains(reserved, s.Name) {
		return fmt.Errorf("the name %s is taken", s.Name)
	}
	for _, p := range s.PlanList {
		if _, taken := c.plans[p.ID]; taken {
			return fmt.Errorf("the plan id %s is taken", p.ID)
		}
	}
	return nil
}

// Validate checks a service that an account wants to register against the
// built-in catalog. The error's text is for the caller.
func (s *RegisteredService) Validate(builtin *Catalog) error {
	if !plainName(s.Name, 2, 100) {
		return fmt.Errorf("name %q must have 2 to 100 lower-case letters, digits and hyphens, a letter first", s.Name)
	}
	if err := s.conflicts(builtin); err != nil {
		return err
	}
	if len(s.Actions) == 0 {
		return errors.New("actions is required: list what can be done in the service, such as " + s.Name + ".document.read")
	}
	if len(s.Actions) > MaxActionsPerService || len(s.Platform)+len(s.ServiceRoles) > MaxRolesPerService || len(s.PlanList) > MaxPlansPerService || len(s.Attributes) > MaxRolesPerService {
		return fmt.Errorf("a service has at most %d actions, %d roles, %d attributes and %d plans", MaxActionsPerService, MaxRolesPerService, MaxRolesPerService, MaxPlansPerService)
	}
	known := map[string]bool{}
	for _, a := range s.Actions {
		rest, own := strings.CutPrefix(a.ID, s.Name+".")
		if !own || rest == "" || len(a.ID) > 200 || strings.ContainsFunc(a.ID, func(r rune) bool { return !nameRune(r) && r != '.' && r != '_' && (r < 'A' || r > 'Z') }) {
			return fmt.Errorf("action %q must begin with %s. and have letters, digits, and . - _ only", a.ID, s.Name)
		}
		if known[a.ID] {
			return fmt.Errorf("action %s stands twice", a.ID)
		}
		known[a.ID] = true
	}
	for _, table := range []map[string]RoleDefinition{s.Platform, s.ServiceRoles} {
		for name, role := range table {
			if !printable(name, 50) || strings.TrimSpace(name) != name {
				return fmt.Errorf("role name %q must have 1 to 50 printable characters, no space at either end", name)
			}
			if len(role.Extends) > MaxRolesPerService {
				return fmt.Errorf("role %s extends more than %d roles", name, MaxRolesPerService)
			}
			for _, a := range role.Actions {
				if !known[a] {
					return fmt.Errorf("role %s has the action %s, which is not among the service's actions", name, a)
				}
			}
		}
	}
	seen := map[string]bool{}
	for name := range s.ServiceRoles {
		if slices.Contains(PlatformRoles, name) {
			return fmt.Errorf("%s is a platform role; put it under roles", name)
		}
		crn := ServiceRoleCRN(s.Name, name)
		if seen[crn] || strings.Contains(name, ":") {
			return fmt.Errorf("role %q has a colon, or the same name as another one but for its spaces", name)
		}
		seen[crn] = true
	}
	for _, a := range s.Attributes {
		if !printable(a.Name, 100) || strings.ContainsAny(a.Name, "{}") {
			return fmt.Errorf("attribute name %q must have 1 to 100 printable characters, without braces", a.Name)
		}
	}
	for _, text := range append([]string{s.DisplayName, s.Description}, s.texts()...) {
		if text != "" && !printable(text, 1000) {
			return fmt.Errorf("%.40q must have at most 1000 characters, none of them a control character", text)
		}
	}
	if s.Platform == nil && s.ServiceRoles == nil {
		return errors.New("roles or service_roles is required: without a role nobody can be granted an action")
	}
	probe := &Catalog{byName: map[string]*Service{}, roles: map[string]*Role{}, common: builtin.common, plans: map[string]*Plan{}}
	for crn, r := range builtin.roles {
		probe.roles[crn] = r
	}
	if err := probe.add(s.Definition); err != nil {
		return err
	}
	grants := 0
	for _, table := range []map[string]RoleDefinition{s.Platform, s.ServiceRoles} {
		r := resolve(table)
		for name := range table {
			actions, err := r.actions(name)
			if err != nil {
				return err
			}
			grants += len(actions)
		}
	}
	if grants > MaxGrantsPerService {
		return fmt.Errorf("the roles have %d actions together, those of the roles that they extend included, and may have %d", grants, MaxGrantsPerService)
	}
	return nil
}

func (s *RegisteredService) texts() []string {
	var out []string
	for _, a := range s.Actions {
		out = append(out, a.DisplayName, a.Description)
	}
	for _, a := range s.Attributes {
		out = append(out, a.DisplayName, a.Description)
	}
	for _, table := range []map[string]RoleDefinition{s.Platform, s.ServiceRoles} {
		for _, r := range table {
			out = append(out, r.Description)
		}
	}
	for _, p := range s.PlanList {
		out = append(out, p.ID, p.Name)
	}
	return out
}

// Validate checks a custom role against the catalog of its account. The
// error's text is for the caller. Whether an equal role exists is for the
// caller to see.
func (r *CustomRole) Validate(c *Catalog) error {
	if len(r.Name) == 0 || len(r.Name) > 30 || r.Name[0] < 'A' || r.Name[0] > 'Z' ||
		strings.ContainsFunc(r.Name, func(x rune) bool { return (x < 'a' || x > 'z') && (x < 'A' || x > 'Z') && (x < '0' || x > '9') }) {
		return fmt.Errorf("name %q must have 1 to 30 letters and digits, a capital letter first", r.Name)
	}
	if !printable(r.DisplayName, 50) {
		return errors.New("display_name must have 1 to 50 characters, none of them a control character")
	}
	if r.Description != "" && !printable(r.Description, 250) {
		return errors.New("description must have at most 250 characters, none of them a control character")
	}
	s, ok := c.byName[r.Service]
	if !ok {
		return fmt.Errorf("service_name %q is not a service that the account knows", r.Service)
	}
	if len(r.Actions) == 0 || len(r.Actions) > MaxActionsPerRole {
		return fmt.Errorf("actions must have 1 to %d entries", MaxActionsPerRole)
	}
	own := false
	for i, a := range r.Actions {
		if slices.Contains(r.Actions[:i], a) {
			return fmt.Errorf("action %s stands twice", a)
		}
		if !s.HasAction(a) {
			return fmt.Errorf("action %q is not one of service %s; see its roles with GET /v2/roles?service_name=%[2]s", a, r.Service)
		}
		own = own || strings.HasPrefix(a, r.Service+".")
	}
	if !own {
		return fmt.Errorf("at least one action must be of service %s itself", r.Service)
	}
	return nil
}

func nameRune(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' }

// plainName reports whether s is a lower-case name: a letter, then letters,
// digits and hyphens.
func plainName(s string, shortest, longest int) bool {
	return len(s) >= shortest && len(s) <= longest && s[0] >= 'a' && s[0] <= 'z' &&
		!strings.ContainsFunc(s, func(r rune) bool { return !nameRune(r) })
}

// printable reports whether s has 1 to n characters, none of them a control
// character.
func printable(s string, n int) bool {
	count := 0
	for _, r := range s {
		if count++; count > n || r < ' ' || r == 0x7f || r == '\uFFFD' {
			return false
		}
	}
	return count > 0
}
