package iamidentity_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/activity"
	"tabard.dev/tabard/internal/api/apitest"
)

// entries returns an object's history as pairs of action and IAM ID.
func entries(t *testing.T, o object) string {
	t.Helper()
	list, _ := o["history"].([]any)
	var out []string
	for _, item := range list {
		entry := item.(object)
		for _, required := range []string{"timestamp", "iam_id", "iam_id_account", "action", "message"} {
			if text(entry, required) == "" {
				t.Errorf("the entry has no %s: %v", required, entry)
			}
		}
		if _, ok := entry["params"].([]any); !ok {
			t.Errorf("the entry has no params: %v", entry)
		}
		action := text(entry, "action")
		out = append(out, action[strings.LastIndexByte(action, '.')+1:]+" "+text(entry, "iam_id"))
	}
	return strings.Join(out, ", ")
}

func TestAnObjectTellsItsHistoryToWhoAsks(t *testing.T) {
	e := start(t)
	editor := "IBMid-EDITOR"
	e.Grant(editor, "iam-identity", "Editor")
	own := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID})
	for _, o := range []object{e.profile("p"), e.serviceID("s"), own} {
		update := apitest.Request{Method: "PUT", Path: pathOf(o), As: editor, Body: object{"description": "new"}, Header: map[string]string{"If-Match": "*"}}
		e.Do(update).Want(http.StatusOK)
		update.As = stranger // a refusal is no change
		e.Do(update).Want(http.StatusForbidden)
		want := "create " + e.Owner.IAMID + ", update " + editor
		if got := entries(t, e.get(pathOf(o)+"?include_history=true")); got != want {
			t.Errorf("%s: %s, want %s", pathOf(o), got, want)
		}
		for _, query := range []string{"", "?include_history=false", "?include_activity=true"} {
			if got := e.get(pathOf(o) + query); got["history"] != nil || (got["activity"] != nil) != (query == "?include_activity=true") {
				t.Errorf("%s%s: %v", pathOf(o), query, got)
			}
		}
		e.Do(apitest.Request{Path: pathOf(o) + "?include_history=perhaps"}).Want(http.StatusBadRequest)
		e.Do(apitest.Request{Path: pathOf(o) + "?include_activity=1"}).Want(http.StatusBadRequest)

		array := strings.Split(pathOf(o), "/")[2]
		list := "/v1/" + array + "?account_id=" + e.Owner.AccountID + "&include_history=true&filter=" + url.QueryEscape(`id sw "`+text(o, "id")+`"`)
		items := e.get(list)[array].([]any)
		if len(items) != 1 || entries(t, items[0].(object)) != want {
			t.Errorf("%s: %v", list, items)
		}
	}
	// The owner's key was not made by a request, and still tells who made it.
	details := e.Do(apitest.Request{Path: "/v1/apikeys/details?include_history=true", Header: map[string]string{"IAM-ApiKey": e.Owner.APIKey}})
	if got := entries(t, details.Want(http.StatusOK)); got != "create "+e.Owner.IAMID {
		t.Errorf("the owner's key: %s", got)
	}
}

func TestAnObjectTellsItsUseToWhoAsks(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	k := e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"]})
	p := e.profile("p")
	paths := []string{pathOf(s), pathOf(k), pathOf(p)}
	for _, path := range paths {
		if got := e.get(path + "?include_activity=true")["activity"]; fmt.Sprint(got) != "map[authn_count:0]" {
			t.Errorf("%s: %v before any use", path, got)
		}
	}
	at := time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
	for range 2 {
		e.Usage.Login(&activity.Event{
			Time: activity.Time{Time: at}, Action: "iam-identity.serviceid-apikey.login", Outcome: activity.Success, AccountID: e.Owner.AccountID,
			Initiator: activity.Initiator{ID: text(s, "iam_id")}, Target: activity.Target{ID: text(k, "crn")},
		})
	}
	e.Usage.Login(&activity.Event{
		Time: activity.Time{Time: at}, Action: "iam-identity.computeresource-token.login", Outcome: activity.Success, AccountID: e.Owner.AccountID,
		Initiator: activity.Initiator{ID: text(p, "iam_id")}, Target: activity.Target{ID: text(p, "crn")},
	})
	for i, path := range paths {
		want := fmt.Sprintf("map[authn_count:%d last_authn:2026-05-04T03:02+0000]", []int{2, 2, 1}[i])
		if got := e.get(path + "?include_activity=true")["activity"]; fmt.Sprint(got) != want {
			t.Errorf("%s: %v, want %s", path, got, want)
		}
	}
}
