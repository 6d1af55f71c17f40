package activityapi_test

import (
	"strings"
	"testing"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/activityapi"
	"tabard.dev/tabard/internal/api/apitest"
)

func startSettings(t *testing.T) *apitest.Env {
	e := apitest.New(t)
	activityapi.RegisterSettings(e.Mux, e.Config)
	return e
}

func setting(as, decisions string) apitest.Request {
	return apitest.Request{Method: "PATCH", Path: "/v1/events/settings", As: as, Body: map[string]string{"decisions": decisions}}
}

func TestAnAccountChoosesWhichDecisionsAreLogged(t *testing.T) {
	e := startSettings(t)
	get := apitest.Request{Path: "/v1/events/settings"}
	if m := e.Do(get).Want(200); m["decisions"] != "off" || m["account_id"] != e.Owner.AccountID {
		t.Errorf("at first: %v", m)
	}
	before := "off"
	for _, mode := range []string{"denied", "all", "off"} {
		if m := e.Do(setting("", mode)).Want(200); m["decisions"] != mode {
			t.Errorf("%v", m)
		}
		ev := e.Events(5)
		var own activity.Event
		for _, x := range ev {
			if x.Action == "activity.settings.update" {
				own = x
				break
			}
		}
		if want := `"request_body":{"new_decisions":"` + mode + `","old_decisions":"` + before + `"}`; own.Severity != activity.Critical || !strings.Contains(string(own.RequestData), want) {
			t.Errorf("event %s %s, want %s", own.Severity, own.RequestData, want)
		}
		before = mode
		if m := e.Do(get).Want(200); m["decisions"] != mode {
			t.Errorf("%v", m)
		}
	}
	// The other account has its own.
	e.Do(setting("", "all")).Want(200)
	if m := e.Do(apitest.Request{Path: "/v1/events/settings", As: e.Other.IAMID}).Want(200); m["decisions"] != "off" || m["account_id"] != e.Other.AccountID {
		t.Errorf("the other account: %v", m)
	}
}

func TestSettingsOfTheLogAreForAdministrators(t *testing.T) {
	e := startSettings(t)
	e.Grant("IBMid-VIEWER", "activity", "Viewer")
	e.Do(apitest.Request{Path: "/v1/events/settings", As: "IBMid-VIEWER"}).Want(200)
	e.Do(setting("IBMid-VIEWER", "all")).Want(403)
	e.Do(apitest.Request{Path: "/v1/events/settings", As: nobody}).Want(403)
	for _, body := range []any{"{}", `{"decisions":""}`, `{"decisions":"some"}`, `{"decisions":1}`, "[]"} {
		if r := e.Do(apitest.Request{Method: "PATCH", Path: "/v1/events/settings", Body: body}); r.Status != 400 {
			t.Errorf("%v: %d %s", body, r.Status, r.Raw)
		}
	}
	r := setting("", "all")
	r.Header = map[string]string{"If-Match": `"1-stale"`}
	e.Do(r).Want(409)
}
