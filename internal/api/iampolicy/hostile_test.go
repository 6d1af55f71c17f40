package iampolicy_test

import (
	"encoding/json"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/api/apitest"
)

// variants returns copies of a JSON value in each of which one part is
// something else, or has a field that nobody knows.
func variants(v any) []any {
	out := []any{
		nil, true, 1, -1e300, "", "a\x00b", "\ufffd", "*", strings.Repeat("x", 2000), []any{}, obj{}, []any{nil}, []any{[]any{}}, []any{"x", 1}, obj{"key": 1},
	}
	switch v := v.(type) {
	case obj:
		for k := range v {
			for _, part := range variants(v[k]) {
				c := obj{"unknown": []any{1, "x"}}
				for k, v := range v {
					c[k] = v
				}
				c[k] = part
				out = append(out, c)
			}
		}
	case []any:
		for i := range v {
			for _, part := range variants(v[i]) {
				c := append([]any{}, v...)
				c[i] = part
				out = append(out, c)
			}
		}
	}
	return out
}

func TestNoBodyIsAnsweredWithAServerError(t *testing.T) {
	e := start(t)
	role := role(e, "Lister", "kms.secrets.list")
	roleID, _, _ := makeRole(e, role)
	role["name"] = "Other"
	policy, _ := create(e, 2, ruled(e, hours, officeHours()))
	deleted, _ := create(e, 1, v1(e, viewer, "serviceName", "kms"))
	remove(e, deleted).Want(204)
	tagged := ruled(e, hours, officeHours())
	tagged["resource"].(obj)["tags"] = []obj{eq("env", "test")}
	settings := external(obj{"user": obj{"state": "limited", "external_allowed_accounts": []string{"a"}}})

	seen := map[int]int{}
	for _, row := range []struct {
		method, path string
		body         any
	}{
		{"POST", "/v1/policies", v1(e, viewer, "serviceName", "is", "vpcId", "*")},
		{"PUT", "/v1/policies/" + deleted, v1(e, viewer, "serviceName", "is", "vpcId", "*")},
		{"PATCH", "/v1/policies/" + policy, obj{"state": "active"}},
		{"POST", "/v2/policies", tagged},
		{"POST", "/v2/policies", authorization(e, reader, eq("serviceName", "kms"))},
		{"PUT", "/v2/policies/" + policy, tagged},
		{"POST", "/v2/roles", role},
		{"PUT", "/v2/roles/" + roleID, role},
		{"PATCH", settingsPath(e.Owner.AccountID), settings},
	} {
		raw, err := json.Marshal(row.body)
		if err != nil {
			t.Fatal(err)
		}
		var body any
		if err := json.Unmarshal(raw, &body); err != nil {
			t.Fatal(err)
		}
		for _, v := range variants(body) {
			r := e.Do(apitest.Request{Method: row.method, Path: row.path, Body: v, Header: map[string]string{"If-Match": "*"}})
			if seen[r.Status]++; r.Status >= 500 {
				t.Errorf("%s %s with %v: %d %s", row.method, row.path, v, r.Status, r.Raw)
			}
		}
		for _, tag := range []string{"", "*", "1-0", `W/"x"`, strings.Repeat("9", 5000), "\x01"} {
			r := e.Do(apitest.Request{Method: row.method, Path: row.path, Body: row.body, Header: map[string]string{"If-Match": tag}})
			if r.Status >= 500 {
				t.Errorf("%s %s with If-Match %.20q: %d %s", row.method, row.path, tag, r.Status, r.Raw)
			}
		}
	}
	if seen[400] < 1000 || seen[200]+seen[201] == 0 {
		t.Errorf("answers by status: %v", seen)
	}
}

func TestNoQueryIsAnsweredWithAServerError(t *testing.T) {
	e := start(t)
	create(e, 2, ruled(e, hours, officeHours()))
	account := "account_id=" + e.Owner.AccountID
	for _, path := range []string{"/v1/policies", "/v2/policies", "/v2/roles", "/v1/policies/x", "/v2/policies/x", "/v2/roles/x"} {
		for _, name := range []string{"account_id", "iam_id", "access_group_id", "type", "service_type", "tag_name", "tag_value", "service_name", "service_group_id", "sort", "format", "state", "limit", "start", "policy_type"} {
			for _, value := range []string{"", "%00", "%ff", "-", "*", "-1", "99999999999999999999", "e30", "eyJhIjoiXHUwMDAwIiwibCI6OTk5OTk5OTl9", "eyJvIjotMX0", strings.Repeat("x", 5000)} {
				r := e.Do(apitest.Request{Path: path + "?" + account + "&" + name + "=" + value})
				if r.Status >= 500 {
					t.Errorf("%s with %s=%.40s: %d %s", path, name, value, r.Status, r.Raw)
				}
			}
		}
	}
	for _, id := range []string{"%00", "%2e%2e%2f", "%ff", strings.Repeat("x", 5000)} {
		for _, path := range []string{"/v1/policies/", "/v2/policies/", "/v2/roles/"} {
			for _, method := range []string{"GET", "PUT", "PATCH", "DELETE"} {
				if method == "PATCH" && path != "/v1/policies/" {
					continue
				}
				r := e.Do(apitest.Request{Method: method, Path: path + id, Body: "{}", Header: map[string]string{"If-Match": "*"}})
				if r.Status != 404 {
					t.Errorf("%s %s%.20s: %d %s", method, path, id, r.Status, r.Raw)
				}
			}
		}
	}
}
