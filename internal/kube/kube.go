// Package kube is a small client of the Kubernetes API: requests with JSON
// bodies, and watches. It knows no types of Kubernetes; whoever uses it declares
// the few fields that he reads. It is not a cache, and it retries nothing.
package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Bounds on a request.
const (
	DefaultTimeout = 10 * time.Second
	maxAnswer      = 32 << 20 // bytes
)

// Config is where an API server is and how the client proves itself to it.
type Config struct {
	URL        string // https://host:port, perhaps with a path before /api
	CA         []byte // PEM; the system's authorities when empty
	ServerName string // that the server's certificate is for, when not the URL's host
	Insecure   bool   // take any certificate: only where a person said so

	// Token returns the bearer token for a request. It is asked each time, as
	// projected tokens change on disk. Nil, and an empty token, send none.
	Token       func(context.Context) (string, error)
	Basic       *url.Userinfo    // name and password, for what stands before an API server
	Certificate *tls.Certificate // of the client, when it proves itself by one

	// ClientCertificate is asked for the client's certificate at each handshake,
	// when Certificate is nil. It may return nil.
	ClientCertificate func(context.Context) (*tls.Certificate, error)

	Proxy *url.URL // instead of the one that the environment names

	Timeout   time.Duration // of one request that is not a watch; default [DefaultTimeout]
	MaxAnswer int64         // bytes of an answer to one; default 32 MiB

	// Dial replaces how connections are made, for callers that may reach only
	// some addresses.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Client talks to one API server. It may be used by many goroutines.
type Client struct {
	base    *url.URL
	token   func(context.Context) (string, error)
	basic   *url.Userinfo
	timeout time.Duration
	max     int64
	http    *http.Client
}

// New returns a client. It makes no request.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.URL)
	if err == nil && base.User != nil {
		return nil, errors.New("the API server's URL must not have a name and password in it")
	}
	if err != nil || base.Host == "" || base.RawQuery != "" || base.Fragment != "" {
		return nil, fmt.Errorf("%q is not the URL of an API server", cfg.URL)
	}
	if base.Scheme != "https" {
		return nil, fmt.Errorf("the API server's URL %q is not an https URL", cfg.URL)
	}
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: cfg.ServerName, InsecureSkipVerify: cfg.Insecure} //nolint:gosec // only where a person said so
	if len(cfg.CA) > 0 {
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(cfg.CA) {
			return nil, errors.New("the API server's CA holds no certificate in PEM")
		}
	}
	if cfg.Certificate != nil {
		t.Certificates = []tls.Certificate{*cfg.Certificate}
	} else if cfg.ClientCertificate != nil {
		t.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := cfg.ClientCertificate(info.Context())
			if cert == nil {
				cert = &tls.Certificate{} // which sends none
			}
			return cert, err
		}
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = t
	if cfg.Proxy != nil {
		transport.Proxy = http.ProxyURL(cfg.Proxy)
	}
	if cfg.Dial != nil {
		transport.DialContext = cfg.Dial
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = DefaultTimeout
	}
	if cfg.MaxAnswer <= 0 {
		cfg.MaxAnswer = maxAnswer
	}
	return &Client{
		base: base, token: cfg.Token, basic: cfg.Basic, timeout: cfg.Timeout, max: cfg.MaxAnswer,
		http: &http.Client{
			Transport: transport,
			// A redirect would take the credential where nobody sent it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// StatusError is an answer of the API server that is not a success.
type StatusError struct {
	Code    int    // HTTP status
	Reason  string // of the Status object, such as NotFound; may be empty
	Message string
}

func (e *StatusError) Error() string {
	if e.Message != "" {
		return fmt.Sprintf("%s (%d)", e.Message, e.Code)
	}
	return fmt.Sprintf("HTTP status %d", e.Code)
}

// Code returns the HTTP status of a [StatusError], or 0.
func Code(err error) int {
	var s *StatusError
	if errors.As(err, &s) {
		return s.Code
	}
	return 0
}

// Patch types, the content types of PATCH bodies.
const (
	MergePatch = "application/merge-patch+json"
	JSONPatch  = "application/json-patch+json"
	ApplyPatch = "application/apply-patch+yaml" // takes JSON too
	plainJSON  = "application/json"
)

// Do makes a request. The path begins with / and may have a query. A nil in
// sends no body; a nil out reads none. The error is a [*StatusError] when the
// server answered with one.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	return c.do(ctx, method, path, plainJSON, in, out)
}

// Patch makes a PATCH request with one of the patch types.
func (c *Client) Patch(ctx context.Context, path, patchType string, in, out any) error {
	return c.do(ctx, http.MethodPatch, path, patchType, in, out)
}

func (c *Client) do(ctx context.Context, method, path, contentType string, in, out any) error {
	authorization, err := c.authorization(ctx) // a person may be asked, which takes its time
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	resp, err := c.send(ctx, method, path, contentType, authorization, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, c.max+1))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if int64(len(body)) > c.max {
		return fmt.Errorf("%s %s: the answer is longer than %d bytes", method, path, c.max)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("%s %s: %w", method, path, statusError(resp.StatusCode, body))
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = body
		return nil
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("%s %s: the answer is not what was expected: %w", method, path, err)
	}
	return nil
}

// authorization returns the header that proves who asks, or "".
func (c *Client) authorization(ctx context.Context) (string, error) {
	if c.token != nil {
		token, err := c.token(ctx)
		if err != nil {
			return "", fmt.Errorf("get the credential for the API server: %w", err)
		}
		if token != "" {
			return "Bearer " + token, nil
		}
	}
	if c.basic != nil {
		password, _ := c.basic.Password()
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.basic.Username()+":"+password)), nil
	}
	return "", nil
}

func (c *Client) send(ctx context.Context, method, path, contentType, authorization string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the body of %s %s: %w", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(c.base.String(), "/")+path, body)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	// Key sets have a media type of their own, and API servers insist on it.
	req.Header.Set("Accept", "application/json, application/jwk-set+json;q=0.9")
	if in != nil {
		req.Header.Set("Content-Type", contentType)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	return resp, nil
}

func statusError(code int, body []byte) *StatusError {
	var status struct {
		Reason  string `json:"reason"`
		Message string `json:"message"`
	}
	e := &StatusError{Code: code}
	if json.Unmarshal(body, &status) == nil {
		e.Reason, e.Message = clip(status.Reason), clip(status.Message)
	}
	return e
}

// maxMessage bounds what an error keeps of a server's words, in bytes.
const maxMessage = 1 << 10

func clip(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return strings.ToValidUTF8(s[:maxMessage], "") + "…"
}

// Event is a change that a watch reports.
type Event struct {
	Type   string          `json:"type"` // ADDED, MODIFIED, DELETED, BOOKMARK or ERROR
	Object json.RawMessage `json:"object"`
}

// maxEvent bounds one line of a watch: etcd holds objects of 1.5 MB at most.
const maxEvent = 8 << 20

// Watch reports changes of a collection until the context or the server ends
// the watch, or f returns an error. The path is the collection's; its query must
// not have watch. An ERROR event ends the watch with a [*StatusError]; code 410
// means that the caller must list anew.
func (c *Client) Watch(ctx context.Context, path string, f func(Event) error) error {
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	path += sep + "watch=true&allowWatchBookmarks=true"
	authorization, err := c.authorization(ctx)
	if err != nil {
		return err
	}
	resp, err := c.send(ctx, http.MethodGet, path, "", authorization, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // the status alone says enough
		return fmt.Errorf("watch %s: %w", path, statusError(resp.StatusCode, body))
	}
	limited := &eventReader{r: resp.Body}
	dec := json.NewDecoder(limited)
	for {
		limited.left = maxEvent
		var e Event
		if err := dec.Decode(&e); err != nil {
			if errors.Is(err, io.EOF) || ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("watch %s: %w", path, err)
		}
		if e.Type == "ERROR" {
			var s struct {
				Code int `json:"code"`
			}
			_ = json.Unmarshal(e.Object, &s) // a status without a code is still an error
			return fmt.Errorf("watch %s: %w", path, statusError(s.Code, e.Object))
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

// eventReader ends a stream in which one event is longer than it may be.
type eventReader struct {
	r    io.Reader
	left int
}

func (r *eventReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, fmt.Errorf("an event is longer than %d bytes", maxEvent)
	}
	n, err := r.r.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, err
}

// StaticToken returns a Config.Token that is always the same.
func StaticToken(token string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return token, nil }
}
