package token

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"

	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/jwt"
)

// Lifetimes (reference/iam-identity.md sections 1.3 and 4.8).
const (
	AccessLife  = time.Hour
	RefreshLife = 72 * time.Hour
)

// refreshType is the typ header of a refresh token. An access token has none,
// so neither passes for the other.
const refreshType = "rt+jwt"

// Claims of an IAM access token (reference/iam-identity.md section 2.2).
type Claims struct {
	IAMID      string   `json:"iam_id"`
	ID         string   `json:"id"`
	RealmID    string   `json:"realmid"`
	JTI        string   `json:"jti"`
	Identifier string   `json:"identifier"`
	GivenName  string   `json:"given_name,omitempty"`
	FamilyName string   `json:"family_name,omitempty"`
	Name       string   `json:"name,omitempty"`
	Email      string   `json:"email,omitempty"`
	Subject    string   `json:"sub"`
	SubType    string   `json:"sub_type,omitempty"`
	Authn      *Authn   `json:"authn,omitempty"`
	Account    Account  `json:"account"`
	IssuedAt   int64    `json:"iat"`
	Expires    int64    `json:"exp"`
	Issuer     string   `json:"iss"`
	GrantType  string   `json:"grant_type"`
	Scope      string   `json:"scope"`
	ClientID   string   `json:"client_id"`
	ACR        int      `json:"acr"`
	AMR        []string `json:"amr,omitempty"`
	SessionID  string   `json:"session_id,omitempty"`

	// KeyID is the API key behind the token, or the key of the host whose token
	// it is, so that its deletion can be told from its use.
	KeyID string `json:"apikey_id,omitempty"`
}

// Authn is who authenticated: the caller himself, or what put on the profile.
type Authn struct {
	Subject string `json:"sub"`
	IAMID   string `json:"iam_id"`
	SubType string `json:"sub_type,omitempty"`
	Name    string `json:"name,omitempty"`
	Email   string `json:"email,omitempty"`
}

// Account is the account that a token acts in.
type Account struct {
	Valid  bool   `json:"valid"`
	BSS    string `json:"bss"`
	Frozen bool   `json:"frozen"`
}

// SubTypes of a token.
const (
	SubServiceID = "ServiceId"
	SubProfile   = "Profile"
	SubCompute   = "ComputeResource"
	SubHost      = "Host"
)

// Issuer makes and checks the installation's tokens.
type Issuer struct {
	Keys *KeyRing
	URL  string // the iss claim
	Now  func() time.Time
}

// Issue signs an access token with the claims that Fill makes of c.
func (i *Issuer) Issue(c Claims, life time.Duration) (string, Claims, error) {
	c = i.Fill(c, life)
	c.JTI = uuid.NewString()
	raw, err := i.Keys.Sign(&c, "")
	return raw, c, err
}

// Fill returns the claims of a token from now on, but for jti, which only a
// token has: iss, iat, exp and everything that follows from the IAM ID. Life
// bounds the token and is at most AccessLife.
func (i *Issuer) Fill(c Claims, life time.Duration) Claims {
	now := i.Now()
	c.ID, c.RealmID, c.Identifier = c.IAMID, crn.Realm(c.IAMID), crn.Identifier(c.IAMID)
	if c.Subject == "" {
		c.Subject = c.Identifier
	}
	c.Issuer = i.URL
	c.IssuedAt = now.Unix()
	c.Expires = now.Add(min(life, AccessLife)).Unix()
	if c.Scope == "" {
		c.Scope = "ibm openid"
	}
	c.Account.Valid = true
	return c
}

// Why a token proves nothing. Callers tell them apart to explain.
var (
	ErrUnknownKey = errors.New("the token names a key that is not ours")
	ErrIssuer     = errors.New("the token's issuer is not this server")
	ErrExpired    = errors.New("the token has expired")
	ErrTime       = errors.New("the token is from the future")
)

// skew bounds how far another node's clock may be ahead.
const skew = 30 * time.Second

// ownAlgs are what our key ring can have signed with.
var ownAlgs = []jose.SignatureAlgorithm{jose.ES256, jose.RS256}

// Verify checks an access token: form, key, signature, issuer, time. It does
// not ask whether the subject still exists.
func (i *Issuer) Verify(raw string) (*Claims, error) {
	var c Claims
	if err := i.verify(raw, "", &c); err != nil {
		return nil, err
	}
	if err := i.current(c.Issuer, c.IssuedAt, c.Expires); err != nil {
		return nil, err
	}
	if c.IAMID == "" || !crn.ValidAccountID(c.Account.BSS) {
		return nil, fmt.Errorf("%w: iam_id or account is missing", jwt.ErrMalformed)
	}
	return &c, nil
}

// Lapsed returns the claims of an access token that was good once and has
// expired.
func (i *Issuer) Lapsed(raw string) (*Claims, bool) {
	var c Claims
	if err := i.verify(raw, "", &c); err != nil || !errors.Is(i.current(c.Issuer, c.IssuedAt, c.Expires), ErrExpired) {
		return nil, false
	}
	return &c, c.IAMID != "" && crn.ValidAccountID(c.Account.BSS)
}

func (i *Issuer) verify(raw, typ string, claims any) error {
	t, err := jwt.Parse(strings.TrimSpace(raw), ownAlgs, typ)
	if err != nil {
		return err
	}
	key, ok := i.Keys.Public(t.KeyID)
	if !ok {
		return ErrUnknownKey
	}
	return t.Verify(key, claims)
}

func (i *Issuer) current(iss string, iat, exp int64) error {
	now := i.Now()
	switch {
	case iss != i.URL:
		return ErrIssuer
	case now.Unix() >= exp:
		return ErrExpired
	case iat > now.Add(skew).Unix():
		return ErrTime
	}
	return nil
}

// Refresh is what a refresh token carries: who may get new access tokens, and
// the API key whose end ends it.
type Refresh struct {
	IAMID     string `json:"iam_id"`
	AccountID string `json:"account_id"`
	KeyID     string `json:"apikey_id"`
	SessionID string `json:"session_id"`
	ClientID  string `json:"client_id"`
	IssuedAt  int64  `json:"iat"`
	Expires   int64  `json:"exp"`
	Issuer    string `json:"iss"`
}

// IssueRefresh signs a refresh token. A refreshed one keeps the end of the
// first, so that a session cannot renew itself for ever.
func (i *Issuer) IssueRefresh(r Refresh) (string, Refresh, error) {
	now := i.Now()
	r.Issuer, r.IssuedAt = i.URL, now.Unix()
	if r.Expires == 0 {
		r.Expires = now.Add(RefreshLife).Unix()
	}
	raw, err := i.Keys.Sign(&r, refreshType)
	return raw, r, err
}

// VerifyRefresh checks a refresh token.
func (i *Issuer) VerifyRefresh(raw string) (*Refresh, error) {
	var r Refresh
	if err := i.verify(raw, refreshType, &r); err != nil {
		return nil, err
	}
	if err := i.current(r.Issuer, r.IssuedAt, r.Expires); err != nil {
		return nil, err
	}
	return &r, nil
}
