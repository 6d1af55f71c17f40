package iamidentity_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/identity"
)

func TestAnAccountKnowsWhatItHasAndMayHave(t *testing.T) {
	e := start(t)
	p, g := e.profile("p"), e.serviceIDGroup("g")
	s := e.post("/v1/serviceids", object{"name": "s", "account_id": e.Owner.AccountID, "group_id": g["id"], "apikey": object{"name": "k"}})
	e.post(pathOf(p)+"/rules", podRule)
	e.post(pathOf(p)+"/rules", object{"type": "Profile-SAML", "realm_name": "r", "conditions": podRule["conditions"]})
	e.post(pathOf(p)+"/links", e.podLink())
	path := "/v1/accounts/" + e.Owner.AccountID + "/limits/identity"

	count := func(o object, name string) string { return fmt.Sprint(o[name].(object)["count"]) }
	for _, all := range []object{
		e.get(path), e.get(path + "?serviceid_groups=true&profiles=true&templates=true&idps=true&cr_links=true&cr_rules=true"),
		e.Do(apitest.Request{Method: "POST", Path: path, Body: object{}}).Want(http.StatusOK),
	} {
		got := count(all, "serviceid_groups") + count(all, "profiles") + count(all, "profile_templates") + count(all, "account_settings_templates") +
			count(all, "idps") + count(all, "cr_links") + count(all, "cr_rules")
		if got != "1100011" {
			t.Errorf("counts %s of %v", got, all)
		}
		for name := range all {
			if _, ok := all[name].(object)["limit"].(float64); !ok {
				t.Errorf("%s has no limit: %v", name, all[name])
			}
		}
	}
	if got := e.get(path + "?profiles=true&cr_links=false"); len(got) != 1 || got["profiles"] == nil {
		t.Errorf("asked for profiles: %v", got)
	}

	of := func(o object, name, list string) string {
		var out []string
		for _, item := range o[name].(object)[list].([]any) {
			out = append(out, fmt.Sprint(item.(object)["count"]))
		}
		return strings.Join(out, " ")
	}
	ids := map[string][]string{
		"serviceids_per_group": {text(g, "id"), "ServiceIdGroup-unknown"}, "apikeys_per_identity": {text(s, "iam_id"), "iam-ServiceId-unknown"},
		"template_versions_per_template": {"AccountSettingsTemplate-1", "x"}, "claim_rules_per_group": {"AccessGroupId-1", "x"},
		"claim_rules_per_profile": {text(p, "id"), "x"}, "cr_links_per_profile": {text(p, "id"), "x"}, "cr_rules_per_profile": {text(p, "id"), "x"},
	}
	wants := map[string]string{
		"serviceids_per_group serviceid_groups": "1 0", "apikeys_per_identity identities": "1 0", "template_versions_per_template templates": "0 0",
		"claim_rules_per_group access_groups": "0 0", "claim_rules_per_profile profiles": "2 0", "cr_links_per_profile profiles": "1 0",
		"cr_rules_per_profile profiles": "1 0",
	}
	query := "?"
	for name, list := range ids {
		query += name + "=" + strings.Join(list, ",") + "&"
	}
	answers := []object{e.Do(apitest.Request{Method: "POST", Path: path, Body: ids}).Want(http.StatusOK), e.get(path + query)}
	for _, got := range answers {
		for what, want := range wants {
			name, list, _ := strings.Cut(what, " ")
			if counts := of(got, name, list); counts != want || got["profiles"] != nil {
				t.Errorf("%s: %s, want %s", name, counts, want)
			}
		}
	}

	// Another account learns nothing from the ids of this one.
	foreign := "/v1/accounts/" + e.Other.AccountID + "/limits/identity"
	got := e.Do(apitest.Request{Method: "POST", Path: foreign, Body: ids, As: e.Other.IAMID}).Want(http.StatusOK)
	for what := range wants {
		name, list, _ := strings.Cut(what, " ")
		if counts := of(got, name, list); counts != "0 0" {
			t.Errorf("another account counts %s of %s", counts, name)
		}
	}
	for _, method := range []string{"GET", "POST"} {
		body := any(object{})
		if method == "GET" {
			body = nil
		}
		e.Do(apitest.Request{Method: method, Path: path, Body: body, As: e.Other.IAMID}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: method, Path: "/v1/accounts/InvalidID/limits/identity", Body: body}).Want(http.StatusNotFound)
		e.Do(apitest.Request{Method: method, Path: path, Body: body, As: stranger}).Want(http.StatusForbidden)
		e.Do(apitest.Request{Method: method, Path: path, Body: body, As: viewer}).Want(http.StatusOK)
	}
	e.Do(apitest.Request{Path: path + "?profiles=perhaps"}).Want(http.StatusBadRequest)
	e.Do(apitest.Request{Path: path + "?cr_links_per_profile=" + strings.Repeat("x,", 101)}).Want(http.StatusBadRequest)
}

func TestAnEventTellsThatALimitIsNear(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	for i := range identity.MaxKeysPerIdentity {
		e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"]})
		data := string(e.Events(1)[0].ResponseData)
		if near := i+1 >= identity.MaxKeysPerIdentity*9/10; strings.Contains(data, `"limit_percent"`) != near {
			t.Errorf("key %d: %s", i+1, data)
		}
	}
}

func TestThereAreNoTemplates(t *testing.T) {
	e := start(t)
	for _, name := range []string{"profile_templates", "account_settings_templates"} {
		for _, query := range []string{"", "?account_id=" + e.Owner.AccountID + "&limit=10"} {
			if got := e.get("/v1/" + name + query); len(got[name].([]any)) != 0 {
				t.Errorf("%s: %v", name, got)
			}
		}
		e.Do(apitest.Request{Path: "/v1/" + name + "?account_id=" + e.Other.AccountID}).Want(http.StatusForbidden)
	}
}
