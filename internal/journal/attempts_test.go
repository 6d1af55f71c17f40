package journal_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/journal"
)

// noted is a writer of attempts with a clock of the test's, and what it wrote.
type noted struct {
	*journal.Attempts
	now    time.Time
	events []*activity.Event
	fail   error
}

func noting(t *testing.T) *noted {
	t.Helper()
	n := &noted{now: time.Date(2026, 7, 1, 9, 0, 0, 0, time.UTC)}
	n.Attempts = journal.NewAttempts(journal.AttemptsConfig{
		Now: func() time.Time { return n.now }, Log: slog.New(slog.DiscardHandler),
		Record: func(_ context.Context, events ...*activity.Event) error {
			if n.fail == nil {
				n.events = append(n.events, events...)
			}
			return n.fail
		},
	})
	return n
}

// attempt is an event of account b's caller with as much of his own making as
// there can be.
func attempt(who string) *activity.Event {
	e := &activity.Event{
		ID: "id-of-b", Action: "iam-identity.account-profile.delete", CorrelationID: "EVIL", AccountID: "b", Message: "EVIL",
		Initiator: activity.Initiator{ID: who, Name: "EVIL", AuthnName: "EVIL", Host: activity.Host{Address: "192.0.2.1", AddressType: "IPv4", Agent: "EVIL"}},
		Target:    activity.Target{ID: "crn:of-a", TypeURI: "iam-identity/account-profile"}, RequestData: json.RawMessage(`"EVIL"`), ResponseData: json.RawMessage(`"EVIL"`),
		Trace: activity.Trace{{Name: "EVIL"}},
	}
	e.SetReason(404, "EVIL")
	return e
}

func TestAnAttemptShowsWhoAndOnWhatAndNothingThatTheStrangerWrote(t *testing.T) {
	n := noting(t)
	n.Note("a", attempt("IBMid-B"))
	n.Note("a", attempt(""))
	n.Note("b", attempt("IBMid-B")) // its own account has it already
	n.Flush(t.Context(), false)
	if len(n.events) != 2 {
		t.Fatalf("%d events", len(n.events))
	}
	for i, e := range n.events {
		doc, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(doc), "EVIL") || strings.Contains(string(doc), "id-of-b") || e.AccountID != "a" || e.Target.ID != "crn:of-a" ||
			e.Severity != activity.Critical || e.Outcome != activity.Failure || e.Initiator.Host.Address != "192.0.2.1" {
			t.Errorf("event %d: %s", i, doc)
		}
	}
	if known, unknown := n.events[0], n.events[1]; known.Initiator.ID != "IBMid-B" || unknown.Initiator.ID != "" || string(unknown.RequestData) != "" {
		t.Errorf("%+v\n%+v", known, unknown)
	}
}

func TestAFloodOfAttemptsIsCounted(t *testing.T) {
	n := noting(t)
	for i := range 1000 {
		n.Note("a", attempt(fmt.Sprint("IBMid-", i)))
	}
	n.Flush(t.Context(), false)
	if len(n.events) != 20 {
		t.Fatalf("%d events of a minute that is not over", len(n.events))
	}
	n.now = n.now.Add(time.Minute)
	n.Flush(t.Context(), false)
	if len(n.events) != 21 || string(n.events[20].ResponseData) != `{"attempts":980}` {
		t.Fatalf("%d events, the last with %s", len(n.events), n.events[len(n.events)-1].ResponseData)
	}
	n.Note("a", attempt("IBMid-B"))
	n.Flush(t.Context(), false)
	if len(n.events) != 22 {
		t.Errorf("another minute has %d events", len(n.events)-21)
	}
	// Pairs of accounts beyond the bound are dropped, not kept for ever.
	for i := range 10_000 {
		n.Note(fmt.Sprint("account-", i), attempt("IBMid-B"))
	}
	n.Flush(t.Context(), true)
	if got := len(n.events) - 22; got > 4096 {
		t.Errorf("%d pairs of accounts at a time", got)
	}
}

func TestWhatTheJournalDoesNotTakeIsTriedAgain(t *testing.T) {
	n := noting(t)
	n.fail = errors.New("disk full")
	n.Note("a", attempt("IBMid-B"))
	n.Flush(t.Context(), false)
	n.fail = nil
	n.Flush(t.Context(), false)
	if len(n.events) != 1 {
		t.Errorf("%d events", len(n.events))
	}
	n.Note("a", attempt("IBMid-B"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	n.Run(ctx)
	if len(n.events) != 2 {
		t.Errorf("%d events after the end", len(n.events))
	}
}

func TestAnOldTokenDoesNotFillTheLogOfItsAccount(t *testing.T) {
	n := noting(t)
	e := &activity.Event{AccountID: "account", Action: "kms.secrets.read", Initiator: activity.Initiator{ID: "IBMid-1"}}
	admitted := 0
	for range 1000 {
		again := *e
		if n.Admit(&again) {
			admitted++
		}
	}
	if admitted != 20 {
		t.Errorf("%d have an event each", admitted)
	}
	if other := (&activity.Event{AccountID: "account", Initiator: activity.Initiator{ID: "IBMid-2"}}); !n.Admit(other) {
		t.Error("another identity's is not told")
	}
	n.now = n.now.Add(time.Minute)
	n.Flush(t.Context(), false)
	if len(n.events) != 1 || !strings.Contains(string(n.events[0].ResponseData), `"attempts":980`) {
		t.Errorf("the others are told by %+v", n.events)
	}
	if !n.Admit(e) {
		t.Error("the next minute's first one is not told")
	}
}
