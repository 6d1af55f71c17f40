package checkpoint_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/store"
)

// Whoever verifies, exports or searches a log reads for long; the log meanwhile
// grows and is signed. Nobody waits for anybody, everybody reads a whole log,
// and the write-ahead log is emptied now and then: SQLite can do that only when
// nobody reads what is in it.
func TestALogIsReadWhileItGrowsWithoutItsWriteAheadLogGrowing(t *testing.T) {
	const (
		commits = 24
		events  = 8
		object  = 3 << 20  // bytes, written with each commit to fill pages
		bound   = 60 << 20 // of the write-ahead log, which SQLite tries to empty at 16 MiB
	)
	in := install(t)
	in.log(0)
	ctx := context.Background()
	written := make(chan struct{})
	var readers sync.WaitGroup
	reads := make([]int, 4)
	read := func(n int, f func() error) {
		readers.Go(func() {
			for {
				select {
				case <-written:
					return
				default:
				}
				if err := f(); err != nil {
					t.Error(err)
					return
				}
				reads[n]++
			}
		})
	}
	verify := func() error {
		header, err := checkpoint.ReadHeader(ctx, in.store, in.signer.Key())
		if err != nil {
			return err
		}
		r, err := checkpoint.Verify(checkpoint.WithHeader(header, checkpoint.Items(ctx, in.store, checkpoint.Range{To: header.Size, Limit: 1 << 30, Every: true})), checkpoint.Options{})
		if err == nil && r.Problem != nil {
			t.Errorf("found %+v", *r.Problem)
		}
		return err
	}
	read(0, verify)
	read(1, func() error {
		for item, err := range checkpoint.Items(ctx, in.store, checkpoint.All()) {
			if err != nil {
				return err
			}
			if err := checkpoint.Write(io.Discard, item); err != nil {
				return err
			}
		}
		return nil
	})
	read(2, func() error {
		_, err := in.store.Events(ctx, store.Query{AccountID: "acme", Outcome: "failure", Limit: 1000})
		return err
	})
	read(3, func() error { return in.signer.Sign(ctx) })

	var most int64
	for n := range commits {
		filler := bytes.Repeat([]byte{byte(n)}, object) // pages that stay as they are are not written
		b := store.Batch{Puts: []store.Put{{Record: store.Record{Kind: "filler", ID: "a", Revision: int64(n + 1), Doc: filler}, Expect: int64(n)}}}
		for i := range events {
			e, err := store.NewEvent(in.event(time.Duration(n*events + i)))
			if err != nil {
				t.Fatal(err)
			}
			b.Events = append(b.Events, e)
		}
		if err := in.store.Commit(ctx, b); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(in.file + "-wal"); err == nil {
			most = max(most, info.Size())
		}
	}
	close(written)
	readers.Wait()
	if err := in.signer.Sign(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("the write-ahead log had %d MiB at most; rounds of the readers: %v", most>>20, reads)
	if most > bound {
		t.Errorf("the write-ahead log grew to %d MiB", most>>20)
	}
	newest := in.newest()
	in.close()
	r := in.verify(checkpoint.Options{Trusted: newest, Key: in.signer.Key()})
	wantProblem(t, r, "", 0, 0)
	if want := int64(commits*events + 1); r.Events != want {
		t.Errorf("%d events, want %d", r.Events, want)
	}
}
