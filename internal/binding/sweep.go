package binding

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

// maxLost bounds how many bindings may wait for a look at what they left.
const maxLost = 1024

// lost is a binding that is gone, and the profile that may still have its link:
// somebody may have taken the finalizer off.
type lost struct {
	key     key
	uid     string
	profile string
}

// sweepEvery searches for links whose bindings are gone until the context ends:
// at once, since nobody knows what happened while no controller ran, then from
// time to time, and where a binding has just gone.
func (c *Controller) sweepEvery(ctx context.Context) {
	next := time.NewTimer(0)
	defer next.Stop()
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case l := <-c.lost:
			if err := c.sweepProfile(ctx, l.profile); err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("what a deleted binding left is not removed yet", "binding", l.key, "profile", l.profile, "error", err)
				next.Reset(jitter(firstRetry))
			}
		case <-next.C:
			err := c.sweep(ctx)
			wait := c.cfg.Sweep
			if err != nil && ctx.Err() == nil {
				c.cfg.Log.Warn("orphaned links are not searched for", "error", err)
				wait = min(wait, firstRetry<<min(failures, 7))
				failures++
			} else {
				failures = 0
			}
			next.Reset(jitter(wait))
		}
	}
}

// sweep removes the orphaned links of this cluster from all profiles that the
// controller may see.
func (c *Controller) sweep(ctx context.Context) error {
	for p, err := range c.iam.profiles(ctx, "") {
		if err != nil {
			return err
		}
		if err := c.sweepProfile(ctx, p.ID); err != nil {
			return err
		}
	}
	return nil
}

func (c *Controller) sweepProfile(ctx context.Context, profile string) error {
	if !profileID.MatchString(profile) {
		return nil
	}
	links, err := c.iam.links(ctx, profile)
	switch iamclient.Status(err) {
	case http.StatusNotFound, http.StatusForbidden:
		return nil // it is gone, or none that the controller may link
	}
	if err != nil {
		return err
	}
	cluster, err := c.registered(ctx)
	if iamclient.Status(err) == http.StatusNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Link.CRN != cluster.CRN || !c.orphaned(ctx, l) && !c.stray(ctx, l, profile) {
			continue
		}
		if err := c.iam.deleteLink(ctx, profile, l.ID); err != nil {
			return fmt.Errorf("remove the orphaned link %s: %w", l.ID, err)
		}
		c.metrics.orphans.Inc()
		c.cfg.Log.Info("orphaned link removed", "link", l.ID, "name", l.Name, "profile", profile)
		c.touch(l.Link.Namespace)
	}
	return nil
}

// orphaned reports whether a link was made for a binding that is no more. When
// in doubt it was not.
func (c *Controller) orphaned(ctx context.Context, l link) bool {
	k, uid, ok := linkOwner(l.Name)
	if !ok || k.namespace != l.Link.Namespace {
		return false
	}
	if b, known := c.bindings.Get(k); known && b.uid == uid {
		return false
	}
	if len(k.name) >= maxBinding { // it may be cut off
		for _, full := range c.bindings.In(k.namespace) {
			if b, _ := c.bindings.Get(full); b.uid == uid {
				return false
			}
		}
		return true
	}
	// What the API server says counts: what is known here may be behind it.
	var b binding
	err := c.kube.Do(ctx, http.MethodGet, k.path(), nil, &b)
	return kube.Code(err) == http.StatusNotFound || err == nil && b.Metadata.UID != uid
}

// stray reports whether a link's binding has its link in another profile.
func (c *Controller) stray(ctx context.Context, l link, profile string) bool {
	k, uid, ok := linkOwner(l.Name)
	if !ok || k.namespace != l.Link.Namespace {
		return false
	}
	b, known := c.bindings.Get(k)
	if !known || b.uid != uid || b.profileID == profile {
		return false
	}
	var now binding
	err := c.kube.Do(ctx, http.MethodGet, k.path(), nil, &now)
	return err == nil && now.Metadata.UID == uid && now.Status.ProfileID != profile
}
