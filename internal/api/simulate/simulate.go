// Package simulate is the API that asks without doing: would this workload get
// this profile's token, and may this identity do that? It is ours. The answers
// are those of the evaluators that decide, package grant with package trust and
// package access, over the caller's own account and nothing else. Nothing is
// signed, counted or recorded as a login for them; a refusal of the question
// itself is recorded like every other.
package simulate

import (
	"cmp"
	"context"
	"net/http"
	"net/netip"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
)

// Actions of a caller. An answer tells what links, rules and policies do, so
// that these come on top of the actions to read what it is about.
const (
	actionToken  = "iam-identity.profile.simulate"
	actionAccess = "iam-access-management.access.simulate"
	actionRead   = "iam-identity.profile.get"
)

// Bounds on a question, in bytes and entries.
const (
	maxText       = 2048 // of a name, an id or a value
	maxToken      = 16 << 10
	maxClaims     = 100
	maxAttributes = 50
	maxTags       = 1000
	maxGroups     = access.MaxGroupsPerIdentity
)

// Grants are the checks of a request for a token. *grant.Service has them.
type Grants interface {
	SimulateCRToken(ctx context.Context, account string, o grant.Origin, r grant.CRTokenRequest) grant.Simulation
	SimulateEvidence(ctx context.Context, account string, o grant.Origin, d grant.Description, want grant.Selector) (grant.Simulation, error)
	SelectedProfile(account string, want grant.Selector) *identity.Profile

	// Live returns an error unless the account is open and has the identity.
	Live(accountID, iamID string) error
}

type handler struct{ grants Grants }

// Register adds the family's routes.
func Register(mux *http.ServeMux, cfg *api.Config, grants Grants) {
	f := &api.Family{Config: cfg, Mux: mux, Service: "IAM Simulation", Shape: api.PlainShape}
	h := &handler{grants}
	api.Ask(f, "POST /v1/simulate/token", actionToken, h.token)
	api.Ask(f, "POST /v1/simulate/access", actionAccess, h.access)
}

// selector are the ways to name a profile.
type selector struct {
	ID   string `json:"profile_id"`
	Name string `json:"profile_name"`
	CRN  string `json:"profile_crn"`
}

func (s selector) parse() (grant.Selector, error) {
	for field, value := range map[string]string{"profile_id": s.ID, "profile_name": s.Name, "profile_crn": s.CRN} {
		if len(value) > maxText {
			return grant.Selector{}, tooLong(field, maxText)
		}
	}
	return grant.Selector{ID: s.ID, Name: s.Name, CRN: s.CRN}, nil
}

func tooLong(field string, limit int) error {
	return api.Invalid("%s must not be longer than %d bytes.", field, limit).On(field)
}

// tokenQuestion asks for a token: with a real one of a compute resource, or
// with evidence that is described.
type tokenQuestion struct {
	selector
	CRToken  string       `json:"cr_token"`
	Evidence *description `json:"evidence"`
	Address  string       `json:"address"` // from which the request would come; "" leaves it open
}

// tokenAnswer is what would have come of it.
type tokenAnswer struct {
	Allowed       bool           `json:"allowed"`
	Evidence      *evidence      `json:"evidence,omitempty"`
	Profile       *profile       `json:"profile,omitempty"`
	Claims        map[string]any `json:"claims,omitempty"` // that the token would have
	ExpiresIn     int64          `json:"expires_in,omitempty"`
	Refusal       *refusal       `json:"refusal,omitempty"`
	Trace         activity.Trace `json:"trace"`
	TransactionID string         `json:"transaction_id"`
}

// Sources of evidence.
const (
	sourceToken     = "token"     // verified
	sourceDescribed = "described" // nobody has proved it
)

type evidence struct {
	Source string         `json:"source"`
	Type   string         `json:"type"`
	CRN    string         `json:"crn"`
	Name   string         `json:"name"`
	Claims map[string]any `json:"claims"`
}

type profile struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// refusal is the error that the caller of a real request would get.
type refusal struct {
	Status  int    `json:"status"`
	Code    string `json:"code"`
	Message string `json:"message"`
	Detail  string `json:"detail,omitempty"`
}

func (h *handler) token(c *api.Call, q *tokenQuestion) (api.Reply, error) {
	want, err := q.parse()
	if err != nil {
		return api.Reply{}, err
	}
	switch {
	case want == (grant.Selector{}):
		return api.Reply{}, api.Invalid("Name the trusted profile: profile_id, profile_name or profile_crn.").On("profile_id")
	case (q.CRToken == "") == (q.Evidence == nil):
		return api.Reply{}, api.Invalid("Give a real token as cr_token, or describe the workload as evidence; one of the two.").On("cr_token")
	case len(q.CRToken) > maxToken:
		return api.Reply{}, tooLong("cr_token", maxToken)
	}
	if q.Address != "" {
		if _, err := netip.ParseAddr(q.Address); err != nil {
			return api.Reply{}, api.Invalid("address %.100q is not an IP address.", q.Address).On("address")
		}
	}
	if _, err := h.profile(c, want, actionToken, actionRead); err != nil {
		return api.Reply{}, err
	}
	origin := grant.Origin{TransactionID: api.TransactionID(c.R.Context()), Address: q.Address, ClientID: grant.DefaultClient}
	source := sourceToken
	var s grant.Simulation
	if q.Evidence == nil {
		s = h.grants.SimulateCRToken(c.R.Context(), c.Account(), origin, grant.CRTokenRequest{Token: q.CRToken, Profile: want})
		err = authorizeProved(c, s.Evidence)
	} else {
		source = sourceDescribed
		var d grant.Description
		if d, err = q.Evidence.read(c); err == nil {
			if s, err = h.grants.SimulateEvidence(c.R.Context(), c.Account(), origin, d, want); err != nil {
				err = api.Invalid("The description is not evidence: %v.", err).On("evidence")
			}
		}
	}
	if err != nil {
		return api.Reply{}, err
	}
	return api.Reply{Body: tell(s, source, api.TransactionID(c.R.Context()))}, nil
}

// profile finds the profile that a question names, and demands that the caller
// may do the actions on it. One that is not there is like one that he may not
// see, unless he may see all of them.
func (h *handler) profile(c *api.Call, want grant.Selector, actions ...string) (*identity.Profile, error) {
	p := h.grants.SelectedProfile(c.Account(), want)
	id := ""
	if p != nil {
		id = p.ID
	}
	for _, action := range actions {
		if err := c.Authorize(action, c.InAccount("iam-identity", access.ResourceType, "profile", access.Resource, id)); err != nil {
			return nil, err
		}
	}
	if p == nil {
		return nil, api.NotFound("trusted profile", cmp.Or(want.ID, want.Name, want.CRN))
	}
	return p, nil
}

func tell(s grant.Simulation, source, transaction string) tokenAnswer {
	out := tokenAnswer{Allowed: s.Fault == nil, Trace: s.Trace, TransactionID: transaction}
	if ev := s.Evidence; ev != nil {
		out.Evidence = &evidence{Source: source, Type: string(ev.Type), CRN: ev.CRN.String(), Name: ev.Name, Claims: ev.Claims}
	}
	if s.Profile != nil {
		out.Profile = &profile{ID: s.Profile.ID, Name: s.Profile.Name}
	}
	if f := s.Fault; f != nil {
		out.Refusal = &refusal{Status: grant.StatusOf(f.Kind), Code: f.Code, Message: f.Message, Detail: f.Detail}
		return out
	}
	out.ExpiresIn = int64(s.Life / time.Second)
	out.Claims = map[string]any{
		"iam_id": s.Claims.IAMID, "sub": s.Claims.Subject, "sub_type": s.Claims.SubType, "name": s.Claims.Name, "authn": s.Claims.Authn,
		"account": s.Claims.Account, "iss": s.Claims.Issuer, "iat": s.Claims.IssuedAt, "exp": s.Claims.Expires,
		"grant_type": s.Claims.GrantType, "scope": s.Claims.Scope, "client_id": s.Claims.ClientID,
	}
	return out
}

func denied(format string, args ...any) error {
	return fault.New(fault.Denied, "not_authorized", format, args...)
}
