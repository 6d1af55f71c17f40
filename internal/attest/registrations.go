package attest

import (
	"context"
	"errors"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/cluster"
)

// CheckIDs fetches or parses the cluster's keys now and returns their ids. What
// is remembered stays as it is.
func (k *Keys) CheckIDs(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	keys, err := k.found(ctx, c)
	return idsOf(keys), err
}

// Refresh fetches the cluster's keys now and remembers them. When that fails,
// those that are remembered go on counting.
func (k *Keys) Refresh(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	now := k.Now()
	keys, err := k.found(ctx, c)
	if err != nil {
		return nil, err
	}
	k.keep(c, keySet{keys: keys, fetched: now, tried: now})
	return idsOf(keys), nil
}

func (k *Keys) found(ctx context.Context, c *cluster.Cluster) ([]jose.JSONWebKey, error) {
	if len(c.JWKS) > 0 {
		return ParseKeys(c.JWKS)
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	return fetch(ctx, c)
}

func idsOf(keys []jose.JSONWebKey) []string {
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.KeyID
	}
	return ids
}

// Try verifies a token against one cluster only, which need not be registered,
// with keys that are fetched now.
func (k *Kubernetes) Try(ctx context.Context, c *cluster.Cluster, raw string) (Proof, error) {
	alone := *k
	alone.Clusters = only{k.Clusters, c}
	alone.Keys = &Keys{Now: k.Now}
	proofs, err := alone.Verify(ctx, raw)
	if err != nil {
		return Proof{}, err
	}
	return proofs[0], nil
}

type only struct {
	Clusters

	cluster *cluster.Cluster
}

func (o only) ClustersOf(issuer string) []*cluster.Cluster {
	if issuer != o.cluster.Issuer {
		return nil
	}
	return []*cluster.Cluster{o.cluster}
}

// Reviewer asks API servers about tokens.
type Reviewer struct{}

// Check says why a cluster's API server cannot be asked about tokens.
func (*Reviewer) Check(context.Context, *cluster.Cluster) error {
	return errors.New("this server cannot ask API servers about tokens")
}
