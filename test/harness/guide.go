package harness

import (
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Block is a sh block of a guide, with the json or text block that follows it:
// what the commands print.
type Block struct{ Commands, Want string }

var fence = regexp.MustCompile("(?s)```(\\w+)\n(.*?)```\n")

// Blocks returns a guide's commands with what they print, in order. A block of
// another kind, such as console, is not run.
func Blocks(t testing.TB, file string) []Block {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []Block
	for _, m := range fence.FindAllStringSubmatch(string(b), -1) {
		switch lang, text := m[1], m[2]; lang {
		case "sh":
			out = append(out, Block{Commands: text})
		case "json", "text":
			if len(out) == 0 {
				t.Fatalf("%s shows an output before any command:\n%s", file, text)
			}
			out[len(out)-1].Want = text
		}
	}
	if len(out) == 0 {
		t.Fatalf("%s has no commands", file)
	}
	return out
}

// Follow runs a guide's blocks one after the other and compares what each
// prints; … stands for any text.
func (sh *Shell) Follow(file string) {
	sh.t.Helper()
	instead := maps.Clone(sh.Instead)
	for _, b := range Blocks(sh.t, file) {
		if do, ok := instead[b.Commands]; ok {
			delete(instead, b.Commands)
			do()
			continue
		}
		got := sh.Run(b.Commands)
		if strings.Contains(got, "will never match") && !strings.Contains(b.Want, "will never match") {
			sh.t.Errorf("%s: the commands\n%s\nmake what is of no use:\n%s", filepath.Base(file), b.Commands, got)
		}
		if b.Want != "" && !matches(b.Want, got) {
			sh.t.Fatalf("%s: the commands\n%s\nprint\n%s\nand not\n%s", filepath.Base(file), b.Commands, got, b.Want)
		}
	}
	for commands := range instead {
		sh.t.Errorf("%s has no block\n%s", filepath.Base(file), commands)
	}
}

func matches(pattern, text string) bool {
	parts := strings.Split(strings.TrimSpace(pattern), "…")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile("(?s)^" + strings.Join(parts, ".*") + "$").MatchString(strings.TrimSpace(text))
}

// Shell is one bash in which all blocks of a guide run.
type Shell struct {
	Timeout time.Duration // for one block

	// Instead has what is done in place of a block, by its text: where the test
	// stands in for a part that a guide only waits for.
	Instead map[string]func()

	t       testing.TB
	in      io.Writer
	out     *Output
	ended   <-chan struct{}
	replace *strings.Replacer
}

// StartShell starts a shell in a folder that looks like the repository's root
// after the build, beside the data directory of the server. Links are further
// files there, by name, which is also where a bin/ is searched for commands.
// Replacements are pairs: what a guide says and what it is in the test.
func StartShell(t testing.TB, s *Server, links map[string]string, env []string, replacements ...string) *Shell {
	t.Helper()
	dir := t.TempDir()
	tabard, err := Binary()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{
		"bin/tabard": tabard, "tabard-data": s.Dir,
		"examples": filepath.Join(root(), "examples"), "deploy": filepath.Join(root(), "deploy"),
	}
	for name, target := range links {
		all[name] = target
	}
	for name, target := range all {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("bash")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TABARD_HOME="+s.Home, "PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	cmd.Env = append(cmd.Env, env...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	sh := &Shell{
		Timeout: time.Minute, t: t, in: in, out: &Output{}, ended: ended, replace: strings.NewReplacer(replacements...),
	}
	cmd.Stdout, cmd.Stderr = sh.out, sh.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(ended)
		_ = cmd.Wait() // what it printed says how it ended
	}()
	t.Cleanup(func() { // with what the commands have left running
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	})
	// What is built is built already.
	sh.Run("set -eu\nmake() { :; }\ngo() { :; }\n")
	return sh
}

// Run runs commands and returns what they print. It fails the test when one of
// them fails.
func (sh *Shell) Run(commands string) string {
	sh.t.Helper()
	before := len(sh.out.String())
	const done = "### done ###"
	if _, err := io.WriteString(sh.in, sh.replace.Replace(commands)+"\necho '"+done+"'\n"); err != nil {
		sh.t.Fatalf("the shell has ended: %v\n%s", err, sh.out)
	}
	deadline := time.Now().Add(sh.Timeout)
	for over := false; !over; {
		select {
		case <-sh.ended:
			over = true
		case <-time.After(10 * time.Millisecond):
			over = time.Now().After(deadline)
		}
		if got, _, ok := strings.Cut(sh.out.String()[before:], done); ok {
			return got
		}
	}
	sh.t.Fatalf("the commands\n%s\ndo not end well; the shell printed\n%s", commands, sh.out)
	return ""
}
