package vm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
)

// rogue is a host that has joined as any other, with a key of its own, and then
// says to the server whatever it likes.
type rogue struct {
	site   *site
	client *http.Client
	key    *rsa.PrivateKey
	joined struct{ ID, Name, Kid, Region string }

	mu     sync.Mutex
	heard  strings.Builder   // all of the stream
	placed map[string]placed // by name
	synced bool
	stop   context.CancelFunc
	ended  chan struct{}
}

// placed is what the rogue uses of a placement.
type placed struct {
	ID         string
	CRN        string
	Name       string
	AccountID  string `json:"account_id"`
	HostID     string `json:"host_id"`
	ImageID    string `json:"image_id"`
	Status     string
	Interfaces []struct{ Address string }
}

// newRogue makes one that has not joined.
func (s *site) newRogue() *rogue {
	s.t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		s.t.Fatal(err)
	}
	pem, err := os.ReadFile(filepath.Join(s.dir, "ca.pem"))
	if err != nil {
		s.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		DialContext:     func(_ context.Context, _, to string) (net.Conn, error) { return dialFrom(s.core, to, net.Dialer{}) },
	}
	return &rogue{site: s, key: key, client: &http.Client{Transport: tr}, placed: map[string]placed{}}
}

// joinToken makes a join token for a host.
func (s *site) joinToken(args ...string) string {
	s.t.Helper()
	var made struct {
		Token string `json:"join_token"`
	}
	s.json(&made, append([]string{"host", "create-join-token"}, args...)...)
	return made.Token
}

// result is what the server said.
type result struct {
	status int
	body   string
}

func (r result) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

func (r result) refused() bool { return r.status >= 400 && r.status < 500 }

// call asks the server. An error of the network is a result without a status.
func (r *rogue) call(method, path, bearer, kind string, body []byte) result {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, serverURL+path, bytes.NewReader(body))
	if err != nil {
		return result{0, err.Error()}
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return result{0, err.Error()}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return result{0, err.Error()}
	}
	return result{resp.StatusCode, string(b)}
}

func (r *rogue) post(path, bearer string, body any) result {
	b, err := json.Marshal(body)
	if err != nil {
		return result{0, err.Error()}
	}
	return r.call(http.MethodPost, path, bearer, "application/json", b)
}

// sign signs claims with the rogue's key, under a key id and a type.
func (r *rogue) sign(claims any, kid, typ string) string {
	o := &jose.SignerOptions{}
	if kid != "" {
		o = o.WithHeader("kid", kid)
	}
	if typ != "" {
		o = o.WithType(jose.ContentType(typ))
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: r.key}, o)
	if err != nil {
		panic(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		panic(err)
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return raw
}

// proof is what a host proves its key with.
func proof(of string, more map[string]any) map[string]any {
	now := time.Now()
	c := map[string]any{"aud": serverURL + "/identity/token", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix(), "jti": uuid.NewString()}
	if of != "" {
		c["iss"], c["sub"] = of, of
	}
	for k, v := range more {
		c[k] = v
	}
	return c
}

// join tries to join with a token.
func (r *rogue) join(token string) result {
	jwk, err := jose.JSONWebKey{Key: r.key.Public(), Algorithm: "RS256", Use: "sig"}.MarshalJSON()
	if err != nil {
		return result{0, err.Error()}
	}
	sum := sha256.Sum256([]byte(token))
	res := r.post("/v1/agent/join", "", map[string]any{
		"join_token": token, "jwk": json.RawMessage(jwk),
		"proof": r.sign(proof("", map[string]any{"join": base64.RawURLEncoding.EncodeToString(sum[:])}), "", "host-join+jwt"),
	})
	if res.status == http.StatusCreated {
		if err := json.Unmarshal([]byte(res.body), &r.joined); err != nil {
			return result{0, err.Error()}
		}
	}
	return res
}

// login exchanges an assertion for an access token.
func (r *rogue) login(assertion string) result {
	form := url.Values{
		"grant_type": {"client_credentials"}, "client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		"client_assertion": {assertion},
	}
	return r.call(http.MethodPost, "/identity/token", "", "application/x-www-form-urlencoded", []byte(form.Encode()))
}

func (r *rogue) assertion() string {
	return r.sign(proof(r.joined.ID, nil), r.joined.Kid, "client-authentication+jwt")
}

// access logs in.
func (r *rogue) access() string {
	r.site.t.Helper()
	res := r.login(r.assertion())
	token := stringField(res.body, "access_token")
	if token == "" {
		r.site.t.Fatalf("the rogue does not get in as itself: %s", res)
	}
	return token
}

// listen keeps the stream of placements open until close.
func (r *rogue) listen() {
	r.site.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, serverURL+"/v1/agent/stream?capacity="+
		url.QueryEscape(`{"drivers":["netns","qemu"],"vcpus":8,"memory_mib":65536,"version":"rogue"}`), nil)
	if err != nil {
		r.site.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+r.access())
	resp, err := r.client.Do(req)
	if err != nil {
		r.site.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		r.site.t.Fatalf("the stream answers %d", resp.StatusCode)
	}
	r.stop, r.ended = cancel, make(chan struct{})
	go func() {
		defer close(r.ended)
		defer resp.Body.Close()
		d := json.NewDecoder(resp.Body)
		for {
			var raw json.RawMessage
			if d.Decode(&raw) != nil {
				return
			}
			var m struct {
				Placement *struct{ Instance placed }
				Synced    bool
			}
			r.mu.Lock()
			r.heard.Write(raw)
			if json.Unmarshal(raw, &m) == nil && m.Placement != nil {
				r.placed[m.Placement.Instance.Name] = m.Placement.Instance
			}
			r.synced = r.synced || m.Synced
			r.mu.Unlock()
		}
	}()
}

func (r *rogue) close() {
	if r.stop != nil {
		r.stop()
		<-r.ended
	}
	r.client.CloseIdleConnections()
}

// has returns what the stream said of an instance.
func (r *rogue) has(name string) (placed, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.placed[name]
	return p, ok
}

// claims are those of an identity token about an instance.
func (r *rogue) claims(p placed, more map[string]any) map[string]any {
	issuer := "VSI-CR_" + r.joined.Region
	c := map[string]any{
		"iss": issuer, "aud": []string{issuer, uuid.NewString()}, "iat": time.Now().Unix(), "exp": time.Now().Add(5 * time.Minute).Unix(),
		"jti":          uuid.NewString(),
		"iaas":         map[string]any{"crn": p.CRN, "accountID": p.AccountID, "instanceID": p.ID, "region": r.joined.Region},
		"ip_addresses": []any{}, "subnets": []any{}, "vpc": map[string]any{},
	}
	for k, v := range more {
		c[k] = v
	}
	return c
}

// exchange asks for an access token in the name of an instance.
func (r *rogue) exchange(bearer string, of placed, token, profile string) result {
	address := ""
	if len(of.Interfaces) > 0 {
		address = of.Interfaces[0].Address
	}
	return r.post("/v1/agent/iam_tokens", bearer, map[string]any{
		"instance": of.ID, "token": token, "profile_name": profile, "transaction": uuid.NewString(), "address": address, "agent": "rogue",
	})
}

// forged are tokens with other claims, or another key, than the one signed.
func forged(t *testing.T, token, other string, public any) map[string]string {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is no token", token)
	}
	head := map[string]any{}
	b, err := base64.RawURLEncoding.DecodeString(parts[0])
	if err != nil || json.Unmarshal(b, &head) != nil {
		t.Fatal("the token's header cannot be read")
	}
	with := func(alg string) string {
		h := map[string]any{}
		for k, v := range head {
			h[k] = v
		}
		h["alg"] = alg
		b, err := json.Marshal(h)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	out := map[string]string{
		"alg none":                      with("none") + "." + parts[1] + ".",
		"alg None and the signature":    with("None") + "." + parts[1] + "." + parts[2],
		"no signature":                  parts[0] + "." + parts[1] + ".",
		"another's claims":              parts[0] + "." + strings.Split(other, ".")[1] + "." + parts[2],
		"a signature of something else": parts[0] + "." + parts[1] + "." + strings.Split(other, ".")[2],
		"alg ES256":                     with("ES256") + "." + parts[1] + "." + parts[2],
	}
	secrets := map[string][]byte{"an empty secret": {0}}
	if public != nil {
		der, err := x509.MarshalPKIXPublicKey(public)
		if err != nil {
			t.Fatal(err)
		}
		secrets["the public key as the secret"] = der
	}
	for name, secret := range secrets {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: append(secret, make([]byte, 32)...)},
			(&jose.SignerOptions{}).WithHeader("kid", head["kid"]))
		if err != nil {
			t.Fatal(err)
		}
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(payload)
		if err != nil {
			t.Fatal(err)
		}
		if out["HS256 with "+name], err = signed.CompactSerialize(); err != nil {
			t.Fatal(err)
		}
	}
	// A token that brings its own key.
	own, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]*jose.SignerOptions{
		"a key in its header":     {EmbedJWK: true},
		"a key behind a link":     (&jose.SignerOptions{}).WithHeader("jku", "http://10.99.0.1:9/keys"),
		"a critical header":       (&jose.SignerOptions{}).WithHeader("crit", []string{"x"}).WithHeader("x", true),
		"a key that nobody knows": {},
	} {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: own}, o.WithHeader("kid", head["kid"]))
		if err != nil {
			t.Fatal(err)
		}
		signed, err := signer.Sign(payload)
		if err != nil {
			t.Fatal(err)
		}
		if out[name], err = signed.CompactSerialize(); err != nil {
			t.Fatal(err)
		}
	}
	return out
}
