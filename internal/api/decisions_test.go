package api_test

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/journal"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/token"
)

func (f *family) decisions(mode string) {
	f.T.Helper()
	s := &activity.Settings{AccountID: f.Owner.AccountID}
	if old, ok := f.d.LogSettings.Get(s.AccountID); ok {
		*s = *old
	}
	s.Decisions = mode
	err := f.d.Update(context.Background(), f.Owner.IAMID, func(tx *directory.Tx) error {
		f.d.LogSettings.Put(tx, s)
		return nil
	})
	if err != nil {
		f.T.Fatal(err)
	}
}

// logged returns the decisions in the log of a transaction, the oldest first.
func (f *family) logged(transaction string) []string {
	f.T.Helper()
	stored, err := f.Store.Events(context.Background(), store.Query{AccountID: f.Owner.AccountID, CorrelationID: transaction, Limit: 1000})
	if err != nil {
		f.T.Fatal(err)
	}
	var out []string
	for _, s := range slices.Backward(stored) {
		var e activity.Event
		if err := json.Unmarshal(s.Doc, &e); err != nil {
			f.T.Fatal(err)
		}
		if e.Action == activity.ActionEvaluated {
			out = append(out, e.Target.Name+" "+string(e.ResponseData))
		}
	}
	return out
}

func TestDecisionsAreLoggedAsTheAccountAsks(t *testing.T) {
	f := start(t)
	id := f.robot("a")
	f.robot("b")
	f.Grant(viewer, "iam-identity", "Viewer")
	ask := func(method, path, as, tx string) {
		t.Helper()
		f.Do(apitest.Request{Method: method, Path: path, As: as, Body: `{"name":"x"}`, Header: map[string]string{"Transaction-Id": tx}})
	}
	for _, mode := range []struct {
		set                         string
		read, list, refused, change int // events
	}{{activity.DecisionsOff, 0, 0, 0, 0}, {activity.DecisionsDenied, 0, 0, 1, 0}, {activity.DecisionsAll, 1, 1, 1, 1}} {
		f.decisions(mode.set)
		ask("GET", "/robots/"+id, viewer, "read"+mode.set)
		ask("GET", "/robots", viewer, "list"+mode.set)
		ask("DELETE", "/robots/"+id, viewer, "refused"+mode.set)
		ask("PATCH", "/robots/"+id, "", "change"+mode.set)
		for tx, want := range map[string]int{"read": mode.read, "list": mode.list, "refused": mode.refused, "change": mode.change} {
			if got := f.logged(tx + mode.set); len(got) != want {
				t.Errorf("%q, %s: %q", mode.set, tx, got)
			}
		}
	}
	if got := f.logged("list" + activity.DecisionsAll); !strings.Contains(got[0], `"permitted":2`) || !strings.Contains(got[0], `"denied":0`) {
		t.Errorf("a list: %q", got)
	}
	ask("GET", "/robots", nobody, "nothing")
	if got := f.logged("nothing"); len(got) != 1 || !strings.Contains(got[0], `"decision":"Deny"`) || !strings.Contains(got[0], `"denied":2`) {
		t.Errorf("a list that shows nothing: %q", got)
	}
}

func TestADecisionThatCannotBeLoggedIsNotAnswered(t *testing.T) {
	f := start(t)
	id := f.robot("a")
	f.decisions(activity.DecisionsAll)
	j := journal.New(journal.Config{Store: f.store})
	t.Cleanup(j.Close)
	f.Config.Journal = j
	f.store.broken.Store(true)
	for _, path := range []string{"/robots/" + id, "/robots"} {
		r := f.Do(apitest.Request{Path: path})
		wantError(t, r, 503, "service_unavailable")
		if strings.Contains(string(r.Raw), id) {
			t.Errorf("%s tells what it should not: %s", path, r.Raw)
		}
	}
	f.store.broken.Store(false)
	f.Do(apitest.Request{Path: "/robots/" + id}).Want(200)
	f.decisions(activity.DecisionsOff)
	f.store.broken.Store(true)
	f.Do(apitest.Request{Path: "/robots/" + id}).Want(200) // a read needs no log then
}

func TestARequestWithALapsedTokenStandsInTheAccountOfTheToken(t *testing.T) {
	f := start(t)
	lapsed := &token.Claims{IAMID: "IBMid-GONE", Name: "Gone", Account: token.Account{BSS: f.Owner.AccountID}}
	f.Config.Auth = rejecting{lapsed}
	f.Config.OperatorAccount = f.Other.AccountID
	f.Do(apitest.Request{Path: "/robots", Account: f.Other.AccountID, As: "x"}).Want(401)
	if e := f.event(); e.Initiator.ID != "IBMid-GONE" || e.Reason.Code != 401 || e.Severity != activity.Critical || e.AccountID != f.Owner.AccountID {
		t.Errorf("%+v", e)
	}
}

type rejecting struct{ claims *token.Claims }

func (r rejecting) Caller(string) (*token.Claims, error) {
	return nil, &grant.RejectedError{Claims: r.claims, Cause: token.ErrExpired}
}

func TestWhatAnAnswerTookIsGivenBackWhenItCannotBeGiven(t *testing.T) {
	f := start(t)
	id := f.robot("a")
	taken := 0
	routes := &api.Family{Config: f.Config, Mux: f.Mux, Service: "Test Service", Shape: api.PlainShape}
	api.Read(routes, "GET /robots/{id}/stream", actionGet, f.load, func(*api.Call, *identity.ServiceID) (api.Reply, error) {
		taken++
		return api.Reply{Abandoned: func() { taken-- }, Stream: func(http.ResponseWriter, *http.Request) {}}, nil
	})
	f.decisions(activity.DecisionsAll)
	j := journal.New(journal.Config{Store: f.store})
	t.Cleanup(j.Close)
	f.Config.Journal = j
	f.Do(apitest.Request{Method: "GET", Path: "/robots/" + id + "/stream"}).Want(http.StatusOK)
	f.store.broken.Store(true)
	f.Do(apitest.Request{Method: "GET", Path: "/robots/" + id + "/stream"}).Want(http.StatusServiceUnavailable)
	if taken != 1 {
		t.Errorf("%d answers hold what they took, and one was given", taken)
	}
}
