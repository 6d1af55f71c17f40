package placement

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/vpc"
)

// Capacity is what a host offers while it is there.
type Capacity struct {
	Drivers   []string // what runs instances on it: qemu, netns, local
	VCPUs     int
	MemoryMiB int // 0 means that memory is not counted
	DiskMiB   int // for the disks of machines; 0 means that it is not counted
	Version   string

	IdentityCA string // in PEM: what instances' identity certificates are checked with
}

// Drivers, by what they can run.
const (
	DriverQEMU  = "qemu"  // images with a disk
	DriverNetns = "netns" // stock images
	DriverLocal = "local" // stock images
)

// runs reports whether the host can run an image.
func (c Capacity) runs(image vpc.Image) bool {
	if image.SHA256 != "" {
		return slices.Contains(c.Drivers, DriverQEMU)
	}
	return slices.Contains(c.Drivers, DriverNetns) || slices.Contains(c.Drivers, DriverLocal)
}

// Scheduler knows which hosts are there, and chooses among them.
type Scheduler struct {
	Directory *directory.Directory
	Now       func() time.Time
	Log       *slog.Logger

	mu      sync.Mutex
	present map[string]*presence
	seen    map[string]time.Time // when a host that has gone was there last
	arrived chan struct{}
}

type presence struct {
	Capacity
	since time.Time
}

// Arrive notes that a host is there until the returned function is called. A
// host that arrives again, before its earlier connection has ended, is there
// until the newer one ends.
func (s *Scheduler) Arrive(hostID string, c Capacity) (leave func()) {
	p := &presence{Capacity: c, since: s.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.present == nil {
		s.present, s.seen = map[string]*presence{}, map[string]time.Time{}
	}
	s.present[hostID] = p
	select {
	case s.signal() <- struct{}{}:
	default:
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.present[hostID] == p {
			delete(s.present, hostID)
		}
		s.seen[hostID] = s.Now()
	}
}

// signal is called with the lock held.
func (s *Scheduler) signal() chan struct{} {
	if s.arrived == nil {
		s.arrived = make(chan struct{}, 1)
	}
	return s.arrived
}

// Here returns what a host offers and since when it is there. Where it is not,
// since is when it was there last, or zero.
func (s *Scheduler) Here(hostID string) (c Capacity, since time.Time, here bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.present[hostID]; p != nil {
		return p.Capacity, p.since, true
	}
	return Capacity{}, s.seen[hostID], false
}

// Why there is no host for an instance, from the least to the most that is
// there: the last one that applies is told.
const (
	noHost = iota
	noDriver
	noRoom
	noDisk
)

// Choose returns the host that is to run an instance: one that is there, is in
// the zone, can run the image and has room, and of these the one with the most
// room left in proportion. "" means that there is none now, and reason says
// what is missing.
func (s *Scheduler) Choose(zone string, hw vpc.InstanceProfile, image vpc.Image) (hostID, reason string) {
	type candidate struct {
		id   string
		wide int     // 1 for a host of all zones, which comes after one of the zone
		load float64 // share of its memory or disk that is given out; then the number of its instances
	}
	var fit []candidate
	missing := noHost
	for _, h := range s.Directory.Hosts.All() {
		c, _, here := s.Here(h.ID)
		if !here || h.Revoked || h.Zone != "" && h.Zone != zone {
			continue
		}
		if !c.runs(image) {
			missing = max(missing, noDriver)
			continue
		}
		has := s.givenOut(h)
		var share float64
		if image.SHA256 != "" && c.MemoryMiB > 0 {
			if has.memory+mebibytes(hw) > c.MemoryMiB {
				missing = max(missing, noRoom)
				continue
			}
			share = float64(has.memory) / float64(c.MemoryMiB)
		}
		if image.SHA256 != "" && c.DiskMiB > 0 {
			most := int64(c.DiskMiB) << 20
			if has.disk+has.grows(&image) > most {
				missing = max(missing, noDisk)
				continue
			}
			share = max(share, float64(has.disk)/float64(most))
		}
		x := candidate{id: h.ID, load: share + float64(has.count)/1e6}
		if h.Zone == "" {
			x.wide = 1
		}
		fit = append(fit, x)
	}
	if len(fit) == 0 {
		return "", [...]string{
			noHost:   "No host is connected in zone " + zone + ".",
			noDriver: "No connected host in zone " + zone + " can run the image " + image.Name + ".",
			noRoom:   "No connected host in zone " + zone + " has room for an instance of profile " + hw.Name + ".",
			noDisk:   "No connected host in zone " + zone + " has room for a disk of the image " + image.Name + ".",
		}[missing] + " Hosts and what they can run: tabard host list."
	}
	best := slices.MinFunc(fit, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.wide, b.wide), cmp.Compare(a.load, b.load), cmp.Compare(a.id, b.id))
	})
	return best.id, ""
}

// Fits reports whether an instance's host has room for it with another hardware
// profile; a reason says why not. What a stopped instance had is kept for it.
func (s *Scheduler) Fits(hostID string, i *vpc.Instance, hw vpc.InstanceProfile) (reason string) {
	if hostID == "" {
		return "" // it is placed when it starts
	}
	h, ok := s.Directory.Hosts.Get(hostID)
	if !ok || h.Revoked {
		return "The instance's host was revoked. Let it join again, or delete the instance."
	}
	old, _ := vpc.ProfileNamed(i.Profile)
	more := mebibytes(hw) - mebibytes(old)
	if more <= 0 || image(s.Directory, i.ImageID).SHA256 == "" {
		return ""
	}
	switch c, _, here := s.Here(h.ID); {
	case !here:
		return "The instance's host is not connected, so that it is not known whether it has room."
	case c.MemoryMiB > 0 && s.givenOut(h).memory+more > c.MemoryMiB:
		return "The instance's host has no room for profile " + hw.Name + "."
	}
	return ""
}

func mebibytes(hw vpc.InstanceProfile) int { return hw.MemoryGiB << 10 }

// given is what a host has given out.
type given struct {
	memory int   // MiB, of machines with a disk
	disk   int64 // bytes: what each machine's disk may grow to, and one file of each image
	files  map[string]bool
	count  int // instances
}

// grows returns the bytes that one more machine of the image may take.
func (g *given) grows(i *vpc.Image) int64 {
	if g.files[i.SHA256] {
		return i.Disk
	}
	return i.Disk + i.Bytes
}

func (s *Scheduler) givenOut(h *cluster.Host) given {
	g := given{files: map[string]bool{}}
	for _, i := range s.Directory.InstancesByHost.Get(h.ID) {
		g.count++
		if image, registered := s.Directory.Images.Get(i.ImageID); registered {
			hw, _ := vpc.ProfileNamed(i.Profile)
			g.memory += mebibytes(hw)
			g.disk += g.grows(image)
			g.files[image.SHA256] = true
		}
	}
	return g
}

// Run places instances that could not be placed when they were made, and
// removes those that are deleted and on no host that could say so, until the
// context ends.
func (s *Scheduler) Run(ctx context.Context) {
	w := s.Directory.Watch(directory.KindInstance, directory.KindHost)
	defer w.Stop()
	s.mu.Lock()
	arrived := s.signal()
	s.mu.Unlock()
	numbered := false
	for {
		if !numbered {
			numbered = s.number(ctx)
		}
		s.settle(ctx)
		select {
		case <-ctx.Done():
			return
		case <-w.C:
		case <-arrived:
		}
	}
}

func (s *Scheduler) settle(ctx context.Context) {
	for _, hostID := range s.ownerless() {
		for _, i := range s.Directory.InstancesByHost.Get(hostID) {
			if ctx.Err() != nil {
				return
			}
			if err := s.settleOne(ctx, i); err != nil && ctx.Err() == nil {
				s.Log.Error("instance without a host is not settled; will try again with the next change", "instance", i.ID, "error", err)
			}
		}
	}
}

// ownerless returns the ids of hosts that do nothing for their instances: none,
// and those that are revoked.
func (s *Scheduler) ownerless() []string {
	ids := []string{""}
	for _, h := range s.Directory.Hosts.All() {
		if h.Revoked {
			ids = append(ids, h.ID)
		}
	}
	return ids
}

func (s *Scheduler) settleOne(ctx context.Context, seen *vpc.Instance) error {
	switch {
	case seen.Status == vpc.Deleting:
	case seen.HostID == "" && (seen.Status == vpc.Pending || seen.Status == vpc.Starting):
	case seen.HostID == "" && seen.Status == vpc.Stopping:
	case seen.HostID != "" && seen.Status != vpc.Failed && seen.Status != vpc.Stopped:
	default:
		return nil
	}
	return s.Directory.Update(ctx, "", func(tx *directory.Tx) error {
		i, ok := s.Directory.Instances.Get(seen.ID)
		if !ok || i.Revision != seen.Revision {
			return nil
		}
		next := i.Clone()
		switch {
		case i.Status == vpc.Deleting:
			s.Directory.Instances.Delete(tx, i)
			return nil
		case i.HostID != "":
			next.Status, next.StatusReason = vpc.Failed, "The host that the instance is on was revoked."
		case i.Status == vpc.Stopping:
			next.Status = vpc.Stopped
		default:
			hw, _ := vpc.ProfileNamed(i.Profile)
			id, reason := s.Choose(i.Zone, hw, image(s.Directory, i.ImageID))
			if id == "" && reason == i.StatusReason {
				return nil
			}
			next.HostID, next.StatusReason = id, reason
		}
		s.Directory.Instances.Put(tx, next)
		return nil
	})
}
