package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/store"
)

// smallDisk is a file system of so many bytes.
func smallDisk(t *testing.T, size int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Skipf("no tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestOnAFullDiskNoEventIsPromisedAndNoneIsLost(t *testing.T) {
	dir := smallDisk(t, 256<<10)
	o := openOutbox(t, dir)
	commit(t, o, 1, 2)
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 300<<10), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	var refused int
	for n := range 20 {
		if err := o.Commit(t.Context(), store.Batch{Events: []store.Event{big(100+n, 3000)}}); err != nil {
			refused++
		}
	}
	if refused < 10 {
		t.Fatalf("only %d events were refused", refused)
	}
	before := texts(t, next(t, o, 100).Events)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	commit(t, o, 3, 3)
	if got := texts(t, next(t, o, 100).Events); !slices.Equal(got, append(before, "3")) || !slices.Equal(before[:2], []string{"1", "2"}) {
		t.Errorf("events %v, before %v", got, before)
	}
}

func TestADiskThatTheOutboxItselfHasFilledBecomesFreeAgain(t *testing.T) {
	o := openOutbox(t, smallDisk(t, 2<<20))
	n := 0
	for ; ; n++ {
		if err := o.Commit(t.Context(), store.Batch{Events: []store.Event{big(n, 4000)}}); err != nil {
			break
		}
	}
	for o.Waiting() > 0 {
		b := next(t, o, 1000)
		recorded(t, o, b.First+int64(len(b.Events))-1)
	}
	commit(t, o, 1, 1)
	if b := next(t, o, 10); len(b.Events) != 1 {
		t.Errorf("%d events", len(b.Events))
	}
}
