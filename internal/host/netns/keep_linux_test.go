package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/namespace"
)

// linger runs a program in a machine until the test ends.
func (i *inst) linger() *exec.Cmd {
	i.t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := i.inside(cmd.Start); err != nil {
		i.t.Fatal(err)
	}
	i.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd
}

// card is what a machine knows of its network.
func (i *inst) card() string {
	i.t.Helper()
	var all []byte
	for _, c := range [][]string{{"ip", "-4", "-o", "addr"}, {"ip", "route"}} {
		err := i.inside(func() error {
			out, err := exec.Command(c[0], c[1:]...).CombinedOutput()
			all = append(all, out...)
			return err
		})
		if err != nil {
			i.t.Fatal(err)
		}
	}
	return string(all)
}

// spaceOf is the identity of the namespace that a process runs in.
func spaceOf(t *testing.T, pid int) string {
	t.Helper()
	at, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func TestKeptMachinesAreTakenUpWithWhatRunsInThem(t *testing.T) {
	r := newKeepingRig(t, true)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server, "192.0.2.7:8472")
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	r.start(spec("0717_c", "vpc-2", "10.240.0.4", 4))
	process, before := a.linger(), a.card()
	space := spaceOf(t, process.Process.Pid)
	r.lose()
	r.open(true)
	if got, err := r.d.Found(t.Context()); err != nil || !slices.Equal(got, []string{"0717_a", "0717_b", "0717_c"}) {
		t.Errorf("found %v, %v", got, err)
	}
	if _, ok := r.d.Access(a.ID); ok {
		t.Error("a machine that was not taken up can be accessed")
	}
	a = r.start(a.Machine, server, "192.0.2.7:8472")
	b = r.start(b.Machine)
	a.reachesItsOwn()
	b.reachesItsOwn()
	for _, at := range []string{server, "192.0.2.7:8472"} {
		if got, err := a.get("", "http://"+at); got != "server for 10.240.0.4" {
			t.Errorf("at %s machine a reaches %q, %v", at, got, err)
		}
	}
	if got := a.card(); got != before {
		t.Errorf("the network is\n%s\nbefore:\n%s", got, before)
	}
	if err := process.Process.Signal(nil); errors.Is(err, os.ErrProcessDone) {
		t.Error("what ran in it has ended")
	}
	if got := spaceOf(t, process.Process.Pid); got != space {
		t.Errorf("what ran in it is in %s, before in %s", got, space)
	}
	if got, err := r.d.Found(t.Context()); err != nil || !slices.Equal(got, []string{"0717_c"}) {
		t.Errorf("found %v, %v", got, err)
	}
	// One that is not wanted any more goes without having been taken up.
	for range 2 {
		if err := r.d.Delete(t.Context(), "0717_c"); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := r.d.Found(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("found %v, %v", got, err)
	}
	if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) != 3 {
		t.Errorf("namespaces: %v, %v", left, err)
	}
}

func TestADriverThatKeepsNothingRemovesWhatOneThatDidHasLeft(t *testing.T) {
	r := newKeepingRig(t, true)
	r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4), server)
	r.lose()
	r.open(false)
	if left, err := namespace.Named("tabard-" + r.state); err != nil || len(left) != 0 {
		t.Errorf("namespaces: %v, %v", left, err)
	}
	if got, err := r.d.Found(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("found %v, %v", got, err)
	}
}

func TestHalfMadeMachinesAreFoundAndStartedOrRemoved(t *testing.T) {
	r := newKeepingRig(t, true)
	a, b, c := spec("0717_a", "vpc-1", "10.240.0.4", 4), spec("0717_b", "vpc-1", "10.240.0.5", 5), spec("0717_c", "vpc-1", "10.240.0.6", 6)
	// Recorded, and no more.
	if err := r.d.records.write(r.d.space(a.ID), record{ID: a.ID}); err != nil {
		t.Fatal(err)
	}
	// Killed between the file and the namespace behind it.
	if err := r.d.records.write(r.d.space(b.ID), record{ID: b.ID}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(namespace.Directory, r.d.space(b.ID)), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	// With a namespace, but no network.
	if err := r.d.records.write(r.d.space(c.ID), record{ID: c.ID}); err != nil {
		t.Fatal(err)
	}
	ns, err := namespace.Create(r.d.space(c.ID), func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	// And what nobody knows.
	ns, err = namespace.Create(r.d.prefix()+"00000000", func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	ns.Close()
	r.lose()
	r.open(true)
	if got, err := r.d.Found(t.Context()); err != nil || !slices.Equal(got, []string{a.ID, b.ID, c.ID}) {
		t.Errorf("found %v, %v", got, err)
	}
	if left, err := namespace.Named(r.d.prefix() + "00000000"); err != nil || len(left) != 0 {
		t.Errorf("what nobody knows is there: %v, %v", left, err)
	}
	r.start(a).reachesItsOwn()
	if err := r.d.Stop(t.Context(), b.ID, false); err != nil {
		t.Fatal(err)
	}
	r.start(c).reachesItsOwn()
	if got, err := r.d.Found(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("found %v, %v", got, err)
	}
}

func TestARecordThatCannotBeReadKeepsNoOtherMachineFromBeingFound(t *testing.T) {
	r := newKeepingRig(t, true)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := spec("0717_b", "vpc-1", "10.240.0.5", 5)
	for name, text := range map[string]string{r.d.space(b.ID) + ".json": "{", "other.json": "[]", "notes.txt": "x", "half.123.tmp": "{"} {
		if err := os.WriteFile(filepath.Join(r.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r.lose()
	r.open(true)
	if got, err := r.d.Found(t.Context()); err != nil || !slices.Equal(got, []string{a.ID}) {
		t.Errorf("found %v, %v", got, err)
	}
	if err := r.d.Start(t.Context(), b, handlers(b)); err == nil {
		t.Error("a machine was started over a record that can't be read")
	}
	if info, err := os.Stat(r.d.records.path(r.d.space(a.ID))); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the record: %v, %v", info, err)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "half.123.tmp")); err == nil {
		t.Error("what a process was killed over stays")
	}
}

func TestARunningMachineIsUpdated(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	off := a.Machine
	off.Metadata.Enabled = false
	if err := r.d.Update(t.Context(), off); err != nil {
		t.Fatal(err)
	}
	if got, err := a.get("", metadataURL); err == nil {
		t.Errorf("a service that is off says %q", got)
	}
	if err := r.d.Update(t.Context(), a.Machine); err != nil {
		t.Fatal(err)
	}
	a.reachesItsOwn()
	if err := r.d.Update(t.Context(), spec("0717_b", "vpc-1", "10.240.0.5", 5)); err == nil {
		t.Error("a machine that does not run was updated")
	}
}

func TestProgramsThatIPStartsInAMachineFindTheMetadataServiceByName(t *testing.T) {
	r := newRig(t)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	access, _ := r.d.Access(a.ID)
	// The name comes from the resolver: "ip netns exec" shows it alone.
	out, err := exec.Command("ip", "netns", "exec", access.Namespace, "sh", "-c",
		"cat /etc/resolv.conf; curl -sS --noproxy '*' --max-time 5 http://api.metadata.cloud.ibm.com/metadata/v1/instance").CombinedOutput()
	if string(out) != "nameserver 10.240.0.1\nmetadata of 0717_a" {
		t.Errorf("%s, %v", out, err)
	}
}

// agent is the environment variable that makes the test binary a process with a
// driver, to be killed.
const agent = "TABARD_TEST_NETNS_AGENT"

func TestMain(m *testing.M) {
	if at := os.Getenv(agent); at != "" {
		runAgent(at)
	}
	os.Exit(m.Run())
}

// runAgent starts ten machines, says so, and waits for its end.
func runAgent(at string) {
	state, dir, _ := strings.Cut(at, " ")
	err := startTen(state, dir)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	time.Sleep(time.Hour)
}

func ten() []host.Machine {
	var all []host.Machine
	for n := range 10 {
		all = append(all, spec(fmt.Sprintf("0717_%d", n), fmt.Sprintf("vpc-%d", n%3), fmt.Sprintf("10.240.0.%d", 10+n), byte(n)))
	}
	return all
}

func startTen(state, dir string) error {
	r := &rig{state: state, dir: dir}
	if err := r.make(true); err != nil {
		return err
	}
	for _, m := range ten() {
		if err := r.d.Start(context.Background(), m, handlers(m, server)); err != nil {
			return err
		}
	}
	return nil
}

func TestTenMachinesOutliveAProcessThatIsKilled(t *testing.T) {
	r := newKeepingRig(t, true)
	r.lose()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), agent+"="+r.state+" "+r.dir)
	said, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	n, _ := said.Read(line)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	if string(line[:n]) != "ready\n" {
		t.Fatalf("the process says %s", line[:n])
	}
	before := kernelState(t, r.state)
	r.open(true)
	found, err := r.d.Found(t.Context())
	if err != nil || len(found) != 10 {
		t.Errorf("found %v, %v", found, err)
	}
	for _, m := range ten() {
		r.start(m, server).reachesItsOwn()
	}
	if diff := cmp.Diff(before, kernelState(t, r.state)); diff != "" {
		t.Errorf("what there is differs from before:\n%s", diff)
	}
}

// carrier is what the kernel notes of a link in the background.
var carrier = regexp.MustCompile(`<\S*>| state \S+`)

// kernelState is the devices, addresses and routes of all namespaces of a state,
// and the names of their rules' tables and chains.
func kernelState(t *testing.T, state string) []string {
	t.Helper()
	names, err := namespace.Named("tabard-" + state)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, name := range names {
		ns, err := namespace.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range [][]string{{"ip", "-o", "link"}, {"ip", "-4", "-o", "addr"}, {"ip", "route"}, {"nft", "-s", "list", "ruleset"}} {
			err := namespace.Within(ns, func() error {
				out, err := exec.Command(c[0], c[1:]...).Output() // on stderr ip tells of namespaces of others that come and go
				for line := range strings.Lines(string(out)) {
					all = append(all, name+": "+carrier.ReplaceAllString(line, ""))
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		ns.Close()
	}
	slices.Sort(all) // tables and elements come in any order
	return all
}

func TestAKeptMachineThatCannotBeTakenUpGoesOn(t *testing.T) {
	r := newKeepingRig(t, true)
	a := r.start(spec("0717_a", "vpc-1", "10.240.0.4", 4))
	b := r.start(spec("0717_b", "vpc-1", "10.240.0.5", 5))
	r.lose()
	r.open(true)
	before := kernelState(t, r.state)
	h := handlers(a.Machine)
	h.Metadata = nil
	if err := r.d.Start(t.Context(), a.Machine, h); err == nil {
		t.Error("it was taken up without a handler")
	}
	if diff := cmp.Diff(before, kernelState(t, r.state)); diff != "" {
		t.Errorf("what there is differs from before:\n%s", diff)
	}
	a, b = r.start(a.Machine), r.start(b.Machine)
	a.reachesItsOwn()
	var l net.Listener
	err := b.inside(func() (err error) {
		l, err = net.Listen("tcp4", "10.240.0.5:7")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := a.dial("", "10.240.0.5:7", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
