package directory_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
)

// machine compares a directory on a real store with a model that is nothing
// but three maps, walked for every answer.
type machine struct {
	t     *rapid.T
	file  string
	store *sqlite.Store
	dir   *directory.Directory
	now   time.Time
	fail  error // of the next commit
	next  int

	profiles map[string]identity.Profile
	groups   map[string]access.Group
	policies map[string]access.Policy
}

// failing lets a test break the disk under the directory.
type failing struct {
	store.Store
	m *machine
}

func (f failing) Commit(ctx context.Context, b store.Batch) error {
	if err := f.m.fail; err != nil {
		f.m.fail = nil
		return err
	}
	return f.Store.Commit(ctx, b)
}

func (m *machine) open() {
	ctx := context.Background()
	var err error
	if m.store, err = sqlite.Open(ctx, m.file); err != nil {
		m.t.Fatal(err)
	}
	m.dir, err = directory.Open(ctx, directory.Config{Store: failing{m.store, m}, Now: func() time.Time { return m.now }})
	if err != nil {
		m.t.Fatal(err)
	}
}

var (
	genAccount = rapid.SampledFrom([]string{"a", "b"})
	genName    = rapid.SampledFrom([]string{"x", "y", "z"})
	genMember  = rapid.SampledFrom([]string{"iam-Profile-1", "iam-Profile-2", "iam-Profile-3"})
	genService = rapid.SampledFrom([]string{"is", "kms", ""})
	genState   = rapid.SampledFrom([]string{access.Active, access.Active, access.Deleted})
)

// clone copies an object through JSON, as an API does.
func clone[T any](v T) T {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	var out T
	if err := json.Unmarshal(b, &out); err != nil {
		panic(err)
	}
	return out
}

func (m *machine) id(prefix string) string {
	m.next++
	return fmt.Sprint(prefix, m.next)
}

func (m *machine) drawProfile(p identity.Profile) identity.Profile {
	p.AccountID, p.Name, p.Description = genAccount.Draw(m.t, "account"), genName.Draw(m.t, "name"), m.id("description ")
	return p
}

func (m *machine) drawGroup(g access.Group) access.Group {
	g.AccountID, g.Name, g.Members = genAccount.Draw(m.t, "account"), genName.Draw(m.t, "name"), nil
	if rapid.Bool().Draw(m.t, "upper case") {
		g.Name = strings.ToUpper(g.Name)
	}
	for _, id := range rapid.SliceOfN(genMember, 0, 3).Draw(m.t, "members") {
		g.Members = append(g.Members, access.Member{IAMID: id})
	}
	return g
}

func (m *machine) drawPolicy(p access.Policy) access.Policy {
	p.AccountID, p.Type, p.State = genAccount.Draw(m.t, "account"), access.TypeAccess, genState.Draw(m.t, "state")
	p.Subject = []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(genMember.Draw(m.t, "subject"))}}
	p.Resource, p.Roles = nil, []string{m.id("role ")}
	if s := genService.Draw(m.t, "service"); s != "" {
		p.Resource = []access.Attribute{{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text(s)}}
	}
	return p
}

// step is one change in a transaction: what it does to the directory, and what
// it does to a copy of the model, with the fault it must end in there.
type step struct {
	stage func(tx *directory.Tx)
	model func(n *machine) fault.Kind // -1 for none
}

const fine fault.Kind = -1

// put makes the step that writes obj, whose revision is the one it was read
// with. taken says which other object of the model holds its unique key.
func put[T any](m *machine, t *directory.Table[T], rows func(*machine) map[string]T, id string, obj T, meta func(*T) *object.Meta, taken func(a, b T) bool) step {
	expect := meta(&obj).Revision
	return step{
		stage: func(tx *directory.Tx) {
			c := clone(obj)
			t.Put(tx, &c)
		},
		model: func(n *machine) fault.Kind {
			old, exists := rows(n)[id]
			if exists != (expect != 0) || exists && meta(&old).Revision != expect {
				return fault.Stale
			}
			for other, row := range rows(n) {
				if other != id && taken(row, obj) {
					return fault.Conflict
				}
			}
			c := clone(obj)
			if !exists {
				meta(&c).CreatedAt, meta(&c).CreatedBy = m.now, "me"
			}
			meta(&c).Revision, meta(&c).ModifiedAt, meta(&c).ModifiedBy = expect+1, m.now, "me"
			rows(n)[id] = c
			return fine
		},
	}
}

func profilesOf(m *machine) map[string]identity.Profile { return m.profiles }
func groupsOf(m *machine) map[string]access.Group       { return m.groups }
func policiesOf(m *machine) map[string]access.Policy    { return m.policies }

func (m *machine) putProfile(p identity.Profile) step {
	return put(m, m.dir.Profiles, profilesOf, p.ID, p, func(p *identity.Profile) *object.Meta { return &p.Meta },
		func(a, b identity.Profile) bool { return a.AccountID == b.AccountID && a.Name == b.Name })
}

func (m *machine) putGroup(g access.Group) step {
	return put(m, m.dir.Groups, groupsOf, g.ID, g, func(g *access.Group) *object.Meta { return &g.Meta },
		func(a, b access.Group) bool { return a.AccountID == b.AccountID && strings.EqualFold(a.Name, b.Name) })
}

func (m *machine) putPolicy(p access.Policy) step {
	return put(m, m.dir.Policies, policiesOf, p.ID, p, func(p *access.Policy) *object.Meta { return &p.Meta },
		func(access.Policy, access.Policy) bool { return false })
}

func existing[T any](m *machine, rows map[string]T) (T, bool) {
	var none T
	if len(rows) == 0 {
		return none, false
	}
	return clone(rows[rapid.SampledFrom(slices.Sorted(maps.Keys(rows))).Draw(m.t, "which")]), true
}

// draw makes a random step about objects as they are now, or were: a revision
// is sometimes one behind or ahead.
func (m *machine) draw() step {
	off := func(meta *object.Meta) {
		if rapid.IntRange(0, 5).Draw(m.t, "stale") == 0 {
			meta.Revision += rapid.SampledFrom([]int64{-1, 1}).Draw(m.t, "off by")
		}
	}
	switch rapid.SampledFrom([]string{"profile", "profile", "group", "policy"}).Draw(m.t, "kind") {
	case "profile":
		p, ok := existing(m, m.profiles)
		if !ok || rapid.IntRange(0, 2).Draw(m.t, "new") == 0 {
			return m.putProfile(m.drawProfile(identity.Profile{ID: m.id("Profile-")}))
		}
		off(&p.Meta)
		if rapid.IntRange(0, 3).Draw(m.t, "delete") == 0 {
			return remove(m.dir.Profiles, profilesOf, p.ID, p, func(p *identity.Profile) *object.Meta { return &p.Meta })
		}
		return m.putProfile(m.drawProfile(p))
	case "group":
		g, ok := existing(m, m.groups)
		if !ok || rapid.IntRange(0, 2).Draw(m.t, "new") == 0 {
			return m.putGroup(m.drawGroup(access.Group{ID: m.id("AccessGroupId-")}))
		}
		off(&g.Meta)
		if rapid.IntRange(0, 3).Draw(m.t, "delete") == 0 {
			return remove(m.dir.Groups, groupsOf, g.ID, g, func(g *access.Group) *object.Meta { return &g.Meta })
		}
		return m.putGroup(m.drawGroup(g))
	}
	p, ok := existing(m, m.policies)
	if !ok || rapid.IntRange(0, 2).Draw(m.t, "new") == 0 {
		return m.putPolicy(m.drawPolicy(access.Policy{ID: m.id("policy-")}))
	}
	off(&p.Meta)
	if rapid.IntRange(0, 3).Draw(m.t, "delete") == 0 {
		return remove(m.dir.Policies, policiesOf, p.ID, p, func(p *access.Policy) *object.Meta { return &p.Meta })
	}
	return m.putPolicy(m.drawPolicy(p))
}

func remove[T any](t *directory.Table[T], rows func(*machine) map[string]T, id string, obj T, meta func(*T) *object.Meta) step {
	expect := meta(&obj).Revision
	return step{
		stage: func(tx *directory.Tx) { t.Delete(tx, &obj) },
		model: func(n *machine) fault.Kind {
			if old, ok := rows(n)[id]; !ok || meta(&old).Revision != expect {
				return fault.Stale
			}
			delete(rows(n), id)
			return fine
		},
	}
}

// update runs steps as one transaction in the directory and in the model.
func (m *machine) update(outcome error, steps ...step) {
	m.now = m.now.Add(time.Millisecond)
	next := &machine{profiles: maps.Clone(m.profiles), groups: maps.Clone(m.groups), policies: maps.Clone(m.policies)}
	want := fine
	for _, s := range steps {
		if want = s.model(next); want != fine {
			break
		}
	}
	if m.fail != nil {
		want = fault.Unavailable
	}
	err := m.dir.Update(context.Background(), "me", func(tx *directory.Tx) error {
		for _, s := range steps {
			s.stage(tx)
		}
		return outcome
	})
	switch {
	case outcome != nil:
		if !errors.Is(err, outcome) {
			m.t.Fatalf("Update returned %v, want the error of the function", err)
		}
	case want == fine:
		if err != nil {
			m.t.Fatalf("Update: %v (%v)", err, errors.Unwrap(err))
		}
		m.profiles, m.groups, m.policies = next.profiles, next.groups, next.policies
	case !fault.Is(err, want):
		m.t.Fatalf("Update returned %v, want a fault of kind %s", err, want)
	}
}

// texts makes two lists of objects comparable whatever their order.
func texts[T any](rows []*T) []string {
	out := make([]string, len(rows))
	for i, r := range rows {
		b, err := json.Marshal(r)
		if err != nil {
			panic(err)
		}
		out[i] = string(b)
	}
	slices.Sort(out)
	return out
}

func where[T any](rows map[string]T, keep func(T) bool) []*T {
	out := []*T{}
	for _, r := range rows {
		if keep(r) {
			out = append(out, &r)
		}
	}
	return out
}

func same[T any](m *machine, what string, got, want []*T) {
	if a, b := texts(got), texts(want); !slices.Equal(a, b) {
		m.t.Fatalf("%s:\n got %v\nwant %v", what, a, b)
	}
}

func table[T any](m *machine, what string, t *directory.Table[T], rows map[string]T) {
	same(m, what, t.All(), where(rows, func(T) bool { return true }))
	if t.Len() != len(rows) {
		m.t.Fatalf("%s: length %d, want %d", what, t.Len(), len(rows))
	}
	for id, row := range rows {
		got, ok := t.Get(id)
		if !ok {
			m.t.Fatalf("%s: no %s", what, id)
		}
		same(m, what+" "+id, []*T{got}, []*T{&row})
	}
	if got, ok := t.Get("absent"); ok {
		m.t.Fatalf("%s: got %v for an absent id", what, got)
	}
}

// check asks the directory everything and compares with a walk over the model.
func (m *machine) check() {
	table(m, "profiles", m.dir.Profiles, m.profiles)
	table(m, "groups", m.dir.Groups, m.groups)
	table(m, "policies", m.dir.Policies, m.policies)
	for _, account := range []string{"a", "b", "c"} {
		ofAccount := where(m.profiles, func(p identity.Profile) bool { return p.AccountID == account })
		same(m, "profiles of "+account, m.dir.ProfilesByAccount.Get(account), ofAccount)
		if n := m.dir.ProfilesByAccount.Len(account); n != len(ofAccount) {
			m.t.Fatalf("%d profiles of %s, want %d", n, account, len(ofAccount))
		}
		same(m, "groups of "+account, m.dir.GroupsByAccount.Get(account),
			where(m.groups, func(g access.Group) bool { return g.AccountID == account }))
		for _, name := range []string{"x", "y", "z"} {
			want := where(m.profiles, func(p identity.Profile) bool { return p.AccountID == account && p.Name == name })
			same(m, "profiles by name", m.dir.ProfilesByName.Get(directory.Key(account, name)), want)
			one, ok := m.dir.ProfilesByName.One(directory.Key(account, name))
			if ok != (len(want) == 1) || ok && one.Name != name {
				m.t.Fatalf("profile %s of %s: %v, %t", name, account, one, ok)
			}
		}
		for _, member := range []string{"iam-Profile-1", "iam-Profile-2", "iam-Profile-3"} {
			var ids []string
			for _, g := range m.groups {
				if g.AccountID == account && slices.ContainsFunc(g.Members, func(x access.Member) bool { return x.IAMID == member }) {
					ids = append(ids, g.ID)
				}
			}
			slices.Sort(ids)
			if got := m.dir.StaticGroupsOf(account, member); !slices.Equal(got, ids) {
				m.t.Fatalf("groups of %s in %s: %v, want %v", member, account, got, ids)
			}
			for _, service := range []string{"", "is", "is.instance", "kms"} {
				same(m, "policies of "+member+" about "+service, m.dir.PoliciesOf(account, member, service),
					where(m.policies, func(p access.Policy) bool {
						about := p.Service() == "" || p.Service() == service || p.Service() == "is" && service == "is.instance"
						return p.AccountID == account && p.SubjectID() == member && p.State == access.Active && about
					}))
			}
		}
	}
}

func TestTheDirectoryAgreesWithThreeMaps(t *testing.T) {
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		if err := flag.Set(f.Name, modelRuns); err != nil {
			t.Fatal(err)
		}
		defer flag.Set(f.Name, f.DefValue)
	}
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(t *rapid.T) {
		run++
		m := &machine{
			t: t, file: filepath.Join(dir, fmt.Sprintf("%d.db", run)), now: time.Date(2026, time.June, 15, 12, 0, 0, 0, time.UTC),
			profiles: map[string]identity.Profile{}, groups: map[string]access.Group{}, policies: map[string]access.Policy{},
		}
		m.open()
		defer func() { _ = m.store.Close() }()
		t.Repeat(map[string]func(*rapid.T){
			"one change":    func(t *rapid.T) { m.t = t; m.update(nil, m.draw()) },
			"one more":      func(t *rapid.T) { m.t = t; m.update(nil, m.draw()) },
			"several":       func(t *rapid.T) { m.t = t; m.update(nil, m.several()...) },
			"given up":      func(t *rapid.T) { m.t = t; m.update(errors.New("given up"), m.draw()) },
			"broken disk":   func(t *rapid.T) { m.t = t; m.fail = errors.New("no space left"); m.update(nil, m.draw()) },
			"another start": func(t *rapid.T) { m.t = t; _ = m.store.Close(); m.open() },
			"":              func(t *rapid.T) { m.t = t; m.check() },
		})
	})
}

// several makes one step of each kind, so that no object is changed twice, and
// deletions come before what is written, as in the store.
func (m *machine) several() []step {
	var steps []step
	if p, ok := existing(m, m.policies); ok {
		steps = append(steps, remove(m.dir.Policies, policiesOf, p.ID, p, func(p *access.Policy) *object.Meta { return &p.Meta }))
	}
	steps = append(steps,
		m.putProfile(m.drawProfile(identity.Profile{ID: m.id("Profile-")})),
		m.putGroup(m.drawGroup(access.Group{ID: m.id("AccessGroupId-")})),
		m.putPolicy(m.drawPolicy(access.Policy{ID: m.id("policy-")})))
	if p, ok := existing(m, m.profiles); ok {
		p.Description = m.id("description ")
		steps = append(steps, m.putProfile(p))
	}
	return steps
}
