package test

import (
	"os"
	"strings"
	"testing"

	"github.com/IBM/go-sdk-core/v5/core"

	"tabard.dev/tabard/test/harness"
)

func TestTheSDKsAPIKeyAuthenticatorWorksUnmodified(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	a, err := core.NewIamAuthenticatorBuilder().SetApiKey(s.Owner.APIKey).SetURL(s.URL).Build()
	if err != nil {
		t.Fatal(err)
	}
	token, err := a.GetToken()
	if err != nil {
		t.Fatal(err)
	}
	if c := claimsOf(t, token); c["iam_id"] != s.Owner.IAMID || c["account"].(map[string]any)["bss"] != s.Owner.AccountID {
		t.Fatalf("%v", c)
	}
	a, err = core.NewIamAuthenticatorBuilder().SetApiKey(s.Owner.APIKey).SetClientIDSecret("bx", "bx").SetURL(s.URL).Build()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := a.RequestToken()
	if err != nil {
		t.Fatal(err)
	}
	refreshed, err := core.NewIamAuthenticatorBuilder().SetRefreshToken(answer.RefreshToken).SetClientIDSecret("bx", "bx").SetURL(s.URL).Build()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := refreshed.GetToken(); err != nil {
		t.Fatal(err)
	}
}

func TestTheSDKsAssumeAuthenticatorWorksUnmodified(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	s.CLI("iam", "trusted-profile-create", "worn")
	var serviceID struct{ ID string }
	s.JSON(&serviceID, "iam", "service-id-create", "ci")
	var key struct{ APIKey string }
	s.JSON(&key, "iam", "service-api-key-create", "ci-key", "ci")
	var profile struct{ ID, CRN string }
	s.JSON(&profile, "iam", "trusted-profile", "worn")

	build := func(f func(*core.IamAssumeAuthenticatorBuilder) *core.IamAssumeAuthenticatorBuilder) (string, error) {
		a, err := f(core.NewIamAssumeAuthenticatorBuilder().SetApiKey(key.APIKey).SetURL(s.URL)).Build()
		if err != nil {
			t.Fatal(err)
		}
		return a.GetToken()
	}
	byID := func(b *core.IamAssumeAuthenticatorBuilder) *core.IamAssumeAuthenticatorBuilder {
		return b.SetIAMProfileID(profile.ID)
	}
	if _, err := build(byID); err == nil || !strings.Contains(err.Error(), "not eligible") {
		t.Fatalf("a service ID that the profile does not trust: %v", err)
	}
	s.CLI("iam", "trusted-profile-identity-create", "worn", "--id", serviceID.ID, "--id-type", "SERVICEID")
	for name, f := range map[string]func(*core.IamAssumeAuthenticatorBuilder) *core.IamAssumeAuthenticatorBuilder{
		"id": byID,
		"crn": func(b *core.IamAssumeAuthenticatorBuilder) *core.IamAssumeAuthenticatorBuilder {
			return b.SetIAMProfileCRN(profile.CRN)
		},
		"name": func(b *core.IamAssumeAuthenticatorBuilder) *core.IamAssumeAuthenticatorBuilder {
			return b.SetIAMProfileName("worn").SetIAMAccountID(s.Owner.AccountID)
		},
	} {
		token, err := build(f)
		if err != nil {
			t.Errorf("by %s: %v", name, err)
			continue
		}
		c := claimsOf(t, token)
		if c["iam_id"] != "iam-"+profile.ID || c["authn"].(map[string]any)["iam_id"] != "iam-"+serviceID.ID {
			t.Errorf("by %s: %v", name, c)
		}
	}
}

// insideSwitch makes the test binary play a client inside an instance.
const insideSwitch = "TABARD_TEST_INSIDE"

func TestMain(m *testing.M) {
	if version := os.Getenv(insideSwitch); version != "" {
		os.Exit(playClient(version))
	}
	os.Exit(m.Run())
}

// playClient gets a token with the SDK's instance authenticator and prints it.
func playClient(version string) int {
	b := core.NewVpcInstanceAuthenticatorBuilder().SetServiceVersion(version)
	if url := os.Getenv("TABARD_METADATA_URL"); url != "" {
		b = b.SetURL(url)
	}
	if name := os.Getenv("TABARD_TEST_PROFILE"); name != "" {
		b = b.SetIAMProfileName(name)
	}
	a, err := b.Build()
	if err == nil {
		var token string
		if token, err = a.GetToken(); err == nil {
			os.Stdout.WriteString(token)
			return 0
		}
	}
	os.Stderr.WriteString(err.Error())
	return 1
}

func TestTheSDKsInstanceAuthenticatorWorksUnmodified(t *testing.T) {
	for _, driver := range drivers(t) {
		t.Run(driver, func(t *testing.T) {
			s := harness.Start(t, "--driver", driver)
			prepareSceneA(t, s)
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{"2022-03-01", "2025-08-26"} {
				for _, profile := range []string{"", "my-trusted-profile"} {
					token := s.CLI("is", "instance-exec", "my-instance", "--", "env",
						insideSwitch+"="+version, "TABARD_TEST_PROFILE="+profile, self)
					if c := claimsOf(t, token); c["name"] != "my-trusted-profile" {
						t.Errorf("version %s profile %q: %v", version, profile, c)
					}
				}
			}
		})
	}
}
