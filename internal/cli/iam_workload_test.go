package cli

import (
	"os"
	"strings"
	"testing"
)

func TestAWorkloadIssuerIsRegisteredAndWhatComesNextIsTold(t *testing.T) {
	s := newServer(t)
	s.login()
	const id = "WorkloadIssuer-" + uuidA
	preset := item("name", "github-actions", "title", "GitHub Actions", "issuer", "https://github.test", "notes", "ask for AUDIENCE\nand compare ids",
		"mapping", item("claims", item("repository_id", "repository_id"), "pin", []any{[]any{"repository_id"}, []any{"org", "app"}}),
		"example_rule", []any{item("claim", "repository_id", "operator", "EQUALS", "value", "456789")})
	issuer := item("id", id, "name", "github", "issuer", "https://github.test", "audience", "https://tabard.test/identity", "preset", "github-actions",
		"entity_tag", "1-a", "mapping", preset["mapping"], "tested", item("subject", "repo:a/b", "claims", item("repository_id", "1", "teams", []any{"a", "b"})))
	s.answer("GET /v1/workload_presets", list("workload_presets", preset))
	s.answer("POST /v1/workload_issuers", reply{status: 201, body: issuer})
	s.answer("GET /v1/workload_issuers", list("workload_issuers", issuer))
	s.answer("GET /v1/workload_issuers/"+id, reply{body: issuer, status: 200, header: map[string]string{"ETag": "1-a"}})
	s.answer("PATCH /v1/workload_issuers/"+id, issuer)
	s.answer("DELETE /v1/workload_issuers/"+id, reply{status: 204})
	for name, text := range map[string]string{
		"token": "a.b.c\n", "jwks.json": `{"keys":[]}`,
		"mapping.yaml": "claims: {team: org.team}\npin: [[team]]\n", "typo.yaml": "claims: {team: org.team}\npins: [[team]]\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	run(t, "iam", "workload-issuer-create", "github", "--preset", "github-actions", "--test-token", "@token").
		want(0, "teams           a, b", "ask for https://tabard.test/identity", "--conditions 'claim:issuer,operator:EQUALS,value:https://github.test'",
			"--conditions 'claim:repository_id,operator:EQUALS,value:456789'", "issuer, and repository_id or org and app")
	wantBody(t, s.sent("POST /v1/workload_issuers"), item("name", "github", "preset", "github-actions", "test_token", "a.b.c"))
	run(t, "iam", "workload-issuer-create", "own", "--issuer", "https://own.test", "--mapping", "mapping.yaml", "--jwks", "jwks.json", "--output", "json").want(0)
	wantBody(t, s.sent("POST /v1/workload_issuers"), item("name", "own", "issuer", "https://own.test", "jwks", item("keys", []any{}),
		"mapping", item("claims", item("team", "org.team"), "pin", []any{[]any{"team"}})))
	runWith(t, strings.NewReader("d.e.f\n"), "iam", "workload-issuer-create", "github", "--preset", "github-actions", "--test-token", "-").want(0)
	wantBody(t, s.sent("POST /v1/workload_issuers"), item("name", "github", "preset", "github-actions", "test_token", "d.e.f"))
	r := run(t, "iam", "workload-issuer-create", "github", "--preset", "github-actions", "--test-token", "secret.b.c")
	r.want(2, "@FILE", "standard input")
	if strings.Contains(r.stdout+r.stderr, "secret.b.c") {
		t.Error("the token is shown")
	}
	run(t, "iam", "workload-issuer-create", "own").want(2, "--issuer")
	run(t, "iam", "workload-issuer-create", "own", "--issuer", "https://own.test", "--mapping", "typo.yaml").want(1, "pins")
	run(t, "iam", "workload-issuers").want(0, "github-actions")
	run(t, "iam", "workload-issuer", "github").want(0, id)
	run(t, "iam", "workload-issuer-update", "github", "--audience", "other").want(0)
	patch := s.sent("PATCH /v1/workload_issuers/" + id)
	wantBody(t, patch, item("audience", "other"))
	if got := patch.Header.Get("If-Match"); got != "1-a" {
		t.Errorf("If-Match %q", got)
	}
	run(t, "iam", "workload-issuer-update", "github").want(2, "nothing to change")
	run(t, "iam", "workload-issuer-delete", "github", "-f").want(0)
	run(t, "iam", "workload-presets").want(0, "GitHub Actions")
	run(t, "iam", "workload-presets", "github-actions").want(0, "compare ids", "trusted-profile-rule-create PROFILE")
	run(t, "iam", "workload-presets", "travis").want(1, "github-actions")
}

func TestThereIsNoLinkOfTypeOIDC(t *testing.T) {
	newServer(t).login()
	r := run(t, "iam", "trusted-profile-link-create", "p", "--cr-type", "OIDC", "--link-crn", "crn:x")
	r.want(2, "cr-type")
	if strings.Contains(run(t, "iam", "trusted-profile-link-create", "--help").stdout, "OIDC") {
		t.Error("the help offers it")
	}
}
