package directory_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/vpc"
)

var ctx = context.Background()

// counted counts the commits that reach the store.
type counted struct {
	store.Store
	commits *atomic.Int64
}

func (c counted) Commit(ctx context.Context, b store.Batch) error {
	c.commits.Add(1)
	return c.Store.Commit(ctx, b)
}

type env struct {
	*directory.Directory
	store   store.Store
	commits atomic.Int64
}

func begin(t *testing.T) *env {
	t.Helper()
	s, err := sqlite.Open(ctx, filepath.Join(t.TempDir(), "tabard.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	e := &env{store: s}
	e.Directory, err = directory.Open(ctx, directory.Config{Store: counted{s, &e.commits}, Now: time.Now})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *env) update(t *testing.T, f func(tx *directory.Tx)) {
	t.Helper()
	if err := e.Update(ctx, "me", func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		t.Fatal(err)
	}
}

func newProfile(id, name string) *identity.Profile {
	return &identity.Profile{ID: id, AccountID: "a", Name: name}
}

func TestANameThatIsTakenIsAConflict(t *testing.T) {
	e := begin(t)
	e.update(t, func(tx *directory.Tx) { e.Profiles.Put(tx, newProfile("p1", "x")) })
	err := e.Update(ctx, "me", func(tx *directory.Tx) error {
		e.Profiles.Put(tx, newProfile("p2", "x"))
		return nil
	})
	if !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "trusted profile") || strings.Contains(err.Error(), "\x00") {
		t.Errorf("error %v", err)
	}
	if e.Profiles.Len() != 1 {
		t.Errorf("%d profiles", e.Profiles.Len())
	}
	e.update(t, func(tx *directory.Tx) {
		p := newProfile("p2", "x")
		p.AccountID = "b"
		e.Profiles.Put(tx, p)
	})
}

func TestAChangeOfWhatSomebodyElseChangedIsStale(t *testing.T) {
	e := begin(t)
	e.update(t, func(tx *directory.Tx) { e.Profiles.Put(tx, newProfile("p1", "x")) })
	read, _ := e.Profiles.Get("p1")
	mine, theirs := *read, *read
	theirs.Description = "theirs"
	e.update(t, func(tx *directory.Tx) { e.Profiles.Put(tx, &theirs) })
	for name, stage := range map[string]func(tx *directory.Tx){
		"change":   func(tx *directory.Tx) { c := mine; e.Profiles.Put(tx, &c) },
		"deletion": func(tx *directory.Tx) { c := mine; e.Profiles.Delete(tx, &c) },
		"creation": func(tx *directory.Tx) { e.Profiles.Put(tx, newProfile("p1", "y")) },
	} {
		if err := e.Update(ctx, "me", func(tx *directory.Tx) error { stage(tx); return nil }); !fault.Is(err, fault.Stale) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if p, _ := e.Profiles.Get("p1"); p.Description != "theirs" {
		t.Errorf("description %q", p.Description)
	}
}

func TestATransactionReadsTheStateBeforeIt(t *testing.T) {
	e := begin(t)
	e.update(t, func(tx *directory.Tx) {
		e.Profiles.Put(tx, newProfile("p1", "x"))
		if _, ok := e.Profiles.Get("p1"); ok {
			t.Error("the transaction reads what it has staged")
		}
	})
	if _, ok := e.Profiles.Get("p1"); !ok {
		t.Error("the change is not seen after Update has returned")
	}
}

func TestATransactionThatStagesNothingDoesNotReachTheStore(t *testing.T) {
	e := begin(t)
	e.update(t, func(*directory.Tx) {})
	if n := e.commits.Load(); n != 0 {
		t.Errorf("%d commits", n)
	}
}

func TestAnEventBecomesDurableWithItsChangeOrNotAtAll(t *testing.T) {
	e := begin(t)
	event := func(id string) *activity.Event {
		return &activity.Event{ID: id, Time: activity.Time{Time: time.Now()}, AccountID: "a", Action: "x"}
	}
	e.update(t, func(tx *directory.Tx) {
		e.Profiles.Put(tx, newProfile("p1", "x"))
		tx.Record(event("first"))
	})
	if err := e.Update(ctx, "me", func(tx *directory.Tx) error {
		e.Profiles.Put(tx, newProfile("p2", "x"))
		tx.Record(event("second"))
		return nil
	}); err == nil {
		t.Fatal("no conflict")
	}
	if err := e.Update(ctx, "me", func(tx *directory.Tx) error {
		tx.Record(event("third"))
		return errors.New("given up")
	}); err == nil {
		t.Fatal("no error")
	}
	e.update(t, func(tx *directory.Tx) { tx.Record(event("fourth")) })
	got, err := e.store.Events(ctx, store.Query{AccountID: "a", Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || !strings.Contains(string(got[0].Doc), "fourth") || !strings.Contains(string(got[1].Doc), "first") {
		t.Errorf("events %v", got)
	}
}

func TestWhatCannotBeEncodedChangesNothing(t *testing.T) {
	e := begin(t)
	err := e.Update(ctx, "me", func(tx *directory.Tx) error {
		e.Profiles.Put(tx, newProfile("p1", "x"))
		e.Clusters.Put(tx, &cluster.Cluster{ID: "c1", JWKS: []byte("{")})
		return nil
	})
	if !fault.Is(err, fault.Internal) {
		t.Errorf("error %v", err)
	}
	if e.Profiles.Len() != 0 || e.commits.Load() != 0 {
		t.Errorf("%d profiles, %d commits", e.Profiles.Len(), e.commits.Load())
	}
}

func TestAPanicInATransactionDoesNotKeepTheNextOneOut(t *testing.T) {
	e := begin(t)
	func() {
		defer func() { _ = recover() }()
		_ = e.Update(ctx, "me", func(tx *directory.Tx) error {
			e.Profiles.Put(tx, newProfile("p1", "x"))
			panic("oops")
		})
	}()
	e.update(t, func(tx *directory.Tx) { e.Profiles.Put(tx, newProfile("p2", "x")) })
	if e.Profiles.Len() != 1 {
		t.Errorf("%d profiles", e.Profiles.Len())
	}
}

func TestAWriterWhoseRequestEndsStopsWaiting(t *testing.T) {
	e := begin(t)
	inside, leave := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() {
		done <- e.Update(ctx, "me", func(*directory.Tx) error {
			close(inside)
			<-leave
			return nil
		})
	}()
	<-inside
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	err := e.Update(short, "me", func(*directory.Tx) error {
		t.Error("two writers at once")
		return nil
	})
	if !fault.Is(err, fault.Unavailable) {
		t.Errorf("error %v", err)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestAnIndexReturnsAnObjectOnce(t *testing.T) {
	e := begin(t)
	instance := &vpc.Instance{ID: "i1", AccountID: "a", Name: "x", Interfaces: []vpc.Interface{{ID: "n1", SubnetID: "s"}, {ID: "n2", SubnetID: "s"}}}
	group := &access.Group{ID: "g1", AccountID: "a", Name: "x", Members: []access.Member{{IAMID: "iam-Profile-1"}, {IAMID: "iam-Profile-1"}}}
	e.update(t, func(tx *directory.Tx) {
		e.Instances.Put(tx, instance)
		e.Groups.Put(tx, group)
	})
	if n := len(e.InstancesBySubnet.Get("s")); n != 1 || e.InstancesBySubnet.Len("s") != 1 {
		t.Errorf("%d instances in the subnet, counted %d", n, e.InstancesBySubnet.Len("s"))
	}
	if got := e.StaticGroupsOf("a", "iam-Profile-1"); !slices.Equal(got, []string{"g1"}) {
		t.Errorf("groups %v", got)
	}
	moved := instance.Clone()
	moved.Interfaces[0].SubnetID = "other"
	e.update(t, func(tx *directory.Tx) { e.Instances.Put(tx, moved) })
	if a, b := e.InstancesBySubnet.Len("s"), e.InstancesBySubnet.Len("other"); a != 1 || b != 1 {
		t.Errorf("%d and %d instances after one interface moved", a, b)
	}
	e.update(t, func(tx *directory.Tx) { e.Instances.Delete(tx, moved) })
	if a, b := e.InstancesBySubnet.Len("s"), e.InstancesBySubnet.Len("other"); a != 0 || b != 0 {
		t.Errorf("%d and %d instances after the deletion", a, b)
	}
}

func TestWhatAReaderHoldsDoesNotChangeUnderIt(t *testing.T) {
	e := begin(t)
	e.update(t, func(tx *directory.Tx) {
		for n := range 3 {
			e.Profiles.Put(tx, newProfile(fmt.Sprint("p", n), fmt.Sprint("x", n)))
		}
	})
	held := e.ProfilesByAccount.Get("a")
	before := texts(held)
	p, _ := e.Profiles.Get("p0")
	changed := *p
	changed.Name = "other"
	q, _ := e.Profiles.Get("p1")
	e.update(t, func(tx *directory.Tx) {
		e.Profiles.Put(tx, &changed)
		e.Profiles.Delete(tx, q)
	})
	if after := texts(held); !slices.Equal(before, after) {
		t.Errorf("held %v, now %v", before, after)
	}
}

func TestAWatcherIsToldOfItsKindsAndNoOthers(t *testing.T) {
	e := begin(t)
	w := e.Watch(directory.KindInstance)
	told := func() bool {
		select {
		case <-w.C:
			return true
		default:
			return false
		}
	}
	if told() {
		t.Error("told before anything changed")
	}
	e.update(t, func(tx *directory.Tx) { e.Profiles.Put(tx, newProfile("p1", "x")) })
	if told() {
		t.Error("told of a profile")
	}
	instance := &vpc.Instance{ID: "i1", AccountID: "a", Name: "x"}
	e.update(t, func(tx *directory.Tx) { e.Instances.Put(tx, instance) })
	if !told() {
		t.Error("not told of an instance")
	}
	for range 3 {
		next := instance.Clone()
		next.StatusReason += "."
		e.update(t, func(tx *directory.Tx) { e.Instances.Put(tx, next) })
		instance = next
	}
	if !told() || told() {
		t.Error("signals that nobody fetched do not fall together into one")
	}
	if err := e.Update(ctx, "me", func(tx *directory.Tx) error {
		e.Instances.Put(tx, &vpc.Instance{ID: "i2", AccountID: "a", Name: "x"})
		return nil
	}); err == nil || told() {
		t.Errorf("error %v; told of a change that failed", err)
	}
	e.update(t, func(tx *directory.Tx) { e.Instances.Delete(tx, instance) })
	if !told() {
		t.Error("not told of a deletion")
	}
	w.Stop()
	e.update(t, func(tx *directory.Tx) { e.Instances.Put(tx, &vpc.Instance{ID: "i3", AccountID: "a", Name: "y"}) })
	if told() {
		t.Error("told after Stop")
	}
}

func TestAWatcherSeesTheChangeItIsToldOf(t *testing.T) {
	e := begin(t)
	w := e.Watch(directory.KindInstance)
	defer w.Stop()
	go func() {
		for n := range 20 {
			_ = e.Update(ctx, "me", func(tx *directory.Tx) error {
				e.Instances.Put(tx, &vpc.Instance{ID: fmt.Sprint("i", n), AccountID: "a", Name: fmt.Sprint("x", n)})
				return nil
			})
		}
	}()
	deadline := time.After(30 * time.Second)
	for seen := 0; seen < 20; {
		select {
		case <-w.C:
			now := e.Instances.Len()
			if now < seen {
				t.Fatalf("%d instances after %d", now, seen)
			}
			seen = now
		case <-deadline:
			t.Fatalf("%d of 20 instances seen", seen)
		}
	}
}

func TestDataOfANewerProgramIsRefused(t *testing.T) {
	for name, record := range map[string]store.Record{
		"an unknown kind":                     {Kind: "hologram", ID: "h", Revision: 1, Doc: []byte(`{}`)},
		"a document that is not JSON":         {Kind: "profile", ID: "p", Revision: 1, Doc: []byte(`{`)},
		"a document of another revision":      {Kind: "profile", ID: "p", Revision: 2, Doc: []byte(`{"revision":1}`)},
		"a document of another form than now": {Kind: "profile", ID: "p", Revision: 1, Doc: []byte(`{"revision":1,"name":["x"]}`)},
	} {
		e := begin(t)
		if err := e.store.Commit(ctx, store.Batch{Puts: []store.Put{{Record: record}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := directory.Open(ctx, directory.Config{Store: e.store, Now: time.Now}); err == nil || !strings.Contains(err.Error(), record.ID) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// Writers move pairs of profiles together; a reader must never see one without
// the other, nor an index that disagrees with the table.
func TestReadersNeverSeeHalfATransaction(t *testing.T) {
	e := begin(t)
	e.update(t, func(tx *directory.Tx) {
		e.Profiles.Put(tx, newProfile("p1", "x0"))
		e.Profiles.Put(tx, newProfile("p2", "y0"))
	})
	const writers, each = 3, 25
	var writing, reading sync.WaitGroup
	stop := make(chan struct{})
	for range writers {
		writing.Go(func() {
			for range each {
				err := e.Update(ctx, "me", func(tx *directory.Tx) error {
					p, _ := e.Profiles.Get("p1")
					q, _ := e.Profiles.Get("p2")
					a, b := *p, *q
					a.Name, b.Name = fmt.Sprint("x", p.Revision), fmt.Sprint("y", p.Revision)
					e.Profiles.Put(tx, &a)
					e.Profiles.Put(tx, &b)
					return nil
				})
				if err != nil {
					t.Errorf("update: %v", err)
				}
			}
		})
	}
	for range 4 {
		reading.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				rows := e.ProfilesByAccount.Get("a")
				if len(rows) != 2 || rows[0].Name[1:] != rows[1].Name[1:] || rows[0].Revision != rows[1].Revision {
					t.Errorf("half a transaction: %s", texts(rows))
					return
				}
				if p, ok := e.ProfilesByName.One(directory.Key("a", rows[0].Name)); ok && p.Name != rows[0].Name {
					t.Errorf("the name %s leads to %s", rows[0].Name, p.Name)
					return
				}
				e.Profiles.All()
				e.StaticGroupsOf("a", "iam-Profile-1")
				e.PoliciesOf("a", "iam-Profile-1", "is")
				w := e.Watch(directory.KindInstance)
				w.Stop()
			}
		})
	}
	writing.Wait()
	close(stop)
	reading.Wait()
	if p, _ := e.Profiles.Get("p1"); p.Revision != 1+writers*each {
		t.Errorf("revision %d after %d changes: some were lost", p.Revision, writers*each)
	}
}

func TestOneOfManyWritersGetsTheName(t *testing.T) {
	e := begin(t)
	var won atomic.Int64
	var wg sync.WaitGroup
	for n := range 16 {
		wg.Go(func() {
			err := e.Update(ctx, "me", func(tx *directory.Tx) error {
				e.Profiles.Put(tx, newProfile(fmt.Sprint("p", n), "x"))
				return nil
			})
			switch {
			case err == nil:
				won.Add(1)
			case !fault.Is(err, fault.Conflict):
				t.Errorf("error %v", err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || e.Profiles.Len() != 1 {
		t.Errorf("%d writers won, %d profiles", won.Load(), e.Profiles.Len())
	}
}

func TestAResourceIsFoundUnderEveryNameOfItsCloud(t *testing.T) {
	a := directory.ResourceKey("crn:v1:bluemix:public:is:us-south:a/1::instance:i")
	for text, want := range map[string]bool{
		"crn:v1:staging:public:is:us-south:a/1::instance:i":    true,
		"crn:v1:bluemix:dedicated:is:us-south:a/1::instance:i": true,
		"crn:v1:bluemix:public:is:us-south:a/1::instance:j":    false,
		"not a crn": false,
		"":          false,
	} {
		if got := directory.ResourceKey(text) == a; got != want {
			t.Errorf("%q: same key = %t, want %t", text, got, want)
		}
	}
}
