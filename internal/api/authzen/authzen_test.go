package authzen_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

func TestAnAnswerNamesThePolicyThatDecided(t *testing.T) {
	s := start(t)
	ada := s.profile(s.Owner.AccountID)
	p := s.reader(ada)
	a := s.allowed(ada, readDoc, document("plan.txt"))
	if a.Context.PolicyID != p.ID || !strings.Contains(a.Context.Reason, p.ID) || !slices.Equal(own(a.Context.Permitted), []string{readDoc}) {
		t.Errorf("context %+v, want policy %s", a.Context, p.ID)
	}
	if a.Context.MaxAge == nil || *a.Context.MaxAge != 1 {
		t.Errorf("the answer may be kept for %v s, want 1", a.Context.MaxAge)
	}
	if a.Context.TransactionID != a.transaction {
		t.Errorf("transaction %q in the body, %q in the header", a.Context.TransactionID, a.transaction)
	}
	if count, _ := s.Usage.Of(p.ID); count != 1 {
		t.Errorf("the policy's use was counted %d times", count)
	}
}

// own are the actions of the service itself, without those that every service
// has.
func own(actions []string) []string {
	return slices.DeleteFunc(slices.Clone(actions), func(a string) bool { return !strings.HasPrefix(a, "documents.") })
}

func TestADenialIsAnAnswerThatAnAdministratorCanExplain(t *testing.T) {
	s := start(t)
	ada := s.profile(s.Owner.AccountID)
	p := s.reader(ada, equals(access.ServiceInstance, "archive"))
	for _, c := range []struct {
		action   string
		resource object
		check    string
	}{
		{readDoc, document("plan.txt", "serviceInstance", "office"), "policy-resource"},
		{readDoc, document("plan.txt"), "policy-resource"},
		{writeDoc, document("plan.txt", "serviceInstance", "archive"), "policy-action"},
	} {
		a := s.denied(ada, c.action, c.resource)
		if a.Context.PolicyID != "" || strings.Contains(a.Context.Reason, p.ID) || !strings.Contains(a.Context.Reason, c.check) {
			t.Errorf("%s on %v: context %+v, want the check %s and not the policy", c.action, c.resource, a.Context, c.check)
		}
		if got := s.explained(a.transaction); got != c.check {
			t.Errorf("%s on %v: explained by %s, want %s", c.action, c.resource, got, c.check)
		}
		e := s.events(a.transaction)[0]
		if e.Action != "iam-access-management.policy.eval" || e.Initiator.ID != s.asker || !strings.Contains(string(e.RequestData), ada) ||
			!strings.Contains(string(e.ResponseData), `"Deny"`) {
			t.Errorf("event %+v", e)
		}
	}
	if got := s.explained(s.denied(s.profile(s.Owner.AccountID), readDoc, document("plan.txt")).transaction); got != "policy-subject" {
		t.Errorf("explained by %s, want policy-subject", got)
	}
}

func TestAResourceIsACRNOrAnIDWithProperties(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada, equals(access.ServiceInstance, "archive"), equals(access.ResourceType, "document"), equals(access.Resource, "plan.txt"))
	name := crn.DefaultNames.Of("documents", "us-south", s.Owner.AccountID, "archive", "document", "plan.txt").String()
	for _, r := range []object{
		{"type": "documents", "id": name},
		{"type": "documents/document", "id": name},
		{"type": "documents/document", "id": name, "properties": object{"region": "us-south", "serviceInstance": "archive"}},
		{"type": "documents/document", "id": "plan.txt", "properties": object{"serviceInstance": "archive"}},
		{"type": "documents", "id": "", "properties": object{"resource": "plan.txt", "resourceType": "document", "serviceInstance": "archive", "accountId": s.Owner.AccountID}},
	} {
		s.allowed(ada, readDoc, r)
	}
	s.denied(ada, readDoc, object{"type": "documents", "id": crn.DefaultNames.Of("documents", "", s.Owner.AccountID, "archive", "document", "other").String()})
}

func TestAQuestionThatContradictsItselfIsMalformed(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	name := crn.DefaultNames.Of("documents", "us-south", s.Owner.AccountID, "archive", "document", "plan.txt").String()
	with := func(key string, value any) object {
		return object{"type": "documents", "id": name, "properties": object{key: value}}
	}
	many := object{}
	for i := range 51 {
		many[fmt.Sprint("p", i)] = "v"
	}
	for _, r := range []object{
		with("serviceInstance", "office"), with("accountId", s.Other.AccountID), with("region", "eu-de"), with("resource", "x"),
		with("serviceName", "is"), with("resourceType", "folder"),
		{"type": "is", "id": name}, {"type": "documents/folder", "id": name},
		with("serviceType", "service"), with("service_group_id", "IAM"),
		with("serviceInstance", 7), with("serviceInstance", nil), with("serviceInstance", []string{"archive"}), with("own", object{"a": "b"}),
		with("tags", "env:test"), with("tags", object{}), with("tags", []any{"env:test", 1}), with("tags", slices.Repeat([]string{"a:b"}, 1001)),
		with("own", strings.Repeat("x", 2049)), with(strings.Repeat("x", 2049), "own"),
		{"type": "documents", "id": "crn:v1:not-one"}, {"type": "documents", "id": strings.Repeat("x", 2049)}, {"type": "documents", "id": "x", "properties": many},
		{"type": "documents"}, {"id": "plan.txt"}, {"type": "", "id": "plan.txt"}, {"type": "/document", "id": "plan.txt"}, {"type": "documents", "id": nil},
	} {
		if got := s.post("/access/v1/evaluation", question(ada, readDoc, r)); got.Status != 400 {
			t.Errorf("%v: %d %s", r, got.Status, got.Raw)
		}
	}
	for _, sub := range []object{
		nil, {}, {"type": "user"}, {"id": ada}, {"type": "user", "id": ""}, {"type": "user", "id": "ada"}, {"type": "profile", "id": ada},
		{"type": "robot", "id": ada}, {"type": "user", "id": "IBMid-" + strings.Repeat("x", 2048)},
		{"type": "user", "id": ada, "properties": object{"accountId": 7}}, {"type": "user", "id": ada, "properties": object{"accountId": ""}},
		{"type": "user", "id": ada, "properties": object{"access_token": ""}}, {"type": "user", "id": ada, "properties": object{"access_token": []string{}}},
		{"type": "user", "id": ada, "properties": object{"access_token": nil}},
	} {
		q := question(ada, readDoc, document("plan.txt"))
		q["subject"] = sub
		if got := s.post("/access/v1/evaluation", q); got.Status != 400 {
			t.Errorf("subject %v: %d %s", sub, got.Status, got.Raw)
		}
	}
	for _, a := range []object{nil, {}, {"name": ""}, {"name": 1}, {"name": strings.Repeat("x", 2049)}} {
		q := question(ada, readDoc, document("plan.txt"))
		q["action"] = a
		if got := s.post("/access/v1/evaluation", q); got.Status != 400 {
			t.Errorf("action %v: %d %s", a, got.Status, got.Raw)
		}
	}
}

func TestFieldsThatNobodyKnowsAreIgnored(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	if a := s.evaluation(object{
		"subject":  object{"type": "user", "id": ada, "properties": object{"department": "Sales", "roles": []string{"x"}}, "more": 1},
		"action":   object{"name": readDoc, "properties": object{"method": "GET"}},
		"resource": object{"type": "documents/document", "id": "plan.txt", "properties": object{"shelf": "7"}, "more": object{}},
		"context":  object{"time": "1985-10-26T01:22-07:00", "x": []int{1}}, "more": []any{nil},
	}); !a.Decision {
		t.Errorf("refused: %+v", a.Context)
	}
}

func TestTagsOfTheResourceCount(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.policy(access.IAMID, ada, func(p *access.Policy) { p.Tags = []access.Attribute{equals("env", "test")} })
	tagged := func(tags ...string) object {
		return object{"type": "documents", "id": "", "properties": object{"tags": tags}}
	}
	s.allowed(ada, readDoc, tagged("cost:low", "env:test"))
	s.denied(ada, readDoc, tagged("env:prod"))
	s.denied(ada, readDoc, tagged())
	s.denied(ada, readDoc, document(""))
	if got := s.who("user", readDoc, tagged("env:test")); !slices.Contains(got, ada) {
		t.Errorf("the search finds %v", got)
	}
}

func TestTheRequestIDComesBack(t *testing.T) {
	s := start(t)
	for _, path := range []string{"/access/v1/evaluation", "/access/v1/evaluations", "/access/v1/search/action", "/access/v1/search/subject"} {
		r := s.Do(apitest.Request{Method: "POST", Path: path, Body: "{}", As: s.asker, Header: map[string]string{"X-Request-ID": "bfe9eb29-ab87"}})
		if r.Status != 400 || r.Header.Get("X-Request-ID") != "bfe9eb29-ab87" {
			t.Errorf("%s: %d, X-Request-ID %q", path, r.Status, r.Header.Get("X-Request-ID"))
		}
	}
}

func TestTheMetadataNamesWhatIsThere(t *testing.T) {
	s := start(t)
	r := s.Do(apitest.Request{Path: "/.well-known/authzen-configuration", Anonymous: true})
	m := r.Want(200)
	if m["policy_decision_point"] != s.Config.URL || r.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%s: %v", r.Header.Get("Content-Type"), m)
	}
	for name, url := range m {
		path, ok := strings.CutPrefix(url.(string), s.Config.URL)
		if !ok {
			t.Errorf("%s is at %s", name, url)
		}
		if strings.HasSuffix(name, "_endpoint") && s.post(path, "{}").Status != 400 {
			t.Errorf("%s is not there", name)
		}
	}
	if len(m) != 5 {
		t.Errorf("metadata %v", m)
	}
}

func TestABatchAnswersInOrderWithDefaults(t *testing.T) {
	s := start(t)
	ada, bob := s.user(s.Owner.AccountID), s.profile(s.Owner.AccountID)
	s.reader(ada)
	s.policy(access.IAMID, bob, func(p *access.Policy) { p.Roles = []string{access.ServiceRoleCRN("documents", "Writer")} })
	got := s.batch(object{
		"subject": subject(ada), "action": object{"name": readDoc}, "resource": document("a"), "context": object{"x": 1},
		"evaluations": []any{
			object{},
			object{"action": object{"name": writeDoc}},
			object{"subject": subject(bob), "action": object{"name": writeDoc}},
			object{"resource": document("b", "accountId", s.Owner.AccountID)},
			nil,
		},
	})
	var decisions []bool
	for _, a := range got {
		decisions = append(decisions, a.Decision)
	}
	if !slices.Equal(decisions, []bool{true, false, true, true, true}) {
		t.Errorf("decisions %v: %+v", decisions, got)
	}
}

func TestABatchStopsAsItsSemanticSays(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	read, write, bad := object{"action": object{"name": readDoc}}, object{"action": object{"name": writeDoc}}, object{"action": object{"name": ""}}
	for _, c := range []struct {
		semantic string
		items    []any
		answers  int
	}{
		{"execute_all", []any{write, read, write}, 3},
		{"", []any{write, bad, read}, 3},
		{"deny_on_first_deny", []any{read, write, read}, 2},
		{"deny_on_first_deny", []any{read, bad, read}, 2},
		{"deny_on_first_deny", []any{read, read}, 2},
		{"permit_on_first_permit", []any{write, bad, read, read}, 3},
		{"permit_on_first_permit", []any{write, write}, 2},
	} {
		body := object{"subject": subject(ada), "resource": document("a"), "evaluations": c.items, "options": object{"another": "x"}}
		if c.semantic != "" {
			body["options"] = object{"evaluations_semantic": c.semantic}
		}
		if got := s.batch(body); len(got) != c.answers {
			t.Errorf("%s of %v: %d answers, want %d", c.semantic, c.items, len(got), c.answers)
		}
	}
	s.post("/access/v1/evaluations", object{"evaluations": []any{read}, "options": object{"evaluations_semantic": "some"}}).Want(400)
}

func TestAnItemsErrorIsInItsContext(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	r := s.post("/access/v1/evaluations", object{
		"subject": subject(ada), "action": object{"name": readDoc},
		"evaluations": []any{
			object{"resource": document("a")},
			object{"resource": object{"type": "documents"}},
			object{"resource": object{"type": "is", "id": ""}},
			object{"resource": document("a", "accountId", s.Other.AccountID)},
			object{},
		},
	})
	got := decode[struct{ Evaluations []answer }](s, r).Evaluations
	for i, status := range []int{0, 400, 403, 403, 400} {
		a := got[i]
		if a.Decision != (status == 0) || (a.Context.Error == nil) != (status == 0) || status != 0 && (a.Context.Error.Status != status || a.Context.Error.Message == "") {
			t.Errorf("item %d: %+v", i, a)
		}
	}
	// The two that may not be asked stand in the log like any refusal.
	events := s.events(r.Header.Get("Transaction-Id"))
	if len(events) != 2 {
		t.Fatalf("%d events, want 2", len(events))
	}
	for _, e := range events {
		if e.Target.Name != access.ActionDecide || e.Initiator.ID != s.asker {
			t.Errorf("event %+v", e)
		}
	}
}

func TestABatchIsBoundedAndWithoutItemsIsASingleQuestion(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	body := question(ada, readDoc, document("a"))
	body["evaluations"] = slices.Repeat([]any{object{}}, 100)
	if got := s.batch(body); len(got) != 100 {
		t.Errorf("%d answers", len(got))
	}
	body["evaluations"] = slices.Repeat([]any{object{}}, 101)
	s.post("/access/v1/evaluations", body).Want(400)
	for _, none := range []any{nil, []any{}} {
		body["evaluations"] = none
		if a := decode[answer](s, s.post("/access/v1/evaluations", body)); !a.Decision {
			t.Errorf("a single question is answered %+v", a)
		}
	}
}

// paths are those of every question, each with a body that is right.
func (s *stack) paths(iamID string, resource object) map[string]any {
	properties := object{"serviceName": "documents"}
	if p, ok := resource["properties"].(object); ok {
		maps.Copy(properties, p)
	}
	if kind, ok := resource["type"].(string); ok {
		properties["serviceName"], _, _ = strings.Cut(kind, "/")
	}
	legacy := []any{object{"subject": object{"attributes": object{"id": iamID}}, "action": readDoc, "resource": object{"attributes": properties}}}
	return map[string]any{
		"/access/v1/evaluation":     question(iamID, readDoc, resource),
		"/access/v1/evaluations":    question(iamID, readDoc, resource),
		"/access/v1/search/action":  object{"subject": subject(iamID), "resource": resource},
		"/access/v1/search/subject": object{"subject": object{"type": "user"}, "action": object{"name": readDoc}, "resource": resource},
		"/v2/authz":                 legacy,
		"/v2/authz/roles":           legacy,
	}
}

func TestOnlyADecisionPointOfTheServiceMayAsk(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	limited := s.serviceID(s.Owner.AccountID)
	s.policy(access.IAMID, limited, func(p *access.Policy) { p.Roles = []string{access.ServiceRoleCRN("documents", access.DecisionPoint)} },
		equals(access.ServiceInstance, "archive"))
	stranger := s.serviceID(s.Owner.AccountID)
	s.Grant(stranger, "documents", "Manager", "Administrator")
	instance := func(name string) object { return document("", "serviceInstance", name) }
	for _, c := range []struct {
		what, as string
		resource object
		status   int
	}{
		{"its own service", s.asker, document(""), 200},
		{"an instance of it", s.asker, instance("archive"), 200},
		{"another service", s.asker, object{"type": "is", "id": ""}, 403},
		{"another account", s.asker, document("", "accountId", s.Other.AccountID), 403},
		{"no such service", s.asker, object{"type": "nothing", "id": ""}, 403},
		{"the instance it is limited to", limited, instance("archive"), 200},
		{"another instance", limited, instance("office"), 403},
		{"the whole service, though it is limited", limited, document(""), 403},
		{"as one with every other role", stranger, document(""), 403},
		{"as the one who is asked about", ada, document(""), 403},
		{"as the owner", s.Owner.IAMID, document(""), 200},
		{"as another account's owner", s.Other.IAMID, document(""), 200}, // about his own account
		{"as another account's owner about this one", s.Other.IAMID, document("", "accountId", s.Owner.AccountID), 403},
	} {
		for path, body := range s.paths(ada, c.resource) {
			r := s.postAs(c.as, path, body)
			if r.Status != c.status {
				t.Errorf("%s on %s: %d, want %d; %s", path, c.what, r.Status, c.status, r.Raw)
			}
			if c.status != 403 || c.as == s.Other.IAMID {
				continue
			}
			if strings.Contains(string(r.Raw), ada) && c.as != ada {
				t.Errorf("%s on %s says something about who was asked about: %s", path, c.what, r.Raw)
			}
			events := s.events(r.Header.Get("Transaction-Id"))
			if len(events) != 1 || events[0].Action != access.ActionDecide || events[0].Reason.Code != 403 || events[0].Initiator.ID != c.as {
				t.Errorf("%s on %s: events %+v", path, c.what, events)
			}
		}
	}
	for path, body := range s.paths(ada, document("")) {
		if r := s.Do(apitest.Request{Method: "POST", Path: path, Body: body, Anonymous: true}); r.Status != 401 {
			t.Errorf("%s without a token: %d", path, r.Status)
		}
	}
}

func TestNothingIsSaidAboutIdentitiesOfOtherAccounts(t *testing.T) {
	s := start(t)
	for _, make := range []func(string) string{s.user, s.serviceID, s.profile} {
		theirs := make(s.Other.AccountID)
		invented := theirs[:len(theirs)-4] + "0000"
		ask := func(iamID string, properties ...string) answer {
			q := question(iamID, readDoc, document(""))
			q["subject"] = subject(iamID, properties...)
			return s.evaluation(q)
		}
		for _, properties := range [][]string{nil, {"accountId", s.Other.AccountID}} {
			known, unknown := ask(theirs, properties...), ask(invented, properties...)
			if known.Decision || unknown.Decision || known.Context.Reason != unknown.Context.Reason {
				t.Errorf("%v: %q for one that exists, %q for one that does not", properties, known.Context.Reason, unknown.Context.Reason)
			}
		}
	}
}

func TestASubjectThatIsGoneIsDeniedAtOnce(t *testing.T) {
	s := start(t)
	account := s.Owner.AccountID
	profile, service, person := s.profile(account), s.serviceID(account), s.user(account)
	for _, id := range []string{profile, service, person} {
		s.reader(id)
		s.allowed(id, readDoc, document("a"))
	}
	gone := func(id string) {
		t.Helper()
		a := s.denied(id, readDoc, document("a"))
		if got := s.explained(a.transaction); got != "subject" || len(a.Context.Permitted) != 0 {
			t.Errorf("%s: explained by %s, permitted %v", id, got, a.Context.Permitted)
		}
		if names := s.search("action", object{"subject": subject(id), "resource": document("a")}).names(); names != nil {
			t.Errorf("%s may still %v", id, names)
		}
		if who := s.who(typeOf(id), readDoc, document("a")); slices.Contains(who, id) {
			t.Errorf("the search still finds %s", id)
		}
	}
	// The policies are left behind on purpose: they alone must not allow.
	s.update(func(tx *directory.Tx) {
		p, _ := s.d.Profiles.Get(crn.Identifier(profile))
		s.d.Profiles.Delete(tx, p)
		i, _ := s.d.ServiceIDs.Get(crn.Identifier(service))
		s.d.ServiceIDs.Delete(tx, i)
		u, _ := s.d.Users.Get(directory.UserKey(account, person))
		disabled := *u
		disabled.Disabled = true
		s.d.Users.Put(tx, &disabled)
	})
	gone(profile)
	gone(service)
	gone(person)
}

func TestARevokedPolicyCountsAtOnce(t *testing.T) {
	s := start(t)
	ada := s.profile(s.Owner.AccountID)
	p := s.reader(ada)
	s.allowed(ada, readDoc, document("a"))
	s.update(func(tx *directory.Tx) {
		deleted := *p
		deleted.State = access.Deleted
		s.d.Policies.Put(tx, &deleted)
	})
	s.denied(ada, readDoc, document("a"))
	if who := s.who("profile", readDoc, document("a")); who != nil {
		t.Errorf("the search finds %v", who)
	}
}

func TestInAClosedAccountNobodyMayDoAnything(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	s.update(func(tx *directory.Tx) {
		a, _ := s.d.Accounts.Get(s.Owner.AccountID)
		closed := *a
		closed.ClosedAt = s.now()
		s.d.Accounts.Put(tx, &closed)
	})
	s.denied(ada, readDoc, document("a"))
	if who := s.who("user", readDoc, document("a")); who != nil {
		t.Errorf("the search finds %v", who)
	}
}

func TestASubjectIsHeldToItsAccessToken(t *testing.T) {
	s := start(t)
	account := s.Owner.AccountID
	ada, bob, theirs := s.user(account), s.user(account), s.user(s.Other.AccountID)
	s.reader(ada)
	s.reader(bob)
	key := &identity.APIKey{ID: "ApiKey-" + uuid.NewString(), AccountID: account, IAMID: ada, Name: "k", Hash: "h"}
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Put(tx, key) })
	good, keyed := s.token(account, ada, ""), s.token(account, ada, key.ID)
	ask := func(raw string) answer {
		q := question(ada, readDoc, document("a"))
		q["subject"] = subject(ada, "access_token", raw)
		return s.evaluation(q)
	}
	for _, raw := range []string{good, keyed} {
		if a := ask(raw); !a.Decision {
			t.Fatalf("refused with a good token: %+v", a.Context)
		}
	}
	for what, raw := range map[string]string{
		"another's token": s.token(account, bob, ""), "another account's token": s.token(s.Other.AccountID, theirs, ""),
		"no token": "nonsense", "a token cut short": good[:len(good)-4],
	} {
		if a := ask(raw); a.Decision {
			t.Errorf("allowed with %s", what)
		} else if got := s.explained(a.transaction); got != "subject" {
			t.Errorf("%s: explained by %s", what, got)
		}
	}
	s.update(func(tx *directory.Tx) { s.d.APIKeys.Delete(tx, key) })
	if a := ask(keyed); a.Decision {
		t.Error("allowed with a token whose API key was deleted")
	}
	s.advance(61 * time.Minute)
	if a := ask(good); a.Decision {
		t.Error("allowed with an expired token")
	}
	s.allowed(ada, readDoc, document("a"))
}

func TestAServiceActsUnderItsCRNByAuthorization(t *testing.T) {
	s := start(t)
	source := crn.IAMIDOfCRN(crn.DefaultNames.Of("backups", "us-south", s.Other.AccountID, "daily", "", "").String())
	ask := func() answer {
		q := question(source, readDoc, document("a"))
		q["subject"] = subject(source, "accountId", s.Other.AccountID)
		return s.evaluation(q)
	}
	if a := ask(); a.Decision {
		t.Fatalf("allowed without an authorization: %+v", a.Context)
	}
	p := s.policy(access.ServiceName, "backups", func(p *access.Policy) {
		p.Type = access.TypeAuthorization
		p.Subject = append(p.Subject, equals(access.AccountID, s.Other.AccountID))
	})
	if a := ask(); !a.Decision || a.Context.PolicyID != p.ID {
		t.Errorf("%+v", a.Context)
	}
}

func TestASearchForActionsListsThemAll(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.policy(access.IAMID, ada, func(p *access.Policy) {
		p.Roles = []string{access.ServiceRoleCRN("documents", "Writer"), access.PlatformRoleCRN("Viewer")}
	})
	body := object{"subject": subject(ada), "resource": document("a")}
	all := s.search("action", body)
	names := all.names()
	if !slices.Contains(names, writeDoc) || !slices.Contains(names, readDoc) || !slices.Contains(names, "resource-controller.instance.retrieve") {
		t.Errorf("actions %v", names)
	}
	if all.Page.Next == nil || *all.Page.Next != "" || all.Page.Count != len(names) || all.Page.Total != len(names) {
		t.Errorf("page %+v", all.Page)
	}
	for _, name := range names {
		s.allowed(ada, name, document("a"))
	}
	for _, bad := range []object{
		{}, {"subject": subject(ada)}, {"resource": document("a")}, {"subject": object{"id": ada}, "resource": document("a")},
		{"subject": subject(ada), "resource": object{"type": "documents"}},
	} {
		s.post("/access/v1/search/action", bad).Want(400)
	}
}

func TestASearchComesInPages(t *testing.T) {
	s := start(t)
	var want []string
	for range 7 {
		id := s.profile(s.Owner.AccountID)
		s.reader(id)
		want = append(want, id)
	}
	slices.Sort(want)
	body := object{"subject": object{"type": "profile"}, "action": object{"name": readDoc}, "resource": document("a")}
	var got []string
	for next := ""; ; {
		body["page"] = object{"limit": 3, "token": next}
		page := s.search("subject", body)
		got = append(got, page.names()...)
		if page.Page.Total != 7 || page.Page.Count != len(page.Results) || len(page.Results) > 3 {
			t.Errorf("page %+v with %d results", page.Page, len(page.Results))
		}
		if next = *page.Page.Next; next == "" {
			break
		}
		if len(got) > 7 {
			t.Fatal("the pages do not end")
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("pages %v, want %v", got, want)
	}
	// The page after one that was told stays right when access changes between.
	body["page"] = object{"limit": 3}
	next := *s.search("subject", body).Page.Next
	s.update(func(tx *directory.Tx) {
		p, _ := s.d.Profiles.Get(crn.Identifier(want[0]))
		s.d.Profiles.Delete(tx, p)
	})
	body["page"] = object{"limit": 3, "token": next}
	if got := s.search("subject", body).names(); !slices.Equal(got, want[3:6]) {
		t.Errorf("the second page is %v, want %v", got, want[3:6])
	}
	for _, page := range []object{{"limit": -1}, {"token": "%"}, {"limit": "x"}, {"token": 7}} {
		body["page"] = page
		s.post("/access/v1/search/subject", body).Want(400)
	}
	body["page"] = object{"limit": 1_000_000}
	if got := s.search("subject", body); got.Page.Count != 6 {
		t.Errorf("page %+v", got.Page)
	}
}

func TestASearchForSubjectsWalksThroughGroups(t *testing.T) {
	s := start(t)
	account := s.Owner.AccountID
	direct, static, dynamic, late, elsewhere := s.user(account), s.user(account), s.user(account), s.user(account), s.user(s.Other.AccountID)
	service, profile := s.serviceID(account), s.profile(account)
	s.reader(direct)
	group := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: account, Name: "readers", Members: []access.Member{{IAMID: static}, {IAMID: service}, {IAMID: elsewhere}}}
	rule := &access.GroupRule{ID: "ClaimRule-" + uuid.NewString(), AccountID: account, GroupID: group.ID, Name: "r", Expiration: 1}
	s.update(func(tx *directory.Tx) {
		s.d.Groups.Put(tx, group)
		s.d.GroupRules.Put(tx, rule)
	})
	rule, _ = s.d.GroupRules.Get(rule.ID)
	member := func(id string, until time.Time) {
		s.update(func(tx *directory.Tx) {
			s.d.Memberships.Put(tx, &access.Membership{AccountID: account, IAMID: id, Groups: []access.DynamicMember{
				{GroupID: group.ID, RuleID: rule.ID, Revision: rule.Revision, Since: s.now(), Until: until},
			}})
		})
	}
	member(dynamic, s.now().Add(time.Hour))
	member(late, s.now().Add(-time.Minute))
	s.policy(access.AccessGroupID, group.ID, nil)
	wantWho := func(what, subjectType string, want ...string) {
		t.Helper()
		slices.Sort(want)
		got := s.who(subjectType, readDoc, document("a"))
		if !slices.Equal(got, want) {
			t.Errorf("%s: %s %v, want %v", what, subjectType, got, want)
		}
		for _, id := range got {
			s.allowed(id, readDoc, document("a"))
		}
	}
	wantWho("group", "user", direct, static, dynamic)
	wantWho("group", "service_id", service)
	wantWho("group", "profile")
	s.denied(late, readDoc, document("a"))
	s.denied(elsewhere, readDoc, document("a"))

	s.policy(access.AccessGroupID, access.PublicAccess, nil)
	wantWho("everybody", "user", direct, static, dynamic, late, s.Owner.IAMID)
	wantWho("everybody", "service_id", service, s.asker)
	wantWho("everybody", "profile", profile)
	s.update(func(tx *directory.Tx) {
		s.d.GroupSettings.Put(tx, &access.GroupSettings{AccountID: account, PublicAccess: false})
	})
	wantWho("without Public Access", "profile")
	wantWho("without Public Access", "user", direct, static, dynamic)
}

func TestASearchForSubjectsIgnoresTheirID(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	body := question("IBMid-SOMEBODY", readDoc, document("a"))
	if got := s.search("subject", body).names(); !slices.Contains(got, ada) {
		t.Errorf("found %v", got)
	}
	for _, bad := range []object{
		{}, {"subject": object{"type": "robot"}, "action": object{"name": readDoc}, "resource": document("a")},
		{"subject": object{"type": "user"}, "action": object{"name": ""}, "resource": document("a")},
		{"subject": object{"type": "user"}, "resource": document("a")},
		{"subject": object{"type": "user"}, "action": object{"name": readDoc}},
		{"subject": object{"type": "user"}, "action": object{"name": readDoc}, "resource": object{"id": "a"}},
	} {
		s.post("/access/v1/search/subject", bad).Want(400)
	}
}

// legacy is one question of the older interface.
func legacy(iamID, action string, attributes ...string) object {
	return object{
		"requestId": "r-" + action, "subject": object{"attributes": object{"id": iamID, "scope": "ibm openid"}},
		"action": action, "resource": object{"attributes": pairs(append(attributes, "serviceName", "documents"))}, "environment": object{},
	}
}

type legacyAnswer struct {
	Responses []struct {
		Status    string
		RequestID string
		Decision  struct {
			Permitted  bool
			Reason     string
			Obligation struct {
				Actions []string
				MaxAge  int `json:"maxCacheAgeSeconds"`
				Subject struct{ Attributes map[string]string }
			}
		} `json:"authorizationDecision"`
	}
}

func (s *stack) authz(questions ...any) legacyAnswer {
	s.T.Helper()
	return decode[legacyAnswer](s, s.post("/v2/authz", questions))
}

func TestTheOlderInterfaceAnswersAnArrayInOrder(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	body := base64.RawURLEncoding.EncodeToString([]byte(`{"iam_id":"` + ada + `","account":{"bss":"` + s.Owner.AccountID + `"}}`))
	byBody := object{
		"subject": object{"accessTokenBody": body}, "action": readDoc,
		"resource": object{"crn": crn.DefaultNames.Of("documents", "", s.Owner.AccountID, "archive", "", "").String()},
	}
	got := s.authz(legacy(ada, readDoc), legacy(ada, writeDoc), byBody)
	for i, want := range []bool{true, false, true} {
		r := got.Responses[i]
		if r.Status != "200" || r.Decision.Permitted != want || r.Decision.Obligation.MaxAge != 1 || !slices.Equal(own(r.Decision.Obligation.Actions), []string{readDoc}) ||
			r.Decision.Obligation.Subject.Attributes["id"] != ada {
			t.Errorf("answer %d: %+v", i, r)
		}
	}
	if got.Responses[1].RequestID != "r-"+writeDoc {
		t.Errorf("request id %q", got.Responses[1].RequestID)
	}
	if r := s.authz(legacy(s.user(s.Owner.AccountID), readDoc)).Responses[0]; r.Decision.Permitted || r.Decision.Obligation.Actions == nil {
		t.Errorf("%+v", r)
	}
}

func TestTheOlderInterfaceRefusesTheWholeCall(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	token := func(claims string) object {
		q := legacy(ada, readDoc)
		q["subject"] = object{"attributes": object{"id": ada, "accountId": s.Owner.AccountID}, "accessTokenBody": base64.RawURLEncoding.EncodeToString([]byte(claims))}
		return q
	}
	other := legacy(ada, readDoc)
	other["resource"] = object{"attributes": object{"serviceName": "is"}}
	malformed := legacy(ada, readDoc)
	malformed["resource"] = object{"crn": "documents"}
	unnamed := legacy(ada, readDoc)
	unnamed["resource"] = object{}
	for _, path := range []string{"/v2/authz", "/v2/authz/roles"} {
		for _, c := range []struct {
			what   string
			body   any
			status int
		}{
			{"another service", []any{legacy(ada, readDoc), other}, 403},
			{"another account", []any{legacy(ada, readDoc, "accountId", s.Other.AccountID)}, 403},
			{"an object", legacy(ada, readDoc), 400},
			{"nothing", []any{}, 400},
			{"null", "null", 400},
			{"too many", slices.Repeat([]any{legacy(ada, readDoc)}, 101), 400},
			{"no subject", []any{legacy("", readDoc)}, 400},
			{"a subject of no kind", []any{legacy("ada", readDoc)}, 400},
			{"no CRN", []any{malformed}, 400},
			{"no resource", []any{unnamed}, 400},
			{"no token body", []any{token("nonsense")}, 400},
			{"a token body without identity", []any{token("{}")}, 400},
			{"another's token body", []any{token(`{"iam_id":"IBMid-OTHER"}`)}, 400},
			{"another account's token body", []any{token(`{"iam_id":"` + ada + `","account":{"bss":"` + s.Other.AccountID + `"}}`)}, 400},
			{"null in the array", "[null]", 400},
		} {
			if r := s.post(path, c.body); r.Status != c.status {
				t.Errorf("%s with %s: %d %s", path, c.what, r.Status, r.Raw)
			}
		}
	}
	s.post("/v2/authz", []any{legacy(ada, "")}).Want(400)
}

func TestTheOlderInterfaceListsRolesWithTheirActions(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	s.reader(ada)
	type roles struct {
		Responses []struct {
			SubjectID   map[string]string
			RoleActions []struct {
				Role    struct{ CRN, DisplayName string }
				Actions []struct{ Action string }
			}
		}
	}
	got := decode[roles](s, s.post("/v2/authz/roles", []any{legacy(ada, ""), legacy(s.profile(s.Owner.AccountID), "")}))
	first := got.Responses[0]
	if first.SubjectID["userId"] != ada || len(first.RoleActions) != 1 || first.RoleActions[0].Role.DisplayName != "Reader" {
		t.Fatalf("roles %+v", first)
	}
	var actions []string
	for _, a := range first.RoleActions[0].Actions {
		actions = append(actions, a.Action)
	}
	if !slices.Equal(own(actions), []string{readDoc}) {
		t.Errorf("actions %v", actions)
	}
	if second := got.Responses[1]; second.RoleActions == nil || len(second.RoleActions) != 0 {
		t.Errorf("roles %+v", second)
	}
}

// hostile are bodies that no client means.
var hostile = []string{
	"", " ", "null", "true", "7", `"x"`, "[]", "[[]]", "[null,null]", "{}", "{", "}", `{"subject":[]}`, `{"subject":{"type":[],"id":{}}}`,
	`{"subject":{"id":"a"},"subject":{"id":"b"}}`, `{"evaluations":{}}`, `{"evaluations":[7]}`, `{"evaluations":[[]]}`, `{"page":[]}`,
	`{"subject":{"type":"user","id":"IBMid-\u0000"},"action":{"name":"\u0000"},"resource":{"type":"documents","id":"\ud800"}}`,
	strings.Repeat("[", 20000), strings.Repeat(`{"a":`, 20000), `{"options":{"evaluations_semantic":1}}`, "\xff\xfe",
	`[{"subject":{"attributes":[]}}]`, `[{"resource":{"attributes":{"a":{}}}}]`, `{"page":{"limit":1e99}}`,
}

func TestNoBodyMakesTheServerFail(t *testing.T) {
	s := start(t)
	ada := s.user(s.Owner.AccountID)
	bodies := slices.Concat(hostile, []string{`{"x":"` + strings.Repeat("x", 10<<20) + `"}`})
	for path := range s.paths(ada, document("")) {
		for _, body := range bodies {
			if r := s.post(path, body); r.Status >= 500 || r.Status < 400 && strings.Contains(string(r.Raw), "true") {
				t.Errorf("%s with %.60q: %d %.200s", path, body, r.Status, r.Raw)
			}
		}
	}
}

func FuzzNoQuestionFailsOrAllowsWithoutAPolicy(f *testing.F) {
	s := start(f)
	ada := s.user(s.Owner.AccountID)
	for _, body := range hostile {
		f.Add([]byte(body))
	}
	for _, v := range []object{
		question(ada, readDoc, document("a", "accountId", s.Owner.AccountID)),
		{"evaluations": []any{question(ada, readDoc, document("a"))}, "options": object{"evaluations_semantic": "permit_on_first_permit"}},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		s.T = t
		for _, path := range []string{"/access/v1/evaluation", "/access/v1/evaluations", "/access/v1/search/action", "/v2/authz"} {
			// The asker itself can do nothing but ask.
			r := s.post(path, string(body))
			if r.Status >= 500 || r.Status != 200 && r.Status < 400 {
				t.Errorf("%s: %d %s", path, r.Status, r.Raw)
			}
			if strings.Contains(string(r.Raw), `"decision":true`) && !strings.Contains(string(body), access.ActionDecide) {
				t.Errorf("%s: %s", path, r.Raw)
			}
		}
	})
}
