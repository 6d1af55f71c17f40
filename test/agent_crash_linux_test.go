package test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

// agentProcess is a host agent on this machine.
type agentProcess struct {
	t    *testing.T
	args []string
	mark string // in the names of its namespaces
	log  bytes.Buffer

	cmd  *exec.Cmd
	done chan error
}

func newAgent(s *harness.Server, t *testing.T, name string) *agentProcess {
	t.Helper()
	dir := t.TempDir()
	token := filepath.Join(dir, "join-token")
	s.CLI("host", "create-join-token", name, "--file", token)
	state := filepath.Join(dir, "state")
	sum := sha256.Sum256([]byte(state))
	a := &agentProcess{t: t, mark: "tabard-" + hex.EncodeToString(sum[:4]), args: []string{
		"agent", "--server", s.URL, "--join-token-file", token, "--data-dir", state, "--master-key-file", filepath.Join(dir, "master"),
		"--driver", "netns", "--no-uplink",
	}}
	a.launch()
	t.Cleanup(func() {
		a.end(syscall.SIGTERM)
		for _, ns := range a.namespaces("") { // what a failed test left
			if out, err := exec.Command("ip", "netns", "delete", ns).CombinedOutput(); err != nil {
				t.Errorf("delete %s: %v %s", ns, err, out)
			}
		}
		if t.Failed() {
			t.Logf("log of the agent %s:\n%s", name, &a.log)
		}
	})
	return a
}

func (a *agentProcess) launch() {
	a.t.Helper()
	bin, err := harness.Binary()
	if err != nil {
		a.t.Fatal(err)
	}
	a.cmd = exec.Command(bin, a.args...)
	a.cmd.Stderr, a.cmd.Stdout = &a.log, &a.log
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan<- error) { done <- cmd.Wait() }(a.cmd, a.done)
}

func (a *agentProcess) end(how syscall.Signal) {
	_ = a.cmd.Process.Signal(how)
	<-a.done
}

// namespaces returns the names of those that are the agent's, of one kind.
func (a *agentProcess) namespaces(kind string) []string {
	a.t.Helper()
	entries, err := os.ReadDir("/run/netns")
	if err != nil && !os.IsNotExist(err) {
		a.t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), a.mark+"-"+kind) {
			out = append(out, e.Name())
		}
	}
	return out
}

// askInside asks the metadata service of a namespace's machine, as the machine. ""
// means that there was no answer, or not the one.
func askInside(ns, method, path, field string, header ...string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	args := []string{"netns", "exec", ns, "curl", "-s", "--max-time", "15", "-X", method, "http://169.254.169.254" + path + "?version=2022-03-31"}
	for _, h := range header {
		args = append(args, "-H", h)
	}
	out, err := exec.CommandContext(ctx, "ip", append(args, "-d", "{}")...).Output()
	if err != nil {
		return ""
	}
	var m map[string]any
	if json.Unmarshal(out, &m) != nil {
		return ""
	}
	s, _ := m[field].(string)
	return s
}

func identityInside(ns string) string {
	return askInside(ns, "PUT", "/identity/v1/token", "access_token", "Metadata-Flavor: ibm")
}

func accessInside(ns, identity string) string {
	return askInside(ns, "POST", "/identity/v1/iam_tokens", "access_token", "Authorization: Bearer "+identity)
}

// Promise 2 with the server elsewhere: the hosts' agents and the server are
// killed under load, one after the other. Whatever token an instance holds has
// its event, no event is there twice, and afterwards all instances are served
// as before.
func TestEveryTokenOfAnInstanceHasItsEventWhoeverIsKilled(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, tool := range []string{"ip", "curl"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s here", tool)
		}
	}
	s := harness.Start(t, "--driver", "none")
	s.Login()
	agents := []*agentProcess{newAgent(s, t, "rack1"), newAgent(s, t, "rack2")}
	eventually(t, "both hosts are connected", func() bool { return strings.Count(s.CLI("host", "list"), "connected") == 2 })
	made := instances(t, s, 4)
	var machines []string
	eventually(t, "all machines", func() bool {
		machines = append(agents[0].namespaces("i-"), agents[1].namespaces("i-")...)
		return len(machines) == len(made)
	})
	if len(agents[0].namespaces("i-")) != 2 {
		t.Errorf("the machines are not spread: %v", machines)
	}
	served := func() {
		t.Helper()
		for _, ns := range machines {
			eventually(t, ns+" is served", func() bool {
				identity := identityInside(ns)
				return identity != "" && accessInside(ns, identity) != ""
			})
		}
	}
	served()

	var mu sync.Mutex
	held := map[string]map[string]bool{"is.metadata.jwt-token.create": {}, "iam-identity.computeresource-token.login": {}}
	hold := func(action, token string) {
		if token == "" {
			return
		}
		jti, _ := claimsOf(t, token)["jti"].(string)
		mu.Lock()
		defer mu.Unlock()
		held[action][jti] = true
	}
	stop := make(chan struct{})
	var load sync.WaitGroup
	for _, ns := range machines {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				identity := identityInside(ns)
				hold("is.metadata.jwt-token.create", identity)
				if identity != "" {
					hold("iam-identity.computeresource-token.login", accessInside(ns, identity))
				}
			}
		})
	}
	times := 3
	if os.Getenv("KILLS") != "" {
		times = kills(t)
	}
	for n := range times {
		time.Sleep(time.Duration(300+rand.IntN(700)) * time.Millisecond)
		switch victim := n % 3; victim {
		case 2:
			s.Kill()
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
			s.Launch()
		default:
			agents[victim].end(syscall.SIGKILL)
			time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
			agents[victim].launch()
		}
	}
	close(stop)
	load.Wait()
	s.Login()
	served()
	if again := append(agents[0].namespaces("i-"), agents[1].namespaces("i-")...); strings.Join(again, " ") != strings.Join(machines, " ") {
		t.Errorf("the machines are %v, before %v", again, machines)
	}
	for _, id := range made {
		s.Do("DELETE", "/v1/instances/"+id+vpcQuery, s.OwnerToken(), nil)
	}
	eventually(t, "the end of all machines, and of all that was made for them", func() bool {
		return len(agents[0].namespaces(""))+len(agents[1].namespaces("")) == 0
	})
	// An instance is forgotten after its events have come.
	eventually(t, "the end of all instances", func() bool {
		return strings.Contains(string(s.Do("GET", "/v1/instances"+vpcQuery, s.OwnerToken(), nil).Body), `"instances":[]`)
	})
	for action, tokens := range held {
		events := map[string]bool{}
		recorded := map[string]bool{}
		for _, e := range allEventsOf(t, s, action) {
			if events[e.ID] {
				t.Errorf("the event %s is there twice", e.ID)
			}
			events[e.ID] = true
			jti, _ := e.ResponseData["jti"].(string)
			recorded[jti] = true
		}
		missing := 0
		for jti := range tokens {
			if !recorded[jti] {
				missing++
			}
		}
		t.Logf("%s: %d tokens held, %d events", action, len(tokens), len(events))
		if missing > 0 || len(tokens) == 0 {
			t.Errorf("%s: %d of %d tokens have no event", action, missing, len(tokens))
		}
	}
}

const vpcQuery = "?version=2025-01-01&generation=2"

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatal("it does not come: " + what)
}

// instances makes some in one network, with a profile that they take on.
func instances(t *testing.T, s *harness.Server, n int) (ids []string) {
	t.Helper()
	token := s.OwnerToken()
	post := func(path, body string, field ...string) string {
		t.Helper()
		a := s.Do("POST", path, token, body)
		if a.Status >= 300 {
			t.Fatalf("POST %s: %d %s", path, a.Status, a.Body)
		}
		return a.Field("id")
	}
	v := post("/v1/vpcs"+vpcQuery, `{"name":"v"}`)
	subnet := post("/v1/subnets"+vpcQuery, `{"name":"s","vpc":{"id":"`+v+`"},"zone":{"name":"us-south-1"},"total_ipv4_address_count":32}`)
	profile := post("/v1/profiles", `{"name":"p","account_id":"`+s.Owner.AccountID+`"}`)
	image := s.Do("GET", "/v1/images"+vpcQuery, token, nil).Field("images", "0", "id")
	for i := range n {
		ids = append(ids, post("/v1/instances"+vpcQuery, fmt.Sprintf(`{"name":"vm%d","zone":{"name":"us-south-1"},"vpc":{"id":"%s"},"image":{"id":"%s"},`+
			`"primary_network_interface":{"subnet":{"id":"%s"}},"metadata_service":{"enabled":true},`+
			`"default_trusted_profile":{"auto_link":true,"target":{"id":"%s"}}}`, i, v, image, subnet, profile)))
	}
	return ids
}

// recordedEvent is what tells events and the tokens behind them apart.
type recordedEvent struct {
	ID           string         `json:"id"`
	ResponseData map[string]any `json:"responseData"`
}

func allEventsOf(t *testing.T, s *harness.Server, action string) []recordedEvent {
	t.Helper()
	var all []recordedEvent
	token, start := s.OwnerToken(), ""
	for {
		a := s.Do("GET", "/v1/events?limit=1000&action="+action+"&start="+url.QueryEscape(start), token, nil)
		var page struct {
			Events []recordedEvent
			Next   struct{ Start string }
		}
		if err := json.Unmarshal(a.Body, &page); a.Status != http.StatusOK || err != nil {
			t.Fatalf("%d %s", a.Status, a.Body)
		}
		all = append(all, page.Events...)
		if start = page.Next.Start; start == "" {
			return all
		}
	}
}
