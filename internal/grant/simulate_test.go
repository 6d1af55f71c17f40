package grant_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
)

// A cluster that two accounts have registered is theirs both. What one of them
// has linked is told in its own log alone.
func TestTheNearestLinkOfOneAccountIsNotToldToAnother(t *testing.T) {
	f := newFleet(t)
	other := f.register(f.Other.AccountID, "theirs", f.api)
	mine, theirs := f.profile(f.cluster, "deploy", "builder"), f.profile(other, "deploy", "roller")
	for _, tt := range []struct {
		want        grant.Selector
		log, hidden string
		secrets     []string
	}{
		{grant.Selector{ID: mine.ID}, f.Owner.AccountID, f.Other.AccountID, []string{theirs.ID, "roller"}},
		{grant.Selector{ID: theirs.ID}, f.Other.AccountID, f.Owner.AccountID, []string{mine.ID, "builder"}},
	} {
		transaction := uuid.NewString()
		_, err := f.grants.CRToken(t.Context(), grant.Origin{TransactionID: transaction, Address: "192.0.2.1", ClientID: grant.DefaultClient},
			grant.CRTokenRequest{Token: f.token(), Profile: tt.want})
		if fault.Of(err).Code != grant.CodeNotEligible {
			t.Fatalf("%v", err)
		}
		told := false
		for _, e := range f.events(tt.log, transaction) {
			failed, _ := e.Trace.Failed()
			told = told || failed.Name == grant.CheckLink && failed.Nearest != nil && strings.Contains(failed.Change.Command, tt.want.ID)
			for _, secret := range tt.secrets {
				if b, err := json.Marshal(e); err != nil || strings.Contains(string(b), secret) {
					t.Errorf("the event tells of %s: %s, %v", secret, b, err)
				}
			}
		}
		if !told {
			t.Error("the account's own log does not tell what was nearest")
		}
		for _, e := range f.events(tt.hidden, transaction) {
			for _, c := range e.Trace {
				if c.Nearest != nil || c.Change != nil {
					t.Errorf("the other account's log has %+v", c)
				}
			}
		}
	}
}

// A question shows a token to the API server that a request would show it to,
// and to none that another account has registered.
func TestASimulationReviewsByTheAccountsOwnAPIServerOnly(t *testing.T) {
	f := newFleet(t)
	var foreign atomic.Int64
	f.register(f.Other.AccountID, "theirs", f.reviewer(&foreign))
	p := f.profile(f.cluster, "deploy", "lister")
	f.profile(f.cluster, "other", "builder")
	simulate := func(want grant.Selector) grant.Simulation {
		return f.grants.SimulateCRToken(t.Context(), f.Owner.AccountID, grant.Origin{}, grant.CRTokenRequest{Token: f.token(), Profile: want})
	}
	before := f.allEvents()
	told := len(f.told)
	s := simulate(grant.Selector{Name: "deploy"})
	if s.Fault != nil || s.Claims.IAMID != "iam-"+p.ID || s.Claims.JTI != "" || s.Life == 0 || s.Evidence == nil || s.Profile.ID != p.ID {
		t.Errorf("simulation %+v", s)
	}
	if f.reviews.Load() != 1 || foreign.Load() != 0 {
		t.Errorf("%d own reviews, %d of others", f.reviews.Load(), foreign.Load())
	}
	if s = simulate(grant.Selector{Name: "other"}); s.Fault == nil || f.reviews.Load() != 1 {
		t.Errorf("the token was reviewed for a profile that does not want it: %v", s.Fault)
	}
	f.status.Store(http.StatusOK)
	f.advance(2 * attest.VerdictLife)
	if s = simulate(grant.Selector{ID: p.ID}); s.Fault == nil || s.Fault.Code != grant.CodeInvalidToken {
		t.Errorf("a token that the cluster does not stand by: %+v", s.Fault)
	}
	if failed, _ := s.Trace.Failed(); failed.Name != attest.CheckReview {
		t.Errorf("failed %+v", failed)
	}
	if n := f.allEvents(); n != before || len(f.told) != told {
		t.Errorf("%d events became %d, %d attempts were counted", before, n, len(f.told)-told)
	}
	if n, _ := f.Usage.Of(p.ID); n != 0 {
		t.Errorf("%d logins were counted", n)
	}
}

func (s *stack) allEvents() int {
	s.T.Helper()
	n := 0
	for _, account := range []string{s.Owner.AccountID, s.Other.AccountID} {
		events, err := s.Store.Events(s.T.Context(), store.Query{AccountID: account, Limit: 1000})
		if err != nil {
			s.T.Fatal(err)
		}
		n += len(events)
	}
	return n
}

func TestADescribedPodOfAReviewedClusterIsNotShownToIt(t *testing.T) {
	f := newFleet(t)
	p := f.profile(f.cluster, "deploy", "lister")
	s, err := f.grants.SimulateEvidence(t.Context(), f.Owner.AccountID, grant.Origin{},
		grant.Description{Cluster: f.cluster, Pod: attest.Pod{Namespace: "apps", ServiceAccount: "lister"}}, grant.Selector{ID: p.ID})
	if err != nil || s.Fault != nil || f.reviews.Load() != 0 {
		t.Errorf("%v, %v, %d reviews", err, s.Fault, f.reviews.Load())
	}
	want := []string{grant.CheckDescribed, grant.CheckSelector, grant.CheckProfile, grant.CheckLink, grant.CheckRule, attest.CheckReview, grant.CheckAccount, grant.CheckAddress}
	var got []string
	for _, c := range s.Trace {
		got = append(got, c.Name)
		if c.Name == attest.CheckReview && c.Outcome != activity.Skip {
			t.Errorf("review %s", c.Outcome)
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("checks %v", got)
	}
}

// What would let an identity assume a profile is told to the profile's account.
func TestAMissingIdentityEntryIsToldWithItsCommand(t *testing.T) {
	s := start(t)
	who := s.people()
	p := &identity.Profile{ID: "Profile-" + uuid.NewString(), AccountID: s.Owner.AccountID, Name: "auditor"}
	s.update(func(tx *directory.Tx) { s.d.Profiles.Put(tx, p) })
	for raw, want := range map[string]string{
		who.userToken: "--id " + who.user.IAMID + " --id-type USER", who.idToken: "--id " + who.id.ID + " --id-type SERVICEID",
	} {
		transaction := uuid.NewString()
		if _, err := s.grants.Assume(t.Context(), grant.Origin{TransactionID: transaction, Address: "192.0.2.1"},
			grant.AssumeRequest{AccessToken: raw, Profile: grant.Selector{ID: p.ID}}); err == nil {
			t.Fatal("assumed")
		}
		events := s.events(s.Owner.AccountID, transaction)
		failed, _ := events[0].Trace.Failed()
		if failed.Name != grant.CheckTrust || failed.Change == nil || !strings.HasSuffix(failed.Change.Command, p.ID+" "+want) {
			t.Errorf("failed %+v, change %+v", failed, failed.Change)
		}
	}
}
