package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"tabard.dev/tabard/internal/object"
)

// Issuer is an OpenID Connect issuer of tokens for workloads that are neither
// pods of a registered cluster nor instances, such as the jobs of a CI service.
// Its tokens count as evidence of compute resource type OIDC in one account.
// What they prove is what the mapping names, and nothing else.
type Issuer struct {
	object.Meta
	ID        string `json:"id"` // WorkloadIssuer-<uuid>
	CRN       string `json:"crn"`
	AccountID string `json:"account_id"`
	Name      string `json:"name"`     // unique in the account
	Issuer    string `json:"issuer"`   // exactly the iss of its tokens; once in the account
	Audience  string `json:"audience"` // that tokens must be made for
	Preset    string `json:"preset,omitempty"`

	// Mapping is the preset's, written out at registration, so that a later
	// version's presets do not change what existing rules mean.
	Mapping Mapping `json:"mapping"`

	// Keys come from JWKS when it is given, else from the issuer's discovery
	// document, whose server certificate CA vouches for when it is given.
	JWKS json.RawMessage `json:"jwks,omitempty"`
	CA   string          `json:"ca,omitempty"` // PEM

	Proved time.Time `json:"proved,omitzero"` // see Since
}

// Since is when the issuer's tokens began to be proved as they are, see
// [Cluster.Since].
func (i *Issuer) Since() time.Time { return later(i.CreatedAt, i.Proved) }

// Mapping says which claims of an issuer's tokens rules can compare, and which
// of them a rule must pin down so that it does not admit strangers.
type Mapping struct {
	// Claims maps a claim's name in rules to where it is in the token: member
	// names with dots between them.
	Claims map[string]string `json:"claims" yaml:"claims"`

	// Pin lists sets of rule claims; a rule must compare all claims of one of
	// the sets with given values (EQUALS or IN). Empty demands nothing: every
	// workload of the issuer is the account's own.
	Pin [][]string `json:"pin" yaml:"pin"`

	// Form gives regular expressions (RE2) that the whole value must match for
	// a claim to count as pinned, for claims of which not every value says
	// whose the workload is.
	Form map[string]string `json:"form,omitempty" yaml:"form"`
}

// The claims that every workload issuer's evidence has. They come from the
// registration, but for the subject, which is the token's sub.
const (
	ClaimIssuer  = "issuer"
	ClaimCRN     = "crn"
	ClaimSubject = "sub"
)

// SubjectOnly is the mapping of an issuer about which nothing else is known:
// rules compare the token's sub, and have to.
func SubjectOnly() Mapping {
	return Mapping{Claims: map[string]string{ClaimSubject: ClaimSubject}, Pin: [][]string{{ClaimSubject}}}
}

// Bounds on a mapping.
const (
	MaxMapping    = 32 << 10 // bytes of its JSON
	maxClaims     = 100
	maxPins       = 50
	maxPinned     = 10  // claims in one set
	maxClaimName  = 100 // bytes
	maxClaimPath  = 200 // bytes
	maxClaimDepth = 8   // members in a path
	maxForm       = 200 // bytes
)

// ParseMapping reads a mapping in JSON and checks it. Keys that it does not
// know, doubled ones and a missing pin are errors: what was meant to protect
// must not be passed over.
func ParseMapping(b []byte) (Mapping, error) {
	if len(b) > MaxMapping {
		return Mapping{}, fmt.Errorf("it is longer than %d bytes", MaxMapping)
	}
	if !utf8.Valid(b) {
		return Mapping{}, errors.New("it is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var m Mapping
	if err := dec.Decode(&m); err != nil {
		return Mapping{}, fmt.Errorf("read it as JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return Mapping{}, errors.New("something follows the JSON object")
	}
	if m.Pin == nil {
		return Mapping{}, errors.New("pin is missing: list the sets of claims of which a rule must compare one, so that it admits no stranger; " +
			"[] says that every workload of the issuer is your own")
	}
	return m, m.Validate()
}

// claimForm is what a claim may be called in rules.
var claimForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.:/-]*$`)

// Validate checks a mapping that somebody wrote.
func (m Mapping) Validate() error {
	if len(m.Claims) == 0 || len(m.Claims) > maxClaims {
		return fmt.Errorf("claims must map 1 to %d claims", maxClaims)
	}
	for _, name := range slices.Sorted(maps.Keys(m.Claims)) {
		if err := validClaim(name, m.Claims[name]); err != nil {
			return err
		}
	}
	if len(m.Pin) > maxPins {
		return fmt.Errorf("pin has more than %d sets", maxPins)
	}
	for _, set := range m.Pin {
		if len(set) == 0 || len(set) > maxPinned {
			return fmt.Errorf("a set of pin must have 1 to %d claims", maxPinned)
		}
		for i, name := range set {
			if _, ok := m.Claims[name]; !ok {
				return fmt.Errorf("pin names the claim %q, which claims does not map", clip(name))
			}
			if slices.Contains(set[:i], name) {
				return fmt.Errorf("a set of pin names the claim %q twice", name)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.Form)) {
		if _, ok := m.Claims[name]; !ok {
			return fmt.Errorf("form names the claim %q, which claims does not map", clip(name))
		}
		if len(m.Form[name]) > maxForm {
			return fmt.Errorf("the form of claim %q is longer than %d bytes", name, maxForm)
		}
		// As it stands: in brackets, what has one too many would pass.
		if _, err := regexp.Compile(m.Form[name]); err != nil {
			return fmt.Errorf("the form of claim %q is not a regular expression: %w", name, err)
		}
	}
	return nil
}

func validClaim(name, path string) error {
	switch {
	case len(name) > maxClaimName || !claimForm.MatchString(name):
		return fmt.Errorf("the claim name %q must have 1 to %d letters, digits and _ . : / -, and begin with a letter", clip(name), maxClaimName)
	case name == ClaimIssuer || name == ClaimCRN || name == "audience":
		return fmt.Errorf("the claim name %q is taken: it is what the registration says, not the token", name)
	case name == ClaimSubject && path != ClaimSubject:
		return fmt.Errorf("the claim %q is the token's own sub and cannot be mapped from %q", name, clip(path))
	case len(path) > maxClaimPath || strings.Count(path, ".") >= maxClaimDepth || strings.ContainsFunc(path, unicode.IsControl):
		return fmt.Errorf("the place of claim %q must have at most %d bytes and %d members, without control characters", name, maxClaimPath, maxClaimDepth)
	case slices.Contains(strings.Split(path, "."), ""):
		return fmt.Errorf("the place of claim %q must be member names with dots between them, not %q", name, path)
	}
	return nil
}

func anchored(form string) string { return `^(?:` + form + `)$` }

// has reports whether evidence can have a claim.
func (m Mapping) has(claim string) bool {
	_, ok := m.Claims[claim]
	return ok || slices.Contains([]string{ClaimIssuer, ClaimCRN, ClaimSubject}, claim)
}

// names are the claims that evidence can have, sorted.
func (m Mapping) names() []string {
	names := slices.AppendSeq([]string{ClaimIssuer, ClaimCRN, ClaimSubject}, maps.Keys(m.Claims))
	slices.Sort(names)
	return slices.Compact(names)
}

// wellFormed reports whether a value is one with which a claim is pinned.
func (m Mapping) wellFormed(claim, value string) bool {
	form, ok := m.Form[claim]
	if !ok {
		return true
	}
	re, err := regexp.Compile(anchored(form))
	return err == nil && re.MatchString(value)
}

// Validate checks what a caller gave.
func (i *Issuer) Validate() error {
	switch {
	case i.Name == "" || utf8.RuneCountInString(i.Name) > 100:
		return errors.New("name must have 1 to 100 characters")
	case strings.ContainsFunc(i.Name, unicode.IsControl) || strings.ContainsRune(i.Name, ':'):
		return errors.New("name must not contain colons or control characters")
	case i.Issuer == "":
		return errors.New("issuer is required: the iss claim of its tokens")
	case i.Audience == "" || len(i.Audience) > 256:
		return errors.New("audience must have 1 to 256 characters")
	}
	if err := i.Mapping.Validate(); err != nil {
		return fmt.Errorf("mapping: %w", err)
	}
	if len(i.JWKS) > 0 {
		return nil
	}
	return ValidFetchURL(i.Issuer)
}

// clip bounds a text that goes into a message.
func clip(s string) string {
	const most = 100
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
