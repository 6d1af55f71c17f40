package adopt

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/host/namespace"
)

func TestDevicesThatAMachineMayBeAtAreListedWithWhatIsKnownOfIt(t *testing.T) {
	r := newRig(t)
	a := r.vm("vnet0", r.bridge("virbr0", "10.0.0.1/24"), "52:54:00:00:00:05", "10.0.0.5")
	r.vm("vnet1", "virbr0", "52:54:00:00:00:06", "10.0.0.6").unplug()
	r.vm("up0", "", "52:54:00:00:00:07", "192.0.2.7")
	r.must(r.ns, func(n *netlink.Handle) error {
		up, err := n.LinkByName("up0")
		if err != nil {
			return err
		}
		if err := namespace.SetAddress(n, up, netip.MustParsePrefix("192.0.2.1/24"), netlink.SCOPE_UNIVERSE); err != nil {
			return err
		}
		return namespace.SetRoute(n, up, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.MustParseAddr("192.0.2.7"))
	})
	a.adopt("0717_a")
	a.pingsItsGateway()
	want := []link.Machine{{Name: "vnet0", Device: "vnet0", MAC: "52:54:00:00:00:05", Address: "10.0.0.5", Bridge: "virbr0", State: "up"}}
	got, err := Devices(r.name)()
	if err != nil || !slices.EqualFunc(got, want, func(a, b link.Machine) bool {
		return a.Name == b.Name && a.Device == b.Device && a.MAC == b.MAC && a.Address == b.Address && a.Bridge == b.Bridge && a.State == b.State
	}) {
		t.Errorf("listed %+v, %v", got, err)
	}
}
