package iamidentity_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
)

// peer is the address that the tests' requests come from.
const peer = "192.0.2.1"

func (e env) settingsPath() string {
	return "/v1/accounts/" + e.Owner.AccountID + "/settings/identity"
}

// user puts a user into the owner's account.
func (e env) user(iamID, email string) {
	e.T.Helper()
	d := e.Config.Directory
	must(e.T, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error {
		d.Users.Put(tx, &identity.User{IAMID: iamID, AccountID: e.Owner.AccountID, Name: "Name of " + iamID, Email: email})
		return nil
	}))
}

func TestAnAccountHasSettingsBeforeAnybodyChangesThem(t *testing.T) {
	e := start(t)
	r := e.Do(apitest.Request{Path: e.settingsPath()})
	got := r.Want(http.StatusOK)
	want := object{
		"account_id": e.Owner.AccountID, "entity_tag": r.Header.Get("ETag"),
		"restrict_create_service_id": "NOT_SET", "restrict_create_platform_apikey": "NOT_SET", "restrict_user_list_visibility": "NOT_RESTRICTED",
		"allowed_ip_addresses": "", "mfa": "NONE", "user_mfa": []any{}, "restrict_user_domains": []any{},
		"session_expiration_in_seconds": "NOT_SET", "session_invalidation_in_seconds": "NOT_SET", "max_sessions_per_identity": "NOT_SET",
		"system_access_token_expiration_in_seconds": "NOT_SET", "system_refresh_token_expiration_in_seconds": "NOT_SET",
	}
	if !reflect.DeepEqual(got, want) || text(got, "entity_tag") == "" {
		t.Errorf("settings %v, want %v", got, want)
	}
	if again := e.get(e.settingsPath() + "?include_history=true&resolve_user_mfa=false"); !reflect.DeepEqual(again["history"], []any{}) || again["entity_tag"] != got["entity_tag"] {
		t.Errorf("read again: %v", again)
	}
	if e.Config.Directory.Settings.Len() != 0 {
		t.Error("reading made settings")
	}
	e.put(e.settingsPath(), text(got, "entity_tag"), object{}).Want(http.StatusOK)
	e.Do(apitest.Request{Path: e.settingsPath() + "?include_history=perhaps"}).Want(http.StatusBadRequest)
	e.Do(apitest.Request{Path: e.settingsPath() + "?resolve_user_mfa=2"}).Want(http.StatusBadRequest)
}

func TestAPutChangesOnlyTheSettingsThatItNames(t *testing.T) {
	e := start(t)
	first := e.put(e.settingsPath(), "*", object{
		"mfa": "LEVEL2", "max_sessions_per_identity": "10", "allowed_ip_addresses": peer + ", 2001:db8::/32,10.0.0.1-10.0.0.9",
		"user_mfa":              []object{{"iam_id": e.Owner.IAMID, "mfa": "NONE"}},
		"restrict_user_domains": []object{{"realm_id": "IBMid", "invitation_email_allow_patterns": []string{"**@**example.com"}, "restrict_invitation": false}},
	}).Want(http.StatusOK)
	second := e.put(e.settingsPath(), text(first, "entity_tag"), object{"restrict_create_service_id": "RESTRICTED", "mfa": nil, "user_mfa": nil, "something_else": 1})
	got := second.Want(http.StatusOK)
	if got["entity_tag"] == first["entity_tag"] || second.Header.Get("ETag") != got["entity_tag"] {
		t.Errorf("entity tag %v after %v", got["entity_tag"], first["entity_tag"])
	}
	want := with(first, "restrict_create_service_id", "RESTRICTED")
	for _, o := range []object{want, got} {
		delete(o, "entity_tag")
		delete(o, "history")
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("settings %v, want %v", got, want)
	}
	stored := e.get(e.settingsPath())
	delete(stored, "entity_tag")
	if !reflect.DeepEqual(stored, got) {
		t.Errorf("read %v, want %v", stored, got)
	}
	if other := e.Config.Directory.SettingsOf(e.Other.AccountID); other.Revision != 0 {
		t.Error("another account has settings now")
	}
}

func TestTheValuesOfSettingsAreBounded(t *testing.T) {
	e := start(t)
	many := func(n int, item string) string { return peer + strings.Repeat(","+item, n) }
	numbers := func(lowest, highest string, outside ...string) (good, bad []any) {
		good = []any{lowest, highest, "NOT_SET"}
		for _, s := range append(outside, "", "0", "-1", "+900", " 900", "900s", "9e2", "0x400", "01000", "99999999999999999999", "not_set") {
			bad = append(bad, s)
		}
		return good, append(bad, 1000, true, []any{}, object{})
	}
	type values struct{ good, bad []any }
	rules := map[string]values{
		"restrict_create_service_id":      {[]any{"RESTRICTED", "NOT_RESTRICTED", "NOT_SET"}, []any{"", "restricted", "NONE", 1, true}},
		"restrict_create_platform_apikey": {[]any{"RESTRICTED", "NOT_RESTRICTED", "NOT_SET"}, []any{"", "YES", []any{"RESTRICTED"}}},
		"restrict_user_list_visibility":   {[]any{"RESTRICTED", "NOT_RESTRICTED"}, []any{"", "NOT_SET"}},
		"mfa":                             {[]any{"NONE", "NONE_NO_ROPC", "TOTP", "TOTP4ALL", "LEVEL1", "LEVEL2", "LEVEL3"}, []any{"", "LEVEL4", "NOT_SET", "none", 3}},
		"allowed_ip_addresses": {
			[]any{"", peer, "192.0.2.0/24", "0.0.0.0/0", "192.0.2.0-192.0.2.255", "::ffff:" + peer, many(199, "2001:db8::1")},
			[]any{
				",", " ", peer + ",", peer + ",,10.0.0.1", "10.0.0.1.2", "10.0.0.0/33", "10.0.0.9-10.0.0.1", "10.0.0.1-::1", "example.com", "*",
				peer + ",fe80::1%eth0", peer + ",::ffff:10.0.0.0/104", peer + " 10.0.0.1", many(200, "10.0.0.1"), strings.Repeat("x", 10_000), "10.0.0.1\x00", 1, []any{peer},
			},
		},
		"user_mfa": {
			[]any{[]any{}, []object{{"iam_id": e.Owner.IAMID, "mfa": "LEVEL3"}}},
			[]any{
				[]object{{"iam_id": e.Owner.IAMID}}, []object{{"mfa": "NONE"}}, []object{{"iam_id": e.Owner.IAMID, "mfa": "x"}},
				[]object{{"iam_id": e.Owner.IAMID, "mfa": "NONE"}, {"iam_id": e.Owner.IAMID, "mfa": "TOTP"}},
				slices.Repeat([]object{{"iam_id": e.Owner.IAMID, "mfa": "NONE"}}, 501),
				[]object{{"iam_id": e.Other.IAMID, "mfa": "NONE"}}, []object{{"iam_id": "IBMid-NOBODY", "mfa": "NONE"}}, "NONE", object{}, []any{nil}, []any{1},
			},
		},
		"restrict_user_domains": {
			[]any{[]any{}, []object{{"realm_id": "r", "restrict_invitation": true}}, []object{{"realm_id": "r"}}, []object{{"realm_id": "never there"}}},
			[]any{
				[]object{{}}, []object{{"realm_id": " "}}, []object{{"realm_id": "r"}, {"realm_id": "r"}}, []object{{"realm_id": strings.Repeat("r", 251)}},
				[]object{{"realm_id": "r", "invitation_email_allow_patterns": []string{""}}}, []object{{"realm_id": "r", "invitation_email_allow_patterns": []string{"a\nb"}}},
				[]object{{"realm_id": "r", "invitation_email_allow_patterns": slices.Repeat([]string{"x"}, 101)}},
				[]object{{"realm_id": "r", "restrict_invitation": "true"}}, []object{{"realm_id": 1}}, "r", []any{nil},
			},
		},
	}
	for name, bounds := range map[string][3]string{
		"session_expiration_in_seconds": {"900", "86400", "86401"}, "session_invalidation_in_seconds": {"900", "7200", "7201"},
		"system_access_token_expiration_in_seconds": {"900", "3600", "3601"}, "system_refresh_token_expiration_in_seconds": {"900", "259200", "259201"},
		"max_sessions_per_identity": {"1", "2147483647", "2147483648"},
	} {
		good, bad := numbers(bounds[0], bounds[1], bounds[2])
		if bounds[0] == "900" {
			bad = append(bad, "899")
		}
		rules[name] = values{good, bad}
	}
	for name, v := range rules {
		for _, value := range v.bad {
			before := e.get(e.settingsPath())
			r := e.put(e.settingsPath(), "*", object{name: value})
			if r.Status != http.StatusBadRequest || !strings.Contains(string(r.Raw), name) {
				t.Errorf("%s = %v: status %d: %s", name, value, r.Status, r.Raw)
			}
			if after := e.get(e.settingsPath()); !reflect.DeepEqual(after, before) {
				t.Errorf("%s = %v changed %v to %v", name, value, before, after)
			}
		}
		for _, value := range v.good {
			got := e.put(e.settingsPath(), "*", object{name: value}).Want(http.StatusOK)
			if s, ok := value.(string); ok && got[name] != s {
				t.Errorf("%s is %v, want %v", name, got[name], s)
			}
		}
	}
	for _, body := range []string{"", "[]", "null x", "{", `"mfa"`, `{"mfa":"NONE","MFA":"TOTP"}`, `{"user_mfa":{"iam_id":"x"}}`} {
		e.put(e.settingsPath(), "*", body).Want(http.StatusBadRequest)
	}
	e.put(e.settingsPath(), "*", `{"mfa":"`+strings.Repeat("x", 10<<20)+`"}`).Want(http.StatusRequestEntityTooLarge)
}

func TestNobodyLocksHimselfOutByAnAddressList(t *testing.T) {
	e := start(t)
	for _, list := range []string{"10.0.0.1", "192.0.2.2-192.0.2.9", "198.51.100.0/24", "2001:db8::/32", "192.0.2.0/32,192.0.2.2"} {
		r := e.put(e.settingsPath(), "*", object{"allowed_ip_addresses": list, "mfa": "TOTP"})
		if r.Status != http.StatusBadRequest || !strings.Contains(string(r.Raw), peer) || !strings.Contains(string(r.Raw), "Add the address") {
			t.Errorf("%s: status %d: %s", list, r.Status, r.Raw)
		}
	}
	// Headers that name another peer are not believed.
	r := e.Do(apitest.Request{Method: "PUT", Path: e.settingsPath(), Body: object{"allowed_ip_addresses": "10.0.0.1"}, Header: map[string]string{
		"If-Match": "*", "X-Forwarded-For": "10.0.0.1", "X-Real-IP": "10.0.0.1", "Forwarded": "for=10.0.0.1",
	}})
	r.Want(http.StatusBadRequest)
	if got := e.get(e.settingsPath()); got["allowed_ip_addresses"] != "" || got["mfa"] != "NONE" {
		t.Errorf("a refused change left %v", got)
	}
	e.put(e.settingsPath(), "*", object{"allowed_ip_addresses": "10.0.0.1," + peer}).Want(http.StatusOK)
	e.put(e.settingsPath(), "*", object{"allowed_ip_addresses": ""}).Want(http.StatusOK)
}

func TestTheUsersOfAnMFAListAreResolvedOnRequest(t *testing.T) {
	e := start(t)
	e.user("IBMid-ANN", "ann@example.com")
	list := []object{{"iam_id": "IBMid-ANN", "mfa": "LEVEL1"}, {"iam_id": e.Owner.IAMID, "mfa": "NONE"}}
	plain := []any{object{"iam_id": "IBMid-ANN", "mfa": "LEVEL1"}, object{"iam_id": e.Owner.IAMID, "mfa": "NONE"}}
	if got := e.put(e.settingsPath(), "*", object{"user_mfa": list}).Want(http.StatusOK); !reflect.DeepEqual(got["user_mfa"], plain) {
		t.Errorf("user_mfa %v", got["user_mfa"])
	}
	if got := e.get(e.settingsPath()); !reflect.DeepEqual(got["user_mfa"], plain) {
		t.Errorf("user_mfa %v", got["user_mfa"])
	}
	resolved, _ := e.get(e.settingsPath() + "?resolve_user_mfa=true")["user_mfa"].([]any)
	want := object{"iam_id": "IBMid-ANN", "mfa": "LEVEL1", "name": "Name of IBMid-ANN", "userName": "ann@example.com", "email": "ann@example.com"}
	if len(resolved) != 2 || !reflect.DeepEqual(resolved[0], want) {
		t.Errorf("resolved %v", resolved)
	}
	if got := e.put(e.settingsPath(), "*", object{"user_mfa": []object{}}).Want(http.StatusOK); !reflect.DeepEqual(got["user_mfa"], []any{}) {
		t.Errorf("an empty list left %v", got["user_mfa"])
	}
}

func TestTheDomainsOfARealmAreSetAndRemovedByThemselves(t *testing.T) {
	e := start(t)
	change := func(entries ...object) string {
		t.Helper()
		got, err := json.Marshal(e.put(e.settingsPath(), "*", object{"restrict_user_domains": entries}).Want(http.StatusOK)["restrict_user_domains"])
		must(t, err)
		return string(got)
	}
	one := `{"invitation_email_allow_patterns":["*@example.com"],"realm_id":"one","restrict_invitation":true}`
	two := `{"invitation_email_allow_patterns":[],"realm_id":"two","restrict_invitation":true}`
	for _, step := range []struct {
		change []object
		want   string
	}{
		{[]object{{"realm_id": "one", "invitation_email_allow_patterns": []string{"*@example.com"}, "restrict_invitation": true}}, "[" + one + "]"},
		{[]object{{"realm_id": "two", "restrict_invitation": true}}, "[" + one + "," + two + "]"},
		{nil, "[" + one + "," + two + "]"},
		{[]object{{"realm_id": "one"}, {"realm_id": "three"}}, "[" + two + "]"},
		{[]object{{"realm_id": "two", "invitation_email_allow_patterns": []string{}}}, "[" + strings.Replace(two, "true", "false", 1) + "]"},
		{[]object{{"realm_id": "two"}}, "[]"},
	} {
		if got := change(step.change...); got != step.want {
			t.Errorf("after %v: %s, want %s", step.change, got, step.want)
		}
	}
	var realms []object
	for i := range 50 {
		realms = append(realms, object{"realm_id": fmt.Sprint(i), "restrict_invitation": true})
	}
	change(realms...)
	e.put(e.settingsPath(), "*", object{"restrict_user_domains": []object{{"realm_id": "one more", "restrict_invitation": true}}}).Want(http.StatusBadRequest)
}

func TestEffectiveSettingsShowTheNumbersInUse(t *testing.T) {
	e := start(t)
	e.put(e.settingsPath(), "*", object{"system_access_token_expiration_in_seconds": "1200", "mfa": "TOTP"}).Want(http.StatusOK)
	got := e.get("/v1/accounts/" + e.Owner.AccountID + "/effective_settings/identity?include_history=true")
	effective, _ := got["effective"].(object)
	account, _ := got["account"].(object)
	history, _ := account["history"].([]any)
	if effective["system_access_token_expiration_in_seconds"] != "1200" || effective["system_refresh_token_expiration_in_seconds"] != "259200" || effective["mfa"] != "TOTP" ||
		account["system_refresh_token_expiration_in_seconds"] != "NOT_SET" || account["entity_tag"] == nil || len(history) != 1 ||
		got["account_id"] != e.Owner.AccountID || !reflect.DeepEqual(got["assigned_templates"], []any{}) {
		t.Error(got)
	}
}

func TestAChangeOfSettingsIsRecordedWithItsOldAndNewValues(t *testing.T) {
	e := start(t)
	e.put(e.settingsPath(), "*", object{"mfa": "TOTP", "max_sessions_per_identity": "5", "restrict_user_list_visibility": "NOT_RESTRICTED"}).Want(http.StatusOK)
	event := e.Events(1)[0]
	var data object
	must(t, json.Unmarshal(event.ResponseData, &data))
	want := object{"old_mfa": "NONE", "new_mfa": "TOTP", "old_max_sessions_per_identity": "NOT_SET", "new_max_sessions_per_identity": "5"}
	if event.Action != "iam-identity.accountsettings.update" || !reflect.DeepEqual(data, want) {
		t.Errorf("event %s with %v, want %v", event.Action, data, want)
	}
	e.put(e.settingsPath(), "*", object{"mfa": "x"}).Want(http.StatusBadRequest)
	e.put(e.settingsPath(), "*", object{"user_mfa": []object{{"iam_id": e.Owner.IAMID, "mfa": "NONE"}}}).Want(http.StatusOK)
	if got := string(e.Events(1)[0].ResponseData); !strings.Contains(got, `"old_user_mfa":[]`) || !strings.Contains(got, e.Owner.IAMID) {
		t.Errorf("data %s", got)
	}
	history, _ := e.get(e.settingsPath() + "?include_history=true")["history"].([]any)
	if len(history) != 2 {
		t.Fatalf("history %v", history)
	}
	first, _ := history[0].(object)
	if first["iam_id"] != e.Owner.IAMID || first["iam_id_account"] != e.Owner.AccountID || first["action"] != "iam-identity.accountsettings.update" ||
		!strings.Contains(fmt.Sprint(first["params"]), "new_mfa=TOTP") || text(first, "message") == "" || text(first, "timestamp") == "" {
		t.Errorf("history begins with %v", first)
	}
}

func TestOfParallelWritersOfSettingsOneWins(t *testing.T) {
	e := start(t)
	for range 2 { // on settings that nobody has changed yet, and on stored ones
		tag := text(e.get(e.settingsPath()), "entity_tag")
		statuses := make([]int, 8)
		var wg sync.WaitGroup
		for i := range statuses {
			wg.Go(func() {
				statuses[i] = e.put(e.settingsPath(), tag, object{"max_sessions_per_identity": fmt.Sprint(i + 1)}).Status
			})
		}
		wg.Wait()
		slices.Sort(statuses)
		if want := append([]int{http.StatusOK}, slices.Repeat([]int{http.StatusConflict}, 7)...); !slices.Equal(statuses, want) {
			t.Errorf("statuses %v", statuses)
		}
	}
	e.put(e.settingsPath(), "", object{"mfa": "TOTP"}).Want(http.StatusBadRequest)
	e.put(e.settingsPath(), "1-0123456789abcdef0123456789abcdef", object{"mfa": "TOTP"}).Want(http.StatusConflict)
	if got := e.get(e.settingsPath()); got["mfa"] != "NONE" {
		t.Errorf("mfa %v", got["mfa"])
	}
}

// accountRoutes are valid requests for the routes that name an account, with
// ACCOUNT in its place.
func (e env) accountRoutes() []route {
	e.T.Helper()
	owner := "/v1/preferences/accounts/ACCOUNT/identities/" + e.Owner.IAMID
	e.Do(apitest.Request{Method: "PUT", Path: e.inAccount(owner + "/console/theme"), Body: object{"value_string": "dark"}}).Want(http.StatusOK)
	inactive := e.Do(apitest.Request{Method: "POST", Path: e.inAccount("/v1/activity/accounts/ACCOUNT/report")}).Want(http.StatusAccepted)
	mfa := e.Do(apitest.Request{Method: "POST", Path: e.inAccount("/v1/mfa/accounts/ACCOUNT/report")}).Want(http.StatusAccepted)
	return []route{
		{"GET", "/v1/accounts/ACCOUNT/settings/identity", nil, false},
		{"PUT", "/v1/accounts/ACCOUNT/settings/identity", object{"mfa": "NONE"}, true},
		{"GET", "/v1/accounts/ACCOUNT/effective_settings/identity", nil, false},
		{"POST", "/v1/activity/accounts/ACCOUNT/report?type=inactive&duration=120", nil, true},
		{"GET", "/v1/activity/accounts/ACCOUNT/report/latest", nil, true},
		{"GET", "/v1/activity/accounts/ACCOUNT/report/" + text(inactive, "reference"), nil, true},
		{"POST", "/v1/mfa/accounts/ACCOUNT/report?type=mfa_status", nil, true},
		{"GET", "/v1/mfa/accounts/ACCOUNT/report/latest", nil, true},
		{"GET", "/v1/mfa/accounts/ACCOUNT/report/" + text(mfa, "reference"), nil, true},
		{"GET", "/v1/mfa/accounts/ACCOUNT/status?iam_id=" + e.Owner.IAMID, nil, true},
		{"GET", owner, nil, true},
		{"GET", owner + "/console/theme", nil, true},
		{"PUT", owner + "/console/theme", object{"value_string": "light"}, true},
		{"DELETE", owner + "/console/theme", nil, true},
	}
}

func (e env) inAccount(path string) string {
	return strings.Replace(path, "ACCOUNT", e.Owner.AccountID, 1)
}

func TestAnAccountThatIsNotTheCallersIsNotFound(t *testing.T) {
	e := start(t)
	ifMatch := map[string]string{"If-Match": "*"}
	for _, r := range e.accountRoutes() {
		for _, account := range []string{e.Owner.AccountID, "0123456789abcdef0123456789abcdef", "x", "%00", "..%2f" + e.Other.AccountID, strings.Repeat("a", 5000)} {
			path := strings.Replace(r.path, "ACCOUNT", account, 1)
			got := e.Do(apitest.Request{Method: r.method, Path: path, Body: r.body, As: e.Other.IAMID, Header: ifMatch})
			if got.Status != http.StatusNotFound {
				t.Errorf("%s %.120s: status %d: %.300s", r.method, path, got.Status, got.Raw)
			}
			if strings.Contains(string(got.Raw), e.Owner.IAMID) {
				t.Errorf("%s %.120s tells %.300s", r.method, path, got.Raw)
			}
		}
		// Objects of one account are not found through another one's path either.
		path := strings.Replace(r.path, "ACCOUNT", e.Other.AccountID, 1)
		if !strings.Contains(path, e.Owner.IAMID) && !strings.Contains(path, "/report/") {
			continue
		}
		if got := e.Do(apitest.Request{Method: r.method, Path: path, Body: r.body, As: e.Other.IAMID}); got.Status != http.StatusNotFound {
			t.Errorf("%s %s: status %d: %s", r.method, path, got.Status, got.Raw)
		}
	}
}

func TestTheRoutesOfAnAccountNeedTheirActions(t *testing.T) {
	e := start(t)
	for _, r := range e.accountRoutes() {
		for as, allowed := range map[string]bool{stranger: false, viewer: !r.writes, e.Owner.IAMID: true} {
			got := e.Do(apitest.Request{Method: r.method, Path: e.inAccount(r.path), Body: r.body, As: as, Header: map[string]string{"If-Match": "*"}})
			if r.method == "DELETE" && got.Status == http.StatusNotFound {
				continue // the owner came first
			}
			if (got.Status < 300) != allowed || !allowed && got.Status != http.StatusForbidden {
				t.Errorf("%s %s as %s: status %d: %s", r.method, r.path, as, got.Status, got.Raw)
			}
		}
	}
}
