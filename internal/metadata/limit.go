package metadata

import (
	"cmp"
	"sync"
	"time"
)

// Limit bounds how often one instance may ask: PerSecond times a second in the
// long run, Burst times at once. Zero fields stand for the default; an infinite
// PerSecond for no bound.
type Limit struct {
	PerSecond float64
	Burst     int
}

// Limits are an instance's budgets. They are separate so that a program that
// reads metadata in a loop keeps no other from its tokens. The reference knows
// none (section 1.10); these defaults are far above what SDKs do, which ask once
// in minutes, and keep one instance from using up its host.
type Limits struct {
	IdentityTokens Limit // a signature and a durable record each; 50/s, 200 at once
	IAMTokens      Limit // IAM tokens and certificates: the server's work too; 20/s, 100 at once
	Reads          Limit // everything else; 200/s, 1000 at once

	// Refused bounds the requests for tokens and certificates that fail, for
	// whatever reason. Each of them has a durable record like those that do not,
	// but anybody in the guest can make one: 5/s, 50 at once. One more is
	// answered with 429 and has none. It counts against no request that
	// succeeds, but for IAM tokens: those are not asked for while it is used up,
	// because the server records whatever it refuses.
	Refused Limit
}

// budget is an index of Limits.
type budget int

const (
	identityBudget budget = iota
	iamBudget
	readBudget
	refusedBudget
	budgets
)

// limiter holds instances to their limits by the generic cell rate algorithm
// (ITU-T I.371): per budget it knows one time, that at which the budget is whole
// again.
type limiter struct {
	every [budgets]time.Duration // one request
	burst [budgets]time.Duration // as many as may come at once

	mu        sync.Mutex
	instances map[string]*[budgets]time.Time
	sweep     int // number of instances at which those that have asked nothing lately are forgotten
}

// minSweep instances are kept without looking for idle ones.
const minSweep = 1024

func newLimiter(l Limits) *limiter {
	x := &limiter{instances: map[string]*[budgets]time.Time{}, sweep: minSweep}
	for b, pair := range [budgets][2]Limit{
		{l.IdentityTokens, {50, 200}}, {l.IAMTokens, {20, 100}}, {l.Reads, {200, 1000}}, {l.Refused, {5, 50}},
	} {
		set, preset := pair[0], pair[1]
		x.every[b] = time.Duration(float64(time.Second) / cmp.Or(set.PerSecond, preset.PerSecond))
		x.burst[b] = x.every[b] * time.Duration(cmp.Or(set.Burst, preset.Burst))
	}
	return x
}

// take uses up one request of a budget, or returns how long to wait for it.
func (l *limiter) take(instance string, b budget, now time.Time) time.Duration {
	return l.ask(instance, b, now, true)
}

// left returns how long to wait until take would not, and uses up nothing.
func (l *limiter) left(instance string, b budget, now time.Time) time.Duration {
	return l.ask(instance, b, now, false)
}

func (l *limiter) ask(instance string, b budget, now time.Time, use bool) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	whole := l.instances[instance]
	if whole == nil {
		l.forget(now)
		whole = &[budgets]time.Time{}
		l.instances[instance] = whole
	}
	at := whole[b]
	if at.Before(now) {
		at = now
	}
	if latest := now.Add(l.burst[b]); at.After(latest) {
		at = latest // the clock was set back
	}
	next := at.Add(l.every[b])
	wait := next.Sub(now) - l.burst[b]
	switch {
	case wait > 0:
		whole[b] = at
	case use:
		whole[b] = next
	}
	return max(0, wait)
}

// forget drops the instances whose budgets are whole, so that those that exist
// no more take no memory.
func (l *limiter) forget(now time.Time) {
	if len(l.instances) < l.sweep {
		return
	}
	for id, whole := range l.instances {
		idle := true
		for _, at := range whole {
			idle = idle && !at.After(now)
		}
		if idle {
			delete(l.instances, id)
		}
	}
	l.sweep = max(minSweep, 2*len(l.instances))
}
