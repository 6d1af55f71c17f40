package binding

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"tabard.dev/tabard/internal/iamclient"
	"tabard.dev/tabard/internal/kube"
)

// identityService is that of profiles and their links.
const identityService = "iam-identity"

// maxMessage bounds what a condition quotes of the IAM server, in bytes.
const maxMessage = 600

// patience is how many attempts may fail for want of the IAM server before a
// binding that was in order says so.
const patience = 3

// verdict is how a binding stands after a look at it.
type verdict struct {
	status  string // of the condition Ready
	reason  string
	message string

	linkID    string
	profileID string // of the one profile that may have a link of the binding

	unsure bool          // it could not be found out: whatever link there is stays
	failed bool          // look again soon
	after  time.Duration // but not before that
	err    error         // for the log
}

// turn looks at a binding and says when it is looked at again.
func (c *Controller) turn(ctx context.Context, k key) {
	v, err := c.reconcile(ctx, k)
	switch {
	case ctx.Err() != nil:
		c.queue.Done(k, c.cfg.Resync)
	case err != nil:
		outcome := "error"
		if kube.Code(err) == http.StatusConflict {
			outcome = "conflict" // somebody else changed it meanwhile
		} else {
			c.cfg.Log.Warn("a binding is not reconciled", "binding", k, "error", err)
		}
		c.metrics.reconciles.WithLabelValues(outcome).Inc()
		c.queue.Retry(k, 0)
	case v == nil:
		c.metrics.reconciles.WithLabelValues("Deleted").Inc()
		c.metrics.forget(k)
		c.queue.Forget(k)
	default:
		c.metrics.reconciles.WithLabelValues(v.reason).Inc()
		// Said once, and not at every attempt.
		if news := c.metrics.set(k, v.reason); news && v.err != nil {
			c.cfg.Log.Warn("a binding is not carried out", "binding", k, "reason", v.reason, "error", v.err)
		}
		if v.failed {
			c.queue.Retry(k, v.after)
		} else {
			c.queue.Done(k, c.cfg.Resync)
		}
	}
}

// reconcile makes the IAM server's links agree with a binding, and the binding's
// status with how that went. The verdict is nil when the binding is gone. The
// error is one of the cluster's API server.
func (c *Controller) reconcile(ctx context.Context, k key) (*verdict, error) {
	var b binding
	err := c.kube.Do(ctx, http.MethodGet, k.path(), nil, &b)
	if kube.Code(err) == http.StatusNotFound {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	held := slices.Contains(b.Metadata.Finalizers, Finalizer)
	if b.Metadata.Deleted != nil {
		if !held {
			return nil, nil
		}
		return c.free(ctx, &b)
	}
	if !held {
		// Before there is a link, so that none is left behind.
		if err := c.patch(ctx, &b, "", map[string]any{"metadata": map[string]any{"finalizers": append(b.Metadata.Finalizers, Finalizer)}}); err != nil {
			return nil, err
		}
	}
	v, err := c.carryOut(ctx, &b)
	if err != nil {
		return nil, err
	}
	return v, c.report(ctx, &b, v)
}

// free removes the link of a binding that is being deleted, and then lets the
// binding go.
func (c *Controller) free(ctx context.Context, b *binding) (*verdict, error) {
	cluster, err := c.registered(ctx)
	if err == nil {
		err = c.unlink(ctx, b, cluster, b.Status.ProfileID)
	}
	// Nothing of a cluster that is not registered admits anybody.
	if err != nil && iamclient.Status(err) != http.StatusNotFound {
		v := c.explain(err, "remove the link")
		v.message = "The binding is being deleted, and its link is still there. " + v.message
		v.linkID, v.profileID, v.failed = b.Status.LinkID, b.Status.ProfileID, true
		return v, c.report(ctx, b, v)
	}
	rest := slices.DeleteFunc(slices.Clone(b.Metadata.Finalizers), func(f string) bool { return f == Finalizer })
	err = c.patch(ctx, b, "", map[string]any{"metadata": map[string]any{"finalizers": rest}})
	if err != nil && kube.Code(err) != http.StatusNotFound {
		return nil, err
	}
	c.cfg.Log.Info("unlinked", "binding", b.key(), "account", b.Spec.ServiceAccount, "profile", b.Status.ProfileID)
	// Another binding for the same service account may have waited for that.
	c.touch(b.Metadata.Namespace)
	return nil, nil
}

// carryOut makes or removes a binding's link. The error is one of the cluster's
// API server.
func (c *Controller) carryOut(ctx context.Context, b *binding) (*verdict, error) {
	cluster, err := c.registered(ctx)
	if iamclient.Status(err) == http.StatusNotFound {
		return c.standing(b, &verdict{
			status: "False", reason: ReasonClusterUnregistered, failed: true,
			message: fmt.Sprintf("No cluster %q is registered at Tabard, or the controller's profile %q may not see it. Register it with: "+
				"tabard ks cluster-register %[1]s; the profile needs the role Viewer on the service containers-kubernetes.", c.cfg.Cluster, c.cfg.Profile),
		}), nil
	}
	if err != nil {
		return c.standing(b, c.explainAs(err, "read the cluster", "Viewer", "containers-kubernetes")), nil
	}
	p, v := c.wanted(ctx, b)
	if v != nil && v.unsure {
		return c.standing(b, v), nil
	}
	if v != nil {
		// There is to be no link, and whatever was there goes.
		if err := c.unlink(ctx, b, cluster, b.Status.ProfileID); err != nil {
			return c.standing(b, c.explain(err, "remove the link")), nil
		}
		if b.Status.LinkID != "" {
			c.touch(b.Metadata.Namespace)
		}
		return v, nil
	}
	if old := b.Status.ProfileID; old != "" && old != p.ID {
		if err := c.unlink(ctx, b, cluster, old); err != nil {
			return c.standing(b, c.explain(err, "remove the link to the profile before")), nil
		}
	}
	if b.Status.ProfileID != p.ID {
		if err := c.patch(ctx, b, "/status", map[string]any{"status": map[string]any{"profileID": p.ID, "linkID": nil}}); err != nil {
			return nil, err
		}
	}
	return c.link(ctx, b, cluster, p), nil
}

// standing completes the verdict of a look that did not get as far as the link:
// that is where it was.
func (c *Controller) standing(b *binding, v *verdict) *verdict {
	v.linkID, v.profileID = b.Status.LinkID, b.Status.ProfileID
	return v
}

// wanted returns the profile that a binding's service account is to be linked
// to. Otherwise the verdict says why it is to have none, or why that cannot be
// said.
func (c *Controller) wanted(ctx context.Context, b *binding) (profile, *verdict) {
	no := func(reason, format string, args ...any) *verdict {
		return &verdict{status: "False", reason: reason, message: fmt.Sprintf(format, args...)}
	}
	if err := b.Spec.check(); err != nil {
		return profile{}, no(ReasonInvalid, "The binding cannot be carried out: %v.", err)
	}
	if _, ok := c.accounts.Get(key{b.Metadata.Namespace, b.Spec.ServiceAccount}); !ok {
		return profile{}, no(ReasonAccountNotFound, "The namespace %s has no service account %q. The link is made once it is there: kubectl create serviceaccount -n %[1]s %[2]s",
			b.Metadata.Namespace, b.Spec.ServiceAccount)
	}
	allowed, _ := c.namespaces.Get(key{namespace: b.Metadata.Namespace})
	if strings.TrimSpace(allowed) == "" {
		// Not looked up: who may bind nothing learns nothing about profiles.
		return profile{}, no(ReasonNotAllowed, "The namespace %s may bind no trusted profile. An administrator of the cluster allows some with: kubectl annotate namespace %[1]s %s=NAME",
			b.Metadata.Namespace, AllowedProfiles)
	}
	if name := b.Spec.ProfileName; name != "" && !allows(allowed, name) {
		return profile{}, c.notAllowed(b, name)
	}
	var p profile
	var err error
	if b.Spec.ProfileID != "" {
		p, err = c.iam.profileByID(ctx, b.Spec.profileID())
	} else {
		p, err = c.iam.profileByName(ctx, b.Spec.ProfileName)
	}
	if errors.Is(err, errNoProfile) || iamclient.Status(err) == http.StatusNotFound {
		v := no(ReasonProfileNotFound, "Tabard has no trusted profile %q, or the controller's profile %q may not see it. Create it with: tabard iam trusted-profile-create NAME",
			b.Spec.ProfileName+b.Spec.ProfileID, c.cfg.Profile)
		v.failed = true
		return profile{}, v
	}
	if err != nil {
		return profile{}, c.explain(err, "read the trusted profile")
	}
	// The name that counts is the one that the profile has, not the one that
	// somebody has written.
	if !allows(allowed, p.Name) {
		if b.Spec.ProfileID != "" {
			return profile{}, c.notAllowed(b, b.Spec.ProfileID)
		}
		return profile{}, c.notAllowed(b, p.Name)
	}
	who, err := c.iam.Session(ctx)
	if err != nil {
		return profile{}, c.explain(err, "read the trusted profile")
	}
	if p.ID == who.ProfileID {
		return profile{}, no(ReasonNotAllowed, "The trusted profile %q is the controller's own, which can link every other: it is never bound.", p.Name)
	}
	return p, nil
}

func (c *Controller) notAllowed(b *binding, what string) *verdict {
	return &verdict{
		status: "False", reason: ReasonNotAllowed,
		message: fmt.Sprintf("The namespace %s may not bind the trusted profile %q: it is not among those that its annotation %s names. "+
			"An administrator of the cluster can add it there.", b.Metadata.Namespace, what, AllowedProfiles),
	}
}

// owns reports whether a link was made for the binding in this cluster. A copy
// of a cluster has the same bindings, and links of its own.
func (b *binding) owns(l link, cluster registeredCluster) bool {
	return l.Name == b.linkName() && l.Link.CRN == cluster.CRN && l.Link.Namespace == b.Metadata.Namespace
}

// unlink removes a binding's links from a profile.
func (c *Controller) unlink(ctx context.Context, b *binding, cluster registeredCluster, profile string) error {
	if !profileID.MatchString(profile) {
		return nil
	}
	links, err := c.iam.links(ctx, profile)
	if iamclient.Status(err) == http.StatusNotFound {
		return nil // the profile is gone, and its links with it
	}
	if err != nil {
		return err
	}
	for _, l := range links {
		if !b.owns(l, cluster) {
			continue
		}
		if err := c.iam.deleteLink(ctx, profile, l.ID); err != nil {
			return err
		}
		c.cfg.Log.Info("link removed", "binding", b.key(), "profile", profile, "link", l.ID)
	}
	return nil
}

// link sees to it that a profile has the binding's link.
func (c *Controller) link(ctx context.Context, b *binding, cluster registeredCluster, p profile) *verdict {
	want := linked{CRN: cluster.CRN, Namespace: b.Metadata.Namespace, Name: b.Spec.ServiceAccount}
	done := func(reason, id, format string, args ...any) *verdict {
		return &verdict{status: "True", reason: reason, message: fmt.Sprintf(format, args...), linkID: id, profileID: p.ID}
	}
	var taken error
	for range 2 { // a second time when somebody else made the link meanwhile
		links, err := c.iam.links(ctx, p.ID)
		if err != nil {
			v := c.explain(err, "read the links of the trusted profile")
			v.linkID, v.profileID = b.Status.LinkID, p.ID
			return v
		}
		var own, other *link
		for _, l := range links {
			same := l.CRType == cluster.Type && l.Link == want
			switch {
			case same && b.owns(l, cluster):
				own = &l
			case b.owns(l, cluster), same && c.orphaned(ctx, l):
				// Of a service account that the binding named before, or of a
				// binding that is no more.
				if err := c.iam.deleteLink(ctx, p.ID, l.ID); err != nil {
					v := c.explain(err, "remove a link")
					v.linkID, v.profileID = l.ID, p.ID
					return v
				}
				c.cfg.Log.Info("link removed", "binding", b.key(), "profile", p.ID, "link", l.ID)
			case same:
				other = &l
			}
		}
		if own != nil {
			return done(ReasonLinked, own.ID, "Pods with the service account %s can take on the trusted profile %s.", b.Spec.ServiceAccount, p.Name)
		}
		if other != nil {
			owner := "somebody else has made"
			if k, _, ok := linkOwner(other.Name); ok {
				owner = "belongs to the binding " + k.String()
			}
			return done(ReasonLinkExists, other.ID, "The service account %s is linked to the trusted profile %s by the link %s, which %s. It stays when this binding goes.",
				b.Spec.ServiceAccount, p.Name, other.ID, owner)
		}
		made, err := c.iam.createLink(ctx, p.ID, link{Name: b.linkName(), CRType: cluster.Type, Link: want})
		switch {
		case err == nil:
			c.cfg.Log.Info("linked", "binding", b.key(), "account", b.Spec.ServiceAccount, "profile", p.ID, "link", made.ID)
			return done(ReasonLinked, made.ID, "Pods with the service account %s can take on the trusted profile %s.", b.Spec.ServiceAccount, p.Name)
		case iamclient.Status(err) != http.StatusConflict:
			v := c.explain(err, "link service accounts to the trusted profile")
			if v.reason != ReasonUnavailable {
				v.status = "False" // whereas one that was not answered may have been made
			}
			v.profileID = p.ID
			return v
		}
		taken = err
	}
	v := c.explain(taken, "link service accounts to the trusted profile") // it may have all the links that it can
	v.profileID = p.ID
	return v
}

// explain makes a verdict of what the IAM server has answered to the controller
// about profiles and their links.
func (c *Controller) explain(err error, doing string) *verdict {
	return c.explainAs(err, doing, "Editor", identityService)
}

// explainAs is explain for something that takes a role on a service.
func (c *Controller) explainAs(err error, doing, role, service string) *verdict {
	v := &verdict{status: "Unknown", unsure: true, failed: true, err: err}
	var e *iamclient.Error
	answered := errors.As(err, &e)
	if answered {
		v.after = e.RetryAfter
	}
	only := ""
	if service == identityService {
		only = " --resource-type profile --resource PROFILE_ID"
	}
	foreign := new(foreignCluster)
	switch {
	case errors.As(err, &foreign):
		v.reason, v.message = ReasonForeignCluster, "The controller is configured wrongly: "+foreign.Error()+"."
	case unavailable(err):
		v.reason = ReasonUnavailable
		v.message = fmt.Sprintf("Tabard at %s does not answer: %s. The controller tries again; links that are there go on working.", c.iam.URL(), cause(err))
	case e.Login:
		v.reason = ReasonForbidden
		v.message = fmt.Sprintf("Tabard gives the controller no token for its profile %q: %s. The controller's service account must be linked to it: "+
			"tabard iam trusted-profile-link-create %[1]s.", c.cfg.Profile, clip(e.Message))
	case e.Status == http.StatusForbidden, e.Status == http.StatusUnauthorized:
		v.reason = ReasonForbidden
		v.message = fmt.Sprintf("The controller's profile %q may not %s. Give it the role %s on the service %s: "+
			"tabard iam trusted-profile-policy-create %[1]s --roles %[3]s --service-name %[4]s%[5]s", c.cfg.Profile, doing, role, service, only)
	default:
		v.status, v.reason = "False", ReasonRefused
		v.message = "Tabard refuses it: " + clip(e.Message)
	}
	return v
}

// cause says why the IAM server was not reached, in words that stay the same
// from one attempt to the next.
func cause(err error) string {
	var answer *iamclient.Error
	var op *net.OpError
	var timeout net.Error
	switch {
	case errors.As(err, &answer):
		return fmt.Sprintf("status %d", answer.Status)
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "no answer in time"
	case errors.As(err, &op):
		return op.Err.Error()
	}
	for next := errors.Unwrap(err); next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return clip(err.Error())
}

func clip(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "") + "…"
}

// patch changes a binding, provided that nobody else has since it was read, and
// takes over what it is now.
func (c *Controller) patch(ctx context.Context, b *binding, sub string, change map[string]any) error {
	meta, _ := change["metadata"].(map[string]any)
	if meta == nil {
		meta = map[string]any{}
	}
	meta["resourceVersion"], meta["uid"] = b.Metadata.ResourceVersion, b.Metadata.UID
	change["metadata"] = meta
	var now binding
	if err := c.kube.Patch(ctx, b.key().path()+sub, kube.MergePatch, change, &now); err != nil {
		return err
	}
	*b = now
	return nil
}

// report writes a verdict into the binding's status, if it says anything new.
func (c *Controller) report(ctx context.Context, b *binding, v *verdict) error {
	old := b.Status.ready()
	if v.reason == ReasonUnavailable && old.ObservedGeneration == b.Metadata.Generation {
		// Told once, and not for a hiccup.
		if old.Reason == ReasonUnavailable || c.queue.Failures(b.key()) < patience {
			return nil
		}
	}
	now := condition{
		Type: "Ready", Status: v.status, Reason: v.reason, Message: v.message, ObservedGeneration: b.Metadata.Generation,
		LastTransitionTime: c.cfg.Now().UTC().Truncate(time.Second),
	}
	if old.Status == now.Status && !old.LastTransitionTime.IsZero() {
		now.LastTransitionTime = old.LastTransitionTime
	}
	if old == now && b.Status.LinkID == v.linkID && b.Status.ProfileID == v.profileID && b.Status.ObservedGeneration == b.Metadata.Generation {
		return nil
	}
	conditions := slices.DeleteFunc(slices.Clone(b.Status.Conditions), func(c condition) bool { return c.Type == "Ready" })
	err := c.patch(ctx, b, "/status", map[string]any{"status": map[string]any{
		"observedGeneration": b.Metadata.Generation, "linkID": orNull(v.linkID), "profileID": orNull(v.profileID),
		"conditions": append(conditions, now),
	}})
	if kube.Code(err) == http.StatusNotFound {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	if old.Status != now.Status || old.Reason != now.Reason || old.Message != now.Message {
		c.tell(ctx, b, now)
	}
	return nil
}

func orNull(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// tell makes an event of a change of the condition. That the IAM server is away
// is no news about each binding.
func (c *Controller) tell(ctx context.Context, b *binding, now condition) {
	if now.Reason == ReasonUnavailable {
		return
	}
	class := "Warning"
	if now.Status == "True" {
		class = "Normal"
	}
	at := c.cfg.Now().UTC()
	name := fmt.Sprintf("%s.%x", b.Metadata.Name[:min(len(b.Metadata.Name), 200)], at.UnixNano())
	event := map[string]any{
		"apiVersion": "events.k8s.io/v1", "kind": "Event",
		"metadata":  map[string]any{"namespace": b.Metadata.Namespace, "name": name},
		"eventTime": at.Format(microTime), "type": class, "reason": now.Reason, "action": "Reconcile", "note": now.Message,
		"reportingController": "iam.tabard.dev/controller", "reportingInstance": c.cfg.Holder,
		"regarding": map[string]any{
			"apiVersion": apiVersion, "kind": kind, "namespace": b.Metadata.Namespace, "name": b.Metadata.Name,
			"uid": b.Metadata.UID, "resourceVersion": b.Metadata.ResourceVersion,
		},
	}
	path := "/apis/events.k8s.io/v1/namespaces/" + b.Metadata.Namespace + "/events"
	if err := c.kube.Do(ctx, http.MethodPost, path, event, nil); err != nil && kube.Code(err) != http.StatusForbidden {
		// A namespace that is being deleted takes no events.
		c.cfg.Log.Warn("an event is not recorded", "binding", b.key(), "error", err)
	}
}
