// Package webhook is the target of exports that is a web server of somebody's:
// events go in signed POST requests, as the Standard Webhooks specification
// (version 1.0.0, symmetric signatures) says, so that receivers can check them
// with a library of their choice.
//
// The body is a JSON array of events, or a line for each; what is signed is the
// body byte for byte. A request that is repeated has the same webhook-id.
package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"tabard.dev/tabard/internal/export/secure"
	"tabard.dev/tabard/internal/store"
)

// Config are the settings of a webhook.
type Config struct {
	URL           string     `yaml:"url"`             // https, or http to this machine
	Format        string     `yaml:"format"`          // json (an array, the default) or lines
	SecretFile    string     `yaml:"secret_file"`     // has whsec_ and the key in base64
	OldSecretFile string     `yaml:"old_secret_file"` // signs, too, while receivers change over
	AuthFile      string     `yaml:"authorization_file"`
	TLS           secure.TLS `yaml:"tls"`

	Now func() time.Time `yaml:"-"` // nil means the real clock
}

// Formats of the body.
const (
	FormatJSON  = "json"
	FormatLines = "lines"
)

// Check reports what cannot work, without looking at files or the network.
func (c *Config) Check() error {
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	u, err := url.Parse(c.URL)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		refuse("url: want https://HOST/PATH") // as it is, it may have a secret in it
	case u.User != nil:
		refuse("url: it has a password in it; put the value of the Authorization header into a file, and name that as authorization_file")
	case u.Fragment != "":
		refuse("url: what comes after # is not sent")
	case u.Scheme == "http" && !loopback(u.Hostname()):
		refuse("url: events would be readable on the way; use https, or http to this machine")
	}
	if c.Format != "" && c.Format != FormatJSON && c.Format != FormatLines {
		refuse("format: %q is neither json nor lines", c.Format)
	}
	if c.SecretFile == "" {
		refuse(`secret_file: give the file of the key that requests are signed with; make one with: printf 'whsec_%%s\n' "$(openssl rand -base64 32)"`)
	}
	return errors.Join(errs...)
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// Target names the receiver. The path is left out: some receivers' paths are
// secret.
func (c *Config) Target() string {
	u, err := url.Parse(c.URL)
	if err != nil {
		return ""
	}
	name := u.Scheme + "://" + u.Host
	if strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		name += "/…"
	}
	return name
}

// Sink sends requests.
type Sink struct {
	cfg       Config
	transport *http.Transport
	client    *http.Client
	most      int // events in one request, after a receiver found one too large
}

// Bounds on what a receiver can make the server read.
const (
	maxAnswer  = 4 << 10
	maxHeader  = 16 << 10
	maxReading = time.Second
)

// New returns a sink. It reads the files of TLS; secrets are read anew for each
// delivery, so that they can be exchanged at any time.
func New(cfg Config) (*Sink, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	conf, err := cfg.TLS.Config()
	if err != nil {
		return nil, err
	}
	t := &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext, TLSClientConfig: conf,
		TLSHandshakeTimeout: 10 * time.Second, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute,
		MaxResponseHeaderBytes: maxHeader, DisableCompression: true,
	}
	s := &Sink{cfg: cfg, transport: t, client: &http.Client{
		Transport: t,
		// An answer that leads elsewhere would take the events with it.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	if _, _, err := s.secrets(); err != nil {
		return nil, err
	}
	return s, nil
}

// Close gives up the connections.
func (s *Sink) Close() error {
	s.transport.CloseIdleConnections()
	return nil
}

// Deliver posts events, in one request if the receiver takes as many.
func (s *Sink) Deliver(ctx context.Context, entries []store.Entry) (taken int, err error) {
	secrets, auth, err := s.secrets()
	if err != nil {
		return 0, err
	}
	for taken < len(entries) {
		n := len(entries) - taken
		if s.most > 0 {
			n = min(n, s.most)
		}
		body := s.body(entries[taken : taken+n])
		switch err := s.post(ctx, body, secrets, auth); {
		case err == nil:
			taken += n
			if s.most > 0 { // slowly up again: the events were perhaps larger than others
				s.most++
			}
		case isTooLarge(err) && n > 1:
			s.most = n / 2
		default:
			return taken, err
		}
	}
	return taken, nil
}

func (s *Sink) body(entries []store.Entry) []byte {
	open, between, end := "[", ",\n", "]\n"
	if s.cfg.Format == FormatLines {
		open, between, end = "", "\n", "\n"
	}
	var b bytes.Buffer
	b.WriteString(open)
	for i := range entries {
		if i > 0 {
			b.WriteString(between)
		}
		b.Write(document(entries[i].Doc))
	}
	b.WriteString(end)
	return b.Bytes()
}

// document returns an event as it goes into a body. One that somebody has
// changed in the store may be no JSON any more, and must not spoil the others.
func document(doc []byte) []byte {
	if json.Valid(doc) {
		return bytes.ReplaceAll(doc, []byte("\n"), []byte(" "))
	}
	b, err := json.Marshal(map[string]string{"invalid": string(doc)})
	if err != nil {
		return []byte(`{"invalid":""}`)
	}
	return b
}

// secrets reads the keys, and the value of the Authorization header.
func (s *Sink) secrets() (keys [][]byte, auth string, err error) {
	for _, file := range []string{s.cfg.SecretFile, s.cfg.OldSecretFile} {
		if file == "" {
			continue
		}
		text, err := secure.Secret(file)
		if err != nil {
			return nil, "", fmt.Errorf("read the secret: %w", err)
		}
		key, err := parseSecret(text)
		if err != nil {
			return nil, "", fmt.Errorf("the secret in %s %w", file, err)
		}
		keys = append(keys, key)
	}
	if s.cfg.AuthFile != "" {
		if auth, err = secure.Secret(s.cfg.AuthFile); err != nil {
			return nil, "", fmt.Errorf("read the value of the Authorization header: %w", err)
		}
		if strings.ContainsFunc(auth, func(r rune) bool { return r < ' ' || r > '~' }) {
			return nil, "", fmt.Errorf("what is in %s cannot be the value of a header", s.cfg.AuthFile)
		}
	}
	return keys, auth, nil
}

// Sizes of keys, in bytes, as the specification has them.
const (
	minKey = 24
	maxKey = 64
)

// parseSecret reads a key. The error never tells what it is.
func parseSecret(text string) ([]byte, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(text, "whsec_"))
	if err != nil {
		return nil, errors.New("is not whsec_ and then base64")
	}
	if len(key) < minKey || len(key) > maxKey {
		return nil, fmt.Errorf("has %d bytes; want %d to %d", len(key), minKey, maxKey)
	}
	return key, nil
}

// sign returns the value of the webhook-signature header.
func sign(keys [][]byte, id string, at int64, body []byte) string {
	var out []string
	for _, key := range keys {
		mac := hmac.New(sha256.New, key)
		// Writing to a hash does not fail.
		_, _ = fmt.Fprintf(mac, "%s.%d.", id, at)
		_, _ = mac.Write(body)
		out = append(out, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	return strings.Join(out, " ")
}

func (s *Sink) post(ctx context.Context, body []byte, keys [][]byte, auth string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cfg.URL, bytes.NewReader(body))
	if err != nil {
		return errors.New("the url cannot be called") // the cause would show it
	}
	sum, at := sha256.Sum256(body), s.cfg.Now().Unix()
	id := "msg_" + hex.EncodeToString(sum[:16])
	contentType := "application/json"
	if s.cfg.Format == FormatLines {
		contentType = "application/x-ndjson"
	}
	for name, value := range map[string]string{
		"Content-Type": contentType, "User-Agent": "tabard", "Authorization": auth,
		"Webhook-Id": id, "Webhook-Timestamp": strconv.FormatInt(at, 10), "Webhook-Signature": sign(keys, id, at, body),
	} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		var u *url.Error // has the whole URL
		if errors.As(err, &u) {
			err = u.Err
		}
		return fmt.Errorf("call the receiver: %w", err)
	}
	// The status says all. A little is read, and for a moment, so that the
	// connection can be used again; what is left unread ends it.
	enough := time.AfterFunc(maxReading, cancel)
	_, _ = io.CopyN(io.Discard, resp.Body, maxAnswer)
	_ = resp.Body.Close()
	enough.Stop()
	if resp.StatusCode/100 == 2 {
		return nil
	}
	return &refusal{status: resp.StatusCode, after: s.after(resp)}
}

// How long to wait when the receiver says that asking again is of no use, and
// does not say until when.
const (
	pauseRefused = time.Minute
	pauseGone    = 5 * time.Minute
)

// after returns for how long another attempt has no chance.
func (s *Sink) after(resp *http.Response) time.Duration {
	if text := resp.Header.Get("Retry-After"); text != "" {
		if n, err := strconv.ParseInt(text, 10, 32); err == nil {
			return time.Duration(max(n, 0)) * time.Second
		}
		if at, err := http.ParseTime(text); err == nil {
			return max(0, at.Sub(s.cfg.Now()))
		}
	}
	switch c := resp.StatusCode; {
	case c == http.StatusGone:
		return pauseGone
	case c == http.StatusRequestTimeout, c == http.StatusTooEarly, c == http.StatusTooManyRequests, c >= 500:
		return 0
	}
	return pauseRefused
}

// refusal is an answer that is not a success. What the receiver wrote is not in
// it.
type refusal struct {
	status int
	after  time.Duration
}

func (r *refusal) Error() string {
	text := fmt.Sprintf("the receiver answered %d %s", r.status, http.StatusText(r.status))
	switch r.status {
	case http.StatusGone:
		text += ": it wants no more events; remove the route, or have the receiver take them again"
	case http.StatusUnauthorized, http.StatusForbidden:
		text += ": compare the secret that it has with that in secret_file, and the clocks"
	case http.StatusRequestEntityTooLarge:
		text += ": a single event is larger than it takes; raise its limit"
	}
	if r.status/100 == 3 {
		text += ": redirects are not followed; give the url that it leads to"
	}
	return text
}

// RetryAfter says when it is of use to ask again.
func (r *refusal) RetryAfter() time.Duration { return r.after }

func isTooLarge(err error) bool {
	var r *refusal
	return errors.As(err, &r) && r.status == http.StatusRequestEntityTooLarge
}
