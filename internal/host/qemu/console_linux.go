package qemu

import (
	"errors"
	"fmt"
	"os"
)

// The console's output goes to a ring in QEMU's memory, which the driver reads
// and appends to a file. So a guest that writes without end fills neither the
// host's disk, whether or not a driver runs, nor waits for anybody.
const (
	consoleRing = 256 << 10 // bytes in QEMU's memory; a power of two
	consoleRead = 64 << 10  // bytes that are read at a time
	consoleSize = 1 << 20   // bytes at which the file is put aside
)

// oldConsole ends the name of the file that was put aside last.
const oldConsole = ".1"

// appendConsole appends to the console's file.
func appendConsole(path string, p []byte) error {
	info, err := os.Stat(path)
	if err == nil && info.Size()+int64(len(p)) > consoleSize {
		err = os.Rename(path, path+oldConsole)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("putting the console's log aside: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("opening the console's log: %w", err)
	}
	_, err = f.Write(p)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing the console's log: %w", err)
	}
	return nil
}
