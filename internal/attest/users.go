package attest

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/trust"
)

// Providers finds the identity providers that accounts have registered.
type Providers interface {
	ProvidersOf(issuer string) []*identity.Provider
}

// Users verifies the ID tokens of OpenID Connect providers.
type Users struct {
	Providers Providers
	Keys      *Keys
	Now       func() time.Time
}

// UserProof is what one account's provider proved about a person.
type UserProof struct {
	Provider *identity.Provider
	Subject  string
	Email    string // only when the provider says that it has verified it
	User     trust.User
	Trace    activity.Trace
}

// userChecks are the checks of an ID token, in their order.
var userChecks = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims}

// maxUserToken bounds how long ago an ID token may have been made. It is shown
// at login, not kept.
const maxUserToken = time.Hour

type userClaims struct {
	Issuer        string               `json:"iss"`
	Subject       string               `json:"sub"`
	Audience      josejwt.Audience     `json:"aud"`
	Party         string               `json:"azp"`
	IssuedAt      *josejwt.NumericDate `json:"iat"`
	NotBefore     *josejwt.NumericDate `json:"nbf"`
	Expiry        *josejwt.NumericDate `json:"exp"`
	Email         string               `json:"email"`
	EmailVerified any                  `json:"email_verified"`
	Name          string               `json:"name"`
}

// Verify returns what an ID token proves: one proof for each account that
// registered the issuer and whose registration the token meets. The error is a
// *Refusal.
func (u *Users) Verify(ctx context.Context, raw string) ([]UserProof, error) {
	start := steps{names: userChecks}
	t, err := jwt.ParseOfIssuer(raw, jwt.Asymmetric, "", "JWT")
	if err != nil {
		r := start.refuse(Malformed, CheckForm, "a signed JWT ("+algorithms()+")", err.Error(), "The assertion is not a JWT that can be checked.")
		r.Cause = err
		return nil, r
	}
	var claims userClaims
	all := map[string]json.RawMessage{}
	if err := errors.Join(t.Unverified(&claims), t.Unverified(&all)); err != nil {
		r := start.refuse(Malformed, CheckForm, "claims in JSON, each once", err.Error(), "The assertion's claims cannot be read.")
		r.Cause = err
		return nil, r
	}
	start.pass(CheckForm, "a signed JWT", t.Alg+" kid "+t.KeyID)
	providers := slices.DeleteFunc(u.Providers.ProvidersOf(claims.Issuer), func(p *identity.Provider) bool { return p.Disabled })
	if len(providers) == 0 {
		return nil, start.refuse(UnknownIssuer, CheckIssuer, "a registered identity provider", claims.Issuer,
			"No account has an identity provider with the assertion's issuer; register it with 'tabard account idp-create NAME --issuer URL'.")
	}
	start.pass(CheckIssuer, "a registered identity provider", claims.Issuer)

	var proofs []UserProof
	var nearest *Refusal
	var aimed []Aimed
	for _, p := range providers {
		s := steps{names: userChecks, trace: slices.Clone(start.trace)}
		if r := u.verifyFor(ctx, p, t, &claims, &s); r != nil {
			aimed = append(aimed, r.aimed(p.AccountID))
			if nearest == nil || passed(r.Trace) > passed(nearest.Trace) {
				nearest = r
			}
			continue
		}
		proof := UserProof{
			Provider: p, Subject: claims.Subject, Trace: s.trace,
			User: trust.User{Realm: p.Issuer, AccountID: p.AccountID, Name: claims.name(), Claims: flatten(all)},
		}
		if claims.verified() {
			proof.Email = claims.Email
		}
		proofs = append(proofs, proof)
	}
	if len(proofs) > 0 {
		return proofs, nil
	}
	nearest.Aimed = aimed
	return nil, nearest
}

func passed(t activity.Trace) int {
	failed, _ := t.Failed()
	return slices.Index(userChecks, failed.Name)
}

func (u *Users) verifyFor(ctx context.Context, p *identity.Provider, t *jwt.Token, claims *userClaims, s *steps) *Refusal {
	if r := u.Keys.check(ctx, KeySource(p), "provider", t, s); r != nil {
		return r
	}
	audience := strings.Join(claims.Audience, ", ")
	// A token for several audiences must say that ours is the one it was made
	// for (OpenID Connect Core section 3.1.3.7).
	if !claims.Audience.Contains(p.Audience) || len(claims.Audience) > 1 && claims.Party != p.Audience {
		return s.refuse(WrongAudience, CheckAudience, p.Audience, audience,
			"The assertion was made for another audience; the provider is registered with audience "+p.Audience+".")
	}
	s.pass(CheckAudience, p.Audience, audience)
	if r := checkAge(s, u.Now(), seconds(claims.IssuedAt), seconds(claims.NotBefore), seconds(claims.Expiry)); r != nil {
		return r
	}
	if claims.Subject == "" || len(claims.Subject) > 255 {
		return s.refuse(BadClaims, CheckClaims, "a sub of 1 to 255 characters", claims.Subject, "The assertion does not say whom it is about.")
	}
	s.pass(CheckClaims, "a subject", claims.Subject)
	return nil
}

// checkAge is checkTime for tokens whose maker chooses how long they live: what
// counts is that they are young.
func checkAge(s *steps, now time.Time, iat, nbf, exp int64) *Refusal {
	if iat > 0 && exp > iat+int64(maxUserToken/time.Second) {
		exp = iat + int64(maxUserToken/time.Second)
	}
	return checkTime(s, now, iat, nbf, exp)
}

func (c *userClaims) verified() bool {
	switch v := c.EmailVerified.(type) {
	case bool:
		return v
	case string:
		return v == "true" // as some providers write it
	}
	return false
}

func (c *userClaims) name() string {
	for _, s := range []string{c.Name, c.Email, c.Subject} {
		if s != "" {
			return activity.Clip(s)
		}
	}
	return ""
}

// flatten keeps the claims that conditions can compare: texts, numbers,
// booleans, and lists of them.
func flatten(all map[string]json.RawMessage) map[string]any {
	out := map[string]any{}
	for name, raw := range all {
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) == nil && list != nil {
			values := []string{}
			for _, e := range list {
				if s, ok := text(e); ok {
					values = append(values, s)
				}
			}
			out[name] = values
			continue
		}
		if s, ok := text(raw); ok {
			out[name] = s
		}
	}
	return out
}

func text(raw json.RawMessage) (string, bool) {
	var s string
	if json.Unmarshal(raw, &s) == nil && len(raw) > 0 && raw[0] == '"' {
		return s, true
	}
	if len(raw) == 0 || raw[0] == '{' || raw[0] == '[' || string(raw) == "null" {
		return "", false
	}
	return string(raw), true // a number or a boolean, as it is written
}

// KeySource is a provider as the cache of keys knows issuers.
func KeySource(p *identity.Provider) *cluster.Cluster {
	return &cluster.Cluster{Meta: p.Meta, ID: p.ID, Name: p.Name, Issuer: p.Issuer, CA: p.CA, JWKS: p.JWKS}
}
