package api_test

import (
	"testing"
	"time"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/fault"
)

func TestAFileMayComeSlowlyButNotForever(t *testing.T) {
	const rate = 16 << 10 // bytes a second, the least
	for name, test := range map[string]struct {
		first, then int // bytes a second in the first minute, and after it
		last        time.Duration
		ended       time.Duration // 0: not before last
	}{
		"slow in the first minute only": {1, rate, time.Hour, 0},
		"a trickle":                     {1, 1, time.Hour, 2 * time.Minute},
		"fast, and then a trickle":      {1 << 20, 1, time.Hour, 2 * time.Minute},
		"just too slow":                 {rate, rate - 1, time.Hour, 2 * time.Minute},
		"fast enough, and endless":      {1 << 20, 1 << 20, 7 * time.Hour, 6*time.Hour + time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			var p api.Pace
			begin := time.Unix(1_800_000_000, 0)
			var ended time.Duration
			for at := time.Duration(0); at <= test.last; at += time.Second {
				n := test.then
				if at <= time.Minute {
					n = test.first
				}
				if err := p.Add(begin.Add(at), n); err != nil {
					if !fault.Is(err, fault.Invalid) {
						t.Errorf("error %v", err)
					}
					ended = at
					break
				}
			}
			if ended != test.ended {
				t.Errorf("ended after %s, want %s", ended, test.ended)
			}
		})
	}
	// Bytes that come rarely, but many at a time, are fast enough.
	var p api.Pace
	for n := range 10 {
		if err := p.Add(time.Unix(1_800_000_000, 0).Add(time.Duration(n)*59*time.Second), 2<<20); err != nil {
			t.Error(err)
		}
	}
}
