package vm

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/guest"
)

// counted are parts of what the kernel says that change with every packet.
var counted = regexp.MustCompile(`counter packets \d+ bytes \d+`)

// census is all that an agent's machines have on its host: names of namespaces
// and devices, addresses, routes, rules, processes and files.
func (s *site) census(h *node) []string {
	s.t.Helper()
	var out []string
	spaces := []string{h.space}
	for space := range s.spaces(h.mark()) {
		spaces = append(spaces, space)
	}
	slices.Sort(spaces)
	for _, space := range spaces {
		for _, command := range []string{
			"ip -br link", "ip -br addr", "ip -4 route show table all", "ip neigh show proxy", "ip rule", "nft list ruleset",
		} {
			text, err := s.try(space, strings.Fields(command)...)
			if err != nil {
				s.t.Fatal(err)
			}
			for line := range strings.Lines(counted.ReplaceAllString(text, "counter")) {
				out = append(out, space+": "+command+": "+strings.TrimRight(line, "\n"))
			}
		}
	}
	out = append(out, s.processes(h, spaces)...)
	for _, dir := range []string{"namespaces", "vm/machines"} {
		root := filepath.Join(h.dir, dir)
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && path != root {
				out = append(out, "file: "+path)
			}
			return nil
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, h.mark()) || strings.Contains(line, h.dir) {
			out = append(out, "mount: "+strings.Fields(line)[1])
		}
	}
	for _, e := range must(os.ReadDir("/etc/netns")) {
		if strings.HasPrefix(e.Name(), h.mark()) {
			out = append(out, "etc: "+e.Name())
		}
	}
	slices.Sort(out) // chains and devices stand in the order in which they were made
	return out
}

func must[T any](v T, _ error) T { return v }

// processes are those in the namespaces, and those that work on the host's
// files, but for the agent itself. One is told from a later one with its id by
// when it began.
func (s *site) processes(h *node, spaces []string) []string {
	s.t.Helper()
	in := map[string]string{}
	for _, space := range spaces {
		var st syscall.Stat_t
		if err := syscall.Stat("/run/netns/"+space, &st); err != nil {
			s.t.Fatal(err)
		}
		in[fmt.Sprintf("net:[%d]", st.Ino)] = space
	}
	var out []string
	for _, e := range must(os.ReadDir("/proc")) {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || h.agent != nil && pid == h.agent.cmd.Process.Pid {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(line) == 0 {
			continue
		}
		space := in[must(os.Readlink(filepath.Join("/proc", e.Name(), "ns/net")))]
		words := strings.ReplaceAll(strings.TrimRight(string(line), "\x00"), "\x00", " ")
		if space == "" && !strings.Contains(words, h.dir) {
			continue
		}
		stat := string(must(os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))))
		fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
		if len(fields) < 20 || fields[0] == "Z" {
			continue
		}
		out = append(out, fmt.Sprintf("process: %d since %s in %s: %s", pid, fields[19], space, words))
	}
	return out
}

// same compares two censuses.
func same(t *testing.T, what string, before, after []string) {
	t.Helper()
	count := map[string]int{}
	for _, l := range before {
		count[l]++
	}
	for _, l := range after {
		count[l]--
	}
	var diff []string
	for _, l := range slices.Sorted(maps.Keys(count)) {
		switch n := count[l]; {
		case n > 0:
			diff = append(diff, "- "+l)
		case n < 0:
			diff = append(diff, "+ "+l)
		}
	}
	if len(diff) > 0 {
		t.Errorf("%s:\n%s", what, strings.Join(diff, "\n"))
	}
}

// settles waits until the host has what it had at a census.
func (s *site) settles(t *testing.T, h *node, what string, before []string) {
	t.Helper()
	var now []string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if now = s.census(h); slices.Equal(now, before) {
			return
		}
	}
	same(t, what, before, now)
}

// restart has the agent started again after it ended, and returns how long it
// took until all the instances have their identity back.
func (h *node) restart(boxes []*box) time.Duration {
	h.site.t.Helper()
	began := time.Now()
	h.start()
	h.site.served(boxes)
	return time.Since(began)
}

// served waits until the instances get identity tokens, each its own.
func (s *site) served(boxes []*box) {
	s.t.Helper()
	var wg sync.WaitGroup
	failed := make([]string, len(boxes))
	for n, b := range boxes {
		wg.Go(func() {
			failed[n] = "it was not tried"
			for end := time.Now().Add(time.Minute); time.Now().Before(end) && failed[n] != ""; time.Sleep(20 * time.Millisecond) {
				a := b.curl(quick(wantToken(service)...)...)
				failed[n] = ""
				if got := subject(stringField(a.body, "access_token")); got != b.ID {
					failed[n] = a.String()
				}
			}
		})
	}
	wg.Wait()
	for n, why := range failed {
		if why != "" {
			s.t.Errorf("%s has no identity after a minute: %s", boxes[n].Name, why)
		}
	}
}

// pipe is a TCP connection between two places.
type pipe struct{ from, to net.Conn }

func (s *site) pipe(from, to, address string) pipe {
	s.t.Helper()
	var l net.Listener
	err := within(to, func() (err error) {
		l, err = net.Listen("tcp4", ":0")
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	var p pipe
	if p.from, err = dialFrom(from, net.JoinHostPort(address, port), net.Dialer{}); err == nil {
		p.to, err = l.Accept()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		p.from.Close()
		p.to.Close()
	})
	return p
}

// flows checks that what goes in at one end comes out at the other.
func (p pipe) flows(t *testing.T, what string) {
	t.Helper()
	for n, c := range []struct{ in, out net.Conn }{{p.from, p.to}, {p.to, p.from}} {
		word := fmt.Sprintf("%s %d\n", what, n)
		_ = c.out.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(c.in, word); err != nil {
			t.Errorf("the connection %s: %v", what, err)
			return
		}
		if got, err := bufio.NewReader(c.out).ReadString('\n'); err != nil || got != word {
			t.Errorf("the connection %s brings %q, %v", what, got, err)
			return
		}
	}
}

// sleepers starts a process in each instance, which ends with the test.
func (s *site) sleepers(boxes []*box) {
	s.t.Helper()
	for _, b := range boxes {
		p := s.launchIn(b.space, "sleep", "1000")
		s.t.Cleanup(func() {
			_ = p.Kill()
			_, _ = p.Wait()
		})
	}
}

func (s *site) launchIn(space string, words ...string) *os.Process {
	s.t.Helper()
	exe := "/usr/bin/nsenter"
	p, err := os.StartProcess(exe, append([]string{exe, "--net=/run/netns/" + space}, words...), &os.ProcAttr{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.await("it runs in its namespace", func() bool {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Pid))
		return err == nil && strings.HasPrefix(string(line), words[0])
	})
	return p
}

// A hypervisor host whose agent is killed at any moment loses no instance, and
// keeps nothing that belongs to none.
func TestAnAgentThatIsKilledLeavesItsInstancesRunningAndNothingElse(t *testing.T) {
	key, image := guest.NewKey(t), guest.Image(t)
	s := newSite(t, 1, "--driver", "qemu,netns", "--accel", "tcg")
	h := s.hosts[0]
	empty := s.census(h)
	s.prepare(image, key)
	var names []string
	for n := range 10 {
		names = append(names, fmt.Sprintf("box-%d", n))
	}
	data := s.write("user-data", []byte("#cloud-config\nwrite_files:\n- path: /root/ca.pem\n  content: |\n"+indent(s.must("cat", s.dir+"/ca.pem"), "    ")))
	vm := s.boot("machine", key, "--user-data", "@"+data)
	boxes := s.boxes(names...)
	vm.wait()
	s.sleepers(boxes)
	inside := s.pipe(boxes[0].space, boxes[1].space, boxes[1].address())
	outside := s.pipe(boxes[2].space, s.core, "10.99.0.1")
	inside.flows(t, "before")
	outside.flows(t, "before")
	pid := strings.TrimSpace(vm.run("sleep 1000 >/dev/null 2>&1 & echo $!"))
	boot := vm.run("cat /proc/sys/kernel/random/boot_id")
	full := s.census(h)

	unharmed := func(t *testing.T) {
		t.Helper()
		same(t, "after the restart the host differs", full, s.census(h))
		inside.flows(t, "between two instances")
		outside.flows(t, "from an instance to the world outside")
		if got := vm.run("cat /proc/sys/kernel/random/boot_id"); got != boot {
			t.Error("the virtual machine has started anew")
		}
		vm.run("kill -0 " + pid)
		vm.play()
		boxes[3].works(t)
		for _, b := range boxes {
			if got := s.instance(b.Name).Status; got != "running" {
				t.Errorf("%s is %s", b.Name, got)
			}
		}
	}
	s.sub("what runs inside goes on while there is no agent", func(t *testing.T) {
		h.kill()
		inside.flows(t, "between two instances")
		outside.flows(t, "from an instance to the world outside")
		vm.run("kill -0 " + pid)
		same(t, "without its agent the host differs", full, s.census(h))
		t.Logf("after kill -9 with ten namespaces and a virtual machine, all have their identity again %s after the agent's start", h.restart(boxes).Round(time.Millisecond))
		s.await("the virtual machine has its identity again", func() bool {
			out, err := vm.try(identityCall)
			return err == nil && strings.Contains(out, "access_token")
		})
		s.connected(h)
		unharmed(t)
	})
	s.sub("nor does a stop in good order end anything", func(t *testing.T) {
		s.stop(h.name, h.agent)
		same(t, "without its agent the host differs", full, s.census(h))
		h.restart(boxes)
		s.connected(h)
		unharmed(t)
	})
	s.sub("killed many times in a row it loses nothing", func(t *testing.T) {
		h.kill()
		for range 5 {
			h.start()
			time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
			h.kill()
		}
		h.restart(boxes)
		s.connected(h)
		unharmed(t)
	})
	s.sub("killed while instances are made and deleted it finishes both", func(t *testing.T) {
		for n := range 10 {
			name := fmt.Sprintf("brief-%d", n)
			s.ask(name)
			pause := time.Duration(rand.IntN(300)) * time.Millisecond
			time.Sleep(pause)
			h.kill()
			h.start()
			b := s.boxNamed(name)
			s.served([]*box{b})
			s.cli("is", "instance-delete", "-f", name)
			gone := time.Duration(rand.IntN(100)) * time.Millisecond
			time.Sleep(gone)
			h.kill()
			h.start()
			s.await("it is gone", func() bool { return !strings.Contains(s.cli("is", "instances", "--output", "json"), b.ID) })
			if t.Failed() {
				t.Fatalf("killed %s after it was asked for and %s after it was deleted", pause, gone)
			}
		}
		s.served(boxes)
		s.connected(h)
		s.settles(t, h, "after all this the host differs", full)
		unharmed(t)
	})
	s.sub("killed before an instance runs that is deleted then, it keeps nothing of it", func(t *testing.T) {
		for n := range 5 {
			name := fmt.Sprintf("short-%d", n)
			s.ask(name)
			time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
			h.kill()
			s.cli("is", "instance-delete", "-f", name)
			h.start()
			s.await("it is gone", func() bool { return !strings.Contains(s.cli("is", "instances", "--output", "json"), `"`+name+`"`) })
		}
		s.connected(h)
		s.settles(t, h, "after all this the host differs", full)
	})
	s.sub("with all instances deleted the host is as it was before the first", func(t *testing.T) {
		inside.from.Close()
		inside.to.Close()
		outside.from.Close()
		outside.to.Close()
		for _, p := range s.processes(h, slices.Sorted(maps.Keys(s.spaces(h.mark()+"-i-")))) {
			var id int
			if _, err := fmt.Sscanf(p, "process: %d", &id); err == nil && strings.HasSuffix(p, "sleep 1000") {
				_ = syscall.Kill(id, syscall.SIGKILL)
			}
		}
		s.cli(append([]string{"is", "instance-delete", "-f", "machine"}, names...)...)
		s.await("they are gone", func() bool { return strings.TrimSpace(s.cli("is", "instances", "--output", "json")) == "[]" })
		s.settles(t, h, "the host differs", empty)
	})
}

// Neither an agent without its server nor a server that was killed loses what
// was placed, or what was recorded.
func TestAServerThatIsKilledIsMissedOnlyForWhatNeedsIt(t *testing.T) {
	s := newSite(t, 1, "--driver", "netns")
	s.furnish()
	h := s.hosts[0]
	boxes := s.boxes("box-0", "box-1")
	tokens := 0
	identity := func() string {
		tokens++
		return boxes[0].identity(600)
	}
	away := func() {
		_ = s.server.cmd.Process.Kill()
		<-s.server.done
	}
	without := func(t *testing.T) {
		t.Helper()
		token := identity()
		if a := boxes[0].read(token); a.status != 200 || stringField(a.body, "id") != boxes[0].ID {
			t.Errorf("without the server, metadata: %s", a)
		}
		a := boxes[0].curl("-D", "-", "-X", "POST", service+iamPath, "-H", "Authorization: Bearer "+token)
		if a.status != 503 || !strings.Contains(strings.ToLower(a.body), "retry-after:") {
			t.Errorf("without the server, an access token: %s", a)
		}
		if a := boxes[1].read(token); a.status != 401 {
			t.Errorf("without the server, another's metadata: %s", a)
		}
	}
	full := s.census(h)

	s.sub("while it is away, identity and metadata are served", func(t *testing.T) {
		away()
		without(t)
	})
	s.sub("also by an agent that is killed and started meanwhile", func(t *testing.T) {
		h.kill()
		h.start()
		s.await("the identity is back", func() bool {
			a := boxes[0].curl(quick(service + "/")...)
			return a.status != 0
		})
		without(t)
		same(t, "the host differs", full, s.census(h))
	})
	s.sub("when it is back, so is all that was recorded meanwhile", func(t *testing.T) {
		s.startServer()
		s.connected(h)
		token := identity()
		s.await("access tokens are served", func() bool { return boxes[0].exchange(token).status == 200 })
		s.await("the events have come", func() bool {
			var events []struct {
				Action, Outcome string
				Initiator       struct {
					AuthnID string `json:"authnId"`
				}
			}
			s.json(&events, "activity", "events", "--limit", "1000")
			n := 0
			for _, e := range events {
				if e.Action == "is.metadata.jwt-token.create" && e.Outcome == "success" && e.Initiator.AuthnID == "crn-"+boxes[0].CRN {
					n++
				}
			}
			if n > tokens {
				t.Fatalf("%d tokens were given out, %d are recorded", tokens, n)
			}
			return n == tokens
		})
		same(t, "the host differs", full, s.census(h))
	})
	s.sub("killed while instances are asked for, it keeps what it accepted", func(t *testing.T) {
		for n := range 5 {
			name := fmt.Sprintf("brief-%d", n)
			done := make(chan error, 1)
			go func() {
				_, err := s.tryCLI("is", "instance-create", name, "my-vpc", "us-south-3", "bx2-2x8", "my-subnet", "--image", "tabard-local-1",
					"--metadata-service", "true", "--default-trusted-profile", "my-trusted-profile")
				done <- err
			}()
			time.Sleep(time.Duration(50+rand.IntN(400)) * time.Millisecond)
			away()
			err := <-done
			s.startServer()
			s.connected(h)
			there := strings.Contains(s.cli("is", "instances", "--output", "json"), `"`+name+`"`)
			if err == nil && !there {
				t.Errorf("%s was accepted and is gone", name)
			}
			if there {
				b := s.boxNamed(name)
				b.works(t)
				s.cli("is", "instance-delete", "-f", name)
				s.await("it is gone", func() bool { return !strings.Contains(s.cli("is", "instances", "--output", "json"), b.ID) })
			}
		}
		s.served(boxes)
		s.settles(t, h, "after all this the host differs", full)
	})
}
