package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// A nodeStep is what a step of node/flows.mjs must print: a status, some fields
// of the result ("path=value"), or the whole result.
type nodeStep struct {
	step   string
	status int
	fields []string
	result string
}

func answered(status int, step string, fields ...string) nodeStep {
	return nodeStep{step: step, status: status, fields: fields}
}

func told(step, result string) nodeStep { return nodeStep{step: step, result: result} }

// nodeFlows is what the published packages must see, in order. 409 is the
// status of a stale tag in identity calls, 412 in policy and access-group calls.
var nodeFlows = []nodeStep{
	answered(201, "profile: create", "name=node profile", "description=first"),
	answered(200, "profile: get", "name=node profile"),
	told("profile: etag of get is the entity tag", `true`),
	answered(200, "profile: update", "description=second", "name=node profile"),
	answered(409, "profile: update with the old etag"),
	answered(200, "profile: update whatever the etag", "description=fourth"),
	answered(404, "profile: get another account's"),
	told("profile: pages", `[["node page 1","node page 2"],["node page 3","node profile"]]`),
	answered(200, "profile: list by name", "profiles.0.name=node page 2"),

	answered(201, "claim rule: create", "name=jobs", "type=Profile-CR", "cr_type=IKS_SA", `conditions.0.value="batch"`),
	answered(200, "claim rule: get", "name=jobs"),
	answered(200, "claim rule: list", "rules.0.name=jobs"),
	answered(200, "claim rule: update", "conditions.0.operator=IN"),
	answered(409, "claim rule: update with the old etag"),
	answered(204, "claim rule: delete"),
	answered(404, "claim rule: get deleted"),
	answered(201, "claim rule: create for a directory", "type=Profile-SAML", "realm_name=https://idp.example.com/saml", "expiration=3600"),
	answered(204, "claim rule: delete for a directory"),

	answered(201, "link: create", "name=web", "cr_type=IKS_SA", "link.namespace=shop", "link.name=web"),
	answered(200, "link: get", "name=web"),
	answered(200, "link: list", "links.0.name=web"),
	answered(204, "link: delete"),
	answered(404, "link: get deleted"),

	answered(201, "service ID: create", "name=node ci"),
	answered(200, "service ID: get", "description=first"),
	answered(200, "service ID: update", "description=second"),
	answered(409, "service ID: update with the old etag"),
	told("service ID: pages", `[["node ci","node page 1"],["node page 2"]]`),

	answered(201, "API key: create", "name=node key", "expires_at=2049-01-02T18:30+0000"),
	answered(200, "API key: get", "description=first"),
	answered(200, "API key: by value", "name=node key"),
	answered(200, "API key: update", "description=second"),
	answered(409, "API key: update with the old etag"),
	told("API key: login", `true`),
	told("API key: pages", `[["node key","node page 1"],["node page 2"]]`),
	answered(204, "API key: lock"),
	answered(409, "API key: delete locked"),
	answered(204, "API key: unlock"),
	answered(204, "API key: delete"),
	answered(400, "API key: login with a deleted key"),

	answered(200, "identity: add", "type=serviceid", "description=pipeline"),
	answered(200, "identity: get", "type=serviceid"),
	answered(200, "identity: list", "identities.0.type=serviceid"),
	answered(200, "identity: replace all", "identities.1.type=crn"),
	answered(200, "identity: get by CRN", "type=crn"),
	answered(204, "identity: delete by CRN"),
	answered(204, "identity: delete"),
	answered(404, "identity: get deleted"),

	answered(201, "role: create", "name=NodeAuditor", "display_name=Node auditor", "service_name=iam-groups"),
	answered(200, "role: get", "description=first"),
	answered(200, "role: update", "actions.1=iam-groups.groups.list"),
	answered(412, "role: update with the old etag"),
	answered(200, "role: list", "system_roles.0.crn~::role:"),
	told("role: is listed", `true`),
	answered(204, "role: delete"),
	answered(404, "role: get deleted"),

	answered(201, "policy v1: create", "state=active", "href~/v1/policies/"),
	answered(409, "policy v1: create the same again"),
	answered(200, "policy v1: get", "type=access"),
	answered(200, "policy v1: update", "description=second", "roles.0.role_id~::role:Operator"),
	answered(412, "policy v1: update with the old etag"),
	answered(200, "policy v1: list", "policies.0.description=second"),
	answered(204, "policy v1: delete"),
	answered(200, "policy v1: get deleted", "state=deleted"),
	answered(200, "policy v1: revive", "state=active"),
	answered(204, "policy v1: delete again"),

	answered(201, "policy v2: create", "pattern=time-based-conditions:weekly:custom-hours", "rule.operator=and", "href~/v2/policies/"),
	answered(200, "policy v2: get", "control.grant.roles.0.role_id~::role:Viewer"),
	answered(200, "policy v2: update", "description=second"),
	answered(412, "policy v2: update with the old etag"),
	told("policy v2: pages", `[2,1]`),
	answered(204, "policy v2: delete"),
	answered(404, "policy v2: delete again"),

	answered(201, "access group: create", "name=node group"),
	answered(200, "access group: get", "crn~:a/"),
	answered(200, "access group: update", "description=second", "name=node group"),
	answered(412, "access group: update with the old etag"),
	answered(207, "access group: add members", "members.0.status_code=200", "members.1.status_code=200"),
	answered(204, "access group: is a member"),
	answered(200, "access group: list members", "total_count=2", "members.0.name~node"),
	told("access group: member pages", `2`),
	answered(200, "access group: list groups of a member", "total_count=1", "groups.0.name=node group"),
	answered(201, "access group: create rule", "name=managers", "expiration=12"),
	answered(200, "access group: get rule", "name=managers"),
	answered(200, "access group: update rule", "expiration=24"),
	answered(412, "access group: update rule with the old etag"),
	answered(200, "access group: list rules", "rules.0.name=managers"),
	told("access group: pages", `["node group","node page 1","node page 2"]`),
	answered(409, "access group: delete while it has members"),
	answered(204, "access group: delete rule"),
	answered(204, "access group: remove a member"),
	answered(207, "access group: remove members", "members.0.status_code=200"),
	answered(404, "access group: is no member"),
	answered(204, "access group: delete"),
	answered(404, "access group: get deleted"),

	answered(201, "resource group: create", "crn~:resource-group:"),
	answered(200, "resource group: get", "name=node-group", "state=ACTIVE"),
	answered(200, "resource group: update", "name=node-group-2"),
	answered(200, "resource group: list by name", "resources.0.name=node-group-2"),
	answered(200, "resource group: list the default", "resources.0.default=true"),
	answered(204, "resource group: delete"),
	answered(403, "resource group: create without a right to it"),

	answered(201, "compute resource: link"),
	answered(201, "compute resource: policy"),
	answered(200, "compute resource: reads its profile, by profile name", "name=node profile"),
	answered(403, "compute resource: may not change it, by profile name"),
	answered(200, "compute resource: reads its profile, by profile id", "name=node profile"),
	answered(403, "compute resource: may not change it, by profile id"),
	answered(400, "compute resource: may not wear an unknown profile"),

	answered(204, "end: delete service ID"),
	answered(204, "end: delete profile"),
	answered(404, "end: get deleted profile"),
	answered(200, "end: list policies of a deleted profile"),
}

func TestThePublishedNodePackagesWorkUnmodified(t *testing.T) {
	dir := nodePackages(t)
	s := harness.Start(t, "--driver", "none")
	issuer := harness.NewIssuer(t)
	s.Login()
	s.CLI("ks", "cluster-register", "node-cluster", "--issuer", issuer.URL, "--ca-file", issuer.CAFile)
	var cluster struct{ CRN string }
	s.JSON(&cluster, "ks", "cluster-get", "node-cluster")

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "node", "flows.mjs")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TABARD_URL="+s.URL, "TABARD_APIKEY="+s.Owner.APIKey, "TABARD_ACCOUNT="+s.Owner.AccountID,
		"TABARD_CLUSTER_CRN="+cluster.CRN, "TABARD_CR_TOKEN_FILE="+tokenFile(t, issuer.Token("shop", "web")))
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, runErr := cmd.Output()

	seen := printedSteps(t, out)
	families := map[string][]nodeStep{}
	var order []string
	for _, want := range nodeFlows {
		name, _, _ := strings.Cut(want.step, ":")
		if families[name] == nil {
			order = append(order, name)
		}
		families[name] = append(families[name], want)
	}
	for _, name := range order {
		t.Run(name, func(t *testing.T) {
			for _, want := range families[name] {
				got, ok := seen[want.step]
				if !ok {
					stopped := name + ": stopped"
					t.Errorf("%s and what follows: not reached; %s", want.step, seen[stopped].Error)
					delete(seen, stopped)
					return
				}
				want.compare(t, got)
				delete(seen, want.step)
			}
		})
	}
	for step, got := range seen {
		t.Errorf("%s: not expected: %+v", step, got)
	}
	if runErr != nil {
		t.Errorf("node: %v\n%s", runErr, errOut.String())
	}
}

// printedStep is a line that node/flows.mjs prints.
type printedStep struct {
	Step    string          `json:"step"`
	Status  int             `json:"status"`
	Result  json.RawMessage `json:"result"`
	Error   string          `json:"error"`   // of a call that had to succeed
	Refusal string          `json:"refusal"` // of a call that had to fail
}

func printedSteps(t *testing.T, out []byte) map[string]printedStep {
	t.Helper()
	seen := map[string]printedStep{}
	lines := bufio.NewScanner(bytes.NewReader(out))
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var p printedStep
		if err := json.Unmarshal(lines.Bytes(), &p); err != nil {
			t.Fatalf("not a step: %q: %v", lines.Text(), err)
		}
		if _, twice := seen[p.Step]; twice {
			t.Errorf("%s: printed twice", p.Step)
		}
		seen[p.Step] = p
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return seen
}

func (want nodeStep) compare(t *testing.T, got printedStep) {
	t.Helper()
	if got.Status != want.status {
		t.Errorf("%s: status %d, want %d: %s%s%.500s", want.step, got.Status, want.status, got.Error, got.Refusal, got.Result)
		return
	}
	if want.result != "" && string(got.Result) != want.result {
		t.Errorf("%s: %s, want %s", want.step, got.Result, want.result)
	}
	for _, f := range want.fields {
		i := strings.IndexAny(f, "=~")
		value := textAt(got.Result, strings.Split(f[:i], "."))
		if f[i] == '=' && value != f[i+1:] || f[i] == '~' && !strings.Contains(value, f[i+1:]) {
			t.Errorf("%s: %s is %q, want %s: %.1000s", want.step, f[:i], value, f, got.Result)
		}
	}
}

// textAt is the value at a path as text, or "".
func textAt(raw json.RawMessage, path []string) string {
	var v any
	if json.Unmarshal(raw, &v) != nil {
		return ""
	}
	for _, p := range path {
		switch at := v.(type) {
		case map[string]any:
			v = at[p]
		case []any:
			i, err := strconv.Atoi(p)
			if err != nil || i >= len(at) {
				return ""
			}
			v = at[i]
		default:
			return ""
		}
	}
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

// nodePackages returns a folder with flows.mjs and the packages of its lock
// file. Installed packages are kept for the next run with the same lock.
func nodePackages(t *testing.T) string {
	t.Helper()
	source := filepath.Join(harness.Root(), "test", "node")
	lock := readFile(t, filepath.Join(source, "package-lock.json"))
	sum := sha256.Sum256(lock)
	dir := filepath.Join(harness.Root(), ".cache", "node-"+hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"package.json", "package-lock.json", "flows.mjs"} {
		if err := os.WriteFile(filepath.Join(dir, name), readFile(t, filepath.Join(source, name)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// npm writes this file last.
	if _, err := os.Stat(filepath.Join(dir, "node_modules", ".package-lock.json")); err == nil {
		return dir
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v\n%s", err, out)
	}
	return dir
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
