package main

import (
	"testing"
)

func TestTheWebhooksSettingsComeFromEverySource(t *testing.T) {
	cmd := webhookCommand()
	if err := cmd.ParseFlags([]string{"--iam-url", "https://iam.example.com", "--certificate-name", "a.svc", "--certificate-name", "192.0.2.7"}); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{"TABARD_SERVICES": "vpc,resource_controller", "TABARD_CHECK_PROFILES": "true", "TABARD_IAM_URL": "https://other.example.com"}
	err := settle("ks webhook", cmd.Flags(), write(t, "certificate-life: 720h\nservices: [iam_identity]\nmetrics: 127.0.0.1:9472\n"),
		func(name string) (string, bool) { v, ok := env[name]; return v, ok })
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"iam-url": "https://iam.example.com", "services": "[vpc,resource_controller]", "check-profiles": "true", "certificate-life": "720h0m0s",
		"metrics": "127.0.0.1:9472", "certificate-name": "[a.svc,192.0.2.7]", "audience": "iam",
	} {
		if got := cmd.Flags().Lookup(name).Value.String(); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if err := settle("ks webhook", webhookCommand().Flags(), write(t, "sevices: [vpc]\n"), func(string) (string, bool) { return "", false }); err == nil {
		t.Error("an unknown setting is taken")
	}
}
