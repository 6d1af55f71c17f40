package merkle_test

import (
	"fmt"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/store/merkle"
)

// stored is all hashes of a tree, in memory.
type stored []tlog.Hash

func (s stored) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, n := range indexes {
		if n >= int64(len(s)) {
			return nil, fmt.Errorf("no hash %d", n)
		}
		out[i] = s[n]
	}
	return out, nil
}

func TestTheEdgeGrowsAsTheTreeDoes(t *testing.T) {
	var edge merkle.Edge
	var all, want stored
	for n := range int64(300) {
		root, err := tlog.TreeHash(n, want)
		if err != nil {
			t.Fatal(err)
		}
		if got := edge.Root(); got != root || edge.Size() != n {
			t.Fatalf("size %d: root %v of size %d, want %v", n, got, edge.Size(), root)
		}
		again, err := merkle.Read(n, all)
		if err != nil || again != edge {
			t.Fatalf("size %d: the edge read again differs (%v)", n, err)
		}
		record := fmt.Appendf(nil, "record %d", n)
		more, err := tlog.StoredHashes(n, record, want)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, more...)
		all = edge.Append(all, record)
		if len(all) != len(want) || int64(len(all)) != tlog.StoredHashCount(n+1) || all[len(all)-1] != want[len(want)-1] {
			t.Fatalf("record %d stores other hashes", n)
		}
	}
}

func TestACopyOfAnEdgeGoesOnByItself(t *testing.T) {
	var edge merkle.Edge
	edge.Append(nil, []byte("a"))
	before := edge.Root()
	tried := edge
	tried.Append(nil, []byte("b"))
	if edge.Root() != before || tried.Root() == before {
		t.Error("the copy changed the original")
	}
}

func TestAnEdgeThatIsNotStoredCannotBeRead(t *testing.T) {
	if _, err := merkle.Read(5, stored{}); err == nil {
		t.Error("it was read")
	}
	if _, err := merkle.Read(-1, stored{}); err == nil {
		t.Error("a negative size was taken")
	}
}
