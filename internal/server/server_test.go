package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tabard.dev/tabard/internal/bootstrap"
	"tabard.dev/tabard/internal/token"
)

// config is one that disturbs nobody on the machine.
func config(dir string) Config {
	return Config{
		DataDir: dir, Listen: []string{"127.0.0.1:0"}, Driver: DriverNone, Account: "My Company",
		Log: slog.New(slog.DiscardHandler),
	}
}

func open(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	return s
}

func closed(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// refused opens a server that must not open, and returns why.
func refused(t *testing.T, cfg Config) string {
	t.Helper()
	s, err := Open(t.Context(), cfg)
	if err == nil {
		closed(t, s)
		t.Fatal("the server opens")
	}
	return err.Error()
}

func owner(t *testing.T, dir string) bootstrap.Owner {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "owner.json"))
	if err != nil {
		t.Fatal(err)
	}
	var o bootstrap.Owner
	if err := json.Unmarshal(b, &o); err != nil {
		t.Fatal(err)
	}
	return o
}

// loggedIn reports whether an API key is good for a token of the account.
func loggedIn(t *testing.T, s *Server, o bootstrap.Owner) bool {
	t.Helper()
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {o.APIKey}}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	rec := &answerRecorder{header: http.Header{}}
	s.handler().ServeHTTP(rec, r)
	return rec.status == http.StatusOK
}

type answerRecorder struct {
	bytes.Buffer
	header http.Header
	status int
}

func (r *answerRecorder) Header() http.Header    { return r.header }
func (r *answerRecorder) WriteHeader(status int) { r.status = status }

func TestTheFirstStartMakesAnAccountAndKeepsItsSecretsToItself(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, config(dir))
	o := owner(t, dir)
	if o.Name != "My Company" || o.URL != s.URL() || o.AccountID == "" || o.IAMID == "" || o.APIKey == "" {
		t.Errorf("owner %+v, server at %s", o, s.URL())
	}
	if !loggedIn(t, s, o) {
		t.Error("the owner's key is not accepted")
	}
	for name, want := range map[string]os.FileMode{".": 0o700, "images": 0o700, "owner.json": 0o600, "master.key": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", name, got, want)
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if filepath.Base(file) == "images" {
			continue // of which there are none yet
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte(o.APIKey)) != (filepath.Base(file) == "owner.json") {
			t.Errorf("%s: the owner's key is where it should not be, or not where it should", file)
		}
		if bytes.Contains(b, []byte("PRIVATE KEY")) {
			t.Errorf("%s holds an open private key", file)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "owner.json.new")); !os.IsNotExist(err) {
		t.Errorf("the draft is still there: %v", err)
	}
}

func TestAnotherStartKeepsTheAccountAndItsKeys(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	first := owner(t, dir)
	keys := s.keys.JWKS()
	closed(t, s)
	again := open(t, config(dir))
	second := owner(t, dir)
	if second.URL != again.URL() {
		t.Errorf("the owner's file says %s, the server is at %s", second.URL, again.URL())
	}
	second.URL = first.URL
	if first != second {
		t.Errorf("owner %+v, was %+v", second, first)
	}
	if !loggedIn(t, again, first) {
		t.Error("the owner's key is not accepted any more")
	}
	if again.directory.Accounts.Len() != 1 || len(again.keys.JWKS().Keys) != len(keys.Keys) || again.keys.JWKS().Keys[0].KeyID != keys.Keys[0].KeyID {
		t.Error("a second account or key was made")
	}
}

func TestTwoServersDoNotShareADirectory(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	if why := refused(t, config(dir)); !strings.Contains(why, "in use") {
		t.Errorf("error %s", why)
	}
	if !loggedIn(t, s, owner(t, dir)) {
		t.Error("the first server is disturbed")
	}
	closed(t, s)
	open(t, config(dir))
}

func TestAnOwnersFileThatWasPutAwayStaysAway(t *testing.T) {
	dir := t.TempDir()
	closed(t, open(t, config(dir)))
	o := owner(t, dir)
	if err := os.Remove(filepath.Join(dir, "owner.json")); err != nil {
		t.Fatal(err)
	}
	s := open(t, config(dir))
	if _, err := os.Stat(filepath.Join(dir, "owner.json")); !os.IsNotExist(err) {
		t.Errorf("the file is back: %v", err)
	}
	if !loggedIn(t, s, o) {
		t.Error("the owner's key is not accepted any more")
	}
}

func TestACrashAtTheFirstStartLosesNoKey(t *testing.T) {
	draft := func(dir string) string { return filepath.Join(dir, "owner.json.new") }
	t.Run("between the account and the name of the file", func(t *testing.T) {
		dir := t.TempDir()
		closed(t, open(t, config(dir)))
		o := owner(t, dir)
		if err := os.Rename(filepath.Join(dir, "owner.json"), draft(dir)); err != nil {
			t.Fatal(err)
		}
		s := open(t, config(dir))
		if got := owner(t, dir); got.APIKey != o.APIKey || !loggedIn(t, s, got) {
			t.Errorf("owner %+v, was %+v", got, o)
		}
		if info, err := os.Stat(filepath.Join(dir, "owner.json")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("owner.json %v, %v", info, err)
		}
	})
	for name, content := range map[string]string{
		"before the account": `{"name":"x","account_id":"y","iam_id":"z","apikey":"never-made","url":"u"}`, "in the draft": `{"name":"x","acc`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(draft(dir), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
			s := open(t, config(dir))
			if o := owner(t, dir); o.APIKey == "never-made" || !loggedIn(t, s, o) {
				t.Errorf("owner %+v", o)
			}
			if info, err := os.Stat(filepath.Join(dir, "owner.json")); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("owner.json %v, %v", info, err)
			}
		})
	}
}

func TestACrashWhileTheURLIsRewrittenLosesNoKey(t *testing.T) {
	for _, content := range []string{"", `{"name":"My Comp`, "{}"} {
		dir := t.TempDir()
		closed(t, open(t, config(dir)))
		o := owner(t, dir)
		if err := os.WriteFile(filepath.Join(dir, "owner.json.new"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, config(dir))
		if got := owner(t, dir); got.APIKey != o.APIKey || got.URL != s.URL() {
			t.Errorf("draft %q: owner %+v, was %+v", content, got, o)
		}
	}
}

func TestDataSealedUnderAnotherMasterKeyAreNotOpened(t *testing.T) {
	dir := t.TempDir()
	closed(t, open(t, config(dir)))
	key := filepath.Join(dir, "master.key")
	kept, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if why := refused(t, config(dir)); !strings.Contains(why, "master key") {
		t.Errorf("without the key: %s", why)
	}
	if _, err := os.Stat(key); !os.IsNotExist(err) {
		t.Error("a new master key hides the loss of the old one")
	}
	cfg := config(dir)
	cfg.Master = token.MasterKey{Value: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
	if why := refused(t, cfg); !strings.Contains(why, "master key") {
		t.Errorf("with another key: %s", why)
	}
	if err := os.WriteFile(key, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, config(dir))
}

func TestABadConfigurationOpensNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for about, spoil := range map[string]func(*Config){
		"plain HTTP":  func(c *Config) { c.Listen = []string{"0.0.0.0:0"} },
		"docker":      func(c *Config) { c.Driver = "docker" },
		"signing-alg": func(c *Config) { c.Alg = "none" },
		"key-rotatio": func(c *Config) { c.KeyRotation = time.Minute },
	} {
		cfg := config(dir)
		spoil(&cfg)
		if why := refused(t, cfg); !strings.Contains(why, about) {
			t.Errorf("error %s, want something about %s", why, about)
		}
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s: the data directory was made", about)
		}
	}
}

func TestAnAddressThatIsTakenIsToldAndReleasesEverything(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	cfg := config(dir)
	cfg.Listen = []string{"127.0.0.1:0", l.Addr().String()}
	if why := refused(t, cfg); !strings.Contains(why, l.Addr().String()) {
		t.Errorf("error %s", why)
	}
	cfg = config(dir)
	cfg.TLSCert, cfg.TLSKey = filepath.Join(dir, "no.pem"), filepath.Join(dir, "no.pem")
	if why := refused(t, cfg); !strings.Contains(why, "TLS certificate") {
		t.Errorf("error %s", why)
	}
	open(t, config(dir))
}

// run serves until the returned function, which returns what Run did.
func run(t *testing.T, s *Server) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			t.Fatal("the server does not stop")
			return nil
		}
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

func get(t *testing.T, client *http.Client, url string) (int, string, http.Header) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), resp.Header
}

func TestAServerServesAndStopsCleanly(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.Listen = []string{"127.0.0.1:0", "127.0.0.1:0"}
	cfg.Driver = DriverLocal
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	urls := []string{s.URL(), "http://" + s.listeners[1].Addr().String()}
	stop := run(t, s)
	client := &http.Client{Transport: &http.Transport{}}
	for status := 0; status != 200; {
		status, _, _ = get(t, client, s.URL()+"/readyz") // not before the instances of this machine run
	}
	for _, base := range urls {
		for path, want := range map[string]string{
			"/healthz": "alive\n", "/readyz": "serving\n",
		} {
			if status, body, h := get(t, client, base+path); status != 200 || body != want || h.Get("Transaction-Id") == "" {
				t.Errorf("%s%s: %d %q %v", base, path, status, body, h)
			}
		}
		if status, body, _ := get(t, client, base+"/metrics"); status != 200 || !strings.Contains(body, "tabard_journal_events_total") {
			t.Errorf("/metrics: %d %.200s", status, body)
		}
		if status, body, _ := get(t, client, base+"/identity/.well-known/openid-configuration"); status != 200 || !strings.Contains(body, s.URL()+"/identity/token") {
			t.Errorf("discovery: %d %s", status, body)
		}
		if status, body, _ := get(t, client, base+"/no/such/path"); status != 404 || !strings.Contains(body, "invalid_route") {
			t.Errorf("unknown path: %d %s", status, body)
		}
		for _, path := range []string{"/v1/profiles", "/v1/policies", "/v2/groups", "/v2/resource_instances", "/v1/clusters", "/v1/events", "/v1/instances?version=2022-03-31&generation=2"} {
			if status, body, _ := get(t, client, base+path); status != 401 {
				t.Errorf("%s without a token: %d %s", path, status, body)
			}
		}
	}
	client.CloseIdleConnections()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("tcp", strings.TrimPrefix(urls[0], "http://")); err == nil {
		conn.Close()
		t.Error("the address is still served")
	}
	open(t, config(cfg.DataDir))
}

func TestARequestUnderWayIsFinishedBeforeTheServerStops(t *testing.T) {
	s, err := Open(t.Context(), config(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	entered, release := make(chan struct{}), make(chan struct{})
	s.mux.HandleFunc("GET /test/slow", func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-release
		if r.Context().Err() != nil {
			t.Error("the request was cut off")
		}
		io.WriteString(w, "done")
	})
	stop := run(t, s)
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Get(s.URL() + "/test/slow")
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		answer <- string(b)
	}()
	<-entered
	ended := make(chan error, 1)
	go func() { ended <- stop() }()
	for end := time.Now().Add(10 * time.Second); !s.draining.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the server does not begin to stop")
		}
	}
	rec := &answerRecorder{header: http.Header{}}
	s.handler().ServeHTTP(rec, mustRequest(t, "http://x/readyz"))
	if rec.status != http.StatusServiceUnavailable || rec.String() != "stopping\n" {
		t.Errorf("/readyz while stopping: %d %q", rec.status, rec.String())
	}
	close(release)
	if got := <-answer; got != "done" {
		t.Errorf("answer %q", got)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func mustRequest(t *testing.T, url string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestWithACertificateTheServerSpeaksTLS(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := config(dir)
	cfg.TLSCert, cfg.TLSKey = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, content := range map[string][]byte{cfg.TLSCert: cert, cfg.TLSKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	defer client.CloseIdleConnections()
	if !strings.HasPrefix(s.URL(), "https://127.0.0.1:") {
		t.Errorf("URL %s", s.URL())
	}
	if status, body, _ := get(t, client, s.URL()+"/healthz"); status != 200 || body != "alive\n" {
		t.Errorf("%d %s", status, body)
	}
	old := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS11}}}
	if resp, err := old.Do(mustRequest(t, s.URL()+"/healthz")); err == nil {
		resp.Body.Close()
		t.Error("TLS 1.1 is accepted")
	}
}

func TestMetricsCountTokenRequestsUnderNamesOfOurOwn(t *testing.T) {
	dir := t.TempDir()
	s := open(t, config(dir))
	loggedIn(t, s, owner(t, dir))
	loggedIn(t, s, bootstrap.Owner{APIKey: "unknown"})
	for _, grant := range []string{"", "made-up", "made-up-too"} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://x/identity/token", strings.NewReader("grant_type="+grant))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		s.handler().ServeHTTP(&answerRecorder{header: http.Header{}}, r)
	}
	rec := &answerRecorder{header: http.Header{}}
	s.handler().ServeHTTP(rec, mustRequest(t, "http://x/metrics"))
	for _, line := range []string{
		`tabard_token_requests_seconds_count{grant="apikey",outcome="ok"} 1`,
		`tabard_token_requests_seconds_count{grant="apikey",outcome="BXNIM0415E"} 1`,
		`tabard_token_requests_seconds_count{grant="other",outcome="BXNIM0109E"} 3`,
		`tabard_journal_events_total 5`,
		`tabard_journal_failed_commits_total 0`,
	} {
		if !strings.Contains(rec.String(), line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	if strings.Contains(rec.String(), "made-up") {
		t.Error("what a caller wrote has become a time series")
	}
}

func TestTheIssuerAndTheNamesAreConfigurable(t *testing.T) {
	cfg := config(t.TempDir())
	cfg.URL, cfg.Issuer, cfg.CName, cfg.CType = "https://iam.example.com/", "https://issuer.example.com", "mycloud", "dedicated"
	s := open(t, cfg)
	if s.URL() != "https://iam.example.com" {
		t.Errorf("URL %s", s.URL())
	}
	rec := &answerRecorder{header: http.Header{}}
	s.handler().ServeHTTP(rec, mustRequest(t, "http://x/identity/.well-known/openid-configuration"))
	if !strings.Contains(rec.String(), `"issuer":"https://issuer.example.com"`) {
		t.Errorf("discovery %s", rec.String())
	}
	cfg = config(t.TempDir())
	cfg.URL = "https://iam.example.com/"
	if s := open(t, cfg); s.cfg.Issuer != "https://iam.example.com/identity" {
		t.Errorf("issuer %s", s.cfg.Issuer)
	}
}
