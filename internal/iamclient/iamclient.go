// Package iamclient is how this project's own programs in a cluster speak to the
// IAM server: like any pod, they exchange the token that a kubelet keeps in a
// file for one of their trusted profile, and call the server's APIs with that.
//
// It is not for the command line, whose users log in, and it knows no API: what
// is asked and what the answers mean is its callers' matter.
package iamclient

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
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds on what is read.
const (
	MaxAnswer    = 8 << 20  // bytes of an answer of the server
	maxTokenFile = 64 << 10 // bytes
)

// DefaultTimeout is that of a request.
const DefaultTimeout = 10 * time.Second

// maxRetryAfter bounds how long a server may have its clients wait.
const maxRetryAfter = time.Hour

const grantCRToken = "urn:ibm:params:oauth:grant-type:cr-token"

// Config is what a client is made of.
type Config struct {
	URL       string        // of the server
	Insecure  bool          // reach it by plain HTTP beyond loopback
	CAFile    string        // PEM, of the authority of its certificate besides the system's; "" is none
	Profile   string        // trusted profile to put on: name or id
	TokenFile string        // with the pod's own token, read anew for each exchange
	Timeout   time.Duration // of a request; default [DefaultTimeout]
	Now       func() time.Time
}

// Client calls one server as one profile. It may be used from several
// goroutines.
type Client struct {
	cfg    Config
	server string // without a slash at its end
	http   *http.Client

	turn  chan struct{} // held while a token is got, so that one serves all
	mu    sync.Mutex
	who   Session
	renew time.Time // when another token is got
}

// Session is what an access token says about its bearer.
type Session struct {
	Account   string
	ProfileID string // "Profile-<uuid>"

	// Proved is what the profile was put on with: the CRN of the pod's cluster,
	// as the server knows it.
	Proved string

	token string
}

// New returns a client. It makes no request. The error says what is wrong with
// the configuration.
func New(cfg Config) (*Client, error) {
	server, err := CheckURL(cfg.URL, cfg.Insecure)
	if err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   5 * time.Second,
		ResponseHeaderTimeout: cfg.Timeout,
		MaxIdleConnsPerHost:   4,
		IdleConnTimeout:       time.Minute,
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
		// All requests share a connection. When the network swallows it, it must
		// not take the next requests with it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read the authority of the IAM server's certificate: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool() // an image without any
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate in PEM", cfg.CAFile)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	return &Client{
		cfg: cfg, server: server, turn: make(chan struct{}, 1),
		http: &http.Client{
			Transport: t, Timeout: cfg.Timeout,
			// A redirect would take the token where nobody sent it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// CheckToken says why the pod's own token cannot be read, if so. It makes no
// request.
func (c *Client) CheckToken() error {
	token, err := readTokenFile(c.cfg.TokenFile)
	if err == nil && token == "" {
		err = fmt.Errorf("the pod's own token: %s is empty", c.cfg.TokenFile)
	}
	return err
}

// Close ends the connections that wait for requests.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// URL is the server's, without a slash at its end.
func (c *Client) URL() string { return c.server }

// CheckURL says why tokens should not be sent to a URL, or returns it without a
// slash at its end. With insecure, it may be plain HTTP on another machine.
func CheckURL(raw string, insecure bool) (string, error) {
	if raw == "" {
		return "", errors.New("give --iam-url URL, the URL of the IAM server, such as https://iam.example.com:8470")
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "http" && u.Scheme != "https" {
		return "", fmt.Errorf("%q is not an http or https URL such as https://iam.example.com:8470", raw)
	}
	if u.Scheme == "http" && !insecure && !loopback(u.Hostname()) {
		return "", fmt.Errorf("%s is plain HTTP, on which tokens can be read: use https, or say --insecure-http", raw)
	}
	return strings.TrimRight(raw, "/"), nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

var profileID = regexp.MustCompile(`^(?:iam-)?(Profile-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$`)

// ProfileID reports whether a text is a profile's id, as tokens and policies
// show it, too, and returns that without the prefix of IAM ids. Any other text
// is a profile's name.
func ProfileID(text string) (id string, ok bool) {
	m := profileID.FindStringSubmatch(text)
	if m == nil {
		return "", false
	}
	return m[1], true
}

// Error is an answer of the server that is not a success.
type Error struct {
	Status     int
	Message    string        // the server's
	Login      bool          // it was the exchange that was refused, or had nothing to offer
	RetryAfter time.Duration // that the server asks for; 0 is none
}

// Error returns the server's words and the status.
func (e *Error) Error() string { return fmt.Sprintf("%s (status %d)", e.Message, e.Status) }

// Status returns the status with which the server refused a request, or 0. It is
// 0 when the profile could not be put on, too: the request was never made.
func Status(err error) int {
	var e *Error
	if errors.As(err, &e) && !e.Login {
		return e.Status
	}
	return 0
}

// Session returns who the client is, and gets a token for that when it has none.
func (c *Client) Session(ctx context.Context) (Session, error) { return c.access(ctx, "") }

// Renew returns a session with another token than that of s, which may say what
// is no longer so.
func (c *Client) Renew(ctx context.Context, s Session) (Session, error) {
	return c.access(ctx, s.token)
}

// access returns a session whose token is not the given one, which the server
// takes no more.
func (c *Client) access(ctx context.Context, not string) (Session, error) {
	if s, ok := c.current(not); ok {
		return s, nil
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return Session{}, fmt.Errorf("wait for an access token: %w", ctx.Err())
	}
	if s, ok := c.current(not); ok {
		return s, nil
	}
	s, life, err := c.login(ctx)
	if err != nil {
		return Session{}, fmt.Errorf("get an access token: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who, c.renew = s, c.cfg.Now().Add(life/5*4)
	return s, nil
}

func (c *Client) current(not string) (Session, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.who, c.who.token != not && c.cfg.Now().Before(c.renew)
}

// login exchanges the pod's token for one of the profile
// (reference/iam-identity.md section 1.2).
func (c *Client) login(ctx context.Context) (Session, time.Duration, error) {
	proof, err := readTokenFile(c.cfg.TokenFile)
	if err != nil {
		return Session{}, 0, &Error{Login: true, Status: http.StatusUnauthorized, Message: err.Error()}
	}
	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {proof}}
	if id, ok := ProfileID(c.cfg.Profile); ok {
		form.Set("profile_id", id)
	} else {
		form.Set("profile_name", c.cfg.Profile)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.server+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return Session{}, 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var answer struct {
		Token     string `json:"access_token"`
		ExpiresIn int64  `json:"expires_in"` // seconds
	}
	if err := c.send(req, &answer); err != nil {
		var refused *Error
		if errors.As(err, &refused) {
			refused.Login = true
		}
		return Session{}, 0, err
	}
	s, err := parseSession(answer.Token)
	if err != nil {
		return Session{}, 0, err
	}
	return s, time.Duration(min(max(answer.ExpiresIn, 0), 24*3600)) * time.Second, nil
}

// readTokenFile reads a projected token, which the kubelet replaces before it
// ends.
func readTokenFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("read the pod's own token: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("read the pod's own token: %w", err)
	case len(b) > maxTokenFile:
		return "", fmt.Errorf("the pod's own token: %s is longer than %d bytes", name, maxTokenFile)
	}
	return strings.TrimSpace(string(b)), nil
}

// parseSession reads what a token says of its bearer. Its signature is not this
// client's matter: it comes from the server that the token is for.
func parseSession(token string) (Session, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return Session{}, errors.New("the IAM server's access token is not a JWT")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return Session{}, errors.New("the IAM server's access token is not a JWT")
	}
	var claims struct {
		IAMID   string `json:"iam_id"`
		Account struct {
			BSS string `json:"bss"`
		} `json:"account"`
		Authn struct {
			Subject string `json:"sub"`
		} `json:"authn"`
	}
	if err := json.Unmarshal(body, &claims); err != nil || claims.Account.BSS == "" {
		return Session{}, errors.New("the IAM server's access token names no account")
	}
	return Session{Account: claims.Account.BSS, ProfileID: strings.TrimPrefix(claims.IAMID, "iam-"), Proved: claims.Authn.Subject, token: token}, nil
}

// Do makes a request with the profile's token: in, when it is not nil, is sent
// as JSON, and the answer is read into out, when that is not nil. A token that
// the server does not take is replaced once. An answer that is no success is an
// [Error]; any other error means that there was no answer to the matter.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*c.cfg.Timeout)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("encode the body of %s %s: %w", method, path, err)
		}
	}
	not := ""
	for {
		who, err := c.access(ctx, not)
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, method, c.server+path, bytes.NewReader(body))
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		req.Header.Set("Authorization", "Bearer "+who.token)
		if in != nil {
			req.Header.Set("Content-Type", "application/json")
		}
		err = c.send(req, out)
		if Status(err) == http.StatusUnauthorized && not == "" {
			not = who.token
			continue
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		return nil
	}
}

func (c *Client) send(req *http.Request, out any) error {
	req.Header.Set("Accept", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxAnswer+1))
	if err != nil {
		return fmt.Errorf("read the answer: %w", err)
	}
	if len(body) > MaxAnswer {
		return fmt.Errorf("the answer is longer than %d bytes", MaxAnswer)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return refusal(resp, body)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("the answer is not what was expected: %w", err)
	}
	return nil
}

// refusal reads both forms of errors: the token endpoint's and the APIs'.
func refusal(resp *http.Response, body []byte) *Error {
	var text struct {
		Message string `json:"errorMessage"`
		Code    string `json:"errorCode"`
		Details string `json:"errorDetails"`
		Errors  []struct {
			Message string `json:"message"`
			Details string `json:"details"`
		} `json:"errors"`
	}
	_ = json.Unmarshal(body, &text) // a body that is something else leaves the status
	e := &Error{Status: resp.StatusCode}
	e.Message = strings.TrimSpace(text.Code + " " + text.Message + " " + text.Details)
	if len(text.Errors) > 0 {
		e.Message = strings.TrimSpace(text.Errors[0].Message + " " + text.Errors[0].Details)
	}
	if e.Message == "" {
		e.Message = http.StatusText(resp.StatusCode)
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.RetryAfter = min(time.Duration(min(n, 1e6))*time.Second, maxRetryAfter)
	}
	return e
}
