package api

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
)

// uploadPause is how long the sender of a file may send nothing.
const uploadPause = 60 * time.Second

// Upload registers a route whose body is a file, which is not read into memory
// and may take as long as its size calls for (see [Pace]). load finds what the file is for; the caller
// needs the action on it before receive reads the first byte, and again in the
// transaction in which do takes the file. receive must bound what it reads. The
// file is closed in any case: closing drops one that do has not taken.
func Upload[T any, F io.Closer](f *Family, pattern, action, event string,
	load func(*Call) (T, Target, error), receive func(c *Call, body io.Reader, obj T) (F, error),
	do func(*Call, *directory.Tx, F, T) (Reply, Target, error),
) {
	f.serve(Route{Pattern: pattern, Kind: KindChange, Action: action, Event: event}, 0, func(c *Call) (Reply, error) {
		if err := c.authenticate(event); err != nil {
			return Reply{}, err
		}
		obj, target, err := load(c)
		if err == nil {
			err = c.authorizeOn(target, action)
		}
		if err != nil {
			return Reply{}, c.recordFailure(event, target, err)
		}
		file, err := receive(c, &patient{r: c.R.Body, control: http.NewResponseController(c.w), now: c.Now}, obj)
		if err != nil {
			return Reply{}, c.recordFailure(event, target, err)
		}
		var reply Reply
		err = c.Directory.Update(c.R.Context(), c.Caller.IAMID, func(tx *directory.Tx) error {
			obj, t, err := load(c)
			target = t
			if err != nil {
				return err
			}
			if err := c.authorizeOn(t, action); err != nil {
				return err
			}
			r, t, err := do(c, tx, file, obj)
			if err != nil {
				return err
			}
			reply, target = r, t
			return c.recordChange(tx, event, reply, target)
		})
		if closeErr := file.Close(); err == nil && closeErr != nil {
			err = fault.Of(fmt.Errorf("closing an uploaded file: %w", closeErr))
		}
		if err != nil {
			return Reply{}, c.recordFailure(event, target, err)
		}
		c.decided.written()
		return reply, nil
	})
}

// patient reads a body for as long as enough comes: it moves the deadlines of the
// connection, which are made for small bodies.
type patient struct {
	r       io.Reader
	control *http.ResponseController
	moved   time.Time
	now     func() time.Time
	pace    Pace
}

func (p *patient) Read(b []byte) (int, error) {
	// The deadlines are the network's, so the clock is, too.
	if now := time.Now(); now.Sub(p.moved) > time.Second {
		p.moved = now
		for _, set := range []func(time.Time) error{p.control.SetReadDeadline, p.control.SetWriteDeadline} {
			// The answer has to be written after the last byte has come.
			if err := set(now.Add(uploadPause)); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return 0, fmt.Errorf("waiting for more of the file: %w", err)
			}
		}
	}
	n, err := p.r.Read(b)
	if slow := p.pace.Add(p.now(), n); slow != nil {
		return n, slow
	}
	return n, err
}
