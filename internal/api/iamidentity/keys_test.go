package iamidentity_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/store"
)

func (e env) createKey(body object, as string) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys", Body: body, As: as})
}

func TestAnAPIKeyIsShownOnceAndKeptAsAHash(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	inline := e.post("/v1/serviceids/", object{"name": "with key", "account_id": e.Owner.AccountID, "apikey": object{"name": "inline"}})
	keys := []object{
		e.post("/v1/apikeys", object{"name": "mine", "iam_id": e.Owner.IAMID, "description": "GoSDK test apikey", "store_value": false}),
		e.post("/v1/apikeys", object{"name": "of service", "iam_id": s["iam_id"], "account_id": e.Owner.AccountID}),
		e.post("/v1/apikeys", object{"name": "given", "iam_id": e.Owner.IAMID, "apikey": strings.Repeat("k", 32)}),
		inline["apikey"].(object),
	}
	for _, k := range keys {
		secret := text(k, "apikey")
		stored, ok := e.Config.Directory.APIKeys.Get(text(k, "id"))
		if len(secret) < 32 || !ok || stored.Hash != e.Sealer.Hash(secret) || stored.Sealed != nil {
			t.Fatalf("key %v is stored as %+v", k, stored)
		}
		if got := e.get(pathOf(k)); got["apikey"] != nil || got["name"] != k["name"] || got["created_by"] != e.Owner.IAMID || got["locked"] != false ||
			got["account_id"] != e.Owner.AccountID || got["crn"] != "crn:v1:bluemix:public:iam-identity::a/"+e.Owner.AccountID+"::apikey:"+text(k, "id") {
			t.Errorf("read %v", got)
		}
		if got := e.put(pathOf(k), "*", object{"description": "changed"}).Want(http.StatusOK); got["apikey"] != nil {
			t.Errorf("an update shows the value: %v", got)
		}
	}
	if keys[2]["apikey"] != strings.Repeat("k", 32) {
		t.Error("the given value was not taken")
	}
	if got := e.get(pathOf(inline)); got["apikey"] != nil {
		t.Errorf("the service ID shows its key: %v", got)
	}
	e.keptNowhere(keys...)
}

// keptNowhere demands that neither the objects nor the events hold a value, and
// events not even a hash.
func (e env) keptNowhere(keys ...object) {
	e.T.Helper()
	var docs strings.Builder
	must(e.T, e.Store.Load(context.Background(), func(r store.Record) error { docs.Write(r.Doc); return nil }))
	events, err := json.Marshal(e.Events(500))
	must(e.T, err)
	for _, k := range keys {
		secret := text(k, "apikey")
		if secret == "" || strings.Contains(docs.String(), secret) || strings.Contains(string(events), secret) || strings.Contains(string(events), e.Sealer.Hash(secret)) {
			e.T.Errorf("a value is kept, or was never shown: %q", secret)
		}
	}
}

func TestAServiceIDsKeyIsShownAgainWhenItsValueIsStored(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	inline := e.post("/v1/serviceids/", object{"name": "with key", "account_id": e.Owner.AccountID, "apikey": object{"name": "inline", "store_value": true}})
	keys := []object{
		inline["apikey"].(object),
		e.post("/v1/apikeys", object{"name": "of service", "iam_id": s["iam_id"], "store_value": true}),
		e.post("/v1/apikeys", object{"name": "given", "iam_id": s["iam_id"], "store_value": true, "apikey": strings.Repeat("v", 40)}),
	}
	for _, k := range keys {
		secret := text(k, "apikey")
		if got := e.get(pathOf(k)); got["apikey"] != secret {
			t.Errorf("get %v, want %s", got, secret)
		}
		if got := e.put(pathOf(k), "*", object{"name": "renamed"}).Want(http.StatusOK); got["apikey"] != secret {
			t.Errorf("update %v, want %s", got, secret)
		}
		// Neither a list nor whoever has the value already is told.
		details := e.Do(apitest.Request{Path: "/v1/apikeys/details", Header: map[string]string{"IAM-ApiKey": secret}})
		if details.Want(http.StatusOK)["apikey"] != nil {
			t.Error("the details repeat the value")
		}
		if r := e.Do(apitest.Request{Path: "/v1/apikeys?scope=account&include_history=true"}); r.Status != http.StatusOK || strings.Contains(string(r.Raw), secret) {
			t.Errorf("the list shows a value: %s", r.Raw)
		}
		e.Do(apitest.Request{Path: pathOf(k), As: viewer}).Want(http.StatusForbidden)
		e.Do(apitest.Request{Path: pathOf(k), As: e.Other.IAMID}).Want(http.StatusNotFound)
	}
	e.keptNowhere(keys...)
	e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "store_value": true}, "").Want(http.StatusBadRequest)

	// A sealed value that was moved to another key is not shown as that one's.
	d := e.Config.Directory
	moved, _ := d.APIKeys.Get(text(keys[1], "id"))
	forged := *moved
	other, _ := d.APIKeys.Get(text(keys[2], "id"))
	forged.Sealed = other.Sealed
	must(t, d.Update(context.Background(), "test", func(tx *directory.Tx) error { d.APIKeys.Put(tx, &forged); return nil }))
	if r := e.Do(apitest.Request{Path: pathOf(keys[1])}); r.Status == http.StatusOK || strings.Contains(string(r.Raw), text(keys[2], "apikey")) {
		t.Errorf("status %d: %s", r.Status, r.Raw)
	}
}

func TestSessionsAreForKeysOfUsersOnly(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	mine := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID, "support_sessions": true, "action_when_leaked": "disable"})
	if mine["support_sessions"] != true || mine["action_when_leaked"] != "disable" {
		t.Error(mine)
	}
	if got := e.put(pathOf(mine), "*", object{"support_sessions": false, "action_when_leaked": "delete"}).Want(http.StatusOK); got["support_sessions"] != false || got["action_when_leaked"] != "delete" {
		t.Error(got)
	}
	if got := e.put(pathOf(mine), "*", object{"name": "n"}).Want(http.StatusOK); got["action_when_leaked"] != "delete" {
		t.Errorf("a change of the name changed the action: %v", got)
	}
	theirs := e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"], "support_sessions": false})
	e.put(pathOf(theirs), "*", object{"support_sessions": true}).Want(http.StatusBadRequest)
	e.createKey(object{"name": "k", "iam_id": s["iam_id"], "support_sessions": true}, "").Want(http.StatusBadRequest)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: object{"name": "s", "account_id": e.Owner.AccountID, "apikey": object{"name": "k", "support_sessions": true}}}).
		Want(http.StatusBadRequest)
}

func TestALeakedKeyMeetsWhatItsOwnerChose(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	manager := "IBMid-SECURITY"
	e.Grant(manager, "iam-identity", "Administrator")
	for what, iamID := range map[string]any{"user-apikey": e.Owner.IAMID, "serviceid-apikey": s["iam_id"]} {
		for _, action := range []string{"none", "disable", "delete", ""} {
			for _, byValue := range []bool{false, true} {
				body := object{"name": "k", "iam_id": iamID, "action_when_leaked": action}
				k := e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys", Body: body, Header: map[string]string{"Entity-Lock": "true"}}).Want(http.StatusCreated)
				report := apitest.Request{Method: "POST", Path: pathOf(k) + "/leaked", As: manager}
				if byValue {
					report.Path, report.Header = "/v1/apikeys/leaked", map[string]string{"IAM-ApiKey": text(k, "apikey")}
				}
				answer := e.Do(report)
				got := answer.Want(http.StatusOK)
				want := action
				if action == "" {
					want = "none"
				}
				if got["id"] != k["id"] || got["leaked"] != true || got["action"] != want {
					t.Errorf("%s, %q: %v", what, action, got)
				}
				event := e.Events(1)[0]
				if event.Action != "iam-identity."+what+".report-leak" || event.Severity != "critical" || event.Initiator.ID != manager || event.Target.ID != k["crn"] ||
					!strings.Contains(string(event.ResponseData), `"action":"`+want+`"`) {
					t.Errorf("event %+v with %s", event, event.ResponseData)
				}
				if strings.Contains(string(answer.Raw), text(k, "apikey")) {
					t.Error("the answer repeats the value")
				}
				now := e.Do(apitest.Request{Path: pathOf(k)})
				switch action {
				case "delete":
					now.Want(http.StatusNotFound)
				default:
					if o := now.Want(http.StatusOK); o["leaked"] != true || o["disabled"] != (action == "disable") || o["locked"] != true {
						t.Errorf("%s, %q: the key is now %v", what, action, o)
					}
					e.Do(report).Want(http.StatusOK)
				}
				e.keptNowhere(k)
			}
		}
		for _, k := range e.Config.Directory.APIKeysByIdentity.Get(directory.Key(e.Owner.AccountID, fmt.Sprint(iamID))) {
			if k.Name != "owner" {
				must(t, e.Config.Directory.Update(context.Background(), "test", func(tx *directory.Tx) error { e.Config.Directory.APIKeys.Delete(tx, k); return nil }))
			}
		}
	}
	k := e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"], "action_when_leaked": "delete"})
	e.Grant("IBMid-OPERATOR", "iam-identity", "Operator")
	for who, want := range map[string]int{"IBMid-OPERATOR": http.StatusForbidden, viewer: http.StatusForbidden, stranger: http.StatusForbidden, e.Other.IAMID: http.StatusNotFound} {
		e.Do(apitest.Request{Method: "POST", Path: pathOf(k) + "/leaked", As: who}).Want(want)
		e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys/leaked", As: who, Header: map[string]string{"IAM-ApiKey": text(k, "apikey")}}).Want(want)
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys/leaked"}).Want(http.StatusBadRequest)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys/leaked", Header: map[string]string{"IAM-ApiKey": "unknown"}}).Want(http.StatusNotFound)
	e.get(pathOf(k))
}

func TestNobodyGetsAKeyForSomebodyElse(t *testing.T) {
	e := start(t)
	victim := "IBMid-VICTIM"
	e.Grant("IBMid-ADMIN", "iam-identity", "Administrator")
	e.Grant("IBMid-OPERATOR", "iam-identity", "Operator")
	profile := e.profile("p")
	foreign := e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", As: e.Other.IAMID, Body: object{"name": "s", "account_id": e.Other.AccountID}}).Want(http.StatusCreated)
	before := e.Config.Directory.APIKeys.Len()
	for _, attacker := range []string{e.Owner.IAMID, "IBMid-ADMIN", "IBMid-OPERATOR", viewer, stranger} {
		e.createKey(object{"name": "x", "iam_id": victim}, attacker).Want(http.StatusForbidden)
		e.createKey(object{"name": "x", "iam_id": e.Other.IAMID}, attacker).Want(http.StatusForbidden)
		e.createKey(object{"name": "x", "iam_id": victim, "account_id": e.Owner.AccountID}, attacker).Want(http.StatusForbidden)
		e.createKey(object{"name": "x", "iam_id": foreign["iam_id"]}, attacker).Want(http.StatusNotFound)
		e.createKey(object{"name": "x", "iam_id": profile["iam_id"]}, attacker).Want(http.StatusBadRequest)
		for _, id := range []string{"", "x", "crn-crn:v1:bluemix:public:is::a/x::instance:1", "iam-x", "iam-ServiceId"} {
			e.createKey(object{"name": "x", "iam_id": id}, attacker).Want(http.StatusBadRequest)
		}
		// A body that says two things is refused before anybody reads it.
		for _, body := range []string{
			`{"name":"x","iam_id":"` + attacker + `","iam_id":"` + victim + `"}`,
			`{"name":"x","iam_id":"` + attacker + `","IAM_ID":"` + victim + `"}`,
			`{"name":"x","iam_id":"` + text(foreign, "iam_id") + `","iam_id":"` + victim + `"}`,
		} {
			got := e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys", Body: body, As: attacker})
			got.Want(http.StatusBadRequest)
		}
	}
	if after := e.Config.Directory.APIKeys.Len(); after != before {
		t.Fatalf("%d keys were created", after-before)
	}
	// A profile session cannot turn itself into a lasting credential.
	e.Grant(text(profile, "iam_id"), "iam-identity", "Administrator")
	e.createKey(object{"name": "x", "iam_id": profile["iam_id"]}, text(profile, "iam_id")).Want(http.StatusBadRequest)
	e.createKey(object{"name": "x", "iam_id": e.Owner.IAMID}, text(profile, "iam_id")).Want(http.StatusForbidden)
}

func TestAKeyNeedsTheActionForItsHolder(t *testing.T) {
	e := start(t)
	s, other := e.serviceID("s"), e.serviceID("other")
	own := "IBMid-OWNKEYS"
	e.Grant(own, "iam-identity", "User Api Key Creator")
	e.createKey(object{"name": "x", "iam_id": own}, own).Want(http.StatusCreated)
	e.createKey(object{"name": "x", "iam_id": s["iam_id"]}, own).Want(http.StatusForbidden)
	e.createKey(object{"name": "x", "iam_id": viewer}, viewer).Want(http.StatusForbidden)

	// The right can be given for one service ID.
	team := "IBMid-TEAM"
	e.grantOn(team, "serviceid", text(s, "id"), "Operator")
	e.createKey(object{"name": "x", "iam_id": s["iam_id"]}, team).Want(http.StatusCreated)
	e.createKey(object{"name": "x", "iam_id": other["iam_id"]}, team).Want(http.StatusForbidden)

	// The right to create service IDs does not include their keys.
	creator := "IBMid-CREATOR"
	e.Grant(creator, "iam-identity", "Service Id Creator")
	body := object{"name": "new", "account_id": e.Owner.AccountID}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: body, As: creator}).Want(http.StatusCreated)
	before := e.Config.Directory.ServiceIDs.Len()
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: with(body, "apikey", object{"name": "k"}), As: creator}).Want(http.StatusForbidden)
	if e.Config.Directory.ServiceIDs.Len() != before {
		t.Error("the refused request left a service ID")
	}
}

func TestEventsOfKeysAreNamedAfterTheirHolder(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	for what, iamID := range map[string]any{"user-apikey": e.Owner.IAMID, "serviceid-apikey": s["iam_id"]} {
		k := e.post("/v1/apikeys", object{"name": "k", "iam_id": iamID})
		last := func(verb string) {
			t.Helper()
			event := e.Events(1)[0]
			if event.Action != "iam-identity."+what+"."+verb || event.Target.TypeURI != "iam-identity/"+what || event.Target.ID != k["crn"] ||
				!strings.Contains(string(event.ResponseData), fmt.Sprint(iamID)) || event.Severity != "critical" {
				t.Errorf("event %+v with %s", event, event.ResponseData)
			}
		}
		last("create")
		e.put(pathOf(k), "*", object{"name": "renamed"}).Want(http.StatusOK)
		last("update")
		e.Do(apitest.Request{Method: "POST", Path: pathOf(k) + "/disable"}).Want(http.StatusNoContent)
		last("update")
		e.remove(pathOf(k))
		last("delete")
	}
}

func TestAnAPIKeyValueMustBeLongAndNew(t *testing.T) {
	e := start(t)
	value := strings.Repeat("v", 40)
	for _, bad := range []string{strings.Repeat("x", 31), strings.Repeat("x", 257), strings.Repeat("x ", 20), strings.Repeat("é", 40), strings.Repeat("x\n", 20)} {
		e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "apikey": bad}, "").Want(http.StatusBadRequest)
	}
	e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "apikey": value}, "").Want(http.StatusCreated)
	e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "apikey": value}, "").Want(http.StatusConflict)
	e.createKey(object{"name": "k", "iam_id": e.Other.IAMID, "apikey": value}, e.Other.IAMID).Want(http.StatusConflict)
	if got := e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "apikey": value}, ""); strings.Contains(string(got.Raw), value) {
		t.Error("the refusal repeats the value")
	}
	e.createKey(object{"iam_id": e.Owner.IAMID}, "").Want(http.StatusBadRequest)
	e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "action_when_leaked": "tell"}, "").Want(http.StatusBadRequest)
}

func TestAnIdentityHasAtMostTwentyKeys(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	for range identity.MaxKeysPerIdentity {
		e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"]})
	}
	e.createKey(object{"name": "k", "iam_id": s["iam_id"]}, "").Want(http.StatusConflict)
	e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID})
}

func TestAKeyExpiresWhenItsCreatorSays(t *testing.T) {
	e := start(t)
	for given, want := range map[string]string{
		"2049-01-02T18:30+0000": "2049-01-02T18:30+0000", "2049-01-02T18:30:00+0000": "2049-01-02T18:30+0000",
		"2049-01-02T18:30:00Z": "2049-01-02T18:30+0000", "2049-01-02T18:30:00.123Z": "2049-01-02T18:30+0000", "2049-01-02T18:30:00+00": "2049-01-02T18:30+0000", "2049-01-02T20:30:00+02:00": "2049-01-02T18:30+0000",
	} {
		k := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID, "expires_at": given})
		if k["expires_at"] != want {
			t.Errorf("%s became %v", given, k["expires_at"])
		}
		if got := e.put(pathOf(k), "*", object{"name": "n"}).Want(http.StatusOK); got["expires_at"] != want {
			t.Errorf("a change of the name changed the end to %v", got["expires_at"])
		}
		if got := e.put(pathOf(k), "*", object{"expires_at": ""}).Want(http.StatusOK); got["expires_at"] != nil {
			t.Errorf("the end was not removed: %v", got["expires_at"])
		}
		e.put(pathOf(k), "*", object{"expires_at": "tomorrow"}).Want(http.StatusBadRequest)
	}
	for _, bad := range []string{"2001-01-02T18:30+0000", "9999-12-31T23:59-0800", "9999-12-31T23:59:00-08:00", "2049-01-02", "x", time.Now().UTC().Add(-time.Minute).Format(time.RFC3339)} {
		e.createKey(object{"name": "k", "iam_id": e.Owner.IAMID, "expires_at": bad}, "").Want(http.StatusBadRequest)
	}
}

func TestAKeyIsFoundByItsValueInItsOwnAccount(t *testing.T) {
	e := start(t)
	details := func(value, as string) *apitest.Response {
		return e.Do(apitest.Request{Path: "/v1/apikeys/details?include_history=true", As: as, Header: map[string]string{"IAM-ApiKey": value}})
	}
	got := details(e.Owner.APIKey, e.Owner.IAMID).Want(http.StatusOK)
	if got["iam_id"] != e.Owner.IAMID || got["apikey"] != nil || got["locked"] != false {
		t.Error(got)
	}
	details(e.Owner.APIKey, e.Other.IAMID).Want(http.StatusNotFound)
	details(e.Owner.APIKey, stranger).Want(http.StatusForbidden)
	details("", e.Owner.IAMID).Want(http.StatusBadRequest)
	if r := details("no-such-value-at-all", e.Owner.IAMID); r.Status != http.StatusNotFound || strings.Contains(string(r.Raw), "no-such-value") {
		t.Errorf("status %d: %s", r.Status, r.Raw)
	}
}

func TestALockHoldsAKeyAndAServiceID(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	k := e.post("/v1/apikeys", object{"name": "k", "iam_id": s["iam_id"]})
	lock := func(method string, o object) *apitest.Response {
		return e.Do(apitest.Request{Method: method, Path: pathOf(o) + "/lock"})
	}
	for _, o := range []object{k, s} {
		lock("DELETE", o).Want(http.StatusConflict)
		lock("POST", o).Want(http.StatusNoContent)
		lock("POST", o).Want(http.StatusConflict)
		if e.get(pathOf(o))["locked"] != true {
			t.Errorf("%s does not show its lock", pathOf(o))
		}
		e.put(pathOf(o), "*", object{"name": "x"}).Want(http.StatusConflict)
		e.Do(apitest.Request{Method: "DELETE", Path: pathOf(o)}).Want(http.StatusConflict)
	}
	lock("DELETE", s).Want(http.StatusNoContent)
	e.Do(apitest.Request{Method: "DELETE", Path: pathOf(s)}).Want(http.StatusConflict) // its key is locked
	e.get(pathOf(k))
	lock("DELETE", k).Want(http.StatusNoContent)
	e.remove(pathOf(s))
	e.Do(apitest.Request{Path: pathOf(k)}).Want(http.StatusNotFound)

	header := map[string]string{"Entity-Lock": "true", "Entity-Disable": "true"}
	locked := e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids/", Header: header, Body: object{"name": "s", "account_id": e.Owner.AccountID}}).Want(http.StatusCreated)
	lockedKey := e.Do(apitest.Request{Method: "POST", Path: "/v1/apikeys", Header: header, Body: object{"name": "k", "iam_id": locked["iam_id"]}}).Want(http.StatusCreated)
	if locked["locked"] != true || lockedKey["locked"] != true || lockedKey["disabled"] != true {
		t.Errorf("made locked: %v, %v", locked, lockedKey)
	}
}

func TestAKeyCanBeDisabledAndEnabled(t *testing.T) {
	e := start(t)
	k := e.post("/v1/apikeys", object{"name": "k", "iam_id": e.Owner.IAMID})
	disable := func(method string) *apitest.Response {
		return e.Do(apitest.Request{Method: method, Path: pathOf(k) + "/disable"})
	}
	disable("POST").Want(http.StatusNoContent)
	disable("POST").Want(http.StatusConflict)
	if e.get(pathOf(k))["disabled"] != true {
		t.Error("the key does not show that it is disabled")
	}
	disable("DELETE").Want(http.StatusNoContent)
	disable("DELETE").Want(http.StatusConflict)
	e.Do(apitest.Request{Method: "POST", Path: pathOf(k) + "/lock"}).Want(http.StatusNoContent)
	disable("POST").Want(http.StatusNoContent)
}

func TestKeysAreListedByHolderOrAccount(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	e.post("/v1/apikeys", object{"name": "mine", "iam_id": e.Owner.IAMID})
	e.post("/v1/apikeys", object{"name": "service", "iam_id": s["iam_id"]})
	e.Grant("IBMid-ADMIN", "iam-identity", "Administrator")
	e.createKey(object{"name": "admin", "iam_id": "IBMid-ADMIN"}, "IBMid-ADMIN").Want(http.StatusCreated)
	for query, want := range map[string]string{
		"":                                  "owner mine",
		"?iam_id=" + e.Owner.IAMID:          "owner mine",
		"?iam_id=" + text(s, "iam_id"):      "service",
		"?iam_id=iam-ServiceId-unknown":     "",
		"?scope=account":                    "owner mine service admin",
		"?scope=account&type=user":          "owner mine admin",
		"?scope=account&type=serviceid":     "service",
		"?scope=account&sort=name":          "admin mine owner service",
		"?scope=account&iam_id=IBMid-ADMIN": "admin",
		"/?account_id=" + e.Owner.AccountID: "owner mine",
		"?sort=created_at&order=desc":       "mine owner",
	} {
		got := strings.Join(names(e.get("/v1/apikeys"+query), "apikeys"), " ")
		if got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	e.Do(apitest.Request{Path: "/v1/apikeys?iam_id=IBMid-ADMIN"}).Want(http.StatusForbidden)
	e.Do(apitest.Request{Path: "/v1/apikeys?iam_id=" + e.Owner.IAMID, As: "IBMid-ADMIN"}).Want(http.StatusForbidden)
	if got := names(e.Do(apitest.Request{Path: "/v1/apikeys?scope=account", As: stranger}).Want(http.StatusOK), "apikeys"); len(got) != 0 {
		t.Errorf("a stranger sees %v", got)
	}
	if got := string(e.Do(apitest.Request{Path: "/v1/apikeys?scope=account"}).Raw); strings.Contains(got, "hash") || strings.Contains(got, `"apikey":`) {
		t.Errorf("the list shows secrets: %s", got)
	}
}

func TestAServiceIDHasTheFormThatClientsKnow(t *testing.T) {
	e := start(t)
	instance := "crn:v1:bluemix:public:cloud-object-storage:global:a/" + e.Owner.AccountID + ":1234::"
	s := e.post("/v1/serviceids/", object{"name": "s", "account_id": e.Owner.AccountID, "description": "d", "unique_instance_crns": []string{instance}})
	id := text(s, "id")
	if !strings.HasPrefix(id, "ServiceId-") || s["iam_id"] != "iam-"+id || s["locked"] != false ||
		s["crn"] != "crn:v1:bluemix:public:iam-identity::a/"+e.Owner.AccountID+"::serviceid:"+id ||
		fmt.Sprint(s["unique_instance_crns"]) != "["+instance+"]" {
		t.Error(s)
	}
	got := e.put(pathOf(s), text(s, "entity_tag"), object{"description": "new"}).Want(http.StatusOK)
	if got["name"] != "s" || got["description"] != "new" || got["unique_instance_crns"] == nil {
		t.Errorf("a partial update: %v", got)
	}
	if got := e.put(pathOf(s), "*", object{"unique_instance_crns": []string{}}).Want(http.StatusOK); got["unique_instance_crns"] != nil {
		t.Errorf("an empty list clears: %v", got)
	}
	e.serviceID("s") // names are not unique
	list := e.get("/v1/serviceids/?pagesize=100&name=s&account_id=" + e.Owner.AccountID)
	if len(names(list, "serviceids")) != 2 || list["offset"] != 0.0 || list["next"] != nil {
		t.Errorf("list %v", list)
	}
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: object{"name": "s", "account_id": e.Owner.AccountID, "group_id": "x"}}).Want(http.StatusNotFound)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: object{"name": "s", "account_id": e.Owner.AccountID, "apikey": object{}}}).Want(http.StatusBadRequest)
}

func TestAServiceIDTakesAllThatHangsOnItAlong(t *testing.T) {
	e := start(t)
	d := e.Config.Directory
	s, other := e.serviceID("gone"), e.serviceID("stays")
	group := &access.Group{ID: "AccessGroupId-1", AccountID: e.Owner.AccountID, Name: "g"}
	for _, o := range []object{s, other} {
		e.post("/v1/apikeys", object{"name": "k", "iam_id": o["iam_id"]})
		e.Grant(text(o, "iam_id"), "is", "Operator")
		group.Members = append(group.Members, access.Member{IAMID: text(o, "iam_id"), Type: "service"})
	}
	must(t, d.Update(context.Background(), e.Owner.IAMID, func(tx *directory.Tx) error { d.Groups.Put(tx, group); return nil }))
	e.remove(pathOf(s))
	e.Do(apitest.Request{Path: pathOf(s)}).Want(http.StatusNotFound)
	for o, want := range map[string]int{text(s, "iam_id"): 0, text(other, "iam_id"): 1} {
		subject := directory.Key(e.Owner.AccountID, o)
		keys, policies, groups := d.APIKeysByIdentity.Len(subject), d.PoliciesOfSubject.Len(subject), len(d.StaticGroupsOf(e.Owner.AccountID, o))
		if keys != want || policies != want || groups != want {
			t.Errorf("%s has %d keys, %d policies, %d groups; want %d of each", o, keys, policies, groups, want)
		}
	}
}

// restrict changes one of the account's settings.
func (e env) restrict(change func(*identity.Settings)) {
	e.T.Helper()
	d := e.Config.Directory
	must(e.T, d.Update(context.Background(), "test", func(tx *directory.Tx) error {
		s := *d.SettingsOf(e.Owner.AccountID)
		change(&s)
		d.Settings.Put(tx, &s)
		return nil
	}))
}

func TestAUserMakesHisOwnKeysUnlessTheAccountRestrictsIt(t *testing.T) {
	e := start(t)
	const plain, creator, gone = "IBMid-PLAIN", "IBMid-CREATOR", "IBMid-GONE"
	for _, id := range []string{plain, creator, gone} {
		e.user(id, id+"@example.com")
	}
	e.Grant(creator, "iam-identity", "User Api Key Creator")
	e.Grant("IBMid-NOUSER", "iam-identity", "Viewer")
	d := e.Config.Directory
	must(t, d.Update(context.Background(), "test", func(tx *directory.Tx) error {
		u, _ := d.Users.Get(directory.UserKey(e.Owner.AccountID, gone))
		disabled := *u
		disabled.Disabled = true
		d.Users.Put(tx, &disabled)
		return nil
	}))
	own := func(who string) *apitest.Response {
		return e.createKey(object{"name": "own", "iam_id": who}, who)
	}
	for _, setting := range []string{identity.NotSet, identity.NotRestricted} {
		e.restrict(func(s *identity.Settings) { s.RestrictCreateAPIKey = setting })
		own(plain).Want(http.StatusCreated)
		own(creator).Want(http.StatusCreated)
		own(gone).Want(http.StatusForbidden)
		own("IBMid-NOUSER").Want(http.StatusForbidden)
		e.createKey(object{"name": "x", "iam_id": creator}, plain).Want(http.StatusForbidden)
		e.createKey(object{"name": "x", "iam_id": e.serviceID("s")["iam_id"]}, plain).Want(http.StatusForbidden)
	}
	e.restrict(func(s *identity.Settings) { s.RestrictCreateAPIKey = identity.Restricted })
	own(plain).Want(http.StatusForbidden)
	own(creator).Want(http.StatusCreated)

	// What he made he sees, changes and gives up, and nobody else's.
	mine := d.APIKeysByIdentity.Get(directory.Key(e.Owner.AccountID, plain))[0]
	theirs := d.APIKeysByIdentity.Get(directory.Key(e.Owner.AccountID, creator))[0]
	as := func(method, path string, body any) *apitest.Response {
		return e.Do(apitest.Request{Method: method, Path: path, Body: body, As: plain, Header: map[string]string{"If-Match": "*"}})
	}
	for path, want := range map[string]int{"/v1/apikeys/" + mine.ID: http.StatusOK, "/v1/apikeys/" + theirs.ID: http.StatusForbidden} {
		as("GET", path, nil).Want(want)
		as("PUT", path, object{"description": "x"}).Want(want)
		as("POST", path+"/leaked", nil).Want(want)
	}
	for _, query := range []string{"", "?scope=account"} {
		if got := names(as("GET", "/v1/apikeys"+query, nil).Want(http.StatusOK), "apikeys"); len(got) != 2 {
			t.Errorf("%s: sees %v, want his two", query, got)
		}
	}
	as("DELETE", "/v1/apikeys/"+mine.ID, nil).Want(http.StatusNoContent)
	as("DELETE", "/v1/apikeys/"+theirs.ID, nil).Want(http.StatusForbidden)
}

func TestServiceIDsAreMadeByWhomTheAccountLets(t *testing.T) {
	e := start(t)
	const plain, creator = "IBMid-PLAIN", "IBMid-CREATOR"
	e.user(plain, "plain@example.com")
	e.user(creator, "creator@example.com")
	e.Grant(creator, "iam-identity", "Service Id Creator")
	profile := e.profile("p")
	create := func(who string, body object) *apitest.Response {
		return e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: with(body, "account_id", e.Owner.AccountID), As: who})
	}
	for setting, want := range map[string]int{
		identity.NotSet: http.StatusForbidden, identity.Restricted: http.StatusForbidden, identity.NotRestricted: http.StatusCreated,
	} {
		e.restrict(func(s *identity.Settings) { s.RestrictCreateServiceID = setting })
		create(plain, object{"name": "s"}).Want(want)
		create(creator, object{"name": "s"}).Want(http.StatusCreated)
		create(stranger, object{"name": "s"}).Want(http.StatusForbidden)
		create(text(profile, "iam_id"), object{"name": "s"}).Want(http.StatusForbidden)
		create(plain, object{"name": "s", "apikey": object{"name": "k"}}).Want(http.StatusForbidden)
	}
	// The other account's openness is not this one's.
	e.restrict(func(s *identity.Settings) { s.RestrictCreateServiceID = identity.NotRestricted })
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: object{"name": "s", "account_id": e.Owner.AccountID}, As: e.Other.IAMID}).Want(http.StatusForbidden)
	e.Do(apitest.Request{Method: "POST", Path: "/v1/serviceids", Body: object{"name": "s", "account_id": e.Other.AccountID}, As: plain, Account: e.Other.AccountID}).
		Want(http.StatusForbidden)
}

func TestAStoredValueIsShownOnlyToWhoCouldMakeAKeyAndEveryReadIsRecorded(t *testing.T) {
	e := start(t)
	s := e.serviceID("s")
	k := e.post("/v1/apikeys", object{"name": "stored", "iam_id": s["iam_id"], "store_value": true})
	path := "/v1/apikeys/" + text(k, "id")
	read := func(as string) string {
		m := e.Do(apitest.Request{Path: path, As: as}).Want(http.StatusOK)
		value, _ := m["apikey"].(string)
		return value
	}
	if read("") != text(k, "apikey") {
		t.Error("the owner does not see the value")
	}
	if ev := e.Events(1)[0]; ev.Action != "iam-identity.serviceid-apikey.read" || ev.Severity != "critical" || ev.Initiator.ID != e.Owner.IAMID {
		t.Errorf("event %+v", ev)
	}
	e.Grant("IBMid-EDITOR", "iam-identity", "Editor")
	if got := read("IBMid-EDITOR"); got != "" {
		t.Error("who may not make a key of the service ID sees one")
	}
}
