package harness

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
)

// Issuer makes service-account tokens in exactly the form of a Kubernetes API
// server and publishes its keys over TLS, with a certificate of its own CA.
type Issuer struct {
	T      testing.TB
	URL    string
	CAFile string

	mu    sync.Mutex
	key   crypto.Signer
	keyID string
	alg   jose.SignatureAlgorithm
}

// NewIssuer starts an issuer.
func NewIssuer(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{T: t, alg: jose.ES256}
	i.Rotate()
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/openid/v1/jwks"})
	})
	mux.HandleFunc("/openid/v1/jwks", func(w http.ResponseWriter, _ *http.Request) { w.Write(i.JWKS()) })
	srv := httptest.NewTLSServer(mux)
	t.Cleanup(srv.Close)
	i.URL = srv.URL
	i.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(i.CAFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// Rotate replaces the signing key.
func (i *Issuer) Rotate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.T.Fatal(err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.key, i.keyID = key, "key-"+uuid.NewString()[:8]
}

// JWKS is the published key set.
func (i *Issuer) JWKS() []byte {
	i.mu.Lock()
	defer i.mu.Unlock()
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: i.key.Public(), KeyID: i.keyID, Algorithm: string(i.alg), Use: "sig"},
	}})
	if err != nil {
		i.T.Fatal(err)
	}
	return b
}

// Claims are the claims of a good token for a pod, to be spoilt as wanted.
func (i *Issuer) Claims(namespace, account string) map[string]any {
	now := time.Now()
	named := func(name string) map[string]any { return map[string]any{"name": name, "uid": uuid.NewString()} }
	return map[string]any{
		"iss": i.URL, "aud": []string{"iam"}, "jti": uuid.NewString(),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"sub": fmt.Sprintf("system:serviceaccount:%s:%s", namespace, account),
		"kubernetes.io": map[string]any{
			"namespace": namespace, "serviceaccount": named(account), "pod": named(account + "-pod"), "node": named("node-1"),
		},
	}
}

// Token signs a good token for a pod.
func (i *Issuer) Token(namespace, account string) string { return i.Sign(i.Claims(namespace, account)) }

// Sign signs claims with the present key.
func (i *Issuer) Sign(claims map[string]any) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: i.alg, Key: jose.JSONWebKey{Key: i.key, KeyID: i.keyID}}, nil)
	if err != nil {
		i.T.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		i.T.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		i.T.Fatal(err)
	}
	raw, err := jws.CompactSerialize()
	if err != nil {
		i.T.Fatal(err)
	}
	return raw
}
