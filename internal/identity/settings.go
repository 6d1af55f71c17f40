package identity

import (
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/object"
)

// NotSet is the value of a setting that leaves the matter to its default.
const NotSet = "NOT_SET"

// Values of the restrictions.
const (
	Restricted    = "RESTRICTED"
	NotRestricted = "NOT_RESTRICTED"
)

// Settings are an account's identity settings. All numbers are text, as on the
// wire (reference/iam-identity.md section 4.8).
type Settings struct {
	object.Meta
	AccountID string `json:"account_id"`

	RestrictCreateServiceID string `json:"restrict_create_service_id"`
	RestrictCreateAPIKey    string `json:"restrict_create_platform_apikey"`
	RestrictUserList        string `json:"restrict_user_list_visibility"`
	AllowedAddresses        string `json:"allowed_ip_addresses"` // comma-separated addresses, prefixes and ranges; "" allows all
	MFA                     string `json:"mfa"`

	SessionExpiration   string `json:"session_expiration_in_seconds"`
	SessionInvalidation string `json:"session_invalidation_in_seconds"`
	MaxSessions         string `json:"max_sessions_per_identity"`
	AccessTokenLife     string `json:"system_access_token_expiration_in_seconds"`
	RefreshTokenLife    string `json:"system_refresh_token_expiration_in_seconds"`

	UserMFA     []UserMFA    `json:"user_mfa"`
	UserDomains []UserDomain `json:"restrict_user_domains"`
}

// UserMFA is the demand on one user's login.
type UserMFA struct {
	IAMID string `json:"iam_id"`
	MFA   string `json:"mfa"`
}

// UserDomain limits whom an account may invite from one realm.
type UserDomain struct {
	Realm    string   `json:"realm_id"`
	Patterns []string `json:"invitation_email_allow_patterns"`
	Restrict bool     `json:"restrict_invitation"`
}

// DefaultSettings are what an account has that never changed one.
func DefaultSettings(accountID string) *Settings {
	return &Settings{
		AccountID: accountID, RestrictCreateServiceID: NotSet, RestrictCreateAPIKey: NotSet, RestrictUserList: NotRestricted,
		MFA: "NONE", SessionExpiration: NotSet, SessionInvalidation: NotSet, MaxSessions: NotSet,
		AccessTokenLife: NotSet, RefreshTokenLife: NotSet, UserMFA: []UserMFA{}, UserDomains: []UserDomain{},
	}
}

// Seconds reads one of the settings that are a number of seconds; def stands
// for one that is not set.
func Seconds(setting string, def time.Duration) time.Duration {
	n, err := strconv.Atoi(setting)
	if err != nil || n <= 0 || time.Duration(n) > math.MaxInt64/time.Second {
		return def
	}
	return time.Duration(n) * time.Second
}

// Admits reports whether a caller at the address may act in the account.
// An address that cannot be read is admitted only where all are.
func (s *Settings) Admits(address string) bool {
	allowed, err := ParseAddresses(s.AllowedAddresses)
	if err != nil {
		return false
	}
	if len(allowed) == 0 {
		return true
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		return false
	}
	a = a.Unmap().WithZone("")
	for _, r := range allowed {
		if r.From.Compare(a) <= 0 && a.Compare(r.To) <= 0 {
			return true
		}
	}
	return false
}

// AddressRange is a range of addresses of one family, both ends in it.
type AddressRange struct{ From, To netip.Addr }

// ParseAddresses reads a comma-separated list of addresses (10.0.0.1),
// prefixes (10.0.0.0/8) and ranges (10.0.0.1-10.0.0.9).
func ParseAddresses(list string) ([]AddressRange, error) {
	var out []AddressRange
	for item := range strings.SplitSeq(list, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		r, err := parseAddress(item)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

func parseAddress(item string) (AddressRange, error) {
	if strings.Contains(item, "/") {
		p, err := netip.ParsePrefix(item)
		if err != nil {
			return AddressRange{}, err
		}
		if p.Addr().Is4In6() {
			return AddressRange{}, &rangeError{item, "a prefix; write IPv4 addresses with dots alone"}
		}
		p = p.Masked()
		return AddressRange{p.Addr(), lastOf(p)}, nil
	}
	first, last, ranged := strings.Cut(item, "-")
	if !ranged {
		last = first
	}
	var ends [2]netip.Addr
	for i, end := range []string{first, last} {
		a, err := netip.ParseAddr(strings.TrimSpace(end))
		if err != nil {
			return AddressRange{}, err
		}
		if a.Zone() != "" {
			return AddressRange{}, &rangeError{item, "an address without a zone"}
		}
		ends[i] = a.Unmap()
	}
	if ends[0].Is4() != ends[1].Is4() || ends[1].Less(ends[0]) {
		return AddressRange{}, &rangeError{item, "a range of addresses of one family, the lower one first"}
	}
	return AddressRange{ends[0], ends[1]}, nil
}

// lastOf returns the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 1 << (7 - bit%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

type rangeError struct{ item, wanted string }

func (e *rangeError) Error() string { return strconv.Quote(e.item) + " is not " + e.wanted }

// Preference is a value that a service keeps for an identity.
type Preference struct {
	object.Meta
	AccountID string   `json:"account_id"`
	IAMID     string   `json:"iam_id"`
	Service   string   `json:"service"`
	ID        string   `json:"id"`
	Text      *string  `json:"value_string,omitempty"`
	List      []string `json:"value_list_of_strings,omitempty"`
}

// Kinds of report.
const (
	ReportInactive = "inactive"
	ReportMFA      = "mfa_status"
)

// Report is one that was asked for; Doc is empty until it is ready.
type Report struct {
	object.Meta
	ID        string    `json:"id"` // the reference
	AccountID string    `json:"account_id"`
	Kind      string    `json:"kind"`
	From      time.Time `json:"from,omitzero"`
	To        time.Time `json:"to,omitzero"`
	Hours     int       `json:"hours,omitempty"`
	Doc       []byte    `json:"doc,omitempty"` // JSON
}

// Provider is an OpenID Connect issuer whose users an account lets in.
type Provider struct {
	object.Meta
	ID        string `json:"id"` // Idp-<uuid>
	AccountID string `json:"account_id"`
	Name      string `json:"name"`     // unique in the account
	Issuer    string `json:"issuer"`   // the realm of rules; unique in the account
	Audience  string `json:"audience"` // the aud that its tokens must have
	CA        string `json:"ca,omitempty"`
	JWKS      []byte `json:"jwks,omitempty"` // uploaded keys; empty means discovery
	Disabled  bool   `json:"disabled,omitempty"`
}

// Usage counts the logins of an identity, an API key or the permits of a
// policy.
type Usage struct {
	object.Meta
	ID    string    `json:"id"`
	Count int64     `json:"count"`
	Last  time.Time `json:"last"`
}
