package attest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/trust"
)

// maxSubject bounds the sub of a workload's token, in bytes.
const maxSubject = 1024

func (w *Workloads) tryIssuer(ctx context.Context, i *cluster.Issuer, p *presented, s *steps) outcome {
	if r := w.Keys.check(ctx, IssuerKeys(i), "workload issuer", p.token, s); r != nil {
		return outcome{refusal: r}
	}
	if r := p.checkAudience(s, i.Audience, "The token was made for another audience; have the issuer make it for "+i.Audience+"."); r != nil {
		return outcome{refusal: r}
	}
	// Its maker chooses how long it lives.
	if r := checkAge(s, w.Now(), seconds(p.claims.IssuedAt), seconds(p.claims.NotBefore), seconds(p.claims.Expiry)); r != nil {
		return outcome{refusal: r}
	}
	var all map[string]json.RawMessage
	if err := p.token.Unverified(&all); err != nil { // read once already, to find members that stand twice
		return outcome{refusal: s.refuse(BadClaims, CheckClaims, "claims in JSON", err.Error(), "The token's claims cannot be read.")}
	}
	ev, err := oidcEvidence(i, all)
	if err != nil {
		return outcome{refusal: s.refuse(BadClaims, CheckClaims, "the claims of issuer "+i.Name, err.Error(),
			"The token does not say whom it is about as the workload issuer's registration expects.")}
	}
	s.pass(CheckClaims, "the claims of issuer "+i.Name, "sub "+p.claims.Subject)
	return evidenceProof(ev, s)
}

// IssuerKeys is a workload issuer as the cache of keys knows issuers.
func IssuerKeys(i *cluster.Issuer) *cluster.Cluster {
	return &cluster.Cluster{Meta: i.Meta, ID: i.ID, Name: i.Name, Issuer: i.Issuer, CA: i.CA, JWKS: i.JWKS}
}

// IssuerEvidence is the evidence that a token of a workload issuer with these
// claims gives once all its checks have passed. An error says what the claims
// lack.
func IssuerEvidence(i *cluster.Issuer, claims map[string]json.RawMessage) (trust.Evidence, error) {
	return oidcEvidence(i, claims)
}

// oidcEvidence is what a workload issuer's token proves: the claims that the
// mapping names, and who has said so. The claims must have been verified.
func oidcEvidence(i *cluster.Issuer, claims map[string]json.RawMessage) (trust.Evidence, error) {
	subject, ok := text(claims["sub"])
	if !ok || subject == "" || len(subject) > maxSubject {
		return trust.Evidence{}, fmt.Errorf("sub must have 1 to %d characters", maxSubject)
	}
	name, err := crn.Parse(i.CRN)
	if err != nil {
		return trust.Evidence{}, errors.New("the issuer's record is broken")
	}
	mapped := map[string]json.RawMessage{}
	for claim, path := range i.Mapping.Claims {
		if raw, ok := at(claims, path); ok {
			mapped[claim] = raw
		}
	}
	ev := trust.Evidence{
		Type: identity.OIDC, CRN: name, AccountID: i.AccountID, Name: i.Name + ":" + subject,
		Claims: flatten(mapped),
	}
	// These say who vouches, so no mapping can name them.
	ev.Claims["issuer"], ev.Claims["crn"], ev.Claims["sub"] = i.Issuer, i.CRN, subject
	return ev, nil
}

// at returns the member at a path of names with dots between them. A name that
// has dots itself is found at the top.
func at(claims map[string]json.RawMessage, path string) (json.RawMessage, bool) {
	if raw, ok := claims[path]; ok {
		return raw, true
	}
	first, rest, nested := strings.Cut(path, ".")
	raw, ok := claims[first]
	if !ok || !nested {
		return nil, false
	}
	var inner map[string]json.RawMessage
	if json.Unmarshal(raw, &inner) != nil {
		return nil, false
	}
	return at(inner, rest)
}
