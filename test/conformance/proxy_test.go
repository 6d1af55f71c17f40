package conformance

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// exchange is a request that a suite made and how the server answered.
type exchange struct {
	spec   string // "" while no spec ran: set-up and clean-up
	method string
	path   string // escaped, without the query
	query  string
	status int
	answer string
}

func (e exchange) String() string {
	path := e.path
	if e.query != "" {
		path += "?" + e.query
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s -> %d %s", e.method, path, e.status, clip(e.answer, 600)))
}

func clip(s string, limit int) string {
	s = strings.TrimSpace(s)
	if len(s) > limit {
		return s[:limit] + " …"
	}
	return s
}

// recorder notes exchanges together with the spec that was running.
type recorder struct {
	mu        sync.Mutex
	progress  progress
	output    *os.File // what the suite has written so far
	exchanges []exchange
}

// follow makes the recorder read a suite's output from the beginning.
func (r *recorder) follow(output string) error {
	f, err := os.Open(output)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.output, r.progress = f, progress{}
	return nil
}

func (r *recorder) close() { r.output.Close() }

// running is the spec under way. A suite writes the spec's name before it
// makes the spec's first request, and it writes to a file: so what is in the
// file when a request arrives tells whose request it is.
func (r *recorder) running() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.output == nil {
		return ""
	}
	b, err := io.ReadAll(r.output)
	if err == nil {
		r.progress.read(b)
	}
	return r.progress.spec
}

func (r *recorder) note(e exchange) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.exchanges = append(r.exchanges, e)
}

// of returns the exchanges of one spec. Those of the suite's own set-up and
// clean-up belong to none.
func (r *recorder) of(spec string) []exchange {
	if spec == "BeforeSuite" || spec == "AfterSuite" {
		spec = ""
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []exchange
	for _, e := range r.exchanges {
		if e.spec == spec {
			all = append(all, e)
		}
	}
	return all
}

// progress follows the verbose output of ginkgo 1.16: before each spec a line
// of the texts around it, an indented line of its own, and where it is.
type progress struct {
	spec string

	rest   []byte // of a line that has not ended
	header []string
	begun  bool // a block has begun, header collects its lines
}

var location = regexp.MustCompile(`^\s*\S+_test\.go:\d+$`)

func (p *progress) read(b []byte) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			break
		}
		p.line(string(p.rest[:i]))
		p.rest = p.rest[i+1:]
	}
	p.ended(string(p.rest))
}

func (p *progress) line(line string) {
	switch {
	case strings.HasPrefix(line, "-----") || strings.HasPrefix(line, "Will run "):
		p.begun, p.header = true, nil
	case p.ended(line):
		p.begun = false
	case p.begun && location.MatchString(line) && len(p.header) > 0:
		p.spec, p.begun = strings.Join(p.header, " "), false
	case p.begun && strings.TrimSpace(line) != "":
		p.header = append(p.header, strings.TrimSpace(line))
		p.begun = len(p.header) <= 2
	}
}

// ended notices the mark of a spec's outcome, which may stand behind what the
// spec wrote last.
func (p *progress) ended(line string) bool {
	if !strings.HasPrefix(line, "•") && !strings.HasSuffix(line, "•") && !strings.HasPrefix(line, "S [SKIPPING]") {
		return false
	}
	p.spec = ""
	return true
}

// proxy stands between a suite and a server.
type proxy struct {
	url   string
	close func()

	mu     sync.Mutex
	target *url.URL
}

func newProxy(t testing.TB, rec *recorder, standIn func(http.Handler) http.Handler) *proxy {
	t.Helper()
	p := &proxy{}
	var h http.Handler = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(p.get()) },
	}
	if standIn != nil {
		h = standIn(h)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		spec := rec.running()
		e := exchange{spec: spec, method: r.Method, path: r.URL.EscapedPath(), query: r.URL.RawQuery}
		tee := &teeWriter{ResponseWriter: w, status: http.StatusOK}
		h.ServeHTTP(tee, r)
		e.status, e.answer = tee.status, tee.body.String()
		if e.path == "/identity/token" && e.status == http.StatusOK {
			e.answer = "" // a token does not belong in a log
		}
		rec.note(e)
	}))
	t.Cleanup(srv.Close)
	p.url, p.close = srv.URL, srv.Close
	return p
}

func (p *proxy) to(target string) {
	u, err := url.Parse(target)
	if err != nil {
		panic(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = u
}

func (p *proxy) get() *url.URL {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.target
}

// teeWriter keeps the status and the beginning of an answer.
type teeWriter struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
}

func (w *teeWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *teeWriter) Write(b []byte) (int, error) {
	if room := 4096 - w.body.Len(); room > 0 {
		w.body.Write(b[:min(room, len(b))])
	}
	return w.ResponseWriter.Write(b)
}
