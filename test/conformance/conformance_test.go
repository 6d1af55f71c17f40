package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"

	"tabard.dev/tabard/test/harness"
)

// result is a suite's run.
type result struct {
	suite     suite
	outcomes  []outcome
	verdict   verdict
	exchanges []exchange

	operations []operation
	routes     map[operation]bool // whether the server has them
}

func TestPublishedSuites(t *testing.T) {
	list, err := loadExclusions(filepath.Join(harness.Root(), "test", "conformance", "exclusions.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for name := range list {
		if !known(name) {
			t.Errorf("exclusions.txt names a suite %q that is not run", name)
		}
	}
	var mu sync.Mutex
	results := make([]*result, len(suites))
	t.Cleanup(func() { summarize(t, results, list) })
	for i, s := range suites {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			r := run(t, s, list[s.name])
			mu.Lock()
			defer mu.Unlock()
			results[i] = r
		})
	}
}

func known(name string) bool {
	for _, s := range suites {
		if s.name == name {
			return true
		}
	}
	return false
}

// run plays a suite and reports what is wrong with its outcome.
func run(t *testing.T, s suite, exclusions []exclusion) *result {
	rec := &recorder{}
	r := &result{suite: s}
	in := install(t, rec, nil)
	r.outcomes = play(t, s, in, rec, "")
	r.exchanges = rec.exchanges
	ops, err := operations(s.name)
	if err != nil {
		t.Fatal(err)
	}
	r.operations, r.routes = ops, probe(in, ops)
	recorders := map[string]*recorder{}
	if s.retake != nil {
		again := &recorder{}
		second := play(t, s, install(t, again, s.retake.standIn), again, s.retake.focus)
		for _, spec := range s.retake.specs {
			if replace(r.outcomes, second, spec) {
				recorders[spec] = again
			}
		}
	}
	for _, problem := range unmatched(exclusions, ops) {
		t.Error(problem)
	}
	r.verdict = judge(s.required, r.outcomes, exclusions)
	for _, problem := range r.verdict.problems {
		t.Error(problem)
	}
	for _, o := range r.verdict.failing {
		from := rec
		if other := recorders[o.spec]; other != nil {
			from = other
		}
		t.Error(describe(o, from.of(o.spec)))
	}
	return r
}

// unmatched tells of endpoints in exclusions.txt that the client does not know.
func unmatched(exclusions []exclusion, ops []operation) []string {
	var problems []string
	for _, e := range exclusions {
		for _, prefix := range e.at {
			known := slices.ContainsFunc(ops, func(op operation) bool { return under(op.pattern, prefix) })
			problem := "excluded, but the client has no such endpoint: " + prefix
			if !known && !slices.Contains(problems, problem) {
				problems = append(problems, problem)
			}
		}
	}
	return problems
}

// replace takes a spec's outcome from another run.
func replace(outcomes, other []outcome, spec string) bool {
	for i := range outcomes {
		for _, o := range other {
			if o.spec == spec && outcomes[i].spec == spec {
				outcomes[i] = o
				return true
			}
		}
	}
	return false
}

// describe tells what an author of the server needs: which spec, what it
// expected, and what was said on the wire.
func describe(o outcome, exchanges []exchange) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s\n", strings.ToUpper(o.state), o.spec)
	for _, line := range gist(o.message) {
		fmt.Fprintf(&b, "    %s\n", line)
	}
	for _, e := range exchanges {
		fmt.Fprintf(&b, "    %s\n", e)
	}
	if os.Getenv("CONFORMANCE_DEBUG") != "" {
		fmt.Fprintf(&b, "    written by the spec:\n%s\n", o.output)
	}
	return b.String()
}

// gist shortens an assertion that prints a whole object: what was expected, and
// where, are at its two ends.
func gist(message string) []string {
	lines := strings.Split(strings.TrimSpace(message), "\n")
	lines = slices.DeleteFunc(lines, func(line string) bool {
		return strings.TrimSpace(line) == "" || strings.Contains(line, "GomegaStringer") ||
			strings.Contains(line, "Gomega's 'format' package") || strings.Contains(line, "gomega/#adjusting-output")
	})
	const head, tail = 6, 4
	if len(lines) > head+tail+1 {
		lines = slices.Concat(lines[:head], []string{"…"}, lines[len(lines)-tail:])
	}
	return lines
}

// summarize prints the table, writes the results file and, after a run of all
// suites, holds docs/compatibility.md against what was seen.
func summarize(t *testing.T, results []*result, list map[string][]exclusion) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "suite\trequired\tpassed\tfailed\texcluded")
	complete, required, good := true, 0, 0
	for _, r := range results {
		if r == nil {
			complete = false
			continue
		}
		v := r.verdict
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", r.suite.name, r.suite.required, v.passed, len(v.failing), v.excluded)
		required, good = required+r.suite.required, good+v.passed
	}
	if complete {
		fmt.Fprintf(w, "\t%d\t%d\n", required, good)
	}
	w.Flush()
	t.Logf("%s@%s\n%s", sdkModule, sdkVersion, b.String())
	if file := os.Getenv("CONFORMANCE_RESULTS"); file != "" {
		if err := writeResults(file, results, list); err != nil {
			t.Errorf("write the results: %v", err)
		}
	}
	switch {
	case !complete:
	case t.Failed():
		t.Log("docs/compatibility.md is looked at when all suites are as they should be")
	default:
		checkCompatibility(t, results, list)
	}
}

// writeResults writes a JSON object per spec and line.
func writeResults(file string, results []*result, list map[string][]exclusion) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	for _, r := range results {
		if r == nil {
			continue
		}
		reasons := map[string]string{}
		for _, e := range list[r.suite.name] {
			reasons[e.spec] = e.reason
		}
		for _, o := range r.outcomes {
			line := struct {
				Suite    string `json:"suite"`
				Spec     string `json:"spec"`
				State    string `json:"state"`
				Excluded string `json:"excluded,omitempty"`
				Message  string `json:"message,omitempty"`
			}{r.suite.name, o.spec, o.state, reasons[o.spec], clip(o.message, 2000)}
			if err := enc.Encode(line); err != nil {
				return err
			}
		}
	}
	return f.Close()
}
