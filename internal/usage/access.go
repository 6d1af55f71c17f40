package usage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
)

// Bounds of what is remembered of permits. A subject whose bound is reached is
// said to have more use than is known; so is an account. Only what a policy
// has permitted is counted, so the actions are those of the catalog: a caller
// can add records by the names of services that he makes up, up to the bound of
// his own subject.
const (
	MaxUsesPerSubject = 2000
	MaxUsesPerAccount = 50_000
	MaxUses           = 200_000 // in all accounts together

	maxService = 200 // bytes of a service's name
)

// keepUnused is how long what was not used again is remembered: as long as the
// days of its use.
const keepUnused = access.MaxDays * 24 * time.Hour

// shards of the permits, so that requests of different subjects do not wait for
// each other.
const shards = 64

// uses are the permits of all subjects.
type uses struct {
	seed   maphash.Seed
	shards [shards]shard

	mu      sync.Mutex
	total   int
	account map[string]int // how many there are of each account
	aged    time.Time      // when what is too old was last looked for
	removed []string       // ids of records to be removed
}

type shard struct {
	mu       sync.Mutex
	subjects map[subjectKey]*subject
	dirty    []*use // changed since they were written
}

type subjectKey struct{ account, iamID string }

// subject is one identity's permits.
type subject struct {
	uses   map[useKey]*use
	missed *use // permits for which there was no room; nil when there are none
}

type useKey struct{ policy, service, action string }

type use struct {
	access.Use
	dirty, gone bool
}

func newUses() *uses {
	u := &uses{seed: maphash.MakeSeed(), account: map[string]int{}}
	for i := range u.shards {
		u.shards[i].subjects = map[subjectKey]*subject{}
	}
	return u
}

func (u *uses) shard(key subjectKey) *shard {
	return &u.shards[maphash.String(u.seed, key.iamID)%shards]
}

// Way is how a permit came about.
type Way int

// The ways.
const (
	Once  Way = iota // a request
	Again            // a request that has been counted, and is now permitted on one more resource
	Empty            // a request to list what there is, when there was nothing to decide on
)

// Use counts that a policy permitted a request, or would have permitted it to
// see something.
func (t *Tracker) Use(q access.Request, p *access.Policy, way Way) {
	if t == nil {
		return
	}
	key := subjectKey{p.AccountID, counted(q.Subject)}
	s := t.uses.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	sub, ok := s.subjects[key]
	if !ok {
		key = subjectKey{strings.Clone(key.account), strings.Clone(key.iamID)}
		sub = &subject{uses: map[useKey]*use{}}
		s.subjects[key] = sub
	}
	k := useKey{p.ID, q.Resource[access.ServiceName], q.Action}
	x, ok := sub.uses[k]
	if !ok {
		x = t.uses.add(key, sub, k, q.Time)
	}
	if way == Again && !ok {
		way = Once
	}
	if x.note(q, way) {
		s.touch(x)
	}
}

// note adds a request, or one more resource of it, and reports whether that was
// anything new.
func (x *use) note(q access.Request, way Way) bool {
	changed := way != Again
	if changed {
		x.Count++
	}
	if q.Time.After(x.Last) {
		x.Last, changed = q.Time, true
	}
	if x.Action == "" {
		return changed
	}
	x.Days.Add(q.Time)
	return way != Empty && x.Touched.Add(q.Resource) || changed
}

func (s *shard) touch(x *use) {
	if !x.dirty {
		x.dirty = true
		s.dirty = append(s.dirty, x)
	}
}

// counted is the subject under which use is counted. A service acts under the
// CRN of whatever instance of it, and whoever asks for a decision names it: the
// services of an account share one subject, and its bound.
func counted(iamID string) string {
	if crn.KindOf(iamID) == crn.KindCRN {
		return services
	}
	return iamID
}

// services is the subject of all services that act under their CRN.
const services = "crn"

// add makes the record of a use, or when there is no room returns the one for
// those without a record. The shard is locked.
func (u *uses) add(key subjectKey, sub *subject, k useKey, at time.Time) *use {
	room := len(sub.uses) < MaxUsesPerSubject && len(k.service) <= maxService && u.reserve(key.account)
	if !room && sub.missed != nil {
		return sub.missed
	}
	x := &use{Use: access.Use{AccountID: key.account, Subject: key.iamID, First: at, Last: at}}
	if room {
		// What the request holds is not kept alive by a part of it.
		x.PolicyID, x.Service, x.Action = strings.Clone(k.policy), strings.Clone(k.service), strings.Clone(k.action)
		sub.uses[useKey{x.PolicyID, x.Service, x.Action}] = x
	} else {
		sub.missed = x
	}
	x.ID = useID(&x.Use)
	return x
}

// useID makes an id of what a use is of.
func useID(u *access.Use) string {
	sum := sha256.Sum256([]byte(directory.Key(u.AccountID, u.Subject, u.PolicyID, u.Service, u.Action)))
	return hex.EncodeToString(sum[:16])
}

// reserve takes room for one more record of an account.
func (u *uses) reserve(account string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.account[account] >= MaxUsesPerAccount || u.total >= MaxUses {
		return false
	}
	u.account[account]++
	u.total++
	return true
}

func (u *uses) release(account string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.account[account]--; u.account[account] == 0 {
		delete(u.account, account)
	}
	u.total--
}

// load takes a record over that was written before.
func (u *uses) load(stored *access.Use) {
	key := subjectKey{stored.AccountID, stored.Subject}
	s := u.shard(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	sub, ok := s.subjects[key]
	if !ok {
		sub = &subject{uses: map[useKey]*use{}}
		s.subjects[key] = sub
	}
	x := &use{Use: *stored}
	if stored.Action == "" {
		sub.missed = x
		return
	}
	u.mu.Lock()
	u.account[stored.AccountID]++
	u.total++
	u.mu.Unlock()
	sub.uses[useKey{x.PolicyID, x.Service, x.Action}] = x
}

// Uses returns what is known of an account's permits, or of those to one
// subject when iamID is not empty, in the order of subject, policy, service and
// action.
func (t *Tracker) Uses(accountID, iamID string) []access.Use {
	var out []access.Use
	if t == nil {
		return out
	}
	collect := func(sub *subject) {
		for _, x := range sub.uses {
			out = append(out, x.Use)
		}
		if sub.missed != nil {
			out = append(out, sub.missed.Use)
		}
	}
	if iamID != "" {
		key := subjectKey{accountID, counted(iamID)}
		s := t.uses.shard(key)
		s.mu.Lock()
		if sub, ok := s.subjects[key]; ok {
			collect(sub)
		}
		s.mu.Unlock()
	} else {
		for i := range t.uses.shards {
			s := &t.uses.shards[i]
			s.mu.Lock()
			for key, sub := range s.subjects {
				if key.account == accountID {
					collect(sub)
				}
			}
			s.mu.Unlock()
		}
	}
	slices.SortFunc(out, func(a, b access.Use) int {
		return strings.Compare(useOrder(a), useOrder(b))
	})
	return out
}

func useOrder(u access.Use) string {
	return directory.Key(u.Subject, u.PolicyID, u.Service, u.Action)
}

// Since returns when permits began to be counted by subject and action.
func (t *Tracker) Since() time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.began
}

// sinceID is the id of the record whose time is that.
const sinceID = "access"

// begin finds out since when uses are counted, and takes over those that are
// written.
func (t *Tracker) begin() {
	d := t.cfg.Directory
	t.began = t.cfg.Now().UTC()
	if r, ok := d.Usage.Get(sinceID); ok {
		t.began = r.Last
	}
	for _, u := range d.AccessUses.All() {
		t.uses.load(u)
	}
}

// take returns at most n records that are to be written.
func (u *uses) take(n int) (taken []*use, copies []access.Use) {
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		for len(s.dirty) > 0 && len(taken) < n {
			x := s.dirty[len(s.dirty)-1]
			s.dirty[len(s.dirty)-1] = nil
			s.dirty = s.dirty[:len(s.dirty)-1]
			x.dirty = false
			if !x.gone {
				taken, copies = append(taken, x), append(copies, x.Use)
			}
		}
		s.mu.Unlock()
	}
	return taken, copies
}

// giveBack has records written another time.
func (u *uses) giveBack(taken []*use) {
	for _, x := range taken {
		s := u.shard(subjectKey{x.AccountID, x.Subject})
		s.mu.Lock()
		s.touch(x)
		s.mu.Unlock()
	}
}

// flushUses writes at most a batch of records of use.
func (t *Tracker) flushUses(ctx context.Context) (more bool, err error) {
	d := t.cfg.Directory
	var taken []*use
	err = d.Update(ctx, "usage", func(tx *directory.Tx) error {
		var copies []access.Use
		taken, copies = t.uses.take(batch)
		for _, c := range copies {
			if old, ok := d.AccessUses.Get(c.ID); ok {
				c.Meta = old.Meta
			}
			d.AccessUses.Put(tx, &c)
		}
		return nil
	})
	if err != nil {
		t.uses.giveBack(taken)
	}
	return len(taken) == batch, err
}

// flushRemovals removes at most a batch of the records of use that were
// dropped.
func (t *Tracker) flushRemovals(ctx context.Context) (more bool, err error) {
	d, u := t.cfg.Directory, t.uses
	u.mu.Lock()
	n := min(len(u.removed), batch)
	ids := slices.Clone(u.removed[:n])
	u.removed = slices.Delete(u.removed, 0, n)
	u.mu.Unlock()
	err = d.Update(ctx, "usage", func(tx *directory.Tx) error {
		for _, id := range ids {
			if old, ok := d.AccessUses.Get(id); ok {
				d.AccessUses.Delete(tx, old)
			}
		}
		return nil
	})
	if err != nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.removed = append(u.removed, ids...)
	}
	return n == batch, err
}

// forget drops the use of identities that are gone, and once a day what has not
// been used for long.
func (u *uses) forget(now time.Time, known func(subjectKey) bool) {
	var ids []string
	u.mu.Lock()
	aging := now.Sub(u.aged) >= 24*time.Hour
	if aging {
		u.aged = now
	}
	u.mu.Unlock()
	oldest := now.Add(-keepUnused)
	for i := range u.shards {
		s := &u.shards[i]
		s.mu.Lock()
		for key, sub := range s.subjects {
			gone := !known(key)
			if !gone && !aging {
				continue
			}
			for k, x := range sub.uses {
				if gone || x.Last.Before(oldest) {
					x.gone = true
					delete(sub.uses, k)
					u.release(key.account)
					ids = append(ids, x.ID)
				}
			}
			if m := sub.missed; m != nil && (gone || m.Last.Before(oldest)) {
				m.gone = true
				sub.missed = nil
				ids = append(ids, m.ID)
			}
			if len(sub.uses) == 0 && sub.missed == nil {
				delete(s.subjects, key)
			}
		}
		s.mu.Unlock()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.removed = append(u.removed, ids...)
}

// known reports whether an identity is still there. Compute resources, and
// services that act under their CRN, are known elsewhere.
func (t *Tracker) known(key subjectKey) bool {
	d := t.cfg.Directory
	switch crn.KindOf(key.iamID) {
	case crn.KindProfile:
		p, ok := d.Profiles.Get(crn.Identifier(key.iamID))
		return ok && p.AccountID == key.account
	case crn.KindServiceID:
		s, ok := d.ServiceIDs.Get(crn.Identifier(key.iamID))
		return ok && s.AccountID == key.account
	case crn.KindUser:
		_, ok := d.Users.Get(directory.UserKey(key.account, key.iamID))
		return ok
	}
	return true
}
