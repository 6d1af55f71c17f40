package api

import (
	"time"

	"tabard.dev/tabard/internal/fault"
)

// Bounds on how long a file may take to come. They are our choice.
const (
	minPace    = 16 << 10 // bytes a second, over every paceWindow but the first
	paceWindow = time.Minute
	paceTime   = 6 * time.Hour // for one file
)

// Pace bounds how slowly a file may come, so that nobody holds what is kept for
// it for longer than its size calls for. The zero Pace is that of a file that
// begins with the first Add.
type Pace struct {
	begun, window time.Time
	got           int64 // in the window
}

// Add says that n more bytes have come. The error is a fault: the file comes too
// slowly to wait for the rest.
func (p *Pace) Add(now time.Time, n int) error {
	if p.begun.IsZero() {
		p.begun, p.window = now, now
	}
	p.got += int64(n)
	if now.Sub(p.begun) > paceTime {
		return fault.New(fault.Invalid, "bad_request", "The file takes more than %s; send it from somewhere nearer.", paceTime)
	}
	past := now.Sub(p.window)
	if past < paceWindow {
		return nil
	}
	slow := p.window.After(p.begun) && float64(p.got) < minPace*past.Seconds()
	p.window, p.got = now, 0
	if slow {
		return fault.New(fault.Invalid, "bad_request", "The file comes too slowly: less than %d bytes a second.", minPace)
	}
	return nil
}
