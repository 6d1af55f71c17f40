package attest_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/jwt/jwttest"
)

// stands is the status of a TokenReview of a good token, with changes.
func stands(change object) func(string, []string) object {
	return func(_ string, audiences []string) object {
		status := object{
			"authenticated": true, "audiences": audiences,
			"user": object{
				"username": "system:serviceaccount:apps:lister", "uid": "u1",
				"extra": object{"authentication.kubernetes.io/pod-uid": []string{"u2"}},
			},
		}
		for k, v := range change {
			status[k] = v
		}
		return status
	}
}

// reviewedPod is a pod whose cluster demands reviews.
type reviewedPod struct {
	*pod
	server *apiServer
	log    bytes.Buffer

	mu   sync.Mutex
	told map[string]int
}

func newReviewedPod(t *testing.T, more ...*cluster.Cluster) *reviewedPod {
	t.Helper()
	sealer := newSealer(t)
	r := &reviewedPod{pod: newPod(t, more...), server: newAPIServer(t, nil), told: map[string]int{}}
	r.server.status = stands(nil)
	r.cluster.Review = true
	r.server.behind(r.cluster, sealer)
	r.Reviewer = &attest.Reviewer{
		Opener: sealer, Now: r.clock.Now, Log: slog.New(slog.NewTextHandler(&r.log, nil)),
		Observe: func(outcome string, asked bool) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.told[fmt.Sprint(outcome, " ", asked)]++
		},
	}
	t.Cleanup(r.Reviewer.Close)
	return r
}

func (r *reviewedPod) review(t *testing.T, raw string) (activity.Trace, *attest.Refusal) {
	t.Helper()
	proofs, _, err := r.Verify(ctx, raw)
	if err != nil || len(proofs) != 1 || !proofs[0].Demands() {
		t.Fatalf("%d proofs, %v", len(proofs), err)
	}
	return proofs[0].Review(ctx, true)
}

func (r *reviewedPod) want(t *testing.T, raw string, reason attest.Reason) *attest.Refusal {
	t.Helper()
	trace, refusal := r.review(t, raw)
	if len(trace) != 1 || trace[0].Name != attest.CheckReview {
		t.Fatalf("trace %+v", trace)
	}
	switch {
	case reason == "" && (refusal != nil || trace[0].Outcome != activity.Pass):
		t.Fatalf("refused: %v", refusal)
	case reason != "" && (refusal == nil || refusal.Reason != reason || trace[0].Outcome != activity.Fail || trace[0].Hint == ""):
		t.Fatalf("%v %+v, want %s", refusal, trace, reason)
	}
	return refusal
}

func (r *reviewedPod) wantAsked(t *testing.T, n int) {
	t.Helper()
	if got, _ := r.server.asked(); got != n {
		t.Fatalf("asked %d times, want %d", got, n)
	}
}

func TestAReviewIsAskedForOnceInAWhile(t *testing.T) {
	p := newReviewedPod(t)
	raw := p.token(t, nil)
	for range 20 {
		p.want(t, raw, "")
	}
	p.wantAsked(t, 1)
	p.clock.advance(attest.VerdictLife)
	p.server.set(func(s *apiServer) { s.status = stands(object{"authenticated": false, "error": "the pod is gone"}) })
	for range 20 {
		p.want(t, raw, attest.ReviewDenied)
	}
	p.wantAsked(t, 2)
	p.want(t, p.token(t, object{"jti": "another"}), attest.ReviewDenied)
	p.wantAsked(t, 3)
	p.clock.advance(attest.VerdictLife)
	p.server.set(func(s *apiServer) { s.status = stands(nil) })
	p.want(t, raw, "")
	if fmt.Sprint(p.told) != "map[allowed false:19 allowed true:2 denied false:19 denied true:2]" {
		t.Errorf("told %v", p.told)
	}
}

func TestAClusterThatDemandsNoReviewIsNotAsked(t *testing.T) {
	p := newReviewedPod(t)
	p.cluster.Review = false
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	if trace, r := proofs[0].Review(ctx, false); trace != nil || r != nil || proofs[0].Demands() {
		t.Errorf("%+v %v", trace, r)
	}
	p.wantAsked(t, 0)
}

func TestAReviewIsRememberedForItsRegistrationOnly(t *testing.T) {
	p := newReviewedPod(t)
	raw := p.token(t, nil)
	p.want(t, raw, "")
	p.cluster.Revision++
	p.want(t, raw, "")
	p.wantAsked(t, 2)
}

func TestAReviewIsNotRememberedBeyondTheTokensEnd(t *testing.T) {
	p := newReviewedPod(t)
	raw := p.token(t, object{"exp": p.clock.Now().Add(3 * time.Second).Unix()})
	p.want(t, raw, "")
	proofs, _, err := p.Verify(ctx, raw)
	if err != nil {
		t.Fatal(err)
	}
	p.clock.advance(3 * time.Second)
	if _, _, err := p.Verify(ctx, raw); err == nil {
		t.Error("the token is good after its end")
	}
	// Whoever verified it a moment before does not get a remembered answer.
	if _, r := proofs[0].Review(ctx, true); r != nil {
		t.Fatal(r)
	}
	p.wantAsked(t, 2)
}

func TestAnAPIServerMustSpeakOfTheVeryPod(t *testing.T) {
	user := func(change object) object {
		u := object{"username": "system:serviceaccount:apps:lister", "uid": "u1"}
		for k, v := range change {
			u[k] = v
		}
		return object{"user": u}
	}
	uid := func(uids ...string) object {
		return user(object{"extra": object{"authentication.kubernetes.io/pod-uid": uids}})
	}
	for name, tt := range map[string]struct {
		status object
		denied bool
	}{
		"as it should be":               {nil, false},
		"not authenticated":             {object{"authenticated": false}, true},
		"no word of it":                 {object{"authenticated": nil}, true},
		"another audience":              {object{"audiences": []string{"https://kubernetes.default.svc"}}, true},
		"no audience":                   {object{"audiences": nil}, true},
		"the audience in upper case":    {object{"audiences": []string{"IAM"}}, true},
		"the audience among others":     {object{"audiences": []string{"other", "iam"}}, false},
		"another user":                  {user(object{"username": "system:serviceaccount:apps:other"}), true},
		"no user":                       {object{"user": nil}, true},
		"an administrator":              {user(object{"username": "admin"}), true},
		"a recreated service account":   {user(object{"uid": "u9"}), true},
		"a service account without UID": {user(object{"uid": ""}), true},
		"another pod":                   {uid("u9"), true},
		"two pods":                      {uid("u2", "u9"), true},
		"no pod at all":                 {user(nil), false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newReviewedPod(t)
			p.server.status = stands(tt.status)
			reason := attest.Reason("")
			if tt.denied {
				reason = attest.ReviewDenied
			}
			p.want(t, p.token(t, nil), reason)
		})
	}
	t.Run("a token without the UID of its service account", func(t *testing.T) {
		p := newReviewedPod(t)
		p.server.status = stands(user(object{"uid": ""}))
		p.want(t, p.token(t, object{"kubernetes.io": object{"namespace": "apps", "serviceaccount": object{"name": "lister"}}}), attest.ReviewDenied)
	})
}

func TestABrokenReviewerIsNotTheTokensFaultAndRecovers(t *testing.T) {
	text := func(status int, s string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status); _, _ = w.Write([]byte(s)) }
	}
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request){
		"an error of the API server":  fails,
		"a credential that is none":   text(401, `{"kind":"Status","message":"Unauthorized"}`),
		"a credential without rights": text(403, `{"kind":"Status","message":"forbidden"}`),
		"too many requests":           text(429, ""),
		"an answer that is no JSON":   text(201, "<html>"),
		"an answer about another":     text(201, `{"kind":"SubjectAccessReview","status":{"authenticated":true}}`),
		"an answer without a status":  text(201, `{"kind":"TokenReview"}`),
		"no answer at all":            text(201, ""),
		"an endless answer":           text(201, strings.Repeat(" ", 2<<20)),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://attacker.test/", http.StatusTemporaryRedirect)
		},
		"a connection that is cut": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			p := newReviewedPod(t)
			raw := p.token(t, nil)
			p.server.set(func(s *apiServer) { s.answer = answer })
			r := p.want(t, raw, attest.ReviewUnavailable)
			if r.Cause == nil {
				t.Error("nobody learns why")
			}
			p.want(t, raw, attest.ReviewUnavailable)
			p.server.set(func(s *apiServer) { s.answer = nil })
			p.clock.advance(time.Second)
			p.want(t, raw, "")
			if n := strings.Count(p.log.String(), "level=ERROR"); n != 1 || !strings.Contains(p.log.String(), "cluster=c0ffee") {
				t.Errorf("%d errors in the log: %s", n, p.log.String())
			}
			if !strings.Contains(p.log.String(), "again") {
				t.Errorf("the log does not say that it is over: %s", p.log.String())
			}
		})
	}
}

// The API server is down: a flood of tokens is not passed on to it, and what is
// remembered counts for as long as it does anyway.
func TestABrokenReviewerIsAskedAtABoundedRate(t *testing.T) {
	p := newReviewedPod(t)
	good := p.token(t, nil)
	p.want(t, good, "")
	p.server.set(func(s *apiServer) { s.answer = fails })
	for n := range 100 {
		p.want(t, p.token(t, object{"jti": fmt.Sprint(n)}), attest.ReviewUnavailable)
	}
	p.wantAsked(t, 2)
	p.want(t, good, "")
	p.clock.advance(time.Second)
	for n := range 100 {
		p.want(t, p.token(t, object{"jti": fmt.Sprint(n)}), attest.ReviewUnavailable)
	}
	p.wantAsked(t, 3)
}

func TestManyRequestsWithOneTokenCauseOneReview(t *testing.T) {
	p := newReviewedPod(t)
	raw := p.token(t, nil)
	proofs, _, err := p.Verify(ctx, raw)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if _, r := proofs[0].Review(ctx, true); r != nil {
				t.Error(r)
			}
		})
	}
	wg.Wait()
	p.wantAsked(t, 1)
}

func TestACallerWhoGivesUpDoesNotEndTheReviewOfOthers(t *testing.T) {
	p := newReviewedPod(t)
	arrived, answer := make(chan struct{}), make(chan struct{})
	p.server.set(func(s *apiServer) {
		s.status = func(token string, audiences []string) object {
			close(arrived)
			<-answer
			return stands(nil)(token, audiences)
		}
	})
	proofs, _, err := p.Verify(ctx, p.token(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	first, cancel := context.WithCancel(ctx)
	gaveUp := make(chan *attest.Refusal)
	go func() { _, r := proofs[0].Review(first, true); gaveUp <- r }()
	<-arrived
	cancel()
	if r := <-gaveUp; r == nil || r.Reason != attest.ReviewUnavailable {
		t.Errorf("%v", r)
	}
	second := make(chan *attest.Refusal)
	go func() { _, r := proofs[0].Review(ctx, true); second <- r }()
	close(answer)
	if r := <-second; r != nil {
		t.Error(r)
	}
	p.wantAsked(t, 1)
}

func TestWithoutAReviewerAClusterThatDemandsReviewsGetsNothing(t *testing.T) {
	p := newReviewedPod(t)
	p.Reviewer = nil
	p.want(t, p.token(t, nil), attest.ReviewUnavailable)
	if err := p.CheckReview(ctx, p.cluster); err == nil {
		t.Error("a registration can demand reviews")
	}
}

func TestAReviewersCredentialIsTriedBeforeItIsNeeded(t *testing.T) {
	p := newReviewedPod(t)
	p.server.status = func(token string, _ []string) object { return object{"authenticated": strings.Count(token, ".") == 2} }
	if err := p.CheckReview(ctx, p.cluster); err != nil {
		t.Error(err)
	}
	p.server.set(func(s *apiServer) { s.status = stands(nil) })
	if err := p.CheckReview(ctx, p.cluster); err == nil {
		t.Error("an API server that accepts anything was accepted")
	}
	p.server.set(func(s *apiServer) { s.credential = "another" })
	if err := p.CheckReview(ctx, p.cluster); err == nil || !strings.Contains(err.Error(), "credential") {
		t.Errorf("error %v", err)
	}
}

func TestACredentialThatEndsSoonIsSaidOnce(t *testing.T) {
	p := newReviewedPod(t)
	p.server.credential = jwttest.ES256(t, p.key, "x", fmt.Sprintf(`{"exp":%d}`, p.clock.Now().Add(30*time.Minute).Unix()), "")
	p.server.behind(p.cluster, newSealer(t))
	for n := range 10 {
		p.want(t, p.token(t, object{"jti": fmt.Sprint(n)}), "")
	}
	if n := strings.Count(p.log.String(), "ends soon"); n != 1 {
		t.Errorf("said %d times: %s", n, p.log.String())
	}
	if strings.Contains(p.log.String(), p.server.credential) {
		t.Error("the credential stands in the log")
	}
}

// Issuer and keys of a cluster are public. Whoever registers them in an account
// of his own, with an API server of his own, must not be sent the tokens.
func TestATokenIsShownToNoAPIServerOfAnotherAccount(t *testing.T) {
	spy := newAPIServer(t, nil)
	spy.status = stands(nil)
	claim := func(p *reviewedPod, created time.Time) *cluster.Cluster {
		c := uploaded("decaf", p.cluster.JWKS)
		c.AccountID, c.CRN, c.Review = away, strings.Replace(c.CRN, home, away, 1), true
		c.CreatedAt = created
		return spy.behind(c, newSealer(t))
	}
	of := func(t *testing.T, p *reviewedPod, account string) attest.Proof {
		t.Helper()
		proofs, _, err := p.Verify(ctx, p.token(t, nil))
		if err != nil || len(proofs) != 2 {
			t.Fatalf("%d proofs, %v", len(proofs), err)
		}
		n := slices.IndexFunc(proofs, func(p attest.Proof) bool { return p.Evidence.AccountID == account })
		return proofs[n]
	}
	t.Run("verifying asks nobody", func(t *testing.T) {
		p := newReviewedPod(t)
		p.Clusters = registered{p.cluster, claim(p, p.clock.Now())}
		of(t, p, home)
		p.wantAsked(t, 0)
		if n, _ := spy.asked(); n != 0 {
			t.Error("the attacker has seen a token")
		}
	})
	t.Run("the later registration is not asked for a profile's name alone", func(t *testing.T) {
		p := newReviewedPod(t)
		p.Clusters = registered{claim(p, p.clock.Now()), p.cluster}
		trace, r := of(t, p, away).Review(ctx, false)
		if r == nil || r.Reason != attest.ReviewWithheld || len(trace) != 1 {
			t.Errorf("%v %+v", r, trace)
		}
		if n, _ := spy.asked(); n != 0 {
			t.Error("the attacker has seen a token")
		}
		// The earlier one is not hindered.
		if _, r := of(t, p, home).Review(ctx, false); r != nil {
			t.Error(r)
		}
	})
	t.Run("nor while nobody knows whether the earlier one is the token's", func(t *testing.T) {
		p := newReviewedPod(t)
		down := newAPIServer(t, nil)
		down.answer = fails
		mine := down.behind(uploaded("c0ffee", nil), newSealer(t))
		p.Clusters = registered{mine, claim(p, p.clock.Now())}
		proofs, _, err := p.Verify(ctx, p.token(t, nil))
		if err != nil || len(proofs) != 1 {
			t.Fatalf("%d proofs, %v", len(proofs), err)
		}
		if _, r := proofs[0].Review(ctx, false); r == nil || r.Reason != attest.ReviewWithheld {
			t.Errorf("%v", r)
		}
		if n, _ := spy.asked(); n != 0 {
			t.Error("the attacker has seen a token")
		}
	})
	t.Run("nor when it took the earlier one's keys after all", func(t *testing.T) {
		p := newReviewedPod(t)
		down := newAPIServer(t, nil)
		down.answer = fails
		mine := down.behind(uploaded("c0ffee", nil), newSealer(t))
		mine.CreatedAt = p.clock.Now()
		first := claim(p, p.clock.Now().Add(-time.Hour))
		first.Proved = p.clock.Now().Add(time.Second)
		p.Clusters = registered{mine, first}
		proofs, _, err := p.Verify(ctx, p.token(t, nil))
		if err != nil || len(proofs) != 1 || !slices.Equal(proofs[0].Undecided, []string{home}) {
			t.Fatalf("%+v, %v", proofs, err)
		}
		if _, r := proofs[0].Review(ctx, false); r == nil || r.Reason != attest.ReviewWithheld {
			t.Errorf("%v", r)
		}
	})
	t.Run("nor is another cluster of the account, while the token may be of one that cannot be asked", func(t *testing.T) {
		p := newReviewedPod(t)
		down := newAPIServer(t, nil)
		down.answer = fails
		p.Clusters = registered{p.cluster, down.behind(uploaded("decaf", nil), newSealer(t))}
		proofs, _, err := p.Verify(ctx, p.token(t, nil))
		if err != nil || len(proofs) != 1 {
			t.Fatalf("%+v, %v", proofs, err)
		}
		if _, r := proofs[0].Review(ctx, true); r == nil || r.Reason != attest.ReviewUnavailable {
			t.Errorf("%v", r)
		}
		p.wantAsked(t, 0)
	})
	t.Run("two accounts that share a cluster share its API server", func(t *testing.T) {
		p := newReviewedPod(t)
		shared := claim(p, p.clock.Now())
		p.server.behind(shared, newSealer(t))
		p.Clusters = registered{p.cluster, shared}
		for _, account := range []string{home, away} {
			if _, r := of(t, p, account).Review(ctx, false); r != nil {
				t.Errorf("%s: %v", account, r)
			}
		}
	})
	t.Run("who selects the profile by its id says which account he means", func(t *testing.T) {
		p := newReviewedPod(t)
		p.Clusters = registered{p.cluster, claim(p, p.clock.Now())}
		if _, r := of(t, p, away).Review(ctx, true); r != nil {
			t.Error(r)
		}
	})
}
