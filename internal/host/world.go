package host

import (
	"context"
	"sync"
	"time"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/placement"
	"tabard.dev/tabard/internal/vpc"
)

// World is the server as a host sees it.
type World interface {
	// Placements returns the instances that are placed on this host, by id.
	// False means that they are not known yet: then nothing is stopped for
	// being absent.
	Placements() (map[string]*vpc.Placement, bool)

	// Changed is signalled after Placements may have changed.
	Changed() <-chan struct{}

	// Report tells the server what has been done. It may fail, and is then
	// called again.
	Report(ctx context.Context, r vpc.Report) error
}

// Own is the world of the host that the server itself is.
type Own struct {
	Directory *directory.Directory
	HostID    string

	watch   sync.Once
	watcher *directory.Watcher
}

// Placements implements [World].
func (o *Own) Placements() (map[string]*vpc.Placement, bool) {
	return placement.OnHost(o.Directory, o.HostID), true
}

// Placement returns one of the host's instances.
func (o *Own) Placement(id string) (*vpc.Placement, bool) {
	i, ok := o.Directory.Instances.Get(id)
	if !ok || i.HostID != o.HostID {
		return nil, false
	}
	return placement.Of(o.Directory, i), true
}

// Changed implements [World].
func (o *Own) Changed() <-chan struct{} {
	o.watch.Do(func() { o.watcher = o.Directory.Watch(placement.Kinds...) })
	return o.watcher.C
}

// Report implements [World].
func (o *Own) Report(ctx context.Context, r vpc.Report) error {
	return placement.Report(ctx, o.Directory, o.HostID, r)
}

// sweep is how often a controller looks without having been told, so that a
// failed attempt is made again.
const sweep = 10 * time.Second
