package grant

import (
	"context"
	"time"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/token"
)

// TypeClientCredentials is the grant of host agents, with a signed assertion as
// the client's credential (RFC 7523 section 2.2).
const TypeClientCredentials = "client_credentials"

// AssertionType is the one client_assertion_type.
const AssertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// HostLife is how long a host's access token lives: short, because it is all
// that a thief in the host's memory would have for use elsewhere.
const HostLife = 10 * time.Minute

// HostRequest is the client_credentials grant.
type HostRequest struct {
	AssertionType string
	Assertion     string
}

// Host exchanges the assertion of a host agent for an access token that is good
// for the routes of agents only.
func (s *Service) Host(ctx context.Context, o Origin, r HostRequest) (Answer, error) {
	a := s.begin(TypeClientCredentials, "iam-identity.host-token.login", "host-token", o)
	a.event.AccountID, a.assigned = s.cfg.OperatorAccount, true
	if r.AssertionType != AssertionType || r.Assertion == "" {
		a.trace.Fail(attest.CheckForm, "client_assertion_type "+AssertionType+" and client_assertion", "(absent)", "this grant is for host agents: start one with tabard agent")
		return Answer{}, a.refuse(ctx, missing("client_assertion"))
	}
	host, keyID, trace, err := s.cfg.Hosts.Assertion(r.Assertion)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		f := refused(refusal)
		f.Kind = fault.Unauthenticated
		return Answer{}, a.refuse(ctx, f)
	}
	a.trace = trace
	id := crn.IAMID(host.ID)
	i := &a.event.Initiator
	i.ID, i.Name, i.AuthnID, i.AuthnName, i.Credential.Type = id, host.Name, id, host.Name, "certificate"
	a.event.Target.ID = s.cfg.Names.Of("host", "", s.cfg.OperatorAccount, "", "host", host.ID).String()
	a.event.Target.Name = host.Name
	return a.issue(ctx, token.Claims{
		IAMID: id, SubType: token.SubHost, KeyID: keyID, Name: host.Name, Account: token.Account{BSS: s.cfg.OperatorAccount},
	}, HostLife)
}
