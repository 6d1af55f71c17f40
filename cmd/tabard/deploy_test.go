package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/spf13/cobra"
)

const units = "../../deploy/systemd/"

func TestTheConfigurationFilesThatComeWithTheUnitsAreTaken(t *testing.T) {
	for file, command := range map[string]*cobra.Command{"agent.yaml": agentCommand(), "server.yaml": serverCommand()} {
		if err := settle(command.Name(), command.Flags(), units+file, func(string) (string, bool) { return "", false }); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestSystemdTakesTheUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd is not installed")
	}
	for _, name := range []string{"tabard-agent.service", "tabard-server.service"} {
		unit, err := os.ReadFile(units + name)
		if err != nil {
			t.Fatal(err)
		}
		// The program need not be installed here.
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, bytes.ReplaceAll(unit, []byte("/usr/local/bin/tabard"), []byte("/bin/true")), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), analyze, "verify", file).CombinedOutput()
		if err != nil || len(bytes.TrimSpace(out)) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

func TestTheMasterKeyIsWhereSystemdPutsItOrInMemory(t *testing.T) {
	dir := t.TempDir()
	env := func(values map[string]string) func(string) (string, bool) {
		return func(name string) (string, bool) { v, ok := values[name]; return v, ok }
	}
	if got := masterKeyFile(env(map[string]string{"CREDENTIALS_DIRECTORY": dir}), "0123abcd"); got != "/run/tabard-agent-0123abcd/master.key" && os.Geteuid() == 0 {
		t.Errorf("without the credential it is %s", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "tabard-agent-master"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := masterKeyFile(env(map[string]string{"CREDENTIALS_DIRECTORY": dir}), "0123abcd"); got != filepath.Join(dir, "tabard-agent-master") {
		t.Errorf("with the credential it is %s", got)
	}
}
