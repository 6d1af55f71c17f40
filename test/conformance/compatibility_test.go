package conformance

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// operation is a request that a published client can make.
type operation struct {
	method  string
	pattern string // with {name} for what varies
}

var (
	builderCall = regexp.MustCompile(`core\.NewRequestBuilder\(core\.([A-Z]+)\)`)
	patternCall = regexp.MustCompile("ResolveRequestURL\\([^,]+, `([^`]+)`")
)

// operations reads the requests that a client of the module can make out of
// its source, sorted by pattern.
func operations(pkg string) ([]operation, error) {
	dir, err := sdkDir()
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, pkg, "*.go"))
	if err != nil {
		return nil, err
	}
	var ops []operation
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		ops = append(ops, parseOperations(string(b))...)
	}
	if len(ops) == 0 {
		return nil, fmt.Errorf("no operations in %s", filepath.Join(dir, pkg))
	}
	slices.SortFunc(ops, func(a, b operation) int {
		return cmp.Or(cmp.Compare(a.pattern, b.pattern), cmp.Compare(a.method, b.method))
	})
	return slices.Compact(ops), nil
}

func parseOperations(source string) []operation {
	var ops []operation
	method := ""
	for line := range strings.Lines(source) {
		if m := builderCall.FindStringSubmatch(line); m != nil {
			method = m[1]
		}
		if m := patternCall.FindStringSubmatch(line); m != nil {
			ops = append(ops, operation{method, trimSlash(m[1])})
		}
	}
	return ops
}

func trimSlash(path string) string { return strings.TrimSuffix(path, "/") }

// matchOperation finds the operation that a request was: of those that fit,
// the one that leaves the least open.
func matchOperation(ops []operation, method, path string) (operation, bool) {
	var best operation
	open := -1
	for _, op := range ops {
		if n, ok := fits(op.pattern, trimSlash(path)); ok && op.method == method && (open < 0 || n < open) {
			best, open = op, n
		}
	}
	return best, open >= 0
}

// fits reports whether a path is one of a pattern's, and how many of its
// segments the pattern leaves open.
func fits(pattern, path string) (open int, ok bool) {
	want, got := strings.Split(pattern, "/"), strings.Split(path, "/")
	if len(want) != len(got) {
		return 0, false
	}
	for i := range want {
		switch {
		case strings.HasPrefix(want[i], "{"):
			open++
		case want[i] != got[i]:
			return 0, false
		}
	}
	return open, true
}

// probe asks the server for each operation without a token: a route that it
// has refuses that, and one that it has not says so.
func probe(in *installation, ops []operation) map[operation]bool {
	has := map[operation]bool{}
	for _, op := range ops {
		path := regexp.MustCompile(`\{[^}]+\}`).ReplaceAllString(op.pattern, "none")
		a := in.server.Do(op.method, path, "", nil)
		says := strings.Contains(string(a.Body), `"invalid_route"`) || op.method == http.MethodHead // which has no body
		has[op] = a.Status != http.StatusNotFound || !says
	}
	return has
}

// row is a line of the table.
type row struct {
	endpoint, supported, notes string
}

// tabulate says of each operation of a suite's client whether it is supported:
// because specs that passed, or the suite's clean-up, used it, or because the
// server has the route and it is not about what is excluded.
func tabulate(r *result, exclusions []exclusion) (rows []row, beside []string) {
	good, answered := map[string]bool{"": true}, map[string]string{}
	for _, o := range r.outcomes {
		good[o.spec] = o.state == passed
	}
	for _, e := range exclusions {
		if e.answered {
			answered[e.spec] = e.reason
		}
	}
	used, partly := map[operation][]int{}, map[operation]string{}
	told := map[operation]bool{} // answered well, if not as the spec wanted
	others := map[string]bool{}
	for _, e := range r.exchanges {
		op, ok := matchOperation(r.operations, e.method, e.path)
		if !ok {
			if e.status < 400 {
				others[e.method+" "+e.path] = true
			}
			continue
		}
		if good[e.spec] && (e.spec != "" || e.status < 400) {
			used[op] = append(used[op], e.status)
		}
		if e.status < 400 {
			told[op] = true
		}
		if reason := answered[e.spec]; reason != "" {
			partly[op] = reason
		}
	}
	for _, op := range r.operations {
		row := row{endpoint: op.method + " " + op.pattern, supported: "yes"}
		switch {
		case partly[op] != "":
			row.supported, row.notes = "empty", "Answers that there are none. "+partly[op]
		case slices.ContainsFunc(used[op], func(status int) bool { return status < 400 }):
		case reasonFor(op, exclusions) != "" && told[op] && op.method == http.MethodGet:
			row.supported, row.notes = "empty", "Answers that there are none. "+reasonFor(op, exclusions)
		case reasonFor(op, exclusions) != "":
			// The server may know the endpoint in order to say so.
			row.supported, row.notes = "no", reasonFor(op, exclusions)
		case !r.routes[op]:
			row.supported = "no"
		case len(used[op]) > 0:
			row.notes = fmt.Sprintf("The suite checks its refusal (%d) only.", slices.Max(used[op]))
		default:
			row.notes = "The suite does not call it."
		}
		rows = append(rows, row)
	}
	for other := range others {
		beside = append(beside, other)
	}
	return rows, beside
}

// reasonFor is why an operation is not supported.
func reasonFor(op operation, exclusions []exclusion) string {
	for _, e := range exclusions {
		for _, prefix := range e.at {
			if under(op.pattern, prefix) {
				return e.reason
			}
		}
	}
	return ""
}

// under reports whether an endpoint is the prefix or below it.
func under(pattern, prefix string) bool {
	return pattern == prefix || strings.HasPrefix(pattern, prefix+"/")
}

// head begins a table.
const head = "\n| endpoint | supported | notes |\n| --- | --- | --- |\n"

// compatibility writes the table of all suites.
func compatibility(results []*result, list map[string][]exclusion) string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Compatibility

Made by `+"`make compatibility`"+` from a run of the integration suites in %s %s against the built binary; do not edit.
The endpoints are all that the module's clients for these services can call.

`+"`yes`"+`: specs that passed have used the endpoint, unless the notes say otherwise. `+"`empty`"+`: the endpoint is there for clients that ask.
`, "`"+sdkModule+"`", sdkVersion)
	beside := map[string]bool{}
	for _, r := range results {
		rows, others := tabulate(r, list[r.suite.name])
		for _, o := range others {
			beside[o] = true
		}
		fmt.Fprintf(&b, "\n## %s\n\n%d of the %d specs of `%s` pass; the others are excluded.\n",
			r.suite.title, r.verdict.passed+r.verdict.answered, len(r.outcomes), r.suite.name)
		if r.suite.retake != nil {
			fmt.Fprintln(&b, r.suite.retake.note)
		}
		b.WriteString(head)
		for _, row := range rows {
			fmt.Fprintf(&b, "| `%s` | %s | %s |\n", row.endpoint, row.supported, row.notes)
		}
	}
	b.WriteString("\n## What the suites used beside\n" + head)
	for _, endpoint := range slices.Sorted(maps.Keys(beside)) {
		fmt.Fprintf(&b, "| `%s` | yes |  |\n", endpoint)
	}
	return b.String()
}

// checkCompatibility holds docs/compatibility.md against a run in which all
// suites were as they should be, or writes it.
func checkCompatibility(t *testing.T, results []*result, list map[string][]exclusion) {
	t.Helper()
	file := filepath.Join(harness.Root(), "docs", "compatibility.md")
	now := compatibility(results, list)
	if os.Getenv("COMPATIBILITY") == "write" {
		if err := os.WriteFile(file, []byte(now), 0o644); err != nil {
			t.Error(err)
		}
		return
	}
	if committed, err := os.ReadFile(file); err != nil || string(committed) != now {
		t.Errorf("docs/compatibility.md is not what this run has shown (%v); run make compatibility and look at the difference", firstDifference(string(committed), now))
	}
}

func firstDifference(a, b string) string {
	was, is := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range is {
		if i >= len(was) || was[i] != is[i] {
			return fmt.Sprintf("from line %d: %s", i+1, is[i])
		}
	}
	return fmt.Sprintf("%d lines instead of %d", len(was), len(is))
}
