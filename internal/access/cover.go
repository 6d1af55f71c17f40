package access

import (
	"math/bits"
	"slices"
	"strings"
)

// candidate is a role that may be chosen, with what it allows.
type candidate struct {
	crn     string
	actions []string
}

// Up to how many roles every pair, and every three of them, are tried.
const (
	maxPairs   = 100
	maxTriples = 20
)

// cover chooses roles that allow all needed actions and none but allowed ones:
// those that allow the fewest actions together, and of these the fewest roles.
// That is exact for up to three roles out of twenty, and two out of a hundred;
// beyond that it takes the role that adds most, again and again. It returns nil
// when there is no such choice.
func cover(needed, allowed actionSet, from []candidate) []string {
	index := map[string]int{}
	for a := range allowed {
		index[a] = len(index)
	}
	want := newBitset(len(index))
	for a := range needed {
		i, ok := index[a]
		if !ok {
			return nil
		}
		want.add(i)
	}
	var options []option
	for _, c := range from {
		o := option{crn: c.crn, has: newBitset(len(index))}
		if slices.ContainsFunc(c.actions, func(a string) bool {
			i, ok := index[a]
			if ok {
				o.has.add(i)
			}
			return !ok
		}) {
			continue // it allows more than there was
		}
		if o.use = o.has.and(want); o.use.len() > 0 {
			options = append(options, o)
		}
	}
	best := choice{}
	for i := range options {
		best.consider(want, options[i])
		if len(options) > maxPairs {
			continue
		}
		for j := range i {
			best.consider(want, options[i], options[j])
			if len(options) > maxTriples {
				continue
			}
			for k := range j {
				best.consider(want, options[i], options[j], options[k])
			}
		}
	}
	best.consider(want, greedy(want, options)...)
	slices.Sort(best.roles)
	return best.roles
}

// option is a role as cover sees it.
type option struct {
	crn      string
	has, use bitset // all of it, and what of it is needed
}

// choice is the best set of roles so far.
type choice struct {
	roles []string
	size  int
}

func (c *choice) consider(want bitset, options ...option) {
	if len(options) == 0 {
		return
	}
	all := slices.Clone(options[0].has)
	for _, o := range options[1:] {
		all.or(o.has)
	}
	if !all.contains(want) {
		return
	}
	roles := make([]string, len(options))
	for i, o := range options {
		roles[i] = o.crn
	}
	size := all.len()
	if c.roles == nil || size < c.size || size == c.size &&
		(len(roles) < len(c.roles) || len(roles) == len(c.roles) && strings.Join(roles, " ") < strings.Join(c.roles, " ")) {
		c.roles, c.size = roles, size
	}
}

// greedy covers what is wanted with the role that adds most for least, again
// and again, and then leaves out what the others cover.
func greedy(want bitset, options []option) []option {
	var out []option
	have := newBitset(len(want) * 64)
	for !have.contains(want) {
		var next *option
		gain := 0
		for i := range options {
			o := &options[i]
			more := slices.Clone(have)
			more.or(o.use)
			if g := more.len() - have.len(); g > gain || g == gain && next != nil && g > 0 && o.has.len() < next.has.len() {
				next, gain = o, g
			}
		}
		if next == nil {
			return nil
		}
		have.or(next.use)
		out = append(out, *next)
	}
	for i := 0; i < len(out); {
		rest := newBitset(len(want) * 64)
		for j, o := range out {
			if j != i {
				rest.or(o.use)
			}
		}
		if rest.contains(want) {
			out = slices.Delete(out, i, i+1)
		} else {
			i++
		}
	}
	return out
}

type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) add(i int) { b[i/64] |= 1 << (i % 64) }

func (b bitset) or(c bitset) {
	for i := range c {
		b[i] |= c[i]
	}
}

func (b bitset) and(c bitset) bitset {
	out := slices.Clone(b)
	for i := range out {
		out[i] &= c[i]
	}
	return out
}

func (b bitset) contains(c bitset) bool {
	for i := range c {
		if c[i]&^b[i] != 0 {
			return false
		}
	}
	return true
}

func (b bitset) len() int {
	n := 0
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}
