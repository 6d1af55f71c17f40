package test

import (
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// ciService is an issuer that plays a CI service: its tokens have the claims
// that the service documents.
type ciService struct {
	*harness.Issuer
	preset, name string // and the issuer's URL in the guide
	claims       map[string]any
}

func newCIServices(t *testing.T) map[string]*ciService {
	return map[string]*ciService{
		"github": {Issuer: harness.NewIssuer(t), preset: "github-actions", name: "https://token.actions.githubusercontent.com", claims: map[string]any{
			"sub": "repo:acme@1/shop@456789:ref:refs/heads/main", "repository": "acme/shop", "repository_id": "456789", "repository_owner": "acme",
			"repository_owner_id": "1", "ref": "refs/heads/main", "ref_type": "branch", "ref_protected": "true", "event_name": "push", "actor": "ada",
			"workflow_ref": "acme/shop/.github/workflows/deploy.yml@refs/heads/main", "job_workflow_ref": "acme/shop/.github/workflows/deploy.yml@refs/heads/main",
			"run_id": "1", "runner_environment": "github-hosted", "head_ref": "", "base_ref": "",
		}},
		"gitlab": {Issuer: harness.NewIssuer(t), preset: "gitlab", name: "https://gitlab.com", claims: map[string]any{
			"sub": "project_path:acme/shop:ref_type:branch:ref:main", "namespace_id": "72", "namespace_path": "acme", "project_id": "20", "project_path": "acme/shop",
			"ref": "main", "ref_type": "branch", "ref_path": "refs/heads/main", "ref_protected": "true", "pipeline_source": "push", "runner_id": 1,
			"user_identities": []any{map[string]any{"provider": "github", "extern_uid": "2435223452345"}},
		}},
		"buildkite": {Issuer: harness.NewIssuer(t), preset: "buildkite", name: "https://agent.buildkite.com", claims: map[string]any{
			"sub":               "organization:acme-inc:pipeline:deploy:ref:refs/heads/main:commit:9f3182061f1e2cca4702c368cbc039b7dc9d4485:step:build",
			"organization_slug": "acme-inc", "organization_id": "0184990a-477b-4fa8-9968-496074483c77", "pipeline_slug": "deploy", "build_number": 1,
			"build_branch": "main", "step_key": nil, "build_source": "webhook", "runner_environment": "self-hosted",
		}},
	}
}

// job makes a token for a job, with some claims changed.
func (c *ciService) job(audience string, change map[string]any) string {
	now := time.Now()
	claims := map[string]any{"iss": c.URL, "aud": audience, "iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(5 * time.Minute).Unix()}
	maps.Copy(claims, c.claims)
	maps.Copy(claims, change)
	return c.Sign(claims)
}

func TestTheCIGuidesJobsWorkWithoutASecret(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	services := newCIServices(t)
	pairs := []string{"http://127.0.0.1:8470", s.URL, "https://tabard.example.com", s.URL}
	for _, c := range services {
		pairs = append(pairs, "--preset "+c.preset, "--preset "+c.preset+" --issuer "+c.URL+" --ca-file "+c.CAFile, c.name, c.URL)
	}
	sh := harness.StartShell(t, s, nil, nil, pairs...)
	guide := filepath.Join(harness.Root(), "docs/ci.md")
	refused := false
	for _, b := range harness.Blocks(t, guide) {
		refused = strings.Contains(sh.Run(b.Commands), "refused") || refused
	}
	if !refused {
		t.Error("the guide's unsafe rule was not refused")
	}

	audience := s.URL + "/identity"
	// What the services put in place for their jobs.
	request := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer request" {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"count": 1, "value": "%s"}`, services["github"].job(r.URL.Query().Get("audience"), nil))
	}))
	t.Cleanup(request.Close)
	bin := t.TempDir()
	agent := "#!/bin/sh\ncase \"$*\" in 'oidc request-token --audience " + audience + " --claim organization_id') cat <<'END'\n" +
		services["buildkite"].job(audience, nil) + "\nEND\n;; *) exit 2;; esac\n"
	if err := os.WriteFile(filepath.Join(bin, "buildkite-agent"), []byte(agent), 0o700); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "TABARD_TOKEN="+services["gitlab"].job(audience, nil),
		"ACTIONS_ID_TOKEN_REQUEST_URL="+request.URL+"/token?api-version=2.0", "ACTIONS_ID_TOKEN_REQUEST_TOKEN=request")
	text, err := os.ReadFile(guide)
	if err != nil {
		t.Fatal(err)
	}
	scripts := regexp.MustCompile(`(?m)^ *(?:- )?(?:run: |command: )?(?:- )?\|\n((?:(?: {6,}.*)?\n)+)`).FindAllStringSubmatch(string(text), -1)
	if len(scripts) != 3 {
		t.Fatalf("%d job scripts in the guide, want 3", len(scripts))
	}
	for n, name := range []string{"github", "gitlab", "buildkite"} {
		cmd := exec.CommandContext(t.Context(), "bash", "-e", "-c", strings.ReplaceAll(scripts[n][1], "https://tabard.example.com", s.URL))
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), `"name":"store"`) {
			t.Errorf("the job of %s: %v\n%s", name, err, out)
		}
	}
	events := s.Events("--action", "iam-identity.computeresource-token.login", "--outcome", "success")
	if len(events) != 3 {
		t.Errorf("%d logins are recorded, want 3", len(events))
	}
}

func TestAStrangersJobDoesNotPutOnTheProfile(t *testing.T) {
	b := &sceneB{Server: harness.Start(t, "--driver", "none")}
	b.Login()
	ci := newCIServices(t)["github"]
	own := b.URL + "/identity"
	good := ci.job(own, nil)

	file := tokenFile(t, ci.job("https://github.com/acme", nil))
	if r := b.Run("iam", "workload-issuer-create", "github", "--preset", "github-actions", "--issuer", ci.URL, "--ca-file", ci.CAFile, "--test-token", "@"+file); r.Code == 0 || !strings.Contains(r.Err, "token-audience") {
		t.Fatalf("a test token for another audience: %+v", r)
	}
	out := b.CLI("iam", "workload-issuer-create", "github", "--preset", "github-actions", "--issuer", ci.URL, "--ca-file", ci.CAFile, "--test-token", "@"+tokenFile(t, good))
	for _, want := range []string{"456789", "trusted-profile-rule-create", "audience=" + own} {
		if !strings.Contains(out, want) {
			t.Errorf("the registration does not tell %q:\n%s", want, out)
		}
	}
	b.CLI("iam", "trusted-profile-create", "deploy")
	b.CLI("iam", "trusted-profile-rule-create", "deploy", "--type", "Profile-CR", "--cr-type", "OIDC",
		"--conditions", "claim:issuer,operator:EQUALS,value:"+ci.URL,
		"--conditions", "claim:repository_id,operator:EQUALS,value:456789",
		"--conditions", "claim:ref,operator:EQUALS,value:refs/heads/main",
		"--conditions", `claim:event_name,operator:IN,value:["push"]`)
	if a := b.exchange(good, "deploy"); a.Status != http.StatusOK {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	stranger := harness.NewIssuer(t)
	impostor := &ciService{Issuer: stranger, claims: ci.claims}
	for name, token := range map[string]string{
		"another repository":                ci.job(own, map[string]any{"repository": "evil/shop", "repository_id": "666"}),
		"a repository that took the name":   ci.job(own, map[string]any{"repository_id": "666"}),
		"a repository without an id":        ci.job(own, map[string]any{"repository_id": nil}),
		"ids in a list":                     ci.job(own, map[string]any{"repository_id": map[string]any{"x": "456789"}}),
		"another branch":                    ci.job(own, map[string]any{"ref": "refs/heads/evil"}),
		"a fork's pull request":             ci.job(own, map[string]any{"ref": "refs/heads/main", "event_name": "pull_request_target"}),
		"a token for GitHub's own audience": ci.job("https://github.com/acme", nil),
		"a token for pods":                  ci.job("iam", nil),
		"a token for another installation":  ci.job("https://elsewhere.example.com/identity", nil),
		"a service that nobody registered":  impostor.job(own, nil),
		"one that claims to be another":     impostor.job(own, map[string]any{"iss": ci.URL}),
		"a claim that names the issuer":     impostor.job(own, map[string]any{"issuer": ci.URL}),
		"an issuer with a slash":            ci.job(own, map[string]any{"iss": ci.URL + "/"}),
		"an old token":                      ci.job(own, map[string]any{"iat": time.Now().Add(-2 * time.Hour).Unix(), "nbf": time.Now().Add(-2 * time.Hour).Unix(), "exp": time.Now().Add(time.Hour).Unix()}),
	} {
		t.Run(name, func(t *testing.T) {
			if a := b.exchange(token, "deploy"); a.Status != http.StatusBadRequest {
				t.Errorf("%d %s", a.Status, a.Body)
			}
		})
	}
	b.CLI("iam", "workload-issuer-delete", "github", "-f")
	if a := b.Do("POST", "/identity/token", "", url.Values{"grant_type": {grantCRToken}, "cr_token": {good}, "profile_name": {"deploy"}}); a.Status != http.StatusBadRequest {
		t.Errorf("after the deletion: %d %s", a.Status, a.Body)
	}
}
