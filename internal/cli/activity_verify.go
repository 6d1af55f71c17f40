package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tabard.dev/tabard/internal/checkpoint"
	"tabard.dev/tabard/internal/store/datadir"
	"tabard.dev/tabard/internal/store/sqlite"
)

// logPage is how many events of the whole log one request asks for.
const logPage = 1000

// logLines are the lines of the whole log as a server has it now, from an event
// on that has been read already, or nil, up to a size, or 0 for the beginning.
func (s *session) logLines(from, size int64) iter.Seq2[checkpoint.Item, error] {
	return func(yield func(checkpoint.Item, error) bool) {
		for size == 0 || from < size {
			q := query("limit", strconv.Itoa(logPage))
			if size > 0 {
				q.Set("from", strconv.FormatInt(from, 10))
				q.Set("to", strconv.FormatInt(size, 10))
			}
			_, answer, err := s.client.raw(s.ctx(), request{method: http.MethodGet, path: "/v1/events/log", query: q})
			if err != nil {
				yield(checkpoint.Item{}, err)
				return
			}
			events := 0
			for item, err := range checkpoint.Read(bytes.NewReader(answer)) {
				if err == nil && item.Header != nil {
					size = item.Header.Size
				}
				if item.Entry != nil {
					events, from = events+1, max(from, item.Entry.Index+1)
				}
				if !yield(item, err) || err != nil {
					return
				}
			}
			if events == 0 {
				return
			}
		}
	}
}

func verifyCommand() *cobra.Command {
	var dataDir, file, against, key string
	return spec{
		use: "verify", short: "Check that nobody changed the activity log",
		more: "Reads every event of the running server, of a data directory that no server has open, or of an exported file, and\n" +
			"holds them against the log's Merkle tree and its signed checkpoints. Ends with code 1 when an event was deleted,\n" +
			"changed, put in or moved, and tells the first bad position.\n\n" +
			"Whoever can write to the data and has the master key can make everything fit together again, and an older copy fits\n" +
			"by itself. Only a checkpoint that was kept elsewhere shows that: make one with tabard activity checkpoint.\n\n" +
			"The log of a running server is that of all accounts, and for the administrator of the operator's account.",
		example: "tabard activity verify\n" +
			"tabard activity verify --checkpoint checkpoint.txt\n" +
			"tabard activity verify --data-dir ./data --checkpoint checkpoint.txt\n" +
			"tabard activity verify --file log.jsonl --checkpoint checkpoint.txt --key 'tabard.example.com/identity+6e2f7a31+AUx…'",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&dataDir, "data-dir", "", "verify the data directory `DIR`, which no server may have open; nothing in it is changed")
			f.StringVar(&file, "file", "", "verify this exported `FILE`")
			f.StringVar(&against, "checkpoint", "", "hold the log against the checkpoint in this `FILE`, which was kept elsewhere")
			f.StringVar(&key, "key", "", "verify checkpoints with this `KEY`, or that in @FILE, instead of the one that comes with the log")
		},
	}.bare(func(c *cobra.Command, _ []string) error {
		if dataDir != "" && file != "" {
			return Usage("--data-dir and --file exclude each other")
		}
		o, err := verifyOptions(c, against, key)
		if err != nil {
			return err
		}
		switch {
		case dataDir != "":
			s, err := offline(c)
			if err != nil && !errors.Is(err, errDamaged) {
				return err
			}
			return s.verifyDataDir(dataDir, o)
		case file != "":
			s, err := offline(c)
			if err != nil && !errors.Is(err, errDamaged) {
				return err
			}
			f, err := os.Open(file)
			if err != nil {
				return during(err, "open the exported log")
			}
			defer f.Close()
			return s.verify(file, checkpoint.Read(f), o)
		}
		s, err := open(c)
		if err != nil {
			return err
		}
		s.announce("Verifying the activity log")
		return s.verify(s.URL, s.logLines(0, 0), o)
	})
}

func verifyOptions(c *cobra.Command, against, key string) (o checkpoint.Options, err error) {
	if strings.HasPrefix(key, "@") {
		if key, err = fileOrText(c, key); err != nil {
			return o, during(err, "read --key")
		}
	}
	o.Key = strings.TrimSpace(key)
	if against != "" {
		if o.Trusted, err = os.ReadFile(against); err != nil {
			return o, during(err, "read --checkpoint")
		}
	}
	if c.Flag("quiet").Value.String() != "true" && terminal(c.InOrStdin()) {
		o.Progress = func(r checkpoint.Report) {
			fmt.Fprintf(c.ErrOrStderr(), "\r%d of %d events", r.Events, r.Size-r.Start)
			if r.Events >= r.Size-r.Start {
				fmt.Fprintln(c.ErrOrStderr())
			}
		}
	}
	return o, nil
}

// verifyDataDir verifies the log of a data directory, which stays locked
// meanwhile.
func (s *session) verifyDataDir(dir string, o checkpoint.Options) (err error) {
	db := filepath.Join(dir, "tabard.db")
	if _, err := os.Stat(db); err != nil {
		return fmt.Errorf("%s is not the data directory of a server: %w", dir, err)
	}
	lock, err := datadir.Lock(dir)
	if err != nil {
		return &noted{error: err, note: "Stop the server first, or verify it while it runs: tabard activity verify"}
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	log, err := sqlite.OpenReadOnly(s.ctx(), db)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	key, err := checkpoint.KeyOf(s.ctx(), log)
	if err != nil {
		return err
	}
	header, err := checkpoint.ReadHeader(s.ctx(), log, key)
	if err != nil {
		return err
	}
	if err := s.verify(dir, checkpoint.WithHeader(header, checkpoint.Items(s.ctx(), log, checkpoint.All())), o); err != nil {
		return err
	}
	var hidden *sqlite.IndexError
	if err := log.CheckIndex(s.ctx()); errors.As(err, &hidden) {
		return &noted{
			error: fmt.Errorf("the events in %s are whole, but the search index is not the one that was written: from position %d on (day %d), searches may miss some", dir, hidden.First, hidden.Day),
			note:  "Take the machine for broken into. tabard activity export-log and events without a filter show all events.",
		}
	} else if err != nil {
		return err
	}
	return nil
}

func (s *session) verify(what string, items iter.Seq2[checkpoint.Item, error], o checkpoint.Options) error {
	r, err := checkpoint.Verify(interruptible(s.ctx(), items), o)
	if err != nil {
		return err
	}
	if s.json {
		if err := s.printJSON(r); err != nil {
			return err
		}
	}
	if p := r.Problem; p != nil {
		where := fmt.Sprintf("first bad position %d", p.First)
		if p.Last > p.First {
			where = fmt.Sprintf("first bad position between %d and %d", p.First, p.Last)
		}
		return &noted{
			error: fmt.Errorf("the activity log in %s is not the one that was written: %s (%s): %s", what, where, p.Kind, p.What),
			note: fmt.Sprintf("Nothing before position %d was touched. Keep the data as they are, take the machine for broken into, "+
				"and compare with an export or a backup from before.", p.First),
		}
	}
	s.ok("The activity log in %s is whole: %d events, from position %d to %d; %d checkpoints fit, the newest of %d events.",
		what, r.Events, r.Start, r.Size-1, r.Checkpoints, r.Signed)
	if s.json || s.quiet {
		return nil
	}
	if n := r.Size - max(r.Signed, r.Start); n > 0 {
		fmt.Fprintf(s.out, "The newest %d events are in no checkpoint yet.\n", n)
	}
	if o.Trusted == nil {
		too := "an older copy would fit, too"
		if o.Key == "" {
			too = "an older copy would fit, too, or one with another key"
		}
		fmt.Fprintf(s.out, "It was held against its own checkpoints only: %s. Keep a checkpoint elsewhere with\n"+
			"tabard activity checkpoint --file FILE, and give it with --checkpoint FILE and its key with --key.\n", too)
	}
	return nil
}

// interruptible ends items with the user's interruption.
func interruptible(ctx context.Context, items iter.Seq2[checkpoint.Item, error]) iter.Seq2[checkpoint.Item, error] {
	return func(yield func(checkpoint.Item, error) bool) {
		for item, err := range items {
			if ctx.Err() != nil {
				err = errInterrupted
			}
			if !yield(item, err) || err != nil {
				return
			}
		}
	}
}

func checkpointCommand() *cobra.Command {
	var file string
	return spec{
		use: "checkpoint", short: "Get the newest signed checkpoint of the activity log, to keep it elsewhere",
		more: "A checkpoint is a signed note of how many events there are and of the root of their Merkle tree: it tells nothing\n" +
			"of what the events say. Keep it where nobody who runs the server can write; tabard activity verify holds the log\n" +
			"against it. Whoever may read the account's activity may have it.",
		example: "tabard activity checkpoint\ntabard activity checkpoint --file checkpoint.txt",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&file, "file", "", "write it to this `FILE` instead of to the output")
		},
		run: func(s *session, _ []string) error {
			o, _, err := s.get("/v1/events/checkpoint", nil)
			if err != nil {
				return err
			}
			signed, key := o.text("checkpoint"), o.text("key")
			if _, err := checkpoint.Parse([]byte(signed), key); err != nil {
				return fmt.Errorf("the server gave out a checkpoint that is none: %w", err)
			}
			switch {
			case file != "":
				if err := os.WriteFile(file, []byte(signed), 0o644); err != nil { //nolint:gosec // it is no secret
					return fmt.Errorf("write the checkpoint: %w", err)
				}
				if s.json {
					return s.printJSON(o)
				}
				s.ok("The checkpoint of %s events is in %s. Its key: %s", o.text("size"), file, key)
				return nil
			case s.json:
				return s.printJSON(o)
			}
			_, err = io.WriteString(s.out, signed)
			return err
		},
	}.command()
}

func exportLogCommand() *cobra.Command {
	var file string
	c := spec{
		use: "export-log --file FILE", short: "Write the whole activity log, of all accounts, to a file that can be verified",
		more: "The file has a line of JSON for each event: the event as it was written, what is looked up by, and its hashes; and\n" +
			"checkpoints between them. While it is incomplete its name ends in .part; a command that was interrupted goes on\n" +
			"there. For the administrator of the operator's account.",
		example: "tabard activity export-log --file log.jsonl\ntabard activity verify --file log.jsonl",
		flags: func(f *pflag.FlagSet) {
			f.StringVar(&file, "file", "", "write to this `FILE`, which must not exist")
		},
		run: func(s *session, _ []string) error {
			s.announce("Exporting the activity log")
			if _, err := os.Stat(file); err == nil {
				return fmt.Errorf("%s is there already; choose another name", file)
			}
			n, err := s.exportLog(file + ".part")
			if err != nil {
				return err
			}
			if err := os.Rename(file+".part", file); err != nil {
				return fmt.Errorf("name the exported log: %w", err)
			}
			s.ok("%d events are in %s.", n, file)
			return nil
		},
	}.command()
	must(c.MarkFlagRequired("file"))
	return c
}

// exportLog writes the log to a file, or goes on with one that was begun, and
// returns its size.
func (s *session) exportLog(part string) (size int64, err error) {
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, fmt.Errorf("write the exported log: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	from, size, err := begun(f)
	if err != nil {
		return 0, fmt.Errorf("go on with %s (remove it to begin anew): %w", part, err)
	}
	out := bufio.NewWriterSize(f, 1<<20)
	for item, err := range interruptible(s.ctx(), s.logLines(from, size)) {
		if err != nil {
			// What is there already need not be fetched again.
			return 0, errors.Join(err, out.Flush())
		}
		if item.Header != nil {
			size = item.Header.Size
		}
		if err := checkpoint.Write(out, item); err != nil {
			return 0, err
		}
	}
	return size, errors.Join(out.Flush(), f.Sync())
}

// begun returns how far a file goes that was begun, cuts off half a line at its
// end, and leaves the file at its end. An empty one has size 0.
func begun(f *os.File) (from, size int64, err error) {
	var whole int64
	lines := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, err
		}
		for item, err := range checkpoint.Read(bytes.NewReader(line)) {
			if err != nil {
				return 0, 0, err
			}
			if item.Header != nil {
				size = item.Header.Size
			}
			if item.Entry != nil {
				from = item.Entry.Index + 1
			}
		}
		whole += int64(len(line))
	}
	if err := f.Truncate(whole); err != nil {
		return 0, 0, err
	}
	_, err = f.Seek(whole, io.SeekStart)
	return from, size, err
}
