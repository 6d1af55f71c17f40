package activity

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the catalogue in docs/events.md anew")

const (
	catalogueFile  = "../../docs/events.md"
	catalogueBegin = "<!-- catalogue: written by go test ./internal/activity -run Catalogue -update -->\n"
	catalogueEnd   = "<!-- end of catalogue -->\n"
)

func written() string {
	var b strings.Builder
	for _, s := range Catalogue() {
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n| action | severity | |\n| --- | --- | --- |\n", s.Title, s.Same)
		for _, e := range s.Entries {
			says := e.Says
			if e.Data {
				says = strings.TrimSpace("Data event. " + says)
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", e.Action, e.Severity, says)
		}
	}
	return b.String() + "\n"
}

func TestTheCatalogueInTheDocumentationIsCurrent(t *testing.T) {
	raw, err := os.ReadFile(catalogueFile)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(raw), catalogueBegin)
	got, after, closed := strings.Cut(rest, catalogueEnd)
	if !ok || !closed {
		t.Fatal("docs/events.md has no place for the catalogue")
	}
	if *update {
		if err := os.WriteFile(catalogueFile, []byte(before+catalogueBegin+written()+catalogueEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != written() {
		t.Error("docs/events.md is not what the catalogue is now; write it anew with: go test ./internal/activity -run Catalogue -update")
	}
}

func TestTheCatalogueHasEachActionOnce(t *testing.T) {
	form := regexp.MustCompile(`^(\*|[a-z]+(-[a-z]+)*)(\.[a-zA-Z_]+(-[a-z]+)*){2,3}$`)
	seen := map[string]bool{}
	for _, s := range Catalogue() {
		for _, e := range s.Entries {
			if seen[e.Action] || !form.MatchString(e.Action) {
				t.Errorf("%s: again, or not the name of an event", e.Action)
			}
			seen[e.Action] = true
			if strings.HasSuffix(e.Action, ".delete") && e.Severity != Critical {
				t.Errorf("%s is %s", e.Action, e.Severity)
			}
		}
	}
	for action, severity := range map[string]string{"kms.instance.create": Warning, "papers.key.delete": Critical, "kms.key.read": Critical, "x.y.delete": Critical, "x.y.z": Warning} {
		if got := severityOf(action); got != severity {
			t.Errorf("%s is %s", action, got)
		}
	}
	for action, event := range map[string]string{
		"iam-groups.members.read": "iam-groups.member.read", "is.vpc.vpc.list": "is.vpc.vpc.read", "iam-groups.rules.list": "iam-groups.rules.list", "iam.policy.read": "iam.policy.read",
	} {
		if got := ReadEvent(action); got != event {
			t.Errorf("a read that needs %s is %s", action, got)
		}
	}
}
