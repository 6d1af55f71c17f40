package store_test

import (
	"encoding/json"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/store"
)

func TestAPositionIsReadAsItWasWritten(t *testing.T) {
	for text, want := range map[string]store.Position{
		"20260615-1": {Day: 20260615, Seq: 1}, "20260615-9223372036854775807": {Day: 20260615, Seq: 1<<63 - 1},
	} {
		got, err := store.ParsePosition(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%q parses as %s, %v", text, got, err)
		}
	}
}

func TestWhatIsNotAPositionIsRefused(t *testing.T) {
	for _, text := range []string{
		"", "-", "1", "20260615", "20260615-", "-1", "20260615-0", "20260615--1", "0-1", "-20260615-1", "a-1", "1-a",
		"20260615-1-1", "20260615-1 ", "20260615-9223372036854775808", "1e3-1", "20260615-1; DROP TABLE events",
	} {
		if p, err := store.ParsePosition(text); err == nil {
			t.Errorf("%q parses as %s", text, p)
		}
	}
}

func TestADayIsTheDayOfUTC(t *testing.T) {
	lastOfYear := time.Date(2026, time.December, 31, 23, 59, 59, 0, time.UTC)
	for zone, want := range map[int]int{0: 20261231, 14: 20261231, -12: 20261231} {
		if got := store.Day(lastOfYear.In(time.FixedZone("", zone*3600))); got != want {
			t.Errorf("zone %d: day %d, want %d", zone, got, want)
		}
	}
	if got := store.Day(lastOfYear.Add(time.Second)); got != 20270101 {
		t.Errorf("day %d", got)
	}
}

func TestAnEventIsEncodedWithWhatQueriesLookUp(t *testing.T) {
	when := time.Date(2026, time.June, 15, 12, 0, 0, 0, time.UTC)
	e := &activity.Event{
		ID: "e1", Time: activity.Time{Time: when}, Action: "a.b.create", Outcome: activity.Success, AccountID: "a", CorrelationID: "c",
	}
	got, err := store.NewEvent(e)
	if err != nil {
		t.Fatal(err)
	}
	if !got.Time.Equal(when) || got.AccountID != "a" || got.CorrelationID != "c" || got.Action != "a.b.create" || got.Outcome != activity.Success {
		t.Errorf("got %+v", got)
	}
	var back activity.Event
	if err := json.Unmarshal(got.Doc, &back); err != nil || back.ID != "e1" || !back.Time.Equal(when) {
		t.Errorf("the document %s reads as %+v, %v", got.Doc, back, err)
	}
}

func TestAnEventThatCannotBeEncodedIsRefused(t *testing.T) {
	if _, err := store.NewEvent(&activity.Event{RequestData: json.RawMessage("{")}); err == nil {
		t.Error("no error")
	}
}
