package binding

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"time"

	"tabard.dev/tabard/internal/kube"
)

// election lets one of several replicas lead, by a Lease of the cluster. A
// replica that leads stops before another may begin: it gives up after two
// thirds of the lease's time without having renewed it.
type election struct {
	kube            *kube.Client
	namespace, name string
	holder          string        // this replica
	life            time.Duration // of the lease after its last renewal
	now             func() time.Time
	log             *slog.Logger
	waiting         func() // called when another replica leads

	// Others' clocks may be wrong, so that a lease's age counts from when this
	// replica first saw it as it is.
	seen   leaseSpec
	seenAt time.Time
}

type leaseObject struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Metadata   leaseMeta `json:"metadata"`
	Spec       leaseSpec `json:"spec"`
}

type leaseMeta struct {
	Namespace       string `json:"namespace"`
	Name            string `json:"name"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

type leaseSpec struct {
	Holder      string `json:"holderIdentity"`
	Seconds     int    `json:"leaseDurationSeconds"`
	Acquired    string `json:"acquireTime,omitempty"`
	Renewed     string `json:"renewTime,omitempty"`
	Transitions int    `json:"leaseTransitions"`
}

// microTime is Kubernetes' form of times in leases and events.
const microTime = "2006-01-02T15:04:05.000000Z07:00"

func (e *election) path() string {
	return "/apis/coordination.k8s.io/v1/namespaces/" + url.PathEscape(e.namespace) + "/leases"
}

// Run waits for the lease and has lead run while it is held, again and again
// until the context ends. The context of lead ends when the lease is lost, or
// with ctx; lead returns soon after.
func (e *election) Run(ctx context.Context, lead func(ctx context.Context)) {
	said := ""
	for ctx.Err() == nil {
		held, err := e.take(ctx)
		if err != nil && ctx.Err() == nil {
			if cause := err.Error(); cause != said {
				said = cause
				e.log.Warn("the lease of the controllers cannot be had", "error", err)
			}
		}
		if held {
			said = ""
			e.log.Info("leading", "lease", e.namespace+"/"+e.name, "holder", e.holder)
			e.lead(ctx, lead)
			continue
		}
		if err == nil {
			e.waiting()
		}
		pause(ctx, jitter(e.life/6))
	}
}

func (e *election) lead(ctx context.Context, lead func(context.Context)) {
	leading, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	go func() { // ends before this function does
		defer close(done)
		lead(leading)
	}()
	renewed := e.now()
	for leading.Err() == nil {
		pause(leading, e.life/6)
		if ctx.Err() != nil {
			break
		}
		held, err := e.take(ctx)
		if held {
			renewed = e.now()
			continue
		}
		if err == nil {
			e.log.Warn("another controller has taken the lease", "holder", e.seen.Holder)
			stop()
		} else if e.now().Sub(renewed) > e.life*2/3-e.life/6 {
			e.log.Warn("the lease cannot be renewed; others may lead", "error", err)
			stop()
		}
	}
	stop()
	<-done
	if ctx.Err() != nil {
		e.release(context.WithoutCancel(ctx))
	}
}

// take gets or renews the lease. It reports whether this replica holds it.
func (e *election) take(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, e.life/6)
	defer cancel()
	now := e.now()
	stamp := now.UTC().Format(microTime)
	var l leaseObject
	err := e.kube.Do(ctx, http.MethodGet, e.path()+"/"+url.PathEscape(e.name), nil, &l)
	if kube.Code(err) == http.StatusNotFound {
		l = e.object("", leaseSpec{Holder: e.holder, Seconds: e.seconds(), Acquired: stamp, Renewed: stamp})
		err = e.kube.Do(ctx, http.MethodPost, e.path(), l, nil)
		if kube.Code(err) == http.StatusConflict {
			return false, nil
		}
		return err == nil, err
	}
	if err != nil {
		return false, err
	}
	if l.Spec != e.seen {
		e.seen, e.seenAt = l.Spec, now
	}
	next := leaseSpec{Holder: e.holder, Seconds: e.seconds(), Acquired: l.Spec.Acquired, Renewed: stamp, Transitions: l.Spec.Transitions}
	if l.Spec.Holder != e.holder {
		if l.Spec.Holder != "" && now.Sub(e.seenAt) < time.Duration(l.Spec.Seconds)*time.Second {
			return false, nil
		}
		next.Acquired, next.Transitions = stamp, l.Spec.Transitions+1
	}
	err = e.kube.Do(ctx, http.MethodPut, e.path()+"/"+url.PathEscape(e.name), e.object(l.Metadata.ResourceVersion, next), nil)
	if kube.Code(err) == http.StatusConflict {
		return false, fmt.Errorf("the lease changed meanwhile: %w", err) // whether it is lost, the next look tells
	}
	return err == nil, err
}

// release lets another replica begin at once.
func (e *election) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var l leaseObject
	if err := e.kube.Do(ctx, http.MethodGet, e.path()+"/"+url.PathEscape(e.name), nil, &l); err != nil || l.Spec.Holder != e.holder {
		return
	}
	spec := l.Spec
	spec.Holder, spec.Seconds, spec.Renewed = "", 1, e.now().UTC().Format(microTime)
	if err := e.kube.Do(ctx, http.MethodPut, e.path()+"/"+url.PathEscape(e.name), e.object(l.Metadata.ResourceVersion, spec), nil); err != nil {
		e.log.Warn("the lease was not given back; the next controller leads when it has run out", "error", err)
	}
}

func (e *election) object(version string, s leaseSpec) leaseObject {
	return leaseObject{"coordination.k8s.io/v1", "Lease", leaseMeta{e.namespace, e.name, version}, s}
}

func (e *election) seconds() int { return max(1, int(e.life/time.Second)) }
