package simulate_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/simulate"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

const (
	podIssuer = "https://cluster.test"
	stranger  = "IBMid-STRANGER"
	secret    = "secret-in-nobodys-log"
)

// stack is an installation that answers questions and grants tokens.
type stack struct {
	*apitest.Env
	d      *directory.Directory
	grants *grant.Service
	key    *ecdsa.PrivateKey // of the cluster
}

func start(t testing.TB) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t), key: jwttest.Key(t, elliptic.P256())}
	s.d = s.Config.Directory
	ring, err := token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.grants = grant.New(grant.Config{
		Directory: s.d, Workloads: &attest.Workloads{Clusters: s.d, Issuers: s.d, Keys: &attest.Keys{Now: time.Now}, Now: time.Now},
		Instances: &attest.Instances{Hosts: s.d, Region: "us-south", Now: time.Now},
		Tokens:    &token.Issuer{Keys: ring, URL: "http://tabard.test/identity", Now: time.Now}, Sealer: s.Sealer,
		Journal: s.Config.Journal, Names: crn.DefaultNames, Now: time.Now, OperatorAccount: s.Owner.AccountID, Usage: s.Usage,
	})
	simulate.Register(s.Mux, s.Config, s.grants)
	return s
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(s.T.Context(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

func (s *stack) cluster(account, name string) *cluster.Cluster {
	s.T.Helper()
	id := "c" + strings.ReplaceAll(uuid.NewString(), "-", "")[:19]
	c := &cluster.Cluster{
		ID: id, CRN: "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":" + id + "::", AccountID: account,
		Name: name, Type: identity.IKSSA, Location: "us-south", Issuer: podIssuer, Audience: "iam",
		JWKS: jwttest.Set(s.T, jwttest.JWK(s.key.Public(), "k1", "ES256")),
	}
	s.update(func(tx *directory.Tx) { s.d.Clusters.Put(tx, c) })
	return c
}

func (s *stack) profile(account, name string) *identity.Profile {
	s.T.Helper()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: name}
	s.update(func(tx *directory.Tx) { s.d.Profiles.Put(tx, p) })
	return p
}

func (s *stack) link(p *identity.Profile, c *cluster.Cluster, namespace, name string) *identity.Link {
	s.T.Helper()
	l := &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: c.Type, CRN: c.CRN, Namespace: namespace, ServiceAccount: name,
		CrossAccount: p.AccountID != c.AccountID,
	}
	s.update(func(tx *directory.Tx) { s.d.Links.Put(tx, l) })
	return l
}

// podToken is a service-account token of the cluster.
func (s *stack) podToken(namespace, name string) string {
	now := time.Now().Unix()
	return jwttest.ES256(s.T, s.key, "k1", fmt.Sprintf(`{"iss":%q,"sub":"system:serviceaccount:%s:%s","aud":["iam"],"iat":%d,"exp":%d,
		"jti":%q,"kubernetes.io":{"namespace":%q,"serviceaccount":{"name":%q,"uid":"u1"},"pod":{"name":"pod-1","uid":"u2"}}}`,
		podIssuer, namespace, name, now, now+3600, secret, namespace, name), "")
}

// answer is what a question came to.
type answer struct {
	Allowed  bool
	Evidence *struct {
		Source, Type, Name string
		Claims             map[string]any
	}
	Profile   *struct{ ID, Name string }
	Claims    map[string]any
	ExpiresIn int64 `json:"expires_in"`
	Refusal   *struct {
		Status                int
		Code, Message, Detail string
	}
	Subject  string
	At       string
	Resource map[string]string
	Policy   *struct {
		ID, Subject string
		Roles       []string
	}
	Trace activity.Trace
}

func (s *stack) ask(what string, body any, as ...string) answer {
	s.T.Helper()
	r := apitest.Request{Method: "POST", Path: "/v1/simulate/" + what, Body: body}
	if len(as) > 0 {
		r.As = as[0]
	}
	got := s.Do(r)
	got.Want(200)
	var a answer
	if err := json.Unmarshal(got.Raw, &a); err != nil {
		s.T.Fatal(err)
	}
	return a
}

func pod(c *cluster.Cluster, namespace, name string) map[string]any {
	return map[string]any{"type": "kubernetes", "cluster": c.Name, "namespace": namespace, "service_account": name}
}

// signedIn counts what a token leaves behind.
func (s *stack) loginEvents() int {
	s.T.Helper()
	n := 0
	for _, account := range []string{s.Owner.AccountID, s.Other.AccountID} {
		events, err := s.Store.Events(s.T.Context(), store.Query{AccountID: account, Limit: 1000})
		if err != nil {
			s.T.Fatal(err)
		}
		for _, e := range events {
			if strings.Contains(string(e.Doc), ".login") {
				n++
			}
			if strings.Contains(string(e.Doc), secret) {
				s.T.Errorf("an event has the token's words: %s", e.Doc)
			}
		}
	}
	return n
}

// The same question with and without the deed comes to the same.
func TestASimulatedTokenIsWhatTheGrantGives(t *testing.T) {
	s := start(t)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	s.link(p, c, "shop", "cart")
	for _, name := range []string{"cart", "till"} {
		before := s.loginEvents()
		simulated := s.ask("token", map[string]any{"profile_name": "reports", "cr_token": s.podToken("shop", name), "address": "192.0.2.1"})
		described := s.ask("token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "shop", name)})
		if s.loginEvents() != before {
			t.Error("a question left the event of a login")
		}
		if n, _ := s.Usage.Of(p.ID); name == "cart" && n != 0 {
			t.Error("a question counts as a login")
		}
		real, err := s.grants.CRToken(t.Context(), grant.Origin{TransactionID: "t-" + name, Address: "192.0.2.1", ClientID: grant.DefaultClient},
			grant.CRTokenRequest{Token: s.podToken("shop", name), Profile: grant.Selector{Name: "reports"}})
		events, readErr := s.Store.Events(t.Context(), store.Query{AccountID: s.Owner.AccountID, CorrelationID: "t-" + name, Limit: 1})
		if readErr != nil || len(events) != 1 {
			t.Fatalf("%d events, %v", len(events), readErr)
		}
		var e activity.Event
		if err := json.Unmarshal(events[0].Doc, &e); err != nil {
			t.Fatal(err)
		}
		if simulated.Allowed != (err == nil) || described.Allowed != (err == nil) || simulated.Allowed != (name == "cart") {
			t.Fatalf("%s: simulated %t, described %t, really %v", name, simulated.Allowed, described.Allowed, err)
		}
		same(t, outline(simulated.Trace), outline(e.Trace))
		if name == "till" {
			failed, _ := e.Trace.Failed()
			for _, a := range []answer{simulated, described} {
				f, _ := a.Trace.Failed()
				same(t, f.Change.Command, failed.Change.Command)
				same(t, a.Refusal.Code, grant.CodeNotEligible)
				same(t, a.Refusal.Status, 400)
			}
			continue
		}
		for _, claim := range []string{"iam_id", "iss", "scope", "sub"} {
			same(t, simulated.Claims[claim], map[string]any{"iam_id": real.Claims.IAMID, "iss": real.Claims.Issuer, "scope": real.Claims.Scope, "sub": real.Claims.Subject}[claim])
		}
		if _, has := simulated.Claims["jti"]; has || simulated.ExpiresIn != 3600 {
			t.Errorf("claims %v for %d s", simulated.Claims, simulated.ExpiresIn)
		}
		same(t, simulated.Evidence.Source, "token")
		same(t, described.Evidence.Source, "described")
		same(t, described.Trace[0].Name, grant.CheckDescribed)
		same(t, described.Trace[len(described.Trace)-1].Outcome, activity.Skip) // nobody said from where it comes
	}
}

func outline(t activity.Trace) string {
	var out []string
	for _, c := range t {
		out = append(out, c.Name+" "+string(c.Outcome))
	}
	return strings.Join(out, "\n")
}

func same[T comparable](t *testing.T, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestTheAddressThatIsGivenIsHeldToTheAccountsSettings(t *testing.T) {
	s := start(t)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	s.link(p, c, "shop", "cart")
	settings := *identity.DefaultSettings(s.Owner.AccountID)
	settings.AllowedAddresses = "192.0.2.0/24" // the tests' own
	s.update(func(tx *directory.Tx) { s.d.Settings.Put(tx, &settings) })
	for address, want := range map[string]bool{"": true, "192.0.2.7": true, "198.51.100.1": false} {
		a := s.ask("token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "shop", "cart"), "address": address})
		same(t, a.Allowed, want)
		if failed, _ := a.Trace.Failed(); !want && (failed.Change == nil || failed.Change.Edits[0].To != "192.0.2.0/24,198.51.100.1") {
			t.Errorf("change %+v", failed.Change)
		}
	}
}

func TestInstancesAndJobsAreDescribedByWhatTheirRecordsSay(t *testing.T) {
	s := start(t)
	account := s.Owner.AccountID
	inst := &vpc.Instance{ID: "0717_1", Name: "web", AccountID: account, Zone: "us-south-1", CRN: "crn:v1:bluemix:public:is:us-south-1:a/" + account + "::instance:0717_1"}
	issuer := &cluster.Issuer{
		ID: uuid.NewString(), Name: "ci", AccountID: account, Issuer: "https://ci.test", Audience: "tabard",
		Mapping: cluster.Mapping{Claims: map[string]string{"repository": "repository"}},
	}
	issuer.CRN = "crn:v1:bluemix:public:iam-identity::a/" + account + "::workload-issuer:" + issuer.ID
	p := s.profile(account, "reports")
	rule := func(kind identity.CRType, claim, value string) *identity.ClaimRule {
		return &identity.ClaimRule{
			ID: "ClaimRule-" + uuid.NewString(), ProfileID: p.ID, AccountID: account, Type: identity.RuleCR, CRType: kind,
			Conditions: []identity.Condition{{Claim: claim, Operator: identity.Equals, Value: value}},
		}
	}
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, inst)
		s.d.WorkloadIssuers.Put(tx, issuer)
		s.d.Rules.Put(tx, rule(identity.VSI, "zone", `"us-south-1"`))
		s.d.Rules.Put(tx, rule(identity.OIDC, "repository", `"mine/app"`))
	})
	for _, tt := range []struct {
		evidence map[string]any
		want     bool
	}{
		{map[string]any{"type": "instance", "instance": "web"}, true},
		{map[string]any{"type": "oidc", "issuer": "https://ci.test", "claims": map[string]any{"sub": "x", "repository": "mine/app"}}, true},
		{map[string]any{"type": "oidc", "issuer": "ci", "claims": map[string]any{"sub": "x", "repository": "theirs/app"}}, false},
		// What the registration says, nobody can describe otherwise.
		{map[string]any{"type": "oidc", "issuer": "ci", "claims": map[string]any{"sub": "x", "issuer": "https://other.test"}}, false},
	} {
		a := s.ask("token", map[string]any{"profile_id": p.ID, "evidence": tt.evidence})
		same(t, a.Allowed, tt.want)
		if a.Evidence.Type == "OIDC" {
			same(t, a.Evidence.Claims["issuer"], any("https://ci.test"))
		}
	}
	s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/token", Body: map[string]any{
		"profile_id": p.ID, "evidence": map[string]any{"type": "oidc", "issuer": "ci"},
	}}).Want(400) // no sub
}

// A token of somebody else's cluster is an unknown one, whether its issuer is
// registered elsewhere or nowhere: the question tells nothing of other accounts.
func TestASimulationIsNoOracleAboutOtherAccounts(t *testing.T) {
	s := start(t)
	mine, theirs := s.profile(s.Owner.AccountID, "reports"), s.profile(s.Other.AccountID, "reports")
	ask := func() string {
		t.Helper()
		r := s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/token", Body: map[string]any{"profile_name": "reports", "cr_token": s.podToken("shop", "cart")}})
		r.Want(200)
		var a answer
		if err := json.Unmarshal(r.Raw, &a); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal([]any{a.Allowed, a.Refusal, a.Trace})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	steady := func(text string) string { return strings.ReplaceAll(text, " ", "") }
	nowhere := ask()
	c := s.cluster(s.Other.AccountID, "prod")
	s.link(theirs, c, "shop", "cart")
	s.link(mine, c, "shop", "cart") // even one that lets the cluster in
	same(t, steady(ask()), steady(nowhere))
	if !strings.Contains(nowhere, attest.CheckIssuer) || strings.Contains(nowhere, s.Other.AccountID) {
		t.Errorf("answer %s", nowhere)
	}

	// Their profile that trusts one of my clusters is not found either, matching
	// or not.
	own := s.cluster(s.Owner.AccountID, "mine")
	s.link(theirs, own, "shop", "cart")
	for _, name := range []string{"cart", "till"} {
		for _, body := range []map[string]any{
			{"profile_id": theirs.ID, "evidence": pod(own, "shop", name)}, {"profile_id": theirs.ID, "cr_token": s.podToken("shop", name)},
			{"profile_id": "Profile-" + uuid.NewString(), "evidence": pod(own, "shop", name)},
		} {
			s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/token", Body: body}).Want(404)
		}
	}
	s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/token", Body: map[string]any{"profile_id": mine.ID, "evidence": map[string]any{
		"type": "kubernetes", "cluster": c.CRN, "namespace": "shop", "service_account": "cart",
	}}}).Want(404)

	for _, body := range []map[string]any{
		{"iam_id": stranger, "action": "kms.secrets.list", "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms", "accountId": s.Other.AccountID}}},
		{"iam_id": stranger, "action": "kms.secrets.list", "resource": map[string]any{"crn": "crn:v1:bluemix:public:kms:us-south:a/" + s.Other.AccountID + ":x::"}},
	} {
		s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/access", Body: body}).Want(403)
	}
	// Somebody who exists elsewhere is like somebody who does not exist.
	there := s.ask("access", map[string]any{"iam_id": s.Other.IAMID, "action": "kms.secrets.list", "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms"}}})
	none := s.ask("access", map[string]any{"iam_id": stranger, "action": "kms.secrets.list", "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms"}}})
	same(t, strings.ReplaceAll(fmt.Sprint(there.Trace[0].Found), s.Other.IAMID, stranger), none.Trace[0].Found)
	same(t, outline(there.Trace), outline(none.Trace))
}

// Whoever may ask about a profile sees of a cluster only what he may see.
func TestAQuestionNeedsTheRightsToReadWhatItIsAbout(t *testing.T) {
	s := start(t)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	s.link(p, c, "shop", "cart")
	described := map[string]any{"profile_id": p.ID, "evidence": pod(c, "shop", "cart")}
	presented := map[string]any{"profile_id": p.ID, "cr_token": s.podToken("shop", "cart")}
	decision := map[string]any{"profile_id": p.ID, "action": "kms.secrets.list", "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms"}}}
	try := func(what string, body any, status int) {
		t.Helper()
		s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/" + what, Body: body, As: stranger}).Want(status)
	}
	for _, b := range []any{described, presented} {
		try("token", b, 403)
	}
	try("token", map[string]any{"profile_name": "nobody's", "evidence": pod(c, "shop", "cart")}, 403)
	try("access", decision, 403)
	s.Grant(stranger, "iam-identity", "Viewer")
	for _, b := range []any{described, presented} {
		try("token", b, 403) // nothing says that he may see the cluster
	}
	s.Grant(stranger, "containers-kubernetes", "Viewer")
	for _, b := range []any{described, presented} {
		try("token", b, 200)
	}
	s.Grant(stranger, "iam-access-management", "Viewer")
	try("access", decision, 403) // he may not read policies on kms
	s.Grant(stranger, "kms", "Viewer")
	try("access", decision, 200)
}

func TestADecisionIsMadeForTheTimeAndGroupsThatAreGiven(t *testing.T) {
	s := start(t)
	p := s.profile(s.Owner.AccountID, "reports")
	group := &access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "readers"}
	text := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	mondays := &access.Policy{
		ID: "policy-monday", AccountID: s.Owner.AccountID, API: 2, Type: access.TypeAccess, State: access.Active,
		Subject:  []access.Attribute{text(access.AccessGroupID, group.ID)},
		Resource: []access.Attribute{text(access.AccountID, s.Owner.AccountID), text(access.ServiceName, "kms")},
		Roles:    []string{access.ServiceRoleCRN("kms", "Reader")}, Pattern: access.PatternAllDay,
		Rule: &access.Rule{Key: access.KeyDayOfWeek, Operator: "dayOfWeekEquals", Value: json.RawMessage(`"1+00:00"`)},
	}
	s.update(func(tx *directory.Tx) {
		s.d.Groups.Put(tx, group)
		s.d.Policies.Put(tx, mondays)
	})
	ask := func(at string, groups ...string) answer {
		t.Helper()
		return s.ask("access", map[string]any{
			"profile_name": "reports", "action": "kms.secrets.list", "time": at, "groups": groups,
			"resource": map[string]any{"crn": "crn:v1:bluemix:public:kms:us-south:a/" + s.Owner.AccountID + ":x::"},
		})
	}
	a := ask("2026-06-15T09:00:00Z", group.ID) // a Monday
	if !a.Allowed || a.Policy == nil || a.Policy.ID != "policy-monday" || a.Policy.Subject != group.ID || a.Subject != crn.IAMID(p.ID) || a.At != "2026-06-15T09:00:00Z" {
		t.Errorf("on Monday: %+v", a)
	}
	a = ask("2026-06-16T09:00:00Z", group.ID)
	failed, _ := a.Trace.Failed()
	if a.Allowed || failed.Name != "policy-rule" || failed.Nearest.ID != "policy-monday" || failed.Change == nil {
		t.Errorf("on Tuesday: %t, %+v", a.Allowed, failed)
	}
	if a = ask("2026-06-15T09:00:00Z"); a.Allowed {
		t.Error("allowed without the group")
	}
	s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/access", Body: map[string]any{
		"profile_name": "reports", "action": "kms.secrets.list", "groups": []string{"AccessGroupId-none"}, "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms"}},
	}}).Want(404)
	// A question uses nothing.
	if n, _ := s.Usage.Of("policy-monday"); n != 0 {
		t.Errorf("the policy counts as used %d times", n)
	}
}

// What an explanation names as the change does what it says, by way of the API
// that asks.
func TestTheChangeOfARefusalIsEnough(t *testing.T) {
	s := start(t)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	s.link(p, c, "shop", "till")
	question := map[string]any{"profile_id": p.ID, "evidence": pod(c, "shop", "cart")}
	failed, _ := s.ask("token", question).Trace.Failed()
	if failed.Nearest == nil || failed.Nearest.Differs[0].Attribute != "link.name" || failed.Change == nil {
		t.Fatalf("failed %+v", failed)
	}
	to := map[string]string{}
	for _, e := range failed.Change.Edits {
		to[e.Attribute] = e.To
	}
	s.update(func(tx *directory.Tx) {
		s.d.Links.Put(tx, &identity.Link{
			ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID, CRType: identity.CRType(to["cr_type"]), CRN: to["link.crn"],
			Namespace: to["link.namespace"], ServiceAccount: to["link.name"],
		})
	})
	same(t, s.ask("token", question).Allowed, true)
}

func TestQuestionsThatAreNoneAreRefused(t *testing.T) {
	s := start(t)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	long := strings.Repeat("x", 20<<10)
	kms := map[string]any{"attributes": map[string]any{"serviceName": "kms"}}
	many := map[string]any{}
	for i := range 101 {
		many[fmt.Sprint("c", i)] = "x"
	}
	for _, tt := range []struct {
		what   string
		body   any
		status int
	}{
		{"token", map[string]any{}, 400},
		{"token", map[string]any{"profile_id": p.ID}, 400},
		{"token", map[string]any{"profile_id": p.ID, "cr_token": "x", "evidence": pod(c, "a", "b")}, 400},
		{"token", map[string]any{"profile_id": p.ID, "cr_token": long}, 400},
		{"token", map[string]any{"profile_id": long, "cr_token": "x"}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": map[string]any{"type": "magic"}}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "", "b")}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "a:b", "c")}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "a\nb", "c")}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(c, long, "c")}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(&cluster.Cluster{Name: ""}, "a", "c")}, 404},
		{"token", map[string]any{"profile_id": p.ID, "evidence": pod(c, "a", "c"), "address": "nowhere"}, 400},
		{"token", map[string]any{"profile_id": p.ID, "evidence": map[string]any{"type": "oidc", "issuer": "x", "claims": many}}, 400},
		{"access", map[string]any{}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "profile_id": p.ID, "action": "a", "resource": kms}, 400},
		{"access", map[string]any{"iam_id": "root", "action": "a", "resource": kms}, 400},
		{"access", map[string]any{"iam_id": "iam-Profile-*", "action": "", "resource": kms}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a"}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": long, "resource": kms}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a", "resource": kms, "time": "soon"}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a", "resource": kms, "time": "9999-01-01T00:00:00Z"}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a", "resource": map[string]any{"crn": "kms"}}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a", "resource": map[string]any{"attributes": map[string]any{"serviceName": "kms", "serviceType": "service"}}}, 400},
		{"access", map[string]any{"iam_id": s.Owner.IAMID, "action": "a", "resource": map[string]any{
			"crn": "crn:v1:bluemix:public:kms:us-south:a/" + s.Owner.AccountID + ":x::", "attributes": map[string]any{"serviceName": "is"},
		}}, 400},
		{"access", map[string]any{"profile_name": "none", "action": "a", "resource": kms}, 404},
	} {
		r := s.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/" + tt.what, Body: tt.body})
		if r.Status != tt.status {
			t.Errorf("%s %.200v: %d %.300s", tt.what, tt.body, r.Status, r.Raw)
		}
	}
}

// Whatever a body holds, the answer is one of this family's and nothing breaks.
func FuzzQuestion(f *testing.F) {
	for _, body := range []string{
		`{"profile_name":"reports","cr_token":"x.y.z"}`,
		`{"profile_name":"reports","evidence":{"type":"kubernetes","cluster":"prod","namespace":"a","service_account":"b"}}`,
		`{"profile_name":"reports","evidence":{"type":"oidc","issuer":"ci","claims":{"sub":[1,{"a":null}]}}}`,
		`{"iam_id":"IBMid-1","action":"a","resource":{"attributes":{"serviceName":"kms"},"tags":["a:b"]},"time":"2026-06-15T09:00:00Z"}`,
		`[]`, `{"evidence":null}`, `{"resource":{"crn":"crn:v1:::::::::"}}`,
	} {
		f.Add("token", body)
		f.Add("access", body)
	}
	s := start(f)
	c, p := s.cluster(s.Owner.AccountID, "prod"), s.profile(s.Owner.AccountID, "reports")
	s.link(p, c, "shop", "cart")
	f.Fuzz(func(t *testing.T, what, body string) {
		if what != "access" {
			what = "token"
		}
		e := *s.Env
		e.T = t
		r := e.Do(apitest.Request{Method: "POST", Path: "/v1/simulate/" + what, Body: body})
		if r.Status >= 500 && r.Status != 503 {
			t.Errorf("%s %q: %d %s", what, body, r.Status, r.Raw)
		}
		if r.Status == 200 && strings.Contains(string(r.Raw), `"allowed":true`) && what == "token" && !strings.Contains(body, "shop") {
			t.Errorf("%q is let in: %s", body, r.Raw)
		}
	})
}
