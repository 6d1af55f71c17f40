package attest

import (
	"context"
	"errors"

	"tabard.dev/tabard/internal/cluster"
)

// Registrations answers what the registration of a cluster asks before it is
// committed. It proves with keys that it fetches for the occasion, so that a
// registration which comes to nothing leaves nothing behind.
type Registrations struct {
	Kubernetes *Kubernetes
}

// CheckKeys fetches or parses the cluster's keys now and returns their ids.
func (r *Registrations) CheckKeys(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	return r.Kubernetes.Keys.IDs(ctx, c)
}

// RefreshKeys fetches the cluster's keys now and goes on with them.
func (r *Registrations) RefreshKeys(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	return r.Kubernetes.Keys.Refresh(ctx, c)
}

// Try verifies a token as if the cluster were the only registered one.
func (r *Registrations) Try(ctx context.Context, c *cluster.Cluster, raw string) (Proof, error) {
	alone := *r.Kubernetes
	alone.Clusters = only{r.Kubernetes.Clusters, c}
	alone.Keys = &Keys{Now: r.Kubernetes.Now}
	proofs, err := alone.Verify(ctx, raw)
	if err != nil {
		return Proof{}, err
	}
	return proofs[0], nil
}

// CheckReview asks the cluster's API server about a token that is none.
func (r *Registrations) CheckReview(context.Context, *cluster.Cluster) error {
	return errors.New("this server cannot ask API servers about tokens")
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
