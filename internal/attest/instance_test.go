package attest_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt/jwttest"
	"tabard.dev/tabard/internal/trust"
	"tabard.dev/tabard/internal/vpc"
)

// machines are the hosts and instances that the verifier knows.
type machines struct {
	hosts     map[string]*cluster.Host // by key id
	instances map[string]*vpc.Instance
}

func (m machines) HostOfKey(keyID string) (*cluster.Host, bool) {
	h, ok := m.hosts[keyID]
	return h, ok
}
func (m machines) Instance(id string) (*vpc.Instance, bool) { i, ok := m.instances[id]; return i, ok }
func (m machines) ResourceGroupName(string) string          { return "default" }

// server is a verifier with two hosts, h1 and h2, that run an instance each,
// i1 and i2.
type server struct {
	*attest.Instances
	machines
	clock *clock
	keys  map[string]*ecdsa.PrivateKey // by key id: k1 of h1, k2 of h2
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{clock: newClock(), keys: map[string]*ecdsa.PrivateKey{}}
	s.machines = machines{hosts: map[string]*cluster.Host{}, instances: map[string]*vpc.Instance{}}
	for _, n := range []string{"1", "2"} {
		key := jwttest.Key(t, elliptic.P256())
		s.keys["k"+n] = key
		s.hosts["k"+n] = &cluster.Host{ID: "h" + n, Name: "host-" + n, JWKS: jwttest.Set(t, jwttest.JWK(key.Public(), "k"+n, "ES256"))}
		s.instances["i"+n] = &vpc.Instance{
			ID: "i" + n, AccountID: home, Name: "my-instance-" + n, CRN: "crn:v1:bluemix:public:is:us-south-1:a/" + home + "::instance:i" + n,
			Zone: "us-south-1", VPCID: "vpc-1", ResourceGroupID: "rg-1", HostID: "h" + n, Status: vpc.Running,
			Interfaces: []vpc.Interface{{ID: "n1", SubnetID: "subnet-1"}, {ID: "n2", SubnetID: "subnet-2"}},
		}
	}
	s.Instances = &attest.Instances{Hosts: s.machines, Region: "us-south", Now: s.clock.Now}
	return s
}

// claims are those of a good token of instance i1 with some of them replaced;
// nil takes one away.
func (s *server) claims(change object) string {
	m := object{
		"iss": "VSI-CR_us-south", "aud": []string{"VSI-CR_us-south", "x_1"}, "nonce": "n", "jti": "j",
		"iat": s.clock.Now().Unix(), "exp": s.clock.Now().Add(5 * time.Minute).Unix(), "iaas": s.iaas("i1", nil),
	}
	for k, v := range change {
		if m[k] = v; v == nil {
			delete(m, k)
		}
	}
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (s *server) iaas(id string, change object) object {
	i := s.instances[id]
	m := object{"crn": i.CRN, "accountID": i.AccountID, "instanceID": i.ID, "zone": i.Zone, "region": "us-south", "resource_group_id": "rg-1"}
	for k, v := range change {
		m[k] = v
	}
	return m
}

func (s *server) token(t *testing.T, kid string, change object) string {
	t.Helper()
	return jwttest.ES256(t, s.keys[kid], kid, s.claims(change), "")
}

func TestAnIdentityTokenIsEvidenceOfItsInstance(t *testing.T) {
	s := newServer(t)
	proof, claims, err := s.Verify("\n" + s.token(t, "k1", nil) + "\n")
	if err != nil {
		t.Fatal(err)
	}
	wantTrace(t, proof.Trace, instanceChecks, "")
	ev := proof.Evidence
	if ev.Type != identity.VSI || ev.CRN.String() != s.instances["i1"].CRN || ev.AccountID != home || ev.Name != "my-instance-1" {
		t.Errorf("evidence %+v", ev)
	}
	want := object{
		"crn": s.instances["i1"].CRN, "resource": "i1", "region": "us-south", "zone": "us-south-1", "vpc_id": "vpc-1",
		"subnet_id": []string{"subnet-1", "subnet-2"}, "resource_group_id": "rg-1", "resource_group_name": "default",
	}
	if fmt.Sprint(ev.Claims) != fmt.Sprint(want) {
		t.Errorf("claims %v, want %v", ev.Claims, want)
	}
	for name := range ev.Claims {
		if !slices.Contains(trust.ClaimsOf(identity.VSI), name) {
			t.Errorf("claim %s is proved but not said to be", name)
		}
	}
	if claims.IaaS.InstanceID != "i1" || claims.Nonce != "n" || claims.JTI != "j" {
		t.Errorf("claims %+v", claims)
	}
}

// What the host says about the instance beyond its name does not count: the
// directory knows better.
func TestWhatAHostSaysAboutAnInstanceIsNotBelieved(t *testing.T) {
	s := newServer(t)
	proof, _, err := s.Verify(s.token(t, "k1", object{
		"iaas": s.iaas("i1", object{"zone": "forged", "region": "forged", "resource_group_id": "forged"}),
		"vpc":  object{"id": "forged"}, "subnets": []object{{"id": "forged"}},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(proof.Evidence); strings.Contains(text, "forged") {
		t.Errorf("evidence %s", text)
	}
}

func TestEachFaultOfAnIdentityTokenHasItsReason(t *testing.T) {
	s := newServer(t)
	now := s.clock.Now()
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	with := func(change object) string { return s.token(t, "k1", change) }
	of := func(id string, change object) string { return with(object{"iaas": s.iaas(id, change)}) }
	attacker := jwttest.Key(t, elliptic.P256())
	part := strings.Split(with(nil), ".")
	type refusal struct {
		reason attest.Reason
		check  string
	}
	malformed, unknown := refusal{attest.Malformed, attest.CheckForm}, refusal{attest.UnknownIssuer, attest.CheckIssuer}
	signature, audience := refusal{attest.BadSignature, attest.CheckSignature}, refusal{attest.WrongAudience, attest.CheckAudience}
	expired, badTime := refusal{attest.Expired, attest.CheckTime}, refusal{attest.BadTime, attest.CheckTime}
	revoked := refusal{attest.Revoked, attest.CheckHost}
	s.hosts["k4"] = &cluster.Host{ID: "h4", Name: "host-4", Revoked: true, JWKS: jwttest.Set(t, jwttest.JWK(attacker.Public(), "k4", "ES256"))}
	s.hosts["k5"] = &cluster.Host{ID: "h1", Name: "host-1", JWKS: jwttest.Set(t,
		jwttest.JWK(attacker.Public(), "k5", "ES256"), jwttest.JWK(s.keys["k1"].Public(), "k5", "ES256"))}
	encryption := jwttest.JWK(s.keys["k1"].Public(), "k6", "ES256")
	encryption.Use = "enc"
	s.hosts["k6"] = &cluster.Host{ID: "h1", Name: "host-1", JWKS: jwttest.Set(t, encryption)}
	s.hosts["k7"] = &cluster.Host{ID: "h1", Name: "host-1", JWKS: jwttest.Set(t, jwttest.JWK(s.keys["k1"].Public(), "k7", "RS256"))}
	claims, misplaced := refusal{attest.BadClaims, attest.CheckClaims}, refusal{attest.Misplaced, attest.CheckPlacement}

	for _, tt := range []struct {
		name string
		raw  string
		want refusal
	}{
		{"nothing", "", malformed},
		{"alg none", jwttest.Sign(t, `{"alg":"none","kid":"k1"}`, s.claims(nil), nil, 256), malformed},
		{"an algorithm that hosts do not use", jwttest.Sign(t, `{"alg":"ES384","kid":"k1"}`, s.claims(nil), jwttest.Key(t, elliptic.P384()), 384), malformed},
		{"the type of a refresh token", jwttest.ES256(t, s.keys["k1"], "k1", s.claims(nil), `,"typ":"rt+jwt"`), malformed},
		{"a key of no host", jwttest.ES256(t, attacker, "k3", s.claims(nil), ""), unknown},
		{"no key id", jwttest.Sign(t, `{"alg":"ES256"}`, s.claims(nil), s.keys["k1"], 256), unknown},

		{"the key of a revoked host", jwttest.ES256(t, attacker, "k4", s.claims(nil), ""), revoked},
		{"anything under the key id of a revoked host", jwttest.ES256(t, s.keys["k1"], "k4", s.claims(nil), ""), revoked},

		{"one of two keys with one id", jwttest.ES256(t, attacker, "k5", s.claims(nil), ""), signature},
		{"the other of two keys with one id", jwttest.ES256(t, s.keys["k1"], "k5", s.claims(nil), ""), signature},
		{"a key that is not for signing", jwttest.ES256(t, s.keys["k1"], "k6", s.claims(nil), ""), signature},
		{"a key of another algorithm", jwttest.ES256(t, s.keys["k1"], "k7", s.claims(nil), ""), signature},
		{"an attacker's key under the host's key id", jwttest.ES256(t, attacker, "k1", s.claims(nil), ""), signature},
		{"another host's key under the host's key id", jwttest.ES256(t, s.keys["k2"], "k1", s.claims(nil), ""), signature},
		{"an RSA header", jwttest.Sign(t, `{"alg":"RS256","kid":"k1"}`, s.claims(nil), jwttest.RSA(t), 256), signature},
		{"an empty signature", part[0] + "." + part[1] + ".", signature},
		{"changed claims", part[0] + "." + strings.Split(of("i2", nil), ".")[1] + "." + part[2], signature},

		{"another region", with(object{"iss": "VSI-CR_eu-de", "aud": []string{"VSI-CR_eu-de"}}), audience},
		{"the issuer of another region", with(object{"iss": "VSI-CR_eu-de"}), audience},
		{"the audience of another region", with(object{"aud": []string{"VSI-CR_eu-de"}}), audience},
		{"no issuer", with(object{"iss": nil}), audience},
		{"no audience", with(object{"aud": nil}), audience},
		{"the issuer under another name", with(object{"iss": nil, "ISS": "VSI-CR_us-south"}), audience},

		{"expired", with(object{"exp": at(0), "iat": at(-time.Minute)}), expired},
		{"no end", with(object{"exp": nil}), badTime},
		{"no beginning", with(object{"iat": nil}), badTime},
		{"made in the future", with(object{"iat": at(31 * time.Second)}), badTime},
		{"living for more than an hour", with(object{"exp": at(time.Hour + time.Second)}), badTime},
		{"made before time began", with(object{"iat": -1}), badTime},
		{"made so long ago that the subtraction overflows", with(object{"iat": math.MinInt64, "exp": at(1000 * time.Hour)}), badTime},

		{"an instance that does not exist", of("i1", object{"instanceID": "i3"}), claims},
		{"no instance", with(object{"iaas": nil}), claims},
		{"the CRN of another instance", of("i1", object{"crn": s.instances["i2"].CRN}), claims},
		{"another account", of("i1", object{"accountID": away}), claims},
		{"no account", of("i1", object{"accountID": ""}), claims},
		{"an instance's name in the wrong case", of("i1", object{"instanceID": "I1"}), claims},

		{"the instance of another host", of("i2", nil), misplaced},
		{"another host's word about this instance", s.token(t, "k2", nil), misplaced},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proof, c, err := s.Verify(tt.raw)
			if c != nil || proof.Trace != nil || proof.Evidence.AccountID != "" {
				t.Errorf("a refused token gave %+v and %+v", proof, c)
			}
			wantRefusal(t, err, tt.want.reason, instanceChecks, tt.want.check)
		})
	}
}

func TestAHostThatIsRevokedVouchesForNothingFromThenOn(t *testing.T) {
	s := newServer(t)
	raw := s.token(t, "k1", nil)
	if _, _, err := s.Verify(raw); err != nil {
		t.Fatal(err)
	}
	s.hosts["k1"].Revoked = true
	_, _, err := s.Verify(raw)
	wantRefusal(t, err, attest.Revoked, instanceChecks, attest.CheckHost)
	if _, _, err := s.Verify(s.token(t, "k2", object{"iaas": s.iaas("i2", nil)})); err != nil {
		t.Errorf("the other host: %v", err)
	}
	s.hosts["k1"].Revoked = false
	if _, _, err := s.Verify(raw); err != nil {
		t.Errorf("after it has joined again: %v", err)
	}
}

func TestAHostsOldKeyStopsCountingWhenItIsReplaced(t *testing.T) {
	s := newServer(t)
	raw := s.token(t, "k1", nil)
	if _, _, err := s.Verify(raw); err != nil {
		t.Fatal(err)
	}
	next := jwttest.Key(t, elliptic.P256())
	s.hosts["k1"].JWKS = jwttest.Set(t, jwttest.JWK(next.Public(), "k1", "ES256"))
	_, _, err := s.Verify(raw)
	wantRefusal(t, err, attest.BadSignature, instanceChecks, attest.CheckSignature)
	s.keys["k1"] = next
	if _, _, err := s.Verify(s.token(t, "k1", nil)); err != nil {
		t.Errorf("the new key: %v", err)
	}
}

func TestAnInstanceWithABrokenRecordIsNoEvidence(t *testing.T) {
	s := newServer(t)
	s.instances["i1"].CRN = "not a crn"
	_, _, err := s.Verify(s.token(t, "k1", nil))
	wantRefusal(t, err, attest.BadClaims, instanceChecks, attest.CheckClaims)
}

func TestOnlyAnInstanceThatRunsIsEvidence(t *testing.T) {
	for _, status := range []string{
		vpc.Pending, vpc.Starting, vpc.Stopping, vpc.Stopped, vpc.Restarting, vpc.Deleting, vpc.Failed, "", "RUNNING",
	} {
		s := newServer(t)
		raw := s.token(t, "k1", nil)
		if _, _, err := s.Verify(raw); err != nil {
			t.Fatal(err)
		}
		s.instances["i1"].Status = status
		_, _, err := s.Verify(raw)
		wantRefusal(t, err, attest.Misplaced, instanceChecks, attest.CheckPlacement)
	}
}

func TestAnInstanceThatMovedIsNotItsOldHostsAnyMore(t *testing.T) {
	s := newServer(t)
	raw := s.token(t, "k1", nil)
	s.instances["i1"].HostID = "h2"
	_, _, err := s.Verify(raw)
	wantRefusal(t, err, attest.Misplaced, instanceChecks, attest.CheckPlacement)
	if _, _, err := s.Verify(s.token(t, "k2", nil)); err != nil {
		t.Errorf("its new host: %v", err)
	}
}

func TestADeletedInstanceIsNoEvidence(t *testing.T) {
	s := newServer(t)
	raw := s.token(t, "k1", nil)
	delete(s.instances, "i1")
	_, _, err := s.Verify(raw)
	wantRefusal(t, err, attest.BadClaims, instanceChecks, attest.CheckClaims)
}

func TestAHostWhoseKeysCannotBeReadVouchesForNothing(t *testing.T) {
	for name, jwks := range map[string]string{"garbage": "{", "no keys": `{"keys":[]}`, "nothing": ""} {
		s := newServer(t)
		raw := s.token(t, "k1", nil)
		s.hosts["k1"].JWKS = []byte(jwks)
		_, _, err := s.Verify(raw)
		if r := wantRefusal(t, err, attest.BadSignature, instanceChecks, attest.CheckSignature); r.Cause == nil {
			t.Errorf("%s: no cause", name)
		}
	}
}

func TestAHeaderCannotChooseTheHostsKey(t *testing.T) {
	s := newServer(t)
	attacker := jwttest.Key(t, elliptic.P256())
	hostile := map[string]string{}
	for name, more := range jwttest.Headers(t, attacker, "k1") {
		hostile["the header "+name] = jwttest.ES256(t, attacker, "k1", s.claims(nil), more)
	}
	for _, kid := range jwttest.KeyIDs {
		hostile[fmt.Sprintf("the key id %q", kid)] = jwttest.ES256(t, attacker, kid, s.claims(nil), "")
	}
	for name, secret := range jwttest.SecretsOf(t, s.keys["k1"].Public(), "k1") {
		hostile["HMAC with the public key as "+name] = jwttest.Sign(t, `{"alg":"HS256","kid":"k1"}`, s.claims(nil), secret, 256)
	}
	for name, raw := range hostile {
		t.Run(name, func(t *testing.T) {
			_, c, err := s.Verify(raw)
			var r *attest.Refusal
			if c != nil || !errors.As(err, &r) || r.Reason != attest.Malformed && r.Reason != attest.UnknownIssuer && r.Reason != attest.BadSignature {
				t.Errorf("claims %+v, error %v", c, err)
			}
		})
	}
}

// A service-account token is no identity token, and the other way round.
func TestTokensOfOneSourceAreNothingToTheOther(t *testing.T) {
	s, p := newServer(t), newPod(t)
	if _, _, err := s.Verify(p.token(t, nil)); err == nil {
		t.Error("a service-account token passed for an identity token")
	}
	if proofs, _, err := p.Verify(ctx, s.token(t, "k1", nil)); err == nil {
		t.Errorf("an identity token passed for a service-account token: %v", proofs)
	}
}

// own is the verifier of host h1, which knows nothing but its key and what is
// placed on it.
func (s *server) own(t *testing.T) *attest.OwnInstances {
	t.Helper()
	return &attest.OwnInstances{HostID: "h1", Keys: ownKeys{"k1": s.keys["k1"].Public()}, Placements: s, Region: "us-south", Now: s.clock.Now}
}

type ownKeys map[string]crypto.PublicKey

func (k ownKeys) Public(id string) (crypto.PublicKey, bool) { key, ok := k[id]; return key, ok }

func (s *server) Placement(id string) (*vpc.Placement, bool) {
	i, ok := s.instances[id]
	if !ok {
		return nil, false
	}
	return &vpc.Placement{Instance: *i, ResourceGroup: vpc.Ref{ID: "rg-1", Name: "default"}}, true
}

func TestAHostChecksItsOwnTokensAsTheServerDoes(t *testing.T) {
	s := newServer(t)
	o := s.own(t)
	raw := s.token(t, "k1", nil)
	proof, claims, err := o.Verify(raw)
	if err != nil {
		t.Fatal(err)
	}
	wantTrace(t, proof.Trace, ownChecks, "")
	central, _, err := s.Verify(raw)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(proof.Evidence) != fmt.Sprint(central.Evidence) || claims.IaaS.InstanceID != "i1" {
		t.Errorf("evidence %+v, the server has %+v", proof.Evidence, central.Evidence)
	}
	part := strings.Split(raw, ".")
	now := s.clock.Now().Unix()
	for name, tt := range map[string]struct {
		raw    string
		reason attest.Reason
		check  string
	}{
		"nothing":                   {"", attest.Malformed, attest.CheckForm},
		"another host's key":        {s.token(t, "k2", nil), attest.UnknownIssuer, attest.CheckIssuer},
		"another key under our id":  {jwttest.ES256(t, s.keys["k2"], "k1", s.claims(nil), ""), attest.BadSignature, attest.CheckSignature},
		"no signature":              {part[0] + "." + part[1] + ".", attest.BadSignature, attest.CheckSignature},
		"another region":            {s.token(t, "k1", object{"iss": "VSI-CR_eu-de"}), attest.WrongAudience, attest.CheckAudience},
		"expired":                   {s.token(t, "k1", object{"iat": now - 10, "exp": now}), attest.Expired, attest.CheckTime},
		"an instance nobody has":    {s.token(t, "k1", object{"iaas": s.iaas("i1", object{"instanceID": "i3"})}), attest.BadClaims, attest.CheckClaims},
		"another instance's CRN":    {s.token(t, "k1", object{"iaas": s.iaas("i1", object{"crn": s.instances["i2"].CRN})}), attest.BadClaims, attest.CheckClaims},
		"another host's instance":   {s.token(t, "k1", object{"iaas": s.iaas("i2", nil)}), attest.Misplaced, attest.CheckPlacement},
		"an algorithm with secrets": {jwttest.Sign(t, `{"alg":"HS256","kid":"k1"}`, s.claims(nil), []byte("x"), 256), attest.Malformed, attest.CheckForm},
	} {
		t.Run(name, func(t *testing.T) {
			_, c, err := o.Verify(tt.raw)
			if c != nil {
				t.Errorf("a refused token gave %+v", c)
			}
			wantRefusal(t, err, tt.reason, ownChecks, tt.check)
		})
	}
	s.instances["i1"].Status = vpc.Stopped
	_, _, err = o.Verify(raw)
	wantRefusal(t, err, attest.Misplaced, ownChecks, attest.CheckPlacement)
	delete(s.instances, "i1")
	_, _, err = o.Verify(raw)
	wantRefusal(t, err, attest.BadClaims, ownChecks, attest.CheckClaims)
}
