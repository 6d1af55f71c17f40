package api

import (
	"slices"
	"strings"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/usage"
)

// permits are what policies allowed in one request. However many resources a
// request is about, it counts once for each policy, and once for each action
// that the policy allowed in a service.
type permits struct {
	few  []permit
	more map[permit]bool // instead of few when there are many
}

type permit struct{ policy, service, action string }

// manyPermits is from how many on a look-up is quicker than a walk.
const manyPermits = 16

func (p *permits) count(t *usage.Tracker, q access.Request, by *access.Policy) {
	again := p.add(permit{policy: by.ID, service: q.Resource[access.ServiceName], action: q.Action})
	way := usage.Once
	if again {
		way = usage.Again
	}
	t.Use(q, by, way)
	if !again && !p.add(permit{policy: by.ID}) {
		t.Permit(by.ID, q.Time)
	}
}

// countEmpty counts a list that had nothing to decide on. The policies that
// would have shown something are in use no less than when there is something.
func (c *Call) countEmpty(action string) {
	service, _, _ := strings.Cut(action, ".")
	q := access.Request{Subject: c.Caller.IAMID, AccountID: c.Account(), Action: action, Resource: c.InAccount(service), Time: c.Now()}
	for _, p := range access.Possible(c.Directory, q) {
		c.Usage.Use(q, p, usage.Empty)
	}
}

// add notes a permit and reports whether it was there already.
func (p *permits) add(x permit) bool {
	if p.more == nil {
		if slices.Contains(p.few, x) {
			return true
		}
		if p.few == nil {
			p.few = make([]permit, 0, 4)
		}
		if len(p.few) < manyPermits {
			p.few = append(p.few, x)
			return false
		}
		p.more = make(map[permit]bool, 2*manyPermits)
		for _, old := range p.few {
			p.more[old] = true
		}
	}
	there := p.more[x]
	p.more[x] = true
	return there
}
