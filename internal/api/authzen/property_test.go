package authzen_test

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/directory"
)

// Words that policies and questions are made of: few, so that they meet.
var (
	instances = []string{"", "archive", "office"}
	documents = []string{"", "plan.txt", "plan-b.txt", "notes"}
	actions   = []string{readDoc, writeDoc, "iam.policy.read", "documents.document.burn"}
)

// demands draws what a policy asks of a document.
func demands(t *rapid.T) []access.Attribute {
	var out []access.Attribute
	if i := rapid.SampledFrom(instances).Draw(t, "instance"); i != "" {
		out = append(out, equals(access.ServiceInstance, i))
	}
	switch rapid.IntRange(0, 4).Draw(t, "demand") {
	case 0:
		out = append(out, equals(access.Resource, "plan.txt"))
	case 1:
		out = append(out, access.Attribute{Key: access.Resource, Operator: access.StringMatch, Value: access.Text("plan*")})
	case 2:
		exists := rapid.Bool().Draw(t, "exists")
		out = append(out, access.Attribute{Key: access.Resource, Operator: access.StringExists, Value: access.Value{Exists: &exists}})
	case 3:
		out = append(out, access.Attribute{Key: access.Resource, Operator: access.StringEqualsAnyOf, Value: access.Value{List: []string{"notes", "plan.txt"}}})
	}
	return out
}

// TestEveryInterfaceGivesTheEvaluatorsAnswer asks random questions about random
// policies of all interfaces. The identities are alive, so that nothing but the
// evaluator has a say.
func TestEveryInterfaceGivesTheEvaluatorsAnswer(t *testing.T) {
	s := start(t)
	account := s.Owner.AccountID
	var subjects []string
	for range 3 {
		subjects = append(subjects, s.user(account), s.serviceID(account), s.profile(account))
	}
	group := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: account, Name: "g"}
	for _, id := range subjects[:5] {
		group.Members = append(group.Members, access.Member{IAMID: id})
	}
	s.update(func(tx *directory.Tx) { s.d.Groups.Put(tx, group) })

	rapid.Check(t, func(rt *rapid.T) {
		var policies []*access.Policy
		for range rapid.IntRange(0, 4).Draw(rt, "policies") {
			key, subject := access.IAMID, rapid.SampledFrom(append(subjects, group.ID, access.PublicAccess)).Draw(rt, "policy subject")
			if subject == group.ID || subject == access.PublicAccess {
				key = access.AccessGroupID
			}
			role := rapid.SampledFrom([]string{"Reader", "Writer"}).Draw(rt, "role")
			tagged := rapid.IntRange(0, 3).Draw(rt, "tagged") == 0
			policies = append(policies, s.policy(key, subject, func(p *access.Policy) {
				p.Roles = []string{access.ServiceRoleCRN("documents", role)}
				if tagged {
					p.Tags = []access.Attribute{equals("env", "test")}
				}
			}, demands(rt)...))
		}
		defer s.update(func(tx *directory.Tx) {
			for _, p := range policies {
				s.d.Policies.Delete(tx, p)
			}
		})

		iamID, action := rapid.SampledFrom(subjects).Draw(rt, "subject"), rapid.SampledFrom(actions).Draw(rt, "action")
		attributes := map[string]string{access.AccountID: account, access.ServiceName: "documents"}
		properties := object{}
		id := rapid.SampledFrom(documents).Draw(rt, "document")
		if id != "" {
			attributes[access.Resource] = id
		}
		if i := rapid.SampledFrom(instances).Draw(rt, "of instance"); i != "" {
			attributes[access.ServiceInstance], properties[access.ServiceInstance] = i, i
		}
		var tags []string
		if rapid.Bool().Draw(rt, "tags") {
			tags = []string{"env:test"}
			properties["tags"] = tags
		}
		request := access.Request{Subject: iamID, AccountID: account, Action: action, Resource: attributes, Tags: tags, Time: s.now()}
		want := access.Decide(s.d, request)
		resource := object{"type": "documents", "id": id, "properties": properties}

		got := s.evaluate(iamID, action, resource)
		if got.Decision != want.Allowed || got.Context.PolicyID != policyID(want) {
			rt.Fatalf("evaluation says %v by %q, Decide %v by %q", got.Decision, got.Context.PolicyID, want.Allowed, policyID(want))
		}
		batch := s.batch(object{"evaluations": []any{question(iamID, action, resource)}})
		if len(batch) != 1 || batch[0].Decision != want.Allowed {
			rt.Fatalf("the batch says %+v, Decide %v", batch, want.Allowed)
		}
		permitted := access.Permitted(s.d, request)
		if slices.Contains(permitted, action) != want.Allowed || !slices.Equal(got.Context.Permitted, permitted) {
			rt.Fatalf("permitted %v, told %v; Decide says %v", permitted, got.Context.Permitted, want.Allowed)
		}
		if names := s.search("action", object{"subject": subject(iamID), "resource": resource}).names(); !slices.Equal(names, permitted) {
			rt.Fatalf("the search finds the actions %v, permitted are %v", names, permitted)
		}
		for _, kind := range []string{"user", "service_id", "profile"} {
			who := s.who(kind, action, resource)
			for _, id := range subjects {
				request := request
				request.Subject = id
				if kind == typeOf(id) && slices.Contains(who, id) != access.Decide(s.d, request).Allowed {
					rt.Fatalf("the search for those who may %s finds %v; Decide disagrees about %s", action, who, id)
				}
			}
		}
		if len(tags) == 0 { // the older interface knows no tags
			old := s.authz(object{
				"subject": object{"attributes": object{"id": iamID}}, "action": action, "resource": object{"attributes": attributes},
			}).Responses[0]
			if old.Decision.Permitted != want.Allowed || old.Decision.Reason != got.Context.Reason {
				b, _ := json.Marshal(old)
				rt.Fatalf("/v2/authz says %s, Decide %v", b, want.Allowed)
			}
		}
	})
}

func policyID(d access.Decision) string {
	if d.Policy == nil {
		return ""
	}
	return d.Policy.ID
}
