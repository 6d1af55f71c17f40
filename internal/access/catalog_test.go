package access_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/access"
)

func builtin(t *testing.T) *access.Catalog {
	t.Helper()
	c, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// roleCRN returns the CRN of a role as a service knows it by display name.
func roleCRN(service, name string) string {
	if slices.Contains(access.PlatformRoles, name) {
		return access.PlatformRoleCRN(name)
	}
	return access.ServiceRoleCRN(service, name)
}

func TestBuiltinCatalogHasTheServicesOfEachKind(t *testing.T) {
	c := builtin(t)
	want := map[string]string{
		"activity":                 access.KindPlatform,
		"iam-access-management":    access.KindPlatform,
		"iam-groups":               access.KindPlatform,
		"iam-identity":             access.KindPlatform,
		"installation":             access.KindPlatform,
		"resource-controller":      access.KindPlatform,
		"user-management":          access.KindPlatform,
		"cloud-object-storage":     access.KindService,
		"containers-kubernetes":    access.KindService,
		"databases-for-postgresql": access.KindService,
		"host":                     access.KindPlatform,
		"is":                       access.KindService,
		"kms":                      access.KindService,
	}
	for name, kind := range want {
		s, ok := c.Service(name)
		if !ok {
			t.Errorf("service %s is missing", name)
			continue
		}
		if s.Kind != kind || c.KindOf(name) != kind {
			t.Errorf("service %s is of kind %q and %q, want %q", name, s.Kind, c.KindOf(name), kind)
		}
		if s.DisplayName == "" {
			t.Errorf("service %s has no display name", name)
		}
	}
	if got := len(c.Services()); got != len(want) {
		t.Errorf("catalog has %d services, want %d", got, len(want))
	}
}

func TestBuiltinRolesGrantTheDocumentedActions(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name    string
		service string
		action  string
		granted []string // display names of roles
		refused []string
	}{
		{
			name:    "every platform role lists instances of VPC",
			service: "is", action: "is.instance.instance.list",
			granted: []string{"Viewer", "Operator", "Editor", "Administrator"},
			refused: []string{"Reader", "Writer", "Manager", "Console Administrator", "IP Spoofing Operator"},
		},
		{
			name:    "Operator starts and stops instances and Viewer does not",
			service: "is", action: "is.instance.instance.operate",
			granted: []string{"Operator", "Editor", "Administrator"}, refused: []string{"Viewer"},
		},
		{
			name:    "Operator creates no instances and Editor does",
			service: "is", action: "is.instance.instance.create",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
		{
			name:    "Operator updates no instances",
			service: "is", action: "is.instance.instance.update",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
		{
			name:    "Operator deletes no instances",
			service: "is", action: "is.instance.instance.delete",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
		{
			name:    "a child service of VPC has the actions of its parent",
			service: "is.instance", action: "is.instance.instance.operate",
			granted: []string{"Operator"}, refused: []string{"Viewer"},
		},
		{
			name:    "Operator attaches instances to security groups",
			service: "is", action: "is.security-group.security-group.operate",
			granted: []string{"Operator", "Editor", "Administrator"}, refused: []string{"Viewer"},
		},
		{
			name:    "Operator provisions from images",
			service: "is", action: "is.image.image.provision",
			granted: []string{"Operator", "Editor", "Administrator"}, refused: []string{"Viewer"},
		},
		{
			name:    "only Administrator lets a network interface spoof addresses",
			service: "is", action: "is.virtual-network-interface.virtual-network-interface.manage-ip-spoofing",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "only Console Administrator opens consoles",
			service: "is", action: "is.instance.instance.console",
			granted: []string{"Console Administrator"}, refused: []string{"Editor", "Administrator", "Manager"},
		},
		{
			name:    "only IP Spoofing Operator switches the spoofing check of instances",
			service: "is", action: "is.instance.instance.ip-spoofing",
			granted: []string{"IP Spoofing Operator"}, refused: []string{"Editor", "Administrator", "Manager"},
		},
		{
			name:    "Writer and Manager retire images and Reader does not",
			service: "is", action: "is.image.image.obsolete",
			granted: []string{"Writer", "Manager", "Editor"}, refused: []string{"Reader", "Operator"},
		},
		{
			name:    "Editor changes trusted profiles",
			service: "iam-identity", action: "iam-identity.profile.update",
			granted: []string{"Operator", "Editor", "Administrator"}, refused: []string{"Viewer"},
		},
		{
			name:    "Editor links trusted profiles",
			service: "iam-identity", action: "iam-identity.profile.linkToResource",
			granted: []string{"Operator", "Editor", "Administrator"}, refused: []string{"Viewer"},
		},
		{
			name:    "Operator deletes trusted profiles and Editor does not",
			service: "iam-identity", action: "iam-identity.profile.delete",
			granted: []string{"Operator", "Administrator"}, refused: []string{"Viewer", "Editor"},
		},
		{
			name:    "only Administrator creates trusted profiles",
			service: "iam-identity", action: "iam-identity.profile.create",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "only its special role and Administrator create service IDs",
			service: "iam-identity", action: "iam-identity.serviceid.create",
			granted: []string{"Administrator", "Service Id Creator"},
			refused: []string{"Viewer", "Operator", "Editor", "User Api Key Creator"},
		},
		{
			name:    "only its special role and Administrator create user API keys",
			service: "iam-identity", action: "iam-identity.user-apikey.create",
			granted: []string{"Administrator", "User Api Key Creator"},
			refused: []string{"Viewer", "Operator", "Editor", "Service Id Creator"},
		},
		{
			name:    "Operator of access groups sees no groups",
			service: "iam-groups", action: "iam-groups.groups.list",
			granted: []string{"Viewer", "Editor", "Administrator"}, refused: []string{"Operator"},
		},
		{
			name:    "Editor adds members to access groups",
			service: "iam-groups", action: "iam-groups.members.add",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
		{
			name:    "Editor changes custom roles but does not create them",
			service: "iam-access-management", action: "iam-access-management.customRole.create",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "Operator of user management only looks",
			service: "user-management", action: "user-management.user.update",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
		{
			name:    "every platform role reads the audit log",
			service: "activity", action: "activity.event.read",
			granted: []string{"Viewer", "Operator", "Editor", "Administrator"}, refused: []string{"Reader", "Manager"},
		},
		{
			name:    "only Administrator changes the settings of the audit log",
			service: "activity", action: "activity.settings.update",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "only Administrator reads the log of all accounts",
			service: "activity", action: "activity.log.read",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "Reader of Key Protect does not read key material",
			service: "kms", action: "kms.secrets.read",
			granted: []string{"ReaderPlus", "Writer", "Manager"}, refused: []string{"Reader", "KeyPurge", "Administrator"},
		},
		{
			name:    "Reader of Key Protect unwraps",
			service: "kms", action: "kms.secrets.unwrap",
			granted: []string{"Reader", "Writer", "Manager"}, refused: []string{"Viewer", "Administrator"},
		},
		{
			name:    "only Manager of Key Protect deletes keys",
			service: "kms", action: "kms.secrets.delete",
			granted: []string{"Manager"}, refused: []string{"Reader", "ReaderPlus", "Writer", "Administrator"},
		},
		{
			name:    "platform roles read no objects",
			service: "cloud-object-storage", action: "cloud-object-storage.object.get",
			granted: []string{"Object Reader", "Content Reader", "Reader", "Writer", "Manager"},
			refused: []string{"Object Writer", "Viewer", "Administrator"},
		},
		{
			name:    "Object Reader does not list buckets",
			service: "cloud-object-storage", action: "cloud-object-storage.account.get_account_buckets",
			granted: []string{"Reader", "Writer", "Manager"}, refused: []string{"Object Reader", "Content Reader", "Object Writer"},
		},
		{
			name:    "Object Writer stores objects",
			service: "cloud-object-storage", action: "cloud-object-storage.object.put",
			granted: []string{"Object Writer", "Writer", "Manager"}, refused: []string{"Reader"},
		},
		{
			name:    "Object Writer does not delete objects",
			service: "cloud-object-storage", action: "cloud-object-storage.object.delete",
			granted: []string{"Writer", "Manager"}, refused: []string{"Reader", "Object Writer"},
		},
		{
			name:    "only Manager sets the firewall of a bucket",
			service: "cloud-object-storage", action: "cloud-object-storage.bucket.put_firewall",
			granted: []string{"Manager"}, refused: []string{"Reader", "Writer", "Administrator"},
		},
		{
			name:    "only Administrator creates clusters",
			service: "containers-kubernetes", action: "containers-kubernetes.cluster.create",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor", "Manager"},
		},
		{
			name:    "Writer changes what runs in a cluster but does not manage it",
			service: "containers-kubernetes", action: "containers-kubernetes.kube.manage",
			granted: []string{"Manager"}, refused: []string{"Reader", "Writer", "Administrator"},
		},
		{
			name:    "Operator of databases does not delete deployments",
			service: "databases-for-postgresql", action: "databases-for-postgresql.deployment.delete",
			granted: []string{"Administrator"}, refused: []string{"Viewer", "Operator", "Editor"},
		},
		{
			name:    "Editor creates resource groups",
			service: "resource-controller", action: "resource-controller.group.create",
			granted: []string{"Editor", "Administrator"}, refused: []string{"Viewer", "Operator"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, role := range tt.granted {
				if !c.Grants(roleCRN(tt.service, role), tt.service, tt.action) {
					t.Errorf("%s on %s does not grant %s", role, tt.service, tt.action)
				}
			}
			for _, role := range tt.refused {
				if c.Grants(roleCRN(tt.service, role), tt.service, tt.action) {
					t.Errorf("%s on %s grants %s", role, tt.service, tt.action)
				}
			}
		})
	}
}

func TestCommonActionsHoldOnEveryService(t *testing.T) {
	c := builtin(t)
	services := []string{"some-service"} // one that the catalog does not know
	for _, s := range c.Services() {
		services = append(services, s.Name)
	}
	tests := []struct {
		name   string
		action string
		roles  []string // the platform roles that grant it
	}{
		{"every platform role retrieves instances", "resource-controller.instance.retrieve", access.PlatformRoles},
		{"Operator and Editor read no roles", "iam.role.read", []string{"Viewer", "Administrator"}},
		{"Viewer updates no instances", "resource-controller.instance.update", []string{"Operator", "Editor", "Administrator"}},
		{"Operator creates no instances", "resource-controller.instance.create", []string{"Editor", "Administrator"}},
		{"only Administrator creates policies", "iam.policy.create", []string{"Administrator"}},
		{"only Administrator updates policies", "iam.policy.update", []string{"Administrator"}},
		{"only Administrator deletes policies", "iam.policy.delete", []string{"Administrator"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, service := range services {
				for _, role := range access.PlatformRoles {
					want := slices.Contains(tt.roles, role)
					if got := c.Grants(access.PlatformRoleCRN(role), service, tt.action); got != want {
						t.Errorf("%s on %s grants %s: %v, want %v", role, service, tt.action, got, want)
					}
				}
				_, own := c.RolesOf(service)
				for _, role := range own {
					if c.Grants(role.CRN, service, tt.action) {
						t.Errorf("%s on %s grants %s", role.DisplayName, service, tt.action)
					}
				}
			}
		})
	}
}

func TestRolesHaveAsManyActionsAsDocumented(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name    string
		service string
		own     bool // count the service's own actions only
		want    map[string]int
	}{
		{"common actions", "resource-controller", false, map[string]int{
			"Viewer": 12, "Operator": 23, "Editor": 31, "Administrator": 48}},
		{"IAM identity", "iam-identity", true, map[string]int{
			// Administrator also has the two actions of the creator roles; the
			// actions on workload issuers and the one of simulations are ours.
			"Viewer": 6 + 3, "Operator": 33 + 3, "Editor": 21 + 3, "Administrator": 44 + 2 + 6}},
		{"access groups", "iam-groups", true, map[string]int{
			"Viewer": 9, "Operator": 0, "Editor": 17, "Administrator": 18}},
		{"access management", "iam-access-management", true, map[string]int{
			// The actions on registered services and the one of simulations are ours.
			"Viewer": 2 + 2, "Operator": 1, "Editor": 5 + 2, "Administrator": 8 + 5}},
		{"user management", "user-management", true, map[string]int{
			"Viewer": 4, "Operator": 4, "Editor": 12, "Administrator": 12}},
		{"object storage", "cloud-object-storage", true, map[string]int{
			"Administrator": 0, "Object Reader": 6, "Content Reader": 10, "Reader": 36}},
		{"Key Protect", "kms", true, map[string]int{"Administrator": 0, "Reader": 17, "ReaderPlus": 18, "Writer": 31}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for role, want := range tt.want {
				got := 0
				for _, action := range c.Actions(roleCRN(tt.service, role), tt.service) {
					if !tt.own || strings.HasPrefix(action, tt.service+".") {
						got++
					}
				}
				if got != want {
					t.Errorf("%s has %d actions, want %d", role, got, want)
				}
			}
		})
	}
}

func TestActionsOfAServiceBeginWithItsName(t *testing.T) {
	c := builtin(t)
	form := regexp.MustCompile(`^[a-z-]+(\.[A-Za-z_-]+)+$`)
	for _, s := range c.Services() {
		for _, role := range s.Roles {
			for _, action := range c.Actions(role.CRN, s.Name) {
				common := c.Grants(role.CRN, "some-service", action)
				if !common && !strings.HasPrefix(action, s.Name+".") || !form.MatchString(action) {
					t.Errorf("%s on %s has the action %q", role.DisplayName, s.Name, action)
				}
			}
		}
	}
}

func TestAdministratorOfIAMIdentityHasTheActionsOfAllItsRoles(t *testing.T) {
	c := builtin(t)
	s, _ := c.Service("iam-identity")
	for _, role := range s.Roles {
		if role.DisplayName == access.DecisionPoint {
			continue // it is for services, not for people
		}
		for _, action := range c.Actions(role.CRN, s.Name) {
			if !c.Grants(access.PlatformRoleCRN("Administrator"), s.Name, action) {
				t.Errorf("Administrator lacks %s of %s", action, role.DisplayName)
			}
		}
	}
}

func TestARoleIsGrantedOnlyOnTheServiceThatHasIt(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name    string
		role    string
		service string
		want    bool
	}{
		{"a service's role on the service", access.ServiceRoleCRN("kms", "ReaderPlus"), "kms", true},
		{"a service's role on another service", access.ServiceRoleCRN("kms", "ReaderPlus"), "cloud-object-storage", false},
		{"a service's role on an unknown service", access.ServiceRoleCRN("kms", "ReaderPlus"), "some-service", false},
		{"a service's role on many services", access.ServiceRoleCRN("kms", "ReaderPlus"), "", true},
		{"a role of VPC on a child service", access.ServiceRoleCRN("is", "Console Administrator"), "is.instance", true},
		{"a role of VPC on another service", access.ServiceRoleCRN("is", "Console Administrator"), "kms", false},
		{"a platform role on a known service", access.PlatformRoleCRN("Operator"), "is", true},
		{"a platform role on an unknown service", access.PlatformRoleCRN("Operator"), "some-service", true},
		{"a common service role on an unknown service", access.ServiceRoleCRN("", "Writer"), "some-service", true},
		{"an unknown role", access.ServiceRoleCRN("kms", "Locksmith"), "kms", false},
		{"an unknown platform role", access.PlatformRoleCRN("Owner"), "kms", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := c.HasRole(tt.role, tt.service); got != tt.want {
				t.Errorf("HasRole(%q, %q) = %v, want %v", tt.role, tt.service, got, tt.want)
			}
		})
	}
}

func TestRolesAreFoundByCRN(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name   string
		crn    string
		want   string // display name
		system bool
	}{
		{"a platform role", "crn:v1:bluemix:public:iam::::role:Viewer", "Viewer", true},
		{"a common service role", "crn:v1:bluemix:public:iam::::serviceRole:Reader", "Reader", false},
		{"the creator of user API keys", "crn:v1:bluemix:public:iam-identity::::serviceRole:UserApiKeyCreator", "User Api Key Creator", false},
		{"the creator of service IDs", "crn:v1:bluemix:public:iam-identity::::serviceRole:ServiceIdCreator", "Service Id Creator", false},
		{"a role under the name of another cloud", "crn:v1:ibmcloud:public:iam::::role:Editor", "Editor", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			role, ok := c.Role(tt.crn)
			if !ok {
				t.Fatalf("role %s is missing", tt.crn)
			}
			if role.DisplayName != tt.want || role.System != tt.system || role.Description == "" {
				t.Errorf("role is %+v, want %s with a description, system %v", *role, tt.want, tt.system)
			}
		})
	}
	if _, ok := c.Role("crn:v1:bluemix:public:iam::::role:Owner"); ok {
		t.Error("an unknown role is found")
	}
}

func TestChildServicesOfVPCAreFoundAsTheirParent(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name  string
		child string
		want  string // "" for none
	}{
		{"an instance", "is.instance", "is"},
		{"a security group", "is.security-group", "is"},
		{"VPC itself", "is", "is"},
		{"a child of an unknown service", "some-service.instance", ""},
		{"a name that only begins alike", "isolated", ""},
		{"no name", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, ok := c.Service(tt.child)
			if ok != (tt.want != "") || ok && s.Name != tt.want {
				t.Errorf("Service(%q) = %v, %v; want %q", tt.child, s, ok, tt.want)
			}
		})
	}
}

func TestAServiceOffersItsRoles(t *testing.T) {
	c := builtin(t)
	tests := []struct {
		name    string
		service string
		own     []string
	}{
		{"an unknown service offers the common service roles", "some-service", []string{"Reader", "Writer", "Manager", "Decision Point"}},
		{"a service without service roles offers the one that every service has", "resource-controller", []string{"Decision Point"}},
		{"VPC offers its special roles", "is", []string{"Console Administrator", "IP Spoofing Operator", "Manager", "Reader", "Writer", "Decision Point"}},
		{"IAM identity offers its special roles", "iam-identity", []string{"Api Key Reviewer", "Service Id Creator", "User Api Key Creator", "Decision Point"}},
		{"Kubernetes offers the common service roles", "containers-kubernetes", []string{"Manager", "Reader", "Writer", "Decision Point"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			system, own := c.RolesOf(tt.service)
			if got := displayNames(system); !slices.Equal(got, access.PlatformRoles) {
				t.Errorf("platform roles are %q, want %q", got, access.PlatformRoles)
			}
			if got := displayNames(own); !slices.Equal(got, tt.own) {
				t.Errorf("service roles are %q, want %q", got, tt.own)
			}
		})
	}
}

func displayNames(roles []*access.Role) []string {
	var out []string
	for _, r := range roles {
		out = append(out, r.DisplayName)
	}
	return out
}

func TestAnUnknownServiceIsAnIAMEnabledService(t *testing.T) {
	if got := builtin(t).KindOf("some-service"); got != access.KindService {
		t.Errorf("kind is %q, want %q", got, access.KindService)
	}
}

func TestPlansAreFoundByID(t *testing.T) {
	c := builtin(t)
	reclaimed := map[string]bool{ // by service and name
		"cloud-object-storage/lite":         true,
		"cloud-object-storage/standard":     true,
		"databases-for-postgresql/free":     false,
		"databases-for-postgresql/standard": true,
		"kms/tiered-pricing":                true,
	}
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := 0
	for _, s := range c.Services() {
		for _, p := range s.Plans {
			seen++
			got, ok := c.Plan(p.ID)
			if !ok || got != p || got.Service != s.Name {
				t.Errorf("Plan(%q) = %v, %v; want plan %s of %s", p.ID, got, ok, p.Name, s.Name)
			}
			if !form.MatchString(p.ID) {
				t.Errorf("plan %s of %s has the id %q, not a UUID", p.Name, s.Name, p.ID)
			}
			want, known := reclaimed[s.Name+"/"+p.Name]
			if !known || p.Reclamation != want {
				t.Errorf("plan %s of %s has reclamation %v, want %v (known: %v)", p.Name, s.Name, p.Reclamation, want, known)
			}
		}
	}
	if seen != len(reclaimed) {
		t.Errorf("catalog has %d plans, want %d", seen, len(reclaimed))
	}
	if _, ok := c.Plan("00000000-0000-4000-8000-000000000000"); ok {
		t.Error("an unknown plan is found")
	}
}

const (
	commonRoles = `common:
  Viewer: {actions: [x.thing.read]}
  Operator: {extends: [Viewer]}
  Editor: {extends: [Operator]}
  Administrator: {extends: [Editor]}
  Reader: {}
  Writer: {extends: [Reader]}
  Manager: {extends: [Writer]}
`
	services = "services:\n"
	planA    = "{id: 9f0c7a52-6e1b-4d3f-8a24-c05be9d71368, name: standard, reclamation: true}"
)

func TestParseCatalogAcceptsASmallCatalog(t *testing.T) {
	c, err := access.ParseCatalog([]byte(commonRoles + services + `  - name: lamps
    display_name: Lamps
    kind: service
    roles:
      Operator: {actions: [lamps.lamp.switch]}
      Editor: {extends: [Operator], actions: [lamps.lamp.create]}
    service_roles:
      Reader: {actions: [lamps.lamp.read]}
      Night Watch: {extends: [Reader], actions: [lamps.lamp.dim]}
    plans:
      - ` + planA + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		role string
		want []string
	}{
		{"a role without an entry has the common actions", access.PlatformRoleCRN("Viewer"), []string{"x.thing.read"}},
		{"a role has the actions of the role it extends", access.PlatformRoleCRN("Editor"), []string{"lamps.lamp.create", "lamps.lamp.switch", "x.thing.read"}},
		{"a service's table does not extend by itself", access.PlatformRoleCRN("Administrator"), []string{"x.thing.read"}},
		{"a service role extends a common one", access.ServiceRoleCRN("lamps", "Night Watch"), []string{"lamps.lamp.dim", "lamps.lamp.read"}},
		{"a common role that the service does not use grants nothing", access.ServiceRoleCRN("lamps", "Manager"), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := c.Actions(tt.role, "lamps"); !slices.Equal(got, tt.want) {
				t.Errorf("actions are %q, want %q", got, tt.want)
			}
		})
	}
}

func TestParseCatalogRejects(t *testing.T) {
	service := func(lines ...string) string {
		return commonRoles + services + "  - name: lamps\n    kind: service\n    " + strings.Join(lines, "\n    ") + "\n"
	}
	tests := []struct {
		name string
		data string
		want string // part of the error
	}{
		{"data that is no mapping", "- lamps\n", "service catalog"},
		{"an unknown key at the top", commonRoles + "colours: []\n", "colours"},
		{"an unknown key of a service", service("colour: red"), "colour"},
		{"an unknown key of a role", service("roles: {Viewer: {colour: red}}"), "colour"},
		{"an unknown key of a plan", service("plans: [{id: a, name: b, colour: red}]"), "colour"},
		{"an unknown kind", commonRoles + services + "  - {name: lamps, kind: utility}\n", "utility"},
		{"a service without a kind", commonRoles + services + "  - {name: lamps}\n", "kind"},
		{"a service without a name", commonRoles + services + "  - {kind: service}\n", "name is empty"},
		{"two services of one name", service("display_name: Lamps") + "  - {name: lamps, kind: service}\n", "taken"},
		{"two roles of one name", service("roles:", "  Viewer: {}", "  Viewer: {}"), "Viewer"},
		{"two plans of one id", service("plans: [" + planA + ", " + planA + "]"), "taken"},
		{"two services with a plan of one id",
			service("plans: ["+planA+"]") + "  - {name: torches, kind: service, plans: [" + planA + "]}\n", "taken"},
		{"a plan without an id", service("plans: [{name: standard}]"), "no id or name"},
		{"a plan without a name", service("plans: [{id: a}]"), "no id or name"},
		{"a platform role that does not exist", service("roles: {Owner: {}}"), "Owner"},
		{"a common role that does not exist", commonRoles + "  Owner: {}\n", "Owner"},
		{"a common role that is missing", strings.Replace(commonRoles, "  Manager: {extends: [Writer]}\n", "", 1), "Manager"},
		{"a role that extends itself", service("roles: {Viewer: {extends: [Viewer]}}"), "extends itself"},
		{"platform roles that extend each other", service("roles: {Viewer: {extends: [Editor]}, Editor: {extends: [Viewer]}}"), "extends itself"},
		{"service roles that extend each other", service("service_roles: {A: {extends: [B]}, B: {extends: [C]}, C: {extends: [A]}}"), "extends itself"},
		{"common roles that extend each other", strings.Replace(commonRoles, "Reader: {}", "Reader: {extends: [Manager]}", 1), "extends itself"},
		{"a platform role that extends nothing that exists", service("roles: {Editor: {extends: [Operator]}}"), "does not exist"},
		{"a service role that extends a platform role", service("roles: {Viewer: {}}", "service_roles: {Reader: {extends: [Viewer]}}"), "does not exist"},
		{"a common role that extends nothing that exists", strings.Replace(commonRoles, "Reader: {}", "Reader: {extends: [Owner]}", 1), "does not exist"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := access.ParseCatalog([]byte(tt.data))
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not name %q", err, tt.want)
			}
		})
	}
}
