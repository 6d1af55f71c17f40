package iampolicy_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

func settingsPath(account string) string {
	return "/v1/accounts/" + account + "/settings/access_management"
}

func external(types obj) obj {
	return obj{"external_account_identity_interaction": obj{"identity_types": types}}
}

func patchSettings(e *apitest.Env, tag string, body any) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "PATCH", Path: settingsPath(e.Owner.AccountID), Body: body, Header: map[string]string{"If-Match": tag}})
}

func TestSettingsAreReadAndChangedByIdentityType(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Path: settingsPath(e.Owner.AccountID)})
	types := func(body obj) obj {
		return dig(body, "external_account_identity_interaction", "identity_types").(obj)
	}
	for _, name := range []string{"user", "service_id", "service"} {
		if got := types(r.Want(200))[name]; fmt.Sprint(got) != fmt.Sprint(obj{"state": "enabled", "external_allowed_accounts": []any{}}) {
			t.Errorf("%s is %v", name, got)
		}
	}
	etag := r.Header.Get("ETag")
	allowed := strings.Repeat("a", 32)
	changed := patchSettings(e, etag, external(obj{"service": obj{"state": "limited", "external_allowed_accounts": []string{allowed}}, "user": nil}))
	got := types(changed.Want(200))
	if dig(got, "service", "state") != "limited" || dig(got, "service", "external_allowed_accounts", 0) != allowed || dig(got, "user", "state") != "enabled" {
		t.Errorf("changed to %v", got)
	}
	patchSettings(e, etag, external(obj{"user": obj{"state": "monitor"}})).Want(412)
	patchSettings(e, "", external(obj{"user": obj{"state": "monitor"}})).Want(400)
	patchSettings(e, changed.Header.Get("ETag"), external(obj{"user": obj{"state": "monitor", "external_allowed_accounts": []string{}}})).Want(200)
	again := types(e.Do(apitest.Request{Path: settingsPath(e.Owner.AccountID)}).Want(200))
	if dig(again, "service", "state") != "limited" || dig(again, "user", "state") != "monitor" || dig(again, "user", "external_allowed_accounts") == nil {
		t.Errorf("now %v", again)
	}
	if got := e.Events(1)[0]; got.Action != "iam-access-management.account-settings.update" || !strings.Contains(string(got.ResponseData), "monitor") {
		t.Errorf("event %s %s", got.Action, got.ResponseData)
	}
}

func TestBadSettingsAreRefusedWith400(t *testing.T) {
	e := start(t)
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprintf("%032d", i)
	}
	for name, body := range map[string]any{
		"empty":                  "",
		"null":                   "null",
		"nothing":                obj{},
		"no type":                external(obj{}),
		"unknown type":           external(obj{"robot": obj{"state": "enabled"}}),
		"type as a text":         external(obj{"user": "enabled"}),
		"types as a list":        obj{"external_account_identity_interaction": obj{"identity_types": []string{"user"}}},
		"no state":               external(obj{"user": obj{}}),
		"unknown state":          external(obj{"user": obj{"state": "off"}}),
		"enabled with a list":    external(obj{"user": obj{"state": "enabled", "external_allowed_accounts": []string{"a"}}}),
		"list as a text":         external(obj{"user": obj{"state": "limited", "external_allowed_accounts": "a"}}),
		"empty account":          external(obj{"user": obj{"state": "limited", "external_allowed_accounts": []string{""}}}),
		"account twice":          external(obj{"user": obj{"state": "limited", "external_allowed_accounts": []string{"a", "a"}}}),
		"many accounts":          external(obj{"user": obj{"state": "limited", "external_allowed_accounts": many}}),
		"control in the account": external(obj{"user": obj{"state": "limited", "external_allowed_accounts": []string{"a\x00"}}}),
	} {
		t.Run(name, func(t *testing.T) { patchSettings(e, "*", body).Want(400) })
	}
}

func TestSettingsOfAnotherAccountAreNotFound(t *testing.T) {
	e := start(t)
	for _, account := range []string{e.Owner.AccountID, strings.Repeat("0", 32), "x"} {
		for _, r := range []apitest.Request{
			{Path: settingsPath(account)},
			{Method: "PATCH", Path: settingsPath(account), Body: external(obj{"user": obj{"state": "monitor"}}), Header: map[string]string{"If-Match": "*"}},
		} {
			r.As = e.Other.IAMID
			if got := code(e.Do(r).Want(404)); got != "not_found" {
				t.Errorf("code %v", got)
			}
		}
	}
	e.Grant("IBMid-VIEWER", "iam-access-management", "Viewer")
	e.Do(apitest.Request{Path: settingsPath(e.Owner.AccountID), As: "IBMid-VIEWER"}).Want(200)
	e.Do(apitest.Request{Path: settingsPath(e.Owner.AccountID), As: "IBMid-STRANGER"}).Want(403)
	e.Do(apitest.Request{
		Method: "PATCH", Path: settingsPath(e.Owner.AccountID), As: "IBMid-VIEWER",
		Body: external(obj{"user": obj{"state": "monitor"}}), Header: map[string]string{"If-Match": "*"},
	}).Want(403)
}

func TestOnlyOneOfManyChangesToTheSettingsSucceeds(t *testing.T) {
	e := start(t)
	tag := e.Do(apitest.Request{Path: settingsPath(e.Owner.AccountID)}).Header.Get("ETag")
	got := make([]int, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() { got[i] = patchSettings(e, tag, external(obj{"user": obj{"state": "monitor"}})).Status })
	}
	wg.Wait()
	slices.Sort(got)
	if want := []int{200, 412, 412, 412, 412, 412, 412, 412}; !slices.Equal(got, want) {
		t.Errorf("statuses %v, want %v", got, want)
	}
}
