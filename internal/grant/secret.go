package grant

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
)

func profileKey(account, name string) string { return directory.Key(account, name) }

// APIKey exchanges the API key of a user or service ID for an access token,
// and, for the command line's client, a refresh token.
func (s *Service) APIKey(ctx context.Context, o Origin, secret, scope string) (Answer, error) {
	a := s.begin(TypeAPIKey, "iam-identity.user-apikey.login", "user-apikey", o)
	a.event.Initiator.Credential.Type = "apikey"
	if secret == "" {
		a.trace.Fail(CheckCredential, "apikey", "(absent)", "send the API key as apikey")
		return Answer{}, a.refuse(ctx, missing("apikey"))
	}
	hash := s.cfg.Sealer.Hash(secret)
	key, ok := s.cfg.Directory.APIKeysByHash.One(hash)
	if !ok || subtle.ConstantTimeCompare([]byte(key.Hash), []byte(hash)) != 1 {
		a.trace.Fail(CheckCredential, "an API key that exists", "(unknown)", "the key may have been deleted")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeKeyNotFound, "Provided API key could not be found."))
	}
	a.event.AccountID = key.AccountID
	a.event.Target.ID = s.cfg.Names.Of("iam-identity", "", key.AccountID, "", "apikey", key.ID).String()
	a.event.Target.Name = key.Name
	if crn.KindOf(key.IAMID) == crn.KindServiceID {
		a.event.Action, a.event.Target.TypeURI = "iam-identity.serviceid-apikey.login", "iam-identity/serviceid-apikey"
		a.event.Message = "IAM Identity Service: login.serviceid-apikey"
		a.event.Initiator.Credential.Type = "apikey-serviceid"
	}
	return a.keyed(ctx, key, scope, token.Refresh{})
}

// keyed issues tokens on the strength of an API key, which may have been shown
// now or when the session began.
func (a *attempt) keyed(ctx context.Context, key *identity.APIKey, scope string, session token.Refresh) (Answer, error) {
	now := a.svc.cfg.Now()
	switch {
	case key.Disabled:
		a.trace.Fail(CheckCredential, "an enabled API key", key.ID+" is disabled", "enable the key")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeKeyDisabled, "Provided API key is disabled."))
	case key.Expired(now):
		a.trace.Fail(CheckCredential, "an API key that has not expired", key.ID+" expired "+key.ExpiresAt.Format(time.RFC3339), "create a new key")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeKeyNotFound, "Provided API key is expired."))
	}
	a.trace.Pass(CheckCredential, "an enabled API key", key.ID)
	claims, err := a.svc.subject(key.AccountID, key.IAMID)
	if err != nil {
		a.trace.Fail(CheckSubject, "an identity that exists", key.IAMID, err.Error())
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeUserGone, "Provided user not found or active"))
	}
	a.trace.Pass(CheckSubject, "an identity that exists", key.IAMID)
	a.initiate(claims)
	claims.Scope, claims.KeyID = scope, key.ID
	if a.origin.ClientID == DefaultClient {
		return a.issue(ctx, claims, token.AccessLife)
	}
	if session.SessionID == "" {
		session = token.Refresh{SessionID: "C-" + uuid.NewString(), Expires: now.Add(a.svc.sessionLife(key.AccountID)).Unix()}
	}
	session.IAMID, session.AccountID, session.KeyID, session.ClientID = key.IAMID, key.AccountID, key.ID, a.origin.ClientID
	claims.SessionID = session.SessionID
	refresh, _, err := a.svc.cfg.Tokens.IssueRefresh(session)
	if err != nil {
		return Answer{}, a.refuse(ctx, fault.Of(err))
	}
	answer, err := a.issue(ctx, claims, token.AccessLife)
	answer.RefreshToken = refresh
	if err != nil {
		return Answer{}, err
	}
	return answer, nil
}

// sessionLife is how long a session can be refreshed in an account: not longer
// than keys are kept to verify its refresh tokens.
func (s *Service) sessionLife(account string) time.Duration {
	settings := s.cfg.Directory.SettingsOf(account)
	return min(token.RefreshLife,
		identity.Seconds(settings.SessionExpiration, token.RefreshLife), identity.Seconds(settings.RefreshTokenLife, token.RefreshLife))
}

// DefaultClient is the client id of callers that do not authenticate as one;
// they get no refresh token (reference/iam-identity.md section 1.3).
const DefaultClient = "default"

// Refresh exchanges a refresh token for a new access token. The session ends
// with the API key that began it, and at the latest after token.RefreshLife.
func (s *Service) Refresh(ctx context.Context, o Origin, raw string) (Answer, error) {
	a := s.begin(TypeRefresh, "iam-identity.user-refreshtoken.login", "user-refreshtoken", o)
	a.event.Initiator.Credential.Type = "token"
	if raw == "" {
		a.trace.Fail(CheckCredential, "refresh_token", "(absent)", "log in again")
		return Answer{}, a.refuse(ctx, missing("refresh_token"))
	}
	r, err := s.cfg.Tokens.VerifyRefresh(raw)
	if err != nil {
		a.trace.Fail(CheckCredential, "a refresh token of this server", err.Error(), "log in again")
		f := fault.New(fault.Invalid, CodeInvalidToken, "Provided refresh token is invalid")
		if errors.Is(err, token.ErrExpired) {
			f = fault.New(fault.Invalid, CodeRefreshExpired, "Provided refresh token is expired")
		}
		return Answer{}, a.refuse(ctx, f.Because(err))
	}
	a.event.AccountID = r.AccountID
	idle := a.started.Sub(time.Unix(r.IssuedAt, 0))
	if bound := identity.Seconds(s.cfg.Directory.SettingsOf(r.AccountID).SessionInvalidation, token.RefreshLife); idle > bound {
		a.trace.Fail(CheckCredential, "a session used within "+bound.String(), "unused for "+idle.String(), "log in again")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeRefreshExpired, "Provided refresh token is expired").
			WithDetail("The session was not used for %s, which is longer than the account allows.", idle.Round(time.Second)))
	}
	if r.ClientID != o.ClientID {
		a.trace.Fail(CheckCredential, "client "+r.ClientID, "client "+o.ClientID, "use the client that the session began with")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeInvalidToken, "Provided refresh token belongs to another client"))
	}
	key, ok := s.cfg.Directory.APIKeys.Get(r.KeyID)
	if !ok || key.IAMID != r.IAMID {
		a.trace.Fail(CheckCredential, "API key "+r.KeyID, "(deleted)", "log in again with another key")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeInvalidToken, "The API key behind the session does not exist any more"))
	}
	return a.keyed(ctx, key, "", *r)
}

// AssumeRequest is the assume grant. Account goes with a profile name.
type AssumeRequest struct {
	AccessToken string
	Profile     Selector
	Account     string
}

// Assume exchanges the access token of a user or service ID for one of a
// profile that trusts that identity. It ends with the token it was made from.
func (s *Service) Assume(ctx context.Context, o Origin, r AssumeRequest) (Answer, error) {
	a := s.begin(TypeAssume, "iam-identity.trustedprofile-apikey.login", "trustedprofile-apikey", o)
	a.event.Initiator.Credential.Type = "token"
	a.selected(r.Profile)
	if r.AccessToken == "" {
		a.trace.Fail(CheckCredential, "access_token", "(absent)", "send the caller's access token")
		return Answer{}, a.refuse(ctx, missing("access_token"))
	}
	c, err := s.Caller(r.AccessToken)
	if err != nil {
		a.trace.Fail(CheckCredential, "a valid access token", err.Error(), "get a new access token")
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeInvalidToken, "Provided token is invalid").Because(err))
	}
	a.event.AccountID = c.Account.BSS
	a.initiate(*c)
	// The token's own account decides where it may be used, also when it is to
	// be exchanged for one of another account.
	if settings := s.cfg.Directory.SettingsOf(c.Account.BSS); !settings.Admits(o.Address) {
		a.trace.Fail(CheckCredential, "an access token used from "+settings.AllowedAddresses, o.Address, "use the token from an address that its account allows")
		a.skip(CheckSelector, CheckProfile, CheckTrust)
		return Answer{}, a.refuse(ctx, fault.New(fault.Unauthenticated, CodeAddress, "Access from this IP address is not allowed.").
			WithDetail("The settings of the token's account do not allow the address %s.", o.Address))
	}
	a.trace.Pass(CheckCredential, "a valid access token", c.IAMID)
	switch {
	case r.Profile.empty():
		a.trace.Fail(CheckSelector, "profile_id, profile_crn or profile_name", "(none)", "name the trusted profile")
		return Answer{}, a.refuse(ctx, missing("profile_id"))
	case r.Profile.Name != "" && r.Account == "":
		a.trace.Fail(CheckSelector, "account with profile_name", "(none)", "name the account of the profile")
		return Answer{}, a.refuse(ctx, missing("account"))
	}
	a.trace.Pass(CheckSelector, "one profile", r.Profile.String())

	// A profile that does not trust the caller is answered like one that does
	// not exist, unless it is in the caller's own account.
	p := s.find(r.Account, r.Profile)
	trusted := p != nil && trusts(p, c)
	if p == nil || !trusted && p.AccountID != c.Account.BSS {
		a.trace.Fail(CheckProfile, r.Profile.String(), "no such profile that trusts the caller", "check the id, or the name and account")
		a.skip(CheckTrust)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotFound, "Unable to find Object.").
			WithDetail("Object Type: 'Profile' with %s.", r.Profile))
	}
	a.trace.Pass(CheckProfile, r.Profile.String(), p.ID)
	a.event.AccountID = p.AccountID
	a.event.Target.ID = s.cfg.Names.Of("iam-identity", "", p.AccountID, "", "profile", p.ID).String()
	a.event.Target.Name = p.Name
	if !trusted {
		a.trace.FailNear(CheckTrust, "an identity entry for "+c.IAMID, describeIdentities(p), "add the identity to the profile", nil, addIdentity(p, c.IAMID))
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile not eligible.").
			WithDetail("The identity '%s' is not permitted to assume the indicated trusted profile; profile ID '%s'", c.IAMID, crn.IAMID(p.ID)))
	}
	if f := a.letIn(c, p.AccountID); f != nil {
		return Answer{}, a.refuse(ctx, f)
	}
	a.trace.Pass(CheckTrust, "an identity entry for "+c.IAMID, describeIdentities(p))

	source := a.event.Initiator
	a.event.Initiator.ID, a.event.Initiator.Name = crn.IAMID(p.ID), p.Name
	a.event.Initiator.TypeURI, a.event.Initiator.Credential.Type = activity.ProfileType, "profile"
	a.event.Initiator.AuthnID, a.event.Initiator.AuthnName = source.ID, source.Name
	return a.issue(ctx, token.Claims{
		IAMID: crn.IAMID(p.ID), SubType: token.SubProfile, Name: p.Name,
		Authn:   &token.Authn{Subject: c.Subject, IAMID: c.IAMID, SubType: c.SubType, Name: c.Name, Email: c.Email},
		Account: token.Account{BSS: p.AccountID},
		ACR:     c.ACR, AMR: c.AMR, KeyID: c.KeyID,
	}, time.Unix(c.Expires, 0).Sub(s.cfg.Now()))
}

// letIn holds an identity of another account to the settings of the account
// that it wants to act in. An identity whose account the settings do not list
// leaves an event, whether it is kept out or only watched
// (reference/access-and-audit.md sections 1.10 and 6.2).
func (a *attempt) letIn(c *token.Claims, account string) *fault.Error {
	if c.Account.BSS == account {
		return nil
	}
	typ := access.ExternalUser
	if c.SubType == token.SubServiceID {
		typ = access.ExternalServiceID
	}
	admitted, listed := a.svc.cfg.Directory.Interaction(account).Admits(typ, c.Account.BSS)
	if listed {
		return nil
	}
	decision := "Permit"
	if !admitted {
		decision = "Deny"
	}
	e := a.event
	e.ID, e.Action = uuid.NewString(), "iam-access-management.account-settings.eval"
	e.Message, e.Severity = "IAM Access Management: eval account-settings "+typ, activity.Warning
	e.Target = activity.Target{
		ID:   a.svc.cfg.Names.Of("iam-access-management", "", account, "", "settings", "access_management").String(),
		Name: "access_management", TypeURI: "iam-access-management/account-settings",
	}
	e.LogSourceCRN = a.svc.cfg.Names.Of("iam-access-management", "global", account, "", "", "").String()
	e.ResponseData = json.RawMessage(`{"isEnforced":` + strconv.FormatBool(!admitted) + `,"decision":"` + decision + `"}`)
	a.with = append(a.with, &e)
	if admitted {
		return nil
	}
	a.trace.Fail(CheckTrust, "an identity of an account that is let in", c.Account.BSS, "add the account to the access management settings, or have an identity of this account assume the profile")
	return fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile not eligible.").
		WithDetail("The settings of the profile's account do not let in identities of account %s.", c.Account.BSS)
}

// trusts reports whether one of the profile's identities is the caller. A
// profile session cannot put on another profile.
func trusts(p *identity.Profile, c *token.Claims) bool {
	if crn.KindOf(c.IAMID) == crn.KindProfile {
		return false
	}
	return slices.ContainsFunc(p.Identities, func(i identity.ProfileIdentity) bool {
		return i.IAMID == c.IAMID && (len(i.Accounts) == 0 || slices.Contains(i.Accounts, c.Account.BSS))
	})
}

// addIdentity is the entry of a profile that would let an identity assume it, or
// nil where none can, or one is there that is about other accounts.
func addIdentity(p *identity.Profile, iamID string) *activity.Change {
	kind, id := "", iamID
	switch crn.KindOf(iamID) {
	case crn.KindUser:
		kind = "user"
	case crn.KindServiceID:
		kind, id = "serviceid", crn.Identifier(iamID)
	}
	if kind == "" || slices.ContainsFunc(p.Identities, func(i identity.ProfileIdentity) bool { return i.IAMID == iamID }) {
		return nil
	}
	return &activity.Change{
		Do: activity.Add, Kind: activity.KindIdentity,
		Edits:   []activity.Edit{{Attribute: "type", To: kind}, {Attribute: "identifier", To: id}},
		Command: activity.Command("tabard", "iam", "trusted-profile-identity-create", p.ID, "--id", id, "--id-type", strings.ToUpper(kind)),
	}
}

func describeIdentities(p *identity.Profile) string {
	if len(p.Identities) == 0 {
		return "the profile trusts no identity"
	}
	ids := make([]string, len(p.Identities))
	for n, i := range p.Identities {
		ids[n] = i.IAMID
	}
	return strings.Join(ids, ", ")
}

// ErrSubjectGone means that the identity behind a valid token does not exist
// any more.
var ErrSubjectGone = errors.New("the identity does not exist any more")

// ErrUserDisabled means that an administrator has shut the user out.
var ErrUserDisabled = errors.New("the user is disabled; an administrator can enable him again")

// ErrProviderGone means that the identity provider behind a valid token was
// disabled or removed.
var ErrProviderGone = errors.New("the identity provider that vouched for the user is disabled or gone")

// ErrAccountClosed means that the account of a valid token was closed.
var ErrAccountClosed = errors.New("the account is closed")

// subject returns the claims that describe a user or service ID.
func (s *Service) subject(account, iamID string) (token.Claims, error) {
	d := s.cfg.Directory
	c := token.Claims{IAMID: iamID, Account: token.Account{BSS: account}}
	switch crn.KindOf(iamID) {
	case crn.KindServiceID:
		id, ok := d.ServiceIDs.Get(crn.Identifier(iamID))
		if !ok || id.AccountID != account {
			return c, ErrSubjectGone
		}
		c.Name, c.SubType = id.Name, token.SubServiceID
		c.Authn = &token.Authn{Subject: id.ID, IAMID: iamID, SubType: token.SubServiceID, Name: id.Name}
	case crn.KindUser:
		u, ok := d.Users.Get(directory.UserKey(account, iamID))
		if !ok {
			return c, ErrSubjectGone
		}
		if u.Disabled {
			return c, ErrUserDisabled
		}
		c.Name, c.Email, c.Subject = u.Name, u.Email, u.Email
		c.GivenName, c.FamilyName = u.FirstName, u.LastName
		if c.GivenName == "" {
			c.GivenName, c.FamilyName, _ = strings.Cut(u.Name, " ")
		}
		c.ACR, c.AMR = 1, []string{"pwd"}
		c.Authn = &token.Authn{Subject: u.Email, IAMID: iamID, Name: u.Name, Email: u.Email}
	default:
		return c, ErrSubjectGone
	}
	return c, nil
}

// Holder returns the claims that a token earned with the API key would have.
// That somebody asked is recorded, so that a stolen key cannot be tried in
// silence.
func (s *Service) Holder(ctx context.Context, o Origin, secret string) (*token.Claims, error) {
	key, ok := s.cfg.Directory.APIKeysByHash.One(s.cfg.Sealer.Hash(secret))
	if !ok || key.Disabled || key.Expired(s.cfg.Now()) {
		return nil, ErrSubjectGone
	}
	if account, ok := s.cfg.Directory.Accounts.Get(key.AccountID); !ok || account.Closed() {
		return nil, ErrAccountClosed
	}
	c, err := s.subject(key.AccountID, key.IAMID)
	if err != nil {
		return nil, err
	}
	a := s.begin("", "iam-identity.user-apikey.introspect", "user-apikey", o)
	a.event.Message = "IAM Identity Service: introspect user-apikey " + key.Name
	a.event.AccountID = key.AccountID
	a.event.Target = activity.Target{
		ID:   s.cfg.Names.Of("iam-identity", "", key.AccountID, "", "apikey", key.ID).String(),
		Name: key.Name, TypeURI: "iam-identity/apikey",
	}
	a.event.Initiator.Credential.Type = "apikey"
	a.initiate(c)
	a.trace.Pass(CheckCredential, "an enabled API key", key.ID)
	if f := a.admit(key.AccountID); f != nil {
		return nil, a.refuse(ctx, f)
	}
	a.event.SetReason(http.StatusOK, "")
	if err := a.record(ctx); err != nil {
		return nil, err
	}
	c.ID, c.RealmID, c.Identifier = c.IAMID, crn.Realm(c.IAMID), crn.Identifier(c.IAMID)
	return &c, nil
}

// RejectedError says why a token that this server has signed does not count any
// more. Its claims were true once: they tell whose log the attempt belongs in,
// and nothing else may be made of them.
type RejectedError struct {
	Claims *token.Claims
	Cause  error
}

func (e *RejectedError) Error() string { return e.Cause.Error() }

// Unwrap returns the cause.
func (e *RejectedError) Unwrap() error { return e.Cause }

// Caller checks an access token and that what it stands on still exists: the
// subject, and the API key if there was one. Deleting either ends the tokens
// that are out (promise 6). The error for a token that has once counted is a
// *RejectedError.
func (s *Service) Caller(raw string) (*token.Claims, error) {
	c, err := s.cfg.Tokens.Verify(raw)
	if errors.Is(err, token.ErrExpired) {
		if c, ok := s.cfg.Tokens.Lapsed(raw); ok {
			return nil, &RejectedError{c, err}
		}
	}
	if err != nil {
		return nil, err
	}
	if err := s.stands(c); err != nil {
		return nil, &RejectedError{c, err}
	}
	return c, nil
}

// stands returns an error unless what a token stands on still exists.
func (s *Service) stands(c *token.Claims) error {
	d := s.cfg.Directory
	if c.SubType == token.SubHost {
		if err := s.liveHost(c); err != nil {
			return err
		}
		return nil
	}
	if c.KeyID != "" {
		key, ok := d.APIKeys.Get(c.KeyID)
		if !ok || key.Disabled || key.Expired(s.cfg.Now()) {
			return ErrSubjectGone
		}
		// In a profile session the key is that of whoever put the profile on.
		if key.IAMID != c.IAMID {
			if err := s.Live(key.AccountID, key.IAMID); err != nil {
				return err
			}
		}
	}
	if err := s.Live(c.Account.BSS, c.IAMID); err != nil {
		return err
	}
	if c.GrantType == TypeJWTBearer && !s.vouched(c) {
		return ErrProviderGone
	}
	return nil
}

// liveHost returns an error unless the host of a token is live and has the key
// that it got the token with: one that joins again with another key leaves its
// old tokens behind.
func (s *Service) liveHost(c *token.Claims) error {
	if err := s.Live(c.Account.BSS, c.IAMID); err != nil {
		return err
	}
	h, ok := s.cfg.Directory.Hosts.Get(crn.Identifier(c.IAMID))
	if crn.KindOf(c.IAMID) != crn.KindHost || !ok || !slices.Contains(h.KeyIDs(), c.KeyID) {
		return ErrSubjectGone
	}
	return nil
}

// vouched reports whether the provider that a federated token stands on is
// still one of the account.
func (s *Service) vouched(c *token.Claims) bool {
	d := s.cfg.Directory
	return slices.ContainsFunc(d.ProvidersByAccount.Get(c.Account.BSS), func(p *identity.Provider) bool {
		if p.Disabled {
			return false
		}
		if crn.KindOf(c.IAMID) == crn.KindProfile {
			return c.Authn != nil && strings.HasPrefix(c.Authn.IAMID, p.ID+"-")
		}
		u, ok := d.Users.Get(directory.UserKey(c.Account.BSS, c.IAMID))
		return ok && u.Issuer == p.Issuer
	})
}

// Live returns an error unless the account is open and the identity exists in
// it: without that, no token and no policy lets it do anything.
func (s *Service) Live(accountID, iamID string) error {
	d := s.cfg.Directory
	if account, ok := d.Accounts.Get(accountID); !ok || account.Closed() {
		return ErrAccountClosed
	}
	switch crn.KindOf(iamID) {
	case crn.KindProfile:
		if p, ok := d.Profiles.Get(crn.Identifier(iamID)); !ok || p.AccountID != accountID {
			return ErrSubjectGone
		}
		return nil
	case crn.KindHost:
		if h, ok := d.Hosts.Get(crn.Identifier(iamID)); !ok || h.Revoked || accountID != s.cfg.OperatorAccount {
			return ErrSubjectGone
		}
		return nil
	}
	_, err := s.subject(accountID, iamID)
	return err
}

// initiate fills the event's initiator from the claims of a user or service ID.
func (a *attempt) initiate(c token.Claims) {
	typ := activity.UserType
	if c.SubType == token.SubServiceID {
		typ = activity.ServiceIDType
	}
	i := &a.event.Initiator
	i.ID, i.Name, i.TypeURI, i.AuthnID, i.AuthnName = c.IAMID, c.Name, typ, c.IAMID, c.Name
}
