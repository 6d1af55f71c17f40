package attest

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/trust"
	"tabard.dev/tabard/internal/vpc"
)

// IdentityClaims are an instance identity token's
// (reference/instance-metadata-and-vpc.md section 1.5, with jti added). The
// mixed spelling of the iaas names is part of the contract.
type IdentityClaims struct {
	Issuer    string           `json:"iss"`
	Audience  josejwt.Audience `json:"aud"`
	IssuedAt  int64            `json:"iat"`
	Expires   int64            `json:"exp"`
	JTI       string           `json:"jti"`
	Nonce     string           `json:"nonce,omitempty"`
	IaaS      IaaS             `json:"iaas"`
	Addresses []Address        `json:"ip_addresses"`
	Subnets   []Named          `json:"subnets"`
	VPC       Named            `json:"vpc"`
}

// IaaS says which instance the token is about.
type IaaS struct {
	CRN           string `json:"crn"`
	AccountID     string `json:"accountID"`
	InstanceID    string `json:"instanceID"`
	Zone          string `json:"zone"`
	Region        string `json:"region"`
	Profile       string `json:"profile_name"` // hardware profile
	ResourceGroup string `json:"resource_group_id"`
}

// Address is one address of the instance.
type Address struct {
	Address string `json:"address"`
}

// Named is a reference in a token.
type Named struct {
	CRN  string `json:"crn"`
	Name string `json:"name"`
	ID   string `json:"id"`
}

// IdentityIssuer is the iss, and one aud, of a region's identity tokens.
func IdentityIssuer(region string) string { return "VSI-CR_" + region }

// Hosts is the part of the directory that tells whose signature counts, and
// for which instances.
type Hosts interface {
	// HostOfKey returns the one host that signs with a key id, revoked or not. A
	// key id that several hosts claim is nobody's.
	HostOfKey(keyID string) (*cluster.Host, bool)
	Instance(id string) (*vpc.Instance, bool)
	ResourceGroupName(id string) string
}

// Instances verifies instance identity tokens where they are exchanged: a
// registered host's signature over an instance that is placed on it and runs.
type Instances struct {
	Hosts  Hosts
	Region string
	Now    func() time.Time

	mu   sync.Mutex
	sets map[string]parsedKeys // by host id
}

// parsedKeys is a host's key set, parsed once for as long as it stays the same.
type parsedKeys struct {
	jwks []byte
	keys []jose.JSONWebKey
}

// maxParsed bounds the hosts whose keys are kept parsed; it is above the ten
// thousand hosts that an installation is built for.
const maxParsed = 16 << 10

var (
	instanceChecks = []string{CheckForm, CheckIssuer, CheckHost, CheckSignature, CheckAudience, CheckTime, CheckClaims, CheckPlacement}
	ownChecks      = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims, CheckPlacement}
	instanceAlgs   = []jose.SignatureAlgorithm{jose.RS256, jose.ES256}
)

// Verify returns the evidence that an identity token gives, and its claims. The
// error is a *Refusal.
func (i *Instances) Verify(raw string) (Proof, *IdentityClaims, error) {
	s := steps{names: instanceChecks}
	t, r := identityForm(&s, raw)
	if r != nil {
		return Proof{}, nil, r
	}
	host, ok := i.Hosts.HostOfKey(t.KeyID)
	if !ok {
		return Proof{}, nil, s.refuse(UnknownIssuer, CheckIssuer, "a key of a registered host", "kid "+t.KeyID,
			"The identity token was not signed by a registered host.")
	}
	s.pass(CheckIssuer, "a key of a registered host", "host "+host.Name)
	if host.Revoked {
		return Proof{}, nil, s.refuse(Revoked, CheckHost, "a host that is not revoked", "host "+host.Name+" is revoked",
			"The host that signed the identity token is revoked; let it join again, or move its instances.")
	}
	s.pass(CheckHost, "a host that is not revoked", "host "+host.Name)

	key, err := i.keyOf(host, t)
	if err != nil {
		r := s.refuse(BadSignature, CheckSignature, "signature of host "+host.Name, err.Error(), "The identity token's signature does not verify.")
		r.Cause = err
		return Proof{}, nil, r
	}
	claims, r := i.rules().claims(&s, t, key, "host "+host.Name)
	if r != nil {
		return Proof{}, nil, r
	}
	inst, ok := i.Hosts.Instance(claims.IaaS.InstanceID)
	if !ok {
		inst = nil
	}
	name, r := identityPlacement(&s, claims, inst, host.ID, "host "+host.Name)
	if r != nil {
		return Proof{}, nil, r
	}
	return Proof{
		Evidence: instanceEvidence(inst, name, i.Region, i.Hosts.ResourceGroupName(inst.ResourceGroupID)), Trace: s.trace,
	}, claims, nil
}

// EvidenceOf is the evidence that an identity token of an instance gives once
// all its checks have passed. An error says that the instance's record is broken.
func (i *Instances) EvidenceOf(inst *vpc.Instance) (trust.Evidence, error) {
	name, err := crn.Parse(inst.CRN)
	if err != nil {
		return trust.Evidence{}, fmt.Errorf("CRN of instance %s: %w", inst.ID, err)
	}
	return instanceEvidence(inst, name, i.Region, i.Hosts.ResourceGroupName(inst.ResourceGroupID)), nil
}

func (i *Instances) rules() identityRules { return identityRules{region: i.Region, now: i.Now} }

// keyOf returns the key of the host that a token names. Two keys under one id
// are none: it would be left to chance which one counts.
func (i *Instances) keyOf(host *cluster.Host, t *jwt.Token) (crypto.PublicKey, error) {
	keys, err := i.parsed(host)
	if err != nil {
		return nil, fmt.Errorf("keys of host %s: %w", host.Name, err)
	}
	if keys, err = pick(keys, t.KeyID); err != nil {
		return nil, err
	}
	key := keys[0]
	switch {
	case len(keys) != 1:
		return nil, fmt.Errorf("%d keys of host %s have the id %s", len(keys), host.Name, t.KeyID)
	case key.Use != "" && key.Use != "sig":
		return nil, fmt.Errorf("the key is for use %q", key.Use)
	case key.Algorithm != "" && key.Algorithm != t.Alg:
		return nil, errors.New("the key is for " + key.Algorithm + ", the token says " + t.Alg)
	}
	return key.Key, nil
}

// parsed returns the keys of a host. They are kept by their text and not by the
// host's revision, so that whatever changes the text counts at once.
func (i *Instances) parsed(host *cluster.Host) ([]jose.JSONWebKey, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if known, ok := i.sets[host.ID]; ok && bytes.Equal(known.jwks, host.JWKS) {
		return known.keys, nil
	}
	keys, err := ParseKeys(host.JWKS)
	if err != nil {
		delete(i.sets, host.ID)
		return nil, err
	}
	if i.sets == nil || len(i.sets) >= maxParsed {
		i.sets = map[string]parsedKeys{}
	}
	i.sets[host.ID] = parsedKeys{jwks: bytes.Clone(host.JWKS), keys: keys}
	return keys, nil
}

// PublicKeys are the keys that a host signs with.
type PublicKeys interface {
	// Public returns the key with an id, if its tokens may still live.
	Public(keyID string) (crypto.PublicKey, bool)
}

// Placements tells which instances are placed on a host.
type Placements interface {
	Placement(instanceID string) (*vpc.Placement, bool)
}

// OwnInstances verifies identity tokens on the host that made them, for its own
// metadata service: it needs nothing but the host's public keys and what is
// placed on it. It is not for IAM, which believes no host about itself.
type OwnInstances struct {
	HostID     string
	Keys       PublicKeys
	Placements Placements
	Region     string
	Now        func() time.Time
}

// Verify is as that of Instances.
func (o *OwnInstances) Verify(raw string) (Proof, *IdentityClaims, error) {
	const me = "this host"
	s := steps{names: ownChecks}
	t, r := identityForm(&s, raw)
	if r != nil {
		return Proof{}, nil, r
	}
	key, ok := o.Keys.Public(t.KeyID)
	if !ok {
		return Proof{}, nil, s.refuse(UnknownIssuer, CheckIssuer, "a key of this host", "kid "+t.KeyID,
			"The identity token was not signed by this host.")
	}
	s.pass(CheckIssuer, "a key of this host", "kid "+t.KeyID)
	claims, r := identityRules{region: o.Region, now: o.Now}.claims(&s, t, key, me)
	if r != nil {
		return Proof{}, nil, r
	}
	var inst *vpc.Instance
	p, ok := o.Placements.Placement(claims.IaaS.InstanceID)
	if ok && p.Instance.ID == claims.IaaS.InstanceID {
		inst = &p.Instance
	}
	name, r := identityPlacement(&s, claims, inst, o.HostID, me)
	if r != nil {
		return Proof{}, nil, r
	}
	return Proof{Evidence: instanceEvidence(inst, name, o.Region, p.ResourceGroup.Name), Trace: s.trace}, claims, nil
}

func identityForm(s *steps, raw string) (*jwt.Token, *Refusal) {
	t, err := jwt.Parse(strings.TrimSpace(raw), instanceAlgs, "", "JWT")
	if err != nil {
		r := s.refuse(Malformed, CheckForm, "a signed JWT", err.Error(), "The identity token is not a JWT that can be checked.")
		r.Cause = err
		return nil, r
	}
	s.pass(CheckForm, "a signed JWT", t.Alg+" kid "+t.KeyID)
	return t, nil
}

// identityRules are those that a token must meet whoever checks it.
type identityRules struct {
	region string
	now    func() time.Time
}

// claims checks signature, audience and time, and returns what was signed.
func (i identityRules) claims(s *steps, t *jwt.Token, key crypto.PublicKey, signer string) (*IdentityClaims, *Refusal) {
	var claims IdentityClaims
	if err := t.Verify(key, &claims); err != nil {
		r := s.refuse(BadSignature, CheckSignature, "signature of "+signer, err.Error(), "The identity token's signature does not verify.")
		r.Cause = err
		return nil, r
	}
	s.pass(CheckSignature, "signature of "+signer, t.Alg+" kid "+t.KeyID)
	issuer := IdentityIssuer(i.region)
	if claims.Issuer != issuer || !claims.Audience.Contains(issuer) {
		return nil, s.refuse(WrongAudience, CheckAudience, issuer, "iss "+claims.Issuer+", aud "+strings.Join(claims.Audience, ", "),
			"The identity token was made for another region.")
	}
	s.pass(CheckAudience, issuer, strings.Join(claims.Audience, ", "))
	if r := checkTime(s, i.now(), claims.IssuedAt, 0, claims.Expires); r != nil {
		return nil, r
	}
	return &claims, nil
}

// identityPlacement checks that the instance, nil for none, is the one that the
// token is about, and that it runs on the host.
func identityPlacement(s *steps, claims *IdentityClaims, inst *vpc.Instance, hostID, signer string) (crn.CRN, *Refusal) {
	if inst == nil || inst.CRN != claims.IaaS.CRN || inst.AccountID != claims.IaaS.AccountID {
		return crn.CRN{}, s.refuse(BadClaims, CheckClaims, "an instance that exists", claims.IaaS.CRN, "The instance does not exist.")
	}
	name, err := crn.Parse(inst.CRN)
	if err != nil {
		return crn.CRN{}, s.refuse(BadClaims, CheckClaims, "an instance CRN", inst.CRN, "The instance's record is broken.")
	}
	s.pass(CheckClaims, "an instance that exists", inst.CRN)
	wanted := "running on " + signer
	found := fmt.Sprintf("%s on host %s", inst.Status, inst.HostID)
	if inst.HostID != hostID || inst.Status != vpc.Running {
		return crn.CRN{}, s.refuse(Misplaced, CheckPlacement, wanted, found,
			"The host may vouch only for instances that are placed and running on it.")
	}
	s.pass(CheckPlacement, wanted, found)
	return name, nil
}

// instanceEvidence is what the instance's record says of it: the token's own
// words about the instance count for nothing.
func instanceEvidence(inst *vpc.Instance, name crn.CRN, region, group string) trust.Evidence {
	subnets := make([]string, len(inst.Interfaces))
	for n, nic := range inst.Interfaces {
		subnets[n] = nic.SubnetID
	}
	ev := trust.Evidence{
		Type: identity.VSI, CRN: name, AccountID: inst.AccountID, Name: inst.Name,
		Claims: map[string]any{
			"crn": inst.CRN, "resource": inst.ID, "region": region, "zone": inst.Zone,
			"vpc_id": inst.VPCID, "subnet_id": subnets, "resource_group_id": inst.ResourceGroupID,
		},
	}
	optional(ev.Claims, "resource_group_name", group)
	return ev
}
