package authzen_test

import (
	"encoding/json"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/authzen"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
)

const (
	readDoc  = "documents.document.read"
	writeDoc = "documents.document.write"
)

// stack is an installation whose account has registered the service documents,
// with a service ID that asks for it.
type stack struct {
	*apitest.Env
	d      *directory.Directory
	offset atomic.Int64 // of the clock
	tokens *token.Issuer
	grants *grant.Service

	asker string // Decision Point on documents, and nothing else
}

// both takes the test's own bearers and real access tokens.
type both struct {
	test   api.Authenticator
	grants *grant.Service
}

func (b both) Caller(raw string) (*token.Claims, error) {
	if strings.Contains(raw, "/") {
		return b.test.Caller(raw)
	}
	return b.grants.Caller(raw)
}

func start(t testing.TB) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t)}
	s.d = s.Config.Directory
	s.Config.Now = s.now
	keys, err := token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: s.now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.tokens = &token.Issuer{Keys: keys, URL: s.Config.URL + "/identity", Now: s.now}
	s.grants = grant.New(grant.Config{
		Directory: s.d,
		Workloads: &attest.Workloads{Clusters: s.d, Keys: &attest.Keys{Now: s.now}, Now: s.now},
		Instances: &attest.Instances{Hosts: s.d, Region: "us-south", Now: s.now},
		Tokens:    s.tokens, Sealer: s.Sealer, Journal: s.Config.Journal, Names: crn.DefaultNames, Now: s.now, OperatorAccount: s.Owner.AccountID,
	})
	s.Config.Auth = both{s.Config.Auth, s.grants}
	s.register(s.Owner.AccountID)
	authzen.Register(s.Mux, s.Config, s.grants)
	activityapi.Register(s.Mux, s.Config, s.Store, s.Signer)
	s.asker = s.serviceID(s.Owner.AccountID)
	s.Grant(s.asker, "documents", access.DecisionPoint)
	return s
}

func (s *stack) now() time.Time          { return time.Now().Add(time.Duration(s.offset.Load())) }
func (s *stack) advance(d time.Duration) { s.offset.Add(int64(d)) }

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(s.T.Context(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

// register registers the service documents in an account.
func (s *stack) register(account string) {
	s.T.Helper()
	service := &access.RegisteredService{AccountID: account, Definition: access.Definition{
		Name: "documents", Kind: access.KindService,
		Actions: []access.ActionDefinition{{ID: readDoc}, {ID: writeDoc}},
		ServiceRoles: map[string]access.RoleDefinition{
			"Reader": {Actions: []string{readDoc}}, "Writer": {Extends: []string{"Reader"}, Actions: []string{writeDoc}},
		},
	}}
	if err := service.Validate(s.d.Builtin()); err != nil {
		s.T.Fatal(err)
	}
	s.update(func(tx *directory.Tx) { s.d.Services.Put(tx, service) })
}

func (s *stack) serviceID(account string) string {
	s.T.Helper()
	id := &identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: account, Name: "a service"}
	s.update(func(tx *directory.Tx) { s.d.ServiceIDs.Put(tx, id) })
	return crn.IAMID(id.ID)
}

func (s *stack) user(account string) string {
	s.T.Helper()
	u := &identity.User{IAMID: "IBMid-" + strings.ToUpper(uuid.NewString()[:8]), AccountID: account, Name: "Ada", Email: "ada@example.com"}
	s.update(func(tx *directory.Tx) { s.d.Users.Put(tx, u) })
	return u.IAMID
}

func (s *stack) profile(account string) string {
	s.T.Helper()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: uuid.NewString()}
	s.update(func(tx *directory.Tx) { s.d.Profiles.Put(tx, p) })
	return crn.IAMID(p.ID)
}

// policy grants Reader on documents to a subject, narrowed as wanted.
func (s *stack) policy(key, subject string, change func(p *access.Policy), demands ...access.Attribute) *access.Policy {
	s.T.Helper()
	p := &access.Policy{
		ID: uuid.NewString(), AccountID: s.Owner.AccountID, API: 2, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{equals(key, subject)},
		Resource: append([]access.Attribute{equals(access.ServiceName, "documents"), equals(access.AccountID, s.Owner.AccountID)}, demands...),
		Roles:    []string{access.ServiceRoleCRN("documents", "Reader")},
	}
	if change != nil {
		change(p)
	}
	s.update(func(tx *directory.Tx) { s.d.Policies.Put(tx, p) })
	return p
}

func (s *stack) reader(iamID string, demands ...access.Attribute) *access.Policy {
	s.T.Helper()
	return s.policy(access.IAMID, iamID, nil, demands...)
}

func equals(key, value string) access.Attribute {
	return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
}

// token returns a real access token.
func (s *stack) token(account, iamID, keyID string) string {
	s.T.Helper()
	raw, _, err := s.tokens.Issue(token.Claims{IAMID: iamID, Account: token.Account{BSS: account}, KeyID: keyID}, token.AccessLife)
	if err != nil {
		s.T.Fatal(err)
	}
	return raw
}

type object = map[string]any

// typeOf is the AuthZEN type of an IAM ID.
func typeOf(iamID string) string {
	return map[crn.Kind]string{
		crn.KindUser: "user", crn.KindServiceID: "service_id", crn.KindProfile: "profile", crn.KindCRN: "crn",
	}[crn.KindOf(iamID)]
}

func subject(iamID string, properties ...string) object {
	m := object{"type": typeOf(iamID), "id": iamID}
	if len(properties) > 0 {
		m["properties"] = pairs(properties)
	}
	return m
}

// document is a resource of the service documents.
func document(id string, properties ...string) object {
	return object{"type": "documents/document", "id": id, "properties": pairs(properties)}
}

func pairs(of []string) object {
	m := object{}
	for i := 0; i+1 < len(of); i += 2 {
		m[of[i]] = of[i+1]
	}
	return m
}

func question(iamID, action string, resource object) object {
	return object{"subject": subject(iamID), "action": object{"name": action}, "resource": resource}
}

// post asks as the service documents.
func (s *stack) post(path string, body any) *apitest.Response {
	s.T.Helper()
	return s.postAs(s.asker, path, body)
}

func (s *stack) postAs(as, path string, body any) *apitest.Response {
	s.T.Helper()
	return s.Do(apitest.Request{Method: "POST", Path: path, Body: body, As: as, Header: map[string]string{"Transaction-Id": uuid.NewString()}})
}

// answer is what the decision endpoints say.
type answer struct {
	Decision bool
	Context  struct {
		Reason        string
		PolicyID      string   `json:"policy_id"`
		Permitted     []string `json:"permitted_actions"`
		MaxAge        *int     `json:"max_cache_age_seconds"`
		TransactionID string   `json:"transaction_id"`
		Error         *struct {
			Status  int
			Message string
		}
	}
	transaction string
}

func decode[T any](s *stack, r *apitest.Response) T {
	s.T.Helper()
	r.Want(200)
	var v T
	if err := json.Unmarshal(r.Raw, &v); err != nil {
		s.T.Fatal(err)
	}
	return v
}

// evaluate asks one question about an identity.
func (s *stack) evaluate(iamID, action string, resource object) answer {
	s.T.Helper()
	return s.evaluation(question(iamID, action, resource))
}

func (s *stack) evaluation(q object) answer {
	s.T.Helper()
	r := s.post("/access/v1/evaluation", q)
	a := decode[answer](s, r)
	a.transaction = r.Header.Get("Transaction-Id")
	return a
}

func (s *stack) allowed(iamID, action string, resource object) answer {
	s.T.Helper()
	a := s.evaluate(iamID, action, resource)
	if !a.Decision {
		s.T.Fatalf("%s may not %s on %v: %+v", iamID, action, resource, a.Context)
	}
	return a
}

func (s *stack) denied(iamID, action string, resource object) answer {
	s.T.Helper()
	a := s.evaluate(iamID, action, resource)
	if a.Decision {
		s.T.Fatalf("%s may %s on %v: %+v", iamID, action, resource, a.Context)
	}
	return a
}

// batch asks several questions.
func (s *stack) batch(body object) []answer {
	s.T.Helper()
	return decode[struct{ Evaluations []answer }](s, s.post("/access/v1/evaluations", body)).Evaluations
}

// found is a page of a search.
type found struct {
	Results []struct{ Type, ID, Name string }
	Page    struct {
		Next  *string `json:"next_token"`
		Count int
		Total int
	}
}

func (f found) names() []string {
	var out []string
	for _, r := range f.Results {
		out = append(out, r.ID+r.Name)
	}
	return out
}

func (s *stack) search(what string, body object) found {
	s.T.Helper()
	return decode[found](s, s.post("/access/v1/search/"+what, body))
}

// who lists the subjects of a type that may do an action.
func (s *stack) who(subjectType, action string, resource object) []string {
	s.T.Helper()
	return s.search("subject", object{"subject": object{"type": subjectType}, "action": object{"name": action}, "resource": resource}).names()
}

// events returns the events of a transaction.
func (s *stack) events(transaction string) []activity.Event {
	s.T.Helper()
	stored, err := s.Store.Events(s.T.Context(), store.Query{AccountID: s.Owner.AccountID, CorrelationID: transaction, Limit: 1000})
	if err != nil {
		s.T.Fatal(err)
	}
	out := make([]activity.Event, len(stored))
	for i, row := range stored {
		if err := json.Unmarshal(row.Doc, &out[i]); err != nil {
			s.T.Fatal(err)
		}
	}
	return out
}

// explained returns the first failed check of a transaction, as an
// administrator is told it.
func (s *stack) explained(transaction string) string {
	s.T.Helper()
	answer := decode[struct {
		Events []struct{ Trace activity.Trace }
	}](s, s.Do(apitest.Request{Path: "/v1/events/" + transaction + "/explanation"}))
	if len(answer.Events) != 1 {
		s.T.Fatalf("%d events of the transaction, want 1", len(answer.Events))
	}
	failed, ok := answer.Events[0].Trace.Failed()
	if !ok {
		s.T.Fatalf("the trace has no failed check: %+v", answer.Events[0].Trace)
	}
	return failed.Name
}
