package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"
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
	if int(uid) == os.Geteuid() {
		return nil, nil
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("only root can run QEMU as the user %s", name)
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

// account returns the account for Config.User.
func (d *Driver) account() (*account, error) {
	if d.cfg.User != "" {
		return findAccount(d.cfg.User)
	}
	_, err := user.Lookup(DefaultUser)
	if unknown := user.UnknownUserError(""); errors.As(err, &unknown) {
		if os.Geteuid() == 0 {
			d.log.Warn("QEMU runs as root: make a user for it", "command", "useradd --system --groups kvm "+DefaultUser)
		}
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking up the user %s: %w", DefaultUser, err)
	}
	if os.Geteuid() != 0 {
		return nil, nil
	}
	return findAccount(DefaultUser)
}

// attributes are those of a process that runs as this account, in a session of
// its own: what ends the agent does not end it.
func (a *account) attributes() *syscall.SysProcAttr {
	attributes := &syscall.SysProcAttr{Setsid: true}
	if a != nil {
		attributes.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
	}
	return attributes
}

// group may read image files; -1 is none besides their owner.
func (a *account) group() int {
	if a == nil {
		return -1
	}
	return int(a.gid)
}
