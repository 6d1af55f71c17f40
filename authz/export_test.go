package authz

import (
	"encoding/binary"
	"time"
)

// MaxKept bounds what a guard keeps of one second.
const MaxKept = maxKept

// Kept is how many decisions a guard keeps.
func Kept(g *Guard) int {
	g.decisions.mu.Lock()
	defer g.decisions.mu.Unlock()
	return len(g.decisions.young) + len(g.decisions.old)
}

// Fill gives a guard n decisions to keep.
func Fill(g *Guard, n int, until time.Time) {
	for i := range n {
		var key [32]byte
		binary.BigEndian.PutUint64(key[:], uint64(i))
		g.decisions.put(key, decision{until: until}, g.cfg.Now())
	}
}
