// Package retention removes what has had its time: deleted policies that can
// no longer be restored, API keys long expired, memberships that ended,
// instances whose reclamation is due. Each removal stands in the activity log
// of its account.
package retention

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/resource"
)

// How long things are kept.
const (
	// DeletedPolicies can be restored for this long
	// (reference/access-and-audit.md section 1.8).
	DeletedPolicies = 10 * 24 * time.Hour
	// ExpiredKeys stay for this long after they expired and were changed last
	// (reference/iam-identity.md section 4.7).
	ExpiredKeys = 90 * 24 * time.Hour
	// Reclamation is how long a deleted instance can be restored.
	Reclamation = 7 * 24 * time.Hour
)

// batch bounds the removals of one transaction, so that other writers need not
// wait long.
const batch = 200

// Sweeper removes things on behalf of the installation.
type Sweeper struct {
	Directory *directory.Directory
	Names     crn.Names
	Now       func() time.Time
	Log       *slog.Logger
	Every     time.Duration // between two sweeps; 0 means a minute
}

// Run sweeps until the context ends.
func (s *Sweeper) Run(ctx context.Context) {
	every := s.Every
	if every == 0 {
		every = time.Minute
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if err := s.Sweep(ctx); err != nil && ctx.Err() == nil {
			s.Log.Warn("what has had its time could not be removed; it is tried again", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// removal is one object that is due: it is looked up again inside the
// transaction, in case somebody changed it in the meantime.
type removal func(tx *directory.Tx)

// Sweep removes everything that is due now.
func (s *Sweeper) Sweep(ctx context.Context) error {
	due := s.due(s.Now())
	for len(due) > 0 {
		n := min(batch, len(due))
		err := s.Directory.Update(ctx, by, func(tx *directory.Tx) error {
			for _, remove := range due[:n] {
				remove(tx)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("remove what is due: %w", err)
		}
		due = due[n:]
	}
	return nil
}

// by is who changes, in the objects and events of a sweep.
const by = "tabard"

func (s *Sweeper) due(now time.Time) []removal {
	var out []removal
	d := s.Directory
	for _, p := range d.Policies.All() {
		if PolicyDue(p, now) {
			out = append(out, func(tx *directory.Tx) {
				if p, ok := d.Policies.Get(p.ID); ok && PolicyDue(p, now) {
					d.Policies.Delete(tx, p)
					s.record(tx, p.AccountID, "iam-am.policy.purge", "iam-am/policy", "iam-access-management", "policy", p.ID, p.ID)
				}
			})
		}
	}
	for _, k := range d.APIKeys.All() {
		if k.ExpiresAt.IsZero() || now.Sub(k.ExpiresAt) < ExpiredKeys || now.Sub(k.ModifiedAt) < ExpiredKeys {
			continue
		}
		out = append(out, func(tx *directory.Tx) {
			if same, ok := d.APIKeys.Get(k.ID); ok && same.Revision == k.Revision {
				d.APIKeys.Delete(tx, same)
				s.record(tx, k.AccountID, "iam-identity."+kindOfKey(k.IAMID)+".delete", "iam-identity/apikey", "iam-identity", "apikey", k.ID, k.Name)
			}
		})
	}
	for _, m := range d.Memberships.All() {
		if membershipOver(m, now) {
			out = append(out, func(tx *directory.Tx) {
				if same, ok := d.Memberships.Get(directory.UserKey(m.AccountID, m.IAMID)); ok && same.Revision == m.Revision {
					d.Memberships.Delete(tx, same)
				}
			})
		}
	}
	for _, r := range d.Reclamations.All() {
		if !now.Before(r.At) {
			out = append(out, func(tx *directory.Tx) { s.reclaim(tx, r) })
		}
	}
	return out
}

// PolicyDue reports whether a deleted policy can no longer be restored.
func PolicyDue(p *access.Policy, now time.Time) bool {
	deleted := p.DeletedAt
	if deleted.IsZero() {
		deleted = p.ModifiedAt // deleted by a program that did not write down when
	}
	return p.State == access.Deleted && now.Sub(deleted) >= DeletedPolicies
}

func membershipOver(m *access.Membership, now time.Time) bool {
	for _, g := range m.Groups {
		if now.Before(g.Until) {
			return false
		}
	}
	return true
}

func kindOfKey(iamID string) string {
	if crn.KindOf(iamID) == crn.KindServiceID {
		return "serviceid-apikey"
	}
	return "user-apikey"
}

func (s *Sweeper) reclaim(tx *directory.Tx, r *resource.Reclamation) {
	same, ok := s.Directory.Reclamations.Get(r.ID)
	if !ok || same.Revision != r.Revision {
		return
	}
	s.Directory.Reclamations.Delete(tx, same)
	i, ok := s.Directory.Resources.Get(r.InstanceGUID)
	if !ok || i.State != resource.StateReclamation {
		return
	}
	gone := *i
	gone.State, gone.DeletedAt, gone.DeletedBy = resource.StateRemoved, tx.Now, by
	gone.LastOp = resource.LastOperation{Type: "reclaim", State: "succeeded"}
	s.Directory.Resources.Put(tx, &gone)
	s.event(tx, i.AccountID, i.Service+".instance.delete", i.Service+"/instance", i.CRN, i.Name)
}

func (s *Sweeper) record(tx *directory.Tx, account, action, typeURI, service, resourceType, id, name string) {
	s.event(tx, account, action, typeURI, s.Names.Of(service, "", account, "", resourceType, id).String(), name)
}

func (s *Sweeper) event(tx *directory.Tx, account, action, typeURI, target, name string) {
	service, _, _ := strings.Cut(action, ".")
	e := &activity.Event{
		ID: uuid.NewString(), Time: activity.Time{Time: tx.Now}, Action: action, AccountID: account,
		Message:       "Retention: " + action[strings.LastIndexByte(action, '.')+1:] + " " + name,
		Severity:      activity.Critical,
		CorrelationID: strings.ReplaceAll(uuid.NewString(), "-", ""),
		LogSourceCRN:  s.Names.Of(service, "global", account, "", "", "").String(),
		Initiator:     activity.Initiator{ID: by, Name: by, TypeURI: activity.UnknownType},
		Target:        activity.Target{ID: target, Name: name, TypeURI: typeURI},
		Observer:      activity.Observer{Name: "ActivityTracker"},
	}
	e.SetReason(204, "")
	tx.Record(e)
}
