package test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// cable is what is between a client and a server, and can be cut.
type cable struct {
	listener net.Listener
	mu       sync.Mutex
	conns    map[net.Conn]bool
	all      sync.WaitGroup
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{listener: l, conns: map[net.Conn]bool{}}
	c.all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			c.mu.Lock()
			c.conns[in], c.conns[out] = true, true
			c.mu.Unlock()
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				c.all.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					pair[0].Close()
					pair[1].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.cut()
		c.all.Wait()
	})
	return c
}

func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.conns {
		conn.Close()
	}
	clear(c.conns)
}

// A tail shows each event once and in order, whatever happens to the network
// and to the server meanwhile.
func TestATailHasNoGapAndShowsNothingTwice(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	wire := newCable(t, strings.TrimPrefix(s.URL, "http://"))
	s.CLI("login", "-a", "http://"+wire.listener.Addr().String(), "--apikey", "@"+s.Dir+"/owner.json")
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	const action = "iam-identity.account-profile.create"
	tail := exec.Command(bin, "activity", "tail", "--since", "1h", "--action", action, "--format", "jsonl")
	tail.Env = append(os.Environ(), "TABARD_HOME="+s.Home)
	out, errs := &harness.Output{}, &harness.Output{}
	tail.Stdout, tail.Stderr = out, errs
	if err := tail.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tail.Process.Kill() }()

	var want []string
	create := func(n int) {
		t.Helper()
		token := s.OwnerToken()
		for range n {
			name := fmt.Sprint("tailed-", len(want))
			if a := s.Do("POST", "/v1/profiles", token, map[string]any{"name": name, "account_id": s.Owner.AccountID}); a.Status != 201 {
				t.Fatalf("%d %s", a.Status, a.Body)
			}
			want = append(want, name)
		}
	}
	shown := func() (names []string) {
		for line := range strings.Lines(out.String()) {
			var e struct {
				Target struct{ Name string }
			}
			if !strings.HasSuffix(line, "\n") || json.Unmarshal([]byte(line), &e) != nil {
				break
			}
			names = append(names, e.Target.Name)
		}
		return names
	}
	caughtUp := func() {
		t.Helper()
		for deadline := time.Now().Add(60 * time.Second); len(shown()) < len(want); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d events of %d are shown\n%s", len(shown()), len(want), errs)
			}
		}
		if got := shown(); !slices.Equal(got, want) {
			t.Fatalf("shown are %q, want %q", got, want)
		}
	}
	create(3)
	caughtUp()
	for _, harm := range []func(){
		wire.cut,
		func() { s.Kill(); s.Launch() },
		func() { s.Stop(); s.Launch() },
		wire.cut,
	} {
		create(3) // some of them may be on the way
		harm()
		create(3)
		caughtUp()
	}
	if !strings.Contains(errs.String(), "going on after position") {
		t.Errorf("said %s", errs)
	}
	if err := tail.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := tail.Wait(); err != nil {
		t.Errorf("interrupted, it ended with %v\n%s", err, errs)
	}

	// The same events by pages, and in the form for spreadsheets.
	lines := strings.Count(s.CLI("activity", "events", "--action", "iam-identity.account-profile.*", "--limit", "0", "--format", "jsonl"), "\n")
	rows := strings.Count(s.CLI("activity", "events", "--action", action, "--limit", "0", "--format", "csv"), "\n") - 1
	if lines != len(want) || rows != len(want) {
		t.Errorf("%d lines and %d rows of %d events", lines, rows, len(want))
	}
}
