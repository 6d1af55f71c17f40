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

	"tabard.dev/tabard/internal/store"
)

// Outbox keeps the events of the metadata service on this host's disk until
// the server has them. A token is given out once its event stands here, so that
// instances get identity tokens while the server is away and each still has its
// record (promise 2).
//
// The file begins with the number of the last event before it; then comes one
// event a line. An event is sent until the server says that it has its number,
// and the server takes each number once: nothing is lost and nothing doubled,
// whoever is killed when.
type Outbox struct {
	path  string
	limit int64
	log   *slog.Logger
	more  chan struct{} // signalled after a commit

	mu     sync.Mutex
	file   *os.File
	base   int64 // number of the last event before the file
	lines  int64 // events in the file
	size   int64
	next   int64 // number of the first event that the server does not have
	offset int64 // of that event in the file
	broken error // why nothing can be written any more
}

// maxOutbox bounds the file, in bytes. With a few hundred bytes an event that
// is a million tokens while the server is away.
const maxOutbox = 512 << 20

// compactAt is the size from which a file of which the server has everything is
// begun anew, in bytes.
const compactAt = 1 << 20

// errFull is why no event is taken when the file has reached its limit.
var errFull = errors.New("the outbox is full: the server has taken no events for too long")

type outboxHead struct {
	Base int64 `json:"base"`
}

// OpenOutbox opens the outbox in a directory, or makes it.
func OpenOutbox(dir string, log *slog.Logger) (*Outbox, error) {
	o := &Outbox{path: filepath.Join(dir, "outbox.jsonl"), limit: maxOutbox, log: log, more: make(chan struct{}, 1)}
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
		return o.begin(o.base)
	}
	if err != nil {
		return err
	}
	var h outboxHead
	if err := json.Unmarshal(head, &h); err != nil || h.Base < 0 {
		return fmt.Errorf("it does not begin with the number of an event: %w", err)
	}
	o.base, o.next, o.size = h.Base, h.Base+1, int64(len(head))
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

// begin starts the file anew after the event with this number. The new file
// takes the old one's name once it is whole.
func (o *Outbox) begin(base int64) error {
	head, err := json.Marshal(outboxHead{base})
	if err != nil {
		return err
	}
	head = append(head, '\n')
	if err := writeFile(o.path, head); err != nil {
		return err
	}
	f, err := os.OpenFile(o.path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	size := int64(len(head))
	if _, err := f.Seek(size, io.SeekStart); err != nil {
		f.Close()
		return err
	}
	o.file.Close()
	o.file, o.base, o.lines, o.size, o.next, o.offset = f, base, 0, size, base+1, size
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
	if o.size+int64(buf.Len()) > o.limit {
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
// most size bytes but at least one, and the number of the first.
func (o *Outbox) Next(n, size int) (first int64, docs []json.RawMessage, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := bufio.NewReader(io.NewSectionReader(o.file, o.offset, o.size-o.offset))
	for len(docs) < n && size > 0 {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, nil, fmt.Errorf("read the outbox: %w", err)
		}
		if size -= len(line); size < 0 && len(docs) > 0 {
			break
		}
		if !json.Valid(line) {
			o.log.Error("event in the outbox is damaged", "number", o.next+int64(len(docs)))
			line = []byte("null") // it keeps its number
		}
		docs = append(docs, bytes.TrimSpace(line))
	}
	return o.next, docs, nil
}

// Recorded notes that the server has all events up to a number. It may know of
// events that this outbox has lost, such as after the disk was replaced; the
// next one then follows on those.
func (o *Outbox) Recorded(number int64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := o.base + o.lines
	switch {
	case number > last:
		return o.begin(number)
	case number == last && o.size > compactAt:
		return o.begin(number)
	case number < o.next:
		return nil
	}
	r := bufio.NewReader(io.NewSectionReader(o.file, o.offset, o.size-o.offset))
	for o.next <= number {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read the outbox: %w", err)
		}
		o.offset += int64(len(line))
		o.next++
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
func writeFile(path string, b []byte) error {
	draft := path + ".new"
	f, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
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
