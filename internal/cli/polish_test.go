package cli

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func TestTheVersionIsTheOneSetAtLinkTime(t *testing.T) {
	newServer(t)
	built := Version
	t.Cleanup(func() { Version = built })
	Version = "v1.2.3"
	for _, arg := range []string{"version", "--version"} {
		if got := run(t, arg).want(0).stdout; got != "tabard v1.2.3\n" {
			t.Errorf("%s prints %q", arg, got)
		}
	}
	run(t, "version", "-o", "json").want(0, `"version": "v1.2.3"`)
	Version = ""
	if got := strings.TrimSpace(run(t, "version").want(0).stdout); got == "tabard" {
		t.Error("without a version set, none is printed")
	}
}

func TestMissingArgumentsAreNamed(t *testing.T) {
	newServer(t)
	for _, c := range []struct{ args, says string }{
		{"is instance-create vm vpc", "missing ZONE_NAME, PROFILE_NAME, SUBNET\nUsage: tabard is instance-create INSTANCE_NAME VPC"},
		{"iam trusted-profile-policy p", "missing POLICY_ID\n"},
		{"iam trusted-profile", "missing NAME|ID\n"},
		{"is instance-exec", "missing INSTANCE, COMMAND\n"},
		{"ks cluster-register", "missing NAME\n"},
		{"iam access-group-user-add", "missing GROUP_NAME|GROUP_ID, EMAIL|IAM_ID\n"},
		{"is vpc-delete", "missing VPC\n"},
		{"is vpcs extra", `unexpected argument "extra"`},
		{"iam service-api-keys a b", `unexpected argument "b"`},
	} {
		run(t, strings.Fields(c.args)...).want(2, c.says)
	}
	for use, want := range map[string][]string{
		"x": {}, "x A [B] (C|D)...": {"A", "C|D"}, "x A (--b B [--c C] | --d D)": {"A"}, "x A -- B [C...]": {"A", "B"},
	} {
		if diff := cmp.Diff(want, operands(use)); diff != "" {
			t.Errorf("%s: %s", use, diff)
		}
	}
	// Nothing is near to nothing.
	if r := run(t, "").want(2, `unknown command ""`); strings.Contains(r.stderr, "did you mean") {
		t.Errorf("an empty word suggests commands: %s", r.stderr)
	}
}

func TestAnUnknownNameSuggestsTheNearOnes(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/profiles", func(r seen) any {
		if r.Query.Get("name") != "" {
			return list("profiles")
		}
		return list("profiles", item("id", profileID, "name", "shop"), item("id", "Profile-"+uuidB, "name", "warehouse"))
	})
	for ref, near := range map[string]string{"shpo": "; did you mean shop?", "Shop": "; did you mean shop?", "ware": "; did you mean warehouse?", "absent": ".\n"} {
		r := run(t, "iam", "trusted-profile", ref).want(1, `no trusted profile has the name or ID "`+ref+`"`+near,
			"List the trusted profiles with: tabard iam trusted-profiles\n")
		lookUp := s.requests()[0].Header.Get("Transaction-Id")
		if !strings.Contains(r.stderr, "Transaction ID: "+lookUp+"\n") {
			t.Errorf("the look-up's transaction %s is not told: %s", lookUp, r.stderr)
		}
	}
}

func TestADamagedSessionIsReplacedByALogin(t *testing.T) {
	s := newServer(t)
	writeFile(t, filepath.Join(os.Getenv("TABARD_HOME"), "config.json"), `{"url": "http`)
	run(t, "target").want(1, "damaged", "tabard login")
	run(t, "login", "-a", s.URL, "--apikey", secretKey).want(0)
	run(t, "target").want(0, s.URL)
}

func TestAServerThatIsNotThereIsToldInOneLine(t *testing.T) {
	s := newServer(t)
	s.login()
	s.Close()
	run(t, "iam", "trusted-profiles").want(1, "FAILED\ncannot reach the server at "+s.URL+": connection refused; is it running? (tabard server)\n")
}

func TestAnInterruptedCommandSaysOnlyThat(t *testing.T) {
	s := newServer(t)
	s.login()
	ctx, stop := context.WithCancelCause(t.Context())
	s.answer("GET /v1/profiles", func(seen) any {
		stop(errors.New("a signal"))
		return list("profiles")
	})
	var out, errs strings.Builder
	if code := Execute(ctx, []string{"iam", "trusted-profiles"}, strings.NewReader(""), &out, &errs); code != 1 || errs.String() != "interrupted\n" {
		t.Errorf("ended with %d and %q", code, errs.String())
	}
}

func TestAnErrorOfSeveralLinesKeepsThem(t *testing.T) {
	newServer(t)
	extra := &cobra.Command{Use: "extra", RunE: func(*cobra.Command, []string) error {
		return errors.New("url \"foo\":\n[1:2] bad\n>\tx\x1b[2J\n")
	}}
	var out, errs strings.Builder
	if code := Execute(t.Context(), []string{"extra"}, strings.NewReader(""), &out, &errs, extra); code != 1 {
		t.Errorf("ended with %d", code)
	}
	if want := "FAILED\nurl \"foo\":\n  [1:2] bad\n  >    x\uFFFD[2J\n"; errs.String() != want {
		t.Errorf("stderr is %q, want %q", errs.String(), want)
	}
}

func TestTimesHaveOneForm(t *testing.T) {
	const want = "2026-11-22 04:16:12 UTC"
	for _, in := range []string{"2026-11-22T04:16:12Z", "2026-11-22T04:16:12.123456Z", "2026-11-22T05:16:12+01:00", "2026-11-22T04:16:12.12+0000"} {
		if got := clock(in); got != want {
			t.Errorf("clock(%q) = %q", in, got)
		}
	}
	if got := clock("2026-11-22T04:16+0000"); got != "2026-11-22 04:16:00 UTC" {
		t.Errorf("a time to the minute is %q", got)
	}
	if got := clock("yesterday"); got != "yesterday" {
		t.Errorf("other text becomes %q", got)
	}
	s := newServer(t)
	s.login()
	s.answer("GET /v1/profiles", list("profiles", item("name", "2026-11-22T04:16:12Z", "id", profileID, "created_at", "2026-11-22T04:16+0000")))
	run(t, "iam", "trusted-profiles").want(0, "2026-11-22 04:16:00 UTC", "2026-11-22T04:16:12Z")
	run(t, "iam", "trusted-profiles", "-o", "json").want(0, `"2026-11-22T04:16+0000"`)
}

func TestSinceIsCheckedBeforeItIsSent(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("GET /v1/events", list("events"))
	for in, want := range map[string]string{
		"2026-11-22": "2026-11-22T00:00:00Z", "2026-11-22 04:16:12 UTC": "2026-11-22T04:16:12Z",
		"2026-11-22T04:16:12+01:00": "2026-11-22T04:16:12+01:00", "7d": "7d", "1h": "1h", "90s": "90s",
	} {
		run(t, "activity", "events", "--since", in).want(0)
		if got := s.sent("GET /v1/events").Query.Get("since"); got != want {
			t.Errorf("--since %s is sent as %q, want %q", in, got, want)
		}
	}
	for _, in := range []string{"foo", "-1h", "d", "1", "2026-13-01", "-7d"} {
		run(t, "activity", "events", "--since="+in).want(2, "2026-07-01", "90s, 1h or 7d")
	}
	if sent := s.requests(); len(sent) != 0 {
		t.Errorf("wrong usage sent requests: %v", sent)
	}
}

func TestWhatIsNotRecordedIsSaid(t *testing.T) {
	s := newServer(t)
	s.login()
	run(t, "activity", "explain", "absent").want(1, "Status: 404", "Only tokens, refusals and changes are recorded; reads that were allowed are not.")
}

func TestARuleThatCannotMatchIsWarnedOf(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("POST /v1/profiles/"+profileID+"/rules", reply{status: 201, body: item("id", "ClaimRule-"+uuidA, "name", "r")})
	create := func(crType, claim string) string {
		return run(t, "iam", "trusted-profile-rule-create", profileID, "--type", "Profile-CR", "--cr-type", crType,
			"--conditions", "claim:"+claim+",operator:EQUALS,value:x").want(0).stderr
	}
	if got := create("IKS_SA", "namespac"); !strings.HasPrefix(got, `Warning: claim "namespac" is not one of crn, service_instance,`) || !strings.HasSuffix(got, "; it will never match\n") {
		t.Errorf("the warning is %q", got)
	}
	for crType, claim := range map[string]string{"IKS_SA": "node", "ROKS_SA": "pod_uid", "OIDC": "whatever_is_mapped", "VSI": "vpc_id", "PVS": "iaas.zone", "CE": "component_name"} {
		if got := create(crType, claim); got != "" {
			t.Errorf("%s with %s: %q", crType, claim, got)
		}
	}
	if got := create("VSI", "namespace"); !strings.Contains(got, "never match") {
		t.Errorf("no warning of a pod's claim for a virtual server: %q", got)
	}
}

func TestARuleAboutNoClusterGroupIsWarnedOf(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("POST /v1/profiles/"+profileID+"/rules", reply{status: 201, body: item("id", "ClaimRule-"+uuidA, "name", "r")})
	create := func(operator, value string) string {
		return run(t, "iam", "trusted-profile-rule-create", profileID, "--type", "Profile-CR", "--cr-type", "IKS_SA",
			"--conditions", "claim:cluster_group,operator:"+operator+",value:"+value).want(0).stderr
	}
	if got := create("EQUALS", "prod"); got != "" {
		t.Errorf("groups that may not be seen are warned of: %q", got)
	}
	s.answer("GET /v1/cluster_groups", list("cluster_groups", item("id", "ClusterGroup-"+uuidA, "name", "prod")))
	for _, c := range [][2]string{{"EQUALS", "prod"}, {"CONTAINS", "prod"}, {"EQUALS_IGNORE_CASE", "PROD"}, {"IN", `["prod"]`}, {"NOT_EQUALS", "none"}} {
		if got := create(c[0], c[1]); got != "" {
			t.Errorf("%s %s: %q", c[0], c[1], got)
		}
	}
	for _, c := range [][2]string{{"EQUALS", "prot"}, {"EQUALS", "PROD"}, {"EQUALS_IGNORE_CASE", "prot"}, {"IN", `["prod","prot"]`}} {
		if got := create(c[0], c[1]); !strings.HasPrefix(got, "Warning: there is no cluster group ") || strings.Count(got, "\n") != 1 {
			t.Errorf("%s %s: %q", c[0], c[1], got)
		}
	}
}

func TestALinkToNoClusterIsWarnedOf(t *testing.T) {
	s := newServer(t)
	s.login()
	s.answer("POST /v1/profiles/"+profileID+"/links", reply{status: 201, body: item("id", "Link-"+uuidA, "name", "l")})
	create := func(crType, crn string) string {
		return run(t, "iam", "trusted-profile-link-create", profileID, "--cr-type", crType, "--link-crn", crn,
			"--link-namespace", "default", "--link-name", "app").want(0).stderr
	}
	if got := create("IKS_SA", "crn:known"); got != "" {
		t.Errorf("clusters that may not be seen are warned of: %q", got)
	}
	s.answer("GET /v1/clusters", list("clusters", item("id", "c", "name", "prod", "crn", "crn:known", "type", "IKS_SA")))
	if got := create("IKS_SA", "crn:known"); got != "" {
		t.Errorf("a good link is warned of: %q", got)
	}
	if got := create("IKS_SA", "crn:other"); !strings.Contains(got, `no registered cluster has the CRN "crn:other"`) {
		t.Errorf("the warning is %q", got)
	}
	if got := create("ROKS_SA", "crn:known"); !strings.Contains(got, "prod is of type IKS_SA, not ROKS_SA") {
		t.Errorf("the warning is %q", got)
	}
}

func TestAnUnknownRegionIsNotTargeted(t *testing.T) {
	s := newServer(t)
	s.login()
	run(t, "target", "-r", "mars").want(2, `there is no region "mars"`, "us-south")
	run(t, "target").want(0, "us-south")
	if r := run(t, "login", "-a", s.URL, "--apikey", secretKey, "-r", "mars").want(0); !strings.Contains(r.stderr, `Warning: there is no region "mars"`) {
		t.Errorf("login does not warn: %q", r.stderr)
	}
	s.answer("GET /v1/regions", reply{status: 403, body: item()})
	run(t, "target", "-r", "eu-de").want(0, "eu-de")
}

func TestAnUnknownKeyOfAnInterfaceIsRefused(t *testing.T) {
	s := sceneA(t)
	s.login()
	run(t, "is", "instance-create", "vm", vpcID, "us-south-3", "bx2-2x8", "my-subnet", "--primary-network-interface",
		`{"name":"eth0","subnett":{"name":"my-subnet"}}`).want(2, `unknown key "subnett"`, "security_groups")
	for _, r := range s.requests() {
		if r.Method == http.MethodPost {
			t.Error("the instance was created")
		}
	}
}

func TestAnActionWaitsForItsEnd(t *testing.T) {
	s := sceneA(t)
	s.login()
	vm := "/v1/instances/" + vmID
	for action, c := range map[string]struct{ first, end string }{
		"stop": {"stopping", "stopped"}, "start": {"starting", "running"}, "reboot": {"restarting", "running"},
	} {
		statuses := []string{c.first, c.end}
		s.answer("POST "+vm+"/actions", reply{status: 201, body: item("id", "a", "type", action, "status", "pending")})
		s.answer("GET "+vm, func(seen) any {
			status := statuses[0]
			statuses = statuses[1:]
			return item("id", vmID, "status", status)
		})
		r := run(t, "is", "instance-"+action, "my-instance").want(0, "The instance my-instance is "+c.end+".")
		if want := "Instance my-instance is " + c.first + "; waiting up to 1m0s for it to be " + c.end + ".\n"; r.stderr != want {
			t.Errorf("%s says %q, want %q", action, r.stderr, want)
		}

		s.requests()
		run(t, "is", "instance-"+action, "my-instance", "--no-wait").want(0)
		for _, r := range s.requests() {
			if r.Method == http.MethodGet && r.Path == vm {
				t.Errorf("%s --no-wait waits", action)
			}
			if r.Method == http.MethodPost && strings.Contains(r.Body, "force") != (action != "start") {
				t.Errorf("%s --no-wait sends %s", action, r.Body)
			}
		}
	}
	// Who may act need not be allowed to see.
	s.answer("GET "+vm, reply{status: 403, body: item()})
	if r := run(t, "is", "instance-start", "my-instance").want(0); !strings.Contains(r.stderr, "may not see") {
		t.Errorf("stderr is %q", r.stderr)
	}
}

func TestACommandWaitsOutAStop(t *testing.T) {
	s := sceneA(t)
	s.login()
	statuses := []string{"stopping", "stopped"}
	s.answer("GET /v1/instances/"+vmID, func(seen) any {
		status := statuses[0]
		statuses = statuses[1:]
		return item("id", vmID, "status", status)
	})
	run(t, "is", "instance-exec", "my-instance", "--", "true").
		want(1, "Instance my-instance is stopping; waiting up to 1m0s", "start it with tabard is instance-start my-instance")
}

func TestNounsHaveTheirArticles(t *testing.T) {
	for noun, want := range map[string]string{"access group": "an access group", "API key": "an API key", "VPC": "a VPC", "user": "a user", "instance": "an instance"} {
		if got := an(noun); got != want {
			t.Errorf("an(%q) = %q", noun, got)
		}
	}
	each(New(), func(c *cobra.Command) {
		for _, wrong := range []string{" a access", " a API", " a instance", " a identity"} {
			if strings.Contains(c.Short+c.Long, wrong) {
				t.Errorf("%s: %q", c.CommandPath(), c.Long)
			}
		}
	})
}

func TestAMetadataServiceThatIsNotThereIsNotTakenForTheServer(t *testing.T) {
	s := newServer(t)
	t.Setenv("TABARD_METADATA_URL", s.URL)
	s.Close()
	run(t, "login", "--vpc-cri").want(1, "ask the metadata service for the instance's identity: cannot reach the metadata service at "+s.URL)
}
