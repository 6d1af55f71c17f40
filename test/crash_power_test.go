package test

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// SIGKILL leaves the system's cache as it is; a power cut does not. Here every
// call of the server that changes a file is recorded, with the answers that it
// sends between them, and played onto a disk that keeps for certain only what
// was synced: of the rest it keeps what chance wants, sector by sector.
//
// When an answer leaves, its event must be among what was synced. And what such
// a disk has at any moment is a data directory that a server starts on, with a
// whole log and every event that was answered.
func TestWhatWasAnsweredIsThereAfterAPowerCut(t *testing.T) {
	record := filepath.Join(t.TempDir(), "calls")
	trace := []string{
		"strace", "-D", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "1048576", "-o", record, "-e",
		"trace=open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,ftruncate,truncate,unlink,unlinkat,rename,renameat,renameat2," +
			"link,linkat,symlink,symlinkat,lseek,fallocate,mmap,sync_file_range,copy_file_range,sendfile,sendto,mkdir,mkdirat",
	}
	if out, err := exec.Command("strace", "-f", "--seccomp-bpf", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("strace cannot be used here: %v %s", err, out)
	}
	r := chance(t)
	s := harness.Prepare(t, t.TempDir(), "--driver", "none")
	s.Begin(trace...)
	s.Ready()
	w := newWitness(t, furnishSceneB(t, s))
	stop := w.load(1)
	time.Sleep(1500 * time.Millisecond)
	s.Kill()
	stop()
	calls := recorded(t, record)

	// The moments: some of the first start, and some of the load.
	var moments []int
	for n, c := range calls {
		if len(c.answers) > 0 {
			moments = append(moments, r.IntN(n), r.IntN(n)) // before the first answer
			for range 4 {
				moments = append(moments, n+r.IntN(len(calls)-n))
			}
			break
		}
	}
	slices.Sort(moments)
	disk := &disk{dir: s.Dir, files: map[string]*file{}, kept: map[string]*file{}, open: map[int]*opened{}, found: map[string]bool{}}
	answered := map[string]bool{}
	checked := 0
	for n, c := range calls {
		for len(moments) > 0 && moments[0] == n {
			moments = moments[1:]
			afterPowerCut(t, disk, r, maps.Clone(answered), fmt.Sprintf("before call %d of %d", n, len(calls)))
		}
		for _, transaction := range c.answers {
			checked++
			answered[transaction] = true
			if !disk.found[transaction] {
				t.Errorf("call %d: the answer to %s leaves, and its event is not synced", n, transaction)
			}
		}
		if err := disk.apply(c); err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
	}
	t.Logf("%d calls recorded, %d answers leave after their events were synced, %d syncs", len(calls), checked, disk.syncs)
	if checked == 0 || disk.syncs == 0 {
		t.Error("nothing was tested")
	}
}

// afterPowerCut starts a server on what a disk has.
func afterPowerCut(t *testing.T, d *disk, r *rand.Rand, answered map[string]bool, when string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	lost, err := d.write(dir, r)
	if err != nil {
		t.Fatal(err)
	}
	s := harness.Prepare(t, dir, "--driver", "none")
	if len(answered) > 0 {
		s.CLI("activity", "verify", "--data-dir", dir)
	}
	s.Launch()
	defer s.Stop()
	token := s.OwnerToken()
	log := newLogbook()
	log.read(t, s, token)
	missing := 0
	for transaction := range answered {
		if len(log.done[transaction]) == 0 {
			missing++
		}
	}
	t.Logf("%s, %d sectors written and not synced of which %d are lost: %d answers, %d events", when, lost.of, lost.sectors, len(answered), log.next)
	if missing > 0 {
		t.Errorf("%s: %d of %d answers have no event", when, missing, len(answered))
	}
}

// call is one of the server's that changes files or sends answers.
type call struct {
	name     string
	args     []string // strings decoded, descriptors as they are
	begins   bool     // it has begun,
	ends     bool     // it has ended: both for one that nothing came between
	result   int
	thread   int
	answers  []string // transactions whose answers it sends
	resulted string   // the path of the descriptor that it returned
}

var (
	lineForm   = regexp.MustCompile(`^(\d+) +(?:<\.\.\. )?(\w+)(?:\(| resumed>)`)
	answerForm = regexp.MustCompile(`HTTP/1\.1 (\d+) [\s\S]*?Transaction-Id: (crash-[a-z]+-\d+x)`)
	markForm   = regexp.MustCompile(`crash-[a-z]+-\d+x`)
	resultForm = regexp.MustCompile(`\) += (-?\d+|0x[0-9a-f]+)(?:<([^>]*)>)?(?: E[A-Z]+ .*)?\s*$`)
)

// recorded reads what strace wrote, once it has written all of it.
func recorded(t *testing.T, name string) []call {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := bytes.Cut(b, []byte(" "))
		if bytes.Contains(bytes.Join(bytes.Fields(b[max(0, len(b)-4096):]), []byte(" ")), append(slices.Clone(first), " +++ killed"...)) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the record does not end: …%s", b[max(0, len(b)-300):])
		}
		time.Sleep(20 * time.Millisecond)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var calls []call
	unfinished := map[int]call{}
	lines := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return calls
		}
		if err != nil {
			t.Fatal(err)
		}
		m := lineForm.FindStringSubmatch(line)
		if m == nil {
			continue // a signal or an end
		}
		thread, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line[max(0, len(line)-40):], " = ?") {
			continue // the kill ended it
		}
		c := call{name: m[2], thread: thread, begins: true, ends: true}
		if strings.Contains(line, "resumed>") {
			c = unfinished[thread]
			c.begins, c.ends, c.answers = false, true, nil
		} else {
			rest := strings.TrimSpace(line[len(m[0]):])
			if cut, ok := strings.CutSuffix(rest, "<unfinished ...>"); ok {
				rest, c.ends = cut, false
			} else if at := resultForm.FindStringIndex(rest); at != nil {
				rest = rest[:at[0]]
			}
			for arg := range strings.SplitSeq(rest, ", ") {
				c.args = append(c.args, decoded(arg))
			}
			if (c.name == "write" || c.name == "sendto") && len(c.args) > 1 {
				for _, m := range answerForm.FindAllStringSubmatch(c.args[1], -1) {
					if m[1] != "503" {
						c.answers = append(c.answers, m[2])
					}
				}
			}
		}
		if c.ends {
			m := resultForm.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("no result: %.200s", line)
			}
			c.result, _ = strconv.Atoi(m[1]) // an address is none that counts
			c.resulted = decoded(m[2])
		} else {
			unfinished[thread] = c
		}
		calls = append(calls, c)
	}
}

// decoded turns a string of strace's -xx, "\x2f\x74", wherever it stands in an
// argument, into its bytes.
func decoded(arg string) string {
	arg = strings.TrimSpace(arg)
	if !strings.Contains(arg, `\x`) {
		return arg
	}
	whole := strings.TrimSuffix(strings.TrimPrefix(arg, `"`), `"`)
	if raw, err := hex.DecodeString(strings.ReplaceAll(whole, `\x`, "")); err == nil && len(raw)*4 == len(whole) {
		return string(raw)
	}
	var out strings.Builder
	for len(arg) > 0 {
		if len(arg) >= 4 && strings.HasPrefix(arg, `\x`) {
			if raw, err := hex.DecodeString(arg[2:4]); err == nil {
				out.Write(raw)
				arg = arg[4:]
				continue
			}
		}
		out.WriteByte(arg[0])
		arg = arg[1:]
	}
	return out.String()
}

// disk is a file system that loses what was not synced. A name that was made,
// moved or removed is kept once the folder was synced, the bytes of a file once
// the file was.
type disk struct {
	dir   string
	files map[string]*file // by name, as the server sees them
	kept  map[string]*file // as the folder was when it was synced last
	open  map[int]*opened  // descriptors
	found map[string]bool  // transactions that stand in synced bytes
	syncs int
}

type file struct {
	synced  []byte
	pending []change // since
	syncing map[int]int
}

// change is a write, or a truncation when data is nil.
type change struct {
	at   int64
	data []byte
	done bool // the call has ended
}

type opened struct {
	file *file
	at   int64
}

const sector = 512

// descriptor splits 7</path>.
func descriptor(arg string) (n int, path string) {
	number, rest, _ := strings.Cut(arg, "<")
	n, err := strconv.Atoi(number)
	if err != nil {
		return -1, ""
	}
	return n, strings.TrimSuffix(strings.TrimSuffix(rest, ">"), " (deleted)")
}

// name is a path's in the directory; ok is whether it is there and matters. The
// index of the write-ahead log is made anew after a power cut.
func (d *disk) name(path string) (string, bool) {
	name, ok := strings.CutPrefix(path, d.dir+"/")
	return name, ok && !strings.HasSuffix(name, "-shm") && name != "lock"
}

func (d *disk) apply(c call) error {
	if c.ends && c.result < 0 {
		return nil
	}
	switch c.name {
	case "open", "openat", "creat":
		return d.opens(c)
	case "write", "pwrite64":
		return d.writes(c)
	case "fsync", "fdatasync":
		return d.sync(c)
	case "ftruncate":
		fd, path := descriptor(c.args[0])
		if _, ok := d.name(path); !ok || !c.begins {
			return nil
		}
		size, err := strconv.ParseInt(c.args[1], 10, 64)
		if err != nil {
			return err
		}
		f := d.open[fd].file
		f.pending = append(f.pending, change{at: size, done: true})
	case "unlink", "unlinkat":
		if name, ok := d.name(d.path(c, 0)); ok && c.ends {
			delete(d.files, name)
		}
	case "rename", "renameat", "renameat2", "link", "linkat":
		if !c.ends {
			return nil
		}
		from, ok := d.name(d.path(c, 0))
		to, ok2 := d.name(d.path(c, 1))
		if !ok && !ok2 {
			return nil
		}
		if !ok || !ok2 || d.files[from] == nil {
			return fmt.Errorf("%s %v: into or out of the data directory", c.name, c.args)
		}
		d.files[to] = d.files[from]
		if strings.HasPrefix(c.name, "rename") {
			delete(d.files, from)
		}
	case "fallocate":
		// The reserve alone is made so, and nobody reads it.
		_, path := descriptor(c.args[0])
		if name, ok := d.name(path); ok && name != "reserve" {
			return fmt.Errorf("fallocate %v: what it does to the disk is not known", c.args)
		}
	case "mkdir", "mkdirat":
		// A server makes those that it misses.
	case "mmap":
		if len(c.args) < 5 || !strings.Contains(c.args[3], "MAP_SHARED") || !strings.Contains(c.args[2], "PROT_WRITE") {
			return nil
		}
		fallthrough
	default:
		for _, arg := range c.args {
			if _, path := descriptor(arg); path != "" {
				if _, ok := d.name(path); ok {
					return fmt.Errorf("%s %v: what it does to the disk is not known", c.name, c.args)
				}
			}
		}
	}
	return nil
}

// path returns the n-th path of a call, which may be relative to a descriptor.
func (d *disk) path(c call, n int) string {
	if !strings.HasSuffix(c.name, "at") && c.name != "renameat2" {
		return c.args[n]
	}
	_, base := descriptor(c.args[2*n])
	if at := strings.Index(c.args[2*n], "<"); base == "" && at >= 0 { // AT_FDCWD</path>
		base = strings.TrimSuffix(c.args[2*n][at+1:], ">")
	}
	if path := c.args[2*n+1]; filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(base, c.args[2*n+1])
}

func (d *disk) opens(c call) error {
	if !c.ends {
		return nil
	}
	delete(d.open, c.result)
	name, ok := d.name(c.resulted)
	if !ok {
		return nil
	}
	f := d.files[name]
	if f == nil {
		if !slices.ContainsFunc(c.args, func(arg string) bool { return strings.Contains(arg, "O_CREAT") }) {
			return nil // a folder
		}
		f = &file{syncing: map[int]int{}}
		d.files[name] = f
	}
	if slices.ContainsFunc(c.args, func(arg string) bool { return strings.Contains(arg, "O_TRUNC") || strings.Contains(arg, "O_APPEND") }) {
		return fmt.Errorf("%s %v: what it does to the disk is not known", c.name, c.args)
	}
	d.open[c.result] = &opened{file: f}
	return nil
}

func (d *disk) writes(c call) error {
	fd, path := descriptor(c.args[0])
	if _, ok := d.name(path); !ok {
		return nil
	}
	o := d.open[fd]
	if o == nil {
		return fmt.Errorf("a write to %s, which was not opened", path)
	}
	if c.begins {
		at := o.at
		if c.name == "pwrite64" {
			var err error
			if at, err = strconv.ParseInt(c.args[3], 10, 64); err != nil {
				return err
			}
		} else {
			o.at += int64(len(c.args[1]))
		}
		o.file.pending = append(o.file.pending, change{at: at, data: []byte(c.args[1])})
	}
	if c.ends {
		if c.result != len(c.args[1]) {
			return fmt.Errorf("half a write: %d of %d bytes", c.result, len(c.args[1]))
		}
		for i := range o.file.pending {
			p := &o.file.pending[i]
			if len(p.data) == len(c.args[1]) && string(p.data) == c.args[1] {
				p.done = true
			}
		}
	}
	return nil
}

// sync keeps what was written before it began, once it has ended.
func (d *disk) sync(c call) error {
	fd, path := descriptor(c.args[0])
	if path == d.dir {
		if c.ends {
			d.syncs++
			d.kept = maps.Clone(d.files)
		}
		return nil
	}
	if _, ok := d.name(path); !ok {
		return nil
	}
	f := d.open[fd].file
	if c.begins {
		n := slices.IndexFunc(f.pending, func(c change) bool { return !c.done })
		if n < 0 {
			n = len(f.pending)
		}
		f.syncing[c.thread] = n
	}
	if !c.ends {
		return nil
	}
	d.syncs++
	n := f.syncing[c.thread]
	delete(f.syncing, c.thread)
	for _, p := range f.pending[:n] {
		f.synced = p.on(f.synced)
		for _, mark := range markForm.FindAll(p.data, -1) {
			d.found[string(mark)] = true
		}
	}
	f.pending = slices.Clone(f.pending[n:])
	for thread, m := range f.syncing {
		f.syncing[thread] = max(0, m-n)
	}
	return nil
}

func (c change) on(b []byte) []byte {
	size := c.at + int64(len(c.data))
	if grow := size - int64(len(b)); grow > 0 {
		b = append(b, make([]byte, grow)...)
	}
	if c.data == nil {
		return b[:c.at]
	}
	copy(b[c.at:], c.data)
	return b
}

type loss struct{ of, sectors int }

// write makes a directory of what the disk has after a power cut. The names are
// those of the last sync, or with the changes since.
func (d *disk) write(dir string, r *rand.Rand) (lost loss, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return lost, err
	}
	names := d.kept
	if r.IntN(2) == 0 {
		names = d.files
	}
	all := r.IntN(3) == 0 // of what was not synced is lost
	for _, name := range slices.Sorted(maps.Keys(names)) {
		f := names[name]
		b := slices.Clone(f.synced)
		for _, p := range f.pending {
			if p.data == nil {
				if !all && r.IntN(2) == 0 {
					b = p.on(b)
				}
				continue
			}
			for at := int64(0); at < int64(len(p.data)); {
				end := min(int64(len(p.data)), at+sector-(p.at+at)%sector)
				lost.of++
				if all || r.IntN(2) == 0 {
					lost.sectors++
				} else {
					b = change{at: p.at + at, data: p.data[at:end]}.on(b)
				}
				at = end
			}
		}
		path := filepath.Join(dir, name)
		if err := cmp.Or(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600)); err != nil {
			return lost, err
		}
	}
	return lost, nil
}
