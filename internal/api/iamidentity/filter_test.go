package iamidentity

import (
	"strings"
	"testing"
)

// sample is what the filters of the tests look at.
func sample(attribute string) string {
	return map[string]string{
		"name": "GoSDK key", "description": `says "hi" \ (and more)`, "id": "ApiKey-1", "iam_id": "IBMid-1", "created_by": "IBMid-2",
	}[attribute]
}

func TestAFilterComparesPartsOfTexts(t *testing.T) {
	for filter, want := range map[string]bool{
		``:                                true,
		`name sw "GoSDK"`:                 true,
		`name sw "gosdk"`:                 false,
		`name sw_ci "gosdk"`:              true,
		`name ew "key"`:                   true,
		`name ew "Key"`:                   false,
		`name ew_ci "KEY"`:                true,
		`name co "DK k"`:                  true,
		`name co "dk K"`:                  false,
		`NAME CO_CI "dk K"`:               true,
		`name co ""`:                      true,
		`description co "\"hi\" \\"`:      true,
		`description co "(and"`:           true,
		`  name	co "Go"  `:                true,
		`name co "x" or id sw "ApiKey-"`:  true,
		`name co "x" and id sw "ApiKey-"`: false,
		`name co "G" or name co "x" and name co "z"`:                          true,
		`(name co "G" or name co "x") and name co "z"`:                        false,
		`((name co "G"))and(iam_id ew "1")`:                                   true,
		`name co "G" AND created_by ew "2" AND iam_id ew "1" Or id co "none"`: true,
	} {
		is, err := parseFilter(filter, filterable...)
		if err != nil {
			t.Errorf("%s: %v", filter, err)
		} else if got := is(sample); got != want {
			t.Errorf("%s: %v, want %v", filter, got, want)
		}
	}
}

func TestAFilterThatIsNotInTheLanguageIsRefused(t *testing.T) {
	term := `name co "x"`
	for _, filter := range []string{
		` `, `name`, `name co`, `name co x`, `name co 'x'`, `name eq "x"`, `name co_cI_ci "x"`, `name co "x`, `name co "\x"`, `name co "x\`,
		`hash co "x"`, `"name" co "x"`, `name "x"`, `co "x"`, `(`, `)`, `()`, `(` + term, term + `)`, term + ` ` + term, term + ` and`, `and ` + term,
		term + ` or or ` + term, term + ` xor ` + term, `not ` + term, `not(` + term + `)`, `name co "x" # comment`, "name co \"x\"\x00", "name\nco \"x\"",
		"name co \"\xff\"", strings.Repeat("(", 21) + term + strings.Repeat(")", 21), strings.Repeat("(", 1999),
		strings.Repeat(term+" and ", 50) + term, `name co "` + strings.Repeat("x", 2000) + `"`,
	} {
		if _, err := parseFilter(filter, filterable...); err == nil {
			t.Errorf("%.60q was taken", filter)
		}
	}
	for _, filter := range []string{
		strings.Repeat("(", 20) + term + strings.Repeat(")", 20), strings.Repeat("("+term+") and ", 49) + term,
	} {
		if _, err := parseFilter(filter, filterable...); err != nil {
			t.Errorf("%.60q was refused: %v", filter, err)
		}
	}
}

// A filter that is understood means the same wherever it stands, and no text
// brings the parser down.
func FuzzFilter(f *testing.F) {
	for _, seed := range []string{`name co "Foo" and (description sw "Bar" or id ew_ci "\"z\\")`, `((name co "x"`, `name co "x" or`, `"`, `\`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		is, err := parseFilter(text, filterable...)
		if err != nil || text == "" {
			return
		}
		for _, same := range []string{"(" + text + ")", "(" + text + ") or (" + text + ")", "(" + text + ") and (" + text + ")"} {
			again, err := parseFilter(same, filterable...)
			if err != nil {
				continue // the bounds
			}
			if is(sample) != again(sample) {
				t.Fatalf("%q and %q differ", text, same)
			}
		}
		if never, err := parseFilter("("+text+`) and id sw "none"`, filterable...); err == nil && never(sample) {
			t.Fatalf("%q overrules what it is joined with", text)
		}
	})
}
