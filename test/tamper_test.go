package test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tabard.dev/tabard/test/harness"
)

// The activity log is verified where it runs, where it lies and as an exported
// file, and a change of one word in any of them is found.
func TestAChangedActivityLogIsFound(t *testing.T) {
	s := harness.Start(t, "--driver", "none")
	s.Login()
	dir := t.TempDir()
	kept, exported := filepath.Join(dir, "checkpoint.txt"), filepath.Join(dir, "log.jsonl")
	s.CLI("iam", "trusted-profile-create", "first")
	const mark = `"correlationId":"txn-to-forge-1"`
	if a := s.Do("POST", "/v1/profiles", s.OwnerToken(), map[string]any{"name": "forged", "account_id": s.Owner.AccountID}, "Transaction-Id", "txn-to-forge-1"); a.Status != 201 {
		t.Fatalf("%d %s", a.Status, a.Body)
	}
	s.CLI("iam", "trusted-profile-create", "second")

	if out := s.CLI("activity", "verify"); !strings.Contains(out, "is whole") || !strings.Contains(out, "activity checkpoint --file") {
		t.Errorf("said %s", out)
	}
	if r := s.Run("activity", "verify", "--data-dir", s.Dir); r.Code != 1 || !strings.Contains(r.Err, "Stop the server first") {
		t.Errorf("a data directory in use: %d %s", r.Code, r.Err)
	}
	s.CLI("activity", "export-log", "--file", exported)
	if r := s.Run("activity", "export-log", "--file", exported); r.Code != 1 {
		t.Error("an export replaced another")
	}
	// An export that was interrupted goes on.
	whole := read(t, exported)
	write(t, filepath.Join(dir, "again.jsonl.part"), whole[:len(whole)/2])
	s.CLI("activity", "export-log", "--file", filepath.Join(dir, "again.jsonl"))
	s.CLI("activity", "verify", "--file", filepath.Join(dir, "again.jsonl"))

	s.Stop() // signs its last checkpoint
	s.CLI("activity", "verify", "--data-dir", s.Dir)
	s.Launch()
	out := s.CLI("activity", "checkpoint", "--file", kept)
	_, key, ok := strings.Cut(strings.TrimSpace(out), "Its key: ")
	if !ok {
		t.Fatalf("said %s", out)
	}
	if out := s.CLI("activity", "verify", "--checkpoint", kept, "--key", key); !strings.Contains(out, "is whole") || strings.Contains(out, "own checkpoints only") {
		t.Errorf("said %s", out)
	}

	forge := func(b []byte) []byte {
		t.Helper()
		if !bytes.Contains(b, []byte(mark)) {
			t.Fatal("the event is not there")
		}
		return bytes.ReplaceAll(b, []byte(mark), []byte(strings.Replace(mark, "forge-1", "forge-2", 1)))
	}
	found := func(args ...string) {
		t.Helper()
		r := s.Run(append([]string{"activity", "verify"}, args...)...)
		if r.Code != 1 || !strings.Contains(r.Err, "(changed)") || !strings.Contains(r.Err, "first bad position") {
			t.Errorf("%v: %d %s%s", args, r.Code, r.Out, r.Err)
		}
	}
	write(t, exported, forge(whole))
	found("--file", exported)

	s.Stop()
	db := filepath.Join(s.Dir, "tabard.db")
	write(t, db, forge(read(t, db)))
	found("--data-dir", s.Dir)
	found("--data-dir", s.Dir, "--checkpoint", kept, "--key", key)
	s.Launch()
	found()
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
