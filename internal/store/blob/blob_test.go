package blob_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tabard.dev/tabard/internal/store/blob"
)

func open(t *testing.T) (*blob.Store, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "images")
	s, err := blob.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func write(t *testing.T, s *blob.Store, id, text string) *blob.Writer {
	t.Helper()
	w, err := s.Create(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	return w
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

func TestAFileAppearsWholeWithItsSum(t *testing.T) {
	s, dir := open(t)
	w := write(t, s, "r006-a", "hello, disk")
	if _, err := s.Open("r006-a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not committed opens: %v", err)
	}
	head, err := w.Head(5)
	if err != nil || string(head) != "hello" {
		t.Errorf("head %q, %v", head, err)
	}
	if head, err := w.Head(100); err != nil || string(head) != "hello, disk" {
		t.Errorf("head longer than the file: %q, %v", head, err)
	}
	sum := sha256.Sum256([]byte("hello, disk"))
	if w.SHA256() != hex.EncodeToString(sum[:]) || w.Size() != 11 {
		t.Errorf("sum %s, size %d", w.SHA256(), w.Size())
	}
	if err := errors.Join(w.Sync(), w.Commit()); err != nil {
		t.Fatal(err)
	}
	if err := w.Abort(); err != nil {
		t.Errorf("abort after commit: %v", err)
	}
	f, err := s.Open("r006-a")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil || string(got) != "hello, disk" {
		t.Errorf("content %q, %v", got, err)
	}
	info, err := f.Stat()
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory %v, %v", info.Mode(), err)
	}
	if got := names(t, dir); got != "r006-a" {
		t.Errorf("the directory has %s", got)
	}
}

func TestAnAbortedFileLeavesNothing(t *testing.T) {
	s, dir := open(t)
	w := write(t, s, "a", "x")
	if err := errors.Join(w.Abort(), w.Abort()); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); got != "" {
		t.Errorf("left %s", got)
	}
	if err := w.Commit(); err == nil {
		t.Error("an aborted file was committed")
	}
}

func TestTheLastOfTwoWritersWins(t *testing.T) {
	s, dir := open(t)
	first, second := write(t, s, "a", "first"), write(t, s, "a", "second")
	if err := errors.Join(second.Commit(), first.Commit()); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(got) != "first" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestAStartRemovesWhatWasCutShort(t *testing.T) {
	s, dir := open(t)
	write(t, s, "cut", "x")
	if err := write(t, s, "whole", "y").Commit(); err != nil {
		t.Fatal(err)
	}
	if ids, err := s.IDs(); err != nil || strings.Join(ids, " ") != "whole" {
		t.Errorf("ids %v, %v", ids, err)
	}
	if _, err := blob.Open(dir); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); got != "whole" {
		t.Errorf("the directory has %s", got)
	}
	if err := errors.Join(s.Delete("whole"), s.Delete("whole")); err != nil {
		t.Errorf("delete: %v", err)
	}
}

func TestAnIDIsNeverAPath(t *testing.T) {
	s, _ := open(t)
	for _, id := range []string{"", ".", "..", "../a", "a/b", "a.partial", "A", "a\x00", strings.Repeat("a", 129)} {
		_, created := s.Create(id)
		_, opened := s.Open(id)
		if created == nil || opened == nil || s.Delete(id) == nil {
			t.Errorf("%q is taken for an id", id)
		}
	}
}
