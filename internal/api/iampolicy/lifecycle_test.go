package iampolicy_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
	"tabard.dev/tabard/internal/directory"
	"tabard.dev/tabard/internal/identity"
	"tabard.dev/tabard/internal/usage"
)

func remove(e *apitest.Env, id string) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "DELETE", Path: "/v2/policies/" + id})
}

func restore(e *apitest.Env, id, tag string) *apitest.Response {
	e.T.Helper()
	return e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + id, Body: obj{"state": "active"}, Header: map[string]string{"If-Match": tag}})
}

func listed(e *apitest.Env, query string) []string {
	e.T.Helper()
	ids := []string{}
	for _, p := range e.Do(apitest.Request{Path: "/v2/policies?account_id=" + e.Owner.AccountID + "&iam_id=" + grantee + query}).Want(200)["policies"].([]any) {
		ids = append(ids, dig(p, "id").(string))
	}
	return ids
}

func TestDeletedPolicyIsKeptAndCanBeRestored(t *testing.T) {
	e := start(t)
	id, etag := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	remove(e, id).Want(204)
	for _, version := range []string{"/v1", "/v2"} {
		r := e.Do(apitest.Request{Path: version + "/policies/" + id})
		if got := r.Want(200)["state"]; got != "deleted" || r.Header.Get("ETag") == etag {
			t.Errorf("state %v, tag %s", got, r.Header.Get("ETag"))
		}
	}
	if got := listed(e, ""); len(got) != 0 {
		t.Errorf("among the active ones: %v", got)
	}
	if got := listed(e, "&state=deleted"); !slices.Equal(got, []string{id}) {
		t.Errorf("among the deleted ones: %v", got)
	}
	remove(e, id).Want(404)
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, viewer, eq("serviceName", "is")), Header: map[string]string{"If-Match": "*"}}).Want(404)
	restore(e, id, "").Want(400)
	restore(e, id, etag).Want(412)
	tag := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Header.Get("ETag")
	r := restore(e, id, tag)
	if got := r.Want(200); got["state"] != "active" || got["href"] != "http://tabard.test/v2/policies/"+id {
		t.Errorf("restored %v", got)
	}
	if got := listed(e, ""); !slices.Equal(got, []string{id}) {
		t.Errorf("restored, the list has %v", got)
	}
	// A policy that is active stays as it is.
	again := restore(e, id, r.Header.Get("ETag"))
	if again.Want(200); again.Header.Get("ETag") != r.Header.Get("ETag") {
		t.Error("restoring an active policy changed it")
	}
	for _, body := range []any{"", "{}", "[]", `{"state":"deleted"}`, `{"state":1}`, `{"state":null}`} {
		e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + id, Body: body, Header: map[string]string{"If-Match": "*"}}).Want(400)
	}
	e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + uuid.NewString(), Body: obj{"state": "active"}, Header: map[string]string{"If-Match": "*"}}).Want(404)
}

func TestDeletedPolicyIsGoneAfterTenDays(t *testing.T) {
	e := start(t)
	id, _ := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	remove(e, id).Want(204)
	later := time.Now().Add(10*24*time.Hour + time.Minute)
	e.Config.Now = func() time.Time { return later }
	e.Do(apitest.Request{Path: "/v2/policies/" + id}).Want(404)
	restore(e, id, "*").Want(404)
	if got := listed(e, "&state=deleted"); len(got) != 0 {
		t.Errorf("listed %v", got)
	}
}

func TestRestoringIsHeldToAllThatANewPolicyIsHeldTo(t *testing.T) {
	e := start(t)
	service := identity.ServiceID{ID: "ServiceId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: "s"}
	group := access.Group{ID: "AccessGroupId-" + uuid.NewString(), AccountID: e.Owner.AccountID, Name: "g"}
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.ServiceIDs.Put(tx, &service)
		d.Groups.Put(tx, &group)
	})
	forGroup := v2(e, operator, eq("serviceName", "is"))
	forGroup["subject"] = obj{"attributes": []obj{eq("access_group_id", group.ID)}}
	forService := v2(e, operator, eq("serviceName", "is"))
	forService["subject"] = obj{"attributes": []obj{eq("iam_id", "iam-"+service.ID)}}

	twin, _ := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	ofGroup, _ := create(e, 2, forGroup)
	ofService, _ := create(e, 2, forService)
	for _, id := range []string{twin, ofGroup, ofService} {
		remove(e, id).Want(204)
	}
	// A deleted policy is in nobody's way.
	second, _ := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	body := restore(e, twin, "*").Want(409)
	if code(body) != "policy_conflict_error" || dig(body, "errors", 0, "details", "conflicts_with", "policy", "id") != second {
		t.Errorf("answered %v", body)
	}
	locked := service
	locked.Locked = true
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		d.ServiceIDs.Put(tx, &locked)
		d.Groups.Delete(tx, &group)
	})
	restore(e, ofGroup, "*").Want(400)
	restore(e, ofService, "*").Want(409)

	e.Grant("IBMid-KMS", "kms", "Administrator")
	remove(e, second).Want(204)
	if got := e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + second, Body: obj{"state": "active"}, As: "IBMid-KMS", Header: map[string]string{"If-Match": "*"}}); got.Status != 403 {
		t.Errorf("an administrator of something else restores: %d", got.Status)
	}
	e.Do(apitest.Request{Method: "PATCH", Path: "/v1/policies/" + second, Body: obj{"state": "active"}, As: e.Other.IAMID, Header: map[string]string{"If-Match": "*"}}).Want(404)
	restore(e, twin, "*").Want(200)
	restore(e, second, "*").Want(409)
}

func TestDeletedPoliciesDoNotCountForTheLimits(t *testing.T) {
	e := start(t)
	var last *access.Policy
	stage(e, func(tx *directory.Tx, d *directory.Directory) {
		for i := range access.MaxPoliciesPerSubject {
			last = &access.Policy{
				ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
				Subject: []access.Attribute{attr(access.IAMID, access.StringEquals, access.Text(grantee))},
				Resource: []access.Attribute{
					attr(access.ServiceName, access.StringEquals, access.Text("is")),
					attr("vpcId", access.StringEquals, access.Text(fmt.Sprint(i))),
					attr(access.AccountID, access.StringEquals, access.Text(e.Owner.AccountID)),
				},
				Roles: []string{viewer},
			}
			d.Policies.Put(tx, last)
		}
	})
	post(e, 1, v1(e, viewer, "serviceName", "kms")).Want(409)
	remove(e, last.ID).Want(204)
	post(e, 1, v1(e, viewer, "serviceName", "kms")).Want(201)
	if got := code(restore(e, last.ID, "*").Want(409)); got != "request_not_processed" {
		t.Errorf("code %v", got)
	}
}

func TestAnAccountHasAtMost4020PoliciesAnd500WithTags(t *testing.T) {
	e := start(t)
	put := func(n int, tags ...access.Attribute) {
		stage(e, func(tx *directory.Tx, d *directory.Directory) {
			for i := range n {
				d.Policies.Put(tx, &access.Policy{
					ID: uuid.NewString(), AccountID: e.Owner.AccountID, API: 1, Type: access.TypeAccess, State: access.Active,
					Subject:  []access.Attribute{attr(access.IAMID, access.StringEquals, access.Text(fmt.Sprint("IBMid-", len(tags), i)))},
					Resource: []access.Attribute{attr(access.ServiceName, access.StringEquals, access.Text("is")), attr(access.AccountID, access.StringEquals, access.Text(e.Owner.AccountID))},
					Roles:    []string{viewer}, Tags: tags,
				})
			}
		})
	}
	put(500, attr("env", access.StringEquals, access.Text("test")))
	tagged := v2(e, viewer, eq("serviceName", "kms"))
	tagged["resource"].(obj)["tags"] = []obj{eq("env", "test")}
	if got := code(post(e, 2, tagged).Want(409)); got != "request_not_processed" {
		t.Errorf("code %v", got)
	}
	id, _ := create(e, 2, v2(e, viewer, eq("serviceName", "kms")))
	put(4020 - e.Config.Directory.PoliciesByAccount.Len(e.Owner.AccountID))
	post(e, 2, v2(e, viewer, eq("serviceName", "is"))).Want(409)
	e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, operator, eq("serviceName", "kms")), Header: map[string]string{"If-Match": "*"}}).Want(200)
}

func TestOnlyOneOfManyDeletionsAndOneOfManyRestorationsSucceeds(t *testing.T) {
	e := start(t)
	id, _ := create(e, 2, v2(e, operator, eq("serviceName", "is")))
	statuses := func(f func() *apitest.Response) []int {
		got := make([]int, 8)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() { got[i] = f().Status })
		}
		wg.Wait()
		slices.Sort(got)
		return got
	}
	if got := statuses(func() *apitest.Response { return remove(e, id) }); !slices.Equal(got, []int{204, 404, 404, 404, 404, 404, 404, 404}) {
		t.Errorf("deletions %v", got)
	}
	tag := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Header.Get("ETag")
	if got := statuses(func() *apitest.Response { return restore(e, id, tag) }); !slices.Equal(got, []int{200, 412, 412, 412, 412, 412, 412, 412}) {
		t.Errorf("restorations %v", got)
	}
}

func TestOwnerKeepsTheLastPolicyThatMakesHimAdministrator(t *testing.T) {
	e := start(t)
	var last *access.Policy
	for _, p := range e.Config.Directory.PoliciesOfSubject.Get(directory.Key(e.Owner.AccountID, e.Owner.IAMID)) {
		if kind, _ := access.Get(p.Resource, access.ServiceType); kind == access.KindPlatform {
			last = p
		}
	}
	platform := func(role string) obj {
		body := v2(e, role, eq("serviceType", "platform_service"))
		body["subject"] = obj{"attributes": []obj{eq("iam_id", e.Owner.IAMID)}}
		return body
	}
	refused := func(r *apitest.Response) {
		t.Helper()
		if body := r.Want(409); code(body) != "request_not_processed" || !strings.Contains(message(body).(string), "the account's owner") {
			t.Errorf("answered %v", body)
		}
	}
	replace := func(body obj) *apitest.Response {
		return e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + last.ID, Body: body, Header: map[string]string{"If-Match": "*"}})
	}
	refused(remove(e, last.ID))
	refused(replace(platform(viewer)))
	timed := platform(admin)
	timed["pattern"], timed["rule"] = allDay, cond(dayOfWeek, "dayOfWeekAnyOf", []int{1, 2, 3, 4, 5, 6, 7})
	refused(replace(timed))
	tagged := platform(admin)
	tagged["resource"].(obj)["tags"] = []obj{eq("env", "test")}
	refused(replace(tagged))
	forOther := platform(admin)
	forOther["subject"] = obj{"attributes": []obj{eq("iam_id", grantee)}}
	refused(replace(forOther))
	// Another one with a rule does not do.
	timed["control"] = obj{"grant": obj{"roles": []obj{{"role_id": admin}}}}
	post(e, 2, timed).Want(201)
	refused(remove(e, last.ID))
	// The policy may change as long as it still makes him administrator.
	last2 := replace(platform(admin)).Want(200)
	if last2["id"] != last.ID {
		t.Errorf("replaced %v", last2)
	}
	two := platform(admin)
	two["control"] = obj{"grant": obj{"roles": []obj{{"role_id": admin}, {"role_id": viewer}}}}
	replace(two).Want(200)
	remove(e, last.ID).Want(409)
}

func TestListTellsHowPoliciesAreUsed(t *testing.T) {
	e := start(t)
	tracker, err := usage.Open(t.Context(), usage.Config{Directory: e.Config.Directory, Log: e.Config.Log, Now: time.Now}, e.Store)
	if err != nil {
		t.Fatal(err)
	}
	e.Config.Usage = tracker
	seldom, _ := create(e, 1, v1(e, viewer, "serviceName", "is"))
	never, _ := create(e, 2, v2(e, viewer, eq("serviceName", "kms")))
	often, _ := create(e, 2, v2(e, viewer, eq("serviceName", "iam-groups")))
	at := time.Date(2030, 1, 7, 12, 0, 0, 0, time.UTC)
	tracker.Permit(seldom, at.Add(time.Hour))
	for range 3 {
		tracker.Permit(often, at)
	}
	for sort, want := range map[string][]string{
		"last_permit_at":         {never, often, seldom},
		"-last_permit_at":        {seldom, often, never},
		"last_permit_frequency":  {never, seldom, often},
		"-last_permit_frequency": {often, seldom, never},
	} {
		if got := listed(e, "&format=include_last_permit&sort="+sort); !slices.Equal(got, want) {
			t.Errorf("sorted by %s: %v, want %v", sort, got, want)
		}
	}
	for _, version := range []string{"/v1", "/v2"} {
		get := func(id, query string) obj {
			return e.Do(apitest.Request{Path: version + "/policies/" + id + query}).Want(200)
		}
		if got := get(often, "?format=include_last_permit"); got["last_permit_at"] != "2030-01-07T12:00:00.000Z" || got["last_permit_frequency"] != 3.0 {
			t.Errorf("shown %v", got)
		}
		got := get(never, "?format=include_last_permit")
		if at, ok := got["last_permit_at"]; !ok || at != nil || got["last_permit_frequency"] != 0.0 {
			t.Errorf("shown %v", got)
		}
		if _, ok := get(often, "")["last_permit_at"]; ok {
			t.Error("the use is shown without being asked for")
		}
	}
	for _, path := range []string{"/v2/policies?sort=last_permit_at", "/v2/policies?format=display&sort=last_permit_at", "/v1/policies?format=include_last_permit&sort=last_permit_at"} {
		e.Do(apitest.Request{Path: path + "&account_id=" + e.Owner.AccountID}).Want(400)
	}
}

func TestPagesLinkBackToo(t *testing.T) {
	e := start(t)
	var ids []string
	for i := range 5 {
		id, _ := create(e, 1, v1(e, viewer, "serviceName", "is", "vpcId", fmt.Sprint(i)))
		ids = append(ids, id)
	}
	base := "/v1/policies?account_id=" + e.Owner.AccountID + "&iam_id=" + grantee + "&limit=2"
	get := func(start any) obj {
		path := base
		if start != nil {
			path += "&start=" + start.(string)
		}
		return e.Do(apitest.Request{Path: path}).Want(200)
	}
	first := get(nil)
	second := get(dig(first, "next", "start"))
	third := get(dig(second, "next", "start"))
	if first["previous"] != nil || third["next"] != nil || dig(third, "policies", 0, "id") != ids[4] {
		t.Errorf("first page %v, third page %v", first, third)
	}
	back := get(dig(third, "previous", "start"))
	if dig(back, "policies", 0, "id") != ids[2] || dig(get(dig(back, "previous", "start")), "policies", 0, "id") != ids[0] {
		t.Errorf("backwards %v", back)
	}
}
