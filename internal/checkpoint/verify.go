package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/merkle"
)

// Kinds of problem.
const (
	Changed   = "changed"   // the document is not the one that was logged
	Missing   = "missing"   // an event that was logged is not there
	Inserted  = "inserted"  // an event that was not logged is there
	Reordered = "reordered" // an event stands in another one's place
	Column    = "column"    // what queries look up differs from the document
	Tree      = "tree"      // the hashes that are stored are not those of the events
	Signature = "signature" // a checkpoint is not signed by the log's key
	Root      = "root"      // the events are not those that were signed for
)

// Problem is what is wrong first.
type Problem struct {
	Kind  string `json:"kind"`
	First int64  `json:"first"` // the bad event is this one,
	Last  int64  `json:"last"`  // or one from First to this one
	What  string `json:"what"`
}

// Report is what came out.
type Report struct {
	Start       int64    `json:"start"`       // the first event that is not dropped
	Size        int64    `json:"size"`        // of the tree
	Events      int64    `json:"events"`      // that were read
	Checkpoints int      `json:"checkpoints"` // that fit
	Signed      int64    `json:"signed"`      // events that the newest of them speaks of
	Problem     *Problem `json:"problem,omitempty"`
}

// Options say what a log is held against.
type Options struct {
	Key      string       // verifier key; "" believes the one that comes with the log
	Trusted  []byte       // a checkpoint that was kept elsewhere; may be nil
	Progress func(Report) // may be nil; called now and then
}

// DropAction is the action of the event that records the dropping of a day. Its
// response data is a [DropRecord].
const DropAction = activity.DayDelete

// DropRecord says which day was dropped and what it reached from and to. Without
// one in the log, by this day or a later one, events that are gone are missing.
type DropRecord struct {
	Day   int   `json:"day"`
	First int64 `json:"first"`
	Last  int64 `json:"last"`
}

// Verify reads a whole log and holds it against its tree, its checkpoints and
// the options' one. The error is about reading; what is wrong with the log
// stands in the report.
func Verify(items iter.Seq2[Item, error], o Options) (*Report, error) {
	v := &verifier{o: o}
	for item, err := range items {
		if err != nil {
			return nil, err
		}
		switch {
		case item.Header != nil:
			err = v.begin(item.Header)
		case v.header == nil:
			err = errors.New("it does not begin with the header of a log")
		case item.Entry != nil:
			v.entry(item.Entry)
		default:
			v.checkpoint(item.Checkpoint)
		}
		if err != nil {
			return nil, err
		}
	}
	if v.header == nil {
		return nil, errors.New("it has no header of a log")
	}
	v.end()
	return &v.report, nil
}

type verifier struct {
	o      Options
	header *Header
	key    string
	holes  map[int64]tlog.Hash
	edge   merkle.Edge
	report Report

	trusted *Checkpoint // still to be met
	drops   []DropRecord

	// Of an event that does not fit: what stands there and what should. Where
	// they stand and belong is looked for in the rest of the log.
	is, wanted tlog.Hash
	searching  bool
	belongsAt  int64 // where the event that stands there belongs, or -1
	standsAt   int64 // where the one that belongs there stands, or -1
}

func (v *verifier) begin(h *Header) error {
	if v.header != nil {
		return errors.New("it has a second header")
	}
	if h.Start < 0 || h.Size < 0 || len(h.Edge) != len(merkle.Indexes(h.Start)) {
		return errors.New("the log's header contradicts itself")
	}
	v.header, v.key = h, h.Key
	if v.o.Key != "" {
		v.key = v.o.Key
	}
	edge, err := merkle.Read(h.Start, given(h.Edge))
	if err != nil {
		return err
	}
	v.edge = edge
	v.holes = map[int64]tlog.Hash{}
	for _, d := range h.Dropped {
		for _, hole := range d.Holes {
			v.holes[hole.Index] = hole.Hash
		}
	}
	v.report.Start, v.report.Size = h.Start, h.Size
	if v.o.Trusted != nil {
		if v.trusted, err = Parse(v.o.Trusted, v.key); err != nil {
			return fmt.Errorf("the checkpoint to hold the log against: %w", err)
		}
		if v.trusted.Size < h.Start {
			return fmt.Errorf("the checkpoint to hold the log against speaks of %d events, and those before %d were dropped: take a newer one", v.trusted.Size, h.Start)
		}
		v.meet()
	}
	return nil
}

// given is the hashes of an edge, whatever positions are asked for.
type given []tlog.Hash

func (g given) ReadHashes([]int64) ([]tlog.Hash, error) { return g, nil }

func (v *verifier) bad(kind string, first, last int64, format string, args ...any) {
	if v.report.Problem == nil {
		v.report.Problem = &Problem{Kind: kind, First: first, Last: last, What: fmt.Sprintf(format, args...)}
	}
}

const progressEvery = 10_000

func (v *verifier) entry(e *Entry) {
	v.report.Events++
	if v.o.Progress != nil && v.report.Events%progressEvery == 0 {
		v.o.Progress(v.report)
	}
	v.remember(e)
	if v.report.Problem != nil {
		v.search(e)
		return
	}
	v.fillHoles(e.Index)
	n := v.edge.Size()
	switch {
	case e.Index < n:
		v.bad(Inserted, e.Index, e.Index, "an event was put in at place %d, which another one has or which was dropped: %s", e.Index, about(e))
		return
	case e.Index >= v.header.Size:
		if n < v.header.Size {
			v.missing(v.header.Size-1, "")
			return
		}
		v.bad(Inserted, e.Index, e.Index, "an event was put in at place %d, behind the end of the tree: %s", e.Index, about(e))
		return
	case e.Index > n:
		v.missing(e.Index-1, "")
		return
	}
	want := v.edge.Append(nil, e.Doc)
	switch {
	case len(e.Hashes) == 0:
		v.bad(Tree, n, n, "the tree has no hash of event %d", n)
		return
	case e.Hashes[0] != want[0]:
		v.bad(Changed, n, n, "event %d is not the one that was logged there: %s", n, about(e))
		v.searching, v.is, v.wanted, v.belongsAt, v.standsAt = true, want[0], e.Hashes[0], -1, -1
		return
	case !slices.Equal(e.Hashes, want):
		v.bad(Tree, n, n, "the hashes above event %d in the tree were changed; the event itself is the one that was logged", n)
		return
	}
	if name, stored, in := columnOff(&e.Entry); name != "" {
		v.bad(Column, n, n, "the %s of event %d is stored as %q beside a document that says %q", name, n, stored, in)
		return
	}
	v.meet()
}

// fillHoles goes past dropped events that the next one comes after.
func (v *verifier) fillHoles(next int64) {
	for n := v.edge.Size(); n < next && n < v.header.Size; n = v.edge.Size() {
		hash, ok := v.holes[n]
		if !ok {
			return
		}
		v.edge.AppendHash(nil, hash)
		v.meet()
	}
}

// search looks for the two halves of an exchange.
func (v *verifier) search(e *Entry) {
	if !v.searching {
		return
	}
	if v.standsAt < 0 && tlog.RecordHash(e.Doc) == v.wanted {
		v.standsAt = e.Index
	}
	if v.belongsAt < 0 && len(e.Hashes) > 0 && e.Hashes[0] == v.is {
		v.belongsAt = e.Index
	}
}

// about names an event for whoever has to look into it.
func about(e *Entry) string {
	if e.Action == "" {
		return fmt.Sprintf("%d bytes without an action", len(e.Doc))
	}
	return fmt.Sprintf("%s of %s, transaction %s", e.Action, e.Time.UTC().Format("2006-01-02 15:04:05"), e.CorrelationID)
}

// missing says that the next event is not there, nor those up to a last one,
// but for the dropped ones among them.
func (v *verifier) missing(last int64, why string) {
	first := v.edge.Size()
	for n := first + 1; n <= last; n++ {
		if _, ok := v.holes[n]; ok {
			last = n - 1
		}
	}
	v.bad(Missing, first, last, "%s%s", gone(first, last), why)
}

func gone(first, last int64) string {
	if first == last {
		return fmt.Sprintf("event %d was deleted", first)
	}
	return fmt.Sprintf("events %d to %d were deleted", first, last)
}

// columnOff returns the first column that differs from the document.
func columnOff(e *store.Entry) (name, stored, document string) {
	var doc activity.Event
	if err := json.Unmarshal(e.Doc, &doc); err != nil {
		return "", "", "" // it is what was logged, and cannot be compared
	}
	at, _ := activity.Time{Time: e.Time}.MarshalJSON()
	in, _ := doc.Time.MarshalJSON()
	for _, c := range []struct{ name, stored, document string }{
		{"time", string(bytes.Trim(at, `"`)), string(bytes.Trim(in, `"`))},
		{"day", fmt.Sprint(e.Day), fmt.Sprint(store.Day(e.Time))},
		{"account", e.AccountID, doc.AccountID},
		{"correlation ID", e.CorrelationID, doc.CorrelationID},
		{"action", e.Action, doc.Action},
		{"outcome", e.Outcome, doc.Outcome},
		{"severity", e.Severity, doc.Severity},
		{"initiator", e.Initiator, doc.Initiator.ID},
		{"initiator's identity", e.Authn, doc.Initiator.AuthnID},
		{"target", e.Target, doc.Target.ID},
	} {
		if c.stored != c.document {
			return c.name, c.stored, c.document
		}
	}
	return "", "", ""
}

// remember keeps what an event says about dropped days.
func (v *verifier) remember(e *Entry) {
	if e.Action != DropAction || len(v.header.Dropped) == 0 {
		return
	}
	var doc activity.Event
	var d DropRecord
	if json.Unmarshal(e.Doc, &doc) == nil && doc.Outcome == activity.Success && json.Unmarshal(doc.ResponseData, &d) == nil {
		v.drops = append(v.drops, d)
	}
}

// meet holds the tree against the trusted checkpoint when it has its size.
func (v *verifier) meet() {
	if c := v.trusted; c != nil && c.Size == v.edge.Size() && v.report.Problem == nil {
		v.trusted = nil
		v.compare(c, "the checkpoint that was kept elsewhere")
	}
}

func (v *verifier) compare(c *Checkpoint, which string) {
	if v.edge.Root() != c.Root {
		first := max(v.report.Signed, v.header.Start)
		v.bad(Root, first, max(c.Size-1, first), "%s, of %d events, was signed for others: one from %d to %d was changed, together with the tree", which, c.Size, first, max(c.Size-1, first))
		return
	}
	v.report.Checkpoints++
	v.report.Signed = max(v.report.Signed, c.Size)
}

func (v *verifier) checkpoint(signed []byte) {
	if v.report.Problem != nil {
		return
	}
	c, err := Parse(signed, v.key)
	n := v.edge.Size()
	if err != nil {
		v.bad(Signature, n, n, "a checkpoint beside event %d: %v", n, err)
		return
	}
	if c.Size < v.header.Start {
		return // what it spoke of was dropped
	}
	v.fillHoles(c.Size)
	switch n = v.edge.Size(); {
	case c.Size > n:
		v.missing(c.Size-1, fmt.Sprintf(": a checkpoint was signed for %d", c.Size))
	case c.Size < n:
		v.bad(Signature, c.Size, c.Size, "the checkpoint of %d events is filed under another size", c.Size)
	default:
		v.compare(c, "the checkpoint")
	}
}

func (v *verifier) end() {
	v.fillHoles(v.header.Size)
	n := v.edge.Size()
	if n < v.header.Size {
		v.missing(v.header.Size-1, "")
	}
	if c := v.trusted; c != nil && v.report.Problem == nil {
		v.bad(Missing, n, c.Size-1, "the log ends before event %d, and had %d events when the checkpoint that was kept elsewhere was signed: it was cut, or put back to an older copy", n, c.Size)
	}
	v.judgeSearch()
	v.judgeDrops()
	if v.o.Progress != nil {
		v.o.Progress(v.report)
	}
}

func (v *verifier) judgeSearch() {
	if !v.searching {
		return
	}
	p := v.report.Problem
	switch {
	case v.belongsAt >= 0 && v.standsAt >= 0:
		p.Kind, p.What = Reordered, fmt.Sprintf("event %d stands in another one's place: it was logged at %d, and the one that was logged here stands at %d", p.First, v.belongsAt, v.standsAt)
	case v.standsAt >= 0:
		p.Kind, p.What = Inserted, fmt.Sprintf("an event was put in at place %d: the one that was logged here stands at %d", p.First, v.standsAt)
	case v.belongsAt >= 0:
		p.Kind, p.What = Missing, fmt.Sprintf("event %d was deleted: the one that stands here was logged at %d", p.First, v.belongsAt)
	}
}

// judgeDrops wants a record of every dropped day in what is left of the log.
// The record of an early day may have been dropped since, with a later day; the
// record of that one stands for it.
func (v *verifier) judgeDrops() {
	if p := v.report.Problem; p != nil && p.First <= v.header.Start {
		return
	}
	var reach int64 = -1
	day := 0
	for _, d := range v.drops {
		reach, day = max(reach, d.Last), max(day, d.Day)
	}
	for _, d := range v.header.Dropped {
		last := max(d.Last, d.Left-1)
		if d.Day > day || last > reach {
			// It is before anything else that is wrong.
			v.report.Problem = nil
			first := max(d.First, reach+1)
			v.bad(Missing, first, max(last, first), "%s: that day %d was dropped stands in no event of the log", gone(first, max(last, first)), d.Day)
			return
		}
	}
}
