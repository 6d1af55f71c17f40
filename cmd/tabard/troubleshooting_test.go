package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The tables of docs/kubernetes.md are what somebody reads who has one of
// these before him.
func TestTheGuideToKubernetesKnowsEveryCodeAndCondition(t *testing.T) {
	guide, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	// Of users, API keys and clients: no pod sees them.
	others := []string{"CodeRefreshExpired", "CodeKeyNotFound", "CodeKeyDisabled", "CodeClient"}
	for file, prefix := range map[string]string{"../../internal/grant/errors.go": "Code", "../../internal/binding/binding.go": "Reason"} {
		found := constants(t, file, prefix)
		if len(found) < 5 {
			t.Fatalf("%s has the constants %v", file, found)
		}
		for name, value := range found {
			if !slices.Contains(others, name) && !strings.Contains(string(guide), "`"+value+"`") {
				t.Errorf("the guide does not know %s, %s", value, name)
			}
		}
	}
}

// constants are the text constants of a file whose names have a prefix.
func constants(t *testing.T, file, prefix string) map[string]string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(parsed, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Names) != 1 || len(spec.Values) != 1 || !strings.HasPrefix(spec.Names[0].Name, prefix) {
			return true
		}
		if text, ok := spec.Values[0].(*ast.BasicLit); ok && text.Kind == token.STRING {
			value, err := strconv.Unquote(text.Value)
			if err != nil {
				t.Fatal(err)
			}
			out[spec.Names[0].Name] = value
		}
		return true
	})
	return out
}
