package test

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// TestTheGuidesCommandsDoWhatTheySay runs every sh block of a guide, one after
// the other, and compares what it prints with the json or text block that
// follows it. … there stands for any text; a console block is not run.
func TestTheGuidesCommandsDoWhatTheySay(t *testing.T) {
	for _, file := range []string{
		"docs/decisions.md", "docs/accounts.md", "docs/policies.md", "docs/activity.md", "examples/documents/README.md",
	} {
		t.Run(file, func(t *testing.T) {
			s := harness.Start(t, "--driver", "none")
			sh := startShell(t, s)
			for _, b := range blocks(t, filepath.Join(harness.Root(), file)) {
				got := sh.run(b.commands)
				if b.want != "" && !matches(b.want, got) {
					t.Fatalf("%s: the commands\n%s\nprint\n%s\nand not\n%s", file, b.commands, got, b.want)
				}
			}
		})
	}
}

type block struct{ commands, want string }

// blocks returns a guide's commands with what they print.
func blocks(t *testing.T, file string) []block {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []block
	for _, m := range regexp.MustCompile("(?s)```(\\w+)\n(.*?)```\n").FindAllStringSubmatch(string(b), -1) {
		switch lang, text := m[1], m[2]; lang {
		case "sh":
			out = append(out, block{commands: text})
		case "json", "text":
			out[len(out)-1].want = text
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s has no commands", file)
	}
	return out
}

// matches compares with … as a wildcard.
func matches(pattern, text string) bool {
	parts := strings.Split(strings.TrimSpace(pattern), "…")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile("(?s)^" + strings.Join(parts, ".*") + "$").MatchString(strings.TrimSpace(text))
}

// shell is one bash in which all blocks of a guide run.
type shell struct {
	t       *testing.T
	in      io.Writer
	out     *output
	replace *strings.Replacer
}

// output is what the shell has printed so far.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// startShell starts a shell in a folder that looks like the repository's root
// after the build, beside the data directory of the server.
func startShell(t *testing.T, s *harness.Server) *shell {
	t.Helper()
	dir := t.TempDir()
	tabard, err := harness.Binary()
	if err != nil {
		t.Fatal(err)
	}
	docs, err := documentsBinary()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"bin/tabard": tabard, "bin/documents": docs, "tabard-data": s.Dir, "examples": filepath.Join(harness.Root(), "examples"),
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TABARD_HOME="+s.Home, "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	sh := &shell{t: t, in: in, out: &output{}, replace: strings.NewReplacer(
		"http://127.0.0.1:8470", s.URL, "127.0.0.1:8490", freeAddress(t),
	)}
	cmd.Stdout, cmd.Stderr = sh.out, sh.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // with what the commands have left running
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	// What is built is built already.
	sh.run("set -eu\nmake() { :; }\ngo() { :; }\n")
	return sh
}

// run runs commands and returns what they print.
func (sh *shell) run(commands string) string {
	sh.t.Helper()
	before := len(sh.out.String())
	const done = "### done ###"
	if _, err := io.WriteString(sh.in, sh.replace.Replace(commands)+"\necho '"+done+"'\n"); err != nil {
		sh.t.Fatalf("the shell has ended: %v\n%s", err, sh.out)
	}
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		if got, _, ok := strings.Cut(sh.out.String()[before:], done); ok {
			return got
		}
		time.Sleep(10 * time.Millisecond)
	}
	sh.t.Fatalf("the commands\n%s\ndo not end well; the shell printed\n%s", commands, sh.out)
	return ""
}
