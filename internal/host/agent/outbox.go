package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/store"
)

// Outbox keeps the events of the metadata service on this host's disk until
// the server has them. A token is given out once its event stands here, so that
// instances get identity tokens while the server is away and each still has its
// record (promise 2).
//
// The file begins with the outbox's id and the number of the last event before
// it; then comes one event a line. An event is sent until the server says that
// it has its number, and the server takes each number of an outbox once: nothing
// is lost and nothing doubled, whoever is killed when. The id tells the events of
// a lost file, which the server has, from those of the one that took its place.
type Outbox struct {
	path  string
	limit int64
	log   *slog.Logger
	more  chan struct{} // signalled after a commit

	mu     sync.Mutex
	file   *os.File
	id     string
	moved  chan struct{} // closed when the server has more than it had
	base   int64         // number of the last event before the file
	lines  int64         // events in the file
	size   int64
	next   int64 // number of the first event that the server does not have
	offset int64 // of that event in the file
	broken error // why nothing can be written any more
}

// maxOutbox bounds the events that the server does not have, in bytes; the file
// is at most twice as large. With a few hundred bytes an event that is a million
// tokens while the server is away.
const maxOutbox = 512 << 20

// compactAt is how much of the file the server must have before that is thrown
// away, in bytes.
const compactAt = 1 << 20

// errFull is why no event is taken when too many are waiting.
var errFull = errors.New("the outbox is full: the server has taken no events for too long")

type outboxHead struct {
	Outbox string `json:"outbox"`
	Base   int64  `json:"base"`
}

// OpenOutbox opens the outbox in a directory, or makes it.
func OpenOutbox(dir string, log *slog.Logger) (*Outbox, error) {
	o := &Outbox{
		path: filepath.Join(dir, "outbox.jsonl"), limit: maxOutbox, log: log, more: make(chan struct{}, 1), moved: make(chan struct{}),
	}
	f, err := os.OpenFile(o.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the outbox: %w", err)
	}
	o.file = f
	if err := o.scan(); err != nil {
		f.Close()
		return nil, fmt.Errorf("read the outbox %s: %w", o.path, err)
	}
	return o, nil
}

// scan reads what is there. A last line without its end was never promised to
// anybody.
func (o *Outbox) scan() error {
	r := bufio.NewReaderSize(o.file, 1<<16)
	head, err := r.ReadBytes('\n')
	if errors.Is(err, io.EOF) {
		// It is new: a head is written whole, or not at all.
		return o.rewrite(uuid.NewString(), 0, 0, 0)
	}
	if err != nil {
		return err
	}
	var h outboxHead
	if err := json.Unmarshal(head, &h); err != nil || h.Base < 0 || h.Outbox == "" {
		return errors.New("it is damaged; move it away to go on without the events in it")
	}
	o.id, o.base, o.next = h.Outbox, h.Base, h.Base+1
	o.size = int64(len(head))
	o.offset = o.size
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		o.size += int64(len(line))
		o.lines++
	}
	if err := o.file.Truncate(o.size); err != nil {
		return err
	}
	_, err = o.file.Seek(o.size, io.SeekStart)
	return err
}

// rewrite begins the file anew with an id, the number of the last event before
// it, and the lines of the present one from an offset on. The new file takes the
// old one's name once it is whole.
func (o *Outbox) rewrite(id string, base, from, lines int64) error {
	head, err := json.Marshal(outboxHead{id, base})
	if err != nil {
		return err
	}
	head = append(head, '\n')
	if err := writeFile(o.path, io.MultiReader(bytes.NewReader(head), io.NewSectionReader(o.file, from, o.size-from))); err != nil {
		return err
	}
	f, err := os.OpenFile(o.path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	size := int64(len(head)) + o.size - from
	if err := seek(f, size); err != nil {
		return errors.Join(err, f.Close())
	}
	o.file.Close()
	o.file, o.id, o.base, o.lines, o.size, o.next, o.offset = f, id, base, lines, size, base+1, int64(len(head))
	return nil
}

// Commit makes a batch's events durable. It implements the journal's store.
func (o *Outbox) Commit(_ context.Context, b store.Batch) error {
	var buf bytes.Buffer
	for _, e := range b.Events {
		buf.Write(e.Doc)
		buf.WriteByte('\n')
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.broken != nil {
		return o.broken
	}
	if o.size-o.offset+int64(buf.Len()) > o.limit {
		return errFull
	}
	_, err := o.file.Write(buf.Bytes())
	if err == nil {
		err = o.file.Sync()
	}
	if err != nil {
		// What was written in part must not stand between this and the next.
		if undo := errors.Join(o.file.Truncate(o.size), seek(o.file, o.size)); undo != nil {
			o.broken = fmt.Errorf("the outbox cannot be put right after an error: %w", undo)
		}
		return fmt.Errorf("write to the outbox: %w", err)
	}
	o.size += int64(buf.Len())
	o.lines += int64(len(b.Events))
	select {
	case o.more <- struct{}{}:
	default:
	}
	return nil
}

func seek(f *os.File, to int64) error {
	_, err := f.Seek(to, io.SeekStart)
	return err
}

// More is signalled when there is something to send.
func (o *Outbox) More() <-chan struct{} { return o.more }

// Next returns the events that the server does not have, at most n and of at
// most size bytes but at least one, with the number of the first and the
// outbox's id.
func (o *Outbox) Next(n, size int) (link.Events, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := link.Events{Outbox: o.id, First: o.next}
	r := bufio.NewReader(io.NewSectionReader(o.file, o.offset, o.size-o.offset))
	for len(out.Events) < n && size > 0 {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return link.Events{}, fmt.Errorf("read the outbox: %w", err)
		}
		if size -= len(line); size < 0 && len(out.Events) > 0 {
			break
		}
		if !json.Valid(line) {
			o.log.Error("event in the outbox is damaged", "number", o.next+int64(len(out.Events)))
			line = []byte("null") // it keeps its number
		}
		out.Events = append(out.Events, bytes.TrimSpace(line))
	}
	return out, nil
}

// Recorded notes that the server has all events up to a number.
func (o *Outbox) Recorded(r link.Recorded) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := o.base + o.lines
	switch {
	case r.Outbox != o.id:
		return nil // it has none of these
	case r.Recorded > last:
		// The file is an older state of itself, such as from a backup. Under its id
		// what comes now would be taken for what the server has.
		defer o.tell()
		return o.rewrite(uuid.NewString(), 0, o.offset, last-o.next+1)
	case r.Recorded < o.next:
		return nil
	}
	lines := bufio.NewReader(io.NewSectionReader(o.file, o.offset, o.size-o.offset))
	for o.next <= r.Recorded {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read the outbox: %w", err)
		}
		o.offset += int64(len(line))
		o.next++
	}
	o.tell()
	// What is copied is no more than what is thrown away.
	if o.offset < compactAt || o.size-o.offset > o.offset {
		return nil
	}
	err := o.rewrite(o.id, r.Recorded, o.offset, last-r.Recorded)
	if err != nil && o.offset == o.size {
		err = o.empty()
	}
	if err != nil {
		// The events are with the server all the same.
		o.log.Warn("what the server has is not removed from the outbox yet", "error", err)
	}
	return nil
}

// empty begins anew in place, for when the disk has no room for two files and
// the server has everything. The id changes: a crash halfway leaves an empty
// file, and such a one gets a new id.
func (o *Outbox) empty() error {
	id := uuid.NewString()
	head, err := json.Marshal(outboxHead{id, 0})
	if err != nil {
		return err
	}
	head = append(head, '\n')
	if err := o.file.Truncate(0); err != nil {
		return err
	}
	n := int64(len(head))
	o.id, o.base, o.lines, o.size, o.next, o.offset = id, 0, 0, n, 1, n
	_, err = o.file.WriteAt(head, 0)
	if err := errors.Join(err, seek(o.file, n), o.file.Sync()); err != nil {
		o.broken = fmt.Errorf("the outbox cannot be begun anew: %w", err)
		return o.broken
	}
	return nil
}

// tell wakes those who wait in Delivered.
func (o *Outbox) tell() {
	close(o.moved)
	o.moved = make(chan struct{})
}

// Delivered returns once the server has all events that are here now.
func (o *Outbox) Delivered(ctx context.Context) error {
	o.mu.Lock()
	id, last := o.id, o.base+o.lines
	for o.id == id && o.next <= last {
		moved := o.moved
		o.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-moved:
		}
		o.mu.Lock()
	}
	defer o.mu.Unlock()
	if o.id != id {
		return errors.New("the outbox was begun anew")
	}
	return nil
}

// Waiting returns how many events the server does not have.
func (o *Outbox) Waiting() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.base + o.lines - o.next + 1
}

// Close closes the file.
func (o *Outbox) Close() error { return o.file.Close() }

// writeFile replaces a file so that after a crash there is the old one or the
// new one.
func writeFile(path string, content io.Reader) error {
	draft := path + ".new"
	f, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(draft))
	}
	if err := os.Rename(draft, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
