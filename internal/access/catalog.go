package access

import (
	_ "embed"
	"fmt"
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
// does not change after it was parsed.
type Catalog struct {
	services []*Service
	byName   map[string]*Service
	roles    map[string]*Role // by CRN
	common   map[string]actionSet
	plans    map[string]*Plan
}

// Service is one service that policies can be about.
type Service struct {
	Name        string
	DisplayName string
	Kind        string // KindService or KindPlatform
	Roles       []*Role
	Plans       []*Plan
	grants      map[string]actionSet // by role CRN, common actions included
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
	Service     string
}

type actionSet map[string]struct{}

// PlatformRoles are the four roles that every service has.
var PlatformRoles = []string{"Viewer", "Operator", "Editor", "Administrator"}

// commonServiceRoles have one CRN for all services that offer them.
var commonServiceRoles = []string{"Reader", "Writer", "Manager"}

// PlatformRoleCRN returns the CRN of a platform role.
func PlatformRoleCRN(name string) string { return "crn:v1:bluemix:public:iam::::role:" + name }

// ServiceRoleCRN returns the CRN of a service role: a common one (Reader,
// Writer, Manager) or one that the service defines.
func ServiceRoleCRN(service, display string) string {
	if slices.Contains(commonServiceRoles, display) {
		return "crn:v1:bluemix:public:iam::::serviceRole:" + display
	}
	return "crn:v1:bluemix:public:" + service + "::::serviceRole:" + strings.ReplaceAll(display, " ", "")
}

// catalogFile is the form of services.yaml.
type catalogFile struct {
	Common   map[string]roleFile `yaml:"common"`
	Services []serviceFile       `yaml:"services"`
}

type serviceFile struct {
	Name         string              `yaml:"name"`
	DisplayName  string              `yaml:"display_name"`
	Kind         string              `yaml:"kind"`
	Roles        map[string]roleFile `yaml:"roles"`         // platform roles
	ServiceRoles map[string]roleFile `yaml:"service_roles"` // by display name
	Plans        []*Plan             `yaml:"plans"`
}

type roleFile struct {
	Description string   `yaml:"description"`
	Extends     []string `yaml:"extends"` // other roles of the same table
	Actions     []string `yaml:"actions"`
}

// ParseCatalog reads catalog data. Unknown keys, unknown kinds, doubled names
// and roles that extend each other in a circle are errors.
func ParseCatalog(data []byte) (*Catalog, error) {
	var f catalogFile
	if err := yaml.UnmarshalWithOptions(data, &f, yaml.Strict()); err != nil {
		return nil, fmt.Errorf("service catalog: %w", err)
	}
	c := &Catalog{byName: map[string]*Service{}, roles: map[string]*Role{}, common: map[string]actionSet{}, plans: map[string]*Plan{}}
	for name, role := range f.Common {
		actions, err := resolve(f.Common, name, nil)
		if err != nil {
			return nil, fmt.Errorf("service catalog: common role %s: %w", name, err)
		}
		display := name
		crn := ServiceRoleCRN("iam", display)
		system := slices.Contains(PlatformRoles, name)
		if system {
			crn = PlatformRoleCRN(name)
		} else if !slices.Contains(commonServiceRoles, name) {
			return nil, fmt.Errorf("service catalog: common role %s is neither a platform role nor Reader, Writer or Manager", name)
		}
		c.common[crn] = actions
		c.roles[crn] = &Role{CRN: crn, DisplayName: display, Description: role.Description, System: system}
	}
	for _, name := range append(slices.Clone(PlatformRoles), commonServiceRoles...) {
		if _, ok := f.Common[name]; !ok {
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

func (c *Catalog) add(sf serviceFile) error {
	if sf.Name == "" || c.byName[sf.Name] != nil {
		return fmt.Errorf("name is empty or taken")
	}
	if sf.Kind != KindService && sf.Kind != KindPlatform {
		return fmt.Errorf("kind %q is not %s or %s", sf.Kind, KindService, KindPlatform)
	}
	s := &Service{Name: sf.Name, DisplayName: sf.DisplayName, Kind: sf.Kind, Plans: sf.Plans, grants: map[string]actionSet{}}
	for _, name := range PlatformRoles {
		own, err := resolve(sf.Roles, name, nil)
		if err != nil {
			return err
		}
		crn := PlatformRoleCRN(name)
		s.grants[crn] = union(c.common[crn], own)
		s.Roles = append(s.Roles, c.roles[crn])
	}
	for name := range sf.Roles {
		if !slices.Contains(PlatformRoles, name) {
			return fmt.Errorf("%s is not a platform role", name)
		}
	}
	names := make([]string, 0, len(sf.ServiceRoles))
	for name := range sf.ServiceRoles {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		own, err := resolve(sf.ServiceRoles, name, nil)
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
	for _, p := range sf.Plans {
		if p.ID == "" || p.Name == "" || c.plans[p.ID] != nil {
			return fmt.Errorf("plan %q has no id or name, or its id is taken", p.Name)
		}
		p.Service = sf.Name
		c.plans[p.ID] = p
	}
	c.services = append(c.services, s)
	c.byName[s.Name] = s
	return nil
}

// resolve returns the actions of a role with those of the roles it extends.
func resolve(table map[string]roleFile, name string, path []string) (actionSet, error) {
	if slices.Contains(path, name) {
		return nil, fmt.Errorf("role %s extends itself", name)
	}
	role := table[name]
	out := actionSet{}
	for _, a := range role.Actions {
		out[a] = struct{}{}
	}
	for _, base := range role.Extends {
		if _, ok := table[base]; !ok {
			return nil, fmt.Errorf("role %s extends %s, which does not exist", name, base)
		}
		actions, err := resolve(table, base, append(path, name))
		if err != nil {
			return nil, err
		}
		out = union(out, actions)
	}
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
	out := make([]string, 0, len(set))
	for a := range set {
		out = append(out, a)
	}
	slices.Sort(out)
	return out
}

// RolesOf returns the roles that a policy about the service may grant:
// platform roles first. Services without roles of their own, and names the
// catalog does not know, have the common ones.
func (c *Catalog) RolesOf(service string) (system, own []*Role) {
	if s, ok := c.Service(service); ok {
		for _, r := range s.Roles {
			if r.System {
				system = append(system, r)
			} else {
				own = append(own, r)
			}
		}
		return system, own
	}
	for _, name := range PlatformRoles {
		system = append(system, c.roles[PlatformRoleCRN(name)])
	}
	for _, name := range commonServiceRoles {
		own = append(own, c.roles[ServiceRoleCRN("", name)])
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
