package grant

import (
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/fault"
)

// The wire protocol's error codes. Which of them are public and which are our
// choice stands in reference/iam-identity.md sections 1.6 and 6.6; all of them
// stand here, so that one can be corrected in one place.
const (
	CodeMissing        = "BXNIM0109E"
	CodeNotFound       = "BXNIM0102E"
	CodeNotEligible    = "BXNIM0398E"
	CodeMalformed      = "BXNIM0401E"
	CodeUnsupported    = "BXNIM0405E"
	CodeInvalidToken   = "BXNIM0407E"
	CodeRefreshExpired = "BXNIM0408E"
	CodeUserGone       = "BXNIM0410E"
	CodeKeyNotFound    = "BXNIM0415E"
	CodeKeyDisabled    = "BXNIM0462E"
	CodeClient         = "BXNIM0310E"
	CodeAddress        = "BXNIM0430E"
	CodeUnavailable    = "BXNIM0503E"
	CodeNoReview       = "BXNIM0504E" // ours: no API server could be asked about the token
)

func missing(property string) *fault.Error {
	return fault.New(fault.Invalid, CodeMissing, "Property missing or empty").
		WithDetail("Property '%s' either missing or empty.", property)
}

// refused turns the verifier's refusal into the caller's error. A rejected
// credential is 400, not 401: clients treat it as final.
func refused(r *attest.Refusal) *fault.Error {
	var e *fault.Error
	switch r.Reason {
	case attest.Malformed:
		e = fault.New(fault.Invalid, CodeMalformed, "Provided token is malformed")
	case attest.UnknownIssuer:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: unknown issuer")
	case attest.Revoked:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: the host is revoked")
	case attest.BadSignature:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: bad signature")
	case attest.WrongAudience:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: wrong audience")
	case attest.BadClaims:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: not a token of a compute resource")
	case attest.Misplaced:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: the host does not hold the instance")
	case attest.Ambiguous:
		e = fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: several clusters of one account sign with its key")
	case attest.ReviewDenied:
		e = fault.New(fault.Invalid, CodeInvalidToken, "Provided token is not valid any more")
	case attest.ReviewWithheld:
		e = fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile is ambiguous.")
	case attest.ReviewUnavailable:
		e = fault.New(fault.Unavailable, CodeNoReview, "The token cannot be reviewed now")
		e.RetryAfter = time.Second
	case attest.Expired:
		e = fault.New(fault.Invalid, CodeInvalidToken, "Provided token is expired")
	case attest.BadTime:
		e = fault.New(fault.Invalid, CodeInvalidToken, "Provided token is invalid: its times are not acceptable")
	case attest.KeysUnavailable:
		e = fault.New(fault.Unavailable, CodeUnavailable, "The token cannot be checked now")
		e.RetryAfter = 10 * time.Second
	default:
		e = fault.New(fault.Invalid, CodeInvalidToken, "Provided token is invalid")
	}
	return e.WithDetail("%s", r.Detail).Because(r)
}
