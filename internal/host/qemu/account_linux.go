package qemu

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// account is whom QEMU runs as; nil is the user of this process.
type account struct {
	uid, gid uint32
	groups   []uint32
}

// findAccount looks up a user. It returns nil where this process is that user.
func findAccount(name string) (*account, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("looking up the user %s that QEMU shall run as: %w", name, err)
	}
	uid, err := id(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := id(u.Gid)
	if err != nil {
		return nil, err
	}
	switch own := os.Geteuid(); {
	case own != 0 && int(uid) != own:
		return nil, fmt.Errorf("only root can run QEMU as the user %s", name)
	case own != 0:
		return nil, nil
	case uid == 0:
		return nil, fmt.Errorf("the user %s is root: say root, if QEMU shall have all rights on this host", name)
	}
	a := &account{uid: uid, gid: gid}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("looking up the groups of %s: %w", name, err)
	}
	for _, g := range groups {
		n, err := id(g)
		if err != nil {
			return nil, err
		}
		a.groups = append(a.groups, n)
	}
	return a, nil
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("reading the user or group id %q: %w", s, err)
	}
	return uint32(n), nil
}

// fallback is whom QEMU runs as where nobody has made a user for it.
const fallback = "nobody"

// account returns the account for Config.User. That is never root unless it was
// said.
func (d *Driver) account() (*account, error) {
	root := os.Geteuid() == 0
	switch {
	case root && d.cfg.User == "root":
		d.log.Warn("QEMU runs as root, as it was told: a guest that breaks out of it owns this host", "command", makeUser)
		return nil, nil
	case d.cfg.User != "":
		return findAccount(d.cfg.User)
	case !root:
		return nil, nil
	}
	_, err := user.Lookup(DefaultUser)
	if err == nil {
		return findAccount(DefaultUser)
	}
	if unknown := user.UnknownUserError(""); !errors.As(err, &unknown) {
		return nil, fmt.Errorf("looking up the user %s: %w", DefaultUser, err)
	}
	a, err := findAccount(fallback)
	if err == nil {
		err = d.try(a)
	}
	if err != nil {
		return nil, fmt.Errorf("finding a user for QEMU: %w: make one (%s)", err, makeUser)
	}
	d.log.Warn("QEMU runs as "+fallback+", who may run other things too and use no KVM: make a user for it", "command", makeUser)
	return a, nil
}

// makeUser is how to make DefaultUser.
const makeUser = "useradd --system --no-create-home --shell /usr/sbin/nologin --groups kvm " + DefaultUser

// tryTime bounds how long QEMU takes to say its version.
const tryTime = 30 * time.Second

// try returns why an account cannot run QEMU at all.
func (d *Driver) try(a *account) error {
	ctx, cancel := context.WithTimeout(context.Background(), tryTime)
	defer cancel()
	var says tail
	cmd := exec.CommandContext(ctx, d.cfg.QEMU, "--version")
	cmd.Stderr = &says
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = a.attributes()
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running QEMU as %s: %w: %s", fallback, err, says.String())
	}
	return nil
}

// attributes are those of a process that runs as this account, in a session of
// its own, so that what ends the agent does not end it, and in a network
// namespace of its own, with nothing in it: what it may talk to it inherits.
func (a *account) attributes() *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		attributes.Cloneflags = syscall.CLONE_NEWNET // others may not make one
	}
	if a != nil {
		attributes.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
	}
	return attributes
}

// as returns the account with another user id, and the rights of its groups.
func (a *account) as(uid uint32) *account {
	if a == nil {
		return &account{uid: uid, gid: uid}
	}
	return &account{uid: uid, gid: a.gid, groups: a.groups}
}

// checkUIDs returns why the range of user ids cannot be used.
func (d *Driver) checkUIDs() error {
	r := d.cfg.UIDs
	switch {
	case r == (UIDs{}):
		return nil
	case os.Geteuid() != 0:
		return errors.New("only root can run each machine as a user of its own")
	case r.First < minUID || r.First > r.Last || r.Last == math.MaxUint32:
		return fmt.Errorf("the user ids %d to %d are not a range of ids from %d on", r.First, r.Last, minUID)
	case d.user != nil && r.has(d.user.uid):
		return fmt.Errorf("the user ids %d to %d have that of %d in them, who reads images", r.First, r.Last, d.user.uid)
	}
	return nil
}

// minUID is the least id that a machine may have: those below are of the system
// and of people.
const minUID = 1 << 16

func (u UIDs) has(uid uint32) bool { return u.First <= uid && uid <= u.Last && u != UIDs{} }

// enlist writes down that a QEMU is about to be started, and whom it runs as:
// where each has a user id of its own, the one that it had, or the first that
// no machine, no process and no user of this host has.
func (d *Driver) enlist(x *machine, r *record) (*account, error) {
	d.enlisting.Lock()
	defer d.enlisting.Unlock()
	if d.cfg.UIDs == (UIDs{}) {
		r.UID = 0
	} else {
		others, err := d.uids(x.id)
		if err != nil {
			return nil, fmt.Errorf("choosing a user id: %w", err)
		}
		if !d.cfg.UIDs.has(r.UID) || others[r.UID] {
			if r.UID, err = d.choose(others); err != nil {
				return nil, fmt.Errorf("choosing a user id: %w", err)
			}
		}
	}
	r.Launching = true
	if err := r.save(x.dir); err != nil {
		return nil, err
	}
	if r.UID == 0 {
		return d.user, nil
	}
	return d.user.as(r.UID), nil
}

func (d *Driver) choose(taken map[uint32]bool) (uint32, error) {
	if err := addRunning(taken); err != nil {
		return 0, err
	}
	for uid := d.cfg.UIDs.First; uid <= d.cfg.UIDs.Last; uid++ {
		if taken[uid] {
			continue
		}
		_, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
		if unknown := user.UnknownUserIdError(0); errors.As(err, &unknown) {
			return uid, nil
		}
		if err != nil {
			return 0, fmt.Errorf("looking up the user id %d: %w", uid, err)
		}
	}
	return 0, fmt.Errorf("all from %d to %d are taken", d.cfg.UIDs.First, d.cfg.UIDs.Last)
}

// uids returns the user ids of the machines here but one.
func (d *Driver) uids(but string) (map[uint32]bool, error) {
	ids, err := d.directories()
	if err != nil {
		return nil, err
	}
	taken := map[uint32]bool{}
	for _, id := range ids {
		// An unreadable record has its machine's process speak for it.
		if r, err := load(filepath.Join(d.dir, id)); err == nil && r != nil && id != but {
			taken[r.UID] = true
		}
	}
	return taken, nil
}

// addRunning adds the user ids of all processes.
func addRunning(taken map[uint32]bool) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("listing processes: %w", err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		var s unix.Stat_t
		if err := unix.Stat(filepath.Join("/proc", e.Name()), &s); err == nil {
			taken[s.Uid] = true
		}
	}
	return nil
}

// group may read image files; -1 is none besides their owner.
func (a *account) group() int {
	if a == nil {
		return -1
	}
	return int(a.gid)
}
