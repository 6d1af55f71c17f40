package iampolicy_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/access"
	"tabard.dev/tabard/internal/api/apitest"
)

func cond(key, operator string, value any) obj {
	return obj{"key": key, "operator": operator, "value": value}
}

func group(operator string, conditions ...obj) obj {
	return obj{"operator": operator, "conditions": conditions}
}

const (
	allDay = "time-based-conditions:weekly:all-day"
	hours  = "time-based-conditions:weekly:custom-hours"
	once   = "time-based-conditions:once"
	byName = "attribute-based-condition:resource:literal-and-wildcard"

	dayOfWeek = "{{environment.attributes.day_of_week}}"
	timeOfDay = "{{environment.attributes.current_time}}"
	dateTime  = "{{environment.attributes.current_date_time}}"
	prefix    = "{{resource.attributes.prefix}}"
)

// ruled is a v2 policy on is with a rule.
func ruled(e *apitest.Env, pattern string, rule any) obj {
	body := v2(e, operator, eq("serviceName", "is"))
	body["pattern"], body["rule"] = pattern, rule
	return body
}

func officeHours() obj {
	return group("and",
		cond(dayOfWeek, "dayOfWeekAnyOf", []string{"1+00:00", "2+00:00", "3+00:00", "4+00:00", "5+00:00"}),
		cond(timeOfDay, "timeGreaterThanOrEquals", "09:00:00+00:00"),
		cond(timeOfDay, "timeLessThanOrEquals", "17:00:00+00:00"))
}

func TestRuleIsKeptAsItWasWrittenAndDecidesByTheClock(t *testing.T) {
	e := start(t)
	rule := officeHours()
	id, etag := create(e, 2, ruled(e, hours, rule))
	got := e.Do(apitest.Request{Path: "/v2/policies/" + id}).Want(200)
	if got["pattern"] != hours || dig(got, "rule", "operator") != "and" ||
		fmt.Sprint(dig(got, "rule", "conditions", 0)) != fmt.Sprint(obj{"key": dayOfWeek, "operator": "dayOfWeekAnyOf", "value": []any{"1+00:00", "2+00:00", "3+00:00", "4+00:00", "5+00:00"}}) ||
		fmt.Sprint(dig(got, "rule", "conditions", 2)) != fmt.Sprint(rule["conditions"].([]obj)[2]) {
		t.Errorf("shown %v", got)
	}
	at := func(day, hour int) bool {
		return access.Decide(e.Config.Directory, access.Request{
			Subject: grantee, AccountID: e.Owner.AccountID, Action: "is.instance.instance.list",
			Resource: map[string]string{"accountId": e.Owner.AccountID, "serviceName": "is"},
			Time:     time.Date(2030, 1, day, hour, 0, 0, 0, time.UTC), // the 7th is a Monday
		}).Allowed
	}
	if !at(7, 12) || at(7, 8) || at(7, 18) || at(12, 12) {
		t.Errorf("allowed %t %t %t %t, want only the first", at(7, 12), at(7, 8), at(7, 18), at(12, 12))
	}
	one := e.Do(apitest.Request{Path: "/v1/policies/" + id}).Want(200)
	if dig(one, "subjects", 0, "attributes", 0, "value") != "unsupported version" || one["rule"] != nil || one["pattern"] != nil {
		t.Errorf("in v1 %v", one)
	}
	plain := v2(e, operator, eq("serviceName", "is"))
	put := e.Do(apitest.Request{Method: "PUT", Path: "/v2/policies/" + id, Body: plain, Header: map[string]string{"If-Match": etag}}).Want(200)
	if put["rule"] != nil || put["pattern"] != nil || !at(12, 12) {
		t.Errorf("without the rule %v", put)
	}
}

func TestEveryFormOfRuleIsAccepted(t *testing.T) {
	e := start(t)
	for name, body := range map[string]obj{
		"one condition":   ruled(e, allDay, cond(dayOfWeek, "dayOfWeekEquals", "7+05:30")),
		"number as a day": ruled(e, allDay, cond(dayOfWeek, "dayOfWeekAnyOf", []int{1, 2})),
		"bare weekly":     ruled(e, "time-based-conditions:weekly", officeHours()),
		"one window": ruled(e, once, group("and",
			cond(dateTime, "dateTimeGreaterThan", "2030-01-07T09:00:00+01:00"), cond(dateTime, "dateTimeLessThan", "2030-01-08T09:00:00Z"))),
		"two levels": ruled(e, byName, group("or",
			group("and", cond(prefix, "stringMatch", "a/*"), cond("{{resource.attributes.delimiter}}", "stringEquals", "/")),
			group("and", cond(prefix, "stringEqualsAnyOf", []string{"b", "c"}), cond("{{resource.attributes.path}}", "stringMatchAnyOf", []string{"d*"})),
			cond("{{resource.attributes.path}}", "stringExists", false))),
		"none": ruled(e, "", nil),
	} {
		t.Run(name, func(t *testing.T) { post(e, 2, body).Want(201) })
	}
}

func TestBadConditionsAreRefusedWith400(t *testing.T) {
	e := start(t)
	day := cond(dayOfWeek, "dayOfWeekEquals", "1+00:00")
	eleven := make([]obj, 11)
	for i := range eleven {
		eleven[i] = day
	}
	deep := strings.Repeat(`{"operator":"and","conditions":[`, 5000) + strings.Repeat(`]}`, 5000)
	for name, body := range map[string]any{
		"rule without pattern":       ruled(e, "", day),
		"pattern without rule":       ruled(e, allDay, nil),
		"unknown pattern":            ruled(e, "always", day),
		"rule that is a text":        ruled(e, allDay, "always"),
		"rule that is a list":        ruled(e, allDay, []obj{day}),
		"empty rule":                 ruled(e, allDay, obj{}),
		"unknown field in a rule":    ruled(e, allDay, obj{"key": dayOfWeek, "operator": "dayOfWeekEquals", "value": "1+00:00", "unless": "holiday"}),
		"unknown operator":           ruled(e, allDay, cond(dayOfWeek, "dayOfWeekNotEquals", "1+00:00")),
		"eighth day":                 ruled(e, allDay, cond(dayOfWeek, "dayOfWeekEquals", "8+00:00")),
		"days in a list of lists":    ruled(e, allDay, cond(dayOfWeek, "dayOfWeekAnyOf", [][]string{{"1+00:00"}})),
		"eleven days":                ruled(e, allDay, cond(dayOfWeek, "dayOfWeekAnyOf", []int{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1})),
		"value that is an object":    ruled(e, allDay, cond(dayOfWeek, "dayOfWeekEquals", obj{})),
		"no value":                   ruled(e, allDay, obj{"key": dayOfWeek, "operator": "dayOfWeekEquals"}),
		"time without offset":        ruled(e, hours, cond(timeOfDay, "timeLessThan", "09:00:00")),
		"time as a number":           ruled(e, hours, cond(timeOfDay, "timeLessThan", 9)),
		"once mixed with weekly":     ruled(e, once, group("and", cond(dateTime, "dateTimeLessThan", "2030-01-08T09:00:00Z"), day)),
		"eleven conditions":          ruled(e, allDay, group("or", eleven...)),
		"three levels":               ruled(e, allDay, group("or", group("or", group("or", day)))),
		"group without conditions":   ruled(e, allDay, group("or")),
		"group with a value":         ruled(e, allDay, obj{"operator": "and", "conditions": []obj{day}, "value": "x"}),
		"control character in a key": ruled(e, byName, cond("{{resource.attributes.a\x00b}}", "stringEquals", "x")),
		"control character":          ruled(e, byName, cond(prefix, "stringEquals", "a\x00b")),
		"long value":                 ruled(e, byName, cond(prefix, "stringEquals", strings.Repeat("x", 1001))),
		"attribute for a time":       ruled(e, hours, cond(prefix, "stringEquals", "x")),
		"time for an attribute":      ruled(e, byName, day),
		"five thousand levels":       `{"type":"access","pattern":"` + allDay + `","rule":` + deep + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			if got := code(post(e, 2, body).Want(400)); got != "invalid_body" {
				t.Errorf("code %v", got)
			}
		})
	}
	for name, change := range map[string]obj{
		"rule": {"rule": day}, "pattern": {"pattern": allDay}, "both": {"rule": day, "pattern": allDay}, "rule of any form": {"rule": "always"},
	} {
		t.Run(name+" in v1", func(t *testing.T) {
			body := v1(e, operator, "serviceName", "is")
			for k, v := range change {
				body[k] = v
			}
			if got := message(post(e, 1, body).Want(400)).(string); !strings.Contains(got, "through version 2") {
				t.Errorf("message %q", got)
			}
		})
	}
	body := v1(e, operator, "serviceName", "is")
	body["rule"], body["pattern"] = nil, nil
	post(e, 1, body).Want(201)
}

func TestPoliciesWithDifferentRulesDoNotConflictAndEqualOnesDo(t *testing.T) {
	e := start(t)
	post(e, 2, ruled(e, hours, officeHours())).Want(201)
	post(e, 2, v2(e, operator, eq("serviceName", "is"))).Want(201)
	post(e, 2, ruled(e, allDay, cond(dayOfWeek, "dayOfWeekEquals", "1+00:00"))).Want(201)
	post(e, 2, ruled(e, hours, officeHours())).Want(409)
	// The same rule, written otherwise.
	same := ruled(e, allDay, json.RawMessage(`{"value":  "\u0031+00:00", "operator": "dayOfWeekEquals", "key": "{{environment.attributes.day_of_week}}"}`))
	post(e, 2, same).Want(409)
}

func TestAHolderOfATimedPolicyDoesNotOutlastItsWindow(t *testing.T) {
	e := start(t)
	rule := cond(dayOfWeek, "dayOfWeekEquals", "1+00:00")
	monday := time.Now().UTC() // the next one: deleted policies are kept from now on
	for monday.Weekday() != time.Monday {
		monday = monday.AddDate(0, 0, 1)
	}
	timed := ruled(e, allDay, rule)
	timed["control"] = obj{"grant": obj{"roles": []obj{{"role_id": admin}}}}
	post(e, 2, timed).Want(201)
	act := func(method, path string, body any) *apitest.Response {
		return e.Do(apitest.Request{Method: method, Path: path, Body: body, As: grantee, Header: map[string]string{"If-Match": "*"}})
	}
	forOther := func(body obj) obj {
		body["subject"] = obj{"attributes": []obj{eq("iam_id", "IBMid-OTHER")}}
		return body
	}
	e.Config.Now = func() time.Time { return monday }
	id := act("POST", "/v2/policies", forOther(ruled(e, allDay, rule))).Want(201)["id"].(string)
	act("POST", "/v2/policies", forOther(v2(e, viewer, eq("serviceName", "is")))).Want(403)
	act("POST", "/v2/policies", forOther(ruled(e, allDay, cond(dayOfWeek, "dayOfWeekAnyOf", []string{"1+00:00", "2+00:00"})))).Want(403)
	act("PUT", "/v2/policies/"+id, forOther(v2(e, viewer, eq("serviceName", "is")))).Want(403)
	permanent, _ := create(e, 2, forOther(v2(e, viewer, eq("serviceName", "is"))))
	e.Config.Now = func() time.Time { return monday.AddDate(0, 0, 1) }
	act("DELETE", "/v2/policies/"+permanent, nil).Want(403)
	act("POST", "/v2/policies", forOther(ruled(e, allDay, rule))).Want(403)
	e.Config.Now = func() time.Time { return monday }
	act("DELETE", "/v2/policies/"+permanent, nil).Want(204)
	act("PATCH", "/v1/policies/"+permanent, obj{"state": "active"}).Want(403)
}

func TestAHolderOfAPolicyWithARuleOnAttributesWritesNone(t *testing.T) {
	e := start(t)
	for i, rule := range []obj{
		cond("{{resource.attributes.region}}", "stringExists", false),
		cond("{{resource.attributes.region}}", "stringMatch", "*"),
		group("or", cond("{{resource.attributes.region}}", "stringExists", false), cond("{{resource.attributes.region}}", "stringEquals", "eu-de")),
		group("and", group("or", cond("{{resource.attributes.region}}", "stringExists", false)), cond("{{resource.attributes.vpcId}}", "stringExists", false)),
	} {
		who := fmt.Sprint("IBMid-RULED", i)
		body := ruled(e, byName, rule)
		body["subject"] = obj{"attributes": []obj{eq("iam_id", who)}}
		body["control"] = obj{"grant": obj{"roles": []obj{{"role_id": admin}}}}
		post(e, 2, body).Want(201)
		id, _ := create(e, 2, v2(e, viewer, eq("serviceName", "is"), eq("vpcId", fmt.Sprint(i))))
		for _, r := range []apitest.Request{
			{Method: "POST", Path: "/v2/policies", Body: v2(e, viewer, eq("serviceName", "is"))},
			{Method: "POST", Path: "/v2/policies", Body: v2(e, viewer, eq("serviceName", "is"), eq("region", "eu-de"))},
			{Method: "POST", Path: "/v2/policies", Body: ruled(e, byName, rule)},
			{Method: "PUT", Path: "/v2/policies/" + id, Body: v2(e, viewer, eq("serviceName", "is"))},
			{Method: "DELETE", Path: "/v2/policies/" + id},
			{Path: "/v2/policies/" + id},
		} {
			r.As, r.Header = who, map[string]string{"If-Match": "*"}
			if got := code(e.Do(r).Want(403)); got != "insufficent_permissions" {
				t.Errorf("code %v", got)
			}
		}
		list := e.Do(apitest.Request{Path: "/v2/policies?account_id=" + e.Owner.AccountID, As: who}).Want(200)
		if n := len(list["policies"].([]any)); n != 0 {
			t.Errorf("%s sees %d policies", who, n)
		}
	}
}
