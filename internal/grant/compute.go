package grant

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/trust"
)

const (
	loginAction = "iam-identity.computeresource-token.login"
	loginWhat   = "computeresource-token"
)

// Selector names the profile to put on.
type Selector struct {
	ID, Name, CRN string
}

func (s Selector) empty() bool { return s == Selector{} }

func (s Selector) String() string {
	var parts []string
	for _, p := range []struct{ key, value string }{{"id", s.ID}, {"name", s.Name}, {"crn", s.CRN}} {
		if p.value != "" {
			parts = append(parts, p.key+" "+p.value)
		}
	}
	return strings.Join(parts, ", ")
}

// CRTokenRequest is the cr-token grant.
type CRTokenRequest struct {
	Token   string
	Profile Selector
	Scope   string
}

// CRToken exchanges a Kubernetes service-account token for an access token of
// the profile (reference/iam-identity.md sections 1.2 and 6).
func (s *Service) CRToken(ctx context.Context, o Origin, r CRTokenRequest) (Answer, error) {
	a := s.begin(TypeCRToken, loginAction, loginWhat, o)
	a.selected(r.Profile)
	if r.Token == "" {
		a.trace.Fail(attest.CheckForm, "cr_token", "(absent)", "send the service-account token as cr_token")
		return Answer{}, a.refuse(ctx, missing("cr_token"))
	}
	proofs, err := s.cfg.Kubernetes.Verify(ctx, r.Token)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		if len(refusal.AccountIDs) > 0 {
			a.event.AccountID = refusal.AccountIDs[0]
		}
		return Answer{}, a.refuse(ctx, refused(refusal))
	}
	return a.putOn(ctx, proofs, r.Profile, r.Scope)
}

// InstanceRequest is the metadata service's exchange of an identity token.
// Instance is the one whose listener the request came in on: the token must be
// about that instance. With is an event to be recorded beside the login's.
type InstanceRequest struct {
	Token    string
	Instance string
	Profile  Selector
	With     *activity.Event
}

// Instance exchanges an instance identity token for an access token of the
// profile. It is not reachable from the network: only the metadata service,
// which knows whom it talks to, calls it.
func (s *Service) Instance(ctx context.Context, o Origin, r InstanceRequest) (Answer, error) {
	a := s.begin(TypeCRToken, loginAction, loginWhat, o)
	a.selected(r.Profile)
	if r.With != nil {
		a.with = append(a.with, r.With)
	}
	if inst, ok := s.cfg.Directory.Instances.Get(r.Instance); ok {
		a.event.AccountID = inst.AccountID
	}
	proof, claims, err := s.cfg.Instances.Verify(r.Token)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		return Answer{}, a.refuse(ctx, refused(refusal))
	}
	if claims.IaaS.InstanceID != r.Instance {
		a.trace = proof.Trace
		a.trace.Fail("caller", "identity token of instance "+r.Instance, claims.IaaS.InstanceID, "the token belongs to another instance")
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: it belongs to another instance"))
	}
	return a.putOn(ctx, []attest.Proof{proof}, r.Profile, "")
}

func (a *attempt) selected(p Selector) {
	for key, value := range map[string]string{"profile_id": p.ID, "profile_name": p.Name, "profile_crn": p.CRN} {
		if value != "" {
			a.request[key] = value
		}
	}
}

func (a *attempt) skip(checks ...string) {
	for _, c := range checks {
		a.trace.Skip(c)
	}
}

// putOn finds the profile and asks whether the evidence may put it on. There
// is one proof for each account in which the compute resource is registered;
// the profile's account decides among them.
func (a *attempt) putOn(ctx context.Context, proofs []attest.Proof, want Selector, scope string) (Answer, error) {
	proof := proofs[0]
	a.trace = proof.Trace
	a.event.AccountID = proof.Evidence.AccountID
	a.initiateEvidence(proof.Evidence)
	if want.empty() {
		a.trace.Fail(CheckSelector, "profile_id, profile_name or profile_crn", "(none)", "name the trusted profile to put on")
		a.skip(CheckProfile, CheckLink, CheckRule)
		return Answer{}, a.refuse(ctx, missing("profile_id"))
	}
	chosen, profile, failure := a.svc.choose(proofs, want)
	if profile == nil {
		a.trace.Pass(CheckSelector, "one profile", want.String())
		a.trace.Fail(CheckProfile, want.String(), failure, "create the profile in the compute resource's account, or correct its name")
		a.skip(CheckLink, CheckRule)
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotFound, "Unable to find Object.").
			WithDetail("Object Type: 'Profile' with %s.", want))
	}
	a.trace = chosen.proof.Trace
	a.trace.Pass(CheckSelector, "one profile", want.String())
	a.trace.Pass(CheckProfile, want.String(), profile.ID+" ("+profile.Name+") in account "+profile.AccountID)
	a.trace = append(a.trace, chosen.verdict.Explain()...)
	ev := chosen.proof.Evidence

	a.event.AccountID = profile.AccountID
	a.event.Target.ID = a.svc.cfg.Names.Of("iam-identity", "", profile.AccountID, "", "profile", profile.ID).String()
	a.event.Target.Name = profile.Name
	a.request["profile_id"] = profile.ID

	if !chosen.verdict.Matched {
		return Answer{}, a.refuse(ctx, fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile not eligible.").
			WithDetail("The given token with identifier '%s' is not permitted to assume the indicated trusted profile; profile ID '%s'",
				ev.Name, crn.IAMID(profile.ID)))
	}
	a.initiateProfile(profile.ID, profile.Name, ev)
	return a.issue(ctx, token.Claims{
		IAMID: crn.IAMID(profile.ID), SubType: token.SubProfile, Name: profile.Name, Scope: scope,
		Authn:   &token.Authn{Subject: ev.CRN.String(), IAMID: ev.AuthnID(), SubType: token.SubCompute, Name: ev.Name},
		Account: token.Account{BSS: profile.AccountID},
	}, token.AccessLife)
}

// choice is a proof with the verdict on it.
type choice struct {
	proof   attest.Proof
	verdict trust.Verdict
}

// choose finds the selected profile for one of the proofs. A profile outside
// the compute resource's account is found only by id or CRN and only when a
// cross-account link of it matches, so that nobody learns which profiles exist
// elsewhere. failure says what was looked for in vain.
func (s *Service) choose(proofs []attest.Proof, want Selector) (c choice, p *identity.Profile, failure string) {
	var accounts []string
	for _, proof := range proofs {
		account := proof.Evidence.AccountID
		accounts = append(accounts, account)
		found := s.find(account, want)
		if found == nil {
			continue
		}
		v := s.match(found, proof.Evidence)
		if found.AccountID != account && !v.Matched {
			continue
		}
		if p == nil || v.Matched && !c.verdict.Matched {
			c, p = choice{proof, v}, found
		}
	}
	slices.Sort(accounts)
	return c, p, fmt.Sprintf("no such profile in account %s", strings.Join(slices.Compact(accounts), " or "))
}

// find returns the profile that all given selectors denote, or nil.
func (s *Service) find(account string, want Selector) *identity.Profile {
	var p *identity.Profile
	same := func(q *identity.Profile, ok bool) bool {
		if !ok || p != nil && p.ID != q.ID {
			return false
		}
		p = q
		return true
	}
	d := s.cfg.Directory
	if want.Name != "" && !same(d.ProfilesByName.One(profileKey(account, want.Name))) {
		return nil
	}
	if want.ID != "" && !same(d.Profiles.Get(crn.BareID(want.ID))) {
		return nil
	}
	if want.CRN != "" {
		c, err := crn.Parse(want.CRN)
		if err != nil || c.Service != "iam-identity" || c.ResourceType != "profile" {
			return nil
		}
		q, ok := d.Profiles.Get(c.Resource)
		if !same(q, ok) || q.AccountID != c.AccountID() {
			return nil
		}
	}
	return p
}

func (s *Service) match(p *identity.Profile, ev trust.Evidence) trust.Verdict {
	d := s.cfg.Directory
	return trust.Match(trust.Candidate{Profile: p, Links: d.LinksByProfile.Get(p.ID), Rules: d.RulesByProfile.Get(p.ID)}, ev)
}
