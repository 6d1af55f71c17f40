package kubernetes

import (
	"net/http"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
	"tabard.dev/tabard/test/kubetest"
)

// reviewedSite is a site with one cluster that is asked about every token.
func reviewedSite(t *testing.T) (*site, *kubetest.Cluster) {
	t.Helper()
	k := kubetest.Start(t, withReviewer(kubetest.Options{}))
	allowReviewer(k)
	k.Namespace("shop", nil, nil)
	k.ServiceAccount("shop", "web", nil)
	s := newSite(t)
	s.resources("pod")
	s.link("pod", s.register("my-cluster", reached(k, true)), "shop", "web")
	return s, k
}

func TestWhatWasDeletedInTheClusterIsRefusedByReview(t *testing.T) {
	t.Parallel()
	s, k := reviewedSite(t)
	pod := k.Pod("shop", "web-1", "web")
	other := k.Pod("shop", "web-2", "web")
	ofPod, ofOther := k.Token("shop", "web", "iam", 3600, pod), k.Token("shop", "web", "iam", 3600, other)
	unbound := k.Token("shop", "web", "iam", 3600, nil)
	for _, token := range []string{ofPod, ofOther, unbound} {
		s.admitted(t, token, "pod")
	}
	t.Run("a deleted pod", func(t *testing.T) {
		k.DeletePod("shop", "web-1")
		// The API server itself says for up to 10 s that the pod is there.
		s.eventuallyRefused(t, ofPod, "pod", "BXNIM0407E", "token-review")
		s.admitted(t, ofOther, "pod")
		s.admitted(t, unbound, "pod")
	})
	t.Run("a pod that came again under its name", func(t *testing.T) {
		again := k.Pod("shop", "web-1", "web")
		s.admitted(t, k.Token("shop", "web", "iam", 3600, again), "pod")
		s.refused(t, ofPod, "pod", "BXNIM0407E", "token-review")
	})
	t.Run("a deleted service account", func(t *testing.T) {
		k.DeleteServiceAccount("shop", "web")
		s.eventuallyRefused(t, ofOther, "pod", "BXNIM0407E", "token-review")
		s.eventuallyRefused(t, unbound, "pod", "BXNIM0407E", "token-review")
	})
	t.Run("a service account that came again under its name", func(t *testing.T) {
		k.ServiceAccount("shop", "web", nil)
		s.admitted(t, k.Token("shop", "web", "iam", 3600, nil), "pod")
		s.refused(t, unbound, "pod", "BXNIM0407E", "token-review")
	})
	t.Run("and what the API server never made, though its key signed it", func(t *testing.T) {
		claims := kubetest.Claims(t, unbound)
		claims["kubernetes.io"].(object)["serviceaccount"].(object)["uid"] = "6f0f3c1e-0000-4000-8000-000000000000"
		s.refused(t, k.Sign(claims), "pod", "BXNIM0407E", "token-review")
	})
}

func TestABrokenReviewerIsNotABadToken(t *testing.T) {
	t.Parallel()
	s, k := reviewedSite(t)
	fresh := func() string { return k.Token("shop", "web", "iam", 3600, nil) }
	s.admitted(t, fresh(), "pod")

	// broken demands the answer to a token that may be good.
	broken := func(t *testing.T, a harness.Answer, transaction string) {
		t.Helper()
		if a.Status != http.StatusServiceUnavailable || a.Field("errorCode") != "BXNIM0504E" || a.Header.Get("Retry-After") == "" {
			t.Fatalf("%d Retry-After %q %s", a.Status, a.Header.Get("Retry-After"), a.Body)
		}
		s.explains(t, transaction, "token-review")
	}
	bad := k.Token("shop", "web", "somebody else", 3600, nil)
	unseen, second := fresh(), fresh()

	t.Run("when the API server is down", func(t *testing.T) {
		k.Stop()
		broken(t, s.exchange(unseen, "pod", "Transaction-Id", "txn-down"), "txn-down")
		s.refused(t, bad, "pod", "BXNIM0405E", "token-audience")
		k.Restart()
		eventually(t, "the reviewer works again without a restart of the server", func() bool {
			return s.exchange(unseen, "pod").Status == http.StatusOK
		})
	})
	t.Run("when the reviewer lost its rights", func(t *testing.T) {
		forbidReviewer(k)
		eventually(t, "the API server has noticed", func() bool { return !mayReview(k) })
		broken(t, s.exchange(second, "pod", "Transaction-Id", "txn-forbidden"), "txn-forbidden")
		s.refused(t, bad, "pod", "BXNIM0405E", "token-audience")
		allowReviewer(k)
		eventually(t, "the reviewer works again without a restart of the server", func() bool {
			return s.exchange(second, "pod").Status == http.StatusOK
		})
	})
	t.Run("and the metrics tell them apart", func(t *testing.T) {
		a := s.Do(http.MethodGet, "/metrics", "", nil)
		for _, outcome := range []string{"allowed", "broken"} {
			if !strings.Contains(string(a.Body), `tabard_token_reviews_total{outcome="`+outcome+`"`) {
				t.Errorf("no reviews that were %s in the metrics", outcome)
			}
		}
		if strings.Contains(s.Log(), reviewerToken) {
			t.Error("the reviewer's token stands in the server's log")
		}
	})
}
