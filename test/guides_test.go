package test

import (
	"path/filepath"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// TestTheGuidesCommandsDoWhatTheySay runs every sh block of a guide, one after
// the other, and compares what it prints with the json or text block that
// follows it. … there stands for any text; a console block is not run.
func TestTheGuidesCommandsDoWhatTheySay(t *testing.T) {
	documents, err := documentsBinary()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{
		"docs/decisions.md", "docs/accounts.md", "docs/policies.md", "docs/activity.md", "examples/documents/README.md",
	} {
		t.Run(file, func(t *testing.T) {
			s := harness.Start(t, "--driver", "none")
			sh := harness.StartShell(t, s, map[string]string{"bin/documents": documents}, nil,
				"http://127.0.0.1:8470", s.URL, "127.0.0.1:8490", freeAddress(t))
			sh.Follow(filepath.Join(harness.Root(), file))
		})
	}
}
