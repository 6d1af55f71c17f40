// Package grant gives out access tokens: one method for each way to earn one.
// Each walks its fixed list of checks, records the outcome with the trace, and
// lets the token go only after the record is durable (promise 2).
package grant

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/trust"
	"tabard.dev/tabard/internal/usage"
)

// Recorder makes events durable.
type Recorder interface {
	Record(ctx context.Context, events ...*activity.Event) error
}

// Config are the collaborators.
type Config struct {
	Directory *directory.Directory
	Workloads *attest.Workloads
	Instances *attest.Instances
	Users     *attest.Users
	Hosts     *attest.HostProofs
	Tokens    *token.Issuer
	Sealer    *token.Sealer
	Journal   Recorder
	Names     crn.Names
	Now       func() time.Time

	// OperatorAccount is the account whose administrators run the
	// installation. Attempts that cannot be assigned to an account stand in
	// its log.
	OperatorAccount string

	// Attempts, when not nil, is told of refusals that another account than the
	// one whose log has them is concerned by.
	Attempts Attempts

	// Usage counts logins; nil counts nothing.
	Usage *usage.Tracker

	// Observe, when not nil, is told of every attempt: the grant, and "ok" or
	// the error code.
	Observe func(grant, outcome string, took time.Duration)
}

// Service gives out access tokens.
type Service struct{ cfg Config }

// New returns the service.
func New(cfg Config) *Service { return &Service{cfg} }

// Origin is where a request came from.
type Origin struct {
	TransactionID string
	Address       string // of the peer, without port
	Agent         string // user agent
	ClientID      string // "default" when the caller did not authenticate as a client
}

// Answer is what a successful grant gives.
type Answer struct {
	AccessToken  string
	RefreshToken string // "" when the grant has none
	Claims       token.Claims
}

// Grant types (reference/iam-identity.md section 1.2).
const (
	TypeAPIKey  = "urn:ibm:params:oauth:grant-type:apikey"
	TypeCRToken = "urn:ibm:params:oauth:grant-type:cr-token"
	TypeAssume  = "urn:ibm:params:oauth:grant-type:assume"
	TypeRefresh = "refresh_token"
)

// Names of the checks that this package adds to those of package attest.
const (
	CheckSelector   = "profile-selector"
	CheckProfile    = "profile"
	CheckLink       = "profile-link"
	CheckRule       = "profile-rule"
	CheckCredential = "credential"
	CheckSubject    = "subject"
	CheckTrust      = "profile-identity"
	CheckAccount    = "account"
	CheckAddress    = "address"
)

// attempt is one request for a token under way.
type attempt struct {
	svc     *Service
	origin  Origin
	grant   string
	started time.Time
	trace   activity.Trace
	event   activity.Event
	with    []*activity.Event // recorded in the same commit as the login's

	assigned  bool     // the event belongs to the account it was aimed at
	admitted  string   // the account that admit has let the caller into
	elsewhere []copied // further accounts in whose logs a refusal stands
	request   map[string]string
	given     map[string]string // request without what was found out; nil where nothing was

	// only, when not empty, says that the attempt is simulated: it is the one
	// account whose profiles are looked at. What was found is kept then.
	only     string
	profile  *identity.Profile
	evidence *trust.Evidence
}

// finding is what the checks of an attempt have come to. Up to here nothing has
// been signed, recorded or counted: [attempt.settle] does that.
type finding struct {
	claims token.Claims // of the token, as far as the grant knows them
	life   time.Duration
	fault  *fault.Error // why there is no token; nil when there is one
}

func refusing(f *fault.Error) finding { return finding{fault: f} }

// copied is the refusal of an attempt as a further account sees it. A foreign
// one is about a token that another account has proved: anybody can register
// somebody else's issuer, so that it says no more than why the token does not
// count there.
type copied struct {
	attest.Aimed
	foreign bool
}

func (s *Service) begin(grant, action, what string, o Origin) *attempt {
	now := s.cfg.Now()
	return &attempt{
		svc: s, origin: o, grant: grant, started: now,
		request: map[string]string{"grant_type": grant, "client_id": o.ClientID},
		event: activity.Event{
			ID: uuid.NewString(), Time: activity.Time{Time: now}, Action: action,
			Message:  "IAM Identity Service: login." + what,
			Severity: activity.Normal, CorrelationID: o.TransactionID,
			AccountID: s.cfg.OperatorAccount,
			Initiator: activity.Initiator{
				TypeURI: activity.UnknownType,
				Host:    activity.Host{Address: o.Address, AddressType: activity.AddressType(o.Address), Agent: o.Agent},
			},
			Target:   activity.Target{TypeURI: "iam-identity/" + what},
			Observer: activity.Observer{Name: "ActivityTracker"},
		},
	}
}

// admit holds what every grant must meet: the account is open, and its settings
// let in the caller's address. A grant that changes anything asks before it
// does; issue asks for the others.
func (a *attempt) admit(account string) *fault.Error {
	if a.admitted == account {
		return nil
	}
	d := a.svc.cfg.Directory
	if acc, ok := d.Accounts.Get(account); !ok || acc.Closed() {
		a.trace.Fail(CheckAccount, "an open account", account+" is closed", "the installation's operator can open it again")
		a.skip(CheckAddress)
		return fault.New(fault.Invalid, CodeUserGone, "Provided user not found or active").WithDetail("The account is closed.")
	}
	a.trace.Pass(CheckAccount, "an open account", account)
	settings := d.SettingsOf(account)
	if a.only != "" && a.origin.Address == "" {
		a.trace.Skip(CheckAddress)
		a.admitted = account
		return nil
	}
	if !settings.Admits(a.origin.Address) {
		a.trace.FailNear(CheckAddress, settings.AllowedAddresses, a.origin.Address,
			"log in from an allowed address, or have an administrator add this one to the account's allowed_ip_addresses", nil,
			allow(account, settings.AllowedAddresses, a.origin.Address))
		return fault.New(fault.Unauthenticated, CodeAddress, "Access from this IP address is not allowed.").
			WithDetail("The account's settings do not allow the address %s.", a.origin.Address)
	}
	allowed := settings.AllowedAddresses
	if allowed == "" {
		allowed = "any address"
	}
	a.trace.Pass(CheckAddress, allowed, a.origin.Address)
	a.admitted = account
	return nil
}

// allow is the change of an account's settings that would let an address in.
func allow(account, allowed, address string) *activity.Change {
	if _, err := netip.ParseAddr(address); err != nil {
		return nil
	}
	next := allowed + "," + address
	return &activity.Change{
		Do: activity.Alter, Kind: activity.KindSetting, ID: account,
		Edits:   []activity.Edit{{Attribute: "allowed_ip_addresses", From: allowed, To: next}},
		Command: activity.Command("tabard", "iam", "account-settings-update", "--allowed-ip-addresses", next),
	}
}

// granting ends the checks of a grant with those that every grant has.
func (a *attempt) granting(c token.Claims, life time.Duration) finding {
	if f := a.admit(c.Account.BSS); f != nil {
		return refusing(f)
	}
	life = min(life, identity.Seconds(a.svc.cfg.Directory.SettingsOf(c.Account.BSS).AccessTokenLife, token.AccessLife))
	c.GrantType, c.ClientID, c.Scope = a.grant, a.origin.ClientID, knownScope(c.Scope)
	return finding{claims: c, life: life}
}

// issue is granting with its effect.
func (a *attempt) issue(ctx context.Context, c token.Claims, life time.Duration) (Answer, error) {
	return a.settle(ctx, a.granting(c, life))
}

// settle gives a finding its effect: it signs the token, makes its event
// durable, and only then returns it; or it records the refusal.
func (a *attempt) settle(ctx context.Context, f finding) (Answer, error) {
	if f.fault != nil {
		return Answer{}, a.refuse(ctx, f.fault)
	}
	raw, claims, err := a.svc.cfg.Tokens.Issue(f.claims, f.life)
	if err != nil {
		return Answer{}, a.refuse(ctx, fault.Of(err))
	}
	a.event.Message += " " + a.event.Target.Name
	a.event.SetReason(http.StatusOK, "")
	a.event.ResponseData = object(map[string]string{"jti": claims.JTI, "expiration": time.Unix(claims.Expires, 0).UTC().Format(time.RFC3339)})
	if err := a.record(ctx); err != nil {
		a.observe(fault.Of(err).Code)
		return Answer{}, err
	}
	a.svc.cfg.Usage.Login(&a.event)
	a.observe("ok")
	return Answer{AccessToken: raw, Claims: claims}, nil
}

// knownScope keeps the scopes that the discovery document names. A token
// carries nothing that its holder has written himself.
func knownScope(requested string) string {
	var keep []string
	for _, s := range []string{"ibm", "openid"} {
		if requested == "" || slices.Contains(strings.Fields(requested), s) {
			keep = append(keep, s)
		}
	}
	if keep == nil {
		return "ibm openid"
	}
	return strings.Join(keep, " ")
}

// refuse records the refusal and returns it; a refusal that cannot be recorded
// is answered as unavailable.
func (a *attempt) refuse(ctx context.Context, f *fault.Error) error {
	a.complete()
	a.event.SetReason(StatusOf(f.Kind), f.Message+detail(f))
	a.event.Message += " -failure"
	if err := a.record(ctx); err != nil {
		a.observe(fault.Of(err).Code)
		return err
	}
	a.noteAimed()
	a.observe(f.Code)
	return f
}

// complete marks the last checks as not reached when they were not.
func (a *attempt) complete() {
	if !slices.ContainsFunc(a.trace, func(c activity.Check) bool { return c.Name == CheckAccount }) {
		a.skip(CheckAccount, CheckAddress)
	}
}

func detail(f *fault.Error) string {
	if f.Detail == "" {
		return ""
	}
	if strings.HasSuffix(f.Message, ".") {
		return " " + f.Detail
	}
	return ": " + f.Detail
}

func (a *attempt) record(ctx context.Context) error {
	a.event.Trace = a.trace
	a.event.RequestData = object(a.request)
	a.event.LogSourceCRN = a.svc.logSource(a.event.AccountID)
	for _, e := range a.with {
		e.AccountID = a.event.AccountID
		e.Outcome, e.Reason, e.Trace = a.event.Outcome, a.event.Reason, a.trace
		if a.event.Outcome == activity.Failure {
			e.Severity = a.event.Severity
			e.Message += " -failure"
		}
	}
	events := append(a.with, &a.event)
	for _, aimed := range a.elsewhere {
		e := a.event
		e.ID, e.AccountID, e.Trace = uuid.NewString(), aimed.AccountID, aimed.Trace
		if aimed.Reason != "" {
			f := refused(&attest.Refusal{Reason: aimed.Reason, Detail: aimed.Detail})
			e.SetReason(StatusOf(f.Kind), f.Message+detail(f))
		}
		// The profile is another account's.
		if a.given != nil {
			e.RequestData = object(a.given)
		}
		e.Target.ID, e.Target.Name = "", ""
		e.Initiator.ID, e.Initiator.Name, e.Initiator.AuthnID, e.Initiator.AuthnName = "", "", "", "" // as the first account knows it
		if aimed.foreign {
			e.RequestData = object(map[string]string{"grant_type": a.grant})
			e.Initiator.Host = activity.Host{}
		}
		e.LogSourceCRN = a.svc.logSource(aimed.AccountID)
		events = append(events, &e)
	}
	return a.svc.cfg.Journal.Record(ctx, events...)
}

func (s *Service) logSource(account string) string {
	return s.cfg.Names.Of("iam-identity", "global", account, "", "", "").String()
}

func (a *attempt) observe(outcome string) {
	if a.svc.cfg.Observe != nil {
		a.svc.cfg.Observe(a.grant, outcome, a.svc.cfg.Now().Sub(a.started))
	}
}

// object encodes event data; a map of strings always encodes.
func object(m map[string]string) json.RawMessage {
	b, err := json.Marshal(m)
	if err != nil {
		return nil
	}
	return b
}

// StatusOf is the HTTP status of a kind of fault.
func StatusOf(k fault.Kind) int {
	switch k {
	case fault.Invalid:
		return http.StatusBadRequest
	case fault.Unauthenticated:
		return http.StatusUnauthorized
	case fault.Denied:
		return http.StatusForbidden
	case fault.NotFound:
		return http.StatusNotFound
	case fault.Conflict, fault.Stale:
		return http.StatusConflict
	case fault.Gone:
		return http.StatusGone
	case fault.Locked:
		return http.StatusUnprocessableEntity
	case fault.TooLarge:
		return http.StatusRequestEntityTooLarge
	case fault.Unsupported:
		return http.StatusUnsupportedMediaType
	case fault.Limited:
		return http.StatusTooManyRequests
	case fault.Unavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// RefuseForm records a request for a token that did not come as far as a
// grant, such as one without a grant_type.
func (s *Service) RefuseForm(ctx context.Context, o Origin, f *fault.Error) error {
	a := s.begin("", "iam-identity.token.login", "token", o)
	a.trace.Fail("request-form", "a form with a known grant_type", f.Detail, f.Message)
	return a.refuse(ctx, f)
}

// MissingProperty is the fault of a form without a required field.
func MissingProperty(name string) *fault.Error { return missing(name) }

// asRefusal returns the verifier's refusal in err.
func asRefusal(err error) *attest.Refusal {
	var r *attest.Refusal
	if errors.As(err, &r) {
		return r
	}
	return &attest.Refusal{Reason: attest.Malformed, Detail: "The token could not be checked.", Cause: err}
}

// initiateProfile names the profile as who acts, and what put it on behind it.
func (a *attempt) initiateProfile(id, name string, ev trust.Evidence) {
	i := &a.event.Initiator
	i.ID, i.Name, i.TypeURI, i.Credential.Type = crn.IAMID(id), name, activity.ProfileType, "profile"
	i.AuthnID, i.AuthnName = ev.AuthnID(), ev.Name
}

// initiateEvidence names the compute resource itself: it has no profile yet.
func (a *attempt) initiateEvidence(ev trust.Evidence) {
	i := &a.event.Initiator
	i.ID, i.Name, i.TypeURI, i.Credential.Type = ev.AuthnID(), ev.Name, activity.ComputeType, "compute-resource"
	i.AuthnID, i.AuthnName = ev.AuthnID(), ev.Name
}
