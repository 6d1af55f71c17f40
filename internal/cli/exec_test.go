//go:build linux

package cli

import (
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

func TestACommandRunsInsideALocalInstance(t *testing.T) {
	s := sceneA(t)
	s.login()
	s.answer("GET /v1/instances/"+vmID+"/local_access", item("driver", "local", "environment", item("TABARD_METADATA_URL", "http://127.0.0.1:9", "LD_PRELOAD", "x")))

	script := `read line; echo "$line $TABARD_INSTANCE_ID $TABARD_SERVER $TABARD_METADATA_URL$LD_PRELOAD"; echo on-stderr >&2; exit 7`
	r := runWith(t, strings.NewReader("hello\n"), "is", "instance-exec", "my-instance", "--", "sh", "-c", script).want(7, "on-stderr")
	if want := "hello " + vmID + " " + s.URL + " http://127.0.0.1:9\n"; r.stdout != want {
		t.Errorf("the command saw %q, want %q", r.stdout, want)
	}
	if strings.Contains(r.stderr, "FAILED") {
		t.Errorf("the command's own failure is told twice: %s", r.stderr)
	}
	// Without -- the command's flags are its own as well.
	run(t, "is", "instance-exec", vmID, "echo", "-q", "--output").want(0, "-q --output")
	run(t, "is", "instance-exec", vmID, "--", "sh", "-c", "kill -TERM $$").want(128 + 15)
	run(t, "is", "instance-exec", vmID, "--", "no-such-program").want(1, "no-such-program")
	run(t, "is", "instance-exec", vmID, "--").want(2, "command")
	run(t, "is", "instance-exec", vmID).want(2)
}

func TestACommandWaitsForTheInstanceToRun(t *testing.T) {
	s := sceneA(t)
	s.login()
	s.answer("GET /v1/instances/"+vmID+"/local_access", item("driver", "local"))
	statuses := []string{"pending", "starting", "running"}
	s.answer("GET /v1/instances/"+vmID, func(seen) any {
		status := statuses[0]
		statuses = statuses[1:]
		return item("id", vmID, "status", status)
	})
	run(t, "is", "instance-exec", vmID, "--", "true").want(0)
	for status, says := range map[string]string{"stopped": "tabard is instance-start", "failed": "is failed no host"} {
		s.answer("GET /v1/instances/"+vmID, item("id", vmID, "status", status, "status_reasons", []any{item("message", "no host")}))
		started := time.Now()
		run(t, "is", "instance-exec", vmID, "--", "true").want(1, says)
		if time.Since(started) > 5*time.Second {
			t.Errorf("status %s is waited for", status)
		}
	}
}

func TestANamespaceFromTheServerIsOnlyAName(t *testing.T) {
	s := sceneA(t)
	s.login()
	for _, name := range []string{"", "..", ".", "../../proc/1/ns/net", "/proc/1/ns/net"} {
		s.answer("GET /v1/instances/"+vmID+"/local_access", item("driver", "netns", "namespace", name))
		run(t, "is", "instance-exec", vmID, "--", "true").want(1, "cannot be one")
	}
	s.answer("GET /v1/instances/"+vmID+"/local_access", item("driver", "netns", "namespace", "tabard-absent"))
	run(t, "is", "instance-exec", vmID, "--", "true").want(1, "on the machine that runs it")
	for _, access := range []any{item("driver", "qemu"), item()} {
		s.answer("GET /v1/instances/"+vmID+"/local_access", access)
		run(t, "is", "instance-exec", vmID, "--", "true").want(1, "driver")
	}
}

func TestACommandEntersTheInstancesNetworkAlone(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("entering a network namespace needs root")
	}
	const name = "tabard-cli-test"
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		ns, err := netns.NewNamed(name)
		if err == nil {
			err = ns.Close()
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Skipf("no network namespaces here: %v", err)
	}
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil {
			t.Errorf("remove the namespace: %v", err)
		}
	})
	s := sceneA(t)
	s.login()
	s.answer("GET /v1/instances/"+vmID+"/local_access", item("driver", "netns", "namespace", name))
	// The process's own entry shows its first thread, which may be the one that
	// went away to make the namespace.
	outside, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, "is", "instance-exec", vmID, "--", "readlink", "/proc/self/ns/net").want(0, "net:[")
	if strings.TrimSpace(r.stdout) == outside {
		t.Errorf("the command stayed in %s", outside)
	}
	// Neither the program nor any later command has moved.
	for range 20 {
		now, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil || now != outside {
			t.Fatalf("the program moved to %s, %v", now, err)
		}
	}
	s.answer("GET /v1/profiles", list("profiles"))
	run(t, "iam", "trusted-profiles").want(0)
}
