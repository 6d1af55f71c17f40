package access_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
)

func TestValidateFollowsTheRulesOfThePolicyAPI(t *testing.T) {
	catalog := small(t)
	long := strings.Repeat("x", access.MaxValueLength)
	eleven := strings.Split(strings.Repeat("a,", access.MaxAnyOf)+"a", ",")
	set := func(attrs ...access.Attribute) func(*access.Policy) {
		return func(p *access.Policy) {
			p.Resource = append([]access.Attribute{is(access.AccountID, accountA)}, attrs...)
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*access.Policy)
		want   string // part of the error; empty for none
	}{
		{"as it should be", func(*access.Policy) {}, ""},
		{"about an access group", func(p *access.Policy) {
			p.Subject = []access.Attribute{is(access.AccessGroupID, "AccessGroupId-1")}
		}, ""},
		{"on all IAM-enabled services", set(is(access.ServiceType, "service")), ""},
		{"on a resource group", set(is(access.ResourceGroupID, "rg")), ""},
		{"on any resource group", set(exists(access.ResourceGroupID, true)), ""},
		{"on a service group", set(is(access.ServiceGroupID, "IAM")), ""},
		{"on a resource group as an object", set(is(access.ResourceType, "resource-group"), is(access.Resource, "rg")), ""},
		{"on a service that nobody knows", set(is(access.ServiceName, "new-service")), ""},
		{"with an attribute that nobody knows", set(is(access.ServiceName, "is"), is("vpcId", "v")), ""},
		{"with a value of the greatest length", set(is(access.ServiceName, "is"), is("vpcId", long)), ""},
		{"with ten values", set(is(access.ServiceName, "is"), anyOf("vpcId", access.StringEqualsAnyOf, eleven[1:]...)), ""},
		{"with a role of the service", func(p *access.Policy) {
			set(is(access.ServiceName, "kms"))(p)
			p.Roles = []string{keyPurge}
		}, ""},
		{"with a tag", func(p *access.Policy) { p.Tags = []access.Attribute{is("env", "dev")} }, ""},

		{"without a type", func(p *access.Policy) { p.Type = "" }, "type"},
		{"of type authorization with the subject of another type", func(p *access.Policy) { p.Type = access.TypeAuthorization }, "subject attribute iam_id"},
		{"of type authorization", func(p *access.Policy) { authorize(p, is(access.ServiceName, "lib"), is(access.AccountID, accountB)) }, ""},
		{"of type authorization for one instance", func(p *access.Policy) {
			authorize(p, is(access.ServiceName, "lib"), is(access.AccountID, accountB), is(access.ServiceInstance, "i"), is(access.Region, "r"))
		}, ""},
		{"of type authorization for a resource group", func(p *access.Policy) { authorize(p, is(access.ResourceGroupID, "rg"), is(access.AccountID, accountB)) }, ""},
		{"of type authorization without the source's account", func(p *access.Policy) { authorize(p, is(access.ServiceName, "lib")) }, "accountId"},
		{"of type authorization without a source", func(p *access.Policy) { authorize(p, is(access.AccountID, accountB), is(access.Region, "r")) }, "serviceName"},
		{"of type authorization without a subject", func(p *access.Policy) { authorize(p) }, "accountId"},
		{"of type authorization with conditions", func(p *access.Policy) {
			authorize(p, is(access.ServiceName, "lib"), is(access.AccountID, accountB))
			p.Pattern, p.Rule = access.PatternAllDay, &access.Rule{Key: access.KeyDayOfWeek, Operator: "dayOfWeekEquals", Value: []byte("1")}
		}, "only a policy of type access"},
		{"of an unknown type", func(p *access.Policy) { p.Type = "deny" }, "type"},
		{"without a subject", func(p *access.Policy) { p.Subject = nil }, "subject"},
		{"with two subjects", func(p *access.Policy) {
			p.Subject = append(p.Subject, is(access.AccessGroupID, "AccessGroupId-1"))
		}, "subject"},
		{"with the subject by pattern", func(p *access.Policy) {
			p.Subject = []access.Attribute{like(access.IAMID, "iam-*")}
		}, "subject"},
		{"with any subject", func(p *access.Policy) {
			p.Subject = []access.Attribute{exists(access.IAMID, true)}
		}, "subject"},
		{"with a subject by another attribute", func(p *access.Policy) {
			p.Subject = []access.Attribute{is("serviceName", "is")}
		}, "subject"},
		{"with an access group as an IAM ID", func(p *access.Policy) {
			p.Subject = []access.Attribute{is(access.IAMID, "AccessGroupId-1")}
		}, "access_group_id"},
		{"with a subject that is no IAM ID", func(p *access.Policy) { p.Subject = []access.Attribute{is(access.IAMID, "Profile-1")} }, "IAM ID"},
		{"with an empty subject", func(p *access.Policy) { p.Subject = []access.Attribute{is(access.IAMID, "")} }, "iam_id"},
		{"without an account", func(p *access.Policy) { p.Resource = p.Resource[1:] }, "accountId"},
		{"with the account by pattern", func(p *access.Policy) { p.Resource[0] = like(access.AccountID, "*") }, "accountId"},
		{"with any account", func(p *access.Policy) { p.Resource[0] = exists(access.AccountID, true) }, "accountId"},
		{"with an empty account", func(p *access.Policy) { p.Resource[0] = is(access.AccountID, "") }, "accountId"},
		{"with another account", func(p *access.Policy) { p.Resource[0] = is(access.AccountID, accountB) }, "account"},
		{"without a scope", set(), "at least one of"},
		{"with an attribute that is no scope", set(is("vpcId", "v")), "at least one of"},
		{"without a role", func(p *access.Policy) { p.Roles = nil }, "role"},
		{"with a role that nobody knows", func(p *access.Policy) { p.Roles = []string{noRole} }, "Emperor"},
		{"with a good and an unknown role", func(p *access.Policy) { p.Roles = []string{viewer, noRole} }, "Emperor"},
		{"with a role of another service", func(p *access.Policy) { p.Roles = []string{keyPurge} }, "KeyPurge"},
		{"with an empty role", func(p *access.Policy) { p.Roles = []string{""} }, "role"},
		{"with an attribute twice", set(is(access.ServiceName, "is"), is(access.ServiceName, "kms")), "twice"},
		{"with an account twice", set(is(access.ServiceName, "is"), is(access.AccountID, accountB)), "twice"},
		{"with an attribute without a key", set(is(access.ServiceName, "is"), is("", "v")), "no key"},
		{"with an empty value", set(is(access.ServiceName, "")), "serviceName"},
		{"with a value that is too long", set(is(access.ServiceName, "is"), is("vpcId", long+"x")), "vpcId"},
		{"with eleven values", set(is(access.ServiceName, "is"), anyOf("vpcId", access.StringEqualsAnyOf, eleven...)), "vpcId"},
		{"with no values", set(is(access.ServiceName, "is"), anyOf("vpcId", access.StringMatchAnyOf)), "vpcId"},
		{"with an empty value among others", set(is(access.ServiceName, "is"), anyOf("vpcId", access.StringMatchAnyOf, "a", "")), "vpcId"},
		{"with an unknown operator", set(access.Attribute{Key: access.ServiceName, Operator: "stringLike", Value: access.Text("is")}), "stringLike"},
		{"with no operator", set(access.Attribute{Key: access.ServiceName, Value: access.Text("is")}), "operator"},
		{"with a list where a text belongs", set(anyOf(access.ServiceName, access.StringEquals, "is")), "string"},
		{"with a boolean where a text belongs", set(access.Attribute{Key: access.ServiceName, Operator: access.StringMatch, Value: exists("", true).Value}), "string"},
		{"with a text where a boolean belongs", set(access.Attribute{Key: access.ServiceName, Operator: access.StringExists, Value: access.Text("true")}), "true or false"},
		{"with a text where a list belongs", set(access.Attribute{Key: access.ServiceName, Operator: access.StringEqualsAnyOf, Value: access.Text("is")}), "array"},
		{"with a tag without a key", func(p *access.Policy) { p.Tags = []access.Attribute{is("", "dev")} }, "no key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOn(is(access.ServiceName, "is"))
			tt.change(p)
			err := p.Validate(catalog)
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.want != "" && err == nil:
				t.Error("accepted")
			case tt.want != "" && !strings.Contains(err.Error(), tt.want):
				t.Errorf("the error %q does not say %q", err, tt.want)
			}
		})
	}
}

func authorize(p *access.Policy, subject ...access.Attribute) {
	p.Type, p.Subject = access.TypeAuthorization, subject
}

func TestAValueKeepsItsJSONType(t *testing.T) {
	yes, no := true, false
	for _, tt := range []struct {
		text  string
		value access.Value
	}{
		{`"text"`, access.Text("text")},
		{`""`, access.Text("")},
		{`"true"`, access.Text("true")},
		{`"[]"`, access.Text("[]")},
		{`true`, access.Value{Exists: &yes}},
		{`false`, access.Value{Exists: &no}},
		{`[]`, access.Value{List: []string{}}},
		{`["a","b"]`, access.Value{List: []string{"a", "b"}}},
		{`[""]`, access.Value{List: []string{""}}},
	} {
		var got access.Value
		if err := json.Unmarshal([]byte(tt.text), &got); err != nil || !reflect.DeepEqual(got, tt.value) {
			t.Errorf("%s reads as %+v, %v", tt.text, got, err)
		}
		if b, err := json.Marshal(tt.value); err != nil || string(b) != tt.text {
			t.Errorf("%+v writes as %s, %v; want %s", tt.value, b, err, tt.text)
		}
		if tt.value.String() != tt.text {
			t.Errorf("%+v shows as %s, want %s", tt.value, tt.value, tt.text)
		}
	}
}

func TestAValueOfAnotherJSONTypeIsRefused(t *testing.T) {
	for _, text := range []string{`1`, `-1.5`, `null`, `{}`, `{"a":"b"}`, `[1]`, `[true]`, `["a",{}]`, `[["a"]]`} {
		var v access.Value
		if err := json.Unmarshal([]byte(text), &v); err == nil {
			t.Errorf("%s reads as %+v", text, v)
		}
	}
}

func TestReadingAValueForgetsTheOneBefore(t *testing.T) {
	yes := true
	for _, text := range []string{`"a"`, `["a"]`, `false`} {
		var fresh access.Value
		used := access.Value{Text: "old", Exists: &yes, List: []string{"old", "older"}}
		if err := json.Unmarshal([]byte(text), &fresh); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(text), &used); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(fresh, used) {
			t.Errorf("%s reads as %+v into a used value", text, used)
		}
	}
}

func TestAttributesSurviveStorage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := drawPolicy(t, "policy-1")
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var got access.Policy
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(&got, p) {
			t.Fatalf("got %+v, want %+v", got, *p)
		}
	})
}

func TestSameGrantAsksForSubjectResourceAndAnOverlappingRole(t *testing.T) {
	base := func() *access.Policy { return policyOn(is(access.ServiceName, "is"), is(access.Region, "us-south")) }
	for _, tt := range []struct {
		name   string
		change func(*access.Policy)
		want   bool
	}{
		{"the same", func(*access.Policy) {}, true},
		{"attributes in another order", func(p *access.Policy) { p.Resource[1], p.Resource[2] = p.Resource[2], p.Resource[1] }, true},
		{"one role of several", func(p *access.Policy) { p.Roles = []string{viewer, operator} }, true},
		{"another description", func(p *access.Policy) { p.Description = "other" }, true},
		{"another role", func(p *access.Policy) { p.Roles = []string{viewer} }, false},
		{"another subject", func(p *access.Policy) { p.Subject[0].Value = access.Text("iam-Profile-2") }, false},
		{"another kind of subject", func(p *access.Policy) { p.Subject[0].Key = access.AccessGroupID }, false},
		{"another value", func(p *access.Policy) { p.Resource[2].Value = access.Text("eu-de") }, false},
		{"another operator", func(p *access.Policy) { p.Resource[2].Operator = access.StringMatch }, false},
		{"one attribute more", func(p *access.Policy) { p.Resource = append(p.Resource, is("vpcId", "v")) }, false},
		{"one attribute less", func(p *access.Policy) { p.Resource = p.Resource[:2] }, false},
		{"a tag", func(p *access.Policy) { p.Tags = []access.Attribute{is("env", "dev")} }, false},
		{"another type", func(p *access.Policy) { p.Type = access.TypeAuthorization }, false},
	} {
		a, b := base(), base()
		tt.change(b)
		if a.SameGrant(b) != tt.want || b.SameGrant(a) != tt.want {
			t.Errorf("%s: %t and %t, want %t", tt.name, a.SameGrant(b), b.SameGrant(a), tt.want)
		}
	}
}

// FuzzPolicy reads a policy document as the API and the store do, checks it,
// and decides with it: whatever it says, the two implementations agree, a valid
// one is only about its own account, and nothing panics.
func FuzzPolicy(f *testing.F) {
	valid, err := json.Marshal(policyOn(is(access.ServiceName, "is")))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(valid, "c.read", "is", "env:dev")
	catalog := small(f)
	f.Fuzz(func(t *testing.T, doc []byte, action, service, tag string) {
		if len(doc) > 1<<14 {
			return
		}
		var p access.Policy
		if json.Unmarshal(doc, &p) != nil {
			return
		}
		p.ID, p.AccountID = "policy-1", accountA
		invalid := p.Validate(catalog)
		if account, _ := access.Get(p.Resource, access.AccountID); invalid == nil && account != accountA {
			t.Errorf("a valid policy of %s is about account %q", accountA, account)
		}
		w := world{policies: []*access.Policy{&p}}
		q := access.Request{
			Subject: p.SubjectID(), AccountID: accountA, Action: action, Tags: []string{tag},
			Resource: map[string]string{access.AccountID: accountA, access.ServiceName: service},
		}
		d := access.Decide(sliceView{w, catalog}, q)
		if len(d.Explain()) != len(checkNames) {
			t.Errorf("trace %+v", d.Explain())
		}
		if _, failed := d.Explain().Failed(); failed == d.Allowed {
			t.Errorf("allowed %t with the trace %+v", d.Allowed, d.Explain())
		}
		// Policies that Validate refuses are never stored; those it accepts
		// must mean the same to both implementations.
		if invalid == nil && p.SubjectID() != "" && p.Subject[0].Key == access.IAMID && d.Allowed != decideByWalking(w, q) {
			t.Errorf("Decide says %t, the reference %t, on %s", d.Allowed, !d.Allowed, doc)
		}
		if again, err := json.Marshal(&p); err != nil || !json.Valid(again) {
			t.Errorf("%+v cannot be stored: %v", p, err)
		}
	})
}
