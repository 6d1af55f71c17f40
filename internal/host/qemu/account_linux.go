package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
	"time"
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
