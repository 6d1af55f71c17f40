// Package attest turns a compute resource's token into evidence: it checks who
// signed it, for whom, when, and about what, and believes nothing else. Whether
// the evidence may put on a profile is package trust's question.
package attest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/trust"
)

// Reason is why a token is not evidence.
type Reason string

// The reasons, in the order of the checks.
const (
	Malformed       Reason = "malformed"
	UnknownIssuer   Reason = "unknown-issuer"
	Revoked         Reason = "revoked"          // by a host that is not to sign any more
	KeysUnavailable Reason = "keys-unavailable" // our side is broken, not the token
	BadSignature    Reason = "bad-signature"
	WrongAudience   Reason = "wrong-audience"
	Expired         Reason = "expired"
	BadTime         Reason = "bad-time" // not yet valid, or made to live too long
	BadClaims       Reason = "bad-claims"
	Misplaced       Reason = "misplaced" // signed by a host that does not hold the instance
	Ambiguous       Reason = "ambiguous" // several clusters of one account sign with its key

	ReviewDenied      Reason = "review-denied"      // the cluster does not stand by the token any more
	ReviewWithheld    Reason = "review-withheld"    // the token must not be shown to the API server
	ReviewUnavailable Reason = "review-unavailable" // our side is broken, not the token
)

// Names of the checks, in their order. Every trace of a compute resource token
// has all of its kind's.
const (
	CheckForm      = "token-form"
	CheckIssuer    = "token-issuer"
	CheckHost      = "token-host" // of identity tokens only
	CheckSignature = "token-signature"
	CheckAudience  = "token-audience"
	CheckTime      = "token-time"
	CheckClaims    = "token-claims"
	CheckPlacement = "resource-placement"
	CheckReview    = "token-review" // of pods whose cluster demands it, after all others
)

// Bounds on a compute resource token.
const (
	MaxLifetime = time.Hour        // exp - iat (reference/iam-identity.md section 6.4)
	MaxSkew     = 30 * time.Second // how far the signer's clock may be ahead
)

// Refusal says why a token is not evidence. Aimed has one entry for each
// account in which the token's issuer is registered, with the checks against
// that account's registration: no account sees another's.
type Refusal struct {
	Reason Reason
	Detail string // for the caller
	Trace  activity.Trace
	Aimed  []Aimed
	Cause  error
}

// Aimed is a refusal as one account sees it.
type Aimed struct {
	AccountID string
	Reason    Reason
	Detail    string
	Trace     activity.Trace
}

func (r *Refusal) Error() string {
	if r.Cause != nil {
		return fmt.Sprintf("%s: %s: %v", r.Reason, r.Detail, r.Cause)
	}
	return fmt.Sprintf("%s: %s", r.Reason, r.Detail)
}

func (r *Refusal) Unwrap() error { return r.Cause }

// aimed is the refusal as the account whose registration it is about sees it.
func (r *Refusal) aimed(account string) Aimed {
	return Aimed{AccountID: account, Reason: r.Reason, Detail: r.Detail, Trace: r.Trace}
}

// Proof is evidence with the trace of its checks.
type Proof struct {
	Evidence trust.Evidence
	Trace    activity.Trace

	review    *pendingReview // nil where no review is demanded
	contested bool           // see Workloads
}

// steps is the trace of one verification under way: checks that are not
// reached are marked as skipped when it ends.
type steps struct {
	trace activity.Trace
	names []string
}

func (s *steps) pass(name, wanted, found string) { s.trace.Pass(name, wanted, found) }

// refuse ends the verification at a check.
func (s *steps) refuse(reason Reason, name, wanted, found, hint string) *Refusal {
	s.trace.Fail(name, wanted, found, hint)
	for _, rest := range s.names[len(s.trace):] {
		s.trace.Skip(rest)
	}
	return &Refusal{Reason: reason, Detail: hint, Trace: s.trace}
}

// check verifies the token's signature with the keys of its issuer, which is a
// cluster or a provider.
func (k *Keys) check(ctx context.Context, issuer *cluster.Cluster, noun string, t *jwt.Token, s *steps) *Refusal {
	name := noun + " " + issuer.Name
	keys, err := k.Of(ctx, issuer, t.KeyID)
	switch {
	case errors.Is(err, ErrNoSuchKey):
		return s.refuse(BadSignature, CheckSignature, "a key of "+name, "kid "+t.KeyID+" is not among its keys",
			"The token was signed with a key that the "+noun+" does not publish.")
	case err != nil:
		r := s.refuse(KeysUnavailable, CheckSignature, "the keys of "+name, err.Error(),
			"The "+noun+"'s keys cannot be fetched; the token may be good.")
		r.Cause = err
		return r
	}
	err = ErrNoSuchKey
	for _, key := range keys {
		if key.Algorithm != "" && key.Algorithm != t.Alg {
			err = errors.Join(err, errors.New("the key is for "+key.Algorithm+", the token says "+t.Alg))
			continue
		}
		if err = t.Verify(key.Key); err == nil {
			s.pass(CheckSignature, "a key of "+name, t.Alg+" kid "+t.KeyID)
			return nil
		}
	}
	r := s.refuse(BadSignature, CheckSignature, "signature of "+name, "it does not verify with key "+t.KeyID,
		"The token's signature does not verify with the "+noun+"'s key.")
	r.Cause = err
	return r
}

// checkTime checks iat, nbf and exp, all in Unix seconds; zero means absent.
func checkTime(s *steps, now time.Time, iat, nbf, exp int64) *Refusal {
	at := func(sec int64) string { return time.Unix(sec, 0).UTC().Format(time.RFC3339) }
	clock := now.UTC().Format(time.RFC3339)
	latest := now.Add(MaxSkew).Unix()
	switch {
	case exp == 0 || iat <= 0: // a negative iat could make exp-iat overflow
		return s.refuse(BadTime, CheckTime, "claims iat and exp", "absent", "The token must say when it was made and when it ends.")
	case now.Unix() >= exp:
		return s.refuse(Expired, CheckTime, "exp after "+clock, at(exp), "The token expired at "+at(exp)+".")
	case nbf > latest || iat > latest:
		return s.refuse(BadTime, CheckTime, fmt.Sprintf("iat and nbf not later than %s after %s", MaxSkew, clock), at(max(iat, nbf)),
			"The token is not valid before "+at(max(iat, nbf))+"; compare the clocks.")
	case exp-iat > int64(MaxLifetime/time.Second):
		return s.refuse(BadTime, CheckTime, "lifetime at most "+MaxLifetime.String(), (time.Duration(exp-iat) * time.Second).String(),
			fmt.Sprintf("The token lives %d s; at most %d s are accepted.", exp-iat, int64(MaxLifetime/time.Second)))
	}
	s.pass(CheckTime, "valid at "+clock, "until "+at(exp))
	return nil
}
