package conformance

import (
	"fmt"
	"os"
	"strings"
)

// exclusion is a spec outside of what Tabard promises.
type exclusion struct {
	spec   string
	reason string
	at     []string // the endpoints that the reason is about, and those below

	// answered: the spec passes nevertheless and has to go on passing, because
	// a required spec asks for the same answer. It does not count as required.
	answered bool
}

// loadExclusions reads the list:
//
//	suite NAME
//	because REASON              for the specs up to the next reason
//	at ENDPOINT ...             that the reason is about, with all below
//	- FULL NAME OF A SPEC       excluded: must not pass
//	+ FULL NAME OF A SPEC       excluded, but must pass
//
// Lines that begin with # are comments.
func loadExclusions(file string) (map[string][]exclusion, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseExclusions(string(b))
}

func parseExclusions(text string) (map[string][]exclusion, error) {
	list := map[string][]exclusion{}
	suite, reason := "", ""
	var at []string
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		word, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSpace(rest)
		switch word {
		case "", "#":
		case "suite":
			suite, reason, at = rest, "", nil
		case "because":
			reason, at = rest, nil
		case "at":
			at = strings.Fields(rest)
		case "-", "+":
			if suite == "" || reason == "" || rest == "" {
				return nil, fmt.Errorf("exclusions, line %d: a spec needs a suite, a reason and a name", n)
			}
			list[suite] = append(list[suite], exclusion{spec: rest, reason: reason, at: at, answered: word == "+"})
		default:
			return nil, fmt.Errorf("exclusions, line %d: %q is not suite, because, at, - or +", n, word)
		}
	}
	return list, nil
}

// verdict is what a run is worth.
type verdict struct {
	passed   int       // required specs
	excluded int       // specs on the list
	answered int       // of them those that pass, as they have to
	failing  []outcome // specs that had to pass
	problems []string  // anything else that makes the run fail
}

// judge holds the outcome of a suite against the exclusions and the number of
// specs that have to pass.
func judge(required int, outcomes []outcome, exclusions []exclusion) verdict {
	var v verdict
	problem := func(format string, a ...any) { v.problems = append(v.problems, fmt.Sprintf(format, a...)) }
	listed := map[string]exclusion{}
	for _, e := range exclusions {
		if _, twice := listed[e.spec]; twice {
			problem("excluded twice: %s", e.spec)
		}
		listed[e.spec] = e
	}
	seen := map[string]bool{}
	counted := 0
	for _, o := range outcomes {
		// The suite's own set-up and clean-up are reported when they fail.
		setup := o.spec == "BeforeSuite" || o.spec == "AfterSuite"
		if seen[o.spec] {
			problem("two specs have the name %s", o.spec)
		}
		seen[o.spec] = true
		e, excluded := listed[o.spec]
		switch {
		case excluded && !e.answered:
			v.excluded++
			if o.state == passed {
				problem("excluded, but passes now: %s", o.spec)
			}
			if o.state == skipped {
				problem("excluded, but did not run: %s", o.spec)
			}
			continue
		case excluded:
			v.excluded++
			if o.state == passed {
				v.answered++
			}
		case !setup:
			counted++
			if o.state == passed {
				v.passed++
			}
		}
		if o.state != passed {
			v.failing = append(v.failing, o)
		}
	}
	for _, e := range exclusions {
		if !seen[e.spec] {
			problem("excluded, but not in the suite: %s", e.spec)
		}
	}
	if counted != required {
		problem("%d specs are not excluded; there should be %d", counted, required)
	}
	return v
}
