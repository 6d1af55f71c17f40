package attest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
)

// Bounds on reviews.
const (
	reviewTimeout   = 5 * time.Second
	reviewBackOff   = time.Second // after a failure, in which the API server is not asked again
	maxVerdicts     = 16 << 10    // that are remembered
	maxServers      = 4 << 10     // whose connections are kept
	maxReviews      = 16          // at once, of one cluster
	warnPeriod      = time.Minute // between two lines of the log about one cluster
	credentialsEnds = time.Hour   // before which a credential's end is worth a warning
	podUIDExtra     = "authentication.kubernetes.io/pod-uid"
	reviewPath      = "/apis/authentication.k8s.io/v1/tokenreviews"
)

// VerdictLife is how long an API server's answer about a token counts. The
// API server itself keeps its own for some 10 s, so a deleted pod's token may
// count for the sum of both.
const VerdictLife = 10 * time.Second

// Outcomes of a review, as [Reviewer.Observe] is told.
const (
	ReviewAllowed = "allowed"
	ReviewRefused = "denied"
	ReviewBroken  = "broken"
)

// Reviewer asks the API servers of clusters whether they stand by a token, with
// a TokenReview (authentication.k8s.io/v1): they know which pods and service
// accounts have been deleted. It remembers the answers for a moment, and tells
// "the token is bad" from "nobody could be asked".
type Reviewer struct {
	Opener Opener // of the credentials of API servers
	Now    func() time.Time
	Log    *slog.Logger // nil logs nothing

	// Observe, when not nil, is told of every review: the outcome, and whether
	// the API server was asked for it.
	Observe func(outcome string, asked bool)

	flight   singleflight.Group
	mu       sync.Mutex
	verdicts map[[sha256.Size]byte]verdict
	servers  map[string]*reviewServer // by cluster id
}

// pendingReview is a token that passed all other checks, and what the API
// server must say of it.
type pendingReview struct {
	reviewer                    *Reviewer
	cluster                     *cluster.Cluster
	raw                         string
	expires                     int64 // Unix seconds
	subject, accountUID, podUID string
}

// verdict is what came of a review.
type verdict struct {
	outcome       string
	wanted, found string
	hint          string
	broken        error
	until         time.Time
}

// reviewServer is an API server that is asked.
type reviewServer struct {
	revision int64 // of the cluster
	client   *serverClient
	slots    chan struct{}

	// Of the following the reviewer's lock takes care.
	broken      error
	brokenUntil time.Time
	warned      time.Time
	reminded    time.Time // of the credential's end
}

// Demands reports whether the evidence counts only after [Proof.Review].
func (p Proof) Demands() bool { return p.review != nil }

// Review asks the cluster's API server whether it stands by the token, where the
// registration demands it. It is the last check, so that no API server sees a
// token that would get nothing anyway; the trace is that of this check alone.
//
// The token is a credential, and the API server that it is shown to is whatever
// the account has registered. Named says that the workload has selected a
// profile of that very account, by id or CRN. Otherwise the token is withheld
// when an account that registered the issuer earlier may be the one that it
// belongs to.
func (p Proof) Review(ctx context.Context, named bool) (activity.Trace, *Refusal) {
	q := p.review
	if q == nil {
		return nil, nil
	}
	var t activity.Trace
	refuse := func(reason Reason, wanted, found, hint string) (activity.Trace, *Refusal) {
		t.Fail(CheckReview, wanted, found, hint)
		return t, &Refusal{Reason: reason, Detail: hint, Trace: t}
	}
	wanted := "the API server of cluster " + q.cluster.Name + " stands by the token"
	if p.contested && !named {
		return refuse(ReviewWithheld, wanted, "it was not asked: another account registered the issuer earlier",
			"The token is shown to no API server, because the token's issuer is registered in several accounts. Select the profile by its id or CRN.")
	}
	if len(p.siblings) > 0 {
		return refuse(ReviewUnavailable, wanted, "it was not asked: the keys of "+strings.Join(p.siblings, ", ")+" cannot be had, and the token may be of that cluster",
			"The token is shown to no API server while the keys of another cluster with the same issuer cannot be had; delete that cluster's registration if it is gone.")
	}
	var v verdict
	if q.reviewer == nil {
		v = verdict{outcome: ReviewBroken, broken: errors.New("this server reviews no tokens")}
	} else {
		v = q.reviewer.ask(ctx, q)
	}
	switch v.outcome {
	case ReviewAllowed:
		t.Pass(CheckReview, wanted, v.found)
		return t, nil
	case ReviewRefused:
		if v.wanted != "" {
			wanted = v.wanted
		}
		return refuse(ReviewDenied, wanted, v.found, v.hint)
	}
	t, r := refuse(ReviewUnavailable, wanted, activity.Clip(v.broken.Error()),
		"The cluster's API server cannot be asked about the token; the token may be good.")
	r.Cause = v.broken
	return t, r
}

// Check asks a cluster's API server about a token that is none, for the moment
// of the cluster's registration: the error says why it cannot be asked.
func (r *Reviewer) Check(ctx context.Context, c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	client, err := newServerClient(c, r.Opener)
	if err != nil {
		return err
	}
	defer client.Close()
	answer, _, err := client.review(ctx, "not-a-token", c.Audience)
	if err != nil {
		return err
	}
	if answer.Authenticated {
		return fmt.Errorf("the API server %s accepts a token that is none", c.Server.URL)
	}
	return nil
}

// Close ends idle connections.
func (r *Reviewer) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.servers {
		s.client.Close()
	}
	r.servers = nil
}

// uncached is the same without what is known.
func (r *Reviewer) uncached() *Reviewer {
	return &Reviewer{Opener: r.Opener, Now: r.Now, Log: r.Log, Observe: r.Observe}
}

func (r *Reviewer) ask(ctx context.Context, q *pendingReview) verdict {
	key := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%s", q.cluster.ID, q.cluster.Revision, q.raw))
	if v, ok := r.known(key); ok {
		r.observe(v.outcome, false)
		return v
	}
	answers := r.flight.DoChan(string(key[:]), func() (any, error) {
		if v, ok := r.known(key); ok {
			return v, nil
		}
		// The answer serves every waiting request, so it must not end with the
		// first one.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reviewTimeout)
		defer cancel()
		v := r.review(ctx, q)
		if v.outcome != ReviewBroken {
			v.until = r.Now().Add(VerdictLife)
			if end := time.Unix(q.expires, 0); end.Before(v.until) {
				v.until = end
			}
			r.keep(key, v)
		}
		return v, nil
	})
	select {
	case <-ctx.Done():
		return verdict{outcome: ReviewBroken, broken: fmt.Errorf("wait for the review: %w", ctx.Err())}
	case a := <-answers:
		return a.Val.(verdict)
	}
}

func (r *Reviewer) known(key [sha256.Size]byte) (verdict, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.verdicts[key]
	return v, ok && r.Now().Before(v.until)
}

func (r *Reviewer) keep(key [sha256.Size]byte, v verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.verdicts == nil {
		r.verdicts = map[[sha256.Size]byte]verdict{}
	}
	if len(r.verdicts) >= maxVerdicts {
		now := r.Now()
		for k, old := range r.verdicts {
			if !now.Before(old.until) {
				delete(r.verdicts, k)
			}
		}
		// A verdict that is forgotten costs a review, nothing else.
		for k := range r.verdicts {
			if len(r.verdicts) < maxVerdicts*3/4 {
				break
			}
			delete(r.verdicts, k)
		}
	}
	r.verdicts[key] = v
}

// review asks the API server, at a bounded rate.
func (r *Reviewer) review(ctx context.Context, q *pendingReview) verdict {
	s, err := r.server(q.cluster)
	if err != nil {
		r.observe(ReviewBroken, false)
		return verdict{outcome: ReviewBroken, broken: err}
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		r.observe(ReviewBroken, false)
		return verdict{outcome: ReviewBroken, broken: errors.New("too many reviews are under way")}
	}
	// Whoever has waited behind a request that failed need not fail as slowly.
	if err := r.down(s); err != nil {
		r.observe(ReviewBroken, false)
		return verdict{outcome: ReviewBroken, broken: err}
	}
	answer, status, err := s.client.review(ctx, q.raw, q.cluster.Audience)
	if err != nil {
		r.failed(q.cluster, s, status, err)
		r.observe(ReviewBroken, true)
		return verdict{outcome: ReviewBroken, broken: err}
	}
	r.answered(q.cluster, s)
	v := q.judge(answer)
	v.found = activity.Clip(redact(v.found, q.raw, s.client.credential))
	r.observe(v.outcome, true)
	return v
}

// judge compares the API server's answer with what the token says: an API
// server of another cluster may know the same names.
func (q *pendingReview) judge(a *reviewAnswer) verdict {
	const gone = "The cluster's API server does not stand by the token any more: its pod, node or service account may have been deleted. A new pod gets a new token."
	refused := func(wanted, found, hint string) verdict {
		return verdict{outcome: ReviewRefused, wanted: wanted, found: found, hint: hint}
	}
	const mixed = "The API server that is registered for the cluster speaks of another service account or pod; is it the API server of this cluster?"
	pods := a.User.Extra[podUIDExtra]
	switch {
	case !a.Authenticated:
		found := a.Error
		if found == "" {
			found = "it does not"
		}
		return refused("", found, gone)
	case !slices.Contains(a.Audiences, q.cluster.Audience):
		return refused("audience "+q.cluster.Audience, strings.Join(a.Audiences, ", "), "The cluster's API server does not say that the token was made for audience "+q.cluster.Audience+".")
	case a.User.Username != q.subject:
		return refused("user "+q.subject, "user "+a.User.Username, mixed)
	case q.accountUID == "" || a.User.UID != q.accountUID:
		return refused("service account with UID "+q.accountUID, "UID "+a.User.UID, mixed)
	case q.podUID != "" && len(pods) > 0 && !slices.Equal(pods, []string{q.podUID}):
		return refused("pod with UID "+q.podUID, "UID "+strings.Join(pods, ", "), mixed)
	}
	return verdict{outcome: ReviewAllowed, found: "authenticated as " + a.User.Username}
}

func (r *Reviewer) observe(outcome string, asked bool) {
	if r.Observe != nil {
		r.Observe(outcome, asked)
	}
}

// server returns the API server of a cluster as it is registered now.
func (r *Reviewer) server(c *cluster.Cluster) (*reviewServer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.servers[c.ID]
	if old != nil && old.revision == c.Revision {
		return old, nil
	}
	client, err := newServerClient(c, r.Opener)
	if err != nil {
		return nil, err
	}
	if old != nil {
		old.client.Close()
	}
	if len(r.servers) >= maxServers {
		for _, s := range r.servers {
			s.client.Close()
		}
		r.servers = nil
	}
	if r.servers == nil {
		r.servers = map[string]*reviewServer{}
	}
	s := &reviewServer{revision: c.Revision, client: client, slots: make(chan struct{}, maxReviews)}
	r.servers[c.ID] = s
	return s, nil
}

// down returns why an API server was not to be had a moment ago.
func (r *Reviewer) down(s *reviewServer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Now().Before(s.brokenUntil) {
		return s.broken
	}
	return nil
}

func (r *Reviewer) failed(c *cluster.Cluster, s *reviewServer, status int, err error) {
	now := r.Now()
	r.mu.Lock()
	// An answer that is not understood may be that token's fault; no answer, or
	// one that says "not you" or "not now", is about all of them.
	if status == 0 || status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusTooManyRequests || status >= 500 {
		s.broken, s.brokenUntil = err, now.Add(reviewBackOff)
	}
	warn := s.warned.IsZero() || now.Sub(s.warned) >= warnPeriod
	if warn {
		s.warned = now
	}
	r.mu.Unlock()
	if warn && r.Log != nil {
		r.Log.Error("the API server of a cluster cannot be asked about tokens, so that its pods get no access tokens",
			"cluster", c.ID, "account", c.AccountID, "error", err)
	}
}

func (r *Reviewer) answered(c *cluster.Cluster, s *reviewServer) {
	now := r.Now()
	end, ends := endOf(s.client.credential)
	soon := ends && end.Sub(now) < credentialsEnds
	r.mu.Lock()
	again := !s.warned.IsZero()
	s.broken, s.brokenUntil, s.warned = nil, time.Time{}, time.Time{}
	remind := soon && (s.reminded.IsZero() || now.Sub(s.reminded) >= warnPeriod)
	if remind {
		s.reminded = now
	}
	r.mu.Unlock()
	if r.Log == nil {
		return
	}
	if again {
		r.Log.Info("the API server of a cluster can be asked about tokens again", "cluster", c.ID, "account", c.AccountID)
	}
	if remind {
		r.Log.Warn("the credential for the API server of a cluster ends soon; give the cluster a new one",
			"cluster", c.ID, "account", c.AccountID, "ends", end.UTC())
	}
}

// reviewAnswer is the status of a TokenReview.
type reviewAnswer struct {
	Authenticated bool     `json:"authenticated"`
	Error         string   `json:"error"`
	Audiences     []string `json:"audiences"`
	User          struct {
		Username string              `json:"username"`
		UID      string              `json:"uid"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// review makes a TokenReview. The status is that of the HTTP answer.
func (s *serverClient) review(ctx context.Context, token, audience string) (*reviewAnswer, int, error) {
	type spec struct {
		Token     string   `json:"token"`
		Audiences []string `json:"audiences"`
	}
	in := struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Spec       spec   `json:"spec"`
	}{"authentication.k8s.io/v1", "TokenReview", spec{token, []string{audience}}}
	var out struct {
		Kind   string        `json:"kind"`
		Status *reviewAnswer `json:"status"`
	}
	status, err := s.do(ctx, http.MethodPost, reviewPath, in, &out, token)
	switch {
	case status == http.StatusUnauthorized:
		return nil, status, fmt.Errorf("the API server does not accept the credential that it is asked with; give the cluster a new one: %w", err)
	case status == http.StatusForbidden:
		return nil, status, fmt.Errorf("the credential may not review tokens; bind its service account to a cluster role with the verb create on tokenreviews of authentication.k8s.io: %w", err)
	case err != nil:
		return nil, status, err
	case out.Kind != "TokenReview" || out.Status == nil:
		return nil, status, errors.New("the answer to the review is not a TokenReview")
	}
	return out.Status, status, nil
}
