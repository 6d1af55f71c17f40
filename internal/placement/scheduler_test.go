package placement_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type stack struct {
	*apitest.Env
	d         *directory.Directory
	scheduler *placement.Scheduler
}

func start(t *testing.T) *stack {
	t.Helper()
	e := apitest.New(t)
	return &stack{e, e.Config.Directory, &placement.Scheduler{Directory: e.Config.Directory, Now: time.Now, Log: e.Config.Log}}
}

func (s *stack) update(f func(tx *directory.Tx)) {
	s.T.Helper()
	if err := s.d.Update(context.Background(), "", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.T.Fatal(err)
	}
}

func (s *stack) host(id, zone string) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		s.d.Hosts.Put(tx, &cluster.Host{ID: id, Name: id, Zone: zone, JWKS: []byte(`{"keys":[]}`)})
	})
}

func (s *stack) revoke(id string, revoked bool) {
	s.T.Helper()
	s.update(func(tx *directory.Tx) {
		h, _ := s.d.Hosts.Get(id)
		next := *h
		next.Revoked = revoked
		s.d.Hosts.Put(tx, &next)
	})
}

func (s *stack) instance(hostID, status, zone, profile, imageID string) string {
	s.T.Helper()
	i := &vpc.Instance{
		ID: "0717_" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: uuid.NewString(), Zone: zone, HostID: hostID, Status: status, Profile: profile, ImageID: imageID,
	}
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, i) })
	return i.ID
}

func (s *stack) image() vpc.Image {
	s.T.Helper()
	i := &vpc.Image{ID: "r006-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: uuid.NewString(), SHA256: strings.Repeat("a", 64)}
	s.update(func(tx *directory.Tx) { s.d.Images.Put(tx, i) })
	return *i
}

func (s *stack) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.scheduler.Run(ctx) }()
	s.T.Cleanup(func() { cancel(); <-done })
}

func (s *stack) eventually(what string, f func() bool) {
	s.T.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if f() {
			return
		}
	}
	s.T.Fatal("it does not come: " + what)
}

func (s *stack) is(id, hostID, status string) func() bool {
	return func() bool {
		i, ok := s.d.Instances.Get(id)
		return ok && i.HostID == hostID && i.Status == status
	}
}

func profile(name string) vpc.InstanceProfile {
	p, ok := vpc.ProfileNamed(name)
	if !ok {
		panic(name)
	}
	return p
}

const zone = "us-south-1"

var stock = vpc.StockImages(vpc.Regions[0])[0]

func TestAHostIsChosenByZoneDriverAndRoom(t *testing.T) {
	s := start(t)
	disk := s.image()
	small := profile("nxf-1x1")
	want := func(why, zone string, hw vpc.InstanceProfile, image vpc.Image, id, reason string) {
		t.Helper()
		got, because := s.scheduler.Choose(zone, hw, image)
		if got != id || !strings.Contains(because, reason) || (because == "") != (id != "") {
			t.Errorf("%s: %q, %q", why, got, because)
		}
	}
	want("without hosts", zone, small, stock, "", "No host is connected")
	s.host("a", zone)
	want("with a host that is away", zone, small, stock, "", "No host is connected")
	leave := s.scheduler.Arrive("a", placement.Capacity{Drivers: []string{placement.DriverNetns}, MemoryMiB: 4096})
	want("with a host", zone, small, stock, "a", "")
	want("in another zone", "us-south-2", small, stock, "", "No host is connected in zone us-south-2")
	want("with an image that it cannot run", zone, small, disk, "", "can run the image")
	s.host("b", zone)
	s.scheduler.Arrive("b", placement.Capacity{Drivers: []string{placement.DriverQEMU}, MemoryMiB: 4096})
	want("with a host that can", zone, small, disk, "b", "")
	want("with one that is too large", zone, profile("bx2-2x8"), disk, "", "has room for an instance of profile bx2-2x8")
	s.instance("b", vpc.Running, zone, "nxf-1x2", disk.ID)
	want("with half of the room left", zone, profile("nxf-1x2"), disk, "b", "")
	s.instance("b", vpc.Stopped, zone, "nxf-1x1", disk.ID)
	want("with a stopped one that may start again", zone, profile("nxf-1x2"), disk, "", "has room")
	s.host("c", "")
	s.scheduler.Arrive("c", placement.Capacity{Drivers: []string{placement.DriverQEMU}})
	want("with a host of all zones that counts nothing", zone, profile("bx2-8x32"), disk, "c", "")
	want("in a zone without its own", "us-south-3", small, disk, "c", "")
	want("with a host of the zone beside one of all", zone, small, disk, "b", "")
	s.revoke("b", true)
	want("once that one is revoked", zone, small, disk, "c", "")
	leave()
	want("once it has gone", zone, small, stock, "", "can run the image")
}

func TestAHostThatArrivesGetsWhatWaits(t *testing.T) {
	s := start(t)
	s.host("a", zone)
	waits := s.instance("", vpc.Pending, zone, "bx2-2x8", stock.ID)
	elsewhere := s.instance("", vpc.Starting, "us-south-2", "bx2-2x8", stock.ID)
	s.run()
	s.eventually("the reason", func() bool {
		i, _ := s.d.Instances.Get(waits)
		return strings.Contains(i.StatusReason, "No host is connected")
	})
	revision := func() int64 { i, _ := s.d.Instances.Get(waits); return i.Revision }
	before := revision()
	s.host("b", "us-south-3")
	s.scheduler.Arrive("b", placement.Capacity{Drivers: []string{placement.DriverNetns}})
	time.Sleep(20 * time.Millisecond)
	if revision() != before {
		t.Error("an instance that is as it was is written again")
	}
	s.scheduler.Arrive("a", placement.Capacity{Drivers: []string{placement.DriverNetns}})
	s.eventually("the host", s.is(waits, "a", vpc.Pending))
	if i, _ := s.d.Instances.Get(waits); i.StatusReason != "" {
		t.Errorf("reason %q", i.StatusReason)
	}
	if !s.is(elsewhere, "", vpc.Starting)() {
		t.Error("an instance has left its zone")
	}
}

func TestInstancesWithoutAHostEndWithoutOne(t *testing.T) {
	s := start(t)
	s.host("a", zone)
	s.host("away", zone)
	s.run()
	deleting, stopping := s.instance("", vpc.Deleting, zone, "bx2-2x8", stock.ID), s.instance("", vpc.Stopping, zone, "bx2-2x8", stock.ID)
	onHost := s.instance("away", vpc.Deleting, zone, "bx2-2x8", stock.ID)
	s.eventually("the end", func() bool { _, ok := s.d.Instances.Get(deleting); return !ok })
	s.eventually("the stop", s.is(stopping, "", vpc.Stopped))
	if !s.is(onHost, "away", vpc.Deleting)() {
		t.Error("an instance on a host that is away is forgotten, and its machine runs on")
	}
}

func TestInstancesOfARevokedHostHaveFailed(t *testing.T) {
	s := start(t)
	s.host("a", zone)
	s.run()
	running, stopped, starting := s.instance("a", vpc.Running, zone, "bx2-2x8", stock.ID), s.instance("a", vpc.Stopped, zone, "bx2-2x8", stock.ID), s.instance("a", vpc.Starting, zone, "bx2-2x8", stock.ID)
	deleting := s.instance("a", vpc.Deleting, zone, "bx2-2x8", stock.ID)
	s.revoke("a", true)
	s.eventually("the failure", s.is(running, "a", vpc.Failed))
	s.eventually("the failure of what starts", s.is(starting, "a", vpc.Failed))
	s.eventually("the end", func() bool { _, ok := s.d.Instances.Get(deleting); return !ok })
	if !s.is(stopped, "a", vpc.Stopped)() {
		t.Error("a stopped instance has changed")
	}
	s.update(func(tx *directory.Tx) {
		i, _ := s.d.Instances.Get(stopped)
		next := i.Clone()
		next.Status = vpc.Starting
		s.d.Instances.Put(tx, next)
	})
	s.eventually("the failure of what is started there", s.is(stopped, "a", vpc.Failed))
}

func TestTheChoiceIsThatOfANaiveReading(t *testing.T) {
	s := start(t)
	disk := s.image()
	r := rand.New(rand.NewPCG(3, 4))
	zones := []string{"us-south-1", "us-south-2", ""}
	profiles := []string{"nxf-1x1", "nxf-1x2", "bx2-2x8", "bx2-4x16"}
	type known struct {
		id, zone  string
		here      bool
		revoked   bool
		c         placement.Capacity
		instances []struct {
			memory int
			disk   bool
		}
	}
	var all []*known
	for n := range 12 {
		k := &known{id: fmt.Sprintf("h%02d", n), zone: zones[r.IntN(3)], here: r.IntN(4) > 0, revoked: r.IntN(6) == 0}
		for _, d := range []string{placement.DriverQEMU, placement.DriverNetns} {
			if r.IntN(3) > 0 {
				k.c.Drivers = append(k.c.Drivers, d)
			}
		}
		k.c.MemoryMiB = []int{0, 4096, 16384, 65536}[r.IntN(4)]
		s.host(k.id, k.zone)
		if k.revoked {
			s.revoke(k.id, true)
		}
		if k.here {
			s.scheduler.Arrive(k.id, k.c)
		}
		all = append(all, k)
	}
	for range 200 {
		p, zone, image := profile(profiles[r.IntN(4)]), zones[r.IntN(2)], stock
		if r.IntN(2) == 0 {
			image = disk
		}
		var fit []*known
		used := func(k *known) (sum int) {
			for _, i := range k.instances {
				if i.disk {
					sum += i.memory
				}
			}
			return sum
		}
		load := func(k *known) float64 {
			l := float64(len(k.instances)) / 1e6
			if image.ID == disk.ID && k.c.MemoryMiB > 0 {
				l += float64(used(k)) / float64(k.c.MemoryMiB)
			}
			return l
		}
		for _, k := range all {
			driver := placement.DriverNetns
			if image.ID == disk.ID {
				driver = placement.DriverQEMU
			}
			room := image.ID != disk.ID || k.c.MemoryMiB == 0 || used(k)+p.MemoryGiB<<10 <= k.c.MemoryMiB
			if k.here && !k.revoked && (k.zone == "" || k.zone == zone) && slices.Contains(k.c.Drivers, driver) && room {
				fit = append(fit, k)
			}
		}
		want := ""
		if len(fit) > 0 {
			slices.SortFunc(fit, func(a, b *known) int {
				own := func(k *known) int { return cmp.Compare(len(zone), len(k.zone)) }
				return cmp.Or(own(a)-own(b), cmp.Compare(load(a), load(b)), cmp.Compare(a.id, b.id))
			})
			want = fit[0].id
		}
		got, reason := s.scheduler.Choose(zone, p, image)
		if got != want {
			t.Fatalf("%s of %s in %s: %q (%s), want %q", image.Name, p.Name, zone, got, reason, want)
		}
		if got != "" {
			fit[0].instances = append(fit[0].instances, struct {
				memory int
				disk   bool
			}{p.MemoryGiB << 10, image.ID == disk.ID})
			s.instance(got, vpc.Running, zone, p.Name, image.ID)
		}
	}
}

func TestAHostIsThereUntilItsNewestConnectionEnds(t *testing.T) {
	s := start(t)
	older := s.scheduler.Arrive("a", placement.Capacity{Version: "1"})
	newer := s.scheduler.Arrive("a", placement.Capacity{Version: "2"})
	older()
	if c, _, here := s.scheduler.Here("a"); !here || c.Version != "2" {
		t.Errorf("%+v, there: %v", c, here)
	}
	newer()
	if _, since, here := s.scheduler.Here("a"); here || since.IsZero() {
		t.Errorf("there: %v, since %v", here, since)
	}
	if _, since, here := s.scheduler.Here("b"); here || !since.IsZero() {
		t.Errorf("there: %v, since %v", here, since)
	}
}

func TestPlacementsThatSayTheSameAreTheSame(t *testing.T) {
	s := start(t)
	v := &vpc.VPC{ID: "v", AccountID: s.Owner.AccountID, Name: "v", SecurityGroup: vpc.Ref{ID: "g", Name: "g"}}
	s.update(func(tx *directory.Tx) { s.d.VPCs.Put(tx, v) }) // made before groups were kept
	i := &vpc.Instance{
		ID: "0717_a", AccountID: s.Owner.AccountID, Name: "a", VPCID: "v", HostID: "h", Status: vpc.Running, ImageID: stock.ID,
		Interfaces: []vpc.Interface{{ID: "n", Address: netip.MustParseAddr("10.0.0.4")}},
	}
	s.update(func(tx *directory.Tx) { s.d.Instances.Put(tx, i) })
	read := func() *vpc.Placement { return placement.OnHost(s.d, "h")["0717_a"] }
	a := read()
	if len(a.SecurityGroups) != 1 || len(a.Members) == 0 {
		t.Fatalf("placement %+v", a)
	}
	if !placement.Same(a, read()) {
		t.Error("nothing has changed, and it is not the same")
	}
	// Another member of the group.
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, &vpc.Instance{
			ID: "0717_b", AccountID: s.Owner.AccountID, Name: "b", VPCID: "v", HostID: "h2", Status: vpc.Running,
			Interfaces: []vpc.Interface{{ID: "n", Address: netip.MustParseAddr("10.0.0.5")}},
		})
	})
	if placement.Same(a, read()) {
		t.Error("a group has another member, and it is the same")
	}
	a = read()
	s.update(func(tx *directory.Tx) {
		s.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: "f", AccountID: s.Owner.AccountID, Name: "f", InstanceID: "0717_a", Address: netip.MustParseAddr("198.51.100.1")})
	})
	if placement.Same(a, read()) {
		t.Error("there is a floating IP, and it is the same")
	}
	s.update(func(tx *directory.Tx) {
		numbered := *v
		numbered.VNI = 70000
		s.d.VPCs.Put(tx, &numbered)
	})
	for id, address := range map[string]string{"h": "192.0.2.1", "h2": ""} {
		s.host(id, "us-south-1")
		if address != "" {
			if err := placement.SetAddress(t.Context(), s.d, id, netip.MustParseAddr(address)); err != nil {
				t.Fatal(err)
			}
		}
	}
	a = read()
	if err := placement.SetAddress(t.Context(), s.d, "h2", netip.MustParseAddr("192.0.2.2")); err != nil {
		t.Fatal(err)
	}
	if b := read(); len(b.Peers) != 1 || placement.Same(a, b) {
		t.Errorf("an instance of the VPC is on another host, and it is the same: %+v", b.Peers)
	}
}

func TestEveryKindThatAPlacementShowsIsWatched(t *testing.T) {
	s := start(t)
	w := s.d.Watch(placement.Kinds...)
	defer w.Stop()
	id := func() string { return uuid.NewString() }
	for kind, put := range map[string]func(tx *directory.Tx){
		"instance": func(tx *directory.Tx) { s.d.Instances.Put(tx, &vpc.Instance{ID: id(), Name: id()}) },
		"VPC":      func(tx *directory.Tx) { s.d.VPCs.Put(tx, &vpc.VPC{ID: id(), Name: id()}) },
		"subnet":   func(tx *directory.Tx) { s.d.Subnets.Put(tx, &vpc.Subnet{ID: id(), Name: id()}) },
		"key":      func(tx *directory.Tx) { s.d.Keys.Put(tx, &vpc.Key{ID: id(), Name: id()}) },
		"floating IP": func(tx *directory.Tx) {
			s.d.FloatingIPs.Put(tx, &vpc.FloatingIP{ID: id(), Name: id(), Address: netip.MustParseAddr("198.51.100.9")})
		},
		"security group": func(tx *directory.Tx) { s.d.SecurityGroups.Put(tx, &vpc.SecurityGroup{ID: id(), Name: id()}) },
		"image":          func(tx *directory.Tx) { s.d.Images.Put(tx, &vpc.Image{ID: id(), Name: id()}) },
		"resource group": func(tx *directory.Tx) {
			for _, g := range s.d.ResourceGroupsByAccount.Get(s.Owner.AccountID) {
				next := *g
				next.Name = id()
				s.d.ResourceGroups.Put(tx, &next)
			}
		},
	} {
		select {
		case <-w.C:
		default:
		}
		s.update(put)
		select {
		case <-w.C:
		default:
			t.Errorf("a change of a %s is not noticed", kind)
		}
	}
}
