package grant

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/token"
	"tabard.dev/tabard/internal/trust"
	"tabard.dev/tabard/internal/vpc"
)

// CheckDescribed stands in a simulation for the checks of a token: there was
// none.
const CheckDescribed = "described-evidence"

// Simulation is what a request for a token would have come to. Nothing was
// signed, recorded or counted for it.
type Simulation struct {
	Fault *fault.Error // why there would be no token; nil when there would be one
	Trace activity.Trace

	Profile  *identity.Profile // nil when none was found
	Evidence *trust.Evidence   // nil when nothing was proved

	Claims token.Claims // of the token, but for jti; only when there would be one
	Life   time.Duration
}

// Description is evidence in the words of whoever asks about it: one of a pod
// of a cluster, an instance, and the claims of a workload issuer's token.
type Description struct {
	Cluster *cluster.Cluster
	Pod     attest.Pod

	Instance *vpc.Instance

	Issuer *cluster.Issuer
	Claims map[string]json.RawMessage
}

// SimulateCRToken asks what [Service.CRToken] asks, by the same checks, as an
// account sees them: only its own registrations and profiles are looked at,
// so that nobody learns of those of others. The origin's address may be "" when
// it is not known from where the request would come.
func (s *Service) SimulateCRToken(ctx context.Context, account string, o Origin, r CRTokenRequest) Simulation {
	a := s.begin(TypeCRToken, loginAction, loginWhat, o)
	a.only = account
	own := *s.cfg.Workloads
	own.Clusters = ownClusters{own.Clusters, account}
	if own.Issuers != nil {
		own.Issuers = ownIssuers{own.Issuers, account}
	}
	return a.simulated(a.presentCRToken(ctx, &own, r))
}

// SimulateEvidence asks whether evidence could put on a profile if a token
// proved it. The error says why it is no evidence.
func (s *Service) SimulateEvidence(ctx context.Context, account string, o Origin, d Description, want Selector) (Simulation, error) {
	ev, err := s.described(d)
	if err != nil {
		return Simulation{}, err
	}
	a := s.begin(TypeCRToken, loginAction, loginWhat, o)
	a.only = account
	a.selected(want)
	proof := attest.Proof{Evidence: ev}
	proof.Trace.Pass(CheckDescribed, "evidence as it is described; no token has proved it", ev.Name)
	out := a.simulated(a.putOn(ctx, []attest.Proof{proof}, nil, want, ""))
	if d.Cluster != nil && d.Cluster.Review {
		// There is no token to be shown to the API server.
		last := slices.IndexFunc(out.Trace, func(c activity.Check) bool { return c.Name == CheckAccount })
		out.Trace = slices.Insert(out.Trace, last, activity.Check{Name: attest.CheckReview, Outcome: activity.Skip})
	}
	return out, nil
}

func (s *Service) described(d Description) (trust.Evidence, error) {
	switch {
	case d.Cluster != nil:
		return s.cfg.Workloads.PodEvidence(d.Cluster, d.Pod)
	case d.Instance != nil:
		return s.cfg.Instances.EvidenceOf(d.Instance)
	}
	return attest.IssuerEvidence(d.Issuer, d.Claims)
}

// simulated turns a finding into what is told of it, in the place of settle.
func (a *attempt) simulated(f finding) Simulation {
	a.complete()
	out := Simulation{Fault: f.fault, Trace: a.trace, Profile: a.profile, Evidence: a.evidence}
	if f.fault == nil {
		out.Claims, out.Life = a.svc.cfg.Tokens.Fill(f.claims, f.life), f.life
	}
	return out
}

// SelectedProfile returns the profile of an account that a selector denotes, or
// nil.
func (s *Service) SelectedProfile(account string, want Selector) *identity.Profile {
	if p := s.find(account, want); p != nil && p.AccountID == account {
		return p
	}
	return nil
}

// ownClusters and ownIssuers are the registrations of one account.
type ownClusters struct {
	attest.Clusters
	account string
}

func (o ownClusters) ClustersOf(issuer string) []*cluster.Cluster {
	return slices.DeleteFunc(slices.Clone(o.Clusters.ClustersOf(issuer)), func(c *cluster.Cluster) bool { return c.AccountID != o.account })
}

type ownIssuers struct {
	attest.Issuers
	account string
}

func (o ownIssuers) WorkloadIssuersOf(issuer string) []*cluster.Issuer {
	return slices.DeleteFunc(slices.Clone(o.Issuers.WorkloadIssuersOf(issuer)), func(i *cluster.Issuer) bool { return i.AccountID != o.account })
}
