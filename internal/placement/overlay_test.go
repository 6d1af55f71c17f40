package placement

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/vpc"
)

// spread is an installation with hosts a, b and c, and a VPC.
type spread struct {
	*directory.Directory
	t *testing.T
}

func newSpread(t *testing.T) *spread {
	t.Helper()
	st, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	d, err := directory.Open(t.Context(), directory.Config{Store: st, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	s := &spread{d, t}
	s.change(func(tx *directory.Tx) {
		for n, id := range []string{"a", "b", "c"} {
			d.Hosts.Put(tx, &cluster.Host{ID: id, Name: id, Address: netip.AddrFrom4([4]byte{192, 0, 2, byte(n + 1)})})
		}
		d.VPCs.Put(tx, &vpc.VPC{ID: "v", AccountID: "x", Name: "v", VNI: FreeVNI(d)})
	})
	return s
}

func (s *spread) change(f func(tx *directory.Tx)) {
	s.t.Helper()
	if err := s.Update(s.t.Context(), "", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.t.Fatal(err)
	}
}

func (s *spread) instance(id, host string, last byte, f func(*vpc.Instance)) *vpc.Instance {
	s.t.Helper()
	i := &vpc.Instance{
		ID: id, AccountID: "x", Name: id, VPCID: "v", HostID: host, Status: vpc.Running,
		Interfaces: []vpc.Interface{{Address: netip.AddrFrom4([4]byte{10, 0, 0, last})}},
	}
	if f != nil {
		f(i)
	}
	s.change(func(tx *directory.Tx) { s.Instances.Put(tx, i) })
	return i
}

func (s *spread) peersOf(i *vpc.Instance) []string {
	var out []string
	for _, p := range Of(s.Directory, i).Peers {
		out = append(out, fmt.Sprint(p.Address, " at ", p.Host))
	}
	return out
}

func TestPeersAreTheInstancesOfTheVPCOnHostsThatAreReached(t *testing.T) {
	s := newSpread(t)
	own := s.instance("own", "a", 4, nil)
	s.instance("beside", "a", 5, nil)
	s.instance("two-cards", "c", 9, func(i *vpc.Instance) {
		i.Interfaces = append(i.Interfaces, vpc.Interface{Address: netip.MustParseAddr("10.0.0.7")})
	})
	s.instance("stopped", "b", 6, func(i *vpc.Instance) { i.Status = vpc.Stopped })
	s.instance("deleting", "b", 10, func(i *vpc.Instance) { i.Status = vpc.Deleting })
	s.instance("adopted", "b", 11, func(i *vpc.Instance) { i.External = &vpc.External{Device: "vnet0"} })
	s.instance("waiting", "", 12, func(i *vpc.Instance) { i.Status = vpc.Pending })
	s.instance("local", cluster.LocalHost, 13, nil)
	s.instance("elsewhere", "b", 14, func(i *vpc.Instance) { i.VPCID = "w" })
	want := []string{"10.0.0.6 at 192.0.2.2", "10.0.0.7 at 192.0.2.3", "10.0.0.9 at 192.0.2.3"}
	if got := s.peersOf(own); !slices.Equal(got, want) {
		t.Errorf("peers %q, want %q", got, want)
	}

	// A host that is revoked, or says that it is not reached, is nobody's peer.
	s.change(func(tx *directory.Tx) {
		c, _ := s.Hosts.Get("c")
		revoked := *c
		revoked.Revoked = true
		s.Hosts.Put(tx, &revoked)
	})
	if got := s.peersOf(own); !slices.Equal(got, want[:1]) {
		t.Errorf("peers %q, want %q", got, want[:1])
	}
	if err := SetAddress(t.Context(), s.Directory, "b", netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	if got := s.peersOf(own); len(got) > 0 {
		t.Errorf("peers %q, want none", got)
	}
	if err := SetAddress(t.Context(), s.Directory, "nobody", netip.Addr{}); !fault.Is(err, fault.NotFound) {
		t.Errorf("the address of a host that does not exist: %v", err)
	}
}

func TestAHostThatNoOtherReachesHearsOfNoPeers(t *testing.T) {
	s := newSpread(t)
	s.instance("far", "b", 5, nil)
	here := s.instance("here", cluster.LocalHost, 4, nil)
	if got := s.peersOf(here); len(got) > 0 {
		t.Errorf("peers %q, want none", got)
	}
	// Nor do two installations on one machine.
	own := s.instance("own", "a", 6, nil)
	if err := SetAddress(t.Context(), s.Directory, "b", netip.MustParseAddr("192.0.2.1")); err != nil {
		t.Fatal(err)
	}
	if got := s.peersOf(own); len(got) > 0 {
		t.Errorf("peers %q, want none", got)
	}
}

func TestVPCsMadeBeforeGetANumberOfTheirOwn(t *testing.T) {
	s := newSpread(t)
	first, _ := s.VPCs.Get("v")
	for n := range 20 {
		s.change(func(tx *directory.Tx) {
			s.VPCs.Put(tx, &vpc.VPC{ID: fmt.Sprint("old", n), AccountID: "x", Name: fmt.Sprint("old", n)})
		})
	}
	scheduler := &Scheduler{Directory: s.Directory, Now: time.Now, Log: slog.New(slog.DiscardHandler)}
	if !scheduler.number(t.Context()) {
		t.Fatal("not all have a number")
	}
	seen := map[uint32]string{}
	for _, v := range s.VPCs.All() {
		if v.VNI < firstVNI || v.VNI > vpc.MaxVNI || seen[v.VNI] != "" {
			t.Errorf("VPC %s has the number %d, as has %q", v.ID, v.VNI, seen[v.VNI])
		}
		seen[v.VNI] = v.ID
	}
	if again, _ := s.VPCs.Get("v"); again.VNI != first.VNI || again.Revision != first.Revision {
		t.Errorf("the number %d became %d", first.VNI, again.VNI)
	}
	if !scheduler.number(t.Context()) {
		t.Error("there was still something to do")
	}
}

func TestTwoVPCsNeverHaveOneNumber(t *testing.T) {
	s := newSpread(t)
	v, _ := s.VPCs.Get("v")
	err := s.Update(t.Context(), "", func(tx *directory.Tx) error {
		s.VPCs.Put(tx, &vpc.VPC{ID: "w", AccountID: "y", Name: "v", VNI: v.VNI})
		return nil
	})
	if !fault.Is(err, fault.Conflict) {
		t.Errorf("a second VPC with the number: %v", err)
	}
}
