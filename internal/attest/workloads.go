package attest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	josejwt "github.com/go-jose/go-jose/v4/jwt"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/jwt"
	"tabard.dev/tabard/internal/trust"
)

// Clusters is the part of the directory that tells which cluster a token can
// come from.
type Clusters interface {
	// ClustersOf returns the clusters registered with exactly this issuer. Two
	// accounts may have registered the same one.
	ClustersOf(issuer string) []*cluster.Cluster
	// ClusterGroupNames returns the names of the groups that a cluster is in.
	ClusterGroupNames(c *cluster.Cluster) []string
	// ResourceGroupName returns a resource group's name, or "".
	ResourceGroupName(id string) string
}

// Issuers is the part of the directory that tells which other issuers have been
// registered.
type Issuers interface {
	// WorkloadIssuersOf returns the registrations of exactly this issuer.
	WorkloadIssuersOf(issuer string) []*cluster.Issuer
}

// Workloads verifies the compute resource tokens that come over the network:
// service-account tokens of registered clusters, and the tokens of registered
// workload issuers. Instances are not its business, see [Instances].
type Workloads struct {
	Clusters Clusters
	Issuers  Issuers // nil has none
	Keys     *Keys
	Reviewer *Reviewer // nil refuses the tokens of clusters that demand a review
	Now      func() time.Time
}

var workloadChecks = []string{CheckForm, CheckIssuer, CheckSignature, CheckAudience, CheckTime, CheckClaims}

// workloadClaims are those that every such token has. Times are pointers, so
// that an absent one is told from zero.
type workloadClaims struct {
	Issuer    string               `json:"iss"`
	Subject   string               `json:"sub"`
	Audience  josejwt.Audience     `json:"aud"`
	IssuedAt  *josejwt.NumericDate `json:"iat"`
	Expiry    *josejwt.NumericDate `json:"exp"`
	NotBefore *josejwt.NumericDate `json:"nbf"`
}

func seconds(d *josejwt.NumericDate) int64 {
	if d == nil {
		return 0
	}
	return int64(*d)
}

// presented is a token that has the form of one. Its claims are read once.
// Until a key has verified the signature over these very bytes, only the issuer
// is looked at, to find the key.
type presented struct {
	raw    string
	token  *jwt.Token
	claims workloadClaims
	pod    podClaims
	podErr error // why pod could not be read; it matters to clusters only
	steps  steps // up to the form
}

// registration is what a token can come from: a cluster or an issuer.
type registration struct {
	account string
	since   time.Time
	cluster *cluster.Cluster
	issuer  *cluster.Issuer
}

// outcome is what a token is to one registration. Neither a proof nor a refusal
// means that it was not known in time.
type outcome struct {
	proof   Proof
	refusal *Refusal
}

func (o outcome) proved() bool { return o.refusal == nil && o.proof.Trace != nil }

// disproved reports whether the token certainly does not come from there.
func (o outcome) disproved() bool { return o.refusal != nil && o.refusal.Reason == BadSignature }

// undecided reports whether nobody knows if the token comes from there, because
// the keys cannot be had now.
func (o outcome) undecided() bool {
	return o.refusal == nil && !o.proved() || o.refusal != nil && o.refusal.Reason == KeysUnavailable
}

// patience is how long an account whose registration has proved a token waits
// for those of others: nobody can hold up somebody else's tokens by registering
// their issuer with an API server that does not answer.
const patience = 250 * time.Millisecond

// Verify returns the evidence that a token gives: a proof for each account
// whose registration it meets, and beside them the refusals of the accounts that
// have registered the issuer but whose registrations it does not meet. Those are
// for the accounts' own logs; nothing of them may be told to the caller, nor to
// another account. Where the cluster demands a review, [Proof.Review] must be
// asked before the evidence is acted upon. The error is a *Refusal.
func (w *Workloads) Verify(ctx context.Context, raw string) ([]Proof, []Aimed, error) {
	p, r := present(raw)
	if r != nil {
		return nil, nil, r
	}
	registered := w.registered(p.claims.Issuer)
	if p.podErr != nil && !slices.ContainsFunc(registered, func(r registration) bool { return r.issuer != nil }) {
		return nil, nil, p.unreadable(p.podErr)
	}
	p.passForm()
	if len(registered) == 0 {
		return nil, nil, p.unknown()
	}
	p.steps.pass(CheckIssuer, "a registered issuer", p.claims.Issuer)
	outcomes := w.tryAll(ctx, registered, p)

	var proofs []Proof
	var nearest *Refusal // over all accounts, and
	var aimed []Aimed    // for each of them
	for n, o := range outcomes {
		account := registered[n].account
		if o.proved() {
			o.proof.contested = contested(registered, outcomes, n)
			o.proof.Undecided, o.proof.siblings = undecided(registered, outcomes, n)
			proofs = append(proofs, o.proof)
			continue
		}
		refusal := o.refusal
		if refusal == nil {
			refusal = p.late()
		}
		if nearest == nil || progress(refusal.Trace) > progress(nearest.Trace) {
			nearest = refusal
		}
		seen := slices.IndexFunc(aimed, func(a Aimed) bool { return a.AccountID == account })
		switch {
		case seen < 0:
			aimed = append(aimed, refusal.aimed(account))
		case progress(refusal.Trace) > progress(aimed[seen].Trace):
			aimed[seen] = refusal.aimed(account)
		}
	}
	if len(proofs) > 0 {
		// What another registration of the account has proved is not refused.
		aimed = slices.DeleteFunc(aimed, func(a Aimed) bool {
			return slices.ContainsFunc(proofs, func(p Proof) bool { return p.Evidence.AccountID == a.AccountID })
		})
		return proofs, aimed, nil
	}
	refusal := *nearest
	refusal.Aimed = aimed
	return nil, nil, &refusal
}

// Try verifies a token as [Workloads.Verify] does, but against one cluster
// only, which need not be registered, with keys that are fetched now; and it
// asks for the review that the cluster demands. The error is a *Refusal.
func (w *Workloads) Try(ctx context.Context, c *cluster.Cluster, raw string) (Proof, error) {
	return w.tryOne(ctx, c.Issuer, raw, registration{account: c.AccountID, cluster: c})
}

// TryIssuer is as Try, for a workload issuer.
func (w *Workloads) TryIssuer(ctx context.Context, i *cluster.Issuer, raw string) (Proof, error) {
	return w.tryOne(ctx, i.Issuer, raw, registration{account: i.AccountID, issuer: i})
}

func (w *Workloads) tryOne(ctx context.Context, issuer, raw string, r registration) (Proof, error) {
	p, refusal := present(strings.TrimSpace(raw))
	if refusal != nil {
		return Proof{}, refusal
	}
	p.passForm()
	if p.claims.Issuer != issuer {
		return Proof{}, p.steps.refuse(UnknownIssuer, CheckIssuer, issuer, p.claims.Issuer,
			"The token's issuer is another one; register exactly the iss claim of the token.")
	}
	p.steps.pass(CheckIssuer, issuer, p.claims.Issuer)
	// What the cache knows under the id is about what was registered before.
	fresh := *w
	fresh.Keys = w.Keys.uncached()
	o := fresh.try(ctx, r, p)
	if o.refusal != nil {
		return Proof{}, o.refusal
	}
	proof := o.proof
	if proof.review != nil && w.Reviewer != nil {
		reviewer := w.Reviewer.uncached()
		defer reviewer.Close()
		proof.review.reviewer = reviewer
	}
	trace, refusal := proof.Review(ctx, true)
	proof.Trace = append(proof.Trace, trace...)
	if refusal != nil {
		refusal.Trace = proof.Trace
		return Proof{}, refusal
	}
	return proof, nil
}

// CheckKeys fetches a cluster's keys now, or reads the uploaded ones, for the
// moment of its registration, and returns their ids.
func (w *Workloads) CheckKeys(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	return w.Keys.CheckIDs(ctx, c)
}

// CheckReview tells whether a cluster's API server can be asked about tokens,
// for the moment of its registration.
func (w *Workloads) CheckReview(ctx context.Context, c *cluster.Cluster) error {
	if w.Reviewer == nil {
		return errors.New("this server reviews no tokens")
	}
	return w.Reviewer.Check(ctx, c)
}

func present(raw string) (*presented, *Refusal) {
	p := &presented{raw: raw, steps: steps{names: workloadChecks}}
	t, err := jwt.ParseOfIssuer(raw, jwt.Asymmetric, "", "JWT")
	if err != nil {
		r := p.steps.refuse(Malformed, CheckForm, "a signed JWT ("+algorithms()+")", err.Error(), "The compute resource token is not a JWT that can be checked.")
		r.Cause = err
		return nil, r
	}
	p.token = t
	// The last one is read only to find a member that stands twice, however
	// deep: which of the two counts would be left to chance.
	var doubled map[string]any
	if err := errors.Join(t.Unverified(&p.claims), t.Unverified(&doubled)); err != nil {
		return nil, p.unreadable(err)
	}
	p.podErr = t.Unverified(&p.pod)
	return p, nil
}

func (p *presented) unreadable(err error) *Refusal {
	r := p.steps.refuse(Malformed, CheckForm, "claims in JSON, each once", err.Error(), "The compute resource token's claims cannot be read.")
	r.Cause = err
	return r
}

func (p *presented) passForm() {
	p.steps.pass(CheckForm, "a signed JWT", p.token.Alg+" kid "+p.token.KeyID)
}

func (p *presented) unknown() *Refusal {
	hint := "No registered cluster or workload issuer has the token's issuer; register it with 'tabard ks cluster-register NAME --kubeconfig FILE' or 'tabard iam workload-issuer-create NAME --issuer URL'."
	if p.legacy() {
		hint = legacyHint
	}
	return p.steps.refuse(UnknownIssuer, CheckIssuer, "a registered issuer", p.claims.Issuer, hint)
}

// late is the refusal of a registration that did not answer in time.
func (p *presented) late() *Refusal {
	s := p.fork()
	r := s.refuse(KeysUnavailable, CheckSignature, "the keys of the registration", "not known in time",
		"The keys cannot be fetched now; the token may be good.")
	r.Cause = errors.New("the keys were not known in time")
	return r
}

// fork begins the checks against one registration.
func (p *presented) fork() steps {
	return steps{names: p.steps.names, trace: slices.Clone(p.steps.trace)}
}

func (w *Workloads) registered(issuer string) []registration {
	var out []registration
	for _, c := range w.Clusters.ClustersOf(issuer) {
		out = append(out, registration{account: c.AccountID, since: c.Since(), cluster: c})
	}
	if w.Issuers != nil {
		for _, i := range w.Issuers.WorkloadIssuersOf(issuer) {
			out = append(out, registration{account: i.AccountID, since: i.Since(), issuer: i})
		}
	}
	return out
}

// Bounds on the registrations of one issuer that are tried for one token.
const (
	maxTries   = 16              // at once
	tryTimeout = 8 * time.Second // for all of them
)

// tryAll tries the token with every registration, a bounded number at a time,
// within a bounded time.
func (w *Workloads) tryAll(ctx context.Context, registered []registration, p *presented) []outcome {
	out := make([]outcome, len(registered))
	defer func() { unambiguous(registered, out, p) }()
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	if len(registered) == 1 {
		defer cancel()
		out[0] = w.try(ctx, registered[0], p)
		return out
	}
	var wg sync.WaitGroup
	defer wg.Wait() // after cancel: what still waits for keys gives up
	defer cancel()
	type answer struct {
		n int
		outcome
	}
	answers := make(chan answer, len(registered))
	queue := make(chan int, len(registered))
	for n := range registered {
		queue <- n
	}
	close(queue)
	for range min(maxTries, len(registered)) {
		wg.Go(func() {
			for n := range queue {
				if ctx.Err() != nil {
					return
				}
				answers <- answer{n, w.try(ctx, registered[n], p)}
			}
		})
	}
	var enough <-chan time.Time
	for range registered {
		select {
		case a := <-answers:
			out[a.n] = a.outcome
			if enough == nil && a.proved() {
				timer := time.NewTimer(patience)
				defer timer.Stop()
				enough = timer.C
			}
		case <-enough:
			return out
		case <-ctx.Done():
			return out
		}
	}
	return out
}

// unambiguous turns the proofs of several clusters of one account into
// refusals: it would be left to chance as which cluster's pod the workload acts.
func unambiguous(registered []registration, out []outcome, p *presented) {
	proved := map[string][]int{}
	for n, o := range out {
		if registered[n].cluster != nil && o.proved() {
			proved[registered[n].account] = append(proved[registered[n].account], n)
		}
	}
	for _, of := range proved {
		if len(of) < 2 {
			continue
		}
		names := make([]string, len(of))
		for i, n := range of {
			names[i] = registered[n].cluster.Name
		}
		slices.Sort(names)
		s := p.fork()
		r := s.refuse(Ambiguous, CheckSignature, "a key of one cluster of the account", "it is a key of the clusters "+strings.Join(names, ", "),
			"Several clusters of the account sign with the same key, so that nobody can tell whose token it is. Give each cluster a key of its own, or delete the registrations that are too many.")
		for _, n := range of {
			out[n] = outcome{refusal: r}
		}
	}
}

// undecided returns the other accounts with an older registration, and the names
// of the other clusters of the same account, of which nobody knows now whether
// the token is theirs.
func undecided(registered []registration, out []outcome, n int) (accounts, clusters []string) {
	own := registered[n]
	for i, r := range registered {
		switch {
		case i == n || !out[i].undecided():
		case r.account != own.account:
			if !r.since.After(own.since) && !slices.Contains(accounts, r.account) {
				accounts = append(accounts, r.account)
			}
		case r.cluster != nil:
			clusters = append(clusters, r.cluster.Name)
		}
	}
	return accounts, clusters
}

// contested reports whether another account registered the issuer before, with
// another API server, and the token may be of that registration.
func contested(registered []registration, out []outcome, n int) bool {
	own := registered[n]
	for i, r := range registered {
		if r.account == own.account || r.since.After(own.since) || out[i].disproved() {
			continue
		}
		if own.cluster == nil || r.cluster == nil || !sameServer(own.cluster.Server, r.cluster.Server) {
			return true
		}
	}
	return false
}

func sameServer(a, b *cluster.APIServer) bool {
	return a != nil && b != nil && a.URL == b.URL && a.CA == b.CA
}

// progress counts the checks that passed before one failed.
func progress(t activity.Trace) int {
	failed, _ := t.Failed()
	return slices.Index(workloadChecks, failed.Name)
}

func (w *Workloads) try(ctx context.Context, r registration, p *presented) outcome {
	s := p.fork()
	if r.cluster != nil {
		return w.tryCluster(ctx, r.cluster, p, &s)
	}
	return w.tryIssuer(ctx, r.issuer, p, &s)
}

// checkAudience checks that the token was made for the registration's audience.
func (p *presented) checkAudience(s *steps, wanted, hint string) *Refusal {
	found := strings.Join(p.claims.Audience, ", ")
	if !p.claims.Audience.Contains(wanted) {
		return s.refuse(WrongAudience, CheckAudience, wanted, found, hint)
	}
	s.pass(CheckAudience, wanted, found)
	return nil
}

// optional sets a claim that was proved; an absent one meets no condition.
func optional(claims map[string]any, name, value string) {
	if value != "" {
		claims[name] = value
	}
}

func algorithms() string {
	names := make([]string, len(jwt.Asymmetric))
	for i, a := range jwt.Asymmetric {
		names[i] = string(a)
	}
	return strings.Join(names, ", ")
}

// evidenceProof joins the evidence with the trace of its checks.
func evidenceProof(ev trust.Evidence, s *steps) outcome {
	return outcome{proof: Proof{Evidence: ev, Trace: s.trace}}
}
