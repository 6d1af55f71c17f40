package authz

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/jwt"
)

// Bounds on the server's keys.
const (
	keysFresh   = 5 * time.Minute // then they are fetched again
	keysUsable  = time.Hour       // how long they count while fetching fails
	fetchPeriod = 10 * time.Second
	clockSkew   = 30 * time.Second
	maxKeySet   = 1 << 20 // bytes
)

// algorithms are those that the server can sign with.
var algorithms = []jose.SignatureAlgorithm{jose.ES256, jose.RS256}

type claims struct {
	IAMID   string `json:"iam_id"`
	Name    string `json:"name"`
	Issuer  string `json:"iss"`
	TokenID string `json:"jti"`
	Issued  int64  `json:"iat"`
	Expires int64  `json:"exp"`
	Account struct {
		BSS string `json:"bss"`
	} `json:"account"`
	Authn struct {
		IAMID string `json:"iam_id"`
	} `json:"authn"`
}

// verify checks a token's form, signature, issuer and time.
func (g *Guard) verify(ctx context.Context, raw string) (Caller, error) {
	if raw == "" {
		return Caller{}, errNoToken
	}
	t, err := jwt.Parse(raw, algorithms, "", "JWT")
	if err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	}
	key, err := g.keys.of(ctx, t.KeyID)
	if err != nil {
		return Caller{}, err
	}
	var c claims
	if key.Algorithm != "" && key.Algorithm != t.Alg {
		return Caller{}, fmt.Errorf("%w: it is signed with %s, its key is for %s", ErrUnauthenticated, t.Alg, key.Algorithm)
	}
	if err := t.Verify(key.Key, &c); err != nil {
		return Caller{}, fmt.Errorf("%w: %w", ErrUnauthenticated, err)
	}
	now := g.cfg.Now()
	switch {
	case c.Issuer != g.cfg.Issuer:
		return Caller{}, fmt.Errorf("%w: its issuer is another one", ErrUnauthenticated)
	case now.Unix() >= c.Expires:
		return Caller{}, fmt.Errorf("%w: it has expired", ErrUnauthenticated)
	case c.Issued > now.Add(clockSkew).Unix():
		return Caller{}, fmt.Errorf("%w: it is from the future", ErrUnauthenticated)
	case c.IAMID == "" || c.Account.BSS == "":
		return Caller{}, fmt.Errorf("%w: it names nobody", ErrUnauthenticated)
	}
	caller := Caller{IAMID: c.IAMID, AccountID: c.Account.BSS, Name: c.Name, AuthnID: c.Authn.IAMID, TokenID: c.TokenID, Expires: time.Unix(c.Expires, 0)}
	if caller.AuthnID == "" {
		caller.AuthnID = c.IAMID
	}
	return caller, nil
}

// keys are the server's public keys, fetched when they are needed.
type keys struct {
	cfg     Config
	mu      sync.Mutex
	set     map[string]jose.JSONWebKey
	fetched time.Time
	tried   time.Time     // when the last fetch began
	err     error         // of the last fetch
	pending chan struct{} // closed when the fetch under way is done; nil without one
}

// of returns the key with an id. A known key is never waited for: it is used
// while newer ones are fetched, for the server itself checks the token again
// before it decides. An unknown id causes a fetch, at a bounded rate, so that a
// rotation is noticed and made-up ids are not passed on.
func (k *keys) of(ctx context.Context, id string) (jose.JSONWebKey, error) {
	k.mu.Lock()
	now := k.cfg.Now()
	key, known := k.set[id]
	age := now.Sub(k.fetched)
	if known && age < keysFresh {
		k.mu.Unlock()
		return key, nil
	}
	if k.pending == nil && (k.tried.IsZero() || now.Sub(k.tried) >= fetchPeriod) {
		k.tried, k.pending = now, make(chan struct{})
		go k.refresh(context.WithoutCancel(ctx), now)
	}
	pending := k.pending
	k.mu.Unlock()
	if known && age < keysUsable {
		return key, nil
	}
	if pending != nil {
		select {
		case <-pending:
		case <-ctx.Done():
			return key, fmt.Errorf("%w: the request ended: %w", ErrUnavailable, ctx.Err())
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	key, known = k.set[id]
	switch {
	case known && k.cfg.Now().Sub(k.fetched) < keysUsable:
		return key, nil
	case k.err != nil:
		return key, fmt.Errorf("%w: %w", ErrUnavailable, k.err)
	}
	return key, fmt.Errorf("%w: the server has no key with its id", ErrUnauthenticated)
}

// refresh fetches the keys and lets go who waits for them.
func (k *keys) refresh(ctx context.Context, began time.Time) {
	set, err := k.fetch(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err = err; err == nil {
		k.set, k.fetched = set, began
	}
	close(k.pending)
	k.pending = nil
}

func (k *keys) fetch(ctx context.Context) (map[string]jose.JSONWebKey, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.cfg.URL+"/identity/keys", nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.cfg.Client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("fetch the server's keys: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch the server's keys: status %s", resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySet))
	if err != nil {
		return nil, fmt.Errorf("fetch the server's keys: %w", err)
	}
	var published jose.JSONWebKeySet
	if err := json.Unmarshal(body, &published); err != nil {
		return nil, fmt.Errorf("read the server's keys: %w", err)
	}
	set := map[string]jose.JSONWebKey{}
	for _, key := range published.Keys {
		if key.IsPublic() && key.KeyID != "" {
			set[key.KeyID] = key
		}
	}
	return set, nil
}
