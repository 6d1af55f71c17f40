package agent

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"tabard.dev/tabard/internal/api"
	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/fault"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/link"
	"tabard.dev/tabard/internal/metadata"
	"tabard.dev/tabard/internal/vpc"
)

// Bounds on calls to the server.
const (
	callTimeout  = 10 * time.Second
	imageTimeout = time.Hour
	silence      = 3 * link.PingEvery // after which a stream is given up
	maxAnswer    = 1 << 20            // bytes
	retryAfter   = 5 * time.Second    // what an instance is told while the server is away
)

// client talks to the server as this host.
type client struct {
	server   string // URL without a final slash
	endpoint string // of tokens
	host     string // id
	signer   *Signer
	now      func() time.Time
	http     *http.Client
	turn     chan struct{} // holds one token: the right to get an access token

	mu      sync.Mutex
	token   string
	refresh time.Time // when the token is old enough for another
	logins  int       // attempts so far
	failed  error     // of the last attempt
}

func newClient(server, endpoint, host string, s *Signer, now func() time.Time, hc *http.Client) *client {
	c := &client{server: server, endpoint: endpoint, host: host, signer: s, now: now, http: hc, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

// transport trusts the system's authorities, and the one in the file.
func transport(caFile string) (*http.Transport, error) {
	t := &http.Transport{
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   5 * time.Second,
		ResponseHeaderTimeout: callTimeout,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       time.Minute,
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
		// All requests share a connection. When the network swallows it, it must
		// not take the next requests with it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: link.PingEvery, PingTimeout: link.PingEvery},
	}
	if caFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read the server's authority: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", caFile)
	}
	t.TLSClientConfig.RootCAs = pool
	return t, nil
}

// checkURL reports why a server's URL cannot be used. Plain HTTP is for this
// machine itself, unless insecure says otherwise: a join token or an access
// token of an instance could be read on the way.
func checkURL(raw string, insecure bool) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Scheme != "http" && u.Scheme != "https" {
		return "", fmt.Errorf("the server %q is not an http or https URL such as https://iam.example.com:8470", raw)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "http" && !insecure && u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", fmt.Errorf("the server %s is reached by plain HTTP, on which tokens can be read: use https, or say --insecure-http", raw)
	}
	return strings.TrimSuffix(raw, "/"), nil
}

// discover asks the server where its token endpoint is.
func discover(ctx context.Context, c *http.Client, server string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/identity/.well-known/openid-configuration", nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", fmt.Errorf("reach the server: %w", err)
	}
	defer resp.Body.Close()
	var doc struct {
		TokenEndpoint string `json:"token_endpoint"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&doc); err != nil || doc.TokenEndpoint == "" {
		return "", fmt.Errorf("%s does not answer as an IAM server (status %d)", server, resp.StatusCode)
	}
	return doc.TokenEndpoint, nil
}

// join makes this host one of the installation. The signer's key id is not
// known yet; the answer has it.
func join(ctx context.Context, c *http.Client, server, endpoint, joinToken string, signer *Signer, publicJWK []byte, now time.Time) (link.JoinAnswer, error) {
	var answer link.JoinAnswer
	proof, err := signer.Sign(attest.HostProof{
		Audience: []string{endpoint}, IssuedAt: now.Unix(), Expires: now.Add(attest.HostProofLife).Unix(), JTI: uuid.NewString(),
		Join: link.Fingerprint(joinToken),
	}, attest.TypeHostJoin)
	if err != nil {
		return answer, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = post(ctx, c, server+link.PathJoin, "", "", link.JoinRequest{Token: joinToken, Key: publicJWK, Proof: proof}, &answer)
	return answer, err
}

// access returns the host's access token, and gets another when it is old or the
// one that the server takes no more. One caller gets it for all who wait; none
// waits longer than his own time.
func (c *client) access(ctx context.Context, not string) (string, error) {
	token, before, _ := c.known(not)
	if token != "" {
		return token, nil
	}
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return "", away(ctx.Err())
	}
	token, logins, failed := c.known(not)
	if token != "" || logins > before && failed != nil {
		return token, failed
	}
	token, life, err := c.login(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.logins++
	if c.failed = err; err == nil {
		c.token, c.refresh = token, c.now().Add(life*4/5)
	}
	return token, err
}

// known returns the access token if it is good and not the given one, and how
// the attempts to get one went.
func (c *client) known(not string) (token string, logins int, failed error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token != not && c.now().Before(c.refresh) {
		return c.token, c.logins, nil
	}
	return "", c.logins, c.failed
}

// login gets an access token for the host's assertion.
func (c *client) login(ctx context.Context) (_ string, life time.Duration, _ error) {
	now := c.now()
	assertion, err := c.signer.Sign(attest.HostProof{
		Issuer: c.host, Subject: c.host, Audience: []string{c.endpoint}, IssuedAt: now.Unix(),
		Expires: now.Add(attest.HostProofLife).Unix(), JTI: uuid.NewString(),
	}, attest.TypeHostAssertion)
	if err != nil {
		return "", 0, err
	}
	form := url.Values{
		"grant_type": {grant.TypeClientCredentials}, "client_assertion_type": {grant.AssertionType}, "client_assertion": {assertion},
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.server+"/identity/token", strings.NewReader(form.Encode()))
	if err != nil {
		return "", 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := c.http.Do(req)
	if err != nil {
		return "", 0, away(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", 0, away(err)
	}
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
		Message     string `json:"errorMessage"`
		Details     string `json:"errorDetails"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", 0, away(fmt.Errorf("the token endpoint answered with status %d and no JSON", resp.StatusCode))
	}
	if resp.StatusCode != http.StatusOK || answer.AccessToken == "" {
		err := fmt.Errorf("the server gives this host no access token: %s %s (status %d)", answer.Message, answer.Details, resp.StatusCode)
		if resp.StatusCode < 500 && resp.StatusCode != http.StatusTooManyRequests {
			return "", 0, fault.New(fault.Unavailable, "service_error", "The host of this instance is not admitted by the IAM server.").Because(errors.Join(errRefused, err))
		}
		return "", 0, away(err)
	}
	return answer.AccessToken, time.Duration(min(max(answer.ExpiresIn, 0), int64(grant.HostLife/time.Second))) * time.Second, nil
}

// errRefused means that the server does not know this host, or no longer.
var errRefused = errors.New("the host was revoked, or has lost its place to one that joined again")

// away is the fault while the server cannot be reached.
func away(cause error) *fault.Error {
	f := fault.New(fault.Unavailable, metadata.CodeServerAway,
		"The IAM server cannot be reached from this host, and access tokens come from there. Identity tokens and metadata are still served. Try again.").Because(cause)
	f.RetryAfter = retryAfter
	return f
}

// call posts JSON as this host and reads the answer into out, which may be nil.
// A token that the server takes no more, because it was restarted with other
// keys, is replaced once.
func (c *client) call(ctx context.Context, path, transaction string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	token, err := c.access(ctx, "")
	if err == nil {
		err = post(ctx, c.http, c.server+path, token, transaction, in, out)
	}
	if !stale(err) {
		return err
	}
	if token, err = c.access(ctx, token); err != nil {
		return err
	}
	return post(ctx, c.http, c.server+path, token, transaction, in, out)
}

// stale reports whether a fault says that the access token is not good.
func stale(err error) bool {
	var f *fault.Error
	return errors.As(err, &f) && f.Kind == fault.Unauthenticated && f.Code == "token_invalid"
}

func post(ctx context.Context, c *http.Client, url, token, transaction string, in, out any) error {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false) // one byte of an event must not become six: a batch is measured before
	if err := enc.Encode(in); err != nil {
		return fmt.Errorf("encode a request: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, &body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if transaction != "" {
		req.Header.Set(api.TransactionHeader, transaction)
	}
	resp, err := c.Do(req)
	if err != nil {
		return away(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return away(err)
	}
	if resp.StatusCode >= 300 {
		return failed(resp.StatusCode, answer)
	}
	if out == nil || len(answer) == 0 {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return away(fmt.Errorf("the server's answer is not what was expected: %w", err))
	}
	return nil
}

// failed turns the answer to a failed request back into its fault.
func failed(status int, body []byte) error {
	var b link.FaultBody
	if err := json.Unmarshal(body, &b); err != nil || b.Fault.Code == "" {
		return away(fmt.Errorf("the server answered with status %d", status))
	}
	return b.Fault.Error()
}

// ownAddress returns the address of IPv4 by which this host reaches the server,
// or an invalid one. Nothing is sent.
func (c *client) ownAddress(ctx context.Context) netip.Addr {
	u, err := url.Parse(c.server)
	if err != nil {
		return netip.Addr{}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp4", net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443")))
	if err != nil {
		return netip.Addr{}
	}
	defer conn.Close()
	at, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return at.Addr()
}

// get opens a long answer as this host. The caller closes it.
func (c *client) get(ctx context.Context, path string) (*http.Response, error) {
	token, err := c.access(ctx, "")
	if err != nil {
		return nil, err
	}
	resp, err := c.getWith(ctx, path, token)
	if !stale(err) {
		return resp, err
	}
	if token, err = c.access(ctx, token); err != nil {
		return nil, err
	}
	return c.getWith(ctx, path, token)
}

func (c *client) getWith(ctx context.Context, path, token string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, away(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, away(err)
	}
	return nil, failed(resp.StatusCode, body)
}

// stream hands every message of the server to got, until the stream ends or has
// been silent for too long.
func (c *client) stream(ctx context.Context, capacity link.Capacity, got func(link.Message) error) error {
	offered, err := json.Marshal(capacity)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	quiet := time.AfterFunc(silence, func() { cancel(errors.New("the server has been silent for too long")) })
	defer quiet.Stop()
	resp, err := c.get(ctx, link.PathStream+"?capacity="+url.QueryEscape(string(offered)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 0, 64<<10), link.MaxMessage+1)
	for lines.Scan() {
		quiet.Reset(silence)
		var m link.Message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			return fmt.Errorf("read the stream of placements: %w", err)
		}
		if err := got(m); err != nil {
			return err
		}
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read the stream of placements: %w", err)
	}
	return io.EOF
}

// Instance implements the metadata service's IAM: it exchanges an identity
// token that this host has signed.
func (c *client) Instance(ctx context.Context, o grant.Origin, r grant.InstanceRequest) (grant.Answer, error) {
	var a link.ExchangeAnswer
	err := c.call(ctx, link.PathExchange, o.TransactionID, link.Exchange{
		Instance: r.Instance, Token: r.Token, ProfileID: r.Profile.ID, ProfileName: r.Profile.Name, ProfileCRN: r.Profile.CRN,
		Transaction: o.TransactionID, Address: o.Address, Agent: o.Agent, Event: r.With,
	}, &a)
	if err != nil {
		return grant.Answer{}, err
	}
	out := grant.Answer{AccessToken: a.AccessToken}
	out.Claims.IssuedAt, out.Claims.Expires = a.IssuedAt, a.Expires
	return out, nil
}

// Fetch writes an image's disk. It implements the qemu driver's images.
func (c *client) Fetch(ctx context.Context, image vpc.Image, to io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, imageTimeout)
	defer cancel()
	resp, err := c.get(ctx, link.PathImages+url.PathEscape(image.ID))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(to, io.LimitReader(resp.Body, image.Bytes+1))
	if err != nil {
		return fmt.Errorf("fetch image %s: %w", image.ID, err)
	}
	if n != image.Bytes {
		return fmt.Errorf("fetch image %s: it has %d bytes instead of %d", image.ID, n, image.Bytes)
	}
	return nil
}
