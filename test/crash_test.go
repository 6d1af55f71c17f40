package test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// kills is how often the server is killed: KILLS, or a few.
func kills(t *testing.T) int {
	t.Helper()
	return number(t, "KILLS", 8)
}

// number is what a variable of the environment says, or a default.
func number(t *testing.T, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number from 1 on", name, s)
	}
	return n
}

// chance is where the moments of a test's kills come from. CRASH_SEED repeats
// the moments of a run; what the server does then is not repeated by it.
func chance(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(number(t, "CRASH_SEED", int(time.Now().UnixNano()>>10)))
	t.Logf("CRASH_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// within is a moment from the beginning of a time on.
func within(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }

// Promise 2: the event of whatever was answered is on stable storage before the
// answer leaves. The server is killed under a mixture of requests, while it
// starts and while it serves, and after each kill the log must be whole, must
// have what the clients hold, and the changes and the events of them must be
// there together.
func TestWhatWasAnsweredIsThereAfterAKill(t *testing.T) {
	b := newSceneB(t)
	r := chance(t)
	w := newWitness(t, b)
	var checkpoint string // the newest that was taken before a kill, kept where the server does not write
	starting, total, early := 300*time.Millisecond, kills(t), 0
	for n := 1; n <= total; n++ {
		stop := w.load(n)
		moment := within(r, 600*time.Millisecond)
		switch kind := r.IntN(20); {
		case n > 1 && kind < 5: // while it starts
			b.Stop()
			b.Begin()
			moment = within(r, starting)
			early++
		case kind < 8: // about when it signs its second checkpoint
			moment = 900*time.Millisecond + within(r, 200*time.Millisecond)
		}
		time.Sleep(moment)
		b.Kill()
		stop()
		if checkpoint = w.keepCheckpoint(checkpoint); checkpoint != "" {
			b.CLI("activity", "verify", "--data-dir", b.Dir, "--checkpoint", checkpoint, "--key", w.key)
		} else {
			b.CLI("activity", "verify", "--data-dir", b.Dir)
		}
		begun := time.Now()
		b.Launch()
		starting = max(starting/2, time.Since(begun))
		w.check()
		if t.Failed() {
			t.Fatalf("after kill %d, %s after its beginning", n, moment)
		}
		if n%10 == 0 || n == total {
			t.Logf("%d kills, %d while it started: %s", n, early, w)
		}
	}
	w.checkAll()
	b.Login()
	b.CLI("activity", "verify", "--checkpoint", checkpoint, "--key", w.key)
}

// Killed while it starts for the first time, a server leaves nothing that hinders
// the next start, and its owner can log in.
func TestAFirstStartThatIsKilledIsDoneAgain(t *testing.T) {
	r := chance(t)
	starting := 150 * time.Millisecond
	for n := range max(kills(t)/2, 4) {
		s := harness.Prepare(t, filepath.Join(t.TempDir(), strconv.Itoa(n)), "--driver", "none")
		for range 1 + r.IntN(3) {
			s.Begin()
			time.Sleep(within(r, starting))
			s.Kill()
		}
		begun := time.Now()
		s.Launch()
		starting = max(starting/2, time.Since(begun))
		s.Login()
		out := s.CLI("activity", "verify")
		if !strings.Contains(out, "is whole") {
			t.Errorf("said %s", out)
		}
		s.Stop()
	}
}
