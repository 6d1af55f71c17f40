package file

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func entry(n, day int) store.Entry {
	d := fmt.Sprintf("%04d-%02d-%02d", day/10000, day/100%100, day%100)
	return store.Entry{Index: int64(n), Day: day, Event: store.Event{Doc: fmt.Appendf(nil, `{"id":"%d","eventTime":"%sT12:00:00.00+0000"}`, n, d)}}
}

func entries(from, to, day int) (out []store.Entry) {
	for n := from; n < to; n++ {
		out = append(out, entry(n, day))
	}
	return out
}

func open(t *testing.T, c Config) *Sink {
	t.Helper()
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func deliver(t *testing.T, s *Sink, e []store.Entry) {
	t.Helper()
	if n, err := s.Deliver(t.Context(), e); n != len(e) || err != nil {
		t.Fatalf("took %d of %d, %v", n, len(e), err)
	}
}

// ids reads the events of a file.
func ids(t *testing.T, path string) (out []string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(path, packedEnd) {
		if r, err = gzip.NewReader(f); err != nil {
			t.Fatal(err)
		}
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e struct{ ID string }
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("%s has the line %q: %v", path, lines.Bytes(), err)
		}
		out = append(out, e.ID)
	}
	return out
}

func want(t *testing.T, path string, from, to int) {
	t.Helper()
	var all []string
	for n := from; n < to; n++ {
		all = append(all, fmt.Sprint(n))
	}
	if got := ids(t, path); !slices.Equal(got, all) {
		t.Errorf("%s has %v, want %d to %d", filepath.Base(path), got, from, to-1)
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		out = append(out, f.Name())
	}
	return out
}

func TestEachEventIsALine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := open(t, Config{Path: path})
	e := entries(0, 3, 20260702)
	e[1].Doc = []byte("{\"id\":\n\"1\"}")
	deliver(t, s, e)
	deliver(t, s, entries(3, 4, 20260702))
	want(t, path, 0, 4)
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	b, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(b), string(e[0].Doc)+"\n") {
		t.Errorf("the document was changed: %s", b)
	}
}

func TestHalfALineThatACrashLeftIsCutOff(t *testing.T) {
	for name, tail := range map[string]string{"half an event": `{"id":"2","eventT`, "zeros": "\x00\x00\x00", "half an event alone": ""} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "log")
			text := string(entry(0, 20260702).Doc) + "\n" + string(entry(1, 20260702).Doc) + "\n" + tail
			first := 0
			if tail == "" {
				text, first = `{"id":"0","ev`, 2
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			s := open(t, Config{Path: path})
			deliver(t, s, entries(2, 4, 20260702))
			want(t, path, first, 4)
		})
	}
}

func TestAFileThatIsNotOneOfEventsIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(at("database"), []byte("SQLite format 3\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("real"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(at("real"), at("link")), unix.Mkfifo(at("pipe"), 0o600), os.Mkdir(at("dir"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{at("database"), at("link"), at("pipe"), at("dir"), at("none/log"), "/dev/null"} {
		s := open(t, Config{Path: path})
		if n, err := s.Deliver(t.Context(), entries(0, 1, 20260702)); n != 0 || err == nil {
			t.Errorf("%s: took %d", path, n)
		}
	}
	b, err := os.ReadFile(at("database"))
	if err != nil || string(b) != "SQLite format 3\x00" {
		t.Errorf("the database is now %q", b)
	}
}

func TestAFileIsWrittenByOneOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	first, second := open(t, Config{Path: path}), open(t, Config{Path: path})
	deliver(t, first, entries(0, 1, 20260702))
	if n, err := second.Deliver(t.Context(), entries(0, 1, 20260702)); n != 0 || err == nil {
		t.Errorf("took %d, %v", n, err)
	}
}

func TestAFileThatIsMovedAwayOrEmptiedIsNoticed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := open(t, Config{Path: path})
	deliver(t, s, entries(0, 1, 20260702))
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	deliver(t, s, entries(1, 2, 20260702))
	want(t, path+".old", 0, 1)
	want(t, path, 1, 2)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	deliver(t, s, entries(2, 3, 20260702))
	want(t, path, 2, 3)
	if err := os.Truncate(path, 0); err != nil { // logrotate's copytruncate
		t.Fatal(err)
	}
	deliver(t, s, entries(3, 4, 20260702))
	want(t, path, 3, 4)
}

func TestAFileIsRotatedBySizeAndByDay(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	each := len(entry(1000, 20260702).Doc) + 1
	perFile := minSize / each
	s := open(t, Config{Path: path, MaxSize: minSize, Daily: true})
	deliver(t, s, entries(1000, 1000+2*perFile+10, 20260702))
	want(t, path+".20260702-1", 1000, 1000+perFile)
	want(t, path+".20260702-2", 1000+perFile, 1000+2*perFile)
	want(t, path, 1000+2*perFile, 1000+2*perFile+10)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// A server that starts again knows of which day the file is.
	s = open(t, Config{Path: path, MaxSize: minSize, Daily: true})
	deliver(t, s, []store.Entry{entry(1, 20260703), entry(2, 20260702), entry(3, 20260703)}) // around midnight
	want(t, path+".20260702-3", 1000+2*perFile, 1000+2*perFile+10)
	want(t, path, 1, 4)
	if n := names(t, dir); len(n) != 4 {
		t.Errorf("files %v", n)
	}
}

func TestAnEventLargerThanTheFileMayBeIsWrittenAllTheSame(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s := open(t, Config{Path: path, MaxSize: minSize})
	e := entries(0, 3, 20260702)
	e[1].Doc = []byte(`{"id":"1","x":"` + strings.Repeat("y", 2*minSize) + `"}`)
	deliver(t, s, e)
	want(t, path+".20260702-1", 0, 1)
	want(t, path+".20260702-2", 1, 2)
	want(t, path, 2, 3)
}

func TestRotatedFilesAreCompressedAndTheOldestGo(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	// What a crash has left: one that is compressed already, and half of another.
	for name, text := range map[string]string{
		"log.20260601-1": "old", "log.20260601-1.gz": "old", "log.20260602-1.gz.part": "half", "log.20260602-1": string(entry(0, 20260602).Doc) + "\n",
		"log.20260602-01": "not ours", "log.bak": "not ours", "log.20260602-1.gz.txt": "not ours",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, Config{Path: path, Daily: true, Keep: 2, Gzip: true})
	for day := 1; day <= 3; day++ {
		deliver(t, s, entries(day, day+1, 20260700+day))
	}
	all := []string{"log", "log.20260602-01", "log.20260602-1.gz.txt", "log.20260701-1.gz", "log.20260702-1.gz", "log.bak"}
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got := slices.DeleteFunc(names(t, dir), func(n string) bool { return n == "log.20260602-1.gz.part" })
		if slices.Equal(got, all) {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("files %v", got)
		}
	}
	want(t, path+".20260701-1.gz", 1, 2)
	want(t, path, 3, 4)
}

func TestAFullDiskTakesNothingAndNothingStaysHalf(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("a file system cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path, ballast := filepath.Join(dir, "log"), filepath.Join(dir, "ballast")
	s := open(t, Config{Path: path})
	t.Cleanup(func() { _ = s.Close() }) // before the file system goes
	deliver(t, s, entries(0, 10, 20260702))
	if err := os.WriteFile(ballast, make([]byte, 230<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	big := entries(10, 20, 20260702)
	for i := range big {
		big[i].Doc = fmt.Appendf(nil, `{"id":"%d","x":"%s"}`, i+10, strings.Repeat("y", 6<<10))
	}
	if n, err := s.Deliver(t.Context(), big); n != 0 || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("took %d, %v", n, err)
	}
	want(t, path, 0, 10)
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	deliver(t, s, big)
	want(t, path, 0, 20)
}

func TestNothingIsWrittenAfterTheTimeIsUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if n, err := open(t, Config{Path: path}).Deliver(ctx, entries(0, 1, 20260702)); n != 0 || err == nil {
		t.Errorf("took %d, %v", n, err)
	}
}

func TestSettingsThatCannotWorkAreRefused(t *testing.T) {
	for _, c := range []Config{
		{}, {Path: "relative"}, {Path: "/x/"}, {Path: "/x\n"}, {Path: "/x", MaxSize: 5}, {Path: "/x", Keep: -1, Daily: true}, {Path: "/x", Keep: 1}, {Path: "/x", Gzip: true},
	} {
		if err := c.Check(); err == nil {
			t.Errorf("%+v passes", c)
		}
	}
	for text, want := range map[string]Size{"65536": 65536, "64MiB": 64 << 20, `"1 GiB"`: 1 << 30, "8KiB": 8192} {
		var s Size
		if err := s.UnmarshalYAML([]byte(text)); err != nil || s != want {
			t.Errorf("%s is %d, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "1MB", "99999999999999999999", "8589934592GiB"} {
		var s Size
		if err := s.UnmarshalYAML([]byte(text)); err == nil {
			t.Errorf("%q is a size of %d", text, s)
		}
	}
}
