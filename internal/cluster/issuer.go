package cluster

import (
	"encoding/json"

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
}

// Mapping says which claims of an issuer's tokens rules can compare, and which
// of them a rule must pin down so that it does not admit strangers.
type Mapping struct {
	// Claims maps a claim's name in rules to where it is in the token: member
	// names with dots between them.
	Claims map[string]string `json:"claims" yaml:"claims"`

	// Pin lists sets of rule claims; a rule must compare all claims of one of
	// the sets with given values (EQUALS or IN). Empty demands nothing.
	Pin [][]string `json:"pin,omitempty" yaml:"pin"`
}
