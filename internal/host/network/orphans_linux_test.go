package network

import (
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
)

// A tap goes with the process that holds it, and a process may be killed in the
// middle of removing a port.
func TestRulesWhoseDeviceIsGoneAreDiscarded(t *testing.T) {
	r, world := newWorldRig(t)
	a := r.start(floats(spec("0717_a", "vpc-1", "10.240.0.4", 4), floatingA))
	b := r.start(floats(spec("0717_b", "vpc-1", "10.240.0.5", 5), floatingB))
	half := r.start(spec("0717_c", "vpc-1", "10.240.0.6", 6))
	r.lose()
	r.inRouter("vpc-1", func() error {
		if err := setAlias(device(half.ID), ""); err != nil {
			return err
		}
		return namespace.Links(func(n *netlink.Handle) error { return namespace.Delete(n, device(a.ID)) })
	})
	r.open(uplinkConfig())
	again, err := r.attach(b.Machine, b.space, host.Handlers{Metadata: names(b.ID)})
	if err != nil {
		t.Fatal(err)
	}
	echo(t, b.space, "10.240.0.5:7")
	if err := r.n.Discard(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	rules := r.in(r.n.prefix()+tag("vpc-1", 8), "nft", "list", "ruleset")
	for _, i := range []*inst{a, half} {
		if strings.Contains(rules, device(i.ID)) {
			t.Errorf("rules of %s are left: %s", i.ID, rules)
		}
	}
	if strings.Contains(rules, floatingA) || !strings.Contains(rules, floatingB) {
		t.Errorf("floating addresses: %s", rules)
	}
	if state := r.hostState(); strings.Contains(state, floatingA) || !strings.Contains(state, floatingB) {
		t.Errorf("the host has %s", state)
	}
	again.reachesItsOwn()
	wantPeer(t, world, floatingB+":7", worldAddress)
}
