package hosts_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/hosts"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/vpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	endpoint = "http://tabard.test/identity/token"
	zone     = "us-south-1"
)

// stack is an installation with the hosts' API, real grants and a clock.
type stack struct {
	*apitest.Env
	d         *directory.Directory
	offset    atomic.Int64
	grants    *grant.Service
	scheduler *placement.Scheduler
	stopping  chan struct{}
	vpc       *vpc.VPC
	subnet    *vpc.Subnet
	addresses int
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
	s := &stack{Env: apitest.New(t), stopping: make(chan struct{}), addresses: 4}
	s.d = s.Config.Directory
	s.Config.Now = s.now
	keys, err := token.NewKeyRing(t.Context(), token.KeyRingConfig{
		Directory: s.d, Sealer: s.Sealer, Now: s.now, Log: slog.New(slog.DiscardHandler),
		Use: "access-token", Alg: "ES256", Rotation: 720 * time.Hour, Lead: 24 * time.Hour, MaxLife: token.RefreshLife,
	})
	must(t, err)
	proofs := &attest.HostProofs{Hosts: s.d, Audience: endpoint, Now: s.now}
	s.grants = grant.New(grant.Config{
		Directory: s.d,
		Workloads: &attest.Workloads{Clusters: s.d, Keys: &attest.Keys{Now: s.now}, Now: s.now},
		Instances: &attest.Instances{Hosts: s.d, Region: "us-south", Now: s.now}, Hosts: proofs,
		Tokens: &token.Issuer{Keys: keys, URL: s.Config.URL + "/identity", Now: s.now}, Sealer: s.Sealer, Journal: s.Config.Journal,
		Names: crn.DefaultNames, Now: s.now, OperatorAccount: s.Owner.AccountID,
	})
	s.Config.Auth = both{s.Config.Auth, s.grants}
	s.scheduler = &placement.Scheduler{Directory: s.d, Now: s.now, Log: s.Config.Log}
	hosts.Register(s.Mux, s.Config, hosts.Options{
		Scheduler: s.scheduler, Proofs: proofs, Grants: s.grants, Sealer: s.Sealer, KeyPrefix: "VSI-CR_us-south_", Stopping: s.stopping,
	})
	s.vpc = &vpc.VPC{
		ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "v",
		SecurityGroup: vpc.Ref{ID: "r006-" + uuid.NewString(), Name: "default"},
	}
	s.subnet = &vpc.Subnet{ID: "0717-" + uuid.NewString(), AccountID: s.Owner.AccountID, VPCID: s.vpc.ID, Zone: zone, CIDR: netip.MustParsePrefix("10.240.0.0/18"), Name: "s"}
	s.update(func(tx *directory.Tx) {
		s.d.VPCs.Put(tx, s.vpc)
		s.d.Subnets.Put(tx, s.subnet)
		s.d.SecurityGroups.Put(tx, vpc.DefaultGroup(s.vpc))
	})
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *stack) now() time.Time          { return time.Now().Add(time.Duration(s.offset.Load())) }
func (s *stack) advance(d time.Duration) { s.offset.Add(int64(d)) }

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	must(s.T, s.d.Update(context.Background(), s.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }))
}

// host is one that has joined, or wants to.
type host struct {
	s         *stack
	key       crypto.Signer
	id, keyID string
	token     string // access token
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return k
}

func sign(t testing.TB, key crypto.Signer, keyID, typ string, claims any) string {
	t.Helper()
	alg := jose.RS256
	if _, ok := key.(*ecdsa.PrivateKey); ok {
		alg = jose.ES256
	}
	o := &jose.SignerOptions{}
	if keyID != "" {
		o = o.WithHeader("kid", keyID)
	}
	if typ != "" {
		o = o.WithType(jose.ContentType(typ))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, o)
	must(t, err)
	payload, err := json.Marshal(claims)
	must(t, err)
	signed, err := signer.Sign(payload)
	must(t, err)
	raw, err := signed.CompactSerialize()
	must(t, err)
	return raw
}

func jwk(t testing.TB, key any) []byte {
	t.Helper()
	b, err := jose.JSONWebKey{Key: key, Use: "sig"}.MarshalJSON()
	must(t, err)
	return b
}

// proof are the claims of a good proof for a join token.
func (s *stack) proof(joinToken string) attest.HostProof {
	return attest.HostProof{
		Audience: []string{endpoint}, IssuedAt: s.now().Unix(), Expires: s.now().Add(time.Minute).Unix(), JTI: uuid.NewString(),
		Join: link.Fingerprint(joinToken),
	}
}

func (s *stack) joinToken(body map[string]any) string {
	s.T.Helper()
	return s.Do(apitest.Request{Method: "POST", Path: "/v1/hosts/join_tokens", Body: body}).Want(http.StatusCreated)["join_token"].(string)
}

func (s *stack) tryJoin(joinToken string, key crypto.Signer) *apitest.Response {
	s.T.Helper()
	return s.Do(apitest.Request{Method: "POST", Path: link.PathJoin, Anonymous: true, Body: link.JoinRequest{
		Token: joinToken, Key: jwk(s.T, key.Public()), Proof: sign(s.T, key, "", attest.TypeHostJoin, s.proof(joinToken)),
	}})
}

func (s *stack) join(joinToken string, key crypto.Signer) *host {
	s.T.Helper()
	answer := s.tryJoin(joinToken, key).Want(http.StatusCreated)
	h := &host{s: s, key: key, id: answer["id"].(string), keyID: answer["kid"].(string)}
	h.token = h.login()
	return h
}

// host makes one that has joined.
func (s *stack) host(name string) *host {
	s.T.Helper()
	return s.join(s.joinToken(map[string]any{"name": name, "zone": zone}), newKey(s.T))
}

func (h *host) assertion() attest.HostProof {
	return attest.HostProof{
		Issuer: h.id, Subject: h.id, Audience: []string{endpoint}, IssuedAt: h.s.now().Unix(), Expires: h.s.now().Add(time.Minute).Unix(), JTI: uuid.NewString(),
	}
}

func (h *host) tryLogin(claims attest.HostProof) (string, error) {
	h.s.T.Helper()
	a, err := h.s.grants.Host(context.Background(), grant.Origin{TransactionID: uuid.NewString(), Address: "192.0.2.1"}, grant.HostRequest{
		AssertionType: grant.AssertionType, Assertion: sign(h.s.T, h.key, h.keyID, attest.TypeHostAssertion, claims),
	})
	return a.AccessToken, err
}

func (h *host) login() string {
	h.s.T.Helper()
	t, err := h.tryLogin(h.assertion())
	must(h.s.T, err)
	return t
}

func (h *host) do(method, path string, body any) *apitest.Response {
	h.s.T.Helper()
	return h.s.Do(apitest.Request{Method: method, Path: path, Body: body, Header: map[string]string{"Authorization": "Bearer " + h.token}})
}

// code is the code of a fault on the agents' routes.
func code(r *apitest.Response) string {
	var b link.FaultBody
	_ = json.Unmarshal(r.Raw, &b)
	return b.Fault.Code
}

// instance puts one on a host.
func (s *stack) instance(hostID, status string) *vpc.Instance {
	s.T.Helper()
	s.addresses++
	id := "0717_" + uuid.NewString()
	i := &vpc.Instance{
		ID: id, AccountID: s.Owner.AccountID, Name: "vm-" + id[5:13], VPCID: s.vpc.ID, Zone: zone, HostID: hostID, Status: status, Profile: "bx2-2x8",
		CRN:      crn.DefaultNames.Of("is", zone, s.Owner.AccountID, "", "instance", id).String(),
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1}, UserData: "#cloud-config",
		Interfaces: []vpc.Interface{{
			ID: "0717-" + uuid.NewString(), SubnetID: s.subnet.ID, MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", s.addresses>>8, s.addresses&255),
			Address: netip.AddrFrom4([4]byte{10, 240, byte(s.addresses >> 8), byte(s.addresses)}),
		}},
	}
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, i) })
	return i
}

// change changes an instance.
func (s *stack) change(id string, f func(i *vpc.Instance)) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		i, ok := s.d.Instances.Get(id)
		if !ok {
			s.T.Error("the instance is gone")
			return
		}
		next := i.Clone()
		f(next)
		s.d.Instances.Put(tx, next)
	})
}

// profile makes a trusted profile that trusts an instance.
func (s *stack) profile(i *vpc.Instance) string {
	s.T.Helper()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: i.AccountID, Name: uuid.NewString()}
	s.update(func(tx *directory.Tx) {
		s.d.Profiles.Put(tx, p)
		s.d.Links.Put(tx, &identity.Link{ID: "Link-" + uuid.NewString(), ProfileID: p.ID, AccountID: i.AccountID, Name: i.Name, CRType: identity.VSI, CRN: i.CRN})
	})
	return p.ID
}

// identityToken is one for an instance, signed by the host.
func (h *host) identityToken(i *vpc.Instance) string {
	h.s.T.Helper()
	issuer := attest.IdentityIssuer("us-south")
	return sign(h.s.T, h.key, h.keyID, "JWT", attest.IdentityClaims{
		Issuer: issuer, Audience: []string{issuer}, IssuedAt: h.s.now().Unix(), Expires: h.s.now().Add(5 * time.Minute).Unix(), JTI: uuid.NewString(),
		IaaS: attest.IaaS{CRN: i.CRN, AccountID: i.AccountID, InstanceID: i.ID, Zone: i.Zone, Region: "us-south"},
	})
}

func (h *host) exchange(i *vpc.Instance, identityToken, profileID string) *apitest.Response {
	h.s.T.Helper()
	return h.do("POST", link.PathExchange, link.Exchange{
		Instance: i.ID, Token: identityToken, ProfileID: profileID, Address: i.Interfaces[0].Address.String(), Agent: "curl",
	})
}

// event is what a metadata service records about an instance.
func event(s *stack, i *vpc.Instance) *activity.Event {
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: s.now()}, Action: "is.metadata.jwt-token.create", Severity: activity.Normal,
		Message: "Virtual Server for VPC: create identity token for " + i.Name, CorrelationID: uuid.NewString(), AccountID: i.AccountID, LogSourceCRN: i.CRN,
		Initiator: activity.Initiator{
			ID: crn.IAMIDOfCRN(i.CRN), Name: i.Name, TypeURI: activity.ComputeType, AuthnID: crn.IAMIDOfCRN(i.CRN), AuthnName: i.Name,
			Credential: activity.Credential{Type: "compute-resource"}, Host: activity.Host{Address: i.Interfaces[0].Address.String(), AddressType: "IPv4", Agent: "curl"},
		},
		Target:   activity.Target{ID: i.CRN, Name: i.Name, TypeURI: "is.instance/instance"},
		Observer: activity.Observer{Name: "ActivityTracker"},
	}
	e.SetReason(http.StatusOK, "")
	return e
}

func (h *host) events(outbox string, first int64, events ...any) *apitest.Response {
	h.s.T.Helper()
	b := link.Events{Outbox: outbox, First: first}
	for _, e := range events {
		raw, ok := e.(json.RawMessage)
		if !ok {
			var err error
			raw, err = json.Marshal(e)
			must(h.s.T, err)
		}
		b.Events = append(b.Events, raw)
	}
	return h.do("POST", link.PathEvents, b)
}

// serve lets clients reach the installation over the network.
func (s *stack) serve() *httptest.Server {
	srv := httptest.NewServer(api.WithTransaction(s.Mux))
	s.T.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
		http.DefaultClient.CloseIdleConnections()
	})
	return srv
}

// open opens a stream.
func (h *host) open(srv *httptest.Server) *reader {
	h.s.T.Helper()
	capacity, err := json.Marshal(link.Capacity{Drivers: []string{"netns"}, VCPUs: 4, MemoryMiB: 8192, Version: "test"})
	must(h.s.T, err)
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+link.PathStream+"?capacity="+url.QueryEscape(string(capacity)), nil)
	must(h.s.T, err)
	req.Header.Set("Authorization", "Bearer "+h.token)
	resp, err := srv.Client().Do(req)
	must(h.s.T, err)
	h.s.T.Cleanup(func() { cancel(); resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		h.s.T.Fatalf("status %d: %s", resp.StatusCode, b)
	}
	r := &reader{s: h.s, lines: make(chan link.Message, 1000), holds: map[string]*vpc.Placement{}, cancel: cancel, status: resp.StatusCode}
	go func() {
		defer close(r.lines)
		in := bufio.NewScanner(resp.Body)
		in.Buffer(nil, link.MaxMessage+1)
		for in.Scan() {
			var m link.Message
			if json.Unmarshal(bytes.Clone(in.Bytes()), &m) == nil {
				r.lines <- m
			}
		}
	}()
	return r
}

// reader is the other end of a stream.
type reader struct {
	s      *stack
	lines  chan link.Message
	holds  map[string]*vpc.Placement
	cancel func()
	status int
}

const patience = 10 * time.Second

// until reads on until a message is the one, and keeps what the stream says.
func (r *reader) until(is func(link.Message) bool) {
	r.s.T.Helper()
	end := time.After(patience)
	for {
		select {
		case m, ok := <-r.lines:
			if !ok {
				r.s.T.Fatal("the stream has ended")
			}
			if m.Placement != nil {
				r.holds[m.Placement.Instance.ID] = m.Placement
			}
			delete(r.holds, m.Gone)
			if is(m) {
				return
			}
		case <-end:
			r.s.T.Fatal("the message does not come")
		}
	}
}

func (r *reader) synced() { r.s.T.Helper(); r.until(func(m link.Message) bool { return m.Synced }) }

// ends waits for the end of the stream.
func (r *reader) ends() time.Duration {
	r.s.T.Helper()
	began := time.Now()
	for {
		select {
		case _, ok := <-r.lines:
			if !ok {
				return time.Since(began)
			}
		case <-time.After(patience):
			r.s.T.Fatal("the stream does not end")
		}
	}
}

// instanceLogin exchanges an identity token as the metadata service of the
// server's own machine does, without any host's word.
func instanceLogin(s *stack, i *vpc.Instance, identityToken, profileID string) (grant.Answer, error) {
	return s.grants.Instance(context.Background(), grant.Origin{TransactionID: uuid.NewString(), Address: "192.0.2.1"}, grant.InstanceRequest{
		Token: identityToken, Instance: i.ID, Profile: grant.Selector{ID: profileID},
	})
}

// runScheduler lets the scheduler work until the test ends.
func (s *stack) runScheduler() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.scheduler.Run(ctx) }()
	s.T.Cleanup(func() { cancel(); <-done })
}

// status waits until an instance has the status.
func (s *stack) status(id, want string) {
	s.T.Helper()
	last := "(gone)"
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if i, ok := s.d.Instances.Get(id); ok {
			if last = i.Status; last == want {
				return
			}
		}
	}
	s.T.Fatalf("the instance is %s, not %s", last, want)
}
