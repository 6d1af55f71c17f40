// Package jwt parses and verifies the signed tokens of others and of our own
// with everything switched off that an attacker could use: algorithms outside
// a list, keys named or carried by the token, several signatures, doubled or
// oddly spelt claims, unbounded input. What the claims mean is for the caller.
package jwt

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
)

// MaxLength bounds a token on input, in bytes.
const MaxLength = 16 << 10

// minRSABits is the smallest RSA key whose signature counts.
const minRSABits = 2048

// Errors that callers tell apart.
var (
	ErrMalformed = errors.New("malformed token")
	ErrSignature = errors.New("bad token signature")
)

// Asymmetric are the algorithms that verification accepts from clusters. There
// is no symmetric one: a public key must never work as a shared secret.
var Asymmetric = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512}

// Token is a parsed token whose signature has not been checked.
type Token struct {
	Alg   string
	KeyID string

	parsed *josejwt.JSONWebToken
}

// Parse reads a compact JWS. types are the values that the typ header may
// have; the empty one stands for its absence. Every error wraps ErrMalformed.
func Parse(raw string, algs []jose.SignatureAlgorithm, types ...string) (*Token, error) {
	return parse(raw, algs, nil, types)
}

// ParseOfIssuer is as Parse, for the tokens of OpenID Connect issuers, some of
// which name a certificate's thumbprint beside the key id (RFC 7515 sections
// 4.1.7 and 4.1.8). It is not looked at: the key id alone names the key.
func ParseOfIssuer(raw string, algs []jose.SignatureAlgorithm, types ...string) (*Token, error) {
	return parse(raw, algs, []string{"x5t", "x5t#S256"}, types)
}

func parse(raw string, algs []jose.SignatureAlgorithm, ignored, types []string) (*Token, error) {
	if len(raw) > MaxLength {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrMalformed, MaxLength)
	}
	if strings.Count(raw, ".") != 2 {
		return nil, fmt.Errorf("%w: want three parts joined by dots", ErrMalformed)
	}
	parsed, err := josejwt.ParseSigned(raw, algs)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if len(parsed.Headers) != 1 {
		return nil, fmt.Errorf("%w: %d signatures", ErrMalformed, len(parsed.Headers))
	}
	h := parsed.Headers[0]
	if h.JSONWebKey != nil {
		return nil, fmt.Errorf("%w: header carries a key", ErrMalformed)
	}
	typ := ""
	for name, value := range h.ExtraHeaders {
		if slices.Contains(ignored, string(name)) {
			continue
		}
		if name != jose.HeaderType {
			return nil, fmt.Errorf("%w: header %q is not accepted", ErrMalformed, name)
		}
		s, ok := value.(string)
		if !ok {
			return nil, fmt.Errorf("%w: header typ is not a string", ErrMalformed)
		}
		typ = s
	}
	if !slices.ContainsFunc(types, func(t string) bool { return strings.EqualFold(t, typ) }) {
		return nil, fmt.Errorf("%w: typ %q", ErrMalformed, typ)
	}
	return &Token{Alg: h.Algorithm, KeyID: h.KeyID, parsed: parsed}, nil
}

// Unverified decodes the claims without looking at the signature, for the one
// purpose of finding the key that can check it.
func (t *Token) Unverified(claims any) error {
	if err := t.parsed.UnsafeClaimsWithoutVerification(claims); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

// Verify checks the signature with a public key and decodes the claims. Names
// of claims are compared with their case, and a doubled claim is an error.
func (t *Token) Verify(key any, claims ...any) error {
	if err := acceptable(key); err != nil {
		return err
	}
	if err := t.parsed.Claims(key, claims...); err != nil {
		if errors.Is(err, jose.ErrCryptoFailure) {
			return fmt.Errorf("%w: %w", ErrSignature, err)
		}
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}

func acceptable(key any) error {
	switch k := key.(type) {
	case *rsa.PublicKey:
		if k.N.BitLen() < minRSABits {
			return fmt.Errorf("%w: RSA key of %d bits, want at least %d", ErrSignature, k.N.BitLen(), minRSABits)
		}
		return nil
	case *ecdsa.PublicKey:
		return nil
	}
	return fmt.Errorf("%w: a key of type %T is not accepted", ErrSignature, key)
}
