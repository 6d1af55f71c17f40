package access_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/store"
)

const (
	accountA = "aaaa0000000000000000000000000000"
	accountB = "bbbb0000000000000000000000000000"
)

func small(t testing.TB) *access.Catalog {
	t.Helper()
	c, err := access.ParseCatalog([]byte(smallCatalog))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sliceView is the plainest view: it walks everything, and returns a subject's
// policies about other services too.
type sliceView struct {
	world
	catalog *access.Catalog
}

func (v sliceView) Catalog(account string) *access.Catalog {
	return v.catalog.With(
		slices.DeleteFunc(slices.Clone(v.services), func(s *access.RegisteredService) bool { return s.AccountID != account }),
		slices.DeleteFunc(slices.Clone(v.roles), func(r *access.CustomRole) bool { return r.AccountID != account }))
}

func (v sliceView) AuthorizationsOn(accountID, _ string) []*access.Policy {
	var out []*access.Policy
	for _, p := range v.policies {
		if p.AccountID == accountID && p.State == access.Active && p.Type == access.TypeAuthorization {
			out = append(out, p)
		}
	}
	return out
}

func (v sliceView) Interaction(string) *access.Settings { return v.interaction }

func (v sliceView) GroupsOf(accountID, iamID string, now time.Time) []string {
	return groupsByWalking(v.world, access.Request{AccountID: accountID, Subject: iamID, Time: now})
}

func (v sliceView) PoliciesOf(accountID, subjectID, _ string) []*access.Policy {
	var out []*access.Policy
	for _, p := range v.policies {
		if p.AccountID == accountID && p.SubjectID() == subjectID && p.State == access.Active && p.Type == access.TypeAccess {
			out = append(out, p)
		}
	}
	return out
}

// loaded is a store that holds a world and takes no changes.
type loaded struct {
	store.Store
	world
}

func (l loaded) Load(_ context.Context, f func(store.Record) error) error {
	var err error
	add := func(kind, id string, revision int64, obj any) {
		doc, failed := json.Marshal(obj)
		if err = errors.Join(err, failed); err == nil {
			err = f(store.Record{Kind: kind, ID: id, Revision: revision, Doc: doc})
		}
	}
	for _, p := range l.policies {
		add("policy", p.ID, p.Revision, p)
	}
	for _, g := range l.groups {
		add("access-group", g.ID, g.Revision, g)
	}
	for _, r := range l.rules {
		add("group-rule", r.ID, r.Revision, r)
	}
	for _, m := range l.memberships {
		add("membership", directory.UserKey(m.AccountID, m.IAMID), m.Revision, m)
	}
	for _, g := range l.settings {
		add("group-settings", g.AccountID, g.Revision, g)
	}
	for _, s := range l.services {
		add("service", directory.ServiceKey(s.AccountID, s.Name), s.Revision, s)
	}
	for _, r := range l.roles {
		add("custom-role", r.ID, r.Revision, r)
	}
	return err
}

// indexed is the world as the server sees it: through the directory.
func indexed(t interface{ Fatal(...any) }, w world, c *access.Catalog) access.View {
	d, err := directory.Open(context.Background(), directory.Config{Store: loaded{world: w}, Catalog: c, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

var (
	genMostly    = rapid.SampledFrom([]bool{true, true, true, true, true, true, true, false})
	genAccount   = rapid.SampledFrom([]string{accountA, accountA, accountA, accountA, accountA, accountA, accountA, accountB})
	genAnAccount = rapid.SampledFrom([]string{accountA, accountB, ""})
	genIdentity  = rapid.SampledFrom([]string{"iam-Profile-1", "iam-Profile-1", "iam-Profile-1", "iam-Profile-2", "iam-Profile-2", serviceA, serviceB})
	genPerson    = rapid.SampledFrom([]string{"iam-Profile-1", "iam-Profile-2"})
	genSource    = rapid.SampledFrom([]string{serviceA, serviceA, serviceA, serviceB, "crn-crn:v1:bluemix:public:lib:eu-de:a/" + accountA + "::t:r", "crn-crn:v1:bluemix:public:kms::::", "crn-crn:broken", "crn-crn:v1:::lib::a/" + accountA + ":::"})
	genGroupID   = rapid.SampledFrom([]string{"AccessGroupId-0", "AccessGroupId-1", "AccessGroupId-PublicAccess"})
	genState     = rapid.SampledFrom(append(slices.Repeat([]string{access.Active}, 10), access.Deleted, ""))
	genKind      = rapid.SampledFrom(append(slices.Repeat([]string{access.TypeAccess}, 10), access.TypeAuthorization, access.TypeAuthorization, ""))
	genService   = rapid.SampledFrom([]string{"is", "is", "is", "is.instance", "is.vpc", "kms", "kms", "lib", "lib", "lib.x", "iam-identity", "new-service", "new-service.x", ""})
	genType      = rapid.SampledFrom([]string{"service", "platform_service"})
	genWord      = rapid.SampledFrom([]string{"a", "a", "ab", "b", "", "*", "é"})
	genPattern   = rapid.SampledFrom([]string{"a", "a*", "*", "?", "*b", "{{*}}", "", "is*", "is.?*", "i?", "*s*"})
	genOperator  = rapid.SampledFrom([]access.Operator{
		access.StringEquals, access.StringEquals, access.StringEquals, access.StringEquals, access.StringMatch, access.StringExists,
		access.StringEqualsAnyOf, access.StringMatchAnyOf, "stringLike",
	})
	genRole   = rapid.SampledFrom([]string{viewer, operator, administrator, administrator, administrator, reader, keyPurge, deskClerk, auditorA, auditorA, auditorB, guestA, decisionPoint, noRole})
	genAction = rapid.SampledFrom([]string{
		"c.read", "c.read", "c.read", "c.read", "c.read", "c.operate", "c.operate", "c.operate", "c.admin", "c.admin", "is.list", "is.operate", "is.create", "kms.read", "kms.purge", "s.read", "id.get", "id.create", "", "none",
		"c.edit", "lib.look", "lib.run", "lib.read", "lib.lend", "iam.decision.evaluate",
	})
	genOptional = rapid.SampledFrom([]string{access.Region, "vpcId", access.Resource, access.ResourceGroupID})
	genTag      = rapid.SampledFrom([]string{"env:dev", "env:prod", "env:", "team:a", "env", ":dev", "env:dev:x"})
	genTagKey   = rapid.SampledFrom([]string{"env", "env", "team", ""})
	genTagValue = rapid.SampledFrom([]string{"dev", "prod", "*", "d*", ""})
	genFew      = rapid.IntRange(0, 2)
	genScope    = rapid.SampledFrom([]string{access.ServiceName, access.ServiceName, access.ServiceName, access.ServiceType, access.ServiceGroupID, ""})
	genBool     = rapid.Bool()
	genRarely   = rapid.SampledFrom([]bool{false, false, false, false, true})

	// A Monday at nine, and the edges of days, hours and weeks around it, in
	// the zones that the conditions name.
	genTime = rapid.Custom(func(t *rapid.T) time.Time {
		if genInt.Draw(t, "no time") == 0 {
			return time.Time{}
		}
		hours := rapid.SampledFrom([]int{0, 0, -9, -14, 5, 8, 15, 24, -24, -33, 24 * 5, 24 * 6}).Draw(t, "hours")
		seconds := rapid.SampledFrom([]int{0, 0, 1, -1, 1800}).Draw(t, "seconds")
		return monday.Add(time.Duration(hours)*time.Hour + time.Duration(seconds)*time.Second + 500*time.Millisecond)
	})
	genInt   = rapid.IntRange(0, 19)
	genClock = rapid.SampledFrom([]string{"09:00:00+00:00", "09:00:00Z", "17:00:00+00:00", "00:00:00+00:00", "23:59:59+00:00", "09:00:00-05:00", "14:00:00+05:00", "23:00:00+14:00", "09:00:00", "24:00:00Z", "9", ""})
	genDate  = rapid.SampledFrom([]string{"2026-06-15Z", "2026-06-15+14:00", "2026-06-14-12:00", "2026-06-16+00:00", "2026-06-15", "2026-02-30Z"})
	genStamp = rapid.SampledFrom([]string{"2026-06-15T09:00:00Z", "2026-06-15T09:00:00+00:00", "2026-06-15T04:00:00-05:00", "2026-06-15T23:00:00+14:00", "2026-06-14T00:00:00Z", "2026-06-20T00:00:00Z", "2026-06-15T09:00:00", "now"})
	genDay   = rapid.SampledFrom([]any{"1+00:00", "1+00:00", "7+00:00", "1", 1, 7, "2+14:00", "7-12:00", "2-05:00", "1+05:00", 0, 8, "8+00:00", "Monday", true})
	genBound = rapid.SampledFrom([]string{"LessThan", "LessThanOrEquals", "GreaterThan", "GreaterThanOrEquals", "Equals"})
)

// Two services that act through their CRNs, each in its own account.
const (
	serviceA = "crn-crn:v1:bluemix:public:lib:us-south:a/" + accountA + ":instance-1::"
	serviceB = "crn-crn:v1:bluemix:public:kms:us-south:a/" + accountB + ":instance-2::"
)

var monday = time.Date(2026, time.June, 15, 9, 0, 0, 0, time.UTC)

func drawCondition(t *rapid.T) access.Rule {
	var value any
	r := access.Rule{Operator: genBound.Draw(t, "comparison")}
	switch genInt.Draw(t, "kind") % 6 {
	case 0, 1:
		r.Key, r.Operator, value = access.KeyDayOfWeek, "dayOfWeekEquals", genDay.Draw(t, "day")
		if genBool.Draw(t, "any of") {
			r.Operator = "dayOfWeekAnyOf"
			if genBool.Draw(t, "a list") {
				value = rapid.SliceOfN(genDay, 1, 3).Draw(t, "days")
			}
		}
	case 2:
		r.Key, r.Operator, value = access.KeyTime, "time"+r.Operator, genClock.Draw(t, "clock")
	case 3:
		r.Key, r.Operator, value = access.KeyDateTime, "dateTime"+r.Operator, genStamp.Draw(t, "stamp")
	case 4:
		r.Key, r.Operator, value = access.KeyDate, "date"+r.Operator, genDate.Draw(t, "date")
	default:
		a := drawAttribute(t, genOptional.Draw(t, "key"), genWord)
		r.Key, r.Operator, value = "{{resource.attributes."+a.Key+"}}", string(a.Operator), a.Value
	}
	b, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	r.Value = b
	return r
}

func drawRule(t *rapid.T, level int) access.Rule {
	if level > 2 || genBool.Draw(t, "flat") {
		return drawCondition(t)
	}
	r := access.Rule{Operator: rapid.SampledFrom([]string{access.And, access.Or}).Draw(t, "join")}
	for range genFew.Draw(t, "conditions") + 1 {
		r.Conditions = append(r.Conditions, drawRule(t, level+1))
	}
	return r
}

func drawValue(t *rapid.T, op access.Operator, text *rapid.Generator[string]) access.Value {
	switch op {
	case access.StringMatch:
		return access.Text(genPattern.Draw(t, "pattern"))
	case access.StringExists:
		b := genBool.Draw(t, "exists")
		return access.Value{Exists: &b}
	case access.StringEqualsAnyOf:
		return access.Value{List: rapid.SliceOfN(text, 1, 3).Draw(t, "any of")}
	case access.StringMatchAnyOf:
		return access.Value{List: rapid.SliceOfN(genPattern, 1, 2).Draw(t, "match any of")}
	}
	return access.Text(text.Draw(t, "text"))
}

func drawAttribute(t *rapid.T, key string, text *rapid.Generator[string]) access.Attribute {
	op := genOperator.Draw(t, "operator")
	return access.Attribute{Key: key, Operator: op, Value: drawValue(t, op, text)}
}

func drawPolicy(t *rapid.T, id string) *access.Policy {
	p := &access.Policy{
		Meta: object.Meta{Revision: 1}, ID: id, API: 2,
		AccountID: genAccount.Draw(t, "account"), Type: genKind.Draw(t, "type"), State: genState.Draw(t, "state"),
	}
	subject := access.Attribute{Key: access.IAMID, Operator: access.StringEquals}
	if genBool.Draw(t, "about a group") {
		subject.Key, subject.Value = access.AccessGroupID, access.Text(genGroupID.Draw(t, "group"))
	} else {
		subject.Value = access.Text(genIdentity.Draw(t, "identity"))
	}
	p.Subject = []access.Attribute{subject}
	if p.Type == access.TypeAuthorization {
		p.Subject = []access.Attribute{
			drawAttribute(t, access.ServiceName, rapid.SampledFrom([]string{"lib", "lib", "lib", "kms"})),
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(genAccount.Draw(t, "source's account"))},
		}
		if genRarely.Draw(t, "narrower") {
			p.Subject = append(p.Subject, drawAttribute(t, rapid.SampledFrom([]string{access.ServiceInstance, access.Region, access.ResourceGroupID}).Draw(t, "key"),
				rapid.SampledFrom([]string{"instance-1", "us-south", "instance-2"})))
		}
	}
	if genRarely.Draw(t, "has a rule") {
		r := drawRule(t, 1)
		p.Rule = &r
	}
	if genMostly.Draw(t, "names the account") {
		about := p.AccountID
		if !genMostly.Draw(t, "its own") {
			about = genAnAccount.Draw(t, "named account")
		}
		p.Resource = append(p.Resource, access.Attribute{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(about)})
	}
	switch scope := genScope.Draw(t, "scope"); scope {
	case access.ServiceName:
		p.Resource = append(p.Resource, drawAttribute(t, scope, genService))
	case access.ServiceType:
		p.Resource = append(p.Resource, drawAttribute(t, scope, genType))
	case access.ServiceGroupID:
		p.Resource = append(p.Resource, drawAttribute(t, scope, rapid.Just("IAM")))
	}
	if !genMostly.Draw(t, "no more attributes") {
		p.Resource = append(p.Resource, drawAttribute(t, genOptional.Draw(t, "key"), genWord))
	}
	if !genMostly.Draw(t, "no tags") {
		p.Tags = append(p.Tags, drawAttribute(t, genTagKey.Draw(t, "tag"), genTagValue))
	}
	for range genFew.Draw(t, "roles") + 1 {
		p.Roles = append(p.Roles, genRole.Draw(t, "role"))
	}
	return p
}

func drawWorld(t *rapid.T) world {
	var w world
	for i := range 2 {
		g := &access.Group{
			Meta: object.Meta{Revision: 1}, ID: fmt.Sprintf("AccessGroupId-%d", i), Name: fmt.Sprint("group-", i),
			AccountID: genAccount.Draw(t, "group's account"),
		}
		for range genFew.Draw(t, "members") {
			g.Members = append(g.Members, access.Member{IAMID: genPerson.Draw(t, "member")})
		}
		w.groups = append(w.groups, g)
		if genBool.Draw(t, "has a dynamic rule") {
			w.rules = append(w.rules, &access.GroupRule{
				Meta: object.Meta{Revision: int64(genFew.Draw(t, "rule's revision") + 1)}, ID: "ClaimRule-" + g.ID, AccountID: g.AccountID, GroupID: g.ID,
			})
		}
	}
	for _, id := range []string{"iam-Profile-1", "iam-Profile-2"} {
		m := &access.Membership{Meta: object.Meta{Revision: 1}, AccountID: genAccount.Draw(t, "membership's account"), IAMID: id}
		for _, g := range w.groups {
			if genRarely.Draw(t, "joined by rule") {
				m.Groups = append(m.Groups, access.DynamicMember{
					GroupID: g.ID, RuleID: "ClaimRule-" + g.ID, Revision: 1, Until: monday.Add(time.Duration(genInt.Draw(t, "until")) * time.Hour),
				})
			}
		}
		w.memberships = append(w.memberships, m)
	}
	if genRarely.Draw(t, "has settings") {
		w.settings = append(w.settings, &access.GroupSettings{Meta: object.Meta{Revision: 1}, AccountID: accountA, PublicAccess: genBool.Draw(t, "public access")})
	}
	for _, account := range []string{accountA, accountB} {
		if genBool.Draw(t, "has a service of its own") {
			w.services = append(w.services, library(account))
		}
		if genBool.Draw(t, "has roles of its own") {
			w.roles = append(w.roles, auditor(account), guest(account))
		}
	}
	for i := range rapid.IntRange(0, 10).Draw(t, "policies") {
		w.policies = append(w.policies, drawPolicy(t, fmt.Sprintf("policy-%d", i)))
	}
	return w
}

func drawRequest(t *rapid.T) access.Request {
	q := access.Request{
		Subject: genIdentity.Draw(t, "subject"), AccountID: genAccount.Draw(t, "account"),
		Action: genAction.Draw(t, "action"), Resource: map[string]string{}, Time: genTime.Draw(t, "time"),
	}
	if genInt.Draw(t, "a service asks") < 2 {
		q.Subject = genSource.Draw(t, "source")
	}
	if q.Resource[access.AccountID] = q.AccountID; !genMostly.Draw(t, "resource in the account") {
		q.Resource[access.AccountID] = genAnAccount.Draw(t, "resource's account")
	}
	if genMostly.Draw(t, "names a service") {
		q.Resource[access.ServiceName] = genService.Draw(t, "service")
	}
	if !genMostly.Draw(t, "no type given") {
		q.Resource[access.ServiceType] = genType.Draw(t, "type")
	}
	for range genFew.Draw(t, "attributes") {
		q.Resource[genOptional.Draw(t, "key")] = genWord.Draw(t, "value")
	}
	for range genFew.Draw(t, "tags") {
		q.Tags = append(q.Tags, genTag.Draw(t, "tag"))
	}
	return q
}

// manyChecks makes rapid run as many checks as a property of the core deserves,
// unless the caller of the tests chose a number himself.
func manyChecks(t *testing.T, n string) {
	f := flag.Lookup("rapid.checks")
	chosen := f.Value.String()
	if chosen != f.DefValue {
		return
	}
	if underRace {
		n = strings.TrimSuffix(n, "0")
	}
	if err := flag.Set("rapid.checks", n); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = flag.Set("rapid.checks", chosen) })
}

// 7,000 worlds with 12 requests each.
func TestDecideAgreesWithASecondImplementationAndWithItsOwnTrace(t *testing.T) {
	manyChecks(t, "7000")
	catalog := small(t)
	const requests = 12
	var allowed, denied int
	failures := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		plain, fast := sliceView{w, catalog}, indexed(t, w, catalog)
		for range requests {
			q := drawRequest(t)
			want := decideByWalking(w, q)
			for name, view := range map[string]access.View{"slice": plain, "directory": fast} {
				d := access.Decide(view, q)
				if d.Allowed != want {
					t.Fatalf("Decide over the %s says %t, the reference %t\nrequest %+v\nworld %s\ntrace %+v",
						name, d.Allowed, want, q, show(w), d.Explain())
				}
				checkTrace(t, d, failures)
			}
			if want {
				allowed++
			} else {
				denied++
			}
		}
	})
	total := allowed + denied
	t.Logf("%d allowed, %d denied, for the reasons %v", allowed, denied, failures)
	if total >= 10_000 && (allowed < total/20 || denied < total/20) {
		t.Errorf("%d allowed, %d denied: the cases prove little", allowed, denied)
	}
	for _, name := range checkNames {
		if total >= 10_000 && failures[name] < total/100 {
			t.Errorf("only %d requests failed at %s", failures[name], name)
		}
	}
}

// everyAction are all that any role of the small catalog and its additions has,
// and two that none has.
var everyAction = []string{
	"c.read", "c.operate", "c.edit", "c.admin", "s.read", "s.write", "is.list", "is.operate", "is.create", "kms.read", "kms.purge",
	"id.get", "id.create", "lib.look", "lib.run", "lib.read", "lib.lend", "iam.decision.evaluate", "", "none",
}

func TestWhatIsPermittedIsWhatDecideAllows(t *testing.T) {
	manyChecks(t, "3000")
	catalog := small(t)
	permitted := 0
	rapid.Check(t, func(t *rapid.T) {
		w, q := drawWorld(t), drawRequest(t)
		for name, view := range map[string]access.View{"slice": sliceView{w, catalog}, "directory": indexed(t, w, catalog)} {
			got, roles := access.Permitted(view, q), access.RolesOn(view, q)
			account, c := q.Resource[access.AccountID], view.Catalog(q.Resource[access.AccountID])
			for _, action := range everyAction {
				one := q
				one.Action = action
				d := access.Decide(view, one)
				if d.Allowed != slices.Contains(got, action) {
					t.Fatalf("over the %s: Decide says %t to %q, permitted are %q\nrequest %+v\nworld %s", name, d.Allowed, action, got, q, show(w))
				}
				if byRole := slices.ContainsFunc(roles, func(role string) bool { return c.Grants(role, q.Resource[access.ServiceName], action) }); d.Allowed != byRole {
					t.Fatalf("over the %s: Decide says %t to %q, the roles are %q", name, d.Allowed, action, roles)
				}
				if d.Allowed && !d.Policy.Grants(c, one) {
					t.Fatalf("policy %s allowed %q and does not grant it", d.Policy.ID, action)
				}
				for _, p := range w.policies {
					if p.SubjectID() == q.Subject && p.Type == access.TypeAccess && p.AccountID == q.AccountID && p.AccountID == account && p.Grants(c, one) && !d.Allowed {
						t.Fatalf("policy %s grants %q, Decide refuses", p.ID, action)
					}
				}
			}
			for _, action := range got {
				if !slices.Contains(everyAction, action) {
					t.Fatalf("%q is permitted", action)
				}
			}
			permitted += len(got)
		}
	})
	if permitted == 0 {
		t.Error("nothing was ever permitted")
	}
}

func show(w world) string {
	b, err := json.MarshalIndent(map[string]any{
		"policies": w.policies, "groups": w.groups, "rules": w.rules, "memberships": w.memberships, "settings": w.settings,
		"services": w.services, "roles": w.roles,
	}, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// checkNames are the checks of a decision, in their order.
var checkNames = []string{"account", "policy-subject", "policy-resource", "policy-rule", "policy-action"}

// checkTrace demands that the explanation is the decision in words: always the
// same five checks, none failed when allowed, exactly one when denied, and
// those after it skipped.
func checkTrace(t *rapid.T, d access.Decision, failures map[string]int) {
	trace := d.Explain()
	if !slices.EqualFunc(trace, checkNames, func(c activity.Check, name string) bool { return c.Name == name }) {
		t.Fatalf("trace %+v, want the checks %v", trace, checkNames)
	}
	failed := slices.IndexFunc(trace, func(c activity.Check) bool { return c.Outcome == activity.Fail })
	if d.Allowed != (failed < 0) || d.Allowed != (d.Policy != nil) {
		t.Fatalf("allowed %t by policy %v with the trace %+v", d.Allowed, d.Policy, trace)
	}
	for i, c := range trace {
		want := activity.Pass
		switch {
		case i == failed:
			want = activity.Fail
			failures[c.Name]++
		case failed >= 0 && i > failed:
			want = activity.Skip
		}
		if c.Outcome != want {
			t.Fatalf("check %s is %s, want %s, in %+v", c.Name, c.Outcome, want, trace)
		}
	}
}

func TestOneMorePolicyNeverTakesAccessAway(t *testing.T) {
	manyChecks(t, "5000")
	catalog := small(t)
	rapid.Check(t, func(t *rapid.T) {
		w, q := drawWorld(t), drawRequest(t)
		before := access.Decide(sliceView{w, catalog}, q).Allowed
		i := rapid.IntRange(0, len(w.policies)).Draw(t, "place")
		w.policies = slices.Insert(w.policies, i, drawPolicy(t, "policy-more"))
		if before && !access.Decide(sliceView{w, catalog}, q).Allowed {
			t.Fatal("the access is gone")
		}
	})
}

func TestAPolicyThatIsNotActiveGrantsNothing(t *testing.T) {
	manyChecks(t, "2000")
	catalog := small(t)
	rapid.Check(t, func(t *rapid.T) {
		w, q := drawWorld(t), drawRequest(t)
		for _, p := range w.policies {
			p.State = access.Deleted
		}
		if access.Decide(indexed(t, w, catalog), q).Allowed {
			t.Fatal("allowed by a deleted policy")
		}
	})
}

func TestNoPolicyOfAnotherAccountCounts(t *testing.T) {
	manyChecks(t, "2000")
	catalog := small(t)
	rapid.Check(t, func(t *rapid.T) {
		w, q := drawWorld(t), drawRequest(t)
		q.AccountID = accountA
		q.Resource[access.AccountID] = accountA
		for _, p := range w.policies {
			p.AccountID = accountB
		}
		if access.Decide(indexed(t, w, catalog), q).Allowed {
			t.Fatal("allowed by a policy of another account")
		}
	})
}

func TestNothingIsAllowedByDefault(t *testing.T) {
	catalog := small(t)
	everything := world{policies: []*access.Policy{{ID: "p", Type: access.TypeAccess, State: access.Active, Roles: []string{administrator}}}}
	for _, tt := range []struct {
		name string
		w    world
		q    access.Request
	}{
		{"an empty request to an empty world", world{}, access.Request{}},
		{"an empty request to a policy without an account", everything, access.Request{}},
		{"a request without an account", everything, access.Request{Action: "c.read", Resource: map[string]string{}}},
		{"a request with an empty account", everything, access.Request{Action: "c.read", Resource: map[string]string{access.AccountID: ""}}},
		{"a resource that says nothing", everything, access.Request{AccountID: accountA, Action: "c.read"}},
		{
			"a known subject without policies", world{},
			access.Request{Subject: "iam-Profile-1", AccountID: accountA, Action: "c.read", Resource: map[string]string{access.AccountID: accountA}},
		},
	} {
		for name, view := range map[string]access.View{"slice": sliceView{tt.w, catalog}, "directory": indexed(t, world{}, catalog)} {
			if d := access.Decide(view, tt.q); d.Allowed {
				t.Errorf("%s: allowed over the %s", tt.name, name)
			} else if _, failed := d.Explain().Failed(); !failed {
				t.Errorf("%s: the refusal over the %s is not explained", tt.name, name)
			}
		}
	}
}

func policyOn(attrs ...access.Attribute) *access.Policy {
	return &access.Policy{
		ID: "policy-1", AccountID: accountA, Type: access.TypeAccess, State: access.Active, Roles: []string{operator},
		Subject:  []access.Attribute{is(access.IAMID, "iam-Profile-1")},
		Resource: append([]access.Attribute{is(access.AccountID, accountA)}, attrs...),
	}
}

func is(key, value string) access.Attribute {
	return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
}

func exists(key string, b bool) access.Attribute {
	return access.Attribute{Key: key, Operator: access.StringExists, Value: access.Value{Exists: &b}}
}

func like(key, pattern string) access.Attribute {
	return access.Attribute{Key: key, Operator: access.StringMatch, Value: access.Text(pattern)}
}

func anyOf(key string, op access.Operator, values ...string) access.Attribute {
	return access.Attribute{Key: key, Operator: op, Value: access.Value{List: values}}
}

func TestAPolicyCoversTheResourcesItsAttributesDescribe(t *testing.T) {
	catalog := small(t)
	on := func(kv ...string) map[string]string {
		m := map[string]string{access.AccountID: accountA}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	for _, tt := range []struct {
		name     string
		attrs    []access.Attribute
		resource map[string]string
		want     bool
	}{
		{"the service it names", []access.Attribute{is("serviceName", "is")}, on("serviceName", "is"), true},
		{"a child of the service it names", []access.Attribute{is("serviceName", "is")}, on("serviceName", "is.instance"), true},
		{"a service that only begins like it", []access.Attribute{is("serviceName", "is")}, on("serviceName", "isx"), false},
		{"the parent of the child it names", []access.Attribute{is("serviceName", "is.instance")}, on("serviceName", "is"), false},
		{"the sibling of the child it names", []access.Attribute{is("serviceName", "is.instance")}, on("serviceName", "is.vpc"), false},
		{"another service", []access.Attribute{is("serviceName", "is")}, on("serviceName", "kms"), false},
		{"a resource without a service", []access.Attribute{is("serviceName", "is")}, on(), false},
		{"a service in another case", []access.Attribute{is("serviceName", "is")}, on("serviceName", "IS"), false},
		{"any service, of which there is one", []access.Attribute{exists("serviceName", true)}, on("serviceName", "kms"), true},
		{"any service, of which there is none", []access.Attribute{exists("serviceName", true)}, on(), false},
		{"no service, of which there is none", []access.Attribute{exists("serviceName", false)}, on(), true},
		{"no service, of which there is one", []access.Attribute{exists("serviceName", false)}, on("serviceName", "is.instance"), false},
		{"services by pattern", []access.Attribute{like("serviceName", "k*")}, on("serviceName", "kms"), true},
		{"services of a list", []access.Attribute{anyOf("serviceName", access.StringEqualsAnyOf, "kms", "is")}, on("serviceName", "is.vpc"), true},

		{"all IAM-enabled services", []access.Attribute{is("serviceType", "service")}, on("serviceName", "kms"), true},
		{"all IAM-enabled services without account management", []access.Attribute{is("serviceType", "service")}, on("serviceName", "iam-identity"), false},
		{"account management", []access.Attribute{is("serviceType", "platform_service")}, on("serviceName", "iam-identity"), true},
		{"account management without the others", []access.Attribute{is("serviceType", "platform_service")}, on("serviceName", "is"), false},
		{"a service that nobody knows is IAM-enabled", []access.Attribute{is("serviceType", "service")}, on("serviceName", "new"), true},
		{"a type for a resource without a service", []access.Attribute{is("serviceType", "service")}, on(), false},
		{"the group of IAM services", []access.Attribute{is("service_group_id", "IAM")}, on("serviceName", "iam-groups"), true},
		{"the group of IAM services without the others", []access.Attribute{is("service_group_id", "IAM")}, on("serviceName", "is"), false},

		{"one instance", []access.Attribute{is("serviceName", "kms"), is("serviceInstance", "i")}, on("serviceName", "kms", "serviceInstance", "i"), true},
		{"another instance", []access.Attribute{is("serviceName", "kms"), is("serviceInstance", "i")}, on("serviceName", "kms", "serviceInstance", "j"), false},
		{"a resource that does not say its instance", []access.Attribute{is("serviceName", "kms"), is("serviceInstance", "i")}, on("serviceName", "kms"), false},
		{"what the policy does not mention does not matter", []access.Attribute{is("serviceName", "kms")}, on("serviceName", "kms", "region", "eu-de", "x", "y"), true},
		{"a resource group", []access.Attribute{is("resourceGroupId", "rg")}, on("resourceGroupId", "rg", "serviceName", "is"), true},
		{"any resource group", []access.Attribute{exists("resourceGroupId", true)}, on("resourceGroupId", ""), true},
		{"any resource group, of which there is none", []access.Attribute{exists("resourceGroupId", true)}, on("serviceName", "is"), false},
		{"an attribute that only this service knows", []access.Attribute{is("serviceName", "is"), is("vpcId", "v1")}, on("serviceName", "is", "vpcId", "v1"), true},
		{"a pattern is not an equality", []access.Attribute{is("resource", "a*")}, on("resource", "ab"), false},
		{"a literal star by equality", []access.Attribute{is("resource", "a*")}, on("resource", "a*"), true},
		{"a list of patterns", []access.Attribute{anyOf("resource", access.StringMatchAnyOf, "b?", "a*")}, on("resource", "abc"), true},
		{"a list of texts is no list of patterns", []access.Attribute{anyOf("resource", access.StringEqualsAnyOf, "a*")}, on("resource", "ab"), false},
		{"an operator that nobody knows", []access.Attribute{{Key: "resource", Operator: "stringLike", Value: access.Text("a")}}, on("resource", "a"), false},
		{"stringExists without a boolean", []access.Attribute{{Key: "resource", Operator: access.StringExists, Value: access.Text("true")}}, on("resource", "a"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := world{policies: []*access.Policy{policyOn(tt.attrs...)}}
			w.policies[0].Revision = 1
			q := access.Request{Subject: "iam-Profile-1", AccountID: accountA, Action: "c.read", Resource: tt.resource}
			for name, view := range map[string]access.View{"slice": sliceView{w, catalog}, "directory": indexed(t, w, catalog)} {
				if d := access.Decide(view, q); d.Allowed != tt.want {
					t.Errorf("over the %s: allowed = %t, want %t; trace %+v", name, d.Allowed, tt.want, d.Explain())
				}
			}
		})
	}
}

func TestTagsOfAPolicyMustBeOnTheResource(t *testing.T) {
	catalog := small(t)
	for _, tt := range []struct {
		name   string
		demand []access.Attribute
		tags   []string
		want   bool
	}{
		{"the tag", []access.Attribute{is("env", "dev")}, []string{"env:dev"}, true},
		{"one of many tags", []access.Attribute{is("env", "dev")}, []string{"a:b", "env:dev"}, true},
		{"another value", []access.Attribute{is("env", "dev")}, []string{"env:prod"}, false},
		{"another key", []access.Attribute{is("env", "dev")}, []string{"stage:dev"}, false},
		{"no tag", []access.Attribute{is("env", "dev")}, nil, false},
		{"a pattern", []access.Attribute{like("env", "d*")}, []string{"env:dev"}, true},
		{"two demands, one met", []access.Attribute{is("env", "dev"), is("team", "a")}, []string{"env:dev"}, false},
		{"two demands, both met", []access.Attribute{is("env", "dev"), is("team", "a")}, []string{"env:dev", "team:a"}, true},
		{"a tag without a colon", []access.Attribute{is("env", "")}, []string{"env"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOn(is("serviceName", "is"))
			p.Tags = tt.demand
			q := access.Request{
				Subject: "iam-Profile-1", AccountID: accountA, Action: "c.read", Tags: tt.tags,
				Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
			}
			if d := access.Decide(sliceView{world{policies: []*access.Policy{p}}, catalog}, q); d.Allowed != tt.want {
				t.Errorf("allowed = %t, want %t; trace %+v", d.Allowed, tt.want, d.Explain())
			}
		})
	}
}

func TestARefusalNamesTheNearestPolicyAndTheAttributeInItsWay(t *testing.T) {
	far := policyOn(is("serviceName", "kms"))
	near := policyOn(is("serviceName", "is"))
	near.ID, near.Roles = "policy-near", []string{viewer}
	q := access.Request{
		Subject: "iam-Profile-1", AccountID: accountA, Action: "is.create",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
	}
	trace := access.Decide(sliceView{world{policies: []*access.Policy{far, near}}, small(t)}, q).Explain()
	c, _ := trace.Failed()
	if c.Name != "policy-action" || !strings.Contains(c.Hint, "policy-near") || !strings.Contains(c.Found, "Viewer") || c.Wanted != "is.create" {
		t.Errorf("failed check %+v", c)
	}
	q.Resource[access.ServiceName] = "databases"
	trace = access.Decide(sliceView{world{policies: []*access.Policy{far}}, small(t)}, q).Explain()
	c, _ = trace.Failed()
	if c.Name != "policy-resource" || !strings.Contains(c.Wanted, `serviceName stringEquals "kms"`) || c.Found != "databases" {
		t.Errorf("failed check %+v", c)
	}
}

func TestAServiceOfAnotherAccountComesInOnlyWhereTheSettingsLetItIn(t *testing.T) {
	authorization := &access.Policy{
		ID: "p", AccountID: accountA, Type: access.TypeAuthorization, State: access.Active,
		Subject:  []access.Attribute{is(access.ServiceName, "kms"), is(access.AccountID, accountB)},
		Resource: []access.Attribute{is(access.ServiceName, "is"), is(access.AccountID, accountA)},
		Roles:    []string{viewer},
	}
	q := access.Request{
		Subject: "crn-crn:v1:bluemix:public:kms::a/" + accountB + ":one::", AccountID: accountB, Action: "is.list",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
	}
	for name, tt := range map[string]struct {
		settings *access.Settings
		want     bool
	}{
		"without settings": {nil, true},
		"enabled":          {external(access.ExternalEnabled), true},
		"monitored":        {external(access.ExternalMonitor), true},
		"listed":           {external(access.ExternalLimited, accountB), true},
		"not listed":       {external(access.ExternalLimited, accountA), false},
	} {
		v := sliceView{world{policies: []*access.Policy{authorization}, interaction: tt.settings}, small(t)}
		d := access.Decide(v, q)
		if d.Allowed != tt.want || (len(access.Permitted(v, q)) > 0) != tt.want {
			t.Errorf("%s: allowed %t with %+v", name, d.Allowed, d.Explain())
		}
		if failed, _ := d.Explain().Failed(); !tt.want && failed.Name != "account" {
			t.Errorf("%s: the check %s failed, want account", name, failed.Name)
		}
	}
}

func external(state string, allowed ...string) *access.Settings {
	return &access.Settings{AccountID: accountA, External: map[string]access.ExternalAccess{
		access.ExternalService: {State: state, Allowed: allowed},
	}}
}
