package namespace

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Directory keeps named namespaces, as ip-netns(8) has it.
const Directory = "/run/netns"

// Share makes the directory a shared mount point, as "ip netns add" does. Were
// it left to that command, its mount would hide ours from removal.
func Share() error {
	if err := os.MkdirAll(Directory, 0o755); err != nil {
		return err
	}
	d, err := os.Open(Directory)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	err = unix.Mount("", Directory, "none", unix.MS_SHARED|unix.MS_REC, "")
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(Directory, Directory, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	return unix.Mount("", Directory, "none", unix.MS_SHARED|unix.MS_REC, "")
}

// Named returns the names of the namespaces that begin with prefix, half-made
// ones among them.
func Named(prefix string) ([]string, error) {
	entries, err := os.ReadDir(Directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names, err
}

// Open returns a namespace that exists, for the caller to close. The error is
// fs.ErrNotExist also for a name whose maker ended before the namespace stood
// behind it.
func Open(name string) (netns.NsHandle, error) {
	ns, err := netns.GetFromName(name)
	if err != nil {
		return netns.None(), err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ns), &st); err != nil {
		ns.Close()
		return netns.None(), fmt.Errorf("looking at the namespace %s: %w", name, err)
	}
	if st.Type != unix.NSFS_MAGIC {
		ns.Close()
		return netns.None(), &os.PathError{Op: "open namespace", Path: filepath.Join(Directory, name), Err: fs.ErrNotExist}
	}
	return ns, nil
}

// Within runs f in a namespace. Sockets that f opens stay in it; goroutines
// that f starts do not run in it.
func Within(ns netns.NsHandle, f func() error) error {
	return onThread(func() error {
		if err := netns.Set(ns); err != nil {
			return fmt.Errorf("entering the namespace: %w", err)
		}
		return f()
	})
}

// Create makes a namespace of that name and runs f in it. Where anything goes
// wrong, no namespace is left. The error is fs.ErrExist when the name is taken.
// The caller closes the handle.
func Create(name string, f func() error) (netns.NsHandle, error) {
	ns := netns.None()
	err := onThread(func() error {
		made, err := netns.NewNamed(name)
		if errors.Is(err, fs.ErrExist) {
			return err // another's
		}
		if err == nil {
			err = f()
		}
		if err != nil {
			if made.IsOpen() {
				made.Close()
			}
			return errors.Join(err, Remove(name))
		}
		ns = made
		return nil
	})
	return ns, err
}

// Remove takes a namespace's name away, if it has one. The kernel ends the
// namespace, and all devices in it, when no process and no socket is left in it.
func Remove(name string) error {
	path := filepath.Join(Directory, name)
	// A process that ended between making the file and mounting on it leaves a
	// plain file, for which unmounting is invalid.
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unmount", Path: path, Err: err}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Own returns a handle on the namespace of this process, for the caller to
// close.
func Own() (netns.NsHandle, error) {
	ns := netns.None()
	err := onThread(func() (err error) {
		ns, err = netns.Get()
		return err
	})
	return ns, err
}

// onThread runs f on a thread of its own, which f may move to other namespaces.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("finding the own namespace: %w", err)
			return
		}
		err = f()
		// A thread that can't go home is never unlocked, so it ends here and
		// no other goroutine wakes up in a foreign namespace.
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		home.Close()
		done <- err
	}()
	return <-done
}
