package server

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tabard.dev/tabard/internal/attest"
	"tabard.dev/tabard/internal/grant"
	"tabard.dev/tabard/internal/host/link"
)

// hosts lets two hosts in, of which one is revoked.
func (b *builder) hosts() {
	b.v["host"], _ = b.join("rack1")
	b.v["host_revoked"], _ = b.join("rack2")
	b.call("POST", "/v1/hosts/$host_revoked/revoke", "")
}

// hostKey signs as a host does.
type hostKey struct {
	key     crypto.Signer
	id, kid string
}

func (k hostKey) sign(typ string, claims attest.HostProof) string {
	o := (&jose.SignerOptions{}).WithType(jose.ContentType(typ))
	if k.kid != "" {
		o = o.WithHeader("kid", k.kid)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: k.key}, o)
	if err != nil {
		panic(buildError{err})
	}
	claims.Audience, claims.JTI = []string{"http://tabard.test/identity/token"}, rand.Text()
	claims.IssuedAt, claims.Expires = time.Now().Unix(), time.Now().Add(time.Minute).Unix()
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(buildError{err})
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		panic(buildError{err})
	}
	raw, err := signed.CompactSerialize()
	if err != nil {
		panic(buildError{err})
	}
	return raw
}

// join lets a host in and returns its id.
func (b *builder) join(name string) (string, hostKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(buildError{err})
	}
	secret := b.call("POST", "/v1/hosts/join_tokens", `{"name":"`+name+`"}`)["join_token"].(string)
	k := hostKey{key: key}
	body, err := json.Marshal(link.JoinRequest{
		Token: secret, Key: must(jose.JSONWebKey{Key: key.Public()}.MarshalJSON()), Proof: k.sign(attest.TypeHostJoin, attest.HostProof{Join: link.Fingerprint(secret)}),
	})
	if err != nil {
		panic(buildError{err})
	}
	m := b.call("POST", link.PathJoin, string(body))
	k.id, k.kid = m["id"].(string), m["kid"].(string)
	return k.id, k
}

func must(raw []byte, err error) json.RawMessage {
	if err != nil {
		panic(buildError{err})
	}
	return raw
}

// login returns the host's access token.
func (k hostKey) login(t *testing.T, s *Server) string {
	t.Helper()
	form := url.Values{
		"grant_type": {grant.TypeClientCredentials}, "client_assertion_type": {grant.AssertionType},
		"client_assertion": {k.sign(attest.TypeHostAssertion, attest.HostProof{Issuer: k.id, Subject: k.id})},
	}
	a := send(s, request{
		method: "POST", target: "/identity/token", body: []byte(form.Encode()), header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
	})
	var m struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(a.body, &m); err != nil || m.AccessToken == "" {
		t.Fatalf("%d %s", a.status, a.body)
	}
	return m.AccessToken
}

func TestAHostsTokenIsGoodForNothingButWhatAHostDoes(t *testing.T) {
	r := start(t)
	v, token := r.asOwner()
	b := &builder{s: r.s, token: token, v: v.with()}
	_, k := b.join("fresh")
	hostToken := k.login(t, r.s)
	before := r.records()
	for _, s := range r.steps() {
		if s.Pattern == "/" || s.Pattern == "POST "+link.PathJoin {
			continue // for everybody
		}
		q := s.request(s.Route, v, hostToken)
		_, path, _ := strings.Cut(s.Pattern, " ")
		if strings.HasPrefix(path, "/v1/agent/") {
			if path == link.PathStream {
				continue // goes on
			}
			if a := send(r.s, q); a.status == http.StatusUnauthorized {
				t.Errorf("%s: %d %s", s, a.status, a.body)
			}
			continue
		}
		if a := send(r.s, q); a.status != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", s, a.status, a.body)
		}
	}
	if diff := changed(before, r.records()); len(diff) > 0 {
		t.Errorf("changed %q", diff)
	}
	// Nor does it become another token.
	for name, form := range map[string]url.Values{
		"assume":  {"grant_type": {grant.TypeAssume}, "access_token": {hostToken}, "profile_id": {v["profile"]}},
		"refresh": {"grant_type": {"refresh_token"}, "refresh_token": {hostToken}},
		"apikey":  {"grant_type": {grant.TypeAPIKey}, "apikey": {hostToken}},
		"cr":      {"grant_type": {grant.TypeCRToken}, "cr_token": {hostToken}, "profile_id": {v["profile"]}},
	} {
		a := send(r.s, request{
			method: "POST", target: "/identity/token", body: []byte(form.Encode()), header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
		})
		if a.ok() || bytes.Contains(a.body, []byte(`"access_token"`)) {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	r.quiet()
}
