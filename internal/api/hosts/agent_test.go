package hosts_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/vpc"
)

func TestAgentsRoutesAreForAgents(t *testing.T) {
	s := start(t)
	for _, path := range []string{link.PathReports, link.PathEvents, link.PathExchange, link.PathFound} {
		for _, as := range []string{s.Owner.IAMID, "iam-Profile-1", "iam-Host-1"} {
			if r := s.Do(apitest.Request{Method: "POST", Path: path, As: as, Body: map[string]any{}}); r.Status != http.StatusUnauthorized {
				t.Errorf("%s as %s: %d %s", path, as, r.Status, r.Raw)
			}
		}
	}
}

func TestAHostGetsTokensForItsOwnInstancesAlone(t *testing.T) {
	s := start(t)
	h, other := s.host("rack1"), s.host("rack2")
	mine, neighbour, foreign := s.instance(h.id, vpc.Running), s.instance(h.id, vpc.Running), s.instance(other.id, vpc.Running)
	profile := s.profile(mine)
	stopped := s.instance(h.id, vpc.Stopped)
	h.exchange(mine, h.identityToken(mine), profile).Want(200)
	for name, tt := range map[string]struct {
		r      link.Exchange
		status int
	}{
		"another host's instance":              {link.Exchange{Instance: foreign.ID, Token: h.identityToken(foreign), Address: "10.240.0.1"}, 404},
		"another host's, signed by that host":  {link.Exchange{Instance: foreign.ID, Token: other.identityToken(foreign), Address: foreign.Interfaces[0].Address.String()}, 404},
		"nothing":                              {link.Exchange{Instance: "0717_x", Token: h.identityToken(mine)}, 404},
		"the neighbour's token":                {link.Exchange{Instance: mine.ID, Token: h.identityToken(neighbour), Address: mine.Interfaces[0].Address.String()}, 401},
		"a token that another host has signed": {link.Exchange{Instance: mine.ID, Token: other.identityToken(mine), Address: mine.Interfaces[0].Address.String()}, 401},
		"one that does not run":                {link.Exchange{Instance: stopped.ID, Token: h.identityToken(stopped), Address: stopped.Interfaces[0].Address.String()}, 401},
		"the neighbour's address":              {link.Exchange{Instance: mine.ID, Token: h.identityToken(mine), Address: neighbour.Interfaces[0].Address.String()}, 400},
		"no address":                           {link.Exchange{Instance: mine.ID, Token: h.identityToken(mine)}, 400},
		"no token":                             {link.Exchange{Instance: mine.ID, Address: mine.Interfaces[0].Address.String()}, 401},
		"its own with an event of its neighbour": {link.Exchange{
			Instance: mine.ID, Token: h.identityToken(mine), Address: mine.Interfaces[0].Address.String(), Event: event(s, foreign),
		}, 400},
	} {
		tt.r.ProfileID = profile
		if r := h.do("POST", link.PathExchange, tt.r); r.Status != tt.status || strings.Contains(string(r.Raw), "access_token") {
			t.Errorf("%s: %d %s", name, r.Status, r.Raw)
		}
	}
	s.change(mine.ID, func(i *vpc.Instance) { i.Status = vpc.Stopping })
	if r := h.exchange(mine, h.identityToken(mine), profile); r.Status != http.StatusUnauthorized {
		t.Errorf("once it stops: %d %s", r.Status, r.Raw)
	}
}

func TestAHostReportsOnItsOwnAndOnlyWhatFollows(t *testing.T) {
	s := start(t)
	h, other := s.host("rack1"), s.host("rack2")
	statuses := []string{vpc.Pending, vpc.Starting, vpc.Running, vpc.Restarting, vpc.Stopping, vpc.Stopped, vpc.Failed, vpc.Deleting, ""}
	allowed := map[string][]string{
		vpc.Pending: {vpc.Running, vpc.Failed}, vpc.Starting: {vpc.Running, vpc.Failed}, vpc.Restarting: {vpc.Running, vpc.Failed},
		vpc.Running: {vpc.Stopped, vpc.Failed}, vpc.Stopping: {vpc.Stopped}, vpc.Deleting: {""},
	}
	for _, seen := range statuses {
		for _, status := range statuses {
			if seen == "" {
				continue
			}
			i := s.instance(h.id, seen)
			r := h.do("POST", link.PathReports, vpc.Report{InstanceID: i.ID, Seen: seen, Status: status})
			now, there := s.d.Instances.Get(i.ID)
			switch may := slices.Contains(allowed[seen], status); {
			case may && (r.Status != 204 || status == "" && there || status != "" && now.Status != status):
				t.Errorf("%s to %q: %d %s", seen, status, r.Status, r.Raw)
			case !may && (r.Status != 400 || !there || now.Status != seen):
				t.Errorf("%s to %q: %d %s", seen, status, r.Status, r.Raw)
			}
		}
	}
	foreign := s.instance(other.id, vpc.Deleting)
	for name, r := range map[string]vpc.Report{
		"another host's": {InstanceID: foreign.ID, Seen: vpc.Deleting}, "nothing": {InstanceID: "x", Seen: vpc.Running, Status: vpc.Stopped},
	} {
		if got := h.do("POST", link.PathReports, r); got.Status != http.StatusNotFound {
			t.Errorf("%s: %d %s", name, got.Status, got.Raw)
		}
	}
	if _, ok := s.d.Instances.Get(foreign.ID); !ok {
		t.Error("a host has deleted another one's instance")
	}
	i := s.instance(h.id, vpc.Running)
	h.do("POST", link.PathReports, vpc.Report{InstanceID: i.ID, Seen: vpc.Starting, Status: vpc.Failed}).Want(204)
	if now, _ := s.d.Instances.Get(i.ID); now.Status != vpc.Running {
		t.Error("a report that came too late changed something")
	}
	for _, reason := range []string{"two\nlines", "\x1b[31m", strings.Repeat("x", 501)} {
		if r := h.do("POST", link.PathReports, vpc.Report{InstanceID: i.ID, Seen: vpc.Running, Status: vpc.Failed, Reason: reason}); r.Status != 400 {
			t.Errorf("reason %q: %d", reason, r.Status)
		}
	}
}

// of returns the events about an instance.
func of(s *stack, i *vpc.Instance) []activity.Event {
	return slices.DeleteFunc(s.Events(1000), func(e activity.Event) bool { return e.Target.ID != i.CRN })
}

func TestEventsAreRecordedOnceAsTheServerKnowsTheInstance(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	sent := []any{event(s, i), event(s, i), event(s, i)}
	lie := sent[1].(*activity.Event)
	lie.AccountID, lie.Initiator.ID, lie.Initiator.Name, lie.Target.Name, lie.Severity = s.Other.AccountID, "iam-"+s.Owner.IAMID, "root", "x", "none"
	lie.Initiator.Host.Address, lie.Observer.Name, lie.LogSourceCRN = "203.0.113.1", "me", "crn:v1:x"
	lie.Initiator.Credential.Type = "apikey"
	sent[2].(*activity.Event).SetReason(http.StatusForbidden, "no")
	for n, tt := range []struct {
		first    int64
		events   []any
		recorded float64
	}{{1, sent[:2], 2}, {1, sent[:2], 2}, {2, sent[1:], 3}, {1, sent, 3}, {3, sent[2:], 3}} {
		if got := h.events("box", tt.first, tt.events...).Want(200)["recorded"]; got != tt.recorded {
			t.Errorf("batch %d: recorded %v", n, got)
		}
	}
	got := of(s, i)
	slices.Reverse(got)
	if len(got) != 3 {
		t.Fatalf("%d events", len(got))
	}
	for n, e := range got {
		want := sent[n].(*activity.Event)
		if e.ID != want.ID || e.AccountID != i.AccountID || e.Initiator.Name != i.Name || e.Target.Name != i.Name || e.Observer.Name != "ActivityTracker" || e.LogSourceCRN != i.CRN {
			t.Errorf("event %+v", e)
		}
	}
	if got[0].Initiator.Host.Address != i.Interfaces[0].Address.String() || got[1].Initiator.Host.Address != "" || got[1].Initiator.Credential.Type != "compute-resource" {
		t.Errorf("initiators %+v and %+v", got[0].Initiator, got[1].Initiator)
	}
	if got[2].Outcome != activity.Failure || got[2].Reason.Code != 403 {
		t.Errorf("event %+v", got[2])
	}
}

func TestAnEventThatCannotBeIsRefusedAloneAndThatIsRecorded(t *testing.T) {
	s := start(t)
	h, other := s.host("rack1"), s.host("rack2")
	i, foreign := s.instance(h.id, vpc.Running), s.instance(other.id, vpc.Running)
	number := int64(0)
	for name, bad := range map[string]any{
		"nothing":               json.RawMessage(`null`),
		"no object":             json.RawMessage(`[1,2]`),
		"a damaged one":         json.RawMessage(`{"id":7,"eventTime":"yesterday"}`),
		"another host's":        event(s, foreign),
		"another kind":          changed(event(s, i), func(e *activity.Event) { e.Action = "iam-identity.apikey.create" }),
		"a kind with a newline": changed(event(s, i), func(e *activity.Event) { e.Action = "is.metadata.x\n" }),
		"a long kind":           changed(event(s, i), func(e *activity.Event) { e.Action = "is.metadata." + strings.Repeat("x", 100) }),
		"no kind":               changed(event(s, i), func(e *activity.Event) { e.Action = "" }),
		"no id":                 changed(event(s, i), func(e *activity.Event) { e.ID = "1" }),
		"an old one":            changed(event(s, i), func(e *activity.Event) { e.Time.Time = s.now().Add(-32 * 24 * time.Hour) }),
		"one from the future":   changed(event(s, i), func(e *activity.Event) { e.Time.Time = s.now().Add(6 * time.Minute) }),
		"about no instance":     changed(event(s, i), func(e *activity.Event) { e.Target.ID = "x" }),
		"without an outcome":    changed(event(s, i), func(e *activity.Event) { e.Reason.Code = 0 }),
		"an absurd outcome":     changed(event(s, i), func(e *activity.Event) { e.Reason.Code = 1 << 30 }),
		"an absurd check":       changed(event(s, i), func(e *activity.Event) { e.Trace = activity.Trace{{Name: "x", Outcome: "maybe"}} }),
	} {
		before := len(of(s, i))
		good := event(s, i)
		if got := h.events("box", number+1, bad, good).Want(200)["recorded"]; got != float64(number+2) {
			t.Fatalf("%s: recorded %v", name, got)
		}
		number += 2
		if n := len(of(s, i)); n != before+1 {
			t.Errorf("%s: %d more events about the instance", name, n-before)
		}
		refused := slices.ContainsFunc(s.Events(3), func(e activity.Event) bool {
			return e.Action == "host.event.record" && e.Outcome == activity.Failure && e.Initiator.Name == "rack1" && strings.Contains(e.Reason.ForFailure, fmt.Sprint(number-1))
		})
		if !refused {
			t.Errorf("%s: the refusal is not in the log", name)
		}
	}
	if len(of(s, foreign)) != 0 {
		t.Error("a host has recorded something about another one's instance")
	}
}

func changed(e *activity.Event, f func(*activity.Event)) *activity.Event { f(e); return e }

func TestWhatAHostSaysInAnEventIsBounded(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	long := strings.Repeat("x", 10_000)
	e := event(s, i)
	e.Message, e.CorrelationID, e.Reason.ForFailure, e.Initiator.Host.Agent = long, long, long, long
	e.RequestData, _ = json.Marshal(long)
	for range 100 {
		e.Trace = append(e.Trace, activity.Check{Name: long[:100], Outcome: activity.Pass, Wanted: long[:100], Found: long[:100], Hint: long[:100]})
	}
	e.Trace[0] = activity.Check{Name: long, Outcome: activity.Fail, Wanted: long, Found: long, Hint: long}
	h.events("box", 1, e).Want(200)
	got := of(s, i)
	if len(got) != 1 || len(got[0].Trace) > 32 {
		t.Fatalf("%d events", len(got))
	}
	if b, _ := json.Marshal(got[0]); len(b) > 64<<10 {
		t.Errorf("the event has %d bytes", len(b))
	}
	if c := got[0].Trace[0]; len(c.Name) > 600 || len(c.Hint) > 600 {
		t.Errorf("a check has %d and %d bytes", len(c.Name), len(c.Hint))
	}
}

func TestABatchThatIsNoneChangesNothing(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	many := make([]any, link.MaxEvents+1)
	for n := range many {
		many[n] = event(s, i)
	}
	for name, r := range map[string]*apitest.Response{
		"too many":                h.events("box", 1, many...),
		"none":                    h.events("box", 1),
		"number 0":                h.events("box", 0, event(s, i)),
		"a negative number":       h.events("box", -5, event(s, i)),
		"a number without ends":   h.events("box", 1<<62, event(s, i)),
		"no outbox":               h.events("", 1, event(s, i)),
		"an outbox without ends":  h.events(strings.Repeat("x", 65), 1, event(s, i)),
		"garbage":                 h.do("POST", link.PathEvents, "garbage"),
		"a list":                  h.do("POST", link.PathEvents, "[]"),
		"more than a body may be": h.do("POST", link.PathEvents, `{"outbox":"`+strings.Repeat("x", 2<<20)),
	} {
		if r.Status != 400 && r.Status != 413 {
			t.Errorf("%s: %d %s", name, r.Status, r.Raw)
		}
	}
	if len(of(s, i)) != 0 || len(s.d.HostCursors.All()) != 0 {
		t.Error("something was recorded")
	}
}

func TestEventsOfANewOutboxAreNotTakenForThoseOfTheOldOne(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	h.events("old", 1, event(s, i), event(s, i), event(s, i)).Want(200)
	h.events("new", 1, event(s, i)).Want(200)
	if n := len(of(s, i)); n != 4 {
		t.Errorf("%d events, want 4", n)
	}
}

func TestAServerThatHasForgottenGoesOnAndSaysWhatIsMissing(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	i := s.instance(h.id, vpc.Running)
	h.events("box", 1, event(s, i)).Want(200)
	// The server was restored from a backup; the host has thrown 2 to 9 away.
	if got := h.events("box", 10, event(s, i)).Want(200)["recorded"]; got != 10.0 {
		t.Errorf("recorded %v", got)
	}
	if n := len(of(s, i)); n != 2 {
		t.Errorf("%d events", n)
	}
	missing := slices.ContainsFunc(s.Events(5), func(e activity.Event) bool {
		return e.Action == "host.event.record" && strings.Contains(e.Reason.ForFailure, "8 events up to number 9 are missing")
	})
	if !missing {
		t.Error("that events are missing is not in the log")
	}
}

func TestAHostGetsNoImageThatItDoesNotNeed(t *testing.T) {
	s := start(t)
	h := s.host("rack1")
	s.instance(h.id, vpc.Running)
	for _, id := range []string{"x", "r006-" + uuid.NewString(), "..%2f..%2fmaster.key"} {
		if r := h.do("GET", link.PathImages+id, nil); r.Status != http.StatusNotFound {
			t.Errorf("image %s: %d %s", id, r.Status, r.Raw)
		}
	}
}
