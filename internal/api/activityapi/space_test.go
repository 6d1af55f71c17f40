package activityapi_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/store"
	"tabard.dev/tabard/internal/store/diskwatch"
)

// withSpace returns an installation with a reserve of 64 KiB in a directory.
func withSpace(t *testing.T) (*apitest.Env, string) {
	t.Helper()
	e := apitest.New(t)
	dir := t.TempDir()
	w, err := diskwatch.New(context.Background(), diskwatch.Config{
		Store: e.Store.(diskwatch.Watched), Dir: dir, Alarm: 2000, Stop: 1000, Reserve: 64 << 10, Now: time.Now, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, diskwatch.ReserveName), make([]byte, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	activityapi.RegisterSpace(e.Mux, e.Config, activityapi.SpaceOptions{Disk: w, Log: e.Store, MaxDays: 30, MaxBytes: 1 << 40})
	return e, filepath.Join(dir, diskwatch.ReserveName)
}

func TestTheOperatorSeesTheSpaceOfTheLog(t *testing.T) {
	e, _ := withSpace(t)
	m := e.Do(apitest.Request{Path: "/v1/events/space"}).Want(200)
	disk, kept := m["disk"].(map[string]any), m["retention"].(map[string]any)
	if m["state"] != "ok" || disk["alarm_below"] != 2000.0 || disk["stop_below"] != 1000.0 || disk["free"].(float64) <= 0 ||
		kept["max_days"] != 30.0 || kept["max_size"] != float64(1<<40) || len(m["days"].([]any)) != 1 || m["store"].(map[string]any)["used"].(float64) <= 0 {
		t.Errorf("answered %v", m)
	}
}

func TestTheReserveIsFreedOnceAndThatIsRecorded(t *testing.T) {
	e, reserve := withSpace(t)
	for n, want := range []float64{64 << 10, 0} {
		m := e.Do(apitest.Request{Method: "POST", Path: "/v1/events/space/release", Body: []string{"{}", ""}[n]}).Want(200)
		if m["released"] != want || m["state"] != "ok" {
			t.Errorf("answered %v", m)
		}
		if _, err := os.Stat(reserve); err == nil {
			t.Error("the reserve is there")
		}
	}
	events, err := e.Store.Events(t.Context(), store.Query{AccountID: e.Owner.AccountID, Action: activity.ReserveRelease, Limit: 10})
	if err != nil || len(events) != 2 || !strings.Contains(string(events[1].Doc), `"released":65536`) || !strings.Contains(string(events[1].Doc), e.Owner.IAMID) {
		t.Errorf("events %s, %v", events, err)
	}
}

// The space of all accounts is nobody's but the operator's: neither an
// administrator of another account nor a reader of the operator's may see it or
// give the reserve away.
func TestTheSpaceIsTheOperatorsAlone(t *testing.T) {
	e, reserve := withSpace(t)
	e.Grant("IBMid-VIEWER", "activity", "Viewer", "Operator", "Editor")
	e.Grant("IBMid-ELSEWHERE", "iam-identity", "Administrator")
	for _, c := range []apitest.Request{{Path: "/v1/events/space"}, {Method: "POST", Path: "/v1/events/space/release", Body: "{}"}} {
		for _, as := range []string{e.Other.IAMID, "IBMid-VIEWER", "IBMid-ELSEWHERE", nobody} {
			c.As = as
			r := e.Do(c)
			wantError(t, r, 403, "not_authorized")
			if strings.Contains(string(r.Raw), reserve) {
				t.Errorf("told %s", r.Raw)
			}
		}
		c.As, c.Account = e.Owner.IAMID, e.Other.AccountID
		wantError(t, e.Do(c), 403, "not_authorized")
		c.Account, c.Anonymous = "", true
		wantError(t, e.Do(c), 401, "token_missing")
	}
	if _, err := os.Stat(reserve); err != nil {
		t.Errorf("the reserve was freed: %v", err)
	}
	// The attempts stand in the logs of the accounts that they were made in.
	for account, want := range map[string]int{e.Owner.AccountID: 3, e.Other.AccountID: 2} {
		events, err := e.Store.Events(t.Context(), store.Query{AccountID: account, Action: activity.ReserveRelease, Outcome: activity.Failure, Limit: 10})
		if err != nil || len(events) != want {
			t.Errorf("%d attempts are recorded, want %d; %v", len(events), want, err)
		}
	}
}
