package attest

import (
	"context"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
)

// Reviewer asks API servers about tokens.
type Reviewer struct{}

func (r *Reviewer) uncached() *Reviewer { return r }

// pendingReview is what the API server is to be asked.
type pendingReview struct {
	reviewer                    *Reviewer
	cluster                     *cluster.Cluster
	raw                         string
	expires                     int64 // Unix seconds
	subject, accountUID, podUID string
}

// Demands reports whether the evidence counts only after a review.
func (p Proof) Demands() bool { return p.review != nil }

// Review asks the cluster's API server whether it stands by the token.
func (p Proof) Review(ctx context.Context, named bool) (activity.Trace, *Refusal) {
	if p.review == nil {
		return nil, nil
	}
	var t activity.Trace
	t.Fail(CheckReview, "a review", "no reviewer", "The cluster demands a review of its tokens, and there is no reviewer.")
	return t, &Refusal{Reason: ReviewUnavailable, Detail: "The token cannot be reviewed now.", Trace: t}
}
