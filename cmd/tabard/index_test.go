package main

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"tabard.dev/tabard/internal/cli"
)

var updateIndex = flag.Bool("update", false, "write docs/cli.md anew")

const indexFile = "../../docs/cli.md"

// index lists every command, by group.
func index() string {
	var b strings.Builder
	b.WriteString("# Command line\n\n" +
		"Every command. Written by `go test ./cmd/tabard -run CommandIndex -update`; do not edit.\n" +
		"`tabard COMMAND --help` has the flags of each and an example. Those of the client take `--output json` and `--quiet`;\n" +
		"objects are named by name or ID. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.\n\n")
	root := cli.New(services()...)
	var groups []*cobra.Command
	for _, c := range root.Commands() {
		switch {
		case c.HasSubCommands():
			groups = append(groups, c)
		case c.Name() != "help":
			entry(&b, c)
		}
	}
	for _, g := range groups {
		b.WriteString("\n## tabard " + g.Name() + "\n\n" + g.Short + ".\n\n")
		for _, c := range g.Commands() {
			entry(&b, c)
		}
	}
	return b.String()
}

func entry(b *strings.Builder, c *cobra.Command) {
	b.WriteString("- `" + strings.TrimSuffix(c.UseLine(), " [flags]") + "`: " + c.Short + ".\n")
}

func TestTheCommandIndexInTheDocumentationIsCurrent(t *testing.T) {
	want := index()
	if *updateIndex {
		if err := os.WriteFile(indexFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(indexFile)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/cli.md is not what the commands are now; write it anew with: go test ./cmd/tabard -run CommandIndex -update")
	}
}
