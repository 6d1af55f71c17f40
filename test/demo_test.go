package test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

func TestTheDemoPlaysBothScenes(t *testing.T) {
	bin, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	for _, driver := range drivers(t) {
		t.Run(driver, func(t *testing.T) {
			cmd := exec.Command(bin, "demo", "--exit", "--driver", driver)
			cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range []string{"Scene A", "Scene B", "not_authorized", "BXNIM0398E", "iam-identity.computeresource-token.login", "== Done"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("the demo does not show %q:\n%s", want, out)
				}
			}
		})
	}
}
