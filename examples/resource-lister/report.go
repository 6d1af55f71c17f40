package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
)

// report is the answer: what each step did, and where and why it ended.
type report struct {
	Profile   string     `json:"profile,omitempty"`
	Steps     []step     `json:"steps"`
	Reached   string     `json:"reached"`              // the last step that was done, or "none"
	StoppedAt string     `json:"stopped_at,omitempty"` // the step that failed
	Error     *problem   `json:"error,omitempty"`
	Resources []resource `json:"resources,omitzero"` // only when all pages were read
	Hint      string     `json:"hint,omitempty"`     // what to do about an empty list

	secrets []string
}

type step struct {
	Name   string      `json:"step"`
	OK     bool        `json:"ok"`
	Detail string      `json:"detail"`
	Token  *shownToken `json:"token,omitempty"`
}

// resource is the part of a resource instance that the sample shows.
type resource struct {
	Name  string `json:"name"`
	CRN   string `json:"crn"`
	State string `json:"state"`
	Type  string `json:"type"`
}

// problem is why a step failed: the other side's error as it came over the
// wire, or our own, and what to do about it.
type problem struct {
	StatusCode    int    `json:"statusCode,omitempty"` // the other side's
	Code          string `json:"errorCode,omitempty"`
	Message       string `json:"errorMessage"`
	Details       string `json:"errorDetails,omitempty"`
	TransactionID string `json:"transactionId,omitempty"`
	Hint          string `json:"hint"`
}

func newReport() *report { return &report{Steps: []step{}, Reached: "none"} }

func (r *report) pass(name, detail string, token *shownToken) {
	r.Steps = append(r.Steps, step{Name: name, OK: true, Detail: detail, Token: token})
	r.Reached = name
}

func (r *report) stop(name string, p *problem) *report {
	r.Steps = append(r.Steps, step{Name: name, Detail: p.Message})
	r.StoppedAt, r.Error = name, p
	return r
}

// httpStatus is what our own caller gets: 400 for a bad request, 500 for a
// fault of this pod, 403 when one of the services refused, 503 when one asked
// to come back later, and 502 when one could not be reached or understood.
func (r *report) httpStatus() int {
	switch r.StoppedAt {
	case "":
		return http.StatusOK
	case stepRequest:
		return http.StatusBadRequest
	case stepRead:
		return http.StatusInternalServerError
	}
	switch r.Error.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return http.StatusForbidden
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return http.StatusServiceUnavailable
	case http.StatusBadRequest: // IAM's status for most refusals
		if r.StoppedAt == stepExchange {
			return http.StatusForbidden
		}
	}
	return http.StatusBadGateway
}

// keepSecret makes encode blank out a token's signature. Without it a token is
// of no use to anybody, and with it the answer would be a credential.
func (r *report) keepSecret(token string) {
	secret := token
	if parts := strings.Split(token, "."); len(parts) == 3 {
		secret = parts[2]
	}
	// Nothing that short signs anything, but it may well stand in other text.
	if len(secret) >= 16 {
		r.secrets = append(r.secrets, secret)
	}
}

// encode never shows a signature: this program puts none into the report, but
// a server's error text might repeat what was sent to it.
func (r *report) encode() []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	_ = e.Encode(r) // cannot fail: the only foreign JSON in it was parsed by showToken
	out := b.Bytes()
	for _, s := range r.secrets {
		out = bytes.ReplaceAll(out, []byte(s), []byte("(not shown)"))
	}
	return out
}

// shownToken is what a token says, without what makes it one.
type shownToken struct {
	Header json.RawMessage `json:"header"`
	Claims json.RawMessage `json:"claims"`
}

// showToken decodes a JWT without checking it, which is the receiver's task. It
// returns nil for anything else.
func showToken(token string) *shownToken {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	header, claims := decodePart(parts[0]), decodePart(parts[1])
	if header == nil || claims == nil {
		return nil
	}
	return &shownToken{Header: header, Claims: claims}
}

func decodePart(s string) json.RawMessage {
	b, err := base64.RawURLEncoding.DecodeString(s)
	var object map[string]any
	if err != nil || json.Unmarshal(b, &object) != nil || object == nil {
		return nil
	}
	return b
}

// problemOf reads an error of IAM (errorCode, errorMessage, ...) or of the
// resource controller (errors with code and message, or message alone).
func problemOf(status int, header http.Header, body []byte) *problem {
	p := &problem{StatusCode: status, TransactionID: header.Get("Transaction-Id")}
	type coded struct {
		Code    text `json:"code"`
		Message text `json:"message"`
		Details text `json:"details"`
	}
	var wire struct {
		coded
		ErrorCode    text    `json:"errorCode"`
		ErrorMessage text    `json:"errorMessage"`
		ErrorDetails text    `json:"errorDetails"`
		Errors       []coded `json:"errors"`
		Trace        text    `json:"trace"`
		Context      struct {
			RequestID text `json:"requestId"`
		} `json:"context"`
	}
	if json.Unmarshal(body, &wire) == nil {
		first := wire.coded
		if len(wire.Errors) > 0 {
			first = wire.Errors[0]
		}
		p.Code = anyOf(wire.ErrorCode, first.Code)
		p.Message = anyOf(wire.ErrorMessage, first.Message)
		p.Details = anyOf(wire.ErrorDetails, first.Details)
		p.TransactionID = anyOf(text(p.TransactionID), wire.Context.RequestID, wire.Trace)
	}
	if p.Message == "" {
		p.Message = "HTTP " + http.StatusText(status)
	}
	return p
}

// text is a JSON string. Another value counts as none, so that one field of an
// unexpected type does not hide the others.
type text string

func (t *text) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) == nil {
		*t = text(s)
	}
	return nil
}

func anyOf(values ...text) string {
	for _, v := range values {
		if v != "" {
			return string(v)
		}
	}
	return ""
}

// What to do about it, in plain words.
const (
	hintUsage = "Name one trusted profile, of at most 256 printable characters: " +
		"GET /api/listresources?tpname=NAME, or resource-lister --once --profile NAME."
	hintTokenFile = "The pod needs a projected volume with a serviceAccountToken of audience 'iam' " +
		"(see kubernetes.yaml), mounted so that the program's user can read this file. TOKEN_FILE names another file."
	hintIAMUnreachable = "IAM did not answer. Check IAM_URL, name resolution and network policies, " +
		"and for https that the container trusts the server's certificate (SSL_CERT_FILE)."
	hintNotIAM               = "What answered does not speak like IAM. Check IAM_URL and any proxy in between."
	hintResourcesUnreachable = "The resource controller did not answer. Check RESOURCE_CONTROLLER_URL, " +
		"name resolution and network policies."
	hintNotResources = "What answered does not speak like a resource controller. Check RESOURCE_CONTROLLER_URL and any proxy in between."
	hintPaging       = "The resource controller's paging is broken, so the list would not be complete and is not shown."
	hintForeign      = "The access token would have gone to another server, so the page was not read. " +
		"Set RESOURCE_CONTROLLER_URL to the address under which that server knows itself, if it is the same."
	hintUnauthorized = "The resource controller does not accept this access token. " +
		"Check that IAM_URL and RESOURCE_CONTROLLER_URL belong to the same installation."
	hintDenied = "The profile was put on, but no policy allows it to do this. " +
		"Give it a role that does, with 'trusted-profile-policy-create'."
	hintEmpty = "The list is empty: the account has no resources, or no policy lets the profile see one. " +
		"In the second case give it a role such as Viewer, with 'trusted-profile-policy-create'."
)

// hintsByCode explain IAM's refusals of a compute resource token.
var hintsByCode = map[string]string{
	"BXNIM0102E": "No trusted profile of this name is in the account that the cluster belongs to. " +
		"Check the spelling, or create it with 'trusted-profile-create'.",
	"BXNIM0398E": "The profile exists, but none of its links or claim rules matches this pod. " +
		"Compare the namespace and service account under read-token with them, " +
		"then add a link with 'trusted-profile-link-create' or a rule with 'trusted-profile-rule-create'.",
	"BXNIM0401E": "The token file does not hold a token that IAM can read. " +
		"It must be the JWT of a projected serviceAccountToken volume and nothing else.",
	"BXNIM0405E": "IAM does not accept who signed the token or whom it is for. Under read-token, " +
		"iss must be the issuer of a registered cluster with the keys of today, and aud must contain 'iam'.",
	"BXNIM0407E": "IAM does not accept the token's times. Under read-token, exp must be in the future " +
		"and at most one hour after iat (expirationSeconds: 3600), and the clocks must agree.",
}

// hintFor chooses the hint for an error that came over the wire.
func hintFor(stoppedAt string, p *problem) string {
	hint, known := hintsByCode[p.Code]
	switch exchanging := stoppedAt == stepExchange; {
	case exchanging && known:
	case p.StatusCode == http.StatusTooManyRequests || p.StatusCode >= http.StatusInternalServerError:
		hint = "The server cannot answer now. Try again in a while."
	case exchanging && p.Code != "":
		hint = "IAM refused the exchange; its message says why."
	case exchanging:
		hint = hintNotIAM
	case p.StatusCode == http.StatusUnauthorized:
		hint = hintUnauthorized
	case p.StatusCode == http.StatusForbidden:
		hint = hintDenied
	default:
		hint = hintNotResources
	}
	if p.TransactionID != "" {
		hint += " An administrator of a Tabard installation sees every check with 'tabard activity explain " + p.TransactionID + "'."
	}
	return hint
}
