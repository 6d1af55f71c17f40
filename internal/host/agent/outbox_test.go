package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/store"
)

func TestMain(m *testing.M) {
	// What fuzzes talks to its workers in goroutines that do not end.
	if slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz=") || a == "-test.fuzzworker" }) {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

var quiet = slog.New(slog.DiscardHandler)

func openOutbox(t testing.TB, dir string) *Outbox {
	t.Helper()
	o, err := OpenOutbox(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.Close() })
	return o
}

func event(n int) store.Event { return store.Event{Doc: fmt.Appendf(nil, `{"id":"%d"}`, n)} }

func commit(t testing.TB, o *Outbox, from, to int) {
	t.Helper()
	var b store.Batch
	for n := from; n <= to; n++ {
		b.Events = append(b.Events, event(n))
	}
	if err := o.Commit(context.Background(), b); err != nil {
		t.Fatal(err)
	}
}

func next(t testing.TB, o *Outbox, n int) link.Events {
	t.Helper()
	b, err := o.Next(n, link.MaxBatchBytes)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func recorded(t testing.TB, o *Outbox, number int64) {
	t.Helper()
	if err := o.Recorded(link.Recorded{Outbox: o.id, Recorded: number}); err != nil {
		t.Fatal(err)
	}
}

// texts are the ids of events.
func texts(t testing.TB, events []json.RawMessage) []string {
	t.Helper()
	out := []string{}
	for _, e := range events {
		var v struct{ ID string }
		if err := json.Unmarshal(e, &v); err != nil {
			t.Fatal(err)
		}
		out = append(out, v.ID)
	}
	return out
}

func TestEventsStayInTheOutboxUntilTheServerHasThem(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	commit(t, o, 1, 3)
	commit(t, o, 4, 5)
	b := next(t, o, 2)
	if got := texts(t, b.Events); b.First != 1 || !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("first %d, events %v", b.First, got)
	}
	recorded(t, o, 2)
	recorded(t, o, 1) // an answer that was late
	if b = next(t, o, 10); b.First != 3 || len(b.Events) != 3 || o.Waiting() != 3 {
		t.Errorf("first %d, %d events, %d wait", b.First, len(b.Events), o.Waiting())
	}
	recorded(t, o, 5)
	if b = next(t, o, 10); b.First != 6 || len(b.Events) != 0 || o.Waiting() != 0 {
		t.Errorf("first %d, %d events, %d wait", b.First, len(b.Events), o.Waiting())
	}
}

func TestABatchIsBoundedInBytesButNeverEmpty(t *testing.T) {
	o := openOutbox(t, t.TempDir())
	commit(t, o, 1, 5)
	for size, want := range map[int]int{1: 1, 11: 1, 25: 2, 1000: 5} {
		b, err := o.Next(10, size)
		if err != nil || len(b.Events) != want {
			t.Errorf("%d bytes: %d events, want %d; error %v", size, len(b.Events), want, err)
		}
	}
}

func TestACrashAtAnyByteLosesOnlyWhatWasNotWhole(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	commit(t, o, 1, 4)
	id := o.id
	whole, err := os.ReadFile(o.path)
	if err != nil {
		t.Fatal(err)
	}
	head := bytes.IndexByte(whole, '\n') + 1
	for cut := range whole {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "outbox.jsonl"), whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		o := openOutbox(t, dir)
		want := max(0, bytes.Count(whole[:cut], []byte("\n"))-1)
		b := next(t, o, 10)
		if len(b.Events) != want || b.First != 1 {
			t.Errorf("cut at %d: %d events from number %d, want %d", cut, len(b.Events), b.First, want)
		}
		if (o.id == id) != (cut >= head) {
			t.Errorf("cut at %d: the id is %s", cut, o.id)
		}
		commit(t, o, 9, 9)
		if b = next(t, o, 10); len(b.Events) != want+1 || texts(t, b.Events)[want] != "9" {
			t.Errorf("cut at %d: the next event does not follow: %s", cut, b.Events)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestADamagedEventKeepsItsNumber(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	commit(t, o, 1, 3)
	b, err := os.ReadFile(o.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.path, bytes.Replace(b, []byte(`{"id":"2"}`), []byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	o = openOutbox(t, dir)
	if got := next(t, o, 10).Events; len(got) != 3 || string(got[1]) != "null" || string(got[2]) != `{"id":"3"}` {
		t.Errorf("events %s", got)
	}
}

func TestADamagedHeadIsNotTakenForAnEmptyOutbox(t *testing.T) {
	dir := t.TempDir()
	for _, head := range []string{"{\n", `{"outbox":"","base":0}` + "\n", `{"outbox":"x","base":-1}` + "\n", "\x00\n"} {
		if err := os.WriteFile(filepath.Join(dir, "outbox.jsonl"), []byte(head+`{"id":"1"}`+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenOutbox(dir, quiet); err == nil || !strings.Contains(err.Error(), "move it away") {
			t.Errorf("%q: error %v", head, err)
		}
	}
}

func TestAFullOutboxTakesNothingUntilTheServerHasSome(t *testing.T) {
	o := openOutbox(t, t.TempDir())
	o.limit = 25
	commit(t, o, 1, 2)
	if err := o.Commit(t.Context(), store.Batch{Events: []store.Event{event(3)}}); !errors.Is(err, errFull) {
		t.Fatalf("error %v", err)
	}
	recorded(t, o, 1)
	commit(t, o, 3, 3)
	if got := texts(t, next(t, o, 10).Events); !slices.Equal(got, []string{"2", "3"}) {
		t.Errorf("events %v", got)
	}
}

// big is an event of about so many bytes.
func big(n, size int) store.Event {
	return store.Event{Doc: fmt.Appendf(nil, `{"id":"%d","x":"%s"}`, n, strings.Repeat("x", size))}
}

func TestUnderLoadThatNeverEndsTheFileStaysSmall(t *testing.T) {
	o := openOutbox(t, t.TempDir())
	var got []string
	for n := range 150 {
		if err := o.Commit(t.Context(), store.Batch{Events: []store.Event{big(n, 64<<10)}}); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			continue // the server is always one behind
		}
		b := next(t, o, 1)
		got = append(got, texts(t, b.Events)...)
		recorded(t, o, b.First)
		if o.size > 4*compactAt {
			t.Fatalf("%d bytes after %d events", o.size, n)
		}
	}
	for i, id := range got {
		if id != fmt.Sprint(i) {
			t.Fatalf("event %d is %s", i, id)
		}
	}
}

func TestALostFileIsNotTakenForWhatTheServerHas(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	commit(t, o, 1, 100)
	old := link.Recorded{Outbox: o.id, Recorded: 100}
	if err := errors.Join(o.Recorded(old), o.Close(), os.Remove(o.path)); err != nil {
		t.Fatal(err)
	}
	o = openOutbox(t, dir)
	commit(t, o, 1, 3)
	if err := o.Recorded(old); err != nil { // the server says what it has
		t.Fatal(err)
	}
	if b := next(t, o, 10); b.Outbox == old.Outbox || b.First != 1 || len(b.Events) != 3 {
		t.Errorf("outbox %s, first %d, %d events", b.Outbox, b.First, len(b.Events))
	}
}

func TestAnOlderStateOfTheFileGetsANewId(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	id := o.id
	commit(t, o, 1, 2)
	if err := o.Recorded(link.Recorded{Outbox: id, Recorded: 7}); err != nil {
		t.Fatal(err)
	}
	if b := next(t, o, 10); b.Outbox == id || b.First != 1 || len(b.Events) != 2 {
		t.Errorf("outbox %s, first %d, %d events", b.Outbox, b.First, len(b.Events))
	}
	o = openOutbox(t, dir)
	if b := next(t, o, 10); b.Outbox == id || len(b.Events) != 2 {
		t.Errorf("after a restart: outbox %s, %d events", b.Outbox, len(b.Events))
	}
}

func TestTheEndOfAnInstanceWaitsForItsEvents(t *testing.T) {
	o := openOutbox(t, t.TempDir())
	if err := o.Delivered(t.Context()); err != nil {
		t.Errorf("with nothing to wait for: %v", err)
	}
	commit(t, o, 1, 3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := o.Delivered(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- o.Delivered(t.Context()) }()
	recorded(t, o, 2)
	select {
	case err := <-done:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	commit(t, o, 4, 4) // comes later, and is not waited for
	recorded(t, o, 3)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// receiver is what takes events in, as the real one does.
type receiver struct {
	link.Recorded
	log []string
}

func (s *receiver) take(t testing.TB, b link.Events) {
	if s.Outbox != b.Outbox {
		s.Recorded = link.Recorded{Outbox: b.Outbox, Recorded: b.First - 1}
	}
	if b.First > s.Recorded.Recorded+1 {
		t.Fatalf("events up to %d are missing", b.First-1)
	}
	for n, id := range texts(t, b.Events) {
		if number := b.First + int64(n); number > s.Recorded.Recorded {
			s.log = append(s.log, id)
			s.Recorded.Recorded = number
		}
	}
}

func TestWhateverCrashesEveryEventIsDeliveredOnceAndInOrder(t *testing.T) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		o := openOutbox(t, dir)
		s := &receiver{}
		var promised, written []string
		count := 0
		hello := func() {
			if err := o.Recorded(s.Recorded); err != nil {
				t.Fatal(err)
			}
		}
		for range 120 {
			switch r.IntN(10) {
			case 0, 1, 2, 3: // events
				var b store.Batch
				for range 1 + r.IntN(3) {
					count++
					b.Events = append(b.Events, big(count, r.IntN(100<<10)))
					written = append(written, fmt.Sprint(count))
				}
				before := o.size
				if err := o.Commit(t.Context(), b); err != nil {
					t.Fatal(err)
				}
				if r.IntN(8) > 0 {
					promised = append(promised, texts(t, docs(b))...)
					continue
				}
				// The host goes down in the middle of it.
				cut := before + r.Int64N(o.size-before+1)
				if err := errors.Join(o.Close(), os.Truncate(o.path, cut)); err != nil {
					t.Fatal(err)
				}
				o = openOutbox(t, dir)
			case 4, 5, 6, 7: // delivery, of which the answer may be lost
				b := next(t, o, 1+r.IntN(5))
				if len(b.Events) == 0 {
					continue
				}
				s.take(t, b)
				if r.IntN(3) > 0 {
					hello()
				}
			case 8: // the agent is killed
				if err := o.Close(); err != nil {
					t.Fatal(err)
				}
				o = openOutbox(t, dir)
			case 9: // the stream begins anew
				hello()
			}
		}
		for o.Waiting() > 0 {
			s.take(t, next(t, o, 3))
			hello()
		}
		at := 0
		for _, id := range promised {
			i := slices.Index(s.log[at:], id)
			if i < 0 {
				t.Fatalf("seed %d: event %s is missing, or late", seed, id)
			}
			at += i + 1
		}
		at = 0
		for _, id := range s.log {
			i := slices.Index(written[at:], id)
			if i < 0 {
				t.Fatalf("seed %d: event %s is there twice, or early", seed, id)
			}
			at += i + 1
		}
	}
}

func docs(b store.Batch) []json.RawMessage {
	var out []json.RawMessage
	for _, e := range b.Events {
		out = append(out, e.Doc)
	}
	return out
}

func TestAWriteThatFailsIsUndone(t *testing.T) {
	dir := t.TempDir()
	o := openOutbox(t, dir)
	commit(t, o, 1, 2)
	// A file that cannot be written to any more.
	readOnly, err := os.Open(o.path)
	if err != nil {
		t.Fatal(err)
	}
	file := o.file
	o.file = readOnly
	for range 2 {
		if err := o.Commit(t.Context(), store.Batch{Events: []store.Event{event(3)}}); err == nil {
			t.Fatal("an event was promised that is nowhere")
		}
	}
	o.file = file
	if err := readOnly.Close(); err != nil {
		t.Fatal(err)
	}
	if got := texts(t, next(t, o, 10).Events); !slices.Equal(got, []string{"1", "2"}) {
		t.Errorf("events %v", got)
	}
}

func TestWithAnEventOfTheLargestKindABatchFitsARequest(t *testing.T) {
	// What an instance may send in a header, and what JSON makes six bytes of.
	o := openOutbox(t, t.TempDir())
	var b store.Batch
	for n := range 2000 {
		b.Events = append(b.Events, store.Event{Doc: fmt.Appendf(nil, `{"id":"%d","agent":"%s"}`, n, strings.Repeat("<>&\u2028", 100))})
	}
	if err := o.Commit(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	if got := len(sentBody(t, next(t, o, link.MaxEvents))); got > 1<<20 {
		t.Errorf("a batch has %d bytes on the wire", got)
	}
}
