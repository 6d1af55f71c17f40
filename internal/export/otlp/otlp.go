// Package otlp sends the activity log to an OpenTelemetry collector, or to any
// backend that takes OTLP logs, over HTTP as protobuf (OTLP 1.x, section
// OTLP/HTTP). gRPC is not spoken: every collector that takes it takes HTTP too,
// and gRPC's library would be the largest of the product.
//
// The protocol tells how many records of a request were rejected, and not
// which. A request that was rejected in part is therefore sent again in halves
// until the one record is found; nothing after it counts as taken.
package otlp

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

// Bounds on requests and answers.
const (
	maxRequest = 1 << 20 // bytes of events in a request, but for a single event that has more; collectors take 20 MiB
	maxAnswer  = 64 << 10
	maxHeaders = 32
	maxWait    = 5 * time.Minute  // that a target's Retry-After is heeded for
	maxCall    = 30 * time.Second // of one request, if the delivery has no time limit of its own

	logsPath = "/v1/logs"
)

// Compressions of requests.
const (
	gzipped = "gzip"
	plain   = "none"
)

// Config are the settings of a route's target.
type Config struct {
	Endpoint        string      `yaml:"endpoint"`          // URL; one without a path gets /v1/logs
	BearerTokenFile string      `yaml:"bearer_token_file"` // read for each delivery, so that it can be replaced
	HeadersFile     string      `yaml:"headers_file"`      // lines of "Name: value"; the same
	Compression     string      `yaml:"compression"`       // gzip, the default, or none
	TLS             *secure.TLS `yaml:"tls"`
	Insecure        bool        `yaml:"insecure"` // permits http to other machines

	Instance string           `yaml:"-"` // service.instance.id of what is sent: the issuer's URL
	Version  string           `yaml:"-"` // of Tabard
	Now      func() time.Time `yaml:"-"` // default: time.Now
}

// Target is where events go, for people to read.
func (c *Config) Target() string {
	u, err := c.target()
	if err != nil {
		return ""
	}
	return u.String()
}

// Check reports what is wrong with the settings. It reads no file and asks
// nobody.
func (c *Config) Check() error {
	if _, err := c.target(); err != nil {
		return err
	}
	if c.Compression != "" && c.Compression != gzipped && c.Compression != plain {
		return fmt.Errorf("compression is %q, want %s or %s", c.Compression, gzipped, plain)
	}
	if c.TLS != nil && (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		return errors.New("tls: cert_file and key_file go together")
	}
	return nil
}

// target reads the endpoint.
func (c *Config) target() (*url.URL, error) {
	if c.Endpoint == "" {
		return nil, errors.New("endpoint is missing: give the URL of the receiver, such as https://collector.example:4318")
	}
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		// The error of url.Parse repeats the text, which may hold a password.
		return nil, errors.New("endpoint is not a URL")
	}
	switch {
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("endpoint has a user, a query or a fragment: put credentials into headers_file or bearer_token_file")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("endpoint has the scheme %.20q, want https; gRPC is not spoken, use the receiver's HTTP port, usually 4318", u.Scheme)
	case u.Hostname() == "":
		return nil, errors.New("endpoint names no host")
	case u.Scheme == "http" && c.TLS != nil:
		return nil, errors.New("endpoint is http, and tls is set: use https")
	case u.Scheme == "http" && !c.Insecure && !loopback(u.Hostname()):
		return nil, errors.New("endpoint is http on another machine: use https, or say insecure: true if the network is trusted with the log and the credentials")
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = logsPath
	}
	return u, nil
}

func loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsLoopback()
}

// reserved are the headers that belong to the request and not to the user.
var reserved = []string{
	"Host", "Content-Type", "Content-Encoding", "Content-Length", "Transfer-Encoding", "Connection", "Te", "Trailer", "Upgrade",
	"Keep-Alive", "Proxy-Connection", "Expect",
}

// headers reads the headers that stand in files.
func (c *Config) headers() (http.Header, error) {
	h := http.Header{}
	if c.HeadersFile != "" {
		text, err := secure.Secret(c.HeadersFile)
		if err != nil {
			return nil, fmt.Errorf("read headers_file: %w", err)
		}
		sc, n := bufio.NewScanner(strings.NewReader(text)), 0
		for sc.Scan() {
			n++
			line := strings.TrimSpace(sc.Text())
			if line == "" || line[0] == '#' {
				continue
			}
			// Errors do not repeat the line: it is a secret.
			name, value, ok := strings.Cut(line, ":")
			name, value = http.CanonicalHeaderKey(strings.TrimSpace(name)), strings.TrimSpace(value)
			switch {
			case !ok || !validName(name) || !validValue(value) || value == "":
				return nil, fmt.Errorf("line %d of headers_file %s is not of the form Name: value", n, c.HeadersFile)
			case slices.Contains(reserved, name):
				return nil, fmt.Errorf("line %d of headers_file %s sets %s, which is the request's own: take it out", n, c.HeadersFile, name)
			case len(h) == maxHeaders:
				return nil, fmt.Errorf("headers_file %s has more than %d headers", c.HeadersFile, maxHeaders)
			}
			h.Add(name, value)
		}
		if err := sc.Err(); err != nil {
			return nil, fmt.Errorf("read headers_file: %w", err)
		}
	}
	if c.BearerTokenFile != "" {
		if h.Get("Authorization") != "" {
			return nil, errors.New("bearer_token_file and an Authorization header in headers_file exclude each other")
		}
		token, err := secure.Secret(c.BearerTokenFile)
		if err != nil {
			return nil, fmt.Errorf("read bearer_token_file: %w", err)
		}
		if !validValue(token) {
			return nil, fmt.Errorf("bearer_token_file %s has more than one line, or characters that no header has", c.BearerTokenFile)
		}
		h.Set("Authorization", "Bearer "+token)
	}
	return h, nil
}

// validName reports whether a text is a header's name (RFC 9110, token).
func validName(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

// validValue reports whether a text can be a header's value: it has no line's
// end in it, with which it could become two headers, and no other control.
func validValue(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
}

// Sink sends events to one receiver.
type Sink struct {
	cfg    Config
	url    *url.URL
	encode encoder
	client *http.Client // nil before the first request, and after one that did not get through
	after  time.Time    // before which the receiver does not want to be asked
}

// New returns a sink, after a look at the files that the settings name. It
// connects at the first delivery.
func New(cfg Config) (*Sink, error) {
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	if _, err := cfg.headers(); err != nil {
		return nil, err
	}
	if _, err := cfg.TLS.Config(); err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	u, err := cfg.target()
	if err != nil {
		return nil, err
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Sink{cfg: cfg, url: u, encode: newEncoder(cfg.Instance, cfg.Version)}, nil
}

// Close gives up the connection.
func (s *Sink) Close() error {
	s.disconnect()
	return nil
}

// Deliver sends entries in their order, each request after the answer to the
// one before. While the receiver has asked for patience it is not called, and the
// error is a *BusyError.
func (s *Sink) Deliver(ctx context.Context, entries []store.Entry) (taken int, err error) {
	if wait := s.after.Sub(s.cfg.Now()); wait > 0 {
		return 0, &BusyError{Wait: wait}
	}
	for taken < len(entries) {
		n, size := 0, 0
		for _, e := range entries[taken:] {
			if size += len(e.Doc); n > 0 && size > maxRequest {
				break
			}
			n++
		}
		got, err := s.send(ctx, entries[taken:taken+n])
		taken += got
		if err != nil {
			return taken, err
		}
	}
	return taken, nil
}

// send sends entries in one request if the receiver takes them so, and in
// halves where it rejects some.
func (s *Sink) send(ctx context.Context, entries []store.Entry) (taken int, err error) {
	err = s.post(ctx, entries)
	var rejected *RejectedError
	switch {
	case err == nil:
		return len(entries), nil
	case !errors.As(err, &rejected):
		return 0, err
	case len(entries) == 1:
		rejected.Index = entries[0].Index
		return 0, err
	}
	half := len(entries) / 2
	taken, err = s.send(ctx, entries[:half])
	if err != nil {
		return taken, err
	}
	more, err := s.send(ctx, entries[half:])
	return half + more, err
}

// post makes one request.
func (s *Sink) post(ctx context.Context, entries []store.Entry) error {
	body, err := proto.Marshal(s.encode.logs(entries))
	if err != nil {
		return fmt.Errorf("encode %d events from index %d: %w", len(entries), entries[0].Index, err)
	}
	headers, err := s.cfg.headers()
	if err != nil {
		return err
	}
	if _, limited := ctx.Deadline(); !limited {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, maxCall)
		defer cancel()
	}
	req, err := s.request(ctx, body, headers)
	if err != nil {
		return err
	}
	if err := s.connect(); err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.disconnect()
		return s.unreachable(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		s.disconnect()
		return s.unreachable(err)
	}
	if len(answer) > maxAnswer {
		s.disconnect()
		return fmt.Errorf("%s answers %s with more than %d bytes: is it a receiver of OTLP?", s.url, resp.Status, maxAnswer)
	}
	err = judge(s.url.String(), resp, answer, s.cfg.Now(), secrets(headers))
	var busy *BusyError
	if errors.As(err, &busy) {
		s.after = s.cfg.Now().Add(busy.Wait)
	}
	return err
}

func (s *Sink) request(ctx context.Context, body []byte, headers http.Header) (*http.Request, error) {
	if s.cfg.Compression != plain {
		var buf bytes.Buffer
		z := gzip.NewWriter(&buf)
		if _, err := z.Write(body); err != nil {
			return nil, fmt.Errorf("compress events: %w", err)
		}
		if err := z.Close(); err != nil {
			return nil, fmt.Errorf("compress events: %w", err)
		}
		body = buf.Bytes()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url.String(), bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make a request to %s: %w", s.url, err)
	}
	req.Header = headers.Clone()
	req.Header.Set("Content-Type", protobufType)
	if s.cfg.Compression != plain {
		req.Header.Set("Content-Encoding", gzipped)
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", "tabard/"+s.encode.version)
	}
	return req, nil
}

// connect makes a client from the files as they are now. One that worked is
// kept.
func (s *Sink) connect() error {
	if s.client != nil {
		return nil
	}
	t, err := s.cfg.TLS.Config()
	if err != nil {
		return fmt.Errorf("tls: %w", err)
	}
	s.client = &http.Client{
		Transport: &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{Timeout: maxCall}).DialContext,
			TLSClientConfig:     t,
			ForceAttemptHTTP2:   true,
			DisableCompression:  true, // an answer of 64 KiB must not become one of 64 MiB
			MaxIdleConnsPerHost: 1,
			IdleConnTimeout:     90 * time.Second,
			TLSHandshakeTimeout: maxCall,
		},
		// Another address would get the credentials and the log.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

func (s *Sink) disconnect() {
	if s.client != nil {
		s.client.CloseIdleConnections()
		s.client = nil
	}
}

// unreachable says what kept a request from being answered.
func (s *Sink) unreachable(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &cert):
		return fmt.Errorf("%s is not who it should be: %w: name its authority in tls.ca_file, or the name of its certificate in tls.server_name", s.url, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s does not answer in time: %w", s.url, err)
	}
	return fmt.Errorf("send events to %s: %w", s.url, err)
}
