package binding

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
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Bounds on what the IAM server may answer with, and on how long it may take.
const (
	iamTimeout   = 10 * time.Second
	maxAnswer    = 8 << 20  // bytes: a page of profiles or the 500 links of one
	maxTokenFile = 64 << 10 // bytes
	maxPages     = 100_000  // of 100 profiles
)

const grantCRToken = "urn:ibm:params:oauth:grant-type:cr-token"

// iam is a client of the IAM server that proves itself by a projected token.
type iam struct {
	server    string // without a slash at the end
	profile   string // name or id of the controller's own
	tokenFile string
	http      *http.Client
	now       func() time.Time

	turn  chan struct{} // held while a token is got, so that one serves all
	mu    sync.Mutex
	who   session
	renew time.Time // when another token is got
}

// session is what an access token says about its bearer.
type session struct {
	token     string
	account   string
	profileID string
}

func newIAM(cfg *Config) (*iam, error) {
	server, err := checkURL(cfg.IAM, cfg.Insecure)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   5 * time.Second,
		ResponseHeaderTimeout: iamTimeout,
		MaxIdleConnsPerHost:   workers,
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
			return nil, fmt.Errorf("read the IAM server's authority: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate in PEM", cfg.CAFile)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	return &iam{
		server: server, profile: cfg.Profile, tokenFile: cfg.TokenFile, now: cfg.Now,
		turn: make(chan struct{}, 1),
		http: &http.Client{
			Transport: t, Timeout: iamTimeout,
			// A redirect would take the token where nobody sent it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

func checkURL(raw string, insecure bool) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "http" && u.Scheme != "https" {
		return "", fmt.Errorf("the IAM server %q is not an http or https URL such as https://iam.example.com:8470", raw)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "http" && !insecure && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", fmt.Errorf("the IAM server %s is reached by plain HTTP, on which tokens can be read: use https, or say --insecure-http", raw)
	}
	return strings.TrimSuffix(raw, "/"), nil
}

// iamError is an answer of the IAM server that is not a success.
type iamError struct {
	status     int
	message    string
	login      bool // it was the exchange that was refused
	retryAfter time.Duration
}

func (e *iamError) Error() string {
	return fmt.Sprintf("%s (status %d)", e.message, e.status)
}

// statusOf returns the HTTP status that the IAM server refused a request with,
// or 0.
func statusOf(err error) int {
	var e *iamError
	if errors.As(err, &e) && !e.login {
		return e.status
	}
	return 0
}

// unavailable reports whether the IAM server has not answered as to the matter,
// so that the same request may succeed later.
func unavailable(err error) bool {
	var e *iamError
	if errors.As(err, &e) {
		return e.status >= 500 || e.status == http.StatusTooManyRequests || e.status < 400
	}
	return true
}

// access returns a session whose token is not the given one, which the server
// takes no more.
func (c *iam) access(ctx context.Context, not string) (session, error) {
	if s, ok := c.current(not); ok {
		return s, nil
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return session{}, ctx.Err()
	}
	if s, ok := c.current(not); ok {
		return s, nil
	}
	s, life, err := c.login(ctx)
	if err != nil {
		return session{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who, c.renew = s, c.now().Add(life*4/5)
	return s, nil
}

func (c *iam) current(not string) (session, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.who, c.who.token != not && c.now().Before(c.renew)
}

// login exchanges the pod's token for one of the controller's profile.
func (c *iam) login(ctx context.Context) (session, time.Duration, error) {
	proof, err := readTokenFile(c.tokenFile)
	if err != nil {
		return session{}, 0, &iamError{login: true, status: http.StatusUnauthorized, message: err.Error()}
	}
	form := url.Values{"grant_type": {grantCRToken}, "cr_token": {proof}}
	if id := strings.TrimPrefix(c.profile, "iam-"); profileID.MatchString(id) {
		form.Set("profile_id", id)
	} else {
		form.Set("profile_name", c.profile)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.server+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return session{}, 0, fmt.Errorf("get an access token: %w", err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	var answer struct {
		Token     string `json:"access_token"`
		ExpiresIn int64  `json:"expires_in"`
	}
	if err := c.send(req, &answer); err != nil {
		var refused *iamError
		if errors.As(err, &refused) {
			refused.login = true
		}
		return session{}, 0, fmt.Errorf("get an access token: %w", err)
	}
	s, err := parseSession(answer.Token)
	if err != nil {
		return session{}, 0, fmt.Errorf("get an access token: %w", err)
	}
	return s, time.Duration(answer.ExpiresIn) * time.Second, nil
}

func readTokenFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", fmt.Errorf("the controller's own token cannot be read: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile))
	if err != nil {
		return "", fmt.Errorf("the controller's own token cannot be read: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// parseSession reads what a token says of its bearer. Its signature is not this
// client's matter: it comes from the server that the token is for.
func parseSession(token string) (session, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return session{}, errors.New("the IAM server's access token is not a JWT")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return session{}, errors.New("the IAM server's access token is not a JWT")
	}
	var claims struct {
		IAMID   string `json:"iam_id"`
		Account struct {
			BSS string `json:"bss"`
		} `json:"account"`
	}
	if err := json.Unmarshal(body, &claims); err != nil || claims.Account.BSS == "" {
		return session{}, errors.New("the IAM server's access token names no account")
	}
	return session{token, claims.Account.BSS, strings.TrimPrefix(claims.IAMID, "iam-")}, nil
}

// call makes a request with the controller's token. A token that is not taken is
// replaced once.
func (c *iam) call(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, 2*iamTimeout)
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
		if statusOf(err) == http.StatusUnauthorized && not == "" {
			not = who.token
			continue
		}
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		return nil
	}
}

func (c *iam) send(req *http.Request, out any) error {
	req.Header.Set("Accept", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return err
	}
	if len(body) > maxAnswer {
		return fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
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
func refusal(resp *http.Response, body []byte) *iamError {
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
	e := &iamError{status: resp.StatusCode}
	e.message = strings.TrimSpace(text.Code + " " + text.Message + " " + text.Details)
	if len(text.Errors) > 0 {
		e.message = strings.TrimSpace(text.Errors[0].Message + " " + text.Errors[0].Details)
	}
	if e.message == "" {
		e.message = http.StatusText(resp.StatusCode)
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 {
		e.retryAfter = time.Duration(min(n, 3600)) * time.Second
	}
	return e
}

// registeredCluster is a cluster as the IAM server shows it.
type registeredCluster struct {
	CRN  string `json:"crn"`
	Type string `json:"type"` // of compute resource: IKS_SA or ROKS_SA
}

func (c *iam) cluster(ctx context.Context, ref string) (registeredCluster, error) {
	var k registeredCluster
	err := c.call(ctx, http.MethodGet, "/v1/clusters/"+url.PathEscape(ref), nil, &k)
	return k, err
}

type profile struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

func (c *iam) profileByID(ctx context.Context, id string) (profile, error) {
	var p profile
	err := c.call(ctx, http.MethodGet, "/v1/profiles/"+url.PathEscape(id), nil, &p)
	return p, err
}

// errNoProfile means that no profile has a name, or none that the controller may
// see.
var errNoProfile = errors.New("no profile has this name")

func (c *iam) profileByName(ctx context.Context, name string) (profile, error) {
	for p, err := range c.profiles(ctx, name) {
		if err != nil {
			return profile{}, err
		}
		if p.Name == name {
			return p, nil
		}
	}
	return profile{}, errNoProfile
}

// profiles yields the account's profiles that the controller may see, or those
// with a name.
func (c *iam) profiles(ctx context.Context, name string) func(yield func(profile, error) bool) {
	return func(yield func(profile, error) bool) {
		who, err := c.access(ctx, "")
		if err != nil {
			yield(profile{}, err)
			return
		}
		q := url.Values{"account_id": {who.account}, "pagesize": {"100"}}
		if name != "" {
			q.Set("name", name)
		}
		for range maxPages {
			var page struct {
				Next     string    `json:"next"`
				Profiles []profile `json:"profiles"`
			}
			if err := c.call(ctx, http.MethodGet, "/v1/profiles?"+q.Encode(), nil, &page); err != nil {
				yield(profile{}, err)
				return
			}
			for _, p := range page.Profiles {
				if !yield(p, nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			// Of the next page's address only the token counts: the server may
			// know itself by another name than the controller reaches it by.
			next, err := url.Parse(page.Next)
			if err != nil || next.Query().Get("pagetoken") == "" {
				yield(profile{}, errors.New("list the trusted profiles: the next page has no token"))
				return
			}
			q = next.Query()
		}
		yield(profile{}, errors.New("list the trusted profiles: there is no end to them"))
	}
}

type link struct {
	ID     string `json:"id,omitempty"`
	Name   string `json:"name"`
	CRType string `json:"cr_type"`
	Link   linked `json:"link"`
}

type linked struct {
	CRN       string `json:"crn"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (c *iam) links(ctx context.Context, profile string) ([]link, error) {
	var answer struct {
		Links []link `json:"links"`
	}
	err := c.call(ctx, http.MethodGet, "/v1/profiles/"+url.PathEscape(profile)+"/links", nil, &answer)
	return answer.Links, err
}

func (c *iam) createLink(ctx context.Context, profile string, l link) (link, error) {
	var made link
	err := c.call(ctx, http.MethodPost, "/v1/profiles/"+url.PathEscape(profile)+"/links", l, &made)
	return made, err
}

// deleteLink is content when the link is not there any more.
func (c *iam) deleteLink(ctx context.Context, profile, id string) error {
	err := c.call(ctx, http.MethodDelete, "/v1/profiles/"+url.PathEscape(profile)+"/links/"+url.PathEscape(id), nil, nil)
	if statusOf(err) == http.StatusNotFound {
		return nil
	}
	return err
}
