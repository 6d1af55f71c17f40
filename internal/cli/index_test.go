package cli

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

var updateIndex = flag.Bool("update", false, "write docs/cli.md anew")

const indexFile = "../../docs/cli.md"

// index lists every command of the client, by group.
func index() string {
	var b strings.Builder
	b.WriteString("# Command line\n\n" +
		"Every command of the client. Written by `go test ./internal/cli -run CommandIndex -update`; do not edit.\n" +
		"`tabard COMMAND --help` has the flags of each and an example. All of them take `--output json` and `--quiet`;\n" +
		"objects are named by name or ID. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.\n" +
		"`tabard --help` lists what the program can do besides: be the server and the demo.\n\n")
	root := New()
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
		t.Error("docs/cli.md is not what the commands are now; write it anew with: go test ./internal/cli -run CommandIndex -update")
	}
}

// family returns the names that a word makes with suffixes, of which "" is the
// word itself.
func family(word string, suffixes ...string) []string {
	out := make([]string, len(suffixes))
	for i, s := range suffixes {
		out[i] = word + s
	}
	return out
}

func TestEveryCommandThatPeopleKnowIsThere(t *testing.T) {
	crud := []string{"s", "", "-create", "-update", "-delete"}
	locks := []string{"-lock", "-unlock"}
	policies := func(word string) []string {
		return append(family(word+"-polic", "ies", "y"), family(word+"-policy", "-create", "-update", "-delete")...)
	}
	var iam []string
	for _, names := range [][]string{
		family("trusted-profile", crud...), family("trusted-profile", "-assume", "-leave"), policies("trusted-profile"),
		family("trusted-profile-link", "s", "", "-create", "-delete"), family("trusted-profile-rule", crud...),
		{"trusted-profile-identities"}, family("trusted-profile-identity", "", "-create", "-delete"),
		family("service-id", crud...), family("service-id", locks...), family("service-id-group", crud...),
		family("service-api-key", crud...), family("service-api-key", locks...), family("service-api-key", "-disable", "-enable"),
		family("api-key", crud...), family("api-key", locks...), family("api-key", "-disable", "-enable"),
		policies("service"), policies("user"), policies("access-group"),
		family("access-group", crud...), family("access-group-rule", crud...),
		family("access-group-user", "s", "-add", "-remove", "-purge"), family("access-group-service-id", "s", "-add", "-remove", "-purge"),
		family("access-group-trusted-profile", "s", "-add", "-remove", "-purge"),
		family("role", crud...), {"authorization-policies"}, family("authorization-policy", "", "-create", "-delete"),
		{"access-policies", "account-policies"}, family("access-policy", "", "-delete", "-restore"), {"policy-restore"},
		{"oauth-tokens", "bearer-token", "service-register", "inactivity-report"},
		family("account-settings", "", "-update"), family("access-management-settings", "", "-update"), family("access-group-settings", "", "-update"),
	} {
		iam = append(iam, names...)
	}
	var resource []string
	for _, names := range [][]string{
		family("group", crud...), family("service-instance", crud...), family("service-instance", locks...), family("service-key", crud...),
		family("reclamation", "s", "", "-restore", "-delete"), {"quotas", "quota", "plans"},
	} {
		resource = append(resource, names...)
	}
	var is []string
	for _, names := range [][]string{
		{"regions", "zones", "vpc-address-prefixes", "instance-profiles", "instance-profile", "operating-systems", "operating-system"},
		family("vpc", crud...), family("subnet", crud...), family("key", crud...), family("image", crud...), family("security-group", crud...),
		family("security-group-rule", "s", "", "-add", "-update", "-delete"), family("security-group-target", "s", "-add", "-remove"),
		family("instance", crud...), family("instance", "-start", "-stop", "-reboot", "-initialization-values"),
		family("instance-network-interface", "s", "", "-floating-ips", "-floating-ip-add", "-floating-ip-remove"),
		family("instance-network-attachment", "s", ""),
		family("virtual-network-interface", "s", "", "-update", "-floating-ips", "-floating-ip-add", "-floating-ip-remove"),
		family("volume", "s", "", "-update"), family("floating-ip", "s", "", "-reserve", "-update", "-release"),
	} {
		is = append(is, names...)
	}
	root := New()
	for group, names := range map[string][]string{"iam": iam, "resource": resource, "is": is} {
		for _, name := range names {
			found, rest, err := root.Find([]string{group, name})
			if err != nil || len(rest) > 0 || found.Name() != name && !found.HasAlias(name) {
				t.Errorf("there is no tabard %s %s", group, name)
			}
		}
	}
}

func TestAnUnknownFlagSuggestsTheNearOnes(t *testing.T) {
	newServer(t)
	run(t, "iam", "trusted-profile-create", "p", "--descript", "x").want(2, "unknown flag: --descript; did you mean --description?\nUsage: ")
	run(t, "iam", "trusted-profile-create", "p", "-z").want(2, "-z")
	run(t, "iam", "role-create").want(2, "missing NAME\n")
	run(t, "iam", "service-register", "x").want(2, `unexpected argument "x"`)
}
