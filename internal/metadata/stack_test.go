package metadata_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/authority"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/metadata"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

const (
	region  = "us-south"
	version = "version=2022-03-31"
	oldBase = "/instance_identity/v1"
	newBase = "/identity/v1"
)

// clock is the real one, moved.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }

// stack is an installation with one running instance whose default profile is
// linked to it.
type stack struct {
	*apitest.Env
	d       *directory.Directory
	clock   *clock
	host    *token.KeyRing // signs for host "local"
	hostCA  *authority.Authority
	limits  metadata.Limits
	issuer  *token.Issuer
	grants  *grant.Service
	service *metadata.Service

	mu   sync.Mutex
	seen []string // operations and outcomes

	vpc      *vpc.VPC
	group    *vpc.SecurityGroup
	subnet   *vpc.Subnet
	key      *vpc.Key
	instance *vpc.Instance
	profile  *identity.Profile
	link     *identity.Link
}

// start uses ES256 for the host, because making RSA keys is slow; startAs with
// RS256 is what servers do.
func start(t testing.TB) *stack {
	t.Helper()
	return startAs(t, jose.ES256)
}

func startAs(t testing.TB, alg jose.SignatureAlgorithm) *stack {
	t.Helper()
	s := &stack{Env: apitest.New(t), clock: &clock{}}
	s.d = s.Config.Directory
	s.host = s.newHost("local", alg, attest.IdentityIssuer(region)+"_")
	keys, err := token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: s.clock.now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.issuer = &token.Issuer{Keys: keys, URL: "http://tabard.test/identity", Now: s.clock.now}
	s.hostCA, err = authority.New(authority.Config{
		Host: "local", Sealer: s.Sealer, Store: authority.File(filepath.Join(t.TempDir(), "authority.json")), Now: s.clock.now,
	})
	if err != nil {
		t.Fatal(err)
	}
	unlimited := metadata.Limit{PerSecond: math.Inf(1)}
	s.limits = metadata.Limits{IdentityTokens: unlimited, IAMTokens: unlimited, Reads: unlimited, Refused: unlimited}
	s.wire(s.Config.Journal)

	prefix := "r006-"
	s.vpc = &vpc.VPC{
		ID: prefix + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "my-vpc",
		SecurityGroup: vpc.Ref{ID: prefix + uuid.NewString(), Name: "my-group"},
	}
	s.group = &vpc.SecurityGroup{ID: s.vpc.SecurityGroup.ID, AccountID: s.Owner.AccountID, VPCID: s.vpc.ID, Name: "my-group"}
	s.subnet = &vpc.Subnet{
		ID: "0737-" + uuid.NewString(), AccountID: s.Owner.AccountID, VPCID: s.vpc.ID, Zone: "us-south-3",
		CIDR: netip.MustParsePrefix("10.240.128.0/24"), Name: "my-subnet",
	}
	s.key = &vpc.Key{
		ID: prefix + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "my-key", Type: "ed25519", Length: 256,
		PublicKey: "ssh-ed25519 AAAAC3", Fingerprint: "SHA256:abc",
	}
	s.profile = s.newProfile(s.Owner.AccountID, "my-trusted-profile")
	s.instance = s.newInstance("my-instance", "local", 4)
	s.link = s.newLink(s.profile, s.instance.CRN, false)
	s.instance.KeyIDs = []string{s.key.ID}
	s.instance.DefaultProfile = &vpc.DefaultProfile{ID: s.profile.ID, CRN: s.crn("iam-identity", "", "profile", s.profile.ID), AutoLink: true}
	s.update(func(tx *directory.Tx) {
		s.d.VPCs.Put(tx, s.vpc)
		s.d.SecurityGroups.Put(tx, s.group)
		s.d.Subnets.Put(tx, s.subnet)
		s.d.Keys.Put(tx, s.key)
		s.d.Profiles.Put(tx, s.profile)
		s.d.Instances.Put(tx, s.instance)
		s.d.Links.Put(tx, s.link)
	})
	return s
}

// recorder is what makes events durable.
type recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// wire puts the services together on a journal.
func (s *stack) wire(journal recorder) {
	instances := &attest.Instances{Hosts: s.d, Region: region, Now: s.clock.now}
	s.grants = grant.New(grant.Config{
		Directory: s.d,
		Workloads: &attest.Workloads{Clusters: s.d, Keys: &attest.Keys{Now: s.clock.now}, Now: s.clock.now},
		Instances: instances, Tokens: s.issuer, Sealer: s.Sealer, Journal: journal,
		Names: crn.DefaultNames, Now: s.clock.now, OperatorAccount: s.Owner.AccountID,
	})
	s.service = s.newService(journal, s.grants)
}

// newService is the metadata service of host "local", which knows its own keys
// and its placements.
func (s *stack) newService(journal recorder, iam metadata.IAM) *metadata.Service {
	return metadata.New(metadata.Config{
		Instances: s, IAM: iam, Signer: s.host, Certificates: s.hostCA, Journal: journal, Limits: s.limits,
		Tokens: &attest.OwnInstances{HostID: "local", Keys: s.host, Placements: s, Region: region, Now: s.clock.now},
		Names:  crn.DefaultNames, Region: region, Now: s.clock.now, Log: slog.New(slog.DiscardHandler),
		Observe: func(operation, outcome string, _ time.Duration) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.seen = append(s.seen, operation+" "+outcome)
		},
	})
}

// Placement is what a host knows of an instance, put together of the directory.
func (s *stack) Placement(id string) (*vpc.Placement, bool) {
	i, ok := s.d.Instances.Get(id)
	if !ok {
		return nil, false
	}
	p := &vpc.Placement{Instance: *i, ResourceGroup: vpc.Ref{ID: i.ResourceGroupID, Name: "my-resources"}}
	if v, ok := s.d.VPCs.Get(i.VPCID); ok {
		p.VPC = *v
	}
	groups := map[string]bool{}
	for n := range i.Interfaces {
		nic := &i.Interfaces[n]
		if subnet, ok := s.d.Subnets.Get(nic.SubnetID); ok {
			p.Subnets = append(p.Subnets, *subnet)
		}
		for _, id := range nic.GroupIDs(&p.VPC) {
			if g, ok := s.d.SecurityGroups.Get(id); ok && !groups[id] {
				groups[id] = true
				p.SecurityGroups = append(p.SecurityGroups, *g)
			}
		}
	}
	for _, id := range i.KeyIDs {
		if k, ok := s.d.Keys.Get(id); ok {
			p.Keys = append(p.Keys, *k)
		}
	}
	for _, f := range s.d.FloatingIPsByInstance.Get(i.ID) {
		p.FloatingIPs = append(p.FloatingIPs, *f)
	}
	if image, ok := s.d.Images.Get(i.ImageID); ok {
		p.Image = *image
	} else if i.ImageID == stockImage().ID {
		p.Image = stockImage()
	}
	return p, true
}

// newHost registers a host and returns the ring that it signs with.
func (s *stack) newHost(id string, alg jose.SignatureAlgorithm, prefix string) *token.KeyRing {
	s.T.Helper()
	ring, err := token.NewKeyRing(s.T.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: s.clock.now, Log: slog.New(slog.DiscardHandler),
		Use: "host/" + id, Prefix: prefix, Alg: string(alg),
		Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: attest.MaxLifetime,
		Changed: func(tx *directory.Tx, published jose.JSONWebKeySet) {
			set, err := json.Marshal(published)
			if err != nil {
				s.T.Error(err)
			}
			s.d.Hosts.Put(tx, &cluster.Host{ID: id, Name: id, JWKS: set})
		},
	})
	if err != nil {
		s.T.Fatal(err)
	}
	return ring
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	err := s.d.Update(s.T.Context(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil })
	if err != nil {
		s.T.Fatal(err)
	}
}

// change stores the instance with something about it changed.
func (s *stack) change(f func(i *vpc.Instance)) {
	s.T.Helper()
	next := s.instance.Clone()
	f(next)
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, next) })
	s.instance = next
}

func (s *stack) crn(service, location, kind, id string) string {
	return crn.DefaultNames.Of(service, location, s.Owner.AccountID, "", kind, id).String()
}

func (s *stack) newProfile(account, name string) *identity.Profile {
	return &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: account, Name: name}
}

func (s *stack) newLink(p *identity.Profile, target string, crossAccount bool) *identity.Link {
	return &identity.Link{
		ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: p.AccountID,
		CRType: identity.VSI, CRN: target, CrossAccount: crossAccount,
	}
}

// newInstance makes a running instance with the n-th address of the subnet.
func (s *stack) newInstance(name, host string, n byte) *vpc.Instance {
	id := "0737_" + uuid.NewString()
	return &vpc.Instance{
		ID: id, CRN: s.crn("is", "us-south-3", "instance", id), AccountID: s.Owner.AccountID, Name: name,
		VPCID: s.vpc.ID, Zone: "us-south-3", Profile: "bx2-2x8", ImageID: stockImage().ID,
		ResourceGroupID: "rg-" + name, HostID: host, Status: vpc.Running,
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
		UserData: "#!/bin/sh\necho hello\n",
		Interfaces: []vpc.Interface{{
			ID: "0737-" + uuid.NewString(), Name: "primary-nic", SubnetID: s.subnet.ID,
			Address: netip.AddrFrom4([4]byte{10, 240, 128, n}), IPID: "0737-" + uuid.NewString(), IPName: "my-ip", MAC: "02:00:00:00:00:01",
		}},
		BootVolume: vpc.Volume{
			ID: "r006-" + uuid.NewString(), Name: "boot", AttachmentID: "0737-" + uuid.NewString(), AttachmentName: "boot-attachment",
		},
	}
}

func stockImage() vpc.Image {
	r, _ := vpc.RegionNamed(region)
	return vpc.StockImages(r)[0]
}

// ask is one request to the metadata service. Zero values mean: GET, no body,
// under the service's own address.
type ask struct {
	method, path string
	body         string
	bearer       string
	header       http.Header
	host         string
	of           string // instance whose listener it comes in on
}

// answer is what came back.
type answer struct {
	t      testing.TB
	status int
	header http.Header
	raw    string
}

func (s *stack) ask(a ask) *answer {
	s.T.Helper()
	if a.method == "" {
		a.method = http.MethodGet
	}
	var body io.Reader
	if a.body != "" {
		body = strings.NewReader(a.body)
	}
	r := httptest.NewRequest(a.method, a.path, body)
	r.Host = "169.254.169.254"
	if a.host != "" {
		r.Host = a.host
	}
	if a.body != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded") // as curl -d does
	}
	if a.bearer != "" {
		r.Header.Set("Authorization", "Bearer "+a.bearer)
	}
	for name, values := range a.header {
		r.Header[http.CanonicalHeaderKey(name)] = values
	}
	if a.of == "" {
		a.of = s.instance.ID
	}
	rec := httptest.NewRecorder()
	s.service.Handler(a.of).ServeHTTP(rec, r)
	return &answer{t: s.T, status: rec.Code, header: rec.Header(), raw: rec.Body.String()}
}

// want fails the test unless the answer has the status, and returns the body.
func (a *answer) want(status int) map[string]any {
	a.t.Helper()
	if a.status != status {
		a.t.Fatalf("status %d, want %d; body: %s", a.status, status, a.raw)
	}
	var m map[string]any
	if err := json.Unmarshal([]byte(a.raw), &m); err != nil {
		a.t.Fatalf("body is not a JSON object: %v: %s", err, a.raw)
	}
	return m
}

// wantError fails the test unless the answer is exactly one error in the
// documented shape; target is "type name", or "" for none.
func (a *answer) wantError(status int, code, target string) map[string]any {
	a.t.Helper()
	m := a.want(status)
	items, _ := m["errors"].([]any)
	if len(items) != 1 {
		a.t.Fatalf("want one error: %s", a.raw)
	}
	item := items[0].(map[string]any)
	got := ""
	if t, ok := item["target"].(map[string]any); ok {
		got = t["type"].(string) + " " + t["name"].(string)
	}
	if item["code"] != code || got != target {
		a.t.Fatalf("error %v about %q, want %s about %q; body: %s", item["code"], got, code, target, a.raw)
	}
	if m["status_code"] != float64(status) || m["trace"] != a.header.Get("Transaction-Id") || m["trace"] == "" || item["message"] == "" {
		a.t.Fatalf("error has the wrong shape: %s", a.raw)
	}
	return item
}

var flavor = http.Header{"Metadata-Flavor": {"ibm"}}

// identityToken gets an identity token of the instance.
func (s *stack) identityToken() string {
	s.T.Helper()
	m := s.ask(ask{method: http.MethodPut, path: newBase + "/token?" + version, header: flavor}).want(200)
	return m["access_token"].(string)
}

// iam asks for an access token with a body.
func (s *stack) iam(bearer, body string) *answer {
	s.T.Helper()
	return s.ask(ask{method: http.MethodPost, path: newBase + "/iam_tokens?" + version, bearer: bearer, body: body})
}

// event returns the newest event with the action, and fails the test without
// one.
func (s *stack) event(action string) activity.Event {
	s.T.Helper()
	events := s.events(action)
	if len(events) == 0 {
		s.T.Fatalf("no event %s", action)
	}
	return events[0]
}

func (s *stack) events(action string) []activity.Event {
	s.T.Helper()
	stored, err := s.Store.Events(s.T.Context(), store.Query{AccountID: s.Owner.AccountID, Action: action, Limit: 100})
	if err != nil {
		s.T.Fatal(err)
	}
	out := make([]activity.Event, len(stored))
	for n := range stored {
		if err := json.Unmarshal(stored[n].Doc, &out[n]); err != nil {
			s.T.Fatal(err)
		}
	}
	return out
}

// part decodes the n-th part of a JWT.
func part(t testing.TB, raw string, n int) map[string]any {
	t.Helper()
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		t.Fatalf("not a JWT: %s", raw)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[n])
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func header(t testing.TB, raw string) map[string]any { return part(t, raw, 0) }
func claims(t testing.TB, raw string) map[string]any { return part(t, raw, 1) }
