package clusters

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/jwt"
)

// trial is what came out of trying a registration before it is committed.
type trial struct {
	keyIDs []string // nil when the keys were not looked at
	tested *tested
}

// tested says whose the test token is, as far as the cluster has signed it. The
// token itself is a credential: it is neither kept nor told to anybody.
type tested struct {
	Subject string `json:"subject"`
	Pod     string `json:"pod,omitempty"`
	Node    string `json:"node,omitempty"`
	KeyID   string `json:"key_id,omitempty"`
}

// show adds what was found to an answer.
func (t *trial) show(b *body) {
	if t.keyIDs != nil {
		n := len(t.keyIDs)
		b.Keys, b.KeyIDs = &n, t.keyIDs
	}
	b.Tested = t.tested
}

// try has a registration proved that is not committed yet: its keys, when they
// are looked at; its reviewer, when it has one; and the test token, when there
// is one. The caller must have the right to make the registration.
func (h family) try(c *api.Call, k *cluster.Cluster, keys bool, token string) (trial, error) {
	var t trial
	ctx := c.R.Context()
	if keys {
		ids, err := h.Keys.CheckIDs(ctx, k)
		if err != nil {
			return t, keysUnusable(c, k, err)
		}
		t.keyIDs = ids
		if err := h.distinct(c, k, ids); err != nil {
			return t, err
		}
		if k.Review {
			if err := h.Reviewer.Check(ctx, k); err != nil {
				return t, reviewUnusable(c, k, err)
			}
		}
	}
	if token == "" {
		return t, nil
	}
	proof, err := h.Tokens.Try(ctx, k, token)
	if err != nil {
		return t, tokenRefused(c, k, err)
	}
	ev := proof.Evidence
	t.tested = &tested{
		Subject: activity.Clip("system:serviceaccount:" + ev.Namespace + ":" + ev.ServiceAccount),
		Pod:     claim(ev.Claims, "pod"), Node: claim(ev.Claims, "node"),
	}
	if parsed, err := jwt.Parse(token, jwt.Asymmetric, "", "JWT"); err == nil {
		t.tested.KeyID = activity.Clip(parsed.KeyID)
	}
	return t, nil
}

func claim(claims map[string]any, name string) string {
	s, _ := claims[name].(string)
	return activity.Clip(s)
}

// Bounds on comparing keys with those of the account's other clusters.
const (
	comparedAtOnce = 8
	comparingTime  = 5 * time.Second // for all of them
)

// distinct refuses keys of another cluster of the account with the same issuer:
// tokens that verify for two of them are evidence of none. It compares key ids,
// which API servers compute from the keys. What cannot be compared in time is
// still told apart at each exchange.
func (h family) distinct(c *api.Call, k *cluster.Cluster, ids []string) error {
	ctx, cancel := context.WithTimeout(c.R.Context(), comparingTime)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(comparedAtOnce)
	for _, other := range sameIssuer(c, k) {
		g.Go(func() error {
			theirs, err := h.Keys.CheckIDs(ctx, other)
			if err == nil && slices.ContainsFunc(ids, func(id string) bool { return id != "" && slices.Contains(theirs, id) }) {
				return issuerTaken(k, other, true)
			}
			return nil
		})
	}
	return g.Wait()
}

// sameIssuer returns the account's other clusters whose tokens have the same
// issuer.
func sameIssuer(c *api.Call, k *cluster.Cluster) []*cluster.Cluster {
	return slices.DeleteFunc(c.Directory.ClustersByIssuer.Get(k.Issuer), func(other *cluster.Cluster) bool {
		return other.AccountID != k.AccountID || other.ID == k.ID
	})
}

// checkTestToken bounds a test token; what is wrong inside it is the prover's to
// say.
func checkTestToken(token string) error {
	if len(token) > maxToken {
		return api.Invalid("The field test_token has %d bytes, at most %d are read.", len(token), maxToken).On("test_token")
	}
	return nil
}

// keysUnusable is the fault of keys that cannot be had, wherever they come from.
func keysUnusable(c *api.Call, k *cluster.Cluster, cause error) error {
	if attest.KeysFrom(k) != attest.FromServer {
		return c.KeysUnusable(k.Issuer, cause)
	}
	return fault.New(fault.Invalid, "keys_unusable", "The keys of the API server %s cannot be used: %s.", k.Server.URL, told(c, cause, "they cannot be fetched")).Because(cause)
}

// reviewUnusable is the fault of a reviewer that does not answer, or not to us.
func reviewUnusable(c *api.Call, k *cluster.Cluster, cause error) error {
	return fault.New(fault.Invalid, "review_unusable",
		"The API server %s cannot be asked about tokens: %s. The server's token needs the right to create tokenreviews: bind its service account to a cluster role with the verb create on tokenreviews of authentication.k8s.io; 'tabard ks cluster-update NAME --token-review' makes that.",
		k.Server.URL, told(c, cause, "it does not answer as it should")).Because(cause)
}

// told returns why something failed, or less for accounts that are not the
// operator's: what the network around the server answers is not for them.
func told(c *api.Call, cause error, less string) string {
	if c.Account() != c.OperatorAccount {
		return less
	}
	return activity.Clip(cause.Error())
}

// tokenRefused explains why a test token is not evidence.
func tokenRefused(c *api.Call, k *cluster.Cluster, err error) error {
	var r *attest.Refusal
	if !errors.As(err, &r) {
		return fmt.Errorf("try a test token with cluster %s: %w", k.ID, err)
	}
	failed, _ := r.Trace.Failed()
	switch r.Reason {
	case attest.KeysUnavailable:
		return keysUnusable(c, k, causeOf(r))
	case attest.ReviewUnavailable:
		return reviewUnusable(c, k, causeOf(r))
	}
	return fault.New(fault.Invalid, "test_token_refused", "The test token is not accepted at check %s: wanted %s, found %s. %s",
		failed.Name, failed.Wanted, failed.Found, failed.Hint).On("test_token").Because(errors.New(string(r.Reason)))
}

// causeOf returns the cause of a refusal, or the refusal.
func causeOf(r *attest.Refusal) error {
	if r.Cause != nil {
		return r.Cause
	}
	return r
}

// clipAll bounds what an event holds of texts that came from outside.
func clipAll(all []string) []string {
	out := make([]string, len(all))
	for i, s := range all {
		out[i] = activity.Clip(s)
	}
	return out
}

// idsOf returns the ids of a cluster's uploaded keys.
func idsOf(k *cluster.Cluster) []string {
	if len(k.JWKS) == 0 {
		return nil
	}
	keys, err := attest.ParseKeys(k.JWKS)
	if err != nil {
		return nil // whoever has no readable keys signs nothing
	}
	return keyIDs(keys)
}

// without returns what of all is not among others.
func without(all, others []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(others, s) })
}
