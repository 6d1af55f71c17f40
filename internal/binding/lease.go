package binding

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"tabard.dev/tabard/internal/kube"
)

// election lets one of several replicas lead, by a Lease of the cluster. A
// replica that leads stops before another may begin: it gives up when two thirds
// of the lease's time have passed since it last began to renew it with success.
// A replica that was stopped as a whole meanwhile, such as by a machine that
// paused, learns from holds that its time is over before it learns it from the
// end of its context.
type election struct {
	kube            *kube.Client
	namespace, name string
	holder          string        // this replica
	life            time.Duration // of the lease after its last renewal
	now             func() time.Time
	log             *slog.Logger
	waiting         func() // called when another replica leads

	until atomic.Pointer[time.Time] // when this replica's time to lead ends; nil while it does not

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
		began := e.now()
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
			e.lead(ctx, began, lead)
			continue
		}
		if err == nil {
			e.waiting()
		}
		pause(ctx, jitter(e.life/6))
	}
}

// lead has lead run until the lease is lost, which was had by what began at a
// time.
func (e *election) lead(ctx context.Context, began time.Time, lead func(context.Context)) {
	leading, stop := context.WithCancel(ctx)
	defer stop()
	end := time.AfterFunc(e.hold(began), stop)
	defer end.Stop()
	defer e.until.Store(nil)
	done := make(chan struct{})
	go func() { // ends before this function does
		defer close(done)
		lead(leading)
	}()
	var last error
	for {
		pause(leading, e.life/6)
		if leading.Err() != nil {
			break
		}
		began := e.now()
		held, err := e.take(leading)
		switch {
		case leading.Err() != nil: // too late
		case held:
			end.Reset(e.hold(began))
			err = nil
		case err == nil:
			e.log.Warn("another controller has taken the lease", "holder", e.seen.Holder)
			stop()
		}
		last = err
	}
	if ctx.Err() == nil && last != nil {
		e.log.Warn("the lease cannot be renewed; others may lead", "error", last)
	}
	<-done
	if ctx.Err() != nil {
		e.release(context.WithoutCancel(ctx))
	}
}

// hold takes note of a renewal that began at a time, and returns how much longer
// this replica may lead by it.
func (e *election) hold(began time.Time) time.Duration {
	until := began.Add(e.life * 2 / 3)
	e.until.Store(&until)
	return until.Sub(e.now())
}

// holds reports whether this replica may still lead.
func (e *election) holds() bool {
	until := e.until.Load()
	return until != nil && e.now().Before(*until)
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
