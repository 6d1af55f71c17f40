package test

import (
	"bufio"
	"compress/gzip"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tabard.dev/tabard/test/harness"
)

const exportSecret = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

// peer is where a route leads.
type peer struct {
	name     string
	settings string          // in the file of routes
	got      func() []string // the ids of the events that arrived, in their order, perhaps some twice
}

// hooks is a receiver of webhooks that can be cut off, slow or away.
type hooks struct {
	t      *testing.T
	server *httptest.Server
	mu     sync.Mutex
	ids    []string
	cut    float64 // how many of the requests are cut off
	slow   time.Duration
}

func (h *hooks) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if rand.Float64() < h.cut {
		_, _ = io.CopyN(io.Discard, r.Body, 100)
		panic(http.ErrAbortHandler)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	time.Sleep(h.slow)
	key, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(exportSecret, "whsec_"))
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", r.Header.Get("webhook-id"), r.Header.Get("webhook-timestamp"), body)
	if r.Header.Get("webhook-signature") != "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)) {
		h.t.Errorf("a signature is wrong: %v", r.Header)
	}
	var events []struct{ ID string }
	if err := json.Unmarshal(body, &events); err != nil {
		h.t.Errorf("a body is no list of events: %v", err)
	}
	h.mu.Lock()
	for _, e := range events {
		h.ids = append(h.ids, e.ID)
	}
	h.mu.Unlock()
	if rand.Float64() < h.cut { // taken, and the sender does not get to know
		panic(http.ErrAbortHandler)
	}
}

func (h *hooks) got() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ids)
}

// listen begins to take requests at an address.
func (h *hooks) listen(l net.Listener) {
	h.server = httptest.NewUnstartedServer(h)
	h.server.Listener.Close()
	h.server.Listener = l
	h.server.Config.ErrorLog = nil
	h.server.StartTLS()
	h.t.Cleanup(h.server.Close)
}

func listener(t *testing.T, address string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (h *hooks) settings(dir, address string) string {
	return fmt.Sprintf("webhook: {url: 'https://%s/hook', secret_file: '%s/secret', tls: {ca_file: '%s/ca.pem', server_name: example.com}}", address, dir, dir)
}

// syslogPeer is a real rsyslogd.
type syslogPeer struct {
	t         *testing.T
	dir, port string
	cmd       *exec.Cmd
}

func newSyslogPeer(t *testing.T) *syslogPeer {
	_, port, _ := net.SplitHostPort(freeAddress(t))
	s := &syslogPeer{t: t, dir: t.TempDir(), port: port}
	write(t, filepath.Join(s.dir, "conf"), fmt.Appendf(nil, `global(workDirectory=%q maxMessageSize="128k")
module(load="imtcp")
input(type="imtcp" port=%q address="127.0.0.1")
template(name="raw" type="string" string="%%rawmsg%%\n")
action(type="omfile" file=%q template="raw")
`, s.dir, port, filepath.Join(s.dir, "out")))
	t.Cleanup(s.kill)
	s.start()
	return s
}

func (s *syslogPeer) start() {
	s.t.Helper()
	pid := filepath.Join(s.dir, "pid")
	_ = os.Remove(pid)
	s.cmd = exec.Command("/usr/sbin/rsyslogd", "-n", "-f", filepath.Join(s.dir, "conf"), "-i", pid)
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *syslogPeer) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

var syslogID = regexp.MustCompile(`^<\d+>1 [^\[]*\[tabard@32473 id="([^"]*)"`)

func (s *syslogPeer) got() []string {
	b, err := os.ReadFile(filepath.Join(s.dir, "out"))
	if err != nil {
		return nil
	}
	var ids []string
	for line := range strings.Lines(string(b)) {
		if m := syslogID.FindStringSubmatch(line); m != nil { // a daemon that is killed leaves half a line
			ids = append(ids, m[1])
		}
	}
	return ids
}

// fileIDs reads the events of a file and of what was rotated from it.
func fileIDs(t *testing.T, path string) (ids []string) {
	t.Helper()
	rotated, err := filepath.Glob(path + ".*-*")
	if err != nil {
		t.Fatal(err)
	}
	rotated = slices.DeleteFunc(rotated, func(n string) bool { return strings.HasSuffix(n, ".part") || slices.Contains(rotated, n+".gz") })
	number := func(name string) int {
		n, _ := strconv.Atoi(strings.TrimSuffix(name[strings.LastIndexByte(name, '-')+1:], ".gz"))
		return n
	}
	slices.SortFunc(rotated, func(a, b string) int { return number(a) - number(b) })
	for _, name := range append(rotated, path) {
		f, err := os.Open(name)
		if os.IsNotExist(err) {
			return nil // being rotated or compressed
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var r io.Reader = f
		if strings.HasSuffix(name, ".gz") {
			if r, err = gzip.NewReader(f); err != nil {
				t.Fatal(err)
			}
		}
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e struct{ ID string }
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				if name == path {
					break // being written
				}
				t.Fatalf("%s: %q: %v", name, lines.Bytes(), err)
			}
			ids = append(ids, e.ID)
		}
	}
	return ids
}

// routeStatus is what the tests look at.
type routeStatus struct {
	Name, State  string
	BehindEvents int64 `json:"behind_events"`
	Lost         int64
	LastError    string `json:"last_error"`
}

func routesOf(s *harness.Server) map[string]routeStatus {
	s.T.Helper()
	var all []routeStatus
	s.JSON(&all, "activity", "routes")
	out := map[string]routeStatus{}
	for _, r := range all {
		out[r.Name] = r
	}
	return out
}

// logIDs returns the ids of all events, in the order of the log.
func logIDs(s *harness.Server) (ids []string) {
	s.T.Helper()
	token := s.OwnerToken()
	for from := int64(0); ; {
		a := s.Do("GET", fmt.Sprintf("/v1/events/log?limit=5000&from=%d", from), token, nil)
		if a.Status != http.StatusOK {
			s.T.Fatalf("%d %s", a.Status, a.Body)
		}
		n := 0
		for line := range strings.Lines(string(a.Body)) {
			var item struct{ Index *int64 }
			if err := json.Unmarshal([]byte(line), &item); err != nil {
				s.T.Fatalf("%q: %v", line, err)
			}
			if item.Index == nil {
				continue
			}
			id := documentID.FindStringSubmatch(line)
			if id == nil {
				s.T.Fatalf("no id in %q", line)
			}
			ids, from, n = append(ids, id[1]), *item.Index+1, n+1
		}
		if n == 0 {
			return ids
		}
	}
}

var documentID = regexp.MustCompile(`{\\?"id\\?":\\?"([^"\\]*)\\?"`)

// Many targets at once, of which one is cut off, one is slow, one dies and one
// comes late, and a server that is killed: everything arrives everywhere, in
// the log's order, and tokens go on.
func TestEventsReachEveryTargetWhateverHappensOnTheWay(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), []byte(exportSecret))
	cut, slow, late := &hooks{t: t, cut: 0.2}, &hooks{t: t, slow: 100 * time.Millisecond}, &hooks{t: t}
	cut.listen(listener(t, "127.0.0.1:0"))
	slow.listen(listener(t, "127.0.0.1:0"))
	lateAddress := freeAddress(t)
	write(t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cut.server.Certificate().Raw}))
	events := filepath.Join(dir, "events.jsonl")
	peers := []peer{
		{"archive", fmt.Sprintf("file: {path: '%s', max_size: 512KiB, gzip: true}", events), func() []string { return fileIDs(t, events) }},
		{"cut", cut.settings(dir, cut.server.Listener.Addr().String()), cut.got},
		{"slow", slow.settings(dir, slow.server.Listener.Addr().String()), slow.got},
		{"late", late.settings(dir, lateAddress), late.got},
	}
	var daemon *syslogPeer
	if _, err := os.Stat("/usr/sbin/rsyslogd"); err == nil {
		daemon = newSyslogPeer(t)
		peers = append(peers, peer{"syslog", fmt.Sprintf("syslog: {transport: tcp, address: '127.0.0.1:%s'}", daemon.port), daemon.got})
	}
	file := filepath.Join(dir, "routes.yaml")
	text := "routes:\n"
	for _, p := range peers {
		text += fmt.Sprintf("  - name: %s\n    %s\n", p.name, p.settings)
	}
	write(t, file, []byte(text))

	b := &sceneB{Server: harness.Start(t, "--driver", "none", "--activity-routes", file), issuer: harness.NewIssuer(t)}
	if out := b.CLI("activity", "routes-check", file); !strings.Contains(out, "archive") || strings.Contains(out, "/hook") {
		t.Errorf("said %s", out)
	}
	b.Login()
	b.CLI("ks", "cluster-register", "my-cluster", "--issuer", b.issuer.URL, "--ca-file", b.issuer.CAFile)
	var cluster struct{ CRN string }
	b.JSON(&cluster, "ks", "cluster-get", "my-cluster")
	b.CLI("iam", "trusted-profile-create", "pod")
	b.CLI("iam", "trusted-profile-link-create", "pod", "--name", "web", "--cr-type", "IKS_SA", "--link-crn", cluster.CRN, "--link-namespace", "shop", "--link-name", "web")

	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {b.issuer.Token("shop", "web")}, "profile_name": {"pod"}}.Encode()
	tokens := 0
	for round := range 3 {
		tokens += underLoad(b, form, 1500*time.Millisecond, func() {
			if round == 1 && daemon != nil {
				daemon.kill()
			}
		})
		if round == 1 {
			if r := routesOf(b.Server)["late"]; r.State != "failing" || r.LastError == "" || r.BehindEvents == 0 {
				t.Errorf("the one that is not there: %+v", r)
			}
			if a := b.Do("GET", "/metrics", "", nil); !strings.Contains(string(a.Body), `tabard_export_up{kind="webhook",route="late"} 0`) {
				t.Error("the metrics do not show it")
			}
		}
		if round < 2 {
			b.Kill()
			b.Launch()
		}
	}
	late.listen(listener(t, lateAddress))
	if daemon != nil {
		daemon.start()
	}
	if tokens == 0 {
		t.Fatal("there were no tokens")
	}
	waitForRoutes(b.Server, peers)
	want := logIDs(b.Server)
	t.Logf("%d tokens, %d events", tokens, len(want))
	for _, p := range peers {
		var once []string
		for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(100 * time.Millisecond) {
			got := p.got()
			if once = firsts(got); len(once) >= len(want) {
				t.Logf("%s: %d events more than once", p.name, len(got)-len(once))
				break
			}
		}
		for i, id := range want {
			if i >= len(once) || once[i] != id {
				t.Errorf("%s: %d of %d events, and in place %d not the one of the log", p.name, len(once), len(want), i)
				break
			}
		}
	}
	b.CLI("activity", "verify")
}

// underLoad exchanges tokens for a while, does something in the middle, and
// returns how many there were.
func underLoad(b *sceneB, form string, d time.Duration, middle func()) (tokens int) {
	var mu sync.Mutex
	stop := make(chan struct{})
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := http.Post(b.URL+"/identity/token", "application/x-www-form-urlencoded", strings.NewReader(form))
				if err != nil {
					b.T.Errorf("a token: %v", err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					b.T.Errorf("a token: status %d", resp.StatusCode)
					return
				}
				mu.Lock()
				tokens++
				mu.Unlock()
			}
		})
	}
	time.Sleep(d / 2)
	middle()
	time.Sleep(d / 2)
	close(stop)
	workers.Wait()
	return tokens
}

// waitForRoutes waits until every route has come to the log's end.
func waitForRoutes(s *harness.Server, peers []peer) {
	s.T.Helper()
	var all map[string]routeStatus
	for limit := time.Now().Add(90 * time.Second); time.Now().Before(limit); time.Sleep(200 * time.Millisecond) {
		all = routesOf(s)
		done := len(all) == len(peers)
		for _, r := range all {
			done = done && r.State == "ok" && r.BehindEvents == 0 && r.Lost == 0
		}
		if done {
			return
		}
	}
	s.T.Fatalf("the routes do not come to the end: %+v", all)
}

// firsts returns each id when it came first.
func firsts(ids []string) (out []string) {
	seen := map[string]bool{}
	for _, id := range ids {
		if !seen[id] {
			out = append(out, id)
		}
		seen[id] = true
	}
	return out
}

// The file of routes is read again on SIGHUP; a broken one changes nothing.
func TestTheRoutesCanBeChangedWhileTheServerRuns(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "routes.yaml")
	one := func(name string) string {
		return fmt.Sprintf("  - {name: %s, match: {actions: ['iam-identity.account-profile.*']}, file: {path: '%s/%s.jsonl'}}\n", name, dir, name)
	}
	write(t, file, []byte("routes:\n"+one("first")))
	s := harness.Start(t, "--driver", "none", "--activity-routes", file)
	s.Login()
	s.CLI("iam", "trusted-profile-create", "one")
	arrived := func(name string, n int) {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); len(fileIDs(t, filepath.Join(dir, name+".jsonl"))) < n; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%s has %d events, want %d\n%s", name, len(fileIDs(t, filepath.Join(dir, name+".jsonl"))), n, s.Log())
			}
		}
	}
	arrived("first", 1)
	write(t, file, []byte("routes:\n"+one("first")+one("second")))
	s.Signal(syscall.SIGHUP)
	arrived("second", 1)
	write(t, file, []byte("routes:\n"+one("first")+one("first")))
	s.Signal(syscall.SIGHUP)
	for limit := time.Now().Add(20 * time.Second); !strings.Contains(s.Log(), "stay as they were"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("a broken file was not complained about")
		}
	}
	s.CLI("iam", "trusted-profile-create", "two")
	arrived("first", 2)
	arrived("second", 2)
	if ids := fileIDs(t, filepath.Join(dir, "first.jsonl")); len(ids) != 2 {
		t.Errorf("a reload delivered again: %v", ids)
	}
	if r := s.Run("activity", "routes-check", file); r.Code != 1 || !strings.Contains(r.Err, "another one") {
		t.Errorf("the check says %d %s", r.Code, r.Err)
	}
	var created []harness.Event
	s.JSON(&created, "activity", "events", "--action", "activity.route.create")
	if len(created) != 2 {
		t.Errorf("%d events about new routes", len(created))
	}
}
