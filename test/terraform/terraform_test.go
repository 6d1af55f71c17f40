//go:build terraform

// Package terraform applies, plans again and destroys a configuration with the
// published Terraform provider, unmodified, against the built binary. Both the
// command line and the provider take minutes to compile, so the tests ask for a
// build tag; `make test-terraform` builds them and sets it.
package terraform

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// A workspace is a folder with a configuration and its state.
type workspace struct {
	t      *testing.T
	server *harness.Server
	dir    string
	env    []string
}

func newWorkspace(t *testing.T, s *harness.Server, config string, env ...string) *workspace {
	t.Helper()
	w := &workspace{t: t, server: s, dir: t.TempDir()}
	if err := os.CopyFS(w.dir, os.DirFS(filepath.Join(harness.Root(), "test", "terraform", config))); err != nil {
		t.Fatal(err)
	}
	rc := filepath.Join(w.dir, "cli.tfrc")
	w.write(rc, fmt.Sprintf(`provider_installation {
  dev_overrides { "IBM-Cloud/ibm" = %q }
}`, filepath.Dir(binary(t, "TERRAFORM_PROVIDER_BIN"))))
	w.env = append(os.Environ(),
		"TF_CLI_CONFIG_FILE="+rc, "TF_IN_AUTOMATION=1", "CHECKPOINT_DISABLE=1", "HOME="+w.dir,
		// Everything that isn't on this machine is out of reach, so that a call
		// that misses the server fails instead of asking the real one.
		"HTTP_PROXY=http://127.0.0.1:1", "HTTPS_PROXY=http://127.0.0.1:1", "NO_PROXY=127.0.0.1,localhost",
		"IC_REGION=us-south", "IC_VISIBILITY=public",
	)
	w.env = append(w.env, env...)
	return w
}

// binary is an absolute path from the environment.
func binary(t *testing.T, variable string) string {
	t.Helper()
	path := os.Getenv(variable)
	if !filepath.IsAbs(path) {
		t.Fatalf("%s=%q is not the absolute path of a binary; run make test-terraform", variable, path)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func (w *workspace) write(name, content string) {
	w.t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// run runs terraform and returns its status and what it printed.
func (w *workspace) run(args ...string) (int, string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(w.t, "TERRAFORM_BIN"), args...)
	cmd.Dir, cmd.Env = w.dir, w.env
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("terraform %s: %v", strings.Join(args, " "), err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

// must runs terraform and fails the test unless it ends with status 0.
func (w *workspace) must(args ...string) string {
	w.t.Helper()
	code, out := w.run(args...)
	if code != 0 {
		// What was planned says nothing about why it failed.
		if i := strings.Index(out, "\nError: "); i >= 0 {
			out = out[i:]
		}
		w.t.Fatalf("terraform %s: status %d\n%s", strings.Join(args, " "), code, out)
	}
	return out
}

// settled fails the test if a further plan wants to change anything.
func (w *workspace) settled(vars ...string) {
	w.t.Helper()
	if code, out := w.run(append([]string{"plan", "-no-color", "-input=false", "-detailed-exitcode"}, vars...)...); code != 0 {
		w.t.Errorf("the plan after apply: status %d (2: it wants changes)\n%s", code, out)
	}
}

// left are the names in the account that begin with "tf", by kind.
func left(t *testing.T, s *harness.Server) map[string][]string {
	t.Helper()
	account := url.QueryEscape(s.Owner.AccountID)
	token := s.OwnerToken()
	found := map[string][]string{}
	for path, list := range map[string]string{
		"/v1/profiles?pagesize=100&account_id=" + account:    "profiles",
		"/v1/serviceids/?pagesize=100&account_id=" + account: "serviceids",
		"/v2/groups?limit=100&account_id=" + account:         "groups",
		"/v2/roles?account_id=" + account:                    "custom_roles",
		"/v2/resource_groups?account_id=" + account:          "resources",
	} {
		a := s.Do("GET", path, token, nil)
		var body map[string]json.RawMessage
		var items []struct {
			Name  string `json:"name"`
			State string `json:"state"`
		}
		if err := errors.Join(json.Unmarshal(a.Body, &body), json.Unmarshal(body[list], &items)); err != nil || a.Status != http.StatusOK {
			t.Fatalf("%s: %d %s: %v", path, a.Status, a.Body, err)
		}
		for _, i := range items {
			if strings.HasPrefix(strings.ToLower(i.Name), "tf") {
				found[list] = append(found[list], i.Name)
			}
		}
	}
	return found
}

func endpoints(s *harness.Server) []string {
	return []string{
		"IBMCLOUD_IAM_API_ENDPOINT=" + s.URL,
		"IBMCLOUD_RESOURCE_MANAGEMENT_API_ENDPOINT=" + s.URL,
		"IBMCLOUD_RESOURCE_CONTROLLER_API_ENDPOINT=" + s.URL,
		"IBMCLOUD_USER_MANAGEMENT_ENDPOINT=" + s.URL, // asked for the users among a group's members
	}
}

func TestTheProviderAppliesPlansNothingMoreAndDestroys(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	w := newWorkspace(t, s, "config", append(endpoints(s), "IC_API_KEY="+s.Owner.APIKey)...)
	first := []string{"-var=account_id=" + s.Owner.AccountID, "-var=suffix=one"}
	changed := []string{"-var=account_id=" + s.Owner.AccountID, "-var=suffix=two", "-var=description=second"}
	apply := func(vars []string) string {
		return w.must(append([]string{"apply", "-no-color", "-input=false", "-auto-approve"}, vars...)...)
	}

	apply(first)
	for kind, want := range map[string]int{"profiles": 2, "serviceids": 1, "groups": 1, "custom_roles": 1, "resources": 1} {
		if got := left(t, s)[kind]; len(got) != want {
			t.Errorf("%d %s after apply: %v; want %d", len(got), kind, got, want)
		}
	}
	w.settled(first...)

	before := w.must("output", "-no-color", "-raw", "profile_id")
	if out := apply(changed); !strings.Contains(out, " 0 destroyed") {
		t.Errorf("a change of names and descriptions replaced something:\n%s", out)
	}
	if after := w.must("output", "-no-color", "-raw", "profile_id"); after != before {
		t.Errorf("the profile was %s and is %s", before, after)
	}
	w.settled(changed...)

	apikey := w.must("output", "-no-color", "-raw", "apikey")
	if a := s.Do("POST", "/identity/token", "", url.Values{
		"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {apikey},
	}); a.Status != http.StatusOK {
		t.Errorf("a login with the key that was made: %d %s", a.Status, a.Body)
	}

	w.must(append([]string{"destroy", "-no-color", "-input=false", "-auto-approve"}, changed...)...)
	if found := left(t, s); len(found) != 0 {
		t.Errorf("left after destroy: %v", found)
	}
	if a := s.Do("POST", "/identity/token", "", url.Values{
		"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {apikey},
	}); a.Status != http.StatusBadRequest {
		t.Errorf("a login with the key that was destroyed: %d %s", a.Status, a.Body)
	}
}

func TestTheProviderFindsTheServerByAnEndpointsFileAndAssumesAProfile(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	s.CLI("iam", "trusted-profile-create", "deployer")
	for _, service := range []string{"iam-identity", "resource-controller"} {
		s.CLI("iam", "trusted-profile-policy-create", "deployer", "--roles", "Administrator", "--service-name", service)
	}
	s.CLI("iam", "service-id-create", "pipeline")
	var serviceID struct{ ID string }
	s.JSON(&serviceID, "iam", "service-id", "pipeline")
	s.CLI("iam", "trusted-profile-identity-create", "deployer", "--id", serviceID.ID, "--id-type", "SERVICEID")
	var key struct{ APIKey string }
	s.JSON(&key, "iam", "service-api-key-create", "pipeline-key", "pipeline")

	file := filepath.Join(t.TempDir(), "endpoints.json")
	w := newWorkspace(t, s, "assumed", "IC_API_KEY="+key.APIKey, "IBMCLOUD_ENDPOINTS_FILE_PATH="+file,
		"IC_IAM_PROFILE_NAME=deployer", "IBMCLOUD_ACCOUNT_ID="+s.Owner.AccountID)
	here := map[string]any{"public": map[string]string{"us-south": s.URL}}
	b, err := json.Marshal(map[string]any{
		"IBMCLOUD_IAM_API_ENDPOINT":                 here,
		"IBMCLOUD_RESOURCE_MANAGEMENT_API_ENDPOINT": here,
		"IBMCLOUD_RESOURCE_CONTROLLER_API_ENDPOINT": here,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.write(file, string(b))

	w.must("apply", "-no-color", "-input=false", "-auto-approve")
	w.settled()
	for _, e := range s.Events("--action", "iam-identity.profile.create", "--outcome", "success") {
		if e.Target.Name == "tf assumed" && e.Initiator.Name != "deployer" {
			t.Errorf("the profile was made by %+v", e.Initiator)
		}
	}
	w.must("destroy", "-no-color", "-input=false", "-auto-approve")
	if found := left(t, s); len(found) != 0 {
		t.Errorf("left after destroy: %v", found)
	}
}

func TestTheConfigurationHasEveryResourceThatIsSupported(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(harness.Root(), "test", "terraform", "config", "main.tf"))
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{
		"ibm_iam_trusted_profile", "ibm_iam_trusted_profile_claim_rule", "ibm_iam_trusted_profile_link",
		"ibm_iam_trusted_profile_identity", "ibm_iam_trusted_profile_identities", "ibm_iam_trusted_profile_policy",
		"ibm_iam_access_group", "ibm_iam_access_group_members", "ibm_iam_access_group_policy", "ibm_iam_access_group_dynamic_rule",
		"ibm_iam_service_id", "ibm_iam_service_policy", "ibm_iam_service_api_key", "ibm_iam_custom_role", "ibm_resource_group",
	} {
		if !bytes.Contains(b, []byte("resource \""+kind+"\" ")) {
			t.Errorf("%s is not in the configuration", kind)
		}
	}
}
