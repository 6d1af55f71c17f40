package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tabard.dev/tabard/internal/host"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/server"
	"tabard.dev/tabard/internal/token"
)

// installation is a server that can be stopped and started, and a directory for
// an agent.
type installation struct {
	t       *testing.T
	dir     string
	address string
	key     string // the owner's API key
	stop    func()
}

func install(t *testing.T) *installation {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	in := &installation{t: t, dir: t.TempDir(), address: l.Addr().String()}
	l.Close()
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	in.start()
	t.Cleanup(func() { in.stop() })
	b, err := os.ReadFile(filepath.Join(in.dir, "server", "owner.json"))
	if err != nil {
		t.Fatal(err)
	}
	var o struct {
		APIKey string `json:"apikey"`
	}
	if err := json.Unmarshal(b, &o); err != nil || o.APIKey == "" {
		t.Fatalf("owner %s, error %v", b, err)
	}
	in.key = o.APIKey
	return in
}

func (in *installation) url() string { return "http://" + in.address }

func (in *installation) start() {
	in.t.Helper()
	s, err := server.Open(in.t.Context(), server.Config{
		DataDir: filepath.Join(in.dir, "server"), Listen: []string{in.address}, Driver: server.DriverNone, Account: "Test", Log: quiet,
	})
	if err != nil {
		in.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	in.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			in.t.Error(err)
		}
	})
}

// call makes a request as the owner.
func (in *installation) call(method, path, body string) map[string]any {
	in.t.Helper()
	resp, err := http.PostForm(in.url()+"/identity/token", url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {in.key}})
	if err != nil {
		in.t.Fatal(err)
	}
	var login struct {
		AccessToken string `json:"access_token"`
	}
	err = json.NewDecoder(resp.Body).Decode(&login)
	resp.Body.Close()
	if err != nil {
		in.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(in.t.Context(), method, in.url()+path, strings.NewReader(body))
	if err != nil {
		in.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+login.AccessToken)
	status, answer := ask(in.t, req)
	if status >= 300 {
		in.t.Fatalf("%s %s: %d %s", method, path, status, answer)
	}
	var out map[string]any
	if err := json.Unmarshal(answer, &out); err != nil && len(answer) > 0 {
		in.t.Fatal(err)
	}
	return out
}

func ask(t *testing.T, req *http.Request) (int, []byte) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, b
}

// joinToken writes a join token into a file.
func (in *installation) joinToken(body string) string {
	in.t.Helper()
	secret := in.call("POST", "/v1/hosts/join_tokens", body)["join_token"].(string)
	f, err := os.CreateTemp(in.dir, "join-token")
	if err != nil {
		in.t.Fatal(err)
	}
	if _, err := f.WriteString(secret + "\n"); err != nil {
		in.t.Fatal(err)
	}
	f.Close()
	return f.Name()
}

const vpcVersion = "?version=2025-01-01&generation=2"

const secretData = "#cloud-config password: correct horse battery staple"

// machine makes an instance that trusts a profile by default.
func (in *installation) machine(name string) (id string) {
	in.t.Helper()
	ref := func(m map[string]any) string { return m["id"].(string) }
	account := in.call("GET", "/v1/accounts", "")
	_ = account
	v := ref(in.call("POST", "/v1/vpcs"+vpcVersion, `{"name":"`+name+`"}`))
	subnet := ref(in.call("POST", "/v1/subnets"+vpcVersion, `{"name":"`+name+`","vpc":{"id":"`+v+`"},"zone":{"name":"us-south-1"},"total_ipv4_address_count":16}`))
	image := ref(in.call("GET", "/v1/images"+vpcVersion, "")["images"].([]any)[0].(map[string]any))
	profile := ref(in.call("POST", "/v1/profiles", `{"name":"`+name+`","account_id":"`+in.account()+`"}`))
	return ref(in.call("POST", "/v1/instances"+vpcVersion, `{"name":"`+name+`","zone":{"name":"us-south-1"},"vpc":{"id":"`+v+`"},"image":{"id":"`+image+`"},`+
		`"primary_network_interface":{"subnet":{"id":"`+subnet+`"}},"metadata_service":{"enabled":true},"user_data":"`+secretData+`",`+
		`"default_trusted_profile":{"auto_link":true,"target":{"id":"`+profile+`"}}}`))
}

func (in *installation) account() string {
	in.t.Helper()
	b, err := os.ReadFile(filepath.Join(in.dir, "server", "owner.json"))
	if err != nil {
		in.t.Fatal(err)
	}
	var o struct {
		AccountID string `json:"account_id"`
	}
	if err := json.Unmarshal(b, &o); err != nil || o.AccountID == "" {
		in.t.Fatalf("owner %s, error %v", b, err)
	}
	return o.AccountID
}

// eventIDs returns the events of an action, by id.
func (in *installation) eventIDs(action string) []string {
	in.t.Helper()
	var out []string
	for _, e := range in.call("GET", "/v1/events?limit=200&action="+action, "")["events"].([]any) {
		out = append(out, e.(map[string]any)["id"].(string))
	}
	return out
}

// listeners is a driver whose machines are listeners. What it serves comes from
// the machine's address, as with a real one.
type listeners struct {
	mu      sync.Mutex
	running map[string]*httptest.Server
}

func (l *listeners) Name() string                            { return "listeners" }
func (l *listeners) Found(context.Context) ([]string, error) { return nil, nil }
func (l *listeners) Update(context.Context, host.Machine) error {
	return nil
}
func (l *listeners) Ended() <-chan string              { return nil }
func (l *listeners) Access(string) (host.Access, bool) { return host.Access{}, false }

func (l *listeners) Start(_ context.Context, m host.Machine, h host.Handlers) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running[m.ID] = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.RemoteAddr = m.Interfaces[0].Address.String() + ":4000"
		r.Host = "169.254.169.254"
		h.Metadata.ServeHTTP(w, r)
	}))
	return nil
}

func (l *listeners) Stop(_ context.Context, id string, _ bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.running[id]; s != nil {
		s.Close()
	}
	delete(l.running, id)
	return nil
}

func (l *listeners) Delete(ctx context.Context, id string) error { return l.Stop(ctx, id, true) }

func (l *listeners) Close() error {
	for _, id := range slices.Collect(maps.Keys(l.running)) {
		_ = l.Stop(context.Background(), id, true)
	}
	return nil
}

func (l *listeners) at(id string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s := l.running[id]; s != nil {
		return s.URL
	}
	return ""
}

// config is an agent's.
func (in *installation) config(joinToken string, d *listeners) Config {
	return Config{
		Server: in.url(), Dir: filepath.Join(in.dir, "agent"), JoinToken: joinToken, Master: token.MasterKey{File: filepath.Join(in.dir, "master", "key")},
		Log: quiet, Version: "test",
		Drivers: func(context.Context, Environment) (host.Driver, link.Capacity, error) {
			return d, link.Capacity{Drivers: []string{"netns"}, VCPUs: 2, MemoryMiB: 2048}, nil
		},
	}
}

// run lets an agent work until the returned function.
func (in *installation) run(cfg Config) (a *Agent, stop func()) {
	in.t.Helper()
	a, err := Open(in.t.Context(), cfg)
	if err != nil {
		in.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			in.t.Error(err)
		}
	})
	in.t.Cleanup(stop)
	return a, stop
}

const patience = 30 * time.Second

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatal("it does not come: " + what)
}

// identityToken asks the metadata service at a URL.
func identityToken(t *testing.T, at string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, at+"/identity/v1/token?version=2022-03-31", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Metadata-Flavor", "ibm")
	status, b := ask(t, req)
	var m struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(b, &m); err != nil || status != 200 {
		t.Fatalf("%d %s", status, b)
	}
	return m.AccessToken
}

func iamToken(t *testing.T, at, identityToken string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, at+"/identity/v1/iam_tokens?version=2022-03-31", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+identityToken)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, b
}

func TestAHostServesItsInstancesWhoeverIsAway(t *testing.T) {
	in := install(t)
	d := &listeners{running: map[string]*httptest.Server{}}
	file := in.joinToken(`{"name":"rack1"}`)
	cfg := in.config(file, d)
	a, stopAgent := in.run(cfg)
	eventually(t, "the host is connected", a.Connected)
	id := in.machine("one")
	eventually(t, "the machine", func() bool { return d.at(id) != "" })
	eventually(t, "the report of it", func() bool {
		return in.call("GET", "/v1/instances/"+id+vpcVersion, "")["status"] == "running"
	})
	eventually(t, "the host hears that it runs", func() bool {
		p, ok := a.world.Placement(id)
		return ok && p.Instance.Status == "running"
	})
	given := 1
	if resp, b := iamToken(t, d.at(id), identityToken(t, d.at(id))); resp.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", resp.StatusCode, b)
	}
	access, err := a.client.access(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is placed here is kept", func() bool { return a.state.has(placementsFile) })
	in.nothingInClear(cfg, file, access)

	// The server goes away.
	in.stop()
	eventually(t, "the host notices", func() bool { return !a.Connected() })
	identity := identityToken(t, d.at(id))
	given++
	resp, b := iamToken(t, d.at(id), identity)
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("without the server: %d %v %s", resp.StatusCode, resp.Header, b)
	}
	// Then the agent does, and comes back first. The file with the join token is
	// still there.
	stopAgent()
	a, stopAgent = in.run(cfg)
	eventually(t, "the machine, without the server", func() bool { return d.at(id) != "" })
	identity = identityToken(t, d.at(id))
	given++

	in.start()
	eventually(t, "the host is connected again", a.Connected)
	eventually(t, "access tokens", func() bool {
		resp, _ := iamToken(t, d.at(id), identity)
		return resp.StatusCode == http.StatusOK
	})
	eventually(t, "the events", func() bool { return a.outbox.Waiting() == 0 })
	ids := in.eventIDs("is.metadata.jwt-token.create")
	slices.Sort(ids)
	if n := len(slices.Compact(ids)); n != given || len(ids) != given {
		t.Errorf("%d tokens were given out, %d events are in the log, %d of them different", given, len(ids), n)
	}

	// What is deleted is gone here and there, and its events are not.
	identityToken(t, d.at(id))
	in.call("DELETE", "/v1/instances/"+id+vpcVersion, "")
	eventually(t, "the end of the machine", func() bool { return d.at(id) == "" })
	eventually(t, "the end of the instance", func() bool {
		return len(in.call("GET", "/v1/instances"+vpcVersion, "")["instances"].([]any)) == 0
	})
	if n := len(in.eventIDs("is.metadata.jwt-token.create")); n != given+1 {
		t.Errorf("%d events, want %d", n, given+1)
	}
	stopAgent()
	in.nothingInClear(cfg, file, access)
}

// nothingInClear looks through all that an agent has written.
func (in *installation) nothingInClear(cfg Config, joinToken string, more ...string) {
	in.t.Helper()
	secret, err := os.ReadFile(joinToken)
	if err != nil {
		in.t.Fatal(err)
	}
	s, err := openState(in.t.Context(), cfg.Dir, cfg.Master, "")
	if err != nil {
		in.t.Fatal(err)
	}
	key, err := s.key()
	if err != nil {
		in.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		in.t.Fatal(err)
	}
	needles := map[string][]byte{
		"the key": der, "the key's exponent": key.D.Bytes(), "a prime of the key": key.Primes[0].Bytes(),
		"the key in PEM": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})[30:90], "a private key": []byte("PRIVATE KEY"),
		"the join token": bytes.TrimSpace(secret), "user data": []byte("correct horse"),
	}
	for n, v := range more {
		needles[fmt.Sprint("secret ", n)] = []byte(v)
	}
	err = filepath.WalkDir(cfg.Dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			in.t.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
		if e.IsDir() {
			return nil
		}
		b, err := os.ReadFile(path)
		for what, v := range needles {
			if bytes.Contains(b, v) {
				in.t.Errorf("%s holds %s in clear", path, what)
			}
		}
		return err
	})
	if err != nil {
		in.t.Fatal(err)
	}
}

func TestAJoinWhoseAnswerWasLostIsMadeAgain(t *testing.T) {
	in := install(t)
	target, err := url.Parse(in.url())
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	var lost atomic.Int32
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == link.PathJoin && lost.Add(1) == 1 {
			proxy.ServeHTTP(httptest.NewRecorder(), r) // the server has it
			panic(http.ErrAbortHandler)
		}
		proxy.ServeHTTP(w, r)
	}))
	defer between.Close()
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	cfg := in.config(in.joinToken(`{"name":"rack1"}`), &listeners{running: map[string]*httptest.Server{}})
	cfg.Server = between.URL
	if _, err := Open(t.Context(), cfg); err == nil {
		t.Fatal("the answer was not lost")
	}
	if n := len(in.call("GET", "/v1/hosts", "")["hosts"].([]any)); n != 1 {
		t.Fatalf("%d hosts", n)
	}
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	if _, err := a.client.access(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

func TestAHostThatHasLostItsMasterKeyJoinsAgain(t *testing.T) {
	in := install(t)
	d := &listeners{running: map[string]*httptest.Server{}}
	cfg := in.config(in.joinToken(`{"name":"rack1"}`), d)
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	before := a.id
	a.close()
	if err := os.Remove(cfg.Master.File); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "create-join-token --host") {
		t.Errorf("error %v", err)
	}
	// A token that is not taken must not cost the key that may come back.
	sealed, err := os.ReadFile(filepath.Join(cfg.Dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	bad := filepath.Join(in.dir, "bad")
	if err := os.WriteFile(bad, []byte("tabard-join-nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.JoinToken = bad
	if _, err := Open(t.Context(), cfg); err == nil {
		t.Error("a token that nobody has made lets the host in")
	}
	if now, err := os.ReadFile(filepath.Join(cfg.Dir, keyFile)); err != nil || !bytes.Equal(now, sealed) {
		t.Errorf("the key is gone; error %v", err)
	}
	cfg.JoinToken = in.joinToken(`{"host":"rack1"}`)
	a, err = Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	if a.id.ID != before.ID || a.id.KeyID == before.KeyID {
		t.Errorf("host %s with key %s, before %s with %s", a.id.ID, a.id.KeyID, before.ID, before.KeyID)
	}
	if _, err := a.client.access(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

func TestARevokedHostJoinsAgainWithANewKey(t *testing.T) {
	in := install(t)
	cfg := in.config(in.joinToken(`{"name":"rack1"}`), &listeners{running: map[string]*httptest.Server{}})
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	in.call("POST", "/v1/hosts/rack1/revoke", "")
	err = a.client.stream(t.Context(), a.capacity, func(link.Message) error { return nil })
	if !errors.Is(err, errRefused) {
		t.Errorf("error %v", err)
	}
	a.close()
	cfg.JoinToken = in.joinToken(`{"host":"rack1"}`)
	b, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if b.id.ID != a.id.ID || b.id.KeyID == a.id.KeyID {
		t.Errorf("host %s with key %s, before %s with %s", b.id.ID, b.id.KeyID, a.id.ID, a.id.KeyID)
	}
	// A crash before the new key took the place of the old one.
	if _, err := b.client.access(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

func TestTwoAgentsDoNotShareADirectory(t *testing.T) {
	in := install(t)
	cfg := in.config(in.joinToken(`{"name":"rack1"}`), &listeners{running: map[string]*httptest.Server{}})
	a, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	if b, err := Open(t.Context(), cfg); err == nil {
		b.close()
		t.Error("they do")
	}
}

func TestADirectoryThatWasOpenToOthersIsClosed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := openState(t.Context(), dir, token.MasterKey{File: filepath.Join(t.TempDir(), "key")}, ""); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, error %v", info.Mode(), err)
	}
}

func TestAMasterKeyThatOthersCanReadIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if _, err := openState(t.Context(), t.TempDir(), token.MasterKey{File: file}, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openState(t.Context(), t.TempDir(), token.MasterKey{File: file}, ""); err == nil {
		t.Error("it is not")
	}
}

// TestAKeyIsTheHostsOnceItHasJoined goes through the crashes between the steps
// of joining.
func TestAKeyIsTheHostsOnceItHasJoined(t *testing.T) {
	dir, master := t.TempDir(), token.MasterKey{File: filepath.Join(t.TempDir(), "key")}
	reopen := func(joinToken string) *state {
		s, err := openState(t.Context(), dir, master, joinToken)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := reopen("a")
	first, err := s.joiningKey()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := reopen("a").joiningKey(); err != nil || !again.Equal(first) {
		t.Errorf("with the same token another key is made; error %v", err)
	}
	if _, err := reopen("a").key(); err == nil {
		t.Error("a key that nobody has taken is the host's")
	}
	if err := s.become(identity{JoinedWith: link.Fingerprint("a")}); err != nil {
		t.Fatal(err)
	}
	s = reopen("a")
	if key, err := s.key(); err != nil || !key.Equal(first) || s.token != "" {
		t.Errorf("the key is not the one that was taken; error %v", err)
	}
	s = reopen("b")
	second, err := s.joiningKey()
	if err != nil || second.Equal(first) {
		t.Errorf("the old key joins again; error %v", err)
	}
	if key, err := reopen("b").key(); err != nil || !key.Equal(first) {
		t.Errorf("before the server has taken the new key the old one is gone; error %v", err)
	}
	// The agent dies when it has just written down who it is.
	b, err := json.Marshal(identity{JoinedWith: link.Fingerprint("b")})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, identityFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = reopen("b")
	if key, err := s.key(); err != nil || !key.Equal(second) || s.has(joiningFile) {
		t.Errorf("the new key is not the host's; error %v", err)
	}
	if third, err := reopen("c").joiningKey(); err != nil || third.Equal(second) || third.Equal(first) {
		t.Errorf("a key is used for two tokens; error %v", err)
	}
}
