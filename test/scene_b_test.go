package test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/IBM/go-sdk-core/v5/core"

	"tabard.dev/tabard/test/harness"
)

const grantCRToken = "urn:ibm:params:oauth:grant-type:cr-token"

// sceneB is an account with a cluster, two resources, and a profile that may
// see one of them and is linked to shop/web.
type sceneB struct {
	*harness.Server
	issuer     *harness.Issuer
	clusterCRN string
}

func newSceneB(t *testing.T) *sceneB {
	t.Helper()
	return newSceneBIn(t, t.TempDir())
}

func newSceneBIn(t *testing.T, dir string, args ...string) *sceneB {
	t.Helper()
	return furnishSceneB(t, harness.StartIn(t, dir, append([]string{"--driver", "none"}, args...)...))
}

func furnishSceneB(t *testing.T, s *harness.Server) *sceneB {
	t.Helper()
	b := &sceneB{Server: s, issuer: harness.NewIssuer(t)}
	b.Login()
	b.CLI("ks", "cluster-register", "my-cluster", "--issuer", b.issuer.URL, "--ca-file", b.issuer.CAFile)
	var cluster struct{ CRN string }
	b.JSON(&cluster, "ks", "cluster-get", "my-cluster")
	b.clusterCRN = cluster.CRN
	b.CLI("resource", "service-instance-create", "store", "cloud-object-storage", "standard", "us-south")
	b.CLI("resource", "service-instance-create", "keys", "kms", "tiered-pricing", "us-south")
	b.CLI("iam", "trusted-profile-create", "pod")
	b.CLI("iam", "trusted-profile-policy-create", "pod", "--roles", "Viewer", "--service-name", "cloud-object-storage")
	b.CLI("iam", "trusted-profile-link-create", "pod", "--name", "web", "--cr-type", "IKS_SA",
		"--link-crn", cluster.CRN, "--link-namespace", "shop", "--link-name", "web")
	return b
}

func (b *sceneB) exchange(token, profile string, more ...string) harness.Answer {
	b.T.Helper()
	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {token}, "profile_name": {profile}}
	for i := 0; i+1 < len(more); i += 2 {
		form.Set(more[i], more[i+1])
	}
	return b.Do("POST", "/identity/token", "", form)
}

// allEvents pages through the log.
func (b *sceneB) allEvents(action string) []harness.Event {
	b.T.Helper()
	var all []harness.Event
	token, start := b.OwnerToken(), ""
	for {
		a := b.Do("GET", "/v1/events?limit=1000&action="+action+"&start="+url.QueryEscape(start), token, nil)
		var page struct {
			Events []harness.Event
			Next   struct{ Start string }
		}
		if err := json.Unmarshal(a.Body, &page); a.Status != http.StatusOK || err != nil {
			b.T.Fatalf("%d %s", a.Status, a.Body)
		}
		all = append(all, page.Events...)
		if start = page.Next.Start; start == "" {
			return all
		}
	}
}

func (b *sceneB) resources(token string) []string {
	b.T.Helper()
	a := b.Do("GET", "/v2/resource_instances", token, nil)
	if a.Status != http.StatusOK {
		b.T.Fatalf("%d %s", a.Status, a.Body)
	}
	var list struct{ Resources []struct{ Name string } }
	if err := json.Unmarshal(a.Body, &list); err != nil {
		b.T.Fatal(err)
	}
	names := []string{}
	for _, r := range list.Resources {
		names = append(names, r.Name)
	}
	return names
}

func TestAPodGetsAnAuditedTokenWithoutAKey(t *testing.T) {
	b := newSceneB(t)

	t.Run("by its link, with the published SDK", func(t *testing.T) {
		file := tokenFile(t, b.issuer.Token("shop", "web"))
		authenticator, err := core.NewContainerAuthenticatorBuilder().SetIAMProfileName("pod").SetCRTokenFilename(file).SetURL(b.URL).Build()
		if err != nil {
			t.Fatal(err)
		}
		token, err := authenticator.GetToken()
		if err != nil {
			t.Fatal(err)
		}
		if names := b.resources(token); len(names) != 1 || names[0] != "store" {
			t.Fatalf("the profile sees %v", names)
		}
		events := b.Events("--action", "iam-identity.computeresource-token.login", "--outcome", "success")
		if len(events) != 1 {
			t.Fatalf("%d login events", len(events))
		}
		if e := events[0]; e.Initiator.Name != "pod" || e.Initiator.AuthnID != "crn-"+b.clusterCRN {
			t.Fatalf("initiator %+v", e.Initiator)
		}
	})
	t.Run("by a claim rule", func(t *testing.T) {
		b.CLI("iam", "trusted-profile-create", "ruled")
		b.CLI("iam", "trusted-profile-rule-create", "ruled", "--name", "jobs", "--type", "Profile-CR", "--cr-type", "IKS_SA",
			"--conditions", `claim:namespace,operator:EQUALS,value:batch`, "--conditions", "claim:crn,operator:EQUALS,value:"+b.clusterCRN)
		if a := b.exchange(b.issuer.Token("batch", "anything"), "ruled"); a.Status != http.StatusOK {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		if a := b.exchange(b.issuer.Token("shop", "web"), "ruled"); a.Status != http.StatusBadRequest {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
	})
	t.Run("by the profile's id and CRN", func(t *testing.T) {
		var p struct{ ID, CRN string }
		b.JSON(&p, "iam", "trusted-profile", "pod")
		for _, selector := range [][2]string{{"profile_id", p.ID}, {"profile_id", "iam-" + p.ID}, {"profile_crn", p.CRN}} {
			a := b.Do("POST", "/identity/token", "", url.Values{
				"grant_type": {grantCRToken}, "cr_token": {b.issuer.Token("shop", "web") + "\n"}, selector[0]: {selector[1]},
			})
			if a.Status != http.StatusOK {
				t.Errorf("%v: %d %s", selector, a.Status, a.Body)
			}
		}
	})
	t.Run("and the keys of a rotated cluster are noticed", func(t *testing.T) {
		time.Sleep(11 * time.Second) // unknown key ids cause a fetch at most every 10 s
		b.issuer.Rotate()
		if a := b.exchange(b.issuer.Token("shop", "web"), "pod"); a.Status != http.StatusOK {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
	})
}

func tokenFile(t *testing.T, token string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "sa-token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestDenialsAreToldApart(t *testing.T) {
	b := newSceneB(t)
	b.CLI("iam", "trusted-profile-create", "powerless")
	b.CLI("iam", "trusted-profile-link-create", "powerless", "--name", "web", "--cr-type", "IKS_SA",
		"--link-crn", b.clusterCRN, "--link-namespace", "shop", "--link-name", "web")
	spoilt := func(f func(map[string]any)) string {
		c := b.issuer.Claims("shop", "web")
		f(c)
		return b.issuer.Sign(c)
	}
	good := b.issuer.Token("shop", "web")
	stranger := harness.NewIssuer(t)

	seen := map[string]string{}
	for _, d := range []struct {
		name, token, profile string
		code, check          string
	}{
		{"malformed token", "not-a-token", "pod", "BXNIM0401E", "token-form"},
		{"bad signature", good[:len(good)-20] + strings.Repeat("A", 20), "pod", "BXNIM0405E", "token-signature"},
		{"unknown issuer", stranger.Token("shop", "web"), "pod", "BXNIM0405E", "token-issuer"},
		{"wrong audience", spoilt(func(c map[string]any) { c["aud"] = []string{"https://kubernetes.default.svc"} }), "pod", "BXNIM0405E", "token-audience"},
		{"expired", spoilt(func(c map[string]any) {
			c["iat"], c["nbf"], c["exp"] = time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
		}), "pod", "BXNIM0407E", "token-time"},
		{"unknown profile", good, "nobody", "BXNIM0102E", "profile"},
		{"no link or rule matches", b.issuer.Token("billing", "web"), "pod", "BXNIM0398E", "profile-link"},
	} {
		t.Run(d.name, func(t *testing.T) {
			id := "txn-" + strings.ReplaceAll(d.name, " ", "-")
			a := b.Do("POST", "/identity/token", "", url.Values{
				"grant_type": {grantCRToken}, "cr_token": {d.token}, "profile_name": {d.profile},
			}, "Transaction-Id", id)
			if a.Status != http.StatusBadRequest || a.Field("errorCode") != d.code {
				t.Fatalf("%d %s", a.Status, a.Body)
			}
			if a.Field("context", "requestId") != id || a.Header.Get("Transaction-Id") != id {
				t.Errorf("the transaction id is not the caller's: %s", a.Body)
			}
			message := a.Field("errorCode") + a.Field("errorMessage")
			if other, dup := seen[message]; dup {
				t.Errorf("same error as %s: %s", other, message)
			}
			seen[message] = d.name

			out := b.CLI("activity", "explain", id)
			if !strings.Contains(out, d.check) {
				t.Errorf("the explanation does not name %s:\n%s", d.check, out)
			}
			var x struct {
				Events []harness.Event
			}
			b.JSON(&x, "activity", "explain", id)
			failed := ""
			for _, e := range x.Events {
				for _, c := range e.Trace {
					if c.Outcome == "fail" && failed == "" {
						failed = c.Check
					}
				}
			}
			if failed != d.check {
				t.Errorf("the first failed check is %q, want %q", failed, d.check)
			}
			if strings.Contains(out, good) || strings.Contains(b.Log(), good) {
				t.Error("a token stands in the explanation or the log")
			}
		})
	}
	t.Run("profile assumed but no policy allows the action", func(t *testing.T) {
		a := b.exchange(good, "powerless")
		if a.Status != http.StatusOK {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		token := a.Field("access_token")
		if names := b.resources(token); len(names) != 0 {
			t.Fatalf("sees %v", names)
		}
		a = b.Do("GET", "/v1/events", token, nil, "Transaction-Id", "txn-powerless")
		if a.Status != http.StatusForbidden {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		if out := b.CLI("activity", "explain", "txn-powerless"); !strings.Contains(out, "policy-subject") {
			t.Errorf("the explanation does not name policy-subject:\n%s", out)
		}
	})
	t.Run("every refusal is in the log", func(t *testing.T) {
		if n := len(b.Events("--action", "iam-identity.computeresource-token.login", "--outcome", "failure")); n != 7 {
			t.Errorf("%d failed logins in the log, want 7", n)
		}
	})
}

func TestRevocationIsPrompt(t *testing.T) {
	b := newSceneB(t)
	good := b.issuer.Token("shop", "web")
	a := b.exchange(good, "pod")
	if a.Status != http.StatusOK {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	token := a.Field("access_token")
	var policies []struct{ ID string }
	b.JSON(&policies, "iam", "trusted-profile-policies", "pod")
	b.CLI("iam", "trusted-profile-policy-delete", "pod", policies[0].ID, "-f")
	if names := b.resources(token); len(names) != 0 {
		t.Errorf("after the policy was deleted, the token still sees %v", names)
	}
	var links []struct{ ID string }
	b.JSON(&links, "iam", "trusted-profile-links", "pod")
	b.CLI("iam", "trusted-profile-link-delete", "pod", links[0].ID, "-f")
	if a := b.exchange(good, "pod"); a.Field("errorCode") != "BXNIM0398E" {
		t.Errorf("after the link was deleted: %d %s", a.Status, a.Body)
	}
	b.CLI("iam", "trusted-profile-delete", "pod", "-f")
	if a := b.Do("GET", "/v2/resource_instances", token, nil); a.Status != http.StatusUnauthorized {
		t.Errorf("after the profile was deleted: %d %s", a.Status, a.Body)
	}
	b.CLI("ks", "cluster-delete", "my-cluster", "-f")
	if a := b.exchange(good, "pod"); a.Field("errorCode") != "BXNIM0405E" {
		t.Errorf("after the cluster was deleted: %d %s", a.Status, a.Body)
	}
}

// The sample app runs as it would in a pod: the published authenticator, a
// token file, and nothing else.
func TestTheSampleAppTeaches(t *testing.T) {
	bin := os.Getenv("LISTER_BIN")
	if bin == "" {
		bin = filepath.Join(t.TempDir(), "resource-lister")
		cmd := exec.Command("go", "build", "-o", bin, ".")
		cmd.Dir = filepath.Join(harness.Root(), "examples", "resource-lister")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	b := newSceneB(t)
	once := func(file, profile string) string {
		cmd := exec.Command(bin, "--once", "--profile", profile)
		cmd.Env = append(os.Environ(), "IAM_URL="+b.URL, "TOKEN_FILE="+file)
		out, _ := cmd.Output() // status 1 for a refusal; the output says it
		return string(out)
	}
	web := b.issuer.Token("shop", "web")
	out := once(tokenFile(t, web), "pod")
	if !strings.Contains(out, `"store"`) || strings.Contains(out, `"keys"`) {
		t.Errorf("the linked pod does not see exactly its resources: %s", out)
	}
	if signature := web[strings.LastIndex(web, ".")+1:]; strings.Contains(out, signature) {
		t.Error("the token's signature is shown")
	}
	if out := once(tokenFile(t, web), "nobody"); !strings.Contains(out, "BXNIM0102E") {
		t.Errorf("unknown profile: %s", out)
	}
	if out := once(tokenFile(t, b.issuer.Token("billing", "web")), "pod"); !strings.Contains(out, "BXNIM0398E") {
		t.Errorf("no link: %s", out)
	}
	if out := once(filepath.Join(t.TempDir(), "absent"), "pod"); !strings.Contains(out, "read-token") {
		t.Errorf("no token file: %s", out)
	}
}
