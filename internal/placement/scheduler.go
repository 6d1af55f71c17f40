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
)

// Choose returns the host that is to run an instance: one that is there, is in
// the zone, can run the image and has room, and of these the one with the most
// room left in proportion. "" means that there is none now, and reason says
// what is missing.
func (s *Scheduler) Choose(zone string, hw vpc.InstanceProfile, image vpc.Image) (hostID, reason string) {
	type candidate struct {
<<<<<<< HEAD
		id   string
		wide int     // 1 for a host of all zones, which comes after one of the zone
		load float64 // share of its memory that is given out; then the number of its instances
=======
		id     string
		load   float64 // share of its memory or disk that is given out, or the number of its instances
		remote int
>>>>>>> wt-fixq
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
		memory, disk, count := s.used(h, hw, image)
		var share float64
		if image.SHA256 != "" && c.MemoryMiB > 0 {
<<<<<<< HEAD
			if used+hw.MemoryGiB<<10 > c.MemoryMiB {
				missing = max(missing, noRoom)
=======
			if memory > c.MemoryMiB {
				reason = "No connected host in zone " + zone + " has room for an instance of profile " + hw.Name + "."
>>>>>>> wt-fixq
				continue
			}
			share = float64(memory) / float64(c.MemoryMiB)
		}
<<<<<<< HEAD
		x := candidate{id: h.ID, load: load}
		if h.Zone == "" {
			x.wide = 1
=======
		if image.SHA256 != "" && c.DiskMiB > 0 {
			if disk > c.DiskMiB {
				reason = "No connected host in zone " + zone + " has room for a disk of the image " + image.Name + "."
				continue
			}
			share = max(share, float64(disk)/float64(c.DiskMiB))
		}
		load := share + float64(count)/1e6
		remote := 1
		if h.Zone != "" {
			remote = 0 // a host of the zone goes before one of all zones
>>>>>>> wt-fixq
		}
		fit = append(fit, x)
	}
	if len(fit) == 0 {
		return "", [...]string{
			noHost:   "No host is connected in zone " + zone + ".",
			noDriver: "No connected host in zone " + zone + " can run the image " + image.Name + ".",
			noRoom:   "No connected host in zone " + zone + " has room for an instance of profile " + hw.Name + ".",
		}[missing]
	}
	best := slices.MinFunc(fit, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.wide, b.wide), cmp.Compare(a.load, b.load), cmp.Compare(a.id, b.id))
	})
	return best.id, ""
}

<<<<<<< HEAD
// Fits reports whether an instance's host has room for it with another hardware
// profile; a reason says why not. What a stopped instance had is kept for it.
func (s *Scheduler) Fits(i *vpc.Instance, hw vpc.InstanceProfile) (reason string) {
	if i.HostID == "" {
		return "" // it is placed when it starts
	}
	h, ok := s.Directory.Hosts.Get(i.HostID)
	if !ok {
		return "The instance's host does not exist any more."
	}
	c, _, here := s.Here(h.ID)
	old, _ := vpc.ProfileNamed(i.Profile)
	switch more := (hw.MemoryGiB - old.MemoryGiB) << 10; {
	case more <= 0, image(s.Directory, i.ImageID).SHA256 == "":
		return ""
	case !here:
		return "The instance's host is not connected, so that it is not known whether it has room."
	case c.MemoryMiB > 0:
		if used, _ := s.used(h); used+more > c.MemoryMiB {
			return "The instance's host has no room for profile " + hw.Name + "."
		}
	}
	return ""
}

// used returns the memory in MiB that the machines of a host with a disk have
// been given, and the number of its instances.
func (s *Scheduler) used(h *cluster.Host) (mebibytes, count int) {
	for _, i := range s.Directory.InstancesByHost.Get(h.ID) {
		count++
		if _, registered := s.Directory.Images.Get(i.ImageID); !registered {
			continue
		}
		if hw, ok := vpc.ProfileNamed(i.Profile); ok {
			mebibytes += hw.MemoryGiB << 10
=======
// used returns the memory and disk in MiB that the machines of a host with a
// disk have been given once this one is there too, and the number of the
// instances that are there. The disk is what each machine's may grow to, and
// one file of each image.
func (s *Scheduler) used(h *cluster.Host, hw vpc.InstanceProfile, image vpc.Image) (memory, disk, count int) {
	var bytes int64
	files := map[string]bool{}
	add := func(hw vpc.InstanceProfile, image *vpc.Image) {
		memory += hw.MemoryGiB << 10
		bytes += image.Disk
		if !files[image.SHA256] {
			files[image.SHA256] = true
			bytes += image.Bytes
>>>>>>> wt-fixq
		}
	}
	add(hw, &image)
	for _, i := range s.Directory.InstancesByHost.Get(h.ID) {
		count++
		if image, registered := s.Directory.Images.Get(i.ImageID); registered {
			hw, _ := vpc.ProfileNamed(i.Profile)
			add(hw, image)
		}
	}
	return memory, int((bytes + 1<<20 - 1) >> 20), count
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
