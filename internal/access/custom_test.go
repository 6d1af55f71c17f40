package access_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
)

func TestARegisteredServiceMustFitBesideTheBuiltInOnes(t *testing.T) {
	c := builtin(t)
	type def = access.RegisteredService
	roles := func(m map[string]access.RoleDefinition) func(*def) {
		return func(s *def) { s.ServiceRoles = m }
	}
	action := func(ids ...string) func(*def) {
		return func(s *def) {
			for _, id := range ids {
				s.Actions = append(s.Actions, access.ActionDefinition{ID: id})
			}
		}
	}
	name := func(n string) func(*def) {
		return func(s *def) {
			s.Name, s.Actions, s.Platform, s.ServiceRoles = n, []access.ActionDefinition{{ID: n + ".x"}}, map[string]access.RoleDefinition{}, nil
		}
	}
	var kmsPlan string
	for _, s := range c.Services() {
		if s.Name == "kms" {
			kmsPlan = s.Plans[0].ID
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*def)
		want   string // part of the error; empty for none
	}{
		{"as it should be", func(*def) {}, ""},
		{"with the common service roles", roles(map[string]access.RoleDefinition{"Reader": {}, "Writer": {Extends: []string{"Reader"}}, "Manager": {}}), ""},
		{"of an own kind", func(s *def) { s.Kind = "utility" }, "kind"},
		{"without a kind", func(s *def) { s.Kind = "" }, "kind"},

		{"without a name", name(""), "2 to 100"},
		{"with a name of one letter", name("a"), "2 to 100"},
		{"with a name of a hundred letters", name(strings.Repeat("a", 100)), ""},
		{"with a name that is too long", name(strings.Repeat("a", 101)), "2 to 100"},
		{"with a name in capitals", name("KMS"), "lower-case"},
		{"with a name that begins with a digit", name("1a"), "letter first"},
		{"with a name with a space", name("k ms"), "lower-case"},
		{"with a name that looks like another's", name("kmѕ"), "lower-case"},
		{"with the name of a child of VPC", name("is.instance"), "lower-case"},
		{"with the name of a child of a service", name("kms.child"), "lower-case"},
		{"with a CRN for a name", name("crn:v1"), "lower-case"},
		{"with a built-in name", name("kms"), "taken"},
		{"with the name of VPC", name("is"), "taken"},
		{"with the name of role CRNs", name("iam"), "taken"},
		{"with the name of all services", name("alliamserviceroles"), "taken"},
		{"with the name of the cloud", name("bluemix"), "taken"},
		{"with the name of access management", name("iam-access-management"), "taken"},

		{"without actions", func(s *def) { s.Actions = nil }, "actions is required"},
		{"with an action of another service", action("kms.secrets.read"), "must begin with lib."},
		{"with a common action", action("iam.policy.create"), "must begin with lib."},
		{"with an action of a service that begins alike", action("library.read"), "must begin with lib."},
		{"with an action that is only the service", action("lib."), "must begin with lib."},
		{"with an empty action", action(""), "must begin with lib."},
		{"with an action with a star", action("lib.*"), "letters, digits"},
		{"with an action with a newline", action("lib.a\n"), "letters, digits"},
		{"with an action that is too long", action("lib." + strings.Repeat("a", 197)), "must begin"},
		{"with an action twice", action("lib.look"), "twice"},

		{"with a role with an action of another service", roles(map[string]access.RoleDefinition{"Thief": {Actions: []string{"kms.secrets.read"}}}), "not among"},
		{"with a role with a common action", roles(map[string]access.RoleDefinition{"Thief": {Actions: []string{"iam.policy.create"}}}), "not among"},
		{"with a platform role with an action of another service", func(s *def) {
			s.Platform = map[string]access.RoleDefinition{"Viewer": {Actions: []string{"kms.secrets.read"}}}
		}, "not among"},
		{"with a role that extends itself", roles(map[string]access.RoleDefinition{"A": {Extends: []string{"A"}}}), "extends itself"},
		{"with roles that extend each other", roles(map[string]access.RoleDefinition{"A": {Extends: []string{"B"}}, "B": {Extends: []string{"A"}}}), "extends itself"},
		{"with platform roles that extend each other", func(s *def) {
			s.Platform = map[string]access.RoleDefinition{"Viewer": {Extends: []string{"Editor"}}, "Editor": {Extends: []string{"Viewer"}}}
		}, "extends itself"},
		{"with a role that extends a platform role", roles(map[string]access.RoleDefinition{"A": {Extends: []string{"Administrator"}}}), "does not exist"},
		{"with a role that extends too many", roles(map[string]access.RoleDefinition{"A": {}, "B": {Extends: slices.Repeat([]string{"A"}, access.MaxRolesPerService+1)}}), "extends more than"},
		{"with a platform role of its own", func(s *def) { s.Platform = map[string]access.RoleDefinition{"Emperor": {}} }, "not a platform role"},
		{"with a platform role among the service roles", roles(map[string]access.RoleDefinition{"Administrator": {}}), "platform role"},
		{"with the role of those who decide", roles(map[string]access.RoleDefinition{"Decision Point": {Actions: []string{"lib.look"}}}), "same for all services"},
		{"with roles that differ in their spaces", roles(map[string]access.RoleDefinition{"Desk Clerk": {}, "DeskClerk": {}}), "spaces"},
		{"with roles that differ in their case", roles(map[string]access.RoleDefinition{"Clerk": {}, "clerk": {}}), ""},
		{"with a role with a colon", roles(map[string]access.RoleDefinition{"a:b": {}}), "colon"},
		{"with a role without a name", roles(map[string]access.RoleDefinition{"": {}}), "1 to 50"},
		{"with a role named by a space", roles(map[string]access.RoleDefinition{" ": {}}), "no space at either end"},
		{"with a role with a space at its end", roles(map[string]access.RoleDefinition{"Reader ": {}}), "no space at either end"},
		{"with a role with a newline", roles(map[string]access.RoleDefinition{"a\nb": {}}), "1 to 50"},
		{"with a role with a long name", roles(map[string]access.RoleDefinition{strings.Repeat("é", 51): {}}), "1 to 50"},
		{"without roles", func(s *def) { s.Platform, s.ServiceRoles = nil, nil }, "required"},

		{"with an attribute with braces", func(s *def) { s.Attributes = []access.AttributeDefinition{{Name: "{{shelf}}"}} }, "braces"},
		{"with an attribute without a name", func(s *def) { s.Attributes = []access.AttributeDefinition{{}} }, "attribute name"},
		{"with an attribute", func(s *def) { s.Attributes = []access.AttributeDefinition{{Name: "shelf"}} }, ""},
		{"with a description with a control character", func(s *def) { s.Description = "a\x1b[31m" }, "control character"},
		{"with a long description", func(s *def) { s.Description = strings.Repeat("x", 1001) }, "1000"},
		{"with an action described by a control character", func(s *def) { s.Actions[0].Description = "\x00" }, "control character"},
		{"with a plan", func(s *def) { s.PlanList = []access.Plan{{ID: "p-1", Name: "standard"}} }, ""},
		{"with the plan of a built-in service", func(s *def) { s.PlanList = []access.Plan{{ID: kmsPlan, Name: "standard"}} }, "plan id"},
		{"with a plan twice", func(s *def) { s.PlanList = []access.Plan{{ID: "p-1", Name: "a"}, {ID: "p-1", Name: "b"}} }, "taken"},
		{"with a plan without a name", func(s *def) { s.PlanList = []access.Plan{{ID: "p-1"}} }, "no id or name"},
		{"with a plan without an id", func(s *def) { s.PlanList = []access.Plan{{Name: "a"}} }, "no id or name"},
		{"with too many actions", func(s *def) {
			for i := range access.MaxActionsPerService {
				s.Actions = append(s.Actions, access.ActionDefinition{ID: fmt.Sprint("lib.a", i)})
			}
		}, "at most"},
		{"with too many roles", func(s *def) {
			for i := range access.MaxRolesPerService {
				s.ServiceRoles[fmt.Sprint("R", i)] = access.RoleDefinition{}
			}
		}, "at most"},
		{"with too many plans", func(s *def) {
			for i := range access.MaxPlansPerService + 1 {
				s.PlanList = append(s.PlanList, access.Plan{ID: fmt.Sprint("p", i), Name: "p"})
			}
		}, "at most"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := library(accountA)
			tt.change(s)
			err := s.Validate(c)
			wantInvalid(t, err, tt.want)
			with := c.With([]*access.RegisteredService{s}, nil)
			if err == nil {
				checkRegistered(t, c, with, s)
			}
		})
	}
}

// Fifty roles, each of which extends the next one twice, are 2^50 ways through
// the table.
func TestRolesThatExtendEachOtherManyTimesAreResolvedAtOnce(t *testing.T) {
	s := library(accountA)
	s.Platform, s.ServiceRoles = nil, map[string]access.RoleDefinition{}
	for i := range access.MaxRolesPerService {
		role := access.RoleDefinition{Actions: []string{"lib.look"}}
		for j := i + 1; j < access.MaxRolesPerService; j++ {
			role.Extends = append(role.Extends, fmt.Sprint("R", j), fmt.Sprint("R", j))
		}
		role.Extends = role.Extends[:min(len(role.Extends), access.MaxRolesPerService)]
		s.ServiceRoles[fmt.Sprint("R", i)] = role
	}
	done := make(chan error, 1)
	go func() { done <- s.Validate(builtin(t)) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it takes for ever")
	}
}

// checkRegistered demands that the service is in the catalog, that what its
// roles grant is its own or common, and only on it, and that the other services
// are what they were.
func checkRegistered(t *testing.T, before, after *access.Catalog, s *access.RegisteredService) {
	t.Helper()
	got, ok := after.Service(s.Name)
	if !ok || got.Name != s.Name || len(after.Services()) != len(before.Services())+1 {
		t.Fatalf("the service %q is not in the catalog", s.Name)
	}
	own := map[string]bool{}
	for _, a := range s.Actions {
		own[a.ID] = true
	}
	for _, role := range got.Roles {
		for _, action := range after.Actions(role.CRN, s.Name) {
			if !own[action] && !before.Grants(role.CRN, "a-service-that-nobody-knows", action) {
				t.Errorf("role %s grants %q", role.CRN, action)
			}
		}
		if _, old := before.Role(role.CRN); old {
			continue
		}
		for _, other := range append(before.Services(), &access.Service{Definition: access.Definition{Name: "unknown"}}) {
			if actions := after.Actions(role.CRN, other.Name); len(actions) > 0 || after.HasRole(role.CRN, other.Name) {
				t.Errorf("role %s grants %q on %s", role.CRN, actions, other.Name)
			}
		}
	}
	for _, old := range before.Services() {
		now, ok := after.Service(old.Name)
		if !ok || !reflect.DeepEqual(now, old) {
			t.Errorf("service %s has changed", old.Name)
		}
	}
	for _, p := range s.PlanList {
		if plan, ok := after.Plan(p.ID); !ok || plan.Service != s.Name {
			t.Errorf("plan %+v is %+v", p, plan)
		}
	}
}

// image is a catalog as text, with all that a change by mistake could touch.
func image(c *access.Catalog) string {
	var b strings.Builder
	for _, s := range c.Services() {
		fmt.Fprintf(&b, "%+v %q\n", s.Definition, s.AllActions())
		for _, r := range s.Roles {
			found, _ := c.Role(r.CRN)
			fmt.Fprintf(&b, " %+v %+v %q %t\n", *r, found, c.Actions(r.CRN, s.Name), c.HasRole(r.CRN, s.Name))
		}
		for _, p := range s.Plans {
			found, ok := c.Plan(p.ID)
			fmt.Fprintf(&b, " %+v %+v %t\n", *p, found, ok)
		}
	}
	for _, r := range access.PlatformRoles {
		fmt.Fprintf(&b, "%q\n", c.Actions(access.PlatformRoleCRN(r), "unknown"))
	}
	return b.String()
}

func TestAnAccountsCatalogLeavesTheBuiltInOneAsItIs(t *testing.T) {
	c := builtin(t)
	before := image(c)
	var accounts []*access.Catalog
	var images []string
	for i := range 4 {
		lib := library(accountA)
		lib.PlanList = []access.Plan{{ID: "p-1", Name: "standard"}}
		lib.Attributes = []access.AttributeDefinition{{Name: "shelf"}}
		services := []*access.RegisteredService{lib}
		roles := []*access.CustomRole{
			{Name: "Auditor", AccountID: accountA, Service: "kms", Actions: []string{"kms.secrets.list"}},
			{Name: "Looker", AccountID: accountA, Service: "is", Actions: []string{"is.instance.instance.list"}},
			{Name: "Guest", AccountID: accountA, Service: "lib", Actions: []string{"lib.look"}},
		}
		var now *access.Catalog
		switch i {
		case 0:
			now = c.With(services, roles)
		case 1:
			now = c.With(nil, roles[:2])
		case 2:
			now = c.With(services, nil)
		case 3:
			now = accounts[0].With(nil, []*access.CustomRole{{Name: "Other", AccountID: accountA, Service: "kms", Actions: []string{"kms.secrets.read"}}})
		}
		accounts, images = append(accounts, now), append(images, image(now))
		if image(now) == before {
			t.Errorf("catalog %d has nothing of the account's", i)
		}
	}
	for i, now := range accounts {
		if image(now) != images[i] {
			t.Errorf("catalog %d has changed", i)
		}
	}
	if image(c) != before {
		t.Error("the built-in catalog has changed")
	}
	if c.With(nil, nil) != c {
		t.Error("an account that adds nothing has a catalog of its own")
	}
	if _, ok := c.Service("lib"); ok {
		t.Error("the built-in catalog knows the service of an account")
	}
}

func TestWhatDoesNotFitTheCatalogAnyMoreIsLeftOut(t *testing.T) {
	c := builtin(t)
	taken := library(accountA)
	taken.Name = "kms"
	a, b := library(accountA), library(accountA)
	a.PlanList = []access.Plan{{ID: "p-1", Name: "a"}}
	b.Name, b.PlanList = "lib-2", []access.Plan{{ID: "p-1", Name: "b"}}
	reserved := library(accountA)
	reserved.Name = "iam"
	now := c.With([]*access.RegisteredService{b, taken, a, reserved}, []*access.CustomRole{
		{Name: "Orphan", AccountID: accountA, Service: "gone", Actions: []string{"gone.read"}},
		{Name: "Child", AccountID: accountA, Service: "is.instance", Actions: []string{"is.instance.instance.list"}},
	})
	if got := len(now.Services()); got != len(c.Services())+1 {
		t.Errorf("%d services, want one more than %d", got, len(c.Services()))
	}
	if s, _ := now.Service("kms"); s.DisplayName != "Key Protect" {
		t.Errorf("kms is %+v", s.Definition)
	}
	if p, ok := now.Plan("p-1"); !ok || p.Service != "lib" {
		t.Errorf("plan %+v", p)
	}
	for _, name := range []string{"Orphan", "Child"} {
		if _, ok := now.Role("crn:v1:bluemix:public:iam-access-management::a/" + accountA + "::customRole:" + name); ok {
			t.Errorf("role %s is there", name)
		}
	}
}

func TestACustomRoleHasActionsOfItsServiceOnly(t *testing.T) {
	c := builtin(t).With([]*access.RegisteredService{library(accountA)}, nil)
	for _, tt := range []struct {
		name   string
		change func(*access.CustomRole)
		want   string
	}{
		{"as it should be", func(*access.CustomRole) {}, ""},
		{"of a registered service", func(r *access.CustomRole) { r.Service, r.Actions = "lib", []string{"lib.look"} }, ""},
		{"with a common action beside an own one", func(r *access.CustomRole) { r.Actions = append(r.Actions, "iam.policy.read") }, ""},
		{"with a name of one letter", func(r *access.CustomRole) { r.Name = "A" }, ""},
		{"without a name", func(r *access.CustomRole) { r.Name = "" }, "name"},
		{"with a small letter first", func(r *access.CustomRole) { r.Name = "auditor" }, "capital"},
		{"with a digit first", func(r *access.CustomRole) { r.Name = "1A" }, "capital"},
		{"with a space in its name", func(r *access.CustomRole) { r.Name = "An Auditor" }, "capital"},
		{"with a colon in its name", func(r *access.CustomRole) { r.Name = "A:b" }, "capital"},
		{"with letters of another alphabet", func(r *access.CustomRole) { r.Name = "Prüfer" }, "capital"},
		{"with a long name", func(r *access.CustomRole) { r.Name = strings.Repeat("A", 31) }, "30"},
		{"without a display name", func(r *access.CustomRole) { r.DisplayName = "" }, "display_name"},
		{"with a newline in its display name", func(r *access.CustomRole) { r.DisplayName = "a\nb" }, "display_name"},
		{"with a long display name", func(r *access.CustomRole) { r.DisplayName = strings.Repeat("é", 51) }, "display_name"},
		{"with a long description", func(r *access.CustomRole) { r.Description = strings.Repeat("a", 251) }, "description"},
		{"of a service that nobody knows", func(r *access.CustomRole) { r.Service = "unknown" }, "not a service"},
		{"of a child service", func(r *access.CustomRole) { r.Service = "is.instance" }, "not a service"},
		{"of no service", func(r *access.CustomRole) { r.Service = "" }, "not a service"},
		{"without actions", func(r *access.CustomRole) { r.Actions = nil }, "1 to"},
		{"with too many actions", func(r *access.CustomRole) { r.Actions = slices.Repeat([]string{"x"}, access.MaxActionsPerRole+1) }, "1 to"},
		{"with an action twice", func(r *access.CustomRole) { r.Actions = append(r.Actions, r.Actions[0]) }, "twice"},
		{"with an action of another service", func(r *access.CustomRole) { r.Actions = append(r.Actions, "is.vpc.vpc.list") }, "not one of"},
		{"with an action that nobody has", func(r *access.CustomRole) { r.Actions = append(r.Actions, "kms.everything") }, "not one of"},
		{"with common actions alone", func(r *access.CustomRole) { r.Actions = []string{"iam.policy.create"} }, "of service kms itself"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &access.CustomRole{AccountID: accountA, Name: "Auditor", DisplayName: "Auditor", Service: "kms", Actions: []string{"kms.secrets.list"}}
			tt.change(r)
			err := r.Validate(c)
			wantInvalid(t, err, tt.want)
			if err != nil {
				return
			}
			with := c.With(nil, []*access.CustomRole{r})
			role, ok := with.Role(r.CRN())
			if !ok || !role.Custom || role.System || role.Service != r.Service {
				t.Fatalf("role %+v", role)
			}
			want := slices.Sorted(slices.Values(r.Actions))
			if got := with.Actions(r.CRN(), r.Service); !slices.Equal(got, want) {
				t.Errorf("actions %q, want %q", got, want)
			}
			for _, s := range with.Services() {
				if s.Name != r.Service && (with.HasRole(r.CRN(), s.Name) || len(with.Actions(r.CRN(), s.Name)) > 0) {
					t.Errorf("it grants something on %s", s.Name)
				}
			}
			if _, own := with.RolesOf(r.Service); slices.ContainsFunc(own, func(o *access.Role) bool { return o.Custom }) {
				t.Error("it stands among the service's own roles")
			}
		})
	}
}

func TestAnAuthorizationLetsTheServiceInThatItDescribes(t *testing.T) {
	lib := func(segments string) string { return "crn-crn:v1:bluemix:public:lib:" + segments }
	for _, tt := range []struct {
		name    string
		subject []access.Attribute
		caller  string
		account string // the caller's
		want    bool
	}{
		{"of the same account", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA)}, lib("us-south:a/" + accountA + ":i::"), accountA, true},
		{"of another account", []access.Attribute{is("serviceName", "lib"), is("accountId", accountB)}, lib("us-south:a/" + accountB + ":i::"), accountB, true},
		{"of another account than it says", []access.Attribute{is("serviceName", "lib"), is("accountId", accountB)}, lib("us-south:a/" + accountA + ":i::"), accountA, false},
		{"another service", []access.Attribute{is("serviceName", "kms"), is("accountId", accountA)}, lib("us-south:a/" + accountA + ":i::"), accountA, false},
		{"one instance", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA), is("serviceInstance", "i")}, lib("us-south:a/" + accountA + ":i::"), accountA, true},
		{"another instance", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA), is("serviceInstance", "j")}, lib("us-south:a/" + accountA + ":i::"), accountA, false},
		{"no instance where one is asked", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA), exists("serviceInstance", true)}, lib("us-south:a/" + accountA + ":::"), accountA, false},
		{"one resource", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA), is("resourceType", "book"), is("resource", "b:1")}, lib("us-south:a/" + accountA + ":i:book:b:1"), accountA, true},
		{"any account", []access.Attribute{is("serviceName", "lib"), exists("accountId", true)}, lib("us-south:a/" + accountB + ":i::"), accountB, true},
		{"no account at all", []access.Attribute{is("serviceName", "lib"), exists("accountId", true)}, lib("us-south:::i::"), accountB, false},
		{"a profile", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA)}, "iam-Profile-1", accountA, false},
		{"a user who calls himself a CRN", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA)}, "crn-lib", accountA, false},
		{"what is no CRN", []access.Attribute{is("serviceName", "lib"), is("accountId", accountA)}, "crn-crn:v1:lib", accountA, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOn(is(access.ServiceName, "kms"))
			p.Revision, p.Roles = 1, []string{reader}
			authorize(p, tt.subject...)
			w := world{policies: []*access.Policy{p}}
			q := access.Request{
				Subject: tt.caller, AccountID: tt.account, Action: "kms.read", Time: monday,
				Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "kms"},
			}
			catalog := small(t)
			for name, view := range map[string]access.View{"slice": sliceView{w, catalog}, "directory": indexed(t, w, catalog)} {
				if d := access.Decide(view, q); d.Allowed != tt.want {
					t.Errorf("over the %s: %t, want %t; trace %+v", name, d.Allowed, tt.want, d.Explain())
				}
			}
			if decideByWalking(w, q) != tt.want {
				t.Error("the reference says otherwise")
			}
			p.State = access.Deleted
			if access.Decide(indexed(t, w, catalog), q).Allowed {
				t.Error("allowed by a deleted authorization")
			}
		})
	}
}

// FuzzRegisteredService reads a service as the API does. One that Validate
// accepts is in the catalog, and its roles grant nothing but its own actions
// and the common ones, and nothing elsewhere.
func FuzzRegisteredService(f *testing.F) {
	good, err := json.Marshal(library(accountA))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	for _, pair := range [][2]string{
		{`"lib"`, `"is.instance"`}, {`"Reader"`, `"Decision Point"`}, {`"Desk Clerk"`, `"DeskClerk":{},"Desk Clerk"`}, {`"lib.look"`, `"iam.policy.create"`},
		{`"extends":["Reader"]`, `"extends":["Desk Clerk"]`}, {`"kind":"platform_service"`, `"kind":"service","plans":[{"id":"p","name":"n"}],"attributes":[{"name":"shelf"}]`},
		{`lib`, `iam`}, {`lib`, `kms`}, {`"Viewer"`, `"Reader"`},
	} {
		f.Add([]byte(strings.ReplaceAll(string(good), pair[0], pair[1])))
	}
	c, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		f.Fatal(err)
	}
	before := image(c)
	f.Fuzz(func(t *testing.T, doc []byte) {
		if len(doc) > 1<<14 {
			return
		}
		var s access.RegisteredService
		if json.Unmarshal(doc, &s) != nil {
			return
		}
		s.AccountID = accountA
		invalid := s.Validate(c)
		after := c.With([]*access.RegisteredService{&s}, nil)
		if invalid == nil {
			checkRegistered(t, c, after, &s)
		}
		if image(c) != before {
			t.Error("the built-in catalog has changed")
		}
	})
}
