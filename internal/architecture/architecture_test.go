// Package architecture holds the tests that keep the house in order: which
// package may know which.
package architecture

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "tabard.dev/tabard/"

// layers from the ground up. A package may import its own layer and those
// below. ARCHITECTURE.md explains them.
var layers = []struct {
	name     string
	packages []string
}{
	{"values", []string{"internal/crn", "internal/fault", "internal/object", "internal/jwt"}},
	{"domain", []string{
		"internal/activity", "internal/identity", "internal/access", "internal/trust",
		"internal/vpc", "internal/cluster", "internal/resource",
	}},
	{"state and proof", []string{
		"internal/store", "internal/directory", "internal/journal", "internal/token", "internal/attest",
		"internal/usage", "internal/kube",
	}},
	{"services", []string{"internal/grant", "internal/bootstrap", "internal/retention", "internal/placement", "internal/checkpoint", "internal/export"}},
	{"edges", []string{
		"internal/api", "internal/metadata", "internal/host", "internal/iamclient", "internal/webhook", "internal/binding", "internal/server", "internal/cli", "internal/demo", "cmd", "authz", "examples",
	}},
}

// pure packages compute: they do no I/O, read no clock and know no context.
var pure = []string{"internal/identity", "internal/access", "internal/trust", "internal/vpc", "internal/cluster", "internal/resource", "internal/crn"}

// impure are standard packages whose import means I/O or a context.
var impure = []string{"os", "os/exec", "net/http", "context", "database/sql", "log/slog", "net"}

type pkg struct {
	ImportPath string
	Imports    []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// layer returns the index of a package's layer, or -1.
func layer(path string) int {
	path = strings.TrimPrefix(path, module)
	for i, l := range layers {
		for _, p := range l.packages {
			if path == p || strings.HasPrefix(path, p+"/") {
				return i
			}
		}
	}
	return -1
}

func TestNoPackageReachesUp(t *testing.T) {
	for _, p := range packages(t) {
		if strings.HasPrefix(p.ImportPath, module+"bench") || strings.HasPrefix(p.ImportPath, module+"internal/architecture") {
			continue // measure and watch the whole house
		}
		own := layer(p.ImportPath)
		if own < 0 {
			t.Errorf("%s belongs to no layer; give it one", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, module) {
				continue
			}
			if other := layer(imp); other > own {
				t.Errorf("%s (%s) imports %s (%s)", p.ImportPath, layers[own].name, imp, layers[other].name)
			}
		}
	}
}

func TestTheCoreIsPure(t *testing.T) {
	for _, p := range packages(t) {
		if !slices.Contains(pure, strings.TrimPrefix(p.ImportPath, module)) {
			continue
		}
		for _, imp := range p.Imports {
			if slices.Contains(impure, imp) {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}
