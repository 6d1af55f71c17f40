package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

// installation is a server whose accounts have at least one object of every
// kind, as it lies on disk. It is made once; every test that changes something
// opens a copy of its own.
type installation struct {
	files map[string][]byte
	home  vars // the operator's account
	other vars // another account with the same kinds of objects

	callers []caller // in the operator's account
}

// vars are the names by which calls speak of what an account has.
type vars map[string]string

// caller is a user with his access token and the roles that he holds.
type caller struct {
	name  string
	token string
	iamID string
	roles []grantedRole
}

// grantedRole is a role on one service, or on all services of a kind.
type grantedRole struct {
	service, kind, role string
}

// holds reports whether the caller's roles contain an action on a service, as
// the catalog has it.
func (c caller) holds(catalog *access.Catalog, service, action string) bool {
	return slices.ContainsFunc(c.roles, func(r grantedRole) bool {
		covered := r.kind == catalog.KindOf(service)
		if r.kind == "" {
			parent, _, _ := strings.Cut(service, ".")
			covered = r.service == service || r.service == parent
		}
		return covered && catalog.Grants(r.role, service, action)
	})
}

// installed makes the installation at its first call.
var installed = sync.OnceValues(func() (*installation, error) {
	dir, err := os.MkdirTemp(scratch(), "tabard-walk-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	in := &installation{files: map[string][]byte{}}
	if err := in.build(dir); err != nil {
		return nil, err
	}
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		in.files[d.Name()], err = os.ReadFile(path)
		return err
	})
	return in, err
})

// scratch is where the copies lie: in memory where there is such a place. They
// are made by the hundred, and none of them has to outlive a loss of power.
func scratch() string {
	const memory = "/dev/shm"
	if info, err := os.Stat(memory); err == nil && info.IsDir() {
		return memory
	}
	return ""
}

// running is a copy of the installation that is open.
type running struct {
	*installation
	t   testing.TB
	s   *Server
	log *errorLog
	dir string
}

// errorLog keeps what the server logs at level Error.
type errorLog struct {
	slog.Handler
	mu      sync.Mutex
	records []string
}

func (l *errorLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelError }

func (l *errorLog) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString(r.Message)
	r.Attrs(func(a slog.Attr) bool { fmt.Fprintf(&b, " %s=%.2000v", a.Key, a.Value); return true })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.records = append(l.records, b.String())
	return nil
}

// take returns what was logged since the last time.
func (l *errorLog) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.records
	l.records = nil
	return out
}

// walkConfig has a URL and an issuer that do not depend on the port, so that
// tokens are good in every copy.
func walkConfig(dir string) (Config, *errorLog) {
	cfg := config(dir)
	log := &errorLog{Handler: slog.DiscardHandler}
	cfg.Log = slog.New(log)
	cfg.URL = "http://tabard.test"
	return cfg, log
}

// start opens a copy of the installation.
func start(t testing.TB) *running {
	t.Helper()
	in, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	r := &running{installation: in, t: t}
	r.open()
	t.Cleanup(r.close)
	return r
}

func (r *running) open() {
	r.t.Helper()
	var err error
	if r.dir, err = os.MkdirTemp(scratch(), "tabard-walk-"); err != nil {
		r.t.Fatal(err)
	}
	for name, content := range r.files {
		if err := os.WriteFile(filepath.Join(r.dir, name), content, 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	cfg, log := walkConfig(r.dir)
	r.log = log
	if r.s, err = Open(context.Background(), cfg); err != nil {
		r.t.Fatal(err)
	}
}

func (r *running) close() {
	if err := r.s.Close(); err != nil {
		r.t.Error(err)
	}
	if err := os.RemoveAll(r.dir); err != nil {
		r.t.Error(err)
	}
}

// reset returns to the state of the installation.
func (r *running) reset() {
	r.t.Helper()
	r.close()
	r.open()
}

// request is one call as it goes over the wire.
type request struct {
	method, target string
	header         map[string]string
	body           []byte // nil is none
	token          string
}

type answerOf struct {
	status int
	header http.Header
	body   []byte
}

func (a answerOf) ok() bool { return a.status < 300 }

// send makes a call on a server.
func send(s *Server, q request) answerOf {
	var body io.Reader
	if q.body != nil {
		body = bytes.NewReader(q.body)
	}
	r := httptest.NewRequest(q.method, q.target, body)
	if q.token != "" {
		r.Header.Set("Authorization", "Bearer "+q.token)
	}
	for name, value := range q.header {
		r.Header.Set(name, value)
	}
	rec := httptest.NewRecorder()
	s.handler().ServeHTTP(rec, r)
	return answerOf{rec.Code, rec.Header(), rec.Body.Bytes()}
}

// records returns the revision of every object, by kind and id.
func (r *running) records() map[string]int64 {
	r.t.Helper()
	out := map[string]int64{}
	err := r.s.store.Load(context.Background(), func(rec store.Record) error {
		out[rec.Kind+" "+rec.ID] = rec.Revision
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// changed lists what is different between two states.
func changed(before, after map[string]int64) []string {
	var out []string
	for id, revision := range after {
		if old, ok := before[id]; !ok || old != revision {
			out = append(out, id)
		}
	}
	for id := range before {
		if _, ok := after[id]; !ok {
			out = append(out, "deleted "+id)
		}
	}
	slices.Sort(out)
	return out
}

// events returns an account's events, newest first.
func (r *running) events(q store.Query) []activity.Event {
	r.t.Helper()
	q.Limit = 100
	stored, err := r.s.store.Events(context.Background(), q)
	if err != nil {
		r.t.Fatal(err)
	}
	out := make([]activity.Event, len(stored))
	for i, e := range stored {
		if err := json.Unmarshal(e.Doc, &out[i]); err != nil {
			r.t.Fatal(err)
		}
	}
	return out
}

// builder makes the objects of one account over the API.
type builder struct {
	s     *Server
	token string
	v     vars
}

// build makes the installation in a directory and closes it again.
func (in *installation) build(dir string) (err error) {
	// The calls of a builder cannot go wrong one by one: without one object
	// there is no installation.
	defer func() {
		switch p := recover().(type) {
		case nil:
		case buildError:
			err = p
		default:
			panic(p)
		}
	}()
	cfg, log := walkConfig(dir)
	s, err := Open(context.Background(), cfg)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "owner.json"))
	if err != nil {
		return err
	}
	operator := &builder{s: s, v: vars{}}
	operator.begin(raw)
	operator.v["service"] = "papers"
	foreign := operator.call("POST", "/v1/accounts", `{"name":"Other","owner":{"email":"owner@other.example.com"}}`)
	rest, err := json.Marshal(foreign["owner"])
	if err != nil {
		return err
	}
	other := &builder{s: s, v: vars{}}
	other.begin(rest)
	other.v["service"] = "scroll"
	for _, b := range []*builder{operator, other} {
		b.identities()
		b.access()
		b.resources()
		b.network()
	}
	operator.hosts()
	in.callers = operator.makeCallers()
	for _, b := range []*builder{operator, other} {
		b.restrict()
	}
	in.home, in.other = operator.v, other.v
	// What only the operator has, unknown ids stand for elsewhere.
	in.home["operated"] = operator.call("POST", "/v1/accounts", `{"name":"Third","owner":{"email":"owner@third.example.com"}}`)["metadata"].(map[string]any)["guid"].(string)
	in.home["closed"] = operator.call("POST", "/v1/accounts", `{"name":"Fourth","owner":{"email":"owner@fourth.example.com"}}`)["metadata"].(map[string]any)["guid"].(string)
	operator.call("DELETE", "/v1/accounts/$closed", "")
	in.other["host"], in.other["host_revoked"] = unknown(in.home["host"]), unknown(in.home["host_revoked"])
	in.other["operated"], in.other["closed"] = in.home["account"], in.home["closed"]
	operator.positions()
	other.positions()
	if logged := log.take(); len(logged) > 0 {
		return fmt.Errorf("the server logs %q", logged)
	}
	return s.Close()
}

// positions names the place of the account's newest event in the log.
func (b *builder) positions() {
	transaction := b.v["transaction"] // of a change; a list leaves no event
	at := b.call("GET", "/v1/events?limit=1", "")["positions"].([]any)[0].(float64)
	b.v["transaction"], b.v["event_position"] = transaction, strconv.FormatInt(int64(at), 10)
}

type buildError struct{ error }

// call makes a call that must succeed and returns the answer's body.
func (b *builder) call(method, target, body string, header ...string) map[string]any {
	q := request{method: method, target: expandTarget(target, b.v), token: b.token, header: map[string]string{}}
	if body != "" {
		q.body = []byte(expand(body, b.v))
	}
	for i := 0; i < len(header); i += 2 {
		q.header[header[i]] = expand(header[i+1], b.v)
	}
	a := send(b.s, q)
	if !a.ok() {
		panic(buildError{fmt.Errorf("%s %s: %d %s (sent %s)", method, q.target, a.status, a.body, q.body)})
	}
	m := map[string]any{}
	if len(a.body) > 0 {
		if err := json.Unmarshal(a.body, &m); err != nil {
			panic(buildError{err})
		}
	}
	b.v["transaction"] = a.header.Get(api.TransactionHeader)
	return m
}

// make is call for a POST whose answer has a value to keep under a name.
func (b *builder) make(name, field, target, body string, header ...string) map[string]any {
	m := b.call("POST", target, body, header...)
	value, ok := m[field].(string)
	if !ok {
		panic(buildError{fmt.Errorf("POST %s: the answer has no %s: %v", target, field, m)})
	}
	b.v[name] = value
	return m
}

// expand puts values in the place of $names.
func expand(s string, v vars) string {
	return os.Expand(s, func(name string) string {
		value, ok := v[name]
		if !ok {
			panic(buildError{fmt.Errorf("nothing is called $%s", name)})
		}
		return value
	})
}

// expandTarget is expand for a path and query.
func expandTarget(s string, v vars) string {
	path, query, queried := strings.Cut(s, "?")
	escaped := func(escape func(string) string) vars {
		out := vars{}
		for name, value := range v {
			out[name] = escape(value)
		}
		return out
	}
	path = expand(path, escaped(url.PathEscape))
	if queried {
		path += "?" + expand(query, escaped(url.QueryEscape))
	}
	return path
}

// login returns an access token for an API key.
func (b *builder) login(key string) string {
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key}}
	a := send(b.s, request{
		method: "POST", target: "/identity/token", body: []byte(form.Encode()),
		header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
	})
	var m struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(a.body, &m); err != nil || m.AccessToken == "" {
		panic(buildError{fmt.Errorf("log in: %d %s", a.status, a.body)})
	}
	return m.AccessToken
}

// begin logs the owner in.
func (b *builder) begin(raw []byte) {
	var o struct {
		AccountID string `json:"account_id"`
		IAMID     string `json:"iam_id"`
		APIKey    string `json:"apikey"`
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		panic(buildError{err})
	}
	b.v["account"], b.v["owner"] = o.AccountID, o.IAMID
	b.token = b.login(o.APIKey)
	b.v["owner_token"] = b.token
	b.v["group_default"] = b.s.directory.ResourceGroupsByAccount.Get(o.AccountID)[0].ID
}

// invite makes a user who has logged in, and returns his IAM ID and token.
func (b *builder) invite(email string) (iamID, token, key string) {
	m := b.call("POST", "/v2/accounts/$account/users", `{"users":[{"email":"`+email+`"}]}`)
	iamID = m["resources"].([]any)[0].(map[string]any)["id"].(string)
	key = b.call("POST", "/v2/accounts/$account/users/"+iamID+"/apikey", "")["apikey"].(string)
	return iamID, b.login(key), key
}

func (b *builder) identities() {
	v := b.v
	b.make("profile", "id", "/v1/profiles", `{"name":"first","account_id":"$account"}`)
	v["profile_iam"] = "iam-" + v["profile"]
	b.make("link", "id", "/v1/profiles/$profile/links",
		`{"cr_type":"VSI","link":{"crn":"crn:v1:bluemix:public:is:us-south-1:a/$account::instance:0717_first"}}`)
	b.make("rule", "id", "/v1/profiles/$profile/rules", ruleBody)
	b.make("idgroup", "id", "/v1/serviceid_groups", `{"name":"empty","account_id":"$account"}`)
	b.make("idgroup_full", "id", "/v1/serviceid_groups", `{"name":"full","account_id":"$account"}`)
	b.make("serviceid", "id", "/v1/serviceids", `{"name":"first","account_id":"$account","group_id":"$idgroup_full"}`)
	v["serviceid_iam"] = "iam-" + v["serviceid"]
	v["serviceid_crn"] = "crn:v1:bluemix:public:iam-identity::a/" + v["account"] + "::serviceid:" + v["serviceid"]
	b.make("serviceid_locked", "id", "/v1/serviceids", `{"name":"locked","account_id":"$account"}`, "Entity-Lock", "true")
	b.make("serviceid_keyless", "id", "/v1/serviceids", `{"name":"keyless","account_id":"$account"}`)

	user, token, value := b.invite("user@" + v["account"] + ".example.com")
	v["user"], v["user_key_value"] = user, value
	v["invited"] = b.call("POST", "/v2/accounts/$account/users", `{"users":[{"email":"invited@$account.example.com"}]}`)["resources"].([]any)[0].(map[string]any)["id"].(string)
	b.call("POST", "/v1/profiles/$profile/identities/user", `{"identifier":"$user","type":"user"}`)

	m := b.make("key", "id", "/v1/apikeys", `{"name":"first","iam_id":"$serviceid_iam","account_id":"$account"}`)
	v["key_value"] = m["apikey"].(string)
	b.make("key_locked", "id", "/v1/apikeys", `{"name":"locked","iam_id":"$serviceid_iam"}`, "Entity-Lock", "true")
	b.make("key_disabled", "id", "/v1/apikeys", `{"name":"disabled","iam_id":"$serviceid_iam"}`, "Entity-Disable", "true")
	self := &builder{s: b.s, token: token, v: v}
	self.make("user_key", "id", "/v1/apikeys", `{"name":"own","iam_id":"$user"}`)
	self.make("user_key_locked", "id", "/v1/apikeys", `{"name":"own locked","iam_id":"$user"}`, "Entity-Lock", "true")
	self.make("user_key_disabled", "id", "/v1/apikeys", `{"name":"own disabled","iam_id":"$user"}`, "Entity-Disable", "true")

	b.make("report", "reference", "/v1/activity/accounts/$account/report", "")
	b.make("mfa_report", "reference", "/v1/mfa/accounts/$account/report", "")
	b.call("PUT", "/v1/preferences/accounts/$account/identities/$user/console/theme", `{"value_string":"dark"}`)
	v["jwks"] = keySet()
	b.make("idp", "id", "/v1/idps", `{"name":"first","issuer":"https://127.0.0.1:1/first","audience":"tabard","jwks":$jwks}`)
	b.make("workload_issuer", "id", "/v1/workload_issuers", `{"name":"first","issuer":"https://127.0.0.1:1/workloads","audience":"tabard","jwks":$jwks}`)
}

// ruleBody is a claim rule of a profile.
const ruleBody = `{"type":"Profile-SAML","name":"first","realm_name":"https://idp.example.com","expiration":3600,` +
	`"conditions":[{"claim":"groups","operator":"CONTAINS","value":"\"dev\""}]}`

// keySet returns a JSON web key set with a new key.
func keySet() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(buildError{err})
	}
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: rand.Text(), Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		panic(buildError{err})
	}
	return string(set)
}

func (b *builder) access() {
	b.make("role", "id", "/v2/roles", roleBody("Listing", "kms", "kms.secrets.list", "iam.policy.read", "resource-controller.instance.retrieve"))
	for i, r := range []struct {
		service string
		actions []string
	}{
		{"iam-identity", []string{"iam-identity.profile.get", "iam-identity.profile.update", "iam-identity.serviceid.delete", "iam-identity.apikey.list"}},
		{"iam-groups", []string{"iam-groups.groups.read", "iam-groups.members.add", "iam-groups.rules.delete"}},
		{"is", []string{"is.instance.instance.operate", "is.vpc.vpc.create", "is.subnet.subnet.list"}},
		{"iam-access-management", []string{"iam-access-management.customRole.delete", "iam-access-management.service.read"}},
		{"containers-kubernetes", []string{"containers-kubernetes.cluster.delete", "containers-kubernetes.cluster-group.update"}},
		{"user-management", []string{"user-management.user.create", "user-management.user.retrieve"}},
	} {
		b.call("POST", "/v2/roles", roleBody(fmt.Sprintf("Custom%c", 'A'+i), r.service, r.actions...))
	}
	b.make("policy", "id", "/v1/policies", policyV1("$user", "Reader", "kms"))
	b.make("policy2", "id", "/v2/policies", policyV2("$profile_iam", "Reader", "kms"))
	b.make("policy_deleted", "id", "/v1/policies", policyV1("$profile_iam", "Writer", "kms"))
	b.call("DELETE", "/v1/policies/$policy_deleted", "")
	b.make("authorization", "id", "/v2/policies", `{"type":"authorization",`+
		`"subject":{"attributes":[{"key":"serviceName","operator":"stringEquals","value":"cloud-object-storage"},{"key":"accountId","operator":"stringEquals","value":"$account"}]},`+
		`"resource":{"attributes":[{"key":"serviceName","operator":"stringEquals","value":"kms"},{"key":"accountId","operator":"stringEquals","value":"$account"}]},`+
		`"control":{"grant":{"roles":[{"role_id":"crn:v1:bluemix:public:iam::::serviceRole:Reader"}]}}}`)
	b.call("POST", "/v1/services", serviceBody("$service"))
	b.make("group", "id", "/v2/groups?account_id=$account", `{"name":"first"}`)
	b.make("group_empty", "id", "/v2/groups?account_id=$account", `{"name":"empty"}`)
	b.call("PUT", "/v2/groups/$group/members", `{"members":[{"iam_id":"$user","type":"user"},{"iam_id":"$serviceid_iam","type":"service"}]}`)
	b.make("group_rule", "id", "/v2/groups/$group/rules", groupRuleBody)
}

const groupRuleBody = `{"name":"first","expiration":12,"realm_name":"https://idp.example.com",` +
	`"conditions":[{"claim":"groups","operator":"CONTAINS","value":"\"dev\""}]}`

func roleBody(name, service string, actions ...string) string {
	list, err := json.Marshal(actions)
	if err != nil {
		panic(buildError{err})
	}
	return `{"name":"` + name + `","display_name":"` + name + `","description":"for tests","account_id":"$account","service_name":"` + service + `","actions":` + string(list) + `}`
}

func policyV1(subject, role, service string) string {
	return `{"type":"access","description":"for tests","subjects":[{"attributes":[{"name":"iam_id","value":"` + subject + `"}]}],` +
		`"roles":[{"role_id":"` + access.ServiceRoleCRN(service, role) + `"}],` +
		`"resources":[{"attributes":[{"name":"accountId","value":"$account","operator":"stringEquals"},{"name":"serviceName","value":"` + service + `","operator":"stringEquals"}]}]}`
}

func policyV2(subject, role, service string) string {
	return `{"type":"access","description":"for tests","subject":{"attributes":[{"key":"iam_id","operator":"stringEquals","value":"` + subject + `"}]},` +
		`"control":{"grant":{"roles":[{"role_id":"` + access.ServiceRoleCRN(service, role) + `"}]}},` +
		`"resource":{"attributes":[{"key":"accountId","operator":"stringEquals","value":"$account"},{"key":"serviceName","operator":"stringEquals","value":"` + service + `"}]}}`
}

func serviceBody(name string) string {
	return `{"name":"` + name + `","display_name":"Papers","kind":"service","description":"for tests",` +
		`"actions":[{"id":"` + name + `.page.read","display_name":"Read","description":"reads"},{"id":"` + name + `.page.write"}],` +
		`"attributes":[{"name":"shelf"}],"roles":{"Viewer":{"actions":["` + name + `.page.read"]}},` +
		`"service_roles":{"Writer":{"description":"writes","actions":["` + name + `.page.write"]}},` +
		`"plans":[{"id":"` + name + `-$account","name":"free","reclamation":false}]}`
}

// kmsPlan is the plan of the fixtures' resource instances.
const kmsPlan = "8d35c7b2-ef60-4a19-97d8-41fb6a0e2c95"

func (b *builder) resources() {
	v := b.v
	b.make("rgroup", "id", "/v2/resource_groups", `{"name":"empty","account_id":"$account"}`)
	instance := func(name, as string, header ...string) {
		m := b.make(as, "guid", "/v2/resource_instances",
			`{"name":"`+name+`","target":"us-south","resource_group":"$group_default","resource_plan_id":"`+kmsPlan+`"}`, header...)
		v[as+"_crn"] = m["crn"].(string)
	}
	instance("first", "instance")
	instance("locked", "instance_locked", "Entity-Lock", "true")
	instance("gone", "instance_gone")
	b.call("DELETE", "/v2/resource_instances/$instance_gone", "")
	m := b.call("GET", "/v1/reclamations", "")
	v["reclamation"] = m["resources"].([]any)[0].(map[string]any)["id"].(string)
	m = b.make("resource_key", "guid", "/v2/resource_keys", `{"name":"first","source":"$instance_crn","role":"Reader"}`)
	v["resource_key_crn"] = m["crn"].(string)
	b.make("cluster_group", "id", "/v1/cluster_groups", `{"name":"first"}`)
	b.make("cluster_group_empty", "id", "/v1/cluster_groups", `{"name":"empty"}`)
	b.make("cluster", "id", "/v1/clusters", `{"name":"first","issuer":"https://127.0.0.1:1/cluster","jwks":$jwks,"groups":["$cluster_group"]}`)
	v["cluster_name"] = "first"
}

const vpcVersion = "?version=2025-01-01&generation=2"

func (b *builder) network() {
	v := b.v
	m := b.make("vpc", "id", "/v1/vpcs"+vpcVersion, `{"name":"first"}`)
	v["security_group"] = m["default_security_group"].(map[string]any)["id"].(string)
	m = b.make("group_free", "id", "/v1/security_groups"+vpcVersion,
		`{"name":"free","vpc":{"id":"$vpc"},"rules":[{"direction":"inbound","protocol":"tcp","port_min":22,"port_max":22}]}`)
	v["group_free_rule"] = m["rules"].([]any)[0].(map[string]any)["id"].(string)
	b.make("group_used", "id", "/v1/security_groups"+vpcVersion, `{"name":"used","vpc":{"id":"$vpc"}}`)
	b.make("vpc_empty", "id", "/v1/vpcs"+vpcVersion, `{"name":"empty"}`)
	subnet := `{"name":"%s","vpc":{"id":"$vpc"},"zone":{"name":"us-south-1"},"total_ipv4_address_count":16}`
	b.make("subnet", "id", "/v1/subnets"+vpcVersion, fmt.Sprintf(subnet, "first"))
	b.make("subnet_empty", "id", "/v1/subnets"+vpcVersion, fmt.Sprintf(subnet, "empty"))
	v["sshkey_old"], v["sshkey_new"] = sshKey(), sshKey()
	b.make("sshkey", "id", "/v1/keys"+vpcVersion, `{"name":"first","public_key":"$sshkey_old"}`)
	image := vpc.StockImages(vpc.Regions[slices.IndexFunc(vpc.Regions, func(r vpc.Region) bool { return r.Name == "us-south" })])[0]
	v["image"], v["system"] = image.ID, image.OSName
	m = b.make("server", "id", "/v1/instances"+vpcVersion, serverBody("first"))
	v["server_crn"] = m["crn"].(string)
	nic := m["primary_network_interface"].(map[string]any)
	v["nic"] = nic["id"].(string)
	v["nic_ip"] = nic["primary_ip"].(map[string]any)["id"].(string)
	boot := m["boot_volume_attachment"].(map[string]any)
	v["attachment"], v["volume"] = boot["id"].(string), boot["volume"].(map[string]any)["id"].(string)
	b.call("PUT", "/v1/security_groups/$group_used/targets/$nic"+vpcVersion, "")
	m = b.make("server_attached", "id", "/v1/instances"+vpcVersion, attachedBody("attached"))
	for n, name := range []string{"", "_bound"} {
		attachment := m["network_attachments"].([]any)[n].(map[string]any)
		v["nac"+name] = attachment["id"].(string)
		v["vni"+name] = attachment["virtual_network_interface"].(map[string]any)["id"].(string)
		v["vni_ip"+name] = attachment["primary_ip"].(map[string]any)["id"].(string)
	}
	b.make("image_own", "id", "/v1/images"+vpcVersion, `{"name":"own"}`)
	b.make("fip", "id", "/v1/floating_ips"+vpcVersion, `{"name":"free","zone":{"name":"us-south-1"}}`)
	b.make("fip_bound", "id", "/v1/floating_ips"+vpcVersion, `{"name":"bound","target":{"id":"$nic"}}`)
	b.make("fip_virtual", "id", "/v1/floating_ips"+vpcVersion, `{"name":"virtual","target":{"id":"$vni_bound"}}`)
}

func serverBody(name string) string {
	return `{"name":"` + name + `","zone":{"name":"us-south-1"},"vpc":{"id":"$vpc"},"image":{"id":"$image"},"keys":[{"id":"$sshkey"}],` +
		`"primary_network_interface":{"subnet":{"id":"$subnet"}},"metadata_service":{"enabled":true},` +
		`"default_trusted_profile":{"auto_link":true,"target":{"id":"$profile"}},"user_data":"#!"}`
}

// attachedBody is a server with network attachments.
func attachedBody(name string) string {
	attachment := `{"name":"nac-%d","virtual_network_interface":{"name":"` + name + `-%[1]d","subnet":{"id":"$subnet"},"security_groups":[{"id":"$security_group"}]}}`
	return `{"name":"` + name + `","zone":{"name":"us-south-1"},"image":{"id":"$image"},"primary_network_attachment":` + fmt.Sprintf(attachment, 1) +
		`,"network_attachments":[` + fmt.Sprintf(attachment, 2) + `]}`
}

// rawDisk is JSON, so that it can be spoiled like other bodies, and has the size
// of a disk.
func rawDisk() string {
	const before, after = `{"disk":"`, `"}`
	return before + strings.Repeat("0", 1024-len(before)-len(after)) + after
}

func sshKey() string {
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(buildError{err})
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		panic(buildError{err})
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// restrict takes away what the account's settings let every user do.
func (b *builder) restrict() {
	b.call("PUT", "/v1/accounts/$account/settings/identity",
		`{"restrict_create_service_id":"RESTRICTED","restrict_create_platform_apikey":"RESTRICTED","restrict_user_list_visibility":"RESTRICTED"}`, "If-Match", "*")
}

// walkedServices are those that the routes' actions are decided on.
var walkedServices = []string{
	"activity", "iam-access-management", "iam-groups", "iam-identity", "installation", "resource-controller", "user-management",
	"kms", "containers-kubernetes", "is", "host",
}

// makeCallers makes one user for each role of each service, one for each
// platform role on everything, and one without any.
func (b *builder) makeCallers() []caller {
	catalog := b.s.directory.Catalog(b.v["account"])
	out := []caller{{name: nobody}}
	for _, name := range walkedServices {
		s, ok := catalog.Service(name)
		if !ok {
			panic(buildError{fmt.Errorf("no service %s", name)})
		}
		for _, role := range s.Roles {
			out = append(out, caller{name: name + "/" + role.DisplayName, roles: []grantedRole{{service: name, role: role.CRN}}})
		}
	}
	for _, role := range access.PlatformRoles {
		id := access.PlatformRoleCRN(role)
		out = append(out, caller{name: "everything/" + role, roles: []grantedRole{{kind: access.KindService, role: id}, {kind: access.KindPlatform, role: id}}})
	}
	// All in one call, and with tokens that are not asked for: every event in
	// the log makes each later start of the server take longer.
	var invitations []string
	for i := range out {
		invitations = append(invitations, fmt.Sprintf(`{"email":"caller%d@example.com"}`, i))
	}
	invited := b.call("POST", "/v2/accounts/$account/users", `{"users":[`+strings.Join(invitations, ",")+`]}`)["resources"].([]any)
	issuer := &token.Issuer{Keys: b.s.keys, URL: b.s.cfg.Issuer, Now: time.Now}
	for i := range out {
		c := &out[i]
		c.iamID = invited[i].(map[string]any)["id"].(string)
		var err error
		if c.token, _, err = issuer.Issue(token.Claims{IAMID: c.iamID, Name: c.name, Account: token.Account{Valid: true, BSS: b.v["account"]}}, time.Hour); err != nil {
			panic(buildError{err})
		}
		for _, r := range c.roles {
			attribute := `{"key":"serviceName","operator":"stringEquals","value":"` + r.service + `"}`
			if r.kind != "" {
				attribute = `{"key":"serviceType","operator":"stringEquals","value":"` + r.kind + `"}`
			}
			b.call("POST", "/v2/policies", `{"type":"access","subject":{"attributes":[{"key":"iam_id","operator":"stringEquals","value":"`+c.iamID+`"}]},`+
				`"control":{"grant":{"roles":[{"role_id":"`+r.role+`"}]}},`+
				`"resource":{"attributes":[{"key":"accountId","operator":"stringEquals","value":"$account"},`+attribute+`]}}`)
		}
	}
	return out
}

const nobody = "nobody"

// caller returns the caller with a name.
func (in *installation) caller(name string) caller {
	i := slices.IndexFunc(in.callers, func(c caller) bool { return c.name == name })
	return in.callers[i]
}

func (v vars) with(pairs ...string) vars {
	out := maps.Clone(v)
	for i := 0; i < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}
