package access_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
)

// ledger counts permits as the server does.
type ledger struct{ uses []access.Use }

func (l *ledger) note(q access.Request, p *access.Policy) {
	i := slices.IndexFunc(l.uses, func(u access.Use) bool {
		return u.Subject == q.Subject && u.PolicyID == p.ID && u.Service == q.Resource[access.ServiceName] && u.Action == q.Action
	})
	if i < 0 {
		l.uses = append(l.uses, access.Use{
			AccountID: p.AccountID, Subject: q.Subject, PolicyID: p.ID, Service: q.Resource[access.ServiceName], Action: q.Action, First: q.Time, Last: q.Time,
		})
		i = len(l.uses) - 1
	}
	u := &l.uses[i]
	u.Count++
	if q.Time.After(u.Last) {
		u.Last = q.Time
	}
	u.Days.Add(q.Time)
	u.Touched.Add(q.Resource)
}

const worker = "iam-Profile-1"

// evidence is what the server would give to Recommend.
func (l *ledger) evidence(v sliceView, since time.Time) access.Evidence {
	e := access.Evidence{AccountID: accountA, Subject: worker, Uses: l.uses, Since: since, Own: v.PoliciesOf(accountA, worker, "")}
	for _, g := range v.GroupsOf(accountA, worker, monday) {
		e.Groups = append(e.Groups, v.PoliciesOf(accountA, g, "")...)
	}
	return e
}

// drawWorkersRequest draws a request as the server makes them: the name of a
// service is not empty, and its type follows from it.
func drawWorkersRequest(t *rapid.T) access.Request {
	q := drawRequest(t)
	q.Subject, q.AccountID, q.Resource[access.AccountID] = worker, accountA, accountA
	if q.Resource[access.ServiceName] != "" {
		delete(q.Resource, access.ServiceType)
		delete(q.Resource, access.ServiceGroupID)
	} else {
		delete(q.Resource, access.ServiceName)
	}
	return q
}

// apply puts changes into effect.
func apply(w world, changes []access.Change) world {
	w.policies, w.roles = slices.Clone(w.policies), slices.Clone(w.roles)
	for i, c := range changes {
		drop := func(id string) {
			w.policies = slices.DeleteFunc(w.policies, func(p *access.Policy) bool { return p.ID == id })
		}
		switch {
		case c.Remove != "":
			drop(c.Remove)
		case c.Role != nil:
			w.roles = append(w.roles, c.Role)
		case c.Update != nil:
			drop(c.Update.ID)
			w.policies = append(w.policies, c.Update)
		case c.Create != nil:
			p := *c.Create
			p.ID = fmt.Sprint("created-", i)
			w.policies = append(w.policies, &p)
		}
	}
	return w
}

// What is recommended allows all that was used and is still allowed, and
// nothing that was not allowed before.
func TestARecommendationAllowsAllThatWasUsedAndNothingNew(t *testing.T) {
	manyChecks(t, "1000")
	c := small(t)
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		for _, p := range w.policies {
			if p.Type == access.TypeAccess && genMostly.Draw(t, "of the worker") {
				p.AccountID, p.State = accountA, access.Active
				p.Subject = []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(worker)}}
				for i := range p.Resource {
					if p.Resource[i].Key == access.AccountID {
						p.Resource[i].Value = access.Text(accountA)
					}
				}
			}
		}
		var book ledger
		var used []access.Request
		requests := func(n int) {
			v := sliceView{w, c}
			for range n {
				q := drawWorkersRequest(t)
				q.Time = monday.Add(time.Duration(genInt.Draw(t, "when")) * 100 * time.Hour)
				if d := access.Decide(v, q); d.Allowed {
					used = append(used, q)
					book.note(q, d.Policy)
				}
			}
		}
		requests(15)
		// Some policies change, some go, and what they hid comes to light.
		for i, p := range w.policies {
			switch genInt.Draw(t, "later") {
			case 0, 1:
				next := drawPolicy(t, p.ID)
				next.AccountID, next.Subject, next.Type, next.State = p.AccountID, p.Subject, p.Type, p.State
				next.ModifiedAt = monday.Add(3000 * time.Hour)
				w.policies[i] = next
			case 2, 3:
				gone := *p
				gone.State = access.Deleted
				w.policies[i] = &gone
			}
		}
		requests(5)

		before := sliceView{w, c}
		now := monday.Add(3000 * time.Hour)
		r := access.Recommend(now, access.Question{Window: 200 * 24 * time.Hour, CustomRole: genBool.Draw(t, "custom role")}, before.Catalog(accountA), book.evidence(before, monday))
		after := sliceView{apply(w, r.Changes), c}

		for _, q := range used {
			if was, is := access.Decide(before, q), access.Decide(after, q); was.Allowed && !is.Allowed {
				t.Fatalf("what was used is lost: %+v\nallowed by %+v\nchanges: %s\npolicies: %s\nuses: %s", q, was.Policy, dump(r.Changes), dump(w.policies), dump(book.uses))
			}
		}
		for range 30 {
			q := drawWorkersRequest(t)
			if was, is := access.Decide(before, q), access.Decide(after, q); is.Allowed && !was.Allowed {
				t.Fatalf("new access: %+v\nallowed by %+v\nchanges: %s", q, is.Policy, dump(r.Changes))
			}
		}
		accepted(t, w, c, r.Changes)
	})
}

// accepted holds each change against the rules of the API, if what it takes
// the place of kept them.
func accepted(t *rapid.T, w world, c *access.Catalog, changes []access.Change) {
	for i, change := range changes {
		p := cmp.Or(change.Update, change.Create)
		there := apply(w, changes[:i])
		catalog := sliceView{there, c}.Catalog(accountA)
		if change.Role != nil {
			if err := change.Role.Validate(catalog); err != nil {
				t.Fatalf("the role is refused: %v: %s", err, dump(change))
			}
		}
		if p == nil {
			continue
		}
		valid := !slices.ContainsFunc(w.policies, func(q *access.Policy) bool {
			return q.AccountID == accountA && q.SubjectID() == worker && q.Validate(catalog) != nil
		})
		if err := p.Validate(catalog); err != nil && valid {
			t.Fatalf("the policy is refused: %v: %s", err, dump(p))
		}
	}
}

func dump(v any) string {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func literal(key, value string) access.Attribute {
	return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
}

// granted is an active policy of the worker.
func granted(id string, roles []string, resource ...access.Attribute) *access.Policy {
	return &access.Policy{
		ID: id, AccountID: accountA, API: 1, Type: access.TypeAccess, State: access.Active,
		Subject: []access.Attribute{literal(access.IAMID, worker)}, Resource: append(resource, literal(access.AccountID, accountA)), Roles: roles,
	}
}

// advice asks for a recommendation about one policy after some uses, each an
// action in a service on days before now.
type useOn struct {
	service, action string
	ago             []int
	more            []string // pairs of resource attributes
}

var now = time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)

func advise(t *testing.T, q access.Question, since time.Time, policies []*access.Policy, uses ...useOn) access.Recommendation {
	t.Helper()
	v := sliceView{world{policies: policies}, small(t)}
	var book ledger
	for _, u := range uses {
		for _, ago := range u.ago {
			resource := map[string]string{access.AccountID: accountA, access.ServiceName: u.service}
			for i := 0; i < len(u.more); i += 2 {
				resource[u.more[i]] = u.more[i+1]
			}
			request := access.Request{Subject: worker, AccountID: accountA, Action: u.action, Resource: resource, Time: now.AddDate(0, 0, -ago)}
			d := access.Decide(v, request)
			if !d.Allowed {
				t.Fatalf("%+v is not allowed", request)
			}
			book.note(request, d.Policy)
		}
	}
	return access.Recommend(now, q, v.Catalog(accountA), book.evidence(v, since))
}

var longAgo = now.AddDate(-1, 0, 0)

func every(step, until int) []int {
	var out []int
	for ago := until; ago >= 1; ago -= step {
		out = append(out, ago)
	}
	return out
}

func TestAVerdictFollowsFromTheUse(t *testing.T) {
	everyDay := every(1, 60)
	for _, tt := range []struct {
		name    string
		policy  *access.Policy
		since   time.Time
		uses    []useOn
		verdict string
		smaller string // roles and resource, without the account
	}{
		{"not used", granted("p", []string{viewer}, literal(access.ServiceName, "is")), longAgo, nil, access.Remove, ""},
		{"used whole", granted("p", []string{viewer}, literal(access.ServiceName, "kms")), longAgo, []useOn{{"kms", "c.read", everyDay, nil}}, access.Keep, ""},
		{"a smaller role", granted("p", []string{administrator}, literal(access.ServiceName, "is")), longAgo, []useOn{{"is", "is.list", everyDay, nil}},
			access.Narrow, "Viewer serviceName=is"},
		{"several roles", granted("p", []string{viewer, reader, keyPurge}, literal(access.ServiceName, "kms")), longAgo,
			[]useOn{{"kms", "kms.read", everyDay, nil}, {"kms", "kms.purge", everyDay, nil}}, access.Narrow, "Reader KeyPurge serviceName=kms"},
		{"one service of all", granted("p", []string{operator}, literal(access.ServiceType, "service")), longAgo, []useOn{{"is", "is.operate", everyDay, nil}},
			access.Narrow, "Operator serviceType=service serviceName=is"},
		{"two services of all", granted("p", []string{operator}, literal(access.ServiceType, "service")), longAgo,
			[]useOn{{"is", "is.list", everyDay, nil}, {"kms", "c.operate", everyDay, nil}},
			access.Narrow, "Viewer serviceType=service serviceName=is + Operator serviceType=service serviceName=kms"},
		{"one region", granted("p", []string{viewer}, literal(access.ServiceName, "kms")), longAgo,
			[]useOn{{"kms", "c.read", everyDay, []string{access.Region, "us-south", access.ServiceInstance, "i1"}}},
			access.Narrow, "Viewer serviceName=kms region=us-south serviceInstance=i1"},
		{"two regions, sometimes without an instance", granted("p", []string{viewer}, literal(access.ServiceName, "kms")), longAgo,
			[]useOn{{"kms", "c.read", everyDay, []string{access.Region, "us-south", access.ServiceInstance, "i1"}}, {"kms", "c.read", everyDay, []string{access.Region, "eu-de"}}},
			access.Narrow, `Viewer serviceName=kms region=["eu-de","us-south"]`},
		{"a pattern that matched one", granted("p", []string{viewer}, literal(access.ServiceName, "kms"), access.Attribute{Key: access.Region, Operator: access.StringMatch, Value: access.Text("us-*")}), longAgo,
			[]useOn{{"kms", "c.read", everyDay, []string{access.Region, "us-south"}}}, access.Narrow, "Viewer serviceName=kms region=us-south"},
		{"observed too shortly", granted("p", []string{administrator}, literal(access.ServiceName, "is")), now.AddDate(0, 0, -29), []useOn{{"is", "is.list", []int{1}, nil}},
			access.Undecided, "Viewer serviceName=is"},
		{"unused and observed too shortly", granted("p", []string{administrator}, literal(access.ServiceName, "is")), now.AddDate(0, 0, -29), nil, access.Undecided, ""},
		{"used before the window only", granted("p", []string{viewer}, literal(access.ServiceName, "is")), longAgo, []useOn{{"is", "is.list", []int{100}, nil}}, access.Remove, ""},
		{"used once a quarter", granted("p", []string{operator}, literal(access.ServiceName, "is")), longAgo, []useOn{{"is", "is.list", []int{92, 183, 275}, nil}},
			access.Narrow, "Viewer serviceName=is"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := advise(t, access.Question{}, tt.since, []*access.Policy{tt.policy}, tt.uses...)
			a := r.Own[0]
			var texts []string
			for _, s := range a.Smaller {
				texts = append(texts, short(s.Policy))
			}
			if got := strings.Join(texts, " + "); a.Verdict != tt.verdict || got != tt.smaller {
				t.Errorf("verdict %s with %q, want %s with %q", a.Verdict, got, tt.verdict, tt.smaller)
			}
		})
	}
}

// short writes roles and resource.
func short(p *access.Policy) string {
	var parts []string
	for _, role := range p.Roles {
		parts = append(parts, role[strings.LastIndexByte(role, ':')+1:])
	}
	slices.SortStableFunc(parts, func(a, b string) int { return strings.Compare(b, a) })
	for _, a := range p.Resource {
		switch {
		case a.Key == access.AccountID:
		case a.Operator == access.StringEquals:
			parts = append(parts, a.Key+"="+a.Value.Text)
		default:
			parts = append(parts, a.Key+"="+a.Value.String())
		}
	}
	return strings.Join(parts, " ")
}

func TestWhatComesSeldomIsTold(t *testing.T) {
	for _, tt := range []struct {
		name    string
		ago     []int
		pattern string
		period  int
	}{
		{"each day", every(1, 60), "", 0},
		{"each week", []int{1, 8, 15, 22, 29}, access.Periodic, 7},
		{"each week, over midnight", []int{1, 2, 8, 9, 15, 16}, access.Periodic, 7},
		{"on the first of each month", []int{14, 45, 75}, access.Periodic, 31},
		{"each quarter", []int{10, 102, 193}, access.Periodic, 92},
		{"twice a year apart", []int{1, 366}, access.Rare, 0},
		{"once", []int{40}, access.Rare, 0},
		{"now and then", []int{1, 4, 30, 31, 60}, "", 0},
		{"each third day", every(3, 60), "", 0},
	} {
		r := advise(t, access.Question{Window: 400 * 24 * time.Hour}, longAgo, []*access.Policy{granted("p", []string{viewer}, literal(access.ServiceName, "is"))}, useOn{"is", "is.list", tt.ago, nil})
		if len(r.Own[0].Used) != 1 {
			t.Fatalf("%s: %+v", tt.name, r.Own[0])
		}
		if u := r.Own[0].Used[0]; u.Pattern != tt.pattern || u.Period != tt.period || u.Count != int64(len(tt.ago)) || u.Days != len(tt.ago) {
			t.Errorf("%s: %+v, want %q every %d days", tt.name, u, tt.pattern, tt.period)
		}
	}
}

func TestAPeriodicUseThatDidNotComeAgainIsNotKept(t *testing.T) {
	r := advise(t, access.Question{Window: 30 * 24 * time.Hour}, longAgo, []*access.Policy{granted("p", []string{viewer}, literal(access.ServiceName, "is"))},
		useOn{"is", "is.list", []int{47, 54, 61}, nil}, useOn{"is", "c.read", []int{40, 70, 100}, nil})
	a := r.Own[0]
	if a.Verdict != access.Keep || len(a.Used) != 1 || a.Used[0].Action != "c.read" || len(a.Earlier) != 1 {
		t.Errorf("%+v", a)
	}
	r = advise(t, access.Question{Window: 30 * 24 * time.Hour}, longAgo, []*access.Policy{granted("p", []string{viewer}, literal(access.ServiceName, "is"))},
		useOn{"is", "is.list", []int{47, 54, 61}, nil})
	if a := r.Own[0]; a.Verdict != access.Remove || !strings.Contains(strings.Join(a.Warnings, " "), "is.list was used before the window, last on 2026-04-29") {
		t.Errorf("%+v", a)
	}
}

func TestACustomRoleHasExactlyWhatWasUsed(t *testing.T) {
	p := granted("p", []string{administrator}, literal(access.ServiceName, "is"))
	uses := []useOn{{"is", "is.list", every(1, 60), nil}, {"is", "is.create", every(1, 60), nil}}
	r := advise(t, access.Question{CustomRole: true}, longAgo, []*access.Policy{p}, uses...)
	s := r.Own[0].Smaller[0]
	if s.Role == nil || !slices.Equal(s.Role.Actions, []string{"is.create", "is.list"}) || !slices.Equal(s.Policy.Roles, []string{s.Role.CRN()}) || s.Beyond != nil {
		t.Errorf("%s", dump(s))
	}
	if len(r.Changes) != 2 || r.Changes[0].Role != s.Role || r.Changes[1].Update != s.Policy {
		t.Errorf("%s", dump(r.Changes))
	}
	// Without one, the smallest role that there is, with what it allows beside.
	s = advise(t, access.Question{}, longAgo, []*access.Policy{p}, uses...).Own[0].Smaller[0]
	if s.Role != nil || short(s.Policy) != "Editor serviceName=is" || !slices.Equal(s.Beyond[0].Actions, []string{"c.edit", "c.operate", "c.read", "is.operate"}) {
		t.Errorf("%s", dump(s))
	}
	// No role is made where one has just that, or of none of the service's own.
	for _, u := range []useOn{{"kms", "kms.read", []int{1}, nil}, {"kms", "c.read", []int{1}, nil}} {
		p := granted("p", []string{administrator, reader}, literal(access.ServiceName, "kms"))
		s := advise(t, access.Question{CustomRole: true}, longAgo, []*access.Policy{p}, u).Own[0].Smaller[0]
		if made := u.action == "kms.read"; (s.Role != nil) != made {
			t.Errorf("%s: %s", u.action, dump(s))
		}
	}
}

// The second policy is hidden behind the first as long as that is there: then
// its own count says nothing.
func TestTheUseOfAPolicyThatIsGoneCountsForThoseBehindIt(t *testing.T) {
	first := granted("a-first", []string{viewer}, literal(access.ServiceName, "is"))
	second := granted("b-second", []string{operator}, literal(access.ServiceType, "service"))
	v := sliceView{world{policies: []*access.Policy{first, second}}, small(t)}
	var book ledger
	q := access.Request{Subject: worker, AccountID: accountA, Action: "is.list", Time: now.AddDate(0, 0, -20),
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"}}
	book.note(q, access.Decide(v, q).Policy)
	recommend := func() access.Recommendation {
		return access.Recommend(now, access.Question{}, v.Catalog(accountA), book.evidence(v, longAgo))
	}
	if r := recommend(); r.Own[1].Verdict != access.Remove {
		t.Errorf("while the first is there: %s", dump(r.Own[1]))
	}
	gone := *first
	gone.State = access.Deleted
	v.policies = []*access.Policy{&gone, second}
	if r := recommend(); r.Own[0].Verdict != access.Narrow || short(r.Own[0].Smaller[0].Policy) != "Viewer serviceType=service serviceName=is" {
		t.Errorf("when the first is gone: %s", dump(r.Own[0]))
	}
	elsewhere := granted("a-first", []string{viewer}, literal(access.ServiceName, "is"), literal(access.Region, "eu-de"))
	elsewhere.ModifiedAt = now.AddDate(0, 0, -10)
	v.policies = []*access.Policy{elsewhere, second}
	if r := recommend(); r.Own[1].Verdict != access.Narrow {
		t.Errorf("when the first is about something else: %s", dump(r.Own[1]))
	}
}

func TestTwoPoliciesThatBecomeTheSameBecomeOne(t *testing.T) {
	wide := granted("a-wide", []string{operator}, literal(access.ServiceType, "service"))
	wide2 := granted("b-wide", []string{viewer}, literal(access.ServiceType, "service"), literal(access.Region, "us-south"))
	uses := []access.Use{}
	for _, p := range []*access.Policy{wide, wide2} {
		u := access.Use{AccountID: accountA, Subject: worker, PolicyID: p.ID, Service: "is", Action: "is.list", First: now, Last: now}
		u.Touched.Add(map[string]string{access.Region: "us-south"})
		uses = append(uses, u)
	}
	r := access.Recommend(now, access.Question{}, small(t), access.Evidence{AccountID: accountA, Subject: worker, Own: []*access.Policy{wide, wide2}, Uses: uses, Since: longAgo})
	if len(r.Changes) != 2 || r.Changes[0].Remove != "b-wide" || r.Changes[1].Update == nil {
		t.Errorf("%s", dump(r.Changes))
	}
	if r.Own[1].Verdict != access.Remove || !slices.Equal(r.Own[1].Instead, []string{"a-wide"}) {
		t.Errorf("%s", dump(r.Own[1]))
	}
}

func TestNothingIsDecidedWhileSomeUseIsNotKnown(t *testing.T) {
	p := granted("p", []string{administrator}, literal(access.ServiceName, "is"))
	e := access.Evidence{AccountID: accountA, Subject: worker, Own: []*access.Policy{p}, Since: longAgo,
		Uses: []access.Use{{AccountID: accountA, Subject: worker, Count: 7, Last: now.AddDate(0, 0, -1)}}}
	r := access.Recommend(now, access.Question{}, small(t), e)
	if r.Missed != 7 || r.Own[0].Verdict != access.Undecided || !r.Changes[0].Undecided {
		t.Errorf("%s", dump(r))
	}
	e.Uses[0].Last = now.AddDate(0, 0, -100)
	if r := access.Recommend(now, access.Question{}, small(t), e); r.Missed != 0 || r.Own[0].Verdict != access.Remove {
		t.Errorf("%s", dump(r))
	}
}

func TestPoliciesOfGroupsAreShownAndNotChanged(t *testing.T) {
	own, group := granted("own", []string{viewer}, literal(access.ServiceName, "kms")), granted("of-a-group", []string{operator}, literal(access.ServiceName, "is"))
	group.Subject = []access.Attribute{literal(access.AccessGroupID, "AccessGroupId-1")}
	u := access.Use{AccountID: accountA, Subject: worker, PolicyID: group.ID, Service: "is", Action: "is.list", Count: 3, First: now, Last: now}
	u.Days.Add(now)
	r := access.Recommend(now, access.Question{}, small(t), access.Evidence{
		AccountID: accountA, Subject: worker, Own: []*access.Policy{own}, Groups: []*access.Policy{group}, Uses: []access.Use{u}, Since: longAgo,
	})
	if len(r.Changes) != 1 || r.Changes[0].Remove != "own" {
		t.Errorf("%s", dump(r.Changes))
	}
	if g := r.Groups[0]; g.Verdict != access.Keep || len(g.Used) != 1 || g.Used[0].Count != 3 || !slices.Equal(g.Unused[0].Actions, []string{"c.operate", "c.read", "is.operate"}) {
		t.Errorf("%s", dump(g))
	}
}

func TestDaysAreASetOfTheLatestDays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d access.Days
		want := map[int]bool{}
		last := -1 << 30
		for _, n := range rapid.SliceOf(rapid.IntRange(-600, 1500)).Draw(t, "days") {
			d.Add(time.Unix(int64(n)*86400+rapid.Int64Range(0, 86399).Draw(t, "seconds"), 0))
			want[n] = true
			last = max(last, n)
		}
		var days []int
		for n := range want {
			if last-n < access.MaxDays {
				days = append(days, n)
			}
		}
		slices.Sort(days)
		check := func(d access.Days) {
			var got []int
			for _, at := range d.All() {
				got = append(got, int(at.Unix()/86400))
			}
			if !slices.Equal(got, days) || d.Len() != len(days) {
				t.Fatalf("%v, want %v", got, days)
			}
		}
		check(d)
		text, err := d.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var again access.Days
		if err := again.UnmarshalText(text); err != nil || again != d {
			t.Fatalf("%s: %v", text, err)
		}
		check(again)
	})
}

func FuzzDays(f *testing.F) {
	for _, s := range []string{"", "20619:AQ", "1:", ":AQ", "99999999999:AQ", "1:AA"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var d access.Days
		if d.UnmarshalText([]byte(s)) != nil {
			return
		}
		d.Add(time.Unix(0, 0))
		if d.Period() < 0 || d.Len() != len(d.All()) {
			t.Errorf("%q", s)
		}
	})
}

func TestWhatWasTouchedIsBounded(t *testing.T) {
	var touched access.Touched
	if !touched.Add(map[string]string{access.Region: "r0"}) || touched.Add(map[string]string{access.Region: "r0"}) {
		t.Error("the first resource is new, and the second is not")
	}
	copied := touched
	for i := range 10 * access.MaxTouched {
		touched.Add(map[string]string{access.Region: fmt.Sprint("r", i), access.ServiceInstance: strings.Repeat("x", 300), access.ResourceType: "a\nb"})
	}
	if v, ok := touched.Of(access.Region); !ok || len(v.List) != access.MaxTouched || !v.Many || v.Absent {
		t.Errorf("%+v", v)
	}
	for _, key := range []string{access.ServiceInstance, access.ResourceType} {
		if v, _ := touched.Of(key); len(v.List) != 0 || !v.Many || !v.Absent {
			t.Errorf("%s: %+v", key, v)
		}
	}
	if v, _ := copied.Of(access.Region); !slices.Equal(v.List, []string{"r0"}) || v.Many {
		t.Errorf("a copy has changed: %+v", v)
	}
	if _, ok := touched.Of(access.Resource); ok {
		t.Error("single resources are remembered")
	}
}
