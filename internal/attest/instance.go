package attest

import (
	"fmt"
	"strings"
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
	// HostOfKey returns the host that signs with a key id.
	HostOfKey(keyID string) (*cluster.Host, bool)
	Instance(id string) (*vpc.Instance, bool)
	ResourceGroupName(id string) string
}

// Instances verifies instance identity tokens: a host's signature over an
// instance that is placed on it and runs.
type Instances struct {
	Hosts  Hosts
	Region string
	Now    func() time.Time
}

var (
	instanceChecks = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims, CheckPlacement}
	instanceAlgs   = []jose.SignatureAlgorithm{jose.RS256, jose.ES256}
)

// Verify returns the evidence that an identity token gives, and its claims. The
// error is a *Refusal.
func (i *Instances) Verify(raw string) (Proof, *IdentityClaims, error) {
	s := steps{names: instanceChecks}
	t, err := jwt.Parse(strings.TrimSpace(raw), instanceAlgs, "", "JWT")
	if err != nil {
		r := s.refuse(Malformed, CheckForm, "a signed JWT", err.Error(), "The identity token is not a JWT that can be checked.")
		r.Cause = err
		return Proof{}, nil, r
	}
	s.pass(CheckForm, "a signed JWT", t.Alg+" kid "+t.KeyID)

	host, ok := i.Hosts.HostOfKey(t.KeyID)
	if !ok {
		return Proof{}, nil, s.refuse(UnknownIssuer, CheckIssuer, "a key of a registered host", "kid "+t.KeyID,
			"The identity token was not signed by a registered host.")
	}
	s.pass(CheckIssuer, "a key of a registered host", "host "+host.Name)

	claims, err := verifyHost(host, t)
	if err != nil {
		r := s.refuse(BadSignature, CheckSignature, "signature of host "+host.Name, err.Error(), "The identity token's signature does not verify.")
		r.Cause = err
		return Proof{}, nil, r
	}
	s.pass(CheckSignature, "signature of host "+host.Name, t.Alg+" kid "+t.KeyID)

	issuer := IdentityIssuer(i.Region)
	if claims.Issuer != issuer || !claims.Audience.Contains(issuer) {
		return Proof{}, nil, s.refuse(WrongAudience, CheckAudience, issuer, "iss "+claims.Issuer+", aud "+strings.Join(claims.Audience, ", "),
			"The identity token was made for another region.")
	}
	s.pass(CheckAudience, issuer, strings.Join(claims.Audience, ", "))

	if r := checkTime(&s, i.Now(), claims.IssuedAt, 0, claims.Expires); r != nil {
		return Proof{}, nil, r
	}

	inst, ok := i.Hosts.Instance(claims.IaaS.InstanceID)
	if !ok || inst.CRN != claims.IaaS.CRN || inst.AccountID != claims.IaaS.AccountID {
		return Proof{}, nil, s.refuse(BadClaims, CheckClaims, "an instance that exists", claims.IaaS.CRN, "The instance does not exist.")
	}
	s.pass(CheckClaims, "an instance that exists", inst.CRN)

	wanted := fmt.Sprintf("running on host %s", host.Name)
	found := fmt.Sprintf("%s on host %s", inst.Status, inst.HostID)
	if inst.HostID != host.ID || inst.Status != vpc.Running {
		return Proof{}, nil, s.refuse(Misplaced, CheckPlacement, wanted, found,
			"The host may vouch only for instances that are placed and running on it.")
	}
	s.pass(CheckPlacement, wanted, found)

	name, err := crn.Parse(inst.CRN)
	if err != nil {
		return Proof{}, nil, s.refuse(BadClaims, CheckClaims, "an instance CRN", inst.CRN, "The instance's record is broken.")
	}
	subnets := make([]string, len(inst.Interfaces))
	for n, nic := range inst.Interfaces {
		subnets[n] = nic.SubnetID
	}
	ev := trust.Evidence{
		Type: identity.VSI, CRN: name, AccountID: inst.AccountID, Name: inst.Name,
		Claims: map[string]any{
			"crn": inst.CRN, "resource": inst.ID, "region": i.Region, "zone": inst.Zone,
			"vpc_id": inst.VPCID, "subnet_id": subnets, "resource_group_id": inst.ResourceGroupID,
		},
	}
	optional(ev.Claims, "resource_group_name", i.Hosts.ResourceGroupName(inst.ResourceGroupID))
	return Proof{Evidence: ev, Trace: s.trace}, claims, nil
}

func verifyHost(host *cluster.Host, t *jwt.Token) (*IdentityClaims, error) {
	keys, err := ParseKeys(host.JWKS)
	if err != nil {
		return nil, fmt.Errorf("keys of host %s: %w", host.Name, err)
	}
	keys, err = pick(keys, t.KeyID)
	if err != nil {
		return nil, err
	}
	var claims IdentityClaims
	if err := t.Verify(keys[0].Key, &claims); err != nil {
		return nil, err
	}
	return &claims, nil
}
