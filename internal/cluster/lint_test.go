package cluster_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/cluster"
	"tabard.dev/tabard/internal/identity"
)

func presets(t testing.TB) map[string]*cluster.Preset {
	t.Helper()
	all, err := cluster.Presets()
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]*cluster.Preset{}
	for _, p := range all {
		byName[p.Name] = p
	}
	return byName
}

func registered(t testing.TB, preset string) *cluster.Issuer {
	t.Helper()
	p := presets(t)[preset]
	if p == nil {
		t.Fatalf("no preset %s", preset)
	}
	return &cluster.Issuer{Name: preset, Issuer: p.Issuer, Audience: "tabard", Preset: preset, Mapping: p.Mapping}
}

func is(claim, value string) identity.Condition {
	return identity.Condition{Claim: claim, Operator: identity.Equals, Value: `"` + value + `"`}
}

func by(operator identity.Operator, claim, value string) identity.Condition {
	return identity.Condition{Claim: claim, Operator: operator, Value: value}
}

func TestEveryPresetIsCompleteAndItsExampleIsSafe(t *testing.T) {
	all := presets(t)
	if len(all) != 3 {
		t.Errorf("%d presets", len(all))
	}
	for name, p := range all {
		if p.Title == "" || p.Notes == "" || len(p.Example) == 0 || len(p.Pin) == 0 || !strings.Contains(p.Notes, "AUDIENCE") {
			t.Errorf("preset %s lacks something: %+v", name, p)
		}
		issuer := registered(t, name)
		if err := issuer.Validate(); err != nil {
			t.Errorf("preset %s: %v", name, err)
		}
		conditions := append([]identity.Condition{is("issuer", p.Issuer)}, p.Example...)
		if err := cluster.Lint(conditions, []*cluster.Issuer{issuer}); err != nil {
			t.Errorf("the example of preset %s: %v", name, err)
		}
	}
}

const (
	github    = "https://token.actions.githubusercontent.com"
	gitlab    = "https://gitlab.com"
	buildkite = "https://agent.buildkite.com"
)

func TestARuleThatWouldAdmitStrangersIsRefused(t *testing.T) {
	own := &cluster.Issuer{Name: "own", Issuer: "https://ci.example.com", Mapping: cluster.Mapping{Claims: map[string]string{"team": "team"}, Pin: [][]string{}}}
	plain := &cluster.Issuer{Name: "plain", Issuer: "https://plain.example.com/", Mapping: cluster.SubjectOnly()}
	pair := &cluster.Issuer{Name: "pair", Issuer: "https://pair.example.com", Mapping: cluster.Mapping{
		Claims: map[string]string{"org": "org", "app": "app"}, Pin: [][]string{{"org", "app"}},
	}}
	issuers := []*cluster.Issuer{registered(t, "github-actions"), registered(t, "gitlab"), registered(t, "buildkite"), own, plain, pair}
	const (
		safe   = "safe"
		never  = "never"
		unsafe = "unsafe"
	)
	for _, tt := range []struct {
		name       string
		verdict    string
		says       string
		conditions []identity.Condition
	}{
		// GitHub: an owner or a repository.
		{"a repository", safe, "", []identity.Condition{is("issuer", github), is("repository", "acme/shop")}},
		{"a repository by its id, as a number", safe, "", []identity.Condition{is("issuer", github), by(identity.Equals, "repository_id", "456789")}},
		{"an owner", safe, "", []identity.Condition{is("issuer", github), is("repository_owner_id", "1")}},
		{"one of several repositories", safe, "", []identity.Condition{is("issuer", github), by(identity.In, "repository", `["acme/a","acme/b"]`)}},
		{"a subject with a repository", safe, "", []identity.Condition{is("issuer", github), is("sub", "repo:acme/shop:ref:refs/heads/main")}},
		{"a subject of the immutable form", safe, "", []identity.Condition{is("issuer", github), is("sub", "repo:acme@1/shop@2:ref:refs/heads/main")}},
		{"a repository and a part of a branch", safe, "", []identity.Condition{is("issuer", github), is("repository", "acme/shop"), by(identity.Contains, "ref", `"refs/heads/release-"`)}},
		{"a repository and not a pull request", safe, "", []identity.Condition{is("issuer", github), is("repository", "acme/shop"), by(identity.NotEquals, "event_name", `"pull_request_target"`)}},
		{"only the issuer", unsafe, "repository_id", []identity.Condition{is("issuer", github)}},
		{"a branch", unsafe, "strangers", []identity.Condition{is("issuer", github), is("ref", "refs/heads/main")}},
		{"an environment", unsafe, "strangers", []identity.Condition{is("issuer", github), is("environment", "production")}},
		{"a workflow that others may call", unsafe, "strangers", []identity.Condition{is("issuer", github), is("job_workflow_ref", "acme/ci/.github/workflows/deploy.yml@refs/heads/main")}},
		{"who started it", unsafe, "strangers", []identity.Condition{is("issuer", github), is("actor", "ada")}},
		{"a part of a repository", unsafe, "CONTAINS", []identity.Condition{is("issuer", github), by(identity.Contains, "repository", `"acme/"`)}},
		{"all repositories but one", unsafe, "NOT_EQUALS", []identity.Condition{is("issuer", github), by(identity.NotEquals, "repository", `"evil/shop"`)}},
		{"a repository in any case", unsafe, "EQUALS_IGNORE_CASE", []identity.Condition{is("issuer", github), by(identity.EqualsIgnoreCase, "repository", `"Acme/Shop"`)}},
		{"a repository or nothing", unsafe, "repository", []identity.Condition{is("issuer", github), by(identity.In, "repository_id", `["1",""]`)}},
		{"a repository of a blank", unsafe, "repository", []identity.Condition{is("issuer", github), is("repository_id", " ")}},
		{"no repository at all", unsafe, "repository", []identity.Condition{is("issuer", github), by(identity.Equals, "repository_id", "")}},
		{"a subject without a repository", unsafe, "form", []identity.Condition{is("issuer", github), is("sub", "environment:production")}},
		{"a subject of a workflow", unsafe, "form", []identity.Condition{is("issuer", github), is("sub", "job_workflow_ref:acme/ci/.github/workflows/x.yml@refs/heads/main")}},
		{"a subject that only looks like a repository's", unsafe, "form", []identity.Condition{is("issuer", github), is("sub", "x\\nrepo:acme/shop:ref:refs/heads/main")}},
		{"a repository without an owner", unsafe, "form", []identity.Condition{is("issuer", github), is("repository", "shop")}},
		{"a single-character wildcard", unsafe, "repository", []identity.Condition{is("issuer", github), is("repository", "acme/sho?")}},

		// Wildcards.
		{"a wildcard subject", never, "wildcard", []identity.Condition{is("issuer", github), is("sub", "repo:acme/*")}},
		{"a wildcard repository", never, "wildcard", []identity.Condition{is("issuer", github), is("repository", "acme/*")}},
		{"a wildcard in a list", never, "wildcard", []identity.Condition{is("issuer", github), by(identity.In, "repository", `["acme/a","*/*"]`)}},
		{"a wildcard branch beside a repository", never, "wildcard", []identity.Condition{is("issuer", github), is("repository", "acme/shop"), is("ref", "refs/heads/*")}},
		{"a wildcard that leaves out nothing", unsafe, "wildcard", []identity.Condition{is("issuer", github), is("repository", "acme/shop"), by(identity.NotEquals, "ref", `"refs/pull/*"`)}},

		// The issuer.
		{"no issuer", unsafe, "exactly one condition", []identity.Condition{is("repository", "acme/shop")}},
		{"no condition", unsafe, "exactly one condition", nil},
		{"two issuers", unsafe, "exactly one condition", []identity.Condition{is("issuer", github), is("issuer", gitlab), is("repository", "acme/shop")}},
		{"one of several issuers", unsafe, "exactly one condition", []identity.Condition{by(identity.In, "issuer", `["`+github+`"]`), is("repository", "acme/shop")}},
		{"a part of an issuer", unsafe, "exactly one condition", []identity.Condition{by(identity.Contains, "issuer", `"githubusercontent.com"`), is("repository", "acme/shop")}},
		{"any other issuer", unsafe, "exactly one condition", []identity.Condition{by(identity.NotEquals, "issuer", `"https://x"`), is("repository", "acme/shop")}},
		{"an issuer with a slash too many", never, "Did you mean \"" + github + "\"", []identity.Condition{is("issuer", github+"/"), is("repository", "acme/shop")}},
		{"an issuer that nobody registered", never, "workload-issuer-create", []identity.Condition{is("issuer", "https://elsewhere.example"), is("repository", "acme/shop")}},
		{"an issuer in another case", never, "Register", []identity.Condition{is("issuer", "https://GITLAB.com"), is("project_id", "1")}},

		// Claims that no token can have.
		{"a claim with a letter missing", never, `Did you mean "repository"`, []identity.Condition{is("issuer", github), is("repositry", "acme/shop")}},
		{"a claim of another service", never, "project_path", []identity.Condition{is("issuer", github), is("project_path", "acme/shop")}},

		// GitLab, Buildkite, one's own.
		{"a project", safe, "", []identity.Condition{is("issuer", gitlab), is("project_id", "20")}},
		{"a namespace", safe, "", []identity.Condition{is("issuer", gitlab), is("namespace_path", "acme")}},
		{"the project that a fork's merge request runs in", unsafe, "strangers", []identity.Condition{is("issuer", gitlab), is("job_project_id", "20")}},
		{"a protected branch of whatever project", unsafe, "strangers", []identity.Condition{is("issuer", gitlab), is("ref_protected", "true")}},
		{"a subject of GitLab", safe, "", []identity.Condition{is("issuer", gitlab), is("sub", "project_path:acme/team/shop:ref_type:branch:ref:main")}},
		{"a pipeline of an organization", safe, "", []identity.Condition{is("issuer", buildkite), is("organization_slug", "acme"), is("pipeline_slug", "deploy")}},
		{"a pipeline of whatever organization", unsafe, "organization", []identity.Condition{is("issuer", buildkite), is("pipeline_slug", "deploy")}},
		{"a subject of Buildkite, which changes", unsafe, "organization", []identity.Condition{is("issuer", buildkite), is("sub", "organization:acme:pipeline:deploy:ref:refs/heads/main:commit:1:step:x")}},
		{"all of one's own issuer", safe, "", []identity.Condition{is("issuer", own.Issuer)}},
		{"one's own issuer without naming it", unsafe, "exactly one", []identity.Condition{is("team", "a")}},
		{"a subject", safe, "", []identity.Condition{is("issuer", plain.Issuer), is("sub", "anything")}},
		{"no subject", unsafe, "sub", []identity.Condition{is("issuer", plain.Issuer)}},
		{"both claims of a set", safe, "", []identity.Condition{is("issuer", pair.Issuer), is("org", "a"), is("app", "b")}},
		{"one claim of a set", unsafe, "org and app", []identity.Condition{is("issuer", pair.Issuer), is("app", "b")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := cluster.Lint(tt.conditions, issuers)
			var f *cluster.Finding
			if tt.verdict == safe {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				return
			}
			if !errors.As(err, &f) {
				t.Fatalf("error %v, want a finding", err)
			}
			if f.Never != (tt.verdict == never) || !strings.Contains(f.Reason, tt.says) {
				t.Errorf("never %t: %s; want %s, and %q", f.Never, f.Reason, tt.verdict, tt.says)
			}
		})
	}
}

// Whatever conditions are added, a rule that passes compares the issuer and all
// claims of some set with complete values.
func TestWhatPassesIsPinned(t *testing.T) {
	issuer := &cluster.Issuer{Name: "ci", Issuer: "https://ci", Mapping: cluster.Mapping{
		Claims: map[string]string{"a": "a", "b": "b", "c": "c"}, Pin: [][]string{{"a", "b"}, {"c"}},
	}}
	value := rapid.SampledFrom([]string{`"x"`, `x`, `""`, `"*"`, `"x*"`, `["x","y"]`, `["x",""]`, `[]`, `1`, `true`, `"?"`})
	operator := rapid.SampledFrom([]identity.Operator{
		identity.Equals, identity.Equals, identity.In, identity.NotEquals, identity.Contains, identity.EqualsIgnoreCase, identity.NotEqualsIgnoreCase, "OTHER",
	})
	passed := 0
	rapid.Check(t, func(t *rapid.T) {
		conditions := []identity.Condition{is("issuer", "https://ci")}
		for range rapid.IntRange(0, 4).Draw(t, "conditions") {
			conditions = append(conditions, by(operator.Draw(t, "operator"), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "claim"), value.Draw(t, "value")))
		}
		if cluster.Lint(conditions, []*cluster.Issuer{issuer}) != nil {
			return
		}
		passed++
		complete := func(claim string) bool {
			return slices.ContainsFunc(conditions, func(c identity.Condition) bool {
				return c.Claim == claim && (c.Operator == identity.Equals || c.Operator == identity.In) &&
					slices.Contains([]string{`"x"`, `x`, `["x","y"]`, `1`, `true`}, c.Value)
			})
		}
		if !complete("c") && (!complete("a") || !complete("b")) {
			t.Fatalf("passed: %+v", conditions)
		}
		for _, c := range conditions {
			if strings.Contains(c.Value, "*") {
				t.Fatalf("a wildcard passed: %+v", c)
			}
		}
	})
	if passed == 0 {
		t.Error("nothing passed")
	}
}
