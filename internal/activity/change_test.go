package activity

import (
	"os/exec"
	"strings"
	"testing"
)

func TestAShellReadsTheWordsOfACommandAsTheyWereGiven(t *testing.T) {
	words := []string{
		"plain", "-x", "--flag=a,b", "/a/b.c", "~", "=ls", "", " ", "a b", "'", `"`, `\`, "$HOME", "`id`", "$(id)", "a;b", "a&b", "a|b", "a>b", "#a", "*", "?", "[a]",
		"{a,b}", "!1", "é", "%1", "a=b", "crn:v1:x::", "'; id; '",
	}
	command := Command(append([]string{"printf", "%s|"}, words...)...)
	out, err := exec.CommandContext(t.Context(), "sh", "-c", command).CombinedOutput()
	if want := strings.Join(words, "|") + "|"; err != nil || string(out) != want {
		t.Errorf("%s\nprints %s (%v)\nwant   %s", command, out, err, want)
	}
}

func TestNoCommandIsMadeOfWhatCannotBePrinted(t *testing.T) {
	for _, w := range []string{"a\nb", "a\tb", "\x00", "\x1b[201~", "a\u202eb", "\u200b", "\xff", "\u2028", strings.Repeat("x", 5000)} {
		if got := Command("tabard", w); got != "" {
			t.Errorf("%q", got)
		}
	}
}

func TestAChangeThatDoesNotFitIsLeftOut(t *testing.T) {
	fits := &Change{Do: Add, Kind: KindLink, Edits: []Edit{{Attribute: "a", To: "b"}}}
	var trace Trace
	trace.FailNear("x", "", "", "", nil, fits)
	if trace[0].Change != fits || trace[0].Nearest != nil {
		t.Errorf("%+v", trace[0])
	}
	for _, edits := range [][]Edit{nil, make([]Edit, maxEdits+1), {{Attribute: "a", To: strings.Repeat("x", maxEdit+1)}}, {{Attribute: "a", From: strings.Repeat("x", maxEdit+1)}}} {
		trace = nil
		trace.FailNear("x", "", "", "", nil, &Change{Edits: edits})
		if trace[0].Change != nil {
			t.Errorf("%+v", trace[0].Change)
		}
	}
	trace = nil
	trace.FailNear("x", "", "", "", &Nearest{ID: strings.Repeat("x", 1000), Differs: make([]Difference, 50)}, nil)
	if n := trace[0].Nearest; len(n.ID) > maxDiffer+5 || len(n.Differs) != maxDiffers {
		t.Errorf("%+v", n)
	}
}
