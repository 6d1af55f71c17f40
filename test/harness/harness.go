// Package harness starts the built binary for the end-to-end tests and talks
// to it as its users do: with its command line, with plain HTTP, with curl.
package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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
)

// Binary is the tabard under test: TABARD_BIN, or one built on the spot.
var Binary = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("TABARD_BIN"); bin != "" {
		return bin, nil
	}
	dir, err := os.MkdirTemp("", "tabard-bin-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "tabard")
	cmd := exec.Command("go", "build", "-o", bin, "./cmd/tabard")
	cmd.Dir = root()
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build tabard: %w\n%s", err, out)
	}
	return bin, nil
})

// root is the repository's folder; tests run in a folder one or two below it.
func root() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, statErr := os.Stat(filepath.Join(dir, "cmd", "tabard")); statErr == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

// Root is the repository's folder.
func Root() string { return root() }

// Server is a running tabard with a data directory of its own.
type Server struct {
	T     testing.TB
	URL   string
	Dir   string // data directory
	Home  string // of the command line
	Owner struct {
		Name      string `json:"name"`
		AccountID string `json:"account_id"`
		IAMID     string `json:"iam_id"`
		APIKey    string `json:"apikey"`
		URL       string `json:"url"`
	}

	args []string
	env  []string
	cmd  *exec.Cmd
	log  *Output
	done chan error
}

// Output is what a program writes, read while it still does.
type Output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *Output) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *Output) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Start starts a server with further flags and waits until it serves.
func Start(t testing.TB, args ...string) *Server {
	t.Helper()
	return StartIn(t, t.TempDir(), args...)
}

// StartIn starts a server on a data directory.
func StartIn(t testing.TB, dir string, args ...string) *Server {
	t.Helper()
	s := &Server{T: t, Dir: dir, Home: filepath.Join(t.TempDir(), "home"), args: args, log: &Output{}}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("server log:\n%s", s.log)
		}
	})
	s.Launch()
	return s
}

// Launch starts the process, on the same address as before if there was one.
func (s *Server) Launch() {
	s.T.Helper()
	bin, err := Binary()
	if err != nil {
		s.T.Fatal(err)
	}
	if s.URL == "" {
		s.URL = "http://" + freeAddress(s.T)
	}
	args := append([]string{"server", "--data-dir", s.Dir, "--listen", strings.TrimPrefix(s.URL, "http://")}, s.args...)
	s.cmd = exec.Command(bin, args...)
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.Stderr, s.cmd.Stdout = s.log, s.log
	if err := s.cmd.Start(); err != nil {
		s.T.Fatal(err)
	}
	s.done = make(chan error, 1)
	go func(cmd *exec.Cmd, done chan<- error) { done <- cmd.Wait() }(s.cmd, s.done)
	s.waitReady()
	b, err := os.ReadFile(filepath.Join(s.Dir, "owner.json"))
	if err != nil {
		s.T.Fatal(err)
	}
	if err := json.Unmarshal(b, &s.Owner); err != nil {
		s.T.Fatal(err)
	}
}

func (s *Server) waitReady() {
	s.T.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for time.Now().Before(deadline) {
		select {
		case err := <-s.done:
			s.T.Fatalf("the server ended before it served: %v\n%s", err, s.log)
		default:
		}
		resp, err := http.Get(s.URL + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	s.T.Fatalf("the server did not serve within a minute\n%s", s.log)
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// Stop ends the server as an operator would, and fails the test unless it ends
// with status 0.
func (s *Server) Stop() {
	if s.cmd == nil {
		return
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.T.Errorf("stop the server: %v", err)
	}
	select {
	case err := <-s.done:
		if err != nil {
			s.T.Errorf("the server ended with %v\n%s", err, s.log)
		}
	case <-time.After(40 * time.Second):
		s.Kill()
		s.T.Errorf("the server did not stop\n%s", s.log)
	}
	s.cmd = nil
}

// Signal sends the process a signal that does not end it.
func (s *Server) Signal(sig os.Signal) {
	s.T.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.T.Fatal(err)
	}
}

// Kill ends the server as a power cut would.
func (s *Server) Kill() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Kill()
	<-s.done
	s.cmd = nil
}

// Log is what the server has written so far.
func (s *Server) Log() string { return s.log.String() }

// Result is what a command printed.
type Result struct {
	Out, Err string
	Code     int
}

// Run runs the command line and returns what it printed, whatever its status.
func (s *Server) Run(args ...string) Result {
	s.T.Helper()
	bin, err := Binary()
	if err != nil {
		s.T.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), "TABARD_HOME="+s.Home)
	cmd.Env = append(cmd.Env, s.env...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.T.Fatalf("tabard %s: %v", strings.Join(args, " "), err)
	}
	return Result{Out: out.String(), Err: errOut.String(), Code: cmd.ProcessState.ExitCode()}
}

// CLI runs the command line and fails the test unless it ends with status 0.
func (s *Server) CLI(args ...string) string {
	s.T.Helper()
	r := s.Run(args...)
	if r.Code != 0 {
		s.T.Fatalf("tabard %s: status %d\n%s%s\nserver log:\n%s", strings.Join(args, " "), r.Code, r.Out, r.Err, s.log)
	}
	return r.Out
}

// JSON runs a command with --output json and decodes what it printed.
func (s *Server) JSON(into any, args ...string) {
	s.T.Helper()
	out := s.CLI(append(args, "--output", "json")...)
	if err := json.Unmarshal([]byte(out), into); err != nil {
		s.T.Fatalf("tabard %s did not print JSON: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Login logs the command line in as the owner.
func (s *Server) Login() {
	s.T.Helper()
	s.CLI("login", "-a", s.URL, "--apikey", "@"+filepath.Join(s.Dir, "owner.json"))
}

// Answer is an HTTP answer.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
}

// Field returns a text in a JSON object answer, or "".
func (a Answer) Field(path ...string) string {
	var v any
	if json.Unmarshal(a.Body, &v) != nil {
		return ""
	}
	for _, p := range path {
		switch m := v.(type) {
		case map[string]any:
			v = m[p]
		case []any:
			if len(m) == 0 || p != "0" {
				return ""
			}
			v = m[0]
		default:
			return ""
		}
	}
	s, _ := v.(string)
	return s
}

// Do makes an HTTP request to the server.
func (s *Server) Do(method, path, bearer string, body any, header ...string) Answer {
	s.T.Helper()
	var r io.Reader
	contentType := "application/json"
	switch b := body.(type) {
	case nil:
	case url.Values:
		r, contentType = strings.NewReader(b.Encode()), "application/x-www-form-urlencoded"
	case string:
		r = strings.NewReader(b)
	default:
		raw, err := json.Marshal(b)
		if err != nil {
			s.T.Fatal(err)
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequest(method, s.URL+path, r)
	if err != nil {
		s.T.Fatal(err)
	}
	if r != nil {
		req.Header.Set("Content-Type", contentType)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.T.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.T.Fatal(err)
	}
	return Answer{Status: resp.StatusCode, Header: resp.Header, Body: b}
}

// OwnerToken returns an access token of the owner.
func (s *Server) OwnerToken() string {
	s.T.Helper()
	a := s.Do("POST", "/identity/token", "", url.Values{
		"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {s.Owner.APIKey},
	})
	if a.Status != http.StatusOK {
		s.T.Fatalf("owner's token: %d %s", a.Status, a.Body)
	}
	return a.Field("access_token")
}

// Event is what the tests look at in an activity event.
type Event struct {
	Action        string `json:"action"`
	Outcome       string `json:"outcome"`
	CorrelationID string `json:"correlationId"`
	Initiator     struct {
		ID      string `json:"id"`
		Name    string `json:"name"`
		AuthnID string `json:"authnId"`
	} `json:"initiator"`
	Target       struct{ ID, Name string } `json:"target"`
	ResponseData map[string]any            `json:"responseData"`
	Trace        []struct {
		Check, Outcome, Wanted, Found, Hint string
	} `json:"trace"`
}

// Events returns the account's newest events, as the command line lists them.
func (s *Server) Events(args ...string) []Event {
	s.T.Helper()
	var events []Event
	s.JSON(&events, append([]string{"activity", "events", "--limit", "1000"}, args...)...)
	return events
}
