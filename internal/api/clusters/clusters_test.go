package clusters_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/clusters"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
)

const nobody = "IBMid-NOBODY"

func start(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	w := &attest.Workloads{
		Clusters: e.Config.Directory, Keys: &attest.Keys{Now: time.Now, Opener: e.Sealer},
		Reviewer: &attest.Reviewer{Opener: e.Sealer, Now: time.Now}, Now: time.Now,
	}
	t.Cleanup(w.Reviewer.Close)
	clusters.Register(e.Mux, e.Config, clusters.Options{Keys: w.Keys, Tokens: w, Reviewer: w.Reviewer, Sealer: e.Sealer})
	return e
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// keySet returns a set of public keys.
func keySet(t *testing.T, n int) json.RawMessage {
	t.Helper()
	var set jose.JSONWebKeySet
	for i := range n {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: newKey(t).Public(), KeyID: fmt.Sprint("key", i, "-", rand.Text()), Algorithm: "ES256", Use: "sig"})
	}
	return marshal(t, set)
}

func marshal(t *testing.T, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// issuer is an OIDC issuer over TLS that counts its requests.
type issuer struct {
	*httptest.Server
	ca   string
	hits atomic.Int32
	hold chan struct{} // when not nil, answers wait for it
	says string        // the issuer in its discovery document, when not its URL
}

func newIssuer(t *testing.T, keys json.RawMessage) *issuer {
	t.Helper()
	i := &issuer{}
	i.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.hits.Add(1)
		if i.hold != nil {
			<-i.hold
		}
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			says := i.URL
			if i.says != "" {
				says = i.says
			}
			_, _ = fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, says, i.URL+"/keys")
		case "/keys":
			_, _ = w.Write(keys)
		default:
			http.NotFound(w, r)
		}
	}))
	i.Config.ErrorLog = log.New(io.Discard, "", 0) // a refused certificate is expected
	i.StartTLS()
	i.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
	t.Cleanup(i.Close)
	return i
}

func post(body any) apitest.Request {
	return apitest.Request{Method: "POST", Path: "/v1/clusters", Body: body}
}

// uploaded is a registration with uploaded keys.
func uploaded(t *testing.T, name string) map[string]any {
	return map[string]any{"name": name, "issuer": "https://kubernetes.default.svc/" + name, "jwks": keySet(t, 2)}
}

func wantError(t *testing.T, r *apitest.Response, status int, code string) string {
	t.Helper()
	m := r.Want(status)
	entries, _ := m["errors"].([]any)
	if len(entries) != 1 || int(m["status_code"].(float64)) != status || m["trace"] != r.Header.Get(api.TransactionHeader) {
		t.Fatalf("error has the wrong shape: %s", r.Raw)
	}
	entry := entries[0].(map[string]any)
	if entry["code"] != code {
		t.Fatalf("error %s, want code %s", r.Raw, code)
	}
	return entry["message"].(string)
}

func listed(e *apitest.Env, as string) []string {
	e.T.Helper()
	out := []string{}
	for _, k := range e.Do(apitest.Request{Path: "/v1/clusters", As: as}).Want(200)["clusters"].([]any) {
		out = append(out, k.(map[string]any)["name"].(string))
	}
	return out
}

func TestAClusterIsRegisteredShownAndDeleted(t *testing.T) {
	e := start(t)
	m := e.Do(post(uploaded(t, "prod"))).Want(201)
	id := m["id"].(string)
	if !regexp.MustCompile(`^c[a-z0-9]{19}$`).MatchString(id) {
		t.Errorf("id %q does not have the form of a cluster id", id)
	}
	if want := "crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + e.Owner.AccountID + ":" + id + "::"; m["crn"] != want {
		t.Errorf("crn %v, want %s", m["crn"], want)
	}
	for field, want := range map[string]any{
		"name": "prod", "type": "IKS_SA", "audience": "iam", "location": "us-south", "keys": 2.0, "has_ca": false,
		"created_by": e.Owner.IAMID, "issuer": "https://kubernetes.default.svc/prod",
	} {
		if m[field] != want {
			t.Errorf("%s is %v, want %v", field, m[field], want)
		}
	}
	for _, field := range []string{"resource_group_id", "created_at", "entity_tag"} {
		if s, _ := m[field].(string); s == "" {
			t.Errorf("%s is missing", field)
		}
	}
	for _, ref := range []string{id, "prod"} {
		r := e.Do(apitest.Request{Path: "/v1/clusters/" + ref})
		if got := r.Want(200); got["id"] != id || got["keys"] != 2.0 || r.Header.Get("ETag") != got["entity_tag"] {
			t.Errorf("shown by %s: %s", ref, r.Raw)
		}
	}
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/prod"}).Want(204)
	wantError(t, e.Do(apitest.Request{Path: "/v1/clusters/" + id}), 404, "not_found")

	events := e.Events(2)
	for n, action := range []string{"containers-kubernetes.cluster.delete", "containers-kubernetes.cluster.create"} {
		if ev := events[n]; ev.Action != action || ev.Target.TypeURI != "containers-kubernetes/cluster" || ev.Target.ID != m["crn"] || ev.Outcome != "success" {
			t.Errorf("event %d is %s on %s (%s)", n, ev.Action, ev.Target.ID, ev.Outcome)
		}
	}
	// The issuer is free again, and the new registration is another cluster.
	if again := e.Do(post(uploaded(t, "prod"))).Want(201); again["crn"] == m["crn"] {
		t.Error("a new registration has the CRN of a deleted one")
	}
}

func TestKeysAreFetchedWhenAClusterIsRegistered(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 3))
	m := e.Do(post(map[string]any{"name": "k", "issuer": iss.URL, "ca": iss.ca, "type": "ROKS_SA", "audience": "other", "location": "wdc"})).Want(201)
	if m["keys"] != 3.0 || m["has_ca"] != true || m["type"] != "ROKS_SA" || m["audience"] != "other" || m["location"] != "wdc" {
		t.Errorf("registered as %v", m)
	}
	hits := iss.hits.Load()
	e.Do(apitest.Request{Path: "/v1/clusters/k"}).Want(200)
	if iss.hits.Load() != hits {
		t.Error("reading a cluster asks its issuer")
	}
}

func TestAWrongIssuerIsToldAtOnce(t *testing.T) {
	e := start(t)
	good := newIssuer(t, keySet(t, 1))
	lying := newIssuer(t, keySet(t, 1))
	lying.says = "https://elsewhere.example"
	empty := newIssuer(t, json.RawMessage(`{"keys":[]}`))
	for name, c := range map[string]struct {
		body map[string]any
		says string
	}{
		"another CA":        {map[string]any{"issuer": good.URL}, "certificate"},
		"another issuer":    {map[string]any{"issuer": lying.URL, "ca": lying.ca}, "elsewhere.example"},
		"no keys":           {map[string]any{"issuer": empty.URL, "ca": empty.ca}, "0 keys"},
		"no discovery":      {map[string]any{"issuer": good.URL + "/sub", "ca": good.ca}, "404"},
		"nobody listens":    {map[string]any{"issuer": "https://127.0.0.1:1"}, "refused"},
		"an unbounded echo": {map[string]any{"issuer": strings.Repeat("x", 2000), "jwks": keySet(t, 1)}, "issuer"},
	} {
		t.Run(name, func(t *testing.T) {
			c.body["name"] = "k"
			r := e.Do(post(c.body))
			if r.Status != 400 || !strings.Contains(string(r.Raw), c.says) || len(r.Raw) > 2048 {
				t.Errorf("status %d, %d bytes, want 400 and %q: %s", r.Status, len(r.Raw), c.says, r.Raw)
			}
		})
	}
	if got := listed(e, ""); len(got) != 0 {
		t.Errorf("registered nevertheless: %v", got)
	}
}

func TestOnlyWhoMayRegisterMakesTheServerFetch(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 1))
	e.Grant("IBMid-OPERATOR", "containers-kubernetes", "Operator")
	body := map[string]any{"name": "k", "issuer": iss.URL, "ca": iss.ca}
	for _, r := range []apitest.Request{{As: nobody}, {As: "IBMid-OPERATOR"}, {Anonymous: true}} {
		r.Method, r.Path, r.Body = "POST", "/v1/clusters", body
		want := 403
		if r.Anonymous {
			want = 401
		}
		e.Do(r).Want(want)
	}
	if n := iss.hits.Load(); n != 0 {
		t.Errorf("the issuer was asked %d times", n)
	}
	if ev := e.Events(1)[0]; ev.Action != "containers-kubernetes.cluster.create" || ev.Outcome != "failure" || ev.Reason.Code != 403 {
		t.Errorf("the refusal is recorded as %s %s %d", ev.Action, ev.Outcome, ev.Reason.Code)
	}
}

func TestASlowIssuerHoldsUpNobodyElse(t *testing.T) {
	e := start(t)
	slow := newIssuer(t, keySet(t, 1))
	slow.hold = make(chan struct{})
	done := make(chan int)
	go func() {
		done <- e.Do(post(map[string]any{"name": "slow", "issuer": slow.URL, "ca": slow.ca})).Status
	}()
	for slow.hits.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	e.Do(post(uploaded(t, "quick"))).Want(201)
	close(slow.hold)
	if status := <-done; status != 201 {
		t.Errorf("the slow registration ended with %d", status)
	}
}

func TestAnIssuerIsRegisteredOncePerAccount(t *testing.T) {
	e := start(t)
	body := uploaded(t, "first")
	e.Do(post(body)).Want(201)
	body["name"] = "second"
	if m := wantError(t, e.Do(post(body)), 409, "issuer_taken"); !strings.Contains(m, "first") {
		t.Errorf("message %q does not name the cluster", m)
	}
	other := post(body)
	other.As = e.Other.IAMID
	e.Do(other).Want(201)

	// Clusters set up alike have one issuer; their keys tell them apart.
	body["jwks"] = keySet(t, 2)
	e.Do(post(body)).Want(201)
	iss := newIssuer(t, keySet(t, 1))
	e.Do(post(map[string]any{"name": "fetched", "issuer": iss.URL, "ca": iss.ca})).Want(201)
	wantError(t, e.Do(post(map[string]any{"name": "beside", "issuer": iss.URL, "jwks": keySet(t, 1)})), 409, "issuer_taken")
}

func TestOfManyRegistrationsOfOneIssuerOneWins(t *testing.T) {
	e := start(t)
	iss := newIssuer(t, keySet(t, 1))
	iss.hold = make(chan struct{})
	var wg sync.WaitGroup
	statuses := make([]int, 6)
	for n := range statuses {
		wg.Go(func() {
			statuses[n] = e.Do(post(map[string]any{"name": fmt.Sprint("k", n), "issuer": iss.URL, "ca": iss.ca})).Status
		})
	}
	// All have looked whether the issuer is free before one may go on.
	for int(iss.hits.Load()) < len(statuses) {
		time.Sleep(time.Millisecond)
	}
	close(iss.hold)
	wg.Wait()
	slices.Sort(statuses)
	if want := []int{201, 409, 409, 409, 409, 409}; !slices.Equal(statuses, want) {
		t.Errorf("statuses %v, want %v", statuses, want)
	}
}

func TestANameIsTakenOncePerAccount(t *testing.T) {
	e := start(t)
	body := uploaded(t, "k")
	e.Do(post(body)).Want(201)
	body["issuer"] = "https://another.example"
	wantError(t, e.Do(post(body)), 409, "conflict")
}

func TestNoPrivateKeyIsTakenOrShown(t *testing.T) {
	e := start(t)
	private := marshal(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: newKey(t), KeyID: "p"}}})
	symmetric := marshal(t, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: []byte("sixteen byte key"), KeyID: "s"}}})
	for _, jwks := range []json.RawMessage{private, symmetric} {
		body := uploaded(t, "k")
		body["jwks"] = jwks
		wantError(t, e.Do(post(body)), 400, "invalid_body")
	}
	body := uploaded(t, "k")
	body["ca"] = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}))
	wantError(t, e.Do(post(body)), 400, "invalid_body")

	// Members that a public key does not have are not kept.
	body = uploaded(t, "k")
	var set map[string][]map[string]any
	if err := json.Unmarshal(body["jwks"].(json.RawMessage), &set); err != nil {
		t.Fatal(err)
	}
	set["keys"][0]["p"] = "c2VjcmV0"
	body["jwks"] = set
	id := e.Do(post(body)).Want(201)["id"].(string)
	if k, _ := e.Config.Directory.Clusters.Get(id); strings.Contains(string(k.JWKS), "c2VjcmV0") {
		t.Errorf("kept %s", k.JWKS)
	}
}

func TestBadRegistrationsAreRefused(t *testing.T) {
	e := start(t)
	for _, c := range []struct {
		field string
		value any
	}{
		{"name", ""},
		{"name", "a:b"},
		{"name", "a\nb"},
		{"name", "a\u0000b"},
		{"name", " a"},
		{"name", strings.Repeat("x", 101)},
		{"name", 1},
		{"issuer", ""},
		{"issuer", "https://a\u0000b"},
		{"type", "VSI"},
		{"type", "other"},
		{"location", "us-south:a/0"},
		{"location", "a/b"},
		{"audience", strings.Repeat("x", 257)},
		{"audience", "a\nb"},
		{"jwks", "text"},
		{"jwks", []int{}},
		{"jwks", map[string]any{}},
		{"jwks", map[string]any{"keys": []any{map[string]any{"kty": "odd"}}}},
		{"ca", "not a certificate"},
		{"ca", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
		{"ca", strings.Repeat("x", 65<<10)},
	} {
		body := uploaded(t, "k")
		body[c.field] = c.value
		if r := e.Do(post(body)); r.Status != 400 {
			t.Errorf("%s=%.40v: status %d, want 400: %s", c.field, c.value, r.Status, r.Raw)
		}
	}
	for _, iss := range []string{"http://cluster.example", "ftp://127.0.0.1", "file:///etc/passwd", "https://user:pw@cluster.example", "https://", "kubernetes"} {
		wantError(t, e.Do(post(map[string]any{"name": "k", "issuer": iss})), 400, "invalid_body")
	}
	for _, body := range []string{``, `null`, `[]`, `{`, `{"name":"k"} x`} {
		if r := e.Do(post(body)); r.Status != 400 {
			t.Errorf("body %q: status %d, want 400", body, r.Status)
		}
	}
	body := uploaded(t, "k")
	body["resource_group"] = "no-such-group"
	wantError(t, e.Do(post(body)), 404, "not_found")
	for _, g := range e.Config.Directory.ResourceGroupsByAccount.Get(e.Other.AccountID) {
		body["resource_group"] = g.ID
		wantError(t, e.Do(post(body)), 404, "not_found")
	}
}

func TestAnotherAccountsClusterDoesNotExist(t *testing.T) {
	e := start(t)
	r := post(uploaded(t, "theirs"))
	r.As = e.Other.IAMID
	id := e.Do(r).Want(201)["id"].(string)
	for _, ref := range []string{id, "theirs"} {
		wantError(t, e.Do(apitest.Request{Path: "/v1/clusters/" + ref}), 404, "not_found")
		wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/" + ref}), 404, "not_found")
	}
	if got := listed(e, ""); len(got) != 0 {
		t.Errorf("listed %v", got)
	}
	// A name made like the foreign id leads to one's own cluster.
	mine := e.Do(post(uploaded(t, id))).Want(201)["id"].(string)
	if got := e.Do(apitest.Request{Path: "/v1/clusters/" + id}).Want(200); got["id"] != mine {
		t.Errorf("shown %v", got)
	}
	if got := listed(e, e.Other.IAMID); !slices.Equal(got, []string{"theirs"}) {
		t.Errorf("the other account lists %v", got)
	}
}

func TestClustersAreShownToWhomPoliciesSay(t *testing.T) {
	e := start(t)
	one := e.Do(post(uploaded(t, "one"))).Want(201)
	e.Do(post(uploaded(t, "two"))).Want(201)
	e.Grant("IBMid-VIEWER", "containers-kubernetes", "Viewer")
	equals := func(key, value string) access.Attribute {
		return access.Attribute{Key: key, Operator: access.StringEquals, Value: access.Text(value)}
	}
	d := e.Config.Directory
	err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Policies.Put(tx, &access.Policy{
			ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
			Subject: []access.Attribute{equals(access.IAMID, "IBMid-ONE")},
			Resource: []access.Attribute{
				equals(access.AccountID, e.Owner.AccountID), equals(access.ServiceName, "containers-kubernetes"),
				equals(access.ServiceInstance, one["id"].(string)),
			},
			Roles: []string{access.PlatformRoleCRN("Administrator")},
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for who, want := range map[string][]string{
		nobody: {}, "IBMid-VIEWER": {"one", "two"}, "IBMid-ONE": {"one"}, e.Owner.IAMID: {"one", "two"},
	} {
		if got := listed(e, who); !slices.Equal(got, want) {
			t.Errorf("%s lists %v, want %v", who, got, want)
		}
	}
	wantError(t, e.Do(apitest.Request{Path: "/v1/clusters/two", As: "IBMid-ONE"}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/one", As: "IBMid-VIEWER"}), 403, "not_authorized")
	wantError(t, e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/two", As: "IBMid-ONE"}), 403, "not_authorized")
	// The right over one cluster is not the right to register another one.
	r := post(uploaded(t, "three"))
	r.As = "IBMid-ONE"
	wantError(t, e.Do(r), 403, "not_authorized")
	e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/one", As: "IBMid-ONE"}).Want(204)
}

func TestAStaleEntityTagStopsADeletion(t *testing.T) {
	e := start(t)
	tag := e.Do(post(uploaded(t, "k"))).Want(201)["entity_tag"].(string)
	del := func(match string) *apitest.Response {
		return e.Do(apitest.Request{Method: "DELETE", Path: "/v1/clusters/k", Header: map[string]string{"If-Match": match}})
	}
	wantError(t, del("1-00000000000000000000000000000000"), 409, "conflict")
	del(tag).Want(204)
}

func TestAnIssuerOfWorkloadsIsNoClustersToo(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	register := func(account string) {
		t.Helper()
		i := &cluster.Issuer{ID: "WorkloadIssuer-" + account, AccountID: account, Name: "ci", Issuer: podIssuer, Audience: "iam", Mapping: cluster.SubjectOnly()}
		if err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error { d.WorkloadIssuers.Put(tx, i); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	body := map[string]any{"name": "one", "issuer": podIssuer, "jwks": keySet(t, 1)}
	register(e.Other.AccountID)
	e.Do(post(body)).Want(201)
	register(e.Owner.AccountID)
	body["name"], body["jwks"] = "two", keySet(t, 1)
	if m := wantError(t, e.Do(post(body)), 409, "issuer_taken"); !strings.Contains(m, `workload issuer "ci"`) {
		t.Errorf("message %q", m)
	}
	// What stands already can still be mended.
	e.Do(patch("one", map[string]any{"jwks": keySet(t, 1)})).Want(200)
}

// The issuer is taken, or the limit reached, while the new cluster's keys are
// being fetched.
func TestWhatHappensWhileAClusterIsTriedOutCounts(t *testing.T) {
	put := func(e *apitest.Env, d *directory.Directory, tx *directory.Tx, from, to int) {
		for n := from; n < to; n++ {
			id := fmt.Sprint("c", n)
			d.Clusters.Put(tx, &cluster.Cluster{ID: id, AccountID: e.Owner.AccountID, Name: id, Issuer: "https://" + id + ".test", Type: "IKS_SA", Audience: "iam"})
		}
	}
	const limit = 10_000
	for name, tt := range map[string]struct {
		before    int // clusters
		meanwhile func(e *apitest.Env, d *directory.Directory, tx *directory.Tx)
		code      string
	}{
		"a workload issuer": {0, func(e *apitest.Env, d *directory.Directory, tx *directory.Tx) {
			d.WorkloadIssuers.Put(tx, &cluster.Issuer{ID: "WorkloadIssuer-1", AccountID: e.Owner.AccountID, Name: "ci", Issuer: podIssuer, Audience: "iam", Mapping: cluster.SubjectOnly()})
		}, "issuer_taken"},
		"the last one": {limit - 1, func(e *apitest.Env, d *directory.Directory, tx *directory.Tx) {
			put(e, d, tx, limit-1, limit)
		}, "limit_exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			e := start(t)
			d := e.Config.Directory
			if err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error { put(e, d, tx, 0, tt.before); return nil }); err != nil {
				t.Fatal(err)
			}
			var once sync.Once
			s := newAPIServer(t, credential, keysOf(t, newSigner(t, "a")))
			s.before = func() {
				once.Do(func() {
					if err := d.Update(t.Context(), e.Owner.IAMID, func(tx *directory.Tx) error { tt.meanwhile(e, d, tx); return nil }); err != nil {
						t.Error(err)
					}
				})
			}
			body := map[string]any{"name": "one", "issuer": podIssuer, "server": s.input()}
			wantError(t, e.Do(post(body)), 409, tt.code)
			body["name"] = "two"
			wantError(t, e.Do(post(body)), 409, tt.code)
		})
	}
}
