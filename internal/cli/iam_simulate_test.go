package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestASimulationEndsWithOneWhenTheAnswerIsNo(t *testing.T) {
	s := newServer(t)
	s.login()
	refused := item("allowed", false, "evidence", item("source", "described", "name", "prod:shop:cart:", "crn", "crn:c"),
		"refusal", item("status", 400, "code", "BXNIM0398E", "message", "Selected trusted profile not eligible.", "detail", ""),
		"trace", []any{item("check", "profile-link", "outcome", "fail", "wanted", "w", "found", "f", "change", item("command", "tabard iam x"))})
	s.answer("POST /v1/simulate/token", refused)
	args := []string{"iam", "simulate", "token", "reports", "--cluster", "prod", "--namespace", "shop", "--service-account", "cart"}
	says(t, run(t, args...).want(1), "REFUSED: 400 BXNIM0398E Selected", "prod:shop:cart: (crn:c), as described", "FAIL profile-link", "command tabard iam x")
	same(t, s.sent("POST /v1/simulate/token").Body, `{"evidence":{"cluster":"prod","namespace":"shop","service_account":"cart","type":"kubernetes"},"profile_name":"reports"}`)
	says(t, run(t, append(args, "-o", "json")...).want(1), `"allowed": false`)

	s.answer("POST /v1/simulate/token", item("allowed", true, "expires_in", 3600, "trace", []any{}))
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("a.b.c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "iam", "simulate", "token", profileID, "--cr-token", "@"+file, "--address", "192.0.2.1").want(0, "ALLOWED: a token for 3600 s")
	same(t, s.sent("POST /v1/simulate/token").Body, `{"address":"192.0.2.1","cr_token":"a.b.c","profile_id":"`+profileID+`"}`)
	run(t, "iam", "simulate", "token", "reports", "--issuer", "ci", "--claim", "sub=repo:a=b", "--claim", `groups=["x"]`).want(0, "ALLOWED")
	same(t, s.sent("POST /v1/simulate/token").Body, `{"evidence":{"claims":{"groups":["x"],"sub":"repo:a=b"},"issuer":"ci","type":"oidc"},"profile_name":"reports"}`)

	run(t, "iam", "simulate", "token", "reports").want(2, "say which workload")
	run(t, "iam", "simulate", "token", "reports", "--cluster", "prod").want(2, "--namespace")
	run(t, "iam", "simulate", "token", "reports", "--issuer", "ci", "--claim", "sub").want(2, "NAME=VALUE")
	run(t, "iam", "simulate", "token", "reports", "--cluster", "a", "--instance", "b").want(2, "none of the others")
	run(t, "iam", "simulate", "token", "reports", "--cr-token", "@absent").want(1, "absent")
}

func TestADecisionIsSimulatedForWhoIsNamed(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("POST /v1/simulate/access", item("allowed", true, "subject", "iam-"+profileID, "at", "2026-07-01T09:00:00Z", "policy", item("id", "policy-1"), "trace", []any{}))
	run(t, "iam", "simulate", "access", profileID, "is.instance.instance.list", "--service", "is", "--attribute", "region=us-south", "--at", "2026-07-01 09:00:00 UTC").
		want(0, "ALLOWED: by policy policy-1")
	same(t, s.sent("POST /v1/simulate/access").Body, `{"action":"is.instance.instance.list","iam_id":"iam-`+profileID+
		`","resource":{"attributes":{"region":"us-south","serviceName":"is"}},"time":"2026-07-01T09:00:00Z"}`)
	run(t, "iam", "simulate", "access", "iam-ServiceId-1", "a", "--resource", "crn:x", "--tags", "env:dev").want(0, "ALLOWED")
	same(t, s.sent("POST /v1/simulate/access").Body, `{"action":"a","iam_id":"iam-ServiceId-1","resource":{"crn":"crn:x","tags":["env:dev"]}}`)
	run(t, "iam", "simulate", "access", "iam-ServiceId-1", "a").want(2, "say on what")
	run(t, "iam", "simulate", "access", "iam-ServiceId-1", "a", "--service", "is", "--at", "soon").want(2, "not a time")

	s.answer("POST /v1/simulate/access", item("allowed", false, "trace", []any{item("check", "policy-subject", "outcome", "fail")}))
	says(t, run(t, "iam", "simulate", "access", "iam-ServiceId-1", "a", "--service", "is").want(1), "REFUSED: the check policy-subject failed")
}

// says demands an answer on standard output, and nothing of a failure beside it.
func says(t *testing.T, r result, fragments ...string) {
	t.Helper()
	for _, f := range fragments {
		if !strings.Contains(r.stdout, f) {
			t.Errorf("%q does not say %q but:\n%s", r.args, f, r.stdout)
		}
	}
	if r.stderr != "" {
		t.Errorf("%q says on stderr: %s", r.args, r.stderr)
	}
}
