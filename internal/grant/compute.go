package grant

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

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
	return activity.Clip(strings.Join(parts, ", "))
}

// CRTokenRequest is the cr-token grant.
type CRTokenRequest struct {
	Token   string
	Profile Selector
	Scope   string
}

// CRToken exchanges a Kubernetes service-account token, or a token of another
// registered issuer of workloads, for an access token of the profile (reference/iam-identity.md sections 1.2 and 6).
func (s *Service) CRToken(ctx context.Context, o Origin, r CRTokenRequest) (Answer, error) {
	a := s.begin(TypeCRToken, loginAction, loginWhat, o)
	return a.settle(ctx, a.presentCRToken(ctx, s.cfg.Workloads, r))
}

// presentCRToken asks the workloads' registrations about a token, and the
// profile about what it proves.
func (a *attempt) presentCRToken(ctx context.Context, workloads *attest.Workloads, r CRTokenRequest) finding {
	a.selected(r.Profile)
	if r.Token == "" {
		a.trace.Fail(attest.CheckForm, "cr_token", "(absent)", "send the service-account token as cr_token")
		return refusing(missing("cr_token"))
	}
	proofs, refusals, err := workloads.Verify(ctx, r.Token)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		for _, aimed := range refusal.Aimed {
			a.seenBy(aimed, CheckSelector, CheckProfile, CheckLink, CheckRule)
		}
		return refusing(refused(refusal))
	}
	return a.putOn(ctx, proofs, refusals, r.Profile, r.Scope)
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
		a.event.AccountID, a.assigned = inst.AccountID, true
		// The listener knows who asks, whatever the token says.
		if name, err := crn.Parse(inst.CRN); err == nil {
			a.initiateEvidence(trust.Evidence{CRN: name, Name: inst.Name})
		}
	}
	notProved := func(f *fault.Error) error {
		f.Kind = fault.Unauthenticated // the metadata service answers 401
		return a.refuse(ctx, f)
	}
	proof, claims, err := s.cfg.Instances.Verify(r.Token)
	if err != nil {
		refusal := asRefusal(err)
		a.trace = refusal.Trace
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		return Answer{}, notProved(refused(refusal))
	}
	if claims.IaaS.InstanceID != r.Instance {
		a.trace = proof.Trace
		a.trace.Fail("caller", "identity token of instance "+r.Instance, claims.IaaS.InstanceID, "the token belongs to another instance")
		a.skip(CheckSelector, CheckProfile, CheckLink, CheckRule)
		return Answer{}, notProved(fault.New(fault.Invalid, CodeUnsupported, "Provided token is not supported: it belongs to another instance"))
	}
	return a.settle(ctx, a.putOn(ctx, []attest.Proof{proof}, nil, r.Profile, ""))
}

func (a *attempt) selected(p Selector) {
	for key, value := range map[string]string{"profile_id": p.ID, "profile_name": p.Name, "profile_crn": p.CRN} {
		if value != "" {
			a.request[key] = activity.Clip(value)
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
// the profile's account decides among them. The refusals are those of further
// accounts, in whose logs they stand when the profile is not put on.
func (a *attempt) putOn(ctx context.Context, proofs []attest.Proof, refusals []attest.Aimed, want Selector, scope string) finding {
	proof := proofs[0]
	a.trace = proof.Trace
	a.event.AccountID, a.assigned = proof.Evidence.AccountID, true
	a.initiateEvidence(proof.Evidence)
	if a.only != "" {
		a.evidence = &proofs[0].Evidence
	}
	if want.empty() {
		a.trace.Fail(CheckSelector, "profile_id, profile_name or profile_crn", "(none)", "name the trusted profile to put on")
		a.skip(CheckProfile, CheckLink, CheckRule)
		a.seenByAll(refusals)
		return refusing(missing("profile_id"))
	}
	found := a.svc.choose(proofs, want)
	if a.only != "" {
		found = slices.DeleteFunc(found, func(c choice) bool { return c.profile.AccountID != a.only })
	}
	if ambiguous := want.byName() && shared(proofs); len(found) != 1 || ambiguous {
		n := len(found)
		if ambiguous {
			n = max(n, 2)
		}
		f := a.noProfile(proofs, want, n)
		a.seenByAll(refusals)
		return refusing(f)
	}
	chosen, profile := found[0], found[0].profile
	if a.svc.undecided(chosen.proof, want) {
		a.trace.Fail(CheckSelector, "one profile", "the keys of an older registration of the issuer cannot be had, in an account that has a profile of this name too",
			"select the profile by its id or CRN, or try again")
		a.skip(CheckProfile, CheckLink, CheckRule)
		f := fault.New(fault.Unavailable, CodeUnavailable, "The token cannot be checked now.").
			WithDetail("Select the profile by profile_id or profile_crn, or try again: another registration of the token's issuer cannot be reached.")
		f.RetryAfter = undecidedRetry
		return refusing(f)
	}
	a.trace = chosen.proof.Trace
	a.trace.Pass(CheckSelector, "one profile", want.String())
	a.trace.Pass(CheckProfile, want.String(), profile.ID+" ("+profile.Name+") in account "+profile.AccountID)
	a.trace = append(a.trace, chosen.verdict.Explain()...)
	ev := chosen.proof.Evidence
	a.initiateEvidence(ev)
	if a.only != "" {
		a.profile, a.evidence = profile, &found[0].proof.Evidence
	}

	a.event.AccountID = profile.AccountID
	a.event.Target.ID = a.svc.cfg.Names.Of("iam-identity", "", profile.AccountID, "", "profile", profile.ID).String()
	a.event.Target.Name = profile.Name
	a.given = maps.Clone(a.request)
	a.request["profile_id"] = profile.ID
	// The attempt is nothing to an account in which no such profile is.
	refusals = slices.DeleteFunc(refusals, func(r attest.Aimed) bool {
		p := a.svc.find(r.AccountID, want)
		return p == nil || p.AccountID != r.AccountID
	})

	if !chosen.verdict.Matched {
		if chosen.proof.Demands() {
			a.skip(attest.CheckReview)
		}
		a.seenByAll(refusals)
		return refusing(fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile not eligible.").
			WithDetail("The given token with identifier '%s' is not permitted to assume the indicated trusted profile; profile ID '%s'",
				ev.Name, crn.IAMID(profile.ID)))
	}
	review, refusal := chosen.proof.Review(ctx, !want.byName())
	a.trace = append(a.trace, review...)
	if refusal != nil {
		a.seenByAll(refusals)
		return refusing(refused(refusal))
	}
	a.initiateProfile(profile.ID, profile.Name, ev)
	return a.granting(token.Claims{
		IAMID: crn.IAMID(profile.ID), SubType: token.SubProfile, Name: profile.Name, Scope: scope,
		Authn:   &token.Authn{Subject: ev.CRN.String(), IAMID: ev.AuthnID(), SubType: token.SubCompute, Name: ev.Name},
		Account: token.Account{BSS: profile.AccountID},
	}, token.AccessLife)
}

// undecidedRetry is when an older registration may be reached again.
const undecidedRetry = 5 * time.Second

// byName reports whether nothing but a name selects the profile. Names are
// unique in one account only.
func (s Selector) byName() bool { return s.ID == "" && s.CRN == "" }

// undecided reports whether a name may mean the profile of another account,
// which registered the issuer before and cannot be asked now.
func (s *Service) undecided(proof attest.Proof, want Selector) bool {
	return want.byName() && slices.ContainsFunc(proof.Undecided, func(account string) bool {
		_, ok := s.cfg.Directory.ProfilesByName.One(profileKey(account, want.Name))
		return ok
	})
}

// shared reports whether the token is one of an issuer that several accounts
// have registered for jobs of their own, such as a CI service in the internet:
// everybody's jobs prove themselves in all of these accounts, so that a name
// says nothing about whose profile is meant.
func shared(proofs []attest.Proof) bool {
	return slices.ContainsFunc(proofs, func(p attest.Proof) bool {
		return p.Evidence.Type == identity.OIDC && slices.ContainsFunc(proofs, func(q attest.Proof) bool { return q.Evidence.AccountID != p.Evidence.AccountID })
	})
}

// noProfile is the fault when the selector denotes no profile, or profiles of
// several accounts that have registered the same issuer: then the name alone
// must not decide in whose account the workload acts. Each account's log shows
// its own part.
func (a *attempt) noProfile(proofs []attest.Proof, want Selector, n int) *fault.Error {
	wanted, found, hint := want.String(), "no such profile in the account", "create the profile in the compute resource's account, or correct its name"
	f := fault.New(fault.Invalid, CodeNotFound, "Unable to find Object.").WithDetail("Object Type: 'Profile' with %s.", want)
	if n > 1 {
		found, hint = "several accounts have registered the issuer, and the name may be of a profile of each", "select the profile by its id or CRN"
		f = fault.New(fault.Invalid, CodeNotEligible, "Selected trusted profile is ambiguous.").
			WithDetail("Several accounts have registered the token's issuer, and %s may be of each; select the profile by profile_id.", want)
	}
	explain := func(t *activity.Trace) {
		t.Pass(CheckSelector, "one profile", wanted)
		t.Fail(CheckProfile, wanted, found, hint)
	}
	for _, proof := range proofs[1:] {
		t := slices.Clone(proof.Trace)
		explain(&t)
		a.seenBy(attest.Aimed{AccountID: proof.Evidence.AccountID, Trace: t}, CheckLink, CheckRule)
	}
	explain(&a.trace)
	a.skip(CheckLink, CheckRule)
	return f
}

// seenBy makes the refusal stand in an account's log, with the checks of that
// account's own registrations. The first account gets the attempt's event, the
// others a copy.
func (a *attempt) seenBy(r attest.Aimed, skipped ...string) { a.copyTo(copied{Aimed: r}, skipped...) }

func (a *attempt) copyTo(r copied, skipped ...string) {
	r.Trace = slices.Clone(r.Trace)
	for _, check := range skipped {
		r.Trace.Skip(check)
	}
	if a.event.AccountID == a.svc.cfg.OperatorAccount && !a.assigned {
		a.event.AccountID, a.trace, a.assigned = r.AccountID, r.Trace, true
		return
	}
	if r.AccountID == a.event.AccountID || len(a.elsewhere) >= maxAccounts {
		return
	}
	a.elsewhere = append(a.elsewhere, r)
}

// seenByAll makes refusals of a token that other accounts have proved stand in
// the logs of the accounts that have not.
func (a *attempt) seenByAll(refusals []attest.Aimed) {
	for _, r := range refusals {
		a.copyTo(copied{Aimed: r, foreign: true}, CheckSelector, CheckProfile, CheckLink, CheckRule)
	}
}

// maxAccounts bounds the events of one refused request.
const maxAccounts = 16

// choice is a profile that a selector denotes, with the verdict on the proof
// of its account.
type choice struct {
	profile *identity.Profile
	proof   attest.Proof
	verdict trust.Verdict
}

// choose finds the selected profiles, at most one for each proof, each profile
// once: with a proof that may put it on before one that may not, and with one of
// the profile's own account before another's. A profile outside the compute
// resource's account is found only by id or CRN and only when a cross-account
// link of it matches, so that nobody learns which profiles exist elsewhere.
func (s *Service) choose(proofs []attest.Proof, want Selector) []choice {
	var out []choice
	for _, proof := range proofs {
		account := proof.Evidence.AccountID
		p := s.find(account, want)
		if p == nil {
			continue
		}
		v := s.match(p, proof.Evidence)
		if p.AccountID != account && !v.Matched {
			continue
		}
		same := slices.IndexFunc(out, func(c choice) bool { return c.profile.ID == p.ID })
		switch {
		case same < 0:
			out = append(out, choice{p, proof, v})
		case v.Matched && !out[same].verdict.Matched, v.Matched == out[same].verdict.Matched && p.AccountID == account:
			out[same] = choice{p, proof, v}
		}
	}
	return out
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
