// Package merkle is the growing end of a Merkle tree over the records of a log,
// in the form of golang.org/x/mod/sumdb/tlog (RFC 6962): what must be remembered
// to append, and what is stored of it. Proofs are that package's.
package merkle

import (
	"fmt"
	"math/bits"

	"golang.org/x/mod/sumdb/tlog"
)

// Edge is the right edge of a tree: the hashes of the complete subtrees that
// its records fall into, one for each bit of its size. It is a value; a copy
// goes on by itself. The zero Edge is the empty tree's.
type Edge struct {
	size   int64
	levels [63]tlog.Hash // that of level i counts when bit i of size is set
}

// Read returns the edge of a tree of some size, whose hashes are stored.
func Read(size int64, r tlog.HashReader) (Edge, error) {
	e := Edge{size: size}
	if size < 0 {
		return e, fmt.Errorf("a tree cannot have %d records", size)
	}
	indexes := Indexes(size)
	if len(indexes) == 0 {
		return e, nil
	}
	hashes, err := r.ReadHashes(indexes)
	if err != nil {
		return e, fmt.Errorf("read the edge of a tree of %d records: %w", size, err)
	}
	n := 0
	for level := bits.Len64(uint64(size)) - 1; level >= 0; level-- {
		if size>>level&1 == 1 {
			e.levels[level] = hashes[n]
			n++
		}
	}
	return e, nil
}

// Indexes returns where the hashes of the edge of a tree of some size are
// stored, those of the larger subtrees first.
func Indexes(size int64) []int64 {
	var out []int64
	for level := bits.Len64(uint64(max(size, 0))) - 1; level >= 0; level-- {
		if size>>level&1 == 1 {
			out = append(out, tlog.StoredHashIndex(level, size>>level-1))
		}
	}
	return out
}

// Size is the number of records.
func (e *Edge) Size() int64 { return e.size }

// Append adds a record and appends to out the hashes that are to be stored for
// it, in their order.
func (e *Edge) Append(out []tlog.Hash, record []byte) []tlog.Hash {
	return e.AppendHash(out, tlog.RecordHash(record))
}

// AppendHash is Append for a record of which only the hash is known.
func (e *Edge) AppendHash(out []tlog.Hash, h tlog.Hash) []tlog.Hash {
	out = append(out, h)
	level := 0
	for ; e.size>>level&1 == 1; level++ {
		h = tlog.NodeHash(e.levels[level], h)
		e.levels[level] = tlog.Hash{}
		out = append(out, h)
	}
	e.levels[level] = h
	e.size++
	return out
}

// Root returns the hash of the whole tree.
func (e *Edge) Root() tlog.Hash {
	if e.size == 0 {
		h, err := tlog.TreeHash(0, nil)
		if err != nil {
			panic("the empty tree has no hash: " + err.Error()) // it reads nothing
		}
		return h
	}
	level := bits.TrailingZeros64(uint64(e.size))
	root := e.levels[level]
	for level++; e.size>>level != 0; level++ {
		if e.size>>level&1 == 1 {
			root = tlog.NodeHash(e.levels[level], root)
		}
	}
	return root
}
