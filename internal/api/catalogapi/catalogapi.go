// Package catalogapi is the API of the service catalog: what services policies
// can be about, and the registration of an account's own ones. It is ours; the
// wire protocol has no counterpart. What a definition must look like and how it
// joins the built-in catalog is package access's matter.
package catalogapi

import (
	"bytes"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

const (
	service = "iam-access-management"
	typeURI = "iam-access-management/service"
)

// Actions on the catalog.
const (
	actionRead   = "iam-access-management.service.read"
	actionCreate = "iam-access-management.service.create"
	actionUpdate = "iam-access-management.service.update"
	actionDelete = "iam-access-management.service.delete"
)

// Register adds the routes.
func Register(mux *http.ServeMux, cfg *api.Config) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Access Management", Shape: api.PlainShape}
	api.List(f, "GET /v1/services", actionRead, list)
	api.Read(f, "GET /v1/services/{name}", actionRead, find, show)
	api.Change(f, "POST /v1/services", actionCreate, actionCreate, loadNew, create)
	api.Change(f, "PUT /v1/services/{name}", actionUpdate, actionUpdate, loadChange, update)
	api.Change(f, "DELETE /v1/services/{name}", actionDelete, actionDelete, loadOwn, remove)
}

// definition is a service as it is registered. A key that it does not have is
// refused, since a role that was meant and not made is a hole in somebody's
// access.
type definition struct{ access.Definition }

func (d *definition) UnmarshalJSON(b []byte) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	return dec.Decode(&d.Definition)
}

// entry shows a service in the catalog: its definition, and for one that the
// account has registered, what is stored beside it.
type entry struct {
	access.Definition
	Custom bool `json:"custom"` // registered by the account
	*registration
}

type registration struct {
	AccountID  string `json:"account_id"`
	CRN        string `json:"crn"`
	EntityTag  string `json:"entity_tag"`
	CreatedAt  string `json:"created_at"`
	CreatedBy  string `json:"created_by"`
	ModifiedAt string `json:"modified_at"`
	ModifiedBy string `json:"modified_by"`
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func tag(s *access.RegisteredService) string { return s.Tag(directory.ServiceKey(s.AccountID, s.Name)) }

func encodeOwn(c *api.Call, s *access.RegisteredService) entry {
	return entry{Definition: s.Definition, Custom: true, registration: &registration{
		AccountID: s.AccountID, CRN: crnOf(c, s.Name), EntityTag: tag(s),
		CreatedAt: stamp(s.CreatedAt), CreatedBy: s.CreatedBy, ModifiedAt: stamp(s.ModifiedAt), ModifiedBy: s.ModifiedBy,
	}}
}

// encodeBuiltin shows a service that ships with the server, with the actions
// that its roles have where its definition does not list them.
func encodeBuiltin(s *access.Service) entry {
	d := s.Definition
	if len(d.Actions) == 0 {
		for _, a := range s.AllActions() {
			if strings.HasPrefix(a, d.Name+".") {
				d.Actions = append(d.Actions, access.ActionDefinition{ID: a})
			}
		}
	}
	return entry{Definition: d}
}

func crnOf(c *api.Call, name string) string {
	return c.Names.Of(service, "", c.Account(), "", "service", name).String()
}

func resourceOf(c *api.Call, name string) map[string]string {
	return c.InAccount(service, access.ResourceType, "service", access.Resource, name)
}

func targetOf(c *api.Call, name string) api.Target {
	return api.Target{Resource: resourceOf(c, name), CRN: crnOf(c, name), Name: name, TypeURI: typeURI}
}

// summary is a service in a list.
type summary struct {
	Name        string `json:"name"`
	DisplayName string `json:"display_name"`
	Kind        string `json:"kind"`
	Description string `json:"description"`
	Custom      bool   `json:"custom"`
}

// list shows the built-in services and the account's own, by name.
func list(c *api.Call, may func(map[string]string) bool) (api.Reply, error) {
	out := []summary{}
	for _, s := range c.Directory.Catalog(c.Account()).Services() {
		if may(resourceOf(c, s.Name)) {
			_, own := registered(c, s.Name)
			out = append(out, summary{Name: s.Name, DisplayName: s.DisplayName, Kind: s.Kind, Description: s.Description, Custom: own})
		}
	}
	slices.SortFunc(out, func(a, b summary) int { return strings.Compare(a.Name, b.Name) })
	return api.Reply{Body: map[string]any{"services": out}}, nil
}

func registered(c *api.Call, name string) (*access.RegisteredService, bool) {
	return c.Directory.Services.Get(directory.ServiceKey(c.Account(), name))
}

func builtin(c *api.Call, name string) (*access.Service, bool) {
	s, ok := c.Directory.Builtin().Service(name)
	return s, ok && s.Name == name // the catalog finds child services as their parent
}

func find(c *api.Call) (entry, api.Target, error) {
	name := c.R.PathValue("name")
	if s, ok := registered(c, name); ok {
		return encodeOwn(c, s), targetOf(c, name), nil
	}
	if s, ok := builtin(c, name); ok {
		return encodeBuiltin(s), targetOf(c, name), nil
	}
	return entry{}, api.Target{TypeURI: typeURI}, api.NotFound("service", name)
}

func show(_ *api.Call, e entry) (api.Reply, error) {
	reply := api.Reply{Body: e}
	if e.registration != nil {
		reply.ETag = e.EntityTag
	}
	return reply, nil
}

// check validates a service against the account's catalog without the service
// itself: another one of the account may have its name or one of its plans.
func check(c *api.Call, s *access.RegisteredService) error {
	// The plans' service is this one, whatever the caller wrote.
	s.PlanList = slices.Clone(s.PlanList)
	for i := range s.PlanList {
		s.PlanList[i].Service = ""
	}
	if err := bounded(s.Definition); err != nil {
		return err
	}
	if err := s.Validate(c.Directory.Catalog(c.Account()).Without(s.Name)); err != nil {
		return api.Invalid("The service cannot be registered: %s.", clip(err.Error()))
	}
	return nil
}

// maxResolved bounds the roles that are visited when one role is resolved. Each
// role that extends two others doubles them.
const maxResolved = 1000

// bounded refuses roles whose extensions branch so often that working out their
// actions would take long.
func bounded(d access.Definition) error {
	for _, table := range []map[string]access.RoleDefinition{d.Platform, d.ServiceRoles} {
		if len(table) > access.MaxRolesPerService {
			continue // which Validate refuses
		}
		counts := map[string]int{}
		var visits func(name string, depth int) int
		visits = func(name string, depth int) int {
			if n, ok := counts[name]; ok {
				return n
			}
			if depth > len(table) {
				return 0 // a circle, which Validate refuses
			}
			counts[name] = 0 // a circle ends here
			n := 1
			for _, base := range table[name].Extends {
				n = min(n+visits(base, depth+1), maxResolved+1)
			}
			counts[name] = n
			return n
		}
		for name := range table {
			if visits(name, 0) > maxResolved {
				return api.Invalid("The role %.60q extends too many other roles; list its actions instead.", name)
			}
		}
	}
	return nil
}

// maxReason bounds a message that quotes what the caller sent, in bytes.
const maxReason = 512

func clip(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason]
	}
	return strings.ToValidUTF8(s, "")
}

// loadNew leaves the definition to be checked after the caller's right.
func loadNew(c *api.Call, b *definition) (*access.RegisteredService, api.Target, error) {
	s := &access.RegisteredService{AccountID: c.Account(), Definition: b.Definition}
	return s, api.Target{Resource: resourceOf(c, s.Name), TypeURI: typeURI}, nil
}

func create(c *api.Call, tx *directory.Tx, _ *definition, s *access.RegisteredService) (api.Reply, api.Target, error) {
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, api.Target{}, err }
	if _, own := registered(c, s.Name); own {
		return fail(fault.New(fault.Conflict, "conflict", "The account has registered a service %s already; change it with PUT.", s.Name))
	}
	if _, taken := builtin(c, s.Name); taken {
		return fail(fault.New(fault.Conflict, "conflict", "The name %s is that of a built-in service.", s.Name))
	}
	if err := check(c, s); err != nil {
		return fail(err)
	}
	if n := c.Directory.ServicesByAccount.Len(c.Account()); n >= access.MaxServicesPerAccount {
		return fail(fault.New(fault.Conflict, "limit_exceeded", "The account has registered %d services, which is the limit.", n))
	}
	if err := mayWiden(c, s); err != nil {
		return fail(err)
	}
	c.Directory.Services.Put(tx, s)
	return api.Reply{Status: http.StatusCreated, Body: encodeOwn(c, s), ETag: tag(s), ResponseData: data(s)}, targetOf(c, s.Name), nil
}

// data is a service's place in an activity event.
func data(s *access.RegisteredService) map[string]any {
	return map[string]any{
		"name": s.Name, "kind": s.Kind, "actions": len(s.Actions), "roles": roleNames(s.Definition), "plans": len(s.PlanList),
	}
}

func roleNames(d access.Definition) []string {
	names := []string{}
	for name := range d.ServiceRoles {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// own finds a service that the account has registered. A built-in one is known
// to everybody and cannot be changed.
func own(c *api.Call) (*access.RegisteredService, api.Target, error) {
	name := c.R.PathValue("name")
	if s, ok := registered(c, name); ok {
		return s, targetOf(c, name), nil
	}
	if _, ok := builtin(c, name); ok {
		return nil, targetOf(c, name), fault.New(fault.Conflict, "builtin_service", "The service %s ships with the server and cannot be changed or removed.", name)
	}
	return nil, api.Target{TypeURI: typeURI}, api.NotFound("service", name)
}

func loadOwn(c *api.Call, _ *api.None) (*access.RegisteredService, api.Target, error) { return own(c) }

func loadChange(c *api.Call, _ *definition) (*access.RegisteredService, api.Target, error) {
	return own(c)
}

// update replaces a definition. What others rely on must stay: they would lose
// access without anybody having decided it.
func update(c *api.Call, tx *directory.Tx, b *definition, old *access.RegisteredService) (api.Reply, api.Target, error) {
	t := targetOf(c, old.Name)
	fail := func(err error) (api.Reply, api.Target, error) { return api.Reply{}, t, err }
	if err := c.IfMatch(&old.Meta, directory.ServiceKey(old.AccountID, old.Name), true); err != nil {
		return fail(err)
	}
	s := *old
	s.Definition = b.Definition
	if s.Name == "" {
		s.Name = old.Name
	}
	switch {
	case s.Name != old.Name:
		return fail(api.Invalid("The name of a service cannot be changed: policies name it. Register the other one beside it.").On("name"))
	case s.Kind != old.Kind && s.Kind != "":
		return fail(api.Invalid("The kind of a service cannot be changed: policies are about all services of a kind.").On("kind"))
	}
	s.Kind = old.Kind
	if err := check(c, &s); err != nil {
		return fail(err)
	}
	if used := uses(c, old.Name).missing(old, &s); len(used) > 0 {
		return fail(fault.New(fault.Conflict, "in_use", "The new definition lacks what is in use: %s.", join(used)))
	}
	if err := mayWiden(c, &s); err != nil {
		return fail(err)
	}
	c.Directory.Services.Put(tx, &s)
	d := data(&s)
	d["previous"] = data(old)
	return api.Reply{Body: encodeOwn(c, &s), ETag: tag(&s), ResponseData: d}, t, nil
}

// mayWiden refuses a definition by which roles gain actions unless the caller
// may write every policy about the service: what a role gains, all gain who have
// it. Nobody has a role yet that only this definition brings.
func mayWiden(c *api.Call, next *access.RegisteredService) error {
	before := c.Directory.Catalog(c.Account())
	after := c.Directory.Builtin().With([]*access.RegisteredService{next}, nil)
	s, ok := after.Service(next.Name)
	if !ok {
		return nil // a newer program brings a service of the name, which counts instead
	}
	for _, role := range s.Roles {
		if _, known := before.Role(role.CRN); !known {
			continue
		}
		had := before.Actions(role.CRN, next.Name)
		for _, action := range after.Actions(role.CRN, next.Name) {
			if _, found := slices.BinarySearch(had, action); !found {
				return c.Authorize("iam.policy.update", c.InAccount(next.Name))
			}
		}
	}
	return nil
}

func remove(c *api.Call, tx *directory.Tx, _ *api.None, s *access.RegisteredService) (api.Reply, api.Target, error) {
	t := targetOf(c, s.Name)
	if err := c.IfMatch(&s.Meta, directory.ServiceKey(s.AccountID, s.Name), false); err != nil {
		return api.Reply{}, t, err
	}
	if used := uses(c, s.Name).all(); len(used) > 0 {
		return api.Reply{}, t, fault.New(fault.Conflict, "in_use", "The service is in use: %s.", join(used))
	}
	c.Directory.Services.Delete(tx, s)
	return api.Reply{Status: http.StatusNoContent, ResponseData: data(s)}, t, nil
}

// maxListed bounds the uses that a refusal names.
const maxListed = 20

func join(uses []string) string {
	slices.Sort(uses)
	if more := len(uses) - maxListed; more > 0 {
		uses = append(uses[:maxListed:maxListed], "and more")
	}
	return strings.Join(uses, "; ")
}

// ownRole reports whether a role CRN is one of a service's own service roles.
func ownRole(role, name string) bool {
	c, err := crn.Parse(role)
	return err == nil && c.Service == name
}
