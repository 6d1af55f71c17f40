package usage_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store/sqlite"
	"tabard.dev/tabard/internal/usage"
)

const profile = "Profile-0f3b1c2d-1111-4222-8333-444455556666"

// withProfile makes the profile that is used.
func (p *place) withProfile() {
	p.t.Helper()
	if err := p.dir.Update(context.Background(), "test", func(tx *directory.Tx) error {
		p.dir.Profiles.Put(tx, &identity.Profile{ID: profile, AccountID: account, Name: "shop"})
		return nil
	}); err != nil {
		p.t.Fatal(err)
	}
}

// request is one by the profile, on a resource with further attributes.
func request(service, action string, at time.Time, more ...string) access.Request {
	q := access.Request{
		Subject: "iam-" + profile, AccountID: account, Action: action, Time: at,
		Resource: map[string]string{access.AccountID: account, access.ServiceName: service},
	}
	for i := 0; i < len(more); i += 2 {
		q.Resource[more[i]] = more[i+1]
	}
	return q
}

func policy(id string) *access.Policy { return &access.Policy{ID: id, AccountID: account} }

func (p *place) only() access.Use {
	p.t.Helper()
	all := p.Uses(account, "iam-"+profile)
	if len(all) != 1 {
		p.t.Fatalf("%d records of use, want one: %+v", len(all), all)
	}
	return all[0]
}

func TestPermitsCountByPolicyServiceAndAction(t *testing.T) {
	p := start(t)
	p.withProfile()
	now := time.Now().UTC()
	yesterday := now.AddDate(0, 0, -1)
	p.Use(request("is", "is.list", yesterday, access.Region, "us-south"), policy("p1"), usage.Once)
	p.Use(request("is", "is.list", now, access.Region, "eu-de"), policy("p1"), usage.Once)
	p.Use(request("is", "is.list", now, access.Region, "jp-tok"), policy("p1"), usage.Again) // of the same request
	p.Use(request("is", "is.create", now), policy("p1"), usage.Once)
	p.Use(request("kms", "is.list", now), policy("p1"), usage.Once)
	p.Use(request("is", "is.list", now), policy("p2"), usage.Once)
	check := func() {
		t.Helper()
		all := p.Uses(account, "iam-"+profile)
		var got []string
		for _, u := range all {
			got = append(got, fmt.Sprint(u.PolicyID, " ", u.Service, " ", u.Action, " ", u.Count))
		}
		if want := []string{"p1 is is.create 1", "p1 is is.list 2", "p1 kms is.list 1", "p2 is is.list 1"}; !slices.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
		u := all[1]
		if !u.First.Equal(yesterday) || !u.Last.Equal(now) || u.Days.Len() != 2 || !slices.Equal(u.Touched.Region.List, []string{"us-south", "eu-de", "jp-tok"}) || !u.Touched.ServiceInstance.Absent {
			t.Errorf("%+v", u)
		}
	}
	check()
	p.flush()
	p.restart()
	check()
	if other := p.Uses("bbbb", ""); len(other) != 0 {
		t.Errorf("another account sees %+v", other)
	}
	if whole := p.Uses(account, ""); len(whole) != 4 {
		t.Errorf("the account sees %+v", whole)
	}
	p.Use(request("is", "is.list", now, access.Region, "us-east"), policy("p1"), usage.Once)
	p.flush()
	p.restart()
	if u := p.Uses(account, "")[1]; u.Count != 3 || len(u.Touched.Region.List) != 4 {
		t.Errorf("%+v", u)
	}
}

func TestWhenCountingBeganIsRemembered(t *testing.T) {
	p := start(t)
	began := p.Since()
	if began.IsZero() {
		t.Fatal("it never began")
	}
	p.flush()
	p.restart()
	if !p.Since().Equal(began) {
		t.Errorf("%s, want %s", p.Since(), began)
	}
	if n, at := p.Of("access"); n != 0 || !at.IsZero() {
		t.Errorf("the record of that is a count: %d, %s", n, at)
	}
	var none *usage.Tracker
	none.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	if none.Uses(account, "") != nil || !none.Since().IsZero() {
		t.Error("a nil tracker knows something")
	}
}

// A caller who makes up names of services and values of attributes gets so many
// records and no more; others are not touched, and he is said to have more use
// than is known.
func TestACallerCannotFillTheMemory(t *testing.T) {
	p := start(t)
	p.withProfile()
	now := time.Now()
	for i := range usage.MaxUsesPerSubject + 500 {
		p.Use(request(fmt.Sprint("service-", i), "iam.policy.read", now), policy("p"), usage.Once)
	}
	p.Use(request(strings.Repeat("s", 10_000), "iam.policy.read", now), policy("p"), usage.Once)
	for i := range 1000 {
		p.Use(request("service-0", "iam.policy.read", now, access.Region, fmt.Sprint("r", i), access.ServiceInstance, strings.Repeat("i", 2000)), policy("p"), usage.Again)
	}
	other := request("is", "is.list", now)
	other.Subject = "iam-ServiceId-0f3b"
	p.Use(other, policy("p"), usage.Once)
	check := func() {
		t.Helper()
		all := p.Uses(account, "iam-"+profile)
		if len(all) != usage.MaxUsesPerSubject+1 {
			t.Fatalf("%d records", len(all))
		}
		missed := all[0]
		if missed.Action != "" || missed.Count != 501 {
			t.Errorf("%+v", missed)
		}
		for _, u := range all {
			if n := len(u.Touched.Region.List) + len(u.Touched.ServiceInstance.List); n > access.MaxTouched || len(u.Service) > 200 {
				t.Errorf("%+v", u)
			}
		}
		if others := p.Uses(account, other.Subject); len(others) != 1 || others[0].Count != 1 {
			t.Errorf("%+v", others)
		}
	}
	check()
}

// The services that act under their CRN are named by whoever asks for a
// decision. They share one subject.
func TestMadeUpServicesShareOneSubject(t *testing.T) {
	p := start(t)
	for i := range 3 * usage.MaxUsesPerSubject {
		q := request("kms", "kms.read", time.Now())
		q.Subject = fmt.Sprintf("crn-crn:v1:bluemix:public:lib:us-south:a/%s:instance-%d::", account, i)
		p.Use(q, policy("p"), usage.Once)
	}
	if all := p.Uses(account, ""); len(all) != 1 || all[0].Subject != "crn" || all[0].Count != 3*usage.MaxUsesPerSubject {
		t.Errorf("%d records: %+v", len(all), all[0])
	}
}

func TestTheUseOfAnIdentityThatIsGoneIsRemoved(t *testing.T) {
	p := start(t)
	p.withProfile()
	p.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	p.flush()
	if p.dir.AccessUses.Len() != 1 {
		t.Fatal("nothing was written")
	}
	if err := p.dir.Update(context.Background(), "test", func(tx *directory.Tx) error {
		it, _ := p.dir.Profiles.Get(profile)
		p.dir.Profiles.Delete(tx, it)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	// A write that fails leaves it to the next one, and so does a crash.
	p.store.failAfter(0)
	p.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	_ = p.Flush(context.Background())
	p.store.failAfter(-1)
	p.flush()
	if left := p.dir.AccessUses.Len(); left != 0 || len(p.Uses(account, "")) != 0 {
		t.Errorf("%d records are left, and in memory %+v", left, p.Uses(account, ""))
	}
}

func TestUseOfWhomNobodyKnowsIsRemovedAfterACrash(t *testing.T) {
	p := start(t)
	p.withProfile()
	p.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	p.flush()
	if err := p.dir.Update(context.Background(), "test", func(tx *directory.Tx) error {
		it, _ := p.dir.Profiles.Get(profile)
		p.dir.Profiles.Delete(tx, it)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p.restart()
	p.flush()
	if left := p.dir.AccessUses.Len(); left != 0 {
		t.Errorf("%d records are left", left)
	}
}

func TestUseOfMoreThanAYearAgoIsForgotten(t *testing.T) {
	p := start(t)
	p.withProfile()
	p.Use(request("is", "is.list", time.Now().AddDate(-2, 0, 0)), policy("p"), usage.Once)
	p.Use(request("is", "is.create", time.Now().AddDate(0, 0, -400)), policy("p"), usage.Once)
	p.flush()
	if u := p.only(); u.Action != "is.create" {
		t.Errorf("%+v", u)
	}
	p.restart()
	if u := p.only(); u.Action != "is.create" {
		t.Errorf("%+v", u)
	}
}

func TestUseThatCouldNotBeWrittenIsWrittenLater(t *testing.T) {
	p := start(t)
	p.withProfile()
	p.flush()
	p.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	p.store.failAfter(0)
	if err := p.Flush(context.Background()); err == nil {
		t.Fatal("no error")
	}
	p.store.failAfter(-1)
	p.Use(request("is", "is.list", time.Now()), policy("p"), usage.Once)
	p.flush()
	p.restart()
	if u := p.only(); u.Count != 2 {
		t.Errorf("%+v", u)
	}
}

func TestNoUseIsLostUnderConcurrency(t *testing.T) {
	p := start(t)
	p.withProfile()
	stop := make(chan struct{})
	var writer, users sync.WaitGroup
	writer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = p.Flush(context.Background())
			}
		}
	})
	const sides, rounds = 8, 500
	for side := range sides {
		users.Go(func() {
			for i := range rounds {
				p.Use(request("is", "is.list", time.Now(), access.Region, fmt.Sprint("r", i%20)), policy("p"), usage.Once)
				if side == 0 && i%50 == 0 {
					p.Uses(account, "")
				}
			}
		})
	}
	users.Wait()
	close(stop)
	writer.Wait()
	p.flush()
	p.restart()
	if u := p.only(); u.Count != sides*rounds || !u.Touched.Region.Many || len(u.Touched.Region.List) != access.MaxTouched {
		t.Errorf("%+v", u)
	}
}

func BenchmarkPermit(b *testing.B) {
	tracker := startBench(b)
	now := time.Now()
	q := request("is", "is.list", now, access.Region, "us-south", access.ResourceGroupID, strings.Repeat("a", 32), access.ResourceType, "instance")
	by := policy("p")
	b.Run("policy", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tracker.Permit(by.ID, now)
		}
	})
	b.Run("policy and action", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tracker.Permit(by.ID, now)
			tracker.Use(q, by, usage.Once)
		}
	})
	b.Run("one more resource of a request", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			tracker.Use(q, by, usage.Again)
		}
	})
	for name, use := range map[string]func(){
		"policy, in parallel": func() { tracker.Permit(by.ID, now) }, "policy and action, in parallel": func() { tracker.Permit(by.ID, now); tracker.Use(q, by, usage.Once) },
	} {
		b.Run(name, func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					use()
				}
			})
		})
	}
}

// startBench returns a tracker whose counts are never written.
func startBench(b *testing.B) *usage.Tracker {
	b.Helper()
	s, err := sqlite.Open(b.Context(), filepath.Join(b.TempDir(), "tabard.db"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	catalog, err := access.ParseCatalog(access.Builtin())
	if err != nil {
		b.Fatal(err)
	}
	d, err := directory.Open(b.Context(), directory.Config{Store: s, Catalog: catalog, Now: time.Now})
	if err != nil {
		b.Fatal(err)
	}
	tracker, err := usage.Open(b.Context(), usage.Config{Directory: d, Now: time.Now}, s)
	if err != nil {
		b.Fatal(err)
	}
	return tracker
}
