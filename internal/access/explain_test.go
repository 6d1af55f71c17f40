package access_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/object"
)

// applied is the world after a change that an explanation has named. It is
// written from the meaning of the edits alone.
func applied(t interface{ Fatalf(string, ...any) }, w world, account string, change *activity.Change) world {
	w.policies = slices.Clone(w.policies)
	if change.Kind != activity.KindPolicy {
		t.Fatalf("change %+v", change)
	}
	if change.Do == activity.Alter {
		i := slices.IndexFunc(w.policies, func(p *access.Policy) bool { return p.ID == change.ID })
		if i < 0 {
			t.Fatalf("there is no policy %s", change.ID)
		}
		p := *w.policies[i]
		for _, e := range change.Edits {
			switch {
			case e.Attribute == "rule" && e.To == "" && e.From == p.Rule.String():
				p.Rule, p.Pattern = nil, ""
			case e.Attribute == "roles" && e.From == "":
				p.Roles = append(slices.Clone(p.Roles), e.To)
			default:
				t.Fatalf("edit %+v", e)
			}
		}
		w.policies[i] = &p
		return w
	}
	p := &access.Policy{Meta: object.Meta{Revision: 1}, ID: "policy-new", API: 2, AccountID: account, State: access.Active}
	for _, e := range change.Edits {
		part, key, _ := strings.Cut(e.Attribute, ".")
		a := access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(e.To)}
		switch {
		case e.From != "" || e.To == "":
			t.Fatalf("edit %+v of a new policy", e)
		case e.Attribute == "type":
			p.Type = e.To
		case e.Attribute == "roles":
			p.Roles = append(p.Roles, e.To)
		case part == "subject":
			p.Subject = append(p.Subject, a)
		case part == "resource":
			p.Resource = append(p.Resource, a)
		default:
			t.Fatalf("edit %+v", e)
		}
	}
	w.policies = append(w.policies, p)
	return w
}

// This is the promise of an explanation: what it says would have sufficed does.
func TestTheNamedChangeMakesTheSameRequestAllowed(t *testing.T) {
	manyChecks(t, "2000")
	catalog := small(t)
	counts := map[string]int{}
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		view := sliceView{w, catalog}
		for range 10 {
			q := drawRequest(t)
			d := access.Decide(view, q)
			changes := 0
			for _, check := range d.Explain() {
				if d.Allowed && (check.Nearest != nil || check.Change != nil) {
					t.Fatalf("allowed, and yet %+v", check)
				}
				if check.Nearest != nil && len(check.Nearest.Differs) == 0 {
					t.Fatalf("nearest %+v differs in nothing", check.Nearest)
				}
				if check.Change == nil {
					continue
				}
				changes++
				account := q.Resource[access.AccountID]
				counts[check.Change.Do+" at "+check.Name]++
				after := sliceView{applied(t, w, account, check.Change), catalog}
				if !access.Decide(after, q).Allowed {
					t.Fatalf("%+v does not help\nrequest %+v\nworld %s", check.Change, q, show(w))
				}
				// It gives this subject this resource, and no other subject anything.
				other := q
				other.Subject = "iam-Profile-3"
				if access.Decide(after, other).Allowed != access.Decide(view, other).Allowed {
					t.Fatalf("%+v reaches others too", check.Change)
				}
			}
			if changes > 1 {
				t.Fatalf("%d changes for one refusal", changes)
			}
			if !d.Allowed && changes == 0 {
				counts["none"]++
			}
		}
	})
	t.Logf("%v", counts)
	for _, want := range []string{"add at policy-subject", "add at policy-resource", "alter at policy-rule", "alter at policy-action", "add at policy-action", "none"} {
		if !underRace && counts[want] < 20 {
			t.Errorf("%s: %d times: the cases prove little", want, counts[want])
		}
	}
}

func TestTheNearestPolicyDoesNotDependOnTheOrderOfPolicies(t *testing.T) {
	manyChecks(t, "1000")
	catalog := small(t)
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		shuffled := w
		shuffled.policies = rapid.Permutation(w.policies).Draw(t, "policies")
		q := drawRequest(t)
		a, b := access.Decide(sliceView{w, catalog}, q), access.Decide(sliceView{shuffled, catalog}, q)
		if a.Allowed {
			return
		}
		if x, y := fmt.Sprintf("%+v", a.Explain()), fmt.Sprintf("%+v", b.Explain()); withoutPointers(x) != withoutPointers(y) {
			t.Fatalf("%s\nin another order\n%s", x, y)
		}
		x, y := nearest(a.Explain()), nearest(b.Explain())
		if (x == nil) != (y == nil) || x != nil && x.ID != y.ID {
			t.Fatalf("nearest %+v, in another order %+v", x, y)
		}
	})
}

func withoutPointers(s string) string {
	var out []string
	for word := range strings.FieldsSeq(s) {
		if !strings.Contains(word, "0x") {
			out = append(out, word)
		}
	}
	return strings.Join(out, " ")
}

func nearest(t activity.Trace) *activity.Nearest {
	failed, _ := t.Failed()
	return failed.Nearest
}

func failedCheck(t *testing.T, w world, q access.Request) activity.Check {
	t.Helper()
	d := access.Decide(sliceView{w, small(t)}, q)
	failed, ok := d.Explain().Failed()
	if d.Allowed || !ok {
		t.Fatalf("allowed %t with %+v", d.Allowed, d.Explain())
	}
	return failed
}

func TestAMissingRoleIsToldAsTheSmallestThatContainsTheAction(t *testing.T) {
	p := policyOn(is("serviceName", "is"))
	p.ID, p.Roles = "policy-1", []string{viewer}
	q := access.Request{
		Subject: "iam-Profile-1", AccountID: accountA, Action: "is.operate",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is", access.ServiceInstance: "i"},
	}
	c := failedCheck(t, world{policies: []*access.Policy{p}}, q)
	if c.Name != "policy-action" || c.Nearest == nil || c.Nearest.ID != "policy-1" || c.Nearest.Differs[0].Attribute != "roles" {
		t.Fatalf("check %+v, nearest %+v", c, c.Nearest)
	}
	if ch := c.Change; ch.Do != activity.Alter || ch.ID != "policy-1" || len(ch.Edits) != 1 || ch.Edits[0] != (activity.Edit{Attribute: "roles", To: operator}) {
		t.Errorf("change %+v", ch)
	}
	if want := "tabard iam trusted-profile-policy-update Profile-1 policy-1 --roles Viewer,Operator"; c.Change.Command != want {
		t.Errorf("command %s", c.Change.Command)
	}
}

func TestWithoutAPolicyTheChangeIsOneOnTheResourceThatWasAskedAbout(t *testing.T) {
	q := access.Request{
		Subject: "iam-ServiceId-1", AccountID: accountA, Action: "kms.purge",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "kms", access.ServiceInstance: "it's mine"},
	}
	c := failedCheck(t, world{}, q)
	if c.Name != "policy-subject" || c.Nearest != nil || c.Change == nil {
		t.Fatalf("check %+v", c)
	}
	want := `tabard iam service-policy-create ServiceId-1 --roles 'Key Purge' --service-name kms --service-instance 'it'\''s mine'`
	if c.Change.Command != want {
		t.Errorf("command %s", c.Change.Command)
	}
	q.Resource[access.ServiceInstance] = "*" // on the command line that would be every instance
	if c := failedCheck(t, world{}, q); c.Change == nil || c.Change.Command != "" {
		t.Errorf("change %+v", c.Change)
	}
	q.Action = "kms.fly"
	if c := failedCheck(t, world{}, q); c.Change != nil || !strings.Contains(c.Hint, "no role of service kms contains kms.fly") {
		t.Errorf("change %+v, hint %s", c.Change, c.Hint)
	}
}

// To give a role to a group gives it to everybody who is in it.
func TestAPolicyOfAGroupIsNotWidenedForOneOfItsMembers(t *testing.T) {
	p := policyOn(is("serviceName", "is"))
	p.ID, p.Roles = "policy-1", []string{viewer}
	p.Subject = []access.Attribute{is(access.AccessGroupID, access.PublicAccess)}
	q := access.Request{
		Subject: "iam-Profile-1", AccountID: accountA, Action: "is.operate",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
	}
	c := failedCheck(t, world{policies: []*access.Policy{p}}, q)
	if c.Nearest == nil || c.Nearest.ID != "policy-1" || c.Change.Do != activity.Add {
		t.Errorf("nearest %+v, change %+v", c.Nearest, c.Change)
	}
}

func TestAPermitPaysNothingForTheExplanationsOfRefusals(t *testing.T) {
	if underRace {
		t.Skip("allocations are counted without the race detector")
	}
	q := access.Request{
		Subject: "iam-Profile-1", AccountID: accountA, Action: "is.operate",
		Resource: map[string]string{access.AccountID: accountA, access.ServiceName: "is"},
	}
	allowing := policyOn(is("serviceName", "is"))
	allowing.Roles = []string{operator}
	allocations := func(refusing int) float64 {
		v := fixed{catalog: small(t)}
		for i := range refusing {
			p := policyOn(is("serviceName", "is"), is("resource", fmt.Sprint(i)))
			v.policies = append(v.policies, p)
		}
		v.policies = append(v.policies, allowing)
		return testing.AllocsPerRun(50, func() {
			if !access.Decide(v, q).Allowed {
				t.Fatal("refused")
			}
		})
	}
	if few, many := allocations(0), allocations(500); many > few {
		t.Errorf("%.0f allocations beside 500 other policies, %.0f without", many, few)
	}
}

// fixed is a view whose look-ups cost nothing.
type fixed struct {
	access.View
	catalog  *access.Catalog
	policies []*access.Policy
}

func (f fixed) Catalog(string) *access.Catalog { return f.catalog }

func (f fixed) PoliciesOf(_, _, _ string) []*access.Policy { return f.policies }

func (f fixed) GroupsOf(_, _ string, _ time.Time) []string { return nil }
