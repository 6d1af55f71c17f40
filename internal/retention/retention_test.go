package retention_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/api/iampolicy"
	"tabard.dev/tabard/internal/api/resourcecontroller"
	"tabard.dev/tabard/internal/crn"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/resource"
	"tabard.dev/tabard/internal/retention"
)

type yard struct {
	*apitest.Env
	d       *directory.Directory
	sweeper *retention.Sweeper
	now     time.Time // of the sweeper
}

func start(t *testing.T) *yard {
	t.Helper()
	y := &yard{Env: apitest.New(t), now: time.Now()}
	y.d = y.Config.Directory
	y.sweeper = &retention.Sweeper{Directory: y.d, Names: crn.DefaultNames, Now: func() time.Time { return y.now }, Log: slog.New(slog.DiscardHandler)}
	return y
}

func (y *yard) update(f func(tx *directory.Tx)) {
	y.T.Helper()
	if err := y.d.Update(context.Background(), y.Owner.IAMID, func(tx *directory.Tx) error { f(tx); return nil }); err != nil {
		y.T.Fatal(err)
	}
}

func (y *yard) sweep() {
	y.T.Helper()
	if err := y.sweeper.Sweep(y.T.Context()); err != nil {
		y.T.Fatal(err)
	}
}

// removals are the events of sweeps, the newest first.
func (y *yard) removals() []activity.Event {
	return slices.DeleteFunc(y.Events(1000), func(e activity.Event) bool { return e.Initiator.ID != "tabard" })
}

func (y *yard) wantRemovals(want ...string) {
	y.T.Helper()
	got := []string{}
	for _, e := range y.removals() {
		got = append(got, e.Action+" "+e.Target.Name)
		if e.Outcome != activity.Success || e.CorrelationID == "" || e.Severity != activity.Critical || !strings.HasPrefix(e.Target.ID, "crn:v1:") || e.AccountID != y.Owner.AccountID {
			y.T.Errorf("event %+v", e)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		y.T.Errorf("events %q, want %q", got, want)
	}
}

func (y *yard) policy(id, state string, deleted time.Time) *access.Policy {
	y.T.Helper()
	p := &access.Policy{
		ID: id, AccountID: y.Owner.AccountID, API: 1, Type: access.TypeAccess, State: state, DeletedAt: deleted,
		Subject: []access.Attribute{{Key: access.IAMID, Operator: access.StringEquals, Value: access.Text(y.Owner.IAMID)}},
		Resource: []access.Attribute{
			{Key: access.ServiceName, Operator: access.StringEquals, Value: access.Text("kms")},
			{Key: access.AccountID, Operator: access.StringEquals, Value: access.Text(y.Owner.AccountID)},
		},
		Roles: []string{access.PlatformRoleCRN("Viewer")},
	}
	y.update(func(tx *directory.Tx) { y.d.Policies.Put(tx, p) })
	return p
}

func (y *yard) key(id, iamID string, expires time.Time) *identity.APIKey {
	y.T.Helper()
	k := &identity.APIKey{ID: id, AccountID: y.Owner.AccountID, IAMID: iamID, Name: "name of " + id, Hash: id, ExpiresAt: expires}
	y.update(func(tx *directory.Tx) { y.d.APIKeys.Put(tx, k) })
	return k
}

func (y *yard) instance(guid, state string, at time.Time) (*resource.Instance, *resource.Reclamation) {
	y.T.Helper()
	i := &resource.Instance{
		GUID: guid, CRN: crn.DefaultNames.Of("kms", "us-south", y.Owner.AccountID, guid, "", "").String(), AccountID: y.Owner.AccountID,
		Name: "name of " + guid, Service: "kms", State: state, ReclaimAt: at,
	}
	r := &resource.Reclamation{ID: "reclamation-" + guid, AccountID: i.AccountID, InstanceGUID: guid, InstanceCRN: i.CRN, State: "SCHEDULED", At: at}
	y.update(func(tx *directory.Tx) {
		y.d.Resources.Put(tx, i)
		y.d.Reclamations.Put(tx, r)
	})
	return i, r
}

const day = 24 * time.Hour

func TestADeletedPolicyIsRemovedAfterTenDays(t *testing.T) {
	y := start(t)
	now := y.now
	y.policy("deleted", access.Deleted, now)
	y.policy("active", access.Active, time.Time{})
	y.policy("revived", access.Active, now.Add(-20*day))
	y.sweep()
	y.now = now.Add(retention.DeletedPolicies - time.Nanosecond)
	y.sweep()
	if _, ok := y.d.Policies.Get("deleted"); !ok {
		t.Fatal("it was removed before its time")
	}
	y.wantRemovals()
	y.now = now.Add(retention.DeletedPolicies)
	y.sweep()
	y.sweep()
	if _, ok := y.d.Policies.Get("deleted"); ok {
		t.Error("it is still there")
	}
	for _, id := range []string{"active", "revived"} {
		if _, ok := y.d.Policies.Get(id); !ok {
			t.Errorf("the policy %s is gone", id)
		}
	}
	y.wantRemovals("iam-am.policy.purge deleted")
}

// Policies that an older program deleted do not say when.
func TestAPolicyDeletedByAnOlderProgramIsKeptFromItsLastChange(t *testing.T) {
	y := start(t)
	y.policy("old", access.Deleted, time.Time{})
	y.now = y.now.Add(9 * day)
	y.sweep()
	if _, ok := y.d.Policies.Get("old"); !ok {
		t.Fatal("it was removed at once")
	}
	y.now = y.now.Add(2 * day)
	y.sweep()
	if _, ok := y.d.Policies.Get("old"); ok {
		t.Error("it is still there")
	}
}

func TestAnAPIKeyIsRemovedNinetyDaysAfterItExpiredAndWasChanged(t *testing.T) {
	y := start(t)
	now := y.now
	y.key("ApiKey-user", "IBMid-1", now.Add(-365*day)) // expired long ago, changed now
	y.key("ApiKey-service", "iam-ServiceId-1", now.Add(day))
	y.key("ApiKey-forever", "IBMid-1", time.Time{})
	y.sweep()
	y.now = now.Add(retention.ExpiredKeys - time.Minute)
	y.sweep()
	y.wantRemovals()
	y.now = now.Add(retention.ExpiredKeys + time.Minute)
	y.sweep()
	y.wantRemovals("iam-identity.user-apikey.delete name of ApiKey-user")
	y.now = now.Add(retention.ExpiredKeys + day)
	y.sweep()
	y.wantRemovals("iam-identity.user-apikey.delete name of ApiKey-user", "iam-identity.serviceid-apikey.delete name of ApiKey-service")
	for id, want := range map[string]bool{"ApiKey-user": false, "ApiKey-service": false, "ApiKey-forever": true} {
		if _, ok := y.d.APIKeys.Get(id); ok != want {
			t.Errorf("%s is there: %t", id, ok)
		}
	}
	if _, ok := y.d.APIKeysByHash.One("ApiKey-user"); ok {
		t.Error("a removed key is found by its hash")
	}
}

func TestAMembershipGoesWhenItsLastGroupIsOver(t *testing.T) {
	y := start(t)
	now := y.now
	member := func(id string, until ...time.Duration) {
		m := &access.Membership{AccountID: y.Owner.AccountID, IAMID: id}
		for n, d := range until {
			m.Groups = append(m.Groups, access.DynamicMember{GroupID: fmt.Sprint("AccessGroupId-", n), Until: now.Add(d)})
		}
		y.update(func(tx *directory.Tx) { y.d.Memberships.Put(tx, m) })
	}
	member("IBMid-over", -time.Hour)
	member("IBMid-half", -time.Hour, time.Hour)
	member("IBMid-now", 0)
	y.sweep()
	for id, want := range map[string]bool{"IBMid-over": false, "IBMid-half": true, "IBMid-now": false} {
		if _, ok := y.d.Memberships.Get(directory.UserKey(y.Owner.AccountID, id)); ok != want {
			t.Errorf("%s is there: %t", id, ok)
		}
	}
	y.wantRemovals()
}

func TestAnInstanceIsRemovedWhenItsReclamationIsDue(t *testing.T) {
	y := start(t)
	due, _ := y.instance("due", resource.StateReclamation, y.now)
	y.instance("later", resource.StateReclamation, y.now.Add(time.Nanosecond))
	y.instance("restored", resource.StateActive, y.now)
	y.update(func(tx *directory.Tx) {
		y.d.Reclamations.Put(tx, &resource.Reclamation{ID: "orphan", AccountID: y.Owner.AccountID, InstanceGUID: "gone", At: y.now})
	})
	y.sweep()
	for guid, want := range map[string]string{"due": resource.StateRemoved, "later": resource.StateReclamation, "restored": resource.StateActive} {
		i, _ := y.d.Resources.Get(guid)
		if i.State != want {
			t.Errorf("%s is %s, want %s", guid, i.State, want)
		}
	}
	i, _ := y.d.Resources.Get("due")
	if i.DeletedAt.IsZero() || i.DeletedBy != "tabard" || i.LastOp.Type != "reclaim" || i.LastOp.State != "succeeded" {
		t.Errorf("instance %+v", i)
	}
	if n := y.d.Reclamations.Len(); n != 1 {
		t.Errorf("%d reclamations, want the one of later", n)
	}
	y.wantRemovals("kms.instance.delete name of due")
	if e := y.removals()[0]; e.Target.ID != due.CRN {
		t.Errorf("target %+v", e.Target)
	}
}

func TestASweepOfThousandsRemovesThemAll(t *testing.T) {
	y := start(t)
	const n = 1001
	y.update(func(tx *directory.Tx) {
		for i := range n {
			y.d.Memberships.Put(tx, &access.Membership{AccountID: y.Owner.AccountID, IAMID: fmt.Sprint("IBMid-", i)})
		}
	})
	y.sweep()
	if left := y.d.Memberships.Len(); left != 0 {
		t.Errorf("%d are left", left)
	}
}

// Whoever restores a policy at the moment in which it is removed has either
// restored it, and it stays, or is told that there is none.
func TestAPolicyIsRestoredOrRemovedAndNeverBoth(t *testing.T) {
	y := start(t)
	iampolicy.Register(y.Mux, y.Config)
	restored, removed := 0, 0
	for range 60 {
		id := uuid.NewString()
		p := y.policy(id, access.Deleted, time.Now().Add(100*time.Millisecond-retention.DeletedPolicies))
		y.now = time.Now().Add(time.Second)
		var answer *apitest.Response
		var wg sync.WaitGroup
		wg.Go(func() { y.sweep() })
		wg.Go(func() {
			answer = y.Do(apitest.Request{
				Method: "PATCH", Path: "/v1/policies/" + id, Body: map[string]string{"state": "active"}, Header: map[string]string{"If-Match": p.Tag(id)},
			})
		})
		wg.Wait()
		status := answer.Status
		now, there := y.d.Policies.Get(id)
		purged := slices.ContainsFunc(y.removals(), func(e activity.Event) bool { return e.Target.Name == id })
		switch {
		case status == 200 && there && now.State == access.Active && !purged:
			restored++
			y.update(func(tx *directory.Tx) { y.d.Policies.Delete(tx, now) })
		case status == 404 && !there && purged, status == 409 && !there && purged:
			removed++
		default:
			t.Fatalf("status %d, there %t (%+v), purged %t: %s", status, there, now, purged, answer.Raw)
		}
	}
	t.Logf("%d restored, %d removed", restored, removed)
}

func TestAnInstanceIsRestoredOrRemovedAndNeverBoth(t *testing.T) {
	y := start(t)
	resourcecontroller.Register(y.Mux, y.Config, y.Sealer)
	restored, removed := 0, 0
	for n := range 60 {
		guid := uuid.NewString()
		_, r := y.instance(guid, resource.StateReclamation, y.now)
		var status int
		var wg sync.WaitGroup
		wg.Go(func() {
			if n%2 == 0 {
				time.Sleep(time.Duration(n*10) * time.Microsecond)
			}
			y.sweep()
		})
		wg.Go(func() {
			status = y.Do(apitest.Request{Method: "POST", Path: "/v1/reclamations/" + r.ID + "/actions/restore", Body: "{}"}).Status
		})
		wg.Wait()
		now, _ := y.d.Resources.Get(guid)
		gone := slices.ContainsFunc(y.removals(), func(e activity.Event) bool { return e.Target.ID == now.CRN })
		switch {
		case status == 200 && now.State == resource.StateActive && !gone:
			restored++
		case status >= 400 && status < 500 && now.State == resource.StateRemoved && gone:
			removed++
		default:
			t.Fatalf("status %d, state %s, removed %t", status, now.State, gone)
		}
	}
	t.Logf("%d restored, %d removed", restored, removed)
}

func TestAKeyThatIsChangedInTheMeantimeStays(t *testing.T) {
	y := start(t)
	for range 40 {
		id := "ApiKey-" + uuid.NewString()
		k := y.key(id, "IBMid-1", y.now.Add(-time.Hour))
		y.now = time.Now().Add(retention.ExpiredKeys + time.Hour)
		var wg sync.WaitGroup
		wg.Go(func() { y.sweep() })
		wg.Go(func() {
			_ = y.d.Update(context.Background(), "x", func(tx *directory.Tx) error {
				if _, ok := y.d.APIKeys.Get(id); ok {
					next := *k
					next.ExpiresAt = time.Time{}
					y.d.APIKeys.Put(tx, &next)
				}
				return nil
			})
		})
		wg.Wait()
		if now, ok := y.d.APIKeys.Get(id); ok && !now.ExpiresAt.IsZero() {
			t.Fatalf("key %+v", now)
		}
		removed := slices.ContainsFunc(y.removals(), func(e activity.Event) bool { return strings.HasSuffix(e.Target.Name, id) })
		if _, ok := y.d.APIKeys.Get(id); ok == removed {
			t.Fatalf("the key is there: %t, and was removed: %t", ok, removed)
		}
	}
}

func TestRunSweepsUntilItIsEnded(t *testing.T) {
	y := start(t)
	y.policy("deleted", access.Deleted, y.now.Add(-11*day))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	y.sweeper.Every = time.Millisecond
	go func() { y.sweeper.Run(ctx); close(done) }()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, ok := y.d.Policies.Get("deleted"); !ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it was not removed")
		}
	}
	cancel()
	<-done
}
