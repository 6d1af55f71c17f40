package directory

import (
	"net/url"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/vpc"
)

// define lists every kind of object with its unique keys and indexes.
func (d *Directory) define() {
	d.Accounts = newTable(d, "account", "account",
		func(a *identity.Account) *object.Meta { return &a.Meta },
		func(a *identity.Account) string { return a.ID })

	d.Users = newTable(d, "user", "user",
		func(u *identity.User) *object.Meta { return &u.Meta },
		func(u *identity.User) string { return UserKey(u.AccountID, u.IAMID) })
	d.UsersByAccount = d.Users.index(func(u *identity.User) []string { return []string{u.AccountID} })

	d.ServiceIDs = newTable(d, "service-id", "service ID",
		func(s *identity.ServiceID) *object.Meta { return &s.Meta },
		func(s *identity.ServiceID) string { return s.ID })
	d.ServiceIDsByAccount = d.ServiceIDs.index(func(s *identity.ServiceID) []string { return []string{s.AccountID} })

	d.APIKeys = newTable(d, "api-key", "API key",
		func(k *identity.APIKey) *object.Meta { return &k.Meta },
		func(k *identity.APIKey) string { return k.ID })
	d.APIKeys.unique = func(k *identity.APIKey) []string { return []string{k.Hash} }
	d.APIKeysByHash = d.APIKeys.index(func(k *identity.APIKey) []string { return []string{k.Hash} })
	d.APIKeysByIdentity = d.APIKeys.index(func(k *identity.APIKey) []string { return []string{Key(k.AccountID, k.IAMID)} })
	d.APIKeysByAccount = d.APIKeys.index(func(k *identity.APIKey) []string { return []string{k.AccountID} })

	d.Profiles = newTable(d, "profile", "trusted profile",
		func(p *identity.Profile) *object.Meta { return &p.Meta },
		func(p *identity.Profile) string { return p.ID })
	d.Profiles.unique = func(p *identity.Profile) []string { return []string{Key(p.AccountID, p.Name)} }
	d.ProfilesByName = d.Profiles.index(d.Profiles.unique)
	d.ProfilesByAccount = d.Profiles.index(func(p *identity.Profile) []string { return []string{p.AccountID} })

	d.Links = newTable(d, "link", "link",
		func(l *identity.Link) *object.Meta { return &l.Meta },
		func(l *identity.Link) string { return l.ID })
	d.Links.unique = func(l *identity.Link) []string {
		return []string{Key(l.ProfileID, string(l.CRType), l.CRN, l.Namespace, l.ServiceAccount, l.ComponentType, l.ComponentName)}
	}
	d.LinksByProfile = d.Links.index(func(l *identity.Link) []string { return []string{l.ProfileID} })
	d.LinksByResource = d.Links.index(func(l *identity.Link) []string { return []string{ResourceKey(l.CRN)} })

	d.Rules = newTable(d, "claim-rule", "claim rule",
		func(r *identity.ClaimRule) *object.Meta { return &r.Meta },
		func(r *identity.ClaimRule) string { return r.ID })
	d.RulesByProfile = d.Rules.index(func(r *identity.ClaimRule) []string { return []string{r.ProfileID} })

	d.Policies = newTable(d, "policy", "policy",
		func(p *access.Policy) *object.Meta { return &p.Meta },
		func(p *access.Policy) string { return p.ID })
	d.PoliciesByAccount = d.Policies.index(func(p *access.Policy) []string { return []string{p.AccountID} })
	d.PoliciesOfSubject = d.Policies.index(func(p *access.Policy) []string { return []string{Key(p.AccountID, p.SubjectID())} })
	d.policiesBySubject = d.Policies.index(func(p *access.Policy) []string {
		if p.State != access.Active || p.Type != access.TypeAccess {
			return nil
		}
		return []string{Key(p.AccountID, p.SubjectID(), p.Service())}
	})
	d.AuthorizationsByTarget = d.Policies.index(func(p *access.Policy) []string {
		if p.State != access.Active || p.Type != access.TypeAuthorization {
			return nil
		}
		return []string{Key(p.AccountID, p.Service())}
	})

	d.Groups = newTable(d, "access-group", "access group",
		func(g *access.Group) *object.Meta { return &g.Meta },
		func(g *access.Group) string { return g.ID })
	d.Groups.unique = func(g *access.Group) []string { return []string{Key(g.AccountID, strings.ToLower(g.Name))} }
	d.GroupsByAccount = d.Groups.index(func(g *access.Group) []string { return []string{g.AccountID} })
	d.groupsByMember = d.Groups.index(func(g *access.Group) []string {
		keys := make([]string, len(g.Members))
		for i, m := range g.Members {
			keys[i] = Key(g.AccountID, m.IAMID)
		}
		return keys
	})

	d.ResourceGroups = newTable(d, "resource-group", "resource group",
		func(g *resource.Group) *object.Meta { return &g.Meta },
		func(g *resource.Group) string { return g.ID })
	d.ResourceGroups.unique = func(g *resource.Group) []string { return []string{Key(g.AccountID, g.Name)} }
	d.ResourceGroupsByAccount = d.ResourceGroups.index(func(g *resource.Group) []string { return []string{g.AccountID} })

	d.Resources = newTable(d, "resource-instance", "resource instance",
		func(i *resource.Instance) *object.Meta { return &i.Meta },
		func(i *resource.Instance) string { return i.GUID })
	d.ResourcesByAccount = d.Resources.index(func(i *resource.Instance) []string { return []string{i.AccountID} })

	d.Clusters = newTable(d, "cluster", "cluster",
		func(c *cluster.Cluster) *object.Meta { return &c.Meta },
		func(c *cluster.Cluster) string { return c.ID })
	d.Clusters.unique = func(c *cluster.Cluster) []string {
		keys := []string{Key(c.AccountID, "name", c.Name)}
		for _, claim := range c.Claims() {
			keys = append(keys, Key(c.AccountID, "issuer", claim))
		}
		return keys
	}
	d.ClustersByIssuer = d.Clusters.index(func(c *cluster.Cluster) []string { return []string{c.Issuer} })
	d.ClustersByAccount = d.Clusters.index(func(c *cluster.Cluster) []string { return []string{c.AccountID} })
	d.ClustersByGroup = d.Clusters.index(func(c *cluster.Cluster) []string { return c.GroupIDs })

	d.ClusterGroups = newTable(d, "cluster-group", "cluster group",
		func(g *cluster.Group) *object.Meta { return &g.Meta },
		func(g *cluster.Group) string { return g.ID })
	d.ClusterGroups.unique = func(g *cluster.Group) []string { return []string{Key(g.AccountID, g.Name)} }
	d.ClusterGroupsByAccount = d.ClusterGroups.index(func(g *cluster.Group) []string { return []string{g.AccountID} })

	d.WorkloadIssuers = newTable(d, "workload-issuer", "workload issuer",
		func(i *cluster.Issuer) *object.Meta { return &i.Meta },
		func(i *cluster.Issuer) string { return i.ID })
	d.WorkloadIssuers.unique = func(i *cluster.Issuer) []string {
		return []string{Key(i.AccountID, "name", i.Name), Key(i.AccountID, "issuer", i.Issuer)}
	}
	d.WorkloadIssuersByIssuer = d.WorkloadIssuers.index(func(i *cluster.Issuer) []string { return []string{i.Issuer} })
	d.WorkloadIssuersByAccount = d.WorkloadIssuers.index(func(i *cluster.Issuer) []string { return []string{i.AccountID} })

	d.Hosts = newTable(d, KindHost, "host",
		func(h *cluster.Host) *object.Meta { return &h.Meta },
		func(h *cluster.Host) string { return h.ID })
	d.Hosts.unique = func(h *cluster.Host) []string { return []string{h.Name} }
	d.HostsByKey = d.Hosts.index((*cluster.Host).KeyIDs)

	d.HostCursors = newTable(d, "host-cursor", "host's cursor",
		func(c *cluster.HostCursor) *object.Meta { return &c.Meta },
		func(c *cluster.HostCursor) string { return c.HostID })

	d.JoinTokens = newTable(d, "join-token", "join token",
		func(t *cluster.JoinToken) *object.Meta { return &t.Meta },
		func(t *cluster.JoinToken) string { return t.ID })
	d.JoinTokens.unique = func(t *cluster.JoinToken) []string { return []string{t.Hash} }
	d.JoinTokensByHash = d.JoinTokens.index(d.JoinTokens.unique)

	d.VPCs = newTable(d, "vpc", "VPC",
		func(v *vpc.VPC) *object.Meta { return &v.Meta },
		func(v *vpc.VPC) string { return v.ID })
	vnis := func(v *vpc.VPC) []string {
		if v.VNI == 0 {
			return nil
		}
		return []string{VNIKey(v.VNI)}
	}
	d.VPCs.unique = func(v *vpc.VPC) []string { return append(vnis(v), Key(v.AccountID, v.Name)) }
	d.VPCsByAccount = d.VPCs.index(func(v *vpc.VPC) []string { return []string{v.AccountID} })
	d.VPCsByVNI = d.VPCs.index(vnis)

	d.Subnets = newTable(d, "subnet", "subnet",
		func(s *vpc.Subnet) *object.Meta { return &s.Meta },
		func(s *vpc.Subnet) string { return s.ID })
	d.Subnets.unique = func(s *vpc.Subnet) []string { return []string{Key(s.AccountID, s.Name)} }
	d.SubnetsByAccount = d.Subnets.index(func(s *vpc.Subnet) []string { return []string{s.AccountID} })
	d.SubnetsByVPC = d.Subnets.index(func(s *vpc.Subnet) []string { return []string{s.VPCID} })

	d.Keys = newTable(d, "ssh-key", "key",
		func(k *vpc.Key) *object.Meta { return &k.Meta },
		func(k *vpc.Key) string { return k.ID })
	d.Keys.unique = func(k *vpc.Key) []string {
		return []string{Key(k.AccountID, "name", k.Name), Key(k.AccountID, "content", k.Fingerprint)}
	}
	d.KeysByAccount = d.Keys.index(func(k *vpc.Key) []string { return []string{k.AccountID} })

	d.Instances = newTable(d, KindInstance, "instance",
		func(i *vpc.Instance) *object.Meta { return &i.Meta },
		func(i *vpc.Instance) string { return i.ID })
	d.Instances.unique = func(i *vpc.Instance) []string { return []string{Key(i.AccountID, i.Name)} }
	d.InstancesByAccount = d.Instances.index(func(i *vpc.Instance) []string { return []string{i.AccountID} })
	d.InstancesByHost = d.Instances.index(func(i *vpc.Instance) []string { return []string{i.HostID} })
	d.InstancesByVPC = d.Instances.index(func(i *vpc.Instance) []string { return []string{i.VPCID} })
	d.InstancesBySubnet = d.Instances.index(func(i *vpc.Instance) []string {
		keys := make([]string, len(i.Interfaces))
		for n, nic := range i.Interfaces {
			keys[n] = nic.SubnetID
		}
		return keys
	})

	d.SecurityGroups = newTable(d, "security-group", "security group",
		func(g *vpc.SecurityGroup) *object.Meta { return &g.Meta },
		func(g *vpc.SecurityGroup) string { return g.ID })
	d.SecurityGroups.unique = func(g *vpc.SecurityGroup) []string { return []string{Key(g.VPCID, g.Name)} }
	d.SecurityGroupsByAccount = d.SecurityGroups.index(func(g *vpc.SecurityGroup) []string { return []string{g.AccountID} })
	d.SecurityGroupsByVPC = d.SecurityGroups.index(func(g *vpc.SecurityGroup) []string { return []string{g.VPCID} })

	d.Images = newTable(d, KindImage, "image",
		func(i *vpc.Image) *object.Meta { return &i.Meta },
		func(i *vpc.Image) string { return i.ID })
	d.Images.unique = func(i *vpc.Image) []string { return []string{Key(i.AccountID, i.Name)} }
	d.ImagesByAccount = d.Images.index(func(i *vpc.Image) []string { return []string{i.AccountID} })

	d.FloatingIPs = newTable(d, "floating-ip", "floating IP",
		func(f *vpc.FloatingIP) *object.Meta { return &f.Meta },
		func(f *vpc.FloatingIP) string { return f.ID })
	d.FloatingIPs.unique = func(f *vpc.FloatingIP) []string {
		return []string{Key("address", f.Address.String()), Key(f.AccountID, f.Name)}
	}
	d.FloatingIPsByAccount = d.FloatingIPs.index(func(f *vpc.FloatingIP) []string { return []string{f.AccountID} })
	d.FloatingIPsByInstance = d.FloatingIPs.index(func(f *vpc.FloatingIP) []string {
		if f.InstanceID == "" {
			return nil
		}
		return []string{f.InstanceID}
	})

	d.Settings = newTable(d, "account-settings", "settings object",
		func(s *identity.Settings) *object.Meta { return &s.Meta },
		func(s *identity.Settings) string { return s.AccountID })
	d.GroupSettings = newTable(d, "group-settings", "settings object",
		func(s *access.GroupSettings) *object.Meta { return &s.Meta },
		func(s *access.GroupSettings) string { return s.AccountID })
	d.AccessSettings = newTable(d, "access-settings", "settings object",
		func(s *access.Settings) *object.Meta { return &s.Meta },
		func(s *access.Settings) string { return s.AccountID })

	d.ServiceIDGroups = newTable(d, "service-id-group", "service ID group",
		func(g *identity.ServiceIDGroup) *object.Meta { return &g.Meta },
		func(g *identity.ServiceIDGroup) string { return g.ID })
	d.ServiceIDGroups.unique = func(g *identity.ServiceIDGroup) []string { return []string{Key(g.AccountID, g.Name)} }
	d.ServiceIDGroupsByAccount = d.ServiceIDGroups.index(func(g *identity.ServiceIDGroup) []string { return []string{g.AccountID} })
	d.ServiceIDsByGroup = d.ServiceIDs.index(func(s *identity.ServiceID) []string {
		if s.GroupID == "" {
			return nil
		}
		return []string{s.GroupID}
	})

	d.Preferences = newTable(d, "preference", "preference",
		func(p *identity.Preference) *object.Meta { return &p.Meta },
		func(p *identity.Preference) string { return PreferenceKey(p.AccountID, p.IAMID, p.Service, p.ID) })
	d.PreferencesByIdentity = d.Preferences.index(func(p *identity.Preference) []string { return []string{Key(p.AccountID, p.IAMID)} })

	d.Reports = newTable(d, "report", "report",
		func(r *identity.Report) *object.Meta { return &r.Meta },
		func(r *identity.Report) string { return r.ID })
	d.ReportsByAccount = d.Reports.index(func(r *identity.Report) []string { return []string{r.AccountID} })

	d.Providers = newTable(d, "identity-provider", "identity provider",
		func(p *identity.Provider) *object.Meta { return &p.Meta },
		func(p *identity.Provider) string { return p.ID })
	d.Providers.unique = func(p *identity.Provider) []string {
		return []string{Key(p.AccountID, "name", p.Name), Key(p.AccountID, "issuer", p.Issuer)}
	}
	d.ProvidersByAccount = d.Providers.index(func(p *identity.Provider) []string { return []string{p.AccountID} })
	d.ProvidersByIssuer = d.Providers.index(func(p *identity.Provider) []string { return []string{p.Issuer} })

	d.Usage = newTable(d, "usage", "usage record",
		func(u *identity.Usage) *object.Meta { return &u.Meta },
		func(u *identity.Usage) string { return u.ID })

	d.AccessUses = newTable(d, "access-use", "record of use",
		func(u *access.Use) *object.Meta { return &u.Meta },
		func(u *access.Use) string { return u.ID })
	d.AccessUsesBySubject = d.AccessUses.index(func(u *access.Use) []string { return []string{Key(u.AccountID, u.Subject)} })
	d.AccessUsesByAccount = d.AccessUses.index(func(u *access.Use) []string { return []string{u.AccountID} })

	d.LogSettings = newTable(d, "activity-settings", "settings object",
		func(s *activity.Settings) *object.Meta { return &s.Meta },
		func(s *activity.Settings) string { return s.AccountID })
	d.ExportCursors = newTable(d, "export-cursor", "export's cursor",
		func(c *activity.ExportCursor) *object.Meta { return &c.Meta },
		func(c *activity.ExportCursor) string { return c.Route })

	d.GroupRules = newTable(d, "group-rule", "access group rule",
		func(r *access.GroupRule) *object.Meta { return &r.Meta },
		func(r *access.GroupRule) string { return r.ID })
	d.GroupRulesByGroup = d.GroupRules.index(func(r *access.GroupRule) []string { return []string{r.GroupID} })
	d.GroupRulesByAccount = d.GroupRules.index(func(r *access.GroupRule) []string { return []string{r.AccountID} })
	d.Memberships = newTable(d, "membership", "membership",
		func(m *access.Membership) *object.Meta { return &m.Meta },
		func(m *access.Membership) string { return UserKey(m.AccountID, m.IAMID) })
	d.MembershipsByGroup = d.Memberships.index(func(m *access.Membership) []string {
		keys := make([]string, len(m.Groups))
		for i, g := range m.Groups {
			keys[i] = g.GroupID
		}
		return keys
	})

	d.CustomRoles = newTable(d, kindCustomRole, "custom role",
		func(r *access.CustomRole) *object.Meta { return &r.Meta },
		func(r *access.CustomRole) string { return r.ID })
	d.CustomRoles.unique = func(r *access.CustomRole) []string { return []string{Key(r.AccountID, r.Name)} }
	d.CustomRolesByAccount = d.CustomRoles.index(func(r *access.CustomRole) []string { return []string{r.AccountID} })
	d.Services = newTable(d, kindService, "service",
		func(s *access.RegisteredService) *object.Meta { return &s.Meta },
		func(s *access.RegisteredService) string { return ServiceKey(s.AccountID, s.Name) })
	d.ServicesByAccount = d.Services.index(func(s *access.RegisteredService) []string { return []string{s.AccountID} })

	d.ResourceKeys = newTable(d, "resource-key", "resource key",
		func(k *resource.Key) *object.Meta { return &k.Meta },
		func(k *resource.Key) string { return k.GUID })
	d.ResourceKeysByAccount = d.ResourceKeys.index(func(k *resource.Key) []string { return []string{k.AccountID} })
	d.ResourceKeysByInstance = d.ResourceKeys.index(func(k *resource.Key) []string { return []string{k.InstanceGUID} })
	d.Reclamations = newTable(d, "reclamation", "reclamation",
		func(r *resource.Reclamation) *object.Meta { return &r.Meta },
		func(r *resource.Reclamation) string { return r.ID })
	d.ReclamationsByAccount = d.Reclamations.index(func(r *resource.Reclamation) []string { return []string{r.AccountID} })

	d.SigningKeys = newTable(d, "signing-key", "signing key",
		func(k *SigningKey) *object.Meta { return &k.Meta },
		func(k *SigningKey) string { return k.ID })
}

// UserKey is the id of a user in one account; one person may be in several.
func UserKey(accountID, iamID string) string { return accountID + "/" + iamID }

// Kinds whose change makes another catalog.
const (
	kindService    = "service"
	kindCustomRole = "custom-role"
)

// PreferenceKey is the id of a preference.
func PreferenceKey(accountID, iamID, service, id string) string {
	return strings.Join([]string{accountID, url.PathEscape(iamID), url.PathEscape(service), url.PathEscape(id)}, "/")
}

// ServiceKey is the id of a service that an account has registered.
func ServiceKey(accountID, name string) string { return accountID + "/" + name }
