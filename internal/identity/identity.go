// Package identity holds accounts and the identities in them: users, service
// IDs, API keys, trusted profiles and what ties a profile to the compute
// resources and identities that may put it on. Plain structs and their rules;
// storing them and deciding about them happens elsewhere.
package identity

import (
	"time"

	"tabard.dev/tabard/internal/object"
)

// Limits of the API (reference/iam-identity.md section 4.11). Links per
// profile have no published number; the one here bounds a token request.
const (
	MaxRulesPerProfile = 20
	MaxLinksPerProfile = 500
	MaxKeysPerIdentity = 20
	MinAPIKeyLength    = 32
)

// Account owns everything else. Nothing of one account is visible from another.
type Account struct {
	object.Meta
	ID       string    `json:"id"` // 32 hexadecimal digits
	Name     string    `json:"name"`
	OwnerID  string    `json:"owner_id"` // IAM ID
	ClosedAt time.Time `json:"closed_at,omitzero"`
}

// Closed reports whether the account was closed: nobody gets a token in it, and
// the tokens that are out are refused.
func (a *Account) Closed() bool { return !a.ClosedAt.IsZero() }

// User is a person's identity in one account.
type User struct {
	object.Meta
	IAMID     string `json:"iam_id"`
	AccountID string `json:"account_id"`
	Email     string `json:"email"`
	Name      string `json:"name"`
	FirstName string `json:"first_name,omitempty"`
	LastName  string `json:"last_name,omitempty"`
	Phone     string `json:"phone,omitempty"`

	// Issuer and Subject name the user at the identity provider that
	// introduced him; both are empty for users that the account's owner made.
	Issuer  string `json:"issuer,omitempty"`
	Subject string `json:"subject,omitempty"`

	// Invited is set until the user has been logged in for the first time.
	Invited  bool `json:"invited,omitempty"`
	Disabled bool `json:"disabled,omitempty"`
}

// ServiceID is an identity for software that has to hold a key.
type ServiceID struct {
	object.Meta
	ID          string   `json:"id"` // ServiceId-<uuid>
	AccountID   string   `json:"account_id"`
	Name        string   `json:"name"` // not unique
	Description string   `json:"description,omitempty"`
	GroupID     string   `json:"group_id,omitempty"` // of a ServiceIDGroup
	Instances   []string `json:"unique_instance_crns,omitempty"`
	Locked      bool     `json:"locked,omitempty"`
}

// ServiceIDGroup puts service IDs together, for people to find them.
type ServiceIDGroup struct {
	object.Meta
	ID          string `json:"id"` // ServiceIdGroup-<uuid>
	AccountID   string `json:"account_id"`
	Name        string `json:"name"` // unique in the account
	Description string `json:"description,omitempty"`
}

// What is to happen to an API key that was found in public.
const (
	LeakNone    = "none"
	LeakDisable = "disable"
	LeakDelete  = "delete"
)

// APIKey is a long-lived secret of a user or service ID. Only its keyed hash
// is kept, unless the owner of a service ID asked for the value to be stored.
type APIKey struct {
	object.Meta
	ID          string    `json:"id"` // ApiKey-<uuid>
	AccountID   string    `json:"account_id"`
	IAMID       string    `json:"iam_id"`
	Name        string    `json:"name"` // not unique
	Description string    `json:"description,omitempty"`
	Hash        string    `json:"hash"` // see token.Sealer.Hash
	ExpiresAt   time.Time `json:"expires_at,omitzero"`
	Locked      bool      `json:"locked,omitempty"`
	Disabled    bool      `json:"disabled,omitempty"`

	Sealed           []byte `json:"sealed,omitempty"` // the stored value, see token.Sealer
	SupportSessions  bool   `json:"support_sessions,omitempty"`
	ActionWhenLeaked string `json:"action_when_leaked,omitempty"` // "" means LeakNone
	Leaked           bool   `json:"leaked,omitempty"`
}

// Expired reports whether the key's end has come.
func (k *APIKey) Expired(now time.Time) bool {
	return !k.ExpiresAt.IsZero() && !now.Before(k.ExpiresAt)
}

// Profile is a trusted profile: an identity without a credential, put on by
// whatever its links, rules and identities trust.
type Profile struct {
	object.Meta
	ID          string `json:"id"` // Profile-<uuid>
	AccountID   string `json:"account_id"`
	Name        string `json:"name"` // unique in the account
	Description string `json:"description,omitempty"`
	Email       string `json:"email,omitempty"`

	// Identities may assume the profile with a token of their own.
	Identities []ProfileIdentity `json:"identities,omitempty"`
}

// ProfileIdentity is one identity that may assume a profile
// (reference/iam-identity.md section 4.5).
type ProfileIdentity struct {
	Type        string   `json:"type"` // user, serviceid or crn
	Identifier  string   `json:"identifier"`
	IAMID       string   `json:"iam_id"`
	Accounts    []string `json:"accounts,omitempty"` // users only
	Description string   `json:"description,omitempty"`
}

// CRType is a type of compute resource.
type CRType string

// The compute resource types: those of reference/iam-identity.md section 4.3,
// and OIDC, which is ours. Evidence is verified for VSI, IKS_SA, ROKS_SA and
// OIDC; links and rules of the others are kept and never match.
const (
	VSI    CRType = "VSI"
	PVS    CRType = "PVS"
	BMS    CRType = "BMS"
	IKSSA  CRType = "IKS_SA"
	ROKSSA CRType = "ROKS_SA"
	CE     CRType = "CE"
	OIDC   CRType = "OIDC" // a job or service that another OpenID Connect issuer vouches for
)

// Valid reports whether t is one of the types.
func (t CRType) Valid() bool {
	switch t {
	case VSI, PVS, BMS, IKSSA, ROKSSA, CE, OIDC:
		return true
	}
	return false
}

// Kubernetes reports whether the type is a service account of a cluster.
func (t CRType) Kubernetes() bool { return t == IKSSA || t == ROKSSA }

// Link lets one named compute resource put on a profile.
type Link struct {
	object.Meta
	ID             string `json:"id"` // Link-<uuid>
	ProfileID      string `json:"profile_id"`
	AccountID      string `json:"account_id"` // of the profile
	Name           string `json:"name,omitempty"`
	CRType         CRType `json:"cr_type"`
	CRN            string `json:"crn"`
	Namespace      string `json:"namespace,omitempty"`
	ServiceAccount string `json:"service_account,omitempty"` // "name" on the wire
	ComponentType  string `json:"component_type,omitempty"`
	ComponentName  string `json:"component_name,omitempty"`
	CrossAccount   bool   `json:"is_cross_account,omitempty"`
}

// Rule types.
const (
	RuleCR   = "Profile-CR"
	RuleSAML = "Profile-SAML"
)

// ClaimRule lets every compute resource whose proved claims meet all its
// conditions put on a profile. Rules of type Profile-SAML are kept for their
// clients and never match a compute resource.
type ClaimRule struct {
	object.Meta
	ID         string      `json:"id"` // ClaimRule-<uuid>
	ProfileID  string      `json:"profile_id"`
	AccountID  string      `json:"account_id"`
	Name       string      `json:"name,omitempty"`
	Type       string      `json:"type"`
	RealmName  string      `json:"realm_name,omitempty"`
	CRType     CRType      `json:"cr_type,omitempty"`
	Expiration int         `json:"expiration"` // seconds, Profile-SAML only
	Conditions []Condition `json:"conditions"`
}
