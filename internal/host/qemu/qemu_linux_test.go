package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/vpc"
)

// The letters that tell the test's guest what to do; see testdata/guest.asm.
const (
	waits   = 'w'
	ignores = 'i'
	leaves  = 'o'
	resets  = 'r'
	floods  = 'f'
)

// guestImage is a disk that boots in a second.
func guestImage(t *testing.T, letter byte) []byte {
	t.Helper()
	sector, err := os.ReadFile("testdata/guest.bin")
	if err != nil {
		t.Fatal(err)
	}
	disk := make([]byte, 1<<20)
	copy(disk, sector)
	disk[3] = letter
	return disk
}

func describe(content []byte, format string) vpc.Image {
	sum := sha256.Sum256(content)
	return vpc.Image{
		ID: "r006-" + hex.EncodeToString(sum[:4]), Name: "test", Format: format,
		Bytes: int64(len(content)), SHA256: hex.EncodeToString(sum[:]),
	}
}

// library is a source of images by checksum.
type library struct {
	mu     sync.Mutex
	images map[string][]byte
}

func (l *library) add(content []byte, format string) vpc.Image {
	i := describe(content, format)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.images[i.SHA256] = content
	return i
}

func (l *library) Fetch(_ context.Context, i vpc.Image, w io.Writer) error {
	l.mu.Lock()
	content, ok := l.images[i.SHA256]
	l.mu.Unlock()
	if !ok {
		return errors.New("there is no such image")
	}
	_, err := w.Write(content)
	return err
}

// wires is a network of taps that lead nowhere, in a namespace without a name
// that goes with the last of them.
type wires struct {
	mu    sync.Mutex
	calls []string
	ports int // attached or taken up, and neither detached nor released
}

func (w *wires) note(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, fmt.Sprintf(format, a...))
}

func (w *wires) did(call string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Contains(w.calls, call)
}

func (w *wires) AttachTap(_ context.Context, m host.Machine, _ host.Handlers) (Port, []*os.File, error) {
	w.note("attach %s", m.ID)
	var taps []*os.File
	var err error
	made := make(chan struct{})
	go func() {
		defer close(made)
		runtime.LockOSThread() // the thread ends with the goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		for n := range m.Interfaces {
			var tap *os.File
			if tap, err = openTap(fmt.Sprintf("tap%d", n)); err != nil {
				return
			}
			taps = append(taps, tap)
		}
	}()
	<-made
	if err != nil {
		closeAll(taps)
		return nil, nil, err
	}
	return w.port(m.ID), taps, nil
}

func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (w *wires) TakeUpTap(_ context.Context, m host.Machine, _ host.Handlers) (Port, error) {
	w.note("take up %s", m.ID)
	return w.port(m.ID), nil
}

func (w *wires) Discard(_ context.Context, id string) error {
	w.note("discard %s", id)
	return nil
}

func (w *wires) port(id string) Port {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ports++
	return &wire{w, id}
}

type wire struct {
	*wires
	id string
}

func (w *wire) Update(_ context.Context, m host.Machine) error {
	w.note("update %s %s", w.id, m.Metadata.Protocol)
	return nil
}

func (w *wire) Detach(context.Context) error {
	w.note("detach %s", w.id)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ports--
	return nil
}

func (w *wire) Release(context.Context) {
	w.note("release %s", w.id)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ports--
}

// rig is a driver whose leavings are checked when the test ends.
type rig struct {
	t *testing.T
	*Driver
	wires   *wires
	library *library
}

func config(dir string, w *wires, l *library) Config {
	return Config{Dir: dir, Network: w, Images: l, Accel: AccelTCG, Grace: 20 * time.Second}
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("taps need root")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("QEMU is not installed (qemu-system-x86 and qemu-utils)")
	}
	goroutines := goleak.IgnoreCurrent()
	files := openFiles(t)
	dir := t.TempDir()
	t.Cleanup(func() {
		for _, id := range marks(t, dir) {
			t.Errorf("QEMU of %s is left", id)
		}
		goleak.VerifyNone(t, goroutines)
		if now := openFiles(t); now > files {
			t.Errorf("%d files are open, before: %d", now, files)
		}
	})
	r := &rig{t: t, wires: &wires{}, library: &library{images: map[string][]byte{}}}
	r.open(dir, change...)
	return r
}

// open makes a driver in dir, which is closed when the test ends.
func (r *rig) open(dir string, change ...func(*Config)) {
	r.t.Helper()
	cfg := config(dir, r.wires, r.library)
	for _, c := range change {
		c(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Driver = d
	r.t.Cleanup(func() {
		if r.Driver != d {
			return // its successor has its machines
		}
		if d.closed {
			if d, err = New(cfg); err != nil {
				r.t.Error(err)
				return
			}
		}
		ids, err := d.Found(context.Background())
		for _, id := range ids {
			err = errors.Join(err, d.Delete(context.Background(), id))
		}
		if err := errors.Join(err, d.Close()); err != nil {
			r.t.Errorf("clearing away: %v", err)
		}
		if r.wires.ports != 0 {
			r.t.Errorf("%d ports are left", r.wires.ports)
		}
	})
}

// reopen closes the driver, keeping machines, and makes the next one.
func (r *rig) reopen(change ...func(*Config)) {
	r.t.Helper()
	d := r.Driver
	d.cfg.Keep = true
	if err := d.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.open(d.cfg.Dir, change...)
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// marks returns the machines under dir that have a process.
func marks(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, e := range entries {
		environment, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		for _, v := range strings.Split(string(environment), "\x00") {
			if at, ok := strings.CutPrefix(v, mark+dir); ok {
				ids = append(ids, filepath.Base(at))
			}
		}
	}
	return ids
}

func (r *rig) machine(id string, image vpc.Image) host.Machine {
	return host.Machine{
		ID: id, Name: "web", VPC: "r006-vpc", VCPUs: 1, MemoryMiB: 64, Image: image, Fresh: true,
		Metadata: vpc.MetadataService{Enabled: true, Protocol: "http", ResponseHopLimit: 1},
		Interfaces: []host.Interface{{
			ID: "nic", MAC: "02:00:07:00:00:01",
			Address: netip.MustParseAddr("10.240.0.4"), Subnet: netip.MustParsePrefix("10.240.0.0/24"),
		}},
	}
}

// run starts a machine whose guest does what the letter says.
func (r *rig) run(id string, letter byte) host.Machine {
	r.t.Helper()
	m := r.machine(id, r.library.add(guestImage(r.t, letter), "raw"))
	if err := r.Start(r.t.Context(), m, host.Handlers{}); err != nil {
		r.t.Fatal(err)
	}
	m.Fresh = false
	return m
}

// patience bounds waits that end at once when all is well.
const patience = 60 * time.Second

func (r *rig) eventually(what string, is func() bool) {
	r.t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("not so after %s: %s", patience, what)
		}
	}
}

func (r *rig) console(id string) string {
	b, _ := os.ReadFile(filepath.Join(r.dir, id, consoleFile))
	return string(b)
}

func (r *rig) says(id, what string) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("%s says %q", id, what), func() bool { return strings.Contains(r.console(id), what) })
}

func (r *rig) pid(id string) int {
	r.t.Helper()
	rec, err := load(filepath.Join(r.dir, id))
	if err != nil {
		r.t.Fatal(err)
	}
	if rec == nil || rec.Process == nil {
		return 0
	}
	return rec.Process.PID
}

func (r *rig) awaitEnded(id string) {
	r.t.Helper()
	select {
	case got := <-r.Ended():
		if got != id {
			r.t.Fatalf("%s ended, not %s", got, id)
		}
	case <-time.After(patience):
		r.t.Fatalf("%s does not end", id)
	}
}

func (r *rig) noneEnded() {
	r.t.Helper()
	select {
	case id := <-r.Ended():
		r.t.Errorf("%s is said to have ended by itself", id)
	default:
	}
}

func TestAMachineBootsItsDiskAndShutsDownWhenAsked(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", waits)
	r.says("0737_a", "BOOT 1\n")
	if a, ok := r.Access("0737_a"); !ok || a.Driver != "qemu" || a.Console == "" {
		t.Errorf("access: %+v, %v", a, ok)
	}
	if err := r.Stop(t.Context(), "0737_a", false); err != nil {
		t.Fatal(err)
	}
	r.noneEnded()
	if !strings.Contains(r.console("0737_a"), "BYE") {
		t.Errorf("the guest was not asked; it wrote %q", r.console("0737_a"))
	}
	if _, ok := r.Access("0737_a"); ok || r.pid("0737_a") != 0 || !r.wires.did("detach 0737_a") {
		t.Error("something is left of the machine")
	}
}

func TestADiskLastsFromOneStartToTheNextAndTheImageStaysAsItIs(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says("0737_a", "BOOT 1\n")
	if err := r.Stop(t.Context(), m.ID, false); err != nil {
		t.Fatal(err)
	}
	// The image is gone at the server by now, and must not be needed.
	r.library.images = nil
	m.Image.Status = "deleting"
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says(m.ID, "BOOT 2\n")
	got, err := os.ReadFile(r.images.Path(m.Image.SHA256))
	if err != nil || !bytes.Equal(got, guestImage(t, waits)) {
		t.Errorf("the image has changed: %v", err)
	}
}

func TestAGuestThatDoesNotListenIsEndedByForce(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Grace = time.Millisecond })
	r.run("0737_a", ignores)
	r.says("0737_a", "BOOT 1\n")
	if err := r.Stop(t.Context(), "0737_a", false); err != nil {
		t.Fatal(err)
	}
	r.noneEnded()
}

func TestAStopThatIsGivenUpLeavesTheMachineRunning(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", ignores)
	r.says("0737_a", "BOOT 1\n")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Stop(ctx, "0737_a", false); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, ok := r.Access("0737_a"); !ok {
		t.Error("it does not run")
	}
	if err := r.Stop(t.Context(), "0737_a", true); err != nil {
		t.Error(err)
	}
}

func TestAGuestThatPowersOffIsReportedAndStartsAgain(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", leaves)
	r.awaitEnded(m.ID)
	if got := r.console(m.ID); got != "BOOT 1\n" {
		t.Errorf("the console has %q", got)
	}
	if _, ok := r.Access(m.ID); ok || !r.wires.did("detach "+m.ID) {
		t.Error("it is not cleared away")
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.awaitEnded(m.ID)
}

func TestAGuestThatRestartsKeepsItsMachine(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", resets)
	pid := r.pid("0737_a")
	r.says("0737_a", "BOOT 1\nBOOT 2\n")
	r.noneEnded()
	if r.pid("0737_a") != pid || r.wires.did("detach 0737_a") {
		t.Error("it has another process or network")
	}
}

func TestAQEMUThatDiesIsReported(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	if err := unix.Kill(r.pid(m.ID), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.awaitEnded(m.ID)
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says(m.ID, "BOOT 2\n")
}

func TestTwoMachinesOfOneImageStartAtOnce(t *testing.T) {
	r := newRig(t)
	image := r.library.add(guestImage(t, waits), "raw")
	ids := []string{"0737_a", "0737_b"}
	var wg sync.WaitGroup
	errs := make([]error, len(ids))
	for n, id := range ids {
		wg.Go(func() { errs[n] = r.Start(t.Context(), r.machine(id, image), host.Handlers{}) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		r.says(id, "BOOT 1\n")
	}
}

func TestAMachineThatRunsIsNotStartedTwice(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	if err := r.Start(t.Context(), m, host.Handlers{}); err == nil {
		t.Error("it was started again")
	}
	if pid := r.pid(m.ID); unix.Kill(pid, 0) != nil {
		t.Error("it does not run any more")
	}
}

func TestAMachineHasAllItsNetworkCards(t *testing.T) {
	r := newRig(t)
	m := r.machine("0737_a", r.library.add(guestImage(t, waits), "raw"))
	second := m.Interfaces[0]
	second.MAC = "02:00:07:00:00:02"
	m.Interfaces = append(m.Interfaces, second)
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	var cards []struct {
		Name string
		Main string `json:"main-mac"`
	}
	if err := r.machines[m.ID].guest.execute(t.Context(), "query-rx-filter", nil, &cards); err != nil {
		t.Fatal(err)
	}
	var macs []string
	for _, c := range cards {
		macs = append(macs, c.Main)
	}
	slices.Sort(macs)
	if want := []string{"02:00:07:00:00:01", "02:00:07:00:00:02"}; !slices.Equal(macs, want) {
		t.Errorf("the cards are %v", macs)
	}
}

func TestAnUpdateReachesTheNetwork(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	m.Metadata.Protocol = "https"
	if err := r.Update(t.Context(), m); err != nil || !r.wires.did("update 0737_a https") {
		t.Errorf("got %v", err)
	}
	m.ID = "0737_b"
	if err := r.Update(t.Context(), m); err == nil {
		t.Error("a machine that does not run was updated")
	}
}

func TestTheConsoleOfAGuestThatWritesWithoutEndStaysSmall(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", floods)
	aside := filepath.Join(r.dir, "0737_a", consoleFile+oldConsole)
	// The test's guest is slow; what matters is the bound, not the megabyte.
	if err := os.WriteFile(filepath.Join(r.dir, "0737_a", consoleFile), make([]byte, consoleSize-1), 0o600); err != nil {
		t.Fatal(err)
	}
	r.eventually("the log is put aside", func() bool {
		info, err := os.Stat(aside)
		return err == nil && info.Size() <= consoleSize
	})
}

func TestAMachineIsTakenUpWithoutNoticing(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	pid := r.pid(m.ID)
	r.reopen()
	if !r.wires.did("release " + m.ID) {
		t.Error("its listeners were not released")
	}
	if ids, err := r.Found(t.Context()); err != nil || !slices.Equal(ids, []string{m.ID}) {
		t.Errorf("found %v, %v", ids, err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	if r.pid(m.ID) != pid || !r.wires.did("take up "+m.ID) {
		t.Errorf("process %d, before: %d", r.pid(m.ID), pid)
	}
	if err := r.Stop(t.Context(), m.ID, false); err != nil {
		t.Fatal(err)
	}
	if got := r.console(m.ID); got != "BOOT 1\nBYE\n" {
		t.Errorf("the console has %q", got)
	}
}

func TestAGuestThatPowersOffWhileNobodyLooksIsReportedLater(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	// The button is pressed by somebody else, after the driver let go.
	r.cfg.Keep = true
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	g := r.outside(m.ID)
	if err := g.execute(t.Context(), "system_powerdown", nil, nil); err != nil {
		t.Fatal(err)
	}
	<-g.down
	g.release()
	r.open(r.cfg.Dir)
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.awaitEnded(m.ID)
	if got := r.console(m.ID); !strings.HasSuffix(got, "BYE\n") {
		t.Errorf("the console has %q", got)
	}
}

// outside reaches a machine's QEMU past the driver.
func (r *rig) outside(id string) *guest {
	r.t.Helper()
	dir := filepath.Join(r.dir, id)
	rec, err := load(dir)
	if err != nil {
		r.t.Fatal(err)
	}
	proc, err := hold(rec.Process.PID, rec.Process)
	if err != nil || proc == nil {
		r.t.Fatalf("%v, %v", proc, err)
	}
	g, err := reach(r.t.Context(), dir, proc, r.log)
	if err != nil {
		r.t.Fatal(err)
	}
	return g
}

func TestAMachineThatDiedWhileNobodyLookedStartsAnewOnItsDisk(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	pid := r.pid(m.ID)
	r.reopen()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says(m.ID, "BOOT 2\n")
}

func TestAMachineThatWasNotTakenUpCanBeStoppedAndDeleted(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", waits)
	r.says("0737_a", "BOOT 1\n")
	r.reopen()
	if err := r.Stop(t.Context(), "0737_a", false); err != nil {
		t.Fatal(err)
	}
	if !r.wires.did("discard 0737_a") || !strings.Contains(r.console("0737_a"), "BYE") {
		t.Error("it was not stopped as it should be")
	}
	if err := r.Delete(t.Context(), "0737_a"); err != nil {
		t.Fatal(err)
	}
	if ids, err := r.Found(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("left: %v, %v", ids, err)
	}
}

func TestADriverThatKeepsNothingStopsItsMachinesWhenItIsClosed(t *testing.T) {
	r := newRig(t)
	for _, id := range []string{"0737_a", "0737_b"} {
		r.run(id, waits)
	}
	for _, id := range []string{"0737_a", "0737_b"} {
		r.says(id, "BOOT 1\n")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if found := marks(t, r.dir); len(found) > 0 {
		t.Errorf("processes of %v", found)
	}
	for _, id := range []string{"0737_a", "0737_b"} {
		if got := r.console(id); got != "BOOT 1\nBYE\n" {
			t.Errorf("%s: the console has %q", id, got)
		}
	}
	if err := r.Start(t.Context(), r.machine("0737_a", vpc.Image{}), host.Handlers{}); err == nil {
		t.Error("a closed driver starts machines")
	}
}

func TestTheHostsAuthorityIsTrustedByMachinesWhoseMetadataServiceNeedsIt(t *testing.T) {
	const certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
	r := newRig(t, func(c *Config) { c.CACert = []byte(certificate) })
	for protocol, want := range map[string]bool{"http": false, "https": true} {
		m := r.machine("0737_"+protocol, r.library.add(guestImage(t, waits), "raw"))
		m.Metadata.Protocol = protocol
		if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
			t.Fatal(err)
		}
		seed, err := os.ReadFile(filepath.Join(r.dir, m.ID, seedFile))
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(seed, []byte("BEGIN CERTIFICATE")); got != want {
			t.Errorf("%s: the certificate is in the seed: %v", protocol, got)
		}
	}
}

func TestStoppingAndDeletingWhatDoesNotExistIsFine(t *testing.T) {
	r := newRig(t)
	for _, id := range []string{"0737_x", "../images", ""} {
		if err := errors.Join(r.Stop(t.Context(), id, false), r.Delete(t.Context(), id)); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(filepath.Join(r.cfg.Dir, "images")); err != nil {
		t.Error(err)
	}
}

func TestAProcessThatGotTheSameIDIsNeitherTakenNorKilled(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	if err := r.Stop(t.Context(), m.ID, true); err != nil {
		t.Fatal(err)
	}
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	who, err := identify(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(r.dir, m.ID)
	rec, err := load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*identity){
		"another start":   func(i *identity) { i.Start++ },
		"another boot":    func(i *identity) { i.Boot = "earlier" },
		"another program": func(i *identity) { i.Exe = "/usr/bin/qemu-system-x86_64" },
	} {
		recorded := who
		spoil(&recorded)
		rec.Process = &recorded
		if err := rec.save(dir); err != nil {
			t.Fatal(err)
		}
		if err := r.Stop(t.Context(), m.ID, true); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if state, _ := identify(other.Process.Pid); state != who {
			t.Fatalf("%s: it was killed", name)
		}
	}
}

func TestAProcessIsWhatItsIdentitySays(t *testing.T) {
	state, start, err := parseStat([]byte("7 (a) b) c (d)) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 12345 2 3"))
	if err != nil || state != 'S' || start != 12345 {
		t.Errorf("got %c, %d, %v", state, start, err)
	}
	for _, text := range []string{"", "7", "7 (x", "7 (x) S 1 2", "7 (x) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 -5 2"} {
		if _, _, err := parseStat([]byte(text)); err == nil {
			t.Errorf("%q makes sense", text)
		}
	}
}

func TestHalfMadeMachinesAreRepaired(t *testing.T) {
	for name, make := range map[string]func(t *testing.T, dir string, image vpc.Image){
		"an empty directory": func(t *testing.T, dir string, _ vpc.Image) {},
		"a disk without a record": func(t *testing.T, dir string, _ vpc.Image) {
			os.WriteFile(filepath.Join(dir, diskFile), []byte("half"), 0o600)
		},
		"a record without a disk": func(t *testing.T, dir string, image vpc.Image) {
			(&record{Base: baseOf(image)}).save(dir)
		},
		"files that were being made": func(t *testing.T, dir string, image vpc.Image) {
			(&record{Base: baseOf(image), Launching: true}).save(dir)
			for _, n := range []string{recordFile, diskFile, seedFile} {
				os.WriteFile(filepath.Join(dir, n+unfinished), []byte("half"), 0o600)
			}
			os.WriteFile(filepath.Join(dir, socketFile), nil, 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			m := r.machine("0737_a", r.library.add(guestImage(t, waits), "raw"))
			dir := filepath.Join(r.dir, m.ID)
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			make(t, dir, m.Image)
			if ids, err := r.Found(t.Context()); err != nil || !slices.Equal(ids, []string{m.ID}) {
				t.Errorf("found %v, %v", ids, err)
			}
			if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
				t.Fatal(err)
			}
			r.says(m.ID, "BOOT 1\n")
		})
	}
}

func TestALostDiskIsNotReplaced(t *testing.T) {
	for name, lose := range map[string]func(dir string) error{
		"the disk": func(dir string) error { return os.Remove(filepath.Join(dir, diskFile)) },
		"all":      os.RemoveAll,
		"disk and record": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, diskFile)), os.Remove(filepath.Join(dir, recordFile)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			m := r.run("0737_a", waits)
			r.says(m.ID, "BOOT 1\n")
			if err := r.Stop(t.Context(), m.ID, false); err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(r.dir, m.ID)
			if err := lose(dir); err != nil {
				t.Fatal(err)
			}
			err := r.Start(t.Context(), m, host.Handlers{})
			if got := host.ReasonOf(err); got != "The instance's disk is not on this host." {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(filepath.Join(dir, diskFile)); !errors.Is(err, os.ErrNotExist) {
				t.Error("there is a disk")
			}
		})
	}
}

func TestADiskWhoseRecordIsLostIsBootedAgain(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	r.reopen() // and its QEMU runs
	if err := os.Remove(filepath.Join(r.dir, m.ID, recordFile)); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says(m.ID, "BOOT 2\n")
	if found := marks(t, r.dir); len(found) != 1 {
		t.Errorf("processes of %v", found)
	}
}

func TestADiskThatNobodyKnowsIsKept(t *testing.T) {
	r := newRig(t)
	m := r.machine("0737_a", r.library.add(guestImage(t, waits), "raw"))
	dir := filepath.Join(r.dir, m.ID)
	path := filepath.Join(dir, diskFile)
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(path, []byte("precious"), 0o600)); err != nil {
		t.Fatal(err)
	}
	holds := func(pattern string) bool {
		found, _ := filepath.Glob(pattern)
		for _, f := range found {
			if b, _ := os.ReadFile(f); string(b) == "precious" {
				return true
			}
		}
		return false
	}
	m.Fresh = false
	if err := r.Start(t.Context(), m, host.Handlers{}); host.ReasonOf(err) != "The instance's disk on this host cannot be used." || !holds(path) {
		t.Errorf("of one that ran: %v", err)
	}
	m.Fresh = true
	spoilt := m
	spoilt.Image.SHA256 = strings.Repeat("0", 64)
	if err := r.Start(t.Context(), spoilt, host.Handlers{}); err == nil || !holds(path+"*") {
		t.Errorf("of one that does not start: %v", err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil || !holds(path+"*") {
		t.Errorf("of one that never ran: %v", err)
	}
	r.says(m.ID, "BOOT 1\n")
}

func TestAQEMUThatNobodyTookNoteOfIsEndedBeforeTheNext(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	first := r.pid(m.ID)
	r.reopen()
	dir := filepath.Join(r.dir, m.ID)
	rec, err := load(dir)
	if err != nil {
		t.Fatal(err)
	}
	rec.Process, rec.Launching = nil, true
	if err := rec.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	if found := marks(t, r.dir); len(found) != 1 || r.pid(m.ID) == first {
		t.Errorf("processes of %v", found)
	}
}

func TestAMachineWithAnUnreadableRecordIsNotStartedAndCanBeDeleted(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.reopen()
	if err := os.WriteFile(filepath.Join(r.dir, m.ID, recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err == nil {
		t.Error("it was started")
	}
	if err := r.Delete(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	if found := marks(t, r.dir); len(found) > 0 {
		t.Errorf("processes of %v", found)
	}
}

func TestAMachineThatCannotRunIsRefusedAndLeavesNothing(t *testing.T) {
	r := newRig(t)
	good := r.library.add(guestImage(t, waits), "raw")
	for name, c := range map[string]struct {
		spoil func(*host.Machine)
		want  string
	}{
		"a stock image":                {func(m *host.Machine) { m.Image = vpc.Image{ID: "r006-stock"} }, "stock image"},
		"another checksum":             {func(m *host.Machine) { m.Image.SHA256 = strings.Repeat("0", 64) }, "no such image"},
		"no processors":                {func(m *host.Machine) { m.VCPUs = 0 }, "processors"},
		"no memory":                    {func(m *host.Machine) { m.MemoryMiB = 0 }, "memory"},
		"no interface":                 {func(m *host.Machine) { m.Interfaces = nil }, "interface"},
		"no MAC":                       {func(m *host.Machine) { m.Interfaces[0].MAC = "02:00:07:00:00:01,x=y" }, "address"},
		"no address":                   {func(m *host.Machine) { m.Interfaces[0].Address = netip.Addr{} }, "address"},
		"a path as id":                 {func(m *host.Machine) { m.ID = "../x" }, "id"},
		"not ours":                     {func(m *host.Machine) { m.External = &vpc.External{} }, "somebody else"},
		"too many processors for QEMU": {func(m *host.Machine) { m.VCPUs = 255; m.MemoryMiB = 1 << 24 }, "QEMU"},
	} {
		m := r.machine("0737_a", good)
		c.spoil(&m)
		if err := r.Start(t.Context(), m, host.Handlers{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if ids, _ := r.Found(t.Context()); len(ids) > 0 || r.wires.ports != 0 {
			t.Errorf("%s: left: %v, %d ports", name, ids, r.wires.ports)
		}
	}
}

func TestAnImageThatNamesAFileOfTheHostIsRefused(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, guestImage(t, waits), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"backing file":       {"-b", secret, "-F", "raw"},
		"external data file": {"-o", "data_file=" + secret + ".data,data_file_raw=on"},
	} {
		path := filepath.Join(dir, "evil.qcow2")
		args := slices.Concat([]string{"create", "-q", "-f", "qcow2"}, args, []string{path, "1M"})
		if out, err := exec.Command(r.cfg.QEMUImg, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		err = r.Start(t.Context(), r.machine("0737_a", r.library.add(content, "qcow2")), host.Handlers{})
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", name, err)
		}
		// The second opinion alone would do, too.
		if err := r.inspect(t.Context(), path, "qcow2"); err == nil {
			t.Errorf("%s: qemu-img finds nothing wrong", name)
		}
		os.Remove(path)
	}
}

func TestAnImageInQCOW2Boots(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "raw"), guestImage(t, waits), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(r.cfg.QEMUImg, "convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	content, err := os.ReadFile(filepath.Join(dir, "qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), r.machine("0737_a", r.library.add(content, "qcow2")), host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says("0737_a", "BOOT 1\n")
}

func TestARawImageThatLooksLikeQCOW2IsNotRead(t *testing.T) {
	// What a guest writes to a raw disk may be any header.
	r := newRig(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "evil")
	if out, err := exec.Command(r.cfg.QEMUImg, "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", path, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := r.machine("0737_a", r.library.add(content, "raw"))
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	var nodes []struct {
		Name string `json:"node-name"`
		File string
		Drv  string
	}
	if err := r.machines[m.ID].guest.execute(t.Context(), "query-named-block-nodes", nil, &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Name == "image" && n.Drv != "raw" {
			t.Errorf("the image is read as %s", n.Drv)
		}
		if strings.Contains(n.File, "shadow") {
			t.Errorf("QEMU has opened %s", n.File)
		}
	}
}

func TestImagesThatNoMachineUsesAreRemoved(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	path := r.images.Path(m.Image.SHA256)
	other := r.machine("0737_b", r.library.add(guestImage(t, leaves), "raw"))
	for name, step := range map[string]func() error{
		"another goes": func() error {
			if err := r.Start(t.Context(), other, host.Handlers{}); err != nil {
				return err
			}
			r.awaitEnded(other.ID)
			return r.Delete(t.Context(), other.ID)
		},
		"it is stopped, and the agent restarted": func() error {
			if err := r.Stop(t.Context(), m.ID, true); err != nil {
				return err
			}
			r.reopen()
			return nil
		},
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(r.images.Path(other.Image.SHA256)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the other's image is there still: %v", err)
	}
	if err := r.Delete(t.Context(), m.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image is there still: %v", err)
	}
}

func TestImagesThatAreLeftAreRemovedAtTheStart(t *testing.T) {
	r := newRig(t)
	left := r.images.Path(strings.Repeat("0", 64))
	if err := os.WriteFile(left, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is there still: %v", err)
	}
}

func TestTheImageOfADiskWithoutARecordIsKept(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.reopen()
	if err := os.Remove(filepath.Join(r.dir, m.ID, recordFile)); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	if _, err := os.Stat(r.images.Path(m.Image.SHA256)); err != nil {
		t.Error(err)
	}
}

func TestADiskThatIsTooLargeIsRefused(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxDiskBytes = 1<<20 - 1 })
	m := r.machine("0737_a", r.library.add(guestImage(t, waits), "raw"))
	if err := r.Start(t.Context(), m, host.Handlers{}); !strings.Contains(host.ReasonOf(err), "larger") {
		t.Errorf("got %v", err)
	}
	// What is known before is not fetched.
	m.Image.Disk = 1 << 20
	r.library.images = nil
	if err := r.Start(t.Context(), m, host.Handlers{}); !strings.Contains(host.ReasonOf(err), "larger") {
		t.Errorf("got %v", err)
	}
	if ids, _ := r.Found(t.Context()); len(ids) > 0 {
		t.Errorf("left: %v", ids)
	}
}

func TestADiskThatExistsMayBeLargerThanIsAllowedNow(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", leaves)
	r.awaitEnded(m.ID)
	r.cfg.MaxDiskBytes = 1
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.awaitEnded(m.ID)
}

func TestAHostWithoutRoomFetchesNothingAndMakesNoDisk(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	mount := func(size string, flags uintptr) {
		t.Helper()
		if err := unix.Mount("tmpfs", dir, "tmpfs", flags, "size="+size); err != nil {
			t.Skipf("mounting a tmpfs: %v", err)
		}
	}
	mount("64m", 0)
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.Driver = nil
	d, err := New(config(dir, r.wires, r.library))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	const reason = "The host has no room for the instance's disk."
	m := r.machine("0737_a", r.library.add(guestImage(t, waits), "raw"))
	if err := d.Start(t.Context(), m, host.Handlers{}); host.ReasonOf(err) != reason {
		t.Errorf("got %v", err)
	}
	path := d.images.Path(m.Image.SHA256)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the image was fetched: %v", err)
	}
	if err := os.WriteFile(path, guestImage(t, waits), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), m, host.Handlers{}); host.ReasonOf(err) != reason {
		t.Errorf("with the image here: %v", err)
	}
	mount("4g", unix.MS_REMOUNT)
	if err := d.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Error(err)
	}
	if err := d.Delete(t.Context(), m.ID); err != nil {
		t.Error(err)
	}
}

func TestOneDirectoryHasOneDriver(t *testing.T) {
	r := newRig(t)
	if _, err := New(config(r.cfg.Dir, r.wires, r.library)); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("got %v", err)
	}
}

func TestADriverWithoutQEMUSaysWhatToInstall(t *testing.T) {
	cfg := config(t.TempDir(), &wires{}, &library{})
	cfg.QEMU = filepath.Join(t.TempDir(), "qemu")
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "qemu-system-x86") {
		t.Errorf("got %v", err)
	}
}

func TestQEMURunsAsAnUnprivilegedUserThatReachesNoFiles(t *testing.T) {
	r := newRig(t, func(c *Config) { c.User = "nobody" })
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	status, err := os.ReadFile(procPath(r.pid(m.ID), "status"))
	if err != nil {
		t.Fatal(err)
	}
	u, err := findAccount("nobody")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("\nUid:\t%d\t%d\t%d\t%d\n", u.uid, u.uid, u.uid, u.uid); !strings.Contains(string(status), want) {
		t.Errorf("it runs as:\n%s", status)
	}
	if !strings.Contains(string(status), "Seccomp:\t2") {
		t.Error("its system calls are not filtered")
	}
	entries, err := os.ReadDir(filepath.Join(r.dir, m.ID))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o007 != 0 && info.Mode()&os.ModeSocket == 0 {
			t.Errorf("%s is open to others: %s", e.Name(), info.Mode())
		}
	}
	if info, err := os.Stat(filepath.Join(r.dir, m.ID)); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("its directory is open to others: %v, %v", info.Mode(), err)
	}
}

// runsAs returns the user ids of a machine's process.
func (r *rig) runsAs(id string) string {
	r.t.Helper()
	status, err := os.ReadFile(procPath(r.pid(id), "status"))
	if err != nil {
		r.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "\nUid:")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Join(slices.Compact(strings.Fields(line)), " ")
}

func TestEachMachineHasAUserOfItsOwnWhereThereIsARange(t *testing.T) {
	own := func(c *Config) { c.UIDs = UIDs{200000, 200001} }
	r := newRig(t, own)
	a, b := r.run("0737_a", waits), r.run("0737_b", waits)
	if a, b := r.runsAs("0737_a"), r.runsAs("0737_b"); a != "200000" || b != "200001" {
		t.Errorf("they run as %s and %s", a, b)
	}
	c := r.machine("0737_c", a.Image)
	if err := r.Start(t.Context(), c, host.Handlers{}); err == nil || !strings.Contains(err.Error(), "taken") {
		t.Errorf("a third: %v", err)
	}
	if err := r.Delete(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), c, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	if got := r.runsAs(c.ID); got != "200000" {
		t.Errorf("it runs as %s", got)
	}
	// It keeps it when it is taken up, and from one start to the next.
	r.says(b.ID, "BOOT 1\n")
	r.reopen(own)
	if err := r.Start(t.Context(), b, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	if err := r.Stop(t.Context(), b.ID, false); err != nil || !strings.Contains(r.console(b.ID), "BYE") {
		t.Errorf("%v; the console has %q", err, r.console(b.ID))
	}
	if err := r.Start(t.Context(), b, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	r.says(b.ID, "BOOT 2\n")
	if got := r.runsAs(b.ID); got != "200001" {
		t.Errorf("it runs as %s", got)
	}
}

func TestAUserOfAnotherProcessIsNotGivenToAMachine(t *testing.T) {
	r := newRig(t, func(c *Config) { c.UIDs = UIDs{200000, 200001} })
	other := exec.Command("sleep", "1000")
	other.SysProcAttr = (&account{uid: 200000, gid: 200000}).attributes()
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	r.run("0737_a", waits)
	if got := r.runsAs("0737_a"); got != "200001" {
		t.Errorf("it runs as %s", got)
	}
}

func TestRangesOfUsersThatCannotBeUsedAreRefused(t *testing.T) {
	r := newRig(t)
	for _, u := range []UIDs{{0, 200000}, {200001, 200000}, {1000, 200000}, {200000, 1<<32 - 1}} {
		cfg := config(t.TempDir(), r.wires, r.library)
		if cfg.UIDs = u; func() error { _, err := New(cfg); return err }() == nil {
			t.Errorf("%v is accepted", u)
		}
	}
}

func TestQEMUAndItsToolsAreInNetworksOfTheirOwn(t *testing.T) {
	// Each run of the tool writes down where and as whom.
	notes := filepath.Join(t.TempDir(), "notes")
	if err := os.WriteFile(notes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// Others than root get there.
	dir := filepath.Dir(notes)
	if err := errors.Join(os.Chmod(notes, 0o666), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, func(c *Config) {
		real, err := exec.LookPath("qemu-img")
		if err != nil {
			t.Fatal(err)
		}
		c.QEMUImg = filepath.Join(dir, "tool")
		script := fmt.Sprintf("#!/bin/sh\necho $(id -u) $(readlink /proc/self/ns/net) $1 >>%s\nexec %s \"$@\"\n", notes, real)
		if err := errors.Join(os.WriteFile(c.QEMUImg, nil, 0o700), os.Chmod(c.QEMUImg, 0o755), os.WriteFile(c.QEMUImg, []byte(script), 0)); err != nil {
			t.Fatal(err)
		}
		c.UIDs = UIDs{200000, 200001}
	})
	seen := map[string]bool{}
	apart := func(what, net string) {
		t.Helper()
		if net == "" || seen[net] {
			t.Errorf("%s is in the network %q", what, net)
		}
		seen[net] = true
	}
	networkOf := func(pid int) string {
		net, _ := os.Readlink(procPath(pid, "ns/net"))
		return net
	}
	apart("the driver", networkOf(os.Getpid()))
	for _, id := range []string{"0737_a", "0737_b"} {
		r.run(id, waits)
		apart(id, networkOf(r.pid(id)))
	}
	text, err := os.ReadFile(notes)
	if err != nil {
		t.Fatal(err)
	}
	runs := strings.Fields(string(text))
	if len(runs) != 9 {
		t.Errorf("the tool ran like this:\n%s", text)
	}
	home := networkOf(os.Getpid())
	for n := 0; n+2 < len(runs); n += 3 {
		if uid, net := runs[n], runs[n+1]; uid == "0" || strings.HasPrefix(uid, "20000") || net == home {
			t.Errorf("qemu-img %s runs as %s in %s", runs[n+2], uid, net)
		}
	}
}

func TestQEMURunsAsRootOnlyWhenThatWasSaid(t *testing.T) {
	r := newRig(t)
	r.run("0737_a", waits)
	if got := r.runsAs("0737_a"); got == "0" {
		t.Error("it runs as root")
	}
	if err := r.Delete(t.Context(), "0737_a"); err != nil {
		t.Fatal(err)
	}
	d := r.Driver
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(d.cfg.Dir, func(c *Config) { c.User = "root" })
	r.run("0737_a", waits)
	if got := r.runsAs("0737_a"); got != "0" {
		t.Errorf("it runs as %s", got)
	}
}

func TestWithoutAUserThatCanRunQEMUThereIsNoDriver(t *testing.T) {
	r := newRig(t)
	// A program that only root can run.
	program := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.cfg.QEMU = program
	if err := r.try(&account{uid: 65534, gid: 65534}); err == nil {
		t.Error("nobody can run it")
	}
	cfg := config(t.TempDir(), r.wires, r.library)
	cfg.User = "toor-that-does-not-exist"
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), cfg.User) {
		t.Errorf("got %v", err)
	}
}

func TestTheProbePassesUnderEmulation(t *testing.T) {
	r := newRig(t)
	if err := r.prove(t.Context(), AccelTCG); err != nil {
		t.Error(err)
	}
}

func TestAutoChoosesWhatWorks(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Accel = AccelAuto })
	accel, err := r.accelerator(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("this machine has %s", accel)
	again, err := r.accelerator(t.Context())
	if err != nil || again != accel {
		t.Errorf("then %s, %v", again, err)
	}
	r.run("0737_a", waits)
	r.says("0737_a", "BOOT 1\n")
}

func TestBootSectorsAreWhatTheirSourcesSay(t *testing.T) {
	for _, tool := range []string{"as", "ld"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("binutils are not installed")
		}
	}
	for _, c := range []struct{ source, as, ld string }{
		{"probe/probe", "--64", "elf_x86_64"}, {"testdata/guest", "--32", "elf_i386"},
	} {
		dir := t.TempDir()
		object, binary := filepath.Join(dir, "o"), filepath.Join(dir, "bin")
		for _, cmd := range []*exec.Cmd{
			exec.Command("as", c.as, "-o", object, c.source+".asm"),
			exec.Command("ld", "-m", c.ld, "-Ttext", "0x7c00", "--oformat", "binary", "-e", "start", "-o", binary, object),
		} {
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		got, _ := os.ReadFile(binary)
		want, _ := os.ReadFile(c.source + ".bin")
		if !bytes.Equal(got, want) || len(want) != 512 {
			t.Errorf("%s.bin is not what its source makes", c.source)
		}
	}
}

// envChild makes the test's program run a driver in the directory it names,
// start a machine and wait to be killed.
const envChild = "TABARD_TEST_QEMU_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(envChild); dir != "" {
		child(dir)
		return
	}
	os.Exit(m.Run())
}

func child(dir string) {
	var m host.Machine
	var content []byte
	in := json.NewDecoder(os.Stdin)
	if err := errors.Join(in.Decode(&m), in.Decode(&content)); err != nil {
		panic(err)
	}
	images := &library{images: map[string][]byte{}}
	images.add(content, m.Image.Format)
	d, err := New(config(dir, &wires{}, images))
	if err != nil {
		panic(err)
	}
	if err := d.Start(context.Background(), m, host.Handlers{}); err != nil {
		panic(err)
	}
	fmt.Println("started")
	select {}
}

func TestAMachineOutlivesAnAgentThatIsKilled(t *testing.T) {
	r := newRig(t)
	content := guestImage(t, waits)
	m := r.machine("0737_a", r.library.add(content, "raw"))
	dir := r.cfg.Dir
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	var spec bytes.Buffer
	in := json.NewEncoder(&spec)
	if err := errors.Join(in.Encode(m), in.Encode(content)); err != nil {
		t.Fatal(err)
	}
	agent := exec.Command(os.Args[0])
	agent.Env = append(os.Environ(), envChild+"="+dir)
	agent.Stdin = &spec
	agent.Stderr = os.Stderr
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 8)
	_, err = io.ReadFull(out, line)
	agent.Process.Kill()
	agent.Wait()
	if err != nil || string(line) != "started\n" {
		t.Fatalf("the agent says %q, %v", line, err)
	}

	r.open(dir)
	pid := r.pid(m.ID)
	if ids, err := r.Found(t.Context()); err != nil || !slices.Equal(ids, []string{m.ID}) {
		t.Errorf("found %v, %v", ids, err)
	}
	if err := r.Start(t.Context(), m, host.Handlers{}); err != nil {
		t.Fatal(err)
	}
	if r.pid(m.ID) != pid || !r.wires.did("take up "+m.ID) {
		t.Errorf("process %d, before: %d", r.pid(m.ID), pid)
	}
	r.says(m.ID, "BOOT 1\n")
	if err := r.Stop(t.Context(), m.ID, false); err != nil {
		t.Fatal(err)
	}
	if got := r.console(m.ID); got != "BOOT 1\nBYE\n" {
		t.Errorf("the console has %q", got)
	}
}

func TestAMonitorThatTalksNonsenseIsNotBelievedAndItsMachineCanBeEnded(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	r.reopen()
	// Somebody else listens where QEMU did.
	dir := filepath.Join(r.dir, m.ID)
	if err := os.Remove(filepath.Join(dir, socketFile)); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	err := within(dir, func(short string) (err error) {
		l, err = net.Listen("unix", filepath.Join(short, socketFile))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, `{"QMP": 7, "return": "\ud800", "event": []}`)
			conn.Close()
		}
	})
	defer serving.Wait()
	defer l.Close()
	if err := r.Start(t.Context(), m, host.Handlers{}); err == nil {
		t.Error("it was taken up")
	}
	if found := marks(t, r.dir); len(found) != 1 {
		t.Errorf("processes of %v", found)
	}
	if err := r.Stop(t.Context(), m.ID, true); err != nil {
		t.Error(err)
	}
	if found := marks(t, r.dir); len(found) > 0 {
		t.Errorf("processes of %v", found)
	}
}

func TestAConnectionToTheMonitorThatIsLostIsMadeAnew(t *testing.T) {
	r := newRig(t)
	m := r.run("0737_a", waits)
	r.says(m.ID, "BOOT 1\n")
	g := r.machines[m.ID].guest
	first := g.client()
	first.Close()
	r.eventually("there is another connection", func() bool { return g.client() != first })
	if err := r.Stop(t.Context(), m.ID, false); err != nil || !strings.Contains(r.console(m.ID), "BYE") {
		t.Errorf("%v; the console has %q", err, r.console(m.ID))
	}
}
