package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

const (
	requestTimeout = 60 * time.Second
	dialTimeout    = 5 * time.Second
	maxAnswer      = 32 << 20 // bytes
	maxPages       = 10_000
)

// client sends requests to one server.
type client struct {
	base  string
	token string // bearer; empty on requests that have none
	http  *http.Client

	transaction string // of the last request
	metadata    bool   // the server is a virtual server's metadata service
}

// errInterrupted is what the user's own interruption ends with.
var errInterrupted = errors.New("interrupted")

func newClient(base, token string) *client {
	transport := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout: dialTimeout,
		// Only uploads wait to be told that they are wanted.
		ExpectContinueTimeout: dialTimeout,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	return &client{base: base, token: token, http: &http.Client{
		Timeout: requestTimeout, Transport: transport,
		// No API redirects, and a token must not follow where one points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// request is one call. Path is escaped already; Body is sent as JSON unless it
// is url.Values, which is a form, or rawBody.
type request struct {
	method, path string
	query        url.Values
	header       map[string]string
	body         any
}

// rawBody is a file that is sent as it is, however long that takes.
type rawBody struct {
	io.Reader
	size int64
}

// do sends a request and decodes the answer into into, unless that is nil. An
// answer that is not 2xx is an *apiError.
func (c *client) do(ctx context.Context, r request, into any) (http.Header, error) {
	header, answer, err := c.raw(ctx, r)
	if err != nil || into == nil || len(bytes.TrimSpace(answer)) == 0 {
		return header, err
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return nil, fmt.Errorf("the server's answer to %s %s is not what was expected; is %s a Tabard server? %w", r.method, r.path, c.base, err)
	}
	return header, nil
}

// raw is do for an answer that is taken as it is.
func (c *client) raw(ctx context.Context, r request) (http.Header, []byte, error) {
	req, transaction, err := c.prepare(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	sender := c.http
	if raw, ok := r.body.(rawBody); ok {
		req.ContentLength = raw.size
		patient := *c.http
		patient.Timeout = 0
		sender = &patient
	}
	res, err := sender.Do(req)
	if err != nil {
		return nil, nil, c.unreached(ctx, err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, nil, errInterrupted
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the server's answer: %w", cause(err))
	}
	if len(answer) > maxAnswer {
		return nil, nil, fmt.Errorf("the server's answer is larger than %d bytes", maxAnswer)
	}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		return nil, nil, refusal(res, answer, transaction)
	}
	return res.Header, answer, nil
}

// stream sends a request whose answer goes on for as long as its context. The
// caller closes it.
func (c *client) stream(ctx context.Context, r request) (io.ReadCloser, error) {
	req, transaction, err := c.prepare(ctx, r)
	if err != nil {
		return nil, err
	}
	patient := *c.http
	patient.Timeout = 0
	res, err := patient.Do(req)
	if err != nil {
		return nil, c.unreached(ctx, err)
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return nil, fmt.Errorf("read the server's answer: %w", cause(err))
	}
	return nil, refusal(res, answer, transaction)
}

// prepare builds a request with its transaction's id.
func (c *client) prepare(ctx context.Context, r request) (req *http.Request, transaction string, err error) {
	var body io.Reader
	contentType := ""
	switch b := r.body.(type) {
	case nil:
	case rawBody:
		body, contentType = b, "application/octet-stream"
	case url.Values:
		body, contentType = strings.NewReader(b.Encode()), "application/x-www-form-urlencoded"
	default:
		encoded, err := json.Marshal(b)
		if err != nil {
			return nil, "", fmt.Errorf("encode the request: %w", err)
		}
		body, contentType = bytes.NewReader(encoded), "application/json"
	}
	target := c.base + r.path
	if len(r.query) > 0 {
		target += "?" + r.query.Encode()
	}
	req, err = http.NewRequestWithContext(ctx, r.method, target, body)
	if err != nil {
		return nil, "", fmt.Errorf("build the request: %w", err)
	}
	transaction = transactionID()
	c.transaction = transaction
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "tabard-cli/"+version())
	req.Header.Set("Transaction-Id", transaction)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	for k, v := range r.header {
		req.Header.Set(k, v)
	}
	return req, transaction, nil
}

// unreached says why there is no answer.
func (c *client) unreached(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return errInterrupted
	case c.metadata:
		return fmt.Errorf("cannot reach the metadata service at %s: %w", c.base, cause(err))
	case errors.Is(err, syscall.ECONNREFUSED):
		return unreachable{fmt.Errorf("cannot reach the server at %s: connection refused; is it running? (tabard server)", c.base)}
	}
	return unreachable{fmt.Errorf("cannot reach the server at %s: %w", c.base, cause(err))}
}

// unreachable is an error beside which it does not matter what was being done.
type unreachable struct{ error }

// cause takes the URL out of an error of package http: a query may hold what
// nobody wants in a terminal's history.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func transactionID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

// list fetches all pages of a collection, or the first most items when most is
// not 0. The API families page in different ways, but each names the next page
// by query parameters: only those are taken from its link, so that a token is
// never sent to where a link points.
func (c *client) list(ctx context.Context, path string, query url.Values, array string, most int) ([]object, error) {
	items := []object{}
	seen := map[string]bool{}
	for range maxPages {
		var page object
		if _, err := c.do(ctx, request{method: http.MethodGet, path: path, query: query}, &page); err != nil {
			return nil, err
		}
		items = append(items, page.objects(array)...)
		if most > 0 && len(items) >= most {
			return items[:most], nil
		}
		next := nextPage(page)
		if len(next) == 0 {
			return items, nil
		}
		query = maps.Clone(query)
		if query == nil {
			query = url.Values{}
		}
		maps.Copy(query, next)
		if seen[query.Encode()] {
			return nil, fmt.Errorf("the pages of %s go round in a circle", path)
		}
		seen[query.Encode()] = true
	}
	return nil, fmt.Errorf("%s has more than %d pages", path, maxPages)
}

// nextPage returns the parameters of the page after this one, none on the last.
func nextPage(page object) url.Values {
	for _, at := range []string{"next_url", "next.href", "next"} {
		if u, err := url.Parse(page.text(at)); err == nil && u.RawQuery != "" {
			return u.Query()
		}
	}
	if start := page.text("next.start"); start != "" {
		return url.Values{"start": {start}}
	}
	return nil
}

// apiError is an answer that says no. The API families word it in different
// shapes, which are told apart here once.
type apiError struct {
	Status      int
	Code        string
	Message     string
	Details     string
	Target      string
	MoreInfo    string
	Transaction string
}

func (e *apiError) Error() string { return e.Message }

func refusal(res *http.Response, answer []byte, transaction string) *apiError {
	e := &apiError{Status: res.StatusCode, Transaction: transaction}
	if id := res.Header.Get("Transaction-Id"); id != "" {
		e.Transaction = id
	}
	var body object
	if json.Unmarshal(answer, &body) == nil {
		first := body
		if entries := body.objects("errors"); len(entries) > 0 {
			first = entries[0]
		}
		e.Code = first.text("code|errorCode")
		e.Message = first.text("message|errorMessage")
		e.Details = first.text("details|errorDetails")
		e.MoreInfo = first.text("more_info")
		if name := first.text("target.name"); name != "" {
			e.Target = strings.TrimSpace(name + " " + first.text("target.value"))
		}
		if code := first.text("message_code"); code != "" {
			e.Code += " " + code
		}
	}
	if e.Message == "" {
		e.Message = "The server answered " + res.Status
	}
	return e
}

// remotePlain reports whether a URL sends secrets unencrypted over a network.
func remotePlain(base string) bool {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() != "localhost" && (err != nil || !ip.IsLoopback())
}

// serverURL checks and completes what a user gave as a server's address.
func serverURL(s string) (string, error) {
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", Usage("%q is not the URL of a server, such as https://tabard.example.com:8470", s)
	}
	return strings.TrimRight(u.String(), "/"), nil
}
