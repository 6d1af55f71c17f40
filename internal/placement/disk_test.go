package placement_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

const here = "us-south-1"

// site is a directory with hosts and one image, with a disk of 10 GiB and a file
// of 4 GiB.
type site struct {
	t *testing.T
	d *directory.Directory
	*placement.Scheduler
	image vpc.Image
	count int
}

func newSite(t *testing.T, hosts ...string) *site {
	t.Helper()
	e := apitest.New(t)
	s := &site{
		t: t, d: e.Config.Directory,
		Scheduler: &placement.Scheduler{Directory: e.Config.Directory, Now: e.Config.Now, Log: slog.New(slog.DiscardHandler)},
		image:     vpc.Image{ID: "r006-image", Name: "debian", SHA256: strings.Repeat("0", 64), Disk: 10 << 30, Bytes: 4 << 30},
	}
	s.update(func(tx *directory.Tx) {
		s.d.Images.Put(tx, &s.image)
		for _, id := range hosts {
			s.d.Hosts.Put(tx, &cluster.Host{ID: id, Name: id, Zone: here})
		}
	})
	return s
}

func (s *site) update(f func(tx *directory.Tx)) {
	s.t.Helper()
	if err := s.d.Update(context.Background(), "", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		s.t.Fatal(err)
	}
}

// place puts an instance of the image on a host.
func (s *site) place(hostID string) {
	s.t.Helper()
	s.count++
	s.update(func(tx *directory.Tx) {
		s.d.Instances.Put(tx, &vpc.Instance{
			ID: fmt.Sprintf("0717_%d", s.count), Name: fmt.Sprintf("vm-%d", s.count), ImageID: s.image.ID,
			Profile: vpc.InstanceProfiles[0].Name, HostID: hostID,
		})
	})
}

func (s *site) choose() (string, string) {
	return s.Choose(here, vpc.InstanceProfiles[0], s.image)
}

func offers(diskMiB int) placement.Capacity {
	return placement.Capacity{Drivers: []string{placement.DriverQEMU}, DiskMiB: diskMiB}
}

func TestAHostGetsNoMoreDisksThanItHasRoomFor(t *testing.T) {
	s := newSite(t, "h1")
	defer s.Arrive("h1", offers(24<<10))() // two disks and one file
	for range 2 {
		id, reason := s.choose()
		if id != "h1" {
			t.Fatalf("chose %q: %s", id, reason)
		}
		s.place(id)
	}
	defer s.Arrive("h1", offers(34<<10-1))()
	if id, reason := s.choose(); id != "" || !strings.Contains(reason, "disk") {
		t.Errorf("chose %q: %s", id, reason)
	}
}

func TestTheHostWithMoreOfItsDiskLeftIsChosen(t *testing.T) {
	s := newSite(t, "h1", "h2")
	defer s.Arrive("h1", offers(50<<10))()
	defer s.Arrive("h2", offers(500<<10))()
	s.place("h1")
	s.place("h2")
	s.place("h2")
	if id, reason := s.choose(); id != "h2" {
		t.Errorf("chose %q: %s", id, reason)
	}
}

func TestAHostThatDoesNotSayItsDiskIsNotLimitedByIt(t *testing.T) {
	s := newSite(t, "h1")
	defer s.Arrive("h1", offers(0))()
	s.place("h1")
	if id, reason := s.choose(); id != "h1" {
		t.Errorf("chose %q: %s", id, reason)
	}
}
