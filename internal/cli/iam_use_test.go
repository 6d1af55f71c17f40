package cli

import (
	"os/exec"
	"strings"
	"testing"
)

func TestTheUseOfAccessIsListed(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/access_use", list("uses",
		item("iam_id", "iam-"+profileID, "policy_id", uuidA, "policy_state", "active", "service_name", "is", "action", "is.instance.instance.list",
			"count", 12, "days", 4, "last_at", "2026-07-01T09:00:00Z", "period_days", 30)))
	run(t, "iam", "access-use", profileID, "--policy", uuidA, "--action", "is.instance.instance.list").want(0, uuidA, "is.instance.instance.list", "12", "2026-07-01 09:00:00 UTC", "30")
	q := s.sent("GET /v1/access_use").Query
	for k, want := range map[string]string{"iam_id": "iam-" + profileID, "policy_id": uuidA, "action": "is.instance.instance.list", "unused": ""} {
		if q.Get(k) != want {
			t.Errorf("%s is %q, want %q", k, q.Get(k), want)
		}
	}
	run(t, "iam", "access-use", "--unused", "--iam-id", "IBMid-1").want(0)
	if q := s.sent("GET /v1/access_use").Query; q.Get("unused") != "true" || q.Get("iam_id") != "IBMid-1" {
		t.Errorf("%v", q)
	}
	run(t, "iam", "access-use", "--unused").want(2, "--iam-id")
	run(t, "iam", "access-use", profileID, "--iam-id", "IBMid-1").want(2, "not both")
	run(t, "iam", "access-use", "--limit", "-1").want(2)
}

// What is printed goes into a shell: whatever a policy has in it must stay data
// there.
func TestARecommendationIsPrintedWithCommandsThatTheShellTakesAsTheyAre(t *testing.T) {
	s := newServer(t)
	s.login()
	nasty := "x'; touch owned; '\nEOF\ntouch owned\n$(touch owned) `touch owned` \u202e\u009b2J"
	policy := item("type", "access", "description", nasty,
		"resource", item("attributes", []any{item("key", "serviceName", "operator", "stringEquals", "value", nasty)}),
		"control", item("grant", item("roles", []any{item("role_id", "crn:v1:bluemix:public:iam::::role:Viewer")})))
	s.answer("GET /v1/access_recommendation", item("window_days", 30, "counted_since", "2026-01-01T00:00:00Z",
		"policies", []any{item(
			"policy_id", uuidA, "verdict", "narrow", "observed_since", "2026-02-01T00:00:00Z", "policy", policy,
			"used", []any{
				item("service_name", "is", "action", "is.instance.instance.list", "count", 1, "days", 1, "last_at", "2026-07-01T09:00:00Z", "pattern", "rare"),
				item("service_name", "is", "action", "is.instance.instance.read", "count", 7, "days", 3, "last_at", "2026-07-01T09:00:00Z", "pattern", "periodic", "period_days", 31),
			},
			"used_earlier", []any{item("action", "is.old", "count", 2, "days", 2, "last_at", "2025-07-01T09:00:00Z")},
			"unused", []any{item("service_name", "is", "actions", []any{"a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8", "a9", "a10", "a11", "a12"})},
			"other_services", true, "warnings", []any{"seen\x1b[2J for 3 days"}, "covered_by", []any{uuidB},
			"smaller", []any{item("policy", policy, "beyond_use", []any{item("service_name", "is", "actions", []any{"is.more"})})},
		)},
		"group_policies", []any{item("policy_id", uuidB, "access_group_id", "AccessGroupId-1", "policy", policy, "used", []any{})},
		"changes", []any{
			item("change", "delete_policy", "policy_id", nasty),
			item("change", "create_role", "role", item("name", "Used1", "display_name", nasty, "service_name", "is", "actions", []any{"is.instance.instance.list"})),
			item("change", "replace_policy", "policy_id", uuidA, "policy", policy),
			item("change", "create_policy", "policy", policy, "undecided", true),
		}))
	out := run(t, "iam", "recommend", profileID, "--window", "30d", "--custom-role").want(0,
		"Use of the last 30 days, counted since 2026-01-01 00:00:00 UTC.",
		"Policy "+uuidA+": a smaller one is enough",
		"    is.instance.instance.list: 1 time on 1 day, last 2026-07-01 09:00:00 UTC; rare",
		"    is.instance.instance.read: 7 times on 3 days, last 2026-07-01 09:00:00 UTC; comes about every 31 days",
		"used earlier: is.old: 2 times", "and 2 more", "whatever it allows in other services", "allowed as well by: "+uuidB,
		"still allows what was not used of is: is.more", "of access group AccessGroupId-1", "used: nothing",
		"To apply it:", "Not observed for long enough. To apply it all the same:",
	).stdout
	if q := s.sent("GET /v1/access_recommendation").Query; q.Get("window_days") != "30" || q.Get("custom_role") != "true" || q.Get("iam_id") != "iam-"+profileID {
		t.Errorf("%v", q)
	}
	for _, c := range []string{"\x1b", "\u202e", "\u009b"} {
		if strings.Contains(out, c) {
			t.Errorf("the terminal gets %q", c)
		}
	}
	_, commands, _ := strings.Cut(out, "To apply it:\n")
	commands = strings.ReplaceAll(commands, "Not observed for long enough. To apply it all the same:", "")
	script := "tabard() { printf '%s|' \"$@\"; echo; }\n" + commands + "\ntest ! -e owned && cat policy-3.json"
	got, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s\n%s", err, got, script)
	}
	for _, want := range []string{
		"iam|trusted-profile-policy-delete|" + profileID + "|x'; touch owned; '",
		"iam|role-create|Used1|--display-name|x'; touch owned; '",
		"iam|trusted-profile-policy-update|" + profileID + "|" + uuidA + "|--file|policy-3.json|\n",
		"iam|trusted-profile-policy-create|" + profileID + "|--file|policy-4.json|\n",
		`"description": "x'; touch owned; '\nEOF\ntouch owned\n$(touch owned) ` + "`touch owned`" + ` \u202e\u009b2J"`,
	} {
		if !strings.Contains(string(got), want) {
			t.Errorf("the commands give\n%s\nwithout %q", got, want)
		}
	}
}

func TestARecommendationIsAboutOneIdentity(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/access_recommendation", item("changes", []any{item("change", "delete_policy", "policy_id", uuidA)}))
	run(t, "iam", "recommend", "--iam-id", "iam-ServiceId-"+uuidA).want(0, "tabard iam service-policy-delete ServiceId-"+uuidA+" "+uuidA+" -f", "no policies of its own")
	run(t, "iam", "recommend", "--iam-id", "IBMid-1").want(0, "tabard iam user-policy-delete IBMid-1 "+uuidA)
	run(t, "iam", "recommend", "--iam-id", "iam-"+profileID, "-o", "json").want(0, `"change": "delete_policy"`)
	run(t, "iam", "recommend").want(2, "--iam-id")
	for _, window := range []string{"0d", "a week", "-1", "99999999999d"} {
		run(t, "iam", "recommend", profileID, "--window="+window).want(2, "days")
	}
	s.answer("GET /v1/access_recommendation", item("changes", []any{item("change", "burn")}))
	run(t, "iam", "recommend", profileID).want(1, "newer")
}
