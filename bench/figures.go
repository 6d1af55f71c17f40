package main

import (
	"math/rand/v2"
	"slices"
	"time"
)

// block is what a side did in two rounds.
type block struct {
	exchanges int
	wall, cpu time.Duration
	after     time.Duration // until it had nothing left to do
}

func (b block) plus(c block) block {
	return block{b.exchanges + c.exchanges, b.wall + c.wall, b.cpu + c.cpu, max(b.after, c.after)}
}

// rate is in exchanges a second.
func (b block) rate() float64 { return float64(b.exchanges) / b.wall.Seconds() }

// cost is the processor time of an exchange, in microseconds.
func (b block) cost() float64 { return b.cpu.Seconds() * 1e6 / float64(max(b.exchanges, 1)) }

func each(blocks []block, f func(block) float64) []float64 {
	out := make([]float64, len(blocks))
	for i, b := range blocks {
		out[i] = f(b)
	}
	return out
}

// quietAfter is the median of how long it took to finish what rounds had left.
func quietAfter(blocks []block) time.Duration {
	return time.Duration(median(each(blocks, func(b block) float64 { return float64(b.after) }))).Round(10 * time.Millisecond)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// resamples is how often the bootstrap draws.
const resamples = 10000

// interval is where the median lies with 95 % confidence, by the percentiles of
// the medians of samples drawn from the sample (a percentile bootstrap).
func interval(v []float64) (low, high float64) {
	r := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // the same figures give the same interval
	medians := make([]float64, resamples)
	drawn := make([]float64, len(v))
	for i := range medians {
		for j := range drawn {
			drawn[j] = v[r.IntN(len(v))]
		}
		medians[i] = median(drawn)
	}
	slices.Sort(medians)
	return medians[resamples*25/1000], medians[resamples*975/1000-1]
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[int(q*float64(len(sorted)-1))].Round(10 * time.Microsecond)
}
