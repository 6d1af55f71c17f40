package attest

import (
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/jwt"
)

// HostKeys finds the host of a key.
type HostKeys interface {
	HostOfKey(keyID string) (*cluster.Host, bool)
}

// HostProofs verifies what a host proves its key with: when it joins, that it
// holds the private half of the key it shows, and afterwards the assertion with
// which it gets an access token (RFC 7523 section 3).
type HostProofs struct {
	Hosts    HostKeys
	Audience string // the URL of the token endpoint
	Now      func() time.Time

	replays replays
}

// The types of the two proofs. They differ, and from an identity token's, so
// that none passes for another.
const (
	TypeHostJoin      = "host-join+jwt"
	TypeHostAssertion = "client-authentication+jwt"
)

// HostProofLife bounds the life of a proof.
const HostProofLife = time.Minute

// HostProof are the claims of both proofs.
type HostProof struct {
	Issuer   string           `json:"iss,omitempty"` // the host's id; absent when it joins
	Subject  string           `json:"sub,omitempty"` // the same
	Audience josejwt.Audience `json:"aud"`
	IssuedAt int64            `json:"iat"`
	Expires  int64            `json:"exp"`
	JTI      string           `json:"jti"`
	Join     string           `json:"join,omitempty"` // fingerprint of the join token
}

// CheckReplay is the check that a proof is used once.
const CheckReplay = "replay"

var hostChecks = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims, CheckReplay}

// Assertion returns the host whose assertion it is, the id of the key that has
// signed it, and the trace of the checks. The error is a *Refusal.
func (p *HostProofs) Assertion(raw string) (_ *cluster.Host, keyID string, _ activity.Trace, _ error) {
	s := steps{names: hostChecks}
	t, err := jwt.Parse(strings.TrimSpace(raw), instanceAlgs, TypeHostAssertion)
	if err != nil {
		r := s.refuse(Malformed, CheckForm, "a signed client assertion", err.Error(), "The client assertion is not a JWT that can be checked.")
		r.Cause = err
		return nil, "", nil, r
	}
	s.pass(CheckForm, "a signed client assertion", t.Alg+" kid "+t.KeyID)
	host, ok := p.Hosts.HostOfKey(t.KeyID)
	if !ok || host.Revoked {
		found := "kid " + t.KeyID
		if ok {
			found = "host " + host.Name + ", which is revoked"
		}
		return nil, "", nil, s.refuse(UnknownIssuer, CheckIssuer, "a key of a host that has joined and is not revoked", found,
			"The client assertion was not signed by a host of this installation. Join it again with a new join token.")
	}
	s.pass(CheckIssuer, "a key of a host that has joined and is not revoked", "host "+host.Name)
	keys, err := ParseKeys(host.JWKS)
	if err == nil {
		keys, err = pick(keys, t.KeyID)
	}
	var claims HostProof
	if err == nil {
		err = t.Verify(keys[0].Key, &claims)
	}
	if err != nil {
		r := s.refuse(BadSignature, CheckSignature, "signature of host "+host.Name, err.Error(), "The client assertion's signature does not verify.")
		r.Cause = err
		return nil, "", nil, r
	}
	s.pass(CheckSignature, "signature of host "+host.Name, t.Alg+" kid "+t.KeyID)
	if r := p.check(&s, &claims); r != nil {
		return nil, "", nil, r
	}
	if claims.Issuer != host.ID || claims.Subject != host.ID {
		return nil, "", nil, s.refuse(BadClaims, CheckClaims, "iss and sub "+host.ID, claims.Issuer+" and "+claims.Subject, "The client assertion is about another host.")
	}
	s.pass(CheckClaims, "iss and sub "+host.ID, claims.Issuer)
	if !p.replays.fresh(host.ID+" "+claims.JTI, p.Now(), time.Unix(claims.Expires, 0)) {
		return nil, "", nil, s.refuse(BadClaims, CheckReplay, "an assertion that was not used before", "jti "+claims.JTI, "The client assertion was used before.")
	}
	s.pass(CheckReplay, "an assertion that was not used before", "jti "+claims.JTI)
	return host, t.KeyID, s.trace, nil
}

// Join checks the proof of a host that joins with a public key and a join
// token of this fingerprint. The key is returned as it is to be kept: with the
// id that it is known by.
func (p *HostProofs) Join(rawKey []byte, raw, fingerprint, keyPrefix string) (*jose.JSONWebKey, error) {
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(rawKey); err != nil {
		return nil, fmt.Errorf("the key is not a JSON Web Key: %w", err)
	}
	if !key.IsPublic() {
		return nil, errors.New("the key is not a public one: the private half must never leave the host")
	}
	t, err := jwt.Parse(strings.TrimSpace(raw), instanceAlgs, TypeHostJoin)
	if err != nil {
		return nil, err
	}
	var claims HostProof
	if err := t.Verify(key.Key, &claims); err != nil {
		return nil, err
	}
	s := steps{names: hostChecks}
	if r := p.check(&s, &claims); r != nil {
		return nil, r
	}
	if claims.Join != fingerprint {
		return nil, errors.New("the proof was made for another join token")
	}
	id, err := HostKeyID(&key, keyPrefix)
	if err != nil {
		return nil, err
	}
	return &jose.JSONWebKey{Key: key.Key, KeyID: id, Algorithm: t.Alg, Use: "sig"}, nil
}

func (p *HostProofs) check(s *steps, c *HostProof) *Refusal {
	if !slices.Equal([]string(c.Audience), []string{p.Audience}) {
		return s.refuse(WrongAudience, CheckAudience, p.Audience, strings.Join(c.Audience, ", "),
			"The proof was made for another server. Give the agent the URL under which this server is known: "+strings.TrimSuffix(p.Audience, "/identity/token"))
	}
	s.pass(CheckAudience, p.Audience, strings.Join(c.Audience, ", "))
	if r := checkTime(s, p.Now(), c.IssuedAt, 0, c.Expires); r != nil {
		return r
	}
	if life := time.Duration(c.Expires-c.IssuedAt) * time.Second; life > HostProofLife || c.JTI == "" || len(c.JTI) > 128 {
		return s.refuse(BadClaims, CheckClaims, "a jti, and a life of at most "+HostProofLife.String(), life.String(), "The proof lives too long or has no jti.")
	}
	return nil
}

// HostKeyID is the id of a host's key: the prefix, which names the region
// (reference/instance-metadata-and-vpc.md section 1.5), and a digest of the key,
// so that no host can choose the id of another one's.
func HostKeyID(key *jose.JSONWebKey, prefix string) (string, error) {
	sum, err := key.Thumbprint(crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("take the digest of the key: %w", err)
	}
	return fmt.Sprintf("%s%x", prefix, sum[:16]), nil
}

// replays remembers the proofs that were used until they have expired anyway.
type replays struct {
	mu   sync.Mutex
	seen map[string]time.Time
	next time.Time // when expired ones are looked for
}

func (r *replays) fresh(id string, now, expires time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen == nil {
		r.seen = map[string]time.Time{}
	}
	if now.After(r.next) {
		for k, until := range r.seen {
			if now.After(until) {
				delete(r.seen, k)
			}
		}
		r.next = now.Add(HostProofLife)
	}
	if _, used := r.seen[id]; used {
		return false
	}
	r.seen[id] = expires
	return true
}
