// Package directory holds all objects of an installation in memory, indexed by
// the keys that requests carry, and is the one way to change them. Reads never
// touch the store. A change is a transaction: checked, made durable together
// with its activity event, applied to memory, and only then answered.
package directory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/vpc"
)

// Config are the directory's collaborators.
type Config struct {
	Store   store.Store
	Catalog *access.Catalog
	Now     func() time.Time
}

// Directory is the installation's objects. Its tables and indexes may be read
// from any goroutine.
type Directory struct {
	cfg    Config
	writer chan struct{} // holds one token: the right to change
	mu     sync.RWMutex  // guards all rows
	tables map[string]table

	watchMu  sync.Mutex
	watchers map[*Watcher]struct{}

	Accounts *Table[identity.Account]

	Users          *Table[identity.User]
	UsersByAccount *Index[identity.User]

	ServiceIDs          *Table[identity.ServiceID]
	ServiceIDsByAccount *Index[identity.ServiceID]

	APIKeys           *Table[identity.APIKey]
	APIKeysByHash     *Index[identity.APIKey]
	APIKeysByIdentity *Index[identity.APIKey]
	APIKeysByAccount  *Index[identity.APIKey]

	Profiles          *Table[identity.Profile]
	ProfilesByName    *Index[identity.Profile] // key: Key(account, name)
	ProfilesByAccount *Index[identity.Profile]

	Links           *Table[identity.Link]
	LinksByProfile  *Index[identity.Link]
	LinksByResource *Index[identity.Link] // key: ResourceKey(crn)

	Rules          *Table[identity.ClaimRule]
	RulesByProfile *Index[identity.ClaimRule]

	Policies          *Table[access.Policy]
	PoliciesByAccount *Index[access.Policy]
	policiesBySubject *Index[access.Policy] // key: Key(account, subject, service or "")
	PoliciesOfSubject *Index[access.Policy] // key: Key(account, subject), deleted ones too

	Groups          *Table[access.Group]
	GroupsByAccount *Index[access.Group]
	groupsByMember  *Index[access.Group] // key: Key(account, iam id)

	ResourceGroups          *Table[resource.Group]
	ResourceGroupsByAccount *Index[resource.Group]

	Resources          *Table[resource.Instance]
	ResourcesByAccount *Index[resource.Instance]

	Clusters          *Table[cluster.Cluster]
	ClustersByIssuer  *Index[cluster.Cluster]
	ClustersByAccount *Index[cluster.Cluster]
	ClustersByGroup   *Index[cluster.Cluster] // key: group id

	ClusterGroups          *Table[cluster.Group]
	ClusterGroupsByAccount *Index[cluster.Group]

	WorkloadIssuers          *Table[cluster.Issuer]
	WorkloadIssuersByIssuer  *Index[cluster.Issuer] // key: the iss claim
	WorkloadIssuersByAccount *Index[cluster.Issuer]

	Hosts      *Table[cluster.Host]
	HostsByKey *Index[cluster.Host] // key: key id

	HostCursors *Table[cluster.HostCursor] // by host

	AccessUses          *Table[access.Use]
	AccessUsesBySubject *Index[access.Use] // key: Key(account, subject)
	AccessUsesByAccount *Index[access.Use]

	LogSettings   *Table[activity.Settings]     // by account
	ExportCursors *Table[activity.ExportCursor] // by route

	JoinTokens       *Table[cluster.JoinToken]
	JoinTokensByHash *Index[cluster.JoinToken]

	VPCs          *Table[vpc.VPC]
	VPCsByAccount *Index[vpc.VPC]
	VPCsByVNI     *Index[vpc.VPC] // key: VNIKey

	Subnets          *Table[vpc.Subnet]
	SubnetsByAccount *Index[vpc.Subnet]
	SubnetsByVPC     *Index[vpc.Subnet]

	Keys          *Table[vpc.Key]
	KeysByAccount *Index[vpc.Key]

	Instances          *Table[vpc.Instance]
	InstancesByAccount *Index[vpc.Instance]
	InstancesByHost    *Index[vpc.Instance]
	InstancesByVPC     *Index[vpc.Instance]
	InstancesBySubnet  *Index[vpc.Instance]

	FloatingIPs           *Table[vpc.FloatingIP]
	FloatingIPsByAccount  *Index[vpc.FloatingIP]
	FloatingIPsByInstance *Index[vpc.FloatingIP]

	SecurityGroups          *Table[vpc.SecurityGroup]
	SecurityGroupsByAccount *Index[vpc.SecurityGroup]
	SecurityGroupsByVPC     *Index[vpc.SecurityGroup]

	Images          *Table[vpc.Image] // registered ones
	ImagesByAccount *Index[vpc.Image]

	SigningKeys *Table[SigningKey]

	Settings       *Table[identity.Settings]    // by account; read them with SettingsOf
	GroupSettings  *Table[access.GroupSettings] // by account; read them with GroupSettingsOf
	AccessSettings *Table[access.Settings]      // by account

	ServiceIDGroups          *Table[identity.ServiceIDGroup]
	ServiceIDGroupsByAccount *Index[identity.ServiceIDGroup]
	ServiceIDsByGroup        *Index[identity.ServiceID]

	Preferences           *Table[identity.Preference] // id: PreferenceKey
	PreferencesByIdentity *Index[identity.Preference] // key: Key(account, iam id)

	Reports          *Table[identity.Report]
	ReportsByAccount *Index[identity.Report]

	Providers          *Table[identity.Provider]
	ProvidersByAccount *Index[identity.Provider]
	ProvidersByIssuer  *Index[identity.Provider]

	Usage *Table[identity.Usage]

	GroupRules          *Table[access.GroupRule]
	GroupRulesByGroup   *Index[access.GroupRule]
	GroupRulesByAccount *Index[access.GroupRule]
	Memberships         *Table[access.Membership] // id: UserKey
	MembershipsByGroup  *Index[access.Membership]

	CustomRoles          *Table[access.CustomRole]
	CustomRolesByAccount *Index[access.CustomRole]
	Services             *Table[access.RegisteredService]
	ServicesByAccount    *Index[access.RegisteredService]

	AuthorizationsByTarget *Index[access.Policy] // key: Key(account, target service or "")

	ResourceKeys           *Table[resource.Key]
	ResourceKeysByAccount  *Index[resource.Key]
	ResourceKeysByInstance *Index[resource.Key]
	Reclamations           *Table[resource.Reclamation]
	ReclamationsByAccount  *Index[resource.Reclamation]

	catalogs sync.Map // by account: *accountCatalog
}

// SigningKey is a key pair of this installation, its private half sealed.
type SigningKey struct {
	object.Meta
	ID        string    `json:"id"`   // the key id in tokens
	Use       string    `json:"use"`  // who signs with it: "access-token", "host/<id>" or "activity-log"
	Alg       string    `json:"alg"`  // ES256, RS256, or Ed25519 for the activity log
	NotBefore time.Time `json:"nbf"`  // published from creation on, signs from here on
	Until     time.Time `json:"naf"`  // signs until here
	Sealed    []byte    `json:"priv"` // PKCS #8, see token.Sealer; that of the activity log in the form of a note's key
	Public    []byte    `json:"pub"`  // PKIX, or in the form of a note's key
}

// Key joins the parts of a composite index key. The separator cannot occur in
// any part that an API accepts.
func Key(parts ...string) string { return strings.Join(parts, "\x00") }

// VNIKey is the key of the VPC that has a VXLAN network identifier.
func VNIKey(n uint32) string { return Key("vni", strconv.FormatUint(uint64(n), 10)) }

// ResourceKey is the index key of the resource that a CRN denotes: the CRN
// without its cname and ctype, which name the cloud that a client believes it
// talks to. Text that is not a CRN is its own key.
func ResourceKey(s string) string {
	c, err := crn.Parse(s)
	if err != nil {
		return s
	}
	c.CName, c.CType = "", ""
	return c.String()
}

// Open loads all objects of the store.
func Open(ctx context.Context, cfg Config) (*Directory, error) {
	d := &Directory{cfg: cfg, writer: make(chan struct{}, 1), tables: map[string]table{}, watchers: map[*Watcher]struct{}{}}
	d.writer <- struct{}{}
	d.define()
	err := cfg.Store.Load(ctx, func(r store.Record) error {
		t, ok := d.tables[r.Kind]
		if !ok {
			return fmt.Errorf("load %s %s: this program does not know the kind; was the data written by a newer one?", r.Kind, r.ID)
		}
		return t.load(r)
	})
	if err != nil {
		return nil, err
	}
	return d, nil
}

// Builtin returns the catalog that ships with the server.
func (d *Directory) Builtin() *access.Catalog { return d.cfg.Catalog }

// Catalog implements [access.View]: the built-in services and roles with those
// that the account has added.
func (d *Directory) Catalog(accountID string) *access.Catalog {
	known := d.knownCatalog(accountID)
	if known != nil && !known.stale {
		return known.catalog
	}
	var before *access.Catalog
	if known != nil {
		before = known.catalog
	}
	d.mu.RLock()
	now := accountCatalog{
		services: slices.Clone(d.ServicesByAccount.rows[accountID]), roles: slices.Clone(d.CustomRolesByAccount.rows[accountID]),
	}
	d.mu.RUnlock()
	// Made without the lock: an account with many services would hold up all
	// others.
	now.catalog = d.cfg.Catalog.WithAgain(before, now.services, now.roles)
	// Stored under the lock that changes take, so that an older catalog never
	// replaces a newer one.
	d.mu.RLock()
	defer d.mu.RUnlock()
	switch {
	case !d.upToDate(accountID, &now):
	case now.catalog == d.cfg.Catalog:
		d.catalogs.Delete(accountID)
	default:
		d.catalogs.Store(accountID, &now)
	}
	return now.catalog
}

// accountCatalog is an account's catalog and what it was made of.
type accountCatalog struct {
	catalog  *access.Catalog
	services []*access.RegisteredService
	roles    []*access.CustomRole
	stale    bool // kept only for the next one to be made from
}

func (d *Directory) knownCatalog(accountID string) *accountCatalog {
	value, _ := d.catalogs.Load(accountID)
	known, _ := value.(*accountCatalog)
	return known
}

func (d *Directory) upToDate(accountID string, c *accountCatalog) bool {
	return slices.Equal(c.services, d.ServicesByAccount.rows[accountID]) && slices.Equal(c.roles, d.CustomRolesByAccount.rows[accountID])
}

// outdateCatalogs takes the catalogs out of use whose services or roles have
// changed.
func (d *Directory) outdateCatalogs() {
	d.catalogs.Range(func(key, value any) bool {
		accountID, _ := key.(string)
		if c, ok := value.(*accountCatalog); ok && !c.stale && !d.upToDate(accountID, c) {
			d.catalogs.Store(key, &accountCatalog{catalog: c.catalog, stale: true})
		}
		return true
	})
}

// StaticGroupsOf returns the ids of the access groups that somebody has put an
// identity into.
func (d *Directory) StaticGroupsOf(accountID, iamID string) []string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.staticGroupsOf(accountID, iamID)
}

func (d *Directory) staticGroupsOf(accountID, iamID string) []string {
	var out []string
	for _, g := range d.groupsByMember.rows[Key(accountID, iamID)] {
		out = append(out, g.ID)
	}
	slices.Sort(out)
	return out
}

// GroupsOf implements [access.View]: the groups that an identity is in by
// hand, by rule, and with everybody.
func (d *Directory) GroupsOf(accountID, iamID string, now time.Time) []string {
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := d.staticGroupsOf(accountID, iamID)
	if m, ok := d.Memberships.rows[UserKey(accountID, iamID)]; ok {
		for _, g := range m.Groups {
			if d.current(g, now) && !slices.Contains(out, g.GroupID) {
				out = append(out, g.GroupID)
			}
		}
	}
	if s, ok := d.GroupSettings.rows[accountID]; !ok || s.PublicAccess {
		out = append(out, access.PublicAccess)
	}
	return out
}

// current reports whether a membership by rule holds: its time has not come,
// and the rule and its group are as they were at login.
func (d *Directory) current(m access.DynamicMember, now time.Time) bool {
	rule, ok := d.GroupRules.rows[m.RuleID]
	if !ok || rule.Revision != m.Revision || rule.GroupID != m.GroupID {
		return false
	}
	_, ok = d.Groups.rows[m.GroupID]
	return ok && now.Before(m.Until)
}

// DynamicMembersOf returns the memberships by rule that hold now, by IAM ID.
func (d *Directory) DynamicMembersOf(groupID string, now time.Time) map[string]access.DynamicMember {
	d.mu.RLock()
	defer d.mu.RUnlock()
	out := map[string]access.DynamicMember{}
	for _, m := range d.MembershipsByGroup.rows[groupID] {
		for _, g := range m.Groups {
			if g.GroupID == groupID && d.current(g, now) {
				out[m.IAMID] = g
			}
		}
	}
	return out
}

// AuthorizationsOn implements [access.View].
func (d *Directory) AuthorizationsOn(accountID, service string) []*access.Policy {
	d.mu.RLock()
	defer d.mu.RUnlock()
	index := d.AuthorizationsByTarget.rows
	out := slices.Clone(index[Key(accountID, "")])
	if service != "" {
		out = append(out, index[Key(accountID, service)]...)
		if parent, _, child := strings.Cut(service, "."); child {
			out = append(out, index[Key(accountID, parent)]...)
		}
	}
	return out
}

// Interaction implements [access.View].
func (d *Directory) Interaction(accountID string) *access.Settings {
	s, _ := d.AccessSettings.Get(accountID)
	return s
}

// SettingsOf returns an account's identity settings, or the default ones.
func (d *Directory) SettingsOf(accountID string) *identity.Settings {
	if s, ok := d.Settings.Get(accountID); ok {
		return s
	}
	return identity.DefaultSettings(accountID)
}

// GroupSettingsOf returns an account's access group settings, or the default
// ones.
func (d *Directory) GroupSettingsOf(accountID string) *access.GroupSettings {
	if s, ok := d.GroupSettings.Get(accountID); ok {
		return s
	}
	return &access.GroupSettings{AccountID: accountID, PublicAccess: true}
}

// PoliciesOf implements [access.View].
func (d *Directory) PoliciesOf(accountID, subjectID, service string) []*access.Policy {
	d.mu.RLock()
	defer d.mu.RUnlock()
	index := d.policiesBySubject.rows
	out := slices.Clone(index[Key(accountID, subjectID, "")])
	if service != "" {
		out = append(out, index[Key(accountID, subjectID, service)]...)
		if parent, _, child := strings.Cut(service, "."); child {
			out = append(out, index[Key(accountID, subjectID, parent)]...)
		}
	}
	return out
}

// Tx is a transaction under way. It reads the state before it: what it stages
// is seen when Update has returned.
type Tx struct {
	By  string // IAM ID of who changes
	Now time.Time

	batch   store.Batch
	apply   []func()
	touched []string
	changes []activity.Changed
	err     error
}

// Changes returns the objects that the transaction changes so far, in the order
// in which it did first, each with its state before and after it.
func (tx *Tx) Changes() []activity.Changed {
	out := make([]activity.Changed, 0, len(tx.changes))
	at := map[[2]string]int{}
	for _, c := range tx.changes {
		key := [2]string{c.Kind, c.ID}
		if i, again := at[key]; again {
			out[i].Next = c.Next
			continue
		}
		at[key] = len(out)
		out = append(out, c)
	}
	return out
}

func (tx *Tx) fail(err error) { tx.err = errors.Join(tx.err, err) }

// Record adds an activity event that becomes durable with the change.
func (tx *Tx) Record(e *activity.Event) {
	encoded, err := store.NewEvent(e)
	if err != nil {
		tx.fail(err)
		return
	}
	if e.Outcome == activity.Success {
		encoded.Changed = e.Target.ID
	}
	tx.batch.Events = append(tx.batch.Events, encoded)
}

// Update runs f as the only writer and commits what it staged. When f or the
// commit fails, nothing has changed. The returned error is a fault.
func (d *Directory) Update(ctx context.Context, by string, f func(*Tx) error) error {
	select {
	case <-d.writer:
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "service_unavailable", "The request ended before its turn to write came.").Because(ctx.Err())
	}
	defer func() { d.writer <- struct{}{} }()
	// Whole seconds would make two changes in one second look the same; the
	// store keeps nanoseconds, the APIs round as they like.
	tx := &Tx{By: by, Now: d.cfg.Now().UTC()}
	if err := f(tx); err != nil {
		return err
	}
	if tx.err != nil {
		return fault.Of(tx.err)
	}
	if len(tx.apply) == 0 && len(tx.batch.Events) == 0 {
		return nil
	}
	err := d.cfg.Store.Commit(ctx, tx.batch)
	// What the store has, though it does not promise to keep it, is what later
	// changes start from.
	var lost *store.LostError
	if err != nil && (!errors.As(err, &lost) || !lost.Committed) {
		return d.refused(err)
	}
	d.mu.Lock()
	for _, apply := range tx.apply {
		apply()
	}
	if slices.ContainsFunc(tx.touched, func(kind string) bool { return kind == kindService || kind == kindCustomRole }) {
		d.outdateCatalogs()
	}
	d.mu.Unlock()
	d.notify(tx.touched)
	if err != nil {
		return d.refused(err)
	}
	return nil
}

func (d *Directory) refused(err error) error {
	var kept *store.RefusedError
	if errors.As(err, &kept) {
		return kept.Fault()
	}
	var taken *store.TakenError
	if errors.As(err, &taken) {
		kind, _, _ := strings.Cut(taken.Key, "/")
		if t, ok := d.tables[kind].(interface{ taken() error }); ok {
			return t.taken()
		}
	}
	if errors.Is(err, store.ErrStale) {
		return fault.New(fault.Stale, "conflict", "The object was changed by somebody else in the meantime; read it again.").Because(err)
	}
	e := fault.New(fault.Unavailable, "service_unavailable", "The change could not be stored, so nothing has changed. Try again.").Because(err)
	e.RetryAfter = time.Second
	return e
}

// Watcher is told that objects of some kinds have changed, not which: it looks
// for itself. Signals that nobody fetched fall together into one.
type Watcher struct {
	C     <-chan struct{}
	c     chan struct{}
	kinds []string
	dir   *Directory
}

// Kinds that can be watched.
const (
	KindInstance = "instance"
	KindHost     = "host"
	KindImage    = "image"
)

// Watch returns a watcher of the kinds. Stop ends it.
func (d *Directory) Watch(kinds ...string) *Watcher {
	c := make(chan struct{}, 1)
	w := &Watcher{C: c, c: c, kinds: kinds, dir: d}
	d.watchMu.Lock()
	defer d.watchMu.Unlock()
	d.watchers[w] = struct{}{}
	return w
}

// Stop ends the watch.
func (w *Watcher) Stop() {
	w.dir.watchMu.Lock()
	defer w.dir.watchMu.Unlock()
	delete(w.dir.watchers, w)
}

func (d *Directory) notify(kinds []string) {
	d.watchMu.Lock()
	defer d.watchMu.Unlock()
	for w := range d.watchers {
		if slices.ContainsFunc(kinds, func(k string) bool { return slices.Contains(w.kinds, k) }) {
			select {
			case w.c <- struct{}{}:
			default:
			}
		}
	}
}

// DeleteLinksOf stages the removal of every link to a compute resource, in
// whatever account its profile is, and returns the ids of those in the resource's
// own account: the others are not for it to know. Whoever deletes a resource calls
// it in the same transaction. The cname and ctype of the CRN do not count.
func (d *Directory) DeleteLinksOf(tx *Tx, resource string) []string {
	ids := []string{}
	name, err := crn.Parse(resource)
	for _, l := range d.LinksByResource.Get(ResourceKey(resource)) {
		d.Links.Delete(tx, l)
		if err != nil || name.AccountID() == l.AccountID {
			ids = append(ids, l.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// ForgetSubject stages the removal of what an identity that goes away was
// given: its policies, its places in access groups and its preferences. It
// returns the ids of the policies and groups.
func (d *Directory) ForgetSubject(tx *Tx, accountID, iamID string) (policies, groups []string) {
	for _, p := range d.PoliciesOfSubject.Get(Key(accountID, iamID)) {
		d.Policies.Delete(tx, p)
		policies = append(policies, p.ID)
	}
	for _, id := range d.StaticGroupsOf(accountID, iamID) {
		g, ok := d.Groups.Get(id)
		if !ok {
			continue
		}
		rest := *g
		rest.Members = slices.DeleteFunc(slices.Clone(g.Members), func(m access.Member) bool { return m.IAMID == iamID })
		d.Groups.Put(tx, &rest)
		groups = append(groups, id)
	}
	if m, ok := d.Memberships.Get(UserKey(accountID, iamID)); ok {
		d.Memberships.Delete(tx, m)
	}
	for _, p := range d.PreferencesByIdentity.Get(Key(accountID, iamID)) {
		d.Preferences.Delete(tx, p)
	}
	slices.Sort(policies)
	return policies, groups
}

// EndMembershipsOf stages the end of the memberships that an account's rules
// about an issuer have given.
func (d *Directory) EndMembershipsOf(tx *Tx, accountID, issuer string) {
	ended := map[string]bool{}
	for _, r := range d.GroupRulesByAccount.Get(accountID) {
		if r.RealmName == issuer {
			ended[r.ID] = true
		}
	}
	for _, m := range d.Memberships.All() {
		if m.AccountID != accountID {
			continue
		}
		rest := *m
		rest.Groups = slices.DeleteFunc(slices.Clone(m.Groups), func(g access.DynamicMember) bool { return ended[g.RuleID] })
		switch {
		case len(rest.Groups) == 0:
			d.Memberships.Delete(tx, m)
		case len(rest.Groups) < len(m.Groups):
			d.Memberships.Put(tx, &rest)
		}
	}
}

// ClustersOf returns the clusters registered with an issuer.
func (d *Directory) ClustersOf(issuer string) []*cluster.Cluster {
	return d.ClustersByIssuer.Get(issuer)
}

// ClusterGroupNames returns the names of the groups that a cluster is in.
func (d *Directory) ClusterGroupNames(c *cluster.Cluster) []string {
	var names []string
	for _, id := range c.GroupIDs {
		if g, ok := d.ClusterGroups.Get(id); ok && g.AccountID == c.AccountID {
			names = append(names, g.Name)
		}
	}
	return names
}

// WorkloadIssuersOf returns the workload issuers registered with an issuer.
func (d *Directory) WorkloadIssuersOf(issuer string) []*cluster.Issuer {
	return d.WorkloadIssuersByIssuer.Get(issuer)
}

// ProvidersOf returns the identity providers registered with an issuer.
func (d *Directory) ProvidersOf(issuer string) []*identity.Provider {
	return d.ProvidersByIssuer.Get(issuer)
}

// HostOfKey returns the one host that signs with a key id. A key id that
// several hosts claim is nobody's: none of them may pass for another.
func (d *Directory) HostOfKey(keyID string) (*cluster.Host, bool) {
	if hosts := d.HostsByKey.Get(keyID); len(hosts) == 1 {
		return hosts[0], true
	}
	return nil, false
}

// Instance returns an instance by id.
func (d *Directory) Instance(id string) (*vpc.Instance, bool) { return d.Instances.Get(id) }

// ResourceGroupName returns a resource group's name, or "".
func (d *Directory) ResourceGroupName(id string) string {
	if g, ok := d.ResourceGroups.Get(id); ok {
		return g.Name
	}
	return ""
}
