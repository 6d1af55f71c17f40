package metadata

import (
	"fmt"
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Whatever the times at which an instance asks, it gets no more than its burst
// and what has grown back since, and who waits as told is let through.
func TestNoInstanceGetsMoreThanItsLimit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.Float64Range(0.1, 1000).Draw(t, "rate")
		burst := rapid.IntRange(1, 50).Draw(t, "burst")
		l := newLimiter(Limits{Reads: Limit{PerSecond: rate, Burst: burst}})
		begin := time.Unix(1_800_000_000, 0)
		now, admitted := begin, 0
		for _, gap := range rapid.SliceOfN(rapid.Int64Range(0, int64(3*time.Second)), 1, 200).Draw(t, "gaps") {
			now = now.Add(time.Duration(gap))
			wait := l.take("i", readBudget, now)
			if wait > 0 {
				if again := l.take("i", readBudget, now.Add(wait)); again > 0 {
					t.Fatalf("told to wait %s, and then to wait %s", wait, again)
				}
				now = now.Add(wait)
			}
			admitted++
			if most := float64(burst) + now.Sub(begin).Seconds()*rate; float64(admitted) > most+1e-3 {
				t.Fatalf("%d requests within %s, want at most %.3f", admitted, now.Sub(begin), most)
			}
		}
	})
}

func TestALimitThatIsInfiniteHoldsNobodyBack(t *testing.T) {
	l := newLimiter(Limits{Reads: Limit{PerSecond: math.Inf(1)}})
	for range 10_000 {
		if wait := l.take("i", readBudget, time.Unix(0, 0)); wait > 0 {
			t.Fatalf("wait %s", wait)
		}
	}
}

func TestInstancesThatAreGoneTakeNoMemory(t *testing.T) {
	l := newLimiter(Limits{})
	now := time.Unix(1_800_000_000, 0)
	busy := "busy"
	for n := range 20 * minSweep {
		now = now.Add(time.Second)
		l.take(fmt.Sprintf("i%d", n), identityBudget, now)
		for range 200 {
			l.take(busy, identityBudget, now)
		}
		if len(l.instances) > 2*minSweep {
			t.Fatalf("%d instances are kept", len(l.instances))
		}
	}
	if l.take(busy, identityBudget, now) == 0 {
		t.Error("a busy instance was forgotten")
	}
}
