package iamidentity_test

import (
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

func (e env) preferences(iamID string) string {
	return "/v1/preferences/accounts/" + e.Owner.AccountID + "/identities/" + iamID
}

func (e env) prefer(path string, body any) *apitest.Response {
	return e.Do(apitest.Request{Method: "PUT", Path: path, Body: body})
}

func TestAPreferenceIsKeptForAnIdentity(t *testing.T) {
	e := start(t)
	p, s := e.profile("p"), e.serviceID("s")
	for _, iamID := range []string{text(p, "iam_id"), text(s, "iam_id"), e.Owner.IAMID} {
		base := e.preferences(iamID)
		if got := e.get(base); !reflect.DeepEqual(got, object{"preferences": []any{}}) {
			t.Errorf("at first: %v", got)
		}
		landing, navigation := base+"/console/landing_page", base+"/console/global_left_navigation"
		want := object{"service": "console", "id": "landing_page", "account_id": e.Owner.AccountID, "scope": "account", "value_string": "/billing"}
		if got := e.prefer(landing, object{"value_string": "/billing"}).Want(http.StatusOK); !reflect.DeepEqual(got, want) {
			t.Errorf("put %v, want %v", got, want)
		}
		if got := e.get(landing); !reflect.DeepEqual(got, want) {
			t.Errorf("read %v, want %v", got, want)
		}
		list := object{"service": "console", "id": "global_left_navigation", "account_id": e.Owner.AccountID, "scope": "account", "value_list_of_strings": []any{"is", "containers"}}
		if got := e.prefer(navigation, object{"value_string": "", "value_list_of_strings": []string{"is", "containers"}}).Want(http.StatusOK); !reflect.DeepEqual(got, list) {
			t.Errorf("put %v, want %v", got, list)
		}
		if got := e.get(base); !reflect.DeepEqual(got, object{"preferences": []any{list, want}}) {
			t.Errorf("all: %v", got)
		}
		// A value takes the place of one of the other kind.
		if got := e.prefer(navigation, object{"value_string": "none"}).Want(http.StatusOK); got["value_list_of_strings"] != nil || got["value_string"] != "none" {
			t.Errorf("changed to %v", got)
		}
		if got := e.prefer(navigation, object{"value_list_of_strings": []string{}}).Want(http.StatusOK); !reflect.DeepEqual(got["value_list_of_strings"], []any{}) || got["value_string"] != nil {
			t.Errorf("emptied to %v", got)
		}
		e.remove(landing)
		e.Do(apitest.Request{Path: landing}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: "DELETE", Path: landing}).Want(http.StatusNotFound)
	}
	e.remove(pathOf(p))
	e.Do(apitest.Request{Path: e.preferences(text(p, "iam_id"))}).Want(http.StatusNotFound)
	if n := e.Config.Directory.Preferences.Len(); n != 2 {
		t.Errorf("%d preferences are left, want those of the service ID and the owner", n)
	}
}

func TestPreferencesAreBounded(t *testing.T) {
	e := start(t)
	base := e.preferences(e.Owner.IAMID)
	long := strings.Repeat("é", 1000)
	for path, bodies := range map[string][]any{
		"/a/b": {
			object{}, object{"value_string": nil}, object{"value_string": "a", "value_list_of_strings": []string{"b"}}, object{"value_string": 1}, object{"value_list_of_strings": "a"},
			object{"value_list_of_strings": []any{1}}, object{"value_string": long + "x"}, object{"value_string": "a\x00"}, object{"value_list_of_strings": slices.Repeat([]string{"x"}, 101)},
			object{"value_list_of_strings": []string{strings.Repeat("x", 251)}}, "", "[]", "{",
		},
		"/console/landing_page": {
			object{"value_string": "https://example.com/"}, object{"value_string": "//example.com"}, object{"value_string": `/\example.com`}, object{"value_string": ""},
			object{"value_string": "javascript:x"}, object{"value_list_of_strings": []string{"/iam"}, "value_string": "/iam"},
		},
		"/" + strings.Repeat("s", 65) + "/b": {object{"value_string": "x"}},
		"/a/" + strings.Repeat("s", 65):      {object{"value_string": "x"}},
		"/a%2Fb/c":                           {object{"value_string": "x"}},
		"/a%20b/c":                           {object{"value_string": "x"}},
		"/a/%00":                             {object{"value_string": "x"}},
		"/%2e%2e/b":                          {object{"value_string": "x"}},
		"/a/%C3%A9":                          {object{"value_string": "x"}},
	} {
		for _, body := range bodies {
			if got := e.prefer(base+path, body); got.Status != http.StatusBadRequest {
				t.Errorf("%s with %.80v: status %d: %s", path, body, got.Status, got.Raw)
			}
		}
	}
	e.prefer(base+"/a/b", object{"value_string": strings.Repeat("x", 10<<20)}).Want(http.StatusRequestEntityTooLarge)
	if n := e.Config.Directory.Preferences.Len(); n != 0 {
		t.Fatalf("%d preferences were made", n)
	}
	e.prefer(base+"/a/0", object{"value_string": long}).Want(http.StatusOK)
	for i := range 99 {
		e.prefer(fmt.Sprintf("%s/a/%d", base, i+1), object{"value_string": ""}).Want(http.StatusOK)
	}
	e.prefer(base+"/a/100", object{"value_string": "x"}).Want(http.StatusConflict)
	e.prefer(base+"/a/99", object{"value_string": "x"}).Want(http.StatusOK)
}

func TestParallelWritersOfAPreferenceLeaveOne(t *testing.T) {
	e := start(t)
	path := e.preferences(e.Owner.IAMID) + "/a/b"
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if got := e.prefer(path, object{"value_string": fmt.Sprint(i)}); got.Status != http.StatusOK {
				t.Errorf("status %d: %s", got.Status, got.Raw)
			}
		})
	}
	wg.Wait()
	if n := e.Config.Directory.Preferences.Len(); n != 1 {
		t.Errorf("%d preferences", n)
	}
}

func TestPreferencesAreOfIdentitiesInTheAccount(t *testing.T) {
	e := start(t)
	foreign := e.Do(apitest.Request{Method: "POST", Path: "/v1/profiles", As: e.Other.IAMID, Body: object{"name": "p", "account_id": e.Other.AccountID}}).Want(http.StatusCreated)
	p := e.profile("p")
	for _, iamID := range []string{e.Other.IAMID, text(foreign, "iam_id"), text(p, "id"), "IBMid-NOBODY", "iam-Profile-x", "iam-ServiceId-x", "x", "%00", "crn-crn:v1:bluemix:public:is::a%2Fx::instance:1"} {
		base := e.preferences(iamID)
		e.Do(apitest.Request{Path: base}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Path: base + "/console/landing_page"}).Want(http.StatusNotFound)
		e.prefer(base+"/console/landing_page", object{"value_string": "/iam"}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: "DELETE", Path: base + "/console/landing_page"}).Want(http.StatusNotFound)
	}
	if n := e.Config.Directory.Preferences.Len(); n != 0 {
		t.Errorf("%d preferences were made", n)
	}
}

func TestAChangeOfAPreferenceIsRecordedWithoutItsValue(t *testing.T) {
	e := start(t)
	path := e.preferences(e.Owner.IAMID) + "/console/theme"
	e.prefer(path, object{"value_string": "very-personal"}).Want(http.StatusOK)
	last := func(action string) {
		t.Helper()
		event := e.Events(1)[0]
		data := string(event.ResponseData)
		if event.Action != action || event.Target.Name != e.Owner.IAMID || !strings.Contains(data, "theme") || strings.Contains(data, "personal") {
			t.Errorf("event %s on %v with %s", event.Action, event.Target, data)
		}
	}
	last("iam-identity.preferences.update")
	e.remove(path)
	last("iam-identity.preferences.delete")
}

func TestAnIdentityKeepsItsOwnPreferencesWithoutAnyAction(t *testing.T) {
	e := start(t)
	p, s := e.profile("p"), e.serviceID("s")
	e.user("IBMid-ANN", "")
	for _, own := range []string{text(p, "iam_id"), text(s, "iam_id"), "IBMid-ANN"} {
		path := e.preferences(own) + "/console/theme"
		body := object{"value_string": "dark"}
		e.Do(apitest.Request{Method: "PUT", Path: path, Body: body, As: own}).Want(http.StatusOK)
		if event := e.Events(1)[0]; event.Outcome != "success" || event.Initiator.ID != own || len(event.Trace) == 0 {
			t.Errorf("event %+v", event)
		}
		e.Do(apitest.Request{Path: path, As: own}).Want(http.StatusOK)
		e.Do(apitest.Request{Path: e.preferences(own), As: own}).Want(http.StatusOK)
		for _, other := range []string{stranger, viewer} {
			e.Do(apitest.Request{Path: path, As: other}).Want(http.StatusForbidden)
			e.Do(apitest.Request{Method: "PUT", Path: path, Body: body, As: other}).Want(http.StatusForbidden)
			e.Do(apitest.Request{Method: "DELETE", Path: path, As: other}).Want(http.StatusForbidden)
		}
		// The same identity in a token of another account is nobody here.
		e.Do(apitest.Request{Path: path, As: own, Account: e.Other.AccountID}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: "DELETE", Path: path, As: own}).Want(http.StatusNoContent)
	}
}
