package attest

import (
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
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"

	"tabard.dev/tabard/internal/cluster"
)

// Bounds on fetching a cluster's keys.
const (
	fetchTimeout  = 5 * time.Second
	maxDocument   = 1 << 20          // bytes of a discovery document or key set
	maxKeys       = 100              // in one key set
	keysUsable    = time.Hour        // how long they count while fetching fails
	unknownPeriod = 10 * time.Second // at most, between fetches caused by unknown key ids or failures
)

// DefaultKeysMaxAge is how old fetched keys may be when nothing else is said.
const DefaultKeysMaxAge = 5 * time.Minute

// ErrNoSuchKey means that the cluster's key set is known and has no such key.
var ErrNoSuchKey = errors.New("no such key")

// Opener opens what was sealed with a label, see token.Sealer.
type Opener interface {
	Open(sealed []byte, label string) ([]byte, error)
}

// Sources of keys, see [cluster.Cluster].
const (
	FromUpload = "uploaded"
	FromServer = "server"
	FromIssuer = "issuer"
)

// KeysFrom says where a cluster's keys come from.
func KeysFrom(c *cluster.Cluster) string {
	switch {
	case len(c.JWKS) > 0:
		return FromUpload
	case c.Server != nil:
		return FromServer
	}
	return FromIssuer
}

// Keys finds the public keys of clusters: from the uploaded key set, from the
// cluster's API server, or from the issuer's discovery document. Fetched keys
// are kept in memory; an unknown key id causes another fetch, at a bounded rate,
// so that a rotation is noticed and a flood of made-up ids is not passed on to
// the cluster.
type Keys struct {
	Now func() time.Time

	// Opener opens the credentials of API servers; nil has no keys from those.
	Opener Opener

	// MaxAge is how old fetched keys may be: the bound within which a key stops
	// counting that its cluster has withdrawn. While fetching fails, the last
	// ones count for an hour. Zero means [DefaultKeysMaxAge].
	MaxAge time.Duration

	// Observe, when not nil, is told of every fetch: [FromServer] or
	// [FromIssuer], and whether it failed.
	Observe func(source string, failed bool)

	flight singleflight.Group
	mu     sync.Mutex
	sets   map[string]*keySet // by cluster id
}

type keySet struct {
	revision int64 // of the cluster, so that a changed registration starts anew
	keys     []jose.JSONWebKey
	fetched  time.Time // last success
	tried    time.Time // last attempt
	err      error     // of the last attempt
}

// Of returns the keys of the cluster with a key id; with an empty id all of
// them. Errors: ErrNoSuchKey, or why the keys cannot be had.
func (k *Keys) Of(ctx context.Context, c *cluster.Cluster, keyID string) ([]jose.JSONWebKey, error) {
	set := k.known(c)
	now := k.Now()
	if len(c.JWKS) > 0 {
		if set == nil {
			keys, err := ParseKeys(c.JWKS)
			if err != nil {
				return nil, fmt.Errorf("uploaded keys: %w", err)
			}
			set = k.keep(c, keySet{keys: keys, fetched: now, tried: now})
		}
		return pick(set.keys, keyID)
	}
	usable := set != nil && now.Sub(set.fetched) < keysUsable
	mayTry := set == nil || now.Sub(set.tried) >= min(unknownPeriod, k.maxAge())
	if usable {
		keys, err := set.pick(keyID)
		fresh := now.Sub(set.fetched) < k.maxAge()
		if !mayTry || err == nil && fresh {
			return keys, err
		}
	} else if !mayTry {
		return nil, set.err
	}
	fetching := k.flight.DoChan(fmt.Sprintf("%s/%d", c.ID, c.Revision), func() (any, error) {
		if latest := k.known(c); latest != nil && latest != set {
			return latest, nil // another request fetched since this one looked
		}
		// The answer serves every waiting request, so it must not end with
		// the first one.
		keys, err := k.fetch(context.WithoutCancel(ctx), c)
		next := keySet{tried: now, err: err}
		switch {
		case err == nil:
			next.keys, next.fetched = keys, now
		case set != nil:
			next.keys, next.fetched = set.keys, set.fetched
		}
		return k.keep(c, next), nil
	})
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the keys: %w", ctx.Err())
	case fetched := <-fetching:
		if fetched.Err != nil {
			return nil, fetched.Err
		}
		set = fetched.Val.(*keySet)
	}
	if set.err != nil && now.Sub(set.fetched) >= keysUsable {
		return nil, set.err
	}
	return set.pick(keyID)
}

// pick returns the keys with an id. While fetching fails nobody knows whether a
// key that is not among the old ones exists.
func (s *keySet) pick(id string) ([]jose.JSONWebKey, error) {
	keys, err := pick(s.keys, id)
	if err != nil && s.err != nil {
		return nil, s.err
	}
	return keys, err
}

func (k *Keys) known(c *cluster.Cluster) *keySet {
	k.mu.Lock()
	defer k.mu.Unlock()
	if set := k.sets[c.ID]; set != nil && set.revision == c.Revision {
		return set
	}
	return nil
}

func (k *Keys) keep(c *cluster.Cluster, set keySet) *keySet {
	set.revision = c.Revision
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.sets == nil {
		k.sets = map[string]*keySet{}
	}
	k.sets[c.ID] = &set
	return &set
}

// Check fetches or parses the cluster's keys now, for the moment of its
// registration, and returns how many there are. Nothing is kept.
func (k *Keys) Check(ctx context.Context, c *cluster.Cluster) (int, error) {
	ids, err := k.CheckIDs(ctx, c)
	return len(ids), err
}

// CheckIDs is as Check, and returns the ids of the keys, as they stand in the
// key set: one may be empty.
func (k *Keys) CheckIDs(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	if len(c.JWKS) > 0 {
		keys, err := ParseKeys(c.JWKS)
		return idsOf(keys), err
	}
	keys, err := k.fetch(ctx, c)
	return idsOf(keys), err
}

// Refresh fetches a cluster's keys now and keeps them, whatever is known, and
// returns their ids. When it fails, what was known counts as before.
func (k *Keys) Refresh(ctx context.Context, c *cluster.Cluster) ([]string, error) {
	if len(c.JWKS) > 0 {
		return k.CheckIDs(ctx, c)
	}
	now := k.Now()
	keys, err := k.fetch(ctx, c)
	if err != nil {
		return nil, err
	}
	k.keep(c, keySet{keys: keys, fetched: now, tried: now})
	return idsOf(keys), nil
}

func idsOf(keys []jose.JSONWebKey) []string {
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.KeyID
	}
	return ids
}

// uncached is the same without what is known.
func (k *Keys) uncached() *Keys {
	return &Keys{Now: k.Now, Opener: k.Opener, MaxAge: k.MaxAge, Observe: k.Observe}
}

func (k *Keys) maxAge() time.Duration {
	if k.MaxAge <= 0 {
		return DefaultKeysMaxAge
	}
	return k.MaxAge
}

func (k *Keys) fetch(ctx context.Context, c *cluster.Cluster) ([]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	source := KeysFrom(c)
	var keys []jose.JSONWebKey
	var err error
	if source == FromServer {
		keys, err = fetchFromServer(ctx, c, k.Opener)
	} else {
		keys, err = fetch(ctx, c)
	}
	if k.Observe != nil {
		k.Observe(source, err != nil)
	}
	return keys, err
}

func pick(keys []jose.JSONWebKey, id string) ([]jose.JSONWebKey, error) {
	if id == "" {
		if len(keys) == 1 {
			return keys, nil
		}
		return nil, fmt.Errorf("%w: the token names none and there are %d", ErrNoSuchKey, len(keys))
	}
	var out []jose.JSONWebKey
	for _, key := range keys {
		if key.KeyID == id {
			out = append(out, key)
		}
	}
	if len(out) == 0 {
		return nil, ErrNoSuchKey
	}
	return out, nil
}

// ParseKeys reads a key set. Private and symmetric keys are refused: they have
// no place in it, and somebody has just shown them to us.
func ParseKeys(b []byte) ([]jose.JSONWebKey, error) {
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(b, &set); err != nil {
		return nil, fmt.Errorf("not a JSON web key set: %w", err)
	}
	if len(set.Keys) == 0 || len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("the key set has %d keys, want 1 to %d", len(set.Keys), maxKeys)
	}
	for _, key := range set.Keys {
		if !key.Valid() || !key.IsPublic() {
			return nil, fmt.Errorf("key %q is not a valid public key", key.KeyID)
		}
	}
	return set.Keys, nil
}

func fetch(ctx context.Context, c *cluster.Cluster) ([]jose.JSONWebKey, error) {
	client, err := clientFor(c)
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	var discovery struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	// OpenID Connect Discovery 1.0 section 2. With a query the path would not be
	// that of a discovery document but whatever the issuer says.
	if strings.Contains(c.Issuer, "?") {
		return nil, fmt.Errorf("issuer %q has a query, so there is no discovery document; register its keys", c.Issuer)
	}
	doc, err := get(ctx, client, strings.TrimSuffix(c.Issuer, "/")+"/.well-known/openid-configuration")
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(doc, &discovery); err != nil {
		return nil, fmt.Errorf("the discovery document is not JSON: %w", err)
	}
	if discovery.Issuer != c.Issuer {
		return nil, fmt.Errorf("the discovery document is of issuer %q", discovery.Issuer)
	}
	if err := cluster.ValidFetchURL(discovery.JWKSURI); err != nil {
		return nil, fmt.Errorf("jwks_uri: %w", err)
	}
	if strings.HasPrefix(c.Issuer, "https:") && !strings.HasPrefix(discovery.JWKSURI, "https:") {
		return nil, fmt.Errorf("jwks_uri %q is less protected than the issuer", discovery.JWKSURI)
	}
	doc, err = get(ctx, client, discovery.JWKSURI)
	if err != nil {
		return nil, err
	}
	return ParseKeys(doc)
}

func clientFor(c *cluster.Cluster) (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if dial := dialer(c.Issuer); dial != nil {
		transport.DialContext = dial
	}
	if c.CA != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(c.CA)) {
			return nil, errors.New("the cluster's CA holds no certificate in PEM")
		}
		transport.TLSClientConfig.RootCAs = pool
	}
	return &http.Client{
		Transport: transport,
		Timeout:   fetchTimeout,
		// A redirect would take the request where nobody registered it to go.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// dialer connects to where a registered URL leads, if that is admissible. It is
// nil where a proxy decides.
func dialer(registered string) func(ctx context.Context, network, address string) (net.Conn, error) {
	if proxied(registered) {
		return nil
	}
	d := net.Dialer{Timeout: fetchTimeout, Control: func(_, address string, _ syscall.RawConn) error {
		return admissible(registered, address)
	}}
	return d.DialContext
}

// proxied reports whether the operator has requests to a URL go through a
// proxy, which then decides where they may go.
func proxied(registered string) bool {
	u, err := url.Parse(registered)
	if err != nil {
		return false
	}
	proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u})
	return err == nil && proxy != nil
}

// admissible refuses addresses behind which there is no issuer or API server
// for others to name: link-local ones, where clouds keep what their machines
// know, and this machine's own, unless the registered URL says that it is here.
func admissible(registered, address string) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	ip := ap.Addr().Unmap()
	switch {
	case ip.IsLinkLocalUnicast(), ip.IsMulticast(), ip.IsUnspecified():
		return fmt.Errorf("the address %s is not one that may be registered", ip)
	case ip.IsLoopback() && !onThisMachine(registered):
		return fmt.Errorf("the registered name leads to this machine (%s)", ip)
	}
	return nil
}

func onThisMachine(registered string) bool {
	u, err := url.Parse(registered)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", url, err)
	}
	// Key sets have a media type of their own, and API servers insist on it.
	req.Header.Set("Accept", "application/json, application/jwk-set+json;q=0.9")
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", url, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		hint := ""
		if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
			hint = " (does the cluster allow anonymous discovery? else register it with --token-review or with its keys, --keys upload or --jwks)"
		}
		return nil, fmt.Errorf("fetch %s: HTTP status %s%s", url, resp.Status, hint)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", url, err)
	}
	if len(b) > maxDocument {
		return nil, fmt.Errorf("fetch %s: the answer is longer than %d bytes", url, maxDocument)
	}
	return b, nil
}
