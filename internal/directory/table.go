package directory

import (
	"encoding/json"
	"fmt"
	"slices"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/object"
	"tabard.dev/tabard/internal/store"
)

// Table is the directory's view of one kind of object. What its methods return
// is shared: callers copy before they change.
type Table[T any] struct {
	dir     *Directory
	kind    string
	noun    string // for messages
	meta    func(*T) *object.Meta
	id      func(*T) string
	unique  func(*T) []string
	rows    map[string]*T
	indexes []*Index[T]
}

// Index finds objects by keys computed from them.
type Index[T any] struct {
	dir  *Directory
	keys func(*T) []string
	rows map[string][]*T
}

// table is what the directory does with a table whose type it does not know.
type table interface {
	load(store.Record) error
	owner(id string) (Owned, bool)
}

func newTable[T any](d *Directory, kind, noun string, meta func(*T) *object.Meta, id func(*T) string) *Table[T] {
	t := &Table[T]{dir: d, kind: kind, noun: noun, meta: meta, id: id, rows: map[string]*T{}}
	d.tables[kind] = t
	return t
}

func (t *Table[T]) index(keys func(*T) []string) *Index[T] {
	x := &Index[T]{dir: t.dir, keys: keys, rows: map[string][]*T{}}
	t.indexes = append(t.indexes, x)
	return x
}

// Get returns the object with an id.
func (t *Table[T]) Get(id string) (*T, bool) {
	t.dir.mu.RLock()
	defer t.dir.mu.RUnlock()
	row, ok := t.rows[id]
	return row, ok
}

// All returns every object, in no order.
func (t *Table[T]) All() []*T {
	t.dir.mu.RLock()
	defer t.dir.mu.RUnlock()
	out := make([]*T, 0, len(t.rows))
	for _, row := range t.rows {
		out = append(out, row)
	}
	return out
}

// Len returns how many objects there are.
func (t *Table[T]) Len() int {
	t.dir.mu.RLock()
	defer t.dir.mu.RUnlock()
	return len(t.rows)
}

// Get returns the objects with a key, in no order.
func (x *Index[T]) Get(key string) []*T {
	x.dir.mu.RLock()
	defer x.dir.mu.RUnlock()
	return slices.Clone(x.rows[key])
}

// One returns an object with a key; there is at most one where the key is
// unique.
func (x *Index[T]) One(key string) (*T, bool) {
	x.dir.mu.RLock()
	defer x.dir.mu.RUnlock()
	rows := x.rows[key]
	if len(rows) == 0 {
		return nil, false
	}
	return rows[0], true
}

// Len returns how many objects have a key.
func (x *Index[T]) Len(key string) int {
	x.dir.mu.RLock()
	defer x.dir.mu.RUnlock()
	return len(x.rows[key])
}

// Put stages the object's next state. An object whose revision is zero is new;
// any other must still have the revision that it was read with.
func (t *Table[T]) Put(tx *Tx, obj *T) {
	m := t.meta(obj)
	expect := m.Revision
	if expect == 0 {
		m.CreatedAt, m.CreatedBy = tx.Now, tx.By
	}
	m.Revision = expect + 1
	m.ModifiedAt, m.ModifiedBy = tx.Now, tx.By
	doc, err := json.Marshal(obj)
	if err != nil {
		tx.fail(fmt.Errorf("encode %s: %w", t.kind, err))
		return
	}
	p := store.Put{Record: store.Record{Kind: t.kind, ID: t.id(obj), Revision: m.Revision, Doc: doc}, Expect: expect}
	if t.unique != nil {
		for _, key := range t.unique(obj) {
			p.Unique = append(p.Unique, t.kind+"/"+key)
		}
	}
	tx.batch.Puts = append(tx.batch.Puts, p)
	c := activity.Changed{Kind: t.kind, ID: p.ID, Next: obj}
	if old, ok := t.Get(p.ID); ok {
		c.Old = old
	}
	tx.changes = append(tx.changes, c)
	tx.apply = append(tx.apply, func() { t.set(p.ID, obj) })
	tx.touched = append(tx.touched, t.kind)
}

// Delete stages the removal of an object as it was read.
func (t *Table[T]) Delete(tx *Tx, obj *T) {
	id := t.id(obj)
	tx.batch.Deletes = append(tx.batch.Deletes, store.Delete{Kind: t.kind, ID: id, Expect: t.meta(obj).Revision})
	tx.changes = append(tx.changes, activity.Changed{Kind: t.kind, ID: id, Old: obj})
	tx.apply = append(tx.apply, func() { t.unset(id) })
	tx.touched = append(tx.touched, t.kind)
}

func (t *Table[T]) load(r store.Record) error {
	obj := new(T)
	if err := json.Unmarshal(r.Doc, obj); err != nil {
		return fmt.Errorf("load %s %s: %w", r.Kind, r.ID, err)
	}
	if got := t.meta(obj).Revision; got != r.Revision {
		return fmt.Errorf("load %s %s: document has revision %d, record %d", r.Kind, r.ID, got, r.Revision)
	}
	t.set(r.ID, obj)
	return nil
}

func (t *Table[T]) set(id string, obj *T) {
	t.unset(id)
	t.rows[id] = obj
	for _, x := range t.indexes {
		keys := x.keys(obj)
		for i, key := range keys {
			if !slices.Contains(keys[:i], key) { // two interfaces in one subnet are one instance
				x.rows[key] = append(x.rows[key], obj)
			}
		}
	}
}

func (t *Table[T]) unset(id string) {
	old, ok := t.rows[id]
	if !ok {
		return
	}
	delete(t.rows, id)
	for _, x := range t.indexes {
		for _, key := range x.keys(old) {
			rows := x.rows[key]
			if i := slices.Index(rows, old); i >= 0 {
				// Readers hold clones, so the slice may change in place.
				rows[i] = rows[len(rows)-1]
				rows[len(rows)-1] = nil
				rows = rows[:len(rows)-1]
			}
			if len(rows) == 0 {
				delete(x.rows, key)
			} else {
				x.rows[key] = rows
			}
		}
	}
}

// taken turns a store's refusal of a unique key into the caller's conflict.
func (t *Table[T]) taken() error {
	return fault.New(fault.Conflict, "conflict", "Another %s with this name or content already exists.", t.noun)
}
