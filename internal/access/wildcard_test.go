package access_test

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tabard.dev/tabard/internal/access"
)

func TestWildcardMatchesAsDocumented(t *testing.T) {
	for _, tt := range []struct {
		pattern, text string
		want          bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "a", true},
		{"a", "A", false},
		{"a", "", false},
		{"*", "", true},
		{"*", "anything at all\nand more", true},
		{"**", "", true},
		{"?", "", false},
		{"?", "a", true},
		{"?", "é", true},
		{"?", "\n", true},
		{"??", "é", false},
		{"a*", "a", true},
		{"a*", "abc", true},
		{"a*", "ba", false},
		{"*a", "ba", true},
		{"*a", "ab", false},
		{"a*c", "abbbc", true},
		{"a*c", "ac", true},
		{"a*c", "acb", false},
		{"a*b*c", "a1b2b3c", true},
		{"*ab", "aab", true},
		{"a?c", "abc", true},
		{"a?c", "ac", false},
		{"{{*}}", "*", true},
		{"{{*}}", "a", false},
		{"{{?}}", "?", true},
		{"{{?}}", "a", false},
		{"a{{*}}*", "a*b", true},
		{"a{{*}}*", "ab", false},
		{"{*}", "{x}", true},
		{"{{*}", "{{x}", true},
		{"{{a}}", "{{a}}", true},
		{"{{{*}}}", "{*}", true},
		{".*", "abc", false},
		{"[a-z]", "a", false},
		{"(", "(", true},
		{`\*`, `\x`, true},
		{"us-south*", "us-south-1", true},
		{"a", "a\n", false},
	} {
		if got := access.Wildcard(tt.pattern, tt.text); got != tt.want {
			t.Errorf("Wildcard(%q, %q) = %t, want %t", tt.pattern, tt.text, got, tt.want)
		}
		if got := wildcardByRegexp(tt.pattern, tt.text); got != tt.want {
			t.Errorf("the reference on (%q, %q) = %t, want %t", tt.pattern, tt.text, got, tt.want)
		}
	}
}

func TestWildcardAgreesWithARegularExpression(t *testing.T) {
	manyChecks(t, "30000")
	pattern := rapid.Custom(func(t *rapid.T) string {
		piece := rapid.SampledFrom([]string{"a", "b", "*", "?", "{{*}}", "{{?}}", "{", "}", "é", "\xff"})
		return strings.Join(rapid.SliceOfN(piece, 0, 6).Draw(t, "pieces"), "")
	})
	text := rapid.Custom(func(t *rapid.T) string {
		piece := rapid.SampledFrom([]string{"a", "b", "a", "b", "*", "?", "{", "}", "é", "\n"})
		return strings.Join(rapid.SliceOfN(piece, 0, 6).Draw(t, "pieces"), "")
	})
	var yes, no int
	rapid.Check(t, func(t *rapid.T) {
		p, s := pattern.Draw(t, "pattern"), text.Draw(t, "text")
		want := wildcardByRegexp(p, s)
		if got := access.Wildcard(p, s); got != want {
			t.Fatalf("Wildcard(%q, %q) = %t, the regular expression says %t", p, s, got, want)
		}
		if want {
			yes++
		} else {
			no++
		}
	})
	if total := yes + no; total >= 10_000 && (yes < total/50 || no < total/50) {
		t.Errorf("%d matches, %d mismatches: the cases prove little", yes, no)
	}
}

func TestAHostileWildcardDoesNotTakeLong(t *testing.T) {
	pattern := strings.Repeat("*a", access.MaxValueLength/2-1) + "*b"
	text := strings.Repeat("a", 10_000)
	start := time.Now()
	if access.Wildcard(pattern, text) {
		t.Error("matched")
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

// FuzzWildcard compares Wildcard with a regular expression.
func FuzzWildcard(f *testing.F) {
	f.Add("a*{{*}}?", "ab*c")
	f.Fuzz(func(t *testing.T, pattern, text string) {
		if len(pattern) > access.MaxValueLength || len(text) > access.MaxValueLength {
			return // no policy holds a longer one
		}
		if got, want := access.Wildcard(pattern, text), wildcardByRegexp(pattern, text); got != want {
			t.Errorf("Wildcard(%q, %q) = %t, the regular expression says %t", pattern, text, got, want)
		}
	})
}
