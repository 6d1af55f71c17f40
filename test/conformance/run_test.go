package conformance

import (
	"context"
	"encoding/xml"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// States of a spec.
const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped"
)

// outcome is how a spec ended.
type outcome struct {
	spec    string
	state   string
	message string // why it failed or was skipped
	output  string // what a failed spec wrote
}

// play runs a suite, or the specs of it that match focus, against an
// installation, and returns the outcome of each of its specs in order.
func play(t testing.TB, s suite, in *installation, rec *recorder, focus string) []outcome {
	t.Helper()
	bin, err := compile(s.name)
	if err != nil {
		t.Fatal(err)
	}
	// The suites read ../<env>, and IBM_CREDENTIALS_FILE is theirs to set.
	dir := t.TempDir()
	work := filepath.Join(dir, s.name)
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, s.env), s.environment(in), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if err := rec.follow(log.Name()); err != nil {
		t.Fatal(err)
	}
	defer rec.close()

	report := filepath.Join(dir, "report.xml")
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	defer cancel()
	args := []string{"-test.timeout=10m", "-ginkgo.v", "-ginkgo.noColor", "-ginkgo.seed=1", "-ginkgo.reportFile=" + report}
	if focus != "" {
		args = append(args, "-ginkgo.focus="+focus)
	}
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Dir = work
	cmd.Env = append(os.Environ(), "ACK_GINKGO_DEPRECATIONS=1.16.5")
	cmd.Stdout, cmd.Stderr = log, log
	runErr := cmd.Run() // its status is that of the specs; they are in the report
	in.proxy.close()    // so that all that was asked has been noted
	b, err := os.ReadFile(report)
	if err != nil {
		written, _ := os.ReadFile(log.Name())
		t.Fatalf("%s wrote no report (%v):\n%s", s.name, runErr, clip(string(written), 20_000))
	}
	outcomes, err := readReport(b)
	if err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	return outcomes
}

// environment is the suite's settings file.
func (s suite) environment(in *installation) []byte {
	var b strings.Builder
	for _, prefix := range s.prefixes {
		fmt.Fprintf(&b, "%s_URL=%s\n%s_AUTH_TYPE=iam\n%s_AUTH_URL=%s\n%s_APIKEY=%s\n",
			prefix, in.proxy.url, prefix, prefix, in.proxy.url, prefix, in.apiKey)
	}
	settings := s.settings(in)
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&b, "%s_%s=%s\n", s.prefixes[0], name, settings[name])
	}
	return []byte(b.String())
}

// readReport decodes the JUnit report of ginkgo 1.16. A failing set-up or
// clean-up of the suite is in it as a spec named BeforeSuite or AfterSuite.
func readReport(b []byte) ([]outcome, error) {
	var report struct {
		Cases []struct {
			Name    string  `xml:"name,attr"`
			Failure *string `xml:"failure"`
			Skipped *string `xml:"skipped"`
			Output  string  `xml:"system-out"`
		} `xml:"testcase"`
	}
	if err := xml.Unmarshal(b, &report); err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	outcomes := make([]outcome, 0, len(report.Cases))
	for _, c := range report.Cases {
		o := outcome{spec: c.Name, state: passed}
		switch {
		case c.Failure != nil:
			o.state, o.message, o.output = failed, *c.Failure, c.Output
		case c.Skipped != nil:
			o.state, o.message = skipped, *c.Skipped
		}
		outcomes = append(outcomes, o)
	}
	return outcomes, nil
}
