// Package qemu runs machines as virtual machines with QEMU, on Linux. A machine
// is one QEMU process, a disk over a shared read-only image, and the ports that
// the host's network gives it. How packets travel, and who is who on the
// metadata service, is the network's business.
//
//	<Dir>/lock                       held by the driver: one a directory
//	<Dir>/images/<sha256>            verified image files, read-only
//	<Dir>/machines/<id>/machine.json what is known of the machine
//	                    disk.qcow2   its disk, over the image; made once and never
//	                                 replaced when it is missing
//	                    seed.iso     what cloud-init reads, made at each start
//	                    qmp.sock     QEMU's monitor
//	                    console.log  what it wrote to its serial console
//
// # The guest and the host
//
// QEMU is the wall between them, and it is treated as one that may fall. It
// runs as an unprivileged user, with QEMU's own system-call filter on, in a
// network namespace with nothing in it, and can open no file of a machine by
// its name: disk, image, seed, taps and the monitor's socket are opened by the
// driver and inherited. qemu-img runs likewise. Formats are always said and
// never guessed from what a guest wrote. What comes over the monitor is parsed
// as something hostile.
//
// A QEMU that was broken still is a process of its user, and the kernel lets it
// at others of the same user: their memory, and through /proc their open files,
// which are other machines' disks. So there is a wall between machines only
// where each has a user id of its own (Config.UIDs). The system-call filter is
// no such wall.
//
// # The agent and the machine
//
// A machine outlives the process that started it. QEMU has a session of its
// own, and nothing of it depends on the driver: while nobody listens, the last
// part of the console's output waits in QEMU's memory, and a guest that powers
// off stays, stopped, until somebody asks. The next driver of the same Dir
// finds the machine and takes it up. It knows QEMU again by process id, start
// time, boot and program, and holds it by a pidfd, so a process that got the
// same id is never taken for it and never killed. (Under systemd the agent's
// unit needs KillMode=process.)
//
// # The host's disk
//
// A disk takes what its guest has written, up to the size that the guest sees;
// that size is bounded, and the scheduler adds it up. Nothing is fetched and no
// disk is made when less than a reserve would be free after it. Images that no
// machine here uses are removed.
//
// # What this does not do
//
// There is no migration, no snapshot, no graphics and no console input. A
// change of processors, memory, keys or user data takes effect at the next
// start; the image of a disk never changes.
package qemu

import (
	"context"
	"log/slog"
	"os"
	"time"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/imagecache"
)

// Network makes the ports of machines (see package network).
type Network interface {
	// AttachTap makes the machine's ports and starts its listeners. It returns
	// the files of the taps, one for each interface, in their order; the caller
	// closes them. A tap lives as long as somebody has its file open.
	AttachTap(ctx context.Context, m host.Machine, h host.Handlers) (Port, []*os.File, error)

	// TakeUpTap starts the listeners of ports that an earlier process made and
	// whose taps are open still.
	TakeUpTap(ctx context.Context, m host.Machine, h host.Handlers) (Port, error)

	// Discard removes what an earlier process left of a machine's ports. Having
	// nothing to remove is fine.
	Discard(ctx context.Context, machineID string) error
}

// Port is the network of one machine.
type Port interface {
	// Update makes it follow what is live in a machine.
	Update(ctx context.Context, m host.Machine) error

	// Detach removes the ports and stops their listeners.
	Detach(ctx context.Context) error

	// Release stops the listeners and leaves the ports as they are.
	Release(ctx context.Context)
}

// Kinds of acceleration.
const (
	AccelAuto = "auto" // KVM where it is proved to work, else TCG
	AccelKVM  = "kvm"  // the processor's own virtualization
	AccelTCG  = "tcg"  // software emulation: works everywhere, ten times slower
)

// DefaultUser is whom an agent that is root runs QEMU as when Config.User is
// empty and there is such a user.
const DefaultUser = "tabard-vm"

// UIDs is a range of user ids. The zero value is none.
type UIDs struct{ First, Last uint32 }

// Config is the driver's place, rules and collaborators.
type Config struct {
	Dir     string // made when missing; must be the driver's alone
	Network Network
	Images  imagecache.Source

	// Keep leaves machines running when the driver is closed.
	Keep bool

	Accel string // auto, kvm or tcg; "" is auto

	// User runs QEMU. It needs no files of its own, but for KVM the right to
	// open /dev/kvm. "" is the user of this process; where that is root,
	// DefaultUser if it exists, else nobody, with a warning. QEMU runs as root
	// only when this says root.
	User string

	// UIDs, when not zero, are user ids of which each machine's QEMU has one to
	// itself, with the groups of User. Nothing else may use them.
	UIDs UIDs

	// Grace is how long a guest may take to shut down; 0 is 30 seconds.
	Grace time.Duration

	// CACert is the certificate of the authority, in PEM, that signs for the
	// metadata service. Machines whose metadata service speaks https are told
	// to trust it.
	CACert []byte

	// DiskBytes is the least size of a machine's disk. A larger image has its
	// own size.
	DiskBytes int64

	// MaxDiskBytes is the largest disk that a machine gets; 0 is 250 GiB. A
	// machine with a larger image does not start. Disks that exist are not
	// affected.
	MaxDiskBytes int64

	QEMU    string // program; "" is qemu-system-x86_64 of the PATH
	QEMUImg string // program; "" is qemu-img of the PATH

	Log *slog.Logger // nil discards
}
