// Command search measures how long a filtered page of the activity log's last
// day takes when the log has ten million events, beside a scan of all documents
// in the same run on the same file.
//
// The events are those of a busy installation: tokens of pods, of which a few in
// a hundred are refused, service IDs' tokens, and people's changes. They go
// through the store as the server's do, in larger commits, and the index is made
// as it is there, beside them. Each query is asked in turn, many times.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/sqlite"
)

type options struct {
	events, days, rounds, commit int
	dir                          string
}

func main() {
	log.SetFlags(0)
	o := options{}
	flag.IntVar(&o.events, "events", 10_000_000, "events in the log; some 2.3 kB of disk each")
	flag.IntVar(&o.days, "days", 10, "days that they are spread over")
	flag.IntVar(&o.rounds, "rounds", 200, "times that each query is asked")
	flag.IntVar(&o.commit, "commit", 4000, "events in one commit")
	flag.StringVar(&o.dir, "dir", "", "`directory` for the file, which is removed at the end; default a new one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := measure(ctx, o)
	stop()
	if err != nil {
		log.Fatal(err)
	}
}

func measure(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "tabard-bench-search-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file := filepath.Join(dir, "tabard.db")
	s, err := sqlite.Open(ctx, file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	m := newMaker(o)
	if err := m.fill(ctx, s); err != nil {
		return err
	}
	if err := settled(ctx, s, m.lastDay()); err != nil {
		return err
	}
	extent, err := s.Extent(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%d events over %d days, %.1f GB\n\n", extent.Size, o.days, float64(extent.Bytes)/1e9)
	queries := m.queries()
	took := make([][]time.Duration, len(queries))
	found := make([]int, len(queries))
	for range o.rounds {
		for i, q := range queries {
			begin := time.Now()
			answer, err := s.Search(ctx, q.Query)
			took[i] = append(took[i], time.Since(begin))
			if err != nil {
				return fmt.Errorf("%s: %w", q.name, err)
			}
			if len(answer.Events) < q.Limit && !answer.Next.IsZero() {
				return fmt.Errorf("%s: the page came back unfinished", q.name)
			}
			found[i] = len(answer.Events)
		}
	}
	all, last, err := scan(ctx, file, m.days())
	if err != nil {
		return err
	}
	fmt.Printf("%-56s %7s %10s %10s %10s %14s\n", "a page of the last day", "events", "p50", "p99", "slowest", "scan of all/p50")
	for i, q := range queries {
		slices.Sort(took[i])
		p50 := quantile(took[i], .5)
		fmt.Printf("%-56s %7d %10s %10s %10s %14.0f\n", q.name, found[i], p50, quantile(took[i], .99), quantile(took[i], 1), float64(all)/float64(p50))
	}
	fmt.Printf("\nscan of the documents of the last day: %s; of all: %s\n", last.Round(time.Millisecond), all.Round(time.Millisecond))
	return nil
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	return sorted[int(q*float64(len(sorted)-1))].Round(10 * time.Microsecond)
}

// settled waits until the index has what it can have: until a search that finds
// nothing looks at few events.
func settled(ctx context.Context, s *sqlite.Store, since time.Time) error {
	begin := time.Now()
	for {
		at := time.Now()
		found, err := s.Search(ctx, store.Query{AllAccounts: true, Target: "nothing has this", Since: since, Limit: 1})
		if err != nil {
			return err
		}
		if found.Next.IsZero() && time.Since(at) < 100*time.Millisecond {
			fmt.Printf("the index was complete %s after the last event\n", time.Since(begin).Round(time.Millisecond))
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// scan looks through all documents, as a log without an index must.
func scan(ctx context.Context, file string, days []int) (all, last time.Duration, err error) {
	db, err := sql.Open("sqlite", "file:"+file+"?mode=ro")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	for _, day := range days {
		begin := time.Now()
		var n int
		if err := db.QueryRowContext(ctx, fmt.Sprintf("SELECT count(*) FROM events_%d WHERE doc LIKE '%%nothing has this%%'", day)).Scan(&n); err != nil {
			return 0, 0, err
		}
		last = time.Since(begin)
		all += last
	}
	return all, last, nil
}

const (
	account = "11111111111111111111111111111111"
	other   = "22222222222222222222222222222222"
	token   = "iam-identity.computeresource-token.login"
	keyed   = "iam-identity.serviceid-apikey.login"
)

var changes = []string{
	"iam-identity.account-profile.create", "iam-identity.account-profile.update", "iam-identity.account-profile-link.create",
	"iam-am.policy.create", "iam-am.policy.delete", "iam-groups.member.add", "is.instance.instance.create", "resource-controller.instance.create",
	"iam-identity.serviceid-apikey.create", "iam-identity.account-serviceid.update",
}

// maker makes the events.
type maker struct {
	o     options
	rand  *rand.Rand
	begin time.Time
	rare  store.Event // an event in the middle of the last day that nothing else is like
}

func newMaker(o options) *maker {
	return &maker{o: o, rand: rand.New(rand.NewPCG(1, 2)), begin: time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)} //nolint:gosec // the same each time
}

func (m *maker) lastDay() time.Time { return m.begin.AddDate(0, 0, m.o.days-1) }

func (m *maker) days() (out []int) {
	for n := range m.o.days {
		out = append(out, store.Day(m.begin.AddDate(0, 0, n)))
	}
	return out
}

func (m *maker) fill(ctx context.Context, s *sqlite.Store) error {
	begin := time.Now()
	span := time.Duration(m.o.days) * 24 * time.Hour
	rareAt := m.o.events - m.o.events/m.o.days/2
	for done := 0; done < m.o.events; {
		b := store.Batch{Events: make([]store.Event, 0, m.o.commit)}
		for len(b.Events) < m.o.commit && done < m.o.events {
			at := m.begin.Add(time.Duration(float64(span) * float64(done) / float64(m.o.events)))
			e, err := store.NewEvent(m.event(at, done == rareAt))
			if err != nil {
				return err
			}
			if done == rareAt {
				m.rare = e
			}
			b.Events = append(b.Events, e)
			done++
		}
		if err := s.Commit(ctx, b); err != nil {
			return err
		}
		if done%(100*m.o.commit) == 0 {
			fmt.Fprintf(os.Stderr, "\r%d of %d events", done, m.o.events)
		}
	}
	fmt.Fprintln(os.Stderr)
	fmt.Printf("%.0f events a second were appended\n", float64(m.o.events)/time.Since(begin).Seconds())
	return nil
}

// event makes one of 300 pods' tokens, mostly; and the rare one, a critical
// change by somebody who does nothing else.
func (m *maker) event(at time.Time, rare bool) *activity.Event {
	e := &activity.Event{
		ID: m.hex(8) + "-" + m.hex(4) + "-" + m.hex(4), Time: activity.Time{Time: at}, AccountID: account, CorrelationID: m.hex(32),
		LogSourceCRN: "crn:v1:bluemix:public:iam-identity:us-south:a/" + account + ":::", Severity: activity.Normal,
		Observer:  activity.Observer{Name: "ActivityTracker"},
		Initiator: activity.Initiator{Host: activity.Host{Address: fmt.Sprintf("10.1.%d.%d", m.rand.IntN(8), m.rand.IntN(250)), AddressType: "IPv4", Agent: "client-go/1.0"}},
	}
	if m.rand.IntN(20) == 0 {
		e.AccountID = other
	}
	status := http.StatusOK
	switch kind := m.rand.IntN(1000); {
	case rare:
		e.AccountID, e.Action, e.Severity = account, "iam-identity.account-settings.update", activity.Critical
		e.Initiator.ID, e.Initiator.AuthnID = "IBMid-RARE", "IBMid-RARE"
		e.Target = activity.Target{ID: "crn:v1:bluemix:public:iam-identity::a/" + account + "::rare:only", Name: "rare"}
		status = http.StatusForbidden
	case kind < 900:
		pod := m.rand.IntN(300)
		profile := fmt.Sprintf("Profile-%08x", pod%40)
		e.Action = token
		e.Initiator.ID, e.Initiator.Name, e.Initiator.TypeURI = "iam-"+profile, fmt.Sprint("profile-", pod%40), activity.ProfileType
		e.Initiator.AuthnName = fmt.Sprintf("cluster:shop:web-%d", pod)
		e.Initiator.AuthnID = "crn-crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":cluster::pod:" + e.Initiator.AuthnName
		e.Target = activity.Target{ID: "crn:v1:bluemix:public:iam-identity::a/" + account + "::profile:" + profile, Name: e.Initiator.Name, TypeURI: "iam-identity/profile"}
		e.RequestData = []byte(`{"grant_type":"urn:ibm:params:oauth:grant-type:cr-token","profile_name":"` + e.Initiator.Name + `"}`)
		e.Trace = activity.Trace{{Name: "signature", Outcome: activity.Pass, Wanted: "a signature by a key of the cluster", Found: "valid"}, {Name: "profile-link", Outcome: activity.Pass, Wanted: "namespace shop", Found: "namespace shop"}}
		if m.rand.IntN(30) == 0 {
			status = http.StatusBadRequest
		}
	case kind < 980:
		n := m.rand.IntN(50)
		e.Action = keyed
		e.Initiator.ID = fmt.Sprintf("iam-ServiceId-%08x", n)
		e.Initiator.AuthnID, e.Initiator.TypeURI = e.Initiator.ID, activity.ServiceIDType
		e.Target = activity.Target{ID: "crn:v1:bluemix:public:iam-identity::a/" + account + "::serviceid:" + e.Initiator.ID, Name: fmt.Sprint("service-", n)}
	default:
		e.Action = changes[m.rand.IntN(len(changes))]
		e.Severity = activity.Warning
		e.Initiator.ID = fmt.Sprintf("IBMid-%04d", m.rand.IntN(200))
		e.Initiator.AuthnID, e.Initiator.TypeURI = e.Initiator.ID, activity.UserType
		e.Target = activity.Target{ID: "crn:v1:bluemix:public:iam-identity::a/" + account + "::object:" + m.hex(12), Name: "object"}
		if m.rand.IntN(20) == 0 {
			status = http.StatusForbidden
		}
	}
	e.Message = "IAM Identity Service: login " + e.Target.Name
	e.SetReason(status, "No policy of the account allows it.")
	return e
}

func (m *maker) hex(n int) string {
	return fmt.Sprintf("%016x%016x", m.rand.Uint64(), m.rand.Uint64())[:n]
}

type query struct {
	name string
	store.Query
}

func (m *maker) queries() []query {
	day := m.lastDay()
	noon := day.Add(12 * time.Hour)
	of := func(change func(*store.Query)) store.Query {
		q := store.Query{AccountID: account, Since: day, Limit: 101}
		change(&q)
		q.Limit = cmp.Or(q.Limit, 101)
		return q
	}
	pod := "crn-crn:v1:bluemix:public:containers-kubernetes:us-south:a/" + account + ":cluster::pod:cluster:shop:web-7"
	return []query{
		{"no filter", of(func(*store.Query) {})},
		{"failures", of(func(q *store.Query) { q.Outcome = activity.Failure })},
		{"an action", of(func(q *store.Query) { q.Action = token })},
		{"actions of a service, by prefix", of(func(q *store.Query) { q.ActionPrefix = "iam-am." })},
		{"actions by a prefix that nearly all have", of(func(q *store.Query) { q.ActionPrefix = "iam-identity." })},
		{"an action, failures", of(func(q *store.Query) { q.Action, q.Outcome = token, activity.Failure })},
		{"critical", of(func(q *store.Query) { q.Severity = activity.Critical })},
		{"critical, but not refused", of(func(q *store.Query) { q.Severity, q.Outcome = activity.Critical, activity.Success })},
		{"a profile", of(func(q *store.Query) { q.Initiator = "iam-Profile-00000007" })},
		{"a pod", of(func(q *store.Query) { q.Authn = pod })},
		{"a pod's failures", of(func(q *store.Query) { q.Authn, q.Outcome = pod, activity.Failure })},
		{"a target", of(func(q *store.Query) {
			q.Target = "crn:v1:bluemix:public:iam-identity::a/" + account + "::profile:Profile-00000007"
		})},
		{"one event in the middle of the day, by initiator", of(func(q *store.Query) { q.Initiator = m.rare.Initiator })},
		{"one event in the middle of the day, by target", of(func(q *store.Query) { q.Target = m.rare.Target })},
		{"one event, by transaction", of(func(q *store.Query) { q.CorrelationID = m.rare.CorrelationID })},
		{"failures of an hour at noon", of(func(q *store.Query) { q.Outcome, q.Since, q.Until = activity.Failure, noon, noon.Add(time.Hour) })},
		{"nothing: two frequent values that never meet", of(func(q *store.Query) { q.Action, q.Initiator = keyed, "iam-Profile-00000007" })},
		{"nothing: a target that is not there", of(func(q *store.Query) { q.Target = "nothing has this" })},
		{"nothing in all days: two that never meet", of(func(q *store.Query) { q.Action, q.Initiator, q.Since = keyed, "iam-Profile-00000007", time.Time{} })},
		{"nothing in all days, by a prefix that nearly all have", of(func(q *store.Query) {
			q.ActionPrefix, q.Initiator, q.Since = "iam-identity.", "nobody", time.Time{}
		})},
	}
}
