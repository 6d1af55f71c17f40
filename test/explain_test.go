package test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// explained is a check as an explanation and a simulation tell it.
type explained struct {
	Check, Outcome string
	Nearest        *struct{ ID string }
	Change         *struct{ Command string }
}

func commandOf(t *testing.T, trace []explained, check string) string {
	t.Helper()
	for _, c := range trace {
		if c.Check == check && c.Outcome == "fail" && c.Change != nil {
			return c.Change.Command
		}
	}
	t.Fatalf("no failed %s with a command in %+v", check, trace)
	return ""
}

// The command that an explanation prints is pasted into a shell, and the same
// request passes. The names in it are an attacker's: he chose them for that
// shell.
func TestTheCommandOfAnExplanationLetsTheSameRequestPass(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	sh := harness.StartShell(t, s, nil, nil)
	issuer := harness.NewIssuer(t)
	s.CLI("ks", "cluster-register", "prod", "--issuer", issuer.URL, "--ca-file", issuer.CAFile)
	s.CLI("iam", "trusted-profile-create", "reports")
	s.CLI("iam", "trusted-profile-rule-create", "reports", "--name", "shop's", "--type", "Profile-CR", "--cr-type", "IKS_SA",
		"--conditions", "claim:namespace,operator:IN,value:[\"dev\",\"it's\"]", "--conditions", "claim:name,operator:CONTAINS,value:ca")

	namespace, account := `$(touch${IFS}pwned)`, "ca'`touch$IFS'pwned'`;rt"
	ask := func() harness.Answer {
		return s.Do(http.MethodPost, "/identity/token", "", url.Values{
			"grant_type": {"urn:ibm:params:oauth:grant-type:cr-token"}, "cr_token": {issuer.Token(namespace, account)}, "profile_name": {"reports"},
		})
	}
	for _, check := range []string{"profile-rule", "profile-link"} {
		refused := ask()
		if refused.Status != http.StatusBadRequest {
			t.Fatalf("%d %s", refused.Status, refused.Body)
		}
		var e struct{ Events []struct{ Trace []explained } }
		s.JSON(&e, "activity", "explain", refused.Header.Get("Transaction-Id"))
		command := commandOf(t, e.Events[0].Trace, check)
		if out := s.CLI("activity", "explain", refused.Header.Get("Transaction-Id")); !strings.Contains(out, "command "+command+"\n") {
			t.Errorf("the explanation does not print %s:\n%s", command, out)
		}
		sh.Run(command)
		if a := ask(); a.Status != http.StatusOK {
			t.Fatalf("after %s: %d %s", command, a.Status, a.Body)
		}
		if found, err := filepath.Glob(filepath.Join(s.Dir, "..", "*", "pwned")); err != nil || len(found) > 0 {
			t.Errorf("the command did something else: %v, %v", found, err)
		}
		sh.Run("test ! -e pwned")
		if check == "profile-rule" {
			s.CLI("iam", "trusted-profile-rule-delete", "reports", "shop's", "-f")
		}
	}

	// The same for a decision, and by the question instead of the deed.
	question := []string{"iam", "simulate", "access", "reports", "is.instance.instance.list", "--service", "is", "--attribute", "region=us-south"}
	var a struct{ Trace []explained }
	r := s.Run(append(question, "-o", "json")...)
	if r.Code != 1 {
		t.Fatalf("%d %s %s", r.Code, r.Out, r.Err)
	}
	if err := json.Unmarshal([]byte(r.Out), &a); err != nil {
		t.Fatal(err)
	}
	sh.Run(commandOf(t, a.Trace, "policy-subject"))
	s.CLI(question...)

	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(issuer.Token(namespace, account)), 0o600); err != nil {
		t.Fatal(err)
	}
	before := len(s.Events("--limit", "0"))
	if out := s.CLI("iam", "simulate", "token", "reports", "--cr-token", "@"+file); !strings.Contains(out, "ALLOWED: a token for 3600 s") {
		t.Errorf("%s", out)
	}
	if r := s.Run("iam", "simulate", "token", "reports", "--cluster", "prod", "--namespace", "other", "--service-account", "cart"); r.Code != 1 || !strings.Contains(r.Out, "REFUSED: 400 BXNIM0398E") {
		t.Errorf("%d %s %s", r.Code, r.Out, r.Err)
	}
	if after := len(s.Events("--limit", "0")); after != before {
		t.Errorf("%d events became %d: a question is no deed", before, after)
	}
}
