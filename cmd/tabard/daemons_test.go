package main

import (
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestDaemonsSayWhatTheirCommandLacks(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for name, command := range map[string]func() *cobra.Command{"webhook": webhookCommand, "controller": controllerCommand} {
		for _, c := range []struct {
			args []string
			says string
		}{
			{nil, "give --iam-url URL"},
			{[]string{"--iam-url", "iam.example.com"}, "not an http or https URL"},
			{[]string{"--iam-url", "http://iam.example.com"}, "--insecure-http"},
			{[]string{"--iam-url", "https://iam.example.com"}, "Give --kubeconfig FILE"},
		} {
			cmd := command()
			cmd.SetArgs(c.args)
			cmd.SetErr(io.Discard)
			cmd.SetOut(io.Discard)
			cmd.SilenceUsage, cmd.SilenceErrors = true, true
			if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s %v: %v, want %q", name, c.args, err, c.says)
			}
		}
	}
}
