package test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"tabard.dev/tabard/test/harness"
)

// drivers are those that this machine can run.
func drivers(t *testing.T) []string {
	t.Helper()
	if runtime.GOOS == "linux" && os.Geteuid() == 0 {
		return []string{"netns", "local"}
	}
	t.Log("not root on Linux: network namespaces are left out")
	return []string{"local"}
}

func needRoot(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("network namespaces need root on Linux")
	}
}

// prepareSceneA types the commands of the 2022 article, as they stand there.
func prepareSceneA(t *testing.T, s *harness.Server) {
	t.Helper()
	keyFile := writeSSHKey(t)
	s.Login()
	s.CLI("iam", "trusted-profile-create", "my-trusted-profile", "--description", "My trusted profile")
	s.CLI("iam", "trusted-profile-policy-create", "my-trusted-profile", "--roles", "Operator", "--service-name", "is")
	s.CLI("is", "vpc-create", "my-vpc")
	s.CLI("is", "subnet-create", "my-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "256")
	s.CLI("is", "key-create", "my-key", "@"+keyFile)
	createInstance(s, "my-instance")
	s.CLI("is", "floating-ip-reserve", "my-fip1", "--zone", "us-south-3")
	s.CLI("is", "instance-network-interface-floating-ip-add", "my-instance", "primary-nic", "my-fip1")
}

func createInstance(s *harness.Server, name string) {
	s.T.Helper()
	var images []struct{ Name string }
	s.JSON(&images, "is", "images")
	if len(images) == 0 {
		s.T.Fatal("there is no stock image")
	}
	s.CLI("is", "instance-create", name, "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", images[0].Name,
		"--primary-network-interface", `{"name":"primary-nic","subnet":{"name":"my-subnet"}}`, "--keys", "my-key",
		"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile")
}

func writeSSHKey(t *testing.T) string {
	t.Helper()
	public, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "id_ed25519.pub")
	if err := os.WriteFile(file, ssh.MarshalAuthorizedKey(key), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// inside runs curl in an instance and returns what it printed.
func inside(s *harness.Server, instance string, args ...string) string {
	s.T.Helper()
	return s.CLI(append([]string{"is", "instance-exec", instance, "--", "curl", "-sS", "--max-time", "20"}, args...)...)
}

// field returns a text of a JSON object.
func field(t *testing.T, body, name string) string {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(body), &m); err != nil {
		t.Fatalf("not a JSON object: %s", body)
	}
	s, _ := m[name].(string)
	return s
}

func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("not a JWT: %q", token)
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

const metadataAddress = "http://169.254.169.254"

// identityToken and iamToken are the first two curl calls of the article.
func identityToken(s *harness.Server, instance string) string {
	s.T.Helper()
	out := inside(s, instance, "-X", "PUT", metadataAddress+"/instance_identity/v1/token?version=2022-03-31",
		"-H", "Metadata-Flavor: ibm", "-d", `{"expires_in": 600}`)
	token := field(s.T.(*testing.T), out, "access_token")
	if token == "" {
		s.T.Fatalf("no identity token: %s", out)
	}
	return token
}

func iamToken(s *harness.Server, instance, identity string) string {
	s.T.Helper()
	out := inside(s, instance, "-X", "POST", metadataAddress+"/instance_identity/v1/iam_token?version=2022-03-31",
		"-H", "Authorization: Bearer "+identity)
	token := field(s.T.(*testing.T), out, "access_token")
	if token == "" {
		s.T.Fatalf("no IAM token: %s", out)
	}
	return token
}

func TestAVirtualServerGetsAnAuditedTokenWithoutAKey(t *testing.T) {
	for _, driver := range drivers(t) {
		t.Run(driver, func(t *testing.T) {
			s := harness.Start(t, "--driver", driver)
			prepareSceneA(t, s)

			identity := identityToken(s, "my-instance")
			token := iamToken(s, "my-instance", identity)

			list := inside(s, "my-instance", s.URL+"/v1/instances?version=2022-03-31&generation=2", "-H", "Authorization: Bearer "+token)
			var instances struct {
				Instances []struct{ Name, CRN, ID string }
			}
			if err := json.Unmarshal([]byte(list), &instances); err != nil || len(instances.Instances) != 1 || instances.Instances[0].Name != "my-instance" {
				t.Fatalf("the list from inside is not the one instance: %s", list)
			}
			instance := instances.Instances[0]

			t.Run("Operator may not create", func(t *testing.T) {
				a := s.Do("POST", "/v1/instances?version=2022-03-31&generation=2", token, `{"zone":{"name":"us-south-3"}}`)
				if a.Status != 403 || a.Field("errors", "0", "code") != "not_authorized" {
					t.Fatalf("%d %s", a.Status, a.Body)
				}
			})
			t.Run("the newer paths work as well", func(t *testing.T) {
				for _, version := range []string{"2022-03-01", "2025-08-26"} {
					out := inside(s, "my-instance", "-X", "PUT", metadataAddress+"/identity/v1/token?version="+version, "-H", "Metadata-Flavor: ibm", "-d", "{}")
					id := field(t, out, "access_token")
					out = inside(s, "my-instance", "-X", "POST", metadataAddress+"/identity/v1/iam_tokens?version="+version, "-H", "Authorization: Bearer "+id)
					if field(t, out, "access_token") == "" {
						t.Fatalf("version %s: %s", version, out)
					}
				}
				out := inside(s, "my-instance", "-X", "PUT", metadataAddress+"/instance_identity/v1/token?version=2025-08-26", "-H", "Metadata-Flavor: ibm", "-w", " %{http_code}")
				if !strings.HasSuffix(out, " 404") {
					t.Fatalf("the old path at a new version: %s", out)
				}
			})
			t.Run("metadata of the instance itself", func(t *testing.T) {
				out := inside(s, "my-instance", metadataAddress+"/metadata/v1/instance?version=2022-03-31", "-H", "Authorization: Bearer "+identity)
				if field(t, out, "crn") != instance.CRN || field(t, out, "name") != "my-instance" {
					t.Fatalf("%s", out)
				}
			})
			t.Run("both retrievals stand in the log with the instance's CRN", func(t *testing.T) {
				want := map[string]int{"is.metadata.jwt-token.create": 3, "is.metadata.computeresource-token.request": 3, "iam-identity.computeresource-token.login": 3}
				profile := claimsOf(t, token)["iam_id"]
				for action, n := range want {
					events := s.Events("--action", action, "--outcome", "success")
					if len(events) != n {
						t.Errorf("%s: %d events, want %d", action, len(events), n)
					}
					for _, e := range events {
						if e.Initiator.AuthnID != "crn-"+instance.CRN {
							t.Errorf("%s: authnId %q, want the instance's CRN", action, e.Initiator.AuthnID)
						}
						if strings.HasPrefix(action, "iam-identity.") && e.Initiator.ID != profile {
							t.Errorf("%s: initiator %q, want the profile %q", action, e.Initiator.ID, profile)
						}
					}
				}
			})
			t.Run("stopped and started again", func(t *testing.T) {
				s.CLI("is", "instance-stop", "my-instance", "-f")
				waitStatus(t, s, "my-instance", "stopped")
				s.CLI("is", "instance-start", "my-instance")
				waitStatus(t, s, "my-instance", "running")
				iamToken(s, "my-instance", identityToken(s, "my-instance"))
			})
			t.Run("a deleted instance leaves no link behind", func(t *testing.T) {
				s.CLI("is", "instance-delete", "my-instance", "-f")
				var links []map[string]any
				s.JSON(&links, "iam", "trusted-profile-links", "my-trusted-profile")
				if len(links) != 0 {
					t.Fatalf("links left: %v", links)
				}
			})
		})
	}
}

func waitStatus(t *testing.T, s *harness.Server, instance, status string) {
	t.Helper()
	for range 200 {
		var i struct{ Status string }
		s.JSON(&i, "is", "instance", instance)
		if i.Status == status {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("%s did not become %s", instance, status)
}

func TestTheServerComesBackWithItsInstances(t *testing.T) {
	for _, driver := range drivers(t) {
		t.Run(driver, func(t *testing.T) {
			s := harness.Start(t, "--driver", driver)
			prepareSceneA(t, s)
			waitStatus(t, s, "my-instance", "running")
			s.Kill()
			s.Launch()
			iamToken(s, "my-instance", identityToken(s, "my-instance"))
		})
	}
}

func TestTheJSONWinsOverThePositionalSubnet(t *testing.T) {
	s := harness.Start(t, "--driver", "local")
	prepareSceneA(t, s)
	s.CLI("is", "subnet-create", "other-subnet", "my-vpc", "--zone", "us-south-3", "--ipv4-address-count", "16")
	var i struct {
		NIC struct{ Subnet struct{ Name string } } `json:"primary_network_interface"`
	}
	s.JSON(&i, "is", "instance-create", "second", "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", "tabard-local-1",
		"--primary-network-interface", `{"name":"primary-nic","subnet":{"name":"other-subnet"}}`, "--keys", "my-key")
	if i.NIC.Subnet.Name != "other-subnet" {
		t.Fatalf("the interface is in %q", i.NIC.Subnet.Name)
	}
}
