package access

import (
	"cmp"
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
)

//go:embed services.yaml
var builtin []byte

// Builtin is the catalog data that ships with the server.
func Builtin() []byte { return builtin }

// Kinds of service (the attribute serviceType).
const (
	KindService  = "service"
	KindPlatform = "platform_service"
)

// Catalog knows the services, their roles and the actions of each role. It
// does not change after it was made; an account's own services and roles make
// another one (see [Catalog.With]).
type Catalog struct {
	services []*Service
	byName   map[string]*Service
	roles    map[string]*Role // by CRN
	common   map[string]actionSet
	plans    map[string]*Plan
	made     map[*RegisteredService]*Service // before custom roles joined them
}

// Service is one service that policies can be about.
type Service struct {
	Definition
	Roles []*Role
	Plans []*Plan

	grants map[string]actionSet // by role CRN, common actions included
}

// Plan is what a resource instance of a service is created with.
type Plan struct {
	ID          string `yaml:"id" json:"id"`
	Name        string `yaml:"name" json:"name"`
	Reclamation bool   `yaml:"reclamation" json:"reclamation"`
	Service     string `yaml:"-" json:"service_name"`
}

// Role is a named set of actions. System roles (Viewer, Operator, Editor,
// Administrator, Reader, Writer, Manager) exist for every service with that
// service's own actions; the others belong to one service.
type Role struct {
	CRN         string
	DisplayName string
	Description string
	System      bool // a platform role
	Custom      bool // made by the account
	Service     string
}

type actionSet map[string]struct{}

// PlatformRoles are the four roles that every service has.
var PlatformRoles = []string{"Viewer", "Operator", "Editor", "Administrator"}

// commonServiceRoles have one CRN for all services that offer them.
var commonServiceRoles = []string{"Reader", "Writer", "Manager", DecisionPoint}

// DecisionPoint is the role of a service that asks for decisions about its own
// resources. It allows nothing but the asking.
const DecisionPoint = "Decision Point"

// ActionDecide is the action of asking for a decision about a service.
const ActionDecide = "iam.decision.evaluate"

// PlatformRoleCRN returns the CRN of a platform role.
func PlatformRoleCRN(name string) string { return "crn:v1:bluemix:public:iam::::role:" + name }

// ServiceRoleCRN returns the CRN of a service role: a common one (Reader,
// Writer, Manager) or one that the service defines.
func ServiceRoleCRN(service, display string) string {
	if slices.Contains(commonServiceRoles, display) {
		service = "iam"
	}
	return "crn:v1:bluemix:public:" + service + "::::serviceRole:" + strings.ReplaceAll(display, " ", "")
}

// catalogFile is the form of services.yaml.
type catalogFile struct {
	Common   map[string]RoleDefinition `yaml:"common"`
	Services []Definition              `yaml:"services"`
}

// Definition is a service as its owner describes it, in the catalog's data file
// or when an account registers a service of its own.
type Definition struct {
	Name         string                    `yaml:"name" json:"name"`
	DisplayName  string                    `yaml:"display_name" json:"display_name,omitempty"`
	Kind         string                    `yaml:"kind" json:"kind"` // KindService or KindPlatform
	Description  string                    `yaml:"description" json:"description,omitempty"`
	Actions      []ActionDefinition        `yaml:"actions" json:"actions,omitempty"` // may be left out in the built-in catalog
	Attributes   []AttributeDefinition     `yaml:"attributes" json:"attributes,omitempty"`
	Platform     map[string]RoleDefinition `yaml:"roles" json:"roles,omitempty"`                 // platform roles, by name
	ServiceRoles map[string]RoleDefinition `yaml:"service_roles" json:"service_roles,omitempty"` // by display name
	PlanList     []Plan                    `yaml:"plans" json:"plans,omitempty"`
}

// ActionDefinition is something that can be done in a service.
type ActionDefinition struct {
	ID          string `yaml:"id" json:"id"` // <service>.<type>.<verb>
	DisplayName string `yaml:"display_name" json:"display_name,omitempty"`
	Description string `yaml:"description" json:"description,omitempty"`
}

// AttributeDefinition is an attribute of a service's resources that policies
// can name beside those that every service knows.
type AttributeDefinition struct {
	Name        string `yaml:"name" json:"name"`
	DisplayName string `yaml:"display_name" json:"display_name,omitempty"`
	Description string `yaml:"description" json:"description,omitempty"`
}

// RoleDefinition lists a role's actions, and the roles of the same table whose
// actions it has as well.
type RoleDefinition struct {
	Description string   `yaml:"description" json:"description,omitempty"`
	Extends     []string `yaml:"extends" json:"extends,omitempty"`
	Actions     []string `yaml:"actions" json:"actions,omitempty"`
}

// ParseCatalog reads catalog data. Unknown keys, unknown kinds, doubled names
// and roles that extend each other in a circle are errors.
func ParseCatalog(data []byte) (*Catalog, error) {
	var f catalogFile
	if err := yaml.UnmarshalWithOptions(data, &f, yaml.Strict()); err != nil {
		return nil, fmt.Errorf("service catalog: %w", err)
	}
	c := &Catalog{byName: map[string]*Service{}, roles: map[string]*Role{}, common: map[string]actionSet{}, plans: map[string]*Plan{}}
	common := resolve(f.Common)
	for name, role := range f.Common {
		actions, err := common.actions(name)
		if err != nil {
			return nil, fmt.Errorf("service catalog: common role %s: %w", name, err)
		}
		crn := ServiceRoleCRN("iam", name)
		system := slices.Contains(PlatformRoles, name)
		if system {
			crn = PlatformRoleCRN(name)
		} else if !slices.Contains(commonServiceRoles, name) {
			return nil, fmt.Errorf("service catalog: common role %s is neither a platform role nor one of %s", name, strings.Join(commonServiceRoles, ", "))
		}
		c.common[crn] = actions
		c.roles[crn] = &Role{CRN: crn, DisplayName: name, Description: role.Description, System: system}
	}
	for _, name := range append(slices.Clone(PlatformRoles), commonServiceRoles...) {
		if _, ok := f.Common[name]; !ok && name != DecisionPoint {
			return nil, fmt.Errorf("service catalog: common role %s is missing", name)
		}
	}
	for _, sf := range f.Services {
		if err := c.add(sf); err != nil {
			return nil, fmt.Errorf("service catalog: service %s: %w", sf.Name, err)
		}
	}
	return c, nil
}

func (c *Catalog) add(sf Definition) error {
	if sf.Name == "" || c.byName[sf.Name] != nil {
		return fmt.Errorf("name is empty or taken")
	}
	if sf.Kind != KindService && sf.Kind != KindPlatform {
		return fmt.Errorf("kind %q is not %s or %s", sf.Kind, KindService, KindPlatform)
	}
	s := &Service{Definition: sf, grants: map[string]actionSet{}}
	platform, service := resolve(sf.Platform), resolve(sf.ServiceRoles)
	for _, name := range PlatformRoles {
		own, err := platform.actions(name)
		if err != nil {
			return err
		}
		crn := PlatformRoleCRN(name)
		s.grants[crn] = union(c.common[crn], own)
		s.Roles = append(s.Roles, c.roles[crn])
	}
	for name := range sf.Platform {
		if !slices.Contains(PlatformRoles, name) {
			return fmt.Errorf("%s is not a platform role", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sf.ServiceRoles)) {
		own, err := service.actions(name)
		if err != nil {
			return err
		}
		crn := ServiceRoleCRN(sf.Name, name)
		role := c.roles[crn]
		if role == nil {
			role = &Role{CRN: crn, DisplayName: name, Description: sf.ServiceRoles[name].Description, Service: sf.Name}
			c.roles[crn] = role
		}
		s.grants[crn] = union(c.common[crn], own)
		s.Roles = append(s.Roles, role)
	}
	if err := s.ask(c); err != nil {
		return err
	}
	for _, p := range sf.PlanList {
		if p.ID == "" || p.Name == "" || c.plans[p.ID] != nil {
			return fmt.Errorf("plan %q has no id or name, or its id is taken", p.Name)
		}
		p.Service = sf.Name
		c.plans[p.ID] = &p
		s.Plans = append(s.Plans, &p)
	}
	c.services = append(c.services, s)
	c.byName[s.Name] = s
	return nil
}

// ask gives the service the role Decision Point, which every service has.
func (s *Service) ask(c *Catalog) error {
	crn := ServiceRoleCRN("iam", DecisionPoint)
	if _, own := s.ServiceRoles[DecisionPoint]; own {
		return fmt.Errorf("role %s is the same for all services", DecisionPoint)
	}
	if role, ok := c.roles[crn]; ok {
		s.grants[crn] = c.common[crn]
		s.Roles = append(s.Roles, role)
	}
	return nil
}

// With returns the catalog of an account: this one with the services that the
// account has registered and the roles that it has made. The receiver stays as
// it is. A service or role that does not fit any more, because a newer program
// brings one of the same name, is left out.
func (c *Catalog) With(services []*RegisteredService, roles []*CustomRole) *Catalog {
	return c.WithAgain(nil, services, roles)
}

// WithAgain is With for an account whose catalog before a change is at hand,
// or nil. It takes the services over that are the same objects still: to work
// out the actions of all roles of many services takes its time.
func (c *Catalog) WithAgain(before *Catalog, services []*RegisteredService, roles []*CustomRole) *Catalog {
	if len(services) == 0 && len(roles) == 0 {
		return c
	}
	out := &Catalog{
		services: slices.Clone(c.services), byName: maps.Clone(c.byName), roles: maps.Clone(c.roles),
		common: c.common, plans: maps.Clone(c.plans), made: map[*RegisteredService]*Service{},
	}
	services = slices.SortedFunc(slices.Values(services), func(a, b *RegisteredService) int { return cmp.Compare(a.Name, b.Name) })
	for _, s := range services {
		// add leaves roles behind when it fails halfway; a service that was
		// valid when it was registered fails only for its name or its plans,
		// which are looked at first.
		if s.conflicts(out) != nil {
			continue
		}
		if made := before.madeOf(s); made != nil {
			out.adopt(made)
		} else if out.add(s.Definition) != nil {
			continue
		}
		out.made[s] = out.byName[s.Name]
	}
	roles = slices.SortedFunc(slices.Values(roles), func(a, b *CustomRole) int { return cmp.Compare(a.Name, b.Name) })
	for _, r := range roles {
		s, ok := out.byName[r.Service]
		if !ok {
			continue
		}
		s = &Service{Definition: s.Definition, Plans: s.Plans, Roles: slices.Clone(s.Roles), grants: maps.Clone(s.grants)}
		role := &Role{CRN: r.CRN(), DisplayName: r.DisplayName, Description: r.Description, Service: r.Service, Custom: true}
		s.Roles = append(s.Roles, role)
		s.grants[role.CRN] = actionSet{}
		for _, a := range r.Actions {
			s.grants[role.CRN][a] = struct{}{}
		}
		out.roles[role.CRN] = role
		out.replace(s)
	}
	return out
}

func (c *Catalog) madeOf(s *RegisteredService) *Service {
	if c == nil {
		return nil
	}
	return c.made[s]
}

// adopt adds a service that another catalog over the same built-in one made.
func (c *Catalog) adopt(s *Service) {
	for _, r := range s.Roles {
		c.roles[r.CRN] = r
	}
	for _, p := range s.Plans {
		c.plans[p.ID] = p
	}
	c.services = append(c.services, s)
	c.byName[s.Name] = s
}

// Without returns the catalog as far as names and plans go without a service,
// to hold a new definition of that service against.
func (c *Catalog) Without(service string) *Catalog {
	out := &Catalog{byName: maps.Clone(c.byName), roles: c.roles, common: c.common, plans: maps.Clone(c.plans)}
	delete(out.byName, service)
	maps.DeleteFunc(out.plans, func(_ string, p *Plan) bool { return p.Service == service })
	return out
}

func (c *Catalog) replace(s *Service) {
	for i, old := range c.services {
		if old.Name == s.Name {
			c.services[i] = s
		}
	}
	c.byName[s.Name] = s
}

// resolver finds the actions of the roles of one table, each role once: a
// table whose roles extend each other many times over costs no more than its
// size.
type resolver struct {
	table map[string]RoleDefinition
	done  map[string]actionSet
	path  []string
}

func resolve(table map[string]RoleDefinition) *resolver {
	return &resolver{table: table, done: map[string]actionSet{}}
}

// actions returns the actions of a role with those of the roles it extends.
func (r *resolver) actions(name string) (actionSet, error) {
	if out, ok := r.done[name]; ok {
		return out, nil
	}
	if slices.Contains(r.path, name) {
		return nil, fmt.Errorf("role %s extends itself", name)
	}
	r.path = append(r.path, name)
	defer func() { r.path = r.path[:len(r.path)-1] }()
	role := r.table[name]
	out := actionSet{}
	for _, a := range role.Actions {
		out[a] = struct{}{}
	}
	for _, base := range role.Extends {
		if _, ok := r.table[base]; !ok {
			return nil, fmt.Errorf("role %s extends %s, which does not exist", name, base)
		}
		actions, err := r.actions(base)
		if err != nil {
			return nil, err
		}
		maps.Copy(out, actions)
	}
	r.done[name] = out
	return out, nil
}

func union(a, b actionSet) actionSet {
	out := make(actionSet, len(a)+len(b))
	for x := range a {
		out[x] = struct{}{}
	}
	for x := range b {
		out[x] = struct{}{}
	}
	return out
}

// Service returns a service by name. The child services of VPC (is.instance,
// is.vpc, …) are found as their parent.
func (c *Catalog) Service(name string) (*Service, bool) {
	if s, ok := c.byName[name]; ok {
		return s, true
	}
	parent, _, child := strings.Cut(name, ".")
	s, ok := c.byName[parent]
	return s, child && ok
}

// HasAction reports whether any role of the service contains the action.
func (s *Service) HasAction(action string) bool {
	for _, set := range s.grants {
		if _, ok := set[action]; ok {
			return true
		}
	}
	return false
}

// AllActions returns the sorted actions of all roles of the service.
func (s *Service) AllActions() []string {
	all := actionSet{}
	for _, set := range s.grants {
		all = union(all, set)
	}
	return slices.Sorted(maps.Keys(all))
}

// Services returns all services in the order of the data file.
func (c *Catalog) Services() []*Service { return c.services }

// Plan returns a plan by id.
func (c *Catalog) Plan(id string) (*Plan, bool) {
	p, ok := c.plans[id]
	return p, ok
}

// Role returns a role by CRN. Other cnames than the built-in one are accepted.
func (c *Catalog) Role(crn string) (*Role, bool) {
	r, ok := c.roles[CanonicalRole(crn)]
	return r, ok
}

// CanonicalRole rewrites the cname and ctype of a role CRN to the built-in
// ones, so that a policy written by a client that believes itself in another
// cloud still names our roles.
func CanonicalRole(roleCRN string) string {
	seg := strings.SplitN(roleCRN, ":", 5)
	if len(seg) != 5 {
		return roleCRN
	}
	seg[2], seg[3] = "bluemix", "public"
	return strings.Join(seg, ":")
}

// HasRole reports whether a policy about the service may grant the role. A
// service the catalog does not know has the platform and common service roles.
func (c *Catalog) HasRole(roleCRN, service string) bool {
	if _, ok := c.common[roleCRN]; ok {
		return true
	}
	role, ok := c.roles[roleCRN]
	if !ok {
		return false
	}
	s, ok := c.Service(service)
	return service == "" || ok && s.Name == role.Service
}

// Grants reports whether a role contains an action on a resource of a service.
func (c *Catalog) Grants(roleCRN, service, action string) bool {
	set := c.common[roleCRN]
	if s, ok := c.Service(service); ok {
		set = s.grants[roleCRN]
	}
	_, ok := set[action]
	return ok
}

// Actions returns the sorted actions of a role on a service's resources.
func (c *Catalog) Actions(roleCRN, service string) []string {
	set := c.common[roleCRN]
	if s, ok := c.Service(service); ok {
		set = s.grants[roleCRN]
	}
	return slices.Sorted(maps.Keys(set))
}

// RolesOf returns the roles that a policy about the service may grant:
// platform roles first. Services without roles of their own, and names the
// catalog does not know, have the common ones.
func (c *Catalog) RolesOf(service string) (system, own []*Role) {
	if s, ok := c.Service(service); ok {
		for _, r := range s.Roles {
			if r.System {
				system = append(system, r)
			} else if !r.Custom {
				own = append(own, r)
			}
		}
		return system, own
	}
	for _, name := range PlatformRoles {
		system = append(system, c.roles[PlatformRoleCRN(name)])
	}
	for _, name := range commonServiceRoles {
		if role, ok := c.roles[ServiceRoleCRN("", name)]; ok {
			own = append(own, role)
		}
	}
	return system, own
}

// KindOf returns the serviceType of a service: platform_service for account
// management services, else service.
func (c *Catalog) KindOf(service string) string {
	if s, ok := c.Service(service); ok {
		return s.Kind
	}
	return KindService
}
