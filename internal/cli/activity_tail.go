package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func tailCommand() *cobra.Command {
	var filter eventFilter
	var form string
	return spec{
		use: "tail", short: "Follow activity events as they come",
		more: "Shows events from now on, or with --since from then on, oldest first, until Ctrl-C. When the connection is lost it goes on\n" +
			"where it was, without a gap and without showing an event twice.",
		example: "tabard activity tail\n" +
			"tabard activity tail --outcome failure --since 10m\n" +
			"tabard activity tail --action 'iam-identity.*' --format jsonl",
		flags: func(f *pflag.FlagSet) {
			filter.flags(f)
			eventFormat(f, &form)
		},
		run: func(s *session, _ []string) error {
			q, err := filter.query()
			if err != nil {
				return err
			}
			if s.json {
				s.json, form = false, formLines // an array would have no end
			}
			out, err := s.eventWriter(form)
			if err != nil {
				return err
			}
			if form == formTable {
				s.announce("Following activity events")
				out = &rowWriter{out: s.out}
			}
			t := &tail{s: s, query: q, out: out}
			err = t.run(s.ctx())
			if errors.Is(err, errInterrupted) || errors.Is(err, syscall.EPIPE) {
				return nil
			}
			return err
		},
	}.command()
}

// tail follows events over as many connections as it takes.
type tail struct {
	s     *session
	query url.Values
	out   eventWriter
	last  string // id of what came last, "" before the first
}

const (
	tailSilence  = 45 * time.Second // after which a connection is taken for lost; servers show life every 15 s
	tailShortest = 500 * time.Millisecond
	tailLongest  = 30 * time.Second
	maxLine      = 4 << 20 // bytes of a line of a stream
)

// errStreamEnd is how a stream ends that may be gone on with.
var errStreamEnd = errors.New("the stream ended")

func (t *tail) run(ctx context.Context) error {
	wait, renewed := tailShortest, false
	for {
		before := t.last
		err := t.once(ctx)
		if t.last != before {
			wait, renewed = tailShortest, false
		}
		var refused *apiError
		unknown := errors.As(err, &refused) && refused.Status == http.StatusUnauthorized
		switch {
		case ctx.Err() != nil:
			return errInterrupted
		case unknown && !renewed: // the token may have been revoked, and the session not
			t.s.Expires, renewed = time.Time{}, true
			continue
		case t.last == "" || !passes(err):
			return err
		}
		pause := wait/2 + rand.N(wait/2) //nolint:gosec // so that not all come again at once
		fmt.Fprintf(t.s.cmd.ErrOrStderr(), "The connection is lost (%s). Trying again in %s.\n", plain(err.Error()), pause.Round(100*time.Millisecond))
		select {
		case <-ctx.Done():
			return errInterrupted
		case <-time.After(pause):
		}
		wait = min(2*wait, tailLongest)
	}
}

// passes reports whether another attempt may go better.
func passes(err error) bool {
	var refused *apiError
	if errors.As(err, &refused) {
		return refused.Status >= http.StatusInternalServerError || refused.Status == http.StatusTooManyRequests
	}
	var out *outputError
	return !errors.As(err, &out) && !errors.Is(err, errOver)
}

// outputError is one of writing events, which no other connection helps against.
type outputError struct{ error }

func (o *outputError) Unwrap() error { return o.error }

// errOver is a stream that ended for good, with the reason.
var errOver = errors.New("the server ended the stream")

// once follows over one connection, and returns why it ended.
func (t *tail) once(ctx context.Context) error {
	if err := t.s.freshen(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(tailSilence, cancel)
	defer silence.Stop()
	r := request{method: http.MethodGet, path: "/v1/events/stream", query: t.query, header: map[string]string{"Accept": "text/event-stream"}}
	resumed := t.last != ""
	if resumed {
		r.header["Last-Event-ID"] = t.last
		r.query.Del("since") // it would move on
	}
	body, err := t.s.client.stream(ctx, r)
	if err != nil {
		return err
	}
	defer body.Close()
	if resumed {
		fmt.Fprintf(t.s.cmd.ErrOrStderr(), "Connected again; going on after position %s.\n", plain(t.last))
	}
	err = readStream(body, func(m message) error {
		silence.Reset(tailSilence)
		return t.take(m)
	})
	if err == nil || ctx.Err() != nil {
		err = errStreamEnd
	}
	return err
}

// take shows one message. Its id counts once it is shown.
func (t *tail) take(m message) error {
	if m.data != nil {
		if err := t.show(m); err != nil {
			return err
		}
	}
	if m.id != "" {
		t.last = m.id
	}
	return nil
}

func (t *tail) show(m message) error {
	switch m.event {
	case "", "message":
		var e object
		if err := json.Unmarshal(m.data, &e); err != nil {
			return fmt.Errorf("read an event: %w", err)
		}
		if err := t.out.write([]object{e}); err != nil {
			return &outputError{fmt.Errorf("write an event: %w", err)}
		}
	case "gap":
		var gap struct{ Day, First, Last int64 }
		if err := json.Unmarshal(m.data, &gap); err != nil {
			return fmt.Errorf("read what is missing: %w", err)
		}
		t.s.warn("the events of %d at positions %d to %d were dropped to save space; those of the account are missing here", gap.Day, gap.First, gap.Last)
	case "end":
		var end struct{ Code, Message string }
		if err := json.Unmarshal(m.data, &end); err != nil {
			return fmt.Errorf("read why the stream ended: %w", err)
		}
		switch end.Code {
		case "not_authorized", "limit":
			return fmt.Errorf("%w: %s", errOver, end.Message)
		case "token_invalid":
			t.s.Expires = time.Time{} // so that the next connection has a new one
		}
		return fmt.Errorf("%w: %s", errStreamEnd, strings.TrimSuffix(end.Message, "."))
	}
	return nil
}

// message is one of a stream of server-sent events. One without data only has
// an id, or is a sign of life.
type message struct {
	id, event string
	data      []byte // nil if there is none
}

// readStream calls f for each message of a stream, and for each sign of life,
// until either ends. Half a message at the end is none.
func readStream(r io.Reader, f func(message) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), maxLine)
	var m message
	for lines.Scan() {
		line := bytes.TrimSuffix(lines.Bytes(), []byte("\r"))
		if len(line) == 0 {
			if err := f(m); err != nil {
				return err
			}
			m = message{}
			continue
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) {
		case "id":
			m.id = string(value)
		case "event":
			m.event = string(value)
		case "data":
			if m.data == nil {
				m.data = []byte{}
			} else {
				m.data = append(m.data, '\n')
			}
			if m.data = append(m.data, value...); len(m.data) > maxLine {
				return fmt.Errorf("an event is longer than %d bytes", maxLine)
			}
		}
	}
	return lines.Err()
}
