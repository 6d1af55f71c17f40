package iamidentity_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

func TestAServiceIDGroupHasTheFormThatClientsKnow(t *testing.T) {
	e := start(t)
	g := e.post("/v1/serviceid_groups/", object{"name": "g", "account_id": e.Owner.AccountID, "description": "d"})
	id := text(g, "id")
	if !strings.HasPrefix(id, "ServiceIdGroup-") || g["account_id"] != e.Owner.AccountID || g["created_by"] != e.Owner.IAMID || g["description"] != "d" ||
		g["crn"] != "crn:v1:bluemix:public:iam-identity::a/"+e.Owner.AccountID+"::serviceid-group:"+id || len(text(g, "created_at")) != len("2024-04-12T19:00+0000") {
		t.Error(g)
	}
	got := e.put(pathOf(g), text(g, "entity_tag"), object{"name": "g"}).Want(http.StatusOK)
	if got["description"] != "d" || got["entity_tag"] == g["entity_tag"] {
		t.Errorf("after an update without a description: %v", got)
	}
	if got := e.put(pathOf(g), "*", object{"name": "h", "description": ""}).Want(http.StatusOK); got["description"] != nil || got["name"] != "h" {
		t.Errorf("an empty description clears: %v", got)
	}
	e.put(pathOf(g), "*", object{"description": "x"}).Want(http.StatusBadRequest)
	e.serviceIDGroup("second")
	list := "/v1/serviceid_groups?account_id=" + e.Owner.AccountID
	if got := names(e.get(list), "serviceid_groups"); strings.Join(got, " ") != "h second" {
		t.Errorf("list %v", got)
	}
	if got := names(e.Do(apitest.Request{Path: list, As: stranger}).Want(http.StatusOK), "serviceid_groups"); len(got) != 0 {
		t.Errorf("a stranger sees %v", got)
	}
	e.Do(apitest.Request{Path: list, As: e.Other.IAMID}).Want(http.StatusForbidden)
	e.Do(apitest.Request{Path: "/v1/serviceid_groups"}).Want(http.StatusBadRequest)
	e.remove(pathOf(g))
	e.Do(apitest.Request{Path: pathOf(g)}).Want(http.StatusNotFound)
	e.put(pathOf(g), "*", object{"name": "x"}).Want(http.StatusNotFound)
}

func TestAServiceIDGroupsNameIsUniqueInItsAccount(t *testing.T) {
	e := start(t)
	g := e.serviceIDGroup("one")
	two := e.serviceIDGroup("two")
	body := object{"name": "one", "account_id": e.Owner.AccountID}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceid_groups", Body: body}).Want(http.StatusConflict)
	e.put(pathOf(two), "*", object{"name": "one"}).Want(http.StatusConflict)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceid_groups", Body: with(body, "account_id", e.Other.AccountID), As: e.Other.IAMID}).Want(http.StatusCreated)
	e.remove(pathOf(g))
	e.put(pathOf(two), "*", object{"name": "one"}).Want(http.StatusOK)
}

func TestAServiceIDGroupIsDeletedWhenItIsEmpty(t *testing.T) {
	e := start(t)
	g := e.serviceIDGroup("g")
	s := e.post("/v1/serviceids", object{"name": "in", "account_id": e.Owner.AccountID, "group_id": g["id"]})
	e.Do(apitest.Request{Method: "DELETE", Path: pathOf(g)}).Want(http.StatusConflict)
	e.remove(pathOf(s))
	e.remove(pathOf(g))
	gone := object{"name": "in", "account_id": e.Owner.AccountID, "group_id": g["id"]}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: gone}).Want(http.StatusNotFound)
}

func TestServiceIDsAndTheirKeysAreListedByGroup(t *testing.T) {
	e := start(t)
	g, empty := e.serviceIDGroup("g"), e.serviceIDGroup("empty")
	in := e.post("/v1/serviceids?show_group_id=true", object{"name": "in", "account_id": e.Owner.AccountID, "group_id": g["id"]})
	out := e.serviceID("out")
	if in["group_id"] != g["id"] || out["group_id"] != nil {
		t.Errorf("groups %v and %v", in["group_id"], out["group_id"])
	}
	for query, want := range map[string]any{"": nil, "?show_group_id=false": nil, "?show_group_id=true": g["id"]} {
		if got := e.get(pathOf(in) + query)["group_id"]; got != want {
			t.Errorf("%s: group %v, want %v", query, got, want)
		}
		if got := e.put(pathOf(in)+query, "*", object{"description": "x"}).Want(http.StatusOK)["group_id"]; got != want {
			t.Errorf("update%s: group %v, want %v", query, got, want)
		}
	}
	e.Do(apitest.Request{Path: pathOf(in) + "?show_group_id=yes"}).Want(http.StatusBadRequest)
	e.post("/v1/apikeys", object{"name": "key in", "iam_id": in["iam_id"]})
	e.post("/v1/apikeys", object{"name": "key out", "iam_id": out["iam_id"]})

	account := "account_id=" + e.Owner.AccountID
	for path, want := range map[string]string{
		"/v1/serviceids?" + account:                                                           "in out",
		"/v1/serviceids?" + account + "&group_id=" + text(g, "id"):                            "in",
		"/v1/serviceids?" + account + "&group_id=" + text(empty, "id"):                        "",
		"/v1/serviceids?" + account + "&group_id=unknown":                                     "",
		"/v1/apikeys?" + account + "&scope=account":                                           "owner key in key out",
		"/v1/apikeys?" + account + "&scope=account&group_id=" + text(g, "id"):                 "key in",
		"/v1/apikeys?" + account + "&group_id=" + text(g, "id"):                               "key in",
		"/v1/apikeys?" + account + "&group_id=" + text(g, "id") + "&type=user":                "",
		"/v1/apikeys?group_id=" + text(g, "id") + "&iam_id=" + text(in, "iam_id"):             "key in",
		"/v1/apikeys?group_id=" + text(g, "id") + "&iam_id=" + text(out, "iam_id"):            "",
		"/v1/apikeys?scope=account&type=serviceid&sort=name&order=desc&iam_id=" + "":          "key out key in",
		"/v1/apikeys?scope=account&filter=" + url.QueryEscape(`iam_id sw "iam-ServiceId-"`):   "key in key out",
		"/v1/serviceids?" + account + "&filter=" + url.QueryEscape(`name ew "n" or id co ""`): "in out",
	} {
		array := "apikeys"
		if strings.HasPrefix(path, "/v1/serviceids") {
			array = "serviceids"
		}
		if got := strings.Join(names(e.get(path), array), " "); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	foreign := e.Do(apitest.Request{Path: "/v1/apikeys?group_id=" + text(g, "id"), As: e.Other.IAMID}).Want(http.StatusOK)
	if got := names(foreign, "apikeys"); len(got) != 0 {
		t.Errorf("another account sees the keys of a group: %v", got)
	}
	foreign = e.Do(apitest.Request{Path: "/v1/serviceids?show_group_id=true&group_id=" + text(g, "id") + "&account_id=" + e.Other.AccountID, As: e.Other.IAMID}).Want(http.StatusOK)
	if got := names(foreign, "serviceids"); len(got) != 0 {
		t.Errorf("another account sees a group: %v", got)
	}
	body := object{"name": "x", "account_id": e.Other.AccountID, "group_id": g["id"]}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", As: e.Other.IAMID, Body: body}).Want(http.StatusNotFound)
}

func TestAFilteredListIsPagedByItsTokenAlone(t *testing.T) {
	e := start(t)
	for i := range 7 {
		e.profile(fmt.Sprintf("%d %s", i, []string{"odd", "even"}[i%2]))
	}
	page := e.get("/v1/profiles?pagesize=2&sort=name&account_id=" + e.Owner.AccountID + "&filter=" + url.QueryEscape(`name ew_ci "ODD"`))
	var seen []string
	for {
		seen = append(seen, names(page, "profiles")...)
		if page["next"] == nil {
			break
		}
		u, err := url.Parse(text(page, "next"))
		must(t, err)
		page = e.get("/v1/profiles/?pagetoken=" + u.Query().Get("pagetoken"))
	}
	if got := strings.Join(seen, ", "); got != "0 odd, 2 odd, 4 odd, 6 odd" {
		t.Error(got)
	}
	first := e.get(follow(t, e, page, "first"))
	if got := strings.Join(names(first, "profiles"), ", "); got != "0 odd, 2 odd" {
		t.Errorf("the first page: %s", got)
	}
}

// Names are taken, found, sorted and shown as they are, whatever stands in them.
func TestANameCanHaveEveryPrintableCharacter(t *testing.T) {
	e := start(t)
	var all strings.Builder
	for r := rune(0x20); r < 0x7f; r++ {
		all.WriteRune(r)
	}
	for _, name := range []string{all.String(), "żółw 龜 🐢 \u00a0", `"; DROP TABLE --`, "%2F../?&#+", "\\u0000", "<script>"} {
		account := e.Owner.AccountID
		k := e.post("/v1/apikeys", object{"name": name, "iam_id": e.Owner.IAMID})
		for array, o := range map[string]object{
			"profiles": e.profile(name), "serviceids": e.serviceID(name), "serviceid_groups": e.serviceIDGroup(name), "apikeys": k,
		} {
			if o["name"] != name || e.get(pathOf(o) + "?include_history=true")["name"] != name {
				t.Errorf("%q became %v", name, o["name"])
			}
			quoted := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(name)
			query := url.Values{"account_id": {account}, "name": {name}, "filter": {`name co "` + quoted + `"`}}
			if got := names(e.get("/v1/"+array+"?"+query.Encode()), array); len(got) == 0 || got[len(got)-1] != name {
				t.Errorf("%s lists %q as %q", array, name, got)
			}
			if array != "apikeys" {
				e.remove(pathOf(o))
			}
		}
	}
}
